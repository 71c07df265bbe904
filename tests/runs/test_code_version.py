"""The commit of this code, and the files of a user's own."""

import importlib
import subprocess

from research.runs import code_version
from research.runs.code_version import git_commit, repository, source_files


def test_git_commit_is_short_marks_changes_and_is_none_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(code_version, "__file__", str(tmp_path / "code.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "v1")
    commit = git("rev-parse", "--short", "HEAD")
    assert git_commit() == commit
    (tmp_path / "code.py").write_text("2")
    assert git_commit() == f"{commit}-dirty"


def test_the_repository_is_that_of_the_code_wherever_it_is_started_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert repository() is None or (repository() / "research").is_dir()
    monkeypatch.setattr(code_version, "__file__", str(tmp_path / "code.py"))
    assert repository() is None
    subprocess.run(["git", "init", tmp_path], check=True, capture_output=True)
    assert repository() == tmp_path


def test_the_files_of_a_users_modules_are_found_and_no_others(tmp_path, monkeypatch):
    (tmp_path / "their_vla").mkdir()
    for name in ("__init__", "model", "heads"):
        (tmp_path / "their_vla" / f"{name}.py").write_text("")
    (tmp_path / "their_vla" / "weights.bin").write_bytes(b"1")
    (tmp_path / "their_env.py").write_text("")
    (tmp_path / "unrelated.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("their_vla.model", "their_env"):
        importlib.import_module(name)
    found = source_files(["their_vla.model", "their_env", "agents.small_vla", "numpy", "json", "not_imported"])
    assert found == {
        f"their_vla/{name}.py": tmp_path / "their_vla" / f"{name}.py" for name in ("__init__", "heads", "model")
    } | {"their_env.py": tmp_path / "their_env.py"}
