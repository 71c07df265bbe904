"""Simulators in groups: in this process, or each group in a worker process of its own that is watched.

A worker outlives no parent and holds up no exit: it ignores the signals that a scheduler or a terminal sends to all of
a run's processes (the main process decides), leaves when its pipe closes, ends itself when the main process is gone,
even where the simulator hangs, and is killed where it does not leave. One that dies is noticed at once, because its
pipe closes; one that is stopped or hangs, when it has not answered within a stated time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from multiprocessing import forkserver, util
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch

from envs.chunks import execute
from envs.demonstrating import Disturbance, demonstrate
from envs.failures import blame, mid_run
from envs.pictures import letterbox
from envs.simulator import Layout, Simulator
from research.errors import SimulatorFailed, UserError
from research.processes import RUN_SIGNALS, serve_the_main_process
from research.schema import Demonstration

CONSTRUCTION_S = 600.0  # how long making a group's simulators may take: some load scenes and compile
STEP_S = 60.0  # how long a reset or a step of a group may take, unless the environment's options say otherwise
LEAVE_S = 5.0  # how long a worker has to close its simulators


class Facts(NamedTuple):
    """What the simulators of a group say of themselves once they have been made."""

    layout: Layout
    saves: bool


class Group:
    """Simulators that share a process: `submit` a method call, then `collect` its result; the first one is `Facts`.

    Args:
        make: makes one simulator.
        count: how many.
        name: how messages call the environment.
    Raises:
        UserError: from the constructor: a simulator cannot be made.
        SimulatorFailed: from `submit`: one raised something.
    """

    def __init__(self, make: Callable[[], Simulator], count: int, name: str):
        self._name = name
        with blame(f"{name}: making it", UserError):
            self.simulators = [make() for _ in range(count)]
            saves = all(one.save() is not None for one in self.simulators)
        self._filmed, self._film_size = 0, 0  # of the first rows, what they look like between control steps is kept
        self._between: list[list[np.ndarray]] = []
        self._result: Any = Facts(self.simulators[0].layout, saves)

    def submit(self, method: str, *args: Any) -> None:
        with mid_run(), blame(f"{self._name}: {method}"):
            self._result = getattr(self, method)(*args)

    def collect(self) -> Any:
        return self._result

    def reset(self, rows: Sequence[int], states: Sequence[int]) -> dict[str, np.ndarray]:
        """Start rows from ids: their observations, `[rows, ...]`."""
        for row, state in zip(rows, states, strict=True):
            self.simulators[row].reset(state)
        return _stack([self.simulators[row].observe() for row in rows])

    def step(self, actions: np.ndarray) -> dict[str, np.ndarray]:
        """Take a decision in every row, `[n, A]` or `[n, H, A]`."""
        self._between = [[] for _ in range(self._filmed)]
        return _stack([execute(one, actions[row], self._camera(row)) for row, one in enumerate(self.simulators)])

    def turn(
        self, rows: Sequence[int], actions: np.ndarray, upcoming: Sequence[int]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Take a decision in these rows, and start those whose episode it ends from the ids that come next.

        Returns:
            as `step`, of these rows; and the observations of the rows that have started, which may be none.
        """
        after = _stack([execute(self.simulators[row], action) for row, action in zip(rows, actions, strict=True)])
        ended = (after["terminated"] | after["truncated"])[:, 0].nonzero()[0]
        started = [(rows[at], upcoming[at]) for at in ended]
        return after, self.reset(*zip(*started, strict=True)) if started else {}

    def _camera(self, row: int) -> Callable[[], None] | None:
        if row >= self._filmed:
            return None
        return lambda: self._between[row].append(letterbox(self.simulators[row].frame(), self._film_size))

    def frames(self, size: int) -> np.ndarray:
        return np.stack([letterbox(one.frame(), size) for one in self.simulators])

    def film_between(self, rows: int, size: int) -> None:
        """Keep what the first rows look like between the control steps of their decisions."""
        self._filmed, self._film_size, self._between = rows, size, [[] for _ in range(rows)]

    def frames_between(self) -> list[np.ndarray]:
        """Of the last decision: per filmed row uint8 `[K, size, size, 3]`."""
        none = np.empty((0, self._film_size, self._film_size, 3), np.uint8)
        return [np.stack(shot) if shot else none for shot in self._between]

    def expert_actions(self) -> np.ndarray:
        """What the experts would do now, float32 `[n, A]`."""
        return np.stack([one.expert_action() for one in self.simulators])

    def demonstrate(self, state: int, every: int, disturbance: Disturbance, seed: int) -> Demonstration:
        """An episode of the first simulator's expert."""
        return demonstrate(self.simulators[0], state, every, disturbance, seed)

    def save(self) -> list[bytes | None]:
        return [one.save() for one in self.simulators]

    def load(self, states: Sequence[bytes]) -> None:
        for one, state in zip(self.simulators, states, strict=True):
            one.load(state)

    def release(self) -> None:
        """Nothing: these simulators share the caller's process."""

    def close(self, patience: float = 0.0) -> None:
        """Close the simulators; nobody is waited for."""
        for one in self.simulators:
            one.close()


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class RemoteGroup:
    """A `Group` in a process of its own.

    Args:
        make: makes one simulator, in the worker.
        rows: which rows of the environment these are.
        name: how messages call the environment.
        timeout: seconds within which the worker has to answer, once its simulators are made.
    Raises:
        UserError: from the first `collect`: a simulator cannot be made.
        SimulatorFailed: from later ones: a simulator raised something, or the worker died, was stopped or hangs.
    """

    def __init__(self, make: Callable[[], Simulator], rows: Sequence[int], name: str, timeout: float = STEP_S):
        context = _fork_server(_module_of(make))
        self._timeout, self._made, self._doing = timeout, False, "making its simulators"
        self._pipe, theirs = context.Pipe()
        args = (theirs, cloudpickle.dumps(make), len(rows), name)
        self._process = context.Process(target=_serve, args=args, daemon=True)
        self._process.start()
        theirs.close()
        self._who = f"{name}: the worker of rows {_ranges(rows)} (process {self._process.pid})"
        self._limit(CONSTRUCTION_S)
        _LIVING.add(self)
        _end_at_exit()

    def submit(self, method: str, *args: Any) -> None:
        self._doing = method
        try:
            self._pipe.send((method, args))
        except OSError as error:
            raise self._silent(error) from error

    def collect(self) -> Any:
        try:
            result = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._silent(error) from error
        if isinstance(result, Exception):
            raise result
        if not self._made:
            self._made = True
            self._limit(self._timeout)
        return result

    def release(self) -> None:
        """Let the worker go, and do not wait for it: many leave at the same time."""
        self._pipe.close()

    def close(self, patience: float = LEAVE_S) -> None:
        """End the worker: kill it where it has not left after `patience` seconds."""
        self._pipe.close()
        self._process.join(patience)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(LEAVE_S)

    def _limit(self, seconds: float) -> None:
        """Let the pipe wait no longer than this for the worker, to hear it and to be heard."""
        self._waits = seconds
        limit = struct.pack("ll", int(min(seconds, 1e9)), max(1, int(seconds % 1 * 1e6)))  # 0 would be for ever
        with socket.socket(fileno=os.dup(self._pipe.fileno())) as same:
            for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                same.setsockopt(socket.SOL_SOCKET, direction, limit)

    def _silent(self, error: Exception) -> Exception:
        """What to raise of a worker that does not answer: it has ended, or it is ended now."""
        kind = SimulatorFailed if self._made else UserError
        if isinstance(error, BlockingIOError):
            self._process.kill()
            self._process.join(LEAVE_S)
            hint = "; trainer.env_config.worker_timeout is how long it may take" if self._made else ""
            return kind(f"{self._who} did not answer {self._doing} within {self._waits:g} s and was killed{hint}")
        self._process.join(LEAVE_S)
        return kind(
            f"{self._who} ended during {self._doing} (exit code {self._process.exitcode}); what it printed is above. "
            "Negative codes are signals: -9 is often a lack of memory, -11 a crash inside the simulator"
        )


