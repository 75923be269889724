"""Write bad, and odd but valid, files: what hospitals, broken copies and attackers hand to a reader.

    python tests/hostile.py FOLDER

`build(folder)` returns Item(path, kind, good): kind "image" (good ones all hold VOXELS), "other"
(good, other voxels), "label" or "list"; good False means that it must be refused by name.
"""

import gzip
import json
import os
import struct
import sys
import zlib
from collections import namedtuple
from pathlib import Path

import nibabel as nib
import numpy as np

Item = namedtuple("Item", "path kind good")
SHAPE, AFFINE = (
    (12, 10, 8),
    np.array([[-1.5, 0, 0, 9], [0, 2, 0, -8], [0, 0, 2.5, 4], [0, 0, 0, 1.0]]),
)
VOXELS = (np.random.default_rng(0).integers(-450, 450, SHAPE) * 2).astype(
    np.int16
)  # even HU, some above -175
LABEL = (VOXELS > 0).astype(np.uint8) * 3
DIM, TYPE, PIXDIM, OFFSET, SLOPE, QCODE, QUATERN, SROW, MAGIC = (
    40,
    70,
    76,
    108,
    112,
    252,
    256,
    280,
    344,
)  # bytes
INTENT, UNITS = 68, 123
SHEAR = [[1, 0, 0, 0], [0, 1, 0.4, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def plain(voxels=VOXELS, affine=AFFINE, kind=nib.Nifti1Image):
    """The bytes of a .nii file."""
    return kind(voxels, affine, dtype=voxels.dtype).to_bytes()


def patched(*edits, data=None):
    """A .nii file's bytes with (offset, struct format, *values) written over its header."""
    data = bytearray(data or plain())
    for offset, form, *values in edits:
        struct.pack_into(form, data, offset, *values)
    return bytes(data)


def scaled(factor):
    """AFFINE in another unit than mm."""
    return np.diag([factor] * 3 + [1]) @ AFFINE


def dims(*sides):
    return (DIM, f"<{len(sides) + 1}h", len(sides), *sides)


def bad_images():
    good, packed, nan, inf = plain(), gzip.compress(plain(), mtime=0), float("nan"), float("inf")
    with_hole = VOXELS.astype(np.float32)
    with_hole[3, 4, 5] = nan
    endless = VOXELS.astype(np.float64)
    endless[3, 4, 5] = inf
    pair = patched((MAGIC, "4s", b"ni1\0"), (OFFSET, "<f", 0))[:348]
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    return {
        "empty.nii": b"",
        "empty.nii.gz": b"",
        "only_gzip_magic.nii.gz": b"\x1f\x8b",
        "noise.nii": os.urandom(5000),
        "noise.nii.gz": gzip.compress(os.urandom(5000)),
        "text.nii.gz": b"this is no volume\n" * 50,
        "dicom.nii": bytes(128) + b"DICM" + bytes(600),
        "nrrd.nii": b"NRRD0005\ntype: short\n" + bytes(600),
        "mgz.nii.gz": gzip.compress(struct.pack(">iiii", 1, 12, 10, 8) + bytes(600)),
        "appledouble.nii.gz": b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(150),
        "quaternion_no_rotation.nii": patched((QCODE, "<hh", 1, 0), (QUATERN, "<3f", 0.9, 0.9, 0)),
        "metres_absurd.nii": patched((UNITS, "<B", 1)),
        "html.nii.gz": b"<!DOCTYPE html><html>404 not found</html>" * 30,
        "zip.nii": b"PK\x03\x04" + bytes(2000),
        "header_cut.nii": good[:200],
        "voxels_cut.nii": good[:-1],
        "half.nii": good[: len(good) // 2],
        "cut.nii.gz": packed[:-9],
        "half.nii.gz": packed[: len(packed) // 2],
        "no_header_left.nii.gz": packed[:30],
        "crc.nii.gz": packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:],
        "tail.nii.gz": packed + b"tail that is no gzip",
        "magic.nii": patched((MAGIC, "4s", b"nope")),
        "analyze.nii": patched((MAGIC, "4s", bytes(4))),
        "pair_magic.nii": patched((MAGIC, "4s", b"ni1\0")),
        "sizeof_hdr.nii": patched((0, "<i", 349)),
        "zero_side.nii": patched(dims(12, 0, 8)),
        "negative_side.nii": patched(dims(12, -10, 8)),
        "no_sides.nii": patched((DIM, "<h", 0)),
        "ndim_9.nii": patched((DIM, "<h", 9)),
        "2d.nii": patched(dims(12, 80)),
        "5d.nii": patched(dims(12, 10, 2, 2, 2)),
        "frames.nii": patched(dims(12, 10, 4, 2)),
        "5d_vector.nii": plain(np.zeros((6, 5, 4, 1, 3), np.float32)),
        "header_bomb.nii": patched(dims(1000, 1000, 1000)),
        "header_bomb.nii.gz": gzip.compress(patched(dims(1000, 1000, 1000))),
        "long_side.nii": patched(dims(32767, 1, 1)),
        "voxel_bomb.nii.gz": gzip.compress(patched(dims(2000, 2000, 200)), 1),
        "gzip_bomb.nii.gz": bomb(good, 2**30),
        "zeros_bomb.nii.gz": bomb(patched(dims(800, 800, 400))[:352], 2 * 800 * 800 * 400),
        "rgb.nii": plain(rgb),
        "complex.nii": plain(VOXELS.astype(np.complex64)),
        "type_0.nii": patched((TYPE, "<h", 0)),
        "type_999.nii": patched((TYPE, "<h", 999)),
        "binary.nii": patched((TYPE, "<h", 1)),
        "wider_type.nii": patched((TYPE, "<h", 64)),
        "slope_inf.nii": patched((SLOPE, "<f", inf)),
        "slope_minus_inf.nii": patched((SLOPE, "<f", -inf)),
        "inter_inf.nii": patched((SLOPE, "<ff", 1, inf)),
        "inter_nan.nii": patched((SLOPE, "<ff", 1, nan)),
        "slope_huge.nii": patched((SLOPE, "<ff", 1e30, 0)),
        "offset_nan.nii": patched((OFFSET, "<f", nan)),
        "offset_negative.nii": patched((OFFSET, "<f", -16)),
        "offset_low.nii": patched((OFFSET, "<f", 16)),
        "offset_far.nii": patched((OFFSET, "<f", 1e9)),
        "offset_inf.nii.gz": gzip.compress(patched((OFFSET, "<f", inf))),
        "nan_voxel.nii": plain(with_hole),
        "inf_voxel.nii.gz": gzip.compress(plain(endless)),
        "constant.nii.gz": gzip.compress(plain(np.full(SHAPE, 7, np.int16))),
        "sform_nan.nii": patched((SROW, "<f", nan)),
        "sform_inf.nii": patched((SROW + 12, "<f", inf)),
        "sform_zero.nii": patched((SROW, "<12f", *[0] * 12)),
        "sform_singular.nii": patched((SROW, "<8f", *[1, 0, 0, 0] * 2)),
        "sform_far.nii": patched((SROW + 12, "<f", 1e20)),
        "qform_bad.nii": patched((QCODE, "<hh", 1, 0), (QUATERN, "<3f", 3, 3, 3)),
        "qform_nan.nii": patched((QCODE, "<hh", 1, 0), (QUATERN, "<3f", nan, 0, 0)),
        "qform_negative.nii": patched((QCODE, "<hh", 1, 0), (PIXDIM + 4, "<f", -1.5)),
        "no_form_zero.nii": patched((QCODE, "<hh", 0, 0), (PIXDIM + 4, "<f", 0)),
        "no_form_negative.nii": patched((QCODE, "<hh", 0, 0), (PIXDIM + 4, "<f", -1.5)),
        "spacing_bomb.nii": plain(affine=np.diag([1000.0, 1000, 1000, 1])),
        "spacing_tiny.nii": plain(affine=np.diag([1e-6, 1e-6, 1e-6, 1])),
        "frames_first.nii": patched(dims(1, 12, 10, 8)),
        "offset_half.nii": patched((OFFSET, "<f", 352.5)),
        "offset_bomb.nii.gz": bomb(patched((OFFSET, "<f", 2**28))[:352], 2**28 + VOXELS.nbytes),
        "member_more.nii.gz": packed + gzip.compress(bytes(2**21)),
        "metres.nii": plain(affine=AFFINE / 1000),
        "qfac_2.nii": patched((QCODE, "<hh", 1, 0), (PIXDIM, "<f", 2)),
        "extended_cut.nii": patched((OFFSET, "<f", 368)),
        "mixed.hdr": pair,
        "mixed.img.gz": gzip.compress(good[352:]),
        "short.hdr": pair,
        "short.img": good[352:-2],
        "other_case.hdr": pair,
        "other_case.IMG": good[352:],
        "swapped_dims.nii": patched((DIM, ">4h", 3, 12, 10, 8)),
        "trailing.nii": good + bytes(2**21),
        "lonely.hdr": good[:348],
        "all_air.nii": plain(VOXELS // 100 - 1000),
    }


def bomb(start, zeros):
    """A gzip stream of `start` and then `zeros` bytes of 0, made in little memory."""
    squeeze, count = zlib.compressobj(1, zlib.DEFLATED, 31), -(-zeros // 2**20)
    return (
        squeeze.compress(start)
        + b"".join(squeeze.compress(bytes(2**20)) for _ in range(count))
        + squeeze.flush()
    )


def good_images():
    """Files that all hold VOXELS."""
    good, pair = plain(), patched((MAGIC, "4s", b"ni1\0"), (OFFSET, "<f", 0))[:348]
    swapped = nib.Nifti1Header(endianness=">")
    swapped.set_data_dtype(np.int16)
    big = nib.Nifti1Image(VOXELS, AFFINE, swapped)
    return {
        "plain.nii": good,
        "packed.nii.gz": gzip.compress(good),
        "packed.nii": gzip.compress(good),
        "plain.nii.gz": good,
        "UPPER.NII": good,
        "with space é 肝臓.nii.gz": gzip.compress(good),
        "two_members.nii.gz": gzip.compress(good[:999]) + gzip.compress(good[999:]),
        "big_endian.nii": big.to_bytes(),
        "nifti2.nii.gz": gzip.compress(plain(kind=nib.Nifti2Image)),
        "slope.nii": patched(
            (SLOPE, "<ff", 2, -1000), data=plain(((VOXELS + 1000) // 2).astype(np.uint16))
        ),
        "slope_0.nii": patched((SLOPE, "<ff", 0, 5)),
        "slope_nan.nii": patched((SLOPE, "<ff", float("nan"), 5)),
        **{f"{kind}.nii": plain(VOXELS.astype(kind)) for kind in ("float32", "float64", "int32")},
        "uint32.nii": patched(
            (SLOPE, "<ff", 1, -1000), data=plain((VOXELS + 1000).astype(np.uint32))
        ),
        "int64.nii": patched((SLOPE, "<ff", 1, 0), data=plain(VOXELS.astype(np.int64))),
        "one_frame.nii": plain(VOXELS[..., None]),
        "offset_0.nii": patched((OFFSET, "<f", 0)),
        "padded.nii.gz": gzip.compress(good + bytes(512)),
        "pixdim_0.nii": patched((PIXDIM + 4, "<f", 0)),
        "extended.nii": patched(
            (OFFSET, "<f", 368), data=good[:348] + struct.pack("<iii8x", 1, 16, 6) + good[352:]
        ),
        **{name + ".hdr": pair for name in ("pair", "packed_img")},
        "pair.img": good[352:],
        "UPPER_PAIR.HDR": pair,
        "UPPER_PAIR.IMG": good[352:],
        "packed_img.img": gzip.compress(good[352:]),
        "packed_pair.hdr.gz": gzip.compress(pair),
        "packed_pair.img.gz": gzip.compress(good[352:]),
        "singletons.nii": plain(VOXELS[..., None, None]),
        "intent.nii": patched((INTENT, "<h", 1001)),
        "negative_pixdim.nii": patched((PIXDIM, "<4f", -1, -1.5, -2, -2.5)),
        "forms_differ.nii": patched((QCODE, "<h", 1), (QUATERN, "<6f", 0.5, 0.5, 0, 7, 7, 7)),
        "uint64.nii": patched(
            (SLOPE, "<ff", 1, -1000), data=plain((VOXELS + 1000).astype(np.uint64))
        ),
        "zero_padded.nii.gz": gzip.compress(good) + bytes(512),
        "metres.nii": patched((UNITS, "<B", 1), data=plain(affine=scaled(0.001))),
        "microns.nii": patched((UNITS, "<B", 3), data=plain(affine=scaled(1000))),
    }


def other_images():
    """Valid, with other voxels or another orientation."""
    turn = np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return {
        "oblique.nii": plain(affine=turn @ AFFINE),
        "mirrored.nii": plain(affine=np.diag([1, -1, 1, 1]) @ AFFINE),
        "rotated.nii": plain(
            np.ascontiguousarray(VOXELS.transpose(2, 0, 1)), AFFINE[:, [2, 0, 1, 3]]
        ),
        "tiny.nii": plain(VOXELS[:2, :1, :1]),
        "one_slice.nii": plain(VOXELS[:, :, :1]),
        "no_form.nii": patched((QCODE, "<hh", 0, 0)),
        "uint8.nii": plain(np.abs(VOXELS // 8).astype(np.uint8)),
        "thick.nii": plain(affine=np.diag([0.5, 0.5, 10, 1])),
        "anisotropic.nii": plain(affine=np.diag([0.3, 0.3, 45, 1])),
        "qform_rounded.nii": patched((QCODE, "<hh", 1, 0), (QUATERN, "<3f", 0, 0, 1.0000005)),
        "sheared.nii": plain(affine=AFFINE @ np.array(SHEAR)),
        "qfac_0.nii": patched((QCODE, "<hh", 1, 0), (PIXDIM, "<f", 0)),
    }


def labels():
    """{name: (bytes, good)} to be read beside an image on AFFINE and SHAPE."""
    return {
        "label_uint8.nii.gz": (gzip.compress(plain(LABEL)), True),
        "label_float.nii": (plain(LABEL.astype(np.float64)), True),
        "label_int64.nii": (plain(LABEL.astype(np.int64)), True),
        "label_hair_off.nii": (plain(LABEL * np.float32(1.0000001)), True),
        "label_scaled.nii": (
            patched((SLOPE, "<ff", 3 / 255, 0), data=plain(LABEL * np.uint8(85))),
            True,
        ),
        "label_near.nii": (plain(LABEL * np.float32(1.01)), False),
        "label_14.nii": (plain(LABEL * np.uint8(5)), False),
        "label_huge.nii": (plain(LABEL * np.int64(2**40)), False),
        "label_half.nii": (plain(LABEL * np.float32(0.5)), False),
        "label_negative.nii": (plain(-LABEL.astype(np.int16)), False),
        "label_large.nii": (plain(LABEL.astype(np.int16) * 100), False),
        "label_empty.nii": (plain(LABEL * np.uint8(0)), True),
        "label_nan.nii": (plain(np.where(LABEL > 0, np.nan, 0).astype(np.float32)), False),
    }


def lists(image="good/plain.nii"):
    """{name: (text, good)} of dataset lists one folder above good/."""

    def split(*entries, **more):
        return json.dumps({"training": [*entries], **more})

    return {
        "entry.json": (split({"image": image}), True),
        "string.json": (split(image), True),
        "list.txt": (f"# comment\n\n{image}\n", True),
        "tab.txt": (f"{image}\tgood/float32.nii\n", True),
        "bom.csv": (f"\ufeff{image},good/float32.nii\r\n", True),
        "brace.json": ('{"training": [', False),
        "array.json": ("[1, 2]", False),
        "no_key.json": (json.dumps({"test": [image]}), False),
        "none.json": (split(), False),
        "number.json": (split(5), False),
        "no_image.json": (split({"label": image}), False),
        "nul.json": (split("a\0b.nii"), False),
        "channels.json": (split({"image": [image, image]}), False),
        "surrogate.json": ('{"training": ["\\ud800.nii"]}', False),
        "leaves.json": (split("../outside.nii"), False),
        "leaves_within.json": (split("good/../../outside.nii"), False),
        "absolute.json": (split("/etc/passwd"), True),  # named by the user, and then no NIfTI file
        "twice.json": (split(image, {"image": "good/../" + image}), False),
        "two_channels.json": (json.dumps({"channel_names": {"0": "T1", "1": "T2"}}), False),
        "deep.json": ("[" * 10**5, False),
        "deep_entry.json": ('{"training": ' + "[" * 10**5, False),
        "utf16.txt": (f"{image}\n".encode("utf-16"), False),
        "latin1.txt": ("né.nii\n".encode("latin-1"), False),
        "key_twice.json": (f'{{"training": ["{image}"], "training": ["good/float32.nii"]}}', False),
        "infinite.json": ('{"training": [1e999]}', False),
        "digits.json": ('{"training": [' + "9" * 10**5, False),
        "newline.json": (split("good/a\nb.nii"), False),
        "null.json": (split({"image": None}), False),
        "label_leaves.json": (split({"image": image, "label": "../label.nii"}), False),
        "columns.txt": (f"{image}\tgood/float32.nii\tgood/float64.nii\n", False),
        "BOM.JSON": ("\ufeff" + split(image), True),
        "comments.txt": ("# nothing\n", False),
        "nul.txt": ("a\0b", False),
        "twice.txt": (f"{image}\n{image}\n", False),
    }


def build(folder):
    """Write them all below `folder` (good/, bad/, lists in it) and say what each is: [Item]."""
    folder, items = Path(folder), []

    def put(name, data, kind, good):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        items.append(Item(str(path), kind, good))

    for name, data in bad_images().items():
        put("bad/" + name, data, "image", False)
    for name, data in good_images().items():
        put("good/" + name, data, "image", True)
    for name, data in other_images().items():
        put("other/" + name, data, "other", True)
    for name, (data, good) in labels().items():
        put("labels/" + name, data, "label", good)
    for name, (text, good) in lists().items():
        put(name, text, "list", good)
    bad = folder / "bad"
    (bad / "dangling.nii.gz").symlink_to("absent.nii.gz")
    (bad / "loop.nii.gz").symlink_to("loop.nii.gz")
    (bad / "directory.nii.gz").mkdir()
    os.mkfifo(bad / "pipe.nii.gz")
    (folder / "good/link.nii").symlink_to("plain.nii")
    (folder / "empty_folder").mkdir()
    special = [
        "dangling.nii.gz",
        "loop.nii.gz",
        "directory.nii.gz",
        "pipe.nii.gz",
        "absent.nii.gz",
        "a\0b.nii",
    ]
    items += [Item(str(bad / name), "image", False) for name in (*special, "n" * 300, "/dev/zero")]
    items += [
        Item(str(folder / name), "list", False)
        for name in ("empty_folder", "absent", "bad/noise.nii.json")
    ]
    (bad / "noise.nii.json").write_bytes(b"\xff\xfe\x00" * 99)
    return items + [
        Item(str(folder / "good/link.nii"), "image", True),
        Item(str(folder / "other"), "list", True),
    ]


if __name__ == "__main__":
    made = build(sys.argv[1])
    print(f"{len(made)} files, {sum(not item.good for item in made)} of them to be refused")
