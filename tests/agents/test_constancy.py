"""Frozen stages that are not constant, and trainable weights that nobody knows of, are found before anything starts."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Independent, Normal

from agents.constancy import check_constant
from agents.policy import VLAPolicy
from agents.vla import StagedVLA
from research.errors import UserError
from research.training.freezing import freeze


class Eyes(nn.Module):
    """An encoder whose habits are chosen by name."""

    def __init__(self, habit: str, neck: nn.Module):
        super().__init__()
        self.layer, self.habit = nn.Linear(3, 8), habit
        self.hidden = [neck]  # in a list, which registers nothing
        self.seen = 0
        if habit == "hook":
            self.layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] + neck.weight.mean(),))

    def forward(self, proprio):
        features = self.layer(proprio)
        if self.habit == "list":
            features = self.hidden[0](features)
        elif self.habit == "counter":
            self.seen += 1
            features = features + self.seen
        elif self.habit == "noise":
            features = features + torch.randn_like(features)
        elif self.habit == "input":
            features = features + torch.zeros_like(features).copy_(getattr(self, "last", features))
            self.last = features.detach()
        return features


class Model(StagedVLA):
    def __init__(self, habit: str = "none"):
        super().__init__()
        self.neck = nn.Linear(8, 8)
        self.vision_encoder = Eyes(habit, self.neck)
        self.action_head, self.value_head = nn.Linear(8, 2), nn.Linear(8, 1)
        self.extra = [nn.Linear(8, 8)] if habit == "unregistered" else []

    def stages(self):
        look = TensorDictModule(self.vision_encoder, in_keys=[("observation", "proprio")], out_keys=["seen"])
        think = TensorDictModule(self.neck, in_keys=["seen"], out_keys=["hidden"])
        return [look, think]

    def action_distribution(self, hidden):
        for layer in self.extra:
            hidden = layer(hidden)
        return Independent(Normal(self.action_head(hidden), torch.ones(2)), 1)

    def value(self, hidden):
        return self.value_head(hidden)


def checked(habit: str, scope: str = "vision", reuse: str = "auto") -> VLAPolicy:
    torch.manual_seed(0)
    model = Model(habit).eval()
    freeze(model, scope)
    policy = VLAPolicy(model, reuse)
    check_constant(policy, TensorDict({"proprio": torch.zeros(2, 3)}, [2]))
    return policy


def test_what_is_constant_passes_and_draws_no_numbers():
    torch.manual_seed(0)
    expected = torch.randn(3)
    before = torch.random.get_rng_state()
    assert checked("none").frozen_stages == ["vision_encoder"]
    assert checked("list", scope="none").frozen_stages == []
    torch.random.set_rng_state(before)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("habit", ["list", "hook"])
def test_a_frozen_stage_that_reaches_what_trains_is_refused_by_name(habit):
    with pytest.raises(UserError, match=r"frozen stage vision_encoder depends on neck\.(bias|weight)"):
        checked(habit)
    assert checked(habit, reuse="off").frozen_stages == []  # then nothing is kept, and the neck trains through it


@pytest.mark.parametrize("habit", ["counter", "noise", "input"])
def test_a_frozen_stage_that_is_not_constant_is_refused_by_name(habit):
    with pytest.raises(UserError, match="frozen stage vision_encoder gives another output for the same input"):
        checked(habit)
    checked(habit, reuse="off")


@pytest.mark.parametrize("scope", ["none", "vision"])
def test_weights_that_are_used_and_not_registered_are_refused(scope):
    with pytest.raises(UserError, match=r"Model uses 2 tensors that require gradients .*nn\.ModuleList"):
        checked("unregistered", scope)


class Remembering(nn.Module):
    """Three methods, or the fused ones, and what is left from one call to the next is chosen by name."""

    def __init__(self, habit: str):
        super().__init__()
        self.habit, self.seen = habit, None
        self.trunk, self.action_head, self.value_head = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 1)
        if habit == "zeros":  # as many value heads start: only the number of rows tells
            nn.init.zeros_(self.value_head.weight)
        if habit == "fused":
            self.act, self.evaluate = self._act, self._evaluate

    def features(self, observations):
        self.seen = self.trunk(observations["proprio"])
        return nn.functional.dropout(self.seen) if self.habit == "noise" else self.seen

    def policy(self, observations, seen=None):
        return Independent(Normal(self.action_head(self.features(observations) if seen is None else seen), 1.0), 1)

    def forward(self, observations):
        return self.policy(observations).sample()

    def get_value(self, observations):
        remembers = self.habit in ("value", "zeros", "fused")
        if self.habit == "value of as many rows":
            remembers = self.seen is not None and len(self.seen) == len(observations["proprio"])
        return self.value_head(self.seen if remembers else self.features(observations))

    def evaluate_actions(self, observations, actions):
        policy = self.policy(observations, self.seen if self.habit == "scores" else None)
        return policy.log_prob(actions), policy.entropy()

    def _act(self, observations, deterministic=False):
        action = self.forward(observations)
        return action, self.policy(observations).log_prob(action), self.get_value(observations)

    def _evaluate(self, observations, actions):
        return *self.evaluate_actions(observations, actions), self.get_value(observations)


def tried(habit: str) -> None:
    check_constant(VLAPolicy(Remembering(habit)), TensorDict({"proprio": torch.zeros(2, 3)}, [2]))


@pytest.mark.parametrize("habit", ["value", "value of as many rows", "zeros", "fused"])
def test_a_value_of_what_was_seen_before_is_refused(habit):
    """Of the states that rollouts end in, values are asked for alone: they were those of the states before."""
    with pytest.raises(UserError, match=r"Remembering\.get_value depends on what the model did before"):
        tried(habit)


def test_scores_of_what_was_seen_before_are_refused():
    with pytest.raises(UserError, match=r"Remembering\.evaluate_actions depends on what the model did before"):
        tried("scores")


@pytest.mark.parametrize("habit", ["none", "noise"])
def test_methods_that_compute_what_they_need_pass_also_where_they_are_random(habit):
    tried(habit)


class Counting(Remembering):
    """Looks up a number that is the last of its table."""

    def __init__(self, habit: str):
        super().__init__(habit)
        self.trunk = nn.Embedding(4, 8)

    def features(self, observations):
        self.seen = self.trunk(observations["phase"])
        return self.seen


def test_other_observations_have_no_numbers_that_a_table_does_not():
    phases = TensorDict({"phase": torch.tensor([0, 3]), "proprio": torch.zeros(2, 3)}, [2])
    check_constant(VLAPolicy(Counting("none")), phases)
    with pytest.raises(UserError, match=r"Counting\.get_value depends on"):
        check_constant(VLAPolicy(Counting("zeros")), phases)
