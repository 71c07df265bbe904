"""The study of scopes with pretrained encoders: RESULTS.md and docs/what_to_freeze.md say what its rows say."""

from __future__ import annotations

import csv
import json
from itertools import combinations

import numpy as np
import pytest
from worlds import ROOT
from written_numbers import interval

from research.study.comparison import compare
from research.study.run_table import read_table
from research.study.statistics import difference_interval, holm, mean_interval

pytestmark = pytest.mark.numbers

ROWS = ROOT / "experiments" / "results" / "pretrained_scopes"
HEADING = "### What to freeze when the encoders have never seen the task: success, and what is forgotten\n"
PARTLY = "vision_encoder.stem+vision_encoder.blocks.[0-7]+language_encoder"
NAMES = {
    PARTLY: "stem, 8 of 11 blocks and language frozen", "vision_encoder+language_encoder": "both encoders",
    **{scope: f"`{scope}`" for scope in ("none", "lora", "vision", "backbone", "residual")},
}  # fmt: skip
SHORT = 75  # control steps of the episodes that were trained in


@pytest.fixture(scope="module")
def text() -> str:
    (_, after) = (ROOT / "experiments" / "RESULTS.md").read_text().split(HEADING)
    return after.split("\n#")[0]


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "what_to_freeze.md").read_text()


@pytest.fixture(scope="module")
def learned():
    return compare(read_table(ROWS / "runs.csv"))


@pytest.fixture(scope="module")
def kept():
    return compare(read_table(ROWS / "kept.csv"))


@pytest.fixture(scope="module")
def soon() -> dict[str, np.ndarray]:
    """Success within 75 control steps on tasks that were not trained: `[seeds, 150]` by scope, one row for "start"."""
    found: dict[str, list[list[bool]]] = {}
    with (ROWS / "kept_lengths.csv").open() as file:
        for row in csv.DictReader(file):
            ends = zip(row["success"], row["lengths"].split(), strict=True)
            found.setdefault(row["scope"], []).append([mark == "1" and int(length) <= SHORT for mark, length in ends])
    return {scope: np.array(rows, dtype=float) for scope, rows in found.items()}


def test_the_plan_was_run_and_its_rows_are_of_one_version(learned, kept):
    for comparison in (learned, kept):
        assert all(run.complete for run in comparison.runs) and len(comparison.runs) == 35
        assert {arm.arm for arm in comparison.arms} == set(NAMES)
        assert all([run.seed for run in arm.runs] == [11, 12, 13, 14, 15] for arm in comparison.arms)
        assert {run.code for run in comparison.runs} == {"e63e622"}
    assert [run.run for run in learned.runs] == [run.run for run in kept.runs]


def test_the_table(text, learned, kept, soon):
    of_kept = {arm.arm: arm for arm in kept.arms}
    for arm in learned.arms:
        seconds = np.mean([run.eval_seconds[-1] for run in arm.runs])
        early = interval(mean_interval(soon[arm.arm]))
        cells = [
            NAMES[arm.arm], f"{arm.learning_rate:g}", f"{arm.before:.3f}", interval(arm.mean), f"{seconds:.0f}",
            f"{of_kept[arm.arm].mean.value:.3f}", early,
        ]  # fmt: skip
        assert f"| {' | '.join(cells)} |" in text
    assert text.count("\n| ") == len(NAMES) + 1
    assert [line.split(" |")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")][1:] == [
        NAMES[arm.arm] for arm in learned.arms
    ]


def test_what_is_said_of_success(text, page, learned):
    words, of_page = " ".join(text.split()), " ".join(page.split())
    assert not any(pair.separable for pair in learned.pairs) and len(learned.pairs) == 21
    widest = max(learned.pairs, key=lambda pair: pair.difference.value)
    assert (widest.first, widest.second) == ("none", "backbone")
    assert f"is {interval(widest.difference, '+')} by itself and p {widest.p_value:.3f} among 21 pairs" in words
    gains = [arm.mean.value - arm.before for arm in learned.arms]
    assert f"All gain from the start, by {min(gains):.3f} to {max(gains):.3f}." in words
    reach = max(max(pair.difference.high, -pair.difference.low) for pair in learned.pairs)
    assert f"differences of up to {reach:.2f} are within the intervals" in words
    assert f"intervals are as wide as the differences were ({reach:.2f})" in of_page
    for arm in learned.arms:
        before = np.array([run.scores(run.episodes[0]) for run in arm.runs])
        assert (before == before[0]).all() and difference_interval(arm.scores, before).low > 0
        name = {PARTLY: "stem, 8 of 11 blocks and language", "backbone": "`backbone` (heads alone)"}.get(arm.arm)
        assert f"| {name or NAMES[arm.arm]} | {interval(arm.mean)} |" in page
    frozen = next(
        pair for pair in learned.pairs if {pair.first, pair.second} == {"none", "vision_encoder+language_encoder"}
    )
    assert f"{interval(frozen.difference)} of success against training everything" in of_page


def test_what_is_said_of_time(text, learned):
    seconds = {arm.arm: np.mean([run.eval_seconds[-1] for run in arm.runs]) for arm in learned.arms}
    whole = [seconds.pop(scope) for scope in ("lora", "none")]
    words = " ".join(text.split())
    assert (
        f"({min(seconds.values()):.0f} to {max(seconds.values()):.0f} s against {whole[0]:,.0f} and {whole[1]:,.0f} s"
        in words
    )


def test_what_is_said_of_what_is_kept(text, page, kept, soon):
    words, start = " ".join(text.split()), soon["start"]
    facts = json.loads((ROWS / "kept_start.json").read_text())
    solved = f"{facts['eval/success_rate']:.3f} [{facts['eval/success_low']:.3f}, {facts['eval/success_high']:.3f}]"
    assert f"solves within 200 control steps ({solved})" in words
    assert facts["evaluated"]["env_config"]["max_episode_steps"] == 200
    lost = max(150 - sum(run.scores(run.episodes[-1])) for run in kept.runs)
    assert lost == 1 and "of 150 states at most 1 is lost by any run" in words
    assert not any(pair.separable for pair in kept.pairs)
    means = [arm.mean.value for arm in kept.arms]
    assert f"| all seven scopes | {min(means):.3f} to {max(means):.3f} | no two |" in page
    assert f"where the start solves {start.mean():.3f}" in words
    scopes = [soon[arm.arm] for arm in kept.arms]
    pairs = [difference_interval(*pair).p_value for pair in combinations(scopes, 2)]
    assert (holm(pairs) == 1).all() and "(p 1.000 for all pairs)" in words


def test_lengths_are_of_the_episodes_of_the_table(kept):
    with (ROWS / "kept_lengths.csv").open() as file:
        marks = {(row["scope"], row["seed"]): row["success"] for row in csv.DictReader(file)}
    assert marks.pop(("start", "")) == "1" * 150
    assert marks == {(run.scope, str(run.seed)): run.episodes[-1] for run in kept.runs}
