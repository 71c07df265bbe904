"""envs/gym_names.py: what a name may call, whose code it runs, and whose folder hides whose."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from envs import foreign_code, make_env
from envs.gym_names import find_spec
from research.errors import UserError


@pytest.mark.parametrize("prefix", ["gym", "gym_vec"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("os:system", {"command": "touch here"}),
        ("os.system", {"command": "touch here"}),
        ("subprocess:getoutput", {"cmd": "touch here"}),
        ("builtins:eval", {}),
        ("builtins:exec", {}),
        ("shutil:rmtree", {"path": "victim"}),
        ("shutil.rmtree", {"path": "victim"}),
        ("user_package.habits:system", {"command": "touch here"}),  # imported there
        ("user_package.habits:os", {}),
        ("user_package.habits:ABSENT", {}),
        ("user_package.habits:Box", {"low": -1, "high": 1}),
        ("user_package.habits:CALLABLE", {"command": "touch here"}),
        ("torch:save", {}),
        ("torch.hub:load", {}),
        ("gymnasium:make", {"id": "Pendulum-v1"}),
        ("gymnasium.envs.registration:make", {"id": "Pendulum-v1"}),
        ("numpy:load", {"file": "x"}),
        ("research.runs.folder:append_rows", {"path": "here", "rows": []}),
    ],
)
def test_nothing_is_called_that_is_no_environment(tmp_path, monkeypatch, prefix, name, kwargs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "victim").mkdir()
    with pytest.raises(UserError, match="^trainer.env: ") as caught:
        make_env(f"{prefix}:{name}", 2, {"env_kwargs": kwargs})
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["victim"]


def test_what_is_refused_says_what_is_taken():
    with pytest.raises(UserError, match="'os' is Python's own and holds no environments"):
        find_spec("gym:os:system")
    with pytest.raises(UserError, match="neither a gymnasium.Env nor a function that 'user_package.habits' defines"):
        find_spec("gym:user_package.habits:system")


@pytest.mark.parametrize("name", ["gym", "gym:", "gym_vec"])
def test_a_kind_without_an_environment_is_refused(name):
    with pytest.raises(UserError, match=f"^trainer.env: {name.rstrip(':')} needs an environment's id, as in gym"):
        make_env(name, 2, {"id": "Pendulum-v1"})


def test_a_function_that_returns_no_environment_is_named():
    with pytest.raises(UserError, match="make_number should return a gymnasium.Env, got int"):
        make_env("gym:user_package.habits:make_number", 2, {})


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("tabletop", None),
        ("gym:InvertedPendulum-v5", None),
        ("gym_vec:CartPole-v1", None),
        ("gym:gymnasium.envs.classic_control:CartPoleEnv", None),
        ("gym:NoSuch-v0", None),
        ("gym:user_package:UserReach-v0", "user_package"),
        ("gym_vec:user_package.reach_env:ReachEnv", "user_package.reach_env"),
        ("gym:user_package.reach_env.ReachEnv", "user_package.reach_env"),
    ],
)
def test_whose_code_a_name_runs(name, module):
    assert foreign_code(name) == module


def test_an_id_that_an_installed_package_registers_is_its_code():
    import user_package  # noqa: F401

    assert foreign_code("gym:UserReach-v0") == "user_package.reach_env"


@pytest.mark.parametrize("package", ["envs", "agents", "research", "einops"])
def test_a_folder_that_has_the_name_of_a_package_is_named(tmp_path, monkeypatch, package):
    (tmp_path / package).mkdir()
    (tmp_path / package / "my_env.py").write_text("import gymnasium\n")
    monkeypatch.chdir(tmp_path)
    whose = "the installed package" if package == "einops" else "this project's package"
    expected = f"'{package}.my_env' lies in the working directory, but {whose} '{package}' has the same name"
    with pytest.raises(UserError, match=f"{expected} and hides it; rename your '{package}'"):
        find_spec(f"gym:{package}.my_env:MyEnv")


def test_an_environment_in_the_working_directory_is_found(tmp_path, monkeypatch):
    shutil.copy(Path(__file__).parents[1] / "user_package" / "reach_env.py", tmp_path / "env_of_mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p not in ("", str(tmp_path))])
    assert find_spec("gym:env_of_mine:ReachEnv").entry_point == "env_of_mine:ReachEnv"
