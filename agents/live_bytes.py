"""How many bytes of tensors live at each moment of a computation, with values or without (`agents/shapes_only.py`)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Watches the storages that operators make, from then until they are freed.

    What an operator allocates for itself while it runs is not seen.

    Args:
        there: tensors that are there already, and not counted.
    """

    def __init__(self, there: Iterable[Tensor] = ()):
        super().__init__()
        self._numbers = {tensor.untyped_storage()._cdata: -1 for tensor in there}  # address of a storage -> its number
        self._events: list[tuple[int, int]] = []  # a storage's number; its bytes as it comes, less than 0 as it goes
        self._count = 0

    def __torch_dispatch__(
        self, operator: Callable, types: Sequence[type], arguments: tuple = (), options: dict | None = None
    ) -> Any:
        made = operator(*arguments, **(options or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        return made

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._numbers:
            return
        number, self._count = self._count, self._count + 1
        self._numbers[address] = number
        self._events.append((number, storage.nbytes()))
        weakref.finalize(storage, self._freed, address, number, storage.nbytes())

    def _freed(self, address: int, number: int, size: int) -> None:
        self._numbers.pop(address, None)
        self._events.append((number, -size))

    def of(self, tensors: Iterable[Tensor]) -> set[int]:
        """The numbers of the storages of some tensors, of those that were watched."""
        numbers = (self._numbers.get(tensor.untyped_storage()._cdata, -1) for tensor in tensors)
        return {number for number in numbers if number >= 0}

    def peak(self, without: Iterable[int] = ()) -> int:
        """The most bytes that lived at once; without the storages of some numbers."""
        left_out, now, most = set(without), 0, 0
        for number, size in self._events:
            now += 0 if number in left_out else size
            most = max(most, now)
        return most


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
