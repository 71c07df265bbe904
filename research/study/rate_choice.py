"""Each arm's learning rate: what chooses it, on which seeds, and which rates the choice cannot tell from the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from research.errors import UserError
from research.study.equal_budgets import ALIKE_LENGTH, scores_at
from research.study.run_table import CHOOSING, Axis, Run, plain, spans_of
from research.study.statistics import Array, standard_error_of_difference

ChooseOn = Literal["training", "states", "other_states", "evaluation"]
ENOUGH_SEEDS = 3  # with fewer, the choice is as much of the seeds as of the rates
OPEN = 2  # standard errors; a rate that is no further behind the best is carried along


@dataclass
class Choice:
    """The rate chosen for an arm, and those that the choice cannot tell from it."""

    learning_rate: float
    seeds: int
    """How many chose it."""
    rates: int
    """Of how many."""
    runners_up: dict[float, tuple[float, float]]
    """Rate -> how far it is behind in what the choice was by, and the standard error of that; NaN of one seed.

    One that had too few seeds to be taken is among them, and may be ahead: it is behind by less than 0.
    """


def states_that_choose(run: Run) -> Array:
    """With `choose_on` "states": which of a run's states `[K]` choose, bool; the others are reported.

    Every other one, and where a state's task follows from its id, every other round of all tasks.
    """
    tasks = max(1, len(run.tasks.split()))
    return np.arange(len(run.scores(run.episodes[-1]))) // tasks % 2 == 0


def best_criterion(cells: Iterable[Sequence[Run]], choosing_seeds: Sequence[int]) -> ChooseOn:
    """What chooses where nobody says: the evaluation to choose by, if all runs that choose have one, else training.

    That is the one of other states, in `choosing/`, or, where just that one is reported, the one that is reported.
    """
    choosing = [run for cell in cells for run in that_choose(cell, choosing_seeds)]
    if choosing and all(run.evaluation == CHOOSING for run in choosing):
        return "evaluation"
    return "other_states" if choosing and all(run.choosing_episodes for run in choosing) else "training"


def that_choose(runs: Iterable[Run], choosing_seeds: Sequence[int]) -> list[Run]:
    """Those of some runs that choose: the ones of the choosing seeds, or all where none are named."""
    return [run for run in runs if not choosing_seeds or run.seed in choosing_seeds]


def refuse_unlike_budgets(cells: Mapping[tuple[str, float], Sequence[Run]], choosing_seeds: Sequence[int]) -> None:
    """Refuse rates of one arm that are chosen by what their runs came to after unlike env steps.

    Raises:
        UserError: there are such rates.
    """
    for arm in dict.fromkeys(arm for arm, _ in cells):
        of_rates = [that_choose(members, choosing_seeds) for (name, _), members in cells.items() if name == arm]
        found = sorted((run for members in of_rates for run in members), key=lambda run: run.eval_steps[-1])
        if sum(map(bool, of_rates)) > 1 and found[-1].eval_steps[-1] > ALIKE_LENGTH * found[0].eval_steps[-1]:
            short, long = (f"{r.run} ({r.learning_rate:g}) at {r.eval_steps[-1]:,.0f}" for r in (found[0], found[-1]))
            raise UserError(
                f"the learning rate of {plain(arm)} would be chosen by what runs came to at unlike ends, {short} and "
                f"{long} env steps: name runs of one budget, or what they were given in --by; --choose_on=states "
                "chooses where all are compared"
            )


def choosing_scores(
    cell: Sequence[Run],
    choose_on: ChooseOn,
    choosing_seeds: Sequence[int],
    axis: Axis,
    place: float,
    paired: bool = True,
    alone: bool = False,
) -> Array | None:
    """The scores `[n, K]` that a rate is chosen by, K = 1 for training scores; None for a cell without choosing seeds.

    Args:
        cell: the runs of an arm at a rate.
        choose_on: as in `compare`, with `choosing_seeds`.
        axis, place: where the evaluation is that chooses, if that is a reported one.
        paired: whether single episodes of that one are known, of all runs.
        alone: whether it is the arm's only rate, so that runs without a training score, NaN, are in nobody's way.
    Raises:
        UserError: a run without such scores.
    """
    members = that_choose(cell, choosing_seeds)
    if not members:
        return None
    if choose_on == "states":
        return scores_at(members, axis, place)[:, states_that_choose(members[0])]
    if choose_on == "evaluation":
        return scores_at(members, axis, place, paired)
    if choose_on == "other_states":
        return np.array([run.scores(run.choosing_episodes) for run in members])
    if not alone and (missing := [run for run in members if math.isnan(run.training_score)]):
        raise UserError(
            f"{missing[0].run} has no training {missing[0].measure} to choose the learning rate on; say "
            "--choose_on=states, or --choose_on=evaluation"
        )
    return np.array([[run.training_score] for run in members])


def check_other_states(cells: Mapping[tuple[str, float], Sequence[Run]], choosing_seeds: Sequence[int]) -> None:
    """Refuse other states that cannot choose: they are missing, reported, or not the same for all rates of an arm.

    Raises:
        UserError: such a run.
    """
    for arm in dict.fromkeys(arm for arm, _ in cells):
        _check_states_of(
            [r for (name, _), runs in cells.items() if name == arm for r in that_choose(runs, choosing_seeds)]
        )


def _check_states_of(members: Sequence[Run]) -> None:
    for run in members:
        command = f"evaluate_vla.py --checkpoint=<run> --first_state={spans_of(run.states)[-1][1] + 1}"
        if not run.choosing_episodes:
            raise UserError(
                f"--choose_on=other_states: {run.run} was not evaluated on other states; {command} "
                "--output=<run>/choosing does that"
            )
        for first, last in spans_of(run.choosing_states):
            for low, high in spans_of(run.states):
                if first <= high and low <= last:
                    raise UserError(
                        f"--choose_on=other_states: {run.run} would choose on the states {run.choosing_states}, of "
                        f"which {max(first, low)}-{min(last, high)} are reported; {command} takes others, and "
                        "--choose_on=training takes none"
                    )
        if run.choosing_states != members[0].choosing_states:
            raise UserError(
                f"--choose_on=other_states: {members[0].run} and {run.run} were evaluated on different other states, "
                f"{members[0].choosing_states} and {run.choosing_states}"
            )


def choose_rate(arm: str, scores: Mapping[float, Array | None], bounded: bool, notes: list[str]) -> Choice:
    """The arm's best rate, among those with at least half as many choosing seeds as its best-covered one.

    Args:
        arm: its name, for the notes.
        scores: `choosing_scores` of each rate tried.
        bounded: whether scores lie within 0..1.
        notes: what a reader of the choice should know is added here.
    Raises:
        UserError: no run has one of the choosing seeds.
    """
    counts = {rate: 0 if found is None else len(found) for rate, found in scores.items()}
    candidates = {
        rate: found for rate, found in scores.items() if found is not None and 2 * counts[rate] >= max(counts.values())
    }
    if not candidates:
        raise UserError(f"{arm} has no run with one of the seeds that should choose its rate")
    best = max(candidates, key=lambda rate: candidates[rate].mean())
    tried = {rate: found for rate, found in scores.items() if found is not None}
    if left_out := {rate: found for rate, found in tried.items() if rate not in candidates}:
        named = ", ".join(f"{rate:g} ({counts[rate]})" for rate in left_out)
        better = [f"{rate:g}" for rate, found in left_out.items() if found.mean() > candidates[best].mean()]
        ahead = f" {' and '.join(better)} did better than what was taken." if better else ""
        notes.append(
            f"For {plain(arm)}, {best:g} ({counts[best]} seeds that choose) was not chosen among rates with less than "
            f"half as many: {named}.{ahead} Give all rates as many seeds, or name seeds that all have "
            "(--choosing_seeds)."
        )
    tied = [rate for rate, found in candidates.items() if found.mean() == candidates[best].mean()]
    # Where another rate did as well, nothing says in which direction a better one would be.
    if len(scores) > 1 and best in (min(scores), max(scores)) and len(tied) == 1:
        side = "lowest" if best == min(scores) else "highest"
        notes.append(
            f"The best learning rate of {plain(arm)}, {best:g}, is the {side} one tried: a better one may lie beyond."
        )
    runners_up = {}
    for rate, found in tried.items():
        if rate != best:
            gap = float(candidates[best].mean() - found.mean())
            error = standard_error_of_difference(candidates[best], found, bounded)
            if math.isnan(error) or gap <= OPEN * error:
                runners_up[rate] = gap, error
    return Choice(best, counts[best], len(scores), runners_up)


def few_seeds_note(choices: Mapping[str, Choice]) -> list[str]:
    """Which arms' rates were chosen on too few seeds, as a note."""
    few = {arm: choice.seeds for arm, choice in choices.items() if choice.rates > 1 and choice.seeds < ENOUGH_SEEDS}
    if not few:
        return []
    named = ", ".join(f"{plain(arm)} ({seeds})" for arm, seeds in few.items())
    return [f"Learning rates chosen on fewer than {ENOUGH_SEEDS} seeds, which are too few: {named}."]


