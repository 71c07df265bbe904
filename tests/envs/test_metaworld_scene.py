"""envs/metaworld_scene.py, against Meta-World's own benchmark; tests on all tasks are in test_metaworld.py."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.types import Task

from envs.metaworld_scene import Scene


@pytest.fixture(scope="module")
def scene(request) -> Scene:
    return Scene(request.param, fast_render=True, largest=96)


some = pytest.mark.parametrize("scene", ["push-v3", "window-close-v3", "coffee-pull-v3", "box-close-v3"], indirect=True)


@some
def test_a_seed_is_a_task_as_meta_worlds_benchmark_makes_them(scene):
    """There a task is a vector, which `set_task` gives to an environment before it is reset."""
    ours = scene.start(3)
    task_class = ALL_V3_ENVIRONMENTS[scene.task]
    content = {"rand_vec": ours._last_rand_vec, "env_cls": task_class, "partially_observable": False}
    theirs = task_class()
    theirs.set_task(Task(scene.task, pickle.dumps(content)))
    theirs.reset()
    assert np.array_equal(ours.data.qpos, theirs.data.qpos) and np.array_equal(ours.data.qvel, theirs.data.qvel)
    assert np.array_equal(ours._target_pos, theirs._target_pos)
    # One step later their observation, too, is of where things are.
    action = np.array([0.3, -0.2, 0.1, 0.5], np.float32)
    (seen, reward, *_), (seen_there, reward_there, *_) = ours.step(action), theirs.step(action)
    assert np.allclose(seen[:18], seen_there[:18], atol=1e-9) and reward == pytest.approx(reward_there, abs=1e-9)


@some
def test_a_first_observation_is_of_where_things_are(scene):
    """Meta-World's own is, in some tasks, of where they were before they were put in place."""
    env = scene.start(0)
    first = env._get_obs()
    assert np.array_equal(first[:18], first[18:36]) and np.array_equal(first[36:], env._target_pos)
    second = env.step(np.zeros(4, np.float32))[0]
    assert np.abs(second[4:7] - first[4:7]).max() < 0.01


@pytest.mark.parametrize("scene", ["sweep-v3", "pick-out-of-hole-v3", "assembly-v3"], indirect=True)
def test_a_mark_stays_at_the_goal_when_steps_are_computed(scene):
    """In these tasks the model has it elsewhere, or Meta-World names another place."""
    env = scene.start(2)
    name = env._target_site_config[0][0]
    for _ in range(3):
        env.step(np.zeros(4, np.float32))
        scene.place_goal_marks(env)
        assert np.array_equal(env.data.site(name).xpos, env._target_pos)
