"""PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347): schedules, value warm-up, and the gradient steps.

The critic's gradient stays in the value head (`policy.critic_gradient: head`, the default) or reaches the trunk as well
(`trunk`): value errors that flow into a shared trunk were measured to destroy a pretrained policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import ClipPPOLoss

from research.config import PPOConfig
from research.schema import LOG_PROB, VALUE, check_finite
from research.training.algorithm import Progress

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


class PPO:
    """The algorithm of `experiments/ppo_vla.py`; see `algorithm.Algorithm`.

    Args:
        advantages: `GAEAdvantages`, or `VTraceAdvantages` where older weights collect.
        policy_update: takes the gradient steps.
        cfg: schedules and warm-up are read.
    """

    def __init__(self, advantages: Advantages, policy_update: PolicyUpdate, cfg: PPOConfig):
        self.advantages, self.policy_update, self.cfg = advantages, policy_update, cfg

    def prepare(self, rollout: TensorDictBase) -> tuple[TensorDictBase, dict[str, float]]:
        """The flat batch `[N * T]` with advantages and value targets, and metrics of how it was made."""
        return self.advantages(rollout)

    def update(self, batch: TensorDictBase, progress: Progress) -> dict[str, float]:
        """Set the learning rates, take the gradient steps, train the value head alone while it warms up."""
        self.set_learning_rates(progress)
        explained = explained_variance(batch[VALUE], batch["value_target"])
        metrics = self.policy_update(batch, value_only=progress.iteration < self.cfg.value_warmup_iterations)
        return metrics | {"train/explained_variance": explained}

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
        return self.policy_update.optimizer.state_dict()

    def load_state_dict(self, state: dict) -> None:
        optimizer = self.policy_update.optimizer
        configured = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, own in zip(optimizer.param_groups, configured, strict=True):
            group.update(own, initial_lr=own.get("initial_lr", own["lr"]))  # as this run is configured


class PolicyUpdate:
    """`n_epochs` passes over a batch in shuffled minibatches.

    The value head's gradient and everybody else's are clipped apart: a large return must not shrink the policy's step.

    Args:
        loss: `ClipPPOLoss` on the policy's modules.
        optimizer: over `freezing.parameter_groups`.
        cfg: epochs, sizes, clipping.
        value_parameters: the parameters that only the value depends on.
        critic_apart: give the critic's gradient to them alone, by a backward pass of its own. Needed where it should
            stay in the value head and does not end there by itself (`agents.critic.detach_value_head`).
    """

    def __init__(
        self,
        loss: ClipPPOLoss,
        optimizer: torch.optim.Optimizer,
        cfg: PPOConfig,
        value_parameters: Sequence[nn.Parameter] = (),
        critic_apart: bool = False,
    ):
        self.loss, self.optimizer, self.cfg = loss, optimizer, cfg
        self.value_parameters, self.critic_apart = list(value_parameters), critic_apart
        self.measured = [name for name in MEASURED if name != "loss_critic" or loss.critic_network is not None]
        self.parts = [group["name"] for group in optimizer.param_groups]
        norms = [*(f"train/grad_norm/{part}" for part in self.parts), "train/grad_norm"]
        self.names = [MEASURED[name] for name in self.measured] + norms
        self.trainable = [p for group in optimizer.param_groups for p in group["params"]]
        self._plans: dict[tuple[int, ...], tuple] = {}  # by which tensors have a gradient
        self._foreach = True if self.trainable[0].is_cpu else None  # on a GPU torch chooses so by itself

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
        cfg, totals, count, steps, rows = self.cfg, 0.0, 0, 0, 0
        for minibatch in (m for _ in range(cfg.n_epochs) for m in minibatches(batch, cfg.batch_size)):
            measured = torch.cat([self._accumulate(minibatch, value_only), self._clip()])
            if not math.isfinite(measured.sum()):  # looked at once a step, as a GPU is waited for
                check_finite(zip(self.names, measured, strict=True), f"in gradient step {steps} of the update")
            totals, count = totals + measured, count + 1
            if cfg.target_kl is not None and measured[APPROX_KL].item() > cfg.target_kl:
                self.optimizer.zero_grad(set_to_none=True)  # far enough: this step is not taken
                break
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            steps, rows = steps + 1, rows + len(minibatch)
        means = {name: total / count for name, total in zip(self.names, totals.tolist(), strict=True)}
        means |= {"train/gradient_steps": float(steps), "train/epochs": rows / len(batch)}
        return means | {f"train/learning_rate/{g['name']}": g["lr"] for g in self.optimizer.param_groups}

    def _accumulate(self, minibatch: TensorDictBase, value_only: bool) -> Tensor:
        """Gradients of one minibatch, summed over its micro-batches; returns the means of what `MEASURED` names."""
        if self.cfg.normalize_advantage and len(minibatch) > 1:
            advantage = minibatch["advantage"]
            scale = advantage.std().clamp(min=1e-6)
            minibatch = minibatch.copy().set("advantage", (advantage - advantage.mean()) / scale)
        size, metrics = self.cfg.micro_batch_size, 0.0
        for micro in minibatch.split(size) if size else [minibatch]:
            share = len(micro) / len(minibatch)
            losses = self.loss(micro)
            # TorchRL's mean of -log r, as r - 1 - log r: a tenth of the spread (k3, joschu.net/blog/kl-approx.html).
            losses["kl_approx"] += losses["mean_ratio"] - 1
            if micro[LOG_PROB].dim() == 2:  # the loss has means over the parts of a decision; of a decision are sums
                for name in ("loss_objective", "kl_approx"):
                    losses[name] = losses[name] * micro[LOG_PROB].shape[1]
            self._backward(losses, value_only, share)
            metrics = metrics + share * torch.stack([losses[name].detach() for name in self.measured])
        return metrics

    def _backward(self, losses: TensorDictBase, value_only: bool, share: float) -> None:
        policy_loss, value_loss = losses["loss_objective"] + losses["loss_entropy"], losses.get("loss_critic", None)
        if not (value_only or self.critic_apart):
            (share * (policy_loss if value_loss is None else policy_loss + value_loss)).backward()
            return
        torch.autograd.backward(share * value_loss, inputs=self.value_parameters, retain_graph=not value_only)
        if not value_only:
            (share * policy_loss).backward()

    def _clip(self) -> Tensor:
        """Scale gradients that are too large; returns the norms before that: of each part, and of all."""
        having = tuple(i for i, p in enumerate(self.trainable) if p.grad is not None)
        if having not in self._plans:
            self._plans[having] = self._plan(having)
        parts, groups = self._plans[having]
        norms = torch.stack(torch._foreach_norm([self.trainable[i].grad for i in having]))  # [tensors]
        for rows, parameters in groups:
            norm = torch.linalg.vector_norm(norms if len(groups) == 1 else norms[rows])
            nn.utils.clip_grads_with_norm_(parameters, self.cfg.max_grad_norm, norm, foreach=self._foreach)
        squares = norms.new_zeros(len(self.parts)).index_add_(0, parts, norms.square())
        return torch.cat([squares.sqrt(), torch.linalg.vector_norm(norms).view(1)])

    def _plan(self, having: Sequence[int]) -> tuple[Tensor, list[tuple[Tensor, list[nn.Parameter]]]]:
        """For the trainable tensors with a gradient: the part of each, and the rows that are clipped together."""
        device, own = self.trainable[0].device, set(self.value_parameters)
        parts = [i for i, group in enumerate(self.optimizer.param_groups) for _ in group["params"]]
        head = [k for k, i in enumerate(having) if self.trainable[i] in own]
        others = [k for k, i in enumerate(having) if self.trainable[i] not in own]
        groups = [
            (torch.tensor(rows, device=device), [self.trainable[having[k]] for k in rows])
            for rows in (others, head)
            if rows
        ]
        return torch.tensor([parts[i] for i in having], device=device), groups


def minibatches(batch: TensorDictBase, size: int) -> Iterator[TensorDictBase]:
    """One shuffled pass; a minibatch that is the whole batch is not copied, as its order does not matter."""
    if size >= len(batch):
        yield batch
        return
    for rows in torch.randperm(len(batch), device=batch.device).split(size):
        # As batch[rows], but rows of pictures are copied whole and not number by number: 4 times as fast on a CPU.
        yield batch.apply(lambda tensor: tensor.index_select(0, rows), batch_size=[len(rows)])  # noqa: B023


@torch.no_grad()
def explained_variance(value: Tensor, target: Tensor) -> float:
    """1 - Var(target - value) / Var(target): 1 is a perfect critic, 0 no better than the mean; 0 for equal targets."""
    variance = target.var()
    return (1 - (target - value).var() / variance).item() if variance > 0 else 0.0
