"""The fine-tuning network: the pre-trained encoder under a U-shaped decoder [SMIT 2].

It has the paper's 28.19M parameters.
Reading order: SegmentationNet, its decoder's Up and ResidualBlock, load_encoder,
predict. The tricks for speed stand at the end. From Python, inference.py is the door.
"""
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from smit.baselines.unet import UNet3D, convolve
from smit.settings import SIZES, UNET_SIZES
from smit.sliding import sliding_window
from smit.swin import SwinTransformer3D
from smit.transforms import rotate90
from smit.weights import adopt, count, fill


# ---------------------------------------------------------------------- network
class SegmentationNet(nn.Module):
    """Segment with a U-shaped network over the Swin encoder [SMIT 3; release].

    It has 28,192,614 parameters with 14 classes. encoder: arguments of
    SwinTransformer3D (in_channels, embed_dim, window, drop_path, ...).
    habits: of weights.habits.HABITS, for an imported encoder alone.
    """

    def __init__(self, num_classes=14, habits=(), **encoder):
        super().__init__()
        self.encoder = adopt(SwinTransformer3D(**encoder, mask_token=False), habits)
        channels = self.encoder.channels                                   # 48, 96, 192, 384, 768
        self.ups = nn.ModuleList()
        for level in reversed(range(len(channels) - 1)):
            fine = channels[level]
            self.ups.append(Up(channels[level + 1], fine, skip=fine))
        self.last_up = Up(channels[0], channels[0] // 2, scale=self.encoder.patch)
        self.out = PointConv(channels[0] // 2, num_classes)

    def forward(self, x, noise=None):
        """Segment volumes of any size, with a side above 16 voxels: one voxel has no norm.

        x (B, in_channels, D, H, W); noise (B, drops): the draws of drop path, or None.
        Returns logits (B, num_classes, D, H, W).
        """
        features = self.encoder(x, noise=noise)
        if x.is_cuda:
            # the encoder's maps are channels-last: fastest on a CPU, and not on a GPU
            features = [feature.contiguous() for feature in features]

        y = features.pop()                                              # (B, 768, D/32, H/32, W/32)
        for up in self.ups:
            skip = features.pop()
            y = up(y, skip.shape[2:], skip)                               # (B, 384, D/16, ...), ...
        y = self.last_up(y, x.shape[2:])                                   # (B, 24, D, H, W)
        return self.out(y)                                               # (B, num_classes, D, H, W)


class SegmentationUNet(UNet3D):
    """Segment with the U-Net of the paper's CNN columns [SMIT Table 2].

    It has 19,074,510 parameters with 14 classes, at width 64.
    """

    def __init__(self, num_classes=14, width=64):
        super().__init__(num_classes, width)

    def forward(self, x, noise=None):
        """x (B, 1, D, H, W), sides multiples of 8 -> logits (B, num_classes, D, H, W).

        noise is not used: no path is dropped.
        """
        return super().forward(x)


def build_network(config):
    """Build the network of a fine-tuning run's settings, drawn from torch's global generator.

    ValueError where they describe none: they may come from a stranger's checkpoint.
    """
    is_unet = config.get("network", "swin") == "unet"
    names = UNET_SIZES if is_unet else SIZES
    try:
        sizes = {name: config[name] for name in names}
        if is_unet:
            return SegmentationUNet(config["num_classes"], **sizes)
        sizes |= config.get("imported", {})              # what only an imported encoder has
        return SegmentationNet(config["num_classes"], drop_path=config["drop_path"],
                               checkpointing=config["checkpointing"], **sizes)
    except (RuntimeError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
        sizes = {name: config.get(name) for name in names}
        reason = str(error).splitlines()[0]
        raise ValueError(f"sizes {sizes} make no network: {reason}") from None


class Up(nn.Module):
    """Go up one level of the decoder [release].

    A transposed convolution, the skip joined if there is one, a residual block.
    """

    def __init__(self, coarse, fine, skip=0, scale=2):
        super().__init__()
        self.up = nn.ConvTranspose3d(coarse, fine, scale, scale, bias=False)
        self.block = ResidualBlock(fine + skip, fine)

    def forward(self, x, grid, skip=None):
        """x (B, coarse, d, h, w) -> (B, fine, D, H, W).

        grid (D, H, W): of the result; skip (B, skip, D, H, W) or None.
        """
        D, H, W = grid
        # an odd grid was padded on its way down
        x = self.up(x)[:, :, :D, :H, :W]
        if skip is not None:
            x = torch.cat([x, skip], 1)
        return self.block(x)


class ResidualBlock(nn.Module):
    """Add two convolutions of size 3 to their input [release].

    conv3, norm, LeakyReLU, conv3, norm, plus the input, LeakyReLU. Where channels
    change, the input goes through a convolution of size 1 and a norm.
    """

    def __init__(self, c_in, c_out):
        super().__init__()
        self.body = nn.Sequential(conv_norm(c_in, c_out, 3), nn.LeakyReLU(.01),
                                  conv_norm(c_out, c_out, 3))
        self.shortcut = nn.Identity()
        if c_in != c_out:
            self.shortcut = conv_norm(c_in, c_out, 1)
        self.act = nn.LeakyReLU(.01)

    def forward(self, x):
        """x (B, c_in, D, H, W) -> (B, c_out, D, H, W)."""
        return self.act(self.body(x) + self.shortcut(x))


def conv_norm(c_in, c_out, size):
    """Make a convolution without bias and a norm without parameters.

    The norm is InstanceNorm, which does not depend on the batch.
    """
    if size == 1:
        conv = PointConv(c_in, c_out, bias=False)
    else:
        conv = PaddedConv(c_in, c_out, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, InstanceNorm())


class PaddedConv(nn.Conv3d):
    """Convolve as nn.Conv3d does, with gradients that are right in bf16 on a CPU, too."""

    def forward(self, x):
        """x (B, c_in, D, H, W) -> (B, c_out, D, H, W)."""
        return convolve(x, self.weight, self.bias, self.padding)


# ----------------------------------------------------------- pre-trained weights
def load_encoder(net, state_dict, partial=False):
    """Copy pre-trained weights into net.encoder, and report which [ours].

    state_dict: of a student or teacher, whose heads are dropped, or of an encoder
    alone. Its mask token is dropped, and its patch embedding adapted to net's
    channels. partial: load what fits and leave the rest.
    Returns the report, one line with parameter counts. Raises ValueError, with
    nothing loaded, unless every parameter of either encoder has its counterpart (or
    partial=True), and for values that are not finite.
    """
    # differs: the release's fine-tuner loads nothing from its own checkpoints and
    # reports success
    given = encoder_weights(state_dict)
    counts = fill(net.encoder, given, partial)
    others = count(state_dict) - count(given)
    return f"encoder weights: {counts}; of the rest of the file not loaded: {others:,}"


def load_decoder(net, state_dict):
    """Copy the decoder too, if there is one, into a U-Net [Models Genesis]; report it.

    The last convolution stays as it was drawn. ValueError unless all of the decoder fits, and for
    values that are not finite.
    """
    prefix = "decoder."
    given = {}
    for name, weight in state_dict.items():
        if name.startswith(prefix):
            given[name.removeprefix(prefix)] = weight
    if not given:
        return "decoder weights: random, none were pre-trained"

    for name, weight in given.items():
        if not weight.isfinite().all():
            raise ValueError(f"decoder weights that are not finite, first in {name}: "
                             "use another checkpoint")
    try:
        net.decoder.load_state_dict(given)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"decoder weights do not fit: {reason}") from None
    return f"decoder weights: {count(given):,} of {count(net.decoder.state_dict()):,} matched"


def encoder_weights(state_dict):
    """Pick an encoder's weights, without its mask token: {name in the encoder: weight}."""
    prefix = "encoder."
    has_heads = any(name.startswith(prefix) for name in state_dict)
    weights = {}
    for name, weight in state_dict.items():
        if has_heads and not name.startswith(prefix):
            continue
        weights[name.removeprefix(prefix)] = weight
    weights.pop("mask_token", None)
    return weights


# ------------------------------------------------------------------- prediction
@torch.no_grad()
def predict(net, image, window, turns=(0,), **sliding):
    """Predict a whole prepared volume on its own grid [SMIT 3].

    image (D, H, W) uint8.
    turns: quarter turns in the axial plane to average over, as training turned its crops.
    sliding: arguments of sliding_window.
    Returns logits (num_classes, D, H, W).
    """
    volume = torch.from_numpy(np.array(image))[None, None] / 255           # (1, 1, D, H, W)
    total = None
    for turn in turns:
        turned = sliding_window(net, rotate90(volume, turn), window, **sliding)
        logits = rotate90(turned, -turn)[0]
        total = logits if total is None else total.add_(logits)
    return total.div_(len(turns))


# ------------------------------------------------------------------------ speed
# Both layers compute what torch's own would, to rounding. On a CPU torch's copy
# channels-last volumes before and after; these do not. A GPU runs torch's own.
class PointConv(nn.Conv3d):
    """Convolve with size 1: equals nn.Conv3d, on a CPU as the matrix product that it is."""

    def __init__(self, c_in, c_out, bias=True):
        super().__init__(c_in, c_out, 1, bias=bias)

    def forward(self, x):
        """x (B, c_in, D, H, W) -> (B, c_out, D, H, W)."""
        if x.is_cuda:
            return super().forward(x)
        tokens = x.movedim(1, -1)                                          # (B, D, H, W, c_in)
        return F.linear(tokens, self.weight.flatten(1), self.bias).movedim(-1, 1)


class InstanceNorm(nn.Module):
    """Give each sample and channel mean 0 and variance 1 over space.

    It equals F.instance_norm, which refuses a single voxel; a CPU gives 0 for it here.
    """

    def forward(self, x):
        """x (B, C, D, H, W) -> the same shape."""
        if x.is_cuda:
            return F.instance_norm(x)
        B, C, D, H, W = x.shape
        rows = x.movedim(1, -1).flatten(1, 3)                              # (B, N, C)
        return NormaliseSpace.apply(rows).view(B, D, H, W, C).movedim(-1, 1)


class NormaliseSpace(torch.autograd.Function):
    """Compute (rows - mean) / sqrt(variance + 1e-5) over N of rows (B, N, C).

    Inside in float32, or in float64 for float64. Backward keeps the result in place of the rows.
    """

    @staticmethod
    def forward(ctx, rows):
        normed = rows.to(torch.promote_types(rows.dtype, torch.float32))
        normed = normed - normed.mean(1, keepdim=True)
        scale = normed.square().mean(1, keepdim=True).add_(1e-5).rsqrt_()  # (B, 1, C)
        normed = normed.mul_(scale).to(rows.dtype)
        ctx.save_for_backward(normed, scale)
        return normed

    @staticmethod
    def backward(ctx, grad):
        """Return scale * (grad - mean(grad) - normed * mean(grad * normed))."""
        normed, scale = ctx.saved_tensors
        dtype = normed.dtype
        grad, normed = grad.to(scale.dtype), normed.to(scale.dtype)
        along = (grad * normed).mean(1, keepdim=True)                      # (B, 1, C)
        centred = grad - grad.mean(1, keepdim=True)
        return centred.addcmul_(normed, along, value=-1).mul_(scale).to(dtype)
