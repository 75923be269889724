"""Cases: from a pair of files to prepared volumes, pre-flight, the cache. [SMIT 3]

Reading order: load_case, grids of image and label, pre-flight checks, the cache.
"""
import contextlib
import functools
import hashlib
import io
import json
import os
import stat
import tempfile
import time
import zlib
from datetime import timedelta
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from smit.data import concerns, intensities
from smit.data.concerns import Concern
from smit.data.lists import WalkedCase
from smit.data.nifti import BadVolume, pair, read_header, read_label, read_volume
from smit.runtime.files import atomic_write
from smit.runtime.ranks import ignore_stop_signals
from smit.transforms import Preparation, from_ras, prepare, ras_grid, regrid, spacing_of, to_ras

CACHE_FORMAT = 7                       # raise it when `prepare` changes
CASE_TIMEOUT_S = 300                   # a case that takes longer ends the check
TELL_EVERY_S = 10                      # between lines of `prepare_ahead`
ENDS = 2 ** 16                         # bytes of a file's head and tail in the cache's key
CORNER = .1                            # voxels that the farthest corners of one grid may lie apart


# ---------------------------------------------------------------------------------------- one case
def preparation_of(args):
    """Read off a script's settings how its volumes are prepared."""
    return Preparation(tuple(args.spacing), args.modality, tuple(args.hu_window),
                       hu_offset=args.hu_offset)


def load_case(case, settings=Preparation(), with_label=False, num_classes=None):
    """Prepare a case: a dict.

    image                           uint8 (D, H, W)
    label                           uint8 (D, H, W), or None unless asked for
    affine                          of their grid
    original_affine, original_shape of the image's file
    concerns                        what is odd about the files, a list
    BadVolume for whatever is wrong with one of them.
    """
    path = case["image"]
    raw = {}
    raw["image"], affine = read_volume(path)
    shape = tuple(raw["image"].shape)
    if settings.hu_offset:
        raw["image"] += settings.hu_offset
    found = intensities.judge_raw(path, raw["image"], settings)
    refuse_labels(case, found)
    try:
        # popped, so that prepare() can free the unrotated copy
        image, prepared_affine = prepare(raw.pop("image"), affine, settings)
    except ValueError as error:
        raise BadVolume(f"{path}: {error}") from None
    found = found or intensities.judge_prepared(path, image)         # one reason a file
    found = header_concerns(path) + found

    label = None
    if with_label:
        label, label_concerns = load_label(case, num_classes, prepared_affine, image.shape)
        found += label_concerns
    return {"image": image, "label": label, "affine": prepared_affine, "original_affine": affine,
            "original_shape": shape, "concerns": found}


def load_label(case, num_classes, prepared_affine, prepared_shape):
    """Bring a case's label to the grid of its prepared image: (label, concerns).

    BadVolume as in check_case.
    """
    check_case(case, labels=True)
    header = read_header(case["image"])
    label, affine = read_label(case["label"], num_classes)
    found = empty_concerns(case["label"], label)
    label, _ = to_ras(label, affine)
    _, ras_affine = ras_grid(header.shape, header.affine)            # the image's, to the last bit
    label = regrid(label, ras_affine, prepared_affine, prepared_shape, "nearest").contiguous()
    return label, found


def refuse_labels(case, found):
    """Raise BadVolume for an image that looks like a label, unless somebody named that file."""
    is_label = any(concern.what == intensities.LABEL_LIKE for concern in found)
    if is_label and isinstance(case, WalkedCase):
        raise BadVolume(f"{case['image']}: {intensities.LABEL_LIKE}; move it out of the folder, "
                        "or name the files to use in a list")


def empty_concerns(path, label):
    """Return a concern if a label has no organ. There are such patients, but it is seldom meant."""
    if label.any():
        return []
    return [Concern(path, "the label is empty", "", "fine if no organ is in the scan")]


def header_concerns(path):
    """Return what is odd about a file's geometry."""
    return list(read_header(path).concerns)


# ---------------------------------------------------------------------------------------- two grids
def same_grid(one, two):
    """Return whether two (shape, affine) hold the same voxels in space.

    Their axes may run differently.
    """
    (shape, affine), (other_shape, other) = ras_grid(*one), ras_grid(*two)
    bound_mm = np.abs((affine - other)[:3]) @ [*shape, 1]            # no corner lies further apart
    return shape == other_shape and bound_mm.max() <= CORNER * spacing_of(affine).min()


