"""PPO: TorchRL's `ClipPPOLoss` over minibatches of a rollout.

One update is `n_epochs` passes over the batch in shuffled minibatches. The critic's gradient reaches the value head
alone (`critic_gradient: head`, default) or the trunk as well (`trunk`): value errors that flow into a shared trunk were
measured to destroy a pretrained policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from research.config import PPOConfig
from research.schema import VALUE, UserError, check_finite
from research.training.freezing import part_of

# What of the loss is reported, and as which metric; at the same place in every vector of metrics.
MEASURED = {
    "loss_objective": "train/loss_objective",
    "loss_critic": "train/loss_critic",
    "entropy": "train/entropy",
    "kl_approx": "train/approx_kl",
    "clip_fraction": "train/clip_fraction",
}
APPROX_KL = list(MEASURED).index("kl_approx")


def make_loss(actor: ProbabilisticTensorDictSequential, critic: TensorDictModule, cfg: PPOConfig) -> ClipPPOLoss:
    """`ClipPPOLoss` on the modules themselves (not on functional copies, so there is one set of weights)."""
    return ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=cfg.clip_coef,
        entropy_bonus=True,
        entropy_coeff=cfg.ent_coef,
        critic_coeff=cfg.vf_coef,
        loss_critic_type="l2",
        normalize_advantage=False,  # PPO.update does, over a minibatch whatever its micro-batches
        log_explained_variance=False,  # PPO.update does, over the rollout
        functional=False,
    )


def make_gae(cfg: PPOConfig) -> GAE:
    """TorchRL's GAE, fed with stored values (Schulman et al. 2016, https://arxiv.org/abs/1506.02438)."""
    return GAE(gamma=cfg.gamma, lmbda=cfg.gae_lambda, value_network=None)


def value_head_parameters(model: nn.Module, value_head: str) -> list[nn.Parameter]:
    """Trainable parameters of the part that only the value depends on.

    Raises:
        UserError: the model has no such part; the message says how to name it.
    """
    parameters = [p for n, p in model.named_parameters() if part_of(n) == value_head and p.requires_grad]
    if not parameters:
        parts = ", ".join(dict.fromkeys(part_of(n) for n, _ in model.named_parameters()))
        raise UserError(
            f"policy.value_head: {type(model).__name__} has no trainable part {value_head!r} (its parts: {parts}); "
            "name the part that only get_value uses, or set policy.critic_gradient to 'trunk' and no value warm-up"
        )
    return parameters


