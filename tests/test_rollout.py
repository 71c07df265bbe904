"""Advantages against GAE written by hand, bootstraps, episode statistics, and NaN guards."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from research.config import PPOConfig
from research.ppo import make_gae
from research.rollout import EpisodeStatistics, FiniteGuard, bootstrap_values, prepare_batch
from research.schema import NonFiniteError

GAMMA, LAMBDA = 0.9, 0.8


def made_up_rollout(n: int = 6, t: int = 12) -> TensorDict:
    """Terminations and truncations in the middle and at the end, both at once never."""
    g = torch.Generator().manual_seed(3)
    terminated = torch.rand(n, t, 1, generator=g) < 0.15
    truncated = (torch.rand(n, t, 1, generator=g) < 0.15) & ~terminated
    terminated[0, -1], truncated[0, -1] = True, False
    truncated[1, -1], terminated[1, -1] = True, False
    assert terminated[:, :-1].any() and truncated[:, :-1].any()
    state = torch.randn(n, t, 2, generator=g)
    after = torch.randn(n, t, 2, generator=g)  # the next state; where no episode ends it is the next step's state
    ends = (terminated | truncated).squeeze(-1)
    after[:, :-1][~ends[:, :-1]] = state[:, 1:][~ends[:, :-1]]
    return TensorDict(
        {
            "observation": {"proprio": state},
            "action": torch.randn(n, t, 3, generator=g),
            "action_log_prob": torch.randn(n, t, generator=g),
            "state_value": values_of(state.flatten(0, 1)).view(n, t, 1),
            "next": {
                "observation": {"proprio": after},
                "reward": torch.randn(n, t, 1, generator=g),
                "terminated": terminated,
                "truncated": truncated,
                "done": terminated | truncated,
            },
        },
        batch_size=[n, t],
    )


def values_of(state: torch.Tensor) -> torch.Tensor:
    return (state * torch.tensor([1.5, -0.7])).sum(-1, keepdim=True).sin()


def gae_by_hand(rollout: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
    """Schulman et al. 2016, equation 16, in float64, one environment and one step at a time."""
    n, t = rollout.batch_size
    value = rollout["state_value"].double().squeeze(-1)
    following = values_of(rollout["next", "observation", "proprio"].double().flatten(0, 1)).view(n, t)
    advantage = torch.zeros(n, t, dtype=torch.float64)
    for i in range(n):
        running = 0.0
        for k in reversed(range(t)):
            terminated = bool(rollout["next", "terminated"][i, k])
            done = bool(rollout["next", "done"][i, k])
            target = rollout["next", "reward"][i, k].double() + (0.0 if terminated else GAMMA * following[i, k])
            running = target - value[i, k] + (0.0 if done else GAMMA * LAMBDA * running)
            advantage[i, k] = running
    return advantage, advantage + value


def step_values(steps: TensorDict) -> torch.Tensor:
    return values_of(steps["observation", "proprio"])


def test_advantages_equal_gae_by_hand():
    rollout = made_up_rollout()
    gae = make_gae(PPOConfig(gamma=GAMMA, gae_lambda=LAMBDA))
    batch = prepare_batch(rollout, step_values, gae, [])
    advantage, target = gae_by_hand(rollout)
    torch.testing.assert_close(batch["advantage"].double().view(6, 12), advantage, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch["value_target"].double().view(6, 12), target, rtol=0, atol=1e-5)


def test_bootstrap_asks_only_for_states_nobody_evaluated():
    rollout, asked = made_up_rollout(), []

    def values(steps: TensorDict) -> torch.Tensor:
        asked.append(len(steps))
        return step_values(steps)

    following = bootstrap_values(rollout, values)
    needs = rollout["next", "truncated"].clone()
    needs[:, -1] |= ~rollout["next", "terminated"][:, -1]
    assert asked == [int(needs.sum())]
    assert (following[rollout["next", "terminated"]] == 0).all()
    reference = step_values(rollout["next"].flatten(0, 1)).view(6, 12, 1)
    alive = ~rollout["next", "terminated"]
    torch.testing.assert_close(following[alive], reference[alive])


def test_nothing_is_asked_when_every_episode_terminates_at_the_end():
    rollout = made_up_rollout()
    rollout["next", "truncated"][:] = False
    rollout["next", "terminated"][:, -1] = True
    rollout["next", "done"] = rollout["next", "terminated"].clone()
    assert torch.isfinite(bootstrap_values(rollout, lambda steps: pytest.fail("asked for a value"))).all()


def test_batch_holds_what_the_update_reads_and_nothing_else():
    batch = prepare_batch(made_up_rollout(), step_values, make_gae(PPOConfig()), [("observation", "proprio")])
    assert batch.batch_size == (72,)
    keys = {"observation", "action", "action_log_prob", "state_value", "advantage", "value_target"}
    assert set(batch.keys()) == keys


def test_episode_statistics_cross_rollouts():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    dones = torch.tensor([[False, True, False, False], [False, False, False, True]])
    success = torch.tensor([[False, True, False, False], [False, False, False, False]])
    statistics = EpisodeStatistics(2)

    def rollout(columns: slice) -> TensorDict:
        r, d, s = (x[:, columns, None] for x in (rewards, dones, success))
        return TensorDict({"next": {"reward": r, "done": d, "success": s}}, batch_size=[2, 2])

    first, second = statistics.update(rollout(slice(0, 2))), statistics.update(rollout(slice(2, 4)))
    assert first == {
        "rollout/return": 3.0, "rollout/episode_length": 2.0, "rollout/episodes": 1.0, "rollout/success_rate": 1.0
    }  # fmt: skip
    assert second["rollout/return"] == 26.0 and second["rollout/episode_length"] == 4.0
    assert second["rollout/success_rate"] == 0.0
    assert statistics.running_return.tolist() == [7.0, 0.0]


class Broken:
    """A policy whose action, or value, is NaN from its third call on."""

    in_keys, out_keys = ["observation"], ["action"]

    def __init__(self, key: str):
        self.key, self.calls = key, 0

    def __call__(self, step: TensorDict) -> TensorDict:
        self.calls += 1
        step.update({"action": torch.zeros(4, 3), "action_log_prob": torch.zeros(4), "state_value": torch.zeros(4, 1)})
        if self.calls == 3:
            step[self.key][2] = float("nan")
        return step


@pytest.mark.parametrize("key", ["action", "action_log_prob", "state_value"])
def test_nan_from_the_policy_names_tensor_and_step(key):
    guard = FiniteGuard(Broken(key), num_envs=4)
    step = TensorDict({"observation": {"proprio": torch.zeros(4, 2)}}, batch_size=[4])
    guard(step.clone())
    guard(step.clone())
    with pytest.raises(NonFiniteError, match=rf"{key} is nan at index \[2.*\] at env step 8"):
        guard(step.clone())


def test_nan_in_an_observation_is_named():
    guard = FiniteGuard(Broken("action"), num_envs=2)
    step = TensorDict({"observation": {"proprio": torch.tensor([[0.0], [float("inf")]])}}, batch_size=[2])
    with pytest.raises(NonFiniteError, match="observation 'proprio' is inf at index .1, 0. at env step 0"):
        guard(step)


def test_nan_reward_is_named():
    rollout = made_up_rollout()
    rollout["next", "reward"][2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"reward is nan at index \[2, 3, 0\]"):
        prepare_batch(rollout, step_values, make_gae(PPOConfig()), [])
