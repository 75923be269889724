"""Geometry and intensities of a volume: orient, resample, window, crop, rotate. [SMIT 3: 1.5 x 1.5 x 2 mm, HU window]

Pure functions. A volume's LAST three axes are space, leading ones (channels) are free. An affine is NIfTI's: a (4, 4)
float64 numpy array from voxel index to mm in RAS+ space. After `to_ras` the axes run to the patient's Right, Anterior,
Superior. To check against: NIfTI-1's method 3, nibabel's as_closest_canonical.

    to_ras -> resample -> window_hu | percentile_scale -> foreground_box, crop          the way in
    regrid -> from_ras                                                                  and back to the scanner's grid
"""
import itertools
import warnings
from dataclasses import dataclass

import numpy as np
import torch

MAX_VOXELS, MAX_SIDE = 2 ** 29, 4096   # as stored or prepared; a whole body, 512 x 512 x 2048, is 2 GB in float32


def spacing_of(affine):
    """Millimetres between neighbouring voxels along each axis: (3,) float64."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def ras_axes(affine):
    """For R, A, S: the array axis nearest to it (largest total |cosine|) and whether it runs backwards. [ours]"""
    cosine = affine[:3, :3] / spacing_of(affine)                                   # rows R A S, columns array axes
    order = max(itertools.permutations(range(3)), key=lambda axes: sum(abs(cosine[w, axes[w]]) for w in range(3)))
    return order, [bool(cosine[w, order[w]] < 0) for w in range(3)]


def ras_grid(shape, affine):
    """Shape and affine that a volume of `shape` and `affine` has after `to_ras`."""
    order, reverse = ras_axes(affine)
    ras = affine.astype(np.float64)
    ras[:3, :3] = affine[:3, order]
    for w in np.flatnonzero(reverse):                                              # the last voxel becomes the first
        ras[:3, 3] += ras[:3, w] * (shape[order[w]] - 1)
        ras[:3, w] *= -1
    return tuple(shape[axis] for axis in order), ras


def _reorder(array, order, reverse):
    """Permute the last three axes to `order`, then reverse those marked."""
    lead = array.ndim - 3
    axes = [*range(lead), *(lead + axis for axis in order)]
    flips = [lead + w for w in range(3) if reverse[w]]
    if isinstance(array, np.ndarray):
        return np.flip(array.transpose(axes), flips)
    return array.permute(axes).flip(flips)


def to_ras(array, affine):
    """Permute and flip (..., X, Y, Z), torch or numpy, to the RAS+ axes nearest to its own: (array, affine). [ours]"""
    return _reorder(array, *ras_axes(affine)), ras_grid(array.shape[-3:], affine)[1]


def from_ras(array, affine):
    """Undo `to_ras`: (..., R, A, S) back to the axes of the ORIGINAL affine, exactly."""
    order, reverse = ras_axes(affine)
    inverse = [order.index(axis) for axis in range(3)]
    return _reorder(array, inverse, [reverse[w] for w in inverse])


def _interpolation(centre, step, n_in):
    """(n_out, n_in) float32 weights: output voxel j, `step` wide, lies at index centre[j]; edges repeat."""
    # differs: where the target is coarser, a triangle as wide as its voxel (no aliasing); [release] samples points
    width = max(1., step)
    reach = int(np.ceil(width))
    source = np.arange(-reach, n_in + reach)
    weight = np.clip(1 - np.abs(source - centre.clip(0, n_in - 1)[:, None]) / width, 0, None)
    matrix = np.zeros((n_in, len(centre)))
    np.add.at(matrix, source.clip(0, n_in - 1), weight.T)                          # beyond the edge: the edge voxel
    return torch.from_numpy((matrix.T / weight.sum(1, keepdims=True)).astype(np.float32))


def _along(axis, weights, x):
    """Apply sparse weights (n_out, n_in) along an axis of x."""
    x = x.movedim(axis, 0)
    return (weights @ x.flatten(1).contiguous()).unflatten(1, x.shape[1:]).movedim(0, axis)


def regrid(volume, affine, target_affine, target_shape, mode="linear"):
    """Sample (..., X, Y, Z) on another grid whose axes run the same way: (..., *target_shape). [ours]

    mode: "linear" (float32 out; anti-aliased where the target is coarser) or "nearest" (for labels; keeps the dtype).
    One small matrix an axis, applied plane by plane: memory is the input, the output and a few planes. Outside the
    volume its edge voxels repeat. Raises ValueError when the axes differ in direction.
    """
    shape = tuple(volume.shape[-3:])
    index = np.linalg.solve(affine, target_affine)                                 # target index -> input index
    step, start = index.diagonal()[:3], index[:3, 3]
    tilt = np.abs(index[:3, :3] - np.diag(step)).max()
    if step.min() <= 0 or tilt * max(target_shape) > .05:
        raise ValueError("regrid: the two grids' axes run in different directions; bring both to RAS first")
    if mode not in ("linear", "nearest"):
        raise ValueError(f"regrid: mode {mode!r}; use 'linear' or 'nearest'")
    # rounded: 1e-6 of a voxel is noise of the affines, and without it a tie would fall either way
    centres = [np.round(first + width * np.arange(n), 6) for first, width, n in zip(start, step, target_shape)]
    if mode == "nearest":
        for axis, centre in zip((-3, -2, -1), centres):
            nearest = np.floor(centre + .5).clip(0, shape[axis] - 1).astype(np.int64)   # a tie goes to the higher one
            volume = volume.index_select(axis, torch.from_numpy(nearest))
        return volume
    volume = volume.float()
    if shape == tuple(target_shape) and np.allclose(index, np.eye(4), rtol=0, atol=1e-6):
        return volume
    matrices = [_interpolation(*axis) for axis in zip(centres, step, shape)]
    # in the order of memory: planes across the axis of the longest stride are compact, and read row by row
    slow, mid, fast = order = sorted((0, 1, 2), key=lambda axis: volume.stride(axis - 3), reverse=True)
    axes = [axis - 3 for axis in order]
    planes = volume.movedim(axes, (0, -2, -1))
    result = torch.empty(target_shape[slow], *planes.shape[1:-2], target_shape[mid], target_shape[fast])
    columns, rows = matrices[mid].to_sparse(), matrices[fast].to_sparse()          # a few weights a voxel
    for weight, plane in zip(matrices[slow], result):
        used = weight.nonzero()
        near = slice(int(used[0]), int(used[-1]) + 1)
        thick = torch.tensordot(weight[near], planes[near], dims=1)                # (..., mid, fast)
        plane.copy_(_along(-1, rows, _along(-2, columns, thick)))
    return result.movedim((0, -2, -1), axes)


def resampled_grid(shape, affine, spacing):
    """Shape and affine of a grid with `spacing` mm a voxel and the same axes and centre of the field of view."""
    old, spacing = spacing_of(affine), np.asarray(spacing, dtype=np.float64)
    new_shape = tuple(max(1, round(float(n * a / b))) for n, a, b in zip(shape, old, spacing))
    new = affine.astype(np.float64)
    new[:3, :3] *= spacing / old
    new[:3, 3] += affine[:3, :3] @ (np.array(shape) - 1) / 2 - new[:3, :3] @ (np.array(new_shape) - 1) / 2
    return new_shape, new


def resample(volume, affine, spacing, mode="linear"):
    """Volume (..., X, Y, Z) at `spacing` mm, round(n * old / new) voxels an axis: (volume, affine). [SMIT 3]"""
    shape, target = resampled_grid(volume.shape[-3:], affine, spacing)
    return regrid(volume, affine, target, shape, mode), target


def window_hu(x, low=-175., high=250.):
    """Map [low, high] HU to [0, 1] and clip. [release]"""
    return (x - low).div_(high - low).clamp_(0, 1)


def percentile_scale(x, low=0., high=99.5):
    """Map the foreground's `low` and `high` percentiles to 0 and 1 and clip; for MR, which has no fixed unit. [ours]

    Foreground: voxels above the volume's minimum, which in MR is the background. ValueError if nothing lies between.
    """
    foreground = x.numpy()[x.numpy() > float(x.min())]         # torch's own indexing would take 24 bytes a voxel
    bounds = np.percentile(foreground, (low, high), overwrite_input=True) if foreground.size else (0., 0.)
    if not bounds[0] < bounds[1]:
        raise ValueError(f"percentiles {low} and {high} of the foreground are equal: the volume has no contrast")
    del foreground                                             # as large as the volume
    return window_hu(x, float(bounds[0]), float(bounds[1]))


def foreground_box(x, threshold=0.):
    """Bounding box ((lo, hi), (lo, hi), (lo, hi)) of x > threshold, hi exclusive; the whole volume when nothing is."""
    inside = x > threshold
    box = []
    for axis, n in enumerate(x.shape):
        used = inside.any(dim=(axis + 1) % 3, keepdim=True).any(dim=(axis + 2) % 3, keepdim=True).flatten().nonzero()
        box.append((int(used[0]), int(used[-1]) + 1) if len(used) else (0, n))
    return tuple(box)


def crop(volume, start, size, fill=0):
    """Exactly `size` voxels of (..., X, Y, Z) from index `start` on, which may be negative; `fill` outside."""
    part = volume[(..., *(slice(max(s, 0), max(s + n, 0)) for s, n in zip(start, size)))]
    result = volume.new_full((*volume.shape[:-3], *size), fill)
    result[(..., *(slice(max(-s, 0), max(-s, 0) + n) for s, n in zip(start, part.shape[-3:])))] = part
    return result


def crop_affine(affine, start):
    """The affine after cropping at index `start`."""
    moved = affine.astype(np.float64)
    moved[:3, 3] += affine[:3, :3] @ np.asarray(start, dtype=np.float64)
    return moved


def rotate90(x, k):
    """k quarter turns of (..., R, A, S) in the axial (R, A) plane, R towards A. [release]"""
    return torch.rot90(x, k, dims=(-3, -2))


@dataclass(frozen=True)
class Preparation:
    """How an image becomes the network's input: the same for training, validation and prediction. [SMIT 3; release]"""
    spacing_mm: tuple = (1.5, 1.5, 2.)
    modality: str = "ct"                             # "ct": by hu_window; "mr": by percentiles of the foreground
    hu_window: tuple = (-175., 250.)
    percentiles: tuple = (0., 99.5)
    hu_offset: float = 0.                            # added to stored values by `data.load_case`: -1024 for some CT

    def __post_init__(self):
        if len(self.spacing_mm) != 3 or not all(.01 <= mm <= 50 for mm in self.spacing_mm):
            raise ValueError(f"spacing {self.spacing_mm} mm: give three numbers of .01 to 50")
        if not -np.inf < self.hu_window[0] < self.hu_window[1] < np.inf:
            raise ValueError(f"HU window {self.hu_window}: give a lower and a higher number")


