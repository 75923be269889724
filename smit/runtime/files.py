"""Write files that are whole or absent: checkpoints, a run's folder, its log [ours].

Trust no file.
"""
import contextlib
import errno
import fcntl
import math
import os
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

from smit.runtime.ranks import job, restarts, warn_once

RUN_FILES = ("last.pt", "last.prev.pt", "best.pt", "best.prev.pt", "student.pt", "student.prev.pt",
             "log.csv", "config.json", "index.html")  # they mark a folder as that of a run
UNTOLD = {"resume", "overwrite", "check", "prepare_only", "format", "sizes_given"}  # not a run's
LISTING = ".files"  # in a run's folder: names of all that `atomic_write` wrote there
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
CONTAINERS = (dict, OrderedDict, list, tuple)
PLAIN = (*CONTAINERS, bool, int, float, str, type(None))
PICKLED = re.compile(  # what torch.save has a pickle ask for, where all is plain
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|"
    r"torch (Bool|Byte|Char|Short|Int|Long|Half|BFloat16|Float|Double)Storage|"
    r"torch Complex(Float|Double)Storage")

# What a checkpoint may hold at most [ours]: entries, of which a run's has some thousand;
# containers within each other; bytes of tensors, as a multiple of the file's, which is above 1
# where layers are tied; parts of a tuple, with those of tuples in it; and copies of dicts, of which
# each state dict makes one
MOST_ENTRIES = 2 ** 18
MOST_DEPTH = 64
MOST_SHARES = 64
MOST_PARTS = 4096
MOST_COPIES = 32


# ---------------------------------------------------------------- files that are whole or absent
def atomic_write(path, content):
    """Write a file beside `path`, then rename it: a reader finds the old file or the new one.

    content: bytes, or a function that writes to the open file. OSError names path and reason.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        with open(partial, "x+b") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            sync(file)
        os.replace(partial, path)
        sync_folder(path.parent)
        note_as_written(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # torch.save hides a full disk behind a RuntimeError of its own
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OSError(f"{path} could not be written: {cause.strerror or cause}") from error
        raise


def sync(file):
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder):
    """Make a rename in a folder survive a power loss, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
        warn_once("folder sync", f"{folder}: this file system cannot sync folders "
                  f"({error.strerror}): a power loss may take the newest files")
    finally:
        os.close(descriptor)


def note_as_written(path):
    """Add a name to the listing of its folder, if it keeps one."""
    with contextlib.suppress(OSError), open(path.with_name(LISTING), "r+") as listing:
        if path.name not in listing.read().splitlines():
            listing.write(path.name + "\n")


# ---------------------------------------------------------------- checkpoints
def save_checkpoint(path, state):
    """Write a dict of tensors and plain types; keep the checkpoint before it as <stem>.prev.pt.

    ValueError names the key of an entry that is not plain or not finite, OSError the reason.
    """
    check_plain({**state})

    def write(file):
        torch.save(state, file)
        sync(file)
        check_archive(file)
        keep_the_one_before(path)

    atomic_write(path, write)


def keep_the_one_before(path):
    """Name a whole checkpoint <stem>.prev.pt, too; a damaged one must not push that out.

    `path` itself stays, for somebody may read it until the new one takes its place.
    """
    path = Path(path)
    previous = path.with_suffix(".prev.pt")
    link = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    with contextlib.suppress(FileNotFoundError, ValueError), open(path, "rb") as old:
        check_archive(old)
        if previous.exists() and previous.samefile(path):
            return  # a kill at this place left both names; renaming one to the other does nothing
        try:
            os.link(path, link)
        except OSError:  # this file system has no second names
            link = path
        os.replace(link, previous)


