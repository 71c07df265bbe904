"""Arms compared, each at its own best learning rate: who is better, and what the seeds do not tell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from research.errors import UserError
from research.study.arms import Cell, also_differing, check_by, heading_of, make_cells, noun_of, refuse_other_questions
from research.study.equal_budgets import (
    AXES,
    at_one_budget,
    ends_note,
    interruption,
    is_unknown,
    pairing,
    refuse_unlike_ends,
    refuse_unlike_lengths,
    scores_at,
    shorter_note,
)
from research.study.evaluations import check_evaluations, how_otherwise
from research.study.rate_choice import (
    Choice,
    ChooseOn,
    best_criterion,
    check_other_states,
    choose_rate,
    choosing_scores,
    describe_choice,
    few_seeds_note,
    refuse_unlike_budgets,
    states_that_choose,
    that_choose,
)
from research.study.run_filter import select
from research.study.run_settings import ENV_CONFIG, RATE
from research.study.run_table import CHOOSING, SPLITS, Axis, Run, plain, quoted
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


@dataclass
class RunnerUp:
    """A rate of an arm that the choice could not tell from the one it took."""

    learning_rate: float
    behind: float
    """In what the choice was by."""
    error: float
    """Standard error of that; NaN where one of the two has a single choosing seed."""
    mean: Estimate
    """Its own score, from the same states as the arm's."""
    seeds: int
    fresh: bool
    """Whether these are seeds that had no part in the choice, where there are seeds for the choice alone."""


@dataclass
class ArmResult:
    """One arm at its own best learning rate."""

    arm: str
    learning_rate: float
    runs: list[Run]
    scores: Array
    """`[n, K]` where runs are compared, of single episodes; where those cannot be paired, `[n, 1]`, of the curves."""
    before: float
    """NaN where a run was evaluated once: at its end."""
    mean: Estimate
    iqm: Estimate
    at_other_axis: Estimate
    """Mean score at equal wall time; at equal env steps, where runs are compared by anything but these.

    NaN where a run was evaluated only later.
    """
    runners_up: list[RunnerUp] = field(default_factory=list)
    split_scores: dict[str, Array] = field(default_factory=dict)
    """`[n, K]` in every split in which all of these runs were evaluated."""
    tasks: dict[str, Estimate] = field(default_factory=dict)
    """Mean score in every task, where there are several and episodes are paired."""
    rank: tuple[int, int] = (1, 1)
    separable_from: list[str] = field(default_factory=list)

    @property
    def splits(self) -> dict[str, Estimate]:
        """Mean score in every split in which all of these runs were evaluated."""
        bounded = self.runs[0].bounded
        return {split: mean_interval(scores, bounded=bounded) for split, scores in self.split_scores.items()}


@dataclass
class Pair:
    """Two arms, the one with the higher mean first."""

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
class SplitPair:
    """Two arms in a split, in the order of their means in what is reported."""

    split: str
    first: str
    second: str
    difference: Estimate
    p_value: float
    """Corrected after Holm for the pairs of the split; NaN where one has too few seeds for a verdict."""


@dataclass
class Comparison:
    """All that the report shows; arms in the order of their mean scores."""

    by: tuple[str, ...]
    """The options whose values make the arms."""
    equal: Axis
    """What runs have had equally much of where they are compared."""
    runs: list[Run]
    env_steps: float
    seconds: float
    interrupted: set[Axis]
    """At equal what of the two runs of a schedule that ends with the run are cut."""
    cells: dict[Cell, list[Run]]
    chosen_by: dict[Cell, float]
    arms: list[ArmResult]
    pairs: list[Pair]
    notes: list[str]
    split_pairs: list[SplitPair] = field(default_factory=list)
    """Where episodes are paired by initial state."""

    @property
    def paired(self) -> bool:
        return self.arms[0].scores.shape[1] > 1

    @property
    def place(self) -> float:
        """The env step or second at which runs are compared; 0 for their ends."""
        return {"steps": self.env_steps, "seconds": self.seconds, "ends": 0.0}[self.equal]

    @property
    def other_axis(self) -> Axis:
        """What runs are not compared by, but shown."""
        return "seconds" if self.equal == "steps" else "steps"

    @property
    def chooses_rates(self) -> bool:
        """Whether an arm may have several learning rates."""
        return RATE not in self.by

    @property
    def noun(self) -> str:
        """What an arm is called in the report."""
        return noun_of(self.by)

    @property
    def heading(self) -> str:
        """What stands above the names of arms in a table."""
        return heading_of(self.by)

    @property
    def measure(self) -> str:
        """What every score of it is: "success" or "return"."""
        return self.arms[0].runs[0].measure

    @property
    def decimals(self) -> int:
        """How many to show scores with: 3 for success; for returns, 4 significant digits of the largest arm."""
        if self.measure == "success":
            return 3
        largest = max(float(np.sqrt(np.mean(result.scores**2))) for result in self.arms)
        return max(0, 3 - math.floor(math.log10(largest))) if largest > 0 else 0


