"""A point seen by two cameras, once as a single environment and once as a vector environment that steps all rows."""

from __future__ import annotations

from typing import ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

SIZE = 8
SPACE = Dict(
    {
        "state": Box(-np.inf, np.inf, (5,), np.float64),  # point, target, clock
        "front": Box(0, 255, (SIZE, SIZE, 3), np.uint8),
        "wrist": Dict(
            {"rgb": Box(0, 255, (SIZE // 2, SIZE, 3), np.uint8), "depth": Box(0, 2, (SIZE // 2, SIZE, 1), np.float32)}
        ),
    }
)
ACTIONS = Box(np.array([-2, -1], np.float32), np.array([2, 3], np.float32))


def observe(point: np.ndarray, target: np.ndarray, clock: np.ndarray) -> dict:
    """What rows `[N]` look like: the front camera shows the clock, the wrist camera twice the clock."""
    n = len(clock)
    front, wrist = np.zeros((n, SIZE, SIZE, 3), np.uint8), np.zeros((n, SIZE // 2, SIZE, 3), np.uint8)
    front[:] = clock[:, None, None, None]
    wrist[:] = 2 * clock[:, None, None, None]
    depth = np.broadcast_to(np.abs(point[:, :1, None, None]), (n, SIZE // 2, SIZE, 1)).astype(np.float32)
    state = np.concatenate([point, target, clock[:, None]], axis=1)
    return {"state": state, "front": front, "wrist": {"rgb": wrist, "depth": depth}}


def move(point: np.ndarray, target: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    point = point + 0.1 * action
    distance = np.sqrt(((point - target) ** 2).sum(-1))
    return point, -distance, distance < 0.3


class TwoCamerasEnv(gymnasium.Env):
    """One point; terminates at the target."""

    observation_space, action_space = SPACE, ACTIONS

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point, self.target = self.np_random.uniform(-1, 1, (2, 1, 2))
        self.clock = np.zeros(1)
        return self._observe(), {"instruction": "go left" if self.target[0, 0] < 0 else "go right"}

    def step(self, action):
        assert self.action_space.contains(action)
        self.clock = self.clock + 1
        self.point, reward, success = move(self.point, self.target, action)
        return self._observe(), float(reward[0]), bool(success[0]), False, {"success": bool(success[0])}

    def _observe(self) -> dict:
        one = observe(self.point, self.target, self.clock)
        return {key: {k: v[0] for k, v in value.items()} if key == "wrist" else value[0] for key, value in one.items()}


class TwoCamerasVectorEnv(VectorEnv):
    """All points at once.

    Args:
        num_envs: N.
        max_episode_steps: truncation limit.
        render_mode: "rgb_array" or None.
        tensors: return torch tensors, and insist on tensors as actions.
        wrong: "one_seed" takes no list of seeds; "reseeds" mixes the seeds of all rows; "no_mask" resets all rows
            always; "mask_raises" knows no options; "autoreset" says that rows start again by themselves; "resets"
            lets them do so and says otherwise, "goes_on" lets those go on that have succeeded; "broken" raises at every
            reset; "shape" returns a state that is not as promised, in training.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, num_envs=1, max_episode_steps=20, render_mode=None, tensors=False, wrong=None):
        self.num_envs, self.limit, self.render_mode = num_envs, max_episode_steps, render_mode
        self.tensors, self.wrong = tensors, wrong
        if wrong == "autoreset":
            self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space, self.single_action_space = SPACE, ACTIONS
        self.observation_space, self.action_space = batch_space(SPACE, num_envs), batch_space(ACTIONS, num_envs)
        self.point, self.target = np.zeros((2, num_envs, 2))
        self.clock = np.zeros(num_envs)
        self.front = np.zeros((num_envs, SIZE, SIZE, 3), np.uint8)  # one buffer, as simulators keep one
        self.ended = np.zeros(num_envs, bool)

    def reset(self, *, seed=None, options=None):
        mask = np.ones(self.num_envs, bool) if self.wrong == "no_mask" or not options else options["reset_mask"]
        if self.wrong == "broken":
            raise ValueError("no such world")
        if self.wrong == "mask_raises" and options:
            raise TypeError("no options here")
        if self.wrong == "one_seed":
            super().reset(seed=seed)
        seeds = seed if isinstance(seed, list) else [seed] * self.num_envs
        if self.wrong == "reseeds":
            seeds = [10 * row + (one or 0) for row, one in enumerate(seeds)]
        for row in mask.nonzero()[0]:
            rng = np.random.default_rng(0)
            if seeds[row] is not None:
                rng, _ = gymnasium.utils.seeding.np_random(seeds[row])
            self.point[row], self.target[row] = rng.uniform(-1, 1, (2, 2))
            self.clock[row], self.ended[row] = 0, False
            self.training = (seeds[row] or 0) >= 10_000
        words = np.array(["go left" if x < 0 else "go right" for x in self.target[:, 0]], dtype=object)
        words[~mask] = None
        return self._observe(), {"instruction": words, "_instruction": mask}

    def step(self, actions):
        assert self.wrong in ("resets", "goes_on") or not self.ended.any(), "a row that has ended was not reset"
        if self.tensors:
            assert isinstance(actions, torch.Tensor) and actions.dtype == torch.float32
            actions = actions.numpy()
        assert self.action_space.contains(actions)
        self.clock += 1
        self.point[:], reward, success = move(self.point, self.target, actions)
        truncated = self.clock >= self.limit
        if self.wrong == "goes_on":
            success = success | (self.clock == 2)
        self.ended = success | truncated
        if self.wrong == "resets" and self.ended.any():
            self.point[self.ended], self.clock[self.ended] = 0.5, 0
        facts = reward, success, truncated, success
        reward, terminated, truncated, success = map(torch.from_numpy, facts) if self.tensors else facts
        return self._observe(), reward, terminated, truncated, {"success": success}

    def render(self):
        return tuple(np.full((SIZE, SIZE, 3), 50 + 10 * row, np.uint8) for row in range(self.num_envs))

    def _observe(self) -> dict:
        seen = observe(self.point, self.target, self.clock)
        self.front[:] = seen["front"]
        seen["front"] = self.front
        if self.wrong == "shape" and self.training and self.clock.max() > 3:
            seen["state"] = seen["state"][:, :3]
        if not self.tensors:
            return seen
        wrist = {key: torch.from_numpy(value) for key, value in seen["wrist"].items()}
        return {"state": torch.from_numpy(seen["state"]), "front": torch.from_numpy(seen["front"]), "wrist": wrist}
