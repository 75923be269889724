"""Predict organs with a fine-tuned network, and score any predictions against labels [SMIT 3, Tables 1 and 2].

    python evaluate.py --weights runs/finetune/best.pt --data dataset.json                # predict and score
    python evaluate.py --weights best.pt --data scan.nii.gz                               # predict: no label needed
    python evaluate.py --weights best.pt --data dataset.json --key training --held_out    # what a fold held back
    python evaluate.py --weights fold*/best.pt --data scan.nii.gz                         # the folds' mean softmax
    python evaluate.py --predictions DIR --labels dataset.json                            # score another system
    python evaluate.py --compare DIR_A DIR_B                                              # paired test of two results

Writes OUT/{case}.nii.gz (uint8, on the grid of its image), OUT/cases.csv (a row per case and organ), OUT/results.json,
OUT/table.md and OUT/index.html (the worst, median and best case). Cases that cannot be predicted or scored are listed,
and the exit code is 2. Organs are matched by name, never by number. All headers are checked first and what is wrong
with them is told; the good cases are predicted. Killed at any time it leaves whole predictions and no results.json;
the same command makes everything anew.
"""
import hashlib
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from smit import data, figures, inference, runtime, scoring, settings
from smit.data.organs import CODES, case_key, case_name, numbered, organ_ids


def parse_arguments(argv=None):
    return settings.parse_evaluation(__doc__, argv)


def by_case(paths, key, where):
    """{key(path): path}; ValueError where two files are one case."""
    found = {}
    for path in paths:
        if found.setdefault(key(path), path) != path:
            raise ValueError(f"{where}: {path} and {found[key(path)]} are both case {key(path)}; rename or drop one")
    return found


def load_networks(paths, device):
    """Load networks of finetune.py that prepare volumes and number organs alike."""
    nets = [inference.load_network(path, device) for path in paths]
    inference.check_alike(nets)
    return nets


def select_cases(args, nets):
    """The cases to predict, each with the "names" of its list, {id: name} or None; and those that training has seen."""
    cases = [{**case, "names": data.label_names(path), "file": Path(case["image"]).name}
             for path in args.data for case in data.read_list(path, args.key)]
    if args.held_out:
        cases = [case for case in cases if all(case["file"] in net.config["held_back"] for net in nets)]
    if not cases:
        raise ValueError(f"--held_out: none of {', '.join(args.data)} ({args.key}) was held back from "
                         f"{', '.join(args.weights)}")
    seen = [case_name(case["file"]) for case in cases if any(case["file"] in net.config["train"] for net in nets)]
    if seen:
        print(f"warning: training saw images of the same name as {len(seen)} of {len(cases)} cases: {', '.join(seen)}")
    return cases, seen


def check(args):
    """--check: the weights, every header, voxel and label of --data; ValueError names all that is wrong."""
    nets = load_networks(args.weights, "cpu")
    cases, _ = select_cases(args, nets)
    data.check_voxels(cases, nets[0].preparation, labels=None)
    print(f"checked: {len(cases)} cases, all good")


def predict_all(args, device):
    """Predict and write every case: (cases with their "prediction", organs' names, what failed, facts to record)."""
    runtime.keep_freed_memory(device)
    nets = load_networks(args.weights, device)
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in args.weights]  # now: a run may go on
    config, precision = nets[0].config, runtime.Precision(args.precision, device).name
    cases, seen = select_cases(args, nets)
    out, failed, names = Path(args.out), {}, config["labels"] or numbered(config["num_classes"])
    targets = [out / f"{name}.nii.gz" for name in by_case([case["image"] for case in cases], case_name, "--data")]
    written = [*targets]
    if args.export_test:
        table, exports = btcv_numbers(names, [case["image"] for case in cases]), Path(args.export_test)
        exports.mkdir(parents=True, exist_ok=True)
        written += [exports / f"label{case_key(target)}.nii.gz" for target in targets]
    sources = {Path(case[kind]).resolve() for case in cases for kind in ("image", "label") if case[kind]}
    if clash := sources & {path.resolve() for path in written}:
        raise ValueError(f"--out or --export_test would overwrite {min(clash)}: give another folder")
    for problem in data.find_problems(cases, lambda case: data.check_case(case, bool(case["label"]))):
        print(f"warning: {problem}", flush=True)                         # now, not after an hour's predictions
    scoring.clear(out)
    networks = "network" if len(nets) == 1 else f"{len(nets)} networks, the first"
    print(f"{len(cases)} cases, {networks} of {sum(p.numel() for p in nets[0].parameters()):,} parameters in windows "
          f"of {config['crop']}, {config['num_classes']} classes; {device.type}, {precision}", flush=True)
    bar = tqdm(cases, unit="case", disable=None)
    for number, (case, target) in enumerate(zip(bar, targets), 1):
        if bar.disable:                                              # output is no terminal: a line in place of the bar
            print(f"case {number} of {len(cases)}: {case_name(target)}", flush=True)
        try:
            label = inference.segment(nets, case["image"], tta=args.tta, precision=args.precision,
                                      overlap=args.overlap, blend=args.blend, batch=args.batch,
                                      stitch_on_cpu=args.stitch_on_cpu)
        except data.BadVolume as error:
            failed[case_name(target)] = str(error)
            continue
        data.write_label(target, label, case["image"])
        case["prediction"] = target
        if args.export_test:
            data.write_label(exports / f"label{case_key(target)}.nii.gz", table[label.numpy()], case["image"])
    one = len(nets) == 1                                                 # of several networks, lists
    facts = {"weights": args.weights[0] if one else args.weights,
             "weights_sha256": digests[0] if one else digests, "models": len(nets),
             "data": args.data, "split": args.key, "held_out": args.held_out, "seen_in_training": seen,
             **{name: config[name] for name in ("spacing", "modality", "hu_window", "crop")}, "overlap": args.overlap,
             "blend": args.blend, "tta": args.tta, "precision": precision}
    return [case for case in cases if "prediction" in case], names, failed, facts