def compare(
    runs: Sequence[Run],
    choose_on: ChooseOn | None = None,
    choosing_seeds: Sequence[int] = (),
    by: Sequence[str] = (),
    equal: Axis = "steps",
    where: Sequence[str] = (),
) -> Comparison:
    """Compare arms, each at its own best learning rate.

    Args:
        runs: of one environment, measure and set of evaluation states; those that did not complete only get a note.
        choose_on: what the best rate is best in: "training" scores, so that all evaluation episodes are fresh for the
            report; the final evaluation from every other state ("states"), with the report on the remaining ones; an
            evaluation on states that are not reported ("other_states"); or the one that is reported ("evaluation").
            None = the one that is reported where that is the one to choose by, other states where all runs that choose
            were evaluated on some, else training.
        choosing_seeds: seeds that choose the rate and are left out of the report; none = all seeds do both.
        by: dotted options; runs that agree in all of them are an arm. None = the freeze scope. Where the learning rate
            is one of them, it is not chosen.
        equal: whether scores, differences and ranks are at equal env steps, at equal wall time, or at the end of each
            run: what was made equal is then the business of whoever gave the runs their budgets.
        where: `option=value` each; only runs that have them are compared (see `research.study.run_filter`).
    Raises:
        UserError: runs that cannot be compared (the message says which and why), or nothing left to compare.
    """
    runs, notes = select(runs, where)
    complete = [run for run in runs if run.complete]
    notes += [f"{quoted(run.run)} is excluded from all means: {plain(run.status)}." for run in runs if not run.complete]
    if not complete:
        raise UserError(f"none of the {len(runs)} runs is complete; the first, {runs[0].run}: {runs[0].status}")
    by = check_by(by, complete)
    if absent := sorted(set(choosing_seeds) - (seeds := {run.seed for run in complete})):
        raise UserError(
            f"--choosing_seeds: no complete run has the seed {', '.join(map(str, absent))}; there are "
            f"{', '.join(map(str, sorted(seeds)))}"
        )
    refuse_other_questions(complete, by)
    reported_in = {run.evaluation for run in complete} | {SPLITS for run in complete if run.splits}
    notes += check_evaluations(complete, sorted(reported_in - {""}), by)
    notes += [
        f"Splits were evaluated {plain(how)}." for how in {how_otherwise(run, SPLITS): 0 for run in complete} if how
    ]
    complete = at_one_budget(complete)
    cells = make_cells(complete, by)
    axes = dict.fromkeys((*AXES, equal))
    budgets: dict[Axis, float] = {axis: min(run.places(axis)[-1] for run in complete) for axis in axes}
    notes += shorter_note(complete, budgets["steps"], equal)
    if equal == "ends":
        refuse_unlike_ends(cells)
    else:
        refuse_unlike_lengths(complete, budgets[equal], equal)
    paired, pairing_notes = pairing(complete, budgets, equal)
    notes += pairing_notes
    if equal != "ends":  # where scores at equal wall time are shown
        notes += ends_note(complete, budgets["seconds"])
    interrupted, interruption_notes = interruption(complete, budgets, noun_of(by), equal)
    notes += interruption_notes
    if choose_on == "states" and not paired[equal]:
        raise UserError(
            "the rate can be chosen on evaluation states only where all runs have the episodes of their evaluations; "
            f"choose on training {complete[0].measure} (--choose_on=training)"
        )
    if choose_on == "states" and states_that_choose(complete[0]).all():
        raise UserError(
            "the rate can be chosen on evaluation states only where some are left to report; choose on others "
            "(--choose_on=other_states)"
        )
    if RATE in by:
        if choose_on or choosing_seeds:
            raise UserError(
                f"--choose_on and --choosing_seeds choose learning rates, and --by has {RATE}: leave them out"
            )
        chosen_on, choices = {}, {arm: Choice(rate, 0, 1, {}) for arm, rate in cells}
    else:
        rates = Counter(arm for arm, _ in cells)
        if not choose_on:  # where each arm has one rate, no evaluation is asked for
            choose_on = best_criterion(cells.values(), choosing_seeds) if max(rates.values()) > 1 else "training"
        choosing = that_choose(complete, choosing_seeds)
        if choose_on == "other_states":
            notes += check_evaluations(choosing, [CHOOSING], by)
            check_other_states(cells, choosing_seeds)
        if equal == "ends" or choose_on in ("training", "other_states"):
            refuse_unlike_budgets(cells, choosing_seeds)
        chosen_on = {
            cell: choosing_scores(
                members, choose_on, choosing_seeds, equal, budgets[equal], paired[equal], rates[cell[0]] == 1
            )
            for cell, members in cells.items()
        }
        choices = _choose(chosen_on, choosing_seeds, complete[0].bounded, notes)
        notes += few_seeds_note(choices)
        chosen = any(choice.rates > 1 for choice in choices.values())
        if chosen or choosing_seeds or choose_on == "states":  # the last two leave something out of the numbers
            how = next(filter(None, (how_otherwise(run, CHOOSING) for run in choosing)), "")
            notes.insert(0, describe_choice(noun_of(by), complete[0].measure, choose_on, choosing_seeds, how))
    comparison = Comparison(
        by, equal, list(runs), budgets["steps"], budgets["seconds"], interrupted, cells,
        {cell: math.nan if scores is None else float(scores.mean()) for cell, scores in chosen_on.items()}, [], [], [],
    )  # fmt: skip
    reported = ~states_that_choose(complete[0]) if choose_on == "states" else slice(None)
    comparison.arms = [
        _arm_result(comparison, arm, choice, choosing_seeds, paired, reported) for arm, choice in choices.items()
    ]
    comparison.arms.sort(key=lambda result: -result.mean.value)
    notes += _splits_note(comparison.arms)
    notes += [*_few_runs_notes(comparison.arms), *_differences_notes(complete, comparison), *_unmoved_note(complete)]
    comparison.pairs = _compare_pairs(comparison.arms)
    if comparison.paired:
        comparison.split_pairs = _compare_in_splits(comparison.arms)
    comparison.notes = notes
    return comparison


