"""Ratios of chunks, of actions and of numbers: the same decision, the same gradient at the start, the same KL."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.distributions import Independent, MixtureSameFamily, Normal
from worlds import gae, small_model

from agents.action_heads import ActionTokens
from agents.policy import VLAPolicy
from agents.ratio_level import LEVELS, at_level, log_prob_at
from envs.tabletop import TabletopEnv
from research.config import PPOConfig
from research.errors import UserError
from research.training.loss import make_loss
from research.training.ppo import PolicyUpdate
from research.training.rollout import Rollouts
from research.training.vtrace import VTraceAdvantages

CHUNK = 2
SHAPES = {"chunk": (32,), "action": (32, CHUNK), "token": (32, CHUNK * 3)}


def test_parts_of_what_numbers_have():
    each = torch.arange(12.0).view(2, 3, 2)
    assert at_level(each, "chunk").tolist() == [15.0, 51.0]
    assert at_level(each, "action").tolist() == [[1.0, 5.0, 9.0], [13.0, 17.0, 21.0]]
    assert at_level(each, "token").tolist() == [list(range(6)), list(range(6, 12))]


@pytest.mark.parametrize("chunk", [True, False])
@pytest.mark.parametrize("kind", ["gaussian", "tokens"])
def test_parts_of_a_distribution_add_up_to_it(kind, chunk):
    shape = (5, 4, 3) if chunk else (5, 3)
    if kind == "gaussian":
        distribution = Independent(Normal(torch.randn(shape), 0.3), 2 if chunk else 1)
    else:
        distribution = ActionTokens(torch.randn(*shape, 7), event_dim=2 if chunk else 1)
    action = distribution.sample()
    whole = distribution.log_prob(action)
    for level, parts in (("action", 4 if chunk else 1), ("token", 12 if chunk else 3)):
        found = log_prob_at(distribution, action, level)
        assert found.shape == (5, parts)
        torch.testing.assert_close(found.sum(dim=1), whole)


def test_a_distribution_of_whole_actions_is_refused():
    components = Independent(Normal(torch.randn(5, 2, 3), 1.0), 1)
    mixture = MixtureSameFamily(torch.distributions.Categorical(torch.ones(5, 2)), components)
    with pytest.raises(UserError, match="policy.ratio_level: token needs .* MixtureSameFamily does not have"):
        log_prob_at(mixture, torch.randn(5, 3), "token")


class ThreeMethods(nn.Module):
    """Its log-probability is one number for an action."""

    def forward(self, observations):
        return torch.zeros(len(observations), 3)

    def get_value(self, observations):
        return torch.zeros(len(observations), 1)

    def evaluate_actions(self, observations, actions):
        return torch.zeros(len(actions)), torch.zeros(len(actions))


def test_a_model_that_knows_whole_decisions_alone_is_refused():
    with pytest.raises(UserError, match="ThreeMethods has a log-probability of each chunk, and not of each action"):
        VLAPolicy(ThreeMethods(), ratio_level="action")


def policy_at(level: str) -> VLAPolicy:
    torch.manual_seed(0)
    return VLAPolicy(small_model(options={"horizon": CHUNK}), ratio_level=level)


def rollout_of(policy: VLAPolicy) -> TensorDict:
    torch.manual_seed(1)
    world = TabletopEnv(4, "reach", modalities=["rgb", "proprio", "language"], image_size=32, chunk=CHUNK)
    return Rollouts(world, policy, 32).next()


def update_of(policy: VLAPolicy, **cfg) -> PolicyUpdate:
    settings = PPOConfig(**{"learning_rate": 1e-3, "batch_size": 32, "n_epochs": 1, "max_grad_norm": 1e9, **cfg})
    optimizer = torch.optim.SGD([{"params": list(policy.model.parameters()), "name": "model"}], lr=1e-3)
    return PolicyUpdate(make_loss(policy.actor, policy.critic, settings), optimizer, settings)


def test_before_the_first_step_the_gradient_is_the_same_at_every_level():
    gradients = []
    for level in LEVELS:
        policy = policy_at(level)
        batch, _ = gae(policy)(rollout_of(policy))
        assert batch["action_log_prob"].shape == SHAPES[level]
        update = update_of(policy)
        update._accumulate(batch, value_only=False)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    assert gradients[0].abs().max() > 0.01
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


def test_divergence_and_clipping_count_decisions_and_ratios():
    """By hand: every number's log-ratio is known, and a tenth of the numbers is beyond the clip."""
    for level in LEVELS:
        policy = policy_at(level)
        batch, _ = gae(policy)(rollout_of(policy))
        shift = torch.zeros(32, CHUNK, 3)
        shift[:16, 1, 2] = 0.5  # of half of the decisions, one number of one action
        shift[:, 0, 0] = 0.01
        batch["action_log_prob"] = batch["action_log_prob"] - at_level(shift, level)
        update = update_of(policy, clip_coef=0.2)
        measured = dict(zip(update.measured, update._accumulate(batch, False).tolist(), strict=True))
        k3 = lambda log_ratio: log_ratio.exp() - 1 - log_ratio  # noqa: E731
        ratios = at_level(shift, level).reshape(32, -1)
        assert measured["kl_approx"] == pytest.approx(k3(ratios).sum(dim=1).mean().item(), rel=1e-3)
        assert measured["clip_fraction"] == pytest.approx({"chunk": 1 / 2, "action": 1 / 4, "token": 1 / 12}[level])
    # Of a decision at every level: not 6 times as much for 6 numbers, nor a sixth.
    assert k3(torch.tensor(0.5)) / 2 < measured["kl_approx"] < 1.1 * k3(torch.tensor(0.5)) / 2


def test_importance_weights_of_older_weights_are_those_of_whole_decisions():
    weights = []
    for level in LEVELS:
        policy = policy_at(level)
        rollout = rollout_of(policy)
        log_prob = rollout["action_log_prob"]  # [N, T], or [N, T, L]
        rollout["action_log_prob"] = log_prob + 0.06 / log_prob[0, 0].numel()
        batch, metrics = VTraceAdvantages(policy, 0.9, 0.8)(rollout)
        weights.append(metrics["rollout/importance_weight"])
        assert batch["action_log_prob"].shape == SHAPES[level] and batch["advantage"].shape == (32, 1)
    assert weights == pytest.approx([torch.tensor(-0.06).exp().item()] * 3, abs=1e-4)
