"""From what a user names to cases: folders, NIfTI files, JSON lists, text lists. [ours]

JSON lists are those of MSD, MONAI and nnU-Net. No list is trusted, and nothing is lost silently: a
key or a case that is there twice, a path that climbs out of its folder, a name that cannot be
printed are told, and so is what a folder holds and is not used. The files themselves are checked
in nifti.py.

Reading order: read_list, folders, JSON lists, text lists, names and modalities.
"""
import collections
import csv
import json
import os
import re
import unicodedata
import zlib

from smit.data import concerns, organs
from smit.data.concerns import Concern
from smit.data.nifti import is_volume, name_format, open_unpacked, stem

MAX_LIST = 2 ** 26                     # bytes of a list, unpacked
MODALITIES = {  # words in a list's "modality" or "channel_names"
    "ct": "ct cta cect ncct cbct ldct".split(),
    "mr": ("mr mri mrt t1 t1w t1c t1ce t1gd t1n t2 t2w t2f t2spir t2star flair dwi adc swi spir pd "
           "dixon").split(),
}
LABEL_WORDS = "labels?|segmentations?|segs?|masks?|gts?|ground[ _-]?truths?|annotations?"
LABEL_FOLDER = rf"({LABEL_WORDS})[ _-].*|(.*[ _-])?({LABEL_WORDS})(tr|ts|va|val)?"
LABEL_FILE = rf"(.*[_.-])?({LABEL_WORDS})([_-]?\d+)?"
LABEL_FOLDERS = "folders of labels"
BACKGROUND = (r"\b(background|bg|clear label|clear|unlabell?ed|unknown|other|none|nothing|air|void|"
              r"exterior|outside)\b")
NO_PATHS = (                           # names of no file here, and what to do about them
    (r"[a-z][a-z0-9+.-]+://.*", "is an address; download it, and name the file"),
    (r"[a-z]:[/\\].*", "is a path of Windows; write paths below one folder, and give that folder "
                        "as --data_root"),
    (r"~.*", "begins with ~, which no list can; write the folder in full"),
    (r".*\.(nii|hdr)(\.gz)?\s+\S.*", "looks like two names; separate image and label by a tab or "
                                    "comma"),
)
OTHER_FORMATS = (".dcm", ".mha", ".mhd", ".nrrd", ".nhdr", ".mgz", ".mgh")
PRINTABLE = "[^\0-\x1f\x7f\ud800-\udfff]+"


class WalkedCase(dict):
    """A case that was found by walking a folder.

    Nobody named it, so `load_case` refuses it if it looks like a label.
    """


def read_list(path, key="training", data_root=None, modality=None):
    """Read the cases of one source: [{"image": path, "label": path or None}], absolute paths.

    Folder    its dataset.json, if it holds one; else every NIfTI file below it, naturally sorted,
              without labels and hidden files
    JSON      of MSD, MONAI or nnU-Net; `key` names the split; a case has a "fold", too, if the
              list gives it one, and a "fold_problem" if the folds beside the list are faulty
    text      one image a line, then a tab, comma or semicolon and its label, if any; # starts a
              comment
    A NIfTI file is a case by itself. Relative paths begin at `data_root`, or at the list's folder.
    Prints what is odd about the list, such as a modality that is not `modality`.

    ValueError, a line each, for anything else, for relative paths of a JSON that climb out of that
    folder, and for a case listed twice.
    """
    cases, problems = read_lists([path], key, data_root, modality)
    if problems:
        raise ValueError("\n".join(problems))
    return cases


def read_lists(paths, key="training", data_root=None, modality=None):
    """Read several lists as one: (cases, problems). Problems are lines for `check_cases` to raise.

    Prints what is odd about the lists, such as a modality that is not `modality`.
    """
    cases, problems = {}, []
    paths = [os.path.abspath(path) for path in paths]
    for path in paths:
        listed, wrong = read_source(path, key, data_root, modality)
        problems += wrong
        for case in listed:
            identity = without_suffix(os.path.realpath(case["image"]))
            if identity in cases:
                problems.append(f"{path}: {case['image']} is listed twice, by two sources, or is "
                                "there as .nii and .nii.gz; keep one")
            else:
                cases[identity] = case
    concerns.tell(shared_labels(", ".join(paths), cases.values()))
    return list(cases.values()), problems


