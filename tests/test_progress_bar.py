"""research/progress_bar.py: lines where there is no terminal, the bar where there is one."""

from __future__ import annotations

import io

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


@pytest.mark.parametrize("file", [io.StringIO(), Terminal()])
def test_none_is_shown_where_it_is_disabled(file):
    for _ in ProgressBar(range(3), file=file, disable=True):
        pass
    assert file.getvalue() == "" and progress_bar.LINE_EVERY_S == 60
