"""Say how far seeds and cases let a difference be seen.

A bootstrap over cases alone says what other cases would give with the same trained networks. One
over seeds and cases says what other trainings would give as well.
"""
import functools
import itertools
import math
from statistics import NormalDist

import numpy as np

from smit.metrics import draw_counts

LEAST_SEEDS = 6                        # two of 64 choices of signs: p .03; of 32, p .06
MOST_SIMULATED = 10                    # seeds
SUMS = 2 ** 20                         # of a simulation, some .01 s: 32,768 studies of 6 seeds


def bootstrap_seeds_and_cases(values, level=.95, draws=10_000, seed=0):
    """Draw seeds and cases again, both with replacement: interval (low, high) of their mean [ours].

    values (seeds, cases): scores, or differences of two rows by the same seed and case; nan where
    there is none. All seeds of a draw share its cases. (nan, nan) if there is no value at all.

    With one seed this is the bootstrap over cases. With few it is too narrow: of m seeds the
    bootstrap underestimates the variance by 1 / m, by half with two.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or np.isinf(values).any():
        raise ValueError(f"bootstrap: give finite values (seeds, cases), not shape {values.shape}")
    scored = ~np.isnan(values)
    values = np.where(scored, values, 0)

    rng = np.random.default_rng(seed)
    case_counts = draw_counts(rng, draws, values.shape[1])              # (draws, cases)
    seed_counts = draw_counts(rng, draws, values.shape[0])              # (draws, seeds)
    sums = ((seed_counts @ values) * case_counts).sum(axis=1)
    numbers = ((seed_counts @ scored.astype(float)) * case_counts).sum(axis=1)

    means = sums[numbers > 0] / numbers[numbers > 0]
    if not len(means):
        return math.nan, math.nan
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def deviation(values):
    """Estimate the standard deviation, with n - 1 below the sum; nan of fewer than two values."""
    values = np.asarray(values, dtype=np.float64)
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def flipped_signs_p(differences, draws=2 ** 16, seed=0):
    """Say how likely chance alone takes the seeds' mean as far from 0: p, two-sided [Fisher 1935].

    Without an effect each seed's difference could as well have the other sign. p is the share of
    all choices of signs whose mean is at least as far off; of `draws` random ones beyond 16 seeds.
    Unlike a bootstrap it is right with few seeds; below 6 it cannot reach .05.

    differences (seeds,): of two rows, the mean over cases. nan if there is none.
    """
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    if not n:
        return math.nan
    found = abs(differences.sum()) * (1 - 1e-9)        # sums in another order differ in rounding
    if n <= 16:
        signs = np.array(list(itertools.product((1, -1), repeat=n)))
        return float(np.mean(abs(signs @ differences) >= found))
    signs = np.random.default_rng(seed).choice((1, -1), size=(draws, n))
    as_far = np.count_nonzero(abs(signs @ differences) >= found)
    return (as_far + 1) / (draws + 1)                  # what was found is one of the choices


def noise_and_draw(values):
    """Part the deviation of runs: (noise of training, what the draw of volumes adds) [ours].

    values (draws, seeds): each row's runs were trained on the same labelled volumes, each column's
    with the same seed. The variance within rows is noise^2. Rows' means share what a seed does to
    all draws, so they vary by draw^2 + interaction^2 / seeds: analysis of variance, two ways. draw
    is 0 where they vary less than the interaction alone would make them. nan for what has one run
    only.
    """
    values = np.asarray(values, dtype=np.float64)
    draws, seeds = values.shape
    noise = draw = math.nan
    if seeds > 1:
        noise = math.sqrt(values.var(axis=1, ddof=1).mean())
        if draws > 1:
            of_draw, of_seed = values.mean(axis=1, keepdims=True), values.mean(axis=0)
            rest = values - of_draw - of_seed + values.mean()
            interaction = np.square(rest).sum() / ((draws - 1) * (seeds - 1))
            draw = math.sqrt(max(0., of_draw.var(ddof=1) - interaction / seeds))
    return noise, draw


def seeds_needed(deviation, effect=.03, power=.8):
    """Count the seeds that show a mean difference with this probability [ours].

    deviation: over seeds, of the difference between two rows with the same seed. It is shown where
    `flipped_signs_p` is .05 or less, which takes 6 seeds at least. The differences are taken to be
    normal. Up to 10 seeds that test's power is simulated. From 11 on it is some .01 below that of a
    paired t-test, whose number of seeds stands for it:
    ((z(.975) + z(power)) * deviation / effect)^2 + z(.975)^2 / 2, rounded up [Guenther 1981].
    The second term is for the deviation, which the test must estimate as well.
    Raises ValueError for a deviation that is not known, or an effect of 0.
    """
    if not deviation >= 0 or not effect:
        raise ValueError(f"deviation {deviation}, effect {effect}: give a deviation of two seeds "
                         "or more, and an effect above 0")
    z = NormalDist().inv_cdf(.975)
    z_power = NormalDist().inv_cdf(power)
    by_t_test = math.ceil(((z + z_power) * deviation / effect) ** 2 + z ** 2 / 2)
    for seeds in range(max(LEAST_SEEDS, by_t_test), MOST_SIMULATED + 1):
        if power_of_signs(seeds, deviation, effect) >= power:
            return seeds
    return max(by_t_test, MOST_SIMULATED + 1)


@functools.cache
def power_of_signs(seeds, deviation, effect, seed=0):
    """Simulate how often flipped signs show a mean difference: the share with p of .05 or less.

    The seeds' differences are normal with this mean, `effect`, and this deviation.
    """
    # of two opposite choices of signs one is enough; the first leaves the differences as they are
    choices = itertools.product((1, -1), repeat=seeds - 1)
    signs = np.array([(1, *choice) for choice in choices], dtype=np.float32)

    shape = seeds, SUMS // len(signs)
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    sums = abs(signs @ (effect + deviation * noise))                    # (choices, studies)
    as_far = np.count_nonzero(sums >= sums[0], axis=0)
    return float(np.mean(as_far <= .05 * len(signs)))
