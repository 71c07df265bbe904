"""Freeze scopes, learning rates per part, and the switches of model_config."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from agents.small_vla import SmallVLA
from research.config import FREEZE_PRESETS, PolicyConfig, VLAConfig, split_switches
from research.errors import UserError
from research.training.freezing import PRESETS, freeze, heads_of, parameter_groups, part_names


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
        (["*_encoder", "fus?on"], {"vision_encoder", "language_encoder", "fusion"}),
        (["none"], set()),
    ],
)
def test_scopes(scope, parts):
    model = SmallVLA(3)
    freeze(model, scope)
    assert frozen_parts(model) == parts
    for name, child in model.named_children():
        assert child.training == (name not in parts)


def with_heads(heads) -> nn.Module:
    model = nn.Module()
    model.fusion, model.action_head, model.value_head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)
    model.heads = heads
    return model


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (("fusion", "action_head"), ["fusion", "action_head"]),
        ("action_head", ["action_head"]),
        (8, ["action_head", "value_head", "critic"]),
        (None, ["action_head", "value_head", "critic"]),
        (nn.ModuleDict({"arm": nn.Linear(2, 2)}), ["action_head", "value_head", "heads", "critic"]),
    ],
)
def test_heads_are_those_that_a_model_lists_by_name_and_nothing_else_that_it_calls_so(heads, expected):
    assert heads_of(with_heads(heads), ["critic"]) == expected


def test_a_head_that_is_listed_and_not_there_is_refused():
    with pytest.raises(UserError, match=r"Module\.heads: there is no part 'acton_head'; Module has the parts fusion, "):
        heads_of(with_heads(("acton_head", "value_head")), [])


def test_residual_leaves_what_was_added_and_the_value_head_and_no_part_of_its_name_further_down():
    model = SmallVLA(3)
    model.residual = nn.Linear(2, 2)
    model.fusion.residual = nn.Linear(2, 2)
    frozen = freeze(model, "residual", heads=["value_head"])
    assert frozen_parts(model) == {"vision_encoder", "language_encoder", "fusion", "action_head"}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(("residual.", "value_head."))}
    assert {"fusion.residual.weight", "action_head.raw_std"} <= set(frozen)
    groups = {g["name"]: g["lr"] for g in parameter_groups(model, 1e-4, {"residual": 1e-3})}
    assert groups == {"residual": 1e-3, "value_head": 1e-4}


def test_dotted_paths_freeze_below_a_part():
    model = SmallVLA(3)
    assert freeze(model, ["vision_encoder.patches"]) == ["vision_encoder.patches.bias", "vision_encoder.patches.weight"]
    assert not model.vision_encoder.patches.training and model.vision_encoder.cells.training
    model = SmallVLA(3)
    assert freeze(model, ["*_encoder.[pc]*s"]) == [
        f"vision_encoder.{layer}.{kind}" for layer in ("cells", "patches") for kind in ("bias", "weight")
    ]


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (
            ["visoin_encoder"],
            "matches nothing.*did you mean 'vision_encoder'.*has the parts vision_encoder, language_enc",
        ),
        (["lroa"], "'lroa' matches nothing.*did you mean 'lora'"),
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


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda groups: torch.optim.AdamW(groups, weight_decay=0.1),
        lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1),
    ],
)
def test_frozen_weights_get_no_gradient_no_state_and_do_not_move(make_optimizer):
    model = SmallVLA(3, modalities=["proprio"])
    freeze(model, ["fusion"])
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(parameter_groups(model, 0.1, {}))
    for _ in range(2):
        hidden = model.fusion(torch.randn(4, 3))
        (model.action_head(hidden).log_prob(torch.zeros(4, 3)).sum() + model.value_head(hidden).sum()).backward()
        optimizer.step()
    with_state = {id(p) for p in optimizer.state}
    for name, p in model.named_parameters():
        frozen = name.startswith("fusion")
        assert torch.equal(p, before[name]) == frozen, name
        assert (p.grad is None) == frozen and (id(p) in with_state) != frozen, name


class BatchNormed(nn.Module):
    """Batch norm in a part that is frozen, with and without weights of its own, and in one that is not."""

    def __init__(self):
        super().__init__()
        self.vision_encoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))
        self.fusion = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
        self.action_head = nn.Linear(2, 2)

    def forward(self, x):
        return self.action_head(self.fusion(self.vision_encoder(x)))


@pytest.mark.parametrize("scope", ["vision", ["vision", "lora"], "lora"])
def test_batch_statistics_of_a_frozen_part_stay(scope):
    model = BatchNormed().train()
    freeze(model, scope)
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(torch.randn(8, 2))
    for name, buffer in model.named_buffers():
        frozen = "lora" in scope or name.startswith("vision_encoder")
        assert torch.equal(buffer, before[name]) == frozen, name


class BlackBox(nn.Module):
    """A model of the user's with its own names, wrapped whole; its value head is also an attribute of the wrapper."""

    def __init__(self):
        super().__init__()
        self.vla = nn.ModuleDict(
            {
                "vision_tower": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
                "language_model": nn.ModuleDict({"embed": nn.Embedding(3, 2), "out": nn.Linear(2, 3, bias=False)}),
                "projector": nn.Linear(2, 2),
                "value_head": nn.Linear(2, 1),
            }
        )
        self.vla["language_model"]["out"].weight = self.vla["language_model"]["embed"].weight
        self.value_head = self.vla["value_head"]