def read_source(path, key, data_root=None, modality=None):
    """Read one source, a list, folder or file: (cases, problems)."""
    try:
        path, entries = read_entries(path, key, data_root, modality)
    except ValueError as error:
        return [], [str(error)]
    cases, problems = [], []
    for entry in entries:
        try:
            cases.append(make_case(path, entry, root_of(path, data_root)))
        except ValueError as error:
            problems.append(str(error))

    images = [case["image"] for case in cases]
    if images and not any(map(os.path.lexists, images)):
        concerns.tell([Concern(path, "none of its images is there", f"such as {images[0]}",
                               "name the folder that they are in with --data_root")])
    return cases, problems


def shared_labels(path, cases):
    """Return a concern if two listed cases have one label: a copied line, or two contrasts."""
    counts = collections.Counter(case["label"] for case in cases if case["label"])
    shared = [os.path.basename(label) for label, count in counts.items() if count > 1]
    if not shared:
        return []
    names = concerns.enumerate_names(shared)
    return [Concern(path, "labels are those of more than one image", names,
                    "fine only if these images show one patient on one grid")]


def root_of(path, data_root=None):
    """Return the folder at which a list's relative paths begin."""
    return os.path.abspath(data_root or os.path.dirname(path))


def read_entries(path, key, data_root=None, modality=None):
    """Read one source: (path of the list, its entries).

    An entry is a dict of image, label, fold and the like, not yet trusted.
    """
    inside = os.path.join(path, "dataset.json")
    if os.path.isdir(path) and os.path.isfile(inside):
        concerns.note(f"{path}: read through its dataset.json{other_keys(inside, key)}")
        path = inside
    if os.path.isdir(path):
        entries = [{"image": volume} for volume in find_volumes(path, images=True)]
    elif is_volume(path):
        entries = [{"image": path}]
    elif path.lower().endswith(".json"):
        content = read_json(path)
        root = root_of(path, data_root)
        entries = json_entries(path, content, key, root)
        concerns.tell(list_concerns(path, content, entries, key, root, modality))
    else:
        entries = text_entries(path)
    if not entries:
        raise ValueError(f"{path}: holds no NIfTI image (*.nii, *.nii.gz, *.hdr)"
                         f"{other_formats(path) or '; give the folder or list that does'}")
    return path, entries


def other_keys(path, key):
    """Return which split of a JSON list is read, and which others there are."""
    others = [repr(other) for other in case_keys(read_json(path)) if other != key]
    return f", its {key!r} cases" + (f" (it has {', '.join(others)}, too)" if others else "")


def make_case(path, entry, root):
    """Turn an entry of the list at `path` into a case with absolute paths.

    ValueError if it is none.
    """
    names = [entry["image"]]
    if entry.get("label") is not None:
        names.append(entry["label"])
    names = [name[0] if isinstance(name, list) and len(name) == 1 else name for name in names]
    if entry["image"] is None and entry.get("keys"):
        raise ValueError(f"{path}: a case has the keys {str(entry.get('keys'))[:200]}; name its "
                         "file 'image', and its label 'label'")
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{path}: {str(names)[:200]!r} is no path of one image (one channel), or "
                         "two; repair it")
    for name in names:
        if not re.fullmatch(PRINTABLE, name):
            raise ValueError(f"{path}: the name {name[:200]!r} is no UTF-8 or holds control "
                             "characters, so it cannot be printed; rename the file or folder")

    names = [resolve(path, name, root) for name in names]
    if len(names) == 2 and names[0] == names[1]:
        raise ValueError(f"{path}: {names[0]} is listed as its own label; repair it")
    image = with_channel(path, names[0])
    label = names[1] if len(names) > 1 else None
    kind = WalkedCase if os.path.isdir(path) else dict
    case = kind(image=image, label=label)
    for name in ("fold", "fold_problem"):
        if entry.get(name) is not None:
            case[name] = entry[name]
    if label is None and len(entry.get("keys", ())) > 1:
        case["keys"] = entry["keys"]                     # whoever wants a label tells them
    return case


