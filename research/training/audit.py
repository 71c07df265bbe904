"""Proof that what was frozen stayed frozen, and how far the rest moved."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from research.schema import FrozenWeightsChanged, UserError
from research.training.freezing import frozen_modules, part_of
from research.training.lora import adapter_changes, is_adapter

SHOWN = 3  # changed tensors that a message names


class FreezeAudit:
    """Hashes of a model's frozen tensors, and a copy of its trainable ones, as they are when this is made.

    Frozen tensors are the parameters without gradient and the buffers of frozen modules, batch-norm statistics among
    them; not the buffers of trainable modules, nor those that a checkpoint leaves out (caches). Tied tensors count
    once.

    Costs one pass over the frozen bytes per check (100 M float32 parameters: 0.3 s of one core), and
    host memory for a second copy of the trainable weights in their own dtype, which the checkpoint holds too.

    Args:
        model: frozen as wanted (`research.training.freezing.freeze`), and holding the weights that the run starts from.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._hashes = _hashes(dict(_frozen_tensors(model)))
        self._start: dict[str, Tensor] = {}
        self._intact = True
        squares: dict[str, float] = defaultdict(float)
        for name, parameter in model.named_parameters():
            if not is_adapter(name):
                squares[part_of(name)] += _square_norm(parameter.detach())
                if parameter.requires_grad:
                    self._start[name] = parameter.detach().to("cpu", copy=True)
        self._norms = {part: square**0.5 for part, square in squares.items()}  # of each part's weights at the start

    def check(self, when: str) -> None:
        """Compare every frozen tensor with its start.

        Args:
            when: where in the run this is ("at env step 4096"), for the message.
        Raises:
            FrozenWeightsChanged: names the first tensors that differ.
        """
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        now = _hashes({name: tensors[name] for name in self._hashes if name in tensors})
        changed = [name for name, start in self._hashes.items() if now.get(name) != start]
        self._intact = not changed
        if changed:
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            raise FrozenWeightsChanged(
                f"{len(changed)} of {len(self._hashes)} frozen tensors are not what they were at the start {when}: "
                f"{', '.join(changed[:SHOWN])}{more}; look for code that writes to them (batch norm in train mode, an "
                "assignment in forward, an optimizer of your own), or do not freeze them"
            )

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """`audit/drift/<part>`: ||w - w0|| / ||w0|| over all weights of a part, 0 for a frozen one.

        A low-rank adapter counts as the change it makes to its layer's weight, so that "lora" compares with the other
        scopes. A part that started at zero reports ||w||.
        """
        squares, parameters = dict.fromkeys(self._norms, 0.0), dict(self.model.named_parameters())
        for name, start in self._start.items():
            now = parameters[name].detach()
            squares[part_of(name)] += _square_norm(now.float() - start.to(now.device).float())
        for name, change in adapter_changes(self.model):
            squares[part_of(name)] += _square_norm(change)
        return {f"audit/drift/{part}": square**0.5 / (self._norms[part] or 1.0) for part, square in squares.items()}

    def summary(self) -> dict[str, int | bool | str]:
        """For the run's summary: how many tensors are frozen, whether the last check passed, and one hash of all."""
        lines = "\n".join(f"{name} {value}" for name, value in sorted(self._hashes.items()))
        return {
            "audit/frozen_tensors": len(self._hashes),
            "audit/frozen_ok": self._intact,
            "audit/hash": hashlib.sha256(lines.encode()).hexdigest(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The start of the run, for a checkpoint."""
        return {"hashes": self._hashes, "start": self._start, "norms": self._norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Audit against the start of the run that is resumed; `check` then compares the weights that were restored.

        Raises:
            UserError: that run froze other tensors.
        """
        if differing := sorted(state["hashes"].keys() ^ self._hashes.keys()):
            raise UserError(
                f"policy.freeze: the run to resume froze {len(state['hashes'])} tensors, this one {len(self._hashes)} "
                f"(they differ in {differing[0]}); resume with the freeze scope it was started with"
            )
        self._hashes, self._start, self._norms = state["hashes"], state["start"], state["norms"]


def _frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    modules, saved = frozen_modules(model), model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved and name.rpartition(".")[0] in modules:
            yield name, buffer


def _hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashing large buffers releases the interpreter's lock
        return dict(zip(tensors, pool.map(_hash, tensors.values()), strict=True))


def _hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _square_norm(tensor: Tensor) -> float:
    return tensor.float().square().sum().item()
