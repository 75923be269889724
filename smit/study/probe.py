"""Ask frozen encoders what they know of organs, without training a decoder [ours].

A token is its features of all stages at the resolution of the first one (2^3 voxels); its organ is
that of its last voxel. Two classifiers that need no search are fitted on the tokens of the labelled
training volumes: least squares, and k nearest neighbours. They are asked twice. *Tokens*: every
class counts alike, the background too. *Segmentation*: the classes' scores, brought to the grid of
the case's file, make a label map, scored as fine-tuned networks are.

Tokens are kept of one volume at a time. With the paper's sizes they are 720 numbers for each of
its 2^3 voxels, some 4 GB a volume.

Reading order: probe and its tables, one encoder, tokens, the two classifiers, segmentation.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from smit import data, inference, metrics, pretrain, scoring
from smit.data.organs import case_name, numbered, organ_ids
from smit.data.samples import nested_subset
from smit.study import power
from smit.study.scores import (
    Score, as_array, dice_by_case, dice_by_organ, dice_by_seed_and_case, estimate_mean, group,
    write, write_csv)
from smit.transforms import crop_affine, to_file_grid

BANK = 150                             # tokens of each organ to look for neighbours among
QUERIES = 60                           # tokens of each organ to ask for in each case
TOKENS = 50_000                        # that are worked on at a time, for the memory
NEIGHBOURS = 20                        # that vote for a token's organ [DINO]
TEMPERATURE = .07                      # of a neighbour's vote, exp(cosine / temperature) [DINO]
# How much rarer classes weigh in segmentation, from 0 (as often as they come: no small organ is
# found) to 1 (all alike: small organs are found everywhere). Of 0, .25, .5, .75 and 1, .75 was best
# for both classifiers on training volumes of BTCV (3 to fit, 4 to ask, one encoder at 6 mm) [ours]
BALANCE = .75
CLASSIFIERS = ("linear", "k-NN")       # the recipes of Score
NOTE = f"""Linear and nearest: tokens, all classes alike (balanced accuracy; share whose nearest
neighbour is of the same organ). Segmentation: DSC on the original grid, background excluded;
intervals: bootstrap over cases, or over seeds and cases where there are several seeds. k-NN:
k = {NEIGHBOURS}.
"""


class Settings(NamedTuple):
    """What encoders are asked about."""
    volumes: str                       # dataset.json with training and validation
    modality: str
    labels: list                       # numbers of labelled training volumes; None: all
    draws: list                        # seeds of their draw; None: the encoder's seed
    cache: str
    data_root: str = None              # folder of the files that a list names; None: the list's


class Probe(NamedTuple):
    """What the tokens of one encoder know, over all held-back cases."""
    row: str
    labels: int
    seed: int
    draw: int
    linear_probe: float                # balanced accuracy
    nearest_neighbour: float           # share whose nearest neighbour is of the same organ
    n: int                             # cases


def probe(out, checkpoints, with_random, settings):
    """Probe the encoders of {(row, seed): student.pt}: probe.md, tokens.csv and cases.csv.

    with_random: probe the architecture of each seed's last encoder with random weights, too, as
    the row "rand".
    """
    encoders = []
    if with_random:
        path_of_seed = {seed: path for (_, seed), path in checkpoints.items()}
        encoders += [("rand", seed, path) for seed, path in path_of_seed.items()]
    encoders += [(row, seed, path) for (row, seed), path in checkpoints.items()]

    probes, scores = [], []
    for row, seed, path in encoders:
        print(f"probe: {row}, seed {seed}", flush=True)
        encoder, config = load_encoder(path, seed if row == "rand" else None)
        for labels in settings.labels:
            for draw in settings.draws:
                found, segmented = probe_encoder(encoder, config, settings, row, labels, seed, draw)
                probes.append(found)
                scores += segmented
    if probes:
        write_csv(out / "tokens.csv", probes)
        write_csv(out / "cases.csv", scores)
        write(out / "probe.md", table(probes, scores) + "\n" + organ_tables(scores) + NOTE)


def table(probes, scores):
    """Format the means over seeds of each row and number of labels."""
    lines = []
    segmented = group(scores, "row", "labels", "recipe")
    for (row, labels), part in group(probes, "row", "labels").items():
        line = [row, "all" if labels is None else labels]
        line.append(f"{np.mean([one.linear_probe for one in part]):.3f}")
        line.append(f"{np.mean([one.nearest_neighbour for one in part]):.3f}")
        for classifier in CLASSIFIERS:
            line += dsc_cells(segmented[row, labels, classifier])
        lines.append([*line, len(group(part, "seed")), part[0].n])
    head = ["row", "labelled volumes", "linear probe", "nearest neighbour"]
    for classifier in CLASSIFIERS:
        head += [f"{classifier} segmentation, DSC", "95 %"]
    return scoring.markdown([*head, "seeds", "n"], lines)


def dsc_cells(scores):
    """Format the mean Dice and its interval, over seeds and cases if there are several seeds."""
    seeds = list(dice_by_seed_and_case(scores).values())
    if len(seeds) > 1:
        values = as_array(seeds)
        mean = np.nanmean(values)
        low, high = power.bootstrap_seeds_and_cases(values)
    else:
        mean, low, high = estimate_mean(list(dice_by_case(scores).values()))
    return [f"{mean:.3f}", f"{low:.3f}-{high:.3f}"]


def organ_tables(scores):
    """Format the segmentations' Dice by organ: rows, labels and classifiers down."""
    lines = []
    head = []
    for key, part in group(scores, "row", "labels", "recipe").items():
        organs = dice_by_organ(part)
        head = ["row", "labelled volumes", "classifier", *organs]
        means = [f"{float(scoring.finite_mean(values)):.3f}" for values in organs.values()]
        row, labels, classifier = key
        lines.append([row, "all" if labels is None else labels, classifier, *means])
    return scoring.markdown(head, lines) + "\n"


