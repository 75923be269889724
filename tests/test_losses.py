import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from smit import losses


# -------------------------------------------------------------------------------------------- Eq. 1
def test_mip_is_the_mean_over_hidden_voxels_by_hand():
    target = torch.zeros(1, 1, 1, 2, 2)
    pred = torch.tensor([.1, .2, .4, .8]).view(1, 1, 1, 2, 2)
    hidden = torch.tensor([True, False, True, False]).view(1, 1, 2, 2)
    assert losses.mip_loss(pred, target, hidden).item() == pytest.approx((.1 + .4) / 2)
    assert losses.mip_loss(pred, target, hidden[:, None]).item() == pytest.approx(.25)


def test_mip_ignores_visible_voxels():
    torch.manual_seed(0)
    pred, target = torch.rand(2, 1, 4, 6, 2, requires_grad=True), torch.rand(2, 1, 4, 6, 2)
    hidden = torch.rand(2, 4, 6, 2) < .5
    losses.mip_loss(pred, target, hidden).backward()
    assert torch.equal(pred.grad[:, 0] != 0, hidden)


def test_mip_without_hidden_voxels_is_an_error():
    with pytest.raises(ValueError, match="hidden"):
        losses.mip_loss(torch.rand(1, 1, 2, 2, 2), torch.rand(1, 1, 2, 2, 2),
                        torch.zeros(1, 2, 2, 2, dtype=torch.bool))


# -------------------------------------------------------------------------------------------- Eq. 3
def test_sharpening_and_centring_by_hand():
    p = losses.sharpen(torch.tensor([.2, .1]), temperature=.1, center=torch.tensor([.1, .1]))
    assert p.tolist() == pytest.approx([math.e / (math.e + 1), 1 / (math.e + 1)])
    cold, warm = (losses.sharpen(torch.tensor([.3, .2, .1]), t) for t in (.04, .1))
    assert cold[0] > warm[0] and cold.sum().item() == pytest.approx(1)


# -------------------------------------------------------------------------------------------- Eq. 2
def test_mpd_by_hand():
    student, teacher = torch.tensor([[[.1, 0.], [.5, .5]]]), torch.tensor([[[0., .04], [.9, .1]]])
    hidden = torch.tensor([[True, False]])
    e = math.e
    expected = -(1 / (1 + e) * math.log(e / (1 + e)) + e / (1 + e) * math.log(1 / (1 + e)))
    assert (losses.mpd_loss(student, teacher, hidden, torch.zeros(2), .1, .04).item()
            == pytest.approx(expected))


def test_mpd_ignores_visible_tokens():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 7, 5, requires_grad=True),
                        torch.randn(2, 7, 5, requires_grad=True))
    hidden = torch.rand(2, 7) < .5
    losses.mpd_loss(student, teacher, hidden, torch.zeros(5), .1, .04).backward()
    assert torch.equal((student.grad != 0).any(-1), hidden) and teacher.grad is None


def test_mpd_is_a_mean_over_tokens_then_samples():
    torch.manual_seed(0)
    student, teacher, center = torch.randn(3, 7, 5), torch.randn(3, 7, 5), torch.randn(5)
    hidden = torch.arange(7) < torch.tensor([[2], [7], [4]])
    total = 0.
    for b in range(3):  # the equation, sample by sample, token by token
        terms = [
            -(F.softmax((teacher[b, i] - center) / .05, 0)
              * F.log_softmax(student[b, i] / .1, 0)).sum()
            for i in range(7) if hidden[b, i]
        ]
        total += sum(terms) / len(terms) / 3

    torch.testing.assert_close(losses.mpd_loss(student, teacher, hidden, center, .1, .05), total)
    with pytest.raises(ValueError, match="no hidden token"):
        losses.mpd_loss(student, teacher, hidden & (torch.arange(3) > 0)[:, None], center, .1, .05)


# -------------------------------------------------------------------------------------------- Eq. 4
def test_itd_by_hand_and_without_gradient_to_the_teacher():
    student = torch.tensor([[.1, 0.], [0., 0.]], requires_grad=True)
    teacher = torch.tensor([[.3, .04], [1., 0.]], requires_grad=True)
    e = math.e
    first = -(1 / (1 + e) * math.log(e / (1 + e)) + e / (1 + e) * math.log(1 / (1 + e)))
    # teacher less centre: 0, .04
    loss = losses.itd_loss(student, teacher, torch.tensor([.3, 0.]), .1, .04)

    assert loss.item() == pytest.approx((first + math.log(2)) / 2)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_uniform_outputs_cost_ln_k():
    flat = torch.zeros(2, 3, 8192)
    hidden = torch.ones(2, 3, dtype=torch.bool)
    assert (losses.mpd_loss(flat, flat, hidden, torch.zeros(8192), .1, .04).item()
            == pytest.approx(math.log(8192)))
    assert (losses.itd_loss(flat[:, 0], flat[:, 0], torch.zeros(8192), .1, .04).item()
            == pytest.approx(9.011, abs=1e-3))


def test_token_losses_are_float32_whatever_comes_in():
    half, hidden = torch.randn(2, 3, 8).half(), torch.ones(2, 3, dtype=torch.bool)
    assert losses.mpd_loss(half, half, hidden, torch.zeros(8), .1, .04).dtype == torch.float32
    assert losses.itd_loss(half[:, 0], half[:, 0], torch.zeros(8), .1, .04).dtype == torch.float32


