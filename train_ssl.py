"""Pre-train SMIT on unlabelled volumes [SMIT 2].

    python train_ssl.py --preset tiny                                             # phantoms, two CPU cores, minutes
    torchrun --nproc_per_node=4 train_ssl.py --data imagesTr dataset.json         # the paper's settings, 4 x V100
    torchrun --nproc_per_node=4 train_ssl.py --data imagesTr --method simmim      # a column of Table 2

Writes OUT/last.pt (everything; --resume goes on from it), OUT/student.pt (weights for finetune.py and for others),
OUT/log.csv (the losses as back-propagated, and the signs of collapse), OUT/config.json and OUT/index.html (pictures).
"""
import argparse
import collections
import contextlib
import functools
import json
import math
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from smit import data, ema, figures, flags, losses, phantom, pretrain, runtime
from smit.data import samples as sampling
from smit.masking import expand_mask

MAX_STRIKES = 20  # steps in a row without a finite gradient; fp16's loss scaling alone takes a few at the start [ours]
COLUMNS = """step epoch lr momentum teacher_temp loss mip mpd itd contrast grad_norm skipped
             mpd_entropy mpd_mean_entropy mpd_center itd_entropy itd_mean_entropy itd_center effective_rank
             val_mip val_mse val_constant val_median""".split()
FREE_ON_RESUME = set("""preset method out resume overwrite cache max_bad device workers batch accumulate checkpointing
                        log_every val_every save_steps save_minutes""".split())
