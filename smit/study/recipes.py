"""Compare ways to fine-tune on training-side volumes, by their plateau and their noise [ours].

The held-back cases are a part of the training split, the same in every run; no case of the
validation split, which the tables show, has a say.
"""
import math
from typing import NamedTuple

import numpy as np

from smit import scoring
from smit.study import power
from smit.study.scores import dice_by_run_and_case, group
from smit.study.tables import EFFECT, finite, number, save

NOTE = f"""DSC of held-back training volumes on the original grid, mean over cases; Dice half-way
and at the end on the prepared grid. Deviations are of a run's mean: over all runs; over seeds with
the same labelled volumes (the noise of training); and what the draw of these volumes adds. Seeds:
as many would show a difference of {EFFECT:g} between two rows as noisy as this one, with
probability .8 and the same volumes, if their noises are independent.
"""


class Summary(NamedTuple):
    """What the runs of one recipe came to."""
    runs: int
    mean: float
    deviation: float                   # over all runs
    noise: float                       # over seeds with the same labelled volumes
    draw: float                        # over draws of labelled volumes, without the noise
    half_way: float
    end: float


def recipe(out, scores, runs):
    """Write recipe.md: a line for each recipe, row and number of labels."""
    lines = []
    logs = group(runs, "recipe", "row", "labels")
    for key, part in group(scores, "recipe", "row", "labels").items():
        found = summarise(part, logs[key])
        # the difference of two independent runs deviates sqrt(2) times as much as one
        needed = ""
        if not math.isnan(found.noise):
            needed = power.seeds_needed(math.sqrt(2) * found.noise, EFFECT)
        columns = (found.mean, found.deviation, found.noise, found.draw, found.half_way, found.end)
        numbers = [number(value, ".3f") for value in columns]
        lines.append([*key, found.runs, *numbers, needed])
    head = ["recipe", "row", "labelled volumes", "runs", "DSC", "deviation", "of training",
            "of the draw", "Dice half-way", "Dice at the end", f"seeds to show {EFFECT:g}"]
    save(out, "recipe", scoring.markdown(head, lines) + "\n" + NOTE, scores)


def summarise(scores, runs):
    """Sum up the runs of one recipe, row and number of labels."""
    dice = {}
    for run, cases in dice_by_run_and_case(scores).items():
        dice[run] = np.mean(list(cases.values()))
    half_way, end = [], []
    for run in runs:
        validated = finite(run.finetuning["val_dice"])
        half_way.append(validated[(len(validated) - 1) // 2])
        end.append(validated[-1])

    means = list(dice.values())
    noise, draw = power.noise_and_draw(by_draw(dice))
    return Summary(len(means), float(np.mean(means)), power.deviation(means), noise, draw,
                   float(np.mean(half_way)), float(np.mean(end)))


def by_draw(dice):
    """Arrange {(seed, draw): Dice} as rows of draws, over the seeds that every draw has."""
    draws = {}
    for (seed, draw), value in dice.items():
        draws.setdefault(draw, {})[seed] = value
    seeds = sorted(set.intersection(*map(set, draws.values())))
    return np.array([[of_seed[seed] for seed in seeds] for of_seed in draws.values()])
