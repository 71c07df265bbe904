"""envs/gym.py: layout, seeds, actions, worker processes and the errors a user can meet."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs.utils import check_env_specs

from envs.gym import make_gym_env
from envs.simulator import HELD_OUT_STATES
from research.errors import SimulatorFailed, UserError
from research.schema import check_observation, decode_text
from research.training.evaluation import evaluate, wilson_interval

REACH = "user_package.reach_env:ReachEnv"
KEYS = {"proprio": ["state", "clock"], "rgb": "images.front", "depth": "depth"}


@pytest.fixture
def make():
    """`make_gym_env` on the CPU, closed at the end of the test."""
    envs = []

    def build(env_id=REACH, /, num_envs=3, seed=0, **config):
        if "Reach" in env_id or "make_reach" in env_id:
            config = {"keys": KEYS, "max_episode_steps": 12, **config}
        envs.append(make_gym_env(env_id, num_envs, "cpu", seed, **config))
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def reset_to(env, ids):
    return env.reset(TensorDict({"initial_state": torch.tensor(ids)[:, None]}, env.batch_size))


def act(env, action):
    td = TensorDict({"action": torch.as_tensor(action, dtype=torch.float32)}, env.batch_size)
    return env.step(td)["next"]


def forward_policy(td):
    return td.set("action", torch.full((*td.batch_size, 2), 0.3))


# ------------------------------------------------------------------- layout


@pytest.mark.parametrize("workers", [0, 2])
def test_layout_follows_the_schema(make, workers):
    env = make(workers=workers, instruction_key="instruction")
    check_env_specs(env)
    td = env.rollout(5, break_when_any_done=False)
    check_observation(td[:, 0]["observation"], "gym")
    assert td["observation", "rgb"].shape == (3, 5, 24, 32, 3)
    assert td["observation", "depth"].shape == (3, 5, 24, 32)
    assert td["observation", "proprio"].shape == (3, 5, 7)
    assert td["next", "reward"].dtype == torch.float32
    for key in ("done", "terminated", "truncated", "success"):
        assert td["next", key].shape == (3, 5, 1) and td["next", key].dtype == torch.bool
    assert td["initial_state"].dtype == torch.int64
    # The observation is read at the right moment: the clock and the picture count the steps.
    assert td["observation", "proprio"][0, :, -1].tolist() == [0, 1, 2, 3, 4]
    assert td["next", "observation", "rgb"][0, :, 0, 0].tolist() == [[i, i, 9] for i in range(1, 6)]


def test_mujoco_env_by_registered_id(make):
    env = make("InvertedPendulum-v5", num_envs=2, instruction="keep the pole up")
    check_env_specs(env)
    td = reset_to(env, [5, 6])
    expected = [gymnasium.make("InvertedPendulum-v5").reset(seed=s)[0] for s in (5, 6)]
    torch.testing.assert_close(td["observation", "proprio"], torch.tensor(np.array(expected), dtype=torch.float32))
    assert decode_text(td["observation", "language"]) == ["keep the pole up"] * 2
    assert "success" not in td
    assert env.render_frames(32) is None


@pytest.mark.parametrize(
    "env_id",
    ["user_package:UserReach-v0", REACH, "user_package.reach_env.ReachEnv", "user_package.reach_env:make_reach"],
)
def test_every_way_to_name_an_env(make, env_id):
    assert make(env_id, num_envs=1).reset()["observation", "proprio"].shape == (1, 7)


def test_default_keys(make):
    image_env = make("user_package.reach_env:UnboundedBoxEnv", num_envs=2)
    assert list(image_env.reset()["observation"].keys()) == ["rgb"]
    assert list(make("Pendulum-v1", num_envs=2).reset()["observation"].keys()) == ["proprio"]
    assert list(make(num_envs=2, keys=None).reset()["observation"].keys()) == ["depth"]  # the one name that matches


def test_text_observation_is_the_language(make):
    env = make(keys={**KEYS, "language": "task"})
    td = reset_to(env, [1, 2, 3])
    targets = td["observation", "proprio"][:, 2]
    assert decode_text(td["observation", "language"]) == ["go left" if x < 0 else "go right" for x in targets]


def test_instruction_of_each_episode(make):
    env = make(num_envs=4, instruction_key="instruction", instruction_length=16)
    td = reset_to(env, [0, 1, 2, 3])
    assert td["observation", "language"].shape == (4, 16)
    expected = ["go left" if x < 0 else "go right" for x in td["observation", "proprio"][:, 2]]
    assert decode_text(td["observation", "language"]) == expected and len(set(expected)) == 2
    assert torch.equal(act(env, torch.zeros(4, 2))["observation", "language"], td["observation", "language"])
    assert decode_text(make(instruction_key="text.short").reset()["observation", "language"]) == ["go"] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_from_render(make, workers):
    env = make(keys={"proprio": "state"}, render=[12, 16], workers=workers)
    check_env_specs(env)
    env.reset()
    for _ in range(3):
        rgb = act(env, torch.zeros(3, 2))["observation", "rgb"]
    assert rgb.shape == (3, 12, 16, 3)
    assert rgb[:, :, 0].unique(dim=0).tolist() == [[[3, 0, 0]] * 12]  # left half: the clock
    assert rgb[:, :, -1].unique(dim=0).tolist() == [[[3, 200, 0]] * 12]
    frames = env.render_frames(32)  # 48 x 64 in a square of 32: bars of 4 above and below
    assert frames.shape == (3, 32, 32, 3) and frames.dtype == torch.uint8
    assert frames[:, :4].max() == 0 and frames[:, 28:].max() == 0
    assert frames[0, 5, 1].tolist() == [3, 0, 0] and frames[0, 27, -1].tolist() == [3, 200, 0]


def test_video_falls_back_to_the_rgb_observation(make):
    env = make(num_envs=1)
    env.reset()
    act(env, torch.zeros(1, 2))
    frames = env.render_frames(64)  # 24 x 32 in a square of 64: bars of 8 above and below
    assert frames.shape == (1, 64, 64, 3)
    assert frames[0, 32, 32].tolist() == [1, 1, 9] and frames[0, 7].max() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_several_cameras(make, workers):
    keys = {"proprio": "state", "rgb_front": "front", "rgb_wrist": "wrist.rgb", "depth_wrist": "wrist.depth"}
    env = make("user_package:UserTwoCameras-v0", num_envs=2, keys=keys, workers=workers)
    check_env_specs(env)
    env.reset()
    for _ in range(3):
        observation = act(env, torch.zeros(2, 2))["observation"]
    check_observation(observation, "gym")
    assert observation["rgb_front"].shape == (2, 8, 8, 3) and (observation["rgb_front"] == 3).all()
    assert observation["rgb_wrist"].shape == (2, 4, 8, 3) and (observation["rgb_wrist"] == 6).all()
    assert observation["rgb_wrist"].dtype == torch.uint8
    assert observation["depth_wrist"].shape == (2, 4, 8)
    torch.testing.assert_close(observation["depth_wrist"][:, 0, 0], observation["proprio"][:, 0].abs())
    assert set(env.render_frames(8).unique().tolist()) == {3}  # no picture is just "rgb": the first camera's is shown
    both = make("user_package:UserTwoCameras-v0", num_envs=1, keys={"rgb_wrist": "wrist.rgb", "rgb": "front"})
    both.reset()
    act(both, torch.zeros(1, 2))
    assert both.render_frames(8).unique().tolist() == [1]


# ------------------------------------------------------------------- episodes


def test_termination_and_truncation_stay_apart(make):
    env = make(num_envs=16, max_episode_steps=6)
    td = env.rollout(60, forward_policy, break_when_any_done=False)["next"]
    ended = td["terminated"] | td["truncated"]
    assert torch.equal(td["done"], ended)
    steps = td["observation", "proprio"][..., 6:]
    assert td["terminated"].any() and torch.equal(td["terminated"], td["success"])
    assert (steps[td["terminated"]] < 6).any()
    assert torch.equal(td["truncated"], steps == 6)


def test_success_from_info_under_another_name(make):
    env = make(num_envs=16, env_kwargs={"success_name": "solved"}, success_key="solved")
    td = env.rollout(40, forward_policy, break_when_any_done=False)["next"]
    assert td["success"].any() and torch.equal(td["success"], td["terminated"])
    assert make(num_envs=1, env_kwargs={"success_name": "is_success"}).has_success
    assert not make(num_envs=1, env_kwargs={"success_name": None}).has_success


def test_success_from_the_return(make):
    env = make("user_package.reach_env:UnboundedBoxEnv", num_envs=2, success_return=5.0, keys={"rgb": ""})
    for _ in range(2):  # a reset starts the return again
        env.reset()
        flags = [act(env, [[1.0, 1.0], [0.0, 1.0]])["success"].ravel().tolist() for _ in range(5)]
        assert flags == [[False, False], [False, False], [True, False], [True, False], [True, True]]


def test_initial_states_have_ids(make):
    env = make()
    td = reset_to(env, [7, 8, 7])
    start = td["observation", "proprio"]
    assert td["initial_state"].ravel().tolist() == [7, 8, 7]
    assert torch.equal(start[0], start[2]) and not torch.equal(start[0], start[1])
    assert act(env, torch.ones(3, 2))["initial_state"].ravel().tolist() == [7, 8, 7]
    assert torch.equal(reset_to(make(seed=5), [7, 8, 7])["observation", "proprio"], start)


@pytest.mark.parametrize("workers", [0, 2])
def test_partial_reset(make, workers):
    env = make(workers=workers)
    reset_to(env, [1, 2, 3])
    before = act(env, torch.zeros(3, 2)).exclude("reward")
    request = {"_reset": torch.tensor([[True], [False], [True]]), "initial_state": torch.tensor([[11], [12], [13]])}
    td = env.reset(before.clone().update(request))
    assert torch.equal(td["observation", "proprio"][1], before["observation", "proprio"][1])
    expected = reset_to(make(), [11, 12, 13])["observation", "proprio"]
    assert torch.equal(td["observation", "proprio"][::2], expected[::2])
    after = act(env, torch.zeros(3, 2)).exclude("reward")  # row 1 went on, whatever was asked for it
    assert after["observation", "proprio"][:, -1].tolist() == [1, 2, 1]
    assert after["initial_state"].ravel().tolist() == [11, 2, 13]
    only_row_1 = torch.tensor([[False], [True], [False]])
    fresh = env.reset(after.exclude("initial_state").set("_reset", only_row_1))["observation", "proprio"]
    assert torch.equal(fresh[::2], after["observation", "proprio"][::2])
    ids = act(env, torch.zeros(3, 2))["initial_state"].ravel()
    assert ids[::2].tolist() == [11, 13] and ids[1] >= HELD_OUT_STATES


def test_training_states_come_from_the_seed(make):
    def ids(env, episodes=20):
        return torch.cat([env.reset()["initial_state"] for _ in range(episodes)], 1)

    first = ids(make(seed=1))
    assert torch.equal(first, ids(make(seed=1)))
    assert torch.equal(first[:2], ids(make(seed=1, num_envs=2)))  # a row's stream is its own
    assert not (first == ids(make(seed=2))).any()
    assert first.unique().numel() == first.numel()
    assert first.min() >= HELD_OUT_STATES and first.max() < 2**31
    env = make(seed=9)
    env.reset()
    env.set_seed(1)
    assert torch.equal(first, ids(env))


def test_state_dict_continues_the_stream(make):
    env, other = make(seed=3), make(seed=4)
    env.reset()
    saved = env.state_dict()
    expected = [env.reset()["initial_state"] for _ in range(3)]
    other.load_state_dict(saved)
    assert all(torch.equal(other.reset()["initial_state"], ids) for ids in expected)


def test_automatic_resets_start_new_episodes(make):
    """The id of the episode that ended, still in the TensorDict, must not be taken for a request."""
    td = make(num_envs=2).rollout(40, break_when_any_done=False)
    for row in td:
        ids = row["initial_state"].ravel()
        assert ids.unique().numel() == 1 + row["next", "done"][:-1].sum()
        assert torch.equal(ids, row["next", "initial_state"].ravel())


def test_nan_passes_unchanged(make):
    env = make(env_kwargs={"wrong": "nan"})
    env.reset()
    for _ in range(4):
        observation = act(env, torch.zeros(3, 2))["observation"]
    assert observation["proprio"][:, :6].isnan().all() and not observation["depth"].isnan().any()


# ------------------------------------------------------------------- actions


def test_actions_are_rescaled_and_clipped(make):
    env = make(num_envs=5)
    assert torch.equal(env.action_spec.space.low, -torch.ones(5, 2))
    env.reset()
    actions = [[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [-5.0, 9.0], [0.5, -0.5]]
    received = act(env, actions)["observation", "proprio"][:, 4:6]
    torch.testing.assert_close(received, torch.tensor([[-2.0, -1.0], [2, 3], [0, 1], [-2, 3], [1, 0]]))


def test_rescaling_agrees_with_gymnasium_within_its_bounds(make):
    env = make(num_envs=1)
    reference = gymnasium.wrappers.RescaleAction(gymnasium.make("user_package:UserReach-v0"), -1.0, 1.0)
    env.reset()
    reference.reset(seed=0)
    for action in np.random.default_rng(0).uniform(-0.99, 0.99, (20, 2)).astype(np.float32):
        ours = act(env, action[None])["observation", "proprio"][0, 4:6]
        np.testing.assert_allclose(ours, reference.step(action)[0]["state"][4:6], atol=1e-6)


def test_extreme_actions_never_leave_the_box(make):
    """The user's env asserts that its action space holds the action; rounding may not carry one over the edge."""
    rng = np.random.default_rng(0)
    for high in rng.uniform(0.1, 2.0, (20, 2)):
        env = make(num_envs=2, env_kwargs={"action_high": tuple(high)})
        env.reset()
        act(env, [[1.0, 1.0], [-1.0, -1.0]])


def test_unbounded_actions_pass_through(make):
    env = make("user_package.reach_env:UnboundedBoxEnv", num_envs=2)
    check_env_specs(env)
    env.reset()
    assert act(env, [[10.0, -3.0], [0.5, 0.25]])["reward"].ravel().tolist() == [7.0, 0.75]


# ------------------------------------------------------------------- processes


def test_workers_do_not_change_the_data(make):
    """Three rows over two processes, ends of episodes included: equal bit for bit."""
    one, two = (
        make(workers=workers, seed=2, instruction_key="instruction").rollout(
            30, forward_policy, break_when_any_done=False
        )
        for workers in (0, 2)
    )
    assert one["next", "done"].sum() > 2
    assert (one == two).all()


def test_close_ends_the_workers(make):
    env = make(workers=2)
    processes = [group._process for group in env._groups]
    assert all(process.is_alive() for process in processes)
    env.close()
    assert [process.exitcode for process in processes] == [0, 0]
    env.close()


def test_no_more_workers_than_envs(make):
    assert len(make(num_envs=2, workers=5)._groups) == 2


def test_collector(make):
    env = make(num_envs=4, workers=2)
    collector = Collector(env, forward_policy, frames_per_batch=80, total_frames=320)
    batches = list(collector)
    collector.shutdown()
    td = torch.cat(batches, 1)
    assert td.shape == (4, 80)
    root, after = td["observation", "proprio"], td["next", "observation", "proprio"]
    goes_on = ~td["next", "done"][:, :-1, 0]
    assert torch.equal(root[:, 1:][goes_on], after[:, :-1][goes_on])
    assert td["next", "done"].sum() > 8
    assert not torch.equal(root[:, 1:][~goes_on], after[:, :-1][~goes_on])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_inside_the_env(make, workers):
    with pytest.raises(UserError) as caught:
        make(workers=workers, env_kwargs={"fail_in": "reset"})
    assert "reset(seed=0) raised ValueError: the simulator lost its mind (reach_env.py, line" in str(caught.value)
    env = make(workers=workers, env_kwargs={"fail_in": "step"})
    with pytest.raises(SimulatorFailed, match=r"step\(\) raised ValueError: the simulator lost its mind") as caught:
        env.rollout(9, forward_policy, break_when_any_done=False)
    assert "\n" not in str(caught.value)
    env.close()


