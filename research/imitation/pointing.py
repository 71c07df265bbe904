"""Pointing at what an instruction names: what vision-language models inside of large VLAs have learned before."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from research.errors import UserError
from research.imitation.cloning import scheduled
from research.progress_bar import ProgressBar


class PlaceReader(nn.Module):
    """Reads places off the tokens `[B, N, D]` of a model that cannot point; it is trained with it, and thrown away.

    Each place has two queries, whose softmax runs over the tokens, and is a linear map of what they find.

    Args:
        key: where the model's stages write the tokens.
        width: D.
        count: places.
    """

    def __init__(self, key: Any, width: int, count: int):
        super().__init__()
        self.key, self.norm = key, nn.LayerNorm(width)
        self.queries, self.place = nn.Linear(width, 2 * count), nn.Linear(2 * width, 2)

    def forward(self, features: TensorDictBase, count: int) -> Tensor:
        tokens = self.norm(features.get(self.key))
        found = torch.einsum("bnq,bnd->bqd", self.queries(tokens).softmax(dim=1), tokens)
        return self.place(found.unflatten(1, (count, 2)).flatten(2))


def learn_to_point(model: nn.Module, env: Any, steps: int, learning_rate: float, schedule: str = "constant") -> None:
    """Regress the places that a model points at on those of the things that the instruction names, on fresh scenes.

    Args:
        model: with `stages()`, and `point(features, count)` `[B, count, 2]` or a stage that writes tokens `[B, N, D]`;
            trained in place.
        env: with `named_places()` `[B, count, 2]`; each step is a reset of all its rows.
        steps: gradient steps.
        learning_rate, schedule: of Adam, as of `research.imitation.config.CloningConfig`.
    Raises:
        UserError: as `check_can_point`.
    """
    point, parameters = _pointer(model, env), list(model.parameters())
    if isinstance(point, PlaceReader):
        parameters += point.parameters()
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    rates = scheduled(optimizer, schedule, steps)
    bar = ProgressBar(range(steps), desc="pointing")
    for step in bar:
        loss = _pointing_loss(model, point, env)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def check_can_point(model: nn.Module, env: Any) -> None:
    """Refuse, before demonstrations are played, what `learn_to_point` cannot do; no generator of torch is moved.

    Raises:
        UserError: the model cannot point, nothing of it that points trains, or the environment names nothing.
    """
    with torch.random.fork_rng():
        if not _pointing_loss(model, _pointer(model, env), env).requires_grad:
            raise UserError("pointing_steps: all that points is frozen, so that nothing would learn it; set it to 0")


def _pointer(model: nn.Module, env: Any) -> Any:
    """What points: the model, or a reader of its tokens."""
    if not hasattr(model, "stages") or not hasattr(env, "named_places"):
        raise UserError("pointing_steps: the model has no stages(), or the environment no named_places(); set it to 0")
    point = getattr(model, "point", None)
    return _make_reader(_seen(model, env.reset()), env.named_places().shape[1]) if point is None else point


def _pointing_loss(model: nn.Module, point: Any, env: Any) -> Tensor:
    """Squared error of the places of fresh scenes, in the mean."""
    features, places = _seen(model, env.reset()), env.named_places()
    return (point(features, places.shape[1]) - places).square().mean()


def _seen(model: nn.Module, features: TensorDictBase) -> TensorDictBase:
    for stage in model.stages():
        features = stage(features)
    return features


def _make_reader(features: TensorDictBase, count: int) -> PlaceReader:
    """A reader of the tokens that the model's last such stage has written."""
    entries = list(features.items(include_nested=True, leaves_only=True))
    tokens = [(key, value) for key, value in entries if value.requires_grad and value.dim() == 3]
    if not tokens:
        raise UserError("pointing_steps: the model has no point(), and no stage writes tokens [B, N, D]; set it to 0")
    key, value = tokens[-1]
    return PlaceReader(key, value.shape[-1], count)
