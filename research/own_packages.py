"""The project's top packages, and what hides a module of the user's that is called like one of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

OWN_PACKAGES = ("agents", "envs", "research")  # names that a user's folder must not have


def hidden_module(module_name: str) -> str | None:
    """Why a module that lies in the working directory would not be imported: something else has its package's name.

    Args:
        module_name: dotted, as a configuration names it.
    Returns:
        one line that says which hides which and what to do; None where nothing is hidden.
    """
    top = module_name.partition(".")[0]
    meant = Path.cwd().joinpath(*module_name.split("."))
    if not (meant.with_name(f"{meant.name}.py").is_file() or (meant / "__init__.py").is_file()):
        return None
    try:
        found = importlib.util.find_spec(top)
    except ValueError:  # a module without a spec, as the main script is
        return None
    places = [] if found is None else [*(found.submodule_search_locations or []), found.origin or ""]
    here = [(Path.cwd() / top).resolve(), (Path.cwd() / f"{top}.py").resolve()]
    if not places or any(Path(place).resolve() in here for place in places):
        return None
    owner = "this project's package" if top in OWN_PACKAGES else "the installed package"
    return (
        f"{module_name!r} lies in the working directory, but {owner} {top!r} has the same name and hides it; "
        f"rename your {top!r}"
    )