def load_checkpoint(path):
    """Read the dict that save_checkpoint wrote, on CPU; no code in it is run.

    ValueError names the file and the fault.
    """
    try:
        if not Path(path).is_file():
            raise ValueError("there is no regular file of this name")
        with open(path, "rb") as file:
            check_archive(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
            check_plain({**state}, os.fstat(file.fileno()).st_size)
        return state
    except Exception as error:  # hostile bytes raise anything at all
        raise ValueError(f"{path} is refused as a checkpoint: {error}; "
                         "use another or make it anew") from error


def check_archive(file):
    """Raise ValueError unless all that torch.load would read is safe and matches its CRC-32.

    torch itself never looks. From an entry marked as a folder it returns stray memory. It takes a
    file for an archive by its first bytes, where zipfile looks at the last ones.
    """
    try:
        file.seek(0)
        begins = file.read(4) == b"PK\x03\x04"
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            is_bomb = sum(part.file_size for part in parts) > os.fstat(file.fileno()).st_size
            is_odd = any(part.external_attr & 16 for part in parts)
            if not begins or parts[0].header_offset != 0 or archive.comment:
                problem = "it does not begin and end as an archive"
            elif is_odd or is_bomb:
                problem = "its directory claims what it cannot hold"
            else:
                problem = archive.testzip()
            for part in [] if problem else parts:
                # torch does not mind capitals
                if part.orig_filename.lower().endswith("data.pkl"):
                    check_pickle(archive.read(part))
    except Exception as error:  # hostile bytes raise anything at all
        problem = error
    if problem:
        raise ValueError(f"cut short, damaged or of another kind ({problem})")


def check_pickle(data):
    """Raise ValueError unless a pickle is such as torch.save writes for tensors and plain types.

    torch itself runs more. bytearray takes any memory, and _codecs.encode any memory or time. To
    hash a tuple takes any time where its parts share theirs, and ends the process where it is deep.
    An OrderedDict can be made of a large one, again and again.

    Nothing is made here: in place of a value, the stack has how many parts it has, or the name of
    what is asked for.
    """
    stack, marks, memo, copies, before = [], [], {}, 0, ""
    for operation, argument, _ in pickletools.genops(data):
        name, takes = operation.name, operation.stack_before
        start = len(stack) - len(takes)
        if pickletools.markobject in takes:
            start = marks.pop() - takes.index(pickletools.markobject)

        value = 1
        if name == "GLOBAL":
            value = argument
            if not PICKLED.fullmatch(argument):
                asked = re.sub(r"[^\w.]+", ".", argument)[:100]
                raise ValueError(f"it asks to run {asked}, which was not done: where it comes "
                                 "from, save tensors and plain numbers alone")
        elif name.startswith("TUPLE"):
            value += sum(1 if isinstance(part, str) else part for part in stack[start:])
            if value > MOST_PARTS:
                raise ValueError(f"a tuple in it has more than {MOST_PARTS:,} parts")
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            value = memo[argument]
        elif name == "BUILD":
            copies += 1
        elif name == "REDUCE" and stack[start] == "collections OrderedDict":
            copies += before != "EMPTY_TUPLE"
        if copies > MOST_COPIES:
            raise ValueError(f"it copies a dict more than {MOST_COPIES} times")
        stack[start:] = [value] * len(operation.stack_after)
        before = name


def check_plain(state, room=math.inf):
    """Raise ValueError naming the first entry that is no finite tensor, plain type or container.

    room: bytes of the state's file. Few bytes can claim any memory and any time, by tensors that
    name the same values again and again, and by lists that hold the same lists. No value is read
    before such a claim is refused.
    """
    claimed = 0
    for number, (entry, where) in enumerate(walk(state, "state")):
        if number == MOST_ENTRIES:
            raise ValueError(f"{where} comes after {MOST_ENTRIES:,} entries, the most that a "
                             "checkpoint may have")
        if type(entry) in (torch.Tensor, torch.nn.Parameter):
            claimed += claimed_bytes(entry, where)
            if claimed > MOST_SHARES * room:
                raise ValueError(f"{where} and the tensors before it claim {claimed:,} bytes of a "
                                 f"file of {room:,}")
            if entry.is_floating_point() and not torch.isfinite(entry).all():
                raise ValueError(f"{where} holds NaN or infinity")
        elif type(entry) not in PLAIN:
            raise ValueError(f"{where} is of {type(entry)}; "
                             "a checkpoint holds tensors and plain types only")


def walk(value, where, depth=0):
    """Yield (entry, where it stands) of a value and of all keys and entries in it.

    What stands in two places comes twice. ValueError for containers that never end.
    """
    yield value, where
    if type(value) not in CONTAINERS:
        return
    if depth == MOST_DEPTH:
        raise ValueError(f"{where} is the {depth}th container within another, the most that a "
                         "checkpoint may have")
    is_dict = isinstance(value, dict)
    for key, entry in value.items() if is_dict else enumerate(value):
        if is_dict:
            yield from walk(key, f"a key of {where}", depth + 1)
        yield from walk(entry, f"{where}[{key!r}]", depth + 1)


def claimed_bytes(tensor, where):
    """Return the bytes of a tensor's values; ValueError unless its memory holds them all."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        raise ValueError(f"{where} is a tensor of another kind than numbers side by side")
    claimed = math.prod(tensor.shape) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if claimed > held:
        raise ValueError(f"{where} claims {claimed:,} bytes and has {held:,}: it is an expanded "
                         "view, of which a copy must be saved")
    return claimed


# ---------------------------------------------------------------- the state of a run
def save_state(path, parts, **facts):
    """Write the state of a run, for `resume`.

    parts: {name: module, optimizer, scaler, or None}. facts: step, config and what else to keep.
    """
    state = {}
    for name, part in parts.items():
        state[name] = None if part is None else part.state_dict()
    save_checkpoint(path, {**state, **facts, "torch": str(torch.__version__)})


def resume(folder, parts, config, free, ranks, defaults=None, upgrade=None):
    """Load the newest state of a run into its parts; return the facts saved with it.

    A folder without a checkpoint gives {"step": 0, "skipped": 0}.
    config: the settings now; those that differ from the checkpoint's are told if they are in
    `free`, else ValueError names them. defaults: values of settings that only one of the two has,
    for a flag that came or went since the run began. upgrade(state, parts): returns the state of a
    run in an older format in today's.
    The run of a folder that OutputFolder was asked to overwrite is deleted first: call this when
    all that can refuse the new run has been done.
    """
    clear(Path(folder), ranks)
    state = load_latest(folder, ranks)
    if state is None:
        return {"step": 0, "skipped": 0}
    if upgrade:
        state = upgrade(state, parts)
    defaults = defaults or {}
    changes = compare_settings({**defaults, **state["config"]}, {**defaults, **config}, free)
    if ranks.is_main:
        for change in changes:
            print(f"resumed with another {change}")
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(state[name])
    return {name: fact for name, fact in state.items() if name not in parts}


def load_latest(folder, ranks):
    """Read the whole one of last.pt and last.prev.pt with the larger state["step"], or None.

    None, too, for a run that is to be overwritten. ValueError where files are there and none is
    whole, or where ranks find different steps.
    """
    if Path(folder) in to_clear:
        return None
    states, problems = {}, []
    for path in (Path(folder, "last.pt"), Path(folder, "last.prev.pt")):
        if not os.path.lexists(path):
            continue
        try:
            state = load_checkpoint(path)
            has_step = isinstance(state.get("step"), int)
            if not (has_step and isinstance(state.get("config", {}), dict)):
                raise ValueError(f"{path} holds no state of a run")
            states[state["step"]] = state
        except ValueError as error:
            problems.append(str(error))

    step = max(states, default=-1)
    if problems and not states:
        raise ValueError(f"{'; '.join(problems)}: no whole checkpoint is left, "
                         "--overwrite starts anew")
    if ranks.agree(step, -step) != (step, -step):
        raise ValueError(f"rank {ranks.rank} finds step {step} in {folder}, others do not: "
                         "all nodes must share it")
    if problems and ranks.is_main:
        print(f"warning: {'; '.join(problems)}: going on from the other one, step {step}",
              file=sys.stderr)
    return states.get(step)


def saved_settings(folder, ranks):
    """Return the settings of the run that goes on in a folder, or {} for a new one."""
    state = load_latest(folder, ranks)
    return state.get("config", {}) if state else {}


def compare_settings(saved, now, free):
    """List each setting that differs from the checkpoint's, one line each.

    ValueError with those that are not in `free`.
    """
    told, refused = [], []
    for key in sorted(saved.keys() | now.keys()):
        before, after = saved.get(key, "absent"), now.get(key, "absent")
        if before == after or key in UNTOLD:
            continue
        line = f"{key}: {before} in the checkpoint, {after} now"
        told.append(line)
        if key not in free:
            refused.append(line)
    if refused:
        raise ValueError(f"the checkpoint is of another run: {'; '.join(refused)}; "
                         "use its settings or another --out")
    return told


# ---------------------------------------------------------------- the output folder and its log
to_clear = set()  # folders that begin anew, until `resume` has cleared them; alike on all ranks


@contextlib.contextmanager
def OutputFolder(folder, ranks, resume=False, overwrite=False):
    """Hold a folder as its one writer, as a context that gives its Path.

    A folder that holds a run asks for resume (implied when torchrun restarts), or for overwrite:
    then the function `resume` deletes what the run wrote there and nothing else. ValueError if the
    folder is in use or not writable.
    """
    folder = Path(folder)
    with claim(folder, resume, overwrite) if ranks.is_main else contextlib.nullcontext():
        (anew,) = ranks.agree(folder in to_clear)
        if anew:
            to_clear.add(folder)
        yield folder


def claim(folder, resume, overwrite):
    """Make, lock and try a folder; return the open lock, which ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+b", buffering=0)
        take_lock(lock, folder)
        is_restart = restarts() > 0 and os.pread(lock.fileno(), 999, 0).endswith(job().encode())
        lock.truncate(0)
        lock.write(f"{os.uname().nodename} pid {os.getpid()}".encode())
        atomic_write(folder / ".probe.partial", bytes(1 << 16))  # a full disk shows now
    except BlockingIOError as error:
        holder = (folder / ".lock").read_text().split(",")[0]
        raise ValueError(f"{folder} is in use by {holder}; give another with --out") from error
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error, FileExistsError):
            reason = "a file or a link to nowhere"
        raise ValueError(f"output folder {folder} cannot be used: {reason}; "
                         "give another with --out") from error

    resume = resume or is_restart
    found = [name for name in RUN_FILES if os.path.lexists(folder / name)]
    if found and not resume and not overwrite:
        raise ValueError(f"{folder} holds a run ({', '.join(found)}): "
                         "--resume continues it, --overwrite deletes it")
    for partial in folder.glob(".*.partial"):
        partial.unlink()
    to_clear.discard(folder)
    if not resume:
        to_clear.add(folder)
    lock.write(f", {job()}".encode())
    return lock


