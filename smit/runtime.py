"""Ranks, stop signals, checkpoints, the output folder and the log: what a long run needs beside the algorithm [ours].
A file is whole or not there. No file is trusted. What one rank sees alone (a NaN, a signal) passes `Ranks.agree`.
What hangs ends the run: a loader worker silent for 5 minutes (`sampling.batches`), a rank that does not meet the others
for 10 (`start`); torchrun kills those that cannot leave by themselves 30 s later.
"""
import contextlib
import fcntl
import json
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ORPHAN_GRACE_S = 20  # for a last checkpoint once torchrun's agent is gone
FIRST = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, known before they have joined
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # how often torchrun began again
JOB = f"job {os.environ.get('TORCHELASTIC_RUN_ID')}, agent {os.getppid()}"  # its restarts go on with its own runs only
RUN_FILES = [name + end for name in ("last", "best", "student") for end in (".pt", ".prev.pt")]
RUN_FILES += "log.csv config.json index.html reconstruction.png tokens.png overlay.png".split()


# ---------------------------------------------------------------- ranks
class Ranks(NamedTuple):
    """This process among its peers. With one process every method is local and no process group exists."""
    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def agree(self, *flags):
        """The largest of each bool or int over all ranks, on all of them; every rank must call it. Alone: a barrier."""
        values = torch.tensor([0, *map(int, flags)], device=self.device)
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return tuple(bool(v) if isinstance(flag, bool) else v for flag, v in zip(flags, values.tolist()[1:]))

    def mean(self, tensor):
        """The mean of a float tensor over all ranks; no gradient passes between them."""
        if self.world > 1:
            dist.all_reduce(tensor := tensor.detach().clone())
        return tensor / self.world


def start(device="auto", timeout_minutes=10):
    """Join the peers that torchrun's environment names, or be alone; ValueError if `device` is not there."""
    rank, world, local_rank = (int(os.environ.get(*it)) for it in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    gpus = torch.cuda.device_count()
    kind = device if device != "auto" else "cuda" if gpus else "cpu"
    if kind not in ("cpu", "cuda") or kind == "cuda" and local_rank >= gpus:
        raise ValueError(f"device {kind} has no place for process {local_rank} ({gpus} GPUs): one process each, or cpu")
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=leave_with_parent, args=(os.getppid(),), daemon=True).start()
    if world > 1:  # the prefix: else a restarted group reads its dead predecessors' addresses
        timeout, backend = timedelta(minutes=timeout_minutes), "nccl" if kind == "cuda" else "gloo"
        store = dist.PrefixStore(f"restart_{RESTARTS}", next(dist.rendezvous("env://", timeout=timeout))[0])
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return Ranks(rank, world, local_rank, torch.device(kind, local_rank if kind == "cuda" else None))


def pick_precision(name, device):
    """The dtype to autocast to: fp32, fp16, bf16, or auto: bf16 where the card has it, else fp16; fp32 on CPU."""
    if name == "auto":
        name = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def peak_memory_mb(device):
    """Peak memory in MiB: what torch held on a GPU; on CPU the largest resident size of this process (Linux)."""
    on_cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else on_cpu) / 2**20


