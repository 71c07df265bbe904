"""Training checkpoints: complete, atomic, and refused in one line when broken."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from research.runs.checkpoint import load_checkpoint, restore_rng, save_checkpoint
from research.schema import UserError

RUN = {"config": {}, "model_state_dict": {}}  # what makes it a training run's


def test_everything_comes_back(tmp_path):
    path = tmp_path / "last.pt"
    state = {"weights": {"a": torch.arange(3.0)}, "iteration": 7, "best": float("-inf"), "nothing": None}
    save_checkpoint(path, **RUN, **state)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"]["a"], torch.arange(3.0))
    assert loaded["iteration"] == 7 and loaded["best"] == float("-inf") and loaded["nothing"] is None


def test_random_numbers_go_on_as_if_never_interrupted(tmp_path):
    save_checkpoint(tmp_path / "last.pt", **RUN)
    expected = torch.rand(4), np.random.rand(4)
    torch.rand(100), np.random.rand(100)
    restore_rng(load_checkpoint(tmp_path / "last.pt"))
    assert torch.equal(torch.rand(4), expected[0]) and (np.random.rand(4) == expected[1]).all()


def test_a_run_from_a_gpu_goes_on_where_there_is_none(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", **RUN)
    expected = torch.rand(4)
    state = load_checkpoint(tmp_path / "last.pt")
    state["rng"]["torch_cuda"] = [torch.zeros(16, dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    restore_rng(state)
    assert torch.equal(torch.rand(4), expected)


def test_a_folder_means_its_last_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "checkpoints" / "last.pt", **RUN, iteration=3)
    assert load_checkpoint(tmp_path)["iteration"] == 3


def test_a_checkpoint_is_all_that_a_save_leaves_behind(tmp_path):
    path = tmp_path / "new" / "checkpoints" / "last.pt"
    for iteration in (1, 2):
        save_checkpoint(path, **RUN, iteration=iteration)
    assert os.listdir(path.parent) == ["last.pt"] and load_checkpoint(path)["iteration"] == 2


def test_a_save_that_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, **RUN, iteration=1)
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        save_checkpoint(path, **RUN, iteration=2, broken=lambda: None)
    assert load_checkpoint(path)["iteration"] == 1


class Evil:
    """Makes a file when it is read with all that pickle allows."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "text", "pickle", "bare weights"])
def test_a_broken_file_is_one_clear_line(tmp_path, kind):
    path = tmp_path / "last.pt"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        save_checkpoint(path, **RUN, weights=torch.zeros(1000))
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"rng": Evil(tmp_path / "owned")}))
    elif kind == "bare weights":
        torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"last\.pt") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()
