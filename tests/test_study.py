"""The study: its plan, what it runs and does not run again, and its tables from known scores."""
import json
import os
import shlex
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import nibabel
import numpy as np
import pytest
import torch

from smit import inference, pretrain, runtime
from smit.baselines import __main__ as baselines
from smit.data import Preparation, load_case
from smit.data.organs import ORGANS, case_name
from smit.settings import SIZES, check_finetuning, parse_finetuning, parse_pretraining
from smit.study import plan as planning
from smit.study import probe, recipes, reconstruction, run, tables
from smit.study.__main__ import check_steps, main, parse_arguments, show, write_tables
from smit.study.plan import plan, pretrainings
from smit.study.scores import Run, Score

NETWORK = "--spacing 10 10 10 --embed_dim 8 --depths 1 1 --heads 2 2 --workers 0 --device cpu"
PRETRAIN = (f"{NETWORK} --crop 24 --view 16 --mask_cell 4 --head_width 16 --bottleneck 8 "
            "--prototypes 32 --steps 3")
TUNE = f"{NETWORK} --crop 16 --steps 3"


def arguments(experiment, *flags):
    return parse_arguments([experiment, "--data", "list.json", "--pretrain_data", "ct",
                            *map(str, flags)])


def score(row, case, organ, dice, seed=0, draw=None, recipe=None):
    return Score(row=row, labels=3, seed=seed, fold=None, ratio=None, modality="ct", draw=draw,
                 recipe=recipe, case=case, organ=organ, dice=dice)


