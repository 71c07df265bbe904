"""Small environments, each with one habit that public bug reports describe: what they return and what they take.

All observe three numbers, unless they say otherwise: the id modulo 97 over 97, the clock over 10, the last action.
"""

from __future__ import annotations

from typing import ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Text, Tuple


class Truncates(gymnasium.Env):
    """Five steps of reward 1, then the time is up."""

    length: ClassVar = 5
    terminates: ClassVar = False
    action_space = Box(-1, 1, (1,), np.float32)
    observation_space = Box(-np.inf, np.inf, (3,), np.float64)

    def observe(self):
        return np.array([self.id, self.t / 10, self.last])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.id, self.t, self.last = (seed or 0) % 97 / 97, 0, 0.0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        self.last = float(np.asarray(action).ravel()[0])
        end = self.length is not None and self.t >= self.length
        ends = (end and self.terminates, end and not self.terminates)
        return self.observe(), self.reward(), *ends, self.info(end)

    def reward(self):
        return 1.0

    def info(self, end: bool):
        return {}


class Terminates(Truncates):
    terminates = True


class Long(Truncates):
    length = 2000


class RewardArray(Truncates):
    def reward(self):
        return np.array([1.0])


class RewardNone(Truncates):
    def reward(self):
        return None


class RewardTorch(Truncates):
    def reward(self):
        return torch.tensor([1.0])


class DoneArray(Truncates):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, np.array([terminated]), np.array([truncated]), info


class SuccessAtEndOnly(Truncates):
    def info(self, end):
        return {"is_success": bool(self.id > 0.5)} if end else {}


class SuccessWhenTrueOnly(Truncates):
    def info(self, end):
        return {"success": True} if end and self.id > 0.5 else {}


class SuccessNeverEnds(Truncates):
    length = None

    def info(self, end):
        return {"success": self.t >= 3}


class SuccessPasses(Truncates):
    """Succeeds at its second step, and has lost it at the end."""

    def info(self, end):
        return {"success": self.t == 2 and self.id > 0.5}


class SuccessFloat(Truncates):
    def info(self, end):
        return {"success": float(self.id > 0.5)}


class SuccessArray1(Truncates):
    def info(self, end):
        return {"success": np.array([self.id > 0.5])}


class SuccessTorch(Truncates):
    def info(self, end):
        return {"success": torch.tensor(int(self.id > 0.5))}


class SuccessArray2(Truncates):
    def info(self, end):
        return {"success": np.array([True, False])}


class SuccessText(Truncates):
    def info(self, end):
        return {"success": "False"}


class SuccessShare(Truncates):
    """How much of the task is done."""

    def info(self, end):
        return {"success": 0.5}


class SuccessTextLater(Truncates):
    """Says something else in training than when it is tried out."""

    def info(self, end):
        return {"success": "True" if self.t == 4 and self.id > 0.9 else False}


class SuccessLater(Truncates):
    """Reports success in few episodes, and in none of those that are tried."""

    def info(self, end):
        return {"success": True} if self.id > 0.9 else {}


class HalfBounded(Truncates):
    action_space = Box(np.array([0.0], np.float32), np.array([np.inf], np.float32))


class Infinite(Truncates):
    action_space = Box(-np.inf, np.inf, (1,), np.float32)


class FloatMax(Truncates):
    action_space = Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (1,), np.float32)


class Asymmetric(Truncates):
    action_space = Box(np.array([10.0, -3.0], np.float32), np.array([30.0, -1.0], np.float32))

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action)


class EqualBounds(Asymmetric):
    action_space = Box(np.array([0.25, -1.0], np.float32), np.array([0.25, 1.0], np.float32))


class ActionMatrix(Asymmetric):
    action_space = Box(-1, 1, (2, 3), np.float32)


class ScalarAction(Asymmetric):
    action_space = Box(-2, 2, (), np.float32)


class DiscreteActions(Asymmetric):
    action_space = Discrete(4)


class DiscreteFrom(Asymmetric):
    action_space = Discrete(3, start=-1)


class MultiDiscreteActions(Asymmetric):
    action_space = MultiDiscrete([3, 5])


class MultiBinaryActions(Asymmetric):
    action_space = gymnasium.spaces.MultiBinary(3)


class IntActions(Asymmetric):
    action_space = Box(0, 10, (1,), np.int64)


