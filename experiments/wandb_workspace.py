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

from wandb_panels import by_group, curves, project_of, reports, save, scope_by_rate

from research.errors import UserError
from research.study.run_table import MEASURES

NAME = "VLA-RL: what to freeze, at which rate"


def workspace(entity: str, project: str, name: str, measure: str = "success"):
    """The workspace, not saved yet; `measure` is what its first section compares, "success" or "return"."""
    wr = reports()
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    metric = MEASURES[measure].metric
    sections = [
        ws.Section(name=measure.capitalize(), panels=[*curves(measure), *scope_by_rate(measure)]),
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
            panels=[
                wr.MediaBrowser(media_keys=["eval/video"]),
                wr.WeavePanelSummaryTable(table_name="eval/episodes"),
                wr.MediaBrowser(media_keys=["learning_curve"]),
            ],
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
        entity, project, _ = project_of(options.project)
        url = save(workspace(entity, project, options.name, options.measure), "workspace")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
