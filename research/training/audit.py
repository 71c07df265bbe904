"""Proof that what was frozen stayed frozen, and how far the rest moved."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from research.errors import FrozenWeightsChanged, UserError
from research.training.freezing import HEADS, part_of, within
from research.training.lora import adapter_changes, is_adapter

SHOWN = 3  # changed tensors that a message names


class FreezeAudit:
    """Hashes of a model's frozen tensors, and a copy of its trainable ones, as they are when this is made.

    Frozen are: the parameters that the freeze scope froze, and those without gradient that feature reuse relies on; all
    buffers of modules whose parameters are all frozen, of modules without parameters that feature reuse runs, and,
    where everything but the heads is frozen, of the model itself; and tensors that such modules hold without having
    registered them. Left out is what merely running the model changes without being saved (caches), running statistics
    (`agents.normalisation.RunningNormalisation`), and what the scope lets train, such as the averaged copy of a
    trainable part. Tied tensors count once.

    Costs one pass over the frozen bytes per check (100 M float32 parameters: 0.3 s of one core), and
    host memory for a second copy of the trainable weights in their own dtype, which the checkpoint holds too.

    Args:
        model: frozen as wanted (`research.training.freezing.freeze`), and holding the weights that the run starts from.
        frozen: names of the parameters that the scope froze; None takes all that have no gradient.
        reused: modules whose outputs feature reuse takes for constant.
        heads: parts that the scopes "backbone" and "lora" leave.
        exercise: runs what is frozen once, on other observations than before.
    """

    def __init__(
        self,
        model: nn.Module,
        frozen: Collection[str] | None = None,
        reused: Sequence[nn.Module] = (),
        heads: Sequence[str] = HEADS,
        exercise: Callable[[], Any] | None = None,
    ):
        self.model = model
        tensors = _frozen_tensors(model, frozen, reused, heads)
        before, saved = _hashes(tensors), model.state_dict().keys()
        if exercise is not None:
            exercise()
        now = _hashes({name: tensor for name, tensor in tensors_by_name(model).items() if name in before})
        self._hashes = {n: h for n, h in before.items() if now.get(n) == h or n in saved}
        self._statistics = _hashes(_statistics_of(model))
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
        tensors = tensors_by_name(self.model)
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

        A low-rank adapter counts as the change it makes to its layer's weight since the start, so that "lora" compares
        with the other scopes. A part that started at zero reports ||w||.
        """
        squares, parameters = dict.fromkeys(self._norms, 0.0), dict(self.model.named_parameters())
        for name, start in self._start.items():
            if not is_adapter(name):
                now = parameters[name].detach()
                squares[part_of(name)] += _square_norm(now.float() - start.to(now.device).float())
        for name, change in adapter_changes(self.model, self._start):
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

    @property
    def start(self) -> Mapping[str, Tensor]:
        """What trains, as it was at the start of the run."""
        return self._start

    def state_dict(self) -> dict[str, Any]:
        """The start of the run, for a checkpoint."""
        return {
            "hashes": self._hashes, "start": self._start, "norms": self._norms, "statistics": self._statistics,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Audit against the start of the run that is resumed.

        Raises:
            UserError: that run froze other parameters.
        """
        parameters = {name for name, _ in self.model.named_parameters()}
        hashes = state["hashes"]  # runs of earlier versions hashed fewer buffers
        if differing := sorted((hashes.keys() ^ self._hashes.keys()) & parameters):
            raise UserError(
                f"policy.freeze: the run to resume had {len(hashes)} tensors that stay, this one {len(self._hashes)} "
                f"(they differ in {differing[0]}); resume with the freeze scope it was started with, and with its "
                "policy.feature_reuse, which holds what it reuses to be frozen"
            )
        self._hashes = self._hashes | hashes
        self._start, self._norms = self._start | state["start"], state["norms"]  # earlier versions left out adapters

    def trained_state(self) -> dict[str, Any]:
        """What a checkpoint holds of the model: the entries of its `state_dict` that are not frozen."""
        entries = self.model.state_dict(keep_vars=True)
        tensors = tensors_by_name(self.model)  # after it: a model that is divided takes its weights apart when asked
        frozen = {id(tensors[name]) for name in self._hashes if name in tensors}
        return {n: v for n, v in entries.items() if id(v) not in frozen}

    def frozen_state(self) -> dict[str, Tensor]:
        """The other entries of its `state_dict`."""
        trained = self.trained_state()
        return {name: value for name, value in self.model.state_dict().items() if name not in trained}


def load_trained_state(model: nn.Module, weights: Mapping[str, Any], audit: Mapping[str, Any]) -> list[str]:
    """Give a model the weights of a checkpoint, and see that what was frozen, and its statistics, are the run's.

    Args:
        model: frozen as in that run, and holding the weights that the run started from.
        weights: `FreezeAudit.trained_state`, or all weights.
        audit: `FreezeAudit.state_dict` of the run, from its checkpoint; of an earlier version, with less or nothing.
    Returns:
        names that do not belong in it, or are missing.
    Raises:
        RuntimeError: a weight has another shape.
        UserError: the frozen weights, or the statistics of the data, are others.
    """
    hashes = audit.get("hashes", {})
    _refuse_other_statistics(model, audit.get("statistics", {}))
    found = model.load_state_dict(weights, strict=False)
    tensors = tensors_by_name(model)
    frozen = {id(tensors[name]) for name in hashes if name in tensors}
    entries = model.state_dict(keep_vars=True)
    now = _hashes({name: tensors[name] for name in hashes if name in tensors})
    if changed := [name for name in now if now[name] != hashes[name]]:
        raise UserError(
            f"policy.vla_config.model_path: {len(changed)} of {len(hashes)} frozen tensors are not what the run had "
            f"frozen ({', '.join(changed[:SHOWN])}); name the file that it started from"
        )
    return found.unexpected_keys + [name for name in found.missing_keys if id(entries[name]) not in frozen]


def _refuse_other_statistics(model: nn.Module, hashes: Mapping[str, str]) -> None:
    """Refuse a model whose statistics of the data are not those that a run trained with, by their hashes."""
    now = _hashes(_statistics_of(model))
    if changed := [name for name, value in hashes.items() if now.get(name) != value]:
        raise UserError(
            f"policy.vla_config.model_config: the statistics of the data are not those that the run trained with "
            f"({', '.join(changed[:SHOWN])}): the file that `statistics`, or `pretrained`, names has changed since, or "
            "is another; name the one of then"
        )


def _statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """What the normalisations of a model hold that are made of statistics (`agents.normalisation.Normalisation`)."""
    normalisations = {name: module for name, module in model.named_modules() if getattr(module, "of_data", False)}
    return {f"{name}.{of}": getattr(one, of) for name, one in normalisations.items() for of in ("middle", "scale")}


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers, and tensors that modules hold without having registered them: by dotted name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not attribute.startswith("_"):  # torch's own, parameters and buffers among them
                tensors |= dict(_plain_tensors(value, f"{name}.{attribute}".lstrip(".")))
    return tensors


def _plain_tensors(value: Any, name: str, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    """Tensors in an attribute that is one, or a list, tuple or dict that holds some."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth and isinstance(value, list | tuple | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _plain_tensors(item, f"{name}.{key}", depth - 1)


def _frozen_tensors(
    model: nn.Module, frozen: Collection[str] | None, reused: Sequence[nn.Module], heads: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors that `FreezeAudit` lists, by name."""
    constant = {id(inner) for module in reused for inner in module.modules()}
    without = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    relied_on = {id(p) for module in reused for p in module.parameters()}
    chosen = {n: p for n, p in without.items() if frozen is None or n in frozen or id(p) in relied_on}
    ids = {id(p) for p in chosen.values()}
    trained = [n for n, p in model.named_parameters() if id(p) not in ids and not is_adapter(n)]
    all_but_heads = bool(chosen) and all(within(name, heads) for name in trained)
    modules: set[str] = set()
    for name, module in model.named_modules():
        if getattr(module, "follows", False):
            continue  # running statistics, which move with what is seen
        own = [p for n, p in module.named_parameters(prefix=name) if not is_adapter(n)]
        inside = bool(name) and name.rpartition(".")[0] in modules
        passive = not own and (id(module) in constant or (all_but_heads and not within(name, heads)))
        if inside or passive or (own and all(id(p) in ids for p in own)):
            modules.add(name)
    if all_but_heads:
        modules.add("")
    taken = dict(chosen)
    for name, tensor in tensors_by_name(model).items():
        owner = _owner(name, model)
        if name not in taken and not isinstance(tensor, nn.Parameter) and owner in modules:
            taken[name] = tensor
    return taken


def _owner(name: str, model: nn.Module) -> str:
    """The name of the module that holds a tensor: the longest one that the tensor's name begins with."""
    known, parts = {n for n, _ in model.named_modules()}, name.split(".")
    return next(p for k in range(len(parts) - 1, -1, -1) if (p := ".".join(parts[:k])) in known)


def _hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashing large buffers releases the interpreter's lock
        return dict(zip(tensors, pool.map(_hash, tensors.values()), strict=True))


def _hash(tensor: Tensor) -> str:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    # A copy: numpy() keeps a tensor's memory from being freed, as that of weights divided among processes has to be.
    copied = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    digest.update(copied.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _square_norm(tensor: Tensor) -> float:
    return tensor.float().square().sum().item()
