"""The page that shows a run, and what the three scripts call to write it [ours].

Everything is a file that a browser shows by itself: no script, nothing from the network. Pictures of volumes are made
in panels.py, curves in charts.py.
"""
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

from smit import data, transforms
from smit.data.organs import case_name, numbered, organ_ids
from smit.figures import panels
from smit.figures.charts import from_log
from smit.masking import expand_mask
from smit.runtime import atomic_write

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
        panels.reconstruction_panel(out / "reconstruction.png", view[0, 0].cpu(), hidden, voxels, spacing_mm,
                                     f"Masked image prediction on a view, step {step}")
    levels = [max(0, top - 2), top - 1]                                              # 12^3 and 6^3 tokens of 96^3
    tokens = student.encoder(view, wanted=levels)
    panels.token_panel(out / "tokens.png", view[0, 0].cpu(), [tokens[level][0].cpu() for level in levels], spacing_mm,
                        title=f"Tokens of a whole view, step {step}")
    student.train()
    index_html(out, f"Pre-training, {config['method']}", config, numbers)


def finetuning_report(out, config, image=None, label=None, pred=None):
    """OUT/index.html with charts of OUT/log.csv and an overlay: prepared image (0..255) and label maps (D, H, W)."""
    numbers = from_log(out / "log.csv", out)
    if image is not None:
        panels.overlay_panel(out / "overlay.png", np.asarray(image) / 255, label, pred, config["spacing"],
                              config["labels"], title=f"One case, step {int(numbers.get('step', 0))}")
    index_html(out, "Fine-tuning", config, numbers)


def case_panel(path, case, names, facts, title):
    """The overlay of one of evaluate.py's cases on the grid of its label; organs are matched by name, as in """
    (truth, affine), (pred, _) = (data.read_label(case[kind], allow_empty=True) for kind in ("label", "prediction"))
    theirs = case["names"] or names or numbered(256)
    wanted, ids = (organ_ids(known, case["label"]) for known in (theirs, names or theirs))
    number = np.zeros(256, np.uint8)                                 # of the label, for each of the prediction
    for organ in ids.keys() & wanted.keys():
        number[ids[organ]] = wanted[organ]
    image = torch.zeros(truth.shape)                                 # where another system's predictions are scored
    if case["image"] != case["prediction"]:
        image = data.read_volume(case["image"])[0]
        image = transforms.window_hu(image, *facts["hu_window"]) if facts["modality"] == "ct" else \
            transforms.percentile_scale(image)
    volumes = [transforms.to_ras(volume, affine) for volume in (image.numpy(), truth.numpy(), number[pred.numpy()])]
    panels.overlay_panel(path, *(volume for volume, _ in volumes), transforms.spacing_of(volumes[0][1]), theirs,
                          title=title)


def evaluation_report(out, cases, rows, names, facts):
    """OUT/index.html with the cases of worst, median and best mean Dice; all arguments as evaluate.py has them."""
    dices = {}
    for row in rows:
        dices.setdefault(row["case"], []).append(row["dice"])
    means = {case: float(np.nanmean(values)) for case, values in dices.items() if np.isfinite(values).any()}
    ranked, by_name = sorted(means, key=means.get), {case_name(case["prediction"]): case for case in cases}
    places = (("worst", 0), ("median", len(ranked) // 2), ("best", -1)) if ranked else ()
    for name, rank in {ranked[place]: rank for rank, place in places}.items():            # few cases: each once
        case_panel(out / f"{rank}.png", by_name[name], names, facts,
                   f"{name}, {rank} of {len(ranked)}, mean Dice {means[name]:.3f}")
    index_html(out, "Evaluation", facts, {f"mean Dice of {name}": means[name] for name in reversed(ranked)})
