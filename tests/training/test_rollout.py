"""Advantages against GAE written by hand, bootstraps, episode statistics, and NaN guards."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from worlds import reach_env, reach_policy

from envs.tabletop import TabletopEnv
from research.errors import NonFiniteError
from research.training.advantages import GAEAdvantages
from research.training.algorithm import env_steps_in
from research.training.collecting_policy import CollectingPolicy
from research.training.rollout import Rollouts

GAMMA, LAMBDA = 0.9, 0.8


def script(n: int = 6, t: int = 12) -> TensorDict:
    """What will happen: terminations and truncations in the middle and at the end, both at once never."""
    g = torch.Generator().manual_seed(3)
    terminated = torch.rand(n, t, 1, generator=g) < 0.15
    truncated = (torch.rand(n, t, 1, generator=g) < 0.15) & ~terminated
    terminated[0, -1], truncated[0, -1] = True, False
    truncated[1, -1], terminated[1, -1] = True, False
    assert terminated[:, :-1].any() and truncated[:, :-1].any()
    state = torch.randn(n, t + 1, 2, generator=g)
    after = torch.randn(n, t, 2, generator=g)  # the next state; where no episode ends it is the next step's state
    done = terminated | truncated
    after = torch.where(done, after, state[:, 1:])
    reward = torch.randn(n, t, 1, generator=g)
    facts = {"state": state[:, :-1], "after": after, "reward": reward, "terminated": terminated, "truncated": truncated}
    return TensorDict({**facts, "done": done}, batch_size=[n, t])


class Scripted(EnvBase):
    """Plays a script, over and over."""

    resumes_exactly = True

    def __init__(self, script: TensorDict, device: str | None = None):
        n, self.t = len(script), 0
        super().__init__(batch_size=[n], device=device)
        self.script = script
        proprio = Unbounded((n, 2))
        self.observation_spec = Composite(observation=Composite(proprio=proprio, shape=(n,)), shape=(n,))
        self.action_spec, self.reward_spec = Unbounded((n, 3)), Unbounded((n, 1))
        flags = {k: Categorical(2, (n, 1), dtype=torch.bool) for k in ("done", "terminated", "truncated")}
        self.full_done_spec = Composite(flags, shape=(n,))

    def _observe(self, key: str, t: int) -> TensorDict:
        proprio = self.script[key][:, t % self.script.shape[1]]
        return TensorDict({"observation": TensorDict({"proprio": proprio}, self.batch_size)}, self.batch_size)

    def _reset(self, tensordict=None, **_) -> TensorDict:
        return self._observe("state", self.t)

    def _step(self, tensordict: TensorDict) -> TensorDict:
        now = self.script[:, self.t % self.script.shape[1]]
        step = self._observe("after", self.t)
        self.t += 1
        return step.update(now.select("reward", "done", "terminated", "truncated"))

    def _set_seed(self, seed) -> None:
        pass


class Valuing:
    """A policy that does nothing, and knows what every state is worth; says how many states it was asked about."""

    in_keys, out_keys, kept_keys = ["observation"], ["action"], [("observation", "proprio")]
    score_is_exact = True

    def __init__(self):
        self.act, self.asked = self, []

    def __call__(self, step: TensorDict) -> TensorDict:
        n = len(step)
        value = values_of(step["observation", "proprio"])
        return step.update({"action": torch.zeros(n, 3), "action_log_prob": torch.zeros(n), "state_value": value})

    def values(self, steps: TensorDict) -> torch.Tensor:
        self.asked.append(len(steps))
        return values_of(steps["observation", "proprio"])

    def look_ahead(self, steps: TensorDict) -> tuple[torch.Tensor, None]:
        return self.values(steps), None


def collect(script: TensorDict, policy: Valuing, device: str | None = None) -> tuple[TensorDict, TensorDict]:
    """One rollout, and its batch."""
    rollout = Rollouts(Scripted(script, device), policy, script.numel()).next()
    batch, metrics = GAEAdvantages(policy, GAMMA, LAMBDA)(rollout)
    assert metrics == {}
    return rollout, batch


def values_of(state: torch.Tensor) -> torch.Tensor:
    return (state * torch.tensor([1.5, -0.7])).sum(-1, keepdim=True).sin()


def gae_by_hand(script: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
    """Schulman et al. 2016, equation 16, in float64, one environment and one step at a time."""
    n, t = script.batch_size
    value = values_of(script["state"].double()).squeeze(-1)
    following = values_of(script["after"].double()).squeeze(-1)
    advantage = torch.zeros(n, t, dtype=torch.float64)
    for i in range(n):
        running = 0.0
        for k in reversed(range(t)):
            terminated, done = bool(script["terminated"][i, k]), bool(script["done"][i, k])
            target = script["reward"][i, k].double() + (0.0 if terminated else GAMMA * following[i, k])
            running = target - value[i, k] + (0.0 if done else GAMMA * LAMBDA * running)
            advantage[i, k] = running
    return advantage, advantage + value


def test_advantages_equal_gae_by_hand():
    events = script()
    _, batch = collect(events, Valuing())
    advantage, target = gae_by_hand(events)
    torch.testing.assert_close(batch["advantage"].double().view(6, 12), advantage, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch["value_target"].double().view(6, 12), target, rtol=0, atol=1e-5)


def test_the_second_rollout_goes_on_where_the_first_ended():
    events = script()
    events["truncated"][2:, -1] = events["terminated"][2:, -1] = events["done"][2:, -1] = False
    events["after"][2:, -1] = events["state"][2:, 0]  # played over and over: the first state follows the last
    both = torch.cat([events, events], dim=1)
    rollouts = Rollouts(Scripted(events), Valuing(), 72)
    rollouts.next()
    batch, _ = GAEAdvantages(Valuing(), GAMMA, 0.0)(rollouts.next())
    value, following = values_of(both["state"][:, 12:]), values_of(both["after"][:, 12:])
    advantage = both["reward"][:, 12:] + GAMMA * following * ~both["terminated"][:, 12:] - value
    torch.testing.assert_close(batch["advantage"].view(6, 12, 1), advantage, rtol=0, atol=1e-5)


def test_values_are_asked_of_truncated_states_and_of_those_that_the_rollout_ends_in():
    events, policy = script(), Valuing()
    collect(events, policy)
    assert not events["done"][:, -1].all()
    assert policy.asked == [int(events["truncated"].sum()), len(events)]


def test_nothing_is_asked_when_every_episode_terminates_at_the_end():
    events, policy = script(), Valuing()
    events["truncated"][:] = False
    events["terminated"][:, -1] = True
    events["done"] = events["terminated"].clone()
    collect(events, policy)
    assert policy.asked == []


@pytest.mark.parametrize("device", [None, "cpu"])
def test_rollout_and_batch_hold_what_the_update_reads_and_nothing_else(device):
    policy = Valuing()
    policy.kept_keys = []
    rollout, batch = collect(script(), policy, device)
    assert batch.batch_size == (72,)
    kept = {"action", "action_log_prob", "state_value"}
    assert set(batch.keys()) == kept | {"advantage", "value_target"}
    assert set(rollout.keys()) == kept | {"policy_version", "next"}  # no observation
    assert set(rollout["next"].keys()) == {"reward", "done", "terminated", "truncated", "final_value"}


def test_steps_are_those_of_torchrls_own_collector():
    """Two rollouts, where TorchRL's loop takes the steps."""
    events = script()
    ours = Rollouts(Scripted(events), Valuing(), 72)
    theirs = iter(
        Collector(
            Scripted(events),
            CollectingPolicy(Valuing()),
            frames_per_batch=72,
            total_frames=-1,
            use_buffers=False,
            auto_register_policy_transforms=False,
        )
    )
    for _ in range(2):
        rollout, whole = ours.next(), next(theirs)
        for key in rollout.keys(True, leaves_only=True):
            if key != ("next", "final_value"):
                assert torch.equal(rollout[key], whole[key]), key
    assert rollout.batch_size == (6, 12) and rollout.names == whole.names


