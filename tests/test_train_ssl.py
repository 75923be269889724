import csv
import json
import math
import shutil

import pytest
import torch

import train_ssl
from conftest import SMALL
from smit import runtime


def train(data, out, *flags):
    """A small run in this process; its log as a list of dicts."""
    arguments = [*SMALL, "--data", data, "--out", out, "--cache", out.parent / "cache", *flags]
    train_ssl.main(train_ssl.parse_arguments([str(a) for a in arguments]))
    return read_log(out)


def read_log(out):
    with open(out / "log.csv") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def test_defaults_are_the_papers():
    args = train_ssl.parse_arguments([])
    assert (args.epochs, args.warmup_epochs, args.lr, args.mask_ratio) == (400, 30, 2e-4, .7)
    assert (args.mip, args.mpd, args.itd, args.momentum) == (1, .1, .1, .996)
    assert (args.student_temp, args.teacher_temp, args.spacing) == (.1, [.04, .07], [1.5, 1.5, 2.])
    assert (args.crop, args.view, args.window, args.embed_dim) == ([128] * 3, [96] * 3, [4] * 3, 48)
    assert train_ssl.parse_arguments(["--method", "ibot", "--itd", ".5"]).itd == .5


@pytest.mark.parametrize("method", train_ssl.METHODS)
def test_the_loss_of_each_method_decreases(method, phantoms, tmp_path):
    # a teacher and centres that stand still, so that the target does not move while the student approaches it
    log = train(phantoms, tmp_path / "run", "--method", method, "--steps", 24, "--batch", 3, "--val_fraction", 0,
                "--momentum", 1, "--center_momentum", 1, "--lr", "1e-2", "--drop_path", 0)
    losses = [row["loss"] for row in log]
    assert all(map(math.isfinite, losses)) and sum(losses[-6:]) < .97 * sum(losses[:6])


def test_a_weight_of_zero_skips_the_computation(phantoms, tmp_path, monkeypatch):
    calls = []
    forward = train_ssl.pretrain.SMIT.forward
    monkeypatch.setattr(train_ssl.pretrain.SMIT, "forward", lambda self, *a: calls.append(self) or forward(self, *a))
    train(phantoms, tmp_path / "run", "--method", "simmim", "--steps", 2, "--val_fraction", 0)
    assert len(calls) == 2 and len(set(map(id, calls))) == 1           # the student, once a step: no teacher runs
    state = runtime.load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["teacher"] is None and not state["centers"]
    assert not any("head.mlp" in name for name in state["student"])


def test_the_logged_loss_is_the_weighted_sum(phantoms, tmp_path):
    for row in train(phantoms, tmp_path / "run", "--steps", 3, "--accumulate", 2):
        assert row["loss"] == pytest.approx(row["mip"] + .1 * row["mpd"] + .1 * row["itd"], rel=1e-6)


def test_schedules_run_from_end_to_end(phantoms, tmp_path):
    log = train(phantoms, tmp_path / "run", "--steps", 6, "--val_fraction", 0)
    assert log[0]["momentum"] == .996 and log[-1]["momentum"] == 1
    assert log[0]["teacher_temp"] == pytest.approx(.04) and log[-1]["teacher_temp"] == pytest.approx(.07)
    assert max(row["lr"] for row in log) <= 3e-3 and 0 < log[-1]["lr"] < .3 * 3e-3


def test_validation_stands_beside_predictors_that_know_nothing(phantoms, tmp_path):
    log = train(phantoms, tmp_path / "run", "--steps", 2, "--val_fraction", .4, "--val_every", 2)
    assert "val_mip" not in log[0]
    assert 0 < log[1]["val_median"] and 0 < log[1]["val_constant"] < .5 and log[1]["val_mip"] > 0


