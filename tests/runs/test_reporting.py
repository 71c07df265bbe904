"""What a run says to the person who started it, and what it leaves in its summary."""

import json

import imageio.v3 as iio
import numpy as np
import pytest

from research.runs.folder import RunFolder
from research.runs.reporting import last_checkpoint, postfix, summarise
from research.runs.tracking import Tracker
from research.runs.video import frame_strip
from research.training.evaluation import Episode, Evaluation

FRAMES = [np.stack([np.full((16, 24, 3), 20 * i, np.uint8) for i in range(11)])]


def evaluation(successes, frames=()):
    episodes = [Episode(i, None, success, 10.0 * i, 5) for i, success in enumerate(successes)]
    return Evaluation(episodes, list(frames))


@pytest.fixture
def tracker(tmp_path):
    folder = RunFolder.create(tmp_path, "exp")
    with Tracker(folder, {}, {}, project="p", group="g", mode="disabled") as tracker:
        yield tracker


@pytest.mark.parametrize(
    ("metrics", "result", "expected"),
    [
        ({}, None, {}),
        ({"rollout/return": 1.234, "train/entropy": 5.0}, None, {"return": "1.23"}),
        ({"rollout/return": 1.234, "rollout/success_rate": 0.5}, None, {"success": "0.50"}),
        ({"rollout/success_rate": 0.5}, evaluation([True, False, False, False]), {"success": "0.50", "eval": "0.25"}),
        ({"rollout/return": 7.0}, evaluation([None, None]), {"return": "7.00", "eval": "5.00"}),
    ],
)
def test_the_progress_bar_shows_success_or_else_the_return(metrics, result, expected):
    assert postfix(metrics, result) == expected


def test_a_run_that_ends_early_names_its_last_checkpoint(tmp_path):
    folder = RunFolder.create(tmp_path, "exp")
    assert last_checkpoint(folder) == last_checkpoint(folder.path) == "no checkpoint was written yet"
    for step in (64, 128):
        folder.checkpoint(step).mkdir()
        (folder.checkpoint(step) / "manifest.json").touch()
    assert last_checkpoint(folder) == f"the last checkpoint is {folder}/checkpoints/step_000000128"


def test_the_end_says_and_records_what_was_achieved(tracker, capsys):
    tracker.log({"rollout/success_rate": 0.5}, 64)
    images = []
    tracker.log_image = lambda *arguments: images.append(arguments)
    tracker.sync_command = "wandb sync here"
    result = evaluation([False, True], [np.full_like(FRAMES[0], 90), *FRAMES])
    summarise(tracker, tracker.folder, 4096, {"eval/return": 2.0, "eval/success_rate": 0.25}, result, {"exit_code": 0})
    out = capsys.readouterr().out.splitlines()
    assert out[-3:] == [
        f"after 4,096 env steps: {result.summary()}",
        f"curve, video, checkpoints, metrics: {tracker.folder}/",
        "upload to W&B with: wandb sync here",
    ]
    summary = json.loads(tracker.folder.summary.read_text())
    before = {"before/return": 2.0, "before/success_rate": 0.25}
    assert summary == {"global_step": 4096, "exit_code": 0, **before, "eval/global_step": 4096, **result.metrics()}
    assert images == [("learning_curve", tracker.folder.learning_curve, 4096)]
    assert tracker.folder.learning_curve.exists()
    strip = iio.imread(tracker.folder.strip)
    assert strip.shape[1] == 6 * (24 + 2) - 2  # six frames, from first to last, of the episode that succeeded
    assert (strip[0, 0] == 0).all() and (strip[0, -1] == 200).all()
    assert (strip[16:] == frame_strip(FRAMES[0], 6, caption=result.captions[1])[16:]).all() and len(strip) > 16


def test_an_evaluation_of_before_the_end_is_said_to_be_one(tracker, capsys):
    result = evaluation([False, True])
    summarise(tracker, tracker.folder, 4096, None, result, {"exit_code": 130}, evaluated_at=2048)
    line = f"ended after 4,096 env steps; the last evaluation was after 2,048 env steps: {result.summary()}"
    assert line in capsys.readouterr().out.splitlines()
    summary = json.loads(tracker.folder.summary.read_text())
    assert (summary["global_step"], summary["eval/global_step"]) == (4096, 2048)


def test_a_run_without_evaluations_or_rollouts_ends_all_the_same(tracker, capsys):
    summarise(tracker, tracker.folder, 0, None, None, {"exit_code": 130})
    assert json.loads(tracker.folder.summary.read_text()) == {"global_step": 0, "exit_code": 130}
    assert not tracker.folder.learning_curve.exists() and not tracker.folder.strip.exists()
    assert capsys.readouterr().out == f"curve, video, checkpoints, metrics: {tracker.folder}/\n"
