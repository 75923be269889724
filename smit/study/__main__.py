"""Make the paper's comparisons, one command each: Table 2, Figures 3, 4 and 5 [SMIT 3]; and more.

    python -m smit.study table2 --data btcv/dataset.json --pretrain_data ct btcv/dataset.json \\
        --labels 3 7 21 --dry_run
    python -m smit.study fig3a --data btcv/dataset.json --pretrain_data ct --preset small
    python -m smit.study table2 --data chaos/dataset.json --pretrain_data ct --modality mr --folds 5
    python -m smit.study fig5 --data btcv/dataset.json --mr_data chaos/dataset.json \\
        --pretrain_data ct
    python -m smit.study probe --data btcv/dataset.json --pretrain_data ct --labels 3 7 21
    python -m smit.study recipe --data btcv/dataset.json --seeds 0 1 --draws 0 1 \\
        --recipes "now=" "slow=--lr 2e-3"

A study is a list of steps, and a step is one command with its flags: pre-train a row of the
paper's comparisons, fine-tune it on the first n labelled volumes of a shuffle, score the last
checkpoint on volumes held back. No checkpoint is picked by its score. All rows share data order and
budget. Rows of one network share the decoder's first weights, too, but for mg, cub++ and pcrl,
which bring a pre-trained decoder. Steps are named for what they depend on, so experiments with one
--out share them. Finished steps are not run again, and one that was cut off goes on.

The rows rand-cnn, mg, cpc, cub++ and pcrl are a 3-D U-Net. At the paper's sizes it takes 824 GMAC
for a crop of 96^3, 9.6 times the Swin network with its decoder, so Table 2's five CNN columns take
most of its time.

`probe` asks frozen encoders what they know of organs: linear and k-NN segmentation, and tokens.
`recipe` compares ways to fine-tune on a third of the training split, which no run of it trains on,
and no case of the validation split: choose rates and recipes there.

Writes OUT/EXPERIMENT/ (OUT/EXPERIMENT-mr/) with a table, figures, and cases.csv, which has a row
for each Dice that evaluate.py gave, from all cells that are finished. A study may be stopped
anywhere; the rows that it did not reach are missing from its tables.
"""
import argparse
import functools
import json
import os
import re
import shlex
from pathlib import Path

from smit import data, runtime, settings, weights
from smit.baselines import __main__ as baselines
from smit.data.organs import case_name
from smit.data.samples import fold_split
from smit.settings import Help, require
from smit.study import probe, recipes, reconstruction, scores, tables
from smit.study.plan import (
    EXPERIMENTS, FROZEN, PRESETS, RATIOS, RECIPES, ROWS, folds_of, is_pretrained,
    labelled_volumes, own_settings, parsed, plan, predicts_voxels, pretrainings, student_path,
    tuning_settings)
from smit.study.run import command, estimate, finished, refuse_to_go_on, run

