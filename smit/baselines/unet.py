"""The 3-D U-Net that Models Genesis and PCRL share. Needs torch alone.

Every CNN column of the paper's Table 2 is built on it here: the paper names no backbone for them.
Two convolutions a level, sides halved between levels. At width 64 and 96^3 voxels:

    encoder                            decoder
    (64, 96^3)   1 -> 32 -> 64         64 <- 64 <- 64 + 128      then 1^3 to the outputs
    (128, 48^3)  64 -> 64 -> 128       128 <- 128 <- 128 + 256
    (256, 24^3)  128 -> 128 -> 256     256 <- 256 <- 256 + 512
    (512, 12^3)  256 -> 256 -> 512
"""
import torch
from torch import nn
from torch.nn import functional as F

LEVELS = 4


class UNet3D(nn.Module):
    """Map a volume to as many channels, voxel by voxel [Models Genesis; PCRL].

    19,073,665 parameters at width 64 with one output: 7,027,776 in the encoder, 12,045,824 in the
    decoder, 65 in the last convolution. A forward pass of one 96^3 crop takes 824 GMAC.
    """

    def __init__(self, out_channels=1, width=64, in_channels=1):
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width {width} must be even: the first convolution has half of it")
        self.encoder = Encoder(in_channels, width)
        self.decoder = Decoder(width)
        self.out = nn.Conv3d(width, out_channels, kernel_size=1)

    def forward(self, x):
        """x (B, in_channels, D, H, W) -> logits (B, out_channels, D, H, W)."""
        return self.out(self.decoder(self.encoder(x)))


class Encoder(nn.Module):
    """Turn a volume into features of four resolutions.

    channels: of those features, the finest first. drops: random numbers that a sample needs for
    drop path, none here.
    """
    drops = 0

    def __init__(self, in_channels, width):
        super().__init__()
        self.channels = [width * 2 ** level for level in range(LEVELS)]     # 64, 128, 256, 512
        self.levels = nn.ModuleList()
        for channels in self.channels:
            self.levels.append(two_convolutions(in_channels, channels // 2, channels))
            in_channels = channels
        self.halve = nn.MaxPool3d(2)

    def forward(self, x):
        """x (B, in_channels, D, H, W) -> four tensors (B, width * 2^i, D/2^i, H/2^i, W/2^i).

        Raises ValueError unless every side is a multiple of 8.
        """
        if any(side % 2 ** (LEVELS - 1) for side in x.shape[2:]):
            raise ValueError(f"sides {tuple(x.shape[2:])} must be multiples of {2 ** (LEVELS - 1)}")

        features = [self.levels[0](x)]                                      # (B, 64, D, H, W)
        for level in self.levels[1:]:
            features.append(level(self.halve(features[-1])))
        return features

    def layers(self):
        """List the levels bottom-up, for layer-wise learning rates [BEiT]."""
        return list(self.levels)


class Decoder(nn.Module):
    """Turn features of four resolutions into one map of the finest."""

    def __init__(self, width):
        super().__init__()
        self.ups = nn.ModuleList()
        self.levels = nn.ModuleList()
        for level in reversed(range(LEVELS - 1)):
            fine, coarse = width * 2 ** level, width * 2 ** (level + 1)
            self.ups.append(nn.ConvTranspose3d(coarse, coarse, kernel_size=2, stride=2))
            self.levels.append(two_convolutions(coarse + fine, fine, fine))

    def forward(self, features):
        """features as the encoder gives them -> (B, width, D, H, W)."""
        *skips, y = features                                                # y (B, 512, D/8, ...)
        for up, level, skip in zip(self.ups, self.levels, reversed(skips)):
            y = torch.cat([up(y), skip], dim=1)                           # (B, 512 + 256, D/4, ...)
            y = level(y)                                                    # (B, 256, D/4, ...)
        return y


def two_convolutions(c_in, c_middle, c_out):
    return nn.Sequential(*convolution(c_in, c_middle), *convolution(c_middle, c_out))


def convolution(c_in, c_out):
    """Convolution with bias, norm, ReLU: layers in a list."""
    # differs: Models Genesis normalises by the statistics of the batch, in eval mode too, so that
    # the prediction of one window depends on the others; at batch 1 this is the same
    return [ChannelsLastConv3d(c_in, c_out, kernel_size=3, padding=1),
            nn.InstanceNorm3d(c_out, affine=True),
            nn.ReLU()]


class ChannelsLastConv3d(nn.Conv3d):
    """Convolve as nn.Conv3d does, to rounding; on a CPU with channels last in memory.

    At width 8 a step of training then takes about a quarter less time.
    """

    def forward(self, x):
        """x (B, c_in, D, H, W) -> (B, c_out, D, H, W)."""
        weight = self.weight
        if not x.is_cuda:
            weight = weight.contiguous(memory_format=torch.channels_last_3d)
        return convolve(x, weight, self.bias, self.padding)


def convolve(x, weight, bias, padding):
    """Convolve as F.conv3d does, on a CPU without autocast where its gradients would be wrong."""
    # torch 2.13 on a CPU: at size 3 and depth 2, bf16 gives the weight any gradient, or NaN
    if not x.is_cuda and x.shape[2] == 2:
        with torch.autocast("cpu", enabled=False):
            return F.conv3d(x.to(weight.dtype), weight, bias, padding=padding)
    return F.conv3d(x, weight, bias, padding=padding)
