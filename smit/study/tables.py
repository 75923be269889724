"""Write the paper's Table 2 and Figures 3 and 4 from the scores of a study [SMIT 3].

Reading order: the paper's numbers, Table 2 line by line, the figures.
"""
import math
from typing import NamedTuple

import numpy as np

from smit import figures, scoring
from smit.data.organs import CODES
from smit.study import power
from smit.study.scores import (
    as_array, dice_by_case, dice_by_organ, dice_by_seed_and_case, differences_by_seed,
    estimate_mean, group, matched, paired_difference, write, write_csv)

CNN = ["rand-cnn", "mg", "cpc", "cub++", "pcrl"]
SWIN = ["rand", "dino", "ibot", "simmim", "smit"]
TABLE2 = CNN + SWIN
PAPER = {  # DSC of Table 2, in the order of TABLE2
    "ct": {
        "SP": (.930, .950, .940, .926, .937,
               .944, .946, .948, .950, .963),
        "RK": (.892, .934, .916, .928, .919,
               .926, .931, .936, .934, .950),
        "LK": (.894, .918, .903, .914, .921,
               .905, .913, .919, .913, .943),
        "GB": (.605, .639, .718, .715, .797,
               .694, .730, .777, .761, .787),
        "ESO": (.744, .739, .756, .768, .759,
                .732, .752, .760, .772, .772),
        "LV": (.947, .967, .953, .946, .954,
               .950, .954, .956, .956, .970),
        "STO": (.862, .879, .896, .881, .877,
                .861, .891, .900, .898, .903),
        "AOR": (.875, .909, .900, .892, .894,
                .885, .906, .901, .905, .913),
        "IVC": (.844, .882, .855, .866, .851,
                .851, .866, .879, .867, .871),
        "SPV": (.727, .739, .731, .734, .760,
                .725, .752, .759, .754, .784),
        "Pan": (.719, .706, .726, .731, .693,
                .688, .763, .755, .764, .810),
        "RA": (.644, .671, .655, .665, .661,
               .660, .651, .659, .640, .669),
        "LA": (.648, .640, .655, .675, .680,
               .590, .680, .681, .678, .687),
        "AVG": (.795, .813, .816, .819, .823,
                .801, .826, .833, .830, .848),
    },
    "mr": {
        "LV": (.921, .936, .925, .920, .930,
               .922, .920, .939, .937, .942),
        "large bowel": (.786, .824, .824, .813, .823,
                        .818, .804, .833, .835, .855),
        "small bowel": (.688, .741, .745, .735, .745,
                        .708, .729, .744, .759, .775),
        "STO": (.702, .745, .769, .783, .793,
                .732, .750, .783, .775, .812),
        "LK": (.827, .832, .876, .866, .876,
               .837, .911, .883, .874, .936),
        "RK": (.866, .886, .863, .861, .871,
               .845, .896, .906, .871, .930),
        "AVG": (.798, .827, .834, .830, .840,
                .810, .835, .848, .842, .875),
    },
}
GROUPS = {  # Fig. 4's; the text names all organs of I, and only the kind of the others [ours]
    "I large": ("LV", "SP", "LK", "RK"),
    "II low contrast": ("STO", "ESO", "Pan"),
    "III small": ("GB", "RA", "LA"),
    "IV vessels": ("AOR", "IVC", "SPV"),
}


def save(out, name, text, rows):
    """Write OUT/name.md, and OUT/cases.csv with a row for each Dice, or error, behind it."""
    write_csv(out / "cases.csv", rows)
    write(out / f"{name}.md", text)


# ---------------------------------------------------------------------------------------- Table 2
EFFECT = .03                           # the difference in Dice that a study should be able to show
INTERVALS = f"""Over cases: bootstrap over cases of the mean over seeds, and p by Wilcoxon's signed
rank over cases, two-sided. Both speak of these trained networks alone. Over seeds and cases:
bootstrap over both, and so about other trainings as well, though of fine-tuning alone in a row that
begins with the same checkpoint in all seeds; too narrow with few seeds (with two, half the variance
of seeds). Deviation: of the mean over cases, from seed to seed. p over seeds: the share of all
choices of signs for the seeds' differences whose mean is at least as far from 0. Seeds: with as
many this p would be .05 or less with probability .8 for a difference of {EFFECT:g}, if it is normal
and deviates as here; at least 6, below which p cannot be so small; rough with few. Draws of
labelled volumes are averaged within a seed: all intervals are about the draws that there are. A
seed without a fold or a draw that another seed of its row has is left out, but for the lines of
that seed alone.
"""


