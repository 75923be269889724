"""Scores of a segmentation against its label, and statistics over cases [SMIT 3].

Absent organs, in one policy for all three overlap scores:
    absent from both prediction and label     nan        nothing to score: left out of every mean
    present in one of the two only            a miss     Dice 0, surface Dice 0, HD95 inf
An infinite HD95 cannot be averaged, so whoever averages it says whether a miss is excluded or takes a stated
penalty, and how many there were. The background (id 0) is never scored. Overlap scores take numpy arrays or tensors and
are computed on the CPU, where the surface search takes a second or two for 13 organs of 256 x 256 x 150 voxels.

Check against: monai.metrics, scipy.stats.wilcoxon. Reading order: the scores, the surface search, statistics.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F


def dice(pred, label, num_classes):
    """DSC of each foreground class, 2 |P and L| / (|P| + |L|) [SMIT 3].

    pred, label: label maps of one shape, whole numbers in 0..num_classes-1 of any dtype.
    Returns (num_classes-1,) float64 array for the ids 1, 2, ...; absent organs as stated at the top of the file.
    Raises ValueError for other shapes or values.
    """
    pred, label = to_numpy(pred), to_numpy(label)
    if pred.shape != label.shape or not label.size:
        raise ValueError(f"prediction {pred.shape} and label {label.shape} must have one non-empty shape")
    for name, ids in (("prediction", pred), ("label", label)):
        low, high = ids.min(), ids.max()
        if not (0 <= low and high < num_classes) or (ids.dtype.kind == "f" and (ids % 1).any()):
            raise ValueError(f"{name} must hold whole numbers in 0..{num_classes - 1}, found {low} to {high}")
    pairs = label.astype(np.int64).ravel() * num_classes + pred.astype(np.int64).ravel()
    pairs = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)    # (label, pred) -> voxels
    both, size = pairs.diagonal()[1:], (pairs.sum(0) + pairs.sum(1))[1:]
    return np.divide(2 * both, size, out=np.full(num_classes - 1, math.nan), where=size > 0)


def hd95(pred, label, spacing):
    """95th percentile Hausdorff distance in mm, the larger of the two directions' percentiles [ours, as MONAI].

    Arguments and errors as surface_distances; nan if both masks are empty, inf if one is.
    """
    return hausdorff_95(*surface_distances(pred, label, spacing))


def surface_dice(pred, label, spacing, tolerance_mm):
    """Share of both surfaces' voxels that lie within tolerance_mm of the other surface [ours, as MONAI].

    Surface voxels are counted, each once, whatever area it stands for. nan if both masks are empty, 0 if one is.
    """
    return share_within(*surface_distances(pred, label, spacing), tolerance_mm)


def hausdorff_95(pred_to_label, label_to_pred):
    """HD95 from the output of surface_distances, so that one search serves both surface scores [ours]."""
    sizes = len(pred_to_label), len(label_to_pred)
    if 0 in sizes:
        return math.nan if sizes == (0, 0) else math.inf
    return max(float(np.percentile(distances.numpy(), 95)) for distances in (pred_to_label, label_to_pred))


def share_within(pred_to_label, label_to_pred, tolerance_mm):
    """Surface Dice from the output of surface_distances [ours]."""
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"the tolerance must be a finite distance in mm, not {tolerance_mm}")
    distances = torch.cat([pred_to_label, label_to_pred])
    # Distances come in steps of the spacing, so many equal the tolerance: 10 nm keep rounding from deciding for them.
    return (distances <= tolerance_mm + 1e-5).double().mean().item()


def surface_distances(pred, label, spacing):
    """Exact distance of every surface voxel to the nearest one of the other mask.

    pred, label: (D, H, W) masks of one shape; spacing: three voxel sizes in mm. A surface voxel has one of its six
    neighbours outside the mask, and what lies beyond the volume is outside.
    Returns pred_to_label, label_to_pred: float32 vectors in mm, in no particular order, one value per surface voxel;
    inf where the other mask is empty. Raises ValueError for shapes or spacings that do not fit.
    """
    pred, label = (torch.from_numpy(np.array(to_numpy(mask), dtype=bool, order="C")) for mask in (pred, label))
    spacing = np.ravel(spacing).tolist()
    if pred.shape != label.shape or pred.ndim != 3:
        raise ValueError(f"masks must have one 3-D shape, not {tuple(pred.shape)} and {tuple(label.shape)}")
    if len(spacing) != 3 or not all(0 < s < math.inf for s in spacing):
        raise ValueError(f"spacing must be three positive sizes in mm, not {spacing}")
    box = bounding_box(pred | label)
    order = sorted(range(3), key=lambda axis: box[axis].stop - box[axis].start)
    order = [order[2], order[0], order[1]]         # longest, shortest, middle: the cheapest order for nearest()
    surfaces = [surface(mask[box]).permute(order) for mask in (pred, label)]
    spacing = [spacing[axis] for axis in order]
    return nearest(*surfaces, spacing), nearest(*surfaces[::-1], spacing)


def bounding_box(mask):
    """Three slices around the True voxels of mask (D, H, W); empty slices if there are none."""
    flat, sides = mask.any(0), []
    for line in (mask.flatten(1).any(1), flat.any(1), flat.any(0)):
        at = line.nonzero()
        sides.append(slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0))
    return tuple(sides)


def surface(mask):
    """Voxels of mask (D, H, W) with a face neighbour outside it: the mask minus its 6-connected erosion."""
    around = F.pad(mask, (1, 1) * 3)
    inside = (mask & around[2:, 1:-1, 1:-1] & around[:-2, 1:-1, 1:-1] & around[1:-1, 2:, 1:-1]
              & around[1:-1, :-2, 1:-1] & around[1:-1, 1:-1, 2:] & around[1:-1, 1:-1, :-2])
    return mask & ~inside


def nearest(query, target, spacing):
    """Distance in mm from each True voxel of query to the nearest of target, both (D, H, W), by axes in turn.

    The squared distance is a sum over axes, so its minimum is taken along the first axis, then the second, then the
    third: exact, and the second and third are only needed in planes, rows and voxels that hold a query.
    """
    rows, columns = target.any(2).any(0).nonzero()[:, 0], target.any(0).any(0).nonzero()[:, 0]
    if not len(rows):
        return torch.full((int(query.sum()),), math.inf)
    first = steps_along_first(target[:, rows][:, :, columns]).mul_(spacing[0]).square_()
    second = squared_offsets(query.shape[1], rows, spacing[1])
    third = squared_offsets(query.shape[2], columns, spacing[2])
    distances = []
    for plane, mask in zip(first, query):                             # (rows, columns), (H, W)
        h, w = mask.nonzero(as_tuple=True)
        lines, line = h.unique(return_inverse=True)
        best = torch.full((len(lines), len(columns)), math.inf)
        for row, offset in zip(plane, second[:, lines]):              # a loop: the sums for all rows miss the cache
            best = torch.minimum(best, row + offset[:, None])
        distances.append((best[line] + third[:, w].T).amin(1).sqrt())
    return torch.cat(distances)


def steps_along_first(target):
    """(D, H, W) float32: voxels from each place to the nearest True one along the first axis, inf if there is none."""
    steps = torch.full(target.shape, math.inf)
    for places in (range(len(target)), reversed(range(len(target)))):
        gap = steps.new_full(target.shape[1:], math.inf)
        for place in places:
            gap = (gap + 1).masked_fill_(target[place], 0)
            torch.minimum(steps[place], gap, out=steps[place])
    return steps


def squared_offsets(size, places, spacing_mm):
    """(len(places), size) float32: squared mm between each of places and every index below size, on one axis."""
    offsets = places[:, None] - torch.arange(size)
    return (offsets.double() * spacing_mm).square().float()


def to_numpy(values):
    """A numpy array of a tensor on any device, an array or a list."""
    return np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)


def mse(pred, target, where):
    """Mean squared error over the voxels where a bool mask is True, all of one shape [SMIT 3]."""
    if not pred.shape == target.shape == where.shape or not where.any():
        raise ValueError(f"MSE needs one shape and a mask that is not empty, not {tuple(pred.shape)}, "
                         f"{tuple(target.shape)}, {tuple(where.shape)} with {int(where.sum())} voxels")
    return (pred[where].double() - target[where].double()).square().mean().item()


def bootstrap_interval(values, level=.95, draws=10_000, seed=0):
    """Percentile bootstrap interval (low, high) of the mean over cases [ours].

    values: one number per case; nan cases are left out, and (nan, nan) is returned if none remains.
    Raises ValueError for an infinite value: a missed organ's HD95 must first be excluded or replaced.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[~np.isnan(values)]
    if np.isinf(values).any():
        raise ValueError(f"{np.isinf(values).sum()} of {len(values)} values are infinite: exclude or replace misses")
    if not len(values):
        return math.nan, math.nan
    means = values[np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_test(a, b, seed=0):
    """Do two systems differ on the same cases? Paired bootstrap and Wilcoxon signed-rank test of a - b [ours].

    a, b: one score per case, in one order; cases that are nan in either are left out.
    Returns {"n", "mean_difference", "low", "high" (95 % interval), "p" (two-sided)}. Raises ValueError as
    bootstrap_interval, and for unequal lengths.
    """
    a, b = (np.asarray(x, dtype=np.float64).ravel() for x in (a, b))
    if len(a) != len(b):
        raise ValueError(f"a paired test needs the same cases on both sides, not {len(a)} and {len(b)}")
    kept = ~(np.isnan(a) | np.isnan(b))
    if np.isinf(a[kept]).any() or np.isinf(b[kept]).any():
        raise ValueError("infinite scores cannot be compared: exclude or replace misses first")
    difference = a[kept] - b[kept]
    low, high = bootstrap_interval(difference, seed=seed)
    mean = float(difference.mean()) if len(difference) else math.nan
    return {"n": len(difference), "mean_difference": mean, "low": low, "high": high, "p": wilcoxon_p(difference)}


def wilcoxon_p(difference):
    """Two-sided p of the Wilcoxon signed-rank test, exact at every n [ours].

    Zeros are dropped and tied sizes share their mean rank; the chance of each rank sum, given those ranks, is then
    built up rank by rank, every sign being equally likely. Doubled, mean ranks are whole numbers.
    """
    difference = difference[difference != 0]
    _, size, count = np.unique(np.abs(difference), return_inverse=True, return_counts=True)
    doubled_ranks = (2 * np.cumsum(count) - count + 1)[size]
    chance = np.ones(1)                                               # chance[s]: the positive doubled ranks sum to s
    for rank in doubled_ranks:
        chance = (np.pad(chance, (0, rank)) + np.pad(chance, (rank, 0))) / 2
    observed = doubled_ranks[difference > 0].sum()
    return float(min(1, 2 * min(chance[:observed + 1].sum(), chance[observed:].sum())))
