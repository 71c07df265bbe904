"""The learning curve of one run, drawn from its metrics alone, while it runs or afterwards."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path

from research.runs.folder import RunFolder
from research.runs.tracking import read_metrics

# seconds, label, the longest run in seconds that is drawn in it
_TIME_UNITS = ((1.0, "s", 180.0), (60.0, "min", 7200.0), (3600.0, "h", math.inf))


def plot_learning_curve(folder: str | PathLike[str], path: str | PathLike[str] | None = None) -> Path | None:
    """Draw a run's success rate, or its return where the environment reports no success, against env steps.

    Rollouts as a line (raw in the background, running mean in front), evaluations as points with their 95 % interval,
    wall time along the top.

    Args:
        folder: the run folder, whose metrics are read.
        path: image to write (png, svg or pdf), default the run folder's learning curve.
    Returns:
        The image's path, or None where the run has nothing to draw yet.
    Raises:
        UserError: as `read_metrics`.
    """
    # Imported here: training needs neither until its end. Figure without pyplot touches no display and no global state.
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    rows = read_metrics(folder)

    def curve(*names: str) -> np.ndarray:
        """The rows that have the first of these metrics, as columns: env steps, then each metric. [1 + names, rows]."""
        found = [r for r in rows if math.isfinite(r.get(names[0], math.nan))]
        columns = [[r["global_step"] for r in found], *([r.get(name, math.nan) for r in found] for name in names)]
        return np.array(columns, dtype=float)

    success = any(math.isfinite(r.get(f"{when}/success_rate", math.nan)) for r in rows for when in ("rollout", "eval"))
    metric = "success_rate" if success else "return"
    rollouts = curve(f"rollout/{metric}")
    evaluations = curve(f"eval/{metric}", "eval/success_low", "eval/success_high")
    if not rollouts.size and not evaluations.size:
        return None

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    blue, vermilion = "#0072B2", "#D55E00"  # Okabe and Ito's colours, told apart by colour-blind readers too
    if rollouts.size:
        steps, values = rollouts
        half = len(values) // 40  # centred: a trailing mean would lag behind and look worse than the policy is
        mean = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
        axes.plot(steps, values, color=blue, alpha=0.25, linewidth=1, marker=".", markersize=3)
        axes.plot(steps, mean, color=blue, linewidth=2, label="training rollouts (line: running mean)")
    if evaluations.size:
        steps, values, low, high = evaluations
        error = np.nan_to_num(np.clip([values - low, high - values], 0, None)) if success else None
        axes.errorbar(
            steps, values, error, color=vermilion, marker="o", markersize=6, linewidth=1.5, capsize=3, zorder=3,
            label="evaluation (95 % interval)" if success else "evaluation",
        )  # fmt: skip
    axes.set_xlabel("environment steps")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if success:
        axes.set_ylabel("success rate")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(-0.02, 1.02)
    else:
        axes.set_ylabel("return (reward per episode)")
    axes.margins(x=0.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)

    time_axis = axes.twiny()
    steps, seconds = curve("time/elapsed_s")
    unit, name = next((u, n) for u, n, most in _TIME_UNITS if seconds[-1] <= most)
    ticks = [t for t in MaxNLocator(6).tick_values(0, seconds[-1] / unit) if seconds[0] <= t * unit <= seconds[-1]]
    time_axis.set_xlim(axes.get_xlim())
    time_axis.set_xticks(np.interp([t * unit for t in ticks], seconds, steps), [f"{t:g}" for t in ticks])
    time_axis.set_xlabel(f"wall time ({name})")
    time_axis.spines[["top", "right"]].set_visible(False)

    path = Path(path) if path else RunFolder(folder).learning_curve
    figure.savefig(path, dpi=150)
    return path