def test_a_worker_that_dies(make):
    env = make(workers=2, env_kwargs={"exit_in": "step"})
    with pytest.raises(SimulatorFailed, match=r"the worker of rows 0-1 .* ended during step \(exit code 7\)"):
        env.rollout(9, forward_policy, break_when_any_done=False)
    env.close()


# ------------------------------------------------------------------- what a user can get wrong


@pytest.mark.parametrize(
    ("env_id", "config", "message"),
    [
        ("InvertdPendulum-v5", {}, "did you mean 'InvertedPendulum-v5'"),
        ("InvertedPendulum-v9", {}, "did you mean .*'InvertedPendulum-v5'"),
        ("no_such_package.env:Env", {}, "there is no module 'no_such_package'"),
        ("no_such_package.env.Env", {}, "there is no module 'no_such_package'"),
        ("user_package.reach_env:ReachEnvv", {}, "neither registers nor defines .* did you mean 'ReachEnv'"),
        ("user_package.habits:TupleActions", {}, "takes actions from Tuple.*supported are Box, Discrete, Mul"),
        (REACH, {"keys": {}}, "nothing .* is observed"),
        (REACH, {"keys": {"proprio": "states"}}, "keys.proprio: .* no observation 'states'; it has .*images.front"),
        (REACH, {"keys": {"proprio": "images"}}, "no observation 'images'"),
        (REACH, {"keys": {"proprio": 3}}, "no observation 3"),
        (REACH, {"keys": {"joints": "state"}}, "keys.joints: the schema knows rgb, depth"),
        (REACH, {"keys": {"joints_left": "state"}}, "keys.joints_left: the schema knows .* rgb_<camera>"),
        (REACH, {"keys": {"proprio_left": "state"}}, "keys.proprio_left: the schema knows"),
        (REACH, {"keys": {"rgb_wrist": "state"}}, r"keys.rgb_wrist: should be uint8 \[H, W, 3\].* got Box.*float64"),
        (REACH, {"keys": {"depth_wrist": ["depth", "depth"]}}, "keys.depth_wrist: expected one path"),
        (REACH, {"keys": {"rgb": "state"}}, r"keys.rgb: should be uint8 \[H, W, 3\].* got Box.*float64"),
        (REACH, {"keys": {"rgb": ["images.front", "depth"]}}, "keys.rgb: expected one path"),
        (REACH, {"keys": {"depth": "images.front"}}, r"keys.depth: should be \[H, W\].* of floats or uint16, got Box"),
        (REACH, {"keys": {"proprio": "gripper"}}, r"keys.proprio: should be a Box, got Discrete\(2\)"),
        (REACH, {"keys": {"language": "state"}}, "keys.language: should be a Text"),
        (REACH, {"keys": "state"}, "env_config.keys: expected an object"),
        (REACH, {"render": [32, 32]}, "rgb comes from render or from keys"),
        (REACH, {"render": 32}, "env_config.render: expected .height, width."),
        (REACH, {"keys": {}, "render": [8, 8], "env_kwargs": {"render_mode": "human"}}, "needs render_mode"),
        (REACH, {"instruction": "é" * 40}, "80 bytes, more than the 64"),
        (REACH, {"instruction": "a", "instruction_key": "instruction"}, "not both"),
        (REACH, {"instruction": "a", "keys": {"language": "task"}}, "not from both"),
        (REACH, {"instruction_key": "goal"}, r"no text under info\['goal'\]; info has instruction, text"),
        (REACH, {"instruction_length": 0}, "instruction_length: expected an integer from 1 to 65536"),
        (REACH, {"instruction_length": 10**13}, "instruction_length: expected an integer from 1 to 65536, got 10"),
        (REACH, {"success_key": "success", "success_return": 1.0}, "not both"),
        (REACH, {"workers": -1}, "workers: expected an integer of at least 0"),
        (REACH, {"max_episode_steps": -1}, "max_episode_steps: expected an integer of at least 1"),
        (REACH, {"sucess_key": "x"}, "no option 'sucess_key'; did you mean 'success_key'"),
        (REACH, {"env_kwargs": {"render_mode": "rgb_array", "fail_in": "render"}}, r"render\(\) raised ValueError"),
        (REACH, {"keys": {}, "render": [8, 8], "env_kwargs": {"wrong": "frame"}}, "should return uint8 .* got object"),
        (REACH, {"env_id": "x"}, "no option 'env_id'; there are keys, instruction"),
        (REACH, {"env_kwargs": {"gravity": 1}}, "unexpected keyword argument 'gravity'"),
        (REACH, {"env_kwargs": {"action_high": (1.0,)}}, "making it with .* raised"),
    ],
)
def test_bad_input(make, env_id, config, message):
    with pytest.raises(UserError, match=message) as caught:
        make(env_id, **config)
    assert "\n" not in str(caught.value)


