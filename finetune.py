"""Fine-tune a pre-trained encoder to segment organs [SMIT 3].

    python finetune.py --preset tiny                                              # phantoms, two CPU cores, minutes
    torchrun --nproc_per_node=4 finetune.py --data dataset.json --init runs/ssl/student.pt
    python finetune.py --data dataset.json --init student.pt --num_train 5        # few labels; without --init: random
    python finetune.py --data dataset.json --modality mr --folds 5 --fold 0       # cross-validation

Writes OUT/best.pt (highest mean Dice on held-back cases), OUT/last.pt (everything; --resume goes on from it),
OUT/log.csv, OUT/config.json and OUT/index.html (curves, a case with its truth and prediction).
"""
import argparse
import functools
import json
import math
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from smit import data, ema, figures, flags, losses, metrics, phantom, runtime, segment
from smit.data import samples as sampling

MAX_STRIKES = 20  # steps in a row without a finite gradient; fp16's loss scaling alone takes a few at the start [ours]
COLUMNS = "step epoch lr loss grad_norm skipped val_dice best_dice".split()
FREE_ON_RESUME = set("""preset out resume overwrite cache device workers batch checkpointing log_every save_steps
                        save_minutes sizes_given""".split())
PRESETS = {  # what differs from the flags' defaults
    "paper": {},
    # coarser than train_ssl.py's tiny preset: a crop of 48^3 must hold whole organs to learn them in minutes
    "tiny": dict(spacing=[6.0, 6.0, 6.0], crop=[48], embed_dim=24, depths=[2, 2, 2], heads=[2, 4, 8], steps=1000,
                 batch=2, crops_per_volume=2, lr=1.5e-3, clip=3.0, workers=1, phantoms=20),
}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Help, usage="%(prog)s [flags]")
    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=PRESETS, default="paper", help="sizes; single flags override it")
    add("--out", default="runs/finetune", help="output folder [ours]")
    add("--resume", action="store_true", help="continue OUT/last.pt, if there is one")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--check", action="store_true", help="read and prepare every case of --data, list all that is wrong, leave")
    add("--seed", type=int, default=0, help="of every random draw [ours]")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU where there is one")
    add("--log_every", type=int, default=10, help="steps between rows of log.csv [ours]")
    add("--val_every", type=float, default=30, help="epochs between validations [release]")
    add("--save_minutes", type=float, default=10, help="minutes between checkpoints [ours]")
    add("--save_steps", type=int, default=0, help="steps between checkpoints besides; 0: none [ours]")

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=[], metavar="PATH", help="dataset.json files, text lists; without it, phantoms")
    add("--key", default="training", help="split of a dataset.json to train on [MSD]")
    add("--val_key", default="validation", help="split to validate on [MSD]; where it lacks, --val_fraction of --key")
    add("--val_fraction", type=float, default=0.1, help="share of --key held back to validate on [ours]")
    add("--split", choices=sampling.SPLITS, help="BTCV: hold back a published split's cases, by their numbers")
    add("--fold", type=int, help="hold back this of --folds parts of --key, counted from 0; --val_key is not touched")
    add("--folds", type=int, default=5, help="parts of a shuffle with seed 12345 [SMIT 3; nnU-Net]")
    add("--num_train", type=int, help="train on the first n of a shuffle by --seed, alike for all methods [ours]")
    add("--modality", choices=["ct", "mr"], default="ct", help="HU window for ct, percentiles for mr [SMIT 3]")
    add("--spacing", nargs=3, type=float, default=[1.5, 1.5, 2.0], metavar="MM", help="voxel size [release]")
    add("--hu_window", nargs=2, type=float, default=[-175.0, 250.0], metavar="HU", help="mapped to [0, 1] [release]")
    add("--crop", nargs="+", type=int, default=[96], help="voxels per axis of a crop, and of a window later [release]")
    add("--crops_per_volume", type=int, default=4, help="crops that a volume gives a step [release]")
    add("--num_classes", type=int, help="with the background; default: as the JSON's labels say, else 14 [SMIT 3]")
    add("--cache", default="runs/cache", help="folder of prepared volumes, shared by runs [ours]")
    add("--phantoms", type=int, default=40, help="synthetic patients to make when there is no --data [ours]")
    add("--workers", type=int, default=4, help="loader processes a rank; 0 loads in the training process [ours]")

    add = parser.add_argument_group("network").add_argument
    add("--init", metavar="PATH", help="student.pt or last.pt of train_ssl.py [SMIT 3]; without it, random weights")
    add("--weights", choices=["student", "teacher"], default="student", help="which network of a last.pt [SMIT 2]")
    add("--partial_init", action="store_true", help="load what fits of --init, in place of refusing what does not")
    add("--freeze_encoder", action="store_true", help="train the decoder alone [ours]")
    add("--embed_dim", type=int, default=48, help="width of the first stage [SMIT 2]; with --init, as there")
    add("--depths", nargs="+", type=int, default=[2, 2, 4, 2], help="blocks per stage [release]; so too")
    add("--heads", nargs="+", type=int, default=[4, 4, 4, 4], help="attention heads per stage [release]; so too")
    add("--window", nargs=3, type=int, default=[4, 4, 4], help="tokens per axis of a window [SMIT 2]; so too")
    add("--drop_path", type=float, default=0.0, help="of the encoder's last block [ours]")
    add("--checkpointing", action="store_true", help="recompute blocks in backward: about half the memory")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=1000, help="passes over the volumes [ours]")
    add("--steps", type=int, help="optimiser steps, in place of --epochs; the warm-up keeps its share")
    add("--warmup_epochs", type=float, default=50, help="of the learning rate [release]")
    add("--batch", type=int, default=1, help="volumes a rank and step [release]")
    add("--lr", type=float, default=1e-4, help="peak learning rate of AdamW [release]")
    add("--layer_decay", type=float, default=1.0, help="factor on it per encoder block downwards [BEiT]; 1: none")
    add("--weight_decay", type=float, default=1e-5, help="on all parameters [release]")
    add("--clip", type=float, default=0.0, help="largest gradient norm; 0 clips nothing [release]")
    add("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto",
        help="auto: bf16 where the card has it, else fp16; fp32 on CPU [ours]")

    argv = sys.argv[1:] if argv is None else argv
    given = [word for word in argv if word not in ("-h", "--help")]
    given = vars(parser.parse_args(given, argparse.Namespace(**dict.fromkeys(segment.SIZES))))
    parser.set_defaults(**PRESETS[given["preset"]])                                           # --help shows them too
    args = parser.parse_args(argv)
    args.sizes_given = {name: given[name] for name in segment.SIZES if given[name] is not None}
    args.crop = args.crop * 3 if len(args.crop) == 1 else args.crop
    return args


