"""The labelled cases of a fine-tuning run: found, split, prepared [SMIT 3].

args: the settings of finetune.py, in all functions.
"""
import collections
import filecmp
import functools
import math
import os

import numpy as np

from smit.data import concerns, lists, organs, samples
from smit.data.cases import (
    cached, check_cases, check_named, examine, prepare_ahead, preparation_of, raise_problems,
    stamp)
from smit.data.concerns import Concern
from smit.data.lists import has_split, label_names, lists_labels, split_keys
from smit.data.nifti import pair
from smit.settings import require

VAL_KEY = "validation"                 # default of --val_key, which a list may lack


def read_lists(args, sources):
    """Read all lists: (cases of --key, cases of --val_key where a list has it, what is wrong).

    A --val_key that is not the default and is in no list is wrong. ValueError for a folder without
    a dataset.json and for a single image, which name no labels.
    """
    for path in sources:
        require(lists_labels(path), f"{path}: names no labels; give a dataset.json, or a text list "
                                    "with an image and its label on a line")
    cases, problems = lists.read_lists(sources, args.key, args.data_root, args.modality)
    with_val_key = [path for path in sources if has_split(path, args.val_key, args.data_root)]
    if not with_val_key and args.val_key != VAL_KEY:
        problems.append(missing_val_key(args, sources))
    listed, more_problems = lists.read_lists(with_val_key, args.val_key, args.data_root,
                                             args.modality)
    return cases, listed, problems + more_problems


def missing_val_key(args, sources):
    """Say that no list has the cases of --val_key, and which keys there are."""
    keys = []
    for path in sources:
        keys += [key for key in split_keys(path, args.data_root) if key not in keys]
    there = f"the keys with cases are {', '.join(map(repr, keys))}" if keys else "no key has cases"
    return (f"{', '.join(map(str, sources))}: no cases under {args.val_key!r}, the --val_key; "
            f"{there}; name one of them, or drop the flag")


def split_cases(args, cases, listed):
    """Decide which cases to train on and which to hold back."""
    if args.split:
        # the published split decides, and a case may stand under both keys
        distinct = {os.path.realpath(case["image"]): case for case in cases + listed}
        return samples.published_split([*distinct.values()], args.split)
    if args.fold is not None:
        return samples.fold_split(cases, args.fold, args.folds)
    if listed:
        return cases, listed
    held_back = math.ceil(args.val_fraction * len(cases))
    if held_back:
        concerns.note(f"no list has cases under {args.val_key!r}: {held_back} of {len(cases)}, "
                      "drawn at random, are held back, by --val_fraction")
    return samples.random_split(cases, held_back, args.seed)


def organ_names(sources):
    """Read {id: organ}, which all sources must share, or {} where none names its labels.

    ValueError where they differ, or where two numbers are one organ.
    """
    names = [label_names(path) for path in sources]
    # refuses two numbers of one organ; the background may be named or not
    ids = [found and organs.organ_ids(found, path) for path, found in zip(sources, names)]
    require(all(other == ids[0] for other in ids),
            f"{', '.join(sources)} number their labels differently: train on one of them")
    return names[0] or {}


def count_classes(args, names):
    """Count the labels, the background among them: as asked for, as named, or 14 [SMIT 3]."""
    return args.num_classes or max(names, default=13) + 1


def find_cases(args, sources):
    """Find the labelled cases of all sources: (to train on, held back, {id: organ})."""
    cases, listed, problems = read_lists(args, sources)
    if problems:
        check_cases(cases + listed, True, problems=problems)    # files' and lists', all at once

    train, held_back = choose_cases(args, cases, listed, sources)
    return train, held_back, organ_names(sources)