def record_step(args, step, **facts):
    """Record a step as finished, with these facts beside its flags."""
    folder = Path(args.out, step.name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.json").write_text(json.dumps({"flags": run.signature(step), **facts}))


def markdown_rows(path):
    """{first cell: the others} of the tables in a page."""
    rows = {}
    for line in path.read_text().splitlines():
        if line.startswith("| "):
            name, *cells = line.strip("| ").split(" | ")
            rows[name] = [cell.strip() for cell in cells]
    return rows


# ------------------------------------------------------------------------------------------- plan
def test_random_simmim_and_smit_come_before_the_other_rows():
    cells = plan(arguments("table2", "--labels", 3, 7, "--seeds", 0, 1))
    assert [cell.row for cell in cells[:12]] == 4 * ["rand", "smit", "simmim"]
    assert {cell.row for cell in cells[12:]} == {"ibot", "dino", *tables.CNN} and len(cells) == 40


@pytest.mark.parametrize("random, rows", [("rand", tables.SWIN), ("rand-cnn", tables.CNN)])
def test_rows_differ_in_nothing_but_the_network_they_begin_with(random, rows):
    cells = plan(arguments("table2", "--labels", 7, "--rows", *rows))
    tuned = {cell.row: list(map(str, cell.steps[-2].flags)) for cell in cells}
    for row, flags in tuned.items():
        begun = flags.index("--init") if row != random else len(flags)
        assert flags[:begun] == tuned[random]
        assert row == random or f"pretrain/{row}-seed0" in flags[begun + 1]


def test_a_given_checkpoint_takes_the_place_of_pre_training():
    (cell,) = plan(arguments("table2", "--rows", "smit", "--checkpoint", "smit=mine.pt"))
    assert [step.script for step in cell.steps] == ["finetune.py", "evaluate.py"]
    assert str(cell.steps[0].flags[-1]).endswith("mine.pt")


@pytest.mark.parametrize("experiment, rows, network, sizes", [
    ("fig4", ["moco", "rotation"], "swin", ["embed_dim", "depths", "heads"]),
    ("table2", tables.CNN[1:], "unet", ["width"]),
])
@pytest.mark.parametrize("preset", planning.PRESETS)
def test_rows_of_the_other_tasks_are_pre_trained_as_they_are_fine_tuned(experiment, rows, network,
                                                                        sizes, preset):
    for cell in plan(arguments(experiment, "--preset", preset, "--rows", *rows)):
        first, tune, _ = cell.steps
        assert run.command(arguments(experiment), first)[1:3] == ["-m", "smit.baselines"]
        given = baselines.parse_arguments(list(map(str, first.flags)))
        baselines.check_settings(given)
        finetuning = parse_finetuning("", list(map(str, tune.flags)))
        check_finetuning(finetuning)
        assert finetuning.network == baselines.TASKS[given.task][0].network == network
        for size in [*sizes, "spacing"]:
            assert getattr(given, size) == getattr(finetuning, size)


def test_what_is_asked_for_wins_over_the_preset_in_the_u_net_s_rows_too():
    flags = ["--preset", "small", "--baseline_flags=--width 4", "--unet_flags=--width 4",
             "--finetune_flags=--precision bf16"]
    (cell,) = plan(arguments("table2", "--rows", "mg", "--labels", 3, *flags))
    given = baselines.parse_arguments(list(map(str, cell.steps[0].flags)))
    finetuning = parse_finetuning("", list(map(str, cell.steps[1].flags)))
    assert given.width == finetuning.width == 4 and finetuning.precision == "bf16"


def test_a_row_without_a_seed_leaves_the_others_theirs(tmp_path):
    scores = [score("rand", "a", "liver", .5, 0), score("smit", "a", "liver", .6, 0),
              score("smit", "a", "liver", .8, 1)]
    tables.table2(tmp_path, scores, [])
    lines = markdown_rows(tmp_path / "table2.md")
    assert lines["AVG, seed 1, 95 % over cases"][1].startswith("0.800")
    assert lines["seeds"] == ["0", "0 1"]


def test_without_smit_the_last_row_is_compared_with_the_others(tmp_path):
    scores = [score("rand", "a", "liver", .5), score("simmim", "a", "liver", .6)]
    tables.table2(tmp_path, scores, [])
    lines = markdown_rows(tmp_path / "table2.md")
    assert lines["simmim less this, 95 % over cases"][0].startswith("+0.100")


def test_a_difference_is_of_the_runs_that_both_rows_have(tmp_path):
    scores = [score("rand", "a", "liver", .5, 0), score("rand", "a", "liver", .7, 1),
              score("smit", "a", "liver", .5, 0)]          # seed 1 is still to come
    tables.table2(tmp_path, scores, [])
    lines = markdown_rows(tmp_path / "table2.md")
    for kind in ("95 % over cases", "95 % over seeds and cases"):
        assert lines[f"SMIT less this, {kind}"][0].startswith("+0.000"), kind
    assert lines["seeds"] == ["0 1", "0"]


def test_an_organ_that_no_label_has_stands_where_a_row_invented_it(tmp_path):
    nan = float("nan")
    scores = [score("rand", "a", "liver", .5), score("rand", "a", "spleen", 0.),
              score("smit", "a", "liver", .5), score("smit", "a", "spleen", nan)]
    for order in (scores, scores[::-1]):
        tables.table2(tmp_path, order, [])
        lines = markdown_rows(tmp_path / "table2.md")
        assert [cell.split()[0] for cell in lines["spleen"]] == ["0.000", "-"]
        assert lines["AVG"] == ["0.250", "0.500"]


def test_an_average_is_one_number_whatever_its_interval_is_over(tmp_path):
    nan = float("nan")                                     # seed 1 predicts no spleen, rightly
    scores = [score("rand", "a", "liver", .8, 0), score("rand", "a", "spleen", 0., 0),
              score("rand", "a", "liver", .8, 1), score("rand", "a", "spleen", nan, 1)]
    tables.table2(tmp_path, scores, [])
    lines = markdown_rows(tmp_path / "table2.md")
    assert lines["AVG"] == ["0.600"]
    assert lines["AVG, 95 % over cases"][0].startswith("0.600")
    assert lines["AVG, 95 % over seeds and cases"][0].startswith("0.600")


def test_draws_are_averaged_within_a_seed(tmp_path):
    dices = {(0, 0): (.3, .5), (0, 1): (.5, .7), (1, 0): (.4, .5), (1, 1): (.6, .7)}
    scores = []
    for (seed, draw), (rand, smit) in dices.items():
        scores += [score("rand", "a", "liver", rand, seed, draw),
                   score("smit", "a", "liver", smit, seed, draw)]
    tables.table2(tmp_path, scores, [])
    lines = markdown_rows(tmp_path / "table2.md")
    # seeds differ by .2 and .1: two numbers, not four
    assert lines["SMIT less this, 95 % over seeds and cases"][0] == "+0.150, +0.100 to +0.200"
    assert lines["SMIT less this, deviation over seeds"][0] == "0.071"
    assert lines["seeds"] == ["0 1, draws 0 1", "0 1, draws 0 1"]


def test_a_row_s_own_flags_reach_its_pre_training_alone():
    flags = ["--row_flags", "mg=--lr 3e-3", "--baseline_flags=--lr 1e-3", "--unet_flags=--lr 5e-4"]
    for cell in plan(arguments("table2", "--rows", "rand", "mg", "cpc", *flags)):
        if cell.row != "rand":
            given = baselines.parse_arguments(list(map(str, cell.steps[0].flags)))
            assert given.lr == (3e-3 if cell.row == "mg" else 1e-3)
        finetuning = parse_finetuning("", list(map(str, cell.steps[-2].flags)))
        assert finetuning.lr == (1e-4 if cell.row == "rand" else 5e-4)
    with pytest.raises(SystemExit):
        arguments("table2", "--rows", "smit", "--row_flags", "mg=--lr 1")


def test_a_row_that_only_a_checkpoint_knows_comes_last_and_has_a_seed_in_its_path():
    cells = plan(arguments("table2", "--rows", "half", "rand", "--checkpoint", "half=s{seed}.pt",
                           "--seeds", 4))
    assert [cell.row for cell in cells] == ["rand", "half"]
    assert str(cells[1].steps[0].flags[-1]).endswith("/s4.pt")
    with pytest.raises(SystemExit):
        arguments("table2", "--rows", "half")


def test_folds_score_what_each_held_back():
    cells = plan(arguments("table2", "--rows", "rand", "--modality", "mr", "--folds", 5,
                           "--labels", 9))
    assert [cell.fold for cell in cells] == [0, 1, 2, 3, 4]
    for cell in cells:
        assert "--held_out" in cell.steps[-1].flags and "training" in cell.steps[-1].flags


def test_folds_train_on_as_many_volumes_as_the_smallest_leaves(tmp_path):
    cases = [{"image": f"{i}.nii.gz", "label": f"{i}.nii"} for i in range(12)]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": cases}))
    args = arguments("table2", "--rows", "rand", "--folds", 5)
    args.data = tmp_path / "dataset.json"
    assert {cell.labels for cell in plan(args)} == {9}     # 12 less the 3 of the largest part


def test_fig3b_shares_its_runs_of_the_default_ratio_with_the_other_experiments():
    cells = plan(arguments("fig3b", "--ratios", .3, .7, "--labels", 7))
    (same,) = plan(arguments("table2", "--rows", "smit", "--labels", 7))
    assert cells[1].steps == same.steps and cells[1].ratio == .7
    assert cells[0].steps[0].name == "pretrain/smit-mask0.3-seed0"
    assert "--mask_ratio" in cells[0].steps[0].flags
    with pytest.raises(SystemExit):                        # its runs would have two ratios
        arguments("fig3b", "--pretrain_flags=--mask_ratio .5")


def test_loaded_weights_may_have_a_rate_of_their_own():
    flags = ["--finetune_flags=--lr 4e-3", "--init_flags=--lr 1e-3", "--labels", 7]
    for cell in plan(arguments("table2", *flags)):
        given = parse_finetuning("", list(map(str, cell.steps[-2].flags)))
        assert given.lr == (4e-3 if cell.row in ("rand", "rand-cnn") else 1e-3)


def test_recipes_are_compared_on_training_volumes_that_all_runs_hold_back():
    cells = plan(arguments("recipe", "--seeds", 0, 1, "--recipes", "now=", "slow=--lr 2e-3"))
    assert len({cell.folder for cell in cells}) == len(cells) == 2 * 2 * 2
    for cell in cells:
        tune, score = cell.steps
        assert tune.flags[-4:] == ["--folds", planning.TRAINING_PARTS, "--fold", 0]
        assert tune.flags[tune.flags.index("--subset_seed") + 1] == cell.draw
        assert score.flags[-3:] == ["--held_out", "--key", "training"]
        assert ("2e-3" in tune.flags) == (cell.recipe == "slow")
    with pytest.raises(SystemExit):
        arguments("recipe", "--recipes", "a/b=--lr 1")


def test_finetune_takes_the_flags_of_every_recipe():
    for cell in plan(arguments("recipe", "--preset", "small")):
        check_finetuning(parse_finetuning("", list(map(str, cell.steps[0].flags))))


def test_planning_leaves_the_arguments_as_they_were():
    args = arguments("fig3a", "--rows", "rand")
    before = dict(vars(args))
    assert len(plan(args)) == len(planning.EXPERIMENTS["fig3a"].labels)
    assert vars(args) == before


def test_a_folder_made_with_other_flags_is_not_taken_for_finished(tmp_path):
    args = arguments("table2", "--rows", "rand", "--out", tmp_path)
    step = plan(args)[0].steps[0]
    assert run.finished(args, step) is None

    (tmp_path / step.name).mkdir(parents=True)
    record = json.dumps({"flags": ["finetune.py", "--steps", "1"]})
    (tmp_path / step.name / "step.json").write_text(record)
    with pytest.raises(ValueError, match="other flags"):
        run.finished(args, step)


@pytest.mark.parametrize("needs", [None, {}])
def test_a_record_of_an_older_study_counts(tmp_path, needs):
    args = arguments("table2", "--rows", "smit", "--labels", 7, "--out", tmp_path, "--ranks", 4)
    for step in plan(args)[0].steps:
        record_step(args, step, **({} if needs is None else {"needs": needs}))
        assert run.finished(args, step)


def test_a_training_with_other_ranks_is_not_taken_for_finished(tmp_path):
    args = arguments("table2", "--rows", "smit", "--labels", 7, "--out", tmp_path, "--ranks", 4)
    first, tune, evaluate = plan(args)[0].steps
    for step in (first, tune, evaluate):
        record_step(args, step, ranks=1)
    assert run.finished(args, evaluate)                    # it has one process, whatever --ranks
    for step in (first, tune):
        with pytest.raises(ValueError, match="made with --ranks 1"):
            run.finished(args, step)


def test_what_came_from_a_pre_training_with_other_flags_is_not_taken_for_finished(tmp_path):
    flags = ["--rows", "smit", "--labels", 7, "--out", tmp_path]
    args = arguments("table2", *flags, "--pretrain_flags=--lr 1e-3")
    for step in plan(args)[0].steps:
        record_step(args, step, needs=run.signatures_before(step))
        assert run.finished(args, step)

    args = arguments("table2", *flags, "--pretrain_flags=--lr 2e-3")
    first, tune, evaluate = plan(args)[0].steps            # only the first has other flags itself
    for step in (tune, evaluate):
        with pytest.raises(ValueError, match="from pretrain/smit-seed0 with other flags"):
            run.finished(args, step)


def test_what_came_from_a_run_or_a_file_that_was_replaced_is_not_taken_for_finished(tmp_path):
    student, listed = tmp_path / "given.pt", tmp_path / "list.json"
    student.write_text("first weights")
    listed.write_text("first list")
    args = parse_arguments(["table2", "--data", str(listed), "--rows", "smit", "--labels", "3",
                            "--checkpoint", f"smit={student}", "--out", str(tmp_path / "study")])
    tune, evaluate = plan(args)[0].steps
    record_step(args, tune, made="first", sources=run.sources(args, tune))
    record_step(args, evaluate, made="scores", sources=run.sources(args, evaluate))
    assert run.finished(args, tune) and run.finished(args, evaluate)

    record_step(args, tune, made="again", sources=run.sources(args, tune))
    with pytest.raises(ValueError, match="another finetune/smit-ct3-seed0 .* delete .*evaluate"):
        run.finished(args, evaluate)
    (Path(args.out, tune.name) / "step.json").unlink()         # deleted, to be made again
    with pytest.raises(ValueError, match="from another finetune/smit-ct3-seed0"):
        run.finished(args, evaluate)

    for file in (student, listed):
        record_step(args, tune, made="first", sources=run.sources(args, tune))
        record_step(args, evaluate, made="scores", sources=run.sources(args, evaluate))
        file.write_text("second content")
        os.utime(file, ns=(0, 10 ** 18))
        with pytest.raises(ValueError, match=f"from another {file}"):
            run.finished(args, tune)
        os.utime(file, ns=(0, 2 * 10 ** 18))


@pytest.mark.parametrize("replaced, reads_it", [
    ("second.json", ["pretrain"]), ("folder/dataset.json", ["finetune", "evaluate"])])
def test_every_list_that_a_step_reads_is_known_by_its_content(replaced, reads_it, tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("first.json", "second.json", "folder/dataset.json"):
        (tmp_path / name).write_text("as it was")
    args = parse_arguments(["table2", "--data", str(tmp_path / "folder"), "--pretrain_data",
                            str(tmp_path / "first.json"), str(tmp_path / "second.json"),
                            "--rows", "smit", "--labels", "3", "--out", str(tmp_path / "study")])
    steps = plan(args)[0].steps
    for step in steps:
        record_step(args, step, made=step.name, sources=run.sources(args, step))

    (tmp_path / replaced).write_text("another one")
    os.utime(tmp_path / replaced, ns=(0, 10 ** 18))
    for step in steps:
        if step.name.split("/")[0] not in reads_it:
            assert run.finished(args, step)
            continue
        with pytest.raises(ValueError, match=f"from another {tmp_path / replaced}"):
            run.finished(args, step)
        record_step(args, step, made=step.name, sources={})        # of an older study
        assert run.finished(args, step)


def test_a_training_does_not_go_on_from_another_pre_training_than_it_began_with(tmp_path):
    args = arguments("table2", "--rows", "smit", "--labels", 7, "--out", tmp_path)
    first, tune, _ = plan(args)[0].steps
    record_step(args, first, made="first")
    Path(args.out, tune.name).mkdir(parents=True)              # cut off
    run.begun_path(args, tune).write_text(json.dumps(run.sources(args, tune)))
    record_step(args, first, made="again")
    with pytest.raises(ValueError, match="from another pretrain/smit-seed0"):
        run.start(args, tune)


def test_a_step_that_cannot_go_on_is_told_and_the_others_are_run(tmp_path, capsys):
    (tmp_path / "train.py").write_text(TRAINING)
    args = arguments("table2", "--out", tmp_path / "study")
    first, stale, last = (planning.Step(name, str(tmp_path / "train.py"), [], needs)
                          for name, needs in (("pretrain/a", ()), ("finetune/stale", ()),
                                              ("pretrain/b", ())))
    listed = tmp_path / "list.json"
    listed.write_text("second content")
    stale = stale._replace(flags=["--data", str(listed)])
    (tmp_path / "study/finetune/stale").mkdir(parents=True)        # cut off
    run.begun_path(args, stale).write_text(json.dumps({str(listed): "first content"}))

    show(args, [first, stale])
    assert "it will fail: " in capsys.readouterr().out.splitlines()[-1]
    for steps in ([stale, last], [stale], [first, stale, last]):
        with pytest.raises(ValueError, match="1 steps failed or were stopped, and 0 .*stale"):
            run.run(args, steps)
        assert "made from another" in capsys.readouterr().err
    assert run.finished(args, first) and run.finished(args, last)


def test_steps_that_begin_and_end_are_told_where_output_is_no_terminal(tmp_path, capsys,
                                                                       monkeypatch):
    (tmp_path / "train.py").write_text(TRAINING)
    args = arguments("table2", "--out", tmp_path / "study")
    step = planning.Step("pretrain/a", str(tmp_path / "train.py"), [])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    run.run(args, [step])
    assert capsys.readouterr().out.splitlines() == [
        f"pretrain/a begins; see {args.out}/pretrain/a.log", "1 of 1 steps: pretrain/a"]


@pytest.mark.parametrize("words, told", [
    ("fig3b --rows smit simmim", "one row"),
    ("fig3b --labels 3 7", "one number"),
    ("fig3b --rows rand", "pre-trained here"),
    ("fig3b --rows mg", "pre-trained here"),
    ("fig3b --rows dino", "predict hidden voxels"),
    ("fig3b --rows full", "predict hidden voxels"),        # its ratio of .7 would be 0
    ("fig3b --checkpoint smit=x.pt", "without a --checkpoint"),
    ("fig3b --row_flags 'smit=--mask_ratio .5'", "--ratios"),
    ("fig3b --pretrain_flags '--mask_rat .5'", "--ratios"),        # argparse knows it
    ("fig3b --pretrain_flags '--val_fraction 0'", "held-back volumes"),
    ("table2 --ratios .5", "of fig3b alone"),
    ("table2 --recipes now=", "of recipe alone"),
    ("table2 --mr_data mr", "of fig5 alone"),
    ("fig5 --folds 5", "--folds is of fine-tuning"),
    ("table2 --parallel 0", "1 or more"),
    ("table2 --ranks 0", "1 or more"),
    ("table2 --labels 0", "1 or more"),
    ("table2 --folds -1", "0 or more"),
    ("table2 --checkpoint smit", "write ROW=PATH"),
    ("table2 --checkpoint smit=", "name a student.pt"),
    ("table2 --checkpoint Smit=x.pt", "not one of --rows"),
    ("table2 --row_flags smit", "write ROW=FLAGS"),
    ("table2 --row_flags 'rand=--lr 1'", "nothing is pre-trained in this row"),
    ("table2 --checkpoint smit=x.pt --row_flags 'smit=--lr 1'", "nothing is pre-trained"),
    ("recipe --recipes organs-first", "write NAME=FLAGS"),
    ("probe --rows rand", "architecture from another row"),
    ("probe --checkpoint rand=x.pt --rows rand smit", "another row's name"),
    ("probe --rows smit moco", "--rows moco"),
    ("probe --rows rand-cnn smit", "--rows rand-cnn"),
    ("fig5 --rows mg", "--rows mg"),
    ("fig5 --rows smit dino", "predicts none"),
    ("fig5 --rows rand smit", "--rows rand"),
    ("fig5 --pretrain_flags '--mip 0'", "predicts none"),
    ("fig5 --row_flags 'ml-smit=--mip 0'", "predicts none"),
    ("fig3b --row_flags 'smit=--mip 0'", "predict hidden voxels"),
    ("fig3b --pretrain_flags '--mip 0'", "predict hidden voxels"),
    ("fig5 --modality mr", "--mr_data"),
    ("fig3b --pretrain_flags '--lrr 1'", "--row_flags smit: unrecognized arguments: --lrr 1"),
    ("table2 --finetune_flags \"--lr '1\"", "--finetune_flags: invalid flags value"),
    ("table2 --seeds -1", "0 or more"),
    ("table2 --seeds 18446744073709551616", "below 2^63"),
    ("table2 --draws -1", "0 or more"),
    ("fig3b --ratios 1.5", "between 0 and 1"),
    ("table2 --rows a/b --checkpoint a/b=x.pt", "--rows a/b: a name has letters"),
])
def test_what_would_fail_after_the_trainings_or_have_no_effect_is_refused(words, told, capsys):
    with pytest.raises(SystemExit):
        arguments(*shlex.split(words))
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words, told", [
    ("table2 --rows smit --pretrain_flags '--lrr 1'",
     "pretrain/smit-seed0, by --pretrain_flags, .*: unrecognized arguments: --lrr 1"),
    ("probe --rows smit --pretrain_flags '--mask_cell 5'", "pretrain/smit-seed0.*--mask_cell 5"),
    ("table2 --rows mg --baseline_flags '--view 90'", "pretrain/mg-seed0, by --baseline.*--view"),
    ("table2 --rows smit --row_flags 'smit=--view 160'", "--row_flags: --view .* larger"),
    ("table2 --rows rand --finetune_flags '--lrr 1'", "--finetune_flags: unrec.* --lrr 1"),
    ("table2 --rows rand-cnn --unet_flags '--crop 50'", "finetune/rand-cnn.*multiples of 8"),
    ("table2 --rows rand smit --init_flags '--layer_decay 2'", "finetune/smit.*--layer_decay"),
    ("table2 --rows smit --finetune_flags '--embed_dim 24'", "--embed_dim 24: the encoder of .*48"),
    ("recipe --draws 0 --recipes 'slow=--lr -1'", "-slow, by .*--recipes: argument --lr"),
    ("fig3b --ratios 0", "pretrain/smit-mask0-seed0.*--mask_ratio above 0"),
])
def test_flags_that_a_later_step_would_refuse_are_refused_before_the_first(words, told, tmp_path):
    experiment, *words = shlex.split(words)
    args = arguments(experiment, "--labels", 2, "--out", tmp_path / "study", *words)
    with pytest.raises(ValueError, match=told):
        steps = [step for step in pretrainings(args).values() if step]
        if experiment != "probe":
            steps = [step for cell in plan(args) for step in cell.steps]
        check_steps(steps)


