"""Statistics against cases worked by hand, and against simulation: do 95 % intervals cover 95 %?"""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit
from study_worlds import simulate

from research.errors import UserError
from research.study import statistics
from research.study.sample_size import seeds_needed, states_needed
from research.study.statistics import (
    difference_interval,
    holm,
    holm_levels,
    iqm,
    iqm_interval,
    mean_interval,
    probability_of_improvement,
    rank_ranges,
    standard_error_of_difference,
)

SEEDS, STATES = 5, 128


def rates_of_seeds(mean, seed_sd, state_sd):
    """True success rates of 2001 seeds, evenly spaced in probability, over all states."""
    quantiles = stats.norm.ppf((np.arange(2001) + 0.5) / 2001)
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    return expit(mean + seed_sd * quantiles[:, None] + state_sd * nodes) @ (weights / weights.sum())


# logit, between seeds, between states; success 0.68 / 0.86 / 0.94 / 0.80 with 0.04 / 0.03 / 0.02 / 0.05 among seeds
SETTINGS = {
    "0.68, hard and easy states": (1.2, 0.3, 2.0),
    "0.87, hard and easy states": (3.0, 0.3, 2.0),
    "0.94, hard and easy states": (4.5, 0.4, 2.0),
    "0.80, states all alike": (1.4, 0.3, 0.0),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_95_percent_interval_of_the_mean_covers_95_percent(setting):
    (success,) = simulate(2500, *setting)
    estimate, truth = mean_interval(success), rates_of_seeds(*setting).mean()
    assert 0.93 <= np.mean((estimate.low <= truth) & (truth <= estimate.high)) <= 0.97


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_95_percent_interval_of_the_interquartile_mean_covers_95_percent(setting):
    (success,) = simulate(1000, *setting)
    estimate, truth = iqm_interval([success], resamples=200), iqm(rates_of_seeds(*setting))
    assert 0.93 <= np.mean((estimate.low <= truth) & (truth <= estimate.high)) <= 0.97


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_95_percent_interval_of_a_difference_covers_95_percent(setting):
    mean, seed_sd, state_sd = setting
    first, second = simulate(2500, *setting, settings=2, shift=0.4)
    estimate = difference_interval(first, second)
    truth = rates_of_seeds(*setting).mean() - rates_of_seeds(mean - 0.4, seed_sd, state_sd).mean()
    assert 0.93 <= np.mean((estimate.low <= truth) & (truth <= estimate.high)) <= 0.97


def test_between_two_evaluations_the_interval_covers_as_well_and_that_of_the_seeds_alone_does_not():
    """What curves and success at equal wall time are: the scores of two evaluations of a run, a share of each."""
    rng = np.random.default_rng(0)
    of_seed, of_state = rng.normal(0, 0.3, (1000, SEEDS, 1)), rng.normal(0, 2.0, (1000, 1, STATES))
    two = [rng.random((1000, SEEDS, STATES)) < expit(mean + of_seed + of_state) for mean in (1.0, 2.0)]
    truth = 0.6 * rates_of_seeds(1.0, 0.3, 2.0).mean() + 0.4 * rates_of_seeds(2.0, 0.3, 2.0).mean()
    scores = 0.6 * two[0] + 0.4 * two[1]
    covered = {
        name: np.mean((e.low <= truth) & (truth <= e.high))
        for name, e in {
            "crossed": mean_interval(scores),
            "alone": mean_interval(scores.mean(-1, keepdims=True)),
        }.items()
    }
    assert 0.93 <= covered["crossed"] <= 0.975 and covered["alone"] < 0.9, covered


def simulate_returns(repeats, seed_sd, state_sd, noise, settings=1, shift=0.0):
    """Returns about 1000, as `simulate`; an episode's own noise is exponential: few are far above the others."""
    rng = np.random.default_rng(0)
    of_seed = rng.normal(0, seed_sd, (settings, repeats, SEEDS, 1))
    of_state = rng.normal(0, state_sd, (repeats, 1, STATES))
    level = 1000 - shift * np.arange(settings).reshape(-1, 1, 1, 1)
    return level + of_seed + of_state + rng.exponential(noise, (settings, repeats, SEEDS, STATES)) - noise


# between seeds, between states, of one episode
RETURNS = {
    "hard and easy states": (20.0, 100.0, 50.0),
    "hard and easy states, seeds alike": (5.0, 100.0, 50.0),
    "states all alike": (5.0, 0.0, 100.0),
}


@pytest.mark.parametrize("setting", RETURNS.values(), ids=RETURNS)
def test_95_percent_intervals_of_returns_cover_95_percent(setting):
    first, second = simulate_returns(2500, *setting, settings=2, shift=30)
    for estimate, truth in (
        (mean_interval(first, bounded=False), 1000),  # the seeds are normal: so is their interquartile mean
        (iqm_interval([first[:1000]], resamples=200, bounded=False), 1000),
        (difference_interval(first, second, bounded=False), 30),
    ):
        assert 0.93 <= np.mean((estimate.low <= truth) & (truth <= estimate.high)) <= 0.97


def near_one(true, kind, seeds, repeats=400, states=256, rng_seed=1):
    """Success `[repeats, seeds, states]` of a true mean near 1: states have success probabilities that seeds share."""
    rng = np.random.default_rng(rng_seed)
    missed, shape = 1 - true, (repeats, 1, states)
    of_state = {
        "0 or 1": lambda: (rng.random(shape) >= missed).astype(float),
        "0.5 or 1": lambda: 1 - 0.5 * (rng.random(shape) < 2 * missed),
        "0.9 or 1": lambda: 1 - 0.1 * (rng.random(shape) < 10 * missed),
        "beta": lambda: rng.beta(2 * true, 2 * missed, shape),
        "alike": lambda: np.full(shape, true),
    }[kind]()
    return (rng.random((repeats, seeds, states)) < of_state).astype(np.float32)


@pytest.mark.parametrize("kind", ["0 or 1", "0.5 or 1", "0.9 or 1", "beta", "alike"])
@pytest.mark.parametrize("seeds", [10, 20])
@pytest.mark.parametrize("true", [0.99, 0.995, 0.998])
def test_intervals_near_one_do_not_take_shared_states_for_independent_episodes(true, seeds, kind):
    success = near_one(true, kind, seeds)
    estimates = {"mean": mean_interval(success), "iqm": iqm_interval([success[:100]], resamples=100)}
    covered = {name: np.mean((e.low <= true) & (true <= e.high)) for name, e in estimates.items()}
    assert covered["mean"] >= 0.93
    assert covered["iqm"] >= (0.9 if true > 0.99 else 0.88), covered  # the middle half is nearer to 1 than the mean
    assert np.mean(estimates["mean"].high - estimates["mean"].low) < 0.035  # and not by saying nothing


@pytest.mark.parametrize("kind", ["0 or 1", "0.5 or 1", "beta"])
@pytest.mark.parametrize("seeds", [5, 20])
def test_differences_near_one_do_not_either(seeds, kind):
    first, second = near_one(0.998, kind, seeds), near_one(0.995, kind, seeds, rng_seed=2)
    estimate = difference_interval(first, second)
    assert np.mean((estimate.low <= 0.003) & (estimate.high >= 0.003)) >= 0.93
    alike = difference_interval(first, near_one(0.998, kind, seeds, rng_seed=2))
    assert np.mean(alike.p_value < 0.05) <= 0.05


def test_all_ones_on_few_states_are_no_better_with_more_seeds():
    # One of K + 2 = 66 states of another kind: of the mean, 1 / 66 * 65 / 66 / 64, and 1 - 1 / 66 in its middle.
    low = [mean_interval(np.ones((n, 64))).low for n in (10, 1000)]
    half = stats.t.ppf(0.975, 63) * np.sqrt(1 / 66 * 65 / 66 / 64) / (1 / 66 * 65 / 66)
    assert low[1] == pytest.approx(expit(np.log(65) - half), abs=1e-4)
    assert low[0] == pytest.approx(low[1], abs=1e-3)


def test_two_equal_settings_are_called_different_at_most_5_percent_of_the_time():
    first, second = simulate(2500, 3.0, 0.3, 2.0, settings=2)
    assert 0.03 <= np.mean(difference_interval(first, second).p_value < 0.05) <= 0.06


@pytest.mark.parametrize("setting", [(3.0, 0.3, 2.0), (1.2, 0.3, 0.5)])
def test_unequal_numbers_of_seeds_find_differences_of_equal_settings_as_often_as_is_said(setting):
    first, second = simulate(2500, *setting, seeds=20, settings=2, states=100)
    most = {(3, 5): 0.05, (3, 10): 0.065, (3, 20): 0.08, (5, 20): 0.06}
    for (few, many), rate in most.items():
        found = np.mean(difference_interval(first[:, :few], second[:, :many]).p_value < 0.05)
        assert 0.04 <= found <= rate, (few, many)


def test_a_95_percent_interval_of_the_probability_of_improvement_covers_95_percent():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 1000, SEEDS)) + np.array([0.8, 0]).reshape(2, 1, 1)
    truth = stats.norm.cdf(0.8 / np.sqrt(2))
    found = [probability_of_improvement(first, second) for first, second in zip(*scores, strict=True)]
    assert 0.94 <= np.mean([e.low <= truth <= e.high for e in found]) <= 0.98


