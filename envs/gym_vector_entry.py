"""How a Gymnasium vector environment is made so that it leaves a row alone when its episode ends."""

from __future__ import annotations

import inspect

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AutoresetMode

from envs.failures import blame
from envs.gym import Recipe
from research.errors import UserError


def make_vector(recipe: Recipe, num_envs: int) -> gymnasium.vector.VectorEnv:
    """The vector environment, told to leave rows alone when their episodes end, if it can be told."""
    kwargs, disabled = dict(recipe.make_kwargs), {"autoreset_mode": AutoresetMode.DISABLED}
    with blame(f"{recipe.name}: making it with {recipe.make_kwargs}", UserError):
        if recipe.spec.vector_entry_point is None:
            return gymnasium.make_vec(recipe.spec, num_envs=num_envs, vector_kwargs=disabled, **kwargs)
        if _takes_autoreset_mode(recipe.spec):
            kwargs = {**disabled, **kwargs}
        return gymnasium.make_vec(recipe.spec, num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs)


def _takes_autoreset_mode(spec: EnvSpec) -> bool:
    entry = spec.vector_entry_point
    entry = entry if callable(entry) else load_env_creator(entry)
    return "autoreset_mode" in inspect.signature(entry).parameters


def check_autoreset(vector: gymnasium.vector.VectorEnv, recipe: Recipe) -> None:
    """Refuse rows that start again by themselves: how an episode ended and from which id one began would be lost."""
    mode = vector.metadata.get("autoreset_mode")
    if mode not in (AutoresetMode.DISABLED, AutoresetMode.DISABLED.value):
        said = f"autoreset mode {mode.value}" if isinstance(mode, AutoresetMode) else f"metadata says {mode!r}"
        raise UserError(
            f"trainer.env: {recipe.name} resets its rows by itself ({said}); it has to be made with "
            "metadata['autoreset_mode'] = AutoresetMode.DISABLED, perhaps by something in trainer.env_config.env_kwargs"
        )
