"""Collection that goes on while the update runs (`trainer.buffer_type: vla`), and its correction for stale weights.

Workers collect with the weights they last got, while the main process updates on the rollouts before. What arrives is
therefore a little off-policy, and is treated as such:

- every transition carries the version of the weights that acted (`policy_version`), which reached the worker together
  with them, between two steps; transitions staler than a limit are thrown away, and staleness is reported;
- log-probabilities and values are computed anew under the current weights, and advantages are V-trace's
  (`vtrace.VTraceAdvantages`).

Workers are processes of this machine (`ProcessWorkers`), or of any (`ray_workers.RayWorkers`). They are watched: one
that breaks says why, one that dies is noticed within seconds, one that takes no step for a stated time is killed. Of
processes, either ends the run (`SimulatorFailed`), which can be resumed; of Ray's, what is lost is replaced.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import util
from typing import Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.collectors import MultiAsyncCollector
from torchrl.envs import EnvBase

from research.errors import UserError, describe_error
from research.processes import children_hear_nothing, serve_the_main_process
from research.training.algorithm import another_seed, env_steps_in
from research.training.collecting_policy import POLICY_VERSION, CollectingPolicy
from research.training.episodes import EpisodeStatistics
from research.training.parallel import ALONE, World
from research.training.rollout import WORKER, Policy, RolloutCollector
from research.training.workers import REPLACED, WeightMailbox, WorkerWatch, end_now


class Workers(Protocol):
    """Who collects for `AsynchronousRollouts`; made by a call with what `ProcessWorkers` takes."""

    def receive(self) -> tuple[TensorDictBase, bool]:
        """The next rollout `[share, steps]` of whichever worker, and whether its episodes are cut off from the last.

        Raises:
            SimulatorFailed, NonFiniteError: a worker broke, or was lost for good; names it.
        """

    def post(self, policy: CollectingPolicy) -> None:
        """Give workers the policy's trainable weights and version, which they take up together."""

    def reseed(self, seed: int) -> None:
        """Have workers draw from other streams, before the first rollout."""

    def metrics(self) -> dict[str, float]:
        """`rollout/*` of the workers themselves."""

    def shutdown(self) -> None:
        """End all workers."""


