"""Gymnasium's vector environments, taken as they are: simulators that run many worlds at once, on a GPU or not.

`"env": "gym_vec:my_package:MyEnv-v0"` in a configuration names an id as `gym:` does (see envs/gym.py), made once for
all rows by `gymnasium.make_vec`: through the id's own `vector_entry_point` if it has one, else as Gymnasium's loop over
single environments. Options, observations, actions and ids of initial states are those of `gym:`; there are no workers,
and no pixels from `render`.

Rows start one by one here, each from the id that it is given. A vector environment therefore has to

- leave a row alone when its episode ends: `metadata["autoreset_mode"]` is `AutoresetMode.DISABLED` (an entry point with
  a parameter `autoreset_mode` is called with it);
- take `reset(seed=[id, ...])`, a seed per row (None in rows that do not start), each seed the same state in every row;
- take `reset(options={"reset_mask": mask})`, bool `[N]`, and leave the other rows as they are.

This is tried when it is made, and what does not do so is refused. Tensors that it returns are not brought to the CPU,
and it is then given its actions as a tensor on the same device.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AutoresetMode
from torch import Tensor

from envs.gym import Recipe
from envs.gym_options import blame, check_options, describe, find_spec
from envs.gym_spaces import (
    SUCCESS_KEYS,
    ActionScale,
    check_one_text,
    encode_instruction,
    look_up,
    map_observations,
    names_of,
    observation_layout,
    read_source,
)
from envs.pictures import letterbox
from envs.simulator import Layout
from envs.vector import InitialStateEnv
from research.schema import DEPTH, LANGUAGE, RGB, SUCCESS, UserError, base_modality


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
    )
    return GymVectorEnv(recipe, keys, num_envs, seed, device)


class GymVectorEnv(InitialStateEnv):
    """A Gymnasium vector environment as a TorchRL environment of batch `[N]`; see the module's docstring.

    `state_dict` holds the place in the stream of training states, and no simulator's state: after `load_state_dict`,
    reset.

    Args:
        recipe: which environment, and how to read it; completed here by what a first episode shows.
        keys: where observations come from (see `envs.gym.make_gym_env`).
        num_envs: N.
        seed: which stream of initial states training episodes are drawn from.
        device: where observations are put.
    Raises:
        UserError: it does not fit, or it raised something.
    """

    def __init__(
        self,
        recipe: Recipe,
        keys: Mapping[str, Any] | None,
        num_envs: int,
        seed: int,
        device: torch.device | str,
    ):
        super().__init__(num_envs, seed, device)
        self.name = recipe.name
        self.vector = _make_vector(recipe, num_envs)
        self.is_closed = False
        try:
            self._action = ActionScale(self.vector.single_action_space, self.name)
            _check_autoreset(self.vector, recipe)
            sources = map_observations(self.vector.single_observation_space, keys, self.name)
            instructed = recipe.instruction is not None or recipe.instruction_key is not None
            check_one_text(sources, instructed)
            self.recipe = replace(recipe, sources=sources)
            length = recipe.instruction_length
            self._language = torch.zeros(num_envs, length, dtype=torch.int64, device=self.device)
            if recipe.instruction is not None:
                self._language[:] = torch.from_numpy(encode_instruction(recipe.instruction, length))
            observation = observation_layout(sources, length)
            if instructed:
                observation[LANGUAGE] = (length,), np.dtype(np.int64)
            if not observation:
                raise UserError(f"trainer.env_config: nothing of {self.name} is observed; set keys or instruction")
            self._returns = torch.zeros(num_envs, dtype=torch.float64, device=self.device)
            self._success_reported = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
            self._try_out()
            self._make_specs(
                Layout(
                    observation=observation,
                    action_dim=self._action.size,
                    bounded=self._action.bounded,
                    has_success=self.recipe.success_key is not None or recipe.success_return is not None,
                    films=self.vector.render_mode == "rgb_array",
                )
            )
            if self.films:
                self._frames(8)  # a missing renderer shows now, not at the first evaluation
        except UserError:
            self.close()
            raise

    # ---------------------------------------------------------------- what its first episodes tell

    def _try_out(self) -> None:
        """Find what reports success, and refuse rows that cannot be started one by one."""
        n = self.batch_size[0]
        seeds = list(range(n))
        observation, info = self._first_reset(seeds)
        parts = [read_source(observation, part, self.name) for key in self.recipe.sources.values() for part in key]
        self._tensor_device = next((part.device for part in parts if isinstance(part, Tensor)), None)
        first, reported = self._observe(observation), set(info)
        with blame(f"{self.name}: step()"):
            observation, *_, info = self.vector.step(self._native(torch.zeros(n, self._action.size)))
        if self.recipe.success_key is None and self.recipe.success_return is None:
            found = next((key for key in SUCCESS_KEYS if key in reported | set(info)), None)
            self.recipe = replace(self.recipe, success_key=found)
        if n > 1:
            self._check_masks(self._observe(observation))
        else:
            self.vector.reset(seed=[1])  # something else before the same seed again
        with blame(f"{self.name}: reset(seed=[...])"):
            observation, _ = self.vector.reset(seed=seeds[::-1])
        changed = _first_difference(first, {key: value.flip(0) for key, value in self._observe(observation).items()})
        if changed:
            raise self._refusal(
                f"does not start a row from its own seed alone: {changed!r} differs when the same seeds start other "
                "rows, so that initial states have no ids"
            )

    def _first_reset(self, seeds: list[int]) -> tuple[Any, dict[str, Any]]:
        try:
            return self.vector.reset(seed=seeds)
        except Exception as error:
            with blame(f"{self.name}: reset(seed=0)"):
                self.vector.reset(seed=0)  # raises what has nothing to do with several seeds
            raise self._refusal(
                f"cannot start every row from a seed of its own: reset(seed=[...]) {describe(error)}"
            ) from error

    def _check_masks(self, before: dict[str, Tensor]) -> None:
        """Start row 0 again; the other rows have to stay as they were before."""
        n, what = self.batch_size[0], "cannot reset some rows and leave the others as they are"
        mask = np.arange(n) == 0
        try:
            observation, _ = self.vector.reset(seed=[n, *[None] * (n - 1)], options={"reset_mask": mask})
        except Exception as error:
            raise self._refusal(f"{what}: reset(options={{'reset_mask': ...}}) {describe(error)}") from error
        after = self._observe(observation)
        changed = _first_difference({k: v[1:] for k, v in before.items()}, {k: v[1:] for k, v in after.items()})
        if changed:
            raise self._refusal(f"{what}: {changed!r} changed in rows that options['reset_mask'] leaves out")

    def _refusal(self, problem: str) -> UserError:
        single = f"; gym:{self.name.partition(':')[2]} steps single environments instead"
        return UserError(f"trainer.env: {self.name} {problem}{single if self.recipe.spec.entry_point else ''}")

    # ---------------------------------------------------------------- reset and step

    def _start_episodes(self, rows: np.ndarray, states: np.ndarray) -> dict[str, Tensor]:
        n, recipe = self.batch_size[0], self.recipe
        seeds: list[int | None] = [None] * n
        for row, state in zip(rows.tolist(), states.tolist(), strict=True):
            seeds[row] = state
        mask = np.isin(np.arange(n), rows)
        with blame(f"{self.name}: reset(seed=[...])"):
            # Gymnasium's loop over single environments takes the mask out of the options, so each call gets its own.
            observation, info = self.vector.reset(
                seed=seeds, **({} if mask.all() else {"options": {"reset_mask": mask}})
            )
        started = torch.from_numpy(rows)
        self._returns[started], self._success_reported[started] = 0.0, False
        if recipe.instruction_key is not None:
            texts = look_up(info, recipe.instruction_key)
            for row in rows.tolist():
                text = None if texts is None or isinstance(texts, str) else texts[row]
                if not isinstance(text, str):
                    raise UserError(
                        f"trainer.env_config.instruction_key: reset of {self.name} put no text for row {row} under "
                        f"info[{recipe.instruction_key!r}]; info has {names_of(info)}"
                    )
                self._language[row] = torch.from_numpy(encode_instruction(text, recipe.instruction_length))
        return {key: value[started] for key, value in self._observe(observation).items()}

    def _advance(self, action: Tensor) -> dict[str, Tensor]:
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
        return {**out, **self._observe(observation)}

    def _native(self, action: Tensor) -> np.ndarray | Tensor:
        """Actions float32 `[N, A]` as the vector environment takes them."""
        if self._tensor_device is None:
            return self._action(action.to("cpu", torch.float32).numpy())
        box, device = self._action, self._tensor_device
        low, high, scale, offset = (
            torch.as_tensor(bound, device=device) for bound in (box.low, box.high, box.scale, box.offset)
        )
        action = (offset + scale * action.to(device, torch.float32)).clamp(low, high)
        return action.to(torch.from_numpy(np.empty(0, box.dtype)).dtype).reshape(len(action), *box.shape)

    def _own(self, value: Any, dtype: torch.dtype | None = None) -> Tensor:
        """What was returned, as a tensor on this environment's device that nobody else writes to."""
        if isinstance(value, Tensor):
            return value.to(self.device, dtype or value.dtype, copy=True)
        value = torch.from_numpy(np.array(value))
        return value.to(self.device, dtype or value.dtype)

    def _observe(self, observation: Any) -> dict[str, Tensor]:
        n, out = self.batch_size[0], {}
        for key, sources in self.recipe.sources.items():
            values = [read_source(observation, source, self.name) for source in sources]
            base = base_modality(key)
            if base == LANGUAGE:
                length = self.recipe.instruction_length
                texts = np.stack([encode_instruction(text, length) for text in values[0]])
                out[key] = torch.from_numpy(texts).to(self.device)
                continue
            tensors = [self._own(value, None if base == RGB else torch.float32) for value in values]
            for value, source in zip(tensors, sources, strict=True):
                if value.shape != (n, *source.shape) or (base == RGB and value.dtype != torch.uint8):
                    raise UserError(
                        f"{self.name}: the observation for {key!r} is {value.dtype} {list(value.shape)}, "
                        f"but its space says {[n, *source.shape]}"
                    )
            if base == RGB:
                out[key] = tensors[0]
            elif base == DEPTH:
                out[key] = tensors[0].reshape(n, *sources[0].shape[:2])
            else:
                out[key] = torch.cat([value.reshape(n, -1) for value in tensors], dim=1)
        if self.recipe.instruction is not None or self.recipe.instruction_key is not None:
            out[LANGUAGE] = self._language.clone()  # resets write into it
        return out

    def _success(self, info: Mapping[str, Any], ended: Tensor) -> Tensor | None:
        """Which rows have succeeded, bool `[N]`; None where success is not known here."""
        recipe = self.recipe
        if recipe.success_return is not None:
            return self._returns >= recipe.success_return
        if recipe.success_key is None:
            return None
        value, reported = self._reported_success(info)
        self._success_reported |= reported
        if (ended & ~self._success_reported).any():
            # A misspelt key would otherwise read as a success rate of zero.
            raise UserError(
                f"trainer.env_config.success_key: an episode of {self.name} ended without "
                f"info[{recipe.success_key!r}]; info has {names_of(info)}"
            )
        return value & reported

    def _reported_success(self, info: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """What info says of success, and of which rows it says something: bool `[N]` each."""
        n, value = self.batch_size[0], look_up(info, self.recipe.success_key)
        if value is None:
            none = torch.zeros(n, dtype=torch.bool, device=self.device)
            return none, none
        # Gymnasium marks the rows that have an entry by a mask under the entry's name with "_" before it.
        parent, dot, name = self.recipe.success_key.rpartition(".")
        mask = look_up(info, f"{parent}{dot}_{name}")
        if not isinstance(value, Tensor) and np.asarray(value).dtype == object:
            value = [bool(one) for one in value]  # entries that are no numbers, None where there is none
        value = self._own(value, torch.bool).reshape(n)
        return value, torch.ones_like(value) if mask is None else self._own(mask, torch.bool).reshape(n)

    # ---------------------------------------------------------------- video, end

    def _frames(self, size: int) -> np.ndarray:
        with blame(f"{self.name}: render()"):
            frames = self.vector.render()
            frames = [frame.cpu().numpy() if isinstance(frame, Tensor) else np.asarray(frame) for frame in frames]
        fits = [frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 for frame in frames]
        if len(frames) != self.batch_size[0] or not all(fits):
            raise UserError(f"{self.name}: render() should return uint8 [H, W, 3] for every row")
        return np.stack([letterbox(frame, size) for frame in frames])

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the vector environment; closing twice does nothing."""
        if not self.is_closed:
            self.vector.close()
        super().close(raise_if_closed=raise_if_closed)


def _make_vector(recipe: Recipe, num_envs: int) -> gymnasium.vector.VectorEnv:
    """The vector environment, told to leave rows alone when their episodes end, if it can be told."""
    kwargs, disabled = dict(recipe.make_kwargs), {"autoreset_mode": AutoresetMode.DISABLED}
    with blame(f"{recipe.name}: making it with {recipe.make_kwargs}"):
        if recipe.spec.vector_entry_point is None:
            return gymnasium.make_vec(recipe.spec, num_envs=num_envs, vector_kwargs=disabled, **kwargs)
        if _takes_autoreset_mode(recipe.spec):
            kwargs = {**disabled, **kwargs}
        return gymnasium.make_vec(recipe.spec, num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs)


def _takes_autoreset_mode(spec: EnvSpec) -> bool:
    entry = spec.vector_entry_point
    entry = entry if callable(entry) else load_env_creator(entry)
    return "autoreset_mode" in inspect.signature(entry).parameters


def _check_autoreset(vector: gymnasium.vector.VectorEnv, recipe: Recipe) -> None:
    """Refuse rows that start again by themselves: how an episode ended and from which id one began would be lost."""
    mode = vector.metadata.get("autoreset_mode")
    if mode not in (AutoresetMode.DISABLED, AutoresetMode.DISABLED.value):
        said = f"autoreset mode {mode.value}" if isinstance(mode, AutoresetMode) else f"metadata says {mode!r}"
        raise UserError(
            f"trainer.env: {recipe.name} resets its rows by itself ({said}); it has to be made with "
            "metadata['autoreset_mode'] = AutoresetMode.DISABLED, perhaps by something in trainer.env_config.env_kwargs"
        )


def _first_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str | None:
    """The first observation key whose values differ by more than rounding, if there is one."""
    for key, value in one.items():
        same = torch.allclose if value.is_floating_point() else torch.equal
        if not (same(value, other[key], equal_nan=True) if same is torch.allclose else same(value, other[key])):
            return key
    return None
