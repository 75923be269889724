"""Predict organs with a fine-tuned network, and score any predictions against labels [SMIT 3, Tables 1 and 2].

    python evaluate.py --weights runs/finetune/best.pt --data dataset.json --out runs/evaluate    # predict, and score
    python evaluate.py --weights best.pt --data scan.nii.gz --out DIR                             # predict: no labels
    python evaluate.py --weights best.pt --data dataset.json --key training --held_out --out DIR  # a fold's held-back cases
    python evaluate.py --predictions DIR --labels dataset.json --out DIR                          # another system's
    python evaluate.py --compare DIR_A DIR_B                                                      # paired test of two results

Writes OUT/{case}.nii.gz (uint8, on the grid of its image), OUT/cases.csv (a row per case and organ), OUT/results.json and
OUT/table.md. Cases that cannot be scored are listed, and the exit code is then 2. Organs are matched by name, not number.
"""
import argparse
import csv
import functools
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from smit import data, metrics, runtime, segment, transforms

ORGANS = {  # the paper's columns, in its order: BTCV's name, then those of AMOS, MONAI, TotalSegmentator and others
    "SP": "spleen", "RK": "right kidney, rkid, rk", "LK": "left kidney, lkid, lk",
    "GB": "gallbladder, gall bladder, gall", "ESO": "esophagus, oesophagus, eso", "LV": "liver",
    "STO": "stomach, sto", "AOR": "aorta, arota, aor", "IVC": "inferior vena cava, postcava, post cava, ivc",
    "SPV": "portal and splenic veins, portal vein and splenic vein, portal and splenic vein, portal splenic veins, veins, spv, psv",
    "Pan": "pancreas, pan", "RA": "right adrenal gland, right adrenal, rad, ra", "LA": "left adrenal gland, left adrenal, lad, la"}
ABSENT = ("absent from prediction and label: not scored; present in one alone: a miss, Dice and surface Dice 0, HD95 inf; "
          "HD95 is averaged over finite values, with the misses counted beside it; the background is not scored")
COLUMNS = "case organ dice hd95_mm surface_dice prediction_ml label_ml".split()
RESULTS = ("cases.csv", "results.json", "table.md")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", default="runs/evaluate", help="output folder [ours]")
    # ---- predict
    add("--weights", metavar="PATH", help="best.pt of finetune.py: predict with it")
    add("--data", nargs="+", default=[], metavar="PATH", help="NIfTI files, folders, text lists, dataset.json files; labels may lack")
    add("--key", default="validation", help="split to read from a dataset.json [MSD]")
    add("--held_out", action="store_true", help="of --data, only the cases that --weights was validated on")
    add("--overlap", type=float, default=0.5, help="share of a window that its neighbour covers too [SMIT 3]")
    add("--blend", choices=["gaussian", "constant"], default="gaussian", help="weights within a window [nnU-Net]; constant [release]")
    add("--tta", action="store_true", help="average the logits over the axial rotations used in training [ours]")
    add("--export_test", metavar="DIR", help="also write a BTCV submission: label0061.nii.gz for img0061.nii.gz, BTCV's numbers")
    add("--batch", type=int, default=4, help="windows at a time [ours]")
    add("--stitch_on_cpu", action="store_true", help="keep whole volumes off the GPU [ours]")
    add("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto", help="auto: bf16 where the card has it, else fp16; fp32 on CPU [ours]")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    # ---- score
    add("--predictions", metavar="DIR", help="score these files in place of predicting: {case}.nii.gz")
    add("--labels", metavar="PATH", help="folder or dataset.json (its --key) with the labels of --predictions")
    add("--names", metavar="JSON", help="dataset.json that names the numbers of label files, where their folder has none")
    add("--tolerance_mm", type=float, default=2.0, help="of the surface Dice [ours]")
    add("--compare", nargs=2, metavar="DIR", help="two result folders: paired tests of their Dice, A - B")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.weights, args.predictions, args.compare))) != 1:
        parser.error("give one of --weights (with --data), --predictions (with --labels) and --compare")
    if args.weights and not args.data or args.predictions and not args.labels:
        parser.error("--weights needs --data, and --predictions needs --labels")
    return args


