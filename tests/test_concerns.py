"""Oddities that do not stop a run and must be seen: of intensities, orientations, labels."""

import os

import hostile
import nibabel as nib
import numpy as np
import pytest
import torch

from smit import data, runtime
from smit.data import concerns, nifti, samples

COARSE = dict(spacing_mm=(3.0, 4.0, 5.0))


@pytest.fixture(autouse=True)
def nothing_told():
    concerns.printed.clear()
    concerns.warned.clear()


def body(low=-1000, tissue=40, high=400, noise=20):
    """A CT-like block of tissue in air with a bone in it, (24, 24, 24) float32."""
    volume = np.full((24, 24, 24), low, np.float32)
    volume[5:19, 5:19, 5:19] = tissue
    volume[10:13, 10:13, 10:13] = high
    return volume + np.random.default_rng(0).normal(0, noise, volume.shape).round().astype(
        np.float32
    )


def found_in(volume, tmp_path, **settings):
    (tmp_path / "scan.nii").write_bytes(hostile.plain(volume.astype(np.float32)))
    case = {"image": str(tmp_path / "scan.nii"), "label": None}
    return data.load_case(case, data.Preparation(**COARSE, **settings))["concerns"]


# -------------------------------------------------------------------------------------- intensities
@pytest.mark.parametrize("volume", [
    body(), body(high=1500), body(low=-1024, tissue=-30),
    body().clip(-175, 250), body().clip(-200, 300),                 # cut off where the window is
])
def test_a_ct_in_hu_raises_no_concern(volume, tmp_path):
    assert found_in(volume, tmp_path) == []


def padded(volume, value):
    """A scan with what its scanner does not see, two thirds of the planes' corners, at a value."""
    x, y = np.ogrid[-1:1:24j, -1:1:24j]
    return np.where((x ** 2 + y ** 2 > .8)[..., None], np.float32(value), volume)


@pytest.mark.parametrize("pad", [-2000, -3024])
def test_hu_with_1024_added_are_seen_beside_the_scanner_s_padding(pad, tmp_path):
    assert found_in(padded(body(), pad), tmp_path) == []
    (concern,) = found_in(padded(body() + 1024, pad), tmp_path)
    assert "HU were stored with 1024 added" in concern.what


def test_a_body_cut_out_of_its_air_is_no_concern(tmp_path):
    tissue = np.where(body() > -500, body(), np.float32(-1024))
    assert found_in(tissue, tmp_path) == []


def test_labels_with_numbers_beyond_255_are_no_scan(tmp_path):
    """As of aparc+aseg, whose numbers reach 2035."""
    patches = np.random.default_rng(0).permutation(1000 + np.arange(4 ** 3)).reshape(4, 4, 4)
    volume = np.zeros((30, 30, 30))
    volume[3:27, 3:27, 3:27] = patches.repeat(6, 0).repeat(6, 1).repeat(6, 2)
    noise = np.random.default_rng(0).integers(0, 2000, volume.shape)
    for modality in ("ct", "mr"):
        assert "as a label does" in found_in(volume, tmp_path, modality=modality)[0].what
    assert found_in(noise, tmp_path, modality="mr") == []


def test_an_mr_raises_no_concern_as_mr_though_a_few_voxels_lie_below_zero(tmp_path):
    volume = np.abs(body(0, 400, 1500))
    volume[0, 0, :2] = -400
    assert found_in(volume, tmp_path, modality="mr") == []


@pytest.mark.parametrize(
    "volume, what, way_out",
    [
        (body() + 1024, "HU were stored with 1024 added", "--hu_offset -1024"),
        (body(0, 400, 700), "these are no HU", "--modality mr"),
        ((body().clip(-175, 250) + 175) / 212.5 - 1, "scaled before", "original HU"),
        ((body() - 90) / 140, "scaled before", "original HU"),
        (body().clip(0, 250), "grey values", "--modality mr"),
        (body().clip(-125, 275), "air was cut off", "full HU"),
    ],
)
def test_a_ct_that_is_not_in_hu_is_told_with_its_way_out(volume, what, way_out, tmp_path):
    (found,) = found_in(volume, tmp_path)
    assert (
        what in found.what and way_out in found.way_out and found.path == str(tmp_path / "scan.nii")
    )


