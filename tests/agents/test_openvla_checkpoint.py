"""Folders of OpenVLA: what is written is read back, in the public layout, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from tokenizers import Tokenizer, models, pre_tokenizers
from worlds import ROOT

from agents.loading import load_vla_model
from agents.openvla import OpenVLA
from research.action_map import ActionMap
from research.errors import UserError
from research.schema import encode_text

TINY = json.loads((ROOT / "experiments" / "configs" / "openvla_tiny.json").read_text())
TINY = TINY["policy"]["vla_config"]["model_config"]["config"]
ACTION = {"q01": [-1.0, 0.0, 0.0], "q99": [1.0, 4.0, 1.0], "mask": [True, True, False]}
# Of the public checkpoint's names, one of each kind.
NAMES = (
    "vision_backbone.featurizer.cls_token",
    "vision_backbone.featurizer.reg_token",
    "vision_backbone.featurizer.pos_embed",
    "vision_backbone.featurizer.patch_embed.proj.weight",
    "vision_backbone.featurizer.blocks.0.attn.qkv.bias",
    "vision_backbone.featurizer.blocks.2.ls1.scale_factor",
    "vision_backbone.fused_featurizer.attn_pool.latent",
    "vision_backbone.fused_featurizer.attn_pool.kv.weight",
    "vision_backbone.fused_featurizer.blocks.1.mlp.fc2.weight",
    "vision_backbone.fused_featurizer.norm.weight",
    "projector.fc3.bias",
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.1.self_attn.q_proj.weight",
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of fresh weights, as `export` writes it, with files of the public code beside it."""
    torch.manual_seed(0)
    statistics, tokenizer = tmp_path / "dataset_statistics.json", tmp_path / "tokenizer.json"
    statistics.write_text(json.dumps({"bridge": {"action": ACTION, "num_trajectories": 3}}))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "go": 2, "there": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tokenizer))
    model = OpenVLA(3, config=TINY, statistics=str(statistics), tokenizer=str(tmp_path))
    model.export(tmp_path / "exported")
    (tmp_path / "exported" / "modeling_prismatic.py").write_text("# the public code\n")
    return tmp_path / "exported"


def look() -> TensorDict:
    picture = torch.arange(2 * 32 * 32 * 3).view(2, 32, 32, 3).remainder(256).to(torch.uint8)
    texts = torch.stack([encode_text(text, 16) for text in ("go", "go there")]).long()
    return TensorDict({"rgb": picture, "language": texts}, batch_size=[2])


def rewrite(folder, **changes) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@torch.no_grad()
def test_a_folder_is_read_and_written_as_it_was(folder, tmp_path):
    first = OpenVLA(3, pretrained=str(folder)).eval()
    first.value_head[-1].bias.fill_(5.0)
    first.export(tmp_path / "again")
    second = OpenVLA(3, pretrained=str(tmp_path / "again")).eval()
    for name, weight in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight), name
    draws = []
    for model in (first, second):
        torch.manual_seed(1)
        draws.append(model.decide(model.run_stages(look()), deterministic=False))
    assert torch.equal(draws[0]["action"], draws[1]["action"]) and (draws[1]["state_value"] > 3).all()
    for name in ("config.json", "tokenizer.json", "dataset_statistics.json", "modeling_prismatic.py"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text(), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["min_max", "mean_std"])
def test_an_export_acts_as_what_was_trained_by_the_percentiles_that_all_code_reads(folder, tmp_path, kind):
    numbers = {"q01": [-9.0] * 3, "q99": [9.0] * 3, "min": [-1.0, 0.0, 0.0], "max": [1.0, 4.0, 1.0]}
    numbers |= {"mean": [0.5, 1.0, 0.0], "std": [0.1, 2.0, 3.0], "mask": [True, True, False]}
    (tmp_path / "stats.json").write_text(json.dumps({"action": numbers}))
    trained = OpenVLA(3, pretrained=str(folder), statistics=str(tmp_path / "stats.json"), normalisation=kind)
    trained.export(tmp_path / "again")
    read = OpenVLA(3, pretrained=str(tmp_path / "again"))
    for draw in (trained, read):
        assert torch.allclose(draw.actions.unnormalise(torch.ones(3)), trained.actions.middle + trained.actions.scale)
    assert trained.actions.scale.tolist() == pytest.approx([1.0, 2.0, 1.0] if kind == "min_max" else [0.1, 2.0, 1.0])


