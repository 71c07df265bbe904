"""Progress on a terminal as a bar; anywhere else (a log of Slurm, of Docker, of a sweep) as a line a minute."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 60.0
LOOK_EVERY_S = 1.0
LINE = "{desc} {percentage:.0f} %, {n_fmt} of {total_fmt} {unit} in {elapsed}, {remaining} left{postfix}"


class ProgressBar(tqdm):
    """tqdm's bar with all its arguments. What ends within a minute leaves no line.

    Args:
        arguments, options: of `tqdm.tqdm`; `file` is where it goes, stderr if it is not given.
    """

    def __init__(self, *arguments: Any, **options: Any):
        file = options.get("file") or sys.stderr
        self.as_lines = not (hasattr(file, "isatty") and file.isatty())
        if self.as_lines:
            options |= {"dynamic_ncols": False, "bar_format": LINE}
            options |= {"mininterval": LINE_EVERY_S, "maxinterval": LINE_EVERY_S, "miniters": 1}
        self.line_at = 0.0  # seconds from the start to the last line
        self._followed = threading.Event()  # set: nothing is followed
        self._follower: threading.Thread | None = None
        super().__init__(*arguments, **options)

    def follow(self, count: Callable[[], float]) -> None:
        """Show `count()`, and the time left by it, every second until the first `update`, which takes the place of it.

        A first step may take minutes; so there is an estimate before it ends.
        """
        if self.disable:
            return

        def look() -> None:
            while not self._followed.wait(LOOK_EVERY_S):
                self.n = max(self.initial, count())
                self.refresh()

        self._follower = threading.Thread(target=look, daemon=True)
        self._follower.start()

    def _unfollow(self) -> None:
        self._followed.set()
        if self._follower is not None:
            self._follower.join()
            self._follower, self.n = None, self.initial

    def update(self, n: float = 1) -> bool | None:
        self._unfollow()
        return super().update(n)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self.as_lines:
            return super().display(msg, pos)
        if msg is None and self.format_dict["elapsed"] - self.line_at >= LINE_EVERY_S:  # `set_postfix` asks at any time
            self._print_line()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Make place for a line that is written beside the bar; lines need none, and no carriage return."""
        if not self.as_lines:
            super().clear(nolock)

    def _print_line(self) -> None:
        self.line_at = self.format_dict["elapsed"]
        print(str(self).strip(), file=self.fp, flush=True)

    def close(self) -> None:
        if hasattr(self, "_followed"):  # tqdm closes what failed to open, too
            self._unfollow()
        if not self.as_lines:
            super().close()
        elif not self.disable:
            if self.format_dict["elapsed"] >= LINE_EVERY_S:
                self._print_line()
            self.disable = True
            self._decr_instances(self)

    @classmethod
    def write(cls, text: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        super().write(text, file=file or sys.stderr, end=end, nolock=nolock)
