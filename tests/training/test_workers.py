"""Processes that collect: what they leave when they break, die or hang, and that none outlives its run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from collecting_worlds import absent_env, breaking_env, hanging_env
from worlds import ROOT, reach_policy, run_folder, write_config

from research.errors import NonFiniteError, SimulatorFailed, UserError
from research.runs.checkpoint import load_checkpoint
from research.runs.folder import read_json
from research.training.asynchronous import AsynchronousRollouts
from research.training.collecting_policy import CollectingPolicy
from research.training.workers import WeightMailbox, WorkerWatch

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "experiments" / "ppo_vla.py"


def dying_env(worker: int):
    os._exit(3)


@pytest.mark.parametrize(("make_env", "why"), [(absent_env, "worker 0: trainer.env: no such thing"), (dying_env, "")])
def test_a_worker_that_cannot_start_is_one_line(make_env, why):
    with pytest.raises(UserError, match=f"a process that collects ended while it started: {why}") as caught:
        collect(make_env)
    assert "\n" not in str(caught.value) and not mailboxes(os.getpid())


def collect(make_env, timeout: float = 60.0) -> None:
    rollouts = AsynchronousRollouts(make_env, 8, reach_policy(), 2, 8 * 6, max_staleness=100, seed=0, timeout=timeout)
    try:
        for _ in range(10_000):  # until what is wrong comes out
            rollouts.next()
    finally:
        rollouts.shutdown()
        assert not any(process.is_alive() for process in rollouts.workers.collector.procs)
        assert not Path(rollouts.workers.mailbox.folder).exists()


def test_what_an_environment_raises_in_a_worker_is_said_here():
    with pytest.raises(SimulatorFailed, match=r"^worker 1: physics exploded$"):
        collect(breaking_env)


def test_a_worker_that_hangs_is_named_and_ended_in_time():
    """The other one goes on, and would fill rollouts alone for ever."""
    start = time.monotonic()
    with pytest.raises(SimulatorFailed, match=r"worker 1 \(process \d+\) took no step for 10 s and was ended"):
        collect(hanging_env, timeout=10.0)  # a busy machine lets a healthy one wait for 2
    assert time.monotonic() - start < 60


class Alive:
    """A process, as the watch sees it."""

    def __init__(self, pid: int):
        self.pid, self.killed = pid, False

    def is_alive(self) -> bool:
        return not self.killed

    def kill(self) -> None:
        self.killed = True


class Counted:
    """A mailbox that says what it is told."""

    def __init__(self, *steps: int):
        self.told = list(steps)

    def steps(self) -> list[int]:
        return list(self.told)


@pytest.mark.parametrize(
    ("steps", "others", "waits", "ends"),
    [
        (3, 0, False, True),  # in the middle of a rollout
        (6, 0, False, False),  # it has handed over its second one, and the main process is busy
        (6, 0, True, True),  # the main process waits for that
        (6, 9, False, True),  # or has received nine later ones of the other worker: it never handed it over
    ],
)
def test_where_a_worker_may_stand_still(steps, others, waits, ends):
    processes = [Alive(1), Alive(2)]
    box = Counted(3, 3)
    watch = WorkerWatch(box, processes, steps=3, timeout=0.2)
    watch.wait()
    for worker in (0, 1):
        watch.received(worker)
    box.told = [steps, 6]
    time.sleep(0.1)
    for _ in range(others):
        box.told[1] += 3
        watch.received(1)
    if waits:
        watch.wait()
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and not processes[0].killed:
        box.told[1] += 3  # the other one goes on
        watch._received[1] += 1 if others else 0
        time.sleep(0.02)
    watch.stop()
    assert processes[0].killed == ends and not processes[1].killed
    assert (watch.verdict or "").startswith("worker 0 (process 1) took no step for 0.2 s") == ends


def test_what_broke_keeps_its_kind():
    box = WeightMailbox(CollectingPolicy(reach_policy()), 2)
    assert box.reported() is None
    for error, kind, text in (
        (NonFiniteError("reward is nan"), NonFiniteError, "worker 1: reward is nan"),
        (ValueError("odd\nshape"), SimulatorFailed, "worker 1: ValueError: odd shape"),
    ):
        box.report(1, error)
        assert type(box.reported()) is kind and str(box.reported()) == text
    box.remove()


def test_what_a_killed_run_left_in_shared_memory_goes_with_the_next(tmp_path):
    """Killed between making its mailbox and starting the workers that would have removed it."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    orphan, ours = (Path(f"/dev/shm/vla-weights-{pid}-test") for pid in (ended.pid, os.getpid()))
    for folder in (orphan, ours):
        folder.mkdir(exist_ok=True)
    WeightMailbox(CollectingPolicy(reach_policy())).remove()
    assert not orphan.exists() and ours.exists()
    ours.rmdir()


