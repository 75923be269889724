"""Read and write NIfTI files, none of which is trusted. [SMIT 3]

No other module reads them. A header is held against its file's size before memory is taken. Gzip is
read to its end, so that its CRC counts. A bad file leaves as BadVolume.

Reading order: names, the header and its checks, voxels, what others call.
"""
import gzip
import os
import re
import stat
import zlib
from collections import namedtuple
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from smit.data.concerns import Concern
from smit.runtime.files import atomic_write
from smit.transforms import MAX_SIDE, most_voxels, spacing_of

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz")
MAX_TAIL = 2 ** 20                     # zeros that may follow the voxels: some writers pad
DEFLATE_RATIO = 1032                   # no gzip stream holds more than this many times its size
MAX_OFFSET = 2 ** 26                   # bytes before the voxels: extensions
MAX_VALUE = 1e30                       # larger ones would overflow in float32 arithmetic
CHUNK = 2 ** 16                        # voxels converted at a time
MIN_MM, MAX_MM = .01, 50               # voxel sizes that are believed
MAX_FIELD_MM, MAX_FIELD_MM3 = 5e3, 2e9  # and fields of view: no patient is longer than 5 m
QUATERNION_EXCESS = 1e-4               # of a squared length over 1 that is rounding
SKEW_DEGREES = 1                       # a larger shear is told
SPACING_SHARE = .01                    # by which pixdim may differ from the affine's spacing
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
         256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
FORMATS = (                            # what it is; what to do, where its magic stands, the magic
    ("DICOM; convert it with dcm2niix", 128, b"DICM"),
    ("DICOM; convert it with dcm2niix", 0, b"\x08\x00\x05\x00"),      # without its preamble
    ("MetaImage (.mha, .mhd); convert it with SimpleITK", 0, b"ObjectType"),
    ("MetaImage (.mha, .mhd); convert it with SimpleITK", 0, b"NDims"),
    ("NRRD; convert it with SimpleITK", 0, b"NRRD000"),
    ("FreeSurfer's MGH or MGZ; convert it with mri_convert", 0, b"\x00\x00\x00\x01\x00\x00"),
    ("HDF5 or MINC; convert it with mnc2nii", 0, b"\x89HDF"),
    ("MINC; convert it with mnc2nii", 0, b"CDF\x01"),
    ("a numpy array; convert it with nibabel", 0, b"\x93NUMPY"),
    ("packed twice; unpack it once with gunzip", 0, b"\x1f\x8b"),
    ("a zip archive; unpack it", 0, b"PK\x03\x04"),
    ("a tar archive; unpack it", 257, b"ustar"),
    ("a 7z archive; unpack it", 0, b"7z\xbc\xaf\x27\x1c"),
    ("packed by xz; unpack it with unxz", 0, b"\xfd7zXZ\x00"),
    ("packed by bzip2; unpack it with bunzip2", 0, b"BZh"),
    ("packed by zstd; unpack it with unzstd", 0, b"\x28\xb5\x2f\xfd"),
    ("a Git LFS pointer, not the file; run git lfs pull", 0, b"version https://git-lfs"),
    ("a git-annex pointer, not the file; run git annex get", 0, b"/annex/objects/"),
    ("a web page, not the file; download it again", 0, b"<!DOCTYPE"),
    ("a web page, not the file; download it again", 0, b"<!doctype"),
    ("a web page, not the file; download it again", 0, b"<html"),
    ("a web page, not the file; download it again", 0, b"<HTML"),
    ("a server's answer in XML, not the file; download it again", 0, b"<?xml"),
    ("macOS's companion of a file (._NAME), not the file; leave it out", 0, b"\x00\x05\x16\x07"),
)

# body: the file with the voxels; offset: of the first of them, in bytes; nifti: the raw header
Header = namedtuple("Header", "path body shape affine dtype slope inter offset nifti concerns")


class BadVolume(ValueError):
    """A file that cannot be used: "path: what is wrong; what to do"."""


# -------------------------------------------------------------------------------------------- names
def is_volume(path):
    """Return whether a name is that of a NIfTI file with a header."""
    return str(path).lower().endswith(SUFFIXES)


def stem(path):
    """Return a file's name without NIfTI's suffixes: a/img0001.nii.gz -> img0001."""
    return re.sub(r"(\.nii|\.hdr|\.img)?(\.gz)?$", "", Path(path).name, flags=re.I)


