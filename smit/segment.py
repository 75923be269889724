"""The fine-tuning network: the pre-trained encoder under a U-shaped decoder [SMIT 3, 28.19M parameters].

Reading order: SegmentationNet, its decoder's Up and ResidualBlock, load_encoder; predict, to_file_grid.
From Python, inference.py is the door.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from smit.sliding import sliding_window
from smit.swin import SwinTransformer3D
from smit.transforms import crop, crop_affine, from_ras, ras_grid, regrid, rotate90
from smit.weights import SIZES, adopt, count, fill


class SegmentationNet(nn.Module):
    """U-shaped network over the Swin encoder, 28,192,614 parameters with 14 classes [SMIT 3; release].

    habits: of weights.habits.HABITS, for an imported encoder alone.
    encoder: arguments of SwinTransformer3D (in_channels, embed_dim, window, drop_path, ...).
    """

    def __init__(self, num_classes=14, habits=(), **encoder):
        super().__init__()
        self.encoder = adopt(SwinTransformer3D(**encoder, mask_token=False), habits)
        channels = self.encoder.channels                              # 48, 96, 192, 384, 768
        self.ups = nn.ModuleList(Up(coarse, fine, skip=fine) for fine, coarse in zip(channels[-2::-1], channels[:0:-1]))
        self.last_up = Up(channels[0], channels[0] // 2, scale=self.encoder.patch)
        self.out = PointConv(channels[0] // 2, num_classes)

    def forward(self, x, noise=None):
        """x (B, in_channels, D, H, W), any size -> logits (B, num_classes, D, H, W); noise: drop path's draws."""
        features = self.encoder(x, noise=noise)                       # channels-last, as the CPU convolves fastest
        if x.is_cuda:
            features = [feature.contiguous() for feature in features]
        *skips, y = features                                          # y (B, 768, D/32, H/32, W/32)
        for up, skip in zip(self.ups, reversed(skips)):
            y = up(y, skip.shape[2:], skip)                           # (B, 384, D/16, ...) to (B, 48, D/2, ...)
        return self.out(self.last_up(y, x.shape[2:]))                 # (B, 24, D, H, W), (B, num_classes, D, H, W)


