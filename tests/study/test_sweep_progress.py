"""How far a sweep is: steps inside its runs, the time left by hand, and the trial that is best."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from optuna.trial import TrialState
from study_worlds import write_sweep

from research.errors import UserError
from research.study.sweep_file import load_sweep
from research.study.sweep_progress import STARTED_AT, SweepProgress, clock
from research.study.trials import SweepTrials

BUDGET = 1000


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def logged(trials: SweepTrials, number: int, *rows: dict) -> Path:
    """The folder of a trial's run, with what it has logged."""
    folder = Path("runs/s", f"x-{trials.run_id(number)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def begun(trials: SweepTrials, count: int) -> tuple[list, list]:
    """The next trials, held by this process, and their locks."""
    taken, locks = [], []
    with trials.locked():
        for _ in range(count):
            taken.append(trials.take())
            locks.append(trials.hold(taken[-1].number))
    return taken, locks


def as_at(trials: SweepTrials, attribute: str, times: dict[int, datetime]) -> None:
    """Let the database say other times of its trials."""
    seen = trials.all()
    for number, value in times.items():
        setattr(seen[number], attribute, value)
    trials.all = lambda: seen


@pytest.fixture
def sweep_under_way():
    """Four trials: one took 100 s and reached 0.5, one 60 s and 0.25; one runs, is a quarter through; one waits."""
    trials = SweepTrials(load_sweep(write_sweep()), Path("runs/s"))
    (first, second, _), locks = begun(trials, 3)
    trials.tell(first, 0.5)
    trials.tell(second, 0.25)
    logged(trials, 0, {"global_step": BUDGET})
    logged(trials, 2, {"global_step": 0, "eval/success_rate": 0.1}, {"global_step": 250}, {"train/kl": 1})
    starts = [trial.datetime_start for trial in trials.all()]
    as_at(trials, "datetime_complete", {n: starts[n] + timedelta(seconds=took) for n, took in ((0, 100), (1, 60))})
    return trials, SweepProgress(trials, lambda point: BUDGET), locks[2]


def test_the_steps_of_a_run_are_parts_of_its_trial(sweep_under_way):
    trials, progress, _ = sweep_under_way
    assert [progress.fraction(trial) for trial in trials.all()] == [1.0, 1.0, 0.25]
    assert progress.done() == 2.25
    assert progress.metric_values(2) == [0.1] and progress.metric_values(3) == []
    assert progress.row(trials.all()[2])[-1] == "25 %, 250 of 1,000 env steps"
    logged(trials, 2, {"global_step": 1100})  # a run goes on to the end of an iteration
    assert progress.fraction(trials.all()[2]) == 1.0


def test_the_time_left_is_that_of_the_trials_before(sweep_under_way):
    trials, progress, _ = sweep_under_way
    # 80 s a trial; three quarters of one, then a whole one, one at a time
    assert progress.seconds_left() == pytest.approx(80 * 1.75)
    trials.most = 3
    assert progress.seconds_left() == pytest.approx(80 * 0.75)


def test_before_a_trial_has_ended_the_running_ones_tell_the_time():
    trials = SweepTrials(load_sweep(write_sweep()), Path("runs/s"))
    progress = SweepProgress(trials, lambda point: BUDGET)
    (_, second), locks = begun(trials, 2)
    assert progress.seconds_left() is None and "not known yet" in progress.status()
    second.set_user_attr(STARTED_AT, 500)  # resumed half way
    logged(trials, 0, {"global_step": 250})
    logged(trials, 1, {"global_step": 750})
    as_at(trials, "datetime_start", dict.fromkeys(range(2), datetime.now() - timedelta(seconds=20)))
    # 80 s a trial by either pace: 0.75 + 0.25 of the two, and two more, two at a time
    assert progress.seconds_left() == pytest.approx(80 * 3 / 2, rel=0.05)
    for lock in locks:
        lock.close()
    assert progress.seconds_left() is None


def test_the_status_names_the_best_and_what_waits(sweep_under_way):
    _, progress, lock = sweep_under_way
    told = progress.status().splitlines()
    assert told[-3] == "2 done, 1 running, of 4, 1 waiting"
    assert "0.5, trial 0 (trainer.seed=1 algorithm.cfg.learning_rate=0.5) in runs/s/x-" in told[-2]
    assert told[-1].startswith("time left: about ") and told[-1].endswith("with 1 at a time, as now")
    lock.close()
    told = progress.status().splitlines()
    assert told[-1] == "nothing runs" and "2 done, 1 not running now, of 4, 1 waiting" in told


def test_the_best_of_a_sweep_that_minimizes_is_its_least():
    trials = SweepTrials(load_sweep(write_sweep(metric={"name": "loss"})), Path("runs/s"))
    with trials.locked():
        for value in (0.5, 0.25):
            trials.tell(trials.take(), value)
    assert "best so far: 0.25, trial 1" in SweepProgress(trials, lambda point: BUDGET).status()


def test_a_sweep_without_a_metric_has_no_best_and_no_column():
    trials = SweepTrials(load_sweep(write_sweep(metric=None)), Path("runs/s"))
    with trials.locked():
        trials.tell(trials.take())
    assert trials.all()[0].state == TrialState.COMPLETE
    progress = SweepProgress(trials, lambda point: BUDGET)
    assert "best" not in progress.status() and progress.row(trials.all()[0]) == ["0", "done", "1", "0.5", "", ""]


def test_where_the_budget_is_unknown_so_is_the_progress():
    def unknown(point):
        raise UserError("no such option")

    trials = SweepTrials(load_sweep(write_sweep()), Path("runs/s"))
    with trials.locked():
        trials.take()
    logged(trials, 0, {"global_step": 250})
    progress = SweepProgress(trials, unknown)
    assert progress.done() == 0 and "env steps" not in progress.table()


def test_looking_makes_nothing_and_knows_the_limit_of_the_start():
    sweep = load_sweep(write_sweep(method="random", parameters={"trainer.seed": {"min": 1, "max": 9}}))
    with pytest.raises(UserError, match="the sweep has no trials in runs/s; start it first"):
        SweepTrials(sweep, Path("runs/s"), begin=False)
    assert not Path("runs").exists()
    SweepTrials(sweep, Path("runs/s"), most=7)
    assert SweepTrials(sweep, Path("runs/s"), begin=False).most == 7


@pytest.mark.parametrize(
    ("seconds", "told"), [(45, "45 s"), (90, "2 min"), (720, "12 min"), (7180, "2 h 0 min"), (12000, "3 h 20 min")]
)
def test_times_are_for_people(seconds, told):
    assert clock(seconds) == told


def test_trials_that_left_the_file_are_shown_and_not_counted():
    trials = SweepTrials(load_sweep(write_sweep()), Path("runs/s"))
    for trial in begun(trials, 4)[0]:
        trials.tell(trial, 0.5)
    edited = SweepTrials(load_sweep(write_sweep(rates=(1.0, 2.0))), Path("runs/s"))
    progress = SweepProgress(edited, lambda point: BUDGET)
    assert progress.done() == 2 and progress.line(0).startswith("[2/4] trial 0  done  1  0.5")
    *rows, last = progress.table().splitlines()
    assert last == "2 done, of 4" and progress.status().splitlines()[5].endswith("2 waiting")
    assert [row.endswith("not in the file any more") for row in rows[1:]] == [True, False, True, False]


ENTROPY = {"algorithm.cfg.ent_coef": [0.0, 0.1]}


@pytest.mark.parametrize(
    ("varied", "by"),
    [
        ({"policy.freeze": ["none", "vision"]}, ""),
        ({"policy.freeze": ["none", "vision"], **ENTROPY}, " --by policy.freeze algorithm.cfg.ent_coef"),
        ({"policy.learning_rate_factor": [1.0, 4.0], **ENTROPY}, " --by algorithm.cfg.ent_coef"),
        ({"config": ["a.json", "b.json"], "trainer.env": ["tabletop", "metaworld"], "trainer.threads": [1, 2]}, ""),
    ],
)
def test_what_a_grid_varies_is_proposed_to_compare_by_where_that_makes_arms(varied, by):
    parameters = {name: {"values": values} for name, values in varied.items()}
    sweep = load_sweep(write_sweep(parameters=parameters))
    progress = SweepProgress(SweepTrials(sweep, Path("runs/s")), lambda point: BUDGET)
    assert progress.next_step() == f"compare with: python experiments/compare_runs.py runs/s{by}"
