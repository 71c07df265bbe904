"""A policy that is shared acts elsewhere as it did here, bit for bit, and its folder runs no code of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from test_families import looks
from worlds import ThreeMethods, small_model

from agents.hub import SharedPolicy
from agents.small_vla import SmallVLA
from research.errors import UserError

CLASS = "agents.small_vla.SmallVLA"
CONFIG = {"action_dim": 3, "modalities": ["rgb", "proprio"], "hidden_size": 16}


def shared() -> SharedPolicy:
    seen = looks().select("rgb", "proprio")
    model = SmallVLA(**CONFIG)
    for weight in model.parameters():
        weight.data.add_(0.01)
    return SharedPolicy.of(model, CLASS, CONFIG, seen, "off")


@pytest.mark.parametrize("draws", [False, True])
def test_a_policy_acts_from_its_folder_bit_for_bit(tmp_path, draws):
    ours = shared()
    ours.save_pretrained(tmp_path / "vla")
    theirs = SharedPolicy.from_pretrained(tmp_path / "vla")
    for row in range(3):
        seen = {key: looks()[key][row].numpy() for key in ("rgb", "proprio")}
        actions = []
        for policy in (ours, theirs):
            torch.manual_seed(row)
            actions.append(policy.act(seen, deterministic=not draws))
        assert np.array_equal(*actions) and actions[0].shape == (3,)
    assert {file.name for file in (tmp_path / "vla").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert str(tmp_path) not in (tmp_path / "vla" / "config.json").read_text()
    with pytest.raises(UserError, match="was .32, 32, 3. in training"):
        theirs.act({"rgb": np.zeros((16, 16, 3), np.uint8), "proprio": np.zeros(3, np.float32)})


def test_pushing_uploads_the_folder(monkeypatch):
    """The client itself is asked for nothing but a repository and an upload of these files."""
    asked = []

    def create(self, repo_id, **options):
        asked.append(repo_id)
        return type("Repo", (), {"repo_id": repo_id})()

    def upload(self, *, repo_id, folder_path, **options):
        asked.append((repo_id, sorted(file.name for file in Path(folder_path).iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    shared().push_to_hub("me/my_vla")
    assert asked == ["me/my_vla", ("me/my_vla", ["README.md", "config.json", "model.safetensors"])]


def test_a_folder_that_names_other_code_imports_nothing(tmp_path):
    shared().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_class": "antigravity.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="antigravity.Model is code of its own; look at it, and import antigravity"):
        SharedPolicy.from_pretrained(tmp_path)
    assert "antigravity" not in sys.modules


class Words(ThreeMethods):
    """A user's model, which names no observations and reads words."""

    def __init__(self, action_dim: int):
        super().__init__(small_model())


def test_a_model_of_three_methods_that_reads_words_is_shared(tmp_path):
    seen = looks().select("rgb", "proprio", "language")
    ours = SharedPolicy.of(Words(3), f"{__name__}.Words", {"action_dim": 3}, seen, "off")
    ours.save_pretrained(tmp_path / "vla")
    theirs = SharedPolicy.from_pretrained(tmp_path / "vla")
    observation = {key: seen[key][0].numpy() for key in ("rgb", "proprio")} | {"language": "go"}
    actions = []
    for policy in (ours, theirs):
        torch.manual_seed(0)  # three methods draw
        actions.append(policy.act(observation))
    assert np.array_equal(*actions)
    with pytest.raises(UserError, match="'language' is missing; the model reads language, proprio, rgb"):
        theirs.act({key: observation[key] for key in ("rgb", "proprio")})


def test_a_policy_that_is_moved_acts_where_it_lies():
    """On a device without memory nothing comes of it, but it is asked there."""
    policy, asked = shared(), []
    encoder = policy.model.vision_encoder
    encoder.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].device.type))
    observation = {key: looks()[key][0].numpy() for key in ("rgb", "proprio")}
    policy.act(observation)
    policy.to("meta")
    with pytest.raises(RuntimeError):  # torch's NotImplementedError is one
        policy.act(observation)
    assert asked == ["cpu", "meta"]


def test_words_that_happen_to_be_names_are_shared(tmp_path, monkeypatch):
    (tmp_path / "gaussian").mkdir()
    monkeypatch.chdir(tmp_path)
    config = CONFIG | {"action_head": "gaussian"}
    assert SharedPolicy.of(SmallVLA(**config), CLASS, config, looks().select("rgb", "proprio"), "off").act


def test_what_only_this_machine_has_is_not_shared(tmp_path):
    seen = looks().select("rgb", "proprio")
    with pytest.raises(UserError, match="model_config.statistics is a file of this machine"):
        SharedPolicy.of(SmallVLA(**CONFIG), CLASS, CONFIG | {"statistics": str(tmp_path)}, seen, "off")
    larger = SmallVLA(**(CONFIG | {"hidden_size": 32}))
    with pytest.raises(UserError, match="has parts that its constructor lacks; export to a .pt") as refused:
        SharedPolicy.of(larger, CLASS, CONFIG, seen, "off")
    assert "\n" not in str(refused.value)
