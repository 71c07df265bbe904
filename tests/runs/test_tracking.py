"""A run's metrics: the JSONL mirror, and what W&B gets of them."""

import importlib
import json
import math
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from wandb_worlds import FLAT, NESTED, inspect, start_tracker
from worlds import ROOT

from research.errors import UserError
from research.runs import tracking
from research.runs.folder import RunFolder, append_rows
from research.runs.tracking import Tracker, read_metrics
from research.runs.video import write_video

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_wandb_account")]

# ---- names


def test_the_table_has_every_name_that_is_logged():
    """Names as they stand in the code of training; W&B's own films and tables among them."""
    files = [*(ROOT / "research" / "training").glob("*.py"), ROOT / "experiments" / "training_run.py"]
    found = {
        name for file in files for name in re.findall(r'"((?:train|rollout|eval|time)/[a-z_]+)"', file.read_text())
    }
    assert len(found) > 25 and found <= set(tracking.metric_names(here=False))
    assert {"eval/video", "best/return"} <= set(tracking.metric_names(here=False)) - set(tracking.metric_names())


# ---- tracker


def test_disabled_run_mirrors_metrics_and_starts_no_wandb(tmp_path, capfd):
    with start_tracker(tmp_path, reason="trainer.use_wandb is false") as tracker:
        tracker.log({"train/entropy": 1.5}, step=0)
        tracker.log({"train/entropy": torch.tensor(1.25), "train/approx_kl": math.nan, "bad": math.inf}, step=64)
        tracker.log_video("eval/video", "missing.mp4", step=64)
        assert tracker.run is None and tracker.sync_command is None
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is not JSON")) for line in lines]
    assert strict[1].pop("time/elapsed_s") >= strict[0]["time/elapsed_s"] >= 0
    assert strict[1] == {"global_step": 64, "train/entropy": 1.25, "train/approx_kl": None, "bad": None}
    assert math.isnan(read_metrics(tmp_path)[1]["train/approx_kl"])
    assert json.loads((tmp_path / "config.json").read_text()) == NESTED
    assert not (tmp_path / "wandb").exists()
    assert capfd.readouterr() == ("W&B: disabled (trainer.use_wandb is false)\n", "")


