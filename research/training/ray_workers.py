"""Workers on any machine that Ray knows (`trainer.collector: ray`); one that is lost is replaced, and the run goes on.

They are the actors of TorchRL's `RayCollector`, which makes them, finds places for them and ends them. Their rollouts
are asked for here, and not through its iterator: that asks a worker for another only when the main process comes back
for one, so that nobody collects while the update runs (measured: 0.75 s of collection and 0.6 s of update were 1.37 s);
it waits without limit; and it ends with the first actor that is lost.

What passes between machines: the policy once, at the start; trainable weights once per update, into Ray's object store,
from where a machine fetches them once for all of its workers; rollouts, as the update reads them.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tensordict import TensorDictBase
from torchrl.collectors.distributed import RayCollector
from torchrl.envs import EnvBase

from research.errors import SimulatorFailed, UserError, describe_error
from research.training.algorithm import env_steps_in
from research.training.collecting_policy import CollectingPolicy
from research.training.rollout import RolloutCollector
from research.training.workers import FIRST_S, REPLACED, as_failure, exchanged

log = logging.getLogger(__name__)

PLACE = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}  # of a worker: a core, and not all on one machine
LOST_IN_A_ROW = 3  # times that a worker may be lost without a rollout in between
LOOK_S = 1.0  # between signs of life, and between looks for them
ENDLESS = 10**15  # transitions: RayCollector's -1 ends at once


class RayWorkers:
    """Workers that are actors of Ray, each with one core; see `asynchronous.Workers`. They compute on CPUs.

    A worker is lost when its process or its machine dies, or when it takes no step for a time although it was asked
    for a rollout. Another takes its place, wherever there is a core, with new episodes and the latest weights. What
    an environment or a policy raises is not a loss: it ends the run, as it would everywhere.

    Args:
        make_env, policy, count, share, steps, seed: see `asynchronous.ProcessWorkers`.
        timeout: seconds without a step after which a worker is given up. Its first rollout, in which models compile,
            and finding a place for it, may take `FIRST_S`.
        address: of the cluster to join: auto, or host:port. None starts Ray on this machine.
    Raises:
        UserError: no such cluster, too few cores in it, or a worker cannot start.
    """

    def __init__(
        self,
        make_env: Callable[[int], EnvBase],
        policy: CollectingPolicy,
        count: int,
        share: int,
        steps: int,
        seed: int,
        timeout: float,
        address: str | None = None,
    ):
        self.count, self.timeout, self.device = count, timeout, next(policy.parameters()).device
        self.replaced = 0
        self._seed = seed
        self._pending: dict[ray.ObjectRef, int] = {}  # rollouts that were asked for -> their worker
        self._moved = [0.0] * count  # when a worker was last seen to take a step, or was asked for a rollout
        self._signs = [0] * count
        self._fresh = [True] * count  # no rollout of this actor has arrived
        self._losses = [0] * count  # in a row
        self._speeds: dict[int, float] = {}  # env steps per second
        self._looked = time.monotonic()
        self._started_ray = connect(address, count)
        self.mailbox = RayMailbox(count)
        whole = ray.put(copy.deepcopy(policy).cpu())
        self._env_makers = [_EnvMaker(make_env, worker, self.mailbox) for worker in range(count)]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The policy is not an nn.Module")  # it is made by a factory
                self.collector = RayCollector(
                    self._env_makers,
                    policy_factory=[_PolicyMaker(whole, worker, self.mailbox) for worker in range(count)],
                    collector_class=RayWorker,
                    frames_per_batch=share * steps,
                    total_frames=ENDLESS,
                    trust_policy=True,
                    collector_kwargs=[
                        {"use_buffers": False, "auto_register_policy_transforms": False} for _ in range(count)
                    ],
                    remote_configs=PLACE,
                    weight_sync_schemes={},  # the mailbox sends the weights
                )
                self.collector.set_seed(seed)
        except Exception as error:  # Ray's words for it vary
            reported = self.mailbox.reported()
            self._leave()
            raise UserError(
                f"trainer.collector: a worker of Ray ended while it started: {reported or describe_error(error)}"
            ) from error

    def receive(self) -> tuple[TensorDictBase, bool]:
        """The next rollout; its episodes are cut off from the last where its worker took the place of another."""
        for worker in set(range(self.count)) - set(self._pending.values()):
            self._ask(worker)
        while True:
            self._look()
            ready, _ = ray.wait(list(self._pending), timeout=LOOK_S)
            if not ready:
                continue
            worker = self._pending.pop(ready[0])
            try:
                rollout, speed = ray.get(ready[0], timeout=max(self.timeout, LOOK_S))
            except RayError as error:
                if (failure := self.mailbox.reported()) is not None:
                    raise failure from error
                if isinstance(error, RayTaskError):
                    raise as_failure(worker, error.cause) from error
                self._replace(worker, describe_error(error))
                continue
            cut_off = self._losses[worker] > 0
            self._fresh[worker], self._losses[worker], self._speeds[worker] = False, 0, speed
            self._ask(worker)
            return rollout.to(self.device), cut_off

    def _ask(self, worker: int) -> None:
        self._pending[self.collector.remote_collectors[worker].collect.remote()] = worker
        self._moved[worker] = time.monotonic()

    def _look(self) -> None:
        """Replace workers that stand still: what they were asked for is not there, and no step was taken."""
        now = time.monotonic()
        if now - self._looked < min(LOOK_S, self.timeout / 4):
            return
        self._looked, signs = now, self.mailbox.signs()
        ready, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        for future, worker in list(self._pending.items()):
            limit = max(self.timeout, FIRST_S) if self._fresh[worker] else self.timeout
            if future in ready or signs[worker] != self._signs[worker]:
                self._moved[worker] = now
            elif now - self._moved[worker] > limit:
                del self._pending[future]
                self._replace(worker, f"it took no step for {limit:g} s, which is trainer.worker_timeout")
        self._signs = signs

    def _replace(self, worker: int, why: str) -> None:
        """Make another collector in a worker's place, and ask it for a rollout."""
        self.replaced += 1
        self._losses[worker] += 1
        if self._losses[worker] > LOST_IN_A_ROW:
            raise SimulatorFailed(f"worker {worker} was lost {self._losses[worker]} times in a row: {why}")
        log.warning("worker %d was lost (%s); another takes its place", worker, why)
        actors = self.collector.remote_collectors
        ray.kill(actors[worker])
        options = self.collector.collector_kwargs[worker]
        self.collector.add_collectors([self._env_makers[worker]], 1, None, [options], [PLACE])
        actors[worker] = actors.pop()  # where RayCollector put it
        actors[worker].set_seed.remote(self._seed + self.replaced * self.count + worker)
        self._fresh[worker] = True
        self._ask(worker)

    def post(self, policy: CollectingPolicy) -> None:
        self.mailbox.post(policy)

    def reseed(self, seed: int) -> None:
        self._seed = seed
        self.collector.set_seed(seed)

    def metrics(self) -> dict[str, float]:
        """Env steps per second of each worker while it collected its last rollout, and how many were replaced."""
        speeds = {f"rollout/worker_{i}/env_steps_per_second": speed for i, speed in sorted(self._speeds.items())}
        return speeds | {REPLACED: float(self.replaced)}

    def shutdown(self) -> None:
        with suppress(RayError):  # of actors that are no more
            self.collector.shutdown()
        self._leave()

    def _leave(self) -> None:
        self.mailbox.remove()
        if self._started_ray:
            ray.shutdown()


