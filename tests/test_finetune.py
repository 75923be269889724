"""finetune.py: what it loads, what it trains on, and that a run is repeatable whatever
interrupts or divides it."""
import csv
import json
import math
import os
import re
import shutil
import signal
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import finetune
import train_ssl
from conftest import SMALL as SMALL_SSL
from foreign import monai_encoder
from smit import data, inference, losses, metrics, runtime, segment, settings, weights
from smit.data import samples

SMALL = (
    "--spacing 10 10 10 --crop 24 --embed_dim 8 --depths 1 1 --heads 2 2 --lr 1e-2 "
    "--workers 0 --log_every 1 "
    "--device cpu --crops_per_volume 2").split()


def parse(*flags):
    return finetune.parse_arguments([str(flag) for flag in flags])


def tune(source, out, *flags):
    """A small run in this process; its log as a list of dicts."""
    finetune.main(
        parse(*SMALL, "--data", source, "--out", out, "--cache", out.parent / "cache", *flags))
    return read_log(out)


def read_log(out):
    with open(out / "log.csv") as file:
        return [{name: float(cell) for name, cell in row.items() if cell}
                for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def pretrained(phantoms, tmp_path_factory):
    """The folder of a two-step pre-training run, with student.pt and last.pt."""
    out = tmp_path_factory.mktemp("pretrained")
    flags = [*SMALL_SSL, "--data", phantoms, "--out", out / "run", "--cache", out / "cache",
             "--steps", 2]
    train_ssl.main(train_ssl.parse_arguments([str(flag) for flag in flags]))
    return out / "run"


def model(out, name="last.pt"):
    return runtime.load_checkpoint(out / name)["model"]


def listing(tmp_path, names, key="training", **others):
    """A dataset.json of cases that need not exist."""
    path = tmp_path / "list.json"
    path.write_text(json.dumps(
        {key: [{"image": f"{n}.nii.gz", "label": f"l{n}.nii.gz"} for n in names], **others}))
    return path


def split(path, *flags):
    train, held_back, _ = finetune.load_cases(parse("--data", path, *flags), None)
    return [[Path(case["image"]).name[:-7] for case in cases] for cases in (train, held_back)]


def test_defaults_are_the_papers_and_the_releases():
    args = parse()
    assert (args.crop, args.crops_per_volume, args.lr, args.weight_decay) == (
        [96] * 3, 4, 1e-4, 1e-5)
    assert (args.warmup_epochs, args.val_every, args.layer_decay, args.init) == (50, 30, 1, None)
    assert sum(p.numel() for p in segment.build_network(
        {**vars(args), "num_classes": 14}).parameters()) == 28_192_614


def test_the_tiny_presets_fit_each_other():
    here, there = parse("--preset", "tiny"), train_ssl.parse_arguments(["--preset", "tiny"])
    for name in ("modality", "hu_window", *settings.SIZES):  # voxels are coarser here: a warning
        assert getattr(here, name) == getattr(there, name)
    assert here.crop == there.view


def test_the_loss_decreases_and_the_best_network_is_kept(phantoms, tmp_path):
    log = tune(phantoms, tmp_path / "run", "--steps", 40, "--val_every", 2, "--batch", 2)
    losses = [row["loss"] for row in log]
    assert sum(losses[-5:]) < .8 * sum(losses[:5])

    scores = {row["step"]: row["val_dice"] for row in log if "val_dice" in row}
    best = runtime.load_checkpoint(tmp_path / "run" / "best.pt")
    # 4 volumes, 2 a step, every second epoch
    assert sorted(scores) == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    assert (best["val_dice"] == pytest.approx(max(scores.values()))
            == pytest.approx(scores[best["step"]]))


@pytest.mark.parametrize("file, flags, part",
                         [("student.pt", [], "student"), ("last.pt", [], "student"),
                          ("last.pt", ["--weights", "teacher"], "teacher")])
def test_the_encoder_starts_as_pretrained_and_says_so(file, flags, part, pretrained, phantoms,
                                                      tmp_path, capsys):
    tune(phantoms, tmp_path / "run", "--init", pretrained / file, *flags, "--steps", 1,
         "--lr", 0, "--weight_decay", 0)
    source = runtime.load_checkpoint(pretrained / "last.pt")[part]
    for name, weight in model(tmp_path / "run").items():
        assert not name.startswith("encoder.") or torch.equal(weight, source[name])

    size = sum(w.numel() for name, w in model(tmp_path / "run").items()
               if name.startswith("encoder."))
    assert f"{size:,} of {size:,} matched; missing 0; unexpected 0" in capsys.readouterr().out


def test_the_decoder_starts_alike_for_every_method(pretrained, phantoms, tmp_path):
    still = ["--steps", 1, "--lr", 0, "--weight_decay", 0]
    tune(phantoms, tmp_path / "random", *still)
    tune(phantoms, tmp_path / "student", *still, "--init", pretrained / "student.pt")
    tune(phantoms, tmp_path / "seed", *still, "--seed", 1)
    random, student, seed = (model(tmp_path / name) for name in ("random", "student", "seed"))

    for name in (name for name in random if not name.startswith("encoder.")):
        assert (torch.equal(random[name], student[name])
                and not torch.equal(random[name], seed[name])), name
    assert not torch.equal(random["encoder.patch_embed.weight"],
                           student["encoder.patch_embed.weight"])


def test_the_encoders_sizes_come_from_the_student(pretrained, phantoms, tmp_path):
    args = parse("--init", pretrained / "student.pt", "--preset", "tiny")
    weights, sizes, _ = finetune.read_init(args, runtime.start("cpu"))
    assert weights and (sizes["embed_dim"], sizes["depths"], sizes["heads"]) == (8, [1, 1], [2, 2])
    with pytest.raises(ValueError, match="--embed_dim 24: the encoder of .*student.pt has 8"):
        finetune.read_init(parse("--init", pretrained / "student.pt", "--embed_dim", 24),
                           runtime.start("cpu"))


def test_another_preparation_is_warned_about(pretrained, capsys):
    finetune.read_init(parse("--init", pretrained / "student.pt", "--spacing", 10, 10, 10),
                       runtime.start("cpu"))
    assert capsys.readouterr().out == ""

    finetune.read_init(parse("--init", pretrained / "student.pt", "--modality", "mr"),
                       runtime.start("cpu"))
    told = capsys.readouterr().out
    assert (told.count("\n") == 1 and "modality mr here, ct there" in told
            and "spacing [1.5, 1.5, 2.0] here" in told)


def test_habits_of_an_imported_encoder_outlive_a_partial_load(pretrained, tmp_path):
    state = runtime.load_checkpoint(pretrained / "student.pt")
    state["config"]["imported"] = {"habits": ["attended_padding"]}
    runtime.save_checkpoint(tmp_path / "imported.pt", state)
    alone = runtime.start("cpu")
    for flags in ([], ["--partial_init"]):
        _, sizes, _ = finetune.read_init(parse("--init", tmp_path / "imported.pt", *flags), alone)
        assert sizes["imported"]["habits"] == ["attended_padding"]


def test_a_wrong_init_is_refused_in_one_line(pretrained, phantoms, tmp_path):
    state = runtime.load_checkpoint(pretrained / "student.pt")
    del state["model"]["encoder.patch_embed.weight"]
    runtime.save_checkpoint(tmp_path / "lacking.pt", state)
    runtime.save_checkpoint(tmp_path / "foreign.pt", {"model": {"weight": torch.ones(3)}})
    (tmp_path / "cut.pt").write_bytes((pretrained / "student.pt").read_bytes()[:-50])

    for name, why in (("lacking.pt", "missing 64"), ("foreign.pt", "no pre-trained student"),
                      ("cut.pt", "refused"), ("gone.pt", "no regular file")):
        with pytest.raises(ValueError, match=why) as refusal:
            tune(phantoms, tmp_path / "run", "--init", tmp_path / name, "--steps", 1)
        assert "\n" not in str(refusal.value) and not (tmp_path / "run" / "log.csv").exists()

    whole = runtime.load_checkpoint(pretrained / "student.pt")
    for part, value in (("config", 3), ("model", [1]), ("model", {"encoder.patch_embed.weight": 3}),
                        ("model", {7: torch.ones(3)})):
        runtime.save_checkpoint(tmp_path / "odd.pt", {**whole, part: value})
        with pytest.raises(ValueError,
                           match="no pre-trained student|refused as a checkpoint") as refusal:
            tune(phantoms, tmp_path / "run", "--init", tmp_path / "odd.pt", "--steps", 1)
        assert "\n" not in str(refusal.value), (part, value)

    tune(phantoms, tmp_path / "run", "--init", tmp_path / "lacking.pt", "--steps", 1,
         "--partial_init")
    with pytest.raises(ValueError, match="last.pt"):
        finetune.read_init(parse("--init", pretrained / "student.pt", "--weights", "teacher"),
                           runtime.start("cpu"))


def test_a_network_learns_from_monais_encoder_of_its_own_shape(phantoms, tmp_path, capsys):
    state = {f"module.{name}": w for name, w in monai_encoder(mlp=("mlp.fc1", "mlp.fc2")).items()}
    torch.save({"state_dict": state}, tmp_path / "model_swinvit.pt")
    sizeless = " ".join(SMALL).replace("--embed_dim 8 --depths 1 1 --heads 2 2 ", "").split()
    flags = [*sizeless, "--data", phantoms, "--out", tmp_path / "run",
             "--cache", tmp_path / "cache", "--init", tmp_path / "model_swinvit.pt",
             "--steps", 8, "--batch", 1, "--crop", 32]
    finetune.main(parse(*flags))
    told = capsys.readouterr().out

    assert ("with MONAI's SwinViT under state_dict.module" in told
            and "habit: a merge reads neighbours 010 and 001" in told)
    assert re.search(r"encoder weights: ([\d,]+) of \1 matched; missing 0; unexpected 0", told)
    losses = [row["loss"] for row in read_log(tmp_path / "run")]
    assert sum(losses[-3:]) < .9 * sum(losses[:3])
    config = runtime.load_checkpoint(tmp_path / "run" / "last.pt")["config"]
    assert config["window"] == [7, 7, 7] and "cut_bias_index" in config["imported"]["habits"]
    net = inference.load_network(tmp_path / "run" / "best.pt")              # the habits travel on
    assert isinstance(net.encoder.stages[0].merge, weights.habits.DuplicatedMerging)
    finetune.main(parse(*flags, "--resume"))


def test_a_frozen_encoder_does_not_move(pretrained, phantoms, tmp_path):
    flags = ["--init", pretrained / "student.pt", "--steps", 3, "--freeze_encoder",
             "--drop_path", ".5"]
    tune(phantoms, tmp_path / "run", *flags)
    source, now = model(pretrained, "student.pt"), model(tmp_path / "run")
    assert all(torch.equal(now[name], source[name]) for name in now if name.startswith("encoder."))

    torch.manual_seed(0)
    fresh = segment.build_network(
        runtime.load_checkpoint(tmp_path / "run" / "last.pt")["config"]).state_dict()
    assert not any(torch.equal(now[name], fresh[name]) for name in now
                   if not name.startswith("encoder."))


def test_the_learning_rate_decays_block_by_block():
    net = segment.SegmentationNet(3, embed_dim=8, depths=(1, 2), heads=(2, 2))
    optimizer = finetune.build_optimizer(net, parse("--depths", 1, 2, "--layer_decay", ".5"))
    scales = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"encoder.patch_embed.bias": 1 / 16,
                "encoder.stages.0.blocks.0.norm1.bias": 1 / 8,
                "encoder.stages.0.merge.norm.bias": 1 / 8, "encoder.norms.0.bias": 1 / 8,
                "encoder.stages.1.blocks.0.norm1.bias": 1 / 4,
                "encoder.stages.1.blocks.1.norm1.bias": 1 / 2,
                "encoder.stages.1.merge.norm.bias": 1 / 2, "encoder.norms.1.bias": 1 / 2,
                "ups.0.up.weight": 1, "out.bias": 1}
    named = dict(net.named_parameters())

    assert ({name: scales[id(named[name])] for name in expected} == expected
            and len(scales) == len(named))


