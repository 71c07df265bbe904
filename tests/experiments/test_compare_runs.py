"""The command that compares runs: the report it writes, by success or by return, again from its table, and refusals."""

import csv
import itertools
import json
import re
import shutil

import compare_runs
import numpy as np
import pytest
from scipy import stats
from study_worlds import EASY, make_run, write_choosing, write_return_study, write_study

from research.study.run_sources import read_folders
from research.study.statistics import iqm_interval, mean_interval
from research.study.tables import interval


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study") / "runs")


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    """What the script writes for `study`."""
    output = tmp_path_factory.mktemp("report")
    crashed = make_run(study.parent / "more/crashed", "none", 1e-4, 4, 1.0)
    (crashed / "summary.json").unlink()
    assert compare_runs.main([str(study), str(study.parent / "mo*/crash*"), f"--output={output}"]) == 0
    return output


def final_rates(folder, pattern):
    paths = sorted(folder.glob(f"{pattern}/metrics.jsonl"))
    return [json.loads(path.read_text().splitlines()[-2])["eval/success_rate"] for path in paths]


def test_the_report_has_the_numbers_of_the_run_folders(study, report):
    text = (report / "report.md").read_text()
    episodes = [[float(c) for c in run.episodes[-1]] for run in read_folders([f"{study}/vision-0.0003-*"])]
    np.testing.assert_allclose(np.mean(episodes, axis=1), final_rates(study, "vision-0.0003-*"))
    estimate = mean_interval(episodes)
    interval = f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
    assert f"| vision | 0.0003 | 3 | 0.500 | {interval} |" in text
    assert f"1. vision: {interval}, rank 1 of 2\n2. none: " in text
    assert re.search(r"\| vision \| none \| \+0\.\d+ \[\+.* \| separable \|", text)
    for name in ("success.png", "curves.png", "heatmap.png"):
        assert (report / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text


def test_a_crashed_run_is_kept_marked_and_excluded(report):
    text = (report / "report.md").read_text()
    assert "`crashed` is excluded from all means: no summary.json: killed, or still running." in text
    assert "13 runs, 12 of them complete" in text
    assert "| none | 0.0001 | 3 |" in text
    with (report / "runs.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file) if row["status"] != "complete"] == ["crashed"]


def test_the_table_alone_recomputes_every_number(report, tmp_path):
    assert compare_runs.main([f"--table={report}/runs.csv", f"--output={tmp_path}"]) == 0
    assert (tmp_path / "runs.csv").read_bytes() == (report / "runs.csv").read_bytes()
    again, first = ((folder / "report.md").read_text().split("Made by")[0] for folder in (tmp_path, report))
    assert again == first


def test_runs_are_compared_by_another_evaluation_and_again_from_the_table(study, tmp_path, capsys):
    for run in read_folders([str(study)]):
        if run.complete and run.learning_rate == {"vision": 3e-4, "none": 1e-4}[run.scope]:  # none is better here
            write_choosing(run.folder.path, np.arange(40) < (8 if run.scope == "vision" else 30) + run.seed)
    runs = [f"{study}/vision-0.0003-*", f"{study}/none-0.0001-*"]
    assert compare_runs.main([*runs, "--evaluation=choosing", f"--output={tmp_path}"]) == 0
    assert re.match(r"none: 0\.80\d .* rank 1 of 2\nvision: 0\.25\d .* rank 2 of 2\n", capsys.readouterr().out)
    assert "tabletop, as evaluated in choosing/ " in (tmp_path / "report.md").read_text()
    assert compare_runs.main([f"--table={tmp_path}/runs.csv", f"--output={tmp_path}/again"]) == 0
    again, first = ((folder / "report.md").read_text().split("Made by")[0] for folder in (tmp_path / "again", tmp_path))
    assert again == first
    assert compare_runs.main([f"--table={tmp_path}/runs.csv", "--evaluation=choosing"]) == 2
    assert "error: --evaluation is read from run folders: name them" in capsys.readouterr().err


def test_runs_that_did_not_evaluate_are_compared_by_an_evaluation_of_afterwards(tmp_path, capsys):
    for scope, seed in itertools.product(("none", "vision"), (1, 2, 3)):
        run = make_run(tmp_path / "runs" / f"{scope}-{seed}", scope, 1e-4, seed)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rollouts = [row for row in rows if "eval/return" not in row]  # trainer.enable_eval=false
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))
        (run / "episodes.jsonl").unlink()
        write_choosing(run, np.arange(40) < (8 if scope == "vision" else 30) + seed)
    runs = [str(tmp_path / "runs"), f"--output={tmp_path / 'report'}"]
    assert compare_runs.main([*runs, "--evaluation=choosing"]) == 0
    assert re.match(r"none: 0\.80\d .* rank 1 of 2\nvision: 0\.25\d .* rank 2 of 2\n", capsys.readouterr().out)
    with (tmp_path / "report" / "runs.csv").open() as file:
        assert {(row["measure"], row["eval_steps"], row["eval_seconds"]) for row in csv.DictReader(file)} == {
            ("success", "2001", "200")
        }
    assert compare_runs.main(runs) == 2  # they have no evaluation of their own
    assert "none of the 6 runs is complete" in capsys.readouterr().err


