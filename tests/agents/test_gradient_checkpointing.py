"""Gradient checkpointing: the same numbers, computed twice where that is right."""

from __future__ import annotations

import copy

import torch
from torch import nn

from agents.gradient_checkpointing import checkpoint_layers


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 0.5))
        self.calls = 0

    def forward(self, x: torch.Tensor, past_key_values: list | None = None) -> torch.Tensor:
        self.calls += 1
        if past_key_values is not None:
            past_key_values.append(x)
        return (x * self.weight).sin()


def test_gradients_are_the_same_and_layers_run_again_in_the_backward_pass():
    plain, again = (nn.ModuleList([Layer(), Layer()]).eval() for _ in range(2))
    checkpoint_layers(again)
    for layers in (plain, again):
        x = torch.arange(3.0)
        for layer in layers:
            x = layer(x)
        x.sum().backward()
    assert [layer.calls for layer in plain] == [1, 1] and [layer.calls for layer in again] == [2, 2]
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one.weight.grad, other.weight.grad)


def test_without_gradients_and_with_a_cache_they_run_once():
    layer, cache = Layer(), []
    checkpoint_layers([layer])
    layer(torch.ones(3), past_key_values=cache).sum().backward()
    assert layer.calls == len(cache) == 1
    with torch.no_grad():
        layer(torch.ones(3))
    assert layer.calls == 2


def test_a_copy_runs_its_own_layers():
    layer = Layer()
    checkpoint_layers([layer])
    other = copy.deepcopy(layer)
    other(torch.ones(3)).sum().backward()
    assert (layer.calls, layer.weight.grad) == (0, None) and other.weight.grad is not None
