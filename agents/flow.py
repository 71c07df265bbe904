"""Flow policies: how an action is drawn by denoising, and what its log-probability is.

A flow model is trained on x(t) = (1 - t) action + t noise, for t from 1 (noise) to 0 (action), to predict the velocity
v = noise - action (Lipman et al. 2023, arXiv:2210.02747; pi0, arXiv:2410.24164). Where it stands at x, it so estimates
the action, x - t v, and the noise, x + (1 - t) v. A step from t to s < t along the ordinary differential equation mixes
the two in the proportions of s:

    x(s) = (1 - s) (x - t v) + s (x + (1 - t) v) = x - (t - s) v

That gives one action to one noise, which has no density to take gradients of. Two ways of giving it one:

- `FlowSDE`: one step, drawn at random, is that of a stochastic differential equation with the same distribution at each
  time (Flow-GRPO, arXiv:2505.05470, equation 9; one step of it: pi-RL, arXiv:2510.25889). All that an update needs is
  that step's two ends and its place, and it evaluates the model once.
- `FlowNoise`: every step has noise, whose size another network learns (ReinFlow, arXiv:2505.22094). The density is that
  of the chain, and its logarithm the sum over the steps: a mean over them would be that of no distribution.

Mathematics alone: a model is a function `velocity(x, t)` from `[B, H, A]` and times `[B]` to `[B, H, A]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from agents.ratio_level import RatioLevel, at_level
from research.errors import UserError

Velocity = Callable[[Tensor, Tensor], Tensor]
Counted = tuple[int | None, int | None]
EVERYTHING: Counted = (None, None)


class Draw(NamedTuple):
    """What `FlowSDE.sample` drew.

    Attributes:
        action: `[B, H, A]`, the state at time 0.
        pair: `[B, 2, H, A]`, the state before and after the stochastic step.
        index: int64 `[B]`, which of the K steps that was.
        log_prob: `[B]`, of the step's end given its beginning.
    """

    action: Tensor
    pair: Tensor
    index: Tensor
    log_prob: Tensor


class Chain(NamedTuple):
    """What `FlowNoise.sample` drew.

    Attributes:
        action: `[B, H, A]`, the state at time 0.
        states: `[B, K + 1, H, A]`, from the noise to the action.
        log_prob: `[B]`, of all states given the first.
    """

    action: Tensor
    states: Tensor
    log_prob: Tensor


class ChainScore(NamedTuple):
    """What `FlowNoise.score` says of a chain.

    Attributes:
        log_prob: `[B]`, of all states given the first; of the parts at another level with a dimension more.
        entropy: `[B]`, the sum of those of its steps' noise.
    """

    log_prob: Tensor
    entropy: Tensor


class Steps:
    """K equal steps from time 1 to time 0.

    Args:
        count: K, at least 1.
    """

    def __init__(self, count: int):
        if count < 1:
            raise UserError(f"a flow takes at least 1 denoising step, got {count}")
        self.count = count

    def __len__(self) -> int:
        return self.count

    def time(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Time before step `index`; K gives 0."""
        return 1 - index.to(dtype) / self.count


def follow(velocity: Velocity, noise: Tensor, steps: Steps) -> Tensor:
    """The action of a noise along the ordinary differential equation, by Euler's method; both `[B, H, A]`."""
    x = noise
    for k in range(len(steps)):
        x, _ = _euler(velocity, x, torch.full((len(x),), k, device=x.device), steps)
    return x