def test_published_splits_choose_cases_by_their_numbers(tmp_path):
    path = listing(tmp_path, [f"img{n:04d}" for n in (*range(1, 11), *range(21, 41))])
    train, held_back = split(path, "--split", "smit21_9")
    assert (held_back == [f"img{n:04d}" for n in (29, 30, 31, 32, 34, 36, 37, 39, 40)]
            and len(train) == 21)
    assert split(path, "--split", "monai24_6")[1] == [f"img{n:04d}" for n in range(35, 41)]
    with pytest.raises(ValueError, match="smit21_9"):
        split(listing(tmp_path, ["img0001", "img0029"]), "--split", "smit21_9")


def test_folds_are_disjoint_complete_and_nnunets(tmp_path):
    path = listing(tmp_path, "abcdefghijkl", validation=[{"image": "x.nii.gz"}])
    folds = [split(path, "--fold", k) for k in range(5)]
    assert sorted(name for _, held in folds for name in held) == list("abcdefghijkl")
    assert all(sorted(train + held) == list("abcdefghijkl") for train, held in folds)

    model_selection = pytest.importorskip("sklearn.model_selection")
    peer = model_selection.KFold(5, shuffle=True, random_state=12345)
    for (_, held), (_, theirs) in zip(folds, peer.split(range(12))):
        assert sorted(held) == ["abcdefghijkl"[i] for i in theirs]


