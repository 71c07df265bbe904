"""The options of `gym:` and `gym_vec:`: their types, and which of them exclude each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from research.errors import UserError, did_you_mean

_TYPES = {
    "keys": (dict, "an object"),
    "instruction": (str, "a text"),
    "instruction_key": (str, "a text"),
    "success_key": (str, "a text"),
    "success_return": ((int, float), "a number"),
    "env_kwargs": (dict, "an object"),
    "depth_unit": ((int, float, dict), "metres, a number above 0"),
    "worker_timeout": ((int, float), "seconds, a number above 0"),
    "ids_reproducible": (bool, "true or false"),
}
_ABOVE_ZERO = ("depth_unit", "worker_timeout")
_LEAST = {"num_envs": 1, "seed": 0, "instruction_length": 1, "workers": 0, "max_episode_steps": 1}
_MOST = {"instruction_length": 2**16}  # bytes that every observation has, whatever its text
_ONE_OF = (("instruction", "instruction_key"), ("success_key", "success_return"))


def _is_above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


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
        if value is None:
            continue
        fits = isinstance(value, types) and (types is bool or not isinstance(value, bool))
        if fits and option in _ABOVE_ZERO:
            fits = all(map(_is_above_zero, value.values() if isinstance(value, dict) else [value]))
        if not fits:
            raise UserError(f"trainer.env_config.{option}: expected {kind}, got {value!r}")
    for option, least in _LEAST.items():
        value = options.get(option)
        if value is None and (option == "max_episode_steps" or option not in options):
            continue
        most = _MOST.get(option, float("inf"))
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            place = "trainer" if option in of_trainer else "trainer.env_config"
            bound = f"of at least {least}" if option not in _MOST else f"from {least} to {most}"
            raise UserError(f"{place}.{option}: expected an integer {bound}, got {value!r}")
    size = options.get("render")
    if size is not None and not (
        isinstance(size, Sequence) and len(size) == 2 and all(isinstance(x, int) and x > 0 for x in size)
    ):
        raise UserError(f"trainer.env_config.render: expected [height, width] in pixels, got {size!r}")
    for one, other in _ONE_OF:
        if options.get(one) is not None and options.get(other) is not None:
            raise UserError(f"trainer.env_config: give {one} or {other}, not both")
