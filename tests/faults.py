"""Injects the faults of long runs into a training script, for real, and prints what each one cost.

    python tests/faults.py --all --out DIR                                  # the whole table: hours on two cores
    python tests/faults.py --only saving damage --script finetune.py --out DIR
    python tests/faults.py --only kills --ranks 4 --workers 2 --script finetune.py --out DIR      # a part of the group
    python tests/faults.py --all --first 1 --out DIR                        # a sample: one fault of each group
    python tests/faults.py --only evaluation --out DIR                      # evaluate.py, whatever --script is

Prints a table in markdown, a row a fault as soon as it is known, and the minutes of each group.

The scripts know nothing of this file: `enter` arms faults in a fresh process, then runs the script as it stands. Every
run has 13 steps of 4 samples, 3 steps an epoch, a checkpoint every 4. Lost: steps whose log row was written and that
had to be done again; of evaluate.py, predictions that were there and are made again. Exact: last.pt, the exported
weights (sha256 of all they hold) and the bytes of log.csv, or of all predictions and results, are those of the run to
which nothing happened. Mounts need root.
"""
import argparse
import contextlib
import errno
import functools
import io
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import forked  # noqa: E402
from conftest import SMALL  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402
from smit import data, losses, phantom, runtime  # noqa: E402
from smit.data import samples as sampling  # noqa: E402

STEPS, EVERY = 13, 4
COMMON = f"--steps {STEPS} --save_steps {EVERY} --val_fraction .2 --workers 0 --log_every 1 --drop_path .3".split()
FLAGS = {"train_ssl.py": [*SMALL, "--val_every", "5", *COMMON],
         "finetune.py": "--spacing 10 10 10 --crop 16 --crops_per_volume 1 --embed_dim 8 --depths 1 1 --heads 2 2 "
                        "--lr 3e-3 --val_key none --val_every 2 --device cpu".split() + COMMON,
         "evaluate.py": ["--device", "cpu"]}
SHARE = {"train_ssl.py": {1: "--batch 2 --accumulate 2", 2: "--batch 1 --accumulate 2", 4: "--batch 1 --accumulate 1"},
         "finetune.py": {1: "--batch 4", 2: "--batch 2", 4: "--batch 1"},                       # of 4 samples, by ranks
         "evaluate.py": {1: ""}}
Row = namedtuple("Row", "fault lost message code exact good")


# ---------------------------------------------------------------- inside the faulty process
def enter(script, flags, faults):
    """Arm the faults, then be the script."""
    torch.set_num_threads(1)
    sys.argv = [script, *flags]
    for fault in faults:
        arm(**fault)
    runpy.run_path(str(ROOT / script), run_name="__main__")


def arm(at, do, nth=1, times=1, rank=0, life=0, file="last.pt", **how):
    """Do something at the nth to (nth + times - 1)th passing of a point, in one rank (None: all) and torchrun life.
    file: the one whose writing, renaming or fsync is meant."""
    count = itertools.count(1)
    path_of = lambda fd: os.readlink(f"/proc/self/fd/{fd}")
    onto = lambda name: lambda source, target: Path(target).name == name
    owner, names, concerns, late = {                          # functions to wrap, which of their calls, act afterwards?
        "loss": (losses, ["mip_loss", "dice_ce_loss"], lambda *_: True, True),
        "load": (data.cases, ["cached_with_concerns"], lambda *_: torch.utils.data.get_worker_info(), False),
        "write": (runtime.files, ["atomic_write"], lambda path, write: Path(path).name == file, False),
        "label": (data, ["write_label"], lambda path, *_: Path(path).name == file, False),
        "prev": (os, ["replace"], onto("last.prev.pt"), False), "rename": (os, ["replace"], onto(file), False),
        "renamed": (os, ["replace"], onto(file), True), "disk": (os, ["fsync", "replace"], lambda *_: True, False),
        "fsync": (os, ["fsync"], lambda fd: f"/.{file}." in path_of(fd), False),
        "fsync folder": (os, ["fsync"], lambda fd: os.path.isdir(path_of(fd)), False)}.get(at, (None, [], None, False))

    def due():
        return nth <= next(count) < nth + times

    def wrap(name, real):
        def call(*args, **more):
            hit, what = concerns(*args) and due(), f"{name} {path_of(args[0]) if name == 'fsync' else args[-1]}"
            if hit and not late:
                act(do, what=what, **how)
            value = real(*args, **more)
            return act(do, value, what, **how) if hit and late else value
        setattr(owner, name, call)

    if at == "start":
        start = runtime.start
        runtime.start = lambda device, timeout_minutes: start(device, .5)          # for a hung rank, not 10
        sampling.WORKER_TIMEOUT_S = 5                                              # for a hung worker
    elif rank in (None, int(os.environ.get("RANK", 0))) and life in (None, runtime.restarts()):
        if at == "step":
            register_optimizer_step_post_hook(lambda *_: due() and act(do, **how))
        for name in names:
            wrap(name, getattr(owner, name))


