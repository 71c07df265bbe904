"""Pointing at what an instruction names: what vision-language models inside of large VLAs have learned before."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from research.schema import UserError


def learn_to_point(model: nn.Module, env: Any, steps: int, learning_rate: float) -> None:
    """Regress the places that a model points at on those of the things that the instruction names, on fresh scenes.

    Args:
        model: with `stages()` and `point(features, count)` `[B, count, 2]`; trained in place.
        env: with `named_places()` `[B, count, 2]`; each step is a reset of all its rows.
        steps: gradient steps.
        learning_rate: of Adam.
    Raises:
        UserError: the model cannot point, or the environment names nothing.
    """
    if not hasattr(model, "point") or not hasattr(env, "named_places"):
        raise UserError("pointing_steps: the model has no point(), or the environment no named_places(); set it to 0")
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    bar = tqdm(range(steps), desc="pointing", disable=None)
    for step in bar:
        features = env.reset()
        for stage in model.stages():
            features = stage(features)
        places = env.named_places()
        loss = (model.point(features, places.shape[1]) - places).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
