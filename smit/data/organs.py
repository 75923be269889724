"""Names: of organs, whatever their spelling, and of cases. [SMIT Tables 1 and 2]"""
import functools
import re
from pathlib import Path

ORGANS = {  # the paper's columns, in its order: BTCV's name, then those of AMOS, MONAI, TotalSegmentator and others
    "SP": "spleen", "RK": "right kidney, rkid, rk", "LK": "left kidney, lkid, lk",
    "GB": "gallbladder, gall bladder, gall", "ESO": "esophagus, oesophagus, eso", "LV": "liver",
    "STO": "stomach, sto", "AOR": "aorta, arota, aor", "IVC": "inferior vena cava, postcava, post cava, ivc",
    "SPV": "portal and splenic veins, portal vein and splenic vein, portal and splenic vein, veins, spv, psv",
    "Pan": "pancreas, pan", "RA": "right adrenal gland, right adrenal, rad, ra",
    "LA": "left adrenal gland, left adrenal, lad, la"}
CODES = {names.split(", ")[0]: code for code, names in ORGANS.items()}


def case_name(path):
    """The name of a case from that of its file, without nnU-Net's channel: chaos01_0000.nii.gz -> chaos01."""
    return re.sub(r"(_0000)?\.(nii|hdr|img)(\.gz)?$", "", Path(path).name, flags=re.I)


def case_key(path):
    """What image, label and prediction of a case have in common: img0029, label0029 and 0029 are one."""
    return re.sub(r"^(img|label)(?=\d)", "", case_name(path))


@functools.cache
def organ(name):
    """BTCV's name of an organ, whatever the order, case and separators of the words; any other name in lower case."""
    def words(text):
        return sorted(re.findall(r"[^\W_]+", text.lower()))
    aliases = (names.split(", ") for names in ORGANS.values())
    return next((known[0] for known in aliases if words(name) in map(words, known)), " ".join(name.lower().split()))


def organ_ids(names, where):
    """{organ: id} of {id: name} without the background; ValueError where two names mean one organ."""
    ids = {}
    for number, name in sorted(names.items()):
        if number and ids.setdefault(organ(name), number) != number:
            raise ValueError(f"{where}: labels {ids[organ(name)]} and {number} are both {organ(name)}; rename one")
    return ids


def numbered(count):
    """Names for label numbers that have none."""
    return {number: f"label {number}" for number in range(count)}