def test_a_rollout_outlives_the_next_one():
    rollouts = Rollouts(Scripted(script()), Valuing(), 72)
    first = rollouts.next()
    before = first.clone()
    rollouts.next()
    assert (first == before).all()


def test_a_published_version_reaches_the_policy_on_another_device_than_its_own():
    # "cpu:0" is not "cpu" to a collector, so that it would copy a policy there as it would to a GPU.
    rollouts = Rollouts(Scripted(script(), "cpu:0"), Valuing(), 72)
    rollouts.publish()
    assert (rollouts.next()["policy_version"] == 1).all()


class Broken:
    """A policy whose action, or value, is NaN from its third call on."""

    in_keys, out_keys, kept_keys = ["observation"], ["action"], []

    def __init__(self, key: str):
        self.key, self.calls, self.act = key, 0, self

    def __call__(self, step: TensorDict) -> TensorDict:
        self.calls += 1
        step.update({"action": torch.zeros(4, 3), "action_log_prob": torch.zeros(4), "state_value": torch.zeros(4, 1)})
        if self.calls == 3:
            step[self.key][2] = float("nan")
        return step

    def values(self, steps: TensorDict) -> torch.Tensor:
        return torch.zeros(len(steps), 1)

    def look_ahead(self, steps: TensorDict) -> tuple:
        return self.values(steps), None