WRITERS = {**tables.WRITERS, "recipe": recipes.recipe}
NAME = r"[\w.+-]+"                     # of a row or recipe: a part of the names of folders
SOURCES = {  # the study's flags that bring flags to a script
    "train_ssl.py": "--pretrain_flags, --row_flags",
    "smit.baselines": "--baseline_flags, --row_flags",
    "finetune.py": "--finetune_flags, --unet_flags, --init_flags, --recipes",
    "evaluate.py": "--finetune_flags",
}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help,
                                     prog="python -m smit.study",
                                     usage="%(prog)s EXPERIMENT [flags]")
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS, help="what to reproduce")
    add("--data", required=True, metavar="JSON",
        help="labelled volumes: a dataset.json with training and validation")
    add("--pretrain_data", nargs="+", metavar="PATH",
        help="volumes to pre-train on, as train_ssl.py --data")
    add("--mr_data", metavar="PATH", help="fig5: MR volumes, none of them in --pretrain_data")
    add("--out", default="runs/study", help="output folder, shared by experiments [ours]")
    add("--preset", choices=PRESETS, default="paper",
        help="sizes of all runs; small: voxels of 6 mm and networks of 0.2 M parameters, for two "
             "CPU cores [ours]")
    add("--rows", nargs="+", metavar="ROW",
        help=f"of {', '.join(ROWS)}, and others with a --checkpoint; default: the experiment's. "
             "rand, smit and simmim come first")
    add("--labels", nargs="+", type=settings.count,
        help="numbers of volumes to fine-tune on, nested; default: the experiment's, or what every "
             "fold leaves")
    add("--draws", nargs="+", type=settings.whole,
        help="seeds of the draw of these volumes; default: the run's; in recipe 0 and 1 [ours]")
    add("--seeds", nargs="+", type=settings.whole, default=[0],
        help="of pre-training and fine-tuning [ours]")
    add("--ratios", nargs="+", type=settings.share,
        help=f"fig3b: mask ratios; default: {' '.join(map(str, RATIOS))} [SMIT Fig. 3b]")
    add("--folds", type=settings.whole, default=0,
        help="cross-validate on --data's training split; 5 for MR [SMIT 3]")
    add("--modality", choices=["ct", "mr"], default="ct",
        help="of --data; pre-training is on CT [SMIT 3]")
    add("--checkpoint", nargs="+", default=[], metavar="ROW=PATH",
        help="a student.pt to use in place of pre-training; {seed} in it stands for the seed")
    add("--pretrain_flags", type=flags, default="",
        help="more flags for train_ssl.py, in one string")
    add("--baseline_flags", type=flags, default="",
        help="more flags for smit.baselines, which pre-trains mg, cpc, cub++, pcrl, moco and "
             "rotation")
    add("--row_flags", nargs="+", type=flags, default=[], metavar="ROW=FLAGS",
        help="more flags for the pre-training of one row, such as a rate of its own")
    add("--finetune_flags", type=flags, default="",
        help="more flags for finetune.py, in one string; a single word needs the =, as in "
             "--finetune_flags=--compile")
    add("--unet_flags", type=flags, default="",
        help="more flags for finetune.py in rows with the U-Net alone")
    add("--init_flags", type=flags, default="",
        help="more flags for finetune.py in rows with loaded weights alone, such as a rate of "
             "their own")
    add("--recipes", nargs="+", type=flags, default=[], metavar="NAME=FLAGS",
        help=f"recipe: flags for finetune.py under a name; default: {', '.join(RECIPES)}")
    add("--parallel", type=settings.count, default=1,
        help="steps at a time, each on its share of the CPU cores [ours]; all use the first GPU: "
             "on a machine with several, run a study on each, with CUDA_VISIBLE_DEVICES and --out "
             "of its own")
    add("--ranks", type=settings.count, default=1,
        help="processes of a training step, by torchrun [ours]")
    add("--dry_run", action="store_true",
        help="show the plan and what it may take, and run nothing")

    args = parser.parse_args(argv)
    experiment = EXPERIMENTS[args.experiment]
    args.rows = args.rows or experiment.rows
    args.draws = args.draws or experiment.draws
    try:
        args.checkpoint = by_name("--checkpoint", "ROW=PATH", args.checkpoint)
        args.row_flags = by_name("--row_flags", "ROW=FLAGS", args.row_flags)
        args.recipes = by_name("--recipes", "NAME=FLAGS", args.recipes)
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def flags(text):
    """argparse type: flags in one string. ValueError if a quote in it is not closed."""
    shlex.split(text)
    return text


def by_name(option, form, entries):
    """Part the entries NAME=VALUE of an option: {name: value}. ValueError for one without "="."""
    for entry in entries:
        require("=" in entry, f"{option} {entry}: has no =; write {form}")
    return dict(entry.split("=", 1) for entry in entries)


