"""Intervals over seeds and cases, and the number of seeds, against numbers made by hand."""
import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from smit.metrics import bootstrap_interval
from smit.study import power


def test_two_seeds_that_differ_make_an_interval_from_one_to_the_other():
    # Cases agree, so only the draw of seeds counts: .2 and .4 twice (p .25 each), or one of each
    low, high = power.bootstrap_seeds_and_cases([[.2, .2, .2], [.4, .4, .4]])
    assert low == pytest.approx(.2) and high == pytest.approx(.4)
    # p .25 lies below the quantile of .3, the mean of both seeds above it
    low, high = power.bootstrap_seeds_and_cases([[.2, .2, .2], [.4, .4, .4]], level=.4)
    assert low == pytest.approx(.3) and high == pytest.approx(.3)


def test_one_seed_is_the_bootstrap_over_cases():
    dice = np.random.default_rng(0).random(9)
    own = power.bootstrap_seeds_and_cases([dice])
    assert own == pytest.approx(bootstrap_interval(dice), abs=1e-12)


def test_the_interval_has_the_variance_of_seeds_and_of_cases():
    # seeds +-.1 and cases +-.2 add: variance .1^2 / 2 + .2^2 / 2 of the bootstrapped mean
    values = [[-.3, .1], [-.1, .3]]
    low, high = power.bootstrap_seeds_and_cases(values, level=.9999, draws=100_000)
    assert (low, high) == pytest.approx((-.3, .3))

    counts = power.draw_counts(np.random.default_rng(1), 100_000, 2) / 2
    others = power.draw_counts(np.random.default_rng(2), 100_000, 2) / 2
    means = ((counts @ values) * others).sum(1)
    assert means.var() == pytest.approx(.1 ** 2 / 2 + .2 ** 2 / 2, rel=.02)


def test_a_case_that_one_seed_could_not_score_is_averaged_over_the_others():
    # each draw holds (.5) alone, or (.5, .7), (.7) from the second seed
    low, high = power.bootstrap_seeds_and_cases([[.5, math.nan], [.5, .7]], level=1)
    assert low == pytest.approx(.5) and high == pytest.approx(.7)
    assert all(map(math.isnan, power.bootstrap_seeds_and_cases([[math.nan]])))
    with pytest.raises(ValueError, match="seeds, cases"):
        power.bootstrap_seeds_and_cases([.1, .2])


def test_p_is_the_share_of_signs_that_take_the_mean_as_far():
    # 6 of 1, 2, 3 comes with all signs alike: 2 of 8 choices
    assert power.flipped_signs_p([1, 2, 3]) == power.flipped_signs_p([-1, -2, -3]) == .25
    # 4 or 6 of six ones: all alike (2 choices), or one unlike the others (12), of 64
    assert power.flipped_signs_p([1, 1, 1, -1, 1, 1]) == 14 / 64
    # rounding does not part equal sums
    assert power.flipped_signs_p([.1, .2, .3, -.3]) == power.flipped_signs_p([.3, .1, -.3, .2])
    assert power.flipped_signs_p([0., 0.]) == 1 and math.isnan(power.flipped_signs_p([]))


def test_p_of_many_seeds_is_drawn_and_never_0():
    draw = np.random.default_rng(0)
    assert 0 < power.flipped_signs_p(np.ones(40)) < 1e-4
    values = draw.normal(.5, 1, 17)                    # one more than are counted in full
    exact = np.mean(abs(np.array(list(itertools.product((1, -1), repeat=17))) @ values)
                    >= abs(values.sum()) * (1 - 1e-9))
    assert power.flipped_signs_p(values) == pytest.approx(exact, abs=.005)


def test_twenty_four_seeds_show_three_points_where_seeds_deviate_by_five():
    # (1.95996 + .84162) * .05 / .03 = 4.6693, its square 21.80; 1.95996^2 / 2 = 1.92 more
    assert power.seeds_needed(.05) == 24
    # (1.95996 + 1.28155) * .03 / .03, its square 10.51
    assert power.seeds_needed(.03, power=.9) == 13
    with pytest.raises(ValueError, match="two seeds"):
        power.seeds_needed(math.nan)


def test_no_fewer_than_six_seeds_show_anything():
    # all six of one sign, or p is 14 / 64 or more: Phi(.03 / deviation)^6 is .8 at .03 / 1.793
    assert power.seeds_needed(0.) == power.seeds_needed(.0166) == 6
    assert power.seeds_needed(.0169) == 7
    chance = NormalDist().cdf(.03 / .02) ** 6
    assert power.power_of_signs(6, .02, .03) == pytest.approx(chance, abs=.01)


@pytest.mark.parametrize("deviation, seeds", [
    (.05, 24), (.033, 12), (.028, 10), (.0245, 8), (.02, 7), (.01, 6)])
def test_seeds_needed_give_the_test_of_signs_the_power_they_promise(deviation, seeds):
    assert power.seeds_needed(deviation) == seeds
    studies = np.random.default_rng(1).normal(.03, deviation, size=(1000, seeds))
    # beyond 10 seeds a hundredth below; many seeds' p is drawn, which takes longer
    studies = studies[:100] if seeds > 10 else studies
    shown = np.mean([power.flipped_signs_p(differences) <= .05 for differences in studies])
    assert shown > .8 - 3 * math.sqrt(.8 * .2 / len(studies)) - .02
    assert seeds == 6 or power.power_of_signs(min(seeds, 10) - 1, deviation, .03) < .8


def test_the_draw_of_volumes_is_parted_from_the_noise_of_training():
    # within: variances .02 and .02; means .4 and .6 vary by .02, to which seeds add alike
    noise, draw = power.noise_and_draw([[.3, .5], [.5, .7]])
    assert noise == pytest.approx(math.sqrt(.02)) and draw == pytest.approx(math.sqrt(.02))
    assert power.noise_and_draw([[.3, .5], [.5, .3]])[1] == 0       # the means are one
    # means .4, .7 vary by .045; residuals are .05 four times, .01 in all, half of it in a mean
    noise, draw = power.noise_and_draw([[.3, .5], [.7, .7]])
    assert noise == pytest.approx(math.sqrt(.01)) and draw == pytest.approx(math.sqrt(.04))


def test_a_seed_s_own_luck_is_no_part_of_what_draws_add():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):                                  # 4 draws, 4 seeds
        of_draw, of_seed = rng.normal(0, .05, (4, 1)), rng.normal(0, .05, 4)
        found.append(power.noise_and_draw(of_draw + of_seed + rng.normal(0, .01, (4, 4))))
    noise, draw = np.square(found).mean(0)
    assert noise == pytest.approx(.05 ** 2 + .01 ** 2, rel=.05)
    assert draw == pytest.approx(.05 ** 2, rel=.05)

    noise, draw = power.noise_and_draw([[.3, .5]])
    assert noise == pytest.approx(math.sqrt(.02)) and math.isnan(draw)
    assert power.deviation([.3, .5]) == pytest.approx(math.sqrt(.02))
    assert math.isnan(power.deviation([.3]))