# ---- by hand


def test_iqm_is_the_mean_of_the_middle_half():
    assert iqm([0.0, 0.5, 0.6, 1.0]) == pytest.approx(0.55)
    assert iqm([0.1, 0.5, 0.6, 0.7, 1.0]) == pytest.approx(0.6)
    np.testing.assert_allclose(iqm([[3, 1, 2], [1, 1, 4]]), [2, 2])


def test_the_variance_parts_are_those_of_a_two_way_analysis_of_variance():
    success = np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0]], dtype=float)
    spread = statistics.spread_of(success)
    # Seeds 3/4, 2/4, 2/4; states 1, 2/3, 0, 2/3; mean 7/12.
    assert spread.seed == pytest.approx(1 / 48)
    total = (7 * 5) / 12  # sum of squares about the mean
    seeds, states = 4 * 2 * (1 / 48), 3 * ((5 / 12) ** 2 + 2 * (1 / 12) ** 2 + (7 / 12) ** 2)
    residual = (total - seeds - states) / 6
    assert spread.residual == pytest.approx(residual)
    assert spread.state == pytest.approx(states / 9 - residual / 3)


def test_without_states_the_interval_of_the_mean_is_students_on_the_logit_scale():
    scores = np.array([0.80, 0.84, 0.86, 0.90, 0.90])
    estimate = mean_interval(scores[:, None])
    half = 2.7764 * scores.std(ddof=1) / np.sqrt(5) / (0.86 * 0.14)
    assert estimate.value == pytest.approx(0.86)
    assert estimate.low == pytest.approx(expit(np.log(0.86 / 0.14) - half), abs=1e-5)
    assert estimate.high == pytest.approx(expit(np.log(0.86 / 0.14) + half), abs=1e-5)