def check_arguments(args):
    """Refuse what has no effect or does not fit, before any work is done: ValueError."""
    for row in args.rows:
        require(row in ROWS or row in args.checkpoint,
                f"--rows {row}: choose from {', '.join(ROWS)}, or give its --checkpoint")
        require(re.fullmatch(NAME, row),
                f"--rows {row}: a name has letters, digits, and . + - _ alone")
    for row, path in args.checkpoint.items():
        require(row in args.rows, f"--checkpoint {row}: not one of --rows {' '.join(args.rows)}; "
                                  "name it there, too")
        require(path, f"--checkpoint {row}=: name a student.pt after the =")
    for row in args.row_flags:
        require(row in args.rows, f"--row_flags {row}: not one of --rows {' '.join(args.rows)}")
        require(is_pretrained(args, row),
                f"--row_flags {row}: nothing is pre-trained in this row; drop them, or give "
                "--finetune_flags, which all rows share")
    require(all(re.fullmatch(NAME, name) for name in args.recipes),
            "--recipes NAME=FLAGS: a NAME has letters, digits, and . + - _ alone")
    require(args.pretrain_data or not any(is_pretrained(args, row) for row in args.rows),
            "--pretrain_data is missing; only --rows rand and rand-cnn, and those with a "
            "--checkpoint, do without")
    for name, of in (("recipes", "recipe"), ("ratios", "fig3b"), ("mr_data", "fig5")):
        require(args.experiment == of or not getattr(args, name),
                f"--{name} is of {of} alone; leave it out")
    args.recipes = args.recipes or RECIPES
    args.ratios = args.ratios or RATIOS
    if args.experiment == "fig3b":
        check_fig3b(args)
    if args.experiment in FROZEN:
        check_frozen(args)
    require(args.experiment != "fig5" or args.modality == "ct",
            "--modality mr: in fig5 --data is CT, and MR volumes go to --mr_data")


def check_fig3b(args):
    """Refuse what Fig. 3b cannot show: one row's errors on hidden voxels against the mask ratio."""
    require(len(args.rows) == 1,
            "fig3b is of one row; name one with --rows")
    require(not args.labels or len(args.labels) == 1,
            "fig3b is of one number of labelled volumes; name one with --labels")
    (row,) = args.rows
    require(is_pretrained(args, row) and predicts_voxels(args, row)
            and own_settings(args, row).mask_ratio,
            f"--rows {row}: fig3b is of a row that is pre-trained here, without a --checkpoint, to "
            "predict hidden voxels; choose smit, simmim, ml-mip or ml-smit")
    # under the name of any other ratio the run of .7 would have this one
    require(own_settings(args, row).mask_ratio == .7,
            "fig3b sets --mask_ratio itself: name the ratios with --ratios")
    require(own_settings(args, row).val_fraction > 0,
            "--val_fraction 0: fig3b is of errors on held-back volumes")


def check_frozen(args):
    """Refuse rows whose encoders fig5 and probe could not read once they are pre-trained."""
    way_out = "leave it out, or give it a student.pt of train_ssl.py with --checkpoint"
    random = {"rand"} if args.experiment == "probe" else set()
    for row in args.rows:
        if row in args.checkpoint or row in random:
            continue
        require(ROWS[row].script == "train_ssl.py",
                f"--rows {row}: {args.experiment} reads what train_ssl.py pre-trained, and this "
                f"row is not; {way_out}")
        require(args.experiment == "probe" or predicts_voxels(args, row),
                f"--rows {row}: fig5 is of predicted voxels, and this row predicts none; {way_out}")
    require("rand" not in args.checkpoint or not random,
            "--checkpoint rand: in probe rand has random weights; give the file another row's name")
    require(not args.folds, f"--folds is of fine-tuning; {args.experiment} asks about the "
                            "validation split")
    require(set(args.rows) - random,
            "--rows rand: rand takes its architecture from another row: name one, or a row with a "
            "--checkpoint")


