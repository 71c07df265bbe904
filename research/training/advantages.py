"""Advantages: from a rollout `[N, T]` to the flat batch `[N * T]` that an update reads."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives.value import GAE

from research.schema import ACTION, LOG_PROB, VALUE, check_finite
from research.training.algorithm import Policy
from research.training.ratio import score_again
from research.training.rollout import FINAL_VALUE


class GAEAdvantages:
    """Generalized advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438), by TorchRL.

    It reads the values that were stored while collecting, runs once per rollout, and calls no network: but for that of
    a policy whose score is not exact, whose decisions are scored once more, so that PPO's ratio starts at 1.

    Args:
        policy: whose `kept_keys` the update reads.
        gamma, gae_lambda: discount per decision, and lambda.
        micro_batch_size: transitions per forward pass, where there is one; None is all at once.
    """

    def __init__(self, policy: Policy, gamma: float, gae_lambda: float, micro_batch_size: int | None = None):
        self.policy, self.micro_batch_size = policy, micro_batch_size
        self.gae = GAE(gamma=gamma, lmbda=gae_lambda, value_network=None)

    def __call__(self, rollout: TensorDictBase) -> tuple[TensorDictBase, dict[str, float]]:
        """Advantages beside what the update reads.

        Args:
            rollout: `[N, T]` from the collector.
        Returns:
            `[N * T]` with `action`, `action_log_prob`, `state_value`, `advantage`, `value_target` and `kept_keys`.
        Raises:
            NonFiniteError: a reward, value or advantage is not a number.
        """
        steps = TensorDict(
            {
                VALUE: rollout[VALUE],
                "next": rollout["next"].select("reward", "done", "terminated").set(VALUE, next_values(rollout)),
            },
            batch_size=rollout.batch_size,
        )
        check_finite([("reward", steps["next", "reward"]), ("state_value", steps["next", VALUE])], "in the rollout")
        self.gae(steps)
        batch = rollout.select(*self.policy.kept_keys, ACTION, LOG_PROB, VALUE)
        batch.set("advantage", steps["advantage"]).set("value_target", steps["value_target"])
        batch = batch.reshape(-1)
        if not self.policy.score_is_exact:
            batch.set(LOG_PROB, score_again(self.policy, batch, self.micro_batch_size)[0])
        return batch, {}


def next_values(rollout: TensorDictBase) -> Tensor:
    """Values of the next states, `[N, T, 1]`: the next step's own, or the final state's; 0 after a termination."""
    value, done = rollout[VALUE], rollout["next", "done"]
    following = rollout["next", FINAL_VALUE].clone()
    following[:, :-1] = torch.where(done[:, :-1], following[:, :-1], value[:, 1:])
    return following
