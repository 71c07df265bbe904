"""Runs as rows of a table, which keeps all that they are, and what is refused in one."""

import csv
import math

import numpy as np
import pytest
from study_worlds import STATES, make_run, write_choosing, write_splits, written

from research.errors import UserError
from research.study.run_sources import read_folders
from research.study.run_table import as_ranges, number_of_states, read_table, spans_of, write_table


def test_a_table_keeps_all_that_a_run_is(tmp_path):
    make_run(tmp_path / "a", ["fusion"], 1.5e-5, seed=3, algorithm__cfg__n_epochs=8, steps=(0, 1500))
    b = make_run(tmp_path / "b", final=0.3, algorithm__cfg__anneal_lr=True)
    write_splits(b, vision=np.arange(STATES) < 3)
    write_choosing(b, [1, 0, 1])
    runs = read_folders([str(tmp_path)])
    assert runs[1].splits == {"vision": "111" + "0" * (STATES - 3)}
    assert runs[0].settings == {"algorithm.cfg.anneal_lr": False, "algorithm.cfg.n_epochs": 8}
    assert [run.anneal_lr for run in runs] == [None, True]
    assert (runs[1].choosing_states, runs[1].choosing_episodes) == (f"{STATES}-{STATES + 2}", "101")
    assert all(len(text) == STATES for run in runs for text in run.episodes)
    write_table(tmp_path / "runs.csv", runs)
    for run in runs:
        run.folder = None
    assert written(*read_table(tmp_path / "runs.csv")) == written(*runs)


def test_a_table_keeps_returns_digit_by_digit(tmp_path):
    returns = np.float32([987.6, -0.03, 1e-7, 12, -1234567, 0] + [1 / 3] * (STATES - 6)).astype(float)
    make_run(tmp_path / "a", returns=returns)
    runs = read_folders([str(tmp_path)])
    assert runs[0].measure == "return"
    assert runs[0].episodes[-1].startswith("987.5999755859375 -0.029999999329447746 ")
    write_table(tmp_path / "runs.csv", runs)
    (again,) = read_table(tmp_path / "runs.csv")
    runs[0].folder = None
    assert written(again) == written(runs[0])
    assert again.scores(again.episodes[-1]) == list(returns)
    table = (tmp_path / "runs.csv").read_text()
    (tmp_path / "runs.csv").write_text(table.replace(",return,", ",reward,"))
    with pytest.raises(UserError, match="line 2: measure is 'reward', neither of success, return"):
        read_table(tmp_path / "runs.csv")


def test_a_table_of_an_earlier_version_is_read(tmp_path):
    """Its columns are the contract; what came later is not known of its runs."""
    make_run(tmp_path / "a")
    (run,) = read_folders([str(tmp_path)])
    write_table(tmp_path / "runs.csv", [run])
    rows = list(csv.reader((tmp_path / "runs.csv").open()))
    later = "earlier_episodes,anneal_lr,choosing_states,choosing_episodes"
    assert ",".join(rows[0][16:]) == later
    with (tmp_path / "old.csv").open("w") as file:
        csv.writer(file).writerows(row[:16] for row in rows)
    (old,) = read_table(tmp_path / "old.csv")
    assert old.episodes == ["", "", run.episodes[-1]] and old.anneal_lr is None and old.choosing_states == ""
    assert math.isnan(old.iteration_steps)


def test_a_run_with_many_evaluations_is_read_back(tmp_path):
    make_run(tmp_path / "a")
    (run,) = read_folders([str(tmp_path)])
    run.eval_steps = run.eval_seconds = [float(step) for step in range(4000)]
    run.eval_scores, run.episodes = [0.5] * 4000, ["01" * (STATES // 2)] * 4000
    write_table(tmp_path / "runs.csv", [run])
    assert len((tmp_path / "runs.csv").read_text()) > csv.field_size_limit()  # the reader's own, for a single cell
    run.folder = None
    assert written(*read_table(tmp_path / "runs.csv")) == written(run)
    assert csv.field_size_limit() == 131072


BAD = {
    ("eval_steps", "0 1000 x"): "could not convert string to float: 'x'",
    ("eval_steps", "0 2000 1000"): "the env steps of its evaluations do not rise",
    ("eval_seconds", "0.0 200 100"): "the seconds of its evaluations do not rise",
    ("eval_seconds", "0.0 nan 100"): "an evaluation has no seconds",
    ("eval_scores", "0.5 0.5 1.5"): "a success of 1.5 is not within 0 and 1",
    ("eval_scores", "0.5 0.5"): "unequal numbers of env steps, seconds, scores and episodes",
    ("eval_scores", ""): "no evaluations in its metrics",
    ("final_episodes", "01"): "2 scores of episodes for 40 initial states",
    ("final_episodes", "x" * 40): "its episodes are no scores: could not convert",
    ("final_episodes", "7" * 40): "the success of an episode is neither 0 nor 1",
    ("earlier_episodes", "01"): "unequal numbers",
    ("states", "0-3-9"): "'0-3-9' are no ids of initial states, as in '0-255'",
    ("learning_rate", "-1"): "its learning rate is -1.0",
    ("anneal_lr", "yes"): "anneal_lr is 'yes', neither true nor false nor empty",
    ("measure", "reward"): "measure is 'reward', neither of success, return",
    ("env_config", "[1]"): "env_config: expected a JSON object, got [1]",
    ("splits", '{"a": 1}'): "splits: expected the episodes of each as text",
    ("splits", "[" * 100_000): "maximum recursion depth",
    ("seed", "9" * 5000): "Exceeds the limit",
}  # fmt: skip


@pytest.mark.parametrize(("place", "message"), BAD.items(), ids=[f"{name} {text[:12]}" for name, text in BAD])
def test_a_value_that_is_wrong_is_named_with_its_line(tmp_path, place, message):
    make_run(tmp_path / "a")
    write_table(tmp_path / "runs.csv", read_folders([str(tmp_path)]))
    rows = list(csv.reader((tmp_path / "runs.csv").open()))
    rows[1][rows[0].index(place[0])] = place[1]
    with (tmp_path / "runs.csv").open("w") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(UserError) as error:
        read_table(tmp_path / "runs.csv")
    assert "runs.csv, line 2: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff", "cannot be read: 'utf-8'"), (b"run\n\0\n", "has no column status"), (b'a,"b\n', "cannot be read: ")],
)
def test_a_file_that_is_no_table_is_one_line(tmp_path, content, message):
    (tmp_path / "runs.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "runs.csv")


def test_ids_of_states_as_text_and_back():
    assert as_ranges([*range(256)]) == "0-255" and as_ranges([0, 1, 5, 7, 8]) == "0-1 5 7-8"
    assert spans_of("0-1 5 7-8") == [(0, 1), (5, 5), (7, 8)]
    assert number_of_states("0-1 5 7-8") == 5 and number_of_states("0-999999999") == 10**9


def test_scores_between_evaluations_lie_on_the_line_between_them(tmp_path):
    make_run(tmp_path / "a", returns=np.full(STATES, 10.03), steps=(0, 1000, 2000), pace=0.5)
    (run,) = read_folders([str(tmp_path)])
    assert run.eval_scores == pytest.approx([0.03, 5.03, 10.03])
    assert run.mean_at("steps", 1500) == run.mean_at("seconds", 750) == pytest.approx(7.53)
    assert run.mean_at("steps", 9999) == pytest.approx(10.03) and not run.bounded
    assert run.scores(run.episodes[-1]) == [10.03] * STATES
