"""From label maps to tables: rows per case and organ, means, intervals [SMIT Tables 1 and 2].

Organs are matched by name. Reading order: finding what to score, score_case, columns and summary,
files that are written, compare.
"""
import csv
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from smit import data, metrics, runtime, transforms
from smit.data import cases as case_files
from smit.data import concerns, pairing
from smit.data.organs import (
    CODES, ORGANS, case_key, case_name, case_names, composed, is_abdomen, numbered, organ,
    organ_ids, stem)

ABSENT = ("absent from prediction and label: not scored; in one of them alone: a miss, Dice and "
          "surface Dice 0, HD95 inf; the mean HD95 leaves misses out and stands beside their "
          "number; the background is not scored")
FILES = ("cases.csv", "table.md", "results.json")      # beside the page, which is `page_of`
COLUMNS = "case organ dice hd95_mm surface_dice prediction_ml label_ml".split()
SCORES = {"dice": ("DSC", 3), "hd95_mm": ("HD95, mm", 1), "surface_dice": ("surface Dice", 3)}
MEANS = ("AG", "AVG", "AVG12")         # columns that are means of others
NO_INTERVAL = (math.nan, math.nan)     # of a single case
SKEW_DEGREES = .05                     # beyond it distances are measured on the skewed grid
NAMELESS = ("no names for its numbers, while the other side's have names; give the JSON that has "
            "them with --names")
PAIRS = 2 ** 24                        # of surface voxels whose distances are held at a time


# ----------------------------------------------------------------------------- what is to be scored
def find_predictions(predictions, labels, key, names_path=None, data_root=None):
    """Pair another system's files with labels: (cases, names of its numbers, what failed, facts).

    predictions: a folder; labels: a folder of label files, or a list whose `key` has labels, its
    relative paths beginning at data_root; names_path: a JSON that names the numbers of a side that
    has no names. A case has a "prediction", too, and the name that `labelled_cases` gives it. Tells
    of predictions without a label. ValueError as `check_names` and `pair`.
    """
    labelled = labelled_cases(labels, key, data_root)
    if not labelled:
        raise ValueError(f"{labels}: has no label; name a folder of them, or a list that has some "
                         f"under {key!r} (--key)")
    volumes = data.find_volumes(predictions)
    if not volumes:
        raise ValueError(f"{predictions}: holds no NIfTI file to score")
    for place, paths in ((labels, [case["label"] for case in labelled]), (predictions, volumes)):
        refuse_organ_masks(place, paths)
    files = pairing.Side(volumes, predictions)
    sides = pairing.label_sides(labelled, labels)
    pairs = pairing.pair(labelled, sides, files, predictions)

    paired = {file.path for file in pairs.values()}
    unpaired = [file for file in files.files if file.path not in paired]
    if unpaired:
        extra = [os.path.relpath(file.path, predictions) for file in unpaired]
        concerns.note(f"{predictions}: {data.count(len(extra), 'file')} not scored, for want of a "
                      f"label in {labels}: {concerns.enumerate_names(extra)}")

    given = given_names(names_path) if names_path else None
    # predictions are often kept below the data set, and rarely numbered as it is
    label_files = [case["label"] for case in labelled]
    label_names = own_or_given(folder_names(labels, label_files, or_parent=True), given, labels)
    prediction_names = own_or_given(folder_names(predictions, paired), given, predictions)
    check_names(label_names, prediction_names, labels, predictions)
    cases, failed = [], {}
    for case in labelled:
        name, label = case["name"], case["label"]
        if name in pairs:
            path = pairs[name].path
            cases.append({"name": name, "image": path, "prediction": path, "label": label,
                          "names": label_names})
        else:
            failed[name] = (f"{label}: has no prediction in {predictions}"
                            f"{pairing.namesake_text(case, unpaired, predictions)}")
    facts = {"predictions": predictions, "labels_of": labels, "split": key}
    return cases, prediction_names, failed, facts


