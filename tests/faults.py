"""Inject the faults of long runs into a training script, for real, and print what each one cost.

    python tests/faults.py --all --out DIR                    # the whole table: hours on two cores
    python tests/faults.py --all --first 1 --out DIR          # a sample: one fault of each group
    python tests/faults.py --only saving damage --script finetune.py --out DIR
    python tests/faults.py --only evaluation --out DIR        # evaluate.py, whatever --script is
    python tests/faults.py --only kills --ranks 4 --workers 2 --out DIR    # a part of the group

It prints a table in markdown, a row a fault as soon as it is known, and the minutes of each group.

Lost are steps whose log row was written and that had to be done again. Of evaluate.py, it is
predictions that were there and are made again. A run is exact if its last.pt, its exported weights
(sha256 of all they hold) and the bytes of its log.csv, or of all predictions and results, are those
of the run to which nothing happened. Mounts need root.

Reading order: main; test_faults.py for the groups (what is injected and what must come of it);
fault_lab.py for runs, trials and what is judged; injection.py for the inside of a faulty process.
"""
import argparse
import itertools
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from fault_lab import RUNS, Lab, Row  # noqa: E402
from test_faults import GROUPS  # noqa: E402

COLUMNS = ("fault", "injection", "as it should", "lost", "exact", "exit", "last message")
LONGEST_MESSAGE = 150            # characters of it that are shown
PATIENCE_S = 10                  # for loader workers to notice that their parents are gone


def main():
    args = read_flags(GROUPS)
    os.nice(10)
    lab = Lab(args.out, args.script, args.ranks, args.workers)
    begun = time.time()
    print_line(COLUMNS)
    print("|---" * len(COLUMNS) + "|", flush=True)

    rows, minutes = [], []
    for name, group in GROUPS.items():
        if args.all or name in args.only:
            group_begun = time.time()
            cases = itertools.islice(group(lab), args.first)
            rows += print_rows(cases)
            minutes.append(f"{name} {minutes_since(group_begun):.1f}")

    time.sleep(PATIENCE_S)
    print()
    print_summary(rows, minutes_since(begun), minutes)


def read_flags(groups):
    """Read the command line. groups: functions by their names."""
    lines = ["groups:"]
    for name, group in groups.items():
        lines.append(f"  {name:11} {group.__doc__.splitlines()[0]}")

    parser = argparse.ArgumentParser(description=__doc__, epilog="\n".join(lines),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every group")
    parser.add_argument("--only", nargs="+", choices=groups, default=[], metavar="GROUP",
                        help="these groups")
    parser.add_argument("--first", type=int, metavar="N",
                        help="of each group its first N faults only")
    parser.add_argument("--script", choices=("train_ssl.py", "finetune.py"), default="train_ssl.py")
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2, 4), default=(1, 2, 4),
                        help="of the group kills")
    parser.add_argument("--workers", nargs="+", type=int, default=(0, 2),
                        help="of the group kills")
    parser.add_argument("--out", type=Path, required=True, help="folder for all runs")
    return parser.parse_args()


def minutes_since(begun):
    return (time.time() - begun) / 60


# ---------------------------------------------------------------- from cases to rows
class Trial(NamedTuple):
    """Keep what came of a case, and the faults that its runs were told of."""

    row: Row
    faults: list


def meet(case):
    """Run a case, which is a function without arguments that returns a Row."""
    known = len(RUNS)
    row = case()
    faults = []
    for run in RUNS[known:]:
        faults += run.faults
    return Trial(row, faults)


def print_rows(cases):
    """Run cases, and print a line for each name; return the Rows of all."""
    rows, trials = [], []
    for case in cases:
        trial = meet(case)
        # cases of one name follow each other, and share a line
        if trials and trials[0].row.name != trial.row.name:
            print_line(sum_up(trials))
            trials = []
        trials.append(trial)
        rows.append(trial.row)
    if trials:
        print_line(sum_up(trials))
    return rows


def sum_up(trials):
    """Return the cells of a line: of the trials of one name, the worst is shown."""
    rows = [trial.row for trial in trials]
    faults = []
    for trial in trials:
        faults += trial.faults

    bad = [row for row in rows if not row.good]
    worst = bad[0] if bad else rows[0]
    as_it_should = f"{len(rows) - len(bad)} of {len(rows)}"
    lost = max(row.lost for row in rows)
    injection = describe_all(faults)
    return (worst.name, injection, as_it_should, lost, count_exact(rows), worst.code,
            worst.message[:LONGEST_MESSAGE])


def count_exact(rows):
    """Say how many of the results were exact, or "-" where no result is due."""
    judgements = [row.exact for row in rows]
    if True in judgements or False in judgements:
        return f"{judgements.count(True)} of {len(rows)}"
    return judgements[0]


# ---------------------------------------------------------------- in words
def describe_all(faults):
    """Say in words what was done, when and where: the first and the last if there are many."""
    texts = []
    for fault in faults:
        text = describe(fault)
        if fault.deed and text not in texts:
            texts.append(text)
    if not texts:
        return "as named, from outside"
    if len(texts) > 3:
        texts = [texts[0], "...", texts[-1]]
    return "; ".join(texts)


def describe(fault):
    """Say "deed (limit) at point of file nth, rank", without what is as usual."""
    text = fault.deed
    if fault.size is not None:
        text += f" ({fault.size} bytes)"
    text += f" at {fault.point}"
    if fault.file != "last.pt":
        text += f" of {fault.file}"
    text += f" {fault.nth}"

    if fault.rank is None:
        text += ", all ranks"
    elif fault.rank > 0:
        text += f", rank {fault.rank}"
    return text


def print_line(cells):
    """Print a line of a table in markdown, at once."""
    texts = []
    for cell in cells:
        texts.append(str(cell).replace("|", "/").replace("\n", " "))
    print(f"| {' | '.join(texts)} |", flush=True)


def print_summary(rows, total_minutes, minutes):
    """Print counts of all rows and runs. minutes: a text for each group."""
    good = [row for row in rows if row.good]
    judgements = [row.exact for row in rows]
    left = [run for run in RUNS if run.is_alive()]
    print(f"{len(rows)} faults, {len(good)} as they should be; "
          f"{judgements.count(True)} exact, {judgements.count(False)} not; "
          f"{len(RUNS)} runs, {len(left)} of them left a process behind; "
          f"{total_minutes:.0f} minutes: {', '.join(minutes)}")


if __name__ == "__main__":
    main()