def _choose(
    chosen_on: dict[Cell, Array | None], choosing_seeds: Sequence[int], bounded: bool, notes: list[str]
) -> dict[str, Choice]:
    try:
        return {
            arm: choose_rate(arm, {rate: of for (a, rate), of in chosen_on.items() if a == arm}, bounded, notes)
            for arm in dict.fromkeys(arm for arm, _ in chosen_on)
        }
    except UserError as error:
        raise UserError(f"{error}: {list(choosing_seeds)}") from None


def _splits_note(arms: Sequence[ArmResult]) -> list[str]:
    """Which arms are missing from the tables of splits, for which run, as a note."""
    missing = []
    for split in dict.fromkeys(split for result in arms for run in result.runs for split in run.splits):
        for result in arms:
            if without := [run.run for run in result.runs if split not in run.splits]:
                more = f" and {len(without) - 1} more" if without[1:] else ""
                missing.append(f"{plain(result.arm)} in {plain(split)} ({quoted(without[0])}{more})")
    if not missing:
        return []
    return [
        f"Not in the tables of splits, for runs that were not evaluated there from the same states: "
        f"{', '.join(missing)}. Fewer pairs are corrected for fewer tests."
    ]


def _few_runs_notes(arms: Sequence[ArmResult]) -> list[str]:
    notes = []
    for number, word in ((1, "One seed"), (2, "Two seeds")):
        if few := [result.arm for result in arms if len(result.runs) == number]:
            why = "no interval and no ranking" if number == 1 else "intervals are too short, and no verdict"
            notes.append(f"{word} only, so {why}: {', '.join(map(plain, few))}.")
    return notes


def _unmoved_note(complete: Sequence[Run]) -> list[str]:
    """That no run's last evaluation is another one than its first, as a note."""
    evaluated = [run for run in complete if len(run.eval_scores) > 1]
    if not evaluated or any(
        (run.eval_scores[0], run.episodes[0]) != (run.eval_scores[-1], run.episodes[-1]) for run in evaluated
    ):
        return []
    return [
        "No run's last evaluation differs from its first in a single score: no policy moved, or not far enough to be "
        "seen (value warm-up as long as the run, rates far too low). Arms and rates are equal in what was measured."
    ]


def _differences_notes(complete: Sequence[Run], comparison: Comparison) -> list[str]:
    notes = []
    if differing := also_differing(complete, comparison.by):
        besides = f"{comparison.heading}, {'rate and ' if comparison.chooses_rates else ''}seed"
        notes.append(f"Besides {besides}, the runs differ in {', '.join(map(quoted, differing))}.")
    if of_environment := [option for option in comparison.by if option.startswith(ENV_CONFIG)]:
        notes.append(
            f"The arms differ in the environment ({', '.join(map(quoted, of_environment))}): part of a difference may "
            "be how hard each is."
        )
    return notes