class ManyIntActions(Asymmetric):
    action_space = Box(-(2**40), 2**40, (1,), np.int64)


class TupleActions(Truncates):
    action_space = Tuple((Box(-1, 1, (1,)), Discrete(2)))


class NaNObs(Truncates):
    def observe(self):
        return super().observe() * (np.nan if self.t == 4 else 1)


class InfObs(Truncates):
    def observe(self):
        return super().observe() + (np.array([0, np.inf, 0]) if self.t == 4 else 0)


class NaNReward(Truncates):
    def reward(self):
        return float("nan") if self.t == 4 else 1.0


class InplaceObs(Truncates):
    """Returns the same buffer every time."""

    def observe(self):
        self.buffer = getattr(self, "buffer", np.zeros(3))
        self.buffer[:] = super().observe()
        return self.buffer


class BackwardObs(Truncates):
    """Returns views with negative strides, in the other byte order."""

    def observe(self):
        return super().observe()[::-1].astype(">f8")[::-1]


class ScalarBox(Truncates):
    observation_space = Dict(a=Box(-1, 1, (), np.float32), b=Box(-9, 9, (2,), np.float32))

    def observe(self):
        return {"a": np.float32(0.5), "b": np.zeros(2, np.float32)}


class LeRobotKeys(Truncates):
    """Keys with dots, slashes, spaces and letters that are not ASCII."""

    observation_space = Dict(
        {
            "observation.state": Box(-9, 9, (2,), np.float32),
            "observation.images.top": Box(0, 255, (16, 16, 3), np.uint8),
            "observation/wrist image": Box(0, 255, (16, 16, 3), np.uint8),
            "ünïcode": Box(-9, 9, (1,), np.float32),
        }
    )

    def observe(self):
        return {
            "observation.state": np.ones(2, np.float32),
            "observation.images.top": np.full((16, 16, 3), 3, np.uint8),
            "observation/wrist image": np.full((16, 16, 3), 4, np.uint8),
            "ünïcode": np.full(1, 5, np.float32),
        }


class Pictures(Truncates):
    """Observes nothing but a picture, made by `picture`."""

    observation_space = Box(0, 255, (16, 24, 3), np.uint8)

    def picture(self) -> np.ndarray:
        rows = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None], (16, 24, 3)).copy()
        rows[..., 2] = 200
        return rows

    def observe(self):
        return self.picture()


class ChannelsFirst(Pictures):
    observation_space = Box(0, 255, (3, 16, 24), np.uint8)

    def observe(self):
        return self.picture().transpose(2, 0, 1)


class NestedCHW(ChannelsFirst):
    observation_space = Dict(agent=Dict(pos=Box(-9, 9, (2,), np.float64)), pixels=ChannelsFirst.observation_space)

    def observe(self):
        return {"agent": {"pos": np.ones(2)}, "pixels": super().observe()}


class IntImage(Pictures):
    """A picture of another type than its space says."""

    def observe(self):
        return self.picture().astype(np.int64)


class NamedCameras(Pictures):
    """A Dict with the schema's names for some of its entries, a number for one, and a name that only looks like one."""

    observation_space = Dict(
        {
            "goal": Box(-9, 9, (2,), np.float32),
            "proprio": Box(-9, 9, (2,), np.float32),
            "rgb": Pictures.observation_space,
            "rgb_wrist": Pictures.observation_space,
            "depth_wrist": Box(0, 9, (16, 24), np.float32),
            "depth_scale": Box(0, 9, (1,), np.float32),
            0: Box(-9, 9, (1,), np.float32),
        }
    )

    def observe(self):
        numbers = {"goal": np.ones(2, np.float32), "proprio": np.ones(2, np.float32), 0: np.full(1, 6, np.float32)}
        depths = {"depth_wrist": np.full((16, 24), 0.5, np.float32), "depth_scale": np.ones(1, np.float32)}
        return {**numbers, **depths, "rgb": self.picture(), "rgb_wrist": self.picture()[::-1]}


class TwoDepths(Truncates):
    """One camera in metres, the other in millimetres."""

    observation_space = Dict(far=Box(0, 10, (2, 3), np.float32), near=Box(0, 65535, (2, 3), np.uint16))

    def observe(self):
        return {"far": np.full((2, 3), 2.5, np.float32), "near": np.full((2, 3), 800, np.uint16)}


