"""What a Gymnasium environment's infos say: texts, and whether a step was a success."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.failures import warn_once
from research.errors import UserError

SUCCESS_KEYS = ("success", "is_success")  # looked for where no key is named


def look_up(info: Mapping[str, Any], path: str) -> Any:
    """The entry of nested mappings under a dotted path, or None."""
    if path in info:
        return info[path]
    first, _, rest = path.partition(".")
    inner = info.get(first)
    return look_up(inner, rest) if rest and isinstance(inner, Mapping) else None


def names_of(info: Mapping[str, Any]) -> str:
    """What an info holds, for messages."""
    return ", ".join(map(str, info)) or "nothing"


def reported_key(info: Mapping[str, Any]) -> str | None:
    """The first of the usual names under which an info says something of success."""
    return next((key for key in SUCCESS_KEYS if info.get(key) is not None), None)


def as_success(value: Any, name: str, key: str) -> bool:
    """A value that an info gives for success, as a boolean: it has to be one, or a number that is 0 or 1.

    Args:
        value: a bool or a number of Python or NumPy, or an array or a tensor of one such element.
        name, key: the environment's, and the info's, for the message.
    Raises:
        UserError: it is anything else: a text, a probability, one flag per subtask.
    """
    array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    if array.size == 1 and array.dtype.kind in "biuf" and array.item() in (0, 1):
        return bool(array.item())
    raise UserError(
        f"trainer.env_config.success_key: info[{key!r}] of {name} should be a boolean, or a number that is 0 or 1, "
        f"got {' '.join(repr(value).split())[:80]}; name another entry of info, or give success_return"
    )


def as_successes(value: Any, reported: Tensor, name: str, key: str) -> Tensor:
    """`as_success` row by row, of what a vector environment's info gives for all rows.

    Args:
        value: bools or numbers `[N]` (or `[N, 1]`), of NumPy or torch.
        reported: bool `[N]`: in which rows they mean something.
        name, key: as of `as_success`.
    Returns:
        bool `[N]`, False where nothing was reported.
    """
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype == object or array.dtype.kind not in "biuf":
            rows = zip(array, reported.tolist(), strict=True)
            flags = [row_reports and as_success(one, name, key) for one, row_reports in rows]
            return torch.tensor(flags, device=reported.device)
        value = torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).to(reported.device)
    if value.numel() != len(reported):
        as_success(value[0], name, key)
    value = value.reshape(len(reported))
    if value.dtype != torch.bool:
        wrong = reported & (value != 0) & (value != 1)
        if wrong.any():
            as_success(value[wrong][0], name, key)
    return reported & (value == 1)


def never_reported(name: str, key: str, info: Mapping[str, Any]) -> UserError:
    """An episode ended and success was never spoken of: a misspelt key would read as a success rate of zero."""
    return UserError(
        f"trainer.env_config.success_key: an episode of {name} ended without info[{key!r}]; "
        f"info has {names_of(info)}; an environment that says so only when it succeeds should say false too"
    )


def warn_of_unused(name: str, info: Mapping[str, Any]) -> None:
    """Say, once, that an environment reports success although it did not when it was made."""
    if key := reported_key(info):
        warn_once(
            f"{name} reports info[{key!r}], which it did not when it was tried out, so this run counts no success: "
            f"set trainer.env_config.success_key to {key!r}"
        )
