"""The first signal asks, a Ctrl-C after it insists, and what handled signals before does so again afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from research.training import interruption
from research.training.interruption import SIGNALS, Interruption


@pytest.fixture
def not_ignored(number):
    """Whoever started the tests may ignore it, as nohup does with SIGHUP."""
    before = signal.signal(number, signal.SIG_DFL)
    yield
    signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request(number, capsys, not_ignored, monkeypatch):
    monkeypatch.setattr(interruption, "SAME_S", 0.0)
    before, wakeup = signal.getsignal(number), signal.set_wakeup_fd(-1)
    with Interruption() as stop:
        assert stop.code == 0
        os.kill(os.getpid(), number)
        assert stop.code == 128 + number
        assert "Ctrl-C to stop at once" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat themselves
        assert stop.code == 128 + number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before and signal.set_wakeup_fd(-1) == wakeup == -1
    assert "signals" not in [thread.name for thread in threading.enumerate()]


def test_a_ctrl_c_that_a_launcher_hands_on_is_the_same_ctrl_c(monkeypatch):
    monkeypatch.setattr(interruption, "SAME_S", 60.0)
    with Interruption() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.code == 130


def test_a_loop_that_is_late_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(interruption, "GRACE_S", 0.05)
    called = []
    with Interruption(late=lambda: called.append(time.monotonic())):
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not called and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(called) == 1


def test_a_loop_that_is_in_time_is_left_alone(monkeypatch):
    monkeypatch.setattr(interruption, "GRACE_S", 30)
    called, start = [], time.monotonic()
    with Interruption(late=lambda: called.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
    assert not called and time.monotonic() - start < 10


def test_a_terminal_that_nohup_closed_goes_on_being_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.code == 0
    finally:
        signal.signal(signal.SIGHUP, before)
