"""Phantoms: the right organs at the right place, in every patient, the same bits every time."""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest

from smit.phantom import ORGANS, default_data, make_patient, shapes, write_dataset

COARSE = (4.0, 4.0, 4.0)
VOLUMES_ML = {
    "spleen": (80, 400),
    "right kidney": (70, 250),
    "left kidney": (70, 250),
    "gallbladder": (10, 80),
    "esophagus": (8, 50),
    "liver": (900, 2200),
    "stomach": (130, 700),
    "aorta": (50, 200),
    "inferior vena cava": (40, 180),
    "portal and splenic veins": (10, 60),
    "pancreas": (30, 150),
    "right adrenal gland": (2, 12),
    "left adrenal gland": (2, 12),
}


@pytest.fixture(scope="module")
def patients():
    return [make_patient(0, index, "ct", COARSE) for index in range(6)]


def places(label, affine):
    """Organ name -> its voxels' world coordinates in mm, (n, 3)."""
    clouds = {}
    for number, name in enumerate(ORGANS, 1):
        clouds[name] = np.argwhere(label == number) @ affine[:3, :3].T + affine[:3, 3]
    return clouds


def gap(a, b):
    """Smallest distance in mm between two clouds of points (every third of the first is tried)."""
    return min(np.linalg.norm(b - p, axis=1).min() for p in a[::3])


def test_organs_stand_in_btcv_order():
    assert len(ORGANS) == 13
    assert (ORGANS[0], ORGANS[5], ORGANS[12]) == ("spleen", "liver", "left adrenal gland")


def test_image_label_and_affine_are_a_ras_ct_volume(patients):
    for image, label, affine in patients:
        assert image.dtype == np.int16 and label.dtype == np.uint8 and image.shape == label.shape
        assert affine.dtype == np.float64 and nib.aff2axcodes(affine) == ("R", "A", "S")
        assert np.allclose(image.shape, (95, 75, 85), atol=20)
        assert image[0, 0].mean() < -950 and image.min() >= -1024
        assert set(np.unique(label)) == set(range(14))


def test_every_organ_has_a_plausible_volume(patients):
    others = [make_patient(1, index, "ct", COARSE) for index in (3, 7)]
    fine = make_patient(1, 3, "ct", (1.5, 1.5, 2.0))
    for index, (_, label, affine) in enumerate([*patients, *others, fine]):
        voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
        ml = np.bincount(label.ravel(), minlength=14)[1:] * voxel_ml
        for name, volume in zip(ORGANS, ml):
            low, high = VOLUMES_ML[name]
            assert low <= volume <= high, (index, name, volume)


def test_right_is_right_and_front_is_front(patients):
    for _, label, affine in patients:
        at = {name: points.mean(0) for name, points in places(label, affine).items()}
        for right, left in (
                ("right kidney", "left kidney"), ("right adrenal gland", "left adrenal gland"),
                ("inferior vena cava", "aorta"), ("gallbladder", "stomach"),
                ("liver", "spleen"), ("liver", "stomach")):
            assert at[right][0] > at[left][0] + 15, (right, left)
        assert at["pancreas"][1] > at["aorta"][1] and at["stomach"][1] > at["spleen"][1]
        assert at["liver"][2] > at["right kidney"][2] and at["esophagus"][2] > at["stomach"][2]


def test_neighbours_are_neighbours(patients):
    for _, label, affine in patients[:3]:
        at = places(label, affine)
        for one, other, mm in (
                ("gallbladder", "liver", 15), ("inferior vena cava", "liver", 8),
                ("esophagus", "stomach", 12), ("aorta", "esophagus", 20),
                ("portal and splenic veins", "pancreas", 8),
                ("portal and splenic veins", "liver", 8),
                ("portal and splenic veins", "spleen", 25)):
            assert gap(at[one], at[other]) <= mm, (one, other)
        for side in ("right", "left"):
            kidney, gland = at[f"{side} kidney"], at[f"{side} adrenal gland"]
            assert gap(gland, kidney) <= 25 and gland[:, 2].mean() > np.percentile(kidney[:, 2], 80)


def test_great_vessels_lie_in_front_of_the_spine(patients):
    for image, label, affine in patients:
        at = places(label, affine)
        for level in (0.0, 30.0):
            k = int(round((level - affine[2, 3]) / 4))
            for name in ("aorta", "inferior vena cava"):
                x, y = at[name][np.abs(at[name][:, 2] - level) < 4, :2].mean(0)
                i, j = np.rint((np.array([x, y]) - affine[:2, 3]) / 4).astype(int)
                behind = image[i - 4:i + 5, j - 14:j - 3, k - 1:k + 2]
                assert behind.max() > 250, (name, level)
                assert image[i - 4:i + 5, j + 4:j + 16, k].max() < 250


