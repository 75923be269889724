"""Fine-tune a pre-trained encoder to segment organs [SMIT 3].

    python finetune.py --preset tiny                                              # phantoms, two CPU cores, minutes
    torchrun --nproc_per_node=4 finetune.py --data dataset.json --init runs/ssl/student.pt
    python finetune.py --data dataset.json --init student.pt --num_train 5        # few labels; no --init: random weights
    python finetune.py --data dataset.json --modality mr --folds 5 --fold 0       # cross-validation

Writes OUT/best.pt (highest mean Dice on the held-back cases; what evaluate.py takes), OUT/last.pt (everything; --resume
goes on from it), OUT/log.csv and OUT/config.json.
"""
import argparse
import functools
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from smit import data, ema, losses, metrics, phantom, runtime, sampling, segment

MAX_STRIKES = 20  # steps in a row without a finite gradient; fp16's loss scaling alone takes a few at the start [ours]
COLUMNS = "step epoch lr loss grad_norm skipped val_dice best_dice".split()
FREE_ON_RESUME = {"resume", "overwrite", "out", "cache", "device", "workers", "batch", "log_every", "save_steps",
                  "save_minutes", "checkpointing", "preset", "sizes_given"}
PRESETS = {  # what differs from the flags' defaults
    "paper": {},
    "tiny": dict(spacing=[4.0, 4.0, 4.0], crop=[48], embed_dim=24, depths=[2, 2, 2], heads=[4, 4, 4], steps=1000,
                 batch=2, crops_per_volume=1, lr=2e-3, clip=3.0, workers=1, val_every=20, phantoms=20),
}
SPLITS = {  # numbers of the BTCV cases held back
    "smit21_9": [29, 30, 31, 32, 34, 36, 37, 39, 40],  # [release]
    "monai24_6": [35, 36, 37, 38, 39, 40],             # of MONAI's BTCV tutorials
}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="paper", help="sizes; single flags override it")
    add("--out", default="runs/finetune", help="output folder [ours]")
    add("--resume", action="store_true", help="continue OUT/last.pt")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    # ---- data
    add("--data", nargs="+", default=[], metavar="PATH", help="dataset.json files, text lists; none: phantoms")
    add("--key", default="training", help="split of a dataset.json to train on [MSD]")
    add("--val_key", default="validation", help="split to validate on; absent: --val_fraction of --key [MSD]")
    add("--val_fraction", type=float, default=0.1, help="share held back to validate on, without --val_key [ours]")
    add("--split", choices=SPLITS, help="hold back the BTCV cases of a published split, by the numbers in their names")
    add("--fold", type=int, help="hold back this one of --folds parts of --key, from 0; --val_key is left alone")
    add("--folds", type=int, default=5, help="parts, shuffled with seed 12345 [SMIT 3; nnU-Net]")
    add("--num_train", type=int, help="train on the first n of a shuffle of the --seed, the same for every method [ours]")
    add("--modality", choices=["ct", "mr"], default="ct", help="HU window for ct, percentiles for mr [SMIT 3]")
    add("--spacing", nargs=3, type=float, default=[1.5, 1.5, 2.0], metavar="MM", help="voxel size [release]")
    add("--hu_window", nargs=2, type=float, default=[-175.0, 250.0], metavar="HU", help="mapped to [0, 1] [release]")
    add("--crop", nargs="+", type=int, default=[96], help="voxels per axis of a crop, and of a window later [release]")
    add("--crops_per_volume", type=int, default=4, help="crops of a volume in one step [release]")
    add("--num_classes", type=int, help="with the background; default: the JSON's labels, else 14 [SMIT 3]")
    add("--cache", default="runs/cache", help="folder of prepared volumes, shared by runs [ours]")
    add("--phantoms", type=int, default=40, help="synthetic patients to make when there is no --data [ours]")
    add("--workers", type=int, default=4, help="loader processes per rank; 0 loads in the training process [ours]")
    # ---- network
    add("--init", metavar="PATH", help="student.pt or last.pt of train_ssl.py; none: random weights [SMIT 3]")
    add("--weights", choices=["student", "teacher"], default="student", help="which network of a last.pt [SMIT 2]")
    add("--partial_init", action="store_true", help="load what fits of --init, in place of refusing what does not")
    add("--freeze_encoder", action="store_true", help="train the decoder alone [ours]")
    add("--embed_dim", type=int, default=48, help="channels of the first stage [SMIT 3]; with --init: as pre-trained")
    add("--depths", nargs="+", type=int, default=[2, 2, 4, 2], help="blocks per stage [release]; so too")
    add("--heads", nargs="+", type=int, default=[4, 4, 4, 4], help="attention heads per stage [release]; so too")
    add("--window", nargs=3, type=int, default=[4, 4, 4], help="tokens per axis of a window [SMIT 3]; so too")
    add("--drop_path", type=float, default=0.0, help="of the encoder's last block [ours]")
    add("--checkpointing", action="store_true", help="recompute blocks in backward: less memory, more time")
    # ---- optimisation
    add("--epochs", type=int, default=1000, help="passes over the volumes [ours]")
    add("--steps", type=int, help="optimiser steps, in place of --epochs; the warm-up keeps its share")
    add("--warmup_epochs", type=float, default=50, help="of the learning rate [release]")
    add("--batch", type=int, default=1, help="volumes per GPU and step [release]")
    add("--lr", type=float, default=1e-4, help="peak learning rate of AdamW [release]")
    add("--layer_decay", type=float, default=1.0, help="factor of the learning rate per encoder block downwards; 1: off [BEiT]")
    add("--weight_decay", type=float, default=1e-5, help="on every parameter [release]")
    add("--clip", type=float, default=0.0, help="largest gradient norm; 0 clips nothing [release]")
    add("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto", help="auto: bf16 where the card has it, else fp16; fp32 on CPU [ours]")
    # ---- running
    add("--seed", type=int, default=0, help="of every random draw [ours]")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--log_every", type=int, default=10, help="steps between rows of log.csv [ours]")
    add("--val_every", type=float, default=30, help="epochs between validations [release]")
    add("--save_steps", type=int, default=0, help="steps between checkpoints; 0: by time alone [ours]")
    add("--save_minutes", type=float, default=10, help="minutes between checkpoints [ours]")
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(segment.SIZES))))
    parser.set_defaults(**PRESETS[given["preset"]])
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
        (args.fold is not None and not 0 <= args.fold < args.folds, f"--fold {args.fold} is not one of 0..{args.folds - 1}"),
        (args.num_train is not None and args.num_train < 1, "--num_train must be 1 or more"),
        (not 0 < args.layer_decay <= 1, f"--layer_decay {args.layer_decay} must lie in (0, 1]; 1 is off"),
        (args.freeze_encoder and not args.init, "--freeze_encoder without --init would freeze random weights"),
        (args.resume and args.overwrite, "--resume continues a run and --overwrite discards it: choose one"),
    ]
    for wrong, why in refuse:
        if wrong:
            raise ValueError(why)


