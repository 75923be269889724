"""Measure contestants by turns, each in a process of its own; count what their operators do [ours].

A spawned process imports this module, so nothing that it runs may live in __main__.py.
"""
import importlib
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from smit.benchmark import workloads
from smit.benchmark.workloads import Setting
from smit.runtime import keep_freed_memory

DEFAULTS = dict(batch=1, precision="fp32", checkpointing=False, compiled=False, backend="inductor",
                keep=True, tiny=False, workers=0, world=1, volumes=0)
PAPER = dict(view=96, dim=48, prototypes=8192, width=2048, volume=(256, 256, 140),
             ct=(512, 512, 300))
QUICK = dict(view=64, dim=12, prototypes=64, width=64, volume=(66, 72, 65), ct=(96, 80, 40))
FEWER_ROUNDS = {"sliding": 1, "prepare": 2, "ranks": 2}  # where one takes long
PROFILED = 3  # calls
CALLS_ON_GPU = 5  # a turn, after one that does not count


# ---------------------------------------------------------------- what operators do
class Traffic(TorchDispatchMode):
    """Count the bytes that operators read and write, and the most that they hold at a time.

    moved: of all tensors that an operator takes, gives, and writes into without giving them; what
    it overwrites is not read, and a view moves nothing.
    most: of what operators made and is still in use. It is what activations and gradients take, a
    little below what an allocator holds.
    """

    def __init__(self):
        super().__init__()
        self.moved = self.held = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = op(*args, **kwargs)
        if is_view(op):
            return results
        inputs = tensors_in((args, kwargs))
        outputs = tensors_in(results)
        targets = targets_of(op, args, kwargs)
        for tensor in read_by(op, inputs, targets) + written_by(op, outputs, targets):
            self.moved += bytes_of(tensor)
        given = {storage_of(tensor) for tensor in inputs}
        for tensor in outputs:
            if storage_of(tensor) not in given | self.known:
                self.hold(tensor.untyped_storage())
        return results

    def hold(self, storage):
        """Count a new piece of memory until it is freed."""
        place, size = storage._cdata, storage.nbytes()
        self.known.add(place)
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self.release, place, size)

    def release(self, place, size):
        self.known.discard(place)
        self.held -= size


def tensors_in(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def targets_of(op, args, kwargs):
    """List the tensors among an operator's arguments that it writes into, by its schema.

    Fused AdamW's has the gradients among them, which it writes with a scaler alone.
    """
    targets = []
    for place, argument in enumerate(op._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            targets += tensors_in(value)
    return targets


def read_by(op, inputs, targets):
    """List the inputs that an operator reads, not those that it replaces or takes the shape of."""
    name = op._schema.name
    if name.endswith("_like") or name.startswith("aten::new_"):
        return []
    return without(inputs, targets) if name in OVERWRITING else inputs


def written_by(op, outputs, targets):
    """List the tensors that an operator writes: its outputs, and what else it changes."""
    if op._schema.name.startswith(("aten::empty", "aten::new_empty")):
        return []
    return outputs + without(targets, outputs)


def without(tensors, others):
    """Leave those tensors out that are others, too."""
    left_out = set(map(id, others))
    return [tensor for tensor in tensors if id(tensor) not in left_out]


def bytes_of(tensor):
    """Return the bytes of a tensor's elements; along an axis of stride 0 all are one."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride]
    return math.prod(sizes) * tensor.element_size()


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


def is_view(op):
    """Tell whether an operator gives another view of its input's memory."""
    return (op is torch.ops.aten._unsafe_view.default         # its schema does not say so
            or any(value.alias_info and not value.alias_info.is_write
                   for value in op._schema.returns))


def attention_flop(query, key, value, *args, out_shape=None, **kwargs):
    """Count two products of attention, of shapes (B, heads, n, c)."""
    batch, heads, n, channels = query
    return 2 * batch * heads * n * key[2] * (channels + value[3])


def attention_backward_flop(grad, query, key, value, *args, out_shape=None, **kwargs):
    """Count the five products of its backward, the scores made again among them."""
    batch, heads, n, channels = query
    return 2 * batch * heads * n * key[2] * (3 * channels + 2 * value[3])


# operators that write into an argument without reading it
OVERWRITING = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::_foreach_copy_",
               "aten::_foreach_zero_"}
# what torch's own counter lacks: fused attention on a CPU
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop,
}


