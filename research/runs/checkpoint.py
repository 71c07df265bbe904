"""Checkpoints: a folder each, whole or not there, with the sums that show damage, written while the run goes on.

| file            | what it holds                                                                              |
|-----------------|--------------------------------------------------------------------------------------------|
| `state.pt`      | what changes in a run: trained weights, optimizer, progress, environments, generators      |
| `manifest.json` | the format, `global_step`, SHA-256 and size of `state.pt`, the configuration, code and its |
|                 | libraries' versions, and a SHA-256 of all that                                             |

Weights that are frozen are not written again and again: the checkpoint holds their hashes (`audit`), and whoever loads
it takes them from where the run took them. A run whose frozen weights are in no file keeps them once, in a checkpoint
called `frozen`. Tensors, numbers, strings, lists and dicts only, so that reading one never runs code.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import tensordict
import torch
import torchrl
from torch import Tensor
from torchrl.checkpoint import GlobalRNGState

from research.checkpoint_size import refuse_unbounded
from research.errors import UserError, describe_error
from research.runs.code_version import git_commit
from research.runs.folder import FROZEN, MANIFEST, RunFolder, as_json, step_of, sync_folder

STATE = "state.pt"
FORMAT = 2  # 1 was a single file, which is still read
OF_A_RUN = ("model_state_dict", "optimizer", "rollouts", "audit", "rng")  # and "progress", or its entries at the top


# ---- taking and writing


def snapshot(config: Mapping[str, Any], **state: Any) -> dict[str, Any]:
    """A copy of a run's state in the CPU's memory, which the run may go on changing, with all random generators'."""
    return _copied({**state, "rng": generators(), "config": dict(config)})


def generators() -> dict[str, Any]:
    """Where Python's, NumPy's and torch's random generators are, for `restore_rng`."""
    return GlobalRNGState().state_dict()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a snapshot as the folder `path`, which is there as a whole, on the disk, or not at all.

    One that is there already stays: it is of the same moment, as a resumed run removes those that lie ahead of it.

    Raises:
        OSError: it cannot be written; other checkpoints are untouched.
    """
    if (path / MANIFEST).is_file():
        return
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)  # not its parents: where the run folder is gone, nothing of it is made again
    partial.mkdir()
    file = partial / STATE
    with file.open("wb") as out:
        torch.save({key: value for key, value in state.items() if key != "config"}, out)
        out.flush()
        os.fsync(out.fileno())
    manifest = {
        "format": FORMAT,
        "global_step": state.get("progress", {}).get("global_step", 0),
        "files": {STATE: {"sha256": _sha256(file), "bytes": file.stat().st_size}},
        "code": _code(),
        "versions": {m.__name__: m.__version__ for m in (torch, tensordict, torchrl)},
        "config": state["config"],
    }
    manifest["sha256"] = _sum_of(manifest)
    with (partial / MANIFEST).open("w", encoding="utf-8") as out:
        out.write(as_json(manifest, indent=2) + "\n")
        out.flush()
        os.fsync(out.fileno())
    sync_folder(partial)
    os.rename(partial, path)
    sync_folder(path.parent)


@cache
def _code() -> str | None:
    return git_commit()  # the code that runs is that of the start, whatever is committed since


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint's folder, if there is one; killed half way, what is left is no checkpoint."""
    if path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


