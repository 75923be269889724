import math

import pytest
import torch

from smit import ema


def test_teacher_moves_by_one_minus_momentum():
    teacher, student = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    ema.update_teacher(teacher, student, .996)

    for name, p in teacher.named_parameters():
        torch.testing.assert_close(
            p.detach(), .996 * before[name] + .004 * dict(student.named_parameters())[name])
    ema.update_teacher(teacher, student, 0.)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters()))
    ema.update_teacher(teacher, torch.nn.Linear(3, 2), 1.)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters()))


def test_a_teacher_may_lack_heads_and_names_decide():
    student = torch.nn.ModuleDict({name: torch.nn.Linear(2, 3) for name in ("unused", "b", "a")})
    teacher = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "b": torch.nn.Linear(2, 3)})
    ema.update_teacher(teacher, student, 0.)
    assert (torch.equal(teacher["a"].weight, student["a"].weight)
            and torch.equal(teacher["b"].bias, student["b"].bias))


def test_cosine_reaches_both_ends():
    assert ema.cosine(0, .996, 1) == .996 and ema.cosine(1, .996, 1) == 1
    assert ema.cosine(.5, 0, 1) == pytest.approx(.5)
    assert ema.cosine(.25, 0, 1) == pytest.approx((1 - math.sqrt(.5)) / 2)
    assert ema.cosine(7, .996, 1) == 1


def test_temperature_rises_straight_and_stays():
    assert ema.linear_warmup(0, .04, .07) == .04
    assert ema.linear_warmup(.5, .04, .07) == pytest.approx(.055)
    assert ema.linear_warmup(1, .04, .07) == ema.linear_warmup(3, .04, .07) == pytest.approx(.07)


def test_learning_rate_warms_up_then_falls_to_its_end():
    rate = lambda step: ema.warmup_cosine(step, 30, 400, 2e-4)
    assert rate(0) == 0 and rate(15) == pytest.approx(1e-4) and rate(30) == 2e-4 and rate(400) == 0
    assert rate(215) == pytest.approx(1e-4)                             # half way down
    assert all(rate(s) > rate(s + 1) for s in range(30, 400))
    assert ema.warmup_cosine(5, 0, 10, 1.) == pytest.approx(.5)         # without a warm-up