def check_settings(args):
    """Refuse settings that do not fit each other before any work is done."""
    refuse = [
        (len(args.crop) != 3 or min(args.crop) < 8, f"--crop {args.crop}: give one number or three, 8 or more"),
        (min(args.batch, args.crops_per_volume) < 1, "--batch and --crops_per_volume must be 1 or more"),
        (args.fold is not None and args.split, "--fold and --split both choose what is held back: give one"),
        (args.fold not in (None, *range(args.folds)), f"--fold {args.fold} is not one of 0..{args.folds - 1}"),
        *((not 0 <= getattr(args, name) <= 1, f"--{name} {getattr(args, name):g} must lie between 0 and 1")
          for name in ("val_fraction", "drop_path")),
        (not 0 < args.layer_decay <= 1, f"--layer_decay {args.layer_decay} must lie in (0, 1]; 1 is none"),
        (args.freeze_encoder and not args.init, "--freeze_encoder without --init would freeze random weights"),
        (args.num_classes not in (None, *range(2, 257)), f"--num_classes {args.num_classes} is not one of 2..256"),
        (not min(args.log_every, args.val_every, args.epochs, args.steps or 1) > 0,
         "--log_every, --val_every, --epochs and --steps must be above 0"),
        (not args.clip >= 0, f"--clip {args.clip:g} must be 0 or more"),
        (args.check and not args.data, "--check is of --data: name it"),
        (args.resume and args.overwrite, "--resume continues a run and --overwrite discards it: choose one"),
    ]
    if why := [why for wrong, why in refuse if wrong]:
        raise ValueError(why[0])


def read_lists(args):
    """(cases of --key, cases of --val_key where a list has it, what is wrong with the lists)."""
    cases, problems = data.read_lists(args.data, args.key)
    listed, more = data.read_lists([path for path in args.data if data.has_split(path, args.val_key)], args.val_key)
    return cases, listed, problems + more


def check(args):
    """--check: every list, header, voxel and label of --data before a long run; ValueError names all that is wrong."""
    cases, listed, problems = read_lists(args)
    organ_names(args)
    settings = data.Preparation(tuple(args.spacing), args.modality, tuple(args.hu_window))
    data.check_voxels(cases + listed, settings, True, args.num_classes, problems, args.workers)
    print(f"checked: {len(cases + listed)} cases, all good")