def describe_choice(noun: str, measure: str, choose_on: ChooseOn, choosing_seeds: Sequence[int], how: str = "") -> str:
    """What chose the rates, for the report.

    Args:
        noun: what an arm is called there.
        measure: what scores are.
        choose_on, choosing_seeds: as in `compare`.
        how: in what other way than deterministically, as in training, other states were evaluated.
    """
    by = {
        "training": f"{measure} in the last tenth of training, so that every evaluation episode is fresh",
        "states": "the final evaluation from every other initial state; the numbers are from the remaining states "
        "(curves and the map of all rates are from all)",
        "other_states": f"{'' if how else 'deterministic '}{measure} of the last checkpoint on initial states that are "
        f"not reported{f' ({plain(how)})' if how else ''}",
        "evaluation": f"{measure} in the evaluation that is reported",
    }[choose_on]
    if choosing_seeds:
        seeds = ", ".join(map(str, choosing_seeds))
        return (
            f"Each {noun}'s learning rate was chosen by {by}, on seeds {seeds}; the numbers are from the other seeds."
        )
    if choose_on == "evaluation":
        return (
            f"Each {noun}'s learning rate was chosen by {by}: the same seeds and episodes chose it, so that its "
            f"numbers are too high, and more so for {noun}s with more rates tried. They say which rate to take, and "
            "not how good it is: for that, other seeds (--choosing_seeds) or other states."
        )
    return (
        f"Each {noun}'s learning rate was chosen by {by}. The same seeds chose it, which still favours rates with "
        f"lucky seeds, and {noun}s with more rates tried: --choosing_seeds keeps seeds for the choice alone."
    )
