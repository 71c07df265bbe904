"""The parser of configurations: dataclasses, a JSON or YAML file, and dotted flags that win over it. Knows no option.

    python experiments/ppo_vla.py --config my.json --algorithm.cfg.learning_rate=1e-05 --policy.freeze=vision

`parse_config` reads any tree of dataclasses whose fields are `bool`, `int`, `float`, `str`, `None`, a `Literal`, a
restricted number of `jsonargparse.typing`, a `list[...]` or union of those, a `dict[str, ...]` of those or of `Any`
(free-form), another dataclass, or a union of dataclasses, of which the sibling field `name` chooses one: the one whose
class attribute `name` is that value. The docstring under a field is its help text. A `__post_init__` may refuse a
combination of values: it raises `UserError` with a message that begins with the field's name, and `parse_config` puts
the dotted path in front. A method `resolve(given)` may settle values that follow from others; it is told which keys
were given, and by what ("base", "file" or "flag"). A class attribute `kinds` says which fields mean something under one
value of another alone: what a file's base gives them is left out where the file gives that other one another value,
and an object's default where anything does. A class attribute `either` names pairs of options that are two ways to
say one thing: who gives one (flags, a file) sets aside what is weaker (the file, its base) says by the other.
A file that the arguments do not name, from which a script starts (`start`), is a base to the flags in the same way.
"""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from research.config_file import ConfigFile, merge, read_chain, set_aside
from research.errors import UserError
from research.option_parser import (
    COMPLETION,
    HELP,
    PRINT_CONFIG,
    answer,
    make_parser,
    read_literal,
    show_completion,
    show_help,
    split_questions,
)

C = TypeVar("C")

MAX_LINE = 2_000  # characters of a message
MAX_TEXT = 10_000  # characters of a text
MAX_DEPTH = 32  # of dicts and lists inside each other in a free-form option
MAX_INT = 2**63 - 1
MAX_FLOAT = 3.4028235e38  # what float32 holds


def parse_config(
    config_class: type[C], argv: Sequence[str] | None = None, description: str = "", start: str | Path | None = None
) -> C:
    """Build a configuration: the defaults, then the file named by `--config`, then the flags.

    Args:
        config_class: the dataclass to fill; it may nest others.
        argv: command-line arguments without the program's name; None takes those of this process.
        description: what the script does, for `--help`, which prints and exits with code 0. So do `--print_config` and
            `--print_completion`.
        start: the file that is read where none is named. Of what it gives, only what fits the kinds (environment, model
            class, algorithm) that flags name is kept; a named file keeps all, as one may vary its kind in a sweep.
    Raises:
        UserError: unknown key, wrong type, value out of range, impossible combination, or unreadable file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _parsed(config_class, argv, description, start)
    except UserError as error:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error)[:MAX_LINE])
        raise UserError(line) from None


def _parsed(config_class: type[C], argv: list[str], description: str, start: str | Path | None) -> C:
    argv, asked = split_questions(argv)
    chains = [read_chain(path) for path in _values_of(argv, "config")]
    if start is not None and not names_config(argv):
        chains = [[*read_chain(str(start)), ConfigFile("the command line", _kinds_of_flags(config_class, argv))]]
    chosen = _choices(config_class, argv, [file for chain in chains for file in chain])
    options = list(_options(config_class, chosen))
    values = {key: default for key, _, default in options}
    values |= _defaults_of_other_kinds(config_class, argv, [file for chain in chains for file in chain], values)
    parser = make_parser(config_class, description, tuple(chosen.items()))
    try:
        given = _read(config_class, parser, argv, chains, values, {key: hint for key, hint, _ in options})
    except UserError:
        if asked != HELP:  # which is for whoever made a mistake, too
            raise
    if asked == HELP:
        show_help(parser, values)
    if asked and asked.startswith(COMPLETION):
        show_completion(parser, asked.partition("=")[2])
    for key, value in values.items():
        if value is MISSING:
            raise UserError(f"{key}: a value is required, as in --{key}=...")
    config = _build(config_class, values, chosen)
    if hasattr(config, "resolve"):
        config.resolve(given)
    if asked == PRINT_CONFIG:
        answer(json.dumps(to_dict(config), indent=2))
    return config


def _read(
    config_class: type,
    parser: ArgumentParser,
    argv: list[str],
    chains: Sequence[Sequence[ConfigFile]],
    values: dict[str, Any],
    hints: dict[str, Any],
) -> dict[str, str]:
    """Put into `values` what the files and then the flags give; returns what gave each: "base", "file" or "flag"."""
    flags, given, defaults, pairs = list(_split(argv, hints)), {}, dict(values), _pairs(config_class)
    for chain in chains:
        read, places = _read_values(config_class, chain, hints)
        for key in set_aside(values, read, pairs):
            values[key] = defaults[key]
            given.pop(key, None)
        values |= read
        given |= places
    before, flagged = dict(values), {}
    for key, text in flags:
        if key != "config":
            option = _apply_flag(parser, key, text, values, hints)
            given[option], flagged[option] = "flag", values[option]
    _refuse_both(flagged, pairs)
    for key in set_aside(before, flagged, pairs):
        values[key] = defaults[key]
        given.pop(key, None)
    return given


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


def names_config(argv: Sequence[str]) -> bool:
    """Whether some arguments name a configuration file."""
    return any(word == "--config" or word.startswith("--config=") for word in argv)


def _values_of(argv: Sequence[str], option: str) -> Iterator[str]:
    """The texts that some arguments give an option, in order."""
    for i, word in enumerate(argv):
        flag, equals, text = word.partition("=")
        if flag == f"--{option}" and (equals or i + 1 < len(argv)):
            yield text if equals else argv[i + 1]


def _choices(config_class: type, argv: Sequence[str], files: Sequence[ConfigFile]) -> dict[str, type]:
    """For every field that is a union of dataclasses: its dotted key, and the one that its sibling `name` chooses.

    The name is that of the last flag, else of the last file that gives one, else the default; whether it is a name at
    all is checked where all values are.
    """
    chosen = {}
    for key, members, default in _unions(config_class):
        option = key.rpartition(".")[0] + ".name"
        name = default
        for file in files:
            name = file.get(option, name)
        *_, name = name, *_values_of(argv, option)
        by_name = {member.name: member for member in members}
        chosen[key] = by_name.get(name if isinstance(name, str) else default, by_name[default])
    return chosen


def _kinds(config_class: type, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """Dotted option -> options and groups that mean something under one value of it alone."""
    kinds = {
        prefix + kind: tuple(prefix + n for n in names) for kind, names in getattr(config_class, "kinds", {}).items()
    }
    for name, hint in get_type_hints(config_class).items():
        for group in (hint, *get_args(hint)):
            if is_dataclass(group):
                kinds |= _kinds(group, f"{prefix}{name}.")
    return kinds


def _pairs(config_class: type, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted options that are two ways to say one thing."""
    pairs = [(prefix + one, prefix + other) for one, other in getattr(config_class, "either", ())]
    for name, hint in get_type_hints(config_class).items():
        for group in (hint, *get_args(hint)):
            if is_dataclass(group):
                pairs += _pairs(group, f"{prefix}{name}.")
    return pairs


