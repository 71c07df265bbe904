"""`agents.weights`: a checkpoint in any format, and what happens when it is none."""

import json
import os
import pickle
import weakref
import zipfile

import pytest
import torch
from loading_worlds import VLA, RunsCode, any_weights, assert_loaded, error, load, write_shards
from safetensors.torch import save_file
from torch import nn

from agents import weights as weights_files


@pytest.fixture
def weights():
    return any_weights()


# --- formats ---


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin"])
@pytest.mark.parametrize("key", [None, "model_state_dict", "state_dict", "model"])
def test_torch_files(tmp_path, weights, suffix, key):
    path = tmp_path / f"w.{suffix}"
    content = {key: weights, "optimizer": {"state": {0: torch.ones(3)}}, "step": 12} if key else weights
    torch.save(content, path)
    assert_loaded(load(path), weights)
    assert_loaded(load(str(path)), weights)


def test_the_order_of_the_keys(tmp_path, weights):
    wrong = {name: torch.zeros_like(value) for name, value in weights.items()}
    torch.save({"model": wrong, "state_dict": wrong, "model_state_dict": weights}, tmp_path / "a.pt")
    torch.save({"model": wrong, "state_dict": weights}, tmp_path / "b.pt")
    # "model" names the architecture here, not a state dict
    torch.save({"model": "vla-small", **weights}, tmp_path / "c.pt")
    assert_loaded(load(tmp_path / "a.pt"), weights)
    assert_loaded(load(tmp_path / "b.pt"), weights)
    assert_loaded(load(tmp_path / "c.pt", strict=False), weights)


def test_the_older_torch_format(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert_loaded(load(tmp_path / "w.pt"), weights)


def test_the_zip_format_is_memory_mapped(tmp_path, weights, monkeypatch):
    torch.save(weights, tmp_path / "w.pt")
    calls = []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(k) or original(*a, **k))
    load(tmp_path / "w.pt")
    assert calls[0]["mmap"] is True
    assert calls[0]["weights_only"] is True


def test_safetensors(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    assert_loaded(load(tmp_path / "w.safetensors"), weights)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_by_index_and_by_directory(tmp_path, weights, suffix):
    index = write_shards(tmp_path, weights, suffix)
    assert_loaded(load(index), weights)
    assert_loaded(load(tmp_path), weights)


def test_the_index_decides_what_a_shard_gives(tmp_path, weights):
    index = write_shards(tmp_path, weights)
    weight_map = json.loads(index.read_text())["weight_map"]
    name = next(name for name in weights if weight_map[name] == "model-1.safetensors")
    stale = {n: weights[n] for n in weights if weight_map[n] == "model-0.safetensors"}
    save_file({**stale, name: torch.zeros_like(weights[name])}, tmp_path / "model-0.safetensors")
    assert_loaded(load(index), weights)


def test_shards_are_released_one_by_one(tmp_path, weights, monkeypatch):
    index = write_shards(tmp_path, weights)
    shards = []
    original = weights_files.load_file

    def load_file(path):
        tensors = original(path)
        shards.append([weakref.ref(tensor) for tensor in tensors.values()])
        return tensors

    alive = []
    load_state_dict = nn.Module.load_state_dict

    def count(model, state, **options):
        alive.append(sum(any(tensor() is not None for tensor in shard) for shard in shards))
        return load_state_dict(model, state, **options)

    monkeypatch.setattr(weights_files, "load_file", load_file)
    monkeypatch.setattr(nn.Module, "load_state_dict", count)
    load(index)
    assert alive == [3, 2, 1]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "anything.pt", "anything.safetensors"])
