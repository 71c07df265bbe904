"""Shared by all tests: one thread, no W&B, and small worlds."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, settings
from wandb_worlds import no_wandb_account, wandb_server  # noqa: F401

# Property-based tests: few examples, the same every time; `pytest --hypothesis-profile=faults` looks for new ones.
_SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
settings.register_profile("short", max_examples=50, deadline=None, derandomize=True, suppress_health_check=_SLOW)
settings.register_profile("faults", max_examples=1000, deadline=None, suppress_health_check=_SLOW, print_blob=True)
settings.load_profile("short")


def pytest_collection_modifyitems(items):
    """Property-based tests can be chosen by `-m properties`."""
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.properties)


@pytest.fixture(autouse=True)
def _one_thread_and_no_account(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what runs choose their number of threads by
    torch.manual_seed(0)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start_process():
    """Starts commands in process groups of their own, of which none outlives the test."""
    groups = []

    def start(*command: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        groups.append(process.pid)
        return process

    yield start
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
