"""From what a user names to cases: folders, NIfTI files, MSD's, MONAI's and nnU-Net's dataset.json, text lists. [ours]

No list is trusted, and nothing is lost silently: a key or a case that is there twice, a path that leaves the folder, a
name that cannot be printed are told. The files themselves are checked in nifti.py.
"""
import collections
import json
import os
import re
import zlib

from smit.data.nifti import SUFFIXES, open_unpacked

MAX_LIST = 2 ** 26                     # bytes of a list, unpacked


def read_list(path, key="training"):
    """Cases [{"image": absolute path, "label": absolute path or None}] of a folder, NIfTI file, JSON or text list.
    Folder: every NIfTI below it, naturally sorted; linked folders are not entered. JSON: MSD/MONAI or nnU-Net v2, `key`
    names the split. Text: one image a line, then a tab or comma and its label, if any; # starts a comment.
    ValueError, a line each, for anything else, for paths that leave the JSON's folder, and for a case listed twice.
    """
    cases, problems = read_lists([path], key)
    if problems:
        raise ValueError("\n".join(problems))
    return cases


def read_lists(paths, key="training"):
    """(cases, problems) of several lists as of one: lines that say what is wrong are returned, for `check_cases`."""
    cases, problems = {}, []
    for path in map(os.path.abspath, paths):
        try:
            rows = _rows(path, key)
        except ValueError as error:
            rows = []
            problems.append(str(error))
        for row in rows:
            try:
                name, case = _case(path, row)
                if cases.setdefault(name, case) is not case:
                    raise ValueError(f"{path}: {case['image']} is listed twice, by two sources, or is there as .nii and"
                                     " .nii.gz; keep one")
            except ValueError as error:
                problems.append(str(error))
    return list(cases.values()), problems


def _rows(path, key):
    """[image] or [image, label] for each case of one list; as written, so not yet trusted."""
    if os.path.isdir(path) or path.lower().endswith(SUFFIXES):
        found = [os.path.join(where, name) for where, folders, files in os.walk(path) for name in folders + files]
        rows = [[name] for name in found or [path] if name.lower().endswith(SUFFIXES)]
        rows.sort(key=lambda row: _natural(row[0]))
    elif path.lower().endswith(".json"):
        rows = _json_rows(path, _read_json(path), key)
    else:
        rows = [re.split(r"\s*[\t,]\s*", line.strip(), maxsplit=1) for line in _read_text(path).splitlines()]
        rows = [row for row in rows if row[0] and row[0][0] != "#"]
    if not rows:
        raise ValueError(f"{path}: holds no NIfTI image (*.nii, *.nii.gz, *.hdr); give the folder or list that does")
    return rows


def _case(path, row):
    """(what makes it one and the same, the case) of a row."""
    if not all(isinstance(name, str) and re.fullmatch("[^\0-\x1f\x7f\ud800-\udfff]+", name) for name in row):
        raise ValueError(f"{path}: {str(row)[:200]!r} is no path of one image (one channel), or two; repair it")
    folder = os.path.dirname(path)
    row = [os.path.normpath(os.path.join(folder, name)) for name in row]
    if path.lower().endswith(".json") and any(os.path.commonpath([folder, name]) != folder for name in row):
        raise ValueError(f"{path}: {row} leaves the list's folder; keep the data beside or below the list")
    same = re.sub(r"(\.nii|\.hdr|\.img)?(\.gz)?$", "", os.path.realpath(row[0]))
    return same, {"image": row[0], "label": row[1] if len(row) > 1 else None}


def _natural(name):
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(12), name)


def _read_text(path):
    try:
        with open_unpacked(path) as file:
            text = file.read(MAX_LIST + 1)
        if len(text) > MAX_LIST:                                     # else the cases beyond would go silently
            raise OSError(0, f"is larger than {MAX_LIST} bytes")
        return text.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "neither NIfTI nor text in UTF-8"
        raise ValueError(f"{path}: {reason}; give a folder, NIfTI file, dataset.json or text list") from None


def _once(pairs):
    """A dict of a JSON object's pairs; of a key that is there twice, json would drop the first value silently."""
    if twice := [name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"{str(twice)[:200]} is there twice")
    return dict(pairs)


def _read_json(path):
    text = _read_text(path)
    try:
        return {**json.loads(text, object_pairs_hook=_once)}         # TypeError unless it is an object
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON object ({error}); write it in MSD or nnU-Net form") from None


def _json_rows(path, content, key):
    """[image] or [image, label] for each entry, a dict or a string, under `key`.
    nnU-Net lists nothing: imagesTr/{case}_0000.nii.gz with labelsTr/{case}.nii.gz is "training"; imagesTs is "test"."""
    entries, channels = content.get(key), content.get("channel_names")
    if entries is None and isinstance(channels, (dict, list)) and key in ("training", "test"):
        if len(channels) != 1:
            raise ValueError(f"{path}: {len(channels)} channels, {str(channels)[:200]}; only one is supported")
        end, part = str(content.get("file_ending", ".nii.gz")), "Tr" if key == "training" else "Ts"
        images, labels = (os.path.join(os.path.dirname(path), kind + part) for kind in ("images", "labels"))
        names = sorted(os.listdir(images), key=_natural) if os.path.isdir(images) else []
        cases = [name.removesuffix("_0000" + end) for name in names if name.endswith("_0000" + end)]
        return [[f"{images}/{case}_0000{end}"] + [f"{labels}/{case}{end}"] * os.path.isdir(labels) for case in cases]
    if not isinstance(entries, list):
        raise ValueError(f"{path}: no list of cases under {key!r}; its keys are {str([*content])[:200]}; name one")
    pairs = [(case.get("image"), case.get("label")) if isinstance(case, dict) else (case, None) for case in entries]
    return [[image] if label is None else [image, label] for image, label in pairs]


def has_split(path, key):
    """Whether a list is a JSON with this key; what is wrong with it `read_lists` tells."""
    try:
        return str(path).lower().endswith(".json") and key in _read_json(path)
    except ValueError:
        return False


def label_names(path):
    """{id: name} from the "labels" of a dataset.json, MSD's id -> name or nnU-Net's name -> id; None without them."""
    labels = _read_json(path).get("labels") if str(path).lower().endswith(".json") else None
    try:
        pairs = [(int(k), v) if isinstance(v, str) else (v, k) for k, v in (labels or {}).items()]
        names = {i: name for i, name in pairs if type(i) is int and 0 <= i < 256}
        if len(names) == len(pairs):
            return names or None
    except (AttributeError, TypeError, ValueError):
        pass                                                         # of another form: told below
    raise ValueError(f"{path}: 'labels' must be {{id: name}} or {{name: id}}, ids 0..255, each once; no regions")
