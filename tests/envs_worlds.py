"""A simulator of our own with every kind of trouble, and how tests play with environments."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from envs import maniskill_worlds
from envs.simulator import Layout
from envs.vector import VectorEnv
from research.errors import UserError


class Drifter:
    """A point that drifts at random and is pushed by the action; success beyond 1, the end after `limit` steps.

    Args:
        saves: whether it can be saved.
        wrong: "make", "reset" or "step" raises there; in step "exit" and "segfault" end the process, "stop" stops it,
            "hang" does not return and "quit" asks Python to end; "exit early" ends it in the constructor, "hang in
            close" does not return from there.
        ballast: bytes that its saved state is longer.
        ends: whether success ends the episode.
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

    def __init__(
        self, saves: bool = True, limit: int = 7, wrong: str | None = None, ballast: int = 0, ends: bool = True
    ):
        self.ends = ends
        self.saves, self.limit, self.wrong, self.ballast = saves, limit, wrong, ballast
        if wrong == "exit early":
            os._exit(5)
        self._fail("make")
        self.rng, self.clock, self.point, self.closed = np.random.default_rng(0), 0, np.zeros(2), False

    def _fail(self, where: str) -> None:
        if self.wrong == where:
            raise UserError(f"no {where} today")

    def reset(self, state: int) -> None:
        self._fail("reset")
        assert type(state) is int
        self.rng, self.clock = np.random.default_rng(state), 0
        self.point = self.rng.uniform(-0.5, 0.5, 2)

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        self._fail("step")
        trouble = {
            "hang": lambda: time.sleep(3600),
            "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
            "quit": lambda: sys.exit(3),
            "exit": lambda: os._exit(3),
            "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        }
        trouble.get(self.wrong, lambda: None)()
        assert action.shape == (2,) and action.dtype == np.float32
        self.clock += 1
        self.point = self.point + 0.2 * action + self.rng.normal(0, 0.1, 2)
        success = bool(np.abs(self.point).max() > 1)
        return {
            "reward": np.array([self.point.sum()], np.float32),
            "terminated": np.array([success and self.ends]),
            "truncated": np.array([self.clock >= self.limit]),
            "success": np.array([success]),
        }

    def observe(self) -> dict[str, np.ndarray]:
        return {
            "rgb": np.full((4, 6, 3), self.clock, np.uint8),
            "depth_wrist": np.full((4, 6), self.point[0], np.float32),
            "proprio": np.array([*self.point, self.clock], np.float32),
            "language": np.array([103, 111, 0, 0, 0], np.int64),
        }

    def frame(self) -> np.ndarray:
        return np.full((6, 6, 3), 100 + self.clock, np.uint8)

    def save(self) -> bytes | None:
        return pickle.dumps((self.rng, self.clock, self.point, bytes(self.ballast))) if self.saves else None

    def load(self, state: bytes) -> None:
        self.rng, self.clock, self.point, _ = pickle.loads(state)

    def close(self) -> None:
        if self.wrong == "hang in close":
            time.sleep(3600)
        self.closed = True


class Guided(Drifter):
    """A drifter with an expert, who wants out along the first axis; it keeps what it was told to do."""

    layout = Drifter.layout._replace(task_names=("out", "away"), has_expert=True)

    def reset(self, state: int) -> None:
        super().reset(state)
        self.told = []

    def expert_action(self) -> np.ndarray:
        return np.array([0.25, 1.0 if self.clock % 2 else -1.0], np.float32)

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        self.told.append(action.copy())
        return super().step(action)


def play(env: VectorEnv, steps: int = 30, seed: int = 1) -> TensorDict:
    """Go on from where the environment is, with actions of a seed: `[steps, N]` of all that it reports."""
    generator, seen = torch.Generator().manual_seed(seed), []
    step = TensorDict({}, env.batch_size)
    for _ in range(steps):
        step["action"] = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
        following, step = env.step_and_maybe_reset(step)
        seen.append(following["next"].clone())
    return torch.stack(seen)


def skip_without_maniskill() -> None:
    """Skip the test that asks, and say why, where ManiSkill or a Vulkan that it can use is not installed."""
    pytest.importorskip("mani_skill", reason="mani_skill is not installed")
    try:
        maniskill_worlds._check_vulkan("cpu")
    except UserError as error:
        pytest.skip(str(error))
