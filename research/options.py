"""The parser of configurations: dataclasses, one JSON file, and dotted flags that win over the file. Knows no option.

    python experiments/ppo_vla.py --config my.json --algorithm.cfg.learning_rate=1e-05 --policy.freeze=vision

`parse_config` reads any tree of dataclasses whose fields are `bool`, `int`, `float`, `str`, `None`, a `Literal`, a
restricted number of `jsonargparse.typing`, a `list[...]` or union of those, a `dict[str, ...]` of those or of `Any`
(free-form), another dataclass, or a union of dataclasses, of which the sibling field `name` chooses one: the one whose
class attribute `name` is that value. The docstring under a field is its help text. A `__post_init__` may refuse a
combination of values: it raises `UserError` with a message that begins with the field's name, and `parse_config` puts
the dotted path in front. A method `resolve(given)` may settle values that follow from others; it is told which keys
were given, and by what ("file" or "flag").
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import math
import re
import sys
from argparse import ArgumentError
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace, set_loader, set_parsing_settings

from research.schema import UserError

C = TypeVar("C")

MAX_LINE = 2_000  # characters of a message
MAX_TEXT = 10_000  # characters of a text
MAX_DEPTH = 32  # of dicts and lists inside each other in a free-form option
MAX_INT = 2**63 - 1
MAX_FLOAT = 3.4028235e38  # what float32 holds


def parse_config(config_class: type[C], argv: Sequence[str] | None = None, description: str = "") -> C:
    """Build a configuration: the defaults, then the JSON file named by `--config`, then the flags.

    Args:
        config_class: the dataclass to fill; it may nest others.
        argv: command-line arguments without the program's name; None takes those of this process.
        description: what the script does, for `--help` (which prints and exits with code 0).
    Raises:
        UserError: unknown key, wrong type, value out of range, impossible combination, or unreadable file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _parsed(config_class, argv, description)
    except UserError as error:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error)[:MAX_LINE])
        raise UserError(line) from None


