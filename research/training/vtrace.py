"""Advantages of a rollout that older weights collected, corrected for the difference: V-trace."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from research.schema import ACTION, LOG_PROB, VALUE, check_finite
from research.training.advantages import next_values
from research.training.algorithm import Policy
from research.training.parallel import ALONE, World
from research.training.ratio import score_again

RHO_BAR, C_BAR = 1.0, 1.0  # where importance weights are cut off, as in the paper


class VTraceAdvantages:
    """V-trace (Espeholt et al. 2018, https://arxiv.org/abs/1802.01561), for a rollout that older weights collected.

    Log-probabilities and values are computed anew under the current weights, so that PPO's ratio starts at 1 around the
    current policy (a decoupled objective: Hilton et al. 2022, https://arxiv.org/abs/2110.00641). Advantages are
    importance-weighted from the acting to the current policy. With no staleness they are GAE's. Values of the states
    that a rollout, or a truncated episode, ends in are those that the collecting weights gave: their observations are
    not kept.

    Args:
        policy: the current policy, as the loss uses it.
        gamma, gae_lambda: discount per decision, and lambda.
        micro_batch_size: transitions per forward pass; None is all at once.
        world: the processes of the run, over which metrics are means.
    """

    def __init__(
        self,
        policy: Policy,
        gamma: float,
        gae_lambda: float,
        micro_batch_size: int | None = None,
        world: World = ALONE,
    ):
        self.policy, self.gamma, self.gae_lambda, self.micro_batch_size = policy, gamma, gae_lambda, micro_batch_size
        self.world = world

    @torch.no_grad()
    def __call__(self, rollout: TensorDictBase) -> tuple[TensorDictBase, dict[str, float]]:
        """As `advantages.GAEAdvantages`; `action_log_prob` and `state_value` of the batch are the current policy's.

        Raises:
            NonFiniteError: a reward, value or importance weight is not a number.
        """
        flat = rollout.select(*self.policy.kept_keys, ACTION, LOG_PROB, VALUE).reshape(-1)
        log_prob, value = score_again(self.policy, flat, self.micro_batch_size)
        log_ratio = (log_prob - flat[LOG_PROB]).view(*rollout.shape, -1).sum(dim=-1, keepdim=True)  # of all parts
        rollout = rollout.copy().set(VALUE, value.view(*rollout.shape, 1))
        after, names = rollout["next"], ("reward", "state_value", "importance weight")
        check_finite(zip(names, (after["reward"], value, log_ratio), strict=True), "in the rollout")
        ends = (after["done"], after["terminated"])
        advantage = vtrace(
            after["reward"], rollout[VALUE], next_values(rollout), *ends, log_ratio, self.gamma, self.gae_lambda
        )
        flat.update({LOG_PROB: log_prob, VALUE: value, "advantage": advantage.reshape(-1, 1)})
        flat.set("value_target", flat["advantage"] + value)
        ratio = log_ratio.exp()
        measured = {
            "rollout/importance_weight": ratio.clamp(max=RHO_BAR),
            "rollout/behaviour_kl": ratio - 1 - log_ratio,
        }
        return flat, {name: self.world.moments(values)[0].item() for name, values in measured.items()}


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
