"""Run the steps of a study, several at a time, each once [ours].

Reading order: commands and records, the estimate, one step, all steps.
"""
import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from smit.study.plan import Step
from smit.study.scores import write

ROOT = Path(__file__).resolve().parents[2]


def command(args, step):
    """List the words that start a step, by torchrun where a training has more than one rank."""
    words = [sys.executable]
    if args.ranks > 1 and step.script != "evaluate.py":
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    if step.script.endswith(".py"):
        words.append(str(ROOT / step.script))
    else:
        words += ["-m", step.script]
    return [*words, *map(str, step.flags)]


def signature(step):
    """List the script and its flags as text, as they stand in step.json."""
    return [step.script, *map(str, step.flags)]


def finished(args, step):
    """Read the record of a finished step, or None.

    ValueError if its folder was made with other flags.
    """
    path = Path(args.out, step.name, "step.json")
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    if record["flags"] != signature(step):
        raise ValueError(f"{path.parent} was made with other flags, {shlex.join(record['flags'])}: "
                         "give another --out")
    return record


def estimate(args, steps):
    """Say how long the rest may take, from finished steps of the same script in OUT."""
    seconds_of = {}
    for path in Path(args.out).glob("*/*/step.json"):
        record = json.loads(path.read_text())
        seconds_of.setdefault(record["flags"][0], []).append(record["wall_s"])

    left = [step.script for step in steps if not finished(args, step)]
    unknown = sorted(set(left) - seconds_of.keys())
    if unknown:
        return (f"{len(left)} to run; no estimate before one step each of {', '.join(unknown)} "
                "is finished")
    seconds = sum(statistics.median(seconds_of[script]) for script in left)
    hours = seconds / 3600 / args.parallel
    return f"{len(left)} to run; about {hours:.1f} hours, {args.parallel} at a time"


class Running(NamedTuple):
    """A step under way."""
    step: Step
    process: subprocess.Popen
    begun: float                       # time.monotonic(), seconds
    threads: int


def spent_path(args, step):
    """Name the file that says what all calls of a step took, beside its folder."""
    return Path(args.out, f"{step.name}.spent.json")


def start(args, step):
    """Begin a step, or go on with one that was cut off."""
    out = Path(args.out, step.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():                               # someone wants it from the beginning
        spent_path(args, step).unlink(missing_ok=True)
    words = [*command(args, step), "--out", str(out)]
    if step.script != "evaluate.py":
        words += ["--cache", str(Path(args.out, "cache")), "--resume"]

    threads = max(1, (os.cpu_count() or 1) // (args.parallel * args.ranks))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    with open(f"{out}.log", "ab") as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   env=environment)
    return Running(step, process, time.monotonic(), threads)


def add_up(args, running, usage):
    """Add the call that ended to what earlier ones of its step took, which were cut off.

    usage: of os.wait4. Returns {"wall_s", "cpu_s", "peak_mb"} of all calls.
    """
    path = spent_path(args, running.step)
    before = {"wall_s": 0, "cpu_s": 0, "peak_mb": 0}
    if path.exists():
        before = json.loads(path.read_text())
    spent = {
        "wall_s": before["wall_s"] + time.monotonic() - running.begun,
        "cpu_s": before["cpu_s"] + usage.ru_utime + usage.ru_stime,
        "peak_mb": max(before["peak_mb"], usage.ru_maxrss / 1024),
    }
    write(path, json.dumps(spent, indent=1))
    return spent


def finish(args, running, status, usage):
    """Record a step that ended, and return whether it ended well; tell where to look if not.

    status, usage: of os.wait4.
    """
    step = running.step
    out = Path(args.out, step.name)
    code = os.waitstatus_to_exitcode(status)
    running.process.returncode = code                  # else Popen waits for the process once more
    spent = add_up(args, running, usage)
    if code:
        tqdm.write(f"{step.name} failed with exit code {code}; see {out}.log", file=sys.stderr)
        return False
    record = {
        "flags": signature(step),
        **spent,
        "ranks": args.ranks,
        "threads": running.threads,
        "cores": os.cpu_count(),
        "torch": str(torch.__version__),
    }
    write(out / "step.json", json.dumps(record, indent=1))
    return True


def run(args, steps):
    """Run what is not finished, in order, `parallel` steps at a time.

    A failure stops only the steps that need it. ValueError names what failed, after all the rest.
    """
    waiting = [step for step in steps if not finished(args, step)]
    done = {step.name for step in steps} - {step.name for step in waiting}
    failed = []
    running = {}                                                        # process id: Running
    bar = tqdm(total=len(steps), initial=len(done), unit="step", disable=None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            ready = [step for step in waiting if done.issuperset(step.needs)]
            for step in ready[:args.parallel - len(running)]:
                waiting.remove(step)
                begun = start(args, step)
                running[begun.process.pid] = begun
            if not running:            # the steps that are left need one that failed
                break

            pid, status, usage = os.wait4(-1, 0)
            if pid not in running:
                continue
            ended = running.pop(pid)
            if finish(args, ended, status, usage):
                done.add(ended.step.name)
            else:
                failed.append(ended.step.name)
            bar.update()
    finally:
        # trainings that are asked to leave save, and go on with the next call
        for step in running.values():
            step.process.terminate()
        for step in running.values():
            with contextlib.suppress(ChildProcessError):       # it had just ended, and was waited for
                _, status, usage = os.wait4(step.process.pid, 0)
                step.process.returncode = os.waitstatus_to_exitcode(status)
                add_up(args, step, usage)
        bar.close()
    if failed:
        raise ValueError(f"{len(failed)} steps failed and {len(waiting)} that need them were left: "
                         f"{', '.join(failed)}")
