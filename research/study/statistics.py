"""What a handful of seeds can and cannot tell: intervals, paired differences, rankings.

Runs of one setting are `scores`, `[..., n, K]`: n seeds, each evaluated on the same K initial states. A score is
`bounded`, within 0..1, where it is success (1) or a success rate; a return is not. Leading dimensions are independent
repetitions (the coverage tests use them). Where only a score per run is known, K = 1. Everything is about a *new* seed
and a *new* initial state of the same task: both are random, both add variance, and states are shared by all runs, so
that more seeds do not average a lucky set of states away.

Measured coverage of the 95 % intervals at n = 5 seeds; success rates of 0.66 to 0.95 that differ between seeds by a
standard deviation of 0.015 to 0.07, states of equal or of very different difficulty, K = 128 and 256, 1000 to 4000
repetitions each. `tests/study/test_statistics.py` repeats the main ones.

| interval                                    | coverage                                                          |
|---------------------------------------------|-------------------------------------------------------------------|
| percentile bootstrap over seeds             | 0.67 to 0.84, for the interquartile mean 0.77 to 0.90: not used   |
| t over seeds alone                          | 0.87 to 0.95, lowest where states differ in difficulty: not used  |
| `mean_interval`                             | 0.94 to 0.95                                                      |
| `iqm_interval`                              | 0.95 to 0.965                                                     |
| `difference_interval`                       | 0.95 to 0.965                                                     |
| `probability_of_improvement`                | 0.96 to 0.97                                                      |

Near 1 the K states bind, which all seeds share. True success 0.98 to 0.998, n = 5, 10, 20 seeds, K = 256, 400
repetitions; a state's own probability of success is 0 or 1, 0.5 or 1, 0.9 or 1, from a beta distribution, or the same
for all:

| interval                                          | without `_unseen_state`        | with it                |
|---------------------------------------------------|--------------------------------|------------------------|
| `mean_interval`                                   | 0.375 to 0.99                  | 0.935 to 0.998         |
| ... true 0.995; 0.998, states 0 or 1, n = 10      | 0.670; 0.978                   | 0.953; 0.978           |
| ... true 0.995; 0.998, states 0 or 1, n = 20      | 0.670; 0.375                   | 0.953; 0.978           |
| `difference_interval`, 0.998 - 0.995              | 0.812 to 0.968                 | 0.968 to 1.000         |
| `difference_interval`, 0.995 - 0.98               | 0.938 to 0.960                 | 0.943 to 0.988         |

Two seeds are too few: intervals of n = 2 cover 0.92 to 0.95 in the settings of the first table, and 0.89 to 0.91 in
others, in which a difference between equal settings was found up to 0.115 of the time after Holm's correction.
`comparison` gives no verdict below three, where they cover 0.93 to 0.95. Where one setting has many more seeds than the
other, `difference_interval` finds a difference of equal settings (K = 100, 2,500 repetitions) 0.04 to 0.05 of the time
with 3 against 5 seeds, 0.06 to 0.065 with 3 against 10, 0.06 to 0.08 with 3 against 20, 0.05 to 0.06 with 5 against 20.

Not so where nearly all seeds reach 1 and a few fail (mean 0.94, standard deviation 0.048 between seeds): there
`mean_interval` covers 0.92, as five seeds do not show such a tail.

Returns, `bounded=False`, at n = 5 seeds: normal between seeds and between states, episodes normal or exponential, from
seeds that hardly differ to seeds that differ as much as single episodes; K = 1, 128 and 256, 1000 to 3000 repetitions.

| interval                                    | coverage                                                          |
|---------------------------------------------|-------------------------------------------------------------------|
| `mean_interval`                             | 0.94 to 0.96                                                      |
| `iqm_interval`                              | 0.94 to 0.98                                                      |
| `difference_interval`                       | 0.95 to 0.97                                                      |

Not so where seeds are far from normal: `mean_interval` covers 0.91 to 0.93 where their means follow an exponential
distribution, and 0.93, 0.87, 0.75 where episodes are cut at 1000 and the mean of all is 940, 970, 982. There nearly
all seeds reach the end of the scale, a few do not, and no logit scale makes up for those that five seeds do not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit, logit

from research.errors import UserError

Array = NDArray[np.float64]
TELLING_STATES = 8  # as many that differ from the rest show how states vary; with 5, coverage falls to 0.93


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `low`, `high` and `p_value` are NaN where the seeds allow none."""

    value: float | Array
    low: float | Array = np.nan
    high: float | Array = np.nan
    p_value: float | Array = np.nan
    """Two-sided, of the value being 0; differences only."""

    @property
    def has_interval(self) -> bool:
        return bool(np.all(np.isfinite(self.low)))


