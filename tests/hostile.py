"""Write bad, and odd but valid, files: those that hospitals, broken copies and attackers hand over.

    python tests/hostile.py FOLDER

Reading order: Item, build, then a function for each kind of file. Most files are a plain one whose
header is edited; an edit is (byte, struct format, *values), and `patched` writes it.
"""
import gzip
import json
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

NAN = float("nan")
INF = float("inf")
MIB = 2 ** 20

# the volume that every good image holds: even HU, some above the window's lower end of -175
SHAPE = (12, 10, 8)
AFFINE = np.array([[-1.5, 0, 0, 9], [0, 2, 0, -8], [0, 0, 2.5, 4], [0, 0, 0, 1.0]])
VOXELS = (np.random.default_rng(0).integers(-450, 450, SHAPE) * 2).astype(np.int16)
LABEL = (VOXELS > 0).astype(np.uint8) * 3

# where NIfTI-1 keeps its fields, in bytes from the beginning of the file
DIM = 40
INTENT = 68
TYPE = 70
PIXDIM = 76
OFFSET = 108
SLOPE = 112
UNITS = 123
QCODE = 252
QUATERN = 256
SROW = 280
MAGIC = 344
HEADER_BYTES = 348
VOXELS_BEGIN = 352               # in a plain file

# codes of voxel types
NO_TYPE, BINARY, FLOAT64, UNKNOWN_TYPE = 0, 1, 64, 999

# codes of units
METRE, MICRON = 1, 3


class Item(NamedTuple):
    """Name a file, and say what a reader must do with it."""

    path: str
    kind: str                    # "image" (good ones hold VOXELS), "other" voxels, "label", "list"
    good: bool                   # False: it must be refused by name


def build(folder):
    """Write all files below a folder: good/, bad/, other/, labels/, and lists; return [Item]."""
    folder = Path(folder)
    return [
        *write(folder / "bad", bad_images(), "image", good=False),
        *write(folder / "good", good_images(), "image", good=True),
        *write(folder / "other", other_images(), "other", good=True),
        *write(folder / "labels", good_labels(), "label", good=True),
        *write(folder / "labels", bad_labels(), "label", good=False),
        *write(folder, good_lists(), "list", good=True),
        *write(folder, bad_lists(), "list", good=False),
        *write_special_images(folder),
        *write_special_lists(folder),
    ]


def write(folder, contents, kind, good):
    """Write files, {name: bytes or text}; return their Items."""
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for name, content in contents.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
        items.append(Item(str(folder / name), kind, good))
    return items


def write_special_images(folder):
    """Make what is no regular file, and name what is nowhere; return their Items."""
    good = folder / "good"
    (good / "link.nii").symlink_to("plain.nii")
    items = [Item(str(good / "link.nii"), "image", True)]

    bad = folder / "bad"
    (bad / "dangling.nii.gz").symlink_to("absent.nii.gz")
    (bad / "loop.nii.gz").symlink_to("loop.nii.gz")
    (bad / "directory.nii.gz").mkdir()
    os.mkfifo(bad / "pipe.nii.gz")
    names = ["dangling.nii.gz", "loop.nii.gz", "directory.nii.gz", "pipe.nii.gz",
             "absent.nii.gz", "a\0b.nii", "n" * 300, "/dev/zero"]
    for name in names:
        items.append(Item(str(bad / name), "image", False))
    return items


def write_special_lists(folder):
    """Make folders and noise that are given as lists; return their Items."""
    (folder / "empty_folder").mkdir()
    (folder / "bad/noise.nii.json").write_bytes(b"\xff\xfe\x00" * 99)
    items = [Item(str(folder / "other"), "list", True)]
    for name in ("empty_folder", "absent", "bad/noise.nii.json"):
        items.append(Item(str(folder / name), "list", False))
    return items


# ---------------------------------------------------------------- files and their parts
def plain(voxels=VOXELS, affine=AFFINE, kind=nib.Nifti1Image):
    """Return the bytes of a .nii file."""
    return kind(voxels, affine, dtype=voxels.dtype).to_bytes()


