"""Make synthetic torsos with the 13 BTCV organs, as CT in HU or as T2-like MR. [ours]

Each patient is an atlas of shapes of random size and place, seen through a
smooth random warp. One patient has one anatomy, at any spacing, in CT and in
MR. The atlas has x to the right, y to the front, z up, and its origin between
the kidneys. All lengths are in mm.

Read: tissues, the body from the skin inwards, the canvas on which it is
painted, the scanner, a patient, the files. Check against: a labelled CT.
"""
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from smit.data.organs import ORGANS
from smit.phantom.shapes import (
    Array, Difference, Ellipsoid, Grown, HalfSpace, Intersection, Outside, Point, Shape, Tube,
    Union)
from smit.runtime import atomic_write

Rng = np.random.Generator

MODALITIES = ("ct", "mr")
RIGHT, LEFT = 1, -1                                                     # the sign of x


# ---------------------------------------------------------------------- tissues
class Tissue(NamedTuple):
    """Mean intensities of a tissue; those of a patient differ by about a tenth."""

    ct: float                                                           # HU
    mr: float                                                           # arbitrary units


# The last word of an organ's name is its tissue: "left kidney" consists of "kidney".
TISSUES = {
    "air": Tissue(-1000, 0),
    "lung": Tissue(-830, 40),
    "skin": Tissue(10, 250),
    "fat": Tissue(-105, 600),
    "muscle": Tissue(55, 150),
    "gut": Tissue(60, 260),
    "disc": Tissue(85, 350),
    "bone": Tissue(480, 50),
    "spongy": Tissue(190, 300),
    "cord": Tissue(35, 500),
    "heart": Tissue(95, 180),
    "fluid": Tissue(25, 900),
    "stool": Tissue(40, 420),
    "spleen": Tissue(118, 480),
    "kidney": Tissue(175, 560),
    "medulla": Tissue(120, 700),
    "gallbladder": Tissue(10, 1050),
    "esophagus": Tissue(45, 230),
    "liver": Tissue(100, 260),
    "stomach": Tissue(70, 280),
    "aorta": Tissue(200, 70),
    "cava": Tissue(125, 100),
    "veins": Tissue(155, 110),
    "pancreas": Tissue(85, 380),
    "gland": Tissue(65, 240),
}


class Part(NamedTuple):
    """A shape that is filled with an organ or a tissue.

    name: an organ or a tissue.
    layers: {depth below the surface: tissue from there inwards}.
    keeps_label: whether labels beneath stay, as for a vessel within the liver.
    """

    name: str
    shape: Shape
    layers: Mapping[float, str] = {}
    keeps_label: bool = False


def near(rng: Rng, mean: float | Sequence, spread: float) -> Array:
    """Draw normal numbers around `mean`, cut at two deviations.

    So nobody lacks an organ or has a giant one. Returns float32 of mean's shape.
    """
    return np.float32(mean + spread * np.clip(rng.standard_normal(np.shape(mean)), -2, 2))


def sized(rng: Rng, *radii: float) -> Array:
    """Scale all radii by one random factor of about 5 %."""
    return np.float32(radii) * np.exp(near(rng, 0, .05))


def mirrored(points: Sequence[Point], side: int) -> Array:
    """Put points that are given for the right side on `side`."""
    return np.array(points) * (side, 1, 1)


# -------------------------------------------------------------- trunk and chest
# The outer face of the muscles around chest and belly, and the space they enclose.
WALL = Ellipsoid((0, -6, 40), (146, 108, np.inf))
BELLY = Grown(WALL, -14)


def body(rng: Rng, fat_mm: float) -> list[Part]:
    """Return all parts of a patient in the order in which they are painted."""
    dome = diaphragm(rng)
    cavity = Intersection(Grown(WALL, -15), Grown(dome, -3))
    return [
        *trunk(fat_mm),
        *lungs(rng, dome),
        heart(rng, dome),
        *gut(rng),
        *bones(),
        *liver(rng, cavity),
        gallbladder(rng),
        spleen(rng, cavity),
        *stomach(rng, cavity),
        *kidney_and_adrenal(rng, "right", RIGHT),
        *kidney_and_adrenal(rng, "left", LEFT),
        pancreas(rng),
        esophagus(rng),
        *great_vessels(rng),
    ]


