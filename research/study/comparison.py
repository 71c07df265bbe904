"""Freeze scopes compared, each at its own best learning rate: who is better, and what the seeds do not tell."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np

from research.schema import UserError
from research.study.run_table import Run
from research.study.statistics import (
    Array,
    Estimate,
    difference_interval,
    holm,
    iqm_interval,
    mean_interval,
    probability_of_improvement,
    rank_ranges,
    seeds_needed,
)

Cell = tuple[str, float]  # scope, learning rate
ALPHA = 0.05
CHOOSING_STATES, REPORTING_STATES = slice(0, None, 2), slice(1, None, 2)


@dataclass
class ScopeResult:
    """One scope at its own best learning rate."""

    scope: str
    learning_rate: float
    runs: list[Run]
    scores: Array
    """`[n, K]` at equal env steps, from the final episodes; where those cannot be paired, `[n, 1]` from the curves."""
    before: float
    mean: Estimate
    iqm: Estimate
    at_equal_time: Estimate
    splits: dict[str, Estimate] = field(default_factory=dict)
    """Mean score in every split in which all of these runs were evaluated."""
    rank: tuple[int, int] = (1, 1)
    separable_from: list[str] = field(default_factory=list)


@dataclass
class Pair:
    """Two scopes, the one with the higher mean first."""

    first: str
    second: str
    difference: Estimate
    p_value: float
    """Corrected after Holm for all pairs; NaN where one has a single seed."""
    improvement: Estimate
    more_seeds: float
    """For each of the two, on top of what there is; NaN where it cannot be said, infinite where seeds alone cannot."""

    @property
    def separable(self) -> bool:
        return self.p_value < ALPHA


@dataclass
class Comparison:
    """All that the report shows; scopes in the order of their mean scores."""

    runs: list[Run]
    env_steps: float
    seconds: float
    cells: dict[Cell, list[Run]]
    chosen_by: dict[Cell, float]
    scopes: list[ScopeResult]
    pairs: list[Pair]
    notes: list[str]

    @property
    def paired(self) -> bool:
        return self.scopes[0].scores.shape[1] > 1

    @property
    def measure(self) -> str:
        """What every score of it is: "success" or "return"."""
        return self.scopes[0].runs[0].measure

    @property
    def decimals(self) -> int:
        """How many to show scores with: 3 for success; for returns, 4 significant digits of the largest scope."""
        if self.measure == "success":
            return 3
        largest = max(float(np.sqrt(np.mean(result.scores**2))) for result in self.scopes)
        return max(0, 3 - math.floor(math.log10(largest))) if largest > 0 else 0


def compare(
    runs: Sequence[Run], choose_on: Literal["training", "states"] = "training", choosing_seeds: Sequence[int] = ()
) -> Comparison:
    """Compare freeze scopes, each at its own best learning rate.

    Args:
        runs: of one environment, measure and set of evaluation states; those that did not complete only get a note.
        choose_on: what the best rate is best in: "training" scores, so that all evaluation episodes are fresh for the
            report, or the final evaluation from every other state ("states"), with the report on the remaining ones.
        choosing_seeds: seeds that choose the rate and are left out of the report; none = all seeds do both.
    Raises:
        UserError: runs that cannot be compared (the message says which and why), or nothing left to compare.
    """
    _refuse_different(runs, [_question(run) for run in runs])
    complete = [run for run in runs if run.complete]
    notes = [f"`{run.run}` is excluded from all means: {run.status}." for run in runs if not run.complete]
    if not complete:
        raise UserError(f"none of the {len(runs)} runs is complete; the first, {runs[0].run}: {runs[0].status}")
    # Of complete runs only: one that ended before its first evaluation has not shown its measure.
    _refuse_different(complete, [{"what evaluations measure": run.measure} for run in complete])
    measure = complete[0].measure
    cells: dict[Cell, list[Run]] = defaultdict(list)
    for run in sorted(complete, key=lambda run: (run.scope, run.learning_rate, run.seed)):
        cells[run.cell].append(run)
    for cell in cells.values():
        _refuse_unlike_seeds(cell)
    steps = min(run.eval_steps[-1] for run in complete)
    seconds = min(run.eval_seconds[-1] for run in complete)
    longest = max(run.eval_steps[-1] for run in complete)
    if longest > steps:
        shortest = min(complete, key=lambda run: run.eval_steps[-1]).run
        notes.append(
            f"`{shortest}` ended at {steps:,.0f} env steps, others at up to {longest:,.0f}: "
            f"all are compared at {steps:,.0f}."
        )

    reproducible = all(run.env_config.get("ids_reproducible", True) for run in complete)
    paired = longest == steps and all(run.final_episodes for run in complete) and reproducible
    if not paired:
        why = "the runs ended at different env steps" if longest > steps else "single episodes are missing"
        if not reproducible:
            why = "ids of initial states are not reproducible (trainer.env_config.ids_reproducible is false)"
        notes.append(
            "Differences are not paired by initial state, and intervals are for the states evaluated and not for new "
            f"ones: {why}."
        )
    if choose_on == "states" and not paired:
        raise UserError(
            "the rate can be chosen on evaluation states only where all runs have their final episodes, at the same "
            f"env step; choose on training {measure}"
        )
    chosen_by = {cell: _criterion(members, choose_on, choosing_seeds) for cell, members in cells.items()}
    scopes = []
    for scope in dict.fromkeys(scope for scope, _ in cells):
        rate = _choose_rate({c: m for c, m in cells.items() if c[0] == scope}, chosen_by, choosing_seeds, notes)
        members = [run for run in cells[scope, rate] if run.seed not in choosing_seeds]
        if not members:
            raise UserError(
                f"{scope} at {rate:g} has no seeds besides those that chose the rate: {list(choosing_seeds)}"
            )
        scopes.append(_scope_result(scope, rate, members, steps, seconds, paired, choose_on))
    scopes.sort(key=lambda result: -result.mean.value)
    if alone := [result.scope for result in scopes if len(result.runs) == 1]:
        notes.append(f"One seed only, so no interval and no ranking: {', '.join(alone)}.")
    differing = sorted({key for run in complete for key in run.settings})
    if differing:
        notes.append(f"Besides scope, rate and seed, the runs differ in {', '.join(f'`{key}`' for key in differing)}.")
    pairs = _compare_pairs(scopes)
    return Comparison(
        list(runs), steps, seconds, dict(cells), chosen_by, scopes, pairs,
        [_selection_note(measure, choose_on, choosing_seeds), *notes],
    )  # fmt: skip


def _question(run: Run) -> dict[str, Any]:
    """What compared runs share: the environment, and the initial states they were evaluated from."""
    return {"trainer.env": run.environment, "the initial states of the evaluation": run.states} | {
        f"trainer.env_config.{key}": value for key, value in run.env_config.items()
    }


def _refuse_different(runs: Sequence[Run], values: Sequence[Mapping[str, Any]]) -> None:
    """Refuse runs that differ in one of their values, and say which run has which."""
    for key in dict.fromkeys(key for value in values for key in value):
        who: dict[str, list[str]] = defaultdict(list)
        for run, value in zip(runs, values, strict=True):
            who[json.dumps(value.get(key), sort_keys=True)].append(run.run)
        if len(who) > 1:
            found = "; ".join(
                f"{text} in {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
                for text, names in who.items()
            )
            raise UserError(f"these runs cannot be compared, {key} differs: {found}")


def _refuse_unlike_seeds(cell: Sequence[Run]) -> None:
    """The runs of one scope and rate are taken for repetitions: only their seeds may differ."""
    where = f"scope {cell[0].scope}, learning rate {cell[0].learning_rate:g}"
    for one, other in combinations(cell, 2):
        if one.seed == other.seed:
            raise UserError(f"{one.run} and {other.run} are the same seed {one.seed} of {where}: leave one of them out")
        for key in sorted({*one.settings, *other.settings}):
            a, b = one.settings.get(key), other.settings.get(key)
            if a != b:
                raise UserError(
                    f"{one.run} and {other.run}, both {where}, are no repetitions: {key} is {a!r} and {b!r}; "
                    "compare them separately"
                )


def _episodes(runs: Sequence[Run], part: slice = slice(None)) -> Array:
    return np.array([run.scores(run.final_episodes)[part] for run in runs])  # [n, K]


def _criterion(cell: Sequence[Run], choose_on: str, choosing_seeds: Sequence[int]) -> float:
    """What the best learning rate of a scope is highest in; NaN for a cell without choosing seeds."""
    members = [run for run in cell if not choosing_seeds or run.seed in choosing_seeds]
    if not members:
        return math.nan
    if choose_on == "states":
        return float(_episodes(members, CHOOSING_STATES).mean())
    if missing := [run for run in members if math.isnan(run.training_score)]:
        raise UserError(
            f"{missing[0].run} has no training {missing[0].measure} to choose the learning rate on; choose on states"
        )
    return float(np.mean([run.training_score for run in members]))


def _choose_rate(
    cells: Mapping[Cell, list[Run]], chosen_by: Mapping[Cell, float], choosing_seeds: Sequence[int], notes: list[str]
) -> float:
    """The scope's best rate, among those with at least half as many choosing seeds as its best-covered one."""
    (scope, _), rates = next(iter(cells)), [rate for _, rate in cells]
    counts = {
        rate: sum(not choosing_seeds or run.seed in choosing_seeds for run in runs) for (_, rate), runs in cells.items()
    }
    candidates = [rate for rate in rates if counts[rate] > 0 and 2 * counts[rate] >= max(counts.values())]
    if not candidates:
        raise UserError(f"{scope} has no run with one of the seeds {list(choosing_seeds)} that should choose its rate")
    best = max(candidates, key=lambda rate: chosen_by[scope, rate])
    if len(rates) > 1 and best in (min(rates), max(rates)):
        side = "lowest" if best == min(rates) else "highest"
        notes.append(
            f"The best learning rate of {scope}, {best:g}, is the {side} one tried: a better one may lie beyond."
        )
    return best