def prepare(image, affine, settings, name="volume"):
    """Orient, resample, scale, crop to the body: (uint8 (D, H, W), 0..255 for 0..1; affine of its grid). [SMIT 3]

    The body is what lies above the window's low [release]; in MR, above .05 after scaling [ours].
    ValueError if that is nothing, or if the prepared grid were too large.
    """
    ct = {"ct": True, "mr": False}[settings.modality]
    shape, _ = resampled_grid(*ras_grid(image.shape, affine), settings.spacing_mm)
    if max(shape) > MAX_SIDE or np.prod(shape, dtype=float) > MAX_VOXELS:
        raise ValueError(f"would be {shape} voxels at {settings.spacing_mm} mm; crop it, or prepare it coarser")
    low, high = (float(bound) for bound in (image.numpy().min(), image.numpy().max()))   # in file order torch is slow
    if ct and 0 <= low and high <= 255:
        warnings.warn(f"{name}: values in [{low:g}, {high:g}] are hardly HU: was it scaled before, or is it no CT?")
    image, affine = to_ras(image, affine)
    image, affine = resample(image, affine, settings.spacing_mm)
    image = window_hu(image, *settings.hu_window) if ct else percentile_scale(image, *settings.percentiles)
    threshold = 0. if ct else .05
    if not image.numpy().max() > threshold:
        raise ValueError(f"all air, nothing above {settings.hu_window[0]} HU; leave it out, or set the modality")
    start, end = zip(*foreground_box(image, threshold))
    image = crop(image, start, np.subtract(end, start))
    # differs: kept in 256 steps, at most .83 HU off in the paper's window; a quarter of the disk and of the reading
    return image.mul_(255).round_().to(torch.uint8), crop_affine(affine, start)
