"""research/progress_bar.py: lines where there is no terminal, the bar where there is one."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from research import progress_bar
from research.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def clock(monkeypatch):
    """Time as tqdm sees it; call it to let seconds pass."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_without_a_terminal_it_is_a_line_a_minute(monkeypatch):
    passes, file = clock(monkeypatch), io.StringIO()
    with ProgressBar(total=200, unit="step", desc="training", file=file) as bar:
        for step in range(200):
            passes(1)
            bar.update()
            bar.set_postfix({"success": step})
    lines = file.getvalue().splitlines()
    assert [line.split(" step")[0] for line in lines] == [
        "training 30 %, 60 of 200", "training 60 %, 120 of 200", "training 90 %, 180 of 200",
        "training 100 %, 200 of 200",
    ]  # fmt: skip
    assert "in 01:00, 02:20 left" in lines[0] and "\r" not in file.getvalue()


def test_what_ends_within_a_minute_leaves_no_line(monkeypatch):
    passes, file = clock(monkeypatch), io.StringIO()
    for _ in ProgressBar(range(5), file=file):
        passes(11)
    assert file.getvalue() == ""


def test_what_is_known_besides_is_in_the_line(monkeypatch):
    passes, file = clock(monkeypatch), io.StringIO()
    with ProgressBar(total=2, file=file) as bar:
        bar.set_postfix({"success": "0.50"})
        passes(61)
        bar.update()
    assert "success=0.50" in file.getvalue().splitlines()[0]


def test_a_terminal_has_the_bar(monkeypatch):
    passes, file = clock(monkeypatch), Terminal()
    for _ in ProgressBar(range(3), file=file):
        passes(1)
    assert file.getvalue().count("\r") >= 3 and "3/3" in file.getvalue()


def test_before_the_first_update_it_shows_what_it_follows_and_the_time_left_by_that(monkeypatch):
    """Half of all after 70 s: 70 s are left. The first update takes the place of what was followed."""
    monkeypatch.setattr(progress_bar, "LOOK_EVERY_S", 0.001)
    passes, file, looked = clock(monkeypatch), io.StringIO(), threading.Semaphore(0)

    def count() -> int:
        looked.release()
        return 100

    with ProgressBar(total=200, unit="step", desc="training", file=file) as bar:
        passes(70)
        bar.follow(count)
        for _ in range(3):
            looked.acquire(timeout=10)
        assert file.getvalue() == "training 50 %, 100 of 200 step in 01:10, 01:10 left\n"
        bar.update(120)
        assert bar.n == 120 and bar._follower is None
        bar.update(10)
    assert bar.n == 130


def test_what_is_followed_is_let_go_where_no_update_comes():
    before = threading.active_count()
    with ProgressBar(total=2, file=io.StringIO()) as bar:
        bar.follow(lambda: 1)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with ProgressBar(total=2, file=io.StringIO(), disable=True) as bar:
        bar.follow(lambda: 1)
        assert threading.active_count() == before


@pytest.mark.parametrize("file", [io.StringIO(), Terminal()])
def test_none_is_shown_where_it_is_disabled(file):
    for _ in ProgressBar(range(3), file=file, disable=True):
        pass
    assert file.getvalue() == "" and progress_bar.LINE_EVERY_S == 60


def test_a_line_beside_it_leaves_nothing_where_there_is_no_terminal(capsys):
    with ProgressBar(total=2):
        ProgressBar.write("trial 0 is done", file=sys.stdout)
    assert capsys.readouterr() == ("trial 0 is done\n", "")
