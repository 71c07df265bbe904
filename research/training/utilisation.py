"""Model FLOP utilisation (MFU): which share of a device's speed a training loop turns into the model's arithmetic.

Chowdhery et al. 2022, "PaLM" (https://arxiv.org/abs/2204.02311), appendix B. FLOPs are those of the passes that PPO
needs, multiply and add counted as two; the peak is measured, not taken from a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial

import torch

_MEASURE_S = 0.5


class Utilisation:
    """MFU of one iteration: a rollout and its update.

    Args:
        collected: FLOPs per transition while collecting; see `agents.policy.VLAPolicy.flops`.
        trained: FLOPs per transition and pass of the update, forward and backward.
        peak: FLOPs per second that the device can do; see `matmul_flops_per_second`.
    """

    def __init__(self, collected: float, trained: float, peak: float):
        self.collected, self.trained, self.peak = collected, trained, peak

    def of(self, transitions: int, passes: float, seconds: float) -> float:
        """MFU, 0..1.

        Args:
            transitions: in the rollout.
            passes: over the rollout, in the update.
            seconds: that both took.
        """
        return transitions * (self.collected + passes * self.trained) / (seconds * self.peak)


@cache
def matmul_flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """The fastest of as many large square matrix products as fit in half a second, at least two."""
    n = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)  # a run repeats, whether or not this was measured before
    a, b = (torch.randn(n, n, generator=own, device=device).to(dtype) for _ in range(2))
    multiply = partial(torch.mm, a, b)
    seconds = [timed(multiply, device), timed(multiply, device)]
    while sum(seconds) < _MEASURE_S:
        seconds.append(timed(multiply, device))
    return 2 * n**3 / min(seconds)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that `action` takes, its work on a GPU included."""
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Stopwatch:
    """Times the two halves of an iteration."""

    def __init__(self):
        self._start = self._collected = time.perf_counter()

    def collected(self) -> None:
        """The rollout is there."""
        self._collected = time.perf_counter()

    def seconds(self) -> tuple[float, float]:
        """How long collecting and updating took, until now."""
        return self._collected - self._start, time.perf_counter() - self._collected