def _scope_result(
    scope: str, rate: float, runs: list[Run], steps: float, seconds: float, paired: bool, choose_on: str
) -> ScopeResult:
    reported = REPORTING_STATES if choose_on == "states" else slice(None)
    scores = _episodes(runs, reported) if paired else np.array([[run.at_step(steps)] for run in runs])
    bounded = runs[0].bounded
    return ScopeResult(
        scope,
        rate,
        runs,
        scores,
        before=float(np.mean([run.eval_scores[0] for run in runs])),
        mean=mean_interval(scores, bounded=bounded),
        iqm=iqm_interval([scores], bounded=bounded),
        at_equal_time=mean_interval([[run.at_second(seconds)] for run in runs], bounded=bounded),
        splits={
            split: mean_interval([run.scores(run.splits[split]) for run in runs], bounded=bounded)
            for split in runs[0].splits
            if all(split in run.splits for run in runs)
        },
    )


def _compare_pairs(scopes: list[ScopeResult]) -> list[Pair]:
    """All pairs, and from them the ranks and who is separable from whom, written into `scopes`."""
    indices, bounded = list(combinations(range(len(scopes)), 2)), scopes[0].runs[0].bounded
    differences = [difference_interval(scopes[i].scores, scopes[j].scores, bounded=bounded) for i, j in indices]
    corrected = holm([difference.p_value for difference in differences])
    better = np.zeros((len(scopes), len(scopes)), dtype=bool)
    pairs = []
    for (i, j), difference, p_value in zip(indices, differences, corrected, strict=True):
        first, second = scopes[i], scopes[j]
        have = min(len(first.runs), len(second.runs))
        # To be found after Holm's correction, in the worst case, a pair must pass Bonferroni's.
        alpha = ALPHA / len(indices)
        needed = seeds_needed(first.scores, second.scores, alpha, bounded=bounded) if have > 1 else math.nan
        pair = Pair(
            first.scope, second.scope, difference, float(p_value),
            probability_of_improvement(first.scores.mean(1), second.scores.mean(1)), max(needed - have, 0.0),
        )  # fmt: skip
        if pair.separable:
            better[i, j] = True
            first.separable_from.append(second.scope)
            second.separable_from.append(first.scope)
            pair.more_seeds = 0.0
        pairs.append(pair)
    for result, rank in zip(scopes, rank_ranges(better), strict=True):
        result.rank = rank
    return pairs


