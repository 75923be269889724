"""Write prepared copies of CT volumes, small enough to carry to the machine with the GPU [ours].

    python -m smit.study.carry --data btcv/dataset.json --out carried/btcv
    python -m smit.study.carry --data openkbp/images --spacing 4 4 4 --out carried/openkbp

A copy is a NIfTI file of uint8 with slope and intercept, so whatever reads it finds HU again, cut
off at the window. Prepared again with the same settings it gives the voxels that the scan itself
gives. Labels come along on the same grid, so scores of carried cases are scores at that spacing,
not at the scans' own.

Writes OUT/part1/images, OUT/part1/labels, OUT/part2/..., none above --part_mib, and
OUT/dataset.json, which lists them all. No header field of the scans is copied but their place in
space.
"""
import argparse
import json
from pathlib import Path

from tqdm import tqdm

from smit import data, runtime
from smit.data.organs import case_names
from smit.settings import Help

MIB = 2 ** 20


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--data", required=True, metavar="PATH",
        help="a dataset.json, of which training and validation are carried, or a folder of CT")
    add("--out", required=True, help="folder to write, which must be new or empty")
    add("--spacing", nargs=3, type=float, default=[1.5, 1.5, 2.], metavar="MM",
        help="voxel size [SMIT 3]")
    add("--hu_window", nargs=2, type=float, default=[-175., 250.], metavar="HU",
        help="what is kept of the intensities [release]")
    add("--hu_offset", type=float, default=0., metavar="HU",
        help="add this to the stored values: -1024 for HU stored with 1024 added [ours]")
    add("--part_mib", type=float, default=60., help="MiB that one part may have [ours]")
    args = parser.parse_args(argv)
    args.modality = "ct"                             # as `data.preparation_of` reads it
    return args


def main(args):
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is not an empty folder; give another --out")
    settings = data.preparation_of(args)
    if data.list_modality(args.data) == "mr":
        raise ValueError(f"{args.data}: says MR, and copies keep a window of CT's HU; carry the "
                         "files themselves")
    splits = read_splits(args.data)
    cases = [case for split in splits.values() for case in split]
    labels = data.label_names(args.data, ignore=True) or {}
    data.check_cases([case for case in cases if not case["label"]])
    data.check_cases([case for case in cases if case["label"]], labels=True)

    names = iter(case_names([case["image"] for case in cases]))
    parts = Parts(out, args.part_mib * MIB)
    listed, odd = {}, []
    with tqdm(total=len(cases), unit="case", disable=None) as bar:
        for key, split in splits.items():
            listed[key] = []
            for case in split:
                copies, concerns = copies_of(case, settings)
                listed[key].append(parts.add(next(names), copies) | fold_of(case))
                odd += concerns
                bar.update()
    data.tell(odd)

    numbered = {str(number): name for number, name in labels.items()}
    content = {"modality": {"0": "CT"}, "labels": numbered, **listed}
    (out / "dataset.json").write_text(json.dumps(content, indent=1))
    print(f"{data.count(len(cases), 'case')}, {parts.total / MIB:.1f} MiB, in "
          f"{data.count(parts.number, 'part')}: {out / 'dataset.json'}")


def read_splits(path):
    """Read the cases of a source: {"training": [...], "validation": [...]}, what it has of them.

    ValueError as `data.check_cases` raises it.
    """
    splits = {}
    for key in ("training", "validation"):
        if key == "training" or data.has_split(path, key):
            splits[key], problems = data.read_lists([path], key)
            if problems:
                data.check_cases(splits[key], problems=problems)
    return splits


def fold_of(case):
    """Return {"fold": number} of a case that its list gives one, else {}."""
    return {} if case.get("fold") is None else {"fold": case["fold"]}


def copies_of(case, settings):
    """Prepare a case: (its copies, what is odd about it).

    copies: {"image": the bytes of a .nii.gz, "label": likewise, if there is one}.
    """
    with_label = bool(case["label"])
    prepared = data.load_case(case, settings, with_label)
    low, high = settings.hu_window
    step = (high - low) / 255
    copies = {"image": data.pack(prepared["image"], prepared["affine"], step, low)}
    if with_label:
        copies["label"] = data.pack(prepared["label"], prepared["affine"])
    return copies, prepared["concerns"]


class Parts:
    """Folders part1, part2, ..., each filled up to `limit` bytes."""

    def __init__(self, folder, limit):
        self.folder, self.limit = folder, limit
        self.number, self.filled, self.total = 0, 0, 0

    def add(self, name, copies):
        """Write a case's copies into one part: {"image": path, "label": path} below the folder.

        ValueError for a case that is larger than a whole part.
        """
        size = sum(map(len, copies.values()))
        if size > self.limit:
            raise ValueError(f"{name}: {size / MIB:.1f} MiB, more than a part may have; raise "
                             "--part_mib, or --spacing")
        if self.number == 0 or self.filled + size > self.limit:
            self.number, self.filled = self.number + 1, 0
        paths = {}
        for kind, content in copies.items():
            paths[kind] = f"part{self.number}/{kind}s/{name}.nii.gz"
            path = self.folder / paths[kind]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.filled += size
        self.total += size
        return paths


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