def test_a_directory_with_one_weights_file(tmp_path, weights, name):
    path = tmp_path / name
    save_file(weights, path) if name.endswith("safetensors") else torch.save(weights, path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_text("x")
    assert_loaded(load(tmp_path), weights)


def test_the_standard_name_wins_in_a_directory(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    torch.save({name: torch.zeros_like(value) for name, value in weights.items()}, tmp_path / "other.pt")
    assert_loaded(load(tmp_path), weights)


def test_directories_that_do_not_say_which_file(tmp_path, weights):
    assert "holds no weights file" in error(tmp_path)
    for i in range(5):
        torch.save(weights, tmp_path / f"step_{i}.pt")
    message = error(tmp_path)
    assert str(tmp_path) in message
    assert "several weights files (step_0.pt, step_1.pt, step_2.pt, …)" in message


def test_the_home_directory(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(weights, tmp_path / "w.pt")
    assert_loaded(load("~/w.pt"), weights)


# --- files that are not what they should be ---


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", "absent.json", "absent/model.pt", "org/model-7b"])
def test_a_missing_file(tmp_path, name):
    assert f"{tmp_path / name} does not exist" in error(tmp_path / name)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_an_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    assert error(tmp_path / name) == f"{tmp_path / name} is empty"


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "older", "safetensors"])
def test_a_truncated_file(tmp_path, weights, kind, fraction):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    message = error(path)
    assert str(path) in message
    assert "cannot be read" in message or "is damaged" in message


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"<html>404: not found</html>" * 9, bytes(range(256)) * 9, b"\0" * 99, b"PK\3\4"])
def test_a_file_of_another_format(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in error(tmp_path / name)


def test_a_git_lfs_pointer(tmp_path):
    (tmp_path / "w.pt").write_text("version https://git-lfs.example/spec/v1\noid sha256:abc\nsize 123\n")
    assert "git lfs pull" in error(tmp_path / "w.pt")


def test_an_unknown_suffix(tmp_path):
    (tmp_path / "w.onnx").write_bytes(b"x")
    message = error(tmp_path / "w.onnx")
    assert "'.onnx'" in message
    assert ".safetensors" in message


def test_a_file_without_weights(tmp_path):
    torch.save({"epoch": 3, "optimizer": {"lr": 1.0}}, tmp_path / "dict.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"state_dict": {}}, tmp_path / "empty.pt")
    save_file({}, tmp_path / "empty.safetensors")
    assert "found the keys epoch, optimizer" in error(tmp_path / "dict.pt")
    assert "found Tensor" in error(tmp_path / "tensor.pt")
    assert "no weights under model_state_dict, state_dict, model" in error(tmp_path / "empty.pt")
    assert "8 missing" in error(tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{not json", "not valid JSON"),
        ("{}", "weight_map"),
        ("[1]", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map"),
    ],
)
def test_a_wrong_index(tmp_path, content, expected):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    message = error(tmp_path)
    assert str(path) in message
    assert expected in message


def test_a_shard_that_does_not_exist(tmp_path, weights):
    index = write_shards(tmp_path, weights)
    (tmp_path / "model-1.safetensors").unlink()
    message = error(index, strict=False)
    assert str(index) in message
    assert "3 shards, of which 1 do not exist: model-1.safetensors" in message


def test_a_damaged_shard_is_named(tmp_path, weights):
    index = write_shards(tmp_path, weights)
    (tmp_path / "model-1.safetensors").write_bytes(b"damaged")
    assert str(tmp_path / "model-1.safetensors") in error(index, strict=False)


def test_a_shard_without_what_the_index_promises(tmp_path, weights):
    index = write_shards(tmp_path, weights)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    message = error(index, strict=False)
    assert f"{tmp_path / 'model-1.safetensors'} lacks 3 of the weights that its index puts there" in message


def test_the_file_is_checked_before_the_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(VLA, "__init__", lambda self: pytest.fail("the model was built"))
    assert "does not exist" in error(tmp_path / "absent.pt")


# --- pickles ---


@pytest.mark.parametrize("kind", ["zip", "older", "plain"])
@pytest.mark.parametrize("force", ["0", "1"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, weights, monkeypatch, kind, force):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    path, proof = tmp_path / "w.pt", tmp_path / "code_ran"
    content = {"state_dict": weights, "extra": RunsCode(proof)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    message = error(path)
    assert not proof.exists()
    assert "set policy.vla_config.trust_checkpoint: true, which RUNS CODE FROM THE FILE" in message
    assert str(path) in message


def test_a_malicious_shard_does_not_run(tmp_path, weights):
    index = write_shards(tmp_path, weights, "bin")
    torch.save({"a": RunsCode(tmp_path / "code_ran")}, tmp_path / "model-1.bin")
    assert "trust_checkpoint" in error(index)
    assert not (tmp_path / "code_ran").exists()


def test_the_message_says_what_the_pickle_asks_for(tmp_path):
    torch.save({"state_dict": RunsCode(tmp_path / "code_ran")}, tmp_path / "w.pt")
    assert "(posix.mkdir)" in error(tmp_path / "w.pt") or os.name != "posix"


def test_trust_checkpoint_unpickles_and_warns(tmp_path, weights, caplog):
    torch.save({"state_dict": weights, "extra": RunsCode(tmp_path / "code_ran")}, tmp_path / "w.pt")
    assert_loaded(load(tmp_path / "w.pt", trust_checkpoint=True), weights)
    assert (tmp_path / "code_ran").exists()
    assert "may run code while it is read" in caplog.text


def test_a_trusted_whole_model(tmp_path, weights):
    model = VLA()
    model.load_state_dict(weights)
    torch.save(model, tmp_path / "whole.pt")
    torch.save({"model": model, "epoch": 3}, tmp_path / "wrapped.pt")
    assert "trust_checkpoint" in error(tmp_path / "whole.pt")
    assert_loaded(load(tmp_path / "whole.pt", trust_checkpoint=True), weights)
    assert_loaded(load(tmp_path / "wrapped.pt", trust_checkpoint=True), weights)


def test_a_trusted_pickle_that_is_damaged(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "w.pt").write_bytes(b"\x80\x02garbage")
    assert "cannot be read" in error(tmp_path / "w.pt", trust_checkpoint=True)


def test_compressed_entries_are_the_same_weights(tmp_path):
    """Memory-mapped they would be read as noise, without a word."""
    plain, deflated = tmp_path / "plain.pt", tmp_path / "deflated.pt"
    torch.manual_seed(0)
    weights = nn.Linear(30, 20).state_dict()
    torch.save(weights, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry.filename))
    read = weights_files.read_file(deflated)
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())


def test_names_that_are_no_text_are_refused(tmp_path, weights):
    torch.save(
        {"state_dict": {**weights, 7: torch.ones(1), ("a", 1): torch.ones(1)}, 3: "elsewhere, fine"}, tmp_path / "w.pt"
    )
    assert error(tmp_path / "w.pt").endswith(
        "its state dict has keys of type int, tuple, where the names of weights are text"
    )


def test_an_index_nested_without_end_and_shards_that_no_disk_holds(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text("[" * 100_000)
    assert "is not valid JSON: RecursionError" in error(path)
    for name in ("n" * 5000, "d" * 5000 + "/x", "nul\0"):
        path.write_text(json.dumps({"weight_map": {"a": name}}))
        message = error(path)
        assert "do not exist" in message or "File name too long" in message
        assert len(message) < 700


@pytest.mark.parametrize("name", ["n" * 5000, "d" * 5000 + "/w.pt", "nul\0.pt"])
def test_a_path_that_no_disk_holds(name):
    assert "cannot be read: File name too long" in error(name) or "does not exist" in error(name)


def test_a_folder_of_adapters_is_recognised(tmp_path, weights):
    """Also where weights lie beside: loaded without the adapters, they would be another policy."""
    (tmp_path / "adapter_config.json").write_text("{}")
    for name in ("adapter_model.safetensors", "model.safetensors"):
        save_file(weights, tmp_path / name)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert "holds peft adapters, not the weights that they adapt: set policy.vla_config.model_path" in error(path)
    assert_loaded(load(tmp_path / "model.safetensors"), weights)
