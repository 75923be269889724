"""Watch pre-training: signs of collapse, and MIP on held-back volumes [ours]."""
import math

import torch

from smit.losses import sharpen
from smit.masking import expand_mask


# --------------------------------------------------------------------- collapse
@torch.no_grad()
def collapse(from_teacher, centers, teacher_temp, ranks):
    """Measure the signs of collapse in one micro-batch of the teacher's.

    from_teacher: its Outputs; centers {"mpd": Center, "itd": Center}, as far as
    their losses are on; ranks: of `runtime.start`, all of which must call this.
    Returns {name: number or tensor of one} for `Ranks.mean_of`: the effective rank of
    the tokens, and for both heads the two entropies and the centre's norm, with the
    centres as they are after the step.
    """
    row = {"effective_rank": effective_rank(from_teacher.tokens)}
    for name, logits in (("mpd", from_teacher.patch_logits), ("itd", from_teacher.image_logits)):
        if logits is None:
            continue
        center = centers[name].value
        each, mean = entropies(logits, center, teacher_temp, ranks.mean)
        row[f"{name}_entropy"] = each
        row[f"{name}_mean_entropy"] = mean
        row[f"{name}_center"] = center.norm()
    return row


@torch.no_grad()
def entropies(logits, center, temperature, over_ranks=None):
    """Compare the entropy of single tokens with that of their mean, both as shares of ln K.

    logits (..., K), n of them; over_ranks: averages a tensor over ranks, by default
    there is one rank. Returns (mean entropy of the tokens, entropy of the mean token),
    tensors of one number.
    Uniform outputs give (1, 1), collapse to one prototype (0, 0). One wants the
    second well above the first; it can exceed it by ln(n) / ln(K) at most, n over
    all ranks.
    """
    p = sharpen(logits, temperature, center).flatten(0, -2)                # (n, K)
    mean = p.mean(0)                                                       # (K,)
    if over_ranks is not None:
        mean = over_ranks(mean)
    return entropy_share(p), entropy_share(mean)


def entropy_share(p):
    """Average -sum p log p over all distributions (..., K), as a share of ln K."""
    entropy = -(p * p.clamp_min(1e-30).log()).sum(-1)
    return entropy.mean().double() / math.log(p.shape[-1])


@torch.no_grad()
def effective_rank(tokens):
    """Count the dimensions in use: tokens (B, N, C) -> between 1 and C [Roy & Vetterli].

    This is exp of the entropy of the normed eigenvalues of the tokens' covariance.
    Below about 2 the features have collapsed.
    """
    x = tokens.float().flatten(0, 1)
    x = x - x.mean(0)
    covariance = (x.T @ x).cpu().double()                                  # (C, C), times n
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp_min(0)
    p = eigenvalues / eigenvalues.sum().clamp_min(1e-30)
    entropy = -(p * p.clamp_min(1e-30).log()).sum()
    return torch.exp(entropy).item()


# ------------------------------------------------------ held-back volumes
@torch.no_grad()
def masked_image_errors(student, batches, cell, count_all, device, autocast, ranks):
    """Measure masked image prediction on held-back volumes, and two guesses without anatomy [ours].

    batches: this rank's share of a samples.Batches of ViewPairs; cell: voxels per axis
    of a mask cell; count_all: score visible voxels too, for full image
    reconstruction. All ranks must call this. It leaves the student in train mode.
    Returns a dict of means over the scored voxels of all ranks, grey values in [0, 1]:
        val_mip        L1 of the student, as Eq. 1
        val_mse        mean squared error of the student
        val_constant   L1 of the best single grey value
        val_median     L1 of each view's visible median
    """
    sums = torch.zeros(4, dtype=torch.float64)        # L1, L2, L1 of the median, voxels scored
    histogram = torch.zeros(256, dtype=torch.float64)                      # of scored grey values
    student.eval()
    for batch in batches:
        views = batch["views"].flatten(0, 1)                               # (2B, 1, D, H, W) uint8
        cells = batch["hidden"].flatten(0, 1)                              # (2B, d, h, w)
        with autocast():
            voxels = student.reconstruct(views.to(device, non_blocking=True) / 255,
                                         cells.to(device, non_blocking=True), cell)
        voxels = voxels.float().cpu()

        hidden = expand_mask(cells, cell)[:, None]                         # (2B, 1, D, H, W)
        scored = torch.ones_like(hidden) if count_all else hidden
        medians = torch.stack([visible_median(view, mask) for view, mask in zip(views, hidden)])
        medians = medians.float().view(-1, 1, 1, 1, 1)
        error = (voxels - views / 255)[scored]
        median_error = (medians - views)[scored] / 255
        sums += torch.stack([error.abs().sum(), error.square().sum(),
                             median_error.abs().sum(), scored.sum()])
        histogram += torch.bincount(views[scored].long(), minlength=256)
    student.train()

    # means over ranks, of which only the quotients count
    sums, histogram = ranks.mean(torch.cat([sums, histogram]).to(device)).cpu().split([4, 256])
    l1, l2, median_l1, count = sums.clamp_min(1e-30).tolist()       # 0: none was left to measure
    return {"val_mip": l1 / count,
            "val_mse": l2 / count,
            "val_constant": constant_l1(histogram) / count,
            "val_median": median_l1 / count}


def visible_median(view, hidden):
    """Take the median of a view's visible voxels, or of all where none is visible."""
    if hidden.all():
        return view.median()
    return view[~hidden].median()


def best_constant(histogram):
    """Find the grey value of least L1 error to all voxels of a histogram (256,): their median."""
    return torch.searchsorted(histogram.cumsum(0), histogram.sum() / 2)


def constant_l1(histogram):
    """Sum up the L1 error of the best constant over a histogram's voxels, grey values in [0, 1]."""
    distance = (torch.arange(256) - best_constant(histogram)).abs()
    return (histogram * distance).sum().item() / 255