def test_frozen_experiments_take_rows_that_train_ssl_made():
    for words, rows in (("probe --rows rand dino smit", ["rand", "dino", "smit"]),
                        ("probe --rows rand half --checkpoint half=x.pt", ["rand", "half"]),
                        ("fig5 --rows ml-mip full dino --checkpoint dino=x.pt",
                         ["ml-mip", "full", "dino"]),
                        ("fig3b --rows simmim --labels 7", ["simmim"])):
        assert arguments(*words.split()).rows == rows


def test_rows_of_the_paper_s_preset_take_as_many_steps_an_epoch():
    pairs = set()
    for cell in plan(arguments("fig4")):
        first = cell.steps[0]
        flags = list(map(str, first.flags))
        if first.script == "train_ssl.py":
            given = parse_pretraining("", flags)
        else:
            given = baselines.parse_arguments(flags)
        pairs.add(given.batch * given.accumulate)
    assert len(pairs) == 1


# ----------------------------------------------------------------------------------------- tables
def test_table2_averages_seeds_case_by_case_and_then_cases(tmp_path):
    pairs = [("liver", "a"), ("liver", "b"), ("spleen", "a"), ("spleen", "b")]
    dices = {
        ("rand", 0): (.4, .7, .2, .1),
        ("rand", 1): (.6, .7, .4, .1),
        ("smit", 0): (.6, .9, .4, .2),
        ("smit", 1): (.8, .9, .4, .2),
    }
    scores = []
    for (row, seed), values in dices.items():
        for (organ, case), dice in zip(pairs, values):
            scores.append(score(row, case, organ, dice, seed))
    tables.table2(tmp_path, scores, [])

    lines = markdown_rows(tmp_path / "table2.md")
    assert lines["liver"] == ["0.600 (0.950)", "0.800 (0.970)"]
    assert lines["spleen"] == ["0.200 (0.944)", "0.300 (0.963)"]
    # rand: .4, .4; smit: .55, .55. The paper's average is of more organs
    assert lines["AVG"] == ["0.400", "0.550"]
    less = "SMIT less this"
    assert lines[f"{less}, 95 % over cases"][0] == "+0.150 (+0.150 to +0.150), p 0.5"
    # a: .6 less .5; b: .55 less .4
    alone = lines[f"{less}, seed 1, 95 % over cases"][0]
    assert alone.startswith("+0.125 (+0.100 to +0.150)")
    assert len((tmp_path / "cases.csv").read_text().splitlines()) == 1 + len(scores)

    # seed 0: .2, .15, seed 1: .1, .15. Seeds' means are .175 and .125: a deviation of .0354, and
    # (2.8016 * .0354 / .03)^2 + 1.92 = 12.8 from 11 seeds on
    assert lines[f"{less}, 95 % over seeds and cases"][0] == "+0.150, +0.100 to +0.200"
    assert lines[f"{less}, deviation over seeds"][0] == "0.035"
    assert lines[f"{less}, p over seeds"][0] == "0.5"               # 2 of 4 choices of signs
    assert lines["seeds to show 0.03"][0] == "13"


