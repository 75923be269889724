"""Concerns: what does not stop a run and yet must be seen. [ours]

A concern is a file, what is odd about it, the numbers that show it, and the way out. Files that
share one oddity share one line, and a line is printed once, by the first rank, on stderr.
"""
import os
import sys
from typing import NamedTuple

printed = set()                        # what this process has told, so that it is told once
warned = []                            # its lines of warnings


class Concern(NamedTuple):
    """What is odd about a file. `what` holds no numbers: files are grouped by it."""
    path: str
    what: str
    detail: str                        # the numbers, or ""
    way_out: str


def describe(concerns, names=3):
    """Return one line for each oddity, with its first file and `names` others (None: all)."""
    groups = {}
    for concern in dict.fromkeys(concerns):
        groups.setdefault((concern.what, concern.way_out), []).append(concern)

    lines = []
    for (what, way_out), group in groups.items():
        first, others = group[0], [os.path.basename(concern.path) for concern in group[1:]]
        detail = f" ({first.detail})" if first.detail else ""
        more = f" [{len(others)} more: {enumerate_names(others, names)}]" if others else ""
        lines.append(f"{first.path}: {what}{detail}{more}; {way_out}")
    return lines


def enumerate_names(names, most=3):
    """Join the first names, with "..." in place of the others."""
    shown = ", ".join(names[:most])
    return shown if most is None or len(names) <= most else shown + ", ..."


def tell(concerns, names=3, one_by_one=False):
    """Print a line for each oddity that this process has not told yet.

    one_by_one: files come singly, so that the line is of the first one, and says so.
    """
    new = [concern for concern in concerns if (concern.what, concern.way_out) not in printed]
    for line in describe(new, names):
        if one_by_one:
            line += " (told once, of the first such file; --check names all)"
        warn(line)
    printed.update((concern.what, concern.way_out) for concern in new)


def warn(line):
    """Print a warning, once a process, and count it for `verdict`."""
    if line not in warned:
        warned.append(line)
        say(f"warning: {line}")


def say(line):
    if os.environ.get("RANK", "0") == "0":               # torchrun's first rank, or alone
        print(line, file=sys.stderr, flush=True)


def note(text):
    """Print a line that tells what was done, once a process, by the first rank."""
    if text not in printed:
        say(f"note: {text}")
    printed.add(text)


def verdict():
    """Return the last words of a check that found no problem: all good, or how many warnings."""
    return count(len(warned), "warning") if warned else "all good"


def count(number, noun):
    """Return a number with its noun: 1 problem, 2 problems."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
