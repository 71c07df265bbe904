"""Which runs a comparison is of: those whose options have the values that were asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from research.errors import UserError
from research.study.run_settings import SCOPE, START, check_option, defaults_of, keep_what_tells, value_of
from research.study.run_table import Run, plain

_SHOWN = 8  # values in an error


def select(runs: Sequence[Run], where: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Keep runs whose options have these values, and say so in a note.

    Args:
        runs: as they were read; those that are kept are copied, as their `settings` and `common` are other ones.
        where: `option=value` each, the value as on a command line; of one option any of its values will do.
    Raises:
        UserError: no condition, an option that there is not, or a value that no run has (the message says which have).
    """
    if not where:
        return list(runs), []
    wanted: dict[str, list[str]] = {}
    for condition in where:
        option, separator, text = condition.partition("=")
        if not separator:
            raise UserError(f"--where: {condition!r} is no option=value, such as policy.freeze=vision")
        check_option("--where", option, runs)
        wanted.setdefault(option, []).append(text)
    for option, texts in wanted.items():
        for text in texts:
            if not any(_is(run, option, text) for run in runs):
                found = list(dict.fromkeys(_shown(_value(run, option)) for run in runs if run.environment))
                more = ", ..." if len(found) > _SHOWN else ""
                raise UserError(
                    f"--where: none of the {len(runs)} runs has {option}={text}; they have "
                    f"{', '.join(found[:_SHOWN])}{more}"
                )
    kept = [
        run for run in runs if all(any(_is(run, option, text) for text in texts) for option, texts in wanted.items())
    ]
    if not kept:
        raise UserError(f"--where: none of the {len(runs)} runs has all of {' '.join(where)}")
    kept = [replace(run, settings=run.common | run.settings) for run in kept]  # which were shared by others, too
    conditions = " and ".join(f"{option} = {' or '.join(texts)}" for option, texts in wanted.items())
    return keep_what_tells(kept), [f"Only runs with {plain(conditions)} are compared, {len(kept)} of {len(runs)}."]


def _value(run: Run, option: str) -> Any:
    has, value = value_of(run, option)
    return value if has else defaults_of(run.common | run.settings).get(option)


def _is(run: Run, option: str, text: str) -> bool:
    value = _value(run, option)
    if option == START and isinstance(value, str):  # kept without the folders that tell no two apart
        return Path(text).parts[-len(Path(value).parts) :] == Path(value).parts
    try:
        given = json.loads(text)
    except ValueError:
        given = text
    if option == SCOPE:  # kept as the names of its parts, in any order
        parts = given if isinstance(given, list) else text.split("+")
        return set(value.split("+")) == set(map(str, parts))
    return value == text or (value == given and isinstance(value, bool) == isinstance(given, bool))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
