import contextlib
import csv
import math
import os
import re
import shutil
import signal

import pretext
import pytest
import torch
from pretext import mean

import evaluate
import finetune
import train_ssl
from smit import runtime, segment
from smit.baselines import __main__ as baselines
from smit.baselines import pcrl
from smit.data import concerns

SMALL = (
    "--spacing 10 10 10 --crop 32 --view 24 --patch 16 --width 4 --queue 16 --embed_dim 8 "
    "--depths 1 1 --heads 2 2 --head_width 16 --bottleneck 8 --batch 4 --lr 3e-3 "
    "--warmup_epochs 40 --workers 0 --log_every 1 --val_fraction 0 --device cpu").split()
PICTURES = {"genesis", "rubik", "pcrl"}


def arguments(task, data, out, *flags):
    listed = [task, *SMALL, "--data", data, "--out", out, "--cache", out.parent / "cache", *flags]
    return [str(word) for word in listed]


def train(task, data, out, *flags):
    """A small run in this process; its log as a list of dicts."""
    baselines.main(baselines.parse_arguments(arguments(task, data, out, *flags)))
    return read_log(out)


def read_log(out):
    with open(out / "log.csv") as file:
        return [{name: float(cell) for name, cell in row.items() if cell}
                for row in csv.DictReader(file)]


@pytest.mark.parametrize("task", baselines.TASKS)
def test_each_task_trains_and_leaves_what_fine_tuning_needs(task, phantoms, tmp_path):
    log = train(task, phantoms, tmp_path / "run", "--steps", 2)
    terms = baselines.build_task(baselines.parse_arguments([task, *SMALL])).terms
    for row in log:
        assert row["loss"] == pytest.approx(sum(row[name] for name in terms), rel=1e-6)
        assert math.isfinite(row["loss"])

    student = runtime.load_checkpoint(tmp_path / "run" / "student.pt")
    swin = task in ("moco", "rotation")
    assert student["config"]["network"] == ("swin" if swin else "unet")
    assert {name.split(".")[0] for name in student["model"]} == (
        {"encoder", "decoder", "out"} if task in PICTURES else {"encoder"})
    assert (tmp_path / "run" / "restoration.svg").exists() == (task in PICTURES)
    page = (tmp_path / "run" / "index.html").read_text()
    assert f"Pre-training, {task}" in page and ("Restoration" in page) == (task in PICTURES)


def test_the_views_are_those_that_smit_sees(phantoms, tmp_path):
    args = baselines.parse_arguments(arguments("moco", phantoms, tmp_path / "run"))
    smit = train_ssl.parse_arguments(
        f"--spacing 10 10 10 --crop 32 --view 24 --mask_cell 4 --cache {args.cache} "
                                     f"--data {phantoms} --workers 0 --val_fraction 0".split())
    alone = runtime.start("cpu")
    cases, *_ = baselines.load_cases(args, alone)
    theirs, *_ = train_ssl.load_cases(smit, alone)
    ours = baselines.TaskSamples(args, baselines.build_task(args), cases)
    pairs = train_ssl.view_pairs(smit, theirs)

    for sample in (0, 7):
        assert torch.equal(ours[sample]["views"], pairs[sample]["views"] / 255)
        assert ours[sample]["volume"] == pairs[sample]["volume"]


def test_a_sample_s_disturbance_depends_on_its_number_and_the_seed_alone(phantoms, tmp_path):
    def sample(number, *flags):
        args = baselines.parse_arguments(arguments("genesis", phantoms, tmp_path / "run", *flags))
        cases, *_ = baselines.load_cases(args, runtime.start("cpu"))
        return baselines.TaskSamples(args, baselines.build_task(args), cases)[number]["input"]

    assert torch.equal(sample(3), sample(3))
    assert not torch.equal(sample(3), sample(8))
    assert not torch.equal(sample(3), sample(3, "--seed", 1))


