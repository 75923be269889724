"""NIfTI files, none of which is trusted. [SMIT 3]

The only room that opens NIfTI files, so the boundary where no file is trusted: a header is held against its
file's size before memory is taken, gzip is read to its end so that its CRC counts, and what is bad leaves as BadVolume.
"""
import gzip
import os
import re
import stat
import zlib
from collections import namedtuple

import nibabel as nib
import numpy as np
import torch

from smit.runtime.files import atomic_write
from smit.transforms import MAX_SIDE, MAX_VOXELS, spacing_of

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz")
MAX_TAIL = 2 ** 20                     # bytes that may follow the voxels: some writers pad
DEFLATE_RATIO = 1032                   # no gzip stream holds more than this many times its size
MAX_OFFSET = 2 ** 26                   # bytes before them: extensions
CHUNK = 2 ** 16                        # voxels converted at a time
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
Header = namedtuple("Header", "path body shape affine dtype slope inter offset nifti")  # body: the file with the voxels


def open_unpacked(path):
    """Open to read bytes, unpacked if it is gzip. OSError unless it is a file: opening a pipe waits for its writer."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(0, "is a folder, pipe or device, no file")
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else open(path, "rb")


class BadVolume(ValueError):
    """A file that cannot be used: "path: what is wrong; what to do"."""


def pair(path):
    """The file with the header and the one with the voxels: the same, but for .hdr/.img and .HDR/.IMG."""
    head = body = str(path)
    for hdr, img in (("hdr", "img"), ("HDR", "IMG")):
        head = re.sub(rf"\.{img}(?=(\.gz|\.GZ)?$)", f".{hdr}", head)
        body = re.sub(rf"\.{hdr}(?=(\.gz|\.GZ)?$)", f".{img}", body)
    return head, body


def _header(path):
    """Header of a NIfTI file, held against the file's size, or BadVolume. Takes no memory, whatever it claims."""
    def need(condition, wrong):
        if not condition:
            raise BadVolume(f"{path}: {wrong}")
    head, body = pair(path)
    try:
        with open_unpacked(head) as file, open_unpacked(body) as voxels:
            block = file.read(nib.Nifti2Header.sizeof_hdr)
            size, packed = os.path.getsize(body), isinstance(voxels, gzip.GzipFile)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise BadVolume(f"{path}: {getattr(error, 'strerror', 0) or error}; check it, its links, or its .img") from None
    sizes = [int.from_bytes(block[:4], order) for order in ("little", "big")]
    kind = nib.Nifti2Header if 540 in sizes else nib.Nifti1Header
    need({348, 540} & set(sizes) and len(block) >= kind.sizeof_hdr, "not a NIfTI file; convert it")
    order = "<" if sizes[0] == kind.sizeof_hdr else ">"
    nifti = kind(block[:kind.sizeof_hdr], order, check=False)        # nibabel's own check would repair silently
    need(nifti["magic"] == (kind.single_magic if head == body else kind.pair_magic), "no NIfTI magic; convert it")
    ndim, *sides = (int(n) for n in nifti["dim"])
    shape, code = tuple(sides[:3]), int(nifti["datatype"])
    need(3 <= ndim <= 7 and {1} >= {*sides[3:ndim]}, f"{ndim}-D, sides {sides[:ndim]}; give one 3-D volume (one frame)")
    need(min(shape) > 0 and max(shape) <= MAX_SIDE and np.prod(shape, dtype=float) <= MAX_VOXELS,
         f"sides {shape} are not 1..{MAX_SIDE} and {MAX_VOXELS} voxels at most; crop it or repair the header")
    need(code in TYPES, f"voxel type {code} is not one real number a voxel (RGB, complex, ...); convert it")
    slope, inter, offset = (np.float64(nifti[name]) for name in ("scl_slope", "scl_inter", "vox_offset"))
    if slope == 0 or np.isnan(slope):                                # NIfTI's ways to say: not scaled
        slope, inter = np.float64(1), np.float64(0)
    need(np.isfinite([slope, inter]).all(), f"voxel scaling {slope}, {inter} is not finite; repair the header")
    least, dtype = kind.single_vox_offset if head == body else 0, np.dtype(order + TYPES[code])
    offset = offset or np.float64(least)
    need(least <= offset <= MAX_OFFSET and offset.is_integer(), f"voxels begin at byte {offset}; repair the header")
    claimed = int(offset) + int(np.prod(shape)) * dtype.itemsize
    need(claimed <= size * (DEFLATE_RATIO if packed else 1) and (packed or size <= claimed + MAX_TAIL),
         f"{size} bytes cannot be the {claimed} that its header claims: truncated or forged; copy it again")
    nifti["pixdim"][0] = nifti["pixdim"][0] or 1                     # the standard's: a qfac of 0 is taken as 1
    try:
        with np.errstate(all="ignore"):
            affine = nifti.get_best_affine().astype(np.float64)
            spacing = spacing_of(affine)
            skew = abs(np.linalg.det(affine[:3, :3] / spacing))
    except (ValueError, nib.spatialimages.HeaderDataError) as error:
        raise BadVolume(f"{path}: orientation: {error}; repair sform or qform") from None
    need(np.abs(affine).max() < 1e5 and skew > .1 and (nifti["sform_code"] or nifti["pixdim"][1:4].min() > 0),
         "affine is singular, not finite or far off; repair sform, qform or pixdim")
    field = spacing * shape
    need(.01 <= spacing.min() and spacing.max() <= 50 and field.max() <= 5e3 and field.prod() <= 2e9,
         f"spacing {spacing} mm, or the field of view {field} mm, is absurd; repair the header")
    return Header(path, body, shape, affine, dtype, slope, inter, int(offset), nifti)


