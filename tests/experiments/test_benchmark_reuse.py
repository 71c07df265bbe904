"""Updates from kept features and from observations: the same losses, and what is measured of them."""

from __future__ import annotations

import csv

import pytest
from benchmark_reuse import main, taken
from worlds import ROOT

CONFIGS = ROOT / "experiments" / "configs"
SMALL = [
    "--trainer.num_envs=2", "--trainer.buffer_size=8", "--algorithm.cfg.batch_size=4", "--algorithm.cfg.n_epochs=2",
    "--trainer.device=cpu", "--trainer.num_eval_envs=1",
]  # fmt: skip


def rows_of(table) -> list[dict]:
    with table.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_both_updates_have_the_same_losses_and_a_row_says_what_they_cost(tmp_path, capsys):
    table = tmp_path / "reuse.csv"
    words = ["--config", str(CONFIGS / "pi0_tiny.json"), *SMALL, "--fresh", "--repeats=1", f"--output={table}"]
    assert main(words) == 0
    assert main([*words, "--policy.feature_memory=0.00004"]) == 0  # 5.4 kB a transition: patches alone
    everything, patches = rows_of(table)
    for row in (everything, patches):
        assert float(row["largest_difference"]) < 1e-6 and float(row["recomputed_ms_per_minibatch"]) > 0
        assert int(row["trained"]) < int(row["parameters"])
    size = [float(row["kept_bytes_per_transition"]) for row in (everything, patches)]
    assert size[0] > 21_000 > size[1] > 3_000
    printed = capsys.readouterr().out
    assert f"for {size[0]:,.0f} bytes per transition" in printed and str(table) in printed


def test_where_nothing_is_frozen_there_is_nothing_to_keep(tmp_path, capsys):
    words = ["--config", str(CONFIGS / "pi0_tiny.json"), *SMALL, "--policy.freeze=none", f"--output={tmp_path}/t.csv"]
    assert main(words) == 2
    assert "policy.freeze is none: no stage of Pi0VLA is frozen" in capsys.readouterr().err


def test_flags_of_its_own_are_taken_out():
    argv = ["--repeats", "5", "--trainer.seed=1", "--output=a.csv"]
    assert (taken(argv, "--repeats", "3"), taken(argv, "--output", None)) == ("5", "a.csv")
    assert argv == ["--trainer.seed=1"] and taken(argv, "--repeats", "3") == "3"


@pytest.mark.numbers
def test_the_results_are_those_of_the_committed_row():
    (row,) = rows_of(ROOT / "experiments" / "results" / "throughput" / "reuse.csv")
    results = (ROOT / "experiments" / "RESULTS.md").read_text()
    (line,) = [line for line in results.splitlines() if line.startswith(f"| {row['configuration']} |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [
        f"{int(row['trained']):,} of {int(row['parameters']):,}",
        f"{float(row['kept_ms_per_minibatch']):,.0f}", f"{float(row['recomputed_ms_per_minibatch']):,.0f}",
        f"{float(row['times_as_fast']):.1f}",
        f"{float(row['kept_bytes_per_transition']):,.0f}", f"{float(row['recomputed_bytes_per_transition']):,.0f}",
        row["largest_difference"],
    ]  # fmt: skip
