"""Pre-train another column of the paper's comparisons [SMIT Table 2, Fig. 4].

    python -m smit.baselines genesis --preset tiny                       # phantoms, two CPU cores
    torchrun --nproc_per_node=4 -m smit.baselines pcrl --data imagesTr   # the paper's data settings
    python finetune.py --data dataset.json --net unet --init runs/pcrl/student.pt

Tasks: genesis (MG), rubik (Cub++), cpc (CPC) and pcrl (PRCL) train a 3-D U-Net; moco (contrastive
losses) and rotation (pseudo labels) train the Swin encoder. All see the view pairs that SMIT sees.
Writes OUT/last.pt (everything; --resume goes on from it), OUT/student.pt (what fine-tuning takes
over), OUT/log.csv, OUT/config.json and OUT/index.html (pictures).
"""
import json
import math
from collections import Counter
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from smit import data, ema, figures, phantom, runtime, settings, weights
from smit.baselines.cpc import CPC
from smit.baselines.genesis import Genesis
from smit.baselines.moco import MoCo
from smit.baselines.panel import restoration_panel
from smit.baselines.pcrl import PCRL
from smit.baselines.rotation import Rotation
from smit.baselines.rubik import Rubik
from smit.data import samples
from smit.runtime import progress
from smit.settings import Cube, count, not_negative, require, share

TASKS = {   # name: the task, and the flags that it takes
    "genesis": (Genesis, ["width"]),
    "rubik": (Rubik, ["width", "adversarial"]),
    "cpc": (CPC, ["width", "patch", "view"]),
    "pcrl": (PCRL, ["width", "queue"]),
    "moco": (MoCo, ["encoder", "head_width", "bottleneck"]),
    "rotation": (Rotation, ["encoder"]),
}
PRESETS = {   # what differs from the flags' defaults
    "paper": {},
    "tiny": dict(spacing=[4.0, 4.0, 4.0], crop=[64] * 3, view=[48] * 3, width=16, patch=16,
                 queue=512, embed_dim=24, depths=[2, 2, 2], heads=[2, 4, 8], drop_path=0.0,
                 head_width=256, bottleneck=64, steps=300, batch=4, lr=1e-3, workers=2,
                 val_fraction=0.2, val_every=100, phantoms=20),
}
# --batch and --accumulate are not free here: a contrast's negatives are the micro-batch
FREE = settings.FREE_ON_RESUME | {"max_bad", "val_every"}
OUT = "runs/TASK"                      # the task's own folder, as --help shows it


# ----------------------------------------------------------------------------------- settings
def parse_arguments(argv=None):
    parser = settings.new_parser(__doc__)
    parser.prog, parser.usage = "python -m smit.baselines", "%(prog)s TASK [flags]"
    # "?", or --help alone would be refused
    parser.add_argument("task", nargs="?", choices=TASKS, help="the pretext task")
    add = settings.add_run_flags(parser, OUT, PRESETS)
    add("--val_every", type=count, default=1000,
        help="steps between measurements on held-back volumes [ours]")

    add = settings.add_data_flags(parser, "folders of NIfTI, dataset.json files, text lists")
    add("--crop", nargs="+", type=count, action=Cube, default=[128] * 3,
        help="voxels per axis of the crop that holds both views [SMIT 3]")
    add("--view", nargs="+", type=count, action=Cube, default=[96] * 3,
        help="voxels per axis of a view [SMIT 3]")
    add("--val_fraction", type=share, default=0.05,
        help="share of the volumes held back to measure the loss [ours]")
    add("--max_bad", type=settings.whole, default=0,
        help="unreadable volumes to skip before giving up; those held back are counted apart "
             "[ours]")

    add = parser.add_argument_group("U-Net").add_argument
    add("--width", type=count, default=64, help="channels of its first level [MG, PCRL]")
    add("--adversarial", type=not_negative, default=0.01,
        help="rubik: weight of the adversarial loss [ours]; 0: no critic")
    add("--patch", type=count, default=32, help="cpc: voxels per axis of a patch [CPC]")
    add("--queue", type=count, default=16384, help="pcrl: keys that are kept [PCRL]")

    add = settings.add_encoder_flags(parser, drop_path=0.3)
    add("--head_width", type=count, default=2048, help="moco: hidden width of its heads [DINO]")
    add("--bottleneck", type=count, default=256, help="moco: channels of an embedding [DINO]")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, default=400, help="passes over the volumes [SMIT 2]")
    add("--steps", type=count,
        help="optimiser steps, in place of --epochs; the warm-up keeps its share")
    add("--warmup_epochs", type=not_negative, default=30, help="of the learning rate [SMIT 2]")
    add("--batch", type=count, default=4,
        help="volumes, so pairs of views, a rank and micro-batch [ours]")
    add("--accumulate", type=count, default=1, help="micro-batches per optimiser step [ours]")
    # differs: the released codes use SGD at 1 (MG) and 1e-3 (PCRL), and Adam at 1e-4 (CPC)
    add("--lr", type=not_negative, default=2e-4, help="peak learning rate of AdamW [SMIT 2]")
    add("--weight_decay", type=not_negative, default=0.01, help="on matrices only, as for SMIT")
    add("--clip", type=not_negative, default=3.0,
        help="largest gradient norm, as for SMIT; 0 clips nothing")

    args = settings.parse(parser, argv, PRESETS)
    if args.task is None:
        parser.error(f"name a TASK: {', '.join(TASKS)}")
    if args.out == OUT:
        args.out = f"runs/{args.task}"
    return args


