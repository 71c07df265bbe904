"""What ends a run or a command, and how it is told in one line.

It imports nothing that takes long, so that help, refusals and what only reads files need not wait for torch.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_OURS = ("agents", "envs", "experiments", "research")
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")


class UserError(Exception):
    """Something the user gave is wrong. Scripts print the message as one line and exit with code 2."""


class SimulatorFailed(RuntimeError):
    """An environment that was accepted broke in mid-run: it raised, its process died or hung. One line, as `UserError`.

    What is refused when an environment is made stays a `UserError`: there the user can choose another.
    """


class NonFiniteError(RuntimeError):
    """A NaN or an infinity where training needs numbers; the message names the tensor."""


class FrozenWeightsChanged(RuntimeError):
    """A tensor that policy.freeze froze is not what it was at the start; the message names the first such tensors."""


def one_line(error: BaseException) -> str:
    """An exception's text on one line, for a `UserError`."""
    return " ".join(str(error).split())


def describe_error(error: BaseException) -> str:
    """An exception's class and text on one line of at most 200 characters, for a `UserError` about somebody's code."""
    return f"{type(error).__name__}: {one_line(error)}"[:200]


def place_of(error: BaseException) -> str:
    """Where in somebody's code an exception came from, as "my_env.py, line 5"; a phrase for a `UserError` about it.

    It is the innermost line of code that was not installed and is not this project's: not where within torch two shapes
    did not fit, but which line of a model put them together. Where there is none, it is the innermost line of all.
    """
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    path, line = next((frame for frame in reversed(frames) if _is_somebodys(frame[0])), frames[-1])
    return f"{path.name}, line {line}"


def _is_somebodys(path: Path) -> bool:
    installed = {"site-packages", "dist-packages"} & set(path.parts) or path.is_relative_to(_STANDARD_LIBRARY)
    return path.suffix == ".py" and not installed and not any(path.is_relative_to(_ROOT / part) for part in _OURS)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "; ") -> str:
    """The end of a message about a word that is not known: "; did you mean 'x'?", or nothing where none is close.

    Args:
        word: what was given.
        known: what could have been meant.
        prefix: what stands before the question where there is one.
    """
    close = get_close_matches(word, list(known), 1)
    return f"{prefix}did you mean {close[0]!r}?" if close else ""