def test_the_interval_of_returns_is_students_on_their_own_scale():
    scores = np.array([-3.0, 1.0, 2.0, 4.0, 6.0])
    half = 2.7764 * np.sqrt(11.5 / 5)
    for estimate in (
        mean_interval(scores[:, None], bounded=False),
        mean_interval(scores[:, None] + 1e6, bounded=False),
    ):
        assert (estimate.value - estimate.low, estimate.high - estimate.value) == pytest.approx((half, half), rel=1e-4)


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_intervals_of_returns_are_the_same_in_any_unit(unit):
    first, second = simulate_returns(1, *RETURNS["hard and easy states"], settings=2, shift=30)[:, 0]

    def numbers(unit):
        estimates = [
            mean_interval(unit * first, bounded=False),
            iqm_interval([unit * first], bounded=False),
            difference_interval(unit * first, unit * second, bounded=False),
        ]
        return np.array([[e.value, e.low, e.high] for e in estimates]) / unit

    np.testing.assert_allclose(numbers(unit), numbers(1.0), rtol=1e-6)
    needed = [find(u * first, u * second, bounded=False) for find in (seeds_needed, states_needed) for u in (1.0, unit)]
    assert needed[0] == needed[1] < np.inf and needed[2] == needed[3]
    apart = [states_needed(u * first, u * (second - 100), bounded=False) for u in (1.0, unit)]
    assert apart[0] == apart[1] < np.inf


def test_without_states_the_difference_is_welchs():
    first, second = np.array([0.9, 0.8, 0.85]), np.array([0.6, 0.7, 0.8, 0.75])
    estimate, welch = (
        difference_interval(first[:, None], second[:, None]),
        stats.ttest_ind(first, second, equal_var=False),
    )
    interval = welch.confidence_interval()
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert estimate.p_value == pytest.approx(welch.pvalue)


def test_pairing_takes_out_what_the_states_have_in_common():
    first, second = simulate(1, 1.2, 0.2, 3.0, settings=2, shift=0.3)[:, 0]
    paired = difference_interval(first, second)
    shuffled = difference_interval(first, second[:, np.random.default_rng(0).permutation(STATES)])
    assert paired.value == pytest.approx(shuffled.value)
    assert paired.high - paired.low < 0.8 * (shuffled.high - shuffled.low)


def test_differences_need_the_same_states():
    with pytest.raises(UserError, match="same initial states, got 4, 3"):
        difference_interval(np.ones((2, 4)), np.ones((2, 3)))


def test_probability_of_improvement_counts_pairs_of_runs():
    # 0.9 beats both; 0.7 beats one and ties with the other: 3.5 of 4.
    assert probability_of_improvement([0.9, 0.7], [0.7, 0.5]).value == pytest.approx(3.5 / 4)
    always = probability_of_improvement([0.9] * 5, [0.1] * 5)
    assert always.value == always.high == 1
    assert 0.5 < always.low < 0.9
    never = probability_of_improvement([0.1] * 5, [0.9] * 5)
    assert (never.value, never.low, never.high) == pytest.approx((0, 0, 1 - always.low))


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, np.nan]), [0.03, 0.06, 0.06, np.nan])
    np.testing.assert_allclose(holm([0.9, 0.6]), [1, 1])


