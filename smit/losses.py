"""Equations 1 to 4, centring, and the loss of fine-tuning [SMIT 2]. Needs torch alone.

All losses are computed in float32, whatever the network ran in. All are means, so
that their size depends neither on the batch nor on the mask ratio: the paper prints
sums, the release averages.

Python queues work, and a GPU runs behind. To read one value, Python must wait for it.
So no loss reads a mask that lies on a GPU: an empty mask is refused on the CPU, and
`hidden_index` finds the hidden tokens there.

    B samples   N patch tokens   M hidden ones of the batch   K prototypes
    hidden = masked = m_i of the paper
"""
import torch
from torch import distributed, nn
from torch.nn import functional as F


# --------------------------------------------------------- masked image prediction
def mip_loss(pred, target, hidden):
    """Average |pred - target| over the hidden voxels: masked image prediction [SMIT Eq. 1].

    pred, target (B, C, D, H, W), target in [0, 1].
    hidden (B, D, H, W) or (B, 1, D, H, W) bool, at voxel resolution.
    Raises ValueError for a mask on the CPU that hides nothing; on a GPU it gives NaN.
    """
    if hidden.dim() < pred.dim():
        hidden = hidden[:, None]
    if not hidden.is_cuda and not hidden.any():
        raise ValueError("no voxel is hidden, so masked image prediction has nothing to predict; "
                         "raise the mask ratio")
    count = hidden.expand_as(pred).sum()
    error = (pred.float() - target.float()).abs()                          # (B, C, D, H, W)
    # differs: Eq. 1 as printed subtracts u outside the mask; m * (pred - u) is meant
    return (error * hidden).sum() / count


# --------------------------------------------------------------- self-distillation
def sharpen(logits, temperature, center=0.0):
    """Turn logits into probabilities [SMIT Eq. 3; DINO 3.1].

    P = softmax((h(f(u)) - center) / temperature); only the teacher is centred.
    """
    return F.softmax((logits.float() - center) / temperature, dim=-1)


def cross_entropy(student_logits, teacher_logits, center, student_temp, teacher_temp):
    """Compute -sum_K P_t log P_s for each token: (..., K) twice -> (...) [DINO Eq. 2].

    No gradient reaches the teacher.
    """
    target = sharpen(teacher_logits.detach(), teacher_temp, center)
    log_p = F.log_softmax(student_logits.float() / student_temp, dim=-1)
    return -(target * log_p).sum(-1)


def hidden_index(hidden):
    """Find the hidden tokens: (B, N) bool -> (M,) long, their places in the flattened batch.

    Give it the mask before that goes to a GPU. ValueError for a sample without any.
    """
    if not hidden.any(dim=1).all():
        raise ValueError("a sample has no hidden token, so there is nothing to distil; "
                         "raise the mask ratio")
    return hidden.flatten().nonzero().squeeze(1)


def mpd_loss(student_logits, teacher_logits, hidden, center, student_temp, teacher_temp,
             index=None):
    """Distil the hidden patch tokens: masked patch token distillation [SMIT Eq. 2].

    The student saw the corrupted view, the teacher the same view, whole.
    student_logits, teacher_logits (B, N, K); hidden (B, N) bool; center (K,).
    index (M,): hidden_index(hidden), made on the CPU. Without it, it is made here,
        and a GPU is waited for.
    Returns the mean over each sample's hidden tokens, then over samples. Visible
    tokens do not count.
    """
    if index is None:
        index = hidden_index(hidden)
    student = student_logits.flatten(0, 1).index_select(0, index)          # (M, K)
    teacher = teacher_logits.flatten(0, 1).index_select(0, index)          # (M, K)
    loss = cross_entropy(student, teacher, center, student_temp, teacher_temp)

    # differs: Eq. 2 is printed as a sum; like the release, this is the mean over a
    # sample's hidden tokens, then over samples
    share = 1 / hidden.sum(dim=1, keepdim=True) / len(hidden)              # (B, 1)
    weight = share.expand(hidden.shape).flatten().index_select(0, index)   # (M,)
    return (loss * weight).sum()