def describe_grid(shape, affine):
    """Return a grid in words: 36 x 27 x 33 voxels LPS of 10 x 10 x 10 mm from (-175, -140, 5)."""
    sides = " x ".join(map(str, shape))
    sizes = " x ".join(f"{mm:.4g}" for mm in spacing_of(affine))
    origin = ", ".join(f"{mm:.4g}" for mm in affine[:3, 3])
    return f"{sides} voxels {''.join(nib.aff2axcodes(affine))} of {sizes} mm from ({origin})"


def onto_grid(label, affine, shape, target_affine):
    """Turn a label (X, Y, Z) to the axes of a grid; return None unless it is the same in space."""
    if not same_grid((tuple(label.shape), affine), (tuple(shape), target_affine)):
        return None
    return from_ras(to_ras(label, affine)[0], target_affine)


def check_case(case, labels):
    """Read the headers of a case, [image's] or with `labels` [image's, label's].

    BadVolume unless they are sound, and image and label of one grid.
    """
    image = read_header(case["image"])
    if not labels:
        return [image]
    if not case["label"]:
        keys = f", only the keys {', '.join(map(repr, case['keys']))}" if "keys" in case else ""
        raise BadVolume(f"{image.path}: has no label{keys}; name it in the list as 'label', or "
                        "leave the case out")
    label = read_header(case["label"])
    if not same_grid((label.shape, label.affine), (image.shape, image.affine)):
        raise BadVolume(f"{label.path}: is not on its image's grid: "
                        f"{describe_grid(label.shape, label.affine)}, the image "
                        f"{describe_grid(image.shape, image.affine)}; resample the label")
    return [image, label]


# --------------------------------------------------------------------------------------- pre-flight
def find_problems(cases, check, workers=0):
    """Return what check(case) finds wrong, in the order of the cases, with `workers` processes."""
    return [problem for problem, _ in examine(cases, check, workers) if problem]


def examine(cases, check, workers=0):
    """Return all that `examine_each` yields."""
    return list(examine_each(cases, check, workers))


def examine_each(cases, check, workers=0):
    """Yield for each case, in their order, (what is wrong or None, what check(case) returned).

    A DataLoader is the pool: its workers leave when their parent is killed, and a case that hangs
    ends the check. Those of concurrent.futures would stay. OSError as check raises it.
    """
    results = torch.utils.data.DataLoader(
        cases, batch_size=None, collate_fn=functools.partial(examine_one, check),
        num_workers=workers,
        # fork, so that `check` may be any function
        multiprocessing_context="fork" if workers else None,
        timeout=CASE_TIMEOUT_S if workers else 0, worker_init_fn=ignore_stop_signals)
    for problem, found in results:
        if isinstance(problem, OSError):                 # of the cache's disk, not of a case
            raise problem
        yield problem, found


def examine_shared(cases, check, workers, ranks):
    """Do as `examine`, every rank its share of the cases; all ranks get all results.

    ranks: of `runtime.start`, or None to do it all here. check returns concerns or None.
    """
    if ranks is None or ranks.world == 1:
        return examine(cases, check, workers)
    shares = ranks.gather(examine(cases[ranks.rank::ranks.world], check, workers))
    results = [None] * len(cases)
    for rank, share in enumerate(shares):
        for number, (problem, found) in enumerate(share):
            results[rank + number * ranks.world] = problem, [Concern(*each) for each in found or ()]
    return results


def examine_one(check, case):
    try:
        return None, check(case)
    except ValueError as error:
        return str(error), None
    except OSError as error:            # raised in a worker it would bring a traceback along
        return error, None


def raise_problems(problems):
    """Raise ValueError with all problems, a line each; a bad image may have been met twice."""
    distinct = list(dict.fromkeys(problems))
    if distinct:
        raise ValueError("\n".join([f"{concerns.count(len(distinct), 'problem')}:", *distinct]))


def check_cases(cases, labels=False, problems=(), workers=0):
    """Check the headers of all cases, with `labels` each label against its image: the pre-flight.

    Tells what is odd about them. ValueError with all that is wrong, a line each, after the
    `problems` of their lists.
    """
    results = examine(cases, functools.partial(check_headers, labels=labels), workers)
    concerns.tell([concern for _, found in results for concern in found or ()])
    raise_problems([*problems, *(problem for problem, _ in results if problem)])


def readable_cases(cases, max_bad, labels=False, problems=(), workers=0, ranks=None):
    """Check every header as `check_cases`, but allow bad ones: (good cases, number of bad ones).

    ValueError if more than max_bad are bad, or if a list had problems. Bad ones are told.
    """
    check = functools.partial(check_headers, labels=labels)
    results = examine_shared(cases, check, workers, ranks)
    bad = [problem for problem, _ in results if problem]
    if problems or len(bad) > max_bad:
        raise_problems([*problems, *bad])
    concerns.tell([concern for _, found in results for concern in found or ()])
    for problem in bad:
        concerns.warn(f"skipped: {problem}")
    good = [case for case, (problem, _) in zip(cases, results) if not problem]
    return good, len(bad)


