"""The trials of a sweep: each point once, in order, between processes that share them, until there are enough."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from optuna.trial import TrialState
from study_worlds import write_sweep

from research.errors import UserError
from research.study.sweep_file import load_sweep
from research.study.trials import SweepTrials

RATE = "algorithm.cfg.learning_rate"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SweepTrials, "is_alive", lambda self, number: True)


def take_all(trials, value=0.0) -> list[dict]:
    """The points of all trials that are left, each of which ends with `value`."""
    points = []
    with trials.locked():
        while (trial := trials.take()) is not None:
            points.append(trial.user_attrs["point"])
            trials.tell(trial, value)
    return points


def test_a_grid_is_handed_out_in_its_order_and_no_further():
    sweep = load_sweep(write_sweep())
    trials = SweepTrials(sweep, Path("runs/s"))
    assert trials.most == 4
    assert take_all(trials) == sweep.grid()
    again = SweepTrials(sweep, Path("runs/s"))
    assert take_all(again) == [] and again.token == trials.token


@pytest.mark.parametrize(("most", "run_cap", "expected"), [(3, None, 3), (None, 2, 2), (3, 2, 2), (9, None, 4)])
def test_a_limit_ends_a_sweep_before_its_grid_does(most, run_cap, expected):
    trials = SweepTrials(load_sweep(write_sweep(run_cap=run_cap)), Path("runs/s"), most)
    assert trials.most == len(take_all(trials)) == expected


def test_what_is_put_back_comes_next_with_its_point_and_what_it_reported(monkeypatch):
    trials = SweepTrials(load_sweep(write_sweep()), Path("runs/s"))
    with trials.locked():
        first, second = (trials.take() for _ in range(2))
        first.report(0.25, 0)
        trials.put_back(first.number)
        again = trials.take()
        assert (again.number, again.user_attrs["point"]) == (first.number, first.user_attrs["point"])
        assert trials.all()[again.number].intermediate_values == {0: 0.25}
        monkeypatch.setattr(trials, "is_alive", lambda number: number != second.number)
        assert trials.take().number == second.number  # nobody runs it: it was interrupted


def test_a_trial_that_failed_is_not_handed_out_again_unless_its_script_refused_it():
    sweep = load_sweep(write_sweep())
    trials = SweepTrials(sweep, Path("runs/s"))
    with trials.locked():
        for code in (1, 2):  # a crash, and a refusal
            trial = trials.take()
            trial.set_user_attr("exit_code", code)
            trials.tell(trial, state=TrialState.FAIL)
    _, refused, *others = sweep.grid()
    assert take_all(trials) == others  # this process has seen the refusal
    assert take_all(SweepTrials(sweep, Path("runs/s"))) == [refused]


@pytest.mark.parametrize(("goal", "reached", "missed"), [("maximize", 0.5, 0.4), ("minimize", 0.5, 0.6)])
def test_no_trial_follows_one_that_reached_the_target(goal, reached, missed):
    metric = {"name": "eval/success_rate", "goal": goal, "target": 0.5}
    assert len(take_all(SweepTrials(load_sweep(write_sweep(metric=metric)), Path("runs/a")), reached)) == 1
    assert len(take_all(SweepTrials(load_sweep(write_sweep(metric=metric)), Path("runs/b")), missed)) == 4


def test_a_random_sweep_draws_within_its_ranges_and_passes_fixed_values_on():
    ranges = {RATE: {"min": 0.25, "max": 4.0, "distribution": "log_uniform_values"}, "trainer.seed": {"value": 7}}
    points = take_all(SweepTrials(load_sweep(write_sweep(method="random", parameters=ranges)), Path("runs/s"), 20))
    assert len({point[RATE] for point in points}) == 20
    assert all(0.25 <= point[RATE] <= 4.0 and point["trainer.seed"] == 7 for point in points)


def test_a_folder_belongs_to_one_sweep_but_a_grid_may_grow():
    SweepTrials(load_sweep(write_sweep()), Path("runs/s"))
    assert len(take_all(SweepTrials(load_sweep(write_sweep(rates=(0.5, 1.0, 2.0))), Path("runs/s")))) == 6
    with pytest.raises(UserError, match="runs/s has trials of another sweep, of another method and parameters; give s"):
        SweepTrials(load_sweep(write_sweep(method="random", run_cap=2)), Path("runs/s"))


def test_points_that_an_edited_grid_no_longer_has_take_no_place_of_those_that_it_has():
    take_all(SweepTrials(load_sweep(write_sweep()), Path("runs/s")))
    edited = SweepTrials(load_sweep(write_sweep(rates=(1.0, 2.0))), Path("runs/s"))
    assert [point[RATE] for point in take_all(edited)] == [2.0, 2.0] and edited.most == 4
    assert [edited.counts(trial) for trial in edited.all()] == [False, True, False, True, True, True]
    fixed = {"trainer.gamma": {"value": 0.9}}
    again = SweepTrials(load_sweep(write_sweep(parameters=fixed)), Path("runs/s"))
    assert len(take_all(again)) == 4  # of an option that is the same for all, too
    limited = SweepTrials(load_sweep(write_sweep(rates=(3.0, 4.0))), Path("runs/s"), most=1)
    assert [point[RATE] for point in take_all(limited)] == [3.0]


def test_a_metric_is_part_of_a_sweep_that_decides_by_it():
    def trials(metric: str, goal: str, **more) -> SweepTrials:
        return SweepTrials(load_sweep(write_sweep(metric={"name": metric, "goal": goal}, **more)), Path("runs") / "s")

    trials("eval/return", "minimize")
    trials("eval/success_rate", "maximize")
    stopping = {"early_terminate": {"type": "hyperband", "min_iter": 2}}
    with pytest.raises(UserError, match="has trials of another sweep, of another metric and goal"):
        trials("eval/success_rate", "maximize", **stopping)
    trials("eval/return", "minimize", **stopping)
    with pytest.raises(UserError, match="has trials of another sweep, of another metric; give"):
        trials("eval/success_rate", "minimize", **stopping)


def test_a_folder_that_cannot_be_made_is_named():
    Path("runs").write_text("in the way")
    with pytest.raises(UserError, match="cannot make the sweep's folder runs/s: Not a directory"):
        SweepTrials(load_sweep(write_sweep()), Path("runs/s"))


def test_trials_are_handed_out_by_one_process_at_a_time():
    sweep, entered = load_sweep(write_sweep()), threading.Event()
    first, second = SweepTrials(sweep, Path("runs/s")), SweepTrials(sweep, Path("runs/s"))

    def enter():
        with second.locked():
            entered.set()

    with first.locked():
        threading.Thread(target=enter).start()
        assert not entered.wait(0.3)
    assert entered.wait(10)


def test_a_trial_that_ends_while_another_process_looks_at_it_is_not_put_back(monkeypatch):
    sweep = load_sweep(write_sweep())
    first, second = SweepTrials(sweep, Path("runs/s")), SweepTrials(sweep, Path("runs/s"))
    with first.locked():
        ending, interrupted = (first.take() for _ in range(2))

    def is_alive(number: int) -> bool:  # between the look at the database and the look at the process, it is over
        if number == ending.number:
            first.tell(ending, 0.5)
        return False

    monkeypatch.setattr(second, "is_alive", is_alive)
    with second.locked():
        assert second.take().number == interrupted.number
    assert second.all()[ending.number].state.name == "COMPLETE"


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("postgresql://me:secret@127.0.0.1:1/sweeps", r"me:\*\*\*@127.0.0.1:1/sweeps cannot be opened: .*refused"),
        (
            "postgresql+pg8000://me:secret@host/sweeps",
            r"cannot hold a sweep's locks; write postgresql\+psycopg",
        ),
        ("mysql+pymysql://me:secret@host/sweeps", "cannot be opened: No module named .pymysql"),
        ("secret@host", "--storage is no database URL; write it as postgresql://user@host/database"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(storage, message):
    if storage.startswith("postgresql:"):
        pytest.importorskip("psycopg", reason="the extra postgres is not installed")
    with pytest.raises(UserError, match=message) as refused:
        SweepTrials(load_sweep(write_sweep()), Path("runs/s"), storage=storage)
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_driver_is_one_line_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"needs the package psycopg: pip install -e .\[postgres\]"):
        SweepTrials(load_sweep(write_sweep()), Path("runs/s"), storage="postgresql://me@host/sweeps")