def _refuse_both(values: Mapping[str, Any], pairs: Sequence[tuple[str, str]], source: str = "") -> None:
    """Refuse what gives both options of a pair; null gives none."""
    for one, other in pairs:
        if values.get(one) is not None and values.get(other) is not None:
            raise UserError(f"{source}{one} and {other} are two ways to say one thing; give one of them")


def _kinds_of_flags(config_class: type, argv: Sequence[str]) -> dict[str, Any]:
    """The kinds that some arguments name, nested as in a file."""
    nested = {}
    for option in _kinds(config_class):
        *_, text = None, *_values_of(argv, option)
        if text is not None:
            *groups, name = option.split(".")
            node = nested
            for group in groups:
                node = node.setdefault(group, {})
            node[name] = text
    return nested


def _defaults_of_other_kinds(
    config_class: type, argv: Sequence[str], files: Sequence[ConfigFile], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Objects that are empty by default where files or flags name another kind than that whose settings they hold."""
    others = {}
    for kind, parts in _kinds(config_class).items():
        named = defaults.get(kind)
        for file in files:
            named = file.get(kind, named)
        *_, named = named, *_values_of(argv, kind)
        if named != defaults.get(kind):
            others |= {part: {} for part in parts if isinstance(defaults.get(part), dict)}
    return others


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
            value = read_literal(text)  # which _checked refuses with a shorter message
    elif key == option:
        value = read_literal(text)
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
        node[last] = read_literal(text)
    values[option] = _checked(value, hints[option], option)
    return option


def _read_values(
    config_class: type, chain: Sequence[ConfigFile], hints: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The checked values of a file and what it starts from, by dotted key, and where each was given: "base" or "file".

    A base is checked as what it is by itself: it may be for another algorithm, of whose options nothing is left.
    """
    kinds, pairs, base = _kinds(config_class), _pairs(config_class), {}

    def read_file(file: ConfigFile, hints: dict[str, Any]) -> dict[str, Any]:
        read = dict(_visit(file, hints))
        # What a run wrote, or --print_config, gives every option, and does not say so which one is meant.
        if len(read) <= len(hints) / 2:
            _refuse_both(read, pairs, f"{file.path}: ")
        return read

    for i in range(1, len(chain)):
        own = list(_options(config_class, _choices(config_class, (), chain[:i])))
        defaults = {key: default for key, _, default in own}
        base = merge(base, read_file(chain[i - 1], {key: hint for key, hint, _ in own}), kinds, defaults, pairs)
    read = read_file(chain[-1], hints)
    values = merge(base, read, kinds, defaults, pairs) if base else read
    for key in values:
        if key not in hints:
            raise UserError(f"{chain[0].path}: unknown key {key}{_suggestion(key, list(hints))}")
    return values, {key: "file" if key in read else "base" for key in values}


def _visit(file: ConfigFile, hints: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, checked value) of all that a file gives.

    Not left to jsonargparse, which takes "1e-5" for a number, "no" for false, and lets some unknown keys pass.
    """
    path, groups = file.path, {option[:i] for option in hints for i, letter in enumerate(option) if letter == "."}

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
                known = [*(hints if not isinstance(value, dict) else ()), *groups]  # "trainer" is no "wander"
                known += [o for o, hint in hints.items() if dict in map(get_origin, (hint, *get_args(hint)))]
                raise UserError(f"{path}: unknown key {inner}{_suggestion(inner, known)}")

    return visit(file.content, "")


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
