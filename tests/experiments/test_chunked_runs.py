"""Runs whose decisions are chunks: env steps counted, budgets kept, resumed and evaluated; what does not fit."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import evaluate_vla
import ppo_vla
import pytest
from worlds import all_weights, rows_without_times, run_folder, write_config

from research.config import ExperimentConfig
from research.errors import UserError
from research.options import parse_config
from research.runs.folder import RunFolder
from research.runs.tracking import read_metrics


def chunked(folder, **changes):
    """Reach in chunks of three, from a model that plans five control steps."""
    changes = {"policy__action_chunk": {"horizon": 5, "executed": 3}, "trainer__use_wandb": False, **changes}
    return str(write_config(folder, **changes))


def parsed(*flags: str) -> ExperimentConfig:
    return parse_config(ExperimentConfig, list(flags), "")


# ---- configuration


def test_the_environment_is_told_what_the_policy_executes_and_the_other_way_round():
    assert parsed("--policy.action_chunk.executed=4").trainer.env_config["chunk"] == 4
    assert parsed("--policy.action_chunk.horizon=4").trainer.env_config["chunk"] == 4
    both = parsed("--policy.action_chunk.horizon=8", '--trainer.env_config={"chunk": 2}')
    assert both.trainer.env_config["chunk"] == both.trainer.chunk == 2
    assert "chunk" not in parsed().trainer.env_config and parsed().trainer.chunk == 1
    assert (
        "chunk" not in parsed("--policy.action_chunk.horizon=8", "--policy.action_chunk.executed=1").trainer.env_config
    )
    assert both.trainer.env_steps_planned == 250 * 2048 * 2
    assert parsed("--trainer.max_env_steps=77").trainer.env_steps_planned == 77


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy.action_chunk.executed=4", '--trainer.env_config={"chunk": 2}'], "executed: is 4, but .*chunk is 2"),
        (
            ["--policy.action_chunk.horizon=2", "--policy.action_chunk.executed=4"],
            "executed: 4 is beyond action_chunk.horizon = 2",
        ),
        (["--policy.action_chunk.horizon=2", '--trainer.env_config={"chunk": 4}'], "chunk: 4 is beyond .*horizon = 2"),
        (["--policy.action_chunk.horizon=0"], "horizon"),
    ],
)
def test_what_does_not_go_together(flags, message):
    with pytest.raises(UserError, match=message):
        parsed(*flags)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policy__vla_config__model_config": {"modalities": ["rgb", "proprio"], "horizon": 2, "executed": 2}},
            r"\[2, 3, 3\].*trainer.env_config.chunk is 3",
        ),
        (
            {"policy__vla_config__model_config": {"modalities": ["rgb", "proprio"], "executed": 9}},
            "horizon = 5 .* got 9",
        ),
        ({"trainer__env": "gym:InvertedPendulum-v5", "trainer__env_config": {"chunk": 0}}, "chunk"),
    ],
)
def test_a_model_whose_chunks_are_others_is_refused(tmp_path, capsys, changes, message):
    assert ppo_vla.main(["--config", chunked(tmp_path, **changes)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:")
    assert re.search(message, error), error


# ---- runs


@pytest.mark.slow
def test_a_run_counts_control_steps(tmp_path):
    assert ppo_vla.main(["--config", chunked(tmp_path)]) == 0
    run = run_folder(tmp_path)
    rows = [row for row in read_metrics(run) if "train/epochs" in row]
    assert [row["rollout/decisions"] for row in rows] == [64.0] * 3
    steps = [0, *(row["global_step"] for row in rows)]
    assert all(64 < after - before <= 3 * 64 for before, after in pairwise(steps))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["global_step"] == steps[-1]
    episodes = [json.loads(line) for line in RunFolder(run).episodes.read_text().splitlines()]
    assert any(episode["length"] % 3 for episode in episodes)  # success ends an episode within a chunk


@pytest.mark.slow
def test_a_budget_of_control_steps_ends_the_run_and_the_annealing(tmp_path):
    """The learning rate falls to 0 at the budget, however many iterations that is."""
    config = chunked(tmp_path, trainer__iterations=1, algorithm__cfg__anneal_lr=True)
    assert ppo_vla.main(["--config", config, "--trainer.max_env_steps=600"]) == 0
    rows = [row for row in read_metrics(run_folder(tmp_path)) if "train/epochs" in row]
    steps = [row["global_step"] for row in rows]
    assert len(steps) > 2 and steps[-2] < 600 <= steps[-1]
    rates = [row["train/learning_rate/fusion"] for row in rows]
    assert rates == pytest.approx([1e-3 * (1 - before / 600) for before in [0, *steps[:-1]]])


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
    assert ppo_vla.main(["--config", chunked(whole, trainer__iterations=4)]) == 0
    assert ppo_vla.main(["--config", chunked(part, trainer__iterations=2)]) == 0
    run = run_folder(part)
    assert ppo_vla.main([f"--trainer.resume={run}", "--trainer.iterations=4"]) == 0
    ours, theirs = all_weights(run), all_weights(run_folder(whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    kept = lambda folder: [row for row in rows_without_times(folder) if "train/epochs" in row]  # noqa: E731
    assert kept(run) == kept(run_folder(whole))
    assert ppo_vla.main([f"--trainer.resume={run}", "--policy.action_chunk.executed=2"]) == 2


@pytest.mark.slow
def test_its_evaluation_films_every_control_step(tmp_path):
    assert ppo_vla.main(["--config", chunked(tmp_path)]) == 0
    run = run_folder(tmp_path)
    out = tmp_path / "out"
    flags = [f"--checkpoint={run}", f"--output={out}", "--film=2", "--trainer.eval_mode=sample"]
    assert evaluate_vla.main(flags) == 0
    episodes = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    assert len(episodes) == 8 and max(episode["length"] for episode in episodes) <= 25
    assert any(episode["length"] % 3 for episode in episodes)
    evaluated, last = json.loads((out / "summary.json").read_text())["evaluated"], rows_without_times(run)[-1]
    assert evaluated["eval_mode"] == "sample" and evaluated["env_steps"] == last["global_step"] > 0
    manifest = json.loads((RunFolder(run).last_checkpoint / "manifest.json").read_text())
    assert evaluated["weights_sha256"] == manifest["files"]["state.pt"]["sha256"]
