"""Ask frozen tokens what they know of organs: a linear probe and nearest neighbours, untrained [ours].

A token is its features of all stages at the resolution of the first one (2^3 voxels); its organ is
that of its last voxel. Fitted on the labelled training volumes, scored on those held back. Every
class counts alike, the background too.
"""
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from smit import data, pretrain, runtime, scoring
from smit.study.scores import group
from smit.study.tables import save

BANK = 150                             # tokens of each organ to look for neighbours among
QUERIES = 60                           # tokens of each organ to ask for in each case


class Probe(NamedTuple):
    """What the tokens of one encoder know, over all held-back cases."""
    row: str
    seed: int
    linear_probe: float                # balanced accuracy
    nearest_neighbour: float           # share whose nearest neighbour is of the same organ
    n: int                             # cases


def probe(out, checkpoints, with_random, volumes, modality, cache):
    """Probe the encoders of {(row, seed): student.pt}, and write probe.md and cases.csv.

    with_random: probe each seed's architecture with random weights too, as the row "rand".
    """
    probes = []
    if with_random:
        path_of_seed = {seed: path for (_, seed), path in checkpoints.items()}
        for seed, path in path_of_seed.items():
            probes.append(Probe("rand", seed, *probe_encoder(path, volumes, modality, cache, seed)))
    for (row, seed), path in checkpoints.items():
        probes.append(Probe(row, seed, *probe_encoder(path, volumes, modality, cache)))
    if probes:
        save(out, "probe", table(probes), probes)


def table(probes):
    """Format the mean over seeds of each row."""
    lines = []
    for row, part in group(probes, "row").items():
        linear = np.mean([one.linear_probe for one in part])
        nearest = np.mean([one.nearest_neighbour for one in part])
        lines.append([row, f"{linear:.3f}", f"{nearest:.3f}", len(part), part[0].n])
    head = ["row", "linear probe, balanced accuracy", "nearest neighbour of the same organ",
            "seeds", "n"]
    return scoring.markdown(head, lines)


def probe_encoder(path, volumes, modality, cache, random_seed=None):
    """Probe one encoder: (linear probe, nearest neighbour, cases scored)."""
    encoder, config = load_encoder(path, random_seed)
    settings = data.Preparation(tuple(config["spacing"]), modality, tuple(config["hu_window"]))
    classes = max(data.label_names(volumes) or {13: ""}) + 1

    def read(split):
        for case in data.read_list(volumes, split):
            image, label = data.cached(case, settings, cache, True, classes)
            yield tokens(encoder, np.array(image), np.array(label))

    features, organs = map(torch.cat, zip(*read("training")))
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    features = (features - mean) / deviation
    weights = fit_linear(features, organs, classes)
    chosen = some_of_each(organs, BANK)
    bank, bank_organs = F.normalize(features[chosen], dim=1), organs[chosen]

    linear, nearest, cases = Hits(classes), Hits(classes), 0
    for features, organs in read("validation"):
        features = (features - mean) / deviation
        linear.count(apply_linear(features, weights).argmax(1), organs)
        asked = some_of_each(organs, QUERIES)
        similarity = F.normalize(features[asked], dim=1) @ bank.T
        nearest.count(bank_organs[similarity.argmax(1)], organs[asked])
        cases += 1
    return linear.balanced_accuracy(), nearest.balanced_accuracy(), cases


def load_encoder(path, random_seed=None):
    """Load a student.pt: (encoder in eval mode, settings of its run).

    random_seed: draw the weights from it in place of loading them.
    """
    state = runtime.load_checkpoint(path)
    torch.manual_seed(random_seed or 0)
    student = pretrain.build_student(state["config"])
    if random_seed is None:
        student.load_state_dict(state["model"])
    return student.encoder.eval(), state["config"]


@torch.no_grad()
def tokens(encoder, image, label):
    """Compute the features (n, C) of a prepared volume's tokens, and read their organs (n,)."""
    side = encoder.patch * 2 ** (len(encoder.stages) - 1)
    padding = [(0, -size % side) for size in image.shape]
    image, label = np.pad(image, padding), np.pad(label, padding)

    stages = range(len(encoder.stages))
    maps = encoder(torch.from_numpy(image)[None, None] / 255, wanted=stages)[:-1]
    grid = maps[0].shape[2:]
    maps = torch.cat([F.interpolate(stage, size=grid) for stage in maps], 1)   # (1, C, d, h, w)

    last = slice(encoder.patch - 1, None, encoder.patch)
    organs = torch.from_numpy(label[last, last, last].astype(np.int64))        # (d, h, w)
    return maps[0].flatten(1).T.cpu(), organs.flatten()


def some_of_each(organs, most):
    """Choose up to `most` tokens of each organ, evenly spread, without a draw: their indices."""
    chosen = []
    for organ in organs.unique():
        places = (organs == organ).nonzero()[:, 0]
        chosen.append(places[torch.linspace(0, len(places) - 1, min(most, len(places))).long()])
    return torch.cat(chosen)


def fit_linear(features, organs, classes):
    """Fit one-hot organs by least squares with a ridge, each organ weighing alike.

    features (n, C), organs (n,) -> weights (C + 1, classes) float64, the last row for a constant.
    """
    x = with_constant(features)
    weight = 1 / organs.bincount(minlength=classes).clamp(min=1).double()
    weighted = x * weight[organs, None]
    squares = x.T @ weighted
    ridge = .01 * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
    return torch.linalg.solve(squares + ridge, weighted.T @ F.one_hot(organs, classes).double())


def apply_linear(features, weights):
    """Compute the scores (n, classes) of features (n, C)."""
    return with_constant(features) @ weights


def with_constant(features):
    return F.pad(features, (0, 1), value=1).double()


class Hits:
    """Counts of right guesses and of all, class by class."""

    def __init__(self, classes):
        self.right = torch.zeros(classes)
        self.all = torch.zeros(classes)

    def count(self, guesses, truth):
        """Add guesses (n,) of the truth (n,)."""
        classes = len(self.all)
        self.right += truth[guesses == truth].bincount(minlength=classes)
        self.all += truth.bincount(minlength=classes)

    def balanced_accuracy(self):
        """Average the share of right guesses over the classes that there are."""
        return (self.right / self.all)[self.all > 0].mean().item()
