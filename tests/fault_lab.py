"""Start small runs of a script with faults in them, resume them, and judge what is left.

Every run has 13 steps of 4 samples, 3 steps an epoch, a checkpoint every 4. It takes seconds.

Reading order: Row, Lab (a trial is a faulty run and the run that resumes it), Run, then the
functions that read a run's folder.
"""
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

import forked
import torch
from conftest import SMALL
from injection import Fault, be_rank
from smit import phantom, runtime

STEPS = 13
EVERY = 4        # steps from a checkpoint to the next
COMMON = (f"--steps {STEPS} --save_steps {EVERY} --val_fraction .2 --workers 0 --log_every 1 "
          "--drop_path .3").split()
FINETUNE = ("--spacing 10 10 10 --crop 16 --crops_per_volume 1 --embed_dim 8 --depths 1 1 "
            "--heads 2 2 --lr 3e-3 --fold 0 --folds 4 --val_every 2 --device cpu").split()
FLAGS = {
    "train_ssl.py": SMALL + ["--val_every", "5"] + COMMON,
    "finetune.py": FINETUNE + COMMON,
    "evaluate.py": ["--device", "cpu"],
}

# how 1, 2 or 4 ranks share the 4 samples of a step
SHARES = {
    "train_ssl.py": {1: "--batch 2 --accumulate 2",
                     2: "--batch 1 --accumulate 2",
                     4: "--batch 1 --accumulate 1"},
    "finetune.py": {1: "--batch 4", 2: "--batch 2", 4: "--batch 1"},
    "evaluate.py": {1: ""},
}

TESTS = Path(__file__).resolve().parent
KILLED = {-signal.SIGKILL, -signal.SIGXFSZ}      # exit codes

# to pick a run's last words from its console, and to leave folders out of them
LAST_WORDS = re.compile(r"^(?:error|warning|interrupted|SIG|\w*Error)\b.*", re.MULTILINE)
FOLDER = re.compile(r"(?<!\w)/\S*/(?=[\w.])")

# every run that this process has started: the table asks for their faults and what they left
RUNS = []


class Row(NamedTuple):
    """Say what a fault cost and whether that is as it should be."""

    name: str
    lost: int                    # steps, or predictions, that had to be made again
    message: str                 # the last one of the run, or the one that was looked for
    code: int | str              # the exit code, or "hung"
    exact: bool | str            # the result is that of an undisturbed run; "-" if none is due
    good: bool


