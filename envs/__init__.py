"""Environments. Knows no model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module

import torch
from torchrl.envs import EnvBase

from envs.tabletop import SPLITS, TabletopEnv
from research.errors import UserError, did_you_mean

# Name -> module and function that make it, imported when it is asked for: simulators are optional, and slow to import.
_SIMULATORS = {
    "metaworld": ("envs.metaworld", "make_metaworld_env"),
    "maniskill": ("envs.maniskill", "make_maniskill_env"),
    "libero": ("envs.libero", "make_libero_env"),
}
_GYMNASIUM = {"gym": ("envs.gym", "make_gym_env"), "gym_vec": ("envs.gym_vector", "make_gym_vector_env")}
ENVIRONMENTS = ("tabletop", *_SIMULATORS, "gym:<id or entry point>", "gym_vec:<id>")
_SPLITS = {"tabletop": SPLITS}


def make_env(
    name: str,
    num_envs: int,
    env_config: dict,
    device: torch.device | str = "cpu",
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
) -> EnvBase:
    """Build a batched TorchRL environment by name.

    Args:
        name: "tabletop"; "metaworld"; "maniskill"; "libero"; "gym:" and a Gymnasium id or entry point
            ("gym:InvertedPendulum-v5"); or "gym_vec:" and the id of an environment that steps its rows together by
            itself.
        num_envs: N.
        env_config: the environment's own options.
        device: where observations are made (or moved to).
        seed: chooses the stream of training episodes.
        share: (k, n): these are the k-th of n times as many environments, which divide the stream among them.
    Raises:
        UserError: an unknown name, or an option that the environment does not have.
    """
    env = _make_env(name, num_envs, env_config, device, seed)
    env.take_share(*share)
    return env


def _make_env(name: str, num_envs: int, env_config: dict, device: torch.device | str, seed: int) -> EnvBase:
    if name == "tabletop":
        # Of the class itself, Python 3.11 tells what its metaclass takes: anything.
        parameters = inspect.signature(TabletopEnv.__init__).parameters
        known = [p for p in parameters if p not in ("self", "num_envs", "seed", "device")]
        unknown = sorted(set(env_config) - set(known))
        if unknown:
            raise UserError(
                f"trainer.env_config: tabletop has no option {', '.join(unknown)}; it has {', '.join(known)}"
            )
        return TabletopEnv(num_envs, device=device, seed=seed, **env_config)
    make, (kind, _, env_id) = maker_of(name), name.partition(":")
    if kind in _GYMNASIUM and not env_id:
        raise UserError(f"trainer.env: {kind} needs an environment's id, as in {kind}:Pendulum-v1")
    return make(*([env_id] if env_id else []), num_envs, device, seed, **env_config)


def maker_of(name: str) -> Callable[..., EnvBase]:
    """The class or function that makes an environment, whose keyword arguments are its options.

    Args:
        name: as in `trainer.env`; of those of Gymnasium "gym" and "gym_vec" are enough.
    Raises:
        UserError: there is no such environment.
    """
    kind = name.partition(":")[0]
    if name == "tabletop":
        return TabletopEnv
    if name in _SIMULATORS or kind in _GYMNASIUM:
        module, function = (_SIMULATORS | _GYMNASIUM)[kind]
        return getattr(import_module(module), function)
    known = ("tabletop", *_SIMULATORS)
    raise UserError(
        f"trainer.env: unknown environment {name!r}; there are {', '.join(ENVIRONMENTS)}{did_you_mean(name, known)}"
    )


def splits_of(name: str) -> tuple[str, ...]:
    """The values of an environment's option `split`, by which generalisation is evaluated; none without the option."""
    return _SPLITS.get(name, ())


def foreign_code(name: str) -> str | None:
    """The module of users' code that making the environment of this name imports, and so runs.

    Args:
        name: as in `trainer.env`.
    Returns:
        its dotted name; None for this project's own environments and for those that come with Gymnasium.
    """
    if not name.startswith(("gym:", "gym_vec:")):
        return None
    from envs.gym_names import users_module

    return users_module(name)
