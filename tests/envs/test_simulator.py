"""envs/simulator.py: that every environment of this project keeps to the contract written there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from envs import make_env
from envs.simulator import HELD_OUT_STATES, Environment
from research.errors import UserError
from research.schema import check_observation

CAMERAS = {"proprio": "state", "rgb_front": "front", "rgb_wrist": "wrist.rgb", "depth_wrist": "wrist.depth"}
N = 4


FETCH = {"keys": {"proprio": ["observation", "desired_goal"]}, "render": [32, 32]}
SMALL = {"max_episode_steps": 20, "image_size": 32}


@pytest.fixture(
    params=[
        ("tabletop", {"task": "reach"}, None),
        ("gym:user_package:UserTwoCameras-v0", {"keys": CAMERAS, "workers": 2}, None),
        ("gym_vec:user_package:UserTwoCameras-v0", {"keys": CAMERAS}, None),
        ("gym:gymnasium_robotics:FetchReach-v4", FETCH, "gymnasium_robotics"),
        ("metaworld", SMALL, "metaworld"),
        pytest.param(("maniskill", SMALL, "mani_skill"), marks=pytest.mark.slow),
    ],
    ids=lambda param: param[0],
)
def env(request, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    name, options, package = request.param
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    try:
        made = make_env(name, N, options, seed=1)
    except UserError as error:
        if "needs Vulkan" in str(error):
            pytest.skip(str(error))
        raise
    yield made
    made.close()


def test_attributes(env):
    assert isinstance(env, Environment)
    assert env.batch_size == (N,) and env.held_out == HELD_OUT_STATES and isinstance(env.resumes_exactly, bool)
    assert env.batch_locked


def test_reset_takes_and_reports_ids(env):
    ids = torch.tensor([[3], [5], [3], [9]])
    step = env.reset(TensorDict({"initial_state": ids}, [N]))
    check_observation(step["observation"], "env")
    assert torch.equal(step["initial_state"], ids)
    for key, value in step["observation"].items():
        assert torch.equal(value[0], value[2]), key
    drawn = torch.stack([env.reset()["initial_state"] for _ in range(20)])
    assert drawn.dtype == torch.int64 and (drawn >= env.held_out).all() and drawn.unique().numel() == drawn.numel()


def test_a_masked_reset_leaves_the_other_rows(env):
    env.reset()
    step = env.step(TensorDict({"action": env.action_spec.zero()}, [N]))["next"].exclude("reward")
    mask, ids = torch.tensor([[True], [False], [False], [True]]), torch.full((N, 1), 7)
    after = env.reset(step.clone().update({"_reset": mask, "initial_state": ids}))
    now = env.step(TensorDict({"action": env.action_spec.zero()}, [N]))["next", "initial_state"]
    assert now.ravel()[[0, 3]].tolist() == [7, 7] and torch.equal(now[1:3], step["initial_state"][1:3])
    expected = env.reset(TensorDict({"initial_state": ids}, [N]))["observation"]
    for key, value in after["observation"].items():
        assert torch.equal(value[1:3], step["observation", key][1:3]), key
        assert torch.equal(value[::3], expected[key][::3]), key


def test_ends_are_kept_apart(env):
    td = env.rollout(60, break_when_any_done=False)
    after = td["next"]
    assert torch.equal(after["done"], after["terminated"] | after["truncated"])
    assert after["truncated"].any() and after["reward"].dtype == torch.float32
    for key in ("done", "terminated", "truncated", "success"):
        assert after[key].shape == (N, 60, 1) and after[key].dtype == torch.bool, key
    # Every row that ended was given another state, and no other row was.
    changed = td["initial_state"][:, 1:] != td["initial_state"][:, :-1]
    assert torch.equal(changed, after["done"][:, :-1])


def test_video(env):
    env.reset()
    frames = env.render_frames(32)
    assert frames.shape == (N, 32, 32, 3) and frames.dtype == torch.uint8
