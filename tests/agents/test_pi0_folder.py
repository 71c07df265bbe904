"""A pi0's folder: transformers' layout read and written, statistics, tokenizer, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pi0 import looks, make, sampled, sampled_by_hub
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PI0Config, PI0ForConditionalGeneration
from worlds import ROOT

from agents.pi0 import LONGEST_PROMPT, START
from agents.pi0_folder import as_hub, pi0_config
from agents.prompts import prompt_tokens
from research.errors import UserError
from research.schema import encode_text


def words_in(folder) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "go": 2, "there": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))


@torch.no_grad()
def test_a_folder_of_transformers_is_loaded_whole(tmp_path):
    original = make()
    hub = PI0ForConditionalGeneration(original.config)
    hub.save_pretrained(tmp_path)
    words_in(tmp_path)
    loaded = make(pretrained=str(tmp_path), config=None)
    found = as_hub(loaded).state_dict()
    assert found.keys() == hub.state_dict().keys()
    for name, weight in hub.state_dict().items():
        assert torch.equal(weight, found[name]), name
    ids, is_token = prompt_tokens(loaded.words, looks()["language"], 3, torch.device("cpu"), LONGEST_PROMPT, START)
    assert ids[0, is_token[0]].tolist() == [1, 2] and ids[1, is_token[1]].tolist() == [1, 0, 0, 3]
    long = encode_text("go " * 48, 160)[None].long()
    with pytest.raises(UserError, match=r"the instruction 'go go .* has 49 tokens, more than 48"):
        prompt_tokens(loaded.words, long, 1, torch.device("cpu"), LONGEST_PROMPT, START)
    as_bytes, is_byte = prompt_tokens(None, long, 1, torch.device("cpu"), LONGEST_PROMPT, START)
    assert bytes(as_bytes[0, is_byte[0]].tolist()) == b"\x01" + ("go " * 48).encode() + b"\n"  # nothing is cut off


@torch.no_grad()
def test_an_export_is_what_transformers_writes_and_reads(tmp_path):
    model, seen, noise = make(), looks(), torch.randn(3, 4, 8)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    model.export(tmp_path / "ours")
    as_hub(model).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and len(ours) == len(as_hub(model).state_dict())
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    config, expected = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert config == {**expected, "num_inference_steps": 4, "instruction_tokens": "bytes"}
    assert config["model_type"] == "pi0" and config["architectures"] == ["PI0ForConditionalGeneration"]
    hub, told = PI0ForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values())
    assert torch.equal(sampled_by_hub(hub.eval(), seen, noise), sampled_by_hub(as_hub(model), seen, noise))
    other = make(pretrained=str(tmp_path / "ours"), config=None)
    assert torch.equal(sampled(other, seen, noise), sampled(model, seen, noise))
    assert torch.equal(other.get_value(seen), model.get_value(seen))
    (tmp_path / "ours" / "value_head.safetensors").unlink()
    fresh = make(pretrained=str(tmp_path / "ours"), config=None)
    assert not torch.equal(fresh.get_value(seen), model.get_value(seen))


@torch.no_grad()
def test_what_was_learned_of_the_noise_is_exported_too(tmp_path):
    model = make(noise=[0.05, 0.5])
    for parameter in model.noise_head.parameters():
        parameter.mul_(3)
    model.export(tmp_path / "out")
    draws = []
    for one in (model, make(pretrained=str(tmp_path / "out"), config=None, noise=[0.05, 0.5])):
        torch.manual_seed(4)
        draws.append(one.decide(one.run_stages(looks()), deterministic=False))
    assert torch.equal(draws[0]["action"], draws[1]["action"])
    assert torch.equal(draws[0]["action_log_prob"], draws[1]["action_log_prob"])


def test_denoising_steps_are_those_of_the_folder_unless_others_are_named(tmp_path):
    make(steps=7).export(tmp_path / "out")
    counted = [
        len(make(pretrained=str(tmp_path / "out"), config=None, **options).flow.steps) for options in ({}, {"steps": 3})
    ]
    assert counted == [7, 3] and len(make().flow.steps) == 4


@torch.no_grad()
def test_an_export_keeps_the_units_of_the_data_and_the_tokenizer(tmp_path):
    numbers = {"q01": [0.0, -2.0, 0.3], "q99": [1.0, 2.0, 0.7], "mask": [True, True, False]}
    statistics = {"action": numbers, "observation.state": {**numbers, "mask": [True] * 3}}
    (tmp_path / "source").mkdir()
    words_in(tmp_path / "source")
    (tmp_path / "source" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "stats.json").write_text(json.dumps(statistics))
    options = {"statistics": str(tmp_path / "stats.json"), "normalisation": "quantiles"}
    model = make(tokenizer=str(tmp_path / "source"), **options)
    model.export(tmp_path / "out")
    files = {"config.json", "model.safetensors", "value_head.safetensors", "stats.json", "tokenizer.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*files, "tokenizer_config.json"}
    written = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert written["action"] == {"mean": [0.5, 0.0, 0.0], "std": [0.5, 2.0, 1.0]}
    other = make(pretrained=str(tmp_path / "out"), config=None)
    assert other.words.get_vocab() == model.words.get_vocab()
    actions = []
    for one in (model, other):
        torch.manual_seed(2)
        actions.append(one.forward(looks(), deterministic=True))
    assert torch.equal(*actions)
    other.export(tmp_path / "again")
    for file in sorted(files - {"model.safetensors", "value_head.safetensors"}):
        assert (tmp_path / "again" / file).read_text() == (tmp_path / "out" / file).read_text(), file


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", r"there is no .*config.json; pretrained is a folder"),
        ("no tokenizer", r"tokenizer: there is no .*tokenizer.json; name a folder"),
        ("tokenizer.json", "tokenizer.json cannot be read"),
        ("weight", r"lacks action_out_proj.weight; what there is besides: other.weight"),
        ("shape", r"does not fit its configuration: action_out_proj.*\[9, 32\] for \[8, 32\]"),
        ("weights", "no weights of pi0 in"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(tmp_path, what, message):
    PI0ForConditionalGeneration(make().config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if what == "weight":
        weights["other.weight"] = weights.pop("action_out_proj.weight")
    if what == "shape":
        weights["action_out_proj.weight"] = torch.zeros(9, 32)
    save_file(weights, file, {"format": "pt"})
    if what in ("config", "weights"):
        (tmp_path / {"config": "config.json", "weights": "model.safetensors"}[what]).unlink()
    if what == "tokenizer.json":
        (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=message) as caught:
        make(pretrained=str(tmp_path), config=None)
    assert "\n" not in str(caught.value)


def test_the_full_size_is_that_of_the_published_weights():
    full = json.loads((ROOT / "experiments" / "configs" / "pi0.json").read_text())["policy"]["vla_config"]
    with torch.device("meta"):
        ours, theirs = (
            PI0ForConditionalGeneration(c) for c in (pi0_config(None, full["model_config"]["config"]), PI0Config())
        )
    shapes = [{name: weight.shape for name, weight in hub.state_dict().items()} for hub in (ours, theirs)]
    assert shapes[0] == shapes[1] and sum(shape.numel() for shape in shapes[0].values()) == 3_501_372_176