@pytest.mark.parametrize("key", ["action", "action_log_prob", "state_value"])
def test_nan_from_the_policy_names_tensor_and_step(key):
    rollouts = Rollouts(Scripted(script(4)), Broken(key), 48)
    with pytest.raises(NonFiniteError, match=rf"{key} is nan at index \[2.*\] at env step 8"):
        rollouts.next()


def test_after_a_resume_the_step_is_counted_from_there():
    rollouts = Rollouts(Scripted(script(4)), Broken("action"), 48)
    rollouts.policy.env_steps = 1000
    with pytest.raises(NonFiniteError, match="at env step 1008"):
        rollouts.next()


class Chunks(Broken):
    """Goes right, three control steps at a time; its third call is NaN."""

    def __call__(self, step: TensorDict) -> TensorDict:
        return super().__call__(step).set("action", torch.full((4, 3, 3), 0.0 if self.calls < 3 else float("nan")))


def test_a_step_of_chunks_is_as_many_control_steps_as_it_took():
    """The second chunk of three is cut short by the limit of four steps."""
    env = TabletopEnv(4, "push", modalities=["proprio"], max_steps=4, chunk=3)
    rollouts = Rollouts(env, Chunks("action"), 16)
    with pytest.raises(NonFiniteError, match=r"action is nan .* at env step 16$"):
        rollouts.next()
    rollouts = Rollouts(TabletopEnv(4, "push", modalities=["proprio"], max_steps=4, chunk=3), Chunks("action"), 8)
    rollout = rollouts.next()
    assert rollout["next", "env_steps"].squeeze(-1).tolist() == [[3, 1]] * 4 and env_steps_in(rollout) == 16
    assert env_steps_in(Rollouts(Scripted(script()), Valuing(), 72).next()) == 72
    assert rollouts.metrics()["rollout/episode_length"] == 4.0


def test_nan_in_an_observation_is_named():
    guard = CollectingPolicy(Broken("action"))
    step = TensorDict({"observation": {"proprio": torch.tensor([[0.0], [float("inf")]])}}, batch_size=[2])
    with pytest.raises(NonFiniteError, match="observation 'proprio' is inf at index .1, 0. at env step 0"):
        guard(step)


def test_nan_reward_is_named():
    events = script()
    events["reward"][2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"reward is nan at index \[2, 3, 0\]"):
        collect(events, Valuing())


def states_of(env, **options):
    """Rollouts, and what draws their next initial states."""
    return Rollouts(env, reach_policy(), 4 * 8, **options), lambda: set(env.draw_states(64).tolist())


def test_without_a_state_a_run_goes_on_with_other_initial_states_than_it_began_with():
    _, drawn = states_of(reach_env())
    first = drawn()
    again, drawn = states_of(reach_env())
    assert not again.load_state_dict(None, 4096) and not first & drawn()
    other, drawn_by_other = states_of(reach_env(), seed=7)
    other.load_state_dict(None, 4096)
    assert drawn() and not drawn() & drawn_by_other()


def test_frozen_features_of_where_a_rollout_ended_are_those_of_a_resumed_run():
    """Of fewer rows than all at once a kernel may round otherwise."""
    rollouts = Rollouts(reach_env(), reach_policy("vision"), 4 * 8)
    rollouts.next()
    saved = copy.deepcopy(rollouts.state_dict())
    other = Rollouts(reach_env(), reach_policy("vision"), 4 * 8)
    assert other.load_state_dict(saved, 32)
    ahead, expected = other.collector._ahead, rollouts.collector._ahead
    assert expected is not None and (ahead == expected).all()
    saved.pop("ahead")  # as earlier checkpoints are
    assert other.load_state_dict(saved, 32) and other.collector._ahead is None