def _voxels(header):
    """Yield (first index, scaled float64 values) piece by piece in file order; verifies length, gzip CRC, magnitude."""
    done, count, size = 0, int(np.prod(header.shape)), header.dtype.itemsize
    try:
        with open_unpacked(header.body) as file:
            file.seek(header.offset)
            while done < count:
                raw = file.read(min(CHUNK, count - done) * size)
                with np.errstate(all="ignore"):                      # what overflows is refused below
                    values = np.frombuffer(raw, header.dtype, len(raw) // size) * header.slope + header.inter
                if not len(values):
                    raise EOFError(f"ends after {done} of {count} voxels")
                if not (np.abs(values) < 1e30).all():                # more would overflow in float32 arithmetic
                    raise BadVolume(f"{header.path}: has voxels that are NaN, infinite or huge; leave it out")
                yield done, values
                done += len(values)
            if len(file.read(MAX_TAIL + 1)) > MAX_TAIL:              # to the end: only there is the CRC verified
                raise EOFError("goes on far beyond its last voxel")
    except (OSError, EOFError, zlib.error) as error:
        raise BadVolume(f"{header.path}: damaged ({error}); copy it again") from None


def read_volume(path):
    """Image as (float32 (X, Y, Z) in file order, affine float64). BadVolume if damaged, not finite or constant."""
    header = _header(path)
    volume, first, varies = np.empty(int(np.prod(header.shape)), np.float32), None, False
    for start, values in _voxels(header):
        first = values[0] if start == 0 else first
        if not varies and (values != first).any():                   # until then a bomb of zeros touches no memory
            varies, volume[:start] = True, first
        if varies:
            volume[start:start + len(values)] = values
    if not varies:
        raise BadVolume(f"{path}: all voxels are equal; leave it out")
    return torch.from_numpy(volume.reshape(header.shape, order="F")), header.affine


def read_label(path, num_classes=None, allow_empty=False):
    """Label as (uint8 (X, Y, Z), affine). BadVolume if damaged, empty, or not whole numbers in 0..num_classes - 1."""
    header, highest = _header(path), (num_classes or 256) - 1
    label = np.empty(int(np.prod(header.shape)), np.uint8)
    for start, values in _voxels(header):
        whole = values.round()                                       # what is scaled may be a hair off
        wrong = values[(np.abs(values - whole) > 1e-4) | (whole < 0) | (whole > highest)]
        if len(wrong):
            raise BadVolume(f"{path}: label value {wrong[0]} is not a whole number in 0..{highest}; repair the label")
        label[start:start + len(values)] = whole
    if not allow_empty and not label.any():
        raise BadVolume(f"{path}: the label is empty, all background; leave the case out")
    return torch.from_numpy(label.reshape(header.shape, order="F")), header.affine


def write_label(path, label, like):
    """Write a label (X, Y, Z) on the grid of the NIfTI file `like`: uint8 .nii.gz with its shape, qform and sform."""
    nifti = _header(like).nifti.copy()
    nifti.set_data_dtype(np.uint8)
    nifti["cal_min"] = nifti["cal_max"] = nifti["vox_offset"] = 0     # the image's, not the label's
    kind = nib.Nifti2Image if isinstance(nifti, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(np.asarray(label, np.uint8).reshape(nifti.get_data_shape()), None, nifti)
    atomic_write(path, gzip.compress(image.to_bytes(), 6, mtime=0))
