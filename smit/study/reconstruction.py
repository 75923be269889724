"""Masked volumes that pre-training has not seen, put together again: Figure 5 [SMIT 3]."""
import numpy as np
import torch
from torch.nn import functional as F

from smit import data, figures, metrics, pretrain, runtime, scoring
from smit.data import organs as organ_names, samples as sampling
from smit.masking import expand_mask
from smit.study.tables import by, mean_and_interval, save

PAPER_MSE = {("ct", "smit"): .061, ("ct", "ml-smit"): .32, ("mr", "smit"): .062, ("mr", "ml-smit"): .34}  # [SMIT 3]


@torch.no_grad()
def fig5(out, checkpoints, lists, cache):
    """MSE of masked image prediction on volumes that pre-training has not seen, beside what needs no network; panels.

    checkpoints {(row, seed): student.pt}; lists {modality: dataset.json, folder or None}; of a dataset.json the split
    "validation" is read, or where it lacks "training". Both views of each volume, hidden as in training. Beside it: the
    mean of what is visible; the mean of what is hidden, the best that one grey value can do; interpolation.
    """
    rows = []
    for (name, seed), path in checkpoints.items():
        state = runtime.load_checkpoint(path)
        config = state["config"]
        student = pretrain.build_student(config).eval()
        student.load_state_dict(state["model"])
        for modality, listed in lists.items():
            if not listed:
                continue
            samples = sampling.ViewPairs(
                unseen(listed), data.Preparation(tuple(config["spacing"]), modality, tuple(config["hu_window"])), cache,
                config["crop"], config["view"], config["mask_cell"], .7, split="val")                   # [SMIT Fig. 5]
            for number, case in enumerate(samples.cases):
                views, cells = (samples[number][key] for key in ("views", "hidden"))
                views, hidden = views / 255, expand_mask(cells, config["mask_cell"])[:, None]       # (2, 1, D, H, W)
                voxels = student(views, expand_mask(cells, config["mask_cell"] // student.encoder.patch)).voxels.cpu()
                visible, best = (torch.stack([v[h].mean() for v, h in zip(views, where)]).view(2, 1, 1, 1, 1)
                                 for where in (~hidden, hidden))
                rows.append({"row": name, "seed": seed, "modality": modality, "case": organ_names.case_name(case["image"]),
                             "mse": metrics.mse(voxels, views, hidden),
                             "mse_visible_mean": metrics.mse(visible.expand_as(views), views, hidden),
                             "mse_hidden_mean": metrics.mse(best.expand_as(views), views, hidden),
                             "mse_interpolated": metrics.mse(interpolated(views, hidden), views, hidden)})
                if number == 0 and seed == min(s for _, s in checkpoints):
                    out.mkdir(parents=True, exist_ok=True)
                    figures.reconstruction_panel(out / f"{name}-{modality}.png", views[0, 0], hidden[0, 0],
                                                 voxels[0, 0], config["spacing"], f"{name}, {modality}, not trained on")
    if not rows:
        return
    body = []
    for (name, modality), some in by(rows, "row", "modality").items():
        parts = [mean_and_interval([np.mean([r[score] for r in more]) for more in by(some, "case").values()])
                 for score in ("mse", "mse_visible_mean", "mse_hidden_mean", "mse_interpolated")]
        body.append([name, modality, len(by(some, "case")), len(by(some, "seed")),
                     *(f"{mean:.4f} ({low:.4f}-{high:.4f})" for mean, low, high in parts),
                     PAPER_MSE.get((modality, name), "")])
    head = ["row", "modality", "n", "seeds", "MSE, 95 %", "visible mean", "hidden mean", "interpolated", "paper"]
    save(out, "fig5", [scoring.markdown(head, body)], rows)


def interpolated(views, hidden):
    """Views (B, 1, D, H, W), each hidden voxel the mean of its neighbours: as smooth as what is visible allows.

    A network that stays above this predicts little but smoothness. Laplace's equation by Jacobi's method [ours].
    """
    visible = torch.stack([v[~h].mean() for v, h in zip(views, hidden)])[:, None, None, None, None]
    filled, change = torch.where(hidden, visible, views), 1.
    while change > 1e-4:
        before, padded = filled, F.pad(filled, [1] * 6, mode="replicate")
        around = sum(padded.roll(step, axis) for step in (1, -1) for axis in (2, 3, 4)) / 6
        filled = torch.where(hidden, around[..., 1:-1, 1:-1, 1:-1], views)
        change = (filled - before).abs().max()
    return filled


def unseen(path):
    """Cases of a list: the validation split where it has one."""
    try:
        return data.read_list(path, "validation")
    except ValueError:
        return data.read_list(path)
