"""Bring your own environment: any Gymnasium env with Box or Dict observations, and continuous or discrete actions.

`"env": "gym:InvertedPendulum-v5"` in a configuration names

- a registered id (`InvertedPendulum-v5`), or one that a module registers when imported (`my_package:MyEnv-v0`);
- a subclass of `gymnasium.Env`, or a function that its module defines and that returns one (`my_package.my_env:MyEnv`,
  `my_package.my_env.MyEnv`).

What comes out keeps to `envs.simulator.Environment`. `success` is there where the environment has a notion of it.
`action` is float32 `[N, A]`: a component with two finite bounds is rescaled from [-1, 1] and clipped, any other keeps
the environment's own scale. Of Discrete, MultiDiscrete and MultiBinary actions component i is a whole number from 0,
one of `action_choices[i]`. Pictures of several cameras are `rgb_<camera>` and `depth_<camera>`.

The id of an initial state is the seed given to `gymnasium.Env.reset`. Training draws its ids from a stream that depends
on `seed`, on the row and on how many episodes that row has seen, and on nothing else, so the number of worker processes
does not change the data. Ids below `HELD_OUT_STATES` are never drawn: they are kept for evaluation. An environment that
takes randomness from anywhere but its own `np_random` is not reproducible, and nothing here can make it so.

A success is what the environment says it is, see `success_key`: an episode succeeds if any of its steps reports it.

Where an environment's state can be seen from outside (MuJoCo's, and attributes), a run resumes in the middle of its
episodes; this is tried when it is made, see envs/gym_state.py. Where pictures of a MuJoCo environment are asked for
and MUJOCO_GL is not set, what can draw here is chosen (envs/mujoco_rendering.py).

An environment that runs many worlds at once by itself is named `gym_vec:`; see envs/gym_vector.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec

from envs.failures import blame, warn_once
from envs.groups import STEP_S
from envs.gym_info import as_success, look_up, names_of, never_reported, warn_of_unused
from envs.gym_names import find_spec
from envs.gym_options import check_options
from envs.gym_spaces import (
    Source,
    Sources,
    check_numbers,
    encode_instruction,
    encode_observed,
    metres_per_unit,
    observation_layout,
    picture_shape,
    promised,
    read_actions,
    read_source,
    to_rgb,
)
from envs.gym_state import from_bytes, read_state, to_bytes, unsaved, write_state
from envs.gym_trial import cannot_be_saved, try_out
from envs.mujoco_rendering import take_over_gl
from envs.pictures import resize
from envs.simulator import Layout
from envs.vector import VectorEnv
from research.errors import SimulatorFailed, UserError
from research.schema import DEPTH, LANGUAGE, RGB, SUCCESS, base_modality


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
    workers: int = 0,
    worker_timeout: float = STEP_S,
    ids_reproducible: bool = True,
    depth_unit: float | dict[str, float] | None = None,
    chunk: int = 1,
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
            concatenated, for `proprio` alone. More cameras are `rgb_<camera>` and `depth_<camera>`. By default a Box of
            pixels is `rgb`, any other Box `proprio`, and of a Dict the entries with such names are taken; the log says
            which are not. `{}` takes nothing (for pixels from `render`). Pictures may have their channels first,
            be grey, or hold floats whose space has the bounds 0 and 1: they become uint8 `[H, W, 3]`.
        instruction: the text under `language`, the same for every episode.
        instruction_key: take each episode's text from this entry of the info that reset returns ("." walks).
        instruction_length: L, bytes reserved for the text.
        render: [H, W]: the pixels of `env.render()`, resized if they have another size, are the `rgb` observation.
            Simulators that take a size (`"env_kwargs": {"width": 64, "height": 64}`) draw small pictures faster.
        success_key: the entry of each step's info that says success ("." walks): a boolean, or a number that is 0 or 1;
            a step whose info lacks it is none yet. By default `success` or `is_success`, if episodes played when it is
            made (to their ends, up to 1,000 steps or 5 s in all) report it. Without any there is no `success`.
        success_return: instead, success is a return of at least this, so far in the episode.
        max_episode_steps: truncation limit, instead of the one the environment is registered with.
        env_kwargs: passed to `gymnasium.make`.
        workers: processes among which the environments are divided (at most N); 0 steps them in this process. With
            processes, half of the environments step while the policy acts on the others.
        worker_timeout: seconds within which a worker has to answer; one that does not is killed, and the run stops.
        ids_reproducible: false says that one knows: the same id does not start from the same state here. Otherwise that
            is tried, and such an environment refused. Comparisons of runs are then not paired by initial state.
        depth_unit: metres per unit of `depth` (0.001 where it is in millimetres); by default 1, for floats alone. Where
            cameras have different units, an object: `{"depth_wrist": 0.001}`; what it does not name is in metres.
        chunk: H, actions that are executed per decision, without a look in between; see `envs.simulator.Environment`.

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
        depth_unit=depth_unit,
    )
    recipe, distinct = try_out(GymnasiumSimulator, recipe, keys, ids_reproducible)
    make = partial(GymnasiumSimulator, recipe)
    env = VectorEnv(make, num_envs, workers, seed, device, name, chunk=chunk, worker_timeout=worker_timeout)
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
    depth_unit: float | dict[str, float] | None = None
    sources: Sources = field(default_factory=dict)
    success_seen: bool = False
    """Whether `success_key` was reported when the environment was tried out: then no report means no success yet."""
    saves: bool = True
    """Whether its state can be saved."""
    objects: frozenset[str] = frozenset()
    """The objects that it has once it has been reset (`envs.gym_state.objects_in`)."""
    gl: str = ""
    """The value of MUJOCO_GL, where MuJoCo draws."""


class GymnasiumSimulator:
    """One Gymnasium environment as an `envs.simulator.Simulator`; its ids are the seeds of `reset`.

    Args:
        recipe: which environment, and how to read it.
        check: let Gymnasium check what the environment returns, and warn.
    Raises:
        UserError: from the constructor: whatever making the environment raises, in one line.
        SimulatorFailed: from every other method: whatever the environment raises, or returns that it should not.
    """

    def __init__(self, recipe: Recipe, check: bool = False):
        take_over_gl(recipe.gl)
        with blame(f"{recipe.name}: making it with {recipe.make_kwargs}", UserError):
            self.env = gymnasium.make(recipe.spec, disable_env_checker=not check, **recipe.make_kwargs)
        self.actions = read_actions(self.env.action_space, recipe.name)
        self.info: Mapping[str, Any] = {}
        self._seen: Any = None  # the environment's own observation
        self._return, self._reported = 0.0, False
        self.read_as(recipe)

    def read_as(self, recipe: Recipe) -> None:
        """Read observations and success as a recipe says from now on."""
        self.recipe = recipe
        observation = observation_layout(recipe.sources, recipe.instruction_length)
        if recipe.render is not None:
            observation[RGB] = (*recipe.render, 3), np.dtype(np.uint8)
        if recipe.instruction is not None or recipe.instruction_key is not None:
            observation[LANGUAGE] = (recipe.instruction_length,), np.dtype(np.int64)
        self._language = encode_instruction(recipe.instruction or "", recipe.instruction_length)
        self.layout = Layout(
            observation=observation,
            action_dim=self.actions.size,
            bounded=self.actions.bounded,
            has_success=recipe.success_key is not None or recipe.success_return is not None,
            films=self.env.render_mode == "rgb_array",
            action_choices=self.actions.choices,
            action_map=self.actions,
        )

    def reset(self, state: int) -> None:
        recipe = self.recipe
        with blame(f"{recipe.name}: reset(seed={state})"):
            self._seen, self.info = self.env.reset(seed=state)
        self._return = 0.0
        if recipe.instruction_key is not None:
            text = look_up(self.info, recipe.instruction_key)
            if not isinstance(text, str):
                raise UserError(
                    f"trainer.env_config.instruction_key: reset of {recipe.name} put no text under "
                    f"info[{recipe.instruction_key!r}]; info has {names_of(self.info)}"
                )
            self._language = encode_instruction(text, recipe.instruction_length)

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        with blame(f"{self.recipe.name}: step()"):
            self._seen, reward, terminated, truncated, self.info = self.env.step(self.actions(action))
        out = {
            "reward": self._one("reward", reward, np.float32),
            "terminated": self._one("terminated", terminated, bool),
            "truncated": self._one("truncated", truncated, bool),
        }
        self._return += float(out["reward"][0])
        success = self._success(bool(out["terminated"][0] or out["truncated"][0]))
        if success is not None:
            out[SUCCESS] = np.array([success], dtype=bool)
        return out

    def _one(self, what: str, value: Any, dtype: type) -> np.ndarray:
        """What a step returned for one environment, `[1]`: a number, or an array or tensor of one element."""
        array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
        if array.size != 1 or array.dtype.kind not in "bifu":
            raise SimulatorFailed(
                f"{self.recipe.name}: step() should return one number as {what}, got {type(value).__name__} {value!r}"
            )
        return array.reshape(1).astype(dtype)

    def frame(self) -> np.ndarray:
        with blame(f"{self.recipe.name}: render()"):
            frame = np.asarray(self.env.render())
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise SimulatorFailed(
                f"{self.recipe.name}: render() should return uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}"
            )
        return frame

    def save(self) -> bytes | None:
        """What can be seen of the environment's state (`envs.gym_state`), where that is enough."""
        if not self.recipe.saves:
            return None
        if self._seen is not None and (lost := unsaved(self.env, self.recipe.objects)):
            warn_once(cannot_be_saved(self.recipe.name, f"made in an episode: {', '.join(lost)}"))
            return None
        return to_bytes({"world": read_state(self.env), "return": self._return, "language": self._language})

    def load(self, state: bytes) -> None:
        saved = from_bytes(state)
        with blame(f"{self.recipe.name}: loading a saved state"):
            if self.recipe.objects:
                self.env.reset(seed=0)  # makes the objects that are written into
            write_state(self.env, saved["world"])
        self._return, self._language = saved["return"], saved["language"]

    def close(self) -> None:
        self.env.close()

    def _success(self, ended: bool) -> bool | None:
        recipe = self.recipe
        if recipe.success_return is not None:
            return self._return >= recipe.success_return
        if recipe.success_key is None:
            warn_of_unused(recipe.name, self.info)
            return None
        value = look_up(self.info, recipe.success_key)
        if value is not None:
            self._reported = True
            return as_success(value, recipe.name, recipe.success_key)
        if ended and not (self._reported or recipe.success_seen):
            raise never_reported(recipe.name, recipe.success_key, self.info)
        return False

    def observe(self) -> dict[str, np.ndarray]:
        out = {}
        for key, sources in self.recipe.sources.items():
            with blame(f"{self.recipe.name}: the observation for {key!r}"):
                out[key] = self._observed(key, sources)
        if self.recipe.render is not None:
            out[RGB] = resize(self.frame(), *self.recipe.render)
        if self.recipe.instruction is not None or self.recipe.instruction_key is not None:
            out[LANGUAGE] = self._language
        return out

    def _observed(self, key: str, sources: tuple[Source, ...]) -> np.ndarray:
        values, base = [self._read(key, source) for source in sources], base_modality(key)
        if base == LANGUAGE:
            return encode_observed(values[0], self.recipe.instruction_length, key, self.recipe.name)
        if base == RGB:
            return self._picture(values[0], sources[0])
        if base == DEPTH:
            unit = np.float32(metres_per_unit(key, self.recipe.depth_unit))
            return (values[0].astype(np.float32) * unit).reshape(picture_shape(sources[0]))
        return np.concatenate([value.astype(np.float32).ravel() for value in values])

    def _picture(self, value: np.ndarray, source: Source) -> np.ndarray:
        if source.channels == 2 and source.shape[2] == 3 and value.dtype == np.uint8:
            return value
        return to_rgb(torch.from_numpy(np.ascontiguousarray(value)), source, self.recipe.name).numpy()

    def _read(self, key: str, source: Source) -> Any:
        value = read_source(self._seen, source, self.recipe.name)
        if key == LANGUAGE:
            return value
        value = np.asarray(value)
        check_numbers(value, key, self.recipe.name)
        # A picture's bytes and its floats are told apart by their type; all else becomes float32.
        if value.shape != source.shape or (base_modality(key) == RGB and value.dtype != source.dtype):
            raise SimulatorFailed(
                f"{self.recipe.name}: the observation for {key!r} is {value.dtype} {list(value.shape)}, "
                f"but its space says {promised(source, base_modality(key))}"
            )
        return value
