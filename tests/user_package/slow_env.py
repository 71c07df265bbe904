"""An environment whose steps take as long as it is told, once it has taken a few."""

from __future__ import annotations

import time

import gymnasium
import numpy as np
from gymnasium.spaces import Box


class Slow(gymnasium.Env):
    def __init__(self, seconds: float, quick: int = 50):
        self.observation_space, self.action_space = Box(-1, 1, (3,)), Box(-1, 1, (1,))
        self.seconds, self.quick, self.steps = seconds, quick, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        self.t += 1
        self.steps += 1
        time.sleep(self.seconds if self.steps > self.quick else 0)
        return np.zeros(3, np.float32), 1.0, False, self.t >= 50, {}
