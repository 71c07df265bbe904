"""The policy in a collector: it says which weights acted, and lets no NaN through."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from research.schema import ACTION, LOG_PROB, OBSERVATION, VALUE, check_finite, check_finite_observation
from research.training.algorithm import Acting, Policy

POLICY_VERSION = "policy_version"  # which weights acted: the number of updates that they had seen


class CollectingPolicy(TensorDictModuleBase):
    """A policy at work in a collector: it says which weights acted, and stops at the first NaN or infinity.

    Args:
        policy: see `algorithm.Policy`.
        env_steps: taken before this collection began, for messages.
    Raises:
        NonFiniteError: something that the policy reads or does is not a number; names the tensor and the step.
    """

    act: Acting

    def __init__(self, policy: Policy, env_steps: int = 0):
        super().__init__()
        self.act, self.values, self.look_ahead, self.env_steps = policy.act, policy.values, policy.look_ahead, env_steps
        self.register_buffer("version", torch.zeros((), dtype=torch.int64))
        self.before_step: Callable[[CollectingPolicy], None] | None = None  # in a worker: takes in new weights
        self.worker: int | None = None  # in a worker: its number
        self.kept_keys = [*policy.kept_keys, ACTION, LOG_PROB, VALUE, POLICY_VERSION]
        self.in_keys, self.out_keys = policy.act.in_keys, [*policy.act.out_keys, POLICY_VERSION]

    def forward(self, tensordict: TensorDictBase, ahead: TensorDictBase | None = None) -> TensorDictBase:
        """Act; `ahead` is what `look_ahead` made of these observations, if it did."""
        if self.before_step is not None:
            self.before_step(self)
        when = f"at env step {self.env_steps}"
        check_finite_observation(tensordict.get(OBSERVATION), when)
        tensordict = self.act(tensordict) if ahead is None else self.act.go_on(tensordict.update(ahead))
        check_finite([(key, tensordict.get(key)) for key in (ACTION, LOG_PROB, VALUE)], when)
        version = torch.full(tensordict.batch_size, self.version.item(), device=tensordict.get(ACTION).device)
        return tensordict.set(POLICY_VERSION, version)
