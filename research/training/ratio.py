"""The first rollout, looked at before the first update: is the policy that is scored the one that acted?

Then the probability ratio is 1, no action of a continuous distribution comes twice, and the log-probability of an
action is minus the entropy in the mean. The last is for models that draw in one method and score in another: their
ratio is 1 whatever they draw, as both sides of it are what the scoring method says.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from research.schema import ACTION, LOG_PROB, VALUE
from research.training.algorithm import Policy

FEWEST, CLAMPED = 30, 0.01  # values between the extremes that tell anything; share of extremes that is worth a warning
TOLERANCE = {"off": 1e-3, "bf16": 1e-2}  # of |log ratio|, by trainer.autocast
OWN_DRAWS = ("methods", "fused")  # interfaces of models that draw in one method and score in another
SURE, NOTICED = 6.0, 0.05  # standard errors, and nats, of log-probability over minus entropy that are worth a warning
BEHAVIOUR_TOLERANCE = 0.01  # nats, of a first rollout that the weights of now collected


@torch.no_grad()
def score_again(policy: Policy, batch: TensorDictBase, micro_batch_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[B]` (`[B, L]`) and values `[B, 1]` of stored decisions, as an update would compute them now.

    Args:
        policy: the policy, as the loss uses it.
        batch: flat, `[B]`.
        micro_batch_size: transitions per forward pass; None is all at once.
    """
    log_prob, _, value = _scored(policy, batch, micro_batch_size)
    return log_prob, value


