"""What algorithms that take gradient steps on a policy share: their schedules of learning rates, and what they save."""

from __future__ import annotations

from typing import TYPE_CHECKING

from research.config import PolicyGradientConfig
from research.training.algorithm import Progress
from research.training.sharding import whole

if TYPE_CHECKING:
    from research.training.ppo import PolicyUpdate


class PolicyGradient:
    """See `algorithm.Algorithm`; a subclass prepares batches and updates.

    Args:
        policy_update: takes the gradient steps.
        cfg: its schedules are read.
    """

    def __init__(self, policy_update: PolicyUpdate, cfg: PolicyGradientConfig):
        self.policy_update, self.cfg = policy_update, cfg

    def set_learning_rates(self, progress: Progress) -> None:
        """Learning rates of an iteration: they rise, and fall to 0, if so configured.

        They rise once the value warm-up is over, when the policy begins to move.
        """
        moving = progress.iteration - self.cfg.value_warmup_iterations
        factor = 1.0 if moving < 0 else min(1.0, (moving + 1) / max(1, self.cfg.lr_warmup_iterations))
        if self.cfg.anneal_lr:
            factor *= 1.0 - progress.fraction
        for group in self.policy_update.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def state_dict(self) -> dict:
        """The optimizer's, whole; where weights are divided, all processes have to ask for it."""
        return whole(self.policy_update.optimizer.state_dict())

    def whole(self, weights: dict) -> dict:
        """A model's weights, put together where processes divide them; all of those have to ask for it."""
        sharding = self.policy_update.sharding
        if sharding is None:
            return weights
        weights = whole(weights)
        sharding.gather()  # asked for its weights, a model takes them apart
        return weights

    def load_state_dict(self, state: dict) -> None:
        optimizer = self.policy_update.optimizer
        configured = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, own in zip(optimizer.param_groups, configured, strict=True):
            group.update(own, initial_lr=own.get("initial_lr", own["lr"]))  # as this run is configured