PATCH = 2  # voxels per axis of the encoder's first tokens [SMIT 2]
PRESETS = {  # what differs from the flags' defaults
    "paper": {},
    # half the width, half the view and three stages, so that a view still has 6^3 cells; see README, "The tiny preset"
    "tiny": dict(spacing=[4.0, 4.0, 4.0], crop=[64], view=[48], mask_cell=8, embed_dim=24, depths=[2, 2, 2],
                 heads=[2, 4, 8], drop_path=0.0, head_width=256, bottleneck=64, prototypes=256, steps=300, batch=3,
                 lr=1e-3, teacher_temp=[0.03, 0.03], workers=2, val_fraction=0.1, val_every=100, phantoms=20),
}
METHODS = {  # rows of Table 2 and Fig. 4 on the Swin backbone
    "smit": dict(mip=1.0, mpd=0.1, itd=0.1),                                  # [SMIT 2]
    "simmim": dict(mip=1.0, mpd=0.0, itd=0.0),                                # SSIM in Table 2, MIP in Fig. 4 [18]
    "ibot": dict(mip=0.0, mpd=1.0, itd=1.0),                                  # MPD+ITD in Fig. 4 [19]
    "dino": dict(mip=0.0, mpd=0.0, itd=1.0, mask_ratio=0.0),                  # two global views, no local crops [24]
    "mpd": dict(mip=0.0, mpd=1.0, itd=0.0),
    "itd": dict(mip=0.0, mpd=0.0, itd=1.0),
    "full": dict(mip=1.0, mpd=0.0, itd=0.0, mask_ratio=0.0, mip_on="all"),    # full image reconstruction
    "ml-mip": dict(mip=1.0, mpd=0.1, itd=0.1, voxel_head="multilayer"),
    "moco": dict(mip=0.0, mpd=0.0, itd=0.0, contrast=1.0, mask_ratio=0.0, batch=4),  # image token [33]
}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Help, usage="%(prog)s [flags]")
    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=PRESETS, default="paper", help="sizes; single flags override it")
    add("--method", choices=METHODS, default="smit", help="loss weights of a row of the paper's comparisons")
    add("--out", default="runs/ssl", help="output folder [ours]")
    add("--resume", action="store_true", help="continue OUT/last.pt, if there is one")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--check", action="store_true", help="read and prepare every volume of --data, list all that is wrong, leave")
    add("--seed", type=int, default=0, help="of every random draw [ours]")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU where there is one")
    add("--log_every", type=int, default=10, help="steps between rows of log.csv [ours]")
    add("--val_every", type=int, default=1000, help="steps between measurements on held-back volumes [ours]")
    add("--save_minutes", type=float, default=10, help="minutes between checkpoints [ours]")
    add("--save_steps", type=int, default=0, help="steps between checkpoints besides; 0: none [ours]")

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=[], metavar="PATH",
        help="folders of NIfTI, dataset.json files, text lists; without it, phantoms")
    add("--key", default="training", help="split to read from a dataset.json [MSD]")
    add("--modality", choices=["ct", "mr"], default="ct", help="HU window for ct, percentiles for mr [SMIT 3]")
    add("--spacing", nargs=3, type=float, default=[1.5, 1.5, 2.0], metavar="MM", help="voxel size [SMIT 3]")
    add("--hu_window", nargs=2, type=float, default=[-175.0, 250.0], metavar="HU", help="mapped to [0, 1] [release]")
    add("--crop", nargs="+", type=int, default=[128], help="voxels per axis of the crop holding both views [SMIT 3]")
    add("--view", nargs="+", type=int, default=[96], help="voxels per axis of a view [SMIT 3]")
    add("--val_fraction", type=float, default=0.05, help="share of volumes held back to measure MIP on [ours]")
    add("--cache", default="runs/cache", help="folder of prepared volumes, shared by runs [ours]")
    add("--max_bad", type=int, default=0, help="unreadable volumes to skip before giving up [ours]")
    add("--phantoms", type=int, default=40, help="synthetic patients to make when there is no --data [ours]")
    add("--workers", type=int, default=4, help="loader processes a rank; 0 loads in the training process [ours]")

    add = parser.add_argument_group("losses").add_argument
    add("--mip", type=float, help="weight of masked image prediction [SMIT 2]; 0 skips it")
    add("--mpd", type=float, help="weight of masked patch token distillation [SMIT 2]; 0 skips it")
    add("--itd", type=float, help="weight of image token distillation [SMIT 2]; 0 skips it")
    add("--contrast", type=float, default=0.0, help="weight of InfoNCE on the image token, for Fig. 4; 0 skips it")
    add("--mask_ratio", type=float, default=0.7, help="share of cells hidden from the student [SMIT 2]")
    add("--mask_cell", type=int, default=16, help="voxels per axis of a cell, 6^3 of them in 96^3 [SMIT 3]")
    add("--mip_on", choices=["hidden", "all"], default="hidden", help="voxels that MIP counts [SMIT Eq. 1]")
    add("--student_temp", type=float, default=0.1, help="tau_s [SMIT 2]")
    add("--teacher_temp", nargs=2, type=float, default=[0.04, 0.07], help="tau_t, before and after warm-up [SMIT 2]")
    add("--momentum", type=float, default=0.996, help="of the teacher at step 0; rises to 1 along a cosine [SMIT 2]")
    add("--center_momentum", type=float, default=0.9, help="of the centres [DINO]")

    add = parser.add_argument_group("networks").add_argument
    add("--embed_dim", type=int, default=48, help="width of the first stage; 16 * 48 = 768 at the end [SMIT 2]")
    add("--depths", nargs="+", type=int, default=[2, 2, 4, 2], help="blocks per stage [release]")
    add("--heads", nargs="+", type=int, default=[4, 4, 4, 4], help="attention heads per stage [release]")
    add("--window", nargs=3, type=int, default=[4, 4, 4], help="tokens per axis of a window [SMIT 2]")
    add("--drop_path", type=float, default=0.3, help="of the student's last block; the teacher has none [release]")
    add("--voxel_head", choices=["linear", "multilayer"], default="linear", help="h^Pred [SMIT 2]; the other: ML-MIP")
    add("--shared_head", action="store_true", help="one head for patches and image [iBOT]; the paper has two")
    add("--head_width", type=int, default=2048, help="hidden width of the projection heads [DINO]")
    add("--bottleneck", type=int, default=256, help="their width before the prototypes [DINO]")
    add("--prototypes", type=int, default=8192, help="K, their outputs [iBOT]")
    add("--checkpointing", action="store_true", help="recompute blocks in backward: about half the memory")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=400, help="passes over the volumes [SMIT 2]")
    add("--steps", type=int, help="optimiser steps, in place of --epochs; warm-ups keep their share")
    add("--warmup_epochs", type=float, default=30, help="of learning rate and teacher's temperature [SMIT 2]")
    add("--batch", type=int, default=2, help="volumes, so pairs of views, a rank and micro-batch [ours, for 16 GB]")
    add("--accumulate", type=int, default=1, help="micro-batches per optimiser step [ours]")
    add("--lr", type=float, default=2e-4, help="peak learning rate of AdamW [SMIT 2]")
    add("--weight_decay", type=float, default=0.01, help="on matrices only [release]")
    add("--clip", type=float, default=3.0, help="largest gradient norm [DINO]; 0 clips nothing")
    add("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto",
        help="auto: bf16 where the card has it, else fp16; fp32 on CPU [ours]")

    argv = sys.argv[1:] if argv is None else argv
    first, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    parser.set_defaults(**METHODS["smit"] | PRESETS[first.preset] | METHODS[first.method])   # --help shows them too
    args = parser.parse_args(argv)
    args.crop, args.view = (size * 3 if len(size) == 1 else size for size in (args.crop, args.view))
    return args


