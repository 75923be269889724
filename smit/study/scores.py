"""Read, group and average the scores of finished cells [SMIT Table 2].

Seeds, draws and folds are averaged case by case before the tests and the intervals over cases, so
that their n is the number of cases. Intervals over seeds and cases keep both; draws of labelled
volumes are averaged within a seed, so these intervals are about the draws that there are. A run
has a seed and a draw.
Reading order: Score and Run, files, grouping, averages, intervals.
"""
import csv
import io
import json
import math
import operator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smit import metrics, runtime, scoring


class Score(NamedTuple):
    """The Dice of one organ in one case, and the cell of the study that it belongs to."""
    row: str
    labels: int
    seed: int
    fold: int
    ratio: float
    modality: str
    draw: int                          # of the labelled volumes; None: by the seed
    recipe: str                        # of fine-tuning, or of what stands on a frozen encoder
    case: str
    organ: str
    dice: float                        # nan: absent from prediction and label


class Run(NamedTuple):
    """The logs of one cell, {column: numbers}, nan where a line says nothing; and its CPU time."""
    row: str
    labels: int
    seed: int
    fold: int
    ratio: float
    modality: str
    draw: int
    recipe: str
    pretraining: dict                  # None for random weights and given checkpoints
    finetuning: dict
    pretraining_hours: float = math.nan
    finetuning_hours: float = math.nan


# ------------------------------------------------------------------------------------------ files
def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    runtime.atomic_write(path, text.encode())


def write_csv(path, rows):
    """Write named tuples of one kind, their fields as columns."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(rows[0]._fields)
    writer.writerows(rows)
    write(path, lines.getvalue())


def facts_of(cell):
    """List what tells a cell from another, by name."""
    facts = cell._asdict()
    del facts["steps"]
    return facts


def complete_results(out, cell):
    """Add settings and cost of every step that led to a cell to its results.json, once."""
    path = Path(out, cell.folder, "results.json")
    results = json.loads(path.read_text())
    if "study" in results:
        return
    steps = {}
    for step in cell.steps:
        steps[step.name] = {}
        for stem in ("step", "config"):
            file = Path(out, step.name, f"{stem}.json")
            if file.exists():
                steps[step.name][stem] = json.loads(file.read_text())
    results["study"] = {**facts_of(cell), "steps": steps}
    write(path, json.dumps(results, indent=1))


def read_cells(out, cells):
    """Read the scores and the logs of finished cells: (list of Score, list of Run)."""
    scores, runs = [], []
    for cell in cells:
        facts = facts_of(cell)
        with open(Path(out, cell.folder, "cases.csv"), newline="") as file:
            for line in csv.DictReader(file):
                scores.append(Score(**facts, case=line["case"], organ=line["organ"],
                                    dice=float(line["dice"])))
        *before, tuned, _ = [Path(out, step.name) for step in cell.steps]
        pretrained = before[0] if before else None
        runs.append(Run(**facts, pretraining=read_log(pretrained / "log.csv") if before else None,
                        finetuning=read_log(tuned / "log.csv"),
                        pretraining_hours=cpu_hours(pretrained) if before else math.nan,
                        finetuning_hours=cpu_hours(tuned)))
    return scores, runs


def read_log(path):
    """Read a log.csv: {column: [numbers]}, nan where a line says nothing."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines:
        return {}
    return {name: [float(line[name] or "nan") for line in lines] for name in lines[0]}


def cpu_hours(folder):
    """Read what a finished step took."""
    return json.loads((folder / "step.json").read_text())["cpu_s"] / 3600


# --------------------------------------------------------------------------------------- grouping
def group(items, *fields):
    """Part items by their fields: {value: [items]}, in order of first appearance.

    A key is the value of one field, or a tuple of those of several.
    """
    value_of = operator.attrgetter(*fields)
    groups = {}
    for item in items:
        groups.setdefault(value_of(item), []).append(item)
    return groups


# --------------------------------------------------------------------------------------- averages
def average_runs(scores):
    """Average the Dice of each organ in each case over seeds and draws: {(case, organ): Dice}.

    A run without a Dice for a case and organ is left out of that mean. Cases are in the order of
    their names.
    """
    values = {}
    for score in sorted(scores, key=lambda score: score.case):
        if not math.isnan(score.dice):
            values.setdefault((score.case, score.organ), []).append(score.dice)
    return {pair: float(np.mean(dices)) for pair, dices in values.items()}


def dice_by_organ(scores):
    """Average over seeds and draws: {organ: Dice of each case}, "AVG" of dice_by_case last.

    All 13 organs of the paper go by its short names, others by their own.
    """
    rows = []
    for (case, organ), dice in average_runs(scores).items():
        rows.append({"case": case, "organ": organ, "dice": dice})
    table = scoring.columns(rows, "dice")
    for derived in ("AG", "AVG12"):                    # Table 1's
        table.pop(derived, None)
    return {**table, "AVG": np.array([*dice_by_case(scores).values()])}


def dice_by_case(scores):
    """Average over the organs of each run, then over seeds and draws: {case: Dice}."""
    values = {}
    for dices in dice_by_run_and_case(scores).values():
        for case, dice in dices.items():
            values.setdefault(case, []).append(dice)
    return {case: float(np.mean(values[case])) for case in sorted(values)}


def dice_by_run_and_case(scores):
    """Average over organs only: {(seed, draw): {case: Dice}}."""
    by_run = {}
    for run, part in group(scores, "seed", "draw").items():
        by_run[run] = {}
        for case, organs in group(part, "case").items():
            mean = scoring.finite_mean([score.dice for score in organs])
            if not math.isnan(mean):
                by_run[run][case] = float(mean)
    return by_run


def dice_by_seed_and_case(scores):
    """Average over organs and draws: {seed: {case: Dice}}. Runs of one seed share its noise."""
    return {seed: dice_by_case(part) for seed, part in group(scores, "seed").items()}


def matched(first, second):
    """Keep of two rows' scores those of seeds, draws and folds that both have: (first, second).

    Their fine-tunings share volumes, order and decoder, and no row is compared on other runs.
    """
    first, second = (group(scores, "seed", "draw", "fold") for scores in (first, second))
    common = [run for run in first if run in second]
    return ([score for run in common for score in first[run]],
            [score for run in common for score in second[run]])


# -------------------------------------------------------------------------------------- intervals
class Estimate(NamedTuple):
    """A mean over cases with its 95 % bootstrap interval."""
    mean: float
    low: float
    high: float


def estimate_mean(values):
    """Estimate the mean of what is finite over cases."""
    low, high = metrics.bootstrap_interval(values)
    return Estimate(float(scoring.finite_mean(values)), low, high)


def paired_difference(first, second):
    """Test first - second, each {case: Dice}, over the cases of both: as metrics.paired_test."""
    cases = [case for case in first if case in second]
    return metrics.paired_test([first[case] for case in cases], [second[case] for case in cases])


def differences_by_seed(first, second):
    """Subtract two rows' matched scores: an array (seeds, cases), nan where a seed lacks a case."""
    first, second = map(dice_by_seed_and_case, matched(first, second))
    differences = []
    for seed, dice in first.items():
        other = second[seed]
        differences.append({case: dice[case] - other[case] for case in dice if case in other})
    return as_array(differences)


def as_array(dice):
    """Make an array (runs, cases) of a list of {case: value}, nan where a run lacks a case."""
    cases = sorted(set().union(*dice))
    values = np.full((len(dice), len(cases)), math.nan)
    for run, by_case in enumerate(dice):
        for case, value in by_case.items():
            values[run, cases.index(case)] = value
    return values
