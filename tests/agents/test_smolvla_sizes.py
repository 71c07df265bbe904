"""SmolVLA's configuration: LeRobot's names and defaults, and settings that mean something else."""

from __future__ import annotations

import json

import pytest
from test_smolvla import TINY, make

from agents.smolvla_sizes import SmolVLASizes, read_sizes
from research.errors import UserError

POLICY = {"type": "smolvla", "chunk_size": 7, "num_vlm_layers": 3, "resize_imgs_with_padding": [8, 4], "device": "cpu"}


def written(folder, **values) -> str:
    (folder / "config.json").write_text(json.dumps({**POLICY, **values}))
    return str(folder)


def test_sizes_are_the_files_then_the_options_then_lerobots(tmp_path):
    sizes, found = read_sizes(written(tmp_path), {"num_vlm_layers": 2})
    assert sizes == SmolVLASizes(chunk_size=7, num_vlm_layers=2, resize_imgs_with_padding=(8, 4))
    assert found["device"] == "cpu" and sizes.max_action_dim == 32


def test_the_expert_attends_to_itself_in_every_second_layer():
    assert [SmolVLASizes().self_attention(layer) for layer in range(4)] == [True, False, True, False]
    alone = SmolVLASizes(self_attn_every_n_layers=-1)
    assert not any(alone.self_attention(layer) for layer in range(4))
    among = SmolVLASizes(attention_mode="self_attn")
    assert all(among.self_attention(layer) for layer in range(4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "pi0"}, "is of pi0, not of LeRobot's smolvla"),
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha is True, which is not computed here"),
        ({"add_image_special_tokens": True}, "add_image_special_tokens is True, which is not computed here"),
        ({"num_expert_layers": 1}, "an expert with fewer layers than the 3"),
    ],
)
def test_what_a_file_asks_for_and_is_not_computed_is_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        read_sizes(written(tmp_path, **values), None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chunk_sizes": 4}, "'chunk_sizes' is no size of SmolVLA; did you mean 'chunk_size'"),
        ({"chunk_size": 0}, "chunk_size should be a whole number, at least 1, got 0"),
        ({"num_vlm_layers": "all"}, "num_vlm_layers should be a whole number, got 'all'"),
        ({"expert_width_multiplier": 0}, "expert_width_multiplier should be a number above 0, got 0"),
        ({"attention_mode": "both"}, "attention_mode is cross_attn or self_attn, got 'both'"),
        ({"resize_imgs_with_padding": [32]}, r"resize_imgs_with_padding should be \[width, height\] or null"),
        (None, "set pretrained to a folder, or config to the sizes of fresh weights"),
    ],
)
def test_sizes_that_are_none_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        read_sizes(None, config)


@pytest.mark.parametrize(
    ("vlm", "message"),
    [
        ({**TINY["vlm"], "scale": 2}, "'scale' is no argument of SmolVLMConfig"),
        ({"text_config": {"model_type": "gemma"}}, "the language model is of the kind 'gemma'"),
        ({"text_config": {"model_type": "llama", "hidden_size": "wide"}}, "no configuration of SmolVLM"),
        ("nowhere", "vlm: there is no nowhere/config.json"),
        (None, "fresh weights have no sizes; set it to a local folder .*, or to its sizes"),
    ],
)
def test_a_vision_language_model_that_is_none_is_refused(vlm, message):
    with pytest.raises(UserError, match=message):
        make(vlm=vlm)
