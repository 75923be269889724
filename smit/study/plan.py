"""What a study runs: rows, presets, steps, cells, and their order [SMIT 3]."""
import math
import os
import shlex
from typing import NamedTuple

from smit import data
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