def check_lists(args):
    """Refuse data that no step after hours of pre-training could use: ValueError."""
    for (row, seed), step in pretrainings(args).items():
        path = student_path(args, row, seed, step)
        if not step:
            require(Path(path).is_file(), f"--checkpoint {row}: there is no file {path}")
            warn_of_unfinished(row, path)
    if args.experiment == "fig5":
        for modality, path in fig5_lists(args).items():
            cases = reconstruction.unseen(path, modality)
            check_unseen(args, cases, path)
            data.check_cases(cases)
        return

    root = tuning_settings(args).data_root
    parts, held_back = folds_of(args)
    trained = data.read_list(args.data, data_root=root)
    volumes = len(trained)
    if parts:                                          # one of them is held back
        check_folds(args, trained)
        volumes = min(len(fold_split(trained, fold, parts)[0]) for fold in held_back)
    for labels in labelled_volumes(args):
        require(labels is None or labels <= volumes,
                f"--labels {labels}: {args.data} has {data.count(volumes, 'volume')} to train on")
    scored = trained
    if not parts:
        require(data.has_split(args.data, "validation", root),
                f"{args.data}: has no validation split, and {args.experiment} asks about its "
                "cases; give a dataset.json with cases under 'validation'"
                + ("" if args.experiment in FROZEN else ", or --folds"))
        scored = data.read_list(args.data, "validation", root)
        trained = trained + scored
    check_unseen(args, scored, args.data)
    data.check_cases(trained, labels=True)


def check_folds(args, cases):
    """Refuse a number of --folds that is not that of the list's own folds, if it has any."""
    own = {case["fold"] for case in cases if case.get("fold") is not None}
    require(args.experiment == "recipe" or not own or own == set(range(args.folds)),
            f"--folds {args.folds}: {args.data} has folds of its own, {sorted(own)}")


def check_unseen(args, cases, path):
    """Tell if cases that are scored are among those that are pre-trained on; fig5 refuses them."""
    if not any(is_pretrained(args, row) for row in args.rows):
        return
    own = own_settings(args, "smit")
    pool, _ = data.read_lists(args.pretrain_data, own.key, own.data_root, own.modality)
    pool = {os.path.realpath(case["image"]) for case in pool}
    seen = [case_name(case["image"]) for case in cases if os.path.realpath(case["image"]) in pool]
    told = (f"{path}: pre-training sees {len(seen)} of the {len(cases)} cases that are scored, by "
            f"--pretrain_data: {', '.join(seen[:3])}")
    require(args.experiment != "fig5" or not seen, f"{told}; fig5 is of unseen ones")
    if seen:
        runtime.warn_once("unseen", told)


def check_steps(steps):
    """Refuse flags that a step's own command would refuse, hours later: ValueError."""
    settings_of = {}
    for step in steps:
        first = settings_of[step.needs[0].name] if step.needs else None
        settings_of[step.name] = parsed(
            functools.partial(read_flags, step.script, first), step.flags,
            f"{step.name}, by {SOURCES[step.script]}")


def read_flags(script, first, words):
    """Parse and check flags as a script does before any work. ValueError as it raises there.

    first: settings of the step that this one needs, or None.
    """
    if script == "train_ssl.py":
        given = settings.parse_pretraining("", words)
        settings.check_pretraining(given)
    elif script == "smit.baselines":
        given = baselines.parse_arguments(words)
        baselines.check_settings(given)
    elif script == "finetune.py":
        given = settings.parse_finetuning("", words)
        settings.check_finetuning(given)
        if first or not given.init:                    # a given checkpoint has sizes of its own
            check_network(given, first or given)
    else:
        given = settings.parse_evaluation("", words)
    return given


def check_network(tuned, first):
    """Refuse sizes of a fine-tuning that do not fit the network that it begins with: ValueError.

    first: settings of the run that makes this network.
    """
    names = settings.UNET_SIZES if tuned.network == "unet" else settings.SIZES
    sizes = {name: getattr(first, name) for name in names}
    settings.check_sizes(tuned, sizes)
    settings.check_crop(tuned, sizes)


