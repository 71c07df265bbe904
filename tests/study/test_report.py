"""The report of a comparison: its tables and text, and the page that shows everything in one file."""

import base64
import itertools
import re
import shutil
import subprocess

import pytest
from study_worlds import make_run, write_study

from research.errors import UserError
from research.study import report as report_module
from research.study.comparison import compare
from research.study.report import code, escaped, in_markdown, markdown_table, videos, write_report
from research.study.run_sources import read_folders
from research.study.statistics import Estimate
from research.study.tables import interval


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study") / "runs")


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    """What is written for `study`."""
    output = tmp_path_factory.mktemp("report")
    write_report(compare(read_folders([str(study)])), output, "the command")
    return output


def test_the_page_is_one_file_with_the_best_runs_last_video(study, report):
    page = (report / "report.html").read_text()
    best = max(read_folders([f"{study}/vision-0.0003-*"]), key=lambda run: run.eval_scores[-1])
    embedded = re.findall(r'<video[^>]*src="data:video/mp4;base64,([^"]*)"', page)
    assert [base64.b64decode(data) for data in embedded] == [best.folder.video(2000).read_bytes()]
    assert not re.search(r"<(script|img|link|iframe)[^>]+(src|href)=", page)
    assert page.count("plotly.js v") == 1  # the library's banner
    assert page.count('class="plotly-graph-div"') == 3
    assert "<td>not separable</td>" in page or "<td>separable</td>" in page


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; .ci/run installs it")
def test_the_page_draws_itself_in_a_browser(report, tmp_path):
    """Opened from the file, without a network: all figures are drawn, all curves named, and no script complains."""
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--window-size=1300,4000",
        "--virtual-time-budget=20000", "--dump-dom",
    ]  # fmt: skip
    page = f"file://{report / 'report.html'}"
    result = subprocess.run([BROWSER, *flags, page], capture_output=True, text=True, timeout=600)
    drawn = result.stdout
    assert result.returncode == 0, result.stderr[-500:]
    assert not re.findall(r".*CONSOLE.*(?:Uncaught|Error).*", result.stderr)
    figures = drawn.split('class="plotly-graph-div')[1:]
    assert len(figures) == 3 and all('class="main-svg"' in figure for figure in figures)
    success, curves, heatmap = figures
    assert success.count('class="trace scatter') == 4  # two scopes, their means and their seeds
    names = {"vision at 0.0003 (3 seeds)", "none at 0.0001 (3 seeds)"}
    assert set(re.findall(r'class="legendtext"[^>]*>([^<]+)<', curves)) == names
    assert "<image" in heatmap and heatmap.count('class="heatmap-label"') == 4
    assert drawn.count("<video") == 1  # only vision's best run has one


def test_text_from_runs_is_escaped_in_the_page():
    assert code("`x<y` & z") == "<code>x&lt;y</code> &amp; z"


HOSTILE = "a|b`c<script>alert(1)</script>\n\n# d *e* _f_ ![g](h) &lt;"


def test_text_from_runs_is_escaped_in_markdown():
    """What a reader of Markdown would take for a cell, code, a tag, a heading, a link, an emphasis or an entity."""
    text = r"a\|b\`c\<script>alert(1)\</script> # d \*e\* \_f\_ ![g]\(h) \&lt;"
    assert escaped(HOSTILE) == text
    assert markdown_table((["x"], [[HOSTILE]]))[-1] == f"| {text} |"
    assert escaped("# a") == r"\# a"
    untouched = "+0.002 [-0.014, +0.018] < 0.001 > 1000 learning_rate (x) -"
    assert escaped(untouched) == untouched
    assert in_markdown("`a_b` *c*") == r"`a_b` \*c\*"


def test_hostile_names_stay_text_everywhere_in_the_report(tmp_path):
    scopes = [HOSTILE, "vision"]
    for scope, seed in itertools.product(scopes, (1, 2, 3)):
        changes = {"trainer__env_config": {HOSTILE: HOSTILE}, f"algorithm__cfg__{HOSTILE}": scopes.index(scope)}
        make_run(tmp_path / f"runs/{scopes.index(scope)}-{seed}`<b>|\n", scope, seed=seed, **changes)
        make_run(tmp_path / f"runs/r{scopes.index(scope)}-{seed}", scope, 3e-4, seed=seed, **changes)
    (make_run(tmp_path / "runs/dead`<b>|\n", seed=9, **changes) / "summary.json").write_text('{"exit_code": "`<b>"}')
    output = tmp_path / "report"
    by = ["policy.freeze", f"algorithm.cfg.{HOSTILE}"]
    write_report(compare(read_folders([str(tmp_path / "runs")]), by=by), output, "command `<b>")
    text = (output / "report.md").read_text()
    outside = re.sub(r"(?<!\\)`[^`\n]*`", "", text)  # code shows what it holds as it is
    assert not re.search(r"(?<!\\)<(script|/script|b>)", outside)
    assert not re.search(r"(?<!\\)`", outside) and not re.search(r"\]\((?!\w+\.png\))", outside)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 4
    for table in tables:  # every line has as many cells as the header
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    page = (output / "report.html").read_text()
    assert "<script>alert" not in page and "<b>|" not in page
    assert all((output / name).stat().st_size for name in ("success.png", "curves.png", "heatmap.png", "runs.csv"))


