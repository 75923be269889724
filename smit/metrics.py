"""Scores of a segmentation against its label, and statistics over cases [SMIT 3].

Absent organs, in one policy for all three scores:
    absent from both prediction and label     nan        nothing to score: left out of every mean
    present in one of the two only            a miss     Dice 0, surface Dice 0, HD95 inf
An infinite HD95 cannot be averaged. So whoever averages it says whether a miss is
excluded or takes a stated penalty, and how many there were. The background (id 0) is
never scored. Scores take numpy arrays or tensors and are computed on the CPU,
where the surface search takes a second or two for 13 organs of 256 x 256 x 150 voxels.

To check against: monai.metrics, scipy.stats.wilcoxon.
Reading order: the scores, the surface search, statistics.
"""
import math

import numpy as np
import torch
from torch.nn import functional as F


# ---------------------------------------------------------------- the scores
def dice(pred, label, num_classes):
    """Return the DSC of each foreground class, 2 |P and L| / (|P| + |L|) [SMIT 3].

    pred, label: label maps of one shape, whole numbers in 0..num_classes-1 of any dtype.
    Returns (num_classes-1,) float64 array for the ids 1, 2, ...; absent organs as stated
    at the top of the file. Raises ValueError for other shapes or values.
    """
    pred, label = to_numpy(pred), to_numpy(label)
    if pred.shape != label.shape or not label.size:
        raise ValueError(f"prediction {pred.shape} and label {label.shape} must have one "
                         "non-empty shape")
    check_ids(pred, num_classes, "prediction")
    check_ids(label, num_classes, "label")

    pairs = label.astype(np.int64).ravel() * num_classes + pred.astype(np.int64).ravel()
    voxels = np.bincount(pairs, minlength=num_classes ** 2)
    voxels = voxels.reshape(num_classes, num_classes)                      # (label, pred)
    overlap = voxels.diagonal()[1:]
    size = (voxels.sum(0) + voxels.sum(1))[1:]                             # |P| + |L|
    scores = np.full(num_classes - 1, math.nan)
    return np.divide(2 * overlap, size, out=scores, where=size > 0)


def check_ids(ids, num_classes, name):
    """Raise ValueError unless a label map holds whole numbers in 0..num_classes-1."""
    low, high = ids.min(), ids.max()
    whole = ids.dtype.kind != "f" or not (ids % 1).any()
    if not (0 <= low and high < num_classes and whole):
        raise ValueError(f"{name} must hold whole numbers in 0..{num_classes - 1}, "
                         f"found {low} to {high}")


def hd95(pred, label, spacing):
    """Return the 95th percentile Hausdorff distance in mm [ours, as MONAI].

    It is the larger of the two directions' percentiles. Arguments and errors as
    surface_distances; nan if both masks are empty, inf if one is.
    """
    return hausdorff_95(*surface_distances(pred, label, spacing))


def surface_dice(pred, label, spacing, tolerance_mm):
    """Return the share of both surfaces that lies near the other surface [ours, as MONAI].

    Near: within tolerance_mm. Surface voxels are counted, each once, however large an
    area it stands for. nan if both masks are empty, 0 if one is.
    """
    return share_within(*surface_distances(pred, label, spacing), tolerance_mm)


def hausdorff_95(pred_to_label, label_to_pred):
    """Return HD95 from surface_distances' output, so that one search serves two scores [ours]."""
    if len(pred_to_label) == len(label_to_pred) == 0:
        return math.nan
    if len(pred_to_label) == 0 or len(label_to_pred) == 0:
        return math.inf
    there = float(np.percentile(pred_to_label.numpy(), 95))
    back = float(np.percentile(label_to_pred.numpy(), 95))
    return max(there, back)


def share_within(pred_to_label, label_to_pred, tolerance_mm):
    """Return surface Dice from the output of surface_distances [ours]."""
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"the tolerance must be a finite distance in mm, not {tolerance_mm}")
    distances = torch.cat([pred_to_label, label_to_pred])
    # distances come in steps of the spacing, so many equal the tolerance: 10 nm keep
    # rounding from deciding for them
    return (distances <= tolerance_mm + 1e-5).double().mean().item()