# ------------------------------------------------------------------------------------------------------ cases and organs
def case_name(path):
    """The name of a case from that of its file, without nnU-Net's channel: chaos01_0000.nii.gz -> chaos01."""
    return re.sub(r"(_0000)?\.(nii|hdr|img)(\.gz)?$", "", Path(path).name, flags=re.I)


def case_key(path):
    """What image, label and prediction of a case have in common: img0029, label0029 and 0029 are one."""
    return re.sub(r"^(img|label)(?=\d)", "", case_name(path))


def by_case(paths, key, where):
    """{key(path): path}; ValueError where two files are one case."""
    found = {}
    for path in paths:
        if found.setdefault(key(path), path) != path:
            raise ValueError(f"{where}: {path} and {found[key(path)]} are both case {key(path)}; rename one, or leave it out")
    return found


@functools.cache
def organ(name):
    """The paper's column of an organ, whatever its words' order, case and separators; else the name in lower case."""
    def words(text):
        return sorted(re.findall(r"[^\W_]+", text.lower()))
    return next((code for code, names in ORGANS.items() if words(name) in map(words, names.split(", "))), " ".join(name.lower().split()))


def organ_ids(names, where):
    """{organ: id} of {id: name} without the background; ValueError where two names mean one organ."""
    ids = {}
    for number, name in sorted(names.items()):
        if number and ids.setdefault(organ(name), number) != number:
            raise ValueError(f"{where}: labels {ids[organ(name)]} and {number} are both {organ(name)}; rename one")
    return ids


def folder_names(path, names):
    """{id: name} for the label files of a folder or list: of --names, its dataset.json or results.json; None without."""
    if names or str(path).endswith(".json"):
        return data.label_names(names or path)
    found = [file for file in (Path(path, "results.json"), Path(path, "dataset.json"), Path(path).parent / "dataset.json") if file.is_file()]
    return data.label_names(found[0]) if found else None


# ----------------------------------------------------------------------------------------------------------- prediction
def load_network(path, device):
    """(network in eval mode, settings of its run) of finetune.py's checkpoint; ValueError for any other file."""
    state = runtime.load_checkpoint(path)
    config = state.get("config")
    if "model" not in state or not isinstance(config, dict) or "num_classes" not in config:
        raise ValueError(f"{path} holds no fine-tuned network: give the best.pt of finetune.py")
    try:
        net = segment.build_network(config)
        net.load_state_dict(state["model"])
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: weights and settings do not fit each other ({str(error).splitlines()[0]})") from None
    return net.to(device).eval(), config


def select_cases(args, config):
    """The cases to predict, each with its list's "names" ({id: name} or None) and whether training has seen it."""
    cases = []
    for path in args.data:
        found, names = data.read_list(path, args.key), data.label_names(path)
        cases += [{**case, "names": names, "file": Path(case["image"]).name} for case in found]
    if args.held_out:
        cases = [case for case in cases if case["file"] in config["held_back"]]
        if not cases:
            raise ValueError(f"--held_out: none of {', '.join(args.data)} ({args.key}) was held back from {args.weights}")
    seen = [case_name(case["file"]) for case in cases if case["file"] in config["train"]]
    if seen:
        print(f"warning: {len(seen)} of {len(cases)} cases bear names that the network was trained on: {', '.join(seen)}")
    return cases, seen


def predict_case(net, case, settings, window, autocast, turns, **sliding):
    """Label map (X, Y, Z) uint8 on the grid of the case's image. BadVolume for a file that cannot be used."""
    made = data.load_case(case, settings)
    with autocast():
        logits = segment.predict(net, made["image"], window, turns, **sliding)
    return segment.to_file_grid(logits, made["affine"], made["original_shape"], made["original_affine"])


