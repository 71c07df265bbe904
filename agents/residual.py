"""A small policy that is added to a frozen one: what `policy.freeze: residual` trains, beside the value head.

Nothing of the pretrained model changes, its action head included. A network reads the features that the trunk wrote and
adds to the parameters of the pretrained distribution: to the mean of a Gaussian, whose deviation it scales, or to the
logits of tokens. Its last layer starts at zero, so that the policy starts as the pretrained one, bit for bit.

After PLD (Xiao et al. 2025, arXiv:2511.00091) and RLT (Physical Intelligence 2026, pi.website/research/rlt): small
actors that correct the actions of a frozen VLA, trained by off-policy actor-critics. Here the sum is one distribution
with a density, so that PPO and GRPO train it. Theirs read the action that they correct, too; here that is a function
of the features that the network reads.

The pretrained parameters depend on the observation alone. They are a frozen stage's outputs (`PretrainedPolicy`), which
a rollout keeps: an update runs nothing of the pretrained model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torchrl.modules import IndependentNormal

from agents.action_heads import ActionTokens
from agents.stages import run_stage
from research.errors import UserError
from research.schema import HIDDEN, OBSERVATION

RESIDUAL = "residual"  # the part's name in the model
MOST_SCALING = 5.0  # of a standard deviation, either way: exploration can neither collapse nor explode


class Residual(nn.Module):
    """What both kinds share: the network, from `hidden` `[B, D]` to what is added.

    Args:
        hidden_size: D.
        shape: of what is added to the parameters of one row.
        units: of the one hidden layer.
    """

    keys: ClassVar[tuple[str, ...]]
    """Under which the pretrained distribution's parameters are kept."""

    def __init__(self, hidden_size: int, shape: tuple[int, ...], units: int):
        super().__init__()
        self.shape = shape
        last = nn.Linear(units, math.prod(shape))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(nn.Linear(hidden_size, units), nn.ReLU(), last)

    def added(self, hidden: Tensor) -> Tensor:
        """`[B, *shape]`, float32; zeros at the start."""
        return self.network(hidden.float()).float().unflatten(-1, self.shape)


class GaussianResidual(Residual):
    """Moves the mean, and scales the standard deviation of each number of an action by a factor of its own.

    The factor is within 1 / `MOST_SCALING` and `MOST_SCALING`, and does not depend on the observation. A frozen
    deviation would leave the noise of imitation to the end of training.

    Args:
        hidden_size, units: see `Residual`.
        pretrained: the frozen policy at some observations: independent normals `[B, A]` or `[B, H, A]`.
    """

    keys = ("pretrained_mean", "pretrained_std")

    def __init__(self, hidden_size: int, pretrained: Independent, units: int):
        super().__init__(hidden_size, tuple(pretrained.event_shape), units)
        self.raw_scale = nn.Parameter(torch.zeros(self.shape[-1]))

    @staticmethod
    def parameters_of(pretrained: Independent) -> tuple[Tensor, Tensor]:
        return pretrained.base_dist.loc, pretrained.base_dist.scale

    def forward(self, hidden: Tensor, mean: Tensor, std: Tensor) -> IndependentNormal:
        factor = torch.exp(math.log(MOST_SCALING) * torch.tanh(self.raw_scale))
        return IndependentNormal(mean.float() + self.added(hidden), std.float() * factor, event_dim=len(self.shape))


class TokenResidual(Residual):
    """Adds to the logits of every token.

    Args:
        hidden_size, units: see `Residual`.
        pretrained: the frozen policy at some observations.
    """

    keys = ("pretrained_logits",)

    def __init__(self, hidden_size: int, pretrained: ActionTokens, units: int):
        super().__init__(hidden_size, (*pretrained.event_shape, pretrained.bins), units)
        self.low, self.high = pretrained.low, pretrained.high

    @staticmethod
    def parameters_of(pretrained: ActionTokens) -> tuple[Tensor]:
        return (pretrained.logits,)

    def forward(self, hidden: Tensor, logits: Tensor) -> ActionTokens:
        return ActionTokens(logits.float() + self.added(hidden), self.low, self.high, event_dim=len(self.shape) - 1)


class PretrainedPolicy(nn.Module):
    """`hidden` to the parameters of the frozen policy there: a stage without weights that train.

    The weights it uses are the model's, which the scope freezes, and are not listed as its own.
    """

    def __init__(self, residual: Residual, action_distribution: Callable[[Tensor], Distribution]):
        super().__init__()
        self.parameters_of, self.action_distribution = residual.parameters_of, action_distribution

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        found = self.parameters_of(self.action_distribution(hidden))
        return tuple(parameters.contiguous() for parameters in found)  # rows of their own, as they are kept


def residual_of(model: nn.Module) -> Residual | None:
    """The residual policy that was added to a model, if there is one."""
    part = getattr(model, RESIDUAL, None)
    return part if isinstance(part, Residual) else None


def pretrained_stage(model: nn.Module) -> TensorDictModule:
    """The stage behind a model's own that writes the parameters of its frozen policy."""
    residual = residual_of(model)
    module = PretrainedPolicy(residual, model.action_distribution)
    return TensorDictModule(module, in_keys=[HIDDEN], out_keys=list(residual.keys))


def residual_distribution(model: nn.Module, step: TensorDictBase) -> Distribution:
    """The policy with its residual, `[B]`, at a step whose stages have run, `pretrained_stage` or not."""
    residual, hidden = residual_of(model), step.get(HIDDEN)
    kept = [step.get(key, None) for key in residual.keys]
    if any(parameters is None for parameters in kept):
        kept = residual.parameters_of(model.action_distribution(hidden))
    return residual(hidden, *kept)


@torch.no_grad()
def policy_at(model: nn.Module, observations: TensorDictBase) -> tuple[Tensor, Distribution]:
    """`hidden` `[B, D]` and the distribution of actions at a few observations `[B]`.

    Raises:
        UserError: the model has no distribution at `hidden`.
    """
    name = type(model).__name__
    if not hasattr(model, "action_distribution"):
        raise UserError(
            f"policy.freeze: residual adds to the action distribution that a StagedVLA has at `hidden`, and {name} has "
            "none; use backbone or lora"
        )
    step = TensorDict({OBSERVATION: observations}, batch_size=observations.batch_size)
    with torch.random.fork_rng():
        for stage in model.stages():
            step = run_stage(stage, step)
        return step.get(HIDDEN), model.action_distribution(step.get(HIDDEN))


def add_residual(model: nn.Module, hidden: Tensor, pretrained: Distribution, units: int) -> None:
    """Give a model a residual policy, in place, as its part `residual`; weights are loaded before.

    Args:
        model: a `StagedVLA`, or a model with its methods.
        hidden, pretrained: see `policy_at`; only their shapes are read.
        units: of the residual's hidden layer.
    Raises:
        UserError: the model has a part of that name, or a distribution of another kind.
    """
    name = type(model).__name__
    if hasattr(model, RESIDUAL):
        raise UserError(f"policy.freeze: residual adds a part of that name, and {name} has one; rename that")
    gaussian = isinstance(pretrained, Independent) and type(pretrained.base_dist) is Normal
    if not gaussian and not isinstance(pretrained, ActionTokens):
        raise UserError(
            f"policy.freeze: residual adds to the mean of independent normals or to the logits of ActionTokens, and "
            f"the distribution of {name} is {type(pretrained).__name__}; use backbone or lora"
        )
    kind = GaussianResidual if gaussian else TokenResidual
    model.residual = kind(hidden.shape[-1], pretrained, units).to(next(model.parameters()).device)
