"""Weights divided among the processes of a run while it updates (`trainer.sharding: full`), by PyTorch's FSDP2.

A process keeps its part of every weight, of its gradient and of what Adam knows of it (ZeRO-3, Rajbhandari et al. 2020,
https://arxiv.org/abs/1910.02054). For an update's forward and backward passes each block of layers is put together when
it runs, and taken apart again. Between updates, where a policy acts many times, whole weights are held by all.

What is put together is found by trying: the blocks that run as modules when a decision is scored, and one unit of all
else. That unit is the module `Root`, which an update calls; models themselves are never called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


class Root(nn.Module):
    """What an update runs, as a module whose call puts weights together.

    Args:
        model: whose weights they are.
        score: stored transitions -> log-probability, entropy, value.
    """

    def __init__(self, model: nn.Module, score: Callable[[TensorDictBase], tuple[Tensor, Tensor, Tensor]]):
        super().__init__()
        self.model, self.score = model, score

    def forward(self, stored: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        return self.score(stored)


class Sharding:
    """A model's weights, whole (as it is made) or divided among processes.

    Args:
        model: the same in all processes.
        score: stored transitions -> log-probability, entropy, value; `Root` runs it.
        try_out: scores a few decisions, so that it can be seen which blocks run.
        optimizer: over the model's trainable parameters; it gets the parts of them, and of its state.
    """

    def __init__(self, model: nn.Module, score: Callable, try_out: Callable[[], Any], optimizer: torch.optim.Optimizer):
        before = dict(model.named_parameters())
        device = next(iter(before.values())).device
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for block in blocks_that_run(model, try_out):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        self.root, self.optimizer = fully_shard(Root(model, score), mesh=mesh, reshard_after_forward=True), optimizer
        self.parts = {id(before[name]): part for name, part in model.named_parameters()}
        for group in optimizer.param_groups:
            group["params"] = [self.parts[id(p)] for p in group["params"]]
        state, optimizer.state = dict(optimizer.state), type(optimizer.state)(dict)
        for parameter, entries in state.items():  # of a run that is resumed
            part = self.parts[id(parameter)]
            optimizer.state[part] = {name: self._divided(entry, part) for name, entry in entries.items()}

    @staticmethod
    def _divided(entry: Any, like: DTensor) -> Any:
        """An entry of the optimizer's state; numbers of steps stay as they are."""
        if not isinstance(entry, Tensor) or entry.shape != like.shape:
            return entry
        return distribute_tensor(entry, like.device_mesh, like.placements)

    def of(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """The parts of whole parameters, by which an optimizer knows them."""
        return [self.parts[id(p)] for p in parameters]

    def gather(self) -> None:
        """Put all weights together, until `divide`; nothing is to be trained meanwhile."""
        for module in self._units():
            module.set_reshard_after_forward(False)
            module.unshard()

    def divide(self) -> None:
        """Take them apart again."""
        for module in self._units():
            module.set_reshard_after_forward(True)
            module.reshard()

    def _units(self) -> Iterator[FSDPModule]:
        return (module for module in self.root.modules() if isinstance(module, FSDPModule))


def blocks_that_run(model: nn.Module, try_out: Callable[[], Any]) -> list[nn.Module]:
    """Layers of the lists of equal layers in a model (`nn.ModuleList`) that run as modules when it is tried out."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(layer) for layer in m}) == 1]
    blocks = [layer for found in lists for layer in found if any(True for _ in layer.parameters())]
    ran: set[nn.Module] = set()
    hooks = [block.register_forward_hook(lambda module, *_: ran.add(module)) for block in blocks]
    try_out()
    for hook in hooks:
        hook.remove()
    return [block for block in blocks if block in ran]


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's parts of tensors that are divided; others as they are."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(value: Any) -> Any:
    """Nested containers with divided tensors put together, on the CPU; all processes have to ask for it."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value
