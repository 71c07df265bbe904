"""envs/gym.py on MuJoCo environments: pictures without a display, and gymnasium-robotics' Fetch."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from envs_worlds import play
from tensordict import TensorDict

from envs.gym import GymnasiumSimulator, make_gym_env
from research.errors import UserError

FETCH = "gymnasium_robotics:FetchReach-v4"
needs_robotics = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium_robotics") is None, reason="gymnasium-robotics is not installed"
)


@pytest.fixture
def make(monkeypatch):
    """`make_gym_env` on the CPU, closed at the end of the test; nobody has set MUJOCO_GL, and there is no display."""
    envs = []
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")

    def build(env_id, /, num_envs=2, **config):
        envs.append(make_gym_env(env_id, num_envs, "cpu", 0, **config))
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def reset_to(env, ids):
    return env.reset(TensorDict({"initial_state": torch.tensor(ids)[:, None]}, env.batch_size))


def test_what_draws_mujoco_is_chosen_where_pictures_are_asked_for(make):
    make("InvertedPendulum-v5")
    assert not os.environ["MUJOCO_GL"]
    env = make("InvertedPendulum-v5", keys={}, render=[32, 32], env_kwargs={"width": 32, "height": 32})
    assert os.environ["MUJOCO_GL"]
    picture = reset_to(env, [3, 3])["observation", "rgb"]
    assert torch.equal(picture[0], picture[1]) and picture.float().std() > 10


def test_a_worker_whose_server_is_older_than_the_choice_draws_with_it(make, monkeypatch):
    env = make("InvertedPendulum-v5", keys={}, render=[32, 32])
    chosen, recipe = os.environ["MUJOCO_GL"], env._groups[0].simulators[0].recipe
    monkeypatch.delenv("MUJOCO_GL")
    GymnasiumSimulator(recipe).close()
    assert os.environ["MUJOCO_GL"] == chosen


@pytest.mark.parametrize(
    ("option", "config"),
    [
        ("render", {"keys": {}, "render": [32, 32]}),
        ("env_kwargs.render_mode", {"env_kwargs": {"render_mode": "rgb_array"}}),
    ],
)
def test_a_mujoco_gl_of_the_users_that_cannot_draw_is_one_line(make, monkeypatch, option, config):
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    with pytest.raises(UserError, match=rf"^trainer\.env_config\.{option}: MuJoCo cannot draw .*unset MUJOCO_GL.*$"):
        make("InvertedPendulum-v5", **config)


@needs_robotics
def test_fetch_has_goals_ids_pictures_success_and_exact_saves(make):
    options = {
        "keys": {"proprio": ["observation", "desired_goal"]},
        "render": [48, 48],
        "env_kwargs": {"width": 48, "height": 48},
    }
    env, other = make(FETCH, **options), make(FETCH, **options)
    assert env.has_success and env.distinct_states and env.resumes_exactly and env.films
    step = reset_to(env, [3, 3])
    seen = step["observation"]
    assert seen["proprio"].shape == (2, 13) and torch.equal(seen["proprio"][0], seen["proprio"][1])
    assert torch.equal(seen["rgb"][0], seen["rgb"][1]) and seen["rgb"].float().std() > 10
    step, successes = reset_to(env, [4, 5]), []
    assert not torch.equal(step["observation", "proprio"][0, 10:], step["observation", "proprio"][1, 10:])
    for _ in range(20):
        hand, goal = step["observation", "proprio"][:, :3], step["observation", "proprio"][:, 10:]
        action = torch.cat([10 * (goal - hand), torch.zeros(2, 1)], dim=1).clamp(-1, 1)
        step = env.step(TensorDict({"action": action}, [2]))["next"]
        successes.append(step["success"].all().item())
    assert successes[-1] and not successes[0]
    other.load_state_dict(env.state_dict())
    assert (play(env, 10) == play(other, 10)).all()
