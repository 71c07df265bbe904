"""A point that reaches for a target, in NumPy alone: nested Dict observations, pixels, text, success in info."""

from __future__ import annotations

import os
from typing import ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Text

HEIGHT, WIDTH = 24, 32


class ReachEnv(gymnasium.Env):
    """Terminates at the target; `info` reports success, and the instruction at reset.

    The state observation is float64 `[6]`: point, target, and the action that the last step received.

    Args:
        render_mode: "rgb_array" or None.
        success_name: the entry of info that says success; None reports none.
        fail_in: "reset" or "render", to raise there; "step", to do so in training alone, after a while.
        exit_in: "step", to end the process there, in the same way.
        action_high: upper bounds of the action; the lower ones are [-2, -1].
        wrong: "shape" or "nan", for a state that is not as promised, in the same way; "frame", for a picture that is
            none.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        render_mode: str | None = None,
        success_name: str | None = "success",
        fail_in: str | None = None,
        exit_in: str | None = None,
        action_high: tuple[float, float] = (2.0, 3.0),
        wrong: str | None = None,
    ):
        self.render_mode, self.success_name = render_mode, success_name
        self.fail_in, self.exit_in, self.wrong = fail_in, exit_in, wrong
        self.action_space = Box(np.array([-2, -1], np.float32), np.array(action_high, np.float32))
        self.observation_space = Dict(
            {
                "state": Box(-np.inf, np.inf, (6,), np.float64),
                "clock": Box(0, 1000, (), np.int64),
                "gripper": Discrete(2),
                "images": Dict({"front": Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)}),
                "depth": Box(0, 2, (HEIGHT, WIDTH, 1), np.float32),
                "task": Text(40, charset="abcdefghijklmnopqrstuvwxyz "),
            }
        )

    def reset(self, *, seed=None, options=None):
        self._trouble("reset")
        super().reset(seed=seed)
        self.training = (seed or 0) >= 10_000  # ids below are evaluated, and tried out at construction
        self.point, self.target = self.np_random.uniform(-1, 1, (2, 2))
        self.last_action, self.clock = np.zeros(2), 0
        self.text = f"go {'left' if self.target[0] < 0 else 'right'}"
        return self._observe(), {"instruction": self.text, "text": {"short": "go"}}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is outside {self.action_space}"
        self.clock += 1
        self._trouble("step")
        self.last_action = action.astype(np.float64)
        self.point = self.point + 0.1 * action
        distance = float(np.linalg.norm(self.point - self.target))
        success = distance < 0.25
        info = {} if self.success_name is None else {self.success_name: np.bool_(success)}
        return self._observe(), -distance, success, False, info

    def render(self):
        self._trouble("render")
        if self.wrong == "frame":
            return None
        frame = np.zeros((HEIGHT * 2, WIDTH * 2, 3), np.uint8)
        frame[:, :, 0] = self.clock % 256
        frame[:, WIDTH:, 1] = 200
        return frame

    def _trouble(self, where: str) -> None:
        later = where == "step" and self.training and self.clock > 3
        if self.fail_in == where and (where != "step" or later):
            raise ValueError("the simulator\nlost its mind")
        if self.exit_in == where and later:
            os._exit(7)

    def _observe(self) -> dict:
        image = np.full((HEIGHT, WIDTH, 3), self.clock % 256, np.uint8)
        image[..., 2] = 9
        state = np.concatenate([self.point, self.target, self.last_action])
        if self.training and self.clock > 3:
            state = {"shape": state[:1], "nan": state * np.nan}.get(self.wrong, state)
        return {
            "state": state,
            "clock": np.array(self.clock, np.int64),
            "gripper": np.int64(0),
            "images": {"front": image},
            "depth": np.full((HEIGHT, WIDTH, 1), 0.5, np.float32),
            "task": self.text,
        }


class UnboundedBoxEnv(gymnasium.Env):
    """A Box of pixels, an action without bounds, no end and no success."""

    observation_space = Box(0, 255, (8, 8, 3), np.uint8)
    action_space = Box(-np.inf, np.inf, (2,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros((8, 8, 3), np.uint8), {}

    def step(self, action):
        return np.full((8, 8, 3), 7, np.uint8), float(action.sum()), False, False, {}


def make_reach(**kwargs) -> gymnasium.Env:
    """A function can be named as well as a class."""
    return ReachEnv(**kwargs)
