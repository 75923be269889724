"""Write the page of a run or an evaluation, which a browser shows by itself [ours].

The page holds its pictures, no script and no address: it may be copied alone. Reading order: what
the pictures and numbers mean, parts of a page, the page.
"""
import math
from pathlib import Path

from smit.figures.canvas import escaped
from smit.runtime import atomic_write

PANELS = {  # pictures of volumes, in the order of the page: name and what to see in it
    "reconstruction": (
        "Reconstruction",
        "A view of a volume, the part the student saw, and its prediction. Organs' outlines should "
        "continue through hidden cells. Only hidden voxels are trained, so the prediction may "
        "look odd elsewhere."),
    "restoration": (
        "Restoration",
        "A disturbed view, and the network's restoration of it. What the disturbance destroyed "
        "should come back in the shape of organs."),
    "tokens": (
        "Tokens",
        "Each square is a token of the whole view. Where the features know anatomy, one tissue has "
        "one colour, and tokens like the one in the box are bright. One colour everywhere is a "
        "collapse."),
    "overlay": (
        "Segmentation",
        "Outlines of the label and, after the first validation, of the prediction. The legend has "
        "each organ's Dice in the whole volume.")}

CASE_PANELS = {  # the same of an evaluation, which may lie in a run's folder
    "worst": ("Worst case", "The case of the lowest mean Dice: look for what went wrong."),
    "median": ("Median case", "The case in the middle: this is what to expect."),
    "best": ("Best case", "The case of the highest mean Dice.")}

CHART_CAPTIONS = {  # in the order of the page
    "loss": "It should fall fast, then slowly. In pre-training it may rise while the teacher's "
            "temperature does.",
    "dice": "On the prepared grid. evaluate.py scores on the original one.",
    "mip": "The best constant and the visible median know nothing of anatomy: the error should "
           "fall below both.",
    "token_losses": "At ln K the teacher says nothing, or the student hears nothing.",
    "terms": "Their sum is the loss.",
    "entropy": "All near 1: the teacher says nothing. A mean near 0: it says the same of "
               "everything.",
    "rank": "Below about 2 the features have collapsed.",
    "gradient": "Peaks that keep growing ask for a lower learning rate.",
    "rate": "It rises in a line and falls along a cosine."}

MEANINGS = {  # of the columns of log.csv
    "step": "Steps done",
    "epoch": "Passes over the volumes",
    "loss": "Loss of the last logged step",
    "mip": "MIP: mean absolute error of masked image prediction",
    "mpd": "MPD: cross-entropy of patch tokens, nats",
    "itd": "ITD: cross-entropy of image tokens, nats",
    "contrast": "Contrast of views",
    "info_nce": "InfoNCE, nats",
    "restore": "Error of the restoration",
    "rotation": "Cross-entropy of the rotation, nats",
    "adversarial": "Adversarial loss",
    "critic": "Loss of the critic",
    "val_loss": "Loss on held-back volumes",
    "val_mip": "MIP on held-back volumes",
    "val_mse": "Mean squared error on held-back volumes",
    "val_constant": "MIP of the best single grey value",
    "val_median": "MIP of each view's visible median",
    "val_dice": "Mean Dice of the last validation",
    "best_dice": "Best mean Dice so far",
    "mpd_entropy": "Entropy of a patch's target, share of ln K",
    "mpd_mean_entropy": "Entropy of the patches' mean target, share of ln K",
    "mpd_center": "Norm of the patches' centre",
    "itd_entropy": "Entropy of an image's target, share of ln K",
    "itd_mean_entropy": "Entropy of the images' mean target, share of ln K",
    "itd_center": "Norm of the images' centre",
    "effective_rank": "Dimensions that the teacher's tokens use",
    "grad_norm": "Norm of the gradient, before clipping",
    "skipped": "Steps skipped, their gradient not being finite",
    "lr": "Learning rate",
    "momentum": "Momentum of the teacher",
    "teacher_temp": "Temperature of the teacher"}

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 1900px; margin: 1.5em auto; padding: 0 1.5em;
       color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 1.6em }
