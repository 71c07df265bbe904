"""One model, three interfaces: the same actions, losses and gradients, and no trunk pass too many."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn
from torch.distributions import Independent, Normal
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, ValueOperator
from worlds import (
    INTERFACES,
    LOSS_KEYS,
    WRAP,
    ThreeMethods,
    count_calls,
    gae,
    gradients_of,
    rollout_batch,
    small_model,
    total_loss,
    value_head,
)

from agents.policy import VLAPolicy
from envs.tabletop import TabletopEnv
from research.config import PPOConfig
from research.schema import with_text_as
from research.training.algorithm import Progress
from research.training.freezing import freeze, parameter_groups
from research.training.loss import make_loss
from research.training.ppo import PPO, PolicyUpdate
from research.training.rollout import Rollouts

HEADS = [("gaussian", {}), ("tokens", {"bins": 11})]


@pytest.mark.parametrize(("head", "options"), HEADS)
@pytest.mark.parametrize("critic_gradient", ["head", "trunk"])
def test_all_interfaces_give_equal_losses_and_gradients(head, options, critic_gradient):
    reference = None
    batch = rollout_batch(VLAPolicy(small_model(head, options)))
    batch["action_log_prob"] += 0.1 * torch.randn(len(batch))  # away from ratio 1, where clipping matters
    for name in INTERFACES:
        model = small_model(head, options)
        policy = VLAPolicy(WRAP[name](model))
        assert policy.interface == name
        losses = total_loss(policy, batch.clone())
        optimizer = torch.optim.SGD([{"params": list(model.parameters()), "name": "all"}], lr=0.1)
        loss, apart = make_loss(policy.actor, policy.critic, PPOConfig()), critic_gradient == "head"
        update = PolicyUpdate(loss, optimizer, PPOConfig(), value_head(model), critic_apart=apart)
        update._backward(losses, value_only=False, share=1.0)
        got = [losses[k].detach() for k in ("loss_objective", "loss_critic", "loss_entropy")]
        got += [p.grad for p in model.parameters() if p.grad is not None]
        assert len(got) > 20
        reference = reference or got
        assert len(reference) == len(got)
        for a, b in zip(reference, got, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("exploration", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC, ExplorationType.MODE])
@pytest.mark.parametrize(("head", "options"), HEADS)
def test_acting_is_what_torchrls_modules_do(head, options, exploration):
    """The same bits, and the same random numbers drawn, as from TorchRL's own modules around stages and heads."""
    model = small_model(head, options)
    freeze(model, ["vision_encoder"])
    policy = VLAPolicy(model)
    actor = ProbabilisticActor(
        policy.rest,
        in_keys={"hidden": "hidden"},
        out_keys=["action"],
        distribution_class=model.action_distribution,
        return_log_prob=True,
    )
    critic = ValueOperator(model.value_head, in_keys=["hidden"], out_keys=["state_value"])
    step = TabletopEnv(8, modalities=["rgb", "proprio", "language"]).reset()
    results = []
    for act in (policy.act, TensorDictSequential(policy.frozen, actor, critic)):
        torch.manual_seed(7)
        with torch.no_grad(), set_exploration_type(exploration):
            results.append((act(step.copy()), torch.rand(1)))
    (ours, then), (theirs, then_too) = results
    assert torch.equal(then, then_too) and set(ours.keys(True)) == set(theirs.keys(True))
    assert (ours == theirs).all()
    assert torch.equal(policy.actor.get_dist(ours).log_prob(ours["action"]), ours["action_log_prob"])


