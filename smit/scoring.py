"""From label maps to tables: organs by name, a row per case and organ, means and intervals [SMIT Tables 1 and 2].

Reading order: names, score_case, columns and summary, what is written, compare.
"""
import csv
import io
import json
import math
from pathlib import Path

import numpy as np

from smit import data, metrics, runtime, transforms
from smit.data.organs import CODES, case_name, numbered, organ_ids

ABSENT = ("absent from prediction and label: not scored; in one of them alone: a miss, Dice and surface Dice 0, HD95 "
          "inf; the mean HD95 leaves misses out and stands beside their number; the background is not scored")
FILES = ("cases.csv", "table.md", "index.html", "results.json")
COLUMNS = "case organ dice hd95_mm surface_dice prediction_ml label_ml".split()


def score_case(case, names, tolerance_mm):
    """A row for each organ that the case's label names and the prediction knows, on the label's own grid [ours].

    case: paths "label" and "prediction", and {id: name} of the label as "names"; names: those of the prediction. One
    that lacks is the other's. ValueError for files that are damaged, of two grids, or hold numbers without a name.
    """
    truth, affine = data.read_label(case["label"])
    pred, other = data.read_label(case["prediction"], allow_empty=True)
    spacing = transforms.spacing_of(affine)
    if pred.shape != truth.shape or (np.abs((affine - other)[:3]) @ [*truth.shape, 1]).max() > .1 * spacing.min():
        raise ValueError(f"{case['label']}: {tuple(truth.shape)} or affine is not the prediction's; resample one")
    truth, pred = truth.numpy(), pred.numpy()
    theirs = case["names"] or names or numbered(int(max(truth.max(), pred.max())) + 1)
    names = names or theirs
    for array, known, kind in ((truth, theirs, "label"), (pred, names, "prediction")):
        if unnamed := set(np.unique(array).tolist()) - {0, *known}:
            raise ValueError(f"{case[kind]}: no name for its numbers {sorted(unnamed)}; give the JSON that has them")
    wanted, ids = organ_ids(theirs, case["label"]), organ_ids(names, case["prediction"])
    rows, millilitres = [], float(np.prod(spacing)) / 1000
    for name in (name for name in ids if name in wanted):
        p, t = pred == ids[name], truth == wanted[name]
        distances = metrics.surface_distances(p, t, spacing)
        rows.append({"case": case_name(case["prediction"]), "organ": name, "dice": float(metrics.dice(p, t, 2)[0]),
                     "hd95_mm": metrics.hausdorff_95(*distances),
                     "surface_dice": metrics.share_within(*distances, tolerance_mm),
                     "prediction_ml": p.sum() * millilitres, "label_ml": t.sum() * millilitres})
    if not rows:
        raise ValueError(f"{case['label']}: none of its organs ({', '.join(wanted)}) is predicted ({', '.join(ids)})")
    return rows


def finite_mean(values):
    """Mean over the first axis of what is finite, nan where nothing is."""
    return np.ma.filled(np.ma.masked_invalid(np.asarray(values, dtype=float)).mean(0).astype(float), math.nan)


def columns(rows, score):
    """{column: values over cases, nan where absent}: the paper's columns if its 13 organs are there, else by name."""
    organs, cases = (list(dict.fromkeys(row[name] for row in rows)) for name in ("organ", "case"))
    found = {(row["case"], row["organ"]): row[score] for row in rows}
    table = {name: np.array([found.get((case, name), math.nan) for case in cases]) for name in organs}
    average = finite_mean([*table.values()])
    if set(organs) != set(CODES):
        return {**table, "AVG": average}
    table = {code: table[name] for name, code in CODES.items()}
    glands = finite_mean([table["RA"], table["LA"]])                  # Table 1 has AG, Table 2 RA and LA
    return {**table, "AG": glands, "AVG": average, "AVG12": finite_mean([*[*table.values()][:11], glands])}


