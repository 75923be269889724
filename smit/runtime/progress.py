"""What a training loop tells while it runs, when it saves, and when it gives up [ours]."""
import math
import time
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from smit.runtime.ranks import peak_memory_mb

MOST_SKIPS = 20   # in a row; fp16's loss scaling alone needs a few at the start [ours]


class Progress:
    """Show a bar on a terminal, a line now and then elsewhere: crops a second, time left.

    step, total: where the run stands and ends; crops_per_step: over all ranks.
    """

    def __init__(self, step, total, crops_per_step, ranks):
        self.first, self.step, self.total = step, step, total
        self.crops_per_step, self.ranks = crops_per_step, ranks
        self.begun = time.monotonic()
        shown = None if ranks.is_main else True          # None: only where the output is a terminal
        self.bar = tqdm(total=total, initial=step, unit="step", disable=shown)

    def advance(self):
        """Count a step; after the first one tell what memory it took."""
        self.step += 1
        self.bar.update()
        if self.step == self.first + 1 and self.ranks.is_main:
            self.bar.clear()
            memory = peak_memory_mb(self.ranks.device)
            print(f"first step: peak memory {memory:.0f} MiB", flush=True)

    def crops_per_s(self):
        """Crops a second since this process began."""
        return self.crops_per_step * (self.step - self.first) / (time.monotonic() - self.begun)

    def tell(self, epoch, **numbers):
        """Show the latest numbers; one that is not known yet is None and shown as a dash."""
        speed = self.crops_per_s()
        shown = {name: "-" if value is None else f"{value:.3f}" for name, value in numbers.items()}
        self.bar.set_postfix(shown | {"crops_per_s": f"{speed:.2f}"})

        if self.bar.disable and self.ranks.is_main:
            left_s = (self.total - self.step) * self.crops_per_step / speed
            left = timedelta(seconds=round(left_s))
            listed = ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in shown.items())
            print(f"step {self.step} of {self.total}, epoch {epoch:.1f}: {listed}, "
                  f"{speed:.2f} crops/s, {left} left", flush=True)

    def close(self, outcome):
        """Say how the run ended."""
        self.bar.close()
        if not self.ranks.is_main:
            return
        done = self.step == self.total
        memory = peak_memory_mb(self.ranks.device)
        print(f"{'done' if done else 'stopped'} at step {self.step}: "
              f"{self.crops_per_s():.2f} crops/s, peak memory {memory:.0f} MiB, {outcome}")
        if not done:
            print(f"the same command with --resume goes on to step {self.total}")


class SaveClock:
    """Say when a checkpoint is due: every `minutes`, every `steps` if not 0, and at the end."""

    def __init__(self, minutes, steps, total):
        self.minutes, self.steps, self.total = minutes, steps, total
        self.saved = time.monotonic()

    def due(self, step):
        if step == self.total or (self.steps and step % self.steps == 0):
            return True
        return time.monotonic() - self.saved > 60 * self.minutes

    def reset(self):
        self.saved = time.monotonic()


class Skips:
    """Count the steps that were not taken because a gradient was not finite."""

    def __init__(self, total=0):
        self.total, self.in_a_row = total, 0

    def count(self, finite, step, terms, volumes, ranks):
        """Raise ValueError after MOST_SKIPS in a row, with the losses and the volumes of a culprit.

        finite: whether the step was taken, alike on all ranks; terms {name: loss tensor} and
        volumes [path] are this rank's.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.total += not finite
        if self.in_a_row < MOST_SKIPS:
            return

        losses = {name: round(float(term), 4) for name, term in terms.items()}
        (culprit,) = ranks.agree(0 if math.isfinite(sum(losses.values())) else ranks.rank)
        if ranks.rank != culprit:
            ranks.agree()   # wait: let the rank whose loss is NaN raise, so that torchrun quotes it
        names = [Path(path).name for path in volumes]
        raise ValueError(f"step {step}: {self.in_a_row} steps in a row without a finite gradient; "
                         f"here {losses}, volumes {names}; lower --lr or try --precision fp32")
