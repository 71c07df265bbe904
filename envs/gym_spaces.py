"""From a Gymnasium environment's spaces to this project's: what its observations, actions and infos are called here."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from research.schema import (
    DEPTH,
    LANGUAGE,
    MODALITIES,
    PROPRIO,
    RGB,
    UserError,
    base_modality,
    encode_text,
)

SUCCESS_KEYS = ("success", "is_success")


class Source(NamedTuple):
    """Where one part of an observation comes from, and the shape that its space promises."""

    path: tuple[str, ...]
    shape: tuple[int, ...]


Sources = dict[str, tuple[Source, ...]]  # observation key -> its parts; several are concatenated


def map_observations(space: gymnasium.Space, keys: Mapping[str, Any] | None, name: str) -> Sources:
    """Find the source of each observation key, and refuse what does not fit the schema.

    Args:
        space: of one environment, without a batch.
        keys: the option of that name (see `envs.gym.make_gym_env`); None takes what is named or shaped as the schema's.
        name: the environment's, for messages.
    Raises:
        UserError: a key that the schema does not know, a path that does not exist, or a space of the wrong kind.
    """
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
        base = base_modality(key)
        if base is None:
            cameras = f"{RGB}_<camera> and {DEPTH}_<camera>"
            raise UserError(f"{option}: the schema knows {', '.join(MODALITIES)}, and {cameras}")
        paths = paths if isinstance(paths, list) else [paths or ""]
        if not paths or (len(paths) > 1 and base != PROPRIO):
            raise UserError(f"{option}: expected one path, got {paths!r}")
        for path in paths:
            if not isinstance(path, str) or path not in leaves:
                raise UserError(f"{option}: {name} has no observation {path!r}; it has {listing}")
            leaf = leaves[path][1]
            fits, wanted = _fits(leaf, base)
            if not fits:
                raise UserError(
                    f"{option}: should be {wanted}, got {leaf} from {path or 'the observation'!r} of {name}"
                )
        sources[key] = tuple(Source(leaves[path][0], leaves[path][1].shape or ()) for path in paths)
    return sources


def check_one_text(sources: Sources, instructed: bool) -> None:
    """Refuse `language` from the observation where the options give an instruction too (`instructed`)."""
    if LANGUAGE in sources and instructed:
        raise UserError("trainer.env_config: language comes from keys or from an instruction, not from both")


def _leaves(space: gymnasium.Space, path: tuple[str, ...] = ()) -> dict[str, tuple[tuple[str, ...], gymnasium.Space]]:
    """Every non-Dict space inside a space, under its dotted name ("" for a space that is not a Dict)."""
    if not isinstance(space, gymnasium.spaces.Dict):
        return {".".join(path): (path, space)}
    return {name: leaf for key, inner in space.items() for name, leaf in _leaves(inner, (*path, key)).items()}


def _fits(leaf: gymnasium.Space, base: str) -> tuple[bool, str]:
    """Whether a space can be read as that modality, and what such a space looks like."""
    box = leaf if isinstance(leaf, gymnasium.spaces.Box) else None
    if base == RGB:
        return bool(box and box.dtype == np.uint8 and len(box.shape) == 3 and box.shape[2] == 3), "uint8 [H, W, 3]"
    if base == DEPTH:
        flat = box and box.dtype.kind == "f" and (len(box.shape) == 2 or box.shape[2:] == (1,))
        return bool(flat), "float [H, W] or [H, W, 1] in metres"
    if base == PROPRIO:
        return box is not None, "a Box"
    return isinstance(leaf, gymnasium.spaces.Text), "a Text"


def observation_layout(sources: Sources, text_length: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape (no batch) and dtype of each observation key, as in `envs.simulator.Layout`; L is `text_length`."""
    layout = {}
    for key, parts in sources.items():
        shape, dtype = {
            RGB: (parts[0].shape, np.uint8),
            DEPTH: (parts[0].shape[:2], np.float32),
            PROPRIO: ((sum(prod(part.shape) for part in parts),), np.float32),
            LANGUAGE: ((text_length,), np.int64),
        }[base_modality(key)]
        layout[key] = shape, np.dtype(dtype)
    return layout


def read_source(observation: Any, source: Source, name: str) -> Any:
    """What lies under a source's path in an observation of the environment `name`."""
    for step in source.path:
        if step not in observation:
            raise UserError(f"{name}: an observation lacks {'.'.join(source.path)!r}, which its space has")
        observation = observation[step]
    return observation


def encode_instruction(text: str, length: int) -> np.ndarray:
    """A text as int64 `[L]`; one that is too long names the option that makes room for it."""
    try:
        return encode_text(text, length).numpy()
    except UserError as error:
        raise UserError(f"trainer.env_config.instruction_length: {error}") from error


def look_up(info: Mapping[str, Any], path: str) -> Any:
    """The entry of nested mappings under a dotted path, or None."""
    if path in info:
        return info[path]
    first, _, rest = path.partition(".")
    inner = info.get(first)
    return look_up(inner, rest) if rest and isinstance(inner, Mapping) else None


def names_of(info: Mapping[str, Any]) -> str:
    """What an info holds, for messages."""
    return ", ".join(map(str, info)) or "nothing"


class ActionScale:
    """How actions reach a Box: a component with two finite bounds is rescaled from [-1, 1] and clipped; others pass.

    Bounds at the edge of what their type can hold, as environments without bounds declare them, are none.

    Raises:
        UserError: the space is no Box of floats.
    """

    def __init__(self, space: gymnasium.Space, name: str):
        if not isinstance(space, gymnasium.spaces.Box) or space.dtype.kind != "f":
            raise UserError(f"trainer.env: {name} takes actions from {space}; only float Box actions are supported")
        self.shape, self.dtype, self.size = space.shape, space.dtype, prod(space.shape)
        self.low, self.high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
        edge = np.finfo(space.dtype).max / 10
        finite = (self.low > -edge) & (self.high < edge)
        self.bounded = bool(finite.all())
        self.scale, self.offset = np.ones_like(self.low), np.zeros_like(self.low)
        low, high = self.low[finite], self.high[finite]
        self.scale[finite], self.offset[finite] = (high - low) / 2, (high + low) / 2

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """An action float32 `[A]`, or a batch `[N, A]` of them, as the environment takes it."""
        # gymnasium.wrappers.RescaleAction rounds some actions to just outside the Box; clipping last cannot.
        action = np.clip(self.offset + self.scale * action, self.low, self.high)
        return action.astype(self.dtype).reshape(*action.shape[:-1], *self.shape)
