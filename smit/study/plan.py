"""Plan a study: rows of the comparisons, presets, and the steps that lead to each score [SMIT 3].

Reading order: what there is to choose, Step and Cell, flags, pretraining, cell, plan.
"""
import contextlib
import functools
import io
import itertools
import os
import shlex
from typing import NamedTuple

from smit import data, settings
from smit.data.samples import fold_split
from smit.study.tables import SWIN, TABLE2


class Row(NamedTuple):
    """A row of the comparisons: how its network is pre-trained, and which network it is."""
    script: str = None                 # None: random weights
    flags: str = ""                    # of that script
    network: str = "swin"              # or "unet"


ROWS = {  # Table 2's columns, Swin first, then what Fig. 4 adds
    "rand": Row(),
    "smit": Row("train_ssl.py", "--method smit"),
    "simmim": Row("train_ssl.py", "--method simmim"),
    "ibot": Row("train_ssl.py", "--method ibot"),
    "dino": Row("train_ssl.py", "--method dino"),
    "rand-cnn": Row(network="unet"),
    "mg": Row("smit.baselines", "genesis", "unet"),
    "cpc": Row("smit.baselines", "cpc", "unet"),
    "cub++": Row("smit.baselines", "rubik", "unet"),
    "pcrl": Row("smit.baselines", "pcrl", "unet"),           # the paper's "PRCL"
    "full": Row("train_ssl.py", "--method full"),
    "mpd": Row("train_ssl.py", "--method mpd"),
    "itd": Row("train_ssl.py", "--method itd"),
    "ml-mip": Row("train_ssl.py", "--method simmim --voxel_head multilayer"),
    "ml-smit": Row("train_ssl.py", "--method ml-smit"),
    "moco": Row("smit.baselines", "moco"),                   # contrastive losses
    "rotation": Row("smit.baselines", "rotation"),           # pseudo labels
}
FIGURE4 = ["full", "mpd", "itd", "ibot", "simmim", "ml-mip", "ml-smit", "moco", "rotation",
           "smit"]


class Preset(NamedTuple):
    """Sizes of all runs, as flags of the commands that train."""
    pretrain: str = ""                 # of train_ssl.py
    finetune: str = ""                 # of finetune.py
    baseline: str = ""                 # of smit.baselines
    unet: str = ""                     # of both, where the network is the U-Net


PRESETS = {
    # Single runs of the paper's sizes want GPUs and days. The two commands that pre-train have
    # other defaults of --batch (2 and 4 pairs), and an epoch would be twice as many steps in one
    # row as in another. 4 is the least that moco takes, and 16 GB hold it. [ours]
    "paper": Preset(pretrain="--batch 4", baseline="--batch 4"),
    # Two CPU cores: voxels of 6 mm carry the large organs, and cells of 24 mm take a network of
    # two stages. With cells of 48 mm MIP ended nearer to the visible median of each view. With
    # crops of 32^3, twice as many, random weights came to a Dice of .22 in place of .41: half an
    # abdomen must fit into one crop. The U-Net of width 8 has 0.3 M parameters, the
    # Swin network with its decoder 0.2 M. On a CPU bf16 is faster for the Swin encoder alone:
    # convolutions of so few channels are slower with it. [ours]
    "small": Preset(
        "--preset tiny --spacing 6 6 6 --embed_dim 16 --depths 2 4 --heads 2 4 "
        "--view 32 --crop 44 --mask_cell 4 --batch 8 --lr 4e-3 --steps 1200 "
        "--val_fraction .05 --val_every 300 --precision bf16 --workers 0",
        "--preset tiny --embed_dim 16 --depths 2 4 --heads 2 4 "
        "--crop 48 --crops_per_volume 1 --lr 4e-3 --steps 1200 --val_every 120 --workers 0",
        "--preset tiny --spacing 6 6 6 --embed_dim 16 --depths 2 4 --heads 2 4 "
        "--view 32 --crop 44 --batch 8 --lr 4e-3 --steps 1200 "
        "--val_fraction .05 --val_every 300 --precision bf16 --workers 0",
        unet="--width 8 --precision auto"),
}


# Ways to fine-tune, as flags of finetune.py, that the experiment `recipe` compares. They are steps
# from the preset "small"; --recipes takes others. [ours]
ORGANS_FIRST = "--background_weight .05 --dice_on organs"
RECIPES = {
    "as-it-is": "",
    "organs-first": ORGANS_FIRST,      # off the plateau of "all background" early
    "averaged": f"{ORGANS_FIRST} --average .99",
    "four-crops": f"{ORGANS_FIRST} --crops_per_volume 2",
    "no-warm-up": f"{ORGANS_FIRST} --warmup_epochs 0",
    "long-warm-up": f"{ORGANS_FIRST} --warmup_epochs 250",
    "clipped": f"{ORGANS_FIRST} --clip 1",
    "half-rate": f"{ORGANS_FIRST} --lr 2e-3",
    "twice-the-steps": f"{ORGANS_FIRST} --steps 2400",
}
RATIOS = [.1, .3, .5, .7, .9]          # of Fig. 3b [SMIT 3]
TRAINING_PARTS = 3                     # `recipe` holds back a third of the training split [ours]


