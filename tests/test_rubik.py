import itertools
import math

import numpy as np
import pretext
import pytest
import torch
from pretext import mean, rng

from smit.baselines import rubik

CUBE = torch.arange(27).view(3, 3, 3)


def test_a_twist_turns_one_layer_by_hand():
    twisted = rubik.twist(CUBE, axis=0, layer=0, turns=1)
    assert twisted[0].tolist() == [[2, 5, 8], [1, 4, 7], [0, 3, 6]]
    assert torch.equal(twisted[1:], CUBE[1:])


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_twist_equals_numpy_s_rot90_of_a_slab_of_cubes(axis, layer, turns):
    image = torch.rand(9, 9, 9)
    expected = image.numpy().copy()
    slab = [slice(None)] * 3
    slab[axis] = slice(3 * layer, 3 * layer + 3)
    planes = [plane for plane in range(3) if plane != axis]
    expected[tuple(slab)] = np.rot90(image.numpy()[tuple(slab)], turns, planes)

    assert np.array_equal(rubik.twist(image, axis, layer, turns), expected)


def test_moves_are_undone_by_their_inverses_in_reverse_order():
    for seed in range(20):
        moves = rubik.random_moves(rng(seed))
        scrambled = rubik.scramble(CUBE, moves)
        assert torch.equal(scrambled.flatten().sort().values, CUBE.flatten())
        back = [(axis, layer, -turns) for axis, layer, turns in reversed(moves)]
        assert torch.equal(rubik.scramble(scrambled, back), CUBE)


def test_three_moves_displace_eighteen_of_the_27_cubes():
    scrambled = rubik.scramble(CUBE, [(0, 0, 1), (1, 2, 3), (2, 1, 2)])
    assert (scrambled != CUBE).sum() == 18


def test_moves_are_one_to_six_and_every_kind_is_drawn():
    drawn = [rubik.random_moves(rng(seed)) for seed in range(300)]
    assert {len(moves) for moves in drawn} == {1, 2, 3, 4, 5, 6}
    kinds = set()
    for moves in drawn:
        kinds |= set(moves)
    assert len(kinds) == 3 * 3 * 3


def test_cubes_stay_whole_where_the_side_is_no_multiple_of_three():
    image = torch.arange(8 ** 3).view(8, 8, 8)                              # slabs of 3, 2 and 3
    assert torch.equal(rubik.twist(image, 0, 1, 1)[3:5], image[3:5].rot90(1, (1, 2)))
    corner = image[:3, :3, :3].flatten().sort().values
    cubes = [slice(0, 3), slice(3, 5), slice(5, 8)]

    for seed in range(20):
        scrambled = rubik.scramble(image, rubik.random_moves(rng(seed)))
        found = 0
        for x, y, z in itertools.product(cubes, repeat=3):
            found += torch.equal(scrambled[x, y, z].flatten().sort().values, corner)
        assert found == 1  # somewhere, in one piece


def test_sides_that_are_not_alike_are_refused():
    with pytest.raises(ValueError, match="equal"):
        rubik.twist(torch.rand(9, 9, 12), 0, 0, 1)


def test_adversarial_losses_by_hand():
    unsure = torch.zeros(2, 1, 1, 1, 1)
    assert rubik.adversarial_loss(unsure).item() == pytest.approx(math.log(2))
    assert rubik.critic_loss(unsure, unsure).item() == pytest.approx(2 * math.log(2))
    opinion = torch.full((1,), math.log(3))                                 # real with chance 3/4
    assert rubik.adversarial_loss(opinion).item() == pytest.approx(math.log(4 / 3))
    both = rubik.critic_loss(opinion, opinion).item()
    assert both == pytest.approx(math.log(4 / 3) + math.log(4))


def learns(part):
    return any(weight.grad is not None and bool(weight.grad.any()) for weight in part.parameters())


def gradients(task, name):
    """Whether a loss reaches the U-Net, and whether it reaches the critic."""
    batch = pretext.batch(task, range(2), side=24)
    task.zero_grad()
    task(batch)[name].backward()
    return learns(task.unet), learns(task.critic)


def test_the_network_and_its_critic_learn_from_their_own_losses_alone():
    task = rubik.Rubik(width=4)
    assert gradients(task, "restore") == (True, False)
    assert gradients(task, "adversarial") == (True, False)
    assert gradients(task, "critic") == (False, True)


def test_the_critic_s_gradients_do_not_shrink_the_network_s():
    task = rubik.Rubik(width=4)
    for part, size in ((task.unet, 1.0), (task.critic, 1e6)):
        for parameter in part.parameters():
            parameter.grad = torch.full_like(parameter, size)
    of_network, of_critic = task.clip_groups()
    norms = [torch.nn.utils.clip_grad_norm_(part, 3.0) for part in (of_network, of_critic)]

    assert norms[0].item() == pytest.approx(sum(p.numel() for p in of_network) ** .5, rel=1e-4)
    clipped = [torch.cat([p.grad.flatten() for p in part]).norm().item()
               for part in (of_network, of_critic)]
    assert clipped == pytest.approx([3.0, 3.0], rel=1e-3)


def test_the_adversarial_weight_scales_its_term_and_zero_leaves_no_critic():
    torch.manual_seed(0)
    one, tenth = rubik.Rubik(width=4, adversarial=1.0), rubik.Rubik(width=4, adversarial=0.1)
    tenth.load_state_dict(one.state_dict())
    batch = pretext.batch(one, range(2), side=24)
    first, second = one(batch), tenth(batch)

    assert second["adversarial"].item() == pytest.approx(first["adversarial"].item() / 10)
    assert second["critic"].item() == pytest.approx(first["critic"].item())
    without = rubik.Rubik(width=4, adversarial=0)
    assert without.critic is None and without(batch).keys() == {"restore"} == set(without.terms)


def test_samples_are_twisted_views_beside_the_straight_ones():
    task, views = rubik.Rubik(width=2, adversarial=0), torch.rand(2, 1, 24, 24, 24)
    sample = task.samples(views, rng())
    assert torch.equal(sample["target"], views)
    assert torch.equal(sample["input"], task.samples(views, rng())["input"])
    for twisted, straight in zip(sample["input"], views):
        assert not torch.equal(twisted, straight)
        assert torch.equal(twisted.flatten().sort().values, straight.flatten().sort().values)


@pytest.mark.parametrize("adversarial", [0, 0.01])
def test_rubiks_cube_learns_on_phantoms(adversarial):
    torch.manual_seed(0)
    task = rubik.Rubik(width=4, adversarial=adversarial)
    batch = pretext.batch(task, range(4), side=24)
    before = task(batch)["restore"].item()
    totals = pretext.train(task, steps=24, lr=1e-2, side=24, size=2)

    if not adversarial:                                 # the critic's loss need not fall
        assert mean(totals[-4:]) < .8 * mean(totals[:4])
    assert task(batch)["restore"].item() < .7 * before
    assert task.transferred().keys() == task.unet.state_dict().keys()
