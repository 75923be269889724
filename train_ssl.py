"""Pre-train SMIT on unlabelled volumes [SMIT 2].

    python train_ssl.py --preset tiny                                    # phantoms, two CPU cores
    torchrun --nproc_per_node=4 train_ssl.py --data imagesTr             # the paper's settings
    torchrun --nproc_per_node=4 train_ssl.py --data imagesTr --method ibot     # a row of Table 2

Writes OUT/last.pt (everything; --resume goes on from it), OUT/student.pt (weights for finetune.py
and for others), OUT/log.csv (the losses as back-propagated, and the signs of collapse),
OUT/config.json and OUT/index.html (pictures). Every setting stands in smit/settings.py.
"""
import argparse
import itertools
import json
import math
from collections import Counter

import smit  # noqa: F401  before torch: it tells OpenMP's threads not to spin
import torch
from torch.nn.parallel import DistributedDataParallel

from smit import (
    data, ema, figures, losses, monitors, phantom, pretrain, runtime, settings, weights)
from smit.data import samples
from smit.masking import expand_mask
from smit.runtime import progress

TERMS = ("mip", "mpd", "itd")
COLUMNS = ("step epoch lr momentum teacher_temp loss mip mpd itd grad_norm skipped "
           "mpd_entropy mpd_mean_entropy mpd_center itd_entropy itd_mean_entropy itd_center "
           "effective_rank val_mip val_mse val_constant val_median").split()


def parse_arguments(argv=None):
    return settings.parse_pretraining(__doc__, argv)


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
    if args.val_fraction and not n_held_back:
        data.note(f"no volume is held back to measure MIP: {args.val_fraction:g} of {len(cases)} "
                  "is half a volume or less; a larger --val_fraction holds some back")
    settings.require(n_held_back < len(cases),
                     f"--val_fraction {args.val_fraction} of {len(cases)} volumes leaves none to "
                     "train on")
    return *samples.random_split(cases, n_held_back, args.seed), bad


def view_pairs(args, cases, drops=0, split="train"):
    """Make the dataset: sample number -> two views of a volume, and their masks [SMIT 2, 3]."""
    return samples.ViewPairs(cases, data.preparation_of(args), args.cache, args.crop, args.view,
                             args.mask_cell, args.mask_ratio, drops, args.seed, split)


def read_init(args, ranks, saved=()):
    """Read what --init names: (the settings, with its encoder's sizes; what to begin with).

    saved: the settings of a run that --resume continues. The sizes come from them, and the weights
    from its last.pt.
    """
    start, warning = None, ""
    if {*settings.SIZES} <= {*saved}:
        sizes = {name: saved[name] for name in {*settings.SIZES, "imported"} & saved.keys()}
    else:
        start = weights.read_start(args.init)
        sizes = start.student.settings()
        warning = settings.preparation_warning(args, start.student.config)
    settings.check_sizes(args, sizes)
    if warning and ranks.is_main:
        print(warning)
    args = argparse.Namespace(**{**vars(args), **sizes})
    settings.check_pretraining(args)
    return args, start


def build_networks(args):
    """Build the student, the teacher (None when no loss needs one) and the teacher's centres."""
    torch.manual_seed(args.seed)
    student = pretrain.build_student(vars(args))
    teacher = student.make_teacher() if args.mpd or args.itd else None

    centers = torch.nn.ModuleDict()
    for name in ("mpd", "itd"):
        if getattr(args, name):
            centers[name] = losses.Center(args.prototypes, args.center_momentum)
    return student, teacher, centers


def build_optimizer(student, args):
    """Build AdamW. Matrices decay; biases, norms, bias tables and the mask token do not."""
    matrices, others = [], []
    for name, parameter in student.named_parameters():
        # differs: the release decays every parameter
        is_matrix = parameter.ndim >= 2 and "bias_table" not in name
        (matrices if is_matrix else others).append(parameter)

    groups = [dict(params=matrices, weight_decay=args.weight_decay),
              dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=args.lr, fused=True)


