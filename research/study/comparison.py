"""Freeze scopes compared, each at its own best learning rate: who is better, and what the seeds do not tell."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from research.schema import UserError
from research.study.rate_choice import (
    REPORTING_STATES,
    Cell,
    ChooseOn,
    choose_rate,
    choosing_scores,
    describe_choice,
    few_seeds_note,
)
from research.study.run_table import Axis, Run, plain, quoted
from research.study.sample_size import seeds_needed, states_needed
from research.study.statistics import (
    Array,
    Estimate,
    difference_interval,
    holm,
    holm_levels,
    iqm_interval,
    mean_interval,
    probability_of_improvement,
    rank_ranges,
)

ALPHA = 0.05
VERDICT_SEEDS = 3  # what two can tell, and how often they err: at the top of statistics.py
ALIKE_LENGTH = 1.1  # runs whose times differ by less ended at the same time, but for a machine's noise


@dataclass
class RunnerUp:
    """A rate of a scope that the choice could not tell from the one it took."""

    learning_rate: float
    behind: float
    """In what the choice was by."""
    error: float
    """Standard error of that; NaN where one of the two has a single choosing seed."""
    mean: Estimate
    """Its own score, from the same states as the scope's."""
    seeds: int
    fresh: bool
    """Whether these are seeds that had no part in the choice, where there are seeds for the choice alone."""


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
    runners_up: list[RunnerUp] = field(default_factory=list)
    splits: dict[str, Estimate] = field(default_factory=dict)
    """Mean score in every split in which all of these runs were evaluated."""
    tasks: dict[str, Estimate] = field(default_factory=dict)
    """Mean score in every task, where there are several and episodes are paired."""
    rank: tuple[int, int] = (1, 1)
    separable_from: list[str] = field(default_factory=list)


@dataclass
class Pair:
    """Two scopes, the one with the higher mean first."""

    first: str
    second: str
    difference: Estimate
    p_value: float
    """Corrected after Holm for all pairs that were tested; NaN where one has too few seeds for a verdict."""
    improvement: Estimate
    more_seeds: float
    """For each of the two, on top of what there is; NaN where it cannot be said, infinite where the states bind."""
    states: float = math.nan
    """Where the states bind: how many in all, with the seeds that there are; infinite where the seeds bind as well."""

    @property
    def separable(self) -> bool:
        return self.p_value < ALPHA


@dataclass
class Comparison:
    """All that the report shows; scopes in the order of their mean scores."""

    runs: list[Run]
    env_steps: float
    seconds: float
    interrupted: bool
    """Whether runs of a schedule that ends with the run are cut at `seconds`."""
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


