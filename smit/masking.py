"""Block masks: which cells of a view are hidden from the student [SMIT 2, mask ratio 0.7].

One mask serves three resolutions: drawn on cells (16^3 voxels), expanded to tokens for the encoder and to voxels for
the MIP loss. True = hidden = counted by the losses. Needs torch alone.
"""
import math

import torch


def random_block_mask(batch, grid, ratio, generator=None):
    """Hide exactly ceil(ratio * cells) cells of each sample, uniformly and without replacement [SMIT 2; release].

    batch: number of masks; grid (D, H, W) in cells; ratio in [0, 1]. A ratio of .7 hides 152 of 6^3 cells (70.37 %).
    Returns (batch, D, H, W) bool.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"a mask ratio of {ratio} is not in [0, 1]")
    cells = math.prod(grid)
    count = math.ceil(round(ratio * cells, 6))  # rounded first: .07 * 100 is 7.000000000000001, and hides 7
    order = torch.rand(batch, cells, generator=generator).argsort(dim=1)
    hidden = torch.zeros(batch, cells, dtype=torch.bool)
    hidden.scatter_(1, order[:, :count], True)
    return hidden.view(batch, *grid)


def expand_mask(mask, factor):
    """Repeat each cell `factor` times along its axes: (B, D, H, W) -> (B, fD, fH, fW); one factor, or one per axis."""
    factors = (factor,) * 3 if isinstance(factor, int) else factor
    for axis, f in enumerate(factors, start=1):
        mask = mask.repeat_interleave(f, dim=axis)
    return mask
