"""Read the encoder in a file of any known kind, whole or not at all [ours].

Reading order: Encoder, read_encoder; the file; its settings, the encoder's sizes; into a network.
"""
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch

from smit.baselines.unet import UNet3D
from smit.runtime import load_checkpoint
from smit.settings import SIZES, require
from smit.swin import SwinTransformer3D
from smit.weights import names, orders, safetensors_file
from smit.weights.habits import HABITS, adopt

# keys that hold weights; an average of a fine-tuning run goes before its newest ones
WRAPPERS = ("average", "state_dict", "model", "student", "teacher", "net", "network_weights")
# what this project's encoders have; a run's settings tell of another as "imported"
OWN = {"patch": 2, "mlp_ratio": 4, "qkv_bias": False, "habits": []}


class Encoder(NamedTuple):
    """Hold the encoder in a file: its weights, named as in SwinTransformer3D, and facts on it."""
    weights: dict       # {name: tensor}; mask_token may lack
    arguments: dict     # of SwinTransformer3D: SIZES, in_channels, patch, mlp_ratio, qkv_bias
    habits: list        # of habits.HABITS; empty for this project's own
    config: dict        # settings of the run that made the file; {} where it holds none
    left_out: dict      # {name: tensor} beside the encoder, but for dropped ones: heads, a decoder
    report: str         # lines for a person; the last one counts parameters

    def build(self, **others):
        """Build this encoder; others: further arguments of SwinTransformer3D."""
        others.setdefault("mask_token", "mask_token" in self.weights)
        encoder = adopt(SwinTransformer3D(**{**self.arguments, **others}), self.habits)
        fill(encoder, self.weights)
        return encoder

    def settings(self):
        """Make a run's settings of this encoder: SIZES, and "imported" where it is no own one."""
        sizes = {name: self.arguments[name] for name in SIZES}
        given = {**self.arguments, "habits": self.habits}
        imported = {name: given[name] for name in OWN}
        return sizes if imported == OWN else {**sizes, "imported": imported}


def read_encoder(path, part=None, merge=None, drop=(), state=None):
    """Read the encoder in a file: an Encoder whose weights are whole and finite.

    part: "student" or "teacher", of a last.pt.
    state: what read_file gives, if it is at hand.
    merge: a key of orders.ORDERS, where the file does not tell.
    drop: how the names of tensors begin that may be left out, beyond those known.
    ValueError, one line, where a tensor is missing, unknown, of a wrong shape or not finite.
    """
    state = read_file(path) if state is None else state
    try:
        return recognise(path, state, part, merge, tuple(drop))
    # a stranger's settings raise anything
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError,
            ArithmeticError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} holds no pre-trained {part or 'encoder'} that can be used: "
                         f"{reason}") from None


def recognise(path, state, part, merge, drop):
    """Find the encoder in the dict of a file. Arguments, result, errors: as of read_encoder."""
    tensors, keys = unwrap(state, part)
    config, exported = settings_of(state)
    if config.get("network") == "unet":
        raise ValueError("its weights are of the U-Net of smit.baselines; give --net unet")
    tensors, shared_prefix = strip(tensors)
    family, prefix = names.find_encoder(tensors)
    weights, left_out, dropped = translate(tensors, family, prefix, drop)
    if family == "smit" and not config and not merge:
        raise ValueError("no settings beside the weights, and so no word on the order of merges; "
                         "give student.pt or last.pt of train_ssl.py, or best.pt of finetune.py")

    if "mask_token" in weights:
        weights["mask_token"] = weights["mask_token"].flatten()      # (1, 1, C) in the release
    order, reason = merge_order(family, config, tensors, merge)
    weights = orders.merges_row_major(weights, orders.ORDERS[order])
    arguments = deduce_arguments(weights, config.get("window"))
    habits = told_habits(config) if config else find_habits(family, order, weights)
    new_norms = {}
    if family == "monai" and not exported:
        new_norms = output_norms(arguments)
    weights = {**weights, **exported, **new_norms}

    alike, counts = compare(expected_weights(arguments, habits, weights), weights)
    if not alike:
        raise ValueError(counts)
    where = ".".join(keys + [shared_prefix + prefix]).strip(".")
    lines = [
        f"{path}: {'safetensors' if is_safetensors(path) else 'a torch file'} with "
        f"{names.FAMILIES[family]}" + (f" under {where}" if where else ""),
        "sizes: " + ", ".join(f"{name} {value}" for name, value in arguments.items()),
        f"merge order: {order}, {reason}",
    ]
    for habit in habits:
        lines.append(f"habit: {HABITS[habit]}")
    if new_norms:
        lines.append(f"new: {listed(new_norms)}, as 1 and 0; MONAI's encoder has none")
    lines.append(f"encoder in the file: {counts}; left out {listed({**left_out, **dropped})}")
    return Encoder(weights, arguments, habits, config, left_out, "\n".join(lines))


