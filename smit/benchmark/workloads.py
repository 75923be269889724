"""The pieces of work that benchmark.py times, ours and MONAI's: encoder to loader, in the order of its rows.

Each takes `at`, the settings as `complete` makes them, and returns a function that does the work once; that one may
return {part: seconds}. MONAI is imported here alone, when a contestant asks for it.
"""
import functools
import gzip
import importlib
import itertools
import multiprocessing
import os
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from smit import data, ema, losses, phantom, pretrain, runtime, segment
from smit.data import samples as sampling
from smit.heads import LinearVoxelHead
from smit.masking import expand_mask, random_block_mask
from smit.sliding import sliding_window
from smit.swin import SwinTransformer3D

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def complete(settings):
    """The settings as attributes, with the few functions that depend on them."""
    at = SimpleNamespace(**settings, dtype=DTYPES[settings["precision"]], wrap=lambda net: net, settings=settings)
    at.scaler = torch.amp.GradScaler(at.device, enabled=at.dtype == torch.float16)
    at.compiled = lambda net: torch.compile(net) if at.compile else net

    def clock():
        if at.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
    at.clock = clock
    return at


def learn(at, forward, parameters):
    """Forward under autocast, then backward; loss scaled if it is fp16."""
    for parameter in parameters:
        parameter.grad = None
    with torch.autocast(at.device, at.dtype, at.dtype != torch.float32):
        loss = forward()
    at.scaler.scale(loss).backward()


def mean_of(outputs):
    return sum(y.float().mean() for y in outputs)


def views(at, n):
    return torch.rand(n, 1, *[at.view] * 3, device=at.device)


def encoder(at):
    net = at.compiled(SwinTransformer3D(embed_dim=at.dim, checkpointing=at.checkpointing).to(at.device))
    x = views(at, at.batch)
    return lambda: learn(at, lambda: mean_of(net(x)), net.parameters())


def monai_encoder(at):
    net = monai_swin(at)
    x = views(at, at.batch)
    return lambda: learn(at, lambda: mean_of(net(x)), net.parameters())


def monai_swin(at):
    nets = importlib.import_module("monai.networks.nets.swin_unetr")
    return nets.SwinTransformer(1, at.dim, (4,) * 3, (2,) * 3, (2, 2, 4, 2), (4,) * 4, qkv_bias=False, patch_norm=True,
                                spatial_dims=3).to(at.device)


