"""From finished cells of a study to the paper's Table 2 and Figures 3, 4 and 5 [SMIT 3]. See study.py.

A score is a row {row, labels, seed, fold, ratio, modality, case, organ, dice}; seeds are averaged case by case before
intervals and tests, whose n is the number of cases. Reading order: what the paper prints, cells, tables, figures.
"""
import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from smit import data, figures, metrics, pretrain, runtime, scoring
from smit.data import organs, samples as sampling
from smit.masking import expand_mask
from smit.study import probe as probes

TABLE2 = ["rand", "dino", "ibot", "simmim", "smit"]
PAPER = {  # DSC of Table 2's Swin columns, in the order of TABLE2
    "ct": {
        "SP": (.944, .946, .948, .950, .963), "RK": (.926, .931, .936, .934, .950),
        "LK": (.905, .913, .919, .913, .943), "GB": (.694, .730, .777, .761, .787),
        "ESO": (.732, .752, .760, .772, .772), "LV": (.950, .954, .956, .956, .970),
        "STO": (.861, .891, .900, .898, .903), "AOR": (.885, .906, .901, .905, .913),
        "IVC": (.851, .866, .879, .867, .871), "SPV": (.725, .752, .759, .754, .784),
        "Pan": (.688, .763, .755, .764, .810), "RA": (.660, .651, .659, .640, .669),
        "LA": (.590, .680, .681, .678, .687), "AVG": (.801, .826, .833, .830, .848)},
    "mr": {
        "LV": (.922, .920, .939, .937, .942), "large bowel": (.818, .804, .833, .835, .855),
        "small bowel": (.708, .729, .744, .759, .775), "STO": (.732, .750, .783, .775, .812),
        "LK": (.837, .911, .883, .874, .936), "RK": (.845, .896, .906, .871, .930),
        "AVG": (.810, .835, .848, .842, .875)}}
GROUPS = {  # Fig. 4; the text names all of I, of the others their kind only: [ours]
    "I large": ("LV", "SP", "LK", "RK"), "II low contrast": ("STO", "ESO", "Pan"),
    "III small": ("GB", "RA", "LA"), "IV vessels": ("AOR", "IVC", "SPV")}
PAPER_MSE = {("ct", "smit"): .061, ("ct", "ml-smit"): .32, ("mr", "smit"): .062, ("mr", "ml-smit"): .34}  # [SMIT 3]
COLUMNS = "row labels seed fold ratio modality case organ dice".split()
KEY = COLUMNS[:6]


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    runtime.atomic_write(path, text.encode())


def write_csv(path, rows):
    lines = io.StringIO()
    writer = csv.DictWriter(lines, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, lines.getvalue())


# ------------------------------------------------------------------------------------------------------------ cells
def complete_results(out, cell):
    """Put into the cell's results.json, beside its scores, the settings and the cost of every step that led to it."""
    path = Path(out, cell.folder, "results.json")
    results = json.loads(path.read_text())
    if "study" in results:
        return
    steps = {}
    for step in cell.steps:
        files = [Path(out, step.name, name) for name in ("step.json", "config.json")]
        steps[step.name] = {file.stem: json.loads(file.read_text()) for file in files if file.exists()}
    results["study"] = {**{name: getattr(cell, name) for name in KEY}, "steps": steps}
    write(path, json.dumps(results, indent=1))


def read_cells(out, cells):
    """The scores of finished cells, and of each the pre-training's and the fine-tuning's log: (rows, logs)."""
    rows, logs = [], {}
    for cell in cells:
        facts = {name: getattr(cell, name) for name in KEY}
        with open(Path(out, cell.folder, "cases.csv"), newline="") as file:
            rows += [{**facts, "case": row["case"], "organ": row["organ"], "dice": float(row["dice"])}
                     for row in csv.DictReader(file)]
        logs[tuple(facts.values())] = [read_log(Path(out, step.name, "log.csv")) for step in cell.steps[:-1]]
    return rows, logs


