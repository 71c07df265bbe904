"""From the numbers that a policy writes to the actions that an environment or a robot takes, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ActionMap:
    """How actions reach an environment: component by component scaled, moved, clipped, and choices rounded.

    Attributes:
        low, high: bounds float64 `[A]`, in the environment's terms; infinite where there is none.
        scale, offset: float64 `[A]`; an action x becomes offset + scale x.
        shape: of one action of the environment, of A numbers in all.
        dtype: of its actions.
        bounded: whether an action of [-1, 1] means all of every component.
        choices: how many choices each component has, where it has them.
    """

    low: np.ndarray
    high: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    shape: tuple[int, ...]
    dtype: np.dtype
    bounded: bool = False
    choices: tuple[int, ...] | None = None

    @classmethod
    def clipping(cls, size: int) -> ActionMap:
        """That of an environment which takes A = `size` numbers from [-1, 1] as they are."""
        one = np.ones(size)
        return cls(-one, one, one, np.zeros(size), (size,), np.dtype(np.float32), bounded=True)

    @property
    def size(self) -> int:
        """A."""
        return len(self.low)

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """An action float32 `[A]`, or a batch `[N, A]` of them, as the environment takes it."""
        action = self._mapped(action, self.low, self.high, self.scale, self.offset).astype(self.dtype)
        return action.reshape((*action.shape[:-1], *self.shape))[()]  # one of no dimension is a number

    def inverse(self, taken: np.ndarray) -> np.ndarray:
        """The numbers float32 `[..., A]` that become these actions `[..., A]` of the environment, were none clipped.

        One that does not move what it becomes, of bounds that are equal, is 0.
        """
        if taken.shape[-1] != self.size:
            raise ValueError(f"an action has {self.size} numbers, got {taken.shape[-1]}")
        locked = self.scale == 0  # whatever the policy writes becomes the offset
        return np.where(locked, 0.0, (taken - self.offset) / np.where(locked, 1.0, self.scale)).astype(np.float32)

    def as_tensor(self, action: Tensor, device: torch.device) -> Tensor:
        """A batch of actions float32 `[N, A]` as an environment takes it that keeps its tensors on this device."""
        numbers = (torch.as_tensor(n, device=device) for n in (self.low, self.high, self.scale, self.offset))
        action = self._mapped(action.to(device, torch.float32), *numbers)
        return action.to(torch.from_numpy(np.empty(0, self.dtype)).dtype).reshape(len(action), *self.shape)

    def _mapped(self, action: Any, low: Any, high: Any, scale: Any, offset: Any) -> Any:
        if action.shape[-1] != self.size:  # which would be broadcast
            raise ValueError(f"an action has {self.size} numbers, got {action.shape[-1]}")
        # gymnasium.wrappers.RescaleAction rounds some actions to just outside the Box; clipping last cannot.
        action = (offset + scale * action).clip(low, high)
        return action.round() if self.choices else action

    def sample(self, generator: np.random.Generator, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Actions float32 `[*shape, A]` to try an environment with."""
        if self.choices:
            return generator.integers(0, self.choices, (*shape, self.size)).astype(np.float32)
        return generator.uniform(-1, 1, (*shape, self.size)).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `null` where there is no bound."""
        numbers = {name: getattr(self, name).tolist() for name in ("low", "high", "scale", "offset")}
        for name in ("low", "high"):
            numbers[name] = [bound if np.isfinite(bound) else None for bound in numbers[name]]
        choices = None if self.choices is None else list(self.choices)
        return {
            **numbers, "shape": list(self.shape), "dtype": np.dtype(self.dtype).name, "bounded": self.bounded,
            "choices": choices,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> ActionMap:
        """What `to_dict` gave."""
        numbers = {name: np.array(saved[name], np.float64) for name in ("low", "high", "scale", "offset")}
        numbers["low"] = np.where(np.isnan(numbers["low"]), -np.inf, numbers["low"])
        numbers["high"] = np.where(np.isnan(numbers["high"]), np.inf, numbers["high"])
        choices = saved["choices"]
        return cls(
            **numbers, shape=tuple(saved["shape"]), dtype=np.dtype(saved["dtype"]), bounded=saved["bounded"],
            choices=None if choices is None else tuple(choices),
        )  # fmt: skip
