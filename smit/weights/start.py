"""Begin a new pre-training run with other weights than random ones [ours]."""
from typing import NamedTuple

import torch

from smit.weights.reading import Encoder, compare, fill, read_encoder, read_file

HEADS = ("voxel_head", "patch_head", "image_head")


class Start(NamedTuple):
    """The weights that a new run begins with."""
    student: Encoder
    teacher: Encoder    # None: a copy of the student
    centers: dict       # {"mpd.value": (K,), "itd.value": (K,)}; {}: zero


def read_start(path):
    """Read what a run can begin with: a Start.

    path: a last.pt, for student, teacher, their heads and the centres; a student.pt, for the
    student and its heads; or another file that read_encoder knows, for the encoder.
    ValueError for any other, and for an encoder that must not be trained on.
    """
    state = read_file(path)
    student, teacher = read_encoder(path, "student", state=state), None
    if "scattered_reverse" in student.habits:
        raise ValueError(f"{path}: its encoder puts windows back in a wrong order, as the authors' "
                         "release does, and pre-training does not go on from such. Fine-tune it")
    if student.arguments["patch"] != 2:
        raise ValueError(f"{path}: its patches are {student.arguments['patch']} voxels wide, and "
                         "pre-training needs 2")
    if isinstance(state.get("teacher"), dict):
        teacher = read_encoder(path, "teacher", state=state)
    centers = state.get("centers")
    return Start(student, teacher, centers if isinstance(centers, dict) else {})


def begin(start, student, teacher, centers):
    """Write a Start into the networks of a new run; returns a report.

    student, teacher: SMIT, the latter or None. centers: {name: losses.Center}.
    Heads that the file lacks stay random, and a teacher that it lacks becomes the student's copy.
    ValueError for a head or centre of another shape than the file's, and for two heads where the
    run has one.
    """
    inside = dict(start.student.weights)
    lines = [start.student.report]
    if "mask_token" not in inside:
        inside["mask_token"] = student.encoder.mask_token.detach()
        lines.append("new: the mask token, at random")
    fill(student.encoder, inside)
    lines += fill_heads(student, start.student.left_out)

    if teacher and start.teacher:
        fill(teacher.encoder, start.teacher.weights)
        lines.append("teacher: as in the file")
        lines += fill_heads(teacher, start.teacher.left_out)
    elif teacher:
        copied = student.state_dict()
        teacher.load_state_dict({name: copied[name] for name in teacher.state_dict()})
        lines.append("teacher: a copy of the student")

    for name, center in centers.items():
        value = start.centers.get(f"{name}.value")
        if value is None:
            lines.append(f"new: centre of {name}, 0")
            continue
        if not isinstance(value, torch.Tensor) or value.shape != center.value.shape:
            size = value.numel() if isinstance(value, torch.Tensor) else "no"
            raise ValueError(f"the centre of {name} has {size} prototypes in the file, and "
                             f"{len(center.value)} here: use its --prototypes")
        center.value.copy_(value)
        lines.append(f"centre of {name}: as in the file")
    return "\n".join(lines)


def fill_heads(network, weights):
    """Write the heads among {name: tensor} into a network; returns a line on each of its heads."""
    if network.image_head and network.image_head is network.patch_head:
        require_one_head(weights)
    lines = []
    for name in HEADS:
        head = getattr(network, name)
        if head is None:
            continue
        inside = {}
        for full_name, tensor in weights.items():
            if full_name.startswith(f"{name}."):
                inside[full_name.removeprefix(f"{name}.")] = tensor
        if not inside:
            lines.append(f"new: {name}, at random")
            continue

        alike, counts = compare(head.state_dict(), inside)
        if not alike:
            raise ValueError(f"{name}: {counts}; use the settings of the run that made it")
        head.load_state_dict(inside)
        lines.append(f"{name}: {counts}")
    return lines


def require_one_head(weights):
    """Raise ValueError if image head and patch head among {name: tensor} differ."""
    for name, tensor in weights.items():
        other = weights.get(name.replace("image_head.", "patch_head."), tensor)
        if not torch.equal(tensor, other):
            raise ValueError("the file has a head for patches and another for the image: leave out "
                             "--shared_head, which takes one for both")
