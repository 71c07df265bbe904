"""What `gym:` and `gym_vec:` read from a configuration: which environment, and options that fit together."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from research.schema import UserError, did_you_mean, one_line

_TYPES = {
    "keys": (dict, "an object"),
    "instruction": (str, "a text"),
    "instruction_key": (str, "a text"),
    "success_key": (str, "a text"),
    "success_return": ((int, float), "a number"),
    "env_kwargs": (dict, "an object"),
}
_LEAST = {"num_envs": 1, "seed": 0, "instruction_length": 1, "workers": 1, "max_episode_steps": 1}
_ONE_OF = (("instruction", "instruction_key"), ("success_key", "success_return"))


def check_options(name: str, options: Mapping[str, Any], unknown: Mapping[str, Any]) -> None:
    """Refuse options that are none, have the wrong type or exclude each other.

    Args:
        name: the environment's, with its prefix ("gym:InvertedPendulum-v5").
        options: every option that there is, under its name, and `num_envs` and `seed`; None stands for not given.
        unknown: what else was given.
    Raises:
        UserError: naming the first option that is wrong.
    """
    of_trainer = ("num_envs", "seed")
    if unknown:
        first, known = next(iter(unknown)), [option for option in options if option not in of_trainer]
        hint = did_you_mean(first, known) or f"; there are {', '.join(known)}"
        raise UserError(f"trainer.env_config: {name} has no option {first!r}{hint}")
    for option, (types, kind) in _TYPES.items():
        value = options.get(option)
        if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
            raise UserError(f"trainer.env_config.{option}: expected {kind}, got {value!r}")
    for option, least in _LEAST.items():
        value = options.get(option)
        if value is None and (option == "max_episode_steps" or option not in options):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            place = "trainer" if option in of_trainer else "trainer.env_config"
            raise UserError(f"{place}.{option}: expected an integer of at least {least}, got {value!r}")
    if not isinstance(options.get("ids_reproducible", True), bool):
        raise UserError(
            f"trainer.env_config.ids_reproducible: expected true or false, got {options['ids_reproducible']!r}"
        )
    size = options.get("render")
    if size is not None and not (
        isinstance(size, Sequence) and len(size) == 2 and all(isinstance(x, int) and x > 0 for x in size)
    ):
        raise UserError(f"trainer.env_config.render: expected [height, width] in pixels, got {size!r}")
    for one, other in _ONE_OF:
        if options.get(one) is not None and options.get(other) is not None:
            raise UserError(f"trainer.env_config: give {one} or {other}, not both")


def find_spec(name: str) -> EnvSpec:
    """The registry's entry for an id, or a new one for an importable class or function.

    Args:
        name: "gym:" or "gym_vec:" and `EnvId-v0`, `module:EnvId-v0`, `module:Class` or `module.Class`.
    Raises:
        UserError: there is no such environment, or its module cannot be imported.
    """
    prefix, _, env_id = name.partition(":")
    module_name, colon, attribute = env_id.rpartition(":")
    if not colon:
        try:
            return gymnasium.spec(env_id)
        except gymnasium.error.Error as error:
            module_name, dot, attribute = env_id.rpartition(".")
            if not dot:
                ids = {known.lower(): known for known in gymnasium.registry}
                close = [repr(ids[c]) for c in get_close_matches(env_id.lower(), ids, 3)]
                hint = f"did you mean {' or '.join(close)}?" if close else "is the package that registers it installed?"
                raise UserError(
                    f"trainer.env: {name!r} is not registered with Gymnasium; {hint} "
                    f"An environment of your own is named '{prefix}:module:EnvId-v0' or '{prefix}:module:Class'"
                ) from error
    module = _import(module_name, name)
    if attribute in gymnasium.registry:
        return gymnasium.registry[attribute]
    if callable(getattr(module, attribute, None)):
        return EnvSpec(id=attribute, entry_point=f"{module_name}:{attribute}")
    close = get_close_matches(attribute, [*gymnasium.registry, *vars(module)], 3)
    raise UserError(
        f"trainer.env: {name!r}: the module {module_name!r} neither registers nor defines {attribute!r}"
        + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
    )


def _import(module_name: str, name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:  # as for models: at the end, so that nothing installed is hidden
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if f"{module_name}.".startswith(f"{missing}."):
            problem = f"there is no module {missing!r}: neither installed nor in the current directory {Path.cwd()}"
        else:
            problem = f"importing {module_name!r} needs {missing!r}: pip install the package that provides it"
        raise UserError(f"trainer.env: {name!r}: {problem}") from error
    except Exception as error:
        raise UserError(f"trainer.env: {name!r}: importing {module_name!r} {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An exception in one line, with where it came from; the rest of a sentence."""
    if isinstance(error, gymnasium.error.DependencyNotInstalled):
        return f"needs a package that is not installed: {one_line(error)}"
    if isinstance(error, ModuleNotFoundError):
        return f"needs {error.name!r}: pip install the package that provides it"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {one_line(error)} ({Path(place.filename).name}, line {place.lineno})"


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn what the user's environment raises while it does `what` into a `UserError` of one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} {describe(error)}") from error
