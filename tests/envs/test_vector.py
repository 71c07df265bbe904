"""envs/vector.py with a simulator of our own: workers, saving, errors, and what no simulator needs to know of."""

from __future__ import annotations

import io
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from envs.simulator import HELD_OUT_STATES, Layout
from envs.vector import VectorEnv
from research.schema import UserError, check_observation


class Drifter:
    """A point that drifts at random and is pushed by the action; success beyond 1, the end after `limit` steps.

    Args:
        saves: whether it can be saved.
        wrong: "make", "reset" or "step" raises there what a user can mend; "exit" ends the process in step.
    """

    layout = Layout(
        observation={
            "rgb": ((4, 6, 3), np.dtype(np.uint8)),
            "depth_wrist": ((4, 6), np.dtype(np.float32)),
            "proprio": ((3,), np.dtype(np.float32)),
            "language": ((5,), np.dtype(np.int64)),
        },
        action_dim=2,
        bounded=True,
        has_success=True,
        films=True,
    )

    def __init__(self, saves: bool = True, limit: int = 7, wrong: str | None = None):
        self.saves, self.limit, self.wrong = saves, limit, wrong
        self._fail("make")
        self.rng, self.clock, self.point, self.closed = np.random.default_rng(0), 0, np.zeros(2), False

    def _fail(self, where: str) -> None:
        if self.wrong == where:
            raise UserError(f"no {where} today")

    def reset(self, state: int) -> dict[str, np.ndarray]:
        self._fail("reset")
        self.rng, self.clock = np.random.default_rng(state), 0
        self.point = self.rng.uniform(-0.5, 0.5, 2)
        return self._observe()

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        self._fail("step")
        if self.wrong == "exit":
            raise SystemExit(3)
        assert action.shape == (2,) and action.dtype == np.float32
        self.clock += 1
        self.point = self.point + 0.2 * action + self.rng.normal(0, 0.1, 2)
        success = bool(np.abs(self.point).max() > 1)
        return {
            "reward": np.array([self.point.sum()], np.float32),
            "terminated": np.array([success]),
            "truncated": np.array([self.clock >= self.limit]),
            "success": np.array([success]),
            **self._observe(),
        }

    def frame(self) -> np.ndarray:
        return np.full((6, 6, 3), 100 + self.clock, np.uint8)

    def save(self) -> bytes | None:
        return pickle.dumps((self.rng, self.clock, self.point)) if self.saves else None

    def load(self, state: bytes) -> None:
        self.rng, self.clock, self.point = pickle.loads(state)

    def close(self) -> None:
        self.closed = True

    def _observe(self) -> dict[str, np.ndarray]:
        return {
            "rgb": np.full((4, 6, 3), self.clock, np.uint8),
            "depth_wrist": np.full((4, 6), self.point[0], np.float32),
            "proprio": np.array([*self.point, self.clock], np.float32),
            "language": np.array([103, 111, 0, 0, 0], np.int64),
        }


@pytest.fixture
def make():
    """A `VectorEnv` of drifters, closed at the end of the test."""
    envs = []

    def build(num_envs=5, workers=1, seed=0, held_out=HELD_OUT_STATES, **options):
        envs.append(VectorEnv(partial(Drifter, **options), num_envs, workers, seed, name="drift", held_out=held_out))
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def play(env: VectorEnv, steps: int = 30, seed: int = 1) -> TensorDict:
    """Go on from where the environment is, with actions of a seed: `[steps, N]` of all that it reports."""
    generator, seen = torch.Generator().manual_seed(seed), []
    step = TensorDict({}, env.batch_size)
    for _ in range(steps):
        step["action"] = torch.rand(*env.batch_size, 2, generator=generator) * 2 - 1
        following, step = env.step_and_maybe_reset(step)
        seen.append(following["next"].clone())
    return torch.stack(seen)


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
    for workers in (1, 2, 5):
        env = make(workers=workers, seed=3)
        env.reset()
        data.append(play(env))
        assert len(env._groups) == workers
    assert data[0]["terminated"].any() and data[0]["truncated"].any()
    assert (data[0] == data[1]).all() and (data[0] == data[2]).all()


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2)])
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


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("wrong", ["make", "reset", "step"])
def test_what_a_user_can_mend_reaches_the_main_process(make, workers, wrong):
    with pytest.raises(UserError, match=f"^no {wrong} today$"):
        env = make(workers=workers, wrong=wrong)
        env.reset()
        play(env, 1)


def test_a_worker_that_dies_is_named(make):
    env = make(workers=2, wrong="exit")
    env.reset()
    with pytest.raises(UserError, match=r"^drift: a worker process ended \(exit code 3\)"):
        play(env, 1)


def test_close_reaches_the_simulators(make):
    env = make()
    drifters = env._groups[0].simulators
    env.close()
    assert all(one.closed for one in drifters)
    env.close()
