"""Weights from a file into a model: which name goes where, and whether each number stays what it was."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from agents.weights import some
from research.errors import UserError, describe_error

log = logging.getLogger(__name__)

# What torch.compile, (Distributed)DataParallel, FSDP and activation checkpointing put into the names of what they wrap.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def fill(
    model: nn.Module, shards: list[dict[str, Any]], path: Path, strict: bool = True, suggest_prefix: bool = True
) -> None:
    """Copy weights into a model; `shards` is emptied, so that the memory of each is free before the next is copied.

    Names that differ by the infixes of `WRAPPERS` alone are the same. Numbers are converted to the model's dtypes.

    Args:
        model: filled in place.
        shards: weights by name, per file.
        path: where they are from, for messages.
        strict: names and shapes must agree exactly. False: copy what agrees, log the rest.
        suggest_prefix: name the option that would make the names agree, where one would.
    Raises:
        UserError: they do not fit (`strict`) or none does; two of the file's weights are for one of the model's; a
            weight is no dense tensor of numbers as the model's are, or holds a NaN.
    """
    targets = model.state_dict(keep_vars=True)
    shards[:] = _under_the_models_names(targets, shards, path)
    weights = {name: value for shard in shards for name, value in shard.items()}
    refuse_other_kinds(model, weights, path)
    fitting = _check_fit(model, targets, weights, path, strict, suggest_prefix)
    del weights
    copy_weights(model, shards, fitting, path)


def copy_weights(model: nn.Module, shards: list[dict[str, Any]], fitting: Collection[str], path: Path) -> None:
    """Copy the `fitting` names, whose shapes agree; `shards` is emptied. What is refused: see `fill`."""
    targets = model.state_dict(keep_vars=True)
    weights = {n: v for shard in shards for n, v in shard.items() if n in fitting and isinstance(v, Tensor)}
    _refuse_two_values_of_one(model, targets, weights, path)
    _refuse_other_numbers(targets, weights, path)
    _say_conversions(targets, weights, path)
    del weights
    while shards:
        shard = shards.pop(0)
        try:
            model.load_state_dict({name: value for name, value in shard.items() if name in fitting}, strict=False)
        except Exception as error:  # from a module's own hook, too
            raise UserError(f"{path} cannot be copied into {type(model).__name__}: {describe_error(error)}") from error


def renamed(
    shards: list[dict[str, Any]], path: Path, strip_prefix: str | None, add_prefix: str | None
) -> list[dict[str, Any]]:
    """The same weights, one dotted prefix taken off the names that have it, another put before every name."""
    strip, add = (f"{prefix.removesuffix('.')}." if prefix else "" for prefix in (strip_prefix, add_prefix))
    names = [name for shard in shards for name in shard]
    if strip and not any(name.startswith(strip) for name in names):
        raise UserError(f"no weight in {path} has the strip_prefix {strip!r}; there are {some(names)}")
    if len({name.removeprefix(strip) for name in names}) < len(names):
        raise UserError(f"{path} holds weights both with and without the strip_prefix {strip!r} under the same name")
    return [{add + name.removeprefix(strip): value for name, value in shard.items()} for shard in shards]


def canonical(name: str) -> str:
    """A dotted name without the infixes of wrapped modules."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _under_the_models_names(
    targets: Mapping[str, Any], shards: list[dict[str, Any]], path: Path
) -> list[dict[str, Any]]:
    """The shards, with the model's name where a name of the file differs from it by infixes alone."""
    names = [name for shard in shards for name in shard]
    known = _model_names(targets, names)
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(known[name], name)
        if other != name:
            raise UserError(
                f"{path} holds two weights, {other} and {name}, for the one that the model calls {known[name]}; "
                "leave one of them out of the file"
            )
    if matched := [name for name in names if known[name] != name]:
        log.warning(
            "%s: %d of its names were matched past the infixes of wrapped modules (%s is %s)",
            path, len(matched), matched[0], known[matched[0]],
        )  # fmt: skip
    return [{known[name]: value for name, value in shard.items()} for shard in shards]


