"""The W&B report, saved by the real client on a server in this process."""

import io
import json
import re

import numpy as np
import pytest
import wandb
import wandb_report
from PIL import Image
from standin_wandb_server import ENTITY, Sweep
from study_worlds import put_on_wandb, write_study

from research.study import run_sources
from research.study.comparison import compare
from research.study.run_sources import read_folders, read_wandb
from research.study.tables import arm_table, cell_table, ranking

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study") / "runs")


def saved(server):
    """The view that was saved, its blocks, and the text in them."""
    (view,) = server.views
    blocks = json.loads(view["spec"])["blocks"]
    return view, blocks, "\n".join(str(block.get("content") or block.get("children")) for block in blocks)


def run_sets(blocks):
    return [each for block in blocks for each in block.get("metadata", {}).get("runSets", [])]


def heatmap_run(server):
    (run,) = [run for run in server.runs.values() if run.attributes.get("jobType") == run_sources.COMPARING]
    return run


def test_the_report_says_what_compare_runs_says(study, wandb_server, capsys):
    put_on_wandb(wandb_server, study, "vla-rl")
    assert wandb_report.main([f"{ENTITY}/vla-rl", "--title=What to freeze"]) == 0
    view, blocks, text = saved(wandb_server)
    assert (view["entityName"], view["projectName"], view["type"]) == (ENTITY, "vla-rl", "runs")
    assert view["displayName"] == "What to freeze"
    comparison = compare(read_folders([str(study)]))
    printed = capsys.readouterr().out
    for line in ranking(comparison):
        assert line in printed and line in text
    for _, rows in (arm_table(comparison), cell_table(comparison)):
        assert all(cell in text for row in rows for cell in row if re.fullmatch(r"[\d.]+ \[.*\]", cell))
    shown = json.dumps(blocks)
    for name in ("eval/success_rate", "rollout/success_rate", "eval/episodes", "eval/video", "learning_rate"):
        assert name in shown
    assert f"{ENTITY}/vla-rl/reports/What-to-freeze" in printed


def test_the_report_of_a_sweep_shows_its_runs_alone(study, wandb_server):
    put_on_wandb(wandb_server, study, "vla-rl", sweep="abc")
    wandb_server.sweeps["abc"] = Sweep("abc", "vla-rl", "method: grid\n", {"method": "grid"}, iter(()))
    assert wandb_report.main([f"{ENTITY}/vla-rl/abc"]) == 0
    _, blocks, _ = saved(wandb_server)
    shown = [json.dumps(each["filters"]) for each in run_sets(blocks)]
    (picture,) = [filters for filters in shown if heatmap_run(wandb_server).name in filters]
    shown.remove(picture)
    assert shown and all("abc" in filters for filters in shown)


def test_the_heat_map_is_a_picture_of_a_run_that_is_not_compared(study, wandb_server):
    put_on_wandb(wandb_server, study, "vla-rl")
    compared = len(compare(read_wandb(f"{ENTITY}/vla-rl")).runs)
    assert wandb_report.main([f"{ENTITY}/vla-rl"]) == 0
    run = heatmap_run(wandb_server)
    assert (run.project, run.state, run.exit_code) == ("vla-rl", "finished", 0)
    (name,) = [name for name in run.files if name.endswith(".png")]
    with Image.open(io.BytesIO(wandb_server.contents[f"/upload/{run.name}/{name}"])) as picture:
        assert picture.width > 300 and len(np.unique(picture.convert("L"))) > 50
    _, blocks, _ = saved(wandb_server)
    others = [json.dumps(each["filters"]) for each in run_sets(blocks) if run.name not in json.dumps(each["filters"])]
    assert others and all(run_sources.COMPARING in filters for filters in others)  # not among the curves
    assert len(compare(read_wandb(f"{ENTITY}/vla-rl")).runs) == compared
    assert wandb_report.main([f"{ENTITY}/vla-rl"]) == 0  # a second report compares the same runs


def test_a_server_that_takes_no_heat_map_is_one_line(study, wandb_server, monkeypatch, capsys):
    put_on_wandb(wandb_server, study, "vla-rl")
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(wandb.errors.CommError("no room")))
    assert wandb_report.main([f"{ENTITY}/vla-rl"]) == 2
    assert capsys.readouterr().err == "error: W&B did not take the heat map: no room\n"
    assert not wandb_server.views


@pytest.mark.parametrize("name", ["vla-rl", "a/b/c/d", "/vla-rl", ""])
def test_what_names_no_project_is_refused(no_wandb_account, capsys, name):
    assert wandb_report.main([name]) == 2
    assert "not of the form entity/project[/sweep]" in capsys.readouterr().err


def test_a_project_without_runs_is_one_line(wandb_server, capsys):
    assert wandb_report.main([f"{ENTITY}/empty"]) == 2
    assert capsys.readouterr().err == f"error: W&B: no runs in {ENTITY}/empty\n"
