"""What frozen tokens know of organs: a linear probe and nearest neighbours, no training [ours]. See study.py.

A token is its features of all stages at the first one's resolution (2^3 voxels), and its organ is that of its last
voxel. Fitted on the labelled training volumes, scored on those held back; every class counts alike, the background too.
"""
import numpy as np
import torch
from torch.nn import functional as F

from smit import data, pretrain, runtime, transforms

BANK, QUERIES = 150, 60  # tokens of each organ to look among, and to ask for in each case


def load_encoder(path, seed):
    """(encoder in eval mode, settings of its run) of a student.pt; `seed`: with weights drawn from it instead."""
    state = runtime.load_checkpoint(path)
    torch.manual_seed(seed or 0)
    student = pretrain.build_student(state["config"])
    if seed is None:
        student.load_state_dict(state["model"])
    return student.encoder.eval(), state["config"]


@torch.no_grad()
def tokens(encoder, image, label):
    """Features (n, C) of a prepared volume's tokens, and their organs (n,)."""
    side = encoder.patch * 2 ** (len(encoder.stages) - 1)
    image, label = (np.pad(volume, [(0, -size % side) for size in volume.shape]) for volume in (image, label))
    features = encoder(torch.from_numpy(image)[None, None] / 255, wanted=range(len(encoder.stages)))[:-1]
    grid, last = features[0].shape[2:], slice(encoder.patch - 1, None, encoder.patch)
    features = torch.cat([F.interpolate(f, size=grid) for f in features], 1)                       # (1, C, d, h, w)
    return features[0].flatten(1).T.cpu(), torch.from_numpy(label[last, last, last].astype(np.int64)).flatten()


def some_of_each(organs, most):
    """Indices of up to `most` tokens of each organ, evenly spread: no draw."""
    places = [(organs == organ).nonzero()[:, 0] for organ in organs.unique()]
    return torch.cat([at[torch.linspace(0, len(at) - 1, min(most, len(at))).long()] for at in places])


def fit_linear(x, organs, classes):
    """Least squares to one-hot organs, each organ weighing alike, with a ridge: weights (C + 1, classes)."""
    x = F.pad(x, (0, 1), value=1).double()
    weight = (1 / organs.bincount(minlength=classes).clamp(min=1).double())[organs, None]
    squares = x.T @ (x * weight)
    ridge = .01 * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
    return torch.linalg.solve(squares + ridge, x.T @ (F.one_hot(organs, classes).double() * weight))


def probe(encoder, settings, listed, cache, classes):
    """(balanced accuracy of the linear probe, share of nearest neighbours of the same organ, cases scored)."""
    def read(key):
        for case in data.read_list(listed, key):
            yield tokens(encoder, *map(np.array, data.cached(case, settings, cache, True, classes)))
    x, organs = map(torch.cat, zip(*read("training")))
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / deviation
    linear, chosen = fit_linear(x, organs, classes), some_of_each(organs, BANK)
    bank, bank_organs = F.normalize(x[chosen], dim=1), organs[chosen]
    hits, asked, cases = torch.zeros(2, classes), torch.zeros(2, classes), 0
    for x, organs in read("validation"):
        x, cases = (x - mean) / deviation, cases + 1
        guess = (F.pad(x, (0, 1), value=1).double() @ linear).argmax(1)
        some = some_of_each(organs, QUERIES)
        nearest = bank_organs[(F.normalize(x[some], dim=1) @ bank.T).argmax(1)]
        for row, (guessed, true) in enumerate(((guess, organs), (nearest, organs[some]))):
            hits[row] += true[guessed == true].bincount(minlength=classes)
            asked[row] += true.bincount(minlength=classes)
    return *[(h / n)[n > 0].mean().item() for h, n in zip(hits, asked)], cases


def table(checkpoints, listed, modality, cache):
    """Rows {row, seed, linear_probe, nearest_neighbour, n}; checkpoints {(row, seed): (student.pt, whether random)}."""
    rows = []
    for (name, seed), (path, random) in checkpoints.items():
        encoder, config = load_encoder(path, seed if random else None)
        settings = transforms.Preparation(tuple(config["spacing"]), modality, tuple(config["hu_window"]))
        classes = max(data.label_names(listed) or {0: "", 13: ""}) + 1
        linear, nearest, n = probe(encoder, settings, listed, cache, classes)
        rows.append({"row": name, "seed": seed, "linear_probe": linear, "nearest_neighbour": nearest, "n": n})
    return rows