def count(once):
    """Count the work of a call: GFLOP of matrix products and convolutions, GB moved and held."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter as flops, Traffic() as traffic:
        once()
    return dict(gflop=flops.get_total_flops() / 1e9, gb=traffic.moved / 1e9,
                held_gb=traffic.most / 1e9)


def kernels_of(once, device="cuda"):
    """Return (begin, end) of each kernel that a few calls ran on a device, in microseconds."""
    activity = getattr(torch.profiler.ProfilerActivity, device.upper())
    with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(PROFILED):
            once()
        if device == "cuda":
            torch.cuda.synchronize()
    kernels = []
    for event in profiler.events():
        is_copy = event.name.startswith(("Memcpy", "Memset"))
        if event.device_type.name == device.upper() and not is_copy:
            kernels.append((event.time_range.start, event.time_range.end))
    return kernels


def idle_share(kernels):
    """Return the share of the time from the first kernel to the last in which none runs."""
    kernels = sorted(kernels)
    begun = done = kernels[0][0]
    busy = 0
    for begin, end in kernels:
        busy += max(0, end - max(begin, done))
        done = max(done, end)
    return 1 - busy / (done - begun)


# ---------------------------------------------------------------- a contestant's process
def peak_mb(device):
    """Return the most MiB so far: of this process, or of torch on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return status_mb("VmHWM")


def held_mb(device):
    """Return the MiB held now."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / 2 ** 20
    return status_mb("VmRSS")


def status_mb(name):
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) / 2 ** 10


def serve(pipe, contestant, settings):
    """Do a contestant's work once for each True that the pipe gives, and send what it took.

    False ends it: the last message is its memory, and what its operators do.
    """
    torch.manual_seed(0)
    torch.set_num_threads(settings["threads"])
    torch.backends.cudnn.benchmark = True  # as the scripts set it
    if settings["keep"]:
        keep_freed_memory(torch.device(settings["device"]))
    if contestant.is_peer:  # else its imports would count as memory
        for name in ("networks.nets", "inferers", "transforms"):
            importlib.import_module(f"monai.{name}")

    reset_peak(settings["device"])
    start_mb = held_mb(settings["device"])
    at = Setting(settings)
    once = contestant.work(at)
    while pipe.recv():
        pipe.send(timed(at, once))

    result = dict(memory=peak_mb(at.device) - start_mb)
    if contestant.can_be_counted:
        result |= count(once)
    if at.device == "cuda":
        once()  # fetches memory from the card, which the profile should not see
        result["idle"] = idle_share(kernels_of(once))
    pipe.send(result)


def reset_peak(device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def timed(at, once):
    """Return what a call took: {"wall", "cpu", "parts"}, in seconds.

    On a GPU, where calls are short, the mean of several. The call before them fetches memory
    from the card, which is given back at the end: the card is shared with the other contestants.
    """
    calls = 1
    if at.device == "cuda":
        once()
        calls = CALLS_ON_GPU
    wall, cpu = at.clock(), time.process_time()
    for _ in range(calls):
        parts = once()
    took = dict(wall=(at.clock() - wall) / calls, cpu=(time.process_time() - cpu) / calls,
                parts=parts or {})
    if at.device == "cuda":
        torch.cuda.empty_cache()
    return took


# ---------------------------------------------------------------- by turns
def measure_rows(rows, settings, rounds, quick, bar):
    """Measure all rows, {row: [contestant]}; yield (row, {label: result}, rates of the machine)."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**DEFAULTS, **settings, "folder": Path(folder),
                    "port": 29000 + os.getpid() % 999}
        write_cts(rows, settings)
        for row, contestants in rows.items():
            rates = ceiling(settings["device"], 256 if quick else 3072)
            results = measure(contestants, settings, rounds_of(row, rounds), bar)
            for result in results.values():
                add_shares(result, rates)
            yield row, results, rates


