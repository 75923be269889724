"""Judge intensities: is a volume what its modality says, and is anything of it left to see? [ours]

A CT must be in HU: air near -1000, tissue around 0. Files hold other things: MR, HU with 1024
added, HU clipped, values scaled to [0, 1] before. None can be told for certain, so these are
concerns, not refusals. A label map, on the other hand, is no scan at all, whatever the modality.
"""
import numpy as np

from smit.data.concerns import Concern
from smit.transforms import some_voxels

MOST = .4                              # share that counts as most of the tissue
NARROW = 50                            # a CT's HU span more than that
AIR_HU = -200                          # air and lung lie below
MANY = .02                             # share of voxels that is no chance
STRAY = .001                           # share of voxels that may lie anywhere
SOFT_TISSUE = (900, 1200)              # as HU + 1024
FEW_LEVELS = 16                        # grey levels of 256 in use
SATURATED = .3                         # share of a prepared volume at white
EMPTY = .97                            # and at black, in the box around the body
LABEL_VALUES = 32                      # a label map has no more values ...
SMALL = 1000                           # ... though a scan of fewer voxels may have as few
ALIKE = .8                             # share of its voxels that equal their neighbours
LABEL_LIKE = "holds few whole numbers, or patches of them, as a label does and a scan does not"


def judge_raw(path, image, settings):
    """Return concerns, none or one, about an image before preparation, float32 (X, Y, Z).

    In HU if it is CT, `settings.hu_offset` being added already.
    """
    if looks_like_label(image, settings.hu_offset):
        return [Concern(path, LABEL_LIKE, "", "leave it out")]
    voxels = some_voxels(image)
    low, high = float(voxels.min()), float(voxels.max())
    values = f"{low:.4g} to {high:.4g}"
    if settings.modality == "mr":
        if np.mean(voxels < -100) > MANY:
            return [Concern(path, "has many negative values, as CT has and MR has not", values,
                            "use --modality ct if it is one")]
        return []

    if high - low < NARROW:
        return [Concern(path, "the range is too narrow for HU: it was scaled before", values,
                        "give the original HU, for the window would be laid over it once more")]
    if low >= 0 and high <= 255:
        return [Concern(path, "these are grey values, hardly HU: it was scaled before, or is no CT",
                        values, "give the original HU, or train with --modality mr")]
    if is_raised(voxels):
        return [Concern(path, "no air near -1000, and most of it lies near 1024: HU were stored "
                        "with 1024 added", values, "take it off the file, or train with "
                        "--hu_offset -1024")]
    if np.mean(voxels < AIR_HU) > STRAY:
        return []
    if -1000 < low < -10 and np.mean(voxels == low) > MANY:
        if low <= settings.hu_window[0]:         # black all the same
            return []
        return [Concern(path, "nothing lies below -200 HU: air was cut off, and is grey in place "
                        "of black", values, "give the full HU, unless all are cut off alike")]
    return [Concern(path, "nothing lies below -200, where CT has its air: these are no HU", values,
                    "give HU, or train with --modality mr for MR, with --hu_offset -1024 for HU "
                    "with 1024 added")]


def is_raised(voxels):
    """Return whether these are HU with 1024 added, by where their tissue lies.

    What lies at the minimum does not count: scanners pad what they do not see with one value, and
    that may be as low as -2000.
    """
    seen = voxels[voxels > voxels.min()]
    if not len(seen) or np.mean(seen < AIR_HU) > STRAY:
        return False
    tissue = np.count_nonzero(seen > seen.min() + 100)
    near_1024 = np.count_nonzero((seen > SOFT_TISSUE[0]) & (seen < SOFT_TISSUE[1]))
    return near_1024 > MOST * tissue


def judge_prepared(path, image):
    """Return concerns, none or one, about what is left to be seen of a prepared uint8 image."""
    counts = np.bincount(some_voxels(image), minlength=256)            # of each grey level
    levels = np.count_nonzero(counts)
    white, black = counts[255] / counts.sum(), counts[0] / counts.sum()
    shares = f"{levels} grey levels, {white:.0%} white, {black:.0%} black"
    if levels < FEW_LEVELS or white > SATURATED or black > EMPTY:
        return [Concern(path, "little is left to be seen after preparation", shares,
                        "check --modality and --hu_window against its values")]
    return []


def looks_like_label(image, offset=0.):
    """Return whether an image has the values of a label map, after `offset` was added.

    Those are whole numbers from 0 on: few of them, or mostly equal to their neighbours.
    """
    if image.numel() < SMALL:
        return False
    corner = image.numpy().flat[0] - offset                          # most scans end here: air
    if corner < 0 or corner % 1:
        return False
    voxels = some_voxels(image) - np.float32(offset)
    if voxels.min() < 0 or (voxels % 1).any():
        return False
    return len(np.unique(voxels)) <= LABEL_VALUES or share_of_equal_neighbours(image) > ALIKE


def share_of_equal_neighbours(image):
    """Return the share of voxels that equal the next one along the last axis, in the middle plane.

    Voxels of the corner's value, the background, do not count.
    """
    middle = image.numpy()[image.shape[0] // 2]
    here, there = middle[:, :-1], middle[:, 1:]
    inside = here != image.numpy().flat[0]
    return float(np.mean((here == there)[inside])) if inside.any() else 0.