# --------------------------------------------------------------- surface search
def surface_distances(pred, label, spacing):
    """Measure each surface voxel's exact distance to the nearest one of the other mask.

    pred, label: (D, H, W) masks of one shape; spacing: three voxel sizes in mm. A
    surface voxel has one of its six neighbours outside the mask, and what lies beyond
    the volume is outside.
    Returns (pred_to_label, label_to_pred): float32 vectors in mm, in no particular
    order, one value per surface voxel; inf where the other mask is empty. Raises
    ValueError for shapes or spacings that do not fit.
    """
    pred, label = to_mask(pred), to_mask(label)
    spacing = np.ravel(spacing).tolist()
    if pred.shape != label.shape or pred.ndim != 3:
        raise ValueError(f"masks must have one 3-D shape, not {tuple(pred.shape)} and "
                         f"{tuple(label.shape)}")
    if len(spacing) != 3 or not all(0 < size < math.inf for size in spacing):
        raise ValueError(f"spacing must be three positive sizes in mm, not {spacing}")

    # the cheapest order of axes for nearest(): longest, shortest, middle
    box = bounding_box(pred | label)
    shortest, middle, longest = sorted(range(3), key=lambda axis: box[axis].stop - box[axis].start)
    order = (longest, shortest, middle)
    pred_surface = surface(pred[box]).permute(order)
    label_surface = surface(label[box]).permute(order)
    spacing = [spacing[axis] for axis in order]
    return (nearest(pred_surface, label_surface, spacing),
            nearest(label_surface, pred_surface, spacing))


def to_mask(values):
    """Copy a mask of any kind to a contiguous bool tensor."""
    return torch.from_numpy(np.array(to_numpy(values), dtype=bool, order="C"))


def bounding_box(mask):
    """Return three slices around the True voxels of mask (D, H, W).

    They are empty slices if there are none.
    """
    flat = mask.any(0)                                                     # (H, W)
    lines = [mask.flatten(1).any(1), flat.any(1), flat.any(0)]
    box = []
    for line in lines:
        used = line.nonzero()
        if len(used):
            box.append(slice(int(used[0]), int(used[-1]) + 1))
        else:
            box.append(slice(0, 0))
    return tuple(box)


def surface(mask):
    """Find the voxels of mask (D, H, W) with a face neighbour outside it.

    It is the mask minus its 6-connected erosion.
    """
    around = F.pad(mask, (1, 1, 1, 1, 1, 1))
    inside = (mask
              & around[2:, 1:-1, 1:-1] & around[:-2, 1:-1, 1:-1]
              & around[1:-1, 2:, 1:-1] & around[1:-1, :-2, 1:-1]
              & around[1:-1, 1:-1, 2:] & around[1:-1, 1:-1, :-2])
    return mask & ~inside


def nearest(query, target, spacing):
    """Measure the mm from each True voxel of query to the nearest of target, both (D, H, W).

    The squared distance is a sum over axes. So its minimum is taken along the first
    axis, then the second, then the third. That is exact, and the second and third are
    needed only in planes, rows and voxels that hold a query.
    """
    flat = target.any(0)                                                   # (H, W)
    # places on the second and third axis that hold a voxel of target
    rows = flat.any(1).nonzero()[:, 0]
    columns = flat.any(0).nonzero()[:, 0]
    if not len(rows):
        return torch.full((int(query.sum()),), math.inf)
    first = steps_along_first(target[:, rows][:, :, columns])              # (D, rows, columns)
    first = first.mul_(spacing[0]).square_()
    second = squared_offsets(query.shape[1], rows, spacing[1])             # (rows, H)
    third = squared_offsets(query.shape[2], columns, spacing[2])           # (columns, W)

    distances = []
    for plane, mask in zip(first, query):                                  # (rows, columns), (H, W)
        h, w = mask.nonzero(as_tuple=True)
        lines, line = h.unique(return_inverse=True)
        best = torch.full((len(lines), len(columns)), math.inf)
        # a loop, for the sums of all rows at once would miss the cache
        for row, offset in zip(plane, second[:, lines]):
            best = torch.minimum(best, row + offset[:, None])
        distances.append((best[line] + third[:, w].T).amin(1).sqrt())
    return torch.cat(distances)


def steps_along_first(target):
    """Count the voxels from each place to the nearest True one along the first axis.

    target (D, H, W) bool. Returns float32 of that shape, inf if there is none.
    """
    steps = torch.full(target.shape, math.inf)
    for places in (range(len(target)), reversed(range(len(target)))):
        gap = steps.new_full(target.shape[1:], math.inf)
        for place in places:
            gap = (gap + 1).masked_fill_(target[place], 0)
            torch.minimum(steps[place], gap, out=steps[place])
    return steps


def squared_offsets(size, places, spacing_mm):
    """Return the squared mm between each of `places` and every index below size, on one axis.

    Returns (len(places), size) float32.
    """
    offsets = places[:, None] - torch.arange(size)
    return (offsets.double() * spacing_mm).square().float()


