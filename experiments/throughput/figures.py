"""The pictures of `benchmark_throughput.py`: a table as bars, and how the time per step grows."""

from __future__ import annotations

from matplotlib.figure import Figure

COLORS = {"sb3": "#D55E00", "torchrl": "#E69F00", "ours": "#0072B2", "floor": "#999999"}


def draw_table(rows: list[dict]) -> Figure:
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    speeds = [row["env_steps_per_second"] for row in rows]
    bars = axes.barh([row["row"] for row in rows], speeds, color=[COLORS[row["loop"]] for row in rows])
    axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=3, fontsize=8)
    axes.set(xscale="log", xlabel="environment steps per second (median)")
    where = rows[0]["machine"] if rows[0]["device"] == "cuda" else f"{rows[0]['threads']} threads"
    axes.set_title(f"{rows[0]['model']} on {rows[0]['env']}, {rows[0]['num_envs']} environments, {where}")
    axes.margins(x=0.15, y=0.01)
    axes.invert_yaxis()
    return figure


def draw_scaling(rows: list[dict]) -> Figure:
    curves = dict.fromkeys(row["curve"] for row in rows)
    figure = Figure(figsize=(4 * len(curves), 3.5), layout="constrained")
    labels = {"envs": "environments", "model size": "model FLOPs per env step", "processes": "collecting processes"}
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        points = [row for row in rows if row["curve"] == curve]
        x, y = ([row[key] for row in points] for key in ("x", "seconds_per_env_step"))
        axes.loglog(x, [1e3 * seconds for seconds in y], "o-", color=COLORS["ours"])
        axes.set(xlabel=labels[curve], ylabel="ms per env step", title=growth(points[0]))
    return figure


def growth(row: dict) -> str:
    """The fit of a row's curve, in words."""
    if "slope" not in row:
        return "a single point"
    error = "" if row["slope_stderr"] is None else f" ± {row['slope_stderr']:.2f}"
    return f"grows with the power {row['slope']:.2f}{error}"
