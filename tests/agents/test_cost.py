"""FLOPs per transition, and what keeping features saves."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from worlds import (
    INTERFACES,
    WRAP,
    small_model,
)

from agents.cost import flops_per_transition, reuse_report
from agents.policy import VLAPolicy
from agents.vla import StagedVLA
from envs.tabletop import TabletopEnv
from research.training.freezing import freeze


def test_reuse_report_counts_bytes_and_work():
    model = small_model()
    freeze(model, ["vision_encoder", "language_encoder"])
    step = TabletopEnv(2, modalities=["rgb", "proprio", "language"]).reset()["observation"]
    report = reuse_report(VLAPolicy(model), step)
    assert report.frozen_stages == ["vision_encoder", "language_encoder"] and report.blocked_stages == []
    assert report.bytes_before == 64 * 64 * 3 + 3 * 4 + 64 * 8
    assert report.bytes_after == 64 * 8 * 4 + 64 * 4 + 3 * 4  # tokens, language features, proprioception
    assert report.frozen_flops > 10 * report.trained_flops > 0
    (line,) = report.lines()
    assert "vision_encoder, language_encoder" in line and f"{report.bytes_after:,}" in line
    freeze(model := small_model(), ["vision_encoder"])
    assert reuse_report(VLAPolicy(model), step).bytes_after == 64 * 8 * 4 + 64 + 3 * 4  # tokens, text, proprioception
    shared = "feature reuse: language_encoder trains, and runs once per distinct instruction"
    assert reuse_report(VLAPolicy(small_model()), step).lines() == [shared]
    assert reuse_report(VLAPolicy(small_model(), feature_reuse="off"), step).lines() == []


@pytest.mark.parametrize("interface", INTERFACES)
def test_flops_are_counted_forward_and_backward(interface):
    model = small_model()
    freeze(model, "backbone")
    step = TabletopEnv(1, modalities=["rgb", "proprio", "language"]).reset()["observation"]
    state = torch.get_rng_state()
    collected, trained = flops_per_transition(VLAPolicy(WRAP[interface](model)), step)
    assert torch.equal(torch.get_rng_state(), state)  # a run repeats, whether or not anyone counts
    # Of 32 hidden numbers: two heads of 128 units, for 3 numbers and for 1; behind the first layer nothing learns.
    forward, inner = 32 * 128 + 128 * 3 + 32 * 128 + 128, 128 * 3 + 128
    heads = 2 * (forward + forward + inner)
    if interface == "staged":
        assert trained == heads
        assert collected > 3e6  # the vision encoder alone
    else:
        passes = {"fused": 1, "methods": 2}[interface]
        assert trained > 3e6 * passes + heads
    everything = flops_per_transition(VLAPolicy(WRAP[interface](small_model())), step)
    assert everything[1] > 2 * trained


class Squashed(StagedVLA):
    """Its entropy has no formula, and is estimated from what it draws."""

    def __init__(self):
        super().__init__()
        self.fusion, self.value_head = nn.Linear(3, 6), nn.Linear(6, 1)

    def stages(self):
        keys = {"in_keys": [("observation", "proprio")], "out_keys": ["hidden"]}
        return [TensorDictModule(self.fusion, **keys)]

    def action_distribution(self, hidden):
        normal = Normal(hidden[:, :3], hidden[:, 3:].exp())
        return Independent(TransformedDistribution(normal, [TanhTransform()]), 1)

    def value(self, hidden):
        return self.value_head(hidden)


def test_looking_at_costs_moves_no_generator():
    """A resumed run looks where the uninterrupted one did not."""
    policy, seen = VLAPolicy(Squashed()), TabletopEnv(2, modalities=["proprio"]).reset()["observation"]
    state = torch.get_rng_state()
    flops_per_transition(policy, seen[:1])
    reuse_report(policy, seen)
    assert torch.equal(torch.get_rng_state(), state)
