"""Frames to look at: mp4 files, grids of episodes, strips of one episode. Frames are uint8 RGB, `[T, H, W, 3]`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import imageio.v3 as iio
import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from research.errors import UserError, one_line

if TYPE_CHECKING:  # what reads files of a run need not wait for torch
    from torch import Tensor

    Frames = np.ndarray | Tensor

# Okabe and Ito's green and red, which colour-blind readers tell apart too.
SUCCESS_COLOR, FAILURE_COLOR = (0, 158, 115), (213, 94, 0)
BACKGROUND = 255
FONT_SIZE = 12  # pixels


def write_video(frames: Frames, path: str | Path, fps: float) -> None:
    """Write an mp4 (H.264, yuv420p) that browsers play.

    Args:
        frames: uint8 `[T, H, W, 3]`. An odd height or width, which the format does not have, gets one more pixel: the
            last row or column again.
        path: file to write, ending in .mp4; its folder is made.
        fps: frames per second.
    Raises:
        UserError: frames of another shape or dtype, none at all, another file ending, `fps` not above 0, or a file
            that cannot be written.
    """
    path, frames = _checked_film(frames, path, fps, ".mp4")
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    # imageio does not notice every failure of ffmpeg; renaming does, and no half-written video keeps the final name.
    partial = path.with_name(f"{path.stem}.partial.mp4")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(
            partial,
            frames,
            plugin="FFMPEG",
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            quality=8,
            macro_block_size=1,  # sizes are even already; imageio would stretch them to multiples of 16
            ffmpeg_log_level="error",
            output_params=["-movflags", "+faststart"],  # a browser starts before it has the whole file
        )
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: imageio finds no ffmpeg
        raise UserError(f"cannot write the video {path}: {str(error).splitlines()[0]}") from error


def write_gif(frames: Frames, path: str | Path, fps: float, hold: float = 2.0) -> None:
    """Write an animated GIF, which pages show that play no video; it starts again and again.

    Args:
        frames: uint8 `[T, H, W, 3]`; 256 colours are kept, the same in all frames.
        path: file to write, ending in .gif; its folder is made.
        fps: frames per second; players round to 1/100 s.
        hold: seconds for which the last frame stays.
    Raises:
        UserError: as `write_video`.
    """
    path, frames = _checked_film(frames, path, fps, ".gif")
    palette = Image.fromarray(rearrange(frames[:: max(1, len(frames) // 8)], "t h w rgb -> (t h) w rgb")).quantize(256)
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [1000 / fps] * (len(pictures) - 1) + [1000 * hold]  # milliseconds
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {one_line(error)}") from error


def video_grid(
    episodes: Sequence[Frames],
    columns: int,
    success: Sequence[bool] | None = None,
    gap: int = 2,
    border: int = 3,
    captions: Sequence[tuple[str, str]] | None = None,
) -> np.ndarray:
    """Episodes side by side, filled row by row; one that is over holds its last frame.

    Args:
        episodes: N of uint8 `[T_i, H, W, 3]`, all of the same H and W.
        columns: C, episodes per row; the grid has ceil(N / C) rows.
        success: N outcomes: an episode gets a green or red border, around its frame, once it is over.
        gap: pixels between episodes.
        border: pixels of the border on each side; without `success` there is none.
        captions: of each episode, what is written under it from its first frame on, broken into lines, and what is
            added in one more line once it is over.
    Returns:
        uint8 `[max T_i, rows * (h + gap) - gap, C * (W + 2 border + gap) - gap, 3]`, white where empty; h is
        H + 2 border and the height of the longest caption.
    Raises:
        UserError: no episodes, different sizes, another shape or dtype, or not one outcome or caption per episode.
    """
    clips = [_checked(episode, f"episode {i}") for i, episode in enumerate(episodes)]
    if not clips or len({clip.shape[1:] for clip in clips}) > 1:
        raise UserError(f"a video grid takes episodes of one size, got {sorted({c.shape[1:3] for c in clips})}")
    if success is not None and len(success) != len(clips):
        raise UserError(f"{len(clips)} episodes but {len(success)} outcomes")
    if captions is not None and len(captions) != len(clips):
        raise UserError(f"{len(clips)} episodes but {len(captions)} captions")
    if columns < 1:
        raise UserError(f"columns is {columns}, should be at least 1")
    edge = border if success is not None else 0
    length = max(len(clip) for clip in clips)
    rows = -(-len(clips) // columns)
    _, height, width, _ = clips[0].shape
    texts = [(caption_lines(text, width + 2 * edge), end) for text, end in captions or ()]
    below = _line_height(FONT_SIZE) * max((len(lines) + bool(end) for lines, end in texts), default=0)
    # Every tile ends in a gap below and to the right; the last ones are cut off.
    tiles = np.full(
        (rows * columns, length, height + 2 * edge + below + gap, width + 2 * edge + gap, 3), BACKGROUND, dtype=np.uint8
    )
    for i, (tile, clip) in enumerate(zip(tiles, clips, strict=False)):
        framed = tile[:, : height + 2 * edge, : width + 2 * edge]
        if success is not None:
            framed[len(clip) - 1 :] = SUCCESS_COLOR if success[i] else FAILURE_COLOR
        inside = framed[:, edge : edge + height, edge : edge + width]
        inside[: len(clip)] = clip
        inside[len(clip) :] = clip[-1]
        if texts:
            band, (lines, end) = tile[:, height + 2 * edge : height + 2 * edge + below, : width + 2 * edge], texts[i]
            band[:] = written(lines, *band.shape[1:3])
            band[len(clip) - 1 :] = written([*lines, end], *band.shape[1:3])
    grid = rearrange(tiles, "(r c) t h w rgb -> t (r h) (c w) rgb", c=columns)
    return grid[:, : grid.shape[1] - gap, : grid.shape[2] - gap]


def caption_lines(text: str, width: int, font_size: int = FONT_SIZE) -> list[str]:
    """A text in lines that are at most `width` pixels wide, where its words allow that."""
    return wrap(text, max(8, int(width / (0.52 * font_size))))  # the mean width of a letter, in font sizes


def written(lines: Sequence[str], height: int, width: int, font_size: int = FONT_SIZE) -> np.ndarray:
    """Lines of text, black on white: uint8 `[height, width, 3]`; what does not fit is cut off."""
    picture = Image.new("RGB", (width, height), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        draw.text((2, row * _line_height(font_size)), line, fill=(0, 0, 0), font=_font(font_size))
    return np.asarray(picture)


def _line_height(font_size: int) -> int:
    return round(1.25 * font_size)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def frame_strip(frames: Frames, count: int, gap: int = 2, caption: tuple[str, str] = ("", "")) -> np.ndarray:
    """`count` evenly spaced frames side by side, the first and the last among them.

    Args:
        frames: uint8 `[T, H, W, 3]`; where T < `count`, frames repeat.
        count: how many frames, at least 2.
        gap: white pixels between frames.
        caption: what is written under the frames: what the episode is, and how it went.
    Returns:
        uint8 `[H + h, count * (W + gap) - gap, 3]`, where h is the height of the caption, 0 without one.
    Raises:
        UserError: `count` below 2, another shape or dtype, or no frames.
    """
    frames = _checked(frames, "frame strip")
    if count < 2:
        raise UserError(f"a frame strip shows at least 2 frames, not {count}")
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    spaced = np.pad(chosen, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=BACKGROUND)
    strip = rearrange(spaced, "n h w rgb -> h (n w) rgb")[:, : count * (frames.shape[2] + gap) - gap]
    if not (text := " · ".join(filter(None, caption))):
        return strip
    size = max(FONT_SIZE, strip.shape[1] // 60)  # still read where a page shrinks the strip to its own width
    lines = caption_lines(text, strip.shape[1], size)
    band = written(lines, len(lines) * _line_height(size) + gap, strip.shape[1], size)
    return np.concatenate([strip, band])


def _checked_film(frames: Frames, path: str | Path, fps: float, suffix: str) -> tuple[Path, np.ndarray]:
    path = Path(path)
    frames = _checked(frames, str(path))
    if path.suffix != suffix:
        raise UserError(f"{path}: the file name of this film ends in {suffix}")
    if not fps > 0:
        raise UserError(f"{path}: fps is {fps}, should be above 0")
    return path, frames


def _checked(frames: Frames, what: str) -> np.ndarray:
    array = frames.detach().cpu().numpy() if hasattr(frames, "detach") else np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise UserError(
            f"{what}: frames should be uint8 [T, H, W, 3] with T > 0, got {array.dtype} {list(array.shape)}"
        )
    return array
