"""What the checkpoint folders of all families have in common, beside the layout that each family's library wants.

Heads that reinforcement learning adds, of the state value and of learned noise, lie in files of their own. A model
without a tokenizer reads the bytes of an instruction, and its folder says so, so that it is read back without one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from agents.packaged_weights import fill_part
from agents.weights import WEIGHTS_SUFFIXES, read_file, some
from research.errors import UserError

OWN_HEADS = ("value_head", "noise_head")  # in <name>.safetensors each
BYTES = {"instruction_tokens": "bytes"}  # in config.json, of a model without a tokenizer


def refuse_taken(folder: Path, what: str) -> None:
    """Refuse to export to a folder that has something in it, which an export could hide, or destroy.

    Args:
        folder: it may be there, and empty.
        what: the message begins with it.
    Raises:
        UserError: it holds something, or is a file.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{what}: {folder} is not empty; name a folder that is not there yet")


def start_export(model: nn.Module, folder: Path) -> None:
    """Make the folder that a model is exported to.

    Raises:
        UserError: the model has adapters that are not merged; or the folder has something in it, as that has which the
            model came from.
    """
    name = type(model).__name__
    if adapters := [weight for weight in model.state_dict() if "lora_" in weight]:
        raise UserError(f"{name}: export: merge the adapters into the weights before; there are {some(adapters)}")
    refuse_taken(folder, f"{name}: export")
    folder.mkdir(parents=True, exist_ok=True)


def copy_small_files(source: Path | str | None, folder: Path) -> None:
    """Copy what lies beside a model's weights: tokenizer, processor, the public code; None, or no folder: nothing."""
    if source is None or not Path(source).is_dir():
        return
    for file in sorted(Path(source).iterdir()):
        if file.is_file() and file.suffix not in WEIGHTS_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)


def write_own_heads(model: nn.Module, folder: Path) -> None:
    """Write the weights of those of `OWN_HEADS` that a model has, by the heads' own names."""
    for name in OWN_HEADS:
        if hasattr(model, name):
            write_tensors(getattr(model, name).state_dict(), folder / f"{name}.safetensors")


def fill_own_heads(model: nn.Module, folder: Path, option: str) -> None:
    """Fill those of `OWN_HEADS` that a model has and a folder too; a policy that nobody trained by reward has none.

    Args:
        model: filled in place.
        folder: where the files may lie.
        option: the setting that names the folder, for messages.
    Raises:
        UserError: a file is damaged, or of a head of other shapes.
    """
    for name in OWN_HEADS:
        path = folder / f"{name}.safetensors"
        if hasattr(model, name) and path.is_file():
            fill_part(getattr(model, name), read_file(path), path, option)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name, from wherever they lie, as transformers and LeRobot read them."""
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path, {"format": "pt"})


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