def act(do, value=None, what="", path="", source="", size=0):
    if do.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[do])
    elif do.startswith("worker"):
        os.kill(multiprocessing.active_children()[0].pid, signal.Signals[do.split()[1]])
    elif do == "limit":                                              # the byte after `size` kills
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    elif do == "fill":
        with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    elif do == "trace":
        with open(path, "a") as file:
            file.write(what + "\n")
    elif do in ("sleep", "hang"):
        time.sleep(.5 if do == "sleep" else 9999)
    elif do in ("remove", "copy"):
        os.unlink(path) if do == "remove" else shutil.copy(source, path)
    elif do in ("EIO", "error", "bug"):
        eio = OSError(errno.EIO, os.strerror(errno.EIO))
        raise {"EIO": eio, "error": ValueError("injected"), "bug": KeyError(0)}[do]
    return value * math.nan if do == "nan" else value


# ---------------------------------------------------------------- runs
class Run:
    """One run: ranks that are forked, or a real torchrun with the flags `agent`."""
    all = []

    def __init__(self, script, folder, console, flags, ranks=1, faults=(), agent=None):
        self.folder, self.console, self.begun, self.faults = folder, console, time.time(), faults
        flags = [*FLAGS[script], *SHARE[script][ranks].split(), "--out", str(folder), *map(str, flags)]
        self.console.write_text("")
        Run.all.append(self)
        if agent is None:
            self.jobs = [forked.start(be_rank, script, flags, list(faults), self.console, variables)
                         for variables in forked.variables_of_ranks(ranks)]
            return

        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *agent]
        variables = {"FAULTS": json.dumps(faults), "OMP_NUM_THREADS": "1"}
        self.jobs = [forked.start(forked.be_script, [*launch, __file__, script, *flags], os.getcwd(),
                                  variables, self.console, self.console)]

    def codes(self):
        return [job.exitcode for job in self.jobs]

    def wait(self, seconds=900):
        """(exit code, console text). When a rank was killed the others are too, as schedulers do; "hung" if it was."""
        while None in self.codes() and time.time() < self.begun + seconds and not {-9, -25} & set(self.codes()):
            time.sleep(.02)
        codes = self.codes()
        self.signal("SIGKILL")
        for job in self.jobs:
            job.join()
        code = next((code for code in codes if code), "hung" if None in codes and not any(codes) else 0)
        return code, self.console.read_text(errors="replace")

    def signal(self, name):
        for job, code in zip(self.jobs, self.codes()):
            if code is None:
                os.kill(job.pid, signal.Signals[name])

    def until(self, condition, seconds=120):
        """Seconds until condition() held."""
        begun = time.time()
        while not condition() and time.time() < begun + seconds:
            time.sleep(.05)
        return time.time() - begun

    def alive(self):
        """Whether any of its processes is, loader workers and torchrun's ranks included."""
        return any(process_of(process, self) for process in Path("/proc").glob("[0-9]*"))


def process_of(process, run):
    with contextlib.suppress(OSError):
        state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
        ours = f"--out\0{run.folder}\0" in (process / "cmdline").read_text()
        return state != "Z" and (ours or int(session) in [job.pid for job in run.jobs])


def be_rank(script, flags, faults, console, variables):
    """The body of a forked rank: a session, a console and an environment of its own."""
    forked.settle(variables, console, console)
    enter(script, flags, faults)


