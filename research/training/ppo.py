"""PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347): schedules, value warm-up, and the gradient steps.

The critic's gradient stays in the value head (`policy.critic_gradient: head`, the default) or reaches the trunk as well
(`trunk`): value errors that flow into a shared trunk were measured to destroy a pretrained policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import ClipPPOLoss

from research.config import PolicyGradientConfig, PPOConfig
from research.schema import LOG_PROB, VALUE, check_finite
from research.training.algorithm import Progress
from research.training.clipping import GradientClipping
from research.training.minibatches import minibatches
from research.training.parallel import ALONE, World
from research.training.policy_gradient import PolicyGradient
from research.training.running_statistics import ProprioStatistics, RewardScaling
from research.training.sharding import Sharding

# What of the loss is reported, and as which metric; in this order in every vector of metrics.
MEASURED = {
    "loss_objective": "train/loss_objective",
    "entropy": "train/entropy",
    "kl_approx": "train/approx_kl",
    "clip_fraction": "train/clip_fraction",
    "loss_critic": "train/loss_critic",
}
APPROX_KL = list(MEASURED).index("kl_approx")
Advantages = Callable[[TensorDictBase], tuple[TensorDictBase, dict[str, float]]]


class PPO(PolicyGradient):
    """The algorithm of `experiments/ppo_vla.py`; see `algorithm.Algorithm`.

    Args:
        advantages: `GAEAdvantages`, or `VTraceAdvantages` where older weights collect.
        policy_update: takes the gradient steps.
        cfg: schedules and warm-up are read.
        reward_scaling, proprio: running statistics, where there are any.
    """

    def __init__(
        self,
        advantages: Advantages,
        policy_update: PolicyUpdate,
        cfg: PPOConfig,
        reward_scaling: RewardScaling | None = None,
        proprio: ProprioStatistics | None = None,
    ):
        super().__init__(policy_update, cfg)
        self.advantages, self.reward_scaling, self.proprio = advantages, reward_scaling, proprio

    def prepare(self, rollout: TensorDictBase) -> tuple[TensorDictBase, dict[str, float]]:
        """The flat batch `[N * T]` with advantages and value targets, and metrics of how it was made."""
        return self.advantages(rollout if self.reward_scaling is None else self.reward_scaling(rollout))

    def update(self, batch: TensorDictBase, progress: Progress) -> dict[str, float]:
        """Set the learning rates, take the gradient steps, train the value head alone while it warms up."""
        self.set_learning_rates(progress)
        explained = explained_variance(batch[VALUE], batch["value_target"], self.policy_update.world)
        metrics = self.policy_update(batch, value_only=progress.iteration < self.cfg.value_warmup_iterations)
        if self.proprio is not None:
            self.proprio(batch)
        return metrics | {"train/explained_variance": explained}

    def state_dict(self) -> dict:
        """Also the statistics of rewards; those of observations are the model's."""
        scaling = {} if self.reward_scaling is None else {"reward_scaling": self.reward_scaling.state_dict()}
        return super().state_dict() | scaling

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if self.reward_scaling is not None and "reward_scaling" in state:  # else it was off in the run until now
            self.reward_scaling.load_state_dict(state["reward_scaling"])


