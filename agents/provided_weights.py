"""Weights files without the parts that a model's constructor fills from elsewhere, and how they are read again.

A model whose encoders come from packages says so: its attribute `provided_weights` maps the name of each such part to a
hash of its weights. A file of what was trained then leaves out those that did not change, and holds their hashes: what
was trained on top of some weights is worth nothing on top of others.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from agents.weights import read_metadata, untied
from research.errors import UserError, describe_error

log = logging.getLogger(__name__)

KEY = "provided_weights"  # of the file's metadata, and the model's attribute


def weights_sha256(part: nn.Module) -> str:
    """One hash of all names, dtypes, shapes and numbers of a module's state dict."""
    digest = hashlib.sha256()
    for name, value in part.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_trained(model: nn.Module, path: Path) -> dict[str, str]:
    """Write a model's weights as `.safetensors`, without the provided parts that are as they were provided.

    Returns:
        the parts that are left out, with their hashes.
    Raises:
        OSError: the file cannot be written.
    """
    provided = getattr(model, KEY, {})
    left_out = {part: sha for part, sha in provided.items() if weights_sha256(getattr(model, part)) == sha}
    weights = {name: value for name, value in model.state_dict().items() if name.partition(".")[0] not in left_out}
    save_file(untied(weights), path, metadata={KEY: json.dumps(left_out)})
    return left_out


def add_left_out(model: nn.Module, shards: list[dict[str, Any]], path: Path, strict: bool = True) -> None:
    """Complete what was read from a file with the parts that it leaves out: the model's own weights.

    Args:
        model: constructed, its provided parts in place.
        shards: weights by name; one shard is added.
        path: the file, or the folder that holds it.
        strict: refuse a part that the model has from elsewhere than the file's; False: say so in the log.
    Raises:
        UserError: as `strict` asks, and where the file's metadata is no such table.
    """
    own = getattr(model, KEY, {})
    for part, sha in _left_out(path).items():
        if own.get(part) != sha:
            problem = _other_weights(model, part, own.get(part), sha, path)
            if strict:
                raise UserError(problem)
            log.warning(problem)
        else:
            shards.append({f"{part}.{name}": value for name, value in getattr(model, part).state_dict().items()})


def _left_out(path: Path) -> dict[str, str]:
    text = read_metadata(path).get(KEY, "{}")
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata {KEY!r} is no JSON: {describe_error(error)}") from error
    if not (isinstance(table, dict) and all(isinstance(sha, str) for sha in table.values())):
        raise UserError(f"{path}: its metadata {KEY!r} should map names of parts to hashes")
    return table


def _other_weights(model: nn.Module, part: str, own: str | None, sha: str, path: Path) -> str:
    cls = type(model).__name__
    has = f"{cls} is given others ({own[:12]}...)" if own else f"{cls} is given none"
    return (
        f"{path} was trained on top of the {part} with SHA-256 {sha[:12]}..., which it does not hold, and {has}; set "
        f"policy.vla_config.model_config to the {part} that it was trained with"
    )