def last_row(folder):
    """The last step in log.csv, 0 without one."""
    text = (folder / "log.csv").read_text() if (folder / "log.csv").exists() else ""
    return max(map(int, re.findall(r"^(\d+),.*\n", text, re.M)), default=0)


def kept(folder):
    """The step from which a run would be resumed, 0 without a checkpoint."""
    with contextlib.redirect_stderr(io.StringIO()):
        return (runtime.load_latest(folder, runtime.Ranks(0, 1, 0, torch.device("cpu"))) or {"step": 0})["step"]


def fingerprint(folder):
    """sha256 of all tensors and numbers of a finished run, its settings aside, and of its log or predictions."""
    log = folder / "log.csv" if (folder / "log.csv").exists() else folder / "cases.csv"
    digest = hashlib.sha256(log.read_bytes())

    def add(value):
        if isinstance(value, (dict, list, tuple)):
            for entry in value.items() if isinstance(value, dict) else value:
                add(entry)
        else:
            digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    for name in sorted(path.name for path in folder.glob("*.nii.gz")) + ["table.md", "results.json"]:
        digest.update((folder / name).read_bytes() if (folder / name).exists() else b"")
    for name in ("last.pt", "student.pt", "best.pt"):
        state = runtime.load_checkpoint(folder / name) if (folder / name).exists() else {}
        add([name, {key: value for key, value in state.items() if key != "config"}])
    return digest.hexdigest()


def message(text, told=""):
    """The last line that says what was to be told, else the last error or warning; without folders."""
    lines = [line for line in text.splitlines() if told and re.search(told, line)]
    lines = lines or re.findall(r"^(?:error|warning|interrupted|SIG|\w*Error)\b.*", text, re.M) or ["-"]
    return re.sub(r"(?<!\w)/\S*/(?=[\w.])", "", lines[-1])


class Lab:
    """A folder with phantoms, their cache and a folder a run, for one script."""
    def __init__(self, folder, script="train_ssl.py", ranks=(1, 2, 4), workers=(0, 2)):
        self.folder, self.script, self.wholes = Path(folder).resolve(), script, {}
        self.ranks, self.workers = ranks, workers                    # to kill runs on
        self.number = itertools.count(len([*self.folder.glob(f"{script[:-3]}*")]))
        self.data = phantom.write_dataset(self.folder / "phantoms", 18, spacing_mm=(10.0, 10.0, 10.0))
        self.common = ["--data", self.data, "--cache", self.folder / "cache"]

    def fresh(self):
        return self.folder / f"{self.script[:-3]}-{next(self.number):03d}"

    def run(self, folder, *flags, **how):
        return Run(self.script, folder, Path(f"{self.fresh()}.txt"), [*self.common, *flags], **how)

    def whole(self, ranks=1, flags=()):
        """The folder of the run to which nothing happens."""
        if (ranks, flags) not in self.wholes:
            self.wholes[ranks, flags] = folder = self.fresh()
            code, text = self.run(folder, *flags, ranks=ranks).wait()
            assert code == 0, text
        return self.wholes[ranks, flags]

    def broken(self, *flags, ranks=1, nth=10):
        """The folder of a run killed in its nth step."""
        folder = self.fresh()
        self.run(folder, *flags, ranks=ranks, faults=[dict(at="step", do="SIGKILL", nth=nth)]).wait()
        return folder

    def trial(self, fault, *faults, ranks=1, flags=(), same=(), again=(), most=EVERY - 1, code=-9, told="",
              folder=None, agent=None):
        """Meet the faults, then resume: once for each fault of `again`, and to the end. flags: may not change the
        result; same: may, and are the uninterrupted run's too."""
        folder = folder or self.fresh()
        found, text = self.run(folder, *same, *flags, ranks=ranks, faults=faults, agent=agent).wait()
        lost = last_row(folder) - kept(folder)
        for more in again:
            self.run(folder, *same, *flags, "--resume", ranks=ranks, faults=[more]).wait()
        return self.resumed(fault, folder, lost, text, found, lost <= most and found == code, told, ranks, flags, same)

    def resumed(self, fault, folder, lost=0, text="", code=0, good=True, told="", ranks=1, flags=(), same=()):
        """Go on to the end, and judge."""
        end, more = self.run(folder, *same, *flags, "--resume", ranks=ranks).wait()
        exact = end == 0 and fingerprint(folder) == fingerprint(self.whole(ranks, same))
        whole = bool(re.search(told, text + more, re.S)) and not [*folder.glob(".*.partial")]
        return Row(fault, lost, message(text + more, told), code, exact, good and exact and whole)

    def refused(self, fault, folder, *flags, told, code=2, **how):
        """One line that says why, and an exit code."""
        found, text = self.run(folder, *flags, **how).wait()
        good = found == code and re.search(told, text) and ("agent" in how or "Traceback" not in text)
        return Row(fault, 0, message(text, told), found, "-", bool(good))


