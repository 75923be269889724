"""Student and teacher: one class, the encoder with its heads [SMIT Fig. 1].

The losses are in losses.py, the loop in train_ssl.py, what is watched in monitors.py.
"""
import copy
import math
from typing import NamedTuple

import torch
from torch import nn

from smit.heads import LinearVoxelHead, MultiLayerVoxelHead, ProjectionHead
from smit.masking import expand_mask
from smit.settings import SIZES, require
from smit.swin import SwinTransformer3D
from smit.weights import adopt, read_run


class Outputs(NamedTuple):
    """Hold the results of one forward; a head that was not built gives None.

    B views, N patch tokens of 16^3 voxels, C channels, K prototypes. The tokens are the
    last stage's, before its merge: 6^3 of 384 channels at 96^3.
    """
    tokens: torch.Tensor               # (B, N, C)
    voxels: torch.Tensor = None        # (B, c, D, H, W), of h^Pred
    patch_logits: torch.Tensor = None  # (B, N, K), of h^Patch
    image_logits: torch.Tensor = None  # (B, K), of h^[CLS]


class SMIT(nn.Module):
    """Join the encoder and the heads that the losses need [SMIT 2].

    encoder: keyword arguments of SwinTransformer3D.
    voxel_head: "linear", "multilayer" or None.
    patch_head, image_head: whether to build them.
    shared_head: one projection head for patches and image, as iBOT's paper does.
    habits: of weights.habits.HABITS, for an imported encoder alone.
    """

    def __init__(self, encoder, voxel_head="linear", patch_head=True, image_head=True,
                 shared_head=False, head_width=2048, bottleneck=256, prototypes=8192, habits=()):
        super().__init__()
        self.encoder = adopt(SwinTransformer3D(**encoder), habits)
        doublings = len(self.encoder.stages) - 1
        # voxels per axis of a patch token: 16
        self.token_side = self.encoder.patch * 2 ** doublings
        channels, last_channels = self.encoder.channels[-2:]               # 384, 768

        self.voxel_head = None
        cube = 2 * self.token_side                       # voxels per axis of a last token: 32
        image_channels = encoder.get("in_channels", 1)
        if voxel_head == "linear":
            self.voxel_head = LinearVoxelHead(last_channels, cube, image_channels)
        elif voxel_head == "multilayer":
            layers = int(math.log2(cube))
            self.voxel_head = MultiLayerVoxelHead(last_channels, layers, image_channels)
        elif voxel_head:
            raise ValueError(f"voxel head {voxel_head!r}: use 'linear', 'multilayer' or None")

        self.patch_head = None
        if patch_head:
            self.patch_head = ProjectionHead(channels, head_width, bottleneck, prototypes)
        self.image_head = None
        if image_head and shared_head and patch_head:
            self.image_head = self.patch_head
        elif image_head:
            self.image_head = ProjectionHead(channels, head_width, bottleneck, prototypes)

    def forward(self, views, hidden=None, noise=None):
        """Encode views and apply the heads.

        views (B, c, D, H, W).
        hidden (B, D/2, H/2, W/2) bool, at token resolution, or None to hide nothing.
        noise (B, drops): the draws of drop path, or None.
        """
        # the last stage's output, and if need be the merge's after it
        level = len(self.encoder.stages) - 1
        wanted = [level]
        if self.voxel_head:
            wanted.append(level + 1)
        features = self.encoder(views, hidden, noise, wanted)
        # differs: the release takes the tokens before stage 4, and so trains none of it
        # by distillation
        tokens = features[level].flatten(2).transpose(1, 2)                # (B, N, C)
        # differs: a Swin transformer has no class token; [CLS] is the mean of the normed
        # tokens, as in iBOT's Swin
        image = tokens.mean(1)                                             # (B, C)

        voxels = patch_logits = image_logits = None
        if self.voxel_head:
            voxels = self.voxel_head(features[level + 1])                  # (B, c, D, H, W)
        if self.patch_head:
            patch_logits = self.patch_head(tokens)                         # (B, N, K)
        if self.image_head:
            image_logits = self.image_head(image)                          # (B, K)
        return Outputs(tokens, voxels, patch_logits, image_logits)

    def reconstruct(self, views, cells, cell):
        """Predict the voxels of views of which cells are hidden: (B, c, D, H, W).

        views (B, c, D, H, W); cells (B, d, h, w) bool, True where hidden; cell: voxels
        along each of their axes.
        """
        return self(views, expand_mask(cells, cell // self.encoder.patch)).voxels

    def make_teacher(self):
        """Copy the student as it is now: f_t, without the voxel head.

        It is in eval mode. Never call `train()` on it: it would drop paths.
        """
        # differs: the release starts its teacher from other random weights and leaves it
        # in train mode, with drop path
        teacher = copy.deepcopy(self).requires_grad_(False).eval()
        teacher.voxel_head = None
        return teacher


def build_student(config):
    """Build the student of a pre-training run's settings, drawn from torch's global generator."""
    encoder = {}
    for name in ("embed_dim", "depths", "heads", "window", "drop_path", "checkpointing"):
        encoder[name] = config[name]
    encoder |= config.get("imported", {})                # what only an imported encoder has
    habits = encoder.pop("habits", ())
    return SMIT(encoder,
                voxel_head=config["voxel_head"] if config["mip"] else None,
                patch_head=bool(config["mpd"]),
                image_head=bool(config["itd"]),
                shared_head=config["shared_head"],
                head_width=config["head_width"],
                bottleneck=config["bottleneck"],
                prototypes=config["prototypes"],
                habits=habits)


def load_student(path):
    """Load a student of train_ssl.py with its heads: (SMIT in eval mode, settings of its run).

    ValueError for a file of another command, which has other heads, and for one that lacks tensors.
    """
    found, config = read_run(path, "student", SIZES)
    require("mip" in config, f"{path} was not made by train_ssl.py: give one of its student.pt")
    student = build_student(config).eval()
    try:
        student.load_state_dict(found)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{path}: its weights are not those of its settings ({first}); give the "
                         "file as its run wrote it") from None
    return student, config
