"""Join the other ranks, pick the precision, and leave in order [ours].

An event that one rank sees alone, a NaN or a signal, is shared through `Ranks.agree`.

Nothing may hang for ever. A loader worker that is silent for 5 minutes ends the run, and so does
a rank that does not meet the others for 10 (`start`). After that torchrun ends the processes that
cannot leave by themselves within 30 s.
"""
import contextlib
import ctypes
import json
import os
import re
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

try:
    import fcntl  # noqa: F401  files.py locks with it
    import resource
except ImportError:
    # no ImportError: this sentence is all that a user should see
    raise SystemExit("smit runs on Linux and macOS; on Windows, run it inside WSL") from None

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ORPHAN_GRACE_S = 20  # for a last checkpoint once torchrun's agent is gone
ECHO_WAIT_S = 60  # torchrun ends the other ranks within seconds; on a busy machine it took 16
FIRST_LOSS_SCALE = 2.0 ** 12  # of fp16; from torch's 2^16 the first steps overflow and are skipped
LOST_PEER = "closed by peer|reset by peer|Broken pipe|remote process exited"  # of gloo, of NCCL
WORKER_DEATH = r"(DataLoader worker .*(killed by signal|exited unexpectedly)|shared memory)"
LOADER_FAULTS = {  # what torch says of its loader, and what to do about it
    WORKER_DEATH:
        "shared or main memory is too small: give fewer --workers, or --workers 0; "
        "in Docker start the container with --shm-size 8g",
    "DataLoader timed out": "the disk or the network under the data does not answer",
}
PACKAGE = Path(__file__).resolve().parents[1]
WARNED = set()  # the kinds of warnings that this process has shown
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


# ---------------------------------------------------------------- what torchrun says
def launched_by_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarts():
    """Count how often torchrun has started this group anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def job():
    """Name the torchrun call that this process belongs to.

    The agent's process id is part of the name, for a run id may be used twice.
    """
    return f"job {os.environ.get('TORCHELASTIC_RUN_ID')}, agent {os.getppid()}"


def is_first():
    """Tell whether this is the first of torchrun's processes; known before they have joined."""
    return os.environ.get("RANK", "0") == "0"


def warn_once(kind, message):
    """Print one warning of a kind: from the first rank, and not from each of its loader workers."""
    worker = torch.utils.data.get_worker_info()
    if kind not in WARNED and is_first() and (worker is None or worker.id == 0):
        print(f"warning: {message}", file=sys.stderr, flush=True)
    WARNED.add(kind)


# ---------------------------------------------------------------- ranks
class Ranks(NamedTuple):
    """This process among its peers. Alone, every method is local and no process group exists."""
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def agree(self, *flags):
        """Return the largest of each bool or int over all ranks, to all of them.

        Every rank must call it. Without flags it is a barrier.
        """
        if self.world == 1:
            return flags                        # a GPU is not waited for
        values = torch.tensor([0, *map(int, flags)]).to(self.device, non_blocking=True)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        agreed = values.tolist()[1:]
        return tuple(type(flag)(value) for flag, value in zip(flags, agreed))

    def gather(self, values):
        """Return the lists of all ranks, one after the other in the order of ranks, to all of them.

        values: a list of what JSON can write. Every rank must call it.
        """
        if self.world == 1:
            return [values]
        text = json.dumps(values).encode()
        (longest,) = self.agree(len(text))
        padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).to(self.device)
        lists = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(lists, padded)
        return [json.loads(bytes(part.tolist())) for part in lists]

    def mean(self, tensor):
        """Return the mean of a float tensor over all ranks; no gradient passes between them."""
        if self.world > 1:
            tensor = tensor.detach().clone()
            dist.all_reduce(tensor)
        return tensor / self.world

    def mean_of(self, numbers):
        """Return {name: mean over all ranks} of {name: number or tensor of one number}.

        All ranks give the same names. Tensors on a GPU are fetched in one copy, the only wait.
        """
        values = []
        for number in numbers.values():
            if not isinstance(number, torch.Tensor):
                number = torch.full((), number, device=self.device)     # no copy from the host
            values.append(number.detach().to(self.device, torch.float32))
        if not values:
            return {}
        return dict(zip(numbers, self.mean(torch.stack(values)).tolist()))


