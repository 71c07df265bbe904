"""Evaluation: every initial state once, in order, whatever the number of environments; what ends an episode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, exploration_type

from envs import make_env
from envs.tabletop import TabletopEnv
from research.errors import NonFiniteError
from research.training.evaluation import Episode, Evaluation, evaluate, shares_of_tasks, wilson_interval

MODALITIES = ["proprio", "language"]


class Expert:
    """Does what the scripted expert of an environment does, or nothing."""

    def __init__(self, env: TabletopEnv, idle: bool = False):
        self.env, self.idle = env, idle

    def __call__(self, step: TensorDict) -> TensorDict:
        action = self.env.expert_action()
        return step.set("action", torch.zeros_like(action) if self.idle else action)


def run(num_envs: int, states, idle: bool = False, **options) -> Evaluation:
    env = TabletopEnv(num_envs, "reach", modalities=MODALITIES, max_steps=20)
    return evaluate(env, Expert(env, idle), states, **options)


def test_episodes_are_those_of_the_states_whatever_the_number_of_environments():
    states = [3, 0, 12, 7, 5, 9, 1]
    results = [run(n, states).episodes for n in (1, 3, 7, 16)]
    assert [episode.initial_state for episode in results[0]] == states
    assert all(episodes == results[0] for episodes in results)
    assert all(e.success and e.episode_return == 1.0 and 0 < e.length < 20 for e in results[0])


def test_tasks_that_an_evaluation_leaves_out_or_weighs_otherwise_are_told_at_its_start():
    tasks = [f"task-{i}" for i in range(10)]
    few = shares_of_tasks(tasks, range(4), "eval_episodes")
    assert few.startswith("eval_episodes: 4 evaluation episodes are of 4 of the 10 tasks, ") and "multiple of 10" in few
    assert "32 evaluation episodes are 3 or 4 of each task" in shares_of_tasks(tasks, range(100, 132), "eval_episodes")
    for names, states in ((tasks, range(20)), (tasks, range(7, 17)), (tasks[:1], range(3)), ((), range(3))):
        assert shares_of_tasks(names, states, "eval_episodes") is None


def test_an_episode_that_ends_by_its_own_limit_and_one_that_is_cut_off():
    assert [e.length for e in run(4, range(4), idle=True).episodes] == [20] * 4
    cut = run(4, range(4), idle=True, max_steps=5)
    assert [(e.length, e.success, e.cut_off) for e in cut.episodes] == [(5, False, True)] * 4
    assert all(row["cut_off"] for row in cut.rows())
    assert not any(e.cut_off for e in run(4, range(4), idle=True, max_steps=20).episodes)  # its own limit is as long
    lengths = [e.length for e in run(4, range(4)).episodes]
    assert min(lengths) < max(lengths)  # those that end early wait for the others, and their counts do not go on


class Going:
    """Reports what it is told at each step, `[N, T]`, and ends at the last one, if it ends."""

    batch_size, device, distinct_states = torch.Size([2]), torch.device("cpu"), True
    observation_spec = {"observation": None, "success": None}

    def __init__(self, success: list[list[int]], ends: bool = True):
        self.success, self.ends = torch.tensor(success, dtype=torch.bool), ends

    def reset(self, _):
        self.t = 0
        return TensorDict({"observation": {"proprio": torch.zeros(2, 1)}}, [2])

    def step(self, step):
        steps = self.success.shape[1]
        reported = self.success[:, min(self.t, steps - 1), None]
        self.t += 1
        done = torch.full((2, 1), self.ends and self.t == steps)
        after = {"reward": torch.zeros(2, 1), "done": done, "success": reported}
        return step.set("next", TensorDict({**after, "observation": step["observation"]}, [2]))


def idle(step):
    return step.set("action", torch.zeros(2, 1))


def test_success_is_success_at_any_step_and_at_the_end_is_told_apart():
    result = evaluate(Going([[0, 1, 0], [0, 1, 1]]), idle, range(2))
    assert [(e.success, e.success_at_end, e.cut_off) for e in result.episodes] == [
        (True, False, False),
        (True,) * 2 + (False,),
    ]
    assert result.metrics()["eval/success_rate"] == 1.0 and result.metrics()["eval/success_at_end"] == 0.5
    assert result.rows()[0]["success_at_end"] is False
    assert "eval/success_at_end" not in evaluate(Going([[0, 0, 1], [0, 0, 0]]), idle, range(2)).metrics()


def test_an_episode_that_is_cut_off_has_no_success_whatever_it_did():
    result = evaluate(Going([[0, 1], [0, 1]], ends=False), idle, range(2), max_steps=20)
    assert [(e.success, e.success_at_end, e.cut_off, e.length) for e in result.episodes] == [
        (False, False, True, 20)
    ] * 2
    assert result.metrics()["eval/success_rate"] == 0.0


def test_films_are_of_the_first_episodes_from_their_first_state_to_their_last():
    result = run(3, range(5), film=4)
    assert [len(frames) for frames in result.frames] == [e.length + 1 for e in result.episodes[:4]]
    assert result.filmed_success == [True] * 4
    about, outcome = result.captions[2]
    assert about == f"state 2 · {result.episodes[2].instruction}" and len(result.captions) == 4
    assert outcome == f"success · return {result.episodes[2].episode_return:.2f} · {result.episodes[2].length} steps"


@torch.no_grad()
def test_a_film_ends_with_what_the_last_step_led_to():
    """Frame by frame it shows what an environment does that is stepped by hand."""
    result = run(1, range(1), film=1)
    env = TabletopEnv(1, "reach", modalities=MODALITIES, max_steps=20)
    now = env.reset(TensorDict({"initial_state": torch.zeros(1, 1, dtype=torch.int64)}, [1]))
    for frame in result.frames[0]:
        assert (env.render_frames()[0].numpy() == frame).all()
        now = env.step(now.set("action", env.expert_action()))["next"]


def test_progress_is_told_whenever_episodes_end():
    seen = []
    run(2, range(5), on_end=seen.append)
    assert seen == sorted(set(seen)) and seen[-1] == 5 and len(seen) > 2


def test_a_row_takes_the_next_state_as_soon_as_its_episode_has_ended():
    """Five episodes in two rows take as many decisions as the longer row's, not as three waves of the slowest."""
    env = TabletopEnv(2, "reach", modalities=MODALITIES, max_steps=20)
    expert, decisions = Expert(env), []
    result = evaluate(env, lambda step: decisions.append(1) or expert(step), range(20))
    lengths, rows = [e.length for e in result.episodes], [0, 0]
    for length in lengths:  # each goes to the row that is free first
        rows[rows.index(min(rows))] += length
    waves = sum(max(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True))
    assert len(decisions) == max(rows) < waves


