"""The pictures of LeRobot data sets: frames of videos, read from first to last, and single encoded pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from imageio_ffmpeg import read_frames

from research.errors import UserError, describe_error


class Film:
    """A video's frames, which are asked for in order.

    Args:
        path: the file.
        fps: frames per second: frame k is what is shown at k / fps seconds.
    Raises:
        UserError: it is missing, or no video.
    """

    def __init__(self, path: Path, fps: float):
        self.path, self.at, self._picture = path, -1, b""
        if not path.is_file():
            raise UserError(f"demonstrations: {path} does not exist; the data set is not complete")
        self._frames = read_frames(str(path), output_params=["-r", str(fps)])
        try:
            self._width, self._height = next(self._frames)["size"]
        except (OSError, RuntimeError, StopIteration, KeyError) as error:
            raise UserError(f"demonstrations: {path} is no video that can be read") from error

    def frame(self, number: int) -> np.ndarray:
        """A frame, uint8 `[H, W, 3]`; none before the last one that was asked for.

        Raises:
            UserError: the video is over before, or damaged.
        """
        while self.at < number:
            try:
                self._picture = next(self._frames)
            except (OSError, RuntimeError, StopIteration) as error:
                raise UserError(
                    f"demonstrations: {self.path} ends after {self.at + 1} frames; its episodes have more"
                ) from error
            self.at += 1
        return np.frombuffer(self._picture, np.uint8).reshape(self._height, self._width, 3)

    def close(self) -> None:
        """End the process that decodes."""
        self._frames.close()


def decode_picture(value: Any, where: str) -> np.ndarray:
    """An encoded picture, as a column of pictures holds it, as uint8 `[H, W, 3]`.

    Args:
        value: `{"bytes": ..., "path": ...}`.
        where: of which column it is, for messages.
    Raises:
        UserError: there are no bytes, or they are no picture.
    """
    encoded = value.get("bytes") if isinstance(value, dict) else None
    if not encoded:
        raise UserError(f"demonstrations: {where}: the pictures are not in the file, only their names")
    try:
        picture = iio.imread(encoded)
    except Exception as error:  # of any of imageio's readers
        raise UserError(f"demonstrations: {where}: a picture cannot be decoded: {describe_error(error)}") from error
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] < 3:
        raise UserError(f"demonstrations: {where}: expected colour pictures of 8 bits, got {picture.shape}")
    return picture[..., :3]
