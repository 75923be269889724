"""Rotation classes on the Swin encoder: the row "pseudo labels" of Fig. 4 [ours].

The paper does not say what its pseudo labels are. Here a view is turned by 0, 90, 180 or 270
degrees about the body's axis, and the label to predict is the turn.
"""
import torch
from torch import nn
from torch.nn import functional as F

from smit.baselines.moco import image_token
from smit.baselines.task import Task, u_then_v
from smit.swin import SwinTransformer3D
from smit.transforms import rotate90


class Rotation(Task):
    """Rotation: cross-entropy of four classes on the image token [Tang et al., CVPR 2022]."""
    network = "swin"
    terms = ("rotation",)

    def __init__(self, encoder):
        super().__init__()
        self.encoder = SwinTransformer3D(**encoder)
        self.classes = nn.Linear(self.encoder.channels[-2], 4)

    def samples(self, views, rng):
        """Turn each view: views (2, 1, D, H, W), turns (2,), noise (2, drops)."""
        turns = torch.randint(4, (2,), generator=rng)
        turned = [rotate90(view, turn) for view, turn in zip(views, turns.tolist())]
        return {"views": torch.stack(turned), "turns": turns,
                "noise": torch.rand(2, self.encoder.drops, generator=rng)}

    def forward(self, batch):
        token = image_token(self.encoder, u_then_v(batch["views"]), u_then_v(batch["noise"]))
        logits = self.classes(token).float()                                # (2B, 4)
        return {"rotation": F.cross_entropy(logits, u_then_v(batch["turns"]))}
