"""The pieces of work that are timed, ours and MONAI's, from the encoder to the loader [ours].

Each takes `at`, the settings of a contestant, and returns a function that does the work once.
That one may return {part: seconds}. MONAI is imported here alone, where a contestant asks for it.
"""
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

from smit import data, ema, losses, phantom, runtime, segment
from smit.data import samples
from smit.heads import LinearVoxelHead
from smit.masking import expand_mask, random_block_mask
from smit.sliding import sliding_window
from smit.swin import SwinTransformer3D

CELL = 16  # voxels per axis of what the mask hides [SMIT 3]
CLASSES = 14
PAIRS = 64  # that the loader hands over at a time: many more than the 2 a worker that lie ready


class Setting(SimpleNamespace):
    """The settings of a contestant, by the names of measure.DEFAULTS and of its sizes."""

    def __init__(self, settings):
        super().__init__(**settings)
        self.settings = settings
        self.precision = runtime.Precision(settings["precision"], torch.device(settings["device"]))

    def clock(self):
        """Return the time in seconds, once the device has done what it was asked."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def views(self, n):
        return torch.rand(n, 1, self.view, self.view, self.view, device=self.device)

    def ct_path(self):
        return self.folder / f"{'x'.join(map(str, self.ct))}.nii.gz"


def learn(at, forward, parameters):
    """Run a forward that gives a loss under autocast, then backward; the loss of fp16 is scaled."""
    for parameter in parameters:
        parameter.grad = None
    with at.precision.autocast():
        loss = forward()
    at.precision.scaler.scale(loss).backward()


def mean_of(outputs):
    return sum(output.float().mean() for output in outputs)


# ---------------------------------------------------------------- encoder
def our_encoder(at):
    net = SwinTransformer3D(embed_dim=at.dim, checkpointing=at.checkpointing).to(at.device)
    if at.compiled:
        net.compile_blocks(backend=at.backend)
    return net


def monai_encoder(at, flash=False):
    nets = importlib.import_module("monai.networks.nets.swin_unetr")
    net = nets.SwinTransformer(
        1, at.dim, window_size=(4, 4, 4), patch_size=(2, 2, 2), depths=(2, 2, 4, 2),
        num_heads=(4, 4, 4, 4), qkv_bias=False, patch_norm=True, spatial_dims=3,
        use_flash_attention=flash).to(at.device)
    return torch.compile(net, backend=at.backend) if at.compiled else net


def encoder(at):
    """Run the encoder forward and backward."""
    return forward_and_backward(at, our_encoder(at))


def encoder_monai(at):
    return forward_and_backward(at, monai_encoder(at))


def forward_and_backward(at, net):
    x = at.views(at.batch)
    return lambda: learn(at, lambda: mean_of(net(x)), net.parameters())


def inference(at):
    """Run the encoder forward without gradient, as teacher and prediction do."""
    return forward_alone(at, our_encoder(at))


def inference_monai(at):
    return forward_alone(at, monai_encoder(at))


def inference_monai_flash(at):
    return forward_alone(at, monai_encoder(at, flash=True))


def forward_alone(at, net):
    net.eval()
    x = at.views(at.batch)

    def once():
        with torch.no_grad(), at.precision.autocast():
            net(x)
    return once


# ---------------------------------------------------------------- pre-training
def step(at):
    """Take steps of train_ssl.py: its networks, its losses and its optimiser on one batch."""
    script = importlib.import_module("train_ssl")
    flags = ["--view", at.view, "--embed_dim", at.dim, "--prototypes", at.prototypes,
             "--head_width", at.width, *["--checkpointing"] * at.checkpointing]
    args = script.parse_arguments([str(flag) for flag in flags])

    student, teacher, centers = script.build_networks(args)
    for network in (student, teacher, centers):
        network.to(at.device)
    if at.compiled:
        student.encoder.compile_blocks(backend=at.backend)
        teacher.encoder.compile_blocks(backend=at.backend)
    optimizer = script.build_optimizer(student, args)
    scaler = at.precision.scaler
    weights = {"mip": args.mip, "mpd": args.mpd, "itd": args.itd}
    batch = batch_of_views(at, student.encoder.drops)
    wrapped = student
    if torch.distributed.is_initialized():
        wrapped = DistributedDataParallel(student, find_unused_parameters=True)

    def once():
        times = [time.perf_counter()]
        optimizer.zero_grad()
        terms, from_teacher = script.smit_losses(args, wrapped, teacher, centers, batch,
                                                 teacher_temp=0.04, precision=at.precision)
        loss = sum(weights[name] * term for name, term in terms.items())
        times.append(time.perf_counter())

        scaler.scale(loss).backward()
        centers["mpd"].collect(from_teacher.patch_logits)
        centers["itd"].collect(from_teacher.image_logits)
        times.append(time.perf_counter())

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
        assert norm.isfinite()  # a step's one wait for the card
        scaler.step(optimizer)
        scaler.update()
        ema.update_teacher(teacher, student, momentum=0.996)
        for center in centers.values():
            center.update()
        times.append(time.perf_counter())
        if at.device == "cuda":  # it works on while the host's clock is read
            return None
        return dict(zip(("forward, losses", "backward", "update"), np.diff(times).tolist()))

    return once


def batch_of_views(at, drops):
    """Make what the loader gives for a batch of pairs, in pinned memory where a GPU fetches it."""
    grid = [at.view // CELL] * 3
    batch = {
        "views": torch.randint(256, (at.batch, 2, 1, *[at.view] * 3), dtype=torch.uint8),
        "hidden": random_block_mask(2 * at.batch, grid, 0.7).unflatten(0, (at.batch, 2)),
        "noise": torch.rand(at.batch, 2, drops),
    }
    if at.device == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return batch


def step_monai(at):
    """Do less than a step: MONAI's encoder, our linear head and masked L1 on both views.

    There is no teacher, no projection head and no optimiser.
    """
    net, head = monai_encoder(at), LinearVoxelHead(16 * at.dim).to(at.device)
    x = at.views(2 * at.batch)
    cells = random_block_mask(2 * at.batch, [at.view // CELL] * 3, 0.7).to(at.device)
    hidden = expand_mask(cells, CELL)
    corrupted = x * ~hidden[:, None]
    parameters = [*net.parameters(), *head.parameters()]
    return lambda: learn(at, lambda: losses.mip_loss(head(net(corrupted)[-1]), x, hidden),
                         parameters)


# ---------------------------------------------------------------- two ranks
def ranks(at):
    """Step on two pairs: in one process with all threads, or in two with half of them each."""
    if at.world == 1:
        return step(at)
    threads = max(1, torch.get_num_threads() // 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(at.port), WORLD_SIZE="2", RANK="0")
    spawn = multiprocessing.get_context("spawn")
    spawn.Process(target=second_rank, args=(at.settings, threads), daemon=True).start()
    return step_together(at, threads)


def step_together(at, threads):
    torch.set_num_threads(threads)
    runtime.start(at.device)
    once = step(at)

    def together():
        torch.distributed.barrier()  # the second rank rests here while it is another's turn
        return once()
    return together


def second_rank(settings, threads):
    """Step with the first rank until that one ends."""
    os.environ["RANK"] = "1"
    once = step_together(Setting(settings), threads)
    while True:
        once()


# ---------------------------------------------------------------- fine-tuning, prediction
def finetune(at):
    """Take steps of fine-tuning, 14 classes."""
    net = segment.SegmentationNet(CLASSES, embed_dim=at.dim, checkpointing=at.checkpointing)
    if at.compiled:
        net.encoder.compile_blocks(backend=at.backend)
    return segmentation_step(at, net)


def finetune_monai(at):
    """Do the same with MONAI's SwinUNETR, our loss and our optimiser."""
    net = importlib.import_module("monai.networks.nets").SwinUNETR(1, CLASSES, feature_size=at.dim)
    return segmentation_step(at, torch.compile(net, backend=at.backend) if at.compiled else net)


