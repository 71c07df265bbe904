"""The loss is TorchRL's, on the modules themselves, with this project's settings."""

from __future__ import annotations

from worlds import small_model

from agents.policy import VLAPolicy
from research.config import PPOConfig
from research.training.loss import make_loss


def test_it_is_on_the_modules_and_weighted_as_configured():
    policy = VLAPolicy(small_model())
    loss = make_loss(policy.actor, policy.critic, PPOConfig(clip_coef=0.3, ent_coef=0.02, vf_coef=0.7))
    assert loss.actor_network is policy.actor and loss.critic_network is policy.critic
    assert abs(float(loss.clip_epsilon) - 0.3) < 1e-6
    assert abs(float(loss.critic_coeff) - 0.7) < 1e-6 and abs(float(loss.entropy_coeff) - 0.02) < 1e-6
    assert make_loss(policy.actor, None, PPOConfig()).critic_network is None