def test_how_actions_are_decoded_is_in_the_folder(folder, tmp_path):
    assert OpenVLA(3, pretrained=str(folder)).decoding == "autoregressive"
    OpenVLA(3, pretrained=str(folder), decoding="parallel").export(tmp_path / "again")
    assert OpenVLA(3, pretrained=str(tmp_path / "again")).decoding == "parallel"
    named = OpenVLA(3, pretrained=str(tmp_path / "again"), decoding="autoregressive")
    assert named.decoding == "autoregressive"
    rewrite(tmp_path / "again", action_decoding="sideways")
    with pytest.raises(UserError, match="decoding is one of autoregressive, parallel, got 'sideways'"):
        OpenVLA(3, pretrained=str(tmp_path / "again"))


@pytest.mark.parametrize(("gripper", "expected"), [("as_is", [0.5, 1.0, 0.0]), ("zero_one", [0.5, 1.0, 1.0])])
def test_statistics_are_of_what_the_world_gets(folder, gripper, expected):
    """Actions of [-1, 1] become [-2, 2], [0, 4] and [0, 2] there; the data's largest ones are 1, 4 and 1."""
    model, one = OpenVLA(3, pretrained=str(folder), gripper=gripper), np.ones(3)
    offset = np.array([0.0, 2.0, 1.0])
    model.act_through(ActionMap(-one, one, np.array([2.0, 2.0, 1.0]), offset, (3,), np.dtype(np.float32)))
    assert model.actions.unnormalise(torch.ones(3)).tolist() == pytest.approx(expected)
    assert model.actions.normalise(torch.tensor(expected)).tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_the_layout_is_the_public_one(folder):
    weights = load_file(folder / "model.safetensors")
    assert set(NAMES) <= weights.keys() and not any(name.startswith("value_head") for name in weights)
    assert weights["vision_backbone.featurizer.blocks.0.attn.qkv.weight"].shape == (96, 32)
    content = json.loads((folder / "config.json").read_text())
    assert content["model_type"] == "openvla" and content["norm_stats"] == {"bridge": {"action": ACTION}}
    assert content["text_config"]["model_type"] == "llama" and content["use_fused_vision_backbone"]
    assert set(load_file(folder / "value_head.safetensors")) == {
        f"{i}.{n}" for i in (0, 1, 3) for n in ("weight", "bias")
    }


def test_statistics_are_those_of_the_folder_by_either_file_or_the_ones_that_are_named(folder, tmp_path):
    assert OpenVLA(3, pretrained=str(folder)).statistics == ("bridge", ACTION)
    (folder / "dataset_statistics.json").unlink()
    assert OpenVLA(3, pretrained=str(folder)).statistics == ("bridge", ACTION)
    other = {"action": {**ACTION, "q99": [2.0, 4.0, 1.0]}}
    rewrite(folder, norm_stats={"bridge": {"action": ACTION}, "fractal": other})
    chosen = OpenVLA(3, pretrained=str(folder), dataset="fractal")
    assert chosen.actions.scale.tolist() == [1.5, 2.0, 1.0]
    with pytest.raises(UserError, match="statistics of 2 data sets; name one of bridge, fractal"):
        OpenVLA(3, pretrained=str(folder))
    (tmp_path / "stats.json").write_text(json.dumps(other))
    named = OpenVLA(3, pretrained=str(folder), statistics=str(tmp_path / "stats.json"))
    assert named.statistics == ("actions", other["action"])
    named.export(tmp_path / "named")
    assert OpenVLA(3, pretrained=str(tmp_path / "named")).statistics == ("actions", other["action"])
    rewrite(folder, norm_stats=None)
    with pytest.raises(UserError, match=r"has no dataset_statistics.json, and no norm_stats in its config.json: set"):
        OpenVLA(3, pretrained=str(folder))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("action_head.model.fc1.weight", torch.zeros(2), "has parts of OpenVLA-OFT .* has no distribution to train"),
        ("model.vlm_with_expert.lm_expert.norm.weight", torch.zeros(2), "holds weights of SmolVLA; set policy.vla"),
        ("projector.fc3.bias", None, "projector: .* fc3.bias should be .64., got none"),
        ("language_model.lm_head.weight", torch.zeros(9, 64), "lm_head.weight should be .576, 64., got .9, 64."),
    ],
)
def test_weights_that_are_not_openvlas_are_refused(folder, name, value, message):
    weights = load_file(folder / "model.safetensors")
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message) as caught:
        OpenVLA(3, pretrained=str(folder))
    assert "\n" not in str(caught.value)


