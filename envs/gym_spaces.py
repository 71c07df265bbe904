"""From a Gymnasium environment's spaces to this project's: what its observations and actions are called here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor

from envs.failures import blame, warn_once
from research.action_map import ActionMap
from research.errors import SimulatorFailed, UserError
from research.schema import DEPTH, LANGUAGE, MODALITIES, PROPRIO, RGB, base_modality, encode_text


class Source(NamedTuple):
    """Where one part of an observation comes from, and how it is read.

    Attributes:
        path: through nested Dicts.
        shape: what its space promises, without a batch.
        dtype: also; None for a text.
        channels: of a picture, which axis they are; None where there is none (grey `[H, W]`, or no picture at all).
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: np.dtype | None = None
    channels: int | None = None


Sources = dict[str, tuple[Source, ...]]  # observation key -> its parts; several are concatenated


def map_observations(
    space: gymnasium.Space,
    keys: Mapping[str, Any] | None,
    name: str,
    depth_unit: float | Mapping[str, float] | None = None,
) -> Sources:
    """Find the source of each observation key, and refuse what does not fit the schema.

    Args:
        space: of one environment, without a batch.
        keys: the option of that name (see `envs.gym.make_gym_env`); None takes what is named or shaped as the schema's.
        name: the environment's, for messages.
        depth_unit: the option of that name.
    Raises:
        UserError: a key that the schema does not know, a path that does not exist, a space of the wrong kind, or depth
            whose unit is not known.
    """
    leaves = _leaves(space)
    listing = ", ".join(f"{path or 'the whole observation'}: {leaf}" for path, (_, leaf) in leaves.items())
    if keys is None:
        if isinstance(space, gymnasium.spaces.Box):
            keys = {RGB if _looks_like_pictures(space) else PROPRIO: ""}
        else:
            keys = {key: key for key in _known_names(leaves)}
            if not keys:
                raise UserError(
                    f"trainer.env_config.keys: say which observations of {name} are {', '.join(MODALITIES)}; "
                    f"it has {listing}"
                )
            if unread := [path for path in leaves if path not in keys]:
                warn_once(
                    f"{name}: of its observations {', '.join(keys)} are read by their names, {', '.join(unread)} by "
                    "nothing; trainer.env_config.keys names others"
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
            source, wanted = _read_as(base, *leaves[path])
            if source is None:
                raise UserError(
                    f"{option}: should be {wanted}, got {leaves[path][1]} from {path or 'the observation'!r} of {name}"
                )
            sources[key] = (*sources.get(key, ()), source)
    _check_depth_units(sources, depth_unit, name)
    return sources


def metres_per_unit(key: str, depth_unit: float | Mapping[str, float] | None) -> float:
    """How many metres 1 is in the depth of an observation key, as the option `depth_unit` says."""
    unit = depth_unit.get(key) if isinstance(depth_unit, Mapping) else depth_unit
    return 1.0 if unit is None else float(unit)


def _check_depth_units(sources: Sources, depth_unit: float | Mapping[str, float] | None, name: str) -> None:
    """Refuse depth whose unit nobody says, and one unit for metres and for whole numbers alike."""
    option = "trainer.env_config.depth_unit"
    cameras = {key: parts[0] for key, parts in sources.items() if base_modality(key) == DEPTH}
    whole = [key for key, source in cameras.items() if source.dtype.kind != "f"]
    said = depth_unit if isinstance(depth_unit, Mapping) else dict.fromkeys(cameras, depth_unit)
    if unknown := [key for key in said if key not in cameras]:
        depths = ", ".join(cameras) or "none"
        raise UserError(f"{option}: {unknown[0]!r} is no depth that is observed of {name}; those are {depths}")
    for key in whole:
        if said.get(key) is None:
            source = cameras[key]
            raise UserError(
                f"trainer.env_config.keys.{key}: {source.dtype} {list(source.shape)} of {name} has whole numbers; say "
                f"how many metres 1 is in {option} (0.001 for millimetres)"
            )
    if not isinstance(depth_unit, Mapping) and depth_unit is not None and 0 < len(whole) < len(cameras):
        floats = [key for key in cameras if key not in whole]
        raise UserError(
            f"{option}: {', '.join(whole)} of {name} has whole numbers and {', '.join(floats)} floats, which one unit "
            f'does not fit; give each its own, as {{"{whole[0]}": {depth_unit}}}, the others are in metres'
        )


def _known_names(leaves: Mapping[str, tuple[tuple, gymnasium.Space]]) -> list[str]:
    """The observations that are called as the schema calls them, in its order.

    One that is called as a camera's picture and is none, such as a number `depth_scale`, is left out.
    """
    named = [(path, base_modality(path), leaf) for path, leaf in leaves.items() if len(leaf[0]) == 1]
    fits = [(path, base) for path, base, leaf in named if path == base or (base and _read_as(base, *leaf)[0])]
    return [path for modality in MODALITIES for path, base in fits if base == modality]


def check_one_text(sources: Sources, instructed: bool) -> None:
    """Refuse `language` from the observation where the options give an instruction too (`instructed`)."""
    if LANGUAGE in sources and instructed:
        raise UserError("trainer.env_config: language comes from keys or from an instruction, not from both")


def _leaves(space: gymnasium.Space, path: tuple[Any, ...] = ()) -> dict[str, tuple[tuple[Any, ...], gymnasium.Space]]:
    """Every non-Dict space inside a space, under its dotted name ("" for a space that is not a Dict)."""
    if not isinstance(space, gymnasium.spaces.Dict):
        return {_dotted(path): (path, space)}
    return {name: leaf for key, inner in space.items() for name, leaf in _leaves(inner, (*path, key)).items()}


def _dotted(path: Sequence[Any]) -> str:
    """The name of a place in nested Dicts, whose keys may be numbers."""
    return ".".join(map(str, path))


def _looks_like_pictures(space: gymnasium.spaces.Box) -> bool:
    """Whether a whole Box can only be meant as a picture: of bytes, or of floats in [0, 1] in three channels."""
    if space.dtype == np.uint8:
        return len(space.shape) > 1
    return len(space.shape) == 3 and 3 in (space.shape[0], space.shape[2]) and _within_one(space)


def _within_one(box: gymnasium.spaces.Box) -> bool:
    return box.dtype.kind == "f" and bool((box.low == 0).all() and (box.high == 1).all())


def _read_as(base: str, path: tuple[Any, ...], leaf: gymnasium.Space) -> tuple[Source | None, str]:
    """How a space is read as that modality, None if it cannot be; and what such a space looks like."""
    box = leaf if isinstance(leaf, gymnasium.spaces.Box) else None
    source = Source(path, leaf.shape or (), leaf.dtype if box else None)
    if base == LANGUAGE:
        return source if isinstance(leaf, gymnasium.spaces.Text) else None, "a Text"
    if base == PROPRIO:
        return source if box else None, "a Box"
    flat = box is not None and len(box.shape) == 2
    if base == DEPTH:
        axis = _channel_axis(box, (1,))
        fits = box is not None and box.dtype.kind in "fu" and (flat or axis is not None)
        return source._replace(channels=axis) if fits else None, "[H, W], [H, W, 1] or [1, H, W] of floats or uint16"
    axis = _channel_axis(box, (3, 1))
    fits = box is not None and (box.dtype == np.uint8 or _within_one(box)) and (flat or axis is not None)
    wanted = "uint8 [H, W, 3] (or [3, H, W], or grey), or floats with the bounds 0 and 1"
    return source._replace(channels=axis) if fits else None, wanted


def _channel_axis(box: gymnasium.spaces.Box | None, counts: Sequence[int]) -> int | None:
    """Which axis of a Box is that of its channels: the last or the first one, of as many as the first of `counts`."""
    if box is None or len(box.shape) != 3:
        return None
    return next((axis for count in counts for axis in (2, 0) if box.shape[axis] == count), None)


def promised(source: Source, base: str, *batch: int) -> str:
    """What the space of an observation of a modality says, as messages have it; a picture is told by its type, too."""
    shape = str([*batch, *source.shape])
    return f"{source.dtype} {shape}" if base == RGB else shape


def picture_shape(source: Source) -> tuple[int, int]:
    """H and W of a picture's source."""
    height, width = (side for axis, side in enumerate(source.shape) if axis != source.channels)
    return height, width


def to_rgb(values: Tensor, source: Source, name: str) -> Tensor:
    """Pictures as the schema has them: channels last, three of them, bytes.

    Args:
        values: `[*B, *source.shape]`, bytes or floats in [0, 1].
        source: where they come from.
        name: the environment's, for the message.
    Returns:
        uint8 `[*B, H, W, 3]`; a view where nothing is to be done.
    Raises:
        UserError: floats beyond [0, 1], which the space excludes.
    """
    batch = values.ndim - len(source.shape)
    if source.channels is None:
        values = values[..., None]
    elif source.channels == 0:
        values = values.movedim(batch, -1)
    if values.is_floating_point():
        if not ((values >= 0) & (values <= 1)).all():
            raise UserError(f"{name}: the picture {_dotted(source.path)!r} has values beyond the 0 and 1 of its space")
        values = (values * 255).round().to(torch.uint8)
    return values if values.shape[-1] == 3 else values.expand(*values.shape[:-1], 3)


def observation_layout(sources: Sources, text_length: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape (no batch) and dtype of each observation key, as in `envs.simulator.Layout`; L is `text_length`."""
    layout = {}
    for key, parts in sources.items():
        shape, dtype = {
            RGB: lambda parts: ((*picture_shape(parts[0]), 3), np.uint8),
            DEPTH: lambda parts: (picture_shape(parts[0]), np.float32),
            PROPRIO: lambda parts: ((sum(prod(part.shape) for part in parts),), np.float32),
            LANGUAGE: lambda parts: ((text_length,), np.int64),
        }[base_modality(key)](parts)
        layout[key] = shape, np.dtype(dtype)
    return layout


def read_source(observation: Any, source: Source, name: str) -> Any:
    """What lies under a source's path in an observation of the environment `name`."""
    with blame(f"{name}: an observation that should have {_dotted(source.path)!r}"):
        for step in source.path:
            if step not in observation:
                raise UserError(f"{name}: an observation lacks {_dotted(source.path)!r}, which its space has")
            observation = observation[step]
    return observation


def check_numbers(array: np.ndarray, key: str, name: str) -> None:
    """Refuse texts and times where the space of an observation promises numbers.

    Args:
        array: what was observed.
        key: under which it is observed here.
        name: the environment's.
    Raises:
        SimulatorFailed: it holds something else.
    """
    if array.dtype.kind not in "bifuO":  # objects may be numbers; whoever makes floats of them sees
        raise SimulatorFailed(
            f"{name}: the observation for {key!r} should be numbers, as its space says, got {array.dtype} "
            f"{array.tolist()!r}"[:300]
        )


def encode_observed(text: Any, length: int, key: str, name: str) -> np.ndarray:
    """An observed text as int64 `[L]`.

    Raises:
        SimulatorFailed: it is no text.
        UserError: it is too long.
    """
    if not isinstance(text, str):
        raise SimulatorFailed(
            f"{name}: the observation for {key!r} should be a text, as its space says, got {type(text).__name__} "
            f"{text!r}"[:300]
        )
    return encode_instruction(text, length)


def encode_instruction(text: str, length: int) -> np.ndarray:
    """A text as int64 `[L]`; one that is too long names the option that makes room for it."""
    try:
        return encode_text(text, length).numpy()
    except UserError as error:
        raise UserError(f"trainer.env_config.instruction_length: {error}") from error


def read_actions(space: gymnasium.Space, name: str) -> ActionMap:
    """How actions reach an environment.

    Raises:
        UserError: it takes something else than numbers or choices.
    """
    spaces = gymnasium.spaces
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":
        return _scaled(space)
    if isinstance(space, spaces.Discrete):
        return _chosen(space, space.start, space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return _chosen(space, space.start, space.nvec)
    if isinstance(space, spaces.MultiBinary):
        return _chosen(space, np.zeros(space.shape), np.full(space.shape, 2))
    if isinstance(space, spaces.Box) and space.dtype.kind in "iu":
        count = space.high.astype(np.float64) - space.low.astype(np.float64) + 1
        if (count <= _MOST_CHOICES).all():
            return _chosen(space, space.low, count.astype(np.int64))
    raise UserError(
        f"trainer.env: {name} takes actions from {space}; supported are Box, Discrete, MultiDiscrete and MultiBinary "
        f"(a Box of integers has at most {_MOST_CHOICES} per component); wrap it in a TransformAction"
    )


_MOST_CHOICES = 1024


def _scaled(space: gymnasium.spaces.Box) -> ActionMap:
    """A component with two finite bounds is rescaled from [-1, 1] and clipped; others pass.

    Bounds at the edge of what their type can hold, as environments without bounds declare them, are none.
    """
    low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
    edge = np.finfo(space.dtype).max / 10
    finite = (low > -edge) & (high < edge)
    scale, offset = np.ones_like(low), np.zeros_like(low)
    scale[finite], offset[finite] = (high[finite] - low[finite]) / 2, (high[finite] + low[finite]) / 2
    return ActionMap(low, high, scale, offset, space.shape, space.dtype, bounded=bool(finite.all()))


def _chosen(space: gymnasium.Space, start: Any, counts: Any) -> ActionMap:
    """Whole numbers from 0, component by component; `start` is what choice 0 stands for, of the space's shape."""
    low, counts = np.ravel(start).astype(np.float64), np.ravel(counts)
    choices = tuple(counts.tolist())
    return ActionMap(low, low + counts - 1.0, np.ones(len(choices)), low, space.shape, space.dtype, choices=choices)
