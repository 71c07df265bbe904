"""The first study again, from three starts: RESULTS.md and docs/what_to_freeze.md say what its rows say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sweep_local
from worlds import ROOT
from written_numbers import interval, rate_rows, section, share

from research.study.comparison import Comparison, compare
from research.study.run_table import read_table
from research.study.sweep_file import load_sweep

pytestmark = pytest.mark.numbers

RESULTS = ROOT / "experiments" / "results"
ROWS = RESULTS / "starts_scopes"
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


def before(start: str) -> list[int]:
    """Of the start itself: states that it solves, and all that it was given."""
    return json.loads((ROWS / "before.json").read_text())[start]


def table(compared: dict[str, Comparison]) -> list[str]:
    arms = {start: {arm.arm: arm for arm in comparison.arms} for start, comparison in compared.items()}
    rows = []
    for arm in compared[SHIPPED].arms:
        seconds = np.mean([run.eval_seconds[-1] for start in STARTS for run in arms[start][arm.arm].runs])
        cells = [interval(arms[start][arm.arm].mean) for start in STARTS]
        rows.append(f"| {NAMES[arm.arm]} | {CHOSEN[arm.arm]:g} | {' | '.join(cells)} | {seconds:.0f} |")
    return rows


def taken_by(sweep: str) -> list:
    """The configuration of every point of a sweep."""
    loaded = load_sweep(ROOT / "sweeps" / f"{sweep}.yaml")
    return [sweep_local.config_of(loaded.flags(point)) for point in loaded.grid()]


def test_the_rates_and_the_sweeps_that_take_them():
    text = section("The first study again: rates")
    comparison = compare(read_table(RESULTS / "starts_rates" / "runs.csv"))
    assert {arm.arm: arm.learning_rate for arm in comparison.arms} == CHOSEN
    rows = rate_rows(comparison, NAMES, [1, 2, 3])
    assert all(row in text for row in rows) and text.count("; 0.0016: ") == len(rows) == 8
    seeds = {cell: np.array([run.eval_scores[-1] for run in runs]) for cell, runs in comparison.cells.items()}
    language = seeds["language", 4e-4], seeds["language", 1e-4]
    assert language[0].min() > language[1].max()
    assert f"{language[0].mean() - language[1].mean():.3f} below and no longer open" in text
    ended = {scope for scope, rate in CHOSEN.items() if not seeds[scope, 1.6e-3].any()}
    assert ended == {scope for scope, rate in CHOSEN.items() if rate == 4e-4} and len(ended) == 5
    assert "`backbone` at {:.3f}, {:.3f} and {:.3f}".format(*seeds["backbone", 6.4e-3]) in text
    left_open = {(arm.arm, other.learning_rate) for arm in comparison.arms for other in arm.runners_up}
    rates = {sweep: set(CHOSEN.items()) for sweep in ("starts_scopes", "starts_long", "starts_equal_time")}
    rates["starts_scopes_runners_up"] = left_open
    for sweep, expected in rates.items():
        assert {(config.policy.scope, config.algorithm.cfg.learning_rate) for config in taken_by(sweep)} == expected


def test_equal_time_gives_each_scope_the_iterations_that_take_as_long_as_those_of_none():
    seconds: dict[str, list[float]] = {}
    for run in read_table(ROWS / "runs.csv"):
        seconds.setdefault(run.scope, []).append(run.eval_seconds[-1])
    mean = {scope: np.mean(times) for scope, times in seconds.items()}
    found = {config.policy.scope: config.trainer.iterations for config in taken_by("starts_equal_time")}
    assert found == {scope: round(32 * mean["none"] / time) for scope, time in mean.items()}


def test_the_plan_was_run_and_nothing_else(compared):
    for comparison in compared.values():
        assert {arm.arm: arm.learning_rate for arm in comparison.arms} == CHOSEN
        assert all([run.seed for run in arm.runs] == SEEDS and arm.scores.shape == (3, 1024) for arm in comparison.arms)
        assert {run.states for run in comparison.runs} == {"0-1023"}


def test_the_table(compared):
    text = section(HEADING)
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

    def less(first: str, second: str) -> list[tuple[str, bool]]:
        pairs = [
            next(pair for pair in comparison.pairs if (pair.first, pair.second) == (first, second))
            for comparison in compared.values()
        ]
        return [(interval(pair.difference), pair.separable) for pair in pairs]

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


def test_the_page_says_who_is_told_from_whom(compared):
    upper = {"none", "lora", "language", "vision", "vision_encoder.[pc]*"}
    worst, middle, best = ({arm.arm: set(arm.separable_from) for arm in compared[start].arms} for start in STARTS)
    assert worst["*_encoder+action_head"] == {"none", "language", "lora", "backbone", "residual"}
    assert middle["*_encoder+action_head"] == set() and best["*_encoder+action_head"] == {"residual"}
    assert worst["backbone"] == set(NAMES) - {"backbone", "residual"}
    assert middle["backbone"] < upper and best["backbone"] < upper
    assert (len(middle["backbone"]), len(best["backbone"])) == (4, 3)
    assert (
        worst["residual"] == best["residual"] == set(NAMES) - {"backbone", "residual"} and middle["residual"] == upper
    )
