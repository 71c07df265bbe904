"""Gymnasium's vector environments, taken as they are: simulators that run many worlds at once, on a GPU or not.

`"env": "gym_vec:my_package:MyEnv-v0"` in a configuration names an id as `gym:` does (see envs/gym.py), made once for
all rows by `gymnasium.make_vec`: through the id's own `vector_entry_point` if it has one, else as Gymnasium's loop over
single environments. Options, observations, actions and ids of initial states are those of `gym:`; there are no workers,
no pixels from `render`, and no saving of the simulators.

Rows start one by one here, each from the id that it is given. A vector environment therefore has to

- leave a row alone when its episode ends: `metadata["autoreset_mode"]` is `AutoresetMode.DISABLED` (an entry point with
  a parameter `autoreset_mode` is called with it);
- take `reset(seed=[id, ...])`, a seed per row (None in rows that do not start), each seed the same state in every row;
- take `reset(options={"reset_mask": mask})`, bool `[N]`, and leave the other rows as they are.

This is tried when it is made, and what does not do so is refused. Tensors that it returns are not brought to the CPU,
and it is then given its actions as a tensor on the same device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.chunks import execute_together
from envs.failures import blame, mid_run, refused
from envs.gym import Recipe
from envs.gym_info import as_successes, look_up, names_of, never_reported, warn_of_unused
from envs.gym_names import find_spec
from envs.gym_options import check_options
from envs.gym_spaces import (
    Source,
    check_numbers,
    check_one_text,
    encode_instruction,
    encode_observed,
    map_observations,
    metres_per_unit,
    observation_layout,
    picture_shape,
    promised,
    read_actions,
    read_source,
    to_rgb,
)
from envs.gym_vector_entry import check_autoreset, make_vector
from envs.gym_vector_trial import VectorTrial
from envs.initial_states import InitialStateEnv
from envs.pictures import letterbox
from envs.simulator import Layout
from research.errors import SimulatorFailed, UserError
from research.schema import DEPTH, LANGUAGE, RGB, SUCCESS, base_modality


def make_gym_vector_env(
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
    success_key: str | None = None,
    success_return: float | None = None,
    max_episode_steps: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    ids_reproducible: bool = True,
    depth_unit: float | dict[str, float] | None = None,
    chunk: int = 1,
    **unknown: Any,
) -> GymVectorEnv:
    """Make a vector environment of `num_envs` rows; arguments as those of `envs.gym.make_gym_env`.

    Raises:
        UserError: an option, the environment's spaces or its package do not fit, or its rows cannot be started one by
            one; the message says which.
    """
    name = f"gym_vec:{env_id}"
    options = {option: value for option, value in locals().items() if option in make_gym_vector_env.__kwdefaults__}
    check_options(name, {**options, "num_envs": num_envs, "seed": seed}, unknown)
    limit = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
    recipe = Recipe(
        name=name,
        spec=find_spec(name),
        make_kwargs={**(env_kwargs or {}), **limit},
        render=None,
        instruction=instruction,
        instruction_key=instruction_key,
        instruction_length=instruction_length,
        success_key=success_key,
        success_return=success_return,
        depth_unit=depth_unit,
    )
    return GymVectorEnv(recipe, keys, num_envs, seed, device, ids_reproducible, chunk)


class GymVectorEnv(VectorTrial, InitialStateEnv):
    """A Gymnasium vector environment as a TorchRL environment of batch `[N]`; see the module's docstring.

    `state_dict` holds the place in the stream of training states, and no simulator's state: after `load_state_dict`,
    reset.

    Args:
        recipe: which environment, and how to read it; completed here by what a first episode shows.
        keys: where observations come from (see `envs.gym.make_gym_env`).
        num_envs: N.
        seed: which stream of initial states training episodes are drawn from.
        device: where observations are put.
        ids_reproducible: refuse an environment that starts the same id from another state.
        chunk: H, actions per decision.
    Raises:
        UserError: from the constructor: it does not fit, or it raised something.
        SimulatorFailed: later: it raised something, or returned what its spaces exclude.
    """

    def __init__(
        self,
        recipe: Recipe,
        keys: Mapping[str, Any] | None,
        num_envs: int,
        seed: int,
        device: torch.device | str,
        ids_reproducible: bool = True,
        chunk: int = 1,
    ):
        super().__init__(num_envs, seed, device, chunk=chunk)
        self.name = recipe.name
        self.vector = make_vector(recipe, num_envs)
        self.is_closed = False
        try:
            with refused():
                self._prepare(recipe, keys, ids_reproducible)
        except BaseException:
            self.close()
            raise

    def _prepare(self, recipe: Recipe, keys: Mapping[str, Any] | None, ids_reproducible: bool) -> None:
        n, length = self.batch_size[0], recipe.instruction_length
        self._actions = read_actions(self.vector.single_action_space, self.name)
        check_autoreset(self.vector, recipe)
        sources = map_observations(self.vector.single_observation_space, keys, self.name, recipe.depth_unit)
        instructed = recipe.instruction is not None or recipe.instruction_key is not None
        check_one_text(sources, instructed)
        self.recipe = replace(recipe, sources=sources)
        self._language = torch.zeros(n, length, dtype=torch.int64, device=self.device)
        if recipe.instruction is not None:
            self._language[:] = torch.from_numpy(encode_instruction(recipe.instruction, length))
        observation = observation_layout(sources, length)
        if instructed:
            observation[LANGUAGE] = (length,), np.dtype(np.int64)
        if not observation:
            raise UserError(f"trainer.env_config: nothing of {self.name} is observed; set keys or instruction")
        self._returns = torch.zeros(n, dtype=torch.float64, device=self.device)
        self._reported = False
        self._try_out(ids_reproducible)
        self._find_success()
        self._make_specs(
            Layout(
                observation=observation,
                action_dim=self._actions.size,
                bounded=self._actions.bounded,
                has_success=self.recipe.success_key is not None or recipe.success_return is not None,
                films=self.vector.render_mode == "rgb_array",
                action_choices=self._actions.choices,
                action_map=self._actions,
            )
        )
        if self.films:
            self._frames(8)  # a missing renderer shows now, not at the first evaluation

    # ---------------------------------------------------------------- reset and step

    @mid_run()
    def _start_episodes(self, rows: np.ndarray, states: np.ndarray) -> dict[str, Tensor]:
        observation, info = self._reset_rows(rows, states.tolist())
        started = torch.from_numpy(rows)
        self._returns[started] = 0.0
        self._read_texts(info, rows)
        return {key: value[started] for key, value in self._observe(observation).items()}

    def _read_texts(self, info: Mapping[str, Any], rows: np.ndarray) -> None:
        """Take the instruction of each of these rows from the info of a reset, if `instruction_key` says so."""
        key, length = self.recipe.instruction_key, self.recipe.instruction_length
        if key is None:
            return
        texts = look_up(info, key)
        for row in rows.tolist():
            text = None if texts is None or isinstance(texts, str) else texts[row]
            if not isinstance(text, str):
                raise UserError(
                    f"trainer.env_config.instruction_key: reset of {self.name} put no text for row {row} under "
                    f"info[{key!r}]; info has {names_of(info)}"
                )
            self._language[row] = torch.from_numpy(encode_instruction(text, length))

    def _reset_rows(self, rows: np.ndarray, states: Sequence[int]) -> tuple[Any, Mapping[str, Any]]:
        """Start these rows from their ids, and leave the others as they are."""
        n = self.batch_size[0]
        seeds: list[int | None] = [None] * n
        for row, state in zip(rows.tolist(), states, strict=True):
            seeds[row] = state
        mask = np.isin(np.arange(n), rows)
        with blame(f"{self.name}: reset(seed=[...])"):
            # Gymnasium's loop over single environments takes the mask out of the options, so each call gets its own.
            return self.vector.reset(seed=seeds, **({} if mask.all() else {"options": {"reset_mask": mask}}))

    @mid_run()
    def _advance(self, action: Tensor) -> dict[str, Tensor]:
        if self.chunk == 1:
            step, observation = self._control_step(action)
            return {**step, **self._observe(observation)}
        observation: Any = None

        def step(one: Tensor) -> dict[str, Tensor]:
            nonlocal observation
            counted, observation = self._control_step(one)
            return counted

        def restart(rows: np.ndarray) -> None:
            self._reset_rows(rows, [0] * len(rows))

        return execute_together(action, step, lambda: self._observe(observation), restart)

    def _control_step(self, action: Tensor) -> tuple[dict[str, Tensor], Any]:
        """Step all rows once, `[N, A]`: what it earned and ended, `[N, 1]` each, and the observation as it comes."""
        n = self.batch_size[0]
        with blame(f"{self.name}: step()"):
            observation, reward, terminated, truncated, info = self.vector.step(self._native(action))
            out = {
                "reward": self._own(reward, torch.float32).reshape(n, 1),
                "terminated": self._own(terminated, torch.bool).reshape(n, 1),
                "truncated": self._own(truncated, torch.bool).reshape(n, 1),
            }
        self._returns += out["reward"][:, 0]
        success = self._success(info, (out["terminated"] | out["truncated"])[:, 0])
        if success is not None:
            out[SUCCESS] = success[:, None]
        return out, observation

    def _native(self, action: Tensor) -> np.ndarray | Tensor:
        """Actions float32 `[N, A]` as the vector environment takes them."""
        if self._tensor_device is None:
            return self._actions(action.to("cpu", torch.float32).numpy())
        return self._actions.as_tensor(action, self._tensor_device)

    def _own(self, value: Any, dtype: torch.dtype | None = None) -> Tensor:
        """What was returned, as a tensor on this environment's device that nobody else writes to."""
        if isinstance(value, Tensor):
            return value.to(self.device, dtype or value.dtype, copy=True)
        value = np.array(value, order="C")  # a copy; torch knows no negative strides, nor the other byte order
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
        return value.to(self.device, dtype or value.dtype)

    def _observe(self, observation: Any) -> dict[str, Tensor]:
        out = {}
        for key, sources in self.recipe.sources.items():
            with blame(f"{self.name}: the observation for {key!r}"):
                out[key] = self._observed(key, sources, observation)
        if self.recipe.instruction is not None or self.recipe.instruction_key is not None:
            out[LANGUAGE] = self._language.clone()  # resets write into it
        return out

    def _observed(self, key: str, sources: tuple[Source, ...], observation: Any) -> Tensor:
        n, base = self.batch_size[0], base_modality(key)
        values = [read_source(observation, source, self.name) for source in sources]
        if base == LANGUAGE:
            length = self.recipe.instruction_length
            if isinstance(values[0], str) or len(values[0]) != n:
                raise SimulatorFailed(f"{self.name}: the observation for {key!r} should be {n} texts, one for each row")
            texts = [encode_observed(text, length, key, self.name) for text in values[0]]
            return torch.from_numpy(np.stack(texts)).to(self.device)
        for value in values:
            if not isinstance(value, Tensor):
                check_numbers(np.asarray(value), key, self.name)
        tensors = [self._own(value, None if base == RGB else torch.float32) for value in values]
        for value, source in zip(tensors, sources, strict=True):
            # A picture's bytes and its floats are told apart by their type; all else becomes float32.
            dtype = torch.from_numpy(np.empty(0, source.dtype)).dtype if base == RGB else value.dtype
            if value.shape != (n, *source.shape) or value.dtype != dtype:
                raise SimulatorFailed(
                    f"{self.name}: the observation for {key!r} is {value.dtype} {list(value.shape)}, "
                    f"but its space says {promised(source, base, n)}"
                )
        if base == RGB:
            return to_rgb(tensors[0], sources[0], self.name).contiguous()
        if base == DEPTH:
            return (tensors[0] * metres_per_unit(key, self.recipe.depth_unit)).reshape(n, *picture_shape(sources[0]))
        return torch.cat([value.reshape(n, -1) for value in tensors], dim=1)

    def _success(self, info: Mapping[str, Any], ended: Tensor) -> Tensor | None:
        """Which rows have succeeded, bool `[N]`; None where success is not known here."""
        recipe = self.recipe
        if recipe.success_return is not None:
            return self._returns >= recipe.success_return
        if recipe.success_key is None:
            warn_of_unused(self.name, info)
            return None
        value, reported = self._reported_success(info)
        if not recipe.success_seen:
            self._reported = self._reported or bool(reported.any())
            if not self._reported and ended.any():
                raise never_reported(self.name, recipe.success_key, info)
        return value

    def _reported_success(self, info: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """In which rows info says success, and of which rows it says something: bool `[N]` each."""
        n, key = self.batch_size[0], self.recipe.success_key
        value = look_up(info, key)
        if value is None:
            none = torch.zeros(n, dtype=torch.bool, device=self.device)
            return none, none
        # Gymnasium marks the rows that have an entry by a mask under the entry's name with "_" before it.
        parent, dot, name = key.rpartition(".")
        mask = look_up(info, f"{parent}{dot}_{name}")
        reported = torch.ones(n, dtype=torch.bool) if mask is None else self._own(mask, torch.bool).reshape(n)
        reported = reported.to(self.device)
        return as_successes(value, reported, self.name, key).to(self.device), reported

    # ---------------------------------------------------------------- video, end

    def _frames(self, size: int) -> np.ndarray:
        with blame(f"{self.name}: render()"):
            frames = self.vector.render()
            frames = [frame.cpu().numpy() if isinstance(frame, Tensor) else np.asarray(frame) for frame in frames]
        fits = [frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 for frame in frames]
        if len(frames) != self.batch_size[0] or not all(fits):
            raise SimulatorFailed(f"{self.name}: render() should return uint8 [H, W, 3] for every row")
        return np.stack([letterbox(frame, size) for frame in frames])

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the vector environment; closing twice does nothing."""
        if not self.is_closed:
            self.vector.close()
        super().close(raise_if_closed=raise_if_closed)
