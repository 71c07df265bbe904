"""What is frozen, and at which learning rate the rest learns.

A model's *parts* are its named children that have parameters (`vision_encoder`, `action_head`, ...). Freezing and
learning rates address parts, or anything below them by dotted path; freezing takes globs too. A weight that the model
holds under several names (tied weights, a part that is also an attribute of a wrapper) answers to each of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from research.config import LoRAConfig
from research.errors import UserError, did_you_mean
from research.training.lora import adaptable_layers, add_adapters, is_adapter

# Names that each of config.FREEZE_PRESETS freezes, at any depth, so that a model within a wrapper has them as well.
PRESETS = {
    "none": (),
    "vision": ("vision_encoder", "vision_backbone", "vision_tower", "vision_model"),
    "language": ("language_encoder", "language_model"),
    "backbone": ("*",),  # everything but the heads
    "lora": ("*",),  # the same, with a trainable adapter in every layer that no other entry of the scope freezes
    "residual": ("*",),  # everything but the value head; a part of that name, which was added to the model, trains
}
HEADS = ("action_head", "value_head")


def part_names(model: nn.Module) -> list[str]:
    """Names of the model's parts, in order; parameters held by the model itself are parts of their own."""
    own = [name for name, _ in model.named_parameters(recurse=False)]
    return own + [name for name, child in model.named_children() if any(True for _ in child.parameters())]


def heads_of(model: nn.Module, value_head: Sequence[str]) -> list[str]:
    """Names of the parts that "backbone" leaves.

    Args:
        model: the model.
        value_head: what its value alone depends on.
    Returns:
        what it lists (`listed_heads`); else `HEADS`, a part that is called `heads`, and the value head.
    Raises:
        UserError: it lists what it does not have.
    """
    if (listed := listed_heads(model)) is None:
        own = ["heads"] if isinstance(getattr(model, "heads", None), nn.Module) else []
        return list(dict.fromkeys([*HEADS, *own, *value_head]))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if unknown := [head for head in listed if not any(within(name, [head]) for name in names)]:
        raise UserError(f"{type(model).__name__}.heads: there is no part {unknown[0]!r}; {_parts_line(model)}")
    return listed


def listed_heads(model: nn.Module) -> list[str] | None:
    """The dotted names in a model's attribute `heads`; None where that is nothing, or something else of the model's."""
    listed = getattr(model, "heads", None)
    listed = [listed] if isinstance(listed, str) else listed
    named = isinstance(listed, list | tuple) and listed and all(isinstance(head, str) for head in listed)
    return list(listed) if named else None


def part_of(parameter_name: str) -> str:
    """The part that a parameter belongs to: the first component of its dotted name."""
    return parameter_name.split(".", 1)[0]


def named_parameters_within(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Parameter]:
    """The model's parameters at, or below, some dotted paths, under the first of their names."""
    found = {
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(f"{name}.".startswith(f"{path}.") for path in paths)
    }
    return {name: parameter for name, parameter in model.named_parameters() if parameter in found}


def freeze(
    model: nn.Module, scope: str | Sequence[str], heads: Sequence[str] = HEADS, lora: LoRAConfig | None = None
) -> list[str]:
    """Switch off the gradient of everything in `scope`, in place, and put frozen modules in eval mode.

    Pretrained weights are loaded before, a training checkpoint after: "lora" puts adapters into layers, which renames
    their weights.

    Args:
        model: the model.
        scope: a preset ("none", "vision", "language", "backbone", "lora", "residual"), or a list of presets, part
            names, dotted paths and globs; what they name is frozen with all that lies in it. In a list with "lora",
            what the other entries name is frozen without adapters. "residual" comes after the model was given that
            part (`agents.residual.add_residual`).
        heads: parts that "backbone" and "lora" leave as they are, and "residual" besides what was added.
        lora: rank, scale and targets of the adapters.
    Returns:
        names of the frozen parameters.
    Raises:
        UserError: a pattern that matches nothing (the message lists the parts), or nothing left to train.
    """
    names = defaultdict(list)  # parameter -> all its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    patterns = [scope] if isinstance(scope, str) else list(scope)
    frozen = {p for pattern in patterns if pattern != "lora" for p in _frozen_by(model, names, pattern, heads)}
    layers = []
    if "lora" in patterns:
        lora = lora or LoRAConfig()
        backbone = _frozen_by(model, names, "lora", heads)
        layers = _adapted_layers(model, lora, backbone - frozen)
        frozen |= backbone
    if not layers and not any(p.requires_grad and p not in frozen for p in names):
        raise UserError(
            f"policy.freeze: {scope!r} freezes every parameter, nothing is left to train "
            f"(heads are {', '.join(heads)}; {_parts_line(model)})"
        )
    for parameter in frozen:
        parameter.requires_grad_(False)
    if layers:
        add_adapters(model, layers, lora.rank, lora.alpha)
    for module in frozen_modules(model).values():
        module.eval()
    return sorted(name for name, parameter in model.named_parameters() if parameter in frozen)