def test_a_policy_may_be_asked_for_samples():
    class Drawing(Expert):
        def __call__(self, step):
            acted = super().__call__(step)
            noise = exploration_type() == ExplorationType.RANDOM
            return acted.set("action", acted["action"] + noise * torch.randn(acted["action"].shape))

    env = TabletopEnv(3, "reach", modalities=MODALITIES, max_steps=20)
    modes = evaluate(env, Drawing(env), range(9)).episodes
    samples = [evaluate(env, Drawing(env), range(9), mode="sample").episodes for _ in range(2)]
    assert modes == run(3, range(9)).episodes and samples[0] == samples[1] != modes


def chunked(num_envs: int, chunk: int, **options) -> Evaluation:
    env = TabletopEnv(num_envs, "reach", modalities=MODALITIES, max_steps=20, chunk=chunk)
    single = TabletopEnv(num_envs, "reach", modalities=MODALITIES, max_steps=20)

    def towards(step):
        """The expert's actions for a whole chunk, from a world of single steps that is where this one is."""
        single._state = {key: value.clone() for key, value in env._state.items()}
        single._images, actions = env._images, []
        for _ in range(chunk):
            actions.append(single.expert_action())
            single.step(TensorDict({"action": actions[-1]}, [num_envs]))
        return step.set("action", torch.stack(actions, dim=1))

    return evaluate(env, towards, range(7), **options)


