"""A sweep on two machines, which are two folders here: a real PostgreSQL server, kills, and what becomes of runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import optuna
import pytest
import sweep_local
from postgres_server import PostgresServer, needs_postgres
from study_worlds import write_sweep
from sweep_worlds import SCRIPT, children, in_background, wait_for

from research.runs.folder import RunFolder
from research.runs.tracking import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    needs_postgres()
    with PostgresServer() as server:
        yield server


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a folder that has the script and a sweep file, as a checkout on a machine does."""
    (tmp_path / "witness").mkdir()
    monkeypatch.setenv("WITNESS", str(tmp_path / "witness"))
    monkeypatch.setattr(sweep_local, "POLL_S", 0.02)

    def make(name: str, **sweep) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "script.py").write_text(SCRIPT)
        monkeypatch.chdir(folder)
        write_sweep(name=tmp_path.name, **sweep)
        return folder

    yield make
    assert not (tmp_path / "witness" / "twice").exists()  # no run had two processes at a time


def runs_of(machine: Path) -> dict[str, Path]:
    """Run folders on a machine, by run id."""
    return {path.parent.name.rpartition("-")[2]: path.parent for path in machine.glob("runs/*/*/starts.jsonl")}


def unfinished(machine: Path) -> set[str]:
    return {run for run, folder in runs_of(machine).items() if not (folder / "summary.json").exists()}


def origins(folder: Path) -> list[int]:
    """The iteration that each of a run's processes went on from."""
    return [json.loads(line)["from"] for line in (folder / "starts.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    return [row["global_step"] for row in read_metrics(folder)]


def rows(machine: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in machine.glob("runs/*/*/metrics.jsonl"))


def kill(process: subprocess.Popen, *others: int) -> None:
    for pid in (process.pid, *others):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def trials(machine: Path, server: PostgresServer) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=machine.parent.name, storage=server.url).trials


def states(machine: Path, server: PostgresServer) -> list[str]:
    return [trial.state.name for trial in trials(machine, server)]


def test_every_trial_ends_once_on_machines_that_are_killed(server, machine, monkeypatch):
    """Two machines without a common folder. One dies with its runs; of the other only the sweep's process."""
    fixed = {"trainer.iterations": {"value": 25}}
    a, b = (machine(name, rates=[0.25, 0.5, 1.0], parameters=fixed) for name in "ab")
    flags = ("s.yaml", "--workers=2", f"--storage={server.url}")
    first, second = in_background(*flags, cwd=a), in_background(*flags, cwd=b)
    wait_for(lambda: rows(a) >= 4 and rows(b) >= 4, alive=(first, second))
    assert not runs_of(a).keys() & runs_of(b).keys()
    lost = unfinished(a)
    kill(first, *children(first.pid))

    (moved, *_) = wait_for(lambda: lost & runs_of(b).keys(), alive=(second,))
    assert origins(runs_of(b)[moved]) == [0]  # begun anew: the other folder is not seen
    outliving = unfinished(b)
    kill(second)

    monkeypatch.chdir(a)
    assert sweep_local.main([*flags]) == 0  # what is left, without what the second one's runs do still
    wait_for(lambda: not outliving & unfinished(b))
    monkeypatch.chdir(b)
    assert sweep_local.main([*flags]) == 0
    found = trials(a, server)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 6
    assert len({str(trial.user_attrs["point"]) for trial in found}) == 6
    whole = {run: steps(folder) for m in (a, b) for run, folder in runs_of(m).items() if RunFolder(folder).finished}
    assert len(whole) == 6 and all(found == list(range(1, 26)) for found in whole.values())


def test_where_the_folder_is_shared_a_run_goes_on_from_the_dead_machines_checkpoint(server, machine):
    a = machine("a", rates=[1.0], parameters={"trainer.seed": {"value": 1}, "trainer.iterations": {"value": 40}})
    flags = ("s.yaml", f"--storage={server.url}")
    first = in_background(*flags, cwd=a)
    wait_for(lambda: rows(a) >= 3, alive=(first,))
    assert sweep_local.main([*flags]) == 0 and states(a, server) == ["RUNNING"]  # the other machine has it
    kill(first, *children(first.pid))
    assert sweep_local.main([*flags]) == 0 and states(a, server) == ["COMPLETE"]
    (folder,) = runs_of(a).values()
    (start, restart) = origins(folder)
    assert start == 0 < restart and steps(folder) == list(range(1, 41))


def test_a_database_that_goes_away_ends_the_sweep_in_order_and_the_next_start_goes_on(machine, capsys):
    needs_postgres()
    with PostgresServer() as server:
        fixed = {"trainer.seed": {"value": 1}, "trainer.iterations": {"value": 40}}
        a = machine("a", rates=[1.0, 2.0], parameters=fixed)
        flags = ("s.yaml", "--workers=2", f"--storage={server.url}")
        process = in_background(*flags, cwd=a)
        wait_for(lambda: rows(a) >= 4, alive=(process,))
        server.stop()
        out, error = process.communicate()
        assert process.returncode == 1 and "the same command goes on from here" in out
        assert error.startswith("error: the database that keeps the trials is gone") and error.count("\n") == 1
        assert len(runs_of(a)) == 2 and not unfinished(a)  # asked to end, not killed
        assert sweep_local.main([*flags]) == 2 and "cannot be opened" in capsys.readouterr().err
        server.start()
        assert sweep_local.main([*flags]) == 0 and states(a, server) == ["COMPLETE"] * 2
        assert all(steps(folder) == list(range(1, 41)) for folder in runs_of(a).values())