def read_log(path):
    """{column: [numbers]} of a log.csv, nan where a row says nothing."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or "nan") for row in rows] for name in rows[0]} if rows else {}


def by(rows, *names):
    """{values of these columns: the rows that have them}, in order of first appearance."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def columns(rows):
    """{organ: mean Dice over seeds of each case}, and "AVG"; without Table 1's derived columns of scoring.columns."""
    mean = [{"case": case, "organ": organ, "dice": float(np.nanmean([row["dice"] for row in some]))}
            for (case, organ), some in by(rows, "case", "organ").items() if any(r["dice"] == r["dice"] for r in some)]
    table = scoring.columns(sorted(mean, key=lambda row: row["case"]), "dice")
    return {name: values for name, values in table.items() if name not in ("AG", "AVG12")}


def averages(rows):
    """{case: its mean Dice over organs, seeds averaged}."""
    return dict(zip(sorted({row["case"] for row in rows}), columns(rows)["AVG"], strict=True))


def difference(ours, theirs):
    """The paired test over the cases that both have, in words."""
    cases = [case for case in ours if case in theirs]
    test = metrics.paired_test(*([scores[case] for case in cases] for scores in (ours, theirs)))
    return f"{test['mean_difference']:+.3f} ({test['low']:+.3f} to {test['high']:+.3f}), p {test['p']:.2g}"


def mean_and_interval(values):
    low, high = metrics.bootstrap_interval(values)
    return float(scoring.finite_mean(values)), low, high


def printed_scores(modality, organs):
    """Table 2's values under the names of these organs; its AVG only where they are all that it averages."""
    paper = PAPER[modality]
    found = {organ: paper[code] for organ in organs if (code := organs.CODES.get(organ, organ)) in paper}
    if not len(found) == len(organs) == len(paper):
        del found["AVG"]
    return found


# ----------------------------------------------------------------------------------------------------------- tables
def table2(out, found):
    """table2.md: organs down, rows of the comparison across, the paper's value in parentheses, AVG last."""
    rows, _ = found
    parts = ["DSC on the original grid, background excluded; in parentheses the paper's Table 2, from 21 volumes (CT) "
             "or 92 (MR).\n"]
    for (labels,), some in by(rows, "labels").items():
        names = [name for name in dict.fromkeys([*TABLE2, *(row["row"] for row in some)]) if (name,) in by(some, "row")]
        tables = {name: columns(by(some, "row")[name,]) for name in names}
        seeds = sorted({row["seed"] for row in some})
        body, paper = [], printed_scores(some[0]["modality"], tables[names[0]])
        for organ in tables[names[0]]:
            cells = [f"{float(scoring.finite_mean(tables[name][organ])):.3f}" for name in names]
            printed = [f" ({paper[organ][TABLE2.index(name)]:.3f})" if organ in paper and name in TABLE2 else ""
                       for name in names]
            body.append([organ, *map("".join, zip(cells, printed))])
        for which, chosen in [("", some)] + [(f", seed {seed}", by(some, "seed")[seed,]) for seed in seeds]:
            scores = {name: averages(more) for (name,), more in by(chosen, "row").items()}
            intervals = {name: mean_and_interval([*more.values()]) for name, more in scores.items()}
            body.append([f"AVG{which}, 95 % interval", *(
                "{:.3f}, {:.3f}-{:.3f}".format(*intervals[name]) if name in scores else "" for name in names)])
            body.append([f"SMIT less this{which}", *(
                difference(scores["smit"], scores[name]) if {"smit", name} <= scores.keys() and name != "smit" else ""
                for name in names)])
        cases = len(tables[names[0]]["AVG"])
        parts.append(f"\n{labels} labelled volumes, n = {cases} cases, seeds {seeds}\n\n"
                     + scoring.markdown(["", *names], body))
    parts.append("\np: Wilcoxon signed rank over cases, two-sided; intervals: bootstrap over cases.\n")
    save(out, "table2", parts, rows)


def fig3a(out, found):
    """DSC against the number of labelled volumes: fig3a.svg with intervals over cases, and the numbers in fig3a.md."""
    rows, _ = found
    series, body = {}, []
    for (name,), some in by(rows, "row").items():
        points = [(labels, *mean_and_interval(columns(more)["AVG"])) for (labels,), more in
                  sorted(by(some, "labels").items())]
        series[name] = list(zip(*points))
        body += [[name, labels, f"{mean:.3f}", f"{low:.3f}-{high:.3f}", len(by(more, "seed"))]
                 for (labels, mean, low, high), (_, more) in zip(points, sorted(by(some, "labels").items()))]
    out.mkdir(parents=True, exist_ok=True)
    figures.curves_svg(out / "fig3a.svg", series, "labelled volumes", "mean DSC", "Fig. 3a: fine-tuning size")
    save(out, "fig3a", [scoring.markdown(["row", "labelled volumes", "DSC", "95 % interval", "seeds"], body)], rows)


