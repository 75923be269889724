"""Ranks, stop signals, leaving: what a long run needs beside the algorithm [ours].
What one rank sees alone (a NaN, a signal) passes `Ranks.agree`.
What hangs ends the run: a loader worker silent for 5 minutes (`samples.batches`), a rank that does not meet the others
for 10 (`start`); torchrun kills those that cannot leave by themselves 30 s later.
"""
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
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
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


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


# ---------------------------------------------------------------- memory on the CPU
def keep_freed_memory(device):
    """Where `device` is the CPU and the C library glibc, hand freed tensors of up to 1 GiB to the next ones [ours].

    By itself glibc returns every tensor above 32 MiB to the system, whose pages must be zeroed and mapped again for the
    next one: at 96^3 a third of a training step's time. The price: some memory is held and not used.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another system, another C library
        return
    if device.type == "cpu":           # else it is the loader's workers that would hold what they freed
        mallopt(M_MMAP_THRESHOLD, 2 ** 30)
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
