"""Episodes are followed across rollouts, environment by environment, and counted by the rollout in which they began."""

from __future__ import annotations

import io

import pytest
import torch
from tensordict import TensorDict

from research.training import episodes
from research.training.episodes import EpisodeStatistics


def rollout(reward, done, success=None) -> TensorDict:
    """Lists `[M][T]`, of which done and success may be 0 and 1."""
    entries = {"reward": torch.tensor(reward, dtype=torch.float32), "done": torch.tensor(done, dtype=torch.bool)}
    if success is not None:
        entries["success"] = torch.tensor(success, dtype=torch.bool)
    shape = entries["done"].shape
    return TensorDict({"next": {key: value[..., None] for key, value in entries.items()}}, batch_size=shape)


def test_episode_statistics_cross_rollouts():
    statistics = EpisodeStatistics(2)
    statistics.observe(rollout([[1, 2], [5, 6]], [[0, 1], [0, 0]], [[0, 1], [0, 0]]))
    assert statistics.metrics() == {}  # one of the two that began at the start has not ended
    assert statistics.running_return.tolist() == [0.0, 11.0]
    statistics.observe(rollout([[3, 4], [7, 8]], [[0, 0], [0, 1]], [[0, 0], [0, 0]]))
    assert statistics.metrics() == {
        "rollout/return": (3 + 26) / 2, "rollout/episode_length": (2 + 4) / 2, "rollout/episodes": 2.0,
        "rollout/success_rate": 0.5,
    }  # fmt: skip
    assert statistics.running_return.tolist() == [7.0, 0.0]
    assert statistics.metrics() == {}


def test_rows_of_another_worker_are_followed_apart():
    """Parts arrive in any order, also two of one worker in a row; each goes on where that worker's last one ended."""
    statistics = EpisodeStatistics(4)
    for worker, reward, ends in ((0, 1.0, 0), (0, 1.0, 1), (1, 10.0, 0), (1, 10.0, 1)):
        rows = slice(2 * worker, 2 * worker + 2)
        statistics.observe(rollout([[reward] * 2] * 2, [[0, ends], [ends, 0]]), rows)
    assert statistics.running_length.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert statistics.metrics() == {}  # rows 1 and 3 have begun a second episode in this rollout
    for worker, reward in ((1, 10.0), (0, 1.0)):
        rows = slice(2 * worker, 2 * worker + 2)
        statistics.observe(rollout([[reward] * 2] * 2, [[0, 0], [0, 1]]), rows)
    metrics = statistics.metrics()
    assert metrics == {
        "rollout/return": (4 + 3 + 3 + 40 + 30 + 30) / 6, "rollout/episode_length": (4 + 3 + 3) / 3,
        "rollout/episodes": 6.0,
    }  # fmt: skip


def test_tasks_are_told_apart_and_chunks_count_their_control_steps():
    """The task of an id is its remainder; a task of which no episode has ended is left out."""
    statistics = EpisodeStatistics(3, task_names=("reach", "push", "open"))
    part = rollout([[1, 1], [0, 0], [0, 2]], [[1, 1], [0, 1], [0, 1]], [[1, 0], [0, 0], [1, 0]])
    part["next", "initial_state"] = torch.tensor([[9, 6], [4, 4], [3, 3]])[..., None]
    part["next", "env_steps"] = torch.tensor([[4, 2], [4, 4], [4, 1]])[..., None]
    part["next", "success_now"] = torch.tensor([[0, 0], [0, 0], [0, 0]], dtype=torch.bool)[..., None]
    statistics.observe(part)
    assert statistics.metrics() == {
        "rollout/return": 1.0, "rollout/episode_length": (4 + 2 + 8 + 5) / 4, "rollout/episodes": 4.0,
        "rollout/success_rate": 0.5, "rollout/success_rate/reach": 2 / 3, "rollout/success_rate/push": 0.0,
        "rollout/success_at_end": 0.0,
    }  # fmt: skip


