"""weights.habits: each habit of imported weights against a second implementation,
written from its description."""
import copy

import pytest
import torch
from torch.nn import functional as F

from smit import swin
from smit.weights import habits

SIZES = dict(embed_dim=8, depths=(2, 2), heads=(2, 4), window=4, mask_token=False)


def encoder(*names, seed=0, **changes):
    """A small encoder with weights of order 1 and these habits."""
    torch.manual_seed(seed)
    net = swin.SwinTransformer3D(**{**SIZES, **changes})
    for parameter in net.parameters():
        scale = parameter[0].numel() ** .5 if parameter.ndim > 1 else 1
        parameter.data += torch.randn_like(parameter) / scale
    return habits.adopt(net, names)


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_without_habits_an_encoder_stays_as_it_is():
    x, plain = torch.rand(1, 1, 24, 20, 16), encoder()
    with_none = habits.adopt(copy.deepcopy(plain), [])
    assert all(torch.equal(a, b) for a, b in zip(plain(x), with_none(x)))
    with pytest.raises(ValueError, match="'telepathy' is none of no_patch_norm"):
        habits.adopt(plain, ["telepathy"])


def test_no_patch_norm_leaves_the_patch_embedding_alone():
    net, x = encoder("no_patch_norm"), torch.rand(1, 1, 8, 6, 4)
    plain = F.conv3d(x, net.patch_embed.weight, net.patch_embed.bias, stride=2)
    torch.testing.assert_close(net.embed(x), plain.permute(0, 2, 3, 4, 1))
    assert not any(name.startswith("patch_norm") for name in net.state_dict())


def test_attended_padding_is_mask_padding_false():
    x = torch.rand(1, 1, 12, 20, 28)
    for ours, asked in zip(encoder("attended_padding")(x), encoder(mask_padding=False)(x)):
        assert torch.equal(ours, asked)
    assert not torch.allclose(encoder()(x)[-1], asked, atol=1e-3)


def test_a_duplicated_merge_reads_two_neighbours_twice_and_two_never():
    merge = encoder("duplicated_merge").stages[0].merge
    merge.norm, merge.reduction = torch.nn.Identity(), torch.nn.Identity()
    number = torch.arange(8.).view(1, 2, 2, 2, 1)  # 4 d + 2 h + w, the offset read as binary
    assert merge(number).flatten().tolist() == [0, 4, 2, 1, 5, 2, 1, 7]
    odd = torch.arange(27.).view(1, 3, 3, 3, 1)
    assert merge(odd)[0, 1, 1, 1].tolist() == [26, 0, 0, 0, 0, 0, 0, 0]  # beyond the end: zeros