def start(device="auto", timeout_minutes=10):
    """Join the peers that torchrun's environment names, or be alone.

    device: "cpu", "cuda" or "auto", a GPU where there is one. ValueError if it is not there.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = place_of(device, local_rank)
    if device.type == "cuda":
        set_up_gpu(device)
    keep_freed_memory(device)
    if launched_by_torchrun():
        threading.Thread(target=leave_with_parent, args=(os.getppid(),), daemon=True).start()
    if world > 1:
        join_group(rank, world, device, timedelta(minutes=timeout_minutes))
    return Ranks(rank, world, device)


def place_of(name, local_rank):
    """Return the torch.device of this process; ValueError if there is none of this name for it."""
    gpus = torch.cuda.device_count()
    if name == "auto":
        if not gpus and torch.version.cuda:
            warn_once("no gpu", "torch was built for CUDA and finds no GPU: this runs on the CPU")
        name = "cuda" if gpus else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda" and not gpus:
        raise ValueError("device cuda: torch finds no GPU; is its build for CUDA, does the driver "
                         "answer to nvidia-smi? Or give --device cpu")
    if name != "cuda" or local_rank >= gpus:
        raise ValueError(f"device {name} has no place for process {local_rank} ({gpus} GPUs): "
                         "one process each, or cpu")
    return torch.device("cuda", local_rank)


def set_up_gpu(device):
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # shapes are fixed: the fastest convolution is found once
    warn_of_slow_convolutions(torch.backends.cudnn.version())


def warn_of_slow_convolutions(cudnn):
    """Warn of the cuDNN versions 9.8 to 9.14, given as 90800 and so on.

    Their 3-D convolutions in half precision were wrong (pytorch#163539), so torch avoids them.
    """
    if cudnn and 90800 <= cudnn < 91500:
        number = f"{cudnn // 10000}.{cudnn // 100 % 100}"
        warn_once("cudnn", f"with cuDNN {number} torch avoids 3-D convolutions in fp16 and bf16, "
                  "so fine-tuning and prediction are several times slower than they could be; "
                  "install a build of torch with cuDNN 9.15 or newer, of which none serves a V100, "
                  "or use --precision fp32")


def join_group(rank, world, device, timeout):
    """Meet the other ranks: NCCL on GPUs, gloo on CPUs."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    # without a prefix a restarted group reads the addresses of its dead predecessors
    store = dist.PrefixStore(f"restart_{restarts()}", store)
    # without its device NCCL guesses one at the first barrier
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world,
                            timeout=timeout, device_id=device if on_gpu else None)


# ---------------------------------------------------------------- precision, memory
class Precision:
    """How networks compute: fp32, or fp16 and bf16 under autocast.

    name: "fp32", "fp16", "bf16" or "auto", which is bf16 where the card has it, else fp16, and
    fp32 on CPU. The scaler enlarges the loss of fp16 and does nothing otherwise.
    """

    def __init__(self, name, device):
        if name == "auto":
            name = best_precision(device)
        self.name, self.device = name, device
        self.dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
        self.scaler = torch.amp.GradScaler(device.type, init_scale=FIRST_LOSS_SCALE,
                                           enabled=name == "fp16")
        if name == "bf16" and device.type == "cpu" and lacks_bf16(read_cpu_flags()):
            warn_once("bf16", "this CPU has no bf16 arithmetic: a step in bf16 takes 5 to 9 times "
                      "as long as in fp32; use --precision fp32")

    def autocast(self):
        """Return a context in which matrix products and convolutions have this precision.

        On a GPU norms and what follows them stay in float32. A CPU's autocast gives them this
        precision, too, so bf16 is a little rougher there.
        """
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")


