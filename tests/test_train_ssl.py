import csv
import json
import math
import os
import re
import shutil
import signal
import sys

import nibabel
import numpy as np
import pytest
import torch

import finetune
import train_ssl
from conftest import SMALL
from foreign import monai_encoder, release_encoder
from smit import data, losses, masking, monitors, runtime, settings, weights

ON_CPU = runtime.Precision("fp32", torch.device("cpu"))


def train(data, out, *flags):
    """A small run in this process; its log as a list of dicts."""
    arguments = [*SMALL, "--data", data, "--out", out, "--cache", out.parent / "cache", *flags]
    train_ssl.main(train_ssl.parse_arguments([str(a) for a in arguments]))
    return read_log(out)


def read_log(out):
    with open(out / "log.csv") as file:
        return [{name: float(cell) for name, cell in row.items() if cell}
                for row in csv.DictReader(file)]


def test_defaults_are_the_papers():
    args = train_ssl.parse_arguments([])
    assert (args.epochs, args.warmup_epochs, args.lr, args.mask_ratio) == (400, 30, 2e-4, .7)
    assert (args.mip, args.mpd, args.itd, args.momentum) == (1, .1, .1, .996)
    assert (args.student_temp, args.teacher_temp, args.spacing) == (.1, [.04, .07], [1.5, 1.5, 2.])
    assert (args.crop, args.view, args.window, args.embed_dim) == ([128] * 3, [96] * 3, [4] * 3, 48)
    assert train_ssl.parse_arguments(["--method", "ibot", "--itd", ".5"]).itd == .5


def networks(*flags):
    """Student, teacher and centres of a small run, each with other weights,
    so that no mix-up goes unseen."""
    args = train_ssl.parse_arguments([*SMALL, "--drop_path", "0", *map(str, flags)])
    student, teacher, centers = train_ssl.build_networks(args)
    for network in filter(None, (teacher, centers)):
        for tensor in network.state_dict().values():
            tensor.add_(.1 * torch.randn_like(tensor))
    return args, student.eval(), teacher, centers  # eval: validation's mode, and no drop path


def a_batch(volumes=3):
    return {"views": torch.randint(0, 256, (volumes, 2, 1, 16, 16, 16), dtype=torch.uint8),
            "hidden": masking.random_block_mask(2 * volumes, (4, 4, 4), .7).view(
                volumes, 2, 4, 4, 4),
            "noise": torch.rand(volumes, 2, 0)}


def test_each_loss_pairs_the_views_networks_and_masks_of_the_paper():
    args, student, teacher, centers = networks()
    batch, expected = a_batch(), {"mip": 0., "mpd": 0., "itd": 0.}
    center = {name: module.value.clone() for name, module in centers.items()}
    terms, teachers = train_ssl.smit_losses(args, student, teacher, centers, batch, .05, ON_CPU)
    taught = {"mpd": [], "itd": []}
    for b in range(3):
        for here, there in ((0, 1), (1, 0)):  # u from v, then v from u, one view at a time
            u, v = (batch["views"][b, [view]].float() / 255 for view in (here, there))
            m = batch["hidden"][b, [here]]  # 4^3 cells of 4^3 voxels, which are patch tokens
            mine = student(u, masking.expand_mask(m, 2))
            same, other = teacher(u), teacher(v)
            expected["mip"] += losses.mip_loss(mine.voxels, u, masking.expand_mask(m, 4)) / 6
            expected["mpd"] += losses.mpd_loss(mine.patch_logits, same.patch_logits, m.flatten(1),
                                               center["mpd"], .1, .05) / 6
            expected["itd"] += losses.itd_loss(mine.image_logits, other.image_logits,
                                               center["itd"], .1, .05) / 6
            taught["mpd"].append(same.patch_logits[0])
            taught["itd"].append(same.image_logits)

    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6)
    for name, logits in (("mpd", teachers.patch_logits), ("itd", teachers.image_logits)):
        torch.testing.assert_close(logits.flatten(0, -2).mean(0), torch.cat(taught[name]).mean(0))
        assert not centers[name].collected  # the losses change nothing; the loop collects


def test_full_reconstruction_counts_all_voxels_and_hides_none():
    args, student, _, _ = networks("--method", "full")
    batch = a_batch()
    terms, _ = train_ssl.smit_losses(args, student, None, {}, batch, .05, ON_CPU)
    views = batch["views"].flatten(0, 1).float() / 255
    torch.testing.assert_close(terms["mip"], (student(views).voxels - views).abs().mean())