class Spread(NamedTuple):
    """Where the variance of a setting's mean score comes from; each `[...]`."""

    seed: Array  # variance of one seed's mean, K episodes' noise included
    state: Array  # variance of an initial state's own mean
    residual: Array  # variance of one episode, given its seed and its state
    unseen: Array | float  # least that `state` may be, see `_unseen_state`


def iqm(scores: ArrayLike) -> Array:
    """Interquartile mean over the last dimension: the mean of the middle half.

    Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv:2108.13264).
    Like theirs, it cuts off whole scores: one at each end of 5, none of 3.
    """
    return stats.trim_mean(np.asarray(scores, dtype=float), 0.25, axis=-1)


def mean_interval(scores: ArrayLike, confidence: float = 0.95, bounded: bool = True) -> Estimate:
    """Mean score of a setting, with an interval for new seeds and new initial states.

    Seeds and states are crossed random effects: their variances come from a two-way analysis of variance, the degrees
    of freedom from Satterthwaite (1946, doi:10.2307/3002019). Of bounded scores, the t interval is taken on the logit
    scale, which keeps it within 0 and 1 and makes it longer towards 0.5, where few seeds have not been seen.

    Args:
        scores: `[..., n, K]`.
        confidence: of the interval.
        bounded: whether scores lie within 0..1; if not, the t interval is on their own scale.
    Returns:
        no interval for one seed, or where all scores are equal and K = 1 or they are not bounded.
    """
    scores = checked(scores)
    n, states = scores.shape[-2:]
    value = scores.mean((-2, -1))
    if n < 2:
        return Estimate(_plain(value))
    spread = spread_of(scores, bounded)
    variance, freedom = _satterthwaite((spread.seed / n, n - 1), (spread.state / states, max(states - 1, 1)))
    return _interval(value, variance, freedom, _independent_episodes(n, states, spread.unseen), confidence, bounded)


def iqm_interval(
    strata: Sequence[ArrayLike],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    bounded: bool = True,
) -> Estimate:
    """Interquartile mean over the runs of all strata, with an interval.

    Stratified bootstrap (Agarwal et al. 2021): every resample draws, within each stratum, as many runs as it has. From
    it comes the standard error, not the interval, since percentiles of so few runs are far too narrow; a t interval
    does the rest. Its scale and the variance of the initial states are as in `mean_interval`.

    Args:
        strata: one `[..., n_k, K_k]` per stratum, for example per task; runs of one setting alone are one stratum.
        confidence: of the interval.
        resamples: bootstrap resamples.
        seed: of the resampling; equal input gives equal output.
        bounded: whether scores lie within 0..1, as in `mean_interval`.
    Returns:
        no interval where a stratum has one seed, or where all scores are equal and K = 1 or they are not bounded.
    """
    arrays = [checked(scores) for scores in strata]
    means = [scores.mean(-1) for scores in arrays]
    value = iqm(np.concatenate(means, axis=-1))
    counts = np.array([mean.shape[-1] for mean in means])
    if counts.min() < 2:
        return Estimate(_plain(value))

    def statistic(*samples: Array, axis: int) -> Array:
        return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)

    with np.errstate(all="ignore"):  # equal scores: scipy divides by their spread for an interval that is not used
        drawn = stats.bootstrap(
            means, statistic, n_resamples=resamples, axis=-1, method="percentile", rng=np.random.default_rng(seed)
        )
    total = counts.sum()
    freedom = total - len(counts)
    # A resample of n scores varies by (n - 1) / n too little. Where enough are drawn for some to be cut off, repeated
    # scores make up for that: measured, the interval is too wide with the correction, right without.
    correction = total / freedom if counts.min() < 4 else 1.0
    seed_part = drawn.standard_error**2 * correction
    spreads = [spread_of(scores, bounded) for scores in arrays]
    floor = sum((n / total) ** 2 * s.seed / n for n, s in zip(counts, spreads, strict=True))
    seed_part = np.where(seed_part > 1e-12 * floor, seed_part, floor)  # equal means differ by rounding alone
    state_part = sum(
        (n / total) ** 2 * s.state / scores.shape[-1] for n, s, scores in zip(counts, spreads, arrays, strict=True)
    )
    states = min(scores.shape[-1] for scores in arrays)
    unseen = np.max([spread.unseen for spread in spreads], axis=0)
    variance, freedom = _satterthwaite((seed_part, freedom), (state_part, max(states - 1, 1)))
    return _interval(value, variance, freedom, _independent_episodes(total, states, unseen), confidence, bounded)


