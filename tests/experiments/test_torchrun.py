"""Whole runs of several processes, as torchrun starts them: one folder, the rows of one process, one end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ppo_vla
import pytest
from worlds import ROOT, rows_without_times, run_folder, write_config

from research.runs.checkpoint import load_checkpoint
from research.runs.folder import RunFolder, read_rows

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "experiments" / "ppo_vla.py"


@pytest.fixture
def torchrun(start_process):
    """Starts the main job, or another script, in so many processes."""

    def start(processes: int, *words: str, script: Path = SCRIPT) -> subprocess.Popen:
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        return start_process(*launcher, str(script), *words, PYTHONPATH=path)

    return start


def finished(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def evaluations(run: Path) -> list[tuple]:
    rows = read_rows(RunFolder(run).episodes)
    return [(r["global_step"], r["initial_state"], r["success"], r["length"], r["episode_return"]) for r in rows]


def test_two_processes_are_one_run_and_its_first_evaluation_is_that_of_one_process(tmp_path, torchrun):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    config = write_config(tmp_path / "two", trainer__num_eval_episodes=11, trainer__iterations=4)
    out = finished(torchrun(2, "--config", str(config)))
    one = write_config(tmp_path / "one", trainer__num_eval_episodes=11, trainer__iterations=1)
    assert ppo_vla.main(["--config", str(one)]) == 0
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
    before = [row for row in evaluations(two) if row[0] == 0]
    assert len(before) == 11 and before == [row for row in evaluations(one) if row[0] == 0]
    assert out.count("before:") == 1 and out.count("run folder:") == 1
    rows = rows_without_times(two)
    assert [row["global_step"] for row in rows] == [0, 64, 128, 192, 256, 256]
    assert rows[1].keys() == rows_without_times(one)[1].keys()
    assert sum(row.get("rollout/episodes", 0) for row in rows) > 0
    summary = json.loads(RunFolder(two).summary.read_text())
    assert summary["exit_code"] == 0 and summary["audit/frozen_ok"] and summary["global_step"] == 256

    # From the middle it goes on as it did, bit for bit; and it goes on with other numbers of processes.
    middle = RunFolder(two).checkpoints / "step_000000192"
    assert len(load_checkpoint(middle)["ranks"]) == 2
    finished(torchrun(2, f"--trainer.resume={middle}"))
    assert rows_without_times(two)[4:] == rows[4:]
    for processes in (1, 4):
        out = finished(torchrun(processes, f"--trainer.resume={two}", f"--trainer.iterations={5 + (processes > 1)}"))
        had = 2 if processes == 1 else 1
        assert f"the environments of {had} processes, and the run goes on with {processes}" in out
    assert rows_without_times(two)[-1]["global_step"] == 6 * 64


def started(torchrun, tmp_path: Path, *words: str) -> tuple[subprocess.Popen, list[int]]:
    """A long run of two processes, once it learns; and the two."""
    config = write_config(tmp_path, trainer__iterations=100000, trainer__save_freq=0, trainer__enable_eval=False)
    process = torchrun(2, "--config", str(config), *words)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        runs = list((tmp_path / "runs").glob("*/metrics.jsonl"))
        if runs and runs[0].read_text().count("train/approx_kl") > 3:
            break
        time.sleep(0.2)
    assert process.poll() is None, process.communicate()
    listed = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    ranks = [int(pid) for pid, parent, words in rows if int(parent) == process.pid and "ppo_vla" in words]
    assert len(ranks) == 2
    return process, ranks


def test_a_killed_rank_ends_the_run_and_leaves_a_checkpoint(tmp_path, torchrun):
    process, ranks = started(torchrun, tmp_path)
    os.kill(ranks[1], signal.SIGKILL)
    start = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - start < 60
    assert err.count("process 0: error: another process of this run has ended") == 1, err
    folder = RunFolder(run_folder(tmp_path))
    assert folder.last_checkpoint is not None and folder.stopped_by == "error"
    done = load_checkpoint(folder.path)["progress"]["iteration"]
    finished(torchrun(2, f"--trainer.resume={folder}", f"--trainer.iterations={done + 1}"))


@pytest.mark.parametrize("whom", ["one rank", "torchrun"])
def test_a_signal_stops_all_ranks_after_the_iteration_and_auto_goes_on(tmp_path, torchrun, whom):
    """A scheduler signals torchrun, which hands it on to all of its processes."""
    process, ranks = started(torchrun, tmp_path, "--trainer.sharding=full")
    os.kill(*((ranks[1], signal.SIGUSR1) if whom == "one rank" else (process.pid, signal.SIGTERM)))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    folder = RunFolder(run_folder(tmp_path))
    assert folder.stopped_by == "signal", err
    state = load_checkpoint(folder.path)
    assert len(state["ranks"]) == 2
    assert state["progress"]["global_step"] == rows_without_times(folder.path)[-1]["global_step"]
    if whom == "torchrun":
        more = f"--trainer.iterations={state['progress']['iteration'] + 1}"
        out = finished(torchrun(2, f"--config={tmp_path / 'config.json'}", "--trainer.resume=auto", more))
        assert "start anew" not in out and len(list((tmp_path / "runs").iterdir())) == 1


def test_the_error_of_one_rank_is_said_once_and_ends_all(tmp_path, torchrun):
    config = write_config(
        tmp_path, trainer__env="gym:user_package.breaking:BreaksInRank1", trainer__env_config={"success_return": 1e9},
        trainer__iterations=50, policy__action_dim=1,
        policy__vla_config={"model_config": {"modalities": ["proprio"], "hidden_size": 16}},
    )  # fmt: skip
    process = torchrun(2, "--config", str(config))
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert err.count("process 1: error: gym:user_package.breaking:BreaksInRank1") == 1 and "the gripper is loose" in err
    assert err.count("error: another process of this run has ended") == 1


def test_groups_of_unequal_episodes_in_two_processes_are_counted_in_both(tmp_path, torchrun):
    """Rewards are distances, so that no group is left out, and all control steps are learned from."""
    config = write_config(
        tmp_path, trainer__env="gym:user_package.reach_env:ReachEnv", trainer__enable_eval=False,
        trainer__env_config={"keys": {"proprio": "state"}}, policy__action_dim=2,
        policy__vla_config={"model_config": {"modalities": ["proprio"], "hidden_size": 16}},
        algorithm={"name": "grpo", "cfg": {"groups": 4, "group_size": 4, "batch_size": 64, "max_steps": 15}},
    )  # fmt: skip
    finished(torchrun(2, "--config", str(config), script=SCRIPT.with_name("grpo_vla.py")))
    rows = [row for row in rows_without_times(run_folder(tmp_path)) if "train/groups" in row]
    assert len(rows) == 3 and all(row["train/groups"] == 4 and row["rollout/episodes"] == 16 for row in rows)
    assert all(row["rollout/groups_left_out"] == 0 and "rollout/decisions" not in row for row in rows)
    assert len({row["rollout/episode_length"] for row in rows}) > 1


def test_what_does_not_fit_is_one_line(tmp_path, torchrun):
    config = write_config(tmp_path)
    for words, said in (
        (
            ["--trainer.num_envs=9", "--trainer.buffer_size=63"],
            "trainer.num_envs: 9 cannot be divided among 2 processes",
        ),
        (["--trainer.num_eval_episodes=1"], "trainer.num_eval_episodes: 1 cannot be divided among 2 processes"),
        (["--trainer.device=cuda:0"], "trainer.device: 'cuda:0' is one GPU"),
    ):
        _, err = torchrun(2, "--config", str(config), *words).communicate(timeout=300)
        assert err.count("error: ") == 1 and said in err, err


def test_sharding_needs_several_processes(tmp_path, capsys):
    assert ppo_vla.main(["--config", str(write_config(tmp_path)), "--trainer.sharding=full"]) == 2
    assert "trainer.sharding: full needs several processes: start the script by torchrun" in capsys.readouterr().err
