"""The report of a comparison: `report.md`, and `report.html` with figures, tables and videos in one file."""

from __future__ import annotations

import base64
import html
import math
import re
from pathlib import Path

import numpy as np

from research.schema import UserError
from research.study import figures
from research.study.comparison import VERDICT_SEEDS, Comparison, Pair, RunnerUp
from research.study.run_table import plain, quoted, write_table
from research.study.statistics import Estimate

LARGEST_VIDEO = 4 * 2**20  # bytes; a page holds one per scope

Table = tuple[list[str], list[list[str]]]  # header, rows

METHOD = (
    "Intervals, those of curves and at equal wall time too, are 95 % and speak of a new seed and, where single "
    "episodes are known, of new initial states: seeds and states are crossed random effects (two-way analysis of "
    "variance, Satterthwaite, {scale}). The interquartile mean (IQM) has a stratified bootstrap standard error. "
    "Differences are paired by initial state; two scopes are separable where the p-value, after Holm's correction for "
    "all pairs, is below 0.05; with fewer than three seeds there is no verdict. P(better) is how often a run of the "
    "first scope beats one of the second (Newcombe's interval). More seeds: for 80 % power at the observed difference "
    "and the level that the pair faced in Holm's procedure; where no number of seeds would do, as all share the same "
    "initial states, the states needed with the seeds that there are. A runner-up is a rate within two standard errors "
    "of the chosen one, in what the choice was by. `research/study/statistics.py` says what was measured about each."
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
    facts, measure = describe(comparison), comparison.measure
    notes = [*comparison.notes, *runner_up_notes(comparison)]
    made_by = f"Made by {quoted(command)}"
    method = METHOD.format(scale=SCALE[measure])
    sections = [
        ("Each scope at its own best learning rate", measure, scope_table(comparison)),
        ("Pairs of scopes", None, pair_table(comparison)),
        ("Learning curves", "curves", None),
        ("Success by task", None, task_table(comparison)),
        ("Generalisation", None, split_table(comparison)),
        ("Freeze scope x learning rate", "heatmap", cell_table(comparison)),
    ]
    pages = {measure: figures.scores_page, "curves": figures.curves_page, "heatmap": figures.heatmap_page}
    images = {measure: figures.draw_scores, "curves": figures.draw_curves, "heatmap": figures.draw_heatmap}

    markdown = [f"# {title}", *map(escaped, facts), "## Ranking"]
    markdown += [f"{i}. {escaped(line)}" for i, line in enumerate(ranking(comparison), 1)]
    markdown += ["", "## Notes", *(f"- {in_markdown(note)}" for note in notes)]
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
    markdown += ["", "## Method", method, "", made_by]
    body += [*videos(comparison), "<h2>Method</h2>", paragraph(method), paragraph(made_by)]
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
    first, complete = comparison.scopes[0].runs[0], sum(run.complete for run in comparison.runs)
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
    equal_time = f"{measure} at equal wall time{', schedules interrupted' if comparison.interrupted else ''}"
    header = ["scope", "learning rate", "seeds", "before", measure, "IQM", equal_time, "run, s", "rank"]
    rows = [
        [
            result.scope, f"{result.learning_rate:g}", count_of_seeds(len(result.runs)),
            f"{result.before:.{decimals}f}",
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
        verdict = "separable" if pair.separable else "not separable"
        p_value = "-" if untested else "< 0.001" if pair.p_value < 0.001 else f"{pair.p_value:.3f}"
        difference = interval(pair.difference, comparison.decimals, signed=True)
        verdict = f"{_why_untested(comparison, pair)}: cannot say" if untested else verdict
        rows.append(
            [pair.first, pair.second, difference, p_value, verdict, interval(pair.improvement), more_needed(pair)]
        )
    return (header, rows) if rows else None


def _why_untested(comparison: Comparison, pair: Pair) -> str:
    fewest = min(len(result.runs) for result in comparison.scopes if result.scope in (pair.first, pair.second))
    return {1: "one seed", 2: "two seeds"}.get(fewest, "equal scores")


def more_needed(pair: Pair) -> str:
    """What would tell a pair apart that is not separable: more seeds for each, or more initial states for all."""
    if pair.separable or math.isnan(pair.more_seeds):
        return "-"
    if math.isfinite(pair.more_seeds):
        return "> 1000" if pair.more_seeds > 1000 else f"{pair.more_seeds:.0f}"
    if pair.difference.value == 0 or math.isnan(pair.states):
        return "seeds alone cannot"
    if math.isinf(pair.states):
        return "more states, and seeds"
    return "more states: > 100,000" if pair.states > 100_000 else f"more states: {pair.states:,.0f}"


def count_of_seeds(number: int) -> str:
    """How many seeds, flagged where they are too few for a verdict."""
    return str(number) if number >= VERDICT_SEEDS else f"{number}, too few"


def task_table(comparison: Comparison) -> Table | None:
    """Each scope's mean score in each task, where there are several."""
    return _table_by("tasks", comparison)


def split_table(comparison: Comparison) -> Table | None:
    """Each scope's mean score in the splits that all of its runs were evaluated in (evaluate_vla.py --split=all)."""
    return _table_by("splits", comparison)


def _table_by(what: str, comparison: Comparison) -> Table | None:
    """A row for each scope, a column for each name under an attribute of its result that maps names to estimates."""
    found = {result.scope: getattr(result, what) for result in comparison.scopes if getattr(result, what)}
    names = list(dict.fromkeys(name for of_scope in found.values() for name in of_scope))
    rows = [
        [scope, *(interval(of_scope[n], comparison.decimals) if n in of_scope else "" for n in names)]
        for scope, of_scope in found.items()
    ]
    return (["scope", *names], rows) if rows else None


def cell_table(comparison: Comparison) -> Table:
    """Each scope at every learning rate tried: the mean score of every seed; of chosen rates and runners-up, what the
    report would be with them.
    """
    header = ["scope", "learning rate", "seeds", "chosen by", comparison.measure, "of each seed", "chosen", "reported"]
    chosen, decimals = (
        {(result.scope, result.learning_rate): result for result in comparison.scopes},
        comparison.decimals,
    )
    runners_up = {(r.scope, other.learning_rate): other for r in comparison.scopes for other in r.runners_up}
    rows = []
    for (scope, rate), runs in comparison.cells.items():
        scores = [run.mean_at("steps", comparison.env_steps) for run in runs]
        criterion, mean, *each = (
            f"{x:.{decimals}f}" for x in (comparison.chosen_by[scope, rate], np.mean(scores), *scores)
        )
        mark = reported = ""
        if (scope, rate) in chosen:
            mark, reported = "yes", interval(chosen[scope, rate].mean, decimals)
        elif (scope, rate) in runners_up:
            mark, reported = "runner-up", _reported(runners_up[scope, rate], decimals)
        rows.append([scope, f"{rate:g}", str(len(runs)), criterion, mean, " ".join(each), mark, reported])
    return header, rows


def runner_up_notes(comparison: Comparison) -> list[str]:
    """One note per scope whose rate the choice could not tell from others: what the report would be with those."""
    notes = []
    for result in comparison.scopes:
        found = []
        for other in result.runners_up:
            error = "one seed" if math.isnan(other.error) else f"standard error {other.error:.{comparison.decimals}f}"
            found.append(
                f"{other.learning_rate:g} is {other.behind:.{comparison.decimals}f} behind ({error}) and its "
                f"{comparison.measure} {_reported(other, comparison.decimals)}"
            )
        if found:
            notes.append(
                f"The choice of a rate for {plain(result.scope)} is open. It took {result.learning_rate:g}, with "
                f"{interval(result.mean, comparison.decimals)}; {'; '.join(found)}."
            )
    return notes


def _reported(other: RunnerUp, decimals: int) -> str:
    which = f"{'' if other.fresh else 'choosing '}seed{'s' * (other.seeds > 1)}"
    return f"{interval(other.mean, decimals)} ({other.seeds} {which})"


def markdown_table(table: Table) -> list[str]:
    """The lines of a table in Markdown, its text escaped."""
    header, rows = table
    cells = ([escaped(cell) for cell in row] for row in rows)
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]


def in_markdown(text: str) -> str:
    """Escaped text on one line; what stands between backquotes stays code."""
    parts = text.split("`")
    return "`".join(part if i % 2 else escaped(part) for i, part in enumerate(parts))


def escaped(text: str) -> str:
    """Text that Markdown, in a table too, shows as it is, on one line."""
    line = re.sub(r"\s+", " ", text)
    # A "(" only where it would make a link, a "<" only where a tag, an "_" only where a word begins or ends with it.
    return re.sub(r"[\\`*|~&]|(?<=\])\(|<(?=[A-Za-z/!?])|(?<!\w)_|_(?!\w)|^#", r"\\\g<0>", line)


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
