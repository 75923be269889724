"""Every setting of the three commands, a line each, with the source of its default.

This is the paper's "Implementation details" [SMIT 2, 3]. A tag says where a default comes from:
[SMIT n] a section of the paper, [release] the authors' code, [iBOT], [DINO] and the like a paper
that SMIT builds on, [ours] a choice of this project. Needs the standard library alone.

Reading order: shared flags, pre-training, fine-tuning, evaluation.
"""
import argparse
import math
import os
import sys

# Settings of a run that a resumed one may change: they choose no number that the run computes, but
# for the rounding of another device, or of checkpointing and compile. Volumes are known by their
# names, and may have moved.
FREE_ON_RESUME = {"preset", "out", "resume", "overwrite", "data", "data_root", "cache", "device",
                  "workers", "log_every", "checkpointing", "compile", "save_steps", "save_minutes"}
# What an older run's config lacks, or today's has dropped: their values then, so that it resumes.
BEFORE = {"data_root": None, "hu_offset": 0.0, "init": None}
SIZES = ("embed_dim", "depths", "heads", "window")   # pre-trained and fine-tuned encoder share them
UNET_SIZES = ("width",)                              # the same of the CNN columns' U-Net
PATCH = 2                                            # voxels per axis of the first tokens [SMIT 2]


# ------------------------------------------------------------------------ shared by the commands
class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the description as it was written, and each default that says something."""

    def _get_help_string(self, action):
        silent = str(action.default) in ("None", "False", "[]", "")
        return action.help if silent else super()._get_help_string(action)


def share(text):
    """argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0 and 1")
    return value


def count(text):
    """argparse type: a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return value


def rate(text):
    """argparse type: a number from 0 on, below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more, and below 1")
    return value


def whole(text):
    """argparse type: a whole number from 0 on, of 63 bits, as torch takes seeds."""
    value = int(text)
    if not 0 <= value < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more, and below 2^63")
    return value


def positive(text):
    """argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def not_negative(text):
    """argparse type: a finite number from 0 on."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return value


class Cube(argparse.Action):
    """Take one size for all three axes, or three."""

    def __call__(self, parser, namespace, values, option=None):
        if len(values) not in (1, 3):
            parser.error(f"{option} takes one number or three")
        setattr(namespace, self.dest, values * 3 if len(values) == 1 else values)


def require(condition, message):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


TAGS = """Tags such as [SMIT 2] say where a default comes from: [SMIT 2] is section 2 of the paper,
[release] the authors' code, [DINO], [nnU-Net] and the like are other papers, and [ours] is a choice
of this project.
"""


def new_parser(description):
    return argparse.ArgumentParser(description=description, formatter_class=Help,
                                   usage="%(prog)s [flags]", epilog=TAGS)


def add_run_flags(parser, out, presets):
    """Say where a training run writes, how often, and on what it runs."""
    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=presets, default="paper",
        help="paper: the paper's sizes; tiny: minutes on two CPU cores; other flags override it")
    add("--out", default=out, help="output folder [ours]")
    add("--resume", action="store_true", help="continue OUT/last.pt, if there is one")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--check", action="store_true",
        help="read all data, try their preparation, list everything that is wrong, and leave")
    add("--prepare_only", action="store_true",
        help="prepare all volumes into --cache, shared over ranks, and leave: no GPU waits later")
    add("--seed", type=whole, default=0, help="of all random numbers [ours]")
    add("--log_every", type=count, default=10, help="steps between rows of log.csv [ours]")
    add("--save_minutes", type=not_negative, default=10, help="minutes between checkpoints [ours]")
    add("--save_steps", type=whole, default=0,
        help="also save every so many steps; 0: never [ours]")
    add_device_flags(add)
    return add


def add_device_flags(add):
    """Say on what to run, and how precisely."""
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto: a GPU if there is one")
    add("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto",
        help="auto: bf16 where the card has it, else fp16; fp32 on CPU [ours]")


