"""What passes between the main process and those that collect: weights one way, steps and faults the other."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from research.errors import NonFiniteError, SimulatorFailed, UserError, describe_error, one_line
from research.training.collecting_policy import CollectingPolicy

_SHARED_MEMORY = "/dev/shm"  # a folder that is memory, where there is one
_PREFIX = "vla-weights-"  # then the main process's number
REPLACED = "rollout/workers_replaced"  # metric of workers that can be: how many were lost
FIRST_S = 600.0


class WeightMailbox:
    """The latest weights, in memory that all processes of a machine share, to be taken whole or not at all.

    TorchRL's own weight exchange writes into the memory that a worker's policy is computing with: a step taken at that
    moment mixes old weights and new ones. Here a worker copies, between two steps, what was posted, and looks at the
    two counters around it to see that nothing was written meanwhile (a sequence lock).

    The other way, workers leave here how many steps they have taken, and what broke.

    Args:
        policy: whose trainable weights and version are posted.
        workers: how many processes take them.
    """

    def __init__(self, policy: CollectingPolicy, workers: int = 1):
        home = Path(_SHARED_MEMORY if os.path.isdir(_SHARED_MEMORY) else tempfile.gettempdir())
        _remove_orphans(home)
        self.folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=home)
        contents = {str(i): w.cpu() for i, w in enumerate(exchanged(policy))}
        contents["steps"] = torch.zeros(workers, dtype=torch.int64)
        contents |= {"begun": torch.zeros((), dtype=torch.int64), "done": torch.zeros((), dtype=torch.int64)}
        self._contents = TensorDict(contents).memmap(self.folder)

    def post(self, policy: CollectingPolicy) -> None:
        """Replace the weights by the policy's."""
        self._contents["begun"].add_(1)
        for i, weight in enumerate(exchanged(policy)):
            self._contents[str(i)].copy_(weight)
        self._contents["done"].copy_(self._contents["begun"])

    def deliver(self, policy: CollectingPolicy) -> None:
        """Give a worker's policy what was posted since it last looked, unless it is being written just now."""
        if policy.worker is not None:
            self._contents["steps"][policy.worker] += 1
        done = self._contents["done"].item()
        if done == getattr(self, "_taken", 0):
            return
        weights = exchanged(policy)
        copies = [self._contents[str(i)].clone() for i in range(len(weights))]
        if self._contents["begun"].item() != done:
            return
        for weight, new in zip(weights, copies, strict=True):
            weight.copy_(new)
        self._taken = done

    def steps(self) -> list[int]:
        """Steps that each worker has taken, in all of its environments at once."""
        return self._contents["steps"].tolist()

    def report(self, worker: int, error: Exception) -> None:
        """Leave what broke in a worker, for `reported`."""
        failure = as_failure(worker, error)
        Path(self.folder, f"broken_{worker}").write_text(json.dumps([type(failure).__name__, str(failure)]))

    def reported(self) -> Exception | None:
        """What broke in a worker, as what it should end the run."""
        for path in sorted(Path(self.folder).glob("broken_*")):
            kind, text = json.loads(path.read_text())
            return NonFiniteError(text) if kind == "NonFiniteError" else SimulatorFailed(text)
        return None

    def __getstate__(self) -> dict:
        return {"folder": self.folder}

    def __setstate__(self, state: dict) -> None:
        self.folder = state["folder"]
        self._contents = TensorDict.load_memmap(self.folder)

    def remove(self) -> None:
        """Free the memory."""
        shutil.rmtree(self.folder, ignore_errors=True)


def as_failure(worker: int, error: Exception) -> Exception:
    """What broke in a worker, as what it should end the run: one line, which names the worker."""
    known = isinstance(error, (NonFiniteError, SimulatorFailed, UserError))
    text = f"worker {worker}: {one_line(error) if known else describe_error(error)}"
    return NonFiniteError(text) if isinstance(error, NonFiniteError) else SimulatorFailed(text)