# ------------------------------------------------------------------------------------ one encoder
def load_encoder(path, random_seed=None):
    """Load a student.pt: (encoder in eval mode, settings of its run).

    random_seed: draw the weights from it in place of loading them.
    """
    student, config = pretrain.load_student(path)
    if random_seed is not None:
        torch.manual_seed(random_seed)
        student = pretrain.build_student(config).eval()
    return student.encoder, config


def probe_encoder(encoder, config, settings, row, labels, seed, draw):
    """Probe one encoder on one draw of labelled volumes: (Probe, list of Score)."""
    preparation = inference.preparation_of_run(config, settings.modality)
    names = data.label_names(settings.volumes) or numbered(14)
    classes = max(names) + 1
    training = data.read_list(settings.volumes, "training", settings.data_root)
    if labels is not None:                             # the volumes that fine-tuning would take
        training = nested_subset(training, labels, seed if draw is None else draw)

    images, organs, odd = [], [], []                   # images stay on the disk
    for case in training:
        image, label, concerns = data.cached_with_concerns(case, preparation, settings.cache, True,
                                                           classes)
        odd += concerns
        images.append(image)
        organs.append(token_organs(encoder, np.array(label)).flatten())
    volumes = (flat(tokens(encoder, np.array(image))) for image in images)
    frozen = Classifiers(volumes, organs, classes)

    linear, nearest, cases, scores = Hits(classes), Hits(classes), 0, []
    for case in data.read_list(settings.volumes, "validation", settings.data_root):
        prepared = data.load_case(case, preparation, True, classes)
        odd += prepared["concerns"]
        maps = tokens(encoder, prepared["image"].numpy())               # (C, d, h, w)
        truth = token_organs(encoder, prepared["label"].numpy()).flatten()
        guesses, chosen, neighbours = frozen.ask(flat(maps), truth)
        linear.count(guesses, truth)
        nearest.count(neighbours, truth[chosen])
        cases += 1
        for classifier in CLASSIFIERS:
            label = segment(frozen, classifier, maps, encoder.patch, prepared)
            dices = organ_dice(label, prepared["original_affine"], case, names)
            for organ, dice in dices.items():
                scores.append(Score(row, labels, seed, None, None, settings.modality, draw,
                                    classifier, case_name(case["image"]), organ, dice))
    data.tell(odd)
    found = Probe(row, labels, seed, draw, linear.balanced_accuracy(), nearest.balanced_accuracy(),
                  cases)
    return found, scores