def best_precision(device):
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def read_cpu_flags():
    """Return the names of the CPU's instruction sets; none where the system does not tell."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        for line in lines:
            name, _, flags = line.partition(":")
            if name.strip() in ("flags", "Features"):  # x86, ARM
                return set(flags.split())
    return set()


def lacks_bf16(flags):
    """Tell whether flags are known and name no arithmetic in bf16 (AVX-512, AMX, ARM)."""
    return bool(flags) and not flags & {"avx512_bf16", "amx_bf16", "bf16"}


def describe_memory(net, teacher=None):
    """Say how large a network is, and what training it holds before any activation."""
    size, held = 0, 0
    for parameter in net.parameters():
        size += parameter.numel()
        # a weight that learns has a gradient and two moments of AdamW beside it
        held += parameter.numel() * (4 if parameter.requires_grad else 1)
    parts = "it, its gradients and AdamW"
    if teacher is not None:
        held += sum(parameter.numel() for parameter in teacher.parameters())
        parts = "it, its gradients, AdamW and the teacher"
    mib = held * 4 / 2 ** 20  # float32
    return f"network of {size:,} parameters; {mib:.0f} MiB for {parts}, before activations"


def peak_memory_mb(device):
    """Return peak memory in MiB: torch's on a GPU; on CPU the largest resident size so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    unit = 1 if sys.platform == "darwin" else 2 ** 10  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20


def keep_freed_memory(device):
    """Let glibc hand freed tensors of up to 1 GiB to the next ones; on the CPU alone [ours].

    By itself glibc returns every tensor above 32 MiB to the system, whose pages must be zeroed
    and mapped again for the next one: at 96^3 a third of a training step's time. The price: some
    memory is held and not used.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another system, another C library
        return
    if device.type == "cpu":  # beside a GPU the loader's workers would hold what they freed
        mallopt(M_MMAP_THRESHOLD, 2 ** 30)
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


# ---------------------------------------------------------------- leaving: errors, signals
def run(main, *arguments):
    """Call main(*arguments), then leave the process with an exit code.

    An error of the user's (ValueError, OSError, no memory, a dead loader worker) is one line and
    exit code 2, Ctrl-C is 130, a bug shows its traceback and is 1.
    """
    with contextlib.suppress(AttributeError):  # a terminal may lack letters of a patient's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(*arguments)
        if dist.is_initialized():
            dist.barrier()
            leave(0)
    except (Exception, KeyboardInterrupt) as error:
        # all of it in here: when this branch ends, Python takes loaders apart, and waits for them
        raised_at = int(time.time())
        code, text = describe(error)
        quieten_signals()
        kill_loader_workers()
        wait_for_the_first_error(error, code)
        print(text, file=sys.stderr)
        tell_torchrun(text, raised_at)
        leave(code)


def describe(error):
    """Return (exit code, text to show) of what ended a run."""
    if isinstance(error, KeyboardInterrupt):
        return 130, f"interrupted{hint_of_torchrun()}"
    if is_out_of_memory(error):
        return 2, (f"error: {str(error) or 'no memory is left'}; give a smaller --batch; or "
                   "--checkpointing, to train, and --stitch_on_cpu to evaluate.py")
    for pattern, advice in LOADER_FAULTS.items():
        if fault := re.search(f"^.*{pattern}.*$", str(error), re.MULTILINE):
            return 2, f"error: {fault[0].strip()}; {advice}; training goes on with --resume"
    if isinstance(error, (ValueError, OSError)):
        return 2, f"error: {error}{place_of_bug(error)}"
    return 1, traceback.format_exc()


def is_out_of_memory(error):
    """Tell whether an error says that memory ran out, a GPU's or the machine's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error)                  # on a CPU a plain RuntimeError


def place_of_bug(error):
    """Return " [file:line]" of an error that no `raise` of this package made, else "".

    Such a ValueError was not foreseen: whoever mends it needs the place, and no user does.
    """
    if isinstance(error, OSError):  # names its file and the system's reason
        return ""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(frame.filename)
    is_ours = PACKAGE in file.parents or file.parent == PACKAGE.parent
    if is_ours and (frame.line or "").startswith("raise "):
        return ""
    return f" [{frame.filename}:{frame.lineno}]"