# ---------------------------------------------------------------- leaving: errors, signals, a lost parent
def run(main, *arguments):
    """Call main(*arguments); ValueError, OSError: one line and exit code 2; Ctrl-C: 130; a bug: its traceback and 1.
    A rank that may only echo the first error, its peer gone, waits, while torchrun ends the others and quotes it."""
    try:
        main(*arguments)
        if dist.is_initialized():
            dist.barrier()
            sys.stdout.flush()
            os._exit(0)  # an orderly exit may abort in the group's threads
    except (Exception, KeyboardInterrupt) as error:  # all in here: on leaving it Python takes loaders apart, and waits
        code, text, wait_s = 1, traceback.format_exc(), 5
        if isinstance(error, KeyboardInterrupt):
            code, text, wait_s = 130, "interrupted", 0
        elif isinstance(error, (ValueError, OSError)):
            code, wait_s = 2, min(1, int(os.environ.get("RANK", 0)))
            text = "error: {} [{}:{}]".format(error, *traceback.extract_tb(error.__traceback__)[-1][:2])
        report = json.dumps({"message": text, "timestamp": int(time.time())})
        for number in (signal.SIGTERM, signal.SIGCHLD):  # of the latter the loader's handler would raise
            signal.signal(number, signal.SIG_DFL)
        for worker in torch.multiprocessing.active_children():  # a loader's, deaf to Python's SIGTERM
            worker.kill()
        time.sleep(wait_s if dist.is_initialized() else 0)
        print(text, file=sys.stderr)
        with contextlib.suppress(KeyError, OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(report)
        sys.stdout.flush()
        os._exit(code) if dist.is_initialized() else sys.exit(code)  # destroying the group waits for blocked peers


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 set `asked`: the loop ends its step, agrees, saves and leaves."""
    def __init__(self, ranks):
        self.asked, self.is_main = False, ranks.is_main
        for number in STOP_SIGNALS:
            signal.signal(number, self.note)

    def note(self, number, frame):
        if self.is_main and not self.asked:  # os.write, for print is not safe inside a signal handler
            os.write(2, f"\n{signal.Signals(number).name}: saving and leaving after this step\n".encode())
        self.asked = True


def ignore_stop_signals(worker_id=0):
    """A DataLoader's worker_init_fn: torchrun signals whole process groups; the last step still needs its workers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_with_parent(parent):
    """A thread: a worker whose torchrun agent died must not train on unseen. Ask for a clean stop, then leave."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)


# ---------------------------------------------------------------- files that are whole or absent; checkpoints
def atomic_write(path, content):
    """Write bytes, or what content(file) writes, beside `path`, then rename. OSError names path and disk's reason."""
    partial = Path(path).with_name(f".{Path(path).name}.{os.urandom(4).hex()}.partial")
    try:
        with open(partial, "x+b") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(partial.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename too must survive a power loss
        os.close(folder)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides a full disk
        if isinstance(cause, OSError):
            raise OSError(f"{path} could not be written: {cause.strerror or cause}") from error
        raise


def save_checkpoint(path, state):
    """Write a dict of tensors and plain types; the whole checkpoint it replaces stays beside it as <stem>.prev.pt.
    ValueError names the key of an entry that is not plain or not finite, OSError the disk's reason."""
    check_plain({**state}, "state")

    def write(file):
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        check_archive(file)
        with contextlib.suppress(FileNotFoundError, ValueError), open(path, "rb") as old:
            check_archive(old)  # a damaged one must not push out the whole one kept before
            os.replace(path, Path(path).with_suffix(".prev.pt"))
    atomic_write(path, write)


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on CPU; no code in it is run. ValueError names the file and the fault."""
    try:
        if not Path(path).is_file():
            raise ValueError("there is no regular file of this name")
        with open(path, "rb") as file:
            check_archive(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        check_plain({**state}, "state")
        return state
    except Exception as error:  # hostile bytes raise anything at all
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks to run {code[1]}, which was not done" if code else error
        raise ValueError(f"{path} is refused as a checkpoint: {reason}; use another or make it anew") from error


def check_archive(file):
    """Raise ValueError unless all that torch.load would read matches its CRC-32: torch itself never looks."""
    try:
        with zipfile.ZipFile(file) as archive:
            bomb = sum(part.file_size for part in archive.infolist()) > os.fstat(file.fileno()).st_size
            odd = any(part.external_attr & 16 for part in archive.infolist())  # a "folder": torch returns stray memory
            problem = "its directory claims what it cannot hold" if odd or bomb else archive.testzip()
    except Exception as error:
        problem = error
    if problem:
        raise ValueError(f"cut short, damaged or of another kind ({problem})")


def check_plain(value, where):
    """Raise ValueError naming the first entry that is not a finite tensor, a plain type or a container of such."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
        raise ValueError(f"{where} holds NaN or infinity")
    if type(value) in (dict, OrderedDict, list, tuple):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            check_plain(key, f"a key of {where}")
            check_plain(entry, f"{where}[{key!r}]")
    elif type(value) not in (torch.Tensor, torch.nn.Parameter, bool, int, float, str, bytes, type(None)):
        raise ValueError(f"{where} is of {type(value)}; a checkpoint holds tensors and plain types only")


def load_latest(folder, ranks):
    """The whole one of last.pt and last.prev.pt with the larger state["step"]; None only where neither exists."""
    states, problems = {}, []
    for path in filter(os.path.lexists, (Path(folder, "last.pt"), Path(folder, "last.prev.pt"))):
        try:
            state = load_checkpoint(path)
            states[state["step"]] = state
        except ValueError as error:
            problems.append(str(error))
    step = max(states, default=-1)
    if problems and not states:
        raise ValueError(f"{'; '.join(problems)}: no whole checkpoint is left, --overwrite starts anew")
    if ranks.agree(step, -step) != (step, -step):
        raise ValueError(f"rank {ranks.rank} finds step {step} in {folder}, others do not: all nodes must share it")
    if problems and ranks.is_main:
        print(f"warning: {'; '.join(problems)}: going on from the other one, step {step}", file=sys.stderr)
    return states.get(step)


# ---------------------------------------------------------------- the output folder, its log and settings
@contextlib.contextmanager
def OutputFolder(folder, ranks, resume=False, overwrite=False):
    """The one run that writes to a folder, as a context giving its Path; ValueError if it is in use or not writable.
    One that holds a run asks for resume (implied when torchrun restarts) or else overwrite, which deletes RUN_FILES."""
    with claim(Path(folder), resume, overwrite) if ranks.is_main else contextlib.nullcontext():
        ranks.agree()
        yield Path(folder)


def claim(folder, resume, overwrite):
    """Make, lock, try and clean a folder; returns the open lock, which the kernel frees with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+b", buffering=0)
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked loader workers would keep that alive
        resume = resume or RESTARTS > 0 and os.pread(lock.fileno(), 999, 0).endswith(JOB.encode())
        lock.truncate(0)
        lock.write(f"{os.uname().nodename} pid {os.getpid()}".encode())
        atomic_write(folder / ".probe.partial", bytes(1 << 16))  # a full disk shows now
    except BlockingIOError as error:
        holder = (folder / ".lock").read_text().split(",")[0]
        raise ValueError(f"{folder} is in use by {holder}; give another with --out") from error
    except OSError as error:
        reason = "a file or a link to nowhere" if isinstance(error, FileExistsError) else error.strerror or error
        raise ValueError(f"output folder {folder} cannot be used: {reason}; give another with --out") from error
    found = [name for name in RUN_FILES if os.path.lexists(folder / name)]
    if found and not resume and not overwrite:
        raise ValueError(f"{folder} holds a run ({', '.join(found)}): --resume continues it, --overwrite deletes it")
    for path in [*folder.glob(".*.partial"), *(folder / name for name in found if not resume)]:
        path.unlink()
    lock.write(f", {JOB}".encode())
    return lock


class CsvLog:
    """Rank 0's table, first column "step"; a row is in the file when `row` returns; floats have 9 digits.
    resume_step: rows after it, and one cut by a crash, are dropped: the file becomes the uninterrupted run's again."""
    def __init__(self, path, columns, ranks, resume_step=None):
        self.path, self.columns, self.is_main = Path(path), columns, ranks.is_main
        header, rows = ",".join(columns) + "\n", []
        if self.is_main and resume_step is not None and self.path.exists():
            found, *rows = self.path.read_text(errors="replace").splitlines(keepends=True) or [""]
            if found != header:
                raise ValueError(f"{self.path} has the columns {found.strip()}: move it away, or --overwrite the run")
            rows = [row for row in rows if re.fullmatch(r"\d+(,.*)?\n", row) and int(row.split(",")[0]) <= resume_step]
        if self.is_main:
            atomic_write(self.path, "".join([header, *rows]).encode())

    def row(self, **values):
        cells = [values.pop(column, "") for column in self.columns]
        if values:
            raise ValueError(f"{self.path} has no column {', '.join(values)}")
        line = ",".join(f"{cell:.9g}" if isinstance(cell, float) else str(cell) for cell in cells)
        if self.is_main:
            try:
                with open(self.path, "ab", buffering=0) as file:
                    file.write(f"{line}\n".encode())
                    os.fsync(file.fileno())  # else a power loss takes rows that the checkpoint counts
            except OSError as error:
                raise OSError(f"{self.path} could not be written: {error.strerror}") from error


def compare_settings(saved, now, free):
    """One line for each setting that differs from the checkpoint's; ValueError with those that are not in `free`."""
    keys = sorted((saved.keys() | now.keys()) - {"resume", "overwrite", "check"})
    lines = {key: f"{key}: {saved.get(key, 'absent')} in the checkpoint, {now.get(key, 'absent')} now" for key in keys
             if saved.get(key, "absent") != now.get(key, "absent")}
    if matter := [line for key, line in lines.items() if key not in free]:
        raise ValueError(f"the checkpoint is of another run: {'; '.join(matter)}; use its settings or another --out")
    return list(lines.values())
