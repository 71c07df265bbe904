"""Collection that goes on while the update runs (`trainer.buffer_type: vla`), and its correction for stale weights.

Workers collect with the weights they last got, while the main process updates on the rollouts before. What arrives is
therefore a little off-policy, and is treated as such:

- every transition carries the version of the weights that acted (`policy_version`), which reached the worker together
  with them, between two steps; transitions staler than a limit are thrown away, and staleness is reported;
- log-probabilities and values are computed anew under the current weights, and advantages are V-trace's
  (`vtrace.VTraceAdvantages`).
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import MultiAsyncCollector
from torchrl.envs import EnvBase

from research.training.episodes import EpisodeStatistics
from research.training.rollout import POLICY_VERSION, WORKER, CollectingPolicy, Policy, RolloutCollector

_SHARED_MEMORY = "/dev/shm"  # a folder that is memory, where there is one


class AsynchronousRollouts:
    """As `rollout.Rollouts`, from worker processes: a FIFO of `buffer_size` transitions.

    Args:
        make_env: worker number -> that worker's share of the N environments; runs in the worker.
        num_envs: N.
        policy: see `rollout.Policy`; workers get copies.
        num_collectors: worker processes.
        buffer_size: transitions per rollout, N * T.
        max_staleness: updates that a transition may lag behind; older ones are thrown away.
        seed: workers draw from streams that differ by worker and by seed.
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
    ):
        self.policy = CollectingPolicy(policy)
        self.max_staleness, self.buffer_size, self.share = max_staleness, buffer_size, num_envs // num_collectors
        self.episodes = EpisodeStatistics(num_envs)
        self.mailbox = WeightMailbox(self.policy)
        copied = copy.deepcopy(self.policy)
        copied.before_step = self.mailbox.deliver
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="weight_updater is None")  # the mailbox sends the weights
            self.collector = MultiAsyncCollector(
                [_EnvMaker(make_env, worker) for worker in range(num_collectors)],
                policy_factory=[_Copy(copied, worker) for worker in range(num_collectors)],
                collector_class=RolloutCollector,
                frames_per_batch=buffer_size // num_collectors,
                total_frames=-1,
                trust_policy=True,
                use_buffers=False,
                num_threads=torch.get_num_threads(),
                num_sub_threads=1,
                auto_register_policy_transforms=False,
            )
        self.collector.set_seed(seed)
        self._staleness = torch.zeros(0)  # of the last rollout's transitions, in updates
        self._discarded = 0
        self._arriving: Iterator[TensorDictBase] | None = None
        self._fifo: deque[TensorDictBase] = deque()

    def next(self) -> TensorDictBase:
        """The next rollout `[N, T]` that is fresh enough; workers go on meanwhile."""
        self._arriving = self._arriving or iter(self.collector)
        while sum(part.numel() for part in self._fifo) < self.buffer_size:
            part = next(self._arriving)
            first = self.share * int(part[WORKER][0, 0])
            self.episodes.observe(
                part.select("next").to("cpu"), slice(first, first + self.share)
            )  # also of what is thrown away
            if self._lag(part).max() > self.max_staleness:
                self._discarded += part.numel()
            else:
                self._fifo.append(part)
        rollout = torch.cat(list(self._fifo))
        self._fifo.clear()
        self._staleness = self._lag(rollout).float()
        return rollout

    def metrics(self) -> dict[str, float]:
        """Of the episodes that ended since this was last asked, and how stale the last rollout is, in updates."""
        return self.episodes.metrics() | {
            "rollout/staleness_mean": self._staleness.mean().item(),
            "rollout/staleness_max": self._staleness.max().item(),
            "rollout/discarded": float(self._discarded),
        }

    def _lag(self, rollout: TensorDictBase) -> Tensor:
        return self.policy.version - rollout[POLICY_VERSION]

    def publish(self) -> None:
        """Give the workers the current weights, under a new version."""
        self.policy.version += 1
        self.mailbox.post(self.policy)

    def state_dict(self) -> dict:
        """Nothing: episodes live in the workers."""
        return {}

    def load_state_dict(self, state: dict, env_steps: int) -> bool:
        """False: episodes start anew."""
        self.publish()  # the weights that were loaded
        return False

    def shutdown(self) -> None:
        """Stop the workers."""
        self.collector.shutdown()
        self.mailbox.remove()


class WeightMailbox:
    """The latest weights, in memory that all processes of a machine share, to be taken whole or not at all.

    TorchRL's own weight exchange writes into the memory that a worker's policy is computing with: a step taken at that
    moment mixes old weights and new ones. Here a worker copies, between two steps, what was posted, and looks at the
    two counters around it to see that nothing was written meanwhile (a sequence lock).

    Args:
        policy: whose trainable weights and version are posted.
    """

    def __init__(self, policy: CollectingPolicy):
        self.folder = tempfile.mkdtemp(
            prefix="vla-weights-", dir=_SHARED_MEMORY if os.path.isdir(_SHARED_MEMORY) else None
        )
        contents = {str(i): w.cpu() for i, w in enumerate(_exchanged(policy))}
        contents |= {"begun": torch.zeros((), dtype=torch.int64), "done": torch.zeros((), dtype=torch.int64)}
        self._contents = TensorDict(contents).memmap(self.folder)

    def post(self, policy: CollectingPolicy) -> None:
        """Replace the weights by the policy's."""
        self._contents["begun"].add_(1)
        for i, weight in enumerate(_exchanged(policy)):
            self._contents[str(i)].copy_(weight)
        self._contents["done"].copy_(self._contents["begun"])

    def deliver(self, policy: CollectingPolicy) -> None:
        """Give a worker's policy what was posted since it last looked, unless it is being written just now."""
        done = self._contents["done"].item()
        if done == getattr(self, "_taken", 0):
            return
        weights = _exchanged(policy)
        copies = [self._contents[str(i)].clone() for i in range(len(weights))]
        if self._contents["begun"].item() != done:
            return
        for weight, new in zip(weights, copies, strict=True):
            weight.copy_(new)
        self._taken = done

    def __getstate__(self) -> dict:
        return {"folder": self.folder}

    def __setstate__(self, state: dict) -> None:
        self.folder = state["folder"]
        self._contents = TensorDict.load_memmap(self.folder)

    def remove(self) -> None:
        """Free the memory."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _exchanged(policy: CollectingPolicy) -> list[Tensor]:
    """What changes from update to update: trainable weights, and the version."""
    return [*(p.data for p in policy.parameters() if p.requires_grad), policy.version]


class _Copy:
    """Builds a worker's policy, in the worker; it marks what it collects with the worker's number."""

    def __init__(self, policy: CollectingPolicy, worker: int):
        self.policy, self.worker = policy, worker

    def __call__(self) -> CollectingPolicy:
        self.policy.worker = self.worker
        return self.policy


class _EnvMaker:
    """Builds a worker's environment, in the worker."""

    def __init__(self, make_env: Callable[[int], EnvBase], worker: int):
        self.make_env, self.worker = make_env, worker

    def __call__(self) -> EnvBase:
        return self.make_env(self.worker)
