"""Which volume, which crop, which mask: everything random about a sample, keyed on (seed, global sample number).

A run is a sequence of samples 0, 1, 2, ...; sample s belongs to epoch s // n. Neither the rank, nor the worker, nor the
moment at which a run was resumed enters a draw, so two ranks with batch 1 see what one rank with batch 2 sees.
"""
import functools
import warnings

import numpy as np
import torch

from smit import data
from smit.masking import random_block_mask
from smit.runtime import ignore_stop_signals


def generator(seed, *key):
    """A torch.Generator for one purpose: generator(seed, "train", sample) is the same everywhere, always."""
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
    """The box of `size` voxels at `start` of an array (maybe on disk), zeros where it leaves it: a tensor of its own."""
    out = torch.zeros(*size, dtype=torch.uint8)
    inside = [(max(s, 0), min(s + k, n)) for s, k, n in zip(start, size, volume.shape)]
    if all(lo < hi for lo, hi in inside):
        source = tuple(slice(lo, hi) for lo, hi in inside)
        target = tuple(slice(lo - s, hi - s) for (lo, hi), s in zip(inside, start))
        out[target] = torch.from_numpy(np.array(volume[source]))
    return out


class ViewPairs(torch.utils.data.Dataset):
    """Sample number -> two views of one volume and their masks [SMIT 2, 3].

    Returns views (2, 1, D, H, W) uint8, hidden (2, d, h, w) bool at cell resolution, noise (2, drops) uniform in [0, 1),
    volume: its index, and passed_over: how many volumes before it turned out bad and were skipped, with a warning.
    Where every volume is bad, the sample is the last error.
    """

    def __init__(self, cases, settings, cache, crop, view, cell, mask_ratio, drops=0, seed=0, split="train"):
        self.cases, self.settings, self.cache = cases, settings, cache
        self.crop, self.view, self.grid = crop, view, tuple(v // cell for v in view)
        self.mask_ratio, self.drops, self.seed, self.split = mask_ratio, drops, seed, split

    def __getitem__(self, sample):
        n = len(self.cases)
        first = epoch_order(n, self.seed, sample // n)[sample % n] if self.split == "train" else sample
        for passed_over in range(n):
            index = (first + passed_over) % n
            try:
                volume, _ = data.cached(self.cases[index], self.settings, self.cache)
                break
            except data.BadVolume as error:
                warnings.warn(f"skipped: {error}")
                found = error
        else:
            return found
        rng = generator(self.seed, self.split, sample)
        starts = random_starts(volume.shape, self.crop, self.view, rng)
        return {"views": torch.stack([cut(volume, start.tolist(), self.view) for start in starts])[:, None],
                "hidden": random_block_mask(2, self.grid, self.mask_ratio, rng),
                "noise": torch.rand(2, self.drops, generator=rng),
                "volume": index, "passed_over": passed_over}


def collate(samples):
    """Stack samples; an error among them is handed on, to be raised in the main process with its own message."""
    errors = [s for s in samples if isinstance(s, Exception)]
    return errors[0] if errors else torch.utils.data.default_collate(samples)


def batches(dataset, numbers, workers=0, timeout=300):
    """Iterate over micro-batches: `numbers` yields lists of sample numbers. Raises what the dataset found wrong."""
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=numbers, num_workers=workers, collate_fn=collate,
                                         timeout=timeout if workers else 0, pin_memory=torch.cuda.is_available(),
                                         worker_init_fn=ignore_stop_signals)
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch
