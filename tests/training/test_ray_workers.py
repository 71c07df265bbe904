"""Workers of Ray: what they are sent, what they prove, and that one which is lost is replaced."""

from __future__ import annotations

import logging
import os
import signal

import pytest
from collecting_worlds import absent_env, breaking_env, hanging_env, prove_versions
from worlds import reach_env, reach_policy

from research.errors import SimulatorFailed, UserError
from research.training.asynchronous import AsynchronousRollouts

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e .[ray]")
from research.training import ray_workers  # noqa: E402
from research.training.ray_workers import RayWorkers, connect  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, for all tests: it takes seconds to start."""
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # which ends workers where others take the memory
    assert connect(None, 4) and not connect(None, 4)
    yield
    ray.shutdown()


def collecting(policy, make_env=reach_env, timeout: float = 60.0) -> AsynchronousRollouts:
    return AsynchronousRollouts(make_env, 8, policy, 2, 8 * 6, 3, seed=0, timeout=timeout, start=RayWorkers)


@pytest.fixture(scope="module")
def policy():
    return reach_policy("backbone")


@pytest.fixture(scope="module")
def rollouts(cluster, policy):
    rollouts = collecting(policy)
    yield rollouts
    rollouts.shutdown()


def test_workers_of_ray_prove_that_they_got_new_weights(rollouts, policy):
    prove_versions(rollouts, policy)
    metrics = rollouts.metrics()
    assert metrics["rollout/workers_replaced"] == 0
    assert all(metrics[f"rollout/worker_{worker}/env_steps_per_second"] > 0 for worker in (0, 1))


def test_trainable_weights_alone_are_sent(rollouts, policy):
    rollouts.publish()
    posted = rollouts.workers.mailbox.posted
    sent = ray.experimental.get_object_locations([posted])[posted]["object_size"]
    parameters = list(policy.model.parameters())
    trained, frozen = (sum(p.nbytes for p in parameters if p.requires_grad == which) for which in (True, False))
    assert trained <= sent < trained + 1024 * (1 + sum(p.requires_grad for p in parameters)) < trained + frozen


def test_a_worker_whose_process_is_killed_is_replaced(rollouts, policy, caplog):
    victim = rollouts.workers.collector.remote_collectors[1]
    rollouts.next()
    version = rollouts.policy.version.item()
    pid = ray.get(victim.__ray_call__.remote(lambda worker: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    rollouts.max_staleness = 100
    with caplog.at_level(logging.WARNING):
        cut_off = False
        while not cut_off:  # the other one goes on meanwhile
            part, cut_off = rollouts.workers.receive()
    assert (part["worker"] == 1).all()
    assert (part["policy_version"] == version).all()  # the latest weights, though it was made with the first
    assert rollouts.workers.metrics()["rollout/workers_replaced"] == 1
    assert "worker 1 was lost (ActorDiedError" in caplog.text
    assert rollouts.next().shape == (8, 6)


def test_what_an_environment_raises_in_a_worker_of_ray_is_said_here(cluster, policy):
    rollouts = collecting(policy, breaking_env)
    try:
        with pytest.raises(SimulatorFailed, match=r"^worker 1: physics exploded$"):
            for _ in range(1000):
                rollouts.next()
    finally:
        rollouts.shutdown()


def test_a_worker_of_ray_that_cannot_start_is_one_line(cluster, policy):
    with pytest.raises(
        UserError, match=r"a worker of Ray ended while it started: worker 0: trainer.env: no such thing$"
    ):
        collecting(policy, absent_env)


def test_a_worker_that_is_lost_again_and_again_ends_the_run(cluster, policy, monkeypatch):
    """It hangs, is given up after 2 s, and its successors hang too."""
    monkeypatch.setattr(ray_workers, "FIRST_S", 2.0)
    monkeypatch.setattr(ray_workers, "LOST_IN_A_ROW", 0)
    rollouts = collecting(policy, hanging_env, timeout=2.0)
    try:
        with pytest.raises(SimulatorFailed, match=r"^worker 1 was lost 1 times in a row: it took no step for 2 s"):
            for _ in range(1000):
                rollouts.next()
    finally:
        rollouts.shutdown()


def test_a_cluster_that_is_not_there_or_too_small_is_one_line(cluster, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", absent_cluster)
    with pytest.raises(UserError, match=r"trainer.ray_address: no cluster of Ray can be joined at '10.0.0.1:6379'"):
        connect("10.0.0.1:6379", 2)
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(UserError, match=r"trainer.num_collectors: 9 workers need a core each, but .* has 4"):
        connect("auto", 9)


def absent_cluster(*_, **__):
    raise ConnectionError("nobody answers")