figure { margin: 1em 0 1.6em; overflow-x: auto } figcaption { color: #444; max-width: 60em }
svg { max-width: 100%; height: auto; border: 1px solid #ddd; box-sizing: border-box }
.charts { display: grid; column-gap: 1.2em;
          grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)) }
.charts figure { margin: 0 0 1.2em } .charts svg { width: 100% }
.facts { columns: 400px; column-gap: 2.5em }
.facts div { display: flex; justify-content: space-between; gap: 1.5em;
             border-top: 1px solid #ddd; break-inside: avoid }
.facts b { font: 14px/1.7 monospace; flex: 0 0 auto; max-width: 60%; overflow-wrap: anywhere;
           text-align: right }
.scroll { overflow-x: auto }
table { border-collapse: collapse } th { text-align: left } th + th { text-align: right }
th, td { padding: 0.15em 1.2em 0.15em 0; border-top: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.interval { color: #666 }
td small, th small { color: #666; font-weight: normal; margin-left: 0.5em }
tr.mean td:not(.interval) { font-weight: bold }
"""


# --------------------------------------------------------------------------------- parts of a page
def number_text(value, digits=None):
    """Write a value: four significant digits, or so many decimals; a dash if it is not known."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"


def facts_html(entries):
    """List names and values of a dict; long values are cut."""
    rows = []
    for name, value in entries.items():
        words = number_text(value)
        if len(words) > 200:
            words = words[:200] + " ..."
        rows.append(f"<div><span>{escaped(name)}</span> <b>{escaped(words)}</b></div>")
    return '<div class="facts">' + "\n".join(rows) + "</div>"


def table_html(header, rows, last_bold=0):
    """Return a table; rows of cells, each a string of HTML, the first one of a row its name.

    Cells under a heading with the word "interval" are grey. The last so many rows are bold.
    """
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>"]
    for number, (name, *cells) in enumerate(rows):
        mark = ' class="mean"' if number >= len(rows) - last_bold else ""
        body = ""
        for heading, cell in zip(header[1:], cells):
            kind = ' class="interval"' if "interval" in heading else ""
            body += f"<td{kind}>{cell}</td>"
        lines.append(f"<tr{mark}><th>{name}</th>{body}</tr>")
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def paragraph_html(sentences):
    return "<p>" + escaped(" ".join(sentences)) + "</p>"


def figure_html(svg_path, name, caption):
    """Return a picture, copied into the page, with its caption."""
    svg = svg_path.read_text(encoding="utf-8")
    name = f"<b>{escaped(name)}.</b> " if name else ""
    return f"<figure>{svg}<figcaption>{name}{escaped(caption)}</figcaption></figure>"


def panels_html(folder, panels):
    """Show those of `panels`, PANELS or CASE_PANELS, that a folder has."""
    figures = []
    for stem, (name, caption) in panels.items():
        path = Path(folder, f"{stem}.svg")
        if path.exists():
            figures.append(figure_html(path, name, caption))
    return "\n".join(figures)


def charts_html(folder):
    """Show the charts that a folder has, side by side."""
    figures = []
    for stem, caption in CHART_CAPTIONS.items():
        path = Path(folder, f"{stem}.svg")
        if path.exists():
            figures.append(figure_html(path, "", caption))
    if not figures:
        return ""
    return '<div class="charts">' + "\n".join(figures) + "</div>"


# -------------------------------------------------------------------------------------------- page
def write_page(path, title, sections, settings):
    """Write an HTML file: {heading: HTML} under each other, then the settings [ours].

    A section whose HTML is empty is left out.
    """
    parts = [f"<h1>{escaped(title)}</h1>"]
    for heading, html in sections.items():
        if html:
            parts.append(f"<h2>{escaped(heading)}</h2>\n{html}")
    parts.append(f"<h2>Settings</h2>\n{facts_html(settings)}")

    head = f'<meta charset="utf-8"/><title>{escaped(title)}</title><style>{STYLE}</style>'
    html = ('<!DOCTYPE html>\n<html lang="en"><head>' + head + "</head>\n<body>\n"
            + "\n".join(parts) + "\n</body></html>\n")
    atomic_write(path, html.encode("utf-8", "replace"))