def take_lock(lock, folder):
    """Lock an open file; BlockingIOError if another process has it."""
    try:
        # not flock: forked loader workers would keep that one alive
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn_once("lock", f"{folder}: this file system has no locks ({error.strerror}): "
                  "see to it that no second run writes there")


def clear(folder, ranks):
    """Delete the run in a folder that begins anew. Every rank must call it."""
    if folder not in to_clear:
        return
    if ranks.is_main:
        delete_run(folder)
        (folder / LISTING).touch()
    ranks.agree()
    to_clear.remove(folder)


def delete_run(folder):
    """Delete what a run wrote into a folder: its own files, and those that the listing names."""
    names = set(RUN_FILES)
    with contextlib.suppress(FileNotFoundError):
        names |= set((folder / LISTING).read_text(errors="replace").splitlines())
    names.add(LISTING)
    for name in names:
        # a listing from elsewhere must not lead out of the folder
        path = folder / name
        if path.parent == folder and (path.is_file() or path.is_symlink()):
            path.unlink()


class CsvLog:
    """Write rank 0's table, whose first column is "step"; floats have 9 digits.

    A row is on the disk when `row` returns. With resume_step the rows after it, and one cut by a
    crash, are dropped: the file becomes that of the uninterrupted run again.
    """

    def __init__(self, path, columns, ranks, resume_step=None):
        self.path, self.columns, self.is_main = Path(path), columns, ranks.is_main
        if not self.is_main:
            return
        lines = [",".join(columns) + "\n"]
        if resume_step is not None and self.path.exists():
            lines += self.rows_until(resume_step)
        atomic_write(self.path, "".join(lines).encode())

    def rows_until(self, last_step):
        """Return the whole rows up to a step, with a run's columns of today.

        ValueError if a column that is no longer there holds anything.
        """
        text = self.path.read_text(errors="replace")
        header, *lines = text.splitlines(keepends=True) or [""]
        before = header.strip().split(",")
        gone = set(before) - set(self.columns)

        rows = []
        for line in lines:
            step = re.match(r"(\d+),?.*\n", line)
            if not step or int(step[1]) > last_step:
                continue
            cells = dict(zip(before, line.rstrip("\n").split(",")))
            if any(cells.get(column) for column in gone):
                raise ValueError(f"{self.path} has the columns {header.strip()}: "
                                 "move it away, or --overwrite the run")
            rows.append(",".join(cells.get(column, "") for column in self.columns) + "\n")
        return rows

    def row(self, **values):
        cells = []
        for column in self.columns:
            value = values.pop(column, "")
            cells.append(f"{value:.9g}" if isinstance(value, float) else str(value))
        if values:
            raise ValueError(f"{self.path} has no column {', '.join(values)}")
        if self.is_main:
            self.append(",".join(cells) + "\n")

    def append(self, line):
        try:
            with open(self.path, "ab", buffering=0) as file:
                file.write(line.encode())
                os.fsync(file.fileno())  # else a power loss takes rows that the checkpoint counts
        except OSError as error:
            raise OSError(f"{self.path} could not be written: {error.strerror}") from error
