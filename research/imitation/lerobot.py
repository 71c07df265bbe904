"""Demonstrations from LeRobot data sets (Cadene et al., 2024, https://github.com/huggingface/lerobot), v2.1 and v3.0.

Both have `meta/info.json`, which names the version, the frames per second and the features. Numbers are columns of
parquet files, one row per control step; pictures are videos, or encoded pictures in such a column. What lies where:
`research/imitation/lerobot_index.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from research.action_map import ActionMap
from research.errors import UserError
from research.imitation.config import ActionStats, LeRobotConfig
from research.imitation.lerobot_index import (
    ACTIONS,
    EPISODE_NUMBER,
    TASK_NUMBER,
    Place,
    check_keys,
    default_keys,
    find_episodes,
    read_info,
)
from research.imitation.lerobot_tables import Table, read_table
from research.imitation.lerobot_videos import Film, decode_picture
from research.schema import LANGUAGE, PROPRIO, Demonstration, encode_text

REWARD, SUCCEEDED, TIME = "next.reward", "next.success", "timestamp"
BEYOND = 1e-3  # of the way from the middle to a bound: that much is rounding


def read_dataset(folder: Path, config: LeRobotConfig) -> list[Demonstration]:
    """The episodes of a data set, as `read_lerobot`; their actions are as they were recorded."""
    return read_lerobot(folder, config.keys, config.image_size, config.every, config.instruction_length)


def read_lerobot(
    folder: Path,
    keys: Mapping[str, str] | None = None,
    image_size: int | None = None,
    every: int = 1,
    instruction_length: int = 64,
) -> list[Demonstration]:
    """Read a data set, all its episodes.

    Args:
        folder: of the data set, which holds `meta/info.json`.
        keys: feature -> observation key; by default `observation.state` is `proprio`, the first feature of pictures
            `rgb` and further ones `rgb_<camera>`.
        image_size: pictures are scaled to this many pixels a side, whatever their proportions; None: they are not.
        every: control steps between two observations that are kept.
        instruction_length: bytes reserved for the instruction, the task of a control step in words.
    Returns:
        the episodes. Where the data set has no rewards, an episode earns 1 at its end, unless it says that it failed.
    Raises:
        UserError: what is not there, or not as `meta/info.json` says.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("demonstrations: LeRobot data sets need pyarrow; pip install -e .[lerobot]")
    info = read_info(folder)
    features = info["features"]
    keys = dict(keys) if keys else default_keys(features)
    check_keys(folder, features, keys)
    places, tasks = find_episodes(folder, info, keys)
    films: dict[str, Film] = {}
    demonstrations = []
    try:
        for place in places:
            rows = _episode_rows(place, features, keys)
            texts = _texts_of(place, rows, tasks)
            observations: dict[str, np.ndarray] = {}
            for feature, key in keys.items():
                if key == PROPRIO:
                    observations[key] = rows.numbers(feature, features[feature]["shape"])[::every]
                    continue
                pictures = _pictures(place, feature, features, rows, films, info["fps"], every)
                observations[key] = np.stack([_scaled(picture, image_size) for picture in pictures])
            written = {text: encode_text(text, instruction_length).numpy() for text in dict.fromkeys(texts)}
            observations[LANGUAGE] = np.stack([written[text] for text in texts[::every]])
            demonstrations.append(_demonstration(place, texts[0], observations, rows, features, every))
    finally:
        for film in films.values():
            film.close()
    return demonstrations


def _demonstration(
    place: Place, task: str, observations: dict, rows: Table, features: Mapping, every: int
) -> Demonstration:
    success = bool(rows.numbers(SUCCEEDED, [1]).any()) if SUCCEEDED in features else None
    rewards = np.zeros(len(rows), np.float32)
    rewards[-1] = success is not False
    if REWARD in features:
        rewards = rows.numbers(REWARD, [1])[:, 0]
    return Demonstration(
        number=place.number,
        task=task,
        observations=observations,
        actions=rows.numbers(ACTIONS, features[ACTIONS]["shape"]),
        rewards=rewards,
        success=success,
        every=every,
    )


# ------------------------------------------------------------------------------------------------- what an episode has


def _episode_rows(place: Place, features: Mapping[str, Mapping], keys: Mapping[str, str]) -> Table:
    """The control steps of one episode."""
    numbers = [f for f in keys if features[f]["dtype"] != "video"]
    optional = [name for name in (REWARD, SUCCEEDED) if name in features]
    columns = dict.fromkeys([*numbers, ACTIONS, TIME, TASK_NUMBER, EPISODE_NUMBER, *optional])
    rows = read_table(place.table, tuple(columns)).where(EPISODE_NUMBER, place.number)
    if not len(rows):
        raise UserError(f"demonstrations: {place.table} has no rows of episode {place.number}")
    return rows


