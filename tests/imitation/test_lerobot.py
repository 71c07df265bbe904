"""research/imitation/lerobot*.py, on data sets that these tests write: values, times of frames, and what is refused."""

from __future__ import annotations

import sys

import lerobot_worlds as worlds
import numpy as np
import pyarrow as pa
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from envs.gym_spaces import read_actions
from research.errors import UserError
from research.imitation import lerobot_tables
from research.imitation.lerobot import read_lerobot, scale_actions
from research.schema import Demonstration, decode_text

WRITERS = {"v2.1": worlds.write_v21, "v3.0": worlds.write_v30}


@pytest.fixture(autouse=True)
def _read_anew():
    lerobot_tables.read_table.cache_clear()


@pytest.fixture(params=WRITERS)
def folder(request, tmp_path):
    return WRITERS[request.param](tmp_path / "data set")


def is_grey(picture: np.ndarray, expected: int) -> bool:
    """A flat picture, up to what compression does to it; its upper half has no red."""
    below = np.abs(picture[-4:].astype(int) - expected).max() <= 4
    return bool(below and picture[:4, :, 0].max() < expected - 10 and picture.dtype == np.uint8)


def test_every_number_and_every_frame_is_that_of_its_time(folder):
    found = read_lerobot(folder)
    assert [one.number for one in found] == [0, 1, 2] and [len(one.actions) for one in found] == list(worlds.LENGTHS)
    assert [one.task for one in found] == ["open the drawer", "close it", "open the drawer"]
    for e, one in enumerate(found):
        steps = range(worlds.LENGTHS[e])
        assert one.actions.tolist() == [worlds.action(e, step) for step in steps]
        assert one.observations["proprio"].tolist() == [worlds.state(e, step) for step in steps]
        assert decode_text(torch.from_numpy(one.observations["language"].copy())) == [one.task] * len(steps)
        for step in steps:
            assert is_grey(one.observations["rgb"][step], worlds.grey(e, step)), (e, step)
            expected = 255 - worlds.picture(e, step)  # a PNG loses nothing
            assert (one.observations["rgb_wrist"][step] == expected).all(), (e, step)
        assert one.rewards.tolist() == [0.0] * (len(steps) - 1) + [1.0] and one.success is None


def test_looks_are_as_many_steps_apart_as_asked_for(folder):
    one = read_lerobot(folder, every=2)[1]
    assert one.every == 2 and len(one.actions) == 4 and one.observations["language"].shape == (2, 64)
    assert one.observations["proprio"].tolist() == [worlds.state(1, 0), worlds.state(1, 2)]
    assert is_grey(one.observations["rgb"][1], worlds.grey(1, 2)) and len(one.observations["rgb"]) == 2


def test_pictures_are_scaled_and_keys_chosen(folder):
    keys = {worlds.WRIST: "rgb", "observation.state": "proprio"}
    one = read_lerobot(folder, keys=keys, image_size=16, instruction_length=20)[0]
    assert set(one.observations) == {"rgb", "proprio", "language"}
    assert one.observations["rgb"].shape == (5, 16, 16, 3) and one.observations["language"].shape == (5, 20)
    expected = 255 - worlds.picture(0, 3)[::2, ::2]
    assert (np.abs(one.observations["rgb"][3].astype(int) - expected)[[0, -1]] <= 1).all()


def test_frames_are_found_by_their_timestamps(tmp_path):
    """Not by their number: an episode whose rows skip two of the camera's frames."""
    times = [[0.0, 0.1, 0.4], [0.0] * 1, [0.0] * 1]
    folder = worlds.write_v21(tmp_path, lengths=(3, 1, 1), timestamp=times)
    video = folder / "videos" / "chunk-000" / worlds.FRONT / "episode_000000.mp4"
    worlds.write_video(video, [worlds.picture(0, step) for step in range(6)])
    found = read_lerobot(folder)[0].observations["rgb"]
    assert [is_grey(found[i], worlds.grey(0, step)) for i, step in enumerate((0, 1, 4))] == [True] * 3


def test_rewards_and_success_are_the_data_sets_where_it_has_them(tmp_path):
    rewards = [[0.5] * 5, [0.0] * 4, [1.0] * 6]
    success = [[False] * 4 + [True], [False] * 4, [True] * 6]
    folder = worlds.write_v21(tmp_path, **{"next.reward": rewards, "next.success": success})
    found = read_lerobot(folder)
    assert [one.success for one in found] == [True, False, True] and found[0].rewards.tolist() == [0.5] * 5
    lerobot_tables.read_table.cache_clear()
    found = read_lerobot(worlds.write_v21(tmp_path / "unpaid", **{"next.success": success}))
    assert [one.rewards.sum() for one in found] == [1, 0, 1]


