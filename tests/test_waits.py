"""How often a step waits for a GPU, counted on a stand-in for one.

Each wait lets the card run out of work.
"""
import json
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot take a stand-in for a GPU that is written in Python")

PRETRAIN = [*SMALL, "--val_fraction", "0", "--steps", "10", "--log_every", "3",
            "--monitor_every", "6"]
FINETUNE = (
    "--spacing 10 10 10 --crop 24 --embed_dim 8 --depths 1 1 --heads 2 2 --workers 0 --device cpu "
    "--crops_per_volume 2 --steps 7 --log_every 3 --val_every 100").split()
WAITING = """
import sys
sys.path.insert(0, "tests")
import card, torch
kept = card.plug_in()
with card.UseCard():
    x = torch.arange(6.).to(card.CARD, non_blocking=True)
    assert x.is_cuda and (x + 1).sum().cpu() == 21 and len(card.waits) == 1
    x.sum().item(), x[x > 2], (x > 2).nonzero(), bool(x.isfinite().all()), x.tolist()
    torch.ones(2).to(card.CARD), x.new_tensor([1.]), x.copy_(torch.ones(6)), x[[0, 2]]
    assert len(card.waits) == 1 + 5 + 4, card.waits
    x + torch.ones(6)
"""


def python(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)


def test_the_stand_in_counts_what_waits_and_refuses_tensors_of_the_cpu():
    done = python("-c", WAITING)
    assert done.stderr.endswith(
        "RuntimeError: add: expected all tensors on one device, found the card and the CPU\n")


@pytest.mark.parametrize("script, flags, expected", [
    ("train_ssl.py", PRETRAIN, [1, 2, 1, 1, 3, 1, 1, 2]),
    ("finetune.py", FINETUNE, [1, 2, 1, 1, 2])])
def test_a_step_waits_once_once_more_to_log_and_once_to_look_for_collapse(
        script, flags, expected, phantoms, tmp_path):
    done = python("tests/card.py", script, *flags, "--data", phantoms,
                  "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    # the first step builds index tables and masks
    first, *waits = json.loads(done.stdout.splitlines()[-1])
    assert waits == expected and max(waits) <= 3
