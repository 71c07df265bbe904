"""Sweeps with the real `wandb sweep`, `wandb agent` and client, against a server in this process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ppo_vla
import pytest
import wandb_workspace
import yaml
from standin_wandb_server import ENTITY, StandInServer
from sweep_worlds import children
from worlds import ROOT, run_folder, write_config

from research.runs import tracking
from research.runs.checkpoint import load_checkpoint
from research.runs.tracking import read_metrics

pytestmark = pytest.mark.slow

# The shipped sweeps, with a run small enough to repeat: reach, seen by an untrained model, in seconds.
TINY = {
    "trainer.env_config": {
        "task": "reach",
        "modalities": ["rgb", "proprio", "language"],
        "image_size": 16,
        "max_steps": 8,
    },
    "trainer.num_envs": 4,
    "trainer.buffer_size": 32,
    "trainer.iterations": 2,
    "trainer.num_eval_envs": 4,
    "trainer.num_eval_episodes": 4,
    "trainer.eval_freq": 0,
    "trainer.save_freq": 0,
    "policy.vla_config.model_path": None,
    "policy.vla_config.model_config": {"action_dim": 3, "hidden_size": 16},
    "algorithm.cfg.batch_size": 16,
    "algorithm.cfg.n_epochs": 1,
    "algorithm.cfg.value_warmup_iterations": 0,
}
# What a run does with W&B, in a moment: it logs, and says that it is preempted where it is asked to end.
PREEMPTIBLE = """
import os, signal, sys, time, wandb
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
run = wandb.init()
for _ in range(100 if run.config["n"] < 3 and run.step == 0 else 3):
    run.log({"pid": os.getpid()})
    time.sleep(0.1)
    if asked:
        run.mark_preempting()
        run.finish(143)
        sys.exit(143)
