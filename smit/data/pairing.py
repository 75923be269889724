"""Pair predictions with cases, by the names of files and of their folders [ours].

Reading order: a side's files and their names, the pairs, what makes one, what is told and refused.
"""
import collections
import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

from smit.data import concerns
from smit.data.organs import case_key, case_names

KIND_FOLDER = "(images?|img|labels?)(tr|ts|va|val|te)?"  # names no patient [nnU-Net, BTCV]


class NamedFile(NamedTuple):
    """A file, the folders that it lies in, and the names that its case may go by."""
    path: str
    folders: frozenset                 # below the folder or list that was given
    name: str                          # its own, without folders
    names: set                         # all that its case may go by


class Side:
    """The files of one side, such as all predictions, with their names.

    s1/seg.nii.gz is named "seg" and "s1_seg", and beside s2/seg.nii.gz "s1" as well. place: the
    folder or list that the files come from.
    """

    def __init__(self, paths, place):
        self.files = []
        for path, distinct_name in zip(paths, case_names(paths)):
            folders, name = folders_below(path, place), case_key(path)
            names = {name, case_key(distinct_name), "_".join([*folders, name])}
            self.files.append(NamedFile(path, frozenset(folders), name, names))
        self.folders = {folder for file in self.files for folder in file.folders}
        counts = collections.Counter(file.name for file in self.files)
        self.repeated = {name for name, count in counts.items() if count > 1}


def folders_below(path, place):
    """Return the folders from a place down to a file, a list, without imagesTr and the like.

    Of a file that lies elsewhere, its own folder's.
    """
    root, folder = Path(os.path.abspath(place)), Path(path).parent
    root = root if root.is_dir() else root.parent
    parts = folder.relative_to(root).parts if folder.is_relative_to(root) else (folder.name,)
    return [case_key(part) for part in parts if not re.fullmatch(KIND_FOLDER, part, re.I)]


def label_sides(cases, labels):
    """Return the Sides by which a case may be known: its images, where a list has them; labels."""
    sides = []
    for kind in ("image", "label"):
        # two images of one patient may share a label
        paths = list(dict.fromkeys(case[kind] for case in cases))
        if all(paths):
            side = Side(paths, labels)
            of_path = dict(zip(paths, side.files))
            side.files = [of_path[case[kind]] for case in cases]
            sides.append(side)
    return sides


def pair(cases, sides, predictions, where):
    """Find the prediction of each case: {name of the case: NamedFile}, without those that lack one.

    sides: of `label_sides`; predictions: a Side; where: their folder. Names come first, and then
    the names of folders and nnU-Net's channel. ValueError where two predictions are of one case,
    or one may be of two.
    """
    pairs = pair_rest({}, cases, sides, predictions, have_common_name, where)
    # a folder in which another case's prediction lies is named after no case
    crowded = {folder for file in pairs.values() for folder in file.folders}
    is_match = functools.partial(have_common_folder, crowded=crowded)
    pairs |= pair_rest(pairs, cases, sides, predictions, is_match, where)
    tell_pairs_by_name_alone(pairs, cases, sides, where)
    return pairs


def pair_rest(pairs, cases, sides, predictions, is_match, where):
    """Find the predictions of cases that are not in `pairs`, among the files that are not."""
    taken = {file.path for file in pairs.values()}
    free = [file for file in predictions.files if file.path not in taken]
    matches = {}
    for number, case in enumerate(cases):
        if case["name"] not in pairs:
            matches[case["name"]] = matches_of(number, sides, predictions, free, is_match)
    refuse_ambiguous(matches, cases, where)
    return {name: files[0] for name, files in matches.items() if files}


def matches_of(number, sides, predictions, free, is_match):
    """Return those of the free predictions that can be of a case, by its image or its label."""
    matches = {}
    for side in sides:
        label = side.files[number]
        for file in free:
            if is_match(label, file) and not are_of_two_cases(side, label, predictions, file):
                matches[file.path] = file
    return list(matches.values())