def build_network(config):
    """Build the network of a fine-tuning run's settings, drawn from torch's global generator.

    ValueError where they describe none: they may come from a stranger's checkpoint.
    """
    try:
        encoder = {name: config[name] for name in SIZES}
        encoder |= config.get("imported", {})                         # what an imported encoder has
        return SegmentationNet(config["num_classes"], drop_path=config["drop_path"],
                               checkpointing=config["checkpointing"], **encoder)
    except (RuntimeError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
        sizes = {name: config.get(name) for name in SIZES}
        raise ValueError(f"sizes {sizes} make no network: {str(error).splitlines()[0]}") from None


class Up(nn.Module):
    """One level of the decoder: transposed convolution, skip joined if there is one, residual block [release]."""

    def __init__(self, coarse, fine, skip=0, scale=2):
        super().__init__()
        self.up = nn.ConvTranspose3d(coarse, fine, scale, scale, bias=False)
        self.block = ResidualBlock(fine + skip, fine)

    def forward(self, x, grid, skip=None):
        """x (B, coarse, d, h, w), grid (D, H, W) of the result, skip (B, skip, D, H, W) -> (B, fine, D, H, W)."""
        D, H, W = grid
        x = self.up(x)[:, :, :D, :H, :W]                              # an odd grid was padded on its way down
        return self.block(x if skip is None else torch.cat([x, skip], 1))


class ResidualBlock(nn.Module):
    """conv3, norm, LeakyReLU, conv3, norm, plus the input (through conv1 and norm if channels change), LeakyReLU."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.body = nn.Sequential(conv_norm(c_in, c_out, 3), nn.LeakyReLU(.01), conv_norm(c_out, c_out, 3))
        self.shortcut = conv_norm(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.act = nn.LeakyReLU(.01)

    def forward(self, x):
        return self.act(self.body(x) + self.shortcut(x))              # (B, c_in, D, H, W) -> (B, c_out, D, H, W)


def conv_norm(c_in, c_out, size):
    """Convolution without bias, then a norm without parameters: InstanceNorm, which does not depend on the batch."""
    conv = nn.Conv3d(c_in, c_out, size, padding=size // 2, bias=False) if size > 1 else PointConv(c_in, c_out, False)
    return nn.Sequential(conv, InstanceNorm())


class PointConv(nn.Conv3d):
    """A convolution of size 1, on the CPU as the matrix product that it is."""

    def __init__(self, c_in, c_out, bias=True):
        super().__init__(c_in, c_out, 1, bias=bias)

    def forward(self, x):
        """x (B, c_in, D, H, W) -> (B, c_out, D, H, W)."""
        if x.is_cuda:
            return super().forward(x)
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class InstanceNorm(nn.Module):
    """Mean 0 and variance 1 over space for each sample and channel. torch's own takes channels-last only by copies."""

    def forward(self, x):
        """x (B, C, D, H, W) -> the same shape."""
        return F.instance_norm(x) if x.is_cuda else NormaliseSpace.apply(x.movedim(1, -1).flatten(1, 3)).view(
            len(x), *x.shape[2:], -1).movedim(-1, 1)


class NormaliseSpace(torch.autograd.Function):
    """rows (B, N, C) -> (rows - mean) / sqrt(variance + 1e-5) over N, in float32 inside; backward keeps the result."""

    @staticmethod
    def forward(ctx, rows):
        normed = rows.float()
        normed = normed - normed.mean(1, keepdim=True)
        scale = normed.square().mean(1, keepdim=True).add_(1e-5).rsqrt_()                     # (B, 1, C)
        normed = normed.mul_(scale).to(rows.dtype)
        ctx.save_for_backward(normed, scale)
        return normed

    @staticmethod
    def backward(ctx, grad):
        normed, scale = ctx.saved_tensors
        dtype, grad, normed = normed.dtype, grad.float(), normed.float()
        along = (grad * normed).mean(1, keepdim=True)
        return (grad - grad.mean(1, keepdim=True)).addcmul_(normed, along, value=-1).mul_(scale).to(dtype)


def load_encoder(net, state_dict, partial=False):
    """Copy pre-trained weights into net.encoder; returns a line with parameter counts [ours].

    state_dict: of a student or teacher (names after `encoder.`; heads are dropped), or of an
    encoder alone. Its mask token is dropped, and its patch embedding adapted to net's channels.
    partial: load what fits and leave the rest.
    ValueError, with nothing loaded, unless every parameter of either encoder has its counterpart
    (or partial=True), and for values that are not finite.
    """
    has_heads = any(name.startswith("encoder.") for name in state_dict)
    inside = {}
    for name, weight in state_dict.items():
        if name.startswith("encoder.") or not has_heads:
            inside[name.removeprefix("encoder.")] = weight
    inside.pop("mask_token", None)
    counts = fill(net.encoder, inside, partial)
    dropped = count(state_dict) - count(inside)
    return f"encoder weights: {counts}; heads and mask token dropped: {dropped:,}"


@torch.no_grad()
def predict(net, image, window, turns=(0,), **sliding):
    """Logits (num_classes, D, H, W) of a whole prepared volume, image (D, H, W) uint8, on its own grid [SMIT 3].

    turns: quarter turns in the axial plane to average over, as training turned its crops; sliding: of sliding_window.
    """
    volume = torch.from_numpy(np.array(image))[None, None] / 255
    return sum(rotate90(sliding_window(net, rotate90(volume, k), window, **sliding), -k)[0] for k in turns) / len(turns)


def to_file_grid(logits, affine, file_shape, file_affine):
    """Label map (X, Y, Z) uint8 in the axis order of the image's file: logits resampled first, then the arg-max [ours].

    logits (num_classes, D, H, W) on a grid with RAS `affine`. What lies farther than a voxel outside it is background.
    One class at a time: memory is a few volumes on the file's grid, whatever the number of classes.
    """
    shape, ras = ras_grid(file_shape, file_affine)
    index = np.linalg.solve(affine, ras)                              # the file's index -> ours
    box = [np.flatnonzero(np.abs(start + step * np.arange(n) - (size - 1) / 2) < (size + 1) / 2)
           for step, start, n, size in zip(index.diagonal(), index[:3, 3], shape, logits.shape[1:])]
    first, size = [int(inside[0]) for inside in box], [len(inside) for inside in box]
    highest, label = torch.full(size, -torch.inf), torch.zeros(size, dtype=torch.uint8)
    for number, channel in enumerate(logits):
        value = regrid(channel.cpu(), affine, crop_affine(ras, first), size)
        label.masked_fill_(value > highest, number)
        torch.maximum(highest, value, out=highest)
    return from_ras(crop(label, [-at for at in first], shape), file_affine).contiguous()
