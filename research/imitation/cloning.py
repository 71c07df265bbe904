"""Behaviour cloning: gradient steps that bring a model's plan to the expert's actions, and its value to the returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR

from research.errors import UserError
from research.imitation.config import CloningConfig
from research.imitation.demonstrations import RETURN
from research.progress_bar import ProgressBar
from research.schema import ACTION, HIDDEN, OBSERVATION, PROPRIO, check_finite

SMOOTH_L1_BETA = 0.2  # below this error the loss is quadratic, above it linear
RISING = 0.1  # share of the steps in which a one-cycle learning rate rises


def clone(
    model: nn.Module,
    rest: Callable[[TensorDict], TensorDict],
    data: TensorDict,
    config: CloningConfig,
    stop: Callable[[int, float], bool] = lambda step, loss: False,
) -> None:
    """Train what is trainable in a model that `can_imitate`.

    Args:
        model: trained in place.
        rest: the model's stages that data has not been through.
        data: samples as of `research.imitation.demonstrations`, in them what `rest` reads.
        config: see `research.imitation.config.CloningConfig`.
        stop: asked after each step, with its number from 1 on and its imitation loss, whether it was the last.
    Raises:
        UserError: the loss has no gradient, or noise is asked for on a proprioception that nothing trained reads.
        NonFiniteError: the loss is no finite number.
    """
    if config.proprio_noise and data.get((OBSERVATION, PROPRIO), None) is None:
        raise UserError(
            f"proprio_noise: is {config.proprio_noise:g}, but no part that trains reads the proprioception; set it to 0"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = config.steps or config.epochs * max(1, len(data) // config.batch_size)
    rates = scheduled(optimizer, config.schedule, steps)
    rows = iter(())
    for step in ProgressBar(range(1, steps + 1), desc="imitation"):
        chosen = next(rows, None)
        if chosen is None or len(chosen) < config.batch_size:
            rows = iter(torch.randperm(len(data)).split(config.batch_size))
            chosen = next(rows)
        batch = data[chosen]
        if config.proprio_noise:
            proprio = batch[OBSERVATION, PROPRIO]
            batch.set((OBSERVATION, PROPRIO), proprio + config.proprio_noise * torch.randn_like(proprio))
        actions, returns = batch[ACTION], batch[RETURN]
        seen = rest(batch)
        action_loss = imitation_loss(model, seen, actions, config.loss)
        value = model.value(seen.get(HIDDEN)) if hasattr(model, "value") else model.state_value(seen)
        value_loss = (value - returns).square().mean()
        loss = action_loss + config.value_weight * value_loss
        check_finite([("the loss", loss)], f"at gradient step {step} of imitation")
        optimizer.zero_grad()
        loss.backward()
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        rates.step()
        if stop(step, action_loss.item()):
            break


def scheduled(optimizer: torch.optim.Optimizer, schedule: str, steps: int) -> LRScheduler:
    """What sets the learning rates of so many gradient steps, see `CloningConfig.schedule`."""
    if schedule == "one_cycle":
        highest = [group["lr"] for group in optimizer.param_groups]
        rising = RISING if steps * RISING != 1 else 2 * RISING  # one step up would divide by 0
        return OneCycleLR(optimizer, highest, steps, pct_start=rising)
    return ConstantLR(optimizer, factor=1.0)


def can_imitate(model: nn.Module) -> bool:
    """Whether a model has a loss of its own, or a distribution over actions at `hidden`, and stages before either."""
    return hasattr(model, "stages") and (hasattr(model, "imitation_loss") or hasattr(model, "action_distribution"))


def imitation_loss(model: nn.Module, seen: TensorDictBase, actions: Tensor, kind: str) -> Tensor:
    """How far the model's plan is from the expert's actions, in the mean: a scalar.

    Args:
        model: the VLA.
        seen: a step `[B]` whose stages have run.
        actions: `[B, H, A]`.
        kind: of `CloningConfig.loss`.
    Raises:
        UserError: "smooth_l1" where no gradient flows through the plan: it is chosen among tokens, or denoised.
    """
    if hasattr(model, "imitation_loss"):
        if kind == "smooth_l1":
            raise UserError(f"loss: {type(model).__name__} has its own loss; set it to head")
        return model.imitation_loss(seen, actions).mean()
    hidden, head = seen.get(HIDDEN), getattr(model, "action_head", None)
    if kind == "head" and hasattr(head, "imitation_loss"):
        return head.imitation_loss(hidden, actions).mean()
    plan = head.plan(hidden) if hasattr(head, "plan") else _mean_actions(model, hidden)
    if kind == "head":
        return (plan - actions).square().mean()
    if not plan.requires_grad:
        raise UserError(f"loss: smooth_l1 has no gradient through a {type(head).__name__}; set it to head")
    return F.smooth_l1_loss(plan, actions, beta=SMOOTH_L1_BETA)


def check_loss(policy: Any, observations: TensorDictBase, plan: Sequence[int], kind: str) -> None:
    """Refuse, before demonstrations are played, a loss that the model does not have.

    Args:
        policy: of the model, a `VLAPolicy`; no generator is moved.
        observations: a few, `[B]`.
        plan: H and A.
        kind: of `CloningConfig.loss`.
    Raises:
        UserError: as `imitation_loss`.
    """
    with torch.random.fork_rng():
        seen = policy.rest(policy.frozen(TensorDict({OBSERVATION: observations}, observations.batch_size)))
        nothing = torch.zeros(*observations.batch_size, *plan, device=observations.device)
        imitation_loss(policy.model, seen, nothing, kind)


def _mean_actions(model: nn.Module, hidden: Tensor) -> Tensor:
    """What a model without a head of this project plans, `[B, H, A]`."""
    mean = model.action_distribution(hidden).mean
    return mean if mean.dim() == 3 else mean[:, None]


def planned_steps(model: nn.Module, action_shape: Sequence[int]) -> int:
    """H, the control steps that a model plans.

    Args:
        model: the VLA.
        action_shape: of what it executes, `[A]` or `[executed, A]`.
    """
    if hasattr(model, "imitation_loss"):
        return model.horizon
    head = getattr(model, "action_head", None)
    return getattr(head, "horizon", 1 if len(action_shape) == 1 else action_shape[0])


@torch.no_grad()
def with_frozen_features(policy: Any, data: TensorDict, batch: int = 64) -> TensorDict:
    """Samples with what a policy's frozen stages make of them, in place of what those alone read.

    Args:
        policy: its `frozen` runs the frozen stages and `kept_keys` names what the others read.
        data: `[S]`.
        batch: samples that run through the frozen stages at once.
    """
    if not policy.frozen_stages:
        return data
    parts = []
    for part in ProgressBar(data.split(batch), desc="frozen features"):
        step = policy.frozen(TensorDict({OBSERVATION: part[OBSERVATION]}, part.batch_size))
        parts.append(step.select(*policy.kept_keys).update(part.exclude(OBSERVATION)))
    return torch.cat(parts)


@torch.no_grad()
def normalise(model: nn.Module, data: TensorDict) -> None:
    """Give a model that normalises its features, or its proprioception alone, the data's mean and deviation."""
    fusion = getattr(model, "fusion", None)
    if hasattr(model, "fit_normalisation"):
        model.fit_normalisation(data[OBSERVATION])
    elif hasattr(fusion, "proprio_mean"):
        fusion.proprio_mean.copy_(data[OBSERVATION, "proprio"].mean(dim=0))
        fusion.proprio_std.copy_(data[OBSERVATION, "proprio"].std(dim=0).clamp(min=1e-3))
