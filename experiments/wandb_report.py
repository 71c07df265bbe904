"""Save a W&B report that compares the runs of a project or of a sweep: ranking, curves, scope x rate, episodes.

    pip install -e .[study,workspace]
    python experiments/wandb_report.py entity/project[/sweep] [--title="What to freeze"] [--by=algorithm.name]

Ranking, intervals, tables and heat map are those of `compare_runs.py --wandb` when the report is made; its other panels
go on showing the runs as they are. W&B has no heat map of runs: it is a picture, in a run of its own beside them.
`compare_runs.py` has more ways to compare, and its report needs no account to be read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import packages  # noqa: F401

from wandb_panels import curves, project_of, reports, save, scope_by_rate

from research.errors import UserError, one_line
from research.study.comparison import Comparison, compare
from research.study.figures import draw_heatmap
from research.study.report import escaped, in_markdown, markdown_table, title_of
from research.study.run_sources import COMPARING, read_wandb
from research.study.tables import arm_table, cell_table, describe, pair_table, ranking

HEATMAP = "comparison/heatmap"


def upload_heatmap(comparison: Comparison, entity: str, project: str, title: str) -> str:
    """Put the heat map of scope x rate on W&B, as the picture of a run that trains nothing; returns that run's id.

    Raises:
        UserError: W&B does not take it.
    """
    import wandb

    place = {"entity": entity, "project": project, "name": title, "job_type": COMPARING, "mode": "online"}
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "heatmap.png"
        draw_heatmap(comparison).savefig(picture, dpi=150)
        try:
            with wandb.init(**place, dir=folder, settings=wandb.Settings(console="off")) as run:
                run.log({HEATMAP: wandb.Image(str(picture))})
        except Exception as error:  # not all that the client raises is a wandb.Error
            raise UserError(f"W&B did not take the heat map: {one_line(error)}") from None
    return run.id


def report(
    comparison: Comparison, entity: str, project: str, sweep: str = "", title: str = "", heatmap: str | None = None
):
    """The report, not saved yet.

    Args:
        comparison: of the runs.
        entity, project, sweep: where they are; without a sweep all runs of the project are shown.
        title: of the report.
        heatmap: id of the run whose picture is the heat map, if there is one.
    """
    wr = reports()
    of_sweep = f"Sweep = '{sweep}'" if sweep else f"JobType != '{COMPARING}'"

    def grid(*panels: Any, runs: str = of_sweep) -> wr.PanelGrid:
        return wr.PanelGrid(runsets=[wr.Runset(entity=entity, project=project, filters=runs)], panels=list(panels))

    def table(content) -> list[wr.MarkdownBlock]:
        return [wr.MarkdownBlock(text="\n".join(markdown_table(content)))] if content else []

    def listed(lines) -> wr.MarkdownBlock:
        return wr.MarkdownBlock(text="\n".join(f"- {in_markdown(each)}" for each in lines))

    measure = comparison.measure
    blocks = [
        wr.MarkdownBlock(text="\n\n".join(escaped(fact) for fact in describe(comparison))),
        wr.H2(text="Ranking"),
        listed(ranking(comparison)),
        *table(arm_table(comparison)),
        *([listed(comparison.notes)] if comparison.notes else []),
        wr.H2(text="Learning curves"),
        grid(*curves(measure)),
    ]
    if comparison.chooses_rates:
        blocks += [wr.H2(text=f"{comparison.heading} x learning rate"), *table(cell_table(comparison))]
        if heatmap:
            picture = wr.MediaBrowser(media_keys=[HEATMAP], num_columns=1, layout=wr.Layout(w=24, h=12))
            blocks += [grid(picture, runs=f"ID = '{heatmap}'")]
        blocks += [grid(*scope_by_rate(measure))]
    if pairs := pair_table(comparison):
        blocks += [wr.H2(text=f"Pairs of {comparison.noun}s"), *table(pairs)]
    blocks += [
        wr.H2(text="Episodes"),
        grid(wr.WeavePanelSummaryTable(table_name="eval/episodes"), wr.MediaBrowser(media_keys=["eval/video"])),
    ]
    return wr.Report(entity=entity, project=project, title=title, blocks=blocks, width="fluid")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="entity/project, or entity/project/sweep")
    parser.add_argument("--title", help="title of the report; default: what was compared")
    parser.add_argument("--by", nargs="+", default=[], help="dotted options whose values are compared")
    options = parser.parse_args(argv)
    try:
        entity, project, sweep = project_of(options.runs, sweeps=True)
        reports()  # before the runs are read, which takes a while
        comparison = compare(read_wandb(options.runs), by=options.by)
        title = options.title or title_of(comparison)
        heatmap = upload_heatmap(comparison, entity, project, title) if comparison.chooses_rates else None
        url = save(report(comparison, entity, project, sweep, title, heatmap), "report")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(ranking(comparison)))
    print(url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
