"""What a comparison says, in tables of text and in sentences."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np

from research.study.arms import arm_of
from research.study.comparison import VERDICT_SEEDS, Comparison, Pair, RunnerUp
from research.study.equal_budgets import AXES
from research.study.evaluations import describe_evaluation
from research.study.run_settings import defaults_of
from research.study.run_table import plain
from research.study.statistics import Estimate

Table = tuple[list[str], list[list[str]]]  # header, rows


def describe(comparison: Comparison) -> list[str]:
    """What was compared: environment, initial states, runs, and the env steps and seconds that all of them reached."""
    first, complete = comparison.arms[0].runs[0], sum(run.complete for run in comparison.runs)
    compared = {
        "steps": "", "seconds": " Runs are compared at equal wall time.",
        "ends": " Each run is compared at its own end, whatever it was given.",
    }[comparison.equal]  # fmt: skip
    wall_time = "" if comparison.equal == "ends" else f" and at {comparison.seconds:,.0f} s of wall time"
    return [
        f"{describe_evaluation(first, comparison.by)}, initial states {first.states}. "
        f"{len(comparison.runs)} runs, {complete} of them complete. {comparison.measure.capitalize()} at "
        f"{comparison.env_steps:,.0f} env steps{wall_time}, the most that all complete runs reached.{compared}",
    ]


def ranking(comparison: Comparison) -> list[str]:
    """One line per arm, best first, that claims no order which the seeds do not show."""
    pairs = {frozenset((pair.first, pair.second)): pair for pair in comparison.pairs}
    lines = []
    for result in comparison.arms:
        best, worst = result.rank
        found: dict[str, list[str]] = {}
        for other in comparison.arms:
            if other is not result and not (pair := pairs[frozenset((result.arm, other.arm))]).separable:
                untested = math.isnan(pair.p_value)
                said = f"not tested, {_why_untested(comparison, pair)}, against" if untested else "not separable from"
                found.setdefault(said, []).append(f'"{other.arm}"' if ", " in other.arm else other.arm)
        rank = f"rank {best}" if best == worst else f"rank {best} to {worst}"
        tail = "".join(f"; {said} {', '.join(names)}" for said, names in found.items())
        mean = interval(result.mean, comparison.decimals)
        lines.append(f"{result.arm}: {mean}, {rank} of {len(comparison.arms)}{tail}")
    return lines


def interval(estimate: Estimate, decimals: int = 3, signed: bool = False) -> str:
    """An estimate as text: "0.919 [0.890, 0.940]"; "-" for one that is not known."""
    if math.isnan(estimate.value):
        return "-"
    form = f"{{:{'+' if signed else ''}.{decimals}f}}"
    value, low, high = (form.format(x) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]" if estimate.has_interval else f"{value} (no interval)"


def arm_table(comparison: Comparison) -> Table:
    """Each arm at its own best learning rate, best first."""
    measure, decimals, other = comparison.measure, comparison.decimals, comparison.other_axis
    at_other = f"{measure} at equal {AXES[other]}{', schedules interrupted' if other in comparison.interrupted else ''}"
    budget = ["env steps"] if comparison.equal == "ends" else []
    header = [
        comparison.heading, "learning rate", "seeds", "before", measure, "IQM", at_other, *budget, "run, s", "rank",
    ]  # fmt: skip
    rows = [
        [
            result.arm, f"{result.learning_rate:g}", count_of_seeds(len(result.runs)),
            "-" if math.isnan(result.before) else f"{result.before:.{decimals}f}",
            *(interval(mean, decimals) for mean in (result.mean, result.iqm, result.at_other_axis)),
            *(f"{np.mean([run.eval_steps[-1] for run in result.runs]):,.0f}" for _ in budget),
            f"{np.mean([run.eval_seconds[-1] for run in result.runs]):.0f}",
            "-".join(map(str, dict.fromkeys(result.rank))),
        ]
        for result in comparison.arms
    ]  # fmt: skip
    return header, rows


def pair_table(comparison: Comparison) -> Table | None:
    """Every two scopes, and whether they can be told apart; None where there is one arm only."""
    header = ["first", "second", "difference", "p (Holm)", "verdict", "P(better)", "more seeds each"]
    rows = []
    for pair in comparison.pairs:
        untested = math.isnan(pair.p_value)
        verdict = "separable" if pair.separable else "not separable"
        p_value = "-" if untested else _p_value(pair.p_value)
        difference = interval(pair.difference, comparison.decimals, signed=True)
        verdict = f"{_why_untested(comparison, pair)}: cannot say" if untested else verdict
        rows.append(
            [pair.first, pair.second, difference, p_value, verdict, interval(pair.improvement), more_needed(pair)]
        )
    return (header, rows) if rows else None


def _why_untested(comparison: Comparison, pair: Pair) -> str:
    fewest = min(len(result.runs) for result in comparison.arms if result.arm in (pair.first, pair.second))
    return {1: "one seed", 2: "two seeds"}.get(fewest, "equal scores")


def more_needed(pair: Pair) -> str:
    """What would tell a pair apart that is not separable: more seeds for each, or more initial states for all."""
    if pair.separable or math.isnan(pair.more_seeds):
        return "-"
    if math.isfinite(pair.more_seeds):
        return "> 1000" if pair.more_seeds > 1000 else f"{pair.more_seeds:.0f}"
    if pair.difference.value == 0 or math.isnan(pair.states):
        return "seeds alone cannot"
    if math.isinf(pair.states):
        return "more states, and seeds"
    return "more states: > 100,000" if pair.states > 100_000 else f"more states: {pair.states:,.0f}"


def count_of_seeds(number: int) -> str:
    """How many seeds, flagged where they are too few for a verdict."""
    return str(number) if number >= VERDICT_SEEDS else f"{number}, too few"


def task_table(comparison: Comparison) -> Table | None:
    """Each arm's mean score in each task, where there are several."""
    return _table_by("tasks", comparison)


