"""Time and memory of each part of the work, beside MONAI's where it is installed, and beside what the machine can do.

    python -m smit.benchmark                            # all rows, at the paper's sizes: 12 minutes on two cores
    python -m smit.benchmark --only encoder finetune    # some of them
    python -m smit.benchmark --quick                    # small sizes: does it run? Its figures mean nothing
    python -m smit.benchmark --device cuda --compile    # fp16 and bf16; batch 1, 2, 4, 8; with and without compiling

Every contestant of a row works in a process of its own, and they take turns, one round of all after the other, so that
a machine that drifts hurts all alike. Shown are medians over the rounds, after one that does not count:

    wall, CPU    seconds; CPU is the sum over the threads of the contestant's first process
    memory       MiB: the peak of that process above what it held once its imports were done (Linux's VmHWM); on a GPU
                 the allocator's. Ours and MONAI's run on the same allocator settings, those of our scripts
    GFLOP, GB    counted from the operators: matrix products and convolutions; all tensors that operators read and write
    of ceiling   GFLOP and GB over the wall time, as shares of a large matrix product's and a large copy's rate, which
                 were measured in the same run and the same precision. Above 1 for GB: it came from the cache
"""
import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from smit.runtime import keep_freed_memory
from smit.benchmark.workloads import (DTYPES, complete, encoder, finetune, headers, loader, monai_encoder, monai_step, prepare,
                            ranks, sliding, step, write_ct)

PAPER = dict(view=96, dim=48, prototypes=8192, width=2048, volume=(256, 256, 140), ct=(512, 512, 300))
QUICK = dict(view=64, dim=12, prototypes=64, width=64, volume=(66, 72, 65), ct=(96, 80, 40))
ROUNDS = {"sliding": 1, "prepare": 2, "ranks": 2}        # fewer than --rounds, where one takes long
V100_FLOPS, V100_SHARE = 125e12, 0.3           # the card's fp16 peak, and a step's assumed share of it


# ---------------------------------------------------------------------------------------------------- rows
def contestants(args):
    """{row: [(label, function, its arguments, settings other than the default)]}."""
    ours, peer, cuda = dict(peer=False), dict(peer=True), args.device == "cuda"
    bf16, saving = dict(precision="bf16"), dict(checkpointing=True)
    if cuda:
        ways = [dict(precision=precision, batch=batch, compile=compile) for precision in ("fp16", "bf16")
                for compile in ([False, True] if args.compile else [False]) for batch in (1, 2, 4, 8)]
        say = lambda way: f"{way['precision']}, batch {way['batch']}" + ", compiled" * way["compile"]
        both = lambda fast, slow: [(f"{who} {say(way)}", work, {}, way) for way in ways
                                   for who, work in (("ours", fast), ("MONAI", slow))]
        return {"encoder": both(encoder, monai_encoder), "step": both(step, monai_step) + [
                    ("ours fp16, batch 2, checkpointing", step, {}, dict(precision="fp16", batch=2) | saving)],
                "finetune": [(f"{who} {say(way)}", finetune, kind, way) for way in ways
                             for who, kind in (("ours", ours), ("MONAI", peer))],
                "sliding": [("ours", sliding, ours, bf16), ("MONAI", sliding, peer, bf16)]}
    compiled = [("ours, compiled", dict(compile=True))] if args.compile else []
    kinds = [("ours", {}), ("ours, bf16", bf16), ("ours, checkpointing", saving), *compiled]
    side = args.sizes["view"] // 3
    three = lambda what, name, points: [(f"{what} {point}", encoder, {}, {"view": 2 * side, name: point})
                                        for point in points]
    cts = [(n, {"ct": (side * 2, side * 2, side * n)}) for n in (1, 2, 4)]
    return {
        "encoder": [(label, encoder, {}, way) for label, way in kinds] + [
            ("ours, glibc's own settings", encoder, {}, dict(keep=False)), ("MONAI", monai_encoder, {}, {}),
            ("MONAI, glibc's own settings", monai_encoder, {}, dict(keep=False))],
        "step": [(label, step, {}, way) for label, way in kinds] + [("MONAI, student only", monai_step, {}, {})],
        "finetune": [(label, finetune, ours, way) for label, way in kinds if way is not saving] + [
            ("MONAI SwinUNETR", finetune, peer, {})],
        "sliding": [("ours", sliding, ours, {}), ("MONAI", sliding, peer, {}),
                    ("ours, tiny net", sliding, ours | dict(tiny=True), {}),
                    ("MONAI, tiny net", sliding, peer | dict(tiny=True), {})],
        "prepare": [("ours", prepare, ours, {}), ("MONAI", prepare, peer, {})],
        "loader": [(f"{n} workers", loader, dict(workers=n), {}) for n in (0, 1, 2, 4)],
        "ranks": [("one process", ranks, dict(world=1), dict(batch=2)), ("two processes", ranks, dict(world=2), {})],
        "linear": three("encoder, side", "view", [side * n for n in (2, 3, 4)])
        + three("encoder, batch", "batch", [1, 2, 4]) + [(f"prepare, slabs {n}", prepare, ours, way) for n, way in cts]
        + [(f"headers, volumes {n}", headers, dict(volumes=n), {}) for n in (250, 500, 1000)],
    }


