"""The configurations for Meta-World that ship, as users start them, at small sizes."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import bc_vla
import ppo_vla
import pytest
from evaluation_table import as_markdown
from safetensors import safe_open
from worlds import ROOT, run_folder

from research.imitation.config import BCConfig
from research.options import parse_config
from research.runs.folder import RunFolder
from research.runs.tracking import read_metrics

CONFIGS, CHECKPOINTS = ROOT / "experiments" / "configs", ROOT / "experiments" / "checkpoints"
TASKS = ["reach-v3", "push-v3", "coffee-pull-v3"]


@pytest.mark.slow
def test_ppo_goes_on_from_the_clone_that_ships(tmp_path, capsys):
    sizes = ["num_envs=4", "buffer_size=16", "max_env_steps=120", "num_eval_envs=3", "num_eval_episodes=3"]
    sizes += ["max_eval_steps=20", "use_wandb=false", "progress_bar=false", f"run_dir={tmp_path / 'runs'}"]
    argv = ["--config", str(CONFIGS / "metaworld.json"), *(f"--trainer.{size}" for size in sizes)]
    argv += ["--algorithm.cfg.batch_size=16", "--trainer.env_config.max_episode_steps=24"]
    assert ppo_vla.main(argv) == 0
    run = RunFolder(run_folder(tmp_path))
    rows = [row for row in read_metrics(run.path) if "train/epochs" in row]
    assert rows[-1]["global_step"] >= 120 and rows[-1]["rollout/decisions"] == 16
    reported = {name.rpartition("/")[2] for row in rows for name in row if name.startswith("rollout/success_rate/")}
    assert reported <= set(TASKS) and reported
    assert "evaluation episodes are" not in capsys.readouterr().out  # one of each task
    episodes = [json.loads(line) for line in run.episodes.read_text().splitlines()]
    assert {(episode["initial_state"], episode["task"]) for episode in episodes} == set(enumerate(TASKS))
    assert len({episode["instruction"] for episode in episodes}) == 3
    assert not (run.checkpoints / "frozen").exists()  # the encoders come from their packages


@pytest.mark.parametrize(
    ("clone", "config"),
    [("metaworld_reach_push_coffee", "metaworld_bc.json"), ("metaworld_six", "metaworld_six_bc.json")],
)
def test_a_clone_holds_what_was_trained_alone_and_was_made_as_its_configuration_says(clone, config):
    path = CHECKPOINTS / f"{clone}.safetensors"
    assert path.stat().st_size < 3e6
    facts = json.loads(path.with_suffix(".json").read_text())
    trained = [facts[f"eval/success_rate/{task}"] for task in TASKS]
    assert 0.35 <= sum(trained) / len(TASKS) <= 0.6
    said = json.loads(json.dumps(dataclasses.asdict(parse_config(BCConfig, [f"--config={CONFIGS / config}"]))))
    made = {name: value for name, value in facts["config"].items() if name not in ("output", "lerobot")}
    assert facts["config"]["demonstrations"] is None  # nor was a data set read, however one would be
    assert made == {name: said[name] for name in made}  # options that came later have their defaults
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["provided_weights"]) == facts["provided_weights"]
        assert {name.partition(".")[0] for name in file.keys()} == {"fusion", "action_head", "value_head"}


@pytest.mark.slow
def test_the_clone_is_made_as_its_configuration_says(tmp_path, monkeypatch):
    """From one demonstration of a task: the whole way, to a file that loads."""
    monkeypatch.chdir(tmp_path)
    sizes = ["episodes=1", "steps=3", "batch_size=8", "eval_episodes=3", "num_envs=3", "only_successful=false"]
    argv = ["--config", str(CONFIGS / "metaworld_bc.json"), *(f"--{size}" for size in sizes)]
    assert bc_vla.main([*argv, "--env_config.max_episode_steps=40"]) == 0
    facts = json.loads((tmp_path / "runs/imitation/metaworld.json").read_text())
    assert set(facts["demonstrations"]) == set(TASKS) and "eval_sample/success_rate" in facts


@pytest.mark.numbers
def test_the_results_are_the_committed_rows():
    rows = committed_rows(ROOT / "experiments" / "results" / "metaworld" / "runs.csv")
    assert as_markdown(rows) in (ROOT / "experiments" / "RESULTS.md").read_text()
    late = [row["success"] for row in rows if 5.9e5 < row["env_steps"] < 6.1e5]
    assert len(late) == 4 and min(late) >= 0.8


def committed_rows(path: Path) -> list[dict]:
    """Rows of a table with the numbers that they were."""
    with path.open() as file:
        number = lambda text: int(text) if text.isdigit() else float(text) if text else ""  # noqa: E731
        return [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]
