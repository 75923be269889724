"""From files to prepared volumes: lists of cases, NIfTI, pre-flight, the cache. [SMIT 3]

The only room that opens NIfTI files and lists, so the boundary where no file is trusted: a header is held against its
file's size before memory is taken, gzip is read to its end so that its CRC counts, and what is bad leaves as BadVolume.
"""
import functools
import gzip
import hashlib
import io
import json
import os
import re
import stat
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from smit.runtime import atomic_write
from smit.transforms import MAX_SIDE, MAX_VOXELS, Preparation, prepare, regrid, spacing_of, to_ras

MAX_TAIL = 2 ** 20                     # bytes that may follow the voxels: some writers pad
DEFLATE_RATIO = 1032                   # no gzip stream holds more than this many times its size
CHUNK = 2 ** 16                        # voxels converted at a time
CACHE_FORMAT = 1                       # raise it when `prepare` changes
NIFTI = (".nii", ".nii.gz", ".hdr", ".hdr.gz")
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
Header = namedtuple("Header", "path body shape affine dtype slope inter offset nifti")  # body: the file with the voxels


class BadVolume(ValueError):
    """A file that cannot be used: "path: what is wrong; what to do"."""


# ----------------------------------------------------------------------------------------------------------- lists
def read_list(path, key="training"):
    """Cases [{"image": absolute path, "label": absolute path or None}] of a folder, NIfTI file, JSON or text list.
    Folder: every NIfTI below it, naturally sorted; linked folders are not entered. JSON: MSD/MONAI or nnU-Net v2, `key`
    names the split. Text: one image a line, then a tab or comma and its label, if any; # starts a comment.
    ValueError, one line, for anything else, for paths that leave the JSON's folder, and for a case listed twice.
    """
    path = os.path.abspath(path)
    cases, folder, is_json = {}, os.path.dirname(path), path.lower().endswith(".json")
    if os.path.isdir(path) or path.lower().endswith(NIFTI):
        found = [os.path.join(where, name) for where, folders, files in os.walk(path) for name in folders + files]
        rows = [[name] for name in found or [path] if name.lower().endswith(NIFTI)]
        rows.sort(key=lambda row: _natural(row[0]))
    elif is_json:
        rows = _json_rows(path, _read_json(path), key)
    else:
        rows = [re.split(r"\s*[\t,]\s*", line.strip(), maxsplit=1) for line in _read_text(path).splitlines()]
        rows = [row for row in rows if row[0] and row[0][0] != "#"]
    for row in rows:
        if not all(isinstance(name, str) and re.fullmatch("[^\0\ud800-\udfff]+", name) for name in row):
            raise ValueError(f"{path}: {str(row)[:200]!r} is no path of one image (one channel), or two; repair it")
        row = [os.path.normpath(os.path.join(folder, name)) for name in row]
        if is_json and any(os.path.commonpath([folder, name]) != folder for name in row):
            raise ValueError(f"{path}: {row} leaves the list's folder; keep the data beside or below the list")
        name = re.sub(r"(\.nii|\.hdr|\.img)?(\.gz)?$", "", os.path.realpath(row[0]))
        if name in cases:
            raise ValueError(f"{path}: {row[0]} is listed twice, or is there as .nii and .nii.gz; keep one")
        cases[name] = {"image": row[0], "label": row[1] if len(row) > 1 else None}
    if not cases:
        raise ValueError(f"{path}: holds no NIfTI image (*.nii, *.nii.gz, *.hdr); give the folder or list that does")
    return list(cases.values())


def _natural(name):
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(12), name)


def _read_text(path):
    try:
        with _open(path) as file:
            return file.read(2 ** 26).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "neither NIfTI nor text"
        raise ValueError(f"{path}: {reason}; give a folder, NIfTI file, dataset.json or text list") from None


def _read_json(path):
    text = _read_text(path)
    try:
        return {**json.loads(text)}                                  # TypeError unless it is an object
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON object ({error}); write it in MSD or nnU-Net form") from None


