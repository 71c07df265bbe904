"""Tiny LeRobot data sets, written as the versions 2.1 and 3.0 lay them out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FPS, SIDE = 10, 32
TASKS = ("open the drawer", "close it")
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
LENGTHS = (5, 4, 6)


def features(**changes) -> dict:
    picture = {"shape": [SIDE, SIDE, 3], "names": ["height", "width", "channel"]}
    return {
        "observation.state": {"dtype": "float32", "shape": [3], "names": None},
        "action": {"dtype": "float32", "shape": [2], "names": None},
        FRONT: {"dtype": "video", **picture},
        WRIST: {"dtype": "image", **picture},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **changes,
    }


def grey(episode: int, step: int) -> int:
    """Of every picture another one, far from those beside it."""
    return 30 * (step + 1) + 4 * episode


def picture(episode: int, step: int) -> np.ndarray:
    shade = np.full((SIDE, SIDE, 3), grey(episode, step), np.uint8)
    shade[: SIDE // 2, :, 0] = 0  # up is up, and red comes first
    return shade


def state(episode: int, step: int) -> list[float]:
    return [float(episode), float(step), 0.5]


def action(episode: int, step: int) -> list[float]:
    return [10.0 * episode + step, -3.0]


def rows(episode: int, length: int, **columns) -> dict[str, list]:
    def png(step: int) -> dict:
        encoded = io.BytesIO()
        iio.imwrite(encoded, 255 - picture(episode, step), extension=".png")
        return {"bytes": encoded.getvalue(), "path": f"frame-{step:06d}.png"}

    steps = range(length)
    return {
        "observation.state": [state(episode, step) for step in steps],
        "action": [action(episode, step) for step in steps],
        WRIST: [png(step) for step in steps],
        "timestamp": [step / FPS for step in steps],
        "frame_index": list(steps),
        "episode_index": [episode] * length,
        "task_index": [episode % 2] * length,
        **columns,
    }


def write_table(path: Path, columns: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_video(path: Path, pictures: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"fps": FPS, "macro_block_size": 1, "output_params": ["-g", "2", "-crf", "10"]}
    writer = imageio_ffmpeg.write_frames(str(path), (SIDE, SIDE), **options)
    writer.send(None)
    for one in pictures:
        writer.send(np.ascontiguousarray(one))
    writer.close()


def write_info(folder: Path, version: str, **changes) -> None:
    info = {"codebase_version": version, "fps": FPS, "chunks_size": 2, "features": features(), **changes}
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))


def write_v21(folder: Path, lengths=LENGTHS, **columns) -> Path:
    """A file per episode and camera, in chunks of two episodes."""
    write_info(folder, "v2.1", features=features(**{name: {"dtype": "x", "shape": [1]} for name in columns}))
    lines = [{"episode_index": e, "tasks": [TASKS[e % 2]], "length": n} for e, n in enumerate(lengths)]
    (folder / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"task_index": number, "task": task} for number, task in enumerate(TASKS)]
    (folder / "meta" / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for e, n in enumerate(lengths):
        chunk = f"chunk-{e // 2:03d}"
        more = {name: values[e] for name, values in columns.items()}
        write_table(folder / "data" / chunk / f"episode_{e:06d}.parquet", rows(e, n, **more))
        write_video(folder / "videos" / chunk / FRONT / f"episode_{e:06d}.mp4", [picture(e, s) for s in range(n)])
    return folder


def write_v30(folder: Path, lengths=LENGTHS) -> Path:
    """All episodes in one table, and in two videos: the second begins with the last episode."""
    write_info(folder, "v3.0")
    tables = [rows(e, n) for e, n in enumerate(lengths)]
    whole = {name: [value for table in tables for value in table[name]] for name in tables[0]}
    write_table(folder / "data" / "chunk-000" / "file-000.parquet", whole)
    table = {"task_index": list(range(len(TASKS))), "__index_level_0__": list(TASKS)}
    write_table(folder / "meta" / "tasks.parquet", table)
    last = len(lengths) - 1
    began = [sum(lengths[:e]) / FPS if e < last else 0.0 for e in range(len(lengths))]
    episodes = {
        "episode_index": list(range(len(lengths))),
        "length": list(lengths),
        "data/chunk_index": [0] * len(lengths),
        "data/file_index": [0] * len(lengths),
        f"videos/{FRONT}/chunk_index": [0] * len(lengths),
        f"videos/{FRONT}/file_index": [int(e == last) for e in range(len(lengths))],
        f"videos/{FRONT}/from_timestamp": began,
        f"videos/{FRONT}/to_timestamp": [b + n / FPS for b, n in zip(began, lengths, strict=True)],
    }
    write_table(folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet", episodes)
    videos = folder / "videos" / FRONT / "chunk-000"
    write_video(videos / "file-000.mp4", [picture(e, s) for e, n in enumerate(lengths[:-1]) for s in range(n)])
    write_video(videos / "file-001.mp4", [picture(last, s) for s in range(lengths[-1])])
    return folder
