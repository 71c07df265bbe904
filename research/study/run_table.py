"""Training runs as rows of one table, `runs.csv`.

`run_sources` makes the same `Run` of run folders and of W&B, and a comparison works from nothing else, so that a
committed `runs.csv` recomputes every number of it. Its columns:

| column             | meaning                                                                                     |
|--------------------|---------------------------------------------------------------------------------------------|
| `run`              | the run folder's name                                                                       |
| `status`           | `complete`, or why the run is kept but excluded from all means                              |
| `scope`            | what was frozen: `policy.freeze`, a list joined by `+`                                      |
| `learning_rate`    | `algorithm.cfg.learning_rate`                                                               |
| `seed`             | `trainer.seed`                                                                              |
| `environment`      | `trainer.env`, behind which ", as evaluated in NAME/" says that its scores are of another   |
|                    | evaluation (`--evaluation`); empty where the run's configuration could not be read          |
| `env_config`       | `trainer.env_config` as JSON with dotted keys                                               |
| `states`           | ids of the evaluation's initial states, as in `0-255` or `0-9 20`                           |
| `measure`          | what scores are: `success` where the run logged it in its evaluations, else `return`        |
| `training_score`   | mean score of the training episodes in the last tenth of the env steps                      |
| `eval_steps`       | env steps of the evaluations, separated by spaces                                           |
| `eval_seconds`     | wall-clock seconds at the same evaluations                                                  |
| `eval_scores`      | their mean scores: success rates, or mean undiscounted returns                              |
| `final_episodes`   | scores of the last evaluation's episodes in the order of `states`: `0110`, 1 = success, or  |
|                    | returns separated by spaces; empty where not known                                          |
| `splits`           | JSON: a split's name -> its episodes, as in `final_episodes`; see below                     |
| `settings`         | JSON: the other settings in which the runs of the table differ, by dotted option: what a    |
|                    | comparison may be by; an option that a run does not have is left out                        |
| `earlier_episodes` | as `final_episodes`, of the evaluations before the last, separated by `;`                   |
| `anneal_lr`        | `algorithm.cfg.anneal_lr`: `true` or `false`; empty where not known                         |
| `choosing_states`  | ids of the states of `choosing/`, see below                                                 |
| `choosing_episodes`| their scores, as in `final_episodes`                                                        |
| `iteration_steps`  | env steps of its longest iteration, where decisions are chunks; empty where not known       |
| `tasks`            | names of the tasks, separated by spaces: the task of a state is that at its remainder by    |
|                    | their number; empty where there is one                                                      |
| `common`           | JSON: the settings that all runs share and that are not at their defaults                   |
| `started`          | date and time of its start, local to its machine                                            |
| `code`             | git commit of the code that ran, with `-dirty` where it had changes                         |
| `machine`          | processor, cores and GPU, not its name                                                      |
| `url`              | its page on W&B                                                                             |
| `evaluated`        | JSON: name of a folder that evaluations were taken from -> what `evaluate_vla.py` says that |
|                    | it evaluated, with dotted keys: environment, its options, the checkpoint's env steps, ...   |

Splits are what `evaluate_vla.py --split=all` wrote into the folder `splits/` of a run folder, from the run's last
checkpoint and the same initial states as its own evaluations; `choosing/` is what it wrote there on other states, with
`--first_state`. Columns behind `settings` are not in tables of earlier versions, and those from `iteration_steps` on
are written only where some run has a value: tables without them are read, too.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from research.errors import UserError
from research.runs.folder import RunFolder

Axis = Literal["steps", "seconds", "ends"]
CHOOSING, SPLITS = "choosing", "splits"  # folders in a run's: what chooses learning rates, and all splits
AS_EVALUATED = ", as evaluated in "
LARGEST_SCORE = 1e100  # what squares and sums of scores still hold


class Measure(NamedTuple):
    """What the scores of a run are."""

    metric: str
    """Its name below `eval/` and `rollout/`."""
    field: str
    """Its name in `episodes.jsonl`."""
    extent: tuple[float, float] | None
    """The lowest and the highest score there can be; None for scores without bounds."""


MEASURES = {
    "success": Measure("success_rate", "success", (0.0, 1.0)),
    "return": Measure("return", "episode_return", None),
}


@dataclass
class Run:
    """One training run; see the table at the top of this module."""

    run: str
    status: str
    scope: str
    learning_rate: float
    seed: int
    environment: str
    env_config: dict[str, Any]
    states: str
    measure: Literal["success", "return"]
    training_score: float
    eval_steps: list[float]
    eval_seconds: list[float]
    eval_scores: list[float]
    episodes: list[str] = field(default_factory=list)
    """Of each evaluation, as in `final_episodes`."""
    anneal_lr: bool | None = None
    choosing_states: str = ""
    choosing_episodes: str = ""
    iteration_steps: float = math.nan
    tasks: str = ""
    splits: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    evaluated: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: str = ""
    code: str = ""
    machine: str = ""
    url: str = ""
    folder: RunFolder | None = None
    """Where its videos are; None for a run that was not read from its folder."""

    @property
    def complete(self) -> bool:
        return self.status == "complete"

    @property
    def bounded(self) -> bool:
        """Whether its scores lie within 0..1."""
        return MEASURES[self.measure].extent is not None

    @property
    def evaluation(self) -> str:
        """The folder of the evaluation that stands for the run's own; empty where none does."""
        return self.environment.partition(AS_EVALUATED)[2].removesuffix("/")

    def places(self, axis: Axis) -> list[float]:
        """Where its evaluations lie: their env steps, their seconds, or 0 for the last, -1 for that before it, …"""
        if axis == "ends":
            return [float(i) for i in range(1 - len(self.eval_steps), 1)]
        return self.eval_steps if axis == "steps" else self.eval_seconds

    def mean_at(self, axis: Axis, place: float) -> float:
        """Mean score at a place on an axis, linear between evaluations."""
        return float(np.interp(place, self.places(axis), self.eval_scores))

    def episodes_at(self, axis: Axis, place: float) -> list[float] | None:
        """Score by initial state at a place on an axis, linear between evaluations; None where not known."""
        position = float(np.interp(place, self.places(axis), range(len(self.eval_scores))))
        before, share = int(position), position % 1
        around = [self.episodes[before], self.episodes[before + 1 if share else before]]
        if not all(around):
            return None
        low, high = (np.array(self.scores(text)) for text in around)
        return list(low + share * (high - low))

    @property
    def task_of_state(self) -> list[str]:
        """The task of every evaluation state, in their order; empty where there is one."""
        tasks = self.tasks.split()
        states = [state for first, last in spans_of(self.states) for state in range(first, last + 1)] if tasks else []
        return [tasks[state % len(tasks)] for state in states]

    def scores(self, episodes: str) -> list[float]:
        """Scores of single episodes, from the text of one evaluation; ValueError where they are no numbers."""
        return [float(score) for score in (episodes if self.measure == "success" else episodes.split())]