def patched(*edits, data=None):
    """Return a .nii file's bytes, those of the plain one by default, with edits of its header.

    edits: (byte, struct format, *values).
    """
    data = bytearray(data or plain())
    for byte, form, *values in edits:
        struct.pack_into(form, data, byte, *values)
    return bytes(data)


def sides(*lengths):
    """Return an edit: the number of axes, and the voxels along each."""
    return (DIM, f"<{len(lengths) + 1}h", len(lengths), *lengths)


def voxel_type(code):
    return (TYPE, "<h", code)


def offset(byte):
    """Return an edit: where the voxels begin."""
    return (OFFSET, "<f", byte)


def slope(factor):
    return (SLOPE, "<f", factor)


def scaling(factor, shift):
    """Return an edit: values are factor * stored + shift."""
    return (SLOPE, "<ff", factor, shift)


def units(code):
    return (UNITS, "<B", code)


def magic(letters):
    return (MAGIC, "4s", letters)


def qfac(sign):
    """Return an edit: the handedness of the qform, 1 or -1."""
    return (PIXDIM, "<f", sign)


def first_spacing(mm):
    return (PIXDIM + 4, "<f", mm)


def forms(qform_code, sform_code):
    """Return an edit: the codes of both affines, 0 for one that is not given."""
    return (QCODE, "<hh", qform_code, sform_code)


def quaternion(b, c, d):
    return (QUATERN, "<3f", b, c, d)


def sform(*values):
    """Return an edit: the first elements of the sform's matrix, row by row."""
    return (SROW, f"<{len(values)}f", *values)


def sform_shift(mm):
    """Return an edit: where the first voxel lies along the first axis."""
    return (SROW + 12, "<f", mm)


def pair_header():
    """Return the .hdr file of a plain volume whose voxels are in an .img file."""
    return patched(magic(b"ni1\0"), offset(0))[:HEADER_BYTES]


def pair_voxels():
    """Return the .img file to it."""
    return plain()[VOXELS_BEGIN:]


def bomb(start, zeros):
    """Return a gzip stream of `start` and about `zeros` bytes of 0, made in little memory."""
    stream = zlib.compressobj(1, zlib.DEFLATED, wbits=31)    # 31: as gzip has it
    pieces = [stream.compress(start)]
    for _ in range(0, zeros, MIB):
        pieces.append(stream.compress(bytes(MIB)))
    pieces.append(stream.flush())
    return b"".join(pieces)


def scaled(factor):
    """Return AFFINE in another unit than mm."""
    return np.diag([factor, factor, factor, 1]) @ AFFINE


# ---------------------------------------------------------------- bad images
def bad_images():
    """Return {name: bytes} of all images that must be refused."""
    return {
        **other_formats(), **damaged_files(), **bad_headers(), **bad_sides(), **bombs(),
        **bad_types(), **bad_scaling(), **bad_offsets(), **bad_voxels(), **bad_affines(),
        **bad_pairs(),
    }


def other_formats():
    """Return files of another kind under a NIfTI file's name."""
    return {
        "empty.nii": b"",
        "empty.nii.gz": b"",
        "only_gzip_magic.nii.gz": b"\x1f\x8b",
        "noise.nii": os.urandom(5000),
        "noise.nii.gz": gzip.compress(os.urandom(5000)),
        "text.nii.gz": b"this is no volume\n" * 50,
        "html.nii.gz": b"<!DOCTYPE html><html>404 not found</html>" * 30,
        "zip.nii": b"PK\x03\x04" + bytes(2000),
        "dicom.nii": bytes(128) + b"DICM" + bytes(600),
        "nrrd.nii": b"NRRD0005\ntype: short\n" + bytes(600),
        "mgz.nii.gz": gzip.compress(struct.pack(">iiii", 1, 12, 10, 8) + bytes(600)),
        # macOS leaves such a companion beside a file on a foreign disk
        "appledouble.nii.gz": b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(150),
    }


