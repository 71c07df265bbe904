"""Evaluations of runs as one table: what a row says, and of which runs there is one."""

from __future__ import annotations

import csv
import json

from evaluation_table import main


def run_of(folder, seed: int, metrics: list[dict]):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"trainer": {"seed": seed}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return str(folder)


def evaluated(step: int, success: float, **more) -> dict:
    interval = {"eval/success_rate": success, "eval/success_low": success - 0.1, "eval/success_high": success + 0.1}
    tasks = {"eval/success_rate/push": success, "eval/success_rate/reach": success / 2}
    return {"global_step": step, "time/elapsed_s": step * 0.6, **interval, **tasks, **more}


def test_a_row_is_an_evaluation_with_what_training_sampled_before_it(tmp_path, capsys):
    sampled = [{"global_step": step, "rollout/success_rate": step / 1000} for step in (100, 200, 300)]
    last = evaluated(400, 0.5, **{"rollout/success_rate": 0.9})
    late = run_of(tmp_path / "late", 7, [evaluated(0, 0.2), *sampled, last])
    early = run_of(tmp_path / "early", 3, [*sampled, evaluated(300, 0.4)])
    empty = run_of(tmp_path / "empty", 1, sampled)
    table = tmp_path / "results" / "table.csv"
    assert main([late, early, empty, "--window=150", f"--output={table}"]) == 0
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["env_steps"]) for row in rows] == [("3", "300"), ("7", "0"), ("7", "400")]
    # Over (150, 300]: 0.2 and 0.3; before any training none; over (250, 400]: 0.3 and 0.9.
    assert [row["sampling"] for row in rows] == ["0.25", "", "0.6"]
    assert rows[2]["minutes"] == "4.0" and rows[2]["push"] == "0.5" and rows[2]["reach"] == "0.25"
    printed = capsys.readouterr().out
    assert "| seed | control steps | push | reach | all, 95 % interval | while sampling | minutes |" in printed
    assert "| 7 | 400 | 0.50 | 0.25 | 0.500 [0.400, 0.600] | 0.600 | 4.0 |" in printed


def test_success_while_sampling_is_that_of_episodes_not_of_rollouts(tmp_path):
    few = {"global_step": 100, "rollout/success_rate": 1.0, "rollout/episodes": 1}
    many = {"global_step": 200, "rollout/success_rate": 0.0, "rollout/episodes": 99}
    main([run_of(tmp_path / "run", 1, [few, many, evaluated(300, 0.4)]), f"--output={tmp_path / 'table.csv'}"])
    with (tmp_path / "table.csv").open() as file:
        assert [row["sampling"] for row in csv.DictReader(file)] == ["0.01"]


def test_what_is_no_run_or_was_never_evaluated_is_refused(tmp_path, capsys):
    assert (
        main([str(tmp_path)]) == 2
        and "is no run folder: it lacks config.json or checkpoints" in capsys.readouterr().err
    )
    assert main([run_of(tmp_path / "run", 1, [{"global_step": 4}])]) == 2
    assert "no evaluation in any of them" in capsys.readouterr().err


def test_runs_of_one_seed_are_told_apart_and_runs_of_other_tasks_leave_cells_empty(tmp_path, capsys):
    multi = run_of(tmp_path / "multi", 1, [evaluated(0, 0.2), evaluated(400, 0.5)])
    alone = {k: v for k, v in evaluated(400, 0.75).items() if "rate/" not in k}
    single = run_of(tmp_path / "single", 1, [alone])
    for runs in ([multi, single], [single, multi]):
        assert main([*runs, f"--output={tmp_path / 'table.csv'}"]) == 0
        with (tmp_path / "table.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [(row["run"], row["env_steps"], row["push"]) for row in rows] == [
            ("multi", "0", "0.2"), ("multi", "400", "0.5"), ("single", "400", ""),
        ]  # fmt: skip
        assert "| single | 1 | 400 |  |  | 0.750 [0.650, 0.850] |  | 4.0 |" in capsys.readouterr().out


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    run = run_of(tmp_path / "run", 1, [evaluated(0, 0.2)])
    (tmp_path / "file").write_text("in the way")
    for output in (tmp_path / "file" / "table.csv", tmp_path):
        assert main([run, f"--output={output}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --output: cannot write to {output}: ") and error.count("\n") == 1


def test_runs_without_success_are_said_to_have_none(tmp_path, capsys):
    run = run_of(tmp_path / "run", 1, [{"global_step": 4, "time/elapsed_s": 1.0, "eval/return": 7.0}])
    assert main([run]) == 2
    assert f"error: {run}: no success in their evaluations, only return" in capsys.readouterr().err
    assert main([run, run_of(tmp_path / "other", 1, [evaluated(0, 0.2)])]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"note: not in the table, as without success in an evaluation: {run}\n"
    assert captured.out.startswith("| seed |")