def _remove_orphans(home: Path) -> None:
    """Free the memory of mailboxes whose main process was killed before it had workers, which would have freed it."""
    for folder in home.glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and Path("/proc/self").exists() and not Path("/proc", owner).exists():
            shutil.rmtree(folder, ignore_errors=True)


def exchanged(policy: CollectingPolicy) -> list[Tensor]:
    """What changes from update to update: trainable weights, statistics that follow observations, and the version."""
    following = (b for module in policy.modules() if getattr(module, "follows", False) for b in module.buffers())
    return [*(p.data for p in policy.parameters() if p.requires_grad), *following, policy.version]


class WorkerWatch:
    """Ends a worker that takes no step for a time although nobody keeps it from that.

    A worker takes T steps, hands over what it collected, and waits until the main process has received it. So it may
    stand still at multiples of T, while the main process has something else to do. It may not anywhere else, nor while
    the main process waits, nor once that has received what others handed over later.

    Args:
        mailbox: where workers count their steps.
        processes: theirs, in order.
        steps: T.
        timeout: seconds. The first rollout, in which models compile, may take `FIRST_S`.
    """

    def __init__(self, mailbox: WeightMailbox, processes: Sequence[BaseProcess], steps: int, timeout: float):
        self.mailbox, self.processes, self.steps, self.timeout = mailbox, processes, steps, timeout
        self.verdict: str | None = None
        self._received = [0] * len(processes)  # rollouts of each worker
        self._waiting_since: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="workers", daemon=True)

    def wait(self) -> None:
        """The main process waits from now on; workers collect since it first did."""
        self._waiting_since = time.monotonic()
        if not self._thread.is_alive():
            self._thread.start()

    def received(self, worker: int) -> None:
        """The main process has a rollout of this worker, and goes on."""
        self._waiting_since = None
        self._received[worker] += 1

    def _look(self) -> None:
        workers = len(self.processes)
        seen, moved, before = self.mailbox.steps(), [time.monotonic()] * workers, [0] * workers
        while not self._stopped.wait(min(1.0, self.timeout / 10)):
            now, steps, waiting_since = time.monotonic(), self.mailbox.steps(), self._waiting_since
            for worker, process in enumerate(self.processes):
                if seen[worker] != steps[worker]:
                    moved[worker], before[worker] = now, sum(self._received)
                rollouts = self._received[worker]
                since = moved[worker]
                overtaken = sum(self._received) - before[worker] > 2 * workers  # the queue is first in, first out
                if steps[worker] >= (rollouts + 1) * self.steps and not overtaken:  # it may be waiting for its turn
                    since = now if waiting_since is None else max(since, waiting_since)
                most = self.timeout if rollouts else max(self.timeout, FIRST_S)
                if now - since > most and process.is_alive():
                    self.verdict = (
                        f"worker {worker} (process {process.pid}) took no step for {most:g} s and was ended; "
                        "trainer.worker_timeout is how long it may take"
                    )
                    process.kill()
            seen = steps

    def failure(self) -> Exception:
        """What to raise of workers that have ended."""
        if self.verdict is not None:
            return SimulatorFailed(self.verdict)
        if (reported := self.mailbox.reported()) is not None:
            return reported
        ended = [f"worker {i} (exit code {p.exitcode})" for i, p in enumerate(self.processes) if p.exitcode is not None]
        return SimulatorFailed(
            f"{', '.join(ended) or 'a worker'} ended; what it printed is above. Negative codes are signals: -9 is "
            "often a lack of memory, -11 a crash inside the simulator"
        )

    def stop(self) -> None:
        """End the watch."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()


def end_now(processes: Sequence[BaseProcess]) -> None:
    """Kill processes: those that ignore SIGTERM end no other way."""
    for process in processes:
        with suppress(ValueError):  # it was closed
            process.kill()
