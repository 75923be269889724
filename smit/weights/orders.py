"""Bring the inputs of patch merging from other people's order to row-major [ours].

Needs torch alone.
Patch merging concatenates eight neighbours, and its norm and reduction weigh them
in that order. The order is a convention: swin.py uses row-major, others use their own.
"""
import re

import torch

PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # as format 1 had them
FORMAT = 2  # of today's checkpoints, as config["format"]; without it they are of format 1

# offsets (D, H, W) in the order in which a merge concatenates its neighbours
ROW_MAJOR = (  # here, and in MONAI's PatchMergingV2
    (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1))
RELEASE = (  # in the authors' release, and in format 1
    (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1))
MONAI = (  # in MONAI's PatchMerging, from 1.5.0 on
    (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
MONAI_BEFORE = (  # and from 0.9.0 to 1.4: two neighbours twice, two never
    (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))
ORDERS = {"row-major": ROW_MAJOR, "release": RELEASE, "monai-1.5": MONAI, "monai-1.4": MONAI_BEFORE}

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
    return merges_row_major(state_dict, RELEASE), (
        "weights of an older format: the inputs of patch merging were put in row-major order")


def upgrade_run(state, parts):
    """Bring a run's networks, and its optimiser's moments, to today's format.

    state: what last.pt holds; parts {name: module, optimiser, ... or None} of the run that goes on.
    """
    config = state["config"]
    if config.get("format", 1) >= FORMAT:
        return state
    upgraded, names = dict(state), {}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            upgraded[name], _ = upgrade(state[name], config)
            names |= {parameter: key for key, parameter in part.named_parameters()}
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            upgraded[name] = upgrade_moments(state[name], part, names, config)
    if "precision" in config:
        precision = PRECISIONS.get(config["precision"], config["precision"])
        upgraded["config"] = {**config, "precision": precision}
    return upgraded


def upgrade_moments(state, optimizer, names, config):
    """Bring an optimiser's state to today's format; names {parameter: its name}."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = dict(state["state"])
    for number, parameter in enumerate(parameters):
        if number not in entries:
            continue
        name = names.get(parameter, "")
        moments = {}
        for key, value in entries[number].items():
            # a moment has the shape of its parameter; the count of steps has none
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                value = upgrade({name: value}, config)[0][name]
            moments[key] = value
        entries[number] = moments
    return {**state, "state": entries}


def merges_row_major(state_dict, order):
    """Return the weights with the inputs of all merges brought from `order` to row-major.

    MONAI_BEFORE is no permutation. Its weights stay, for habits.DuplicatedMerging to read.
    """
    if order == MONAI_BEFORE:
        return state_dict
    permuted = {}
    for name, weight in state_dict.items():
        if MERGE_WEIGHT.search(name):
            weight = reorder_neighbours(weight, order)
        permuted[name] = weight
    return permuted


def order_of(habits):
    """Name the order that merges have here, a key of ORDERS; habits: of the encoder's [habits.py].

    It is row-major, but for the weights that merges_row_major leaves.
    """
    return "monai-1.4" if "duplicated_merge" in habits else "row-major"


def reorder_neighbours(weight, order):
    """Bring a merge's last axis, 8 neighbours of C channels each, from `order` to row-major."""
    if weight.ndim == 0 or weight.shape[-1] % 8:
        return weight  # no merge of ours: whoever loads it will refuse it by its shape
    positions = torch.tensor([order.index(offset) for offset in ROW_MAJOR])
    neighbours = weight.unflatten(-1, (8, -1))                             # (..., 8, C)
    return neighbours.index_select(-2, positions.to(weight.device)).flatten(-2)
