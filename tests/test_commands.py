"""research/commands.py: what pip installs is there, runs the scripts as they are, and finds what they need."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from worlds import ROOT

from research import commands

NAMED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_every_command_that_pip_installs_runs_a_script_of_its_own(monkeypatch):
    ran = []
    monkeypatch.setattr(commands, "_run", ran.append)
    for command, target in NAMED.items():
        module, _, function = target.partition(":")
        assert module == "research.commands"
        getattr(commands, function)()
        assert inspect.getdoc(getattr(commands, function)).startswith(f"{command}: ")
        assert ran[-1].startswith(function) and (commands.SCRIPTS / ran[-1]).is_file(), command
    assert len(set(ran)) == len(NAMED) == 7


@pytest.mark.slow
def test_a_command_is_its_script_with_arguments_and_exit_code(tmp_path):
    """Away from the checkout, and with a folder of the scripts' name in the working directory."""
    (tmp_path / "experiments").mkdir()
    code = "import sys; sys.argv = ['vla-compare', 'nowhere']; from research.commands import compare; compare()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (2, "error: no such folder: nowhere\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", NAMED)
def test_the_help_of_a_command_shows_commands_which_there_are_from_any_folder(command, tmp_path):
    function = NAMED[command].partition(":")[2]
    code = f"import sys; sys.argv = ['{command}', '--help']; from research.commands import {function}; {function}()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {command} "), done.stderr
    assert f"\n    {command} " in done.stdout
    assert not re.search(r"experiments/\w+\.py", done.stdout), done.stdout


def test_what_a_command_proposes_is_a_command(monkeypatch):
    text = (
        "python experiments/compare_runs.py runs\ntorchrun --nproc-per-node 2 experiments/ppo_vla.py --trainer.seed=2"
    )
    assert commands.as_called(text) == text, "a script's own words, where a script was started"
    monkeypatch.setattr(commands, "_called", "vla-sweep")
    expected = "vla-compare runs\ntorchrun --nproc-per-node 2 --no-python vla-ppo --trainer.seed=2"
    assert commands.as_called(text) == expected
    assert commands.as_called("python experiments/before_after.py") == "python experiments/before_after.py"


def test_the_wheel_has_the_scripts_and_every_file_that_a_configuration_names(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    distribution.include_package_data = False  # what git knows of is asked for otherwise, by a build folder in the tree
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    carried = {os.path.join(folder, name) for _, folder, _, names in build.data_files for name in names}
    assert {"experiments", "experiments.throughput", "research.study", "agents", "envs"} <= set(distribution.packages)
    assert not any(name.startswith(("experiments.results", "tests")) for name in distribution.packages)
    for config in (ROOT / "experiments" / "configs").iterdir():
        assert os.path.relpath(config, ROOT) in carried
        for name in re.findall(r'"(checkpoints/[^"]+)"', json.dumps(json.loads(config.read_text()))):
            shipped = (ROOT / "experiments" / name).exists()  # the others are to be fetched from their authors
            assert shipped == any(path.startswith(f"experiments/{name}") for path in carried), f"{config.name}: {name}"
    assert (ROOT / "research" / "study" / "templates").is_dir()
    assert sum(path.endswith(".jinja") for path in carried) == len(list(Path("research/study/templates").iterdir()))