def test_runs_are_compared_by_the_options_that_are_asked_for_and_again_from_the_table(study, tmp_path, capsys):
    by = ["--by", "algorithm.cfg.learning_rate", "policy.freeze"]
    assert compare_runs.main([str(study), *by, f"--output={tmp_path}"]) == 0
    assert capsys.readouterr().out.startswith("learning_rate=0.0003, vision: 0.9")
    assert (
        compare_runs.main([f"--table={tmp_path}/runs.csv", *by, "--equal=seconds", f"--output={tmp_path}/again"]) == 0
    )
    assert "Runs are compared at equal wall time." in (tmp_path / "again" / "report.md").read_text()
    again, first = ((folder / "runs.csv").read_bytes() for folder in (tmp_path / "again", tmp_path))
    assert again == first


# ---- by return


@pytest.fixture(scope="module")
def return_study(tmp_path_factory):
    return write_return_study(tmp_path_factory.mktemp("return_study") / "runs")


def test_runs_without_success_are_compared_by_return(return_study, tmp_path, capsys):
    assert compare_runs.main([str(return_study), f"--output={tmp_path}"]) == 0
    text = (tmp_path / "report.md").read_text()

    # Of the mean: 100 / 3 from the seeds with 2 degrees of freedom, 25 / 39 from the states with 39.
    variance = 100 / 3 + 25 / 39
    freedom = variance**2 / ((100 / 3) ** 2 / 2 + (25 / 39) ** 2 / 39)
    half = stats.t.ppf(0.975, freedom) * variance**0.5
    mean = f"987.6 [{987.6 - half:.1f}, {987.6 + half:.1f}]"
    assert f"1. vision: {mean}, rank 1 of 2\n2. none: 900.0 [" in text
    assert f"| vision | 0.0003 | 3 | 0.0 | {mean} | 987.6 [" in text
    iqm = iqm_interval([[987.6 + seed + EASY for seed in (-10, 0, 10)]], bounded=False)
    assert f"| {interval(iqm, decimals=1)} |" in text
    assert f"] | {mean} | 200 | 1 |" in text  # at equal time the same: all runs took 200 s
    # What states add cancels out: Welch's interval, 2.7764 * sqrt(200 / 3) for 4 degrees of freedom.
    assert "| vision | none | +87.6 [+64.9, +110.3] | < 0.001 | separable | 1.000 [" in text
    assert "| none | 1e-05 | 3 | 0.0 | 0.0 | -10.0 0.0 10.0 |  |  |" in text
    assert f"| vision | 0.0003 | 3 | 98.8 | 987.6 | 977.6 987.6 997.6 | yes | {mean} |" in text
    assert "Return at 2,000 env steps" in text and "chosen by return in the last tenth of training" in text
    assert "![Each scope at its own best learning rate](return.png)" in text
    assert (tmp_path / "return.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"success|logit|\d%", text.split("Made by")[0], re.IGNORECASE)

    page = (tmp_path / "report.html").read_text()
    assert "return: mean, 95 % interval, single seeds" in page and "987.6 *" in page
    assert ".0%" not in page.split("plotly.js v")[1].split("</script>", 1)[1]  # after the library
    assert capsys.readouterr().out.startswith(f"vision: {mean}")

    assert compare_runs.main([f"--table={tmp_path}/runs.csv", f"--output={tmp_path}/again"]) == 0
    assert (tmp_path / "again/report.md").read_text().split("Made by")[0] == text.split("Made by")[0]
    assert (tmp_path / "again/runs.csv").read_bytes() == (tmp_path / "runs.csv").read_bytes()


# ---- refusals


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("run,status\n")
    unfinished = shutil.copytree(folder, tmp_path / "unfinished")
    (unfinished / "summary.json").write_text('{"exit_code": 143}')
    foreign = shutil.copytree(folder, tmp_path / "foreign")
    (foreign / "config.json").write_text('{"trainer": {"seed": 1}}')
    for arguments, message in {
        (): "exactly one of the three",
        (str(folder), "--table=x.csv"): "exactly one of the three",
        (str(tmp_path / "empty"),): "no runs found in",
        (str(tmp_path / "nothing*"),): "no runs found in",
        (str(tmp_path / "missing"),): "no such folder",
        (f"{tmp_path}/bad.csv",): f"bad.csv, but a file; a table of runs is read by --table={tmp_path}/bad.csv",
        (f"--table={tmp_path}/missing.csv",): "cannot be read: No such file",
        (f"--table={tmp_path}/bad.csv",): "has no column scope, learning_rate",
        (str(unfinished),): "none of the 1 runs is complete; the first, unfinished: exit code 143",
        (str(foreign),): "the first, foreign: cannot be read: not a run of ppo_vla.py: its config has no policy.freeze",
        (str(folder), f"--output={folder}/config.json"): "cannot write to",
        (str(folder), "--by=policy.frieze"): "there is no option 'policy.frieze'; did you mean 'policy.freeze'?",
        (str(folder), "--by=policy.freeze"): "the same in all 1 complete runs",
        (
            str(folder),
            "--choose_on=other_states",
        ): "run was not evaluated on other states; evaluate_vla.py --checkpoint",
    }.items():
        assert compare_runs.main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