def test_few_label_subsets_are_nested_whatever_the_method(tmp_path):
    path = listing(tmp_path, "abcdefghij", validation=[{"image": "x.nii.gz", "label": "y.nii.gz"}])
    subsets = [split(path, "--num_train", n)[0] for n in range(1, 11)]
    assert all(small == large[:len(small)] for small, large in zip(subsets, subsets[1:]))
    assert split(path, "--num_train", 4, "--init", "student.pt", "--lr", 1)[0] == subsets[3]
    assert split(path, "--num_train", 4, "--seed", 1)[0] != subsets[3]
    assert split(path, "--num_train", 4, "--seed", 1, "--subset_seed", 0)[0] == subsets[3]
    with pytest.raises(ValueError, match="11 cases .* 10 are there"):
        split(path, "--num_train", 11)


def test_without_validation_cases_a_share_is_held_back(tmp_path):
    train, held_back = split(listing(tmp_path, "abcdefghij"), "--val_fraction", ".25")
    assert len(held_back) == 3 and sorted(train + held_back) == list("abcdefghij")
    with pytest.raises(ValueError, match="held back as well"):
        split(listing(tmp_path, "ab", validation=[{"image": "a.nii.gz", "label": "la.nii.gz"}]))


def test_two_ranks_equal_one_with_twice_the_batch(phantoms, tmp_path, run_script):
    # 4 steps of 2 of 4 volumes
    flags = ["--epochs", 2, "--warmup_epochs", 1, "--drop_path", ".3", "--lr", "1e-3"]
    tune(phantoms, tmp_path / "one", *flags, "--batch", 2)
    run_script("finetune.py", *SMALL, "--data", phantoms, "--cache", "cache", *flags, "--batch", 1,
               "--out", "two", ranks=2)

    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)

    one, two = (torch.cat([w.flatten() for w in model(tmp_path / name).values()])
                for name in ("one", "two"))
    torch.manual_seed(0)
    net = segment.build_network(runtime.load_checkpoint(tmp_path / "one" / "last.pt")["config"])
    start = torch.cat([w.flatten() for w in net.state_dict().values()])

    # AdamW's first steps enlarge the rounding of gradients near 0:
    # compare with the way that was gone
    assert (two - one).norm() < .02 * (one - start).norm()


