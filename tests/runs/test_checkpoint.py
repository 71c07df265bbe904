"""Training checkpoints: complete, whole or not there, and refused in one line when broken."""

from __future__ import annotations

import json
import os
import pickle
import random
import threading

import numpy as np
import pytest
import torch

from research.errors import UserError
from research.runs import checkpoint
from research.runs.checkpoint import (
    CheckpointWriter,
    frozen_weights,
    holds_all_weights,
    load_checkpoint,
    restore_rng,
    snapshot,
    write_checkpoint,
)
from research.runs.folder import RunFolder


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path, "exp")


def state(step: int = 0, **more) -> dict:
    return snapshot({"trainer": {"seed": 1}}, model_state_dict={}, progress={"global_step": step}, **more)


def test_everything_comes_back(folder):
    more = {"weights": {"a": torch.arange(3.0)}, "best": float("-inf"), "nothing": None, "shapes": [(1, 2), "x"]}
    write_checkpoint(folder.checkpoint(7), state(7, **more))
    loaded = load_checkpoint(folder)
    assert torch.equal(loaded["weights"]["a"], torch.arange(3.0)) and loaded["shapes"] == [(1, 2), "x"]
    assert loaded["best"] == float("-inf") and loaded["nothing"] is None and loaded["progress"] == {"global_step": 7}
    assert loaded["config"] == {"trainer": {"seed": 1}} and loaded["source"] == str(folder.checkpoint(7))
    manifest = json.loads((folder.checkpoint(7) / "manifest.json").read_text())
    assert manifest["global_step"] == 7 and manifest["versions"]["torch"] == torch.__version__


def test_a_snapshot_is_of_its_moment():
    weights = {"a": torch.zeros(3)}
    taken = snapshot({}, model_state_dict=weights, nested=[weights])
    weights["a"] += 1
    assert taken["model_state_dict"]["a"].sum() == taken["nested"][0]["a"].sum() == 0


def test_random_numbers_go_on_as_if_never_interrupted(folder):
    write_checkpoint(folder.checkpoint(0), state())
    expected = torch.rand(4), np.random.rand(4), random.random()
    torch.rand(100), np.random.rand(100), random.random()
    restore_rng(load_checkpoint(folder))
    assert torch.equal(torch.rand(4), expected[0]) and (np.random.rand(4) == expected[1]).all()
    assert random.random() == expected[2]


