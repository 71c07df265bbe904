"""envs/gym_state.py: what is saved of an environment brings it back bit for bit, or it is said that it cannot."""

from __future__ import annotations

import io
import json
import re

import gymnasium
import numpy as np
import ppo_vla
import pytest
import torch
from envs_worlds import play
from tensordict import TensorDict
from worlds import rows_without_times, run_folder, write_config

from envs.failures import warn_once
from envs.gym import make_gym_env
from envs.gym_state import from_bytes, read_state, to_bytes, write_state
from research.runs.checkpoint import load_checkpoint

STATEFUL = "user_package.habits:Stateful"


@pytest.fixture
def make():
    envs = []

    def build(env_id, num_envs=3, seed=0, **config):
        envs.append(make_gym_env(env_id, num_envs, "cpu", seed, **config))
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("env_id", "config"),
    [
        ("InvertedPendulum-v5", {"success_return": 4.0}),
        ("Hopper-v5", {"max_episode_steps": 25}),
        ("HalfCheetah-v5", {"max_episode_steps": 25}),
        ("Pusher-v5", {"max_episode_steps": 25}),
        ("Pendulum-v1", {"max_episode_steps": 17}),
        ("CartPole-v1", {"instruction": "up"}),
        ("MountainCarContinuous-v0", {"max_episode_steps": 20}),
        (STATEFUL, {}),
    ],
)
@pytest.mark.parametrize("begun", [True, False])
def test_an_environment_goes_on_where_it_was_saved(make, env_id, config, begun):
    """In the middle of episodes, in a freshly made one too; the ends of episodes and what comes after them included."""
    env, other = make(env_id, seed=3, **config), make(env_id, seed=9, **config)
    assert env.resumes_exactly
    env.reset()
    play(env, 9, seed=2)
    saved = through_a_file(env.state_dict())
    expected = play(env, 40)
    if begun:  # over one that is in use
        other.reset()
        play(other, 4, seed=5)
    other.load_state_dict(saved)
    found = play(other, 40)
    assert found["done"].any() and (found == expected).all()
    env.load_state_dict(saved)  # and in the one that was saved
    assert (play(env, 40) == expected).all()


@pytest.mark.slow
def test_it_does_in_worker_processes_too(make):
    env, other = make("Hopper-v5", workers=2, max_episode_steps=25), make("Hopper-v5", seed=8, max_episode_steps=25)
    env.reset()
    play(env, 9, seed=2)
    other.load_state_dict(through_a_file(env.state_dict()))
    assert (play(other, 40) == play(env, 40)).all()


@pytest.mark.parametrize("length", [5, 11, 14])  # 11 steps later what is hidden may be as it was
@pytest.mark.parametrize("hidden", ["closure", "iterator", "window"])
def test_where_that_is_not_enough_it_is_said(make, caplog, hidden, length):
    env = make(STATEFUL, env_kwargs={"hidden": hidden, "length": length})
    assert not env.resumes_exactly
    assert re.search("cannot be saved .('proprio' differs after|.*no attribute)", caplog.text)
    assert "starts its episodes anew" in caplog.text
    env.reset()
    assert set(env.state_dict()) == {"seed", "episodes"}


HELPED = "user_package.habits:Helped"


@pytest.mark.parametrize("helper", ["init", "reset", "list"])
def test_objects_of_an_environment_go_on_where_they_were(make, helper):
    """What they hold shows only after more steps than are tried; they refer to the environment and to each other."""
    env, other, still = (make(HELPED, env_kwargs={"helper": helper}) for _ in range(3))
    assert env.resumes_exactly
    env.reset()
    play(env, 20)
    saved = through_a_file(env.state_dict())
    expected = play(env, 25)
    assert expected["done"].any(0).all() and expected["done"].nonzero()[0, 0] == 9
    still.reset()
    for one in (other, still):  # a fresh one, and one that is in use
        one.load_state_dict(saved)
        assert (play(one, 25) == expected).all()
    world = other._groups[0].simulators[0].env.unwrapped
    assert world.clock.owner is world and world.names["same"] is world.clock
    assert world.clock.marks.maxlen == 3 and world.clock.marks[-1] == world.clock.count
    if helper == "list":
        assert world.others[1] is world.clock and world.others[0] is not world.clock


@pytest.mark.parametrize(
    ("helper", "named"), [("slots", r"clock \(Slotted\)"), ("world", r"clock\.world \((TimeLimit|OrderEnforcing)\)")]
)
def test_objects_that_cannot_be_saved_are_named(make, caplog, helper, named):
    warn_once.cache_clear()
    env = make(HELPED, env_kwargs={"helper": helper})
    assert not env.resumes_exactly
    assert re.search(rf"cannot be saved \(what these attributes hold is not seen: .*{named}.*anew", caplog.text)


def test_an_object_that_is_made_in_mid_episode_ends_exact_resuming_and_no_run(make, caplog):
    warn_once.cache_clear()
    env, other = (make(HELPED, env_kwargs={"helper": "late"}) for _ in range(2))
    assert env.resumes_exactly
    env.reset()
    play(env, 9)
    early = through_a_file(env.state_dict())
    play(env, 10)
    late = through_a_file(env.state_dict())
    assert not env.resumes_exactly and set(late) == {"seed", "episodes"}
    assert "cannot be saved (made in an episode: late (Clock)): a run that is resumed starts its" in caplog.text
    other.load_state_dict(early)
    play(other, 20)