def pair(path):
    """Return the paths of header and voxels. They differ only for .hdr/.img and .HDR/.IMG pairs."""
    head = body = str(path)
    for hdr, img in (("hdr", "img"), ("HDR", "IMG")):
        head = re.sub(rf"\.{img}(?=(\.gz|\.GZ)?$)", f".{hdr}", head)
        body = re.sub(rf"\.{hdr}(?=(\.gz|\.GZ)?$)", f".{img}", body)
    return head, body


def open_unpacked(path):
    """Open a file to read bytes, unpacked if it is gzip. OSError unless it is a regular file.

    Opening a pipe would wait for its writer.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(0, "is a folder, pipe or device, no file")
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else open(path, "rb")


def name_format(path):
    """Return "what a file is; what to do" if that is known and is not NIfTI; else None."""
    try:
        with open_unpacked(path) as file:
            block = file.read(512)
    except (OSError, EOFError, zlib.error, ValueError):
        return None
    for name, offset, magic in FORMATS:
        if block[offset:].startswith(magic):
            return name
    return None


# ------------------------------------------------------------------------------------------- header
def read_header(path):
    """Read a NIfTI file's header and hold it against the file's size: a Header.

    Allocates nothing, however large a volume the header declares. BadVolume if it is not sound.
    """
    head, body = pair(path)
    block, size, packed = read_header_block(path, head, body)
    nifti = parse_header(path, block, single=head == body)
    shape = check_shape(path, nifti)
    dtype = check_type(path, nifti)
    slope, inter = check_scaling(path, nifti)
    offset = check_offset(path, nifti, single=head == body)
    check_length(path, offset + int(np.prod(shape)) * dtype.itemsize, size, packed)
    affine = read_affine(path, nifti)
    check_field_of_view(path, shape, affine, nifti)
    found = geometry_concerns(path, shape, affine, nifti)
    return Header(path, body, shape, affine, dtype, slope, inter, offset, nifti, found)


def read_header_block(path, head, body):
    """Read the header's bytes: (bytes, size of the file with the voxels, whether that is gzip).

    BadVolume for what is not there, not readable, or no file: links to nowhere, pipes, folders.
    """
    try:
        with open_unpacked(head) as file:
            block = file.read(nib.Nifti2Header.sizeof_hdr)
            packed = isinstance(file, gzip.GzipFile)
        if body != head:
            with open_unpacked(body) as voxels:
                packed = isinstance(voxels, gzip.GzipFile)
        return block, os.path.getsize(body), packed
    except (OSError, EOFError, zlib.error, ValueError) as error:
        leads_nowhere = os.path.islink(head) and not os.path.exists(head)
        if leads_nowhere and "/annex/objects/" in os.readlink(head):
            raise BadVolume(f"{path}: is a git-annex link, and its content is not here; run git "
                            "annex get") from None
        reason = getattr(error, "strerror", None) or error
        raise BadVolume(f"{path}: {reason}; check it, its links, or its .img") from None


def parse_header(path, block, single):
    """Parse the bytes of a header as NIfTI-1 or NIfTI-2 of either byte order.

    BadVolume for any other file. nibabel's own check is off, for it would repair silently.
    """
    little, big = (int.from_bytes(block[:4], order) for order in ("little", "big"))
    if not block:
        raise BadVolume(f"{path}: is empty, 0 bytes; copy it again")
    kind = nib.Nifti2Header if 540 in (little, big) else nib.Nifti1Header
    if kind.sizeof_hdr not in (little, big) or len(block) < kind.sizeof_hdr:
        known = name_format(path)
        raise BadVolume(f"{path}: {f'is {known}' if known else 'not a NIfTI file; convert it'}")
    order = "<" if little == kind.sizeof_hdr else ">"
    nifti = kind(block[:kind.sizeof_hdr], order, check=False)
    if nifti["magic"] != (kind.single_magic if single else kind.pair_magic):
        raise BadVolume(f"{path}: no NIfTI magic; convert it")
    return nifti


def check_shape(path, nifti):
    """Return the first three sides; further ones, frames or channels, must be 1.

    BadVolume for others, and for sides over MAX_SIDE or more voxels than SMIT_MAX_VOXELS.
    """
    ndim, *sides = (int(n) for n in nifti["dim"])
    if not 3 <= ndim <= 7 or any(side != 1 for side in sides[3:ndim]):
        raise BadVolume(f"{path}: {ndim}-D, sides {sides[:ndim]}; give one 3-D volume, one frame "
                        "or channel a file")
    shape = tuple(sides[:3])
    voxels = np.prod(shape, dtype=float)
    if min(shape) < 1 or max(shape) > MAX_SIDE:
        raise BadVolume(f"{path}: sides {shape} are not 1..{MAX_SIDE}; crop it or repair the "
                        "header")
    if voxels > most_voxels():
        raise BadVolume(f"{path}: sides {shape} are {voxels:.0f} voxels, more than "
                        f"{most_voxels()}; crop it, or allow it with the environment's "
                        f"SMIT_MAX_VOXELS={voxels:.0f}, at about 12 bytes of memory a voxel")
    return shape


def check_type(path, nifti):
    """Return the voxels' numpy dtype. BadVolume for what is not one real number a voxel."""
    code = int(nifti["datatype"])
    if code not in TYPES:
        raise BadVolume(f"{path}: voxel type {code} is not one real number a voxel (RGB, complex, "
                        "...); convert it")
    return np.dtype(nifti.endianness + TYPES[code])


