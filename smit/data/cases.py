"""Cases: from a pair of files to prepared volumes, pre-flight, the cache. [SMIT 3]"""
import functools
import hashlib
import io
import zlib
from pathlib import Path

import numpy as np
import torch

from smit.data.nifti import BadVolume, pair, read_header, read_label, read_volume
from smit.runtime.files import atomic_write
from smit.runtime.ranks import ignore_stop_signals
from smit.transforms import Preparation, prepare, regrid, spacing_of, to_ras

CACHE_FORMAT = 3                       # raise it when `prepare` changes


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
    image = read_header(case["image"])
    if labels and not case["label"]:
        raise BadVolume(f"{image.path}: has no label; name it in the list, or leave the case out")
    label = read_header(case["label"]) if labels else image
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