@pytest.mark.parametrize("part", ["fold", "draw"])
def test_seeds_that_a_stopped_study_left_unfinished_have_lines_of_their_own_alone(part, tmp_path):
    scores = []
    for row, more in (("rand", 0.), ("smit", .1)):
        for seed, place, case, dice in ((0, 0, "a", .8), (0, 1, "b", .4), (1, 0, "a", .7),
                                        (1, 1, "b", .1), (2, 0, "a", .3)):
            one = score(row, case, "liver", dice + more, seed)
            scores.append(one._replace(**{part: place}))
    tables.table2(tmp_path, scores, [])
    lines = markdown_rows(tmp_path / "table2.md")
    assert lines["seeds"][0].startswith("0 1") and lines["seeds left out, unfinished"] == ["2", "2"]
    assert lines["AVG"] == ["0.500", "0.600"]
    for kind in ("95 % over cases", "95 % over seeds and cases"):
        assert lines[f"AVG, {kind}"][0].startswith("0.500"), kind
    assert lines["AVG, deviation over seeds"][0] == "0.141"        # .6 and .4
    assert lines["AVG, seed 2, 95 % over cases"][0].startswith("0.300")


def test_table2_has_a_table_for_each_network_and_one_smit(tmp_path):
    scores = [score(row, case, "liver", dice) for row, case, dice in (
        ("smit", "a", .8), ("smit", "b", .6), ("mg", "a", .5), ("mg", "b", .5),
        ("rand-cnn", "a", .4), ("rand-cnn", "b", .4))]
    log = {"epoch": [1.], "val_dice": [.5]}
    runs = [Run("mg", 3, seed, None, None, "ct", None, None, log, log, hours, .5)
            for seed, hours in ((0, .2), (1, .4))]
    tables.table2(tmp_path, scores, runs)

    unet, swin = (tmp_path / "table2.md").read_text().split("3-D U-Net")[1].split("\nSwin\n")
    assert "|  | rand-cnn | mg |" in unet and "|  | smit |" in swin
    assert "| liver | 0.400 (0.947) | 0.500 (0.967) |" in unet
    assert "| liver | 0.700 (0.970) |" in swin
    assert "| SMIT less this, 95 % over cases | +0.300 (+0.200 to +0.400), p 0.5 | +0.200" in unet
    assert "| CPU hours, pre-training |  | 0.30 |" in unet      # none was run for random weights
    assert "| CPU hours, fine-tuning |  | 0.50 |" in unet