def test_unmapped_dict_lists_what_there_is(make, monkeypatch):
    monkeypatch.setattr("envs.gym_spaces.MODALITIES", ("rgb", "proprio"))  # the env's only matching name is depth
    with pytest.raises(UserError, match=r"say which observations .*images.front: Box.* state: Box"):
        make(keys=None)


def test_a_missing_simulator_package(make, monkeypatch):
    """As when MuJoCo is not installed: Gymnasium's own hint reaches the user."""

    def refuse(*args, **kwargs):
        raise gymnasium.error.DependencyNotInstalled('MuJoCo is not installed, run `pip install "gymnasium[mujoco]"`')

    monkeypatch.setattr("gymnasium.envs.mujoco.mujoco_env.MujocoEnv.__init__", refuse)
    with pytest.raises(UserError, match=r"package that is not installed: .*pip install \"gymnasium\[mujoco\]"):
        make("InvertedPendulum-v5")


def test_a_module_that_needs_a_missing_package(make, tmp_path, monkeypatch):
    (tmp_path / "needy_env.py").write_text("import a_simulator_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="importing 'needy_env' needs 'a_simulator_nobody_has': pip install"):
        make("needy_env:Env")


def test_an_observation_that_breaks_its_space(make):
    env = make(env_kwargs={"wrong": "shape"})
    with pytest.raises(SimulatorFailed, match=r"observation for 'proprio' is float64 \[1\], but its space says \[6\]"):
        env.rollout(9, forward_policy, break_when_any_done=False)


def test_a_misspelt_success_key_is_not_a_success_rate_of_zero(make):
    with pytest.raises(UserError, match=r"ended without info\['solved'\]; info has success"):
        make(success_key="solved", max_episode_steps=3)


def test_negative_ids(make):
    with pytest.raises(UserError, match="initial_state: ids are seeds of at least 0, got -1"):
        reset_to(make(), [0, -1, 2])


# ------------------------------------------------------------------- ids of initial states are tried, not assumed


HABITS = "user_package.habits:"


@pytest.mark.parametrize("habit", ["Global", "Remembering"])
def test_ids_that_do_not_decide_the_state_are_refused(make, habit):
    with pytest.raises(
        UserError, match=r"same initial-state id from another state.*'proprio' differs.*ids_reproducible"
    ):
        make(f"{HABITS}{habit}")
    env = make(f"{HABITS}{habit}", ids_reproducible=False)  # one that knows
    one, other = (reset_to(env, [0, 1, 2])["observation", "proprio"] for _ in range(2))
    assert not torch.equal(one, other)
    with pytest.raises(UserError, match=r"env_config\.ids_reproducible: expected true or false, got 'no'"):
        make(f"{HABITS}{habit}", ids_reproducible="no")


def test_a_reward_that_depends_on_what_was_before_is_refused(make):
    with pytest.raises(
        UserError, match=r"same action .* a reward of [\d.]+ and, the second time.*algorithm\.cfg\.normalize_reward"
    ):
        make(f"{HABITS}make_scaled")
    make(f"{HABITS}make_scaled", ids_reproducible=False).reset()  # one that knows


def test_ids_that_decide_it_are_taken(make, caplog):
    env = make(f"{HABITS}Honest")
    assert env.distinct_states and caplog.text == ""
    first = reset_to(env, [5, 6, 5])["observation", "proprio"]
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])


