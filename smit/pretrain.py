"""Student and teacher: one class, the encoder with its heads [SMIT Fig. 1], and what is watched while they train.

Reading order: SMIT, its teacher, monitors, validation. The losses and the loop are in losses.py and train_ssl.py.
"""
import copy
import math
from typing import NamedTuple

import torch
from torch import nn

from smit.heads import LinearVoxelHead, MultiLayerVoxelHead, ProjectionHead, mlp
from smit.losses import sharpen
from smit.masking import expand_mask
from smit.swin import SwinTransformer3D


class Outputs(NamedTuple):
    """What a forward gives; heads that were not built give None. B views, N tokens of 16^3 voxels."""
    tokens: torch.Tensor                # (B, N, C)     the last stage's, before its merge: 6^3 of 384 at 96^3
    voxels: torch.Tensor = None         # (B, c, D, H, W)  h^Pred
    patch_logits: torch.Tensor = None   # (B, N, K)     h^Patch, before temperature
    image_logits: torch.Tensor = None   # (B, K)        h^[CLS]
    embedding: torch.Tensor = None      # (B, E)        of the contrastive row


class SMIT(nn.Module):
    """Encoder plus the heads that the losses need [SMIT 2].

    encoder: keyword arguments of SwinTransformer3D. voxel_head: "linear", "multilayer" or None. patch_head, image_head,
    contrast_head: whether to build them. shared_head: one projection head for patches and image, iBOT's default.
    """

    def __init__(self, encoder, voxel_head="linear", patch_head=True, image_head=True, contrast_head=False,
                 shared_head=False, head_width=2048, bottleneck=256, prototypes=8192):
        super().__init__()
        self.encoder = SwinTransformer3D(**encoder)
        self.cell = self.encoder.patch * 2 ** (len(self.encoder.stages) - 1)  # voxels per axis of a patch token: 16
        C, last = self.encoder.channels[-2:]
        self.voxel_head = self.patch_head = self.image_head = self.projector = self.predictor = None
        if voxel_head:
            kind = {"linear": LinearVoxelHead, "multilayer": MultiLayerVoxelHead}[voxel_head]
            layers = {"linear": 2 * self.cell, "multilayer": int(math.log2(2 * self.cell))}[voxel_head]
            self.voxel_head = kind(last, layers, encoder.get("in_channels", 1))
        if patch_head:
            self.patch_head = ProjectionHead(C, head_width, bottleneck, prototypes)
        if image_head:
            shared = shared_head and self.patch_head
            self.image_head = self.patch_head if shared else ProjectionHead(C, head_width, bottleneck, prototypes)
        if contrast_head:
            self.projector = mlp(C, head_width, bottleneck)
            self.predictor = mlp(bottleneck, head_width, bottleneck)

    def forward(self, views, hidden=None, noise=None):
        """views (B, c, D, H, W); hidden (B, D/2, H/2, W/2) bool, at token resolution, or None; noise: for drop path."""
        top = len(self.encoder.stages)
        wanted = (top - 1, top) if self.voxel_head else (top - 1,)
        features = self.encoder(views, hidden, noise, wanted)
        tokens = features[top - 1].flatten(2).transpose(1, 2)                    # (B, N, C)
        # differs: a Swin transformer has no class token; [CLS] is the mean of the normed tokens, as in iBOT's Swin
        image = tokens.mean(1)                                                   # (B, C)
        embedding = self.projector(image) if self.projector else None            # (B, E)
        return Outputs(
            tokens=tokens,
            voxels=self.voxel_head(features[top]) if self.voxel_head else None,
            # differs: the release takes the tokens before stage 4, and so trains none of it by distillation
            patch_logits=self.patch_head(tokens) if self.patch_head else None,
            image_logits=self.image_head(image) if self.image_head else None,
            embedding=self.predictor(embedding) if self.predictor else embedding)

    def make_teacher(self):
        """f_t: a copy of the student as it is now, in eval mode, without the heads that only a student has.

        `train()` must never be called on it.
        """
        # differs: the release starts its teacher from other random weights and leaves it in train mode, with drop path
        teacher = copy.deepcopy(self).requires_grad_(False).eval()
        teacher.voxel_head = teacher.predictor = None
        return teacher


