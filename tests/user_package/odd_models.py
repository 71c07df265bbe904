"""Three-method models over proprioception, each with one habit that public bug reports describe."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributions import Independent, Normal


class Plain(nn.Module):
    def __init__(self, action_dim: int = 1):
        super().__init__()
        self.vision_encoder = nn.Linear(3, 16)
        self.trunk = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.action_head = nn.Linear(16, action_dim)
        self.log_std = nn.Parameter(torch.full((action_dim,), -1.0))
        self.value_head = nn.Linear(16, 1)

    def hidden(self, observations):
        return self.trunk(torch.tanh(self.vision_encoder(observations["proprio"])))

    def policy(self, observations):
        return Independent(Normal(self.action_head(self.hidden(observations)), self.log_std.exp()), 1)

    def forward(self, observations, deterministic=False):
        policy = self.policy(observations)
        return policy.mean if deterministic else policy.sample()

    def get_value(self, observations):
        return self.value_head(self.hidden(observations).detach())

    def evaluate_actions(self, observations, actions):
        policy = self.policy(observations)
        return policy.log_prob(actions), policy.entropy()


class BFloat16(Plain):
    """Weights as large checkpoints are loaded."""

    def __init__(self, action_dim: int = 1):
        super().__init__(action_dim)
        self.to(torch.bfloat16)

    def hidden(self, observations):
        return self.trunk(torch.tanh(self.vision_encoder(observations["proprio"].to(torch.bfloat16))))

    def policy(self, observations):
        mean = self.action_head(self.hidden(observations)).float()
        return Independent(Normal(mean, self.log_std.float().exp()), 1)

    def get_value(self, observations):
        return super().get_value(observations).float()


class WithDropout(Plain):
    def __init__(self, action_dim: int = 1):
        super().__init__(action_dim)
        self.trunk = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.5))


class ForcesTrain(WithDropout):
    """Calls train() in its own forward pass."""

    def hidden(self, observations):
        self.train()
        return super().hidden(observations)


class BatchNormEncoder(Plain):
    def __init__(self, action_dim: int = 1):
        super().__init__(action_dim)
        self.vision_encoder = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16))


class KeepsTheLastDimension(Plain):
    """Log-probabilities [B, 1], which would broadcast."""

    def evaluate_actions(self, observations, actions):
        policy = self.policy(observations)
        return policy.log_prob(actions)[:, None], policy.entropy()


class ClampsBeforeScoring(Plain):
    def forward(self, observations, deterministic=False):
        return super().forward(observations, deterministic).clamp(-0.1, 0.1)


class ReturnsNothingFromTrain(Plain):
    """Keeps a part in eval mode, as backbones of other libraries do, and forgets that `train` returns the model."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.vision_encoder.eval()


class CountsItsHeads(Plain):
    """A transformer's number of heads has the name of an option of this project."""

    heads = 8


class DrawsColdly(Plain):
    """Half the deviation in drawing that it scores with."""

    def forward(self, observations, deterministic=False):
        mean = self.policy(observations).mean
        return mean if deterministic else mean + (self.policy(observations).sample() - mean) / 2


class KeepsFeatures(Plain):
    """The value is of the features that another method has left."""

    def hidden(self, observations):
        self.kept = super().hidden(observations)
        return self.kept

    def get_value(self, observations):
        return self.value_head(self.kept.detach())
