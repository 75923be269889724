"""Draw samples: which volume, which crop, which mask, keyed on (seed, sample number) [SMIT 2, 3].

A run is a sequence of samples 0, 1, 2, ...; sample s belongs to epoch s // n. Neither the rank,
nor the worker, nor the moment at which a run was resumed enters a draw, so two ranks with batch 1
see the samples that one rank with batch 2 sees.

Reading order: random streams, splits, views for pre-training, crops for fine-tuning, batches.
"""
import collections
import contextlib
import functools
import hashlib
import re
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from smit.data import cases as case_files
from smit.data import concerns
from smit.data.concerns import Concern
from smit.data.nifti import BadVolume, pair
from smit.data.organs import case_names, identities
from smit.masking import random_block_mask
from smit.runtime.ranks import WORKER_DEATH, ignore_stop_signals, worker_deaths
from smit.transforms import crop, rotate90

SPLITS = {  # numbers of the BTCV cases held back
    "smit21_9": [29, 30, 31, 32, 34, 36, 37, 39, 40],  # [release]
    "monai24_6": [35, 36, 37, 38, 39, 40],             # in MONAI's tutorials
}
FOLD_SEED = 12345                      # [nnU-Net]
WORKER_TIMEOUT_S = 300                 # a loader worker silent for longer ends the run [ours]


# ----------------------------------------------------------------------------------- random streams
def generator(seed, *key):
    """Make a torch.Generator for one purpose, such as generator(seed, "train", sample) [ours].

    The same seed and key give the same numbers on every machine and rank.
    """
    # differs: the release's crops come from a random stream that repeats every epoch
    words = [int.from_bytes(k.encode(), "little") if isinstance(k, str) else k for k in key]
    high, low = np.random.SeedSequence([seed, *words]).generate_state(2)
    return torch.Generator().manual_seed(int(high) << 31 | int(low) >> 1)


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """Shuffle the volumes of one epoch: a tuple of n indices, each once."""
    return tuple(torch.randperm(n, generator=generator(seed, "order", epoch)).tolist())


def micro_batches(first, last, micro, rank=0, world=1):
    """Yield this rank's sample numbers, a list per micro-batch, from `first` until before `last`.

    A global micro-batch is micro * world consecutive samples; rank r takes the r-th stretch of
    `micro`.
    """
    for start in range(first, last, micro * world):
        begin = start + rank * micro
        yield list(range(begin, begin + micro))


# ------------------------------------------------------------------------------------------- splits
def published_split(cases, name):
    """Split BTCV cases by the numbers in their images' names: (train, held back).

    ValueError if a case that is to be held back is missing.
    """
    train, held_back = [], []
    for case in cases:
        number = first_number(case["image"])
        (held_back if number in SPLITS[name] else train).append(case)

    numbers = sorted(first_number(case["image"]) for case in held_back)
    if numbers != SPLITS[name]:
        raise ValueError(f"{name} holds back cases {SPLITS[name]}; found of them: {numbers}")
    return train, held_back


def first_number(path):
    """Return the first number in a file's name, 0 if there is none: img0029.nii.gz -> 29."""
    digits = re.search(r"\d+", Path(path).name)
    return int(digits[0]) if digits else 0


def fold_split(cases, fold, folds):
    """Split for cross-validation: (train, held back), nnU-Net's folds [nnU-Net].

    If the lists give each case its "fold", as MONAI's do and nnU-Net's splits_final.json, theirs
    are taken and `folds` does not count. Else the names are sorted as plain text, so that case_10
    comes before case_2, and shuffled by a fixed seed, whatever the order of the list. ValueError
    if only some cases have a fold, or none has this one, or if the lists' folds are faulty.
    """
    for case in cases:
        if "fold_problem" in case:
            raise ValueError(case["fold_problem"])
    listed = [case.get("fold") for case in cases]
    if any(number is not None for number in listed):
        held_back = listed_fold(cases, listed, fold)
    else:
        if fold >= folds:
            raise ValueError(f"--fold {fold} is not one of 0..{folds - 1}")
        names = case_names([case["image"] for case in cases])
        order = np.array(sorted(range(len(cases)), key=names.__getitem__))
        np.random.RandomState(FOLD_SEED).shuffle(order)
        held_back = set(np.array_split(order, folds)[fold].tolist())
    train = [case for i, case in enumerate(cases) if i not in held_back]
    return train, [case for i, case in enumerate(cases) if i in held_back]


