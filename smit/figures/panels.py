"""Pictures of volumes as SVG: reconstructions, organs, token maps [SMIT Fig. 2, 5].

Planes are shown as radiologists read them: anterior up, the patient's right on the viewer's left,
superior up. The sagittal plane has anterior on the left. All planes of a picture have one scale in
mm, whatever the spacing. Volumes are (D, H, W) along R, A, S, of any device; grey values lie in
[0, 1]. The pixels are embedded as PNG; browsers stretch them.

Reading order: planes, the layout of a panel, the three panels.
"""
import math

import numpy as np
import torch
from torch.nn import functional as F

from smit.data import organs
from smit.figures.canvas import (
    color_bar, colored, grey, picture, rectangle, text, text_width, write_svg)
from smit.metrics import dice, to_numpy

PLANES = "axial", "coronal", "sagittal"
ERROR_TOP = 0.5                         # absolute errors from here on look alike
HIDDEN = (70, 85, 140)                  # colour of masked cells: no grey value, so no tissue
LETTER, BOX = "#ffd200", "#00c8ff"      # letters on a picture, the box around a token
HOT = (0, 0, 0), (70, 10, 115), (190, 45, 85), (250, 150, 40), (255, 255, 200)    # lighter is more

# Colours of 1..13, BTCV's organs. They were searched for the largest smallest distance between any
# two, in OKLab, to normal, deuteranope and protanope eyes (Vienot's matrices). Then they were dealt
# out so that organs that touch are farthest apart.
ORGAN_COLORS = [tuple(bytes.fromhex(color)) for color in (
    "f0b400 ff69b4 a578ff 00a578 3cc3ff e1ff00 7800ff ff5a00 1e69c3 a54b3c 69ffff c30096 00e187"
).split()]
# When all 13 are taken they begin anew, mixed with black (below 0) or white. So 130 organs differ
# (TotalSegmentator has 117), and none is as dark as what it is drawn on.
SHADES = 0, -0.5, 0.5, -0.25, 0.25, -0.6, 0.65, -0.375, 0.375, -0.15


# ------------------------------------------------------------------------------------------ planes
def slices(volume, at=None):
    """Cut the axial, coronal and sagittal plane of a volume (D, H, W, ...) [ours].

    at: voxel through which the planes go, by default the middle. Returns (H, D, ...), (W, D, ...)
    and (W, H, ...). Rows run to posterior, inferior, inferior; columns to the patient's left, left,
    posterior.
    """
    i, j, k = at or middle(volume.shape)
    planes = volume[:, :, k], volume[:, j], volume[i]
    return [plane[::-1, ::-1].swapaxes(0, 1) for plane in planes]


