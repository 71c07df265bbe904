"""Collection that goes on while the update runs (`trainer.buffer_type: vla`), and its correction for stale weights.

Workers collect with the weights they last got, while the main process updates on the rollouts before. What arrives is
therefore a little off-policy, and is treated as such:

- every transition carries the version of the weights that acted (`policy_version`), which reached the worker together
  with them, between two steps; transitions staler than a limit are thrown away, and staleness is reported;
- log-probabilities and values are computed anew under the current weights, so that PPO's ratio starts at 1 around the
  current policy (a decoupled objective: Hilton et al. 2022, https://arxiv.org/abs/2110.00641);
- advantages are V-trace's, importance-weighted from the acting to the current policy (Espeholt et al. 2018,
  https://arxiv.org/abs/1802.01561). With no staleness they are GAE's, exactly.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.collectors import MultiAsyncCollector
from torchrl.envs import EnvBase

from research.config import PPOConfig
from research.schema import ACTION, LOG_PROB, VALUE, check_finite
from research.training.rollout import POLICY_VERSION, CollectingPolicy, Policy, RolloutCollector, next_values

_SHARED_MEMORY = "/dev/shm"  # a folder that is memory, where there is one
RHO_BAR, C_BAR = 1.0, 1.0  # where importance weights are cut off, as in the V-trace paper


class AsynchronousRollouts:
    """As `research.training.rollout.Rollouts`, from worker processes: a FIFO of `buffer_size` transitions.

    Args:
        make_env: worker number -> that worker's share of the N environments; runs in the worker.
        policy: see `research.training.rollout.Policy`; workers get copies. It also has the loss's `actor` and `critic`.
        num_collectors: worker processes.
        buffer_size: transitions per rollout, N * T.
        cfg: PPO's settings; discount, lambda and micro-batch size are read.
        max_staleness: updates that a transition may lag behind; older ones are thrown away.
        seed: workers draw from streams that differ by worker and by seed.
        env_steps: taken before this collection began, for messages.
    """

    def __init__(
        self,
        make_env: Callable[[int], EnvBase],
        policy: Policy,
        num_collectors: int,
        buffer_size: int,
        cfg: PPOConfig,
        max_staleness: int,
        seed: int,
        env_steps: int = 0,
    ):
        self.actor, self.critic, self.kept_keys = policy.actor, policy.critic, policy.kept_keys
        self.policy = CollectingPolicy(policy, env_steps)
        self.cfg, self.max_staleness, self.buffer_size = cfg, max_staleness, buffer_size
        self.mailbox = WeightMailbox(self.policy)
        copied = copy.deepcopy(self.policy)
        copied.before_step = self.mailbox.deliver
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="weight_updater is None")  # the mailbox sends the weights
            self.collector = MultiAsyncCollector(
                [_EnvMaker(make_env, worker) for worker in range(num_collectors)],
                policy_factory=[_Copy(copied)] * num_collectors,
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
        self.discarded = 0
        self._arriving: Iterator[TensorDictBase] | None = None
        self._fifo: deque[TensorDictBase] = deque()

    def next(self) -> TensorDictBase:
        """The next rollout `[N, T]` that is fresh enough; workers go on meanwhile."""
        self._arriving = self._arriving or iter(self.collector)
        while sum(part.numel() for part in self._fifo) < self.buffer_size:
            part = next(self._arriving)
            if self._staleness(part).max() > self.max_staleness:
                self.discarded += part.numel()
            else:
                self._fifo.append(part)
        rollout = torch.cat(list(self._fifo))
        self._fifo.clear()
        return rollout

    def prepare(self, rollout: TensorDictBase) -> tuple[TensorDictBase, dict[str, float]]:
        """The flat batch that the update reads, see `prepare_stale_batch`, and how stale it is, in updates."""
        staleness = self._staleness(rollout).float()
        batch, metrics = prepare_stale_batch(rollout, self.actor, self.critic, self.cfg, self.kept_keys)
        metrics["rollout/staleness_mean"] = staleness.mean().item()
        metrics["rollout/staleness_max"] = staleness.max().item()
        metrics["rollout/discarded"] = float(self.discarded)
        return batch, metrics

    def _staleness(self, rollout: TensorDictBase) -> Tensor:
        return self.policy.version - rollout[POLICY_VERSION]

    def publish(self) -> None:
        """Give the workers the current weights, under a new version."""
        self.policy.version += 1
        self.mailbox.post(self.policy)

    def state_dict(self) -> dict:
        """Nothing: episodes live in the workers."""
        return {}

    def load_state_dict(self, state: dict) -> bool:
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
    """Builds a worker's policy, in the worker."""

    def __init__(self, policy: CollectingPolicy):
        self.policy = policy

    def __call__(self) -> CollectingPolicy:
        return self.policy