def main(args):
    suffix = "-mr" if args.modality == "mr" else ""
    out = Path(args.out, args.experiment + suffix)
    frozen = args.experiment in FROZEN
    check_lists(args)
    if frozen:
        first = pretrainings(args)
        steps = [step for step in first.values() if step]
    else:
        cells = plan(args)
        steps = unique_steps(cells)
    check_steps(steps)

    print(f"{args.experiment}: {len(steps)} steps, {estimate(args, steps)}; results in {out}",
          flush=True)
    if args.dry_run:
        show(args, steps)
        return

    try:
        run(args, steps)
    finally:                                           # tables of what there is
        if frozen:
            write_frozen(args, out, first)
        else:
            write_tables(args, out, cells)
    print((out / f"{args.experiment}.md").read_text())


def show(args, steps):
    """Print the command of each step, whether it is done, and why it cannot go on if it cannot."""
    for step in steps:
        done = finished(args, step)
        print("done   " if done else "to run ", step.name, shlex.join(command(args, step)[1:]))
        if not done:
            try:
                refuse_to_go_on(args, step)
            except ValueError as error:
                print(f"        it will fail: {error}")


def unique_steps(cells):
    """List the steps of all cells, each once, in order."""
    steps = {}
    for cell in cells:
        for step in cell.steps:
            steps[step.name] = step
    return list(steps.values())


def write_tables(args, out, cells):
    """Write an experiment's table and figures from its finished cells, if there are any."""
    whole = [cell for cell in cells if all(finished(args, step) for step in cell.steps)]
    if not whole:
        return
    for cell in whole:
        scores.complete_results(args.out, cell)
    WRITERS[args.experiment](out, *scores.read_cells(args.out, whole))
    environments = environments_of(args, whole)
    if len(environments) > 1:
        told = f"not all fine-tuned alike: {', '.join(environments)}"
        runtime.warn_once("environments", f"{out}: {told}")
        page = out / f"{args.experiment}.md"
        scores.write(page, f"{page.read_text()}\nThese rows were {told}.\n")


def environments_of(args, cells):
    """List what fine-tuned some finished cells, by their records: "torch 2.13.0 on cpu"."""
    environments = set()
    for cell in cells:
        tuned = cell.steps[-2]
        version = finished(args, tuned).get("torch", "of an unknown version")
        device = json.loads(Path(args.out, tuned.name, "config.json").read_text())["device"]
        # older runs kept what --device said
        place = "" if device == "auto" else f" on {device}"
        environments.add(f"torch {version}{place}")
    return sorted(environments)


def warn_of_unfinished(row, path):
    """Warn of a --checkpoint that its run saved on the way; ValueError if it cannot be read."""
    state = weights.read_file(path)
    step, config = state.get("step"), state.get("config")
    total = config.get("total") if isinstance(config, dict) else None
    if isinstance(step, int) and isinstance(total, int) and step < total:
        runtime.warn_once(path, f"--checkpoint {row}: {path} is of step {step} of {total}; finish "
                                "its run with --resume first")


def fig5_lists(args):
    """Name the volumes that Fig. 5 reconstructs: {modality: path}."""
    lists = {"ct": args.data, "mr": args.mr_data}
    return {modality: path for modality, path in lists.items() if path}


def write_frozen(args, out, first):
    """Write the table of an experiment on frozen students, from the finished pre-trainings."""
    students = {}
    for (row, seed), step in first.items():
        if not step or finished(args, step):
            students[row, seed] = student_path(args, row, seed, step)
    cache = f"{args.out}/cache"
    if args.experiment == "fig5":
        reconstruction.fig5(out, students, fig5_lists(args), cache)
    else:
        asked = probe.Settings(args.data, args.modality, labelled_volumes(args), args.draws, cache,
                               tuning_settings(args).data_root)
        probe.probe(out, students, "rand" in args.rows, asked)


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
