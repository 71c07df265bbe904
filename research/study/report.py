"""The report of a comparison: `report.md`, and `report.html` with figures, tables and videos in one file."""

from __future__ import annotations

import base64
import html
import math
from pathlib import Path

import numpy as np

from research.schema import UserError
from research.study import figures
from research.study.comparison import Comparison
from research.study.run_table import write_table
from research.study.statistics import Estimate

LARGEST_VIDEO = 4 * 2**20  # bytes; a page holds one per scope

Table = tuple[list[str], list[list[str]]]  # header, rows

METHOD = (
    "Intervals are 95 % and speak of a new seed and, where episodes are paired, of new initial states: seeds and "
    "states are crossed random effects (two-way analysis of variance, Satterthwaite, {scale}). The "
    "interquartile mean (IQM) has a stratified bootstrap standard error. Differences are paired by initial state; two "
    "scopes are separable where the p-value, after Holm's correction for all pairs, is below 0.05. P(better) is how "
    "often a run of the first scope beats one of the second (Newcombe's interval). More seeds: for 80 % power at the "
    "observed difference. `research/study/statistics.py` says what was measured about each."
)
SCALE = {"success": "t on the logit scale", "return": "t"}
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>TITLE</title><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:1240px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;display:block;overflow-x:auto;font-variant-numeric:tabular-nums}
td,th{padding:.3em .7em;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}
code{background:#f2f2f2;padding:0 .2em} video{max-width:100%;border:1px solid #ddd}
figure{display:inline-block;margin:0 1em 1em 0;max-width:520px}
</style></head><body>
BODY
</body></html>
"""


def write_report(comparison: Comparison, output: Path, command: str) -> None:
    """Write the report, its images and `runs.csv`, from which all numbers can be computed again.

    Args:
        comparison: what to report.
        output: the folder to write, made if need be.
        command: what made the comparison, for the report's last line.
    Raises:
        UserError: the folder cannot be written.
    """
    title = "Freeze scopes compared"
    facts, notes, measure = describe(comparison), comparison.notes, comparison.measure
    method = METHOD.format(scale=SCALE[measure])
    sections = [
        ("Each scope at its own best learning rate", measure, scope_table(comparison)),
        ("Pairs of scopes", None, pair_table(comparison)),
        ("Learning curves", "curves", None),
        ("Generalisation", None, split_table(comparison)),
        ("Freeze scope x learning rate", "heatmap", cell_table(comparison)),
    ]
    pages = {measure: figures.scores_page, "curves": figures.curves_page, "heatmap": figures.heatmap_page}
    images = {measure: figures.draw_scores, "curves": figures.draw_curves, "heatmap": figures.draw_heatmap}

    markdown = [f"# {title}", *facts, "## Ranking", *(f"{i}. {line}" for i, line in enumerate(ranking(comparison), 1))]
    markdown += ["", "## Notes", *(f"- {note}" for note in notes)]
    body = [f"<h1>{title}</h1>", *map(paragraph, facts), "<h2>Ranking</h2>", items("ol", ranking(comparison))]
    body += ["<h2>Notes</h2>", items("ul", notes)]
    plotly_js: bool = True  # in the first figure only
    for heading, figure, table in sections:
        if not figure and not table:  # one scope has no pairs, and splits need evaluations of their own
            continue
        markdown += ["", f"## {heading}"]
        body += [f"<h2>{html.escape(heading)}</h2>"]
        if figure:
            markdown += [f"![{heading}]({figure}.png)", ""]
            config = {"responsive": True, "displaylogo": False}
            body += [pages[figure](comparison).to_html(full_html=False, include_plotlyjs=plotly_js, config=config)]
            plotly_js = False
        if table:
            markdown += markdown_table(table)
            body += [html_table(table)]
    markdown += ["", "## Method", method, "", f"Made by `{command}`"]
    body += [*videos(comparison), "<h2>Method</h2>", paragraph(method), paragraph(f"Made by `{command}`")]
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_table(output / "runs.csv", comparison.runs)
        for name, draw in images.items():
            draw(comparison).savefig(output / f"{name}.png", dpi=150)
        (output / "report.md").write_text("\n".join(markdown) + "\n", encoding="utf-8")
        page = PAGE.replace("TITLE", title).replace("BODY", "\n".join(body))
        (output / "report.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: cannot write to {output}: {error.strerror}") from error


# ---- tables and text


def describe(comparison: Comparison) -> list[str]:
    """What was compared: environment, initial states, runs, and the env steps and seconds that all of them reached."""
    first, complete = comparison.runs[0], sum(run.complete for run in comparison.runs)
    config = ", ".join(f"{key} = {value}" for key, value in sorted(first.env_config.items()))
    return [
        f"{first.environment} ({config or 'default settings'}), initial states {first.states}. "
        f"{len(comparison.runs)} runs, {complete} of them complete. {comparison.measure.capitalize()} at "
        f"{comparison.env_steps:,.0f} env steps and at {comparison.seconds:,.0f} s of wall time, the most that all "
        "complete runs reached.",
    ]


def ranking(comparison: Comparison) -> list[str]:
    """One line per scope, best first, that claims no order which the seeds do not show."""
    lines = []
    for result in comparison.scopes:
        best, worst = result.rank
        others = [other.scope for other in comparison.scopes if other is not result]
        alike = [name for name in others if name not in result.separable_from]
        rank = f"rank {best}" if best == worst else f"rank {best} to {worst}"
        tail = f"; not separable from {', '.join(alike)}" if alike else ""
        mean = interval(result.mean, comparison.decimals)
        lines.append(f"{result.scope}: {mean}, {rank} of {len(comparison.scopes)}{tail}")
    return lines


def interval(estimate: Estimate, decimals: int = 3, signed: bool = False) -> str:
    """An estimate as text: "0.919 [0.890, 0.940]"."""
    form = f"{{:{'+' if signed else ''}.{decimals}f}}"
    value, low, high = (form.format(x) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]" if estimate.has_interval else f"{value} (no interval)"


def scope_table(comparison: Comparison) -> Table:
    """Each scope at its own best learning rate, best first."""
    measure, decimals = comparison.measure, comparison.decimals
    equal_time = f"{measure} at equal wall time"
    header = ["scope", "learning rate", "seeds", "before", measure, "IQM", equal_time, "run, s", "rank"]
    rows = [
        [
            result.scope, f"{result.learning_rate:g}", str(len(result.runs)), f"{result.before:.{decimals}f}",
            *(interval(mean, decimals) for mean in (result.mean, result.iqm, result.at_equal_time)),
            f"{np.mean([run.eval_seconds[-1] for run in result.runs]):.0f}",
            "-".join(map(str, dict.fromkeys(result.rank))),
        ]
        for result in comparison.scopes
    ]  # fmt: skip
    return header, rows


def pair_table(comparison: Comparison) -> Table | None:
    """Every two scopes, and whether they can be told apart; None where there is one scope only."""
    header = ["first", "second", "difference", "p (Holm)", "verdict", "P(better)", "more seeds each"]
    rows = []
    for pair in comparison.pairs:
        untested = math.isnan(pair.p_value)
        why = "equal scores" if pair.improvement.has_interval else "one seed"
        verdict = f"{why}: cannot say" if untested else "separable" if pair.separable else "not separable"
        more = "-" if untested or pair.separable else f"{pair.more_seeds:.0f}"
        more = "seeds alone cannot" if math.isinf(pair.more_seeds) else "> 1000" if pair.more_seeds > 1000 else more
        p_value = "-" if untested else "< 0.001" if pair.p_value < 0.001 else f"{pair.p_value:.3f}"
        difference = interval(pair.difference, comparison.decimals, signed=True)
        rows.append([pair.first, pair.second, difference, p_value, verdict, interval(pair.improvement), more])
    return (header, rows) if rows else None


def split_table(comparison: Comparison) -> Table | None:
    """Each scope's mean score in the splits that all of its runs were evaluated in (evaluate_vla.py --split=all)."""
    splits = list(dict.fromkeys(split for result in comparison.scopes for split in result.splits))
    rows = [
        [result.scope, *(interval(result.splits[s], comparison.decimals) if s in result.splits else "" for s in splits)]
        for result in comparison.scopes
        if result.splits
    ]
    return (["scope", *splits], rows) if rows else None


def cell_table(comparison: Comparison) -> Table:
    """Each scope at every learning rate tried, with the mean score of every seed."""
    header = ["scope", "learning rate", "seeds", "chosen by", comparison.measure, "of each seed", "chosen"]
    chosen = {(result.scope, result.learning_rate) for result in comparison.scopes}
    rows = []
    for (scope, rate), runs in comparison.cells.items():
        scores = [run.at_step(comparison.env_steps) for run in runs]
        criterion, mean, *each = (
            f"{x:.{comparison.decimals}f}" for x in (comparison.chosen_by[scope, rate], np.mean(scores), *scores)
        )
        mark = "yes" if (scope, rate) in chosen else ""
        rows.append([scope, f"{rate:g}", str(len(runs)), criterion, mean, " ".join(each), mark])
    return header, rows


def markdown_table(table: Table) -> list[str]:
    """The lines of a table in Markdown."""
    header, rows = table
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def html_table(table: Table) -> str:
    """A table in HTML, its text escaped."""
    header, rows = table
    lines = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in header)}</tr>{''.join(lines)}</table>"


