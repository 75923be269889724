"""Which volume, which crop, which mask: everything random about a sample, keyed on (seed, global sample number).

A run is a sequence of samples 0, 1, 2, ...; sample s belongs to epoch s // n. Neither the rank, nor the worker, nor the
moment at which a run was resumed enters a draw, so two ranks with batch 1 see what one rank with batch 2 sees.
"""
import functools
import hashlib
import os
import re
import warnings
from pathlib import Path

import numpy as np
import torch

from smit.data import cases as case_files
from smit.data.nifti import BadVolume, pair
from smit.masking import random_block_mask
from smit.runtime.ranks import ignore_stop_signals
from smit.transforms import crop, rotate90

SPLITS = {  # numbers of the BTCV cases held back
    "smit21_9": [29, 30, 31, 32, 34, 36, 37, 39, 40],  # [release]
    "monai24_6": [35, 36, 37, 38, 39, 40],             # in MONAI's tutorials
}


def generator(seed, *key):
    """A torch.Generator for one purpose: generator(seed, "train", sample) is the same everywhere, always."""
    # differs: the release's crops come from a random stream that repeats every epoch
    words = [int.from_bytes(k.encode(), "little") if isinstance(k, str) else k for k in key]
    state = np.random.SeedSequence([seed, *words]).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The volumes of one epoch, each once, shuffled: a tuple of n indices."""
    return tuple(torch.randperm(n, generator=generator(seed, "order", epoch)).tolist())


def micro_batches(first, last, micro, rank=0, world=1):
    """This rank's sample numbers, one list per micro-batch, from sample `first` until before sample `last`.

    A global micro-batch is micro * world consecutive samples; rank r takes the r-th stretch of `micro` of them.
    """
    for start in range(first, last, micro * world):
        yield list(range(start + rank * micro, start + (rank + 1) * micro))


def random_starts(shape, crop, view, rng):
    """Corners of two views inside one random crop [SMIT 3]: (2, 3) long. Where the volume is smaller, it is centred."""
    starts = torch.empty(2, 3, dtype=torch.long)
    for axis, (n, c, v) in enumerate(zip(shape, crop, view)):
        corner = int(torch.randint(n - c + 1, (), generator=rng)) if n > c else -((c - n) // 2)
        starts[:, axis] = corner + torch.randint(c - v + 1, (2,), generator=rng)
    return starts


def cut(volume, start, size):
    """The box of `size` voxels at `start` of an array, maybe on disk, zeros where it leaves it: a tensor of its own."""
    inside = tuple(slice(max(s, 0), max(s + n, 0)) for s, n in zip(start, size))
    return crop(torch.from_numpy(np.array(volume[inside])), [min(s, 0) for s in start], size)


def list_digest(cases):
    """Twelve hex digits that change with the names and the order of the cases' images, not with their folder."""
    names = [Path(case["image"]).name for case in cases]
    return hashlib.sha256(repr(names).encode()).hexdigest()[:12]


def written(case):
    """When a case's files were written last, 0 for what is not there."""
    files = [file for named in (case["image"], case["label"]) if named for file in pair(named)]
    return [os.stat(file).st_mtime_ns if os.path.exists(file) else 0 for file in files]


def unchanged(case, before):
    """The case; BadVolume if its files are not those of before: epochs of one run are over the same volumes."""
    if written(case) != before:
        raise BadVolume(f"{case['image']}: changed or removed since the run began; put the old one back")
    return case


