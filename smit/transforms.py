"""Geometry and intensities of a volume: orient, resample, window, crop, rotate.

[SMIT 3: 1.5 x 1.5 x 2 mm; release: the HU window]

Pure functions. A volume's LAST three axes are space, leading ones (channels) are
free. An affine is NIfTI's: a (4, 4) float64 numpy array from voxel index to mm in
RAS+ space. After `to_ras` the axes run to the patient's Right, Anterior, Superior.
To check against: NIfTI-1's method 3, nibabel's as_closest_canonical.

    to_ras -> resample -> window_hu | percentile_scale -> foreground_box, crop     prepare
    regrid -> arg-max -> from_ras                                                  to_file_grid
"""
import itertools
import os
from dataclasses import dataclass

import numpy as np
import torch

# as stored or prepared; a whole body, 512 x 512 x 2048, is 2 GB in float32
MAX_VOXELS = 2 ** 29
MAX_SIDE = 4096
TIE = 1e-4                             # share by which summed cosines may differ and be equal


# ------------------------------------------------------------------ orientation
def spacing_of(affine):
    """Return the millimetres between neighbouring voxels along each axis: (3,) float64."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def ras_axes(affine):
    """Find the array axis nearest to R, to A and to S, and whether it runs backwards [ours].

    Nearest: of the six assignments, the one of the largest total |cosine|. Two are as
    good as each other at 45 degrees, where rounding must not decide: within TIE the
    earlier axis comes first.
    Returns (order, reverse), three axes and three bools.
    """
    cosine = affine[:3, :3] / spacing_of(affine)                    # rows R A S, columns array axes

    def total(axes):
        return sum(abs(cosine[way, axis]) for way, axis in enumerate(axes))

    orders = list(itertools.permutations(range(3)))
    most = max(map(total, orders))
    order = next(axes for axes in orders if total(axes) >= most * (1 - TIE))
    reverse = [bool(cosine[way, axis] < 0) for way, axis in enumerate(order)]
    return order, reverse


def ras_grid(shape, affine):
    """Return the shape and affine that a volume of `shape` and `affine` has after `to_ras`."""
    order, reverse = ras_axes(affine)
    ras_shape = tuple(shape[axis] for axis in order)
    ras = affine.astype(np.float64)
    ras[:3, :3] = affine[:3, order]
    for way in range(3):
        if reverse[way]:                                          # the last voxel becomes the first
            ras[:3, 3] += ras[:3, way] * (ras_shape[way] - 1)
            ras[:3, way] *= -1
    return ras_shape, ras


def to_ras(array, affine):
    """Permute and flip (..., X, Y, Z), torch or numpy, to the RAS+ axes nearest to its own [ours].

    Returns (a view of the array, its affine).
    """
    # differs: the release pre-trains on volumes as their files hold them
    order, reverse = ras_axes(affine)
    _, ras = ras_grid(array.shape[-3:], affine)
    return permute_and_flip(array, order, reverse), ras


def from_ras(array, affine):
    """Undo `to_ras`: (..., R, A, S) back to the axes of the ORIGINAL affine, exactly."""
    order, reverse = ras_axes(affine)
    inverse = [order.index(axis) for axis in range(3)]
    return permute_and_flip(array, inverse, [reverse[way] for way in inverse])


def permute_and_flip(array, order, reverse):
    """Permute the last three axes to `order`, then reverse those marked."""
    lead = array.ndim - 3
    axes = [*range(lead), *(lead + axis for axis in order)]
    flips = [lead + way for way in range(3) if reverse[way]]
    if isinstance(array, np.ndarray):
        return np.flip(array.transpose(axes), flips)
    return array.permute(axes).flip(flips)


# ------------------------------------------------------------------- resampling
def resampled_grid(shape, affine, spacing):
    """Return shape and affine of a grid with `spacing` mm a voxel, and the same axes and centre."""
    old = spacing_of(affine)
    spacing = np.asarray(spacing, dtype=np.float64)
    # rounded twice: the affine's noise must not decide where 31 planes of 5 mm are 77.5 of 2 mm
    sides = np.round(np.asarray(shape) * old / spacing, 3)
    new_shape = tuple(max(1, round(side)) for side in sides.tolist())

    new = affine.astype(np.float64)
    new[:3, :3] *= spacing / old
    old_middle = affine[:3, :3] @ (np.array(shape) - 1) / 2                # mm from the first voxel
    new_middle = new[:3, :3] @ (np.array(new_shape) - 1) / 2
    new[:3, 3] += old_middle - new_middle
    return new_shape, new


def resample(volume, affine, spacing, mode="linear"):
    """Resample (..., X, Y, Z) to `spacing` mm, round(n * old / new) voxels an axis [SMIT 3].

    mode: of regrid. Returns (volume, affine).
    """
    shape, target = resampled_grid(volume.shape[-3:], affine, spacing)
    return regrid(volume, affine, target, shape, mode), target


def regrid(volume, affine, target_affine, target_shape, mode="linear"):
    """Sample (..., X, Y, Z) on another grid whose axes run the same way [ours].

    mode: "linear" (float32 out; anti-aliased where the target is coarser) or
    "nearest" (for labels; keeps the dtype). Outside the volume its edge voxels repeat.
    Returns (..., *target_shape). Raises ValueError when the axes differ in direction.
    """
    index = np.linalg.solve(affine, target_affine)                     # target index -> input index
    step, start = index.diagonal()[:3], index[:3, 3]
    tilt = np.abs(index[:3, :3] - np.diag(step)).max()
    if step.min() <= 0 or tilt * max(target_shape) > .05:
        raise ValueError("regrid: the two grids' axes run in different directions; "
                         "bring both to RAS first")
    if mode not in ("linear", "nearest"):
        raise ValueError(f"regrid: mode {mode!r}; use 'linear' or 'nearest'")

    # each axis' target voxels as input indices, rounded: 1e-6 of a voxel is noise of
    # the affines, and without it a tie would fall either way
    centres = [np.round(start[axis] + step[axis] * np.arange(target_shape[axis]), 6)
               for axis in range(3)]
    if mode == "nearest":
        return take_nearest(volume, centres)
    shape = tuple(volume.shape[-3:])
    if shape == tuple(target_shape) and np.allclose(index, np.eye(4), rtol=0, atol=1e-6):
        return volume.float()
    matrices = [interpolation_matrix(centres[axis], step[axis], shape[axis]) for axis in range(3)]
    return interpolate(volume.float(), matrices)


def take_nearest(volume, centres):
    """Take the voxels of (..., X, Y, Z) nearest to the centres of three axes.

    A tie goes to the higher one.
    """
    for axis, centre in zip((-3, -2, -1), centres):
        last = volume.shape[axis] - 1
        nearest = np.floor(centre + .5).clip(0, last).astype(np.int64)
        volume = volume.index_select(axis, torch.from_numpy(nearest))
    return volume


def interpolation_matrix(centre, step, n_in):
    """Return (n_out, n_in) float32 weights: output voxel j, `step` wide, lies at index centre[j].

    Edges repeat.
    """
    # differs: where the target is coarser, a triangle as wide as its voxel (no
    # aliasing); [release] samples points
    width = max(1., step)
    reach = int(np.ceil(width))
    source = np.arange(-reach, n_in + reach)
    distance = np.abs(source - centre.clip(0, n_in - 1)[:, None])        # (n_out, n_in + 2 * reach)
    weight = np.clip(1 - distance / width, 0, None)

    # beyond the edge: the edge voxel
    matrix = np.zeros((n_in, len(centre)))
    np.add.at(matrix, source.clip(0, n_in - 1), weight.T)
    matrix = matrix.T / weight.sum(1, keepdims=True)
    return torch.from_numpy(matrix.astype(np.float32))


def interpolate(volume, matrices):
    """Apply an interpolation matrix along each of the last three axes of a float volume.

    It works plane by plane along the slowest axis, where each plane is contiguous in
    memory: memory is the input, the output and a few planes.
    """
    matrices = dict(zip((-3, -2, -1), matrices))
    axes = sorted(matrices, key=volume.stride, reverse=True)
    slow, mid, fast = axes
    planes = volume.movedim(axes, (0, -2, -1))                             # (slow, ..., mid, fast)
    sides = [len(matrices[axis]) for axis in axes]
    result = torch.empty(sides[0], *planes.shape[1:-2], *sides[1:])

    mid_weights = matrices[mid].to_sparse()                                # a few weights a voxel
    fast_weights = matrices[fast].to_sparse()
    for weight, plane in zip(matrices[slow], result):
        used = weight.nonzero()
        near = slice(int(used[0]), int(used[-1]) + 1)
        thick = torch.tensordot(weight[near], planes[near], dims=1)        # (..., mid, fast)
        thick = apply_along(-2, mid_weights, thick)
        plane.copy_(apply_along(-1, fast_weights, thick))
    return result.movedim((0, -2, -1), axes)


def apply_along(axis, weights, x):
    """Apply sparse weights (n_out, n_in) along an axis of x."""
    x = x.movedim(axis, 0)
    y = weights @ x.flatten(1).contiguous()
    return y.unflatten(1, x.shape[1:]).movedim(0, axis)


# ------------------------------------------------------------------ intensities
def window_hu(x, low=-175., high=250.):
    """Map [low, high] HU to [0, 1] and clip [release]."""
    return (x - low).div_(high - low).clamp_(0, 1)


def percentile_scale(x, low=0., high=99.5):
    """Map the foreground's `low` and `high` percentiles to 0 and 1 and clip [ours].

    For MR, which has no fixed unit. Foreground: voxels above the `background_level`.
    ValueError if nothing lies between.
    """
    # numpy's indexing, for torch's own would take 24 bytes a voxel
    foreground = x.numpy()[x.numpy() > background_level(x)]
    bottom, top = 0., 0.
    if foreground.size:
        bottom, top = np.percentile(foreground, (low, high), overwrite_input=True)
    if not bottom < top:
        raise ValueError(f"percentiles {low} and {high} of the foreground are equal: "
                         "the volume has no contrast")
    del foreground                                                         # as large as the volume
    return window_hu(x, float(bottom), float(top))


def background_level(x, fewest=.005, common=.1):
    """Find the value below which nothing is anatomy in an MR volume [ours].

    Where one value fills a tenth of the volume and is not above its median, as the 0 of
    a scan whose background was blanked, it is that value. Elsewhere it is the value that
    .5 % of the voxels do not exceed: the minimum, but for a few strays. So a spline's
    undershoot, or a broken voxel, does not move the grey levels of the others.
    """
    values = some_voxels(x)
    levels, counts = np.unique(values, return_counts=True)
    most_common = levels[counts.argmax()]
    if counts.max() >= common * values.size and most_common <= np.median(values):
        return float(most_common)
    return float(np.quantile(values, fewest, method="lower"))


def some_voxels(x, count=2 ** 18):
    """Draw `count` voxels of a volume, with replacement; all where there are no more.

    Returns a flat array, alike whenever it is asked for, however the voxels lie in
    memory. A stride would not do: it is often a multiple of a side, and then it sees a
    single plane.
    """
    values = x.numpy()
    if values.size <= count:
        return values.ravel()
    drawn = np.random.default_rng(0).integers(values.size, size=count)
    return values[np.unravel_index(drawn, values.shape)]


# ------------------------------------------------------------ crops and rotations
def foreground_box(x, threshold=0):
    """Find the box around all x > threshold: ((lo, hi), (lo, hi), (lo, hi)), hi exclusive.

    It is the whole volume when nothing is.
    """
    inside = x > threshold
    box = []
    for axis, side in enumerate(x.shape):
        across = inside.any(dim=(axis + 1) % 3, keepdim=True).any(dim=(axis + 2) % 3, keepdim=True)
        used = across.flatten().nonzero()
        if len(used):
            box.append((int(used[0]), int(used[-1]) + 1))
        else:
            box.append((0, side))
    return tuple(box)


def crop(volume, start, size, fill=0):
    """Cut exactly `size` voxels of (..., X, Y, Z) from index `start` on; `fill` outside.

    `start` may be negative.
    """
    source = [slice(max(s, 0), max(s + n, 0)) for s, n in zip(start, size)]
    part = volume[(..., *source)]
    target = []
    for s, n in zip(start, part.shape[-3:]):
        first = max(-s, 0)
        target.append(slice(first, first + n))
    result = volume.new_full((*volume.shape[:-3], *size), fill)
    result[(..., *target)] = part
    return result


def crop_affine(affine, start):
    """Return the affine after cropping at index `start`."""
    moved = affine.astype(np.float64)
    moved[:3, 3] += affine[:3, :3] @ np.asarray(start, dtype=np.float64)
    return moved


def rotate90(x, k):
    """Turn (..., R, A, S) by k quarters in the axial (R, A) plane, R towards A [release]."""
    # by none it would be a copy, of maybe GBs
    return torch.rot90(x, k, dims=(-3, -2)) if k % 4 else x


# ---------------------------------------------------------- the recipe, and back
@dataclass(frozen=True)
class Preparation:
    """Describe how an image becomes the network's input [SMIT 3; release].

    It is the same for training, validation and prediction.
    """
    spacing_mm: tuple = (1.5, 1.5, 2.)
    modality: str = "ct"  # "ct": by hu_window; "mr": by percentiles of the foreground
    hu_window: tuple = (-175., 250.)
    percentiles: tuple = (0., 99.5)                  # of MR's foreground [ours]
    hu_offset: float = 0.                            # added to stored values by data.load_case

    def __post_init__(self):
        if self.modality not in ("ct", "mr"):
            raise ValueError(f"modality {self.modality!r}: use 'ct' or 'mr'")
        if len(self.spacing_mm) != 3 or not all(.01 <= mm <= 50 for mm in self.spacing_mm):
            raise ValueError(f"spacing {self.spacing_mm} mm: give three numbers of .01 to 50")
        if not -np.inf < self.hu_window[0] < self.hu_window[1] < np.inf:
            raise ValueError(f"HU window {self.hu_window}: give a lower and a higher number")
        if not np.isfinite(self.hu_offset):
            raise ValueError(f"HU offset {self.hu_offset}: give a finite number")


def most_voxels():
    """Return how many voxels a volume may have: SMIT_MAX_VOXELS of the environment, or MAX_VOXELS.

    ValueError if it is no number.
    """
    given = os.environ.get("SMIT_MAX_VOXELS", MAX_VOXELS)
    try:
        return int(float(given))
    except (ValueError, OverflowError):
        raise ValueError(f"the environment's SMIT_MAX_VOXELS is {given!r}; give a number, such as "
                         "1e9") from None


def prepare(image, affine, settings):
    """Orient, resample, scale, and crop to the body [SMIT 3].

    image: float (X, Y, Z) in the order of its file. The body is what is above black,
    the window's low [release]; in MR, above a level of 12 of 255 [ours].
    Returns (uint8 (D, H, W), 0..255 for 0..1; affine of its grid). ValueError if there
    is no body, or if the prepared grid were too large: a side over MAX_SIDE, or more
    voxels than most_voxels().
    """
    ct = settings.modality == "ct"
    shape, _ = resampled_grid(*ras_grid(image.shape, affine), settings.spacing_mm)
    voxels = np.prod(shape, dtype=float)
    if max(shape) > MAX_SIDE:
        raise ValueError(f"would be {shape} voxels at {settings.spacing_mm} mm, more than "
                         f"{MAX_SIDE} a side; crop it, or prepare it coarser")
    if voxels > most_voxels():
        raise ValueError(f"would be {shape} voxels at {settings.spacing_mm} mm, more than "
                         f"{most_voxels()}; crop it, prepare it coarser, or allow it with the "
                         f"environment's SMIT_MAX_VOXELS={voxels:.0f}")
    image, affine = to_ras(image, affine)
    image, affine = resample(image, affine, settings.spacing_mm)
    if ct:
        image = window_hu(image, *settings.hu_window)
    else:
        image = percentile_scale(image, *settings.percentiles)
    # differs: kept in 256 steps, at most .83 HU off in the release's window; a quarter
    # of the disk and of the reading
    image = image.mul_(255).round_().to(torch.uint8)

    # of rounded levels: air at the window's low comes out of resampling a hair above it
    threshold = 0 if ct else 12
    if not image.max() > threshold:
        offset = f", {settings.hu_offset:g} being added" if settings.hu_offset else ""
        raise ValueError(f"all air, nothing above {settings.hu_window[0]} HU{offset}; "
                         "leave it out, or set its modality or HU offset")
    start, end = zip(*foreground_box(image, threshold))
    return crop(image, start, np.subtract(end, start)), crop_affine(affine, start)


def to_file_grid(logits, affine, file_shape, file_affine):
    """Bring logits to the grid of the image's file, and take the arg-max there [ours].

    logits (num_classes, D, H, W) on a grid with RAS `affine`.
    Returns a label map (X, Y, Z) uint8 in the axis order of the file. A voxel that
    lies one voxel or more outside the logits' grid is background.
    One class at a time: memory is a few volumes on the file's grid, whatever the
    number of classes.
    """
    # differs: the release scores resampled, cropped volumes, and no file's own grid
    shape, ras = ras_grid(file_shape, file_affine)
    index = np.linalg.solve(affine, ras)                           # the file's index -> the logits'

    # the part of the file's grid that the logits reach
    first, size = [], []
    for axis in range(3):
        side = logits.shape[1 + axis]
        place = index[axis, 3] + index[axis, axis] * np.arange(shape[axis])
        inside = np.flatnonzero((place > -1) & (place < side))
        first.append(int(inside[0]))
        size.append(len(inside))

    highest = torch.full(size, -torch.inf)
    label = torch.zeros(size, dtype=torch.uint8)
    for number, channel in enumerate(logits):
        value = regrid(channel.cpu(), affine, crop_affine(ras, first), size)
        label.masked_fill_(value > highest, number)
        torch.maximum(highest, value, out=highest)
    label = crop(label, [-start for start in first], shape)
    return from_ras(label, file_affine).contiguous()
