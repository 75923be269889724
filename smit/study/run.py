"""Steps of a study: which are finished, what the others may take, running them."""
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from smit.study import tables

ROOT = Path(__file__).resolve().parents[2]


def command(args, step):
    """What to call: flags as text, the launcher before the training scripts where there is more than one rank."""
    launch = [sys.executable]
    if args.ranks > 1 and step.script != "evaluate.py":
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    return [*launch, str(ROOT / step.script), *map(str, step.flags)]


def finished(args, step):
    """The record of a finished step, or None. ValueError where its folder was made with other flags."""
    path = Path(args.out, step.name, "step.json")
    record = json.loads(path.read_text()) if path.exists() else None
    if record and record["flags"] != [step.script, *map(str, step.flags)]:
        raise ValueError(f"{path.parent} was made with other flags, {shlex.join(record['flags'])}: give another --out")
    return record


def estimate(args, steps):
    """What is known of the time that is left, from finished steps of the same script in OUT."""
    took = {script: [] for script in ("train_ssl.py", "finetune.py", "evaluate.py")}
    for path in Path(args.out).glob("*/*/step.json"):
        record = json.loads(path.read_text())
        took[record["flags"][0]].append(record["wall_s"])
    left = [step.script for step in steps if not finished(args, step)]
    if unknown := sorted({script for script in left if not took[script]}):
        return f"{len(left)} to run; no estimate before one step each of {', '.join(unknown)} is finished"
    seconds = sum(statistics.median(took[script]) for script in left)
    return f"{len(left)} to run; about {seconds / 3600 / args.parallel:.1f} hours, {args.parallel} at a time"


def start(args, step):
    """Begin a step, or go on with it; returns its process, with `step` and `begun` noted on it."""
    out = Path(args.out, step.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    more = ["--out", str(out)]
    more += [] if step.script == "evaluate.py" else ["--cache", str(Path(args.out, "cache")), "--resume"]
    threads = max(1, (os.cpu_count() or 1) // (args.parallel * args.ranks))
    with open(f"{out}.log", "ab") as log:
        process = subprocess.Popen(command(args, step) + more, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    process.step, process.begun, process.threads = step, time.monotonic(), threads
    return process


def finish(args, process, status, usage):
    """Record a step that ended well; False, and a line that says where to look, for one that did not."""
    process.returncode = os.waitstatus_to_exitcode(status)
    step, out = process.step, Path(args.out, process.step.name)
    if process.returncode:
        tqdm.write(f"{step.name} failed with exit code {process.returncode}; see {out}.log", file=sys.stderr)
        return False
    record = {"flags": [step.script, *map(str, step.flags)], "wall_s": time.monotonic() - process.begun,
              "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024, "ranks": args.ranks,
              "threads": process.threads, "cores": os.cpu_count(), "torch": str(torch.__version__)}
    tables.write(out / "step.json", json.dumps(record, indent=1))
    return True


def run(args, steps):
    """Run what is not finished, in order, `parallel` at a time; ValueError naming what failed, after all the rest."""
    waiting = [step for step in steps if not finished(args, step)]
    done, failed, running = {step.name for step in steps} - {step.name for step in waiting}, [], {}
    bar = tqdm(total=len(steps), initial=len(done), unit="step", disable=None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            ready = [step for step in waiting if done.issuperset(step.needs)]
            for step in ready[:args.parallel - len(running)]:
                waiting.remove(step)
                process = start(args, step)
                running[process.pid] = process
            if not running:                                              # what is left needs something that failed
                break
            pid, status, usage = os.wait4(-1, 0)
            if pid in running:
                process = running.pop(pid)
                (done.add if finish(args, process, status, usage) else failed.append)(process.step.name)
                bar.update()
    finally:
        for process in running.values():                                 # trainings save, and go on with the next call
            process.terminate()
        for process in running.values():
            process.wait()
        bar.close()
    if failed:
        raise ValueError(f"{len(failed)} steps failed and {len(waiting)} that need them were left: {', '.join(failed)}")
