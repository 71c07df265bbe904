"""Workers on a Ray cluster of two nodes: one is killed, and what two of them bring. `make test-cluster`."""

from __future__ import annotations

import os
import subprocess
import time
from functools import partial

import ppo_vla
import pytest
from collecting_worlds import working_env
from worlds import reach_policy, run_folder, write_config

from research.runs.folder import read_json
from research.runs.tracking import read_metrics
from research.training.asynchronous import AsynchronousRollouts

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e .[ray]")
from ray.cluster_utils import Cluster  # noqa: E402

from research.training.ray_workers import RayWorkers  # noqa: E402

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

STEP_S = 0.002  # of a core, for a step of all environments of a worker


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with two cores each; the first is that of the main process."""
    for name, value in (("memory_monitor_refresh_ms", "0"), ("worker_niceness", "0")):
        monkeypatch.setenv(f"RAY_{name}", value)  # what others on this machine do is not tested
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.other = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def collecting(cluster: Cluster, workers: int, steps: int = 100) -> AsynchronousRollouts:
    make_env, start = partial(working_env, seconds=STEP_S), partial(RayWorkers, address=cluster.address)
    envs = 4 * workers
    return AsynchronousRollouts(
        make_env, envs, reach_policy("backbone"), workers, envs * steps, 10**6, seed=0, start=start
    )


def nodes_of(rollouts: AsynchronousRollouts) -> list[str]:
    ask = lambda worker: ray.get_runtime_context().get_node_id()  # noqa: E731
    return ray.get([actor.__ray_call__.remote(ask) for actor in rollouts.workers.collector.remote_collectors])


def test_a_worker_whose_node_is_killed_goes_on_on_the_other(cluster):
    rollouts = collecting(cluster, 2)
    try:
        here = ray.get_runtime_context().get_node_id()
        rollouts.next()
        nodes = nodes_of(rollouts)
        assert len(set(nodes)) == 2 and here in nodes
        cluster.remove_node(cluster.other, allow_graceful=False)
        cut_off = False
        while not cut_off:
            part, cut_off = rollouts.workers.receive()
        assert part["worker"][0, 0] == nodes.index(next(node for node in nodes if node != here))
        assert nodes_of(rollouts) == [here, here]
        rollouts.next()
        assert rollouts.metrics()["rollout/workers_replaced"] == 1
    finally:
        rollouts.shutdown()


def test_two_workers_collect_more_than_one(cluster):
    speeds = []
    for workers in (1, 2):
        rollouts = collecting(cluster, workers)
        try:
            for _ in range(2):
                rollouts.next()
            start, collected = time.perf_counter(), 0
            for _ in range(5):
                collected += rollouts.next().numel()
            speeds.append(collected / (time.perf_counter() - start))
        finally:
            rollouts.shutdown()
        print(f"{workers} workers on {os.cpu_count()} cores: {speeds[-1]:.0f} env steps/s")
    print(f"2 workers over 1: {speeds[1] / speeds[0]:.2f}")
    assert speeds[1] > speeds[0]


def test_the_main_job_collects_on_a_cluster(cluster, tmp_path):
    config = write_config(tmp_path, trainer__buffer_type="vla", trainer__num_collectors=2, trainer__iterations=4)
    argv = ["--config", str(config), "--trainer.collector=ray", f"--trainer.ray_address={cluster.address}"]
    assert ppo_vla.main(argv) == 0
    run = run_folder(tmp_path)
    rows = [row for row in read_metrics(run) if "train/approx_kl" in row]
    assert [row["global_step"] for row in rows] == [64, 128, 192, 256]
    assert all(row["rollout/workers_replaced"] == 0 for row in rows)
    assert rows[-1]["rollout/worker_0/env_steps_per_second"] > 0
    assert read_json(run / "summary.json")["exit_code"] == 0
    listed = subprocess.run(["ps", "-wweo", "args="], capture_output=True, text=True).stdout
    assert "ray::RayWorker" not in listed and "ray::worker" not in listed
