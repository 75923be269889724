"""Curves as SVG [SMIT Fig. 3].

Reading order: axes, curves, the charts of a run's log.
"""
import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smit.figures.canvas import disc, stroke, text, text_width, write_svg

WIDTH, HEIGHT = 640, 360                                                # of a chart, in pixels
LEFT, RIGHT, BASE = 78, 620, 306                                        # edges of its axes
# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow
CURVE_COLORS = "#0072b2 #d55e00 #009e73 #cc79a7 #56b4e9 #e69f00 #000000".split()
MOST_DISCS = 40                                        # with more points a curve has no discs


# -------------------------------------------------------------------------------------------- axes
def ticks(low, high, wanted=5):
    """Return about `wanted` round numbers from at or below `low` to at or above `high`."""
    span = high - low
    if span <= 1e-9 * abs(high):                 # of one value, but for its rounding
        span = abs(high) or 1
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = 10 * power
    for factor in (5, 2, 1):
        if raw <= factor * power * 1.0001:
            step = factor * power

    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def log_ticks(low, high):
    """Return powers of ten from at or below `low` to at or above `high`, both positive."""
    first = math.floor(math.log10(low) + 1e-9)
    last = max(math.ceil(math.log10(high) - 1e-9), first + 1)
    return [10.0 ** power for power in range(first, last + 1)]