def _json_rows(path, content, key):
    """[image] or [image, label] for each entry, a dict or a string, under `key`; as written, so not yet trusted.
    nnU-Net lists nothing: imagesTr/{case}_0000.nii.gz with labelsTr/{case}.nii.gz is "training"; imagesTs is "test"."""
    entries, channels = content.get(key), content.get("channel_names")
    if entries is None and isinstance(channels, (dict, list)) and key in ("training", "test"):
        if len(channels) != 1:
            raise ValueError(f"{path}: {len(channels)} channels, {channels}; only volumes of one channel are supported")
        end, part = str(content.get("file_ending", ".nii.gz")), "Tr" if key == "training" else "Ts"
        images, labels = (os.path.join(os.path.dirname(path), kind + part) for kind in ("images", "labels"))
        names = sorted(os.listdir(images), key=_natural) if os.path.isdir(images) else []
        cases = [name.removesuffix("_0000" + end) for name in names if name.endswith("_0000" + end)]
        return [[f"{images}/{case}_0000{end}"] + [f"{labels}/{case}{end}"] * os.path.isdir(labels) for case in cases]
    if not isinstance(entries, list):
        raise ValueError(f"{path}: no list of cases under {key!r}; its keys are {list(content)}; name one")
    pairs = [(case.get("image"), case.get("label")) if isinstance(case, dict) else (case, None) for case in entries]
    return [[image] if label is None else [image, label] for image, label in pairs]


def label_names(path):
    """{id: name} from the "labels" of a dataset.json, MSD's id -> name or nnU-Net's name -> id; None without them."""
    labels = _read_json(path).get("labels") if str(path).lower().endswith(".json") else None
    try:
        pairs = ((k, v) if isinstance(v, str) else (v, k) for k, v in (labels or {}).items())
        return {int(i): name for i, name in pairs} or None
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path}: 'labels' must be {{id: name}} or {{name: id}}; regions are not supported") from None


# ----------------------------------------------------------------------------------------------------------- NIfTI
def _open(path):
    """Open to read bytes, unpacked if it is gzip. OSError unless it is a file: opening a pipe waits for its writer."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(0, "is a folder, pipe or device, no file")
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else open(path, "rb")


def _pair(path):
    """The file with the header and the one with the voxels: the same, but for .hdr/.img."""
    return re.sub(r"\.img(\.gz)?$", r".hdr\1", str(path)), re.sub(r"\.hdr(\.gz)?$", r".img\1", str(path))


def _header(path):
    """Header of a NIfTI file, held against the file's size, or BadVolume. Takes no memory, whatever it claims."""
    def need(condition, wrong):
        if not condition:
            raise BadVolume(f"{path}: {wrong}")
    head, body = _pair(path)
    try:
        with _open(head) as file, _open(body) as voxels:
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
    need(ndim == 3 or ndim == 4 and sides[3] == 1, f"{ndim}-D, sides {sides[:ndim]}; give one 3-D volume (one frame)")
    need(min(shape) > 0 and max(shape) <= MAX_SIDE and np.prod(shape, dtype=float) <= MAX_VOXELS,
         f"sides {shape} are not 1..{MAX_SIDE} and {MAX_VOXELS} voxels at most; crop it or repair the header")
    need(code in TYPES, f"voxel type {code} is not one real number a voxel (RGB, complex, ...); convert it")
    slope, inter, offset = (np.float64(nifti[name]) for name in ("scl_slope", "scl_inter", "vox_offset"))
    if slope == 0 or np.isnan(slope):                                # NIfTI's ways to say: not scaled
        slope, inter = np.float64(1), np.float64(0)
    need(np.isfinite([slope, inter]).all(), f"voxel scaling {slope}, {inter} is not finite; repair the header")
    least, dtype = kind.single_vox_offset if head == body else 0, np.dtype(order + TYPES[code])
    offset = offset or np.float64(least)
    need(offset >= least and offset.is_integer(), f"voxels begin at byte {offset}; repair the header")
    claimed = int(offset) + int(np.prod(shape)) * dtype.itemsize
    need(claimed <= size * (DEFLATE_RATIO if packed else 1) and (packed or size <= claimed + MAX_TAIL),
         f"{size} bytes cannot be the {claimed} that its header claims: truncated or forged; copy it again")
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


def check_header(path):
    """(shape, spacing in mm) by header and file size alone; BadVolume if no good volume can be behind them."""
    header = _header(path)
    return header.shape, tuple(spacing_of(header.affine).tolist())