def test_a_run_from_a_gpu_goes_on_where_there_is_none(monkeypatch):
    taken = state()
    expected = torch.rand(4)
    taken["rng"]["torch_cuda"] = [torch.zeros(16, dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    restore_rng(taken)
    assert torch.equal(torch.rand(4), expected)


def test_the_newest_and_the_best_are_kept(folder):
    writer = CheckpointWriter(folder, keep=2)
    for step in range(5):
        writer.submit(state(step))
        if step in (0, 2):
            writer.submit(state(step), best=True)
    writer.wait()
    left = sorted(os.listdir(folder.checkpoints))
    assert left == ["best_000000002", "step_000000003", "step_000000004"]
    assert folder.last_checkpoint == folder.checkpoint(4) and folder.best_checkpoint == folder.checkpoint(2, best=True)
    writer.remove_after(3)  # a run that is resumed from there will write step 4 again
    assert sorted(os.listdir(folder.checkpoints)) == ["best_000000002", "step_000000003"]


def test_the_run_goes_on_while_its_checkpoint_is_written(folder, monkeypatch):
    written, write, gone_on = [], checkpoint.write_checkpoint, threading.Event()

    def slowly(path, taken):
        assert gone_on.wait(60), "submit waited for its own checkpoint"
        write(path, taken)
        written.append(path)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slowly)
    writer = CheckpointWriter(folder, keep=2)
    writer.submit(state(1))
    assert not written
    gone_on.set()
    writer.submit(state(2))  # waits for the one before
    assert len(written) == 1
    writer.wait()
    assert len(written) == 2


def test_what_cannot_be_written_is_said_and_the_one_before_stays(folder, monkeypatch):
    writer = CheckpointWriter(folder, keep=2)
    writer.submit(state(1))
    writer.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    writer.submit(state(2))
    with pytest.raises(UserError, match="No space left on device; the ones before are whole"):
        writer.wait()
    assert load_checkpoint(folder)["progress"] == {"global_step": 1}


@pytest.mark.parametrize("where", ["state.pt", "manifest.json"])
def test_one_flipped_bit_anywhere_is_noticed_and_the_one_before_is_taken(folder, capsys, where):
    for step in (1, 2):
        write_checkpoint(folder.checkpoint(step), state(step, weights=torch.arange(100.0)))
    file = folder.checkpoint(2) / where
    whole = file.read_bytes()
    for position in range(0, 8 * len(whole), max(1, 8 * len(whole) // 40)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="step_000000002") as caught:
            load_checkpoint(folder.checkpoint(2))
        assert "\n" not in str(caught.value)
        assert load_checkpoint(folder)["progress"] == {"global_step": 1}, position
        assert "skipped a damaged checkpoint" in capsys.readouterr().out
    file.write_bytes(whole)
    assert load_checkpoint(folder)["progress"] == {"global_step": 2}


def test_what_a_kill_left_half_written_or_half_removed_is_no_checkpoint(folder):
    write_checkpoint(folder.checkpoint(1), state(1))
    (folder.checkpoints / "step_000000002.partial").mkdir()
    (folder.checkpoints / "step_000000002.partial" / "manifest.json").write_text("{}")  # killed before the renaming
    (folder.checkpoint(3)).mkdir()
    (folder.checkpoint(3) / "state.pt").write_bytes(b"half")
    assert folder.last_checkpoint == folder.checkpoint(1)
    write_checkpoint(folder.checkpoint(2), state(2))
    assert folder.last_checkpoint == folder.checkpoint(2)
    assert not (folder.checkpoints / "step_000000002.partial").exists()


def test_frozen_weights_are_in_the_run_where_they_are_in_no_file(folder):
    hashes = {"hashes": {"eyes.weight": "0"}}
    write_checkpoint(folder.checkpoint(1), state(1, audit=hashes))
    assert not holds_all_weights(load_checkpoint(folder)) and frozen_weights(load_checkpoint(folder)) is None
    write_checkpoint(folder.checkpoints / "frozen", snapshot({}, model_state_dict={"eyes.weight": torch.ones(2)}))
    assert torch.equal(frozen_weights(load_checkpoint(folder))["eyes.weight"], torch.ones(2))
    assert holds_all_weights(load_checkpoint(folder)) and load_checkpoint(folder)["progress"] == {"global_step": 1}


class Evil:
    """Makes a file when it is read with all that pickle allows."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


BROKEN = ["missing", "empty", "truncated", "text", "pickle", "bare weights", "list", "numbers", "unhashable"]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_of_an_earlier_version_is_one_clear_line(tmp_path, kind):
    path = tmp_path / "last.pt"
    contents = {"bare weights": {"weight": torch.zeros(2)}, "list": [1, 2], "numbers": {"config": 1, "model": 2}}
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        torch.save(state(weights=torch.zeros(1000)), path)
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"rng": Evil(tmp_path / "owned")}))
    elif kind == "unhashable":
        torch.save({"config": {}, "model_state_dict": [torch.zeros(2)]}, path)
    elif kind in contents:
        torch.save(contents[kind], path)
    with pytest.raises(UserError, match=r"last\.pt") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_a_file_of_an_earlier_version_is_read(folder):
    torch.save(state(5), folder.checkpoints / "last.pt")
    assert load_checkpoint(folder)["progress"] == {"global_step": 5}
    write_checkpoint(folder.checkpoint(3), state(3))  # from then on, folders count
    assert load_checkpoint(folder)["progress"] == {"global_step": 3}


def test_of_another_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    write_checkpoint(folder.checkpoint(1), state(1))
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 3 of another version"):
        load_checkpoint(folder)
    with pytest.raises(UserError, match="no checkpoint in"):
        load_checkpoint(folder.path / "videos")