def resolve(path, name, folder):
    """Return a listed path as an absolute one.

    An absolute path was named by the user and may lie anywhere; ValueError for a relative one of
    a JSON that climbs out of its folder, for lists are passed on and unpacked.
    """
    full = os.path.normpath(os.path.join(folder, name))
    if not os.path.lexists(full):
        refuse_no_path(path, name)
        full = other_form(path, name, folder) or full
    if "\\" in name and not os.path.exists(full):
        slashed = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
        if not os.path.exists(slashed):
            raise ValueError(f"{path}: {name!r} has Windows' separators; write / in place of \\")
        concerns.note(f"{path}: Windows' separators \\ are read as /")
        full, name = slashed, name.replace("\\", "/")
    climbs = os.path.commonpath([folder, full]) != folder
    if climbs and not os.path.isabs(name) and path.lower().endswith(".json"):
        raise ValueError(f"{path}: {name} leaves {folder}; keep the data beside or below the list, "
                         "or name their folder with --data_root")
    return full


def refuse_no_path(path, name):
    """Raise ValueError for a listed name that can be no path here, such as https://host/a.nii."""
    for pattern, text in NO_PATHS:
        if re.fullmatch(pattern, name, re.I):
            raise ValueError(f"{path}: {name[:200]!r} {text}")


def other_form(path, name, folder):
    """Return the path of a listed name whose accents are written otherwise on the disk, or None.

    Macs write an accent as a character of its own (NFD), others as part of its letter (NFC).
    """
    for form in ("NFC", "NFD"):
        other = os.path.normpath(os.path.join(folder, unicodedata.normalize(form, name)))
        if os.path.lexists(other):
            concerns.note(f"{path}: names with accents are found in the form {form}, in which they "
                          "are on the disk")
            return other
    return None


def with_channel(path, image):
    """Return CASE_0000.nii.gz for a listed CASE.nii.gz that is not there: nnU-Net v1's habit."""
    if os.path.lexists(image) or not is_volume(image):
        return image
    suffix = image[len(without_suffix(image)):]
    channels = [image.removesuffix(suffix) + f"_{n:04d}" + suffix for n in range(2)]
    if not os.path.exists(channels[0]):
        return image
    if os.path.exists(channels[1]):
        raise ValueError(f"{path}: {image} has several channels, {channels[0]} and more; only one "
                         "is supported")
    concerns.note(f"{path}: its images are found with nnU-Net's channel in their names, _0000")
    return channels[0]


def without_suffix(path):
    return os.path.join(os.path.dirname(path), stem(path))


# ------------------------------------------------------------------------------------------ folders
def find_volumes(folder, images=False):
    """Find every NIfTI file below a folder, naturally sorted. Prints what was left out.

    Hidden names (git-annex, macOS's ._x.nii.gz) and __MACOSX are left out. Linked folders are
    entered once, after the real ones, so loops end; of a file and links to it one is taken. With
    `images`, labels are left out as well, by the names of their folders and files.
    """
    folder = os.path.abspath(folder)
    volumes, left_out, label_folders = [], collections.Counter(), set()
    waiting, links, entered = [folder], [], set()
    while waiting or links:
        where = (waiting or links).pop(0)
        if os.path.realpath(where) in entered:
            left_out["links to folders that were read already"] += 1
            continue
        entered.add(os.path.realpath(where))
        for name in list_names(where):
            path = os.path.join(where, name)
            is_folder = os.path.isdir(path) and not is_volume(name)
            reason = why_left_out(name, is_folder, images)
            if images and name == "dataset.json" and where != folder:
                left_out["lists in its subfolders, which are read if they are named"] += 1
            if reason:
                left_out[reason] += 1
                label_folders |= {name} if reason == LABEL_FOLDERS else set()
            elif is_folder:
                (links if os.path.islink(path) else waiting).append(path)
            elif is_volume(name):
                volumes.append(path)

    distinct = {}
    for path in sorted(volumes, key=os.path.islink):                 # files before links to them
        distinct.setdefault(os.path.realpath(path), path)
    if len(distinct) < len(volumes):
        left_out["links to files that were found already"] = len(volumes) - len(distinct)
    if label_folders:
        names = ", ".join(sorted(label_folders))
        left_out[f"{LABEL_FOLDERS} ({names})"] = left_out.pop(LABEL_FOLDERS)
    if left_out:
        parts = [f"{reason}: {count}" for reason, count in left_out.items()]
        concerns.note(f"{folder}: left out {'; '.join(parts)}")
    return sorted(distinct.values(), key=natural)