def test_a_ct_read_as_mr_and_a_window_that_leaves_nothing_are_told(tmp_path):
    (found,) = found_in(body(), tmp_path, modality="mr")
    assert "as CT has" in found.what and "--modality ct" in found.way_out
    (found,) = found_in(body(tissue=500, high=900), tmp_path)
    assert "little is left" in found.what and "white" in found.detail


def test_the_offset_makes_of_stored_values_the_hu_that_they_mean(tmp_path):
    plain, shifted = tmp_path / "hu.nii", tmp_path / "shifted.nii"
    plain.write_bytes(hostile.plain(body()))
    shifted.write_bytes(hostile.plain(body() + 1024))
    made = [
        data.load_case(
            {"image": str(path), "label": None}, data.Preparation(**COARSE, hu_offset=offset)
        )
        for path, offset in ((plain, 0.0), (shifted, -1024.0))
    ]

    assert torch.equal(made[0]["image"], made[1]["image"]) and made[1]["concerns"] == []


def test_concerns_are_kept_beside_the_cached_volume(tmp_path):
    (tmp_path / "scan.nii").write_bytes(hostile.plain(body() + 1024))
    case = {"image": str(tmp_path / "scan.nii"), "label": None}
    first, again = (
        data.cached_with_concerns(case, data.Preparation(**COARSE), tmp_path / "cache")[2]
        for _ in "12"
    )
    assert first == again and len(first) == 1 and isinstance(again[0], concerns.Concern)


def test_one_line_is_printed_for_many_files_workers_and_epochs(tmp_path, capsys):
    for n in range(4):
        (tmp_path / f"{n}.nii").write_bytes(hostile.plain(body() + 1024 + n))
    pairs = samples.ViewPairs(
        data.read_list(tmp_path),
        data.Preparation(**COARSE),
        tmp_path / "cache",
        (8,) * 3,
        (8,) * 3,
        4,
        0.5,
    )
    ranks = runtime.Ranks(0, 1, torch.device("cpu"))

    assert len(list(samples.Batches(pairs, samples.micro_batches(0, 12, 2), ranks, workers=2))) == 6
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "1024 added" in told[0]


def test_a_check_names_all_files_of_one_oddity_in_one_line_and_counts_lines(tmp_path, capsys):
    for n in range(5):
        (tmp_path / f"{n}.nii").write_bytes(hostile.plain(body() + 1024 + n))
    assert data.verdict() == "all good"

    data.check_voxels(data.read_list(tmp_path), data.Preparation(**COARSE))
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith(f"warning: {tmp_path}/0.nii: no air near -1000")
        and "[4 more: 1.nii, 2.nii, 3.nii, 4.nii]" in line
    )
    assert data.verdict() == "1 warning"


def test_a_slab_whose_views_are_mostly_padding_is_told(tmp_path):
    (tmp_path / "slab.nii").write_bytes(hostile.plain(body()[:, :, 11:13]))
    pairs = samples.ViewPairs(
        data.read_list(tmp_path),
        data.Preparation((1.5, 2.0, 2.5)),
        tmp_path / "cache",
        (8,) * 3,
        (8,) * 3,
        4,
        0.5,
    )

    assert [found.what for found in pairs[0]["concerns"]] == [
        "is so thin that its views are mostly padding"
    ]


# ----------------------------------------------------------------------------------------- geometry
def header_of(tmp_path, *edits, **more):
    (tmp_path / "x.nii").write_bytes(hostile.patched(*edits, **more))
    return nifti.read_header(tmp_path / "x.nii")


def test_a_header_without_orientation_is_told(tmp_path):
    (found,) = header_of(tmp_path, (hostile.QCODE, "<hh", 0, 0)).concerns
    assert "left and right are unknown" in found.what and found.detail == "taken as LAS"
    assert header_of(tmp_path).concerns == ()


def test_forms_that_differ_are_told_and_a_mirrored_one_by_name(tmp_path):
    (moved,) = header_of(
        tmp_path, (hostile.QCODE, "<h", 1), (hostile.QUATERN, "<6f", 0, 1, 0, 9, -8, 40)
    ).concerns
    assert "the sform is used" in moved.what and "left and right" not in moved.what

    (mirrored,) = header_of(
        tmp_path, (hostile.QCODE, "<h", 1), (hostile.QUATERN, "<6f", 0, 0, 0, -9, -8, 4)
    ).concerns
    assert "even in left and right; the sform is used" in mirrored.what
    agreeing = nifti.read_header(agree(tmp_path))
    assert agreeing.concerns == ()


