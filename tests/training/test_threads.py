"""The number of threads is what was asked for, or what is free."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from research.training import threads
from research.training.threads import available_cores, choose_threads, idle_cores


def test_what_is_asked_for_wins_and_then_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(5) == (5, "trainer.threads")
    assert choose_threads(None) == (3, "OMP_NUM_THREADS")


@pytest.mark.parametrize(
    ("cores", "idle", "expected"),
    [(2, 1.9, 2), (2, 1.1, 1), (2, 0.1, 1), (8, 5.4, 5), (4, 60.0, 4), (2, None, 2)],
)
def test_otherwise_it_is_the_cores_that_are_free(monkeypatch, cores, idle, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "available_cores", lambda: cores)
    monkeypatch.setattr(threads, "idle_cores", lambda seconds: idle)
    number, why = choose_threads(None)
    assert number == expected and f"of {cores} cores" in why


@pytest.mark.parametrize(
    ("content", "most"), [("max 100000", 10**6), ("150000 100000", 1), ("50000 100000", 1), ("", 10**6)]
)
def test_a_containers_quota_counts(tmp_path, content, most):
    (tmp_path / "cpu.max").write_text(content)
    own = len(os.sched_getaffinity(0))
    assert available_cores(tmp_path) == min(own, most)
    assert available_cores(tmp_path / "nowhere") == own


def test_idle_time_is_a_difference(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu 100 0 100 1000 0 0 0 0 0 0\n")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(time, "sleep", lambda _: stat.write_text("cpu 150 0 150 1250 50 0 0 0 0 0\n"))
    assert idle_cores(1.0, stat) == pytest.approx(4 * 300 / 400)
    assert idle_cores(1.0, tmp_path / "nowhere") is None


@pytest.mark.slow
def test_a_busy_process_is_seen():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(1)
        assert idle_cores(0.5) < 0.5
    finally:
        for process in busy:
            process.kill()
            process.wait()
