"""Bring your own environment: any Gymnasium env with Box or Dict observations and a Box action space.

`"env": "gym:InvertedPendulum-v5"` in a configuration names

- a registered id (`InvertedPendulum-v5`), or one that a module registers when imported (`my_package:MyEnv-v0`);
- an importable class or function that returns a `gymnasium.Env` (`my_package.my_env:MyEnv`, `my_package.my_env.MyEnv`).

What comes out has the layout of the project's other environments, batch `[N]`: `("observation", key)` with the dtypes
of `research.schema`, `reward` float32 `[N, 1]`, `done` / `terminated` / `truncated` bool `[N, 1]`, `initial_state`
int64 `[N, 1]`, and `success` bool `[N, 1]` where the environment has a notion of success. `action` is float32 `[N, A]`:
a component with two finite bounds is rescaled from [-1, 1] and clipped, any other keeps the environment's own scale.

The id of an initial state is the seed given to `gymnasium.Env.reset`. Training draws its ids from a stream that depends
on `seed`, on the row and on how many episodes that row has seen, and on nothing else, so the number of worker processes
does not change the data. Ids below `HELD_OUT_STATES` are never drawn: they are kept for evaluation. An environment that
takes randomness from anywhere but its own `np_random` is not reproducible, and nothing here can make it so.

Why not `GymWrapper` in a `SerialEnv` or a `ParallelEnv`: stepping a list of environments and building one TensorDict
for all of them was measured 2 to 3 times faster, `ParallelEnv` keeps a core busy polling, and what is raised in one
of its workers does not reach the main process.
"""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import cloudpickle
import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn import functional as F
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from research.schema import (
    ACTION,
    DEPTH,
    INITIAL_STATE,
    LANGUAGE,
    MODALITIES,
    OBSERVATION,
    PROPRIO,
    RGB,
    SUCCESS,
    UserError,
    encode_text,
)

