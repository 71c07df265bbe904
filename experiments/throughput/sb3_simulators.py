"""Stable-Baselines3's PPO on simulators in its own SubprocVecEnv, for `benchmark_simulators.py` (extra `bench`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import SubprocVecEnv
from torch import nn

from envs.chunks import execute
from envs.simulator import HELD_OUT_STATES, Simulator
from envs.vector import VectorEnv
from research.config import PPOConfig
from research.schema import ENV_STEPS
from throughput.sb3 import StableBaselines


class StableBaselinesOfSimulators(StableBaselines):
    """As `StableBaselines`, each simulator in a process of `SubprocVecEnv`.

    Args:
        env: made of the simulators to compare with.
        model: the VLA, frozen as wanted.
        steps: T, decisions per rollout.
        cfg: PPO's settings.
    """

    def __init__(self, env: VectorEnv, model: nn.Module, steps: int, cfg: PPOConfig):
        n = env.batch_size[0]
        made = [_Maker(env.make_simulator, env.chunk, HELD_OUT_STATES + row) for row in range(n)]
        super().__init__(SubprocVecEnv(made, start_method="forkserver"), model, steps, cfg)
        self.frames = n * steps

    def train(self) -> float:
        """A rollout and an update on it: env steps per second."""
        taken = self._taken()
        start = time.perf_counter()
        self.collect()
        self.update()
        seconds = time.perf_counter() - start
        return (self._taken() - taken) / seconds

    def _taken(self) -> int:
        return sum(self.ppo.env.get_attr("env_steps"))


class _Maker:
    """Makes one environment, in its process."""

    def __init__(self, make: Callable[[], Simulator], chunk: int, first_state: int):
        self.make, self.chunk, self.first_state = make, chunk, first_state

    def __call__(self) -> gymnasium.Env:
        torch.set_num_threads(1)
        return SimulatorEnv(self.make(), self.chunk, self.first_state)


class SimulatorEnv(gymnasium.Env):
    """A simulator as a Gymnasium environment, a step of which is a decision.

    Args:
        simulator: one world.
        chunk: H, control steps per decision.
        state: id of the first episode's initial state; later ones take the next.
    """

    def __init__(self, simulator: Simulator, chunk: int, state: int):
        self.simulator, self.chunk, self.state, self.env_steps = simulator, chunk, state, 0
        boxes: dict[str, spaces.Box] = {}
        for key, (shape, dtype) in simulator.layout.observation.items():
            low, high = (0, 255) if np.issubdtype(dtype, np.integer) else (-np.inf, np.inf)
            boxes[key] = spaces.Box(low, high, shape, dtype.type)
        self.observation_space = spaces.Dict(boxes)
        self.action_space = spaces.Box(-1.0, 1.0, (chunk * simulator.layout.action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict[str, np.ndarray], dict]:
        self.simulator.reset(self.state)
        self.state += 1
        return self.simulator.observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        actions = action.reshape(self.chunk, -1) if self.chunk > 1 else action
        out = execute(self.simulator, actions)
        self.env_steps += int(out[ENV_STEPS][0]) if self.chunk > 1 else 1
        seen = {key: out[key] for key in self.simulator.layout.observation}
        return seen, float(out["reward"][0]), bool(out["terminated"][0]), bool(out["truncated"][0]), {}

    def close(self) -> None:
        self.simulator.close()
