"""The paper's comparisons, one command each: Table 2, Figures 3, 4 and 5 [SMIT 3]; and a probe of frozen encoders.

    python -m smit.study table2 --data btcv/dataset.json --pretrain_data ct btcv/dataset.json --labels 3 7 21 --dry_run
    python -m smit.study fig3a --data btcv/dataset.json --pretrain_data ct --preset small --parallel 2
    python -m smit.study table2 --data chaos/dataset.json --pretrain_data ct --modality mr --folds 5
    python -m smit.study fig5   --data btcv/dataset.json --mr_data chaos/dataset.json --pretrain_data ct

A study is a list of steps, and a step is one of the three scripts with its flags: pre-train a row of the paper's
comparisons, fine-tune it on the first n labelled volumes of a shuffle, score the last checkpoint on volumes held back.
No checkpoint is picked by its score. All rows share data order, decoder weights and budget. Steps are named for what
they depend on, so experiments with one --out share them; finished ones are not run again, and one that was cut off
goes on. Writes OUT/EXPERIMENT/ (OUT/EXPERIMENT-mr/) with a table, figures and cases.csv, a row for each number in them,
from whatever is finished: a study may be stopped anywhere, and rows it did not reach are missing from its tables.
"""
import argparse
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from smit import data, flags, runtime
from smit.study import tables

ROWS = {  # name: flags of train_ssl.py; "rand" is not pre-trained. Table 2's Swin columns, then what Fig. 4 adds
    "rand": None, "smit": "--method smit", "simmim": "--method simmim", "ibot": "--method ibot",
    "dino": "--method dino", "full": "--method full", "mpd": "--method mpd", "itd": "--method itd",
    "moco": "--method moco",
    "ml-mip": "--method simmim --voxel_head multilayer", "ml-smit": "--method ml-mip"}
TABLE2 = tables.TABLE2
PRESETS = {  # flags of train_ssl.py and of finetune.py; single runs of the paper's sizes want GPUs and days
    "paper": ("", ""),
    # two CPU cores: 6 mm carry the large organs; cells of 24 mm take a network of two stages, and with cells of 48 mm
    # MIP ended nearer to the visible median of each view. With crops of 32^3, twice as many, random weights came to a
    # Dice of .22 in place of .41: half an abdomen must fit into one [ours]
    "small": ("--preset tiny --spacing 6 6 6 --embed_dim 16 --depths 2 4 --heads 2 4 --view 32 --crop 44 --mask_cell 4 "
              "--batch 8 --lr 4e-3 --steps 1200 --val_fraction .05 --val_every 300 --precision bf16 --workers 0",
              "--preset tiny --embed_dim 16 --depths 2 4 --heads 2 4 --crop 48 --crops_per_volume 1 --lr 4e-3 "
              "--steps 1200 --val_every 120 --precision bf16 --workers 0")}
EXPERIMENTS = {  # rows, numbers of labelled volumes
    "table2": (TABLE2, [21]), "fig3a": (TABLE2, [3, 7, 14, 21]), "fig3b": (["smit"], [21]), "fig3c": (TABLE2, [21]),
    "fig4": (["full", "mpd", "itd", "ibot", "simmim", "ml-mip", "ml-smit", "moco", "smit"], [21]),
    "fig5": (["smit", "ml-smit"], []), "probe": (TABLE2, [])}   # these two need no fine-tuning
ROOT = Path(__file__).resolve().parents[2]


class Step(NamedTuple):
    """One script with its flags. Its output folder is OUT/name, what it prints goes to OUT/name.log."""
    name: str
    script: str
    flags: list
    needs: tuple = ()                # names of steps