def _selection_note(measure: str, choose_on: str, choosing_seeds: Sequence[int]) -> str:
    by = {
        "training": f"{measure} in the last tenth of training, so that every evaluation episode is fresh",
        "states": "the final evaluation from every other initial state; the numbers are from the remaining states",
    }[choose_on]
    if choosing_seeds:
        seeds = ", ".join(map(str, choosing_seeds))
        return f"Each scope's learning rate was chosen by {by}, on seeds {seeds}; the numbers are from the other seeds."
    return (
        f"Each scope's learning rate was chosen by {by}. The same seeds chose it, which still favours rates with lucky "
        "seeds, and scopes with more rates tried: --choosing_seeds keeps seeds for the choice alone."
    )


def curve(runs: Sequence[Run], axis: Literal["steps", "seconds"]) -> tuple[Array, Estimate]:
    """Mean evaluation curve of some runs, with intervals over their seeds, as far as all of them go.

    Returns:
        env steps or seconds `[G]`, and the mean score at them, fields `[G]`.
    """
    places = [getattr(run, f"eval_{axis}") for run in runs]
    start, end = max(place[0] for place in places), min(place[-1] for place in places)
    every = np.unique(np.concatenate(places))
    grid = np.unique(np.clip(every, start, end))
    values = np.array([np.interp(grid, place, run.eval_scores) for place, run in zip(places, runs, strict=True)])
    return grid, mean_interval(values.T[..., None], bounded=runs[0].bounded)  # [G, n, 1]