def test_a_stop_during_a_validation_loses_one_step_and_no_exactness(
        phantoms, tmp_path, monkeypatch):
    flags = ["--steps", 4, "--val_every", 1.5]                    # of 4 volumes by 2: 3 steps
    whole = tune(phantoms, tmp_path / "whole", *flags)
    predict = finetune.predict
    monkeypatch.setattr(finetune, "predict",
                        lambda *a: os.kill(os.getpid(), signal.SIGTERM) or predict(*a))
    log = tune(phantoms, tmp_path / "stopped", *flags)
    stopped = runtime.load_checkpoint(tmp_path / "stopped" / "last.pt")["step"]
    assert stopped == len(log) < len(whole) and not any("val_dice" in row for row in log)
    monkeypatch.undo()
    assert tune(phantoms, tmp_path / "stopped", *flags, "--resume") == whole


def test_a_validation_follows_the_step_that_completes_its_epochs(phantoms, tmp_path):
    # 2 epochs of 4 volumes are 8 samples: with 5 a step they end in steps 1.6, 3.2, 4.8, 6.4 and 8
    log = tune(phantoms, tmp_path / "run", "--steps", 9, "--val_every", 2, "--batch", 5)
    assert [int(row["step"]) for row in log if "val_dice" in row] == [2, 4, 5, 7, 8, 9]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(phantoms, tmp_path):
    flags = ["--steps", 6, "--save_steps", 3, "--drop_path", ".3", "--val_every", .5,
             "--layer_decay", .8]
    tune(phantoms, tmp_path / "whole", *flags)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "last.prev.pt", tmp_path / "resumed" / "last.pt")  # step 5
    shutil.copy(tmp_path / "whole" / "log.csv", tmp_path / "resumed" / "log.csv")
    tune(phantoms, tmp_path / "resumed", *flags, "--resume", "--workers", 1)
    whole, resumed = (runtime.load_checkpoint(tmp_path / name / "last.pt")
                      for name in ("whole", "resumed"))

    assert all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])
    for a, b in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole["best"] == resumed["best"]
    assert ((tmp_path / "whole" / "log.csv").read_bytes()
            == (tmp_path / "resumed" / "log.csv").read_bytes())


