"""Draw a run: what the three scripts call, on rank 0, to write pictures and the page [ours].

Pictures of volumes are made in panels.py, curves in charts.py, and page.py puts them together.
"""
import math

import numpy as np
import torch

from smit import data, scoring, transforms
from smit.data.organs import CODES, organ, organ_ids
from smit.figures import page, panels
from smit.figures.canvas import escaped
from smit.figures.charts import from_log
from smit.figures.page import number_text
from smit.masking import expand_mask
from smit.metrics import to_numpy


# ---------------------------------------------------------------------------------------- training
def run_page(out, config, title, expected=()):
    """Write OUT/index.html with charts of OUT/log.csv and the pictures that OUT has [ours].

    It may be called before the first step: a number of `expected`, columns of the log, that is not
    known yet is shown as a dash.
    """
    numbers = from_log(out / "log.csv", out, config.get("prototypes"))
    if numbers.get("best_dice", 0) < 0:                  # so an older run says: no validation yet
        del numbers["best_dice"]

    facts = {}
    for column in [*page.MEANINGS, *numbers]:
        if column in numbers or column in expected:
            value = numbers.get(column)
            is_known = value is None or math.isfinite(value)
            facts[page.MEANINGS.get(column, column)] = value if is_known else "not finite"
    if config.get("total") and "step" in numbers:
        facts["Steps done"] = f"{numbers['step']:.0f} of {config['total']}"

    page.write_page(out / "index.html", title, {
        "Last numbers": page.facts_html(facts) if facts else "<p>No step has been logged yet.</p>",
        "Pictures": page.panels_html(out, page.PANELS),
        "Curves": page.charts_html(out)}, config)


@torch.no_grad()
def pretraining_report(out, config, student=None, sample=None, step=0):
    """Write OUT/index.html with charts of OUT/log.csv and panels of a sample of ViewPairs [ours].

    Without a sample the panels of an earlier call stay. step: how many steps the student has taken.
    It is left in train mode.
    """
    if sample is not None:
        draw_student(out, config, student, sample, step)
    expected = ["step", "loss"]
    if config.get("mip") and config.get("val_fraction"):
        expected.append("val_mip")
    run_page(out, config, f"Pre-training, {config['method']}", expected)


def draw_student(out, config, student, sample, step):
    """Draw OUT/reconstruction.svg, if there is a voxel head, and OUT/tokens.svg, of view u."""
    spacing_mm = config["spacing"]
    cell = config["mask_cell"]
    cells = sample["hidden"][:1]                                        # (1, d, h, w)
    device = next(student.parameters()).device
    view = sample["views"][:1].to(device) / 255                         # (1, 1, D, H, W)

    student.eval()
    if student.voxel_head:
        voxels = student.reconstruct(view, cells.to(device), cell)
        panels.reconstruction_panel(
            out / "reconstruction.svg", view[0, 0], expand_mask(cells, cell)[0], voxels[0, 0],
            spacing_mm, f"Masked image prediction on a view, step {step}")

    # 12^3 and 6^3 tokens of a view of 96^3
    top = len(student.encoder.stages)
    levels = [max(0, top - 2), top - 1]
    tokens = student.encoder(view, wanted=levels)
    panels.token_panel(out / "tokens.svg", view[0, 0], [tokens[level][0] for level in levels],
                       spacing_mm, title=f"Tokens of a whole view, step {step}")
    student.train()


def finetuning_report(out, config, image=None, label=None, pred=None, case=None, step=0):
    """Write OUT/index.html with charts of OUT/log.csv and the overlay of one case [ours].

    image: prepared, (D, H, W) in 0..255; label, pred: label maps (D, H, W). pred may be None, and
    so may all three, which leaves an earlier call's overlay. case: its name; it is a held-back
    case if the run has any. step: how many the network has taken.
    """
    if image is not None:
        kind = "held back" if config.get("held_back") else "trained on"
        title = f"{case or 'One case'}, {kind}, step {step}"
        panels.overlay_panel(out / "overlay.svg", to_numpy(image) / 255, label, pred,
                             config["spacing"], config["labels"], title=title)

    expected = ["step", "loss"]
    if config.get("held_back"):
        expected += ["val_dice", "best_dice"]
    run_page(out, config, "Fine-tuning", expected)