def compare(runs: Sequence[Run], choose_on: ChooseOn = "training", choosing_seeds: Sequence[int] = ()) -> Comparison:
    """Compare freeze scopes, each at its own best learning rate.

    Args:
        runs: of one environment, measure and set of evaluation states; those that did not complete only get a note.
        choose_on: what the best rate is best in: "training" scores, so that all evaluation episodes are fresh for the
            report; the final evaluation from every other state ("states"), with the report on the remaining ones; or an
            evaluation on states that are not reported ("other_states").
        choosing_seeds: seeds that choose the rate and are left out of the report; none = all seeds do both.
    Raises:
        UserError: runs that cannot be compared (the message says which and why), or nothing left to compare.
    """
    complete = [run for run in runs if run.complete]
    notes = [f"{quoted(run.run)} is excluded from all means: {plain(run.status)}." for run in runs if not run.complete]
    if not complete:
        raise UserError(f"none of the {len(runs)} runs is complete; the first, {runs[0].run}: {runs[0].status}")
    _refuse_different(complete, [_question(run) | {"what evaluations measure": run.measure} for run in complete])
    measure, bounded = complete[0].measure, complete[0].bounded
    complete = at_one_budget(complete)
    cells: dict[Cell, list[Run]] = defaultdict(list)
    for run in sorted(complete, key=lambda run: (run.scope, run.learning_rate, run.seed)):
        cells[run.cell].append(run)
    for cell in cells.values():
        _refuse_unlike_seeds(cell)
    steps = min(run.eval_steps[-1] for run in complete)
    seconds = min(run.eval_seconds[-1] for run in complete)
    notes += _shorter_note(complete, steps)
    paired, paired_in_time, pairing_notes = _pairing(complete, steps, seconds)
    notes += pairing_notes
    interrupted, interruption_notes = _interruption(complete, seconds)
    notes += interruption_notes
    if choose_on == "states" and not paired:
        raise UserError(
            "the rate can be chosen on evaluation states only where all runs have the episodes of their evaluations; "
            f"choose on training {measure}"
        )
    chosen_on = {cell: choosing_scores(members, choose_on, choosing_seeds, steps) for cell, members in cells.items()}
    reported = REPORTING_STATES if choose_on == "states" else slice(None)
    try:
        choices = {
            scope: choose_rate(scope, {rate: of for (s, rate), of in chosen_on.items() if s == scope}, bounded, notes)
            for scope in dict.fromkeys(scope for scope, _ in cells)
        }
    except UserError as error:
        raise UserError(f"{error}: {list(choosing_seeds)}") from None
    notes += few_seeds_note(choices)
    scopes = []
    for scope, choice in choices.items():
        members = [run for run in cells[scope, choice.learning_rate] if run.seed not in choosing_seeds]
        if not members:
            raise UserError(
                f"{scope} at {choice.learning_rate:g} has no seeds besides those that chose the rate: "
                f"{list(choosing_seeds)}"
            )
        scores = scores_at(members, "steps", steps, paired)[:, reported]
        in_time = scores_at(members, "seconds", seconds, paired_in_time)
        result = _scope_result(scope, choice.learning_rate, members, scores, in_time)
        if paired:
            tasks = np.array(members[0].task_of_state)[reported]
            result.tasks = {
                task: mean_interval(scores[:, tasks == task], bounded=bounded) for task in dict.fromkeys(tasks)
            }
        for rate, (behind, error) in choice.runners_up.items():
            fresh = [run for run in cells[scope, rate] if run.seed not in choosing_seeds]
            seeds = fresh or cells[scope, rate]
            mean = mean_interval(scores_at(seeds, "steps", steps, paired)[:, reported], bounded=bounded)
            result.runners_up.append(RunnerUp(rate, behind, error, mean, len(seeds), bool(fresh)))
        scopes.append(result)
    scopes.sort(key=lambda result: -result.mean.value)
    for number, word in ((1, "One seed"), (2, "Two seeds")):
        if few := [result.scope for result in scopes if len(result.runs) == number]:
            why = "no interval and no ranking" if number == 1 else "intervals are too short, and no verdict"
            notes.append(f"{word} only, so {why}: {', '.join(map(plain, few))}.")
    differing = sorted({key for run in complete for key in run.settings})
    if differing:
        notes.append(f"Besides scope, rate and seed, the runs differ in {', '.join(map(quoted, differing))}.")
    pairs = _compare_pairs(scopes)
    chosen_by = {cell: math.nan if scores is None else float(scores.mean()) for cell, scores in chosen_on.items()}
    return Comparison(
        list(runs), steps, seconds, interrupted, dict(cells), chosen_by, scopes, pairs,
        [describe_choice(measure, choose_on, choosing_seeds), *notes],
    )  # fmt: skip


def at_one_budget(runs: Sequence[Run]) -> list[Run]:
    """Runs of decisions that take several control steps, as if they had ended at the same env step.

    Such a run ends with the iteration that reaches its budget (`trainer.max_env_steps`), and iterations differ in how
    many control steps they take. Where a run's last evaluation lies less than its longest iteration beyond that of the
    shortest run, it counts as one at the same step; what lies between has earned it no more than an iteration.
    """
    shortest = min(run.eval_steps[-1] for run in runs)
    return [
        replace(run, eval_steps=[*run.eval_steps[:-1], shortest])
        if 0 < run.eval_steps[-1] - shortest < run.iteration_steps and shortest > max(run.eval_steps[:-1], default=-1)
        else run
        for run in runs
    ]


def _shorter_note(complete: Sequence[Run], steps: float) -> list[str]:
    longest = max(run.eval_steps[-1] for run in complete)
    if longest == steps:
        return []
    shortest = min(complete, key=lambda run: run.eval_steps[-1]).run
    return [
        f"{quoted(shortest)} ended at {steps:,.0f} env steps, others at up to {longest:,.0f}: "
        f"all are compared at {steps:,.0f}."
    ]


def _pairing(complete: Sequence[Run], steps: float, seconds: float) -> tuple[bool, bool, list[str]]:
    """Whether runs are paired by initial state at equal env steps, and in time; what is not, and why."""
    why = "single episodes are missing"
    if not all(map(_reproducible, complete)):
        why = "ids of initial states are not reproducible (trainer.env_config.ids_reproducible is false)"
    paired, in_time = (
        all(_reproducible(run) and run.episodes_at(axis, place) is not None for run in complete)
        for axis, place in (("steps", steps), ("seconds", seconds))
    )
    for_states = f"for the states evaluated and not for new ones: {why}."
    if not paired:
        return False, False, [f"Differences are not paired by initial state, and intervals are {for_states}"]
    if not in_time:
        return True, False, [f"Intervals at equal wall time, and the bands of curves, are {for_states}"]
    return True, True, []