@pytest.mark.parametrize("shift_mm, told", [((4.9, 0, 0), True), ((0, 0, 4.9), False)])
def test_forms_are_told_apart_in_voxels_of_each_axis(shift_mm, told, tmp_path):
    affine = np.diag([.7, .7, 5., 1.])
    image = nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), affine)
    moved = affine.copy()
    moved[:3, 3] += shift_mm
    image.set_sform(affine, 1)
    image.set_qform(moved, 1)
    nib.save(image, tmp_path / "scan.nii")
    found = [concern.what for concern in nifti.read_header(tmp_path / "scan.nii").concerns]
    assert any("qform and sform differ" in what for what in found) == told


def agree(tmp_path):
    """A file whose qform is its sform."""

    image = nib.Nifti1Image(hostile.VOXELS, hostile.AFFINE)
    image.set_qform(hostile.AFFINE, 1)
    nib.save(image, tmp_path / "agree.nii")
    return tmp_path / "agree.nii"


@pytest.mark.parametrize("unit, size", [(1, 0.0015), (2, 1.5), (3, 1500.0), (0, 1.5)])
def test_metres_and_microns_are_converted_to_mm(unit, size, tmp_path):
    affine = np.diag([size] * 3 + [1])
    header = header_of(tmp_path, (123, "<B", unit), data=hostile.plain(affine=affine))
    np.testing.assert_allclose(header.affine, np.diag([1.5] * 3 + [1]), rtol=1e-6)


def test_a_refusal_names_a_unit_that_makes_sizes_absurd(tmp_path):
    with pytest.raises(data.BadVolume, match="unit being the metre"):
        header_of(tmp_path, (123, "<B", 1))


@pytest.mark.parametrize("quaternion", [(0, 0, 1.0000005), (0.70710695, 0.70710695, 0)])
def test_a_quaternion_longer_by_rounding_is_read_and_written_so_that_others_can(
    quaternion, tmp_path
):

    edits = (
        (hostile.QCODE, "<hh", 1, 0),
        (hostile.QUATERN, "<3f", *quaternion),
        (hostile.PIXDIM, "<f", 1),
    )
    header = header_of(tmp_path, *edits)
    unit = np.array(quaternion) / np.linalg.norm(quaternion)
    expected = (2 * np.outer(unit, unit) - np.eye(3)) * [1.5, 2, 2.5]  # half a turn about `unit`
    np.testing.assert_allclose(header.affine[:3, :3], expected, atol=1e-5)

    data.write_label(tmp_path / "label.nii.gz", hostile.LABEL, tmp_path / "x.nii")
    np.testing.assert_allclose(nib.load(tmp_path / "label.nii.gz").affine, header.affine, atol=1e-5)
    with pytest.raises(data.BadVolume, match="orientation"):
        header_of(tmp_path, *edits[:1], (hostile.QUATERN, "<3f", 0.9, 0.9, 0))


def test_a_shear_is_told_in_degrees(tmp_path):
    affine = np.diag([2.0, 2, 5, 1])
    affine[1, 2] = 5 * np.tan(np.deg2rad(20))
    (found,) = header_of(tmp_path, data=hostile.plain(affine=affine)).concerns
    assert "not at right angles" in found.what and found.detail == "20.0 degrees"


def test_a_label_of_another_orientation_comes_to_its_images_grid(tmp_path):
    (tmp_path / "image.nii").write_bytes(hostile.plain())
    (tmp_path / "same.nii").write_bytes(hostile.plain(hostile.LABEL))
    turned, affine = (
        hostile.LABEL.transpose(2, 0, 1)[:, ::-1],
        hostile.AFFINE[:, [2, 0, 1, 3]].copy(),
    )
    affine[:3, 3] += affine[:3, 1] * (hostile.SHAPE[0] - 1)
    affine[:3, 1] *= -1
    (tmp_path / "turned.nii").write_bytes(hostile.plain(np.ascontiguousarray(turned), affine))
    affine[2, 3] += 1
    (tmp_path / "moved.nii").write_bytes(hostile.plain(np.ascontiguousarray(turned), affine))
    labels = {}
    for name in ("same", "turned"):
        case = {"image": str(tmp_path / "image.nii"), "label": str(tmp_path / f"{name}.nii")}
        labels[name] = data.load_case(case, data.Preparation(**COARSE), with_label=True)["label"]

    assert torch.equal(labels["same"], labels["turned"]) and labels["same"].any()
    with pytest.raises(
        data.BadVolume, match=r"8 x 12 x 10 voxels SRA .*, the image 12 x 10 x 8 voxels LAS"
    ):
        data.check_case({**case, "label": str(tmp_path / "moved.nii")}, True)


