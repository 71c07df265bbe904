"""Run a W&B sweep file on this machine, without a W&B server.

    python experiments/sweep_local.py sweeps/freeze.yaml
    python experiments/sweep_local.py sweeps/bayes.yaml --workers=2 --trials=40

Every trial is an ordinary run of the sweep's script in its own process, its folder under <trainer.run_dir>/<sweep>/.
Optuna keeps the trials, in sweep.db there. Ctrl-C lets the runs write checkpoints and stops; started again, after that
or after a kill, the sweep goes on where it was, each run from its own checkpoint. The same command in another terminal,
or on another machine that sees the same folder, adds workers. Values added to a grid are run at the next start.

A run that crashes stays in the table as failed and is not repeated; one that its script refused is, at the next start.
One whose simulator broke goes on from its checkpoint, a few times.
W&B is offline unless WANDB_MODE says otherwise. Workers share the GPUs that CUDA_VISIBLE_DEVICES names.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import packages  # noqa: F401

import optuna
from configuration import with_default_config
from optuna.trial import FrozenTrial, TrialState

from research.config import ExperimentConfig
from research.options import parse_config
from research.runs.folder import RunFolder
from research.runs.tracking import read_metrics
from research.schema import UserError
from research.study.sweep_file import Sweep, check_options, load_sweep
from research.study.trials import SweepTrials
from research.training.interruption import Interruption

POLL_S = 0.5
MOST_FAILURES = 3  # in a row: then more than one trial is wrong, and the sweep gives up
MOST_STARTS = 5  # of a run that something outside keeps ending


@dataclass
class Run:
    """A trial whose process runs. The process holds the lock too: where it is free, the run is over."""

    trial: optuna.Trial
    lock: TextIO
    reported: int  # values of the metric that Optuna knows
    process: subprocess.Popen | None = None
    stopped: str | None = None

    def stop(self, why: str) -> None:
        """Ask the run, once, to write a checkpoint after this iteration and to end; `why` is early or interrupted."""
        if self.stopped is None:
            self.stopped = why
            self.process.terminate()


class LocalSweep:
    """This process's share of a sweep: it starts runs, tells Optuna what they log, and notes how they end."""

    def __init__(self, sweep: Sweep, workers: int, most: int | None, storage: str | None):
        self.sweep, self.workers = sweep, workers
        if not Path(sweep.program).is_file():
            raise UserError(f"{sweep.path}: program: {sweep.program} does not exist (current directory: {Path.cwd()})")
        check_options(sweep, config_of)
        self.folder = Path(config_of(sweep.flags(sweep.corners()[0])).trainer.run_dir) / sweep.name
        self.trials = SweepTrials(sweep, self.folder, most, storage)
        self.runs: list[Run] = []
        self.failures, self.problem, self.exhausted = 0, "", False

    def run_id(self, number: int) -> str:
        """Id of a trial's run, in W&B and in the name of its folder."""
        return f"{self.trials.token}_{number:03d}"

    def log(self, number: int) -> Path:
        """What a trial's process prints; also the file that it keeps locked."""
        return self.folder / "logs" / f"{self.run_id(number)}.log"

    def is_alive(self, number: int) -> bool:
        """Whether a process, of this sweep or of an earlier start, runs the trial."""
        if not self.log(number).exists():
            return False
        with self.log(number).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def start(self) -> bool:
        """Start the next run; False where there is none."""
        with self.trials.locked():
            trial = self.trials.take(self.is_alive)
            if trial is None:
                return False
            log = self.log(trial.number)
            log.parent.mkdir(exist_ok=True)
            lock = log.open("a")
            fcntl.flock(lock, fcntl.LOCK_EX)
        point, run_id = trial.user_attrs["point"], self.run_id(trial.number)
        extra = [f"--trainer.run_dir={self.folder}", f"--trainer.wandb_tags+={f'sweep:{self.sweep.name}'[:64]}"]
        if self.sweep.project:
            extra.append(f"--trainer.wandb_project_name={self.sweep.project}")
        folder = self.run_folder(trial.number)
        if folder and folder.last_checkpoint:
            extra.append(f"--trainer.resume={folder}")
        elif folder:
            shutil.rmtree(folder.path)  # stopped before its first checkpoint: it begins anew
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        defaults = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": str(max(1, cores // self.workers))}
        environment = defaults | os.environ | {"WANDB_RUN_ID": run_id}
        environment.pop("WANDB_SWEEP_ID", None)
        trial.set_user_attr("starts", trial.user_attrs.get("starts", 0) + 1)
        run = Run(trial, lock, reported=len(self.trials.all()[trial.number].intermediate_values))
        if folder and folder.finished:  # while nobody watched
            self.conclude(run, 0)
            return True
        with log.open("a") as output:
            run.process = subprocess.Popen(
                self.sweep.words(point, extra), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=environment, pass_fds=[lock.fileno()], start_new_session=True,  # Ctrl-C is for this process
            )  # fmt: skip
        self.runs.append(run)
        self.say(trial.number)
        return True

    def follow(self, run: Run) -> None:
        """Tell Optuna what the run has logged since the last look, and stop the run if Optuna has seen enough."""
        over = run.process.poll() is not None
        values = self.metric_values(run.trial.number)
        for step in range(run.reported, len(values)):
            run.trial.report(values[step], step)
            if not over and run.trial.should_prune():
                run.stop("early")
        run.reported = max(run.reported, len(values))
        if over:
            self.runs.remove(run)
            self.conclude(run, run.process.returncode)

    def conclude(self, run: Run, code: int) -> None:
        """Note how a run ended."""
        trial, number = run.trial, run.trial.number
        values = self.metric_values(number)
        trial.set_user_attr("exit_code", code)
        if code == 0 and values:
            self.failures = 0
            self.trials.tell(trial, values[-1])
        elif run.stopped == "early":
            self.trials.tell(trial, state=TrialState.PRUNED)
        elif run.stopped or (self.from_outside(number, code) and trial.user_attrs["starts"] < MOST_STARTS):
            self.trials.put_back(number)
        else:
            lines = self.log(number).read_text(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
            note = f"it logged no {self.sweep.metric}" if code == 0 else f"exit code {code}: {last}"
            self.failures, self.problem = self.failures + 1, f"trial {number}: {note} ({self.log(number)})"
            trial.set_user_attr("note", note[:200])
            self.trials.tell(trial, state=TrialState.FAIL)
        self.exhausted = False
        run.lock.close()
        self.say(number)

    def from_outside(self, number: int, code: int) -> bool:
        """Whether something outside of the run ended it, so that it may come further another time."""
        folder = self.run_folder(number)
        return code < 0 or code > 128 or (code == 1 and folder is not None and folder.stopped_by == "simulator")

    def run(self) -> int:
        """Work until nothing is left or a signal comes; returns the exit code."""
        with Interruption() as interruption:
            try:
                while True:
                    for run in list(self.runs):
                        self.follow(run)
                    if interruption.code:
                        for run in self.runs:
                            run.stop("interrupted")
                    while not (interruption.code or self.exhausted or len(self.runs) >= self.workers):
                        self.exhausted = self.failures >= MOST_FAILURES or not self.start()
                    if not self.runs and (interruption.code or self.exhausted):
                        break
                    time.sleep(POLL_S)
            except KeyboardInterrupt:
                for run in self.runs:
                    run.process.kill()
        print(f"\n{self.table()}")
        if interruption.code:
            print("stopped; the same command goes on from here")
        if self.failures >= MOST_FAILURES:
            print(f"error: {self.failures} runs in a row failed; the last was {self.problem}", file=sys.stderr)
        print(f"compare with: python experiments/compare_runs.py {self.folder}")
        return interruption.code or int(self.failures >= MOST_FAILURES)

    def run_folder(self, number: int) -> RunFolder | None:
        """Where a trial's run lies; None where it has not begun."""
        return next(map(RunFolder, self.folder.glob(f"*-{self.run_id(number)}")), None)

    def metric_values(self, number: int) -> list[float]:
        """What the run has logged of the sweep's metric, oldest first."""
        folder = self.run_folder(number)
        rows = read_metrics(folder) if folder and folder.metrics.exists() else []
        return [row[self.sweep.metric] for row in rows if math.isfinite(row.get(self.sweep.metric, math.nan))]

    def row(self, trial: FrozenTrial) -> list[str]:
        """A trial's line of the table: number, state, swept values, last value of the metric, note."""
        states = {"WAITING": "interrupted", "COMPLETE": "done", "PRUNED": "stopped early", "FAIL": "failed"}
        values = [*trial.intermediate_values.values(), *(trial.values or [])][-1:]
        point = trial.user_attrs.get("point", {})
        cells = [states.get(trial.state.name, "running"), *(point.get(name, "") for name in self.sweep.varied), *values]
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells] + [""] * (not values)
        return [str(trial.number), *cells, trial.user_attrs.get("note", "")]

    def say(self, number: int) -> None:
        """Print one line about a trial whose state has changed."""
        trials = self.trials.all()
        over = sum(trial.state.is_finished() for trial in trials)
        print(f"[{over}/{self.trials.most}] trial " + "  ".join(filter(None, self.row(trials[number]))), flush=True)

    def table(self) -> str:
        """All trials, one line each, under a header."""
        names = [name.rpartition(".")[2] for name in self.sweep.varied]
        rows = [["trial", "state", *names, self.sweep.metric, ""], *map(self.row, self.trials.all())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        counts = Counter(row[1] for row in rows[1:])
        return "\n".join(
            [*lines, ", ".join(f"{n} {state}" for state, n in counts.items()) + f", of {self.trials.most}"]
        )


def config_of(flags: list[str]) -> ExperimentConfig:
    return parse_config(ExperimentConfig, with_default_config(flags))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="W&B sweep file (YAML)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; each gets its share of the cores")
    parser.add_argument("--trials", type=int, help="most runs of the sweep; also ends a random or Bayesian one")
    parser.add_argument("--storage", help="database that keeps the trials, default sqlite:///<sweep's folder>/sweep.db")
    options = parser.parse_args(argv)
    if options.workers < 1 or (options.trials is not None and options.trials < 1):
        parser.error("--workers and --trials must be at least 1")
    try:
        return LocalSweep(load_sweep(options.sweep), options.workers, options.trials, options.storage).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
