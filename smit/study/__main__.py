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
checkpoint on volumes held back. No checkpoint is picked by its score. All rows share data order,
decoder weights and budget. Steps are named for what they depend on, so experiments with one --out
share them. Finished steps are not run again, and one that was cut off goes on.

The rows rand-cnn, mg, cpc, cub++ and pcrl are a 3-D U-Net. At the paper's sizes it takes 824 GMAC
for a crop of 96^3, 9.6 times the Swin network with its decoder, so Table 2's five CNN columns take
most of its time.

`probe` asks frozen encoders what they know of organs: linear and k-NN segmentation, and tokens.
`recipe` compares ways to fine-tune on a third of the training split, which no run of it trains on,
and no case of the validation split: choose rates and recipes there.

Writes OUT/EXPERIMENT/ (OUT/EXPERIMENT-mr/) with a table, figures, and cases.csv, which has a row
for each number in them, from all cells that are finished. A study may be stopped anywhere; the rows
that it did not reach are missing from its tables.
"""
import argparse
import re
import shlex
from pathlib import Path

from smit import runtime
from smit.settings import Help
from smit.study import probe, recipes, reconstruction, scores, tables
from smit.study.plan import (
    EXPERIMENTS, FROZEN, PRESETS, RECIPES, ROWS, labelled_volumes, plan, pretrainings, student_path)
from smit.study.run import command, estimate, finished, run

WRITERS = {**tables.WRITERS, "recipe": recipes.recipe}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help,
                                     usage="%(prog)s EXPERIMENT [flags]")
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS, help="what to reproduce")
    add("--data", required=True, metavar="JSON",
        help="labelled volumes: a dataset.json with training and validation")
    add("--pretrain_data", nargs="+", metavar="PATH",
        help="volumes to pre-train on, as train_ssl.py --data")
    add("--mr_data", metavar="PATH", help="fig5: MR volumes, none of them in --pretrain_data")
    add("--out", default="runs/study", help="output folder, shared by experiments [ours]")
    add("--preset", choices=PRESETS, default="paper", help="sizes of all runs")
    add("--rows", nargs="+", metavar="ROW",
        help=f"of {', '.join(ROWS)}, and others with a --checkpoint; default: the experiment's. "
             "rand, smit and simmim come first")
    add("--labels", nargs="+", type=int,
        help="numbers of volumes to fine-tune on, nested; default: the experiment's, or what every "
             "fold leaves")
    add("--draws", nargs="+", type=int,
        help="seeds of the draw of these volumes; default: the run's; in recipe 0 and 1 [ours]")
    add("--seeds", nargs="+", type=int, default=[0], help="of pre-training and fine-tuning [ours]")
    add("--ratios", nargs="+", type=float, default=[.1, .3, .5, .7, .9],
        help="fig3b: mask ratios [SMIT Fig. 3b]")
    add("--folds", type=int, default=0,
        help="cross-validate on --data's training split; 5 for MR [SMIT 3]")
    add("--modality", choices=["ct", "mr"], default="ct",
        help="of --data; pre-training is on CT [SMIT 3]")
    add("--checkpoint", nargs="+", default=[], metavar="ROW=PATH",
        help="a student.pt to use in place of pre-training; {seed} in it stands for the seed")
    add("--pretrain_flags", default="", help="more flags for train_ssl.py, in one string")
    add("--baseline_flags", default="",
        help="more flags for smit.baselines, which pre-trains mg, cpc, cub++, pcrl, moco and "
             "rotation")
    add("--row_flags", nargs="+", default=[], metavar="ROW=FLAGS",
        help="more flags for the pre-training of one row, such as a rate of its own")
    add("--finetune_flags", default="", help="more flags for finetune.py, in one string")
    add("--unet_flags", default="", help="more flags for finetune.py in rows with the U-Net alone")
    add("--init_flags", default="",
        help="more flags for finetune.py in rows with loaded weights alone, such as a rate of "
             "their own")
    add("--recipes", nargs="+", default=[], metavar="NAME=FLAGS",
        help=f"recipe: flags for finetune.py under a name; default: {', '.join(RECIPES)}")
    add("--parallel", type=int, default=1,
        help="steps at a time, each on its share of the CPU cores [ours]")
    add("--ranks", type=int, default=1, help="processes of a training step, by torchrun [ours]")
    add("--dry_run", action="store_true",
        help="show the plan and what it may take, and run nothing")

    args = parser.parse_args(argv)
    experiment = EXPERIMENTS[args.experiment]
    args.checkpoint = dict(entry.split("=", 1) for entry in args.checkpoint if "=" in entry)
    args.row_flags = dict(entry.partition("=")[::2] for entry in args.row_flags)
    args.rows = args.rows or experiment.rows
    args.draws = args.draws or experiment.draws
    unknown = [row for row in args.rows if row not in ROWS and row not in args.checkpoint]
    if unknown:
        parser.error(f"--rows {unknown[0]}: choose from {', '.join(ROWS)}, or give its "
                     "--checkpoint")
    recipes = dict(entry.partition("=")[::2] for entry in args.recipes)
    args.recipes = recipes or RECIPES
    if not all(re.fullmatch(r"[\w.+-]+", name) for name in args.recipes):
        parser.error("--recipes NAME=FLAGS: a NAME has letters, digits, and . + - _ alone")
    unknown = set(args.row_flags) - set(args.rows)
    if unknown:
        parser.error(f"--row_flags {min(unknown)}: not one of --rows {' '.join(args.rows)}")
    if not args.pretrain_data and set(args.rows) - {"rand", "rand-cnn", *args.checkpoint}:
        parser.error("--pretrain_data is missing; only --rows rand and rand-cnn, and those with a "
                     "--checkpoint, do without")
    if args.experiment == "fig3b" and "--mask_ratio" in args.pretrain_flags:
        parser.error("fig3b sets --mask_ratio itself: name the ratios with --ratios")
    return args


def main(args):
    suffix = "-mr" if args.modality == "mr" else ""
    out = Path(args.out, args.experiment + suffix)
    frozen = args.experiment in FROZEN
    if frozen:
        first = pretrainings(args)
        steps = [step for step in first.values() if step]
    else:
        cells = plan(args)
        steps = unique_steps(cells)

    print(f"{args.experiment}: {len(steps)} steps, {estimate(args, steps)}; results in {out}",
          flush=True)
    if args.dry_run:
        for step in steps:
            state = "done   " if finished(args, step) else "to run "
            print(state, step.name, shlex.join(command(args, step)[1:]))
        return

    try:
        run(args, steps)
    finally:                                           # tables of what there is
        if frozen:
            write_frozen(args, out, first)
        else:
            write_tables(args, out, cells)
    print((out / f"{args.experiment}.md").read_text())


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


def write_frozen(args, out, first):
    """Write the table of an experiment on frozen students, from the finished pre-trainings."""
    students = {}
    for (row, seed), step in first.items():
        if not step or finished(args, step):
            students[row, seed] = student_path(args, row, seed, step)
    cache = f"{args.out}/cache"
    if args.experiment == "fig5":
        reconstruction.fig5(out, students, {"ct": args.data, "mr": args.mr_data}, cache)
    else:
        settings = probe.Settings(args.data, args.modality, labelled_volumes(args), args.draws,
                                  cache)
        probe.probe(out, students, "rand" in args.rows, settings)


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
