"""Runs as rows: the same from their folders, from W&B and from a table, and what is read of each."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from study_worlds import STATES, make_run, write_return_study, write_splits, write_study

from research.options import flatten_dict
from research.schema import UserError
from research.study.comparison import compare
from research.study.run_table import read_folders, read_table, read_wandb, write_table


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study") / "runs")


@pytest.fixture(scope="module")
def return_study(tmp_path_factory):
    return write_return_study(tmp_path_factory.mktemp("return_study") / "runs")


# ---- from folders


def test_a_resumed_run_counts_its_last_final_evaluation_once(tmp_path):
    folder = make_run(tmp_path / "a", final=np.zeros(STATES))
    with (folder / "episodes.jsonl").open("a") as file:
        file.write('{"global_step": 20')  # torn by a kill
        for i in range(STATES):
            file.write("\n" + json.dumps({"global_step": 2000, "initial_state": i, "success": i == 0}))
        file.write("\n" + json.dumps({"global_step": 1000, "initial_state": 1, "success": True}) + "\n")
    (run,) = read_folders([str(folder)])
    assert run.final_episodes == "1" + "0" * (STATES - 1)
    assert run.states == "0-39"


def test_frozen_by_a_list_or_by_a_switch_of_the_model(tmp_path):
    make_run(tmp_path / "a", ["vision_encoder", "fusion"])
    make_run(tmp_path / "b", policy__vla_config__model_config={"freeze_vision_encoder": True})
    make_run(tmp_path / "c", ["fusion"], policy__vla_config__model_config={"freeze_vision_encoder": True})
    assert [run.scope for run in read_folders([str(tmp_path)])] == ["vision_encoder+fusion", "vision", "fusion+vision"]


def test_folders_are_found_below_and_by_globs_once_each_in_order(tmp_path):
    for name in ("deep/er/b", "a", "c"):
        make_run(tmp_path / name)
    (make_run(tmp_path / "no_metrics") / "metrics.jsonl").unlink()
    found = read_folders([str(tmp_path), f"{tmp_path}/?", str(tmp_path / "a")])
    assert [run.run for run in found] == ["a", "c", "b"]
    assert [run.folder.path for run in found] == [tmp_path / "a", tmp_path / "c", tmp_path / "deep/er/b"]


@pytest.mark.parametrize(
    ("summary", "status"),
    [
        ('{"exit_code": 0}', "complete"),
        ("{}", "complete"),
        ('{"exit_code": 143}', "exit code 143"),
        (None, "no summary.json: killed, or still running"),
    ],
)
def test_the_status_is_how_the_run_ended(tmp_path, summary, status):
    folder = make_run(tmp_path / "a")
    (folder / "summary.json").unlink()
    if summary:
        (folder / "summary.json").write_text(summary)
    (run,) = read_folders([str(folder)])
    assert run.status == status and run.complete == (status == "complete")
    assert (run.final_episodes == "") == (status != "complete")


def test_a_file_that_is_no_json_is_named(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"a/config\.json cannot be read"):
        read_folders([str(folder)])


def test_scores_between_evaluations_lie_on_the_line_between_them(tmp_path):
    make_run(tmp_path / "a", returns=np.full(STATES, 10.03), steps=(0, 1000, 2000), pace=0.5)
    (run,) = read_folders([str(tmp_path)])
    assert run.eval_scores == pytest.approx([0.03, 5.03, 10.03])
    assert run.at_step(1500) == run.at_second(750) == pytest.approx(7.53)
    assert run.at_step(9999) == pytest.approx(10.03) and not run.bounded
    assert run.scores(run.final_episodes) == [10.03] * STATES


# ---- from W&B


def wandb_run(folder, state="finished"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows.append(rows[-2])  # a resumed run logs twice

    def history(keys):
        return [{key: row[key] for key in keys} for row in rows if set(keys) <= set(row)]

    config = flatten_dict(json.loads((folder / "config.json").read_text()))
    return SimpleNamespace(name=folder.name, state=state, config=config, scan_history=history)


def test_wandb_gives_the_rows_of_the_run_folders(study, monkeypatch):
    class Api:
        def sweep(self, path):
            assert path == "me/vla-rl/abc123"
            return SimpleNamespace(runs=[wandb_run(folder) for folder in sorted(study.iterdir())])

        def runs(self, path):
            return [wandb_run(folder, "crashed") for folder in sorted(study.iterdir())] if path == "me/vla-rl" else []

    monkeypatch.setattr(wandb, "Api", Api)
    runs = read_wandb("me/vla-rl/abc123")
    local = read_folders([str(study)])
    for run in local:
        run.folder, run.final_episodes = None, ""
    assert runs == local
    comparison = compare(runs)
    assert any("single episodes are missing" in note for note in comparison.notes)
    assert {run.status for run in read_wandb("me/vla-rl")} == {"W&B state crashed"}
    with pytest.raises(UserError, match="no runs in me/empty"):
        read_wandb("me/empty")


def test_wandb_gives_the_rows_of_runs_without_success(return_study, monkeypatch):
    runs = [wandb_run(folder) for folder in sorted(return_study.iterdir())]
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda path: runs))
    local = read_folders([str(return_study)])
    for run in local:
        run.folder, run.final_episodes = None, ""
    assert read_wandb("me/vla-rl") == local
    assert compare(local).scopes[0].mean.value == pytest.approx(987.6)


def test_what_wandb_refuses_is_one_line(monkeypatch):
    def fail():
        raise wandb.errors.CommError("no such\n sweep")

    monkeypatch.setattr(wandb, "Api", fail)
    with pytest.raises(UserError, match="cannot read me/vla-rl/abc: no such sweep$"):
        read_wandb("me/vla-rl/abc")


# ---- from a table


def test_a_table_keeps_all_that_a_run_is(tmp_path):
    make_run(tmp_path / "a", ["fusion"], 1.5e-5, seed=3, algorithm__cfg__n_epochs=8, steps=(0, 1500))
    write_splits(make_run(tmp_path / "b", final=0.3), vision=np.arange(STATES) < 3)
    runs = read_folders([str(tmp_path)])
    assert runs[1].splits == {"vision": "111" + "0" * (STATES - 3)}
    assert runs[0].settings == {"algorithm.cfg.n_epochs": 8}
    write_table(tmp_path / "runs.csv", runs)
    for run in runs:
        run.folder = None
    assert read_table(tmp_path / "runs.csv") == runs


def test_a_table_keeps_returns_digit_by_digit(tmp_path):
    returns = np.float32([987.6, -0.03, 1e-7, 12, -1234567, 0] + [1 / 3] * (STATES - 6)).astype(float)
    make_run(tmp_path / "a", returns=returns)
    runs = read_folders([str(tmp_path)])
    assert runs[0].measure == "return"
    assert runs[0].final_episodes.startswith("987.5999755859375 -0.029999999329447746 ")
    write_table(tmp_path / "runs.csv", runs)
    (again,) = read_table(tmp_path / "runs.csv")
    runs[0].folder = None
    assert again == runs[0]
    assert again.scores(again.final_episodes) == list(returns)
    table = (tmp_path / "runs.csv").read_text()
    (tmp_path / "runs.csv").write_text(table.replace(",return,", ",reward,"))
    with pytest.raises(UserError, match="line 2: measure is 'reward', neither of success, return"):
        read_table(tmp_path / "runs.csv")