HELD_OUT_STATES = 10_000
SUCCESS_KEYS = ("success", "is_success")


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
    **unknown: Any,
) -> GymnasiumEnv:
    """Make `num_envs` copies of a Gymnasium environment, stepped together.

    Args:
        env_id: a registered id, `module:EnvId-v0`, `module:Class` or `module.Class`.
        num_envs: N.
        device: where observations and rewards are put; the simulators run on the CPU.
        seed: which stream of initial states training episodes are drawn from.
        keys: observation key -> path in the environment's observation, "." walking into nested Dicts and "" (or null)
            meaning a whole Box: `{"proprio": ["arm.joints", "gripper"], "rgb": "images.front"}`. Several paths are
            concatenated, for `proprio` alone. By default a uint8 Box is `rgb`, any other Box `proprio`, and of a Dict
            the entries that already have one of these names are taken. `{}` takes nothing (for pixels from `render`).
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

    Raises:
        UserError: an option, the environment's spaces or its package do not fit; the message names the option.
    """
    name = f"gym:{env_id}"
    if unknown:
        known = list(make_gym_env.__kwdefaults__)
        hint = get_close_matches(next(iter(unknown)), known, 1)
        raise UserError(
            f"trainer.env_config: {name} has no option {next(iter(unknown))!r}"
            + (f"; did you mean {hint[0]!r}?" if hint else f"; there are {', '.join(known)}")
        )
    for option, value, types in (
        ("keys", keys, dict),
        ("instruction", instruction, str),
        ("instruction_key", instruction_key, str),
        ("success_key", success_key, str),
        ("success_return", success_return, (int, float)),
        ("env_kwargs", env_kwargs, dict),
    ):
        if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
            kind = {dict: "an object", str: "a text"}.get(types, "a number")
            raise UserError(f"trainer.env_config.{option}: expected {kind}, got {value!r}")
    for option, value, least in (
        ("num_envs", num_envs, 1),
        ("seed", seed, 0),
        ("instruction_length", instruction_length, 1),
        ("workers", workers, 1),
        ("max_episode_steps", 1 if max_episode_steps is None else max_episode_steps, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            place = "trainer" if option in ("num_envs", "seed") else "trainer.env_config"
            raise UserError(f"{place}.{option}: expected an integer of at least {least}, got {value!r}")
    if render is not None and not (
        isinstance(render, Sequence) and len(render) == 2 and all(isinstance(x, int) and x > 0 for x in render)
    ):
        raise UserError(f"trainer.env_config.render: expected [height, width] in pixels, got {render!r}")
    for one, other in (
        (("instruction", instruction), ("instruction_key", instruction_key)),
        (("success_key", success_key), ("success_return", success_return)),
    ):
        if one[1] is not None and other[1] is not None:
            raise UserError(f"trainer.env_config: give {one[0]} or {other[0]}, not both")

    make_kwargs = dict(env_kwargs or {})
    if render is not None and make_kwargs.setdefault("render_mode", "rgb_array") != "rgb_array":
        raise UserError(f"trainer.env_config.render needs render_mode 'rgb_array', got {make_kwargs['render_mode']!r}")
    if max_episode_steps is not None:
        make_kwargs["max_episode_steps"] = max_episode_steps
    recipe = _Recipe(
        name=name,
        spec=_find_spec(env_id),
        make_kwargs=make_kwargs,
        render=None if render is None else (render[0], render[1]),
        instruction=instruction,
        instruction_key=instruction_key,
        instruction_length=instruction_length,
        success_key=success_key,
        success_return=success_return,
    )
    trial = _try_out(recipe, keys)
    return GymnasiumEnv(trial, num_envs, min(workers, num_envs), seed, device)


# ------------------------------------------------------------------- which environment, which observations


def _find_spec(env_id: str) -> EnvSpec:
    """The registry's entry for an id, or a new one for an importable class or function."""
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
                    f"trainer.env: 'gym:{env_id}' is not registered with Gymnasium; {hint} "
                    "An environment of your own is named 'gym:module:EnvId-v0' or 'gym:module:Class'"
                ) from error
    module = _import(module_name, env_id)
    if attribute in gymnasium.registry:
        return gymnasium.registry[attribute]
    if callable(getattr(module, attribute, None)):
        return EnvSpec(id=attribute, entry_point=f"{module_name}:{attribute}")
    close = get_close_matches(attribute, [*gymnasium.registry, *vars(module)], 3)
    raise UserError(
        f"trainer.env: 'gym:{env_id}': the module {module_name!r} neither registers nor defines {attribute!r}"
        + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
    )


def _import(module_name: str, env_id: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if f"{module_name}.".startswith(f"{missing}."):
            problem = f"there is no module {missing!r}; is its package installed, or its folder on PYTHONPATH?"
        else:
            problem = f"importing {module_name!r} needs {missing!r}: pip install the package that provides it"
        raise UserError(f"trainer.env: 'gym:{env_id}': {problem}") from error
    except Exception as error:
        raise UserError(f"trainer.env: 'gym:{env_id}': importing {module_name!r} {_describe(error)}") from error


class _Source(NamedTuple):
    """Where one part of an observation comes from, and the shape that its space promises."""

    path: tuple[str, ...]
    shape: tuple[int, ...]


def _leaves(space: gymnasium.Space, path: tuple[str, ...] = ()) -> dict[str, tuple[tuple[str, ...], gymnasium.Space]]:
    """Every non-Dict space inside a space, under its dotted name ("" for a space that is not a Dict)."""
    if not isinstance(space, gymnasium.spaces.Dict):
        return {".".join(path): (path, space)}
    return {name: leaf for key, inner in space.items() for name, leaf in _leaves(inner, (*path, key)).items()}


def _map_observations(
    space: gymnasium.Space, keys: Mapping[str, Any] | None, name: str
) -> dict[str, tuple[_Source, ...]]:
    """Find the source of each observation key, and refuse what does not fit the schema."""
    leaves = _leaves(space)
    listing = ", ".join(f"{path or 'the whole observation'}: {leaf}" for path, (_, leaf) in leaves.items())
    if keys is None:
        if isinstance(space, gymnasium.spaces.Box):
            keys = {RGB if space.dtype == np.uint8 and len(space.shape) > 1 else PROPRIO: ""}
        else:
            keys = {key: key for key in MODALITIES if key in leaves}
            if not keys:
                raise UserError(
                    f"trainer.env_config.keys: say which observations of {name} are {', '.join(MODALITIES)}; "
                    f"it has {listing}"
                )
    sources = {}
    for key, paths in keys.items():
        option = f"trainer.env_config.keys.{key}"
        if key not in MODALITIES:
            raise UserError(f"{option}: the schema knows {', '.join(MODALITIES)}")
        paths = paths if isinstance(paths, list) else [paths or ""]
        if not paths or (len(paths) > 1 and key != PROPRIO):
            raise UserError(f"{option}: expected one path, got {paths!r}")
        for path in paths:
            if not isinstance(path, str) or path not in leaves:
                raise UserError(f"{option}: {name} has no observation {path!r}; it has {listing}")
            leaf = leaves[path][1]
            box = leaf if isinstance(leaf, gymnasium.spaces.Box) else None
            fits, wanted = {
                RGB: (box and box.dtype == np.uint8 and len(box.shape) == 3 and box.shape[2] == 3, "uint8 [H, W, 3]"),
                DEPTH: (
                    box and box.dtype.kind == "f" and (len(box.shape) == 2 or box.shape[2:] == (1,)),
                    "float [H, W] or [H, W, 1] in metres",
                ),
                PROPRIO: (box is not None, "a Box"),
                LANGUAGE: (isinstance(leaf, gymnasium.spaces.Text), "a Text"),
            }[key]
            if not fits:
                raise UserError(
                    f"{option}: should be {wanted}, got {leaf} from {path or 'the observation'!r} of {name}"
                )
        sources[key] = tuple(_Source(leaves[path][0], leaves[path][1].shape or ()) for path in paths)
    return sources


# ------------------------------------------------------------------- one environment, in NumPy


@dataclass(frozen=True)
class _Recipe:
    """All that a process needs to make one environment and to read it."""

    name: str
    spec: EnvSpec
    make_kwargs: dict[str, Any]
    render: tuple[int, int] | None
    instruction: str | None
    instruction_key: str | None
    instruction_length: int
    success_key: str | None
    success_return: float | None
    sources: dict[str, tuple[_Source, ...]] = field(default_factory=dict)


class _SingleEnv:
    """One Gymnasium environment; whatever it raises becomes a `UserError` of one line."""

    def __init__(self, recipe: _Recipe, check: bool = False):
        self.recipe = recipe
        with _blame(f"{recipe.name}: making it with {recipe.make_kwargs}"):
            self.env = gymnasium.make(recipe.spec, disable_env_checker=not check, **recipe.make_kwargs)
        space = self.env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or space.dtype.kind != "f":
            raise UserError(
                f"trainer.env: {recipe.name} takes actions from {space}; only float Box actions are supported"
            )
        self.action_space = space
        self._low, self._high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
        self.bounded = np.isfinite(self._low) & np.isfinite(self._high)
        self._scale, self._offset = np.ones_like(self._low), np.zeros_like(self._low)
        low, high = self._low[self.bounded], self._high[self.bounded]
        self._scale[self.bounded], self._offset[self.bounded] = (high - low) / 2, (high + low) / 2
        self.info: Mapping[str, Any] = {}
        if recipe.instruction is not None:
            self._language = self._encode(recipe.instruction)

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Start the episode of a seed; returns the observation as arrays without a batch dimension."""
        recipe = self.recipe
        with _blame(f"{recipe.name}: reset(seed={seed})"):
            observation, self.info = self.env.reset(seed=seed)
        self._return, self._success_reported = 0.0, False
        if recipe.instruction_key is not None:
            text = _lookup(self.info, recipe.instruction_key)
            if not isinstance(text, str):
                raise UserError(
                    f"trainer.env_config.instruction_key: reset of {recipe.name} put no text under "
                    f"info[{recipe.instruction_key!r}]; info has {', '.join(map(str, self.info)) or 'nothing'}"
                )
            self._language = self._encode(text)
        return self._observe(observation)

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        """One control step with an action float32 `[A]`; adds reward, the two ends of an episode, and success."""
        # gymnasium.wrappers.RescaleAction rounds some actions to just outside the Box; clipping last cannot.
        action = np.clip(self._offset + self._scale * action, self._low, self._high)
        with _blame(f"{self.recipe.name}: step()"):
            observation, reward, terminated, truncated, self.info = self.env.step(
                action.astype(self.action_space.dtype).reshape(self.action_space.shape)
            )
            out = {
                "reward": np.array([reward], dtype=np.float32),
                "terminated": np.array([terminated], dtype=bool),
                "truncated": np.array([truncated], dtype=bool),
            }
        self._return += float(out["reward"][0])
        success = self._success(bool(terminated or truncated))
        if success is not None:
            out[SUCCESS] = np.array([success], dtype=bool)
        return {**out, **self._observe(observation)}

    def frame(self) -> np.ndarray:
        """What `env.render()` shows now, uint8 `[H, W, 3]`."""
        with _blame(f"{self.recipe.name}: render()"):
            frame = np.asarray(self.env.render())
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise UserError(
                f"{self.recipe.name}: render() should return uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}"
            )
        return frame

    def _success(self, ended: bool) -> bool | None:
        recipe = self.recipe
        if recipe.success_return is not None:
            return self._return >= recipe.success_return
        if recipe.success_key is None:
            return None
        value = _lookup(self.info, recipe.success_key)
        if value is not None:
            self._success_reported = True
        elif ended and not self._success_reported:
            # A misspelt key would otherwise read as a success rate of zero.
            raise UserError(
                f"trainer.env_config.success_key: an episode of {recipe.name} ended without "
                f"info[{recipe.success_key!r}]; info has {', '.join(map(str, self.info)) or 'nothing'}"
            )
        return bool(value)

    def _encode(self, text: str) -> np.ndarray:
        try:
            return encode_text(text, self.recipe.instruction_length).numpy()
        except UserError as error:
            raise UserError(f"trainer.env_config.instruction_length: {error}") from error

    def _observe(self, observation: Any) -> dict[str, np.ndarray]:
        out = {}
        for key, sources in self.recipe.sources.items():
            values = [self._read(observation, key, source) for source in sources]
            if key == LANGUAGE:
                out[key] = self._encode(values[0])
            elif key == RGB:
                out[key] = values[0]
            elif key == DEPTH:
                out[key] = values[0].astype(np.float32).reshape(sources[0].shape[:2])
            else:
                out[key] = np.concatenate([value.astype(np.float32).ravel() for value in values])
        if self.recipe.render is not None:
            out[RGB] = _resize(self.frame(), *self.recipe.render)
        if self.recipe.instruction is not None or self.recipe.instruction_key is not None:
            out[LANGUAGE] = self._language
        return out

    def _read(self, observation: Any, key: str, source: _Source) -> Any:
        for name in source.path:
            if name not in observation:
                raise UserError(
                    f"{self.recipe.name}: an observation lacks {'.'.join(source.path)!r}, which its space has"
                )
            observation = observation[name]
        if key == LANGUAGE:
            return observation
        value = np.asarray(observation)
        if value.shape != source.shape or (key == RGB and value.dtype != np.uint8):
            raise UserError(
                f"{self.recipe.name}: the observation for {key!r} is {value.dtype} {list(value.shape)}, "
                f"but its space says {list(source.shape)}"
            )
        return value


class _Trial(NamedTuple):
    """What making one environment, resetting it and stepping it once tells about all of them."""

    recipe: _Recipe
    example: dict[str, np.ndarray]
    action_dim: int
    bounded: bool
    films: bool


def _try_out(recipe: _Recipe, keys: Mapping[str, Any] | None) -> _Trial:
    env = _SingleEnv(recipe, check=True)
    try:
        sources = _map_observations(env.env.observation_space, keys, recipe.name)
        if recipe.render is not None and RGB in sources:
            raise UserError("trainer.env_config: rgb comes from render or from keys, not from both; set keys")
        if LANGUAGE in sources and (recipe.instruction is not None or recipe.instruction_key is not None):
            raise UserError("trainer.env_config: language comes from keys or from an instruction, not from both")
        env.recipe = recipe = replace(recipe, sources=sources)
        example = env.reset(seed=0)
        if not example:
            raise UserError(
                f"trainer.env_config: nothing of {recipe.name} is observed; set keys, render or instruction"
            )
        films = env.env.render_mode == "rgb_array"
        if films:
            env.frame()  # a missing renderer shows now, not at the first evaluation
        reported = set(env.info)
        env.step(np.zeros(prod(env.action_space.shape), dtype=np.float32))
        if recipe.success_key is None and recipe.success_return is None:
            found = next((key for key in SUCCESS_KEYS if key in reported | set(env.info)), None)
            recipe = replace(recipe, success_key=found)
    finally:
        env.env.close()
    return _Trial(recipe, example, prod(env.action_space.shape), bool(env.bounded.all()), films)


def _lookup(info: Mapping[str, Any], path: str) -> Any:
    """The entry of nested mappings under a dotted path, or None."""
    if path in info:
        return info[path]
    first, _, rest = path.partition(".")
    inner = info.get(first)
    return _lookup(inner, rest) if rest and isinstance(inner, Mapping) else None


def _resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture uint8 `[H, W, 3]` at another size: bilinear, averaging where it shrinks."""
    if frame.shape[:2] == (height, width):
        return frame
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return pixels[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).contiguous().numpy()


def _letterbox(frame: np.ndarray, size: int) -> np.ndarray:
    """A picture uint8 `[H, W, 3]` fitted into a black square, uint8 `[size, size, 3]`."""
    scale = size / max(frame.shape[:2])
    height, width = (max(1, round(side * scale)) for side in frame.shape[:2])
    square = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = _resize(frame, height, width)
    return square


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _describe(error: BaseException) -> str:
    """An exception in one line, with where it came from."""
    if isinstance(error, gymnasium.error.DependencyNotInstalled):
        return f"needs a package that is not installed: {_one_line(error)}"
    if isinstance(error, ModuleNotFoundError):
        return f"needs {error.name!r}: pip install the package that provides it"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {_one_line(error)} ({Path(place.filename).name}, line {place.lineno})"


@contextmanager
def _blame(what: str) -> Iterator[None]:
    """Turn what the user's environment raises into a `UserError`."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} {_describe(error)}") from error


# ------------------------------------------------------------------- several, in one process or in many


class _Group:
    """Environments that share a process: `submit` a method call, then `collect` its result."""

    def __init__(self, recipe: _Recipe, count: int):
        self.envs = [_SingleEnv(recipe) for _ in range(count)]

    def submit(self, method: str, *args: Any) -> None:
        self._result = getattr(self, method)(*args)

    def collect(self) -> Any:
        return self._result

    def reset(self, rows: Sequence[int], seeds: Sequence[int]) -> dict[str, np.ndarray]:
        return _stack([self.envs[row].reset(seed) for row, seed in zip(rows, seeds, strict=True)])

    def step(self, actions: np.ndarray) -> dict[str, np.ndarray]:
        return _stack([env.step(action) for env, action in zip(self.envs, actions, strict=True)])

    def frames(self, size: int) -> np.ndarray:
        return np.stack([_letterbox(env.frame(), size) for env in self.envs])

    def close(self) -> None:
        for env in self.envs:
            env.env.close()


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class _RemoteGroup:
    """A `_Group` in a process of its own."""

    def __init__(self, recipe: _Recipe, count: int):
        # Not "fork", which would copy threads, locks and GPU contexts. The fork server imports this module, which takes
        # seconds, once for all workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._name = recipe.name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, cloudpickle.dumps(recipe), count), daemon=True)
        self._process.start()
        theirs.close()

    def submit(self, method: str, *args: Any) -> None:
        try:
            self._pipe.send((method, args))
        except OSError as error:
            raise self._dead() from error

    def collect(self) -> Any:
        try:
            result = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._dead() from error
        if isinstance(result, UserError):
            raise result
        return result

    def close(self) -> None:
        # The worker leaves its loop when the pipe closes; a simulator that hangs is not waited for.
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _dead(self) -> UserError:
        self._process.join(timeout=5)
        return UserError(
            f"{self._name}: a worker process ended (exit code {self._process.exitcode}); what it printed is above. "
            "Negative codes are signals: -9 is often a lack of memory, -11 a crash inside the simulator"
        )


def _serve(pipe: Any, pickled_recipe: bytes, count: int) -> None:
    """The worker process: answer calls until the main process closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too; the main process decides
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            group = _Group(cloudpickle.loads(pickled_recipe), count)
        except UserError as error:
            pipe.send(error)
            return
        pipe.send(None)
        while True:
            method, args = pipe.recv()
            try:
                group.submit(method, *args)
                pipe.send(group.collect())
            except UserError as error:
                pipe.send(error)
    group.close()


# ------------------------------------------------------------------- the TorchRL environment


class GymnasiumEnv(EnvBase):
    """`num_envs` Gymnasium environments as one TorchRL environment of batch `[N]`; see the module's docstring.

    Reset with `TensorDict({"initial_state": ids}, [N])`, ids int64 `[N, 1]`, starts row n from `reset(seed=ids[n])`;
    with a `_reset` mask, in the rows that it names. An environment whose episode has ended is to be reset before it is
    stepped again. `state_dict` holds the place in the stream of training states, and no simulator's state: after
    `load_state_dict`, reset.

    Raises:
        UserError: an environment raised, or a worker process ended.
    """

    batch_locked = True
    resumes_exactly = False

    def __init__(self, trial: _Trial, num_envs: int, workers: int, seed: int, device: torch.device | str):
        super().__init__(device=device, batch_size=[num_envs])
        self.films = trial.films
        self._make_specs(trial, num_envs)
        self._current: dict[str, np.ndarray] | None = None  # the last observation, and "initial_state"
        self._set_seed(seed)
        self._shares = np.array_split(np.arange(num_envs), workers)  # the rows of each group
        self._groups: list[_Group | _RemoteGroup] = []
        kind = _Group if workers == 1 else _RemoteGroup
        try:
            for share in self._shares:
                self._groups.append(kind(trial.recipe, len(share)))
            if workers > 1:
                self._collect(range(workers))
            self.is_closed = False
        except UserError:
            self.close()
            raise

    def _make_specs(self, trial: _Trial, n: int) -> None:
        device = self.device
        flag = lambda: Categorical(2, (n, 1), dtype=torch.bool, device=device)  # noqa: E731
        observation = Composite(shape=(n,), device=device)
        for key, array in trial.example.items():
            shape, dtype = (n, *array.shape), torch.from_numpy(array).dtype
            if key in (RGB, LANGUAGE):
                observation[key] = Bounded(0, 255, shape, dtype=dtype, device=device)
            else:
                observation[key] = Unbounded(shape, dtype=dtype, device=device)
        root = {
            OBSERVATION: observation,
            INITIAL_STATE: Bounded(0, 2**32 - 1, (n, 1), dtype=torch.int64, device=device),
        }
        self.has_success = trial.recipe.success_key is not None or trial.recipe.success_return is not None
        if self.has_success:
            root[SUCCESS] = flag()
        self.observation_spec = Composite(root, shape=(n,), device=device)
        shape = (n, trial.action_dim)
        self.action_spec = (
            Bounded(-1.0, 1.0, shape, dtype=torch.float32, device=device)
            if trial.bounded
            else Unbounded(shape, dtype=torch.float32, device=device)
        )
        self.reward_spec = Unbounded((n, 1), dtype=torch.float32, device=device)
        self.full_done_spec = Composite(done=flag(), terminated=flag(), truncated=flag(), shape=(n,), device=device)

    def _set_seed(self, seed: int | None) -> None:
        self._seed = int(seed or 0)
        self._episodes = np.zeros(self.batch_size[0], dtype=np.int64)

    def _draw_training_states(self, rows: np.ndarray) -> np.ndarray:
        """The next initial-state id of each row: a hash of seed, row and episode, past the held-out ids."""
        ids = [np.random.SeedSequence((self._seed, row, self._episodes[row])).generate_state(1)[0] for row in rows]
        self._episodes[rows] += 1
        return HELD_OUT_STATES + np.array(ids, dtype=np.int64) % (2**31 - HELD_OUT_STATES)

    def _reset(self, tensordict: TensorDictBase | None = None, **_) -> TensorDictBase:
        n = self.batch_size[0]
        mask = None if tensordict is None else tensordict.get("_reset", None)
        rows = np.arange(n)
        if mask is not None and self._current is not None:
            rows = mask.view(n).nonzero()[:, 0].cpu().numpy()
        ids = None if tensordict is None else tensordict.get(INITIAL_STATE, None)
        states = self._draw_training_states(rows) if ids is None else ids.view(n).cpu().numpy()[rows]
        if (states < 0).any():
            raise UserError(f"initial_state: ids are seeds of at least 0, got {states.min()}")
        made = {INITIAL_STATE: states[:, None], **self._start_episodes(rows, states)} if len(rows) else {}
        if len(rows) == n:
            self._current = made
        else:
            self._current = {key: array.copy() for key, array in self._current.items()}
            for key, array in made.items():
                self._current[key][rows] = array
        none = np.zeros((n, 1), dtype=bool)
        flags = (SUCCESS, "done", "terminated", "truncated")[0 if self.has_success else 1 :]
        return self._pack(self._current | {key: none.copy() for key in flags})

    def _start_episodes(self, rows: np.ndarray, states: np.ndarray) -> dict[str, np.ndarray]:
        busy = []
        for group, share in enumerate(self._shares):
            mine = (rows >= share[0]) & (rows <= share[-1])
            if mine.any():
                self._groups[group].submit("reset", (rows[mine] - share[0]).tolist(), states[mine].tolist())
                busy.append(group)
        return self._collect(busy)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = tensordict.get(ACTION).detach().to("cpu", torch.float32).numpy()
        for group, share in zip(self._groups, self._shares, strict=True):
            group.submit("step", actions[share])
        made = self._collect(range(len(self._groups)))
        made[INITIAL_STATE] = self._current[INITIAL_STATE].copy()
        self._current = {key: made[key] for key in self._current}
        made["done"] = made["terminated"] | made["truncated"]
        return self._pack(made)

    def _collect(self, groups: Sequence[int]) -> Any:
        """The groups' results, joined along the batch. Every reply is read, so that an error leaves none behind."""
        results, errors = [], []
        for group in groups:
            try:
                results.append(self._groups[group].collect())
            except UserError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        if len(results) == 1 or results[0] is None:
            return results[0]
        if isinstance(results[0], dict):
            return {key: np.concatenate([result[key] for result in results]) for key in results[0]}
        return np.concatenate(results)

    def _pack(self, arrays: Mapping[str, np.ndarray]) -> TensorDictBase:
        observation = {key: torch.from_numpy(array) for key, array in arrays.items() if key in MODALITIES}
        root = {key: torch.from_numpy(array) for key, array in arrays.items() if key not in MODALITIES}
        root[OBSERVATION] = TensorDict(observation, self.batch_size)
        return TensorDict(root, self.batch_size).to(self.device)

    def render_frames(self, size: int = 256) -> Tensor | None:
        """What every environment looks like now, for videos.

        Returns:
            uint8 `[N, size, size, 3]` on the CPU: `env.render()` if the environments were made with `render_mode`
            "rgb_array" (as `render` does), else the `rgb` observation, in a black square if it is not one; None if
            there is neither.
        """
        if self.films:
            for group in self._groups:
                group.submit("frames", size)
            return torch.from_numpy(self._collect(range(len(self._groups))))
        if self._current is not None and RGB in self._current:
            return torch.from_numpy(np.stack([_letterbox(frame, size) for frame in self._current[RGB]]))
        return None

    def state_dict(self, *args, **kwargs) -> dict:
        """The seed and how many episodes each row has started."""
        return {"seed": self._seed, "episodes": torch.from_numpy(self._episodes.copy())}

    def load_state_dict(self, state_dict: dict, *args, **kwargs) -> None:
        """Continue the stream of training states where it was; reset afterwards."""
        self._seed, self._episodes = state_dict["seed"], state_dict["episodes"].cpu().numpy().copy()

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the environments and end their worker processes; closing twice does nothing."""
        groups, self._groups = self._groups, []
        for group in groups:
            group.close()
        super().close(raise_if_closed=raise_if_closed)