def test_a_cut_bias_index_numbers_a_small_windows_cells_as_the_full_ones_first():
    attention = encoder("cut_bias_index").stages[0].blocks[0].attention
    window = (2, 3, 4)
    index = swin.relative_position_index(window, attention.window)
    bias = attention.position_bias(index)

    for i in range(24):
        for j in range(24):
            # cells of the window of 4^3
            a, b = (torch.tensor([k // 16, k // 4 % 4, k % 4]) for k in (i, j))
            row = ((a - b + 3) * torch.tensor([49, 7, 1])).sum()
            assert torch.equal(bias[:, i, j], attention.bias_table[row]), (i, j)

    full = swin.relative_position_index((4, 4, 4))
    assert torch.equal(attention.position_bias(full),
                       swin.WindowAttention.position_bias(attention, full))
    assert (bias != swin.WindowAttention.position_bias(attention, index)).float().mean() > .5


@pytest.mark.parametrize("side, order, share",
                         [(4, 2, 16 / 64), (8, 6, 16 / 512), (12, 10, 24 / 1728)])
def test_the_scattered_reverse_is_the_releases_permutation(side, order, share):
    grid, window = (side,) * 3, (4, 4, 4)
    token = torch.arange(side ** 3)
    scatter = habits.scatter_windows(swin.partition_windows(token.view(1, *grid, 1), window),
                                     window, grid).flatten()
    assert (scatter == token).float().mean().item() == pytest.approx(share)

    power = scatter
    for _ in range(order - 1):
        assert not torch.equal(power, token)
        power = scatter[power]
    assert torch.equal(power, token)


def release_network(weights, x, depths, heads, window=4):
    """The authors' encoder in plain loops, from its description:
    cubic grids, no clamping, a shift in odd blocks."""
    def get(name):
        return weights[name]

    x = F.conv3d(x, get("patch_embed.weight"), get("patch_embed.bias"), stride=2).movedim(1, -1)
    C = x.shape[-1]
    x = F.layer_norm(x, (C,), get("patch_norm.weight"), get("patch_norm.bias"))
    outputs = []
    for stage, depth in enumerate(depths):
        for number in range(depth):
            block = f"stages.{stage}.blocks.{number}"
            x = x + release_attention(
                weights, f"{block}.attention", heads[stage], window, number % 2,
                F.layer_norm(x, (C,), get(f"{block}.norm1.weight"), get(f"{block}.norm1.bias")))
            y = F.layer_norm(x, (C,), get(f"{block}.norm2.weight"), get(f"{block}.norm2.bias"))
            y = F.gelu(F.linear(y, get(f"{block}.mlp.0.weight"), get(f"{block}.mlp.0.bias")))
            x = x + F.linear(y, get(f"{block}.mlp.2.weight"), get(f"{block}.mlp.2.bias"))
        outputs.append(
            F.layer_norm(x, (C,), get(f"norms.{stage}.weight"), get(f"norms.{stage}.bias")))
        x = torch.cat([x[:, d::2, h::2, w::2] for d in (0, 1) for h in (0, 1) for w in (0, 1)], -1)
        merge, C = f"stages.{stage}.merge", 2 * C
        x = F.layer_norm(x, (4 * C,), get(f"{merge}.norm.weight"), get(f"{merge}.norm.bias"))
        x = F.linear(x, get(f"{merge}.reduction.weight"))
    return [y.movedim(-1, 1) for y in (*outputs, x)]


def release_attention(weights, name, heads, window, shifted, x):
    """Token by token: which tokens it may look at,
    and the place where the release's order of axes puts the result."""
    side, C = x.shape[1], x.shape[-1]
    padded = -(-side // window) * window
    x = F.pad(x, (0, 0) + (0, padded - side) * 3)
    shift = window // 2 if shifted else 0
    place = torch.cartesian_prod(*[torch.arange(padded)] * 3)  # of a token in the rolled grid
    source = (place + shift) % padded                          # where it came from
    x = x[:, source[:, 0], source[:, 1], source[:, 2]]         # (1, N, C)

    cut, cell = place // window, place % window
    may = ((cut[:, None] == cut[None]).all(-1)
           & ((source < place)[:, None] == (source < place)[None]).all(-1))
    q, k, v = (F.linear(x, weights[f"{name}.qkv.weight"])
               .unflatten(-1, (3, heads, C // heads)).permute(2, 0, 3, 1, 4))
    offset = cell[:, None] - cell[None] + window - 1
    row = (offset * torch.tensor([(2 * window - 1) ** 2, 2 * window - 1, 1])).sum(-1)
    bias = weights[f"{name}.bias_table"][row.clamp(0, (2 * window - 1) ** 3 - 1)].permute(2, 0, 1)
    scores = q @ k.transpose(-1, -2) / (C // heads) ** .5 + bias
    y = scores.masked_fill(~may, -torch.inf).softmax(-1) @ v
    y = F.linear(y.transpose(1, 2).flatten(2), weights[f"{name}.proj.weight"],
                 weights[f"{name}.proj.bias"])

    # windows (nD, nH, nW, d, h, w) are laid down in the order (nD, nW, h, nH, d, w)
    n = padded // window
    target = cut[:, 0]
    for digit, base in ((cut[:, 2], n), (cell[:, 1], window), (cut[:, 1], n), (cell[:, 0], window),
                        (cell[:, 2], window)):
        target = target * base + digit
    laid = torch.zeros_like(y).index_copy(1, target, y).view(1, padded, padded, padded, C)
    return laid.roll((shift,) * 3, (1, 2, 3))[:, :side, :side, :side]


# grids 8, 4: the window itself is shifted; 12, 6: padded
@pytest.mark.parametrize("side", [16, 24])
def test_the_authors_network_is_computed_forward_and_backward(side):
    net = encoder("attended_padding", "scattered_reverse").double()
    x = torch.rand(1, 1, side, side, side, dtype=torch.double, requires_grad=True)
    weights = dict(net.named_parameters())
    outputs, expected = net(x), release_network(weights, x, SIZES["depths"], SIZES["heads"])
    direction = [torch.randn_like(y) for y in expected]
    gradients = [torch.autograd.grad(sum((y * d).sum() for y, d in zip(ys, direction)),
                                     [x, *weights.values()]) for ys in (outputs, expected)]

    for ours, theirs in zip(outputs, expected):
        assert relative_error(ours, theirs) < 1e-12
    for ours, theirs in zip(*gradients):
        assert relative_error(ours, theirs) < 1e-10


def test_the_true_reverse_does_not_compute_the_authors_network():
    x = torch.rand(1, 1, 32, 32, 32)
    true, scattered = encoder("attended_padding"), encoder("attended_padding", "scattered_reverse")
    assert relative_error(true(x)[0], scattered(x)[0]) > .05


@pytest.mark.parametrize("names", [[habit] for habit in habits.HABITS] + [list(habits.HABITS)])
def test_copies_checkpointing_and_inference_keep_the_habits(names):
    net, x = encoder(*names), torch.rand(2, 1, 20, 16, 24)
    expected = net(x)
    again = habits.adopt(swin.SwinTransformer3D(**SIZES, checkpointing=True), names)
    again.load_state_dict(net.state_dict())
    with torch.no_grad():
        fused = net(x)

    for ours, copied, recomputed, inferred in zip(expected, copy.deepcopy(net)(x), again(x), fused):
        assert torch.equal(copied, ours)
        torch.testing.assert_close(recomputed, ours, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inferred, ours, rtol=1e-4, atol=1e-5)
