import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from smit.transforms import spacing_of
from smit import data
from smit.benchmark import measure as benchmark, workloads

ROOT = Path(__file__).resolve().parent.parent


def test_it_runs_and_writes_what_it_prints(tmp_path):
    command = "--quick --ours --rounds 1 --threads 1 --only prepare encoder --json".split()
    done = subprocess.run([sys.executable, "-m", "smit.benchmark", *command, tmp_path / "all.json"], cwd=ROOT,
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert list(found) == ["encoder", "prepare"] and "failed" not in done.stdout and "ours, bf16" in done.stdout
    assert all(r["wall"] > 0 and r["memory"] > 0 for row in found.values() for r in row.values())
    assert found["encoder"]["ours, checkpointing"]["gflop"] > 1.2 * found["encoder"]["ours"]["gflop"]


def test_help_is_documentation():
    done = subprocess.run([sys.executable, "-m", "smit.benchmark", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert "take turns" in done.stdout and "--compile" in done.stdout


def test_marks_compare_the_two_sides_that_were_measured():
    row = lambda cpu, memory: dict(cpu=cpu, memory=memory, wall=cpu)
    found = {"encoder": {"ours": row(2, 60), "MONAI": row(4, 100), "ours, checkpointing": row(3, 20)}}
    reached = {what: (value, good) for what, value, _, good in benchmark.marks(found, 2)}
    assert reached == {"encoder, MONAI's time / ours": (2, True), "encoder, our memory / MONAI's": (.6, True),
                       "encoder, memory with checkpointing": (pytest.approx(1 / 3), True),
                       "encoder, time with checkpointing": (1.5, False)}


def test_traffic_counts_what_is_read_and_written_and_no_view():
    x = torch.ones(10, 20)
    with benchmark.Traffic() as traffic:
        x.t() + 1
    assert traffic.moved == 2 * 800


def test_the_ct_that_is_prepared_is_a_readable_one(tmp_path):
    path = workloads.write_ct(tmp_path / "ct.nii.gz", (40, 48, 20))
    made = data.load_case({"image": path, "label": None})
    assert made["original_shape"] == (40, 48, 20) and made["image"].float().std() > 10
    assert spacing_of(made["original_affine"]) == pytest.approx((.8, .8, 1))
    assert np.allclose(np.diag(made["original_affine"])[:2], -.8)


def test_every_contestant_of_a_full_run_has_a_different_name_in_its_row():
    for extra in ([], ["--device", "cuda", "--compile"]):
        args = benchmark.parse_arguments(extra)
        args.sizes = benchmark.PAPER
        for entries in benchmark.contestants(args).values():
            labels = [label for label, *_ in entries]
            assert len(labels) == len(set(labels))
