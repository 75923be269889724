"""Fine-tune a pre-trained encoder to segment organs [SMIT 3].

    python finetune.py --preset tiny                                     # phantoms, two CPU cores
    torchrun --nproc_per_node=4 finetune.py --data dataset.json --init runs/ssl/student.pt
    python finetune.py --data dataset.json --init student.pt --num_train 5     # few labels
    python finetune.py --data dataset.json --modality mr --folds 5 --fold 0    # cross-validation

Without --init the encoder starts from random weights. Writes OUT/best.pt (highest mean Dice on
held-back cases), OUT/last.pt (everything; --resume goes on from it), OUT/log.csv, OUT/config.json
and OUT/index.html (curves, a case with its truth and prediction). Every setting stands in
smit/settings.py.
"""
import copy
import functools
import json
import math

import smit  # noqa: F401  before torch: it tells OpenMP's threads not to spin
import torch
from torch.nn.parallel import DistributedDataParallel

from smit import data, ema, figures, losses, metrics, phantom, runtime, segment, settings, weights
from smit.data import labelled, organs, samples
from smit.runtime import progress

COLUMNS = "step epoch lr loss grad_norm skipped val_dice best_dice".split()
# bytes of a validation's logits that lie beside a training on a GPU; larger ones go to the CPU:
# a hundred classes of a whole body have 10 GB [ours]
MOST_LOGITS = 2 ** 31


def parse_arguments(argv=None):
    return settings.parse_finetuning(__doc__, argv)


def load_cases(args, ranks):
    """Find the labelled cases, or make phantoms: (to train on, held back, {id: organ})."""
    sources = args.data or phantom.default_data(args.cache, args.phantoms, args.modality,
                                                args.seed, args.spacing, ranks)
    return labelled.find_cases(args, sources)


# ------------------------------------------------------------------------- network, optimiser
def read_init(args, ranks, saved=()):
    """Read what --init names: (weights, sizes of their encoder, a report on them).

    Without --init the weights are None and the sizes the flags'. saved: the settings of a run that
    --resume continues. The sizes come from them, and the weights from its last.pt.
    """
    names = settings.UNET_SIZES if args.network == "unet" else settings.SIZES
    if not args.init:
        return None, {name: getattr(args, name) for name in names}, ""
    if {*names} <= {*saved}:
        sizes = {name: saved[name] for name in {*names, "imported"} & saved.keys()}
        settings.check_sizes(args, sizes)
        return None, sizes, ""
    if args.partial_init or args.network == "unet":
        pretrained, config = weights.read_run(args.init, args.weights, names)
        sizes, report = {name: config[name] for name in names}, f"{args.init}:"
        if "imported" in config:                    # habits of an encoder that came from elsewhere
            sizes["imported"] = config["imported"]
    else:
        found = weights.read_encoder(args.init, args.weights)
        pretrained, config, report = found.weights, found.config, found.report
        sizes = found.settings()

    settings.check_sizes(args, sizes)
    warning = settings.preparation_warning(args, config)
    if warning and ranks.is_main:
        print(warning)
    return pretrained, sizes, report


def build_optimizer(net, args):
    """Build AdamW; the n-th encoder block below the decoder learns at lr * layer_decay^n [BEiT]."""
    layers = net.encoder.layers()                   # embedding, first block, ..., last block
    depth_of = {}
    for depth, layer in enumerate(layers):
        for parameter in layer.parameters():
            depth_of[parameter] = depth

    groups = {}
    for parameter in net.parameters():
        if parameter.requires_grad:
            below_decoder = len(layers) - depth_of.get(parameter, len(layers))
            groups.setdefault(args.layer_decay ** below_decoder, []).append(parameter)
    groups = [dict(params=parameters, scale=scale) for scale, parameters in groups.items()]
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)


def upgrade_run(state, parts, precision):
    """Bring a run's state to today's format; older ones called their precision "auto"."""
    state = weights.upgrade_run(state, parts)
    was_scaled = bool(state["scaler"])
    if state["config"].get("precision") == "auto" and was_scaled == precision.scaler.is_enabled():
        state = {**state, "config": {**state["config"], "precision": precision.name}}
    return state


# ---------------------------------------------------------------------------------- validation
def validate(net, cases, args, num_classes, precision, ranks, stop):
    """Measure Dice on the prepared grid: (mean Dice, label map of the first case) [ours].

    The mean is over the cases that have or are given an organ, then over organs. The label map
    lies on the CPU; it is None on ranks other than the first, and where there is no case.
    Broken off when `stop` is asked for: the mean is then of no use.
    """
    net.eval()
    scores = torch.zeros(2, len(cases), num_classes - 1, dtype=torch.float64)   # values, counted
    first = None
    for number in range(ranks.rank, len(cases), ranks.world):
        if stop.asked:
            break
        image, label = labelled.volumes(args, cases[number], num_classes)
        pred = predict(net, image, num_classes, args, precision)
        first = pred if number == 0 else first
        dice = torch.from_numpy(metrics.dice(pred, label, num_classes))
        scores[:, number] = torch.stack([dice.nan_to_num(), ~dice.isnan()])
    total, counted = ranks.mean(scores.to(ranks.device)).sum(1).cpu()
    return (total / counted)[counted > 0].mean().item(), first


