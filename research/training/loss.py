"""The loss of policy-gradient updates: TorchRL's `ClipPPOLoss`."""

from __future__ import annotations

from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torchrl.objectives import ClipPPOLoss

from research.config import GRPOConfig, PPOConfig


def make_loss(
    actor: ProbabilisticTensorDictSequential, critic: TensorDictModule | None, cfg: PPOConfig | GRPOConfig
) -> ClipPPOLoss:
    """`ClipPPOLoss` on the modules themselves (not on functional copies, so there is one set of weights).

    Without a critic it has no value loss.
    """
    return ClipPPOLoss(
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
    )
