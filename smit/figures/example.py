"""Make the README's picture: a phantom, its masked form and what a student makes of it [ours]."""
import math

import numpy as np
import torch
from torch.nn import functional as F

from smit import data, phantom, pretrain, transforms
from smit.figures import panels
from smit.figures.canvas import grey, picture, text, write_svg
from smit.masking import expand_mask, random_block_mask

WIDTH = 240                                              # of each picture, in pixels
FINEST = 180                                             # voxels across a picture: a small file
ABOVE_KIDNEYS_MM = 25                                    # this plane shows the most organs


@torch.no_grad()
def example_svg(path, student_path, index=1000, seed=0):
    """Draw original, masked and reconstruction of one axial plane in a row, below 60 kB [ours].

    student_path: the student.pt of a pre-training run, which gives the spacing, the modality and
    the masks' cells. index, seed: of the phantom, by default one that no default run trains on. The
    student sees the whole width of the body, which is more than a view.
    """
    student, config = pretrain.load_student(student_path)
    if student.voxel_head is None:
        raise ValueError(f"{student_path} has no voxel head: give a run whose --mip is above 0")

    body, level = phantom_slab(config, index, seed)                     # (D, H, W) in [0, 1]
    cell = config["mask_cell"]
    image = padded(body, math.lcm(cell, 2 * student.token_side))        # the encoder's last tokens
    grid = [side // cell for side in image.shape]
    cells = random_block_mask(1, grid, 0.7, torch.Generator().manual_seed(seed))
    voxels = student.reconstruct(image[None, None], cells, cell)[0, 0]
    hidden = expand_mask(cells, cell)[0]

    # the plane, without the padding
    at = [0, 0, level]
    volumes = (volume[:body.shape[0], :body.shape[1]].numpy() for volume in (image, hidden, voxels))
    original, hole, guess = (panels.slices(volume, at)[0] for volume in volumes)
    draw_row(path, original, hole, guess, config["spacing"])


def phantom_slab(config, index, seed):
    """Return a phantom's body (D, H, W) in [0, 1], as deep as a view, and its best plane."""
    spacing_mm = config["spacing"]
    settings = data.Preparation(tuple(spacing_mm), config["modality"], tuple(config["hu_window"]))
    image, _, affine = phantom.make_patient(seed, index, config["modality"], tuple(spacing_mm))
    body, affine = transforms.prepare(torch.from_numpy(image).float(), affine, settings)

    # the phantom's origin lies between its kidneys
    level = round((ABOVE_KIDNEYS_MM - affine[2][3]) / spacing_mm[2])
    depth = min(config["view"][2], body.shape[2])
    first = int(np.clip(level - depth // 2, 0, body.shape[2] - depth))
    return body[:, :, first:first + depth] / 255, level - first


def padded(volume, multiple):
    """Pad a volume with air at the end of each axis to a multiple of so many voxels."""
    missing = [math.ceil(side / multiple) * multiple - side for side in volume.shape]
    D, H, W = missing
    return F.pad(volume, (0, W, 0, H, 0, D))


def draw_row(path, original, hole, guess, spacing_mm):
    """Write the three pictures, each over its caption."""
    height = WIDTH * original.shape[0] * spacing_mm[1] / (original.shape[1] * spacing_mm[0])
    drawing = []
    for number, words in enumerate(("original", "masked", "reconstruction")):
        x = 6 + number * (WIDTH + 6)
        box = (x, 6, WIDTH, height)
        plane = guess if words == "reconstruction" else original
        plane = panels.shrunk(plane, (FINEST, FINEST * height / WIDTH))
        drawing.append(picture(*box, grey(plane)))
        if words == "masked":
            drawing.append(picture(*box, panels.covering(hole, panels.HIDDEN), smooth=False))
        drawing.append(text(x + WIDTH / 2, height + 24, words, "middle"))
    write_svg(path, 3 * (WIDTH + 6) + 6, height + 34, drawing)
