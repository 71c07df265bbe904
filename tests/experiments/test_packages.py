"""A user's folders may be called as the project's packages are, and MUJOCO_GL may be wrong."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib

import packages

import pytest
from worlds import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("init", [True, False])
def test_folders_of_the_same_name_hide_nothing_and_are_named(tmp_path, init):
    for name in ("envs", "research"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("__init__.py" if init else "mine.py")).write_text("")
    command = [sys.executable, str(ROOT / "experiments" / "compare_runs.py"), "nowhere"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stderr == "error: no such folder: nowhere\n"
    assert (
        done.stdout
        == f"{tmp_path}/envs has the name of this project's envs/ and is hidden by it; rename it to use it\n"
    )


def test_a_script_names_the_extra_that_a_plain_install_lacks(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    packages.check_extras("compare_runs.py")
    packages.check_extras("ppo_vla.py")
    with pytest.raises(SystemExit, match="2"):
        packages.check_extras("sweep_local.py")
    error = "error: sweep_local.py needs optuna, which a plain install leaves out; run: pip install -e .[study]\n"
    assert capsys.readouterr().err == error
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, needed in packages.EXTRAS.values():
        assert set(needed) <= {re.match(r"[\w-]+", requirement)[0] for requirement in extras[extra]}


def test_a_mujoco_gl_that_does_not_exist_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "ppo_vla.py"), "--help"]
    environment = {**os.environ, "MUJOCO_GL": "vulkan"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: MUJOCO_GL: MuJoCo cannot be imported with 'vulkan' \(.*\); unset it .*\n", done.stderr)