def test_actions_are_brought_to_the_unit_interval():
    actions = np.stack([np.linspace(-2, 6, 101), np.full(101, 3.0)], axis=1).astype(np.float32)
    parts = [
        Demonstration(i, "", {}, part, np.zeros(len(part), np.float32), None, 1)
        for i, part in enumerate(np.split(actions, [30]))
    ]
    whole, facts = scale_actions(parts, "min_max")
    scaled = np.concatenate([one.actions for one in whole])
    assert np.allclose(scaled[:, 0], np.linspace(-1, 1, 101), atol=1e-6) and (scaled[:, 1] == 0).all()
    assert facts == {"action_stats": "min_max", "action_low": [-2.0, 3.0], "action_high": [6.0, 3.0]}
    whole, facts = scale_actions(parts, "quantiles")
    scaled = np.concatenate([one.actions for one in whole])[:, 0]
    assert (
        scaled.min() == -1 and scaled.max() == 1 and scaled[1] == pytest.approx(-1) and scaled[99] == pytest.approx(1)
    )
    assert scaled[50] == pytest.approx(0, abs=1e-6) and facts["action_low"][0] == pytest.approx(-1.92)
    same, facts = scale_actions(parts, "none")
    assert (same[1].actions == parts[1].actions).all() and facts == {"action_stats": "none"}


def demonstration(actions) -> Demonstration:
    return Demonstration(0, "", {}, np.array(actions, np.float32), np.zeros(len(actions), np.float32), None, 1)


def test_actions_of_an_environments_units_are_what_a_policy_would_write(capsys):
    arm = read_actions(Box(np.array([-0.05, 0.0], np.float32), np.array([0.05, 10.0], np.float32)), "arm")
    ((one,), facts) = scale_actions([demonstration([[0.05, 5.0], [-0.025, 10.0]])], "environment", arm)
    np.testing.assert_allclose(one.actions, [[1.0, 0.0], [-0.5, 1.0]], atol=1e-6)
    assert facts == {"action_stats": "environment"} and not capsys.readouterr().out
    ((one,), _) = scale_actions([demonstration([[0.1, 5.0], [0, 5.0], [0, 0]])], "environment", arm)
    assert one.actions[0].tolist() == [1.0, 0.0]
    assert "33.3% of the actions lie beyond the bounds of the environment, up to 2 times" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"66\.7% of the actions .* up to 20 times .* other units; .*action_stats to none"
    ):
        scale_actions([demonstration([[1.0, 5.0], [-1.0, 5.0], [0, 5.0]])], "environment", arm)


def test_actions_that_choose_are_counted_from_the_first_choice():
    steer = read_actions(Discrete(5, start=-2), "steer")
    ((one,), _) = scale_actions([demonstration([[-2], [2]])], "environment", steer)
    assert one.actions.tolist() == [[0], [4]]
    with pytest.raises(UserError, match=r"actions are 2 to 5, counted from .* it has 5 choices"):
        scale_actions([demonstration([[0], [3]])], "environment", steer)


def test_without_an_environment_actions_stay_as_they_are():
    ((one,), facts) = scale_actions([demonstration([[7.0]])], "environment")
    assert one.actions.tolist() == [[7.0]] and facts == {"action_stats": "none"}


def test_an_instruction_that_changes_within_an_episode_is_that_of_each_frame(tmp_path):
    numbers = [[0, 0, 1, 1, 1], [1] * 4, [0] * 6]
    found = read_lerobot(worlds.write_v21(tmp_path, task_index=numbers), every=2)
    texts = [decode_text(torch.from_numpy(one.observations["language"])) for one in found]
    assert texts[0] == ["open the drawer", "close it", "close it"] and set(texts[1]) == {"close it"}
    assert [one.task for one in found] == ["open the drawer", "close it", "open the drawer"]


def remove(path: str):
    return lambda folder: next(folder.glob(path)).unlink()


def spoil(path: str):
    return lambda folder: next(folder.glob(path)).write_bytes(b"no such thing")


def tell(version: str, **changes):
    return lambda folder: worlds.write_info(folder, version, **changes)


def state_of(shape: list[int]) -> dict:
    return {"features": worlds.features(**{"observation.state": {"dtype": "float32", "shape": shape}})}


