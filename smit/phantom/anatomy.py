"""Synthetic torsos with the 13 BTCV organs, CT in HU or T2-like MR: embedded default data and the tests' data. [ours]

    python -m smit.phantom OUT --n 8 --modality ct --seed 0 --spacing 1.5 1.5 2

An atlas of signed distances in mm (x right, y anterior, z superior; origin between the kidneys), every shape of random
size and place, is seen through a smooth random warp: one patient has one anatomy, at any spacing, in CT and in MR.
Read: shapes, Canvas, anatomy from the skin inwards, image, files. Check against: any labelled abdominal CT.
"""
import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np

from smit.phantom.shapes import carve, ellipsoid, overlap, tube, union
from smit.runtime import atomic_write

ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
          "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland")
TISSUES = {  # mean in CT (HU) and in MR (arbitrary units); patients differ by a tenth. An organ's tissue: its last word
    "air": (-1000, 0), "lung": (-830, 40), "skin": (10, 250), "fat": (-105, 600), "muscle": (55, 150), "gut": (60, 260),
    "disc": (85, 350), "bone": (480, 50), "spongy": (190, 300), "cord": (35, 500), "heart": (95, 180),
    "fluid": (25, 900), "stool": (40, 420), "spleen": (118, 480), "kidney": (175, 560), "medulla": (120, 700),
    "gallbladder": (10, 1050), "esophagus": (45, 230), "liver": (100, 260), "stomach": (70, 280), "aorta": (200, 70),
    "cava": (125, 100), "veins": (155, 110), "pancreas": (85, 380), "gland": (65, 240)}
MODALITIES = ("ct", "mr")