def load_cases(args, ranks):
    """(training cases, validation cases, {id: organ}) of all sources; phantoms are made where there is no --data."""
    if not args.data:
        size = "x".join(f"{mm:g}" for mm in args.spacing)
        folder = Path(args.cache).parent / f"phantoms-{args.modality}-{args.phantoms}-{size}mm-seed{args.seed}"
        if ranks.is_main:
            print(f"no --data: training on {args.phantoms} synthetic patients, made in {folder}", flush=True)
        args.data = [str(phantom.write_dataset(folder, args.phantoms, args.modality, args.seed, args.spacing,
                                               ranks.rank, ranks.world))]
        ranks.barrier()
    cases = [case for path in args.data for case in data.read_list(path, args.key)]
    also = [path for path in args.data if path.endswith(".json") and args.val_key in json.loads(Path(path).read_text())]
    train, validation = hold_back(args, cases, [case for path in also for case in data.read_list(path, args.val_key)])
    twice = {case["image"] for case in train} & {case["image"] for case in validation}
    if twice or not train:
        raise ValueError(f"{min(twice)} is both to train and to validate on" if twice else "no case is left to train on")
    if args.num_train:
        order = torch.randperm(len(train), generator=sampling.generator(args.seed, "num_train")).tolist()
        if args.num_train > len(train):
            raise ValueError(f"--num_train {args.num_train}: only {len(train)} cases are there to train on")
        train = [train[i] for i in order[:args.num_train]]
    names = [data.label_names(path) for path in args.data]
    if any(other != names[0] for other in names):
        raise ValueError(f"{args.data[0]} and others number their labels differently: train on one of them")
    return train, validation, names[0] or {}


def hold_back(args, cases, listed):
    """Split into (train, validation) as --split, --fold, the list's own validation cases or --val_fraction say."""
    if args.split:
        def number(case):
            return int((re.findall(r"\d+", Path(case["image"]).name) or ["0"])[0])
        held = [case for case in cases + listed if number(case) in SPLITS[args.split]]
        if sorted(map(number, held)) != SPLITS[args.split]:
            raise ValueError(f"--split {args.split} holds back the cases {SPLITS[args.split]}; found {sorted(map(number, held))}")
        return [case for case in cases + listed if number(case) not in SPLITS[args.split]], held
    if args.fold is None and listed:
        return cases, listed
    if args.fold is None:
        order = torch.randperm(len(cases), generator=sampling.generator(args.seed, "held back")).tolist()
        chosen = order[:math.ceil(args.val_fraction * len(cases))]
    else:
        order = np.arange(len(cases))
        np.random.RandomState(12345).shuffle(order)              # nnU-Net's folds, where its cases are sorted by name
        chosen = np.array_split(order, args.folds)[args.fold].tolist()
    return [case for i, case in enumerate(cases) if i not in chosen], [cases[i] for i in chosen]