def check_headers(case, labels=False):
    """Check the headers of a case; return what is odd about them. BadVolume as in `check_case`."""
    found = []
    for header in check_case(case, labels):
        found += header.concerns
    return found


def check_voxels(cases, settings, labels=False, num_classes=None, problems=(), workers=0,
                 names=None):
    """Read and prepare all cases: CRC, finite voxels, preparation; values and grid of the labels.

    labels: True for every case, None for those that list one, False for none; names: {id: organ}
    of all numbers that they may hold, if it is known. Tells what is odd. ValueError as in
    `check_cases`.
    """
    check = functools.partial(check_voxels_of, settings=settings, labels=labels,
                              num_classes=num_classes, names=names)
    results = examine(cases, check, workers)
    concerns.tell([concern for _, (_, found) in results for concern in found], names=None)
    image_problems = [texts[0] for _, (texts, _) in results if texts[0]]
    label_problems = [texts[1] for _, (texts, _) in results if texts[1]]
    raise_problems([*problems, *image_problems, *label_problems])


def check_voxels_of(case, settings, labels, num_classes, names):
    """Read and prepare a case: ((what is wrong with its image, and with its label), concerns)."""
    texts, found = [None, None], []
    try:
        found += load_case(case, settings)["concerns"]
    except ValueError as error:
        texts[0] = str(error)
    if labels or labels is None and case["label"]:
        try:
            found += check_label(case, num_classes, names)
        except ValueError as error:
            texts[1] = str(error)
    return texts, found


def check_label(case, num_classes, names=None):
    """Read a case's label, hold it against its image and names; return what is odd about it."""
    if not case["label"]:
        check_case(case, labels=True)
    label, _ = read_label(case["label"], num_classes)
    check_case(case, labels=True)
    check_named(case["label"], np.unique(label).tolist(), names)
    return header_concerns(case["label"]) + empty_concerns(case["label"], label)


def check_named(path, numbers, names):
    """Raise BadVolume if a label holds numbers that its list does not name.

    names: {id: organ}; empty, or None, for a list that names no number at all.
    """
    unnamed = unnamed_numbers(numbers, names) if names else []
    if unnamed:
        raise BadVolume(f"{path}: has the numbers {unnamed}, which the list does not name; name "
                        "them under 'labels', or set them to 0")


def unnamed_numbers(numbers, names):
    """Return those of a label's numbers that {id: organ} does not name, sorted; 0 needs no name."""
    return sorted({*numbers} - {0, *names})


# -------------------------------------------------------------------------------------------- cache
def cached(case, settings, folder, with_label=False, num_classes=None):
    """Return (image, label or None) of `load_case` as read-only memory maps.

    Only what is touched costs memory.
    """
    image, label, _ = cached_with_concerns(case, settings, folder, with_label, num_classes)
    return image, label


def cached_with_concerns(case, settings, folder, with_label=False, num_classes=None):
    """Return (image, label or None, concerns) of `load_case`, prepared at the first call.

    The voxels are in folder/KEY/CHECKSUM.npy, the concerns in folder/KEY/concerns.json. KEY is
    made of the case's files and the settings. A file is renamed into place, so processes may race
    or die at any byte; one whose checksum is not its name is made again.
    """
    if with_label and not case["label"]:
        check_case(case, labels=True)
    kinds = ("image", "label") if with_label else ("image",)
    files = [Path(file).absolute() for kind in kinds for file in pair(case[kind])]
    try:
        state = [stamp(file) for file in files]
    except OSError:
        check_case(case, with_label)            # says what is wrong with the file
        raise
    key = repr((CACHE_FORMAT, state, settings, num_classes))
    entry = Path(folder, hashlib.sha256(key.encode()).hexdigest()[:32])

    whole = [path for path in entry.glob("*.npy") if is_whole(path, state_of(path))]
    if whole:
        found = read_concerns(entry / "concerns.json")
        refuse_labels(case, found)
    else:
        made = load_case(case, settings, with_label, num_classes)
        if [stamp(file) for file in files] != state:
            raise BadVolume(f"{case['image']}: changed while it was read; begin again when its "
                            "files are complete")
        found = made["concerns"]
        whole = [write_entry(entry, [made[kind].numpy() for kind in kinds], found)]
    voxels = np.load(whole[0], mmap_mode="r", allow_pickle=False)
    return voxels[0], voxels[1] if with_label else None, found


