"""Run a W&B sweep file on this machine, or on several, without a W&B server.

    python experiments/sweep_local.py sweeps/freeze.yaml
    python experiments/sweep_local.py sweeps/bayes.yaml --workers=2 --trials=40
    python experiments/sweep_local.py sweeps/freeze.yaml --storage=postgresql://user@host/database
    python experiments/sweep_local.py sweeps/freeze.yaml --status        # from another terminal: how far it is

Every trial is an ordinary run of the sweep's script in its own process, its folder under <trainer.run_dir>/<sweep>/.
Optuna keeps the trials, in sweep.db there; its dashboard shows them (`pip install optuna-dashboard`, then
`optuna-dashboard sqlite:///<that file>`). Ctrl-C lets the runs write checkpoints and stops; started again, after that
or after a kill, the sweep goes on where it was, each run from its own checkpoint. The same command in another terminal
adds workers. After a grid's file was edited, the next start runs the points that have no trial yet.

With --storage on PostgreSQL the same command on other machines adds workers (docs/scaling.md). A run whose machine died
goes on from its checkpoint on one that sees its folder, and begins anew on one that does not.

A run that crashes stays in the table as failed and is not repeated; one that its script refused is, at the next start.
While the sweep has trials that failed, the exit code is 1.
One whose simulator broke goes on from its checkpoint, a few times.
W&B is offline unless WANDB_MODE says otherwise. Workers share the GPUs that CUDA_VISIBLE_DEVICES names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import packages  # noqa: F401

import optuna
from configuration import SCRIPTS, default_of
from optuna.trial import TrialState

from research.commands import as_called, called
from research.config import ExperimentConfig
from research.errors import UserError
from research.options import parse_config
from research.progress_bar import ProgressBar
from research.runs.tracking import metric_names
from research.study.sweep_file import Sweep, check_form, check_metric, check_options, load_sweep
from research.study.sweep_locks import STOP_S, Lock
from research.study.sweep_progress import HOST, STARTED_AT, VALUE_OF, SweepProgress
from research.study.trials import STORAGE_LOST, SweepTrials, first_line
from research.training.interruption import Interruption

POLL_S = 0.5
SHOW_S = 2.0  # between two looks at how far the runs are
MOST_FAILURES = 3  # in a row: then more than one trial is wrong, and the sweep gives up
MOST_STARTS = 5  # of a run that something outside keeps ending


@dataclass
class Run:
    """A trial whose process runs. The process holds the lock too: where it is free, the run is over."""

    trial: optuna.Trial
    lock: Lock
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

    def __init__(self, sweep: Sweep, workers: int, most: int | None, storage: str | None, begin: bool = True):
        self.sweep = sweep = replace(sweep, program=found(sweep.program))
        self.workers = workers
        if not Path(sweep.program).is_file():
            raise UserError(f"{sweep.path}: program: {sweep.program} does not exist (current directory: {Path.cwd()})")
        read = partial(config_of, program=sweep.program)
        ours = Path(sweep.program).resolve().parent == Path(__file__).resolve().parent
        if ours and Path(sweep.program).name not in SCRIPTS.values():
            raise UserError(
                f"{sweep.path}: program: {sweep.program} has other options than those of "
                f"{' and '.join(SCRIPTS.values())}; they are run here, and scripts of yours that take the same; "
                "`wandb agent` runs any"
            )
        check_options(sweep, read)
        if ours:  # others read and log what they like
            check_form(sweep)
            check_metric(sweep, metric_names())
        self.folder = Path(read(sweep.flags(sweep.corners()[0])).trainer.run_dir) / sweep.name
        self.trials = SweepTrials(sweep, self.folder, most, storage, begin)
        self.progress = SweepProgress(self.trials, lambda p: read(sweep.flags(p)).trainer.env_steps_planned)
        self.runs: list[Run] = []
        self.failures, self.problem, self.exhausted = 0, "", False

    def start(self) -> bool:
        """Start the next run; False where there is none."""
        with self.trials.locked():
            trial = self.trials.take()
            if trial is None:
                return False
            lock = self.trials.hold(trial.number)
        point, run_id = trial.user_attrs["point"], self.trials.run_id(trial.number)
        extra = [f"--trainer.run_dir={self.folder}", f"--trainer.wandb_tags+={f'sweep:{self.sweep.name}'[:64]}"]
        if self.sweep.project:
            extra.append(f"--trainer.wandb_project_name={self.sweep.project}")
        folder = self.progress.run_folder(trial.number)
        if folder and folder.last_checkpoint:
            extra.append(f"--trainer.resume={folder}")
        elif folder:
            shutil.rmtree(folder.path)  # stopped before its first checkpoint: it begins anew
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        defaults = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": str(max(1, cores // self.workers))}
        environment = defaults | os.environ | {"WANDB_RUN_ID": run_id}
        environment.pop("WANDB_SWEEP_ID", None)
        trial.set_user_attr("starts", trial.user_attrs.get("starts", 0) + 1)
        trial.set_user_attr("host", HOST)
        trial.set_user_attr(STARTED_AT, self.progress.steps(trial.number))
        run = Run(trial, lock, reported=len(self.trials.all()[trial.number].intermediate_values))
        if folder and folder.finished:  # while nobody watched
            self.conclude(run, 0)
            return True
        with self.trials.log(trial.number).open("a") as output:
            run.process = subprocess.Popen(
                self.sweep.words(point, extra), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=environment, pass_fds=lock.descriptors, start_new_session=True,  # Ctrl-C is for this process
            )  # fmt: skip
        self.runs.append(run)
        self.say(trial.number)
        return True

    def follow(self, run: Run) -> None:
        """Tell Optuna what the run has logged since the last look, and stop the run if Optuna has seen enough."""
        over = run.process.poll() is not None
        values = self.progress.metric_values(run.trial.number)
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
        values = self.progress.metric_values(number)
        trial.set_user_attr("exit_code", code)
        if code == 0 and (values or not self.sweep.metric or not self.sweep.decides):
            self.failures = 0
            trial.set_user_attr(VALUE_OF, self.sweep.metric if values else None)
            self.trials.tell(trial, values[-1] if values else None)
        elif run.stopped == "early":
            self.trials.tell(trial, state=TrialState.PRUNED)
        elif run.stopped or (self.from_outside(number, code) and trial.user_attrs["starts"] < MOST_STARTS):
            self.trials.put_back(number)
        else:
            lines = self.trials.log(number).read_text(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
            note = f"it logged no {self.sweep.metric}" if code == 0 else f"exit code {code}: {last}"
            self.failures, self.problem = self.failures + 1, f"trial {number}: {note} ({self.trials.log(number)})"
            trial.set_user_attr("note", note[:200])
            self.trials.tell(trial, state=TrialState.FAIL)
        self.exhausted = False
        run.lock.close()
        self.say(number)

    def from_outside(self, number: int, code: int) -> bool:
        """Whether something outside of the run ended it, so that it may come further another time."""
        folder = self.progress.run_folder(number)
        return code < 0 or code > 128 or (code == 1 and folder is not None and folder.stopped_by == "simulator")

    def run(self) -> int:
        """Work until nothing is left or a signal comes; returns the exit code."""
        with Interruption() as interruption:
            try:
                self.work(interruption)
                print(f"\n{self.progress.table()}")
                failed = len(self.trials.failed())
            except STORAGE_LOST as error:
                self.stop_all()
                print(f"error: the database that keeps the trials is gone: {first_line(error)}", file=sys.stderr)
                print("its runs were stopped; the same command goes on from here")
                return 1
        if interruption.code:
            print("stopped; the same command goes on from here")
        if self.failures >= MOST_FAILURES:
            print(f"error: {self.failures} runs in a row failed; the last was {self.problem}", file=sys.stderr)
        elif failed:
            print(f"error: {failed} of its trials failed; what they printed is in {self.folder}/logs", file=sys.stderr)
        if any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in self.trials.all()):
            print(self.progress.next_step())
        return interruption.code or int(failed > 0)

    def work(self, interruption: Interruption) -> None:
        """Start runs and follow them until they are over and no more are to be started."""
        begun = round(self.progress.done(), 2)
        bar = ProgressBar(total=self.trials.most, initial=begun, desc=self.sweep.name, unit="trials", smoothing=0)
        shown_at = 0.0
        try:
            while True:
                self.trials.check()
                for run in list(self.runs):
                    self.follow(run)
                if interruption.code:
                    for run in self.runs:
                        run.stop("interrupted")
                while not (interruption.code or self.exhausted or len(self.runs) >= self.workers):
                    self.exhausted = self.failures >= MOST_FAILURES or not self.start()
                if not self.runs and (interruption.code or self.exhausted):
                    break
                if time.monotonic() >= shown_at + SHOW_S:
                    self.show(bar)
                    shown_at = time.monotonic()
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            for run in self.runs:
                run.process.kill()
        finally:
            bar.close()

    def stop_all(self) -> None:
        """End all runs before another machine may take them: each is asked to, and killed after `STOP_S` seconds."""
        deadline = time.monotonic() + STOP_S
        for run in self.runs:
            run.stop("interrupted")
        for run in self.runs:
            try:
                run.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.process.wait()

    def say(self, number: int) -> None:
        """Print one line about a trial whose state has changed."""
        ProgressBar.write(self.progress.line(number), file=sys.stdout)
        sys.stdout.flush()

    def show(self, bar: ProgressBar) -> None:
        """Show how far the sweep is, its other processes' runs included, and how far each run of this one."""
        trials = self.trials.all()
        parts = [(run.trial.number, self.progress.fraction(trials[run.trial.number])) for run in self.runs]
        bar.n = round(self.progress.done(), 2)
        bar.set_postfix_str(", ".join(f"trial {number}: {part:.0%}" for number, part in parts))