def middle(shape):
    return [side // 2 for side in shape[:3]]


def plane_sizes(shape, spacing_mm, longest=240):
    """Return (width, height) in pixels of the three planes; the volume's longest side is given."""
    sides_mm = np.multiply(shape[:3], spacing_mm)
    R, A, S = np.maximum(1, longest * sides_mm / sides_mm.max())
    return [(R, A), (R, S), (A, S)]


def shrunk(plane, size):
    """Reduce values (h, w) to (width, height) pixels at most; a large scan's page stays small."""
    width, height = (math.ceil(side) for side in size)
    h, w = plane.shape
    if h <= height and w <= width:
        return plane
    values = torch.from_numpy(plane.astype(np.float32))[None, None]
    size = min(h, height), min(w, width)
    return F.interpolate(values, size, mode="bilinear", antialias=True)[0, 0].numpy()


def nearest(plane, width, height):
    """Resample labels (h, w) to (height, width), each pixel the label at its centre."""
    h, w = plane.shape
    rows = (2 * np.arange(height) + 1) * h // (2 * height)
    columns = (2 * np.arange(width) + 1) * w // (2 * width)
    return plane[rows][:, columns]


def covering(mask, color):
    """Return pixels (h, w, 4) of a colour where a bool mask (h, w) is True, clear elsewhere."""
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    pixels[mask] = (*color, 255)
    return pixels


# ------------------------------------------------------------------------------------------ layout
class Panel:
    """Lay out the planes of a volume: a row for each plane, a column for each way to show it."""

    LEFT, TOP = 14, 62                               # of the first picture, in pixels
    CAPTION = 28                                     # height of a caption and the gap under it
    GAP = 12                                         # between columns

    def __init__(self, shape, spacing_mm, longest=240):
        self.sizes = plane_sizes(shape, spacing_mm, longest)
        self.column_width = max(150, *(width for width, _ in self.sizes))
        self.drawing = []
        self.right = 0
        self.bottom = self.TOP + sum(height + self.CAPTION for _, height in self.sizes)

    def left_of(self, column):
        return self.LEFT + column * (self.column_width + self.GAP)

    def box(self, column, row):
        """Return (x, y, width, height) of a picture."""
        width, height = self.sizes[row]
        y = self.TOP + sum(above + self.CAPTION for _, above in self.sizes[:row])
        return self.left_of(column), y, width, height

    def heading(self, column, words):
        self.drawing.append(text(self.left_of(column), self.TOP - 10, words, font_weight="bold"))
        self.right = max(self.right, self.left_of(column) + self.column_width)

    def show(self, column, row, pixels, smooth=True, **style):
        """Place pixels, as `canvas.png` takes them, over what is already in this place."""
        self.drawing.append(picture(*self.box(column, row), pixels, smooth, **style))

    def show_grey(self, column, row, plane):
        self.show(column, row, grey(shrunk(plane, self.sizes[row])))

    def caption(self, column, row, words):
        _, y, _, height = self.box(column, row)
        self.drawing.append(text(self.left_of(column), y + height + 17, words, font_size=13))

    def letters(self, column, row):
        """Write where the patient's right, anterior and superior are; small pictures have none."""
        x, y, width, height = self.box(column, row)
        at_left, at_top = ("RA", "RS", "AS")[row]
        if min(width, height) > 60:
            halo = dict(fill=LETTER, stroke="black", stroke_width=3, paint_order="stroke",
                        font_weight="bold")
            self.drawing += [text(x + 5, y + height / 2 + 5, at_left, **halo),
                             text(x + width / 2, y + 16, at_top, "middle", **halo)]

    def scan(self, column, heading, volume, at=None, letters=True):
        """Fill the column of the scan itself: its planes, their numbers, the patient's letters."""
        self.heading(column, heading)
        at = at or middle(volume.shape)
        for row, plane in enumerate(slices(volume, at)):
            axis = 2 - row
            self.show_grey(column, row, plane)
            if letters:
                self.letters(column, row)
            self.caption(column, row, f"{PLANES[row]} {at[axis] + 1} of {volume.shape[axis]}")

    def color_bar(self, column, colors, labels):
        bar = color_bar(self.left_of(column), self.bottom, self.column_width, colors, labels)
        self.drawing += bar

    def legend(self, column, heading, entries):
        """Fill a column with [(color, words), ...] under a heading."""
        x = self.left_of(column)
        self.drawing.append(text(x, self.TOP - 10, heading, font_weight="bold"))
        for number, (color, words) in enumerate(entries):
            y = self.TOP + 24 * number
            self.drawing += [rectangle(x, y, 18, 18, fill="rgb({}, {}, {})".format(*color)),
                             text(x + 26, y + 14, words)]
            self.right = max(self.right, x + 26 + text_width(words))
        self.bottom = max(self.bottom, self.TOP + 24 * len(entries))

    def write(self, path, title, notes=()):
        """Write the panel with lines of notes at its foot."""
        y = self.bottom + 14
        if notes:
            y += 32                                  # a colour bar may stand there
        for words in notes:
            self.drawing.append(text(self.LEFT, y, words, font_size=13))
            y += 20
            self.right = max(self.right, self.LEFT + text_width(words, 13))
        heading = text(self.LEFT, 26, title, font_size=17, font_weight="bold")
        width = max(self.right, self.LEFT + text_width(title, 17)) + self.LEFT
        write_svg(path, width, y, [heading, *self.drawing])


# --------------------------------------------------------------------------------- reconstructions
def reconstruction_panel(path, image, hidden, reconstruction, spacing_mm,
                         title="Masked image prediction"):
    """Show original, masked, reconstruction, pasted and error, in three planes [SMIT Fig. 5].

    image, reconstruction: (D, H, W) in [0, 1]. hidden: (D, H, W) bool, True where masked. "pasted"
    has the prediction where hidden and the image elsewhere. Each MSE is of the plane it stands
    under, those at the foot are of the whole volume. Values outside [0, 1] are clipped in the
    picture and not in the MSE.
    """
    image = to_numpy(image).astype(np.float32)
    reconstruction = to_numpy(reconstruction).astype(np.float32)
    hidden = to_numpy(hidden).astype(bool)
    error = np.abs(reconstruction - image)

    panel = Panel(image.shape, spacing_mm)
    panel.scan(0, "original", image)
    for column, heading in enumerate(("masked", "reconstruction", "pasted", "absolute error"), 1):
        panel.heading(column, heading)

    volumes = zip(slices(image), slices(hidden), slices(reconstruction), slices(error))
    for row, (original, hole, guess, wrong) in enumerate(volumes):
        panel.show_grey(1, row, original)
        panel.show(1, row, covering(hole, HIDDEN), smooth=False)
        panel.caption(1, row, f"{hole.mean():.1%} hidden")

        panel.show_grey(2, row, guess)
        panel.caption(2, row, mse_text(wrong))

        panel.show_grey(3, row, np.where(hole, guess, original))
        panel.caption(3, row, mse_text(np.where(hole, wrong, 0)))

        panel.show(4, row, colored(shrunk(wrong, panel.sizes[row]), HOT, 0, ERROR_TOP))
        panel.caption(4, row, f"hidden: {mse_text(wrong[hole])}")

    panel.color_bar(4, HOT, ("0", f"{ERROR_TOP / 2:g}", f"{ERROR_TOP:g} and more"))
    panel.write(path, title, (
        f"Whole volume: {mse_text(error[hidden])} where hidden, {mse_text(error[~hidden])} "
        "elsewhere. Grey: 0 is black, 1 is white.",
        "MSE under a picture: of the whole plane. MSE under the error: of hidden voxels alone."))


def mse_text(errors):
    """Return the mean square of errors in words, a dash for no errors."""
    return f"MSE {np.square(errors).mean():.4f}" if errors.size else "MSE –"


# ------------------------------------------------------------------------------------------ organs
def label_colors(names):
    """Return (256, 3) uint8, a colour for each label of {number: organ}.

    BTCV's organs have their 13 colours in every data set. Other organs have shades of them, or the
    13 where the data set has none of BTCV's.
    """
    numbers_of_organs = {organ: number for number, organ in enumerate(organs.CODES)}
    fixed = {}
    for label, name in names.items():
        if organs.organ(name) in numbers_of_organs:
            fixed[label] = numbers_of_organs[organs.organ(name)]

    table = np.zeros((256, 3), np.uint8)
    free = 13 if fixed else 0                        # the next colour of an organ that is not fixed
    for label in range(1, 256):
        if label in fixed:
            number = fixed[label]
        else:
            number = free
            free += 1
        table[label] = mixed(ORGAN_COLORS[number % 13], SHADES[number // 13 % len(SHADES)])
    return table


def mixed(color, share):
    """Mix a colour with this share of white, or, if it is below 0, of black."""
    color = np.array(color)
    ground = 255 if share > 0 else 0
    return color + np.floor(abs(share) * (ground - color)).astype(int)


def edges(labels, width=2):
    """Find pixels of labels (h, w) within `width` of another label or the background, inside."""
    h, w = labels.shape
    padded = np.pad(labels, width, "edge")
    found = np.zeros(labels.shape, bool)
    for step in range(2 * width + 1):
        found |= padded[step:step + h, width:width + w] != labels
        found |= padded[width:width + h, step:step + w] != labels
    return found & (labels > 0)


def busiest(label):
    """Find the voxel whose three planes each show the most labels, of those the largest areas."""
    numbers = np.setdiff1d(np.unique(label), 0)
    voxel = []
    for axis, size in enumerate(label.shape):
        others = tuple(other for other in range(3) if other != axis)
        score = np.zeros(size)
        for number in numbers:
            area = (label == number).sum(others)
            score += np.minimum(area, 1) + area / label.size
        voxel.append(int(score.argmax()) if score.any() else size // 2)
    return voxel


def overlay_panel(path, image, label_true, label_pred, spacing_mm, names, contours=True,
                  title="Segmentation"):
    """Show image, truth and prediction with a legend, where most organs are [SMIT Fig. 2].

    image (D, H, W) in [0, 1]; labels (D, H, W) of whole numbers, one of which may be None; names
    {number: organ}. The planes go through the most organs of the truth. contours: draw outlines,
    which leave the image to be seen, else fill. The legend has each organ's Dice in the volume.
    """
    image = to_numpy(image).astype(np.float32)
    labels = {}
    for heading, label in (("truth", label_true), ("prediction", label_pred)):
        if label is not None:
            labels[heading] = to_numpy(label).astype(np.uint8)
    at = busiest(next(iter(labels.values())))
    colors = label_colors(names)

    panel = Panel(image.shape, spacing_mm, longest=320)
    panel.scan(0, "image", image, at)
    for column, (heading, label) in enumerate(labels.items(), 1):
        panel.heading(column, heading)
        for row, (plane, organ_plane) in enumerate(zip(slices(image, at), slices(label, at))):
            panel.show_grey(column, row, plane)
            panel.show(column, row, painted(organ_plane, colors, panel.sizes[row], contours))

    shown = sorted(set().union(*(np.unique(label) for label in labels.values())) - {0})
    scores = {}
    if len(labels) == 2 and shown:
        values = dice(labels["prediction"], labels["truth"], int(max(shown)) + 1)
        scores = {number: values[number - 1] for number in shown}
    entries = []
    for number in shown:
        words = names.get(int(number), f"label {number}")
        if number in scores:
            words += f" {scores[number]:.2f}"
        entries.append((colors[number], words))
    panel.legend(len(labels) + 1, "organ, Dice" if scores else "organ", entries)
    panel.write(path, title)


def painted(labels, colors, size, contours):
    """Return labels (h, w) as pixels (H, W, 4) in their colours, twice as fine as `size`."""
    width, height = (max(1, round(2 * side)) for side in size)
    labels = nearest(labels, width, height)
    opacity = 255 * edges(labels, width=3) if contours else 170 * (labels > 0)
    return np.dstack([colors[labels], opacity.astype(np.uint8)])


# -------------------------------------------------------------------------------------- token maps
def token_map(tokens):
    """Turn the three main components of tokens into colours [ours].

    tokens (N, C), or (C, d, h, w). Returns colours in [0, 1], (N, 3) or (d, h, w, 3), and the three
    components' shares of the variance. Each component runs from its 2nd to its 98th percentile.
    Its sign is the one of positive skew: a rotation of the features changes nothing. A component
    without variance is grey.
    """
    x = torch.as_tensor(tokens).cpu().double()
    grid = x.shape[:1]
    if x.ndim == 4:
        grid = x.shape[1:]
        x = x.flatten(1).T
    x = x - x.mean(0)                                                   # (N, C)

    # the main components, of which there may be fewer than three channels
    values, vectors = torch.linalg.eigh(x.T @ x)                        # rising
    values = F.pad(values.flip(0), (0, 3))[:3]
    vectors = F.pad(vectors.flip(1), (0, 3))[:, :3]
    scores = x @ vectors                                                # (N, 3)
    skew = (scores ** 3).sum(0)
    scores = torch.where(skew < 0, -scores, scores)

    ends = torch.tensor([0.02, 0.98], dtype=scores.dtype)
    low, high = scores.quantile(ends, 0)
    scaled = ((scores - low) / (high - low).clamp_min(1e-30)).clamp(0, 1)
    shares = values / x.square().sum().clamp_min(1e-30)
    colors = torch.where(shares > 1e-9, scaled, 0.5)
    return to_numpy(colors.reshape(*grid, 3).float()), shares.tolist()


def similarity_map(tokens, index):
    """Measure the cosine similarity of each token to the one at `index`, in [-1, 1] [ours].

    tokens (N, C) with a number as index, which gives (N,), or (C, d, h, w) with three numbers,
    which gives (d, h, w).
    """
    x = torch.as_tensor(tokens).cpu().double()
    if x.ndim == 4:
        x = F.normalize(x, dim=0)
        chosen = x[:, index[0], index[1], index[2]]
    else:
        x = F.normalize(x.T, dim=0)
        chosen = x[:, index]
    return to_numpy(torch.einsum("c...,c->...", x, chosen).clamp(-1, 1).float())


def over_voxels(values, cell, shape):
    """Repeat values of tokens (d, h, w, ...) over the voxels they stand for, (D, H, W, ...)."""
    for axis in range(3):
        values = values.repeat(cell, axis)
    return values[tuple(map(slice, shape))]


def token_panel(path, image, features, spacing_mm, at=None, title="Tokens"):
    """Show main components as colours, and the similarity to one voxel's token, boxed [ours].

    image (D, H, W) in [0, 1]; features: a list of (C, d, h, w), of any resolutions; at: the voxel,
    by default the middle.
    """
    image = to_numpy(image).astype(np.float32)
    at = at or middle(image.shape)
    panel = Panel(image.shape, spacing_mm)
    panel.scan(0, "image", image, at)

    for number, tokens in enumerate(features):
        sides = [n / d for n, d in zip(image.shape, tokens.shape[1:])]
        cell = 2 ** math.ceil(math.log2(max(sides)))                    # voxels per axis of a token
        chosen = tuple(index // cell for index in at)
        components, shares = token_map(tokens)
        similarity = similarity_map(tokens, chosen)
        # a narrower range would show noise as structure
        low = min(0.9, float(similarity.min()))

        size = " x ".join(map(str, tokens.shape[1:]))
        left, right = 2 * number + 1, 2 * number + 2
        panel.heading(left, f"{size}: main components")
        panel.heading(right, f"{size}: similarity")
        component_planes = slices(over_voxels(components, cell, image.shape), at)
        similarity_planes = slices(over_voxels(similarity, cell, image.shape), at)
        for row, plane in enumerate(slices(image, at)):
            panel.show_grey(left, row, plane)
            panel.show(left, row, grey(component_planes[row]), smooth=False, opacity=0.65)
            similar = colored(similarity_planes[row], HOT, low, 1)
            panel.show(right, row, similar, smooth=False)
            for column in (0, right):
                box = token_box(panel.box(column, row), row, chosen, cell, image.shape)
                panel.drawing.append(rectangle(*box, fill="none", stroke=BOX, stroke_width=2))

        percent = ", ".join(f"{share:.0%}" for share in shares)
        panel.caption(left, 2, f"of the variance: {percent}")
        panel.color_bar(right, HOT, (f"{low:.2f}", "1"))

    panel.write(path, title, (
        "Main components: the first three as red, green and blue. "
        "Similarity: cosine to the token in the box.",))


def token_box(box, row, token, cell, shape):
    """Return (x, y, width, height) of one token in the picture of a plane."""
    x, y, width, height = box
    across, down = ((0, 1), (0, 2), (1, 2))[row]     # axes of the plane's columns and rows
    left, right = token_ends(token[across], cell, shape[across], width)
    top, bottom = token_ends(token[down], cell, shape[down], height)
    return x + left, y + top, right - left, bottom - top


def token_ends(index, cell, voxels, pixels):
    """Return where a token begins and ends along an axis, which a picture shows backwards."""
    first, last = index * cell, min((index + 1) * cell, voxels)
    return (voxels - last) / voxels * pixels, (voxels - first) / voxels * pixels
