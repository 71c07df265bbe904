"""How many threads a run computes with: the cores that are really free, and no more.

OpenMP's threads spin while they wait for one another. Where something else needs one of the cores, all of them wait for
the one that does not get it: on two cores with one busy process beside it, the main job ran at 1,400 env steps/s on two
threads and at 3,280 on one (4,650 and 3,370 alone).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_LOOK_S = 0.3


def choose_threads(asked: int | None) -> tuple[int, str]:
    """The number of threads, and why, in a few words.

    Args:
        asked: `trainer.threads`; None takes OMP_NUM_THREADS where it is set, else the cores that are free right now.
    """
    if asked is not None:
        return asked, "trainer.threads"
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"])), "OMP_NUM_THREADS"
    cores, idle = available_cores(), idle_cores(_LOOK_S)
    if idle is None:
        return cores, f"all of {cores} cores"
    free = max(1, min(cores, round(idle)))
    return free, f"all of {cores} cores" if free == cores else f"{idle:.1f} of {cores} cores are free"


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its affinity, and its container's quota rounded down."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup version 2 here
        pass
    return max(1, cores)


def idle_cores(seconds: float, stat: Path = Path("/proc/stat")) -> float | None:
    """Cores' worth of idle time in the next few moments, over the whole machine; None where that cannot be told."""
    try:
        before = _ticks(stat)
        time.sleep(seconds)
        after = _ticks(stat)
    except (OSError, ValueError, IndexError):
        return None
    total = sum(after) - sum(before)
    idle = after[3] + after[4] - before[3] - before[4]  # idle, and waiting for a disk
    return (os.cpu_count() or 1) * idle / total if total > 0 else None


def _ticks(stat: Path) -> list[int]:
    """Clock ticks of all cores together since the machine started, by what they were spent on."""
    return [int(number) for number in stat.read_text().splitlines()[0].split()[1:9]]