def found(program: str) -> str:
    """A sweep's script as it is named, or this project's own where sweeps are run away from a checkout."""
    own = Path(__file__).with_name(Path(program).name)
    named_so = Path(program) in (Path("experiments", own.name), Path(own.name))
    return str(own) if named_so and own.is_file() and not Path(program).is_file() else program


def config_of(flags: list[str], program: str = "ppo_vla.py") -> ExperimentConfig:
    """The configuration of a run, as its script reads it."""
    return parse_config(ExperimentConfig, flags, start=default_of(program))


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=called(), description=as_called(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", help="W&B sweep file (YAML)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; each gets its share of the cores")
    parser.add_argument("--trials", type=int, help="most runs of the sweep; also ends a random or Bayesian one")
    storage = "database of the trials, default sqlite:///<sweep's folder>/sweep.db; for several machines PostgreSQL"
    parser.add_argument("--storage", help=storage)
    parser.add_argument("--status", action="store_true", help="say how far the sweep is, and change nothing")
    options = parser.parse_args(argv)
    if options.workers < 1 or (options.trials is not None and options.trials < 1):
        parser.error("--workers and --trials must be at least 1")
    return options


def main(argv: list[str] | None = None) -> int:
    options = read_options(argv)
    try:
        sweep = load_sweep(options.sweep)
        work = LocalSweep(sweep, options.workers, options.trials, options.storage, begin=not options.status)
        if not options.status:
            return work.run()
        print(work.progress.status())
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