def check_sizes(args):
    """Refuse sizes that do not fit each other before any work is done."""
    view, cell, token = args.view, args.mask_cell, PATCH * 2 ** (len(args.depths) - 1)   # voxels of a patch token
    for wrong, why in (
            (len(view) != 3 or len(args.crop) != 3, "--crop and --view take one number or three"),
            (any(v % (2 * token) for v in view), f"--view {view} must be a multiple of {2 * token}, a last token"),
            (any(v > c for v, c in zip(view, args.crop)), f"--view {view} is larger than --crop {args.crop}"),
            (any(v % cell for v in view) or cell % PATCH,
             f"--mask_cell {cell} must be a multiple of {PATCH} and divide --view {view}"),
            (args.mpd and cell % token, f"--mask_cell {cell} must be a multiple of {token}, a patch token, for MPD"),
            (args.mpd and not args.mask_ratio, "--mpd needs hidden tokens: a --mask_ratio above 0, or --mpd 0"),
            (args.mip and args.mip_on == "hidden" and not args.mask_ratio,
             "--mip needs hidden voxels: a --mask_ratio above 0, or --mip_on all"),
            (not (args.mip or args.mpd or args.itd or args.contrast), "all loss weights are 0: nothing to learn"),
            (args.contrast and args.batch < 4, "--contrast needs other volumes in its micro-batch: --batch 4 or more"),
            (args.shared_head and not (args.mpd and args.itd), "--shared_head shares between MPD and ITD: use both"),
            (args.warmup_epochs >= args.epochs, f"--warmup_epochs {args.warmup_epochs:g} must be fewer than --epochs"),
            (min(args.student_temp, *args.teacher_temp) <= 0, "temperatures are above 0"),
            *((not 0 <= getattr(args, name) <= 1, f"--{name} {getattr(args, name):g} must lie between 0 and 1")
              for name in ("mask_ratio", "momentum", "center_momentum", "drop_path", "val_fraction")),
            (min(args.batch, args.accumulate, args.log_every, args.val_every, args.epochs, args.steps or 1) < 1,
             "--batch, --accumulate, --log_every, --val_every, --epochs and --steps start at 1"),
            (not args.clip >= 0, f"--clip {args.clip:g} must be 0 or more"),
            (args.check and not args.data, "--check is of --data: name it"),
            (args.resume and args.overwrite, "--resume continues a run and --overwrite discards it: choose one")):
        if wrong:
            raise ValueError(why)