def test_an_average_of_the_weights_is_saved_in_their_place_and_resumed(phantoms, tmp_path):
    flags = ["--average", .5, "--steps", 4, "--save_steps", 2, "--val_every", .5]
    tune(phantoms, tmp_path / "one", "--average", .5, "--steps", 1)
    state = runtime.load_checkpoint(tmp_path / "one" / "last.pt")
    torch.manual_seed(0)
    start = segment.build_network(state["config"]).state_dict()

    for name, value in state["average"].items():  # after the first step, a tenth of the start
        torch.testing.assert_close(value, .1 * start[name] + .9 * state["model"][name])
        assert torch.equal(value, model(tmp_path / "one", "best.pt")[name])

    tune(phantoms, tmp_path / "run", *flags)
    whole = runtime.load_checkpoint(tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "last.prev.pt").rename(tmp_path / "run" / "last.pt")
    tune(phantoms, tmp_path / "run", *flags, "--resume")
    again = runtime.load_checkpoint(tmp_path / "run" / "last.pt")

    assert all(torch.equal(whole["average"][name], again["average"][name])
               for name in whole["average"])


def test_a_run_resumes_in_its_precision_alone_and_from_where_its_data_went(phantoms, tmp_path):
    data_before = shutil.copytree(phantoms.parent, tmp_path / "data")
    flags = ["--val_fraction", 0, "--steps", 1]
    tune(data_before / "dataset.json", tmp_path / "run", *flags)
    path = tmp_path / "run" / "last.pt"
    state = runtime.load_checkpoint(path)
    assert state["config"]["precision"] == "fp32"            # what "auto" came to

    data_now = data_before.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="precision: fp32 in the checkpoint, bf16 now"):
        tune(data_now / "dataset.json", tmp_path / "run", *flags, "--resume", "--precision", "bf16")
    state["config"]["precision"] = "auto"                    # as older runs have it
    torch.save(state, path)
    tune(data_now / "dataset.json", tmp_path / "run", *flags, "--resume")
    torch.save({**state, "scaler": {"scale": 1.}}, path)     # fp16 was at work
    with pytest.raises(ValueError, match="precision: auto in the checkpoint, fp32 now"):
        tune(data_now / "dataset.json", tmp_path / "run", *flags, "--resume")


