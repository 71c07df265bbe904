"""The trials of a local sweep: what has been run, what comes next, and what several processes agree on about both."""

from __future__ import annotations

import json
import secrets
from contextlib import AbstractContextManager
from pathlib import Path

import optuna
from optuna.pruners import NopPruner, SuccessiveHalvingPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from research.errors import UserError
from research.study.sweep_file import Sweep
from research.study.sweep_locks import CONNECTION, DRIVERS, DatabaseLocks, FolderLocks, Lock

STORAGE_LOST = (optuna.exceptions.StorageInternalError, SQLAlchemyError)  # what any call raises once it is gone


class SweepTrials:
    """The trials of a sweep, kept by Optuna in a database that several processes may share.

    A trial's point is in its user attribute `point`; `exit_code` there is how its last process ended.

    Args:
        sweep: what to vary and how.
        folder: the sweep's folder on this machine, made if need be.
        most: upper limit on the trials, besides the grid's size and the sweep's `run_cap`; None for no other.
        storage: URL of a database, default SQLite in the folder. PostgreSQL keeps the processes of many machines
            apart, and others those of one, by files in the folder.
        begin: False only looks at what is there, with the limit that the sweep was started with.
    Attributes:
        most: how many trials the sweep has in the end.
        token: short random name of this sweep, for ids.
    Raises:
        UserError: a sweep without an end, a folder or database that cannot be opened, or one with another sweep in it;
            where it does not `begin`, one that has not begun.
    """

    def __init__(
        self, sweep: Sweep, folder: Path, most: int | None = None, storage: str | None = None, begin: bool = True
    ):
        self.sweep, self.folder = sweep, folder
        self.points = json.loads(json.dumps(sweep.grid())) if sweep.method == "grid" else None  # as read back
        limits = [n for n in (most, sweep.run_cap, self.points and len(self.points)) if n]
        if not limits and begin:
            raise UserError(f"{sweep.path}: a {sweep.method} sweep has no end; give it a run_cap, or --trials=N")
        if not begin and not storage and not (folder / "sweep.db").is_file():
            raise _not_begun(sweep, folder)
        self.most = min(limits, default=0)
        self.token = ""
        self._failed: list[int] = []
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the sweep's folder {folder}: {error.strerror}") from None
        url = _read_url(storage or f"sqlite:///{folder / 'sweep.db'}")
        shown = url.render_as_string(hide_password=True)
        try:
            self._locks = self._make_locks(url)
            with self.locked():
                self._study = self._open(url, begin)
        except ModuleNotFoundError as error:
            extra = ": pip install -e .[postgres]" if error.name == "psycopg" else ""
            raise UserError(f"the storage {shown} needs the package {error.name}{extra}") from None
        except (*STORAGE_LOST, ImportError, ValueError) as error:
            raise UserError(f"the storage {shown} cannot be opened: {first_line(error)}") from None
        self.token = self._study.user_attrs["token"]
        if begin:
            self._study.set_user_attr("most", self.most)
        else:
            self.most = most or self._study.user_attrs.get("most") or max(self.most, len(self.all()))

    def _make_locks(self, url: URL) -> FolderLocks | DatabaseLocks:
        files = FolderLocks(self.folder, self.log)
        if url.get_backend_name() != "postgresql":
            return files
        if url.get_driver_name() not in DRIVERS:
            shown, known = url.render_as_string(), " or ".join(f"postgresql+{driver}" for driver in DRIVERS)
            raise UserError(f"the storage {shown}: its driver cannot hold a sweep's locks; write {known}")
        return DatabaseLocks(url, self.sweep.name, files)

    def _open(self, url: URL, begin: bool) -> optuna.Study:
        sweep, pruner = self.sweep, NopPruner()
        if sweep.min_iter:  # W&B's "hyperband" is one bracket of it, which is asynchronous successive halving
            pruner = SuccessiveHalvingPruner(min_resource=sweep.min_iter, reduction_factor=sweep.eta)
        # Not Optuna's Gaussian process, which learns nothing from trials that were stopped early.
        sampler = TPESampler() if sweep.method == "bayes" else RandomSampler()
        options = {
            "sqlite": {"connect_args": {"timeout": 60}},
            "postgresql": {"connect_args": CONNECTION, "pool_pre_ping": True},
        }.get(url.get_backend_name(), {})
        self._storage = RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=options)
        if not begin and sweep.name not in optuna.get_all_study_names(self._storage):
            raise _not_begun(sweep, self.folder)
        study = optuna.create_study(
            storage=self._storage, study_name=sweep.name, load_if_exists=True, sampler=sampler, pruner=pruner,
            direction="maximize" if sweep.maximize else "minimize",
        )  # fmt: skip
        # A grid may change between two starts, but not a space that Optuna has sampled from.
        kind = [sweep.method, sweep.metric, sweep.maximize, self.points is None and str(sweep.parameters)]
        names = ("method", "metric", "goal", "parameters")
        if "token" not in study.user_attrs:
            study.set_user_attr("kind", kind)
            study.set_user_attr("token", secrets.token_hex(3))
        others = [name for name, was, now in zip(names, study.user_attrs["kind"], kind, strict=True) if was != now]
        if not sweep.decides:  # nothing came of a metric that was only shown
            others = [name for name in others if name not in ("metric", "goal")]
        if others:
            raise UserError(
                f"{self.folder} has trials of another sweep, of another {' and '.join(others)}; give {sweep.path} "
                "another name"
            )
        return study

    def locked(self) -> AbstractContextManager[None]:
        """Keep the other processes of this sweep out."""
        return self._locks.exclusive()

    def run_id(self, number: int) -> str:
        """Id of a trial's run, in W&B and in the name of its folder."""
        return f"{self.token}_{number:03d}"

    def log(self, number: int) -> Path:
        """What a trial's process prints; also the file that it keeps locked."""
        return self.folder / "logs" / f"{self.run_id(number)}.log"

    def hold(self, number: int) -> Lock:
        """Note that this process, and any that it starts with the lock's descriptors, runs a trial."""
        return self._locks.hold(number)

    def is_alive(self, number: int) -> bool:
        """Whether a process, of this sweep or of an earlier start, runs the trial."""
        return self._locks.is_held(number)

    def check(self) -> None:
        """Make sure, now and then, that what this process holds is not lost.

        Raises:
            STORAGE_LOST: it is, so that another machine may run those trials.
        """
        self._locks.check()

    def all(self) -> list[FrozenTrial]:
        """Every trial so far, in order of number."""
        return self._study.get_trials(deepcopy=False)

    def counts(self, trial: FrozenTrial) -> bool:
        """Whether a trial is one of the sweep's file as it is now: a grid's file may have been edited since."""
        point = trial.user_attrs.get("point")
        return self.points is None or point is None or point in self.points

    def take(self) -> optuna.Trial | None:
        """A trial to run: one that was interrupted, or a new one; None where the sweep has no more.

        Call it while the sweep is `locked`, and keep it locked until the trial is held: one that nobody holds was
        interrupted.
        """
        running = [trial.number for trial in self.all() if trial.state == TrialState.RUNNING]
        nobodys = [number for number in running if not self.is_alive(number)]
        # Another process notes a result before it lets go of the trial: only now is it known that nobody will.
        for trial in self.all():
            if trial.number in nobodys and trial.state == TrialState.RUNNING:
                self.put_back(trial.number)
        trials = self.all()
        # What the script refused has not begun, and is tried again, but not by this process.
        begun = [
            t for t in trials if self.counts(t) and (t.user_attrs.get("exit_code") != 2 or t.number in self._failed)
        ]
        if not any(t.state == TrialState.WAITING for t in trials):
            if len(begun) >= self.most or self._target_reached(trials):
                return None
            if self.points is not None:
                known = [t.user_attrs["point"] for t in begun]
                left = [point for point in self.points if point not in known]
                if not left:
                    return None
                self._study.enqueue_trial({}, user_attrs={"point": left[0]})
        if self.points is not None:
            return self._study.ask()
        drawn = {p.name: p for p in self.sweep.parameters if len(p.choices) != 1}
        trial = self._study.ask({name: p.distribution() for name, p in drawn.items()})
        fixed = {p.name: p.choices[0] for p in self.sweep.parameters if p.name not in drawn}
        trial.set_user_attr("point", fixed | {name: p.value(trial.params[name]) for name, p in drawn.items()})
        return trial

    def failed(self) -> list[FrozenTrial]:
        """Trials that failed, without those of a point that was tried again and is over, or that left the file."""
        trials = [trial for trial in self.all() if self.counts(trial)]
        over = [t.user_attrs.get("point") for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        return [t for t in trials if t.state == TrialState.FAIL and t.user_attrs.get("point") not in over]

    def put_back(self, number: int) -> None:
        """Leave a trial, with its point and reported values, to whoever takes one next."""
        study_id = self._storage.get_study_id_from_name(self._study.study_name)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
        self._storage.set_trial_state_values(trial_id, TrialState.WAITING)

    def tell(self, trial: optuna.Trial, value: float | None = None, state: TrialState | None = None) -> None:
        """Note a trial's result, none where the sweep has no metric, or that it was stopped early or failed."""
        if state == TrialState.FAIL:
            self._failed.append(trial.number)
        if value is None and state is None:
            value = 0.0  # Optuna completes no trial without one; a sweep without a metric asks for none
        self._study.tell(trial, value, state)

    def _target_reached(self, trials: list[FrozenTrial]) -> bool:
        sign = 1 if self.sweep.maximize else -1
        values = [t.value for t in trials if t.state == TrialState.COMPLETE]
        return self.sweep.target is not None and any(sign * value >= sign * self.sweep.target for value in values)


def first_line(error: BaseException) -> str:
    """What went wrong in a database, in one line: Optuna's own words for it hide the cause."""
    return str(error.__cause__ or error).splitlines()[0]


def _not_begun(sweep: Sweep, folder: Path) -> UserError:
    return UserError(f"{sweep.path}: --status: the sweep has no trials in {folder}; start it first, without --status")


def _read_url(text: str) -> URL:
    try:
        url = make_url(text)
    except ArgumentError:  # not shown: it may hold a password
        raise UserError("--storage is no database URL; write it as postgresql://user@host/database") from None
    return url