def connect(address: str | None, workers: int) -> bool:
    """Start Ray on this machine with a core for each worker, or join the cluster at an address.

    Returns:
        whether it did, which it does not in a process that is in a cluster already.
    Raises:
        UserError: there is no such cluster, or it has fewer cores than workers.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise it reports to its makers
    os.environ.setdefault("RAY_worker_niceness", "0")  # otherwise 15, and workers starve beside anything else
    own = {"num_cpus": workers, "include_dashboard": False} if address is None else {}
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)  # where this process finds what it imports
    try:
        ray.init(address or "local", runtime_env={"env_vars": {"PYTHONPATH": path}}, logging_level="error", **own)
    except Exception as error:  # of many classes
        raise UserError(
            f"trainer.ray_address: no cluster of Ray can be joined at {address!r} ({describe_error(error)}); start one "
            "with `ray start --head`, or leave the option out to start Ray on this machine"
        ) from error
    cores = ray.cluster_resources().get("CPU", 0)
    if cores < workers:
        ray.shutdown()
        raise UserError(
            f"trainer.num_collectors: {workers} workers need a core each, but the cluster of Ray has {cores:g}"
        )
    return True


class RayWorker(RolloutCollector):
    """Collects, in an actor of Ray."""

    def collect(self) -> tuple[TensorDictBase, float]:
        """A rollout under the latest weights, and the env steps per second that it was collected at."""
        mailbox = self.policy.before_step.__self__
        try:
            mailbox.deliver(self.policy)
            start = time.perf_counter()
            rollout = self.next()
            return rollout, env_steps_in(rollout) / (time.perf_counter() - start)
        except Exception as error:
            mailbox.report(self.policy.worker, error)
            raise

    def __repr__(self) -> str:
        return "worker"  # begins every line that Ray passes on of what it prints


class RayMailbox:
    """As `workers.WeightMailbox`, between machines: the latest weights one way, signs of life and faults the other.

    Args:
        workers: how many take weights.
    """

    def __init__(self, workers: int):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._box = ray.remote(num_cpus=0, scheduling_strategy=here)(_Box).remote(workers)  # it ends with this machine
        self._signed = 0.0

    def post(self, policy: CollectingPolicy) -> None:
        """Replace the weights by the policy's."""
        self.posted = ray.put([weight.cpu() for weight in exchanged(policy)])
        ray.get(self._box.put.remote(policy.version.item(), [self.posted]))

    def deliver(self, policy: CollectingPolicy) -> None:
        """Give a worker's policy what was posted last. Called once per rollout: it takes a message to and fro."""
        version, posted = ray.get(self._box.get.remote())
        if version != policy.version.item():
            for weight, new in zip(exchanged(policy), ray.get(posted[0]), strict=True):
                weight.copy_(new)

    def sign(self, policy: CollectingPolicy) -> None:
        """Say that a worker takes a step, not more often than anybody looks."""
        if time.monotonic() - self._signed > LOOK_S / 4:
            self._box.sign.remote(policy.worker)
            self._signed = time.monotonic()

    def signs(self) -> list[int]:
        """How often each worker has signed."""
        return ray.get(self._box.signs.remote())

    def report(self, worker: int, error: Exception) -> None:
        """Leave what broke in a worker, for `reported`."""
        ray.get(self._box.report.remote(as_failure(worker, error)))

    def reported(self) -> Exception | None:
        """What broke first in a worker, as what it should end the run."""
        return ray.get(self._box.reported.remote())

    def remove(self) -> None:
        """End the actor, and with it what it holds."""
        ray.kill(self._box)