def refuse_organ_masks(place, paths):
    """Raise ValueError if files are named after organs: masks of one organ each, as some write."""
    # of three letters a name may be a patient's initials
    named = [path for path in paths if len(stem(path)) > 3 and organ(stem(path)) in CODES]
    if len(named) > 1:
        names = concerns.enumerate_names([Path(path).name for path in named])
        raise ValueError(f"{place}: {names} are named after organs: a mask of one organ each; "
                         "merge those of a case into one label map")


def labelled_cases(labels, key, data_root=None):
    """Return the cases of a list or a folder that have a "label", each with its "name".

    A folder with files below a JSON is a list. A list's cases have an "image", too, and are named
    as it is; those of a folder are named as their labels.
    """
    if os.path.isdir(labels):
        files = data.find_volumes(labels)
        is_list = Path(labels, "dataset.json").is_file()
        if not is_list or any(Path(file).parent == Path(os.path.abspath(labels)) for file in files):
            return [{"name": name, "image": None, "label": file}
                    for file, name in zip(files, case_names(files))]
    cases = data.read_list(labels, key, data_root)
    for case, name in zip(cases, case_names([case["image"] for case in cases])):
        case["name"] = name
    return [case for case in cases if case["label"]]


def folder_names(path, files, or_parent=False):
    """Return {id: name} for label files, or None: of a JSON, of that in a folder, or above it.

    ValueError if an evaluation's results.json is there and `files` are not all its predictions.
    """
    folder = Path(path)
    places = [folder, folder / "results.json", folder / "dataset.json"]
    if or_parent:
        places.append(folder.parent / "dataset.json")
    for place in places:
        is_json = place.is_file() and place.suffix == ".json"
        if is_json and (place.name != "results.json" or names_numbers_of(place, files)):
            return data.label_names(place, ignore=True)
    return None


def names_numbers_of(results, files):
    """Return whether a results.json is of the files beside it, and not of another folder's.

    ValueError if it is, but some of `files` came from elsewhere.
    """
    folder = results.parent
    facts = data.read_json(results)
    if "predictions" in facts:
        scored = Path(facts["predictions"])
        return scored.exists() and scored.samefile(folder)
    predicted = {composed(name) for name in facts.get("predicted", ())}
    strangers = {composed(Path(file).name) for file in files} - predicted
    if "predicted" in facts and strangers:
        names = concerns.enumerate_names(sorted(strangers))
        raise ValueError(f"{folder}: {data.count(len(strangers), 'file')} ({names}) are not of "
                         "the evaluation whose results.json is there, which does not name their "
                         "numbers; move them to a folder of their own")
    return True


def own_or_given(own, given, place):
    """Return the names of a place's numbers: its own, else those that --names gives, or None.

    Tells where both are there and differ.
    """
    if not own:
        return given
    if given and organ_ids(own, place) != organ_ids(given, "--names"):
        concerns.note(f"{place}: has names of its own, which count; those of --names are others")
    return own


