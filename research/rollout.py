"""Collection: environment + policy -> rollout `[N, T]` -> advantages -> a flat batch for the update.

Values at truncations and at the rollout's end are computed for just those states; everywhere else the next value is the
one that the next step stored. GAE then runs once per rollout and never calls a network.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.objectives.value import GAE

from research.schema import ACTION, LOG_PROB, OBSERVATION, SUCCESS, VALUE, check_finite


class FiniteGuard(TensorDictModuleBase):
    """Runs a policy and stops at the first NaN or infinity in what it reads or does, naming the tensor and the step.

    Args:
        policy: the module that acts.
        num_envs: N, env steps per call.
    """

    def __init__(self, policy: TensorDictModuleBase, num_envs: int):
        super().__init__()
        self.policy, self.num_envs, self.env_steps = policy, num_envs, 0
        self.in_keys, self.out_keys = policy.in_keys, policy.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        when = f"at env step {self.env_steps}"
        observation = tensordict.get(OBSERVATION)
        check_finite(((f"observation {key!r}", observation.get(key)) for key in observation.keys()), when)
        tensordict = self.policy(tensordict)
        check_finite(((key, tensordict.get(key)) for key in (ACTION, LOG_PROB, VALUE)), when)
        self.env_steps += self.num_envs
        return tensordict


def make_collector(env: EnvBase, policy: TensorDictModuleBase, buffer_size: int) -> Collector:
    """A TorchRL collector that yields rollouts `[N, T]` of `buffer_size` = N * T transitions, without end."""
    guard = FiniteGuard(policy, env.batch_size[0])
    return Collector(
        env,
        guard,
        frames_per_batch=buffer_size,
        total_frames=-1,
        trust_policy=True,
        auto_register_policy_transforms=False,
    )


def bootstrap_values(rollout: TensorDictBase, values) -> Tensor:
    """Values of the next states, `[N, T, 1]`, for GAE.

    Args:
        rollout: `[N, T]` with `state_value`, and `observation` and flags under `next`.
        values: function of steps `[B]` (with `observation`) to state values `[B, 1]`; called once, for the states that
            no later step of the rollout evaluated: those at truncations, and those in the last column.
    """
    value = rollout[VALUE]
    terminated, done = rollout["next", "terminated"].squeeze(-1), rollout["next", "done"].squeeze(-1)
    following = torch.zeros_like(value)
    following[:, :-1] = value[:, 1:]
    needs = done.clone()
    needs[:, -1] = True
    needs &= ~terminated
    if needs.any():
        ends = TensorDict({OBSERVATION: rollout["next", OBSERVATION][needs]}, batch_size=[int(needs.sum())])
        following[needs] = values(ends)
    following[terminated] = 0.0
    return following


def prepare_batch(rollout: TensorDictBase, values, gae: GAE, kept_keys: list) -> TensorDictBase:
    """Advantages, and then only what the update reads, flat.

    Args:
        rollout: `[N, T]` from the collector.
        values: see `bootstrap_values`.
        gae: TorchRL's estimator, built with `value_network=None`.
        kept_keys: the policy's own; see `VLAPolicy.kept_keys`.
    Returns:
        `[N * T]` with `action`, `action_log_prob`, `state_value`, `advantage`, `value_target` and `kept_keys`.
    Raises:
        NonFiniteError: a reward, value or advantage is not a number.
    """
    steps = TensorDict(
        {
            VALUE: rollout[VALUE],
            "next": {
                "reward": rollout["next", "reward"],
                "done": rollout["next", "done"],
                "terminated": rollout["next", "terminated"],
                VALUE: bootstrap_values(rollout, values),
            },
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
        self.running_return, self.running_length = state["return"].clone(), state["length"].clone()