@pytest.mark.parametrize(("head", "options"), HEADS)
@pytest.mark.parametrize("interface", INTERFACES)
def test_ratio_is_one_at_the_first_minibatch(head, options, interface):
    policy = VLAPolicy(WRAP[interface](small_model(head, options)))
    batch = rollout_batch(policy)
    losses = total_loss(policy, batch[torch.randperm(len(batch))[:16]])
    assert losses["kl_approx"].abs().item() < 1e-6
    assert losses["clip_fraction"].item() == 0
    assert losses["max_ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert losses["mean_ratio"].item() == pytest.approx(1.0, abs=1e-5)


class HalfSamples(nn.Module):
    """Three methods that draw in the precision of their layers, as a model's author writes them."""

    def __init__(self):
        super().__init__()
        self.layer, self.value_head = nn.Linear(3, 3), nn.Linear(3, 1)

    def distribution(self, observations):
        return Independent(Normal(self.layer(observations["proprio"]), 0.1), 1)

    def forward(self, observations):
        return self.distribution(observations).sample()

    def get_value(self, observations):
        return self.value_head(observations["proprio"])

    def evaluate_actions(self, observations, actions):
        distribution = self.distribution(observations)
        return distribution.log_prob(actions), distribution.entropy()


def test_what_was_drawn_in_bfloat16_is_scored_as_it_is_kept():
    """In float32, when it acts as in the update: else the two log-probabilities differ by their rounding."""
    policy = VLAPolicy(HalfSamples(), autocast="bf16")
    step = TensorDict({"observation": {"proprio": torch.randn(64, 3)}}, [64])
    with torch.no_grad():
        acted = policy.act(step)
        with torch.autocast("cpu", torch.bfloat16):
            log_prob, *_ = policy.contract.score(acted)
    assert acted["action"].dtype == torch.float32
    torch.testing.assert_close(log_prob, acted["action_log_prob"], rtol=0, atol=1e-6)


def test_what_nothing_reads_is_known_where_the_model_says_what_it_reads():
    model = small_model()
    freeze(model, ["vision_encoder"])
    offered = ["depth", "language", "proprio", "rgb", "rgb_wrist"]
    assert VLAPolicy(model).unread(offered) == ["depth", "rgb_wrist"]
    assert VLAPolicy(ThreeMethods(model)).unread(offered) == []


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("scope", ["none", ["vision_encoder"]])
def test_bf16_keeps_the_ratio_at_one_and_the_mathematics_in_float32(interface, scope):
    model = small_model()
    freeze(model, scope)
    policy = VLAPolicy(WRAP[interface](model), autocast="bf16")
    batch = rollout_batch(policy)
    assert all(batch[key].dtype == torch.float32 for key in LOSS_KEYS)
    if interface == "staged" and scope != "none":
        assert batch["vision_features"].dtype == torch.bfloat16  # as recomputing would make them, in half the bytes
    losses = total_loss(policy, batch[:16])
    assert all(losses[key].dtype == torch.float32 for key in ("loss_objective", "loss_critic", "loss_entropy"))
    assert losses["max_ratio"].item() == pytest.approx(1.0, abs=1e-3)
    assert losses["mean_ratio"].item() == pytest.approx(1.0, abs=1e-3)
    exact = VLAPolicy(WRAP[interface](small_model()), autocast="off")
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        step = TabletopEnv(8, modalities=["rgb", "proprio", "language"]).reset()
        values = policy.act(step.copy())["state_value"], exact.act(step.copy())["state_value"]
    assert not torch.equal(*values)  # it did run in another precision
    torch.testing.assert_close(*values, rtol=0.05, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["staged", "methods"])
def test_compiled_policies_give_equal_losses_and_gradients(interface):
    gradients = []
    batch = rollout_batch(VLAPolicy(small_model()))
    for compile in (False, True):
        policy = VLAPolicy(WRAP[interface](small_model()), compile=compile)
        gradients.append(gradients_of(policy, batch.clone()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("interface", "per_step", "per_minibatch"), [("staged", 1, 1), ("fused", 1, 1), ("methods", 3, 2)]
)
def test_trunk_passes_are_counted(interface, per_step, per_minibatch):
    model = small_model()
    calls = count_calls(model.fusion)
    policy = VLAPolicy(WRAP[interface](model))
    env = TabletopEnv(4, max_steps=50, modalities=["rgb", "proprio", "language"])
    rollouts = Rollouts(env, policy, 4 * 8)
    rollouts.next()
    calls.clear()
    rollout = rollouts.next()
    assert len(calls) == 8 * per_step + 1  # and the last column's next states, once
    calls.clear()
    cfg = PPOConfig(n_epochs=2, batch_size=16)
    optimizer = torch.optim.Adam(parameter_groups(model, 1e-3, {}))
    update = PolicyUpdate(make_loss(policy.actor, policy.critic, cfg), optimizer, cfg, value_head(model), True)
    ppo = PPO(gae(policy), update, cfg)
    batch, _ = ppo.prepare(rollout)
    assert len(calls) == 0
    calls.clear()
    ppo.update(batch, Progress(iterations=1))
    assert len(calls) == 2 * 2 * per_minibatch


@pytest.mark.parametrize("interface", INTERFACES)
def test_rollouts_keep_the_instruction_as_bytes_and_models_read_int64(interface):
    policy = VLAPolicy(WRAP[interface](small_model()))
    seen = []
    small = getattr(policy.model, "model", policy.model)
    small.language_encoder.register_forward_hook(lambda _, x, __: seen.append(x[0].dtype))
    batch = rollout_batch(policy)
    assert batch["observation", "language"].dtype == torch.uint8
    wide = with_text_as(torch.int64, batch)
    assert wide["observation", "language"].dtype == torch.int64 and wide["action"] is batch["action"]
    narrow, same = gradients_of(policy, batch.copy()), gradients_of(policy, wide)
    assert set(seen) == {torch.int64}
    assert all(torch.equal(a, b) for a, b in zip(narrow, same, strict=True))


def test_evaluation_takes_the_mode_and_rollouts_sample():
    policy = VLAPolicy(small_model())
    step = TabletopEnv(4, modalities=["rgb", "proprio", "language"]).reset()
    for wrap in WRAP.values():
        if wrap is ThreeMethods:
            continue  # its forward has no deterministic form
        act = VLAPolicy(wrap(small_model())).act
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            assert torch.equal(act(step.copy())["action"], act(step.copy())["action"])
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            assert not torch.equal(act(step.copy())["action"], act(step.copy())["action"])
    assert policy.interface == "staged"


class Strings(ThreeMethods):
    """Wants the instruction as text."""

    language_format = "strings"

    def forward(self, observations):
        self.seen = observations["language"]
        return torch.zeros(observations.batch_size[0], 3)

    def get_value(self, observations):
        assert isinstance(observations["language"], list)
        return self.model.value_head(torch.zeros(observations.batch_size[0], 32))

    def evaluate_actions(self, observations, actions):
        assert observations["language"] == self.expected or self.expected is None
        return self.model.value_head.parameters().__next__().sum() + actions.sum(-1), actions.sum(-1)

    expected = None


def test_strings_are_handed_to_a_model_that_asks():
    model = Strings(small_model())
    env = TabletopEnv(4)
    step = env.reset()
    with torch.no_grad():
        VLAPolicy(model).act(step)
    assert isinstance(model.seen, list) and len(model.seen) == 4
    assert all(isinstance(text, str) and "plate" in text for text in model.seen)
    assert step["observation", "language"].dtype == torch.int64  # the rollout keeps tensors