def _euler(velocity: Velocity, x: Tensor, index: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """Where step `index` leads along the equation, and the estimate of the noise at its beginning."""
    time = steps.time(index, x.dtype)
    v = velocity(x, time)
    return x - v / len(steps), x + _wide(1 - time) * v


def _wide(value: Tensor) -> Tensor:
    """`[B]` as `[B, 1, 1]`."""
    return value[:, None, None]


def gaussian_log_prob(
    value: Tensor, mean: Tensor, std: Tensor, counted: Counted = EVERYTHING, level: RatioLevel = "chunk"
) -> Tensor:
    """Log-density of a diagonal Gaussian, summed over the H control steps that count and the A numbers of each.

    Args:
        value, mean: `[*B, H, A]`.
        std: of their shape, or one that is expanded to it.
        level: "chunk" sums over all that counts, see `agents.ratio_level`.
        counted: of the H control steps and of the A numbers, how many count from the first on; None: all. The others
            (what is planned and not executed, what pads an action) still move these, through later denoising steps:
            to leave them out is no longer exact, and lowers the variance of a ratio of densities.
    Returns:
        `[*B]`, or with a dimension more for the parts at another level.
    """
    std = std.expand_as(mean)
    each = -0.5 * ((value - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return at_level(each[..., : counted[0], : counted[1]], level)


def gaussian_entropy(std: Tensor, counted: Counted = EVERYTHING) -> Tensor:
    """Entropy `[B]` of a diagonal Gaussian with deviations `[B, H, A]`, of the numbers that count."""
    each = std.log() + 0.5 * math.log(2 * math.pi * math.e)
    return each[:, : counted[0], : counted[1]].sum(dim=(1, 2))


class FlowSDE:
    """One of K denoising steps is stochastic, drawn uniformly for each row; the others follow the equation.

    The step from t to s = t - d adds noise of standard deviation sigma sqrt(d), with sigma = a sqrt(t / (1 - t)), and
    takes sigma^2 d / (2 t) of the estimate of the noise away, so that x(s) is distributed as before, the better the
    smaller the steps. At t = 1, where sigma is infinite, 1 - t is that of the next step.

    The entropy of a step depends on sigma alone: a bonus for it has no gradient.

    Args:
        steps: K.
        noise: a; 0 is the ordinary equation, which has no density.
        counted: see `gaussian_log_prob`.
    """

    def __init__(self, steps: int, noise: float = 0.5, counted: Counted = EVERYTHING):
        if not noise > 0:
            raise UserError(f"flow-SDE needs noise above 0, got {noise}: without any, an action has no density")
        self.steps, self.noise, self.counted = Steps(steps), noise, counted

    @torch.no_grad()
    def sample(
        self,
        velocity: Velocity,
        start: Tensor,
        generator: torch.Generator | None = None,
        level: RatioLevel = "chunk",
    ) -> Draw:
        """Draw actions.

        Args:
            velocity: the model.
            start: `[B, H, A]`, standard normal noise.
            generator: of the stochastic steps' places and noise.
            level: see `gaussian_log_prob`.
        """
        rows, device = len(start), start.device
        index = torch.randint(len(self.steps), (rows,), generator=generator, device=device)
        eps = torch.randn(start.shape, generator=generator, device=device, dtype=start.dtype)
        x, before, after = start, start, start
        means, stds = torch.zeros_like(start), start.new_ones(rows, 1, 1)  # of the stochastic step of each row
        for k in range(len(self.steps)):
            here = torch.full_like(index, k)
            chosen = _wide(index == k)
            plain, mean, std = self._step(velocity, x, here)
            drawn = mean + std * eps
            means, stds = torch.where(chosen, mean, means), torch.where(chosen, std, stds)
            before, after = torch.where(chosen, x, before), torch.where(chosen, drawn, after)
            x = torch.where(chosen, drawn, plain)
        log_prob = gaussian_log_prob(after, means, stds, self.counted, level)
        return Draw(x, torch.stack([before, after], dim=1), index, log_prob)

    def log_prob(self, velocity: Velocity, pair: Tensor, index: Tensor, level: RatioLevel = "chunk") -> Tensor:
        """Log-probability `[B]` of a stored step, with gradients; the model is evaluated once.

        Args:
            velocity: the model.
            pair, index: of a `Draw`.
            level: see `gaussian_log_prob`.
        """
        _, mean, std = self._step(velocity, pair[:, 0].contiguous(), index)
        return gaussian_log_prob(pair[:, 1], mean, std, self.counted, level)

    def _step(self, velocity: Velocity, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the equation leads, and mean `[B, H, A]` and deviation `[B, 1, 1]` of the stochastic step."""
        plain, noise = _euler(velocity, x, index, self.steps)
        time, count = self.steps.time(index, x.dtype), len(self.steps)
        # 1 - t, and where that is 0 what it is one step later.
        sigma = self.noise * (time / (1 - time).clamp(min=1 / count)).sqrt()
        taken = sigma.square() / (2 * time * count)
        return plain, plain - _wide(taken) * noise, _wide(sigma / math.sqrt(count))


class FlowNoise:
    """Every denoising step has Gaussian noise around where the equation leads; its size is learned, within bounds.

    Args:
        steps: K.
        low, high: bounds of the standard deviation, 0 < low < high.
        counted: see `gaussian_log_prob`.
    """

    def __init__(self, steps: int, low: float = 0.08, high: float = 0.16, counted: Counted = EVERYTHING):
        if not 0 < low < high:
            raise UserError(f"flow-noise needs 0 < low < high for its standard deviation, got {low} and {high}")
        self.steps, self.low, self.high, self.counted = Steps(steps), low, high, counted

    def bounded(self, raw: Tensor) -> Tensor:
        """Standard deviations within the bounds, from any numbers: low (high / low)^sigmoid(raw)."""
        return self.low * (self.high / self.low) ** torch.sigmoid(raw)

    @torch.no_grad()
    def sample(
        self,
        velocity: Velocity,
        raw_std: Velocity,
        start: Tensor,
        generator: torch.Generator | None = None,
        level: RatioLevel = "chunk",
    ) -> Chain:
        """Draw actions.

        Args:
            velocity: the model.
            raw_std: what learns the noise, a function as `velocity` is; see `bounded`.
            start: `[B, H, A]`, standard normal noise.
            generator: of the noise.
            level: see `gaussian_log_prob`.
        """
        states, log_prob = [start], 0.0
        for k in range(len(self.steps)):
            index = torch.full((len(start),), k, device=start.device)
            mean, std = self._step(velocity, raw_std, states[-1], index)
            eps = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            states.append(mean + std * eps)
            log_prob = log_prob + gaussian_log_prob(states[-1], mean, std, self.counted, level)
        return Chain(states[-1], torch.stack(states, dim=1), log_prob)

    def score(self, velocity: Velocity, raw_std: Velocity, states: Tensor, level: RatioLevel = "chunk") -> ChainScore:
        """Log-probability and entropy of a chain's states given its first, with gradients; the model runs K times.

        Args:
            velocity, raw_std: as of `sample`.
            states: of a `Chain`.
            level: see `gaussian_log_prob`.
        """
        log_prob, entropy = 0.0, 0.0
        for k in range(len(self.steps)):
            index = torch.full((len(states),), k, device=states.device)
            mean, std = self._step(velocity, raw_std, states[:, k].contiguous(), index)
            log_prob = log_prob + gaussian_log_prob(states[:, k + 1], mean, std, self.counted, level)
            entropy = entropy + gaussian_entropy(std.expand_as(mean), self.counted)
        return ChainScore(log_prob, entropy)

    def _step(self, velocity: Velocity, raw_std: Velocity, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        mean, _ = _euler(velocity, x, index, self.steps)
        return mean, self.bounded(raw_std(x, self.steps.time(index, x.dtype)))
