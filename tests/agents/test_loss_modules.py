"""What the loss is handed says what TorchRL's own modules would."""

from __future__ import annotations

import torch
from torchrl.modules import ProbabilisticActor, ValueOperator
from worlds import rollout_batch, small_model

from agents.loss_modules import EvaluatedActions, ScoringActor, ScoringCritic
from agents.policy import VLAPolicy


def test_scores_are_those_that_torchrls_own_detour_gives():
    policy = VLAPolicy(small_model())
    batch = rollout_batch(policy)
    assert isinstance(policy.actor, ProbabilisticActor) and isinstance(policy.critic, ValueOperator)
    ours, theirs = batch.clone(), batch.clone()
    distribution = policy.actor.get_dist(ours)
    detour = ProbabilisticActor.get_dist(policy.actor, theirs)
    assert isinstance(distribution, EvaluatedActions) and isinstance(detour, EvaluatedActions)
    assert torch.equal(distribution.log_prob(None), detour.log_prob(None))
    assert torch.equal(distribution.entropy(), detour.entropy())
    assert torch.equal(policy.critic(ours)["state_value"], ValueOperator.forward(policy.critic, theirs)["state_value"])
    torch.testing.assert_close(ours["state_value"], batch["state_value"])  # the weights have not moved


def test_they_are_the_modules_of_every_policy():
    policy = VLAPolicy(small_model())
    assert type(policy.actor) is ScoringActor and type(policy.critic) is ScoringCritic