def predict_all(args):
    """Predict and write every case: (cases with their "prediction", organs' names, what failed, facts for results.json)."""
    ranks = runtime.start(args.device)
    net, config = load_network(args.weights, ranks.device)
    settings = data.Preparation(tuple(config["spacing"]), config["modality"], tuple(config["hu_window"]))
    precision = runtime.pick_precision(args.precision, ranks.device)
    cases, seen = select_cases(args, config)
    images, out, failed = by_case([case["image"] for case in cases], case_name, "--data"), Path(args.out), {}
    names = config["labels"] or {i: f"label {i}" for i in range(config["num_classes"])}
    sources = {Path(case[kind]).resolve() for case in cases for kind in ("image", "label") if case[kind]}
    if clash := sources & {(out / f"{name}.nii.gz").resolve() for name in images}:
        raise ValueError(f"--out {out} would overwrite {min(clash)}: give another folder")
    for case in tqdm(cases, unit="case"):
        name = case_name(case["image"])
        try:
            label = predict_case(net, case, settings, tuple(config["crop"]),
                                 functools.partial(torch.autocast, ranks.device.type, precision, precision != torch.float32),
                                 range(4) if args.tta else (0,), overlap=args.overlap, blend=args.blend, batch=args.batch,
                                 stitch_on_cpu=args.stitch_on_cpu)
        except data.BadVolume as error:
            failed[name] = str(error)
            continue
        case["prediction"] = out / f"{name}.nii.gz"
        data.write_label(case["prediction"], label, case["image"])
        if args.export_test:
            export(Path(args.export_test), label, names, case["image"])
    facts = {"weights": args.weights, "weights_sha256": runtime.file_sha256(args.weights), "models": 1, "split": args.key,
             "data": args.data, "held_out": args.held_out, "seen_in_training": seen, "spacing": config["spacing"],
             "modality": config["modality"], "hu_window": config["hu_window"], "window": config["crop"], "overlap": args.overlap,
             "blend": args.blend, "tta": args.tta, "precision": str(precision)[6:]}
    return [case for case in cases if "prediction" in case], names, failed, facts


def export(folder, label, names, image):
    """Write one file of a BTCV submission: label0061.nii.gz for img0061.nii.gz, in BTCV's numbers."""
    codes, ids = list(ORGANS), organ_ids(names, "--weights")
    if not re.fullmatch(r"img\d+", case_name(image)) or not ids.keys() <= set(codes):
        raise ValueError(f"--export_test takes images named img0061.nii.gz and BTCV's organs; found {image}, {', '.join(ids)}")
    btcv = ["SP", "RK", "LK", "GB", "ESO", "LV", "STO", "AOR", "IVC", "SPV", "Pan", "RA", "LA"]
    table = np.zeros(256, np.uint8)
    table[list(ids.values())] = [btcv.index(code) + 1 for code in ids]
    folder.mkdir(parents=True, exist_ok=True)
    data.write_label(folder / f"label{case_key(image)}.nii.gz", table[label.numpy()], image)


def find_predictions(args):
    """Pair another system's files with labels: (cases with their "prediction", names, what failed, facts)."""
    labels = data.read_list(args.labels, args.key)
    labels = by_case([case["label"] or case["image"] for case in labels], case_key, args.labels)
    files = by_case([case["image"] for case in data.read_list(args.predictions)], case_key, args.predictions)
    theirs = folder_names(args.labels, args.names)
    names = folder_names(args.predictions, None) or theirs
    failed = {case_name(label): f"{label}: has no prediction in {args.predictions}" for key, label in labels.items() if key not in files}
    cases = [{"image": files[key], "prediction": files[key], "label": label, "names": theirs} for key, label in labels.items() if key in files]
    return cases, names, failed, {"predictions": args.predictions, "labels_of": args.labels, "split": args.key}