def test_two_ranks_equal_one_with_twice_the_batch(phantoms, tmp_path, run_script):
    flags = [*SMALL, "--data", phantoms, "--cache", "cache", "--steps", 4, "--drop_path", ".3", "--seed", 5]
    run_script("train_ssl.py", *flags, "--batch", 2, "--out", "one")
    run_script("train_ssl.py", *flags, "--batch", 1, "--out", "two", ranks=2)
    run_script("train_ssl.py", *flags, "--batch", 1, "--accumulate", 2, "--out", "accumulated")
    one = runtime.load_checkpoint(tmp_path / "one" / "last.pt")
    for other in ("two", "accumulated"):
        same = runtime.load_checkpoint(tmp_path / other / "last.pt")
        for part in ("student", "teacher", "centers"):
            for name, tensor in one[part].items():
                torch.testing.assert_close(same[part][name], tensor, rtol=1e-5, atol=1e-5, msg=f"{other}: {name}")
        for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / other)):
            assert all(b[term] == pytest.approx(a[term], rel=1e-5) for term in ("loss", "mip", "mpd", "itd"))


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(phantoms, tmp_path):
    flags = ["--steps", 6, "--save_steps", 3, "--drop_path", ".3", "--val_fraction", ".4", "--val_every", 2]
    train(phantoms, tmp_path / "whole", *flags)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "last.prev.pt", tmp_path / "resumed" / "last.pt")          # step 3
    shutil.copy(tmp_path / "whole" / "log.csv", tmp_path / "resumed" / "log.csv")
    train(phantoms, tmp_path / "resumed", *flags, "--resume", "--workers", 1)
    whole, resumed = (runtime.load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "resumed"))
    whole.pop("config"), resumed.pop("config")
    assert repr(whole) == repr(resumed)
    for part in ("student", "teacher", "centers"):
        assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part])
    for a, b in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "whole" / "log.csv").read_bytes() == (tmp_path / "resumed" / "log.csv").read_bytes()


def test_resume_refuses_other_settings(phantoms, tmp_path):
    train(phantoms, tmp_path / "run", "--steps", 1)
    with pytest.raises(ValueError, match="mask_ratio: 0.7 in the checkpoint, 0.5 now"):
        train(phantoms, tmp_path / "run", "--steps", 1, "--resume", "--mask_ratio", .5)
    with pytest.raises(ValueError, match="--overwrite"):
        train(phantoms, tmp_path / "run", "--steps", 1)


@pytest.mark.parametrize("flags, why", [
    ("--view 20", "multiple of 8"), ("--view 32", "larger than --crop"), ("--mask_cell 5", "--mask_cell 5"),
    ("--mask_cell 2", "patch token"), ("--mask_ratio 0", "--mask_ratio"), ("--mip 0 --mpd 0 --itd 0", "nothing"),
    ("--val_fraction 1", "--val_fraction"), ("--depths 1 1 1", "2 heads|multiple of"), ("--key test", "'test'")])
def test_settings_that_do_not_fit_are_refused_before_any_work(flags, why, phantoms, tmp_path):
    with pytest.raises(ValueError, match=why):
        train(phantoms, tmp_path / "run", *flags.split())
    assert not (tmp_path / "run" / "log.csv").exists()


def test_bad_volumes_stop_the_run_unless_allowed(phantoms, tmp_path):
    import nibabel
    import numpy as np
    folder = tmp_path / "images"
    shutil.copytree(phantoms.parent / "imagesTr", folder)
    air = nibabel.Nifti1Image(np.full((30, 30, 30), -1000, np.int16), np.diag([10, 10, 10, 1]))
    nibabel.save(air, folder / "air.nii.gz")
    flags = ["--steps", 6, "--batch", 2, "--val_fraction", 0]
    with pytest.warns(UserWarning, match="air.nii.gz"), pytest.raises(ValueError, match="air.nii.gz.*|.*--max_bad 0"):
        train(folder, tmp_path / "strict", *flags)
    with pytest.warns(UserWarning, match="air.nii.gz"):
        train(folder, tmp_path / "lenient", *flags, "--max_bad", 1)


def test_errors_are_one_line_and_exit_code_2(tmp_path, run_script):
    done = run_script("train_ssl.py", *SMALL, "--data", "nowhere", check=False)
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_student_weights_say_what_they_are(phantoms, tmp_path):
    train(phantoms, tmp_path / "run", "--steps", 1)
    student = runtime.load_checkpoint(tmp_path / "run" / "student.pt")
    assert student["config"]["spacing"] == [10, 10, 10] and student["config"]["modality"] == "ct"
    assert any(name.startswith("encoder.stages.0") for name in student["model"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["global_batch"] == 2
