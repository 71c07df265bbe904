"""Seeds and states that would tell two settings apart: by hand, and by simulating what they promise."""

import numpy as np
import pytest
from study_worlds import simulate

from research.study.sample_size import seeds_for_power, seeds_needed, states_needed
from research.study.statistics import difference_interval


@pytest.mark.parametrize("state_sd", [0.0, 2.0])
def test_seeds_needed_give_the_promised_power(state_sd):
    first, second = simulate(1, 1.5, 0.4, state_sd, seeds=2000, settings=2, shift=0.45, rng_seed=1)[:, 0]
    seeds = seeds_needed(first, second, power=0.8)
    assert 6 <= seeds <= 60
    first, second = simulate(500, 1.5, 0.4, state_sd, seeds=int(seeds), settings=2, shift=0.45)
    assert 0.72 <= np.mean(difference_interval(first, second).p_value < 0.05) <= 0.9


def test_seeds_for_power_by_hand():
    # 2 * (1.96 + 0.8416)^2 * 0.03^2 / 0.04^2 = 8.83, and 1.96^2 / 4 = 0.96
    assert seeds_for_power(0.04, 2 * 0.03**2) == 10
    assert seeds_for_power(0.04, 2 * 0.03**2, state_variance=0.0001) == 19  # 0.0018 / (0.04^2 / 7.849 - 0.0001) + 0.96
    assert seeds_for_power(0.04, 2 * 0.03**2, state_variance=0.001) == np.inf
    assert seeds_for_power(0.0, 0.001) == np.inf


def test_states_needed_by_hand():
    # All seeds of a setting agree: nothing is the seeds' own. A state's difference is 0, 1, 0, 0, 1 or -1: variance
    # 17 / 30. What three seeds of 18 episodes with 12 and 9 successes scatter, by Laplace: 0.65 * 0.35 and 0.5 * 0.5.
    # 2.776445 is Student's with 4 degrees of freedom.
    first, second = np.tile([1, 1, 1, 0, 1, 0], (3, 1)), np.tile([1, 0, 1, 0, 0, 1], (3, 1))
    per_state = 17 / 30 + (0.65 * 0.35 + 0.5 * 0.5) / 3
    assert states_needed(first, second) == np.ceil(per_state * ((2.776445 + 0.8416212) / (1 / 6)) ** 2) == 343
    assert states_needed(first, first) == np.inf


def test_states_needed_give_the_promised_power_with_the_seeds_that_there_are():
    setting = {"mean": 1.5, "seed_sd": 0.1, "state_sd": 2.0, "settings": 2, "shift": 0.35}
    many = simulate(60, seeds=6, states=2000, rng_seed=1, **setting)
    needed = np.median([states_needed(first, second) for first, second in zip(*many, strict=True)])
    assert 200 <= needed < 1000
    found = simulate(800, seeds=6, states=int(needed), **setting)
    assert 0.72 <= np.mean(difference_interval(*found).p_value < 0.05) <= 0.9


def test_where_seeds_differ_too_much_no_number_of_states_suffices():
    first, second = simulate(1, 1.5, 1.5, 1.0, seeds=3, settings=2, shift=0.1, states=500)[:, 0]
    assert states_needed(first, second) == np.inf and np.isfinite(seeds_for_power(0.1, 0.5))
