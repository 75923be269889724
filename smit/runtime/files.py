"""Checkpoints, the output folder and the log: files that are whole or not there. No file is trusted [ours]."""
import contextlib
import fcntl
import os
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

from smit.runtime.ranks import JOB, RESTARTS

RUN_FILES = [name + end for name in ("last", "best", "student") for end in (".pt", ".prev.pt")]
RUN_FILES += "log.csv config.json index.html reconstruction.png tokens.png overlay.png".split()


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
