"""Low-rank adapters: where they go, what they leave unchanged, checkpoints, merging, and the reuse of features."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from transformers.pytorch_utils import Conv1D
from worlds import scores, small_model

from agents.reuse import split_constant
from agents.small_vla import SmallVLA
from agents.stages import stage_name
from research.config import LoRAConfig
from research.errors import UserError
from research.training.freezing import freeze, parameter_groups, part_names
from research.training.lora import adaptable_layers, adapter_changes, add_adapters, is_adapter, merge_lora


def observations() -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    step = {
        "rgb": torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=generator),
        "proprio": torch.randn(4, 3, generator=generator),
        "language": torch.randint(1, 256, (4, 12), generator=generator),
    }
    return TensorDict(step, batch_size=[4])


def outputs(model: SmallVLA) -> tuple:
    return scores(model, observations(), torch.zeros(4, 3))


def adapted_layers(model: nn.Module) -> set[str]:
    return {name for name, _ in adapter_changes(model)}


def train_adapters(model: nn.Module) -> None:
    """Adapters as they are after some training: B is no longer zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.add_(0.1 * torch.randn_like(parameter))


def test_lora_trains_the_adapters_and_the_heads_alone():
    model, plain = small_model(), small_model()
    freeze(model, "lora")
    assert adapted_layers(model) == {
        "vision_encoder.patches", "vision_encoder.cells", "vision_encoder.tokens",
        "language_encoder.near", "fusion.question", "fusion.layers.0", "fusion.layers.2",
    }  # fmt: skip
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(is_adapter(n) or n.startswith(("action_head.", "value_head.")) for n in trained)
    assert {n for n in trained if not is_adapter(n)} == {
        n for n, _ in plain.named_parameters() if n.startswith(("action_head.", "value_head."))
    }
    assert not model.fusion.standing.requires_grad
    assert type(model) is SmallVLA and part_names(model) == part_names(plain)
    assert not model.fusion.training  # frozen, adapters aside


def test_the_policy_is_unchanged_at_the_start_and_every_adapter_learns():
    model = small_model()
    before = outputs(model)
    freeze(model, "lora")
    after = outputs(model)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (after[0].sum() + after[2].sum()).backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # A has no gradient while B is zero
            assert parameter.grad.norm() > 0, name
        if not parameter.requires_grad:
            assert parameter.grad is None, name


def test_rank_and_alpha():
    model = small_model()
    freeze(model, "lora", lora=LoRAConfig(rank=2, alpha=6.0, targets=["fusion.layers.0"]))
    layer = model.fusion.layers[0]
    train_adapters(model)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape[0] == b.shape[1] == 2
    torch.testing.assert_close(dict(adapter_changes(model))["fusion.layers.0"], 3.0 * b @ a)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["fusion"], {"fusion.question", "fusion.layers.0", "fusion.layers.2"}),
        ("fusion.layers.0", {"fusion.layers.0"}),
        (["near", "*.tokens"], {"language_encoder.near", "vision_encoder.tokens"}),  # a layer's own name; a glob
        (["embedding"], {"language_encoder.embedding"}),
    ],
)
def test_targets(targets, layers):
    model = small_model()
    before = outputs(model)
    freeze(model, "lora", lora=LoRAConfig(targets=targets))
    assert adapted_layers(model) == layers
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))
    train_adapters(model)
    assert not torch.equal(before[0], outputs(model)[0])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["fusoin"], r"policy\.lora\.targets.*'fusoin' matches nothing.*did you mean 'fusion'.*parts vision_encoder"),
        (["fusion", "fusion.standing"], "'fusion.standing' matches nothing"),
        (["action_head"], "'action_head' matches nothing"),  # trains anyway
    ],
)
def test_targets_that_name_no_layer_are_refused(targets, message):
    with pytest.raises(UserError, match=message):
        freeze(small_model(), "lora", lora=LoRAConfig(targets=targets))