def _texts_of(place: Place, rows: Table, tasks: Mapping[int, str]) -> list[str]:
    """What is to be done at each control step, which may change within the episode."""
    numbers = rows.values(TASK_NUMBER)
    if unknown := [number for number in numbers if number not in tasks]:
        raise UserError(
            f"demonstrations: {place.table}: episode {place.number} is of task {unknown[0]}, which has no name"
        )
    return [tasks[number] for number in numbers]


def _pictures(
    place: Place,
    feature: str,
    features: Mapping[str, Mapping],
    rows: Table,
    films: dict[str, Film],
    fps: float,
    every: int,
) -> Iterator[np.ndarray]:
    """The pictures of every so many control steps, uint8 `[H, W, 3]`."""
    if features[feature]["dtype"] == "image":
        for value in rows.values(feature)[::every]:
            yield decode_picture(value, f"{place.table}, {feature}")
        return
    path, began = place.videos[feature]
    for time in rows.values(TIME)[::every]:
        frame = round((began + time) * fps)
        film = films.get(feature)
        if film is None or film.path != path or film.at > frame:  # episodes come in the order of their videos
            if film is not None:
                film.close()
            film = films[feature] = Film(path, fps)
        yield film.frame(frame)


def _scaled(picture: np.ndarray, size: int | None) -> np.ndarray:
    if size is None or picture.shape[:2] == (size, size):
        return picture
    planes = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
    scaled = F.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


# ------------------------------------------------------------------------------------------------------------- actions


def scale_actions(
    demonstrations: Sequence[Demonstration], stats: ActionStats, action_map: ActionMap | None = None
) -> tuple[list[Demonstration], dict[str, Any]]:
    """Bring actions to [-1, 1], component by component.

    Args:
        demonstrations: at least one.
        stats: "environment" undoes `action_map`, and clips what lies beyond its bounds; "none" leaves them as they are;
            "min_max" maps the least and the largest to -1 and 1, and a component that never varies to 0; "quantiles"
            the 1st and 99th percentile, and clips what lies beyond.
        action_map: what the environment makes of a policy's action. None: "environment" leaves them as they are.
    Returns:
        the demonstrations; and what has to be known to undo it, plain values.
    Raises:
        UserError: most actions lie beyond what the environment takes, or are none of its choices.
    """
    if stats == "environment" and action_map is not None:
        return _undone(demonstrations, action_map), {"action_stats": stats}
    if stats in ("environment", "none"):
        return list(demonstrations), {"action_stats": "none"}
    actions = np.concatenate([one.actions for one in demonstrations])
    low, high = np.quantile(actions, (0.0, 1.0) if stats == "min_max" else (0.01, 0.99), axis=0).astype(np.float32)
    span = np.where(high > low, high - low, np.inf)
    scaled = []
    for one in demonstrations:
        between = np.where(high > low, (one.actions - low) / span * 2 - 1, 0)
        scaled.append(one._replace(actions=np.clip(between, -1, 1).astype(np.float32)))
    return scaled, {"action_stats": stats, "action_low": low.tolist(), "action_high": high.tolist()}


def _undone(demonstrations: Sequence[Demonstration], action_map: ActionMap) -> list[Demonstration]:
    """Demonstrations with what a policy would have written to have the environment take their actions."""
    plans = [action_map.inverse(one.actions) for one in demonstrations]
    whole = np.concatenate(plans)
    if action_map.choices and ((whole < -0.5) | (whole > np.array(action_map.choices) - 0.5)).any():
        raise UserError(
            f"demonstrations: actions are {whole.min():g} to {whole.max():g}, counted from the environment's first "
            f"choice, and it has {' and '.join(map(str, action_map.choices))} choices"
        )
    if not action_map.bounded:
        return [one._replace(actions=plan) for one, plan in zip(demonstrations, plans, strict=True)]
    beyond, furthest = (np.abs(whole) > 1 + BEYOND).any(axis=1).mean(), np.abs(whole).max()
    found = (
        f"demonstrations: {beyond:.1%} of the actions lie beyond the bounds of the environment, up to {furthest:.3g} "
        "times as far as they reach"
    )
    if beyond > 0.5:
        raise UserError(
            f"{found}, so that the data set has other units; where its actions are in [-1, 1] already, set "
            "lerobot.action_stats to none, else to min_max or quantiles"
        )
    if beyond:
        print(f"{found}, and are clipped, as there")
    return [one._replace(actions=np.clip(plan, -1, 1)) for one, plan in zip(demonstrations, plans, strict=True)]