def add_data_flags(parser, what):
    """Say which volumes, and how they are prepared."""
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=[], metavar="PATH", help=f"{what}; without it, phantoms")
    add("--key", default="training", help="split to read from a dataset.json [MSD]")
    add("--data_root", metavar="DIR",
        help="folder of the files that lists name; default: the list's own [MONAI]")
    add("--modality", choices=["ct", "mr"], default="ct",
        help="ct [SMIT 3]: by the HU window [release]; mr: by percentiles [ours]")
    add("--spacing", nargs=3, type=float, default=[1.5, 1.5, 2.0], metavar="MM",
        help="voxel size [SMIT 3]")
    add("--hu_window", nargs=2, type=float, default=[-175.0, 250.0], metavar="HU",
        help="range that is mapped to [0, 1] [release]")
    add("--hu_offset", type=float, default=0.0, metavar="HU",
        help="added to stored values: -1024 for CT stored from 0 on [ours]")
    add("--cache", default="runs/cache", help="folder of prepared volumes, shared by runs [ours]")
    add("--phantoms", type=count, default=40,
        help="synthetic patients to make without --data [ours]")
    add("--workers", type=whole, default=4,
        help="loader processes a rank; 0 loads in the training process [ours]")
    return add


def add_encoder_flags(parser, drop_path):
    """Say the sizes of the Swin encoder."""
    add = parser.add_argument_group("network").add_argument
    # differs: the paper names Swin-small; these are the sizes of the release, and of its 28.19M
    add("--embed_dim", type=count, default=48,
        help="width of the first stage; 16 * 48 = 768 at the end [SMIT 2]")
    add("--depths", nargs="+", type=count, default=[2, 2, 4, 2], help="blocks per stage [release]")
    add("--heads", nargs="+", type=count, default=[4, 4, 4, 4],
        help="attention heads per stage [release]")
    add("--window", nargs=3, type=count, default=[4, 4, 4], help="tokens per axis [SMIT 2]")
    add("--drop_path", type=rate, default=drop_path,
        help="stochastic depth of the last block, rising to it from 0 [release: .3 to pre-train; "
             "ours: 0 to fine-tune]")
    add("--checkpointing", action="store_true",
        help="recompute blocks in backward: about half the memory, more time")
    add("--compile", action="store_true",
        help="on a GPU: torch.compile attention and MLP of each block; not for Volta [ours]")
    return add


def parse(parser, argv, presets, methods=None):
    """Parse twice: the first pass finds preset and method, whose values become the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if word not in ("-h", "--help")]
    first, _ = parser.parse_known_args(words)

    defaults = dict(presets[first.preset])
    if methods:
        defaults = methods["smit"] | defaults | methods[first.method]
    if {"epochs", "steps"} & typed(parser, argv, ("epochs", "steps")).keys() == {"epochs"}:
        defaults["steps"] = None                        # a preset's would win over typed epochs
    parser.set_defaults(**defaults)                     # so that --help shows them, too

    args = parser.parse_args(argv)
    if args.check and not args.data:
        parser.error("--check needs --data")
    if args.resume and args.overwrite:
        parser.error("--resume continues a run, --overwrite discards it: choose one")
    return args


def typed(parser, argv, names=SIZES):
    """List the flags of these names that were typed, no defaults: {name: value}."""
    # argparse sets no default where the attribute exists, so what stays None was not typed
    blank = argparse.Namespace(**dict.fromkeys(names))
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if word not in ("-h", "--help")]
    values = vars(parser.parse_args(words, blank))
    return {name: values[name] for name in names if values[name] is not None}


def check_overwrite(args):
    """Refuse an --overwrite that would delete the file that --init names."""
    if args.overwrite and args.init:
        out, init = os.path.realpath(args.out), os.path.realpath(args.init)
        require(os.path.commonpath([out, init]) != out,
                f"--init {args.init}: --overwrite would delete it; give another --out")


def check_sizes(args, sizes):
    """Refuse sizes that were typed and are not those of the encoder that --init names."""
    for name, size in args.sizes_given.items():
        require(size == sizes.get(name, size), f"--{name} {size}: the encoder of {args.init} has "
                                               f"{sizes.get(name)}; drop the flag")


def check_crop(args, sizes):
    """Refuse crops of fine-tuning that the network's last level would see as a single voxel."""
    patch = sizes.get("imported", {}).get("patch", PATCH)
    least = 8 if args.network == "unet" else patch * 2 ** (len(sizes["depths"]) - 1)
    require(max(args.crop) > least, f"--crop {args.crop}: the network's deepest level would have "
                                    f"one voxel, which no norm can scale; give more than {least}")


