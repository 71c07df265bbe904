"""Which parts of a decision have a probability ratio of their own: the chunk, its actions, or their numbers.

A decision is H actions of A numbers. PPO clips the ratio of what has one: of the whole chunk, by default. Where the
model gives actions or numbers probabilities one after the other (autoregressive tokens) or independently, each of them
can have its own, which one large ratio then does not clip away for the others. The product of the ratios is that of the
chunk at every level.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.distributions import Distribution, Independent

from agents.action_heads import ActionTokens
from research.errors import UserError

RatioLevel = Literal["chunk", "action", "token"]
LEVELS: tuple[RatioLevel, ...] = ("chunk", "action", "token")


def at_level(log_probs: Tensor, level: RatioLevel) -> Tensor:
    """The log-probabilities of a decision's parts, from those of every number, `[*B, H, A]`.

    Returns:
        `[*B]` of the chunk; `[*B, H]`, one per action; or `[*B, H * A]`, one per number.
    """
    if level == "chunk":
        return log_probs.sum(dim=(-2, -1))
    return log_probs.sum(dim=-1) if level == "action" else log_probs.flatten(-2)


def log_prob_at(distribution: Distribution, action: Tensor, level: RatioLevel) -> Tensor:
    """The log-probabilities of a decision's parts, under a distribution over actions `[B, A]` or chunks `[B, H, A]`.

    Raises:
        UserError: the distribution is one of whole actions, which has no log-probability of each number.
    """
    if level == "chunk":
        return distribution.log_prob(action)
    if isinstance(distribution, ActionTokens):
        each = distribution.token_log_prob(action)
    elif isinstance(distribution, Independent):
        each = distribution.base_dist.log_prob(action)
    else:
        each = None
    if each is None or each.shape != action.shape:
        raise UserError(
            f"policy.ratio_level: {level} needs the probability of each number of an action, which a "
            f"{type(distribution).__name__} does not have; set it to chunk"
        )
    return at_level(each if len(distribution.event_shape) == 2 else each[..., None, :], level)


def set_level(contract: Any, level: RatioLevel, name: str) -> None:
    """Let a model say the log-probabilities of these parts from now on.

    Raises:
        UserError: it cannot; `name` is the model's class in the message.
    """
    offered = getattr(contract, "ratio_levels", ("chunk",))
    if level not in offered:
        raise UserError(
            f"policy.ratio_level: {name} has a log-probability of each {' or '.join(offered)}, and not of each {level}"
        )
    contract.ratio_level = level