def test_what_is_not_saved_of_an_environment_is_not_taken_away_from_it():
    """Attributes and entries that were objects when it was saved and are plain where it is loaded."""
    one, other = gymnasium.make("Pendulum-v1"), gymnasium.make("Pendulum-v1")
    one.unwrapped.viewer, one.unwrapped.facts = print, {"call": print, "n": 1}
    other.unwrapped.viewer, other.unwrapped.facts, other.unwrapped.since = None, {"call": None, "n": 2}, 3
    write_state(other, from_bytes(to_bytes(read_state(one))))
    assert other.unwrapped.viewer is None and other.unwrapped.facts == {"call": None, "n": 1}
    assert not hasattr(other.unwrapped, "since")  # this one was not there at all


def test_mujocos_state_is_all_of_it():
    one, other = (gymnasium.make("Hopper-v5") for _ in range(2))
    one.reset(seed=1)
    for _ in range(5):
        one.step(np.full(3, 0.3, np.float32))
    write_state(other, from_bytes(to_bytes(read_state(one))))
    ours, theirs = one.unwrapped.data, other.unwrapped.data
    for name in ("qpos", "qvel", "qacc_warmstart", "xpos", "cfrc_ext"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.time == theirs.time > 0 and other.env._has_reset
    assert one.get_wrapper_attr("_elapsed_steps") == other.get_wrapper_attr("_elapsed_steps") == 5
    draws = [env.unwrapped.np_random.random() for env in (one, other)]
    assert draws[0] == draws[1]


def test_values_come_back_as_they_were():
    shared = np.arange(3.0)
    generator = np.random.Generator(np.random.MT19937(4))
    tree = {
        "a": [1, -0.0, float("inf"), True, None, "é"], "b": (np.float32(0.1), shared), "c": {3: shared, "x": {}},
        "big": 2**127 + 1, "text": np.array(["ab", "c"]), "none": np.zeros((0, 2), np.int8), "g": [generator],
        "lambda": lambda: 0, "path": "/a/b", "mixed": {"kept": 1, "left out": object()},
    }  # fmt: skip
    found = from_bytes(to_bytes(tree))
    assert found["a"] == tree["a"] and type(found["a"][3]) is bool and str(found["a"][1]) == "-0.0"
    assert isinstance(found["b"], tuple) and found["b"][0] == np.float32(0.1) and found["b"][0].dtype == np.float32
    assert found["b"][1] is found["c"][3] and found["c"][3].tolist() == [0, 1, 2]  # one array with two names
    assert found["big"] == 2**127 + 1 and found["text"].tolist() == ["ab", "c"] and found["none"].shape == (0, 2)
    assert "lambda" not in found and "path" not in found and found["mixed"] == {"kept": 1}


def test_reading_runs_no_code():
    file = io.BytesIO()
    np.savez(file, np.frombuffer(json.dumps({"array": 0}).encode(), np.uint8), np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        from_bytes(file.getvalue())


def test_another_environment_is_not_written_into():
    one = gymnasium.make("Pendulum-v1")
    with pytest.raises(ValueError, match="wrappers"):
        write_state(gymnasium.wrappers.ClipAction(one), read_state(one))


def test_the_return_so_far_decides_success_after_resuming(make):
    env, other = (make("InvertedPendulum-v5", num_envs=1, success_return=3.0) for _ in range(2))
    env.reset()
    still = TensorDict({"action": torch.zeros(1, 1)}, [1])
    env.step(still.clone())
    env.step(still.clone())
    other.load_state_dict(env.state_dict())
    assert other.step(still.clone())["next", "success"].item()


@pytest.mark.slow
def test_a_run_on_mujoco_resumes_in_the_middle_of_its_episodes(tmp_path):
    """Bit for bit: metrics of training, episodes across the seam included, and weights."""
    model = {"model_class": "agents.small_vla.SmallVLA", "model_config": {"modalities": ["proprio"], "hidden_size": 16}}
    runs = []
    for name, iterations in (("whole", (5,)), ("halves", (3, 5))):
        (tmp_path / name).mkdir()
        config = write_config(
            tmp_path / name,
            trainer__env="gym:Hopper-v5", trainer__env_config={"max_episode_steps": 25, "workers": 2},
            trainer__num_envs=4, trainer__enable_eval=False, policy={"vla_config": model},
        )  # fmt: skip
        argv = ["--config", str(config)]
        for count in iterations:
            assert ppo_vla.main([*argv, f"--trainer.iterations={count}"]) == 0
            argv = [f"--trainer.resume={run_folder(tmp_path / name)}"]
        runs.append(run_folder(tmp_path / name))
    rows = [[row for row in rows_without_times(run) if "train/approx_kl" in row] for run in runs]
    assert rows[0] == rows[1] and len(rows[0]) == 5 and "rollout/episodes" in rows[0][-1]
    weights = [load_checkpoint(run)["model_state_dict"] for run in runs]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
