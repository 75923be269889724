"""Who takes part in which row of the benchmark, and the marks that the rows must reach [ours]."""
from typing import Callable, NamedTuple

from smit.benchmark import workloads as w

ROWS = ("encoder", "inference", "step", "finetune", "sliding", "prepare", "loader", "ranks",
        "linear")
ON_GPU = ("encoder", "inference", "step", "finetune", "sliding")
GPU_BATCHES = (1, 2, 4, 8)
GPU_PRECISIONS = ("fp16", "bf16")
MEMORY_GB = (16, 40, 80)  # of a V100, an A100, an H100
FILLED = 0.9  # share of a card that a batch may fill; the rest is the allocator's and cuDNN's
V100_COPY_GB_S = 0.75 * 900  # its peak, and the share of it that a large copy reaches


class Contestant(NamedTuple):
    """One who does the work of a row, and the settings in which it differs from the others."""
    row: str
    label: str
    work: Callable
    settings: dict = {}

    @property
    def is_peer(self):
        return "monai" in self.work.__name__

    @property
    def can_be_counted(self):
        """Whether its operators can be counted: those of compiled code are not seen."""
        nets = (w.encoder, w.encoder_monai, w.inference, w.inference_monai, w.inference_monai_flash,
                w.step, w.step_monai, w.finetune, w.finetune_monai)
        return self.work in nets and not self.settings.get("compiled")


def contestants(device, sizes, compiled=False, batches=GPU_BATCHES, precisions=GPU_PRECISIONS):
    """List the contestants of all rows; with `compiled`, those too who are compiled.

    batches, precisions: of those on a GPU.
    """
    if device == "cuda":
        return on_gpu(compiled, batches, precisions)
    return on_cpu(compiled) + growing(sizes)


def on_cpu(compiled):
    bf16, saving = dict(precision="bf16"), dict(checkpointing=True)
    entries = [
        Contestant("encoder", "ours", w.encoder),
        Contestant("encoder", "ours, bf16", w.encoder, bf16),
        Contestant("encoder", "ours, checkpointing", w.encoder, saving),
        Contestant("encoder", "ours, glibc's own settings", w.encoder, dict(keep=False)),
        Contestant("encoder", "MONAI", w.encoder_monai),
        Contestant("encoder", "MONAI, glibc's own settings", w.encoder_monai, dict(keep=False)),

        Contestant("inference", "ours", w.inference),
        Contestant("inference", "MONAI", w.inference_monai),
        Contestant("inference", "MONAI, flash attention", w.inference_monai_flash),

        Contestant("step", "ours", w.step),
        Contestant("step", "ours, bf16", w.step, bf16),
        Contestant("step", "ours, bf16, batch 2", w.step, dict(precision="bf16", batch=2)),
        Contestant("step", "ours, checkpointing", w.step, saving),
        Contestant("step", "MONAI, student only", w.step_monai),

        Contestant("finetune", "ours", w.finetune),
        Contestant("finetune", "ours, bf16", w.finetune, bf16),
        Contestant("finetune", "MONAI SwinUNETR", w.finetune_monai),

        Contestant("sliding", "ours", w.sliding),
        Contestant("sliding", "MONAI", w.sliding_monai),
        Contestant("sliding", "ours, tiny net", w.sliding, dict(tiny=True)),
        Contestant("sliding", "MONAI, tiny net", w.sliding_monai, dict(tiny=True)),

        Contestant("prepare", "ours", w.prepare),
        Contestant("prepare", "MONAI", w.prepare_monai),

        Contestant("loader", "0 workers", w.loader, dict(workers=0)),
        Contestant("loader", "1 workers", w.loader, dict(workers=1)),
        Contestant("loader", "2 workers", w.loader, dict(workers=2)),
        Contestant("loader", "4 workers", w.loader, dict(workers=4)),

        Contestant("ranks", "one process", w.ranks, dict(world=1, batch=2)),
        Contestant("ranks", "two processes", w.ranks, dict(world=2)),
    ]
    if compiled:
        for row, work in (("encoder", w.encoder), ("step", w.step), ("finetune", w.finetune)):
            entries.append(Contestant(row, "ours, compiled", work, dict(compiled=True)))
    return entries