# ----------------------------------------------------------------------------------------- tokens
@torch.no_grad()
def tokens(encoder, image):
    """Compute the features of a prepared volume's tokens: (C, d, h, w), padding included."""
    stages = range(len(encoder.stages))
    padded = torch.from_numpy(pad(encoder, image))[None, None] / 255
    maps = encoder(padded, wanted=stages)[:-1]
    grid = maps[0].shape[2:]
    return torch.cat([F.interpolate(stage, size=grid) for stage in maps], 1)[0].cpu()


def token_organs(encoder, label):
    """Read the organ of each token's last voxel: (d, h, w) long."""
    last = slice(encoder.patch - 1, None, encoder.patch)
    return torch.from_numpy(pad(encoder, label)[last, last, last].astype(np.int64))


def pad(encoder, volume):
    """Pad a volume with zeros at its ends, to whole tokens of the last stage."""
    side = encoder.patch * 2 ** (len(encoder.stages) - 1)
    return np.pad(volume, [(0, -size % side) for size in volume.shape])


def flat(maps):
    """Turn feature maps (C, d, h, w) into tokens (n, C)."""
    return maps.flatten(1).T


def some_of_each(organs, most):
    """Choose up to `most` tokens of each organ, evenly spread, without a draw: their indices."""
    chosen = []
    for organ in organs.unique():
        places = (organs == organ).nonzero()[:, 0]
        chosen.append(places[torch.linspace(0, len(places) - 1, min(most, len(places))).long()])
    return torch.cat(chosen)


# ------------------------------------------------------------------------------------ classifiers
class Classifiers:
    """Least squares and nearest neighbours, fitted on the tokens of some volumes.

    volumes: features (n, C) of each volume, which are asked for in turn and not kept; organs: a
    list of their organs (n,).
    """

    def __init__(self, volumes, organs, classes):
        every = torch.cat(organs)
        chosen = some_of_each(every, BANK).sort().values
        sums, bank, begin = 0, [], 0
        for features, own in zip(volumes, organs):
            sums = sums + class_sums(features, own, classes)
            end = begin + len(own)
            bank.append(features[chosen[(begin <= chosen) & (chosen < end)] - begin])
            begin = end

        self.mean, self.deviation = mean_and_deviation(sums)
        sums = normed_sums(sums, self.mean, self.deviation)
        self.alike = fit_linear(sums)
        self.weights = fit_linear(sums, BALANCE)

        self.bank = F.normalize(self.normed(torch.cat(bank)), dim=1)
        self.bank_organs = every[chosen]
        # each token of the bank stands for as many of its organ as it was chosen from
        counts = every.bincount(minlength=classes)
        shown = self.bank_organs.bincount(minlength=classes)
        self.stands_for = (counts / shown.clamp(min=1)) ** (1 - BALANCE)

    def normed(self, features):
        return (features - self.mean.float()) / self.deviation.float()

    def ask(self, features, organs):
        """Guess organs with all classes alike: (linear guesses (n,), chosen tokens, neighbours').

        The nearest neighbour is asked for some tokens of each organ only.
        """
        guesses = [apply_linear(self.normed(part), self.alike).argmax(1)
                   for part in features.split(TOKENS)]
        chosen = some_of_each(organs, QUERIES)
        similarity = F.normalize(self.normed(features[chosen]), dim=1) @ self.bank.T
        return torch.cat(guesses), chosen, self.bank_organs[similarity.argmax(1)]

    def scores(self, classifier, features):
        """Score the classes of tokens (n, C) for a segmentation: (n, classes)."""
        scores = []
        for part in features.split(TOKENS):
            part = self.normed(part)
            if classifier == "linear":
                scores.append(apply_linear(part, self.weights).float())
            else:
                scores.append(self.votes(part))
        return torch.cat(scores)

    def votes(self, features):
        """Count neighbours' votes for each class, as shares: (n, classes)."""
        similarity = F.normalize(features, dim=1) @ self.bank.T
        nearest, places = similarity.topk(min(NEIGHBOURS, len(self.bank)), dim=1)
        organs = self.bank_organs[places]                               # (n, k)
        weight = (nearest / TEMPERATURE).softmax(1) * self.stands_for[organs]
        votes = torch.zeros(len(features), len(self.stands_for)).scatter_add_(1, organs, weight)
        return votes / votes.sum(1, keepdim=True)


