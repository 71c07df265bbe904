"""Norms of gradients, by part of the model, and their clipping: the value head's apart from everybody else's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from research.training.parallel import World
from research.training.sharding import local


class GradientClipping:
    """Scales down gradients whose norm is too large.

    The value head's are clipped apart: a large return must not shrink the policy's step.

    Args:
        optimizer: its groups are the parts, by their `name`.
        value_parameters: the parameters that only the value depends on.
        max_norm: of the value head's gradient, and of all the others' together.
        world: the processes that gradients are divided among, if they are.

    Attributes:
        names: of the metrics that a call returns.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        value_parameters: Sequence[nn.Parameter],
        max_norm: float,
        world: World | None = None,
    ):
        self.world = world
        groups, self.own, self.max_norm = optimizer.param_groups, set(value_parameters), max_norm
        self.names = [*(f"train/grad_norm/{group['name']}" for group in groups), "train/grad_norm"]
        self.trainable = [p for group in groups for p in group["params"]]
        self.part_of = [part for part, group in enumerate(groups) for _ in group["params"]]
        self._plans: dict[tuple[int, ...], tuple] = {}  # by which tensors have a gradient

    def __call__(self) -> Tensor:
        """Clip; returns the norms before that: of each part, and of all."""
        having = tuple(i for i, p in enumerate(self.trainable) if p.grad is not None)
        if having not in self._plans:
            self._plans[having] = self._plan(having)
        parts, groups = self._plans[having]
        gradients = local([self.trainable[i].grad for i in having])
        norms = torch.stack(torch._foreach_norm(gradients))  # [tensors]
        if self.world is not None:
            norms = self.world.sum(norms.square()).sqrt()
        for rows, members in groups:
            norm = torch.linalg.vector_norm(norms if len(groups) == 1 else norms[rows])
            # As nn.utils.clip_grads_with_norm_, which does not take divided gradients.
            factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([gradients[row] for row in members], factor)
        squares = norms.new_zeros(len(self.names) - 1).index_add_(0, parts, norms.square())
        return torch.cat([squares.sqrt(), torch.linalg.vector_norm(norms).view(1)])

    def _plan(self, having: Sequence[int]) -> tuple[Tensor, list[tuple[Tensor, list[int]]]]:
        """For the trainable tensors with a gradient: the part of each, and those that are clipped together."""
        device = self.trainable[0].device
        head = [k for k, i in enumerate(having) if self.trainable[i] in self.own]
        others = [k for k, i in enumerate(having) if self.trainable[i] not in self.own]
        groups = [(torch.tensor(rows, device=device), rows) for rows in (others, head) if rows]
        return torch.tensor([self.part_of[i] for i in having], device=device), groups
