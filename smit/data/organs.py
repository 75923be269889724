"""Names of organs, whatever their spelling, and of cases. [SMIT Tables 1 and 2]"""
import functools
import re
import unicodedata
from pathlib import Path

import numpy as np

from smit.data.nifti import stem

CODES = {  # BTCV's organs in BTCV's order, and the paper's columns for them
    "spleen": "SP",
    "right kidney": "RK",
    "left kidney": "LK",
    "gallbladder": "GB",
    "esophagus": "ESO",
    "liver": "LV",
    "stomach": "STO",
    "aorta": "AOR",
    "inferior vena cava": "IVC",
    "portal and splenic veins": "SPV",
    "pancreas": "Pan",
    "right adrenal gland": "RA",
    "left adrenal gland": "LA",
}
ORGANS = tuple(CODES)                  # BTCV's number n is ORGANS[n - 1]

# Other names of these organs, in any order of their words. Sources: the labels in dataset.json of
# AMOS22 [A] ("arota" is its spelling), the class map of TotalSegmentator [T], the label table of
# FLARE22 [F], MONAI's tutorial on BTCV [M], the paper's columns [P], spellings met elsewhere [-]
ALIASES = {
    "spleen": ("sp",),                                               # P
    "right kidney": ("kidney right", "rkid", "rk"),                  # T, M, F
    "left kidney": ("kidney left", "lkid", "lk"),                    # T, M, F
    "gallbladder": ("gall bladder", "gall", "gb", "gbd"),            # A, M, P, F
    "esophagus": ("oesophagus", "eso"),                              # -, M and P
    "liver": ("lv",),                                                # P
    "stomach": ("sto",),                                             # M, P
    "aorta": ("arota", "aor"),                                       # A, P
    "inferior vena cava": ("postcava", "post cava", "ivc"),          # A, -, F and P
    "portal and splenic veins": (                                    # T, -, -, M, P, -
        "portal vein and splenic vein", "portal and splenic vein", "portal vein splenic vein",
        "veins", "spv", "psv"),
    "pancreas": ("pan",),                                            # P
    "right adrenal gland": (                                         # T, -, M, F, P
        "adrenal gland right", "right adrenal", "rad", "rag", "ra"),
    "left adrenal gland": (                                          # T, -, M, F, P
        "adrenal gland left", "left adrenal", "lad", "lag", "la"),
}
# These name other organs elsewhere, as a heart's ventricle, atria and artery, so they count only
# beside the plain name or code of an organ that no list of hearts has
AMBIGUOUS = ("lv", "la", "ra", "lad", "rad", "veins")
ABDOMINAL = ("spleen", "right kidney", "left kidney", "pancreas", "gallbladder", "stomach")
SIDES = {"r": "right", "rt": "right", "l": "left", "lt": "left"}     # as in kidney_r


# ------------------------------------------------------------------------------------------- organs
def words_of(name):
    """Return the words of a name, in lower case and alphabetical order; sides in full."""
    words = re.findall(r"[^\W_]+", name.lower())
    return tuple(sorted(SIDES.get(word, word) for word in words))


@functools.cache
def known_names():
    """Return {words of a name: BTCV's name of that organ}."""
    names = {words_of(organ): organ for organ in ORGANS}
    for organ, aliases in ALIASES.items():
        for alias in aliases:
            names[words_of(alias)] = organ
    return names


def organ(name, is_abdomen=True):
    """Return BTCV's name of an organ, whatever order, case and separators its words have.

    Any other name comes back in lower case, and without `is_abdomen` an ambiguous code, too.
    """
    plain = " ".join(name.lower().split())
    if plain in AMBIGUOUS and not is_abdomen:
        return plain
    return known_names().get(words_of(name), plain)


def is_abdomen(names):
    """Return whether ambiguous codes among the names of one list are BTCV's."""
    return any(organ(name, is_abdomen=False) in ABDOMINAL for name in names)


def organ_ids(names, where):
    """Turn {id: name} into {organ: id}, without background.

    ValueError if two are one organ, or if one of them is called background.
    """
    ids = {}
    codes_count = is_abdomen(names.values())
    for number, name in sorted(names.items()):
        if not number:
            continue
        known = organ(name, codes_count)
        if known == "background":
            raise ValueError(f"{where}: label {number} is called background, which is 0 in label "
                             "maps; name it otherwise, or number the labels anew")
        if known in ids:
            raise ValueError(f"{where}: labels {ids[known]} and {number} are both {known}; rename "
                             "one")
        ids[known] = number
    return ids