# ---------------------------------------------------------------- trials
class Lab:
    """Keep a folder with phantoms, their cache and a folder a run, for one script."""

    def __init__(self, folder, script="train_ssl.py", ranks=(1, 2, 4), workers=(0, 2)):
        self.folder = Path(folder).resolve()
        self.script = script
        self.ranks = ranks       # to kill runs on
        self.workers = workers   # to kill runs with
        self.undisturbed = {}    # folders by ranks and flags
        self.stem = script.removesuffix(".py")
        present = len(list(self.folder.glob(f"{self.stem}*")))
        self.numbers = itertools.count(present)

        self.data = phantom.write_dataset(self.folder / "phantoms", 18,
                                          spacing_mm=(10.0, 10.0, 10.0))
        self.common = ["--data", self.data, "--cache", self.folder / "cache"]

    def fresh(self):
        """Return the path of a folder that no run has had, of another Lab in this folder either."""
        for number in self.numbers:
            path = self.folder / f"{self.stem}-{number:03d}"
            if not list(self.folder.glob(f"{path.name}*")):
                return path

    def run(self, folder, *flags, **how):
        """Start a run. how: its ranks, faults and agent, as `Run` has them."""
        console = Path(f"{self.fresh()}.txt")
        return Run(self.script, folder, console, [*self.common, *flags], **how)

    def whole(self, ranks=1, flags=()):
        """Return the folder of the run to which nothing happens."""
        if (ranks, flags) not in self.undisturbed:
            folder = self.fresh()
            code, text = self.run(folder, *flags, ranks=ranks).wait()
            assert code == 0, text
            self.undisturbed[ranks, flags] = folder
        return self.undisturbed[ranks, flags]

    def broken(self, *flags, ranks=1, nth=10):
        """Return the folder of a run that was killed in its nth step."""
        folder = self.fresh()
        kill = Fault("step", "SIGKILL", nth)
        self.run(folder, *flags, ranks=ranks, faults=[kill]).wait()
        return folder

    def trial(self, name, *faults, ranks=1, flags=(), same=(), again=(), most=EVERY - 1, code=-9,
              told="", agent=None):
        """Let a run meet the faults, then resume it to the end; return the Row.

        flags: such as may not change the result. same: such as may, and that the undisturbed run
        has, too. again: a fault for each run that resumes and does not reach the end. most: steps
        that may be lost. code: the exit code of the faulty run. told: a pattern of its message.
        """
        folder = self.fresh()
        run = self.run(folder, *same, *flags, ranks=ranks, faults=faults, agent=agent)
        exit_code, text = run.wait()
        lost = lost_steps(folder)
        for fault in again:
            run = self.run(folder, *same, *flags, "--resume", ranks=ranks, faults=[fault])
            run.wait()
        good = lost <= most and exit_code == code
        return self.resumed(name, folder, lost, text, exit_code, good, told, ranks, flags, same)

    def resumed(self, name, folder, lost=0, text="", code=0, good=True, told="", ranks=1, flags=(),
                same=()):
        """Resume a run to its end, and return the Row of all that came of it.

        lost, text, code: steps, console and exit code of the faulty run, which was as it should be
        if `good`. The others are as in `trial`.
        """
        end_code, end_text = self.run(folder, *same, *flags, "--resume", ranks=ranks).wait()
        text += end_text
        exact = end_code == 0 and fingerprint(folder) == fingerprint(self.whole(ranks, same))
        is_told = re.search(told, text, re.DOTALL) is not None
        is_clean = not list(folder.glob(".*.partial"))
        good = good and exact and is_told and is_clean
        return Row(name, lost, message(text, told), code, exact, good)

    def refused(self, name, folder, *flags, told, code=2, **how):
        """Expect of a run one line that matches `told`, and an exit code; return the Row."""
        exit_code, text = self.run(folder, *flags, **how).wait()
        is_told = re.search(told, text) is not None
        # torchrun shows the traceback of every rank that fails
        is_plain = "agent" in how or "Traceback" not in text
        good = exit_code == code and is_told and is_plain
        return Row(name, 0, message(text, told), exit_code, "-", good)


# ---------------------------------------------------------------- runs
class Run:
    """Start a script: its ranks are forked, or with `agent` a real torchrun has these flags.

    console: the file that takes all it prints. faults: those that all ranks are told of.
    """

    def __init__(self, script, folder, console, flags, ranks=1, faults=(), agent=None):
        self.folder = folder
        self.console = console
        self.faults = list(faults)
        self.begun = time.time()
        console.write_text("")
        RUNS.append(self)

        share = SHARES[script][ranks].split()
        given = [str(flag) for flag in flags]
        flags = [*FLAGS[script], *share, "--out", str(folder), *given]
        if agent is None:
            self.jobs = self.fork_ranks(script, flags, ranks)
        else:
            self.jobs = [self.start_torchrun(script, flags, ranks, agent)]

    def fork_ranks(self, script, flags, ranks):
        """Return the processes of a group of ranks."""
        jobs = []
        for variables in forked.variables_of_ranks(ranks):
            jobs.append(forked.start(be_rank, script, flags, self.faults, self.console, variables))
        return jobs

    def start_torchrun(self, script, flags, ranks, agent):
        """Return the process of a torchrun, whose ranks start injection.py."""
        fields = [fault._asdict() for fault in self.faults]
        variables = {"FAULTS": json.dumps(fields), "OMP_NUM_THREADS": "1"}
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        words = [*launch, *agent, str(TESTS / "injection.py"), script, *flags]
        return forked.start(forked.be_script, words, os.getcwd(), variables, self.console,
                            self.console)

    def codes(self):
        """List the exit codes of its processes, None for those that live."""
        return [job.exitcode for job in self.jobs]

    def wait(self, seconds=900):
        """Wait for the end; return the exit code and the console's text.

        When one rank was killed the others are, too, as schedulers do. The code is the first that
        is not 0, and "hung" if there is none but the time was over.
        """
        end = self.begun + seconds
        codes = self.codes()
        while None in codes and not KILLED & set(codes) and time.time() < end:
            time.sleep(.02)
            codes = self.codes()
        self.signal("SIGKILL")
        for job in self.jobs:
            job.join()

        text = self.console.read_text(errors="replace")
        for code in codes:
            if code not in (None, 0):
                return code, text
        code = "hung" if None in codes else 0
        return code, text

    def signal(self, name):
        """Send a signal to its processes that live."""
        for job in self.jobs:
            if job.exitcode is None:
                os.kill(job.pid, signal.Signals[name])

    def until(self, condition, seconds=120):
        """Wait until condition() holds, or the time is over; return the seconds that it took."""
        begun = time.time()
        while not condition() and time.time() < begun + seconds:
            time.sleep(.05)
        return time.time() - begun

    def is_alive(self):
        """Say whether any process lives that is of it: loader workers and torchrun's ranks too."""
        for process in Path("/proc").glob("[0-9]*"):
            if belongs_to(process, self):
                return True
        return False