def trunk(fat_mm: float) -> list[Part]:
    """Return skin, fat, and the muscles around the belly and along the spine."""
    skin = Ellipsoid((0, -6, 40), (146 + fat_mm, 108 + .75 * fat_mm, np.inf))
    parts = [
        Part("skin", skin, {2.5: "fat"}),
        Part("muscle", WALL, {13: "fat"}),
    ]
    for side in (LEFT, RIGHT):
        back = mirrored([(35, -72, -170), (35, -72, 0), (31, -86, 120), (30, -96, 240)], side)
        psoas = mirrored([(30, -30, 40), (38, -28, -40), (54, -14, -170)], side)
        parts.append(Part("muscle", Tube(back, 27)))
        parts.append(Part("muscle", Tube(psoas, (6, 17, 26))))
    return parts


def diaphragm(rng: Rng) -> Shape:
    """Return the space under the diaphragm: a dome on either side, one in the middle."""
    right = Ellipsoid((70, 0, 30), (76, 98, near(rng, 92, 4)))
    left = Ellipsoid((-70, -2, 25), (73, 95, near(rng, 84, 4)))
    middle = Ellipsoid((0, 25, 20), (75, 85, near(rng, 82, 4)))
    return Union(Union(right, left, 20), middle, 20)


def lungs(rng: Rng, dome: Shape) -> list[Part]:
    """Return the lungs, lined by 2.5 mm of muscle, with 14 vessels in each."""
    # The mediastinum stays free for the heart, the esophagus and the great vessels.
    mediastinum = Ellipsoid((0, -25, 170), (33, 110, np.inf))
    chest = Intersection(Grown(WALL, -13), Outside(dome), Outside(mediastinum), lung_base)
    parts = [Part("muscle", chest, {2.5: "lung"})]
    for _ in range(14):
        for side in (LEFT, RIGHT):
            fork = rng.uniform((48, -30, 150), (70, 10, 185))
            tip = rng.uniform((55, -80, 138), (115, 55, 230))
            vessel = mirrored([(36, -12, 165), fork, tip], side)
            parts.append(Part("muscle", Tube(vessel, (4.5, 3, 1))))
    return parts


def lung_base(x: Array, y: Array, z: Array) -> Array:
    """Return distances from the lower end of the lungs, which reach down further at the back."""
    return .45 * y + 38 - z


def heart(rng: Rng, dome: Shape) -> Part:
    """Return the heart: muscle around blood, in fat, resting on the diaphragm."""
    ventricles = Ellipsoid((-26, 34, 162), near(rng, (58, 44, 54), 3), -30)
    atria = Ellipsoid((22, 26, 168), (30, 34, 42))
    shape = Difference(Union(ventricles, atria, 10), dome)
    return Part("fat", shape, {3: "heart", 12: "cava"})


# ------------------------------------------------------------------------ bones
def bones() -> list[Part]:
    """Return the spine with its discs and canal, the ribs, the sternum."""
    marrow = {2.3: "spongy"}
    return [
        Part("bone", AlongSpine(vertebral_body), marrow),
        Part("bone", ribs, marrow),
        Part("bone", Ellipsoid((0, 91, 190), (17, 7, 62)), marrow),     # sternum
        Part("bone", AlongSpine(arch), marrow),
        Part("bone", AlongSpine(spinous_process), marrow),
        Part("bone", AlongSpine(transverse_processes), marrow),
        Part("disc", AlongSpine(disc)),
        Part("fluid", AlongSpine(canal), {3: "cord"}),
    ]


