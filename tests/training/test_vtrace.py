"""V-trace is the sum in the paper, and GAE where nothing is stale."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives.value import GAE
from worlds import gae, reach_env, reach_policy

from research.config import PPOConfig
from research.training.loss import make_loss
from research.training.rollout import Rollouts
from research.training.vtrace import VTraceAdvantages, vtrace

GAMMA, LAMBDA = 0.9, 0.8


CFG = PPOConfig(gamma=GAMMA, gae_lambda=LAMBDA)


def steps(n: int = 4, t: int = 9) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    terminated = torch.rand(n, t, 1, generator=g) < 0.15
    done = terminated | (torch.rand(n, t, 1, generator=g) < 0.15)
    assert (done & ~terminated)[:, :-1].any() and terminated[:, :-1].any()
    value, following, reward = (torch.randn(n, t, 1, generator=g, dtype=torch.float64) for _ in range(3))
    following = torch.where(terminated, 0.0, following)
    return {"reward": reward, "value": value, "next_value": following, "done": done, "terminated": terminated}


def test_without_staleness_vtrace_is_gae():
    s = steps()
    advantage = vtrace(**s, log_ratio=torch.zeros_like(s["reward"]), gamma=GAMMA, gae_lambda=LAMBDA)
    after = {k: s[k] for k in ("reward", "done", "terminated")} | {"state_value": s["next_value"]}
    td = TensorDict({"state_value": s["value"], "next": after}, batch_size=s["value"].shape[:2])
    GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=None)(td)
    torch.testing.assert_close(advantage, td["advantage"], rtol=0, atol=1e-6)  # TorchRL discounts in float32


def test_vtrace_is_the_sum_in_the_paper():
    """Espeholt et al. 2018, equation 1: the sum over the rest of the episode, written out."""
    s = steps()
    log_ratio = torch.randn(s["reward"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (log_ratio > 0).any() and (log_ratio < 0).any()
    advantage = vtrace(**s, log_ratio=log_ratio, gamma=GAMMA, gae_lambda=LAMBDA)
    weight = log_ratio.exp().clamp(max=1.0)
    n, t = s["reward"].shape[:2]
    for i in range(n):
        for first in range(t):
            total, product = 0.0, 1.0
            for k in range(first, t):
                v, following = s["value"][i, k, 0], 0.0 if s["terminated"][i, k] else s["next_value"][i, k, 0]
                total += product * weight[i, k, 0] * (s["reward"][i, k, 0] + GAMMA * following - v)
                product *= GAMMA * LAMBDA * weight[i, k, 0]
                if s["done"][i, k]:
                    break
            assert advantage[i, first, 0].item() == pytest.approx(float(total), abs=1e-12)


def test_a_fresh_rollout_is_prepared_as_without_staleness():
    policy = reach_policy()
    rollouts = Rollouts(reach_env(), policy, 4 * 8)
    rollout = rollouts.next()
    expected, _ = gae(policy, CFG)(rollout)
    batch, metrics = VTraceAdvantages(policy, GAMMA, LAMBDA)(rollout)
    assert metrics["rollout/importance_weight"] == pytest.approx(1, abs=1e-5)
    assert metrics["rollout/behaviour_kl"] == pytest.approx(0, abs=1e-6)
    assert set(batch.keys()) == set(expected.keys())
    for key in ("advantage", "value_target", "action_log_prob", "state_value", "action"):
        torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=1e-5)


def test_a_stale_rollout_is_scored_by_the_current_policy_and_weighted():
    policy = reach_policy()
    rollouts = Rollouts(reach_env(), policy, 4 * 8)
    rollout = rollouts.next()
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    batch, metrics = VTraceAdvantages(policy, GAMMA, LAMBDA)(rollout)
    assert metrics["rollout/importance_weight"] < 0.999 and metrics["rollout/behaviour_kl"] > 1e-4
    losses = make_loss(policy.actor, policy.critic, CFG)(batch.clone())
    assert losses["max_ratio"].item() == pytest.approx(1.0, abs=1e-5)  # around the current policy
    pieces, _ = VTraceAdvantages(policy, GAMMA, LAMBDA, micro_batch_size=5)(rollout)
    torch.testing.assert_close(pieces["advantage"], batch["advantage"], rtol=1e-4, atol=1e-5)