def load_cases(args, ranks):
    """(training cases, held-back cases, {id: organ}) of all sources; phantoms are made where there is no --data."""
    if not args.data:
        size = "x".join(f"{mm:g}" for mm in args.spacing)
        folder = Path(args.cache).parent / f"phantoms-{args.modality}-{args.phantoms}-{size}mm-seed{args.seed}"
        if ranks.is_main:
            print(f"no --data: training on {args.phantoms} synthetic patients, made in {folder}", flush=True)
        args.data = [str(phantom.write_dataset(folder, args.phantoms, args.modality, args.seed, args.spacing,
                                               ranks.rank, ranks.world))]
        ranks.agree()
    cases, listed, problems = read_lists(args)
    if problems:
        data.check_cases(cases + listed, True, problems=problems)    # the files' with the lists', all at once
    if args.split:
        cases, held_back = sampling.published_split(cases + listed, args.split)
    elif args.fold is not None:
        cases, held_back = sampling.fold_split(cases, args.fold, args.folds)
    else:
        held = math.ceil(args.val_fraction * len(cases))
        cases, held_back = (cases, listed) if listed else sampling.random_split(cases, held, args.seed)
    if not cases or any(case in cases for case in held_back):
        raise ValueError(f"{', '.join(args.data)}: no case is left to train on, or one is also held back")
    if args.num_train is not None:
        cases = sampling.nested_subset(cases, args.num_train, args.seed)
    return cases, held_back, organ_names(args)


def organ_names(args):
    """{id: organ} of all sources, {} where none has it; num_classes follows it."""
    names = [data.label_names(path) for path in args.data]
    if names.count(names[0]) != len(names):
        raise ValueError(f"{', '.join(args.data)} number their labels differently: train on one of them")
    args.num_classes = args.num_classes or max(names[0] or {}, default=13) + 1
    return names[0] or {}


def prepare_cases(train, held_back, settings, args, ranks):
    """Prepare this rank's share of all cases: what is wrong shows before step 1, organs without any label are told."""
    found = [False] * args.num_classes

    def prepare(case):
        _, label = data.cached(case, settings, args.cache, True, args.num_classes)
        for organ in np.unique(label).tolist() if case in train else ():
            found[organ] = True
    data.check_cases(train + held_back, True, workers=args.workers)  # by the headers, in a moment
    share = (train + held_back)[ranks.rank::ranks.world]
    data.check_cases(share, load=prepare)
    missing = [organ for organ, seen in enumerate(ranks.agree(*found)) if not seen]
    if missing and ranks.is_main:
        print(f"warning: no training case has label {missing}: the network cannot learn it")


def read_init(args, ranks):
    """The weights that --init names, or None. Their encoder's sizes become this run's; other inputs are warned of."""
    if not args.init:
        return None
    state = runtime.load_checkpoint(args.init)
    alone = "model" in state                                     # in student.pt
    weights, theirs = state.get("model" if alone else args.weights), state.get("config")
    sound = isinstance(weights, dict) and isinstance(theirs, dict) and theirs.keys() >= set(segment.SIZES) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items())
    if not sound or not weights or alone and args.weights != "student":
        raise ValueError(f"{args.init} holds no pre-trained {args.weights}; give student.pt or last.pt of train_ssl.py")
    for name, size in args.sizes_given.items():
        if size != theirs[name]:
            raise ValueError(f"--{name} {size}: the encoder of {args.init} has {theirs[name]}; drop the flag")
    vars(args).update({name: theirs[name] for name in segment.SIZES})
    differ = [f"{name} {getattr(args, name)} here, {theirs.get(name)} there"
              for name in ("spacing", "modality", "hu_window") if getattr(args, name) != theirs.get(name)]
    if differ and ranks.is_main:
        print(f"warning: {args.init} was trained on volumes prepared otherwise: {'; '.join(differ)}")
    return weights


def build_optimizer(net, args):
    """AdamW; the n-th encoder block below the decoder learns at lr * layer_decay^n, the embedding below all [BEiT]."""
    def level(name):                                             # 0 the embedding, one per block, the decoder on top
        place = re.match(r"encoder\.(?:stages|norms)\.(\d+)\.(?:blocks\.(\d+))?", name)
        if not place:
            return 0 if name.startswith("encoder.") else sum(args.depths) + 1
        stage, block = int(place[1]), place[2]                   # a merge or norm goes with its stage's last block
        return sum(args.depths[:stage]) + (args.depths[stage] if block is None else int(block) + 1)
    groups = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(args.layer_decay ** (sum(args.depths) + 1 - level(name)), []).append(parameter)
    return torch.optim.AdamW([dict(params=group, scale=scale) for scale, group in groups.items()], lr=args.lr,
                             weight_decay=args.weight_decay, fused=True)