def fig3b(out, found):
    """Mask ratio against the MSE of MIP on held-back volumes, and against DSC: two charts and a table."""
    rows, logs = found
    body, points = [], {"MSE": [], "DSC": []}
    for (ratio,), some in sorted(by(rows, "ratio").items()):
        ends = [[value for value in steps[0]["val_mse"] if value == value][-1]
                for key, steps in logs.items() if key[KEY.index("ratio")] == ratio]
        dice, low, high = mean_and_interval(columns(some)["AVG"])
        points["MSE"].append((ratio, float(np.mean(ends))))
        points["DSC"].append((ratio, dice, low, high))
        body.append([f"{ratio:g}", f"{np.mean(ends):.4f}", f"{dice:.3f}", f"{low:.3f}-{high:.3f}", len(ends)])
    out.mkdir(parents=True, exist_ok=True)
    for name, some in points.items():
        figures.curves_svg(out / f"fig3b-{name.lower()}.svg", {"smit": list(zip(*some))}, "mask ratio", name,
                          f"Fig. 3b: mask ratio and {name}")
    save(out, "fig3b", [scoring.markdown(["mask ratio", "MSE", "DSC", "95 % interval", "runs"], body)], rows)


def fig3c(out, found):
    """Dice on held-back volumes, on the prepared grid, against the epoch of fine-tuning: mean over seeds and folds."""
    rows, logs = found
    series, body = {}, []
    for (name, labels), _ in by(rows, "row", "labels").items():
        some = [steps[-1] for key, steps in logs.items() if key[:2] == (name, labels)]
        epochs = [e for e, d in zip(some[0]["epoch"], some[0]["val_dice"]) if d == d]
        dice = np.mean([[d for d in log["val_dice"] if d == d] for log in some], axis=0)
        series[f"{name}, {labels}"] = (epochs, dice)
        body += [[name, labels, f"{epoch:.0f}", f"{value:.3f}"] for epoch, value in zip(epochs, dice)]
    out.mkdir(parents=True, exist_ok=True)
    figures.curves_svg(out / "fig3c.svg", series, "epoch", "mean Dice, held back", "Fig. 3c: convergence")
    save(out, "fig3c", [scoring.markdown(["row", "labelled volumes", "epoch", "Dice"], body)], rows)


def fig4(out, found):
    """DSC by organ type, rows of the comparison down."""
    rows, _ = found
    body = []
    for (name, labels), some in by(rows, "row", "labels").items():
        table = columns(some)
        groups = [float(np.mean([scoring.finite_mean(table[organ]) for organ in organs]))
                  if table.keys() >= set(organs) else math.nan for organs in GROUPS.values()]
        mean, low, high = mean_and_interval(table["AVG"])
        body.append([name, labels, *(f"{value:.3f}" for value in [*groups, mean]), f"{low:.3f}-{high:.3f}"])
    head = ["row", "labelled volumes", *GROUPS, "AVG", "95 % interval"]
    save(out, "fig4", [scoring.markdown(head, body)], rows)


def save(out, name, parts, rows):
    write_csv(out / "cases.csv", rows)
    write(out / f"{name}.md", "".join(parts))


WRITERS = {"table2": table2, "fig3a": fig3a, "fig3b": fig3b, "fig3c": fig3c, "fig4": fig4}


