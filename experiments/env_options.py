"""`--help.env=<environment>`: what `trainer.env_config` may hold, from the signature and docstring of who reads it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import NoReturn

import docstring_parser

from envs import maker_of
from research.option_parser import answer

GIVEN = ("self", "num_envs", "device", "seed")  # by the run itself


def show_options(name: str) -> NoReturn:
    """Print the options of an environment, and exit.

    Args:
        name: as in `trainer.env`; of `gym:<id>` the part before the colon is enough.
    Raises:
        UserError: there is no such environment.
    """
    lines = [f"trainer.env_config, where trainer.env is {name}; as a flag --trainer.env_config.<option>=<value>", ""]
    for option, type_, default, text in options_of(maker_of(name)):
        lines.append(f"  {option}: {type_} = {default!r}")
        lines += textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    answer("\n".join(lines))


def options_of(maker: Callable) -> Iterator[tuple[str, str, object, str]]:
    """(name, type, default, description) of every option; one described where it is first used is described so."""
    constructor = maker.__init__ if inspect.isclass(maker) else maker
    texts = described(maker)
    for option, parameter in inspect.signature(constructor).parameters.items():
        named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if named and option not in GIVEN:
            yield option, parameter.annotation, parameter.default, texts.get(option, "")


def described(maker: Callable) -> dict[str, str]:
    """What the docstring says of each argument; gym_vec's refers to gym's."""
    texts = {} if maker is maker_of("gym") else described(maker_of("gym"))
    own = docstring_parser.parse(inspect.getdoc(maker) or "").params
    return texts | {text.arg_name: " ".join((text.description or "").split()) for text in own}