def have_common_name(label, prediction):
    return not label.names.isdisjoint(prediction.names)


def have_common_folder(label, prediction, crowded):
    """Return whether one file is named as the other's folder, or but for nnU-Net's channel.

    crowded: folders of predictions that name no case.
    """
    channelless = {name.removesuffix("_0000") for name in prediction.names}
    return (not label.names.isdisjoint((prediction.folders - crowded) | channelless)
            or not prediction.names.isdisjoint(label.folders))


def are_alike_by_name_alone(label, prediction):
    """Return whether two files share their own name and no other, and lie in unlike folders."""
    are_nested = label.folders <= prediction.folders or prediction.folders <= label.folders
    return (not are_nested and label.name == prediction.name
            and label.names & prediction.names == {label.name})


def are_of_two_cases(labels, label, predictions, prediction):
    """Return whether the folders of two files tell that they are of two cases, whatever their name.

    Unlike folders do, as in s0/seg.nii.gz and s1/seg.nii.gz, if a side has that file name twice, if
    each side is one file, or if one of these folders is there on both sides.
    labels, predictions: the Sides of the two files.
    """
    if not are_alike_by_name_alone(label, prediction):
        return False
    are_alone = len(labels.files) == len(predictions.files) == 1
    if are_alone or label.name in labels.repeated | predictions.repeated:
        return True
    label_folders = label.folders - prediction.folders
    prediction_folders = prediction.folders - label.folders
    return bool(label_folders & predictions.folders or prediction_folders & labels.folders)


def tell_pairs_by_name_alone(pairs, cases, sides, where):
    """Warn of pairs whose folders differ, so that nothing but the file's name says it is one."""
    doubtful = []
    for number, case in enumerate(cases):
        file = pairs.get(case["name"])
        if file:
            labels = [side.files[number] for side in sides]
            alike = [label for label in labels if have_common_name(label, file)]
            if alike and all(are_alike_by_name_alone(label, file) for label in alike):
                doubtful.append(f"{shown(file, where)} and {case['label']}")
    if doubtful:
        concerns.warn(f"{where}: {concerns.count(len(doubtful), 'file')} paired by name alone, in "
                      f"unlike folders: {concerns.enumerate_names(doubtful, 1)}; make sure that "
                      "they are of one patient")


def refuse_ambiguous(matches, cases, where):
    """Raise ValueError if two predictions are of one case, or one may be of two.

    matches: {name of a case: its predictions}.
    """
    label_of = {case["name"]: case["label"] for case in cases}
    case_of = {}
    for name, files in matches.items():
        for file in files:
            other = case_of.setdefault(file.path, name)
            if other != name:
                raise ValueError(f"{shown(file, where)}: may be of case {other} "
                                 f"({label_of[other]}) or of {name} ({label_of[name]}); name it "
                                 "as its image, or give --labels a folder of labels that are "
                                 "named as the predictions")
    for name, files in matches.items():
        if len(files) > 1:
            one_folder = Path(files[0].path).parent == Path(files[1].path).parent
            way_out = "move one away" if one_folder else "name one folder"
            raise ValueError(f"{where} holds two files for {name}: {shown(files[0], where)}, "
                             f"{shown(files[1], where)}; {way_out}")


def shown(file, where):
    """Return the path of a file below a folder, in the form in which the folder was given."""
    return os.path.join(where, os.path.relpath(file.path, where))


def namesake_text(case, unpaired, where):
    """Return which prediction without a label has a case's name in another folder, or ""."""
    names = {case_key(case[kind]) for kind in ("image", "label") if case[kind]}
    for file in unpaired:
        if file.name in names:
            return (f"; {shown(file, where)} has its name, but lies in another folder; if they "
                    "are of one case, give --predictions and --labels these two folders")
    return ""
