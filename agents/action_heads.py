"""Action heads: from `hidden` to a distribution over actions `[B, A]`, or over chunks of them, `[B, H, A]`.

All store what was sampled, unclamped, so that the ratio of the first PPO minibatch is exactly 1.

A head plans `horizon` control steps. The environment executes the first `executed` of them, and the distribution is
over those alone: what is never executed has no consequences, and would only add noise to the ratio. One step executed
is an action `[A]`, more are a chunk `[executed, A]`. `plan` is what imitation compares with a demonstration, all of it.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, TransformedDistribution, constraints
from torchrl.modules import IndependentNormal

from research.errors import UserError

log = logging.getLogger(__name__)


def mode_of(distribution: Distribution) -> Tensor:
    """What a policy does when asked for its mode: the likeliest action, or what comes nearest in closed form.

    TorchRL's distributions say it themselves (`deterministic_sample`). Of torch's it is the mode where there is one;
    for a transformed distribution (a squashed Gaussian) the transform of its base's mode; for a mixture its mean.
    """
    if hasattr(distribution, "deterministic_sample"):
        return distribution.deterministic_sample
    if isinstance(distribution, Independent):
        return mode_of(distribution.base_dist)
    if isinstance(distribution, TransformedDistribution):
        action = mode_of(distribution.base_dist)
        for transform in distribution.transforms:
            action = transform(action)
        return action
    try:
        return distribution.mode
    except NotImplementedError:
        return distribution.mean


def entropy_of(distribution: Distribution) -> Tensor:
    """Entropy `[B]`, in nats; estimated from one sample, and that is said, where there is no formula for it.

    The estimate has the gradient of the entropy, in the mean: through the sample where it can be drawn so, else by the
    score function, grad H = -E[log p grad log p] (Williams 1992, doi:10.1007/BF00992696).
    """
    try:
        return distribution.entropy()
    except NotImplementedError:
        _say_estimated(type(distribution).__name__)
    if distribution.has_rsample:
        return -distribution.log_prob(distribution.rsample())
    log_prob = distribution.log_prob(distribution.sample())
    known = log_prob.detach()
    return -known - known * (log_prob - known)


@lru_cache
def _say_estimated(name: str) -> None:
    log.warning("the entropy of %s has no formula: it is estimated from one sample of each row", name)


class ActionHead(nn.Module):
    """What all heads share: how far they plan, and how much of it is executed.

    Args:
        action_dim: A.
        horizon: H, control steps that are planned.
        executed: those that are executed; None: all.
    """

    def __init__(self, action_dim: int, horizon: int, executed: int | None):
        super().__init__()
        executed = horizon if executed is None else executed
        if not 1 <= executed <= horizon:
            raise UserError(f"an action head executes 1 to horizon = {horizon} steps of its plan, got {executed}")
        self.horizon, self.executed, self.action_dim = horizon, executed, action_dim

    @property
    def event_dim(self) -> int:
        """Dimensions of what is executed: 1 for an action, 2 for a chunk."""
        return 1 if self.executed == 1 else 2

    def within(self, plan: Tensor, dim: int = -2) -> Tensor:
        """The part of a plan that is executed; `dim` is that of the H control steps, and is gone where one is."""
        return plan.select(dim, 0) if self.executed == 1 else plan.narrow(dim, 0, self.executed)

    @abstractmethod
    def plan(self, hidden: Tensor) -> Tensor:
        """The likeliest actions of the whole horizon, `[B, H, A]`, with gradients where there are any."""

    @abstractmethod
    def imitation_loss(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """How far the plan is from the actions of an expert, `[B, H, A]`, in each of them: `[B, H, A]`."""


class GaussianHead(ActionHead):
    """Diagonal Gaussian: the mean is an MLP of `hidden`, the standard deviation a learnable vector kept in bounds.

    The bounds hold by construction, std = min * (max / min)^sigmoid(s), so that neither a collapsing nor an exploding
    exploration noise can be learned.

    Args:
        hidden_size: D of `hidden` `[B, D]`.
        action_dim: A.
        width: units of the one hidden layer.
        init_std, min_std, max_std: standard deviation at the start, and its bounds.
        horizon, executed: see `ActionHead`.
    """

    def __init__(
        self,
        hidden_size: int,
        action_dim: int,
        width: int = 128,
        init_std=0.3,
        min_std=0.05,
        max_std=1.0,
        horizon: int = 1,
        executed: int | None = None,
    ):
        super().__init__(action_dim, horizon, executed)
        if not 0 < min_std < init_std < max_std:
            raise ValueError(f"need 0 < min_std < init_std < max_std, got {min_std}, {init_std}, {max_std}")
        self.mean = nn.Sequential(nn.Linear(hidden_size, width), nn.ReLU(), nn.Linear(width, horizon * action_dim))
        self.min_log_std, self.max_log_std = math.log(min_std), math.log(max_std)
        self.raw_std = nn.Parameter(torch.zeros(action_dim))
        self.set_std(init_std)

    @torch.no_grad()
    def set_std(self, std: float) -> None:
        """Set the standard deviation of every action dimension, within the bounds."""
        share = (math.log(std) - self.min_log_std) / (self.max_log_std - self.min_log_std)
        self.raw_std.fill_(math.log(share / (1 - share)))

    def std(self) -> Tensor:
        """`[A]`."""
        span = self.max_log_std - self.min_log_std
        return torch.exp(self.min_log_std + span * torch.sigmoid(self.raw_std))

    def plan(self, hidden: Tensor) -> Tensor:
        return self.mean(hidden).float().unflatten(-1, (self.horizon, self.action_dim))

    def imitation_loss(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """Squared error of the mean."""
        return (self.plan(hidden) - actions).square()

    def forward(self, hidden: Tensor) -> IndependentNormal:
        mean = self.within(self.plan(hidden))
        return IndependentNormal(mean, self.std().expand_as(mean), event_dim=self.event_dim)


class TokenHead(ActionHead):
    """Each action dimension is one of `bins` tokens, evenly spaced over [low, high] (RT-1, OpenVLA).

    Args:
        hidden_size: D of `hidden` `[B, D]`.
        action_dim: A.
        bins: tokens per dimension.
        width: units of the one hidden layer.
        temperature: sampling temperature; log-probabilities are taken at the same one.
        horizon, executed: see `ActionHead`.
    """

    def __init__(
        self,
        hidden_size: int,
        action_dim: int,
        bins: int = 32,
        width: int = 128,
        temperature: float = 1.0,
        horizon: int = 1,
        executed: int | None = None,
    ):
        super().__init__(action_dim, horizon, executed)
        if bins < 2 or temperature <= 0:
            raise ValueError(f"need bins >= 2 and temperature > 0, got {bins} and {temperature}")
        self.temperature, self.bins = temperature, bins
        outputs = horizon * action_dim * bins
        self.logits = nn.Sequential(nn.Linear(hidden_size, width), nn.ReLU(), nn.Linear(width, outputs))

    def planned_logits(self, hidden: Tensor) -> Tensor:
        """Of every token of the whole horizon, before the temperature: `[B, H, A, K]`."""
        return self.logits(hidden).float().unflatten(-1, (self.horizon, self.action_dim, self.bins))

    def plan(self, hidden: Tensor) -> Tensor:
        return ActionTokens(self.planned_logits(hidden), event_dim=2).mode

    def imitation_loss(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """Cross-entropy of the tokens nearest to the actions."""
        return _token_loss(ActionTokens(self.planned_logits(hidden), event_dim=2), actions)

    def forward(self, hidden: Tensor) -> ActionTokens:
        return ActionTokens(self.within(self.planned_logits(hidden), -3) / self.temperature, event_dim=self.event_dim)


class CategoricalHead(ActionHead):
    """Each action dimension is one of a number of choices of its own, a whole number from 0; for discrete actions.

    Args:
        hidden_size: D of `hidden` `[B, D]`.
        action_dim: A.
        choices: A numbers of choices.
        width: units of the one hidden layer.
        horizon, executed: see `ActionHead`.
    """

    def __init__(
        self,
        hidden_size: int,
        action_dim: int,
        choices: Sequence[int],
        width: int = 128,
        horizon: int = 1,
        executed: int | None = None,
    ):
        super().__init__(action_dim, horizon, executed)
        if len(choices) != action_dim or min(choices) < 1:
            raise UserError(f"action_choices needs {action_dim} numbers of at least 1, got {list(choices)}")
        self.most = max(2, *choices)
        outputs = horizon * action_dim * self.most
        self.logits = nn.Sequential(nn.Linear(hidden_size, width), nn.ReLU(), nn.Linear(width, outputs))
        absent = torch.arange(self.most) >= torch.tensor(choices)[:, None]
        self.register_buffer("absent", absent, persistent=False)  # [A, K]: no dimension has more than its choices

    def planned_logits(self, hidden: Tensor) -> Tensor:
        """Of every choice of the whole horizon, `[B, H, A, K]`."""
        logits = self.logits(hidden).float().unflatten(-1, (self.horizon, self.action_dim, self.most))
        return logits.masked_fill(self.absent, torch.finfo(logits.dtype).min / 2)

    def plan(self, hidden: Tensor) -> Tensor:
        return self._choices(self.planned_logits(hidden), event_dim=2).mode

    def imitation_loss(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """Cross-entropy of the choices."""
        return _token_loss(self._choices(self.planned_logits(hidden), event_dim=2), actions)

    def forward(self, hidden: Tensor) -> ActionTokens:
        return self._choices(self.within(self.planned_logits(hidden), -3), self.event_dim)

    def _choices(self, logits: Tensor, event_dim: int) -> ActionTokens:
        return ActionTokens(logits, low=0.0, high=self.most - 1.0, event_dim=event_dim)


HEADS = {"gaussian": GaussianHead, "tokens": TokenHead, "categorical": CategoricalHead}


def make_action_head(
    kind: str | None, hidden_size: int, action_dim: int, choices: Sequence[int] | None = None, **options
) -> nn.Module:
    """The action head of that name.

    Args:
        kind: one of `HEADS`; None takes "categorical" where there are `choices`, else "gaussian".
        hidden_size: D.
        action_dim: A.
        choices: how many choices each dimension has, where the environment takes choices; read by "categorical" alone.
        options: further arguments of the head.
    Raises:
        UserError: there is no head of that name, or nobody says what there is to choose from.
    """
    kind = kind or ("gaussian" if choices is None else "categorical")
    if kind not in HEADS:
        raise UserError(f"action_head is {' or '.join(map(repr, HEADS))}, got {kind!r}")
    if kind == "categorical":
        if choices is None:
            raise UserError("action_head 'categorical' needs action_choices; the environment's actions are continuous")
        options["choices"] = choices
    return HEADS[kind](hidden_size, action_dim, **options)


class ActionTokens(Distribution):
    """Independent categoricals over evenly spaced action values.

    A sample is the tokens' values, not their ids: environments take it as it is, and the id is recovered exactly.

    Args:
        logits: `[*B, A, K]`, or `[*B, H, A, K]` with two event dimensions.
        low, high: values of the first and the last token.
        event_dim: how many dimensions one action has: 1, or 2 for a chunk.
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.independent(constraints.real, 1)

    def __init__(self, logits: Tensor, low: float = -1.0, high: float = 1.0, event_dim: int = 1):
        self.tokens, self.logits = Categorical(logits=logits, validate_args=False), logits
        self.low, self.high, self.bins = low, high, logits.shape[-1]
        self._event = tuple(range(-event_dim, 0))
        batch = logits.shape[: -1 - event_dim]
        super().__init__(batch, logits.shape[len(batch) : -1], validate_args=False)

    def _value(self, token: Tensor) -> Tensor:
        return self.low + token * ((self.high - self.low) / (self.bins - 1))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self._value(self.tokens.sample(sample_shape).to(self.tokens.logits.dtype))

    @property
    def deterministic_sample(self) -> Tensor:
        """The likeliest value per dimension."""
        return self._value(self.tokens.logits.argmax(dim=-1).to(self.tokens.logits.dtype))

    @property
    def mode(self) -> Tensor:
        return self.deterministic_sample

    def log_prob(self, value: Tensor) -> Tensor:
        return self.token_log_prob(value).sum(dim=self._event)

    def token_log_prob(self, value: Tensor) -> Tensor:
        """Of the token nearest to each number of an action, `[*B, A]` or `[*B, H, A]`."""
        token = ((value - self.low) * ((self.bins - 1) / (self.high - self.low))).round().long()
        return self.tokens.log_prob(token.clamp(0, self.bins - 1))

    def entropy(self) -> Tensor:
        return self.tokens.entropy().sum(dim=self._event)


def _token_loss(distribution: ActionTokens, actions: Tensor) -> Tensor:
    return -distribution.token_log_prob(actions)