def test_offline_run_is_silent_and_readable(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(tracking, "git_commit", lambda: "c0ffee1")
    folder = RunFolder.create(tmp_path / "runs", "exp").path
    write_video(np.zeros((3, 16, 16, 3), np.uint8), folder / "videos" / "eval.mp4", fps=5)
    iio.imwrite(folder / "curve.png", np.zeros((8, 8, 3), np.uint8))
    with start_tracker(folder, "offline", reason="no API key is configured", tags=["vision"]) as tracker:
        tracker.log({"eval/success_rate": 0.40625, "bad": math.nan}, step=4096)
        tracker.log_video("eval/video", folder / "videos" / "eval.mp4", step=4096)
        tracker.log_image("eval/curve", folder / "curve.png", step=4096)
        tracker.summary({"final/success_rate": 0.9375, "final/return": math.nan})
    out, err = capfd.readouterr()
    assert err == ""
    assert out == (
        "W&B: offline (no API key is configured); upload later with: "
        f"wandb sync {folder}/wandb/offline-run-*\n"
    )  # fmt: skip
    assert json.loads((folder / "summary.json").read_text()) == {"final/success_rate": 0.9375, "final/return": None}

    records = [json.loads(line) for line in inspect(folder).splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert history[0]["eval/success_rate"] == 0.40625 and history[0]["global_step"] == 4096
    assert history[1]["eval/video.path"].endswith(".mp4") and history[2]["eval/curve.path"].endswith(".png")
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert {k: v for k, v in run["config"]["update"].items() if k != "_wandb"} == FLAT
    assert run["run_id"] == folder.name.removeprefix("exp-")
    assert run["display_name"] == folder.name
    assert (run["run_group"], run["job_type"], run["tags"]) == ("env-ppo-none", "train", ["vision", "c0ffee1"])
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert any(m.get("glob_name") == "*" and m["step_metric"] == "global_step" for m in metrics)
    assert json.loads(inspect(folder, "--summary"))["summary"]["final/success_rate"] == 0.9375


def test_metrics_survive_kill_and_nothing_prompts(tmp_path):
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from research.runs.folder import RunFolder, append_rows
from research.runs.tracking import Tracker
from research.runs.wandb_session import resolve_wandb_mode
mode, reason = resolve_wandb_mode(True)
folder = RunFolder.create("runs", "exp")
tracker = Tracker(folder, {{}}, {{}}, project="test", group="g", mode=mode, reason=reason)
for step in range(20):
    tracker.log({{"train/entropy": 0.5 * step}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.startswith("W&B: offline (no API key") and done.stdout.count("\n") == 1
    assert done.stderr == ""
    (folder,) = (tmp_path / "runs").iterdir()
    assert [row["train/entropy"] for row in read_metrics(folder)] == [0.5 * step for step in range(20)]


@pytest.mark.parametrize(("mode", "url"), [("online", "https://wandb.ai/me/p/runs/1"), ("offline", None)])
def test_a_run_has_a_page_only_while_it_is_online(tmp_path, mode, url):
    tracker = start_tracker(tmp_path)
    assert tracker.url is None  # disabled
    tracker.run, tracker.mode = SimpleNamespace(url="https://wandb.ai/me/p/runs/1"), mode
    assert tracker.url == url
    tracker.run = None  # as `finish` leaves it
    assert tracker.url is None
    tracker.finish()


@pytest.mark.parametrize(("sweep", "project"), [("sweep", "of-the-sweep"), (None, "test")])
def test_run_takes_the_id_from_the_environment_and_a_sweep_its_project(tmp_path, monkeypatch, sweep, project):
    monkeypatch.setenv("WANDB_RUN_ID", "abc-123")
    if sweep:
        monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
        monkeypatch.setenv("WANDB_PROJECT", project)
    folder = RunFolder.create(tmp_path, "exp").path
    with start_tracker(folder, "offline") as tracker:
        assert tracker.run.settings.sweep_id == sweep
    summary = json.loads(inspect(folder, "--summary"))
    assert (summary["run_id"], summary["project"]) == ("abc-123", project)


@pytest.mark.parametrize(("step", "kept"), [(128, [0, 64, 128]), (100, [0, 64]), (-1, []), (10**9, [0, 64, 128, 192])])
def test_resume_drops_the_rows_after_its_checkpoint(tmp_path, monkeypatch, step, kept):
    clock = iter([0, 10, 20, 30, 40, 1000, 1005])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    with start_tracker(tmp_path) as tracker:
        for at in (0, 64, 128, 192):
            tracker.log({"train/entropy": at}, at)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 256, "train/ent')  # the process was killed in the middle of a row
    with start_tracker(tmp_path, resume_step=step) as tracker:
        tracker.log({"train/entropy": -1}, 500)
    rows = read_metrics(tmp_path)
    assert [row["global_step"] for row in rows] == [*kept, 500]
    assert rows[-1]["time/elapsed_s"] == 10 * len(kept) + 5
    assert not list(tmp_path.glob("*.partial"))


def test_resumed_run_keeps_its_wandb_id_and_summary(tmp_path):
    folder = RunFolder.create(tmp_path, "exp").path
    with start_tracker(folder) as tracker:
        tracker.summary({"before": 0.5})
    with start_tracker(folder, "offline", resume_id="abcdefgh", resume_step=0) as tracker:
        tracker.summary({"after": 0.9})
    assert json.loads(inspect(folder, "--summary"))["run_id"] == "abcdefgh"
    assert json.loads((folder / "summary.json").read_text()) == {"before": 0.5, "after": 0.9}


def test_a_run_left_open_is_not_mixed_with_the_next(tmp_path):
    folders = [RunFolder.create(tmp_path, name).path for name in ("first", "second")]
    start_tracker(folders[0], "offline").log({"left/open": 1}, 0)
    with start_tracker(folders[1], "offline") as tracker:
        tracker.log({"next/one": 2}, 0)
    assert '"next/one":2' in inspect(folders[1]) and "left/open" not in inspect(folders[1])


def test_metrics_of_another_run_are_not_overwritten(tmp_path):
    with start_tracker(tmp_path) as tracker:
        tracker.log({"a": 1}, 0)
    with pytest.raises(UserError, match="resume that run"):
        start_tracker(tmp_path)
    assert len(read_metrics(tmp_path)) == 1


def test_tracker_refuses_a_missing_folder_and_names_wandb_does_not_take(tmp_path):
    with pytest.raises(UserError, match=r"cannot write to the run folder .*nowhere"):
        start_tracker(tmp_path / "nowhere")
    with pytest.raises(UserError, match="project name 'a/b'"):
        Tracker(tmp_path, {}, {}, project="a/b", group="g", mode="offline")


@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (ValueError(), 1), (KeyboardInterrupt(), 130), (SystemExit(3), 3), (SystemExit(), 0)]
)
def test_exit_code_reaches_wandb(tmp_path, error, code):
    class Run:
        def finish(self, exit_code):
            finished.append(exit_code)

    finished = []
    try:
        with start_tracker(tmp_path) as tracker:
            tracker.run = Run()
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    tracker.finish()
    assert finished == [code]


def test_upload_that_does_not_finish_says_how_to_sync(tmp_path, capsys):
    class Run:
        def finish(self, exit_code):
            raise TimeoutError

    with start_tracker(tmp_path) as tracker:
        tracker.run = Run()
    assert f"wandb sync {tmp_path}/wandb/run-*" in capsys.readouterr().out
    assert tracker.sync_command == f"wandb sync {tmp_path}/wandb/run-*"


# ---- on the run's page


def test_the_page_says_whose_run_it_is_and_what_was_printed(tmp_path, monkeypatch):
    top = tmp_path / "clone"
    top.mkdir()
    for words in (["init"], ["commit", "--allow-empty", "-m", "first"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(top), *identity, *words], check=True, capture_output=True)
    monkeypatch.setattr(tracking, "repository", lambda: top)
    folder = RunFolder.create(tmp_path / "runs", "exp").path  # outside of the clone, as is the working directory
    options = {"name": "ppo vision lr=0.001 seed=2", "entity": "a-team", "notes": "why it was made"}
    with start_tracker(folder, "offline", **options) as tracker:
        print("said on the screen")
        settings = tracker.run.settings
    head = subprocess.run(["git", "-C", str(top), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert settings.git_commit == head
    found = json.loads(inspect(folder, "--summary"))
    assert (found["name"], found["entity"], found["notes"]) == tuple(options.values())
    assert "said on the screen" in [line["line"] for line in found["console"]]


def test_wandb_name_names_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_NAME", "by hand")
    folder = RunFolder.create(tmp_path / "runs", "exp").path
    with start_tracker(folder, "offline", name="by default"):
        pass
    assert json.loads(inspect(folder, "--summary"))["name"] == "by hand"


def test_the_best_values_so_far_are_in_wandbs_summary_and_go_on_where_a_run_is_resumed(tmp_path):
    folder = RunFolder.create(tmp_path / "runs", "exp").path
    values = [(0, 0.25, -3.0), (64, 0.75, math.nan), (128, 0.5, -4.0)]
    with start_tracker(folder) as tracker:
        for step, success, reward in values:
            tracker.log({"eval/success_rate": success, "eval/return": reward}, step)
    assert not any("best" in name for row in read_metrics(folder) for name in row)
    with start_tracker(folder, "offline", resume_id="abcdefgh", resume_step=100) as tracker:
        tracker.log({"eval/success_rate": 0.5, "eval/return": -2.0}, 128)
        tracker.log({"train/entropy": 1.0}, 192)
    summary = json.loads(inspect(folder, "--summary"))["summary"]
    assert (summary["best/success_rate"], summary["best/return"]) == (0.75, -2.0)
    assert summary["eval/success_rate"] == 0.5  # a number, for sweeps and panels


def test_episodes_are_a_table_with_their_films_and_a_file_for_comparisons(tmp_path, wandb_server):
    folder = RunFolder.create(tmp_path / "runs", "exp")
    common = {"task": "reach", "instruction": "go there", "episode_return": 1.5, "length": 8, "cut_off": False}
    rows = [{"initial_state": i, "success": i == 1, **common} for i in range(3)]
    append_rows(folder.episodes, [{"global_step": 64, **row} for row in rows])
    with start_tracker(folder, "online") as tracker:
        tracker.log_episodes(rows, [np.zeros((3, 16, 16, 3), np.uint8)] * 2, 64)
        run = tracker.run.id
    (logged,) = [row for row in wandb_server.runs[run].history if "eval/episodes" in row]
    assert logged["global_step"] == 64
    table = json.loads(wandb_server.contents[f"/upload/{run}/{logged['eval/episodes']['path']}"])
    assert table["columns"] == [
        "initial_state", "task", "instruction", "success", "episode_return", "length", "cut_off", "video"
    ]  # fmt: skip
    assert table["data"][1][:7] == [1, "reach", "go there", True, 1.5, 8, False]
    assert [row[7] is not None for row in table["data"]] == [True, True, False]
    assert wandb_server.contents[f"/upload/{run}/episodes.jsonl"] == folder.episodes.read_bytes()


def test_an_alert_and_the_code_of_the_user_reach_the_server(tmp_path, wandb_server, monkeypatch):
    (tmp_path / "their_model.py").write_text("x = 1\n")
    (tmp_path / "private.txt").write_text("not this")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("their_model")
    with start_tracker(RunFolder.create(tmp_path / "runs", "exp"), "online") as tracker:
        tracker.save_code(["their_model", "agents.small_vla", None])
        tracker.alert("stopped: not a number", "action is NaN")
        run = tracker.run.id
    assert wandb_server.runs[run].alerts == [("ERROR", "stopped: not a number", "action is NaN")]
    (code,) = [version for version in wandb_server.versions if version.type == "code"]
    assert set(code.files) == {"their_model.py"} and code.run == run
    assert wandb_server.file_of(code, "their_model.py") == b"x = 1\n"


def test_what_has_no_page_takes_all_that_in_silence(tmp_path, capsys):
    with start_tracker(tmp_path) as tracker:
        capsys.readouterr()
        tracker.alert("a", "b")
        tracker.save_code(["json"])
        tracker.log_episodes([], [], 0)
        tracker.upload_checkpoints("weights.pt")
        tracker.checkpoint_written(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_checkpoints_of_an_offline_run_stay_here(tmp_path, wandb_server, monkeypatch):
    folder = RunFolder.create(tmp_path / "runs", "exp")
    with start_tracker(folder, "offline") as tracker:
        tracker.upload_checkpoints("weights.pt")
        tracker.checkpoint_written(folder.checkpoint(1))
    assert not wandb_server.versions


# ---- reading


def test_read_metrics_tolerates_a_torn_last_line_only(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        read_metrics(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"global_step": 0}\n{"global_step": 1}\n{"glob')
    assert read_metrics(tmp_path) == [{"global_step": 0}, {"global_step": 1}]
    path.write_text('{"global_step": 0}\n{"glob\n{"global_step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_a_newer_evaluation_takes_the_place_of_all_of_an_earlier_one(tmp_path):
    """Success at the end is there only where it is another number than success."""
    folder = RunFolder.create(tmp_path, "exp").path
    with start_tracker(folder) as tracker:
        tracker.summary({"eval/success_rate": 0.5, "eval/success_at_end": 0.25, "before/return": 1.0, "exit_code": 0})
        tracker.summary({"eval/success_rate": 1.0})
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == {"before/return": 1.0, "exit_code": 0, "eval/success_rate": 1.0}
