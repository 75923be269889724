"""A 3-D Swin transformer: window attention, shifted windows, patch merging [SMIT 2; Swin 3].

This is the paper's encoder f(theta), "Swin-small, 768 embedding". A patch
embedding turns each 2^3 voxels into a token of 48 channels. Four stages of
2, 2, 4, 2 blocks attend within windows of 4^3 tokens, and each stage ends with
a merge. So a 96^3 crop ends as 3^3 tokens of 768 channels. Tokens travel
channels-last, (B, D, H, W, C). Needs torch alone.

Reading order: windows (partition, bias index, shift mask), attention, block,
merging, encoder. The tricks for speed stand apart, at the end of the file.
tests/test_swin.py compares it with brute-force attention over token pairs.

    B batch   D H W grid of tokens   C channels   h heads   d channels of a head
    n tokens in a window   nW windows in a volume
"""
import functools
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Added to a score that must not count. Its exp() is 0 in fp32, bf16 and fp16.
# fp16 holds it, where -1e9 would be -inf.
FORBIDDEN = -1e4
MOST_VARIANTS = 64                     # of a block, compiled


# ---------------------------------------------------------------------- windows
def partition_windows(x, window):
    """Cut a grid of tokens into windows [Swin 3.2].

    x (B, D, H, W, C); each of D, H, W is a multiple of its window's side.
    Returns (B*nW, n, C). Windows, and the cells in them, are in row-major order.
    """
    B, D, H, W, C = x.shape
    d, h, w = window
    x = x.view(B, D // d, d, H // h, h, W // w, w, C)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)              # (B, nD, nH, nW, d, h, w, C)
    return x.reshape(-1, d * h * w, C)


def reverse_windows(windows, window, grid):
    """Put windows back into their grid: the exact inverse of partition_windows [Swin 3.2].

    windows (B*nW, n, C), grid (D, H, W). Returns (B, D, H, W, C).
    """
    # differs: the release permutes axes in another order here, which scatters 99.9 %
    # of a 48^3 grid's tokens
    D, H, W = grid
    d, h, w = window
    C = windows.shape[-1]
    x = windows.view(-1, D // d, H // h, W // w, d, h, w, C)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)              # (B, nD, d, nH, h, nW, w, C)
    return x.reshape(-1, D, H, W, C)


def shift_and_partition(x, window, shift):
    """Shift a grid cyclically, then cut it into windows [Swin 3.2, Fig. 4].

    x (B, D, H, W, C) -> (B*nW, n, C). shift: cells by which the windows lie further on.
    """
    if any(shift):
        return reorder_into_windows(x, window, shift)
    return partition_windows(x, window)


def reverse_and_unshift(windows, window, grid, shift):
    """Put shifted windows back into their grid: the exact inverse of shift_and_partition."""
    if any(shift):
        return reorder_into_grid(windows, window, grid, shift)
    return reverse_windows(windows, window, grid)


# The tables below are cached. A tensor made in inference mode cannot be trained with
# later, so these are made outside it. Few of those for a grid are kept: a whole scan's
# shift mask takes hundreds of MiB, and the next scan has another grid.
@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def relative_position_index(window, table_window=None, device=None):
    """Give each pair of a window's cells the row of its offset in the bias table [Swin Eq. 4].

    table_window: the window that the table was made for, by default `window`
    itself. A window clamped to a small grid looks its true offsets up in the
    table of the full one, of prod(2 * side - 1) rows.
    Returns (n, n) long, cached: do not write to it.
    """
    cells = torch.cartesian_prod(*map(torch.arange, window))               # (n, 3)
    index = 0
    for axis, side in enumerate(table_window or window):
        offset = cells[:, None, axis] - cells[None, :, axis]               # (n, n)
        index = index * (2 * side - 1) + (offset + side - 1)
    return index.to(device)


# differs: the release builds this mask again in every forward
@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def shift_mask(grid, window, shift, device=None):
    """Build what is added to attention scores after the cyclic shift [Swin 3.2, Fig. 4].

    Two tokens may meet unless, along some axis, just one of them came round from the
    other end. A grid that is no multiple of the window is padded at its far ends, and
    no query may look at a padded key.
    Returns (nW, query n, key n), 0 where a pair may meet and FORBIDDEN elsewhere.
    It is cached: do not write to it.
    """
    padded = padded_grid(grid, window)
    cells = torch.cartesian_prod(*map(torch.arange, padded)).view(1, *padded, 3)
    cells = cells.roll([-s for s in shift], dims=(1, 2, 3))
    cells = partition_windows(cells, window)                               # (nW, n, 3)

    came_round = cells < torch.tensor(shift)                               # (nW, n, 3)
    same_side = (came_round[:, :, None] == came_round[:, None]).all(-1)    # (nW, n, n)
    real = (cells < torch.tensor(grid)).all(-1)                            # (nW, n)
    allowed = same_side & real[:, None]                                    # (nW, n, n)
    return torch.zeros(allowed.shape).masked_fill_(~allowed, FORBIDDEN).to(device)


def padded_grid(grid, window):
    """Round each side of a grid up to a multiple of the window's."""
    return tuple(math.ceil(side / w) * w for side, w in zip(grid, window))


def pad_to(x, grid):
    """Append zeros at the far ends of the axes: x (B, D, H, W, C) -> (B, *grid, C)."""
    d, h, w = (new - old for new, old in zip(grid, x.shape[1:4]))
    if not (d or h or w):
        return x
    return F.pad(x, (0, 0, 0, w, 0, h, 0, d))


# -------------------------------------------------------------------- attention
class WindowAttention(nn.Module):
    """Attend within each window, with a learned bias per head and offset [Swin Eq. 4]."""

    def __init__(self, dim, heads, window, qkv_bias=False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels cannot be shared by {heads} heads; "
                             f"choose a divisor of {dim}")
        self.heads = heads
        self.window = tuple(window)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        offsets = math.prod(2 * side - 1 for side in window)
        self.bias_table = nn.Parameter(torch.empty(offsets, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def position_bias(self, index):
        """Look up each head's bias for each pair of cells: index (n, n) -> (h, n, n)."""
        bias = self.bias_table.T.index_select(1, index.flatten())          # (h, n*n)
        return bias.view(self.heads, *index.shape)

    def forward(self, x, index, mask=None):
        """x (B*nW, n, C) -> the same shape.

        index (n, n): of relative_position_index, for this window and self.window.
        mask (nW, n, n): of shift_mask, the same for each of the B volumes, or None.
        """
        windows, n, C = x.shape
        d = C // self.heads
        nW = 1 if mask is None else len(mask)
        qkv = self.qkv(x).view(-1, nW, n, 3, self.heads, d)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)                            # (B, nW, h, n, d)
        bias = self.position_bias(index)                                   # (h, n, n)

        if torch.is_grad_enabled():
            # the scores are the largest tensor here, so bias and mask are added in place
            scores = (q * d ** -0.5) @ k.transpose(-2, -1)                 # (B, nW, h, n, n)
            scores += bias.to(scores.dtype)
            if mask is not None:
                scores += mask[:, None].to(scores.dtype)
            x = scores.softmax(-1, dtype=v.dtype) @ v                      # (B, nW, h, n, d)
        else:
            x = fused_attention(q, k, v, bias, mask)

        x = x.transpose(-3, -2).reshape(windows, n, C)                     # heads side by side
        return self.proj(x)


# ------------------------------------------------------------------------ block
def drop_path(branch, rate, noise):
    """Drop a sample's residual branch where its noise lies under `rate` [Swin A2].

    The others are scaled up. branch (B, D, H, W, C); noise (B,) uniform in [0, 1).
    """
    keep = (noise >= rate).to(branch.dtype) / (1 - rate)
    return branch * keep.view(-1, 1, 1, 1, 1)


class SwinBlock(nn.Module):
    """Add attention(norm(x)), then MLP(norm(x)) [Swin Eq. 3].

    The windows of a shifted block lie half a window further on than the others'.
    """

    def __init__(self, dim, heads, window, shifted, mlp_ratio, qkv_bias, drop_rate,
                 mask_padding, checkpointing=False):
        super().__init__()
        self.window = tuple(window)
        self.shifted = shifted
        self.drop_rate = drop_rate
        self.mask_padding = mask_padding
        self.checkpointing = checkpointing
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, window, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def attend(self, x):
        """Attend in the (shifted) windows of a grid of any size.

        x (B, D, H, W, C) -> the same shape.
        """
        # differs: a window is clamped to the grid, and one that spans an axis is not
        # shifted along it; the release pads a smaller grid, and shifts
        D, H, W = grid = tuple(x.shape[1:4])
        window = tuple(min(w, side) for w, side in zip(self.window, grid))
        shift = (0, 0, 0)
        if self.shifted:
            shift = tuple(w // 2 if w < side else 0 for w, side in zip(window, grid))
        padded = padded_grid(grid, window)

        # differs: padded cells are no keys; the release lets them take part in the
        # softmax, as Swin does
        real_grid = grid if self.mask_padding else padded
        mask = None
        if any(shift) or real_grid != padded:
            mask = shift_mask(real_grid, window, shift, x.device)          # (nW, n, n)
        index = relative_position_index(window, self.window, x.device)     # (n, n)

        x = pad_to(x, padded)                                              # (B, D', H', W', C)
        windows = shift_and_partition(x, window, shift)                    # (B*nW, n, C)
        if self.checkpointing:
            windows = recompute_attention(self.attention, windows, index, mask)
        else:
            windows = self.attention(windows, index, mask)
        x = reverse_and_unshift(windows, window, padded, shift)            # (B, D', H', W', C)
        return x[:, :D, :H, :W]

    def mix(self, x):
        """Mix the channels of each token by itself: x (B, D, H, W, C) -> the same shape."""
        if self.checkpointing:
            return recompute(self.norm_and_mlp, x.flatten(0, 3)).view(x.shape)
        return self.mlp(self.norm2(x))

    def norm_and_mlp(self, tokens):
        # plain: recomputing all of it makes GELU's own recomputation a waste
        return self.mlp.plain(self.norm2(tokens))                          # (tokens, C)

    def forward(self, x, noise=None):
        """x (B, D, H, W, C) -> the same shape.

        noise (B, 2) uniform: a draw for each branch, or None to drop nothing.
        """
        attended = self.attend(self.norm1(x))
        if noise is not None:
            attended = drop_path(attended, self.drop_rate, noise[:, 0])
        x = x + attended

        mixed = self.mix(x)
        if noise is not None:
            mixed = drop_path(mixed, self.drop_rate, noise[:, 1])
        return x + mixed


# ----------------------------------------------------------- merging and stages
class PatchMerging(nn.Module):
    """Join each 2 x 2 x 2 neighbourhood into one token of twice the width [Swin 3.1].

    The eight neighbours are concatenated in row-major order of their offsets,
    000, 001, 010, ..., 111; then LayerNorm and Linear(8C -> 2C). Odd ends are padded.
    """

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x):
        """x (B, D, H, W, C) -> (B, D/2, H/2, W/2, 2C)."""
        x = pad_to(x, padded_grid(x.shape[1:4], (2, 2, 2)))
        B, D, H, W, C = x.shape
        x = x.view(B, D // 2, 2, H // 2, 2, W // 2, 2, C)
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)                   # (B, D/2, H/2, W/2, 8C)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """Hold the blocks of one resolution, and the merge that leaves it."""

    def __init__(self, dim, drop_rates, **settings):
        super().__init__()
        self.blocks = nn.ModuleList()
        for number, rate in enumerate(drop_rates):
            shifted = number % 2 == 1
            self.blocks.append(SwinBlock(dim, shifted=shifted, drop_rate=rate, **settings))
        self.merge = PatchMerging(dim)


# ---------------------------------------------------------------------- encoder
class SwinTransformer3D(nn.Module):
    """Tokenize a volume: the encoder f(theta) [SMIT 2; Swin Fig. 3].

    It is a patch embedding and four Swin stages, with a merge after each.

    window: tokens per axis, one number or one per axis.
    patch: voxels per axis of a token.
    mlp_ratio: hidden channels of an MLP for each channel of a token [release].
    qkv_bias: give queries, keys and values a bias [release: none].
    drop_path: rate of the last block; it rises to this linearly, from 0 in the first.
    mask_token: own the learned vector e_[MASK] that replaces hidden tokens;
        fine-tuning does without.
    mask_padding: keep padded cells out of the softmax. False is Swin's habit, for
        weights trained that way.
    checkpointing: recompute attention and MLP in backward, instead of keeping
        their activations.
    """

    def __init__(self, in_channels=1, embed_dim=48, depths=(2, 2, 4, 2), heads=(4, 4, 4, 4),
                 window=(4, 4, 4), patch=2, mlp_ratio=4, qkv_bias=False, drop_path=0.0,
                 mask_token=True, mask_padding=True, checkpointing=False):
        super().__init__()
        if len(heads) != len(depths):
            raise ValueError(f"{len(depths)} depths need as many heads, not {len(heads)}")
        if isinstance(window, int):
            window = (window, window, window)
        self.patch = patch
        self.patch_embed = nn.Conv3d(in_channels, embed_dim, patch, patch)
        self.patch_norm = nn.LayerNorm(embed_dim)
        self.mask_token = nn.Parameter(torch.empty(embed_dim)) if mask_token else None

        # channels of the tensors that forward returns; the last merge has no norm
        self.channels = [embed_dim * 2 ** level for level in range(len(depths) + 1)]
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").split(depths)
        self.stages = nn.ModuleList()
        for dim, stage_heads, stage_rates in zip(self.channels, heads, rates):
            self.stages.append(SwinStage(
                dim, stage_rates.tolist(), heads=stage_heads, window=window, mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias, mask_padding=mask_padding, checkpointing=checkpointing))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in self.channels[:-1])

        # uniform numbers that one sample's drop path needs, two for each block
        self.drops = 2 * sum(depths) if drop_path else 0
        self.apply(initialise)
        if mask_token:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def embed(self, x, hidden=None):
        """Turn patches into tokens and replace the hidden ones by the mask token [SMIT 2].

        x (B, in_channels, D, H, W). Returns (B, D/patch, H/patch, W/patch, C).
        """
        d, h, w = (-side % self.patch for side in x.shape[2:])             # missing voxels
        if d or h or w:
            x = F.pad(x, (0, w, 0, h, 0, d))
        x = self.patch_embed(x).permute(0, 2, 3, 4, 1).contiguous()
        x = self.patch_norm(x)
        if hidden is None:
            return x

        if self.mask_token is None:
            raise ValueError("this encoder has no mask token; build it with mask_token=True "
                             "to hide tokens")
        if hidden.shape != x.shape[:4]:
            raise ValueError(f"hidden is {tuple(hidden.shape)}, the token grid "
                             f"{tuple(x.shape[:4])}; expand the mask to token resolution")
        return torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)

    def forward(self, x, hidden=None, noise=None, wanted=None):
        """Encode a volume into tokens of five resolutions.

        x (B, in_channels, D, H, W).
        hidden (B, D/patch, H/patch, W/patch) bool: True = replaced by the mask token.
        noise (B, drops) uniform in [0, 1): the draws of drop path. Given, a run is
            repeatable whatever the batch; absent, they are drawn here in training mode.
        wanted: indices of the outputs that are used, from 0 on; the others come as
            None and cost nothing. By default all. ValueError for an index of none.

        Returns a list of (B, C_i, D_i, H_i, W_i), each stored channels-last: every
        stage's output, normed, and the last merge's. At 96^3 they are 48@48^3,
        96@24^3, 192@12^3, 384@6^3 and 768@3^3.
        """
        every = range(len(self.channels))
        wanted = every if wanted is None else wanted
        if not wanted or not set(wanted) <= set(every):
            raise ValueError(f"wanted {list(wanted)}: choose from the outputs {list(every)}")
        x = self.embed(x, hidden)
        draws = self.drop_path_draws(noise, x)
        outputs = [None] * len(self.channels)

        number = 0
        for level, stage in enumerate(self.stages):
            if level > max(wanted):
                break
            for block in stage.blocks:
                x = block(x, draws[number])
                number += 1
            if level in wanted:
                outputs[level] = self.norms[level](x)
            if level < max(wanted):
                x = stage.merge(x)
        if len(self.stages) in wanted:
            outputs[-1] = x
        return [None if y is None else y.permute(0, 4, 1, 2, 3) for y in outputs]

    def drop_path_draws(self, noise, x):
        """Split drop path's noise (B, drops) into each block's (B, 2); None where nothing drops."""
        if not (self.drops and self.training):
            return [None] * sum(len(stage.blocks) for stage in self.stages)
        if noise is None:
            noise = torch.rand(len(x), self.drops, device=x.device)
        return noise.split(2, dim=1)

    def layers(self):
        """List the encoder's layers bottom-up, for layer-wise learning rates [BEiT].

        First the embedding, then one entry a block. A stage's norm and merge go with
        its last block. Each entry is a module, and each parameter stands in one entry.
        """
        embedding = nn.ModuleList([self.patch_embed, self.patch_norm])
        if self.mask_token is not None:
            embedding.append(nn.ParameterList([self.mask_token]))
        layers = [embedding]
        for stage, norm in zip(self.stages, self.norms):
            layers += [nn.ModuleList([block]) for block in stage.blocks]
            layers[-1].extend([norm, stage.merge])
        return layers

    def compile_blocks(self, **settings):
        """Compile each block's attention and MLP by themselves; settings go to torch.compile.

        Not the whole encoder: it would build index tables and shift masks again in
        every forward, where the caches above are not looked into.
        """
        # Blocks share their code, of which torch compiles 8 variants by default and runs all others
        # uncompiled. Widths, shift masks, gradients or none make some 15, of student and teacher.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_VARIANTS)
        for stage in self.stages:
            for block in stage.blocks:
                block.attention.compile(**settings)
                if block.checkpointing:
                    block.norm_and_mlp = torch.compile(block.norm_and_mlp, **settings)
                else:
                    block.mlp.compile(**settings)


def initialise(module):
    """Draw linear layers from a truncated normal of .02, with zero bias [Swin].

    The patch embedding keeps torch's own initialisation, whose bias is not zero. A
    patch of air is all zeros, and would otherwise enter the LayerNorms as a zero
    vector, where their gradient is 1 / sqrt(eps) = 316 each.
    """
    # differs: the release writes this initialisation but never calls it
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------ speed
# Everything below computes what a plain line above or torch itself would compute.
# A test holds each against that plain form.

# tokens x channels recomputed at once on a CPU, so that attention's buffers stay in cache [ours]
PIECE = 2 ** 18
# no function below draws random numbers, so their state need not be kept
CHECKPOINT = dict(use_reentrant=False, preserve_rng_state=False)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def window_order(grid, window, shift, device=None):
    """List for each cell of the shifted windows its place in the grid, and the inverse order.

    Two of (D*H*W,), cached: do not write to them.
    """
    places = torch.arange(math.prod(grid)).view(1, *grid, 1)
    places = places.roll([-s for s in shift], dims=(1, 2, 3))
    places = partition_windows(places, window).flatten()
    return places.to(device), places.argsort().to(device)


def reorder_into_windows(x, window, shift):
    """Equal partition_windows(x.roll(-shift)), in one copy.

    torch.roll alone makes three, each by one thread of a CPU: with it an encoder's step
    takes some 5 % longer on two cores.
    """
    into, back = window_order(tuple(x.shape[1:4]), window, shift, x.device)
    windows = Reorder.apply(x.flatten(1, 3), into, back)                   # (B, nW*n, C)
    return windows.view(-1, math.prod(window), x.shape[-1])                # (B*nW, n, C)


def reorder_into_grid(windows, window, grid, shift):
    """Equal reverse_windows(windows).roll(shift), in one copy."""
    into, back = window_order(grid, window, shift, windows.device)
    tokens = windows.view(-1, math.prod(grid), windows.shape[-1])          # (B, nW*n, C)
    return Reorder.apply(tokens, back, into).unflatten(1, grid)            # (B, D, H, W, C)


class Reorder(torch.autograd.Function):
    """Take tokens in another order: x (B, N, C) -> x[:, order]. Backward is one copy, too."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(1, inverse), None, None


def fused_attention(q, k, v, bias, mask=None, multiple=None, most=65_535):
    """Attend in one fused kernel: equals softmax(q k^T / sqrt(d) + bias + mask) v, to rounding.

    Saves the scores, the largest tensor of a forward. It is used without gradient
    alone, for with one in `bias` torch falls back to a kernel slower than the
    plain form, and cuDNN's, which torch 2.11 prefers on an H100, has given NaN in
    backward with a mask and windows of 64 tokens (pytorch#196678).

    q, k, v (B, nW, h, n, d), bias (h, n, n), mask (nW, n, n) or None -> (B, nW, h, n, d).
    multiple: zero-pad heads to a multiple of so many channels, which changes no
        product. By default 8 on a GPU, whose fast kernels ask for it, else 1.
    most: a GPU's kernel takes no more volumes at a time, nor more windows times heads.
    """
    B, nW, h, n, d = q.shape
    if B > most:
        parts = zip(*(x.split(most) for x in (q, k, v)))
        return torch.cat([fused_attention(*part, bias, mask, multiple, most) for part in parts])
    if nW * h > most:
        parts = zip(*(x.split(most // h, dim=1) for x in (q, k, v)), mask.split(most // h))
        return torch.cat([fused_attention(q, k, v, bias, mask, multiple, most)
                          for q, k, v, mask in parts], dim=1)
    if mask is not None:
        bias = bias + mask[:, None]                                        # (nW, h, n, n)

    # windows and heads share an axis, so that all volumes share one mask
    bias = bias.expand(nW, h, n, n).flatten(0, 1).to(q.dtype)              # (nW*h, n, n)
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))                         # (B, nW*h, n, d)
    if multiple is None:
        multiple = 8 if q.is_cuda else 1
    if d % multiple:
        q, k, v = (F.pad(x, (0, -d % multiple)) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, bias[None], scale=d ** -0.5)
    return y[..., :d].unflatten(1, (nW, h))


class MLP(nn.Sequential):
    """Linear, GELU, Linear: equals nn.Sequential, and computes GELU again in backward.

    GELU is cheap, and its result as large as any tensor kept: a fifth of what a
    block keeps is saved. A compiler finds that by itself, and without gradient
    nothing is kept.
    """

    def forward(self, x):
        widen, gelu, narrow = self
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.plain(x)
        return checkpoint(nn.Sequential(gelu, narrow), widen(x), **CHECKPOINT)

    def plain(self, x):
        """Do the same, and keep everything for backward."""
        return super().forward(x)


def recompute(function, *tensors):
    """Call function(*tensors): equals that, costs a second forward, keeps the arguments alone.

    A GPU takes all at once. A CPU takes pieces along the first axis of the tensors,
    which must be as long in all of them.
    """
    if tensors[0].is_cuda:
        return checkpoint(function, *tensors, **CHECKPOINT)
    rows = max(1, PIECE // tensors[0][0].numel())
    pieces = zip(*(tensor.split(rows) for tensor in tensors))
    return torch.cat([checkpoint(function, *piece, **CHECKPOINT) for piece in pieces])


def recompute_attention(attention, windows, index, mask):
    """Call attention(windows, index, mask): equals that, by `recompute`.

    On a CPU volume by volume where they share a mask.
    """
    def attend(windows, mask=None):
        return attention(windows, index, mask)

    if mask is None:
        return recompute(attend, windows)
    if windows.is_cuda:
        return checkpoint(attend, windows, mask, **CHECKPOINT)
    volumes = windows.split(len(mask))
    return torch.cat([recompute(attend, volume, mask) for volume in volumes])