# --------------------------------------------------------------------- the file
def read_file(path):
    """Read the dict in a torch file, or {"model": tensors, "config": settings} of safetensors.

    A torch file's CRCs are checked, and no code in it is run. ValueError names file and fault.
    """
    if not is_safetensors(path):
        return load_checkpoint(path)
    tensors, metadata = safetensors_file.read(path)
    try:
        config = json.loads(metadata.get("config", "{}"))
    except (ValueError, RecursionError):                 # of a number's digits, too
        raise ValueError(f"{path}: the config in its metadata is no JSON; make it anew") from None
    if isinstance(config, dict) and isinstance(config.get("labels"), dict):
        try:
            # JSON has text in place of numbers
            config["labels"] = {int(number): name for number, name in config["labels"].items()}
        except ValueError:
            raise ValueError(f"{path}: the labels in its metadata are not numbered; make it "
                             "anew") from None
    return {"model": tensors, "config": config}


def is_safetensors(path):
    """Whether a file is meant as safetensors: by its name, or by the brace after eight bytes."""
    path = Path(path)
    if path.suffix == ".safetensors" or not path.is_file():
        return path.suffix == ".safetensors"
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def unwrap(state, part=None):
    """Return the {name: tensor} in a checkpoint, and the keys of WRAPPERS that lead to it.

    part: a key to prefer, "student" or "teacher".
    """
    keys = []
    while not holds_tensors(state):
        inside = [key for key in WRAPPERS if isinstance(state.get(key), dict) and state[key]]
        if part in inside:
            inside, part = [part], None
        if not inside:
            found = ", ".join(map(repr, list(state)[:5]))
            raise ValueError(f"no weights under {', '.join(WRAPPERS)}; its keys are {found}")
        keys.append(inside[0])
        state = state[inside[0]]
    if part == "teacher":
        raise ValueError("no teacher in it; last.pt of train_ssl.py holds one")
    for name in state:
        safetensors_file.check_name(name)
    return state, keys


def holds_tensors(state):
    """Whether a dict holds named tensors and nothing else."""
    return len(state) > 0 and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())


def strip(tensors):
    """Drop the PREFIXES that all names share: ({name: tensor}, what was dropped)."""
    dropped = ""
    while True:
        shared = [prefix for prefix in names.PREFIXES
                  if all(name.startswith(prefix) for name in tensors)]
        if not shared:
            return tensors, dropped
        tensors = {name.removeprefix(shared[0]): tensor for name, tensor in tensors.items()}
        dropped += shared[0]


def translate(tensors, family, prefix, drop):
    """Sort tensors into the encoder's, by our names, known ones beside it, and those to drop.

    ValueError for a tensor that is none of these.
    """
    used, left_out, dropped, unknown = {}, {}, {}, {}
    for name, tensor in tensors.items():
        ours = names.our_name(name, family, prefix)
        if ours and ours in used:
            raise ValueError(f"two tensors for {ours}; the second is {name}")
        if ours:
            used[ours] = tensor
        elif name.startswith(drop):
            dropped[name] = tensor
        elif ours is None or names.is_beside(name, family, prefix):
            left_out[name] = tensor
        else:
            unknown[name] = tensor
    if unknown:
        raise ValueError(f"unexpected {listed(unknown)}, unknown in {names.FAMILIES[family]}; if "
                         "they may go, say how they begin: python -m smit.weights FILE --drop")
    return used, left_out, dropped


# --------------------------------------------- its settings, the encoder's sizes
def settings_of(state):
    """Return a run's settings in a file, or {}, and what export.to_monai set apart, or {}."""
    apart = state.get("smit")
    exported = isinstance(apart, dict) and isinstance(apart.get("weights"), dict)
    config = apart.get("config") if exported else state.get("config")
    if not isinstance(config, dict) or not config.keys() >= set(SIZES):
        return {}, {}
    return config, apart["weights"] if exported else {}


def merge_order(family, config, tensors, given=None):
    """Choose a key of orders.ORDERS, and say why.

    ValueError where another one is given than that which the file tells.
    """
    if config:
        order, reason = told_order(config)
        if given not in (None, order):
            raise ValueError(f"merge order {given} is asked for, and the file tells {order}, "
                             f"{reason}: leave out --merge")
        return order, reason
    if given:
        return given, "as asked for"
    if family == "release":
        return "release", "as the authors' code has it"
    if any(".mlp.fc1." in name for name in tensors):
        return "monai-1.4", "which is older than all others, as are its names fc1 and fc2"
    return "monai-1.4", ("guessed: MONAI's default until 1.5, and a file does not tell; one of a "
                         "newer MONAI must go through python -m smit.weights --merge first")


