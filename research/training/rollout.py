"""Collection: environment + policy -> rollout `[N, T]` -> advantages -> a flat batch for the update.

What a rollout keeps of a step is decided here: what the update reads and nothing else. Observations that only frozen
stages read are gone as soon as those stages have run, and next observations once they have been valued, which happens
for the few states that no later step of the rollout values: those at truncations, and those at the rollout's end, with
which the next rollout begins and whose frozen features it takes over. GAE then runs once per rollout and never calls a
network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import set_exploration_type
from torchrl.objectives.value import GAE

from research.schema import ACTION, LOG_PROB, OBSERVATION, SUCCESS, VALUE, check_finite, with_text_as

FINAL_VALUE = "final_value"  # under "next": the next state's value where no later step of the rollout holds it, else 0
KEPT_AFTER = ("reward", "done", "terminated", "truncated", SUCCESS)  # of what is under "next"
POLICY_VERSION = "policy_version"  # which weights acted: the number of updates that they had seen


class Policy(Protocol):
    """What collection needs of a policy; `agents.policy.VLAPolicy` is one."""

    act: TensorDictModuleBase
    kept_keys: list

    def values(self, steps: TensorDictBase) -> Tensor:
        """State values `[B, 1]` of the observations in `steps` `[B]`."""

    def look_ahead(self, steps: TensorDictBase) -> tuple[Tensor, TensorDictBase | None]:
        """As `values`, for observations that will be acted upon next, and what `act.go_on` can go on from then."""


class CollectingPolicy(TensorDictModuleBase):
    """A policy at work in a collector: it says which weights acted, and stops at the first NaN or infinity.

    Args:
        policy: see `Policy`.
        env_steps: taken before this collection began, for messages.
    Raises:
        NonFiniteError: something that the policy reads or does is not a number; names the tensor and the step.
    """

    def __init__(self, policy: Policy, env_steps: int = 0):
        super().__init__()
        self.act, self.values, self.look_ahead, self.env_steps = policy.act, policy.values, policy.look_ahead, env_steps
        self.register_buffer("version", torch.zeros((), dtype=torch.int64))
        self.before_step: Callable[[CollectingPolicy], None] | None = None  # in a worker: takes in new weights
        self.kept_keys = [*policy.kept_keys, ACTION, LOG_PROB, VALUE, POLICY_VERSION]
        self.in_keys, self.out_keys = policy.act.in_keys, [*policy.act.out_keys, POLICY_VERSION]

    def forward(self, tensordict: TensorDictBase, ahead: TensorDictBase | None = None) -> TensorDictBase:
        """Act; `ahead` is what `look_ahead` made of these observations, if it did."""
        if self.before_step is not None:
            self.before_step(self)
        when = f"at env step {self.env_steps}"
        observation = tensordict.get(OBSERVATION)
        check_finite([(f"observation {key!r}", value) for key, value in observation.items()], when)
        tensordict = self.act(tensordict) if ahead is None else self.act.go_on(tensordict.update(ahead))
        check_finite([(key, tensordict.get(key)) for key in (ACTION, LOG_PROB, VALUE)], when)
        count = tensordict.batch_size[0]
        self.env_steps += count
        version = torch.full((count,), self.version.item(), device=tensordict.get(ACTION).device)
        return tensordict.set(POLICY_VERSION, version)


class RolloutCollector(Collector):
    """TorchRL's collector, whose rollouts keep what the update reads, and the values of final states.

    Those values are computed by the very policy that acts, when the last step has been taken. `rollout` replaces
    TorchRL's: policy and environment are on one device, so that no step is copied on its way between them. Options
    that act upon single steps (random first frames, replay buffers, interruption) have no effect.
    """

    def __init__(
        self, create_env_fn: EnvBase | Callable[[], EnvBase], policy: CollectingPolicy | None = None, **options
    ):
        # No `device`: on a GPU the collector would act with a copy of the policy, because the version is on the CPU,
        # and that copy gets no versions and takes no weights. Trajectory ids it would seek in what a step dropped.
        super().__init__(create_env_fn, policy, **{**options, "track_traj_ids": False})
        self._ahead: TensorDictBase | None = None  # frozen features of the states that the next rollout begins with

    @torch.no_grad()
    def rollout(self) -> TensorDictBase:
        """Take T steps in every environment: `[N, T]`."""
        steps, truncated = [], []
        with set_exploration_type(self.exploration_type):
            for t in range(self.frames_per_batch):  # T: TorchRL has divided by N
                acted = self.policy(self._carrier, self._ahead)
                self._ahead = None
                step, self._carrier = self.env.step_and_maybe_reset(acted)
                after = step.get("next")
                rows = (after.get("done") & ~after.get("terminated")).squeeze(-1).nonzero().squeeze(-1)
                if len(rows):
                    truncated.append((t, rows, after.get(OBSERVATION)[rows]))
                kept = with_text_as(torch.uint8, step.select(*self.policy.kept_keys))
                steps.append(kept.set("next", after.select(*KEPT_AFTER, strict=False)))
        rollout = torch.stack(steps, dim=1).refine_names(..., "time")
        rollout["next"].set(FINAL_VALUE, self._final_values(truncated, rollout["next", "done"]))
        return rollout

    def _final_values(self, truncated: list[tuple[int, Tensor, TensorDictBase]], done: Tensor) -> Tensor:
        """`[N, T, 1]` from steps, rows and observations of truncations, and from where the environments are now."""
        values = torch.zeros_like(done, dtype=torch.float32)
        if truncated:
            observations = torch.cat([observation for _, _, observation in truncated])
            found = self.policy.values(TensorDict({OBSERVATION: observations}, observations.batch_size))
            for (t, rows, _), part in zip(truncated, found.split([len(r) for _, r, _ in truncated]), strict=True):
                values[rows, t] = part
        if done[:, -1].all():
            return values
        now = TensorDict({OBSERVATION: self._carrier.get(OBSERVATION)}, self._carrier.batch_size)
        following, self._ahead = self.policy.look_ahead(now)
        values[:, -1] = torch.where(done[:, -1], values[:, -1], following)
        return values


class Rollouts:
    """Rollouts `[N, T]` collected by turns with the update, and what becomes of them before it.

    Args:
        env: batch `[N]`.
        policy: see `Policy`.
        buffer_size: transitions per rollout, N * T.
        gae: TorchRL's estimator, built with `value_network=None`.
        env_steps: taken before this collection began, for messages.
    """

    def __init__(self, env: EnvBase, policy: Policy, buffer_size: int, gae: GAE, env_steps: int = 0):
        self.env, self.gae, self.kept_keys = env, gae, policy.kept_keys
        self.policy = CollectingPolicy(policy, env_steps)
        self.collector = RolloutCollector(
            env,
            self.policy,
            frames_per_batch=buffer_size,
            total_frames=-1,
            trust_policy=True,
            use_buffers=False,
            auto_register_policy_transforms=False,
            return_same_td=True,  # every rollout is a new one
            no_cuda_sync=True,  # all is on one device
        )
        self._arriving: Iterator[TensorDictBase] | None = None

    def next(self) -> TensorDictBase:
        """Collect a rollout."""
        self._arriving = self._arriving or iter(self.collector)
        return next(self._arriving)

    def prepare(self, rollout: TensorDictBase) -> tuple[TensorDictBase, dict[str, float]]:
        """The flat batch that the update reads, see `prepare_batch`, and metrics."""
        return prepare_batch(rollout, self.gae, self.kept_keys), {}

    def publish(self) -> None:
        """Say that the weights have changed."""
        self.policy.version += 1

    def state_dict(self) -> dict:
        """Where the environments and their episodes are."""
        return {"environment": self.env.state_dict(), "carrier": self.collector._carrier.to_dict()}

    def load_state_dict(self, state: dict) -> bool:
        """Go on from there; False where the environment cannot, so that episodes start anew."""
        self.env.load_state_dict(state.get("environment", {}))
        exactly = self.env.resumes_exactly and "carrier" in state
        if exactly:
            carrier = TensorDict.from_dict(state["carrier"], batch_size=self.env.batch_size)
            self.collector._carrier.update(carrier.to(self.env.device))
            self.collector._ahead = None  # of where the environments were before
        return exactly

    def shutdown(self) -> None:
        """Close the environment."""
        self.collector.shutdown()


def next_values(rollout: TensorDictBase) -> Tensor:
    """Values of the next states, `[N, T, 1]`: the next step's own, or the final state's; 0 after a termination."""
    value, done = rollout[VALUE], rollout["next", "done"]
    following = rollout["next", FINAL_VALUE].clone()
    following[:, :-1] = torch.where(done[:, :-1], following[:, :-1], value[:, 1:])
    return following


def prepare_batch(rollout: TensorDictBase, gae: GAE, kept_keys: Sequence) -> TensorDictBase:
    """Advantages, flat, beside what the update reads.

    Args:
        rollout: `[N, T]` from the collector.
        gae: TorchRL's estimator, built with `value_network=None`.
        kept_keys: the policy's own; see `VLAPolicy.kept_keys`.
    Returns:
        `[N * T]` with `action`, `action_log_prob`, `state_value`, `advantage`, `value_target` and `kept_keys`.
    Raises:
        NonFiniteError: a reward, value or advantage is not a number.
    """
    after = rollout["next"]
    steps = TensorDict(
        {
            VALUE: rollout[VALUE],
            "next": after.select("reward", "done", "terminated").set(VALUE, next_values(rollout)),
        },
        batch_size=rollout.batch_size,
    )
    check_finite([("reward", steps["next", "reward"]), ("state_value", steps["next", VALUE])], "in the rollout")
    gae(steps)
    batch = rollout.select(*kept_keys, ACTION, LOG_PROB, VALUE)
    batch.set("advantage", steps["advantage"]).set("value_target", steps["value_target"])
    return batch.reshape(-1)


class EpisodeStatistics:
    """Return, length and success of the episodes that ended in a rollout, across rollout boundaries."""

    def __init__(self, num_envs: int, device: torch.device | str = "cpu"):
        self.running_return = torch.zeros(num_envs, device=device)
        self.running_length = torch.zeros(num_envs, device=device)

    def update(self, rollout: TensorDictBase) -> dict[str, float]:
        """Metrics of a rollout `[N, T]`: empty if no episode ended, without success if the env has no such notion."""
        after = rollout["next"]
        reward, done = after["reward"].squeeze(-1), after["done"].squeeze(-1)
        returns, lengths = [], []  # of the episodes under way, [N] at every step
        for t in range(rollout.batch_size[1]):
            returns.append(self.running_return + reward[:, t])
            lengths.append(self.running_length + 1)
            self.running_return = torch.where(done[:, t], 0.0, returns[-1])
            self.running_length = torch.where(done[:, t], 0.0, lengths[-1])
        ended = done.T  # [T, N]
        episodes = float(ended.sum())
        if not episodes:
            return {}
        metrics = {
            "rollout/return": torch.stack(returns)[ended].mean().item(),
            "rollout/episode_length": torch.stack(lengths)[ended].mean().item(),
            "rollout/episodes": episodes,
        }
        if SUCCESS in after.keys():
            metrics["rollout/success_rate"] = after[SUCCESS].squeeze(-1)[done].float().mean().item()
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        return {"return": self.running_return, "length": self.running_length}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.running_return.copy_(state["return"])
        self.running_length.copy_(state["length"])
