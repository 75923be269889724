import numpy as np
import pretext
import pytest
import torch
from pretext import mean, rng

from smit.baselines import genesis


def distinct(*shape):
    """An image whose voxels all differ, in [0, 1], rising in the order of memory."""
    size = int(np.prod(shape))
    return (torch.arange(size) / (size - 1)).view(shape)


# --------------------------------------------------------------------------------------------- flip
def test_a_flip_reverses_any_of_the_three_axes_and_half_of_all_crops_stay():
    image = distinct(2, 3, 4)
    flips = {}
    for axes in ([], [0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        flips[tuple(image.flip(axes).flatten().tolist())] = 0
    for seed in range(600):
        flips[tuple(genesis.random_flip(image, rng(seed)).flatten().tolist())] += 1

    assert all(count > 0 for count in flips.values())
    # none is drawn with .6; of two, drawn with .4 * .4 * .6, a third undo each other
    assert flips[tuple(image.flatten().tolist())] / 600 == pytest.approx(.632, abs=.05)


# ---------------------------------------------------------------------------------- local shuffling
def test_windows_of_one_voxel_shuffle_nothing():
    image, starts = distinct(4, 5, 6), torch.randint(4, (50, 3))
    sides = torch.ones_like(starts)
    assert torch.equal(genesis.shuffle_windows(image, starts, sides, rng()), image)


def test_one_window_permutes_its_own_voxels_and_no_other():
    image = distinct(4, 5, 6)
    start, sides = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 2, 2]])
    result = genesis.shuffle_windows(image, start, sides, rng())
    window = np.s_[1:3, 2:4, 3:5]
    assert torch.equal(result[window].flatten().sort().values, image[window].flatten())
    assert not torch.equal(result[window], image[window])
    result[window] = image[window]
    assert torch.equal(result, image)


def test_a_later_window_takes_the_original_voxels_and_overwrites():
    image = distinct(1, 1, 6)
    starts, sides = torch.tensor([[0, 0, 0], [0, 0, 2]]), torch.tensor([[1, 1, 4], [1, 1, 4]])
    for seed in range(20):
        result = genesis.shuffle_windows(image, starts, sides, rng(seed))[0, 0]
        assert torch.equal(result[2:].sort().values, image[0, 0, 2:])  # though two were overwritten
        assert set(result[:2].tolist()) <= set(image[0, 0, :4].tolist())


def test_windows_have_up_to_a_tenth_of_a_side_and_cover_what_the_release_covers():
    starts, sides = genesis.random_windows((96, 64, 32), rng())
    assert sides.amin(0).tolist() == [1, 1, 1] and sides.amax(0).tolist() == [9, 6, 3]
    ends = starts + sides
    assert starts.amin(0).tolist() == [0, 0, 0] and ends.amax(0).tolist() == [96, 64, 32]

    covered = torch.zeros(64, 64, 32, dtype=torch.bool)
    starts, sides = genesis.random_windows(covered.shape, rng())
    for (x, y, z), (a, b, c) in zip(starts.tolist(), sides.tolist()):
        covered[x:x + a, y:y + b, z:z + c] = True
    assert len(starts) == 10_000 and covered.float().mean().item() == pytest.approx(.822, abs=.01)


# ---------------------------------------------------------------------------------- intensity curve
def test_the_intensity_curve_by_hand():
    greys = torch.linspace(0, 1, 9)
    straight = torch.tensor([[1 / 3, 1 / 3], [2 / 3, 2 / 3]])
    torch.testing.assert_close(genesis.map_intensities(greys, straight), greys, atol=1e-6, rtol=0)
    falling = genesis.map_intensities(greys, straight, decreasing=True)
    torch.testing.assert_close(falling, 1 - greys, atol=1e-6, rtol=0)

    steep = torch.tensor([[0., 1.], [0., 1.]])                       # at t = .5: x = .125, y = .875
    found = genesis.map_intensities(torch.tensor([.125]), steep)
    assert found.item() == pytest.approx(.875, abs=1e-5)