def test_what_else_the_scope_names_is_frozen_without_adapters():
    model = small_model()
    freeze(model, ["vision", "lora", "value_head"])
    assert {n.split(".")[0] for n in adapted_layers(model)} == {"language_encoder", "fusion"}
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"language_encoder", "fusion", "action_head"}
    with pytest.raises(UserError, match="'vision_encoder' matches nothing"):
        freeze(small_model(), ["vision", "lora"], lora=LoRAConfig(targets=["vision_encoder"]))


def test_groups_and_learning_rates_go_by_the_part_that_holds_the_adapter():
    model = small_model()
    freeze(model, "lora")
    groups = {g["name"]: g for g in parameter_groups(model, 1e-4, {"fusion": 1e-3})}
    assert list(groups) == ["vision_encoder", "language_encoder", "fusion", "action_head", "value_head"]
    assert groups["fusion"]["lr"] == 1e-3
    expected = [p for n, p in model.named_parameters() if n.startswith("fusion.") and "lora_" in n]
    assert [id(p) for p in groups["fusion"]["params"]] == [id(p) for p in expected] and len(expected) == 6


@pytest.mark.parametrize(
    ("targets", "reused"),
    [("auto", []), (["fusion"], ["vision_encoder", "language_encoder"]), (["near"], ["vision_encoder"])],
)
def test_features_are_reused_only_upstream_of_every_adapter(targets, reused):
    model = small_model()
    freeze(model, "lora", lora=LoRAConfig(targets=targets))
    frozen, _ = split_constant(model.stages())
    assert [stage_name(model, stage) for stage in frozen] == reused


def test_a_checkpoint_of_an_adapted_model_continues_in_another():
    model = small_model(seed=0)
    freeze(model, "lora")
    train_adapters(model)
    resumed = small_model(seed=7)
    freeze(resumed, "lora")
    resumed.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(resumed), strict=True))


def test_merged_adapters_are_plain_weights_of_the_same_policy():
    plain, model = small_model(seed=0), small_model(seed=0)
    freeze(model, "lora", lora=LoRAConfig(targets=["vision_encoder", "language_encoder", "fusion"]))  # and embeddings
    train_adapters(model)
    before = outputs(model)
    merged = merge_lora(copy.deepcopy(model))
    assert list(merged.state_dict()) == list(plain.state_dict())
    other = small_model(seed=7)
    other.load_state_dict(merged.state_dict())
    for a, b, c in zip(before, outputs(other), outputs(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert (a - c).abs().max() > 1e-2 or torch.equal(a, c)  # the entropy is the head's alone
    assert adapted_layers(model) and not adapted_layers(merged)  # a copy was merged, training goes on


class Zoo(nn.Module):
    """One layer of each kind; `forward` runs them all on `[B, 8]`."""

    def __init__(self):
        super().__init__()
        self.config = {"size": 8}  # peft looks at attributes of this name
        self.linear = nn.Linear(8, 8)
        self.conv1d, self.conv2d = nn.Conv1d(1, 4, 1), nn.Conv2d(1, 4, 1)
        self.gpt = Conv1D(8, 8)
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.dilated = nn.Conv1d(1, 1, 3, dilation=2, padding="same")
        self.circular = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1)
        self.tied_in, self.tied_out = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
        self.tied_out.weight = self.tied_in.weight
        self.first = self.second = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.action_head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(self.linear(x)) + self.second(self.gpt(x))
        x = x + self.conv1d(x[:, None]).mean((1, 2))[:, None] + self.conv2d(x[:, None, None]).mean((1, 2))
        x = x + self.grouped(x[..., None])[..., 0]
        x = x + self.circular(self.dilated(x[:, None]))[:, 0]
        x = x + self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        padded = torch.stack([x, torch.zeros_like(x)], dim=1)  # [B, 2, 8], the second place is padding
        x = x + self.encoder(padded, src_key_padding_mask=torch.tensor([[False, True]]).expand(len(x), 2))[:, 0]
        return self.action_head(self.norm(self.tied_in(self.tied_out(x).argmax(-1)) + x))


def test_kinds_of_layers():
    model = Zoo().eval()
    x = torch.randn(4, 8)
    before = model(x)
    adaptable = {"linear", "conv1d", "conv2d", "gpt", "encoder.layers.0.linear1", "encoder.layers.0.linear2"}
    assert set(adaptable_layers(model)) == {*adaptable, "action_head"}
    freeze(model, "lora")
    assert adapted_layers(model) == adaptable
    torch.testing.assert_close(model(x), before)
    train_adapters(model)
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-3)
    with torch.no_grad():  # torch's fast path of the encoder would skip the adapters here, also in another process
        torch.testing.assert_close(model(x), after)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), after)
    torch.testing.assert_close(merge_lora(model)(x), after, rtol=0, atol=1e-5)