def growing(sizes):
    """List the contestants of the row "linear": does time grow as the work does? No mark asks."""
    side = sizes["view"] // 3
    entries = []
    for n in (2, 3, 4):
        entries.append(Contestant("linear", f"encoder, side {side * n}", w.encoder,
                                  dict(view=side * n)))
    for batch in (1, 2, 4):
        entries.append(Contestant("linear", f"encoder, batch {batch}", w.encoder,
                                  dict(view=2 * side, batch=batch)))
    for n in (1, 2, 4):
        entries.append(Contestant("linear", f"prepare, slabs {n}", w.prepare,
                                  dict(ct=(2 * side, 2 * side, n * side))))
    for volumes in (250, 500, 1000):
        entries.append(Contestant("linear", f"headers, volumes {volumes}", w.headers,
                                  dict(volumes=volumes)))
    return entries


def on_gpu(compiled, batches, precisions):
    entries = []
    for precision in precisions:
        for batch in batches:
            for is_compiled in (False, True) if compiled else (False,):
                way = dict(precision=precision, batch=batch, compiled=is_compiled)
                name = f"{precision}, batch {batch}"
                if is_compiled:
                    name += ", compiled"
                entries += [
                    Contestant("encoder", f"ours {name}", w.encoder, way),
                    Contestant("encoder", f"MONAI {name}", w.encoder_monai, way),
                    Contestant("inference", f"ours {name}", w.inference, way),
                    Contestant("inference", f"MONAI {name}", w.inference_monai, way),
                    Contestant("inference", f"MONAI flash {name}", w.inference_monai_flash, way),
                    Contestant("step", f"ours {name}", w.step, way),
                    Contestant("step", f"MONAI {name}", w.step_monai, way),
                    Contestant("finetune", f"ours {name}", w.finetune, way),
                    Contestant("finetune", f"MONAI {name}", w.finetune_monai, way)]

    precision, batch = precisions[-1], batches[0]
    saving = dict(precision=precision, batch=batch, checkpointing=True)
    return entries + [
        Contestant("step", f"ours {precision}, batch {batch}, checkpointing", w.step, saving),
        Contestant("sliding", "ours", w.sliding, dict(precision=precision)),
        Contestant("sliding", "MONAI", w.sliding_monai, dict(precision=precision))]


# ---------------------------------------------------------------- marks
class Mark(NamedTuple):
    """A figure that two results make, and the bound that it must keep."""
    what: str
    value: float
    bound: float
    at_least: bool

    @property
    def is_reached(self):
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def marks(found, cores, device="cpu"):
    """List the marks of all figures whose sides were measured: found {row: {label: result}}."""
    entries = marks_on_gpu(found) if device == "cuda" else marks_on_cpu(found, cores)
    return [mark for mark in entries if mark.value is not None]


def ratio(found, row, above, below, key="cpu"):
    """Divide two results of a row; None where one of them is not there."""
    sides = [found.get(row, {}).get(label, {}).get(key) for label in (above, below)]
    return sides[0] / sides[1] if all(sides) else None