def difference_interval(
    first: ArrayLike, second: ArrayLike, confidence: float = 0.95, bounded: bool = True
) -> Estimate:
    """Difference of two settings' mean scores, first - second, paired by initial state.

    A state that is easy for both cancels out; what remains is how much the *difference* varies between states, and the
    seeds of both (Welch and Satterthwaite). Seeds are not paired: equal seed numbers make two settings no more alike.

    Args:
        first: `[..., n, K]`.
        second: `[..., m, K]`, the same states in the same order.
        confidence: of the interval.
        bounded: whether scores lie within 0..1; their differences, and the interval, then lie within -1..1.
    Returns:
        with a two-sided p-value; no interval where either has one seed, or where in both all scores are equal and
        K = 1 or they are not bounded.
    Raises:
        UserError: the two have different numbers of states.
    """
    first, second = checked(first), checked(second)
    if first.shape[-1] != second.shape[-1]:
        raise UserError(f"paired differences need the same initial states, got {first.shape[-1]}, {second.shape[-1]}")
    value = first.mean((-2, -1)) - second.mean((-2, -1))
    n, m, states = first.shape[-2], second.shape[-2], first.shape[-1]
    if min(n, m) < 2:
        return Estimate(_plain(value))
    parts = difference_parts(first, second, bounded)
    variance, freedom = _satterthwaite((parts[0] / n, n - 1), (parts[1] / m, m - 1), (parts[2], max(states - 1, 1)))
    error = np.sqrt(variance)
    error = np.where(error > 0, error, np.nan)
    half = stats.t.ppf((1 + confidence) / 2, freedom) * error
    p_value = 2 * stats.t.sf(np.abs(value) / error, freedom)
    low, high = np.clip([value - half, value + half], *((-1, 1) if bounded else (-np.inf, np.inf)))
    return Estimate(_plain(value), _plain(low), _plain(high), _plain(p_value))