def play(statistics: EpisodeStatistics, rollouts: int, seed: int = 0, rows: int = 8) -> list[dict]:
    """Half of all episodes succeed, after 2 steps; the others fail, after 9. Rollouts of 4 steps."""
    generator, reports = torch.Generator().manual_seed(seed), []
    succeeds, clock = torch.rand(rows, generator=generator) < 0.5, torch.zeros(rows)
    for _ in range(rollouts):
        done, success = torch.zeros(2, rows, 4, dtype=torch.bool)
        for t in range(4):
            clock += 1
            done[:, t] = clock >= torch.where(succeeds, 2, 9)
            success[:, t] = done[:, t] & succeeds
            succeeds = torch.where(done[:, t], torch.rand(rows, generator=generator) < 0.5, succeeds)
            clock[done[:, t]] = 0
        statistics.observe(rollout(torch.ones(rows, 4).tolist(), done.tolist(), success.tolist()))
        reports.append(statistics.metrics())
    return reports


def test_the_first_reports_are_as_fair_as_later_ones():
    """Of 2,000 environments, half of whose episodes succeed early: by when they end the first report would say 1.00."""
    reports = [report for report in play(EpisodeStatistics(2000), rollouts=7, rows=2000) if report]
    assert len(reports) >= 3
    for report in reports:
        assert report["rollout/success_rate"] == pytest.approx(0.5, abs=4 * 0.5 / report["rollout/episodes"] ** 0.5)
        assert report["rollout/episode_length"] == pytest.approx(5.5, abs=0.35)


def test_every_episode_is_counted_once():
    statistics = EpisodeStatistics(8)
    reports = [report for report in play(statistics, rollouts=60) if report]
    lengths = sum(report["rollout/episode_length"] * report["rollout/episodes"] for report in reports)
    waiting = sum(float(sums[0, 2]) for sums in statistics.state_dict()["sums"].values())
    assert lengths + waiting + float(statistics.running_length.sum()) == 8 * 60 * 4


def test_success_counts_at_any_step_of_an_episode():
    """Across the boundary of rollouts too; where an episode goes on after success, both forms are reported."""
    statistics = EpisodeStatistics(1)
    statistics.observe(rollout([[0, 0]], [[0, 0]], [[0, 1]]))
    statistics.metrics()
    statistics.observe(rollout([[0, 0, 0, 0]], [[0, 1, 0, 1]], [[0, 0, 0, 1]]))
    first = statistics.metrics()
    assert first["rollout/success_rate"] == 1.0 and first["rollout/success_at_end"] == 0.5
    second = play(statistics, rollouts=12, rows=1)[-1]
    assert second["rollout/success_at_end"] == second["rollout/success_rate"]  # once reported, always
    assert "rollout/success_at_end" not in play(EpisodeStatistics(8), rollouts=9)[-1]


def test_a_resumed_run_reports_the_same():
    whole, part, resumed = EpisodeStatistics(8), EpisodeStatistics(8), EpisodeStatistics(8)
    expected = play(whole, rollouts=20)
    play(part, rollouts=3)
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state_dict().keys() == part.state_dict().keys()

    def later(statistics, seen):
        generator = torch.Generator().manual_seed(1)
        for _ in range(seen):
            done = torch.rand(8, 4, generator=generator) < 0.3
            statistics.observe(rollout(torch.ones(8, 4).tolist(), done.tolist(), done.tolist()))
            yield statistics.metrics()

    assert list(later(resumed, 10)) == list(later(part, 10))
    assert any(expected)


def test_the_state_of_an_earlier_version_is_taken():
    statistics = EpisodeStatistics(2)
    statistics.load_state_dict({"return": torch.tensor([1.0, 2.0]), "length": torch.tensor([3.0, 4.0])})
    statistics.observe(rollout([[1], [1]], [[1], [1]]))
    assert statistics.metrics()["rollout/return"] == 2.5


def test_an_episode_that_never_ends_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(episodes, "PATIENCE", 3)
    statistics = EpisodeStatistics(2)
    reports = []
    for _ in range(6):  # one row ends an episode in every rollout, the other one never
        statistics.observe(rollout([[1.0, 1.0], [0.0, 0.0]], [[0, 1], [0, 0]]))
        reports.append(statistics.metrics())
    assert reports[:3] == [{}] * 3
    assert all(report["rollout/episodes"] == 1 and report["rollout/return"] == 2 for report in reports[3:])


def test_episodes_are_endless_where_the_shortest_under_way_is_too_long():
    statistics = EpisodeStatistics(2)
    statistics.observe(rollout([[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [1, 0, 0]]))
    assert statistics.describe_endless(1).startswith("no episode has ended in the last 2 control steps")
    assert statistics.describe_endless(2) is None
    statistics.observe(rollout([[0, 0], [0, 0]], [[0, 0], [0, 1]]))
    assert statistics.describe_endless(0) is None