def listed_fold(cases, listed, fold):
    """Return the indices of the cases that their list puts into this fold."""
    without = [case["image"] for case, number in zip(cases, listed) if type(number) is not int]
    if without:
        raise ValueError(f"{without[0]} has no whole number as its fold, though other cases have: "
                         f"{len(without)} cases without; complete the list, or drop all its folds")
    if fold not in listed:
        raise ValueError(f"--fold {fold}: the list has the folds {sorted(set(listed))}; name one "
                         "of them")
    concerns.note(f"fold {fold} is the list's own: {listed.count(fold)} of {len(cases)} cases are "
                  "held back")
    return {i for i, number in enumerate(listed) if number == fold}


def random_split(cases, held, seed):
    """Hold back `held` random cases: (train, held back) [ours]."""
    order = torch.randperm(len(cases), generator=generator(seed, "held back")).tolist()
    return [cases[i] for i in order[held:]], [cases[i] for i in order[:held]]


def nested_subset(cases, n, seed):
    """Take the first n of one shuffle of the cases, so that fewer are a part of more [ours]."""
    if not 1 <= n <= len(cases):
        raise ValueError(f"{n} cases to train on were asked for, and {len(cases)} are there")
    order = torch.randperm(len(cases), generator=generator(seed, "subset")).tolist()
    return [cases[i] for i in order[:n]]