def _scored(policy: Policy, batch: TensorDictBase, micro_batch_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `score_again`, with the entropies `[B]` between the two."""
    log_probs, entropies, values = [], [], []
    for part in batch.split(micro_batch_size or len(batch)):
        step = part.copy()
        distribution = policy.actor.get_dist(step)
        log_probs.append(distribution.log_prob(step[ACTION]))
        entropies.append(distribution.entropy())
        values.append(policy.critic(step)[VALUE])
    return torch.cat(log_probs), torch.cat(entropies), torch.cat(values)


@torch.no_grad()
def largest_log_ratio(policy: Policy, batch: TensorDictBase, micro_batch_size: int | None = None) -> float:
    """The largest |log of scored over stored probability| in a batch that these very weights collected.

    Args:
        policy: the policy, as the loss uses it.
        batch: flat, `[B]`.
        micro_batch_size: transitions per forward pass; None is all at once.
    """
    return _first_look(policy, batch, micro_batch_size)[0]


def _first_look(policy: Policy, batch: TensorDictBase, rows: int | None) -> tuple[float, Tensor, Tensor]:
    """`largest_log_ratio`, and the log-probabilities and entropies that were computed for it."""
    with torch.random.fork_rng():  # a run draws the same numbers, whether or not anyone looks
        log_prob, entropy, _ = _scored(policy, batch, rows)
    return (log_prob - batch[LOG_PROB]).abs().max().item(), log_prob, entropy


def describe_ratio(log_ratio: float, autocast: str) -> str | None:
    """A warning about a ratio that is not 1 at the start, or None where it is near enough."""
    if log_ratio <= TOLERANCE[autocast]:
        return None
    return _not_the_one_that_acted(f"|log ratio| is up to {log_ratio:.3g}, and should be below {TOLERANCE[autocast]:g}")


def describe_behaviour(kl: float) -> str | None:
    """A warning where decisions that were just collected are scored otherwise, by a KL divergence of `kl` nats."""
    if not kl > BEHAVIOUR_TOLERANCE:
        return None
    return _not_the_one_that_acted(
        f"their KL divergence (rollout/behaviour_kl) is {kl:.2g} nats, and should be below {BEHAVIOUR_TOLERANCE:g}"
    )


def _not_the_one_that_acted(distance: str) -> str:
    return (
        f"before the first update the policy that is scored is not the one that acted: {distance}; likely causes are "
        "dropout or batch norm that forward() puts in train mode, an action that is clamped or squashed after it was "
        "drawn, another sampling temperature in evaluate_actions, or weights in half precision"
    )


@torch.no_grad()
def doubts(policy: Policy, batch: TensorDictBase, rows: int, autocast: str, behaviour_kl: float) -> list[str]:
    """What is doubtful in the first batch, a line each.

    Args:
        policy, batch: as for `largest_log_ratio`, `rows` of it at once.
        autocast: `trainer.autocast`.
        behaviour_kl: where the batch's log-probabilities were computed anew, how far they are from those that acted.
    """
    ratio, log_prob, entropy = _first_look(policy, batch, rows)
    told = [describe_ratio(ratio, autocast), describe_behaviour(behaviour_kl)]
    told.append(describe_clamping(clamped_share(batch[ACTION])))
    if policy.interface in OWN_DRAWS:
        told.append(describe_draws(log_prob, entropy))
    return [line for line in told if line]


def describe_draws(log_prob: Tensor, entropy: Tensor) -> str | None:
    """A warning about actions that were drawn from another distribution than that which scores them, or None.

    Over draws the log-probability is minus the entropy in the mean. A hotter or colder draw, a squashed one, or the
    mode in place of a draw, is less or more likely than that.

    Args:
        log_prob, entropy: of the decisions of a first rollout, `[B]`; entropies of 0 are none that a model gave.
    """
    excess = (log_prob + entropy).double()
    if len(excess) < FEWEST or not entropy.any():
        return None
    mean, error = excess.mean().item(), excess.std().item() / len(excess) ** 0.5
    if not abs(mean) > max(SURE * error, NOTICED):
        return None
    return (
        f"before the first update actions are {'more' if mean > 0 else 'less'} likely than draws from the distribution "
        f"that scores them: log_prob is {log_prob.mean().item():.3g} in the mean, where its entropy says "
        f"{-entropy.mean().item():.3g}; likely causes are a mean or mode in place of a draw, another temperature in "
        "drawing than in scoring, an action that is squashed after it was drawn, or an entropy of something else (it "
        "is the sum over the numbers of an action)"
    )


def clamped_share(action: Tensor) -> float:
    """The share of action components that lie exactly at their lowest or highest value, where others never repeat.

    A continuous distribution draws no number twice, so these were clamped after they were drawn. A model that scores
    its clamped actions has a ratio of 1, and yet a density that is not the one that acted.

    Args:
        action: `[B, A]`, or `[B, H, A]`.
    Returns:
        of the component that has most of them; 0 where values in between repeat too (tokens), or are few.
    """
    largest = 0.0
    for values in action.flatten(1).T:  # [B]
        edge = (values == values.min()) | (values == values.max())
        between = values[~edge]
        if len(between) >= FEWEST and len(between.unique()) > 0.99 * len(between):
            largest = max(largest, (edge.sum().item() - 2) / len(values))
    return largest


def describe_clamping(share: float) -> str | None:
    """A warning about actions that were clamped after they were drawn, or None where there are hardly any."""
    if share < CLAMPED:
        return None
    return (
        f"before the first update {share:.0%} of one action component lie exactly at its lowest or highest value, as "
        "if forward() clamped what it drew: log-probabilities are then not those of the policy that acted; return what "
        "was drawn, the environment clamps it"
    )


FAR = 1.0  # nats; updates that learn stay below 0.1


def describe_jump(approx_kl: float, env_steps: int) -> str | None:
    """A warning about an update that moved the policy far from the one that collected, or None where it did not.

    Such an update can end a policy that had learned, at once and for good: one that never succeeds has no advantages.
    """
    if not approx_kl > FAR:
        return None
    return (
        f"the update at {env_steps:,} env steps moved the policy by a KL of {approx_kl:.2g} nats (train/approx_kl), "
        "where 0.1 is much: look whether it still succeeds; let rates rise over the first iterations "
        "(algorithm.cfg.lr_warmup_iterations), or lower algorithm.cfg.learning_rate"
    )