def validate(net, cases, settings, args, autocast, ranks):
    """Mean Dice on the prepared grid: over the cases that have or are given an organ, then over organs [ours]."""
    net.eval()
    scores = torch.zeros(2, len(cases), args.num_classes - 1, dtype=torch.float64)            # values, and which count
    for i in range(ranks.rank, len(cases), ranks.world):
        image, label = data.cached(cases[i], settings, args.cache, True, args.num_classes)
        with autocast():
            logits = segment.predict(net, image, tuple(args.crop), batch=args.batch * args.crops_per_volume)
        dice = torch.from_numpy(metrics.dice(logits.argmax(0), label, args.num_classes))
        scores[:, i] = torch.stack([dice.nan_to_num(), ~dice.isnan()])
    total, count = ranks.mean(scores.to(ranks.device)).sum(1).cpu()
    return (total / count)[count > 0].mean().item()


def main(args):
    check_settings(args)
    if args.check:
        return check(args) if runtime.FIRST else None
    ranks = runtime.start(args.device)
    device = ranks.device
    runtime.keep_freed_memory(device)
    with runtime.OutputFolder(args.out, ranks, args.resume, args.overwrite) as out:
        # ------------------------------------------------------------------------------------------------------ data
        weights = read_init(args, ranks)
        settings = data.Preparation(tuple(args.spacing), args.modality, tuple(args.hu_window))
        train, held_back, names = load_cases(args, ranks)
        prepare_cases(train, held_back, settings, args, ranks)
        global_batch = args.batch * ranks.world
        total = args.steps or -(-args.epochs * len(train) // global_batch)
        warmup = total * args.warmup_epochs / args.epochs

        # --------------------------------------------------------------------------------------- network, optimiser
        torch.manual_seed(args.seed)                     # --init replaces the encoder alone: methods share a decoder
        net = segment.build_network(vars(args))
        report = segment.load_encoder(net, weights, args.partial_init) if weights else "encoder weights: random"
        net.to(device).encoder.requires_grad_(not args.freeze_encoder)
        optimizer = build_optimizer(net, args)
        precision = runtime.pick_precision(args.precision, device)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        autocast = functools.partial(torch.autocast, device.type, precision, precision != torch.float32)
        config = {**vars(args), "global_batch": global_batch, "total": total, "labels": names,
                  "train": [Path(case["image"]).name for case in train],
                  "held_back": [Path(case["image"]).name for case in held_back]}
        step, strikes, skipped, best = 0, 0, 0, -1.0
        if state := runtime.load_latest(out, ranks):
            for line in runtime.compare_settings(state["config"], config, FREE_ON_RESUME) * ranks.is_main:
                print(f"resumed with another {line}")
            for name, part in (("model", net), ("optimizer", optimizer), ("scaler", scaler)):
                part.load_state_dict(state[name])
            step, skipped, best = state["step"], state["skipped"], state["best"]

        if ranks.is_main:
            runtime.atomic_write(out / "config.json", json.dumps(config, indent=1).encode())
            sizes = [(p.numel(), 4 if p.requires_grad else 1) for p in net.parameters()]
            size, fixed = sum(n for n, _ in sizes), sum(n * k for n, k in sizes) * 4 / 2 ** 20        # in float32
            print(f"{len(train)} volumes and {len(held_back)} held back; steps {step} to {total} of {args.batch} "
                  f"volumes x {args.crops_per_volume} crops x {ranks.world} ranks = "
                  f"{global_batch * args.crops_per_volume} crops; network of {size:,} parameters; {fixed:.0f} MiB for "
                  f"it, its gradients and AdamW, before activations; {device.type}, {str(precision)[6:]}\n{report}",
                  flush=True)
        log = runtime.CsvLog(out / "log.csv", COLUMNS, ranks, step)
        # find_unused_parameters keeps DDP from reordering its sums after the first step: a resumed run is the same run
        wrapped = DistributedDataParallel(net, find_unused_parameters=True) if ranks.world > 1 else net
        crops = sampling.LabelledCrops(train, settings, args.cache, args.num_classes, args.crop,
                                       args.crops_per_volume, net.encoder.drops, args.seed)
        numbers = sampling.micro_batches(step * global_batch, total * global_batch, args.batch, ranks.rank, ranks.world)
        batches = sampling.batches(crops, numbers, args.workers)
        stop = runtime.StopSignals(ranks)
        bar = tqdm(total=total, initial=step, unit="step", disable=None if ranks.is_main else True)
        first, begun, saved = step, time.monotonic(), time.monotonic()

        # -------------------------------------------------------------------------------------------------- training
        while step < total:
            rate = ema.warmup_cosine(step + 0.5, warmup, total, args.lr)                     # the middle of this step
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            net.train().encoder.train(not args.freeze_encoder)
            batch = next(batches)
            images, labels, noise = (batch[name].flatten(0, 1).to(device) for name in ("images", "labels", "noise"))
            optimizer.zero_grad()
            with autocast():
                logits = wrapped(images, noise)                                              # (B, num_classes, D, H, W)
            loss = losses.dice_ce_loss(logits, labels.long())
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip or math.inf)
            finite = bool(norm.isfinite())                               # alike on all ranks: gradients are their mean
            if finite:
                scaler.step(optimizer)
            scaler.update()
            step += 1
            # ------------------------------------------------------------------------------------ everything else
            strikes = 0 if finite else strikes + 1
            skipped += not finite
            if strikes == MAX_STRIKES:
                (culprit,) = ranks.agree(0 if loss.isfinite() else ranks.rank)
                if culprit != ranks.rank:
                    ranks.agree()                                  # the one with the NaN is to speak
                volumes = [Path(train[i]["image"]).name for i in batch["volume"].tolist()]
                raise ValueError(f"step {step}: {strikes} steps in a row without a finite gradient; loss {loss.item()},"
                                 f" volumes {volumes}; lower --lr or try --precision fp32")
            bar.update()
            if step == first + 1 and ranks.is_main:
                bar.clear()
                print(f"first step: peak memory {runtime.peak_memory_mb(device):.0f} MiB", flush=True)
            row, every = {}, args.val_every * len(train) / global_batch                                     # steps
            if held_back and (step == total or step // every > (step - 1) // every):
                row["val_dice"] = validate(net, held_back, settings, args, autocast, ranks)
            # differs: one checkpoint for all organs; the release keeps the best one for each organ
            improved = row.get("val_dice", -1.0) > best or not held_back and step == total
            best = max(best, row.get("val_dice", -1.0))
            if row or step % args.log_every == 0 or step == total:
                row["loss"], row["grad_norm"] = ranks.mean(torch.stack([loss.detach(), norm])).tolist()
                row["epoch"] = step * global_batch / len(train)
                log.row(step=step, lr=rate, skipped=skipped, best_dice=best, **row)
                step_s = (time.monotonic() - begun) / (step - first)
                crops_per_s = global_batch * args.crops_per_volume / step_s
                bar.set_postfix(loss=f"{row['loss']:.3f}", best=f"{best:.3f}", crops_per_s=f"{crops_per_s:.2f}")
                if bar.disable and ranks.is_main:                    # output is no terminal: a line in place of the bar
                    left = timedelta(seconds=round(step_s * (total - step)))
                    print(f"step {step} of {total}, epoch {row['epoch']:.1f}: loss {row['loss']:.3f}, "
                          f"best Dice {best:.3f}, {crops_per_s:.2f} crops/s, {left} left", flush=True)
            if ranks.is_main and ("val_dice" in row or step == total):
                image, label = data.cached((held_back or train)[0], settings, args.cache, True, args.num_classes)
                logits = segment.predict(net.eval(), image, tuple(args.crop), batch=args.batch * args.crops_per_volume)
                figures.finetuning_report(out, config, image, label, logits.argmax(0).cpu())
            (leaving,) = ranks.agree(stop.asked)
            due = args.save_steps and step % args.save_steps == 0 or time.monotonic() - saved > 60 * args.save_minutes
            if ranks.is_main and improved:
                runtime.save_checkpoint(out / "best.pt", {
                    "model": net.state_dict(), "config": config, "step": step, "val_dice": best})
            if ranks.is_main and (due or leaving or step == total):
                runtime.save_checkpoint(out / "last.pt", {
                    "model": net.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                    "step": step, "samples": step * global_batch, "skipped": skipped, "best": best, "config": config,
                    "torch": str(torch.__version__)})
                saved = time.monotonic()
            if leaving:
                break
        bar.close()
        if ranks.is_main:
            crops_per_s = (step - first) * global_batch * args.crops_per_volume / (time.monotonic() - begun)
            print(f"{'done' if step == total else 'stopped'} at step {step}: best mean Dice {best:.3f}, "
                  f"{crops_per_s:.2f} crops/s, peak memory {runtime.peak_memory_mb(device):.0f} MiB; {out / 'best.pt'}")


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