def _parsed(config_class: type[C], argv: list[str], description: str) -> C:
    chosen = _choices(config_class, argv)
    options = list(_options(config_class, chosen))
    hints = {key: hint for key, hint, _ in options}
    values = {key: default for key, _, default in options}
    parser = _parser(config_class, description, tuple(chosen.items()))
    if "-h" in argv or "--help" in argv:
        parser.parse_args(["--help"])
    flags, given = list(_split(argv, hints)), {}
    for key, path in flags:
        if key == "config":
            read = _read_json(path, hints)
            values.update(read)
            given |= dict.fromkeys(read, "file")
    for key, text in flags:
        if key != "config":
            given[_apply_flag(parser, key, text, values, hints)] = "flag"
    for key, value in values.items():
        if value is MISSING:
            raise UserError(f"{key}: a value is required, as in --{key}=...")
    config = _build(config_class, values, chosen)
    if hasattr(config, "resolve"):
        config.resolve(given)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts; saved as JSON and given to `--config`, it makes an equal configuration."""
    return asdict(config)


def flatten(config: Any) -> dict[str, Any]:
    """The configuration as `{dotted key: value}`, with the keys that flags and sweeps use, also inside of dicts."""
    return flatten_dict(to_dict(config))


def flatten_dict(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as `{dotted key: value}`; an empty dict is a value."""
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten_dict(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _choices(config_class: type, argv: Sequence[str]) -> dict[str, type]:
    """For every field that is a union of dataclasses: its dotted key, and the one that its sibling `name` chooses.

    The name is looked for in the flags, then in the file, then it is the default; whether it is a name at all is
    checked where all values are.
    """
    chosen = {}
    for key, members, default in _unions(config_class):
        option = key.rpartition(".")[0] + ".name"
        name = default
        for i, word in enumerate(argv):
            flag, equals, text = word.partition("=")
            if flag == "--config":
                path = text if equals else next(iter(argv[i + 1 : i + 2]), "")
                with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                    node = json.loads(Path(path).read_text(encoding="utf-8-sig"))
                    for part in option.split("."):
                        node = node[part]
                    name = node
        for i, word in enumerate(argv):
            flag, equals, text = word.partition("=")
            if flag == f"--{option}":
                name = text if equals else next(iter(argv[i + 1 : i + 2]), "")
        by_name = {member.name: member for member in members}
        chosen[key] = by_name.get(name if isinstance(name, str) else default, by_name[default])
    return chosen


def _unions(config_class: type, prefix: str = "") -> Iterator[tuple[str, tuple[type, ...], str]]:
    """(dotted key, members, default of the sibling `name`) of every field that is a union of dataclasses."""
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        hint, members = hints[item.name], get_args(hints[item.name])
        if is_dataclass(hint):
            yield from _unions(hint, f"{prefix}{item.name}.")
        elif members and all(map(is_dataclass, members)):
            default = next(f.default for f in fields(config_class) if f.name == "name")
            yield prefix + item.name, members, default


def _options(
    config_class: type, chosen: Mapping[str, type], default: Any = MISSING, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, type, default) of every option; the default is MISSING where a value is required."""
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        key = prefix + item.name
        hint = chosen.get(key, hints[item.name])
        if default is not MISSING:  # an outer class may give a nested one other defaults
            value = getattr(default, item.name)
        else:
            value = item.default if item.default_factory is MISSING else item.default_factory()
        if is_dataclass(hint):
            if value is not MISSING and not isinstance(value, hint):
                value = hint()  # the default is another member of the union
            yield from _options(hint, chosen, value, key + ".")
        else:
            yield key, hint, value


def _build(config_class: type[C], values: dict[str, Any], chosen: Mapping[str, type], prefix: str = "") -> C:
    """The dataclass from `{dotted key: value}`."""
    arguments, hints = {}, get_type_hints(config_class)
    for item in fields(config_class):
        key = prefix + item.name
        hint = chosen.get(key, hints[item.name])
        arguments[item.name] = _build(hint, values, chosen, key + ".") if is_dataclass(hint) else values[key]
    try:
        return config_class(**arguments)
    except UserError as error:  # from a __post_init__, which knows its own field names only
        raise UserError(f"{prefix}{error}") from None


@cache  # building it takes 0.2 s
def _parser(config_class: type, description: str, choices: tuple[tuple[str, type], ...]) -> ArgumentParser:
    """What reads single flags and prints the help. Files are read by `_read_json`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("flag", _read_literal)
    usage = "%(prog)s [--config FILE] [--key=value ...]"
    parser = ArgumentParser(usage=usage, description=description, exit_on_error=False, parser_mode="flag")
    parser.add_argument("--config", metavar="FILE", help="JSON file to start from; flags win over it")

    chosen = dict(choices)

    def add_group(group_class: type, key: str) -> None:
        hints = {name: chosen.get(f"{key}.{name}", hint) for name, hint in get_type_hints(group_class).items()}
        nested = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
        group = parser.add_argument_group(key, inspect.getdoc(group_class)) if key else parser
        group.add_class_arguments(group_class, key or None, as_group=False, skip=set(nested))
        for name, hint in nested.items():
            add_group(hint, f"{key}.{name}" if key else name)

    add_group(config_class, "")
    defaults = {key: default for key, _, default in _options(config_class, chosen) if default is not MISSING}
    parser.set_defaults(defaults)
    return parser


def _split(argv: list[str], hints: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, text) of each flag, written `--key=text` or `--key text`; `key+` appends to a list."""
    words = iter(argv)
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; options are written --key=value")
        key, equals, text = word[2:].partition("=")
        known = key == "config" or key.removesuffix("+") in hints or _dict_option(key, hints)
        if not known or not all(key.split(".")):
            raise UserError(f"unknown option --{key}{_suggestion(key, list(hints), '--')}")
        if not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise UserError(f"--{key} needs a value, as in --{key}=...")
        yield key, text


def _dict_option(key: str, hints: dict[str, Any]) -> str | None:
    """The dict-valued option that `key` is, or names an entry of."""
    return next((o for o, hint in hints.items() if get_origin(hint) is dict and f"{key}.".startswith(f"{o}.")), None)


def _apply_flag(parser: ArgumentParser, key: str, text: str, values: dict[str, Any], hints: dict[str, Any]) -> str:
    """Set in `values` the option, or the entry of a dict-valued option, that one flag names; returns the option."""
    option = _dict_option(key, hints)
    if option is None:
        option = key.removesuffix("+")
        current = Namespace()
        current[option] = values[option]
        try:
            value = parser.parse_args([f"--{key}={text}"], namespace=current, defaults=False)[option]
        except ArgumentError:
            if key != option:
                raise UserError(f"--{key}: {_shown(text)} cannot be appended to {option}") from None
            value = _read_literal(text)  # which _checked refuses with a shorter message
    elif key == option:
        value = _read_literal(text)
    else:
        # Not left to jsonargparse, which keeps free-form entries as text and drops the siblings of nested ones.
        value = copy.deepcopy(values[option])
        entry = key.removeprefix(option + ".")
        *parents, last = entry.split(".") if get_args(hints[option])[1] is Any else [entry]
        node = value
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UserError(f"--{key}: {name!r} holds {_shown(node)}, which has no entries to set")
        node[last] = _read_literal(text)
    values[option] = _checked(value, hints[option], option)
    return option


def _read_literal(text: str) -> Any:
    """The value that text on the command line stands for: a JSON or Python literal, a list without quotes, or text."""
    for read in (json.loads, ast.literal_eval):
        # A text may be nested without end, or 3,000 minus signs.
        with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return json.loads(json.dumps(read(text), allow_nan=False))
    if text.startswith("[") and text.endswith("]") and not set("[]{}") & set(text[1:-1]):
        return [_read_literal(item.strip()) for item in text[1:-1].split(",")]
    return text


def _read_json(path: str, hints: dict[str, Any]) -> dict[str, Any]:
    """The checked values of a config file as `{dotted key: value}`.

    Not left to jsonargparse, which takes "1e-5" for a number, "no" for false, and lets some unknown keys pass.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]:
            raise UserError(f"{path}: the key {twice[0]!r} is given twice in one object")
        return dict(pairs)

    groups = {option[:i] for option in hints for i, letter in enumerate(option) if letter == "."}

    def visit(node: Any, key: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict):
            raise UserError(f"{path}: {key or 'the file'}: expected object, got {_shown(node)}")
        for name, value in node.items():
            inner = f"{key}.{name}" if key else name
            if "." in name:
                raise UserError(f"{path}: the key {name!r} has a dot; in a file, groups are nested objects")
            if inner in hints:
                yield inner, _checked(value, hints[inner], inner, f"{path}: ")
            elif inner in groups:
                yield from visit(value, inner)
            else:
                raise UserError(f"{path}: unknown key {inner}{_suggestion(inner, [*hints, *groups])}")

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a number of 4,301 digits
        raise UserError(f"config file {path} cannot be read: {getattr(error, 'strerror', error)}") from None
    return dict(visit(content, ""))