def same_state(first, second):
    """Whether two last.pt hold the same run, to the bit."""
    first, second = runtime.load_checkpoint(first), runtime.load_checkpoint(second)
    first.pop("config"), second.pop("config")
    assert repr(first) == repr(second)
    assert all(torch.equal(first["task"][name], second["task"][name]) for name in first["task"])
    for a, b in zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values()):
        assert all(torch.equal(a[name], b[name]) for name in a)


def go_back(whole, resumed):
    """Make a folder that holds a run as it was at its checkpoint before the last."""
    resumed.mkdir()
    shutil.copy(whole / "last.prev.pt", resumed / "last.pt")
    shutil.copy(whole / "log.csv", resumed / "log.csv")


@pytest.mark.parametrize("task", ["pcrl", "rubik", "moco"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(task, phantoms, tmp_path):
    flags = ["--steps", 4, "--save_steps", 2, "--drop_path", ".3", "--val_fraction", ".4",
             "--val_every", 1]
    flags += ["--batch", 4 if task == "moco" else 2]
    train(task, phantoms, tmp_path / "whole", *flags)
    go_back(tmp_path / "whole", tmp_path / "resumed")
    train(task, phantoms, tmp_path / "resumed", *flags, "--resume", "--workers", 1)
    same_state(tmp_path / "whole" / "last.pt", tmp_path / "resumed" / "last.pt")

    assert (tmp_path / "whole" / "log.csv").read_bytes() == (
        tmp_path / "resumed" / "log.csv").read_bytes()


def test_a_run_is_saved_before_a_dead_worker_ends_it_and_resumes_to_the_bit(
    phantoms, tmp_path, monkeypatch
):
    flags = ["--steps", 6, "--batch", 2, "--accumulate", 2]
    train("genesis", phantoms, tmp_path / "whole", *flags)
    make = baselines.TaskSamples.__getitem__

    def die_at(dataset, sample):
        if sample == 14 and torch.utils.data.get_worker_info():         # of the fourth step
            os.kill(os.getpid(), signal.SIGKILL)
        return make(dataset, sample)

    monkeypatch.setattr(baselines.TaskSamples, "__getitem__", die_at)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        train("genesis", phantoms, tmp_path / "broken", *flags, "--workers", 1)
    assert 1 <= runtime.load_checkpoint(tmp_path / "broken" / "last.pt")["step"] <= 3
    train("genesis", phantoms, tmp_path / "broken", *flags, "--resume")
    same_state(tmp_path / "whole" / "last.pt", tmp_path / "broken" / "last.pt")
    assert (tmp_path / "whole" / "log.csv").read_bytes() == (
        tmp_path / "broken" / "log.csv").read_bytes()


def test_a_run_of_two_ranks_resumes_to_the_bit(phantoms, tmp_path, run_script):
    def run(name, *flags):
        sizes = ["--steps", 2, "--save_steps", 1, "--batch", 2, "--queue", 5]
        words = arguments("pcrl", phantoms, tmp_path / name, *sizes, *flags)
        run_script("-m", "smit.baselines", *words, ranks=2)
    run("whole")
    go_back(tmp_path / "whole", tmp_path / "resumed")
    run("resumed", "--resume")
    same_state(tmp_path / "whole" / "last.pt", tmp_path / "resumed" / "last.pt")
    state = runtime.load_checkpoint(tmp_path / "whole" / "last.pt")["task"]

    assert state["oldest"] == 2 * 4 % 5                            # both ranks' keys, in every step


def test_two_ranks_equal_one_with_twice_the_batch(phantoms, tmp_path, run_script):
    flags = ["--steps", 3, "--lr", "1e-4"]               # AdamW turns a gradient's rounding into lr
    train("genesis", phantoms, tmp_path / "one", *flags, "--batch", 2)
    train("genesis", phantoms, tmp_path / "accumulated", *flags, "--batch", 1, "--accumulate", 2)
    words = arguments("genesis", phantoms, tmp_path / "two", *flags, "--batch", 1)
    run_script("-m", "smit.baselines", *words, ranks=2)
    one = runtime.load_checkpoint(tmp_path / "one" / "last.pt")["task"]

    for other in ("two", "accumulated"):
        same = runtime.load_checkpoint(tmp_path / other / "last.pt")["task"]
        for name, tensor in one.items():
            torch.testing.assert_close(same[name], tensor, rtol=1e-4, atol=1e-5,
                                       msg=f"{other}: {name}")


def test_resume_refuses_another_task_and_another_micro_batch(phantoms, tmp_path):
    train("rotation", phantoms, tmp_path / "run", "--steps", 1)
    with pytest.raises(ValueError, match="task: rotation in the checkpoint, moco now"):
        train("moco", phantoms, tmp_path / "run", "--steps", 1, "--resume")
    with pytest.raises(ValueError, match="batch: 4 in the checkpoint, 2 now"):
        train("rotation", phantoms, tmp_path / "run", "--steps", 1, "--resume", "--batch", 2)


def test_the_loss_on_held_back_volumes_is_measured_without_learning_from_them(phantoms, tmp_path):
    flags = ["--steps", 2, "--batch", 2, "--val_fraction", ".4"]
    often = train("pcrl", phantoms, tmp_path / "often", *flags, "--val_every", 1)
    once = train("pcrl", phantoms, tmp_path / "once", *flags, "--val_every", 9)
    assert "val_loss" in often[0] and "val_loss" not in once[0]
    assert once[1]["val_loss"] == often[1]["val_loss"] > 0
    same_state(tmp_path / "often" / "last.pt", tmp_path / "once" / "last.pt")


def test_the_critic_s_loss_does_not_judge_a_network_on_held_back_volumes(phantoms, tmp_path):
    flags = ["--steps", 1, "--batch", 2, "--val_fraction", ".4", "--val_every", 1, "--lr", 0]
    (judged,) = train("rubik", phantoms, tmp_path / "critic", *flags)
    (alone,) = train("rubik", phantoms, tmp_path / "alone", *flags, "--adversarial", 0)
    assert judged["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-6)


@pytest.mark.parametrize("name", baselines.TASKS)
def test_every_gradient_of_a_task_is_clipped_once(name):
    task = baselines.build_task(baselines.parse_arguments([name, *SMALL]))
    clipped = [parameter for parameters in task.clip_groups() for parameter in parameters]
    assert len(clipped) == len(set(clipped))
    assert set(clipped) == set(task.parameters())


@pytest.mark.parametrize("task, flags, why", [
    ("genesis", "--compile", "--compile is for"), ("pcrl", "--checkpointing", "--checkpointing is"),
    ("cpc", "--view 48 48 192 --crop 48 48 192 --patch 16", "last side is too long"),
    ("moco", "--max_bad -1", "--max_bad"),
    ("genesis", "--view 20", "multiples of 8"), ("genesis", "--view 8", "from 16"),
    ("pcrl", "--view 40", "larger than"), ("pcrl", "--view 16 24 16", "first two"),
    ("rubik", "--view 24 24 48 --crop 48", "equal sides"),
    ("rotation", "--view 16 24 16", "first two"), ("rotation", "--view 18", "multiple of 8"),
    ("cpc", "--patch 12", "--patch 12"), ("cpc", "--view 16", "three halves"),
    ("cpc", "--epochs 20", "warmup"), ("moco", "--batch 3", "--batch 4"),
    ("pcrl", "--batch 1", "--batch 2"),
    ("jigsaw", "", "invalid choice"), ("genesis", "--val_fraction 1", "--val_fraction")])
def test_settings_that_do_not_fit_are_refused_before_any_work(task, flags, why, phantoms, tmp_path,
                                                              capsys):
    with pytest.raises((ValueError, SystemExit)) as refusal:
        train(task, phantoms, tmp_path / "run", *flags.split())
    assert re.search(why, str(refusal.value) + capsys.readouterr().err)
    assert not (tmp_path / "run" / "log.csv").exists()


@pytest.mark.parametrize("name", baselines.TASKS)
def test_a_task_on_another_device_leaves_nothing_on_the_cpu(name, monkeypatch):
    task = baselines.build_task(baselines.parse_arguments([name, *SMALL]))
    batch = pretext.batch(task, range(4), side=24)
    task.to("meta")                                         # mixing it with the CPU is an error
    # autocast does not know this device
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: contextlib.nullcontext())
    terms = task(baselines.on_device(batch, "meta"))
    sum(terms.values()).backward()
    task.after_step(.5)

    for tensor in [*terms.values(), *task.state_dict().values()]:
        assert tensor.device.type == "meta"


@pytest.mark.parametrize("task", baselines.TASKS)
def test_both_presets_of_each_task_fit(task):
    for preset in baselines.PRESETS:
        baselines.check_settings(baselines.parse_arguments([task, "--preset", preset]))


def test_a_stop_signal_leaves_a_checkpoint_that_goes_on(phantoms, tmp_path, monkeypatch):
    report = baselines.report

    def report_and_stop(*arguments):
        report(*arguments)
        os.kill(os.getpid(), 15)
    monkeypatch.setattr(baselines, "report", report_and_stop)               # called after step 1
    train("rotation", phantoms, tmp_path / "run", "--steps", 3)
    assert runtime.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1
    monkeypatch.undo()
    assert len(train("rotation", phantoms, tmp_path / "run", "--steps", 3, "--resume")) == 3


def test_a_run_learns_to_restore(phantoms, tmp_path):
    log = train("rubik", phantoms, tmp_path / "run", "--steps", 30, "--batch", 2, "--lr", "1e-2",
                "--adversarial", 0)
    assert mean([row["loss"] for row in log[-5:]]) < .8 * mean([row["loss"] for row in log[:5]])


# -------------------------------------------------------------------------------------- fine-tuning
TUNE = ("--spacing 10 10 10 --crop 24 --lr 1e-3 --workers 0 --log_every 1 --device cpu "
        "--crops_per_volume 1").split()


def tune(data, out, *flags):
    """A small fine-tuning run of the U-Net; its last checkpoint."""
    words = [*TUNE, "--net", "unet", "--data", data, "--out", out, "--cache", out.parent / "cache",
             *flags]
    finetune.main(finetune.parse_arguments([str(word) for word in words]))
    return runtime.load_checkpoint(out / "last.pt")


def start(folder, data, *flags):
    """The weights from which a fine-tuning run starts."""
    return tune(data, folder, "--steps", 1, "--lr", 0, *flags)["model"]


def test_fine_tuning_takes_over_what_each_task_hands_over(phantoms, tmp_path, capsys):
    for task in ("genesis", "cpc"):
        train(task, phantoms, tmp_path / task, "--steps", 2)
    genesis, cpc = (tmp_path / task / "student.pt" for task in ("genesis", "cpc"))
    random = start(tmp_path / "random", phantoms, "--width", 4)
    capsys.readouterr()
    whole = start(tmp_path / "whole", phantoms, "--init", genesis)
    assert re.search(r"decoder weights: ([\d,]+) of \1 matched", capsys.readouterr().out)
    part = start(tmp_path / "part", phantoms, "--init", genesis, "--encoder_only")
    of_cpc = start(tmp_path / "of_cpc", phantoms, "--init", cpc)
    assert "decoder weights: random" in capsys.readouterr().out

    given, given_by_cpc = (runtime.load_checkpoint(path)["model"] for path in (genesis, cpc))
    for name, weight in whole.items():
        part_of_net = name.split(".")[0]
        expected = random if part_of_net == "out" else given
        assert torch.equal(weight, expected[name])                # all methods share the last layer
        expected = given if part_of_net == "encoder" else random
        assert torch.equal(part[name], expected[name])
        expected = given_by_cpc if part_of_net == "encoder" else random
        assert torch.equal(of_cpc[name], expected[name])


def test_a_fine_tuned_u_net_is_evaluated_as_the_swin_network_is(phantoms, tmp_path):
    state = tune(phantoms, tmp_path / "run", "--width", 4, "--steps", 2, "--layer_decay", .5)
    assert state["config"]["network"] == "unet" and state["config"]["width"] == 4
    evaluate.main(evaluate.parse_arguments(
        ["--weights", str(tmp_path / "run" / "last.pt"), "--data", str(phantoms), "--device", "cpu",
         "--out", str(tmp_path / "scores")]))
    assert (tmp_path / "scores" / "cases.csv").exists()
    assert list((tmp_path / "scores").glob("*.nii.gz"))

    resumed = tune(phantoms, tmp_path / "run", "--width", 4, "--steps", 2, "--layer_decay", .5,
                   "--resume")
    for name, weight in state["model"].items():
        assert torch.equal(weight, resumed["model"][name])


def test_the_fine_tuned_u_net_has_the_published_size():
    net = segment.build_network({"network": "unet", "width": 64, "num_classes": 14})
    assert sum(weight.numel() for weight in net.parameters()) == 19_074_510
    with pytest.raises(ValueError, match="width"):
        segment.build_network({"network": "unet", "width": "wide", "num_classes": 14})


def test_help_needs_no_task_and_a_run_does(capsys):
    for flags, code, told in ((["--help"], 0, "pretext"), (["--steps", "1"], 2, "name a TASK")):
        with pytest.raises(SystemExit) as leaving:
            baselines.parse_arguments(flags)
        shown = capsys.readouterr()
        assert leaving.value.code == code and told in shown.out + shown.err


def test_too_few_held_back_volumes_for_a_batch_are_told(phantoms, tmp_path, capsys):
    concerns.printed.clear()
    log = train("rotation", phantoms, tmp_path / "run", "--steps", 1, "--batch", 2,
                "--val_fraction", .2)
    assert "no val_loss" in capsys.readouterr().err and "val_loss" not in log[-1]


def test_the_picture_of_a_turned_restoration_shows_its_input_turned_as_well():
    ramp = torch.arange(16 ** 3).view(16, 16, 16) / 16 ** 3
    for flips, turns in (([True, False, True], 1), ([False, True, False], 3)):
        code = pcrl.turn_code(flips, turns)
        assert pcrl.read_turn(code) == (flips, turns)
        task = pcrl.PCRL(width=8, queue=8)
        turned = pcrl.turn(ramp, flips, turns)
        batch = {"input": ramp[None, None, None], "code": code[None, None],
                 "target": turned[None, None, None]}
        with torch.no_grad():
            shown, _, target = task.eval().restore(batch)
        assert torch.equal(shown, target)


def test_weights_of_another_network_or_width_are_refused(phantoms, tmp_path):
    for task in ("rotation", "cpc"):
        train(task, phantoms, tmp_path / task, "--steps", 1)
    with pytest.raises(ValueError, match="holds a swin, and a unet is wanted: .* --net swin"):
        tune(phantoms, tmp_path / "run", "--init", tmp_path / "rotation" / "student.pt")
    with pytest.raises(ValueError, match="cpc/student.pt .*; give --net unet"):
        tune(phantoms, tmp_path / "run", "--init", tmp_path / "cpc" / "student.pt", "--net", "swin")
    with pytest.raises(ValueError, match="--width 8"):
        tune(phantoms, tmp_path / "run", "--init", tmp_path / "cpc" / "student.pt", "--width", 8)
    with pytest.raises(ValueError, match="--crop .* multiples of 8"):
        tune(phantoms, tmp_path / "run", "--crop", 20)

    decoder = segment.build_network({"network": "unet", "width": 4, "num_classes": 3})
    weights = {name: weight[..., :1] for name, weight in decoder.state_dict().items()}
    with pytest.raises(ValueError, match="decoder weights do not fit"):
        segment.load_decoder(decoder, weights)

    weights = {name: weight * math.nan for name, weight in decoder.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        segment.load_decoder(decoder, weights)


@pytest.mark.parametrize("task", ["moco", "rotation"])
def test_the_swin_tasks_are_fine_tuned_as_smit_is(task, phantoms, tmp_path, capsys):
    train(task, phantoms, tmp_path / task, "--steps", 1, "--view", 32)
    tune(phantoms, tmp_path / "run", "--net", "swin", "--init", tmp_path / task / "student.pt",
         "--steps", 1)
    assert re.search(r"encoder weights: ([\d,]+) of \1 matched; missing 0; unexpected 0",
                     capsys.readouterr().out)