def itd_loss(student_logits, teacher_logits, center, student_temp, teacher_temp):
    """Distil the image tokens: image token distillation [SMIT Eq. 4].

    The student saw one corrupted view, the teacher the *other* view, whole.
    student_logits, teacher_logits (B, K), row b of both from the two views of one
    volume; center (K,). Returns the mean over samples.
    """
    # differs: the m_i and the sum over N tokens printed in Eq. 4 have no meaning for
    # the one image token
    loss = cross_entropy(student_logits, teacher_logits, center, student_temp, teacher_temp)
    return loss.mean()


class Center(nn.Module):
    """Follow the mean of the teacher's logits [DINO Eq. 4].

    It is subtracted from them so that no prototype dominates.
    `collect` the logits of one or several micro-batches, then `update` once a step:
    over all of them, and over all ranks.
    """

    def __init__(self, dim, momentum=0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dim))
        self.collected = []

    @torch.no_grad()
    def collect(self, teacher_logits):
        """Keep the sum and the number of logits (..., K) for the next update."""
        logits = teacher_logits.float().flatten(0, -2)
        count = logits.new_full((1,), len(logits))
        self.collected.append(torch.cat([logits.sum(0), count]))           # (K + 1,)

    @torch.no_grad()
    def update(self, teacher_logits=None):
        """Move the value towards the mean logit of all ranks, and return it, (K,).

        value = momentum * value + (1 - momentum) * mean.
        """
        if teacher_logits is not None:
            self.collect(teacher_logits)
        total = torch.stack(self.collected).sum(0)                         # (K + 1,)
        self.collected.clear()
        # differs: the release averages over its own rank only, and leaves the centre
        # out of its checkpoints
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
        mean = total[:-1] / total[-1]

        # an infinite logit must not stay in the centre for good
        mean = torch.where(mean.isfinite().all(), mean, self.value)
        return self.value.lerp_(mean, 1 - self.momentum)

    def discard(self):
        """Forget what was collected: the step is not taken."""
        self.collected.clear()


# --------------------------------------------------------------------- fine-tuning
def dice_ce_loss(logits, label, smooth=1e-6, background_weight=1.0, dice_on="all"):
    """Add Dice with squared denominators and cross-entropy [release].

    logits (B, K, D, H, W); label (B, D, H, W) long, 0 the background. Dice is taken
    per sample and class, then averaged; dice_on="organs" leaves the background out.
    background_weight: of the background's voxels in the mean of the cross-entropy.
    The release has 1 and "all"; less makes a network leave "all is background" sooner.
    """
    classes = logits.shape[1]
    label = label.flatten(1)                                               # (B, N voxels)
    log_p = logits.float().flatten(2).log_softmax(dim=1)                   # (B, K, N)
    # of each voxel's own class
    log_p_true = log_p.gather(1, label[:, None]).squeeze(1)                # (B, N)

    # sums over the voxels of each class, without a one-hot copy of K volumes
    overlap = sum_by_class(log_p_true.exp(), label, classes)               # (B, K)
    label_size = sum_by_class(torch.ones_like(log_p_true), label, classes)
    pred_size = log_p.exp().square().sum(dim=2)                            # (B, K)

    dice = 2 * overlap / (pred_size + label_size + smooth)
    if dice_on == "organs":
        dice = dice[:, 1:]
    if background_weight == 1:
        cross_entropy = -log_p_true.mean()
    else:
        weight = torch.where(label == 0, background_weight, 1.0)           # (B, N)
        cross_entropy = -(weight * log_p_true).sum() / weight.sum()
    return (1 - dice).mean() + cross_entropy


def sum_by_class(values, label, classes):
    """Add up the values of each class: values, label (B, N) -> (B, classes) float32.

    In float64, so that a million voxels add up to float32's last digit or nearly, in
    whichever order a GPU takes them.
    """
    sums = torch.zeros(len(values), classes, dtype=torch.float64, device=values.device)
    return sums.scatter_add(1, label, values.double()).float()
