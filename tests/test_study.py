"""The study's committed table recomputes its committed report, and RESULTS.md says what the report says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import compare_runs
import pytest
import sweep_local

from research.comparison import compare
from research.run_table import read_table
from research.sweep import load_sweep

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "experiments" / "results" / "freeze_learning_rate"
CHOOSING = [1, 2]


@pytest.fixture(scope="module")
def comparison():
    return compare(read_table(STUDY / "runs.csv"), choosing_seeds=CHOOSING)


def test_the_table_recomputes_the_report(tmp_path):
    seeds = list(map(str, CHOOSING))
    arguments = [f"--table={STUDY / 'runs.csv'}", "--choosing_seeds", *seeds, f"--output={tmp_path}"]
    assert compare_runs.main(arguments) == 0
    again, committed = ((folder / "report.md").read_text().split("Made by")[0] for folder in (tmp_path, STUDY))
    assert again == committed
    assert (tmp_path / "runs.csv").read_text() == (STUDY / "runs.csv").read_text()


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
    for table in (compare_runs.scope_table, compare_runs.pair_table, compare_runs.split_table):
        for line in compare_runs.markdown_table(table(comparison)):
            assert line in results, f"{table.__name__}: {line}"