@dataclass
class Axis:
    """An axis that runs from its first mark at pixel `start` to its last mark at pixel `end`."""
    marks: list
    start: float
    end: float
    log: bool = False

    def pixel(self, value):
        low, high = self.marks[0], self.marks[-1]
        if self.log:
            share = math.log(value / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return self.start + (self.end - self.start) * share


def draw_x_axis(axis, base, label):
    """Draw an axis below a chart: its line, marks and name."""
    drawing = [stroke([(axis.start, base), (axis.end, base)], stroke="#333"),
               text((axis.start + axis.end) / 2, base + 42, label, "middle")]
    for mark in axis.marks:
        x = axis.pixel(mark)
        drawing += [stroke([(x, base), (x, base + 5)], stroke="#333"),
                    text(x, base + 20, f"{mark:.6g}", "middle")]
    return drawing


def draw_y_axis(axis, left, right, label):
    """Draw an axis at the left of a chart: its line, marks with grid lines, and name."""
    middle = (axis.start + axis.end) / 2
    turned = f"translate(18 {middle:.0f}) rotate(-90)"
    drawing = [text(0, 0, label, "middle", transform=turned)]
    for mark in axis.marks:
        y = axis.pixel(mark)
        drawing += [stroke([(left, y), (right, y)], stroke="#ddd"),
                    text(left - 8, y + 5, f"{mark:.6g}", "end")]
    return [*drawing, stroke([(left, axis.start), (left, axis.end)], stroke="#333")]


# ------------------------------------------------------------------------------------------ curves
class Point(NamedTuple):
    """A point of a curve, and the ends of its interval."""
    x: float
    y: float
    low: float
    high: float


def points_of(columns, log_y):
    """Return the points of (x, y) or (x, y, low, high), None for each that cannot be drawn."""
    x, y, *ends = (np.ravel(column) for column in columns)
    low, high = ends or (y, y)
    points = []
    for values in zip(x, y, low, high, strict=True):
        point = Point(*map(float, values))
        finite = all(map(math.isfinite, point))
        positive = min(point.y, point.low, point.high) > 0
        points.append(point if finite and (positive or not log_y) else None)
    return points


def unbroken(points):
    """Split a list at its Nones into lists without any."""
    runs = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def style_of(number):
    """Return colour and dashes of the curve of this number; no two of the first 14 are alike."""
    color = CURVE_COLORS[number % len(CURVE_COLORS)]
    dashes = {"stroke_dasharray": "9 4"} if number >= len(CURVE_COLORS) else {}
    return color, dashes


def draw_curve(number, points, x_axis, y_axis):
    """Draw a curve, the band of its intervals if they are wider than 0, and a few points' discs."""
    color, dashes = style_of(number)
    drawing = []
    for run in unbroken(points):
        line, lower, upper = [], [], []
        for point in run:
            x = x_axis.pixel(point.x)
            line.append((x, y_axis.pixel(point.y)))
            lower.append((x, y_axis.pixel(point.low)))
            upper.append((x, y_axis.pixel(point.high)))

        if lower != upper:
            drawing.append(stroke(lower + upper[::-1], fill=color, fill_opacity=0.2))
        drawing.append(stroke(line, stroke=color, stroke_width=2, fill="none", **dashes))
        if len(run) <= MOST_DISCS:
            drawing += [disc(x, y, 3, color) for x, y in line]
    return drawing


def draw_legend(names, top):
    """Draw curves' names in rows under the title: (elements, y where the rows end)."""
    drawing = []
    x, y = LEFT, top
    for number, name in enumerate(names):
        width = 32 + text_width(name) + 18
        if x > LEFT and x + width > RIGHT:
            x, y = LEFT, y + 22
        color, dashes = style_of(number)
        drawing += [stroke([(x, y - 5), (x + 24, y - 5)], stroke=color, stroke_width=3, **dashes),
                    text(x + 32, y, name)]
        x += width
    return drawing, y


def curves_svg(path, series, x_label, y_label, title, lines=None, limits=None, log_y=False):
    """Draw curves with axes, a legend and intervals as an SVG file [SMIT Fig. 3].

    series {name: (x, y)} or {name: (x, y, low, high)}: low and high are the ends of an interval,
    drawn as a band. Values that are not finite leave a gap.
    lines {name: y}: horizontal and dashed.
    limits: (low, high) of the y axis, by default the data's.
    log_y: make the y axis logarithmic and leave out values that are not positive.
    ValueError if nothing is left to draw.
    """
    curves = {name: points_of(columns, log_y) for name, columns in series.items()}
    drawn = []
    for points in curves.values():
        drawn += filter(None, points)
    if not drawn:
        names = ", ".join(series) or "no series at all"
        raise ValueError(f"{path}: no finite value to draw in {names}")

    lines = {name: y for name, y in (lines or {}).items()
             if math.isfinite(y) and (y > 0 or not log_y)}
    legend, legend_end = draw_legend(curves, 54)

    # the x axis begins at 0 at most, and the y axis has room for the intervals and the lines
    x_values = [0]
    y_values = [*lines.values()]
    for point in drawn:
        x_values.append(point.x)
        y_values += [point.y, point.low, point.high]
    low, high = limits or (min(y_values), max(y_values))
    y_marks = log_ticks(low, high) if log_y else ticks(low, high)
    y_axis = Axis(y_marks, BASE, legend_end + 16, log_y)
    # more marks than up the side: they lie closer, so that a curve ends near the axis' end
    x_axis = Axis(ticks(min(x_values), max(x_values), wanted=8), LEFT, RIGHT)

    drawing = [text(LEFT, 26, title, font_size=17, font_weight="bold"), *legend]
    drawing += draw_y_axis(y_axis, LEFT, RIGHT, y_label)
    drawing += draw_x_axis(x_axis, BASE, x_label)
    for number, points in enumerate(curves.values()):
        drawing += draw_curve(number, points, x_axis, y_axis)
    for name, value in lines.items():
        drawing += draw_level(name, y_axis.pixel(value))
    width = max(WIDTH, LEFT + text_width(title, 17) + 20)
    write_svg(path, width, HEIGHT, drawing)


def draw_level(name, y):
    """Draw a dashed horizontal line with its name, which a white halo keeps apart from curves."""
    halo = dict(stroke="white", stroke_width=4, paint_order="stroke")
    return [stroke([(LEFT, y), (RIGHT, y)], stroke="#333", stroke_dasharray="4 4"),
            text(RIGHT - 6, y - 6, name, "end", **halo)]


# ---------------------------------------------------------------------------------- a run's charts
class Chart(NamedTuple):
    """A chart of log.csv; curves {column: its name in the legend}."""
    stem: str
    title: str
    y_label: str
    curves: dict
    limits: tuple = None
    log_y: bool = False


CHARTS = (
    Chart("loss", "Loss, as back-propagated", "loss",
          {"loss": "training", "val_loss": "held back"}),
    Chart("mip", "Masked image prediction", "mean absolute error",
          {"mip": "training", "val_mip": "held back", "val_constant": "best constant",
           "val_median": "visible median"}),
    Chart("token_losses", "Token losses", "cross-entropy, nats",
          {"mpd": "MPD, patches", "itd": "ITD, image"}),
    Chart("terms", "Terms of a baseline's loss", "loss",
          {"contrast": "contrast", "info_nce": "InfoNCE", "restore": "restoration",
           "rotation": "rotation", "adversarial": "adversarial", "critic": "critic"}),
    Chart("entropy", "Entropy of the teacher's outputs", "share of ln K",
          {"mpd_entropy": "patch", "mpd_mean_entropy": "mean of patches", "itd_entropy": "image",
           "itd_mean_entropy": "mean of images"}, limits=(0, 1)),
    Chart("rank", "Effective rank of the teacher's tokens", "dimensions",
          {"effective_rank": "training"}),
    Chart("dice", "Dice on held-back cases", "mean Dice over organs", {"val_dice": "held back"},
          limits=(0, 1)),
    Chart("gradient", "Norm of the gradient, before clipping", "norm", {"grad_norm": "training"},
          log_y=True),
    Chart("rate", "Learning rate", "learning rate", {"lr": "AdamW"}))


def read_log(log_csv):
    """Read a log.csv as {column: (steps, values)}, of the rows with a number in that column [ours].

    NaN and infinity are numbers that were measured, and stay; a blank cell was not. A run without
    a log has no columns yet. ValueError, naming the file, without column "step".
    """
    if not Path(log_csv).exists():
        return {}
    with open(log_csv, newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))

    names = [name for name in (rows[0] if rows else ()) if name]
    if rows and "step" not in names:
        raise ValueError(f"{log_csv}: no column 'step' among {', '.join(names)}; give the log.csv "
                         "of a run")
    columns = {}
    for name in names:
        points = [(number(row["step"]), number(row[name])) for row in rows]
        points = [point for point in points if None not in point]
        columns[name] = tuple(np.array(points, dtype=float).reshape(-1, 2).T)
    return columns


def number(cell):
    """Return a cell as a float; None where the row was cut short or the cell holds no number."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def from_log(log_csv, folder, prototypes=None):
    """Draw every chart for which a log.csv has values, and return {column: its last value} [ours].

    prototypes: K, for a line at ln K in the chart of the token losses. ValueError as `read_log`.
    """
    columns = read_log(log_csv)
    for chart in CHARTS:
        draw_chart(chart, columns, folder, prototypes)
    return {name: values[-1] for name, (_, values) in columns.items() if len(values)}


def draw_chart(chart, columns, folder, prototypes):
    """Write a chart of a log, or remove an earlier run's where this log has no values for it."""
    series = {}
    for column, name in chart.curves.items():
        steps, values = columns.get(column, ((), np.array([])))
        can_be_drawn = np.isfinite(values) & (values > 0 if chart.log_y else True)
        if can_be_drawn.any():
            series[name] = (steps, values)

    lines = {}
    if chart.stem == "token_losses" and prototypes:
        lines = {"ln K": math.log(prototypes)}

    path = Path(folder, f"{chart.stem}.svg")
    if series:
        curves_svg(path, series, "step", chart.y_label, chart.title, lines, chart.limits,
                   chart.log_y)
    else:
        path.unlink(missing_ok=True)