class Cell(NamedTuple):
    """One score of the study: the steps that lead to it, and what tells it from the others."""
    row: str
    labels: int
    seed: int
    fold: int
    ratio: float
    modality: str
    steps: list                      # (pre-train,) fine-tune, evaluate

    @property
    def folder(self):
        return self.steps[-1].name


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Help,
                                     usage="%(prog)s EXPERIMENT [flags]")
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS, help="what to reproduce")
    add("--data", required=True, metavar="JSON", help="labelled volumes: a dataset.json with training and validation")
    add("--pretrain_data", nargs="+", metavar="PATH", help="volumes to pre-train on, as train_ssl.py --data")
    add("--mr_data", metavar="PATH", help="fig5: MR volumes, none of them in --pretrain_data")
    add("--out", default="runs/study", help="output folder, shared by experiments [ours]")
    add("--preset", choices=PRESETS, default="paper", help="sizes of all runs")
    add("--rows", nargs="+", choices=ROWS, metavar="ROW",
        help=f"of {', '.join(ROWS)}; default: the experiment's. rand, smit and simmim come first")
    add("--labels", nargs="+", type=int,
        help="numbers of volumes to fine-tune on, nested; default: the experiment's, or what every fold leaves")
    add("--seeds", nargs="+", type=int, default=[0], help="of pre-training and fine-tuning [ours]")
    add("--ratios", nargs="+", type=float, default=[.1, .3, .5, .7, .9], help="fig3b: mask ratios [SMIT Fig. 3b]")
    add("--folds", type=int, default=0, help="cross-validate on --data's training split; 5 for MR [SMIT 3]")
    add("--modality", choices=["ct", "mr"], default="ct", help="of --data; pre-training is on CT [SMIT 3]")
    add("--checkpoint", nargs="+", default=[], metavar="ROW=PATH", help="a student.pt to use in place of pre-training")
    add("--pretrain_flags", default="", help="more flags for train_ssl.py, in one string")
    add("--finetune_flags", default="", help="more flags for finetune.py, in one string")
    add("--parallel", type=int, default=1, help="steps at a time, each on its share of the CPU cores [ours]")
    add("--ranks", type=int, default=1, help="processes of a training step, by torchrun [ours]")
    add("--dry_run", action="store_true", help="show the plan and what it may take, and run nothing")
    args = parser.parse_args(argv)
    args.checkpoint = dict(entry.split("=", 1) for entry in args.checkpoint if "=" in entry)
    args.rows = args.rows or EXPERIMENTS[args.experiment][0]
    if not args.pretrain_data and set(args.rows) - {"rand", *args.checkpoint}:
        parser.error("--pretrain_data is missing; only --rows rand and those with a --checkpoint do without")
    if args.experiment == "fig3b" and "--mask_ratio" in args.pretrain_flags:
        parser.error("fig3b sets --mask_ratio itself: name the ratios with --ratios")
    return args


# ------------------------------------------------------------------------------------------------------------- plan
def mask(ratio):
    """Part of a step's name: none for the default of .7, so that Fig. 3b shares its runs with the other experiments."""
    return "" if ratio in (None, .7) else f"-mask{ratio:g}"


def pretraining(args, row, seed, ratio=None):
    """The step that makes OUT/name/student.pt, or None for the row of random weights."""
    if ROWS[row] is None:
        return None
    name = f"pretrain/{row}{mask(ratio)}-seed{seed}"
    flags = shlex.split(f"{PRESETS[args.preset][0]} {args.pretrain_flags} {ROWS[row]}")
    flags += ["--mask_ratio", ratio] if mask(ratio) else []
    return Step(name, "train_ssl.py", [*flags, "--seed", seed, "--data", *map(os.path.abspath, args.pretrain_data)])


def cell(args, row, labels, seed, fold=None, ratio=None):
    """Pre-train, fine-tune, evaluate, for one number in a table."""
    first = None if row in args.checkpoint else pretraining(args, row, seed, ratio)
    name = f"{row}{mask(ratio)}-{args.modality}{labels}-seed{seed}"
    name += "" if fold is None else f"-fold{fold}"
    init = args.checkpoint.get(row) or first and f"{args.out}/{first.name}/student.pt"
    path = os.path.abspath(args.data)
    tune = [*shlex.split(f"{PRESETS[args.preset][1]} {args.finetune_flags}"), "--seed", seed, "--data", path,
            "--num_train", labels, "--modality", args.modality]
    tune += ["--init", os.path.abspath(init)] if init else []
    tune += [] if fold is None else ["--folds", args.folds, "--fold", fold]
    weights = os.path.abspath(f"{args.out}/finetune/{name}/last.pt")     # the last, so that no score picks a checkpoint
    score = ["--weights", weights, "--data", path, "--held_out"] + ([] if fold is None else ["--key", "training"])
    steps = [Step(f"finetune/{name}", "finetune.py", tune, (first.name,) if first else ()),
             Step(f"evaluate/{name}", "evaluate.py", score, (f"finetune/{name}",))]
    return Cell(row, labels, seed, fold, ratio, args.modality, [first, *steps] if first else steps)


def plan(args):
    """Cells of the experiment, the most telling first: rand, smit, simmim; fewest labels first; seeds in turn."""
    ranked = [row for row in ROWS if row in args.rows]
    if not args.labels:
        n = len(data.read_list(args.data)) if args.folds else 0
        args.labels = [n - math.ceil(n / args.folds)] if n else EXPERIMENTS[args.experiment][1]
    return [cell(args, row, labels, seed, fold, ratio)
            for some in (ranked[:3], ranked[3:]) for seed in args.seeds for labels in args.labels for row in some
            for fold in (range(args.folds) if args.folds else [None])
            for ratio in (args.ratios if args.experiment == "fig3b" else [None])]


def command(args, step):
    """What to call: flags as text, the launcher before the training scripts where there is more than one rank."""
    launch = [sys.executable]
    if args.ranks > 1 and step.script != "evaluate.py":
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    return [*launch, str(ROOT / step.script), *map(str, step.flags)]


def finished(args, step):
    """The record of a finished step, or None. ValueError where its folder was made with other flags."""
    path = Path(args.out, step.name, "step.json")
    record = json.loads(path.read_text()) if path.exists() else None
    if record and record["flags"] != [step.script, *map(str, step.flags)]:
        raise ValueError(f"{path.parent} was made with other flags, {shlex.join(record['flags'])}: give another --out")
    return record


