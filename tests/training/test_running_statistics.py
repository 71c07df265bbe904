"""Running statistics of rewards and of proprio: as others compute them, by hand, in one process and in several."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import algorithms
import numpy as np
import ppo_vla
import pytest
import torch
from algorithms import make_ppo, make_proprio_statistics, make_reward_scaling
from tensordict import TensorDict
from torch import nn
from worlds import gae, reach_env, rows_without_times, run_folder, write_config

from agents.normalisation import RunningNormalisation
from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from agents.state_mlp import StateMLP
from research.config import ExperimentConfig, PPOConfig, TrainerConfig
from research.errors import UserError
from research.runs.folder import RunFolder
from research.training.algorithm import Progress
from research.training.audit import FreezeAudit
from research.training.collecting_policy import CollectingPolicy
from research.training.ratio import largest_log_ratio
from research.training.rollout import WORKER, Rollouts
from research.training.running_statistics import ProprioStatistics, RewardScaling
from research.training.workers import WeightMailbox

GAMMA = 0.9


def rollout_of(rows: int, steps: int, seed: int, ends: float = 0.2, scale: float = 3.0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    reward = scale * torch.randn(rows, steps, 1, generator=generator) + 1
    done = torch.rand(rows, steps, 1, generator=generator) < ends
    return TensorDict({"next": {"reward": reward, "done": done}}, [rows, steps])


def discounted_sums(rollouts: list[TensorDict]) -> np.ndarray:
    """`VecNormalize.step_wait` of Stable-Baselines3, with what follows from its resets: every R that it takes in."""
    returns, seen = np.zeros(rollouts[0].shape[0]), []
    for rollout in rollouts:
        for t in range(rollout.shape[1]):
            reward, done = (rollout["next", key][:, t, 0].numpy() for key in ("reward", "done"))
            returns = returns * GAMMA + reward
            seen.append(returns.copy())
            returns[done] = 0
    return np.concatenate(seen)


def test_rewards_are_scaled_by_the_deviation_of_their_discounted_sum():
    rollouts = [rollout_of(4, 9, seed) for seed in (1, 2)]
    scaling = RewardScaling(GAMMA, num_envs=4, share=4)
    for k, rollout in enumerate(rollouts, start=1):
        before = rollout["next", "reward"].clone()
        scaled = scaling(rollout)["next", "reward"]
        deviation = np.sqrt(discounted_sums(rollouts[:k]).var() + 1e-8)  # of all that was ever seen
        np.testing.assert_allclose(scaled, before / deviation, rtol=1e-5)
        assert torch.equal(rollout["next", "reward"], before)  # rollout/return has them as they are


def test_scaled_rewards_lie_within_ten():
    rollout = rollout_of(2, 200, 1, scale=0.0)
    rollout["next", "reward"][:] = 0.0
    rollout["next", "reward"][0, 7], rollout["next", "reward"][1, 9] = 5.0, -5.0
    rollout["next", "done"][:] = True
    scaled = RewardScaling(GAMMA, 2, 2)(rollout)["next", "reward"]
    assert scaled.max() == 10 and scaled.min() == -10 and (scaled == 0).sum() == 398


def test_rewards_of_zero_stay_zero():
    rollout = rollout_of(2, 5, 1)
    rollout["next", "reward"][:] = 0.0
    assert not RewardScaling(GAMMA, 2, 2)(rollout)["next", "reward"].any()


def test_parts_of_workers_may_come_in_any_order():
    first, second = rollout_of(4, 6, 1), rollout_of(4, 6, 2)
    expected = RewardScaling(GAMMA, 4, 2)
    results = [expected(rollout)["next", "reward"] for rollout in (first, second)]
    for rollout in (first, second):
        rollout.set(WORKER, torch.tensor([0, 0, 1, 1])[:, None].expand(4, 6))
    scaling = RewardScaling(GAMMA, 4, 2)
    turned = [scaling(torch.cat([r[2:], r[:2]]))["next", "reward"].roll(2, 0) for r in (first, second)]
    for one, two in zip(results, turned, strict=True):
        torch.testing.assert_close(one, two)
    assert torch.equal(scaling.sums, expected.sums)


class Rank:
    """One of two threads, as processes would be."""

    def __init__(self, rank: int, barrier: threading.Barrier, told: dict):
        self.rank, self.size, self.barrier, self.told = rank, 2, barrier, told

    def gather(self, value):
        self.told[self.rank] = value
        self.barrier.wait()
        values = [self.told[rank] for rank in range(2)]
        self.barrier.wait()
        return values


def in_two(work) -> list:
    barrier, told, results = threading.Barrier(2, timeout=30), {}, [None, None]

    def run(rank: int) -> None:
        results[rank] = work(Rank(rank, barrier, told), slice(2 * rank, 2 * rank + 2))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_processes_scale_as_one_and_go_on_as_one():
    rollouts = [rollout_of(4, 6, seed) for seed in (1, 2, 3)]
    one = RewardScaling(GAMMA, 4, 4)
    expected = [one(rollout)["next", "reward"] for rollout in rollouts]

    def share(world, rows, state=None):
        scaling = RewardScaling(GAMMA, 2, 2, world)
        if state is not None:
            scaling.load_state_dict(state)
        return scaling, [scaling(rollout[rows])["next", "reward"] for rollout in rollouts[0 if state is None else 2 :]]

    (first, scaled), (second, others) = in_two(share)
    for a, b, whole in zip(scaled, others, expected, strict=True):
        torch.testing.assert_close(torch.cat([a, b]), whole)
    assert torch.equal(first.sums, one.sums) and torch.equal(second.sums, one.sums)
    # What one process left is gone on from by two.
    before = RewardScaling(GAMMA, 4, 4)
    for rollout in rollouts[:2]:
        before(rollout)
    (_, scaled), (_, others) = in_two(lambda world, rows: share(world, rows, before.state_dict()))
    torch.testing.assert_close(torch.cat([scaled[0], others[0]]), expected[2])


def test_a_checkpoint_holds_what_scaling_goes_on_from():
    one, two = RewardScaling(GAMMA, 4, 4), RewardScaling(GAMMA, 4, 4)
    one(rollout_of(4, 6, 1))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    rollout = rollout_of(4, 6, 2)
    assert torch.equal(one(rollout)["next", "reward"], two(rollout)["next", "reward"])


def state_policy() -> VLAPolicy:
    torch.manual_seed(0)
    return VLAPolicy(StateMLP(3, 3).eval())


def test_what_is_scored_is_what_acted_while_the_statistics_move():
    policy = state_policy()
    rollouts, statistics = Rollouts(reach_env(), policy, 32), ProprioStatistics(policy.model.normalisation)
    seen = []
    for _ in range(3):
        batch, _ = gae(policy)(rollouts.next())
        assert largest_log_ratio(policy, batch) < 1e-5
        seen.append(batch["observation", "proprio"])
        statistics(batch)
        assert largest_log_ratio(policy, batch) > 1e-3
    x, normalisation = torch.cat(seen), policy.model.normalisation
    torch.testing.assert_close(normalisation.mean, x.mean(0))
    torch.testing.assert_close(normalisation.scale(), x.std(0, correction=0).clamp(min=1e-4))


def test_two_processes_see_the_proprio_of_both():
    x = torch.randn(4, 3)
    models = in_two(lambda world, rows: show(world, x[rows]))
    for model in models:
        torch.testing.assert_close(model.normalisation.mean, x.mean(0))


def show(world, x: torch.Tensor) -> StateMLP:
    model = StateMLP(3, 3)
    ProprioStatistics(model.normalisation, world)(TensorDict({"observation": {"proprio": x}}, [2]))
    return model


def test_processes_that_collect_get_the_statistics_with_the_weights():
    policy = CollectingPolicy(state_policy())
    mailbox = WeightMailbox(policy)
    try:
        worker = copy.deepcopy(policy)
        policy.act.frozen.model.normalisation.update(torch.randn(8, 3))
        mailbox.post(policy)
        mailbox.deliver(worker)
        for name, buffer in worker.act.frozen.model.normalisation.named_buffers():
            assert torch.equal(buffer, policy.act.frozen.model.normalisation.get_buffer(name)) and buffer.any()
    finally:
        mailbox.remove()


def test_ppo_learns_from_scaled_rewards_and_shows_the_model_what_it_learned_from():
    policy, config = state_policy(), ExperimentConfig(TrainerConfig(num_envs=4))
    cfg = config.algorithm.cfg = PPOConfig(batch_size=16, normalize_reward=True, normalize_proprio=True)
    rollout = Rollouts(reach_env(), policy, 32).next()
    rollout["next", "reward"].normal_(std=50)
    ppo = make_ppo(config, policy, ["value_head"], rollout["observation"][:, 0])
    scaled = RewardScaling(cfg.gamma, 4, 4)(rollout)
    batch, _ = ppo.prepare(rollout)
    torch.testing.assert_close(batch["advantage"], gae(policy, cfg)(scaled)[0]["advantage"])
    assert (batch["advantage"] - gae(policy, cfg)(rollout)[0]["advantage"]).abs().max() > 1
    ppo.update(batch, Progress(1))
    assert policy.model.normalisation.count == 32


def test_statistics_amid_frozen_weights_are_saved_and_not_taken_for_frozen():
    trunk = nn.Sequential(RunningNormalisation(3), nn.Linear(3, 3)).requires_grad_(False)
    model = nn.ModuleDict({"trunk": trunk, "action_head": nn.Linear(3, 2)})
    audit = FreezeAudit(model)
    trunk[0].update(torch.randn(8, 3))
    audit.check("once they have moved")
    assert "trunk.0.mean" in audit.trained_state() and "trunk.1.weight" not in audit.trained_state()


def test_they_are_off_by_default_and_refused_where_the_model_has_none():
    config, policy = ExperimentConfig(), state_policy()
    assert make_reward_scaling(config) is None and make_proprio_statistics(config, policy) is None
    config.algorithm.cfg = PPOConfig(normalize_reward=True, normalize_proprio=True)
    assert make_reward_scaling(config).share == 64
    assert make_proprio_statistics(config, policy).normaliser is policy.model.normalisation
    with pytest.raises(UserError, match=r"normalize_proprio: SmallVLA has no RunningNormalisation.*StateMLP"):
        make_proprio_statistics(config, VLAPolicy(SmallVLA(3)))


def scaled_run(tmp_path) -> Path:
    """A configuration with all that normalises, and the folder of its run of four iterations."""
    config = write_config(
        tmp_path,
        trainer__env="gym:Pendulum-v1", trainer__env_config={"max_episode_steps": 13}, policy__action_dim=1,
        trainer__iterations=4, trainer__enable_eval=False, trainer__keep_checkpoints=9,
        policy__vla_config={"model_class": "agents.state_mlp.StateMLP"},
        algorithm__cfg={"batch_size": 32, "normalize_reward": True, "normalize_proprio": True, "clip_value": 0.2,
                        "huber_delta": 1.0, "dual_clip": 3.0},
    )  # fmt: skip
    assert ppo_vla.main(["--config", str(config)]) == 0
    return run_folder(tmp_path)


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    run = scaled_run(tmp_path)
    rows = rows_without_times(run)
    middle = RunFolder(run).checkpoints / "step_000000128"
    assert ppo_vla.main([f"--trainer.resume={middle}"]) == 0
    assert rows_without_times(run) == rows and len(rows) >= 4


@pytest.mark.parametrize("exactly", [True, False])
def test_where_episodes_start_anew_their_discounted_sums_do_too(tmp_path, monkeypatch, exactly):
    run = scaled_run(tmp_path)
    began_with = []

    class Watched(RewardScaling):
        def __call__(self, rollout):
            began_with.append(self.sums.clone())
            return super().__call__(rollout)

    monkeypatch.setattr(algorithms, "RewardScaling", Watched)
    if not exactly:
        monkeypatch.setattr(Rollouts, "load_state_dict", lambda self, state, env_steps: False)
    assert ppo_vla.main([f"--trainer.resume={RunFolder(run).checkpoints / 'step_000000128'}"]) == 0
    assert began_with[0].any() == exactly and began_with[1].any()