def given_names(path):
    """Return {id: name} of the JSON that --names gives; ValueError if it names no organ."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: there is no such file; give --names a dataset.json")
    names = data.label_names(path, ignore=True)
    if not set(names or ()) - {0}:
        raise ValueError(f"{path}: names no organ; give --names a dataset.json with 'labels'")
    return names


def check_names(label_names, names, labels, predictions):
    """Raise ValueError unless numbers can be matched by their names, or neither side has any.

    One side's names never name the other's numbers: a perfect prediction could score as a bad one.
    labels, predictions: the places whose names they are, for the message.
    """
    if not label_names and not names:
        return
    for known, place in ((label_names, labels), (names, predictions)):
        if not known:
            raise ValueError(f"{place}: {NAMELESS}")
    if not organ_ids(label_names, labels).keys() - {"ignore"}:
        raise ValueError(f"{labels}: its names have no organ; give the JSON that names its "
                         "numbers")
    organ_ids(names, predictions)                        # refuses two numbers of one organ


def unmatched(cases, names):
    """Return the organs without a partner, of labels and of predictions: a dict of two lists."""
    label_organs = {}
    for case in cases:
        label_organs |= organ_ids(case["names"] or {}, case["label"])
    label_organs.pop("ignore", None)
    predicted = organ_ids(names or {}, "predictions")
    if not predicted or not label_organs:
        return {"in_labels_only": [], "in_predictions_only": []}

    # a network has classes without a name between named ones
    known = {*label_organs, *numbered(256).values()}
    return {"in_labels_only": [name for name in label_organs if name not in predicted],
            "in_predictions_only": [name for name in predicted if name not in known]}


def unmatched_text(organs):
    """Return `unmatched` in lines for the console, "" if every organ has its partner."""
    lines = []
    if organs["in_labels_only"]:
        lines.append(f"not named by the predictions, so missed wherever a label has it: "
                     f"{', '.join(organs['in_labels_only'])}\n")
    if organs["in_predictions_only"]:
        lines.append("not named by the labels, so not scored: "
                     f"{', '.join(organs['in_predictions_only'])}\n")
    return "".join(lines)


# ---------------------------------------------------------------------------------------- one case
def score_case(case, names, tolerance_mm):
    """Score a case: a row for each organ that its label names, on the label's own grid [ours].

    case: paths "label" and "prediction", and {id: name} of the label as "names"; names: those of
    the prediction. An organ that the prediction's names lack is missed. Voxels of a label named
    "ignore" count on neither side. ValueError for files that are damaged or of two grids, and for
    numbers without a name.
    """
    truth, affine = data.read_label(case["label"])
    pred = on_grid_of_label(case, truth.shape, affine)
    truth, pred = truth.numpy(), pred.numpy()
    label_names = case["names"]
    check_names(label_names, names, case["label"], case["prediction"])
    if not label_names:
        # one organ at least, so that a case that is rightly all background has its row
        highest = max(1, int(truth.max()), int(pred.max()))
        label_names = names = numbered(highest + 1)
    require_names(truth, label_names, case["label"])
    require_names(pred, names, case["prediction"])

    label_ids, ids = organ_ids(label_names, case["label"]), organ_ids(names, case["prediction"])
    if "ignore" in label_ids:
        counted = truth != label_ids.pop("ignore")
        truth, pred = truth * counted, pred * counted

    rows, millilitres = [], abs(np.linalg.det(affine[:3, :3])) / 1000
    for name, number in sorted(label_ids.items(), key=order_of_rows(ids)):
        p = pred == ids[name] if name in ids else np.zeros_like(pred, dtype=bool)
        t = truth == number
        distances = surface_distances(p, t, affine)
        rows.append({"case": case_title(case), "organ": name,
                     "dice": float(metrics.dice(p, t, 2)[0]),
                     "hd95_mm": metrics.hausdorff_95(*distances),
                     "surface_dice": metrics.share_within(*distances, tolerance_mm),
                     "prediction_ml": float(p.sum() * millilitres),
                     "label_ml": float(t.sum() * millilitres)})
    return rows


def case_concerns(case, rows):
    """Return what is odd about the files of a case that was scored; rows: of `score_case`."""
    found = case_files.header_concerns(case["label"])
    found += case_files.header_concerns(case["prediction"])
    # a label is empty if no organ has a volume
    return found + case_files.empty_concerns(case["label"],
                                             np.array([row["label_ml"] for row in rows]))


def case_title(case):
    """Return a case's name, or that of its prediction's file."""
    return case.get("name") or case_name(case["prediction"])


def order_of_rows(ids):
    """Return a sort key of (organ, number): by the prediction's numbers, what it lacks last."""
    def key(item):
        return ids.get(item[0], 256), item[1]
    return key


def on_grid_of_label(case, shape, affine):
    """Read a case's prediction and turn its axes as the label's; ValueError if grids differ."""
    pred, pred_affine = data.read_label(case["prediction"])
    turned = case_files.onto_grid(pred, pred_affine, shape, affine)
    if turned is None:
        raise ValueError(f"{case['label']}: affine or shape is not the prediction's: "
                         f"{case_files.describe_grid(tuple(shape), affine)}, the prediction "
                         f"{case_files.describe_grid(tuple(pred.shape), pred_affine)}; "
                         "resample one")
    return turned


def check_numbers(case):
    """Raise ValueError if a case's label is damaged, or holds numbers that have no name."""
    label, _ = data.read_label(case["label"])
    require_names(label.numpy(), case["names"], case["label"])


