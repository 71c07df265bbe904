"""How many more seeds, or initial states, would tell two settings apart.

Scores are those of `statistics`: `[n, K]`, n seeds on the same K initial states. Seeds do not average a lucky set of
states away: where the states bind, no number of seeds suffices, and more states would.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from research.study.statistics import checked, difference_parts, spread_of


def seeds_needed(
    first: ArrayLike, second: ArrayLike, alpha: float = 0.05, power: float = 0.8, bounded: bool = True
) -> float:
    """Seeds per setting with which a difference as large as the observed one would be found.

    Args:
        first: `[n, K]`, n > 1.
        second: `[m, K]`, m > 1, the same states.
        alpha: largest p-value that counts as separable.
        power: how probable it should be to get there.
        bounded: whether scores lie within 0..1.
    Returns:
        seeds in all, for each of the two; infinite where the difference is 0, or so small that the initial states
        alone hide it. It is only as good as the observed difference and variances, which a few seeds know roughly.
    """
    first, second = checked(first), checked(second)
    difference = float(first.mean() - second.mean())
    seed_first, seed_second, state = (float(part) for part in difference_parts(first, second, bounded))
    return seeds_for_power(difference, seed_first + seed_second, state, alpha, power)


def seeds_for_power(
    difference: float, seed_variance: float, state_variance: float = 0.0, alpha: float = 0.05, power: float = 0.8
) -> float:
    """Normal approximation of the sample size, with Guenther's correction for few seeds (1981, doi:10.2307/2683297).

    Args:
        difference: of the two settings' mean scores.
        seed_variance: sum of the two variances between seeds.
        state_variance: what the choice of initial states adds to the difference's variance, however many the seeds.
    Returns:
        seeds per setting, whole, at least 2, or infinite.
    """
    room = _largest_variance(difference, alpha, power) - state_variance
    if room <= 0:
        return np.inf
    return max(2.0, float(np.ceil(seed_variance / room + stats.norm.ppf(1 - alpha / 2) ** 2 / 4)))


def states_needed(
    first: ArrayLike, second: ArrayLike, alpha: float = 0.05, power: float = 0.8, bounded: bool = True
) -> float:
    """Initial states with which the seeds that there are would find a difference as large as the observed one.

    The variance of one seed's mean has a part that more states average away, its episodes' own noise, and one that
    they do not; so has the difference as a whole.

    Args:
        first: `[n, K]`, n > 1, K > 1.
        second: `[m, K]`, m > 1, the same states.
        alpha: largest p-value that counts as separable.
        power: how probable it should be to get there.
        bounded: whether scores lie within 0..1.
    Returns:
        states in all, at least 2; infinite where the difference is 0, or the seeds' own differences hide it.
    """
    first, second = checked(first), checked(second)
    states = first.shape[-1]
    *_, of_states = difference_parts(first, second, bounded)
    seeds, per_state = 0.0, float(of_states) * states
    for scores in (first, second):
        spread, n = spread_of(scores, bounded), len(scores)
        own = max(float(scores.mean(-1).var(ddof=1) - spread.residual / states), 0)
        seeds += own / n
        per_state += (float(spread.seed) - own) * states / n
    freedom = len(first) + len(second) - 2
    room = _largest_variance(float(first.mean() - second.mean()), alpha, power, freedom) - seeds
    return max(2.0, float(np.ceil(per_state / room))) if room > 0 else np.inf


def _largest_variance(difference: float, alpha: float, power: float, freedom: float = np.inf) -> float:
    """Variance of an estimated difference with which it is found, by a t test of these degrees of freedom."""
    return (difference / (stats.t.ppf(1 - alpha / 2, freedom) + stats.norm.ppf(power))) ** 2
