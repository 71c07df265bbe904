"""The W&B report, saved by the real client on a server in this process."""

import json
import re

import pytest
import wandb_report
from standin_wandb_server import ENTITY, Sweep
from study_worlds import put_on_wandb, write_study

from research.study.comparison import compare
from research.study.run_sources import read_folders
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
    sets = [each for block in blocks for each in block.get("metadata", {}).get("runSets", [])]
    assert sets and all("abc" in json.dumps(each["filters"]) for each in sets)


@pytest.mark.parametrize("name", ["vla-rl", "a/b/c/d", "/vla-rl", ""])
def test_what_names_no_project_is_refused(no_wandb_account, capsys, name):
    assert wandb_report.main([name]) == 2
    assert "not of the form entity/project[/sweep]" in capsys.readouterr().err


def test_a_project_without_runs_is_one_line(wandb_server, capsys):
    assert wandb_report.main([f"{ENTITY}/empty"]) == 2
    assert capsys.readouterr().err == f"error: W&B: no runs in {ENTITY}/empty\n"
