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