def probability_of_improvement(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Estimate:
    """How often a run of the first setting scores above a run of the second, ties counting half.

    The Mann-Whitney statistic, as in Agarwal et al. 2021, with the score interval of Newcombe (2006, method 5,
    doi:10.1002/sim.2324), which has the right coverage for a few runs and also where all of one lie above the other.

    Args:
        first: `[n]`, one score per run.
        second: `[m]`.
        confidence: of the interval.
    Returns:
        no interval where either has one run.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    n, m = len(first), len(second)
    value = float((np.sign(first[:, None] - second).mean() + 1) / 2)
    if min(n, m) < 2:
        return Estimate(value)
    z = stats.norm.ppf((1 + confidence) / 2)
    others = (n + m) / 2 - 1

    def excess(theta: float) -> float:
        """Squared distance of a true value from the estimate, beyond z standard errors."""
        share = 1 + others * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (theta - value) ** 2 - z**2 * theta * (1 - theta) / (n * m) * share

    inside = min(max(value, 1e-9), 1 - 1e-9)
    low = brentq(excess, 0, inside) if value > 0 else 0.0
    high = brentq(excess, inside, 1) if value < 1 else 1.0
    return Estimate(value, low, high)


def standard_error_of_difference(first: ArrayLike, second: ArrayLike, bounded: bool = True) -> float:
    """Standard error of the difference of two settings' mean scores, paired by initial state.

    Args:
        first: `[n, K]`.
        second: `[m, K]`, the same states.
        bounded: whether scores lie within 0..1.
    Returns:
        NaN where either has one seed.
    Raises:
        UserError: unequal numbers of states.
    """
    first, second = checked(first), checked(second)
    n, m = len(first), len(second)
    if first.shape[-1] != second.shape[-1]:
        raise UserError(f"paired differences need the same initial states, got {first.shape[-1]}, {second.shape[-1]}")
    if min(n, m) < 2:
        return np.nan
    of_first, of_second, of_states = difference_parts(first, second, bounded)
    return float(np.sqrt(of_first / n + of_second / m + of_states))


def holm(p_values: ArrayLike) -> Array:
    """P-values corrected for the number of comparisons (Holm 1979); NaN, where nothing was tested, stays NaN."""
    p_values = np.asarray(p_values, dtype=float)
    corrected, order = np.full(p_values.shape, np.nan), _ascending(p_values)
    steps = p_values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected


def holm_levels(p_values: ArrayLike, alpha: float = 0.05) -> Array:
    """The level that each p-value faces in Holm's procedure: alpha / m for the smallest, alpha for the largest of m."""
    p_values = np.asarray(p_values, dtype=float)
    levels, order = np.full(p_values.shape, np.nan), _ascending(p_values)
    levels[order] = alpha / np.arange(len(order), 0, -1)
    return levels


def _ascending(p_values: Array) -> Array:
    """Where the p-values that are none of NaN stand, smallest first."""
    tested = np.flatnonzero(np.isfinite(p_values))
    return tested[np.argsort(p_values[tested], kind="stable")]


def rank_ranges(better: ArrayLike) -> list[tuple[int, int]]:
    """The ranks each setting can have, 1 = best.

    Args:
        better: bool `[G, G]`, true at [i, j] where i is separably better than j.
    Returns:
        (best, worst) rank per setting; (1, G) for one that is separable from none.
    """
    better = np.asarray(better, dtype=bool)
    return [(1 + int(up), len(better) - int(down)) for up, down in zip(better.sum(0), better.sum(1), strict=True)]


def checked(scores: ArrayLike) -> Array:
    """Scores `[..., n, K]` as an array of floats; UserError where there are no seeds or no states."""
    scores = np.asarray(scores, dtype=float)
    if scores.ndim < 2 or 0 in scores.shape[-2:]:
        raise UserError(f"scores should be [..., seeds, states], neither of them 0, got shape {list(scores.shape)}")
    return scores


def spread_of(scores: Array, bounded: bool = True) -> Spread:
    """Two-way analysis of variance of `[..., n, K]`, n > 1."""
    n, states = scores.shape[-2:]
    of_seed, of_state = scores.mean(-1), scores.mean(-2)
    seed = of_seed.var(-1, ddof=1)
    if states == 1:
        return Spread(seed, np.zeros_like(seed), np.zeros_like(seed), np.zeros_like(seed))
    mean = of_seed.mean(-1)
    rest = scores - of_seed[..., None] - of_state[..., None, :] + mean[..., None, None]
    residual = (rest**2).sum((-2, -1)) / ((n - 1) * (states - 1))
    unseen = _unseen_state(of_state) if bounded else np.zeros_like(residual)
    state = np.maximum(of_state.var(-1, ddof=1) - residual / n, unseen)
    # Seeds that agree to the last episode still are a sample: what their episodes alone would scatter.
    if bounded:
        rate = (mean * n * states + 1) / (n * states + 2)
        scatter, least = rate * (1 - rate), 1e-12
    else:
        scatter = scores.var((-2, -1), ddof=1)
        least = 1e-12 * scatter  # returns have any unit
    return Spread(np.where(seed > least, seed, scatter / states), state, residual, unseen)


def difference_parts(first: Array, second: Array, bounded: bool = True) -> tuple[Array, Array, Array]:
    """Variance of one seed's mean in the first and in the second setting, and the states' part of the difference's."""
    spreads = spread_of(first, bounded), spread_of(second, bounded)
    states = first.shape[-1]
    if states == 1:
        return spreads[0].seed, spreads[1].seed, np.zeros_like(spreads[0].seed)
    by_state = (first.mean(-2) - second.mean(-2)).var(-1, ddof=1)  # [...]
    noise = spreads[0].residual / first.shape[-2] + spreads[1].residual / second.shape[-2]
    state = np.maximum(by_state - noise, np.maximum(spreads[0].unseen, spreads[1].unseen))
    return spreads[0].seed, spreads[1].seed, state / states


def _unseen_state(of_state: Array) -> Array:
    """Least variance between states that bounded scores, of the states `[..., K]`, can speak for; 0 where they can.

    Where all states succeed but a few, or all fail but a few, their variance does not show a kind of state so rare that
    none or hardly one was met. By Laplace's rule of succession over states the next one is of that kind with
    probability 1 / (K + 2): however many seeds ran on them, the states are K and no more.
    """
    states = of_state.shape[-1]
    alike = np.maximum((of_state == 1).sum(-1), (of_state == 0).sum(-1))
    rate = 1 / (states + 2)
    few = states - alike < min(TELLING_STATES, states / 2)
    return np.where(few, rate * (1 - rate), 0.0)


def _independent_episodes(runs: int, states: int, unseen: Array) -> Array:
    """How many episodes of a setting count as independent; infinite where scores alone are known."""
    return np.where(unseen > 0, states, runs * states) if states > 1 else np.full_like(unseen, np.inf)


def _satterthwaite(*parts: tuple[Array, float]) -> tuple[Array, Array]:
    """Sum of (variance, degrees of freedom) parts, and its degrees of freedom."""
    total = sum(variance for variance, _ in parts)
    below = sum(variance**2 / freedom for variance, freedom in parts)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total, np.where(below > 0, total**2 / below, 1.0)


def _interval(
    value: Array, variance: Array, freedom: Array, episodes: Array, confidence: float, bounded: bool
) -> Estimate:
    """A t interval, of bounded scores on the logit scale; NaN where the variance is 0."""
    half = stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance)
    if bounded:
        margin = np.maximum(1 / (episodes + 2), 1e-9)  # the logit of 0 and of 1 is infinite
        center = np.clip(value, margin, 1 - margin)
        half = half / (center * (1 - center))
        low, high = np.minimum(expit(logit(center) - half), value), np.maximum(expit(logit(center) + half), value)
    else:
        low, high = value - half, value + half
    known = variance > 0
    return Estimate(_plain(value), _plain(np.where(known, low, np.nan)), _plain(np.where(known, high, np.nan)))


def _plain(value: Array) -> float | Array:
    return float(value) if np.ndim(value) == 0 else value
