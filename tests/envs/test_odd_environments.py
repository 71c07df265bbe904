"""Environments with habits that public bug reports describe: each with its right value, or refused by name.

Single environments and, where that makes a difference, Gymnasium's vector environments of them.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import gymnasium
import numpy as np
import ppo_vla
import pytest
import torch
from tensordict import TensorDict
from user_package import odd_envs
from worlds import run_folder, write_config

from envs import make_env
from envs.failures import blame, warn_once
from research.errors import NonFiniteError, SimulatorFailed, UserError
from research.runs.tracking import read_metrics
from research.schema import check_observation, decode_text
from research.training.evaluation import evaluate

IDS = [10, 60, 90, 57]  # of these 60, 90 and 57 are beyond a half of 97, and 90 is beyond 0.9 of it
BOTH = ("gym", "gym_vec")


@pytest.fixture
def make():
    envs = []

    def build(name, prefix="gym", **config):
        envs.append(make_env(f"{prefix}:user_package.odd_envs:{name}", len(IDS), config))
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def start(env, ids=IDS) -> TensorDict:
    return env.reset(TensorDict({"initial_state": torch.tensor(ids)[:, None]}, [len(IDS)]))


def act(env, action) -> TensorDict:
    action = torch.as_tensor(action, dtype=torch.float32).expand(env.action_spec.shape)
    return env.step(TensorDict({"action": action}, [len(IDS)]))["next"]


def still(step):
    return step.set("action", torch.zeros(len(IDS), 1))


@pytest.mark.parametrize("prefix", BOTH)
@pytest.mark.parametrize("name", ["Truncates", "Terminates", "RewardArray", "RewardTorch", "DoneArray"])
def test_five_steps_of_reward_one(make, prefix, name):
    if prefix == "gym_vec" and name == "RewardArray":  # Gymnasium's own loop over single environments takes none
        with pytest.raises(UserError, match=r"step\(\) raised ValueError"):
            make(name, prefix)
        return
    env = make(name, prefix)
    assert [(e.length, e.episode_return, e.success, e.cut_off) for e in evaluate(env, still, IDS).episodes] == [
        (5, 5.0, None, False)
    ] * 4
    start(env)
    for t in range(1, 6):
        after = act(env, 0.0)
        assert after["terminated"].all() == (t == 5 and name == "Terminates"), t
        assert after["truncated"].all() == (t == 5 and name != "Terminates"), t


def test_an_episode_longer_than_an_evaluation_is_cut_off(make):
    episodes = evaluate(make("Long"), still, IDS, max_steps=30).episodes
    assert [(e.length, e.cut_off) for e in episodes] == [(30, True)] * 4


@pytest.mark.parametrize("prefix", BOTH)
@pytest.mark.parametrize(
    ("name", "at_end"),
    [
        ("SuccessAtEndOnly", True), ("SuccessWhenTrueOnly", True), ("SuccessFloat", True), ("SuccessArray1", True),
        ("SuccessTorch", True), ("SuccessPasses", False),
    ],
)  # fmt: skip
def test_success_is_found_and_means_what_was_reported(make, prefix, name, at_end):
    result = evaluate(make(name, prefix), still, IDS)
    assert [e.success for e in result.episodes] == [False, True, True, True]
    assert [e.success_at_end for e in result.episodes] == [False, at_end, at_end, at_end]
    assert ("eval/success_at_end" in result.metrics()) == (not at_end)


@pytest.mark.parametrize("prefix", BOTH)
def test_success_that_never_ends_is_cut_off_without(make, prefix):
    episodes = evaluate(make("SuccessNeverEnds", prefix), still, IDS, max_steps=20).episodes
    assert [(e.length, e.success, e.cut_off) for e in episodes] == [(20, False, True)] * 4


@pytest.mark.parametrize("prefix", BOTH)
def test_success_that_shows_only_later_is_warned_of(make, prefix, caplog):
    env = make("SuccessLater", prefix)
    assert not env.has_success
    start(env)
    act(env, 0.0)
    act(env, 0.0)
    assert caplog.text.count("set trainer.env_config.success_key to 'success'") == 1
    with pytest.raises(UserError, match=r"trainer.env_config.success_key: .*ended without info\['success'\]"):
        make("SuccessLater", prefix, success_key="success")


@pytest.mark.parametrize(
    ("name", "action", "arrives"),
    [
        ("HalfBounded", 3.5, 3.5), ("HalfBounded", -1.0, 0.0), ("Infinite", 3.5, 3.5), ("FloatMax", 0.5, 0.5),
        ("Asymmetric", 0.0, 20.0), ("Asymmetric", 1.0, 30.0), ("EqualBounds", 0.7, 0.25), ("ActionMatrix", 0.5, 0.5),
        ("ScalarAction", 0.5, 1.0), ("DiscreteActions", 2.0, 2.0), ("DiscreteActions", 9.0, 3.0),
        ("DiscreteActions", 1.6, 2.0), ("IntActions", 6.6, 7.0),
        ("DiscreteFrom", 0.0, -1.0), ("MultiDiscreteActions", 1.0, 1.0), ("MultiBinaryActions", 1.0, 1.0),
        ("IntActions", 7.0, 7.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", BOTH)
def test_actions_arrive(make, prefix, name, action, arrives):
    env = make(name, prefix)
    start(env)
    assert act(env, action)["observation", "proprio"][:, 2].tolist() == [arrives] * 4


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("Truncates", None), ("DiscreteActions", (4,)), ("DiscreteFrom", (3,)), ("MultiDiscreteActions", (3, 5)),
        ("MultiBinaryActions", (2, 2, 2)), ("IntActions", (11,)),
    ],
)  # fmt: skip
def test_what_there_is_to_choose_from_is_said(make, name, choices):
    env = make(name)
    assert env.action_choices == choices and env.action_spec.shape == (4, len(choices or (1,)))
    if choices:
        assert (
            env.action_spec.space.high[0].tolist() == [n - 1 for n in choices] and env.action_spec.space.low.max() == 0
        )


ROWS = torch.arange(16)[:, None].expand(16, 24)


@pytest.mark.parametrize("prefix", BOTH)
@pytest.mark.parametrize(
    ("name", "config", "grey"),
    [
        ("Pictures", {}, False), ("ChannelsFirst", {}, False), ("UpsideDown", {}, False), ("FloatImage", {}, False),
        ("FloatChannelsFirst", {}, False), ("Grayscale", {}, True), ("GrayscaleFlat", {}, True),
        ("NestedCHW", {"keys": {"rgb_top": "pixels"}}, False), ("OnePixel", {}, False),
    ],
)  # fmt: skip
def test_pictures_come_with_channels_last_as_bytes(make, prefix, name, config, grey):
    env = make(name, prefix, **config)
    step = start(env)
    check_observation(step["observation"], name)
    picture = step["observation", "rgb_top" if "keys" in config else "rgb"]
    rows = ROWS[:1, :1] if name == "OnePixel" else ROWS
    for channel, expected in enumerate((rows, rows, rows if grey else torch.full_like(rows, 200))):
        assert torch.equal(picture[0, ..., channel].long(), expected), channel
    assert torch.equal(act(env, 0.0)["observation"][next(iter(step["observation"].keys()))], picture)


@pytest.mark.parametrize("prefix", BOTH)
@pytest.mark.parametrize(
    ("name", "config", "key", "expected"),
    [
        ("ScalarBox", {"keys": {"proprio": ["a", "b"]}}, "proprio", [0.5, 0, 0]),
        ("LeRobotKeys", {"keys": {"proprio": ["observation.state", "ünïcode"]}}, "proprio", [1, 1, 5]),
        ("NestedCHW", {"keys": {"proprio": "agent.pos"}}, "proprio", [1, 1]),
        ("Uint8Proprio", {}, "proprio", [200, 100, 0]),
        ("BackwardObs", {}, "proprio", [10 / 97, 0, 0]),
        ("DepthMillimetres", {"depth_unit": 0.001}, "depth", [[0.8] * 24] * 16),
        ("DepthChannelFirst", {}, "depth", [[0.8] * 24] * 16),
    ],
)
def test_numbers_come_as_floats(make, prefix, name, config, key, expected):
    value = start(make(name, prefix, **config))["observation", key]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value[0], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("prefix", BOTH)
def test_every_entry_with_a_name_of_the_schema_is_read_and_the_others_are_named(make, prefix, caplog):
    warn_once.cache_clear()
    observation = start(make("NamedCameras", prefix))["observation"]
    check_observation(observation, prefix)
    assert set(observation.keys()) == {"rgb", "rgb_wrist", "depth_wrist", "proprio"}
    assert torch.equal(observation["rgb_wrist"], observation["rgb"].flip(1))
    said = r"are read by their names, (0|goal|depth_scale), (0|goal|depth_scale), (0|goal|depth_scale) by nothing; "
    assert re.search(said, caplog.text) and caplog.text.count("by nothing") == 1
    caplog.clear()
    chosen = start(make("NamedCameras", prefix, keys={"proprio": ["goal", "0"]}))["observation", "proprio"]
    assert chosen[0].tolist() == [1, 1, 6] and "by nothing" not in caplog.text


@pytest.mark.parametrize("prefix", BOTH)
def test_each_depth_camera_has_its_own_unit(make, prefix):
    keys = {"depth_far": "far", "depth_near": "near"}
    observation = start(make("TwoDepths", prefix, keys=keys, depth_unit={"depth_near": 0.001}))["observation"]
    assert torch.allclose(observation["depth_far"], torch.tensor(2.5))
    assert torch.allclose(observation["depth_near"], torch.tensor(0.8))
    for unit, message in (
        (0.001, r"env_config\.depth_unit: depth_near of .* has whole numbers and depth_far floats, which one unit"),
        ({"depth_far": 1}, r"env_config\.keys\.depth_near: uint16 \[2, 3\] of .* whole numbers; .* \(0\.001 for milli"),
        ({"near": 0.001}, r"depth_unit: 'near' is no depth that is observed of .*; those are depth_far, depth_near"),
        ({"depth_near": True}, r"depth_unit: expected metres, a number above 0, got .*True"),
    ):
        with pytest.raises(UserError, match=message):
            make("TwoDepths", prefix, keys=keys, depth_unit=unit)
    alike = make("TwoDepths", prefix, keys={"depth_near": "near"}, depth_unit=0.001)
    assert torch.allclose(start(alike)["observation", "depth_near"], torch.tensor(0.8))


def test_names_of_any_kind_can_be_mapped(make):
    keys = {"rgb_top": "observation.images.top", "rgb_wrist": "observation/wrist image", "proprio": "observation.state"}
    observation = start(make("LeRobotKeys", keys=keys))["observation"]
    assert (observation["rgb_top"] == 3).all() and (observation["rgb_wrist"] == 4).all()


@pytest.mark.parametrize("prefix", BOTH)
def test_what_is_kept_is_a_copy(make, prefix):
    env = make("InplaceObs", prefix)
    seen = [start(env)] + [act(env, 0.0) for _ in range(3)]
    clocks = [step["observation", "proprio"][0, 1].item() for step in seen]
    assert clocks == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NaNObs", "observation 'proprio' is nan"), ("InfObs", "observation 'proprio' is inf"),
        ("NaNReward", "reward is nan"),
    ],
)  # fmt: skip
def test_what_is_no_number_is_named(make, name, message):
    with pytest.raises(NonFiniteError, match=message):
        evaluate(make(name), still, IDS)


@pytest.mark.parametrize("prefix", BOTH)
def test_instructions_of_any_length_and_script(make, prefix):
    env = make("Instructions", prefix, instruction_key="task", instruction_length=128)
    texts = decode_text(start(env, [0, 1, 2, 3])["observation", "language"])
    assert texts == [odd_envs.Instructions.texts[i % 3] for i in range(4)]
    with pytest.raises(UserError, match="trainer.env_config.instruction_length: .* bytes, more than the 64"):
        make("Instructions", prefix, instruction_key="task")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("RewardNone", {}, r"step\(\) should return one number as reward, got NoneType"),
        ("SuccessArray2", {}, r"trainer.env_config.success_key: info\['success'\] of .* 0 or 1, got array\(\[ True"),
        ("SuccessText", {}, r"trainer.env_config.success_key: info\['success'\] of .* 0 or 1, got 'False'"),
        ("SuccessShare", {}, "trainer.env_config.success_key: .* 0 or 1, got 0.5; name another entry"),
        ("TupleActions", {}, "takes actions from Tuple.*supported are Box, Discrete, MultiDiscrete and MultiBinary"),
        ("ManyIntActions", {}, "a Box of integers has at most 1024 per component"),
        ("FrameStack", {}, r"keys.rgb: should be uint8 \[H, W, 3\].* got Box.*4, 16, 24, 3"),
        ("IntImage", {}, r"'rgb' is int64 \[16, 24, 3\], but its space says uint8 \[16, 24, 3\]"),
        ("FloatImageBeyond", {}, "the picture '' has values beyond the 0 and 1 of its space"),
        ("DepthMillimetres", {}, "keys.depth: .* whole numbers; .* trainer.env_config.depth_unit .0.001 for milli"),
        ("DepthMillimetres", {"depth_unit": 0}, "depth_unit: expected metres, a number above 0, got 0"),
        ("NestedCHW", {}, "keys: say which observations of .* are rgb, .*agent.pos: Box.*pixels: Box"),
        ("LeRobotKeys", {}, "keys: say which observations of .*observation.images.top"),
        ("ScalarBox", {}, "keys: say which observations"),
        ("OldApi", {}, r"reset\(seed=0\) raised"),
        ("NoSeedArgument", {}, r"reset\(seed=0\) raised TypeError.*unexpected keyword argument"),
        ("ObsShapeChanges", {}, r"the observation for 'proprio' is float64 \[4\], but its space says \[3\]"),
        ("TextIsNumber", {}, "the observation for 'language' should be a text, as its space says, got int 7"),
        (
            "ObsTexts",
            {},
            r"the observation for 'proprio' should be numbers, as its space says, got <U1 \['a'",
        ),
        ("ObsObjects", {}, "the observation for 'proprio' raised TypeError: float"),
        ("ObsRagged", {}, "the observation for 'proprio' raised ValueError: .*inhomogeneous"),
    ],
)
def test_what_does_not_fit_is_refused(make, name, config, message):
    with pytest.raises(UserError, match=message) as caught:
        make(name, **config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["SuccessArray2", "SuccessText", "SuccessShare", "TupleActions", "FloatImageBeyond"])
def test_vector_environments_of_them_are_refused_too(make, name):
    with pytest.raises(UserError, match="success_key: .* 0 or 1, got|supported are Box|has values beyond"):
        make(name, "gym_vec")


@pytest.mark.parametrize("name", ["TextIsNumber", "ObsTexts", "ObsObjects", "ObsRagged"])
def test_observations_of_vector_environments_that_cannot_be_read_are_refused_in_a_line(make, name, monkeypatch):
    """Gymnasium's own loop would convert or refuse them before; another vector environment hands them on."""
    reset = gymnasium.vector.SyncVectorEnv.reset

    def hand_on(self, **options):
        _, info = reset(self, **options)
        texts = {"proprio": np.zeros((4, 3)), "language": (7,) * 4}
        wrong = {"ObsTexts": np.full((4, 3), "a"), "ObsObjects": np.full((4, 3), {}), "ObsRagged": [[1, 2], [3]]}
        return wrong.get(name, texts), info

    monkeypatch.setattr(gymnasium.vector.SyncVectorEnv, "reset", hand_on)
    with pytest.raises(
        UserError, match="gym_vec:.*the observation for '(language|proprio)' (should be|raised)"
    ) as caught:
        make("TextIsNumber" if name == "TextIsNumber" else "Truncates", "gym_vec")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", BOTH)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RaisesLater", r"step\(\) raised RuntimeError: physics exploded \(odd_envs.py, line \d+\)"),
        ("ExitsLater", r"step\(\) raised SystemExit: 1 \(odd_envs.py, line \d+\)"),
        ("SuccessTextLater", "success_key: .* 0 or 1, got 'True'"),
    ],
)
def test_what_breaks_in_mid_run_is_a_failure_of_the_simulator(make, prefix, name, message):
    if prefix == "gym_vec" and name == "SuccessTextLater":
        return  # Gymnasium's own loop makes a boolean of it before anybody can see it
    env = make(name, prefix)
    start(env)
    with pytest.raises(SimulatorFailed, match=message) as caught:
        for _ in range(5):
            act(env, 0.0)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_choices_are_learned_by_the_main_job(tmp_path):
    """From fresh weights, 1 in 6 by chance; nothing about actions is configured."""
    model = {"model_class": "agents.small_vla.SmallVLA", "model_config": {"modalities": ["proprio"], "hidden_size": 32}}
    config = write_config(
        tmp_path,
        trainer__env="gym:user_package.odd_envs:Choosing", trainer__env_config={}, trainer__iterations=25,
        trainer__num_eval_episodes=64, trainer__num_envs=16, trainer__buffer_size=256,
        policy={"vla_config": model},
        algorithm__cfg={"learning_rate": 3e-3, "batch_size": 64, "n_epochs": 4},
    )  # fmt: skip
    assert ppo_vla.main(["--config", str(config)]) == 0
    rows = [row for row in read_metrics(run_folder(tmp_path)) if "eval/success_rate" in row]
    assert rows[0]["eval/success_rate"] < 0.5 and rows[-1]["eval/success_rate"] == 1.0


def test_every_one_of_them_is_tested():
    classes = {
        name for name, one in vars(odd_envs).items() if inspect.isclass(one) and one.__module__ == odd_envs.__name__
    }
    source = Path(__file__).read_text()
    assert all(f'{name}"' in source for name in classes), classes


def test_the_place_of_an_exit_is_where_the_environment_asked_for_it():
    """W&B's sys.exit, which stands for Python's once W&B is imported, is between the environment and the exception."""
    hook = compile("def leave(code):\n    raise SystemExit(code)\n", "/site-packages/wandb/lib/exit_hooks.py", "exec")
    world = compile("def step():\n    leave(3)\n", "/home/user/my_env.py", "exec")
    names: dict = {}
    exec(hook, names)
    exec(world, names)
    message = r"^drift: step raised SystemExit: 3 \(my_env.py, line 2\)$"
    with pytest.raises(SimulatorFailed, match=message), blame("drift: step"):
        names["step"]()