def test_weights_are_kept_though_there_is_no_organ_to_score(phantoms, tmp_path, monkeypatch,
                                                            capsys):
    monkeypatch.setattr(finetune, "predict",
                        lambda net, image, *_: torch.zeros(image.shape, dtype=torch.long))
    folder = shutil.copytree(phantoms.parent, tmp_path / "data")
    for case in data.read_list(folder / "dataset.json", "validation"):
        label = nib.load(case["label"])
        nib.save(nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), case["label"])
    tune(folder / "dataset.json", tmp_path / "run", "--steps", 2, "--val_every", .5)
    assert "nothing to validate on" in capsys.readouterr().out
    best = model(tmp_path / "run", "best.pt")
    assert all(torch.equal(best[name], weight) for name, weight in model(tmp_path / "run").items())


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_an_output_that_is_not_finite_is_told_and_is_background(
        number, phantoms, tmp_path, monkeypatch, capsys):
    def output(net, volume, *others, **settings):
        logits = torch.zeros(1, 14, *volume.shape[2:])
        logits[:, 2] = number                            # inf would be organ 2
        return logits

    monkeypatch.setattr(segment, "sliding_window", output)
    runtime.ranks.WARNED.discard("output")
    log = tune(phantoms, tmp_path / "run", "--steps", 1)
    assert "output is not finite" in capsys.readouterr().err and log[-1]["val_dice"] == 0


def test_resume_refuses_other_settings(phantoms, tmp_path):
    tune(phantoms, tmp_path / "run", "--steps", 1)
    with pytest.raises(ValueError, match="num_train: None in the checkpoint, 2 now"):
        tune(phantoms, tmp_path / "run", "--steps", 1, "--resume", "--num_train", 2)


@pytest.mark.parametrize("flags, why",
                         [("--crop 24 24", "--crop"), ("--fold 5", "--fold 5"),
                          ("--num_train 0", "--num_train"), ("--key test", "'test'"),
                          ("--layer_decay 0", "--layer_decay"), ("--freeze_encoder", "--init"),
                          ("--batch 0", "--batch"), ("--fold 0 --split smit21_9", "--split"),
                          ("--num_classes 5", "label value"), ("--num_classes 300", "2..256"),
                          ("--spacing 1 1 -1", "spacing"), ("--hu_window 0 0", "HU window"),
                          ("--clip nan", "--clip"), ("--log_every 0", "--log_every"),
                          ("--epochs 20", "--warmup_epochs 50 must be fewer")])
def test_settings_that_do_not_fit_are_refused_before_any_work(
        flags, why, phantoms, tmp_path, capsys):
    # SystemExit: argparse, with its message printed
    with pytest.raises((ValueError, SystemExit)) as refusal:
        tune(phantoms, tmp_path / "run", *flags.split(), "--steps", 1)
    assert re.search(why, str(refusal.value) + capsys.readouterr().err)
    assert not (tmp_path / "run" / "log.csv").exists()


def test_every_bad_label_is_named_before_the_first_step(phantoms, tmp_path):
    shutil.copytree(phantoms.parent, tmp_path / "copy")
    labels = sorted((tmp_path / "copy" / "labelsTr").iterdir())
    changes = (lambda label: label * 0 + 55, lambda label: label * 0 + 77, lambda label: label[1:])
    for path, change in zip(labels, changes):
        label, affine = data.read_label(path)
        nib.save(nib.Nifti1Image(change(label).numpy(), affine), path)

    # another shape: seen by the headers alone
    with pytest.raises(ValueError, match="phantom0002"):
        tune(tmp_path / "copy" / "dataset.json", tmp_path / "run", "--steps", 1)

    shutil.copy(phantoms.parent / "labelsTr" / labels[2].name, labels[2])
    with pytest.raises(ValueError, match="2 problems(.|\n)*phantom0000.*55(.|\n)*phantom0001.*77"):
        tune(tmp_path / "copy" / "dataset.json", tmp_path / "run", "--steps", 1)