def why_left_out(name, is_folder, images):
    """Return why a name in a folder is not used; None for volumes, folders to enter, no data."""
    hidden = name.startswith(".") or name == "__MACOSX"
    if hidden:
        return "hidden names" if is_folder or is_volume(name) else None
    if name.lower().endswith(OTHER_FORMATS):
        return f"files that are no NIfTI (*{os.path.splitext(name)[1]})"
    if not images:
        return None
    if is_folder and re.fullmatch(LABEL_FOLDER, name, re.I):
        return LABEL_FOLDERS
    if is_volume(name) and re.fullmatch(LABEL_FILE, stem(name), re.I):
        return "labels, by their names"
    return None


def list_names(folder):
    """Return the names in a folder in natural order; ValueError if it cannot be read."""
    try:
        return sorted(os.listdir(folder), key=natural)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}; give a folder that can be read") from None


def natural(name):
    """Return a key that sorts numbers by value: case2 before case10; case01 and case1 by name."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(12), name), name


def other_formats(path):
    """Return ", but x is DICOM; ..." if a folder holds volumes of another format, else ""."""
    if not os.path.isdir(path):
        return ""
    for where, _, names in os.walk(path):
        for name in sorted(names)[:3]:
            known = name_format(os.path.join(where, name))
            if known:
                return f", but {name} is {known}"
    return ""


# --------------------------------------------------------------------------------------- JSON lists
def read_json(path):
    """Read a JSON file as a dict.

    ValueError unless it is one object whose keys are all different.
    """
    text = read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=object_of)
        if not isinstance(content, dict):
            raise TypeError(f"it is a {type(content).__name__}")
        return content
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON object ({error}); write it in MSD or nnU-Net "
                         "form") from None


def object_of(pairs):
    """Return a dict of a JSON object's pairs; ValueError if a key is there twice.

    json by itself would drop the first value silently.
    """
    counts = collections.Counter(name for name, _ in pairs)
    twice = [name for name in counts if counts[name] > 1]
    if twice:
        raise ValueError(f"{str(twice)[:200]} is there twice")
    return dict(pairs)


def json_entries(path, content, key, root):
    """Return the entries under `key`; nnU-Net v2's lists have none, and their files are found."""
    listed = content.get(key)
    if listed is None and key in nnunet_keys(content):
        entries = nnunet_entries(path, content, key, root)
    elif not isinstance(listed, list) or not listed:
        state = "is empty" if listed == [] else "is no list of cases"
        keys = ", ".join(map(repr, case_keys(content)))
        way_out = f"--key can be {keys}" if keys else "no other key of it is a list either"
        raise ValueError(f"{path}: {key!r} {state}; {way_out}")
    else:
        entries = [listed_entry(case) for case in listed]
    return with_folds(path, entries) if key == "training" else entries


def listed_entry(case):
    """Return the entry of a case that a JSON lists as a dict, or as the name of its image."""
    if not isinstance(case, dict):
        return {"image": case}
    return {"image": case.get("image"), "label": case.get("label"), "fold": case.get("fold"),
            "keys": [*case]}