# -------------------------------------------------------------------------------------------------------------- scores
def score_case(case, names, tolerance_mm):
    """A row for each organ that the case's label names and the prediction knows, on the label's own grid.

    ValueError for a label or prediction that is damaged, of another grid, or holds numbers without a name.
    """
    label, affine = data.read_label(case["label"])
    pred, _ = data.read_label(case["prediction"], allow_empty=True)
    data.check_cases([{"image": str(case["prediction"]), "label": case["label"]}], labels=True)
    numbers = np.unique(label).tolist() + np.unique(pred).tolist()
    given = case["names"] or names or {i: f"label {i}" for i in range(max(numbers) + 1)}
    mine, theirs = organ_ids(names or given, "prediction"), organ_ids(given, "labels")
    for array, ids, path in ((label, given, case["label"]), (pred, names or given, case["prediction"])):
        if unnamed := set(np.unique(array).tolist()) - set(ids) - {0}:
            raise ValueError(f"{path}: holds the numbers {sorted(unnamed)}, which have no name; give the right dataset.json")
    spacing, rows = transforms.spacing_of(affine), []
    for code in (code for code in mine if code in theirs):
        p, truth = pred.numpy() == mine[code], label.numpy() == theirs[code]
        distances = metrics.surface_distances(p, truth, spacing)
        millilitres = float(np.prod(spacing)) / 1000
        rows.append({"case": case_name(case["prediction"]), "organ": code, "dice": float(metrics.dice(p, truth, 2)[0]),
                     "hd95_mm": metrics.hausdorff_95(*distances), "surface_dice": metrics.share_within(*distances, tolerance_mm),
                     "prediction_ml": p.sum() * millilitres, "label_ml": truth.sum() * millilitres})
    if not rows:
        raise ValueError(f"{case['label']}: none of its organs, {', '.join(theirs)}, is among the predicted, {', '.join(mine)}")
    return rows


def columns(rows, score):
    """{column: values over cases, nan where absent}: organs in the paper's order if all 13 are there, and its averages."""
    organs, cases = (list(dict.fromkeys(row[name] for row in rows)) for name in ("organ", "case"))
    found = {(row["case"], row["organ"]): row[score] for row in rows}
    table = {code: np.array([found.get((case, code), math.nan) for case in cases])
             for code in (ORGANS if set(organs) == set(ORGANS) else organs)}

    def mean(*parts):
        finite = np.ma.masked_invalid(np.stack(parts))
        return finite.mean(0).filled(math.nan)
    average = mean(*table.values())
    if set(organs) == set(ORGANS):                                   # Table 1 has AG for both glands, Table 2 RA and LA
        glands = mean(table["RA"], table["LA"])
        return {**table, "AG": glands, "AVG": average, "AVG12": mean(glands, *list(table.values())[:11])}
    return {**table, "AVG": average}


def summary(rows, score):
    """{column: {mean, low, high (95 % bootstrap interval over cases), n, misses}}; an AVG is the mean of its columns."""
    result, values = {}, columns(rows, score)
    for name, cases in values.items():
        finite = cases[np.isfinite(cases)]
        low, high = metrics.bootstrap_interval(finite)
        result[name] = {"mean": float(finite.mean()) if len(finite) else math.nan, "low": low, "high": high,
                        "n": len(finite), "misses": int(np.isinf(cases).sum())}
    for name, parts in (("AVG", set(values) - {"AG", "AVG", "AVG12"}), ("AVG12", set(values) - {"RA", "LA", "AVG", "AVG12"})):
        if name in result:
            result[name]["mean"] = float(np.nanmean([result[part]["mean"] for part in parts]))
    return result


def markdown(header, rows):
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in [header, ["---"] * len(header), *rows]) + "\n"


