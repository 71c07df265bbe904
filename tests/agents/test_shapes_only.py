"""Shapes in place of values: nothing is allocated, and what is counted is what values would have taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from worlds import small_model

from agents.live_bytes import LiveBytes
from agents.policy import VLAPolicy
from agents.shapes_only import look_nothing_up, rows_like, shapes_only, without_values
from envs.tabletop import TabletopEnv
from research.schema import decode_text
from research.training.freezing import freeze

CPU = torch.device("cpu")


def test_a_model_of_shapes_runs_where_no_memory_would_do():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(10**6, 10**6), nn.ReLU(), nn.Linear(10**6, 3))  # 4 TB
    net[0].bias.requires_grad_(False)
    with shapes_only():
        net = without_values(net, CPU)
        assert all(p.device == CPU for p in net.parameters()) and not net[0].bias.requires_grad
        with LiveBytes([*net.parameters()]) as live:
            net(torch.zeros(2, 10**6)).sum().backward()
        assert net[0].weight.grad.shape == (10**6, 10**6) and net[0].bias.grad is None
    assert live.peak() > 4 * 10**12


def test_weights_that_are_used_twice_stay_one():
    with torch.device("meta"):
        net = nn.ModuleDict({"one": nn.Linear(3, 3), "other": nn.Linear(3, 3)})
    net["other"].weight = net["one"].weight
    with shapes_only():
        assert len(list(without_values(net, CPU).parameters())) == 3


def test_what_is_read_of_values_is_made_up():
    with shapes_only():
        numbers = torch.zeros(3)
        assert numbers.sum().item() == 1.0 and numbers.isfinite().all() and int(numbers.long().max()) == 1
        assert decode_text(torch.zeros(2, 64, dtype=torch.int64)) == ["put the red cube on the blue plate"] * 2
        assert decode_text(torch.zeros(1, 3, dtype=torch.int64)) == ["put"]
    assert torch.zeros(3).sum().item() == 0.0 and decode_text(torch.zeros(1, 3, dtype=torch.int64)) == [""]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_takes_the_kernel_that_values_would_take(masked):
    def peak() -> int:
        q = torch.zeros(2, 4, 256, 16, requires_grad=True)
        mask = torch.zeros(2, 1, 256, 256) if masked else None
        with LiveBytes([q]) as live:
            F.scaled_dot_product_attention(q * 1, q * 1, q * 1, attn_mask=mask).sum().backward()
        return live.peak()

    real = peak()
    with shapes_only():
        assert peak() == real
    assert real < 2 * 4 * 256 * 256 * 4  # the scores of all pairs are not kept


def policy_of(scope: list[str]) -> tuple[VLAPolicy, TensorDict]:
    model = small_model()
    freeze(model, scope)
    env = TabletopEnv(6, "reach", modalities=["rgb", "proprio", "language"], image_size=32)
    return VLAPolicy(model), env.observation_spec.zero()


@pytest.mark.parametrize("scope", [["language_encoder"], ["vision_encoder"]])
def test_instructions_are_not_looked_up_and_cost_what_their_number_says(scope):
    policy, step = policy_of(scope)
    wanted = {key: value.shape for key, value in policy.act(step.copy()).items(True, True)}
    peaks = []
    for distinct in (1, 3):
        policy, step = policy_of(scope)
        with shapes_only(), torch.no_grad():
            without_values(policy.model, CPU)
            look_nothing_up(policy, distinct)
            now = rows_like(step, 6, CPU)
            acted = policy.act(now.copy())
            with LiveBytes([*policy.model.parameters()]) as live:
                policy.update(now.update(acted.select(*policy.frozen.out_keys)))
            assert {key: value.shape for key, value in acted.items(True, True)} == wanted
        peaks.append(live.peak())
    trains = scope == ["vision_encoder"]  # the language encoder, that is
    assert (peaks[1] > peaks[0]) == trains