class Canvas:
    """Image and label being painted; atlas: three float32 arrays of the grid's shape, each voxel's x, y, z in mm."""
    def __init__(self, rng, atlas, spacing_mm, tissue):
        self.rng, self.atlas, self.tissue = rng, atlas, tissue
        self.soft = np.float32(max(2.0, np.mean(spacing_mm)))  # mm: point spread, partial volume
        self.step = max(1, int(8 / max(spacing_mm)))
        self.image, self.label = np.full(atlas[0].shape, tissue["air"]), np.zeros(atlas[0].shape, np.uint8)

    def near(self, mean, spread):
        """mean + spread * normal draws cut at two deviations: nobody lacks an organ or has a giant one."""
        return np.float32(mean + spread * np.clip(self.rng.standard_normal(np.shape(mean)), -2, 2))

    def grow(self, *radii):
        return np.float32(radii) * np.exp(self.near(0, .05))

    def paint(self, name, sdf, inner=None, keep=False):
        """Fill a shape with an organ or tissue, then {depth in mm: tissue} layers in it; keep labels beneath or not."""
        coarse = sdf(*(axis[::self.step, ::self.step, ::self.step] for axis in self.atlas)) < 12
        if not coarse.any():
            return
        hits = [np.flatnonzero(coarse.any(others)) * self.step for others in ((1, 2), (0, 2), (0, 1))]
        rows, *box = [slice(max(0, hit[0] - self.step), hit[-1] + self.step + 1) for hit in hits]
        slab = max(1, 200_000 // self.image[0][tuple(box)].size)  # rows at a time, to stay in the processor's cache
        for first in range(rows.start, min(rows.stop, len(self.image)), slab):
            part = (slice(first, min(first + slab, rows.stop)), *box)
            depth, image = -sdf(*(axis[part] for axis in self.atlas)), self.image[part]
            for inset, tissue in {0: name.split()[-1], **(inner or {})}.items():
                cover = np.clip((depth - np.float32(inset)) / self.soft + np.float32(.5), 0, 1)
                image += cover * (self.tissue[tissue] - image)
            if not keep:
                self.label[part][depth > 0] = ORGANS.index(name) + 1 if name in ORGANS else 0


WALL = ellipsoid((0, -6, 40), (146, 108, np.inf))  # outer face of the muscles around chest and belly


def _trunk(canvas, fat_mm):
    """Skin, fat, muscles, lungs with vessels, heart. Returns the sdf of all that is not the belly's cavity."""
    paint, near, draw = canvas.paint, canvas.near, canvas.rng.uniform
    paint("skin", ellipsoid((0, -6, 40), (146 + fat_mm, 108 + .75 * fat_mm, np.inf)), {2.5: "fat"})
    paint("muscle", WALL, {13: "fat"})
    for s in (-1, 1):  # along the spine, psoas
        paint("muscle", tube([(s * 35, -72, -170), (s * 35, -72, 0), (s * 31, -86, 120), (s * 30, -96, 240)], 27))
        paint("muscle", tube([(s * 30, -30, 40), (s * 38, -28, -40), (s * 54, -14, -170)], (6, 17, 26)))
    domes = union(ellipsoid((70, 0, 30), (76, 98, near(92, 4))), ellipsoid((-70, -2, 25), (73, 95, near(84, 4))), 20)
    dome = union(domes, ellipsoid((0, 25, 20), (75, 85, near(82, 4))), 20)
    middle = ellipsoid((0, -25, 170), (33, 110, np.inf))
    paint("muscle", lambda *p: overlap((WALL(*p) + 13, -dome(*p), -middle(*p), .45 * p[1] + 38 - p[2])), {2.5: "lung"})
    for s in (-1, 1) * 14:
        vessel = np.array([(36, -12, 165), draw((48, -30, 150), (70, 10, 185)), draw((55, -80, 138), (115, 55, 230))])
        paint("muscle", tube(vessel * (s, 1, 1), (4.5, 3, 1)))
    heart = union(ellipsoid((-26, 34, 162), near((58, 44, 54), 3), -30), ellipsoid((22, 26, 168), (30, 34, 42)), 10)
    paint("fat", carve(heart, dome), {3: "heart", 12: "cava"})
    return lambda *p: -overlap((WALL(*p) + 15, dome(*p) + 3))


def _bones(canvas):
    """Vertebrae with discs, arches, processes and canal; ribs, sternum."""
    def spine(shape):  # shape(x, y from the spine's axis, mm up or down from the middle of a vertebra: 16 in the disc)
        return lambda x, y, z: shape(x, y + 30 + .0008 * (z + 20) ** 2, np.abs((z + 4) % 32 - 16))
    def ribs(x, y, z):  # bars on the inside of the wall that fall forwards, the lower ones shorter
        t = z + .45 * (y + 90)
        bars = np.hypot(WALL(x, y, z) + 9, ((t - 7) % 26 - 13) * .7) - 5
        return overlap((bars, y - np.minimum(t - 70, 76), 16 - t, 14 - np.abs(x)))
    body = spine(lambda x, y, level: (np.hypot(x / 23, y / 18) - 1) * 20)
    for bone in (body, ribs, ellipsoid((0, 91, 190), (17, 7, 62)),
                 spine(lambda x, y, level: overlap((np.abs(np.hypot(x, y + 27) - 12) - 4, level - 13))),
                 spine(lambda x, y, level: overlap((np.abs(x) - 3.5, np.abs(y + 38) - 14, level - 8))),
                 spine(lambda x, y, level: overlap((np.hypot(y + 28, level) - 5, np.abs(x) - 36)))):
        canvas.paint("bone", bone, {2.3: "spongy"})
    canvas.paint("disc", lambda x, y, z: overlap((body(x, y, z), 12.5 - np.abs((z + 4) % 32 - 16))))
    canvas.paint("fluid", spine(lambda x, y, level: np.hypot(x, y + 27) - 8), {3: "cord"})


def _gut(canvas):
    """Colon, loops of small bowel, duodenum: walls around stool, fluid and gas."""
    near, rng, haustra = canvas.near, canvas.rng, np.array((17, 23, 17, 23, 17))
    right = near([(98, 0, -140), (98, 4, -105), (100, 4, -75), (98, 8, -50), (92, 20, -28)], 4)
    across = near([(92, 25, -30), (52, 66, -38), (0, 76, -42), (-55, 68, -12), (-92, 35, 28)], 5)
    left = near([(-100, 10, 28), (-104, -8, 0), (-103, -8, -50), (-98, -2, -95), (-88, 4, -140)], 4)
    loops = [(right, haustra, "stool", -.6), (across, haustra * .85, "stool", -.6), (left, haustra * .8, "stool", -.6)]
    for _ in range(15):
        tangle = rng.uniform((-52, 44, -112), (48, 54, -36)) + rng.uniform(-32, 32, (5, 3))
        loops.append((tangle, rng.uniform(9, 13), rng.choice(("fluid", "gut")), .5))
    duodenum = near([(30, 40, 12), (46, 30, 4), (46, 18, -22), (26, 14, -38), (-20, 16, -34)], 2)
    for points, radius, filling, gas in (*loops, (duodenum, 12, "fluid", .5)):
        level = points[:, 1].mean() + rng.uniform(gas, 2) * np.max(radius)
        bowel = carve(tube(points, radius), lambda *p: -WALL(*p) - 14)
        canvas.paint("gut", bowel, {3: filling})
        canvas.paint("air", lambda *p: overlap((bowel(*p) + 3, np.float32(level) - p[1])))  # gas rises to the front


def _liver_to_stomach(canvas, outside):
    """Liver (two lobes under the dome, flat beneath, veins), gallbladder in its bed, spleen, stomach."""
    paint, near, grow = canvas.paint, canvas.near, canvas.grow
    left, shift = ellipsoid(near((0, 50, 80), 3), grow(64, 42, 34), 0, 12), near(-37, 4)
    lobes = carve(union(ellipsoid(near((70, 6, 52), 3), grow(67, 86, 78)), left, 20), outside)
    paint("liver", carve(lobes, lambda x, y, z: .5 * x + .25 * y + .8 * z + shift, blend=14))
    for tip in near([(98, 10, 84), (70, 52, 84), (8, 48, 84), (104, 34, 48), (98, -34, 58)], 6):  # hepatic veins
        paint("cava", tube([(24, 12, 112), near((24 + .5 * tip[0], 12, 100), 5), tip], (5, 4, 1.5)), keep=True)
    sac = ellipsoid(near((62, 48, 2), 3), grow(15, 17, 21), 0, 15)
    paint("gallbladder", union(sac, ellipsoid((50, 36, 20), (7, 8, 13), 0, -35), 8))
    spleen = carve(ellipsoid(near((-95, -33, 62), 3), grow(31, 54, 47), 35), outside)
    paint("spleen", carve(spleen, ellipsoid((-62, -12, 60), (27, 38, 34), 20), blend=8))
    bag = near([(-58, -2, 80), (-60, 20, 76), (-58, 42, 50), (-40, 60, 26), (-8, 60, 14), (24, 46, 16)], 2)
    stomach, level = carve(tube(bag, grow(31, 31, 27, 21, 16, 10)), outside), np.float32(canvas.rng.uniform(25, 70))
    paint("stomach", stomach, {4: canvas.rng.choice(("fluid", "stool", "stomach"))})
    paint("air", lambda *p: overlap((stomach(*p) + 4, level - p[1])), keep=True)


def _kidneys_to_vessels(canvas):
    """Kidneys (a bean around its sinus) and adrenals (two limbs) in fat, pancreas, esophagus, arteries, veins."""
    paint, near, grow = canvas.paint, canvas.near, canvas.grow
    for s, side in ((1, "right"), (-1, "left")):
        middle = near((s * 67, -34, 1 - s * 5), 2)
        bean = ellipsoid(middle, grow(28, 25, 50), -s * 30, s * 12)
        paint("fat", lambda *p, bean=bean: bean(*p) - 9)
        paint(f"{side} kidney", carve(bean, ellipsoid(middle + (-s * 22, 9, 0), (19, 11, 19), -s * 25)), {7: "medulla"})
        apex, size = middle + (-s * 33, 5, 52 + s * 6), grow(3, 12, 14)
        limbs = union(ellipsoid(apex - (s * 4, 0, 0), size, s * 8), ellipsoid(apex + (s * 4, -1, -1), size, s * 38), 3)
        paint("fat", lambda *p, limbs=limbs: limbs(*p) - 4)
        paint(f"{side} adrenal gland", limbs)
    gland = near([(20, 20, -16), (24, 30, 6), (8, 37, 20), (-16, 32, 30), (-46, 13, 41), (-74, -6, 48)], 1)
    paint("pancreas", tube(gland, grow(10, 14, 10, 11, 11, 8)))
    gullet = near([(-3, -30, 260), (-2, -26, 170), (-6, -12, 135), (-14, 0, 108), (-27, 4, 96), (-40, 6, 90)], 1)
    paint("esophagus", tube(gullet, grow(7.5)), {4.5: "stomach"})
    aorta = near([(-22, -42, 260), (-22, -40, 160), (-12, -16, 100), (-9, -9, 50), (-8, 0, 0), (-4, 4, -64)], 1.5)
    cava = near([(18, 24, 148), (24, 14, 118), (27, 4, 85), (23, 2, 40), (20, 1, -20), (15, 2, -68)], 1.5)
    join, gate = near([(5, 24, 24), (36, 20, 62)], 2)
    splenic = tube([join, (-20, 22, 37), (-48, 2, 48), (-80, -16, 54)], grow(7, 6, 5.5, 5))
    portal = tube([join, (join + gate) / 2, gate, gate + (28, -6, 5)], grow(9, 9, 8.5, 6))
    paint("aorta", tube(aorta, grow(13, 12.5, 11.5, 10.5, 9.5, 9)))
    paint("inferior vena cava", tube(cava, grow(13, 12, 11.5, 11, 10.5, 9.5)))
    paint("portal and splenic veins", union(splenic, portal, 3))


def _field(rng, grid, amplitude, shortest_mm):
    """Smooth random function of the grid (x, y, z that broadcast, mm): two waves along each axis, added."""
    waves = [(axis, shortest_mm * rng.uniform(1, 2), rng.uniform()) for axis in grid for _ in range(2)]
    return sum(np.float32(amplitude * np.sin(2 * np.pi * (axis / length + phase))) for axis, length, phase in waves)


def _grid(rng, spacing_mm):
    """Sparse x, y, z of the grid (mm), every voxel's atlas coordinates, fat layer (mm): a patient's size and warp."""
    fat_mm, scale = rng.uniform(7, 28), rng.uniform(.95, 1.06) * rng.uniform(.98, 1.02, 3)
    low = scale * (-161 - fat_mm, -128 - .75 * fat_mm, rng.uniform(-142, -125))
    high = scale * (161 + fat_mm, 116 + .75 * fat_mm, rng.uniform(185, 203))
    axes = [(a + b) / 2 + mm * (np.arange(n) - (n - 1) / 2)
            for a, b, mm, n in zip(low, high, spacing_mm, np.rint((high - low) / spacing_mm).astype(int))]
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    warps = [_field(rng, grid, 3, 260) + _field(rng, grid, .6, 70) for _ in range(3)]
    return grid, [np.float32(axis / factor) + warp for axis, factor, warp in zip(grid, scale, warps)], fat_mm


def _acquire(image, rng, modality, grid, spacing_mm):
    """What the scanner adds: texture, correlated noise, and in MR a bias field and Rician magnitude; int16."""
    def blur(noise, stride):  # to unit deviation again
        return (noise + sum(np.roll(noise, stride, axis) for axis in range(3))) / 2
    noise = blur(rng.standard_normal(image.shape, np.float32), 1)
    texture, quiet = blur(noise, 2), np.clip(np.sqrt(4.5 / np.prod(spacing_mm)), .3, 2)  # large voxels average noise
    if modality == "ct":
        image += np.float32(rng.uniform(6, 13) * quiet) * noise + np.float32(6) * (image > -950) * texture
        return np.rint(np.clip(image, -1024, 3071)).astype(np.int16)
    image *= (1 + np.float32(.04) * texture) * np.exp(_field(rng, grid, .1, 350))
    noise *= np.float32(rng.uniform(10, 25) * quiet)
    return np.rint(np.hypot(image + noise, np.roll(noise, 9))).astype(np.int16)


def _settings(seed, modality, spacing_mm):
    """The checked settings of a set of patients, as written into its phantom.json."""
    if modality not in MODALITIES or seed < 0 or len(spacing_mm) != 3 or not all(.5 <= mm <= 10 for mm in spacing_mm):
        raise ValueError(f"phantoms of modality {modality!r}, seed {seed}, spacing {spacing_mm}: give "
                         f"{' or '.join(MODALITIES)}, a seed from 0 and three spacings of 0.5 to 10 mm")
    return json.dumps({"version": 1, "seed": int(seed), "modality": modality, "spacing_mm": [*map(float, spacing_mm)]})


def make_patient(seed, index, modality="ct", spacing_mm=(1.5, 1.5, 2.0)):
    """One synthetic torso: image int16 (HU, or MR units), label uint8 (1..13 as in ORGANS), RAS+ affine (4, 4). [ours]

    One (seed, index) is one anatomy at any spacing and in both modalities; the same four arguments give the same bits.
    Raises ValueError for an unknown modality, a negative seed or index, a spacing outside 0.5-10 mm.
    """
    _settings(seed, modality, spacing_mm)
    which = MODALITIES.index(modality)
    anatomy, scan = np.random.default_rng([seed, index, 0]), np.random.default_rng([seed, index, 1 + which])
    grid, atlas, fat_mm = _grid(anatomy, spacing_mm)
    vary = 1 + .1 * np.clip(scan.standard_normal(len(TISSUES)), -2, 2) * (np.arange(len(TISSUES)) > 0)  # not air
    tissue = {name: np.float32(pair[which] * factor) for (name, pair), factor in zip(TISSUES.items(), vary)}
    canvas = Canvas(anatomy, atlas, spacing_mm, tissue)
    outside = _trunk(canvas, fat_mm)
    _gut(canvas)
    _bones(canvas)
    _liver_to_stomach(canvas, outside)
    _kidneys_to_vessels(canvas)
    affine = nib.affines.from_matvec(np.diag([*map(float, spacing_mm)]), [axis.flat[0] for axis in grid])
    return _acquire(canvas.image, scan, modality, grid, spacing_mm), canvas.label, affine


def write_dataset(out, n, modality="ct", seed=0, spacing_mm=(1.5, 1.5, 2.0), start=0, step=1):
    """Write patients start, start + step, ... below n as NIfTI, and a dataset.json of all n; returns its path. [ours]

    Rank r of R gives start=r, step=R, and waits for the others before reading. Patients already there are kept; a
    folder of other settings or files is refused (ValueError). The last fifth, at least one if n > 1, is "validation".
    """
    out, settings = Path(out), _settings(seed, modality, spacing_mm)
    if n < 1 or start < 0 or step < 1:
        raise ValueError(f"phantoms n={n}, start={start}, step={step}: n and step must be at least 1, start at least 0")
    taken = out.is_file() or out.is_dir() and any(path.suffix != ".partial" for path in out.iterdir())
    record = out / "phantom.json"  # looked for after `taken`: another rank may be making the folder just now
    found = record.read_text() if record.is_file() else "other files" if taken else settings
    if found != settings:
        raise ValueError(f"{out} holds {found}, not phantoms of {settings}: give another folder, or empty this one")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(record, settings.encode())
    cases = [{"image": f"imagesTr/phantom{i:04d}.nii.gz", "label": f"labelsTr/phantom{i:04d}.nii.gz"} for i in range(n)]
    for index in range(start, n, step):
        paths = [out / path for path in cases[index].values()]
        if not all(path.is_file() for path in paths):
            *arrays, affine = make_patient(seed, index, modality, spacing_mm)
            for path, array in zip(paths, arrays):  # no time stamp: the same patient is the same file
                path.parent.mkdir(exist_ok=True)
                atomic_write(path, gzip.compress(nib.Nifti1Image(array, affine).to_bytes(), 1, mtime=0))
    train = n - max(n // 5, n > 1)
    listing = {"name": "phantoms", "description": "synthetic torsos", "modality": {"0": modality.upper()},
               "labels": {str(i): name for i, name in enumerate(("background", *ORGANS))}, "numTraining": train,
               "numTest": 0, "training": cases[:train], "validation": cases[train:]}
    atomic_write(out / "dataset.json", json.dumps(listing, indent=1).encode())
    return out / "dataset.json"