BAD = {
    "no data set": ("v2.1", remove("meta/info.json"), r"data set is no LeRobot data set: .*info.json cannot be read"),
    "not JSON": ("v2.1", spoil("meta/info.json"), r"info.json is not JSON"),
    "another version": ("v2.1", tell("v2.0"), r"codebase_version is 'v2.0'; v2.1 and v3.0 can be read: convert it"),
    "no fps": ("v2.1", tell("v2.1", fps=0), r"fps should be frames per second, got 0"),
    "no shape": ("v2.1", tell("v2.1", features={"action": {}}), r"every feature needs a dtype and a shape"),
    "no actions": ("v2.1", tell("v2.1", features={}), r"has no feature 'action'"),
    "missing table": ("v2.1", remove("data/*/*01.parquet"), r"episode_000001.parquet does not exist; the data set"),
    "damaged table": ("v3.0", spoil("data/*/*.parquet"), r"file-000.parquet cannot be read"),
    "missing video": ("v3.0", remove("videos/*/*/*001.mp4"), r"file-001.mp4 does not exist; the data set is not"),
    "damaged video": ("v2.1", spoil("videos/*/*/*.mp4"), r"\.mp4 is no video that can be read"),
    "missing tasks": ("v2.1", remove("meta/tasks.jsonl"), r"tasks.jsonl cannot be read; the data set is not complete"),
    "odd line": (
        "v2.1",
        spoil("meta/episodes.jsonl"),
        r"episodes.jsonl, line 1: expected a JSON object with episode_i",
    ),
    "missing task table": ("v3.0", remove("meta/tasks.parquet"), r"tasks.parquet does not exist"),
    "another shape": ("v2.1", tell("v2.1", **state_of([4])), r"'observation.state' has the shape \[3\]; .*is \[4\]"),
    "no episodes": ("v3.0", remove("meta/episodes/*/*.parquet"), r"data set has no episodes"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_data_set_is_one_line(case, tmp_path):
    version, break_it, message = BAD[case]
    folder = WRITERS[version](tmp_path / "data set")
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_lerobot(folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("demonstrations: ")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"observation.stat": "proprio"}, r"lerobot.keys: .* has no feature 'observation.stat'; did you mean 'obs"),
        ({"observation.state": "rgb"}, r"lerobot.keys.observation.state: a float32 of shape \[3\] can be proprio"),
        ({worlds.WRIST: "depth"}, r"lerobot.keys.observation.images.wrist: a image .* can be rgb or rgb_<camera>"),
        ({worlds.WRIST: "rgb", worlds.FRONT: "rgb"}, r"lerobot.keys: two features have the same observation key"),
    ],
)
def test_keys_that_do_not_fit_are_refused(folder, keys, message):
    with pytest.raises(UserError, match=message):
        read_lerobot(folder, keys=keys)


def test_a_video_that_is_shorter_than_its_episode_is_refused(tmp_path):
    folder = worlds.write_v21(tmp_path)
    video = folder / "videos" / "chunk-001" / worlds.FRONT / "episode_000002.mp4"
    worlds.write_video(video, [worlds.picture(2, step) for step in range(4)])
    with pytest.raises(UserError, match="episode_000002.mp4 ends after 4 frames; its episodes have more"):
        read_lerobot(folder)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"task_index": [5] * 5}, "episode 0 is of task 5, which has no name"),
        ({"episode_index": [9] * 5}, "has no rows of episode 0"),
        ({"action": [[1.0]] * 4 + [[1.0, 2.0]]}, "'action' is of uneven length, or holds what is no number"),
        ({"action": [[1.0, float("nan")]] * 5}, "'action' holds what is no finite number"),
        ({worlds.WRIST: [{"bytes": None, "path": "a.png"}] * 5}, "not in the file, only their names"),
        ({worlds.WRIST: [{"bytes": b"no picture", "path": "a.png"}] * 5}, "a picture cannot be decoded"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(tmp_path, columns, message):
    folder = worlds.write_v21(tmp_path)
    table = worlds.rows(0, 5) | columns
    worlds.write_table(folder / "data" / "chunk-000" / "episode_000000.parquet", table)
    with pytest.raises(UserError, match=message):
        read_lerobot(folder)


def test_a_column_that_is_missing_is_named(tmp_path):
    folder = worlds.write_v21(tmp_path)
    path = folder / "data" / "chunk-000" / "episode_000000.parquet"
    pa.parquet.write_table(pa.parquet.read_table(path).drop_columns(["action"]), path)
    with pytest.raises(UserError, match=r"episode_000000.parquet has no column 'action'"):
        read_lerobot(folder)


def test_without_pyarrow_it_is_said_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need pyarrow; pip install -e \.\[lerobot\]"):
        read_lerobot(folder)
