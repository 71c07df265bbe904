"""Videos, grids of episodes, and strips of frames."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from research.errors import UserError
from research.runs.video import (
    FAILURE_COLOR,
    SUCCESS_COLOR,
    caption_lines,
    frame_strip,
    video_grid,
    write_gif,
    write_video,
    written,
)


def _gradient(length, height, width):
    """Frames that differ from each other and from left to right."""
    frames = np.zeros((length, height, width, 3), np.uint8)
    frames[..., 0] = (np.arange(length) * 20)[:, None, None]
    frames[..., 1] = np.linspace(0, 200, width).astype(np.uint8)
    return frames


@pytest.mark.parametrize("as_tensor", [False, True])
def test_video_reads_back_padded_to_even_sizes(tmp_path, as_tensor):
    frames = _gradient(9, 33, 47)
    path = tmp_path / "new" / "clip.mp4"
    write_video(torch.from_numpy(frames) if as_tensor else frames, path, fps=12)
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]
    back = iio.imread(path, plugin="FFMPEG")
    assert back.shape == (9, 34, 48, 3)
    assert np.abs(back[:, :33, :47].astype(int) - frames).mean() < 6
    metadata = iio.immeta(path, plugin="FFMPEG")
    assert metadata["fps"] == 12 and metadata["codec"] == "h264" and metadata["pix_fmt"].startswith("yuv420p")


@pytest.mark.parametrize(
    ("frames", "name", "fps", "message"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), "a.mp4", 5, r"\[T, H, W, 3\].*\[2, 3, 8, 8\]"),
        (np.zeros((2, 8, 8, 3), np.float32), "a.mp4", 5, "uint8.*float32"),
        (np.zeros((0, 8, 8, 3), np.uint8), "a.mp4", 5, "T > 0"),
        (np.zeros((2, 8, 8, 3), np.uint8), "a.mp4", 0, "fps"),
        (np.zeros((2, 8, 8, 3), np.uint8), "a.avi", 5, "mp4"),
        (np.zeros((2, 8, 8, 3), np.uint8), "file/a.mp4", 5, "cannot write the video .*file"),
        (np.zeros((2, 8, 8, 3), np.uint8), "folder.mp4", 5, "cannot write the video .*folder"),
        (np.zeros((2, 8, 8, 3), np.uint8), "x" * 248 + ".mp4", 5, "cannot write the video .*x.mp4"),
        (np.zeros((9, 640, 640, 3), np.uint8), "x" * 248 + ".mp4", 5, "cannot write the video .*x.mp4"),
    ],
)
def test_video_refuses_what_it_cannot_write(tmp_path, frames, name, fps, message):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        write_video(frames, tmp_path / name, fps)
    assert "\n" not in str(caught.value)


def test_grid_places_episodes_and_holds_their_last_frame():
    episodes = [np.full((length, 4, 6, 3), 10 * i, np.uint8) for i, length in enumerate((2, 5, 3), start=1)]
    for i, episode in enumerate(episodes, start=1):
        episode[-1] = 10 * i + 1
    grid = video_grid(episodes, columns=2, gap=1)
    assert grid.shape == (5, 4 + 1 + 4, 6 + 1 + 6, 3) and grid.dtype == np.uint8
    assert (grid[0, :4, :6] == 10).all() and (grid[0, :4, 7:] == 20).all() and (grid[0, 5:, :6] == 30).all()
    assert (grid[4, :4, :6] == 11).all() and (grid[4, :4, 7:] == 21).all() and (grid[4, 5:, :6] == 31).all()
    assert (grid[:, 5:, 7:] == 255).all() and (grid[:, 4] == 255).all() and (grid[:, :, 6] == 255).all()


def test_grid_borders_tell_the_outcome_from_the_moment_an_episode_ends():
    episodes = [np.full((length, 4, 6, 3), 7, np.uint8) for length in (2, 4)]
    grid = video_grid(episodes, columns=2, success=[True, False], gap=1, border=2)
    assert grid.shape == (4, 4 + 4, (6 + 4) * 2 + 1, 3)
    left, right = grid[:, :, :10], grid[:, :, 11:]
    for tile, end, color in ((left, 1, SUCCESS_COLOR), (right, 3, FAILURE_COLOR)):
        assert (tile[:, 2:-2, 2:-2] == 7).all()
        outside = np.ones((8, 10), bool)
        outside[2:-2, 2:-2] = False
        assert (tile[:end, outside] == 255).all()
        assert (tile[end:, outside] == color).all()


def test_captions_stand_below_their_episode_and_the_outcome_once_it_is_over():
    episodes = [np.full((length, 20, 120, 3), 7, np.uint8) for length in (2, 4)]
    long = "push the puck to the green dot and then wait there for a while"
    captions = [("short", "failure"), (long, "success")]
    grid = video_grid(episodes, columns=2, success=[False, True], gap=1, border=2, captions=captions)
    lines = caption_lines(long, 124)
    assert len(lines) > 2 and " ".join(lines) == long
    assert grid.shape == (4, 24 + (len(lines) + 1) * 15, 2 * 124 + 1, 3)
    left, right = grid[:, 24:, :124], grid[:, 24:, 125:]
    assert (left[0] == written(["short"], *left.shape[1:3])).all() and (left[0] < 128).any()
    assert (left[1:] == written(["short", "failure"], *left.shape[1:3])).all()
    assert (right[:3] == written(lines, *right.shape[1:3])).all()
    assert (right[3] == written([*lines, "success"], *right.shape[1:3])).all()
    assert (right[3] != right[2]).any() and (grid[:, :24] == video_grid(episodes, 2, [False, True], 1, 2)).all()
    with pytest.raises(UserError, match="2 episodes but 1 captions"):
        video_grid(episodes, columns=2, captions=captions[:1])


def test_grid_refuses_mixed_sizes_and_missing_outcomes():
    episodes = [np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 5, 4, 3), np.uint8)]
    with pytest.raises(UserError, match="one size"):
        video_grid(episodes, columns=2)
    with pytest.raises(UserError, match="one size"):
        video_grid([], columns=2)
    with pytest.raises(UserError, match="1 episodes but 2 outcomes"):
        video_grid(episodes[:1], columns=2, success=[True, False])


def test_strip_shows_first_and_last_evenly():
    frames = _gradient(11, 4, 6)
    strip = frame_strip(torch.from_numpy(frames), count=3, gap=2)
    assert strip.shape == (4, 3 * 6 + 2 * 2, 3) and strip.dtype == np.uint8
    for i, expected in enumerate((0, 5, 10)):
        assert (strip[:, 8 * i : 8 * i + 6] == frames[expected]).all()
    assert (strip[:, 6:8] == 255).all()
    assert frame_strip(frames[:1], count=4, gap=0).shape == (4, 24, 3)
    with pytest.raises(UserError, match="at least 2"):
        frame_strip(frames, count=1)


def test_strip_says_what_its_episode_is_and_how_it_went():
    frames = _gradient(11, 40, 60)
    strip = frame_strip(frames, count=6, caption=("put the red cube on the blue plate", "success"))
    bare = frame_strip(frames, count=6)
    assert (strip[:40] == bare).all() and strip.shape[1:] == bare.shape[1:]
    text = "put the red cube on the blue plate · success"
    assert (strip[40:] == written([text], *strip[40:].shape[:2])).all() and (strip[40:] < 128).any()
    wide = frame_strip(_gradient(11, 256, 256), count=6, caption=(text, ""))
    assert wide.shape[0] - 256 > strip.shape[0] - 40, "larger where a page will shrink it"


def test_gif_repeats_its_frames_and_holds_the_last(tmp_path):
    frames = np.zeros((5, 20, 30, 3), np.uint8)
    for i in range(5):
        frames[i, :, 6 * i : 6 * i + 6] = (250, 10, 40 * i)
    write_gif(torch.from_numpy(frames), tmp_path / "new" / "film.gif", fps=10, hold=3)
    with Image.open(tmp_path / "new" / "film.gif") as film:
        assert film.n_frames == 5 and film.info["loop"] == 0
        durations = []
        for i in range(5):
            film.seek(i)
            durations.append(film.info["duration"])
            assert np.abs(np.asarray(film.convert("RGB")).astype(int) - frames[i]).max() <= 8
    assert durations == [100] * 4 + [3000]
    with pytest.raises(UserError, match=r"ends in \.gif"):
        write_gif(frames, tmp_path / "film.png", fps=10)
    with pytest.raises(UserError, match="fps is 0"):
        write_gif(frames, tmp_path / "film.gif", fps=0)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*file"):
        write_gif(frames, tmp_path / "file" / "film.gif", fps=10)
