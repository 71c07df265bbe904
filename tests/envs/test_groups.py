"""envs/groups.py: worker processes that die, hang, are stopped or are left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from envs_worlds import Drifter, play
from worlds import ROOT

from envs.vector import VectorEnv
from research.errors import SimulatorFailed, UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def make():
    envs = []

    def build(num_envs=5, workers=2, worker_timeout=60.0, **options):
        drifter = partial(Drifter, **options)
        envs.append(VectorEnv(drifter, num_envs, workers, name="drift", worker_timeout=worker_timeout))
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def is_running(pid: int) -> bool:
    """Whether a process is there, and is more than an entry that nobody has read yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def workers_of(env: VectorEnv) -> list[int]:
    return [group._process.pid for group in env._groups]


@pytest.mark.parametrize(
    ("wrong", "timeout", "message"),
    [
        ("exit", 60.0, r"^drift: the worker of rows 0-1, 3 \(process \d+\) ended during step \(exit code 3\)"),
        ("segfault", 60.0, r"ended during step \(exit code -11\).*a crash inside the simulator"),
        ("hang", 1.0, r"rows 0-1, 3 \(process \d+\) did not answer step within 1 s and was killed; .*worker_timeout"),
        ("stop", 1.0, r"did not answer step within 1 s and was killed"),
    ],
)
def test_a_worker_that_dies_or_does_not_answer_is_named_and_none_is_left(make, wrong, timeout, message):
    env = make(wrong=wrong, worker_timeout=timeout)
    pids = workers_of(env)
    env.reset()
    began = time.monotonic()
    with pytest.raises(SimulatorFailed, match=message):
        play(env, 1)
    assert time.monotonic() - began < 10
    assert wait_until(lambda: not any(map(is_running, pids)), 10)


def test_a_stopped_worker_that_has_to_be_told_much_is_noticed(make):
    """More than its pipe holds is sent to it: to send would wait for ever too."""
    env = make(num_envs=2, worker_timeout=1.0, ballast=4_000_000)
    env.reset()
    saved = env.state_dict()
    os.kill(workers_of(env)[0], signal.SIGSTOP)
    with pytest.raises(SimulatorFailed, match="did not answer load within 1 s"):
        env.load_state_dict(saved)


def test_one_that_dies_while_its_simulators_are_made_is_refused(make):
    with pytest.raises(UserError, match=r"ended during making its simulators \(exit code 5\)"):
        make(wrong="exit early")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_what_a_scheduler_or_terminal_sends_to_all_processes_ends_no_worker(make, number):
    env = make()
    for pid in workers_of(env):
        os.kill(pid, number)
    env.reset()
    play(env, 2)
    assert all(map(is_running, workers_of(env)))


SCRIPT = """
import os, signal, sys
from functools import partial
sys.path[:0] = [{root!r}, {tests!r}]
from envs_worlds import Drifter, play
from envs.vector import VectorEnv

if __name__ == "__main__":
    env = VectorEnv(partial(Drifter, wrong={wrong!r}), 4, 2, name="drift")
    env.reset()
    print(*(group._process.pid for group in env._groups), flush=True)
    {then}
"""


def start(wrong: str | None, then: str) -> tuple[subprocess.Popen, list[int]]:
    code = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), wrong=wrong, then=then)
    main = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    return main, [int(pid) for pid in main.stdout.readline().split()]


@pytest.mark.parametrize(("wrong", "then"), [(None, "signal.pause()"), ("hang", "play(env, 1)")])
def test_workers_die_with_a_main_process_that_is_killed(wrong, then):
    main, pids = start(wrong, then)
    assert len(pids) == 2 and all(map(is_running, pids))
    time.sleep(0.5)
    main.kill()
    main.wait()
    assert wait_until(lambda: not any(map(is_running, pids)), 12)
    numbers = {str(pid) for pid in (main.pid, *pids)}  # torch puts them into the names of what it shares
    assert not [name for name in os.listdir("/dev/shm") if numbers & set(re.findall(r"\d+", name))]


@pytest.mark.parametrize(
    ("wrong", "then"),
    [
        (None, "sys.exit(0)"),  # without closing the environment
        ("hang in close", "sys.exit(0)"),
        (None, "os.kill(env._groups[0]._process.pid, signal.SIGSTOP)"),
    ],
)
def test_a_main_process_that_ends_waits_for_no_worker(wrong, then):
    main, pids = start(wrong, then)
    assert main.wait(timeout=30) == 0
    assert wait_until(lambda: not any(map(is_running, pids)), 10)


def test_a_signal_to_the_whole_group_leaves_the_workers_and_their_server(tmp_path):
    """As a scheduler does: the main process catches it and goes on to its end."""
    then = (
        "signal.signal(signal.SIGTERM, lambda *_: None); os.killpg(0, signal.SIGTERM); import time; time.sleep(0.5); "
        "assert all(group._process.is_alive() for group in env._groups); "  # as the server says, if it is there
        "play(env, 3); VectorEnv(partial(Drifter), 2, 2, name='more').close(); env.close()"
    )
    main, pids = start(None, then)
    assert len(pids) == 2 and main.wait(timeout=60) == 0
