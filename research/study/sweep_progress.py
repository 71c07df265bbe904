"""How far a local sweep is: its trials in a table, the steps inside those that run, the time that is left."""

from __future__ import annotations

import math
import socket
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from research.commands import as_called
from research.errors import UserError
from research.runs.folder import RunFolder
from research.runs.tracking import read_metrics
from research.study.run_settings import BECOMES, NOT_KEPT, RATE, SCOPE
from research.study.trials import SweepTrials

HOST = socket.gethostname()
STATES = {"WAITING": "interrupted", "COMPLETE": "done", "PRUNED": "stopped early", "FAIL": "failed"}
STARTED_AT = "started_at"  # user attribute of a trial: env steps that it had when its last process began
LEFT_THE_FILE = "not in the file any more"
VALUE_OF = "value_of"  # also: the metric that its value is of; None where it ended without one


class SweepProgress:
    """Reads what the trials of a sweep and their run folders say; changes nothing.

    Args:
        trials: of the sweep.
        budget: a trial's env steps from its point, `{option: value}`; a `UserError` of it means that they are unknown.
    """

    def __init__(self, trials: SweepTrials, budget: Callable[[dict[str, Any]], int]):
        self.trials, self.sweep, self.folder = trials, trials.sweep, trials.folder
        self._budget, self._budgets = budget, {}

    def run_folder(self, number: int) -> RunFolder | None:
        """Where a trial's run lies on this machine; None where it has not begun."""
        return next(map(RunFolder, self.folder.glob(f"*-{self.trials.run_id(number)}")), None)

    def metric_values(self, number: int) -> list[float]:
        """What a trial's run has logged of the sweep's metric, oldest first."""
        values = [row.get(self.sweep.metric, math.nan) for row in self._rows(number)] if self.sweep.metric else []
        return [value for value in values if math.isfinite(value)]

    def steps(self, number: int) -> int:
        """Env steps that a trial's run has logged."""
        return int(max((row["global_step"] for row in self._rows(number) if "global_step" in row), default=0))

    def fraction(self, trial: FrozenTrial) -> float:
        """How much of a trial is over, from 0 to 1; of its env steps, where it runs or was interrupted."""
        if trial.state.is_finished():
            return 1.0
        planned = self._planned(trial)
        return min(1.0, self.steps(trial.number) / planned) if planned else 0.0

    def done(self) -> float:
        """Trials that are over, and of the others the parts that are."""
        return sum(map(self.fraction, self._counted()))

    def running(self) -> list[FrozenTrial]:
        """Trials that a process of this machine, or of another, runs."""
        return [t for t in self.trials.all() if t.state == TrialState.RUNNING and self.trials.is_alive(t.number)]

    def seconds_left(self) -> float | None:
        """Time until the sweep's end with as many trials at a time as now; None where nothing says so.

        Of a trial, by the mean time of those that were run in one piece; else by the pace of those that run.
        """
        trials, running = self._counted(), self.running()
        whole = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and not _start(t)]
        lengths = [t.duration.total_seconds() for t in whole] or list(filter(None, map(self._length, running)))
        if not running or not lengths:
            return None
        length, parts = sum(lengths) / len(lengths), [1 - self.fraction(t) for t in running]
        waiting = sum(1 - self.fraction(t) for t in trials if not t.state.is_finished()) - sum(parts)
        waiting += max(0, self.trials.most - len(trials))
        return length * max(*parts, (waiting + sum(parts)) / len(running)) if parts else None

    def row(self, trial: FrozenTrial) -> list[str]:
        """A trial's line of the table: number, state, swept values, last value of the metric, notes."""
        value = self.value(trial)
        point = trial.user_attrs.get("point", {})
        cells = [
            self._state(trial),
            *(point.get(name, "") for name in self.sweep.varied),
            "" if value is None else value,
        ]
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        elsewhere = f"on {host}" if (host := trial.user_attrs.get("host", HOST)) != HOST else ""
        over = trial.state == TrialState.COMPLETE and self.sweep.metric
        absent = f"it logged no {self.sweep.metric}" if over and value is None else ""
        left = "" if self.trials.counts(trial) else LEFT_THE_FILE
        notes = [self._inside(trial), elsewhere, trial.user_attrs.get("note", ""), absent, left]
        return [str(trial.number), *cells, "  ".join(filter(None, notes))]

    def value(self, trial: FrozenTrial) -> float | None:
        """The last value of the metric; None where there is none.

        Where nothing is decided by it, it is the one that the sweep's file names now.
        """
        if not self.sweep.metric:
            return None
        known = [*trial.intermediate_values.values(), *(trial.values or [])]
        if trial.user_attrs.get(VALUE_OF, self.sweep.metric) != self.sweep.metric:
            known = []
        if not self.sweep.decides:  # its run may lie on another machine
            known += self.metric_values(trial.number)
        return known[-1] if known else None

    def line(self, number: int) -> str:
        """One line about a trial, and how many are over."""
        over = sum(trial.state.is_finished() for trial in self._counted())
        return f"[{over}/{self.trials.most}] trial " + "  ".join(filter(None, self.row(self.trials.all()[number])))

    def table(self) -> str:
        """All trials, one line each, under a header, and how many of the file's are in which state."""
        names = [name.rpartition(".")[2] for name in self.sweep.varied]
        rows = [["trial", "state", *names, self.sweep.metric or "", ""], *map(self.row, self.trials.all())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        counts = Counter(map(self._state, self._counted()))
        summary = ", ".join([*(f"{n} {state}" for state, n in counts.items()), f"of {self.trials.most}"])
        return "\n".join([*lines, summary])

    def status(self) -> str:
        """The table, the best trial so far, and the time that is left."""
        left, running = self.seconds_left(), self.running()
        waits = max(0, self.trials.most - len(self._counted()))
        lines = [self.table() + f", {waits} waiting" * (waits > 0)]
        if best := self._best():
            lines.append(f"best so far: {best}")
        if not running:
            lines.append("nothing runs")
        else:
            at_once = f"with {len(running)} at a time, as now"
            lines.append("time left: " + (f"about {clock(left)} {at_once}" if left is not None else "not known yet"))
        return "\n".join(lines)

    def next_step(self) -> str:
        """What to do with runs that ended: a grid's are compared by what it varies, others try each point once."""
        if self.sweep.method != "grid":
            return "the best trials are proposals of one seed each: run them on several seeds to compare them"
        chosen = (RATE, *(name for name, other in BECOMES.items() if other == RATE))
        no_arms = ("config", *NOT_KEPT)  # the scope, seed and rate among them
        others = [name for name in self.sweep.varied if name not in no_arms and not name.startswith(chosen)]
        by = f" --by {' '.join([*([SCOPE] if SCOPE in self.sweep.varied else []), *others])}" if others else ""
        return as_called(f"compare with: python experiments/compare_runs.py {self.folder}{by}")

    def _counted(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials.all() if self.trials.counts(trial)]

    def _state(self, trial: FrozenTrial) -> str:
        if trial.state == TrialState.RUNNING:  # after a kill, until a worker takes it again
            return "running" if self.trials.is_alive(trial.number) else "not running now"
        return STATES[trial.state.name]

    def _best(self) -> str | None:
        done = [(self.value(t), t) for t in self._counted() if t.state == TrialState.COMPLETE]
        done = [(value, t) for value, t in done if value is not None]
        if not done:
            return None
        value, best = (max if self.sweep.maximize else min)(done, key=lambda one: one[0])
        point = " ".join(f"{name}={best.user_attrs['point'][name]}" for name in self.sweep.varied)
        where = self.run_folder(best.number)
        return f"{value:.4g}, trial {best.number}" + f" ({point})" * bool(point) + f" in {where}" * bool(where)

    def _inside(self, trial: FrozenTrial) -> str:
        if trial.state.is_finished() or not (planned := self._planned(trial)):
            return ""
        steps = self.steps(trial.number)
        return f"{100 * min(1.0, steps / planned):.0f} %, {steps:,} of {planned:,} env steps" if steps else ""

    def _length(self, trial: FrozenTrial) -> float | None:
        """Seconds that the whole of a running trial takes, at the pace of its process."""
        planned, begun = self._planned(trial), _start(trial)
        new = self.steps(trial.number) - begun
        if not planned or new <= 0 or trial.datetime_start is None:
            return None
        return (datetime.now() - trial.datetime_start).total_seconds() * planned / new

    def _planned(self, trial: FrozenTrial) -> int | None:
        point = trial.user_attrs.get("point")
        if point is None:  # another process is about to write it
            return None
        key = repr(point)
        if key not in self._budgets:
            try:
                self._budgets[key] = self._budget(point)
            except UserError:  # the sweep's file was changed since
                self._budgets[key] = None
        return self._budgets[key]

    def _rows(self, number: int) -> list[dict[str, float]]:
        folder = self.run_folder(number)
        return read_metrics(folder) if folder and folder.metrics.exists() else []


def _start(trial: FrozenTrial) -> int:
    return trial.user_attrs.get(STARTED_AT, 0)


def clock(seconds: float) -> str:
    """A time for people: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
