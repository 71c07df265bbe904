"""StateMLP is Stable-Baselines3's MlpPolicy, and a model like any other here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from agents.critic import find_value_head
from agents.policy import VLAPolicy
from agents.serving import serve
from agents.state_mlp import StateMLP


def observations(rows: int = 5, size: int = 4) -> TensorDict:
    return TensorDict({"proprio": torch.randn(rows, size)}, [rows])


def test_weights_start_as_in_stable_baselines3():
    """Shapes and orthogonal gains of its `ActorCriticPolicy._build`: sqrt(2) inside, 0.01 for actions, 1 for values."""
    model = StateMLP(2, 4)
    for network, outputs, last in ((model.action_head.mean, 2, 0.01), (model.value_head, 1, 1.0)):
        linear = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in linear] == [(64, 4), (64, 64), (outputs, 64)]
        for layer, gain in zip(linear, (math.sqrt(2), math.sqrt(2), last), strict=True):
            w = layer.weight.detach()
            square = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
            torch.testing.assert_close(square, gain**2 * torch.eye(len(square)), rtol=1e-4, atol=1e-5)
            assert not layer.bias.any()
    assert model.action_head.log_std.tolist() == [0.0, 0.0]
    assert StateMLP(2, 4, log_std=-2.0).action_head.log_std.tolist() == [-2.0, -2.0]


def test_it_is_a_gaussian_whose_deviation_does_not_depend_on_the_state():
    model, x = StateMLP(2, 4, hidden_sizes=(8,), log_std=-1.0), observations()
    first, last = model.action_head.mean[0], model.action_head.mean[2]
    mean = torch.tanh(x["proprio"] @ first.weight.T + first.bias) @ last.weight.T + last.bias
    distribution = torch.distributions.Normal(mean, math.exp(-1.0))
    action = torch.randn(5, 2)
    log_prob, entropy = model.evaluate_actions(x, action)
    torch.testing.assert_close(log_prob, distribution.log_prob(action).sum(-1))
    torch.testing.assert_close(entropy, distribution.entropy().sum(-1))
    torch.testing.assert_close(model(x, deterministic=True), mean)
    assert model.get_value(x).shape == (5, 1)


def test_policy_and_value_have_no_weight_in_common():
    model = StateMLP(2, 4)
    assert find_value_head(model, observations()) == ["value_head"]


def test_discrete_actions_are_choices():
    model, x = StateMLP(2, 4, action_choices=[2, 3]), observations(200)
    action = model(x)
    assert set(action[:, 0].tolist()) == {0, 1} and set(action[:, 1].tolist()) == {0, 1, 2}
    log_prob, _ = model.evaluate_actions(x, action)
    assert log_prob.mean().item() == pytest.approx(-math.log(6), abs=0.05)  # nearly uniform at the start


def test_what_it_normalises_is_read_anew_by_every_update():
    model = StateMLP(2, 4).eval()
    for parameter in model.value_head.parameters():
        parameter.requires_grad_(False)
    policy = VLAPolicy(model)
    assert policy.frozen_stages == [] and ("observation", "proprio") in policy.kept_keys


def test_statistics_act_wherever_the_model_does():
    model = StateMLP(2, 4).eval()
    with torch.no_grad():
        model.action_head.mean[-1].weight.mul_(100)
    x = torch.randn(50, 4) * 5 + 3
    model.normalisation.update(x)
    other = StateMLP(2, 4).eval()
    other.load_state_dict(model.state_dict())
    raw = x[0].numpy()
    action = serve(other)({"proprio": raw})
    expected = model.action_head.mean(torch.tensor((raw - x.numpy().mean(0)) / x.numpy().std(0)))
    np.testing.assert_allclose(action, expected.detach(), rtol=1e-4, atol=1e-5)