def case_keys(content):
    """Return the keys of a JSON list under which there are cases."""
    keys = [key for key, value in content.items() if isinstance(value, list) and value]
    return keys + [key for key in nnunet_keys(content) if key not in keys]


def nnunet_keys(content):
    """Return the splits of an nnU-Net v2 dataset.json, which lists no cases; else []."""
    has_channels = isinstance(content.get("channel_names"), (dict, list))
    has_files = isinstance(content.get("dataset"), dict)
    return ["training", "test"] if has_channels or has_files else []


def nnunet_entries(path, content, key, root):
    """Find the files of nnU-Net's v2 form.

    "training" is what "dataset" names, or else imagesTr/{case}_0000.nii.gz with
    labelsTr/{case}.nii.gz; "test" is imagesTs.
    """
    channels = content.get("channel_names") or [0]
    if len(channels) != 1:
        raise ValueError(f"{path}: {len(channels)} channels, {str(channels)[:200]}; only one is "
                         "supported")
    if key == "training" and isinstance(content.get("dataset"), dict):
        return [nnunet_entry(path, name, files) for name, files in content["dataset"].items()]

    ending = "." + str(content.get("file_ending", "nii.gz")).lstrip(".")
    if not is_volume(ending):
        raise ValueError(f"{path}: its files end in {ending}, which is no NIfTI; convert them to "
                         ".nii.gz")
    images, labels = nnunet_folders(root, key)
    names, suffix = visible(images), "_0000" + ending
    cases = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    if names and not cases:
        raise ValueError(f"{images}: none of its {len(names)} files is named CASE{suffix}, as "
                         f"nnU-Net has them; rename them, or name them under {key!r} in {path}")
    entries = [{"image": f"{images}/{case}{suffix}", "case": case} for case in cases]
    if os.path.isdir(labels):
        for entry, case in zip(entries, cases):
            entry["label"] = f"{labels}/{case}{ending}"
    return entries


def nnunet_entry(path, name, files):
    """Return the entry of a case that nnU-Net's "dataset" names.

    ValueError unless it has one image.
    """
    images = files.get("images") if isinstance(files, dict) else None
    if not isinstance(images, list) or len(images) != 1:
        raise ValueError(f"{path}: case {name[:200]!r} under 'dataset' has not one image (one "
                         "channel); repair it")
    return {"image": images[0], "label": files.get("label"), "case": name}


def nnunet_folders(root, key):
    """Return the folders of images and labels of an nnU-Net split."""
    part = "Tr" if key == "training" else "Ts"
    return [os.path.join(root, kind + part) for kind in ("images", "labels")]


def visible(folder):
    """Return the names in a folder, without hidden ones, naturally sorted.

    An empty list without a folder.
    """
    names = list_names(folder) if os.path.isdir(folder) else []
    return [name for name in names if not name.startswith(".")]


def with_folds(path, entries):
    """Give entries the folds of a splits_final.json beside the list, if it has none [nnU-Net].

    The file's k-th part holds back the cases under "val" and trains on all others. If it does not,
    each entry gets a "fold_problem" in place of a fold: whoever wants no folds can read the list.
    """
    splits_path = os.path.join(os.path.dirname(path), "splits_final.json")
    images = [entry["image"] for entry in entries]
    if any(entry.get("fold") is not None for entry in entries):
        return entries                                   # the list's own come first
    if not os.path.isfile(splits_path) or not all(isinstance(image, str) for image in images):
        return entries
    names = [entry.get("case") or stem(entry["image"]).removesuffix("_0000") for entry in entries]
    folds = {}
    try:
        for fold, split in enumerate(json.loads(read_text(splits_path))):
            complete = {*split["train"], *split["val"]} == {*names}
            if not complete or any(name in folds for name in split["val"]):
                raise ValueError(f"fold {fold} leaves cases of the list out, or holds back one of "
                                 "another fold")
            folds.update(dict.fromkeys(split["val"], fold))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"{splits_path}: {error}; repair it, or move it away to have folds made"
        return [{**entry, "fold_problem": problem} for entry in entries]
    return [{**entry, "fold": folds.get(name)} for name, entry in zip(names, entries)]