def test_chunks_count_control_steps_and_are_filmed_in_full():
    expected = run(3, range(7), film=4)
    for chunk in (3, 5):
        result = chunked(3, chunk, film=4)
        assert result.episodes == expected.episodes
        for ours, theirs in zip(result.frames, expected.frames, strict=True):
            assert (ours == theirs).all()
    assert next(e.length for e in chunked(3, 4, max_steps=5).episodes if e.cut_off) == 8  # no chunk is cut in two


def test_chunks_are_filmed_where_only_what_is_observed_can_be_seen():
    """An environment that does not render shows its picture at each look, and nothing in between."""
    config = {"keys": {"rgb": "images.front", "proprio": "state"}, "chunk": 2, "max_episode_steps": 6}
    env = make_env("gym:user_package.reach_env:ReachEnv", 2, config)
    still = lambda step: step.set("action", torch.zeros(2, 2, 2))  # noqa: E731
    result = evaluate(env, still, range(2), film=2)
    assert [e.length for e in result.episodes] == [6, 6] and [len(frames) for frames in result.frames] == [4, 4]


def test_success_is_told_for_every_task():
    episodes = [Episode(i, None, i % 3 == 0, 0.0, 1, task=("a", "b")[i % 2]) for i in range(6)]
    metrics = Evaluation(episodes, []).metrics()
    assert metrics["eval/success_rate/a"] == metrics["eval/success_rate/b"] == pytest.approx(1 / 3)
    assert Evaluation(episodes, []).summary().endswith("success over 6 episodes; a 0.33; b 0.33")
    assert "eval/success_rate/a" not in Evaluation(episodes[::2], []).metrics()  # one task alone
    env = TabletopEnv(2, "reach", modalities=MODALITIES, max_steps=20)
    env.task_names = ("far", "near", "other")
    result = evaluate(env, Expert(env), [5, 0, 1])
    assert [e.task for e in result.episodes] == ["other", "far", "near"]


def test_an_action_that_is_no_number_is_named():
    env = TabletopEnv(2, "reach", modalities=MODALITIES)
    with pytest.raises(NonFiniteError, match="action is nan at index .0, 0. in evaluation"):
        evaluate(env, lambda step: step.set("action", torch.full((2, 3), float("nan"))), range(2))


@pytest.mark.parametrize(
    ("place", "message"), [("observation", "observation 'proprio' is nan"), ("reward", "reward is nan")]
)
def test_what_the_environment_breaks_is_named_and_not_the_action(monkeypatch, place, message):
    env = TabletopEnv(2, "reach", modalities=MODALITIES)
    step = env._step

    def broken(tensordict):
        after = step(tensordict)
        (after["observation", "proprio"] if place == "observation" else after["reward"])[1, 0] = float("nan")
        return after

    monkeypatch.setattr(env, "_step", broken)
    with pytest.raises(NonFiniteError, match=message):
        evaluate(env, Expert(env), range(2))


def test_metrics_have_wilsons_interval():
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # the formula, by hand
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == 1.0
    episodes = [Episode(i, None, i < 8, float(i), 10) for i in range(10)]
    metrics = Evaluation(episodes, []).metrics()
    assert metrics["eval/success_rate"] == 0.8 and metrics["eval/return"] == 4.5
    assert (metrics["eval/success_low"], metrics["eval/success_high"]) == wilson_interval(8, 10)
    without = Evaluation([Episode(0, None, None, 2.0, 4)], [])
    assert without.metrics() == {"eval/return": 2.0, "eval/episode_length": 4.0} and without.score == 2.0
    assert without.rows(seed=3)[0] == {
        "seed": 3, "initial_state": 0, "instruction": None, "success": None, "episode_return": 2.0, "length": 4,
        "success_at_end": None, "cut_off": False, "task": None,
    }  # fmt: skip


def test_what_is_shown_is_the_first_filmed_episode_that_succeeded():
    def shown(successes: list[bool | None], filmed: int) -> int:
        episodes = [Episode(i, None, success, 0.0, 3) for i, success in enumerate(successes)]
        return Evaluation(episodes, [np.zeros((4, 8, 8, 3), np.uint8)] * filmed).shown

    assert shown([False, False, True, True], filmed=4) == 2
    assert shown([False, False, True, True], filmed=2) == 0, "the film of the third does not exist"
    assert shown([None, None], filmed=2) == 0
