"""The report of a comparison: `report.md`, and `report.html` with figures, tables and videos in one file."""

from __future__ import annotations

import base64
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from research.errors import UserError
from research.runs.code_version import git_commit
from research.study import figures
from research.study.comparison import Comparison
from research.study.run_table import Run, quoted, write_table
from research.study.tables import (
    Table,
    arm_table,
    cell_table,
    describe,
    origins,
    pair_table,
    ranking,
    runner_up_notes,
    runs_table,
    settings_table,
    split_pair_table,
    split_table,
    task_table,
)

LARGEST_VIDEO = 4 * 2**20  # bytes; a page holds one per arm
FIGURES = {
    "scores": (figures.draw_scores, figures.scores_page),
    "curves": (figures.draw_curves, figures.curves_page),
    "heatmap": (figures.draw_heatmap, figures.heatmap_page),
}

METHOD = (
    "Intervals, those of curves and at equal wall time too, are 95 % and speak of a new seed and, where single "
    "episodes are known, of new initial states: seeds and states are crossed random effects (two-way analysis of "
    "variance, Satterthwaite, {scale}). The interquartile mean (IQM) has a stratified bootstrap standard error. "
    "Differences are paired by initial state; two {noun}s are separable where the p-value, after Holm's correction for "
    "all pairs, is below 0.05; with fewer than three seeds there is no verdict. P(better) is how often a run of the "
    "first {noun} beats one of the second (Newcombe's interval). More seeds: for 80 % power at the observed difference "
    "and the level that the pair faced in Holm's procedure; where no number of seeds would do, as all share the same "
    "initial states, the states needed with the seeds that there are. A runner-up is a rate within two standard errors "
    "of the chosen one, in what the choice was by. `research/study/statistics.py` says what was measured about each."
)
SCALE = {"success": "t on the logit scale", "return": "t"}


@dataclass
class Section:
    """A part of the report under a heading of its own."""

    heading: str
    table: Table | None = None
    figure: str | None = None
    """One of `FIGURES`."""
    file: str = ""
    """Name of the figure's image."""
    links: list[str] | None = None
    """Where the first cell of each row leads, on the page; empty for nowhere."""


@dataclass
class Video:
    """A film inside the page, with what stands under it."""

    caption: str
    data: str
    """Base64 of the file."""


def write_report(comparison: Comparison, output: Path, command: str) -> None:
    """Write the report, its images and `runs.csv`, from which all numbers can be computed again.

    Args:
        comparison: what to report.
        output: the folder to write, made if need be.
        command: what made the comparison, for the report's last line.
    Raises:
        UserError: the folder cannot be written.
    """
    code = git_commit()
    sections = sections_of(comparison, output)
    content = {
        "title": title_of(comparison),
        "facts": [*describe(comparison), *origins(comparison)],
        "ranking": ranking(comparison),
        "notes": [*comparison.notes, *runner_up_notes(comparison)],
        "sections": sections,
        "method": METHOD.format(scale=SCALE[comparison.measure], noun=comparison.noun),
        "made_by": f"Made by {quoted(command)} on {time.strftime('%Y-%m-%d')}"
        + (f", code {quoted(code)}" if code else ""),
    }
    texts = _templates()
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_table(output / "runs.csv", comparison.runs)
        for section in sections:
            if section.figure:
                draw, _ = FIGURES[section.figure]
                draw(comparison).savefig(output / section.file, dpi=150)
        markdown = texts.get_template("report.md.jinja").render(content)
        (output / "report.md").write_text(markdown, encoding="utf-8")
        content |= {"plots": _plots(comparison, sections), "videos": videos(comparison)}
        page = texts.get_template("report.html.jinja").render(content)
        (output / "report.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: cannot write to {output}: {error.strerror}") from error


def title_of(comparison: Comparison) -> str:
    """What the report is called."""
    return "Freeze scopes compared" if comparison.noun == "scope" else f"Runs compared by {comparison.heading}"


