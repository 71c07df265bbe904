"""The whole training state in one file: written atomically, restored exactly.

A checkpoint holds tensors, numbers, strings, lists and dicts only, so that reading one never runs code.
"""

from __future__ import annotations

import pickle
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import GlobalRNGState

from research.runs.folder import RunFolder, replacing
from research.schema import UserError


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write `state` and the state of all random generators; a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        torch.save({**state, "rng": GlobalRNGState().state_dict()}, file)


def load_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a training checkpoint.

    Args:
        path: a checkpoint, or a run folder, whose last one is then meant.
    Raises:
        UserError: nothing there, or not a training checkpoint.
    """
    path = Path(path)
    path = RunFolder(path).last_checkpoint if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(state, dict) or "config" not in state or "model_state_dict" not in state:
        raise UserError(f"{path} is not a checkpoint of a training run (weights go into policy.vla_config.model_path)")
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set Python's, NumPy's and torch's generators to where the checkpoint was taken.

    Generators of GPUs that are not here stay out: a run may go on elsewhere, though not bit for bit.
    """
    generators = dict(state["rng"])
    if len(generators.get("torch_cuda", ())) > torch.cuda.device_count():
        del generators["torch_cuda"]
    GlobalRNGState().load_state_dict(generators)
