"""Bring your own environment: any Gymnasium env with Box or Dict observations and a Box action space.

`"env": "gym:InvertedPendulum-v5"` in a configuration names

- a registered id (`InvertedPendulum-v5`), or one that a module registers when imported (`my_package:MyEnv-v0`);
- an importable class or function that returns a `gymnasium.Env` (`my_package.my_env:MyEnv`, `my_package.my_env.MyEnv`).

What comes out keeps to `envs.simulator.Environment`. `success` is there where the environment has a notion of it.
`action` is float32 `[N, A]`: a component with two finite bounds is rescaled from [-1, 1] and clipped, any other keeps
the environment's own scale. Pictures of several cameras are `rgb_<camera>` and `depth_<camera>`.

The id of an initial state is the seed given to `gymnasium.Env.reset`. Training draws its ids from a stream that depends
on `seed`, on the row and on how many episodes that row has seen, and on nothing else, so the number of worker processes
does not change the data. Ids below `HELD_OUT_STATES` are never drawn: they are kept for evaluation. An environment that
takes randomness from anywhere but its own `np_random` is not reproducible, and nothing here can make it so.

An environment that runs many worlds at once by itself is named `gym_vec:`; see envs/gym_vector.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec

from envs.gym_options import blame, check_options, find_spec
from envs.gym_spaces import (
    SUCCESS_KEYS,
    ActionScale,
    Source,
    Sources,
    check_one_text,
    encode_instruction,
    look_up,
    map_observations,
    names_of,
    observation_layout,
    read_source,
)
from envs.pictures import resize
from envs.simulator import Layout
from envs.vector import VectorEnv
from research.schema import DEPTH, LANGUAGE, RGB, SUCCESS, UserError, base_modality

log = logging.getLogger(__name__)


def make_gym_env(
    env_id: str,
    num_envs: int,
    device: torch.device | str,
    seed: int,
    /,
    *,
    keys: dict[str, str | list[str] | None] | None = None,
    instruction: str | None = None,
    instruction_key: str | None = None,
    instruction_length: int = 64,
    render: list[int] | None = None,
    success_key: str | None = None,
    success_return: float | None = None,
    max_episode_steps: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    workers: int = 1,
    ids_reproducible: bool = True,
    **unknown: Any,
) -> VectorEnv:
    """Make `num_envs` copies of a Gymnasium environment, stepped together.

    Args:
        env_id: a registered id, `module:EnvId-v0`, `module:Class` or `module.Class`.
        num_envs: N.
        device: where observations and rewards are put; the simulators run on the CPU.
        seed: which stream of initial states training episodes are drawn from.
        keys: observation key -> path in the environment's observation, "." walking into nested Dicts and "" (or null)
            meaning a whole Box: `{"proprio": ["arm.joints", "gripper"], "rgb": "images.front"}`. Several paths are
            concatenated, for `proprio` alone. More cameras are `rgb_<camera>` and `depth_<camera>`. By default a uint8
            Box is `rgb`, any other Box `proprio`, and of a Dict the entries named `rgb`, `depth`, `proprio` or
            `language` are taken. `{}` takes nothing (for pixels from `render`).
        instruction: the text under `language`, the same for every episode.
        instruction_key: take each episode's text from this entry of the info that reset returns ("." walks).
        instruction_length: L, bytes reserved for the text.
        render: [H, W]: the pixels of `env.render()`, resized if they have another size, are the `rgb` observation.
            Simulators that take a size (`"env_kwargs": {"width": 64, "height": 64}`) draw small pictures faster.
        success_key: the entry of each step's info that says success ("." walks). By default `success` or `is_success`,
            if a reset and a step made at construction report it. Without any of these there is no `success`.
        success_return: instead, success is a return of at least this, so far in the episode.
        max_episode_steps: truncation limit, instead of the one the environment is registered with.
        env_kwargs: passed to `gymnasium.make`.
        workers: processes among which the environments are divided (at most N); 1 steps them in this process. Two on
            two cores were 1.5 to 1.9 times as fast as one where a step takes 5 ms, and slower where it takes 0.1 ms.
        ids_reproducible: false says that one knows: the same id does not start from the same state here. Otherwise that
            is tried, and such an environment refused. Comparisons of runs are then not paired by initial state.

    Raises:
        UserError: an option, the environment's spaces or its package do not fit; the message names the option.
    """
    name = f"gym:{env_id}"
    options = {option: value for option, value in locals().items() if option in make_gym_env.__kwdefaults__}
    check_options(name, {**options, "num_envs": num_envs, "seed": seed}, unknown)
    make_kwargs = dict(env_kwargs or {})
    if render is not None and make_kwargs.setdefault("render_mode", "rgb_array") != "rgb_array":
        raise UserError(f"trainer.env_config.render needs render_mode 'rgb_array', got {make_kwargs['render_mode']!r}")
    if max_episode_steps is not None:
        make_kwargs["max_episode_steps"] = max_episode_steps
    recipe = Recipe(
        name=name,
        spec=find_spec(name),
        make_kwargs=make_kwargs,
        render=None if render is None else (render[0], render[1]),
        instruction=instruction,
        instruction_key=instruction_key,
        instruction_length=instruction_length,
        success_key=success_key,
        success_return=success_return,
    )
    recipe, distinct = _try_out(recipe, keys, ids_reproducible)
    env = VectorEnv(partial(GymnasiumSimulator, recipe), num_envs, workers, seed, device, name)
    env.distinct_states = distinct
    return env


@dataclass(frozen=True)
class Recipe:
    """All that a process needs to make one environment and to read it; fields as the options of `make_gym_env`."""

    name: str
    spec: EnvSpec
    make_kwargs: dict[str, Any]
    render: tuple[int, int] | None
    instruction: str | None
    instruction_key: str | None
    instruction_length: int
    success_key: str | None
    success_return: float | None
    sources: Sources = field(default_factory=dict)


class GymnasiumSimulator:
    """One Gymnasium environment as an `envs.simulator.Simulator`; its ids are the seeds of `reset`.

    Args:
        recipe: which environment, and how to read it.
        check: let Gymnasium check what the environment returns, and warn.
    Raises:
        UserError: whatever the environment raises, in one line.
    """

    def __init__(self, recipe: Recipe, check: bool = False):
        with blame(f"{recipe.name}: making it with {recipe.make_kwargs}"):
            self.env = gymnasium.make(recipe.spec, disable_env_checker=not check, **recipe.make_kwargs)
        self._action = ActionScale(self.env.action_space, recipe.name)
        self.info: Mapping[str, Any] = {}
        self.read_as(recipe)

    def read_as(self, recipe: Recipe) -> None:
        """Read observations and success as a recipe says from now on."""
        self.recipe = recipe
        observation = observation_layout(recipe.sources, recipe.instruction_length)
        if recipe.render is not None:
            observation[RGB] = (*recipe.render, 3), np.dtype(np.uint8)
        if recipe.instruction is not None or recipe.instruction_key is not None:
            observation[LANGUAGE] = (recipe.instruction_length,), np.dtype(np.int64)
        if recipe.instruction is not None:
            self._language = encode_instruction(recipe.instruction, recipe.instruction_length)
        self.layout = Layout(
            observation=observation,
            action_dim=self._action.size,
            bounded=self._action.bounded,
            has_success=recipe.success_key is not None or recipe.success_return is not None,
            films=self.env.render_mode == "rgb_array",
        )

    def reset(self, state: int) -> dict[str, np.ndarray]:
        recipe = self.recipe
        with blame(f"{recipe.name}: reset(seed={state})"):
            observation, self.info = self.env.reset(seed=state)
        self._return, self._success_reported = 0.0, False
        if recipe.instruction_key is not None:
            text = look_up(self.info, recipe.instruction_key)
            if not isinstance(text, str):
                raise UserError(
                    f"trainer.env_config.instruction_key: reset of {recipe.name} put no text under "
                    f"info[{recipe.instruction_key!r}]; info has {names_of(self.info)}"
                )
            self._language = encode_instruction(text, recipe.instruction_length)
        return self._observe(observation)

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        with blame(f"{self.recipe.name}: step()"):
            observation, reward, terminated, truncated, self.info = self.env.step(self._action(action))
        out = {
            "reward": self._one("reward", reward, np.float32),
            "terminated": self._one("terminated", terminated, bool),
            "truncated": self._one("truncated", truncated, bool),
        }
        self._return += float(out["reward"][0])
        success = self._success(bool(terminated or truncated))
        if success is not None:
            out[SUCCESS] = np.array([success], dtype=bool)
        return {**out, **self._observe(observation)}

    def _one(self, what: str, value: Any, dtype: type) -> np.ndarray:
        """What a step returned for one environment, `[1]`: a number, or an array or tensor of one element."""
        array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
        if array.size != 1 or array.dtype.kind not in "bifu":
            raise UserError(
                f"{self.recipe.name}: step() should return one number as {what}, got {type(value).__name__} {value!r}"
            )
        return array.reshape(1).astype(dtype)

    def frame(self) -> np.ndarray:
        with blame(f"{self.recipe.name}: render()"):
            frame = np.asarray(self.env.render())
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise UserError(
                f"{self.recipe.name}: render() should return uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}"
            )
        return frame

    def save(self) -> None:
        """Gymnasium has no way to save an environment."""
        return None

    def load(self, state: bytes) -> None:
        raise NotImplementedError("a Gymnasium environment cannot be saved")

    def close(self) -> None:
        self.env.close()

    def _success(self, ended: bool) -> bool | None:
        recipe = self.recipe
        if recipe.success_return is not None:
            return self._return >= recipe.success_return
        if recipe.success_key is None:
            return None
        value = look_up(self.info, recipe.success_key)
        if value is not None:
            self._success_reported = True
        elif ended and not self._success_reported:
            # A misspelt key would otherwise read as a success rate of zero.
            raise UserError(
                f"trainer.env_config.success_key: an episode of {recipe.name} ended without "
                f"info[{recipe.success_key!r}]; info has {names_of(self.info)}"
            )
        return bool(value)

    def _observe(self, observation: Any) -> dict[str, np.ndarray]:
        out = {}
        for key, sources in self.recipe.sources.items():
            values = [self._read(observation, key, source) for source in sources]
            base = base_modality(key)
            if base == LANGUAGE:
                out[key] = encode_instruction(values[0], self.recipe.instruction_length)
            elif base == RGB:
                out[key] = values[0]
            elif base == DEPTH:
                out[key] = values[0].astype(np.float32).reshape(sources[0].shape[:2])
            else:
                out[key] = np.concatenate([value.astype(np.float32).ravel() for value in values])
        if self.recipe.render is not None:
            out[RGB] = resize(self.frame(), *self.recipe.render)
        if self.recipe.instruction is not None or self.recipe.instruction_key is not None:
            out[LANGUAGE] = self._language
        return out

    def _read(self, observation: Any, key: str, source: Source) -> Any:
        value = read_source(observation, source, self.recipe.name)
        if key == LANGUAGE:
            return value
        value = np.asarray(value)
        if value.shape != source.shape or (base_modality(key) == RGB and value.dtype != np.uint8):
            raise UserError(
                f"{self.recipe.name}: the observation for {key!r} is {value.dtype} {list(value.shape)}, "
                f"but its space says {list(source.shape)}"
            )
        return value


def _try_out(recipe: Recipe, keys: Mapping[str, Any] | None, ids_reproducible: bool) -> tuple[Recipe, bool]:
    """Complete a recipe by what one environment tells about all of them, and say whether ids differ in their states."""
    simulator = GymnasiumSimulator(recipe, check=True)
    try:
        sources = map_observations(simulator.env.observation_space, keys, recipe.name)
        if recipe.render is not None and RGB in sources:
            raise UserError("trainer.env_config: rgb comes from render or from keys, not from both; set keys")
        check_one_text(sources, recipe.instruction is not None or recipe.instruction_key is not None)
        recipe = replace(recipe, sources=sources)
        simulator.read_as(recipe)
        if not simulator.reset(0):
            raise UserError(
                f"trainer.env_config: nothing of {recipe.name} is observed; set keys, render or instruction"
            )
        if simulator.layout.films:
            simulator.frame()  # a missing renderer shows now, not at the first evaluation
        reported = set(simulator.info)
        simulator.step(np.zeros(simulator.layout.action_dim, dtype=np.float32))
        after_step = set(simulator.info)
        distinct = _try_ids(simulator, ids_reproducible)
        if recipe.success_key is None and recipe.success_return is None:
            found = next((key for key in SUCCESS_KEYS if key in reported | after_step), None)
            recipe = replace(recipe, success_key=found)
    finally:
        simulator.close()
    return recipe, distinct


def _try_ids(simulator: GymnasiumSimulator, reproducible: bool) -> bool:
    """Refuse an environment whose ids do not decide the state, and say whether different ids differ in anything seen.

    Id 0 is started a second time, with other episodes and a step between: what an environment keeps from one episode to
    the next, or draws from elsewhere than its own generator, shows then.
    """
    name, rest = simulator.recipe.name, np.zeros(simulator.layout.action_dim, dtype=np.float32)
    starts = []
    for state in (0, 1, 2, 0):
        starts.append({key: np.array(value) for key, value in simulator.reset(state).items()})
        simulator.step(rest)
    first, *others, again = starts
    if reproducible and (key := _difference(first, again)):
        raise UserError(
            f"trainer.env: {name} starts the same initial-state id from another state the second time ({key!r} "
            "differs), so that no two evaluations begin alike: let it draw from its own np_random only, and forget "
            "what was before; or say trainer.env_config.ids_reproducible: false"
        )
    distinct = any(_difference(first, other) for other in others)
    if not distinct:
        log.warning("%s starts every initial-state id from the same state: an evaluation is of one state", name)
    return distinct


def _difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> str | None:
    """The first observation that differs by more than rounding, pictures by more than a renderer's noise."""
    for key, value in one.items():
        apart = np.abs(value.astype(np.float64) - other[key].astype(np.float64))
        rounding = 1.0 if base_modality(key) == RGB else 1e-5 * max(1.0, float(np.abs(value).max(initial=0.0)))
        if apart.size and (apart.mean() if base_modality(key) == RGB else apart.max()) > rounding:
            return key
    return None
