"""Figures of a comparison: matplotlib for images, plotly for pages, from the same numbers.

`draw_*` return a matplotlib figure, `*_page` a plotly one. Colours are those of Okabe and Ito, which colour-blind
readers tell apart too; an arm has the same one in every figure.
"""

from __future__ import annotations

import textwrap

import numpy as np
import plotly.graph_objects as go
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, PercentFormatter, ScalarFormatter
from plotly.subplots import make_subplots

from research.study.comparison import ArmResult, Comparison
from research.study.equal_budgets import curve, has_crossed_bands
from research.study.run_table import MEASURES
from research.study.statistics import Array, Estimate

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
AXIS_LABELS = {"steps": "environment steps", "seconds": "wall time (s)"}
PLOTLY_TICKS = {"success": ".0%", "return": None}


def _extent(comparison: Comparison) -> tuple[float, float] | None:
    """Where axes of scores end; None where scores have no bounds."""
    return MEASURES[comparison.measure].extent


def _ticks(comparison: Comparison) -> Formatter:
    """Success as percentages, returns as they are."""
    return PercentFormatter(1, decimals=0) if comparison.measure == "success" else ScalarFormatter(useOffset=False)


def _colors(comparison: Comparison) -> dict[str, str]:
    names = sorted(result.arm for result in comparison.arms)
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def _label(comparison: Comparison, result: ArmResult) -> str:
    seeds = "1 seed" if len(result.runs) == 1 else f"{len(result.runs)} seeds"
    rate = f" at {result.learning_rate:g}" if comparison.chooses_rates else ""
    return f"{result.arm}{rate} ({seeds})"


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is, in short lines: between two "$" it would read mathematics."""
    return textwrap.fill(text, 40).replace("$", r"\$")


def _band(estimate: Estimate) -> tuple[Array, Array]:
    """The interval, closed to a line where there is none."""
    low, high = np.broadcast_arrays(estimate.low, estimate.high, np.asarray(estimate.value))[:2]
    return np.where(np.isnan(low), estimate.value, low), np.where(np.isnan(high), estimate.value, high)


# ---- mean score of each arm


def draw_scores(comparison: Comparison) -> Figure:
    """Each arm's mean with its interval, and its seeds as dots; best at the top."""
    arms, colors = comparison.arms, _colors(comparison)
    figure = Figure(figsize=(7.2, 1.4 + 0.5 * len(arms)), layout="constrained")
    axes = figure.add_subplot()
    for y, result in enumerate(reversed(arms)):
        low, high = _band(result.mean)
        axes.plot([low, high], [y, y], color=colors[result.arm], linewidth=2.5)
        axes.plot(result.mean.value, y, "o", color=colors[result.arm], markersize=8, clip_on=False)
        of_seeds = result.scores.mean(1)
        axes.plot(
            of_seeds, np.full(len(of_seeds), y + 0.22), "|", color=colors[result.arm], markersize=8, alpha=0.8,
            clip_on=False,
        )  # fmt: skip
    axes.set_yticks(range(len(arms)), [_plain(_label(comparison, result)) for result in reversed(arms)])
    axes.set_ylim(-0.5, len(arms) - 0.4)
    axes.set_xlim(_extent(comparison))
    axes.set_xlabel(f"{comparison.measure}: mean, 95 % interval, and above it the single seeds")
    axes.xaxis.set_major_formatter(_ticks(comparison))
    _clean(axes, "x")
    return figure


def scores_page(comparison: Comparison) -> go.Figure:
    """As `draw_scores`."""
    colors, figure = _colors(comparison), go.Figure()
    for result in reversed(comparison.arms):
        label, color, value = _label(comparison, result), colors[result.arm], float(result.mean.value)
        low, high = (float(x) for x in _band(result.mean))
        error = {"type": "data", "symmetric": False, "array": [high - value], "arrayminus": [value - low]}
        figure.add_scatter(
            x=result.scores.mean(1),
            y=[label] * len(result.runs),
            mode="markers",
            cliponaxis=False,
            hovertext=[run.run for run in result.runs],
            marker={"color": color, "symbol": "line-ns-open", "size": 14, "opacity": 0.6},
        )
        marker = {"color": color, "size": 12}
        figure.add_scatter(x=[value], y=[label], mode="markers", marker=marker, error_x=error, cliponaxis=False)
    figure.update_layout(**_layout(160 + 45 * len(comparison.arms)), showlegend=False)
    title = f"{comparison.measure}: mean, 95 % interval, single seeds"
    figure.update_xaxes(title=title, tickformat=PLOTLY_TICKS[comparison.measure], range=_extent(comparison))
    figure.update_yaxes(automargin=True)
    return figure


# ---- learning curves


