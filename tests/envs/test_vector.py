"""envs/vector.py with a simulator of our own: workers, saving, errors, and what no simulator needs to know of."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from envs_worlds import Drifter, play
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from envs.simulator import HELD_OUT_STATES
from envs.vector import VectorEnv
from research.errors import SimulatorFailed, UserError
from research.schema import check_observation


@pytest.fixture
def make():
    """A `VectorEnv` of drifters, closed at the end of the test."""
    envs = []

    def build(num_envs=5, workers=0, seed=0, held_out=HELD_OUT_STATES, worker_timeout=60.0, **options):
        drifter = partial(Drifter, **options)
        envs.append(
            VectorEnv(drifter, num_envs, workers, seed, "cpu", "drift", held_out, worker_timeout=worker_timeout)
        )
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def reset_to(env: VectorEnv, ids) -> TensorDict:
    return env.reset(TensorDict({"initial_state": torch.tensor(ids)[:, None]}, env.batch_size))


def test_any_simulator_becomes_an_environment(make):
    env = make(workers=2)
    check_env_specs(env)
    td = env.rollout(6, break_when_any_done=False)
    check_observation(td[:, 0]["observation"], "drift")
    assert td["observation", "rgb"].shape == (5, 6, 4, 6, 3) and td["observation", "depth_wrist"].shape == (5, 6, 4, 6)
    assert env.render_frames(6).shape == (5, 6, 6, 3) and env.render_frames(6).min() >= 100


def test_workers_do_not_change_the_data(make):
    """Five rows in one process, in two and in as many as there are rows; ends of episodes included."""
    data = []
    for workers in (0, 1, 2, 5):
        env = make(workers=workers, seed=3)
        env.reset()
        data.append(play(env))
        assert len(env._groups) == max(1, workers)
    assert data[0]["terminated"].any() and data[0]["truncated"].any()
    assert (data[0] == data[1]).all() and (data[0] == data[2]).all()


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (0, 2)])
def test_state_dict_brings_back_the_very_step(make, before, after):
    """Through a checkpoint file, in the middle of episodes, on another number of processes, over an env in use."""
    env = make(workers=before, seed=3)
    assert env.resumes_exactly
    env.reset()
    play(env, 10, seed=2)
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    expected = play(env)
    other = make(workers=after, seed=99)
    other.reset()
    play(other, 4, seed=5)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    found = play(other)
    assert found["terminated"].any() and found["truncated"].any()
    assert (found == expected).all()


def test_state_dict_is_a_copy(make):
    env = make()
    env.reset()
    saved = env.state_dict()
    expected = play(env)
    env.load_state_dict(saved)
    assert (play(env) == expected).all()
    env.load_state_dict(saved)
    assert (play(env) == expected).all()


def test_a_partial_reset_after_loading_leaves_the_other_rows(make):
    env, other = make(seed=3), make(seed=4)
    env.reset()
    play(env, 4)
    other.load_state_dict(env.state_dict())
    mask = torch.tensor([True, False, False, True, False])[:, None]
    ids = torch.full((5, 1), 77)
    for one in (env, other):
        one.reset(TensorDict({"_reset": mask, "initial_state": ids}, [5]))
    expected, found = play(env, 1), play(other, 1)
    assert (found == expected).all()
    assert (found["initial_state"].ravel() == 77).tolist() == [True, False, False, True, False]


def test_a_simulator_that_cannot_be_saved_continues_the_stream_of_states_alone(make):
    env, other = make(saves=False, seed=3), make(saves=False, seed=4)
    assert not env.resumes_exactly
    env.reset()
    play(env, 5)
    saved = env.state_dict()
    assert set(saved) == {"seed", "episodes"}
    other.load_state_dict(saved)
    for _ in range(3):
        assert torch.equal(other.reset()["initial_state"], env.reset()["initial_state"])


def test_one_simulator_that_cannot_be_saved_is_enough(make):
    made = iter([True, True, False])
    env = VectorEnv(lambda: Drifter(saves=next(made)), 3)
    env.reset()
    assert not env.resumes_exactly and "simulators" not in env.state_dict()
    env.close()


def test_state_dict_before_the_first_episode(make):
    env, other = make(seed=3), make(seed=4)
    other.load_state_dict(env.state_dict())
    assert torch.equal(other.reset()["initial_state"], env.reset()["initial_state"])


def test_held_out_ids_are_the_environments_own(make):
    env = make(held_out=2**31 - 50)
    assert env.held_out == 2**31 - 50
    ids = torch.cat([env.reset()["initial_state"] for _ in range(10)])
    assert ids.min() >= 2**31 - 50 and ids.max() < 2**31 and ids.unique().numel() > 20


def test_ids_are_the_same_state_in_every_row(make):
    start = reset_to(make(workers=2), [5, 6, 5, 6, 5])["observation", "proprio"]
    assert torch.equal(start[0], start[2]) and torch.equal(start[1], start[3]) and not torch.equal(start[0], start[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_refused_at_construction_reaches_the_main_process(make, workers):
    with pytest.raises(UserError, match="^no make today$"):
        make(workers=workers, wrong="make")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [("reset", "no reset today"), ("step", "no step today"), ("quit", r"drift: step raised SystemExit: 3 \(envs_wo")],
)
def test_what_goes_wrong_later_is_a_failure_of_the_simulator(make, workers, wrong, message):
    env = make(workers=workers, wrong=wrong)
    with pytest.raises(SimulatorFailed, match=f"^{message}"):
        env.reset()
        play(env, 1)
    with pytest.raises(SimulatorFailed, match="the environment is closed"):  # and not the replies that were not read
        env.reset()


def test_close_reaches_the_simulators(make):
    env = make()
    drifters = env._groups[0].simulators
    env.close()
    assert all(one.closed for one in drifters)
    env.close()
