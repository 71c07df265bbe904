"""Progress on a terminal as a bar; anywhere else (a log of Slurm, of Docker, of a sweep) as a line a minute."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 60.0
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
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self.as_lines:
            return super().display(msg, pos)
        if msg is None and self.format_dict["elapsed"] - self.line_at >= LINE_EVERY_S:  # `set_postfix` asks at any time
            self._print_line()
        return True

    def _print_line(self) -> None:
        self.line_at = self.format_dict["elapsed"]
        print(str(self).strip(), file=self.fp, flush=True)

    def close(self) -> None:
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
