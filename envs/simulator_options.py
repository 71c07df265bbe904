"""Checks of options that the environments over simulators share; each message names the option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from research.errors import UserError, did_you_mean

PLACE = "trainer.env_config"
_SIZES = 16, 1024


def check_some_of(option: str, chosen: Any, known: Sequence[str]) -> None:
    """Refuse what is no list of some of the known names, each once.

    Raises:
        UserError: so it is.
    """
    if not isinstance(chosen, list | tuple) or not chosen or len({*map(str, chosen)}) < len(chosen):
        raise UserError(f"{PLACE}.{option}: expected some of {', '.join(known)}, each once, got {chosen!r}")
    for name in chosen:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise UserError(f"{PLACE}.{option}: there is no {name!r}{hint}; there are {', '.join(known)}")


def check_one_of(option: str, chosen: Any, known: Sequence[str]) -> None:
    """Refuse what is none of the known names.

    Raises:
        UserError: so it is.
    """
    if chosen not in known:
        raise UserError(f"{PLACE}.{option}: expected one of {', '.join(known)}, got {chosen!r}")


def check_flag(option: str, value: Any) -> None:
    """Refuse what is neither true nor false.

    Raises:
        UserError: so it is.
    """
    if not isinstance(value, bool):
        raise UserError(f"{PLACE}.{option}: expected true or false, got {value!r}")


def check_image_size(size: Any) -> None:
    """Refuse a side of pictures that is no number of pixels.

    Raises:
        UserError: so it is.
    """
    smallest, largest = _SIZES
    if not isinstance(size, int) or isinstance(size, bool) or not smallest <= size <= largest:
        raise UserError(f"{PLACE}.image_size: expected pixels, from {smallest} to {largest}, got {size!r}")
