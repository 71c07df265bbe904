"""envs/gym_vector.py: the same data as single environments, tensors, and which vector environments are refused."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from envs import make_env
from envs.failures import warn_once
from research.errors import SimulatorFailed, UserError
from research.schema import check_observation, decode_text

TWO = "user_package:UserTwoCameras-v0"
SHORT = {"max_episode_steps": 3}
REACH = "user_package.reach_env:ReachEnv"
KEYS = {
    TWO: {"proprio": "state", "rgb_front": "front", "rgb_wrist": "wrist.rgb", "depth_wrist": "wrist.depth"},
    REACH: {"proprio": ["state", "clock"], "rgb": "images.front", "depth": "depth"},
}


@pytest.fixture
def make():
    envs = []

    def build(prefix="gym_vec", env_id=TWO, num_envs=6, seed=0, **config):
        envs.append(make_env(f"{prefix}:{env_id}", num_envs, {"keys": KEYS.get(env_id), **config}, seed=seed))
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def play(env, steps: int = 40) -> TensorDict:
    generator, seen = torch.Generator().manual_seed(0), []
    step = env.reset()
    for _ in range(steps):
        step["action"] = torch.rand(env.action_spec.shape, generator=generator) * 3 - 1.5
        following, step = env.step_and_maybe_reset(step)
        seen.append(following)
    return torch.stack(seen, dim=1)


def assert_equal(one: TensorDict, other: TensorDict) -> None:
    assert set(one.keys(True, True)) == set(other.keys(True, True))
    for key in one.keys(True, True):
        assert one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]), key


@pytest.mark.parametrize(
    ("env_id", "config"),
    [
        (TWO, {"instruction_key": "instruction"}),
        (TWO, {"instruction": "go", "success_return": -6.0, "max_episode_steps": 5}),
        (TWO, {"env_kwargs": {"tensors": True}}),
        (REACH, {"instruction_key": "instruction", "max_episode_steps": 12}),
        (REACH, {"keys": {**KEYS[REACH], "language": "task"}, "max_episode_steps": 12}),
        ("Pendulum-v1", {"max_episode_steps": 7}),
        ("InvertedPendulum-v5", {}),
    ],
)
def test_the_same_data_as_single_environments(make, env_id, config):
    """Same seed, same actions: equal bit for bit, episodes' ends and partial resets included."""
    single = {key: value for key, value in config.items() if key != "env_kwargs"}
    ours, theirs = play(make("gym_vec", env_id, **config)), play(make("gym", env_id, **single))
    assert theirs["next", "done"].any() and not theirs["next", "done"].all(0).all()
    assert_equal(ours, theirs)


