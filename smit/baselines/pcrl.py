"""PCRL, "PRCL": contrast two views of a volume, and restore both from mixed features [SMIT 16].

Zhou et al., Preservational Learning Improves Self-Supervised Medical Image Models, ICCV 2021, after
the facts of their released 3-D code [PCRL]. A student and its slowly moving teacher see one view
each. Their embeddings are contrasted; their features are mixed and decoded. The bottleneck is told
how the image to restore is flipped and turned.
"""
import copy
import math

import torch
from torch import distributed, nn
from torch.nn import functional as F

from smit.baselines import genesis
from smit.baselines.contrast import info_nce_queue
from smit.baselines.task import Task, coin, whole
from smit.baselines.unet import UNet3D
from smit.ema import update_teacher

FLIP = 0.5               # of the first axis, before all else; and of each axis of a turn [PCRL]
SCALE = 0.1              # largest change of size along an axis [torchio's default]
DEGREES = 10.0           # largest rotation about an axis [torchio's default]
BLUR = 2.0               # voxels, largest sigma along an axis [torchio's default]


class PCRL(Task):
    """PCRL: the mean of three contrasts plus the mean of four restorations."""
    terms = ("contrast", "restore")

    def __init__(self, width=64, queue=16_384, embedding=128, momentum=0.999, temperature=0.2):
        super().__init__()
        self.student = Branch(width, embedding)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.momentum = momentum
        self.temperature = temperature
        self.register_buffer("queue", F.normalize(torch.randn(queue, embedding), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))
        self.fresh_keys = []

    @property
    def encoder(self):
        return self.student.unet.encoder

    # ----------------------------------------------------------------------- samples
    def samples(self, views, rng):
        """Disturb both views, and draw how they are turned and mixed.

        Returns input, clean, target (2, 1, D, H, W), code (2, 7), shares (3,).
        """
        # one coin for both views: painted outside, or inside [PCRL]
        paint_outside = coin(genesis.OUTER, rng)
        inputs, cleans, targets, codes = [], [], [], []
        for view in views[:, 0]:
            clean = random_pose(view, rng)
            flips, turns = random_turn(rng)
            inputs.append(disturb(clean, paint_outside, rng))
            cleans.append(clean)
            # differs: the release's target is the disturbed view, turned, so noise is restored too
            targets.append(turn(clean, flips, turns))
            codes.append(turn_code(flips, turns))

        # Beta(1, 1) is uniform, and the student's share is the larger one [PCRL]
        shares = torch.rand(3, generator=rng)
        return {"input": torch.stack(inputs)[:, None], "clean": torch.stack(cleans)[:, None],
                "target": torch.stack(targets)[:, None], "code": torch.stack(codes),
                "shares": torch.maximum(shares, 1 - shares)}

    # ----------------------------------------------------------------------- losses
    def forward(self, batch):
        inputs, cleans = batch["input"], batch["clean"]                     # (B, 2, 1, D, H, W)
        own_share, own_share_of_mixed, share = batch["shares"].unbind(dim=1)        # (B,) each

        # the two views as they are: told how to turn, the decoder restores them turned
        query, key, restorations = self.compare(
            inputs, batch["target"], own_share, batch["code"])

        # the same with volumes mixed in pairs: told nothing, it restores them as they lie
        query_of_mixed, key_of_mixed, more = self.compare(
            mix(inputs, share), mix(cleans, share), own_share_of_mixed)

        contrasts = [self.contrast(query, key),
                     self.contrast(query_of_mixed, key_of_mixed),
                     self.contrast(query_of_mixed, mix(key, share))]
        self.fresh_keys.append(key)
        return {"contrast": torch.stack(contrasts).mean(),
                "restore": torch.stack(restorations + more).mean()}

    def compare(self, inputs, targets, share, code=None):
        """Pass the first views through the student, the second ones through the teacher.

        inputs, targets (B, 2, 1, D, H, W); share (B,), the student's in mixed features; code
        (B, 2, 7) or None. Returns queries and keys (B, E) and two losses: of the student's own
        restoration, and of the one from mixed features.
        """
        (first, second), (target, target_of_second) = inputs.unbind(1), targets.unbind(1)
        codes = (None, None) if code is None else code.unbind(1)
        with torch.no_grad():
            key, taught = self.teacher(second, codes[1])
        query, learned = self.student(first, codes[0])

        own = self.student.decode(learned)
        mixed = self.student.decode(blend(learned, taught, share))
        (target_of_mixed,) = blend([target], [target_of_second], share)
        return query, key, [F.mse_loss(own, target), F.mse_loss(mixed, target_of_mixed)]

    def contrast(self, queries, keys):
        """Find each query's key (B, E) among those of the queue, by their cosines."""
        # differs: the release's batch norms keep embeddings apart. With instance norms all share
        # one direction, and small runs stayed at chance: so cosines are about the queue's mean
        mean = self.queue.mean(dim=0)                                       # (E,)
        queries = F.normalize(queries - mean, dim=1)
        keys = F.normalize(keys - mean, dim=1)
        others = F.normalize(self.queue - mean, dim=1)
        # differs: the release estimates the softmax's denominator once, from its first batch
        return info_nce_queue(queries, keys, others, self.temperature)

    def restore(self, batch):
        disturbed = batch["input"][:, 0]                                    # (B, 1, D, H, W)
        codes = batch["code"][:, 0]                                         # (B, 7)
        _, features = self.student(disturbed, codes)
        # the target is turned, so what went in is shown turned as well
        turned = [turn(view[0], *read_turn(code))[None] for view, code in zip(disturbed, codes)]
        return torch.stack(turned), self.student.decode(features), batch["target"][:, 0]

    # ----------------------------------------------------------------------- teacher and queue
    @torch.no_grad()
    def after_step(self, share):
        """Move the teacher towards the student, and the keys of the step into the queue."""
        update_teacher(self.teacher, self.student, self.momentum)
        keys = of_all_ranks(torch.cat(self.fresh_keys))[-len(self.queue):]  # (n, E)
        places = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = keys
        self.oldest.add_(len(keys)).remainder_(len(self.queue))
        self.discard()

    def discard(self):
        self.fresh_keys.clear()

    def transferred(self):
        """Return the student's whole U-Net [PCRLv2]."""
        return self.student.unet.state_dict()