def check_scaling(path, nifti):
    """Return slope and intercept of stored values; BadVolume if one makes all voxels infinite."""
    slope, inter = np.float64(nifti["scl_slope"]), np.float64(nifti["scl_inter"])
    if slope == 0 or np.isnan(slope):                    # NIfTI's ways to say: not scaled
        return np.float64(1), np.float64(0)
    if not np.isfinite([slope, inter]).all():
        raise BadVolume(f"{path}: voxel scaling {slope}, {inter} is not finite; repair the header")
    return slope, inter


def check_offset(path, nifti, single):
    """Return the byte at which voxels begin; BadVolume if in the header, or far behind it."""
    least = nifti.single_vox_offset if single else 0
    offset = np.float64(nifti["vox_offset"]) or np.float64(least)
    if not least <= offset <= MAX_OFFSET or not offset.is_integer():
        raise BadVolume(f"{path}: voxels begin at byte {offset}; repair the header")
    return int(offset)


def check_length(path, claimed, size, packed):
    """Hold the bytes that a header claims against the file's size: BadVolume if cut, or a bomb."""
    most = size * DEFLATE_RATIO if packed else size
    too_long = not packed and size > claimed + MAX_TAIL
    if claimed > most or too_long:
        raise BadVolume(f"{path}: {size} bytes cannot be the {claimed} that its header claims: "
                        "truncated or forged; copy it again")


def read_affine(path, nifti):
    """Return the affine of voxels to mm in RAS+ space.

    BadVolume if it is singular, not finite or far off. Mends `nifti` as NIfTI's own code reads it:
    a qfac below 0 is -1 and any other 1, a quaternion that rounding made too long is shortened.
    """
    nifti["pixdim"][0] = -1 if nifti["pixdim"][0] < 0 else 1
    shorten_quaternion(nifti)
    try:
        with np.errstate(all="ignore"):
            affine = nifti.get_best_affine().astype(np.float64)
            affine[:3] *= unit_mm(nifti)
            skew = abs(np.linalg.det(affine[:3, :3] / spacing_of(affine)))
    except (ValueError, nib.spatialimages.HeaderDataError) as error:
        raise BadVolume(f"{path}: orientation: {error}; repair sform, qform or pixdim") from None
    has_sizes = nifti["sform_code"] or nifti["pixdim"][1:4].min() > 0
    if not (np.abs(affine).max() < 1e5 and skew > .1 and has_sizes):
        raise BadVolume(f"{path}: affine is singular, not finite or far off{units_text(nifti)}; "
                        "repair sform, qform or pixdim")
    return affine


def shorten_quaternion(nifti):
    """Scale a header's (b, c, d) to length 1 where rounding made it longer, as NIfTI's code does.

    Only a hair is rounding: a longer one is left for nibabel to refuse, for it is no rotation.
    """
    fields = [f"quatern_{letter}" for letter in "bcd"]
    b, c, d = (float(nifti[field]) for field in fields)
    square = b * b + c * c + d * d
    if 1 < square < 1 + QUATERNION_EXCESS:
        for field, value in zip(fields, (b, c, d)):
            nifti[field] = value / np.sqrt(square)


def unit_mm(nifti):
    """Return the length in mm of the header's unit of space: metre, mm (the default) or micron."""
    return {1: 1000., 3: .001}.get(int(nifti["xyzt_units"]) & 7, 1.)


def units_text(nifti):
    """Return ", its unit being the metre" if a header names another unit than mm, else ""."""
    name = {1: "metre", 3: "micron"}.get(int(nifti["xyzt_units"]) & 7)
    return f", its unit being the {name} (xyzt_units)" if name else ""


