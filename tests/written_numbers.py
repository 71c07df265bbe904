"""Numbers as RESULTS.md, the README and the pages write them, from rows or estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from worlds import ROOT

from research.study.comparison import Comparison
from research.study.statistics import Estimate
from research.training.evaluation import wilson_interval


def section(heading: str) -> str:
    """A section of RESULTS.md, up to the next heading, its lines joined; rows of tables stay as they are."""
    (_, after) = (ROOT / "experiments" / "RESULTS.md").read_text().split(f"# {heading}\n")
    return " ".join(after.split("\n#")[0].split())


def interval(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def share(solved: int, states: int) -> str:
    """A share of episodes, with Wilson's interval."""
    low, high = wilson_interval(solved, states)
    return f"{solved / states:.3f} [{low:.3f}, {high:.3f}]"


def rate_rows(comparison: Comparison, names: Mapping[str, str], seeds: Sequence[int]) -> list[str]:
    """Per arm: `| name | rate: mean score; ... | the chosen rate | those that are open |`; each rate has these seeds.

    The best rate has to lie within its row: otherwise the next one is to be run.
    """
    means = {cell: np.mean([run.eval_scores[-1] for run in runs]) for cell, runs in comparison.cells.items()}
    assert all([run.seed for run in runs] == list(seeds) for runs in comparison.cells.values())
    rows = []
    for arm in comparison.arms:
        rates = sorted(rate for name, rate in means if name == arm.arm)
        assert rates[0] < arm.learning_rate < rates[-1], arm.arm
        tried = "; ".join(f"{rate:g}: {means[arm.arm, rate]:.3f}" for rate in rates)
        near = ", ".join(f"{other:g}" for other in sorted(one.learning_rate for one in arm.runners_up)) or "-"
        rows.append(f"| {names[arm.arm]} | {tried} | {arm.learning_rate:g} | {near} |")
    return rows
