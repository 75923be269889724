"""A 3-D Swin transformer: window attention, shifted windows, patch merging [SMIT 2; Swin 3].

The encoder f(theta) of the paper, "Swin-small, 768 embedding": 48 channels after a patch embedding of 2^3 voxels, four
stages of 2, 2, 4, 2 blocks on windows of 4^3 tokens, and a merge after each stage, so that a 96^3 crop ends as 3^3
tokens of 768 channels. Tokens travel channels-last, (B, D, H, W, C). Needs torch alone.

Reading order: windows (partition, order, bias index, shift mask), attention, block, merging, encoder.
Checked against a brute-force attention over token pairs in tests/test_swin.py.

    B batch   D H W grid of tokens   C channels   n tokens in a window   nW windows in a volume   h heads
"""
import functools
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FORBIDDEN = -1e4  # added to a score that must not count: exp() of it is 0 in fp32, bf16 and fp16, and fp16 can hold it
PIECE = 2 ** 18   # values that checkpointing recomputes at a time: what becomes of them still fits into a cache [ours]


# ---------------------------------------------------------------------------------------------------------- windows
def partition_windows(x, window):
    """Cut a grid of tokens into windows, both windows and the cells in them in row-major order [Swin 3.2].

    x (B, D, H, W, C), each of D, H, W a multiple of its window. Returns (B*nW, n, C).
    """
    B, D, H, W, C = x.shape
    d, h, w = window
    x = x.view(B, D // d, d, H // h, h, W // w, w, C)                   # (B, nD, d, nH, h, nW, w, C)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, d * h * w, C)  # (B*nW, n, C)


def reverse_windows(windows, window, grid):
    """Put windows back into the grid: the exact inverse of partition_windows [Swin 3.2].

    windows (B*nW, n, C), grid (D, H, W). Returns (B, D, H, W, C).
    """
    # differs: the release permutes axes in another order here, which scatters 99.9 % of a 48^3 grid's tokens
    (D, H, W), (d, h, w) = grid, window
    x = windows.view(-1, D // d, H // h, W // w, d, h, w, windows.shape[-1])          # (B, nD, nH, nW, d, h, w, C)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, D, H, W, windows.shape[-1])  # (B, D, H, W, C)


@functools.lru_cache(maxsize=64)
def window_order(grid, window, shift, device=None):
    """The cyclic shift [Swin 3.2] and the cut into windows as one order of tokens, and the order that undoes it.

    Token i of the windows is token `into[i]` of the grid, and i of the grid `back[i]` of the windows: two of (D*H*W,).
    """
    token = torch.arange(math.prod(grid))
    into = partition_windows(token.view(1, *grid, 1).roll([-s for s in shift], (1, 2, 3)), window)
    back = reverse_windows(token.view(-1, math.prod(window), 1), window, grid).roll(shift, (1, 2, 3))
    return into.flatten().to(device), back.flatten().to(device)


class Reorder(torch.autograd.Function):
    """x (B, N, C) -> x[:, order]: one copy, where torch.roll and a partition make four. Backward copies likewise."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(1, *ctx.saved_tensors), None, None


@functools.lru_cache(maxsize=64)
def relative_position_index(window, table_window=None, device=None):
    """Row of the bias table for each pair of a window's cells: one value per offset [Swin Eq. 4].

    Returns (n, n) long; do not write to it. The table has prod(2 * t - 1) rows, t the `table_window` (by default the
    window itself): a window clamped to a small grid looks its true offsets up in the table of the full one.
    """
    cells = torch.cartesian_prod(*(torch.arange(w) for w in window))    # (n, 3)
    index = 0
    for axis, t in enumerate(table_window or window):
        offset = cells[:, None, axis] - cells[None, :, axis]            # (n, n) in [-(t-1), t-1]
        index = index * (2 * t - 1) + offset + t - 1
    return index.to(device)


@functools.lru_cache(maxsize=64)  # differs: the release builds this mask again in every forward
def shift_mask(grid, window, shift, device=None):
    """What to add to attention scores after the cyclic shift: 0 where allowed, FORBIDDEN elsewhere [Swin 3.2, Fig. 4].

    Two tokens may meet unless one of them came round from the other end of an axis. A grid that is no multiple of the
    window counts as padded at its ends, and no query may look at a padded key. Returns (nW, n, n); do not write to it.
    """
    padded = tuple(math.ceil(g / w) * w for g, w in zip(grid, window))
    into, _ = window_order(padded, window, shift)
    cell = torch.stack(torch.unravel_index(into, padded), -1).view(-1, math.prod(window), 3)  # (nW, n, 3)
    came_round, real = cell < torch.tensor(shift), (cell < torch.tensor(grid)).all(-1)       # (nW, n, 3), (nW, n)
    allowed = (came_round[:, :, None] == came_round[:, None]).all(-1) & real[:, None]        # (nW, query, key)
    return torch.zeros(allowed.shape).masked_fill_(~allowed, FORBIDDEN).to(device)


def pad_to(x, grid):
    """x (B, D, H, W, C) with zeros at the far ends of its axes, as far as `grid`: (B, *grid, C)."""
    d, h, w = (new - old for new, old in zip(grid, x.shape[1:4]))
    return F.pad(x, (0, 0, 0, w, 0, h, 0, d)) if d or h or w else x


# -------------------------------------------------------------------------------------------------------- attention
class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window, with a learned bias per head and relative offset [Swin Eq. 4]."""

    def __init__(self, dim, heads, window, qkv_bias=False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels cannot be shared by {heads} heads; choose a divisor of {dim}")
        self.heads, self.window = heads, tuple(window)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.empty(math.prod(2 * w - 1 for w in window), heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def position_bias(self, window):
        """Every head's bias for each pair of cells of `window`, which may be smaller than the table's: (h, n, n)."""
        index = relative_position_index(window, self.window, self.bias_table.device)
        return self.bias_table.T.index_select(1, index.flatten()).view(self.heads, *index.shape)

    def forward(self, x, window, mask=None):
        """x (B*nW, n, C), mask (nW, n, n) to be added or None. Returns (B*nW, n, C)."""
        windows, n, C = x.shape
        h = self.heads
        q, k, v = self.qkv(x).view(windows, n, 3, h, C // h).permute(2, 0, 3, 1, 4)           # (B*nW, h, n, C/h)
        scores = (q * (C // h) ** -0.5) @ k.transpose(-2, -1)                                 # (B*nW, h, n, n)
        scores += self.position_bias(window).to(scores.dtype)     # in place: the scores are the largest tensor here
        if mask is not None:                                      # a constant: autograd would copy to follow it
            scores.detach().view(-1, len(mask), h, n, n).add_(mask[:, None].to(scores.dtype))  # (B, nW, h, n, n)
        x = scores.softmax(-1).to(v.dtype) @ v                                                # (B*nW, h, n, C/h)
        return self.proj(x.transpose(1, 2).reshape(windows, n, C))                            # (B*nW, n, C)


def recomputed(function, x, mask=None):
    """function(x, mask), piece by piece along x's first axis; backward makes each piece again in place of keeping it.

    A GPU takes all at once, a CPU what its cache holds. mask (nW, ...), for each nW rows of x, or None.
    """
    rows = len(x) if mask is None or x.is_cuda else len(mask)
    size = rows if x.is_cuda else max(1, PIECE // x[0].numel())
    pieces = (piece for volume in x.split(rows) for piece in volume.split(size))
    masks = ((None,) if mask is None else mask.split(size)) * len(x)                       # as many as there are pieces
    return torch.cat([checkpoint(function, *both, use_reentrant=False, preserve_rng_state=False)
                      for both in zip(pieces, masks)])


def drop_path(branch, rate, noise):
    """Drop a residual branch for samples whose uniform noise (B,) lies under `rate`; scale up the others [Swin A2]."""
    keep = (noise >= rate).to(branch.dtype) / (1 - rate)
    return branch * keep.view(-1, 1, 1, 1, 1)


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); the windows of odd blocks are shifted by half [Swin Eq. 3]."""

    def __init__(self, dim, heads, window, shifted, mlp_ratio, qkv_bias, drop_rate, mask_padding, checkpointing=False):
        super().__init__()
        self.window, self.shifted = tuple(window), shifted
        self.drop_rate, self.mask_padding, self.checkpointing = drop_rate, mask_padding, checkpointing
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, window, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def attend(self, x):
        """Attention in (shifted) windows of a grid of any size: x (B, D, H, W, C) -> the same shape."""
        grid = tuple(x.shape[1:4])
        window = tuple(min(w, g) for w, g in zip(self.window, grid))
        shift = tuple(w // 2 if self.shifted and w < g else 0 for w, g in zip(window, grid))
        padded = tuple(math.ceil(g / w) * w for g, w in zip(grid, window))
        # differs: padded cells are no keys; the release lets them take part in the softmax, as Swin does
        real = grid if self.mask_padding else padded
        mask = shift_mask(real, window, shift, x.device) if any(shift) or real != padded else None
        x = pad_to(x, padded)
        into, back = window_order(padded, window, shift, x.device)
        windows = Reorder.apply(x.flatten(1, 3), into, back).view(-1, math.prod(window), x.shape[-1])  # (B*nW, n, C)
        attention = lambda windows, mask: self.attention(windows, window, mask)
        windows = recomputed(attention, windows, mask) if self.checkpointing else attention(windows, mask)
        x = Reorder.apply(windows.view(len(x), -1, x.shape[-1]), back, into).unflatten(1, padded)
        return x[:, :grid[0], :grid[1], :grid[2]]

    def mix(self, x):
        """The MLP of each normed token by itself: x (B, D, H, W, C) -> the same shape."""
        if self.checkpointing:
            return recomputed(lambda tokens, _: self.mlp(self.norm2(tokens)), x.flatten(0, 3)).view(x.shape)
        # GELU is cheap, and its result as large as any: backward makes it again
        return checkpoint(self.mlp[1:], self.mlp[0](self.norm2(x)), use_reentrant=False, preserve_rng_state=False)

    def forward(self, x, noise=None):
        """x (B, D, H, W, C); noise (B, 2) uniform, one draw per branch, or None to drop nothing."""
        attended = self.attend(self.norm1(x))
        x = x + (attended if noise is None else drop_path(attended, self.drop_rate, noise[:, 0]))
        mixed = self.mix(x)
        return x + (mixed if noise is None else drop_path(mixed, self.drop_rate, noise[:, 1]))


# ------------------------------------------------------------------------------------------------ merging and stages
class PatchMerging(nn.Module):
    """Join each 2 x 2 x 2 neighbourhood: concatenate, LayerNorm, Linear(8C -> 2C) [Swin 3.1]. Odd ends are padded."""

    # [release]: neighbours are concatenated in this order of their (D, H, W) offsets; weights made elsewhere may need
    # the input of `reduction` (and of the norm) permuted
    ORDER = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1))
    ROW_MAJOR = sorted(range(8), key=ORDER.__getitem__)

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x):
        x = pad_to(x, [g + g % 2 for g in x.shape[1:4]])
        B, D, H, W, C = x.shape
        x = x.view(B, D // 2, 2, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)  # (..., 8C)
        # these neighbours are in row-major order: it is quicker to bring the weights to it than the tokens out of it
        weight, bias, reduction = (parameter.unflatten(-1, (8, C))[..., self.ROW_MAJOR, :].flatten(-2)
                                   for parameter in (self.norm.weight, self.norm.bias, self.reduction.weight))
        return F.linear(F.layer_norm(x, (8 * C,), weight, bias), reduction)              # (B, D/2, H/2, W/2, 2C)


class SwinStage(nn.Module):
    """The blocks of one resolution, and the merge that leaves it."""

    def __init__(self, dim, drop_rates, **settings):
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(dim, shifted=bool(i % 2), drop_rate=rate, **settings) for i, rate in enumerate(drop_rates))
        self.merge = PatchMerging(dim)


class SwinTransformer3D(nn.Module):
    """The visual tokenizer f(theta): patch embedding, four Swin stages, a merge after each [SMIT 2; Swin Fig. 3].

    window: tokens per axis, one number or one per axis.    patch: voxels per axis of a token.
    drop_path: rate of the last block; earlier blocks rise to it linearly from 0.
    mask_token: own the learned vector e_[MASK] that replaces hidden tokens; fine-tuning does without.
    mask_padding: keep padded cells out of the softmax; False is Swin's habit, for weights trained that way.
    checkpointing: recompute attention and MLP in backward instead of keeping their activations.
    """

    def __init__(self, in_channels=1, embed_dim=48, depths=(2, 2, 4, 2), heads=(4, 4, 4, 4), window=(4, 4, 4), patch=2,
                 mlp_ratio=4, qkv_bias=False, drop_path=0.0, mask_token=True, mask_padding=True, checkpointing=False):
        super().__init__()
        if len(heads) != len(depths):
            raise ValueError(f"{len(depths)} depths need as many heads, not {len(heads)}")
        window = (window,) * 3 if isinstance(window, int) else tuple(window)
        self.patch = patch
        self.channels = [embed_dim * 2 ** i for i in range(len(depths) + 1)]  # of the tensors that forward returns
        self.patch_embed = nn.Conv3d(in_channels, embed_dim, patch, patch)
        self.patch_norm = nn.LayerNorm(embed_dim)
        self.mask_token = nn.Parameter(torch.empty(embed_dim)) if mask_token else None
        rates = torch.linspace(0, drop_path, sum(depths)).split(depths)
        self.stages = nn.ModuleList(
            SwinStage(C, stage_rates.tolist(), heads=h, window=window, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
                      mask_padding=mask_padding, checkpointing=checkpointing)
            for C, stage_rates, h in zip(self.channels, rates, heads))
        self.norms = nn.ModuleList(nn.LayerNorm(C) for C in self.channels[:-1])
        self.drops = 2 * sum(depths) if drop_path else 0  # uniform draws that one sample's drop path needs
        self.apply(initialise)
        if mask_token:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def embed(self, x, hidden=None):
        """Patches to tokens, hidden ones replaced by the mask token [SMIT 2]: (B, c, D, H, W) -> (B, D/2, ..., C)."""
        short = [-size % self.patch for size in x.shape[2:]]
        x = F.pad(x, (0, short[2], 0, short[1], 0, short[0])) if any(short) else x
        x = self.patch_norm(self.patch_embed(x).permute(0, 2, 3, 4, 1).contiguous())
        if hidden is None:
            return x
        if self.mask_token is None:
            raise ValueError("this encoder has no mask token; build it with mask_token=True to hide tokens")
        if hidden.shape != x.shape[:4]:
            raise ValueError(f"hidden is {tuple(hidden.shape)}, the token grid {tuple(x.shape[:4])}; "
                             "expand the mask to token resolution")
        return torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)

    def forward(self, x, hidden=None, noise=None, wanted=None):
        """Encode a volume into tokens of five resolutions.

        x (B, in_channels, D, H, W); hidden (B, D/patch, H/patch, W/patch) bool, True = replaced by the mask token;
        noise (B, drops) uniform in [0, 1), the draws of drop path: given, a run is repeatable whatever the batch;
        absent, they are drawn here in training mode. Returns a list of (B, C_i, D_i, H_i, W_i): each stage's output,
        normed, and the last merge's; at 96^3: 48@48^3, 96@24^3, 192@12^3, 384@6^3, 768@3^3. `wanted` names the indices
        that are used; the others come as None and cost nothing. All are stored channels-last.
        """
        x = self.embed(x, hidden)
        if self.drops and self.training and noise is None:
            noise = torch.rand(len(x), self.drops, device=x.device)
        pairs = iter(noise.split(2, dim=1)) if self.drops and self.training else iter(())
        wanted = range(len(self.channels)) if wanted is None else wanted
        outputs = [None] * len(self.channels)
        for level, (stage, norm) in enumerate(zip(self.stages[:max(wanted) + 1], self.norms)):
            for block in stage.blocks:
                x = block(x, next(pairs, None))
            if level in wanted:
                outputs[level] = norm(x)
            if level < max(wanted):
                x = stage.merge(x)
        if len(self.stages) in wanted:
            outputs[-1] = x
        return [y if y is None else y.permute(0, 4, 1, 2, 3) for y in outputs]


def initialise(module):
    """Truncated normal of .02 and zero bias for linear layers [Swin].

    The patch embedding keeps torch's own initialisation, whose bias is not zero: a patch of air, all zeros, would
    otherwise enter the LayerNorms as a zero vector, where their gradient is 1 / sqrt(eps) = 316 each.
    """
    # differs: the release writes this initialisation but never calls it
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
