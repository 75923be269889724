"""What a pretext task must offer to the loop, and how its random choices are drawn [ours]."""
import torch
from torch import nn


class Task(nn.Module):
    """A pretext task: its networks, its samples and its losses.

    network: "unet" or "swin", which finetune.py builds around the pre-trained weights.
    encoder: the part that every task hands over.
    terms: names of the losses. The loop adds them up, so each comes with its weight in it.
    goal: those of them that tell how well a held-back volume is done; None: all.
    """
    network = "unet"
    terms = ()
    goal = None

    def samples(self, views, rng):
        """Make a sample of two views of one volume; a loader's process calls this.

        views (2, 1, D, H, W) float32 in [0, 1]; rng the torch.Generator of this sample.
        Returns a dict of tensors, which the loader stacks along a new first axis.
        """
        raise NotImplementedError

    def forward(self, batch):
        """Compute the losses of a batch of samples: {name: scalar}, in float32."""
        raise NotImplementedError

    def clip_groups(self):
        """List groups of parameters, each clipped by its own norm; the first one's is logged."""
        return [list(self.parameters())]

    def after_step(self, share):
        """Follow the optimiser's step, `share` of the training being done; an EMA goes here."""

    def discard(self):
        """Forget what the last step collected, for it was not taken."""

    def restore(self, batch):
        """Return (disturbed, restored, target), each (N, 1, D, H, W), or None: for pictures."""
        return None

    def transferred(self):
        """Return the weights that fine-tuning takes over, here those of the encoder alone."""
        weights = self.encoder.state_dict()
        return {f"encoder.{name}": weight for name, weight in weights.items()}


def u_then_v(pairs):
    """(B, 2, ...) -> (2B, ...): first every u, then every v."""
    return pairs.transpose(0, 1).flatten(0, 1)


def coin(probability, rng):
    """Draw True with this probability."""
    return bool(torch.rand((), generator=rng) < probability)


def whole(low, high, rng):
    """Draw a whole number from low to high, each with the same chance, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=rng))