def step(at):
    """The whole of train_ssl.py's step: teacher, student, three losses, backward, clipping, AdamW, EMA, centres."""
    student = pretrain.SMIT(dict(embed_dim=at.dim, drop_path=.3, checkpointing=at.checkpointing), head_width=at.width,
                            prototypes=at.prototypes).to(at.device)
    teacher, n = student.make_teacher(), 2 * at.batch
    x, cells = views(at, n), random_block_mask(n, [at.view // 16] * 3, .7).to(at.device)
    noise = torch.rand(n, student.encoder.drops, device=at.device)
    centers = [losses.Center(at.prototypes).to(at.device) for _ in range(2)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-4, weight_decay=.01, fused=True)
    wrapped, taught_by = at.compiled(at.wrap(student)), at.compiled(teacher)

    def once():
        parts, begun = {}, [at.clock()]

        def lap(part):
            begun.append(at.clock())
            parts[part] = begun[-1] - begun[-2]
        optimizer.zero_grad()
        with torch.autocast(at.device, at.dtype, at.dtype != torch.float32):
            with torch.no_grad():
                taught = taught_by(x)
            lap("teacher")
            learned = wrapped(x, expand_mask(cells, 8), noise)
        lap("student")
        temps = dict(student_temp=.1, teacher_temp=.04)
        patch, image = (center.value for center in centers)
        loss = (losses.mip_loss(learned.voxels, x, expand_mask(cells, 16))
                + .1 * losses.mpd_loss(learned.patch_logits, taught.patch_logits, cells.flatten(1), patch, **temps)
                + .1 * losses.itd_loss(learned.image_logits, taught.image_logits.roll(n // 2, 0), image, **temps))
        lap("losses")
        at.scaler.scale(loss).backward()
        lap("backward")
        at.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 3.)
        at.scaler.step(optimizer)
        at.scaler.update()
        lap("clip, AdamW")
        ema.update_teacher(teacher, student, .996)
        for center, logits in zip(centers, (taught.patch_logits, taught.image_logits)):
            center.update(logits)
        lap("EMA, centres")
        return parts
    return once


def monai_step(at):
    """Less than a step: MONAI's encoder, our linear head and masked L1, both views; no teacher, heads or optimiser."""
    net, head = monai_swin(at), LinearVoxelHead(16 * at.dim).to(at.device)
    x, cells = views(at, 2 * at.batch), random_block_mask(2 * at.batch, [at.view // 16] * 3, .7).to(at.device)
    hidden = expand_mask(cells, 16)
    forward = lambda: losses.mip_loss(head(net(x * ~hidden[:, None])[-1]), x, hidden)
    return lambda: learn(at, forward, [*net.parameters(), *head.parameters()])


def finetune(at, peer=False):
    """A step of finetune.py, 14 classes; the peer is MONAI's SwinUNETR with our loss and optimiser."""
    if peer:
        net = importlib.import_module("monai.networks.nets").SwinUNETR(1, 14, feature_size=at.dim)
    else:
        net = segment.SegmentationNet(14, embed_dim=at.dim, checkpointing=at.checkpointing)
    net = at.compiled(net.to(at.device))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    x, label = views(at, at.batch), torch.randint(14, (at.batch, *[at.view] * 3), device=at.device)

    def once():
        learn(at, lambda: losses.dice_ce_loss(net(x), label), net.parameters())
        at.scaler.step(optimizer)
        at.scaler.update()
    return once


def sliding(at, peer=False, tiny=False):
    """Logits of a whole volume; tiny: a narrow network and half the window, where stitching weighs more."""
    sizes = dict(embed_dim=at.dim // 3, depths=(2, 2, 2), heads=(2, 4, 4)) if tiny else dict(embed_dim=at.dim)
    net = segment.SegmentationNet(14, **sizes).to(at.device).eval()
    volume, window = torch.rand(1, 1, *at.volume, device=at.device), (at.view // 2 if tiny else at.view,) * 3
    batch = 4 if tiny else 1                   # alone, small windows fall to a slow convolution of torch's
    infer = functools.partial(sliding_window, net, volume, window, batch=batch)
    if peer:
        theirs = importlib.import_module("monai.inferers").sliding_window_inference
        infer = functools.partial(theirs, volume, window, batch, net, overlap=.5, mode="gaussian")

    def once():
        with torch.no_grad(), torch.autocast(at.device, at.dtype, at.dtype != torch.float32):
            infer()
    return once


def write_ct(path, shape):
    """A phantom's middle, stretched over `shape` voxels of .8 x .8 x 1 mm in LPS order, int16 .nii.gz; its path."""
    body, _, _ = phantom.make_patient(0, 0, spacing_mm=(3., 3., 4.))
    nearest = np.ix_(*(np.arange(n) * side // n for n, side in zip(shape, body.shape)))
    voxels = body[nearest] + np.random.default_rng(0).integers(-8, 9, shape, dtype=np.int16)
    header = bytearray(352)                                             # NIfTI-1, field by field
    for place, form, *values in ((0, "<i", 348), (40, "<8h", 3, *shape, 1, 1, 1, 1), (70, "<2h", 4, 16),
                                 (76, "<8f", 1, .8, .8, 1, 0, 0, 0, 0), (108, "<2f", 352, 1), (254, "<h", 1),
                                 (280, "<12f", -.8, 0, 0, 200, 0, -.8, 0, 200, 0, 0, 1, -150), (344, "<4s", b"n+1")):
        struct.pack_into(form, header, place, *values)
    Path(path).write_bytes(gzip.compress(bytes(header) + voxels.tobytes("F"), 1))
    return str(path)


def prepare(at, peer=False):
    """A .nii.gz CT to the network's input: read, orient, resample to 1.5 x 1.5 x 2 mm, window, crop to the body."""
    path = at.folder / f"{'x'.join(map(str, at.ct))}.nii.gz"
    if not peer:
        return lambda: data.load_case({"image": str(path), "label": None}) and None
    t = importlib.import_module("monai.transforms")
    chain = t.Compose([t.LoadImage(ensure_channel_first=True), t.Orientation("RAS"), t.Spacing((1.5, 1.5, 2)),
                       t.ScaleIntensityRange(-175, 250, 0, 1, clip=True), t.CropForeground()])
    return lambda: [chain(path)] and None


def headers(at, volumes):
    """What a run does for each of its volumes before the first step: find the file, check its header."""
    folder = at.folder / f"{volumes} volumes"
    folder.mkdir()
    for n in range(volumes):
        os.link(at.folder / f"{'x'.join(map(str, at.ct))}.nii.gz", folder / f"{n}.nii.gz")
    return lambda: data.check_cases(data.read_lists([folder])[0])


def loader(at, workers=0):
    """Eight pairs of views with their masks, of volumes already in the cache, the loader running already."""
    case = {"image": str(at.folder / f"{'x'.join(map(str, at.ct))}.nii.gz"), "label": None}
    pairs = sampling.ViewPairs([case], data.Preparation(), at.folder / "cache", [at.view * 4 // 3] * 3, [at.view] * 3,
                               16, .7, drops=20)
    batches = sampling.batches(pairs, ([number] for number in itertools.count()), workers)
    return lambda: [next(batches) for _ in range(8)] and None


def ranks(at, world=1):
    """Two pairs a step: in one process with all threads, or in two with half of them each."""
    if world == 1:
        return step(at)
    threads = max(1, torch.get_num_threads() // 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(at.port), WORLD_SIZE="2", RANK="0")
    multiprocessing.get_context("spawn").Process(target=second_rank, args=(at.settings, threads), daemon=True).start()
    return distributed(at, threads)


def distributed(at, threads):
    torch.set_num_threads(threads)
    runtime.start(at.device)
    once = step(SimpleNamespace(**vars(at) | dict(
        wrap=functools.partial(DistributedDataParallel, find_unused_parameters=True))))

    def together():
        torch.distributed.barrier()                        # the second rank rests here while it is another's turn
        return once()
    return together


def second_rank(settings, threads):
    os.environ["RANK"] = "1"
    once = distributed(complete(settings), threads)
    while True:                                            # until the first ends
        once()