def test_intensities_are_hounsfield_units(patients):
    for image, label, _ in patients:
        hu = {name: np.median(image[label == i]) for i, name in enumerate(ORGANS, 1)}
        assert 70 < hu["liver"] < 130 and 80 < hu["spleen"] < 160 and 90 < hu["right kidney"] < 230
        assert 140 < hu["aorta"] < 260 and -40 < hu["gallbladder"] < 60
        air, fat, bone = image < -700, np.abs(image + 105) < 40, image > 300
        assert air.mean() > .1 and fat.mean() > .15 and bone.mean() > .003


def test_anatomy_is_the_same_at_another_spacing_and_in_mr(patients):
    label, affine = make_patient(0, 2, "ct", (2.0, 3.0, 5.0))[1:]
    other, coarse = patients[2][1:]
    fine, wide = places(label, affine), places(other, coarse)

    for name in ("liver", "spleen", "left kidney", "aorta"):
        assert np.abs(fine[name].mean(0) - wide[name].mean(0)).max() < 2
        assert abs(len(fine[name]) * 30 / (len(wide[name]) * 64) - 1) < .1
    image, same, _ = make_patient(0, 2, "mr", COARSE)
    assert np.array_equal(same, other) and image.dtype == np.int16 and image.min() >= 0
    bile, liver, flow = (np.median(image[same == i]) for i in (4, 6, 8))
    assert bile > 2 * liver > 4 * flow


def test_the_same_seed_gives_the_same_bits_and_another_another_patient(patients):
    again = make_patient(0, 1, "ct", COARSE)
    assert all(np.array_equal(a, b) for a, b in zip(again, patients[1]))
    shape = np.minimum(patients[1][1].shape, patients[2][1].shape)
    one, two = (label[tuple(slice(n) for n in shape)] == 6 for _, label, _ in patients[1:3])
    assert 2 * (one & two).sum() / (one.sum() + two.sum()) < .95

    livers = {round(float(image[label == 6].mean()), 1) for image, label, _ in patients}
    assert len(livers) == len(patients)
    assert not np.array_equal(make_patient(1, 1, "ct", COARSE)[1], again[1])


