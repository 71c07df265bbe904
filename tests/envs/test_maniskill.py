"""envs/maniskill.py on ManiSkill itself, where it and a Vulkan that it can use are installed.

What needs no ManiSkill is in tests/envs/test_maniskill_gpu.py. Without a GPU, the first picture of a process takes Mesa
12 s of computing.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from envs_worlds import play, skip_without_maniskill

from envs import maniskill_worlds
from envs.maniskill import ManiSkillSimulator, make_maniskill_env
from envs.maniskill_tasks import INSTRUCTIONS
from envs.maniskill_worlds import Recipe
from research.errors import UserError

BLIND = ("proprio", "language")
needs_package = pytest.mark.skipif(importlib.util.find_spec("mani_skill") is None, reason="mani_skill is not installed")


@pytest.fixture(scope="module")
def vulkan():
    skip_without_maniskill()


@pytest.fixture(scope="module")
def recipe(vulkan) -> Recipe:
    return Recipe(
        task="PickCube-v1", modalities=BLIND, cameras=None, image_size=32, full_state=True, instruction="go",
        instruction_length=64, control_mode=None, reward="sparse", max_episode_steps=50, terminate_on_success=True,
    )  # fmt: skip


def act(world: ManiSkillSimulator, steps: int, seed: int) -> list[bytes]:
    """Press the hand down with actions of a seed; returns what is seen after each."""
    random, seen = np.random.default_rng(seed), []
    for _ in range(steps):
        action = random.uniform(-1, 1, world.layout.action_dim).astype(np.float32)
        action[2] = -abs(action[2])
        world.step(action)
        seen.append(world.observe()["proprio"].tobytes())
    return seen


def green(picture: np.ndarray) -> int:
    """How many pixels are."""
    red, green, blue = picture.astype(int).transpose(2, 0, 1)
    return int((green > np.maximum(red, blue) + 50).sum())


@pytest.mark.slow
def test_an_id_is_one_state_and_one_future_whatever_was_done_before(recipe):
    recipe = replace(recipe, task="PlugCharger-v1")  # in an old scene, what was in contact shows after a step
    world, other = ManiSkillSimulator(recipe), ManiSkillSimulator(recipe)
    other.reset(9)
    act(other, 40, seed=7)
    for one in (world, other):
        one.reset(5)
    start = world.observe()["proprio"]
    assert np.array_equal(start, other.observe()["proprio"])
    assert act(world, 50, seed=1) == act(other, 50, seed=1)
    other.reset(6)
    assert not np.array_equal(start, other.observe()["proprio"])


@pytest.mark.slow
def test_a_saved_world_continues_bit_for_bit_in_another(recipe):
    world, other = ManiSkillSimulator(recipe), ManiSkillSimulator(recipe)
    world.load(other.save())  # before the first reset
    world.reset(3)
    act(world, 25, seed=1)
    saved = world.save()
    other.reset(4)
    act(other, 10, seed=2)
    other.load(saved)
    assert act(world, 24, seed=3) == act(other, 24, seed=3)
    ends = [one.step(np.zeros(one.layout.action_dim, np.float32))["truncated"].tolist() for one in (world, other)]
    assert ends == [[True], [True]]


@pytest.mark.slow
def test_pictures_are_of_the_id_and_show_no_goal_but_films_do(recipe):
    recipe = replace(recipe, modalities=("rgb", "depth"), image_size=96)
    world, other = ManiSkillSimulator(recipe), ManiSkillSimulator(recipe)
    other.reset(8)
    other.frame()
    for one in (world, other):
        one.reset(2)
    seen, again = world.observe(), other.observe()
    assert seen["rgb"].shape == (96, 96, 3) and np.array_equal(seen["rgb"], again["rgb"])
    assert np.array_equal(seen["depth"], again["depth"]) and 0.2 < np.median(seen["depth"]) < 2  # a table, in metres
    film = world.frame()
    assert film.shape == (256, 256, 3) and green(film) > 20 and green(seen["rgb"]) == 0
    assert np.array_equal(world.observe()["rgb"], seen["rgb"])


@pytest.mark.slow
def test_cameras_have_keys(recipe):
    recipe = replace(recipe, task="StackCube-v1", modalities=("rgb",))
    several, one = ManiSkillSimulator(recipe), ManiSkillSimulator(replace(recipe, cameras=("hand_camera",)))
    for world in (several, one):
        world.reset(0)
    seen = several.observe()
    assert set(seen) == {"rgb_base_camera", "rgb_hand_camera"} == set(several.layout.observation)
    assert np.array_equal(seen["rgb_hand_camera"], one.observe()["rgb"])
    with pytest.raises(UserError, match=r"^trainer\.env_config\.cameras: there is no 'front'; there are base_camera, "):
        ManiSkillSimulator(replace(recipe, cameras=("front",)))


@pytest.mark.slow
def test_proprio_is_the_robot_the_hand_and_the_goal_or_the_whole_state(recipe):
    seen = {}
    for whole in (False, True):
        world = ManiSkillSimulator(replace(recipe, full_state=whole))
        world.reset(2)
        seen[whole] = world.observe()["proprio"]
    env = world._worlds.env
    assert np.array_equal(seen[False][:9], env.agent.robot.qpos[0].numpy())
    assert np.array_equal(seen[False][-3:], env.goal_site.pose.p[0].numpy())
    cube = env.cube.pose.p[0].numpy()
    has = {whole: any(np.array_equal(part, cube) for part in np.lib.stride_tricks.sliding_window_view(seen[whole], 3))
           for whole in seen}  # fmt: skip
    assert has == {False: False, True: True}


@pytest.mark.slow
def test_success_is_the_tasks_and_ends_the_episode_or_not(recipe):
    for ends in (True, False):
        world = ManiSkillSimulator(replace(recipe, terminate_on_success=ends, max_episode_steps=3))
        world.reset(1)
        rest = np.zeros(world.layout.action_dim, np.float32)
        assert not world.step(rest)["success"]
        world._worlds.env.goal_site.set_pose(world._worlds.env.cube.pose)
        step = world.step(rest)
        assert step["success"] and step["reward"] == 1 and bool(step["terminated"][0]) is ends
        assert not step["truncated"] and world.step(rest)["truncated"]


@pytest.mark.slow
def test_a_worker_process_changes_nothing(vulkan):
    options = {"modalities": list(BLIND), "chunk": 3, "max_episode_steps": 12, "reward": "dense"}
    here, there = (make_maniskill_env(2, "cpu", 1, workers=workers, **options) for workers in (0, 1))
    assert here.task_names == ("PickCube-v1",) and here.max_steps == 12 and here.resumes_exactly
    here.reset()
    play(here, 2)
    there.load_state_dict(here.state_dict())
    mine, theirs = play(here, 4, seed=2), play(there, 4, seed=2)
    assert (mine == theirs).all() and mine["reward"].std() > 0
    here.close()
    there.close()


@needs_package
def test_every_instruction_is_of_a_task():
    import mani_skill.envs  # noqa: F401
    from mani_skill.utils.registration import REGISTERED_ENVS

    assert set(INSTRUCTIONS) <= set(REGISTERED_ENVS) and max(len(text) for text in INSTRUCTIONS.values()) <= 64


@needs_package
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tsak": "PickCube-v1"}, r"trainer.env_config: maniskill has no option 'tsak'; did you mean 'task'\?"),
        (
            {"task": "PickCub-v1"},
            r"trainer.env_config.task: ManiSkill has no 'PickCub-v1'; did you mean 'PickCube-v1'\?",
        ),
        ({"task": 3}, "trainer.env_config.task: expected a name, got 3"),
        ({"modalities": ["touch"]}, "trainer.env_config.modalities: there is no 'touch'"),
        ({"cameras": 3}, "trainer.env_config.cameras: expected names of cameras, got 3"),
        ({"reward": "gain"}, "trainer.env_config.reward: expected one of sparse, dense, normalized_dense"),
        (
            {"task": "StackPyramid-v1", "reward": "dense"},
            "trainer.env_config.reward: StackPyramid-v1 has no 'dense'; it has sparse",
        ),
        ({"gpu": 1}, "trainer.env_config.gpu: expected true or false, got 1"),
        ({"gpu": True, "workers": 2}, "trainer.env_config.workers: with gpu all worlds are in one scene"),
        (
            {"gpu": True, "control_mode": "pd_ee_target_delta_pose"},
            "trainer.env_config.control_mode: .*without 'target'",
        ),
        ({"task": "MS-CartpoleBalance-v1"}, "trainer.env_config.instruction: there is none for MS-CartpoleBalance-v1"),
        ({"image_size": 8}, "trainer.env_config.image_size: expected pixels"),
        ({"instruction_length": 0}, "trainer.env_config.instruction_length: expected an integer of at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options, says):
    with pytest.raises(UserError, match=f"^{says}"):
        make_maniskill_env(1, "cpu", 0, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"control_mode": "pd_ee"},
            "trainer.env_config.control_mode: pd_ee not in supported modes: .*pd_ee_delta_pose",
        ),
        (
            {"task": "TwoRobotPickCube-v1", "instruction": "go"},
            "trainer.env: maniskill TwoRobot.* takes actions from Dict",
        ),
        ({"instruction_length": 5}, "trainer.env_config.instruction_length: the instruction 'pick up the red cube"),
    ],
)
def test_what_a_task_does_not_have_is_one_line(vulkan, options, says):
    with pytest.raises(UserError, match=f"^{says}") as refused:
        make_maniskill_env(1, "cpu", 0, **{"modalities": list(BLIND), **options})
    assert "\n" not in str(refused.value)


def test_a_robot_without_that_control_mode_has_its_own(vulkan):
    env = make_maniskill_env(1, "cpu", 0, task="PickCubeSO100-v1", modalities=["proprio"])
    assert env.action_spec.shape == (1, 6)
    env.close()


def test_files_that_are_missing_are_not_fetched_but_named(vulkan, monkeypatch):
    from mani_skill.utils import assets

    monkeypatch.delenv("MS_SKIP_ASSET_DOWNLOAD_PROMPT", raising=False)
    monkeypatch.setattr(assets, "is_data_source_downloaded", lambda name: False)
    with pytest.raises(
        UserError, match=r"^trainer\.env_config\.task: .*ycb.*python -m mani_skill\.utils\.download_asset"
    ):
        make_maniskill_env(1, "cpu", 0, task="PickSingleYCB-v1", modalities=["proprio"])


def test_a_package_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mani_skill", None)
    with pytest.raises(UserError, match=r"^trainer\.env: .*not installed; pip install -e \.\[maniskill\]$"):
        make_maniskill_env(1, "cpu", 0)


def test_a_vulkan_that_is_missing_is_one_line(monkeypatch):
    def render_system(device):
        raise RuntimeError('Failed to find a supported\nphysical device "cpu"')

    render = SimpleNamespace(RenderSystem=render_system)
    monkeypatch.setitem(sys.modules, "sapien", SimpleNamespace(render=render, Device=str))
    with pytest.raises(UserError, match=r"^trainer\.env: maniskill needs Vulkan.*mesa-vulkan-drivers.*$") as refused:
        maniskill_worlds._check_vulkan.__wrapped__("cpu")
    assert "\n" not in str(refused.value)
