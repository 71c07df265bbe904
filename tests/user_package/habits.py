"""Small environments, each with one habit that users' environments have: how their initial states come about."""

from __future__ import annotations

import os
from collections import deque
from enum import Enum
from functools import partial
from os import system
from typing import ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box


class Honest(gymnasium.Env):
    """Ends after five steps; its state is a number that its seed decides."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}
    length = 5

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (2,), np.float64), Box(-1, 1, (1,), np.float32)

    def start(self) -> float:
        return float(self.np_random.random())

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.t = self.start(), 0
        return np.array([self.state, self.t]), {"success": False}

    def step(self, action):
        self.t += 1
        return (
            np.array([self.state, self.t]),
            1.0,
            False,
            self.t >= self.length,
            {"success": self.t >= self.length and self.state > 0.5},
        )

    def render(self):
        return np.full((6, 4, 3), 7, np.uint8)[::-1]  # upside down, as OpenGL's pictures come: a negative stride


class Global(Honest):
    """Draws from NumPy's global generator, which no seed of `reset` reaches."""

    def start(self):
        return float(np.random.random())


class Remembering(Honest):
    """Starts where the last episode's start left off."""

    last = 0.0

    def start(self):
        Remembering.last += 0.1 * self.np_random.random()
        return Remembering.last


def make_scaled(render_mode: str | None = None) -> gymnasium.Env:
    """Divides its rewards by a running deviation of returns, which goes on from episode to episode."""
    return gymnasium.wrappers.NormalizeReward(Honest(render_mode))


class Returning(Honest):
    """Returns rewards and ends in a form of its own."""

    def __init__(self, form: str, render_mode: str | None = None):
        super().__init__(render_mode)
        self.form = form

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if self.form == "arrays":
            return observation, np.array([reward]), np.array([terminated]), np.array([truncated]), info
        if self.form == "tensors":
            return observation, torch.tensor([reward]), torch.tensor(terminated), torch.tensor([truncated]), info
        return observation, {"two": np.zeros(2), "none": None, "text": "1"}[self.form], terminated, truncated, info


class NamedBounds(Honest):
    """Has bounds in name only; reports the action that reached it."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode)
        most = np.finfo(np.float32).max
        self.action_space = Box(-most, most, (1,), np.float32)

    def step(self, action):
        observation, *rest = super().step(action)
        return np.array([observation[0], float(action[0])]), *rest


class Single(Honest):
    """Starts every episode alike."""

    def start(self):
        return 0.75


class TupleActions(Honest):
    """Takes actions that are neither numbers nor choices."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode)
        self.action_space = gymnasium.spaces.Tuple((Box(-1, 1, (1,)), gymnasium.spaces.Discrete(2)))


class Stateful(Honest):
    """Keeps what it draws from in plain attributes: a list, a dict, a second name of its generator, an old RandomState.

    Args:
        hidden: "closure", "iterator" or "window" keeps a part of it where nobody looks.
        length: steps of an episode.
    """

    def __init__(self, hidden: str | None = None, length: int = 5, render_mode: str | None = None):
        super().__init__(render_mode)
        self.hidden, self.length = hidden, length
        self.observation_space = Box(-np.inf, np.inf, (5,), np.float64)
        self.whole = np.zeros(2)
        self.part = self.whole[:1] if hidden == "window" else np.zeros(1)

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed)
        self.again, self.old = self.np_random, np.random.RandomState(seed)
        self.history, self.facts = [self.state], {"peak": np.float64(self.state), 3: (True, None)}
        count = [0.0]

        def hidden_count() -> float:
            count[0] += 1
            return count[0]

        self.count = hidden_count
        self.draws = iter([float(i) for i in range(1000)])
        self.part[0] = self.state
        return self.observe(), info

    def observe(self):
        hidden = {
            "closure": lambda: self.count(),
            "iterator": lambda: next(self.draws),
            "window": lambda: self.whole[0],
        }
        extra = hidden[self.hidden]() if self.hidden else 0.0
        return np.array([self.state, self.t, self.facts["peak"], sum(self.history[-3:]), extra])

    def step(self, action):
        _, *rest = super().step(action)
        drawn = self.np_random.normal() + self.again.random() + self.old.normal()
        self.state = 0.5 * self.state + 0.1 * float(action[0]) + 0.1 * drawn
        self.part += self.state
        self.history.append(self.state)
        self.facts["peak"] = max(self.facts["peak"], self.state)
        return self.observe(), *rest


class Phase(Enum):
    REST = 0
    RUN = 1


class Clock:
    """Counts, and knows whose clock it is."""

    def __init__(self, owner: gymnasium.Env):
        self.owner, self.count, self.phase, self.marks = owner, 0, Phase.REST, deque([0], maxlen=3)

    def tick(self) -> int:
        self.count += 1
        self.phase = Phase(self.count % 2)
        self.marks.append(self.count)
        return self.count


class Slotted:
    """Counts where no `vars` look."""

    __slots__ = ("count",)

    def __init__(self):
        self.count = 0

    def tick(self) -> int:
        self.count += 1
        return self.count


class Helped(Honest):
    """Its time limit of 30 steps is counted by an object, which shows in nothing but the end of an episode.

    Args:
        helper: "init" makes the object with the environment, "reset" with every episode, "list" has two of them in a
            list, "late" makes another one in the sixth step, "slots" has one whose attributes cannot be seen, "world"
            one that holds another environment.
    """

    def __init__(self, helper: str = "init", render_mode: str | None = None):
        super().__init__(render_mode)
        self.helper, self.length, self.late = helper, 10**9, None
        self.clock = Slotted() if helper == "slots" else Clock(self)
        self.names = {"same": self.clock, "double": lambda x: 2 * x, "calls": 0}
        if helper == "world":
            self.clock.world = gymnasium.make("Pendulum-v1")

    def reset(self, *, seed=None, options=None):
        if self.helper in ("reset", "list"):
            self.clock = Clock(self)
        self.names["same"], self.clock.count = self.clock, 0
        self.others, self.late = [Clock(self), self.clock] if self.helper == "list" else [], None
        return super().reset(seed=seed)

    def step(self, action):
        observation, reward, terminated, _, info = super().step(action)
        self.names["calls"] = self.names["double"](self.names["calls"] + 1) % 64
        if self.helper == "late" and self.t >= 16:
            self.late = self.late or Clock(self)
            self.late.tick()
        limit = 30 if self.helper == "slots" or self.clock.phase is Phase(self.clock.count % 2) else 1
        return observation, reward, terminated, self.names["same"].tick() >= limit, info


CALLABLE = partial(system)


def make_number() -> int:
    """Returns no environment."""
    return len(os.sep)