def table2(out, scores, runs):
    """Write table2.md: organs down, rows of the comparison across, differences last.

    The columns of the paper's two networks stand in a table each.
    """
    text = ("DSC on the original grid, background excluded; in parentheses the paper's Table 2, "
            "from 21 volumes (CT) or 92 (MR).\n")
    runs_of = group(runs, "labels")
    for labels, part in group(scores, "labels").items():
        rows = by_row(part)
        text += f"\n{labels} labelled volumes, n = {len(dice_by_case(part))} cases\n"
        for name, unet in (("3-D U-Net", True), ("Swin", False)):
            own = {row: rows[row] for row in rows if (row in CNN) == unet}
            if own:
                reference = reference_of(rows)
                table = comparison(own, reference, rows.get(reference), runs_of.get(labels, []))
                text += f"\n{name}\n\n{table}"
    text += "\n" + INTERVALS
    save(out, "table2", text, scores)


def by_row(scores):
    """Part scores by the row of the comparison, in the order of TABLE2, others after it."""
    groups = group(scores, "row")
    return {row: groups[row] for row in dict.fromkeys([*TABLE2, *groups]) if row in groups}


def reference_of(rows):
    """Name the row that others are compared with: smit, or without it the last."""
    return "smit" if "smit" in rows else [*rows][-1]


def comparison(rows, reference, reference_scores, runs):
    """Format {row: scores from one number of labels} as a table.

    reference: name of the row that the others are compared with; reference_scores: its scores, or
    None. Seeds that a study left unfinished stand in lines of their own alone.
    """
    whole = {row: whole_seeds(part) for row, part in rows.items()}
    whole_reference = whole_seeds(reference_scores or [])
    tables = {row: dice_by_organ(part) if part else {} for row, part in whole.items()}
    # a row may lack a seed, and an organ that no label has is there where a row invented it
    scores = [score for part in rows.values() for score in part]
    organs = [*dice_by_organ(scores)]
    printed = paper_scores(scores[0].modality, organs)

    lines = [["seeds", *(seeds_of(part) for part in whole.values())]]
    left_out = [unfinished_seeds(rows[row], whole[row]) for row in rows]
    if any(left_out):
        lines.append(["seeds left out, unfinished", *left_out])
    lines += [organ_line(organ, tables, printed) for organ in organs]
    lines += lines_over_cases("", whole, reference, whole_reference)
    if len(group(scores, "seed")) > 1:
        lines += lines_over_seeds(whole, reference, whole_reference)
    for seed in sorted(group(scores, "seed")):
        alone = {row: group(part, "seed").get(seed) for row, part in rows.items()}
        reference_alone = group(reference_scores or [], "seed").get(seed)
        lines += lines_over_cases(f", seed {seed}", alone, reference, reference_alone)
    lines += cost_lines(rows, runs)
    return scoring.markdown(["", *rows], lines)


def whole_seeds(scores):
    """Keep of a row's scores those of seeds with every fold and draw that one of its seeds has.

    Without the others, of a study that was stopped, means over cases and over seeds are one number.
    """
    runs = {seed: set(group(part, "fold", "draw")) for seed, part in group(scores, "seed").items()}
    every = set().union(*runs.values())
    return [score for score in scores if runs[score.seed] == every]


def unfinished_seeds(scores, whole):
    """List the seeds of a row's scores that are not among its whole ones."""
    seeds = group(scores, "seed").keys() - group(whole, "seed").keys()
    return " ".join(map(str, sorted(seeds)))


def seeds_of(scores):
    """List the seeds, and the draws where they are not the seeds' own: "0 1, draws 0 1"."""
    seeds = " ".join(map(str, sorted(group(scores, "seed"))))
    draws = [draw for draw in group(scores, "draw") if draw is not None]
    return seeds + (f", draws {' '.join(map(str, sorted(draws)))}" if draws else "")


def cost_lines(rows, runs):
    """Format what one run of each row took, in the mean: CPU hours of its two trainings."""
    runs_of = group(runs, "row")
    lines = []
    for name, field in (("CPU hours, pre-training", "pretraining_hours"),
                        ("CPU hours, fine-tuning", "finetuning_hours")):
        line = [name]
        for row in rows:
            hours = [getattr(run, field) for run in runs_of.get(row, [])]
            line.append(number(float(np.mean(hours)), ".2f") if hours else "")
        lines.append(line)
    return lines


