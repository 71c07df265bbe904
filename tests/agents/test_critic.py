"""The value head is found whatever it is called, and its gradient ends where it should."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.distributions import Independent, Normal
from worlds import WRAP, rollout_batch, small_model, total_loss, value_head

from agents.critic import detach_value_head, find_value_head
from agents.policy import VLAPolicy
from envs.tabletop import TabletopEnv
from research.config import PPOConfig
from research.training.freezing import freeze, named_parameters_within
from research.training.loss import make_loss
from research.training.ppo import PolicyUpdate


def observations() -> TensorDict:
    return TabletopEnv(2, modalities=["rgb", "proprio", "language"]).observation_spec["observation"].zero()


class Own(nn.Module):
    """Three methods over proprioception; `critic` says how the value comes about."""

    def __init__(self, critic: str = "head"):
        super().__init__()
        self.critic = critic
        self.trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.pi = nn.Linear(8, 3)
        self.log_std = nn.Parameter(torch.zeros(3))
        self.q_body, self.q_out = nn.Linear(8, 8), nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(1))

    def policy(self, observations):
        return Independent(Normal(self.pi(self.trunk(observations["proprio"])), self.log_std.exp()), 1)

    def forward(self, observations):
        return self.policy(observations).sample()

    def get_value(self, observations):
        hidden = self.trunk(observations["proprio"])
        if self.critic == "head":
            return self.q_out(hidden)
        if self.critic == "two modules":
            return self.q_out(torch.tanh(self.q_body(hidden)))
        if self.critic == "parameter":
            return self.scale * hidden.sum(-1, keepdim=True)
        if self.critic == "twice":
            return self.q_out(torch.tanh(hidden + self.q_out(hidden)))
        if self.critic == "past it":
            return self.q_out(hidden) + hidden.sum(-1, keepdim=True)
        if self.critic == "keyword":
            return self.q_out(input=hidden)
        return hidden.mean(-1, keepdim=True)

    def evaluate_actions(self, observations, actions):
        policy = self.policy(observations)
        return policy.log_prob(actions), policy.entropy()


@pytest.mark.parametrize(
    ("critic", "names"),
    [
        ("head", ["q_out"]),
        ("two modules", ["q_body", "q_out"]),
        ("parameter", ["scale"]),
        ("twice", ["q_out"]),
        ("past it", ["q_out"]),
        ("keyword", ["q_out"]),
        ("none of its own", []),
    ],
)
def test_the_value_head_is_what_the_value_alone_depends_on(critic, names):
    assert sorted(find_value_head(Own(critic), observations())) == sorted(names)


@pytest.mark.parametrize("interface", WRAP)
def test_it_is_found_behind_every_interface(interface):
    model = small_model()
    wrapped = WRAP[interface](model)
    found = named_parameters_within(wrapped, find_value_head(wrapped, observations()))
    assert set(found.values()) == set(model.value_head.parameters())


def test_looking_for_it_draws_no_random_numbers():
    model = Own()
    state = torch.get_rng_state()
    find_value_head(model, observations())
    detach_value_head(model, list(model.q_out.parameters()), observations())
    assert torch.equal(torch.get_rng_state(), state)


def gradients(model: nn.Module, apart: bool, **cfg) -> dict[str, torch.Tensor | None]:
    """Of one minibatch, with the critic's gradient in its head."""
    model.zero_grad()
    policy, cfg = VLAPolicy(model), PPOConfig(vf_coef=3.0, **cfg)
    batch = rollout_batch(policy)
    loss = make_loss(policy.actor, policy.critic, cfg)
    names = find_value_head(model, observations())
    head = [p for p in named_parameters_within(model, names).values() if p.requires_grad]
    groups = [{"name": "all", "params": [p for p in model.parameters() if p.requires_grad]}]
    update = PolicyUpdate(loss, torch.optim.SGD(groups, 0.1), cfg, head, critic_apart=apart)
    update._backward(loss(batch), value_only=False, share=1.0)
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("critic", ["head", "keyword"])
def test_a_detached_head_gets_the_gradients_of_a_pass_of_its_own(critic):
    """Bit for bit, from one backward pass instead of two."""
    torch.manual_seed(0)
    model = Own(critic)
    two = gradients(model, apart=True)
    assert detach_value_head(model, list(model.q_out.parameters()), observations())
    one = gradients(model, apart=False)
    assert one.keys() == two.keys() and two["q_out.weight"].abs().sum() > 0
    for name, gradient in two.items():
        assert (gradient is None and one[name] is None) or torch.equal(gradient, one[name]), name


@pytest.mark.parametrize("scope", ["none", "vision", "backbone"])
def test_so_does_a_staged_models(scope):
    model = small_model()
    freeze(model, scope)
    two = gradients(model, apart=True)
    assert detach_value_head(model, value_head(model), observations())
    one = gradients(model, apart=False)
    for name, gradient in two.items():
        assert (gradient is None and one[name] is None) or torch.equal(gradient, one[name]), name


@pytest.mark.parametrize("critic", ["two modules", "parameter", "twice", "past it"])
def test_what_a_hook_would_get_wrong_is_left_as_it_was(critic):
    """A cut within the head, none at all, in a loop, or with a way around it."""
    model = Own(critic)
    names = find_value_head(model, observations())
    head = list(named_parameters_within(model, names).values())
    expected = gradients(model, apart=True)
    assert not detach_value_head(model, head, observations())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    for name, gradient in gradients(model, apart=True).items():
        assert (gradient is None and expected[name] is None) or torch.equal(gradient, expected[name]), name


def test_losses_are_those_of_the_model_without_the_hook():
    model = small_model()
    policy = VLAPolicy(model)
    batch = rollout_batch(policy)
    before = total_loss(policy, batch.clone())
    assert detach_value_head(model, value_head(model), observations())
    after = total_loss(policy, batch.clone())
    assert all(torch.equal(before[key], after[key]) for key in ("loss_objective", "loss_critic", "loss_entropy"))