def test_one_step_moves_the_student_then_the_teacher(phantoms, tmp_path):
    flags = ["--val_fraction", 0, "--momentum", .5, "--center_momentum", 0, "--clip", 0]
    args = train_ssl.parse_arguments([*SMALL, *map(str, flags)])
    start = train_ssl.build_networks(args)[0].state_dict()
    train(phantoms, tmp_path / "run", *flags, "--steps", 1)
    state = runtime.load_checkpoint(tmp_path / "run" / "last.pt")

    for name, teacher in state["teacher"].items():
        torch.testing.assert_close(teacher, .5 * start[name] + .5 * state["student"][name])
    assert any(not torch.equal(start[name], tensor) for name, tensor in state["student"].items())
    assert all(value.abs().sum() > 0 for value in state["centers"].values())


def test_a_step_without_a_finite_gradient_changes_nothing(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ssl.losses, "mip_loss",
                        lambda pred, target, hidden: pred.sum() * math.nan)
    flags = ["--val_fraction", 0]
    log = train(phantoms, tmp_path / "run", *flags, "--steps", 2)
    state = runtime.load_checkpoint(tmp_path / "run" / "last.pt")
    start = train_ssl.build_networks(train_ssl.parse_arguments([*SMALL]))[0].state_dict()

    assert [row["skipped"] for row in log] == [1, 2] and state["skipped"] == 2
    assert all(torch.equal(start[name], tensor) for name, tensor in state["student"].items())
    assert all(torch.equal(start[name], tensor) for name, tensor in state["teacher"].items())
    assert all(not value.any() for value in state["centers"].values())
    with pytest.raises(ValueError, match="20 steps in a row.*mip"):
        train(phantoms, tmp_path / "other", *flags, "--steps", 30)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_trains_and_resumes_its_scale(precision, phantoms, tmp_path):
    flags = ["--precision", precision, "--steps", 8, "--save_steps", 4, "--val_fraction", 0]
    assert all(math.isfinite(row["loss"]) for row in train(phantoms, tmp_path / "run", *flags))
    whole = runtime.load_checkpoint(tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "last.prev.pt").rename(tmp_path / "run" / "last.pt")
    train(phantoms, tmp_path / "run", *flags, "--resume")
    resumed = runtime.load_checkpoint(tmp_path / "run" / "last.pt")

    assert resumed["scaler"] == whole["scaler"] and bool(whole["scaler"]) == (precision == "fp16")
    with pytest.raises(ValueError, match="precision"):
        train(phantoms, tmp_path / "run", *flags, "--resume", "--precision", "fp32")


def test_compiled_blocks_train_alike(phantoms, tmp_path, monkeypatch):
    compile_blocks = train_ssl.pretrain.SwinTransformer3D.compile_blocks
    monkeypatch.setattr(train_ssl.pretrain.SwinTransformer3D, "compile_blocks",
                        lambda self: compile_blocks(self, backend="eager"))
    flags = ["--steps", 2, "--val_fraction", 0, "--drop_path", 0]
    plain, compiled = (train(phantoms, tmp_path / "a", *flags),
                       train(phantoms, tmp_path / "b", *flags, "--compile"))

    for one, other in zip(plain, compiled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_matrices_decay_and_nothing_else():
    args = train_ssl.parse_arguments(SMALL)
    student = train_ssl.build_networks(args)[0]
    names = {id(p): name for name, p in student.named_parameters()}
    groups = train_ssl.build_optimizer(student, args).param_groups
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in groups)

    assert (len(decayed) + len(plain) == len(names)
            and "encoder.stages.0.blocks.0.mlp.0.weight" in decayed)
    assert not any(name.endswith(("bias", "bias_table", "mask_token")) or "norm" in name
                   for name in decayed)


def test_gradients_are_clipped(phantoms, tmp_path, monkeypatch):
    seen, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda p, limit: seen.append(limit) or clip(p, limit))
    train(phantoms, tmp_path / "a", "--steps", 1, "--val_fraction", 0, "--clip", .5)
    train(phantoms, tmp_path / "b", "--steps", 1, "--val_fraction", 0, "--clip", 0)
    assert seen == [.5, math.inf]