def preparation_warning(args, config):
    """Warn of an --init whose volumes, by its run's settings, were prepared otherwise; else ""."""
    names = ("spacing", "modality", "hu_window", "hu_offset")
    config = {"hu_offset": 0.0, **config} if config else {}
    if not any(name in config for name in names):
        return f"warning: {args.init} does not say how its volumes were prepared"
    differences = [f"{name} {getattr(args, name)} here, {config.get(name)} there"
                   for name in names if getattr(args, name) != config.get(name)]
    if not differences:
        return ""
    return (f"warning: {args.init} was trained on volumes prepared otherwise: "
            f"{'; '.join(differences)}")


# ------------------------------------------------------------------------------- train_ssl.py
PRETRAINING_PRESETS = {   # what differs from the flags' defaults
    "paper": {},
    # half the width, half the view and three stages, so that a view still has 6^3 cells
    "tiny": dict(spacing=[4.0, 4.0, 4.0], crop=[64] * 3, view=[48] * 3, mask_cell=8,
                 embed_dim=24, depths=[2, 2, 2], heads=[2, 4, 8], drop_path=0.0,
                 head_width=256, bottleneck=64, prototypes=256, steps=300, batch=3, lr=1e-3,
                 teacher_temp=[0.03, 0.03], workers=2, val_fraction=0.1, val_every=100,
                 monitor_every=10, phantoms=20),
}
METHODS = {   # loss weights of the rows of Table 2 and Fig. 4 on the Swin backbone
    "smit": dict(mip=1.0, mpd=0.1, itd=0.1),                              # [SMIT 2]
    "simmim": dict(mip=1.0, mpd=0.0, itd=0.0),                            # MIP alone [18]
    "ibot": dict(mip=0.0, mpd=1.0, itd=1.0),                              # MPD + ITD [19]
    "dino": dict(mip=0.0, mpd=0.0, itd=1.0, mask_ratio=0.0),              # two global views [24]
    "mpd": dict(mip=0.0, mpd=1.0, itd=0.0),
    "itd": dict(mip=0.0, mpd=0.0, itd=1.0),
    "full": dict(mip=1.0, mpd=0.0, itd=0.0, mask_ratio=0.0, mip_on="all"),  # the whole image
    "ml-smit": dict(mip=1.0, mpd=0.1, itd=0.1, voxel_head="multilayer"),  # Fig. 5's decoder
}
PRETRAINING_FREE = FREE_ON_RESUME | {"method", "max_bad", "batch", "accumulate", "val_every",
                                     "monitor_every"}


PRETRAINING_BEFORE = {**BEFORE, "contrast": 0.0, "monitor_every": 10, "val_volumes": 200}


