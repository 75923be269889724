"""Equations 1 to 4, centring, and the losses of the comparisons [SMIT 2]. Needs torch alone.

All losses are computed in float32, whatever the network ran in, and are means, so that their size depends neither on
the batch nor on the mask ratio: the paper prints sums, the release averages.

    B samples   N patch tokens   M hidden ones of the batch   K prototypes   hidden = masked = m_i of the paper
"""
import torch
from torch import distributed, nn
from torch.nn import functional as F


def mip_loss(pred, target, hidden):
    """Masked image prediction: the mean of |pred - target| over the hidden voxels [SMIT Eq. 1].

    pred, target (B, C, D, H, W), target in [0, 1]; hidden (B, D, H, W) or (B, 1, D, H, W) bool, at voxel resolution.
    """
    # differs: Eq. 1 as printed subtracts u outside the mask; m * (pred - u) is meant
    hidden = hidden if hidden.dim() == pred.dim() else hidden[:, None]
    count = hidden.expand_as(pred).sum()
    if count == 0:
        raise ValueError("no voxel is hidden, so masked image prediction has nothing to predict; raise the mask ratio")
    return ((pred.float() - target.float()).abs() * hidden).sum() / count


def sharpen(logits, temperature, center=0.0):
    """P = softmax((h(f(u)) - center) / temperature); only the teacher is centred [SMIT Eq. 3; DINO 3.1]."""
    return F.softmax((logits.float() - center) / temperature, dim=-1)


def cross_entropy(student_logits, teacher_logits, center, student_temp, teacher_temp):
    """- sum_K P_t log P_s for each token: (..., K) twice -> (...). No gradient reaches the teacher [DINO Eq. 2]."""
    target = sharpen(teacher_logits.detach(), teacher_temp, center)
    return -(target * F.log_softmax(student_logits.float() / student_temp, dim=-1)).sum(-1)


def mpd_loss(student_logits, teacher_logits, hidden, center, student_temp, teacher_temp):
    """Masked patch token distillation: student on the corrupted view, teacher on the same view, whole [SMIT Eq. 2].

    student_logits, teacher_logits (B, N, K); hidden (B, N) bool; center (K,). Mean over each sample's hidden tokens,
    then over samples. Visible tokens do not count.
    """
    per_sample = hidden.sum(dim=1)
    if (per_sample == 0).any():
        raise ValueError("a sample has no hidden token, so there is nothing to distil; raise the mask ratio")
    loss = cross_entropy(student_logits[hidden], teacher_logits[hidden], center, student_temp, teacher_temp)  # (M,)
    weight = (1 / per_sample)[:, None].expand(hidden.shape)[hidden] / len(hidden)                             # (M,)
    return (loss * weight).sum()


def itd_loss(student_logits, teacher_logits, center, student_temp, teacher_temp):
    """Image token distillation: student on one corrupted view, teacher on the *other* view, whole [SMIT Eq. 4].

    student_logits, teacher_logits (B, K), row b of both from the two views of one volume; center (K,).
    """
    # differs: the m_i and the sum over N tokens printed in Eq. 4 have no meaning for the one image token
    return cross_entropy(student_logits, teacher_logits, center, student_temp, teacher_temp).mean()


class Center(nn.Module):
    """Running mean of the teacher's logits, subtracted from them so that no prototype dominates [DINO Eq. 4].

    `collect` a batch's logits (or several micro-batches'), then `update` once a step: over all of them, and over ranks.
    """

    def __init__(self, dim, momentum=0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dim))
        self.collected = []

    @torch.no_grad()
    def collect(self, teacher_logits):
        """Keep the sum of logits (..., K) for the next update."""
        logits = teacher_logits.float().flatten(0, -2)
        self.collected.append(torch.cat([logits.sum(0), logits.new_tensor([len(logits)])]))  # (K + 1,), count last

    @torch.no_grad()
    def update(self, teacher_logits=None):
        """value = momentum * value + (1 - momentum) * mean logit of all ranks; returns the new value (K,)."""
        if teacher_logits is not None:
            self.collect(teacher_logits)
        total = torch.stack(self.collected).sum(0)
        self.collected.clear()
        # differs: the release averages over its own rank only, and leaves the centre out of its checkpoints
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
        mean = total[:-1] / total[-1]
        mean = torch.where(mean.isfinite().all(), mean, self.value)   # an overflow must not stay for good
        return self.value.lerp_(mean, 1 - self.momentum)

    def discard(self):
        """Forget what was collected: the step is not taken."""
        self.collected.clear()


def info_nce(predictions, keys, temperature=0.2):
    """Contrast of image tokens: each prediction against the keys of the micro-batch [MoCo v3 Alg. 1].

    predictions, keys (B, K), row b of both from the two views of one volume, B >= 4; keys carry no gradient.
    """
    # differs: the keys are this rank's micro-batch, where MoCo v3 gathers all ranks'; and both sides are centred on
    # their mean, in place of the batch norms inside MoCo v3's heads
    predictions, keys = (F.normalize(x.float() - x.float().mean(0), dim=-1) for x in (predictions, keys.detach()))
    scores = predictions @ keys.T / temperature
    return 2 * temperature * F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def dice_ce_loss(logits, label, smooth=1e-6):
    """Dice with squared denominators, background in, plus cross-entropy: the fine-tuning loss [release].

    logits (B, K, D, H, W); label (B, D, H, W) long. Dice per sample and class, then the mean.
    """
    B, K = logits.shape[:2]
    log_prob = logits.float().flatten(2).log_softmax(1)                                      # (B, K, N)
    label = label.flatten(1)                                                                 # (B, N)
    truth = log_prob.gather(1, label[:, None])[:, 0]           # each voxel's own class: no one-hot copy of K volumes
    # in float64, where a million voxels add up without rounding, on a GPU in whichever order
    per_class = lambda voxels: torch.zeros(B, K, dtype=torch.float64, device=label.device).scatter_add(
        1, label, voxels.double()).float()                                                   # (B, N) -> (B, K)
    total = log_prob.exp().square().sum(2) + per_class(torch.ones_like(truth))
    return (1 - 2 * per_class(truth.exp()) / (total + smooth)).mean() - truth.mean()
