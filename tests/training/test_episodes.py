"""Episodes are followed across rollouts, environment by environment, whichever worker they come from."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from research.training.episodes import EpisodeStatistics


def test_episode_statistics_cross_rollouts():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    dones = torch.tensor([[False, True, False, False], [False, False, False, True]])
    success = torch.tensor([[False, True, False, False], [False, False, False, False]])
    statistics = EpisodeStatistics(2)

    def rollout(columns: slice) -> TensorDict:
        r, d, s = (x[:, columns, None] for x in (rewards, dones, success))
        return TensorDict({"next": {"reward": r, "done": d, "success": s}}, batch_size=[2, 2])

    statistics.observe(rollout(slice(0, 2)))
    first = statistics.metrics()
    statistics.observe(rollout(slice(2, 4)))
    second = statistics.metrics()
    assert first == {
        "rollout/return": 3.0, "rollout/episode_length": 2.0, "rollout/episodes": 1.0, "rollout/success_rate": 1.0
    }  # fmt: skip
    assert second["rollout/return"] == 26.0 and second["rollout/episode_length"] == 4.0
    assert second["rollout/success_rate"] == 0.0
    assert statistics.running_return.tolist() == [7.0, 0.0]
    assert statistics.metrics() == {}


def test_rows_of_another_worker_are_followed_apart():
    """Parts arrive in any order, also two of one worker in a row; each goes on where that worker's last one ended."""
    statistics = EpisodeStatistics(4)

    def part(reward: float, ends: bool) -> TensorDict:
        done = torch.tensor([[[False], [ends]], [[False], [False]]])
        return TensorDict({"next": {"reward": torch.full((2, 2, 1), reward), "done": done}}, batch_size=[2, 2])

    for worker, reward, ends in ((0, 1.0, False), (0, 1.0, True), (1, 10.0, False), (1, 10.0, True), (0, 1.0, False)):
        statistics.observe(part(reward, ends), slice(2 * worker, 2 * worker + 2))
    metrics = statistics.metrics()
    assert metrics == {"rollout/return": (4 + 40) / 2, "rollout/episode_length": 4.0, "rollout/episodes": 2.0}
    assert statistics.running_length.tolist() == [2.0, 6.0, 0.0, 4.0]