def sections_of(comparison: Comparison, output: Path) -> list[Section]:
    """The parts of the report that have something to show; `output` is where links of the page begin."""
    noun, measure = comparison.noun, comparison.measure
    own_rate = " at its own best learning rate" if comparison.chooses_rates else ""
    name = "Freeze scope" if noun == "scope" else comparison.heading
    found = [
        Section(f"Each {noun}{own_rate}", arm_table(comparison), "scores", f"{measure}.png"),
        Section(f"Pairs of {noun}s", pair_table(comparison)),
        Section("Learning curves", None, "curves", "curves.png"),
        Section("Success by task", task_table(comparison)),
        Section("Generalisation", split_table(comparison)),
        Section(f"Pairs of {noun}s in each split (p: Holm, for the pairs of a split)", split_pair_table(comparison)),
    ]
    if comparison.chooses_rates:
        found.append(Section(f"{name} x learning rate", cell_table(comparison), "heatmap", "heatmap.png"))
    found += [
        Section("What all runs have, besides defaults", settings_table(comparison)),
        Section("Runs", runs_table(comparison), links=[_link(run, output) for run in comparison.runs]),
    ]
    return [section for section in found if section.table or section.figure]


def _link(run: Run, output: Path) -> str:
    """A run's page on W&B, else its folder, from where the report lies; empty where neither is known."""
    if run.url.startswith(("https://", "http://")):
        return run.url
    return f"{Path(os.path.relpath(run.folder.path, output)).as_posix()}/" if run.folder else ""


def _plots(comparison: Comparison, sections: list[Section]) -> dict[str, Markup]:
    """The page's figures; the first of them brings the library."""
    config = {"responsive": True, "displaylogo": False}
    plots: dict[str, Markup] = {}
    for section in sections:
        if section.figure:
            _, draw = FIGURES[section.figure]
            plot = draw(comparison).to_html(full_html=False, include_plotlyjs=not plots, config=config)
            plots[section.figure] = Markup(plot)
    return plots


def _templates() -> jinja2.Environment:
    """The templates; what ends in `.html.jinja` has text from runs escaped."""
    loader = jinja2.PackageLoader("research.study", "templates")
    templates = jinja2.Environment(
        loader=loader, autoescape=lambda name: bool(name and name.endswith(".html.jinja")),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters |= {
        "escaped": escaped,
        "in_markdown": in_markdown,
        "markdown_table": markdown_table,
        "code": code,
    }
    return templates


# ---- Markdown and HTML


def markdown_table(table: Table) -> list[str]:
    """The lines of a table in Markdown, its text escaped."""
    header, rows = ([[escaped(cell) for cell in row] for row in part] for part in ([table[0]], table[1]))
    return [f"| {' | '.join(row)} |" for row in (*header, ["---"] * len(table[0]), *rows)]


def in_markdown(text: str) -> str:
    """Escaped text on one line; what stands between backquotes stays code."""
    parts = text.split("`")
    return "`".join(part if i % 2 else escaped(part) for i, part in enumerate(parts))


def escaped(text: str) -> str:
    """Text that Markdown, in a table too, shows as it is, on one line."""
    line = re.sub(r"\s+", " ", text)
    # A "(" only where it would make a link, a "<" only where a tag, an "_" only where a word begins or ends with it.
    return re.sub(r"[\\`*|~&]|(?<=\])\(|<(?=[A-Za-z/!?])|(?<!\w)_|_(?!\w)|^#", r"\\\g<0>", line)


def code(text: str) -> Markup:
    """Text as HTML; what stands between backquotes becomes code."""
    parts = (escape(part) for part in text.split("`"))
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def videos(comparison: Comparison) -> list[Video]:
    """The last evaluation video of each arm's best run."""
    found = []
    for result in comparison.arms:
        run = max(result.runs, key=lambda run: run.eval_scores[-1])
        files = sorted(run.folder.videos.glob("*.mp4")) if run.folder else []
        if files and files[-1].stat().st_size <= LARGEST_VIDEO:
            data = base64.b64encode(files[-1].read_bytes()).decode()
            rate = f", learning rate {result.learning_rate:g}" if comparison.chooses_rates else ""
            caption = f"{result.arm}{rate}, seed {run.seed}: {_shown_in(files[-1], run, comparison)}"
            found.append(Video(caption, data))
    return found


def _shown_in(video: Path, run: Run, comparison: Comparison) -> str:
    """Which evaluation a video is of, and its score: `eval_<global_step>.mp4`."""
    step = video.stem.rpartition("_")[2]
    if not step.isdigit():
        return video.stem
    scores = dict(zip(run.eval_steps, run.eval_scores, strict=True))
    score = scores.get(float(step))
    tail = "" if score is None else f", {comparison.measure} {score:.{comparison.decimals}f}"
    return f"evaluation at {int(step):,} env steps{tail}"