def check_field_of_view(path, shape, affine, nifti):
    """Raise BadVolume for voxel sizes and fields of view that ask for all memory once resampled."""
    spacing = spacing_of(affine)
    field = spacing * shape
    sizes_fit = MIN_MM <= spacing.min() and spacing.max() <= MAX_MM
    if not (sizes_fit and field.max() <= MAX_FIELD_MM and field.prod() <= MAX_FIELD_MM3):
        raise BadVolume(f"{path}: spacing {spacing} mm, or the field of view {field} mm, is absurd"
                        f"{units_text(nifti)}; repair the header")


def geometry_concerns(path, shape, affine, nifti):
    """Return what is odd about a sound header: its orientation, its spacing, skewed axes."""
    found = []
    has_qform, has_sform = int(nifti["qform_code"]) > 0, int(nifti["sform_code"]) > 0
    if not has_qform and not has_sform:
        axes = "".join(nib.aff2axcodes(affine))
        found.append(Concern(path, "left and right are unknown: qform_code and sform_code are 0",
                             f"taken as {axes}", "set the orientation in the header"))
    if has_qform and has_sform:
        found += differing_forms(path, shape, affine, nifti)
    found += doubtful_spacing(path, affine, nifti)
    degrees = skew_degrees(affine)
    if degrees > SKEW_DEGREES:
        found.append(Concern(path, "its axes are not at right angles: gantry tilt?",
                             f"{degrees:.1f} degrees", "use dcm2niix's file of corrected tilt"))
    return tuple(found)


