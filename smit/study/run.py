"""Run the steps of a study, several at a time, each once [ours].

Reading order: commands and records, the estimate, one step, stop signals, all steps.
"""
import contextlib
import functools
import hashlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from smit.study.plan import Step
from smit.study.scores import read_log, write

ROOT = Path(__file__).resolve().parents[2]
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def is_training(step):
    """Tell whether a step trains: it may have several ranks, and a stopped one goes on."""
    return step.script != "evaluate.py"


def command(args, step):
    """List the words that start a step, by torchrun where a training has more than one rank."""
    words = [sys.executable]
    if args.ranks > 1 and is_training(step):
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    if step.script.endswith(".py"):
        words.append(str(ROOT / step.script))
    else:
        words += ["-m", step.script]
    return [*words, *map(str, step.flags)]


def signature(step):
    """List the script and its flags as text, as they stand in step.json."""
    return [step.script, *map(str, step.flags)]


def signatures_before(step):
    """Map the name of each step that this one builds on, directly or not, to its signature."""
    signatures = {}
    for needed in step.needs:
        signatures |= {needed.name: signature(needed), **signatures_before(needed)}
    return signatures


def read_record(args, step):
    """Read the step.json of a step that came to its end, or None."""
    path = Path(args.out, step.name, "step.json")
    return json.loads(path.read_text()) if path.exists() else None


def sources(args, step):
    """Fingerprint what a step reads: {name of a step or path of a file: text, None if unknown}.

    Those are the runs of the steps that it needs, and the files that --data and --init name. A
    folder is known by its dataset.json, which it is read through; without one it has none.
    """
    found = {}
    for needed in step.needs:
        found[needed.name] = (read_record(args, needed) or {}).get("made")
    made = {f"{args.out}/{needed.name}/student.pt" for needed in step.needs}
    made = {os.path.abspath(path) for path in made}
    for path in paths_read(step):
        inside = os.path.join(path, "dataset.json")
        if os.path.isfile(inside):
            path = inside
        if path not in made and os.path.isfile(path):
            found[path] = digest(path, os.stat(path).st_mtime_ns)
    return found


def paths_read(step):
    """List the words that follow --data and --init in a step's flags, up to the next flag."""
    paths = []
    flag = None
    for word in map(str, step.flags):
        if word.startswith("--"):
            flag = word
        elif flag in ("--data", "--init"):
            paths.append(word)
    return paths


@functools.cache
def digest(path, mtime_ns):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def refuse_other_sources(args, step, then):
    """Raise ValueError if a step was made, or begun, from something that is another one now.

    then: its `sources` of that time, None for a step of an older study.
    """
    now = sources(args, step)
    for name, mark in then.items():
        if mark and now.get(name) != mark:
            folder = Path(args.out, step.name)
            raise ValueError(f"{folder} was made from another {name} than is there now: delete "
                             f"{folder} to make it anew, or give another --out")


def finished(args, step):
    """Read the record of a finished step, or None.

    ValueError if it was made with other flags or ranks, from steps with other flags, or from files
    or runs that have been replaced.
    """
    record = read_record(args, step)
    if not record:
        return None
    path = Path(args.out, step.name, "step.json")
    if record["flags"] != signature(step):
        raise ValueError(f"{path.parent} was made with other flags, {shlex.join(record['flags'])}: "
                         "give another --out")
    if is_training(step) and record.get("ranks", args.ranks) != args.ranks:
        raise ValueError(f"{path.parent} was made with --ranks {record['ranks']}, and so with "
                         "another batch: give as many --ranks, or another --out")

    # records of older studies have no "needs"
    needs_then = record.get("needs", {})
    for name, flags in signatures_before(step).items():
        if needs_then.get(name, flags) != flags:
            raise ValueError(f"{path.parent} was made from {name} with other flags, "
                             f"{shlex.join(needs_then[name])}: delete {path.parent} to make it "
                             "anew, or give another --out")
    refuse_other_sources(args, step, record.get("sources", {}))
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


def begun_path(args, step):
    """Name the file that says what an unfinished step was begun from, beside its folder."""
    return Path(args.out, f"{step.name}.begun.json")


def spent_path(args, step):
    """Name the file that says what all calls of a step took, beside its folder."""
    return Path(args.out, f"{step.name}.spent.json")


def refuse_to_go_on(args, step):
    """Raise ValueError if a step was cut off, and what it was begun from is another one now."""
    begun = begun_path(args, step)
    if begun.exists() and Path(args.out, step.name).exists():
        refuse_other_sources(args, step, json.loads(begun.read_text()))


