"""Block masks: which cells of a view are hidden from the student [SMIT 2, mask ratio 0.7].

One mask serves three resolutions. It is drawn on cells of 16^3 voxels, and expanded
to tokens for the encoder and to voxels for the MIP loss. True = hidden = counted by
the losses. Needs torch alone.
"""
import math

import torch


def random_block_mask(batch, grid, ratio, generator=None):
    """Hide exactly ceil(ratio * cells) cells of each sample, without replacement [SMIT 2; release].

    batch: number of masks; grid (D, H, W) in cells; ratio in [0, 1], else ValueError.
    A ratio of .7 hides 152 of 6^3 cells (70.37 %). Returns (batch, D, H, W) bool.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"a mask ratio of {ratio} is not in [0, 1]")
    cells = math.prod(grid)
    # rounded first: .07 * 100 is 7.000000000000001, and must hide 7
    count = math.ceil(round(ratio * cells, 6))

    order = torch.rand(batch, cells, generator=generator).argsort(dim=1)
    hidden = torch.zeros(batch, cells, dtype=torch.bool)
    hidden.scatter_(1, order[:, :count], True)
    return hidden.view(batch, *grid)


def expand_mask(mask, factor):
    """Repeat each cell along every axis: (B, D, H, W) -> (B, factor D, factor H, factor W)."""
    for axis in (1, 2, 3):
        mask = mask.repeat_interleave(factor, dim=axis)
    return mask