def build_student(config):
    """The student that a pre-training run's settings describe, freshly drawn from torch's global generator."""
    sizes = {name: config[name] for name in ("embed_dim", "depths", "heads", "window", "drop_path", "checkpointing")}
    return SMIT(sizes, config["voxel_head"] if config["mip"] else None, bool(config["mpd"]), bool(config["itd"]),
                bool(config["contrast"]), config["shared_head"], config["head_width"], config["bottleneck"],
                config["prototypes"])


# --------------------------------------------------------------------------------------------------------- monitors
@torch.no_grad()
def entropies(logits, center, temperature, over_ranks=lambda mean: mean):
    """Two signs of collapse, both as shares of ln K: (per-token entropy, entropy of the mean distribution).

    logits (..., K), n of them; over_ranks averages a tensor over ranks. Uniform outputs give (1, 1); collapse to one
    prototype (0, 0); one wants the second well above the first, which it can exceed by ln(n) / ln(K) at most.
    """
    p = sharpen(logits, temperature, center).flatten(0, -2)                                 # (n, K)
    entropy = lambda q: -(q * q.clamp_min(1e-30).log()).sum(-1).mean().item() / math.log(q.shape[-1])
    return entropy(p), entropy(over_ranks(p.mean(0)))


@torch.no_grad()
def effective_rank(tokens):
    """exp of the entropy of the normed eigenvalues of the tokens' covariance: the dimensions in use [Roy & Vetterli].

    tokens (B, N, C). Between 1 and C; below about 2 the features have collapsed.
    """
    x = tokens.float().flatten(0, 1)
    x = x - x.mean(0)
    values = torch.linalg.eigvalsh((x.T @ x).cpu().double()).clamp_min(0)
    p = values / values.sum().clamp_min(1e-30)
    return torch.exp(-(p * p.clamp_min(1e-30).log()).sum()).item()


# ------------------------------------------------------------------------------------------------------- validation
@torch.no_grad()
def validate(student, batches, cell, count_all, device, autocast, ranks):
    """MIP on held-back volumes, beside two predictors that know nothing of anatomy [ours].

    batches: as sampling.batches gives them, this rank's share; cell: voxels per axis of a mask cell; count_all: score
    visible voxels too, for full image reconstruction. Returns a dict: val_mip (L1 over hidden voxels, as Eq. 1),
    val_mse (its square), val_constant (L1 of the best single grey value, the median of all voxels scored), val_median
    (L1 of each view's visible median). Leaves the student in train mode.
    """
    sums = torch.zeros(4, dtype=torch.float64)                       # L1, L2, L1 of the visible median, voxels scored
    counts = torch.zeros(256, dtype=torch.float64)                   # of the scored voxels' grey values
    student.eval()
    for batch in batches:
        grey, cells = batch["views"].flatten(0, 1), batch["hidden"].flatten(0, 1)
        tokens = expand_mask(cells, cell // student.encoder.patch).to(device) if cells.any() else None
        with autocast():
            voxels = student(grey.to(device).float() / 255, tokens).voxels.float().cpu()
        hidden = expand_mask(cells, cell)[:, None]                                         # (B, 1, D, H, W)
        scored = torch.ones_like(hidden) if count_all else hidden
        median = torch.stack([g[~h if not h.all() else h].median() for g, h in zip(grey, hidden)])
        error = (voxels - grey / 255)[scored]
        median_error = (median.float().view(-1, 1, 1, 1, 1) - grey)[scored] / 255
        sums += torch.stack([error.abs().sum(), (error ** 2).sum(), median_error.abs().sum(), scored.sum()])
        counts += torch.bincount(grey[scored].long(), minlength=256)
    student.train()
    sums, counts = ranks.mean(sums.to(device)).cpu(), ranks.mean(counts.to(device)).cpu()
    best = torch.searchsorted(counts.cumsum(0), counts.sum() / 2)                          # the median grey value
    constant = (counts * (torch.arange(256) - best).abs()).sum().item() / 255
    l1, l2, visible_median, n = sums.tolist()
    return {"val_mip": l1 / n, "val_mse": l2 / n, "val_constant": constant / n, "val_median": visible_median / n}