def told_order(config):
    """Read the order of merges off a run's settings: (a key of orders.ORDERS, why)."""
    _, old = orders.upgrade({}, config)             # ValueError for a format not known here
    if old:
        return "release", "as this project's files of format 1 have it"
    return orders.order_of(told_habits(config)), "as this project has it"


def told_habits(config):
    """List the habits that a run's settings tell of its encoder."""
    return list(config.get("imported", {}).get("habits", []))


def find_habits(family, order, weights):
    """List the habits that an imported encoder was trained with."""
    habits = []
    if "patch_norm.weight" not in weights:
        habits.append("no_patch_norm")
    if family != "smit":
        habits.append("attended_padding")
    if family == "monai":
        habits.append("cut_bias_index")
    if order == "monai-1.4":
        habits.append("duplicated_merge")
    if family == "release":
        habits.append("scattered_reverse")
    return habits


def deduce_arguments(weights, window=None):
    """Read SwinTransformer3D's arguments off an encoder's weights; window: if known.

    Missing tensors and wrong shapes are not noticed here but by `compare`.
    """
    if "patch_embed.weight" in weights:
        patch_embed = weights["patch_embed.weight"]
    else:
        patch_embed = torch.empty(len(weights["patch_embed.bias"]), 1, 2, 2, 2)
    if patch_embed.ndim != 5 or len(set(patch_embed.shape[2:])) != 1:
        raise ValueError(f"a patch embedding of shape {tuple(patch_embed.shape)}, where one of "
                         "3-D cubes is needed")

    blocks, tables = {}, {}                                                # of each stage
    for name, tensor in weights.items():
        match = re.fullmatch(r"stages\.(\d+)\.blocks\.\d+\.attention\.bias_table", name)
        if match:
            stage = int(match[1])
            blocks[stage] = blocks.get(stage, 0) + 1
            tables.setdefault(stage, tensor)
    if sorted(blocks) != list(range(len(blocks))) or not blocks:
        raise ValueError(f"bias tables of stages {sorted(blocks)}, where all from 0 on are needed")

    mlp = weights.get("stages.0.blocks.0.mlp.0.weight")
    mlp_ratio = 4 if mlp is None else max(1, mlp.shape[0] // patch_embed.shape[0])
    return {
        "in_channels": patch_embed.shape[1],
        "embed_dim": patch_embed.shape[0],
        "depths": [blocks[stage] for stage in range(len(blocks))],
        "heads": [tables[stage].shape[1] for stage in range(len(blocks))],
        "window": list(window or cubic_window(len(tables[0]))),
        "patch": patch_embed.shape[2],
        "mlp_ratio": mlp_ratio,
        "qkv_bias": "stages.0.blocks.0.attention.qkv.bias" in weights,
    }


def cubic_window(rows):
    """Return the cubic window whose bias table has (2 side - 1)^3 rows."""
    offsets = round(rows ** (1 / 3))
    if offsets ** 3 != rows or offsets % 2 == 0:
        raise ValueError(f"bias tables of {rows} rows, which no cubic window has")
    return [(offsets + 1) // 2] * 3


def output_norms(arguments):
    """Make the norms of the stages' outputs, which MONAI has not, as 1 and 0."""
    norms = {}
    for stage in range(len(arguments["depths"])):
        channels = arguments["embed_dim"] * 2 ** stage
        norms[f"norms.{stage}.weight"] = torch.ones(channels)
        norms[f"norms.{stage}.bias"] = torch.zeros(channels)
    return norms


def expected_weights(arguments, habits, weights):
    """Return {name: tensor without memory} of the encoder that these arguments make."""
    with torch.device("meta"):
        encoder = SwinTransformer3D(**arguments, mask_token="mask_token" in weights)
        return adopt(encoder, habits).state_dict()


# --------------------------------------------------------------- into a network
def read_run(path, network, sizes):
    """Read a run's checkpoint that may lack tensors: (weights, settings of its run).

    It is a student.pt or last.pt of train_ssl.py, a student.pt of smit.baselines, or a checkpoint
    of finetune.py.

    network: "student" or "teacher"; sizes: names of settings that must be there, those of the U-Net
    or of the Swin encoder. ValueError for any other file, and for one of the other architecture.
    """
    state = load_checkpoint(path)
    alone = "model" in state                                    # student.pt holds one network
    found, config = state.get("model" if alone else network), state.get("config")
    if alone and isinstance(state.get("average"), dict):        # of finetune.py: what it evaluated
        found = state["average"]
    sound = (isinstance(found, dict) and len(found) > 0
             and isinstance(config, dict) and config.keys() >= set(sizes)
             and all(isinstance(name, str) for name in found)
             and all(isinstance(value, torch.Tensor) for value in found.values()))
    way_out = "student.pt or last.pt of train_ssl.py"
    if "width" in sizes:
        way_out = "student.pt of smit.baselines"
    require(sound and not (alone and network != "student"),
            f"{path} holds no pre-trained {network}; give {way_out}")
    wanted, there = "unet" if "width" in sizes else "swin", config.get("network", "swin")
    require(there == wanted, f"{path} holds a {there}, and a {wanted} is wanted: fine-tune it with "
                             f"--net {there}, or give another")
    held, claimed = held_and_claimed(path, found, config, sizes)
    require(held * 100 >= claimed,
            f"{path}: its settings are of an encoder of {claimed:,} values, and it holds {held:,} "
            "of them, not 1 in 100; give the file as its run wrote it")
    return orders.upgrade(found, config)[0], config


def held_and_claimed(path, found, config, sizes):
    """Count the values that a run's encoder has by its settings: (those in the file, all).

    No memory is taken for them: settings of a few bytes can claim any. sizes: as of read_run.
    """
    arguments = {name: config[name] for name in sizes}
    imported = config.get("imported", {})
    try:
        if not isinstance(imported, dict) or not imported.keys() <= OWN.keys():
            raise ValueError(f"what is imported must be a dict of {', '.join(OWN)} alone")
        # a block has several tensors; a loop over 10^9 blocks would not end
        if sum(arguments.get("depths", [])) > len(found):
            raise ValueError(f"{sum(arguments['depths'])} blocks, and {len(found)} tensors")
        with torch.device("meta"):
            if "width" in arguments:
                encoder = UNet3D(**arguments).encoder
            else:
                arguments |= {name: imported[name] for name in imported if name != "habits"}
                encoder = SwinTransformer3D(**arguments, mask_token=False)
                adopt(encoder, imported.get("habits", ()))
    # a stranger's settings raise anything
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError,
            ArithmeticError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: its settings make no encoder ({reason})") from None
    expected = encoder.state_dict()
    inside = {name.removeprefix("encoder."): tensor for name, tensor in found.items()}
    return count(matching(expected, inside)), count(expected)


def fill(encoder, weights, partial=False):
    """Write weights, named as in SwinTransformer3D, into an encoder; returns how many fit.

    The mask token is left out where the encoder has none, and the patch embedding adapted to its
    channels. partial: write what fits and leave the rest.
    ValueError, with nothing written, unless every parameter of either has its counterpart (or
    partial=True), and for values that are not finite.
    """
    own = encoder.state_dict()
    weights = dict(weights)
    if "mask_token" not in own:
        weights.pop("mask_token", None)
    if "patch_embed.weight" in weights:
        channels = own["patch_embed.weight"].shape[1]
        weights["patch_embed.weight"] = adapt_channels(weights["patch_embed.weight"], channels)

    alike, counts = compare(own, weights)
    if not alike and not partial:
        raise ValueError(f"encoder weights: {counts}; build the network as the pre-trained one "
                         "was, or ask for a partial load")
    matched = matching(own, weights)
    for name, tensor in matched.items():
        if not tensor.isfinite().all():
            raise ValueError(f"encoder weights that are not finite, first in {name}: "
                             "use another checkpoint")
    encoder.load_state_dict({**own, **matched})
    return counts


def compare(own, weights):
    """Compare an encoder's tensors with others: (whether each has a counterpart, the counts)."""
    matched = matching(own, weights)
    missing = {name: tensor for name, tensor in own.items() if name not in matched}
    unexpected = {name: tensor for name, tensor in weights.items() if name not in matched}
    counts = (f"{count(matched):,} of {count(own):,} matched; missing {listed(missing)}; "
              f"unexpected {listed(unexpected)}")
    return not missing and not unexpected, counts


def matching(own, weights):
    """Return those of the weights that have a counterpart of the same name and shape."""
    return {name: tensor for name, tensor in weights.items()
            if name in own and tensor.shape == own[name].shape}


def adapt_channels(weight, channels):
    """Make a patch embedding (C, c, *patch) for another number of channels.

    It answers an image repeated in all channels as the original layer answers the image.
    """
    if weight.ndim != 5 or weight.shape[1] == channels:
        return weight
    return weight.sum(1, keepdim=True).repeat(1, channels, 1, 1, 1) / channels


def count(weights):
    """Sum the numbers of values in tensors."""
    return sum(tensor.numel() for tensor in weights.values())


def listed(weights):
    """Say how many values tensors hold, and the first names."""
    first = ", ".join(list(weights)[:3])
    if len(weights) > 3:
        first += ", ..."
    return f"{count(weights):,}" + (f" ({first})" if first else "")
