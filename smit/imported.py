"""Habits of other people's Swin transformers, for imported weights alone.

Nothing of the paper is here. An encoder trained elsewhere may compute a little differently; its weights are worth what
they were trained to be worth only where the same is computed again. `adopt` gives an encoder such habits. Each one
stands against a second implementation in tests/test_imported.py.
"""
import torch
from torch import nn

from smit.swin import (PatchMerging, SwinBlock, WindowAttention, pad_to, padded_grid, partition_windows,
                       recompute_attention, relative_position_index, shift_mask)

HABITS = {
    "no_patch_norm": "no LayerNorm follows the patch embedding",                                    # [MONAI]
    "attended_padding": "padded cells take part in the softmax",                                    # [Swin; release]
    "cut_bias_index": "a window clamped to a small grid reads biases of wrong offsets",             # [MONAI]
    "duplicated_merge": "a merge reads neighbours 010 and 001 twice, 110 and 011 never",            # [MONAI to 1.4]
    "scattered_reverse": "windows are put back in a wrong order, so tokens are scattered",          # [release]
}

# the offsets, along (D, H, W), of the eight neighbours that MONAI's merging read from version 0.9 to 1.4
DUPLICATED_OFFSETS = ("000", "100", "010", "001", "101", "010", "001", "111")


def adopt(encoder, habits):
    """Give an encoder habits, names of HABITS, in place; returns it.

    Its weights stay as they are, but for those of a patch norm that goes. Copies of the encoder keep its habits.
    ValueError for a habit that is not known.
    """
    for habit in habits:
        if habit not in HABITS:
            raise ValueError(f"habit {habit!r} is none of {', '.join(HABITS)}; these weights need a newer version")

    if "no_patch_norm" in habits:
        encoder.patch_norm = nn.Identity()
    for stage in encoder.stages:
        if "duplicated_merge" in habits:
            stage.merge.__class__ = DuplicatedMerging
        for block in stage.blocks:
            if "attended_padding" in habits:
                block.mask_padding = False
            if "cut_bias_index" in habits:
                block.attention.__class__ = CutBiasAttention
            if "scattered_reverse" in habits:
                block.__class__ = ScatteredBlock
    return encoder


class DuplicatedMerging(PatchMerging):
    """Join the neighbours that MONAI joined from version 0.9 to 1.4: two of the eight twice, two never."""

    def forward(self, x):
        """x (B, D, H, W, C) -> (B, D/2, H/2, W/2, 2C)."""
        x = pad_to(x, padded_grid(x.shape[1:4], (2, 2, 2)))
        neighbours = []
        for d, h, w in DUPLICATED_OFFSETS:
            neighbours.append(x[:, int(d)::2, int(h)::2, int(w)::2])        # (B, D/2, H/2, W/2, C)
        return self.reduction(self.norm(torch.cat(neighbours, -1)))


class CutBiasAttention(WindowAttention):
    """Attend with MONAI's biases: for a clamped window of n cells, the first n rows and columns of the full index.

    Cells are numbered otherwise in the full window, so most pairs meet the bias of another offset. Where the window
    is not clamped this changes nothing.
    """

    def position_bias(self, index):
        n = len(index)
        full = relative_position_index(self.window, None, index.device)     # (n_full, n_full)
        return super().position_bias(full[:n, :n])


class ScatteredBlock(SwinBlock):
    """Attend as the authors' release does: with its reverse of windows, which is no inverse of the partition.

    The result for each token lands elsewhere, at a place that depends on the grid alone. The release also clamps no
    window to a small grid, pads it instead, and shifts the windows of odd blocks whatever the grid.
    """

    def attend(self, x):
        """x (B, D, H, W, C) -> the same shape."""
        D, H, W = grid = tuple(x.shape[1:4])
        padded = padded_grid(grid, self.window)
        shift, mask = (0, 0, 0), None
        if self.shifted:
            shift = tuple(side // 2 for side in self.window)
            mask = shift_mask(padded, self.window, shift, x.device)         # (nW, n, n)
        index = relative_position_index(self.window, None, x.device)        # (n, n)

        x = pad_to(x, padded).roll([-s for s in shift], dims=(1, 2, 3))     # (B, D', H', W', C)
        windows = partition_windows(x, self.window)                         # (B*nW, n, C)
        if self.checkpointing:
            windows = recompute_attention(self.attention, windows, index, mask)
        else:
            windows = self.attention(windows, index, mask)
        x = scatter_windows(windows, self.window, padded).roll(shift, dims=(1, 2, 3))
        return x[:, :D, :H, :W]


def scatter_windows(windows, window, grid):
    """Put windows into their grid in the release's order of axes, where partition_windows' inverse is another.

    windows (B*nW, n, C), grid (D, H, W). Returns (B, D, H, W, C).
    """
    D, H, W = grid
    d, h, w = window
    C = windows.shape[-1]
    x = windows.view(-1, D // d, H // h, W // w, d, h, w, C)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)                                   # the inverse has 0, 1, 4, 2, 5, 3, 6, 7
    return x.reshape(-1, D, H, W, C)