@pytest.fixture
def launch(start_process):
    """Starts the main job."""
    return lambda *words: start_process(sys.executable, "-u", str(SCRIPT), *words, OMP_NUM_THREADS="1")


def started(launch, tmp_path: Path, **changes) -> tuple[subprocess.Popen, list[int]]:
    """A run whose two workers collect, once it learns."""
    config = write_config(
        tmp_path, trainer__buffer_type="vla", trainer__num_collectors=2, trainer__iterations=100000,
        trainer__save_freq=640, trainer__enable_eval=False, trainer__max_staleness=1000, **changes,
    )  # fmt: skip
    process = launch("--config", str(config), "--trainer.worker_timeout=5")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        runs = list((tmp_path / "runs").glob("*/metrics.jsonl"))
        if runs and runs[0].read_text().count("train/approx_kl") > 12:
            break
        time.sleep(0.2)
    assert process.poll() is None, process.communicate()
    return process, workers_of(process.pid)


def workers_of(pid: int) -> list[int]:
    """The processes below one that were made by multiprocessing, other than its resource tracker."""
    listed = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [int(child) for child, parent, words in rows if int(parent) == pid and "resource_tracker" not in words]


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


def mailboxes(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"vla-weights-{pid}-*"))


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_worker_ends_the_run_with_a_checkpoint_and_a_summary(launch, tmp_path, kind):
    process, workers = started(launch, tmp_path)
    assert len(workers) == 2, workers
    os.kill(workers[0], kind)
    start = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and time.monotonic() - start < 30, err
    last = [line for line in err.splitlines() if line.startswith("error")]
    assert len(last) == 1 and re.search(r"worker \d .*; stopped at env step \d+, the last checkpoint is", last[0]), err
    assert "Traceback" not in err
    run = run_folder(tmp_path)
    assert read_json(run / "summary.json")["stopped_by"] == "simulator"
    assert load_checkpoint(run)["progress"]["global_step"] > 0
    assert gone(workers, 10)


def test_a_ctrl_c_of_the_whole_group_stops_as_one_of_the_main_process(launch, tmp_path):
    process, workers = started(launch, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert load_checkpoint(run_folder(tmp_path))["progress"]["global_step"] > 0
    assert gone(workers, 10)


def test_nothing_outlives_a_main_process_that_is_killed(launch, tmp_path):
    process, workers = started(launch, tmp_path)
    assert len(mailboxes(process.pid)) == 1
    process.kill()
    process.communicate()
    assert gone(workers, 15)
    assert not mailboxes(process.pid)


def test_a_ctrl_c_while_workers_start_is_clean(launch, tmp_path):
    config = write_config(tmp_path, trainer__buffer_type="vla", trainer__num_collectors=2, trainer__enable_eval=False)
    process = launch("--config", str(config))
    for line in process.stdout:
        if line.startswith("starting 2 processes that collect"):
            break
    time.sleep(0.5)
    workers = workers_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    start = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and time.monotonic() - start < 20, err
    assert "stopped before the run began" in err and "Traceback" not in err, err
    assert gone(workers, 10) and not mailboxes(process.pid)
