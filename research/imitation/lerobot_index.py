"""Where the episodes of a LeRobot data set lie: its `meta/` folder, of version 2.1 or 3.0.

In v2.1 every episode has files of its own; in v3.0 a file holds several, and `meta/episodes/` says where each begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from research.errors import UserError, did_you_mean, one_line
from research.imitation.lerobot_tables import Table, read_json_lines, read_table
from research.schema import PROPRIO, RGB, base_modality

VERSIONS = ("v2.1", "v3.0")
STATE, PICTURES, ACTIONS = "observation.state", "observation.image", "action"
TASK_NUMBER, EPISODE_NUMBER = "task_index", "episode_index"


class Place(NamedTuple):
    """Where an episode lies."""

    number: int
    table: Path
    videos: dict[str, tuple[Path, float]]
    """Feature -> file, and the time in it at which the episode begins, in seconds."""


def read_info(folder: Path) -> dict[str, Any]:
    """What `meta/info.json` says: `codebase_version`, `fps`, `features`, and more.

    Raises:
        UserError: it is missing, says something else, or is of another version.
    """
    path = folder / "meta" / "info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"demonstrations: {folder} is no LeRobot data set: {path} cannot be read") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"demonstrations: {path} is not JSON: {one_line(error)}") from error
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if version not in VERSIONS:
        known = " and ".join(VERSIONS)
        raise UserError(f"demonstrations: {path}: codebase_version is {version!r}; {known} can be read: convert it")
    features, fps = info.get("features"), info.get("fps")
    if not isinstance(features, dict) or not all(_describes(feature) for feature in features.values()):
        raise UserError(f"demonstrations: {path}: every feature needs a dtype and a shape of whole numbers")
    if not isinstance(fps, int | float) or not 0 < fps < 10_000:
        raise UserError(f"demonstrations: {path}: fps should be frames per second, got {fps!r}")
    if not isinstance(chunk_size := info.setdefault("chunks_size", 1000), int) or chunk_size < 1:
        raise UserError(f"demonstrations: {path}: chunks_size should be a number of episodes, got {chunk_size!r}")
    return info


def _describes(feature: Any) -> bool:
    shape = feature.get("shape") if isinstance(feature, dict) else None
    whole = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
    return whole and isinstance(feature.get("dtype"), str)


def shows_pictures(feature: Mapping[str, Any]) -> bool:
    """Whether a feature is pictures, in videos or one by one."""
    return feature["dtype"] in ("video", "image")


def default_keys(features: Mapping[str, Mapping]) -> dict[str, str]:
    """Feature -> observation key, where nobody says."""
    keys = {STATE: PROPRIO} if STATE in features else {}
    for feature in (name for name in features if name.startswith(PICTURES) and shows_pictures(features[name])):
        keys[feature] = f"{RGB}_{feature.rpartition('.')[2]}" if RGB in keys.values() else RGB
    return keys


def check_keys(folder: Path, features: Mapping[str, Mapping], keys: Mapping[str, str]) -> None:
    """Refuse observation keys that do not suit their features.

    Raises:
        UserError: also where there are no actions.
    """
    for feature, key in keys.items():
        if feature not in features:
            hint = did_you_mean(feature, features)
            raise UserError(f"lerobot.keys: {folder} has no feature {feature!r}{hint}; it has {', '.join(features)}")
        expected = RGB if shows_pictures(features[feature]) else PROPRIO
        if base_modality(key) != expected:
            shape = features[feature]["shape"]
            like = f"{RGB} or {RGB}_<camera>" if expected == RGB else PROPRIO
            raise UserError(f"lerobot.keys.{feature}: a {features[feature]['dtype']} of shape {shape} can be {like}")
    if len(set(keys.values())) < len(keys):
        raise UserError(f"lerobot.keys: two features have the same observation key in {', '.join(keys.values())}")
    if ACTIONS not in features:
        raise UserError(f"demonstrations: {folder} has no feature {ACTIONS!r}; it has {', '.join(features)}")


def find_episodes(folder: Path, info: Mapping[str, Any], keys: Mapping[str, str]) -> tuple[list[Place], dict[int, str]]:
    """Where each episode lies, and the tasks' words by number.

    Args:
        folder: of the data set.
        info: as of `read_info`.
        keys: the features that are read.
    Raises:
        UserError: a file is missing, or there are no episodes.
    """
    videos = [feature for feature in keys if info["features"][feature]["dtype"] == "video"]
    places, tasks = (_episodes_v30 if info["codebase_version"] == "v3.0" else _episodes_v21)(folder, info, videos)
    if not places:
        raise UserError(f"demonstrations: {folder} has no episodes")
    return places, tasks


def _episodes_v21(folder: Path, info: Mapping, videos: list[str]) -> tuple[list[Place], dict[int, str]]:
    places = []
    for row in read_json_lines(folder / "meta" / "episodes.jsonl", EPISODE_NUMBER):
        number = row[EPISODE_NUMBER]
        chunk, name = f"chunk-{number // info['chunks_size']:03d}", f"episode_{number:06d}"
        films = {video: (folder / "videos" / chunk / video / f"{name}.mp4", 0.0) for video in videos}
        places.append(Place(number, folder / "data" / chunk / f"{name}.parquet", films))
    tasks = read_json_lines(folder / "meta" / "tasks.jsonl", TASK_NUMBER, "task")
    return places, {row[TASK_NUMBER]: row["task"] for row in tasks}


def _episodes_v30(folder: Path, info: Mapping, videos: list[str]) -> tuple[list[Place], dict[int, str]]:
    files = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    places = [place for file in files for place in _places_v30(folder, read_table(file), videos)]
    # The words are the table's index: a column whose name depends on who wrote it.
    table = read_table(folder / "meta" / "tasks.parquet")
    words = [name for name in table.names if name != TASK_NUMBER]
    if not words:
        raise UserError(f"demonstrations: {table.path} has no column with the tasks' words")
    return places, dict(zip(table.values(TASK_NUMBER), map(str, table.values(words[0])), strict=True))


def _places_v30(folder: Path, table: Table, videos: list[str]) -> Iterator[Place]:
    def files(prefix: str, name: str) -> list[Path]:
        pairs = zip(table.values(f"{prefix}/chunk_index"), table.values(f"{prefix}/file_index"), strict=True)
        return [folder / prefix / name.format(chunk, file) for chunk, file in pairs]

    data = files("data", "chunk-{:03d}/file-{:03d}.parquet")
    films = {}
    for video in videos:
        begins = table.values(f"videos/{video}/from_timestamp")
        films[video] = list(zip(files(f"videos/{video}", "chunk-{:03d}/file-{:03d}.mp4"), begins, strict=True))
    for at, number in enumerate(table.values(EPISODE_NUMBER)):
        yield Place(number, data[at], {video: where[at] for video, where in films.items()})
