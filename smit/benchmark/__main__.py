"""Time and memory of each part of the work, beside MONAI's where it is installed.

    python -m smit.benchmark                            # all rows, at the paper's sizes
    python -m smit.benchmark --only encoder finetune    # some of them
    python -m smit.benchmark --quick                    # small sizes: does it run?
    python -m smit.benchmark --device cuda              # fp16 and bf16; batch 1, 2, 4, 8
    python -m smit.benchmark --device cuda --precisions bf16 --batches 2 8 --compile

The figures of --quick mean nothing. Every contestant of a row works in a process of its own, and
they take turns, so that a machine that drifts hurts all alike. Shown are medians over the rounds,
after one that does not count, but for rows that have a single round, as `sliding`:

    wall, CPU    seconds; CPU is the sum over the threads of the contestant's first process
    memory       MiB: the peak of that process above what it held once its imports were done
                 (Linux's VmHWM); on a GPU the allocator's. Ours and MONAI's run on the same
                 allocator settings, those of our scripts
    GFLOP, GB    counted from the operators: matrix products and convolutions; all tensors that
                 operators read and write. Compiled code cannot be counted
    of ceiling   GFLOP and GB over the wall time, as shares of the rates of a large matrix product
                 and a large copy, measured in the same run and precision. On a GPU the copy is the
                 mark. Above 1 for GB: it came from the cache
    idle         share of the time in which no kernel runs; on a GPU alone

On a GPU the contestants of a row share the card: each keeps a context of some 500 MB and its
weights there, and what else it needs while it works.
"""
import argparse
import importlib.metadata
import importlib.util
import json
import platform
import re
import time
from pathlib import Path

import torch
from tqdm import tqdm

from smit.benchmark import measure, rows
from smit.settings import count

HEADER = "   wall s    CPU s  memory MiB    GFLOP  of ceiling       GB  of ceiling    idle"


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(prog="python -m smit.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=rows.ROWS, default=rows.ROWS, metavar="ROW",
        help=" ".join(rows.ROWS))
    add("--rounds", type=count, default=3, help="measured rounds; sliding 1, prepare and ranks 2")
    add("--threads", type=count, default=torch.get_num_threads(),
        help="of each contestant (all cores)")
    add("--device", choices=["cpu", "cuda"], default="cpu",
        help=f"cuda: the rows {', '.join(rows.ON_GPU)}")
    add("--batches", nargs="+", type=count, default=list(rows.GPU_BATCHES), metavar="N",
        help="with --device cuda: pairs or volumes a step")
    add("--precisions", nargs="+", choices=rows.GPU_PRECISIONS, default=list(rows.GPU_PRECISIONS),
        help="with --device cuda")
    add("--compile", action="store_true",
        help="time compiled contestants as well: ours block by block, MONAI's as a whole")
    add("--quick", action="store_true", help="small sizes, to see that it runs")
    add("--ours", action="store_true", help="leave MONAI out, even if it is there")
    add("--json", metavar="FILE", help="write all figures here too")
    return parser.parse_args(argv)


def main(args):
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: torch finds no GPU here")
    with_peers = not args.ours and all(map(importlib.util.find_spec, ("monai", "einops")))
    machine = describe_machine(args, with_peers)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if not with_peers:
        print("MONAI is left out: --ours was given, or it or its einops is not installed")

    torch.set_num_threads(args.threads)
    sizes = measure.QUICK if args.quick else measure.PAPER
    chosen = choose(args, sizes, with_peers)
    settings = dict(sizes, device=args.device, threads=args.threads)
    found, rates, reached = {}, {}, []
    with tqdm(total=count_turns(chosen, args.rounds), disable=None, leave=False) as bar:
        measured = measure.measure_rows(chosen, settings, args.rounds, args.quick, bar)
        for row, results, rates[row] in measured:
            found[row] = results
            bar.clear()
            print(*table(row, results), sep="\n", flush=True)
            reached = rows.marks(found, torch.get_num_threads(), args.device)
            if args.json:                                # now: the next row may be cut off
                figures = dict(machine=machine, ceiling=rates, rows=found,
                               marks=[(*mark, mark.is_reached) for mark in reached])
                write_figures(args.json, figures)

    show_rates(rates)
    show_marks(reached)
    if args.device == "cuda":
        show_batches(found.get("step", {}))


def write_figures(path, figures):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1))


def describe_machine(args, with_peers):
    return dict(
        date=time.strftime("%Y-%m-%d %H:%M"), processor=platform.processor() or platform.machine(),
        threads=args.threads, torch=torch.__version__, python=platform.python_version(),
        monai=importlib.metadata.version("monai") if with_peers else None,
        gpu=torch.cuda.get_device_name() if args.device == "cuda" else None, quick=args.quick)


def choose(args, sizes, with_peers):
    """Return {row: [contestant]} of the rows and the sides that were asked for."""
    chosen = {}
    for contestant in rows.contestants(args.device, sizes, args.compile, args.batches,
                                       args.precisions):
        if contestant.row in args.only and (with_peers or not contestant.is_peer):
            chosen.setdefault(contestant.row, []).append(contestant)
    return chosen


def count_turns(chosen, rounds):
    return sum(len(contestants) * measure.turns_of(measure.rounds_of(row, rounds))
               for row, contestants in chosen.items())


# ---------------------------------------------------------------- what is shown
def table(row, results):
    """Return the lines of a row's results."""
    lines = [f"\n{row:32s}{HEADER}"]
    for label, result in results.items():
        if "wall" not in result:
            lines.append(f"  {label:30s}   failed")
            continue
        line = f"  {label:30s} {result['wall']:8.3f} {result['cpu']:8.3f} {result['memory']:11.0f}"
        if "gflop" in result:
            line += f" {result['gflop']:8.0f} {result['flop_share']:11.2f}"
            line += f" {result['gb']:8.1f} {result['copy_share']:11.2f}"
        if "idle" in result:
            line = f"{line:103s} {result['idle']:7.2f}"
        lines.append(line)
        if result["parts"]:
            parts = [f"{part} {seconds:.2f}" for part, seconds in result["parts"].items()]
            lines.append(f"    of it {', '.join(parts)}")
    return lines


def show_rates(rates):
    for row, rate in rates.items():
        shown = ", ".join(f"{name} {value:.0f}" for name, value in rate.items())
        print(f"ceiling beside {row}: {shown} (GFLOP/s; GB/s)")


def show_marks(marks):
    print(f"\n{'mark':62s} reached")
    for mark in marks:
        verdict = "reached" if mark.is_reached else "missed"
        print(f"  {mark.what:58s} {mark.value:8.2f}   of {mark.bound:4.2f}   {verdict}")


def show_batches(results):
    """Print which --batch fills a card, from what steps held on one."""
    for precision in ("fp16", "bf16"):
        held = {}
        for label, result in results.items():
            is_plain = label.startswith("ours") and not re.search("checkpointing|compiled", label)
            if is_plain and result["precision"] == precision and "wall" in result:
                held[result["batch"]] = result["memory"] * 2 ** 20 / 1e9
        batches = rows.batches_that_fit(held)
        if batches:
            steps = ", ".join(f"{gb:.2f} GB at batch {batch}" for batch, gb in held.items())
            advice = ", ".join(f"{batch} on {gb} GB" for gb, batch in batches.items())
            print(f"a step in {precision} holds {steps}: --batch {advice}")


if __name__ == "__main__":
    main(parse_arguments())