def marks_on_cpu(found, cores):
    def of(*arguments):
        return ratio(found, *arguments)

    return [
        Mark("encoder, MONAI's time / ours", of("encoder", "MONAI", "ours"), 1.05, True),
        Mark("encoder, our memory / MONAI's", of("encoder", "ours", "MONAI", "memory"), .75, False),
        Mark("encoder, memory with checkpointing",
             of("encoder", "ours, checkpointing", "ours", "memory"), .5, False),
        Mark("encoder, time with checkpointing", of("encoder", "ours, checkpointing", "ours"),
             1.4, False),
        Mark("inference, our time / MONAI's with flash attention",
             of("inference", "ours", "MONAI, flash attention"), 1., False),
        step_mark(found),
        Mark("step, fp32 / bf16", of("step", "ours", "ours, bf16"), 1.6, True),
        Mark("fine-tuning, SwinUNETR's time / ours", of("finetune", "MONAI SwinUNETR", "ours"),
             2., True),
        Mark("fine-tuning, our memory / SwinUNETR's",
             of("finetune", "ours", "MONAI SwinUNETR", "memory"), .6, False),
        Mark("sliding window, MONAI's time / ours", of("sliding", "MONAI", "ours"), 1.15, True),
        Mark("sliding window, tiny net", of("sliding", "MONAI, tiny net", "ours, tiny net"),
             1.15, True),
        Mark("sliding window, our memory / MONAI's", of("sliding", "ours", "MONAI", "memory"),
             1., False),
        Mark("preparation, MONAI's time / ours", of("prepare", "MONAI", "ours"), 2., True),
        Mark("preparation, our memory / MONAI's", of("prepare", "ours", "MONAI", "memory"),
             .5, False),
        Mark("two processes, their wall time / one's",
             of("ranks", "two processes", "one process", "wall"), 1., False),
        loader_mark(found, cores),
    ]


def step_mark(found):
    """Compare the whole step with MONAI's student alone, which does two thirds of its products."""
    time = ratio(found, "step", "ours", "MONAI, student only")
    work = ratio(found, "step", "ours", "MONAI, student only", "gflop")
    return Mark("step, our CPU time a GFLOP / that of MONAI's student alone",
                time / work if time and work else None, 1., False)


def loader_mark(found, cores):
    """Compare the loader with four V100 that are bound by their memory's rate, as the step is."""
    pair_gb = found.get("step", {}).get("ours, bf16", {}).get("gb")
    times = [result["wall"] for result in found.get("loader", {}).values() if "wall" in result]
    if not pair_gb or not times:
        return Mark("loader", None, 1., True)
    needed = 4 * V100_COPY_GB_S / pair_gb
    loaded = w.PAIRS / min(times)
    what = f"loader: {loaded:.0f} pairs/s on {cores} cores / {needed:.0f} that 4 V100 can take"
    return Mark(what, loaded / needed, 1., True)


def marks_on_gpu(found):
    """List the marks on a card, where a step is bound by the rate of its memory."""
    entries = []
    ways = {(result["precision"], result["batch"]): None
            for results in found.values() for result in results.values()}
    for precision, batch in ways:
        name = f"{precision}, batch {batch}"
        ours = found.get("step", {}).get(f"ours {name}", {})
        pair_gb = ours["gb"] / batch if "gb" in ours else None
        entries += [
            Mark(f"encoder {name}: our time / MONAI's",
                 ratio(found, "encoder", f"ours {name}", f"MONAI {name}", "wall"), .8, False),
            Mark(f"inference {name}: our time / MONAI's, flash",
                 ratio(found, "inference", f"ours {name}", f"MONAI flash {name}", "wall"),
                 1., False),
            Mark(f"step {name}: our time / MONAI's student alone",
                 ratio(found, "step", f"ours {name}", f"MONAI {name}", "wall"), 1.3, False),
            Mark(f"step {name}: share of a copy's rate", ours.get("copy_share"), .6, True),
            Mark(f"step {name}: GB a pair", pair_gb, 20., False),
            Mark(f"step {name}: share of time without a kernel", ours.get("idle"), .05, False)]
    return entries


def batches_that_fit(memory):
    """Say which --batch fills cards of MEMORY_GB: {GB: batch} from {batch: GB that a step held}.

    Between the smallest and the largest batch memory is taken to grow linearly; None if there is
    one batch alone.
    """
    if len(memory) < 2:
        return None
    small, large = min(memory), max(memory)
    pair_gb = (memory[large] - memory[small]) / (large - small)
    fixed_gb = memory[small] - small * pair_gb
    return {gb: max(0, int((FILLED * gb - fixed_gb) / pair_gb)) for gb in MEMORY_GB}
