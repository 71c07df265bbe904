"""Where the time of a row of `benchmark_throughput.py` goes (`--profile`)."""

from __future__ import annotations

import cProfile
import io
import pstats
from collections import defaultdict
from pathlib import Path

import torch

from research.training.utilisation import timed
from throughput.peers import Loop

FUNCTIONS = 25  # that are listed


def profile(loop: Loop, device: torch.device) -> str:
    """Where the time of one more iteration goes: own seconds by library, then by function.

    Built-in functions, torch's kernels among them, count for the library whose Python calls them. The profiler itself
    makes Python look slower than it is, and kernels not.
    """
    text = []
    for part in (loop.collect, loop.update):
        profiler = cProfile.Profile()
        profiler.enable()
        timed(part, device)
        profiler.disable()
        out = io.StringIO()
        stats = pstats.Stats(profiler, stream=out)
        libraries = defaultdict(float)
        for (file, _, _), (_, _, own, _, callers) in stats.stats.items():
            if file == "~":
                for (caller, _, _), (_, _, seconds, _) in callers.items():
                    libraries[f"{library_of(caller)}, built-in"] += seconds
            else:
                libraries[library_of(file)] += own
        text.append(f"{part.__name__}, {sum(libraries.values()):.4f} s in all")
        text += [f"{seconds:10.4f}  {name}" for name, seconds in sorted(libraries.items(), key=lambda item: -item[1])]
        stats.strip_dirs().sort_stats("tottime").print_stats(FUNCTIONS)
        lines = out.getvalue().splitlines()
        header = next(number for number, line in enumerate(lines) if "filename:lineno" in line)
        text += [line.rstrip() for line in lines[header:] if line.strip()]
    return "\n".join(text)


def library_of(file: str) -> str:
    """The library or folder of this repository that a source file belongs to."""
    parts = Path(file).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1]
    ours = set(parts) & {"agents", "envs", "experiments", "research"}
    return min(ours, default="Python")