def table_text(scores, tolerance_mm):
    """table.md: per score its mean, interval and misses, one column per organ."""
    rows = []
    for score, title, digits in (("dice", "DSC", 3), ("hd95_mm", "HD95, mm", 1), ("surface_dice", f"surface Dice, {tolerance_mm:g} mm", 3)):
        cells = scores[score].values()
        rows.append([title, *(f"{cell['mean']:.{digits}f}" for cell in cells)])
        rows.append(["95 % interval", *(f"{cell['low']:.{digits}f}-{cell['high']:.{digits}f}" for cell in cells)])
    rows.append(["misses", *(cell["misses"] for cell in scores["hd95_mm"].values())])
    return markdown(["", *scores["dice"]], rows)


def without_nan(value):
    """The same for JSON, which knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path, text):
    runtime.atomic_write(path, lambda file: file.write(text.encode()))


def write_results(out, rows, names, failed, facts, tolerance_mm):
    """cases.csv, table.md and, last, results.json."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{cell:.6g}" if isinstance(cell, float) else cell for name, cell in row.items()} for row in rows)
    write(out / "cases.csv", lines.getvalue())
    scores = {score: summary(rows, score) for score in ("dice", "hd95_mm", "surface_dice")} if rows else {}
    text = table_text(scores, tolerance_mm) if rows else "no case was scored\n"
    write(out / "table.md", text)
    scored = list(dict.fromkeys(row["case"] for row in rows))
    write(out / "results.json", json.dumps(without_nan({
        **facts, "n": len(scored), "cases": scored, "failed": failed, "labels": names, "absent_organs": ABSENT,
        "tolerance_mm": tolerance_mm, "scores": scores}), indent=1))
    return text


def compare(folders, out):
    """Paired tests of two result folders' Dice per organ and of the cases' mean; writes OUT/compare.md, returns it."""
    found = []
    for folder in folders:
        try:
            with open(Path(folder, "cases.csv"), newline="") as file:
                found.append({(row["case"], row["organ"]): float(row["dice"]) for row in csv.DictReader(file)})
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{folder}: its cases.csv cannot be read ({error}); give two folders that evaluate.py wrote") from None
    both = [pair for pair in found[0] if pair in found[1]]
    if not both:
        raise ValueError(f"{' and '.join(folders)} have no case and organ in common")
    left, right = (columns([{"case": case, "organ": code, "dice": scores[case, code]} for case, code in both], "dice") for scores in found)
    rows = []
    for name in left:
        test = metrics.paired_test(left[name], right[name])
        rows.append([name, test["n"], *(f"{np.nanmean(side[name]):.3f}" for side in (left, right)), f"{test['mean_difference']:+.3f}",
                     f"{test['low']:+.3f} to {test['high']:+.3f}", f"{test['p']:.3g}"])
    text = markdown(["", "n", *folders, "difference", "95 % interval (paired bootstrap)", "p (Wilcoxon)"], rows)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "compare.md", text)
    alone = len(found[0]) + len(found[1]) - 2 * len(both)
    return text + (f"\n{alone} rows of cases.csv are in one folder alone and were left out\n" if alone else "")


def main(args):
    out = Path(args.out)
    if args.compare:
        return print(compare(args.compare, out))
    out.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)                         # of an earlier run: results are whole or absent
    cases, names, failed, facts = predict_all(args) if args.weights else find_predictions(args)
    rows, labelled = [], [case for case in cases if case["label"]]
    for case in labelled:
        try:
            rows += score_case(case, names, args.tolerance_mm)
        except ValueError as error:
            failed[case_name(case["prediction"])] = str(error)
    text = write_results(out, rows, names, failed, facts, args.tolerance_mm)
    print(f"{text}\n{len(cases)} predictions, {len(labelled)} with a label; results in {out}")
    for reason in failed.values():
        print(f"not done: {reason}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(cases) + len(failed)} cases failed: {', '.join(failed)}")


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
