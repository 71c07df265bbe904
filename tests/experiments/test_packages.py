"""A user's folders may be called as the project's packages are, and MUJOCO_GL may be wrong."""

from __future__ import annotations

import importlib.util
import io
import json
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


@pytest.mark.parametrize("unbuffered", [["-u"], []])
def test_a_script_whose_reader_has_left_says_nothing_of_it(tmp_path, unbuffered):
    """As `| head` does; a command that pip installs, too."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text('{"trainer": {"seed": 1}}')
    row = {"eval/success_rate": 0.5, "eval/success_low": 0.4, "eval/success_high": 0.6, "time/elapsed_s": 1}
    (run / "metrics.jsonl").write_text("".join(json.dumps({"global_step": step, **row}) + "\n" for step in range(2000)))
    start = "import sys; sys.path.insert(0, {0!r}); import research.commands as c; c._run('evaluation_table.py')"
    for command in (
        [str(ROOT / "experiments" / "evaluation_table.py")], ["-c", start.format(str(ROOT))],
    ):  # fmt: skip
        reader, writer = os.pipe()
        os.close(reader)
        argv = [sys.executable, *unbuffered, *command, str(run)]
        done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, "")


def test_what_is_printed_after_the_reader_has_left_goes_nowhere_and_the_work_goes_on():
    reader, writer = os.pipe()
    with io.TextIOWrapper(io.BufferedWriter(packages.Outlet(writer, "w")), line_buffering=True) as out:
        print("one", file=out)
        assert os.read(reader, 100) == b"one\n"
        os.close(reader)
        for _ in range(3):
            print("two", file=out)
        assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))


def test_the_output_of_a_program_that_imports_this_stays_its_own():
    code = "import sys; out = sys.stdout; import packages; sys.exit(sys.stdout is not out)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "experiments")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
