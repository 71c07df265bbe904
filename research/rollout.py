"""Collection: environment + policy -> rollout `[N, T]` -> advantages -> a flat batch for the update.

What a rollout keeps of a step is decided here: what the update reads and nothing else. Observations that only frozen
stages read are gone as soon as those stages have run, and next observations once they have been valued, which happens
for the few states that no later step of the rollout values: those at truncations, and those at the rollout's end. GAE
then runs once per rollout and never calls a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.objectives.value import GAE

from research.schema import ACTION, LOG_PROB, OBSERVATION, SUCCESS, VALUE, check_finite, with_text_as

FINAL_VALUE = "final_value"  # under "next": the next state's value where no later step of the rollout holds it, else 0
POLICY_VERSION = "policy_version"  # which weights acted: the number of updates that they had seen


class Policy(Protocol):
    """What collection needs of a policy; `agents.policy.VLAPolicy` is one."""

    act: TensorDictModuleBase
    kept_keys: list

    def values(self, steps: TensorDictBase) -> Tensor:
        """State values `[B, 1]` of the observations in `steps` `[B]`."""


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
        self.act, self.values, self.env_steps = policy.act, policy.values, env_steps
        self.register_buffer("version", torch.zeros((), dtype=torch.int64))
        self.before_step: Callable[[CollectingPolicy], None] | None = None  # in a worker: takes in new weights
        self.kept_keys = [*policy.kept_keys, ACTION, LOG_PROB, VALUE, POLICY_VERSION]
        self.in_keys, self.out_keys = policy.act.in_keys, [*policy.act.out_keys, POLICY_VERSION]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self.before_step is not None:
            self.before_step(self)
        when = f"at env step {self.env_steps}"
        observation = tensordict.get(OBSERVATION)
        check_finite(((f"observation {key!r}", observation.get(key)) for key in observation.keys()), when)
        tensordict = self.act(tensordict)
        check_finite(((key, tensordict.get(key)) for key in (ACTION, LOG_PROB, VALUE)), when)
        count = tensordict.batch_size[0]
        self.env_steps += count
        return tensordict.set(POLICY_VERSION, self.version.expand(count).clone())


class RolloutEnv(TransformedEnv):
    """An environment as a collector sees it: its steps keep what the update reads, and the values of final states.

    Those values are computed once per rollout, in one batch, when its last step has been taken.

    Args:
        env: the environment, batch `[N]`.
        steps: T, steps per rollout.
    """

    def __init__(self, env: EnvBase, steps: int):
        super().__init__(env)
        self.steps, self.taken = steps, 0
        self.policy: CollectingPolicy | None = None  # set by RolloutCollector
        self._final: list[tuple[Tensor, Tensor, TensorDictBase]] = []

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        step, following = self.base_env.step_and_maybe_reset(tensordict)
        after = step.get("next")
        self.taken += 1
        last = self.taken == self.steps
        ends = torch.ones_like(after.get("done")) if last else after.get("done")
        rows = (ends & ~after.get("terminated")).squeeze(-1).nonzero().squeeze(-1)
        value = torch.zeros_like(ends, dtype=torch.float32)
        if len(rows):
            self._final.append((value, rows, after.get(OBSERVATION)[rows]))
        if last:
            self._value_final_states()
        kept = after.select("reward", "done", "terminated", "truncated", SUCCESS, strict=False)
        # The collector keeps what it gave, of which an environment may have stepped a copy.
        for recorded in (step, tensordict):
            recorded.select(*self.policy.kept_keys, inplace=True)
            if OBSERVATION in recorded.keys():
                recorded.set(OBSERVATION, with_text_as(torch.uint8, recorded).get(OBSERVATION))
        return step.set("next", kept.set(FINAL_VALUE, value)), following

    def _value_final_states(self) -> None:
        """Write the values into the tensors that the steps of this rollout hold."""
        if self._final:
            observations = torch.cat([o for _, _, o in self._final])
            values = self.policy.values(TensorDict({OBSERVATION: observations}, observations.batch_size))
            for (value, rows, _), part in zip(
                self._final, values.split([len(rows) for _, rows, _ in self._final]), strict=True
            ):
                value[rows] = part
        self._final, self.taken = [], 0


class RolloutCollector(Collector):
    """TorchRL's collector over a `RolloutEnv`, which values states with the very policy that acts.

    Where it runs, in a worker too, it records the steps that the environment has reduced, and not copies made before.
    """

    def __init__(
        self, create_env_fn: EnvBase | Callable[[], EnvBase], policy: CollectingPolicy | None = None, **options
    ):
        env = create_env_fn if isinstance(create_env_fn, EnvBase) else create_env_fn()
        # A collector that stores elsewhere than the environment is, or on no device, steps a copy and records what it
        # copied whole. Not `device`: on a GPU it would act with a copy of the policy, because the version is on the
        # CPU, and that copy gets no versions and takes no weights. Trajectory ids it would seek in what a step dropped.
        options |= {"storing_device": env.device, "track_traj_ids": False}
        super().__init__(env, policy, **options)
        self.env.policy = self.policy


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
            RolloutEnv(env, buffer_size // env.batch_size[0]),
            self.policy,
            frames_per_batch=buffer_size,
            total_frames=-1,
            trust_policy=True,
            use_buffers=False,
            auto_register_policy_transforms=False,
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
        returns, lengths = [], []
        for t in range(rollout.batch_size[1]):
            self.running_return += reward[:, t]
            self.running_length += 1
            ended = done[:, t]
            returns.append(self.running_return[ended])
            lengths.append(self.running_length[ended])
            self.running_return = torch.where(ended, 0.0, self.running_return)
            self.running_length = torch.where(ended, 0.0, self.running_length)
        if not done.any():
            return {}
        metrics = {
            "rollout/return": torch.cat(returns).mean().item(),
            "rollout/episode_length": torch.cat(lengths).mean().item(),
            "rollout/episodes": float(done.sum()),
        }
        if SUCCESS in after.keys():
            metrics["rollout/success_rate"] = after[SUCCESS].squeeze(-1)[done].float().mean().item()
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        return {"return": self.running_return, "length": self.running_length}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.running_return.copy_(state["return"])
        self.running_length.copy_(state["length"])
