"""The main job with a W&B server: what a run leaves there, and a run that starts from it."""

import json

import ppo_vla
import pytest
import torch
from standin_wandb_server import ENTITY
from worlds import run_folder, write_config

from agents.small_vla import SmallVLA
from research.runs.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow


def test_a_run_starts_from_what_another_left_on_wandb(wandb_server, tmp_path):
    config = write_config(tmp_path, policy__freeze="vision")
    assert ppo_vla.main(["--config", str(config), f"--trainer.run_dir={tmp_path / 'first' / 'runs'}"]) == 0
    first = run_folder(tmp_path / "first")
    (run,) = wandb_server.runs.values()
    name = f"checkpoint-{run.name}"
    assert {alias for version in wandb_server.there(name) for alias in version.aliases} == {"best", "latest"}
    assert not wandb_server.used
    assert run.attributes["displayName"] == "t vision lr=0.001 seed=1"
    assert {"output.log", "episodes.jsonl"} <= run.files

    reference = f"wandb:{ENTITY}/{run.project}/{name}"
    start = ["--config", str(config), f"--policy.vla_config.model_path={reference}:best"]
    assert ppo_vla.main([*start, f"--trainer.run_dir={tmp_path / 'second' / 'runs'}", "--trainer.iterations=1"]) == 0
    second = run_folder(tmp_path / "second")
    best = [version for version in wandb_server.there(name) if "best" in version.aliases]
    assert wandb_server.used == [(second.name.rpartition("-")[2], best[0].id)]
    kept = json.loads((second / "config.json").read_text())["policy"]["vla_config"]["model_path"]
    assert kept == f"{reference}:v{best[0].index}"  # aliases move on
    of_first = load_checkpoint(next((first / "checkpoints").glob("best_*")))
    of_second = load_checkpoint(next((second / "checkpoints").glob("best_*")))
    at_start = of_second["audit"]["start"]
    assert at_start and all(torch.equal(at_start[n], of_first["model_state_dict"][n]) for n in at_start)
    assert of_second["audit"]["hashes"] == of_first["audit"]["hashes"]


def test_what_no_restart_would_cure_alerts_and_a_flag_keeps_checkpoints_here(wandb_server, tmp_path, monkeypatch):
    calls = []

    def value(self, hidden):
        calls.append(1)
        return self.value_head(hidden) * (float("nan") if len(calls) > 60 else 1.0)

    monkeypatch.setattr(SmallVLA, "value", value)
    config = write_config(tmp_path, policy__freeze="vision")
    assert ppo_vla.main(["--config", str(config), "--trainer.wandb_checkpoints=False"]) == 1
    (run,) = wandb_server.runs.values()
    ((level, title, text),) = run.alerts
    assert (level, title) == ("ERROR", "stopped: not a number")
    assert "nan" in text and "(at env step " in text
    assert run.exit_code == 1 and {version.type for version in wandb_server.versions} == {"run_table"}