@pytest.mark.parametrize("method", settings.METHODS)
def test_the_loss_of_each_method_decreases(method, phantoms, tmp_path):
    # a teacher and centres that stand still, so that the target does not move while the
    # student approaches it
    log = train(phantoms, tmp_path / "run", "--method", method, "--steps", 24, "--batch", 4,
                "--val_fraction", 0, "--momentum", 1, "--center_momentum", 1, "--lr", "1e-2",
                "--drop_path", 0)
    losses = [row["loss"] for row in log]

    assert all(map(math.isfinite, losses)) and sum(losses[-6:]) < .97 * sum(losses[:6])


def test_a_weight_of_zero_skips_the_computation(phantoms, tmp_path, monkeypatch):
    calls = []
    forward = train_ssl.pretrain.SMIT.forward
    monkeypatch.setattr(train_ssl.pretrain.SMIT, "forward",
                        lambda self, *a: calls.append(self) or forward(self, *a))
    train(phantoms, tmp_path / "run", "--method", "simmim", "--steps", 2, "--val_fraction", 0)
    # the student, in two steps and two panels
    assert len(calls) == 4 and len(set(map(id, calls))) == 1

    state = runtime.load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["teacher"] is None and not state["centers"]
    assert not any("head.mlp" in name for name in state["student"])


def test_the_logged_loss_is_the_weighted_sum(phantoms, tmp_path):
    for row in train(phantoms, tmp_path / "run", "--steps", 3, "--accumulate", 2):
        assert row["loss"] == pytest.approx(row["mip"] + .1 * row["mpd"] + .1 * row["itd"],
                                            rel=1e-6)


def test_schedules_run_from_end_to_end(phantoms, tmp_path):
    log = train(phantoms, tmp_path / "run", "--steps", 6, "--val_fraction", 0)
    assert log[0]["momentum"] == .996 and log[-1]["momentum"] == 1
    assert (log[0]["teacher_temp"] == pytest.approx(.04)
            and log[-1]["teacher_temp"] == pytest.approx(.07))

    rates = [row["lr"] for row in log]  # warm-up takes a tenth: .6 of the 6 steps
    assert (rates[0] == pytest.approx(3e-3 * .5 / .6) and 3e-3 > rates[1] == max(rates)
            and 0 < rates[-1] < 1e-4)

    slow = train(phantoms, tmp_path / "slow", "--steps", 6, "--val_fraction", 0,
                 "--warmup_epochs", 200)
    assert [round(row["lr"] / 3e-3 * 6) for row in slow[:3]] == [1, 3, 5]


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_signs_of_collapse_are_logged_as_often_as_asked(log_every, phantoms, tmp_path):
    log = train(phantoms, tmp_path / "run", "--steps", 5, "--val_fraction", 0, "--monitor_every", 2,
                "--log_every", log_every)
    looked = [int(row["step"]) for row in log if "effective_rank" in row]
    assert looked == [2, 4, 5]


def test_validation_stands_beside_predictors_that_know_nothing(phantoms, tmp_path):
    log = train(phantoms, tmp_path / "run", "--steps", 2, "--val_fraction", .4, "--val_every", 2)
    assert "val_mip" not in log[0]
    assert 0 < log[1]["val_median"] and 0 < log[1]["val_constant"] < .5 and log[1]["val_mip"] > 0
    full = train(phantoms, tmp_path / "full", "--method", "full", "--steps", 1,
                 "--val_fraction", .4)
    assert full[0]["val_mip"] > 0