def _model_names(targets: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """The model's name for each name of a file: itself, or the only one of the same canonical form; else itself."""
    by_form = defaultdict(dict)  # canonical form -> a name for each weight that has it
    for name, target in targets.items():
        by_form[canonical(name)].setdefault(_place(target), name)
    found = {}
    for name in names:
        alike = {} if name in targets else by_form.get(canonical(name), {})
        found[name] = next(iter(alike.values())) if len(alike) == 1 else name
    return found


def _place(target: Any) -> Any:
    """What two names of the same weight have in common: the memory and how it is read, or the object itself."""
    if isinstance(target, Tensor) and not is_lazy(target) and target.data_ptr():
        return target.data_ptr(), target.shape, target.stride(), target.dtype
    return id(target)


def refuse_other_kinds(model: nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    """Refuse what copying would turn into other weights without a word, whatever its shape and strict or not.

    Integers and 8-bit floats stand for weights only with scales that are elsewhere; a complex number would lose a half;
    sparse and meta tensors hold no dense values.
    """
    targets = model.state_dict(keep_vars=True)
    for name, value in weights.items():
        target = targets.get(name)
        if not isinstance(target, Tensor):
            continue
        if kind := _kind(value):
            raise UserError(f"{path}: {name} is {kind}, which holds no values to copy; save a dense state dict")
        real = value.is_floating_point() and value.element_size() > 1
        numbers = real or (value.is_complex() and target.is_complex())
        if (target.is_floating_point() or target.is_complex()) and not numbers and value.dtype != target.dtype:
            raise UserError(
                f"{path}: {name} is {value.dtype}, where {type(model).__name__} has {target.dtype}: quantised or of "
                "another model; dequantise it before, or leave it out of the file"
            )


def _kind(value: Any) -> str | None:
    """What an entry of a state dict is, unless it is a dense tensor."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    if value.is_meta or value.is_quantized or value.is_nested:
        return "a meta tensor" if value.is_meta else "quantised" if value.is_quantized else "a nested tensor"
    return None if value.layout is torch.strided else str(value.layout)


def _refuse_two_values_of_one(
    model: nn.Module, targets: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path
) -> None:
    first: dict[Any, str] = {}
    for name in weights:
        other = first.setdefault(_place(targets[name]), name)
        if other != name and not torch.equal(*(weights[n].to(targets[n].dtype) for n in (other, name))):
            raise UserError(
                f"{path}: {other} and {name} have different values, but {type(model).__name__} has one weight under "
                "both names (tied); leave one of them out of the file, or untie them in the model"
            )


def _refuse_other_numbers(targets: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse NaN and infinities, parameters and buffers alike, and values that the model's dtype does not hold.

    An infinity that the constructor put at the same place, as in a mask, is meant.
    """
    for name, value in weights.items():
        target = targets[name]
        copied, own = value.to(target.dtype), f"{target.dtype}, the model's"
        if not (target.is_floating_point() or target.is_complex()):
            if value.dtype != target.dtype and not torch.equal(copied.to(value.dtype), value):
                raise UserError(f"{path}: {name} is {value.dtype} with values that are none of {own}")
        elif not (finite := _finite(copied)).all():
            if not is_lazy(target) and bool((finite | (copied == target.detach().to(copied.device))).all()):
                continue
            if _finite(value).all():
                raise UserError(
                    f"{path}: {name} is {value.dtype} with values too large for {target.dtype}, the model's"
                )
            raise UserError(
                f"{path}: {name} holds a NaN or an infinity: that checkpoint was saved after something broke"
            )


def _finite(value: Tensor) -> Tensor:
    return torch.isfinite(value.float() if value.element_size() == 1 else value)


def _say_conversions(targets: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
    changes = Counter((value.dtype, targets[name].dtype) for name, value in weights.items())
    for (source, target), number in changes.items():
        if source != target:
            exact = torch.promote_types(source, target) == target
            log.log(
                logging.INFO if exact else logging.WARNING,
                "%s: %d weights are %s and become %s%s", path, number, source, target, "" if exact else ", rounded",
            )  # fmt: skip


class _Comparison(NamedTuple):
    fitting: set[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]  # with both shapes, for the message

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "shape mismatch": self.mismatched}
        return "; ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in kinds.items() if names)


def _compare(targets: Mapping[str, Any], weights: Mapping[str, Any]) -> _Comparison:
    fitting, mismatched = set(), []
    for name, value in weights.items():
        target = targets.get(name)
        if is_lazy(target) or (name in targets and _dimensions(target) == _dimensions(value)):
            fitting.add(name)
        elif name in targets:
            mismatched.append(f"{name}: expected {_dimensions(target)}, got {_dimensions(value)}")
    # Tied parameters are one under several names, of which a file may hold only one.
    filled = {_place(targets[name]) for name in fitting}
    missing = [name for name, target in targets.items() if name not in weights and _place(target) not in filled]
    unexpected = [name for name in weights if name not in targets]
    return _Comparison(fitting, missing, unexpected, mismatched)


def _check_fit(
    model: nn.Module,
    targets: Mapping[str, Any],
    weights: Mapping[str, Any],
    path: Path,
    strict: bool,
    suggest_prefix: bool,
) -> set[str]:
    """The names to copy; raises or logs as `strict` asks."""
    comparison = _compare(targets, weights)
    cls, fitting = type(model).__name__, comparison.fitting
    problems = comparison.missing or comparison.unexpected or comparison.mismatched
    if not fitting or (strict and problems):
        remedies = [_prefix_that_fits(targets, weights, comparison)] if suggest_prefix else []
        added = [name for name in comparison.unexpected if name.startswith("residual.")]
        if added and len(added) == len(comparison.unexpected) and not (comparison.missing or comparison.mismatched):
            raise UserError(
                f"{path} does not fit {cls}: it has the network of a run with policy.freeze=residual ({added[0]}, "
                "...), which no model_path takes; evaluate, resume or serve the run's own folder, or build the "
                "model with agents.residual.add_residual (docs/vla_integration.md)"
            )
        if fitting:
            remedies.append("policy.vla_config.strict: false to load only what fits")
        remedy = " or ".join(filter(None, remedies))
        adapted = any(".base_layer." in name or ".lora_" in name for name in comparison.unexpected)
        merge = "; it holds peft's adapters apart: merge them before saving (merge_and_unload)" * adapted
        raise UserError(f"{path} does not fit {cls}: {comparison}{merge}" + f"; set {remedy}" * bool(remedy))
    if problems:
        log.warning("%s: loaded %d of the weights of %s, not all: %s", path, len(fitting), cls, comparison)
    else:
        log.info("%s: loaded all %d weights of %s", path, len(fitting), cls)
    return fitting


def _prefix_that_fits(targets: Mapping[str, Any], weights: Mapping[str, Any], comparison: _Comparison) -> str | None:
    """The setting, if there is one, with which every weight of the file has its place in the model."""
    first = next(iter(weights), "")
    # What all unexpected names begin with, up to a dot; what stands before the file's first name in the model.
    common = os.path.commonprefix(comparison.unexpected)  # noqa: RUF071 -- of names, not of files
    strip = [common[: dot.end()] for dot in re.finditer(r"\.", common)]
    add = [name.removesuffix(first) for name in comparison.missing if name.endswith(f".{first}")]
    candidates = [("strip_prefix", p, {name.removeprefix(p): v for name, v in weights.items()}) for p in strip]
    candidates += [("add_prefix", p, {p + name: v for name, v in weights.items()}) for p in add]
    for option, prefix, renamed_weights in candidates:
        names = _model_names(targets, renamed_weights)
        under = {names[name]: value for name, value in renamed_weights.items()}
        if len(_compare(targets, under).fitting) == len(weights):
            return f'policy.vla_config.{option}: "{prefix}"'
    return None


def _dimensions(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
