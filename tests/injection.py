"""Run a training script with faults armed: the inside of a faulty process.

The scripts know nothing of this file. `enter` wraps the functions of torch, os and smit at which
faults are due, then runs the script as it stands. Faults come from `fault_lab.Run`: as arguments
in a forked rank, as JSON in the variable FAULTS in a rank of torchrun, which starts this file.

Reading order: Fault, enter, arm, points, act.
"""
import errno
import itertools
import json
import math
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import forked  # noqa: E402
from smit import data, losses, runtime  # noqa: E402
from smit.data import samples  # noqa: E402

EVERY_RANK = None
EVERY_LIFE = None


class Fault(NamedTuple):
    """Describe a deed, the point at which it is done, and the processes that do it."""

    point: str                   # a name in `points`, "step" or "start"
    deed: str                    # see `act`
    nth: int = 1                 # it is done in this passing of the point ...
    times: int = 1               # ... and in the next ones, so many in all
    rank: int | None = 0
    life: int | None = 0         # restarts by torchrun before it
    file: str = "last.pt"        # written, renamed or synced at the point
    path: str = ""               # to fill, to remove, to write
    source: str = ""             # to copy from
    size: int | None = None      # in bytes, for a limit


def enter(script, flags, faults):
    """Arm the faults, then be the script."""
    torch.set_num_threads(1)
    for fault in faults:
        arm(fault)
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def be_rank(script, flags, faults, console, variables):
    """Be a forked rank, with a session, a console and an environment of its own."""
    forked.settle(variables, console, console)
    enter(script, flags, faults)


# ---------------------------------------------------------------- when and where
def arm(fault):
    """Let this process meet the fault, if it is one of those that shall."""
    if fault.point == "start":
        shorten_timeouts()
        return
    is_here = fault.rank in (EVERY_RANK, int(os.environ.get("RANK", 0)))
    is_now = fault.life in (EVERY_LIFE, runtime.restarts())
    if not (is_here and is_now):
        return

    passings = itertools.count(1)

    def is_due():
        return fault.nth <= next(passings) < fault.nth + fault.times

    if fault.point == "step":
        act_after_steps(fault, is_due)
        return
    point = points(fault.file)[fault.point]
    for name in point.names:
        wrap(point, name, fault, is_due)


def shorten_timeouts():
    """Give up on a hung rank after half a minute, not 10, and on a hung worker after 5 seconds."""
    start = runtime.start

    def start_impatiently(device, timeout_minutes=10):
        return start(device, .5)

    runtime.start = start_impatiently
    samples.WORKER_TIMEOUT_S = 5


def act_after_steps(fault, is_due):
    """Act each time that the optimizer's step is done and the fault is due."""
    def after_step(*_):
        if is_due():
            act(fault)

    register_optimizer_step_post_hook(after_step)


class Point(NamedTuple):
    """Name functions that a run calls, and tell which of their calls pass the point."""

    module: ModuleType
    names: tuple[str, ...]
    is_passed: Callable          # given the arguments of a call
    acts_after: bool = False     # once the function has returned


def points(file):
    """Return every point but the steps, by its name. file: the name of the one that is meant."""
    def always(*_):
        return True

    def is_in_worker(*_):
        return torch.utils.data.get_worker_info() is not None

    def writes_file(path, *_):
        return Path(path).name == file

    def renames_to_file(source, target):
        return Path(target).name == file

    def renames_to_previous(source, target):
        return Path(target).name == "last.prev.pt"

    def syncs_file(descriptor):
        return f"/.{file}." in path_of(descriptor)

    def syncs_folder(descriptor):
        return os.path.isdir(path_of(descriptor))

    return {
        "loss": Point(losses, ("mip_loss", "dice_ce_loss"), always, acts_after=True),
        "load": Point(data.cases, ("cached_with_concerns",), is_in_worker),
        "write": Point(runtime.files, ("atomic_write",), writes_file),
        "label": Point(data, ("write_label",), writes_file),
        "prev": Point(os, ("replace",), renames_to_previous),
        "rename": Point(os, ("replace",), renames_to_file),
        "renamed": Point(os, ("replace",), renames_to_file, acts_after=True),
        "disk": Point(os, ("fsync", "replace"), always),
        "fsync": Point(os, ("fsync",), syncs_file),
        "fsync folder": Point(os, ("fsync",), syncs_folder),
    }


def path_of(descriptor):
    return os.readlink(f"/proc/self/fd/{descriptor}")


def wrap(point, name, fault, is_due):
    """Put a function in another's place that calls it, and acts when the fault is due."""
    original = getattr(point.module, name)

    def wrapped(*args, **options):
        strikes = point.is_passed(*args) and is_due()
        if strikes and not point.acts_after:
            act(fault, name, args)

        result = original(*args, **options)

        if strikes and point.acts_after:
            act(fault, name, args)
            if fault.deed == "nan":
                return result * math.nan
        return result

    setattr(point.module, name, wrapped)


# ---------------------------------------------------------------- deeds
def act(fault, name="", args=()):
    """Do what the fault says. name, args: the call during which it is done, to be traced."""
    deed = fault.deed
    if deed.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[deed])
    elif deed.startswith("worker "):
        worker = multiprocessing.active_children()[0]
        os.kill(worker.pid, signal.Signals[deed.removeprefix("worker ")])

    elif deed == "limit":
        die_beyond(fault.size)
    elif deed == "fill":
        fill_disk(fault.path)
    elif deed == "trace":
        trace_call(name, args, fault.path)
    elif deed == "remove":
        os.unlink(fault.path)
    elif deed == "copy":
        shutil.copy(fault.source, fault.path)

    elif deed == "sleep":
        time.sleep(.5)
    elif deed == "hang":
        time.sleep(9999)

    elif deed == "EIO":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    elif deed == "error":
        raise ValueError("injected")
    elif deed == "bug":
        raise KeyError(0)
    elif deed != "nan":          # `wrap` does that to the function's result
        raise NotImplementedError(f"no such deed: {deed}")


def die_beyond(size):
    """Let the byte after the first `size` of any file kill this process, and leave no core."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fill_disk(path):
    """Write zeros to a file until its disk takes no more."""
    try:
        with open(path, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        return


def trace_call(name, args, path):
    """Add a line to a file: the call's name and the path that it syncs or renames to."""
    subject = path_of(args[0]) if name == "fsync" else args[-1]
    with open(path, "a") as file:
        file.write(f"{name} {subject}\n")


if __name__ == "__main__":
    armed = [Fault(**fields) for fields in json.loads(os.environ["FAULTS"])]
    enter(sys.argv[1], sys.argv[2:], armed)
