"""Pictures of volumes as PNG: reconstructions, organs, token maps [SMIT Fig. 2, 5].

Planes are shown as radiologists read them: anterior up, the patient's right on the viewer's left, superior up; the
sagittal one with anterior on the left. All planes of a picture have one scale, whatever the spacing. A picture is a
numpy array (H, W, 3) of uint8, built from others by `below` and `beside`; curves are in charts.py, the page of all in report.py.

Reading order: PNG, letters and layout, planes, the three panels, what the scripts call.
"""
import math
import struct
import unicodedata
import zlib

import numpy as np
import torch
from torch.nn import functional as F

from smit.data import organs
from smit.metrics import dice, to_numpy
from smit.runtime import atomic_write

ERROR_TOP = 0.5                                            # absolute errors from here on look alike
HIDDEN = (70, 85, 140)                                     # of masked cells: no grey value, so no tissue
MARK, BOX = (255, 210, 0), (0, 200, 255)                   # of letters on a picture, of the box around a token
HOT = (0, 0, 0), (70, 10, 115), (190, 45, 85), (250, 150, 40), (255, 255, 200)     # lighter is more
# Of 1..13, BTCV's organs: searched for the largest smallest distance between any two, in OKLab, to normal, deuteranope
# and protanope eyes (Vienot's matrices), then dealt out so that organs that touch are farthest apart
COLORS = [bytes.fromhex(color) for color in (
    "f0b400 ff69b4 a578ff 00a578 3cc3ff e1ff00 7800ff ff5a00 1e69c3 a54b3c 69ffff c30096 00e187").split()]
# 5 x 9 dots for each character from space to ~, as 12 hexadecimal digits, row by row; the last two rows hang down
FONT = (
    "0000000000000421084010000a50000000000a57d5f52800047d1c5f100019c88889cc000c9511593400042000000000022210820800"
    "08208422200000255d52000000213e42000000000003110000003c000000000000063000010888884000045463151000046108423800"
    "0e884c887c000e884c18b8000232a5f108001f878218b80006443d18b8001f08884210000e8c5d18b8000e8c5e113000000318063000"
    "00018c0311000222208208000007c1f000001041044440000e88444010000e8deb7838000e8c7f18c4001e8c7d18f8000e8c2108b800"
    "1e8c6318f8001f843d087c001f843d0840000e8c2f18b800118c7f18c4000e2108423800071084293000119531494400108421087c00"
    "11dd6b18c40011ce6b39c4000e8c6318b8001e8c7d0840000e8c635934001e8c7d4944000e8c1c18b8001f2108421000118c6318b800"
    "118c62a51000118c6b5dc400118a88a8c400118a884210001f0888887c000e42108438001082082084000e1084213800045440000000"
    "000000007c00082000000000000382f8bc001087a318f8000003a1083800010be318bc000003a3f838000647908420000003e318bc2e"
    "1087a318c400040308423800020184210a4c1084a98a48000c21084238000006ab5ad4000007a318c4000003a318b8000007a318fa10"
    "0003e318bc210005b10840000003a0e0f80008479084180000046318bc00000462a5100000046b5aa80000045445440000046318bc2e"
    "0007c4447c0002211042080004210842100008210442200000026b200000")


# -------------------------------------------------------------------------------------------------------------- PNG
def write_png(path, pixels):
    """Write uint8 pixels (H, W, 3), or (H, W) in grey, as a PNG, whole or not at all; ValueError for others [ours]."""
    pixels = np.ascontiguousarray(pixels)
    if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)) or pixels.ndim < 2 or not pixels.size:
        raise ValueError(f"{path}: a PNG takes uint8 (H, W, 3) or (H, W), not {pixels.dtype} {pixels.shape}")
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))           # a 0 before each row: it is not filtered

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + chunk(b"IEND", b"")
    atomic_write(path, b"\x89PNG\r\n\x1a\n" + png)


