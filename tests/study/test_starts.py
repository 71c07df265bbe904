"""The first study again, from three starts: RESULTS.md and docs/what_to_freeze.md say what its rows say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from worlds import ROOT
from written_numbers import interval, section, share

from research.study.comparison import Comparison, compare
from research.study.run_table import read_table

pytestmark = pytest.mark.numbers

ROWS = ROOT / "experiments" / "results" / "starts_scopes"
HEADING = "The first study again: three starts"
START = "policy.vla_config.model_path"
SHIPPED = "tabletop_pick_place.pt"
STARTS = ("tabletop_pick_place_40.pt", SHIPPED, "tabletop_pick_place_75.pt")
SEEDS = [11, 12, 13]
NAMES = {
    "vision_encoder.[pc]*": "all of the vision encoder but its last layer",
    "*_encoder+action_head": "both encoders and the action head",
    **{scope: f"`{scope}`" for scope in ("none", "lora", "language", "vision", "backbone", "residual")},
}
CHOSEN = {scope: 1.6e-3 if scope in ("lora", "backbone", "residual") else 4e-4 for scope in NAMES}


@pytest.fixture(scope="module")
def compared() -> dict[str, Comparison]:
    runs = read_table(ROWS / "runs.csv")
    return {start: compare(runs, where=[f"{START}={start}"]) for start in STARTS}


def verdicts(comparison: Comparison) -> str:
    """Which arms are told from which lower ones, as `a` above b, c; d above ...."""
    below = [(pair.first, pair.second) for pair in comparison.pairs if pair.separable]
    arms = [arm.arm for arm in comparison.arms]
    told = {arm: [NAMES[low] for low in arms if (arm, low) in below] for arm in arms}
    return "; ".join(f"{NAMES[arm]} above {', '.join(low)}" for arm, low in told.items() if low) or "no two"


def before(start: str) -> dict:
    return json.loads((ROWS / "before.json").read_text())[start]


def table(compared: dict[str, Comparison]) -> list[str]:
    arms = {start: {arm.arm: arm for arm in comparison.arms} for start, comparison in compared.items()}
    rows = []
    for arm in compared[SHIPPED].arms:
        seconds = np.mean([run.eval_seconds[-1] for start in STARTS for run in arms[start][arm.arm].runs])
        cells = [interval(arms[start][arm.arm].mean) for start in STARTS]
        rows.append(f"| {NAMES[arm.arm]} | {CHOSEN[arm.arm]:g} | {' | '.join(cells)} | {seconds:.0f} |")
    return rows


def test_the_plan_was_run_and_nothing_else(compared):
    for comparison in compared.values():
        assert {arm.arm: arm.learning_rate for arm in comparison.arms} == CHOSEN
        assert all([run.seed for run in arm.runs] == SEEDS and arm.scores.shape == (3, 1024) for arm in comparison.arms)
        assert {run.states for run in comparison.runs} == {"0-1023"}


def test_the_table(compared):
    text = (ROOT / "experiments" / "RESULTS.md").read_text().split(f"# {HEADING}\n")[1].split("\n#")[0]
    rows = table(compared)
    assert all(row in text for row in rows) and len(rows) == 8
    starts = [before(start) for start in STARTS]
    assert f"| scope | learning rate | from {' | from '.join(share(*each) for each in starts)} | run, s |" in text


def test_the_verdicts(compared):
    text = section(HEADING)
    for start, comparison in compared.items():
        solved, states = before(start)
        assert f"From {solved / states:.3f}: {verdicts(comparison)}." in text


def test_what_is_said_of_differences(compared):
    text = section(HEADING)

    def less(first: str, second: str) -> list[str]:
        found = []
        for comparison in compared.values():
            (pair,) = [pair for pair in comparison.pairs if {pair.first, pair.second} == {first, second}]
            found.append((interval(pair.difference), pair.separable) if pair.first == first else None)
        return found

    (worst, told), (middle, maybe), (best, also) = less("none", "backbone")
    assert (told, maybe, also) == (True, False, True)
    assert f"below `none` by {worst}, {middle} (not told apart after the correction) and {best}." in text
    (worst, told), (middle, maybe), (best, neither) = less("none", "*_encoder+action_head")
    assert (told, maybe, neither) == (True, False, False)
    assert f"{worst} against `none`, then {middle} and {best} (not told apart after the correction)." in text
    assert "{}, {} and {} here".format(*(difference for difference, _ in less("none", "vision"))) in text
    upper = {"none", "lora", "language", "vision", "vision_encoder.[pc]*"}
    below = set()
    for comparison in compared.values():
        below |= {(pair.first, pair.second) for pair in comparison.pairs if pair.separable}
        assert {arm.arm for arm in comparison.arms[-2:]} == {"backbone", "residual"}
    assert not any({first, second} <= upper for first, second in below)
    assert not any((second, first) in below for first, second in below)


def test_the_page_says_the_same(compared):
    page = " ".join((ROOT / "docs" / "what_to_freeze.md").read_text().split())
    ends = [
        interval(pair.difference)
        for start in (STARTS[0], STARTS[2])
        for pair in compared[start].pairs
        if (pair.first, pair.second) == ("none", "backbone")
    ]
    assert "{} below `none` from 0.370, {} from 0.744".format(*ends) in page
    arms = {start: {arm.arm: arm for arm in comparison.arms} for start, comparison in compared.items()}
    for scope, name in NAMES.items():
        assert f"{name} | {', '.join(f'{arms[start][scope].mean.value:.3f}' for start in STARTS)} |" in page