# -------------------------------------------------------------------- over-strict checks, the cache
@pytest.mark.parametrize("classes, dtype", [(13, "i2"), (13, "u1"), (117, "i2"), (99, "i2")])
def test_labels_scaled_to_the_range_of_their_type_are_read_whole(classes, dtype, tmp_path):
    truth = (np.arange(960).reshape(12, 10, 8) % (classes + 1)).astype(np.uint8)
    info = np.iinfo(dtype)
    slope = np.float32(classes / (float(info.max) - info.min))
    inter = np.float32(-info.min * slope)
    stored = np.round((truth - inter) / slope).clip(info.min, info.max).astype(dtype)
    (tmp_path / "label.nii").write_bytes(
        hostile.patched((hostile.SLOPE, "<ff", slope, inter), data=hostile.plain(stored))
    )
    assert np.array_equal(data.read_label(tmp_path / "label.nii", classes + 1)[0], truth)


def test_a_large_volume_is_refused_naming_what_allows_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SMIT_MAX_VOXELS", "959")
    with pytest.raises(
        data.BadVolume, match="are 960 voxels, more than 959; .* SMIT_MAX_VOXELS=960"
    ):
        header_of(tmp_path)
    monkeypatch.setenv("SMIT_MAX_VOXELS", "960")
    assert header_of(tmp_path).shape == hostile.SHAPE


def test_bad_headers_count_against_max_bad(tmp_path, capsys):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.nii").write_bytes(hostile.plain())
    (tmp_path / "four.nii").write_bytes(hostile.plain(np.stack([hostile.VOXELS] * 2, 3)))
    (tmp_path / "cut.nii").write_bytes(hostile.plain()[:900])
    cases = data.read_list(tmp_path)
    good, bad = data.readable_cases(cases, 2)

    assert [os.path.basename(case["image"]) for case in good] == [
        "a.nii",
        "b.nii",
        "c.nii",
    ] and bad == 2
    assert capsys.readouterr().err.count("skipped: ") == 2
    with pytest.raises(ValueError, match="2 problems:\n.*cut.nii.*\n.*four.nii.*4-D"):
        data.readable_cases(cases, 1)
    with pytest.raises(ValueError, match="3 problems:\nlist: listed twice\n"):
        data.readable_cases(cases, 5, problems=["list: listed twice"])


def test_a_label_corrected_with_its_size_and_time_is_not_taken_from_the_cache(tmp_path):
    (tmp_path / "image.nii").write_bytes(hostile.plain())
    case = {"image": str(tmp_path / "image.nii"), "label": str(tmp_path / "label.nii")}
    seen = []
    for label in (hostile.LABEL, np.where(hostile.LABEL == 3, 1, 0).astype(np.uint8)):
        (tmp_path / "label.nii").write_bytes(hostile.plain(label))
        os.utime(tmp_path / "label.nii", (0, 0))
        seen.append(
            int(data.cached(case, data.Preparation(**COARSE), tmp_path / "cache", True)[1].max())
        )

    assert seen == [3, 1]


def test_an_empty_label_is_prepared_and_told(tmp_path):
    (tmp_path / "image.nii").write_bytes(hostile.plain())
    (tmp_path / "label.nii").write_bytes(hostile.plain(hostile.LABEL * np.uint8(0)))
    case = {"image": str(tmp_path / "image.nii"), "label": str(tmp_path / "label.nii")}
    made = data.load_case(case, data.Preparation(**COARSE), with_label=True)

    assert (
        not made["label"].any()
        and [found.what for found in made["concerns"]][-1] == "the label is empty"
    )
