"""research/imitation/demonstrations.py: samples by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from research.errors import UserError
from research.imitation.demonstrations import (
    count_by_task,
    count_samples,
    discounted_returns,
    only_successful,
    samples_of,
    samples_of_rollout,
    upcoming_actions,
)
from research.schema import Demonstration


def episode(rewards, every=1, task="reach", success=True, number=0) -> Demonstration:
    """Action t is [t], and the observation seen then [100 number + t]."""
    steps = np.arange(len(rewards), dtype=np.float32)
    looks = (100 * number + steps[::every])[:, None]
    return Demonstration(
        number, task, {"proprio": looks}, steps[:, None], np.array(rewards, np.float32), success, every
    )


def test_returns_are_discounted_to_the_episodes_end():
    rewards = torch.tensor([1.0, 0.0, 2.0, 4.0]).view(4, 1, 1)
    dones = torch.tensor([False, False, True, False]).view(4, 1, 1)
    assert discounted_returns(rewards, dones, 0.5).flatten().tolist() == [1.5, 1.0, 2.0, 4.0]


def test_returns_are_discounted_per_decision_of_several_steps():
    """Of two rows; a decision ends with its episode, and the next one begins behind it."""
    rewards = torch.tensor([[1.0, 1.0], [2.0, 0.0], [4.0, 8.0], [8.0, 2.0], [16.0, 1.0]])[..., None]
    dones = torch.tensor([[False, False], [False, False], [True, False], [False, False], [True, True]])[..., None]
    found = discounted_returns(rewards, dones, 0.5, executed=2).squeeze(-1)
    assert found[:, 0].tolist() == [1 + 2 + 4 / 2, 2 + 4, 4, 8 + 16, 16]
    assert found[:, 1].tolist() == [1 + (8 + 2) / 2 + 1 / 4, 8 + (2 + 1) / 2, 8 + 2 + 1 / 2, 2 + 1, 1]


def test_the_next_actions_repeat_the_last_of_the_episode():
    actions = torch.arange(5.0).view(5, 1, 1)
    dones = torch.tensor([False, False, True, False, False]).view(5, 1, 1)
    found = upcoming_actions(actions, dones, 3)
    assert found.shape == (5, 1, 3, 1)
    assert found.flatten(1).tolist() == [[0, 1, 2], [1, 2, 2], [2, 2, 2], [3, 4, 4], [4, 4, 4]]


def test_samples_of_episodes():
    whole = [episode([0, 0, 0, 0, 1], every=2, number=3), episode([0, 1], every=2, task="push", number=9)]
    data = samples_of(whole, horizon=3, executed=2, gamma=0.5)
    assert count_samples(whole) == len(data)
    assert data.batch_size == (4,)
    assert data["action"].squeeze(-1).tolist() == [[0, 1, 2], [2, 3, 4], [4, 4, 4], [0, 1, 1]]
    assert data["observation", "proprio"].flatten().tolist() == [300, 302, 304, 900]
    assert data["return"].flatten().tolist() == [0.25, 0.5, 1, 1]
    assert data["task"].flatten().tolist() == [0, 0, 0, 1] and data["episode"].flatten().tolist() == [0, 0, 0, 1]


def test_samples_of_a_rollout_are_those_of_its_episodes():
    """Two rows of three steps that are kept, of four; the same episodes one by one give the same samples."""
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[..., None]
    dones = torch.tensor([[False, True], [True, False], [False, False], [True, True]])[..., None]
    actions = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 2.0]])[..., None]
    seen = [TensorDict({"proprio": actions[t]}, [2]) for t in range(3)]
    data = samples_of_rollout(seen, actions, rewards, dones, horizon=2, executed=2, gamma=0.9)
    apart = samples_of([episode([0, 1]), episode([0, 1]), episode([1]), episode([0, 1, 1])], 2, 2, 0.9)
    order = [0, 4, 1, 5, 2, 6]  # of time first
    assert torch.equal(data["action"], apart["action"][order]) and torch.equal(data["return"], apart["return"][order])
    assert torch.equal(data["observation", "proprio"], apart["observation", "proprio"][order])
    assert data["episode"].flatten().tolist() == [0, 1, 0, 3, 2, 3]


def test_what_failed_is_left_out_and_what_nobody_judged_is_not():
    mixed = [episode([0], success=False), episode([1]), episode([0], success=None, task="push")]
    assert only_successful(mixed) == mixed[1:]
    assert count_by_task(mixed) == {
        "reach": {"episodes": 2, "successful": 1},
        "push": {"episodes": 1, "successful": None},
    }
    with pytest.raises(UserError, match="only_successful: all 1 demonstrations failed"):
        only_successful(mixed[:1])
