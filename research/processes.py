"""What every worker process keeps to: it leaves signals to the main process, and does not outlive it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

# What a terminal or a scheduler sends to all processes of a run: the main process decides what it means.
RUN_SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, n))


@contextmanager
def children_hear_nothing() -> Iterator[None]:
    """Processes started within have `RUN_SIGNALS` blocked from their first moment; a Ctrl-C is heard at the end.

    One that is still importing would answer a Ctrl-C of the terminal with a traceback, and one that is being started
    when it comes would be known to nobody.

    Raises:
        KeyboardInterrupt: at the end, where there was a Ctrl-C.
    """
    resource_tracker.ensure_running()  # which otherwise unblocks some of them when it starts
    heard: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number)) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, handler)
    if heard:
        raise KeyboardInterrupt


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