def numbered(count):
    """Return names for label numbers that have none: {0: "label 0", ...}."""
    return {number: f"label {number}" for number in range(count)}


def btcv_numbers(names, images):
    """Return BTCV's number for each of a network's, (256,) uint8, for a submission.

    ValueError where an organ has no place there, the network knows no names, or an image is not
    named as BTCV's are.
    """
    ids = organ_ids(names, "--weights")
    if not ids:
        raise ValueError("--export_test: the network's classes have no names, so their numbers in "
                         "BTCV are not known; train on a dataset.json that names its labels")
    odd = [image for image in images if not re.fullmatch(r"img\d+", case_name(image))]
    if odd or not ids.keys() <= CODES.keys():
        raise ValueError("--export_test takes images named as img0061.nii.gz, and BTCV's organs: "
                         f"{odd[:1]}, {[*ids]}")
    table = np.zeros(256, np.uint8)
    for name, number in ids.items():
        table[number] = ORGANS.index(name) + 1
    return table


# -------------------------------------------------------------------------------------------- cases
def case_name(path):
    """Return the name of a case: its file's, without suffix and, in nnU-Net's layout, channel.

    imagesTr/chaos01_0000.nii.gz is chaos01, but scans/week_0000.nii.gz is week_0000.
    """
    path = Path(path)
    is_nnunet = re.fullmatch("images(tr|ts|va|val|te)", path.parent.name, re.I)
    return stem(path).removesuffix("_0000") if is_nnunet else stem(path)


def case_names(paths):
    """Return a distinct, readable name for each of several cases.

    It is the file's name, or else the folders' names that tell the files apart:
    case_1/imaging.nii.gz and case_2/imaging.nii.gz are case_1 and case_2. ValueError if two cases
    would share a name.
    """
    depth = depth_of_names(paths)
    places = places_that_differ([path_parts(path)[-depth:] for path in paths])
    path_of = {}
    for path in paths:
        parts = path_parts(path)
        name = "_".join(parts[place] for place in places if -place <= len(parts))
        if name in path_of:
            raise ValueError(f"{path_of[name]} and {path} are both case {name}; rename or drop one")
        path_of[name] = path
    return [*path_of]


def path_parts(path):
    """Return the names of a file's folders, and last that of its case."""
    return [*Path(path).parts[:-1], case_name(path)]


def places_that_differ(parts):
    """Return the places, counted back from -1, at which lists of names differ; -1 for one list."""
    depth = max(map(len, parts), default=1)
    places = []
    for place in range(-depth, 0):
        names = {part[place] for part in parts if -place <= len(part)}
        if len(names) > 1:
            places.append(place)
    return places or [-1]


def depth_of_names(paths):
    """Return how many last parts of paths tell them apart; 1 if all files' names differ."""
    parts = [path_parts(path) for path in paths]
    deepest = max(map(len, parts), default=1)
    for depth in range(1, deepest):
        if len({tuple(part[-depth:]) for part in parts}) == len(parts):
            return depth
    return deepest


def identities(paths):
    """Return the last parts of paths that tell them apart wherever they lie: often only names."""
    depth = depth_of_names(paths)
    return ["/".join(Path(composed(str(path))).parts[-depth:]) for path in paths]


def those_among(paths, identities):
    """Return the set of paths that end in one of `identities`, whatever suffix and channel."""
    known = {bare(identity) for identity in identities}
    found = set()
    for path in paths:
        parts = Path(composed(bare(path))).parts
        if any("/".join(parts[i:]) in known for i in range(len(parts))):
            found.add(path)
    return found


def bare(path):
    """Return a path without .nii, .nii.gz and nnU-Net's channel: a copy may have another."""
    folder, slash, name = str(path).rpartition("/")
    return folder + slash + stem(name).removesuffix("_0000")


def case_key(name):
    """Return what the names of image, label and prediction share: img0029, label0029 give 0029."""
    return re.sub(r"^(img|label)(?=\d)", "", composed(case_name(name)))


def composed(name):
    """Return a name in Unicode's composed form, NFC: a Mac writes an accent as a letter, NFD."""
    return unicodedata.normalize("NFC", name)
