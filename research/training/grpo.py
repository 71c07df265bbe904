"""Group-relative policy optimisation: PPO's steps with advantages of an episode among others from the same state.

Without a critic. Published as GRPO (Shao et al. 2024, arXiv:2402.03300, equation 4), RLOO (Ahmadian et al. 2024,
arXiv:2402.14740, equation 8) and Dr. GRPO (Liu et al. 2025, arXiv:2503.20783, section 3.2). All decisions of an episode
have its advantage, and the loss is a mean over decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from research.config import GRPOConfig
from research.schema import ACTION, LOG_PROB
from research.training.algorithm import Policy, Progress
from research.training.group_episodes import EPISODE, by_group
from research.training.policy_gradient import PolicyGradient
from research.training.ppo import PolicyUpdate
from research.training.ratio import score_again

REFERENCE = "reference_log_prob"


def group_advantages(returns: Tensor, kind: Literal["grpo", "rloo", "dr_grpo"]) -> Tensor:
    """Advantages `[G, R]` of episodes among those of their group, from returns `[G, R]`; 0 in groups without spread."""
    centred = returns - returns.mean(dim=1, keepdim=True)
    # The mean of equal numbers is off by a rounding, which a division by their deviation would make an advantage of 1.
    centred = torch.where(returns.amax(1, True) > returns.amin(1, True), centred, 0.0)
    if kind == "rloo":  # r - mean of the other R - 1
        return centred * returns.shape[1] / (returns.shape[1] - 1)
    if kind == "grpo":
        return centred / returns.std(dim=1, keepdim=True).clamp(min=1e-6)
    return centred


class GRPO(PolicyGradient):
    """See `algorithm.Algorithm`; for rollouts of `group_episodes.GroupEpisodes`.

    Args:
        policy: see `algorithm.Policy`.
        policy_update: takes the gradient steps.
        cfg: which advantages, schedules.
        reference: the policy that a KL penalty draws to; None without one.
    """

    def __init__(
        self,
        policy: Policy,
        policy_update: PolicyUpdate,
        cfg: GRPOConfig,
        reference: StartingPolicy | None = None,
    ):
        super().__init__(policy_update, cfg)
        self.policy, self.reference = policy, reference

    @torch.no_grad()
    def prepare(self, rollout: TensorDictBase) -> tuple[TensorDictBase, dict[str, float]]:
        """The batch `[M]` with advantages, and metrics of how it was made."""
        cfg, world = self.cfg, self.policy_update.world
        returns = by_group(rollout, cfg.group_size)
        advantages = group_advantages(returns, cfg.advantage).flatten()
        batch = rollout.select(*self.policy.kept_keys, ACTION, LOG_PROB)
        batch.set("advantage", advantages[rollout.get(EPISODE)][:, None])
        rows = cfg.micro_batch_size or cfg.batch_size
        if not self.policy.score_is_exact:
            batch.set(LOG_PROB, score_again(self.policy, batch, rows)[0])
        if self.reference is not None:
            batch.set(REFERENCE, self.reference.log_prob(batch, rows))
        return batch, {"train/groups": float(world.total(len(returns)))}

    def update(self, batch: TensorDictBase, progress: Progress) -> dict[str, float]:
        """Set the learning rates, and take the gradient steps."""
        self.set_learning_rates(progress)
        return self.policy_update(batch)


class StartingPolicy:
    """The policy at the start of a run: the same model, with the weights that train as they were then.

    Of a model with fresh low-rank adapters, which add nothing, that is the model without them, heads included.

    Args:
        policy: see `algorithm.Policy`, and with its `model`.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self.start = self._trained()

    def begin_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights that a resumed run started from, whatever this process began with.

        Args:
            weights: of what trains.
        """
        for name, weight in weights.items():
            self.start[name].copy_(weight)

    def _trained(self) -> dict[str, Tensor]:
        named = self.policy.model.named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    def log_prob(self, batch: TensorDictBase, micro_batch_size: int) -> Tensor:
        """Of a batch's decisions, `[B]` (`[B, L]`); the policy's weights are bit for bit what they were, afterwards."""
        now = self._trained()
        self._set(self.start)
        log_prob, _ = score_again(self.policy, batch, micro_batch_size)
        self._set(now)
        return log_prob

    @torch.no_grad()
    def _set(self, weights: dict[str, Tensor]) -> None:
        parameters = dict(self.policy.model.named_parameters())
        for name, weight in weights.items():
            parameters[name].copy_(weight)


class GRPOUpdate(PolicyUpdate):
    """As PPO's, with the KL penalty, if there is one."""

    def __init__(self, *arguments: Any, **options: Any):
        cfg: GRPOConfig = arguments[2]
        self.also_measured = {"kl_reference": "train/kl_reference"} if cfg.kl_coef else {}
        super().__init__(*arguments, **options)

    def losses(self, micro: TensorDictBase) -> TensorDictBase:
        losses = super().losses(micro)
        if self.also_measured:
            log_prob = self.loss.actor_network.evaluated.log_prob(micro[ACTION])
            losses["kl_reference"] = divergence(log_prob, micro[REFERENCE])
            losses["loss_reference"] = self.cfg.kl_coef * losses["kl_reference"]
        return losses


def divergence(log_prob: Tensor, reference: Tensor) -> Tensor:
    """KL divergence from a policy to a reference, in nats a decision, by decisions that the policy drew; their mean.

    r - 1 - log r with r = reference / policy, which is never negative (k3, joschu.net/blog/kl-approx.html). Parts of a
    decision, `[B, L]`, are summed.
    """
    log_ratio = reference - log_prob
    terms = log_ratio.exp() - 1 - log_ratio
    return (terms.sum(dim=-1) if terms.dim() == 2 else terms).mean()
