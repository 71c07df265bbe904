"""Metrics as TensorBoard's event files."""

from __future__ import annotations

import math
import sys

import pytest

from research.errors import UserError
from research.runs.folder import RunFolder
from research.runs.tracking import Tracker


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path, "exp")


def track(folder, rows, **options) -> None:
    with Tracker(folder, {}, {}, project="p", group="g", mode="disabled", tensorboard=True, **options) as tracker:
        for step, row in rows:
            tracker.log(row, step)


def shown(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads back: name -> (step, value)."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(folder.tensorboard)).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_reads_every_number_of_the_metrics_at_its_env_step(folder):
    pytest.importorskip("tensorboard")
    track(folder, [(64, {"eval/return": 2.0, "train/loss": math.nan}), (128, {"eval/return": 4.5})])
    read = shown(folder)
    assert read["eval/return"] == [(64, 2.0), (128, 4.5)]
    assert [step for step, _ in read["time/elapsed_s"]] == [64, 128] and set(read) == {"eval/return", "time/elapsed_s"}


def test_a_resumed_run_hides_what_came_after_its_checkpoint(folder):
    pytest.importorskip("tensorboard")
    track(folder, [(64, {"eval/return": 1.0}), (128, {"eval/return": 2.0}), (192, {"eval/return": 3.0})])
    track(folder, [(192, {"eval/return": 30.0})], resume_step=128)
    assert shown(folder)["eval/return"] == [(64, 1.0), (128, 2.0), (192, 30.0)]


def test_without_the_package_it_is_refused_in_one_line(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"trainer\.tensorboard: .*pip install -e \.\[tensorboard\]"):
        track(folder, [])