class ProcessWorkers:
    """Workers that are processes of this machine.

    Args:
        make_env: worker number -> that worker's environments.
        policy: what workers get copies of.
        count: workers.
        share: environments of each.
        steps: T, of a rollout.
        seed: of the first worker; the others' follow from it.
        timeout: seconds, see `WorkerWatch`.
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
    ):
        self.mailbox = WeightMailbox(policy, count)
        copied = copy.deepcopy(policy)
        copied.before_step = self.mailbox.deliver
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="weight_updater is None")  # the mailbox sends the weights
            self.collector = self._start(
                [_EnvMaker(make_env, worker, self.mailbox) for worker in range(count)],
                policy_factory=[_Copy(copied, worker) for worker in range(count)],
                collector_class=WorkerCollector,
                frames_per_batch=share * steps,
                total_frames=-1,
                trust_policy=True,
                use_buffers=False,
                num_threads=torch.get_num_threads(),
                num_sub_threads=1,
                auto_register_policy_transforms=False,
            )
        # Workers ignore SIGTERM, by which multiprocessing would end them, and wait for them.
        self._end = util.Finalize(self, end_now, args=(self.collector.procs,), exitpriority=10)
        self.watch = WorkerWatch(self.mailbox, self.collector.procs, steps, timeout)
        self.collector.set_seed(seed)
        self._arriving: Iterator[TensorDictBase] | None = None

    def _start(self, *arguments, **options) -> MultiAsyncCollector:
        before = multiprocessing.active_children()
        try:
            with children_hear_nothing():
                return MultiAsyncCollector(*arguments, **options)
        except BaseException as error:  # a Ctrl-C too: workers ignore what multiprocessing would end them by
            end_now([child for child in multiprocessing.active_children() if child not in before])
            reported = self.mailbox.reported()
            self.mailbox.remove()
            if not isinstance(error, Exception):
                raise
            raise UserError(  # torchrl's words for it vary
                f"trainer.buffer_type: a process that collects ended while it started: "
                f"{reported or describe_error(error)}; what it printed is above"
            ) from error

    def receive(self) -> tuple[TensorDictBase, bool]:
        """The next rollout; episodes are never cut off."""
        self._arriving = self._arriving or iter(self.collector)
        try:
            self.watch.wait()
            part = next(self._arriving)
            self.watch.received(int(part[WORKER][0, 0]))
            return part, False
        except Exception as error:  # torchrl says that a process has ended, in several ways
            failure = self.watch.failure()
            end_now(self.collector.procs)
            raise failure from error

    def post(self, policy: CollectingPolicy) -> None:
        self.mailbox.post(policy)

    def reseed(self, seed: int) -> None:
        self.collector.set_seed(seed)

    def metrics(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def shutdown(self) -> None:
        self._end.cancel()
        self.watch.stop()
        with suppress(Exception):  # that workers which were ended do not answer
            self.collector.shutdown()
        end_now(self.collector.procs)
        self.mailbox.remove()


class AsynchronousRollouts:
    """As `rollout.Rollouts`, from workers: a FIFO of `buffer_size` transitions.

    Args:
        make_env: worker number -> that worker's share of the N environments; runs in the worker.
        num_envs: N.
        policy: see `rollout.Policy`; workers get copies.
        num_collectors: workers.
        buffer_size: transitions per rollout, N * T.
        max_staleness: updates that a transition may lag behind; older ones are thrown away.
        seed: workers draw from streams that differ by worker and by seed.
        timeout: seconds in which a worker that is waited for has to take a step.
        start: makes the workers.
        world: the processes of the run, each with workers of its own, which report for themselves; all else is reported
            together.
        task_names: of the environments, whose success is reported of each where there are several.
    Attributes:
        env_steps: control steps that arrived for the last rollout, those of what was thrown away among them.
    """

    def __init__(
        self,
        make_env: Callable[[int], EnvBase],
        num_envs: int,
        policy: Policy,
        num_collectors: int,
        buffer_size: int,
        max_staleness: int,
        seed: int,
        timeout: float = 60.0,
        start: Callable[..., Workers] = ProcessWorkers,
        world: World = ALONE,
        task_names: Sequence[str] = (),
    ):
        self.policy = CollectingPolicy(policy)
        self.max_staleness, self.buffer_size, self.share = max_staleness, buffer_size, num_envs // num_collectors
        self.episodes = EpisodeStatistics(num_envs, task_names=task_names, world=world)
        self.seed, self.world = seed, world
        steps = buffer_size // num_envs
        self.workers = start(make_env, self.policy, num_collectors, self.share, steps, world.own_seed(seed), timeout)
        self._staleness = torch.zeros(0)  # of the last rollout's transitions, in updates
        self._discarded = self.env_steps = 0
        self._fifo: deque[TensorDictBase] = deque()

    def next(self) -> TensorDictBase:
        """The next rollout `[N, T]` that is fresh enough; workers go on meanwhile."""
        self._discarded = self.env_steps = 0
        while sum(part.numel() for part in self._fifo) < self.buffer_size:
            part, cut_off = self.workers.receive()
            first = self.share * int(part[WORKER][0, 0])
            rows = slice(first, first + self.share)
            if cut_off:
                self.episodes.forget(rows)
            self.episodes.observe(part.select("next").to("cpu"), rows)  # also of what is thrown away
            self.env_steps += env_steps_in(part)
            if self._lag(part).max() > self.max_staleness:
                self._discarded += part.numel()
            else:
                self._fifo.append(part)
        rollout = torch.cat(list(self._fifo))
        self._fifo.clear()
        self._staleness = self._lag(rollout).float()
        return rollout

    def metrics(self) -> dict[str, float]:
        """Of the episodes that ended since this was last asked, of workers, and how stale the last rollouts are."""
        staleness, world, of_workers = self._staleness, self.world, self.workers.metrics()
        if REPLACED in of_workers:
            of_workers[REPLACED] = float(world.total(int(of_workers[REPLACED])))
        return self.episodes.metrics() | {
            "rollout/staleness_mean": world.moments(staleness)[0].item(),
            "rollout/staleness_max": float(world.largest(int(staleness.max()))),
            "rollout/discarded": float(world.total(self._discarded)),
            **of_workers,
        }

    def _lag(self, rollout: TensorDictBase) -> Tensor:
        return self.policy.version - rollout[POLICY_VERSION]

    def publish(self) -> None:
        """Give the workers the current weights, under a new version."""
        self.policy.version += 1
        self.workers.post(self.policy)

    def state_dict(self) -> dict:
        """Nothing: episodes live in the workers."""
        return {}

    def load_state_dict(self, state: dict | None, env_steps: int) -> bool:
        """False: episodes start anew."""
        self.workers.reseed(self.world.own_seed(another_seed(self.seed, env_steps)))
        self.publish()  # the weights that were loaded
        return False

    def shutdown(self) -> None:
        """Stop the workers."""
        self.workers.shutdown()


class WorkerCollector(RolloutCollector):
    """As `RolloutCollector`; where its environment or policy breaks, the main process is told why, in one line."""

    def rollout(self) -> TensorDictBase:
        try:
            return super().rollout()
        except Exception as error:
            self.policy.before_step.__self__.report(self.policy.worker, error)
            os._exit(1)  # without a second message, about this process


class _Copy:
    """Builds a worker's policy, in the worker; it marks what it collects with the worker's number."""

    def __init__(self, policy: CollectingPolicy, worker: int):
        self.policy, self.worker = policy, worker

    def __call__(self) -> CollectingPolicy:
        self.policy.worker = self.worker
        return self.policy


class _EnvMaker:
    """Builds a worker's environment, in the worker."""

    def __init__(self, make_env: Callable[[int], EnvBase], worker: int, mailbox: WeightMailbox):
        self.make_env, self.worker, self.mailbox = make_env, worker, mailbox

    def __call__(self) -> EnvBase:
        serve_the_main_process(at_the_end=self.mailbox.remove)
        try:
            return self.make_env(self.worker)
        except Exception as error:
            self.mailbox.report(self.worker, error)
            os._exit(1)
