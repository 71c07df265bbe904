"""What tests of tracking share: no account from outside, a server in this process, and a tracker of a tiny run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NESTED, FLAT = {"trainer": {"seed": 1}}, {"trainer.seed": 1}


@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path):
    """No W&B account, settings or session from outside the test, and none left behind."""
    import wandb  # most tests need not wait for it

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_settings"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # `wandb offline` writes its setting into the working directory
    wandb.teardown()  # the session of an earlier test knows neither this account nor this server
    yield
    wandb.teardown()


@pytest.fixture
def wandb_server(no_wandb_account, monkeypatch):
    """A server that this process, and those that it starts, are logged in to; it knew all that it was asked."""
    import wandb
    from standin_wandb_server import StandInServer

    with StandInServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()
        # The server is there; on a busy machine W&B's own process takes its time to start.
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "300")
        yield server
        wandb.teardown()
        assert server.unknown == []


def start_tracker(folder, mode="disabled", **options):
    from research.runs.tracking import Tracker

    options = {"project": "test", "group": "env-ppo-none"} | options
    return Tracker(folder, NESTED, FLAT, mode=mode, **options)


def inspect(folder, *flags) -> str:
    """What W&B's own program reads of an offline run."""
    (run,) = Path(folder, "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, run]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
