"""Sliding-window inference: a volume of any size through a network of one window [SMIT 3; nnU-Net].

To check against: monai.inferers.sliding_window_inference, which places and weighs
its windows alike.
"""
import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F


@torch.no_grad()
def sliding_window(net, volume, window, overlap=.5, blend="gaussian", batch=1, stitch_on_cpu=False):
    """Predict a whole volume window by window, averaged where windows overlap [SMIT 3].

    net: (n, C, *window) -> (n, num_classes, *window), n <= batch; its mode, device
        and autocast are the caller's.
    volume (B, C, D, H, W), on any device; padded with 0, evenly on both sides, where
        it is smaller than the window.
    window: three sizes; overlap: share of a window, 0 <= overlap < 1.
    blend: "gaussian" trusts a window's centre more than its border, "constant"
        weighs all voxels alike.
    stitch_on_cpu: keep only the windows on the net's device, not the volume.

    Returns logits (B, num_classes, D, H, W) float32 on the net's device, or the CPU;
    exactly the network's output where one window covers the volume. Raises ValueError
    for arguments or a network output that do not fit.
    """
    # differs: the release blends with constant weights (blend="constant")
    check_arguments(volume, window, overlap, blend, batch)
    device = device_of(net, volume)
    home = torch.device("cpu") if stitch_on_cpu else device
    padded, inner = pad_to_window(volume.to(home), window)              # one copy, not one a window

    places = window_places(padded.shape, window, overlap)
    one_window = len(places) == len(volume)                             # nothing to weigh or divide
    importance = importance_map(window, blend).to(home)
    total = None
    weight = torch.zeros(padded.shape[2:], device=home)
    for first in range(0, len(places), batch):
        chunk = places[first:first + batch]
        crops = torch.stack([padded[place] for place in chunk])            # (n, C, *window)
        logits = net(crops.to(device))                                   # (n, num_classes, *window)
        if logits.shape[:1] + logits.shape[2:] != (len(chunk), *window):
            raise ValueError(f"the network turned {len(chunk)} windows of {tuple(window)} into "
                             f"{tuple(logits.shape)}")

        if total is None:
            total = torch.zeros(len(volume), logits.shape[1], *padded.shape[2:], device=home)
        for place, window_logits in zip(chunk, logits.to(home, torch.float32)):
            if one_window:
                total[place] = window_logits
                continue
            total[place].addcmul_(window_logits, importance)
            sample, _, *box = place
            if sample == 0:                                                # alike in every sample
                weight[tuple(box)] += importance

    if not one_window:
        total.div_(weight)
    return total[inner]


def check_arguments(volume, window, overlap, blend, batch):
    """Refuse arguments that do not fit each other."""
    if volume.ndim != 5 or 0 in volume.shape:
        raise ValueError("the volume must be (B, C, D, H, W) and not empty, not "
                         f"{tuple(volume.shape)}")
    three_sides = not isinstance(window, int) and len(window) == 3
    if not three_sides or not all(isinstance(side, int) and side > 0 for side in window):
        raise ValueError(f"the window must be three positive whole numbers, not {window}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is a share of the window in 0 <= overlap < 1, not {overlap}")
    if blend not in ("gaussian", "constant"):
        raise ValueError(f"blend is 'gaussian' or 'constant', not {blend!r}")
    if batch < 1:
        raise ValueError(f"batch must be at least one window, not {batch}")


def device_of(net, volume):
    """Return the device of a network's parameters, or the volume's where it has none."""
    if isinstance(net, nn.Module):
        return next(net.parameters(), volume).device
    return volume.device


def pad_to_window(volume, window):
    """Pad a volume that is smaller than the window with 0, evenly on both sides.

    Returns (the padded volume, the slices that cut the volume out of it again).
    """
    padding = []                                                  # last axis first, as F.pad has it
    inner = []
    for size, side in zip(volume.shape[2:], window):
        missing = max(side - size, 0)
        before = missing // 2
        padding = [before, missing - before, *padding]
        inner.append(slice(before, before + size))
    if any(padding):
        volume = F.pad(volume, padding)
    return volume, (..., *inner)


def window_places(shape, window, overlap):
    """List the index of every window in a volume of `shape` (B, C, D, H, W), sample by sample."""
    starts = [window_starts(size, side, overlap) for size, side in zip(shape[2:], window)]
    places = []
    for sample in range(shape[0]):
        for corner in itertools.product(*starts):
            box = [slice(start, start + side) for start, side in zip(corner, window)]
            places.append((sample, slice(None), *box))
    return places


def window_starts(size, side, overlap):
    """List the first voxels of the windows along one axis.

    They go in equal steps; the last window is moved back to end with the volume.
    """
    step = max(int(side * (1 - overlap)), 1)
    count = math.ceil((size - side) / step) + 1
    return [min(number * step, size - side) for number in range(count)]


def importance_map(window, blend):
    """Weigh a window's voxels: (*window) float32 [nnU-Net; the least weight: MONAI].

    A Gaussian of sigma side / 8, at least .001; or 1.
    """
    weights = torch.ones(window)
    if blend == "gaussian":
        for axis, side in enumerate(window):
            offset = torch.arange(side) - (side - 1) / 2
            bell = torch.exp(-.5 * (offset / (side / 8)) ** 2)
            along_axis = [1, 1, 1]
            along_axis[axis] = side
            weights = weights * bell.view(along_axis)
    return weights.clamp(min=1e-3)
