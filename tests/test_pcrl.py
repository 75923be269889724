import math

import numpy as np
import pretext
import pytest
import torch
from pretext import mean, rng
from torch.nn import functional as F

from smit.baselines import genesis, pcrl


@pytest.fixture(autouse=True)
def few_windows(monkeypatch):
    """Shuffle less than the release, in less time."""
    monkeypatch.setattr(genesis, "WINDOWS", 200)


def small(**sizes):
    return pcrl.PCRL(**{"width": 4, "queue": 32, "embedding": 8} | sizes)


def ball(*shape, radius=5.0, centre=(0.0, 0.0, 0.0)):
    """An image of 1 inside a ball, its centre in voxels from the image's."""
    axes = [torch.arange(size) - (size - 1) / 2 - at for size, at in zip(shape, centre)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    return (x ** 2 + y ** 2 + z ** 2 < radius ** 2).float()


def centre_of(image):
    places = torch.stack(torch.meshgrid(*map(torch.arange, image.shape), indexing="ij")).float()
    centre = (places * image).sum((1, 2, 3)) / image.sum()
    return (centre - (torch.tensor(image.shape) - 1) / 2).tolist()


# -------------------------------------------------------------------------------------------- turns
def test_the_code_of_a_turn_by_hand():
    assert pcrl.turn_code([True, False, False], 1).tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert pcrl.turn_code([False, True, True], 0).tolist() == [0, 1, 1, 1, 0, 0, 0]


def test_turns_flip_first_and_then_rotate_as_numpy_does_and_all_are_drawn():
    image, drawn = torch.rand(4, 4, 6), set()
    for seed in range(300):
        flips, turns = pcrl.random_turn(rng(seed))
        axes = [axis for axis in range(3) if flips[axis]]
        expected = np.rot90(np.flip(image.numpy(), axes), turns, (0, 1))
        assert np.array_equal(pcrl.turn(image, flips, turns), expected)
        drawn.add((*flips, turns))

    assert len(drawn) == 8 * 4
    with pytest.raises(ValueError, match="first two"):
        pcrl.turn(torch.rand(4, 5, 4), [False] * 3, 1)


# ------------------------------------------------------------------------------------------- affine
def test_an_affine_without_change_is_the_identity_and_scales_about_the_centre():
    image = torch.rand(8, 10, 12)
    none = torch.zeros(3)
    torch.testing.assert_close(pcrl.affine(image, torch.ones(3), none), image, atol=1e-5, rtol=0)
    larger = pcrl.affine(ball(40, 44, 48), torch.tensor([1.1, 1.0, 1.0]), none)
    assert larger.sum().item() == pytest.approx(1.1 * ball(40, 44, 48).sum().item(), rel=.03)
    away = pcrl.affine(ball(40, 44, 48, centre=(10., 5., 5.)), torch.tensor([1.0, 1.0, .9]), none)
    assert centre_of(away) == pytest.approx([10, 5, 4.5], abs=.1)


@pytest.mark.parametrize("axis", range(3))
def test_an_affine_rotates_in_voxels_about_each_axis(axis):
    degrees = torch.zeros(3)
    degrees[axis] = 10.0
    first, second = [other for other in range(3) if other != axis]
    centre = [0.0, 0.0, 0.0]
    centre[first] = 12.0
    found = centre_of(pcrl.affine(ball(40, 44, 48, centre=centre), torch.ones(3), degrees))

    assert abs(found[second]) == pytest.approx(12 * math.sin(math.radians(10)), abs=.1)
    assert found[first] == pytest.approx(12 * math.cos(math.radians(10)), abs=.1)


# --------------------------------------------------------------------------------------------- blur
def test_a_blur_is_a_gaussian_along_each_axis():
    point = torch.zeros(21, 23, 25)
    point[10, 11, 12] = 1
    blurred = pcrl.blur(point, torch.tensor([1.0, 2.0, 0.0]))

    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    for neighbour in (blurred[11, 11, 12], blurred[10, 13, 12]):            # one sigma away
        assert (blurred[10, 11, 12] / neighbour).item() == pytest.approx(math.exp(.5), rel=1e-4)
    assert blurred[10, 11, 11] == 0
    flat = torch.full((9, 9, 9), .3)
    torch.testing.assert_close(pcrl.blur(flat, torch.full((3,), 2.0)), flat)


# ------------------------------------------------------------------------------------------ network
def test_the_embedding_and_the_attention_have_215_808_parameters():
    branch = pcrl.Branch(width=64, embedding=128)
    parts = (branch.embedding, branch.attention)
    assert sum(w.numel() for part in parts for w in part.parameters()) == 215_808


def test_a_student_share_of_one_is_the_plain_decoder():
    torch.manual_seed(0)
    task = small()
    _, learned = task.student(torch.rand(2, 1, 16, 16, 16), torch.rand(2, 7))
    _, taught = task.student(torch.rand(2, 1, 16, 16, 16), torch.rand(2, 7))
    one, zero = torch.ones(2), torch.zeros(2)

    assert torch.equal(task.student.decode(pcrl.blend(learned, taught, one)),
                       task.student.decode(learned))
    assert torch.equal(task.student.decode(pcrl.blend(learned, taught, zero)),
                       task.student.decode(taught))


def test_shares_mix_sample_by_sample():
    x = torch.tensor([[1., 10.], [2., 20.], [4., 40.]])
    assert pcrl.mix(x, torch.tensor([1., .75, .5])).tolist() == [[1, 10], [1.75, 17.5], [3, 30]]


def test_the_attention_scales_the_bottleneck_and_no_other_feature():
    task, x = small(), torch.rand(2, 1, 16, 16, 16)
    for parameter in task.student.attention.parameters():
        torch.nn.init.zeros_(parameter)                                     # sigmoid(0) = .5
    embedding, told = task.student(x, torch.zeros(2, 7))
    same, plain = task.student(x)

    assert torch.equal(told[-1], plain[-1] / 2) and torch.equal(embedding, same)
    assert all(torch.equal(a, b) for a, b in zip(told[:3], plain[:3]))


# ----------------------------------------------------------------------------------- teacher, queue
def test_the_teacher_starts_as_the_student_and_follows_it_at_a_thousandth():
    task = small()
    before = task.teacher.unet.out.weight.clone()
    assert torch.equal(before, task.student.unet.out.weight)

    with torch.no_grad():
        task.student.unet.out.weight += 1
    task.fresh_keys.append(torch.eye(8)[:2])
    task.after_step(.5)

    torch.testing.assert_close(task.teacher.unet.out.weight, before + .001)
    assert not any(weight.requires_grad for weight in task.teacher.parameters())


def test_the_queue_forgets_its_oldest_keys_first():
    task = small(queue=5)
    start = task.queue.clone()
    for count in (2, 2, 2):
        task.fresh_keys += [torch.full((1, 8), float(count + number)) for number in range(count)]
        task.after_step(0)

    assert task.oldest == 1 and not torch.equal(task.queue, start)
    assert task.queue[:, 0].tolist() == [3, 3, 2, 3, 2]               # the sixth key over the first

    task.fresh_keys.append(torch.rand(1, 8))
    task.discard()
    assert task.fresh_keys == []


def test_a_key_like_its_query_and_an_orthogonal_queue_by_hand():
    task = pcrl.PCRL(width=2, embedding=8)
    assert task.queue.shape == (16384, 8) and task.temperature == .2
    task.queue[::2], task.queue[1::2] = torch.eye(8)[1], -torch.eye(8)[1]   # their mean is 0
    own = 3 * torch.eye(8)[:1]
    assert task.contrast(own, own).item() == pytest.approx(4.713078, abs=2e-5)

    shift = torch.rand(8)                                      # common to all: told apart as before
    task.queue += shift
    assert task.contrast(own + shift, own + shift).item() == pytest.approx(4.713078, abs=1e-3)


# --------------------------------------------------------------------------------------------- task
def test_the_losses_equal_the_seven_terms_written_out():
    torch.manual_seed(0)
    task = small()
    with torch.no_grad():
        for weight in task.teacher.parameters():
            weight += .1 * torch.randn_like(weight)                         # a teacher of its own
    batch = pretext.batch(task, range(3), side=16)
    found = task(batch)

    def column(values):
        return values.view(-1, 1, 1, 1, 1)
    a, a_mixed, lam = batch["shares"].T
    lam_k, lam = lam[:, None], column(lam)
    (x1, x2), (c1, c2), (t1, t2) = (batch[name].unbind(1) for name in ("input", "clean", "target"))
    partner = torch.tensor([2, 0, 1])                                      # roll(1): the one before
    mixed1, mixed2, target1, target2 = (
        lam * x + (1 - lam) * x[partner] for x in (x1, x2, c1, c2))
    passes = [(x1, x2, t1, t2, a, batch["code"].unbind(1)),
              (mixed1, mixed2, target1, target2, a_mixed, (None, None))]
    contrasts, squares, keys = [], [], []
    for y1, y2, s1, s2, share, codes in passes:
        (q, f), (k, g) = task.student(y1, codes[0]), task.teacher(y2, codes[1])
        share = column(share)
        squares.append((task.student.decode(f) - s1).square().mean())
        mixed = [share * own + (1 - share) * other for own, other in zip(f, g)]
        squares.append((task.student.decode(mixed) - share * s1 - (1 - share) * s2).square().mean())
        keys.append(k)
        contrasts.append((q, k))
    contrasts.append((q, lam_k * keys[0] + (1 - lam_k) * keys[0][partner]))
    expected, centre = [], task.queue.mean(0)
    for queries, own in contrasts:
        for query, key in zip(queries, own):
            candidates = torch.cat([key[None], task.queue]) - centre
            scores = F.cosine_similarity(query - centre, candidates) / .2
            expected.append((scores.logsumexp(0) - scores[0]) / 3)
    torch.testing.assert_close(found["contrast"], sum(expected) / 3)
    torch.testing.assert_close(found["restore"], sum(squares) / 4)
    torch.testing.assert_close(torch.cat(task.fresh_keys), keys[0])


def test_samples_come_disturbed_clean_and_turned():
    task, views = small(), pretext.views(0, 24)
    outer = 0
    for seed in range(40):
        sample = task.samples(views, rng(seed))
        again = task.samples(views, rng(seed))
        assert all(torch.equal(sample[name], value) for name, value in again.items())
        for clean, target, code in zip(sample["clean"][:, 0], sample["target"][:, 0],
                                       sample["code"]):
            flips, turns = code[:3].bool().tolist(), int(code[3:].argmax())
            assert torch.equal(pcrl.turn(clean, flips, turns), target)
        assert (sample["shares"] >= .5).all() and not torch.equal(sample["input"], sample["clean"])
        noisy = [(x[0, :3].diff(dim=0).abs().mean() > .2).item() for x in sample["input"]]
        outer += any(noisy)

    assert outer / 40 == pytest.approx(.8, abs=.2)


def test_the_views_of_a_pair_are_both_painted_outside_or_neither():
    black = torch.zeros(2, 1, 24, 24, 24)
    task, outside = small(width=2), set()
    for seed in range(60):
        shells, cores = [], []
        for view in task.samples(black, rng(seed))["input"][:, 0]:
            shells.append(bool(view[:3].any()))
            cores.append(bool(view[3:-3, 3:-3, 3:-3].any()))
        outside.add(tuple(shells))
        if any(shells):                                     # the other view is painted so, or not
            assert all(shell or not core for shell, core in zip(shells, cores))
    assert {(True, True), (False, False)} <= outside


def test_pcrl_learns_on_phantoms():
    torch.manual_seed(0)
    task = small(momentum=.9, queue=16)
    batches = [pretext.batch(task, range(first, first + 4), 16) for first in (0, 4)]
    optimizer, terms = torch.optim.AdamW(task.parameters(), lr=1e-3), []
    for step in range(32):
        terms.append(task(batches[step % 2]))
        optimizer.zero_grad()
        sum(terms[-1].values()).backward()
        optimizer.step()
        task.after_step(step / 32)
    contrasts, restorations = ([term[name].item() for term in terms] for name in task.terms)

    assert mean(contrasts[-8:]) < .8 * math.log(17)                 # chance, once the queue is full
    assert mean(restorations[-4:]) < .8 * mean(restorations[:4])
    assert task.transferred().keys() == task.student.unet.state_dict().keys()
