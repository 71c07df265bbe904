"""The probability ratio before the first update: 1, if the policy that is scored is the one that acted."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from research.schema import ACTION, LOG_PROB
from research.training.algorithm import Policy

TOLERANCE = {"off": 1e-3, "bf16": 1e-2}  # of |log ratio|, by trainer.autocast


@torch.no_grad()
def largest_log_ratio(policy: Policy, batch: TensorDictBase, micro_batch_size: int | None = None) -> float:
    """The largest |log of scored over stored probability| in a batch that these very weights collected.

    Args:
        policy: the policy, as the loss uses it.
        batch: flat, `[B]`.
        micro_batch_size: transitions per forward pass; None is all at once.
    """
    largest = 0.0
    with torch.random.fork_rng():  # a run draws the same numbers, whether or not anyone looks
        for part in batch.split(micro_batch_size or len(batch)):
            log_prob = policy.actor.get_dist(part.copy()).log_prob(part[ACTION])
            largest = max(largest, (log_prob - part[LOG_PROB]).abs().max().item())
    return largest


def describe_ratio(log_ratio: float, autocast: str) -> str | None:
    """A warning about a ratio that is not 1 at the start, or None where it is near enough."""
    if log_ratio <= TOLERANCE[autocast]:
        return None
    return (
        f"before the first update the policy that is scored is not the one that acted: |log ratio| is up to "
        f"{log_ratio:.3g}, and should be below {TOLERANCE[autocast]:g}; likely causes are dropout or batch norm that "
        "forward() puts in train mode, an action that is clamped or squashed after it was drawn, another sampling "
        "temperature in evaluate_actions, or weights in half precision"
    )