def test_a_natively_batched_environment_is_taken_as_it_is(make):
    env = make(instruction_key="instruction")
    assert type(env.vector).__name__ == "TwoCamerasVectorEnv"
    check_env_specs(env)
    td = env.rollout(5, break_when_any_done=False)
    check_observation(td[:, 0]["observation"], "gym_vec")
    assert env.has_success and not env.resumes_exactly
    # What was observed stays as it was, though the environment writes all its pictures into one buffer.
    assert td["observation", "rgb_front"][0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert set(decode_text(td["observation", "language"][:, 0])) == {"go left", "go right"}
    assert env.render_frames(8).unique().tolist() == [5]  # the first camera


def test_tensors_stay_tensors(make, monkeypatch):
    """An environment on a GPU is never asked for NumPy arrays, which would fail there."""
    env = make(env_kwargs={"tensors": True})

    def refuse(*args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    monkeypatch.setattr(torch.Tensor, "__array__", refuse)
    play(env)


def test_films(make):
    frames = make(num_envs=2, env_kwargs={"render_mode": "rgb_array"}).render_frames(16)
    assert frames[0].unique().tolist() == [50] and frames[1].unique().tolist() == [60]


def test_state_dict_continues_the_stream(make):
    env, other = make(seed=3), make(seed=4)
    env.reset()
    other.load_state_dict(env.state_dict())
    assert torch.equal(other.reset()["initial_state"], env.reset()["initial_state"])


@pytest.mark.parametrize(
    ("env_id", "config", "message"),
    [
        ("user_package.habits:TupleActions", {}, r"TupleActions takes actions from Tuple"),
        ("NoSuchEnv-v3", {}, "'gym_vec:NoSuchEnv-v3' is not registered .* named 'gym_vec:module:EnvId-v0'"),
        (TWO, {"env_kwargs": {"wrong": "autoreset"}}, "resets its rows by itself .autoreset mode NextStep."),
        (TWO, {"env_kwargs": {"wrong": "resets"}, **SHORT}, "resets its rows by itself, though its metadata .*mask"),
        (TWO, {"env_kwargs": {"wrong": "resets"}, "success_return": -6.0, **SHORT}, "resets its rows by itself, thou"),
        (TWO, {"env_kwargs": {"wrong": "one_seed"}}, "cannot start every row from a seed of its own: .* steps single"),
        (TWO, {"env_kwargs": {"wrong": "reseeds"}}, "does not start a row from its own seed alone: 'proprio' differs"),
        (TWO, {"env_kwargs": {"wrong": "no_mask"}}, "cannot reset some rows .* 'proprio' changed in rows that"),
        (TWO, {"env_kwargs": {"wrong": "mask_raises"}}, "cannot reset some rows .* raised TypeError: no options here"),
        (TWO, {"env_kwargs": {"wrong": "broken"}}, r"UserTwoCameras-v0: reset\(seed=0\) raised ValueError: no such"),
        (TWO, {"keys": {}}, "nothing of gym_vec:.* is observed"),
        (TWO, {"keys": {"rgb": "fornt"}}, "keys.rgb: .* no observation 'fornt'; it has .*wrist.rgb"),
        (TWO, {"workers": 2}, "has no option 'workers'; there are keys, instruction"),
        (TWO, {"render": [8, 8]}, "has no option 'render'"),
        (TWO, {"instruction_key": "goal"}, r"no text for row 0 under info\['goal'\]; info has instruction"),
        (TWO, {"instruction": "é" * 40}, "80 bytes, more than the 64"),
        (REACH, {"env_kwargs": {"render_mode": "rgb_array", "fail_in": "render"}}, r"render\(\) raised ValueError"),
        (TWO, {"env_kwargs": {"gravity": 1}}, "unexpected keyword argument 'gravity'"),
    ],
)
def test_bad_input(make, env_id, config, message):
    with pytest.raises(UserError, match=message) as caught:
        make(env_id=env_id, **config).reset()
    assert "\n" not in str(caught.value)


def test_a_row_that_goes_on_after_it_was_terminated_is_named(make, caplog):
    """It may have moved out of the state that had ended its episode."""
    warn_once.cache_clear()
    make().reset()
    assert "went on" not in caplog.text
    make(env_kwargs={"wrong": "goes_on"}).reset()
    assert "a row that was terminated went on at the next step; if it had been reset by then" in caplog.text


def test_one_row_is_tried_out_too(make):
    make(num_envs=1).reset()
    with pytest.raises(UserError, match="cannot start every row from a seed of its own"):
        make(num_envs=1, env_kwargs={"wrong": "one_seed"})


def test_errors_while_stepping(make):
    env = make(env_kwargs={"wrong": "shape"})
    with pytest.raises(SimulatorFailed, match=r"observation for 'proprio' is .* \[6, 3\], but its space says \[6, 5\]"):
        play(env)
    env = make(env_id=REACH, max_episode_steps=12, env_kwargs={"fail_in": "step"})
    with pytest.raises(SimulatorFailed, match=r"step\(\) raised ValueError: the simulator lost its mind"):
        play(env)
    with pytest.raises(UserError, match=r"ended without info\['solved'\]; info has success"):
        make(success_key="solved", max_episode_steps=3)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("habit", ["Global", "Remembering"])
def test_ids_that_do_not_decide_the_state_are_refused(make, habit, num_envs):
    with pytest.raises(
        UserError, match=r"same initial-state id from another state.*'proprio' differs.*ids_reproducible"
    ):
        make(env_id=f"user_package.habits:{habit}", num_envs=num_envs)
    assert make(env_id=f"user_package.habits:{habit}", num_envs=num_envs, ids_reproducible=False).distinct_states
    with pytest.raises(UserError, match=r"env_config\.ids_reproducible: expected true or false, got 'no'"):
        make(env_id=f"user_package.habits:{habit}", ids_reproducible="no")


def test_a_reward_that_depends_on_what_was_before_is_refused(make):
    with pytest.raises(
        UserError, match=r"same action .* a reward of [\d.]+ and, the second time.*algorithm\.cfg\.normalize_reward"
    ):
        make(env_id="user_package.habits:make_scaled")
    make(env_id="user_package.habits:make_scaled", ids_reproducible=False).reset()  # one that knows


@pytest.mark.parametrize("num_envs", [1, 3])
def test_one_state_for_all_ids_is_named(make, num_envs, caplog):
    warn_once.cache_clear()
    assert not make(env_id="user_package.habits:Single", num_envs=num_envs).distinct_states
    assert "an evaluation is of one state" in caplog.text
    assert make(env_id="user_package.habits:Honest", num_envs=num_envs).distinct_states
