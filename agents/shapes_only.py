"""Models and steps as shapes without values: what they would need is found without the memory and the time for it.

Built on torch's fake tensors: an operator says what shape, type and device its result has, and computes nothing. They
know their device, on which it depends which kernels of attention are chosen. What a computation reads of values is made
up: a number is 1, a condition true, an instruction `TEXT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from agents.policy import VLAPolicy
from agents.reuse import DistinctInstructions, OncePerInstruction
from agents.stages import run_stage

TEXT = b"put the red cube on the blue plate"


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within, new tensors have shapes only."""
    with FakeTensorMode(allow_non_fake_inputs=True), _MadeUpNumbers(), _MadeUpArrays():
        yield


class _MadeUpNumbers(TorchDispatchMode):
    """What `.item()` and conditions get of a tensor without values."""

    def __torch_dispatch__(
        self, operator: Callable, types: Sequence[type], arguments: tuple = (), options: dict | None = None
    ) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default and isinstance(arguments[0], FakeTensor):
            kind = arguments[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        return operator(*arguments, **(options or {}))


class _MadeUpArrays(TorchFunctionMode):
    """What `.numpy()` gets, with which instructions are decoded."""

    def __torch_function__(
        self, function: Callable, types: Sequence[type], arguments: tuple = (), options: dict | None = None
    ) -> Any:
        if function is Tensor.numpy and isinstance(arguments[0], FakeTensor):
            array = np.zeros(tuple(arguments[0].shape), np.uint8)
            text = np.frombuffer(TEXT, np.uint8)[: array.shape[-1]]
            array[..., : len(text)] = text
            return array
        return function(*arguments, **(options or {}))


def without_values(module: nn.Module, device: torch.device) -> nn.Module:
    """A module's parameters and buffers replaced by shapes on a device, in place; within `shapes_only`."""
    known: dict[int, Tensor] = {}  # weights that are used twice stay one

    def shape(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
        return known[id(tensor)]

    for inner in module.modules():
        for tensors in (inner._parameters, inner._buffers):
            tensors.update({name: shape(tensor) for name, tensor in tensors.items() if tensor is not None})
    return module


def rows_like(steps: TensorDictBase, rows: int, device: torch.device) -> TensorDict:
    """`[rows]` zeros on a device, of the keys, shapes and types of some steps `[B]`."""
    zeros = {
        key: torch.zeros(rows, *value.shape[1:], dtype=value.dtype, device=device)
        for key, value in steps.items(include_nested=True, leaves_only=True)
    }
    return TensorDict(zeros, batch_size=[rows])


def look_nothing_up(policy: VLAPolicy, distinct: int) -> None:
    """Let a policy's stages run without a look at which instructions there are, as if there were `distinct` ones."""
    for sequence in (policy.frozen, policy.rest, policy.update):
        sequence.stages = [
            _Instructions(stage, distinct if isinstance(stage, DistinctInstructions) else 1)
            if isinstance(stage, DistinctInstructions | OncePerInstruction)
            else stage
            for stage in sequence.stages
        ]


class _Instructions(TensorDictModuleBase):
    """Runs on the first few rows, and gives each row the features of one of those."""

    def __init__(self, stage: DistinctInstructions | OncePerInstruction, distinct: int):
        super().__init__()
        self.stage, self.distinct = stage.stage, distinct
        self.in_keys, self.out_keys = stage.in_keys, stage.out_keys

    def forward(self, step: TensorDictBase) -> TensorDictBase:
        tokens = step.get(self.in_keys[0])
        few = tokens if 2 * self.distinct > len(tokens) else tokens[: self.distinct]  # as `DistinctInstructions`
        features = run_stage(self.stage, TensorDict({self.in_keys[0]: few}, batch_size=[len(few)]))
        which = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        return step.update({key: features.get(key).index_select(0, which) for key in self.out_keys})
