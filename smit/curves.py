"""Curves as SVG [SMIT Fig. 3], the page that shows a run, and what the three scripts call to write both [ours].

Everything is a file that a browser shows by itself: no script, nothing from the network. Pictures of volumes are made
in figures.py. Reading order: axes, curves_svg, from_log, index_html, the scripts' reports.
"""
import csv
import math
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

from smit import data, figures, scoring, transforms
from smit.masking import expand_mask
from smit.runtime import atomic_write

LEFT, RIGHT, TOP, BASE = 80, 470, 44, 290        # pixels: the box of a chart's axes; its legend stands to the right
COLORS = "#0072b2 #d55e00 #009e73 #cc79a7 #56b4e9 #e69f00 #000000".split()      # Okabe and Ito's, without the yellow
CHARTS = (  # file, title, y axis, {column of log.csv: its name in the legend}, limits of y, whether y is logarithmic
    ("loss", "Loss, as back-propagated", "loss", {"loss": "training"}, None, False),
    ("mip", "Masked image prediction", "L1 on hidden voxels", {"mip": "training", "val_mip": "held back",
     "val_constant": "best constant", "val_median": "visible median"}, None, False),
    ("token_losses", "Token losses", "cross-entropy, nats", {"mpd": "MPD, patches", "itd": "ITD, image"}, None, False),
    ("contrast", "Contrast", "InfoNCE, nats", {"contrast": "training"}, None, False),
    ("entropy", "Teacher's entropy", "share of ln K", {
        "mpd_entropy": "patch", "mpd_mean_entropy": "mean of patches", "itd_entropy": "image",
        "itd_mean_entropy": "mean of images"}, (0, 1), False),
    ("rank", "Effective rank of the teacher's tokens", "dimensions", {"effective_rank": "training"}, None, False),
    ("dice", "Dice on held-back cases", "mean Dice over organs", {"val_dice": "held back"}, (0, 1), False),
    ("gradient", "Norm of the gradient, before clipping", "norm", {"grad_norm": "training"}, None, True),
    ("rate", "Learning rate", "learning rate", {"lr": "AdamW"}, None, False))