def paper_scores(modality, organs):
    """Look up Table 2's values: {organ: values in the order of TABLE2}, for organs that it has.

    Its AVG is among them only if these organs are all that it averages.
    """
    paper = PAPER[modality]
    found = {}
    for organ in organs:
        code = CODES.get(organ, organ)
        if code in paper:
            found[organ] = paper[code]
    if not len(found) == len(organs) == len(paper):
        found.pop("AVG", None)
    return found


def organ_line(organ, tables, printed):
    """Format an organ's mean Dice in each row, the paper's in parentheses; "-" where it is none."""
    line = [organ]
    for row, table in tables.items():
        text = f"{float(scoring.finite_mean(table[organ])):.3f}" if organ in table else "-"
        if organ in printed and row in TABLE2:
            text += f" ({printed[organ][TABLE2.index(row)]:.3f})"
        line.append(text)
    return line


def less_this(reference):
    """Begin the name of a line of differences: "SMIT less this"."""
    return f"{'SMIT' if reference == 'smit' else reference} less this"


def lines_over_cases(suffix, rows, reference, reference_scores):
    """Format the averages of {row: scores or None}, and how much the reference is ahead of each.

    The difference is of the runs that both have.
    """
    average = [f"AVG{suffix}, 95 % over cases"]
    difference = [f"{less_this(reference)}{suffix}, 95 % over cases"]
    for row, part in rows.items():
        average.append(average_text(dice_by_case(part)) if part else "")
        first, second = matched(reference_scores or [], part or [])
        compared = first and row != reference
        difference.append(difference_text(*map(dice_by_case, (first, second))) if compared else "")
    return [average, difference]


def average_text(dice):
    """Format the mean of {case: Dice} with its interval over cases."""
    mean, low, high = estimate_mean(list(dice.values()))
    return f"{mean:.3f}, {low:.3f}-{high:.3f}"


def difference_text(first, second):
    """Format the paired test of two {case: Dice}."""
    test = paired_difference(first, second)
    return (f"{test['mean_difference']:+.3f} ({test['low']:+.3f} to {test['high']:+.3f}), "
            f"p {test['p']:.2g}")


def lines_over_seeds(rows, reference, reference_scores):
    """Format what seeds do to the averages of {row: scores}, and to the reference's lead."""
    less = less_this(reference)
    names = ["AVG, 95 % over seeds and cases", "AVG, deviation over seeds",
             f"{less}, 95 % over seeds and cases", f"{less}, deviation over seeds",
             f"{less}, p over seeds", f"seeds to show {EFFECT:g}"]
    columns = []
    for row, part in rows.items():
        if not part:
            columns.append([""] * len(names))
            continue
        cells = spread_of(as_array(list(dice_by_seed_and_case(part).values())))
        common, _ = matched(reference_scores, part)
        lead = differences_by_seed(reference_scores, part) if common else np.empty((0, 0))
        if row == reference or not lead.size:
            cells += ["", "", "", ""]
        else:
            p = power.flipped_signs_p(np.nanmean(lead, axis=1))
            cells += [*spread_of(lead, "+.3f"), number(p, ".2g"), seeds_text(lead)]
        columns.append(cells)
    return [list(line) for line in zip(names, *columns)]


def spread_of(values, form=".3f"):
    """Format the mean of values (seeds, cases), its interval over both, and seeds' deviation."""
    low, high = power.bootstrap_seeds_and_cases(values)
    interval = f"{np.nanmean(values):{form}}, {low:{form}} to {high:{form}}"
    return [interval, number(power.deviation(np.nanmean(values, axis=1)), ".3f")]


def seeds_text(differences):
    """Format how many seeds would show EFFECT, from differences (seeds, cases)."""
    deviation = power.deviation(np.nanmean(differences, axis=1))
    return "" if math.isnan(deviation) else power.seeds_needed(deviation, EFFECT)


def number(value, form=".3f"):
    """Format a number; nothing for nan."""
    return "" if math.isnan(value) else format(value, form)


# --------------------------------------------------------------------------------------- Figure 3
class Curve(NamedTuple):
    """Points with intervals, as figures.curves_svg takes them."""
    x: list
    y: list
    low: list
    high: list

    def add(self, x, y, low, high):
        self.x.append(x)
        self.y.append(y)
        self.low.append(low)
        self.high.append(high)