def _reproducible(run: Run) -> bool:
    return bool(run.env_config.get("ids_reproducible", True))


def _interruption(complete: Sequence[Run], seconds: float) -> tuple[bool, list[str]]:
    """Whether schedules are cut at equal wall time, and what that means."""
    longest = max(run.eval_seconds[-1] for run in complete)
    annealed = [run for run in complete if run.anneal_lr is not False and run.eval_seconds[-1] > ALIKE_LENGTH * seconds]
    if not annealed:
        return False, []
    said = "" if any(run.anneal_lr for run in annealed) else " (as far as is known)"
    return True, [
        f"At equal wall time schedules are interrupted{said}: learning rates fall to 0 at each run's own end "
        f"(`algorithm.cfg.anneal_lr`), and runs took {seconds:,.0f} to {longest:,.0f} s. At {seconds:,.0f} s some have "
        "finished and others hardly begun to anneal, so that the column says nothing of an order: for that, give each "
        "scope the iterations that fit the time."
    ]


def scores_at(runs: Sequence[Run], axis: Axis, place: float, paired: bool = True) -> Array:
    """Scores of runs at an env step or second: `[n, K]`, or their means `[n, 1]` where they are not `paired`."""
    if paired:
        return np.array([run.episodes_at(axis, place) for run in runs])
    return np.array([[run.mean_at(axis, place)] for run in runs])


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


def _scope_result(scope: str, rate: float, runs: list[Run], scores: Array, in_time: Array) -> ScopeResult:
    bounded = runs[0].bounded
    return ScopeResult(
        scope,
        rate,
        runs,
        scores,
        before=float(np.mean([run.eval_scores[0] for run in runs])),
        mean=mean_interval(scores, bounded=bounded),
        iqm=iqm_interval([scores], bounded=bounded),
        at_equal_time=mean_interval(in_time, bounded=bounded),
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
    fewest = [min(len(scopes[i].runs), len(scopes[j].runs)) for i, j in indices]
    tested = [d.p_value if n >= VERDICT_SEEDS else math.nan for d, n in zip(differences, fewest, strict=True)]
    better = np.zeros((len(scopes), len(scopes)), dtype=bool)
    pairs = []
    for (i, j), difference, have, p_value, level in zip(
        indices, differences, fewest, holm(tested), holm_levels(tested, ALPHA), strict=True
    ):
        first, second = scopes[i], scopes[j]
        pair = Pair(
            first.scope, second.scope, difference, float(p_value),
            probability_of_improvement(first.scores.mean(1), second.scores.mean(1)), math.nan,
        )  # fmt: skip
        if pair.separable:
            better[i, j] = True
            first.separable_from.append(second.scope)
            second.separable_from.append(first.scope)
            pair.more_seeds = 0.0
        elif not math.isnan(p_value):
            pair.more_seeds = max(seeds_needed(first.scores, second.scores, level, bounded=bounded) - have, 0.0)
            if math.isinf(pair.more_seeds) and first.scores.shape[1] > 1:
                pair.states = states_needed(first.scores, second.scores, level, bounded=bounded)
        pairs.append(pair)
    for result, rank in zip(scopes, rank_ranges(better), strict=True):
        result.rank = rank
    return pairs


def has_crossed_bands(runs: Sequence[Run]) -> bool:
    """Whether the intervals of the runs' `curve` are for new initial states too, and not over the seeds alone."""
    return all(_reproducible(run) and all(run.episodes) for run in runs)


def curve(runs: Sequence[Run], axis: Axis) -> tuple[Array, Estimate]:
    """Mean evaluation curve of some runs, as far as all of them go, with intervals as those of a scope's mean.

    Where the episodes of an evaluation are not known, intervals are over the seeds alone, everywhere.

    Returns:
        env steps or seconds `[G]`, and the mean score at them, fields `[G]`.
    """
    places = [run.places(axis) for run in runs]
    start, end = max(place[0] for place in places), min(place[-1] for place in places)
    grid = np.unique(np.clip(np.unique(np.concatenate(places)), start, end))
    paired = has_crossed_bands(runs)
    means = [mean_interval(scores_at(runs, axis, place, paired), bounded=runs[0].bounded) for place in grid]
    return grid, Estimate(*(np.array([getattr(mean, name) for mean in means]) for name in ("value", "low", "high")))