def _arm_result(
    comparison: Comparison,
    arm: str,
    choice: Choice,
    choosing_seeds: Sequence[int],
    paired: dict[Axis, bool],
    reported: slice | Array,
) -> ArmResult:
    """An arm at its chosen rate, of the states that are `reported`."""
    rate, equal, other = choice.learning_rate, comparison.equal, comparison.other_axis
    runs = [run for run in comparison.cells[arm, rate] if run.seed not in choosing_seeds]
    if not runs:
        raise UserError(f"{arm} at {rate:g} has no seeds besides those that chose the rate: {list(choosing_seeds)}")
    bounded = runs[0].bounded
    scores = scores_at(runs, equal, comparison.place, paired[equal])[:, reported]
    elsewhere = comparison.seconds if other == "seconds" else comparison.env_steps
    unknown = any(is_unknown(run, other, elsewhere) for run in runs)
    befores = [
        math.nan if len(run.eval_scores) == 1
        else np.mean(np.array(run.scores(run.episodes[0]))[reported]) if run.episodes[0] else run.eval_scores[0]
        for run in runs
    ]  # fmt: skip
    result = ArmResult(
        arm,
        rate,
        runs,
        scores,
        before=float(np.mean(befores)),
        mean=mean_interval(scores, bounded=bounded),
        iqm=iqm_interval([scores], bounded=bounded),
        at_other_axis=Estimate(math.nan, math.nan, math.nan)
        if unknown
        else mean_interval(
            scores_at(runs, other, elsewhere, paired[other])[:, reported if paired[other] else slice(None)],
            bounded=bounded,
        ),
        split_scores={
            split: np.array([run.scores(run.splits[split]) for run in runs])[:, reported]
            for split in runs[0].splits
            if all(split in run.splits for run in runs)
        },
    )
    if paired[equal] and runs[0].tasks:
        tasks = np.array(runs[0].task_of_state)[reported]
        result.tasks = {task: mean_interval(scores[:, tasks == task], bounded=bounded) for task in dict.fromkeys(tasks)}
    for other_rate, (behind, error) in choice.runners_up.items():
        fresh = [run for run in comparison.cells[arm, other_rate] if run.seed not in choosing_seeds]
        seeds = fresh or comparison.cells[arm, other_rate]
        mean = mean_interval(scores_at(seeds, equal, comparison.place, paired[equal])[:, reported], bounded=bounded)
        result.runners_up.append(RunnerUp(other_rate, behind, error, mean, len(seeds), bool(fresh)))
    return result


def _compare_pairs(arms: list[ArmResult]) -> list[Pair]:
    """All pairs, and from them the ranks and who is separable from whom, written into `arms`."""
    indices, bounded = list(combinations(range(len(arms)), 2)), arms[0].runs[0].bounded
    differences = [difference_interval(arms[i].scores, arms[j].scores, bounded=bounded) for i, j in indices]
    fewest = [min(len(arms[i].runs), len(arms[j].runs)) for i, j in indices]
    tested = [d.p_value if n >= VERDICT_SEEDS else math.nan for d, n in zip(differences, fewest, strict=True)]
    better = np.zeros((len(arms), len(arms)), dtype=bool)
    pairs = []
    for (i, j), difference, have, p_value, level in zip(
        indices, differences, fewest, holm(tested), holm_levels(tested, ALPHA), strict=True
    ):
        first, second = arms[i], arms[j]
        pair = Pair(
            first.arm, second.arm, difference, float(p_value),
            probability_of_improvement(first.scores.mean(1), second.scores.mean(1)), math.nan,
        )  # fmt: skip
        if pair.separable:
            better[i, j] = True
            first.separable_from.append(second.arm)
            second.separable_from.append(first.arm)
            pair.more_seeds = 0.0
        elif not math.isnan(p_value):
            pair.more_seeds = max(seeds_needed(first.scores, second.scores, level, bounded=bounded) - have, 0.0)
            if math.isinf(pair.more_seeds) and first.scores.shape[1] > 1:
                pair.states = states_needed(first.scores, second.scores, level, bounded=bounded)
        pairs.append(pair)
    for result, rank in zip(arms, rank_ranges(better), strict=True):
        result.rank = rank
    return pairs


def _compare_in_splits(arms: Sequence[ArmResult]) -> list[SplitPair]:
    """All pairs of arms in every split that both were evaluated in, split by split."""
    found = []
    for split in dict.fromkeys(split for result in arms for split in result.split_scores):
        pairs = list(combinations([result for result in arms if split in result.split_scores], 2))
        differences = [
            difference_interval(*(result.split_scores[split] for result in pair), bounded=pair[0].runs[0].bounded)
            for pair in pairs
        ]
        fewest = [min(len(result.runs) for result in pair) for pair in pairs]
        tested = [d.p_value if n >= VERDICT_SEEDS else math.nan for d, n in zip(differences, fewest, strict=True)]
        found += [
            SplitPair(split, first.arm, second.arm, difference, float(p_value))
            for (first, second), difference, p_value in zip(pairs, differences, holm(tested), strict=True)
        ]
    return found