def test_two_ranks_that_accumulate_equal_one_with_the_whole_batch(two_ranks, tmp_path):
    flags, two = two_ranks
    for name, sizes in (("one", ["--batch", 4]),
                        ("accumulated", ["--batch", 1, "--accumulate", 4])):
        words = [*flags, *sizes, "--out", tmp_path / name]
        train_ssl.main(train_ssl.parse_arguments([str(word) for word in words]))

    one = runtime.load_checkpoint(tmp_path / "one" / "last.pt")
    for other in (two, tmp_path / "accumulated"):
        same = runtime.load_checkpoint(other / "last.pt")
        for part in ("student", "teacher", "centers"):
            for name, tensor in one[part].items():
                torch.testing.assert_close(same[part][name], tensor, rtol=1e-5, atol=1e-5,
                                           msg=f"{other.name}: {name}")
        for a, b in zip(read_log(tmp_path / "one"), read_log(other), strict=True):
            for column in ("loss", "mip", "mpd", "itd", "grad_norm"):
                assert b[column] == pytest.approx(a[column], rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(phantoms, tmp_path):
    flags = ["--steps", 6, "--save_steps", 3, "--drop_path", ".3", "--val_fraction", ".4",
             "--val_every", 2]
    train(phantoms, tmp_path / "whole", *flags)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "last.prev.pt", tmp_path / "resumed" / "last.pt")  # step 5
    shutil.copy(tmp_path / "whole" / "log.csv", tmp_path / "resumed" / "log.csv")
    train(phantoms, tmp_path / "resumed", *flags, "--resume", "--workers", 1)
    whole, resumed = (runtime.load_checkpoint(tmp_path / name / "last.pt")
                      for name in ("whole", "resumed"))
    whole.pop("config"), resumed.pop("config")

    assert repr(whole) == repr(resumed)
    for part in ("student", "teacher", "centers"):
        assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part])
    for a, b in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert ((tmp_path / "whole" / "log.csv").read_bytes()
            == (tmp_path / "resumed" / "log.csv").read_bytes())


def test_resume_refuses_other_settings(phantoms, tmp_path):
    train(phantoms, tmp_path / "run", "--steps", 1)
    with pytest.raises(ValueError, match="mask_ratio: 0.7 in the checkpoint, 0.5 now"):
        train(phantoms, tmp_path / "run", "--steps", 1, "--resume", "--mask_ratio", .5)
    with pytest.raises(ValueError, match="--overwrite"):
        train(phantoms, tmp_path / "run", "--steps", 1)


def test_a_stop_during_a_measurement_loses_one_step_and_no_exactness(
        phantoms, tmp_path, monkeypatch):
    flags = ["--steps", 4, "--val_fraction", ".4", "--val_every", 3]
    train(phantoms, tmp_path / "whole", *flags)

    measure = train_ssl.monitors.masked_image_errors
    monkeypatch.setattr(train_ssl.monitors, "masked_image_errors",
                        lambda *a: os.kill(os.getpid(), signal.SIGTERM) or measure(*a))
    log = train(phantoms, tmp_path / "stopped", *flags)
    assert [int(row["step"]) for row in log] == [1, 2]
    assert runtime.load_checkpoint(tmp_path / "stopped" / "last.pt")["step"] == 2
    monkeypatch.undo()
    assert train(phantoms, tmp_path / "stopped", *flags, "--resume") == read_log(tmp_path / "whole")


def test_a_run_goes_on_without_the_file_that_it_began_with(phantoms, tmp_path):
    train(phantoms, tmp_path / "first", "--steps", 1)
    init = shutil.copy(tmp_path / "first" / "student.pt", tmp_path / "init.pt")
    flags = ["--steps", 2, "--init", init, "--val_fraction", 0, "--save_steps", 1]
    train(phantoms, tmp_path / "run", *flags)
    whole = (tmp_path / "run" / "log.csv").read_bytes()
    shutil.move(tmp_path / "run" / "last.prev.pt", tmp_path / "run" / "last.pt")    # step 1
    (tmp_path / "init.pt").unlink()
    train(phantoms, tmp_path / "run", *flags, "--resume")
    assert (tmp_path / "run" / "log.csv").read_bytes() == whole
    with pytest.raises(ValueError, match="init.pt"):
        train(phantoms, tmp_path / "run", *flags, "--overwrite")


@pytest.mark.parametrize("flags, why", [
    ("--view 18", "multiple of 8"), ("--view 32", "larger than --crop"),
    ("--mask_cell 5", "--mask_cell 5"), ("--mask_cell 2", "patch token"),
    ("--mask_ratio 0", "--mask_ratio"), ("--mip 0 --mpd 0 --itd 0", "nothing"),
    ("--val_fraction 1", "--val_fraction"), ("--depths 1 1 1", "2 heads|multiple of"),
    ("--key test", "'test'"), ("--epochs 20", "warmup"), ("--teacher_temp 0 .1", "above 0"),
    ("--shared_head --mpd 0", "shared_head"), ("--spacing 0 1 1", "spacing"),
    ("--spacing 1 1 nan", "spacing"), ("--hu_window 250 -175", "HU window"),
    ("--clip -1", "--clip"), ("--workers -1", "--workers"), ("--lr nan", "--lr"),
    ("--batch 0", "--batch"), ("--val_every 0", "--val_every"),
    ("--save_minutes nan", "--save_minutes")])
