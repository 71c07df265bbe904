"""What is frozen, and at which learning rate the rest learns.

A model's *parts* are its named children that have parameters (`vision_encoder`, `action_head`, ...). Freezing and
learning rates address parts, or anything below them by dotted path or glob.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from research.schema import UserError

PRESETS = {
    "none": (),
    "vision": ("vision_encoder",),
    "language": ("language_encoder", "language_model"),
    "backbone": ("*",),  # everything but the heads
}
HEADS = ("action_head", "value_head")
# Entries of model_config that mean the same as a preset, whatever the model.
SWITCHES = {"freeze_vision_encoder": "vision", "freeze_language_model": "language"}


def part_names(model: nn.Module) -> list[str]:
    """Names of the model's parts, in order; parameters held by the model itself are parts of their own."""
    own = [name for name, _ in model.named_parameters(recurse=False)]
    return own + [name for name, child in model.named_children() if any(True for _ in child.parameters())]


def part_of(parameter_name: str) -> str:
    """The part that a parameter belongs to: the first component of its dotted name."""
    return parameter_name.split(".", 1)[0]


def split_switches(
    model_class: type[nn.Module], model_config: dict, scope: str | Sequence[str]
) -> tuple[dict, str | list[str]]:
    """Take `freeze_vision_encoder` and `freeze_language_model` out of a model's configuration and into the scope.

    A model whose constructor names such a switch is still given it.

    Returns:
        the configuration for the model, and the scope for `freeze`.
    """
    accepted = inspect.signature(model_class.__init__).parameters
    kept = {k: v for k, v in model_config.items() if k not in SWITCHES or k in accepted}
    wanted = [preset for switch, preset in SWITCHES.items() if model_config.get(switch)]
    if not wanted or scope == "backbone":
        return kept, scope
    if len(wanted) == 1 and scope in ("none", wanted[0]):
        return kept, wanted[0]
    chosen = [scope] if isinstance(scope, str) else list(scope)
    return kept, [pattern for pattern in dict.fromkeys([*chosen, *wanted]) if pattern != "none"]


def freeze(model: nn.Module, scope: str | Sequence[str], heads: Sequence[str] = HEADS) -> list[str]:
    """Switch off the gradient of everything in `scope`, in place, and put frozen modules in eval mode.

    Args:
        model: the model.
        scope: a preset ("none", "vision", "language", "backbone"), or a list of presets, part names, dotted paths and
            globs.
        heads: parts that "backbone" leaves trainable.
    Returns:
        names of the frozen parameters.
    Raises:
        UserError: a pattern that matches nothing (the message lists the parts), or nothing left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    matched: set[str] = set()
    for pattern in [scope] if isinstance(scope, str) else scope:
        matched.update(_frozen_by(model, names, pattern, heads))
    if len(matched) == len(names):
        raise UserError(f"policy.freeze: {scope!r} freezes every parameter, nothing is left to train")
    for name, parameter in model.named_parameters():
        if name in matched:
            parameter.requires_grad_(False)
    for module in model.modules():
        inside = list(module.parameters())
        if inside and not any(p.requires_grad for p in inside):
            module.eval()
    return sorted(matched)


def _frozen_by(model: nn.Module, names: Sequence[str], pattern: str, heads: Sequence[str]) -> set[str]:
    """Names of the parameters that one preset or pattern freezes."""
    found = {n for p in PRESETS.get(pattern, (pattern,)) for n in _matches(names, p)}
    if pattern == "backbone":
        found = {n for n in found if part_of(n) not in heads}
    if not found and pattern != "none":
        close = difflib.get_close_matches(pattern, [*part_names(model), *PRESETS], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"policy.freeze: {pattern!r} matches nothing{hint}; {_parts_line(model)}")
    return found


def _matches(names: Sequence[str], pattern: str) -> list[str]:
    return [n for n in names if n == pattern or n.startswith(pattern + ".") or fnmatchcase(n, pattern)]


def _parts_line(model: nn.Module) -> str:
    return f"{type(model).__name__} has the parts {', '.join(part_names(model))}"


def parameter_groups(model: nn.Module, learning_rate: float, learning_rates: dict[str, float]) -> list[dict]:
    """Optimizer groups, one per part that has trainable parameters.

    Args:
        model: the model, already frozen as wanted.
        learning_rate: for the parts that `learning_rates` does not name.
        learning_rates: part name -> learning rate.
    Returns:
        groups with "name", "params" and "lr".
    Raises:
        UserError: `learning_rates` names a part that the model lacks, or one that is frozen.
    """
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            lr = learning_rates.get(part, learning_rate)
            groups.setdefault(part, {"name": part, "params": [], "lr": lr})["params"].append(parameter)
    for part in learning_rates:
        if part not in part_names(model):
            raise UserError(f"policy.learning_rates: no part {part!r}; {_parts_line(model)}")
        if part not in groups:
            raise UserError(f"policy.learning_rates: the part {part!r} is frozen")
    return list(groups.values())
