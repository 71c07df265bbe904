"""`agents.adapters`: what peft itself saved computes the same in a model that freeze=lora adapted."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from building import make_model
from tensordict import TensorDict
from torch import nn

from agents.adapters import load_adapters
from agents.small_vla import SmallVLA
from research.config import ExperimentConfig, LoRAConfig, PolicyConfig, VLAConfig
from research.errors import UserError
from research.training.freezing import freeze
from research.training.lora import adapter_changes

RANK, ALPHA = 2, 6.0
LAYERS = ["fusion.layers.0", "fusion.layers.2"]


class LanguageVLA(nn.Module):
    """A language model of transformers, with an embedding to adapt, and a head."""

    def __init__(self):
        super().__init__()
        self.language_model = language_model()
        self.action_head = nn.Linear(8, 2)


def language_model() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(3)
    return GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8, resid_pdrop=0.0)).eval()


def small_vla() -> SmallVLA:
    torch.manual_seed(3)
    return SmallVLA(3, modalities=["proprio"], hidden_size=16).eval()


def saved_by_peft(model: nn.Module, folder, targets, safe=True, **config):
    """A folder of adapters that peft made, with values other than those they start with; and the adapted model."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder, safe_serialization=safe)
    return adapted.eval()


def adapted(targets="auto", rank=RANK, model=None) -> nn.Module:
    model = small_vla() if model is None else model
    freeze(model, "lora", lora=LoRAConfig(rank, ALPHA, targets))
    return model.eval()


def refusal(model, folder, rank=RANK, alpha=ALPHA) -> str:
    with pytest.raises(UserError) as caught:
        load_adapters(model, folder, rank, alpha)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("policy.vla_config.adapter_path: ")
    return message


@pytest.mark.parametrize("safe", [True, False])
def test_a_model_of_ours_acts_as_it_did_under_peft(tmp_path, safe):
    observations = TensorDict({"proprio": torch.randn(5, 3)}, [5])
    theirs = saved_by_peft(small_vla(), tmp_path, LAYERS, safe)
    model = adapted(LAYERS)
    actions = torch.randn(5, 3)
    before = model.evaluate_actions(observations, actions)[0]
    load_adapters(model, tmp_path, RANK, ALPHA)
    expected = theirs.base_model.model.evaluate_actions(observations, actions)[0]
    torch.testing.assert_close(model.evaluate_actions(observations, actions)[0], expected)
    assert (before - expected).abs().max() > 0.1
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_adapters_of_the_language_model_alone_find_their_part(tmp_path):
    theirs = saved_by_peft(language_model(), tmp_path, ["c_attn", "wte"])
    model = adapted(["language_model.h.0.attn.c_attn", "language_model.wte"], model=LanguageVLA())
    load_adapters(model, tmp_path, RANK, ALPHA)
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(model.language_model(tokens)[0], theirs(tokens)[0])


def test_other_layers_are_named(tmp_path):
    saved_by_peft(small_vla(), tmp_path, LAYERS[:1])
    message = refusal(adapted(LAYERS), tmp_path)
    assert (
        "2 weights of adapters here are not in it (fusion.layers.2.lora_A.weight, fusion.layers.2.lora_B.weight)"
        in message
    )
    message = refusal(adapted(LAYERS[1:]), tmp_path)
    assert "2 of its weights have no adapter here (fusion.layers.0.lora_A.weight, fusion.layers.0" in message
    assert "set policy.lora.targets to the layers that it adapts (fusion.layers.0), or merge it" in message
    assert "2 of its weights have no adapter here" in refusal(small_vla(), tmp_path)


def test_another_rank_or_scale_is_refused(tmp_path):
    """With another scale the same numbers are another policy."""
    saved_by_peft(small_vla(), tmp_path, LAYERS)
    message = refusal(adapted(LAYERS, rank=4), tmp_path, rank=4)
    assert (
        "has r = 2 and lora_alpha = 6.0, but policy.lora.rank is 4 and policy.lora.alpha 6; set them to those"
        in message
    )
    assert "policy.lora.alpha 16" in refusal(adapted(LAYERS), tmp_path, alpha=16.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which cannot be trained on here; merge it into the weights before"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"rank_pattern": {"fusion": 3}}, "rank_pattern is {'fusion': 3}"),
        ({"modules_to_save": ["value_head"]}, "modules_to_save is ['value_head']"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"r": None}, "has r = None"),
    ],
)
def test_adapters_that_compute_something_else_are_refused(tmp_path, change, message):
    saved_by_peft(small_vla(), tmp_path, LAYERS)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in refusal(adapted(LAYERS), tmp_path)


def test_what_is_no_folder_of_adapters(tmp_path):
    assert "is no folder of peft adapters: it has no adapter_config.json" in refusal(adapted(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    assert "peft_type is None" in refusal(adapted(), tmp_path)


def test_broken_numbers_and_other_shapes_are_refused(tmp_path):
    theirs = saved_by_peft(small_vla(), tmp_path, LAYERS)
    torch.manual_seed(0)
    other = SmallVLA(3, modalities=["proprio"], hidden_size=24)
    assert "is of another model: 1 shapes differ (fusion.layers.2.lora_B" in refusal(
        adapted(LAYERS, model=other), tmp_path
    )
    with torch.no_grad():
        next(p for name, p in theirs.named_parameters() if "lora_B" in name).fill_(float("nan"))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a NaN"):
        load_adapters(adapted(LAYERS), tmp_path, RANK, ALPHA)


def test_what_an_adapter_adds_is_what_peft_says(tmp_path):
    """alpha / rank * B A, by hand from the file."""
    from safetensors.torch import load_file

    saved_by_peft(small_vla(), tmp_path, LAYERS)
    model = adapted(LAYERS)
    load_adapters(model, tmp_path, RANK, ALPHA)
    file = load_file(tmp_path / "adapter_model.safetensors")
    for name, change in adapter_changes(model):
        a, b = (file[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(change, ALPHA / RANK * b @ a)


def test_a_run_starts_from_them(tmp_path):
    base = tmp_path / "base.pt"
    torch.save(small_vla().state_dict(), base)
    theirs = saved_by_peft(small_vla(), tmp_path / "peft", LAYERS)
    vla = {"model_path": str(base), "adapter_path": str(tmp_path / "peft")}
    vla["model_config"] = {"modalities": ["proprio"], "hidden_size": 16}
    config = ExperimentConfig(
        policy=PolicyConfig(freeze="lora", lora=LoRAConfig(RANK, ALPHA), vla_config=VLAConfig(**vla))
    )
    observations = TensorDict({"proprio": torch.randn(5, 3)}, [5])
    built = make_model(config, observations, (3,), torch.device("cpu"))
    action = built.model(observations, deterministic=True)
    torch.testing.assert_close(action, theirs.base_model.model(observations, deterministic=True))
