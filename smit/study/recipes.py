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
and at the end on the prepared grid, half-way by the validation nearest to half of the steps, or in
parentheses after which share of them. Deviations are of a run's mean: over all runs; over seeds
with the same labelled volumes (the noise of training); and what the draw of these volumes adds.
Seeds: as many would show a difference of {EFFECT:g} between two rows as noisy as this one, with
probability .8 and the same volumes, if their noises are independent and normal. The test is that of
flipped signs of the seeds' differences, two-sided at .05, as in Table 2; it needs 6 seeds at least.
"""


class Summary(NamedTuple):
    """What the runs of one recipe came to."""
    runs: int
    mean: float
    deviation: float                   # over all runs
    noise: float                       # over seeds with the same labelled volumes
    draw: float                        # over draws of labelled volumes, without the noise
    half_way: float                    # Dice at the validation nearest to half of the steps
    half_way_share: float              # of the steps, where that validation was
    end: float


def recipe(out, scores, runs):
    """Write recipe.md: a line for each recipe, row and number of labels.

    Its seeds are those of `power.seeds_needed`, by flipped signs, for two rows as noisy as this one
    and independent of each other.
    """
    lines = []
    logs = group(runs, "recipe", "row", "labels")
    for key, part in group(scores, "recipe", "row", "labels").items():
        found = summarise(part, logs[key])
        # the difference of two independent runs deviates sqrt(2) times as much as one
        needed = ""
        if not math.isnan(found.noise):
            needed = power.seeds_needed(math.sqrt(2) * found.noise, EFFECT)
        columns = (found.mean, found.deviation, found.noise, found.draw)
        numbers = [number(value, ".3f") for value in columns]
        half_way = number(found.half_way, ".3f")
        share = f"{found.half_way_share:.2f}"
        if share != "0.50":
            half_way += f" ({share})"
        lines.append([*key, found.runs, *numbers, half_way, number(found.end, ".3f"), needed])
    head = ["recipe", "row", "labelled volumes", "runs", "DSC", "deviation", "of training",
            "of the draw", "Dice half-way", "Dice at the end", f"seeds to show {EFFECT:g}"]
    save(out, "recipe", scoring.markdown(head, lines) + "\n" + NOTE, scores)


def summarise(scores, runs):
    """Sum up the runs of one recipe, row and number of labels."""
    dice = {}
    for run, cases in dice_by_run_and_case(scores).items():
        dice[run] = np.mean(list(cases.values()))
    half_way, shares, end = [], [], []
    for run in runs:
        share, middle = nearest_to_half(run.finetuning)
        half_way.append(middle)
        shares.append(share)
        end.append(finite(run.finetuning["val_dice"])[-1])

    means = list(dice.values())
    noise, draw = power.noise_and_draw(by_draw(dice))
    return Summary(len(means), float(np.mean(means)), power.deviation(means), noise, draw,
                   float(np.mean(half_way)), float(np.mean(shares)), float(np.mean(end)))


def nearest_to_half(log):
    """Find the validation nearest to half of a fine-tuning's steps: (share of them, Dice)."""
    total = log["step"][-1]                            # the last step is always logged
    validations = []
    for step, dice in zip(log["step"], log["val_dice"]):
        if math.isfinite(dice):
            validations.append((abs(step / total - .5), step / total, dice))
    _, share, dice = min(validations)
    return share, dice


def by_draw(dice):
    """Arrange {(seed, draw): Dice} as rows of draws, over the seeds that every draw has."""
    draws = {}
    for (seed, draw), value in dice.items():
        draws.setdefault(draw, {})[seed] = value
    seeds = sorted(set.intersection(*map(set, draws.values())))
    return np.array([[of_seed[seed] for seed in seeds] for of_seed in draws.values()])
