"""Read weights made by other arrangements of the same network [ours]. Needs torch alone.

Patch merging concatenates eight neighbours, and its norm and reduction weigh them
in that order. The order is a convention: swin.py uses row-major, others use their own.
"""
import re

import torch

FORMAT = 2  # of today's checkpoints, as config["format"]; without it they are of format 1

ROW_MAJOR = ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1))
# offsets (D, H, W) in the order of the authors' release, and of format 1
RELEASE = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1))

MERGE_WEIGHT = re.compile(r"(^|\.)stages\.\d+\.merge\.(norm\.weight|norm\.bias|reduction\.weight)$")


def upgrade(state_dict, config):
    """Bring a network's weights to today's format.

    state_dict: of a student, a teacher, a fine-tuned network or an encoder alone.
    config: the settings of the run that made it.
    Returns (state dict, a line to print, or None where nothing had to be done). The
    state dict given is not changed. ValueError for a format that is not known here.
    """
    layout = config.get("format", 1)
    if layout == FORMAT:
        return state_dict, None
    if layout != 1:
        raise ValueError(f"weights of format {layout!r} are newer than this program, which reads "
                         f"formats 1 and {FORMAT}: update it")
    upgraded = {}
    for name, weight in state_dict.items():
        if MERGE_WEIGHT.search(name):
            weight = reorder_neighbours(weight, RELEASE)
        upgraded[name] = weight
    return upgraded, ("weights of an older format: the inputs of patch merging were put in "
                      "row-major order")


def reorder_neighbours(weight, order):
    """Bring a merge's last axis, 8 neighbours of C channels each, from `order` to row-major."""
    if weight.ndim == 0 or weight.shape[-1] % 8:
        return weight  # no merge of ours: whoever loads it will refuse it by its shape
    positions = torch.tensor([order.index(offset) for offset in ROW_MAJOR])
    neighbours = weight.unflatten(-1, (8, -1))                             # (..., 8, C)
    return neighbours.index_select(-2, positions.to(weight.device)).flatten(-2)