# ------------------------------------------------------------------------------------------------ measuring, by turns
class Traffic(TorchDispatchMode):
    """Adds up the bytes of all tensors that operators read and write; a view moves nothing."""
    moved = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **kwargs or {})
        if not any(value.alias_info and not value.alias_info.is_write for value in op._schema.returns):
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, made))
            self.moved += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        return made


def memory(device, line="VmHWM"):
    """Peak MiB so far, or with line="VmRSS" now, of this process or of torch on the GPU."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if line == "VmHWM" else torch.cuda.memory_allocated()) / 2 ** 20
    return int(Path("/proc/self/status").read_text().split(line + ":")[1].split()[0]) / 2 ** 10


def serve(pipe, work, options, settings, peer, can_count):
    """A contestant's process: do the work once for each True that comes, then send what it took; ends with False."""
    torch.manual_seed(0)
    torch.set_num_threads(settings["threads"])
    if settings["keep"]:
        keep_freed_memory(torch.device(settings["device"]))
    for name in ("networks.nets", "inferers", "transforms") if peer else ():
        importlib.import_module(f"monai.{name}")
    Path("/proc/self/clear_refs").write_text("5")                       # the peak counts from here
    start, at = memory(settings["device"], "VmRSS"), complete(settings)
    once = work(at, **options)
    while pipe.recv():
        wall, cpu = at.clock(), time.process_time()
        parts = once()
        pipe.send(dict(wall=at.clock() - wall, cpu=time.process_time() - cpu, parts=parts or {}))
    done = dict(memory=memory(at.device) - start)
    if can_count:
        with FlopCounterMode(display=False) as flops, Traffic() as traffic:
            once()
        done |= dict(gflop=flops.get_total_flops() / 1e9, gb=traffic.moved / 1e9)
    pipe.send(done)


