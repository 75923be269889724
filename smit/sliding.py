"""Sliding-window inference: a volume of any size through a network that takes one window [SMIT 3; nnU-Net].

Check against: monai.inferers.sliding_window_inference, which places and weighs its windows alike.
"""

import itertools
import math

import torch
import torch.nn.functional as F


@torch.no_grad()
def sliding_window(net, volume, window, overlap=.5, blend="gaussian", batch=1, stitch_on_cpu=False):
    """Logits of a whole volume, averaged where windows overlap [SMIT 3].

    net: (n, C, *window) -> (n, num_classes, *window), n <= batch; its mode, device and autocast are the caller's.
    volume (B, C, D, H, W), on any device; padded with 0, evenly on both sides, where it is smaller than the window.
    window: three sizes; overlap: share of a window, 0 <= overlap < 1; blend: "gaussian" trusts a window's centre more
    than its border, "constant" weighs all voxels alike; stitch_on_cpu: keep only the windows on the net's device.
    Returns (B, num_classes, D, H, W) float32 on the net's device, or the CPU; exactly the network's output where one
    window covers the volume. Raises ValueError for arguments or a network output that do not fit.
    """
    # differs: the release blends with constant weights (blend="constant")
    check(volume, window, overlap, blend, batch)
    device = (next(net.parameters(), volume) if isinstance(net, torch.nn.Module) else volume).device
    home = torch.device("cpu") if stitch_on_cpu else device

    spare = [max(side - size, 0) for side, size in zip(window, volume.shape[2:])]
    before = [n // 2 for n in spare]
    padded = F.pad(volume, [n for b, s in zip(before[::-1], spare[::-1]) for n in (b, s - b)]) if any(spare) else volume
    original = (..., *(slice(b, b + size) for b, size in zip(before, volume.shape[2:])))

    starts = [window_starts(size, side, overlap) for size, side in zip(padded.shape[2:], window)]
    places = [(sample, slice(None), *(slice(at, at + side) for at, side in zip(corner, window)))
              for sample in range(len(volume)) for corner in itertools.product(*starts)]
    alone = len(places) == len(volume)                                # one window is all: nothing to weigh or divide
    importance = importance_map(window, blend).to(home)
    total, weight = None, torch.zeros(padded.shape[2:], device=home)
    for first in range(0, len(places), batch):
        chunk = places[first:first + batch]
        logits = net(torch.stack([padded[place] for place in chunk]).to(device))
        if logits.shape[:1] + logits.shape[2:] != (len(chunk), *window):
            raise ValueError(f"the network turned {len(chunk)} windows of {tuple(window)} into {tuple(logits.shape)}")
        if total is None:
            total = torch.zeros(len(volume), logits.shape[1], *padded.shape[2:], device=home)
        for place, window_logits in zip(chunk, logits.to(home, torch.float32)):
            if alone:
                total[place] = window_logits
                continue
            total[place].addcmul_(window_logits, importance)
            if place[0] == 0:                                         # the grid is the same in every sample
                weight[place[2:]] += importance
    return total[original] if alone else total.div_(weight)[original]


def check(volume, window, overlap, blend, batch):
    """Refuses arguments that do not fit each other."""
    if volume.ndim != 5 or 0 in volume.shape:
        raise ValueError(f"the volume must be (B, C, D, H, W) and not empty, not {tuple(volume.shape)}")
    if isinstance(window, int) or len(window) != 3 or not all(isinstance(side, int) and side > 0 for side in window):
        raise ValueError(f"the window must be three positive whole numbers, not {window}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is a share of the window in 0 <= overlap < 1, not {overlap}")
    if blend not in ("gaussian", "constant"):
        raise ValueError(f"blend is 'gaussian' or 'constant', not {blend!r}")
    if batch < 1:
        raise ValueError(f"batch must be at least one window, not {batch}")


def window_starts(size, side, overlap):
    """First voxels of the windows along one axis: equal steps, the last window moved back to end with the volume."""
    step = max(int(side * (1 - overlap)), 1)
    return [min(n * step, size - side) for n in range(math.ceil((size - side) / step) + 1)]


def importance_map(window, blend):
    """Weights (*window) float32 of a window's voxels: a Gaussian of sigma side / 8, at least .001, or 1 [nnU-Net]."""
    weights = torch.ones(window)
    if blend == "gaussian":
        for axis, side in enumerate(window):
            offset = torch.arange(side) - (side - 1) / 2
            bell = torch.exp(-.5 * (offset / (side / 8)) ** 2)
            weights = weights * bell.view([-1 if axis == i else 1 for i in range(3)])
    return weights.clamp(min=1e-3)
