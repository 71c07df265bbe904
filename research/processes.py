"""What every worker process keeps to: it leaves signals to the main process, and does not outlive it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait

# What a terminal or a scheduler sends to all processes of a run: the main process decides what it means.
RUN_SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, n))


def serve_the_main_process(patience: float = 0.0, at_the_end: Callable[[], None] | None = None) -> None:
    """Call it first in a worker process: ignore `RUN_SIGNALS`, and end when the main process is gone.

    A worker that ignores SIGTERM would hold up multiprocessing's own exit: whoever starts it ends it.

    Args:
        patience: seconds that it has to leave by itself, once the main process is gone.
        at_the_end: called then, before it is ended.
    """
    for number in RUN_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, args=(patience, at_the_end), daemon=True).start()


def _leave_with_parent(patience: float, at_the_end: Callable[[], None] | None) -> None:
    wait([multiprocessing.parent_process().sentinel])
    time.sleep(patience)
    if at_the_end is not None:
        at_the_end()
    os._exit(1)