def list_digest(cases):
    """Return twelve hex digits that change with names and order of images, not their folder."""
    names = identities([case["image"] for case in cases])
    return hashlib.sha256(repr(names).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------ the files of a run
def marks(case):
    """Return what tells each of a case's files from another of its name; None for a missing one.

    Size, time of modification and checksum of the ends: putting the old file back restores them.
    """
    found = []
    for path in filter(None, (case["image"], case["label"])):
        for file in pair(path):
            try:
                _, size, written, _, checksum = case_files.stamp(file)
                found.append((size, written, checksum))
            except OSError:
                found.append(None)
    return found


def marks_of_all(cases):
    """Return `marks` of each case; in threads, for on a network disk each of them is a wait."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(marks, cases))


def unchanged(case, known):
    """Return the case; BadVolume if its files are no longer those with the `known` marks.

    All epochs of a run are over the same volumes.
    """
    if marks(case) != known:
        raise BadVolume(f"{case['image']}: changed or removed since the run began; put the old one "
                        "back")
    return case


# ------------------------------------------------------------------------------ views, pre-training
def random_starts(shape, crop, view, rng):
    """Draw the corners of two views inside one random crop: (2, 3) long [SMIT 3].

    Along an axis on which the volume is smaller than the crop, it is centred in it.
    """
    starts = torch.empty(2, 3, dtype=torch.long)
    for axis, (n, c, v) in enumerate(zip(shape, crop, view)):
        if n > c:
            corner = int(torch.randint(n - c + 1, (), generator=rng))
        else:
            corner = -((c - n) // 2)
        starts[:, axis] = corner + torch.randint(c - v + 1, (2,), generator=rng)
    return starts


def cut(volume, start, size):
    """Copy the box of `size` voxels at `start` out of an array, maybe on disk; zeros outside it."""
    inside = tuple(slice(max(s, 0), max(s + n, 0)) for s, n in zip(start, size))
    part = torch.from_numpy(np.array(volume[inside]))
    return crop(part, [min(s, 0) for s in start], size)


class ViewPairs(torch.utils.data.Dataset):
    """Sample number -> two views of one volume and their masks [SMIT 2, 3].

    A sample is a dict:
        views        (2, 1, D, H, W) uint8
        hidden       (2, d, h, w) bool, at cell resolution
        noise        (2, drops) uniform in [0, 1), for drop path
        volume       index of its case
        passed_over  number of unreadable volumes before that one in the list
        skipped      what is wrong with them, a list of lines
        concerns     what is odd about the volume, a list
    If no volume can be read, or the cache's disk fails, the sample is the error, which `sample`
    raises.
    """

    def __init__(self, cases, settings, cache, crop, view, cell, mask_ratio, drops=0, seed=0,
                 split="train"):
        self.cases, self.settings, self.cache = cases, settings, cache
        self.crop, self.view = crop, view
        self.grid = tuple(voxels // cell for voxels in view)
        self.mask_ratio, self.drops = mask_ratio, drops
        self.seed, self.split = seed, split
        self.marks = marks_of_all(cases)                             # now, before workers start

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, sample):
        try:
            volume, index, problems, found = self.first_readable(self.index_of(sample))
        except (BadVolume, OSError) as error:
            return error                                 # raised in the main process
        rng = generator(self.seed, self.split, sample)
        starts = random_starts(volume.shape, self.crop, self.view, rng)
        views = [cut(volume, start.tolist(), self.view) for start in starts]
        return {"views": torch.stack(views)[:, None],
                "hidden": random_block_mask(2, self.grid, self.mask_ratio, rng),
                "noise": torch.rand(2, self.drops, generator=rng),
                "volume": index, "passed_over": len(problems), "skipped": problems,
                "concerns": found + self.slab_concerns(index, volume.shape)}

    def sample(self, number):
        """Return a sample, or raise the error that stands in its place."""
        sample = self[number]
        if isinstance(sample, Exception):
            raise sample
        return sample

    def index_of(self, sample):
        """Return the index of a sample's volume: shuffled in training, else the sample itself."""
        if self.split != "train":
            return sample
        n = len(self.cases)
        return epoch_order(n, self.seed, sample // n)[sample % n]

    def first_readable(self, index):
        """Return (volume, its index, problems of volumes passed over, its concerns).

        Searches from `index` on. BadVolume of the last one if none can be read.
        """
        n = len(self.cases)
        problems = []
        for place in range(index, index + n):
            try:
                case = unchanged(self.cases[place % n], self.marks[place % n])
                volume, _, found = case_files.cached_with_concerns(case, self.settings, self.cache)
                return volume, place % n, problems, found
            except BadVolume as error:
                problems.append(str(error))
        raise BadVolume(problems[-1])

    def slab_concerns(self, index, shape):
        """Return a concern if a prepared volume of `shape` fills less than half a view's side."""
        if all(2 * n >= v for n, v in zip(shape, self.view)):
            return []
        return [Concern(self.cases[index]["image"], "is so thin that its views are mostly padding",
                        f"{tuple(shape)} voxels prepared, views of {tuple(self.view)}",
                        "leave it out, or lower --view or --spacing")]

    def images(self, batch):
        """Return the paths of a batch's volumes."""
        return [self.cases[index]["image"] for index in batch["volume"].tolist()]


# ------------------------------------------------------------------------------- crops, fine-tuning
def random_voxel(mask, rng):
    """Draw the indices of a True voxel of mask (D, H, W), each with the same chance."""
    counts = np.count_nonzero(mask, axis=(1, 2)).cumsum()            # up to and with each plane
    chosen = int(torch.randint(int(counts[-1]), (), generator=rng))
    plane = int(np.searchsorted(counts, chosen, "right"))
    places = np.argwhere(mask[plane])
    before = counts[plane] - len(places)                             # in the planes before
    return plane, *places[chosen - before].tolist()


def labelled_start(label, size, rng):
    """Draw the corner of a crop around a voxel, with equal chance in an organ or in none [release].

    The crop is moved to stay inside the volume; it is centred where the volume is smaller.
    """
    in_organ = bool(torch.rand((), generator=rng) < .5)
    mask = (label > 0) == in_organ
    centre = random_voxel(mask if mask.any() else ~mask, rng)

    start = []
    for c, k, n in zip(centre, size, label.shape):
        start.append(min(max(c - k // 2, 0), n - k) if n > k else -((k - n) // 2))
    return start


def turned_crop(image, label, size, rng):
    """Cut a crop and turn it in the axial plane; draw a change of contrast and one of brightness.

    Chances .2, .1 and .1 [release]. No flips: they would swap left and right.
    image, label: (D, H, W) uint8. Returns both as uint8 of shape `size`; and for `augmented` scale,
    .9 to 1.1, and shift, -.1 to .1.
    """
    to_turn, to_scale, to_shift, factor, offset = torch.rand(5, generator=rng).tolist()
    turns = int(torch.randint(1, 4, (), generator=rng)) if to_turn < .2 else 0
    scale = .9 + .2 * factor if to_scale < .1 else 1.
    shift = .2 * offset - .1 if to_shift < .1 else 0.

    before = (size[1], size[0], size[2]) if turns % 2 else size
    start = labelled_start(label, before, rng)
    image = rotate90(cut(image, start, before), turns)
    label = rotate90(cut(label, start, before), turns)
    return image, label, scale, shift


def augmented(batch, device="cpu"):
    """Scale and shift the intensities of a batch of crops on `device` [release].

    Returns images (B, n, 1, D, H, W) float32, in 0..1 before augmentation. Crops leave the loader
    as uint8: a quarter of the shared memory that float32 would take.
    """
    scale = batch["scale"].to(device, non_blocking=True)                       # (B, n, 1, 1, 1, 1)
    shift = batch["shift"].to(device, non_blocking=True)
    return batch["images"].to(device, non_blocking=True) / 255 * scale + shift


class LabelledCrops(torch.utils.data.Dataset):
    """Sample number -> several augmented crops of one labelled volume, for fine-tuning [release].

    A sample is a dict:
        images        (n, 1, D, H, W) uint8; `augmented` makes float32 of them
        scale, shift  (n, 1, 1, 1, 1) float32, for `augmented`
        labels        (n, D, H, W) uint8
        noise         (n, drops) uniform in [0, 1), for drop path
        volume        index of its case
        concerns      what is odd about the volume, a list
    No volume is passed over: if it cannot be used, the sample is the error.
    """

    def __init__(self, cases, settings, cache, num_classes, size, crops=4, drops=0, seed=0):
        self.cases, self.settings, self.cache = cases, settings, cache
        self.num_classes = num_classes
        self.size, self.crops = tuple(size), crops
        self.drops, self.seed = drops, seed
        self.marks = marks_of_all(cases)                             # now, before workers start

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, sample):
        n = len(self.cases)
        index = epoch_order(n, self.seed, sample // n)[sample % n]
        try:
            case = unchanged(self.cases[index], self.marks[index])
            image, label, found = case_files.cached_with_concerns(
                case, self.settings, self.cache, True, self.num_classes)
        except (BadVolume, OSError) as error:           # a bad file, or the cache's disk
            return error
        rng = generator(self.seed, "labelled", sample)
        crops = [turned_crop(image, label, self.size, rng) for _ in range(self.crops)]
        images, labels, scale, shift = zip(*crops)
        return {"images": torch.stack(images)[:, None],
                "scale": torch.tensor(scale).view(-1, 1, 1, 1, 1),
                "shift": torch.tensor(shift).view(-1, 1, 1, 1, 1),
                "labels": torch.stack(labels),
                "noise": torch.rand(self.crops, self.drops, generator=rng),
                "volume": index, "concerns": found}

    def images(self, batch):
        """Return the paths of a batch's volumes."""
        return [self.cases[index]["image"] for index in batch["volume"].tolist()]


# ------------------------------------------------------------------------------------------ batches
def collate(samples):
    """Stack samples and join their lists; return the first error, for `load_batches` to raise."""
    batch = {}
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
        for name, value in sample.items():
            if isinstance(value, list):
                batch.setdefault(name, []).extend(value)
    names = [name for name in samples[0] if name not in batch]
    tensors = [{name: sample[name] for name in names} for sample in samples]
    return batch | torch.utils.data.default_collate(tensors)


def load_batches(dataset, numbers, workers=0, pin=False):
    """Yield micro-batches for lists of sample numbers; raise what the dataset found wrong."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=numbers, num_workers=workers, collate_fn=collate, pin_memory=pin,
        # workers of Python 3.14's forkserver outlive a killed rank: they are not its children
        multiprocessing_context="fork" if workers else None,
        timeout=WORKER_TIMEOUT_S if workers else 0, worker_init_fn=ignore_stop_signals)
    watch = worker_deaths if workers else contextlib.nullcontext()
    with watch:
        loaded = iter(loader)
    while True:
        with watch:
            batch = next(loaded, None)
        if batch is None:
            return
        if isinstance(batch, Exception):
            raise batch
        yield batch if pin or not workers else own_copy(batch)


def own_copy(batch):
    """Copy a worker's batch out of shared memory, which is small in a container."""
    copy = {}
    for name, value in batch.items():
        copy[name] = value.clone() if isinstance(value, torch.Tensor) else value
    return copy


def load_in_spite_of_deaths(dataset, numbers, workers=0, pin=False):
    """Yield as `load_batches`; if a worker dies, make the other micro-batches in this process.

    Measurements cannot be saved half-way. So the rest is made here, and the error is kept for the
    training's `Batches` to raise after this step.
    """
    numbers = list(numbers)
    done = 0
    try:
        for batch in load_batches(dataset, numbers, workers, pin):
            done += 1
            yield batch
    except RuntimeError as error:
        if not re.search(WORKER_DEATH, str(error)):
            raise                                        # a silent disk would be silent here, too
        worker_deaths.kept = error
        yield from load_batches(dataset, numbers[done:], 0, pin)


class Batches:
    """Iterate over this rank's micro-batches and count the volumes that could not be read [ours].

    dataset: ViewPairs or LabelledCrops; numbers: see `micro_batches`; max_bad: unreadable volumes
    to allow over all ranks, of which `left_out` were left out by their headers before. Each is told
    once, in one line, by the rank that met it.

    per_step: micro-batches that a training step takes. That many are fetched ahead, so a step is
    begun only with all of them at hand. If the loader fails, be it that a worker died, a disk is
    silent or a file has changed, the step under way is finished, `agree` tells all ranks to leave,
    and `raise_failure` says why, after the run was saved. 0 for measurements.
    """

    def __init__(self, dataset, numbers, ranks, workers=0, max_bad=0, left_out=0, per_step=0):
        self.dataset, self.ranks = dataset, ranks
        self.max_bad, self.left_out = max_bad, left_out
        self.bad, self.joined = set(), 0                 # unreadable volumes; known to all ranks
        self.told = set()
        load = load_batches if per_step else load_in_spite_of_deaths
        self.loaded = load(dataset, numbers, workers, pin=ranks.device.type == "cuda")
        self.per_step = per_step
        self.fetched = collections.deque()
        self.end = None                                  # StopIteration, or what the loader raised

    def __iter__(self):
        return self

    def __next__(self):
        while len(self.fetched) <= self.per_step and self.end is None:
            self.fetch()
        if not self.fetched:
            raise self.end
        return self.fetched.popleft()

    def fetch(self):
        """Fetch a micro-batch, or learn that there is none."""
        try:
            batch = next(self.loaded)
        except Exception as error:
            # its frames hold the loader, whose other workers would live on
            traceback.clear_frames(error.__traceback__)
            self.end = error
            return
        tell_about(batch, self.told)
        if "passed_over" in batch:
            self.count_bad(batch)
        self.fetched.append(batch)

    @property
    def failure(self):
        """Return what this rank's loader raised, or None."""
        return None if isinstance(self.end, StopIteration) else self.end

    def count_bad(self, batch):
        """Add to `bad` the volumes that were passed over before each of the batch's."""
        n = len(self.dataset.cases)
        for index, count in zip(batch["volume"].tolist(), batch["passed_over"].tolist()):
            for back in range(1, count + 1):
                self.bad.add((index - back) % n)

    def agree(self, stop):
        """Return whether all ranks leave after this step. Every rank must call it.

        They do when one of them was asked to stop, when its loader has failed, and when more
        volumes are bad than allowed.
        """
        news = len(self.bad) - self.joined
        leaving, any_news = self.ranks.agree(bool(stop or self.failure), news)
        if any_news:
            try:
                self.check_bad()
            except ValueError as error:
                self.end, leaving = error, True
        return leaving

    def raise_failure(self):
        """Raise what ended this rank's loader, or else another's. Every rank must call it."""
        texts = [] if self.failure is None else [str(self.failure)]
        gathered = self.ranks.gather(texts)
        if self.failure:
            raise self.failure
        for rank, texts in enumerate(gathered):
            if texts:
                raise ValueError(f"rank {rank}: {texts[0]}")

    def check_bad(self):
        """Join the bad volumes of all ranks; ValueError naming them if they are more than max_bad.

        Every rank must call it.
        """
        cases = self.dataset.cases
        flags = self.ranks.agree(*(index in self.bad for index in range(len(cases))))
        self.bad |= {index for index, flag in enumerate(flags) if flag}
        self.joined = len(self.bad)
        count = len(self.bad) + self.left_out
        if count > self.max_bad:
            names = ", ".join(cases[index]["image"] for index in sorted(self.bad))
            earlier = f" and {self.left_out} with bad headers" if self.left_out else ""
            raise ValueError(f"bad volumes, {count}, are more than --max_bad {self.max_bad}: "
                             f"{names}{earlier}; mend or remove them")


def tell_about(batch, told):
    """Print what is odd about a batch's volumes, and each skipped volume once: `told` is a set."""
    concerns.tell(batch["concerns"], one_by_one=True)
    for problem in batch.get("skipped", []):
        if problem not in told:
            print(f"warning: skipped: {problem}", file=sys.stderr, flush=True)
            told.add(problem)