def estimate(args, steps):
    """What is known of the time that is left, from finished steps of the same script in OUT."""
    took = {script: [] for script in ("train_ssl.py", "finetune.py", "evaluate.py")}
    for path in Path(args.out).glob("*/*/step.json"):
        record = json.loads(path.read_text())
        took[record["flags"][0]].append(record["wall_s"])
    left = [step.script for step in steps if not finished(args, step)]
    if unknown := sorted({script for script in left if not took[script]}):
        return f"{len(left)} to run; no estimate before one step each of {', '.join(unknown)} is finished"
    seconds = sum(statistics.median(took[script]) for script in left)
    return f"{len(left)} to run; about {seconds / 3600 / args.parallel:.1f} hours, {args.parallel} at a time"


# -------------------------------------------------------------------------------------------------------------- run
def start(args, step):
    """Begin a step, or go on with it; returns its process, with `step` and `begun` noted on it."""
    out = Path(args.out, step.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    more = ["--out", str(out)]
    more += [] if step.script == "evaluate.py" else ["--cache", str(Path(args.out, "cache")), "--resume"]
    threads = max(1, (os.cpu_count() or 1) // (args.parallel * args.ranks))
    with open(f"{out}.log", "ab") as log:
        process = subprocess.Popen(command(args, step) + more, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    process.step, process.begun, process.threads = step, time.monotonic(), threads
    return process


def finish(args, process, status, usage):
    """Record a step that ended well; False, and a line that says where to look, for one that did not."""
    process.returncode = os.waitstatus_to_exitcode(status)
    step, out = process.step, Path(args.out, process.step.name)
    if process.returncode:
        tqdm.write(f"{step.name} failed with exit code {process.returncode}; see {out}.log", file=sys.stderr)
        return False
    record = {"flags": [step.script, *map(str, step.flags)], "wall_s": time.monotonic() - process.begun,
              "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024, "ranks": args.ranks,
              "threads": process.threads, "cores": os.cpu_count(), "torch": str(torch.__version__)}
    tables.write(out / "step.json", json.dumps(record, indent=1))
    return True


def run(args, steps):
    """Run what is not finished, in order, `parallel` at a time; ValueError naming what failed, after all the rest."""
    waiting = [step for step in steps if not finished(args, step)]
    done, failed, running = {step.name for step in steps} - {step.name for step in waiting}, [], {}
    bar = tqdm(total=len(steps), initial=len(done), unit="step", disable=None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            ready = [step for step in waiting if done.issuperset(step.needs)]
            for step in ready[:args.parallel - len(running)]:
                waiting.remove(step)
                process = start(args, step)
                running[process.pid] = process
            if not running:                                              # what is left needs something that failed
                break
            pid, status, usage = os.wait4(-1, 0)
            if pid in running:
                process = running.pop(pid)
                (done.add if finish(args, process, status, usage) else failed.append)(process.step.name)
                bar.update()
    finally:
        for process in running.values():                                 # trainings save, and go on with the next call
            process.terminate()
        for process in running.values():
            process.wait()
        bar.close()
    if failed:
        raise ValueError(f"{len(failed)} steps failed and {len(waiting)} that need them were left: {', '.join(failed)}")


# --------------------------------------------------------------------------------------------------------- the command
def main(args):
    out = Path(args.out, args.experiment + ("-mr" if args.modality == "mr" else ""))
    frozen = args.experiment in ("fig5", "probe")
    if frozen:
        first = {(row, seed): None if row in args.checkpoint else pretraining(args, row, seed)
                 for row in args.rows for seed in args.seeds if ROWS[row]}
        steps = [step for step in first.values() if step]
    else:
        cells = plan(args)
        steps = list({step.name: step for cell in cells for step in cell.steps}.values())
    print(f"{args.experiment}: {len(steps)} steps, {estimate(args, steps)}; results in {out}", flush=True)
    if args.dry_run:
        for step in steps:
            print("done   " if finished(args, step) else "to run ", step.name, shlex.join(command(args, step)[1:]))
        return
    try:
        run(args, steps)
    finally:                                                             # tables of what there is
        if frozen:
            students = {key: args.checkpoint.get(key[0]) or f"{args.out}/{step.name}/student.pt"
                        for key, step in first.items() if not step or finished(args, step)}
            if args.experiment == "fig5":
                tables.fig5(out, students, {"ct": args.data, "mr": args.mr_data}, f"{args.out}/cache")
            else:
                tables.probe(out, students, "rand" in args.rows, args.data, args.modality, f"{args.out}/cache")
        elif whole := [cell for cell in cells if all(finished(args, step) for step in cell.steps)]:
            for cell in whole:
                tables.complete_results(args.out, cell)
            tables.WRITERS[args.experiment](out, tables.read_cells(args.out, whole))
    print((out / f"{args.experiment}.md").read_text())


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