class Experiment(NamedTuple):
    """A table or figure: its rows, and the rest that flags leave open."""
    rows: list
    labels: list                       # numbers of labelled volumes to fine-tune on
    draws: list = [None]               # seeds of the draw of these volumes; None: the run's own


EXPERIMENTS = {
    "table2": Experiment(TABLE2, [21]),
    "fig3a": Experiment(SWIN, [3, 7, 14, 21]),
    "fig3b": Experiment(["smit"], [21]),
    "fig3c": Experiment(SWIN, [21]),
    "fig4": Experiment(FIGURE4, [21]),
    "fig5": Experiment(["smit", "ml-smit"], []),
    "probe": Experiment(SWIN, [None]),           # all labelled volumes
    "recipe": Experiment(["rand"], [3], [0, 1]),
}
FROZEN = ("fig5", "probe")             # these look at pre-trained encoders without fine-tuning


class Step(NamedTuple):
    """One command with its flags. It writes the folder OUT/name, and prints to OUT/name.log."""
    name: str
    script: str                        # a file, or a module
    flags: list
    needs: tuple = ()                  # steps that must be finished before


class Cell(NamedTuple):
    """One score of the study: what tells it from the others, and the steps that lead to it."""
    row: str
    labels: int
    seed: int
    fold: int
    ratio: float
    modality: str
    draw: int
    recipe: str
    steps: list                        # (pre-train,) fine-tune, evaluate

    @property
    def folder(self):
        return self.steps[-1].name


def ratio_suffix(ratio):
    """Name the mask ratio in a step's name.

    The default of .7 has no name, so that Fig. 3b shares its runs with the other experiments.
    """
    return "" if ratio in (None, .7) else f"-mask{ratio:g}"


def parsed(parse, flags, source):
    """Parse a command's flags: what parse(flags) gives.

    source: the study's flag, or the step, that they come from. ValueError names it and says what
    is wrong, where the command by itself would show its usage and exit.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return parse(list(map(str, flags)))
    except SystemExit:
        reason = told.getvalue().rpartition("error: ")[2].strip()
    except ValueError as error:
        reason = error
    raise ValueError(f"{source}: {reason}")


def is_pretrained(args, row):
    """Tell whether the study pre-trains a row, which has no checkpoint and no random weights."""
    return row not in args.checkpoint and ROWS[row].script is not None


def pretraining_flags(args, row):
    """List the flags that a row's script pre-trains it with, but for its seed and data."""
    preset, (script, own, network) = PRESETS[args.preset], ROWS[row]
    if script == "train_ssl.py":
        flags = f"{preset.pretrain} {args.pretrain_flags} {own}"
    else:
        unet = preset.unet if network == "unet" else ""
        flags = f"{own} {preset.baseline} {unet} {args.baseline_flags}"
    return shlex.split(f"{flags} {args.row_flags.get(row, '')}")


def own_settings(args, row):
    """Parse the flags that pre-train a row of train_ssl.py, with its defaults."""
    return parsed(functools.partial(settings.parse_pretraining, ""), pretraining_flags(args, row),
                  f"--pretrain_flags, or --row_flags {row}")


def predicts_voxels(args, row):
    """Tell whether masked image prediction pre-trains a row, so that it has a voxel head."""
    return ROWS[row].script == "train_ssl.py" and own_settings(args, row).mip > 0


def pretraining(args, row, seed, ratio=None):
    """Plan the step that makes OUT/name/student.pt; None where there is nothing to pre-train."""
    if not is_pretrained(args, row):
        return None
    flags = pretraining_flags(args, row)
    if ratio_suffix(ratio):
        flags += ["--mask_ratio", ratio]
    flags += ["--seed", seed, "--data", *map(os.path.abspath, args.pretrain_data)]
    return Step(f"pretrain/{row}{ratio_suffix(ratio)}-seed{seed}", ROWS[row].script, flags)


def tuning_settings(args):
    """Parse the flags of fine-tuning that all rows share, with their defaults."""
    return parsed(functools.partial(settings.parse_finetuning, ""),
                  shlex.split(args.finetune_flags), "--finetune_flags")


def network_of(row):
    """Name a row's network: "swin", as of all that only a checkpoint knows, or "unet"."""
    return ROWS[row].network if row in ROWS else "swin"


