"""Evaluating generalisation: every split in one call, from the same initial states."""

from __future__ import annotations

import json

import evaluate_vla
import pytest

from envs.tabletop import TabletopEnv
from research.errors import SimulatorFailed
from research.runs.folder import RunFolder

pytestmark = pytest.mark.slow

FEW = ["--trainer.num_eval_episodes=6", "--trainer.num_eval_envs=4", "--trainer.progress_bar=False", "--film=1"]


def read(folder) -> tuple[list[dict], dict]:
    rows = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "summary.json").read_text())


def test_all_splits_from_the_same_states(tmp_path, capsys):
    assert evaluate_vla.main([*FEW, "--split", "all", f"--output={tmp_path / 'all'}"]) == 0
    rows, summary = read(tmp_path / "all")
    splits = ["train", "vision", "semantics", "execution"]
    assert [(row["split"], row["initial_state"]) for row in rows] == [(s, i) for s in splits for i in range(6)]
    assert list(summary["splits"]) == splits
    lines = capsys.readouterr().out.splitlines()
    for line, split in zip(lines, splits, strict=False):
        m = summary["splits"][split]
        assert m["eval/success_rate"] == sum(row["success"] for row in rows if row["split"] == split) / 6
        interval = f"{m['eval/success_rate']:.3f} [{m['eval/success_low']:.3f}, {m['eval/success_high']:.3f}]"
        assert line.split(maxsplit=1) == [split, f"{interval} success over 6 episodes"]
        assert (tmp_path / "all" / f"evaluation_{split}.mp4").stat().st_size > 1000
    told = {split: [row["instruction"] for row in rows if row["split"] == split] for split in splits}
    assert told["train"] == told["vision"] == told["execution"] and told["train"] != told["semantics"]

    assert evaluate_vla.main([*FEW, "--split=semantics", f"--output={tmp_path / 'one'}"]) == 0
    one, summary_of_one = read(tmp_path / "one")
    assert one == [row for row in rows if row["split"] == "semantics"]
    assert summary_of_one["splits"] == {"semantics": summary["splits"]["semantics"]}


def test_a_training_run_keeps_its_own_evaluations(tmp_path, capsys):
    run = RunFolder.create(tmp_path, "exp")
    run.config.write_text("{}")
    run.episodes.write_text("kept")
    assert evaluate_vla.main([*FEW, f"--output={run}"]) == 2
    assert f"error: output: {run} is a training run's own folder" in capsys.readouterr().err
    assert run.episodes.read_text() == "kept" and not run.summary.exists()


def test_states_that_training_draws_are_evaluated_with_a_note(tmp_path, capsys):
    assert evaluate_vla.main([*FEW, "--film=0", "--first_state=9995", f"--output={tmp_path}"]) == 0
    note = "note: training draws initial states from 10000 on; those evaluated end at 10000"
    assert capsys.readouterr().out.splitlines()[0] == note
    assert evaluate_vla.main([*FEW, "--film=0", "--first_state=9994", f"--output={tmp_path}"]) == 0
    assert "note" not in capsys.readouterr().out


def test_nothing_of_an_earlier_evaluation_stays_beside_another(tmp_path):
    """Its film would show other episodes than those that the numbers are of."""
    mine = tmp_path / "film_of_mine.mp4"
    for old in (tmp_path / "evaluation.mp4", tmp_path / "evaluation_vision.mp4", mine):
        old.write_bytes(b"old")
    assert evaluate_vla.main([*FEW, "--film=0", f"--output={tmp_path}"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"episodes.jsonl", "summary.json", mine.name}


def test_tasks_without_an_episode_are_noted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TabletopEnv, "task_names", tuple("abcdefgh"), raising=False)
    assert evaluate_vla.main([*FEW, "--film=0", f"--output={tmp_path}"]) == 0
    said = "note: trainer.num_eval_episodes: 6 evaluation episodes are of 6 of the 8 tasks, "
    assert capsys.readouterr().out.startswith(said)


def test_the_configurations_own_split_is_the_default(tmp_path):
    options = '--trainer.env_config={"modalities": ["rgb", "proprio", "language"], "split": "vision"}'
    assert evaluate_vla.main([*FEW, options, f"--output={tmp_path}"]) == 0
    rows, summary = read(tmp_path)
    assert {row["split"] for row in rows} == {"vision"}
    assert summary["eval/success_rate"] == summary["splits"]["vision"]["eval/success_rate"]
    assert (tmp_path / "evaluation.mp4").exists()
    assert summary["evaluated"] == {
        "env": "tabletop", "env_config": {"modalities": ["rgb", "proprio", "language"], "split": "vision"},
        "eval_mode": "mode", "max_eval_steps": 1000, "env_steps": None, "weights_sha256": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--split=dark"], "split: 'dark' is not one of all, train, vision, semantics, execution"),
        (["--split=all", "--trainer.env=gym:Pendulum-v1"], "the environment gym:Pendulum-v1 has no splits"),
    ],
)
def test_unknown_splits_are_one_clear_line(argv, message, tmp_path, capsys):
    assert evaluate_vla.main([*argv, f"--output={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_simulator_that_breaks_is_one_line_and_no_refusal(tmp_path, capsys, monkeypatch):
    def breaks(self, tensordict):
        raise SimulatorFailed("tabletop: physics exploded")

    monkeypatch.setattr(TabletopEnv, "_step", breaks)
    assert evaluate_vla.main([*FEW, f"--output={tmp_path}"]) == 1
    assert capsys.readouterr().err == "error: tabletop: physics exploded\n"