@pytest.mark.parametrize("modality, number", [("ct", 13), ("mr", 6)])
def test_the_paper_s_averages_are_the_means_of_its_organs(modality, number):
    paper = tables.PAPER[modality]
    for column in range(len(tables.TABLE2)):
        organs = [values[column] for organ, values in paper.items() if organ != "AVG"]
        assert len(organs) == number and abs(sum(organs) / number - paper["AVG"][column]) < .0006


def test_scores_stand_beside_the_paper_s_of_the_same_modality_and_organ():
    assert tables.paper_scores("ct", [*ORGANS, "AVG"])["AVG"][-1] == .848
    organs = ["liver", "right kidney", "left kidney", "spleen", "AVG"]
    mr = tables.paper_scores("mr", organs)
    assert [values[-1] for values in mr.values()] == [.942, .930, .936] and "AVG" not in mr


def test_every_organ_belongs_to_one_group_of_figure_4():
    grouped = sum(map(list, tables.GROUPS.values()), [])
    assert sorted(grouped) == sorted(set(tables.PAPER["ct"]) - {"AVG"})


def test_a_table_of_fine_tunings_by_several_versions_of_torch_says_so(tmp_path, capsys):
    args = arguments("table2", "--rows", "rand", "smit", "--checkpoint", "smit=x.pt", "--labels", 3,
                     "--out", tmp_path)
    cells = plan(args)
    for cell, version, device in zip(cells, ("2.11.0", "2.13.0"), ("cuda", "cpu")):
        tune, evaluate = cell.steps
        for step in cell.steps:
            record_step(args, step, cpu_s=1, torch=version)
        (tmp_path / tune.name / "log.csv").write_text("step,val_dice\n3,.5\n")
        (tmp_path / tune.name / "config.json").write_text(json.dumps({"device": device}))
        (tmp_path / evaluate.name / "results.json").write_text("{}")
        (tmp_path / evaluate.name / "cases.csv").write_text("case,organ,dice\na,liver,.5\n")
    told = "not all fine-tuned alike"
    write_tables(args, tmp_path / "one", cells[:1])
    assert told not in (tmp_path / "one/table2.md").read_text()
    write_tables(args, tmp_path / "both", cells)
    last = (tmp_path / "both/table2.md").read_text().splitlines()[-1]
    assert last == f"These rows were {told}: torch 2.11.0 on cuda, torch 2.13.0 on cpu."
    assert last.removeprefix("These rows were ")[:-1] in capsys.readouterr().err


def test_figure_4_has_a_group_whose_organs_it_has_by_whatever_name(tmp_path):
    scores = [score("smit", "a", organ, dice) for organ, dice in (
        ("liver", .9), ("spleen", .8), ("left kidney", .7), ("right kidney", .6), ("aorta", .5))]
    tables.fig4(tmp_path, scores, [])
    head, _, line = (tmp_path / "fig4.md").read_text().splitlines()
    cells = dict(zip(head.split(" | "), line.split(" | ")))
    assert cells["I large"] == "0.750" and cells["IV vessels"] == "-" and "nan" not in line


def test_a_recipe_s_noise_is_told_from_the_draw_of_its_volumes(tmp_path):
    dices = {(0, 0): .3, (1, 0): .5, (0, 1): .5, (1, 1): .7}       # of (seed, draw)
    scores, runs = [], []
    for (seed, draw), dice in dices.items():
        scores.append(score("rand", "a", "liver", dice, seed, draw, "now"))
        log = {"step": [2., 3., 4.], "val_dice": [dice - .2, float("nan"), dice]}
        runs.append(Run("rand", 3, seed, None, None, "ct", draw, "now", None, log))
    recipes.recipe(tmp_path, scores, runs)
    row, labels, n, mean, all_runs, noise, of_draw, half_way, end, seeds = \
        markdown_rows(tmp_path / "recipe.md")["now"]

    assert (row, labels, n, mean) == ("rand", "3", "4", "0.500")
    assert (noise, of_draw) == ("0.141", "0.141")                  # sqrt(.02) both
    assert all_runs == "0.163"                                     # sqrt(.08 / 3)
    assert (half_way, end) == ("0.300", "0.500")
    assert seeds == "351"                              # (2.8016 * .2 / .03)^2 + 1.92 = 350.8


def test_half_way_is_the_validation_nearest_to_half_of_the_steps():
    nan = float("nan")
    log = {"step": [1., 360., 720., 1080., 1200.], "val_dice": [nan, .1, .2, .3, .4]}
    assert recipes.nearest_to_half(log) == (.6, .2)
    assert recipes.nearest_to_half({"step": [1., 300.], "val_dice": [nan, .4]}) == (1., .4)


def test_a_share_of_the_steps_that_is_not_half_is_named(tmp_path):
    log = {"step": [360., 720., 1200.], "val_dice": [.1, .2, .4]}
    run_of_it = Run("rand", 3, 0, None, None, "ct", 0, "now", None, log)
    recipes.recipe(tmp_path, [score("rand", "a", "liver", .5, 0, 0, "now")], [run_of_it])
    assert markdown_rows(tmp_path / "recipe.md")["now"][7:9] == ["0.200 (0.60)", "0.400"]


