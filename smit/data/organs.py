"""Names of organs, whatever their spelling, and of cases. [SMIT Tables 1 and 2]"""
import functools
import re

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

ALIASES = {  # other names of these organs, in any order of their words
    "right kidney": ("rkid", "rk"),
    "left kidney": ("lkid", "lk"),
    "gallbladder": ("gall bladder", "gall"),
    "esophagus": ("oesophagus", "eso"),
    "stomach": ("sto",),
    "aorta": ("arota", "aor"),
    "inferior vena cava": ("postcava", "post cava", "ivc"),
    "portal and splenic veins": ("portal vein and splenic vein", "portal and splenic vein", "veins", "spv", "psv"),
    "pancreas": ("pan",),
    "right adrenal gland": ("right adrenal", "rad", "ra"),
    "left adrenal gland": ("left adrenal", "lad", "la"),
}


# -------------------------------------------------------------------------------------------- organs
def words_of(name):
    """Return the words of a name, in lower case and alphabetical order."""
    return tuple(sorted(re.findall(r"[^\W_]+", name.lower())))


@functools.cache
def known_names():
    """Return {words of a name: BTCV's name of that organ}."""
    names = {words_of(organ): organ for organ in ORGANS}
    for organ, aliases in ALIASES.items():
        for alias in aliases:
            names[words_of(alias)] = organ
    return names


def organ(name):
    """Return BTCV's name of an organ, whatever order, case and separators its words have.

    Any other name comes back in lower case.
    """
    return known_names().get(words_of(name), " ".join(name.lower().split()))


def organ_ids(names, where):
    """Turn {id: name} into {organ: id}, without the background; ValueError if two names mean one organ."""
    ids = {}
    for number, name in sorted(names.items()):
        if not number:
            continue
        known = organ(name)
        if known in ids:
            raise ValueError(f"{where}: labels {ids[known]} and {number} are both {known}; rename one")
        ids[known] = number
    return ids


def numbered(count):
    """Return names for label numbers that have none: {0: "label 0", ...}."""
    return {number: f"label {number}" for number in range(count)}


# --------------------------------------------------------------------------------------------- cases
def case_name(path):
    """Return the name of a case: its file's, without suffix and nnU-Net's channel: chaos01_0000.nii.gz -> chaos01."""
    return stem(path).removesuffix("_0000")


def case_key(path):
    """Return what image, label and prediction of a case have in common: img0029, label0029 and 0029 are one."""
    return re.sub(r"^(img|label)(?=\d)", "", case_name(path))
