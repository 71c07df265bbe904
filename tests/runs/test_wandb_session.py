"""How a run talks to W&B: the mode, the fall back, and what is said while it is waited for."""

import os
import socket
import subprocess
import sys
import time

import pytest
import wandb
from wandb_worlds import inspect, start_tracker
from worlds import ROOT

from research.errors import UserError
from research.runs import wandb_session
from research.runs.folder import RunFolder
from research.runs.wandb_session import resolve_wandb_mode, set_up_wandb

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_wandb_account")]


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


def test_a_session_follows_the_environment_unless_a_run_is_open(monkeypatch, tmp_path):
    assert set_up_wandb().base_url != "http://127.0.0.1:9"
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert set_up_wandb().base_url == "http://127.0.0.1:9"
    with start_tracker(RunFolder.create(tmp_path, "exp"), "offline") as tracker:
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:10")
        assert set_up_wandb().base_url == "http://127.0.0.1:9"
        assert wandb.run is tracker.run
    assert set_up_wandb().base_url == "http://127.0.0.1:10"


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


def test_online_without_a_network_becomes_offline(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    folder = RunFolder.create(tmp_path, "exp").path
    mode, reason = resolve_wandb_mode(True)
    assert mode == "online"
    with start_tracker(folder, mode, reason=reason) as tracker:
        assert tracker.mode == "offline"
        tracker.log({"train/entropy": 0.625}, step=1)
    out, err = capfd.readouterr()
    assert out.startswith("W&B: offline (online failed: ") and out.count("\n") == 1
    assert err == ""
    assert '"train/entropy":0.625' in inspect(folder)


def test_what_is_waited_for_is_on_the_screen(tmp_path, capsys, monkeypatch):
    """A server that vanished in mid-run: silence would look like a hang."""

    class Slow:
        def finish(self, exit_code):
            time.sleep(0.3)

    monkeypatch.setattr(wandb_session, "_QUIET_S", 0.05)
    tracker = start_tracker(tmp_path)
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
            "from research.runs.tracking import Tracker; from research.runs.wandb_session import resolve_wandb_mode;"
            "mode, why = resolve_wandb_mode(True);"
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
