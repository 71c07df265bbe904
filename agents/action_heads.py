"""Action heads: from `hidden` to a distribution over actions `[B, A]`.

Both store what was sampled, unclamped, so that the ratio of the first PPO minibatch is exactly 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, constraints
from torchrl.modules import IndependentNormal


class GaussianHead(nn.Module):
    """Diagonal Gaussian: the mean is an MLP of `hidden`, the standard deviation a learnable vector kept in bounds.

    The bounds hold by construction, std = min * (max / min)^sigmoid(s), so that neither a collapsing nor an exploding
    exploration noise can be learned.

    Args:
        hidden_size: D of `hidden` `[B, D]`.
        action_dim: A.
        width: units of the one hidden layer.
        init_std, min_std, max_std: standard deviation at the start, and its bounds.
    """

    def __init__(self, hidden_size: int, action_dim: int, width: int = 128, init_std=0.3, min_std=0.05, max_std=1.0):
        super().__init__()
        if not 0 < min_std < init_std < max_std:
            raise ValueError(f"need 0 < min_std < init_std < max_std, got {min_std}, {init_std}, {max_std}")
        self.mean = nn.Sequential(nn.Linear(hidden_size, width), nn.ReLU(), nn.Linear(width, action_dim))
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

    def forward(self, hidden: Tensor) -> IndependentNormal:
        mean = self.mean(hidden).float()
        return IndependentNormal(mean, self.std().expand_as(mean))


class TokenHead(nn.Module):
    """Each action dimension is one of `bins` tokens, evenly spaced over [low, high] (RT-1, OpenVLA).

    Args:
        hidden_size: D of `hidden` `[B, D]`.
        action_dim: A.
        bins: tokens per dimension.
        width: units of the one hidden layer.
        temperature: sampling temperature; log-probabilities are taken at the same one.
    """

    def __init__(self, hidden_size: int, action_dim: int, bins: int = 32, width: int = 128, temperature: float = 1.0):
        super().__init__()
        if bins < 2 or temperature <= 0:
            raise ValueError(f"need bins >= 2 and temperature > 0, got {bins} and {temperature}")
        self.action_dim, self.bins, self.temperature = action_dim, bins, temperature
        self.logits = nn.Sequential(nn.Linear(hidden_size, width), nn.ReLU(), nn.Linear(width, action_dim * bins))

    def forward(self, hidden: Tensor) -> ActionTokens:
        logits = self.logits(hidden).float().unflatten(-1, (self.action_dim, self.bins))
        return ActionTokens(logits / self.temperature)


class ActionTokens(Distribution):
    """Independent categoricals over evenly spaced action values.

    A sample is the tokens' values, not their ids: environments take it as it is, and the id is recovered exactly.

    Args:
        logits: `[*B, A, K]`.
        low, high: values of the first and the last token.
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.independent(constraints.real, 1)

    def __init__(self, logits: Tensor, low: float = -1.0, high: float = 1.0):
        self.tokens = Categorical(logits=logits, validate_args=False)
        self.low, self.high, self.bins = low, high, logits.shape[-1]
        super().__init__(logits.shape[:-2], logits.shape[-2:-1], validate_args=False)

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
        token = ((value - self.low) * ((self.bins - 1) / (self.high - self.low))).round().long()
        return self.tokens.log_prob(token.clamp(0, self.bins - 1)).sum(dim=-1)

    def entropy(self) -> Tensor:
        return self.tokens.entropy().sum(dim=-1)