def check_settings(args):
    """Refuse settings that do not fit each other, before any work is done."""
    view, task = args.view, args.task
    network = TASKS[task][0].network
    require(all(side <= limit for side, limit in zip(view, args.crop)),
            f"--view {view} is larger than --crop {args.crop}")
    if network == "unet":
        require(all(side % 8 == 0 and side >= 16 for side in view),
                f"--view {view} must be multiples of 8, from 16 on")
    else:
        token = 2 * settings.patch_token(args)
        require(all(side % token == 0 for side in view),
                f"--view {view} must be a multiple of {token}")

    if task == "rubik":
        require(view == [view[0]] * 3, f"--view {view} must have equal sides to be twisted")
    if task in ("pcrl", "rotation"):
        require(view[0] == view[1],
                f"--view {view}: the first two sides must be equal to be turned")
    if task == "cpc":
        require(args.patch % 8 == 0 and args.patch >= 16,
                f"--patch {args.patch} must be a multiple of 8, from 16 on")
        require(all(side % (args.patch // 2) == 0 and side >= 1.5 * args.patch for side in view),
                f"--view {view} must be multiples of half a --patch of {args.patch}, from three "
                "halves on")
        *across, rows = (2 * side // args.patch - 1 for side in view)       # patches of an axis
        require(rows // 2 <= min(across),
                f"--view {view}: its last side is too long for the others, beyond which a column's "
                "context would reach")
    if task == "pcrl":
        require(args.batch >= 2, "pcrl mixes each volume with another: --batch 2 or more")
    if task == "moco":
        require(args.batch >= 4, "moco's negatives are the micro-batch: --batch 4 or more")
    for flag in ("compile", "checkpointing"):
        require(not getattr(args, flag) or TASKS[task][0].network == "swin",
                f"--{flag} is for the tasks on the Swin network")
    settings.check_warmup(args)


# --------------------------------------------------------------------------------------- data
def load_cases(args, ranks):
    """Find the volumes of all sources, or make phantoms: (to train on, held back, bad).

    bad: how many were left out for their headers; they count against --max_bad.
    """
    sources = args.data or phantom.default_data(args.cache, args.phantoms, args.modality,
                                                args.seed, args.spacing, ranks)
    cases, problems = data.read_lists(sources, args.key, args.data_root, args.modality)
    cases, bad = data.readable_cases(cases, args.max_bad, problems=problems, workers=args.workers,
                                     ranks=ranks)

    n_held_back = round(args.val_fraction * len(cases))
    require(n_held_back < len(cases),
            f"--val_fraction {args.val_fraction} of {len(cases)} volumes leaves none to train on")
    per_step = args.batch * ranks.world
    if args.val_fraction and n_held_back < per_step:
        data.note(f"no val_loss: it is measured on whole batches of {per_step} held-back volumes, "
                  f"and there are {n_held_back}; a larger --val_fraction holds more back")
    return *samples.random_split(cases, n_held_back, args.seed), bad


class TaskSamples(torch.utils.data.Dataset):
    """Sample number -> what a task makes of the two views that SMIT would see."""

    def __init__(self, args, task, cases, split="train"):
        self.cases, self.task, self.seed, self.split = cases, task, args.seed, split
        # one cell for the whole view, and never hidden: masks are SMIT's alone
        self.pairs = samples.ViewPairs(cases, data.preparation_of(args), args.cache, args.crop,
                                       args.view, cell=min(args.view), mask_ratio=0,
                                       seed=args.seed, split=split)

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, sample):
        pair = self.pairs[sample]
        if isinstance(pair, Exception):
            return pair                                 # `load_batches` raises it
        rng = samples.generator(self.seed, "task", self.split, sample)
        sample = self.task.samples(pair["views"] / 255, rng)
        for name in ("volume", "passed_over", "skipped", "concerns"):
            sample[name] = pair[name]
        return sample

    def sample(self, number):
        """Return a sample, or raise the error that stands in its place."""
        sample = self[number]
        if isinstance(sample, Exception):
            raise sample
        return sample

    def images(self, batch):
        return self.pairs.images(batch)


def on_device(batch, device):
    """Move a batch's tensors; its lists stay."""
    moved = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            value = value.to(device, non_blocking=True)
        moved[name] = value
    return moved


# ---------------------------------------------------------------------------- task, optimiser
def build_task(args):
    """Build the task that the settings describe, from torch's global generator."""
    torch.manual_seed(args.seed)
    task, flags = TASKS[args.task]
    sizes = ("embed_dim", "depths", "heads", "window", "drop_path", "checkpointing")
    values = vars(args) | {"encoder": {name: getattr(args, name) for name in sizes}}
    return task(**{flag: values[flag] for flag in flags})


def build_optimizer(task, args):
    """Build AdamW. Matrices and kernels decay; biases, norms and bias tables do not."""
    matrices, others = [], []
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue                                    # a teacher's
        is_matrix = parameter.ndim >= 2 and "bias_table" not in name
        (matrices if is_matrix else others).append(parameter)
    groups = [dict(params=matrices, weight_decay=args.weight_decay),
              dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=args.lr, fused=True)


@torch.no_grad()
def held_back_loss(args, task, val_samples, precision, ranks):
    """Measure the task's goal on whole micro-batches of held-back volumes: {} if they fill none."""
    per_step = args.batch * ranks.world
    whole = len(val_samples) // per_step * per_step
    if not whole:
        return {}
    numbers = samples.micro_batches(0, whole, args.batch, ranks.rank, ranks.world)
    loader = samples.Batches(val_samples, numbers, ranks, args.workers, args.max_bad)

    task.eval()
    totals = []
    for batch in loader:
        with precision.autocast():
            terms = task(on_device(batch, ranks.device))
        totals.append(sum(terms[name] for name in task.goal or terms).item())
    task.train()
    task.discard()
    loader.check_bad()
    return ranks.mean_of({"val_loss": sum(totals) / len(totals)})


@torch.no_grad()
def report(out, config, task, sample, precision):
    """Write OUT/restoration.svg, if the task restores anything, and OUT/index.html."""
    batch = on_device(samples.collate([sample]), precision.device)
    task.eval()
    with precision.autocast():
        volumes = task.restore(batch)
    task.train()
    if volumes:
        disturbed, restored, target = (volume[0, 0].float().cpu() for volume in volumes)
        restoration_panel(out / "restoration.svg", disturbed, restored, target, config["spacing"])
    figures.run_page(out, config, f"Pre-training, {config['task']}", ["step", "loss"])


# ----------------------------------------------------------------------------------- training
def train(args, ranks, out):
    # ---------------------------------------------------------------------------------- data
    cases, held_back, bad = load_cases(args, ranks)
    per_step = args.batch * args.accumulate * ranks.world
    total = args.steps or math.ceil(args.epochs * len(cases) / per_step)
    warmup = total * args.warmup_epochs / args.epochs

    # ------------------------------------------------------------------------ task, optimiser
    task = build_task(args).to(ranks.device)
    if args.compile:
        task.encoder.compile_blocks()
    optimizer = build_optimizer(task, args)
    precision = runtime.Precision(args.precision, ranks.device)

    train_samples = TaskSamples(args, task, cases)
    val_samples = TaskSamples(args, task, held_back, split="val")
    shown = val_samples if held_back else TaskSamples(args, task, cases, split="val")

    # ----------------------------------------------------------------------- resume, outputs
    config = {**vars(args), "network": task.network, "global_batch": per_step, "total": total,
              "volumes": len(cases), "volume_list": samples.list_digest(cases + held_back),
              "precision": precision.name, "format": weights.FORMAT}
    state = dict(task=task, optimizer=optimizer, scaler=precision.scaler)
    resumed = runtime.resume(out, state, config, FREE, ranks)
    step, skips = resumed["step"], progress.Skips(resumed["skipped"])
    if ranks.is_main:
        runtime.atomic_write(out / "config.json", json.dumps(config, indent=1).encode())
        print(f"{args.task}: {len(cases)} volumes and {len(held_back)} held back; "
              f"steps {step} to {total} of {args.batch} pairs x {args.accumulate} micro-batches "
              f"x {ranks.world} ranks = {per_step} pairs; {runtime.describe_memory(task)}; "
              f"{ranks.device.type}, {precision.name}", flush=True)

    # find_unused_parameters: as in train_ssl.py, for a resumed run's sake
    wrapped = task
    if ranks.world > 1:
        wrapped = DistributedDataParallel(task, find_unused_parameters=True)
    numbers = samples.micro_batches(step * per_step, total * per_step, args.batch, ranks.rank,
                                    ranks.world)
    loader = samples.Batches(train_samples, numbers, ranks, args.workers, args.max_bad, bad,
                             args.accumulate)
    columns = ["step", "epoch", "lr", "loss", *task.terms, "grad_norm", "skipped", "val_loss"]
    log = runtime.CsvLog(out / "log.csv", columns, ranks, step)
    bar = progress.Progress(step, total, 2 * per_step, ranks)
    clock = progress.SaveClock(args.save_minutes, args.save_steps, total)
    stop = runtime.StopSignals(ranks)

    def measures(step):
        """Tell whether the held-back volumes are measured after a step."""
        return bool(held_back) and (step == total or step % args.val_every == 0)

    # ------------------------------------------------------------------------------ training
    while step < total:
        lr = ema.warmup_cosine(step + 0.5, warmup, total, args.lr)      # the middle of this step
        for group in optimizer.param_groups:
            group["lr"] = lr

        optimizer.zero_grad()
        means, volumes = Counter(), []
        for micro in range(args.accumulate):
            batch = next(loader)
            volumes += train_samples.images(batch)
            wrapped.require_backward_grad_sync = micro == args.accumulate - 1       # for DDP
            with precision.autocast():
                terms = wrapped(on_device(batch, ranks.device))
            terms["loss"] = sum(terms.values())
            precision.scaler.scale(terms["loss"] / args.accumulate).backward()
            for name, term in terms.items():
                means[name] += term.detach() / args.accumulate

        precision.scaler.unscale_(optimizer)
        norms = []
        for parameters in task.clip_groups():
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf))
        norms = torch.stack(norms)
        finite = bool(norms.isfinite().all())       # alike on all ranks: gradients are their mean
        if finite:
            precision.scaler.step(optimizer)
            task.after_step(step / max(total - 1, 1))
        else:
            task.discard()
        precision.scaler.update()
        step += 1

        # ------------------------------------------------------------ log, show, stop, save
        skips.count(finite, step, means, volumes, ranks)
        bar.advance()
        last, look = step == total, step % args.val_every == 0
        if last or look or step % args.log_every == 0:
            row = ranks.mean_of({**means, "grad_norm": norms[0]})
            if measures(step):
                row |= held_back_loss(args, task, val_samples, precision, ranks)
            epoch = step * per_step / len(cases)
            log.row(step=step, epoch=epoch, lr=lr, skipped=skips.total, **row)
            bar.tell(epoch, loss=row["loss"])
        if ranks.is_main and (last or look or step == 1):
            report(out, config, task, shown.sample(0), precision)

        # was any rank asked to stop, did a loader fail, are more volumes bad than --max_bad?
        leaving = loader.agree(stop.asked)
        # before a measurement, too: it may take long or fail
        if ranks.is_main and (leaving or clock.due(step) or measures(step + 1)):
            # student.pt first: a resume trusts last.pt
            student_state = {"model": task.transferred(), "config": config, "step": step}
            runtime.save_checkpoint(out / "student.pt", student_state)
            runtime.save_state(out / "last.pt", state, step=step, samples=step * per_step,
                               skipped=skips.total, config=config)
            clock.reset()
        if leaving:
            break
    bar.close(f"weights in {out / 'student.pt'}")
    loader.raise_failure()


def check(args):
    """Read and prepare every volume of --data; ValueError names all that is wrong."""
    cases, problems = data.read_lists(args.data, args.key, args.data_root, args.modality)
    data.check_voxels(cases, data.preparation_of(args), problems=problems, workers=args.workers)
    print(f"checked: {data.count(len(cases), 'volume')}, {data.verdict()}")


def main(args):
    check_settings(args)
    if args.check:
        return check(args) if runtime.is_first() else None
    ranks = runtime.start(args.device)
    if args.prepare_only:
        cases, held_back, _ = load_cases(args, ranks)
        data.prepare_ahead(cases + held_back, data.preparation_of(args), args.cache, ranks,
                           args.workers)
        return
    with runtime.OutputFolder(Path(args.out), ranks, args.resume, args.overwrite) as out:
        train(args, ranks, out)


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
