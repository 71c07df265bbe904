"""envs/demonstrating.py, and `demonstrate` of VectorEnv: episodes of an expert, in any number of processes."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from envs_worlds import Drifter, Guided

from envs.demonstrating import UNDISTURBED, Disturbance, demonstrate
from envs.vector import VectorEnv
from research.errors import SimulatorFailed, UserError


def test_an_undisturbed_episode_is_that_of_the_expert():
    world = Guided(limit=7)
    found = demonstrate(world, 5, every=3)
    assert np.array_equal(world.told, found.actions) and found.actions.dtype == np.float32
    assert found.number == 5 and found.task == "away" and found.every == 3
    world.reset(5)
    rewards, success, looks = [], False, []
    for t, action in enumerate(found.actions):
        if t % 3 == 0:
            looks.append({key: value.copy() for key, value in world.observe().items()})
        out = world.step(action)
        rewards.append(out["reward"][0])
        success |= bool(out["success"][0])
        assert bool(out["terminated"][0] or out["truncated"][0]) == (t == len(found.actions) - 1)
    assert found.rewards.tolist() == rewards and found.success == success
    for key, value in found.observations.items():
        assert np.array_equal(value, [look[key] for look in looks]), key


def test_disturbances_are_constant_over_a_decision_and_are_not_what_is_recorded():
    """And spare the gripper."""
    pushes, calm = [], 0
    for state in range(60):
        world = Guided(limit=8)
        found = demonstrate(world, state, 4, Disturbance(noise=0.5, probability=0.5, wander=0))
        told = np.array(world.told)
        clock = np.arange(len(told))
        assert np.array_equal(found.actions[:, 0], np.full(len(told), np.float32(0.25)))
        assert np.array_equal(found.actions[:, 1], np.where(clock % 2, 1, -1))
        assert np.array_equal(told[:, 1], found.actions[:, 1])
        for start in range(0, len(told), 4):
            push = told[start : start + 4, 0] - 0.25
            assert np.ptp(push) < 1e-6
            calm += push[0] == 0
            pushes += [push[0]] if push[0] else []
    assert 0.3 < calm / (calm + len(pushes)) < 0.7 and 0.35 < np.std(pushes) < 0.65


def test_half_of_the_episodes_begin_astray():
    """For as many decisions as were drawn, of which all motion is uniform."""
    astray = []
    for state in range(80):
        world = Guided(limit=12, ends=False)
        demonstrate(world, state, 2, Disturbance(noise=0.0, probability=0.0, wander=3))
        moved = [told[0] != np.float32(0.25) for told in world.told[::2]]
        astray.append(sum(moved))
        assert moved == sorted(moved, reverse=True) and max(moved[3:]) == 0
        assert all(abs(told[0]) <= 1 for told in world.told)
    counts = np.bincount(astray, minlength=4)  # half, and a quarter of the other half, begin as they should
    assert 35 <= counts[0] <= 65 and (counts[1:] >= 4).all()


def test_an_episode_that_does_not_end_is_cut_off(monkeypatch):
    monkeypatch.setattr("envs.demonstrating.LONGEST", 20)
    found = demonstrate(Guided(limit=10**9, ends=False), 1, every=8)
    assert len(found.actions) == 24 and len(found.observations["proprio"]) == 3


def make(workers: int, rows: int = 4, **options) -> VectorEnv:
    return VectorEnv(partial(Guided, **options), rows, workers, name="drift")


def same(one, other) -> bool:
    arrays = [(one.actions, other.actions), (one.rewards, other.rewards)]
    arrays += [(one.observations[key], other.observations[key]) for key in one.observations]
    return one.number == other.number and all(np.array_equal(*pair) for pair in arrays)


@pytest.mark.slow
def test_processes_do_not_change_the_episodes():
    """Nor their order; more processes than episodes as well."""
    states, played = [7, 3, 12, 4, 5], []
    for workers in (0, 2, 3):
        env, counts = make(workers), []
        played.append(env.demonstrate(states, 2, Disturbance(), seed=1, on_end=counts.append))
        few = env.demonstrate(states[:1], 2, Disturbance(), seed=1)
        assert counts == [1, 2, 3, 4, 5] and len(few) == 1 and same(few[0], played[0][0])
        env.reset()  # goes on as ever
        env.step(env.rand_action())
        env.close()
    assert [one.number for one in played[0]] == states
    for others in played[1:]:
        assert all(same(one, other) for one, other in zip(played[0], others, strict=True))


def test_the_seed_changes_the_disturbances_and_not_the_start():
    env = make(0)
    one, other = (env.demonstrate([3], 2, Disturbance(wander=9), seed=seed)[0] for seed in (0, 1))
    assert np.array_equal(one.observations["proprio"][0], other.observations["proprio"][0]) and not same(one, other)


def test_without_an_expert_it_is_refused():
    env = VectorEnv(Drifter, 2, name="drift")
    for ask in (env.expert_action, partial(env.demonstrate, [1])):
        with pytest.raises(UserError, match="drift has no expert"):
            ask()


@pytest.mark.slow
def test_a_simulator_that_breaks_ends_it():
    env = make(2, wrong="exit")
    with pytest.raises(SimulatorFailed, match="ended during demonstrate"):
        env.demonstrate([1, 2, 3], 2, UNDISTURBED)
    with pytest.raises(SimulatorFailed, match="the environment is closed"):
        env.reset()


def test_what_rows_were_doing_is_lost_and_not_saved():
    """The first simulator has played the demonstration: with what the rows showed last it makes no state."""
    env = make(0, rows=2)
    env.reset()
    assert "simulators" in env.state_dict()
    env.demonstrate([1])
    assert "simulators" not in env.state_dict()
    assert (env.reset()["observation", "rgb"] == 0).all()  # the clock's start