# -------------------------------------------------------------------------------------- evaluation
def evaluation_report(out, cases, rows, names, facts):
    """Write a page with scores and the cases of worst, median and best mean Dice [ours].

    It is OUT/index.html, or beside a run's page OUT/evaluation.html. All arguments are as
    evaluate.py has them.
    """
    mean_dice = mean_dice_of_cases(rows)
    ranked = sorted(mean_dice, key=mean_dice.get)
    by_name = {scoring.case_title(case): case for case in cases}

    # few cases: each is drawn once, and what an earlier evaluation drew beyond them goes
    places = {}
    if ranked:
        places = {ranked[0]: "worst", ranked[len(ranked) // 2]: "median", ranked[-1]: "best"}
    for rank in ("worst", "median", "best"):
        (out / f"{rank}.svg").unlink(missing_ok=True)
    for name, rank in places.items():
        title = f"{name}, {rank} of {len(ranked)}, mean Dice {mean_dice[name]:.3f}"
        case_panel(out / f"{rank}.svg", by_name[name], names, facts, title)

    page.write_page(scoring.page_of(out), "Evaluation", {
        "Scores": scores_html(rows) if rows else "<p>No case was scored.</p>",
        "Cases": cases_html(rows, ranked, mean_dice) if ranked else "",
        "Pictures": page.panels_html(out, page.CASE_PANELS)}, facts)


def mean_dice_of_cases(rows):
    """Return {case: mean Dice over its organs} of the cases that have any."""
    scores = {}
    for row in rows:
        scores.setdefault(row["case"], []).append(row["dice"])
    return {case: float(np.nanmean(values)) for case, values in scores.items()
            if np.isfinite(values).any()}


MEAN_ROWS = {  # of scoring.summary: column, name
    "AG": "mean of both adrenal glands",
    "AVG": "mean of all organs",
    "AVG12": "mean of 12, adrenal glands as one"}


def scores_html(rows):
    """Return the table of scores: a row an organ, each mean with its 95 % interval."""
    organs_of_codes = {code: name for name, code in CODES.items()}
    dice = scoring.summary(rows, "dice")
    distances = scoring.summary(rows, "hd95_mm")
    surface = scoring.summary(rows, "surface_dice")

    organ_rows = []
    mean_rows = []
    for column, score in dice.items():
        name = MEAN_ROWS.get(column) or organs_of_codes.get(column, column)
        code = f" <small>{escaped(column)}</small>" if column != name else ""
        cells = [f"{escaped(name)}{code}", score["n"], *mean_and_interval(score, 3),
                 *mean_and_interval(distances[column], 1), *mean_and_interval(surface[column], 3),
                 distances[column]["misses"]]
        if column in MEAN_ROWS:
            mean_rows.append(cells)
        else:
            organ_rows.append(cells)

    interval = "95 % interval"
    header = ("organ", "cases", "Dice", interval, "HD95, mm", interval, "surface Dice", interval,
              "misses")
    table = page.table_html(header, organ_rows + mean_rows, len(mean_rows))
    notes = ["Intervals are bootstrapped over cases. A miss is an organ in the label or in the "
             "prediction alone: its Dice and surface Dice are 0, and HD95 leaves it out. An organ "
             "in neither is not scored."]
    scored, wanted = dice["AVG"]["organs"], dice["AVG"]["of"]
    if scored < wanted:
        notes.append(f"The mean of all organs is of {scored} of {wanted}: no case has the "
                     "rest.")
    return table + page.paragraph_html(notes)


def mean_and_interval(score, digits):
    """Return a mean and its interval in words, a dash for each that is not known."""
    mean, low, high = (number_text(score[name], digits) for name in ("mean", "low", "high"))
    return mean, low if low == "–" else f"{low} to {high}"


def cases_html(rows, ranked, mean_dice):
    """Return a table of cases, the worst first: mean Dice, the organ of the lowest, misses."""
    lines = []
    for case in ranked:
        scored = [row for row in rows if row["case"] == case and np.isfinite(row["dice"])]
        lowest = min(scored, key=lambda row: row["dice"])
        misses = sum(math.isinf(row["hd95_mm"]) for row in scored)
        lines.append([escaped(case), f"{mean_dice[case]:.3f}",
                      f"{escaped(lowest['organ'])} <small>{lowest['dice']:.3f}</small>", misses])
    return page.table_html(("case", "mean Dice", "lowest organ", "misses"), lines)


def case_panel(path, case, names, facts, title):
    """Draw one of evaluate.py's cases, with the organs of its label, matched by name."""
    label_names = case["names"] or {}
    label, affine = data.read_label(case["label"])
    prediction, prediction_affine = data.read_label(case["prediction"])

    # the files have the same voxels, though their axes may run differently
    label, affine = transforms.to_ras(label.numpy(), affine)
    prediction, _ = transforms.to_ras(prediction.numpy(), prediction_affine)
    image = np.zeros(label.shape, np.float32)
    if case["image"] != case["prediction"]:    # else another system's, scored without its image
        image = scaled_image(case["image"], facts)

    # voxels of a label named "ignore" count on neither side
    prediction = renumbering(names or {}, label_names, case["label"])[prediction]
    for number, name in label_names.items():
        if organ(name) == "ignore":
            prediction = np.where(label == number, 0, prediction)
            label = np.where(label == number, 0, label)
    panels.overlay_panel(path, image, label, prediction, transforms.spacing_of(affine),
                         label_names, title=title)


def scaled_image(path, facts):
    """Read an image, its axes along R, A, S and its values in [0, 1] as training has them."""
    image, affine = data.read_volume(path)
    image += facts.get("hu_offset", 0)
    if facts["modality"] == "ct":
        image = transforms.window_hu(image, *facts["hu_window"])
    else:
        image = transforms.percentile_scale(image)
    return transforms.to_ras(image, affine)[0]


def renumbering(names, label_names, where):
    """Return (256,) uint8: the label's number of an organ for each number of the prediction.

    Organs that the label does not name become 0. Without any names numbers stay as they are.
    """
    if not label_names:
        return np.arange(256, dtype=np.uint8)
    ids, label_ids = organ_ids(names, where), organ_ids(label_names, where)
    table = np.zeros(256, np.uint8)
    for name in ids.keys() & label_ids.keys():
        table[ids[name]] = label_ids[name]
    return table