def rounds_of(row, rounds):
    return min(rounds, FEWER_ROUNDS.get(row, rounds))


def turns_of(rounds):
    """Return how often each takes its turn: the first does not count if there are several."""
    return rounds + 1 if rounds > 1 else 1


def write_cts(rows, settings):
    """Write the CTs that contestants prepare or load, one of each shape."""
    shapes = set()
    for contestants in rows.values():
        for contestant in contestants:
            if contestant.work in (workloads.prepare, workloads.prepare_monai, workloads.loader,
                                   workloads.headers):
                shapes.add(contestant.settings.get("ct", settings["ct"]))
    for shape in shapes:
        workloads.write_ct(Setting({**settings, "ct": shape}).ct_path(), shape)


def measure(contestants, settings, rounds, bar):
    """Let the contestants of a row take turns: {label: result}."""
    spawn = multiprocessing.get_context("spawn")
    running, results = {}, {}
    for contestant in contestants:
        here, there = spawn.Pipe()
        own = {**settings, **contestant.settings}
        process = spawn.Process(target=serve, args=(there, contestant, own))
        process.start()
        there.close()
        running[contestant.label] = here, process
        results[contestant.label] = dict(precision=own["precision"], batch=own["batch"], rounds=[])

    for turn in range(turns_of(rounds)):
        for label, (pipe, _) in running.items():
            bar.set_postfix_str(label)
            try:
                pipe.send(True)
                took = pipe.recv()
            except (EOFError, OSError):  # it died; its own message is on the screen
                results[label]["failed"] = True
                continue
            if turn or rounds == 1:
                results[label]["rounds"].append(took)
            bar.update()

    for label, (pipe, process) in running.items():
        try:
            if not results[label].get("failed"):
                pipe.send(False)
                results[label] |= pipe.recv() | medians(results[label]["rounds"])
        except (EOFError, OSError):              # it died while its operators were counted
            results[label]["failed"] = True
        process.join(5)
        process.kill()
    return results


def medians(rounds):
    """Return the median of each figure, and of each part, over the rounds."""
    figures = {key: statistics.median(took[key] for took in rounds) for key in ("wall", "cpu")}
    figures["parts"] = {}
    for part in rounds[0]["parts"]:
        figures["parts"][part] = statistics.median(took["parts"][part] for took in rounds)
    return figures


def ceiling(device, n):
    """Measure what the machine can do at best.

    Returns GFLOP/s of a product of n x n matrices in each precision, and as "copy" GB/s.
    """
    a = torch.rand(n, n, device=device)
    names = ("fp32", "bf16", "fp16") if device == "cuda" else ("fp32", "bf16")
    rates = {}
    for name in names:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        x = a.to(dtype)
        rates[name] = 2 * n ** 3 / 1e9 / fastest(device, lambda x=x: x @ x)

    source = torch.ones(4 * n * n, device=device)
    target = torch.ones(4 * n * n, device=device)
    moved_gb = 2 * source.nbytes / 1e9
    rates["copy"] = moved_gb / fastest(device, lambda: target.copy_(source))
    return rates


def fastest(device, work):
    """Return the seconds of the fastest of four calls."""
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best


def add_shares(result, rates):
    """Write into a result the shares of the machine's rates that it reached."""
    if "gflop" in result and "wall" in result:
        result["flop_share"] = result["gflop"] / result["wall"] / rates[result["precision"]]
        result["copy_share"] = result["gb"] / result["wall"] / rates["copy"]
