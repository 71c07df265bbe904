"""Save a W&B workspace that compares this project's runs: curves by group, freeze scope x learning rate, videos.

    pip install -e .[workspace]
    python experiments/wandb_workspace.py entity/project [--name="VLA-RL: what to freeze"]
    python experiments/wandb_workspace.py entity/project --measure=return       # an environment without success

A group is environment + algorithm + freeze scope, so the lines are means over the seeds and rates of a scope; filter by
a learning rate to see one cell. The axes use the config keys `scope` and `learning_rate`: W&B's panels and filters
cannot address keys with dots in their names, which all other options have.
"""

from __future__ import annotations

import argparse
import sys

import packages  # noqa: F401

from research.schema import UserError, one_line
from research.study.run_table import MEASURES

NAME = "VLA-RL: what to freeze, at which rate"


def workspace(entity: str, project: str, name: str, measure: str = "success"):
    """The workspace, not saved yet; `measure` is what its first section compares, "success" or "return"."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError as error:
        raise UserError(f"wandb-workspaces is not installed ({error}); run: pip install -e .[workspace]") from None

    def line(title: str, *metrics: str, **options) -> wr.LinePlot:
        return wr.LinePlot(title=title, x="global_step", y=list(metrics), title_x="env steps", **options)

    def by_group(title: str, metric: str, **options) -> wr.LinePlot:
        return line(
            title, metric, groupby="Group", groupby_aggfunc="mean", groupby_rangefunc="stderr",
            legend_template="${run:group}", **options,
        )  # fmt: skip

    scope, rate = wr.Config("scope"), wr.Config("learning_rate")
    metric, _, extent = MEASURES[measure]
    bounds = {} if extent is None else {"range_y": extent}
    final = wr.SummaryMetric(f"eval/{metric}")
    Column = wr.ParallelCoordinatesPlotColumn
    by_task = []
    if measure == "success":
        by_task = [wr.LinePlot(title="Success by task", x="global_step", metric_regex=f"eval/{metric}/.*")]
    sections = [
        ws.Section(
            name=measure.capitalize(),
            panels=[
                by_group(f"Evaluation {measure}, mean and standard error", f"eval/{metric}", **bounds),
                by_group(f"Training {measure}", f"rollout/{metric}", smoothing_factor=0.6,
                         smoothing_type="exponential", **bounds),
                *by_task,
                wr.ScatterPlot(title=f"{measure.capitalize()} by learning rate", x=rate, y=final, log_x=True, **bounds),
                wr.ParallelCoordinatesPlot(
                    title=f"Scope, rate, {measure}",
                    columns=[Column(metric=scope), Column(metric=rate, log=True), Column(metric=final)],
                ),
                wr.ParameterImportancePlot(with_respect_to=f"eval/{metric}"),
                wr.BarPlot(
                    title=f"Final {measure}", metrics=[f"eval/{metric}"], groupby="Group",
                    groupby_aggfunc="mean", groupby_rangefunc="stderr",
                ),
            ],
        ),
        ws.Section(
            name="Is the update healthy?",
            panels=[
                by_group("KL divergence per update", "train/approx_kl"),
                by_group("Clipped samples", "train/clip_fraction"),
                by_group("Entropy", "train/entropy"),
                by_group("Explained variance", "train/explained_variance", range_y=(-1.0, 1.0)),
                wr.LinePlot(title="Gradient norm per part", x="global_step", metric_regex="train/grad_norm/.*"),
                wr.LinePlot(title="Learning rate per part", x="global_step", metric_regex="train/learning_rate/.*"),
            ],
        ),
        ws.Section(
            name="Did frozen weights stay frozen?",
            panels=[wr.LinePlot(title="Drift per part (frozen: 0)", x="global_step", metric_regex="audit/drift/.*")],
        ),
        ws.Section(
            name="What does it look like?",
            panels=[wr.MediaBrowser(media_keys=["eval/video"]), wr.MediaBrowser(media_keys=["learning_curve"])],
        ),
        ws.Section(
            name="Speed",
            is_open=False,
            panels=[by_group("Env steps per second", "time/env_steps_per_second")],
        ),
    ]  # fmt: skip
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="global_step", max_runs=100),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.expr.Metric("Group")] if hasattr(ws, "expr") else [expr.Metric("Group")],
            pinned_columns=[f"summary:eval/{metric}", "config:scope.value", "config:learning_rate.value"],
        ),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", help="entity/project")
    parser.add_argument("--name", default=NAME, help="name of the workspace")
    parser.add_argument("--measure", choices=MEASURES, default="success", help="what to compare, default success")
    options = parser.parse_args(argv)
    try:
        entity, _, project = options.project.partition("/")
        if not (entity and project) or "/" in project:
            raise UserError(f"{options.project!r} is not of the form entity/project")
        saved = workspace(entity, project, options.name, options.measure)
        import wandb

        try:
            saved.save()
        except (wandb.Error, ValueError) as error:
            raise UserError(f"W&B did not take the workspace: {one_line(error)}") from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(saved.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
