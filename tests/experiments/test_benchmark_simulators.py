"""The benchmark of simulators: every row is there, refusals are one line, and RESULTS.md shows the committed table."""

from __future__ import annotations

import csv
import re

import benchmark_simulators as benchmark
import pytest
from worlds import ROOT

TINY = ["--num_envs=4", "--decisions=3", "--repeats=2"]
SEEN = '{"keys": {"proprio": "state", "rgb": "front"}, "instruction": "go"}'
WORLD = ["--env=gym:user_package:UserTwoCameras-v0", f"--env_config={SEEN}", "--model=agents.small_vla.SmallVLA"]


@pytest.mark.slow
def test_every_row_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    path = tmp_path / "table.csv"
    flags = [*TINY, *WORLD, "--chunks", "1", "3", "--workers", "0", "2", f"--output={path}"]
    assert benchmark.main(flags) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["chunk"], row["workers"]) for row in rows] == [("1", "0"), ("1", "2"), ("3", "0"), ("3", "2")]
    for row in rows:
        limit, collect, train = (float(row[name]) for name in ("limit", "collect", "train"))
        assert 0 < train < collect and limit > 0 and float(row["limit_low"]) <= limit <= float(row["limit_high"])
        assert row["sb3"] == "" and float(row["collect_over_limit"]) > 0
    printed = capsys.readouterr().out
    assert printed.count("of it), trained") == 4 and "Stable-Baselines3" not in printed


def test_what_cannot_be_is_one_line(capsys):
    assert benchmark.main(["--num_envs=0"]) == 2
    assert capsys.readouterr().err == "error: --num_envs: expected at least 1, got 0\n"
    assert benchmark.main([*TINY, "--env=nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: trainer.env: unknown environment 'nowhere'")


@pytest.mark.numbers
def test_the_results_are_the_committed_table():
    with (ROOT / "experiments/results/throughput/simulators.csv").open() as file:
        rows = list(csv.DictReader(file))
    text = (ROOT / "experiments" / "RESULTS.md").read_text()
    shown = re.findall(
        r"^\| (\d) \| (\d) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|$", text, re.M
    )
    expected = [
        (
            row["chunk"], row["workers"], *(f"{float(row[name]):,.0f}" for name in ("limit", "collect")),
            f"{float(row['collect_over_limit']):.2f}", *(f"{float(row[name]):,.0f}" for name in ("train", "sb3")),
            f"{float(row['train_over_sb3']):.1f}",
        )
        for row in rows
    ]  # fmt: skip
    assert shown == expected
