"""The README's first screen says what the committed rows say."""

from __future__ import annotations

import csv
import re

import pytest
from worlds import ROOT
from written_numbers import interval

from research.study.comparison import compare
from research.study.run_table import read_table

pytestmark = pytest.mark.numbers

RESULTS = ROOT / "experiments" / "results"
TEXT = " ".join((ROOT / "README.md").read_text().split())


def test_what_to_freeze_in_one_sentence():
    study = compare(read_table(RESULTS / "freeze_learning_rate" / "runs.csv"), choosing_seeds=(1, 2))
    arms = {arm.arm: arm for arm in study.arms}
    nothing, adapters = interval(arms["none"].mean), interval(arms["lora"].mean)
    assert f"nothing (success {nothing}), or all but low-rank adapters ({adapters})" in TEXT
    assert "lora" not in arms["none"].separable_from and "which cannot be told apart" in TEXT
    worst = min(study.arms, key=lambda arm: arm.mean.value)
    assert worst.arm == "backbone" and set(worst.separable_from) == set(arms) - {"backbone"}
    assert f"heads alone end lowest ({interval(worst.mean)})." in TEXT
    at_highest = {
        scope: max(r.eval_scores[-1] for r in runs) for (scope, rate), runs in study.cells.items() if rate == 1.6e-3
    }
    assert {scope for scope, success in at_highest.items() if success == 0} == {"none", "vision", "language"}
    assert arms["lora"].learning_rate == arms["backbone"].learning_rate == 1.6e-3


def test_what_to_freeze_on_meta_world():
    arms = compare(read_table(RESULTS / "pretrained_scopes" / "runs.csv")).arms
    ends, starts = [arm.mean.value for arm in arms], [arm.before for arm in arms]
    assert len(arms) == 7 and not any(arm.separable_from for arm in arms)
    told = f"({min(ends):.3f} to {max(ends):.3f}, from {min(starts):.2f} to {max(starts):.2f})"
    assert f"no two of seven scopes can be told apart {told}, and none forgets" in TEXT


def test_the_row_of_speed():
    with open(RESULTS / "throughput" / "resnet18-tabletop-cpu.csv") as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}

    def rate(row: str) -> str:
        return f"{float(rows[row]['env_steps_per_second']):.0f}"

    def size(row: str) -> str:
        return f"{float(rows[row]['bytes_per_transition']):,.0f}"

    ours, half, theirs = "ours/backbone/fp32/standard", "ours/backbone/bf16/standard", "sb3/backbone/fp32/standard"
    assert f"| {rate(ours)} / {rate(half)}; {rate(theirs)} | {size(ours)} / {size(half)}; {size(theirs)} |" in TEXT
    nothing = f"{rate('ours/none/fp32/standard')} against {rate('sb3/none/fp32/standard')}"
    assert f"With nothing frozen it is {nothing}" in TEXT
    assert round(float(rate(ours)) / float(rate(theirs))) == 6 and "six times as fast" in TEXT


def test_the_clones_that_ship_learn_what_the_readme_says():
    for name in ("openvla_reach", "openvla_oft_reach", "pi0_reach"):
        runs = read_table(RESULTS / name / "runs.csv")
        gained = f"{runs[0].eval_scores[0]:.3f} to {compare(runs).arms[0].mean.value:.3f}"
        assert re.search(rf"`{name}\.json` \([^)]*{re.escape(gained)}\)", TEXT), name
        assert len(runs) == 5 and "five seeds each" in TEXT