def ceiling(device, n):
    """GFLOP/s of a matrix product of n x n in each precision, and GB/s of a copy: what was reached at best."""
    def best(work):
        def once():
            begun = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begun
        return min(once() for _ in range(4))
    a = torch.rand(n, n, device=device)
    kinds = ("fp32", "bf16", "fp16") if device == "cuda" else ("fp32", "bf16")
    rates = {name: 2e-9 * n ** 3 / best(lambda x=a.to(DTYPES[name]): x @ x) for name in kinds}
    source, target = (torch.ones(16 * n * n // 4, device=device) for _ in range(2))
    return rates | {"copy": 2e-9 * source.nbytes / best(lambda: target.copy_(source))}


def measure(entries, settings, rounds, bar):
    """{label: result} of a row's contestants, who take turns; the first round does not count if there are several."""
    spawn, running, results = multiprocessing.get_context("spawn"), {}, {}
    for label, work, options, special in entries:
        here, there = spawn.Pipe()
        chosen, peer = {**settings, **special}, label.startswith("MONAI")
        process = spawn.Process(target=serve, args=(there, work, options, chosen, peer, work in (
            encoder, monai_encoder, step, monai_step, finetune)))
        process.start()
        there.close()
        running[label], results[label] = (here, process), dict(precision=chosen["precision"], rounds=[])
    for turn in range(rounds + (rounds > 1)):
        for label, (pipe, _) in running.items():
            bar.set_postfix_str(label)
            try:
                pipe.send(True)
                took = pipe.recv()
            except (EOFError, OSError):                                 # its own message is on the screen
                results[label]["failed"] = True
                continue
            if turn or rounds == 1:
                results[label]["rounds"].append(took)
            bar.update()
    for label, (pipe, process) in running.items():
        if not results[label].get("failed"):
            pipe.send(False)
            results[label] |= pipe.recv() | {key: statistics.median(took[key] for took in results[label]["rounds"])
                                             for key in ("wall", "cpu")}
            parts = results[label]["rounds"][0]["parts"]
            results[label]["parts"] = {part: statistics.median(took["parts"][part] for took in results[label]["rounds"])
                                       for part in parts}
        process.join(5)
        process.kill()
    return results


# ----------------------------------------------------------------------------------------------------- what is shown
def table(row, results, rates):
    """Lines of a row's results: what was measured, and the shares of the ceiling."""
    lines = [f"\n{row:32s}   wall s    CPU s  memory MiB    GFLOP  of ceiling       GB  of ceiling"]
    for label, r in results.items():
        if "wall" not in r:
            lines.append(f"  {label:30s}   failed")
            continue
        line = f"  {label:30s} {r['wall']:8.3f} {r['cpu']:8.3f} {r['memory']:11.0f}"
        if "gflop" in r:
            flop_share, copy_share = r["gflop"] / r["wall"] / rates[r["precision"]], r["gb"] / r["wall"] / rates["copy"]
            line += f" {r['gflop']:8.0f} {flop_share:11.2f} {r['gb']:8.1f} {copy_share:11.2f}"
        lines.append(line)
        if r["parts"]:
            lines.append("    of it " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in r["parts"].items()))
    return lines


def marks(found, cores):
    """(what, ratio or None, the mark, whether it is reached) of all marks whose two sides were measured."""
    def ratio(row, above, below, key="cpu"):
        sides = [found.get(row, {}).get(label, {}).get(key) for label in (above, below)]
        return sides[0] / sides[1] if all(sides) else None
    lines = [
        ("encoder, MONAI's time / ours", ratio("encoder", "MONAI", "ours"), 1.6, True),
        ("encoder, our memory / MONAI's", ratio("encoder", "ours", "MONAI", "memory"), .75, False),
        ("step, our CPU time / MONAI's student alone", ratio("step", "ours", "MONAI, student only"), 1., False),
        ("step, fp32 / bf16", ratio("step", "ours", "ours, bf16"), 1.6, True),
        ("encoder, memory with checkpointing", ratio("encoder", "ours, checkpointing", "ours", "memory"), .5, False),
        ("encoder, time with checkpointing", ratio("encoder", "ours, checkpointing", "ours"), 1.4, False),
        ("fine-tuning, SwinUNETR's time / ours", ratio("finetune", "MONAI SwinUNETR", "ours"), 2., True),
        ("fine-tuning, our memory / SwinUNETR's", ratio("finetune", "ours", "MONAI SwinUNETR", "memory"), .6, False),
        ("sliding window, MONAI's time / ours", ratio("sliding", "MONAI", "ours"), 1.15, True),
        ("sliding window, tiny net", ratio("sliding", "MONAI, tiny net", "ours, tiny net"), 1.15, True),
        ("sliding window, our memory / MONAI's", ratio("sliding", "ours", "MONAI", "memory"), 1., False),
        ("preparation, MONAI's time / ours", ratio("prepare", "MONAI", "ours"), 2., True),
        ("preparation, our memory / MONAI's", ratio("prepare", "ours", "MONAI", "memory"), .5, False),
        ("two processes, their wall time / one's", ratio("ranks", "two processes", "one process", "wall"), 1., False)]
    work, fed = found.get("step", {}).get("ours", {}).get("gflop"), found.get("loader", {})
    if work and "wall" in fed.get("1 workers", {}):
        need = 4 * V100_SHARE * V100_FLOPS / (work * 1e9)                  # pairs/s of four cards
        most = max(8 / r["wall"] for label, r in fed.items() if "wall" in r)
        lines.append((f"loader: {most:.0f} pairs/s here on {cores} cores / {need:.0f} that 4 V100 may need",
                      most / need, 1., True))
    return [(what, value, mark, value is not None and (value >= mark) == above or value == mark)
            for what, value, mark, above in lines if value is not None]


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(prog="python -m smit.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "encoder step finetune sliding prepare loader ranks linear".split()
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ROW", help=" ".join(names))
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds; sliding 1, prepare and ranks 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each contestant (all cores)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well; on the GPU in all precisions")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--ours", action="store_true", help="leave MONAI out, even if it is there")
    parser.add_argument("--json", metavar="FILE", help="write all figures here too")
    return parser.parse_args(argv)


def main(args):
    args.sizes = QUICK if args.quick else PAPER
    peers = not args.ours and importlib.util.find_spec("monai") is not None
    machine = dict(date=time.strftime("%Y-%m-%d %H:%M"), processor=platform.processor() or platform.machine(),
                   threads=args.threads, torch=torch.__version__, python=platform.python_version(),
                   monai=importlib.metadata.version("monai") if peers else None,
                   gpu=torch.cuda.get_device_name() if args.device == "cuda" else None, quick=args.quick)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if not peers:
        print("MONAI is left out: it is not installed, or --ours was given")
    torch.set_num_threads(args.threads)
    rows = {row: [one for one in entries if peers or not one[0].startswith("MONAI")]
            for row, entries in contestants(args).items() if row in args.only}
    found, rates = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(args.sizes, batch=1, precision="fp32", checkpointing=False, compile=False, keep=True,
                        device=args.device, threads=args.threads, folder=Path(folder), port=29000 + os.getpid() % 999)
        for shape in {special.get("ct", args.sizes["ct"]) for row in rows.values() for _, work, _, special in row
                      if work in (prepare, loader, headers)}:
            write_ct(settings["folder"] / f"{'x'.join(map(str, shape))}.nii.gz", shape)
        rounds = {row: min(args.rounds, ROUNDS.get(row, args.rounds)) for row in rows}
        total = sum((rounds[row] + (rounds[row] > 1)) * len(entries) for row, entries in rows.items())
        with tqdm(total=total, disable=None, leave=False) as bar:
            for row, entries in rows.items():
                rates[row] = ceiling(args.device, 256 if args.quick else 3072)
                found[row] = measure(entries, settings, rounds[row], bar)
                bar.clear()
                print(*table(row, found[row], rates[row]), sep="\n", flush=True)
    for row, rate in rates.items():
        shown = ", ".join(f"{name} {value:.0f}" for name, value in rate.items())
        print(f"ceiling beside {row}: {shown} (GFLOP/s; GB/s)")
    reached = marks(found, torch.get_num_threads())
    print(f"\n{'mark':62s} reached")
    for what, value, mark, good in reached:
        print(f"  {what:58s} {value:8.2f}   of {mark:4.2f}   {'reached' if good else 'missed'}")
    if args.json:
        figures = dict(machine=machine, ceiling=rates, rows=found, marks=reached)
        Path(args.json).write_text(json.dumps(figures, indent=1))