def frozen_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose parameters are all frozen, low-rank adapters aside, and everything inside them; by name."""
    found = {}
    for name, module in model.named_modules():
        own = [p for n, p in module.named_parameters(prefix=name) if not is_adapter(n)]
        if (name and name.rpartition(".")[0] in found) or (own and not any(p.requires_grad for p in own)):
            found[name] = module
    return found


def _frozen_by(
    model: nn.Module, names: dict[nn.Parameter, list[str]], pattern: str, heads: Sequence[str]
) -> set[nn.Parameter]:
    """The parameters that one preset or pattern freezes."""
    if pattern in ("backbone", "lora", "residual"):
        added = "residual." if pattern == "residual" else None  # at the top alone: networks have parts of that name
        left = {p for p, aliases in names.items() if any(within(n, heads) for n in aliases)}
        left |= {p for p, aliases in names.items() if added and aliases[0].startswith(added)}
        return names.keys() - left
    if pattern in PRESETS:
        found = {p for p, aliases in names.items() if any(within(n, PRESETS[pattern]) for n in aliases)}
    else:
        found = {p for p, aliases in names.items() if any(_matches(n, pattern) for n in aliases)}
    if not found and pattern != "none":
        raise UserError(f"policy.freeze: {_no_match(model, pattern, PRESETS)}")
    return found


def _adapted_layers(model: nn.Module, lora: LoRAConfig, backbone: set[nn.Parameter]) -> list[str]:
    """The layers that `lora.targets` names among those whose weights are in `backbone`."""
    layers = {name: m for name, m in adaptable_layers(model).items() if m.weight in backbone}
    if lora.targets == "auto":
        meant = getattr(model, "lora_targets", None) or ("*",)
        meant = [meant] if isinstance(meant, str) else meant
        layers = {n: m for n, m in layers.items() if m.weight.requires_grad and not isinstance(m, nn.Embedding)}
        chosen = [name for name in layers if any(_matches(name, target) for target in meant)]
        if not chosen:
            others = "; name layers in policy.lora.targets" if layers else ""
            raise UserError(f"policy.freeze: lora finds no trainable layer to adapt{others}; {_parts_line(model)}")
        return chosen
    chosen = set()
    for target in [lora.targets] if isinstance(lora.targets, str) else lora.targets:
        found = {name for name in layers if _matches(name, target) or name.rpartition(".")[2] == target}
        if not found:
            raise UserError(f"policy.lora.targets: no layer to adapt: {_no_match(model, target, ['auto'], layers)}")
        chosen |= found
    return [name for name in layers if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    """Whether a dotted path or glob means a parameter, or a module that it lies in."""
    return (
        name == pattern
        or name.startswith(f"{pattern}.")
        or fnmatchcase(name, pattern)
        or fnmatchcase(name, f"{pattern}.*")
    )


def within(name: str, modules: Sequence[str]) -> bool:
    """Whether a dotted name has one of `modules`, which may be dotted themselves, among its components."""
    return any(f".{module}." in f".{name}." for module in modules)


def _no_match(model: nn.Module, pattern: str, words: Sequence[str], layers: Sequence[str] = ()) -> str:
    hint = did_you_mean(pattern, [w for w in (*part_names(model), *words, *layers) if w != pattern], prefix=" (")
    return f"{pattern!r} matches nothing{hint}{')' if hint else ''}; {_parts_line(model)}"


def _parts_line(model: nn.Module) -> str:
    return f"{type(model).__name__} has the parts {', '.join(part_names(model))}"


def parameter_groups(model: nn.Module, learning_rate: float, learning_rates: dict[str, float]) -> list[dict]:
    """Optimizer groups of the trainable parameters: one per part, and one per path that has its own learning rate.

    Args:
        model: the model, already frozen as wanted.
        learning_rate: for what `learning_rates` does not name.
        learning_rates: part name, or dotted path below a part -> learning rate; the longest path wins.
    Returns:
        groups with "name" (part or path), "params" and "lr".
    Raises:
        UserError: `learning_rates` names what the model lacks, or what is frozen.
    """
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    groups: dict[str, dict] = {}
    known, trained = set(), set()
    for parameter, aliases in names.items():
        paths = [path for path in learning_rates if any(f"{n}.".startswith(f"{path}.") for n in aliases)]
        known.update(paths)
        if parameter.requires_grad:
            trained.update(paths)
            group = max(paths, key=len, default=part_of(aliases[0]))
            lr = learning_rates.get(group, learning_rate)
            groups.setdefault(group, {"name": group, "params": [], "lr": lr})["params"].append(parameter)
    for path in learning_rates:
        if path not in known:
            raise UserError(f"policy.learning_rates: no part {path!r}; {_parts_line(model)}")
        if path not in trained:
            raise UserError(f"policy.learning_rates: the part {path!r} is frozen")
    return list(groups.values())