def to_numpy(values):
    """Return a numpy array of a tensor on any device, an array or a list."""
    if isinstance(values, torch.Tensor):
        values = values.cpu()
    return np.asarray(values)


# ------------------------------------------------------------------- statistics
def mse(pred, target, where):
    """Return the mean squared error where a bool mask is True, all of one shape [SMIT 3]."""
    if not pred.shape == target.shape == where.shape or not where.any():
        raise ValueError("MSE needs one shape and a mask that is not empty, not "
                         f"{tuple(pred.shape)}, {tuple(target.shape)}, {tuple(where.shape)} "
                         f"with {int(where.sum())} voxels")
    error = pred[where].double() - target[where].double()
    return error.square().mean().item()


def bootstrap_interval(values, level=.95, draws=10_000, seed=0):
    """Return the percentile bootstrap interval (low, high) of the mean over cases [ours].

    values: one number per case; nan cases are left out, and (nan, nan) is returned if
    none remains. Raises ValueError for an infinite value: a missed organ's HD95 must
    first be excluded or replaced.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[~np.isnan(values)]
    infinite = np.isinf(values).sum()
    if infinite:
        raise ValueError(f"{infinite} of {len(values)} values are infinite: "
                         "exclude or replace misses")
    if not len(values):
        return math.nan, math.nan
    means = bootstrap_means(values[:, None], draws, seed)                  # (draws, 1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_means(values, draws=10_000, seed=0):
    """Draw cases with replacement, and average each column in each draw: (draws, columns) [ours].

    values (cases, columns): a column's mean is over what is finite in it, and nan
    in a draw that has nothing of it.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    counts = draw_counts(np.random.default_rng(seed), draws, len(values))  # (draws, cases)
    sums = counts @ np.where(finite, values, 0)                            # (draws, columns)
    numbers = counts @ finite.astype(float)
    return np.divide(sums, numbers, out=np.full(sums.shape, math.nan), where=numbers > 0)


def draw_counts(rng, draws, n):
    """Draw n of n things with replacement: how often each came, (draws, n) float64."""
    counts = np.zeros((draws, n))
    rows = np.arange(draws)[:, None]
    np.add.at(counts, (rows, rng.integers(n, size=(draws, n))), 1)
    return counts


def paired_test(a, b, seed=0):
    """Test whether two systems differ on the same cases [ours].

    A paired bootstrap and the Wilcoxon signed-rank test of a - b. a, b: one score per
    case, in one order; cases that are nan in either are left out.
    Returns {"n", "mean_difference", "low", "high" (95 % interval), "p" (two-sided)}.
    Raises ValueError as bootstrap_interval, and for unequal lengths.
    """
    a = np.asarray(a, dtype=np.float64).ravel()
    b = np.asarray(b, dtype=np.float64).ravel()
    if len(a) != len(b):
        raise ValueError("a paired test needs the same cases on both sides, not "
                         f"{len(a)} and {len(b)}")
    kept = ~(np.isnan(a) | np.isnan(b))
    a, b = a[kept], b[kept]
    if np.isinf(a).any() or np.isinf(b).any():
        raise ValueError("infinite scores cannot be compared: exclude or replace misses first")

    difference = a - b
    low, high = bootstrap_interval(difference, seed=seed)
    mean = float(difference.mean()) if len(difference) else math.nan
    return {"n": len(difference), "mean_difference": mean, "low": low, "high": high,
            "p": wilcoxon_p(difference)}


def wilcoxon_p(difference):
    """Return the two-sided p of the Wilcoxon signed-rank test, exact at every n [ours].

    Zeros are dropped, and tied sizes share their mean rank. The chance of each rank sum,
    given those ranks, is then built up rank by rank, every sign being equally likely.
    Ranks are doubled, for then mean ranks too are whole numbers.
    """
    difference = difference.round(12)              # so that rounding errors break no tie
    difference = difference[difference != 0]
    _, size, count = np.unique(np.abs(difference), return_inverse=True, return_counts=True)
    doubled_ranks = (2 * np.cumsum(count) - count + 1)[size]

    chance = np.ones(1)                            # chance[s]: the positive doubled ranks sum to s
    for rank in doubled_ranks:
        negative = np.pad(chance, (0, rank))
        positive = np.pad(chance, (rank, 0))
        chance = (negative + positive) / 2
    observed = doubled_ranks[difference > 0].sum()
    at_most = chance[:observed + 1].sum()
    at_least = chance[observed:].sum()
    return float(min(1, 2 * min(at_most, at_least)))
