"""envs/chunks.py: decisions of several control steps, against loops by hand, in every environment that takes them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from envs_worlds import Drifter
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from envs import make_env
from envs.vector import VectorEnv
from research.errors import UserError

N, CHUNK, DECISIONS = 6, 4, 30
FLAGS = ("terminated", "truncated", "success")


def drifters(num_envs: int, chunk: int, workers: int = 0, **options) -> VectorEnv:
    return VectorEnv(partial(Drifter, **options), num_envs, workers, seed=5, name="drift", chunk=chunk)


def tabletop(num_envs: int, chunk: int, **options):
    modalities = ["rgb", "depth", "proprio", "language"]
    return make_env("tabletop", num_envs, {"modalities": modalities, "image_size": 16, "chunk": chunk, **options})


def pendulum(num_envs: int, chunk: int, kind: str = "gym"):
    return make_env(f"{kind}:InvertedPendulum-v5", num_envs, {"chunk": chunk, "max_episode_steps": 13})


WORLDS = {
    "drifters": drifters,
    "drifters in workers": partial(drifters, workers=2),
    "drifters that go on after success": partial(drifters, ends=False, limit=9),
    "reach": partial(tabletop, task="reach", max_steps=7),
    "push": partial(tabletop, task="push", max_steps=11, reward="milestones"),
    "pick_place": partial(tabletop, task="pick_place", max_steps=30, reward="milestones"),
    "a block is moved": partial(tabletop, task="pick_place", split="execution", max_steps=9),
    "gym": pendulum,
    "gym_vec": partial(pendulum, kind="gym_vec"),
}


def start(env, states: list[int], rows: list[bool] | None = None, step: TensorDict | None = None) -> TensorDict:
    """Reset all rows, or the ones that are named, to the states of these ids."""
    n = env.batch_size[0]
    asked = TensorDict({} if step is None else step, [n]).exclude("reward")
    asked["initial_state"] = torch.tensor(states)[:, None]
    if rows is not None:
        asked["_reset"] = torch.tensor(rows)[:, None]
    return env.reset(asked)


def by_hand(env, actions: torch.Tensor) -> dict[str, torch.Tensor]:
    """One decision `[H, A]` of an environment of one row and single steps: what it comes to."""
    reward, flags = torch.zeros(1, 1), {flag: torch.zeros(1, 1, dtype=torch.bool) for flag in FLAGS}
    taken = 0
    for action in actions:
        taken += 1
        after = env.step(TensorDict({"action": action[None]}, [1]))["next"]
        reward = reward + after["reward"]
        flags = {flag: flags[flag] | after.get(flag, flags[flag]) for flag in FLAGS}
        if after["done"]:
            break
    now = after.get("success", flags["success"])
    return {"reward": reward, "env_steps": torch.tensor([[taken]]), "success_now": now, "after": after, **flags}


@pytest.mark.parametrize("world", WORLDS)
def test_a_decision_is_its_control_steps_until_the_end(world):
    make, generator = WORLDS[world], torch.Generator().manual_seed(3)
    env, single = make(N, CHUNK), [make(1, 1) for _ in range(N)]
    states = list(range(N))
    step = start(env, states)
    for row, one in enumerate(single):
        start(one, [row])
    ends = set()
    for _ in range(DECISIONS):
        actions = torch.rand(env.action_spec.shape, generator=generator) * 2.4 - 1.2
        if hasattr(env, "named_places"):  # something else than chance: towards what is named, and the gripper shut
            towards = torch.stack([env.expert_action()] * CHUNK, dim=1)
            actions = torch.where(torch.rand(N, 1, 1, generator=generator) < 0.7, towards, actions)
        after = env.step(step.set("action", actions))["next"]
        for row, one in enumerate(single):
            expected = by_hand(one, actions[row])
            for key in ("reward", "env_steps", *(flag for flag in (*FLAGS, "success_now") if flag in after.keys())):
                assert torch.equal(after[key][row], expected[key][0]), (key, row)
            for key, value in after["observation"].items():
                assert torch.equal(value[row], expected["after"]["observation", key][0]), (key, row)
            ends |= {(flag, expected["env_steps"].item()) for flag in FLAGS[:2] if after[flag][row]}
        done = after["done"].flatten().tolist()
        states = [state + 100 if ended else state for state, ended in zip(states, done, strict=True)]
        step = start(env, states, done, after) if any(done) else after
        for one, state, ended in zip(single, states, done, strict=True):
            if ended:
                start(one, [state])
    if world.startswith("drifters in") or world == "drifters":
        assert ends >= {(flag, place) for flag in FLAGS[:1] for place in range(1, CHUNK + 1)}
    assert ends
    for one in (env, *single):
        one.close()


@pytest.mark.parametrize("limit", [5, 6, 7, 8])
def test_a_time_limit_at_every_place_of_a_chunk(limit):
    """The value of what follows is that of the state in which the limit struck, so that is what must be seen."""
    for env in (drifters(N, CHUNK, ends=False, limit=limit), tabletop(N, CHUNK, task="push", max_steps=limit)):
        env.reset()
        taken = []
        for _ in range(2):
            step = env.step(TensorDict({"action": env.action_spec.zero()}, [N]))["next"]
            taken.append(step["env_steps"].flatten().tolist())
        assert taken == [[CHUNK] * N, [limit - CHUNK] * N]
        assert step["truncated"].all() and not step["terminated"].any()
        env.close()


def test_specs_and_shapes():
    for env in (drifters(N, CHUNK), tabletop(N, CHUNK, task="push")):
        check_env_specs(env)
        reset = env.reset()
        assert env.action_spec.shape[:2] == (N, CHUNK) and env.chunk == CHUNK
        assert reset["env_steps"].tolist() == [[0]] * N and reset["env_steps"].dtype == torch.int64
        env.close()
    for env in (drifters(N, 1), tabletop(N, 1, task="push")):
        assert len(env.action_spec.shape) == 2 and "env_steps" not in env.reset().keys()
        env.close()


def test_a_picture_is_drawn_once_per_decision(monkeypatch):
    drawn = []
    observe = Drifter.observe
    monkeypatch.setattr(Drifter, "observe", lambda self: drawn.append(1) or observe(self))
    env = drifters(N, CHUNK)
    env.reset()
    drawn.clear()
    env.step(TensorDict({"action": env.action_spec.zero()}, [N]))
    assert len(drawn) == N
    env.close()


@pytest.mark.parametrize("workers", [0, 3])
def test_a_film_shows_what_is_between_looks(workers):
    """The drifters' frames are their clocks: 100 and one more after every control step."""
    env = drifters(N, CHUNK, workers, ends=False, limit=6)
    env.film_between(3, 8)
    env.reset()
    shots = []
    for _ in range(2):
        env.step(TensorDict({"action": env.action_spec.zero()}, [N]))
        shots.append(env.frames_between())
    for first, second in zip(*shots, strict=True):
        assert first.shape == (3, 8, 8, 3) and first.amax((1, 2, 3)).tolist() == [101, 102, 103]
        assert second.amax((1, 2, 3)).tolist() == [105]  # the sixth step was the last
    assert len(shots[0]) == 3
    env.close()


