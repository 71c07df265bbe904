"""research/training/group_episodes.py: groups of whole episodes from one initial state, nothing after their ends."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from worlds import reach_env, reach_policy

from research.errors import NonFiniteError
from research.training.episodes import EpisodeStatistics
from research.training.group_episodes import EPISODE, RETURN, GroupEpisodes, by_group


class Countdown(EnvBase):
    """From state s an episode has s % 3 + 1 steps, one more after a positive first action; the reward is the action.

    Observed are the state and the step. Ids of training are 10, 11, 12, ...
    """

    batch_locked = True
    task_names = ()

    def __init__(self, rows: int):
        super().__init__(batch_size=[rows])
        flag = lambda: Categorical(2, (rows, 1), dtype=torch.bool)  # noqa: E731
        seen = Composite(proprio=Unbounded((rows, 2)), shape=(rows,))
        ids = Bounded(0, 2**31, (rows, 1), dtype=torch.int64)
        self.observation_spec = Composite(observation=seen, initial_state=ids, success=flag(), shape=(rows,))
        self.action_spec = Bounded(-1.0, 1.0, (rows, 1))
        self.reward_spec = Unbounded((rows, 1))
        self.full_done_spec = Composite(done=flag(), terminated=flag(), truncated=flag(), shape=(rows,))
        self.next_id, self.ids = 10, torch.zeros(rows, 1, dtype=torch.int64)
        self.steps, self.drawn = 0, []
        self.t, self.left = torch.zeros(2, rows, 1)

    def draw_states(self, count: int) -> torch.Tensor:
        self.next_id += count
        self.drawn.append(count)
        return torch.arange(self.next_id - count, self.next_id)

    def _set_seed(self, seed):
        pass

    def _reset(self, tensordict):
        mask = tensordict.get("_reset", torch.ones_like(self.ids, dtype=torch.bool))
        self.ids = torch.where(mask, tensordict["initial_state"], self.ids)
        self.t = torch.where(mask, 0.0, self.t)
        self.left = torch.where(mask, self.ids % 3 + 1.0, self.left)
        return self._seen(done=torch.zeros_like(mask))

    def _step(self, tensordict):
        action = tensordict["action"]
        self.steps += 1
        self.left += ((self.t == 0) & (action > 0)).float() - 1
        self.t += 1
        done = self.left <= 0
        return self._seen(done=done, reward=action, success=action > 0)

    def _seen(self, **more):
        proprio = torch.cat([self.ids.float(), self.t], dim=1)
        flags = {"terminated": more["done"].clone(), "truncated": torch.zeros_like(more["done"])}
        flags |= {"success": torch.zeros_like(more["done"])} if "success" not in more else {}
        content = {"observation": {"proprio": proprio}, "initial_state": self.ids.clone(), **flags, **more}
        return TensorDict(content, self.batch_size)


class Drawing:
    """Draws actions of +-1, or is always the same."""

    kept_keys = (("observation", "proprio"),)

    def __init__(self, always: float | None = None):
        def act(proprio):
            drawn = torch.randint(0, 2, (len(proprio), 1)) * 2.0 - 1
            action = drawn if always is None else torch.full_like(drawn, always)
            return action, torch.zeros(len(proprio)), torch.zeros(len(proprio), 1)

        outputs = ["action", "action_log_prob", "state_value"]
        self.act = TensorDictModule(act, in_keys=[("observation", "proprio")], out_keys=outputs)


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
def test_decisions_are_those_of_whole_episodes_in_groups_of_one_state(rows):
    collected = GroupEpisodes(Countdown(rows), Drawing(), groups=5, group_size=4, most_draws=10)
    batch = collected.next()
    state, t = batch["observation", "proprio"].T
    assert by_group(batch, 4).shape == (5, 4)
    for episode in range(20):
        mine = batch[EPISODE] == episode
        steps, actions = t[mine].sort().values.tolist(), batch["action"][mine][t[mine].argsort(), 0]
        assert steps == list(range(int(state[mine][0]) % 3 + 1 + int(actions[0] > 0)))  # all of them, and no more
        assert len(state[mine].unique()) == 1
        assert (batch[RETURN][mine] == actions.sum()).all()
    groups = [state[batch[EPISODE] // 4 == group].unique().tolist() for group in range(5)]
    drawn = [collected.episodes[place : place + 4] for place in range(0, len(collected.episodes), 4)]
    useful = [group[0].initial_state for group in drawn if len({episode.episode_return for episode in group}) > 1]
    assert groups == [[state] for state in useful[:5]]  # in the order in which they were drawn
    assert collected.left_out == len(drawn) - len(useful)
    assert collected.env_steps == sum(e.length for e in collected.episodes) >= len(batch)
    assert collected.metrics()["rollout/episodes"] == len(collected.episodes)


def test_groups_without_spread_are_left_out_and_others_are_drawn_but_not_for_ever():
    env = Countdown(8)
    collected = GroupEpisodes(env, Drawing(always=1.0), groups=3, group_size=4, most_draws=5)
    batch = collected.next()
    assert [e.initial_state for e in collected.episodes] == [10 + group for group in range(15) for _ in range(4)]
    assert collected.metrics()["rollout/groups_left_out"] == 15
    assert by_group(batch, 4).shape == (1, 4)  # something to go on with: its advantages are 0
    metrics = GroupEpisodes(Countdown(8), Drawing(), 3, 2, 5)
    metrics.next()
    told = metrics.metrics()
    assert told["rollout/success_rate"] == sum(e.success for e in metrics.episodes) / len(metrics.episodes)
    assert told["rollout/return"] == pytest.approx(
        sum(e.episode_return for e in metrics.episodes) / len(metrics.episodes)
    )


def test_rows_take_another_group_as_soon_as_one_has_turned_out_useless():
    env = Countdown(8)
    collected = GroupEpisodes(env, Drawing(always=1.0), groups=4, group_size=2, most_draws=20)
    collected.next()
    assert len(collected.episodes) == 4 * 2 * 20 and env.steps <= collected.env_steps / 8 + 4  # the last take 4 at most


def test_few_groups_are_played_that_are_not_needed_and_rows_seldom_wait():
    torch.manual_seed(0)
    env = Countdown(16)
    collected = GroupEpisodes(env, Drawing(), groups=32, group_size=2)  # half of all groups are useful
    drawn, unused, steps = 0, 0, 0
    for _ in range(50):
        batch = collected.next()
        assert by_group(batch, 2).shape == (32, 2)
        pairs = list(zip(collected.episodes[::2], collected.episodes[1::2], strict=True))
        useful = [one.initial_state for one, two in pairs if one.episode_return != two.episode_return]
        assert batch["observation", "proprio"][batch[EPISODE].argsort(), 0].unique().tolist() == sorted(useful[:32])
        drawn += len(pairs)
        unused += len(useful) - 32
        steps += collected.env_steps
    assert unused < 0.05 * drawn and steps > 0.8 * 16 * env.steps


def test_states_are_drawn_in_rounds_of_all_rows_and_every_one_is_used_once():
    env = Countdown(8)
    collected = GroupEpisodes(env, Drawing(), groups=5, group_size=2)
    used = []
    for place in range(6):
        if place == 3:  # goes on from a checkpoint
            collected, state = GroupEpisodes(env, Drawing(), groups=5, group_size=2), collected.state_dict()
            collected.load_state_dict({"environment": {}, "states": state["states"]}, 0)
        collected.next()
        used += [episode.initial_state for episode in collected.episodes[::2]]
    assert used == list(range(10, 10 + len(used)))
    assert set(env.drawn) == {8}


def test_a_nan_is_named():
    policy = Drawing()
    policy.act = TensorDictModule(
        lambda proprio: (torch.zeros(len(proprio), 1), torch.full((len(proprio),), torch.nan)),
        in_keys=[("observation", "proprio")], out_keys=["action", "action_log_prob"],
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="action_log_prob"):
        GroupEpisodes(Countdown(4), policy, 2, 2).next()


def test_on_tabletop_episodes_of_a_group_start_alike_and_resume_where_they_were():
    policy = reach_policy("vision")
    one, two = (GroupEpisodes(reach_env(num_envs=4), policy, 2, 4, most_draws=1, max_steps=6) for _ in range(2))
    torch.manual_seed(3)
    one.next()
    ids = [e.initial_state for e in one.episodes]
    assert ids[:4] == [ids[0]] * 4 and ids[4:] == [ids[4]] * 4 and ids[0] != ids[4]
    assert all(e.length <= 6 for e in one.episodes) and len(one.episodes) == 8
    two.load_state_dict(one.state_dict(), 0)
    batches = []
    for collected in (one, two):
        torch.manual_seed(4)
        batches.append(collected.next())
    assert (batches[0] == batches[1]).all()
    assert EpisodeStatistics(4).metrics() == {}


def test_a_number_that_breaks_is_said_to_have_been_collected():
    collected = GroupEpisodes(Countdown(4), Drawing(always=float("nan")), groups=2, group_size=2)
    with pytest.raises(NonFiniteError, match=r"action is nan at index \[0, 0\] while collecting"):
        collected.next()


def test_an_episode_that_is_cut_off_keeps_the_success_that_it_had():
    """The first step of an episode succeeds, and the one after it is beyond the limit."""
    collected = GroupEpisodes(Countdown(4), Drawing(always=1.0), groups=2, group_size=2, most_draws=1, max_steps=1)
    collected.next()
    assert all(episode.cut_off and episode.success for episode in collected.episodes)
    assert collected.metrics()["rollout/success_rate"] == 1.0