def choose_cases(args, cases, listed, sources):
    """Split the cases, and take as many to train on as are asked for: (to train on, held back).

    ValueError if none is left, if a case is on both sides, or if there are too few. Tells of files
    that are on both sides.
    """
    train, held_back = split_cases(args, cases, listed)
    require(train, f"{', '.join(sources)}: no case is left to train on")
    trained_on = {os.path.realpath(case["image"]) for case in train}
    in_both = [case["image"] for case in held_back
               if os.path.realpath(case["image"]) in trained_on]
    require(not in_both, f"{', '.join(in_both[:3])}: to train on, and held back as well, "
                         f"{len(in_both)} of {len(held_back)}; keep each in one list")
    if args.num_train is not None:
        seed = args.seed if args.subset_seed is None else args.subset_seed
        train = samples.nested_subset(train, args.num_train, seed)
    concerns.tell(copied_images(train, held_back) + labels_on_both_sides(train, held_back))
    return train, held_back


def copied_images(train, held_back):
    """Return concerns about images held back that are files to train on under another name."""
    trained_on = collections.defaultdict(list)
    for case in train:
        _, voxels = pair(case["image"])
        trained_on[size_and_ends(voxels)].append(voxels)
    found = []
    for case in held_back:
        _, voxels = pair(case["image"])
        mark = size_and_ends(voxels)
        for alike in trained_on.get(mark, ()) if mark else ():
            # two volumes that are not packed may begin and end alike, in air
            if filecmp.cmp(voxels, alike, shallow=False):
                found.append(Concern(voxels, "is held back, and trained on under another name",
                                     alike, "keep it in one list, or the scores will be too good"))
    return found


def size_and_ends(path):
    """Return a file's size and the checksum of its ends, None if it cannot be read."""
    try:
        if not os.path.isfile(path):            # opening a pipe would wait for its writer
            return None
        _, size, _, _, checksum = stamp(path)
        return size, checksum
    except OSError:
        return None


def labels_on_both_sides(train, held_back):
    """Return concerns about labels of cases held back that are those of cases to train on."""
    trained_on = {os.path.realpath(case["label"]): case for case in train if case["label"]}
    found = []
    for case in held_back:
        other = trained_on.get(os.path.realpath(case["label"])) if case["label"] else None
        if other:
            images = f"of {case['image']} and {other['image']}"
            found.append(Concern(case["label"], "is the label of a case held back and of one to "
                                 "train on", images, "give each image its own label"))
    return found


def volumes(args, case, num_classes):
    """Return a case's prepared (image, label), each (D, H, W) uint8, as read-only memory maps."""
    return cached(case, preparation_of(args), args.cache, True, num_classes)


def numbers_of(case, args, num_classes, names):
    """Return the numbers in a case's prepared label; BadVolume for one that has no name."""
    _, label = volumes(args, case, num_classes)
    numbers = np.unique(label).tolist()
    check_named(case["label"], numbers, names)
    return numbers


def prepare_cases(args, train, held_back, num_classes, ranks):
    """Prepare this rank's share of all cases, so that what is wrong shows before step 1.

    ValueError if a label holds numbers that the list does not name. Organs that no training case
    has are told.
    """
    check_cases(train + held_back, True, workers=args.workers)     # by the headers: a moment
    prepare_ahead(train + held_back, preparation_of(args), args.cache, ranks, args.workers, True,
                  num_classes)

    # phantoms, which --data does not name, have no other numbers than they should
    names = organ_names(args.data) if args.data else {}
    check = functools.partial(numbers_of, args=args, num_classes=num_classes, names=names)
    trained_on = examine(train[ranks.rank::ranks.world], check)
    scored_on = examine(held_back[ranks.rank::ranks.world], check)
    problems = [problem for problem, _ in trained_on + scored_on if problem]
    raise_problems([problem for part in ranks.gather(problems) for problem in part])

    seen = [False] * num_classes
    for _, numbers in trained_on:
        for number in numbers:
            seen[number] = True
    seen = ranks.agree(*seen)
    missing = [organ for organ, found in enumerate(seen) if not found]
    if missing and ranks.is_main:
        highest = max(organ for organ, found in enumerate(seen) if found)
        way_out = ""
        if missing[-1] > highest:                       # a text list names no organs: 14 classes
            way_out = f"; if {highest} is the last organ, give --num_classes {highest + 1}"
        print(f"warning: no training case has label {missing}: the network cannot learn it"
              f"{way_out}")