# ---------------------------------------------------------------- the table
def injected(faults):
    """In words: what was done, when and where."""
    words = []
    for fault in (fault for fault in faults if fault["do"]):
        where = fault["at"] + (f" of {fault['file']}" if "file" in fault else "")
        rank = {0: "", None: ", all ranks"}.get(fault.get("rank", 0), f", rank {fault.get('rank')}")
        limit = f" ({fault['size']} bytes)" if "size" in fault else ""
        words.append(f"{fault['do']}{limit} at {where} {fault.get('nth', 1)}{rank}")
    words = list(dict.fromkeys(words))
    return "; ".join(words if len(words) < 4 else [words[0], "...", words[-1]]) or "as named, from outside"


def cell(content):
    return str(content).replace("|", "/").replace("\n", " ")


def main():
    from test_faults import GROUPS
    about = "\n".join(f"  {name:11} {group.__doc__.splitlines()[0]}" for name, group in GROUPS.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"groups:\n{about}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every group")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=[], metavar="GROUP", help="these groups")
    parser.add_argument("--first", type=int, metavar="N", help="of each group its first N faults only")
    parser.add_argument("--script", choices=("train_ssl.py", "finetune.py"), default="train_ssl.py")
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2, 4), default=(1, 2, 4), help="of the group kills")
    parser.add_argument("--workers", nargs="+", type=int, default=(0, 2), help="of the group kills")
    parser.add_argument("--out", type=Path, required=True, help="folder for all runs")
    args = parser.parse_args()
    os.nice(10)
    lab, rows, begun = Lab(args.out, args.script, args.ranks, args.workers), [], time.time()
    print("| fault | injection | as it should | lost | exact | exit | last message |\n" + "|---" * 7 + "|", flush=True)

    def meet(case):
        before = len(Run.all)
        row = case()
        return row, [fault for run in Run.all[before:] for fault in run.faults]
    minutes = {}
    for name in (name for name in GROUPS if args.all or name in args.only):
        since, cases = time.time(), itertools.islice(GROUPS[name](lab), args.first)
        for fault, some in itertools.groupby(map(meet, cases), key=lambda pair: pair[0].fault):
            some, faults = zip(*some)
            worst, exact = min(some, key=lambda row: row.good), [row.exact for row in some]
            share = f"{exact.count(True)} of {len(some)}" if {True, False} & set(exact) else exact[0]
            cells = (fault, injected(itertools.chain(*faults)), f"{sum(row.good for row in some)} of {len(some)}",
                     max(row.lost for row in some), share, worst.code, worst.message[:150])
            print(f"| {' | '.join(map(cell, cells))} |", flush=True)
            rows += some
        minutes[name] = f"{name} {(time.time() - since) / 60:.1f}"
    time.sleep(10)                                                   # for loader workers to miss their parents
    left = sum(run.alive() for run in Run.all)
    exact = [row.exact for row in rows]
    print(f"\n{len(rows)} faults, {sum(row.good for row in rows)} as they should be; {exact.count(True)} exact, "
          f"{exact.count(False)} not; {len(Run.all)} runs, {left} of them left a process behind; "
          f"{(time.time() - begun) / 60:.0f} minutes: {', '.join(minutes.values())}")


if __name__ == "__main__":
    if "FAULTS" in os.environ:                                       # a rank of torchrun
        enter(sys.argv[1], sys.argv[2:], json.loads(os.environ["FAULTS"]))
    else:
        main()
