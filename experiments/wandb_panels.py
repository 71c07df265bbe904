"""The panels with which a W&B workspace and a W&B report compare runs, and the project that they are of."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from research.errors import UserError, one_line
from research.runs.wandb_session import set_up_wandb
from research.study.run_table import MEASURES


def reports() -> ModuleType:
    """The module of wandb-workspaces that panels are made with.

    Raises:
        UserError: it is not installed.
    """
    set_up_wandb()  # mute: scripts say the address themselves
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise UserError(f"wandb-workspaces is not installed ({error}); run: pip install -e .[workspace]") from None
    return wr


def project_of(text: str, sweeps: bool = False) -> tuple[str, str, str]:
    """Entity, project and sweep of "entity/project", or, where `sweeps` are allowed, "entity/project/sweep"."""
    parts = text.split("/")
    if len(parts) not in ((2, 3) if sweeps else (2,)) or not all(parts):
        raise UserError(f"{text!r} is not of the form entity/project{'[/sweep]' if sweeps else ''}")
    return parts[0], parts[1], parts[2] if len(parts) == 3 else ""


def save(made: Any, what: str) -> str:
    """Save a workspace or a report; returns its address.

    Raises:
        UserError: W&B refuses it, or cannot be reached.
    """
    try:
        made.save()
    except Exception as error:  # not all that the client raises is a wandb.Error
        raise UserError(f"W&B did not take the {what}: {one_line(error)}") from None
    return made.url


def line(title: str, *metrics: str, **options) -> Any:
    """A curve per run over env steps."""
    return reports().LinePlot(title=title, x="global_step", y=list(metrics), title_x="env steps", **options)


def by_group(title: str, metric: str, **options) -> Any:
    """A curve per W&B group over env steps: its mean, and the standard error around it."""
    return line(
        title, metric, groupby="Group", groupby_aggfunc="mean", groupby_rangefunc="stderr",
        legend_template="${run:group}", **options,
    )  # fmt: skip


def curves(measure: str) -> list[Any]:
    """How the measure went, in evaluations and in training."""
    metric, bounds = MEASURES[measure].metric, _bounds(measure)
    by_task = []
    if measure == "success":
        wr = reports()
        by_task = [wr.LinePlot(title="Success by task", x="global_step", metric_regex=f"eval/{metric}/.*")]
    return [
        by_group(f"Evaluation {measure}, mean and standard error", f"eval/{metric}", **bounds),
        by_group(
            f"Training {measure}", f"rollout/{metric}", smoothing_factor=0.6, smoothing_type="exponential", **bounds
        ),
        *by_task,
    ]


def scope_by_rate(measure: str) -> list[Any]:
    """What became of each freeze scope at each learning rate."""
    wr = reports()
    metric = MEASURES[measure].metric
    scope, rate, final = wr.Config("scope"), wr.Config("learning_rate"), wr.SummaryMetric(f"eval/{metric}")
    Column = wr.ParallelCoordinatesPlotColumn
    return [
        wr.ScatterPlot(
            title=f"{measure.capitalize()} by learning rate", x=rate, y=final, log_x=True, **_bounds(measure)
        ),
        wr.ParallelCoordinatesPlot(
            title=f"Scope, rate, {measure}",
            columns=[Column(metric=scope), Column(metric=rate, log=True), Column(metric=final)],
        ),
        wr.ParameterImportancePlot(with_respect_to=f"eval/{metric}"),
        wr.BarPlot(
            title=f"Final {measure}", metrics=[f"eval/{metric}"], groupby="Group",
            groupby_aggfunc="mean", groupby_rangefunc="stderr",
        ),
    ]  # fmt: skip


def _bounds(measure: str) -> dict[str, Any]:
    extent = MEASURES[measure].extent
    return {} if extent is None else {"range_y": extent}
