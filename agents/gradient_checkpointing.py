"""Activations computed again in the backward pass instead of kept (Chen et al. 2016, https://arxiv.org/abs/1604.06174).

transformers' own switch works in train mode alone; the models here are in eval mode throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_layers(layers: Iterable[nn.Module]) -> None:
    """Of each layer, keep its inputs alone for the backward pass; outputs and gradients stay what they are."""
    for layer in layers:
        layer.forward = Recomputed(layer.forward)


class Recomputed:
    """A layer's `forward`, run once more in the backward pass.

    As it is where no gradient will be asked for, and where a cache of keys and values is given: run again, the layer
    would append to that twice.
    """

    def __init__(self, forward: Callable):
        self.forward = forward

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled() or options.get("past_key_values") is not None:
            return self.forward(*arguments, **options)
        return checkpoint(self.forward, *arguments, use_reentrant=False, **options)