def prepare_cases(train, validation, settings, args, ranks):
    """Prepare this rank's share of all cases, so that each problem shows before step 1; warns of organs never labelled."""
    found = [False] * args.num_classes

    def prepare(case):
        image, label = data.cached(case, settings, args.cache, True, args.num_classes)
        if case in train:
            for organ in np.unique(label).tolist():
                found[organ] = True
    share = (train + validation)[ranks.rank::ranks.world]
    data.check_cases(share, labels=True)
    if share:
        data.check_cases(share, load=prepare)
    missing = [organ for organ, seen in enumerate(ranks.agree(*found)) if not seen]
    if missing and ranks.is_main:
        print(f"warning: no training case has label {missing}: the network cannot learn it")


def read_init(args, ranks):
    """The weights that --init names, or None; their encoder's sizes become those of this run. Warns of other inputs."""
    if not args.init:
        return None
    state = runtime.load_checkpoint(args.init)
    part = "model" if "model" in state else args.weights
    weights, theirs = state.get(part), state.get("config")
    if part == "model" and args.weights != "student":
        raise ValueError(f"{args.init} holds the student alone: give the run's last.pt for --weights {args.weights}")
    if not isinstance(weights, dict) or not isinstance(theirs, dict) or not theirs.keys() >= set(segment.SIZES):
        raise ValueError(f"{args.init} holds no pre-trained {args.weights}: give the student.pt or last.pt of train_ssl.py")
    for name in segment.SIZES:
        if args.sizes_given.get(name, theirs[name]) != theirs[name]:
            raise ValueError(f"--{name} {args.sizes_given[name]} contradicts {args.init}, whose encoder has {theirs[name]}")
        setattr(args, name, theirs[name])
    differ = [f"{name} {getattr(args, name)} here, {theirs.get(name)} there"
              for name in ("spacing", "modality", "hu_window") if getattr(args, name) != theirs.get(name)]
    if differ and ranks.is_main:
        print(f"warning: {args.init} was pre-trained on volumes prepared otherwise: {'; '.join(differ)}")
    return weights


def build_optimizer(net, args):
    """AdamW; the n-th encoder block below the decoder learns at lr * layer_decay^n, the embedding below all [BEiT]."""
    groups, starts = {}, np.cumsum([0, *args.depths]).tolist()
    for name, parameter in net.named_parameters():
        place = re.match(r"encoder\.(?:stages\.(\d+)\.(?:blocks\.(\d+)|merge)|norms\.(\d+))\.", name)
        if not name.startswith("encoder."):
            below = 0
        elif not place:
            below = starts[-1] + 1
        elif place[2]:
            below = starts[-1] - starts[int(place[1])] - int(place[2])
        else:                                                    # a merge or output norm goes with its stage's last block
            below = starts[-1] - starts[int(place[1] or place[3]) + 1] + 1
        if parameter.requires_grad:
            groups.setdefault(args.layer_decay ** below, []).append(parameter)
    return torch.optim.AdamW([dict(params=group, scale=scale) for scale, group in groups.items()], lr=args.lr,
                             weight_decay=args.weight_decay, fused=True)


