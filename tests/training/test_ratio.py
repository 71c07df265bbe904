"""Before the first update the ratio is 1, or a warning says why it may not be."""

from __future__ import annotations

import ppo_vla
import pytest
import torch
from worlds import INTERFACES, WRAP, rollout_batch, small_model, write_config

from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from research.training.ratio import clamped_share, describe_clamping, describe_jump, describe_ratio, largest_log_ratio


@pytest.mark.parametrize("interface", INTERFACES)
def test_it_is_one_for_a_policy_that_is_scored_as_it_acts(interface):
    policy = VLAPolicy(WRAP[interface](small_model()))
    batch = rollout_batch(policy)
    state = torch.get_rng_state()
    assert largest_log_ratio(policy, batch, micro_batch_size=7) < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    batch["action_log_prob"][3] += 0.25
    assert largest_log_ratio(policy, batch) == pytest.approx(0.25, abs=1e-5)


def test_bf16_is_given_more_room():
    assert describe_ratio(5e-3, "bf16") is None and describe_ratio(5e-4, "off") is None
    assert "up to 0.005" in describe_ratio(5e-3, "off") and "below 0.01" in describe_ratio(0.02, "bf16")


class Rounding(SmallVLA):
    """Scores its decisions in coarser numbers than it drew them in."""

    score_is_exact = False

    def score(self, step):
        log_prob, entropy, value = super().score(step)
        return log_prob + (log_prob.detach() * 16).round() / 16 - log_prob.detach(), entropy, value


def test_where_the_score_is_not_exact_decisions_are_scored_anew_before_an_update():
    torch.manual_seed(0)
    model = Rounding(action_dim=3)
    policy = VLAPolicy(model)
    batch = rollout_batch(policy)
    assert largest_log_ratio(policy, batch) == 0 and not policy.score_is_exact
    model.score_is_exact = True  # as if it were
    unprepared = rollout_batch(policy)
    assert 0.01 < largest_log_ratio(policy, unprepared) < 1 / 32 + 1e-5
    for key in ("action", "advantage", "value_target", "state_value"):
        assert torch.equal(batch[key], unprepared[key])


class Clamped(SmallVLA):
    """Clamps what it drew before it is scored."""

    def decide(self, step, deterministic):
        step = super().decide(step, deterministic)
        return step.set("action", step["action"].clamp(-0.05, 0.05))


@pytest.mark.slow
@pytest.mark.parametrize("buffer", ["standard", "vla"])
@pytest.mark.parametrize(("model", "warned"), [("agents.small_vla.SmallVLA", False), ("test_ratio.Clamped", True)])
def test_a_run_warns_once_of_one_that_is_not(tmp_path, caplog, model, warned, buffer):
    config = write_config(
        tmp_path, policy__vla_config__model_class=model, trainer__enable_eval=False, trainer__buffer_type=buffer
    )
    assert ppo_vla.main(["--config", str(config)]) == 0
    assert sum("is not the one that acted" in message for message in caplog.messages) == warned


def test_actions_that_were_clamped_after_they_were_drawn_are_seen():
    torch.manual_seed(0)
    drawn = torch.randn(512, 3)
    assert clamped_share(drawn) == 0 and describe_clamping(0.0) is None
    clamped = drawn.clone()
    clamped[:, 1].clamp_(-1, 1)
    expected = ((drawn[:, 1].abs() >= 1).sum().item() - 2) / 512
    assert clamped_share(clamped) == pytest.approx(expected) and expected > 0.25
    assert "31%" in describe_clamping(0.31) and "forward() clamped" in describe_clamping(0.31)
    assert clamped_share((drawn.clamp(-1, 1) * 16).round() / 16) == 0  # tokens repeat anywhere
    assert clamped_share(clamped[:16]) == 0  # too few to tell


def test_an_update_that_moved_the_policy_far_is_told():
    assert describe_jump(0.3, 4096) is None and describe_jump(float("nan"), 4096) is None
    assert "at 32,768 env steps moved the policy by a KL of 7.4 nats" in describe_jump(7.42, 32_768)