def _voxels(header):
    """Yield (first index, scaled float64 values) piece by piece in file order; verifies length, gzip CRC, magnitude."""
    done, count, size = 0, int(np.prod(header.shape)), header.dtype.itemsize
    try:
        with _open(header.body) as file:
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
        wrong = values[(values != np.floor(values)) | (values < 0) | (values > highest)]
        if len(wrong):
            raise BadVolume(f"{path}: label value {wrong[0]:g} is not a whole number in 0..{highest}; repair the label")
        label[start:start + len(values)] = values
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
    atomic_write(path, lambda file: file.write(gzip.compress(image.to_bytes(), 6, mtime=0)))


# -------------------------------------------------------------------------------- cases, pre-flight, cache
def load_case(case, settings=Preparation(), with_label=False, num_classes=None):
    """Prepare a case: dict of image and label (uint8 (D, H, W); label None unless asked for), affine of their grid,
    original_affine and original_shape of the file. BadVolume for whatever is wrong with one of its files."""
    image, original = read_volume(case["image"])
    made = {"label": None, "original_affine": original, "original_shape": tuple(image.shape)}
    try:
        made["image"], made["affine"] = prepare(image, original, settings, case["image"])
    except ValueError as error:
        raise BadVolume(f"{case['image']}: {error}") from None
    if with_label:
        _check_case(case, labels=True)
        label, ras = to_ras(read_label(case["label"], num_classes)[0], original)
        made["label"] = regrid(label, ras, made["affine"], made["image"].shape, "nearest").contiguous()
    return made


def _check_case(case, labels):
    image = _header(case["image"])
    if labels and not case["label"]:
        raise BadVolume(f"{image.path}: has no label; name it in the list, or leave the case out")
    label = _header(case["label"]) if labels else image
    far = np.abs((image.affine - label.affine)[:3]) @ [*image.shape, 1]        # mm apart in the farthest corner
    if label.shape != image.shape or far.max() > .1 * spacing_of(image.affine).min():
        raise BadVolume(f"{label.path}: {label.shape} or affine is not its image's, {image.shape}; resample the label")


def check_cases(cases, labels=False, load=None):
    """Pre-flight: every header, with `labels` each label against its image; all problems in one ValueError."""
    def problem(case):
        try:
            load(case) if load else _check_case(case, labels)
        except ValueError as error:
            return str(error)
    with ThreadPoolExecutor(1 if load else 8) as pool:               # volumes one at a time, for their memory
        found = [text for text in pool.map(problem, cases) if text]
    if found:
        raise ValueError("\n".join([f"{len(found)} of {len(cases)} cases are bad (20 shown at most):", *found[:20]]))


def check_voxels(cases, settings, labels=False, num_classes=None):
    """The full pass: read and prepare each case (CRC, finite voxels, label values); all problems in one ValueError."""
    check_cases(cases, load=lambda case: load_case(case, settings, labels, num_classes))


@functools.lru_cache(maxsize=None)
def _checksum(path, time_ns):                                        # once a process; the time notices a replaced file
    return f"{zlib.crc32(path.read_bytes()):08x}"


def cached(case, settings, folder, with_label=False, num_classes=None):
    """(image, label or None) of `load_case` as read-only memory maps of a file: only what is touched costs memory.
    The file is folder/KEY/CHECKSUM.npy, KEY from path, size and time of the case's files and from the settings. It is
    renamed into place, so processes may race or die at any byte; one whose checksum is not its name is made again.
    """
    names = ("image", "label") if with_label else ("image",)
    _check_case(case, with_label)
    files = [Path(file).absolute() for name in names for file in _pair(case[name])]
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    entry = Path(folder, hashlib.sha256(repr((CACHE_FORMAT, state, settings, num_classes)).encode()).hexdigest()[:32])
    whole = [path for path in entry.glob("*.npy") if _checksum(path, path.stat().st_mtime_ns) == path.stem]
    if not whole:
        made, data = load_case(case, settings, with_label, num_classes), io.BytesIO()
        np.save(data, np.stack([made[name].numpy() for name in names]))
        entry.mkdir(parents=True, exist_ok=True)
        whole = [entry / f"{zlib.crc32(data.getbuffer()):08x}.npy"]
        atomic_write(whole[0], lambda file: file.write(data.getbuffer()))
    voxels = np.load(whole[0], mmap_mode="r", allow_pickle=False)
    return voxels[0], voxels[1] if with_label else None