# --------------------------------------------------------------------------------------------------- reconstructions
@torch.no_grad()
def fig5(out, checkpoints, lists, cache):
    """MSE of masked image prediction on volumes that pre-training has not seen, beside what needs no network; panels.

    checkpoints {(row, seed): student.pt}; lists {modality: dataset.json, folder or None}; of a dataset.json the split
    "validation" is read, or where it lacks "training". Both views of each volume, hidden as in training. Beside it: the
    mean of what is visible; the mean of what is hidden, the best that one grey value can do; interpolation.
    """
    rows = []
    for (name, seed), path in checkpoints.items():
        state = runtime.load_checkpoint(path)
        config = state["config"]
        student = pretrain.build_student(config).eval()
        student.load_state_dict(state["model"])
        for modality, listed in lists.items():
            if not listed:
                continue
            samples = sampling.ViewPairs(
                unseen(listed), data.Preparation(tuple(config["spacing"]), modality, tuple(config["hu_window"])), cache,
                config["crop"], config["view"], config["mask_cell"], .7, split="val")                   # [SMIT Fig. 5]
            for number, case in enumerate(samples.cases):
                views, cells = (samples[number][key] for key in ("views", "hidden"))
                views, hidden = views / 255, expand_mask(cells, config["mask_cell"])[:, None]       # (2, 1, D, H, W)
                voxels = student(views, expand_mask(cells, config["mask_cell"] // student.encoder.patch)).voxels.cpu()
                visible, best = (torch.stack([v[h].mean() for v, h in zip(views, where)]).view(2, 1, 1, 1, 1)
                                 for where in (~hidden, hidden))
                rows.append({"row": name, "seed": seed, "modality": modality, "case": organs.case_name(case["image"]),
                             "mse": metrics.mse(voxels, views, hidden),
                             "mse_visible_mean": metrics.mse(visible.expand_as(views), views, hidden),
                             "mse_hidden_mean": metrics.mse(best.expand_as(views), views, hidden),
                             "mse_interpolated": metrics.mse(interpolated(views, hidden), views, hidden)})
                if number == 0 and seed == min(s for _, s in checkpoints):
                    out.mkdir(parents=True, exist_ok=True)
                    figures.reconstruction_panel(out / f"{name}-{modality}.png", views[0, 0], hidden[0, 0],
                                                 voxels[0, 0], config["spacing"], f"{name}, {modality}, not trained on")
    if not rows:
        return
    body = []
    for (name, modality), some in by(rows, "row", "modality").items():
        parts = [mean_and_interval([np.mean([r[score] for r in more]) for more in by(some, "case").values()])
                 for score in ("mse", "mse_visible_mean", "mse_hidden_mean", "mse_interpolated")]
        body.append([name, modality, len(by(some, "case")), len(by(some, "seed")),
                     *(f"{mean:.4f} ({low:.4f}-{high:.4f})" for mean, low, high in parts),
                     PAPER_MSE.get((modality, name), "")])
    head = ["row", "modality", "n", "seeds", "MSE, 95 %", "visible mean", "hidden mean", "interpolated", "paper"]
    save(out, "fig5", [scoring.markdown(head, body)], rows)


def interpolated(views, hidden):
    """Views (B, 1, D, H, W), each hidden voxel the mean of its neighbours: as smooth as what is visible allows.

    A network that stays above this predicts little but smoothness. Laplace's equation by Jacobi's method [ours].
    """
    visible = torch.stack([v[~h].mean() for v, h in zip(views, hidden)])[:, None, None, None, None]
    filled, change = torch.where(hidden, visible, views), 1.
    while change > 1e-4:
        before, padded = filled, F.pad(filled, [1] * 6, mode="replicate")
        around = sum(padded.roll(step, axis) for step in (1, -1) for axis in (2, 3, 4)) / 6
        filled = torch.where(hidden, around[..., 1:-1, 1:-1, 1:-1], views)
        change = (filled - before).abs().max()
    return filled


def unseen(path):
    """Cases of a list: the validation split where it has one."""
    try:
        return data.read_list(path, "validation")
    except ValueError:
        return data.read_list(path)


def probe(out, checkpoints, with_random, listed, modality, cache):
    """Linear probe and nearest neighbours on frozen encoders, beside the same encoder with random weights."""
    students = {("rand", seed): (path, True) for (_, seed), path in checkpoints.items() if with_random}
    students |= {key: (path, False) for key, path in checkpoints.items()}
    rows = probes.table(students, listed, modality, cache)
    if rows:
        body = [[name, f"{np.mean([r['linear_probe'] for r in some]):.3f}",
                 f"{np.mean([r['nearest_neighbour'] for r in some]):.3f}", len(some), some[0]["n"]]
                for (name,), some in by(rows, "row").items()]
        head = ["row", "linear probe, balanced accuracy", "nearest neighbour of the same organ", "seeds", "n"]
        save(out, "probe", [scoring.markdown(head, body)], rows)
