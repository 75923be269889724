"""smit.data.nifti: what is no NIfTI file, what follows the voxels, and doubtful voxel sizes."""
import gzip
import io
import lzma
import zipfile

import hostile
import nibabel as nib
import numpy as np
import pytest

from smit import data

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def volume(tmp_path, content):
    (tmp_path / "scan.nii.gz").write_bytes(content)
    return tmp_path / "scan.nii.gz"


def zip_of(content):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("scan.nii", content)
    return archive.getvalue()


# ------------------------------------------------------------------------------- what is no NIfTI
@pytest.mark.parametrize("content, told", [
    (LFS, "is a Git LFS pointer, not the file; run git lfs pull"),
    (b"/annex/objects/MD5E-s9--0.nii.gz\n", "is a git-annex pointer, .*; run git annex get"),
    (b"<!DOCTYPE html>\n<html>404</html>", "is a web page, not the file; download it again"),
    (b"<?xml version='1.0'?><Error/>", "is a server's answer in XML, .*; download it again"),
    (lzma.compress(hostile.plain()), "is packed by xz; unpack it with unxz"),
    (zip_of(hostile.plain()), "is a zip archive; unpack it"),
])
def test_what_has_only_the_name_of_a_volume_is_told_by_its_kind(content, told, tmp_path):
    with pytest.raises(data.BadVolume, match=f"scan.nii.gz: {told}$"):
        data.read_header(volume(tmp_path, content))


def test_a_link_of_git_annex_without_its_content_is_told(tmp_path):
    (tmp_path / "scan.nii.gz").symlink_to(".git/annex/objects/x/MD5E-s9--0/MD5E-s9--0.nii.gz")
    with pytest.raises(data.BadVolume, match="scan.nii.gz: is a git-annex link, .*git annex get$"):
        data.read_header(tmp_path / "scan.nii.gz")


def test_a_list_that_is_a_git_lfs_pointer_is_told_so(tmp_path):
    (tmp_path / "dataset.json").write_bytes(LFS)
    with pytest.raises(ValueError, match="dataset.json: is a Git LFS pointer.*git lfs pull$"):
        data.read_list(tmp_path / "dataset.json")


# ------------------------------------------------------------------------ what follows the voxels
@pytest.mark.parametrize("packed", [True, False])
def test_two_volumes_in_one_file_are_refused(packed, tmp_path):
    one, other = hostile.plain(), hostile.plain(hostile.VOXELS[::-1].copy())
    content = gzip.compress(one) + gzip.compress(other) if packed else one + other
    with pytest.raises(data.BadVolume, match="after its last voxel, as two volumes in one file"):
        data.read_volume(volume(tmp_path, content))


@pytest.mark.parametrize("tail", [bytes(999), b"\n"])
def test_zeros_or_a_stray_byte_after_the_last_voxel_are_read_over(tail, tmp_path):
    voxels, _ = data.read_volume(volume(tmp_path, gzip.compress(hostile.plain() + tail)))
    assert np.array_equal(voxels, hostile.VOXELS)


# -------------------------------------------------------------------------------------- geometry
@pytest.mark.parametrize("qfac, sign", [(2, 1), (.5, 1), (-3, -1), (hostile.NAN, 1)])
def test_any_qfac_below_zero_is_minus_one_and_any_other_is_one(qfac, sign, tmp_path):
    read = {}
    for number in (qfac, sign):
        edits = hostile.forms(1, 0), hostile.quaternion(0, 0, 1), hostile.qfac(number)
        read[number] = data.read_header(volume(tmp_path, hostile.patched(*edits))).affine
    assert np.array_equal(read[qfac], read[sign])
    assert np.sign(np.linalg.det(read[sign])) == sign


def concerns_of(tmp_path, affine, sizes_mm):
    content = hostile.patched((hostile.PIXDIM + 4, "<3f", *sizes_mm),
                              data=hostile.plain(affine=np.array(affine)))
    return data.read_header(volume(tmp_path, content)).concerns


@pytest.mark.parametrize("sizes_mm", [(1, 1, 1), (.7, .7, 5)])
def test_an_affine_that_is_the_identity_is_told(sizes_mm, tmp_path):
    (found,) = concerns_of(tmp_path, np.eye(4), sizes_mm)
    assert "identity: spacing and orientation were probably lost" in found.what
    x, _, z = sizes_mm
    assert f"1 x 1 x 1 mm by the affine, {x} x {x} x {z} mm by pixdim" == found.detail


def test_an_affine_of_other_voxel_sizes_than_pixdim_is_told_from_one_percent_on(tmp_path):
    (found,) = concerns_of(tmp_path, hostile.AFFINE, (1.5, 2, 5))
    assert "differ in the voxels' size; the affine is used" in found.what
    assert found.detail == "1.5 x 2 x 2.5 mm by the affine, 1.5 x 2 x 5 mm by pixdim"
    assert concerns_of(tmp_path, hostile.AFFINE, (1.5, 2.01, 2.49)) == ()
    assert concerns_of(tmp_path, hostile.AFFINE, (0, -2, 2.5)) == ()


def test_pixdim_in_metres_is_held_against_an_affine_in_metres(tmp_path):
    for code, factor in ((hostile.METRE, .001), (hostile.MICRON, 1000)):
        content = hostile.patched(hostile.units(code),
                                  data=hostile.plain(affine=hostile.scaled(factor)))
        assert data.read_header(volume(tmp_path, content)).concerns == ()


def test_a_header_that_tools_write_for_the_same_grid_raises_no_concern(tmp_path):
    turn = np.array([[.8, -.6, 0, 0], [.6, .8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for affine in (hostile.AFFINE, turn @ hostile.AFFINE, np.diag([-1., -1, 1, 1])):
        image = nib.Nifti1Image(hostile.VOXELS, affine)
        image.set_qform(affine, 1)
        nib.save(image, tmp_path / "scan.nii.gz")
        assert data.read_header(tmp_path / "scan.nii.gz").concerns == ()