class _Box:
    """What the actor of a `RayMailbox` holds."""

    def __init__(self, workers: int):
        self.version, self.posted, self.signatures, self.failures = 0, [], [0] * workers, []

    def put(self, version: int, posted: list) -> None:
        self.version, self.posted = version, posted

    def get(self) -> tuple[int, list]:
        return self.version, self.posted

    def sign(self, worker: int) -> None:
        self.signatures[worker] += 1

    def signs(self) -> list[int]:
        return self.signatures

    def report(self, failure: Exception) -> None:
        self.failures.append(failure)

    def reported(self) -> Exception | None:
        return self.failures[0] if self.failures else None


class _PolicyMaker:
    """Builds a worker's policy, in the worker: fetched from the object store, and marked with the worker's number."""

    def __init__(self, policy: ray.ObjectRef, worker: int, mailbox: RayMailbox):
        self.policy, self.worker, self.mailbox = policy, worker, mailbox

    def __call__(self) -> CollectingPolicy:
        policy = ray.get(self.policy)
        policy.worker, policy.before_step = self.worker, self.mailbox.sign
        return policy


class _EnvMaker:
    """Builds a worker's environment, in the worker."""

    def __init__(self, make_env: Callable[[int], EnvBase], worker: int, mailbox: RayMailbox):
        self.make_env, self.worker, self.mailbox = make_env, worker, mailbox

    def __call__(self) -> EnvBase:
        try:
            return self.make_env(self.worker)
        except Exception as error:
            self.mailbox.report(self.worker, error)
            raise