class Branch(nn.Module):
    """A U-Net, an embedding of its bottleneck, and an attention that knows how to turn [PCRL].

    The last two have 215,808 parameters at width 64.
    """

    def __init__(self, width, embedding):
        super().__init__()
        self.unet = UNet3D(width=width)
        bottom = self.unet.encoder.channels[-1]                             # 512
        self.embedding = nn.Sequential(
            nn.Linear(bottom, embedding), nn.ReLU(), nn.Linear(embedding, embedding))
        self.attention = nn.Sequential(
            nn.Linear(7, bottom // 2), nn.ReLU(), nn.Linear(bottom // 2, bottom), nn.Sigmoid())

    def forward(self, x, code=None):
        """x (B, 1, D, H, W); code (B, 7) or None, for a restoration that is not turned.

        Returns embeddings (B, E), and the encoder's four features, the last one attended to.
        """
        *skips, bottleneck = self.unet.encoder(x)
        embedding = self.embedding(bottleneck.mean(dim=(2, 3, 4)))
        if code is not None:
            bottleneck = bottleneck * self.attention(code)[:, :, None, None, None]
        return embedding.float(), [*skips, bottleneck]

    def decode(self, features):
        """Restore an image in [0, 1] from four features: (B, 1, D, H, W)."""
        return self.unet.out(self.unet.decoder(features)).float().sigmoid()


# --------------------------------------------------------------------------- mixtures
def blend(features, others, share):
    """Take `share` (B,) of each tensor in a list, and the rest from the other list."""
    blended = []
    for feature, other in zip(features, others):
        weight = share.view(-1, *[1] * (feature.dim() - 1))
        blended.append(weight * feature + (1 - weight) * other)
    return blended


def mix(x, share):
    """Take `share` (B,) of each sample of x (B, ...), and the rest from the next one.

    The release draws a permutation. Samples come in a random order, so the next one serves as
    partner; a batch of one has none.
    """
    (mixed,) = blend([x], [x.roll(1, dims=0)], share)
    return mixed


def of_all_ranks(keys):
    """Gather the keys of all ranks, in their order: (n, E) -> (ranks * n, E)."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return keys
    gathered = [torch.empty_like(keys) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, keys.contiguous())
    return torch.cat(gathered)


# --------------------------------------------------------------------------- disturbances
def disturb(image, paint_outside, rng):
    """Blur, shuffle and paint; the release leaves intensity curves out [PCRL]."""
    image = blur(image, BLUR * torch.rand(3, generator=rng))
    if coin(genesis.SHUFFLE, rng):
        image = genesis.shuffle_windows(image, *genesis.random_windows(image.shape, rng), rng)
    if coin(genesis.PAINT, rng):
        if paint_outside:
            image = genesis.paint_outside(image, genesis.outer_boxes(image.shape, rng), rng)
        else:
            image = genesis.paint_inside(image, genesis.inner_boxes(image.shape, rng), rng)
    return image


def random_pose(image, rng):
    """Flip the first axis, scale and rotate a little: (D, H, W) -> (D, H, W) [PCRL]."""
    if coin(FLIP, rng):
        image = image.flip(0)
    scales = 1 + SCALE * (2 * torch.rand(3, generator=rng) - 1)
    degrees = DEGREES * (2 * torch.rand(3, generator=rng) - 1)
    return affine(image, scales, degrees)


def affine(image, scales, degrees):
    """Scale and rotate an image about its centre, zeros from outside it.

    scales (3,), above 1 to enlarge; degrees (3,), about each axis in turn. In voxels.
    """
    matrix = torch.eye(3)
    for axis, degree in enumerate(degrees.tolist()):
        angle = math.radians(degree)
        first, second = [other for other in range(3) if other != axis]
        rotation = torch.eye(3)
        rotation[first, first] = rotation[second, second] = math.cos(angle)
        rotation[first, second] = -math.sin(angle)
        rotation[second, first] = math.sin(angle)
        matrix = matrix @ rotation
    matrix = matrix / scales                            # from the result's voxels to the image's

    # torch wants the last axis first, and coordinates from -1 to 1 across the image
    sides = torch.tensor(image.shape, dtype=torch.float32)
    matrix = (matrix * sides / sides[:, None]).flip(0, 1)
    theta = torch.cat([matrix, torch.zeros(3, 1)], dim=1)[None]             # (1, 3, 4)
    grid = F.affine_grid(theta, [1, 1, *image.shape], align_corners=False)
    return F.grid_sample(image[None, None], grid, align_corners=False)[0, 0]


def blur(image, sigmas):
    """Blur an image along each axis with a Gaussian of these sigmas, in voxels."""
    reach = math.ceil(3 * BLUR)
    offsets = torch.arange(-reach, reach + 1)
    for axis, sigma in enumerate(sigmas.tolist()):
        weights = torch.exp(-offsets ** 2 / (2 * max(sigma, 1e-3) ** 2))
        weights = (weights / weights.sum()).view(1, 1, -1)
        lines = image.movedim(axis, -1)
        padded = F.pad(lines.flatten(0, 1)[:, None], (reach, reach), mode="replicate")
        image = F.conv1d(padded, weights).view(lines.shape).movedim(-1, axis)
    return image.contiguous()


# --------------------------------------------------------------------------- turns
def random_turn(rng):
    """Draw three flips and 0 to 3 quarter turns [PCRL]."""
    flips = [coin(FLIP, rng) for _ in range(3)]
    return flips, whole(0, 3, rng)


def turn(image, flips, turns):
    """Flip some axes, then turn the plane of the first two: (D, H, W) -> (D, H, W) [PCRL].

    Raises ValueError unless the first two sides are equal.
    """
    if image.shape[0] != image.shape[1]:
        raise ValueError(f"sides {tuple(image.shape)}: the first two must be equal to be turned")
    axes = [axis for axis in range(3) if flips[axis]]
    return image.flip(axes).rot90(turns, (0, 1))


def turn_code(flips, turns):
    """Write a turn as seven numbers: three flips, and one of four quarter turns [PCRL]."""
    code = torch.zeros(7)
    code[:3] = torch.tensor(flips, dtype=torch.float32)
    code[3 + turns] = 1
    return code


def read_turn(code):
    """Read flips and quarter turns off what `turn_code` wrote."""
    return code[:3].bool().tolist(), int(code[3:].argmax())