def test_adapters_in_an_encoder_that_gets_padding():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.ModuleDict({"fusion": nn.TransformerEncoder(layer, 2), "action_head": nn.Linear(8, 1)}).eval()
    freeze(model, "lora")
    train_adapters(model)
    padding = torch.arange(5) >= torch.tensor([[2], [5], [3]])
    tokens = torch.randn(3, 5, 8)
    # Left alone, torch would make nested tensors of frozen encoders' inputs, and then cannot take gradients.
    encoded = model["fusion"](tokens, src_key_padding_mask=padding)
    encoded[~padding].sum().backward()
    with torch.no_grad():
        again = model["fusion"](tokens, src_key_padding_mask=padding)
    torch.testing.assert_close(again[~padding], encoded[~padding])


def test_adapters_of_a_bfloat16_model_are_float32():
    model, x = Zoo().to(torch.bfloat16).eval(), torch.randn(4, 8, dtype=torch.bfloat16)
    before = model(x)
    freeze(model, "lora")
    assert torch.equal(model(x), before) and before.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if is_adapter(n)} == {torch.float32}
    train_adapters(model)
    after = model(x)
    torch.testing.assert_close(merge_lora(model)(x), after, rtol=0, atol=0.1)


class BlackBox(nn.Module):
    """A model of the user's, wrapped whole, whose value head is also an attribute of the wrapper."""

    def __init__(self):
        super().__init__()
        self.model = small_model()
        self.value_head = self.model.value_head


def test_a_wrapped_model():
    model = BlackBox()
    frozen = freeze(model, "lora")
    assert {n.split(".")[1] for n in adapted_layers(model)} == {"vision_encoder", "language_encoder", "fusion"}
    assert all(p.requires_grad for p in [*model.value_head.parameters(), *model.model.action_head.parameters()])
    assert "model.fusion.standing" in frozen and "model.fusion.layers.0.base_layer.weight" in frozen
    assert all(torch.equal(a, b) for a, b in zip(outputs(model.model), outputs(small_model()), strict=True))


def test_auto_means_the_layers_that_the_model_names_and_targets_win():
    def adapted(scope="lora", **options) -> set[str]:
        model = small_model()
        model.lora_targets = ("fusion.layers", "vision_encoder.c*")
        freeze(model, scope, lora=LoRAConfig(**options))
        return adapted_layers(model)

    assert adapted() == {"vision_encoder.cells", "fusion.layers.0", "fusion.layers.2"}
    assert adapted(["vision", "lora"]) == {"fusion.layers.0", "fusion.layers.2"}
    assert adapted(targets=["fusion.question"]) == {"fusion.question"}
    with pytest.raises(UserError, match="no trainable layer to adapt; name layers in policy.lora.targets; SmallVLA"):
        adapted(["vision", "fusion", "lora"])


def test_without_peft_adapters_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"need peft .*; run: pip install -e .\[lora\]"):
        add_adapters(nn.Linear(2, 2), [], 1, 1.0)
