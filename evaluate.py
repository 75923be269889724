"""Predict organs with a fine-tuned network, and score predictions against labels [SMIT 3].

    python evaluate.py --weights runs/finetune/best.pt --data dataset.json     # predict and score
    python evaluate.py --weights best.pt --data scan.nii.gz                    # no label needed
    python evaluate.py --weights best.pt --data dataset.json --key training --held_out  # a fold's
    python evaluate.py --weights fold0.pt fold1.pt --data scan.nii.gz          # the mean of two
    python evaluate.py --predictions DIR --labels dataset.json                 # another system
    python evaluate.py --compare DIR_A DIR_B                                   # paired test

Writes OUT/{case}.nii.gz (uint8, on the grid of its image), OUT/cases.csv (a row per case and
organ), OUT/results.json, OUT/table.md and OUT/index.html (the worst, median and best case; in the
folder of a training run OUT/evaluation.html). Organs are matched by name, never by number. Cases
that cannot be predicted or scored are listed, and the exit code is 2. Killed at any time it leaves
whole predictions and no results.json; the same command makes everything anew. It replaces no file
that no evaluation wrote: OUT/.written.json lists those that did come from one.
"""
import hashlib
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from smit import data, figures, inference, runtime, scoring, settings
from smit.data import cases as case_files
from smit.data.concerns import enumerate_names
from smit.data.organs import btcv_numbers, case_key, case_names, numbered, those_among

WRITTEN = ".written.json"      # in --out: the files that evaluations wrote, and may write again
# settings of the network's run that results.json records
RECORDED = ("spacing", "modality", "hu_window", "hu_offset", "crop")


def parse_arguments(argv=None):
    return settings.parse_evaluation(__doc__, argv)


# -------------------------------------------------------------------- networks, cases
def load_networks(paths, device):
    """Load networks of finetune.py that prepare volumes alike and number organs alike."""
    nets = [inference.load_network(path, device) for path in paths]
    inference.check_alike(nets)
    return nets


def digest_of(path):
    """Return the SHA-256 of a file, in hexadecimal digits; "" where there is none to read."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""


def class_names(config, names_path=None):
    """Name a network's classes, {number: organ}: as its run did, or as the JSON --names does.

    None if neither has names.
    """
    given = scoring.given_names(names_path) if names_path else None
    labels = scoring.own_or_given(config["labels"], given, "the network of --weights")
    return {**numbered(config["num_classes"]), **labels} if labels else None


def select_cases(args, nets):
    """Choose the cases to predict: (cases, names of those that training has seen).

    A case has a "name" of its own, its list as "source", and the "names" of the list's labels,
    {number: organ} or None.
    """
    given = scoring.given_names(args.names) if args.names else None
    cases = []
    for path in args.data:
        names = scoring.own_or_given(data.label_names(path, ignore=True), given, path)
        for case in data.read_list(path, args.key, args.data_root, nets[0].config["modality"]):
            case |= {"names": names, "source": path}
            cases.append(case)

    for net in nets if args.held_out else ():
        held_back = those_among([case["image"] for case in cases], net.config["held_back"])
        cases = [case for case in cases if case["image"] in held_back]
    settings.require(cases, f"--held_out: none of {', '.join(args.data)} ({args.key}) was held "
                            f"back from {', '.join(args.weights)}")
    for case, name in zip(cases, case_names([case["image"] for case in cases])):
        case["name"] = name

    trained = [identity for net in nets for identity in net.config["train"]]
    trained = those_among([case["image"] for case in cases], trained)
    seen = [case["name"] for case in cases if case["image"] in trained]
    if seen:
        print(f"warning: training saw images of the same name as {len(seen)} of {len(cases)} "
              f"cases: {', '.join(seen)}")
    return cases, seen


def name_problems(cases, names, weights):
    """Return what keeps labels from being scored by name, a line for each list that has some."""
    names_of = {case["source"]: case["names"] for case in cases if case["label"]}
    problems = []
    for source, label_names in names_of.items():
        try:
            scoring.check_names(label_names, names, source, ", ".join(weights))
        except ValueError as error:
            problems.append(str(error))
    return problems


def number_problems(cases):
    """Return a line for each label that holds numbers without a name.

    Reads every label that has names. A damaged one is left out here: it fails when it is scored.
    """
    problems = []
    labelled = [case for case in cases if case["label"] and case["names"]]
    for case in tqdm(labelled, desc="labels", unit="label", disable=None):
        try:
            scoring.check_numbers(case)
        except data.BadVolume:
            continue
        except ValueError as error:
            problems.append(str(error))
    return problems


def tell_unlabelled(cases):
    """Tell how many cases have no label: maybe their list names it under another key."""
    count = sum(not case["label"] for case in cases)
    if count:
        data.note(f"{count} of {data.count(len(cases), 'case')} without a label, to be predicted "
                  "and not scored; a JSON names a label under 'label', a text list after its image")


def check(args):
    """Read the weights, and every case of --data; ValueError names all that is wrong."""
    nets = load_networks(args.weights, "cpu")
    cases, _ = select_cases(args, nets)
    problems = name_problems(cases, class_names(nets[0].config, args.names), args.weights)
    problems += number_problems(cases)
    tell_unlabelled(cases)
    data.check_voxels(cases, nets[0].preparation, labels=None, problems=problems)
    print(f"checked: {data.count(len(cases), 'case')}, {data.verdict()}")


# ---------------------------------------------------------------------------- predict
class Export:
    """Write predictions a second time, in BTCV's numbers and under its names, for a submission.

    folder: where to, or None to write nothing. ValueError where an organ or an image has no place.
    """

    def __init__(self, folder, names, cases):
        self.folder = Path(folder) if folder else None
        if self.folder:
            self.numbers = btcv_numbers(names or {}, [case["image"] for case in cases])
            self.folder.mkdir(parents=True, exist_ok=True)

    def target(self, case):
        return self.folder / f"label{case_key(case['name'])}.nii.gz"

    def write(self, case, label):
        if self.folder:
            data.write_label(self.target(case), self.numbers[np.asarray(label)], case["image"])


def check_files(case):
    """Return what is odd about the headers of a case's image, and of its label if it has one.

    BadVolume unless they are good.
    """
    return case_files.check_headers(case, labels=bool(case["label"]))


def tell_before(cases):
    """Tell what is odd or wrong about the cases' headers: now, not after an hour's predictions."""
    results = case_files.examine(cases, check_files)
    data.tell([concern for _, found in results for concern in found or ()], names=None)
    for problem, _ in results:
        if problem:
            print(f"warning: {problem}", flush=True)


def refuse_overwriting(args, cases, targets):
    """Raise ValueError if one of `targets` is a file that was given, or one of the cases' own."""
    sources = {Path(path).resolve() for path in
               (*args.data, *(args.weights or ()), args.labels, args.names) if path}
    for case in cases:
        sources |= {Path(case[kind]).resolve() for kind in ("image", "label") if case[kind]}
    clash = sources & {path.resolve() for path in targets}
    settings.require(not clash, f"--out or --export_test would overwrite {min(clash, default='')}: "
                                "give another folder")
    # the labels of images that a folder gave, for one
    own = written_before(Path(args.out))
    foreign = [path.name for path in targets if path.exists() and path.resolve() not in own]
    settings.require(not foreign, "--out or --export_test would overwrite "
                                  f"{data.count(len(foreign), 'file')} that no evaluation wrote "
                                  f"there ({enumerate_names(foreign)}): give another folder")


