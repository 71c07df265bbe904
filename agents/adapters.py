"""The weights of a peft folder into the low-rank adapters that a model already has (LoRA, Hu et al. 2021)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from agents.fitting import canonical, copy_weights, refuse_other_kinds
from agents.weights import ADAPTER_CONFIG, read_file, read_json, some
from research.errors import UserError

log = logging.getLogger(__name__)

FILES = ("adapter_model.safetensors", "adapter_model.bin")
OPTION = "policy.vla_config.adapter_path"
# What would make the adapters compute something else than W + alpha / rank * B A on the original W.
OTHER_COMPUTATIONS = (
    *("use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices", "arrow_config"),
    *("alora_invocation_tokens", "kasa_config", "velora_config", "monteclora_config"),
)
PLAIN_STARTS = (
    True,
    False,
    None,
    "gaussian",
)  # other kinds of `init_lora_weights` change W, which is not in the folder


def load_adapters(
    model: nn.Module, folder: str | Path, rank: int, alpha: float, trust_checkpoint: bool = False
) -> None:
    """Fill a model's adapters, all of them, with what peft's `save_pretrained` wrote.

    The names may be those of the whole model or of one part of it, such as its language model alone.

    Args:
        model: with adapters already in its layers, named "default"; changed in place.
        folder: with adapter_config.json and adapter_model.safetensors (or .bin).
        rank, alpha: of the model's adapters.
        trust_checkpoint: see `agents.weights.read_weights`.
    Raises:
        UserError: no such folder; adapters of another kind, rank, scale or other layers; what `fitting.fill` refuses.
    """
    folder = Path(folder).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{OPTION}: {folder} is no folder of peft adapters: it has no {ADAPTER_CONFIG}")
    config = read_json(folder / ADAPTER_CONFIG)
    _check_config(config if isinstance(config, dict) else {}, folder, rank, alpha)
    path = next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[0])
    weights = {_form(name): value for name, value in read_file(path, trust_checkpoint=trust_checkpoint).items()}
    own = {_form(n): n for n in model.state_dict() if any(part.startswith("lora_") for part in n.split("."))}
    part = _part_that_has(own, weights)
    found = {own[part + form]: value for form, value in weights.items() if part + form in own}
    fresh = own.keys() - {part + form for form in weights}
    if len(found) < len(weights) or fresh:
        homeless = [form for form in weights if part + form not in own]
        parts = [f"{len(homeless)} of its weights have no adapter here ({some(homeless)})"] * bool(homeless)
        parts += [f"{len(fresh)} weights of adapters here are not in it ({some(sorted(fresh))})"] * bool(fresh)
        raise UserError(
            f"{OPTION}: {folder} does not fit {type(model).__name__}: {'; '.join(parts)}; set policy.lora.targets to "
            f"the layers that it adapts ({_shown_targets(config)}), or merge it into the weights before"
        )
    refuse_other_kinds(model, found, path)
    shapes = {name: value.shape for name, value in model.state_dict().items() if name in found}
    if other := [f"{n}: expected {[*shapes[n]]}, got {[*v.shape]}" for n, v in found.items() if v.shape != shapes[n]]:
        raise UserError(f"{OPTION}: {folder} is of another model: {len(other)} shapes differ ({some(other)})")
    copy_weights(model, [found], found, path)
    log.info("%s: loaded %d weights of adapters", folder, len(found))


def _check_config(config: Mapping[str, Any], folder: Path, rank: int, alpha: float) -> None:
    where = f"{OPTION}: {folder / ADAPTER_CONFIG}"
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {config.get('peft_type')!r}; only LORA can be trained on here")
    other = [key for key in OTHER_COMPUTATIONS if config.get(key)] + ["bias"] * (config.get("bias", "none") != "none")
    start = config.get("init_lora_weights")
    if other or start not in PLAIN_STARTS:
        what = f"{other[0]} is {config[other[0]]!r}" if other else f"init_lora_weights is {start!r}"
        raise UserError(f"{where}: {what}, which cannot be trained on here; merge it into the weights before")
    if (config.get("r"), config.get("lora_alpha")) != (rank, alpha):
        raise UserError(
            f"{where}: has r = {config.get('r')!r} and lora_alpha = {config.get('lora_alpha')!r}, but policy.lora.rank "
            f"is {rank} and policy.lora.alpha {alpha:g}; set them to those"
        )


def _form(name: str) -> str:
    """A name as both sides have it: without the model that peft wraps around, infixes and the adapter's own name."""
    name = canonical(name.removeprefix("base_model.model."))
    head, dot, tail = name.rpartition(".lora_")
    return f"{head}{dot}{'.'.join(part for part in tail.split('.') if part != 'default')}"


def _part_that_has(own: Mapping[str, str], weights: Mapping[str, Any]) -> str:
    """The dotted prefix of the model's names, mostly none, under which most of the weights have their adapter."""
    first = next(iter(weights), "")
    parts = ["", *(form.removesuffix(first) for form in own if form.endswith(f".{first}"))]
    return max(parts, key=lambda part: sum(part + form in own for form in weights))


def _shown_targets(config: Mapping[str, Any]) -> str:
    targets = config.get("target_modules")
    return some(map(str, targets), limit=8) if isinstance(targets, list) else str(targets)[:200]