def _ranges(rows: Sequence[int]) -> str:
    """Rising numbers in short: "0-15, 32-47"."""
    spans = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def close_all(groups: Iterable[Group | RemoteGroup]) -> None:
    """Close groups, their workers at the same time."""
    groups = list(groups)
    for group in groups:
        group.release()
    deadline = time.monotonic() + LEAVE_S
    for group in groups:
        group.close(max(0.1, deadline - time.monotonic()))


_LIVING: weakref.WeakSet[RemoteGroup] = weakref.WeakSet()


@lru_cache
def _end_at_exit() -> None:
    """End what nobody closed, before multiprocessing's own exit waits for workers that ignore SIGTERM."""
    util.Finalize(None, lambda: close_all(_LIVING), exitpriority=10)


def _fork_server(module: str) -> Any:
    """The fork server's context; the server ignores what a run's workers ignore, or such a signal would end it.

    Not "fork", which would copy threads, locks and GPU contexts. The fork server imports this module and the
    simulator's, which takes seconds, once for all workers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, module])
    with _deaf():
        forkserver.ensure_running()
    return context


@contextmanager
def _deaf() -> Iterator[None]:
    """Ignore `RUN_SIGNALS` while a process that inherits this is started; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in RUN_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _module_of(make: Callable[[], Simulator]) -> str:
    """Where a simulator's class or function is defined; the fork server does not import the main script."""
    while isinstance(make, partial):
        make = make.func
    module = getattr(make, "__module__", "__main__")
    return __name__ if module == "__main__" else module


def _serve(pipe: Any, pickled_make: bytes, count: int, name: str) -> None:
    """The worker process: answer calls until the main process closes the pipe or dies."""
    serve_the_main_process(patience=LEAVE_S)
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            group = Group(cloudpickle.loads(pickled_make), count, name)
        except (UserError, SimulatorFailed) as error:
            pipe.send(UserError(str(error)))
            return
        pipe.send(group.collect())
        while True:
            method, args = pipe.recv()
            try:
                group.submit(method, *args)
                pipe.send(group.collect())
            except SimulatorFailed as error:
                pipe.send(error)
    group.close()