def parse_pretraining(description, argv=None):
    """Parse the flags of train_ssl.py."""
    parser = new_parser(description)
    add = add_run_flags(parser, "runs/ssl", PRETRAINING_PRESETS)
    add("--method", choices=METHODS, default="smit",
        help="a row of the paper's comparisons: its loss weights; dino and full mask nothing, full "
             "counts MIP on all voxels, ml-smit has the multi-layer decoder")
    add("--val_every", type=count, default=1000,
        help="steps between measurements on held-back volumes [ours]")
    add("--monitor_every", type=count, default=50,
        help="steps between the signs of collapse in log.csv [ours]")

    add = add_data_flags(parser, "folders of NIfTI, dataset.json files, text lists")
    add("--crop", nargs="+", type=count, action=Cube, default=[128] * 3,
        help="voxels per axis of the crop that holds both views [SMIT 3]")
    add("--view", nargs="+", type=count, action=Cube, default=[96] * 3,
        help="voxels per axis of a view [SMIT 3]")
    add("--val_fraction", type=share, default=0.05,
        help="share of the volumes held back to measure MIP [ours]")
    add("--val_volumes", type=count, default=200,
        help="of them, measure this many at most [ours]")
    add("--max_bad", type=whole, default=0,
        help="unreadable volumes to skip before giving up; those held back are counted apart "
             "[ours]")

    add = parser.add_argument_group("losses").add_argument
    add("--mip", type=not_negative,
        help="weight of masked image prediction [SMIT 2]; 0 skips it")
    add("--mpd", type=not_negative,
        help="lambda_MPD, weight of masked patch token distillation [SMIT 2]; 0 skips it")
    add("--itd", type=not_negative,
        help="lambda_ITD, weight of image token distillation [SMIT 2]; 0 skips it")
    add("--mask_ratio", type=share, default=0.7,
        help="share of cells hidden from the student [SMIT 2]")
    add("--mask_cell", type=count, default=16,
        help="voxels per axis of a cell, 6^3 of them in 96^3 [SMIT 3]")
    add("--mip_on", choices=["hidden", "all"], default="hidden",
        help="voxels that MIP counts [SMIT Eq. 1]")
    add("--student_temp", type=positive, default=0.1, help="tau_s [SMIT 2]")
    add("--teacher_temp", nargs=2, type=positive, default=[0.04, 0.07],
        help="tau_t before and after its warm-up [SMIT 2]")
    add("--momentum", type=share, default=0.996,
        help="lambda_m of the teacher; rises to 1 along a cosine [SMIT 2]")
    add("--center_momentum", type=share, default=0.9, help="of the centring of the teacher [DINO]")

    add = add_encoder_flags(parser, drop_path=0.3)
    add("--init", metavar="PATH",
        help="begin with the weights of a student.pt, a last.pt (teacher, heads and centres, too) "
             "or an encoder that smit.weights reads; without it, random [ours]")
    add("--voxel_head", choices=["linear", "multilayer"], default="linear",
        help="h^Pred [SMIT 2]; multilayer: the ablation's")
    add("--shared_head", action="store_true",
        help="one head for patches and image [iBOT]; the paper has two")
    add("--head_width", type=count, default=2048,
        help="hidden width of the projection heads [DINO]")
    add("--bottleneck", type=count, default=256, help="their width before the prototypes [DINO]")
    add("--prototypes", type=count, default=8192, help="K, their outputs [iBOT]")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, default=400, help="passes over the volumes [SMIT 2]")
    add("--steps", type=count,
        help="optimiser steps, in place of --epochs; warm-ups keep their share")
    add("--warmup_epochs", type=not_negative, default=30,
        help="of learning rate and teacher temperature [SMIT 2]")
    add("--batch", type=count, default=2,
        help="pairs of views a rank and micro-batch; 2 need some 3.5 GB, by count [ours]")
    add("--accumulate", type=count, default=1, help="micro-batches per optimiser step [ours]")
    add("--lr", type=not_negative, default=2e-4, help="peak learning rate of AdamW [SMIT 2]")
    add("--weight_decay", type=not_negative, default=0.01,
        help="[release]; on matrices only [ours]")
    add("--clip", type=not_negative, default=3.0,
        help="largest gradient norm [DINO]; 0 clips nothing")
    sizes = typed(parser, argv)
    args = parse(parser, argv, PRETRAINING_PRESETS, METHODS)
    args.sizes_given = sizes
    return args


def patch_token(args):
    """Voxels per axis of the tokens that MPD and ITD distil: 16 with four stages."""
    return PATCH * 2 ** (len(args.depths) - 1)


def check_pretraining(args):
    """Refuse settings that do not fit each other, before any work is done."""
    check_overwrite(args)
    view, cell, token = args.view, args.mask_cell, patch_token(args)
    require(all(side % (2 * token) == 0 for side in view),
            f"--view {view} must be a multiple of {2 * token}, a token of the last merge")
    require(all(side <= limit for side, limit in zip(view, args.crop)),
            f"--view {view} is larger than --crop {args.crop}")
    require(all(side % cell == 0 for side in view) and cell % PATCH == 0,
            f"--mask_cell {cell} must be a multiple of {PATCH} and divide --view {view}")

    require(args.mip or args.mpd or args.itd, "all loss weights are 0: nothing to learn")
    require(not args.mpd or cell % token == 0,
            f"--mask_cell {cell} must be a multiple of {token}, a patch token, for MPD")
    require(not args.mpd or args.mask_ratio,
            "--mpd needs hidden tokens: a --mask_ratio above 0, or --mpd 0")
    require(not args.mip or args.mip_on == "all" or args.mask_ratio,
            "--mip needs hidden voxels: a --mask_ratio above 0, or --mip_on all")
    require(not args.shared_head or (args.mpd and args.itd),
            "--shared_head shares a head between MPD and ITD: use both")
    check_warmup(args)


def check_warmup(args):
    """Refuse a warm-up that never ends: the rate would only rise."""
    require(args.warmup_epochs < args.epochs,
            f"--warmup_epochs {args.warmup_epochs:g} must be fewer than --epochs {args.epochs}")