def test_settings_that_do_not_fit_are_refused_before_any_work(
        flags, why, phantoms, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("last.pt", "student.pt", "log.csv"):
        (run / name).write_text("of an earlier run, which stays")
    # SystemExit: argparse, with its message printed
    with pytest.raises((ValueError, SystemExit)) as refusal:
        train(phantoms, run, *flags.split(), "--overwrite")
    assert re.search(why, str(refusal.value) + capsys.readouterr().err)
    assert all((run / name).exists() for name in ("last.pt", "student.pt", "log.csv"))
    assert not (run / "config.json").exists()


def test_bad_volumes_stop_the_run_unless_allowed(phantoms, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(phantoms.parent / "imagesTr", folder)
    air = nibabel.Nifti1Image(np.full((30, 30, 30), -1000, np.int16), np.diag([10, 10, 10, 1]))
    nibabel.save(air, folder / "air.nii.gz")
    flags = ["--steps", 6, "--batch", 2, "--val_fraction", 0]

    with pytest.raises(ValueError, match="--max_bad 0.*air.nii.gz"):
        train(folder, tmp_path / "strict", *flags)
    # told once, not once an epoch
    assert capsys.readouterr().err.count("warning: skipped: ") == 1

    train(folder, tmp_path / "lenient", *flags, "--max_bad", 1)
    assert "air.nii.gz" in capsys.readouterr().err
    # of the held-back volumes, too
    with pytest.raises(ValueError, match="--max_bad 0.*air.nii.gz"):
        train(folder, tmp_path / "held", *flags[:4], "--val_fraction", ".8", "--val_every", 1,
              "--seed", 1)


def test_held_back_volumes_that_cannot_be_read_end_the_run_in_one_line(phantoms, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(phantoms.parent / "imagesTr", folder)
    for volume in folder.iterdir():
        image = nibabel.load(volume)
        nibabel.save(nibabel.Nifti1Image(np.full(image.shape, -1000, np.int16), image.affine),
                     volume)
        break
    held = None
    for seed in range(20):                                   # the seed that holds it back
        args = train_ssl.parse_arguments([*map(str, SMALL), "--data", str(folder), "--val_fraction",
                                          ".2", "--seed", str(seed)])
        _, held, _ = train_ssl.load_cases(args, runtime.start("cpu"))
        if [case["image"] for case in held] == [str(volume)]:
            break
    with pytest.raises(data.BadVolume, match=volume.name):
        train(folder, tmp_path / "run", "--val_fraction", ".2", "--seed", seed, "--steps", 2,
              "--max_bad", 1)


def test_bad_headers_and_bad_voxels_count_together_and_the_message_has_the_users_number(
        phantoms, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(phantoms.parent / "imagesTr", folder)
    air = nibabel.Nifti1Image(np.full((30, 30, 30), -1000, np.int16), np.diag([10, 10, 10, 1]))
    nibabel.save(air, folder / "air.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"no NIfTI")
    flags = ["--steps", 6, "--batch", 2, "--val_fraction", 0]

    with pytest.raises(
            ValueError,
            match="bad volumes, 2, are more than --max_bad 1.*air.nii.gz and 1 with bad"):
        train(folder, tmp_path / "one", *flags, "--max_bad", 1)
    train(folder, tmp_path / "two", *flags, "--max_bad", 2)


def test_a_volume_from_two_sources_is_refused(phantoms, tmp_path):
    with pytest.raises(ValueError, match="two sources"):
        train(phantoms, tmp_path / "run", "--data", phantoms, phantoms.parent / "imagesTr")


def test_errors_are_one_line_and_exit_code_2(tmp_path, run_script):
    done = run_script("train_ssl.py", *SMALL, "--data", "nowhere", check=False)
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", [train_ssl, finetune])
def test_a_check_looks_at_what_a_run_begins_with(script, phantoms, tmp_path):
    args = script.parse_arguments(["--data", str(phantoms), "--check", "--init",
                                   str(tmp_path / "typo.pt")])
    with pytest.raises(ValueError, match="typo.pt"):
        script.main(args)


def test_student_weights_say_what_they_are(phantoms, tmp_path):
    train(phantoms, tmp_path / "run", "--steps", 1)
    student = runtime.load_checkpoint(tmp_path / "run" / "student.pt")
    assert student["config"]["spacing"] == [10, 10, 10] and student["config"]["modality"] == "ct"
    assert any(name.startswith("encoder.stages.0") for name in student["model"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["global_batch"] == 2


def begin(data, out, path, *flags):
    """A run of no learning that begins with other weights: its last.pt."""
    train(data, out, "--init", path, "--steps", 1, "--lr", 0, "--weight_decay", 0,
          "--momentum", 1, *flags)
    return runtime.load_checkpoint(out / "last.pt")


def test_a_new_run_begins_with_another_runs_student_teacher_heads_and_centres(
        phantoms, tmp_path, capsys):
    train(phantoms, tmp_path / "first", "--steps", 3)
    before = runtime.load_checkpoint(tmp_path / "first" / "last.pt")
    after = begin(phantoms, tmp_path / "second", tmp_path / "first" / "last.pt",
                  "--center_momentum", 1)

    assert after["step"] == 1 and after["config"]["init"].endswith("last.pt")
    for part in ("student", "teacher", "centers"):
        assert all(torch.equal(after[part][name], w) for name, w in before[part].items()), part

    told = capsys.readouterr().out
    assert all(text in told for text in ("missing 0; unexpected 0", "teacher: as in the file",
                                         "patch_head: ", "centre of itd: as in the file"))


def test_a_student_gives_its_heads_and_a_teacher_like_it(phantoms, tmp_path, capsys):
    train(phantoms, tmp_path / "first", "--steps", 2, "--method", "mpd")
    model = runtime.load_checkpoint(tmp_path / "first" / "student.pt")["model"]
    after = begin(phantoms, tmp_path / "second", tmp_path / "first" / "student.pt",
                  "--method", "ibot")

    for part in ("student", "teacher"):
        assert all(torch.equal(after[part][name], w)
                   for name, w in model.items() if name in after[part])
        assert not set(model) - set(after[part])
    told = capsys.readouterr().out
    assert "new: image_head, at random" in told and "teacher: a copy of the student" in told


def test_pretraining_goes_on_from_monais_encoder_with_its_habits_and_resumes(
        phantoms, tmp_path, capsys, monkeypatch):
    torch.save(monai_encoder(), tmp_path / "monai.pt")
    flags = ["--crop", 32, "--view", 32, "--mask_cell", 16, "--batch", 1]
    sizeless = " ".join(SMALL).replace("--embed_dim 8 --depths 1 1 --heads 2 2 ", "").split()
    monkeypatch.setattr(sys.modules[__name__], "SMALL", sizeless)
    after = begin(phantoms, tmp_path / "run", tmp_path / "monai.pt", *flags)

    assert (after["config"]["depths"] == [2, 2, 2, 2]
            and after["config"]["imported"]["qkv_bias"] is True)

    name = "layers3.0.blocks.1.attn.qkv.bias"
    assert torch.equal(after["student"]["encoder.stages.2.blocks.1.attention.qkv.bias"],
                       monai_encoder()[name])
    assert not any("patch_norm" in name for name in after["student"])

    told = capsys.readouterr().out
    assert ("new: the mask token, at random" in told
            and "does not say how its volumes were prepared" in told)

    log = train(phantoms, tmp_path / "run", "--init", tmp_path / "monai.pt", "--steps", 1,
                "--lr", 0, "--weight_decay", 0, "--momentum", 1, *flags, "--resume")
    assert len(log) == 1

    found = weights.read_encoder(tmp_path / "run" / "student.pt")
    assert found.habits == ["no_patch_norm", "attended_padding", "cut_bias_index",
                            "duplicated_merge"]


def test_two_heads_do_not_become_one_in_silence(phantoms, tmp_path):
    train(phantoms, tmp_path / "two", "--steps", 1)
    with pytest.raises(ValueError, match="leave out --shared_head"):
        begin(phantoms, tmp_path / "refused", tmp_path / "two" / "student.pt", "--shared_head")
    train(phantoms, tmp_path / "one", "--steps", 1, "--shared_head")
    before = runtime.load_checkpoint(tmp_path / "one" / "student.pt")["model"]
    after = begin(phantoms, tmp_path / "goes_on", tmp_path / "one" / "student.pt", "--shared_head")
    assert all(torch.equal(after["student"][name], weight) for name, weight in before.items())


def test_what_a_run_cannot_begin_with_is_refused_in_one_line(phantoms, tmp_path):
    train(phantoms, tmp_path / "first", "--steps", 1)
    torch.save(release_encoder(), tmp_path / "release.pt")
    student = tmp_path / "first" / "student.pt"

    for path, flags, why in ((tmp_path / "release.pt", [], "wrong order"),
                             (student, ["--prototypes", 8], "patch_head: .*missing"),
                             (student, ["--depths", 1, 2], "drop the flag"),
                             (tmp_path / "absent.pt", [], "no regular file")):
        with pytest.raises(ValueError, match=why) as refusal:
            begin(phantoms, tmp_path / "second", path, *flags)
        assert "\n" not in str(refusal.value) and not (tmp_path / "second" / "log.csv").exists()


def test_schedules_follow_their_curves_between_the_ends(phantoms, tmp_path):
    log = train(phantoms, tmp_path / "run", "--steps", 5, "--val_fraction", 0,
                "--warmup_epochs", 200)                  # of 400: 2.5 of the 5 steps
    assert [row["teacher_temp"] for row in log] == pytest.approx([.04, .052, .064, .07, .07])
    falls = [1, (1 + math.sqrt(.5)) / 2, .5, (1 - math.sqrt(.5)) / 2, 0]      # half a cosine
    assert [row["momentum"] for row in log] == pytest.approx([1 - .004 * fall for fall in falls],
                                                             abs=1e-7)


def test_each_centre_is_the_mean_of_its_own_heads_logits(phantoms, tmp_path):
    flags = ["--val_fraction", 0, "--center_momentum", 0, "--steps", 1, "--monitor_every", 1]
    (row,) = train(phantoms, tmp_path / "run", *flags)
    args = train_ssl.parse_arguments([*SMALL, *map(str, flags), "--data", str(phantoms),
                                      "--cache", str(tmp_path / "cache")])
    cases, _, _ = train_ssl.load_cases(args, runtime.start("cpu"))
    _, teacher, _ = train_ssl.build_networks(args)
    pairs = train_ssl.view_pairs(args, cases)
    views = torch.cat([pairs.sample(number)["views"] for number in range(args.batch)])
    with torch.no_grad():
        taught = teacher(views / 255)

    centers = runtime.load_checkpoint(tmp_path / "run" / "last.pt")["centers"]
    for name, logits in (("mpd", taught.patch_logits), ("itd", taught.image_logits)):
        torch.testing.assert_close(centers[f"{name}.value"], logits.flatten(0, -2).mean(0))
        each, _ = monitors.entropies(logits, centers[f"{name}.value"], .04)
        assert row[f"{name}_entropy"] == pytest.approx(each.item(), rel=1e-4)


def test_epochs_are_passes_over_all_volumes(phantoms, tmp_path):
    log = train(phantoms, tmp_path / "run", "--epochs", 2, "--warmup_epochs", 1, "--batch", 1,
                "--accumulate", 2, "--val_fraction", 0)              # 4 volumes, 2 a step
    assert [row["epoch"] for row in log] == [.5, 1, 1.5, 2]
    assert [row["lr"] / 3e-3 for row in log] == pytest.approx(       # the middle of each step
        [.25, .75, (1 + math.sqrt(.5)) / 2, (1 - math.sqrt(.5)) / 2])


def test_matrices_decay_by_as_much_as_asked_for():
    args = train_ssl.parse_arguments([*SMALL, "--weight_decay", ".3"])
    groups = train_ssl.build_optimizer(train_ssl.build_networks(args)[0], args).param_groups
    assert [group["weight_decay"] for group in groups] == [.3, 0]


def test_another_seed_draws_other_views_and_masks(phantoms, tmp_path):
    drawn = []
    for seed in "12":
        args = train_ssl.parse_arguments([*SMALL, "--seed", seed, "--cache", str(tmp_path)])
        drawn.append(train_ssl.view_pairs(args, data.read_list(phantoms)).sample(0)["hidden"])
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_gradient_is_clipped_after_its_scale_is_taken_off(precision, phantoms, tmp_path):
    whole, low = (train(phantoms, tmp_path / name, "--steps", 1, "--val_fraction", 0,
                        "--precision", name)[0]["grad_norm"] for name in ("fp32", precision))
    assert low == pytest.approx(whole, rel=.05)          # fp16's loss is scaled by 4096
