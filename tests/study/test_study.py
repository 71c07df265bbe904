"""The study's committed table recomputes its committed report, and RESULTS.md says what the report says."""

from __future__ import annotations

from collections import Counter

import compare_runs
import pytest
import sweep_local
from worlds import ROOT

from research.study.comparison import compare
from research.study.report import markdown_table, pair_table, scope_table, split_table
from research.study.run_table import read_table
from research.study.sweep_file import load_sweep

STUDY = ROOT / "experiments" / "results" / "freeze_learning_rate"
LOOK_BACK = ROOT / "experiments" / "results" / "language_rate"
CHOOSING = [1, 2]


@pytest.fixture(scope="module")
def comparison():
    return compare(read_table(STUDY / "runs.csv"), choosing_seeds=CHOOSING)


@pytest.mark.parametrize(("folder", "choosing"), [(STUDY, CHOOSING), (LOOK_BACK, [])])
def test_the_table_recomputes_the_report(tmp_path, folder, choosing):
    seeds = ["--choosing_seeds", *map(str, choosing)] if choosing else []
    assert compare_runs.main([f"--table={folder / 'runs.csv'}", *seeds, f"--output={tmp_path}"]) == 0
    again, committed = ((each / "report.md").read_text().split("Made by")[0] for each in (tmp_path, folder))
    assert again == committed
    assert (tmp_path / "runs.csv").read_text() == (folder / "runs.csv").read_text()


def test_the_look_back_changes_the_language_rate_and_nothing_else(comparison):
    runs = {(run.scope, run.seed): run for result in comparison.scopes for run in result.runs}
    for run in read_table(LOOK_BACK / "runs.csv"):
        if run.scope == "language":
            assert (run.learning_rate, run.seed in (3, 4, 5, 6, 7)) == (4e-4, True)
        else:
            assert run.final_episodes == runs[run.scope, run.seed].final_episodes


def test_the_grid_was_run_as_planned_and_every_run_counts(comparison):
    assert all(run.complete and len(run.final_episodes) == 256 for run in comparison.runs)
    rates = Counter(run.cell for run in comparison.runs if run.seed in CHOOSING)
    assert set(rates.values()) == {2} and len(rates) == 25
    assert Counter(scope for scope, _ in rates) == dict.fromkeys(["none", "vision", "language", "backbone", "lora"], 5)
    for result in comparison.scopes:
        assert [run.seed for run in result.runs] == [3, 4, 5, 6, 7]
        assert set(result.splits) == {"train", "vision", "semantics", "execution"}


def test_the_second_sweep_confirms_what_the_first_chose(comparison):
    chosen = {result.scope: result.learning_rate for result in comparison.scopes}
    points = load_sweep(ROOT / "sweeps" / "freeze_learning_rate_confirm.yaml").grid()
    configs = [sweep_local.config_of([f"--{name}={value}" for name, value in point.items()]) for point in points]
    assert {config.policy.freeze: config.algorithm.cfg.learning_rate for config in configs} == chosen


def test_results_say_what_the_report_says(comparison):
    results = (ROOT / "experiments" / "RESULTS.md").read_text()
    for table in (scope_table, pair_table, split_table):
        for line in markdown_table(table(comparison)):
            assert line in results, f"{table.__name__}: {line}"
    table = scope_table(compare(read_table(LOOK_BACK / "runs.csv")))
    assert [line in results for line in markdown_table(table) if "language" in line] == [True]
    pairs = markdown_table(pair_table(compare(read_table(LOOK_BACK / "runs.csv"))))
    assert [line in results for line in pairs if "language" in line] == [True] * 4
