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
from pathlib import Path

from tqdm import tqdm

from smit import data, figures, inference, runtime, scoring, settings
from smit.data.organs import btcv_numbers, case_key, case_names, is_among, numbered


def parse_arguments(argv=None):
    return settings.parse_evaluation(__doc__, argv)


def load_networks(paths, device):
    """Load networks of finetune.py that prepare volumes and number organs alike."""
    nets = [inference.load_network(path, device) for path in paths]
    inference.check_alike(nets)
    return nets


def select_cases(args, nets):
    """Return the cases to predict, and the names of those that training has seen.

    Each has a "name" of its own, and the "names" of its list's labels, {id: name} or None.
    """
    cases = []
    for path in args.data:
        names = data.label_names(path, ignore=True)
        for case in data.read_list(path, args.key, args.data_root):
            case["names"] = names
            cases.append(case)
    if args.held_out:
        for net in nets:
            held_back = set(net.config["held_back"])
            cases = [case for case in cases if is_among(case["image"], held_back)]
    if not cases:
        raise ValueError(f"--held_out: none of {', '.join(args.data)} ({args.key}) was held back "
                         f"from {', '.join(args.weights)}")
    for case, name in zip(cases, case_names([case["image"] for case in cases])):
        case["name"] = name

    train = {case for net in nets for case in net.config["train"]}
    seen = [case["name"] for case in cases if is_among(case["image"], train)]
    if seen:
        print(f"warning: training saw images of the same name as {len(seen)} of {len(cases)} cases: {', '.join(seen)}")
    return cases, seen


def check(args):
    """--check: the weights, every header, voxel and label of --data; ValueError names all that is wrong."""
    nets = load_networks(args.weights, "cpu")
    cases, _ = select_cases(args, nets)
    data.check_voxels(cases, nets[0].preparation, labels=None)
    print(f"checked: {data.count(len(cases), 'case')}, {data.verdict()}")


def predict_all(args, device):
    """Predict and write every case: (cases with their "prediction", organs' names, what failed, facts to record)."""
    runtime.keep_freed_memory(device)
    nets = load_networks(args.weights, device)
    # now, for a run may replace its best.pt
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in args.weights]
    config, precision = nets[0].config, runtime.Precision(args.precision, device).name
    cases, seen = select_cases(args, nets)
    out, failed, names = Path(args.out), {}, network_names(config)
    targets = [out / f"{case['name']}.nii.gz" for case in cases]
    written = [*targets]
    if args.export_test:
        table, exports = btcv_numbers(names or {}, [case["image"] for case in cases]), Path(args.export_test)
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
            print(f"case {number} of {len(cases)}: {case['name']}", flush=True)
        try:
            label = inference.segment(nets, case["image"], tta=args.tta, precision=args.precision,
                                      overlap=args.overlap, blend=args.blend, batch=args.batch,
                                      stitch_on_cpu=args.stitch_on_cpu)
        except data.BadVolume as error:
            failed[case["name"]] = str(error)
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


def network_names(config):
    """Return {id: organ} of a network's classes, those without a name by their numbers; None if it has no names."""
    if not config["labels"]:
        return None
    return {**numbered(config["num_classes"]), **config["labels"]}


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
    if args.weights:
        cases, names, failed, facts = predict_all(args, device)
    else:
        cases, names, failed, facts = scoring.find_predictions(args.predictions, args.labels, args.key, args.names)
    labelled = [case for case in cases if case["label"]]
    facts["unmatched"] = scoring.unmatched(labelled, names)
    rows = []
    for case in labelled:
        try:
            rows += scoring.score_case(case, names, args.tolerance_mm)
        except ValueError as error:
            failed[case["name"]] = str(error)
    text = scoring.write_results(out, rows, names, failed, facts, args.tolerance_mm)
    figures.evaluation_report(out, cases, rows, names, facts)
    print(f"{text}\n{scoring.unmatched_text(facts['unmatched'])}"
          f"{data.count(len(cases), 'prediction')}, {len(labelled)} with a label; results in {out}")
    for reason in failed.values():
        print(f"not done: {reason}")
    if failed:
        everything = failed.keys() | {case["name"] for case in cases}
        raise ValueError(f"{len(failed)} of {data.count(len(everything), 'case')} failed: {', '.join(failed)}")


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
