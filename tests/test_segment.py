"""The fine-tuning network's size, shapes and skips, and a loader that never loads nothing."""

import pytest
import torch
from torch.nn import functional as F

from smit.pretrain import SMIT
from smit.segment import SegmentationNet, Up, build_network, conv_norm, load_encoder
from smit.weights import adapt_channels

TINY = {"embed_dim": 8, "depths": (1, 2), "heads": (2, 2), "window": (2, 4, 3)}


def student(**changes):
    """A small pre-training network with its heads."""
    torch.manual_seed(1)
    return SMIT({**TINY, **changes}, head_width=16, bottleneck=8, prototypes=32)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_the_papers_28_19_million():
    net = SegmentationNet(14)
    assert count(net) == 28_192_614
    for up, fine in zip(net.ups, (384, 192, 96, 48)):  # up, first and second conv, shortcut
        assert count(up) == (2 * fine * fine * 8 + 2 * fine * fine * 27 + fine * fine * 27
                             + 2 * fine * fine)
    assert count(net.last_up) == 48 * 24 * 8 + 2 * 24 * 24 * 27 and count(net.out) == 24 * 14 + 14
    assert count(net.encoder) == 8_763_832 - 48


@pytest.mark.parametrize("shape", [(16, 24, 32), (15, 9, 22), (8, 8, 8)])
def test_logits_have_the_volumes_grid_whatever_its_size(shape):
    net = SegmentationNet(5, in_channels=2, **TINY)
    assert net(torch.randn(2, 2, *shape)).shape == (2, 5, *shape)


def test_every_parameter_gets_a_gradient():
    net = SegmentationNet(3, **TINY)
    net(torch.randn(1, 1, 16, 8, 24)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_samples_do_not_influence_each_other():
    net, volumes = SegmentationNet(3, **TINY), torch.randn(2, 1, 16, 8, 24)
    torch.testing.assert_close(net(volumes)[:1], net(volumes[:1]))


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_a_students_encoder_is_loaded_whole_and_the_report_says_so(prefix):
    source, net = student(), SegmentationNet(3, **TINY)
    weights = source.state_dict() if prefix else source.encoder.state_dict()
    report = load_encoder(net, weights)
    assert all(torch.equal(w, source.encoder.state_dict()[name]) 
               for name, w in net.encoder.state_dict().items())

    size, heads = count(net.encoder), count(source) - count(source.encoder) if prefix else 0
    assert report == (f"encoder weights: {size:,} of {size:,} matched; missing 0; unexpected 0; "
                      f"of the rest of the file not loaded: {heads + 8:,}")


@pytest.mark.parametrize("change", [{"embed_dim": 16}, {"depths": (1, 3)}, {"depths": (1, 1)},
                                    {"window": (2, 2, 2)}, {"qkv_bias": True}])
def test_another_architecture_is_refused_and_nothing_loaded(change):
    net = SegmentationNet(3, **TINY)
    before = {name: w.clone() for name, w in net.state_dict().items()}
    with pytest.raises(ValueError, match="missing|unexpected") as refusal:
        load_encoder(net, student(**change).state_dict())
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())


def test_a_foreign_file_is_refused_and_partial_loads_say_what_they_lack():
    net = SegmentationNet(3, **TINY)
    with pytest.raises(ValueError, match="0 of .* matched; missing"):
        load_encoder(net, torch.nn.Linear(3, 4).state_dict())

    weights = student().state_dict()
    del weights["encoder.patch_embed.weight"]
    assert "missing 64 (patch_embed.weight)" in load_encoder(net, weights, partial=True)
    assert torch.equal(net.encoder.patch_embed.bias, weights["encoder.patch_embed.bias"])


def test_weights_that_are_not_finite_are_refused():
    weights = student().state_dict()
    weights["encoder.norms.1.weight"][3] = float("nan")
    with pytest.raises(ValueError, match="norms.1.weight"):
        load_encoder(SegmentationNet(3, **TINY), weights)


def test_more_channels_answer_one_image_as_the_pretrained_channel_did():
    source, net = student(), SegmentationNet(3, in_channels=4, **TINY)
    load_encoder(net, source.state_dict())
    image = torch.randn(1, 1, 8, 12, 16)
    torch.testing.assert_close(net.encoder.embed(image.expand(-1, 4, -1, -1, -1)),
                               source.encoder.embed(image))
    assert adapt_channels(torch.ones(8, 3, 2, 2, 2), 1).unique().tolist() == [3]


def test_the_decoder_equals_torchs_own_layers():
    for c_in, c_out, size in ((6, 4, 3), (6, 4, 1)):
        ours, x = (conv_norm(c_in, c_out, size),
                   torch.randn(2, c_in, 4, 6, 5).to(memory_format=torch.channels_last_3d))
        fast, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = F.instance_norm(F.conv3d(plain, ours[0].weight, padding=size // 2))
        torch.testing.assert_close(ours(fast), y, atol=1e-5, rtol=0)
        weight = torch.randn_like(y)
        for z in (ours(fast), y):
            (z * weight).sum().backward()
        torch.testing.assert_close(fast.grad, plain.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, value", [
    ("depths", "two"), ("heads", 4), ("window", [0, 0, 0]), ("embed_dim", [8]),
    ("embed_dim", -4), ("num_classes", "x"), ("drop_path", None), ("heads", [3, 3])])
def test_settings_that_make_no_network_are_refused_in_one_line(name, value):
    good = dict(num_classes=3, drop_path=0., checkpointing=False, embed_dim=8, depths=[1, 1],
                heads=[2, 2], window=[4, 4, 4])
    build_network(good)
    with pytest.raises(ValueError) as refusal:
        build_network({**good, name: value})
    assert "\n" not in str(refusal.value)


def test_a_level_of_the_decoder_equals_the_plain_formula():
    up, x, skip = Up(6, 4, skip=4), torch.randn(2, 6, 2, 3, 2), torch.randn(2, 4, 4, 5, 4)
    first, second = up.block.body[0][0].weight, up.block.body[2][0].weight
    y = F.conv_transpose3d(x, up.up.weight, stride=2)[:, :, :, :5]           # an odd grid
    y = torch.cat([y, skip], 1)
    z = F.leaky_relu(F.instance_norm(F.conv3d(y, first, padding=1)), .01)
    z = F.instance_norm(F.conv3d(z, second, padding=1))
    z = z + F.instance_norm(F.conv3d(y, up.block.shortcut[0].weight))
    torch.testing.assert_close(up(x, (4, 5, 4), skip), F.leaky_relu(z, .01), atol=1e-5, rtol=1e-5)