@pytest.mark.parametrize("decreasing", [False, True])
def test_the_intensity_curve_is_monotone_with_its_ends_fixed(decreasing):
    for seed in range(20):
        points = torch.rand(2, 2, generator=rng(seed))
        curve = genesis.map_intensities(distinct(10, 10, 10), points, decreasing)
        steps = curve.flatten().diff()
        assert (steps <= 0).all() if decreasing else (steps >= 0).all()
        assert [curve.min(), curve.max()] == [0, 1] and curve[0, 0, 0] == float(decreasing)


# ----------------------------------------------------------------------------------------- painting
def drawn(boxes, size, draws=300):
    return [box for seed in range(draws) for box in boxes((size,) * 3, rng(seed))]


@pytest.mark.parametrize("boxes, shortest, longest",
                         [(genesis.inner_boxes, 16, 32), (genesis.outer_boxes, 42, 55)])
def test_boxes_have_the_release_s_sides_and_stay_off_the_border(boxes, shortest, longest):
    sides, starts, ends = [], [], []
    for box in drawn(boxes, 96):
        sides += [part.stop - part.start for part in box]
        starts += [part.start for part in box]
        ends += [part.stop for part in box]

    assert (min(sides), max(sides)) == (shortest, longest)
    assert (min(starts), max(ends)) == (3, 93)


def test_the_number_of_boxes_is_drawn_in_sequence():
    inner = [len(genesis.inner_boxes((96,) * 3, rng(seed))) for seed in range(500)]
    outer = [len(genesis.outer_boxes((96,) * 3, rng(seed))) for seed in range(500)]
    assert (min(inner), max(inner), min(outer), max(outer)) == (0, 5, 1, 5)
    assert mean([count == 0 for count in inner]) == pytest.approx(.05, abs=.03)
    assert mean([count == 5 for count in inner]) == pytest.approx(.95 ** 5, abs=.06)
    assert mean([count == 5 for count in outer]) == pytest.approx(.95 ** 4, abs=.06)


def test_painting_replaces_the_union_of_the_boxes_or_all_but_it():
    image, boxes = distinct(20, 24, 28), [np.s_[3:9, 3:9, 4:10], np.s_[5:12, 4:11, 6:16]]
    union = torch.zeros(image.shape, dtype=torch.bool)
    for box in boxes:
        union[box] = True
    inside, outside = (paint(image, boxes, rng())
                       for paint in (genesis.paint_inside, genesis.paint_outside))

    assert torch.equal(inside != image, union) and torch.equal(outside == image, union)
    for noise in (inside[union], outside[~union]):
        assert noise.mean().item() == pytest.approx(.5, abs=.05)
        assert 0 <= noise.min() and noise.max() < 1
        # drawn for each voxel, not for each box
        assert noise.std().item() == pytest.approx(12 ** -.5, abs=.02)


def test_painted_shares_are_those_of_the_release():
    shares = {genesis.inner_boxes: .063, genesis.outer_boxes: 1 - .665}     # of 96^3 voxels
    for boxes, expected in shares.items():
        found = []
        for seed in range(60):
            inside = torch.zeros(96, 96, 96, dtype=torch.bool)
            for box in boxes(inside.shape, rng(seed)):
                inside[box] = True
            found.append(inside.float().mean().item())
        assert mean(found) == pytest.approx(expected, rel=.15)