def damaged_files():
    """Return files that a broken copy left: cut, with another check sum, with a tail."""
    good = plain()
    packed = gzip.compress(good, mtime=0)
    # the last 8 bytes of a gzip stream are the CRC-32 and the length of its content
    wrong_crc = bytes([packed[-8] ^ 1])
    return {
        "header_cut.nii": good[:200],
        "voxels_cut.nii": good[:-1],
        "half.nii": good[:len(good) // 2],
        "cut.nii.gz": packed[:-9],
        "half.nii.gz": packed[:len(packed) // 2],
        "no_header_left.nii.gz": packed[:30],
        "crc.nii.gz": packed[:-8] + wrong_crc + packed[-7:],
        "tail.nii.gz": packed + b"tail that is no gzip",
        "member_more.nii.gz": packed + gzip.compress(bytes(2 * MIB)),
        "two_volumes.nii.gz": packed + packed,
        "two_volumes.nii": good + good,
        "trailing.nii": good + bytes(2 * MIB),
    }


def bad_headers():
    """Return headers of another format, or of none."""
    return {
        "magic.nii": patched(magic(b"nope")),
        "analyze.nii": patched(magic(bytes(4))),
        "pair_magic.nii": patched(magic(b"ni1\0")),
        "sizeof_hdr.nii": patched((0, "<i", 349)),
    }


def bad_sides():
    """Return files that claim no voxels, more than they have, or other than three axes."""
    vector = np.zeros((6, 5, 4, 1, 3), np.float32)
    return {
        "zero_side.nii": patched(sides(12, 0, 8)),
        "negative_side.nii": patched(sides(12, -10, 8)),
        "no_sides.nii": patched((DIM, "<h", 0)),
        "ndim_9.nii": patched((DIM, "<h", 9)),
        "2d.nii": patched(sides(12, 80)),
        "5d.nii": patched(sides(12, 10, 2, 2, 2)),
        "5d_vector.nii": plain(vector),
        "frames.nii": patched(sides(12, 10, 4, 2)),
        "frames_first.nii": patched(sides(1, 12, 10, 8)),
        "long_side.nii": patched(sides(32767, 1, 1)),
        # the sides in the other byte order than the rest
        "swapped_dims.nii": patched((DIM, ">4h", 3, 12, 10, 8)),
    }


def bombs():
    """Return small files that claim, or unpack to, gigabytes."""
    two_gb = patched(sides(1000, 1000, 1000))
    large = patched(sides(800, 800, 400))[:VOXELS_BEGIN]
    late = patched(offset(2 ** 28))[:VOXELS_BEGIN]
    return {
        "header_bomb.nii": two_gb,
        "header_bomb.nii.gz": gzip.compress(two_gb),
        "voxel_bomb.nii.gz": gzip.compress(patched(sides(2000, 2000, 200)), 1),
        "gzip_bomb.nii.gz": bomb(plain(), 2 ** 30),
        "zeros_bomb.nii.gz": bomb(large, 2 * 800 * 800 * 400),
        "offset_bomb.nii.gz": bomb(late, 2 ** 28 + VOXELS.nbytes),
        # voxels so large, or so small, that resampling would be the bomb
        "spacing_bomb.nii": plain(affine=np.diag([1000.0, 1000, 1000, 1])),
        "spacing_tiny.nii": plain(affine=np.diag([1e-6, 1e-6, 1e-6, 1])),
    }


def bad_types():
    """Return voxels that are no real numbers, or of a type that the file has no room for."""
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    return {
        "rgb.nii": plain(rgb),
        "complex.nii": plain(VOXELS.astype(np.complex64)),
        "type_0.nii": patched(voxel_type(NO_TYPE)),
        "type_999.nii": patched(voxel_type(UNKNOWN_TYPE)),
        "binary.nii": patched(voxel_type(BINARY)),
        "wider_type.nii": patched(voxel_type(FLOAT64)),
    }


def bad_scaling():
    """Return slopes and intercepts that make no finite value."""
    return {
        "slope_inf.nii": patched(slope(INF)),
        "slope_minus_inf.nii": patched(slope(-INF)),
        "inter_inf.nii": patched(scaling(1, INF)),
        "inter_nan.nii": patched(scaling(1, NAN)),
        "slope_huge.nii": patched(scaling(1e30, 0)),
    }


def bad_offsets():
    """Return voxels that begin in the header, between bytes, beyond the file, or nowhere."""
    return {
        "offset_nan.nii": patched(offset(NAN)),
        "offset_negative.nii": patched(offset(-16)),
        "offset_low.nii": patched(offset(16)),
        "offset_half.nii": patched(offset(352.5)),
        "offset_far.nii": patched(offset(1e9)),
        "offset_inf.nii.gz": gzip.compress(patched(offset(INF))),
        # 16 bytes of an extension are claimed, so the last voxels are missing
        "extended_cut.nii": patched(offset(368)),
    }


def bad_voxels():
    """Return values that are not finite, all alike, or those of air alone."""
    with_nan = VOXELS.astype(np.float32)
    with_nan[3, 4, 5] = NAN
    with_infinity = VOXELS.astype(np.float64)
    with_infinity[3, 4, 5] = INF
    return {
        "nan_voxel.nii": plain(with_nan),
        "inf_voxel.nii.gz": gzip.compress(plain(with_infinity)),
        "constant.nii.gz": gzip.compress(plain(np.full(SHAPE, 7, np.int16))),
        "all_air.nii": plain(VOXELS // 100 - 1000),
    }


def bad_affines():
    """Return affines that are not finite, not invertible, or of no rotation; absurd units."""
    flat = [1, 0, 0, 0] * 2
    return {
        "sform_nan.nii": patched(sform(NAN)),
        "sform_inf.nii": patched(sform_shift(INF)),
        "sform_zero.nii": patched(sform(*[0] * 12)),
        "sform_singular.nii": patched(sform(*flat)),
        "sform_far.nii": patched(sform_shift(1e20)),
        "qform_bad.nii": patched(forms(1, 0), quaternion(3, 3, 3)),
        "qform_nan.nii": patched(forms(1, 0), quaternion(NAN, 0, 0)),
        "qform_negative.nii": patched(forms(1, 0), first_spacing(-1.5)),
        "quaternion_no_rotation.nii": patched(forms(1, 0), quaternion(0.9, 0.9, 0)),
        "no_form_zero.nii": patched(forms(0, 0), first_spacing(0)),
        "no_form_negative.nii": patched(forms(0, 0), first_spacing(-1.5)),
        # the header says metres, and its voxels would be metres wide
        "metres_absurd.nii": patched(units(METRE)),
        # the header says mm, and its voxels would be micrometres wide
        "metres.nii": plain(affine=AFFINE / 1000),
    }


def bad_pairs():
    """Return headers whose .img file is absent, short, packed, or has a name of another case."""
    return {
        "lonely.hdr": plain()[:HEADER_BYTES],
        "short.hdr": pair_header(),
        "short.img": pair_voxels()[:-2],
        "mixed.hdr": pair_header(),
        "mixed.img.gz": gzip.compress(pair_voxels()),
        "other_case.hdr": pair_header(),
        "other_case.IMG": pair_voxels(),
    }


# ---------------------------------------------------------------- good images
def good_images():
    """Return {name: bytes} of all images that hold VOXELS."""
    return {
        **containers(), **voxel_types(), **good_headers(), **good_affines(), **good_pairs(),
    }


def containers():
    """Return one file packed and not, under either name, in pieces, with zeros behind it."""
    good = plain()
    packed = gzip.compress(good)
    return {
        "plain.nii": good,
        "plain.nii.gz": good,
        "packed.nii": packed,
        "packed.nii.gz": packed,
        "UPPER.NII": good,
        "with space é 肝臓.nii.gz": packed,
        "two_members.nii.gz": gzip.compress(good[:999]) + gzip.compress(good[999:]),
        "padded.nii.gz": gzip.compress(good + bytes(512)),
        "zero_padded.nii.gz": packed + bytes(512),
        "nifti2.nii.gz": gzip.compress(plain(kind=nib.Nifti2Image)),
    }


def voxel_types():
    """Return the same values in other types, byte orders and scalings."""
    swapped = nib.Nifti1Header(endianness=">")
    swapped.set_data_dtype(np.int16)
    big_endian = nib.Nifti1Image(VOXELS, AFFINE, swapped)
    halved = plain(((VOXELS + 1000) // 2).astype(np.uint16))
    raised = VOXELS + 1000       # no value is below 0
    return {
        "float32.nii": plain(VOXELS.astype(np.float32)),
        "float64.nii": plain(VOXELS.astype(np.float64)),
        "int32.nii": plain(VOXELS.astype(np.int32)),
        "int64.nii": patched(scaling(1, 0), data=plain(VOXELS.astype(np.int64))),
        "uint32.nii": patched(scaling(1, -1000), data=plain(raised.astype(np.uint32))),
        "uint64.nii": patched(scaling(1, -1000), data=plain(raised.astype(np.uint64))),
        "big_endian.nii": big_endian.to_bytes(),
        "slope.nii": patched(scaling(2, -1000), data=halved),
        # a slope of 0 or NaN means that values are stored as they are
        "slope_0.nii": patched(scaling(0, 5)),
        "slope_nan.nii": patched(scaling(NAN, 5)),
    }


def good_headers():
    """Return headers with more axes of length 1, an extension, an intent, or no offset."""
    good = plain()
    extension = struct.pack("<iii8x", 1, 16, 6)      # 16 bytes of kind 6, a comment
    extended = good[:HEADER_BYTES] + extension + good[VOXELS_BEGIN:]
    return {
        "one_frame.nii": plain(VOXELS[..., None]),
        "singletons.nii": plain(VOXELS[..., None, None]),
        "extended.nii": patched(offset(368), data=extended),
        "offset_0.nii": patched(offset(0)),
        "intent.nii": patched((INTENT, "<h", 1001)),
    }


def good_affines():
    """Return headers that lack or contradict what the sform tells, and other units than mm."""
    other_qform = (QUATERN, "<6f", 0.5, 0.5, 0, 7, 7, 7)
    return {
        "pixdim_0.nii": patched(first_spacing(0)),
        "negative_pixdim.nii": patched((PIXDIM, "<4f", -1, -1.5, -2, -2.5)),
        "forms_differ.nii": patched((QCODE, "<h", 1), other_qform),
        "metres.nii": patched(units(METRE), data=plain(affine=scaled(0.001))),
        "microns.nii": patched(units(MICRON), data=plain(affine=scaled(1000))),
    }


def good_pairs():
    """Return headers with their .img file, packed or not."""
    return {
        "pair.hdr": pair_header(),
        "pair.img": pair_voxels(),
        "UPPER_PAIR.HDR": pair_header(),
        "UPPER_PAIR.IMG": pair_voxels(),
        "packed_img.hdr": pair_header(),
        "packed_img.img": gzip.compress(pair_voxels()),
        "packed_pair.hdr.gz": gzip.compress(pair_header()),
        "packed_pair.img.gz": gzip.compress(pair_voxels()),
    }


def other_images():
    """Return {name: bytes} of valid images with other voxels or another orientation."""
    turn = np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    mirror = np.diag([1, -1, 1, 1])
    shear = np.array([[1, 0, 0, 0], [0, 1, 0.4, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    permuted = np.ascontiguousarray(VOXELS.transpose(2, 0, 1))
    return {
        "oblique.nii": plain(affine=turn @ AFFINE),
        "mirrored.nii": plain(affine=mirror @ AFFINE),
        "rotated.nii": plain(permuted, AFFINE[:, [2, 0, 1, 3]]),
        "sheared.nii": plain(affine=AFFINE @ shear),
        "thick.nii": plain(affine=np.diag([0.5, 0.5, 10, 1])),
        "anisotropic.nii": plain(affine=np.diag([0.3, 0.3, 45, 1])),
        "tiny.nii": plain(VOXELS[:2, :1, :1]),
        "one_slice.nii": plain(VOXELS[:, :, :1]),
        "uint8.nii": plain(np.abs(VOXELS // 8).astype(np.uint8)),
        "no_form.nii": patched(forms(0, 0)),
        "qfac_0.nii": patched(forms(1, 0), qfac(0)),
        "qfac_2.nii": patched(forms(1, 0), qfac(2)),
        # a unit quaternion that float32 has rounded to a length above 1
        "qform_rounded.nii": patched(forms(1, 0), quaternion(0, 0, 1.0000005)),
    }


# ---------------------------------------------------------------- labels
def good_labels():
    """Return {name: bytes} of labels to an image on AFFINE and SHAPE: they hold LABEL, or 0."""
    return {
        "label_uint8.nii.gz": gzip.compress(plain(LABEL)),
        "label_float.nii": plain(LABEL.astype(np.float64)),
        "label_int64.nii": plain(LABEL.astype(np.int64)),
        "label_hair_off.nii": plain(LABEL * np.float32(1.0000001)),
        "label_scaled.nii": patched(scaling(3 / 255, 0), data=plain(LABEL * np.uint8(85))),
        "label_empty.nii": plain(LABEL * np.uint8(0)),
    }


def bad_labels():
    """Return {name: bytes} of labels with other values than the classes 0 to 13."""
    with_nan = np.where(LABEL > 0, NAN, 0).astype(np.float32)
    return {
        "label_near.nii": plain(LABEL * np.float32(1.01)),
        "label_half.nii": plain(LABEL * np.float32(0.5)),
        "label_14.nii": plain(LABEL * np.uint8(5)),
        "label_large.nii": plain(LABEL.astype(np.int16) * 100),
        "label_huge.nii": plain(LABEL * np.int64(2 ** 40)),
        "label_negative.nii": plain(-LABEL.astype(np.int16)),
        "label_nan.nii": plain(with_nan),
    }


# ---------------------------------------------------------------- lists
IMAGE = "good/plain.nii"         # a list's folder is the one above
LABELLED = "good/float32.nii"    # stands for a label, and for a second image


def training(*entries):
    """Return the text of a dataset.json with these cases."""
    return json.dumps({"training": list(entries)})


def good_lists():
    """Return {name: text} of lists that can be read."""
    return {
        "entry.json": training({"image": IMAGE}),
        "string.json": training(IMAGE),
        "BOM.JSON": "\ufeff" + training(IMAGE),
        # the user names this file; that it is no NIfTI file is said later
        "absolute.json": training("/etc/passwd"),
        "list.txt": f"# comment\n\n{IMAGE}\n",
        "tab.txt": f"{IMAGE}\t{LABELLED}\n",
        "bom.csv": f"\ufeff{IMAGE},{LABELLED}\r\n",
    }


def bad_lists():
    """Return {name: text or bytes} of lists that must be refused."""
    return {**bad_json(), **bad_entries(), **bad_columns()}


def bad_json():
    """Return files that are no JSON, deeper than Python's stack, or without cases."""
    return {
        "brace.json": '{"training": [',
        "array.json": "[1, 2]",
        "no_key.json": json.dumps({"test": [IMAGE]}),
        "none.json": training(),
        "key_twice.json": f'{{"training": ["{IMAGE}"], "training": ["{LABELLED}"]}}',
        "deep.json": "[" * 10 ** 5,
        "deep_entry.json": '{"training": ' + "[" * 10 ** 5,
        "digits.json": '{"training": [' + "9" * 10 ** 5,
        "infinite.json": '{"training": [1e999]}',
        "two_channels.json": json.dumps({"channel_names": {"0": "T1", "1": "T2"}}),
    }


def bad_entries():
    """Return cases that are no path, that leave the list's folder, or that come twice."""
    return {
        "number.json": training(5),
        "null.json": training({"image": None}),
        "no_image.json": training({"label": IMAGE}),
        "channels.json": training({"image": [IMAGE, IMAGE]}),
        "nul.json": training("a\0b.nii"),
        "newline.json": training("good/a\nb.nii"),
        "surrogate.json": '{"training": ["\\ud800.nii"]}',
        "leaves.json": training("../outside.nii"),
        "leaves_within.json": training("good/../../outside.nii"),
        "label_leaves.json": training({"image": IMAGE, "label": "../label.nii"}),
        "twice.json": training(IMAGE, {"image": f"good/../{IMAGE}"}),
    }


def bad_columns():
    """Return text that is not UTF-8, without cases, with too many columns, or with a case twice."""
    return {
        "utf16.txt": f"{IMAGE}\n".encode("utf-16"),
        "latin1.txt": "né.nii\n".encode("latin-1"),
        "comments.txt": "# nothing\n",
        "nul.txt": "a\0b",
        "columns.txt": f"{IMAGE}\t{LABELLED}\tgood/float64.nii\n",
        "twice.txt": f"{IMAGE}\n{IMAGE}\n",
    }


if __name__ == "__main__":
    items = build(sys.argv[1])
    refused = [item for item in items if not item.good]
    print(f"{len(items)} files, {len(refused)} of them to be refused")
