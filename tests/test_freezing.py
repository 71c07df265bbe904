"""Freeze scopes, learning rates per part, and the switches of model_config."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from agents.small_vla import SmallVLA
from research.freezing import freeze, parameter_groups, part_names, split_switches
from research.schema import UserError


def frozen_parts(model: nn.Module) -> set[str]:
    return {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("scope", "parts"),
    [
        ("none", set()),
        ("vision", {"vision_encoder"}),
        ("language", {"language_encoder"}),
        ("backbone", {"vision_encoder", "language_encoder", "fusion"}),
        (["vision", "fusion"], {"vision_encoder", "fusion"}),
        (["*_encoder*"], {"vision_encoder", "language_encoder"}),
        (["none"], set()),
    ],
)
def test_scopes(scope, parts):
    model = SmallVLA(3)
    freeze(model, scope)
    assert frozen_parts(model) == parts
    for name, child in model.named_children():
        assert child.training == (name not in parts)


def test_dotted_paths_freeze_below_a_part():
    model = SmallVLA(3)
    assert freeze(model, ["vision_encoder.patches"]) == ["vision_encoder.patches.bias", "vision_encoder.patches.weight"]
    assert not model.vision_encoder.patches.training and model.vision_encoder.cells.training


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (
            ["visoin_encoder"],
            "matches nothing.*did you mean 'vision_encoder'.*has the parts vision_encoder, language_enc",
        ),
        ("lora", "'lora' matches nothing"),
        (["*"], "nothing is left to train"),
    ],
)
def test_what_matches_nothing_or_everything_is_refused(scope, message):
    with pytest.raises(UserError, match=message):
        freeze(SmallVLA(3), scope)


def test_a_preset_without_its_part_is_refused():
    with pytest.raises(UserError, match="'vision' matches nothing"):
        freeze(SmallVLA(3, modalities=["proprio"]), "vision")


def test_groups_are_parts_with_their_own_rate_and_without_the_frozen():
    model = SmallVLA(3)
    freeze(model, "vision")
    groups = {g["name"]: g for g in parameter_groups(model, 1e-4, {"value_head": 1e-3})}
    assert set(groups) == {"language_encoder", "fusion", "action_head", "value_head"}
    assert groups["fusion"]["lr"] == 1e-4 and groups["value_head"]["lr"] == 1e-3
    grouped = {id(p) for g in groups.values() for p in g["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    with pytest.raises(UserError, match="no part 'valuehead'"):
        parameter_groups(model, 1e-4, {"valuehead": 1e-3})
    with pytest.raises(UserError, match="'vision_encoder' is frozen"):
        parameter_groups(model, 1e-4, {"vision_encoder": 1e-3})


def test_frozen_weights_do_not_move():
    model = SmallVLA(3, modalities=["proprio"])
    freeze(model, ["fusion"])
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, {}), weight_decay=0.1)
    model.action_head(model.fusion(torch.randn(4, 3))).log_prob(torch.zeros(4, 3)).sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name.startswith(("fusion", "value_head"))), name


def test_parts_of_a_model_with_parameters_of_its_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_std, self.act, self.head = nn.Parameter(torch.zeros(2)), nn.ReLU(), nn.Linear(2, 2)

    assert part_names(Own()) == ["log_std", "head"]


class Switched(nn.Module):
    def __init__(self, freeze_vision_encoder=False, size=1):
        super().__init__()


@pytest.mark.parametrize(
    ("config", "scope", "expected"),
    [
        ({"freeze_vision_encoder": True}, "none", "vision"),
        ({"freeze_vision_encoder": True, "freeze_language_model": True}, "none", ["vision", "language"]),
        ({"freeze_language_model": True}, "vision", ["vision", "language"]),
        ({"freeze_language_model": True}, ["fusion"], ["fusion", "language"]),
        ({"freeze_vision_encoder": False}, "none", "none"),
        ({"freeze_vision_encoder": True}, "backbone", "backbone"),
    ],
)
def test_switches_in_the_model_config_mean_the_presets(config, scope, expected):
    kept, got = split_switches(SmallVLA, {"action_dim": 3, **config}, scope)
    assert kept == {"action_dim": 3} and got == expected
    kept, _ = split_switches(Switched, {"size": 2, **config}, scope)
    assert set(kept) == {"size", *(k for k in config if k == "freeze_vision_encoder")}