# ----------------------------------------------------------------------------- all of them together
def test_every_disturbance_can_be_told_from_the_others():
    image = distinct(20, 20, 20)
    results = {
        "flip": image.flip(1),
        "shuffle": genesis.shuffle_windows(image, *genesis.random_windows(image.shape, rng()),
                                           rng()),
        "intensity": genesis.map_intensities(image, torch.tensor([[.1, .7], [.3, .9]])),
        "inside": genesis.paint_inside(image, genesis.inner_boxes(image.shape, rng()), rng()),
        "outside": genesis.paint_outside(image, genesis.outer_boxes(image.shape, rng()), rng())}

    def signs(result):
        shell = torch.ones(image.shape, dtype=torch.bool)
        shell[3:-3, 3:-3, 3:-3] = False
        steps = result.flatten().diff()
        same_voxels = torch.equal(result.flatten().sort().values, image.flatten())
        same_order = bool((steps > 0).all())
        same_border = torch.equal(result[shell], image[shell])
        far_off = (result - image).abs().max().item() > .3
        return same_voxels, same_order, same_border, far_off
    assert {name: signs(result) for name, result in results.items()} == {
        "flip": (True, False, False, False), "shuffle": (False, False, False, False),
        "intensity": (False, True, False, True), "inside": (False, False, True, True),
        "outside": (False, False, False, True)}


def test_disturbances_come_with_the_release_s_probabilities(monkeypatch):
    monkeypatch.setattr(genesis, "WINDOWS", 200)                            # in a moment
    image = distinct(20, 20, 20)
    outer, shuffled, falling, inner = [], [], [], []
    for seed in range(300):
        result = genesis.disturb(image, rng(seed))
        border = result[:3].flatten()                                       # no box reaches it
        wild = (border.diff().abs() > .1).float().mean() > .5
        outer.append(bool(wild))
        if wild:
            continue
        rising, sinking = (border.diff() >= 0).all(), (border.diff() <= 0).all()
        shuffled.append(not bool(rising | sinking))
        if not shuffled[-1]:
            falling.append(bool(sinking))
        inner.append(bool((result[3:-3, 3:-3, 3:-3].diff(dim=2).abs() > .2).any()))

    assert mean(outer) == pytest.approx(.9 * .8, abs=.06)
    assert mean(shuffled) == pytest.approx(.5, abs=.12)
    assert mean(falling) == pytest.approx(.9 * .5, abs=.15)
    assert mean(inner) == pytest.approx(.9 * .2 * .95 / .28, abs=.12)


# --------------------------------------------------------------------------------------------- task
def test_a_sample_depends_on_its_generator_alone_and_its_views_are_disturbed_apart():
    task, views = genesis.Genesis(width=2), torch.rand(2, 1, 24, 24, 24)
    first, again, other = (task.samples(views, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first["input"], again["input"])
    assert not torch.equal(first["input"], other["input"])

    same = task.samples(views[:1].expand(2, -1, -1, -1, -1), rng())
    assert not torch.equal(same["input"][0], same["input"][1])
    assert first["input"].shape == first["target"].shape == (2, 1, 24, 24, 24)


def test_the_target_is_the_clean_crop_flipped_as_the_input_was():
    task = genesis.Genesis(width=2)
    views = distinct(16, 16, 16).expand(2, 1, -1, -1, -1)
    for seed in range(8):
        targets = task.samples(views, rng(seed))["target"][:, 0]
        for target in targets:
            assert any(torch.equal(target.flip(axes), views[0, 0]) for axes in
                       ([], [0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]))


def test_models_genesis_loss_is_a_mean_square_over_all_voxels():
    task = genesis.Genesis(width=2)
    for parameter in task.parameters():
        torch.nn.init.zeros_(parameter)                                     # restores .5 everywhere
    batch = {"input": torch.rand(3, 2, 1, 16, 16, 16), "target": torch.zeros(3, 2, 1, 16, 16, 16)}
    assert task(batch)["restore"].item() == .25


def test_models_genesis_learns_on_phantoms():
    torch.manual_seed(0)
    totals = pretext.train(genesis.Genesis(width=4), steps=24, lr=1e-2, size=2)
    assert mean(totals[-4:]) < .8 * mean(totals[:4])


def test_models_genesis_hands_over_its_whole_network():
    task = genesis.Genesis(width=2)
    assert task.transferred().keys() == task.unet.state_dict().keys()
