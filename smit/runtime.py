"""Ranks, stop signals, checkpoints, the output folder and the log: what a long run needs beside the algorithm [ours].

Three rules. A file is whole or not there: written beside its name, fsynced, renamed. No file is trusted: a checkpoint's
checksums come first, and its pickle builds tensors and plain types only. All ranks decide alike: what one rank sees
alone (a NaN, a signal) passes through `Ranks.agree` before anyone acts on it. Read it in the order of the banners.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ORPHAN_GRACE_S = 20  # for a last checkpoint once torchrun's agent is gone
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # how often torchrun --max-restarts began again
RUN_FILES = ["log.csv", "config.json"] + [n + e for n in ("last", "best", "student") for e in (".pt", ".prev.pt")]


# ---------------------------------------------------------------- ranks
@dataclass(frozen=True)
class Ranks:
    """This process among its peers. With one process every method is local and no process group exists."""
    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def agree(self, *flags):
        """The largest value of each bool or int over all ranks, the same tuple everywhere; every rank must call it."""
        values = torch.tensor([int(flag) for flag in flags], device=self.device)
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return tuple(bool(v) if isinstance(flag, bool) else v for flag, v in zip(flags, values.tolist()))

    def mean(self, tensor):
        """The mean of a float tensor over all ranks, without gradient."""
        total = tensor.detach().clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total / self.world

    def barrier(self):
        self.agree(0)

    def share(self, value):
        """Rank 0's value on every rank: a pickle, but one that this job's own rank 0 has just made, never a file's."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def start(device="auto", timeout_minutes=10):
    """Join the peers that torchrun's environment names (gloo on CPU, nccl on GPU) or be the only process.

    device: "auto" (a GPU if there is one), "cpu" or "cuda"; ValueError for one that is not there.
    """
    rank, world, local_rank = (int(os.environ.get(*it)) for it in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    gpus = torch.cuda.device_count()
    kind = device if device != "auto" else "cuda" if gpus else "cpu"
    if kind not in ("cpu", "cuda") or kind == "cuda" and local_rank >= gpus:
        raise ValueError(f"device {kind}: process {local_rank} of this machine has none ({gpus} GPUs are visible); "
                         "start one process a GPU, or choose cpu")
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=leave_with_parent, args=(os.getppid(),), daemon=True).start()
    if world > 1:
        timeout = timedelta(minutes=timeout_minutes)
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"restart_{RESTARTS}", store)  # else a restart reads its dead predecessors' addresses
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return Ranks(rank, world, local_rank, torch.device(kind, local_rank if kind == "cuda" else None))