# ----------------------------------------------------------------------------------------- frozen
def test_interpolation_restores_a_ramp_and_leaves_what_is_visible():
    ramp = torch.arange(8.).expand(1, 1, 6, 7, 8) / 8
    hidden = torch.zeros(1, 1, 6, 7, 8, dtype=torch.bool)
    hidden[..., 1:5, 2:6, 3:6] = True
    torch.testing.assert_close(reconstruction.interpolated(ramp, hidden), ramp, atol=2e-3, rtol=0)

    noise = torch.rand(1, 1, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    filled = reconstruction.interpolated(noise, hidden)
    assert torch.equal(filled[~hidden], noise[~hidden])
    d, h, w = 2, 3, 4                                      # a hidden voxel: its neighbours' mean
    steps = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
    around = [filled[0, 0, d + i, h + j, w + k] for i, j, k in steps]
    assert abs(filled[0, 0, d, h, w] - sum(around) / 6) < 1e-3


def write_list(path, **splits):
    """Write a dataset.json of images by split."""
    cases = {}
    for split, names in splits.items():
        cases[split] = [{"image": f"{name}.nii.gz"} for name in names]
    path.write_text(json.dumps(cases))
    return path


def test_fig5_takes_ct_of_the_validation_split_alone(tmp_path):
    listed = write_list(tmp_path / "both.json", training="ab", validation="c")
    (case,) = reconstruction.unseen(listed, "ct")
    assert case_name(case["image"]) == "c"

    twice = write_list(tmp_path / "twice.json", training="ab", validation="cc")
    for modality in ("ct", "mr"):
        with pytest.raises(ValueError, match="listed twice"):
            reconstruction.unseen(twice, modality)

    one_split = write_list(tmp_path / "training.json", training="ab")
    assert len(reconstruction.unseen(one_split, "mr")) == 2
    with pytest.raises(ValueError, match="has no validation split"):
        reconstruction.unseen(one_split, "ct")


def test_fig5_refuses_a_list_before_any_training(tmp_path):
    listed = write_list(tmp_path / "training.json", training="ab")
    args = parse_arguments(["fig5", "--data", str(listed), "--pretrain_data", str(tmp_path),
                            "--out", str(tmp_path / "study")])
    with pytest.raises(ValueError, match="has no validation split"):
        main(args)
    assert not (tmp_path / "study").exists()


def test_fig5_stops_at_a_volume_that_cannot_be_read(tmp_path):
    """In training the next volume takes its place; here it would stand in the wrong row."""
    affine = np.diag([-10., -10., 10., 1.])
    voxels = np.random.default_rng(0).normal(0, 300, (24, 24, 24)).astype(np.float32)
    for name in "ab":
        nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / f"{name}.nii.gz")
    (tmp_path / "a.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes()[:9000])
    cases = [{"image": str(tmp_path / f"{name}.nii.gz"), "label": None} for name in "ab"]
    config = {"spacing": [10, 10, 10], "modality": "ct", "hu_window": [-175, 250],
              "crop": [24, 24, 24], "view": [16, 16, 16], "mask_cell": 4}
    samples = reconstruction.masked_views(cases, config, "ct", tmp_path / "cache")
    with pytest.raises(ValueError, match="a.nii.gz"):
        reconstruction.views_of(samples, 0)
    assert reconstruction.views_of(samples, 1)["volume"] == 1


def test_an_offset_of_the_run_s_own_modality_reaches_what_is_asked_of_its_encoder():
    config = {"spacing": [10, 10, 10], "modality": "ct", "hu_window": [-175, 250],
              "hu_offset": -1024.}
    assert inference.preparation_of_run(config, "ct").hu_offset == -1024
    mr = inference.preparation_of_run(config, "mr")
    assert (mr.modality, mr.hu_offset) == ("mr", 0)


@pytest.mark.parametrize("words, told", [
    ("probe --rows smit", "has no validation split"),
    ("table2 --labels 1 3", "--labels 3: .* has 2 volumes"),
    ("table2 --labels 2 --folds 2", "--labels 2: .* has 1 volume "),
    ("recipe --rows smit --labels 2", "--labels 2: .* has 1 volume "),
    ("probe --rows smit --labels 3", "--labels 3: .* has 2 volumes"),
    ("table2 --rows rand --labels 2", "no validation split, and table2 asks"),
    ("table2 --rows smit --checkpoint smit=nowhere.pt", "there is no file nowhere.pt"),
    ("table2 --rows rand --labels 1 --folds 2", "a.nii.gz")])      # no file, and so no label
def test_lists_that_the_last_steps_could_not_use_are_refused_before_the_first(
        words, told, tmp_path):
    listed = write_list(tmp_path / "training.json", training="ab")
    args = parse_arguments([*words.split(), "--data", str(listed), "--pretrain_data",
                            str(tmp_path), "--out", str(tmp_path / "study")])
    with pytest.raises(ValueError, match=told):
        main(args)
    assert not (tmp_path / "study").exists()


def test_a_checkpoint_of_an_unfinished_run_is_told_of(tmp_path, capsys):
    listed = write_list(tmp_path / "training.json", training="ab")
    for step, told in ((4, ""), (3, "student.pt is of step 3 of 4; finish")):
        path = tmp_path / str(step) / "student.pt"
        path.parent.mkdir()
        runtime.save_checkpoint(path, {"model": {}, "config": {"total": 4}, "step": step})
        args = parse_arguments(["table2", "--rows", "smit", "--checkpoint", f"smit={path}",
                                "--labels", "2", "--data", str(listed), "--out", str(tmp_path)])
        with pytest.raises(ValueError, match="no validation split"):
            main(args)
        error = capsys.readouterr().err
        assert told in error and ("of step" in error) == bool(told)


@pytest.mark.parametrize("folds, told", [(5, "--folds 5: .* folds of its own, .0, 1."),
                                         (2, "a.nii.gz")])         # as it has, but has no files
def test_folds_of_a_list_s_own_are_all_run(folds, told, tmp_path):
    cases = [{"image": f"{name}.nii.gz", "fold": place % 2} for place, name in enumerate("abcd")]
    (tmp_path / "list.json").write_text(json.dumps({"training": cases}))
    args = parse_arguments(["table2", "--rows", "rand", "--data", str(tmp_path / "list.json"),
                            "--folds", str(folds), "--out", str(tmp_path / "study")])
    with pytest.raises(ValueError, match=told):
        main(args)


def test_cases_that_are_scored_and_pre_trained_on_are_told_and_refused_by_fig5(tmp_path, capsys):
    listed = write_list(tmp_path / "list.json", training="ab", validation="cd")
    pool = tmp_path / "pool.txt"
    pool.write_text("a.nii.gz\nc.nii.gz\n")
    flags = ["--data", str(listed), "--pretrain_data", str(pool), "--rows", "smit", "--out",
             str(tmp_path / "study")]
    with pytest.raises(ValueError, match="sees 1 of the 2 cases that are scored.*: c; fig5 is of"):
        main(parse_arguments(["fig5", *flags]))
    with pytest.raises(ValueError, match="a.nii.gz"):              # no file
        main(parse_arguments(["table2", "--labels", "2", *flags]))
    assert "warning: " in (told := capsys.readouterr().err) and "sees 1 of the 2 cases" in told


@pytest.mark.parametrize("lie, told", [
    ({"prototypes": 9}, "not those of its settings .*patch_head"),
    ({"embed_dim": 2 ** 14}, "not 1 in 100"), (None, "was not made by train_ssl.py")])
def test_a_student_whose_settings_lie_is_refused_in_a_line(lie, told, tmp_path):
    config = vars(parse_pretraining("", ["--preset", "tiny", "--prototypes", "8"]))
    student = pretrain.build_student(config)
    config |= {"format": 2}
    config = {name: config[name] for name in (*SIZES, "format")} if lie is None else config | lie
    runtime.save_checkpoint(tmp_path / "student.pt", {"model": student.state_dict(),
                                                      "config": config})
    with pytest.raises(ValueError, match=f"student.pt.*{told}") as refusal:
        pretrain.load_student(tmp_path / "student.pt")
    assert "\n" not in str(refusal.value)


def test_a_linear_probe_finds_rare_organs_that_a_plane_parts_from_the_rest():
    rng = torch.Generator().manual_seed(0)
    organs = (torch.rand(2000, generator=rng) < .02).long()        # some 40 of 2,000 tokens
    features = torch.rand(2000, 5, generator=rng)
    features[:, 2] = .4 * features[:, 2] + .6 * organs             # below .4, above .6
    weights = probe.fit_linear(probe.class_sums(features, organs, 2))
    assert torch.equal(probe.apply_linear(features, weights).argmax(1), organs)


@pytest.mark.parametrize("balance", [1., .75])
def test_a_linear_probe_of_volumes_by_turns_is_that_of_all_their_tokens(balance):
    rng = torch.Generator().manual_seed(0)
    features = 3 + 2 * torch.randn(900, 6, generator=rng)
    organs = torch.randint(3, (900,), generator=rng)
    frozen = probe.Classifiers(features.split(300), organs.split(300), 4)      # nobody has organ 3
    torch.testing.assert_close(frozen.normed(features).std(0), torch.ones(6))

    x = torch.nn.functional.pad(frozen.normed(features), (0, 1), value=1).double()
    weight = (organs.bincount(minlength=4).clamp(min=1).double() ** -balance)[organs, None]
    squares = x.T @ (weight * x)
    ridge = .01 * squares.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(organs, 4).double()
    expected = torch.linalg.solve(squares + ridge, x.T @ (weight * one_hot))
    found = frozen.alike if balance == 1 else frozen.weights
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert frozen.bank_organs.bincount().tolist() == [probe.BANK] * 3


def test_some_of_each_organ_are_taken_evenly():
    organs = torch.tensor([0] * 9 + [3] * 2)
    assert probe.some_of_each(organs, 3).tolist() == [0, 4, 8, 9, 10]


def test_balanced_accuracy_weighs_a_rare_organ_like_a_common_one():
    hits = probe.Hits(3)                                           # nobody asks for organ 2
    hits.count(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0]))
    hits.count(torch.tensor([1, 0]), torch.tensor([1, 1]))
    assert hits.balanced_accuracy() == (3 / 4 + 1 / 2) / 2


