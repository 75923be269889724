"""The heads on top of the encoder: h^Pred (two kinds), h^Patch and h^[CLS] [SMIT 2, 3].

Needs torch alone.
"""
import torch
from torch import nn
from torch.nn import functional as F


# ------------------------------------------------------------------ h^Pred: voxels
class LinearVoxelHead(nn.Module):
    """Predict the cube of voxels that each token stands for: h^Pred [SMIT 2].

    It is "a linear projection with one layer". in_channels 768, cube 32 and
    out_channels 1 make 25,198,592 parameters. The map's output channel
    (c * cube + s1) * cube^2 + s2 * cube + s3 is voxel (s1, s2, s3) of image channel c.
    """

    def __init__(self, in_channels=768, cube=32, out_channels=1):
        super().__init__()
        self.cube = cube
        self.out_channels = out_channels
        self.projection = nn.Linear(in_channels, out_channels * cube ** 3)
        nn.init.trunc_normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)

    def forward(self, tokens):
        """tokens (B, in_channels, d, h, w) -> voxels (B, out_channels, d*cube, h*cube, w*cube)."""
        B, _, d, h, w = tokens.shape
        c, s = self.out_channels, self.cube
        voxels = self.projection(tokens.permute(0, 2, 3, 4, 1))            # (B, d, h, w, c*s^3)
        voxels = voxels.view(B, d, h, w, c, s, s, s)
        voxels = voxels.permute(0, 4, 1, 5, 2, 6, 3, 7)                   # (B, c, d, s, h, s, w, s)
        return voxels.reshape(B, c, d * s, h * s, w * s)


class MultiLayerVoxelHead(nn.Sequential):
    """Predict voxels by doubling the resolution five times: h^Pred of the ablation [SMIT 3].

    These are "five transpose convolution layers", 768-384-192-96-48-1.
    tokens (B, in_channels, d, h, w) -> voxels (B, out_channels, f d, f h, f w), with
    f = 2^layers: 32 for five.
    """

    def __init__(self, in_channels=768, layers=5, out_channels=1):
        widths = [in_channels // 2 ** level for level in range(layers)]
        widths.append(out_channels)
        steps = []
        for wide, narrow in zip(widths, widths[1:]):
            steps.append(nn.ConvTranspose3d(wide, narrow, kernel_size=2, stride=2))
            # differs: the paper names no activations; without them five layers would
            # be one linear map of lower rank
            steps.append(nn.GELU())
        super().__init__(*steps[:-1])                                      # none after the last


# --------------------------------------------------- h^Patch and h^[CLS]: prototypes
def mlp(in_channels, width, out_channels):
    """Make the body of a projection head: three linear layers with GELU between [DINO; release]."""
    first = nn.Linear(in_channels, width)
    second = nn.Linear(width, width)
    third = nn.Linear(width, out_channels)
    for layer in (first, second, third):
        # differs: DINO draws all three with .02. For a width of 2048 this is nearly the
        # same. In narrow heads .02 leaves almost nothing for the L2 norm to divide by:
        # gradients explode, and soon all tokens share one direction
        nn.init.trunc_normal_(layer.weight, std=layer.in_features ** -0.5)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)


class ProjectionHead(nn.Module):
    """Compare tokens with K prototypes: h^Patch and h^[CLS] [DINO 3.1, iBOT 3.2; release].

    An MLP 384-2048-2048-256 and an L2 norm, then the cosines to K = 8192 prototypes
    of unit length: 7,614,720 parameters. Of these the 8,192 gains of the weight-normed
    last layer stay at 1, as in DINO.
    """

    def __init__(self, in_channels=384, width=2048, bottleneck=256, prototypes=8192):
        super().__init__()
        self.mlp = mlp(in_channels, width, bottleneck)
        # differs: of length 1; DINO's, which torch draws, have .58, and AdamW turns those
        # faster at first
        self.directions = nn.Parameter(torch.randn(prototypes, bottleneck) * bottleneck ** -0.5)
        self.gains = nn.Parameter(torch.ones(prototypes, 1), requires_grad=False)

    def forward(self, tokens):
        """tokens (..., in_channels) -> logits (..., K) in [-1, 1], before any temperature.

        The norms and cosines leave autocast: logits are float32.
        """
        x = self.mlp(tokens)                                               # (..., bottleneck)
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(x.float(), dim=-1)
            prototypes = self.gains * F.normalize(self.directions, dim=-1)  # (K, bottleneck)
            return F.linear(x, prototypes)