def hint_of_torchrun():
    if launched_by_torchrun():
        return " (torchrun adds a traceback of its own, which is harmless)"
    return ""


def quieten_signals():
    """Let a second SIGTERM end the process, and keep the loader from raising over dead workers."""
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)


def kill_loader_workers():
    """Kill them, for they ignore SIGTERM (`ignore_stop_signals`) and would outlive this process."""
    for worker in torch.multiprocessing.active_children():
        worker.kill()


def wait_for_the_first_error(error, code):
    """Wait where another rank may tell more, until torchrun quotes that one and ends all.

    A rank whose peer is gone fails inside torch: an echo, which looks like a bug. Any other error
    is shown by rank 0 where all ranks meet it.
    """
    if not dist.is_initialized() or code == 130:
        return
    is_echo = isinstance(error, RuntimeError) and re.search(LOST_PEER, str(error))
    time.sleep(ECHO_WAIT_S if is_echo else min(1, int(os.environ.get("RANK", 0))))


def tell_torchrun(text, raised_at):
    """Leave the error where torchrun looks for it; it quotes the earliest of all ranks."""
    report = json.dumps({"message": text, "timestamp": raised_at})
    with contextlib.suppress(KeyError, OSError):
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(report)


def leave(code):
    """End the process.

    With a process group at once: destroying it waits for blocked peers, and an orderly exit may
    abort in its threads.
    """
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


class StopSignals:
    """Set `asked` on SIGTERM, SIGINT and SIGUSR1: the loop ends its step, saves and leaves."""

    def __init__(self, ranks):
        self.asked, self.is_main = False, ranks.is_main
        self.told = f": saving and leaving after this step; --resume goes on{hint_of_torchrun()}\n"
        for number in STOP_SIGNALS:
            signal.signal(number, self.note)

    def note(self, number, frame):
        if self.is_main and not self.asked:  # os.write, for print is not safe in a signal handler
            os.write(2, f"\n{signal.Signals(number).name}{self.told}".encode())
        self.asked = True


def ignore_stop_signals(worker_id=0):
    """Start a DataLoader's worker so that it outlives a stop signal (as worker_init_fn).

    torchrun signals whole process groups, and the last step still needs its workers.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class WorkerDeaths:
    """Keep the death of a loader worker until batches are asked for: a context around asking.

    torch raises it from SIGCHLD, wherever the process is: in a step half done, or while it saves.
    Raised here, it finds the run between two batches.
    """

    def __init__(self):
        self.asking = False
        self.kept = None                        # the error of a worker that died meanwhile
        self.raise_deaths = None                # torch's handler of SIGCHLD

    def __enter__(self):
        self.raise_kept()
        self.asking = True

    def __exit__(self, kind, error, trace):
        self.asking = False
        if isinstance(error, (ConnectionError, EOFError)):
            time.sleep(1)           # a dying worker's connection may break before SIGCHLD comes
            self.raise_kept()
        elif isinstance(error, RuntimeError):
            self.kept = None        # the loader tells of the death, maybe in its own words
        in_place = signal.getsignal(signal.SIGCHLD)
        in_main = threading.current_thread() is threading.main_thread()
        if callable(in_place) and in_place != self.note and in_main:
            # torch has set its own with the first workers
            self.raise_deaths = signal.signal(signal.SIGCHLD, self.note)

    def raise_kept(self):
        error = self.kept
        self.kept = None
        if error:
            raise error

    def note(self, number, frame):
        try:
            self.raise_deaths(number, frame)
        except RuntimeError as error:
            self.kept = error
            if self.asking:                     # maybe in vain: Python drops what a callback raises
                raise


worker_deaths = WorkerDeaths()


def leave_with_parent(parent):
    """Watch, in a thread, the torchrun agent: without it a rank would train on, unseen.

    When it dies, ask for a clean stop, then leave.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)
