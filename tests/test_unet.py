import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from smit import segment
from smit.baselines import unet


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_unet_has_the_published_number_of_parameters():
    net = unet.UNet3D()
    assert count(net) == 19_073_665
    assert (count(net.encoder), count(net.decoder), count(net.out)) == (7_027_776, 12_045_824, 65)
    assert count(unet.UNet3D(out_channels=14)) == 19_074_510
    assert count(unet.UNet3D(width=32)) == 4_770_625
    assert count(unet.UNet3D(width=16)) == 1_193_761


def test_features_halve_from_level_to_level_and_the_output_has_the_size_of_the_input():
    net, x = unet.UNet3D(out_channels=3, width=4, in_channels=2), torch.rand(2, 2, 16, 24, 32)
    shapes = [tuple(feature.shape[1:]) for feature in net.encoder(x)]
    assert shapes == [(4, 16, 24, 32), (8, 8, 12, 16), (16, 4, 6, 8), (32, 2, 3, 4)]
    assert net.encoder.channels == [4, 8, 16, 32] and net(x).shape == (2, 3, 16, 24, 32)


def test_sides_that_are_no_multiple_of_eight_and_odd_widths_are_refused():
    with pytest.raises(ValueError, match="12.*multiples of 8"):
        unet.UNet3D(width=2)(torch.rand(1, 1, 8, 12, 8))
    with pytest.raises(ValueError, match="width 5"):
        unet.UNet3D(width=5)


def test_at_batch_one_the_norm_equals_batch_statistics_to_the_bit():
    torch.manual_seed(0)
    ours = unet.UNet3D(width=4)
    theirs = copy.deepcopy(ours)
    for module in list(theirs.modules()):
        if isinstance(module, nn.Sequential):
            for place in (1, 4):                            # conv, norm, ReLU, conv, norm, ReLU
                channels = module[place].num_features
                module[place] = nn.BatchNorm3d(channels, track_running_stats=False)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 1, 16, 16, 16)

    assert torch.equal(ours(x[:1]), theirs(x[:1]))
    assert not torch.allclose(ours(x)[0], theirs(x)[0], atol=1e-3)
    torch.testing.assert_close(ours(x)[:1], ours(x[:1]))    # ours does not look at its neighbours


def test_a_convolution_equals_torch_s_in_value_and_gradients():
    torch.manual_seed(0)
    ours = unet.ChannelsLastConv3d(3, 5, kernel_size=3, padding=1)
    theirs = nn.Conv3d(3, 5, kernel_size=3, padding=1)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 8, 6, 7)
    for conv in (ours, theirs):
        conv(x).square().sum().backward()

    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
    assert ours.weight.is_contiguous()                      # as checkpoints have it


@pytest.mark.parametrize("kind, side", [(unet.ChannelsLastConv3d, 2), (segment.PaddedConv, 4)])
def test_on_a_grid_of_depth_two_bf16_gives_the_gradients_of_fp32(kind, side):
    torch.manual_seed(0)
    conv, x = kind(16, 16, 3, padding=1), torch.randn(64, 16, 2, side, side)
    direction, gradients = torch.randn_like(x), []
    for is_bf16 in (False, True, True, True):       # torch's own differ, each time otherwise
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            y = conv(x)
        (y * direction).sum().backward()
        gradients.append(conv.weight.grad.clone())
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < .02 * gradients[0].norm()


def test_zero_weights_give_a_sigmoid_of_one_half():
    net = unet.UNet3D(width=2)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    restored = net(torch.rand(1, 1, 16, 8, 8)).sigmoid()
    assert nn.functional.mse_loss(restored, torch.zeros(1, 1, 16, 8, 8)).item() == .25


@pytest.mark.parametrize("level", range(3))
def test_every_skip_reaches_the_output(level):
    torch.manual_seed(0)
    net = unet.UNet3D(width=2)
    features = net.encoder(torch.rand(1, 1, 16, 16, 16))
    before = net.decoder(features)
    features[level] = features[level] + torch.rand_like(features[level])
    assert not torch.allclose(net.decoder(features), before, atol=1e-3)


def test_the_file_works_when_copied_alone(tmp_path, run_script):
    shutil.copy(Path(unet.__file__), tmp_path)
    lines = ["import sys, torch, unet", "assert not any('smit' in name for name in sys.modules)",
             "net = unet.UNet3D(14, width=2)", "net(torch.rand(1, 1, 8, 16, 8)).mean().backward()",
             "assert net.out.weight.grad.any()", "print('used')"]
    assert run_script("-c", "\n".join(lines)).stdout == "used\n"