def belongs_to(process, run):
    """Say whether a folder of /proc shows a living process of a run."""
    try:
        status = (process / "stat").read_text()
        command = (process / "cmdline").read_text()
    except OSError:              # it has just ended
        return False

    # "pid (name) state parent group session ...", where a name may hold anything
    state, _, _, session = status.rpartition(")")[2].split()[:4]
    if state == "Z":
        return False
    has_folder = f"--out\0{run.folder}\0" in command
    is_in_session = int(session) in [job.pid for job in run.jobs]
    return has_folder or is_in_session


# ---------------------------------------------------------------- what a run leaves
def last_logged_step(folder):
    """Return the last step in log.csv, 0 without one."""
    log = folder / "log.csv"
    if not log.exists():
        return 0
    steps = re.findall(r"^(\d+),.*\n", log.read_text(), re.MULTILINE)
    return max(map(int, steps), default=0)


def kept_step(folder):
    """Return the step from which a run would be resumed, 0 without a checkpoint."""
    alone = runtime.Ranks(0, 1, torch.device("cpu"))
    with contextlib.redirect_stderr(io.StringIO()):
        state = runtime.load_latest(folder, alone)
    return 0 if state is None else state["step"]


def lost_steps(folder):
    """Count the steps that are in the log and that a resumed run has to do again."""
    return last_logged_step(folder) - kept_step(folder)


def fingerprint(folder):
    """Return a sha256 of all that a finished run has made, its settings aside.

    These are its log or its list of cases, predictions, results, and all tensors and numbers of
    its checkpoints. Equal results have equal fingerprints.
    """
    log = folder / "log.csv"
    if not log.exists():
        log = folder / "cases.csv"
    digest = hashlib.sha256(log.read_bytes())

    results = [*sorted(folder.glob("*.nii.gz")), folder / "table.md", folder / "results.json"]
    for path in results:
        if path.exists():
            digest.update(path.read_bytes())

    for name in ("last.pt", "student.pt", "best.pt"):
        if (folder / name).exists():
            state = runtime.load_checkpoint(folder / name)
            state.pop("config", None)
            add_to_digest(digest, [name, state])
    return digest.hexdigest()


def add_to_digest(digest, value):
    """Feed a digest every tensor and plain value that a nested one holds, and every key."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (list, tuple)):
        for entry in value:
            add_to_digest(digest, entry)
    elif isinstance(value, torch.Tensor):
        digest.update(value.numpy().tobytes())
    else:
        digest.update(repr(value).encode())


def message(text, told=""):
    """Pick the last line that matches `told`, else the last error or warning; drop folders."""
    lines = []
    if told:
        lines = [line for line in text.splitlines() if re.search(told, line)]
    if not lines:
        lines = LAST_WORDS.findall(text)
    return FOLDER.sub("", lines[-1]) if lines else "-"