# -------------------------------------------------------------------------------- finetune.py
FINETUNING_PRESETS = {   # what differs from the flags' defaults
    "paper": {},
    # coarser than pre-training's tiny: a crop of 48^3 must hold whole organs to learn in minutes
    "tiny": dict(spacing=[6.0, 6.0, 6.0], crop=[48] * 3, embed_dim=24, depths=[2, 2, 2],
                 heads=[2, 4, 8], width=16, steps=1000, batch=2, crops_per_volume=2,
                 lr=1.5e-3, clip=3.0,
                 workers=1, phantoms=20),
}
FINETUNING_FREE = FREE_ON_RESUME | {"batch"}
FINETUNING_BEFORE = {**BEFORE, "subset_seed": None, "background_weight": 1.0, "dice_on": "all",
                     "average": 0.0, "network": "swin", "encoder_only": False}
SPLITS = ("smit21_9", "monai24_6")   # of BTCV; the numbers are in smit/data/samples.py


def parse_finetuning(description, argv=None):
    """Parse the flags of finetune.py; args.sizes_given holds the encoder sizes that were typed."""
    parser = new_parser(description)
    add = add_run_flags(parser, "runs/finetune", FINETUNING_PRESETS)
    add("--val_every", type=positive, default=30, help="epochs between validations [release]")

    add = add_data_flags(parser, "dataset.json files, text lists")
    add("--val_key", default="validation",
        help="split to validate on [MSD]; where a list lacks it, --val_fraction of --key")
    add("--val_fraction", type=share, default=0.1,
        help="share of --key held back to validate on [ours]")
    add("--split", choices=SPLITS,
        help="BTCV: hold back a published split's cases, by their numbers")
    add("--fold", type=int,
        help="hold back this of --folds parts of --key, counted from 0; --val_key is not touched")
    add("--folds", type=count, default=5,
        help="parts of a shuffle with seed 12345 [SMIT 3; nnU-Net]")
    add("--num_train", type=count,
        help="train on the first n of a shuffle, alike for all methods [ours]")
    add("--subset_seed", type=whole, help="of that shuffle; default: --seed [ours]")
    add("--crop", nargs="+", type=count, action=Cube, default=[96] * 3,
        help="voxels per axis of a crop, and of a window later [release]")
    add("--crops_per_volume", type=count, default=4,
        help="crops that a volume gives a step [release]")
    add("--num_classes", type=int,
        help="with the background; default: as the JSON's labels say, else 14 [SMIT 3]")

    add = add_encoder_flags(parser, drop_path=0.0)
    add("--net", dest="network", choices=["swin", "unet"], default="swin",
        help="unet: the network of the paper's CNN columns, for weights of smit.baselines")
    add("--width", type=count, default=64, help="unet: channels of its first level [MG, PCRL]")
    add("--encoder_only", action="store_true",
        help="unet: leave the decoder random, where --init has it too [MG loads both]")
    add("--init", metavar="PATH",
        help="student.pt or last.pt of train_ssl.py [SMIT 3], or an encoder that smit.weights "
             "reads, as MONAI's model_swinvit.pt; without it, random weights")
    add("--weights", choices=["student", "teacher"], default="student",
        help="which network of a last.pt [SMIT 2]")
    add("--partial_init", action="store_true",
        help="load what fits of a student's --init, in place of refusing what does not")
    add("--freeze_encoder", action="store_true", help="train the decoder alone [ours]")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, default=1000, help="passes over the volumes [ours]")
    add("--steps", type=count,
        help="optimiser steps, in place of --epochs; the warm-up keeps its share")
    add("--warmup_epochs", type=not_negative, default=50, help="of the learning rate [release]")
    add("--batch", type=count, default=1, help="volumes a rank and step [release]")
    add("--lr", type=not_negative, default=1e-4, help="peak learning rate of AdamW [release]")
    add("--layer_decay", type=positive, default=1.0,
        help="factor on it per encoder block downwards [BEiT]; 1: none")
    add("--weight_decay", type=not_negative, default=1e-5, help="on all parameters [release]")
    add("--clip", type=not_negative, default=0.0,
        help="largest gradient norm; 0 clips nothing [release]")

    add("--background_weight", type=positive, default=1.0,
        help="of the background's voxels in the cross-entropy [release]")
    add("--dice_on", choices=["all", "organs"], default="all",
        help="classes whose Dice counts in the loss [release]")
    add("--average", type=share, default=0.0,
        help="momentum of an average of the weights, validated and saved in their place [ours]; "
             "0: none")

    sizes = typed(parser, argv, SIZES + UNET_SIZES)
    args = parse(parser, argv, FINETUNING_PRESETS)
    args.sizes_given = sizes
    return args


