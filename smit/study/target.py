"""Make a study's target: some organs of labelled volumes, and test cases split off [ours].

    python -m smit.study.target --data btcv/dataset.json --out abdomen \\
        --organs 1=spleen "2=right kidney" "3=left kidney" 6=liver
    python -m smit.study.target --data openkbp.txt --test_every 5 --out neck \\
        --organs 1=brainstem "2=spinal cord" "3=right parotid" "4=left parotid"

Organs that are not named become background, and the others are numbered anew, 1, 2, ..., in the
order of their names here. Images stay where they are. With --test_every N every N-th case of the
list is a test case, and of the others those that have all organs are there to train on. Without it
the list's own splits stay.

Writes OUT/dataset.json, OUT/labels, and OUT/pool.txt, all images but those of test cases, to
pre-train on. Prints how many voxels an organ has at --spacing: one of a few dozen is learned or
not by luck.
"""
import argparse
import csv
import functools
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from smit import data, runtime, scoring
from smit.data.organs import case_names, organ_ids
from smit.settings import Help
from smit.study.carry import fold_of, read_splits


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--data", required=True, metavar="PATH",
        help="labelled volumes: a dataset.json, or a text list of images and their labels")
    add("--organs", required=True, nargs="+", metavar="NUMBER=NAME",
        help="labels to keep: their numbers in the files, and their names")
    add("--test_every", type=int, metavar="N",
        help="make every N-th case a test case; default: the list's own splits")
    add("--spacing", nargs=3, type=float, default=[6., 6., 6.], metavar="MM",
        help="of the voxels that organs are counted in; labels keep their grids [ours]")
    add("--out", required=True, help="folder to write, which must be new or empty")
    args = parser.parse_args(argv)

    entries = [entry.partition("=") for entry in args.organs]
    if not all(number.isdigit() and 0 < int(number) < 256 and name for number, _, name in entries):
        parser.error("--organs: give NUMBER=NAME, such as 1=spleen, with a number of 1 to 255")
    args.organs = {int(number): name for number, _, name in entries}
    if len(args.organs) < len(entries):
        parser.error("--organs: a number is there twice")
    try:
        organ_ids(args.organs, "--organs")
    except ValueError as error:
        parser.error(str(error))
    if args.test_every is not None and args.test_every < 2:
        parser.error("--test_every: give 2 or more, or no case is left to train on")
    return args


def main(args):
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is not an empty folder; give another --out")
    training, test = split(read_splits(args.data), args.test_every)
    cases = training + test
    data.check_cases(cases, labels=True)

    numbers = [*args.organs]
    bar = functools.partial(tqdm, unit="case", disable=None)
    sizes = np.array([organ_sizes(case["label"], numbers) for case in bar(cases)])
    tell_sizes(args, sizes)

    (out / "labels").mkdir(parents=True, exist_ok=True)
    names = case_names([case["image"] for case in cases])
    entries = []
    for case, name in bar([*zip(cases, names)]):
        label = f"labels/{name}.nii.gz"
        keep_organs(case["label"], out / label, numbers)
        entries.append({"image": case["image"], "label": label} | fold_of(case))

    to_train_on, to_test_on = entries[:len(training)], entries[len(training):]
    if args.test_every:
        has_all = (sizes > 0).all(axis=1)
        to_train_on = [entry for entry, whole in zip(to_train_on, has_all) if whole]
    modality = data.list_modality(args.data)
    write_lists(out, args.organs, modality, to_train_on, to_test_on)
    pool = [case["image"] for case in training]
    with open(out / "pool.txt", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([image] for image in pool)
    print(f"{data.count(len(to_train_on), 'case')} to train on, {len(to_test_on)} to test on, "
          f"{len(pool)} to pre-train on: {out / 'dataset.json'}, {out / 'pool.txt'}")
    if not to_test_on:
        runtime.warn_once("test cases", "no case is there to test on, and a study needs some: give "
                          "--test_every, or a list with cases under 'validation'")


def split(splits, test_every):
    """Part the cases of {"training": [...], "validation": [...]}: (training, test)."""
    training, test = splits["training"], splits.get("validation", [])
    if not test_every:
        return training, test
    training = training + test
    test = training[test_every - 1::test_every]
    del training[test_every - 1::test_every]
    return training, test


def organ_sizes(path, numbers):
    """Measure the organs of a label that have these numbers, in mm^3."""
    label, affine = data.read_label(path)
    voxels = np.bincount(label.numpy().ravel(), minlength=256)[numbers]
    return voxels * abs(np.linalg.det(affine[:3, :3]))


def keep_organs(path, copy, numbers):
    """Write a copy of a label with these organs alone, numbered anew."""
    label, _ = data.read_label(path)
    new_numbers = np.zeros(256, np.uint8)
    new_numbers[numbers] = np.arange(1, len(numbers) + 1)
    data.write_label(copy, new_numbers[label.numpy()], like=path)


def tell_sizes(args, sizes):
    """Print the organs' sizes, and how many cases lack one; ValueError for one that all lack.

    sizes: (cases, organs), in mm^3.
    """
    lines = []
    for (number, name), of_organ in zip(args.organs.items(), sizes.T):
        if not of_organ.any():
            raise ValueError(f"{args.data}: no label has the number {number}, {name}; repair "
                             "--organs")
        voxels = np.median(of_organ[of_organ > 0]) / np.prod(args.spacing)
        lines.append([name, f"{voxels:.0f}", int((of_organ == 0).sum())])
    print(scoring.markdown(["organ", "voxels, median", "cases without"], lines))


def write_lists(out, organs, modality, training, test):
    """Write OUT/dataset.json; without a modality where the source tells none."""
    labels = {str(number): name for number, name in enumerate(["background", *organs.values()])}
    content = {"modality": {"0": modality.upper()}} if modality else {}
    content |= {"labels": labels, "training": training}
    if test:
        content["validation"] = test
    (out / "dataset.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
