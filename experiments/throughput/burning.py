"""An environment whose step costs a stated time of one core, as simulators' do: to measure how processes share it."""

from __future__ import annotations

import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box


class Burning(gymnasium.Env):
    """Episodes of 50 steps that end in success; a step computes until it has had its time of the core.

    Args:
        milliseconds: of the core (`time.thread_time`), not of the clock: two on one core take twice as long.
        size: of the picture that it shows.
    """

    action_space = Box(-1.0, 1.0, (3,), np.float32)

    def __init__(self, milliseconds: float = 2.0, size: int = 64):
        self.seconds = milliseconds / 1000
        self.observation_space = Box(0, 255, (size, size, 3), np.uint8)
        self.picture = np.zeros((size, size, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.picture, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        end = time.thread_time() + self.seconds
        while time.thread_time() < end:
            pass
        self.steps += 1
        done = self.steps == 50
        return self.picture, float(done), done, False, {"success": done}