class AlongSpine:
    """A shape repeated from vertebra to vertebra along the curve of the spine.

    profile: a shape in x, in y from the spine's axis, and in `level`, the
    distance up or down from the middle of a vertebra; 16 in the middle of a disc.
    """

    def __init__(self, profile: Shape):
        self.profile = profile

    def __call__(self, x: Array, y: Array, z: Array) -> Array:
        from_axis = y + 30 + .0008 * (z + 20) ** 2
        level = np.abs((z + 4) % 32 - 16)
        return self.profile(x, from_axis, level)


def vertebral_body(x: Array, y: Array, level: Array) -> Array:
    return (np.hypot(x / 23, y / 18) - 1) * 20


def disc(x: Array, y: Array, level: Array) -> Array:
    return np.maximum(vertebral_body(x, y, level), 12.5 - level)


def canal(x: Array, y: Array, level: Array) -> Array:
    return np.hypot(x, y + 27) - 8


def arch(x: Array, y: Array, level: Array) -> Array:
    ring = np.abs(np.hypot(x, y + 27) - 12) - 4
    return np.maximum(ring, level - 13)


def spinous_process(x: Array, y: Array, level: Array) -> Array:
    return np.maximum.reduce([np.abs(x) - 3.5, np.abs(y + 38) - 14, level - 8])


def transverse_processes(x: Array, y: Array, level: Array) -> Array:
    return np.maximum(np.hypot(y + 28, level) - 5, np.abs(x) - 36)


def ribs(x: Array, y: Array, z: Array) -> Array:
    """Return distances from bars on the inside of the wall, one each 26 mm.

    They fall forwards, and the lower ones end further back.
    """
    level = z + .45 * (y + 90)                                          # constant along a rib
    from_rib = ((level - 7) % 26 - 13) * .7
    bars = np.hypot(WALL(x, y, z) + 9, from_rib) - 5
    front_end = y - np.minimum(level - 70, 76)
    return np.maximum.reduce([bars, front_end, 16 - level, 14 - np.abs(x)])


# -------------------------------------------------------------------------- gut
class Bowel(NamedTuple):
    """A piece of bowel with its filling, a tissue, and gas.

    Gas begins at a random level in front of the bowel's middle, at the least
    `gas_from` radii from it.
    """

    points: Array                                                       # (n, 3), its course
    radii: float | Array
    filling: str
    gas_from: float


HAUSTRA = np.array((17, 23, 17, 23, 17))                                # the colon bulges


def gut(rng: Rng) -> list[Part]:
    """Return the colon, 15 loops of small bowel and the duodenum."""
    right = [(98, 0, -140), (98, 4, -105), (100, 4, -75), (98, 8, -50), (92, 20, -28)]
    across = [(92, 25, -30), (52, 66, -38), (0, 76, -42), (-55, 68, -12), (-92, 35, 28)]
    left = [(-100, 10, 28), (-104, -8, 0), (-103, -8, -50), (-98, -2, -95), (-88, 4, -140)]
    duodenum = [(30, 40, 12), (46, 30, 4), (46, 18, -22), (26, 14, -38), (-20, 16, -34)]

    pieces = [
        Bowel(near(rng, right, 4), HAUSTRA, "stool", -.6),
        Bowel(near(rng, across, 5), HAUSTRA * .85, "stool", -.6),
        Bowel(near(rng, left, 4), HAUSTRA * .8, "stool", -.6),
    ]
    pieces += [small_bowel(rng) for _ in range(15)]
    pieces.append(Bowel(near(rng, duodenum, 2), 12, "fluid", .5))

    parts = []
    for piece in pieces:
        parts += bowel_parts(rng, piece)
    return parts


def small_bowel(rng: Rng) -> Bowel:
    """Draw a loop of small bowel: five points at random about a random centre."""
    center = rng.uniform((-52, 44, -112), (48, 54, -36))
    points = center + rng.uniform(-32, 32, (5, 3))
    return Bowel(points, rng.uniform(9, 13), rng.choice(("fluid", "gut")), .5)