class FloatImage(Pictures):
    observation_space = Box(0, 1, (16, 24, 3), np.float32)

    def observe(self):
        return self.picture().astype(np.float32) / 255


class FloatChannelsFirst(Pictures):
    observation_space = Box(0, 1, (3, 16, 24), np.float64)

    def observe(self):
        return self.picture().transpose(2, 0, 1) / 255


class FloatImageBeyond(FloatImage):
    """Says that it is within 0 and 1, and is not."""

    def observe(self):
        return super().observe() * 255


class Grayscale(Pictures):
    observation_space = Box(0, 255, (16, 24, 1), np.uint8)

    def observe(self):
        return self.picture()[..., :1]


class GrayscaleFlat(Pictures):
    observation_space = Box(0, 255, (16, 24), np.uint8)

    def observe(self):
        return self.picture()[..., 0]


class UpsideDown(Pictures):
    """As OpenGL's pictures come: a negative stride."""

    def observe(self):
        return self.picture()[::-1].copy()[::-1]


class OnePixel(Pictures):
    observation_space = Box(0, 255, (1, 1, 3), np.uint8)

    def observe(self):
        return self.picture()[:1, :1]


class FrameStack(Pictures):
    observation_space = Box(0, 255, (4, 16, 24, 3), np.uint8)

    def observe(self):
        return np.stack([self.picture()] * 4)


class Uint8Proprio(Truncates):
    observation_space = Box(0, 255, (3,), np.uint8)

    def observe(self):
        return np.array([200, 100, self.t], np.uint8)


class DepthMillimetres(Truncates):
    observation_space = Dict(depth=Box(0, 65535, (16, 24), np.uint16), proprio=Box(-9, 9, (3,), np.float32))

    def observe(self):
        return {"depth": np.full((16, 24), 800, np.uint16), "proprio": np.zeros(3, np.float32)}


class DepthChannelFirst(Truncates):
    observation_space = Dict(depth=Box(0, 9, (1, 16, 24), np.float32))

    def observe(self):
        return {"depth": np.full((1, 16, 24), 0.8, np.float32)}


class OldApi(Truncates):
    """Returns what Gym did before Gymnasium."""

    def reset(self, **options):
        return super().reset(**options)[0]

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, info


class NoSeedArgument(Truncates):
    def reset(self):
        return super().reset()


class Instructions(Truncates):
    """Some long, some not ASCII."""

    texts = (
        "pick",
        "nimm den grünen Würfel und lege ihn auf den Teller, der am weitesten links steht",
        "把红色方块放在盘子上",
    )

    def reset(self, *, seed=None, options=None):
        observation, _ = super().reset(seed=seed)
        return observation, {"task": self.texts[seed % 3]}


class RaisesLater(Truncates):
    def step(self, action):
        if self.t == 3 and self.id > 0.9:
            raise RuntimeError("physics exploded")
        return super().step(action)


class ExitsLater(Truncates):
    def step(self, action):
        if self.t == 3 and self.id > 0.9:
            raise SystemExit(1)
        return super().step(action)


class ObsShapeChanges(Truncates):
    def observe(self):
        return np.zeros(4) if self.t == 3 else super().observe()


class TextIsNumber(Truncates):
    observation_space = Dict(proprio=Box(-9, 9, (3,), np.float64), language=Text(20))

    def observe(self):
        return {"proprio": super().observe(), "language": 7}


class ObsTexts(Truncates):
    def observe(self):
        return np.array(["a", "b", "c"])


class ObsObjects(Truncates):
    def observe(self):
        return np.array([None, {}, 3], dtype=object)


class ObsRagged(Truncates):
    def observe(self):
        return [[1, 2], [3]]


class Choosing(gymnasium.Env):
    """One step: two choices, of three and of two, which a picture of numbers tells. Half of nothing is no success."""

    observation_space = Box(0, 1, (5,), np.float32)
    action_space = MultiDiscrete([3, 2])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.target = self.np_random.integers([3, 2])
        return np.concatenate([np.eye(3)[self.target[0]], np.eye(2)[self.target[1]]]).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        success = bool((action == self.target).all())
        return np.zeros(5, np.float32), float(success), True, False, {"success": success}
