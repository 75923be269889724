"""progress.py: what is told, when it is saved, and when a run gives up."""
import math

import pytest
import torch

from smit.runtime import Ranks, progress

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_a_run_without_a_terminal_tells_speed_time_left_and_what_is_unknown(capsys):
    bar = progress.Progress(4, 10, 6, ALONE)
    bar.begun -= 12                                    # as if the steps had taken 12 s
    bar.advance()
    bar.advance()
    bar.tell(1.5, loss=.25, best_Dice=None)
    told = capsys.readouterr().out.splitlines()

    assert told[0].startswith("first step: peak memory")
    assert told[1] == "step 6 of 10, epoch 1.5: loss 0.250, best Dice -, 1.00 crops/s, 0:00:24 left"


@pytest.mark.parametrize("steps, word", [(1, "stopped"), (2, "done")])
def test_a_run_that_stopped_says_how_to_go_on(steps, word, capsys):
    bar = progress.Progress(0, 2, 1, ALONE)
    for _ in range(steps):
        bar.advance()
    bar.close("weights in x")
    told = capsys.readouterr().out

    assert f"{word} at step {steps}: " in told and "weights in x" in told
    assert ("--resume goes on to step 2" in told) == (word == "stopped")


def test_ranks_other_than_the_first_say_nothing(capsys):
    bar = progress.Progress(0, 2, 1, Ranks(1, 2, torch.device("cpu")))
    bar.advance()
    bar.tell(1, loss=1.)
    bar.close("")
    assert capsys.readouterr().out == ""


def test_checkpoints_are_due_by_step_by_time_and_at_the_end():
    clock = progress.SaveClock(minutes=1, steps=4, total=10)
    assert [step for step in range(1, 11) if clock.due(step)] == [4, 8, 10]
    clock.saved -= 61
    assert clock.due(1)
    clock.reset()
    assert not clock.due(1)


def test_a_finite_step_forgives_those_before_and_the_twentieth_in_a_row_ends_the_run():
    skips = progress.Skips(total=5)
    for _ in range(19):
        skips.count(False, 1, {}, [], ALONE)
    skips.count(True, 2, {}, [], ALONE)
    assert (skips.total, skips.in_a_row) == (24, 0)

    for _ in range(19):
        skips.count(False, 3, {}, [], ALONE)
    with pytest.raises(ValueError, match=r"step 9: 20 steps in a row.*'mip': nan.*a\.nii.*--lr"):
        skips.count(False, 9, {"mip": torch.tensor(math.nan)}, ["/x/a.nii"], ALONE)