def bowel_parts(rng: Rng, bowel: Bowel) -> list[Part]:
    """Return a bowel and its gas, which rises to the front: patients lie on their back."""
    level = bowel.points[:, 1].mean() + rng.uniform(bowel.gas_from, 2) * np.max(bowel.radii)
    shape = Difference(Tube(bowel.points, bowel.radii), Outside(BELLY))
    gas = Intersection(Grown(shape, -3), in_front_of(level))
    return [Part("gut", shape, {3: bowel.filling}), Part("air", gas)]


def in_front_of(y: float) -> HalfSpace:
    return HalfSpace((0, -1, 0), np.float32(y))


# ----------------------------------------------------- organs: liver to stomach
def liver(rng: Rng, cavity: Shape) -> list[Part]:
    """Return the liver, two lobes under the dome and flat beneath, with its hepatic veins."""
    left = Ellipsoid(near(rng, (0, 50, 80), 3), sized(rng, 64, 42, 34), 0, 12)
    underside = HalfSpace((.5, .25, .8), near(rng, -37, 4))
    right = Ellipsoid(near(rng, (70, 6, 52), 3), sized(rng, 67, 86, 78))
    lobes = Difference(Union(right, left, 20), Outside(cavity))
    parts = [Part("liver", Difference(lobes, underside, blend=14))]

    tips = [(98, 10, 84), (70, 52, 84), (8, 48, 84), (104, 34, 48), (98, -34, 58)]
    for tip in near(rng, tips, 6):
        middle = near(rng, (24 + .5 * tip[0], 12, 100), 5)
        vein = Tube([(24, 12, 112), middle, tip], (5, 4, 1.5))
        parts.append(Part("cava", vein, keeps_label=True))
    return parts


def gallbladder(rng: Rng) -> Part:
    """Return the gallbladder in its bed under the liver."""
    sac = Ellipsoid(near(rng, (62, 48, 2), 3), sized(rng, 15, 17, 21), 0, 15)
    neck = Ellipsoid((50, 36, 20), (7, 8, 13), 0, -35)
    return Part("gallbladder", Union(sac, neck, 8))


def spleen(rng: Rng, cavity: Shape) -> Part:
    """Return the spleen, hollow towards the stomach."""
    whole = Ellipsoid(near(rng, (-95, -33, 62), 3), sized(rng, 31, 54, 47), 35)
    hollow = Ellipsoid((-62, -12, 60), (27, 38, 34), 20)
    in_cavity = Difference(whole, Outside(cavity))
    return Part("spleen", Difference(in_cavity, hollow, blend=8))


def stomach(rng: Rng, cavity: Shape) -> list[Part]:
    """Return the stomach with its content, and the gas above."""
    course = [
        (-58, -2, 80), (-60, 20, 76), (-58, 42, 50), (-40, 60, 26), (-8, 60, 14), (24, 46, 16)]
    bag = Tube(near(rng, course, 2), sized(rng, 31, 31, 27, 21, 16, 10))
    shape = Difference(bag, Outside(cavity))
    gas = Intersection(Grown(shape, -4), in_front_of(rng.uniform(25, 70)))
    filling = rng.choice(("fluid", "stool", "stomach"))
    return [Part("stomach", shape, {4: filling}), Part("air", gas, keeps_label=True)]