CAPTIONS = {  # of the pictures, in the order of the page
    "reconstruction": "A view, what the student saw of it and what it predicts; it is trained on hidden voxels alone.",
    "tokens": "Tokens of the whole view: main components as colours, and similarity to the token in the box.",
    "overlay": "One case, held back if any is: truth and prediction.",
    "worst": "The case of the lowest mean Dice.", "median": "The case in the middle.",
    "best": "The case of the highest mean Dice.",
    "loss": "", "dice": "On the prepared grid; evaluate.py scores on the original one.",
    "mip": "Constant and median know nothing of anatomy: the loss must fall under both.",
    "token_losses": "At ln K the teacher says nothing, or the student hears nothing.",
    "entropy": "All near 1: the teacher says nothing. Those of a mean near 0: it says the same of everything.",
    "rank": "Below about 2 the features have collapsed.", "contrast": "", "gradient": "", "rate": ""}
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 1400px; margin: 1.5em auto; padding: 0 1em; color: #222 }
img { max-width: 100%; border: 1px solid #ddd } figure { margin: 1.5em 0 } figcaption { color: #444 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 640px), 1fr)); column-gap: 1em }
.facts { columns: 300px; column-gap: 2em } .facts b { font-family: monospace }
.facts div { border-top: 1px solid #ddd; overflow-wrap: anywhere; break-inside: avoid }"""


# ------------------------------------------------------------------------------------------------------------- axes
def ticks(low, high, wanted=5):
    """Round numbers, about `wanted`, the first at or below `low` and the last at or above `high`."""
    raw = (high - low or abs(high) or 1) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if raw <= power * factor * 1.0001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def log_ticks(low, high):
    """Powers of ten from at or below `low` to at or above `high`, both positive."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0 ** power for power in range(first, max(last, first + 1) + 1)]


def axis(marks, start, end, log=False):
    """(function from value to pixel, [(pixel, text)] of the marks) of an axis from pixel `start` to `end`."""
    low, high = marks[0], marks[-1]

    def pixel(value):
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return start + (end - start) * share
    return pixel, [(pixel(mark), f"{mark:.6g}") for mark in marks]


# ----------------------------------------------------------------------------------------------------------- curves
def text(x, y, content, anchor="start", more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(str(content))}</text>'


def stroke(points, style):
    return f'<path d="M{" L".join(f"{x:.2f} {y:.2f}" for x, y in points)}" {style}/>'


def runs(rows):
    """Split a list at its Nones."""
    found = [[]]
    for row in rows:
        found[-1].append(row) if row else found.append([])
    return [run for run in found if run]


def drawn_axes(title, x_label, y_label, x_marks, y_marks):
    """The parts of a chart that hold no data."""
    parts = [text(LEFT, 24, title, more=' font-size="17" font-weight="bold"'),
             text((LEFT + RIGHT) / 2, BASE + 44, x_label, "middle"),
             text(0, 0, y_label, "middle", f' transform="translate(18 {(TOP + BASE) / 2:.0f}) rotate(-90)"')]
    for x, mark in x_marks:
        parts += [stroke([(x, BASE), (x, BASE + 5)], 'stroke="#333"'), text(x, BASE + 21, mark, "middle")]
    for y, mark in y_marks:
        parts += [stroke([(LEFT, y), (RIGHT, y)], 'stroke="#ddd"'), text(LEFT - 8, y + 5, mark, "end")]
    return [*parts, stroke([(LEFT, TOP), (LEFT, BASE), (RIGHT, BASE)], 'stroke="#333" fill="none"')]


def curves_svg(path, series, x_label, y_label, title, lines=None, limits=None, log_y=False):
    """Draw curves with axes, a legend and intervals as an SVG file [SMIT Fig. 3].

    series {name: (x, y)} or {name: (x, y, low, high)}, the last two the ends of an interval, drawn as a band; values
    that are not finite leave a gap. lines {name: y}: horizontal, dashed. limits: (low, high) of y, if not the data's.
    log_y: a logarithmic axis, without what is not positive. ValueError if nothing is left to draw.
    """
    def usable(x, *y):
        return all(map(math.isfinite, (x, *y))) and (not log_y or min(y) > 0)
    rows = {name: [row if usable(*row) else None for row in zip(*map(np.ravel, columns), strict=True)]
            for name, columns in series.items()}
    drawn = [row for points in rows.values() for row in points if row]
    lines = {name: value for name, value in (lines or {}).items() if usable(0, value)}
    if not drawn:
        raise ValueError(f"{path}: no finite value to draw in {', '.join(series) or 'no series at all'}")
    values = limits or [y for row in drawn for y in row[1:]] + [*lines.values()]
    x_pixel, x_marks = axis(ticks(min(0, *(row[0] for row in drawn)), max(row[0] for row in drawn)), LEFT, RIGHT)
    y_pixel, y_marks = axis((log_ticks if log_y else ticks)(min(values), max(values)), BASE, TOP, log_y)
    parts = drawn_axes(title, x_label, y_label, x_marks, y_marks)
    for number, (name, points) in enumerate(rows.items()):
        color, dash = COLORS[number % len(COLORS)], ' stroke-dasharray="9 4"' * (number >= len(COLORS))
        for run in runs(points):
            pixels = [(x_pixel(x), *map(y_pixel, y)) for x, *y in run]
            if len(run[0]) == 4:
                band = [(x, low) for x, _, low, _ in pixels] + [(x, high) for x, _, _, high in reversed(pixels)]
                parts.append(stroke(band, f'fill="{color}" fill-opacity="0.2"'))
            parts.append(stroke([row[:2] for row in pixels], f'stroke="{color}" stroke-width="2" fill="none"{dash}'))
            if len(run) <= 40:
                parts += [f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3" fill="{color}"/>' for x, y, *_ in pixels]
        y = TOP + 10 + 24 * number
        parts += [stroke([(RIGHT + 14, y), (RIGHT + 38, y)], f'stroke="{color}" stroke-width="3"{dash}'),
                  text(RIGHT + 46, y + 5, name)]
    for name, value in lines.items():
        y = y_pixel(value)
        halo = ' stroke="white" stroke-width="4" paint-order="stroke"'
        parts += [stroke([(LEFT, y), (RIGHT, y)], 'stroke="#333" stroke-dasharray="4 4"'),
                  text(RIGHT - 6, y - 6, name, "end", halo)]
    width, height = RIGHT + 70 + 8 * max(map(len, series)), max(BASE + 60, TOP + 24 * len(series))
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
           f'font-family="sans-serif" font-size="14" fill="#222"><rect width="100%" height="100%" fill="white"/>'
           f'{"".join(parts)}</svg>\n')
    atomic_write(path, svg.encode())


def from_log(log_csv, folder, prototypes=None):
    """Draw every chart that a log.csv of train_ssl.py or finetune.py has values for: {column: its last value} [ours].

    prototypes: K, for ln K in the chart of the token losses. A row cut short and cells that are no number are passed
    over; ValueError, naming the file, if it has no column "step".
    """
    with open(log_csv, newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))

    def number(row, column):
        try:
            return float(row[column])
        except (KeyError, TypeError, ValueError):
            return math.nan
    columns = {name: np.array([number(row, name) for row in rows]) for name in (rows[0] if rows else ()) if name}
    if rows and "step" not in columns:
        raise ValueError(f"{log_csv}: no column 'step' among {', '.join(columns)}; give the log.csv of a run")
    for stem, title, y_label, names, limits, log_y in CHARTS:
        found = {name: columns.get(column, np.array([])) for column, name in names.items()}
        series = {name: (columns["step"][np.isfinite(y)], y[np.isfinite(y)])
                  for name, y in found.items() if np.isfinite(y).any()}
        lines = {"ln K": math.log(prototypes)} if stem == "token_losses" and prototypes else None
        chart = Path(folder, f"{stem}.svg")
        chart.unlink(missing_ok=True)                                # an earlier run's may have had more columns
        if series:
            curves_svg(chart, series, "step", y_label, title, lines, limits, log_y)
    return {name: values[np.isfinite(values)][-1] for name, values in columns.items() if np.isfinite(values).any()}


# ------------------------------------------------------------------------------------------------------------- page
def facts_html(entries):
    """Names and values of a dict; floats in four digits, long values cut."""
    values = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in entries.items()}
    return '<div class="facts">' + "".join(
        f"<div>{escape(str(name))} <b>{escape(value[:200] + ' ...' * (len(value) > 200))}</b></div>"
        for name, value in values.items()) + "</div>"


def index_html(folder, title, settings, numbers):
    """Write folder/index.html: last numbers, every PNG and SVG of the folder with its caption, settings [ours]."""
    def place(path):
        return [*CAPTIONS, path.stem].index(path.stem), path.name

    def figure(path):
        name = escape(path.stem.replace("_", " "))
        return (f'<figure><img src="{quote(path.name)}" alt="{name}"/>'
                f"<figcaption><b>{name}</b> {escape(CAPTIONS.get(path.stem, ''))}</figcaption></figure>")
    files = sorted([*Path(folder).glob("*.png"), *Path(folder).glob("*.svg")], key=place)
    pictures, charts = ("\n".join(figure(path) for path in files if path.suffix == end) for end in (".png", ".svg"))
    html = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1>
<h2>Last numbers</h2>{facts_html(numbers)}
{pictures}
<div class="charts">{charts}</div>
<h2>Settings</h2>{facts_html(settings)}
</body></html>
"""
    atomic_write(Path(folder, "index.html"), html.encode())


# ------------------------------------------------------------------------------------- what the scripts call, rank 0
@torch.no_grad()
def pretraining_report(out, config, student, sample):
    """OUT/index.html with charts of OUT/log.csv and panels of a sample of sampling.ViewPairs; leaves train mode on."""
    numbers = from_log(out / "log.csv", out, config["prototypes"])
    step, spacing_mm, top = int(numbers.get("step", 0)), config["spacing"], len(student.encoder.stages)
    cells = sample["hidden"][:1]                                                     # (1, d, h, w), of the first view
    view = sample["views"][:1].to(next(student.parameters()).device) / 255           # (1, 1, D, H, W)
    student.eval()
    if student.voxel_head:
        patches = expand_mask(cells, config["mask_cell"] // student.encoder.patch).to(view.device)
        voxels = student(view, patches).voxels[0, 0].cpu()
        hidden = expand_mask(cells, config["mask_cell"])[0]
        figures.reconstruction_panel(out / "reconstruction.png", view[0, 0].cpu(), hidden, voxels, spacing_mm,
                                     f"Masked image prediction on a view, step {step}")
    levels = [max(0, top - 2), top - 1]                                              # 12^3 and 6^3 tokens of 96^3
    tokens = student.encoder(view, wanted=levels)
    figures.token_panel(out / "tokens.png", view[0, 0].cpu(), [tokens[level][0].cpu() for level in levels], spacing_mm,
                        title=f"Tokens of a whole view, step {step}")
    student.train()
    index_html(out, f"Pre-training, {config['method']}", config, numbers)


def finetuning_report(out, config, image=None, label=None, pred=None):
    """OUT/index.html with charts of OUT/log.csv and an overlay: prepared image (0..255) and label maps (D, H, W)."""
    numbers = from_log(out / "log.csv", out)
    if image is not None:
        figures.overlay_panel(out / "overlay.png", np.asarray(image) / 255, label, pred, config["spacing"],
                              config["labels"], title=f"One case, step {int(numbers.get('step', 0))}")
    index_html(out, "Fine-tuning", config, numbers)


def case_panel(path, case, names, facts, title):
    """The overlay of one of evaluate.py's cases on the grid of its label; organs are matched by name, as in scoring."""
    (truth, affine), (pred, _) = (data.read_label(case[kind], allow_empty=True) for kind in ("label", "prediction"))
    theirs = case["names"] or names or scoring.numbered(256)
    wanted, ids = (scoring.organ_ids(known, case["label"]) for known in (theirs, names or theirs))
    number = np.zeros(256, np.uint8)                                 # of the label, for each of the prediction
    for organ in ids.keys() & wanted.keys():
        number[ids[organ]] = wanted[organ]
    image = torch.zeros(truth.shape)                                 # where another system's predictions are scored
    if case["image"] != case["prediction"]:
        image = data.read_volume(case["image"])[0]
        image = transforms.window_hu(image, *facts["hu_window"]) if facts["modality"] == "ct" else \
            transforms.percentile_scale(image)
    volumes = [transforms.to_ras(volume, affine) for volume in (image.numpy(), truth.numpy(), number[pred.numpy()])]
    figures.overlay_panel(path, *(volume for volume, _ in volumes), transforms.spacing_of(volumes[0][1]), theirs,
                          title=title)


def evaluation_report(out, cases, rows, names, facts):
    """OUT/index.html with the cases of worst, median and best mean Dice; all arguments as evaluate.py has them."""
    dices = {}
    for row in rows:
        dices.setdefault(row["case"], []).append(row["dice"])
    means = {case: float(np.nanmean(values)) for case, values in dices.items() if np.isfinite(values).any()}
    ranked, by_name = sorted(means, key=means.get), {scoring.case_name(case["prediction"]): case for case in cases}
    places = (("worst", 0), ("median", len(ranked) // 2), ("best", -1)) if ranked else ()
    for name, rank in {ranked[place]: rank for rank, place in places}.items():            # few cases: each once
        case_panel(out / f"{rank}.png", by_name[name], names, facts,
                   f"{name}, {rank} of {len(ranked)}, mean Dice {means[name]:.3f}")
    index_html(out, "Evaluation", facts, {f"mean Dice of {name}": means[name] for name in reversed(ranked)})
