"""Where runs are compared: at equal env steps or wall time, or at the end of each, whatever it was given.

They are paired by initial state where single episodes are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from research.errors import UserError
from research.study.run_table import Axis, Run, quoted
from research.study.statistics import Array, Estimate, mean_interval

ALIKE_LENGTH = 1.1  # runs whose times differ by less ended at the same time, but for a machine's noise
AXES: dict[Axis, str] = {"steps": "env steps", "seconds": "wall time"}


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


def refuse_unlike_ends(cells: Mapping[Any, Sequence[Run]]) -> None:
    """Runs of one arm and rate that were given different budgets, where each counts at its end.

    Raises:
        UserError: there are such runs.
    """
    for members in cells.values():
        short, *_, long = sorted((members[0], *members), key=lambda run: run.eval_steps[-1])
        if long.eval_steps[-1] > ALIKE_LENGTH * short.eval_steps[-1]:
            raise UserError(
                f"--equal=ends compares runs where they end, and {short.run} and {long.run}, of one arm and learning "
                f"rate, end at {short.eval_steps[-1]:,.0f} and {long.eval_steps[-1]:,.0f} env steps; name those of one "
                "budget, or what tells them apart with --by"
            )


def refuse_unlike_lengths(complete: Sequence[Run], place: float, equal: Axis) -> None:
    """Runs of which nothing is known where others ended: they were evaluated only after more env steps or seconds.

    Raises:
        UserError: there are such runs.
    """
    late = [run for run in complete if is_unknown(run, equal, place)]
    if late:
        short, unit = min(complete, key=lambda run: run.places(equal)[-1]), "s" if equal == "seconds" else "env steps"
        raise UserError(
            f"{late[0].run} was evaluated at {late[0].places(equal)[0]:,.0f} {unit} alone, and {short.run} ended at "
            f"{place:,.0f}: nothing is known of the former there; name runs of one budget, or, if each was given what "
            "it should have, say --equal=ends"
        )


def is_unknown(run: Run, axis: Axis, place: float) -> bool:
    """Whether a run was evaluated only after a place, so that its score there is not known.

    Times of runs that did as much differ by a machine's noise.
    """
    return run.places(axis)[0] > place * (ALIKE_LENGTH if axis == "seconds" else 1)


def shorter_note(complete: Sequence[Run], steps: float, equal: Axis) -> list[str]:
    """That runs ended at different env steps, as a note."""
    longest = max(run.eval_steps[-1] for run in complete)
    if longest == steps:
        return []
    shortest = min(complete, key=lambda run: run.eval_steps[-1]).run
    compared = "each is compared at its own end" if equal == "ends" else f"all are compared at {steps:,.0f}"
    return [f"{quoted(shortest)} ended at {steps:,.0f} env steps, others at up to {longest:,.0f}: {compared}."]


def pairing(complete: Sequence[Run], budgets: dict[Axis, float], equal: Axis) -> tuple[dict[Axis, bool], list[str]]:
    """Whether runs are paired by initial state at equal env steps, and in time; what is not, and why."""
    why = "single episodes are missing"
    if not all(map(_reproducible, complete)):
        why = "ids of initial states are not reproducible (trainer.env_config.ids_reproducible is false)"
    paired = {
        axis: all(
            _reproducible(run) and run.episodes_at(axis, place_in(run, axis, place)) is not None for run in complete
        )
        for axis, place in budgets.items()
    }
    for_states = f"for the states evaluated and not for new ones: {why}."
    if not paired[equal]:
        return dict.fromkeys(paired, False), [
            f"Differences are not paired by initial state, and intervals are {for_states}"
        ]
    if not all(paired.values()):
        other = next(axis for axis, are in paired.items() if not are)
        return paired, [f"Intervals at equal {AXES[other]}, and the bands of curves, are {for_states}"]
    return paired, []


def _reproducible(run: Run) -> bool:
    return bool(run.env_config.get("ids_reproducible", True))


def interruption(
    complete: Sequence[Run], budgets: dict[Axis, float], noun: str, equal: Axis
) -> tuple[set[Axis], list[str]]:
    """Where schedules are cut, and what that means.

    Raises:
        UserError: at equal wall time, and the runs are compared there.
    """
    interrupted, notes = set(), []
    for axis, place in budgets.items():
        ends = [run.places(axis)[-1] for run in complete]
        annealed = [
            run
            for run, end in zip(complete, ends, strict=True)
            if run.anneal_lr is not False and end > ALIKE_LENGTH * place
        ]
        if not annealed:
            continue
        interrupted.add(axis)
        said = "" if any(run.anneal_lr for run in annealed) else " (as far as is known)"
        unit, took = ("s", "took") if axis == "seconds" else ("env steps", "had")
        lengths = f"runs {took} {place:,.0f} to {max(ends):,.0f} {unit}"
        if axis == equal == "seconds":
            raise UserError(
                f"--equal=seconds would cut schedules{said}: learning rates fall to 0 at each run's own end "
                f"(algorithm.cfg.anneal_lr), and {lengths}; give each {noun} the iterations that fit the time, or, if "
                "they were given those, say --equal=ends"
            )
        notes.append(
            f"At equal {AXES[axis]} schedules are interrupted{said}: learning rates fall to 0 at each run's own end "
            f"(`algorithm.cfg.anneal_lr`), and {lengths}. At {place:,.0f} {unit} some have finished and others hardly "
            f"begun to anneal, so that {_what_is_cut(axis == equal, noun)}"
        )
    return interrupted, notes


def _what_is_cut(is_compared: bool, noun: str) -> str:
    if is_compared:
        return "the order may be that of the schedules."
    return f"the column says nothing of an order: for that, give each {noun} the iterations that fit the time."


def place_in(run: Run, axis: Axis, place: float) -> float:
    """Where a run is read that is compared at a place: at its end, if that is as late but for a machine's noise.

    Between evaluations a score is a mixture of both: of one that was evaluated before and after training alone, a tenth
    of what lies before the place would be of the policy that it started from.
    """
    end = run.places(axis)[-1]
    return end if axis == "seconds" and place <= end <= ALIKE_LENGTH * place else place


def ends_note(complete: Sequence[Run], seconds: float) -> list[str]:
    """That runs that took about as long are read at their ends, at equal wall time, as a note."""
    later = [run.eval_seconds[-1] for run in complete if seconds < run.eval_seconds[-1] <= ALIKE_LENGTH * seconds]
    if not later:
        return []
    return [
        f"At equal wall time ({seconds:,.0f} s) {len(later)} runs that took up to {max(later):,.0f} s count as they "
        f"ended: times within {100 * (ALIKE_LENGTH - 1):.0f} % are taken for a machine's noise."
    ]


def scores_at(runs: Sequence[Run], axis: Axis, place: float, paired: bool = True) -> Array:
    """Scores of runs compared at an env step or second: `[n, K]`, or means `[n, 1]` where they are not `paired`."""
    return _scores([(run, place_in(run, axis, place)) for run in runs], axis, paired)


def _scores(places: Sequence[tuple[Run, float]], axis: Axis, paired: bool) -> Array:
    if paired:
        return np.array([run.episodes_at(axis, place) for run, place in places])
    return np.array([[run.mean_at(axis, place)] for run, place in places])


def has_crossed_bands(runs: Sequence[Run]) -> bool:
    """Whether the intervals of the runs' `curve` are for new initial states too, and not over the seeds alone."""
    return all(_reproducible(run) and all(run.episodes) for run in runs)


def curve(runs: Sequence[Run], axis: Axis) -> tuple[Array, Estimate]:
    """Mean evaluation curve of some runs, as far as all of them go, with intervals as those of an arm's mean.

    Where the episodes of an evaluation are not known, intervals are over the seeds alone, everywhere.

    Returns:
        env steps or seconds `[G]`, and the mean score at them, fields `[G]`; G = 0 where no place is within all runs.
    """
    places = [run.places(axis) for run in runs]
    start, end = max(place[0] for place in places), min(place[-1] for place in places)
    grid = np.unique(np.clip(np.unique(np.concatenate(places)), start, end)) if start <= end else np.empty(0)
    paired = has_crossed_bands(runs)
    means = [
        mean_interval(_scores([(run, place) for run in runs], axis, paired), bounded=runs[0].bounded) for place in grid
    ]
    return grid, Estimate(*(np.array([getattr(mean, name) for mean in means]) for name in ("value", "low", "high")))
