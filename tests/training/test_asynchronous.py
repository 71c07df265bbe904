"""Collection during the update: workers get new weights and prove it, and stale transitions are treated as such."""

from __future__ import annotations

import json
from dataclasses import replace

import ppo_vla
import pytest
import torch
from assembling import make_worker_env
from collecting_worlds import Delivering, prove_versions
from tensordict import assert_close
from worlds import reach_env, reach_policy, run_folder, write_config

from research.config import TrainerConfig
from research.runs.tracking import read_metrics
from research.training.asynchronous import AsynchronousRollouts
from research.training.rollout import Rollouts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def asynchronous():
    policy = reach_policy()
    rollouts = AsynchronousRollouts(reach_env, 8, policy, 2, 8 * 6, max_staleness=3, seed=0)
    rollouts.whole = policy
    yield rollouts
    rollouts.shutdown()


def test_workers_prove_that_they_got_new_weights(asynchronous):
    prove_versions(asynchronous, asynchronous.whole)


def test_what_is_too_stale_is_thrown_away_and_reported(asynchronous):
    asynchronous.max_staleness = 0
    asynchronous.publish()
    asynchronous.next()  # what was on its way is older than that
    metrics = asynchronous.metrics()
    assert metrics["rollout/discarded"] > 0
    assert metrics["rollout/staleness_max"] == 0
    asynchronous.max_staleness = 3


def test_workers_send_what_the_update_reads_and_nothing_else():
    """What arrives, before the main process has touched it, is what `Rollouts` keeps of the same steps."""
    policy = reach_policy("backbone")
    asynchronous = AsynchronousRollouts(reach_env, 4, policy, 1, 4 * 8, max_staleness=0, seed=5)
    try:
        arrived = [asynchronous.workers.receive()[0] for _ in range(2)]
    finally:
        asynchronous.shutdown()
    rollouts = Rollouts(reach_env(), policy, 4 * 8)
    rollouts.collector.set_seed(5)
    rollouts.collector.reset()
    torch.manual_seed(5)
    for rollout in arrived:
        kept = {"hidden", "action", "action_log_prob", "state_value", "policy_version", "worker", "next"}
        assert set(rollout.keys()) == kept and (rollout["worker"] == 0).all()
        assert "observation" not in rollout["next"].keys()
        sent = sum(v.untyped_storage().nbytes() for v in rollout.values(True, True)) / rollout.numel()
        assert sent == 106  # the features are 64 of them; pixels would be 768
        expected = rollouts.next()
        assert (expected["next", "truncated"][:, :-1] & (expected["next", "final_value"][:, :-1] != 0)).any()
        assert_close(rollout.exclude("worker"), expected, rtol=1e-4, atol=1e-5)
        score = policy.actor.get_dist(rollout.select("hidden", "action")).log_prob(rollout["action"])
        torch.testing.assert_close(score, rollout["action_log_prob"], rtol=0, atol=1e-5)


def test_the_main_job_collects_while_it_updates(tmp_path):
    config = write_config(tmp_path, trainer__buffer_type="vla", trainer__num_collectors=2, trainer__iterations=4)
    assert ppo_vla.main(["--config", str(config)]) == 0
    run = run_folder(tmp_path)
    rows = [row for row in read_metrics(run) if "train/approx_kl" in row]
    assert [row["global_step"] for row in rows] == [64, 128, 192, 256]
    assert all(0 <= row["rollout/staleness_mean"] <= row["rollout/staleness_max"] <= 2 for row in rows)
    assert max(row["rollout/staleness_max"] for row in rows) >= 1
    assert json.loads((run / "summary.json").read_text())["exit_code"] == 0
    argv = ["--config", str(run / "config.json"), f"--trainer.resume={run}", "--trainer.iterations=5"]
    assert ppo_vla.main(argv) == 0
    rows = [row for row in read_metrics(run) if "train/approx_kl" in row]
    assert [row["global_step"] for row in rows] == [64, 128, 192, 256, 320]


def test_what_is_thrown_away_was_taken_and_each_task_has_its_success():
    options = {"max_staleness": 0, "seed": 3, "start": Delivering, "task_names": ("push", "reach")}
    rollouts = AsynchronousRollouts(reach_env, 4, reach_policy(), 2, 4 * 3, **options)
    workers = rollouts.workers
    rollouts.publish()
    workers.parts = [workers.part(0, 0, [0, 1]), workers.part(1, 1, [2, 3]), workers.part(0, 1, [4, 5])]
    assert rollouts.next().numel() == 12 and rollouts.env_steps == 18
    metrics = rollouts.metrics()
    assert metrics["rollout/discarded"] == 6
    assert metrics["rollout/success_rate/push"] == 1 and metrics["rollout/success_rate/reach"] == 0
    workers.parts = [workers.part(0, 1, [0, 1]), workers.part(1, 1, [2, 3])]
    assert rollouts.next().numel() == 12 and rollouts.env_steps == 12 and rollouts.metrics()["rollout/discarded"] == 0
    assert not rollouts.load_state_dict({}, 4096) and workers.seeds[1] not in (3, workers.seeds[0])


def test_workers_have_the_tasks_of_their_rows_among_all():
    config = {"task": ["reach-v3", "push-v3", "coffee-pull-v3", "door-open-v3"], "modalities": ["proprio"]}
    pytest.importorskip("metaworld")
    trainer = TrainerConfig(
        env="metaworld", env_config=config, num_envs=4, num_collectors=2, buffer_size=20, buffer_type="vla"
    )
    cpu, tasks = torch.device("cpu"), []
    for rank, worker in ((0, 0), (0, 1), (1, 0), (1, 1)):
        env = make_worker_env(replace(trainer, num_envs=2), cpu, rank, 2, worker)
        env.set_seed(100 + worker)  # as the collector does
        tasks.append([env.draw_states(1).item() % 4 for _ in range(4)])
        env.close()
    assert tasks == [[row] * 4 for row in range(4)]  # as many rows as tasks: each keeps its own
