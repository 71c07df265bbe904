"""StateMLP: two small networks on `proprio` alone, for trying out an environment, its rewards and the settings of PPO.

    proprio ─ normalisation ─ hidden [B, P] ─┬─ action_head: 64, 64 ─ mean, or logits
                                             └─ value_head:  64, 64 ─ value

It is the MlpPolicy of Stable-Baselines3, weights at the start included, so that what is learned here can be compared
with what is learned there (`experiments/ppo_parity.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.modules import IndependentNormal

from agents.action_heads import CategoricalHead
from agents.normalisation import RunningNormalisation
from agents.vla import StagedVLA
from research.schema import HIDDEN, OBSERVATION, PROPRIO


class StateMLP(StagedVLA):
    """See the module's docstring; policy and value have no weight in common.

    Args:
        action_dim: A.
        proprio_dim: P of `proprio` `[B, P]`.
        hidden_sizes: units of the layers of either network, tanh between them.
        log_std: logarithm of the standard deviation at the start, which does not depend on the state.
        action_choices: how many choices each component of a discrete action has; None: actions are continuous.
    """

    observation_keys = (PROPRIO,)

    def __init__(
        self,
        action_dim: int,
        proprio_dim: int,
        hidden_sizes: Sequence[int] = (64, 64),
        log_std: float = 0.0,
        action_choices: Sequence[int] | None = None,
    ):
        super().__init__()
        self.normalisation = RunningNormalisation(proprio_dim)
        if action_choices is None:
            self.action_head = StateGaussian(mlp((proprio_dim, *hidden_sizes, action_dim), 0.01), action_dim, log_std)
        else:
            self.action_head = CategoricalHead(proprio_dim, action_dim, action_choices)
            outputs = self.action_head.logits[-1].out_features
            self.action_head.logits = mlp((proprio_dim, *hidden_sizes, outputs), 0.01)
        self.value_head = mlp((proprio_dim, *hidden_sizes, 1), 1.0)

    def stages(self) -> list[TensorDictModule]:
        return [TensorDictModule(self.normalisation, in_keys=[(OBSERVATION, PROPRIO)], out_keys=[HIDDEN])]

    def action_distribution(self, hidden: Tensor) -> Distribution:
        return self.action_head(hidden)

    def value(self, hidden: Tensor) -> Tensor:
        return self.value_head(hidden)


class StateGaussian(nn.Module):
    """A diagonal Gaussian whose mean is a network's output, and whose deviation is a vector of its own.

    Args:
        mean: `[B, P]` -> `[B, A]`.
        action_dim: A.
        log_std: at the start.
    """

    def __init__(self, mean: nn.Module, action_dim: int, log_std: float):
        super().__init__()
        self.mean = mean
        self.log_std = nn.Parameter(torch.full((action_dim,), float(log_std)))

    def forward(self, hidden: Tensor) -> IndependentNormal:
        mean = self.mean(hidden).float()
        return IndependentNormal(mean, self.log_std.exp().expand_as(mean))


def mlp(sizes: Sequence[int], last_gain: float) -> nn.Sequential:
    """Linear layers with tanh between them; orthogonal weights of gain sqrt(2), the last layer's its own; biases 0."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    linear = layers[:-1:2]
    for layer in linear:
        nn.init.orthogonal_(layer.weight, last_gain if layer is linear[-1] else math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers[:-1])