def predict(net, image, num_classes, args, precision):
    """Label map (D, H, W) on the CPU of a prepared volume; warns of logits that are not finite."""
    with precision.autocast():
        logits = segment.predict(net, image, tuple(args.crop),
                                 batch=args.batch * args.crops_per_volume,
                                 stitch_on_cpu=4 * num_classes * image.size > MOST_LOGITS)
    label, finite = logits.argmax(0), logits.isfinite().all(0)
    if not finite.all():
        runtime.warn_once("output", "the network's output is not finite, and becomes background: "
                          "expect low Dice, and use --precision fp32 or bf16 in another run")
    return (label * finite).cpu()


def train(args, ranks, out):
    # ---------------------------------------------------------------------------------- data
    saved = runtime.saved_settings(out, ranks) if args.init else ()
    pretrained, sizes, report = read_init(args, ranks, saved)
    settings.check_crop(args, sizes)
    cases, held_back, names = load_cases(args, ranks)
    num_classes = labelled.count_classes(args, names)
    labelled.prepare_cases(args, cases, held_back, num_classes, ranks)
    per_step = args.batch * ranks.world
    total = args.steps or math.ceil(args.epochs * len(cases) / per_step)
    warmup = total * args.warmup_epochs / args.epochs
    val_samples = args.val_every * len(cases)           # from one validation to the next

    # --------------------------------------------------------------------- network, optimiser
    identities = organs.identities([case["image"] for case in cases + held_back])
    precision = runtime.Precision(args.precision, ranks.device)
    config = {**vars(args), **sizes, "num_classes": num_classes, "labels": names,
              "global_batch": per_step, "total": total, "format": weights.FORMAT,
              "precision": precision.name, "device": ranks.device.type,
              "train": identities[:len(cases)], "held_back": identities[len(cases):]}
    torch.manual_seed(args.seed)        # --init replaces the encoder alone: methods share a decoder
    net = segment.build_network(config)
    if pretrained:
        report += "\n" + segment.load_encoder(net, pretrained, args.partial_init)
        if args.network == "unet" and not args.encoder_only:
            report += "\n" + segment.load_decoder(net, pretrained)
    else:
        report = "encoder weights: random"
    net.to(ranks.device).encoder.requires_grad_(not args.freeze_encoder)
    average = copy.deepcopy(net).requires_grad_(False) if args.average else None
    kept = average or net                           # what is validated, saved and shown
    if args.compile:
        net.encoder.compile_blocks()
    optimizer = build_optimizer(net, args)

    # ---------------------------------------------------------------------- resume, outputs
    state = dict(model=net, average=average, optimizer=optimizer, scaler=precision.scaler)
    before = {**settings.FINETUNING_BEFORE, "width": args.width}
    resumed = runtime.resume(out, state, config, settings.FINETUNING_FREE, ranks, before,
                             functools.partial(upgrade_run, precision=precision))
    step, skips = resumed["step"], progress.Skips(resumed["skipped"])
    if step:
        report = f"weights: as they were after step {step}"
    best = resumed.get("best", -1.0)
    if ranks.is_main:
        runtime.atomic_write(out / "config.json", json.dumps(config, indent=1).encode())
        print(f"{len(cases)} volumes and {len(held_back)} held back; steps {step} to {total} of "
              f"{args.batch} volumes x {args.crops_per_volume} crops x {ranks.world} ranks = "
              f"{per_step * args.crops_per_volume} crops; {runtime.describe_memory(net)}; "
              f"{ranks.device.type}, {precision.name}\n{report}", flush=True)

    # find_unused_parameters: as in train_ssl.py, for a resumed run's sake
    wrapped = net
    if ranks.world > 1:
        wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    crops = samples.LabelledCrops(cases, data.preparation_of(args), args.cache, num_classes,
                                  args.crop, args.crops_per_volume, net.encoder.drops, args.seed)
    numbers = samples.micro_batches(step * per_step, total * per_step, args.batch, ranks.rank,
                                    ranks.world)
    loader = samples.Batches(crops, numbers, ranks, args.workers, per_step=1)
    log = runtime.CsvLog(out / "log.csv", COLUMNS, ranks, step)
    bar = progress.Progress(step, total, per_step * args.crops_per_volume, ranks)
    clock = progress.SaveClock(args.save_minutes, args.save_steps, total)
    stop = runtime.StopSignals(ranks)

    def validates(step):
        """Tell whether a validation follows a step."""
        is_due = step * per_step // val_samples > (step - 1) * per_step // val_samples
        return bool(held_back) and (step == total or is_due)

    # ------------------------------------------------------------------------------ training
    while step < total:
        lr = ema.warmup_cosine(step + 0.5, warmup, total, args.lr)      # the middle of this step
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        net.train().encoder.train(not args.freeze_encoder)
        batch = next(loader)
        images = samples.augmented(batch, ranks.device).flatten(0, 1)       # (B, 1, D, H, W)
        labels = batch["labels"].to(ranks.device, non_blocking=True).flatten(0, 1).long()
        noise = batch["noise"].to(ranks.device, non_blocking=True).flatten(0, 1)
        optimizer.zero_grad()
        with precision.autocast():
            logits = wrapped(images, noise)                         # (B, num_classes, D, H, W)
        loss = losses.dice_ce_loss(logits, labels, background_weight=args.background_weight,
                                   dice_on=args.dice_on)
        precision.scaler.scale(loss).backward()

        precision.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip or math.inf)
        finite = bool(norm.isfinite())              # alike on all ranks: gradients are their mean
        if finite:
            precision.scaler.step(optimizer)
            if average:
                # fewer steps count at first, so that the random start is soon forgotten
                momentum = min(args.average, (step + 1) / (step + 10))
                ema.update_teacher(average, net, momentum)
        precision.scaler.update()
        step += 1

        # ------------------------------------------------------------ log, show, stop, save
        skips.count(finite, step, {"loss": loss.detach()}, crops.images(batch), ranks)
        bar.advance()
        last = step == total
        row, pred = {}, None
        if validates(step):
            row["val_dice"], pred = validate(kept, held_back, args, num_classes, precision, ranks,
                                             stop)
            (broken_off,) = ranks.agree(stop.asked)
            if broken_off:              # last.pt is of the step before: --resume validates again
                break
        # differs: one checkpoint for all organs; the release keeps the best one for each organ
        improved = row.get("val_dice", -1.0) > best         # nan, no organ to score, never is
        if improved:
            best = row["val_dice"]
        if last and best < 0:                               # nothing was ever scored
            improved = True

        if row or last or step % args.log_every == 0:
            row |= ranks.mean_of({"loss": loss, "grad_norm": norm})
            row["epoch"] = step * per_step / len(cases)
            if best >= 0:
                row["best_dice"] = best
            log.row(step=step, lr=lr, skipped=skips.total, **row)
            bar.tell(row["epoch"], loss=row["loss"], best_Dice=row.get("best_dice"))
        if ranks.is_main and ("val_dice" in row or last or step == 1):
            case = (held_back or cases)[0]
            image, label = labelled.volumes(args, case, num_classes)
            if pred is None and last:
                pred = predict(kept.eval(), image, num_classes, args, precision)
            figures.finetuning_report(out, config, image, label, pred,
                                      organs.case_name(case["image"]), step)

        leaving = loader.agree(stop.asked)          # was any asked to stop, did a loader fail?
        if ranks.is_main and improved:
            runtime.save_checkpoint(out / "best.pt", {
                "model": kept.state_dict(), "config": config, "step": step, "val_dice": best})
        # before a validation, too: it may take long or fail
        if ranks.is_main and (leaving or clock.due(step) or validates(step + 1)):
            runtime.save_state(out / "last.pt", state, step=step, samples=step * per_step,
                               skipped=skips.total, best=best, config=config)
            clock.reset()
        if leaving:
            break
    weights_told = f"weights in {out / 'best.pt'}"
    if best >= 0:
        bar.close(f"best mean Dice {best:.3f}; {weights_told}")
    elif step == total:
        bar.close(f"nothing to validate on, no case or no organ in it; {weights_told}")
    else:
        bar.close("no validation yet")
    loader.raise_failure()


