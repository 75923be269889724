"""Every score against hand values, brute force, and MONAI or SciPy where they are installed."""

import itertools
import math

import numpy as np
import pytest
import torch

from smit import metrics


def blobs(shape, seed):
    """A smooth random mask that touches the border."""
    coarse = torch.rand(1, 1, *[max(2, n // 4) for n in shape],
                        generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0, 0] > .55


def mask_pairs():
    """(pred, label, spacing): dense and sparse noise, blobs, one voxel against all,
    a thin volume; all anisotropic."""
    noise = torch.Generator().manual_seed(0)
    dense, sparse = (torch.rand(2, 9, 14, 11, generator=noise) > share for share in (.5, .98))
    corner = torch.zeros(7, 12, 9, dtype=torch.bool)
    corner[0, -1, 4] = True
    yield *dense, (.7, 1.3, 2.5)
    yield *sparse, (1.5, 1.5, 2.)
    yield blobs((18, 24, 30), 1), blobs((18, 24, 30), 2), (1., .8, 3.)
    yield torch.ones_like(corner), corner, (2., 1., .5)
    yield blobs((20, 16, 1), 3), blobs((20, 16, 1), 4), (1.25, 1.25, 7.7)


def brute_surface_distances(pred, label, spacing):
    """The definition, voxel by voxel."""
    def points(mask):
        padded = torch.nn.functional.pad(mask, (1,) * 6)
        steps = [s for s in itertools.product((-1, 0, 1), repeat=3)
                 if abs(s[0]) + abs(s[1]) + abs(s[2]) == 1]
        edge = [v for v in padded.nonzero()
                if not all(padded[tuple(v + torch.tensor(s))] for s in steps)]
        return torch.stack(edge) * torch.tensor(spacing, dtype=torch.float64)
    between = (points(pred)[:, None] - points(label)[None]).square().sum(2).sqrt()
    return between.amin(1), between.amin(0)


def test_dice_of_a_map_counted_by_hand():
    label = torch.tensor([0, 1, 1, 1, 2, 0]).view(1, 2, 3)
    pred = torch.tensor([0, 1, 1, 2, 2, 2]).view(1, 2, 3)
    np.testing.assert_allclose(metrics.dice(pred, label, 3), [2 * 2 / (2 + 3), 2 * 1 / (3 + 1)])


def test_absent_organs_follow_one_policy():
    empty, organ = torch.zeros(4, 5, 6, dtype=torch.bool), torch.zeros(4, 5, 6, dtype=torch.bool)
    organ[1:3, 2, 3] = True
    for pred, label, dsc, distance in [(empty, empty, math.nan, math.nan),
                                       (organ, empty, 0, math.inf),
                                       (empty, organ, 0, math.inf), (organ, organ, 1, 0)]:
        np.testing.assert_equal(metrics.dice(pred.int(), label.int(), 2), [dsc])
        np.testing.assert_equal(metrics.surface_dice(pred, label, (1, 2, 3), 1), dsc)
        np.testing.assert_equal(metrics.hd95(pred, label, (1, 2, 3)), distance)


def test_dice_takes_every_array_a_label_file_can_give():
    maps = np.random.default_rng(0).integers(0, 4, (2, 5, 6, 7))
    expected = metrics.dice(*maps, 4)
    for dtype in ("uint8", ">i2", "uint16", "float32"):
        mirrored = maps.astype(dtype)[:, ::-1]
        mirrored.flags.writeable = False
        np.testing.assert_array_equal(metrics.dice(*mirrored, 4), expected)


@pytest.mark.parametrize("label", [[0, -1, 2], [0, 1, 3], [0, 1.5, 2], [0, math.nan, 2], [0, 1]])
def test_dice_refuses_what_is_no_label_map(label):
    with pytest.raises(ValueError, match="label"):
        metrics.dice(np.array([0, 1, 2]), np.array(label), 3)


def test_distances_of_two_voxels_follow_the_spacing():
    pred, label = torch.zeros(2, 6, 7, 8, dtype=torch.bool)
    pred[1, 2, 3] = label[4, 2, 5] = True
    expected = math.hypot(3 * .5, 2 * 2.)
    assert metrics.hd95(pred, label, (.5, 9., 2.)) == pytest.approx(expected)
    assert metrics.surface_dice(pred, label, (.5, 9., 2.), expected) == 1
    assert metrics.surface_dice(pred, label, (.5, 9., 2.), expected - .001) == 0


def test_only_voxels_with_a_free_face_are_surface():
    block = torch.zeros(7, 8, 9, dtype=torch.bool)
    block[1:6, 1:7, 1:8] = True
    block[2, 1, 1] = False  # (2, 2, 2) touches this hole by an edge only and stays inside
    inner = torch.zeros_like(block)
    inner[2:5, 2:6, 2:7] = True

    assert torch.equal(
        metrics.surface(inner),
        inner & ~torch.nn.functional.pad(torch.ones(1, 2, 3), (3, 3) * 3).bool())
    distances, _ = metrics.surface_distances(block, inner, (1, 1, 1))
    assert len(distances) == 5 * 6 * 7 - 3 * 4 * 5 - 1


@pytest.mark.parametrize("case", range(5))
def test_surface_distances_equal_brute_force(case):
    pred, label, spacing = list(mask_pairs())[case]
    expected = brute_surface_distances(pred, label, spacing)
    for ours, brute in zip(metrics.surface_distances(pred, label, spacing), expected):
        torch.testing.assert_close(ours.sort().values.double(), brute.sort().values, rtol=0,
                                   atol=1e-4)
    hd95 = max(np.percentile(brute, 95) for brute in expected)

    assert metrics.hd95(pred, label, spacing) == pytest.approx(hd95, abs=1e-4)
    share = np.mean(np.concatenate(expected) <= 2.4321)
    assert metrics.surface_dice(pred, label, spacing, 2.4321) == pytest.approx(share)


@pytest.mark.parametrize("case", range(5))
def test_surface_scores_equal_monai(case):
    monai = pytest.importorskip("monai.metrics")
    pred, label, spacing = list(mask_pairs())[case]
    one_hot = [torch.stack([~mask, mask])[None] for mask in (pred, label)]
    hd95 = monai.compute_hausdorff_distance(*one_hot, percentile=95, spacing=spacing).item()

    assert metrics.hd95(pred, label, spacing) == pytest.approx(hd95, abs=1e-4)
    # ties with the grid's own distances included
    for tolerance in (0, spacing[0], 2 * spacing[1], 2.):
        share = monai.compute_surface_dice(*one_hot, [tolerance], spacing=spacing).item()
        assert metrics.surface_dice(pred, label, spacing, tolerance) == pytest.approx(
            share, abs=1e-4)


def test_hd95_does_not_depend_on_axis_order_or_empty_space():
    pred, label, spacing = list(mask_pairs())[2]
    wide = [torch.nn.functional.pad(mask, (0, 9, 30, 0, 4, 4)) for mask in (pred, label)]
    inset = [torch.nn.functional.pad(mask, (1,) * 6) for mask in (pred, label)]
    expected = metrics.hd95(*inset, spacing)

    assert metrics.hd95(*wide, spacing) == expected
    for order in itertools.permutations(range(3)):
        turned = metrics.hd95(pred.permute(order), label.permute(order),
                              [spacing[axis] for axis in order])
        assert turned == pytest.approx(expected, abs=1e-4)


def test_mse_counts_only_the_voxels_asked_for():
    pred, target = torch.tensor([1., 2., 9.]), torch.tensor([1., 4., 0.])
    assert metrics.mse(pred, target, torch.tensor([True, True, False])) == 2
    with pytest.raises(ValueError, match="not empty"):
        metrics.mse(pred, target, torch.zeros(3, dtype=torch.bool))


def test_bootstrap_interval_is_that_of_a_mean_and_ignores_nan():
    values = np.random.default_rng(1).normal(.8, .1, 200)
    low, high = metrics.bootstrap_interval(values)
    margin = 1.96 * values.std() / math.sqrt(200)

    assert [low, high] == pytest.approx([values.mean() - margin, values.mean() + margin], abs=.002)
    assert metrics.bootstrap_interval([*values, math.nan]) == (low, high)
    assert metrics.bootstrap_interval([.5]) == (.5, .5)
    assert all(map(math.isnan, metrics.bootstrap_interval([math.nan])))
    with pytest.raises(ValueError, match="misses"):
        metrics.bootstrap_interval([1., math.inf])


def test_wilcoxon_p_equals_the_share_of_sign_patterns():
    for difference in ([1, 2, 3, 4, 5], [3., -1, 0, 1, 1, -4, 2, 2], [0, 0], [-.5]):
        sizes = np.abs([d for d in difference if d])
        ranks = np.array([(sizes < s).sum() + ((sizes == s).sum() + 1) / 2 for s in sizes])
        sums = np.array([ranks @ signs for signs in itertools.product((0, 1), repeat=len(ranks))])
        observed = sum(r for r, d in zip(ranks, [d for d in difference if d]) if d > 0)
        expected = min(1, 2 * min((sums <= observed).mean(), (sums >= observed).mean()))
        assert metrics.wilcoxon_p(np.array(difference, dtype=float)) == pytest.approx(expected)
    assert metrics.wilcoxon_p(np.arange(1., 6)) == 2 / 2**5
    # five of one size, which in binary are not quite; half of all patterns have three positive ones
    ties = np.array([.85, .35, .6, .55, .8]) - np.array([.8, .3, .55, .6, .85])
    assert metrics.wilcoxon_p(ties) == 1


@pytest.mark.parametrize("n", [3, 9, 25, 60])
def test_wilcoxon_p_equals_scipy(n):
    stats = pytest.importorskip("scipy.stats")
    difference = np.random.default_rng(n).normal(.3, 1, n)
    assert metrics.wilcoxon_p(difference) == pytest.approx(
        stats.wilcoxon(difference, method="exact").pvalue)


def test_wilcoxon_p_with_ties_nears_the_normal_approximation():
    stats = pytest.importorskip("scipy.stats")
    difference = np.random.default_rng(5).normal(.1, 1, 150).round(1)
    assert (difference == 0).any()
    expected = stats.wilcoxon(difference, zero_method="wilcox", method="asymptotic").pvalue
    assert metrics.wilcoxon_p(difference) == pytest.approx(expected, abs=.005)


def test_paired_test_leaves_out_cases_that_lack_a_score():
    a, b = [.9, .8, math.nan, .7, .6], [.8, .6, .5, .4, math.nan]
    result = metrics.paired_test(a, b)
    assert (result["n"] == 3 and result["mean_difference"] == pytest.approx(.2)
            and result["p"] == .25)
    assert [result["low"], result["high"]] == pytest.approx([.1, .3])
    assert metrics.paired_test(b, a)["mean_difference"] == pytest.approx(-.2)
    with pytest.raises(ValueError, match="same cases"):
        metrics.paired_test(a, b[:4])