class _EnvMaker:
    """Builds a worker's environment, in the worker."""

    def __init__(self, make_env: Callable[[int], EnvBase], worker: int):
        self.make_env, self.worker = make_env, worker

    def __call__(self) -> EnvBase:
        return self.make_env(self.worker)


def vtrace(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    log_ratio: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """V-trace advantages `vs - V` (Espeholt et al. 2018, equation 1, with lambda in c as in their remark 2).

    Where the acting policy is the current one (`log_ratio` 0), these are GAE's advantages.

    Args:
        reward, value, next_value: float `[N, T, 1]`.
        done, terminated: bool `[N, T, 1]`; a truncated step is done and not terminated.
        log_ratio: log of current over acting probability, `[N, T, 1]`.
        gamma, gae_lambda: discount and lambda.
    """
    ratio = log_ratio.exp()
    delta = ratio.clamp(max=RHO_BAR) * (reward + gamma * next_value * ~terminated - value)
    carry = gamma * gae_lambda * ratio.clamp(max=C_BAR) * ~done
    advantage, running = torch.empty_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + carry[:, t] * running
        advantage[:, t] = running
    return advantage


@torch.no_grad()
def prepare_stale_batch(
    rollout: TensorDictBase,
    actor: TensorDictModuleBase,
    critic: TensorDictModuleBase,
    cfg: PPOConfig,
    kept_keys: Sequence,
) -> tuple[TensorDictBase, dict[str, float]]:
    """As `research.training.rollout.prepare_batch`, for a rollout that older weights collected.

    Args:
        rollout: `[N, T]`.
        actor, critic: of the current policy, as the loss uses them.
        cfg: discount, lambda, and the number of transitions per forward pass.
        kept_keys: see `VLAPolicy.kept_keys`.
    Returns:
        the flat batch `[N * T]`, whose `action_log_prob` and `state_value` are the current policy's; and metrics.
    Raises:
        NonFiniteError: a reward, value or importance weight is not a number.
    """
    flat = rollout.select(*kept_keys, ACTION, LOG_PROB, VALUE).reshape(-1)
    log_probs, values = [], []
    for part in flat.split(cfg.micro_batch_size or len(flat)):
        step = part.copy()
        log_probs.append(actor.get_dist(step).log_prob(step[ACTION]))
        values.append(critic(step)[VALUE])
    log_prob, value = torch.cat(log_probs), torch.cat(values)
    log_ratio = (log_prob - flat[LOG_PROB]).view(*rollout.shape, 1)
    rollout = rollout.copy().set(VALUE, value.view(*rollout.shape, 1))
    after, names = rollout["next"], ("reward", "state_value", "importance weight")
    check_finite(zip(names, (after["reward"], value, log_ratio), strict=True), "in the rollout")
    ends = (after["done"], after["terminated"])
    advantage = vtrace(
        after["reward"], rollout[VALUE], next_values(rollout), *ends, log_ratio, cfg.gamma, cfg.gae_lambda
    )
    flat.update({LOG_PROB: log_prob, VALUE: value, "advantage": advantage.reshape(-1, 1)})
    flat.set("value_target", flat["advantage"] + value)
    ratio = log_ratio.exp()
    metrics = {
        "rollout/importance_weight": ratio.clamp(max=RHO_BAR).mean().item(),
        "rollout/behaviour_kl": (ratio - 1 - log_ratio).mean().item(),
    }
    return flat, metrics
