"""Curves as SVG [SMIT Fig. 3]. Reading order: axes, curves_svg, from_log."""
import csv
import math
from html import escape
from pathlib import Path

import numpy as np

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