def pick_precision(name, device):
    """The dtype to autocast to: "fp32", "fp16", "bf16", or "auto": bf16 where the card has it, else fp16; fp32 on CPU."""
    if name == "auto":
        name = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def peak_memory_mb(device):
    """Peak memory in MiB: what torch held on a GPU; on CPU the largest resident size of this process (Linux)."""
    on_gpu = device.type == "cuda"
    return (torch.cuda.max_memory_allocated(device) if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**20


# ---------------------------------------------------------------- leaving: errors, signals, a lost parent
def run(main, *arguments):
    """Call main(*arguments); ValueError, OSError: one line, exit code 2; Ctrl-C: 130; a bug: its traceback and 1.

    The first error must be the last thing shown. So a rank that may only echo one (a collective whose peer is gone
    raises RuntimeError) waits, while torchrun sees the first rank leave, ends the others and quotes the first error.
    """
    try:
        main(*arguments)
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except KeyboardInterrupt:
        code, text, wait_s = 130, "interrupted", 0
    except (ValueError, OSError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        code, text = 2, f"error: {error} [{Path(place.filename).name}:{place.lineno}]"
        wait_s = 0 if os.environ.get("RANK", "0") == "0" else 1
    except Exception:
        code, text, wait_s = 1, traceback.format_exc(), 5
    report = json.dumps({"message": text, "timestamp": int(time.time())})
    if dist.is_initialized():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(wait_s)
    print(text, file=sys.stderr)
    with contextlib.suppress(KeyError, OSError):
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(report)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # ends the process group too, without waiting for peers that are blocked in it
    sys.exit(code)


class StopSignals:
    r"""SIGTERM, SIGINT and SIGUSR1 set `asked`: the loop ends its step, agrees, saves and leaves. Ctrl-\ leaves at once."""

    def __init__(self, ranks):
        self.asked, self.is_main = False, ranks.is_main
        for number in STOP_SIGNALS:
            signal.signal(number, self.note)

    def note(self, number, frame):
        if self.is_main and not self.asked:  # os.write, for print is not safe inside a signal handler
            os.write(2, f"\n{signal.Signals(number).name}: saving and leaving after this step\n".encode())
        self.asked = True


def ignore_stop_signals(worker_id=0):
    """A DataLoader's worker_init_fn: torchrun signals whole process groups, and the last step still needs its workers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_with_parent(parent):
    """A thread: workers whose torchrun agent died must not train on unseen. Ask for a clean stop, then leave regardless."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)


# ---------------------------------------------------------------- writing
def atomic_write(path, write):
    """Call write(file) on a temporary beside `path`, then rename: `path` is the old file or the new one, always whole.

    Raises OSError naming the path and the disk's reason.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        with disk_errors_named(path):
            with open(partial, "x+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # the rename too must survive a power loss
            os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def disk_errors_named(path):
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error
        while isinstance(cause, RuntimeError):  # torch.save hides a full disk behind "unexpected pos"
            cause = cause.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"{path} could not be written: {cause.strerror or cause}") from error


def file_sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------- checkpoints
def save_checkpoint(path, state):
    """Write a dict of tensors and plain types; the whole checkpoint it replaces stays beside it as <stem>.prev.pt.

    Raises ValueError naming the key of an entry that is not plain or not finite, OSError for the disk; the old one stays.
    """
    check_plain(state, "state")

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
    """The dict that save_checkpoint wrote, on CPU; no code in it is run. ValueError names the file and what is wrong."""
    try:
        if not Path(path).is_file():
            raise ValueError("not a regular file" if Path(path).exists() else "no such file")
        with open(path, "rb") as file:
            check_archive(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__} and no dict")
        check_plain(state, "state")
        return state
    except Exception as error:  # hostile bytes raise anything at all
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks to run {code[1]}, which was not done" if code else error
        raise ValueError(f"{path} is refused as a checkpoint: {reason}; use another or make it anew") from error


def check_archive(file):
    """Raise ValueError unless all that torch.load would read matches its CRC-32: torch itself never looks."""
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > os.fstat(file.fileno()).st_size:
                raise ValueError("it claims more bytes than it has")  # a bomb: torch.save never compresses
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
    except Exception as error:
        raise ValueError(f"cut short, damaged or of another kind ({error})") from error


def check_plain(value, where):
    """Raise ValueError naming the first entry that is not a finite tensor, a plain type or a container of such."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{where} holds NaN or infinity")
    elif type(value) in (dict, OrderedDict, list, tuple):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            check_plain(key, f"a key of {where}")
            check_plain(entry, f"{where}[{key!r}]")
    elif type(value) not in (bool, int, float, str, bytes, type(None)):
        raise ValueError(f"{where} is of {type(value)}; a checkpoint holds tensors and plain types only")


def load_latest(folder, ranks):
    """The whole one of last.pt and last.prev.pt with the larger state["step"], or None where neither exists.

    Raises ValueError, never a silent fresh start, when all are damaged or the ranks find different ones.
    """
    states, problems = {}, []
    for path in filter(os.path.lexists, (Path(folder, "last.pt"), Path(folder, "last.prev.pt"))):
        try:
            state = load_checkpoint(path)
            if type(state.get("step")) is not int:
                raise ValueError(f"{path} has no step number")
            states[state["step"]] = state
        except ValueError as error:
            problems.append(str(error))
    step = max(states, default=-1)
    if problems and not states:
        raise ValueError(f"{'; '.join(problems)}: no whole checkpoint is left, --overwrite starts anew")
    if ranks.agree(step, -step) != (step, -step):
        raise ValueError(f"rank {ranks.rank} finds step {step} in {folder}, another rank does not: all nodes must share it")
    if problems and ranks.is_main:
        warnings.warn(f"{'; '.join(problems)}: going on from the other checkpoint, step {step}", stacklevel=2)
    return states.get(step)


# ---------------------------------------------------------------- the output folder
@contextlib.contextmanager
def OutputFolder(folder, ranks, resume=False, overwrite=False):
    """The one run that writes to a folder: `with OutputFolder(...) as out`. Rank 0 claims it, then all ranks go on.

    A folder with a run in it needs resume (implied when torchrun restarts the job) or overwrite, which deletes the
    run's files; resume wins. Raises ValueError for a folder that cannot be written, is in use, or holds a run.
    """
    folder = Path(folder)
    with claim(folder, resume or RESTARTS > 0, overwrite) if ranks.is_main else contextlib.nullcontext():
        ranks.barrier()
        yield folder


def claim(folder, resume, overwrite):
    """Make, lock, try and clean a folder; returns the open lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_for_this_process(folder / ".lock")
        atomic_write(folder / ".probe", lambda file: file.write(bytes(1 << 16)))
    except OSError as error:
        reason = "a file or a link to nowhere" if isinstance(error, FileExistsError) else error.strerror or error
        raise ValueError(f"output folder {folder} cannot be used: {reason}; give another with --out") from error
    for left_over in [folder / ".probe", *folder.glob(".*.partial")]:
        left_over.unlink()
    found = [name for name in RUN_FILES if os.path.lexists(folder / name)]
    if found and not resume and not overwrite:
        raise ValueError(f"{folder} holds a run ({', '.join(found)}): --resume continues it, --overwrite deletes it")
    for name in [] if resume else found:
        (folder / name).unlink()
    return lock


def lock_for_this_process(path):
    """Lock a file or name its holder. The kernel frees it with the process; unlike flock's, no forked worker keeps it."""
    lock = open(path, "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.seek(0)
        raise ValueError(f"{path.parent} is in use by {lock.read() or 'another run'}: wait or give another --out") from error
    lock.truncate(0)
    lock.write(f"{os.uname().nodename} pid {os.getpid()}")
    lock.flush()
    return lock


# ---------------------------------------------------------------- log and settings
class CsvLog:
    """Rank 0's table, one row a call, in the file when the call returns; floats with 9 digits. The first column is "step".

    resume_step: rows after it, and one that a crash cut, are dropped: the file becomes the uninterrupted run's again.
    """

    def __init__(self, path, columns, ranks, resume_step=None):
        self.path, self.columns, self.is_main = Path(path), columns, ranks.is_main
        header, rows = ",".join(columns) + "\n", []
        if self.is_main and resume_step is not None and self.path.exists():
            found, *rows = self.path.read_text(errors="replace").splitlines(keepends=True) or [""]
            if found != header:
                raise ValueError(f"{self.path} has the columns {found.strip()}: move it away, or --overwrite the run")
            rows = [row for row in rows if re.fullmatch(r"\d+,.*\n", row) and int(row.split(",")[0]) <= resume_step]
        if self.is_main:
            atomic_write(self.path, lambda file: file.write("".join([header, *rows]).encode()))

    def row(self, **values):
        """Add a row; a column without a value stays empty, a value without a column is a ValueError."""
        if unknown := values.keys() - set(self.columns):
            raise ValueError(f"{self.path} has no column {', '.join(sorted(unknown))}")
        cells = [values.get(column, "") for column in self.columns]
        line = ",".join(f"{cell:.9g}" if isinstance(cell, float) else str(cell) for cell in cells)
        if self.is_main:
            with disk_errors_named(self.path), open(self.path, "a") as file:
                file.write(line + "\n")


def compare_settings(saved, now, free):
    """One line for each setting that differs from the checkpoint's; ValueError with all if one is not in the set `free`."""
    differ = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key, "absent") != now.get(key, "absent")]
    lines = [f"{key}: {saved.get(key, 'absent')} in the checkpoint, {now.get(key, 'absent')} now" for key in differ]
    if not set(differ) <= set(free):
        raise ValueError(f"the checkpoint is of another run: {'; '.join(lines)}; use its settings or another --out")
    return lines