def written_before(out):
    """Return the paths of what evaluations wrote in a folder: a set."""
    own = set()
    if (out / WRITTEN).is_file():
        own |= {out / name for name in data.read_json(out / WRITTEN).get("files", ())}
    if (out / "results.json").is_file():                 # of a version that kept no list
        results = data.read_json(out / "results.json")
        if "absent_organs" in results:
            own |= {out / name for name in results.get("predicted", ())}
            own |= {*scoring.result_files(out)}
    return {path.resolve() for path in own}


def note_writing(out, targets):
    """Write down what is going to be written: the next evaluation may write it again."""
    files = written_before(out) | {path.resolve() for path in targets}
    content = json.dumps({"files": sorted(map(str, files))}, indent=1)
    runtime.atomic_write(out / WRITTEN, content.encode())


def clear(out, targets, exported):
    """Remove what an earlier evaluation left under the names that this one will write.

    A file of a case's name is then of these weights, whatever fails or is killed. Predictions of
    other cases stay, and are told. ValueError where they would be submitted with these.
    """
    earlier = others_beside(targets)
    if earlier:
        data.note(f"{out} also holds {data.count(len(earlier), 'prediction')} of other cases "
                  f"({enumerate_names(earlier)}), which this evaluation leaves alone and does not "
                  "count")
    earlier = others_beside(exported)
    settings.require(not earlier, "--export_test: its folder also holds "
                                  f"{data.count(len(earlier), 'prediction')} of other cases "
                                  f"({enumerate_names(earlier)}), maybe of another network; give "
                                  "an empty folder")
    scoring.clear(out)
    for path in targets + exported:
        path.unlink(missing_ok=True)


def others_beside(targets):
    """Return the names of further volumes in the folder of these files."""
    if not targets:
        return []
    volumes = {path.name for path in targets[0].parent.glob("*.nii.gz")}
    return sorted(volumes - {path.name for path in targets})