def test_hidden_tokens_found_before_a_mask_is_moved_give_the_same_loss():
    torch.manual_seed(0)
    student, teacher, center = torch.randn(3, 7, 5), torch.randn(3, 7, 5), torch.randn(5)
    hidden = torch.arange(7) < torch.tensor([[2], [7], [4]])
    index = losses.hidden_index(hidden)
    assert index.tolist() == [0, 1, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]

    given, made = (losses.mpd_loss(student, teacher, hidden, center, .1, .05, i)
                   for i in (index, None))
    assert torch.equal(given, made)
    with pytest.raises(ValueError, match="no hidden token"):
        losses.hidden_index(torch.tensor([[True, False], [False, False]]))


def test_no_loss_waits_for_a_gpu():
    with FakeTensorMode():  # has shapes and a device, but no value to read
        logits, center = torch.empty(2, 4, 5, device="cuda"), torch.empty(5, device="cuda")
        image_logits = torch.empty(2, 5, device="cuda")
        views = torch.empty(2, 1, 4, 4, 4, device="cuda")
        hidden = torch.ones(2, 4, dtype=torch.bool, device="cuda")
        index = torch.empty(6, device="cuda").long()
        terms = [losses.mip_loss(views, views, views > 0),
                 losses.mpd_loss(logits, logits, hidden, center, .1, .04, index),
                 losses.itd_loss(image_logits, image_logits, center, .1, .04)]
        assert all(term.is_cuda and term.shape == () for term in terms)
        with pytest.raises(DataDependentOutputException):  # without the index it would wait
            losses.mpd_loss(logits, logits, hidden, center, .1, .04)


# ----------------------------------------------------------------------------------------- centring
def test_center_is_a_running_mean_of_teacher_logits():
    center = losses.Center(2, momentum=.9)
    center.update(torch.tensor([[[1., 2.], [3., 4.]]]))
    assert center.value.tolist() == pytest.approx([.2, .3])
    center.update(torch.tensor([[2., 3.]]))
    assert center.value.tolist() == pytest.approx([.9 * .2 + .2, .9 * .3 + .3])


def test_center_counts_micro_batches_as_one_batch():
    whole, parts, discarded = (losses.Center(5) for _ in range(3))
    logits = torch.randn(6, 4, 5)
    whole.update(logits)
    parts.collect(logits[:1])
    parts.collect(logits[1:])
    torch.testing.assert_close(parts.update(), whole.value)

    discarded.collect(logits + 100)
    discarded.discard()
    torch.testing.assert_close(discarded.update(logits), whole.value)


# -------------------------------------------------------------------------- fine-tuning
def test_dice_ce_by_hand():
    logits, label = torch.zeros(1, 2, 1, 1, 2), torch.tensor([0, 1]).view(1, 1, 1, 2)
    dice = 1 - 2 * .5 / (2 * .25 + 1)  # per class: overlap .5, squares .5, truth 1
    assert losses.dice_ce_loss(logits, label).item() == pytest.approx(dice + math.log(2), rel=1e-5)
    sure = 50 * F.one_hot(label, 2).movedim(-1, 1).float()
    assert losses.dice_ce_loss(sure, label).item() == pytest.approx(0, abs=1e-5)


def test_dice_ce_equals_the_one_hot_formula():
    logits = torch.randn(2, 5, 3, 4, 6, requires_grad=True)
    label = torch.randint(0, 4, (2, 3, 4, 6))                           # no voxel of class 4
    truth, prob = F.one_hot(label, 5).movedim(-1, 1).float(), logits.softmax(1)
    total = (prob ** 2).sum((2, 3, 4)) + truth.sum((2, 3, 4))
    plain = ((1 - 2 * (prob * truth).sum((2, 3, 4)) / (total + 1e-6)).mean()
             + F.cross_entropy(logits, label))
    fast = losses.dice_ce_loss(logits, label)

    assert fast.item() == pytest.approx(plain.item(), abs=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (fast, plain)),
                               atol=1e-6, rtol=1e-5)


def test_the_background_can_weigh_less_and_be_left_out_of_dice():
    logits, label = torch.randn(2, 3, 2, 3, 4), torch.randint(3, (2, 2, 3, 4))
    p, truth = logits.softmax(1), torch.nn.functional.one_hot(label, 3).movedim(-1, 1)
    # (2 samples, 3 classes)
    dice = 2 * (p * truth).sum((2, 3, 4)) / (p.square() + truth).sum((2, 3, 4))
    weighted = torch.nn.functional.cross_entropy(logits, label, torch.tensor([.05, 1, 1]))
    loss = losses.dice_ce_loss(logits, label, background_weight=.05, dice_on="organs")
    torch.testing.assert_close(loss, (1 - dice[:, 1:]).mean() + weighted)


def test_an_infinite_logit_does_not_stay_in_the_centre():
    center = losses.Center(2, momentum=.9)
    center.update(torch.tensor([[1., 2.]]))
    for bad in (math.inf, -math.inf, math.nan):
        center.update(torch.tensor([[bad, 5.]]))
        assert center.value.tolist() == pytest.approx([.1, .2])
    assert center.update(torch.tensor([[2., 3.]])).tolist() == pytest.approx([.29, .48])