def require_names(array, names, path):
    """Raise ValueError if a label map holds numbers that have no name."""
    unnamed = case_files.unnamed_numbers(np.unique(array).tolist(), names)
    if unnamed:
        raise ValueError(f"{path}: no name for its numbers {unnamed}; give the JSON that has them")


def surface_distances(pred, label, affine):
    """Return metrics.surface_distances of two masks on a grid that may be skewed (gantry tilt)."""
    if data.skew_degrees(affine) <= SKEW_DEGREES:
        return metrics.surface_distances(pred, label, transforms.spacing_of(affine))
    axes = torch.from_numpy(affine[:3, :3])
    points = []
    for mask in (pred, label):
        surface = metrics.surface(torch.from_numpy(np.ascontiguousarray(mask)))
        points.append(surface.nonzero().double() @ axes.T)           # (N, 3) in mm
    return nearest_points(*points), nearest_points(*points[::-1])


def nearest_points(query, target):
    """Return the distance of each of `query` (N, 3) to the nearest of `target` (M, 3): (N,)."""
    if not len(target):
        return torch.full((len(query),), math.inf)
    distances = []
    for part in query.split(max(1, PAIRS // len(target))):
        apart = torch.cdist(part, target, compute_mode="donot_use_mm_for_euclid_dist")      # exact
        distances.append(apart.amin(1).float())
    return torch.cat(distances) if distances else torch.empty(0)


# ------------------------------------------------------------------------------ columns and summary
def finite_mean(values):
    """Return the mean of the finite values along axis 0; nan if there are none."""
    values = np.asarray(values, dtype=float)
    return np.ma.filled(np.ma.masked_invalid(values).mean(0).astype(float), math.nan)


def columns(rows, score):
    """Return {column: values over cases, nan where absent}.

    The columns are the paper's if its 13 organs are there, else the organs' names.
    """
    organs = list(dict.fromkeys(row["organ"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    values = {(row["case"], row["organ"]): row[score] for row in rows}
    table = {}
    for name in organs:
        table[name] = np.array([values.get((case, name), math.nan) for case in cases])
    average = finite_mean(list(table.values()))
    if set(organs) != set(ORGANS):
        return {**table, "AVG": average}
    table = {code: table[name] for name, code in CODES.items()}
    glands = finite_mean([table["RA"], table["LA"]])     # Table 1 has AG, Table 2 RA and LA
    others = [values for code, values in table.items() if code not in ("RA", "LA")]
    return {**table, "AG": glands, "AVG": average, "AVG12": finite_mean([*others, glands])}


def parts_of_means(organs):
    """Return the columns of which each of MEANS is the mean."""
    others = [name for name in organs if name not in ("RA", "LA")]
    return {"AG": ["RA", "LA"], "AVG": organs, "AVG12": [*others, "AG"]}


def summary(rows, score):
    """Return {column: mean, 95 % bootstrap interval over cases, n, misses}.

    AG and AVG are the means of their columns, in every draw of the bootstrap as well. AVG tells
    over how many organs, and how many there should be: one that is nowhere to be scored has no
    mean. A miss is an organ that label or prediction alone has, whatever the score.
    """
    table, missed = columns(rows, score), columns(rows, "hd95_mm")
    organs = [name for name in table if name not in MEANS]
    drawn = metrics.bootstrap_means(np.stack([table[name] for name in organs], axis=1))
    drawn = dict(zip(organs, drawn.T))                               # {organ: mean in each draw}

    result = {}
    for name in organs:
        finite = table[name][np.isfinite(table[name])]
        low, high = metrics.bootstrap_interval(finite) if len(finite) > 1 else NO_INTERVAL
        result[name] = {"mean": float(finite_mean(table[name])), "low": low, "high": high,
                        "n": len(finite), "misses": int(np.isinf(missed[name]).sum())}

    parts = parts_of_means(organs)
    for name in (name for name in parts if name in table):
        means = [result[part]["mean"] for part in parts[name]]
        drawn[name] = finite_mean([drawn[part] for part in parts[name]])
        cases = int(np.isfinite(table[name]).sum())
        low, high = NO_INTERVAL
        if cases > 1:
            low, high = np.nanquantile(drawn[name], [.025, .975]).tolist()
        result[name] = {"mean": float(finite_mean(means)), "low": low, "high": high, "n": cases,
                        "misses": sum(result[part]["misses"] for part in parts[name]),
                        "organs": int(np.isfinite(means).sum()), "of": len(means)}
    return result


# -------------------------------------------------------------------------- files that are written
def markdown(header, rows):
    """Return a table in Markdown."""
    lines = []
    for cells in [header, ["---"] * len(header), *rows]:
        cells = [str(cell).replace("|", r"\|") for cell in cells]     # an organ's name may have one
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def table_text(scores, tolerance_mm):
    """Return table.md: for each score its mean, interval and misses, one column per organ.

    A mean over fewer organs than the labels name is marked, as in ".812 (10 of 13)". A legend
    follows.
    """
    rows = []
    for score, (title, digits) in SCORES.items():
        cells = scores[score].values()
        suffix = f", {tolerance_mm:g} mm" if score == "surface_dice" else ""
        rows.append([title + suffix, *(mean_text(cell, digits) for cell in cells)])
        rows.append(["95 % interval", *(interval_text(cell, digits) for cell in cells)])
    rows.append(["misses", *(cell["misses"] for cell in scores["hd95_mm"].values())])
    legend = ("AVG: mean over organs. Misses: cases in which label or prediction alone has the "
              "organ.")
    if "AG" in scores["dice"]:
        legend += " AG: mean of both adrenal glands. AVG12: mean over organs, these as one."
    return markdown(["", *scores["dice"]], rows) + f"\n{legend}\n"


def mean_text(cell, digits):
    if not math.isfinite(cell["mean"]):
        return "-"
    text = f"{cell['mean']:.{digits}f}"
    if cell.get("organs", 0) < cell.get("of", 0):
        text += f" ({cell['organs']} of {cell['of']})"
    return text


def interval_text(cell, digits):
    if not math.isfinite(cell["low"]):
        return "-"
    return f"{cell['low']:.{digits}f}-{cell['high']:.{digits}f}"


def page_of(out):
    """Return the path of an evaluation's page: OUT/index.html, unless that is a training run's."""
    is_run = (out / "config.json").exists()
    return out / ("evaluation.html" if is_run else "index.html")


def result_files(out):
    """Return the paths of all that `write_results` writes, and of the page."""
    return [*(out / name for name in FILES), page_of(out)]


def clear(out):
    """Remove the results of an earlier evaluation: they belong to its predictions."""
    for path in result_files(out):
        path.unlink(missing_ok=True)


def write_results(out, rows, names, failed, facts, tolerance_mm):
    """Write cases.csv, table.md and, last, results.json; return the table."""
    clear(out)
    # names of files and organs may hold what is no UTF-8
    runtime.atomic_write(out / "cases.csv", csv_text(rows).encode("utf-8", "backslashreplace"))
    scores = {score: summary(rows, score) for score in SCORES} if rows else {}
    text = table_text(scores, tolerance_mm) if rows else "no case was scored\n"
    runtime.atomic_write(out / "table.md", text.encode("utf-8", "backslashreplace"))

    scored = list(dict.fromkeys(row["case"] for row in rows))
    results = json.dumps({
        **facts, "n": len(scored), "cases": scored, "failed": failed, "labels": names,
        "absent_organs": ABSENT, "tolerance_mm": tolerance_mm, "scores": scores})
    # NaN and infinity are no JSON: null
    plain = json.loads(results, parse_constant=lambda name: None)
    runtime.atomic_write(out / "results.json", json.dumps(plain, indent=1).encode())
    return text


def csv_text(rows):
    """Return the rows as text; numbers have six digits."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = dict(row)
        for name in cells:
            if isinstance(cells[name], float):
                cells[name] = f"{cells[name]:.6g}"
        writer.writerow(cells)
    return lines.getvalue()


# ------------------------------------------------------------------------------------------ compare
LABELS_ALIKE = .01                     # volumes of one label differ by rounding alone [ours]
COMPARE_NOTE = """Means are over the n cases in which both have a Dice. AVG is the mean of a case's
organs, those that both have a Dice of, so that it can be paired; in table.md it is the mean of the
organs' means. In the last column a mean has the sum of its organs.
"""


def read_scores(folder):
    """Return {(key of the case, organ): (Dice, mL of the label)} of a folder's cases.csv.

    ValueError if it cannot be read.
    """
    scores = {}
    try:
        with open(Path(folder, "cases.csv"), newline="") as file:
            rows = list(csv.DictReader(file))
            codes_count = is_abdomen(row["organ"] for row in rows)
            for row in rows:
                place = case_key(row["case"]), organ(row["organ"], codes_count)
                if place in scores:
                    raise ValueError(f"case {place[0]}, {place[1]} is there twice")
                scores[place] = float(row["dice"]), float(row["label_ml"])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{folder}: no cases.csv to read ({error}); give a folder that "
                         "evaluate.py wrote") from None
    return scores


def compare(folders, out):
    """Test the Dice of two result folders case by case, per organ; write and return compare.md.

    A case without the organ has a Dice only on a side that invented it. It is not paired then, but
    counted as a false alarm of that side.
    """
    first, second = (read_scores(folder) for folder in folders)
    common = [place for place in first if place in second]
    if not common:
        raise ValueError(f"{' and '.join(folders)} have no case and organ in common")
    sides, alarms = [], []
    for scores, others in ((first, second), (second, first)):
        rows = []
        for place in common:
            (dice, _), (other, _) = scores[place], others[place]
            is_alone = math.isfinite(dice) and not math.isfinite(other)
            rows.append({"case": place[0], "organ": place[1], "alarm": float(is_alone),
                         "dice": math.nan if is_alone else dice})
        sides.append(columns(rows, "dice"))
        alarms.append(counts_with_sums(columns(rows, "alarm")))
    unlike = [place for place in common
              if not math.isclose(first[place][1], second[place][1], rel_tol=LABELS_ALIKE)]

    rows = [compared_row(name, *(side[name] for side in (*sides, *alarms))) for name in sides[0]]
    header = ["", "n", *folders, "difference", "95 % interval (paired bootstrap)", "p (Wilcoxon)",
              "cases in which one alone predicts what the label lacks"]
    text = markdown(header, rows) + "\n" + COMPARE_NOTE
    if unlike:
        case, name = unlike[0]
        text += (f"\n**The labels are not the same ones**, or on other grids: in {len(unlike)} of "
                 f"{len(common)} rows their volumes differ, as of {name} in {case}\n")
    for folder, scores in zip(folders, (first, second)):
        if len(scores) > len(common):
            text += (f"\n{data.count(len(scores) - len(common), 'row')} of cases.csv "
                     f"left out: in {folder} alone\n")
    out.mkdir(parents=True, exist_ok=True)
    runtime.atomic_write(out / "compare.md", text.encode("utf-8", "backslashreplace"))
    return text


def counts_with_sums(table):
    """Return {column: sum over cases} of `columns`; a mean's is the sum of its organs'."""
    counts = {name: int(np.nansum(values)) for name, values in table.items() if name not in MEANS}
    parts = parts_of_means([*counts])
    for name in (name for name in MEANS if name in table):
        counts[name] = sum(counts[part] for part in parts[name])
    return counts


def compared_row(name, values, others, alarms, alarms_of_others):
    """Return a column's cells in compare.md: n, means, difference, its interval, p, false alarms.

    Means are of these n cases. alarms: in how many cases each side alone has a Dice.
    """
    test = metrics.paired_test(values, others)
    alarms = f"{alarms}, {alarms_of_others}"
    if not test["n"]:
        return [name, 0, "-", "-", "-", "-", "-", alarms]
    paired = np.isfinite(values) & np.isfinite(others)
    means = [f"{side[paired].mean():.3f}" for side in (values, others)]
    interval = "-"
    if test["n"] > 1:
        interval = f"{test['low']:+.3f} to {test['high']:+.3f}"
    return [name, test["n"], *means, f"{test['mean_difference']:+.3f}", interval,
            f"{test['p']:.3g}", alarms]