def build_networks(args):
    """Student, teacher (None when no loss needs one) and the centres of the teacher's two heads."""
    torch.manual_seed(args.seed)
    student = pretrain.build_student(vars(args))
    teacher = student.make_teacher() if args.mpd or args.itd or args.contrast else None
    centers = torch.nn.ModuleDict({name: losses.Center(args.prototypes, args.center_momentum)
                                   for name in ("mpd", "itd") if getattr(args, name)})
    return student, teacher, centers


def build_optimizer(student, args):
    """AdamW; biases, norms, bias tables and the mask token are not decayed."""
    groups = {args.weight_decay: [], 0.0: []}
    for name, parameter in student.named_parameters():
        # differs: the release decays every parameter
        decay = 0.0 if parameter.ndim < 2 or "bias_table" in name else args.weight_decay
        groups[decay].append(parameter)
    groups = [dict(params=parameters, weight_decay=decay) for decay, parameters in groups.items()]
    return torch.optim.AdamW(groups, lr=args.lr, fused=True)


def load_cases(args, ranks):
    """All volumes of all sources, split into (train, held back); phantoms are made where there is no --data."""
    if not args.data:
        size = "x".join(f"{mm:g}" for mm in args.spacing)
        folder = Path(args.cache).parent / f"phantoms-{args.modality}-{args.phantoms}-{size}mm-seed{args.seed}"
        if ranks.is_main:
            print(f"no --data: training on {args.phantoms} synthetic patients, made in {folder}", flush=True)
        args.data = [str(phantom.write_dataset(folder, args.phantoms, args.modality, args.seed, args.spacing,
                                               ranks.rank, ranks.world))]
        ranks.agree()
    cases, problems = data.read_lists(args.data, args.key)
    data.check_cases(cases, problems=problems, workers=args.workers)
    held = round(args.val_fraction * len(cases))
    if held >= len(cases):
        raise ValueError(f"--val_fraction {args.val_fraction} of {len(cases)} volumes leaves none to train on")
    return sampling.random_split(cases, held, args.seed)


def check(args):
    """--check: every list, header and voxel of --data before a long run; ValueError names all that is wrong."""
    cases, problems = data.read_lists(args.data, args.key)
    settings = data.Preparation(tuple(args.spacing), args.modality, tuple(args.hu_window))
    data.check_voxels(cases, settings, problems=problems, workers=args.workers)
    print(f"checked: {len(cases)} volumes, all good")