def list_concerns(path, content, entries, key, root, modality=None):
    """Return what is odd about a JSON list: modality, number of cases, files that are not used."""
    found = []
    listed = modality_of(content)
    if modality and listed and listed != modality:
        what = f"the list says {listed.upper()}, and it is read as {modality.upper()}"
        found.append(Concern(path, what, "", f"use --modality {listed}, or a network trained with "
                             "it, or correct the list"))
    number = content.get("numTraining")
    if key == "training" and isinstance(number, int) and number != len(entries):
        found.append(Concern(path, "numTraining is not the number of cases",
                             f"{number} expected, {len(entries)} found",
                             "add the missing ones or correct it"))
    if key in nnunet_keys(content) and key not in content and "dataset" not in content:
        found += unused_files(root, entries, key)
    return found


def unused_files(root, entries, key):
    """Return concerns about nnU-Net images without a channel, and about labels without an image."""
    images, labels = nnunet_folders(root, key)
    found = []
    for folder, kind, what in (
            (images, "image", "images without _0000 in their names are not used"),
            (labels, "label", "labels without an image are not used")):
        used = {entry.get(kind) for entry in entries}
        volumes = filter(is_volume, visible(folder))
        unused = [name for name in volumes if f"{folder}/{name}" not in used]
        if unused:
            names = concerns.enumerate_names(unused)
            found.append(Concern(folder, what, f"{len(unused)}: {names}", "rename or remove them"))
    return found


# --------------------------------------------------------------------------------------- text lists
def read_text(path):
    """Read a text of at most MAX_LIST bytes in UTF-8, maybe gzip; ValueError for any other file."""
    known = name_format(path)                                        # some are text, such as .mhd
    if known:
        raise ValueError(f"{path}: is {known}")
    try:
        with open_unpacked(path) as file:
            text = file.read(MAX_LIST + 1)
        if len(text) > MAX_LIST:                         # the cases beyond would go silently
            raise OSError(0, f"is larger than {MAX_LIST} bytes")
        return text.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "neither NIfTI nor text in UTF-8"
        raise ValueError(f"{path}: {reason}; give a folder, NIfTI file, dataset.json or text "
                         "list") from None


