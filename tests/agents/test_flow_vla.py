"""What every flow VLA has in common, on a velocity that is known: units, padding, and the loss of imitation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from agents.flow_vla import FlowVLA
from research.action_map import ActionMap
from research.errors import UserError


class Known(FlowVLA):
    """Its velocity leads to `goal` from anywhere: at x and time t it is (x - goal) / t."""

    def __init__(self, goal: torch.Tensor, **options):
        arguments = {
            "horizon": 4,
            "room": 6,
            "state_room": 5,
            "width": 2,
            "action_dim": 3,
            "proprio_dim": 2,
            "executed": 2,
        }
        flow = {"steps": 4, "noise": 0.5, "statistics": None, "dataset": None, "normalisation": "mean_std"}
        super().__init__(["rgb", "proprio"], **{**arguments, **flow, **options})
        self.goal = goal

    def velocity(self, step):
        return lambda x, time: (x - self.goal) / time[:, None, None]


@pytest.fixture
def statistics(tmp_path) -> str:
    action = {"mean": [1.0, 0.0, -1.0], "std": [0.5, 2.0, 1.0]}
    found = {"action": action, "observation.state": {"mean": [1.0, 2.0], "std": [2.0, 4.0]}}
    (tmp_path / "stats.json").write_text(json.dumps(found))
    return str(tmp_path)


def step() -> TensorDict:
    return TensorDict({"prefix_hidden": torch.randn(8, 2)}, [8])


@torch.no_grad()
def test_what_leads_to_a_goal_acts_on_it_in_the_units_of_the_data(statistics):
    torch.manual_seed(0)
    goal = torch.randn(8, 4, 6)
    expected = goal[:, :2, :3] * torch.tensor([0.5, 2.0, 1.0]) + torch.tensor([1.0, 0.0, -1.0])
    model = Known(goal, statistics=statistics)
    acted = model.decide(step(), deterministic=True)
    torch.testing.assert_close(acted["action"], expected, rtol=0, atol=1e-5)
    assert torch.equal(acted["state_value"], model.state_value(acted))
    one = Known(goal, statistics=statistics, executed=1).decide(step(), deterministic=True)
    torch.testing.assert_close(one["action"], expected[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("noise", [0.5, (0.08, 0.16)])
def test_without_noise_on_the_way_a_decision_is_what_the_drawn_noise_leads_to(noise):
    """By Euler steps in numbers: x goes from the noise at time 1 to time 0 along a velocity that depends on both."""
    model = Known(torch.zeros(8, 4, 6), noise=noise)
    model.velocity = lambda step: lambda x, time: torch.sin(3 * x) + time[:, None, None]
    torch.manual_seed(4)
    acted = model.decide(step(), deterministic=True)
    torch.manual_seed(4)
    step()
    x, count = torch.randn(8, 4, 6), model.flow.steps.count
    for k in range(count):
        x = x - (torch.sin(3 * x) + (1 - k / count)) / count
    torch.testing.assert_close(acted["action"], x[:, :2, :3])


@torch.no_grad()
@pytest.mark.parametrize("noise", [0.5, (0.08, 0.16)])
@pytest.mark.parametrize(("level", "parts"), [("chunk", ()), ("action", (2,)), ("token", (6,))])
def test_parts_of_a_decision_have_log_probabilities_of_their_own(level, parts, noise):
    torch.manual_seed(0)
    model = Known(torch.randn(8, 4, 6), noise=noise)
    model.ratio_level = level
    acted = model.decide(step(), deterministic=False)
    log_prob, entropy, _ = model.score(acted)
    assert log_prob.shape == (8, *parts) and torch.equal(log_prob, acted["action_log_prob"]) and entropy.shape == (8,)
    model.ratio_level = "chunk"
    torch.testing.assert_close(log_prob.flatten(1).sum(1) if parts else log_prob, model.score(acted)[0])
    model.ratio_level = level
    assert model.decide(step(), deterministic=True)["action_log_prob"].shape == (8, *parts)


def test_a_state_is_normalised_and_padded(statistics):
    state = Known(torch.zeros(1), statistics=statistics).padded_state(torch.tensor([[3.0, 2.0]]))
    assert state.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]


def test_statistics_are_of_what_the_world_gets_where_an_environment_scales_actions(statistics):
    """The world makes 0.5, 2 and 1 of an action's 1s, around 1, 0 and -1, as the data are scaled: nothing is left."""
    torch.manual_seed(0)
    goal, one = torch.randn(8, 4, 6), np.ones(3)
    world = ActionMap(-one, one, np.array([0.5, 2.0, 1.0]), np.array([1.0, 0.0, -1.0]), (3,), np.dtype(np.float32))
    model = Known(goal, statistics=statistics)
    before = model.decide(step(), deterministic=True)["action"]
    model.act_through(world)
    acted = model.decide(step(), deterministic=True)["action"]
    torch.testing.assert_close(acted, goal[:, :2, :3], rtol=0, atol=1e-5)
    np.testing.assert_allclose(world.offset + world.scale * acted.numpy(), before, rtol=0, atol=1e-5)
    whole = Known(torch.nn.functional.pad(goal[..., :3], (0, 3)), statistics=statistics)
    whole.act_through(world)
    assert whole.imitation_loss(step(), goal[..., :3]).max() < 1e-6
    plain = Known(goal)
    plain.act_through(world)  # no statistics: it speaks in the environment's terms
    torch.testing.assert_close(plain.decide(step(), deterministic=True)["action"], goal[:, :2, :3], rtol=0, atol=1e-5)