def summary(rows, score):
    """{column: mean, 95 % bootstrap interval over cases, n, misses}; AG and AVG are the means of their columns."""
    result = {}
    for name, values in columns(rows, score).items():
        finite = values[np.isfinite(values)]
        low, high = metrics.bootstrap_interval(finite)
        result[name] = {"mean": float(finite_mean(values)), "low": low, "high": high, "n": len(finite),
                        "misses": int(np.isinf(values).sum())}
    organs = [name for name in result if name not in ("AG", "AVG", "AVG12")]
    parts = {"AG": ["RA", "LA"], "AVG": organs, "AVG12": [*organs[:11], "AG"]}
    for name in (name for name in parts if name in result):
        result[name].update(mean=float(finite_mean([result[part]["mean"] for part in parts[name]])),
                            misses=sum(result[part]["misses"] for part in parts[name]))
    return result


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in lines)


def table_text(scores, tolerance_mm):
    """table.md: per score its mean, interval and misses, one column per organ."""
    rows = []
    titles = {"dice": "DSC", "hd95_mm": "HD95, mm", "surface_dice": f"surface Dice, {tolerance_mm:g} mm"}
    for score, title in titles.items():
        cells, digits = scores[score].values(), 1 if score == "hd95_mm" else 3
        rows.append([title, *(f"{cell['mean']:.{digits}f}" for cell in cells)])
        rows.append(["95 % interval", *(f"{cell['low']:.{digits}f}-{cell['high']:.{digits}f}" for cell in cells)])
    rows.append(["misses", *(cell["misses"] for cell in scores["hd95_mm"].values())])
    return markdown(["", *scores["dice"]], rows)


def clear(out):
    """Remove the results of an earlier run: they belong to its predictions."""
    for name in FILES:
        (out / name).unlink(missing_ok=True)


def write_results(out, rows, names, failed, facts, tolerance_mm):
    """cases.csv, table.md and, last, results.json."""
    clear(out)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{cell:.6g}" if isinstance(cell, float) else cell for name, cell in row.items()})
    runtime.atomic_write(out / "cases.csv", lines.getvalue().encode())
    scores = {score: summary(rows, score) for score in ("dice", "hd95_mm", "surface_dice")} if rows else {}
    text = table_text(scores, tolerance_mm) if rows else "no case was scored\n"
    runtime.atomic_write(out / "table.md", text.encode())
    scored = list(dict.fromkeys(row["case"] for row in rows))
    results = json.dumps({**facts, "n": len(scored), "cases": scored, "failed": failed, "labels": names,
                          "absent_organs": ABSENT, "tolerance_mm": tolerance_mm, "scores": scores})
    plain = json.loads(results, parse_constant=lambda name: None)     # NaN and infinity are no JSON: null
    runtime.atomic_write(out / "results.json", json.dumps(plain, indent=1).encode())
    return text


def read_dice(folder):
    """{(case, organ): Dice} of a folder's cases.csv."""
    try:
        with open(Path(folder, "cases.csv"), newline="") as file:
            return {(row["case"], row["organ"]): float(row["dice"]) for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{folder}: no cases.csv to read ({error}); give a folder that evaluate.py wrote") from None


def compare(folders, out):
    """Paired tests of two result folders' Dice, per organ and of the cases' mean; writes OUT/compare.md, returns it."""
    found = [read_dice(folder) for folder in folders]
    both = [pair for pair in found[0] if pair in found[1]]
    if not both:
        raise ValueError(f"{' and '.join(folders)} have no case and organ in common")
    sides = [columns([{"case": case, "organ": organ, "dice": scores[case, organ]} for case, organ in both], "dice")
             for scores in found]
    rows = []
    for name in sides[0]:
        test = metrics.paired_test(sides[0][name], sides[1][name])
        rows.append([name, test["n"], *(f"{float(finite_mean(side[name])):.3f}" for side in sides),
                     f"{test['mean_difference']:+.3f}", f"{test['low']:+.3f} to {test['high']:+.3f}",
                     f"{test['p']:.3g}"])
    text = markdown(["", "n", *folders, "difference", "95 % interval (paired bootstrap)", "p (Wilcoxon)"], rows)
    out.mkdir(parents=True, exist_ok=True)
    runtime.atomic_write(out / "compare.md", text.encode())
    alone = len(found[0]) + len(found[1]) - 2 * len(both)
    return text + (f"\n{alone} rows of cases.csv are in one folder alone and were left out\n" if alone else "")
