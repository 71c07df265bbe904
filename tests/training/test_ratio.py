"""Before the first update the ratio is 1, or a warning says why it may not be."""

from __future__ import annotations

import ppo_vla
import pytest
import torch
from worlds import INTERFACES, WRAP, rollout_batch, small_model, write_config

from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from research.training.ratio import (
    clamped_share,
    describe_clamping,
    describe_draws,
    describe_jump,
    describe_ratio,
    doubts,
    largest_log_ratio,
)


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


def drawing(habit: str, interface: str = "methods") -> torch.nn.Module:
    """A model whose method that draws, and no other, has a habit: what it draws is not what it scores."""
    torch.manual_seed(0)
    model = WRAP[interface](small_model())
    change = {
        "none": lambda mean, action: action,
        "cold": lambda mean, action: mean + 0.5 * (action - mean),
        "hot": lambda mean, action: mean + 1.5 * (action - mean),
        "mode": lambda mean, action: mean,
        "squashed": lambda mean, action: (2 * action).tanh() / 2,
    }[habit]

    def draw(observations, deterministic=False):
        policy = model.model.action_distribution(model.model.encode(observations))
        return change(policy.mean, policy.sample())

    def act(observations, deterministic=False):
        action = draw(observations)
        return action, *model.evaluate(observations, action)[::2]

    model.forward = draw
    if interface == "fused":
        model.act = act
    return model


@pytest.mark.parametrize("interface", ["methods", "fused"])
@pytest.mark.parametrize(
    ("habit", "seen"),
    [("none", None), ("cold", "more"), ("hot", "less"), ("mode", "more"), ("squashed", "more")],
)
def test_methods_that_draw_from_another_distribution_than_they_score_are_seen(habit, seen, interface):
    """Their ratio is 1, as both sides of it are scored."""
    policy = VLAPolicy(drawing(habit, interface))
    batch = rollout_batch(policy, 64)
    assert largest_log_ratio(policy, batch) < 1e-4
    told = [line for line in doubts(policy, batch, 512, "off", 0.0) if "likely than draws" in line]
    assert len(told) == (seen is not None) and (seen is None or f"actions are {seen} likely" in told[0])


def test_draws_are_doubted_by_what_a_log_probability_is_in_the_mean():
    """Of a standard normal it is minus its entropy, log(2 pi e) / 2 a number; few rows, or no entropy, tell nothing."""
    draws = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    log_prob = lambda x: -(x.square() + torch.log(torch.tensor(2 * torch.pi))).sum(1) / 2  # noqa: E731
    entropy = torch.full((4000,), torch.log(torch.tensor(2 * torch.pi * torch.e)).item())
    assert describe_draws(log_prob(draws), entropy) is None
    assert "log_prob is -2.2" in describe_draws(log_prob(0.6 * draws), entropy)
    assert "says -1.42" in describe_draws(log_prob(draws), entropy / 2)  # the mean over the numbers of an action
    assert describe_draws(log_prob(0.6 * draws)[:20], entropy[:20]) is None
    assert describe_draws(log_prob(draws), torch.zeros(4000)) is None


def test_an_update_that_moved_the_policy_far_is_told():
    assert describe_jump(0.3, 4096) is None and describe_jump(float("nan"), 4096) is None
    assert "at 32,768 env steps moved the policy by a KL of 7.4 nats" in describe_jump(7.42, 32_768)
