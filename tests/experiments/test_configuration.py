"""Which configuration a script starts from, and what it prints instead of a run."""

from __future__ import annotations

import inspect
import json
import os
import re
import resource
import subprocess
import sys

import evaluate_vla
import ppo_vla
import pytest
from configuration import DEFAULT_CONFIG, GRPO_CONFIG, read_experiment
from env_options import options_of
from worlds import ROOT

from envs import maker_of
from research.config import ExperimentConfig
from research.options import to_dict


def printed(capsys, *argv: str, main=ppo_vla.main) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_plain_command_says_its_own_defaults(capsys):
    """Those of its file, where the dataclass has others."""
    file, text = json.loads(DEFAULT_CONFIG.read_text()), printed(capsys, "--help")
    for name in ("num_envs", "iterations", "buffer_size", "eval_freq"):
        assert f"default: {file['trainer'][name]})" in " ".join(text.split(f"--trainer.{name} ")[1].split())[:500], name


@pytest.mark.parametrize(
    ("script", "shown", "mistake"),
    [
        ("ppo_vla.py", "--trainer.seed SEED", "--trainer.seed=x"),
        ("grpo_vla.py", "--trainer.seed SEED", "--trainer.seed=x"),
        ("evaluate_vla.py", "--first_state FIRST_STATE", "--trainer.seed=x"),
        ("bc_vla.py", "--pointing_steps POINTING_STEPS", "--trainer.seed=x"),
        ("export_vla.py", "--checkpoint CHECKPOINT", None),
        ("sweep_local.py", "--workers WORKERS", None),
        ("compare_runs.py", "--choosing_seeds SEED", None),
    ],
)
def test_help_waits_for_no_torch(script, shown, mistake):
    """Nor does anything else that is printed instead of a run: under 2 s of this process's time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, str(ROOT / "experiments" / script)]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and shown in done.stdout
    assert not re.search(r"\| +torch$", done.stderr, flags=re.MULTILINE)
    if script != "compare_runs.py":  # SciPy and matplotlib: 1.6 s, and twice that the first time of all
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    if mistake:
        done = subprocess.run([*command, "--print_config", mistake], capture_output=True, text=True)
        assert done.returncode == 2 and re.fullmatch(r"error: [^\n]*trainer\.seed[^\n]*\n", done.stderr)


def test_who_reads_a_part_of_what_is_printed_sees_no_traceback():
    command = [sys.executable, str(ROOT / "experiments" / "bc_vla.py"), "--print_config"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_configuration_of_the_plain_command_is_printed_and_read_back(capsys, tmp_path):
    path = tmp_path / "printed.json"
    path.write_text(printed(capsys, "--print_config"))
    assert read_experiment(ExperimentConfig, [f"--config={path}"], "") == read_experiment(ExperimentConfig, [], "")


def test_an_evaluation_prints_the_configuration_of_its_run(capsys, tmp_path):
    """And not that of the plain command, from which it first learns which run."""
    (tmp_path / "checkpoints").mkdir()
    config = read_experiment(ExperimentConfig, ["--trainer.seed=77"], "")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    text = printed(capsys, f"--checkpoint={tmp_path}", "--print_config", main=evaluate_vla.main)
    assert json.loads(text)["trainer"]["seed"] == 77
    assert json.loads(printed(capsys, "--print_config", main=evaluate_vla.main))["trainer"]["seed"] == 1


def test_of_a_name_that_has_no_run_nothing_is_resumed(tmp_path):
    flags = [f"--trainer.run_dir={tmp_path}", "--trainer.resume=auto"]
    assert read_experiment(ExperimentConfig, flags, "", GRPO_CONFIG).trainer.resume is None


@pytest.mark.parametrize("env", ["tabletop", "metaworld", "maniskill", "libero", "gym", "gym_vec"])
def test_every_option_of_an_environment_is_listed_with_type_default_and_words(env):
    """No simulator need be installed for it."""
    options = list(options_of(maker_of(env)))
    names = [name for name, *_ in options]
    assert "chunk" in names and not {"num_envs", "seed", "device", "unknown", "self", "env_id"} & set(names)
    for name, type_, default, text in options:
        assert isinstance(type_, str) and default is not inspect.Parameter.empty and len(text) > 5, name


def test_the_options_of_an_environment_are_printed(capsys):
    text = printed(capsys, "--help.env=gym:Anything-v0")
    assert "  instruction_length: int = 64\n      L, bytes reserved for the text.\n" in text
    assert "  reward: str = 'sparse'\n" in printed(capsys, "--help.env", "tabletop")
    assert ppo_vla.main(["--help.env=tabltop"]) == 2
    assert "did you mean 'tabletop'?" in capsys.readouterr().err
