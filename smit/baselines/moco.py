"""MoCo v3 on the Swin encoder: the row "contrastive losses" of Fig. 4 [SMIT 33].

Chen, Xie, He, An Empirical Study of Training Self-Supervised Vision Transformers, ICCV 2021. The
image token of one view is to find that of the other view, as a slowly moving teacher sees it.
"""
import copy

import torch
from torch import nn
from torch.nn import functional as F

from smit.baselines.contrast import info_nce
from smit.baselines.task import Task, u_then_v
from smit.ema import cosine, update_teacher
from smit.heads import mlp
from smit.swin import SwinTransformer3D


class MoCo(Task):
    """MoCo v3: 2T times InfoNCE on the image token, averaged over both directions.

    What knows nothing has 2T ln B, .55 with the temperature T = .2 and B = 4 volumes.

    encoder: keyword arguments of SwinTransformer3D. A micro-batch holds the negatives, so it must
    have four volumes or more.
    """
    network = "swin"
    terms = ("contrast",)

    def __init__(self, encoder, head_width=2048, bottleneck=256, momentum=0.996, temperature=0.2):
        super().__init__()
        self.encoder = SwinTransformer3D(**encoder)
        channels = self.encoder.channels[-2]                                # 384
        self.projector = mlp(channels, head_width, bottleneck)
        self.predictor = mlp(bottleneck, head_width, bottleneck)
        self.teacher = nn.ModuleDict({"encoder": copy.deepcopy(self.encoder).eval(),
                                      "projector": copy.deepcopy(self.projector)})
        self.teacher.requires_grad_(False)
        self.momentum = momentum
        self.temperature = temperature

    def train(self, mode=True):
        """Switch the mode of the student; the teacher drops no path."""
        super().train(mode)
        self.teacher.eval()
        return self

    def samples(self, views, rng):
        """Return the views as they are, and the draws of drop path (2, drops)."""
        return {"views": views, "noise": torch.rand(2, self.encoder.drops, generator=rng)}

    def forward(self, batch):
        views = u_then_v(batch["views"])                                    # (2B, 1, D, H, W)
        noise = u_then_v(batch["noise"])                                    # (2B, drops)
        with torch.no_grad():
            token = image_token(self.teacher["encoder"], views)
            keys = self.teacher["projector"](token)                         # (2B, E)
        token = image_token(self.encoder, views, noise)
        predictions = self.predictor(self.projector(token))                 # (2B, E)

        of_u, of_v = predictions.chunk(2)
        key_u, key_v = keys.chunk(2)
        both = self.contrast(of_u, key_v) + self.contrast(of_v, key_u)
        return {"contrast": both / 2}

    def contrast(self, predictions, keys):
        """Find each volume's key among those of the micro-batch [MoCo v3 Alg. 1].

        predictions, keys (B, E), row b of both from the two views of one volume.
        """
        # differs: the keys are this rank's micro-batch, where MoCo v3 gathers all ranks'; both
        # sides are centred on their mean, in place of the batch norms inside MoCo v3's heads; and
        # as in SMIT the momentum is .996, not .99, heads have three layers with GELU, and the
        # patch embedding learns
        predictions = predictions.float() - predictions.float().mean(dim=0)
        keys = keys.float() - keys.float().mean(dim=0)
        predictions = F.normalize(predictions, dim=-1)
        keys = F.normalize(keys, dim=-1)
        return 2 * self.temperature * info_nce(predictions, keys, self.temperature)

    def after_step(self, share):
        """Move the teacher; its momentum rises to 1 along a cosine, as SMIT's does."""
        update_teacher(self.teacher, self, cosine(share, self.momentum, 1.0))


def image_token(encoder, views, noise=None):
    """Average the last stage's tokens, before its merge: (2B, 1, D, H, W) -> (2B, 384) [iBOT].

    The merge and the norms of other stages stay as they were drawn.
    """
    last = len(encoder.stages) - 1
    features = encoder(views, noise=noise, wanted=(last,))
    tokens = features[last].flatten(2).transpose(1, 2)                      # (2B, N, 384)
    return tokens.mean(dim=1)