def check(args):
    """Read --init, and all images and labels of --data; ValueError names all that is wrong.

    The cases are split, too, as the run would do it.
    """
    _, sizes, _ = read_init(args, runtime.Ranks(0, 1, torch.device("cpu")))
    settings.check_crop(args, sizes)
    cases, listed, problems = labelled.read_lists(args, args.data)
    try:
        if cases:                       # without any the lists have told why
            labelled.choose_cases(args, cases, listed, args.data)
    except ValueError as error:
        problems.append(str(error))
    names = labelled.organ_names(args.data)
    num_classes = labelled.count_classes(args, names)
    data.check_voxels(cases + listed, data.preparation_of(args), True, num_classes, problems,
                      args.workers, names)
    print(f"checked: {data.count(len(cases + listed), 'case')} of {num_classes} classes, "
          f"{data.verdict()}")


def main(args):
    settings.check_finetuning(args)
    if args.check:
        return check(args) if runtime.is_first() else None
    ranks = runtime.start(args.device)
    if args.prepare_only:
        cases, held_back, names = load_cases(args, ranks)
        data.prepare_ahead(cases + held_back, data.preparation_of(args), args.cache, ranks,
                           args.workers, True, labelled.count_classes(args, names))
        return
    with runtime.OutputFolder(args.out, ranks, args.resume, args.overwrite) as out:
        train(args, ranks, out)


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
