"""Reconstruct masked volumes that pre-training has not seen: Figure 5 [SMIT 3].

Reading order: fig5, one volume, its errors, what needs no network.
"""
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from smit import data, figures, inference, metrics, pretrain, scoring
from smit.data.organs import case_name
from smit.data.samples import ViewPairs
from smit.masking import expand_mask
from smit.study.scores import estimate_mean, group
from smit.study.tables import save

MASK_RATIO = .7                        # [SMIT Fig. 5]
PAPER_MSE = {                          # [SMIT 3]
    ("smit", "ct"): .061,
    ("ml-smit", "ct"): .32,
    ("smit", "mr"): .062,
    ("ml-smit", "mr"): .34,
}


class Errors(NamedTuple):
    """Mean squared errors on the hidden voxels of one volume's two views, intensities in [0, 1]."""
    row: str
    seed: int
    modality: str
    case: str
    mse: float                         # of the network
    mse_visible_mean: float            # of the mean of each view's visible voxels
    mse_hidden_mean: float             # of the mean of the hidden ones: the best single grey value
    mse_interpolated: float


@torch.no_grad()
def fig5(out, checkpoints, lists, cache):
    """Measure masked image prediction on unseen volumes [SMIT Fig. 5].

    checkpoints {(row, seed): student.pt}; lists {modality: dataset.json or folder}. Writes
    fig5.md, cases.csv, and a panel of the first volume for each row and modality.
    """
    rows, odd = [], []
    first_seed = min((seed for _, seed in checkpoints), default=None)
    for (row, seed), path in checkpoints.items():
        print(f"fig5: {row}, seed {seed}", flush=True)
        student, config = pretrain.load_student(path)
        for modality, volumes in lists.items():
            samples = masked_views(unseen(volumes, modality), config, modality, cache)
            for number, case in enumerate(samples.cases):
                sample = views_of(samples, number)
                odd += sample["concerns"]
                views, hidden, voxels = reconstruct(student, sample, config["mask_cell"])
                rows.append(Errors(row, seed, modality, case_name(case["image"]),
                                   *errors(views, hidden, voxels)))
                if number == 0 and seed == first_seed:
                    out.mkdir(parents=True, exist_ok=True)
                    figures.reconstruction_panel(
                        out / f"{row}-{modality}.svg", views[0, 0], hidden[0, 0], voxels[0, 0],
                        config["spacing"], f"{row}, {modality}, not trained on")
    data.tell(odd)
    if rows:
        save(out, "fig5", table(rows), rows)


def table(rows):
    """Format mean errors over cases, seeds averaged case by case, with intervals over cases."""
    lines = []
    for (row, modality), part in group(rows, "row", "modality").items():
        line = [row, modality, len(group(part, "case")), len(group(part, "seed"))]
        for name in ("mse", "mse_visible_mean", "mse_hidden_mean", "mse_interpolated"):
            by_case = [mean_of(some, name) for some in group(part, "case").values()]
            mean, low, high = estimate_mean(by_case)
            line.append(f"{mean:.4f} ({low:.4f}-{high:.4f})")
        lines.append([*line, PAPER_MSE.get((row, modality), "")])
    head = ["row", "modality", "n", "seeds", "MSE, 95 %", "visible mean", "hidden mean",
            "interpolated", "paper"]
    return scoring.markdown(head, lines)


def mean_of(rows, name):
    return np.mean([getattr(row, name) for row in rows])


def unseen(path, modality):
    """List the volumes to reconstruct: the validation split, if there is one.

    MR, which no pre-training here sees, may do without: then all volumes. ValueError for CT
    without, and for a faulty list.
    """
    if data.has_split(path, "validation"):
        return data.read_list(path, "validation")
    cases = data.read_list(path)
    if modality == "ct":
        raise ValueError(f"{path}: has no validation split, and pre-training may have seen the "
                         "rest; give fig5 a dataset.json with cases under 'validation'")
    return cases


# ------------------------------------------------------------------------------------- one volume
def masked_views(cases, config, modality, cache):
    """Prepare two masked views of each case, as in pre-training: sample i is of case i."""
    settings = inference.preparation_of_run(config, modality)
    return ViewPairs(cases, settings, cache, config["crop"], config["view"], config["mask_cell"],
                     MASK_RATIO, split="val")


def views_of(samples, number):
    """Return a sample of `masked_views`; ValueError if its volume cannot be read.

    In training the next volume takes its place; here its errors would stand in another's row.
    """
    sample = samples.sample(number)
    if sample["skipped"]:
        raise ValueError(sample["skipped"][0])
    return sample


def reconstruct(student, sample, cell):
    """Predict two masked views: (views, hidden, voxels), each (2, 1, D, H, W), hidden bool.

    cell: voxels per axis of a mask cell.
    """
    views = sample["views"] / 255                                       # (2, 1, D, H, W)
    hidden = expand_mask(sample["hidden"], cell)[:, None]               # (2, 1, D, H, W)
    return views, hidden, student.reconstruct(views, sample["hidden"], cell).cpu()


def errors(views, hidden, voxels):
    """List the mean squared errors of the network and of the three that need none, as in Errors."""
    visible_mean = mean_where(views, ~hidden).expand_as(views)
    hidden_mean = mean_where(views, hidden).expand_as(views)
    guesses = (voxels, visible_mean, hidden_mean, interpolated(views, hidden))
    return [metrics.mse(guess, views, hidden) for guess in guesses]


def mean_where(views, mask):
    """Average each view over the voxels where its mask is True: (B, 1, 1, 1, 1)."""
    means = [view[where].mean() for view, where in zip(views, mask)]
    return torch.stack(means)[:, None, None, None, None]


def interpolated(views, hidden):
    """Fill each hidden voxel of views (B, 1, D, H, W) with the mean of its neighbours [ours].

    The result is as smooth as the visible voxels allow: Laplace's equation, by Jacobi's method. A
    network that stays above its error predicts little but smoothness.
    """
    filled = torch.where(hidden, mean_where(views, ~hidden), views)
    change = 1.
    while change > 1e-4:
        before = filled
        padded = F.pad(filled, [1] * 6, mode="replicate")
        around = sum(padded.roll(step, axis) for step in (1, -1) for axis in (2, 3, 4)) / 6
        filled = torch.where(hidden, around[..., 1:-1, 1:-1, 1:-1], views)
        change = (filled - before).abs().max()
    return filled