def test_a_head_that_lies_beside_the_weights_is_refused(folder):
    (folder / "action_head--150000_checkpoint.pt").touch()
    with pytest.raises(UserError, match=r"has no distribution to train.* \(action_head--150000_checkpoint.pt\)"):
        OpenVLA(3, pretrained=str(folder))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "there is no .*config.json; pretrained is a folder with that file"),
        ("model.safetensors", "holds no weights .model.safetensors, "),
        ("tokenizer.json", "OpenVLA: tokenizer: there is no .*tokenizer.json; name a folder"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(folder, file, message):
    (folder / file).unlink()
    with pytest.raises(UserError, match=message):
        OpenVLA(3, pretrained=str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "qwen2"}}, "is not OpenVLA's: expected a text_config of Llama"),
        ({"timm_model_ids": None}, "is not OpenVLA's: expected a text_config of Llama, and timm_model_ids"),
        ({"timm_model_ids": ["vit_so400m_patch14_siglip_224"]}, "no sizes of OpenVLA"),
        ({"image_sizes": [32, 64]}, "no sizes of OpenVLA"),
        ({"image_sizes": [30, 30]}, "30 pixels are no whole patches"),
        ({"image_sizes": [64, 64]}, "vision_backbone: .*pos_embed should be .1, 64, 32., got .1, 16, 32."),
        ({"pad_to_multiple_of": 128}, "vocab_size is 576, too few for 256 bytes or words, 256 bins"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=message) as caught:
        OpenVLA(3, pretrained=str(folder))
    assert "\n" not in str(caught.value)


def test_another_size_of_actions_and_unknown_sizes_are_refused(folder):
    with pytest.raises(UserError, match="q01 has 3 numbers, and 7 are expected"):
        OpenVLA(7, pretrained=str(folder))
    with pytest.raises(UserError, match="config: 'image_size' is not known; did you mean 'image_sizes'"):
        OpenVLA(3, config={"image_size": 32})


@pytest.mark.parametrize("kind", ["quantiles", "min_max", "mean_std"])
@pytest.mark.parametrize("gripper", ["as_is", "one_zero"])
def test_a_model_without_statistics_acts_the_same_once_it_was_exported(tmp_path, kind, gripper):
    torch.manual_seed(3)
    model, options = OpenVLA(3, config=TINY, gripper=gripper).eval(), {"gripper": gripper, "normalisation": kind}
    model.export(tmp_path / "first")
    again = OpenVLA(3, pretrained=str(tmp_path / "first"), **options).eval()
    again.export(tmp_path / "second")
    seen = look()
    for other in (again, OpenVLA(3, pretrained=str(tmp_path / "second"), **options).eval()):
        assert torch.equal(other(seen, deterministic=True), model(seen, deterministic=True))


def test_the_clone_that_ships_acts_the_same_once_it_was_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "experiments")
    vla = json.loads(Path("configs/openvla_reach.json").read_text())["policy"]["vla_config"]
    arguments = {"action_dim": 3, "modalities": ["rgb"], **vla["model_config"]}
    model = load_vla_model(vla["model_path"], vla["model_class"], arguments).eval()
    model.export(tmp_path / "clone")
    read = {name: arguments[name] for name in ("decoding", "prompt_tokens")}
    again = OpenVLA(3, ["rgb"], pretrained=str(tmp_path / "clone"), **read).eval()
    seen = TensorDict({"rgb": torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)}, [4])
    assert torch.equal(again(seen, deterministic=True), model(seen, deterministic=True))
