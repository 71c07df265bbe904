"""Which code a run is of: the commit of this project, and the files of a user's own model and environment."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from research.own_packages import OWN_PACKAGES


def git_commit() -> str | None:
    """The short commit of this code, with `-dirty` where tracked files were changed; None outside a repository."""
    return _git("describe", "--always", "--dirty", "--exclude=*")


def repository() -> Path | None:
    """The top folder of the repository that this code lies in, wherever it was started from; None outside of one."""
    top = _git("rev-parse", "--show-toplevel")
    return Path(top) if top else None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def source_files(modules: Iterable[str]) -> dict[str, Path]:
    """The Python files of modules that were imported, by names below which they can be saved.

    Args:
        modules: dotted names; those of this project, which a commit names, and installed ones are left out.
    Returns:
        "my_package/my_model.py" -> the file. A module of a package brings all files of that package's folder: it
        imports from them.
    """
    installed = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")})
    files: dict[str, Path] = {}
    for name in dict.fromkeys(modules):
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if name.split(".")[0] in OWN_PACKAGES or not file or not file.endswith(".py") or file.startswith(installed):
            continue
        package = getattr(module, "__package__", "") or ""
        folder = Path(*package.split(".")) if package else Path()
        beside = sorted(Path(file).parent.glob("*.py")) if package else [Path(file)]
        files |= {str(folder / path.name): path for path in beside}
    return files