# --------------------------------------------------- organs: kidneys to vessels
def kidney_and_adrenal(rng: Rng, name: str, side: int) -> list[Part]:
    """Return a kidney, a bean around its sinus, and an adrenal of two limbs, both in fat."""
    middle = near(rng, (side * 67, -34, 1 - side * 5), 2)               # the right one is lower
    bean = Ellipsoid(middle, sized(rng, 28, 25, 50), -side * 30, side * 12)
    sinus = Ellipsoid(middle + (-side * 22, 9, 0), (19, 11, 19), -side * 25)

    apex = middle + (-side * 33, 5, 52 + side * 6)
    radii = sized(rng, 3, 12, 14)
    inner = Ellipsoid(apex - (side * 4, 0, 0), radii, side * 8)
    outer = Ellipsoid(apex + (side * 4, -1, -1), radii, side * 38)
    adrenal = Union(inner, outer, 3)
    return [
        Part("fat", Grown(bean, 9)),
        Part(f"{name} kidney", Difference(bean, sinus), {7: "medulla"}),
        Part("fat", Grown(adrenal, 4)),
        Part(f"{name} adrenal gland", adrenal),
    ]


def pancreas(rng: Rng) -> Part:
    """Return the pancreas, from the duodenum to the spleen."""
    course = [
        (20, 20, -16), (24, 30, 6), (8, 37, 20), (-16, 32, 30), (-46, 13, 41), (-74, -6, 48)]
    return Part("pancreas", Tube(near(rng, course, 1), sized(rng, 10, 14, 10, 11, 11, 8)))


def esophagus(rng: Rng) -> Part:
    """Return the esophagus, from the chest to the stomach."""
    course = [
        (-3, -30, 260), (-2, -26, 170), (-6, -12, 135), (-14, 0, 108), (-27, 4, 96), (-40, 6, 90)]
    return Part("esophagus", Tube(near(rng, course, 1), sized(rng, 7.5)), {4.5: "stomach"})


def great_vessels(rng: Rng) -> list[Part]:
    """Return aorta and inferior vena cava, and the splenic vein that joins the portal vein."""
    aorta_course = [
        (-22, -42, 260), (-22, -40, 160), (-12, -16, 100), (-9, -9, 50), (-8, 0, 0), (-4, 4, -64)]
    cava_course = [
        (18, 24, 148), (24, 14, 118), (27, 4, 85), (23, 2, 40), (20, 1, -20), (15, 2, -68)]
    aorta = near(rng, aorta_course, 1.5)
    cava = near(rng, cava_course, 1.5)

    confluence, hilum = near(rng, [(5, 24, 24), (36, 20, 62)], 2)
    from_spleen = [confluence, (-20, 22, 37), (-48, 2, 48), (-80, -16, 54)]
    splenic = Tube(from_spleen, sized(rng, 7, 6, 5.5, 5))
    into_liver = [confluence, (confluence + hilum) / 2, hilum, hilum + (28, -6, 5)]
    portal = Tube(into_liver, sized(rng, 9, 9, 8.5, 6))
    return [
        Part("aorta", Tube(aorta, sized(rng, 13, 12.5, 11.5, 10.5, 9.5, 9))),
        Part("inferior vena cava", Tube(cava, sized(rng, 13, 12, 11.5, 11, 10.5, 9.5))),
        Part("portal and splenic veins", Union(splenic, portal, 3)),
    ]