def test_the_level_that_each_p_value_faces_in_holms_procedure_by_hand():
    np.testing.assert_allclose(holm_levels([0.01, 0.04, 0.03, np.nan], 0.06), [0.02, 0.06, 0.03, np.nan])
    p_values = np.array([0.001, 0.02, 0.012, 0.3])  # in order of size: 0.0125, 0.0167, 0.025, 0.05
    np.testing.assert_array_equal(holm(p_values) < 0.05, p_values < holm_levels(p_values))


def test_the_standard_error_of_a_difference_is_that_of_its_interval():
    first, second = simulate(1, 1.2, 0.2, 3.0, settings=2, shift=0.3)[:, 0]
    estimate, error = difference_interval(first, second), standard_error_of_difference(first, second)
    assert stats.norm.ppf(0.975) < (estimate.high - estimate.value) / error < stats.t.ppf(0.975, 4)
    by_hand = standard_error_of_difference([[0.9], [0.8]], [[0.6], [0.7], [0.8]])
    assert by_hand == pytest.approx(np.sqrt(0.005 / 2 + 0.01 / 3))
    assert np.isnan(standard_error_of_difference([[0.9]], [[0.6], [0.7]]))


def test_rank_ranges():
    better = np.zeros((3, 3), dtype=bool)
    better[0, 2] = True  # the first is better than the third; the second is separable from neither
    assert rank_ranges(better) == [(1, 2), (1, 3), (2, 3)]


def test_strata_are_resampled_on_their_own():
    low, high = np.full((3, 50), 0.0), np.full((3, 50), 1.0)
    low[:, :20], high[:, :10] = 1, 0  # all seeds of a stratum agree: 0.4 and 0.8
    low[0, 20] = high[0, 0] = 1
    together, apart = iqm_interval([np.concatenate([low, high])]), iqm_interval([low, high])
    assert together.value == apart.value
    assert apart.high - apart.low < 0.6 * (together.high - together.low)


def test_one_seed_has_no_interval():
    one, two = np.ones((1, 4)), np.array([[1, 0, 1, 1], [0, 0, 1, 1]])
    for estimate in (
        mean_interval(one),
        iqm_interval([one]),
        difference_interval(one, two),
        probability_of_improvement([1.0], [0.5, 0.6]),
    ):
        assert np.isfinite(estimate.value)
        assert not estimate.has_interval


def test_seeds_that_agree_to_the_last_episode_are_still_a_sample():
    perfect = np.ones((5, 128))
    for estimate in (mean_interval(perfect), iqm_interval([perfect])):
        assert estimate.value == estimate.high == 1
        assert 0.9 < estimate.low < 0.999
    difference = difference_interval(perfect, perfect)
    assert difference.low < 0 < difference.high
    assert difference.p_value == 1
    assert not mean_interval(np.ones((5, 1))).has_interval  # scores alone say nothing about how many episodes


def test_seeds_whose_means_differ_by_rounding_alone_agree():
    tenth = np.tile(np.arange(40) < 4, (5, 1))  # the mean of five times 0.1 is not 0.1
    assert iqm_interval([tenth]).low < 0.08 and iqm_interval([tenth]).high > 0.12


@pytest.mark.parametrize("unit", [10.0, 0.9])  # whole numbers, and such that means are rounded
def test_seeds_that_agree_in_their_mean_return_scatter_as_their_episodes_do(unit):
    # Means of 2 for all seeds and states; the nine episodes have variance 6 / 8, the mean of three a third of it.
    returns = unit * np.array([[1, 2, 3], [2, 3, 1], [3, 1, 2]])
    half = unit * 4.3027 * np.sqrt(0.25 / 3)
    for estimate in (mean_interval(returns, bounded=False), iqm_interval([returns], bounded=False)):
        assert (estimate.low, estimate.high) == pytest.approx((2 * unit - half, 2 * unit + half), rel=1e-4)
    difference, half = difference_interval(returns + unit, returns, bounded=False), unit * 2.77645 * np.sqrt(0.5 / 3)
    assert (difference.low, difference.high) == pytest.approx((unit - half, unit + half), rel=1e-4)
    # (1.96 + 0.8416)^2 * 0.5 + 1.96^2 / 4 = 4.88
    assert seeds_needed(returns + unit, returns, bounded=False) == 5


def test_returns_that_are_all_equal_have_no_interval():
    equal = np.full((3, 3), 1000.0)
    for estimate in (
        mean_interval(equal, bounded=False),
        iqm_interval([equal], bounded=False),
        difference_interval(equal, equal - 1, bounded=False),
    ):
        assert not estimate.has_interval  # nothing at all is known of how returns scatter
        assert np.isnan(estimate.p_value)
