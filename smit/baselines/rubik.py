"""Rubik's cube++, "Cub++": restore a crop whose slabs were turned [SMIT 34].

Tao et al., Revisiting Rubik's Cube, MICCAI 2020: a volume-wise transformation permutes the context,
a network restores it, and an adversarial loss sharpens what it restores. No code of theirs is
public. The number of cubes and of moves, the critic and the weights are therefore [ours].
"""
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from smit.baselines.task import Task, u_then_v, whole
from smit.baselines.unet import UNet3D

LAYERS = 3               # per axis: a 96^3 crop has slabs of 96 x 96 x 32 voxels [ours]
MOST_MOVES = 6           # [ours]


class Rubik(Task):
    """Rubik's cube++: the mean squared error of the restored crop, and the critic's opinion of it.

    adversarial: weight of that opinion; at 0 there is no critic. 0.01 is [ours].
    """
    goal = ("restore",)

    def __init__(self, width=64, adversarial=0.01):
        super().__init__()
        self.unet = UNet3D(width=width)
        self.adversarial = adversarial
        self.critic = Critic(width // 2) if adversarial else None
        self.terms = ("restore", "adversarial", "critic") if adversarial else ("restore",)

    @property
    def encoder(self):
        return self.unet.encoder

    def samples(self, views, rng):
        """Twist both views: input and target (2, 1, D, H, W)."""
        inputs = []
        for view in views[:, 0]:
            inputs.append(scramble(view, random_moves(rng)))
        return {"input": torch.stack(inputs)[:, None], "target": views}

    def forward(self, batch):
        _, restored, target = self.restore(batch)
        terms = {"restore": F.mse_loss(restored, target)}
        if self.critic:
            # the network learns from a critic that stands still, the critic from crops that do:
            # so one backward pass and one optimiser serve both
            still = {name: weight.detach() for name, weight in self.critic.named_parameters()}
            opinion = functional_call(self.critic, still, (restored,))
            terms["adversarial"] = self.adversarial * adversarial_loss(opinion)
            terms["critic"] = critic_loss(self.critic(target), self.critic(restored.detach()))
        return terms

    def restore(self, batch):
        twisted = u_then_v(batch["input"])                                  # (2B, 1, D, H, W)
        restored = self.unet(twisted).float().sigmoid()
        return twisted, restored, u_then_v(batch["target"])

    def clip_groups(self):
        """Clip the critic apart: its gradients are the larger ones, and would stop the network."""
        networks = [self.unet, self.critic] if self.critic else [self.unet]
        return [list(network.parameters()) for network in networks]

    def transferred(self):
        """Return the whole U-Net, as for Models Genesis [ours]."""
        return self.unet.state_dict()


# --------------------------------------------------------------------------- moves
def random_moves(rng):
    """Draw one to six moves (axis, layer, quarter turns) [ours]."""
    moves = []
    for _ in range(whole(1, MOST_MOVES, rng)):
        moves.append((whole(0, 2, rng), whole(0, LAYERS - 1, rng), whole(1, 3, rng)))
    return moves


def scramble(image, moves):
    """Make all moves, one after the other: (D, H, W) -> (D, H, W)."""
    for axis, layer, turns in moves:
        image = twist(image, axis, layer, turns)
    return image


def twist(image, axis, layer, turns):
    """Turn one slab of cubes about an axis [Rubik's cube++].

    A slab is a third of the image; where the side is no multiple of three, the two outer slabs
    are alike, so that turned cubes still fit. Where spacings differ, a quarter turn stretches
    organs; the task is the same.
    Raises ValueError unless the sides are equal.
    """
    side = image.shape[0]
    if set(image.shape) != {side}:
        raise ValueError(f"sides {tuple(image.shape)} must be equal")
    outer = round(side / LAYERS)
    borders = [0, outer, side - outer, side]
    start, thickness = borders[layer], borders[layer + 1] - borders[layer]
    in_plane = [other for other in range(3) if other != axis]

    result = image.clone()
    slab = image.narrow(axis, start, thickness)
    result.narrow(axis, start, thickness).copy_(slab.rot90(turns, in_plane))
    return result


# --------------------------------------------------------------------------- adversary
class Critic(nn.Module):
    """Tell crops from restored crops: four convolutions that halve the sides [ours].

    crops (B, 1, D, H, W) -> logits (B, 1, D/16, H/16, W/16), above 0 where a part looks real.
    """

    def __init__(self, width=32):
        super().__init__()
        channels = [1, width, 2 * width, 4 * width, 1]
        layers = []
        for c_in, c_out in zip(channels, channels[1:]):
            layers += [nn.Conv3d(c_in, c_out, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, crops):
        return self.layers(crops).float()


def adversarial_loss(opinion):
    """Ask for restored crops that look real: -log sigmoid, which does not saturate [GAN]."""
    return F.softplus(-opinion).mean()


def critic_loss(of_real, of_restored):
    """Binary cross-entropy of the critic [GAN]; 2 ln 2 where it cannot tell."""
    return F.softplus(-of_real).mean() + F.softplus(of_restored).mean()