def items(tag: str, lines: list[str]) -> str:
    """A list in HTML, "ol" or "ul", one item per line of text."""
    return f"<{tag}>{''.join(f'<li>{code(line)}</li>' for line in lines)}</{tag}>"


def paragraph(text: str) -> str:
    """A paragraph in HTML."""
    return f"<p>{code(text)}</p>"


def code(text: str) -> str:
    """Escaped text; what stands between backquotes becomes code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def videos(comparison: Comparison) -> list[str]:
    """The last evaluation video of each scope's best run, inside the page."""
    found = []
    for result in comparison.scopes:
        run = max(result.runs, key=lambda run: run.eval_scores[-1])
        files = sorted(run.folder.videos.glob("*.mp4")) if run.folder else []
        if files and files[-1].stat().st_size <= LARGEST_VIDEO:
            data = base64.b64encode(files[-1].read_bytes()).decode()
            caption = f"{result.scope}, learning rate {result.learning_rate:g}, seed {run.seed}: {files[-1].stem}"
            found.append(f'<figure><video controls loop muted src="data:video/mp4;base64,{data}"></video>'
                         f"<figcaption>{html.escape(caption)}</figcaption></figure>")  # fmt: skip
    return ["<h2>Last evaluation of each scope's best run</h2>", *found] if found else []