class PolicyUpdate:
    """`n_epochs` passes over a batch in shuffled minibatches.

    Args:
        loss: `ClipPPOLoss` on the policy's modules.
        optimizer: over `freezing.parameter_groups`.
        cfg: epochs, sizes, clipping.
        value_parameters: the parameters that only the value depends on.
        critic_apart: give the critic's gradient to them alone, by a backward pass of its own. Needed where it should
            stay in the value head and does not end there by itself (`agents.critic.detach_value_head`).
        world: the processes that take the same steps, each on its rows; `cfg.batch_size` is a rank's share.
        shard: makes a `sharding.Sharding` of model and optimizer, at the first update; None: every process has all.
    """

    also_measured: ClassVar[dict[str, str]] = {}  # further terms of the loss, as in MEASURED

    def __init__(
        self,
        loss: ClipPPOLoss,
        optimizer: torch.optim.Optimizer,
        cfg: PolicyGradientConfig,
        value_parameters: Sequence[nn.Parameter] = (),
        critic_apart: bool = False,
        world: World = ALONE,
        shard: Callable[[], Sharding] | None = None,
    ):
        self.loss, self.optimizer, self.cfg, self.world = loss, optimizer, cfg, world
        self.value_parameters, self.critic_apart = list(value_parameters), critic_apart
        self.shard, self.sharding = shard, None
        named = MEASURED | self.also_measured
        self.measured = [name for name in named if name != "loss_critic" or loss.critic_network is not None]
        self.clip = GradientClipping(optimizer, self.value_parameters, cfg.max_grad_norm)
        self.names = [named[name] for name in self.measured] + self.clip.names

    def __call__(self, batch: TensorDictBase, value_only: bool = False) -> dict[str, float]:
        """Take the gradient steps.

        Args:
            batch: flat, `[B]`.
            value_only: train the value head and leave every other weight bit-identical (value warm-up).
        Returns:
            `train/*` metrics, means over the minibatches.
        Raises:
            NonFiniteError: a loss or a gradient is not a number; names it, and the step, which is not taken.
        """
        if self.shard is not None:
            self._divide_weights()
        cfg, totals, count, steps, rows = self.cfg, 0.0, 0, 0, 0
        for minibatch, weight in (part for _ in range(cfg.n_epochs) for part in self._minibatches(batch)):
            measured = self._accumulate(minibatch, value_only, weight)
            measured = self.world.average_gradients(() if self.sharding else self.clip.trainable, measured)
            measured = torch.cat([measured, self.clip()])
            if not math.isfinite(measured.sum()):  # looked at once a step, as a GPU is waited for
                check_finite(zip(self.names, measured, strict=True), f"in gradient step {steps} of the update")
            totals, count = totals + measured, count + 1
            if cfg.target_kl is not None and measured[APPROX_KL].item() > cfg.target_kl:
                self.optimizer.zero_grad(set_to_none=True)  # far enough: this step is not taken
                break
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            steps, rows = steps + 1, rows + len(minibatch)
        if self.sharding is not None:
            self.sharding.gather()
        means = {name: total / count for name, total in zip(self.names, totals.tolist(), strict=True)}
        means |= {"train/gradient_steps": float(steps), "train/epochs": rows / len(batch)}
        return means | {f"train/learning_rate/{g['name']}": g["lr"] for g in self.optimizer.param_groups}

    def _divide_weights(self) -> None:
        if self.sharding is not None:
            self.sharding.divide()
            return
        self.sharding = self.shard()
        self.value_parameters = self.sharding.of(self.value_parameters)
        self.clip = GradientClipping(self.optimizer, self.value_parameters, self.cfg.max_grad_norm, self.world)

    def _minibatches(self, batch: TensorDictBase) -> Iterator[tuple[TensorDictBase, float]]:
        return minibatches(batch, self.cfg.batch_size, self.world, self.cfg.normalize_advantage)

    def _accumulate(self, minibatch: TensorDictBase, value_only: bool, weight: float = 1.0) -> Tensor:
        """Gradients of one minibatch, summed over its micro-batches; returns the means of what `MEASURED` names."""
        size, metrics = self.cfg.micro_batch_size, 0.0
        for micro in minibatch.split(size) if size else [minibatch]:
            share = len(micro) / len(minibatch) * weight  # the mean over ranks is that over all rows
            losses = self.losses(micro)
            self._backward(losses, value_only, share)
            metrics = metrics + share * torch.stack([losses[name].detach() for name in self.measured])
        return metrics

    def losses(self, micro: TensorDictBase) -> TensorDictBase:
        """The loss's terms on some rows."""
        losses = self.loss(micro)
        # TorchRL's mean of -log r, as r - 1 - log r: a tenth of the spread (k3, joschu.net/blog/kl-approx.html).
        losses["kl_approx"] += losses["mean_ratio"] - 1
        if micro[LOG_PROB].dim() == 2:  # the loss has means over the parts of a decision; of a decision are sums
            for name in ("loss_objective", "kl_approx"):
                losses[name] = losses[name] * micro[LOG_PROB].shape[1]
        return losses

    def _backward(self, losses: TensorDictBase, value_only: bool, share: float) -> None:
        policy_loss = sum(losses[n] for n in ("loss_objective", "loss_entropy", "loss_reference") if n in losses.keys())
        value_loss = losses.get("loss_critic", None)
        if not (value_only or self.critic_apart):
            (share * (policy_loss if value_loss is None else policy_loss + value_loss)).backward()
            return
        if self.sharding is not None:  # divided weights are no leaves of the graph
            (share * value_loss).backward()
            for parameter in set(self.clip.trainable) - set(self.value_parameters):
                parameter.grad = None
            return
        torch.autograd.backward(share * value_loss, inputs=self.value_parameters, retain_graph=not value_only)
        if not value_only:
            (share * policy_loss).backward()


@torch.no_grad()
def explained_variance(value: Tensor, target: Tensor, world: World = ALONE) -> float:
    """1 - Var(target - value) / Var(target): 1 is a perfect critic, 0 no better than the mean; 0 for equal targets."""
    (_, error), (_, spread) = world.moments(target - value), world.moments(target)
    return (1 - (error / spread).square()).item() if spread > 0 else 0.0