def test_a_healthy_patient_without_any_organ_is_trained_on_and_told(phantoms, tmp_path, capsys):
    shutil.copytree(phantoms.parent, tmp_path / "copy")
    path = min((tmp_path / "copy" / "labelsTr").iterdir())
    label, affine = data.read_label(path)
    nib.save(nib.Nifti1Image((label * 0).numpy(), affine), path)
    log = tune(tmp_path / "copy" / "dataset.json", tmp_path / "run", "--steps", 4)
    assert len(log) == 4 and path.name in "".join(capsys.readouterr())


def test_an_organ_no_training_case_has_is_warned_about(phantoms, tmp_path, capsys):
    tune(phantoms, tmp_path / "run", "--steps", 1, "--num_classes", 16)
    assert "no training case has label [14, 15]" in capsys.readouterr().out


def test_errors_are_one_line_and_exit_code_2(tmp_path, run_script):
    done = run_script("finetune.py", *SMALL, "--data", "nowhere", check=False)
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_the_learning_rate_rises_and_falls_once_and_lower_blocks_take_their_share(
        phantoms, tmp_path):
    log = tune(phantoms, tmp_path / "run", "--steps", 4, "--epochs", 100, "--warmup_epochs", 50)
    assert [row["lr"] / 1e-2 for row in log] == pytest.approx(       # the middle of each step
        [.25, .75, (1 + math.sqrt(.5)) / 2, (1 - math.sqrt(.5)) / 2])

    tune(phantoms, tmp_path / "one", "--steps", 1, "--warmup_epochs", 0, "--weight_decay", 0,
         "--layer_decay", ".5")
    state = runtime.load_checkpoint(tmp_path / "one" / "last.pt")
    torch.manual_seed(0)
    start, (row,) = segment.build_network(state["config"]).state_dict(), read_log(tmp_path / "one")
    for name, share in {"encoder.patch_embed.weight": 1 / 8, "ups.0.up.weight": 1,
                        "encoder.stages.0.blocks.0.mlp.0.weight": 1 / 4,
                        "encoder.stages.1.blocks.0.mlp.0.weight": 1 / 2}.items():
        # AdamW's first step moves every weight by the rate, whatever its gradient
        moved = (state["model"][name] - start[name]).abs().max().item()
        assert moved == pytest.approx(row["lr"] * share, rel=.01), name


def test_epochs_are_passes_over_all_volumes(phantoms, tmp_path):
    log = tune(phantoms, tmp_path / "run", "--epochs", 3, "--warmup_epochs", 1, "--batch", 2)
    assert [row["epoch"] for row in log] == [.5, 1, 1.5, 2, 2.5, 3]              # of 4 volumes


def test_weights_decay_by_as_much_as_asked_for():
    net = segment.SegmentationNet(3, embed_dim=8, depths=(1, 1), heads=(2, 2))
    groups = finetune.build_optimizer(net, parse("--weight_decay", ".3")).param_groups
    assert {group["weight_decay"] for group in groups} == {.3}


def test_the_validations_dice_is_a_mean_over_cases_then_over_organs_of_all_ranks(monkeypatch):
    label = torch.tensor([[[1, 1, 2, 0]], [[1, 1, 0, 0]], [[1, 0, 0, 0]]])
    pred = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]])
    monkeypatch.setattr(finetune.labelled, "volumes",
                        lambda args, case, num_classes: (pred[case], label[case]))
    monkeypatch.setattr(finetune, "predict", lambda net, image, *others: image)

    def dice(rank, world, mean):
        ranks = types.SimpleNamespace(rank=rank, world=world, device="cpu", mean=mean)
        return finetune.validate(torch.nn.Identity(), [0, 1, 2], None, 4, None, ranks,
                                 types.SimpleNamespace(asked=False))[0]
    # organ 1: 1, 2/3, 0; organ 2: 0 in its one case; organ 3: nowhere
    assert dice(0, 1, lambda scores: scores) == pytest.approx(((1 + 2 / 3 + 0) / 3 + 0) / 2)
    sent = []
    dice(1, 2, lambda scores: sent.append(scores) or scores)
    assert dice(0, 2, lambda scores: (scores + sent[0]) / 2) == pytest.approx((5 / 9) / 2)