def test_dollars_in_names_are_no_mathematics(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"runs/{seed}", ["$x^$", "a"], seed=seed)
    write_report(compare(read_folders([str(tmp_path / "runs")])), tmp_path / "report", "x")
    assert "$x^$+a" in (tmp_path / "report" / "report.md").read_text()


def test_text_is_code_between_backquotes_and_says_where_an_interval_is_missing():
    assert markdown_table((["a", "b"], [["1", "2"]])) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    assert interval(Estimate(0.25, 0.125, 0.5), decimals=2, signed=True) == "+0.25 [+0.12, +0.50]"
    assert interval(Estimate(0.25, float("nan"), float("nan"))) == "0.250 (no interval)"


def test_the_report_ends_with_what_made_it_and_shows_no_table_without_rows(report, tmp_path):
    text = (report / "report.md").read_text()
    assert re.search(r"\nMade by `the command` on \d{4}-\d\d-\d\d, code `[0-9a-f]+(-dirty)?`\n$", text)
    assert "## Pairs of scopes" in text
    assert "## Generalisation" not in text  # these runs were evaluated in no split
    assert "<p>Made by <code>the command</code> on " in (report / "report.html").read_text()
    make_run(tmp_path / "run")
    write_report(compare(read_folders([str(tmp_path)])), tmp_path / "alone", "x")
    assert "## Pairs of scopes" not in (tmp_path / "alone" / "report.md").read_text()


def test_a_film_has_a_caption_that_says_what_it_shows(study, report):
    best = max(read_folders([f"{study}/vision-0.0003-*"]), key=lambda run: run.eval_scores[-1])
    (caption,) = re.findall(r"</video>\s*<figcaption>([^<]*)</figcaption>", (report / "report.html").read_text())
    score = f"success {best.eval_scores[-1]:.3f}"
    assert caption == f"vision, learning rate 0.0003, seed {best.seed}: evaluation at 2,000 env steps, {score}"


def test_runs_lead_to_their_page_on_wandb_or_to_their_folder_and_nowhere_else(study, tmp_path):
    runs = read_folders([str(study)])
    runs[0].url, runs[1].url = "https://wandb.ai/a/b/runs/c", "javascript:alert(1)"
    runs[2].folder = None
    write_report(compare(runs), tmp_path, "x")
    page = (tmp_path / "report.html").read_text()
    links = dict(re.findall(r'<td><a href="([^"]*)">([^<]*)</a>', page))
    assert links["https://wandb.ai/a/b/runs/c"] == runs[0].run and len(links) == len(runs) - 1
    (folder,) = (link for link, name in links.items() if name == runs[1].run)
    assert (tmp_path / folder).resolve() == runs[1].folder.path.resolve() and not folder.startswith("/")
    assert f"<td>{runs[2].run}</td>" in page


def test_every_column_of_the_page_can_be_sorted_by(report):
    page = (report / "report.html").read_text()
    heads = re.findall(r"<th>(.*?)</th>", page)
    assert len(heads) > 20 and all(re.fullmatch(r'<button type="button">[^<]+</button>', head) for head in heads)
    assert page.count('addEventListener("click", () => {\n  const head') == 1
    assert '<meta name="viewport" content="width=device-width' in page


def test_a_report_by_another_option_speaks_of_arms(tmp_path):
    for coefficient, seed in itertools.product((0.1, 1.0), (1, 2, 3)):
        make_run(tmp_path / f"runs/{coefficient}-{seed}", seed=seed, algorithm__cfg__ent_coef=coefficient)
    runs = read_folders([str(tmp_path / "runs")])
    write_report(compare(runs, by=["algorithm.cfg.ent_coef"]), tmp_path / "report", "x")
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.startswith("# Runs compared by algorithm.cfg.ent_coef\n")
    for heading in (
        "Each arm at its own best learning rate",
        "Pairs of arms",
        "algorithm.cfg.ent_coef x learning rate",
    ):
        assert f"\n## {heading}\n" in text
    assert "two arms are separable" in text and "scope" not in text


def test_a_report_by_learning_rate_chooses_none(tmp_path):
    for rate in (3e-4, 1e-3):
        make_run(tmp_path / f"rates/{rate}", rate=rate)
    by_rate = compare(read_folders([str(tmp_path / "rates")]), by=["algorithm.cfg.learning_rate"])
    write_report(by_rate, tmp_path / "by_rate", "x")
    assert not (tmp_path / "by_rate" / "heatmap.png").exists()
    assert "x learning rate" not in (tmp_path / "by_rate" / "report.md").read_text()


def test_a_large_video_stays_out_of_the_page(study, monkeypatch):
    comparison = compare(read_folders([str(study)]))
    assert len(videos(comparison)) == 1
    monkeypatch.setattr(report_module, "LARGEST_VIDEO", 10)
    assert videos(comparison) == []


def test_a_folder_that_cannot_be_written_is_one_line(study, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*/file/report: Not a directory$"):
        write_report(compare(read_folders([f"{study}/vision-0.0003-*"])), tmp_path / "file" / "report", "x")