def test_a_state_of_another_size_is_refused(statistics):
    for size in (1, 3):  # one number would be spread over both
        with pytest.raises(UserError, match=f"Known: proprio has {size} numbers, and proprio_dim is 2"):
            Known(torch.zeros(1), statistics=statistics).padded_state(torch.zeros(1, size))


def test_imitation_costs_nothing_where_the_velocity_leads_to_the_experts_plan(statistics):
    torch.manual_seed(0)
    plan = torch.randn(8, 4, 3)
    normalised = (plan - torch.tensor([1.0, 0.0, -1.0])) / torch.tensor([0.5, 2.0, 1.0])
    goal = torch.nn.functional.pad(normalised, (0, 3)).requires_grad_()
    loss = Known(goal, statistics=statistics).imitation_loss(step(), plan)
    assert loss.shape == (8,) and loss.max() < 1e-6
    # Where it is off by e in every number, (x - goal) / t is off by e / t: the mean of e^2 / t^2 over the times drawn.
    model, observed = Known(goal + 0.1, statistics=statistics), step()
    torch.manual_seed(3)
    off = model.imitation_loss(observed, plan)
    torch.manual_seed(3)
    torch.randn(8, 4, 6)  # the noise is drawn before the times
    one, half = torch.tensor(1.0), torch.tensor(1.5)
    time = 0.001 + 0.999 * torch.distributions.Beta(half, one).sample((8,))
    torch.testing.assert_close(off, 0.01 / time.square(), rtol=1e-3, atol=1e-5)
    off.sum().backward()
    assert goal.grad.abs().min() > 0


def test_learned_noise_has_an_entropy_that_trains_and_keeps_its_chain():
    torch.manual_seed(0)
    model = Known(torch.randn(8, 4, 6), noise=[0.05, 0.2])
    assert model.decision_keys == (("decision", "states"),) and model.heads[-1] == "noise_head"
    acted = model.decide(step(), deterministic=False)
    assert acted["decision", "states"].shape == (8, 5, 4, 6)
    torch.testing.assert_close(acted["action"], acted["decision", "states"][:, -1, :2, :3])
    log_prob, entropy, _ = model.score(acted)
    assert torch.equal(log_prob, acted["action_log_prob"]) and model.entropy_trains
    entropy.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.noise_head.parameters())
    assert not Known(torch.zeros(1)).entropy_trains
    acted = model.decide(step(), deterministic=True)
    assert acted["decision", "states"].shape == (8, 5, 4, 6) and acted["action_log_prob"].eq(0).all()


def test_noise_is_one_number_or_two_bounds():
    with pytest.raises(UserError, match=r"Known: noise is \[0.1, 0.2, 0.3\]; expected one number, or the two bounds"):
        Known(torch.zeros(1), noise=[0.1, 0.2, 0.3])
