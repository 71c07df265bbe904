"""A run folder that this account wrote is known again; copied from elsewhere or edited, it is not."""

from __future__ import annotations

import shutil

import pytest

from research.runs.folder import RunFolder, write_json
from research.runs.origin import is_ours, sign


@pytest.fixture
def folder(tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    folder = RunFolder.create(tmp_path, "exp")
    write_json(folder.config, {"a": 1})
    return folder


def test_a_folder_is_ours_as_long_as_nobody_edits_its_configuration(folder, tmp_path):
    assert not is_ours(folder)
    sign(folder)
    assert is_ours(folder)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert is_ours(RunFolder(moved))
    write_json(folder.config, {"a": 2})
    assert not is_ours(folder)


def test_a_folder_of_somebody_else_is_not_ours(folder, tmp_path, monkeypatch):
    sign(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another home"))
    assert not is_ours(folder)
    sign(folder)
    assert is_ours(folder)
    key = tmp_path / "another home" / "vla-rl" / "key"
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) == 32


def test_without_a_place_for_a_key_nothing_is_ours(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    sign(folder)
    assert not folder.signature.exists() and not is_ours(folder)