class LastVoxel(torch.nn.Module):
    """An encoder whose features tell in which third of the greys a token's last voxel lies."""
    patch, stages = 2, [None]

    def forward(self, image, wanted):
        third = (3 * image[:, 0, 1::2, 1::2, 1::2]).long().clamp(max=2)
        return [torch.nn.functional.one_hot(third, 3).movedim(-1, 1).float(), None]


@pytest.mark.parametrize("label_axes", ["as the image's", "mirrored", "in another order"])
def test_a_segmentation_by_frozen_features_lies_where_the_organ_is_in_the_file(
        label_axes, tmp_path):
    label = np.zeros((24, 20, 18), np.uint8)
    label[4:14, 6:14, 5:13], label[16:22, 4:12, 3:15] = 1, 2
    affine = np.diag([-1.5, -1.5, 2., 1.])                         # LPS, as scanners write
    names = {0: "background", 1: "liver", 2: "spleen"}
    image = np.array([-100., 60., 180.], np.float32)[label]
    turn = {"as the image's": [(0, 1), (1, 1), (2, 1)], "mirrored": [(0, -1), (1, 1), (2, 1)],
            "in another order": [(2, 1), (0, 1), (1, -1)]}[label_axes]
    nibabel.save(nibabel.Nifti1Image(image, affine), tmp_path / "image.nii.gz")
    turned = nibabel.Nifti1Image(label, affine).as_reoriented(np.array(turn))
    nibabel.save(turned, tmp_path / "label.nii.gz")
    case = {kind: str(tmp_path / f"{kind}.nii.gz") for kind in ("image", "label")}
    prepared = load_case(case, Preparation((1.5, 1.5, 2.)), True, 3)

    encoder = LastVoxel()
    maps = probe.tokens(encoder, prepared["image"].numpy())
    organs = probe.token_organs(encoder, prepared["label"].numpy())
    frozen = probe.Classifiers([probe.flat(maps)], [organs.flatten()], 3)
    for classifier in probe.CLASSIFIERS:
        found = probe.segment(frozen, classifier, maps, 2, prepared)
        assert found.shape == label.shape
        dice = probe.organ_dice(found, affine, case, names)
        assert min(dice.values()) > .75, (classifier, dice)
        for axis, step in ((0, -1), (0, 1), (1, -1), (1, 1), (2, -1), (2, 1)):
            moved = probe.organ_dice(found.roll(step, axis), affine, case, names)
            assert sum(moved.values()) <= sum(dice.values())       # not even by a voxel


def test_the_probe_finds_the_files_of_a_list_in_the_data_root(tmp_path):
    (tmp_path / "files").mkdir()
    label = np.zeros((16, 16, 16), np.uint8)
    label[4:12, 4:12, 4:12] = 1
    image = np.array([-100., 100.], np.float32)[label]
    for kind, voxels in (("image", image), ("label", label)):
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2., 2., 2., 1.])),
                     tmp_path / f"files/{kind}.nii.gz")
    case = {"image": "image.nii.gz", "label": "label.nii.gz"}
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps({"labels": {"0": "background", "1": "liver"}, "training": [case],
                                  "validation": [case]}))

    config = {"spacing": [2, 2, 2], "modality": "ct", "hu_window": [-175, 250]}
    asked = probe.Settings(listed, "ct", [1], [None], tmp_path / "cache", tmp_path / "files")
    found, scores = probe.probe_encoder(LastVoxel(), config, asked, "smit", 1, 0, None)
    assert found.n == 1 and {one.organ for one in scores} == {"liver"}


# ---------------------------------------------------------------------------------- whole commands
# A training that comes to its end at once.
TRAINING = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(exist_ok=True)
(out / "config.json").write_text('{"total": 5}')
(out / "log.csv").write_text("step,loss\\n5,.5\\n")
"""


def study(folder, *flags, check=True):
    return forked.run("-m", "smit.study", *flags, folder=folder, check=check)


@pytest.fixture(scope="module")
def whole(phantoms, tmp_path_factory):
    """(folder, flags) of a finished study of one row."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--data", phantoms, "--pretrain_data", phantoms, "--pretrain_flags", PRETRAIN,
             "--finetune_flags", TUNE, "--rows", "smit", "--labels", 2, "--out", "study",
             "--parallel", 2]
    done = study(folder, "table2", *flags)
    assert "3 of 3 steps: evaluate/smit-ct2-seed0" in done.stdout
    return folder, flags


