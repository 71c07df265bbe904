"""What imitation would need of memory, found by shapes alone as for reinforcement learning (`accounting.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import fields
from io import StringIO

import torch
from accounting import ROWS, Needs, kept_bytes, parts_of
from tensordict import TensorDict, TensorDictBase
from torch import nn

from agents.live_bytes import LiveBytes, bytes_of
from agents.policy import VLAPolicy
from agents.shapes_only import look_nothing_up, rows_like, shapes_only, without_values
from research.imitation.cloning import clone, planned_steps
from research.imitation.config import CloningConfig
from research.imitation.demonstrations import EPISODE, RETURN, TASK
from research.schema import ACTION, OBSERVATION


def needs_of_imitation(
    model: nn.Module,
    scope: str | Sequence[str],
    cloning: CloningConfig,
    samples: int,
    observations: TensorDictBase,
    action_shape: Sequence[int],
    device: torch.device,
) -> Needs:
    """What `bc_vla.py` would need.

    Args:
        model: of `model_of_shapes`, frozen.
        scope: how it is frozen, to be told.
        cloning: the gradient steps.
        samples: how many there are; 0 where nobody knows before the expert has played.
        observations: a few, `[B]`.
        action_shape: `[A]` or `[executed, A]`.
        device: where it would run.
    """
    with shapes_only():
        without_values(model, device).eval()
        policy = VLAPolicy(model)
        look_nothing_up(policy, distinct=cloning.batch_size)
        weights = [*model.parameters(), *model.buffers()]
        sample = sample_of(policy, observations, action_shape, device)
        kept = kept_bytes(policy, sample)
        data = rows_like(sample, cloning.batch_size, device)
        with LiveBytes([*weights, *data.values(True, True)]) as steps:
            clone_steps(model, policy, data, cloning, count=2)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
    memory = {
        "weights": bytes_of(weights),
        "optimizer": 2 * bytes_of(gradients),  # AdamW's two means
        "data": sum(kept.values()) * samples,
        "minibatch": sum(kept.values()) * cloning.batch_size,
        "gradients": bytes_of(gradients),
    }
    besides = memory["optimizer"] + memory["minibatch"]
    memory["activations"] = max(0, steps.peak(without=steps.of(gradients)) - besides)
    shown = scope if isinstance(scope, str) else "+".join(scope)
    return Needs(
        type(model).__name__, device, shown, parts_of(model), kept, policy.frozen_stages, samples, cloning.batch_size,
        cloning.batch_size, memory, updating=memory["weights"] + memory["data"] + steps.peak(),
    )  # fmt: skip


@torch.no_grad()
def sample_of(
    policy: VLAPolicy, observations: TensorDictBase, action_shape: Sequence[int], device: torch.device
) -> TensorDict:
    """`[ROWS]` samples as `clone` reads them, of zeros."""
    step = TensorDict({OBSERVATION: rows_like(observations, ROWS, device)}, batch_size=[ROWS])
    if policy.frozen_stages:
        step = policy.frozen(step).select(*policy.kept_keys, strict=False)
    plan = torch.zeros(ROWS, planned_steps(policy.model, action_shape), action_shape[-1], device=device)
    step.set(ACTION, plan).set(RETURN, torch.zeros(ROWS, 1, device=device))
    return step.update({key: torch.zeros(ROWS, 1, dtype=torch.int64, device=device) for key in (TASK, EPISODE)})


def clone_steps(model: nn.Module, policy: VLAPolicy, data: TensorDictBase, cloning: CloningConfig, count: int) -> None:
    """Some gradient steps of imitation, without a progress bar."""
    settings = {option.name: getattr(cloning, option.name) for option in fields(CloningConfig)}
    with redirect_stderr(StringIO()):
        clone(model, policy.rest, data, CloningConfig(**{**settings, "steps": count}))