def btcv_numbers(names, images):
    """(256,) uint8: BTCV's number of each of ours, for a submission; ValueError where one or an image has no place."""
    ids = organ_ids(names, "--weights")
    odd = [image for image in images if not re.fullmatch(r"img\d+", case_name(image))]
    if odd or not ids.keys() <= CODES.keys():
        raise ValueError(f"--export_test takes images named as img0061.nii.gz, and BTCV's organs: {odd[:1]}, {[*ids]}")
    table = np.zeros(256, np.uint8)
    table[list(ids.values())] = [list(CODES).index(name) + 1 for name in ids]
    return table


def folder_names(path):
    """{id: name} for a folder of label files, of its results.json or dataset.json; or of a JSON itself; or None."""
    near = (Path(path), Path(path, "results.json"), Path(path, "dataset.json"), Path(path).parent / "dataset.json")
    return next((data.label_names(file) for file in near if file.is_file() and file.suffix == ".json"), None)


def find_predictions(args):
    """Pair another system's files with labels: (cases with their "prediction", names, what failed, facts)."""
    listed = data.read_list(args.labels, args.key)
    folder = Path(args.labels).is_dir()                              # its files are the labels themselves
    labels = [case["image" if folder else "label"] for case in listed if folder or case["label"]]
    labels = by_case(labels, case_key, args.labels)
    files = by_case([case["image"] for case in data.read_list(args.predictions)], case_key, args.predictions)
    theirs = data.label_names(args.names) if args.names else folder_names(args.labels)
    failed = {case_name(label): f"{label}: has no prediction in {args.predictions}"
              for key, label in labels.items() if key not in files}
    cases = [{"image": files[key], "prediction": files[key], "label": label, "names": theirs}
             for key, label in labels.items() if key in files]
    names = data.label_names(args.names) if args.names else folder_names(args.predictions) or theirs
    return cases, names, failed, {"predictions": args.predictions, "labels_of": args.labels, "split": args.key}


def main(args):
    out = Path(args.out)
    if args.compare:
        return print(scoring.compare(args.compare, out))
    if args.check:
        return check(args)
    ranks = runtime.start(args.device)
    if ranks.world > 1:
        raise ValueError("evaluate.py is one process: start it without torchrun, on parts of the cases if need be")
    with runtime.OutputFolder(out, ranks, resume=True):                  # one writer; a run's own files stay
        evaluate(args, out, ranks.device)


def evaluate(args, out, device):
    """Predict, score, write, tell what failed; ValueError if anything did."""
    cases, names, failed, facts = predict_all(args, device) if args.weights else find_predictions(args)
    rows, labelled = [], [case for case in cases if case["label"]]
    for case in labelled:
        try:
            rows += scoring.score_case(case, names, args.tolerance_mm)
        except ValueError as error:
            failed[case_name(case["prediction"])] = str(error)
    text = scoring.write_results(out, rows, names, failed, facts, args.tolerance_mm)
    figures.evaluation_report(out, cases, rows, names, facts)
    print(f"{text}\n{len(cases)} predictions, {len(labelled)} with a label; results in {out}")
    for reason in failed.values():
        print(f"not done: {reason}")
    if failed:
        everything = failed.keys() | {case_name(case["prediction"]) for case in cases}
        raise ValueError(f"{len(failed)} of {len(everything)} cases failed: {', '.join(failed)}")


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