def test_a_validation_whose_logits_are_large_is_put_together_off_the_gpu(monkeypatch):
    asked = []

    def predict(net, image, window, batch, stitch_on_cpu):
        asked.append(stitch_on_cpu)
        return torch.zeros(2, *image.shape)

    monkeypatch.setattr(finetune.segment, "predict", predict)
    precision = runtime.Precision("fp32", torch.device("cpu"))
    body = np.broadcast_to(np.uint8(0), (500, 300, 300))            # 45 million voxels
    for image, num_classes in ((body, 11), (body, 105), (body[:50], 105)):
        finetune.predict(None, image, num_classes, parse(), precision)
    assert asked == [False, True, False]


def test_the_dice_in_best_pt_is_that_of_the_weights_in_it(phantoms, tmp_path):
    tune(phantoms, tmp_path / "run", "--average", ".9", "--steps", 12, "--val_every", 2)
    best = runtime.load_checkpoint(tmp_path / "run" / "best.pt")
    net, dices = inference.load_network(tmp_path / "run" / "best.pt"), []
    for case in data.read_list(phantoms, "validation"):
        made = data.load_case(case, net.preparation, with_label=True)
        pred = segment.predict(net, made["image"].numpy(), (24, 24, 24)).argmax(0)
        dices.append(metrics.dice(pred, made["label"], 14))
    assert best["val_dice"] == pytest.approx(np.nanmean(np.nanmean(dices, axis=0)), abs=1e-6)


def test_the_loss_is_the_one_asked_for(phantoms, tmp_path):
    still = ["--steps", 1, "--drop_path", 0]
    flags = ["--background_weight", ".05", "--dice_on", "organs"]
    (row,) = tune(phantoms, tmp_path / "run", *still, *flags)
    config = runtime.load_checkpoint(tmp_path / "run" / "last.pt")["config"]
    torch.manual_seed(0)
    net, args = segment.build_network(config), parse(*SMALL, *still)
    crops = samples.LabelledCrops(data.read_list(phantoms), data.preparation_of(args),
                                  tmp_path / "cache", 14, args.crop, args.crops_per_volume)
    batch = samples.collate([crops[number] for number in range(args.batch)])
    logits = net(samples.augmented(batch).flatten(0, 1))
    expected = losses.dice_ce_loss(logits, batch["labels"].flatten(0, 1).long(),
                                   background_weight=.05, dice_on="organs")
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_are_clipped_and_an_average_is_as_slow_as_asked_for(
        phantoms, tmp_path, monkeypatch):
    seen, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda p, limit: seen.append(limit) or clip(p, limit))
    tune(phantoms, tmp_path / "run", "--steps", 1, "--clip", ".5", "--average", ".05")
    state = runtime.load_checkpoint(tmp_path / "run" / "last.pt")
    torch.manual_seed(0)
    start = segment.build_network(state["config"]).state_dict()
    assert seen == [.5]
    for name, value in state["average"].items():         # .05 is less than a tenth of the start
        torch.testing.assert_close(value, .05 * start[name] + .95 * state["model"][name])


def test_another_seed_draws_other_crops(phantoms, tmp_path, monkeypatch):
    made, crops = [], samples.LabelledCrops.__init__
    monkeypatch.setattr(samples.LabelledCrops, "__init__",
                        lambda self, *others: crops(self, *others) or made.append(self))
    for seed in (1, 2):
        tune(phantoms, tmp_path / str(seed), "--steps", 1, "--seed", seed, "--val_fraction", 0)
    assert not torch.equal(made[0][0]["images"], made[1][0]["images"])


def test_an_average_is_what_is_read_of_a_last_pt(phantoms, tmp_path):
    tune(phantoms, tmp_path / "run", "--average", ".5", "--steps", 1)
    path = tmp_path / "run" / "last.pt"
    average = runtime.load_checkpoint(path)["average"]
    net = inference.load_network(path).state_dict()
    run, _ = weights.reading.read_run(path, "student", settings.SIZES)
    assert all(torch.equal(net[name], w) and torch.equal(run[name], w)
               for name, w in average.items())
    assert all(torch.equal(average[f"encoder.{name}"], w)
               for name, w in weights.read_encoder(path).weights.items())