class ViewPairs(torch.utils.data.Dataset):
    """Sample number -> two views of one volume and their masks [SMIT 2, 3].

    Returns views (2, 1, D, H, W) uint8, hidden (2, d, h, w) bool at cell resolution, noise (2, drops) uniform in
    [0, 1), volume: its index, passed_over: how many volumes before it turned out bad and were skipped with a warning.
    Where every volume is bad, the sample is the last error.
    """

    def __init__(self, cases, settings, cache, crop, view, cell, mask_ratio, drops=0, seed=0, split="train"):
        self.cases, self.settings, self.cache = cases, settings, cache
        self.crop, self.view, self.grid = crop, view, tuple(v // cell for v in view)
        self.mask_ratio, self.drops, self.seed, self.split = mask_ratio, drops, seed, split
        self.written = [written(case) for case in cases]             # now, before workers start

    def __getitem__(self, sample):
        n = len(self.cases)
        first = epoch_order(n, self.seed, sample // n)[sample % n] if self.split == "train" else sample
        for passed_over in range(n):
            index = (first + passed_over) % n
            try:
                case = unchanged(self.cases[index], self.written[index])
                volume, _ = case_files.cached(case, self.settings, self.cache)
                break
            except BadVolume as error:
                warnings.warn(f"skipped: {error}")
                found = error
            except OSError as error:                                 # the cache's disk
                return error
        else:
            return found
        rng = generator(self.seed, self.split, sample)
        starts = random_starts(volume.shape, self.crop, self.view, rng)
        return {"views": torch.stack([cut(volume, start.tolist(), self.view) for start in starts])[:, None],
                "hidden": random_block_mask(2, self.grid, self.mask_ratio, rng),
                "noise": torch.rand(2, self.drops, generator=rng),
                "volume": index, "passed_over": passed_over}


def published_split(cases, name):
    """(train, held back) of BTCV cases by the numbers in their images' names; ValueError if one of them lacks."""
    def number(case):
        return int((re.findall(r"\d+", Path(case["image"]).name) or ["0"])[0])
    train, held_back = ([c for c in cases if (number(c) in SPLITS[name]) == held] for held in (False, True))
    if sorted(map(number, held_back)) != SPLITS[name]:
        raise ValueError(f"{name} holds back cases {SPLITS[name]}; found of them: {sorted(map(number, held_back))}")
    return train, held_back


def fold_split(cases, fold, folds):
    """(train, held back) for one of several folds; nnU-Net's own, where the cases are sorted by name [nnU-Net]."""
    order = np.arange(len(cases))
    np.random.RandomState(12345).shuffle(order)
    held = np.array_split(order, folds)[fold].tolist()
    return [case for i, case in enumerate(cases) if i not in held], [cases[i] for i in sorted(held)]


def random_split(cases, held, seed):
    """(train, held back) with `held` random cases held back."""
    order = torch.randperm(len(cases), generator=generator(seed, "held back")).tolist()
    return [cases[i] for i in order[held:]], [cases[i] for i in order[:held]]


def nested_subset(cases, n, seed):
    """The first n of one shuffle of the cases: a smaller n takes a part of what a larger one takes."""
    if not 1 <= n <= len(cases):
        raise ValueError(f"{n} cases to train on were asked for, and {len(cases)} are there")
    order = torch.randperm(len(cases), generator=generator(seed, "subset")).tolist()
    return [cases[i] for i in order[:n]]


def random_voxel(mask, rng):
    """One of the True voxels of mask (D, H, W), each with the same chance: its three indices."""
    planes = np.count_nonzero(mask, axis=(1, 2)).cumsum()
    chosen = int(torch.randint(int(planes[-1]), (), generator=rng))
    plane = int(np.searchsorted(planes, chosen, "right"))
    return plane, *np.argwhere(mask[plane])[chosen - planes[plane]].tolist()      # counted from the plane's last


def labelled_start(label, size, rng):
    """Corner of a crop around a voxel that lies, with the same chance, in some organ or in none [release].

    Moved to where the crop stays inside the volume; centred where the volume is smaller.
    """
    mask = (label > 0) == bool(torch.rand((), generator=rng) < .5)
    centre = random_voxel(mask if mask.any() else ~mask, rng)
    return [min(max(c - k // 2, 0), n - k) if n > k else -((k - n) // 2) for c, k, n in zip(centre, size, label.shape)]


def augmented_crop(image, label, size, rng):
    """A crop, turned in the axial plane (p .2), intensities scaled and shifted by up to .1 (p .1 each) [release].

    image, label (D, H, W) uint8; returns float32 and uint8 of shape `size`. No flips: they would swap left and right.
    """
    turned, scaled, shifted, factor, offset = torch.rand(5, generator=rng).tolist()
    turns = int(torch.randint(1, 4, (), generator=rng)) if turned < .2 else 0
    before = (size[1], size[0], size[2]) if turns % 2 else size
    start = labelled_start(label, before, rng)
    image, label = (rotate90(cut(volume, start, before), turns) for volume in (image, label))
    image = image / 255 * (.9 + .2 * factor if scaled < .1 else 1.) + (.2 * offset - .1 if shifted < .1 else 0.)
    return image, label


class LabelledCrops(torch.utils.data.Dataset):
    """Sample number -> several augmented crops of one labelled volume, for fine-tuning [release].

    Returns images (n, 1, D, H, W) float32, 0..1 before augmentation, labels (n, D, H, W) uint8, noise (n, drops)
    uniform in [0, 1), volume: its index. A volume that cannot be used is not passed over: the sample is the error.
    """

    def __init__(self, cases, settings, cache, num_classes, size, crops=4, drops=0, seed=0):
        self.cases, self.settings, self.cache, self.num_classes = cases, settings, cache, num_classes
        self.size, self.crops, self.drops, self.seed = tuple(size), crops, drops, seed
        self.written = [written(case) for case in cases]             # now, before workers start

    def __getitem__(self, sample):
        n = len(self.cases)
        index = epoch_order(n, self.seed, sample // n)[sample % n]
        try:
            case = unchanged(self.cases[index], self.written[index])
            image, label = case_files.cached(case, self.settings, self.cache, True, self.num_classes)
        except (BadVolume, OSError) as error:                   # a bad file, or the cache's disk
            return error
        rng = generator(self.seed, "labelled", sample)
        images, labels = zip(*(augmented_crop(image, label, self.size, rng) for _ in range(self.crops)))
        return {"images": torch.stack(images)[:, None], "labels": torch.stack(labels),
                "noise": torch.rand(self.crops, self.drops, generator=rng), "volume": index}


def collate(samples):
    """Stack samples; an error among them is handed on, to be raised in the main process with its own message."""
    errors = [s for s in samples if isinstance(s, Exception)]
    return errors[0] if errors else torch.utils.data.default_collate(samples)


def batches(dataset, numbers, workers=0, pin=False, timeout=300):
    """Iterate over micro-batches: `numbers` yields lists of sample numbers. Raises what the dataset found wrong."""
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=numbers, num_workers=workers, collate_fn=collate,
                                         # else (Python 3.14) they outlive a killed rank, whose children they are not
                                         multiprocessing_context="fork" if workers else None,
                                         timeout=timeout if workers else 0, pin_memory=pin,
                                         worker_init_fn=ignore_stop_signals)
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch
