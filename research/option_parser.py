"""What jsonargparse does for `research/options.py`: single flags, the help, and completion of a shell or an editor."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_loader, set_parsing_settings

from research.commands import as_called, called
from research.errors import UserError

HELP, PRINT_CONFIG, COMPLETION = "--help", "--print_config", "--print_completion"
QUESTIONS = {
    HELP: "Show this help, with the defaults of this command line, and exit.",
    PRINT_CONFIG: "Print the configuration that this command line comes to, as --config reads it, and exit.",
    COMPLETION: "Print what completes the options in a shell (shtab-bash, shtab-zsh, shtab-tcsh: pip install shtab) or "
    "what an editor checks a configuration with (jsonschema), and exit.",
}


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Descriptions keep their lines."""


@cache  # building it takes 0.2 s
def make_parser(config_class: type, description: str, choices: tuple[tuple[str, type], ...]) -> ArgumentParser:
    """What reads single flags and prints the help.

    Args:
        config_class: the dataclass of all options; a class attribute `sections` of one that it nests divides its help.
        description: what the script does.
        choices: of every union of dataclasses: its dotted key, and the chosen one.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("flag", read_literal)
    usage = "%(prog)s [--config FILE] [--key=value ...]"
    parser = ArgumentParser(
        prog=called(), usage=usage, description=as_called(description), exit_on_error=False, parser_mode="flag",
        add_help=False, formatter_class=_Formatter,
    )  # fmt: skip
    for question, text in QUESTIONS.items():
        kind = {"metavar": "KIND"} if question == COMPLETION else {"action": "store_true"}
        names = ["-h", HELP] if question == HELP else [question]
        parser.add_argument(*names, help=text, default=argparse.SUPPRESS, **kind)
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML file to start from; flags win over it")

    chosen = dict(choices)

    def add_group(group_class: type, key: str) -> None:
        hints = {name: chosen.get(f"{key}.{name}", hint) for name, hint in get_type_hints(group_class).items()}
        nested = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
        names = [item.name for item in fields(group_class)]
        for title, own in _sections(group_class, names).items():
            heading = f"{key}: {title}" if title else key
            group = (
                parser.add_argument_group(heading, None if title else inspect.getdoc(group_class)) if key else parser
            )
            others = set(nested) | set(names) - set(own)
            group.add_class_arguments(group_class, key or None, as_group=False, skip=others)
        for name, hint in nested.items():
            add_group(hint, f"{key}.{name}" if key else name)

    add_group(config_class, "")
    return parser


def _sections(group_class: type, names: Sequence[str]) -> dict[str, list[str]]:
    """The fields of a dataclass under the titles of its help; one without sections has all under no title."""
    begins = getattr(group_class, "sections", {names[0]: ""} if names else {})
    sections: dict[str, list[str]] = {}
    for name in names:
        title = begins.get(name) or (next(reversed(sections)) if sections else "")
        sections.setdefault(title, []).append(name)
    return sections


def split_questions(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The other arguments, and what is asked instead of a run; None where nothing is."""
    asked = {"-h": HELP, HELP: HELP, PRINT_CONFIG: PRINT_CONFIG}
    found = [asked.get(word, word) for word in argv if word in asked or word.startswith(f"{COMPLETION}=")]
    rest = [word for word in argv if word not in asked and not word.startswith(f"{COMPLETION}=")]
    return rest, (HELP if HELP in found else found[0]) if found else None


def answer(text: str) -> NoReturn:
    """Print what was asked for, and exit with code 0, also where the reader stops early, as `| head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
    raise SystemExit(0)


def show_help(parser: ArgumentParser, values: Mapping[str, Any]) -> NoReturn:
    """Print the help, in which these values are the defaults."""
    parser.set_defaults({key: value for key, value in values.items() if value is not MISSING})
    answer(parser.format_help().rstrip("\n"))


def show_completion(parser: ArgumentParser, kind: str) -> NoReturn:
    """Print what completes these options in a shell, or what checks them in an editor.

    Args:
        parser: of the options; of no use afterwards.
        kind: `shtab-bash`, `shtab-zsh`, ... or `jsonschema`.
    Raises:
        UserError: there is no such kind, or it needs shtab.
    """
    try:
        script = parser.get_completion_script(kind)
    except (ValueError, ImportError) as error:
        kinds = "there are jsonschema and, with `pip install shtab`, shtab-bash, shtab-zsh and shtab-tcsh"
        raise UserError(f"{COMPLETION}: {str(error).rstrip('.')}; {kinds}") from None
    answer(_of_files(script) if kind == "jsonschema" else script)


def _of_files(schema: str) -> str:
    """The schema of what a configuration file may hold: a base, and no questions of the command line."""
    content = json.loads(schema)
    for name in ("config", *(question.removeprefix("--") for question in QUESTIONS)):
        content["properties"].pop(name, None)
    content["properties"] |= {"base": {"type": "string", "description": "The configuration file to start from."}}
    return json.dumps(content, indent=2)


def read_literal(text: str) -> Any:
    """The value that text on the command line stands for: a JSON or Python literal, a list without quotes, or text."""
    for read in (json.loads, ast.literal_eval):
        # A text may be nested without end, or 3,000 minus signs.
        with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return json.loads(json.dumps(read(text), allow_nan=False))
    if text.startswith("[") and text.endswith("]") and not set("[]{}") & set(text[1:-1]):
        return [read_literal(item.strip()) for item in text[1:-1].split(",")]
    return text
