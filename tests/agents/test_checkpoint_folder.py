"""What all families' folders share: where an export may go, what is copied, and the head of the value apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from agents.checkpoint_folder import (
    copy_small_files,
    fill_own_heads,
    start_export,
    write_own_heads,
    write_tensors,
)
from agents.weights import read_file
from research.errors import UserError
from research.training.freezing import freeze


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.language_model, self.value_head = nn.Linear(3, 2), nn.Linear(2, 1)


def test_a_folder_is_made_and_one_that_holds_something_is_refused(tmp_path):
    start_export(Model(), tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    start_export(Model(), tmp_path / "new" / "folder")
    (tmp_path / "new" / "folder" / "config.json").write_text("{}")
    for taken in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "config.json"):
        with pytest.raises(UserError, match=r"Model: export: .* is not empty; name a folder that is not there yet"):
            start_export(Model(), taken)


def test_adapters_are_merged_before_an_export(tmp_path):
    model = Model()
    freeze(model, "lora")
    with pytest.raises(UserError, match=r"merge the adapters .*language_model.lora_A") as caught:
        start_export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)


def test_small_files_are_copied_and_weights_are_not(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    (source / "onnx").mkdir(parents=True)
    folder.mkdir()
    kept, left = ("tokenizer.json", "merges.txt", "modeling.py"), ("a.safetensors", "b.bin", "c.index.json", "onnx/d")
    for name in (*kept, *left):
        (source / name).write_text(name)
    copy_small_files(source, folder)
    assert {file.name for file in folder.iterdir()} == set(kept)
    copy_small_files(None, folder)
    copy_small_files(tmp_path / "absent", folder)


def test_the_head_of_the_value_is_read_where_there_is_one(tmp_path):
    model, other = Model(), Model()
    fill_own_heads(other, tmp_path, "option")
    assert not torch.equal(other.value_head.weight, model.value_head.weight)
    write_own_heads(model, tmp_path)
    fill_own_heads(other, tmp_path, "option")
    assert torch.equal(other.value_head.weight, model.value_head.weight)
    other.value_head = nn.Linear(3, 1)
    with pytest.raises(UserError, match=r"option: .*value_head.safetensors does not fit Linear: weight should be"):
        fill_own_heads(other, tmp_path, "option")
    assert [file.name for file in tmp_path.iterdir()] == ["value_head.safetensors"]
    assert set(read_file(tmp_path / "value_head.safetensors")) == {"weight", "bias"}


def test_tensors_are_written_from_whatever_they_are_views_of(tmp_path):
    wide = torch.arange(6.0).view(2, 3)
    write_tensors({"columns": wide.T, "trained": nn.Parameter(wide)}, tmp_path / "x.safetensors")
    found = read_file(tmp_path / "x.safetensors")
    assert torch.equal(found["columns"], wide.T) and torch.equal(found["trained"], wide)