def segmentation_step(at, net):
    net.to(at.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    scaler = at.precision.scaler
    x = at.views(at.batch)
    label = torch.randint(CLASSES, (at.batch, *x.shape[2:]), device=at.device)

    def once():
        learn(at, lambda: losses.dice_ce_loss(net(x), label), net.parameters())
        scaler.step(optimizer)
        scaler.update()
    return once


def sliding(at):
    """Predict a whole volume, with our stitching."""
    net, volume, window, batch = volume_to_predict(at)
    return without_gradient(at, lambda: sliding_window(net, volume, window, batch=batch))


def sliding_monai(at):
    """Predict it with MONAI's stitching and the same network."""
    infer = importlib.import_module("monai.inferers").sliding_window_inference
    net, volume, window, batch = volume_to_predict(at)
    return without_gradient(
        at, lambda: infer(volume, window, batch, net, overlap=0.5, mode="gaussian"))


def volume_to_predict(at):
    """Return network, volume, window and windows at a time.

    at.tiny: a narrow network and half the window, where stitching weighs more.
    """
    volume = torch.rand(1, 1, *at.volume, device=at.device)
    if at.tiny:
        sizes = dict(embed_dim=at.dim // 3, depths=(2, 2, 2), heads=(2, 4, 4))
        window = (at.view // 2,) * 3
        batch = 4  # alone, small windows fall to a slow convolution of torch's
    else:
        sizes = dict(embed_dim=at.dim)
        window = (at.view,) * 3
        batch = 1
    net = segment.SegmentationNet(CLASSES, **sizes).to(at.device).eval()
    return net, volume, window, batch


def without_gradient(at, predict):
    def once():
        with torch.no_grad(), at.precision.autocast():
            predict()
    return once


# ---------------------------------------------------------------- data
def write_ct(path, shape):
    """Write a phantom's middle as an int16 CT of `shape` voxels; return its path.

    A .nii.gz of .8 x .8 x 1 mm voxels in LPS order.
    """
    body, _, _ = phantom.make_patient(0, 0, spacing_mm=(3., 3., 4.))
    nearest = np.ix_(*(np.arange(n) * side // n for n, side in zip(shape, body.shape)))
    noise = np.random.default_rng(0).integers(-8, 9, shape, dtype=np.int16)
    voxels = body[nearest] + noise

    header = bytearray(352)  # NIfTI-1, field by field: place, form, values
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *shape, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 4, 16)                          # int16
    struct.pack_into("<8f", header, 76, 1, .8, .8, 1, 0, 0, 0, 0)       # mm
    struct.pack_into("<2f", header, 108, 352, 1)                        # offset, slope
    struct.pack_into("<h", header, 254, 1)                              # sform
    struct.pack_into("<12f", header, 280, -.8, 0, 0, 200, 0, -.8, 0, 200, 0, 0, 1, -150)
    struct.pack_into("<4s", header, 344, b"n+1")
    Path(path).write_bytes(gzip.compress(bytes(header) + voxels.tobytes("F"), 1))
    return str(path)


def prepare(at):
    """Turn a .nii.gz CT into the network's input.

    Read, orient, resample to 1.5 x 1.5 x 2 mm, window, crop to the body.
    """
    case = {"image": str(at.ct_path()), "label": None}

    def once():
        data.load_case(case)
    return once


def prepare_monai(at):
    t = importlib.import_module("monai.transforms")
    chain = t.Compose([
        t.LoadImage(ensure_channel_first=True), t.Orientation("RAS"), t.Spacing((1.5, 1.5, 2)),
        t.ScaleIntensityRange(-175, 250, 0, 1, clip=True), t.CropForeground()])

    def once():
        chain(at.ct_path())
    return once


def headers(at):
    """Do for each volume what a run does before its first step: find the file, check its header."""
    folder = at.folder / f"{at.volumes} volumes"
    folder.mkdir()
    for n in range(at.volumes):
        os.link(at.ct_path(), folder / f"{n}.nii.gz")

    def once():
        cases, _ = data.read_lists([folder])
        data.check_cases(cases)
    return once


def loader(at):
    """Load pairs of views with their masks from the cache, the loader running already."""
    case = {"image": str(at.ct_path()), "label": None}
    crop, view = [at.view * 4 // 3] * 3, [at.view] * 3
    pairs = samples.ViewPairs([case], data.Preparation(), at.folder / "cache", crop, view, CELL,
                              mask_ratio=0.7, drops=20)
    numbers = ([number] for number in itertools.count())
    batches = samples.load_batches(pairs, numbers, at.workers)
    next(batches)                      # the cache is filled now

    def once():
        for _ in range(PAIRS):
            next(batches)
    return once