class PPO:
    """The update, and what it carries from one to the next: the optimizer.

    Args:
        model: the VLA, frozen as wanted.
        loss: from `make_loss`.
        optimizer: over `research.training.freezing.parameter_groups`.
        cfg: PPO's settings.
        value_parameters: parameters that only the value depends on; needed for `critic_to_head` and for value warm-up.
        critic_to_head: keep the critic's gradient within `value_parameters`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: ClipPPOLoss,
        optimizer: torch.optim.Optimizer,
        cfg: PPOConfig,
        value_parameters: Sequence[nn.Parameter] | None,
        critic_to_head: bool = True,
    ):
        self.model, self.loss, self.optimizer, self.cfg = model, loss, optimizer, cfg
        self.value_parameters = value_parameters
        self.critic_to_head = critic_to_head and value_parameters is not None
        self.trainable = [p for group in optimizer.param_groups for p in group["params"]]
        self._foreach = True if self.trainable[0].is_cpu else None  # on a GPU torch chooses so by itself

    def set_progress(self, iteration: int, iterations: int) -> None:
        """Set the learning rates of iteration 0, 1, ...: they rise, and fall to 0, if so configured.

        They rise once the value warm-up is over, when the policy begins to move.
        """
        moving = iteration - self.cfg.value_warmup_iterations
        factor = 1.0 if moving < 0 else min(1.0, (moving + 1) / max(1, self.cfg.lr_warmup_iterations))
        if self.cfg.anneal_lr:
            factor *= 1.0 - iteration / iterations
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def update(self, batch: TensorDictBase, value_only: bool = False) -> dict[str, float]:
        """`n_epochs` x minibatches of gradient steps.

        Args:
            batch: flat, `[B]`, from `research.training.rollout.prepare_batch`.
            value_only: train the value head and leave every other weight bit-identical (value warm-up).
        Returns:
            metrics, means over the minibatches.
        Raises:
            NonFiniteError: a loss is not a number.
        """
        cfg, totals, count, rows, stop = self.cfg, 0.0, 0, 0, False
        explained = _explained_variance(batch[VALUE], batch["value_target"])
        for _ in range(cfg.n_epochs):
            for minibatch in _minibatches(batch, cfg.batch_size):
                metrics = self._accumulate(minibatch, value_only, f"in gradient step {count} of the update")
                norm = nn.utils.clip_grad_norm_(self.trainable, cfg.max_grad_norm, foreach=self._foreach)
                if count == 0:
                    part_norms = self._gradient_norms()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                count, rows = count + 1, rows + len(minibatch)
                totals = totals + torch.cat([metrics, norm.view(1)])
                if cfg.target_kl is not None and metrics[APPROX_KL].item() > cfg.target_kl:
                    stop = True
                    break
            if stop:
                break
        names = [*MEASURED.values(), "train/grad_norm"]
        metrics = {name: total / count for name, total in zip(names, totals.tolist(), strict=True)}
        metrics |= {"train/explained_variance": explained, "train/gradient_steps": float(count)}
        metrics["train/epochs"] = rows / len(batch)
        metrics |= {f"train/grad_norm/{part}": norm for part, norm in part_norms.items()}
        metrics |= {f"train/learning_rate/{g['name']}": g["lr"] for g in self.optimizer.param_groups}
        return metrics

    def _accumulate(self, minibatch: TensorDictBase, value_only: bool, when: str) -> Tensor:
        """Gradients of one minibatch, summed over its micro-batches; returns the means of what `MEASURED` names."""
        if self.cfg.normalize_advantage and len(minibatch) > 1:
            advantage = minibatch["advantage"]
            scale = advantage.std().clamp(min=1e-6)
            minibatch = minibatch.copy().set("advantage", (advantage - advantage.mean()) / scale)
        size, metrics = self.cfg.micro_batch_size, 0.0
        for micro in minibatch.split(size) if size else [minibatch]:
            share = len(micro) / len(minibatch)
            losses = self.loss(micro)
            named = [(k, losses[k]) for k in ("loss_objective", "loss_critic", "loss_entropy")]
            check_finite(named, when)
            self._backward(losses, value_only, share)
            metrics = metrics + share * torch.stack([losses[name].detach() for name in MEASURED])
        return metrics

    def _backward(self, losses: TensorDictBase, value_only: bool, share: float) -> None:
        policy_loss, value_loss = losses["loss_objective"] + losses["loss_entropy"], losses["loss_critic"]
        if not self.critic_to_head and not value_only:
            (share * (policy_loss + value_loss)).backward()
            return
        # Only the value head accumulates the critic's gradient, whichever way the model is wired.
        torch.autograd.backward(share * value_loss, inputs=self.value_parameters, retain_graph=not value_only)
        if not value_only:
            (share * policy_loss).backward()

    def _gradient_norms(self) -> dict[str, float]:
        norms = {}
        for group in self.optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients:
                norms[group["name"]] = nn.utils.get_total_norm(gradients).item()
        return norms


def _minibatches(batch: TensorDictBase, size: int) -> Iterator[TensorDictBase]:
    """One shuffled pass; a minibatch that is the whole batch is not copied, as its order does not matter."""
    if size >= len(batch):
        yield batch
        return
    for rows in torch.randperm(len(batch), device=batch.device).split(size):
        # As batch[rows], but rows of pictures are copied whole and not number by number: 4 times as fast on a CPU.
        yield batch.apply(lambda tensor: tensor.index_select(0, rows), batch_size=[len(rows)])  # noqa: B023


def _explained_variance(value: Tensor, target: Tensor) -> float:
    """1 - Var(target - value) / Var(target): 1 is a perfect critic, 0 no better than the mean; 0 for equal targets."""
    variance = target.var()
    return (1 - (target - value).var() / variance).item() if variance > 0 else 0.0
