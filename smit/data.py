"""From files to prepared volumes: NIfTI, cases, pre-flight, the cache. [SMIT 3]

The only room that opens NIfTI files, so the boundary where no file is trusted: a header is held against its
file's size before memory is taken, gzip is read to its end so that its CRC counts, and what is bad leaves as BadVolume.
"""
import functools
import gzip
import hashlib
import io
import os
import re
import zlib
from collections import namedtuple
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from smit.lists import has_split, label_names, open_unpacked, read_list, read_lists  # noqa: F401: of this room, too
from smit.runtime import atomic_write, ignore_stop_signals
from smit.transforms import MAX_SIDE, MAX_VOXELS, Preparation, prepare, regrid, spacing_of, to_ras

MAX_TAIL = 2 ** 20                     # bytes that may follow the voxels: some writers pad
DEFLATE_RATIO = 1032                   # no gzip stream holds more than this many times its size
MAX_OFFSET = 2 ** 26                   # bytes before them: extensions
CHUNK = 2 ** 16                        # voxels converted at a time
CACHE_FORMAT = 3                       # raise it when `prepare` changes
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
Header = namedtuple("Header", "path body shape affine dtype slope inter offset nifti")  # body: the file with the voxels


class BadVolume(ValueError):
    """A file that cannot be used: "path: what is wrong; what to do"."""


# ----------------------------------------------------------------------------------------------------------- NIfTI
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


# -------------------------------------------------------------------------------- cases, pre-flight, cache
def load_case(case, settings=Preparation(), with_label=False, num_classes=None):
    """Prepare a case: dict of image and label (uint8 (D, H, W); label None unless asked for), affine of their grid,
    original_affine and original_shape of the file. BadVolume for whatever is wrong with one of its files."""
    *volume, original = read_volume(case["image"])
    made = {"label": None, "original_affine": original, "original_shape": tuple(volume[0].shape)}
    try:                                                             # popped: `prepare` lets it go once it is turned
        made["image"], made["affine"] = prepare(volume.pop(), original, settings, case["image"])
    except ValueError as error:
        raise BadVolume(f"{case['image']}: {error}") from None
    if with_label:
        check_case(case, labels=True)
        label, ras = to_ras(read_label(case["label"], num_classes)[0], original)
        made["label"] = regrid(label, ras, made["affine"], made["image"].shape, "nearest").contiguous()
    return made


def check_case(case, labels):
    """BadVolume unless the headers of a case's image and, with `labels`, of its label are good and of one grid."""
    image = _header(case["image"])
    if labels and not case["label"]:
        raise BadVolume(f"{image.path}: has no label; name it in the list, or leave the case out")
    label = _header(case["label"]) if labels else image
    far = np.abs((image.affine - label.affine)[:3]) @ [*image.shape, 1]        # mm apart in the farthest corner
    if label.shape != image.shape or far.max() > .1 * spacing_of(image.affine).min():
        raise BadVolume(f"{label.path}: {label.shape} or affine is not its image's, {image.shape}; resample the label")


def find_problems(cases, check, workers=0):
    """What check(case) finds wrong, in the order of the cases; `workers` processes with one case each at a time."""
    def problem(case):
        try:
            check(case)
        except ValueError as error:
            return str(error)
    loader = torch.utils.data.DataLoader(cases, batch_size=None, collate_fn=problem, num_workers=workers,
                                         multiprocessing_context="fork" if workers else None,
                                         timeout=300 if workers else 0, worker_init_fn=ignore_stop_signals)
    return [text for text in loader if text]


def check_cases(cases, labels=False, load=None, problems=(), workers=0):
    """Pre-flight: every header, with `labels` each label against its image; or what `load` finds in a case. ValueError
    with all that is wrong, after the `problems` of their lists; a line each."""
    found = [*problems, *find_problems(cases, load or functools.partial(check_case, labels=labels), workers)]
    if found:                                                        # a bad image may have been met twice
        raise ValueError("\n".join([f"{len(set(found))} problems:", *dict.fromkeys(found)]))


def check_voxels(cases, settings, labels=False, num_classes=None, problems=(), workers=0):
    """The full pass: CRC, finite voxels, preparation; values and grid of every label, with labels=None of those that
    are listed. ValueError as in `check_cases`."""
    def check_label(case):
        if case["label"]:
            read_label(case["label"], num_classes)
        check_case(case, True)
    labelled = [case for case in cases if labels or labels is None and case["label"]]
    found = [*problems, *find_problems(cases, lambda case: load_case(case, settings), workers)]
    check_cases(labelled, load=check_label, problems=found, workers=workers)


@functools.lru_cache(maxsize=None)
def _checksum(path, time_ns):                                        # once a process; the time notices a replaced file
    return f"{zlib.crc32(path.read_bytes()):08x}"


def cached(case, settings, folder, with_label=False, num_classes=None):
    """(image, label or None) of `load_case` as read-only memory maps of a file: only what is touched costs memory.
    The file is folder/KEY/CHECKSUM.npy, KEY from path, size and time of the case's files and from the settings. It is
    renamed into place, so processes may race or die at any byte; one whose checksum is not its name is made again.
    """
    names = ("image", "label") if with_label else ("image",)
    check_case(case, with_label)
    files = [Path(file).absolute() for name in names for file in pair(case[name])]
    stamps = lambda: [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    state = stamps()
    entry = Path(folder, hashlib.sha256(repr((CACHE_FORMAT, state, settings, num_classes)).encode()).hexdigest()[:32])
    whole = [path for path in entry.glob("*.npy") if _checksum(path, path.stat().st_mtime_ns) == path.stem]
    if not whole:
        made, data = load_case(case, settings, with_label, num_classes), io.BytesIO()
        if stamps() != state:
            raise BadVolume(f"{case['image']}: changed while it was read; begin again when its files are complete")
        np.save(data, np.stack([made[name].numpy() for name in names]))
        entry.mkdir(parents=True, exist_ok=True)
        whole = [entry / f"{zlib.crc32(data.getbuffer()):08x}.npy"]
        atomic_write(whole[0], data.getbuffer())
    voxels = np.load(whole[0], mmap_mode="r", allow_pickle=False)
    return voxels[0], voxels[1] if with_label else None