def held_back_errors(args, student, val_pairs, precision, ranks, stop):
    """Measure MIP on this rank's share of the held-back volumes: {column of log.csv: number}.

    Broken off when `stop` is asked for: the numbers are then of no use.
    """
    share = [[number] for number in range(ranks.rank, len(val_pairs), ranks.world)]
    loader = samples.Batches(val_pairs, share, ranks, args.workers, args.max_bad)
    batches = itertools.takewhile(lambda _: not stop.asked, loader)
    errors = monitors.masked_image_errors(student, batches, args.mask_cell, args.mip_on == "all",
                                          ranks.device, precision.autocast, ranks)
    loader.check_bad()
    return errors


def u_then_v(pairs):
    """(B, 2, ...) -> (2B, ...): first every u, then every v."""
    return pairs.transpose(0, 1).flatten(0, 1)


def smit_losses(args, student, teacher, centers, batch, teacher_temp, precision):
    """Compute the paper's losses on B volumes [SMIT Fig. 1]: ({name: loss}, outputs of f_t).

    The views u and v of each volume run through a network as one batch of 2B: first every u, then
    every v. So each loss is symmetrised, and "the other view" is the other half of the batch.
    """
    device = precision.device
    views = u_then_v(batch["views"].to(device, non_blocking=True)) / 255    # (2B, 1, D, H, W)
    hidden_cells = u_then_v(batch["hidden"].to(device, non_blocking=True))  # (2B, d, h, w)
    noise = u_then_v(batch["noise"].to(device, non_blocking=True))          # (2B, drops)
    embedded = None                 # the same mask for the encoder's first tokens, of 2^3 voxels
    if args.mask_ratio:
        embedded = expand_mask(hidden_cells, args.mask_cell // settings.PATCH)

    with precision.autocast():
        with torch.no_grad():
            from_teacher = teacher(views) if teacher else None      # f_t sees both views whole
        from_student = student(views, embedded, noise)              # f_s sees them corrupted

    terms = {}                                                      # in float32 from here on
    if args.mip:
        if args.mip_on == "hidden":
            counted = expand_mask(hidden_cells, args.mask_cell)     # (2B, D, H, W)
        else:
            counted = torch.ones_like(views, dtype=torch.bool)
        terms["mip"] = losses.mip_loss(from_student.voxels, views, counted)           # Eq. 1
    if args.mpd:
        factor = args.mask_cell // settings.patch_token(args)       # patch tokens of a cell: 1
        hidden_tokens = expand_mask(hidden_cells, factor).flatten(1)                  # (2B, N)
        # found on the CPU, where the mask was drawn: a GPU would have to be waited for
        drawn = expand_mask(u_then_v(batch["hidden"]), factor).flatten(1)
        index = losses.hidden_index(drawn).to(device, non_blocking=True)
        terms["mpd"] = losses.mpd_loss(                                               # Eq. 2, 3
            from_student.patch_logits, from_teacher.patch_logits, hidden_tokens,
            centers["mpd"].value, args.student_temp, teacher_temp, index)
    if args.itd:
        of_other_view = from_teacher.image_logits.roll(len(views) // 2, dims=0)
        terms["itd"] = losses.itd_loss(                                               # Eq. 4
            from_student.image_logits, of_other_view,
            centers["itd"].value, args.student_temp, teacher_temp)
    return terms, from_teacher


def train(args, ranks, out):
    # ---------------------------------------------------------------------------------- data
    start = None
    if args.init:
        args, start = read_init(args, ranks, runtime.saved_settings(out, ranks))
    cases, held_back, bad = load_cases(args, ranks)
    per_step = args.batch * args.accumulate * ranks.world
    total = args.steps or math.ceil(args.epochs * len(cases) / per_step)
    warmup = total * args.warmup_epochs / args.epochs

    # ----------------------------------------------------------- student, teacher, optimiser
    student, teacher, centers = build_networks(args)
    report = weights.begin(start, student, teacher, centers) if start else "weights: random"
    for network in filter(None, (student, teacher, centers)):
        network.to(ranks.device)
    if args.compile:
        for network in filter(None, (student, teacher)):
            network.encoder.compile_blocks()
    optimizer = build_optimizer(student, args)
    precision = runtime.Precision(args.precision, ranks.device)
    # with --method smit: 1, lambda_MPD, lambda_ITD
    lambdas = {name: getattr(args, name) for name in TERMS}

    pairs = view_pairs(args, cases, student.encoder.drops)
    val_pairs = view_pairs(args, held_back[:args.val_volumes], split="val")
    # where nothing is held back, pictures show a training volume, by draws that stay the same
    shown = val_pairs if held_back else view_pairs(args, cases, split="val")

    # ---------------------------------------------------------------------- resume, outputs
    config = {**vars(args), "global_batch": per_step, "total": total, "volumes": len(cases),
              "volume_list": samples.list_digest(cases + held_back),
              "precision": precision.name, "format": weights.FORMAT}
    state = dict(student=student, teacher=teacher, centers=centers, optimizer=optimizer,
                 scaler=precision.scaler)
    resumed = runtime.resume(out, state, config, settings.PRETRAINING_FREE, ranks,
                             settings.PRETRAINING_BEFORE, weights.upgrade_run)
    step, skips = resumed["step"], progress.Skips(resumed["skipped"])
    if step:
        report = f"weights: as they were after step {step}"
    if ranks.is_main:
        runtime.atomic_write(out / "config.json", json.dumps(config, indent=1).encode())
        print(f"{args.method}: {len(cases)} volumes and {len(held_back)} held back; "
              f"steps {step} to {total} of {args.batch} pairs x {args.accumulate} micro-batches "
              f"x {ranks.world} ranks = {per_step} pairs; "
              f"{runtime.describe_memory(student, teacher)}; "
              f"{ranks.device.type}, {precision.name}\n{report}", flush=True)

    # find_unused_parameters: some get no gradient, as the norms of early stages and, without masks,
    # the mask token. Without it DDP regroups the gradients after the first backward, which changes
    # the order of its sums; with it a resumed run is the uninterrupted one, on a CPU to the bit.
    wrapped = student
    if ranks.world > 1:
        wrapped = DistributedDataParallel(student, find_unused_parameters=True)
    numbers = samples.micro_batches(step * per_step, total * per_step, args.batch, ranks.rank,
                                    ranks.world)
    loader = samples.Batches(pairs, numbers, ranks, args.workers, max_bad=args.max_bad,
                             left_out=bad, per_step=args.accumulate)
    log = runtime.CsvLog(out / "log.csv", COLUMNS, ranks, step)
    bar = progress.Progress(step, total, 2 * per_step, ranks)
    clock = progress.SaveClock(args.save_minutes, args.save_steps, total)
    stop = runtime.StopSignals(ranks)

    def measures(step):
        """Tell whether the held-back volumes are measured after a step."""
        return bool(args.mip and held_back and (step == total or step % args.val_every == 0))

    # ------------------------------------------------------------------------------ training
    while step < total:
        # differs: the release sets the rate once an epoch, and to 0 for the whole first one
        lr = ema.warmup_cosine(step + 0.5, warmup, total, args.lr)      # the middle of this step
        # differs: the release starts the warm-up of the patch temperature 30 epochs late
        teacher_temp = ema.linear_warmup(step / warmup if warmup else 1, *args.teacher_temp)
        # differs: the release restarts this schedule with every epoch, and so stays at .996
        momentum = ema.cosine(step / max(total - 1, 1), args.momentum, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr

        optimizer.zero_grad()
        means, volumes = Counter(), []
        for micro in range(args.accumulate):
            batch = next(loader)
            volumes += pairs.images(batch)
            wrapped.require_backward_grad_sync = micro == args.accumulate - 1       # for DDP
            terms, from_teacher = smit_losses(args, wrapped, teacher, centers, batch, teacher_temp,
                                              precision)
            terms["loss"] = sum(lambdas[name] * term for name, term in terms.items())   # L_total
            precision.scaler.scale(terms["loss"] / args.accumulate).backward()
            # the centres move after the step, by what all micro-batches and ranks collected
            if "mpd" in centers:
                centers["mpd"].collect(from_teacher.patch_logits)
            if "itd" in centers:
                centers["itd"].collect(from_teacher.image_logits)
            for name, term in terms.items():
                means[name] += term.detach() / args.accumulate

        precision.scaler.unscale_(optimizer)
        # differs: the paper and the release clip no gradient; DINO and iBOT do
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip or math.inf)
        finite = bool(norm.isfinite())              # alike on all ranks: gradients are their mean
        if finite:
            precision.scaler.step(optimizer)
            if teacher:
                ema.update_teacher(teacher, student, momentum)
        for center in centers.values():
            if finite:
                center.update()
            else:
                center.discard()
        precision.scaler.update()
        step += 1

        # ------------------------------------------------------------ log, show, stop, save
        skips.count(finite, step, means, volumes, ranks)
        bar.advance()
        last = step == total
        look = bool(teacher and finite and (last or step % args.monitor_every == 0))
        if last or measures(step) or look or step % args.log_every == 0:
            row = {**means, "grad_norm": norm}
            if look:
                row |= monitors.collapse(from_teacher, centers, teacher_temp, ranks)
            row = ranks.mean_of(row)
            if measures(step):
                row |= held_back_errors(args, student, val_pairs, precision, ranks, stop)
                (broken_off,) = ranks.agree(stop.asked)
                if broken_off:              # last.pt is of the step before: --resume measures again
                    break
            epoch = step * per_step / len(cases)
            log.row(step=step, epoch=epoch, lr=lr, momentum=momentum, teacher_temp=teacher_temp,
                    skipped=skips.total, **row)
            bar.tell(epoch, loss=row["loss"])
        if ranks.is_main and (last or step % args.val_every == 0 or step == 1):
            figures.pretraining_report(out, config, student, shown.sample(0), step)

        # was any rank asked to stop, did a loader fail, are more volumes bad than --max_bad?
        leaving = loader.agree(stop.asked)
        # before a measurement, too: it may take long or fail
        if ranks.is_main and (leaving or clock.due(step) or measures(step + 1)):
            # student.pt first: a resume trusts last.pt
            student_state = {"model": student.state_dict(), "config": config, "step": step}
            runtime.save_checkpoint(out / "student.pt", student_state)
            runtime.save_state(out / "last.pt", state, step=step, samples=step * per_step,
                               skipped=skips.total, config=config)
            clock.reset()
        if leaving:
            break
    bar.close(f"weights in {out / 'student.pt'}")
    loader.raise_failure()


def check(args):
    """Read --init, and every volume of --data; ValueError names all that is wrong."""
    if args.init:
        read_init(args, runtime.Ranks(0, 1, torch.device("cpu")))
    cases, problems = data.read_lists(args.data, args.key, args.data_root, args.modality)
    data.check_voxels(cases, data.preparation_of(args), problems=problems, workers=args.workers)
    print(f"checked: {data.count(len(cases), 'volume')}, {data.verdict()}")


def main(args):
    settings.check_pretraining(args)
    if args.check:
        return check(args) if runtime.is_first() else None
    ranks = runtime.start(args.device)
    if args.prepare_only:
        cases, held_back, _ = load_cases(args, ranks)
        data.prepare_ahead(cases + held_back, data.preparation_of(args), args.cache, ranks,
                           args.workers)
        return
    with runtime.OutputFolder(args.out, ranks, args.resume, args.overwrite) as out:
        train(args, ranks, out)


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
