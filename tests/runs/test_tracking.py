"""W&B modes, and a run's metrics: the JSONL mirror, and what W&B gets of them."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import wandb
from worlds import ROOT

from research.runs import tracking
from research.runs.folder import RunFolder
from research.runs.tracking import Tracker, read_metrics, resolve_wandb_mode
from research.runs.video import write_video
from research.schema import UserError

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
NESTED, FLAT = {"trainer": {"seed": 1}}, {"trainer.seed": 1}


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    """No W&B account, settings or session from outside the test, and none left behind."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_settings"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # `wandb offline` writes its setting into the working directory
    yield
    wandb.teardown()


def start(folder, mode="disabled", **options):
    return Tracker(folder, NESTED, FLAT, project="test", group="env-ppo-none", mode=mode, **options)


def inspect(folder, *flags):
    (run,) = Path(folder, "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, run]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- W&B mode


@pytest.mark.parametrize(
    ("wandb_mode", "use_wandb", "key", "expected", "why"),
    [
        (None, True, None, "offline", "no API key"),
        (None, True, "k" * 40, "online", "an API key is configured"),
        (None, False, "k" * 40, "disabled", "use_wandb is false"),
        (None, False, None, "disabled", "use_wandb is false"),
        ("offline", False, "k" * 40, "offline", "WANDB_MODE=offline"),
        ("disabled", True, "k" * 40, "disabled", "WANDB_MODE=disabled"),
        ("online", False, "k" * 40, "online", "WANDB_MODE=online"),
        ("shared", True, "k" * 40, "shared", "WANDB_MODE=shared"),
        ("online", True, None, "offline", "no API key"),
        ("shared", True, None, "offline", "no API key"),
    ],
)
def test_wandb_mode(monkeypatch, capfd, wandb_mode, use_wandb, key, expected, why):
    for name, value in (("WANDB_MODE", wandb_mode), ("WANDB_API_KEY", key)):
        if value is not None:
            monkeypatch.setenv(name, value)
    mode, reason = resolve_wandb_mode(use_wandb)
    assert mode == expected
    assert why in reason
    assert capfd.readouterr() == ("", "")


def test_wandb_mode_finds_a_key_in_netrc_and_respects_wandb_offline(tmp_path):
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    assert resolve_wandb_mode(True)[0] == "online"
    wandb.teardown()
    subprocess.run([sys.executable, "-m", "wandb", "offline"], check=True, capture_output=True)
    mode, reason = resolve_wandb_mode(True)
    assert mode == "offline"
    assert "wandb offline" in reason


def test_wrong_wandb_mode_and_malformed_key_are_refused(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        resolve_wandb_mode(True)
    for wrong in ("ofline", ""):
        monkeypatch.setenv("WANDB_MODE", wrong)
        with pytest.raises(UserError, match=f"WANDB_MODE is '{wrong}'.*offline"):
            resolve_wandb_mode(False)


# ---- tracker


def test_disabled_run_mirrors_metrics_and_starts_no_wandb(tmp_path, capfd):
    with start(tmp_path, reason="trainer.use_wandb is false") as tracker:
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
    with start(folder, "offline", reason="no API key is configured", tags=["vision"]) as tracker:
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
sys.path.insert(0, {str(REPOSITORY)!r})
from research.runs.folder import RunFolder
from research.runs.tracking import Tracker, resolve_wandb_mode
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
    tracker = start(tmp_path)
    assert tracker.url is None  # disabled
    tracker.run, tracker.mode = SimpleNamespace(url="https://wandb.ai/me/p/runs/1"), mode
    assert tracker.url == url
    tracker.run = None  # as `finish` leaves it
    assert tracker.url is None
    tracker.finish()


def test_online_without_a_network_becomes_offline(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    folder = RunFolder.create(tmp_path, "exp").path
    mode, reason = resolve_wandb_mode(True)
    assert mode == "online"
    with start(folder, mode, reason=reason) as tracker:
        assert tracker.mode == "offline"
        tracker.log({"train/entropy": 0.625}, step=1)
    out, err = capfd.readouterr()
    assert out.startswith("W&B: offline (online failed: ") and out.count("\n") == 1
    assert err == ""
    assert '"train/entropy":0.625' in inspect(folder)


@pytest.mark.parametrize(("sweep", "project"), [("sweep", "of-the-sweep"), (None, "test")])
def test_run_takes_the_id_from_the_environment_and_a_sweep_its_project(tmp_path, monkeypatch, sweep, project):
    monkeypatch.setenv("WANDB_RUN_ID", "abc-123")
    if sweep:
        monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
        monkeypatch.setenv("WANDB_PROJECT", project)
    folder = RunFolder.create(tmp_path, "exp").path
    with start(folder, "offline") as tracker:
        assert tracker.run.settings.sweep_id == sweep
    summary = json.loads(inspect(folder, "--summary"))
    assert (summary["run_id"], summary["project"]) == ("abc-123", project)


@pytest.mark.parametrize(("step", "kept"), [(128, [0, 64, 128]), (100, [0, 64]), (-1, []), (10**9, [0, 64, 128, 192])])
def test_resume_drops_the_rows_after_its_checkpoint(tmp_path, monkeypatch, step, kept):
    clock = iter([0, 10, 20, 30, 40, 1000, 1005])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    with start(tmp_path) as tracker:
        for at in (0, 64, 128, 192):
            tracker.log({"train/entropy": at}, at)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 256, "train/ent')  # the process was killed in the middle of a row
    with start(tmp_path, resume_step=step) as tracker:
        tracker.log({"train/entropy": -1}, 500)
    rows = read_metrics(tmp_path)
    assert [row["global_step"] for row in rows] == [*kept, 500]
    assert rows[-1]["time/elapsed_s"] == 10 * len(kept) + 5
    assert not list(tmp_path.glob("*.partial"))


def test_resumed_run_keeps_its_wandb_id_and_summary(tmp_path):
    folder = RunFolder.create(tmp_path, "exp").path
    with start(folder) as tracker:
        tracker.summary({"before": 0.5})
    with start(folder, "offline", resume_id="abcdefgh", resume_step=0) as tracker:
        tracker.summary({"after": 0.9})
    assert json.loads(inspect(folder, "--summary"))["run_id"] == "abcdefgh"
    assert json.loads((folder / "summary.json").read_text()) == {"before": 0.5, "after": 0.9}


def test_a_run_left_open_is_not_mixed_with_the_next(tmp_path):
    folders = [RunFolder.create(tmp_path, name).path for name in ("first", "second")]
    start(folders[0], "offline").log({"left/open": 1}, 0)
    with start(folders[1], "offline") as tracker:
        tracker.log({"next/one": 2}, 0)
    assert '"next/one":2' in inspect(folders[1]) and "left/open" not in inspect(folders[1])


def test_metrics_of_another_run_are_not_overwritten(tmp_path):
    with start(tmp_path) as tracker:
        tracker.log({"a": 1}, 0)
    with pytest.raises(UserError, match="resume that run"):
        start(tmp_path)
    assert len(read_metrics(tmp_path)) == 1


def test_tracker_refuses_a_missing_folder_and_names_wandb_does_not_take(tmp_path):
    with pytest.raises(UserError, match=r"cannot write to the run folder .*nowhere"):
        start(tmp_path / "nowhere")
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
        with start(tmp_path) as tracker:
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

    with start(tmp_path) as tracker:
        tracker.run = Run()
    assert f"wandb sync {tmp_path}/wandb/run-*" in capsys.readouterr().out
    assert tracker.sync_command == f"wandb sync {tmp_path}/wandb/run-*"


def test_git_commit_is_short_marks_changes_and_is_none_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "tracking.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert tracking.git_commit() is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "tracking.py").write_text("1")
    git("add", "tracking.py")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "v1")
    commit = git("rev-parse", "--short", "HEAD")
    assert tracking.git_commit() == commit
    (tmp_path / "tracking.py").write_text("2")
    assert tracking.git_commit() == f"{commit}-dirty"


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


def test_what_is_waited_for_is_on_the_screen(tmp_path, capsys, monkeypatch):
    """A server that vanished in mid-run: silence would look like a hang."""

    class Slow:
        def finish(self, exit_code):
            time.sleep(0.3)

    monkeypatch.setattr(tracking, "_QUIET_S", 0.05)
    tracker = Tracker(tmp_path, {}, {}, project="p", group="g", mode="disabled")
    tracker.run, tracker.mode = Slow(), "online"
    capsys.readouterr()
    tracker.finish()
    assert capsys.readouterr().out == (
        "W&B: waiting for the upload, at most 60 s; everything is in the run folder as well\n"
    )


def test_a_server_that_never_answers_is_named_while_it_is_waited_for_and_not_for_long(tmp_path):
    """It takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        script = (
            "from research.runs.tracking import Tracker, resolve_wandb_mode; mode, why = resolve_wandb_mode(True);"
            f"t = Tracker({str(tmp_path)!r}, {{}}, {{}}, project='p', group='g', mode=mode, reason=why); t.finish()"
        )
        environment = os.environ | {
            "WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address, "WANDB_INIT_TIMEOUT": "5",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first.startswith(f"W&B: waiting for {address} to answer, at most 5 s")
    assert second.startswith("W&B: offline (online failed:") and "upload later with" in second
    assert time.monotonic() - start < 60