def start(args, step):
    """Begin a step, or go on with one that was cut off. ValueError as `refuse_to_go_on`."""
    refuse_to_go_on(args, step)
    out = Path(args.out, step.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    begun = begun_path(args, step)
    if not out.exists():                               # it is new, or wanted from the beginning
        spent_path(args, step).unlink(missing_ok=True)
        begun.unlink(missing_ok=True)
    if not begun.exists():
        write(begun, json.dumps(sources(args, step), indent=1))
    words = [*command(args, step), "--out", str(out)]
    if is_training(step):
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


def steps_taken(folder):
    """Read how far a training came: (last step in its log.csv, steps of the whole run).

    Of a run that came to its end the last step is always logged.
    """
    log = read_log(folder / "log.csv")
    total = json.loads((folder / "config.json").read_text())["total"]
    return int(log["step"][-1]) if log else 0, total


def finish(args, running, status, usage):
    """Record a step that came to its end, and return whether it did; tell about it if not.

    status, usage: of os.wait4.
    """
    step = running.step
    out = Path(args.out, step.name)
    code = os.waitstatus_to_exitcode(status)
    running.process.returncode = code                  # os.wait4 took it, so Popen is told
    spent = add_up(args, running, usage)
    if code:
        tqdm.write(f"{step.name} failed with exit code {code}; see {out}.log", file=sys.stderr)
        return False
    if is_training(step):
        # a training that a signal stopped has saved, and its exit code is 0, too
        taken, total = steps_taken(out)
        if taken < total:
            tqdm.write(f"{step.name} stopped at step {taken} of {total}, by its log.csv; the same "
                       "command goes on", file=sys.stderr)
            return False

    record = {
        "flags": signature(step),
        "made": uuid.uuid4().hex,                      # what is made from it names this run
        "needs": signatures_before(step),
        "sources": json.loads(begun_path(args, step).read_text()),
        **spent,
        "ranks": args.ranks,
        "threads": running.threads,
        "cores": os.cpu_count(),
        "torch": str(torch.__version__),
    }
    write(out / "step.json", json.dumps(record, indent=1))
    begun_path(args, step).unlink()
    return True


def interrupt_once(number, frame):
    """Raise KeyboardInterrupt at the first stop signal, and ignore those that follow.

    GNU timeout sends two at once: to the study, then to its whole process group.
    """
    ignore_stop_signals()
    raise KeyboardInterrupt


def ignore_stop_signals():
    for number in STOP_SIGNALS:
        signal.signal(number, do_nothing)


def do_nothing(number, frame):
    """Handle a signal. Python would complain of SIG_IGN if a signal is on its way already."""


def tell(text):
    """Print a line at once, above the bar where that is on the same screen."""
    tqdm.write(text)
    sys.stdout.flush()


def run(args, steps):
    """Run what is not finished, in order, `parallel` steps at a time.

    Of a failed or stopped step only those that need it are left out.
    ValueError names them, after all the rest. KeyboardInterrupt after SIGTERM and Ctrl-C.
    """
    waiting = [step for step in steps if not finished(args, step)]
    done = {step.name for step in steps} - {step.name for step in waiting}
    failed = []
    running = {}                                                        # process id: Running
    bar = tqdm(total=len(steps), initial=len(done), unit="step", disable=None)
    handlers = {number: signal.signal(number, interrupt_once) for number in STOP_SIGNALS}
    try:
        while waiting or running:
            ready = [step for step in waiting
                     if all(needed.name in done for needed in step.needs)]
            if not (ready or running):                 # all that are left need one that failed
                break
            for step in ready[:args.parallel - len(running)]:
                waiting.remove(step)
                try:
                    begun = start(args, step)
                except ValueError as error:
                    tqdm.write(f"{step.name} failed: {error}", file=sys.stderr)
                    failed.append(step.name)
                    bar.update()
                    continue
                running[begun.process.pid] = begun
                tell(f"{step.name} begins; see {args.out}/{step.name}.log")
            if not running:                            # none of them could begin
                continue

            pid, status, usage = os.wait4(-1, 0)
            if pid not in running:
                continue
            ended = running.pop(pid)
            if finish(args, ended, status, usage):
                done.add(ended.step.name)
                if bar.disable or not sys.stdout.isatty():
                    tell(f"{len(done)} of {len(steps)} steps: {ended.step.name}")
            else:
                failed.append(ended.step.name)
            bar.update()
    finally:
        ignore_stop_signals()
        # trainings that are asked to leave save, and go on with the next call
        for step in running.values():
            step.process.terminate()
        for step in running.values():
            with contextlib.suppress(ChildProcessError):   # it had just ended, and was waited for
                _, status, usage = os.wait4(step.process.pid, 0)
                step.process.returncode = os.waitstatus_to_exitcode(status)
                add_up(args, step, usage)
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if failed:
        raise ValueError(f"{len(failed)} steps failed or were stopped, and {len(waiting)} that "
                         f"need them were left: {', '.join(failed)}")
