"""Use trained networks from Python: a checkpoint, a volume, and its features or organs [ours].

    from smit.inference import features, load_encoder, load_network, segment
    encoder = load_encoder("runs/ssl/student.pt")          # or any file that smit.weights reads
    maps, affines = features(encoder, "scan.nii.gz")       # tokens of each stage, and their places
    net = load_network("runs/finetune/best.pt")
    label = segment(net, "scan.nii.gz")                    # (X, Y, Z) uint8, on the file's grid

A volume is a NIfTI file, or an array (X, Y, Z) with its affine. It is prepared as the network's
training volumes were: spacing, orientation and intensities come from the checkpoint. evaluate.py
predicts with these functions.
"""
import math
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch

from smit import data, runtime, transforms, weights
from smit.segment import build_network, predict

MAX_CROP = 2 ** 27       # voxels of a window, as 512^3: no card trains on more [ours]
SETTINGS = {"num_classes", "spacing", "modality", "hu_window", "crop", *weights.SIZES}


class Features(NamedTuple):
    """Maps of tokens, from fine to coarse."""
    maps: list          # of (C, D, H, W): the stages' normed outputs, then the last merge's
    affines: list       # of (4, 4): from a token's index to the mm, in RAS+, of its centre


# ---------------------------------------------------------------------- networks
def load_encoder(path, device="cpu", part=None):
    """Load the pre-trained encoder in a file: a SwinTransformer3D in eval mode.

    Its `preparation` says how its training volumes were prepared, None where the file does not;
    its `report` counts the parameters. part: "student" or "teacher" of a last.pt.
    ValueError, one line, for a file that does not fill an encoder.
    """
    found = weights.read_encoder(path, part)
    encoder = found.build()
    try:
        encoder.preparation = preparation_of_run(found.config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    encoder.report = found.report
    return encoder.to(device).eval()


def load_network(path, device="cpu"):
    """Load the fine-tuned network in a file: a SegmentationNet in eval mode.

    Its `config` holds the settings of its run, its `preparation` how volumes are prepared.
    ValueError, one line, for any other file.
    """
    state = weights.read_file(path)
    config = state.get("config")
    if "model" not in state or not isinstance(config, dict) or not SETTINGS <= config.keys():
        raise ValueError(f"{path} holds no fine-tuned network: give the best.pt of finetune.py")
    config = {"train": [], "held_back": [], "labels": {}, "drop_path": 0.0, "checkpointing": False,
              "hu_offset": 0.0, **config}
    try:
        check_settings(config)
        upgraded, note = weights.upgrade(state.get("average") or state["model"], config)
        check_fit(config, upgraded)
        net = build_network(config)
        net.load_state_dict(upgraded)
        net.preparation = preparation_of_run(config)
    # a stranger's settings raise anything
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: weights and settings do not fit each other ({reason})") from None
    if note:
        print(f"{path}: {note}")
    net.config = config
    return net.to(device).eval()


def check_settings(config):
    """Raise ValueError unless settings that prediction uses later are what they should be."""
    crop, classes, labels = config["crop"], config["num_classes"], config["labels"]
    if not (isinstance(crop, (list, tuple)) and len(crop) == 3
            and all(type(side) is int and side > 0 for side in crop)
            and math.prod(crop) <= MAX_CROP):
        raise ValueError(f"crop {str(crop)[:200]} is not three whole numbers above 0, of "
                         f"{MAX_CROP:,} voxels at most")
    if type(classes) is not int or not 2 <= classes <= 256:
        raise ValueError(f"num_classes {classes!r} is not one of 2..256")
    if not (isinstance(labels, dict) and all(type(number) is int for number in labels)
            and all(isinstance(name, str) for name in labels.values())):
        raise ValueError(f"labels {str(labels)[:200]} are not names of numbers")
    for name in ("train", "held_back"):
        names = config[name]
        if not (isinstance(names, (list, tuple)) and all(isinstance(text, str) for text in names)):
            raise ValueError(f"{name} {str(names)[:200]} is no list of names")


def check_fit(config, found):
    """Raise ValueError unless weights {name: tensor} fill the network that settings describe.

    The network takes no memory here: settings of a few bytes can claim any.
    """
    # a block has several tensors, and of fewer no network need be built
    if not sum(config.get("depths", ())) <= len(found):
        raise ValueError(f"{sum(config['depths'])} blocks, and {len(found)} tensors")
    with torch.device("meta"):
        expected = build_network(config).state_dict()
    alike, counts = weights.compare(expected, found)
    if not alike:
        raise ValueError(counts)


def preparation_of_run(config, modality=None):
    """Read how a run prepared its volumes off its settings; None where they do not say it.

    modality: of the volumes to prepare, in place of the run's own. Another one than that takes no
    hu_offset from it. ValueError where the settings say what cannot be.
    """
    if not config.keys() >= {"spacing", "modality", "hu_window"}:
        return None
    modality = modality or config["modality"]
    hu_offset = config.get("hu_offset", 0.0) if modality == config["modality"] else 0.0
    try:
        low, high = config["hu_window"]
        if type(hu_offset) not in (int, float) or not abs(hu_offset) < math.inf:
            raise ValueError(f"hu_offset {hu_offset!r} is no number")
        return data.Preparation(tuple(config["spacing"]), modality, (low, high),
                                hu_offset=hu_offset)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its settings do not say how volumes are prepared ({error})") from None


# ---------------------------------------------------------------------- volumes
def prepare_volume(volume, affine=None, settings=None):
    """Prepare a file, or an array (X, Y, Z) with its affine: a dict as of data.load_case.

    settings: a Preparation. ValueError for a volume that cannot be used.
    """
    if settings is None:
        raise ValueError("this encoder's file does not say how volumes are prepared: "
                         "pass preparation=Preparation(...), of smit.transforms")
    if isinstance(volume, (str, PathLike)):
        prepared = data.load_case({"image": str(volume), "label": None}, settings)
        data.tell(prepared["concerns"], one_by_one=True)
        return prepared

    if np.asarray(volume).dtype.kind not in "biuf":
        raise ValueError(f"an array of {np.asarray(volume).dtype}: give one of real numbers")
    # a copy in torch's order of bytes and axes: arrays are often flipped views
    image = torch.from_numpy(np.array(volume, dtype=np.float32, order="C"))
    if affine is None or np.shape(affine) != (4, 4) or image.ndim != 3:
        raise ValueError(f"an array of shape {tuple(image.shape)}: give (X, Y, Z) and its affine, "
                         "(4, 4)")
    affine = np.asarray(affine, dtype=np.float64)
    if not image.isfinite().all() or not abs(np.linalg.det(affine[:3, :3])) > 1e-9:
        raise ValueError("the array or its affine is not finite, or the affine is singular")
    prepared, grid = transforms.prepare(image + settings.hu_offset, affine, settings)
    return {"image": prepared, "affine": grid, "label": None,
            "original_affine": affine, "original_shape": tuple(image.shape)}


@torch.no_grad()
def features(encoder, volume, affine=None, preparation=None, wanted=None, precision="auto"):
    """Encode a whole volume: Features, their maps on the encoder's device.

    preparation: a Preparation in place of the encoder's own.
    wanted: indices of the maps that are used; the others come as None and cost nothing.
    precision: "fp32", "fp16", "bf16", or "auto" as the scripts choose it.
    """
    prepared = prepare_volume(volume, affine, preparation or encoder.preparation)
    device = next(encoder.parameters()).device
    x = prepared["image"].to(device)[None, None].float() / 255                 # (1, 1, D, H, W)
    channels = encoder.patch_embed.in_channels
    with runtime.Precision(precision, device).autocast():
        outputs = encoder(x.expand(-1, channels, -1, -1, -1), wanted=wanted)

    maps, affines = [], []
    for level, output in enumerate(outputs):
        maps.append(None if output is None else output[0].float())             # (C, D_i, H_i, W_i)
        affines.append(token_affine(prepared["affine"], encoder.patch * 2 ** level))
    return Features(maps, affines)


def token_affine(affine, side):
    """The affine of tokens that are `side` voxels wide, from that of their voxels."""
    change = np.diag([side, side, side, 1.0])
    change[:3, 3] = (side - 1) / 2                                              # a token's centre
    return affine @ change


@torch.no_grad()
def segment(nets, volume, affine=None, tta=False, precision="auto", **sliding):
    """Label a whole volume: (X, Y, Z) uint8 on the CPU, on the volume's own grid.

    nets: a network of load_network, or several, whose softmax is averaged.
    tta: average over the axial quarter turns of training. precision: as of `features`.
    sliding: of sliding.sliding_window: overlap, blend, batch, stitch_on_cpu.
    """
    nets = list(nets) if isinstance(nets, (list, tuple)) else [nets]
    check_alike(nets)
    prepared = prepare_volume(volume, affine, nets[0].preparation)
    turns = range(4) if tta else (0,)
    with runtime.Precision(precision, next(nets[0].parameters()).device).autocast():
        scores = class_scores(nets, prepared["image"].numpy(), turns, **sliding)
    return transforms.to_file_grid(scores, prepared["affine"], prepared["original_shape"],
                                   prepared["original_affine"])


def class_scores(nets, image, turns=(0,), **sliding):
    """Score the classes of a prepared volume (D, H, W): (num_classes, D, H, W).

    These are one network's logits, or the mean softmax of several. ValueError if they are not
    finite, for the largest of them would be a label that nobody predicted.
    """
    total = 0
    for net in nets:
        logits = predict(net, image, tuple(net.config["crop"]), turns, **sliding)
        if not logits.isfinite().all():
            raise ValueError("the network's output is not finite: use --precision fp32")
        if len(nets) == 1:
            return logits
        total += logits.softmax(0)
    return total / len(nets)


def check_alike(nets):
    """Raise ValueError unless networks prepare volumes alike and number organs alike."""
    for net in nets[1:]:
        for name in ("spacing", "modality", "hu_window", "hu_offset", "num_classes", "labels"):
            first, other = nets[0].config.get(name, 0), net.config.get(name, 0)
            if first != other:
                raise ValueError(f"networks of different {name} cannot be averaged: {first} and "
                                 f"{other}")