def test_the_table_is_filmed_between_looks():
    env = tabletop(N, CHUNK, task="push", max_steps=6)
    env.film_between(2, 32)
    single = tabletop(N, 1, task="push", max_steps=6)
    step = start(env, list(range(N)))
    start(single, list(range(N)))
    actions = torch.linspace(-1, 1, N * CHUNK * 3).view(N, CHUNK, 3)
    env.step(step.set("action", actions))
    for place in range(CHUNK - 1):
        single.step(TensorDict({"action": actions[:, place]}, [N]))
        for row, shot in enumerate(env.frames_between()):
            assert torch.equal(shot[place], single.render_frames(32)[row])


@pytest.mark.parametrize("name", ["tabletop", "gym:InvertedPendulum-v5", "gym_vec:InvertedPendulum-v5"])
@pytest.mark.parametrize("chunk", [0, -1, 1.5, True, "4", 10**6])
def test_no_chunk(name, chunk):
    with pytest.raises(UserError, match=r"^trainer\.env_config\.chunk: .* got "):
        make_env(name, 2, {"chunk": chunk})


def test_rows_whose_thrown_away_episodes_end_too_are_started_again():
    """A long chunk holds several short episodes of a vector environment, whose rows are stepped together."""
    env = make_env("gym_vec:InvertedPendulum-v5", 4, {"chunk": 40, "max_episode_steps": 5})
    step = env.step(env.reset().set("action", torch.ones(4, 40, 1)))["next"]
    assert step["done"].all() and (step["env_steps"] <= 5).all()
    assert not env.reset(step.exclude("reward").set("_reset", step["done"]))["done"].any()
