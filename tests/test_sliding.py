"""Sliding windows against a direct weighted mean, the plain network,
and MONAI where it is installed."""

import itertools

import pytest
import torch

from smit.sliding import importance_map, sliding_window, window_starts

WINDOW = (8, 10, 12)
SHAPES = [(19, 25, 30), (5, 31, 14), (8, 10, 13), (3, 4, 5)]


def network():
    """A small convolutional net:
    its output at a voxel depends on where the window's border lies."""
    torch.manual_seed(0)
    first, last = torch.nn.Conv3d(2, 6, 3, padding=1), torch.nn.Conv3d(6, 3, 3, padding=1)
    return torch.nn.Sequential(first, torch.nn.GELU(), last)


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_equals_monai(shape, blend):
    inferers = pytest.importorskip("monai.inferers")
    net, volume = network(), torch.randn(2, 2, *shape)
    for overlap in (.5, .25, .7):
        ours = sliding_window(net, volume, WINDOW, overlap, blend, batch=3)
        with torch.no_grad():
            theirs = inferers.sliding_window_inference(volume, WINDOW, 3, net, overlap=overlap,
                                                       mode=blend)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_output_is_the_weighted_mean_of_the_windows():
    net, volume = network(), torch.randn(1, 2, 11, 10, 17)
    weights, total, weight = (importance_map(WINDOW, "gaussian"),
                              torch.zeros(1, 3, 11, 10, 17), torch.zeros(11, 10, 17))
    for d, w in itertools.product((0, 3), (0, 5)):  # steps 4 and 6, the last window moved back
        place = (..., slice(d, d + 8), slice(0, 10), slice(w, w + 12))
        total[place] += net(volume[place]).detach() * weights
        weight[place] += weights

    torch.testing.assert_close(sliding_window(net, volume, WINDOW), total / weight)


def test_one_window_gives_exactly_the_networks_output():
    net, volume = network(), torch.randn(1, 2, *WINDOW)
    for blend in ("gaussian", "constant"):
        assert torch.equal(sliding_window(net, volume, WINDOW, blend=blend), net(volume))
    padded = torch.nn.functional.pad(volume[..., :5, :, :9], (1, 2, 0, 0, 1, 2))
    assert torch.equal(sliding_window(net, volume[..., :5, :, :9], WINDOW),
                       net(padded)[..., 1:6, :, 1:10])


def test_batches_and_stitching_on_cpu_change_nothing():
    net, volume = network(), torch.randn(2, 2, 19, 25, 14)
    expected = sliding_window(net, volume, WINDOW)
    torch.testing.assert_close(sliding_window(net, volume, WINDOW, batch=7), expected)
    assert torch.equal(sliding_window(net, volume, WINDOW, stitch_on_cpu=True), expected)
    torch.testing.assert_close(sliding_window(net, volume[1:], WINDOW), expected[1:])
    assert not expected.requires_grad


def test_a_change_in_one_voxel_is_seen_only_by_the_windows_that_hold_it():
    volume = torch.randn(1, 2, 24, 10, 12)
    other = volume.clone()
    other[0, 0, 1, 5, 6] += 1
    changed = (sliding_window(network(), volume, WINDOW)
               != sliding_window(network(), other, WINDOW)).any(1)[0]
    assert changed[:4].any() and not changed[4:].any()  # the net sees two voxels far: rows 0 to 3


def test_gaussian_weights_by_hand():
    weights = importance_map((8, 5, 16), "gaussian")  # sigmas 1, .625, 2; centres 3.5, 2, 7.5
    torch.testing.assert_close(weights[4, 2, 7], torch.tensor(-.5 * (.5**2 + .25**2)).exp())
    torch.testing.assert_close(weights[3, 3, 5],
                               torch.tensor(-.5 * (.5**2 + 1.6**2 + 1.25**2)).exp())
    assert weights[0, 0, 0] == weights.min() == torch.tensor(1e-3)


def test_windows_cover_the_axis_and_end_with_it():
    assert window_starts(30, 12, .5) == [0, 6, 12, 18]
    assert window_starts(31, 12, .5) == [0, 6, 12, 18, 19]
    assert window_starts(12, 12, .5) == [0]
    assert window_starts(4, 1, .9) == [0, 1, 2, 3]


def test_windows_move_to_the_networks_device_and_output_is_float32():
    net, seen = network().to(torch.bfloat16), []
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    logits = sliding_window(net, torch.randn(1, 2, 19, 10, 12, dtype=torch.bfloat16), WINDOW,
                            batch=2)

    assert logits.dtype == torch.float32 and logits.shape == (1, 3, 19, 10, 12)
    assert seen == [(2, 2, *WINDOW), (2, 2, *WINDOW)]
    if torch.cuda.is_available():
        net, volume = network().cuda(), torch.randn(1, 2, 19, 10, 12)
        assert sliding_window(net, volume, WINDOW).is_cuda
        assert not sliding_window(net, volume, WINDOW, stitch_on_cpu=True).is_cuda


@pytest.mark.parametrize("wrong", [{"window": (8, 10)}, {"window": 8}, {"window": (8, 0, 12)},
                                   {"overlap": 1.}, {"overlap": -.1}, {"blend": "mean"},
                                   {"batch": 0}, {"volume": torch.zeros(2, 9, 9, 9)},
                                   {"net": lambda windows: windows[..., ::2]}])
def test_arguments_that_do_not_fit_are_refused_in_one_line(wrong):
    with pytest.raises(ValueError) as refusal:
        sliding_window(**{"net": network(), "volume": torch.zeros(1, 2, 9, 9, 9),
                          "window": WINDOW, **wrong})
    assert "\n" not in str(refusal.value)


def test_windows_overlap_by_the_share_asked_for():
    assert window_starts(30, 12, 0) == [0, 12, 18]
    assert window_starts(30, 12, .25) == [0, 9, 18]
    assert window_starts(30, 12, .75) == [0, 3, 6, 9, 12, 15, 18]
    assert window_starts(20, 7, .5) == [0, 3, 6, 9, 12, 13]            # a half voxel is dropped