def check(run: Run) -> None:
    """Refuse a complete run from whose evaluations nothing can be computed.

    Raises:
        UserError: no evaluations, unequal numbers of them, values out of order or out of range, or episodes that are
            not one score for each initial state.
    """
    if not run.eval_scores:
        raise UserError("no evaluations in its metrics")
    if len({len(values) for values in (run.eval_steps, run.eval_seconds, run.eval_scores, run.episodes)}) > 1:
        raise UserError("its evaluations have unequal numbers of env steps, seconds, scores and episodes")
    for name, values in (("env steps", run.eval_steps), ("seconds", run.eval_seconds)):
        if not all(map(is_number, values)):
            raise UserError(f"an evaluation has no {name}")
        if any(b < a or (b == a and name == "env steps") for a, b in pairwise(values)):
            raise UserError(f"the {name} of its evaluations do not rise")
    if not (is_number(run.learning_rate) and run.learning_rate > 0):
        raise UserError(f"its learning rate is {run.learning_rate}")
    low, high = MEASURES[run.measure].extent or (-LARGEST_SCORE, LARGEST_SCORE)
    scores = [*run.eval_scores, *([] if math.isnan(run.training_score) else [run.training_score])]
    count = number_of_states(run.states)
    texts = [(text, count) for text in (*run.episodes, *run.splits.values()) if text]
    if run.choosing_episodes or run.choosing_states:
        texts.append((run.choosing_episodes, number_of_states(run.choosing_states)))
    for text, expected in texts:
        try:
            found = run.scores(text)
        except ValueError as error:
            raise UserError(f"its episodes are no scores: {error}") from None
        if len(found) != expected:
            raise UserError(f"{len(found)} scores of episodes for {expected} initial states")
        if run.measure == "success" and not {0.0, 1.0}.issuperset(found):
            raise UserError("the success of an episode is neither 0 nor 1")
        scores += found
    if wrong := [score for score in scores if not (is_number(score) and low <= score <= high)]:
        raise UserError(f"a {run.measure} of {wrong[0]} is not within {low:g} and {high:g}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def plain(name: str) -> str:
    """A name from a run for a note of the report: on one line, without the backquotes that mark code there."""
    return " ".join(name.replace("`", "'").split())


def quoted(name: str) -> str:
    """A name from a run as code in a note."""
    return f"`{plain(name)}`"


# ---- ids of initial states


def as_ranges(ids: Sequence[int]) -> str:
    """Sorted ids as text: "0-255", "0-9 20"."""
    starts = [i for i, n in enumerate(ids) if i == 0 or n != ids[i - 1] + 1]
    spans = [(ids[i], ids[j - 1]) for i, j in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def spans_of(states: str) -> list[tuple[int, int]]:
    """First and last id of every range that `as_ranges` wrote; UserError where it did not."""
    spans = []
    for word in states.split():
        if not (match := re.fullmatch(r"([0-9]{1,19})(?:-([0-9]{1,19}))?", word)):
            raise UserError(f"{states[:80]!r} are no ids of initial states, as in '0-255'")
        first = int(match[1])
        spans.append((first, int(match[2] or first)))
    return spans


def number_of_states(states: str) -> int:
    """How many ids a text of `as_ranges` holds."""
    return sum(last - first + 1 for first, last in spans_of(states))


# ---- the table

_COLUMNS = (
    "run", "status", "scope", "learning_rate", "seed", "environment", "env_config", "states", "measure",
    "training_score", "eval_steps", "eval_seconds", "eval_scores", "final_episodes", "splits", "settings",
)  # fmt: skip
_LATER = ("earlier_episodes", "anneal_lr", "choosing_states", "choosing_episodes")  # not in tables of earlier versions
# In a table of which some run has them.
_WHERE_KNOWN = ("iteration_steps", "tasks", "common", "started", "code", "machine", "url", "evaluated")
_LISTS = ("eval_steps", "eval_seconds", "eval_scores")
_OBJECTS = ("env_config", "splits", "settings", "common", "evaluated")
_SWITCH = {True: "true", False: "false", None: ""}


def as_text(scores: Mapping[int, float], measure: str) -> str:
    """Scores by initial state as the text that `Run.scores` reads, in the order of the states."""
    ordered = [scores[state] for state in sorted(scores)]
    return "".join(str(int(score)) for score in ordered) if measure == "success" else _numbers(ordered)


def _numbers(values: Iterable[float]) -> str:
    """Numbers separated by spaces, with all of their digits."""
    return " ".join(repr(float(x)).removesuffix(".0") for x in values)


def write_table(path: Path, runs: Sequence[Run]) -> None:
    """Write `runs.csv`: one row per run, all that `compare` needs."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        known = [name for name in _WHERE_KNOWN if any(_known(run, name) for run in runs)]
        writer.writerow((*_COLUMNS, *_LATER, *known))
        for run in runs:
            values = vars(run) | {"final_episodes": "".join(run.episodes[-1:]), "anneal_lr": _SWITCH[run.anneal_lr]}
            values |= {"earlier_episodes": ";".join(run.episodes[:-1])}
            values |= {"iteration_steps": "" if math.isnan(run.iteration_steps) else f"{run.iteration_steps:.0f}"}
            values |= {name: _numbers(values[name]) for name in _LISTS}
            values |= {name: json.dumps(values[name], sort_keys=name != "splits") for name in _OBJECTS}
            writer.writerow([values[name] for name in (*_COLUMNS, *_LATER, *known)])


def _known(run: Run, name: str) -> bool:
    value = getattr(run, name)
    return bool(value) and value == value  # neither empty nor NaN


def read_table(path: str | Path) -> list[Run]:
    """Read a `runs.csv`.

    Raises:
        UserError: no such file, missing columns, or a value that does not parse (with its line).
    """
    runs = []
    limit = csv.field_size_limit(2**31 - 1)  # the episodes of a run may be longer than the default of 131,072
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            if missing := [name for name in _COLUMNS if name not in columns]:
                raise UserError(f"{path} has no column {', '.join(missing)}: compare_runs.py writes such a table")
            for row in reader:
                try:
                    runs.append(_read_row(row))
                except (UserError, ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    finally:
        csv.field_size_limit(limit)
    if not runs:
        raise UserError(f"no runs found: {path} has no rows")
    return runs


def _read_row(row: Mapping[str | None, Any]) -> Run:
    """One row; UserError or ValueError where a value does not parse."""
    if None in row or None in row.values():
        raise UserError("it has more or fewer values than there are columns")
    values: dict[str, Any] = {name: row[name] for name in (*_COLUMNS, *_LATER, *_WHERE_KNOWN) if name in row}
    values |= {name: [float(word) for word in row[name].split()] for name in _LISTS}
    for name in _OBJECTS:
        values[name] = json.loads(row.get(name) or "{}") if name in _WHERE_KNOWN else json.loads(row[name])
        if not isinstance(values[name], dict):
            raise UserError(f"{name}: expected a JSON object, got {row[name][:80]}")
        json.dumps(values[name], ensure_ascii=False).encode()  # half of a character can be escaped, but not written
    if not all(isinstance(text, str) for text in values["splits"].values()):
        raise UserError("splits: expected the episodes of each as text")
    if not all(isinstance(facts, dict) for facts in values["evaluated"].values()):
        raise UserError("evaluated: expected a JSON object of each folder")
    values |= {name: float(row[name]) for name in ("learning_rate", "training_score")}
    values["seed"] = int(row["seed"])
    if row["measure"] not in MEASURES:
        raise UserError(f"measure is {row['measure']!r}, neither of {', '.join(MEASURES)}")
    earlier, final = values.pop("earlier_episodes", None), values.pop("final_episodes")
    before = len(values["eval_scores"]) - 1
    known = [] if before < 1 else [""] * before if earlier is None else earlier.split(";")
    values["episodes"] = [*known, final] if before >= 0 else []
    if (switch := values.get("anneal_lr", "")) not in _SWITCH.values():
        raise UserError(f"anneal_lr is {switch!r}, neither true nor false nor empty")
    values["anneal_lr"] = {text: value for value, text in _SWITCH.items()}[switch]
    values["iteration_steps"] = float(values.get("iteration_steps") or math.nan)
    run = Run(**values)
    if run.complete:
        check(run)
    return run