def validate(net, cases, settings, args, autocast, ranks):
    """Mean Dice on the prepared grid: over the cases that have or are given an organ, then over organs [ours]."""
    net.eval()
    scores = torch.zeros(2, len(cases), args.num_classes - 1, dtype=torch.float64)               # values; which count
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
    ranks = runtime.start(args.device)
    device = ranks.device
    with runtime.OutputFolder(args.out, ranks, args.resume, args.overwrite) as out:
        # ------------------------------------------------------------------------------------------------------ data
        weights = read_init(args, ranks)
        train, held_back, names = load_cases(args, ranks)
        args.num_classes = args.num_classes or max(names, default=13) + 1
        settings = data.Preparation(tuple(args.spacing), args.modality, tuple(args.hu_window))
        prepare_cases(train, held_back, settings, args, ranks)
        global_batch = args.batch * ranks.world
        total = args.steps or -(-args.epochs * len(train) // global_batch)
        warmup = total * args.warmup_epochs / args.epochs

        # --------------------------------------------------------------------------------------- network, optimiser
        torch.manual_seed(args.seed)                     # --init changes the encoder alone: every method has one decoder
        net = segment.build_network(vars(args))
        report = segment.load_encoder(net, weights, args.partial_init) if weights else "encoder weights: random"
        net.to(device).encoder.requires_grad_(not args.freeze_encoder)
        optimizer = build_optimizer(net, args)
        precision = runtime.pick_precision(args.precision, device)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        autocast = functools.partial(torch.autocast, device.type, precision, precision != torch.float32)
        config = {**vars(args), "global_batch": global_batch, "total": total, "labels": names,
                  **{name: [Path(case["image"]).name for case in cases] for name, cases in (("train", train), ("held_back", held_back))}}
        step, strikes, skipped, best = 0, 0, 0, -1.0
        if state := runtime.load_latest(out, ranks):
            runtime.compare_settings(state["config"], config, FREE_ON_RESUME)
            for name, part in (("model", net), ("optimizer", optimizer), ("scaler", scaler)):
                part.load_state_dict(state[name])
            step, skipped, best = state["step"], state["skipped"], state["best"]

        if ranks.is_main:
            runtime.atomic_write(out / "config.json", lambda file: file.write(json.dumps(config, indent=1).encode()))
            print(f"{len(train)} volumes to train on, {len(held_back)} held back; steps {step} to {total}, each {args.batch} "
                  f"volumes x {args.crops_per_volume} crops x {ranks.world} ranks; {sum(p.numel() for p in net.parameters()):,} "
                  f"parameters; {device.type}, {str(precision)[6:]}\n{report}", flush=True)
        log = runtime.CsvLog(out / "log.csv", COLUMNS, ranks, step)
        # find_unused_parameters keeps DDP from reordering its sums after the first step: a resumed run is the same run
        wrapped = DistributedDataParallel(net, find_unused_parameters=True) if ranks.world > 1 else net
        crops = sampling.LabelledCrops(train, settings, args.cache, args.num_classes, args.crop, args.crops_per_volume,
                                       net.encoder.drops, args.seed)
        numbers = sampling.micro_batches(step * global_batch, total * global_batch, args.batch, ranks.rank, ranks.world)
        batches = sampling.batches(crops, numbers, args.workers)
        stop = runtime.StopSignals(ranks)
        bar = tqdm(total=total, initial=step, unit="step", disable=None if ranks.is_main else True)
        first, begun, saved = step, time.monotonic(), time.monotonic()

        # -------------------------------------------------------------------------------------------------- training
        while step < total:
            rate = ema.warmup_cosine(step + 0.5, warmup, total, args.lr)                         # the middle of this step
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            net.train().encoder.train(not args.freeze_encoder)
            batch = next(batches)
            images, labels, noise = (batch[name].flatten(0, 1).to(device) for name in ("images", "labels", "noise"))
            optimizer.zero_grad()
            with autocast():
                logits = wrapped(images, noise)                                                  # (B, num_classes, D, H, W)
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
                raise ValueError(f"step {step}: {strikes} steps in a row without a finite gradient (loss {loss.item()}); "
                                 "lower --lr, or try --precision bf16 or fp32; the last checkpoint is whole")
            bar.update()
            row = {}
            epochs = [done * global_batch / len(train) / args.val_every for done in (step - 1, step)]
            if held_back and (step == total or math.floor(epochs[0]) < math.floor(epochs[1])):
                row["val_dice"] = validate(net, held_back, settings, args, autocast, ranks)
            improved = row.get("val_dice", -1.0) > best or not held_back and step == total
            best = max(best, row.get("val_dice", -1.0))
            if row or step % args.log_every == 0 or step == total:
                row["loss"], row["grad_norm"] = ranks.mean(torch.stack([loss.detach(), norm])).tolist()
                log.row(step=step, epoch=step * global_batch / len(train), lr=rate, skipped=skipped, best_dice=best, **row)
                bar.set_postfix(loss=f"{row['loss']:.3f}", best=f"{best:.3f}")
            (leaving,) = ranks.agree(stop.asked)
            due = args.save_steps and step % args.save_steps == 0 or time.monotonic() - saved > 60 * args.save_minutes
            if ranks.is_main and improved:
                runtime.save_checkpoint(out / "best.pt", {"model": net.state_dict(), "config": config, "step": step, "val_dice": best})
            if ranks.is_main and (due or leaving or step == total):
                runtime.save_checkpoint(out / "last.pt", {
                    "model": net.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step,
                    "skipped": skipped, "best": best, "config": config, "torch": str(torch.__version__)})
                saved = time.monotonic()
            if leaving:
                break
        bar.close()
        if ranks.is_main:
            speed = (step - first) * global_batch * args.crops_per_volume / (time.monotonic() - begun)
            print(f"{'done' if step == total else 'stopped'} at step {step}: best mean Dice {best:.3f}, {speed:.2f} crops/s, peak "
                  f"memory {runtime.peak_memory_mb(device):.0f} MiB, weights in {out / 'best.pt'}")


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