def prepare_ahead(cases, settings, folder, ranks, workers=0, with_label=False, num_classes=None):
    """Prepare all cases into the cache, every rank its share, so that no GPU waits for it later.

    Rank 0 shows how far its share is, and tells at the end what is odd in all shares. ValueError
    with all that is wrong, after that.
    """
    share = cases[ranks.rank::ranks.world]
    check = functools.partial(prepare_one, settings=settings, folder=folder, with_label=with_label,
                              num_classes=num_classes)
    results = examine_each(share, check, workers)
    problems, odd, prepared = [], [], 0
    begun = time.monotonic()
    # ranks meet every few seconds, for one may be done long before another, and none waits for ever
    while any(ranks.agree(prepared < len(share))):
        before, round_begun = prepared, time.monotonic()
        for problem, found in results:
            odd += found or ()
            problems += [problem] if problem else []
            prepared += 1
            if time.monotonic() - round_begun > TELL_EVERY_S:
                break
        if ranks.is_main and prepared > before:
            seconds = (time.monotonic() - begun) / prepared * (len(share) - prepared)
            others = f" on each of {ranks.world} ranks" if ranks.world > 1 else ""
            print(f"prepared {prepared} of {len(share)} volumes{others}, "
                  f"{timedelta(seconds=round(seconds))} left", flush=True)
    tell_of_all(odd, ranks)
    raise_problems([problem for part in ranks.gather(problems) for problem in part])


def tell_of_all(odd, ranks):
    """Tell the concerns of all ranks, which the first one prints. Every rank must call it."""
    concerns.tell([Concern(*fields) for part in ranks.gather(odd) for fields in part])


def prepare_one(case, settings, folder, with_label, num_classes):
    """Make a case's cache entry if it lacks; return what is odd about the case."""
    return cached_with_concerns(case, settings, folder, with_label, num_classes)[2]


def write_entry(entry, volumes, found):
    """Write a cache entry: concerns first, so that none is lost; return the path of its voxels."""
    data = io.BytesIO()
    np.save(data, np.stack(volumes))
    entry.mkdir(parents=True, exist_ok=True)
    path = entry / f"{zlib.crc32(data.getbuffer()):08x}.npy"
    atomic_write(entry / "concerns.json", json.dumps(found).encode())
    atomic_write(path, data.getbuffer())
    return path


@functools.lru_cache(maxsize=None)
def read_concerns(path):
    """Read the concerns of a cache entry, once a process; none if they cannot be read."""
    try:
        return [Concern(*fields) for fields in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def stamp(path):
    """Return what changes when a file does: its path, size, times and the checksum of its ends.

    The time of the last change of its inode (ctime) is the kernel's: it notices a file corrected
    in place whose size and mtime were put back. Some network disks have none; there a checksum of
    the head and the tail, where gzip has its CRC, notices most corrections.
    """
    info = os.stat(path)
    return (str(path), info.st_size, info.st_mtime_ns, info.st_ctime_ns,
            checksum_of_ends(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino))


@functools.lru_cache(maxsize=None)
def checksum_of_ends(path, size, *state):
    """Return the CRC-32 of a file's first and last bytes.

    Read once a process for each `state` of the file.
    """
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(ENDS))
        file.seek(max(0, size - ENDS))
        return zlib.crc32(file.read(ENDS), crc)


def state_of(path):
    """Return what changes when a file is written or replaced."""
    info = os.stat(path)
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


@functools.lru_cache(maxsize=None)
def is_whole(path, state):
    """Return whether the checksum of a cache file is its name.

    The file is read once a machine for each `state`.

    A machine has many loader workers, and a cache may be larger than its memory: what one process
    has verified is noted in a folder of the machine's own, which only this user can write.
    """
    note = verified_folder() / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    with contextlib.suppress(OSError):
        if note.read_text() == repr(state):
            return True
    if f"{zlib.crc32(path.read_bytes()):08x}" != path.stem:
        return False
    with contextlib.suppress(OSError):
        note.write_text(repr(state))            # one that is cut short is no match, and read again
    return True


@functools.lru_cache(maxsize=None)
def verified_folder():
    """Make the folder of notes on verified files, which no other user may write.

    Where one of that name is not so, this process takes another.
    """
    folder = Path(tempfile.gettempdir(), f"smit-verified-{os.getuid()}")
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(OSError):
        info = os.lstat(folder)
        others_may_write = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not others_may_write:
            return folder
    return Path(tempfile.mkdtemp(prefix="smit-verified-"))
