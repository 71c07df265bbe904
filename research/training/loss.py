"""The loss of policy-gradient updates: TorchRL's `ClipPPOLoss`, and what it lacks of published PPO."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor
from torchrl.objectives import ClipPPOLoss

from research.config import GRPOConfig, PPOConfig


def make_loss(
    actor: ProbabilisticTensorDictSequential, critic: TensorDictModule | None, cfg: PPOConfig | GRPOConfig
) -> ClipPPOLoss:
    """`ClipPPOLoss` on the modules themselves (not on functional copies, so there is one set of weights).

    Without a critic it has no value loss. With `clip_value` that is the larger of the losses of the value and of the
    clipped value, as in PPO2 (https://github.com/openai/baselines).
    """
    make, options = ClipPPOLoss, {}
    if isinstance(cfg, PPOConfig):
        options = {"clip_value": cfg.clip_value}
        if cfg.dual_clip is not None or cfg.huber_delta is not None:
            make, options = BoundedPPOLoss, options | {"dual_clip": cfg.dual_clip, "huber_delta": cfg.huber_delta}
    return make(
        actor,
        critic,
        clip_epsilon=cfg.clip_coef if isinstance(cfg, PPOConfig) else (cfg.clip_low, cfg.clip_high),
        entropy_bonus=True,
        entropy_coeff=cfg.ent_coef,
        critic_coeff=cfg.vf_coef if critic is not None else None,
        loss_critic_type="l2",
        normalize_advantage=False,  # ppo.PolicyUpdate does, over a minibatch whatever its micro-batches
        log_explained_variance=False,  # ppo.PPO.update does, over the rollout
        functional=False,
        **options,
    )


class BoundedPPOLoss(ClipPPOLoss):
    """`ClipPPOLoss` with a bound on what one bad action, or one bad value, contributes.

    Args:
        arguments, options: of `ClipPPOLoss`.
        dual_clip: c; where A < 0 the objective is max(min(r A, clip(r) A), c A) (Ye et al. 2020, equation 5,
            https://arxiv.org/abs/1912.09729). Without it r A falls without end as r grows. None: no bound.
        huber_delta: value errors from which the value loss is linear (Huber 1964, doi:10.1214/aoms/1177703732); None:
            the squared error.
    """

    def __init__(self, *arguments, dual_clip: float | None, huber_delta: float | None, **options):
        if huber_delta is not None:
            # TorchRL's Huber loss has delta 1: that of delta d is d^2 times it, at values divided by d.
            options |= {"loss_critic_type": "smooth_l1", "critic_coeff": options["critic_coeff"] * huber_delta**2}
            options["clip_value"] = options["clip_value"] and options["clip_value"] / huber_delta
        super().__init__(*arguments, reduction="none", **options)
        self.dual_clip, self.huber_delta = dual_clip, huber_delta

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        losses = super().forward(tensordict)
        if self.dual_clip is not None:
            objective, advantage = losses["loss_objective"], tensordict["advantage"]  # [B] or, of L parts, [B, L]
            advantage = advantage if objective.ndim == 2 else advantage.squeeze(-1)
            bounded = torch.minimum(objective, -self.dual_clip * advantage)
            losses["loss_objective"] = torch.where(advantage < 0, bounded, objective)
        return losses.named_apply(lambda name, value: value.mean() if name.startswith("loss_") else value)

    def _critic_loss_inputs(self, *values: Tensor | None) -> tuple[Tensor | None, ...]:
        """Targets, values and stored values (TorchRL's hook for scaling them)."""
        if self.huber_delta is None:
            return values
        return tuple(value if value is None else value / self.huber_delta for value in values)