def test_one_state_for_all_ids_is_named_and_counts_as_one(make, caplog):
    env = make(f"{HABITS}Single")
    assert not env.distinct_states and "an evaluation is of one state" in caplog.text
    result = evaluate(env, forward_one, range(6))
    assert result.metrics()["eval/success_rate"] == 1.0
    assert (result.metrics()["eval/success_low"], result.metrics()["eval/success_high"]) == wilson_interval(1, 1)
    assert "all from one initial state" in result.summary()
    several = evaluate(make(f"{HABITS}Honest"), forward_one, range(6))
    assert several.metrics()["eval/success_low"] > 0 or several.metrics()["eval/success_rate"] < 1


def test_pictures_that_are_upside_down_in_memory_are_taken(make):
    env = make(f"{HABITS}Honest", keys={}, render=[6, 4])
    assert env.reset()["observation", "rgb"].shape == (3, 6, 4, 3)
    assert env.render_frames(size=8).shape == (3, 8, 8, 3)


def forward_one(td):
    return td.set("action", torch.zeros(*td.batch_size, 1))


# ------------------------------------------------------------------- one number, in whatever form


@pytest.mark.parametrize("form", ["arrays", "tensors"])
def test_rewards_and_ends_of_one_element_are_taken(make, form):
    env = make(f"{HABITS}Returning", env_kwargs={"form": form})
    env.reset()
    for t in range(1, 6):
        after = act(env, torch.zeros(3, 1))
        assert after["reward"].flatten().tolist() == [1.0] * 3
        assert after["truncated"].all() == (t == 5) and not after["terminated"].any()


@pytest.mark.parametrize("form", ["two", "none", "text"])
def test_a_reward_that_is_no_single_number_is_named(make, form):
    with pytest.raises(UserError, match="step.. should return one number as reward, got"):
        make(f"{HABITS}Returning", env_kwargs={"form": form})


def test_bounds_that_are_finite_in_name_only_do_not_rescale(make):
    env = make(f"{HABITS}NamedBounds")
    env.reset()
    assert act(env, torch.full((3, 1), 0.5))["observation", "proprio"][:, 1].tolist() == [0.5] * 3