def test_a_study_keeps_what_a_cell_depends_on(whole):
    folder, _ = whole
    file = folder / "study/evaluate/smit-ct2-seed0/results.json"
    results = json.loads(file.read_text())["study"]
    assert results["labels"] == 2 and len(results["steps"]) == 3
    assert results["steps"]["pretrain/smit-seed0"]["config"]["method"] == "smit"


def test_a_study_runs_each_step_once_whatever_the_experiments_that_share_it(whole):
    folder, flags = whole

    def records():
        return {path: path.read_bytes() for path in folder.glob("study/*/*/step.json")}

    before = records()
    assert len(before) == 3
    for experiment in ("fig3a", "fig3c", "fig4"):
        assert "3 steps, 0 to run" in study(folder, experiment, *flags).stdout
    assert records() == before


def test_fig5_reads_the_students_of_a_study_or_given_ones(whole, phantoms):
    folder, flags = whole
    done = study(folder, "fig5", "--mr_data", phantoms, *flags)
    assert (folder / "study/fig5/smit-mr.svg").exists()
    assert "fig5: smit, seed 0\n" in done.stdout and "| smit | ct | 1 | 1 | " in done.stdout
    table = (folder / "study/fig5/fig5.md").read_text().strip().splitlines()
    assert {line.count("|") for line in table} == {10}     # the header names every column

    student = f"smit={folder / 'study/pretrain/smit-seed0/student.pt'}"
    done = study(folder, "fig5", "--data", phantoms, "--rows", "smit", "--checkpoint", student,
                 "--out", "given")
    assert "0 steps" in done.stdout and "| smit | ct | 1 | 1 | " in done.stdout


def test_the_probe_scores_a_random_encoder_and_that_of_a_study(whole):
    folder, flags = whole
    done = study(folder, "probe", *flags, "--rows", "rand", "smit")
    assert "probe: rand, seed 0\nprobe: smit, seed 0\n" in done.stdout
    assert "| rand | 2 | 0." in done.stdout and "| smit | 2 | 0." in done.stdout
    assert "| smit | 2 | k-NN | " in done.stdout
    assert len((folder / "study/probe/tokens.csv").read_text().splitlines()) == 1 + 2


def test_a_recipe_runs_on_training_volumes_alone(phantoms, tmp_path):
    done = study(tmp_path, "recipe", "--data", phantoms, "--finetune_flags", TUNE, "--labels", 2,
                 "--draws", 1, "--recipes", "slow=--lr 1e-5", "--out", "study")
    assert "| slow | rand | 2 | 1 | 0." in done.stdout

    name = "rand-ct2-seed0-draw1-fold0-slow"
    config = json.loads((tmp_path / f"study/finetune/{name}/config.json").read_text())
    assert config["subset_seed"] == 1 and config["lr"] == 1e-5

    validation = json.loads(phantoms.read_text())["validation"]
    scored = (tmp_path / "study/recipe/cases.csv").read_text()
    for case in validation:
        assert case_name(case["image"]) not in scored
        assert not any(Path(case["image"]).name in str(path) for path in config["train"])


def test_a_step_that_was_cut_off_is_recorded_with_the_time_of_all_its_calls(tmp_path):
    args = arguments("table2", "--rows", "smit", "--labels", 2, "--out", tmp_path)
    first, step, _ = plan(args)[0].steps
    (tmp_path / step.name).mkdir(parents=True)
    (tmp_path / step.name / "config.json").write_text('{"total": 3}')
    (tmp_path / step.name / "log.csv").write_text("step,loss\n3,.5\n")
    run.begun_path(args, step).write_text("{}")
    call = run.Running(step, SimpleNamespace(returncode=None), time.monotonic() - 10, threads=1)
    run.add_up(args, call, SimpleNamespace(ru_utime=3, ru_stime=1, ru_maxrss=2048))
    assert run.finish(args, call, 0, SimpleNamespace(ru_utime=5, ru_stime=0, ru_maxrss=1024))

    record = run.finished(args, step)
    assert (record["cpu_s"], record["peak_mb"]) == (9, 2)
    assert record["wall_s"] == pytest.approx(20, abs=1)
    assert record["needs"] == {first.name: run.signature(first)}


def test_a_failed_step_is_named_and_what_needs_it_is_left(phantoms, tmp_path):
    done = study(tmp_path, "table2", "--data", phantoms, "--pretrain_data", tmp_path / "none",
                 "--pretrain_flags", PRETRAIN, "--finetune_flags", TUNE, "--rows", "smit",
                 "--labels", 2, "--out", "study", check=False)
    assert done.returncode == 2 and "see study/pretrain/smit-seed0.log" in done.stderr
    assert "Traceback" not in done.stderr


# A training of 5 steps that somebody stops after 2, and that goes on with the next call.
STOPPED_ONCE = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
steps = 5 if out.exists() else 2
out.mkdir(exist_ok=True)
(out / "config.json").write_text('{"total": 5}')
(out / "log.csv").write_text(f"step,loss\\n{steps},.5\\n")
"""
# A training that is asked to stop and saves, which takes until there is a file "go".
SLOW_TO_SAVE = """
import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
def save(number, frame):
    (out / "asked").touch()
    while not (out / "go").exists():
        time.sleep(.01)
    (out / "saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
out.mkdir()
time.sleep(60)
"""


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(.01)
    assert path.exists()


def test_a_training_that_was_stopped_is_not_finished_and_goes_on(tmp_path, capsys):
    (tmp_path / "train.py").write_text(STOPPED_ONCE)
    args = arguments("table2", "--out", tmp_path / "study")
    first = planning.Step("pretrain/x", str(tmp_path / "train.py"), [])
    second = planning.Step("finetune/x", str(tmp_path / "train.py"), [], (first,))
    with pytest.raises(ValueError, match="1 steps failed or were stopped, and 1 .* pretrain/x"):
        run.run(args, [first, second])
    assert "pretrain/x stopped at step 2 of 5" in capsys.readouterr().err
    assert not run.finished(args, first) and not (tmp_path / "study/finetune").exists()

    run.run(args, [first])
    assert run.finished(args, first)


def test_every_command_that_trains_tells_how_far_it_came(whole, phantoms, tmp_path):
    folder, _ = whole
    for step in ("pretrain/smit-seed0", "finetune/smit-ct2-seed0"):
        assert run.steps_taken(folder / "study" / step) == (3, 3)
    forked.run("-m", "smit.baselines", "rotation", *NETWORK.split(), "--crop", 24, "--view", 16,
               "--steps", 3, "--data", phantoms, "--out", "run", folder=tmp_path)
    assert run.steps_taken(tmp_path / "run") == (3, 3)


def test_a_study_told_twice_to_leave_waits_for_its_trainings(tmp_path):
    (tmp_path / "train.py").write_text(SLOW_TO_SAVE)
    args = arguments("table2", "--out", tmp_path / "study")
    step = planning.Step("pretrain/x", str(tmp_path / "train.py"), [])
    out = tmp_path / "study" / step.name

    def tell_twice():
        wait_for(out)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(out / "asked")                            # the study waits for its training now
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(.2)
        (out / "go").touch()

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    teller = threading.Thread(target=tell_twice)
    teller.start()
    with pytest.raises(KeyboardInterrupt):
        run.run(args, [step])
    saved = (out / "saved").exists()
    teller.join()
    assert saved and run.spent_path(args, step).exists() and not run.finished(args, step)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