def check_finetuning(args):
    """Refuse settings that do not fit each other, before any work is done."""
    check_overwrite(args)
    require(min(args.crop) >= 8, f"--crop {args.crop}: a side of 8 voxels is the least")
    require(args.fold is None or not args.split,
            "--fold and --split both choose what is held back: give one")
    require(args.fold is None or args.fold >= 0, f"--fold {args.fold} is counted from 0")
    require(not (args.compile and args.network == "unet"), "--compile is for the Swin network")
    require(args.layer_decay <= 1, f"--layer_decay {args.layer_decay} is above 1, which is none")
    require(args.network == "swin" or all(side % 8 == 0 for side in args.crop),
            f"--crop {args.crop} must be multiples of 8 for the U-Net")
    require(args.network == "unet" or not args.encoder_only,
            "--encoder_only is of --net unet: of a Swin network only the encoder is loaded")
    check_warmup(args)
    require(args.init or not args.freeze_encoder,
            "--freeze_encoder without --init would freeze random weights")
    require(args.num_classes is None or 2 <= args.num_classes <= 256,
            f"--num_classes {args.num_classes} is not one of 2..256")


# -------------------------------------------------------------------------------- evaluate.py
def parse_evaluation(description, argv=None):
    """Parse the flags of evaluate.py."""
    parser = new_parser(description)
    parser.add_argument("--out", default="runs/evaluate", help="output folder [ours]")

    add = parser.add_argument_group("predict").add_argument
    add("--weights", nargs="+", metavar="PATH",
        help="best.pt of finetune.py: predict with it, or with several, whose softmax is averaged")
    add("--data", nargs="+", default=[], metavar="PATH",
        help="NIfTI files, folders, text lists, dataset.json files")
    add("--key", default="validation", help="split to read from a dataset.json [MSD]")
    add("--data_root", metavar="DIR",
        help="folder of the files that lists name; default: the list's own [MONAI]")
    add("--held_out", action="store_true",
        help="of --data, only the cases that --weights was validated on")
    add("--check", action="store_true",
        help="read all data, try their preparation, list everything that is wrong, and leave")
    add("--overlap", type=float, default=0.5,
        help="share of a window that the next one covers too [SMIT 3]")
    add("--blend", choices=["gaussian", "constant"], default="gaussian",
        help="weights within a window [nnU-Net]; constant [release]")
    add("--tta", action="store_true",
        help="average the logits over the axial turns used in training [ours]")
    add("--export_test", metavar="DIR",
        help="write label0061.nii.gz for img0061.nii.gz there too, in BTCV's numbers")
    add("--batch", type=count, default=4, help="windows at a time [ours]")
    add("--stitch_on_cpu", action="store_true", help="keep whole volumes off the GPU [ours]")
    add_device_flags(add)

    add = parser.add_argument_group("score").add_argument
    add("--predictions", metavar="DIR",
        help="score these files, {case}.nii.gz, in place of predicting")
    add("--labels", metavar="PATH",
        help="folder or dataset.json (its --key, --data_root) with the labels of --predictions")
    add("--names", metavar="JSON",
        help="dataset.json that names the numbers of a side that has no names of its own")
    add("--tolerance_mm", type=not_negative, default=2.0, help="of the surface Dice [ours]")
    add("--compare", nargs=2, metavar="DIR",
        help="two result folders: paired tests of their Dice, first - second")

    args = parser.parse_args(argv)
    tasks = [task for task in (args.weights, args.predictions, args.compare) if task]
    if len(tasks) != 1:
        parser.error("give one of --weights (with --data), --predictions (with --labels) "
                     "and --compare")
    for flag in ("held_out", "tta", "export_test"):
        if getattr(args, flag) and not args.weights:
            parser.error(f"--{flag} is of predicting with --weights; drop it")
    if args.check and not args.weights:
        parser.error("--check needs --data and --weights, which tell how volumes are prepared")
    if args.weights and not args.data or args.predictions and not args.labels:
        parser.error("--weights needs --data, and --predictions needs --labels")
    if not 0 <= args.overlap < 1:
        parser.error("--overlap lies in [0, 1)")
    return args
