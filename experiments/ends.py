"""What ends a run before its time, and what is said of it."""

from __future__ import annotations

import packages  # noqa: F401

from research.errors import FrozenWeightsChanged, NonFiniteError, SimulatorFailed, UserError, one_line

# What ends a run with one line, and what its summary calls that.
STOPPED_BY = {
    NonFiniteError: "not a number",
    FrozenWeightsChanged: "frozen weights changed",
    SimulatorFailed: "simulator",
    KeyboardInterrupt: "signal",
    UserError: "error",
    OSError: "error",
}
# What the user is told of at once: nothing that a restart would cure.
ALERTED = ("not a number", "frozen weights changed")


def said(error: BaseException) -> str:
    """An error in one line, with the file that a full disk, or the like, is about."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return one_line(error) or type(error).__name__