def predict_all(args, device):
    """Predict and write every case: (cases that have a "prediction", what failed, facts).

    What failed is {case: reason}; facts are what results.json records. ValueError before the first
    prediction if labels, or numbers in them, could not be scored for want of names.
    """
    digests = [digest_of(path) for path in args.weights]
    nets = load_networks(args.weights, device)
    # a run that goes on may have replaced its best.pt meanwhile
    settings.require(digests == [digest_of(path) for path in args.weights],
                     "--weights changed while they were read: run this again")
    config = nets[0].config
    precision = runtime.Precision(args.precision, device).name
    cases, seen = select_cases(args, nets)
    names = class_names(config, args.names)
    problems = name_problems(cases, names, args.weights) or number_problems(cases)
    settings.require(not problems, "\n".join(problems))

    out = Path(args.out)
    export = Export(args.export_test, names, cases)
    targets = [out / f"{case['name']}.nii.gz" for case in cases]
    exported = [export.target(case) for case in cases] if export.folder else []
    everything = targets + exported + scoring.result_files(out)
    refuse_overwriting(args, cases, everything)
    tell_before(cases)

    note_writing(out, everything)
    clear(out, targets, exported)
    size = sum(parameter.numel() for parameter in nets[0].parameters())
    print(f"{data.count(len(cases), 'case')}, {data.count(len(nets), 'network')} of {size:,} "
          f"parameters in windows of {config['crop']}, {config['num_classes']} classes; "
          f"{device.type}, {precision}", flush=True)

    failed = {}
    bar = tqdm(cases, unit="case", disable=None)
    for number, (case, target) in enumerate(zip(bar, targets), 1):
        if bar.disable:                      # output is no terminal: a line in place of the bar
            print(f"case {number} of {len(cases)}: {case['name']}", flush=True)
        try:
            label = inference.segment(nets, case["image"], tta=args.tta, precision=args.precision,
                                      overlap=args.overlap, blend=args.blend, batch=args.batch,
                                      stitch_on_cpu=args.stitch_on_cpu)
        except data.BadVolume as error:
            failed[case["name"]] = str(error)
            continue
        except ValueError as error:                      # of the network, which names no file
            failed[case["name"]] = f"{case['image']}: {error}"
            continue
        except (RuntimeError, MemoryError) as error:
            if not runtime.is_out_of_memory(error):
                raise
            failed[case["name"]] = (f"{case['image']}: {str(error) or 'no memory is left'}; give "
                                    "--stitch_on_cpu, or a smaller --batch")
            continue
        data.write_label(target, label, case["image"])
        export.write(case, label)
        case["prediction"] = target

    predicted = [case for case in cases if "prediction" in case]
    one = len(nets) == 1                     # of several networks, lists
    facts = {"weights": args.weights[0] if one else args.weights,
             "weights_sha256": digests[0] if one else digests, "models": len(nets),
             "data": args.data, "split": args.key, "held_out": args.held_out,
             "predicted": [case["prediction"].name for case in predicted],
             "seen_in_training": seen, **{name: config[name] for name in RECORDED},
             "overlap": args.overlap, "blend": args.blend, "tta": args.tta, "precision": precision}
    return predicted, names, failed, facts


# ------------------------------------------------------------------------------ score
def refuse_other_results(out):
    """Raise ValueError if a folder's results.json names the predictions that lie beside it."""
    results = out / "results.json"
    is_network = results.is_file() and "weights" in data.read_json(results)
    settings.require(not is_network, f"{out} holds the results of --weights, whose predictions "
                                     "would lose their names; give another --out")


def evaluate(args, out, device):
    """Predict, score, write, and tell what failed; ValueError if anything did."""
    if args.weights:
        cases, names, failed, facts = predict_all(args, device)
    else:
        cases, names, failed, facts = scoring.find_predictions(
            args.predictions, args.labels, args.key, args.names, args.data_root)
        refuse_other_results(out)
        refuse_overwriting(args, cases, scoring.result_files(out))
        note_writing(out, scoring.result_files(out))
        scoring.clear(out)
    labelled = [case for case in cases if case["label"]]
    facts["unmatched"] = scoring.unmatched(labelled, names)

    rows, odd = [], []
    for case in labelled:
        try:
            rows_of_case = scoring.score_case(case, names, args.tolerance_mm)
        except ValueError as error:
            failed[case["name"]] = str(error)
            continue
        rows += rows_of_case
        odd += scoring.case_concerns(case, rows_of_case)
    data.tell(odd, names=None)

    text = scoring.write_results(out, rows, names, failed, facts, args.tolerance_mm)
    figures.evaluation_report(out, cases, rows, names, facts)
    print(f"{text}\n{scoring.unmatched_text(facts['unmatched'])}"
          f"{data.count(len(cases), 'prediction')}, {len(labelled)} with a label; results in {out}")

    for reason in failed.values():
        print(f"not done: {reason}")
    everything = failed.keys() | {case["name"] for case in cases}
    settings.require(not failed, f"{len(failed)} of {data.count(len(everything), 'case')} failed: "
                                 f"{', '.join(failed)}")


def main(args):
    out = Path(args.out)
    if args.compare:
        print(scoring.compare(args.compare, out))
        return
    if args.check:
        check(args)
        return

    ranks = runtime.start(args.device)
    settings.require(ranks.world == 1, "evaluate.py is one process: start it without torchrun, on "
                                       "parts of the cases if need be")
    with runtime.OutputFolder(out, ranks, resume=True):     # one writer; a run's own files stay
        evaluate(args, out, ranks.device)


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
