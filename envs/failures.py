"""What a user's environment raises, in one line; and warnings that are given once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import gymnasium

from research.errors import SimulatorFailed, UserError, one_line, place_of

log = logging.getLogger(__name__)


def describe(error: BaseException) -> str:
    """An exception in one line, with where it came from; the rest of a sentence."""
    if isinstance(error, gymnasium.error.DependencyNotInstalled):
        return f"needs a package that is not installed: {one_line(error)}"
    if isinstance(error, ModuleNotFoundError):
        return f"needs {error.name!r}: pip install the package that provides it"
    return f"raised {type(error).__name__}: {one_line(error)} ({place_of(error)})"


@contextmanager
def blame(what: str, as_error: type[Exception] = SimulatorFailed) -> Iterator[None]:
    """Turn what the user's environment raises while it does `what` into one line.

    Args:
        what: "gym:MyEnv: step()".
        as_error: what is raised instead: `SimulatorFailed` in mid-run, `UserError` while an environment is made.
    """
    try:
        yield
    except (UserError, SimulatorFailed):
        raise
    except (Exception, SystemExit) as error:  # an environment that ends the process would end the run without a word
        raise as_error(f"{what} {describe(error)}") from error


@contextmanager
def refused() -> Iterator[None]:
    """Turn failures while an environment is tried out into refusals: the user can choose another."""
    try:
        yield
    except SimulatorFailed as error:
        raise UserError(str(error)) from error


@contextmanager
def mid_run() -> Iterator[None]:
    """The other way round: what could have been refused when an environment was made is a failure of a run."""
    try:
        yield
    except UserError as error:
        raise SimulatorFailed(str(error)) from error


@lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning that every environment of a kind would give, once in this process."""
    log.warning("%s", message)
