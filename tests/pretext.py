"""Shared by the tests of the baselines: views of phantoms, and a short training."""
import functools

import torch

from smit import phantom, transforms


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@functools.cache
def volumes(n=4, spacing_mm=7.0):
    """Prepared phantoms, each (D, H, W) in [0, 1]."""
    prepared = []
    for index in range(n):
        image, _, _ = phantom.make_patient(0, index, spacing_mm=(spacing_mm,) * 3)
        prepared.append(transforms.window_hu(torch.from_numpy(image).float()))
    return prepared


def views(number, side):
    """Two random views of a phantom, (2, 1, side, side, side), keyed on the number."""
    draws, volume = rng(number), volumes()[number % 4]
    cubes = []
    for _ in range(2):
        starts = [int(torch.randint(size - side + 1, (), generator=draws)) for size in volume.shape]
        x, y, z = (slice(start, start + side) for start in starts)
        cubes.append(volume[x, y, z])
    return torch.stack(cubes)[:, None]


def batch(task, numbers, side):
    samples = [task.samples(views(number, side), rng(number)) for number in numbers]
    return torch.utils.data.default_collate(samples)


def train(task, steps, lr, side=16, size=4, different=4):
    """Train on a few batches in turn: the total loss of every step."""
    optimizer = torch.optim.AdamW(task.parameters(), lr=lr)
    batches = []
    for number in range(different):
        batches.append(batch(task, range(number * size, number * size + size), side))

    totals = []
    for step in range(steps):
        terms = task(batches[step % different])
        assert tuple(terms) == task.terms
        total = sum(terms.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        task.after_step(step / steps)
        totals.append(total.item())
    return totals


def mean(values):
    return sum(values) / len(values)