class CheckpointWriter:
    """Writes a run's checkpoints in a thread of its own, one after the other, and removes those that are not kept.

    Args:
        folder: the run's.
        keep: how many of the newest stay, besides the best.
    Attributes:
        on_written: called, in that thread, with each that is on the disk.
    """

    def __init__(self, folder: RunFolder, keep: int):
        self.folder, self.keep = folder, keep
        self.on_written: Callable[[Path], None] = lambda path: None
        self.latest = -1  # global_step of the newest that was handed over
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: Future | None = None
        self._lock = threading.Lock()  # a signal's thread hands over too

    def submit(self, state: dict[str, Any], best: bool = False) -> None:
        """Hand over a snapshot; waits for the one before, if that is still being written.

        Raises:
            UserError: the one before could not be written.
        """
        with self._lock:
            self.wait()
            step = state["progress"]["global_step"]
            self.latest = max(self.latest, step)
            self._writing = self._thread.submit(self._write, self.folder.checkpoint(step, best), state)

    def wait(self) -> None:
        """Return once everything is on the disk.

        Raises:
            UserError: it cannot be; the checkpoints before are untouched.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into the latter
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            reason = describe_error(error) if cause is None else cause.strerror
            raise UserError(
                f"cannot write a checkpoint into {self.folder.checkpoints}: {reason}; the ones before are whole"
            ) from error

    def remove_after(self, global_step: int) -> list[str]:
        """Remove the checkpoints of a run that went on from here before, and was resumed from here; their names."""
        paths = [*self.folder.checkpoints_called("step"), *self.folder.checkpoints_called("best")]
        later = [path for path in paths if step_of(path) > global_step]
        for path in later:
            remove_checkpoint(path)
        return [path.name for path in later]

    def keep_as_best(self, path: str) -> None:
        """Keep a copy of a checkpoint of the run as its best; of one of an earlier version, a file, there is none."""
        source = Path(path)
        if source.is_dir():
            best = self.folder.checkpoint(step_of(source), best=True)
            partial = best.with_name(f"{best.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            for copied in partial.iterdir():
                with copied.open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(partial)
            os.rename(partial, best)
            sync_folder(best.parent)

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        write_checkpoint(path, state)
        self.on_written(path)
        kind = path.name.partition("_")[0]
        for old in self.folder.checkpoints_called(kind)[1 if kind == "best" else self.keep :]:
            remove_checkpoint(old)


# ---- reading


def load_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a training checkpoint.

    Args:
        path: a checkpoint, or a run folder: then the newest one whose sums hold, and it is said if one was skipped.
    Returns:
        the state; `model_state_dict` lacks frozen weights (`frozen_weights`), `source` is where it was read, and
        `sha256` that of its `state.pt`, None for one of an earlier version.
    Raises:
        UserError: nothing there, damaged, or not a training checkpoint.
    """
    path = Path(path)
    if not path.is_dir() or (path / MANIFEST).is_file():
        return _read(path)
    saved, damaged = RunFolder(path).saved_checkpoints, []
    for candidate in saved:
        try:
            state = _read(candidate)
        except UserError as error:
            damaged.append(error)
            continue
        for error in damaged:
            print(f"skipped a damaged checkpoint: {error}; taken instead: {candidate}", flush=True)
        return state
    if damaged:
        raise damaged[0]
    raise UserError(f"no checkpoint in {RunFolder(path).checkpoints}")


def frozen_weights(state: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The frozen weights that a run kept because they are in no file; None where it took them from one."""
    path = Path(state["source"]).parent / FROZEN
    return _read(path)["model_state_dict"] if (path / MANIFEST).is_file() else None


def holds_all_weights(state: Mapping[str, Any]) -> bool:
    """Whether a model gets every weight from a checkpoint, and needs no other file."""
    earlier = Path(state["source"]).is_file()
    return earlier or not state.get("audit", {}).get("hashes") or frozen_weights(state) is not None


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    if path.is_dir():
        manifest, file = _checked_manifest(path), path / STATE
    else:
        manifest, file = {}, path
    try:
        refuse_unbounded(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle stops with nearly any exception
        reason = "it holds more than tensors and plain values" if isinstance(error, pickle.UnpicklingError) else ""
        raise UserError(f"{path} cannot be read as a checkpoint: {reason or describe_error(error)}") from error
    if isinstance(state, dict) and "config" in manifest:
        state["config"] = manifest["config"]
    known = isinstance(state, dict) and isinstance(state.get("config"), Mapping)
    if not known or not isinstance(state.get("model_state_dict"), Mapping):
        raise UserError(f"{path} is not a checkpoint of a training run (weights go into policy.vla_config.model_path)")
    return {**state, "source": str(path), "sha256": manifest["files"][STATE]["sha256"] if manifest else None}


def _checked_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, once it is sure that nothing of the checkpoint was changed."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        expected, known = manifest.pop("sha256"), manifest["files"][STATE]["sha256"]
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has the format {manifest['format']} of another version of this project")
        if expected != _sum_of(manifest):
            raise UserError(f"{path} is damaged: {MANIFEST} is not as it was written")
        if not isinstance(manifest["config"], dict) or known != _sha256(path / STATE):
            raise UserError(f"{path} is damaged: the SHA-256 of {STATE} is not the one in its {MANIFEST}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {describe_error(error)}") from error
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(as_json(manifest).encode()).hexdigest()


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set Python's, NumPy's and torch's generators to where the checkpoint was taken.

    Generators of GPUs that are not here stay out: a run may go on elsewhere, though not bit for bit.
    """
    generators = dict(state["rng"])
    if len(generators.get("torch_cuda", ())) > torch.cuda.device_count():
        del generators["torch_cuda"]
    GlobalRNGState().load_state_dict(generators)