def contents(folder):
    """Relative path -> bytes of each file in a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_two_ranks_write_what_one_writes(tmp_path):
    write_dataset(tmp_path / "one", 3, "mr", 5, (8, 9, 10))
    for rank in (1, 0):
        listing = write_dataset(tmp_path / "two", 3, "mr", 5, (8, 9, 10), start=rank, step=2)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two and len(one) == 8

    data = json.loads(listing.read_text())
    assert data["modality"] == {"0": "MR"} and data["labels"]["6"] == "liver"
    assert data["numTraining"] == 2
    assert len(data["training"]) == 2 and len(data["validation"]) == 1
    for case in data["training"] + data["validation"]:
        image, label = (nib.load(listing.parent / case[key]) for key in ("image", "label"))
        assert image.shape == label.shape and nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
        assert np.allclose(image.header.get_zooms(), (8, 9, 10))
        assert np.array_equal(image.affine, label.affine)

    image, label, affine = make_patient(5, 2, "mr", (8, 9, 10))
    stored = nib.load(tmp_path / "one" / "imagesTr" / "phantom0002.nii.gz")
    assert np.array_equal(np.asarray(stored.dataobj), image)
    assert np.allclose(stored.affine, affine, atol=1e-4)


def test_a_patient_already_there_is_kept_and_a_foreign_folder_refused(tmp_path):
    write_dataset(tmp_path / "a", 2, spacing_mm=(8, 8, 8))
    first = tmp_path / "a" / "imagesTr" / "phantom0000.nii.gz"
    before = first.stat().st_mtime_ns
    grown = json.loads(write_dataset(tmp_path / "a", 3, spacing_mm=(8, 8, 8)).read_text())

    assert first.stat().st_mtime_ns == before and len(grown["training"]) == 2
    for other in ({"seed": 1}, {"modality": "mr"}, {"spacing_mm": (8, 8, 9)}):
        with pytest.raises(ValueError, match="not phantoms of"):
            write_dataset(tmp_path / "a", 2, **{"spacing_mm": (8, 8, 8), **other})

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="other files"):
        write_dataset(tmp_path / "b", 1)
    assert (tmp_path / "b" / "dataset.json").read_text() == "{}"


@pytest.mark.parametrize("call", [
    {"modality": "pet"}, {"seed": -1}, {"spacing_mm": (0, 1, 1)}, {"spacing_mm": (1, 1)},
    {"spacing_mm": (np.nan, 1, 1)}, {"spacing_mm": (1, 1, 1000)}])
def test_bad_settings_are_one_clear_line(call, tmp_path):
    with pytest.raises(ValueError) as error:
        make_patient(**{"seed": 0, "index": 0, **call})
    assert "\n" not in str(error.value) and "give" in str(error.value)
    with pytest.raises(ValueError):
        write_dataset(tmp_path / "none", 1, **call)
    assert not (tmp_path / "none").exists()


def test_the_command_writes_a_dataset_and_explains_refusals(tmp_path, run_script):
    words = ["-m", "smit.phantom", tmp_path / "out", "--n", 1, "--spacing", 8, 8, 8]
    assert run_script(*words).stdout.strip() == str(tmp_path / "out" / "dataset.json")
    done = run_script(*words, "--seed", 1, check=False)
    assert done.returncode == 2 and "not phantoms of" in done.stderr
    assert "Traceback" not in done.stderr


class Rank(NamedTuple):
    """A rank whose barrier notes which images are there when it is reached."""

    rank: int
    world: int
    folder: Path
    seen: list

    @property
    def is_main(self):
        return self.rank == 0

    def agree(self):
        self.seen.append(sorted(path.name for path in self.folder.glob("imagesTr/*")))


def test_each_rank_makes_its_share_of_the_default_data_and_waits(tmp_path, capsys):
    folder = tmp_path / "phantoms-mr-3-9x9x9.5mm-seed4"
    seen = []
    for rank in (1, 0):
        paths = default_data(
            tmp_path / "cache", 3, "mr", 4, (9.0, 9.0, 9.5), Rank(rank, 2, folder, seen))
        assert paths == [str(folder / "dataset.json")]
    names = [f"phantom000{index}.nii.gz" for index in range(3)]
    assert seen == [names[1:2], names]                      # each waits after its own share
    assert len(json.loads(Path(paths[0]).read_text())["training"]) == 2

    printed = capsys.readouterr().out                       # by rank 0 alone
    assert printed == f"no --data: training on 3 synthetic patients, made in {folder}\n"


def points(*rows):
    return np.float32(rows).T


def test_distances_from_a_sphere_and_a_tube_are_exact():
    sphere = shapes.Ellipsoid((1, 2, 3), (5, 5, 5))
    assert np.allclose(sphere(*points((11, 2, 3), (1, -3, 3), (1, 2, 5))), (5, 0, -3))
    cylinder = shapes.Ellipsoid((0, 0, 7), (4, 4, np.inf))
    assert np.allclose(cylinder(*points((0, 6, 99), (1, 0, -99))), (2, -3))
    tube = shapes.Tube([(0, 0, 0), (10, 0, 0)], (1, 3))     # a cone's radius is 2 half-way
    assert np.allclose(tube(*points((5, 7, 0), (5, 0, 0), (-4, 0, 0), (14, 3, 0))), (5, -2, 3, 2))


def test_an_ellipsoid_is_turned_from_x_to_y_and_tilted_from_x_down():
    turned = shapes.Ellipsoid((0, 0, 0), (9, 2, 4), turn=90)
    assert np.allclose(turned(*points((0, 9, 0), (2, 0, 0), (0, 0, 4))), 0, atol=1e-4)
    tilted = shapes.Ellipsoid((0, 0, 0), (9, 2, 4), tilt=30)
    tip = (9 * np.cos(np.pi / 6), 0, -9 * np.sin(np.pi / 6))
    assert np.allclose(tilted(*points(tip, (0, 2, 0))), 0, atol=1e-4)


def test_shapes_of_shapes_have_the_distances_of_their_definition():
    left, low = shapes.HalfSpace((1, 0, 0), -3), shapes.HalfSpace((0, 1, 0), 0)    # x < 3; y < 0
    at = points((1, -7, 0), (8, -9, 0), (5, 1, 0), (3, 0, 0))                       # left: -2 5 2 0
    assert np.allclose(shapes.Union(left, low, 4)(*at), (-7, -9, 1 - 9 / 16, -1))   # low: -7 -9 1 0
    assert np.allclose(shapes.Difference(left, low, 4)(*at), (7, 9, 2 + 1 / 16, 1))
    assert np.allclose(shapes.Intersection(left, low)(*at), (-2, 5, 2, 0))
    assert np.allclose(shapes.Outside(left)(*at), (2, -5, -2, 0))
    assert np.allclose(shapes.Grown(left, 3)(*at), (-5, 2, -1, -3))


def test_shapes_work_when_their_file_is_copied_alone(tmp_path):
    shutil.copy(shapes.__file__, tmp_path)
    lines = """import shapes, sys, numpy as np
        ball, hole = shapes.Ellipsoid((0, 0, 0), (9, 9, 9)), shapes.Tube([(0, 0, -9), (0, 0, 9)], 3)
        ring = shapes.Intersection(ball, shapes.Outside(hole))
        inside = ring(*np.mgrid[-10:10:41j, -10:10:41j, -10:10:41j]) < 0
        assert abs(inside.sum() / 8 / (4 / 3 * np.pi * (81 - 9) ** 1.5) - 1) < .02
        assert not {"smit", "nibabel", "torch"} & set(sys.modules)
        print("used")"""
    program = "\n".join(line.strip() for line in lines.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)

    assert done.stdout == "used\n", done.stderr