# ----------------------------------------------------------------------- canvas
class Canvas:
    """Image and label being painted.

    atlas: x, y, z of each voxel in the atlas, three float32 arrays (D, H, W)
    tissue: {name: intensity}
    """

    COARSE = 8              # mm at most between the points at which a shape is searched
    MARGIN = 12             # mm from such a point within which the shape may have voxels
    SLAB = 200_000          # voxels painted at a time, to stay in the processor's cache

    def __init__(self, atlas: list[Array], spacing_mm: Point, tissue: dict[str, np.float32]):
        self.atlas = atlas
        self.tissue = tissue
        self.soft = np.float32(max(2.0, np.mean(spacing_mm)))           # width of a blurred edge
        self.steps = [max(1, int(self.COARSE / mm)) for mm in spacing_mm]
        self.image = np.full(atlas[0].shape, tissue["air"])
        self.label = np.zeros(atlas[0].shape, np.uint8)

    def paint(self, part: Part):
        """Fill a part's shape, layer by layer, and label it."""
        box = self.bounding_box(part.shape)
        if box is None:
            return
        rows, columns, planes = box
        thickness = max(1, self.SLAB // self.image[0, columns, planes].size)
        for first in range(rows.start, rows.stop, thickness):
            slab = slice(first, min(first + thickness, rows.stop))
            self.fill(part, (slab, columns, planes))

    def bounding_box(self, shape: Shape) -> list[slice] | None:
        """Return slices of the grid that contain a shape, None if it is not in the grid."""
        every_few = tuple(slice(None, None, step) for step in self.steps)
        coarse = [axis[every_few] for axis in self.atlas]
        touched = shape(*coarse) < self.MARGIN
        if not touched.any():
            return None
        box = []
        for axis, step in enumerate(self.steps):
            other_axes = tuple({0, 1, 2} - {axis})
            hits = np.flatnonzero(touched.any(other_axes)) * step
            first = max(0, hits[0] - step)
            stop = min(hits[-1] + step + 1, self.image.shape[axis])
            box.append(slice(first, stop))
        return box

    def fill(self, part: Part, region: tuple[slice, ...]):
        """Paint the piece of a part that lies in a region of the grid."""
        depth = -part.shape(*(axis[region] for axis in self.atlas))
        image = self.image[region]                                      # a view of the image
        layers = {0: part.name.split()[-1], **part.layers}
        for inset, tissue in layers.items():
            cover = np.clip((depth - np.float32(inset)) / self.soft + np.float32(.5), 0, 1)
            image += cover * (self.tissue[tissue] - image)
        if not part.keeps_label:
            number = ORGANS.index(part.name) + 1 if part.name in ORGANS else 0
            self.label[region][depth > 0] = number


# ---------------------------------------------------------------------- scanner
def smooth_field(rng: Rng, grid: list[Array], amplitude: float, shortest_mm: float) -> Array:
    """Draw a smooth random function of the grid: two waves along each axis, added."""
    field = np.float32(0)
    for axis in grid:
        for _ in range(2):
            length = shortest_mm * rng.uniform(1, 2)
            phase = rng.uniform()
            wave = amplitude * np.sin(2 * np.pi * (axis / length + phase))
            field = field + np.float32(wave)
    return field


def scan_grid(rng: Rng, scale: Array, fat_mm: float, spacing_mm: Point) -> list[Array]:
    """Return x, y, z of a grid around a patient, in mm; arrays that broadcast to (D, H, W)."""
    low = scale * (-161 - fat_mm, -128 - .75 * fat_mm, rng.uniform(-142, -125))
    high = scale * (161 + fat_mm, 116 + .75 * fat_mm, rng.uniform(185, 203))
    middle = (low + high) / 2
    sizes = np.rint((high - low) / spacing_mm).astype(int)
    axes = []
    for center, mm, size in zip(middle, spacing_mm, sizes):
        axes.append(center + mm * (np.arange(size) - (size - 1) / 2))
    return np.meshgrid(*axes, indexing="ij", sparse=True)


def to_atlas(rng: Rng, grid: list[Array], scale: Array) -> list[Array]:
    """Return x, y, z in the atlas of each voxel of a patient: scaled, and warped at random."""
    warps = [smooth_field(rng, grid, 3, 260) + smooth_field(rng, grid, .6, 70) for _ in range(3)]
    return [np.float32(axis / factor) + warp for axis, factor, warp in zip(grid, scale, warps)]


def tissue_values(rng: Rng, modality: str) -> dict[str, np.float32]:
    """Draw a patient's intensities, about a tenth from the mean; air is the same in all."""
    factors = 1 + .1 * np.clip(rng.standard_normal(len(TISSUES)), -2, 2)
    factors[list(TISSUES).index("air")] = 1
    values = {}
    for (name, tissue), factor in zip(TISSUES.items(), factors):
        values[name] = np.float32(getattr(tissue, modality) * factor)
    return values


def blurred(noise: Array, stride: int) -> Array:
    """Correlate white noise with its neighbours `stride` voxels on, at unit deviation."""
    return (noise + sum(np.roll(noise, stride, axis) for axis in range(3))) / 2


def acquire(image: Array, rng: Rng, modality: str, grid: list[Array], spacing_mm: Point) -> Array:
    """Return the image (D, H, W) int16 as a scanner would give it.

    CT: texture of the tissues and correlated noise. MR: texture, a bias field,
    noise, and the magnitude of a complex signal (Rician noise).
    """
    noise = blurred(rng.standard_normal(image.shape, np.float32), 1)
    texture = blurred(noise, 2)
    # Large voxels average noise; it is given for those of the default spacing, 4.5 mm^3.
    noise_scale = np.clip(np.sqrt(4.5 / np.prod(spacing_mm)), .3, 2)
    if modality == "ct":
        deviation = np.float32(rng.uniform(6, 13) * noise_scale)
        in_body = image > -950
        image = image + (deviation * noise + np.float32(6) * in_body * texture)
        return np.rint(np.clip(image, -1024, 3071)).astype(np.int16)

    bias = np.exp(smooth_field(rng, grid, .1, 350))
    image = image * ((1 + np.float32(.04) * texture) * bias)
    noise = noise * np.float32(rng.uniform(10, 25) * noise_scale)
    return np.rint(np.hypot(image + noise, np.roll(noise, 9))).astype(np.int16)


# -------------------------------------------------------------------- a patient
def make_patient(
        seed: int, index: int, modality: str = "ct", spacing_mm: Point = (1.5, 1.5, 2.0),
) -> tuple[Array, Array, Array]:
    """Make one synthetic torso. [ours]

    Returns image (D, H, W) int16 in HU or MR units, label (D, H, W) uint8 with
    1..13 as in ORGANS, and a RAS+ affine (4, 4).

    One (seed, index) is one anatomy at any spacing and in both modalities; the
    same four arguments give the same bits. Raises ValueError for an unknown
    modality, a negative seed or index, a spacing outside 0.5-10 mm.
    """
    check_settings(seed, modality, spacing_mm)
    rng = np.random.default_rng([seed, index, 0])
    scan_rng = np.random.default_rng([seed, index, 1 + MODALITIES.index(modality)])

    fat_mm = rng.uniform(7, 28)
    scale = rng.uniform(.95, 1.06) * rng.uniform(.98, 1.02, 3)
    grid = scan_grid(rng, scale, fat_mm, spacing_mm)
    canvas = Canvas(to_atlas(rng, grid, scale), spacing_mm, tissue_values(scan_rng, modality))
    for part in body(rng, fat_mm):
        canvas.paint(part)

    image = acquire(canvas.image, scan_rng, modality, grid, spacing_mm)
    origin = [axis.flat[0] for axis in grid]
    affine = nib.affines.from_matvec(np.diag([float(mm) for mm in spacing_mm]), origin)
    return image, canvas.label, affine


def check_settings(seed: int, modality: str, spacing_mm: Point):
    """Raise ValueError for settings of which no patient can be made."""
    possible = len(spacing_mm) == 3 and all(.5 <= mm <= 10 for mm in spacing_mm)
    if modality not in MODALITIES or seed < 0 or not possible:
        raise ValueError(
            f"phantoms of modality {modality!r}, seed {seed}, spacing {spacing_mm}: give "
            f"{' or '.join(MODALITIES)}, a seed from 0 and three spacings of 0.5 to 10 mm")


# ------------------------------------------------------------------------ files
def write_dataset(
        out: str | Path, n: int, modality: str = "ct", seed: int = 0,
        spacing_mm: Point = (1.5, 1.5, 2.0), start: int = 0, step: int = 1,
) -> Path:
    """Write patients start, start + step, ... below n, and a dataset.json of all n. [ours]

    Returns the path of dataset.json. Rank r of R gives start=r, step=R, and waits
    for the others before reading. The last fifth, at least one if n > 1, is
    "validation". Patients already there are kept. Raises ValueError for a folder
    of other settings or with other files, and for what make_patient refuses.
    """
    check_settings(seed, modality, spacing_mm)
    if n < 1 or start < 0 or step < 1:
        raise ValueError(
            f"phantoms n={n}, start={start}, step={step}: "
            "n and step must be at least 1, start at least 0")
    settings = settings_record(seed, modality, spacing_mm)
    out = Path(out)
    refuse_foreign_folder(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "phantom.json", settings.encode())

    cases = case_files(n)
    for index in range(start, n, step):
        image_path = out / cases[index]["image"]
        label_path = out / cases[index]["label"]
        if not (image_path.is_file() and label_path.is_file()):
            image, label, affine = make_patient(seed, index, modality, spacing_mm)
            write_nifti(image_path, image, affine)
            write_nifti(label_path, label, affine)

    path = out / "dataset.json"
    atomic_write(path, json.dumps(dataset_listing(cases, modality), indent=1).encode())
    return path


def case_files(n: int) -> list[dict[str, str]]:
    """Return the files of n patients, relative to their folder."""
    names = [f"phantom{index:04d}.nii.gz" for index in range(n)]
    return [{"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"} for name in names]


def dataset_listing(cases: list[dict[str, str]], modality: str) -> dict:
    """Return the content of dataset.json, as the Medical Segmentation Decathlon has it."""
    n = len(cases)
    train = n - max(n // 5, n > 1)
    return {
        "name": "phantoms",
        "description": "synthetic torsos",
        "modality": {"0": modality.upper()},
        "labels": {str(number): name for number, name in enumerate(("background", *ORGANS))},
        "numTraining": train,
        "numTest": 0,
        "training": cases[:train],
        "validation": cases[train:],
    }


def settings_record(seed: int, modality: str, spacing_mm: Point) -> str:
    """Return the text of phantom.json, by which a folder's phantoms are known again."""
    return json.dumps({
        "version": 1,                           # of the anatomy: patients of two never mix
        "seed": int(seed),
        "modality": modality,
        "spacing_mm": [float(mm) for mm in spacing_mm],
    })


def refuse_foreign_folder(out: Path, settings: str):
    """Raise ValueError if a folder holds anything but phantoms of these settings."""
    # The record is looked for after the files: another rank may be making the folder just now.
    occupied = out.is_file()
    if out.is_dir():
        occupied = any(path.suffix != ".partial" for path in out.iterdir())
    content = "other files" if occupied else settings
    record = out / "phantom.json"
    if record.is_file():
        content = record.read_text()
    if content != settings:
        raise ValueError(
            f"{out} holds {content}, not phantoms of {settings}: "
            "give another folder, or empty this one")


def write_nifti(path: Path, array: Array, affine: Array):
    """Write a .nii.gz without a time stamp: the same patient is the same file."""
    path.parent.mkdir(exist_ok=True)
    content = nib.Nifti1Image(array, affine).to_bytes()
    atomic_write(path, gzip.compress(content, 1, mtime=0))


def default_data(
        cache: str | Path, n: int, modality: str, seed: int, spacing_mm: Point, ranks,
) -> list[str]:
    """Make the phantoms on which a script trains without --data; return [dataset.json]. [ours]

    They lie beside the folder `cache`, in a folder named for their settings, and
    are made once. Every rank must call this: each makes its share, and none
    returns before all are done. ranks: a runtime.Ranks.
    """
    size = "x".join(f"{mm:g}" for mm in spacing_mm)
    folder = Path(cache).parent / f"phantoms-{modality}-{n}-{size}mm-seed{seed}"
    if ranks.is_main:
        print(f"no --data: training on {n} synthetic patients, made in {folder}", flush=True)
    listing = write_dataset(folder, n, modality, seed, spacing_mm, ranks.rank, ranks.world)
    ranks.agree()
    return [str(listing)]