# ----------------------------------------------------------------------------------------------- letters and layout
def glyph(character):
    """Dots (9, w) bool of one character, its empty columns cut off; a box for what the font lacks."""
    place = 12 * (ord(character) - 32)
    dots = int(FONT[place:place + 12], 16) if character.isascii() and character.isprintable() else 0x1f8c6318fc00
    grid = np.array([dots >> bit & 1 for bit in range(44, -1, -1)], bool).reshape(9, 5)
    return grid[:, grid.any(0)] if grid.any() else grid[:, :2]


def text(line, color=(0, 0, 0), ground=(255, 255, 255)):
    """One line of text as a picture, 22 pixels high, its capitals 14. Accents are dropped."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", line) if not unicodedata.combining(c)) or " "
    dots = np.concatenate([np.pad(glyph(c), ((1, 1), (0, 1))) for c in plain], 1).repeat(2, 0).repeat(2, 1)
    return np.where(dots[..., None], np.uint8(color), np.uint8(ground))


def below(*pictures, gap=4):
    """Pictures under each other on white, their left edges aligned."""
    canvas = np.full((sum(len(p) + gap for p in pictures) - gap, max(p.shape[1] for p in pictures), 3), 255, np.uint8)
    top = 0
    for picture in pictures:
        canvas[top:top + len(picture), :picture.shape[1]] = picture
        top += len(picture) + gap
    return canvas


def beside(*pictures, gap=10):
    """Pictures beside each other on white, their upper edges aligned."""
    return below(*(picture.swapaxes(0, 1) for picture in pictures), gap=gap).swapaxes(0, 1)


def column(title, pictures, captions, width):
    """A column of a panel: its title, and pictures centred in `width` pixels, each over its caption."""
    parts = [text(title)]
    for picture, caption in zip(pictures, captions):
        box = np.zeros((len(picture), width, 3), np.uint8)
        left = (width - picture.shape[1]) // 2
        box[:, left:left + picture.shape[1]] = picture
        parts += [box, text(caption)]
    return below(*parts)


def framed(path, title, *parts):
    """Write a panel: its title, its parts under each other, a white margin."""
    write_png(path, np.pad(below(text(title), *parts, gap=10), ((12, 12), (12, 12), (0, 0)), constant_values=255))


def grey(plane):
    """Values (h, w) in the fixed window [0, 1] as (h, w, 3) uint8; what lies outside is clipped."""
    return np.rint(np.clip(plane, 0, 1) * 255).astype(np.uint8)[..., None].repeat(3, -1)


def colored(plane, colors, low, high):
    """Values (h, w) as colours (h, w, 3): `low` is the first of `colors`, `high` the last."""
    place = np.clip((plane - low) / (high - low), 0, 1) * (len(colors) - 1)
    return np.rint(np.stack([np.interp(place, range(len(colors)), c) for c in zip(*colors)], -1)).astype(np.uint8)


def color_scale(colors, labels, width):
    """A bar of all colours over labels, evenly spread between its ends."""
    bar = colored(np.linspace(0, 1, width)[None].repeat(14, 0), colors, 0, 1)
    line = np.full((22, width, 3), 255, np.uint8)
    for label, share in zip(map(text, labels), np.linspace(0, 1, len(labels))):
        left = round(share * (width - label.shape[1]))
        line[:, left:left + label.shape[1]] = label
    return below(bar, line, gap=2)


# ----------------------------------------------------------------------------------------------------------- planes
def slices(volume, at=None):
    """Axial, coronal and sagittal plane of a volume (D, H, W, ...) in radiological display, a pixel a voxel [ours].

    Axes run R, A, S. at: voxel through which the planes go, by default the middle. Returns (H, D, ...), (W, D, ...)
    and (W, H, ...): rows run to posterior, inferior, inferior; columns to the patient's left, left, posterior.
    """
    i, j, k = at or [n // 2 for n in volume.shape[:3]]
    return [plane[::-1, ::-1].swapaxes(0, 1) for plane in (volume[:, :, k], volume[:, j], volume[i])]


def displayed(volume, spacing_mm, at=None, side=240, smooth=True):
    """The planes of `slices` at one scale, the volume's longest side of `side` pixels; smooth: interpolated [ours]."""
    R, A, S = (max(1, round(side * n * mm / max(np.multiply(volume.shape[:3], spacing_mm))))
               for n, mm in zip(volume.shape, spacing_mm))
    shown = []
    for plane, size in zip(slices(volume, at), ((A, R), (S, R), (S, A))):
        if smooth:
            values = torch.from_numpy(plane.astype(np.float32))[None, None]
            shown.append(F.interpolate(values, size, mode="bilinear", antialias=True)[0, 0].numpy())
        else:
            rows, columns = ((2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip(size, plane.shape))
            shown.append(plane[rows][:, columns])
    return shown


def lettered(pictures):
    """Pictures of the three planes with letters where the patient's right, anterior and superior are."""
    marked = []
    for picture, (left, top) in zip(pictures, ("RA", "RS", "AS")):
        picture, left, top = picture.copy(), text(left, MARK, (0, 0, 0)), text(top, MARK, (0, 0, 0))
        height, width = picture.shape[:2]
        if height > 60 and width > 60:
            picture[height // 2 - 11:height // 2 + 11, :left.shape[1]] = left
            picture[:22, width // 2:width // 2 + top.shape[1]] = top
        marked.append(picture)
    return marked


def plane_names(shape, at=None):
    at = at or [n // 2 for n in shape[:3]]
    return [f"{name} {at[axis] + 1} of {shape[axis]}" for name, axis in (("axial", 2), ("coronal", 1), ("sagittal", 0))]


# ----------------------------------------------------------------------------------------------------------- panels
def reconstruction_panel(path, image, hidden, reconstruction, spacing_mm, title="Masked image prediction"):
    """Original, masked, reconstruction, pasted (predicted where hidden) and error, in three planes [SMIT Fig. 5].

    image, reconstruction (D, H, W) in [0, 1], hidden (D, H, W) bool. Each MSE is of the plane it stands under, those at
    the foot are of the whole volume; values outside [0, 1] are clipped in the picture and not in the MSE.
    """
    image, reconstruction = (to_numpy(volume).astype(np.float32) for volume in (image, reconstruction))
    hidden, error = to_numpy(hidden).astype(bool), np.abs(reconstruction - image)

    def mse(errors):
        return f"MSE {np.square(errors).mean():.4f}" if errors.size else "-"
    originals, guesses = ([grey(p) for p in displayed(volume, spacing_mm)] for volume in (image, reconstruction))
    holes = [hole[..., None] for hole in displayed(hidden, spacing_mm, smooth=False)]
    errors = [colored(plane, HOT, 0, ERROR_TOP) for plane in displayed(error, spacing_mm)]
    width, planes = max(p.shape[1] for p in originals), list(zip(slices(error), slices(hidden)))
    columns = [
        column("original", lettered(originals), plane_names(image.shape), width),
        column("masked", [np.where(h, np.uint8(HIDDEN), o) for h, o in zip(holes, originals)],
               [f"{h.mean():.1%} hidden" for _, h in planes], width),
        column("reconstruction", guesses, [mse(e) for e, _ in planes], width),
        column("pasted", [np.where(h, g, o) for h, g, o in zip(holes, guesses, originals)],
               [mse(np.where(h, e, 0)) for e, h in planes], width),
        column("absolute error", errors, [f"hidden: {mse(e[h])}" for e, h in planes], width)]
    columns[-1] = below(columns[-1], color_scale(HOT, ("0", f"{ERROR_TOP / 2:g}", f"{ERROR_TOP:g}+"), width))
    facts = f"whole volume: {mse(error[hidden])} where hidden, {mse(error[~hidden])} elsewhere; grey: 0 black, 1 white"
    framed(path, title, beside(*columns), text(facts),
           text("MSE under a picture: of all of that plane; under the error: of its hidden voxels alone"))


def label_colors(names):
    """(256, 3) uint8: a colour for each label of {number: organ}: 13 for BTCV's organs, darker ones for the rest."""
    known = {organ: place for place, organ in enumerate(organs.CODES)}
    own = {number: known[organs.organ(name)] for number, name in names.items() if organs.organ(name) in known}
    others = iter(range(13 * bool(own), 300))
    places = [own[number] if number in own else next(others) for number in range(1, 256)]
    return np.uint8([(0, 0, 0), *([part >> place // 13 for part in COLORS[place % 13]] for place in places)])


def edges(labels, width=2):
    """Pixels of labels (h, w) within `width` of another label or the background, inside their own: bool."""
    padded, (h, w), found = np.pad(labels, width, "edge"), labels.shape, np.zeros(labels.shape, bool)
    for step in range(2 * width + 1):
        for shifted in (padded[step:step + h, width:width + w], padded[width:width + h, step:step + w]):
            found |= shifted != labels
    return found & (labels > 0)


def busiest(label):
    """The voxel whose three planes each show the most labels, and of those the largest areas."""
    numbers = [number for number in np.unique(label) if number]
    counts = [[(label == number).sum(axes) for number in numbers] for axes in ((1, 2), (0, 2), (0, 1))]
    scores = [sum((np.minimum(c, 1) + c / label.size for c in areas), np.zeros(n))
              for areas, n in zip(counts, label.shape)]
    return [int(s.argmax()) if s.any() else len(s) // 2 for s in scores]


def overlay_panel(path, image, label_true, label_pred, spacing_mm, names, contours=True, title="Segmentation"):
    """Image, truth and prediction with a legend, through the planes with most organs of the truth [SMIT Fig. 2].

    image (D, H, W) in [0, 1]; labels (D, H, W) of whole numbers, one of which may be None; names {number: organ}.
    contours: outlines, which leave the image to be seen; else filled. The legend has each organ's Dice in the volume.
    """
    labels = {kind: to_numpy(label).astype(np.uint8) for kind, label in (("truth", label_true), ("prediction", label_pred))
              if label is not None}
    at, table = busiest(next(iter(labels.values()))), label_colors(names)
    base = [grey(plane) for plane in displayed(to_numpy(image).astype(np.float32), spacing_mm, at, 320)]
    width = max(picture.shape[1] for picture in base)
    columns = [column("image", lettered(base), plane_names(image.shape, at), width)]
    for kind, label in labels.items():
        planes = displayed(label, spacing_mm, at, 320, smooth=False)
        painted = [np.where(edges(plane)[..., None], table[plane], picture) if contours else
                   np.where(plane[..., None] > 0, table[plane] // 3 * 2 + picture // 3, picture)
                   for plane, picture in zip(planes, base)]
        columns.append(column(kind, painted, [""] * 3, width))
    shown = sorted(set().union(*map(np.unique, labels.values())) - {0})
    scores = dice(labels["prediction"], labels["truth"], int(max(shown, default=1)) + 1) if len(labels) == 2 else []
    entries = [names.get(int(number), f"label {number}") + (f" {scores[number - 1]:.2f}" if len(scores) else "")
               for number in shown]
    legend = [beside(np.full((22, 22, 3), table[number]), text(entry)) for number, entry in zip(shown, entries)]
    heading = text("organ, Dice" if len(scores) else "organ")
    framed(path, title, beside(*columns, below(heading, *legend, gap=8), gap=14))


# ------------------------------------------------------------------------------------------------------ token maps
def token_map(tokens):
    """The three main components of tokens as colours: values in [0, 1] (..., 3), their shares of the variance [ours].

    tokens (N, C), or (C, d, h, w), which gives (d, h, w, 3). Each component runs from its 2nd to its 98th percentile;
    its sign is the one of positive skew: a rotation of the features changes nothing. Without variance: grey.
    """
    x = torch.as_tensor(tokens).cpu().double()
    grid = x.shape[1:] if x.ndim == 4 else x.shape[:1]
    x = x.flatten(1).T if x.ndim == 4 else x
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)                                                # rising
    values, vectors = F.pad(values.flip(0), (0, 3))[:3], F.pad(vectors.flip(1), (0, 3))[:, :3]
    scores = x @ vectors                                                                        # (N, 3)
    scores = scores * torch.where((scores ** 3).sum(0) < 0, -1, 1)
    low, high = scores.quantile(torch.tensor([.02, .98], dtype=scores.dtype), 0)
    shares = values / x.square().sum().clamp_min(1e-30)
    colors = torch.where(shares > 1e-9, ((scores - low) / (high - low).clamp_min(1e-30)).clamp(0, 1), .5)
    return to_numpy(colors.reshape(*grid, 3).float()), shares.tolist()


def similarity_map(tokens, index):
    """Cosine similarity of each token to the one at `index`, in [-1, 1]: (N,) or (d, h, w), as tokens are [ours].

    tokens (N, C) with a number as index, or (C, d, h, w) with three.
    """
    x = torch.as_tensor(tokens).cpu().double()
    x = F.normalize(x if x.ndim == 4 else x.T, dim=0)
    chosen = x[(slice(None), *index)] if x.ndim == 4 else x[:, index]
    return to_numpy(torch.einsum("c...,c->...", x, chosen).clamp(-1, 1).float())


def token_panel(path, image, features, spacing_mm, at=None, title="Tokens"):
    """What the tokens see: main components as colours, and the similarity to the token of one voxel, boxed [ours].

    image (D, H, W) in [0, 1]; features: a list of (C, d, h, w), of any resolutions; at: the voxel, or the middle.
    """
    image = to_numpy(image).astype(np.float32)
    at = at or [n // 2 for n in image.shape]
    base = [grey(plane) for plane in displayed(image, spacing_mm, at)]
    width, marked, columns = max(p.shape[1] for p in base), lettered(base), []
    for tokens in features:
        cell = 2 ** math.ceil(math.log2(max(n / d for n, d in zip(image.shape, tokens.shape[1:]))))

        def planes(values):                                                    # a token over the voxels it stands for
            for axis in range(3):
                values = values.repeat(cell, axis)
            return displayed(values[tuple(map(slice, image.shape))], spacing_mm, at, smooth=False)
        chosen, box = tuple(index // cell for index in at), np.zeros(tokens.shape[1:], np.uint8)
        box[chosen] = 1
        (components, shares), alike = token_map(tokens), similarity_map(tokens, chosen)
        boxes = [edges(plane)[..., None] for plane in planes(box)]
        marked = [np.where(outline, np.uint8(BOX), picture) for outline, picture in zip(boxes, marked)]
        mixed = [np.uint8(160 * plane) + picture // 8 * 3 for plane, picture in zip(planes(components), base)]
        low = min(0.9, float(alike.min()))                                     # narrower would show noise as structure
        similar = [np.where(outline, np.uint8(BOX), colored(plane, HOT, low, 1))
                   for outline, plane in zip(boxes, planes(alike))]
        size = " x ".join(map(str, tokens.shape[1:]))
        shares = "variance " + " ".join(f"{share:.0%}" for share in shares)
        columns += [column(f"{size}: PCA", mixed, ["", "", shares], width),
                    below(column(f"{size}: similarity", similar, ["", "", ""], width),
                          color_scale(HOT, (f"{low:.2f}", "1"), width))]
    framed(path, title, beside(column("image", marked, plane_names(image.shape, at), width), *columns),
           text("PCA: the first three components as red, green, blue. Similarity: cosine to the token in the box."))