def fig3a(out, scores, runs):
    """Draw DSC against the number of labelled volumes, with intervals over cases [SMIT Fig. 3a]."""
    curves, lines = {}, []
    for row, part in group(scores, "row").items():
        curves[row] = Curve([], [], [], [])
        for labels, points in sorted(group(part, "labels").items()):
            mean, low, high = estimate_mean(dice_by_organ(points)["AVG"])
            curves[row].add(labels, mean, low, high)
            seeds = len(group(points, "seed"))
            lines.append([row, labels, f"{mean:.3f}", f"{low:.3f}-{high:.3f}", seeds])
    out.mkdir(parents=True, exist_ok=True)
    figures.curves_svg(out / "fig3a.svg", curves, "labelled volumes", "mean DSC",
                       "Fig. 3a: fine-tuning size")
    head = ["row", "labelled volumes", "DSC", "95 %, over cases", "seeds"]
    save(out, "fig3a", scoring.markdown(head, lines), scores)


def fig3b(out, scores, runs):
    """Draw held-back MSE of MIP, and DSC, against the mask ratio [SMIT Fig. 3b]."""
    (row,) = group(scores, "row")
    dsc, lines = Curve([], [], [], []), []
    ratios, errors = [], []
    logs = group(runs, "ratio")
    for ratio, part in sorted(group(scores, "ratio").items()):
        ends = [finite(run.pretraining["val_mse"])[-1] for run in logs[ratio]]
        error = float(np.mean(ends))
        mean, low, high = estimate_mean(dice_by_organ(part)["AVG"])
        ratios.append(ratio)
        errors.append(error)
        dsc.add(ratio, mean, low, high)
        lines.append([row, f"{ratio:g}", f"{error:.4f}", f"{mean:.3f}", f"{low:.3f}-{high:.3f}",
                      len(ends)])
    out.mkdir(parents=True, exist_ok=True)
    figures.curves_svg(out / "fig3b-mse.svg", {row: (ratios, errors)}, "mask ratio", "MSE",
                       "Fig. 3b: mask ratio and MSE")
    figures.curves_svg(out / "fig3b-dsc.svg", {row: dsc}, "mask ratio", "DSC",
                       "Fig. 3b: mask ratio and DSC")
    head = ["row", "mask ratio", "MSE", "DSC", "95 %, over cases", "runs"]
    save(out, "fig3b", scoring.markdown(head, lines), scores)


def fig3c(out, scores, runs):
    """Draw held-back Dice against the epoch of fine-tuning, on the prepared grid [SMIT Fig. 3c].

    Means over seeds and folds.
    """
    curves, lines = {}, []
    for (row, labels), part in group(runs, "row", "labels").items():
        epochs = validated_epochs(part[0].finetuning)
        dice = np.mean([finite(run.finetuning["val_dice"]) for run in part], axis=0)
        curves[f"{row}, {labels}"] = (epochs, dice)
        for epoch, value in zip(epochs, dice):
            lines.append([row, labels, f"{epoch:.0f}", f"{value:.3f}"])
    out.mkdir(parents=True, exist_ok=True)
    figures.curves_svg(out / "fig3c.svg", curves, "epoch", "mean Dice, held back",
                       "Fig. 3c: convergence")
    head = ["row", "labelled volumes", "epoch", "Dice"]
    save(out, "fig3c", scoring.markdown(head, lines), scores)


def finite(values):
    return [value for value in values if math.isfinite(value)]


def validated_epochs(log):
    """List the epochs of a fine-tuning's log that end with a validation."""
    return [epoch for epoch, dice in zip(log["epoch"], log["val_dice"]) if math.isfinite(dice)]


# --------------------------------------------------------------------------------------- Figure 4
def fig4(out, scores, runs):
    """Write DSC by type of organ, rows of the comparison down [SMIT Fig. 4]."""
    lines = []
    for (row, labels), part in group(scores, "row", "labels").items():
        table = dice_by_organ(part)
        means = [organ_group_mean(table, organs) for organs in GROUPS.values()]
        mean, low, high = estimate_mean(table["AVG"])
        numbers = [number(value) or "-" for value in [*means, mean]]
        lines.append([row, labels, *numbers, f"{low:.3f}-{high:.3f}", seeds_of(part)])
    head = ["row", "labelled volumes", *GROUPS, "AVG", "95 %, over cases", "seeds"]
    save(out, "fig4", scoring.markdown(head, lines), scores)


def organ_group_mean(table, organs):
    """Average some organs' means in {organ: Dice of each case}; nan unless it has them all.

    organs: the paper's short names, which the table has only beside all 13.
    """
    dice_of = {CODES.get(organ, organ): dice for organ, dice in table.items()}
    if not all(organ in dice_of for organ in organs):
        return math.nan
    return float(np.mean([scoring.finite_mean(dice_of[organ]) for organ in organs]))


WRITERS = {"table2": table2, "fig3a": fig3a, "fig3b": fig3b, "fig3c": fig3c, "fig4": fig4}
