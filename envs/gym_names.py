"""Which environment a name after `gym:` or `gym_vec:` means, and what may be called because a name says so.

A configuration may come from somewhere else, so a name is no licence to call anything: it is an id of Gymnasium's
registry, a subclass of `gymnasium.Env`, or a function that the named module itself defines. The standard library and
what this project stands on define no environments of users.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import gymnasium
from gymnasium.envs.registration import EnvSpec

from envs.failures import describe
from research.errors import UserError
from research.own_packages import OWN_PACKAGES, hidden_module

_NOT_OF_USERS = {*sys.stdlib_module_names, *OWN_PACKAGES, "gymnasium", "numpy", "torch"}


def find_spec(name: str) -> EnvSpec:
    """The registry's entry for an id, or a new one for an importable class or function. Calls neither.

    Args:
        name: "gym:" or "gym_vec:" and `EnvId-v0`, `module:EnvId-v0`, `module:Class` or `module.Class`.
    Raises:
        UserError: there is no such environment, its module cannot be imported, or it is none.
    """
    prefix, _, env_id = name.partition(":")
    module_name, attribute = _module_and_attribute(env_id)
    if module_name is None:
        try:
            return gymnasium.spec(env_id)
        except gymnasium.error.Error as error:
            ids = {known.lower(): known for known in gymnasium.registry}
            close = [repr(ids[c]) for c in get_close_matches(env_id.lower(), ids, 3)]
            hint = f"did you mean {' or '.join(close)}?" if close else "is the package that registers it installed?"
            raise UserError(
                f"trainer.env: {name!r} is not registered with Gymnasium; {hint} "
                f"An environment of your own is named '{prefix}:module:EnvId-v0' or '{prefix}:module:Class'"
            ) from error
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"trainer.env: {name!r}: {module_name!r} is Python's own and holds no environments")
    module = _import(module_name, name)
    if attribute in gymnasium.registry:
        return gymnasium.registry[attribute]
    if not hasattr(module, attribute):
        close = get_close_matches(attribute, [*gymnasium.registry, *vars(module)], 3)
        raise UserError(
            f"trainer.env: {name!r}: the module {module_name!r} neither registers nor defines {attribute!r}"
            + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
        )
    made_by = getattr(module, attribute)
    if isinstance(made_by, type) and issubclass(made_by, gymnasium.Env):
        return EnvSpec(id=attribute, entry_point=f"{module_name}:{attribute}")
    if _is_users_function(made_by, module_name):
        return EnvSpec(id=attribute, entry_point=_Function(module_name, attribute))
    raise UserError(
        f"trainer.env: {name!r} is neither a gymnasium.Env nor a function that {module_name!r} defines, "
        "so it is not called; name a class, or a function of your own that returns an environment"
    )


def users_module(name: str) -> str | None:
    """The module that making an environment of this name imports, as `envs.foreign_code`.

    Args:
        name: "gym:" or "gym_vec:" and what `find_spec` takes.
    """
    env_id = name.partition(":")[2]
    module_name, _ = _module_and_attribute(env_id)
    if module_name is None:
        entry = getattr(gymnasium.registry.get(env_id), "entry_point", None)
        module_name = entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", "gymnasium")
    return None if module_name.partition(".")[0] in ("gymnasium", *OWN_PACKAGES) else module_name


def _module_and_attribute(env_id: str) -> tuple[str | None, str]:
    """Which module an id names, and what in it; None for an id of the registry, or what looks most like one."""
    module_name, colon, attribute = env_id.rpartition(":")
    if colon:
        return module_name, attribute
    module_name, dot, attribute = env_id.rpartition(".")
    return (module_name, attribute) if dot and not _is_registered(env_id) else (None, env_id)


def _is_registered(env_id: str) -> bool:
    try:
        return gymnasium.spec(env_id) is not None
    except gymnasium.error.Error:
        return False


def _is_users_function(made_by: Any, module_name: str) -> bool:
    """Whether it is a function that this module, or another of its package, defines: nothing that it imported."""
    top = module_name.partition(".")[0]
    own = str(getattr(made_by, "__module__", "")).partition(".")[0] == top
    return inspect.isfunction(made_by) and own and top not in _NOT_OF_USERS


class _Function(NamedTuple):
    """A function of a user's module as an entry point, which has to return an environment."""

    module_name: str
    attribute: str

    def __call__(self, **kwargs: Any) -> gymnasium.Env:
        made = getattr(importlib.import_module(self.module_name), self.attribute)(**kwargs)
        if not isinstance(made, gymnasium.Env):
            raise TypeError(f"{self.attribute} should return a gymnasium.Env, got {type(made).__name__}")
        return made


def _import(module_name: str, name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:  # as for models: at the end, so that nothing installed is hidden
        sys.path.append(str(Path.cwd()))
    if hidden := hidden_module(module_name):
        raise UserError(f"trainer.env: {name!r}: {hidden}")
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if f"{module_name}.".startswith(f"{missing}."):
            problem = f"there is no module {missing!r}: neither installed nor in the current directory {Path.cwd()}"
        else:
            problem = f"importing {module_name!r} needs {missing!r}: pip install the package that provides it"
        raise UserError(f"trainer.env: {name!r}: {problem}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"trainer.env: {name!r}: importing {module_name!r} {describe(error)}") from error
