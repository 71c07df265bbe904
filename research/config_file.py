"""Configuration files: JSON or YAML, each of which may start from another one, and what they come to together.

    {"base": "pick_place.json", "trainer": {"seed": 2, "env_config": {"reward": "milestones"}}}

A base is looked for beside the file that names it, then among the configurations of this project; it may have a base of
its own. What a file gives goes before what its base gives: options one by one, free-form objects entry by entry, lists
as a whole, and an empty object empties. Where a file names another kind (another environment, model class, algorithm)
than its base, what the base gave to the old kind is left out: `kinds` says which options these are.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from research.errors import UserError
from research.plain_yaml import read_yaml

SHIPPED = Path(__file__).resolve().parent.parent / "experiments" / "configs"


class ConfigFile(NamedTuple):
    """What one file holds, its base aside."""

    path: str
    content: Any

    def get(self, option: str, default: Any) -> Any:
        """What it gives a dotted option, unchecked."""
        node = self.content
        for name in option.split("."):
            node = node.get(name, default) if isinstance(node, dict) else default
        return node


def read_chain(path: str) -> list[ConfigFile]:
    """A file and those that it starts from, which come first.

    Args:
        path: of the file; one that is not there, but is among this project's configurations, is that one.
    Raises:
        UserError: a file cannot be read or is neither JSON nor YAML, or a base is not there or leads back to its file.
    """
    files, name, seen = [], path if os.path.exists(path) else _shipped(path) or path, []
    while name is not None:
        content, base = _read(name), None
        if (here := os.path.realpath(name)) in seen:
            raise UserError(f"{files[0].path}: base: leads back to {name}, which starts from this file")
        seen.append(here)
        if isinstance(content, dict):
            content.pop("$schema", None)  # by which editors find what `--print_completion=jsonschema` printed
        if isinstance(content, dict) and "base" in content:
            base = _base_of(name, content.pop("base"))
        files.insert(0, ConfigFile(name, content))
        name = base
    return files


def merge(
    base: Mapping[str, Any],
    values: Mapping[str, Any],
    kinds: Mapping[str, tuple[str, ...]],
    defaults: Mapping[str, Any],
    pairs: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """What a file gives, before what its base gives.

    Args:
        base: dotted option -> value.
        values: the same of the file.
        kinds: option -> options, or groups of them, that mean something under one value of it alone.
        defaults: dotted option -> value, where neither says which kind is meant.
        pairs: options that are two ways to say one thing.
    """
    gone = [f"{key}." for key in set_aside(base, values, pairs)]
    for kind, parts in kinds.items():
        before = base.get(kind, defaults.get(kind))
        gone += [f"{part}." for part in parts if values.get(kind, before) != before]
    merged = {key: value for key, value in base.items() if not f"{key}.".startswith(tuple(gone))}
    for key, value in values.items():
        merged[key] = _joined(merged.get(key), value)
    return merged


def set_aside(base: Mapping[str, Any], values: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Options of a base that are not meant any more, as a file, or flags, say the same thing by another option.

    Args:
        base, values: as for `merge`; null says nothing.
        pairs: options that are two ways to say one thing.
    """
    both = [*pairs, *((other, one) for one, other in pairs)]
    return [other for one, other in both if values.get(one) is not None and other in base and other not in values]


def _joined(base: Any, value: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(value, dict) and value):
        return value
    return base | {name: _joined(base.get(name), item) for name, item in value.items()}


def _base_of(path: str, base: Any) -> str:
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base: expected the name of a configuration file, got {json.dumps(base)[:80]}")
    beside = os.path.join(os.path.dirname(path), base)
    found = beside if os.path.exists(beside) else _shipped(base)
    if found is None:
        raise UserError(f"{path}: base: there is no {base[:200]}, neither beside this file nor in experiments/configs")
    return found


def _shipped(name: str) -> str | None:
    return str(SHIPPED / name) if os.path.isfile(SHIPPED / name) else None


def _read(path: str) -> Any:
    if not path:
        raise UserError("config: expected the name of a configuration file, got nothing")
    if path.endswith((".yaml", ".yml")):
        return _read_yaml(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]:
            raise UserError(f"{path}: the key {twice[0]!r} is given twice in one object")
        return dict(pairs)

    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a number of 4,301 digits
        raise UserError(f"config file {path} cannot be read: {getattr(error, 'strerror', error)}") from None


def _read_yaml(path: str) -> Any:
    try:
        content = read_yaml(Path(path), core=True)
        waiting = [content]
        while waiting:
            node = waiting.pop()
            waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
            for key in node if isinstance(node, dict) else ():
                if not isinstance(key, str):
                    raise UserError(f"the key {key!r} is no text; in quotes it is")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return content