"""
ENDLESS = {"trainer.iterations": 10**6, "trainer.enable_eval": False}


@pytest.fixture
def server(monkeypatch, tmp_path):
    with StandInServer() as server:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
            monkeypatch.setenv(name, str(tmp_path))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        yield server
        assert server.unknown == []


def wandb_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "wandb", *words]


def create(server: StandInServer, tmp_path: Path, shipped: str, **changes) -> str:
    """`wandb sweep` on a shipped file, its runs made tiny; returns the sweep's id."""
    content = yaml.safe_load((ROOT / "sweeps" / f"{shipped}.yaml").read_text())
    tiny = TINY | {"trainer.run_dir": str(tmp_path / "runs")}
    content["parameters"] |= {name: {"value": value} for name, value in tiny.items()}
    content["parameters"] |= changes
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    done = subprocess.run(wandb_command("sweep", str(path)), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (sweep,) = server.sweeps
    assert f"wandb agent {ENTITY}/vla-rl/{sweep}" in done.stderr
    return sweep


@pytest.fixture
def start_agent(tmp_path):
    agents = []

    def start(sweep: str, *flags: str) -> subprocess.Popen:
        command = wandb_command("agent", *flags, f"{ENTITY}/vla-rl/{sweep}")
        with (tmp_path / "agents.log").open("a") as log:
            agents.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        return agents[-1]

    yield start
    for agent in agents:  # left over by a test that failed: its runs first, then the agent itself
        for _ in range(2):
            if agent.poll() is None:
                agent.terminate()
                time.sleep(1)


def wait_for(condition, seconds=900):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
    return found


def test_two_agents_share_a_grid(server, start_agent, tmp_path):
    two = {"trainer.seed": {"values": [1, 2]}, "policy.freeze": {"values": ["none", "backbone"]}}
    sweep = create(server, tmp_path, "freeze", **two)
    agents = [start_agent(sweep) for _ in range(2)]
    assert [agent.wait(timeout=1200) for agent in agents] == [0, 0]

    runs = server.of_sweep(sweep)
    log = (tmp_path / "agents.log").read_text()
    assert [(run.state, run.exit_code) for run in runs] == [("finished", 0)] * 4, log
    assert {agent for run in runs for agent in run.agents} == {"agent0", "agent1"}
    found = [(run.config["trainer.seed"], run.config["policy.freeze"]) for run in runs]
    assert sorted(found) == [(1, "backbone"), (1, "none"), (2, "backbone"), (2, "none")]
    for run in runs:
        scope = run.config["policy.freeze"]
        assert run.project == "vla-rl" and run.agents == run.agents[:1]
        # One form of the configuration, dotted; the rate of the scope; and two keys that W&B's panels can address.
        assert all(run.config[name] == value for name, value in run.point.items() if not isinstance(value, dict))
        assert "policy" not in run.config and "trainer" not in run.config
        assert run.config["algorithm.cfg.learning_rate"] == {"none": 4e-4, "backbone": 1.6e-3}[scope]
        assert (run.config["scope"], run.config["learning_rate"]) == (scope, run.config["algorithm.cfg.learning_rate"])
        assert run.attributes["groupName"] == f"tabletop-ppo-{scope}"
        assert run.attributes["jobType"] == "train"
        assert f"freeze:{scope}" in run.attributes["tags"]
        rows = [row for row in run.history if "train/approx_kl" in row]
        assert [row["global_step"] for row in rows] == [32, 64]
        assert {"global_step", "before/return", "eval/return", "exit_code"} <= set(run.summary)
        (folder,) = (tmp_path / "runs").glob(f"*-{run.name}")
        local = [row for row in read_metrics(folder) if "train/approx_kl" in row]
        assert [row["train/approx_kl"] for row in local] == [row["train/approx_kl"] for row in rows]


def test_preempted_runs_go_on_from_their_checkpoint_and_early_termination_ends_them(server, start_agent, tmp_path):
    endless = {name: {"value": value} for name, value in ENDLESS.items()}
    sweep = create(server, tmp_path, "bayes", **endless)

    def rows(run) -> list[dict]:
        return [row for row in run.history if "train/approx_kl" in row]

    # SIGTERM to the agent: the run writes a checkpoint and says that it is preempted.
    agent = start_agent(sweep, "--forward-signals")
    (run,) = wait_for(lambda: [run for run in server.of_sweep(sweep) if len(rows(run)) >= 2])
    agent.send_signal(signal.SIGTERM)
    agent.wait(timeout=600)
    log = (tmp_path / "agents.log").read_text()
    wait_for(lambda: run.exit_codes, 30)
    assert (run.state, run.exit_codes) == ("preempted", [143]), log
    (folder,) = (tmp_path / "runs").glob(f"*-{run.name}")
    saved = load_checkpoint(folder)["progress"]["global_step"]
    assert saved == read_metrics(folder)[-1]["global_step"] == rows(run)[-1]["global_step"]

    # Another agent gets the same run again, which goes on from there; then the server ends it early.
    server.stop_when = lambda run: rows(run)[-1:] and rows(run)[-1]["global_step"] >= saved + 64
    agent = start_agent(sweep, "--count=2")
    wait_for(lambda: len(run.exit_codes) == 2)
    assert (run.state, run.exit_codes, run.agents) == ("finished", [143, 0], ["agent0", "agent1"])
    steps = [row["global_step"] for row in rows(run)]
    assert steps == list(range(32, steps[-1] + 1, 32)) and steps[-1] >= saved + 64  # no row lost, none twice
    assert [row["global_step"] for row in read_metrics(folder)] == steps
    assert json.loads((folder / "summary.json").read_text())["exit_code"] == 130  # not a run to compare with whole ones

    # The agent goes on with the next suggestion, which is stopped as well: no failure, nothing queued again.
    assert agent.wait(timeout=1200) == 0
    first, second = server.of_sweep(sweep)
    assert (second.state, second.exit_codes) == ("finished", [0])
    assert server.sweeps[sweep].requeued == []
    for run in (first, second):
        point = run.point
        assert 0.0625 <= point["policy.learning_rate_factor"] <= 16
        rate = point[f"policy.learning_rate_by_scope.{point['policy.freeze']}"] * point["policy.learning_rate_factor"]
        assert run.config["algorithm.cfg.learning_rate"] == pytest.approx(rate)
        assert run.config["policy.learning_rates.value_head"] == point["policy.learning_rates.value_head"]
    assert first.point != second.point


def test_of_agents_at_once_one_is_killed_one_is_preempted_and_the_rest_of_the_grid_is_run(
    server, start_agent, tmp_path
):
    """Agents as on three machines; the runs are a script's, as the server and the agents are what is tried."""
    (tmp_path / "script.py").write_text(PREEMPTIBLE)
    grid = {"n": {"values": [1, 2, 3, 4]}}
    content = {"program": str(tmp_path / "script.py"), "method": "grid", "project": "vla-rl", "parameters": grid}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run(wandb_command("sweep", str(tmp_path / "sweep.yaml")), cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    (sweep,) = server.sweeps
    killed, preempted = (start_agent(sweep, "--forward-signals") for _ in range(2))
    wait_for(lambda: len([run for run in server.of_sweep(sweep) if run.history]) == 2)
    of_killed = children(killed.pid)
    lost, kept = sorted(server.of_sweep(sweep), key=lambda run: run.history[0]["pid"] not in of_killed)
    for pid in (*of_killed, killed.pid):
        os.kill(pid, signal.SIGKILL)
    preempted.send_signal(signal.SIGTERM)
    assert preempted.wait() == 0  # though its run is not over: deploy/ starts another agent for it
    wait_for(lambda: kept.exit_codes)
    assert (kept.state, kept.exit_codes, lost.exit_codes) == ("preempted", [143], [])
    lost.state = "crashed"  # as the server says after some minutes without a word

    assert start_agent(sweep).wait() == 0
    runs = server.of_sweep(sweep)
    assert sorted(run.point["n"] for run in runs) == [1, 2, 3, 4]
    assert [run.state for run in runs if run is not lost] == ["finished"] * 3
    assert [len(run.agents) for run in runs] == [2 if run is kept else 1 for run in runs]


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_run_that_its_agent_starts_again_goes_on_or_begins_anew(monkeypatch, tmp_path, checkpoint):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep0")
    monkeypatch.setenv("WANDB_RUN_ID", "run0")
    config = write_config(tmp_path, trainer__iterations=2)
    assert ppo_vla.main(["--config", str(config)]) == 0
    run = run_folder(tmp_path)
    if not checkpoint:  # killed before the first one
        shutil.rmtree(run / "checkpoints")
    assert ppo_vla.main(["--config", str(config), "--trainer.iterations=4"]) == 0
    steps = [row["global_step"] for row in read_metrics(run_folder(tmp_path)) if "train/approx_kl" in row]
    assert steps == [64, 128, 192, 256]
    first_rows = [row for row in read_metrics(run) if row["global_step"] == 0]
    episodes = [json.loads(line)["global_step"] for line in (run / "episodes.jsonl").read_text().splitlines()]
    assert len(first_rows) == 1 and episodes.count(0) == 8  # evaluated once before training, in either case


@pytest.mark.parametrize(("measure", "metric"), [("success", "success_rate"), ("return", "return")])
def test_the_workspace_is_saved_with_panels_that_name_what_is_logged(server, capsys, measure, metric):
    assert wandb_workspace.main([f"{ENTITY}/vla-rl", "--name=Mine", f"--measure={measure}"]) == 0
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == (ENTITY, "vla-rl", "Mine")
    assert f"{ENTITY}/vla-rl?nw=" in capsys.readouterr().out
    spec = json.loads(view["spec"])["section"]
    panels = [p for s in spec["panelBankConfig"]["sections"] for p in s["panels"]]
    text = json.dumps(panels)
    for name in (f"eval/{metric}", f"rollout/{metric}", "train/approx_kl", "eval/video", "audit/drift"):
        assert name in text
    assert ("success" in text) == (measure == "success")
    named = {m for p in panels for m in p["config"].get("metrics", [])}
    known = tracking.__doc__
    assert named and all(f"`{name}`" in known for name in named)  # the metric table
    assert "config:learning_rate.value" in text and "config:scope.value" in text
    assert spec["runSets"][0]["grouping"] == [{"section": "run", "name": "group"}]


@pytest.mark.parametrize("project", ["vla-rl", "a/b/c", "/vla-rl", ""])
def test_a_project_without_entity_is_refused(capsys, project):
    assert wandb_workspace.main([project]) == 2
    assert "not of the form entity/project" in capsys.readouterr().err