def draw_curves(comparison: Comparison) -> Figure:
    """Evaluation scores against env steps and against wall time, each arm at its own best learning rate."""
    figure, colors = Figure(figsize=(11, 4.4), layout="constrained"), _colors(comparison)
    panels = figure.subplots(1, 2, sharey=True)
    budgets = (comparison.env_steps, comparison.seconds)
    for axes, (axis, label), budget in zip(panels, AXIS_LABELS.items(), budgets, strict=True):
        for result in comparison.arms:
            x, estimate = curve(result.runs, axis)
            name = _plain(_label(comparison, result))
            axes.plot(x, estimate.value, color=colors[result.arm], linewidth=2, label=name, clip_on=False)
            axes.fill_between(x, *_band(estimate), color=colors[result.arm], alpha=0.15, linewidth=0)
        axes.axvline(budget, color="0.5", linewidth=1, linestyle=":")
        cut = ", schedules interrupted" if axis in comparison.interrupted else ""
        axes.set_xlabel(f"{label}{cut}; dotted: what all runs reached")
        _clean(axes, "both")
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].yaxis.set_major_formatter(_ticks(comparison))
    panels[0].set_ylim(_extent(comparison))
    crossed = all(has_crossed_bands(result.runs) for result in comparison.arms)
    panels[0].set_ylabel(f"evaluation {comparison.measure}\n95 % interval{'' if crossed else ' over seeds alone'}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    return figure


def curves_page(comparison: Comparison) -> go.Figure:
    """As `draw_curves`; a click on an arm's name hides it."""
    figure, colors = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04), _colors(comparison)
    for column, (axis, label) in enumerate(AXIS_LABELS.items(), start=1):
        for result in comparison.arms:
            x, estimate = curve(result.runs, axis)
            low, high = _band(estimate)
            color, group = colors[result.arm], {"legendgroup": result.arm}
            figure.add_scatter(
                x=np.concatenate([x, x[::-1]]), y=np.concatenate([low, high[::-1]]), fill="toself", opacity=0.15,
                fillcolor=color, line={"width": 0}, hoverinfo="skip", showlegend=False, **group, row=1, col=column,
            )  # fmt: skip
            mode = "lines+markers" if axis == "steps" else "lines"  # every run has evaluations at times of its own
            figure.add_scatter(
                x=x, y=estimate.value, mode=mode, line={"color": color}, name=_label(comparison, result),
                cliponaxis=False, showlegend=column == 1, **group, row=1, col=column,
            )  # fmt: skip
        figure.update_xaxes(title=label, row=1, col=column)
    figure.update_layout(**_layout(460), legend={"orientation": "h", "y": -0.2})
    figure.update_yaxes(tickformat=PLOTLY_TICKS[comparison.measure], range=_extent(comparison))
    return figure


# ---- arm x learning rate


def _grid(comparison: Comparison) -> tuple[list[str], list[float], Array, list[list[str]]]:
    """Arms, rates, mean scores `[A, R]` (NaN where not tried), and what each cell says."""
    arms = [result.arm for result in comparison.arms]
    chosen = {(result.arm, result.learning_rate) for result in comparison.arms}
    rates = sorted({rate for _, rate in comparison.cells})
    values = np.full((len(arms), len(rates)), np.nan)
    texts = [["" for _ in rates] for _ in arms]
    for (arm, rate), runs in comparison.cells.items():
        i, j = arms.index(arm), rates.index(rate)
        values[i, j] = np.mean([run.mean_at(comparison.equal, comparison.place) for run in runs])
        score = f"{values[i, j]:{'.1%' if comparison.measure == 'success' else f'.{comparison.decimals}f'}}"
        texts[i][j] = f"{score}{' *' if (arm, rate) in chosen else ''}\nn = {len(runs)}"
    return arms, rates, values, texts


def draw_heatmap(comparison: Comparison) -> Figure:
    """Mean score per arm and learning rate, with the number of seeds; * marks the rate that was chosen."""
    arms, rates, values, texts = _grid(comparison)
    names = [_plain(name) for name in arms]
    longest = max((len(line) for name in names for line in name.splitlines()), default=0)
    figure = Figure(
        figsize=(max(2.6, 1.9 + 0.09 * longest) + 1.1 * len(rates), 1.5 + 0.65 * len(arms)), layout="constrained"
    )
    axes = figure.add_subplot()
    lowest, highest = _extent(comparison) or (np.nanmin(values), np.nanmax(values))
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", aspect="auto", vmin=lowest, vmax=highest)
    middle = (lowest + highest) / 2
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            color = "black" if values[i, j] > middle else "white"  # viridis is light at its upper end
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(arms)), names)
    axes.set_xlabel(f"learning rate; *: the {comparison.noun}'s best, as chosen")
    figure.colorbar(image, label=f"mean {comparison.measure}", format=_ticks(comparison))
    return figure


def heatmap_page(comparison: Comparison) -> go.Figure:
    """As `draw_heatmap`."""
    arms, rates, values, texts = _grid(comparison)
    lowest, highest = _extent(comparison) or (None, None)
    figure = go.Figure(
        go.Heatmap(
            z=values, x=[f"{rate:g}" for rate in rates], y=arms, colorscale="Viridis", zmin=lowest, zmax=highest,
            xgap=2, ygap=2,
            text=[[text.replace("\n", "<br>") for text in row] for row in texts], texttemplate="%{text}",
            colorbar={"title": comparison.measure, "tickformat": PLOTLY_TICKS[comparison.measure]}, hoverongaps=False,
        )
    )  # fmt: skip
    figure.update_layout(**_layout(180 + 60 * len(arms)))
    figure.update_xaxes(title=f"learning rate; *: the {comparison.noun}'s best, as chosen", type="category")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def _clean(axes, grid: str) -> None:
    axes.grid(alpha=0.25, axis=grid)
    axes.spines[["top", "right"]].set_visible(False)


def _layout(height: int) -> dict:
    return {"template": "plotly_white", "height": height, "margin": {"l": 60, "r": 20, "t": 40, "b": 60}}