def _suggestion(key: str, known: list[str], dashes: str = "") -> str:
    """End of the message about a misspelt or misplaced key: what it probably was, or nothing."""
    names = [option.rpartition(".")[2] for option in known]
    alike = get_close_matches(key.rpartition(".")[2], names, 1)
    close = get_close_matches(key, [o for o, name in zip(known, names, strict=True) if name in alike] or known, 1, 0.5)
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def _checked(value: Any, hint: Any, key: str, source: str = "") -> Any:
    """`value` as the type `hint`, or a `UserError` that names the key."""
    if problem := _unusable(value):
        raise UserError(f"{source}{key}: {problem}")
    if get_origin(hint) is dict and isinstance(value, dict):
        return {name: _checked(item, get_args(hint)[1], f"{key}.{name}", source) for name, item in value.items()}
    try:
        typed = _typed(value, hint)
    except (ValueError, OverflowError):
        raise UserError(f"{source}{key}: expected {_described(hint)}, got {_shown(value)}") from None
    for _, leaf in _nodes(typed):
        if (isinstance(leaf, int) and abs(leaf) > MAX_INT) or (isinstance(leaf, float) and abs(leaf) > MAX_FLOAT):
            raise UserError(f"{source}{key}: {_shown(leaf)} is too large a number")
    return typed


def _unusable(value: Any) -> str | None:
    """What is wrong with a value whatever the option: text that is no name of anything, or nesting without end."""
    for depth, node in _nodes(value):
        if depth > MAX_DEPTH:
            return f"is nested more than {MAX_DEPTH} levels deep"
        if isinstance(node, str) and len(node) > MAX_TEXT:
            return f"has a text of {len(node):,} characters, more than {MAX_TEXT:,}"
        if isinstance(node, str) and ("\0" in node or re.search("[\\ud800-\\udfff]", node)):
            return f"{_shown(node)} has a NUL, or characters that are no Unicode"
    return None


def _nodes(value: Any) -> Iterator[tuple[int, Any]]:
    """(depth, node) of a value and of all that is nested in it, keys included; without recursion."""
    waiting = [(0, value)]
    while waiting:
        depth, node = waiting.pop()
        yield depth, node
        if isinstance(node, dict):
            waiting += [(depth + 1, inner) for pair in node.items() for inner in pair]
        elif isinstance(node, list):
            waiting += [(depth + 1, inner) for inner in node]


def _typed(value: Any, hint: Any) -> Any:
    """`value` if it is of the type `hint`, else ValueError. Text is no number; only int becomes float."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        json.dumps(value, allow_nan=False)  # raises ValueError: NaN would not survive config.json and W&B
        return value
    if hint in (bool, str, NoneType) and type(value) is hint:
        return value
    if origin is Literal and value in arguments:
        return value
    if origin in (Union, UnionType):
        for option in arguments:
            with suppress(ValueError):
                return _typed(value, option)
    if origin is list and isinstance(value, list):
        return [_typed(item, arguments[0]) for item in value]
    if isinstance(hint, type) and isinstance(value, int | float) and not isinstance(value, bool):
        # A restricted number is a class whose constructor raises ValueError out of its range.
        if issubclass(hint, int) and hint is not bool and isinstance(value, int):
            return int(hint(value))
        if issubclass(hint, float) and math.isfinite(value):
            return float(hint(value))
    raise ValueError(value)


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return " or ".join(map(json.dumps, arguments))
    if origin is list:
        return f"list of {_described(arguments[0])}s"
    if hint.__module__ == "jsonargparse.typing":
        return hint.__doc__.replace(" restricted to be", "")  # "int restricted to be >0"
    names = {Any: "finite numbers", dict: "object", NoneType: "null", bool: "true or false", str: "string"}
    return names.get(origin or hint) or hint.__name__


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 80 else text[:77] + "..."
    return f"the string {text}" if isinstance(value, str) else text
