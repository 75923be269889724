"""Give an encoder habits of other people's Swin transformers, for imported weights alone [ours].

Nothing of the paper is here. An encoder trained elsewhere may compute a little otherwise, and
its weights work only in a network that computes as the one they were trained in.
Each habit stands against a second implementation in tests/test_habits.py.
"""
import torch
from torch import nn

from smit.swin import (
    PatchMerging, SwinBlock, WindowAttention, pad_to, padded_grid, partition_windows,
    recompute_attention, relative_position_index, shift_mask)
from smit.weights.orders import MONAI_BEFORE

HABITS = {
    # [MONAI]
    "no_patch_norm": "no LayerNorm follows the patch embedding",
    # [Swin; MONAI; release]
    "attended_padding": "padded cells take part in the softmax",
    # [MONAI]
    "cut_bias_index": "a window clamped to a small grid reads biases of wrong offsets",
    # [MONAI 0.9.0 to 1.4]
    "duplicated_merge": "a merge reads neighbours 010 and 001 twice, 110 and 011 never",
    # [release]
    "scattered_reverse": "windows are put back in a wrong order, which scatters their tokens",
}


def adopt(encoder, habits):
    """Give an encoder habits, names of HABITS, in place; returns it.

    Its weights stay as they are, but for those of a patch norm that goes. Copies of the encoder
    keep its habits. ValueError for a habit that is not known.
    """
    for habit in habits:
        if habit not in HABITS:
            raise ValueError(f"habit {habit!r} is none of {', '.join(HABITS)}; "
                             "these weights need a newer version")

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
    """Join the neighbours that MONAI joined from 0.9.0 to 1.4: two of eight twice, two never."""

    def forward(self, x):
        """x (B, D, H, W, C) -> (B, D/2, H/2, W/2, 2C)."""
        x = pad_to(x, padded_grid(x.shape[1:4], (2, 2, 2)))
        neighbours = []
        for d, h, w in MONAI_BEFORE:
            neighbours.append(x[:, d::2, h::2, w::2])                       # (B, D/2, H/2, W/2, C)
        return self.reduction(self.norm(torch.cat(neighbours, -1)))


class CutBiasAttention(WindowAttention):
    """Attend with MONAI's biases: n cells of a clamped window take the full window's first n.

    Cells are numbered otherwise in the full window, so most pairs meet the bias of another
    offset. Where the window is not clamped this changes nothing.
    """

    def position_bias(self, index):
        n = len(index)
        full = relative_position_index(self.window, None, index.device)     # (n_full, n_full)
        return super().position_bias(full[:n, :n])


class ScatteredBlock(SwinBlock):
    """Attend as the authors' release does, whose reverse of windows does not undo their partition.

    The result for each token lands elsewhere, at a place that depends on the grid alone. The
    release also clamps no window to a small grid, which it pads, and shifts the windows of odd
    blocks whatever the grid.
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
    """Put windows into their grid in the release's order of axes, which is a wrong one.

    windows (B*nW, n, C), grid (D, H, W). Returns (B, D, H, W, C).
    """
    D, H, W = grid
    d, h, w = window
    C = windows.shape[-1]
    x = windows.view(-1, D // d, H // h, W // w, d, h, w, C)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)                         # the inverse: 0 1 4 2 5 3 6 7
    return x.reshape(-1, D, H, W, C)