def student_path(args, row, seed, step):
    """Name the student.pt that a row begins with; None for random weights.

    step: its pre-training, or None. A "{seed}" in the path of a given one stands for the seed.
    """
    if row in args.checkpoint:
        return args.checkpoint[row].replace("{seed}", str(seed))
    return f"{args.out}/{step.name}/student.pt" if step else None


def cell(args, row, labels, seed, fold=None, ratio=None, draw=None, recipe=None):
    """Plan one number of a table: pre-train, fine-tune, evaluate."""
    first = pretraining(args, row, seed, ratio)
    init = student_path(args, row, seed, first)
    data_path = os.path.abspath(args.data)
    name = f"{row}{ratio_suffix(ratio)}-{args.modality}{labels}-seed{seed}"
    for prefix, value in (("draw", draw), ("fold", fold), ("", recipe)):
        if value is not None:
            name += f"-{prefix}{value}"

    preset = PRESETS[args.preset]
    tune = shlex.split(preset.finetune)
    if network_of(row) == "unet":
        tune += ["--net", "unet", *shlex.split(preset.unet)]
    tune += shlex.split(args.finetune_flags)
    if network_of(row) == "unet":
        tune += shlex.split(args.unet_flags)
    if init:
        tune += shlex.split(args.init_flags)
    if recipe:
        tune += shlex.split(args.recipes[recipe])
    tune += ["--seed", seed, "--data", data_path, "--num_train", labels,
             "--modality", args.modality]
    if draw is not None:
        tune += ["--subset_seed", draw]
    if init:
        tune += ["--init", os.path.abspath(init)]
    if fold is not None:
        tune += ["--folds", folds_of(args)[0], "--fold", fold]

    # the last checkpoint, so that no score picks one
    weights = os.path.abspath(f"{args.out}/finetune/{name}/last.pt")
    score = ["--weights", weights, "--data", data_path, "--held_out"]
    if fold is not None:
        score += ["--key", "training"]
    asked = tuning_settings(args)
    if asked.data_root:
        score += ["--data_root", os.path.abspath(asked.data_root)]
    if asked.device != "auto":
        score += ["--device", asked.device]

    tuning = Step(f"finetune/{name}", "finetune.py", tune, (first,) if first else ())
    steps = [tuning, Step(f"evaluate/{name}", "evaluate.py", score, (tuning,))]
    if first:
        steps = [first, *steps]
    return Cell(row, labels, seed, fold, ratio, args.modality, draw, recipe, steps)


def folds_of(args):
    """Choose the parts of the training split: (how many, which of them are held back in turn).

    `recipe` holds back the first alone, in every run the same: a choice made on it has seen no
    volume of the validation split. (0, [None]): validate on the validation split.
    """
    if args.experiment == "recipe":
        return args.folds or TRAINING_PARTS, [0]
    return args.folds, range(args.folds) if args.folds else [None]


def labelled_volumes(args):
    """Choose the numbers of volumes to fine-tune on.

    Those that were asked for, or as many as every fold leaves, or the experiment's.
    """
    if args.labels:
        return args.labels
    if args.experiment == "recipe" or not args.folds:
        return EXPERIMENTS[args.experiment].labels
    cases = data.read_list(args.data, data_root=tuning_settings(args).data_root)
    return [min(len(fold_split(cases, fold, args.folds)[0]) for fold in range(args.folds))]


def ranked_rows(rows):
    """Sort rows as ROWS has them, then those that only a checkpoint knows."""
    known = [row for row in ROWS if row in rows]
    return known + [row for row in rows if row not in ROWS]


def plan(args):
    """List the cells of an experiment, the most telling first: rand, smit and simmim in every seed.

    Seeds follow each other; within a seed draws, then numbers of labels, then rows, and so on.
    """
    ranked = ranked_rows(args.rows)
    _, folds = folds_of(args)
    ratios = args.ratios if args.experiment == "fig3b" else [None]
    recipes = args.recipes if args.experiment == "recipe" else [None]
    cells = []
    for rows in (ranked[:3], ranked[3:]):
        choices = itertools.product(args.seeds, args.draws, labelled_volumes(args), rows, folds,
                                    ratios, recipes)
        for seed, draw, labels, row, fold, ratio, recipe in choices:
            cells.append(cell(args, row, labels, seed, fold, ratio, draw, recipe))
    return cells


def pretrainings(args):
    """Plan a pre-training for each row and seed without fine-tuning: {(row, seed): step or None}.

    None stands for a checkpoint that was given. Random weights are not in it.
    """
    steps = {}
    for row in args.rows:
        if row in args.checkpoint or ROWS[row].script:
            for seed in args.seeds:
                steps[row, seed] = pretraining(args, row, seed)
    return steps
