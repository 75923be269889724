"""Contrastive predictive coding, "CPC": predict the codes of the patches further on [SMIT 9].

Taleb et al., 3D Self-Supervised Methods for Medical Imaging, NeurIPS 2020, after the facts of their
released code [CPC]. A view is cut into a grid of overlapping patches. For each column of the grid,
a recurrent network reads the patches of the first rows, far ones first, and predicts the codes of
the others. The rows run along the last axis of the view, from inferior to superior [ours].
"""
import torch
from torch import nn

from smit.baselines.contrast import info_nce
from smit.baselines.task import Task, coin, u_then_v, whole
from smit.baselines.unet import Encoder

FLIP = 0.5               # of a patch's first axis [CPC]
SHRINK = 8               # one part in so many of a patch's sides is lost [CPC]


class CPC(Task):
    """CPC: the mean of InfoNCE over the rows that are predicted.

    view, patch: voxels per axis. Patches overlap by half, so 5 x 5 x 5 of 32^3 lie in a view of
    96^3.
    """
    # differs: the release cuts 4 x 4 x 4 of 32^3 from 128^3, without overlap. In 96^3 that would
    # leave one patch as context. With it half of the first target lies inside the column's own
    # patch: of the targets, three at 96^3, one is the easier for it
    terms = ("info_nce",)

    def __init__(self, width=64, patch=32, view=(96, 96, 96), code=1024, context=256):
        super().__init__()
        self.patch = patch
        # differs: the release's encoder has levels of 16 to 256, a fifth pooling and dropout
        self.encoder = Encoder(1, width)
        self.to_code = nn.Linear(self.encoder.channels[-1], code)
        self.recurrent = nn.GRU(code, context, batch_first=True)            # sizes [CPC]
        d, h, rows = (2 * side // patch - 1 for side in view)
        # buffers, or a GPU would wait for indices from the host; no weights, so they are not saved
        x, y, row, targets = places(d, h, rows)
        for name, index in (("x", x), ("y", y), ("row", row), ("targets", targets)):
            self.register_buffer(name, index, persistent=False)
        self.predictors = nn.ModuleList()
        for _ in targets:
            self.predictors.append(nn.Linear(context, code))

    def samples(self, views, rng):
        """Cut both views into augmented patches: (2, 5, 5, 5, 1, p, p, p)."""
        grids = []
        for view in views[:, 0]:
            patches = cut_patches(view, self.patch)                         # (5, 5, 5, p, p, p)
            augmented = [augment(patch, rng) for patch in patches.flatten(0, 2)]
            grids.append(torch.stack(augmented).view(patches.shape))
        return {"patches": torch.stack(grids)[:, :, :, :, None]}

    def forward(self, batch):
        patches = u_then_v(batch["patches"])                                # (2B, 5, 5, 5, 1, ...)
        codes = self.encode(patches)                                        # (2B, 5, 5, 5, code)
        # (n, 10, code), (n, 3, code); n = 2B * 25
        contexts, targets = columns(codes, self.x, self.y, self.row, self.targets)
        # cuDNN's GRU runs in float16 under any autocast, and bfloat16 has no scaler of losses
        with torch.autocast(contexts.device.type, enabled=False):
            _, state = self.recurrent(contexts.float())
        state = state[-1]                                                   # (n, context)

        losses = []
        for predictor, target in zip(self.predictors, targets.unbind(dim=1), strict=True):
            losses.append(self.contrast(predictor(state), target))
        return {"info_nce": torch.stack(losses).mean()}

    def encode(self, patches):
        """patches (2B, 5, 5, 5, 1, p, p, p) -> codes (2B, 5, 5, 5, code)."""
        grid = patches.shape[:4]
        features = self.encoder(patches.flatten(0, 3))[-1]                 # (N, 512, p/8, p/8, p/8)
        # the release pools to one voxel as well; a mean of instance-normed channels says little
        codes = self.to_code(features.amax(dim=(2, 3, 4)))                  # (N, code)
        return codes.view(*grid, -1)

    def contrast(self, predictions, codes):
        """Find each column's own code among those of all columns of the batch [CPC paper].

        The scores are products without a norm or a temperature, exp(code^T W context).
        """
        # differs: the release asks yes or no, for one negative, by binary cross-entropy, and
        # divides its scores by 1,024; the paper writes InfoNCE
        return info_nce(predictions, codes, temperature=1.0)


# --------------------------------------------------------------------------- patches
def cut_patches(view, patch):
    """Cut a view into patches that overlap by half: (D, H, W) -> (d, h, w, p, p, p)."""
    patches = view
    for axis in range(3):
        patches = patches.unfold(axis, patch, patch // 2)
    return patches


def augment(patch, rng):
    """Flip a patch, cut 7/8 of each side from a random place, and pad it with zeros again [CPC]."""
    if coin(FLIP, rng):
        patch = patch.flip(0)
    lost = [side // SHRINK for side in patch.shape]
    taken = patch
    padded = torch.zeros_like(patch)
    inside = padded
    for axis, side in enumerate(patch.shape):
        taken = taken.narrow(axis, whole(0, lost[axis], rng), side - lost[axis])
        inside = inside.narrow(axis, lost[axis] // 2, side - lost[axis])
    inside.copy_(taken)                         # a part of `padded`, its middle
    return padded


# --------------------------------------------------------------------------- columns
def pyramid(rows):
    """Say which patches of a grid predict which [CPC].

    Returns (context, targets). context lists (row, shift, shift), far rows first and the column's
    own patch last: each row further away has one more ring of neighbours. targets lists the rows
    that are predicted.
    """
    own = rows // 2 - 1
    context = []
    for row in range(own + 1):
        ring = own - row
        for first in range(-ring, ring + 1):
            for second in range(-ring, ring + 1):
                context.append((row, first, second))
    return context, list(range(own + 1, rows))


def places(d, h, rows):
    """Index the contexts and targets of the columns of a grid: (x, y, row, targets), all long.

    x (d, 1, patches), y (1, h, patches) and row (patches,) name the patches of each column's
    context; targets (t,) are rows. Neighbours outside the grid are mirrored at its border [CPC].
    """
    context, targets = pyramid(rows)
    row, first, second = torch.tensor(context).unbind(1)                   # (patches,) each
    x = mirrored(torch.arange(d)[:, None] + first, d)[:, None]
    y = mirrored(torch.arange(h)[:, None] + second, h)[None]
    return x, y, row, torch.tensor(targets)


def columns(codes, x, y, row, targets):
    """Gather the context and the targets of every column.

    codes (2B, d, h, rows, C); x, y, row, targets: of `places`. Returns contexts (n, patches of a
    pyramid, C) and targets (n, t, C), with n = 2B * d * h.
    """
    contexts = codes[:, x, y, row]                                          # (2B, d, h, 10, C)
    return contexts.flatten(0, 2), codes.index_select(3, targets).flatten(0, 2)


def mirrored(places, size):
    """Reflect places outside 0 .. size - 1 at the first and the last."""
    places = places.abs()
    return torch.where(places < size, places, 2 * (size - 1) - places)
