"""Stepping an environment in parts by turns gives what stepping it whole does."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from envs_worlds import Drifter
from tensordict import TensorDict

from envs.vector import VectorEnv
from research.errors import SimulatorFailed
from research.training.rollout import Rollouts
from research.training.turns import Turns


class Steering:
    """Pushes against where the drifter is, by an amount that depends on the observation alone."""

    in_keys, out_keys, kept_keys = ["observation"], ["action"], [("observation", "rgb"), "initial_state"]

    def __init__(self, chunk: int):
        self.chunk, self.act, self.batches = chunk, self, []

    def __call__(self, step: TensorDict) -> TensorDict:
        proprio = step["observation", "proprio"]
        self.batches.append(len(proprio))
        action = torch.tanh(2 * proprio[:, :2])  # away from the middle
        action = action if self.chunk == 1 else torch.stack([action * k for k in range(self.chunk)], dim=1)
        return step.update({"action": action, "action_log_prob": proprio[:, 0], "state_value": proprio[:, 1:2]})

    def go_on(self, step):
        assert (step["doubled"] == 2 * step["observation", "proprio"]).all()  # of these very rows
        return self(step)

    def values(self, steps):
        return steps["observation", "proprio"].sum(dim=1, keepdim=True)

    def look_ahead(self, steps):
        return self.values(steps), TensorDict({"doubled": 2 * steps["observation", "proprio"]}, steps.batch_size)


def make(workers: int, num_envs: int = 7, chunk: int = 1, **options) -> VectorEnv:
    return VectorEnv(partial(Drifter, **options), num_envs, workers, seed=3, name="drift", chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_rollouts_are_the_same_whole_or_by_turns(workers, chunk):
    """With ends of episodes, and with frozen features that the rollout before has looked ahead to."""
    found = []
    for count in (0, workers):
        policy = Steering(chunk)
        rollouts = Rollouts(make(count, chunk=chunk), policy, 7 * 12)
        found.append([rollouts.next() for _ in range(3)])
        assert set(policy.batches) == ({7} if count == 0 else {4, 3})
        found[-1].append(rollouts.metrics())
        found[-1].append(rollouts.state_dict()["carrier"])
        rollouts.shutdown()
    whole, turns = found
    ends = torch.cat(whole[:3])["next"]
    assert ends["terminated"].any() and ends["truncated"].any()
    for one, other in zip(whole[:3], turns[:3], strict=True):
        assert (one == other).all() and one.names == other.names
    assert whole[3] == turns[3]
    one, other = (TensorDict(carrier, [7]).select("observation", "initial_state") for carrier in (whole[4], turns[4]))
    assert (one == other).all()


def test_both_parts_are_on_their_way_at_once():
    """Each part is told to step before the other has been heard of."""
    env, said = make(2), []
    send, receive = env.send, env.receive
    env.send = lambda part, action: said.append(f"send {part}") or send(part, action)
    env.receive = lambda part: said.append(f"receive {part}") or receive(part)
    turns = Turns(env)
    for _ in turns.play(env.reset(), lambda _, now: Steering(1)(now), 2):
        pass
    assert " ".join(said) == "send 0 send 1 receive 0 send 0 receive 1 send 1 receive 0 receive 1"
    assert turns.parts == [slice(0, 4), slice(4, 7)] and turns.now.batch_size == (7,)
    env.close()


def test_a_run_goes_on_from_the_middle_of_turns():
    one, other = (Rollouts(make(workers), Steering(1), 7 * 5) for workers in (2, 0))
    one.next()
    state = one.state_dict()
    expected = one.next()
    assert other.load_state_dict(state, env_steps=35)
    assert (other.next() == expected).all()
    one.shutdown()
    other.shutdown()


def test_rows_that_are_asked_for_while_parts_are_on_their_way_have_arrived():
    env = make(2)
    now = env.reset()
    for part, rows in enumerate(env.parts):
        env.send(part, torch.zeros(7, 2)[rows])
    frames = env.render_frames(6)  # 100, and one more for each step
    assert (frames == 101).all()
    after = env.step(now.set("action", torch.zeros(7, 2)))["next"]
    assert after["observation", "proprio"][:, 2].tolist() == [2.0] * 7
    env.close()


def test_a_simulator_that_breaks_in_a_turn_ends_all():
    env = make(2, wrong="exit")
    env.reset()
    env.send(0, torch.zeros(4, 2))
    with pytest.raises(SimulatorFailed, match="ended during turn"):
        env.receive(0)
    with pytest.raises(SimulatorFailed, match="the environment is closed"):
        env.send(1, torch.zeros(3, 2))