def differing_forms(path, shape, affine, nifti):
    """Return a concern if the qform puts the volume elsewhere than the sform, which is used."""
    try:
        qform = nifti.get_qform() * unit_mm(nifti)
    except (ValueError, nib.spatialimages.HeaderDataError):
        return []                                                    # not used, so not needed
    qform[3, 3] = 1
    shift = (qform - affine)[:3]
    # of the corner that lies farthest apart, along each axis
    apart_voxels = (np.abs(np.linalg.solve(affine[:3, :3], shift)) @ [*shape, 1]).max()
    if not apart_voxels > 1:
        return []
    apart_mm = (np.abs(shift) @ [*shape, 1]).max()
    codes = ["".join(nib.aff2axcodes(form)) for form in (affine, qform)]
    mirrored = np.linalg.det(affine[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
    what = "qform and sform differ"
    if mirrored or codes[0][0] != codes[1][0]:
        what += ", even in left and right"
    detail = f"{codes[0]} by sform, {codes[1]} by qform, {apart_mm:.4g} mm apart"
    return [Concern(path, f"{what}; the sform is used", detail, "make them agree")]


def doubtful_spacing(path, affine, nifti):
    """Return concerns, none or one, about an affine that does not tell the voxels' true size."""
    sizes_mm = np.abs(nifti["pixdim"][1:4].astype(np.float64)) * unit_mm(nifti)
    detail = f"{enumerate_mm(spacing_of(affine))} by the affine, {enumerate_mm(sizes_mm)} by pixdim"
    if np.array_equal(affine, np.eye(4)):
        return [Concern(path, "its affine is the identity: spacing and orientation were probably "
                        "lost", detail, "export it again with the affine of its scan")]

    # a pixdim that is not above 0 tells no size
    differs = np.abs(spacing_of(affine) - sizes_mm) > SPACING_SHARE * sizes_mm
    if not (differs & (sizes_mm > 0)).any():
        return []
    return [Concern(path, "its affine and pixdim differ in the voxels' size; the affine is used",
                    detail, "make them agree")]


def enumerate_mm(sizes_mm):
    """Return sizes in words: 1.5 x 2 x 2.5 mm."""
    return " x ".join(f"{size:.4g}" for size in sizes_mm) + " mm"


def skew_degrees(affine):
    """Return by how many degrees the axes of a grid depart from right angles, at most."""
    axes = affine[:3, :3] / spacing_of(affine)
    cosines = (axes.T @ axes)[np.triu_indices(3, 1)]
    return float(np.degrees(np.arcsin(np.clip(np.abs(cosines).max(), 0, 1))))


# ------------------------------------------------------------------------------------------- voxels
def read_pieces(header):
    """Yield (index of the first voxel, scaled float64 values) piece by piece in file order.

    BadVolume if the file ends early, its gzip CRC fails, or a value is not finite or too large.
    """
    count, size = int(np.prod(header.shape)), header.dtype.itemsize
    done = 0
    try:
        with open_unpacked(header.body) as file:
            file.seek(header.offset)
            while done < count:
                raw = file.read(min(CHUNK, count - done) * size)
                stored = np.frombuffer(raw, header.dtype, len(raw) // size)
                with np.errstate(all="ignore"):          # what overflows is refused below
                    values = stored * header.slope + header.inter
                if not len(values):
                    raise EOFError(f"ends after {done} of {count} voxels")
                if not (np.abs(values) < MAX_VALUE).all():
                    raise BadVolume(f"{header.path}: has voxels that are NaN, infinite or huge; "
                                    "leave it out")
                yield done, values
                done += len(values)

            # to the end, for only there is the CRC verified
            tail = file.read(MAX_TAIL + 1)
            if len(tail) > MAX_TAIL:
                raise EOFError("goes on far beyond its last voxel")
            # less than a header is no second volume
            if len(tail.strip(b"\0")) > 348:
                raise BadVolume(f"{header.path}: goes on after its last voxel, as two volumes in "
                                "one file do; give each a file of its own, or copy it again")
    except (OSError, EOFError, zlib.error) as error:
        raise BadVolume(f"{header.path}: damaged ({error}); copy it again") from None


def read_volume(path):
    """Read an image: (float32 (X, Y, Z) in file order, affine float64).

    BadVolume if it is damaged, not finite or constant.
    """
    header = read_header(path)
    volume = np.empty(int(np.prod(header.shape)), np.float32)
    first = None
    varies = False
    # While all voxels are equal nothing is written, so that a bomb of zeros takes no memory. The
    # first voxel that differs fills in those that came before it.
    for start, values in read_pieces(header):
        if start == 0:
            first = values[0]
        if not varies and (values != first).any():
            varies = True
            volume[:start] = first
        if varies:
            volume[start:start + len(values)] = values
    if not varies:
        raise BadVolume(f"{path}: all voxels are equal; leave it out")
    return torch.from_numpy(volume.reshape(header.shape, order="F")), header.affine


def read_label(path, num_classes=None, allow_empty=True):
    """Read a label: (uint8 (X, Y, Z), affine float64).

    BadVolume if it is damaged, or not whole numbers in 0..num_classes - 1, or empty unless allowed.
    """
    header = read_header(path)
    highest = (num_classes or 256) - 1
    # a scaled integer, stored * slope, misses a whole number by half a slope at most; from a slope
    # of .5 on that would be half a class, which is not forgiven
    step = abs(header.slope) if header.dtype.kind in "iu" else 0
    tolerance = max(1e-4, step * .5001) if step < .5 else 1e-4
    label = np.empty(int(np.prod(header.shape)), np.uint8)
    for start, values in read_pieces(header):
        whole = values.round()
        wrong = values[(np.abs(values - whole) > tolerance) | (whole < 0) | (whole > highest)]
        if len(wrong):
            advice = "repair the label"
            if highest < wrong[0] == wrong[0].round() <= 255:
                advice += ", or give --num_classes, if the list names no organs"
            raise BadVolume(f"{path}: label value {wrong[0]} is not a whole number in "
                            f"0..{highest}; {advice}")
        label[start:start + len(values)] = whole
    if not allow_empty and not label.any():
        raise BadVolume(f"{path}: the label is empty, all background; leave the case out")
    return torch.from_numpy(label.reshape(header.shape, order="F")), header.affine


def write_label(path, label, like):
    """Write a label (X, Y, Z) as uint8 .nii.gz with shape, qform and sform of the file `like`."""
    nifti = read_header(like).nifti.copy()
    nifti.set_data_dtype(np.uint8)
    for field in ("cal_min", "cal_max", "vox_offset"):               # the image's, not the label's
        nifti[field] = 0
    kind = nib.Nifti2Image if isinstance(nifti, nib.Nifti2Header) else nib.Nifti1Image
    voxels = np.asarray(label, np.uint8).reshape(nifti.get_data_shape())
    image = kind(voxels, None, nifti)
    atomic_write(path, gzip.compress(image.to_bytes(), 6, mtime=0))


def pack(voxels, affine, slope=1., intercept=0.):
    """Return the bytes of a .nii.gz of uint8 voxels (R, A, S) that stand for slope * v + intercept.

    The same voxels give the same bytes.
    """
    image = nib.Nifti1Image(np.asarray(voxels, np.uint8), affine)
    image.header.set_slope_inter(slope, intercept)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), 6, mtime=0)