@pytest.mark.parametrize(
    ("scope", "modules"),
    [
        ("vision", {"vla.vision_tower.0", "vla.vision_tower.1"}),
        ("language", {"vla.language_model.embed"}),
        (["vla.language_model.out"], {"vla.language_model.embed"}),  # tied: one weight under two names
        (["vla.projector"], {"vla.projector"}),
        (["vla.v*"], {"vla.vision_tower.0", "vla.vision_tower.1", "vla.value_head"}),
        (["value_head"], {"vla.value_head"}),
        ("backbone", {"vla.vision_tower.0", "vla.vision_tower.1", "vla.language_model.embed", "vla.projector"}),
    ],
)
def test_scopes_of_a_black_box(scope, modules):
    model = BlackBox()
    frozen = freeze(model, scope)
    assert {name.rpartition(".")[0] for name in frozen} == modules
    assert set(frozen) == {n for n, p in model.named_parameters() if not p.requires_grad}


def test_learning_rates_of_a_black_box_go_by_path():
    model = BlackBox()
    rates = {"vla.vision_tower": 1.0, "vla.vision_tower.1": 2.0, "value_head": 3.0}
    groups = {g["name"]: g for g in parameter_groups(model, 0.5, rates)}
    assert {n: g["lr"] for n, g in groups.items()} == {**rates, "vla": 0.5}
    assert [p.shape for p in groups["vla.vision_tower.1"]["params"]] == [(2,), (2,)]
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    freeze(model, ["vla.vision_tower.1"])
    with pytest.raises(UserError, match=r"'vla\.vision_tower\.1' is frozen"):
        parameter_groups(model, 0.5, rates)
    with pytest.raises(UserError, match=r"no part 'vla\.vision'"):
        parameter_groups(model, 0.5, {"vla.vision": 1.0})


def test_backbone_of_a_model_without_heads_says_so():
    with pytest.raises(
        UserError, match="nothing is left to train.*heads are action_head, critic.*parts vision_encoder"
    ):
        freeze(nn.ModuleDict({"vision_encoder": nn.Linear(2, 2)}), "backbone", heads=("action_head", "critic"))


def test_what_the_model_froze_itself_does_not_count_as_trainable():
    model = SmallVLA(3, modalities=["proprio"])
    model.action_head.requires_grad_(False)
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(model, ["fusion", "value_head"])


def test_parts_of_a_model_with_parameters_of_its_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_std, self.act, self.head = nn.Parameter(torch.zeros(2)), nn.ReLU(), nn.Linear(2, 2)

    assert part_names(Own()) == ["log_std", "head"]


@pytest.mark.parametrize(
    ("config", "scope", "expected"),
    [
        ({"freeze_vision_encoder": True}, "none", "vision"),
        ({"freeze_vision_encoder": True, "freeze_language_model": True}, "none", ["vision", "language"]),
        ({"freeze_language_model": True}, "vision", ["vision", "language"]),
        ({"freeze_language_model": True}, ["fusion"], ["fusion", "language"]),
        ({"freeze_vision_encoder": False}, "none", "none"),
        ({"freeze_vision_encoder": True}, "backbone", "backbone"),
        ({"freeze_vision_encoder": True}, "lora", ["lora", "vision"]),
        ({"freeze_vision_encoder": True}, "residual", "residual"),
    ],
)
def test_switches_in_the_model_config_mean_the_presets(config, scope, expected):
    got, kept = split_switches(scope, {"action_dim": 3, **config})
    assert kept == {"action_dim": 3} and got == expected
    policy = PolicyConfig(freeze=scope, vla_config=VLAConfig(model_config={"action_dim": 3, **config}))
    assert policy.freeze == expected and policy.vla_config.model_config == {"action_dim": 3}


def test_presets_are_those_of_the_configuration():
    assert tuple(PRESETS) == FREEZE_PRESETS
