"""Ctrl-C and SIGTERM, turned into a request that the training loop honours between two iterations."""

from __future__ import annotations

import signal
import sys


class Interruption:
    """The first Ctrl-C or SIGTERM asks the loop to stop after this iteration, a second one stops at once.

    A context manager. `code` is 0, or the exit code of the signal (130 for Ctrl-C, 143 for SIGTERM).

    Raises:
        KeyboardInterrupt: at the second signal.
    """

    def __enter__(self) -> Interruption:
        self.code = 0
        self._before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _on_signal(self, number: int, frame) -> None:
        if self.code:
            raise KeyboardInterrupt
        self.code = 128 + number
        print("\nstopping after this iteration; once more to stop at once", file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