def text_entries(path):
    """Return the entries of a text list: an image a line, then maybe its label.

    Spreadsheets write quotes around names, a first line of titles, in which there is no path, and
    empty columns at the end.
    """
    entries = []
    lines = [line.strip() for line in read_text(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    for number, line in enumerate(lines):
        image, label, *others = columns_of(path, line)
        if any(others):
            raise ValueError(f"{path}: {line[:200]!r} has more columns than an image and its "
                             "label; drop them, or put names with commas in quotes")
        has_a_path = re.search(r"[./\\]", line)
        if number == 0 and not has_a_path:
            if re.match("(label|mask|seg)", image, re.I):
                raise ValueError(f"{path}: its titles, {line[:200]!r}, put the label first; give "
                                 "the image first")
            concerns.note(f"{path}: its first line, {line[:200]!r}, is read as titles")
            continue
        entries.append({"image": image, "label": label or None})
    return entries


def columns_of(path, line):
    """Return the columns of a line, two at least, split at tabs, or else at commas or semicolons.

    Semicolons are what spreadsheets write where a comma is the decimal point.
    """
    delimiter = next((mark for mark in "\t,;" if mark in line), ",")
    try:
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise ValueError(f"{path}: {line[:200]!r}: {error}; repair it") from None
    return [cell.strip() for cell in cells] + [""]


# -------------------------------------------------------------------------------- names, modalities
def has_split(path, key, data_root=None):
    """Return whether a list is a JSON with cases under this key. `read_lists` tells its faults."""
    path, content = json_of(path)
    if content.get(key) is not None:
        return bool(content[key])
    return key in nnunet_keys(content) and has_files(content, key, root_of(path, data_root))


def split_keys(path, data_root=None):
    """Return the keys under which a list has cases, [] for a source that is no JSON."""
    _, content = json_of(path)
    return [key for key in case_keys(content) if has_split(path, key, data_root)]


def json_of(path):
    """Return (path of a source's JSON list, its content), {} for one that cannot be read."""
    path = str(path)
    if os.path.isdir(path):
        path = os.path.join(path, "dataset.json")
    try:
        return path, read_json(path) if path.lower().endswith(".json") else {}
    except ValueError:
        return path, {}


def has_files(content, key, root):
    """Return whether there are files for a split of nnU-Net's, whose lists name no cases."""
    if key == "training" and isinstance(content.get("dataset"), dict):
        return bool(content["dataset"])
    images, _ = nnunet_folders(root, key)
    return bool(visible(images))


def lists_labels(path):
    """Return whether a source can name labels: a list can, a folder without one and an image not.

    What is not there counts as a list; `read_lists` tells its fault.
    """
    path = str(path)
    if os.path.isdir(path):
        return os.path.isfile(os.path.join(path, "dataset.json"))
    return not is_volume(path)


def list_modality(path):
    """Return "ct" or "mr" if what a list says of its modality is one of them, else None."""
    return modality_of(json_of(path)[1])


def modality_of(content):
    """Return "ct" or "mr" if what a JSON list says of its modality is one of them, else None."""
    named = content.get("channel_names") or content.get("modality")
    if isinstance(named, dict):
        named = list(named.values())
    words = re.findall("[a-z0-9]+", str(named).lower())
    found = [kind for kind in MODALITIES if any(word in MODALITIES[kind] for word in words)]
    return found[0] if len(found) == 1 else None


def label_names(path, ignore=False):
    """Return {id: name} from the "labels" of a dataset.json, or None if there are none.

    MSD has id -> name, nnU-Net name -> id.
    ValueError unless each name has one number of its own in 0..255, or if 0 is an organ. nnU-Net's
    "ignore", voxels that nobody annotated, is refused unless `ignore`: training would take it for
    an organ.
    """
    path = str(path)
    if os.path.isdir(path) and os.path.isfile(os.path.join(path, "dataset.json")):
        path = os.path.join(path, "dataset.json")
    labels = read_json(path).get("labels") if path.lower().endswith(".json") else None
    if labels is None or labels == {}:
        return None
    names = {}
    try:
        for key, value in labels.items():
            if isinstance(value, list):
                raise ValueError(f"{key!r} is a region of several numbers, {value}: give each "
                                 "organ one number")
            number, name = (int(key), value) if isinstance(value, str) else (value, key)
            is_new = number not in names and name not in names.values()
            if type(number) is not int or not 0 <= number < 256 or not is_new:
                raise ValueError(f"{key!r}: {value}")
            names[number] = name
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: 'labels' must be {{id: name}} or {{name: id}}, ids 0..255, each "
                         f"once ({str(error)[:200]}); repair them") from None
    check_background(path, names)
    plain_names = [name.strip().lower() for name in names.values()]
    if "ignore" in plain_names and not ignore:
        raise ValueError(f"{path}: label 'ignore' marks voxels that nobody annotated, which "
                         "training here cannot leave out; relabel them, or leave those cases out")
    return names


def check_background(path, names):
    """Raise ValueError if number 0 of {id: name}, the background here, is an organ's.

    Tells any other name that is not a background's.
    """
    name = names.get(0, "background")
    if organs.organ(name, organs.is_abdomen(names.values())) in organs.ORGANS:
        raise ValueError(f"{path}: label 0 is named {name!r}, but 0 is the background here; number "
                         "organs from 1, in the list and in the label files")
    if not re.search(BACKGROUND, name, re.I):
        concerns.tell([Concern(path, "label 0 has a name, but it is the background here",
                               repr(name), "number organs from 1, if it is one")])