def other_view(x):
    """Swap the halves of a batch: what belonged to u now stands at v."""
    return x.roll(len(x) // 2, dims=0)


def loss_terms(args, student, teacher, centers, batch, teacher_temp, device, autocast):
    """The paper's losses on one micro-batch of B volumes: dict of scalars, and the teacher's outputs [SMIT Fig. 1].

    u and v, the two views of each volume, go through a network as one batch of 2B: all u, then all v. So every loss is
    symmetrised, and the other view is the other half.
    """
    together = lambda pairs: pairs.transpose(0, 1).flatten(0, 1).to(device)          # (B, 2, ...) -> (2B, ...)
    views, cells, noise = (together(batch[name]) for name in ("views", "hidden", "noise"))
    views = views.float() / 255                                                       # (2B, 1, D, H, W) in [0, 1]
    corrupted = expand_mask(cells, args.mask_cell // PATCH) if args.mask_ratio else None  # (2B, D/2, H/2, W/2)
    with autocast():
        with torch.no_grad():
            taught = teacher(views) if teacher else None                              # f_t sees u and v whole
        learned = student(views, corrupted, noise)                                    # f_s sees them corrupted
    terms = {}                                                                        # in float32 from here on
    if args.mip:
        counted = expand_mask(cells, args.mask_cell) if args.mip_on == "hidden" else views >= 0
        terms["mip"] = losses.mip_loss(learned.voxels, views, counted)                            # Eq. 1
    if args.mpd:
        token = PATCH * 2 ** (len(args.depths) - 1)                                               # 16 voxels
        hidden = expand_mask(cells, args.mask_cell // token).flatten(1)                           # (2B, N)
        terms["mpd"] = losses.mpd_loss(learned.patch_logits, taught.patch_logits, hidden,         # Eq. 2, 3
                                       centers["mpd"].value, args.student_temp, teacher_temp)
        centers["mpd"].collect(taught.patch_logits)
    if args.itd:
        terms["itd"] = losses.itd_loss(learned.image_logits, other_view(taught.image_logits),     # Eq. 4
                                       centers["itd"].value, args.student_temp, teacher_temp)
        centers["itd"].collect(taught.image_logits)
    if args.contrast:
        (u, v), (other_u, other_v) = learned.embedding.chunk(2), other_view(taught.embedding).chunk(2)
        terms["contrast"] = (losses.info_nce(u, other_u) + losses.info_nce(v, other_v)) / 2
    return terms, taught


def noted(batches, bad, n):
    """Pass batches on, adding to the set `bad` the indices of volumes in whose place others of the n were taken."""
    for batch in batches:
        for index, count in zip(batch["volume"].tolist(), batch["passed_over"].tolist()):
            bad |= {(index - k) % n for k in range(1, count + 1)}
        yield batch


def check_bad(bad, cases, max_bad, ranks):
    """Join all ranks' sets of bad volumes; ValueError naming them if they are more than max_bad."""
    bad |= {i for i, flag in enumerate(ranks.agree(*(i in bad for i in range(len(cases))))) if flag}
    if len(bad) > max_bad:
        names = ", ".join(cases[i]["image"] for i in sorted(bad))
        raise ValueError(f"bad volumes, {len(bad)}, are more than --max_bad {max_bad}: {names}; mend or remove them")


@torch.no_grad()
def collapse_monitors(taught, centers, teacher_temp, ranks):
    """What collapse shows in, of the last micro-batch: see pretrain.entropies and pretrain.effective_rank."""
    row = {"effective_rank": pretrain.effective_rank(taught.tokens)}
    for name, logits in (("mpd", taught.patch_logits), ("itd", taught.image_logits)):
        if logits is not None:
            center = centers[name].value
            row[f"{name}_entropy"], row[f"{name}_mean_entropy"] = pretrain.entropies(
                logits, center, teacher_temp, ranks.mean)
            row[f"{name}_center"] = center.norm().item()
    return row


def main(args):
    check_sizes(args)
    if args.check:
        return check(args) if runtime.FIRST else None
    ranks = runtime.start(args.device)
    device = ranks.device
    runtime.keep_freed_memory(device)
    with runtime.OutputFolder(args.out, ranks, args.resume, args.overwrite) as out:
        # ------------------------------------------------------------------------------------------------------ data
        student, teacher, centers = build_networks(args)
        settings = data.Preparation(tuple(args.spacing), args.modality, tuple(args.hu_window))
        cases, held_back = load_cases(args, ranks)
        pairs = functools.partial(
            sampling.ViewPairs, settings=settings, cache=args.cache, crop=args.crop, view=args.view,
            cell=args.mask_cell, mask_ratio=args.mask_ratio, drops=student.encoder.drops, seed=args.seed)
        global_batch = args.batch * args.accumulate * ranks.world
        total = args.steps or -(-args.epochs * len(cases) // global_batch)
        warmup = total * args.warmup_epochs / args.epochs

        # -------------------------------------------------------------------------------- student, teacher, optimiser
        for network in filter(None, (student, teacher, centers)):
            network.to(device)
        optimizer = build_optimizer(student, args)
        precision = runtime.pick_precision(args.precision, device)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 12, enabled=precision == torch.float16)
        autocast = functools.partial(torch.autocast, device.type, precision, precision != torch.float32)
        weights = {name: getattr(args, name) for name in ("mip", "mpd", "itd", "contrast") if getattr(args, name)}
        config = {**vars(args), "global_batch": global_batch, "total": total, "volumes": len(cases),
                  "volume_list": sampling.list_digest(cases + held_back), "precision": str(precision)[6:]}
        step = strikes = skipped = 0
        bad, unread = set(), set()                  # volumes that could not be read, of those to train on and held back
        if state := runtime.load_latest(out, ranks):
            tied = {"batch", "accumulate"} if args.contrast else set()              # its negatives: the micro-batch
            for line in runtime.compare_settings(state["config"], config, FREE_ON_RESUME - tied) * ranks.is_main:
                print(f"resumed with another {line}")
            for name, part in (("student", student), ("teacher", teacher), ("centers", centers),
                               ("optimizer", optimizer), ("scaler", scaler)):
                if part is not None:
                    part.load_state_dict(state[name])
            step, skipped = state["step"], state["skipped"]

        if ranks.is_main:
            runtime.atomic_write(out / "config.json", json.dumps(config, indent=1).encode())
            size, other = (sum(p.numel() for p in net.parameters()) if net else 0 for net in (student, teacher))
            fixed = (4 * size + other) * 4 / 2 ** 20         # weights, gradients and two moments of AdamW, in float32
            print(f"{args.method}: {len(cases)} volumes and {len(held_back)} held back; steps {step} to {total} of "
                  f"{args.batch} pairs x {args.accumulate} micro-batches x {ranks.world} ranks = {global_batch} pairs; "
                  f"student of {size:,} parameters; {fixed:.0f} MiB for it, its gradients, AdamW and the teacher, "
                  f"before activations; {device.type}, {str(precision)[6:]}", flush=True)
        log = runtime.CsvLog(out / "log.csv", COLUMNS, ranks, step)
        # find_unused_parameters: some have no gradient (the token without masks), and it keeps DDP from reordering its
        # sums after the first step, which would make a resumed run differ from the uninterrupted one in the last bit
        wrapped = DistributedDataParallel(student, find_unused_parameters=True) if ranks.world > 1 else student
        numbers = sampling.micro_batches(step * global_batch, total * global_batch, args.batch, ranks.rank, ranks.world)
        batches = sampling.batches(pairs(cases), numbers, args.workers, pin=device.type == "cuda")
        batches = noted(batches, bad, len(cases))
        stop = runtime.StopSignals(ranks)
        bar = tqdm(total=total, initial=step, unit="step", disable=None if ranks.is_main else True)
        first, begun, saved = step, time.monotonic(), time.monotonic()

        # -------------------------------------------------------------------------------------------------- training
        while step < total:
            for group in optimizer.param_groups:
                # differs: the release sets the rate once an epoch, and to 0 for the whole first one
                group["lr"] = ema.warmup_cosine(step + 0.5, warmup, total, args.lr)          # the middle of this step
            # differs: the release starts the warm-up of the patch temperature 30 epochs late
            teacher_temp = ema.linear_warmup(step / warmup if warmup else 1, *args.teacher_temp)
            # differs: the release restarts this schedule with every epoch, and so stays at .996
            momentum = ema.cosine(step / max(total - 1, 1), args.momentum, 1.0)

            optimizer.zero_grad()
            row = collections.Counter()
            for micro in range(args.accumulate):
                batch = next(batches)
                more = micro + 1 < args.accumulate
                with wrapped.no_sync() if more and ranks.world > 1 else contextlib.nullcontext():
                    terms, taught = loss_terms(args, wrapped, teacher, centers, batch, teacher_temp, device, autocast)
                    terms["loss"] = sum(weights[name] * term for name, term in terms.items())      # L_total
                    scaler.scale(terms["loss"] / args.accumulate).backward()
                row.update({name: term.detach() / args.accumulate for name, term in terms.items()})

            scaler.unscale_(optimizer)
            # differs: the paper and the release clip no gradient; DINO and iBOT do
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip or math.inf)
            finite = bool(norm.isfinite())                           # alike on all ranks: gradients are their mean
            if finite:
                scaler.step(optimizer)
                if teacher:
                    ema.update_teacher(teacher, student, momentum)
            for center in centers.values():
                center.update() if finite else center.discard()
            scaler.update()
            step += 1
            # ------------------------------------------------------------------------------------ everything else
            strikes = 0 if finite else strikes + 1
            skipped += not finite
            if strikes == MAX_STRIKES:
                terms = {name: round(term.item(), 4) for name, term in row.items()}
                (culprit,) = ranks.agree(0 if math.isfinite(sum(terms.values())) else ranks.rank)
                if culprit != ranks.rank:
                    ranks.agree()                                  # the one with the NaN is to speak
                volumes = [Path(cases[i]["image"]).name for i in batch["volume"].tolist()]
                raise ValueError(f"step {step}: {strikes} steps in a row without a finite gradient; here {terms}, "
                                 f"volumes {volumes}; lower --lr or try --precision fp32")
            bar.update()
            if step == first + 1 and ranks.is_main:
                bar.clear()
                print(f"first step: peak memory {runtime.peak_memory_mb(device):.0f} MiB", flush=True)
            measure = args.mip and held_back and (step % args.val_every == 0 or step == total)
            if measure or step % args.log_every == 0 or step == total:
                row = {name: term.item() for name, term in row.items()} | {"grad_norm": norm.item()}
                if teacher and finite:
                    row |= collapse_monitors(taught, centers, teacher_temp, ranks)
                row = dict(zip(row, ranks.mean(torch.tensor(list(row.values()), device=device)).tolist()))
                if measure:
                    share = [[number] for number in range(ranks.rank, len(held_back), ranks.world)]
                    val_batches = noted(sampling.batches(pairs(held_back, split="val"), share), unread, len(held_back))
                    row |= pretrain.validate(student, val_batches, args.mask_cell, args.mip_on == "all", device,
                                             autocast, ranks)
                    check_bad(unread, held_back, args.max_bad, ranks)
                log.row(step=step, epoch=step * global_batch / len(cases), lr=optimizer.param_groups[0]["lr"],
                        momentum=momentum, teacher_temp=teacher_temp, skipped=skipped, **row)
                step_s = (time.monotonic() - begun) / (step - first)
                crops_per_s = 2 * global_batch / step_s
                bar.set_postfix(loss=f"{row['loss']:.3f}", crops_per_s=f"{crops_per_s:.2f}")
                if bar.disable and ranks.is_main:                    # output is no terminal: a line in place of the bar
                    epoch, left = step * global_batch / len(cases), timedelta(seconds=round(step_s * (total - step)))
                    print(f"step {step} of {total}, epoch {epoch:.1f}: loss {row['loss']:.3f}, "
                          f"{crops_per_s:.2f} crops/s, {left} left", flush=True)
            if ranks.is_main and (step % args.val_every == 0 or step == total):
                figures.pretraining_report(out, config, student, pairs(held_back or cases, split="val")[0])
            leaving, worst = ranks.agree(stop.asked, len(bad))
            if worst:
                check_bad(bad, cases, args.max_bad, ranks)
            due = args.save_steps and step % args.save_steps == 0 or time.monotonic() - saved > 60 * args.save_minutes
            if ranks.is_main and (due or leaving or step == total):
                runtime.save_checkpoint(out / "student.pt", {               # first: a resume trusts last.pt
                    "model": student.state_dict(), "config": config, "step": step})
                runtime.save_checkpoint(out / "last.pt", {
                    "student": student.state_dict(), "teacher": teacher.state_dict() if teacher else None,
                    "centers": centers.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                    "step": step, "samples": step * global_batch, "skipped": skipped, "config": config,
                    "torch": str(torch.__version__)})
                saved = time.monotonic()
            if leaving:
                break
        bar.close()
        if ranks.is_main:
            crops_per_s = 2 * global_batch * (step - first) / (time.monotonic() - begun)
            print(f"{'done' if step == total else 'stopped'} at step {step}: {crops_per_s:.2f} crops/s, peak memory "
                  f"{runtime.peak_memory_mb(device):.0f} MiB, weights in {out / 'student.pt'}")


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
