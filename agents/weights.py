"""From a checkpoint's path to its tensors by name, whatever the format.

A checkpoint is data from somewhere else: it is read as tensors only, a file that would run code is refused unless the
user trusts it, and one that would expand without end always. What else can be wrong with it ends in one `UserError`.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from research.checkpoint_size import is_zip, refuse_unbounded
from research.errors import UserError, describe_error

log = logging.getLogger(__name__)

# Where a `torch.save`d dict may keep its state dict, in the order tried; none of them: the dict is the state dict.
STATE_DICT_KEYS = ("model_state_dict", "state_dict", "model")
WEIGHTS_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
# What a directory is searched for first, in this order.
DIRECTORY_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_CONFIG = "adapter_config.json"  # what makes a folder one of peft's


def untied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as safetensors takes them, which refuses memory that two names share.

    Args:
        weights: by name.
    Returns:
        those that are one weight under several names once, by the first of them; the others dense, and views of the
        memory of another as copies.
    """
    found: dict[str, Tensor] = {}
    seen, memory = set(), set()
    for name, value in weights.items():
        # All tensors without elements have the same address, none; they share nothing.
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        if place not in seen:
            shares = value.numel() and value.untyped_storage().data_ptr() in memory
            found[name] = value.detach().clone(memory_format=torch.contiguous_format) if shares else value.contiguous()
            seen.add(place)
            memory.add(value.untyped_storage().data_ptr())
    return found


def read_weights(path: Path, trust_checkpoint: bool = False) -> list[dict[str, Any]]:
    """What each file of a checkpoint holds, by name; memory-mapped where the format allows.

    Args:
        path: a `.safetensors` file; a `.pt`, `.pth`, `.ckpt` or `.bin` file of `torch.save` holding a state dict, bare
            or under "model_state_dict", "state_dict" or "model"; an index of shards; a directory with one of these.
        trust_checkpoint: unpickle anything in the file, WHICH RUNS CODE FROM IT.
    Raises:
        UserError: it is missing, empty, damaged, unbounded, would run code, or holds no weights.
    """
    try:
        return [read_file(file, names, trust_checkpoint) for file, names in _weights_files(path)]
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"{str(path)[:200]} cannot be read: {error.strerror}") from error


def _weights_files(path: Path) -> list[tuple[Path, list[str] | None]]:
    """The files to read, each with the names to take from it (None: all)."""
    if (path / ADAPTER_CONFIG).is_file() or (
        path.name.startswith("adapter_model.") and (path.parent / ADAPTER_CONFIG).is_file()
    ):
        raise UserError(
            f"{path} holds peft adapters, not the weights that they adapt: set policy.vla_config.model_path to those, "
            "policy.vla_config.adapter_path to this folder and policy.freeze=lora, or merge them into the weights "
            "before (peft's merge_and_unload)"
        )
    if path.is_dir():
        path = _file_in(path)
    if path.suffix == ".json" and path.is_file():
        return _read_index(path)
    return [(path, None)]


def _file_in(directory: Path) -> Path:
    for name in DIRECTORY_FILES:
        if (directory / name).is_file():
            return directory / name
    files = sorted(file for file in directory.iterdir() if file.suffix in WEIGHTS_SUFFIXES)
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{directory} holds several weights files ({some([f.name for f in files])}); name one of them")
    raise UserError(
        f"{directory} holds no weights file ({', '.join(DIRECTORY_FILES)}, *{', *'.join(WEIGHTS_SUFFIXES)})"
    )


def _read_index(path: Path) -> list[tuple[Path, list[str] | None]]:
    content = read_json(path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f'{path} is not an index of shards: it has no "weight_map" from weight names to file names')
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(path.parent / file, []).append(name)
    absent = [file.name for file in shards if not file.is_file()]
    if absent:
        raise UserError(f"{path} lists {len(shards)} shards, of which {len(absent)} do not exist: {some(absent)}")
    return list(shards.items())


def read_json(path: Path) -> Any:
    """What a JSON file holds; what is no JSON, or nested without end, is a `UserError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {describe_error(error)}") from error


def read_file(path: Path, names: list[str] | None = None, trust_checkpoint: bool = False) -> dict[str, Any]:
    """The weights of one file, all or those of some `names`; errors as of `read_weights`."""
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist (current directory: {Path.cwd()})")
    if path.suffix not in WEIGHTS_SUFFIXES:
        raise UserError(f"{path}: the format {path.suffix!r} is unknown; known are {', '.join(WEIGHTS_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    try:
        with path.open("rb") as file:
            if file.read(19) == b"version https://git":
                raise UserError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
        weights = load_file(path) if path.suffix == ".safetensors" else _read_torch(path, trust_checkpoint)
    except UserError:
        raise
    except Exception as error:
        # A damaged pickle stops with nearly any exception: KeyError, EOFError, RuntimeError, ...
        raise UserError(
            f"{path} cannot be read; is it truncated, or another format? {describe_error(error)}"
        ) from error
    absent = [name for name in names or [] if name not in weights]
    if absent:
        raise UserError(f"{path} lacks {len(absent)} of the weights that its index puts there: {some(absent)}")
    return weights if names is None else {name: weights[name] for name in names}


def read_metadata(path: Path) -> dict[str, str]:
    """The text that a `.safetensors` file, or the one in a directory, holds besides its tensors; else nothing."""
    file = _file_in(path) if path.is_dir() else path
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as content:
        return content.metadata() or {}


def _read_torch(path: Path, trust_checkpoint: bool) -> dict[str, Any]:
    if trust_checkpoint:
        log.warning("%s may run code while it is read: policy.vla_config.trust_checkpoint is set", path)
    else:
        refuse_unbounded(path)
    mmap = _is_stored_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust_checkpoint, mmap=mmap)
    except pickle.UnpicklingError as error:
        if trust_checkpoint:
            raise
        asked = re.search(r"GLOBAL (\S+)", str(error))
        names_it = f" ({asked[1]})" if asked else ""
        raise UserError(
            f"{path} was not read: it holds more than tensors and plain values{names_it}, or is damaged; only if you "
            "trust its source, set policy.vla_config.trust_checkpoint: true, which RUNS CODE FROM THE FILE"
        ) from error
    return _state_dict_in(content, path)


def _is_stored_zip(path: Path) -> bool:
    """Whether a file can be mapped into memory: older formats cannot, and compressed entries would read as noise."""
    if not is_zip(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _state_dict_in(content: Any, path: Path) -> dict[str, Any]:
    found = content
    if isinstance(content, Mapping):
        found = next((v for k in STATE_DICT_KEYS if isinstance(v := content.get(k), (Mapping, nn.Module))), content)
    if isinstance(found, nn.Module):  # pickled whole, under trust_checkpoint
        found = found.state_dict()
    if not (isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values())):
        text = [key for key in found if isinstance(key, str)] if isinstance(found, Mapping) else []
        held = f"the keys {some(text)}" if text else type(found).__name__
        keys = ", ".join(STATE_DICT_KEYS)
        raise UserError(f"{path} has no weights under {keys} or at its top level: found {held}")
    # Not shown but by its type: a key that shares itself is endless as text, too.
    if others := {type(key).__name__ for key in found if not isinstance(key, str)}:
        raise UserError(
            f"{path}: its state dict has keys of type {some(sorted(others))}, where the names of weights are text"
        )
    return dict(found)


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few of some names, for a message; long ones are cut."""
    names = list(names)
    return ", ".join(name if len(name) <= 200 else f"{name[:197]}..." for name in names[:limit]) + ", …" * (
        len(names) > limit
    )