def split_table(comparison: Comparison) -> Table | None:
    """Each arm's mean score in the splits that all of its runs were evaluated in (evaluate_vla.py --split=all)."""
    return _table_by("splits", comparison)


def split_pair_table(comparison: Comparison) -> Table | None:
    """Differences of every two arms in every split, paired by initial state; None where there are none."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for pair in comparison.split_pairs:
        difference = interval(pair.difference, comparison.decimals, signed=True)
        p_value = "" if math.isnan(pair.p_value) else f", p {_p_value(pair.p_value)}"
        cells.setdefault((pair.first, pair.second), {})[pair.split] = difference + p_value
    splits = list(dict.fromkeys(pair.split for pair in comparison.split_pairs))
    rows = [[*names, *(of_pair.get(split, "") for split in splits)] for names, of_pair in cells.items()]
    return (["first", "second", *splits], rows) if rows else None


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table_by(what: str, comparison: Comparison) -> Table | None:
    """A row for each arm, a column for each name under an attribute of its result that maps names to estimates."""
    found = {result.arm: getattr(result, what) for result in comparison.arms if getattr(result, what)}
    names = list(dict.fromkeys(name for of_arm in found.values() for name in of_arm))
    rows = [
        [arm, *(interval(of_arm[n], comparison.decimals) if n in of_arm else "" for n in names)]
        for arm, of_arm in found.items()
    ]
    return ([comparison.heading, *names], rows) if rows else None


def cell_table(comparison: Comparison) -> Table:
    """Each arm at every learning rate tried: the mean score of every seed; of chosen rates and runners-up, what the
    report would be with them.
    """
    measure, decimals = comparison.measure, comparison.decimals
    header = [comparison.heading, "learning rate", "seeds", "chosen by", measure, "of each seed", "chosen", "reported"]
    chosen = {(result.arm, result.learning_rate): result for result in comparison.arms}
    runners_up = {(r.arm, other.learning_rate): other for r in comparison.arms for other in r.runners_up}
    rows = []
    for cell, runs in comparison.cells.items():
        scores = [run.mean_at(comparison.equal, comparison.place) for run in runs]
        criterion, mean, *each = (
            "-" if math.isnan(x) else f"{x:.{decimals}f}"
            for x in (comparison.chosen_by.get(cell, math.nan), np.mean(scores), *scores)
        )
        mark = reported = ""
        if cell in chosen:
            mark, reported = "yes", interval(chosen[cell].mean, decimals)
        elif cell in runners_up:
            mark, reported = "runner-up", _reported(runners_up[cell], decimals)
        rows.append([cell[0], f"{cell[1]:g}", str(len(runs)), criterion, mean, " ".join(each), mark, reported])
    return header, rows


def settings_table(comparison: Comparison) -> Table | None:
    """The settings that all runs share and that are not at their defaults; None where none are known."""
    common = next((run.common for run in comparison.runs if run.complete), {})
    defaults = defaults_of(common)
    rows = [[key, _in_json(value), _in_json(defaults[key]) if key in defaults else ""] for key, value in common.items()]
    return (["option", "value", "default"], rows) if rows else None


def _in_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def runs_table(comparison: Comparison) -> Table:
    """Every run, with those that did not complete; a column that no run has a value for is left out."""
    decimals = comparison.decimals
    columns: dict[str, list[str]] = {
        name: [] for name in ("run", comparison.heading, "learning rate", "seed", comparison.measure, "env steps")
    } | {name: [] for name in ("s", "started", "code", "machine", "status")}
    for run in comparison.runs:
        ended = run.complete
        values = [
            run.run, arm_of(run, comparison.by) if run.environment else "",
            f"{run.learning_rate:g}" if run.environment else "", str(run.seed) if run.environment else "",
            f"{run.eval_scores[-1]:.{decimals}f}" if ended else "", f"{run.eval_steps[-1]:,.0f}" if ended else "",
            f"{run.eval_seconds[-1]:.0f}" if ended else "", run.started, run.code, run.machine, run.status,
        ]  # fmt: skip
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    kept = {name: column for name, column in columns.items() if any(column)}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def origins(comparison: Comparison) -> list[str]:
    """When the runs were made, by which code and where, as far as is known."""
    found = []
    if dates := sorted(run.started for run in comparison.runs if run.started):
        found.append(f"Runs started {dates[0]}" + (f" to {dates[-1]}." if dates[-1] != dates[0] else "."))
    for name, attribute in (("Code", "code"), ("Machine", "machine")):
        count = Counter(getattr(run, attribute) or "not known" for run in comparison.runs)
        if set(count) != {"not known"}:
            parts = [f"{plain(text)} ({n} run{'s' if n > 1 else ''})" for text, n in count.most_common()]
            found.append(f"{name}: {', '.join(parts)}.")
    return [" ".join(found)] if found else []


def runner_up_notes(comparison: Comparison) -> list[str]:
    """One note per arm whose rate the choice could not tell from others: what the report would be with those."""
    notes = []
    for result in comparison.arms:
        found = []
        for other in result.runners_up:
            error = "one seed" if math.isnan(other.error) else f"standard error {other.error:.{comparison.decimals}f}"
            gap = f"{abs(other.behind):.{comparison.decimals}f} {'ahead' if other.behind < 0 else 'behind'}"
            found.append(
                f"{other.learning_rate:g} is {gap} ({error}) and its "
                f"{comparison.measure} {_reported(other, comparison.decimals)}"
            )
        if found:
            notes.append(
                f"The choice of a rate for {plain(result.arm)} is open. It took {result.learning_rate:g}, with "
                f"{interval(result.mean, comparison.decimals)}; {'; '.join(found)}."
            )
    return notes


def _reported(other: RunnerUp, decimals: int) -> str:
    which = f"{'' if other.fresh else 'choosing '}seed{'s' * (other.seeds > 1)}"
    return f"{interval(other.mean, decimals)} ({other.seeds} {which})"
