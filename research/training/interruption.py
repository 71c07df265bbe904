"""Signals, turned into a request that the training loop honours between two iterations."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

# Ctrl-C; what schedulers send before they kill (SIGTERM; SIGUSR1, where a job asks for one); a terminal that closes.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
GRACE_S = 5.0
SAME_S = 1.0  # launchers hand on the Ctrl-C that the terminal has sent already: one within that time is the same


class Interruption:
    """The first signal asks the loop to stop after this iteration; a Ctrl-C after it stops at once.

    A context manager. `code` is 0, or the exit code of the first signal (130 for Ctrl-C, 143 for SIGTERM).

    Args:
        late: called once, in a thread of its own, where the block has not ended `GRACE_S` seconds after the first
            signal; also while the main thread is busy outside of Python and sees no signal.
    Raises:
        KeyboardInterrupt: at a Ctrl-C after another signal.
    """

    def __init__(self, late: Callable[[], None] | None = None):
        self.code, self._late = 0, late

    def __enter__(self) -> Interruption:
        self.code, self._over = 0, threading.Event()
        # nohup's processes ignore SIGHUP, and go on doing so.
        caught = [s for s in SIGNALS if s != getattr(signal, "SIGHUP", None) or signal.getsignal(s) != signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._on_signal) for s in caught}
        self._woken, self._waking = socket.socketpair()  # Python writes into it, whatever the main thread is doing
        self._waking.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._waking.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        return self

    def _on_signal(self, number: int, frame) -> None:
        if self.code and number == signal.SIGINT and time.monotonic() - self._since > SAME_S:
            raise KeyboardInterrupt
        if not self.code:
            self.code, self._since = 128 + number, time.monotonic()
            print("\nstopping after this iteration; Ctrl-C to stop at once", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while number := self._woken.recv(1):
            if number[0] in self._before:
                if not self._over.wait(GRACE_S) and self._late is not None:
                    self._late()
                return

    def __exit__(self, *_) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._wakeup_before)
        self._waking.close()  # ends the watcher
        self._watcher.join()
        self._woken.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)
