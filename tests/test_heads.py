import torch
from torch.nn import functional as F

from smit import heads


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_heads_have_the_papers_parameters():
    assert count(heads.LinearVoxelHead()) == 25_198_592
    assert count(heads.ProjectionHead()) == 7_614_720
    assert sum(p.numel() for p in heads.ProjectionHead().parameters()
               if p.requires_grad) == 7_614_720 - 8_192


def test_linear_head_puts_its_channels_at_their_voxels():
    head, s = heads.LinearVoxelHead(5, cube=4), 4
    tokens = torch.randn(2, 5, 2, 3, 1)
    voxels = head(tokens)
    assert voxels.shape == (2, 1, 8, 12, 4)

    channels = torch.einsum("oc,bcdhw->bodhw", head.projection.weight, tokens)
    for (d, h, w), (s1, s2, s3) in [((0, 0, 0), (0, 0, 3)), ((1, 2, 0), (3, 1, 2)),
                                    ((0, 1, 0), (2, 3, 0))]:
        expected = channels[:, s1 * 16 + s2 * 4 + s3, d, h, w]
        torch.testing.assert_close(voxels[:, 0, s * d + s1, s * h + s2, s * w + s3], expected)


def test_one_token_paints_one_cube():
    head = heads.LinearVoxelHead(5, cube=4, out_channels=2)
    tokens = torch.randn(1, 5, 2, 3, 2)
    moved = tokens.clone()
    moved[0, :, 1, 2, 0] += 1
    changed = (head(tokens) != head(moved)).any(1)[0]
    assert changed[4:8, 8:12, 0:4].all() and changed.sum() == 64


def test_multilayer_head_is_five_doublings():
    head = heads.MultiLayerVoxelHead()
    kernels = [layer for layer in head if isinstance(layer, torch.nn.ConvTranspose3d)]
    assert [k.in_channels for k in kernels] + [kernels[-1].out_channels] == [
        768, 384, 192, 96, 48, 1]

    small = heads.MultiLayerVoxelHead(32)
    assert small(torch.randn(1, 32, 1, 2, 3)).shape == (1, 1, 32, 64, 96)
    assert not isinstance(head[-1], torch.nn.GELU)


def test_projection_head_gives_cosines():
    head = heads.ProjectionHead(6, 16, 4, 10)
    with torch.no_grad():
        head.directions.mul_(3.7)  # weight norm: their length does not matter
    x = torch.randn(2, 7, 6)
    expected = F.cosine_similarity(head.mlp(x)[..., None, :], head.directions, dim=-1)

    torch.testing.assert_close(head(x), expected)
    assert (head(x).abs().max() <= 1 and torch.equal(head.gains, torch.ones(10, 1))
            and not head.gains.requires_grad)


def test_projection_head_leaves_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert heads.ProjectionHead(6, 16, 4, 10)(torch.randn(3, 6)).dtype == torch.float32


def test_the_heads_equal_the_plain_formulas():
    head, x = heads.ProjectionHead(6, 16, 4, 10), torch.randn(3, 6)
    one, two, three = (layer for layer in head.mlp if isinstance(layer, torch.nn.Linear))
    y = three(F.gelu(two(F.gelu(one(x)))))
    torch.testing.assert_close(head(x), F.cosine_similarity(y[:, None], head.directions, dim=-1))

    head, y = heads.MultiLayerVoxelHead(8, layers=2), torch.randn(2, 8, 1, 2, 3)
    one, two = (layer for layer in head if isinstance(layer, torch.nn.ConvTranspose3d))
    torch.testing.assert_close(head(y), two(F.gelu(one(y))))