def class_sums(features, organs, classes):
    """Sum the products x x' of the tokens of each class, x with a constant: float64.

    features (n, C), organs (n,) -> (classes, C + 1, C + 1). The last column has sums of x, its last
    number counts tokens. Sums of several volumes add.
    """
    width = features.shape[1] + 1
    sums = torch.zeros(classes, width, width, dtype=torch.float64)
    for part, own in zip(features.split(TOKENS), organs.split(TOKENS)):
        for organ in own.unique():
            x = with_constant(part[own == organ])
            sums[organ] += x.T @ x
    return sums


def mean_and_deviation(sums):
    """Compute mean and deviation of all features from `class_sums`: (C,) each, float64."""
    sums = sums.sum(0)
    n = sums[-1, -1]
    mean = sums[:-1, -1] / n
    variance = (sums.diagonal()[:-1] - n * mean ** 2) / (n - 1)
    return mean, variance.clamp(min=0).sqrt() + 1e-6


def normed_sums(sums, mean, deviation):
    """Turn `class_sums` into those of features less this mean, over this deviation."""
    norm = torch.diag(F.pad(1 / deviation, (0, 1), value=1))            # x -> normed x
    norm[:-1, -1] = -mean / deviation
    return norm @ sums @ norm.T


def fit_linear(sums, balance=1.):
    """Fit one-hot organs by least squares with a ridge; balance: see BALANCE, 1 for all alike.

    sums: of `class_sums` -> weights (C + 1, classes) float64, the last row for a constant.
    """
    counts = sums[:, -1, -1]
    weighted = sums * (counts.clamp(min=1) ** -balance)[:, None, None]
    squares = weighted.sum(0)
    ridge = .01 * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
    return torch.linalg.solve(squares + ridge, weighted[:, :, -1].T)


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


# ----------------------------------------------------------------------------------- segmentation
def segment(frozen, classifier, maps, patch, prepared):
    """Segment a case: label map (X, Y, Z) uint8 on the grid of its file.

    maps (C, d, h, w): its tokens, of patch^3 voxels; prepared: of data.load_case.
    """
    d, h, w = (math.ceil(size / patch) for size in prepared["image"].shape)
    maps = maps[:, :d, :h, :w]                                          # without the padding
    scores = frozen.scores(classifier, flat(maps)).T.unflatten(1, (d, h, w))
    return to_file_grid(scores, last_voxel_affine(prepared["affine"], patch),
                        prepared["original_shape"], prepared["original_affine"])


def organ_dice(label, affine, case, names):
    """Score a label map against a case's label: {organ: Dice}, nan if absent from both.

    affine: the map's, which is that of the case's image. Its label's axes may run otherwise.
    """
    classes = max(names) + 1
    truth, truth_affine = data.read_label(case["label"], classes)
    label = data.onto_grid(label, affine, truth.shape, truth_affine)
    dice = metrics.dice(label, truth, classes)                          # of labels 1, 2, ...
    ids = organ_ids(names, case["label"])
    return {organ: float(dice[number - 1]) for organ, number in ids.items()}


def last_voxel_affine(affine, patch):
    """Place tokens where their organs were read, at their last voxels: the affine of their grid.

    A token's centre (`inference.token_affine`) would shift a segmentation by half a token.
    """
    affine = crop_affine(affine, [patch - 1] * 3)
    affine[:3, :3] *= patch
    return affine
