"""envs/metaworld.py: ids, saved worlds and experts on all 50 tasks (slow), the options on a few."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from envs_worlds import play
from tensordict import TensorDict

from envs.metaworld import MetaWorldSimulator, Recipe, make_metaworld_env
from envs.metaworld_scene import scene_of
from envs.metaworld_tasks import INSTRUCTIONS, close_camera
from envs.mujoco_rendering import choose_gl
from research.errors import UserError
from research.schema import decode_text

BLIND = ("proprio", "language")
LOOK = (True, 256)  # of scenes that are drawn fast, with pictures up to this size
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "pale": (0.5, 0.5, 1)}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe(
        tasks=("push-v3",), modalities=BLIND, cameras=("close",), image_size=48, fast_render=True, full_state=True,
        instruction_length=64, phrasings="first", reward="gain", max_episode_steps=500, terminate_on_success=False,
        gl=choose_gl("trainer.env_config.modalities"),
    )  # fmt: skip


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def task(request):
    yield request.param
    scene_of.cache_clear()  # or 50 models would be kept


def fingerprint(world: MetaWorldSimulator) -> list[bytes]:
    """All that there is to see of a world, and its physics."""
    data = world._env.data
    return [array.tobytes() for array in (data.qpos, data.qvel, *world.observe().values())]


def act(world: MetaWorldSimulator, steps: int, seed: int | None = None) -> list[float]:
    """Step with an expert's actions, or with a seed's; returns the rewards."""
    random = np.random.default_rng(seed)
    actions = (world.expert_action() if seed is None else random.uniform(-1, 1, 4) for _ in range(steps))
    return [float(world.step(np.float32(action))["reward"][0]) for action in actions]


@pytest.mark.slow
def test_an_id_is_one_state_and_one_future_whatever_was_done_before(task, recipe):
    recipe = replace(recipe, tasks=(task,))
    first, other, between = (MetaWorldSimulator(recipe) for _ in range(3))
    first.reset(0)
    start, rewards, end = fingerprint(first), act(first, 20), fingerprint(first)
    first.reset(1)
    other.reset(77)
    act(other, 10, seed=1)
    other.reset(1)
    assert fingerprint(other) == fingerprint(first) != start
    between.reset(5)
    other.reset(0)
    assert fingerprint(other) == start
    for reward in rewards:
        act(between, 1, seed=2)  # on the same model
        assert act(other, 1) == [reward]
    assert fingerprint(other) == end


@pytest.mark.slow
def test_a_saved_world_continues_bit_for_bit_in_another(task, recipe):
    recipe = replace(recipe, tasks=(task,))
    world, other = MetaWorldSimulator(recipe), MetaWorldSimulator(recipe)
    world.reset(3)
    act(world, 25)
    saved = world.save()
    expected = act(world, 30), fingerprint(world)
    other.load(saved)
    assert (act(other, 30), fingerprint(other)) == expected
    world.load(saved)  # where a later state is
    assert (act(world, 30), fingerprint(world)) == expected


@pytest.mark.slow
def test_the_goal_the_object_and_the_gripper_are_in_the_close_picture(task):
    camera = close_camera(task)
    azimuth, elevation = np.radians([camera.azimuth, camera.elevation])
    forward = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    right = np.cross(forward, [0, 0, 1]) / np.cos(elevation)
    up = np.cross(right, forward)
    for seed in range(2):
        env = scene_of(task, *LOOK).start(seed)
        seen = env._get_obs()
        for name, place in {"hand": seen[:3], "object": seen[4:7], "goal": env._target_pos}.items():
            ray = place - (np.array(camera.lookat) - camera.distance * forward)
            edge = ray @ forward * np.tan(np.radians(env.model.vis.global_.fovy / 2))
            assert max(abs(ray @ right), abs(ray @ up)) < 0.95 * edge, name


@pytest.mark.slow
def test_the_colour_that_an_instruction_gives_a_mark_is_the_marks_colour(task):
    text = " ".join(INSTRUCTIONS[task])
    named = set(re.findall(rf"({'|'.join(COLOURS)}) (?:ball|dot)", text))
    scene = scene_of(task, *LOOK)
    env = scene.start(0)
    scene.place_goal_marks(env)
    where = np.flatnonzero(np.linalg.norm(env.data.site_xpos - env._target_pos, axis=1) < 0.01)
    marks = env.model.site_rgba[where]
    for colour in named:
        assert any(np.allclose(mark[:3] / mark[:3].max(), COLOURS[colour]) and mark[3] == 1 for mark in marks), colour


@pytest.mark.parametrize(
    "name",
    ["push-v3", "reach-v3", "door-open-v3", "drawer-close-v3", "hammer-v3", "sweep-v3", "coffee-push-v3", "soccer-v3"],
)
def test_pictures_of_an_id_are_equal_whatever_was_drawn_before(name, recipe):
    recipe = replace(recipe, tasks=(name,), modalities=("rgb",))
    world, other = MetaWorldSimulator(recipe), MetaWorldSimulator(recipe)
    world.reset(0)
    pictures = [fingerprint(world)]
    act(world, 5)
    pictures.append(fingerprint(world))
    other.reset(9)
    act(other, 3, seed=1)
    other.frame()
    world.reset(8)
    other.reset(0)
    assert fingerprint(other) == pictures[0] != fingerprint(world)
    act(other, 5)
    assert fingerprint(other) == pictures[1] != pictures[0]


def test_what_is_seen_has_the_mark_at_the_goal(recipe):
    world = MetaWorldSimulator(replace(recipe, tasks=("sweep-v3",), modalities=("rgb",)))
    world.reset(2)
    for _ in range(2):  # computing a step puts the mark elsewhere
        for look in (world.observe, world.frame):
            act(world, 1)
            look()
            assert np.array_equal(world._env.data.site("goal").xpos, world._env._target_pos)


def test_looking_does_not_change_what_happens(recipe):
    seeing, blind = (MetaWorldSimulator(replace(recipe, modalities=m)) for m in (("rgb",), BLIND))
    for world in (seeing, blind):
        world.reset(4)
    for _ in range(20):
        seeing.observe()
        seeing.frame()
        assert act(seeing, 1) == act(blind, 1)
    assert fingerprint(seeing)[:2] == fingerprint(blind)[:2]


def test_ids_take_turns_among_tasks_and_every_task_is_told(recipe):
    world = MetaWorldSimulator(replace(recipe, tasks=("reach-v3", "drawer-open-v3"), phrasings="all"))
    alone = MetaWorldSimulator(replace(recipe, tasks=("drawer-open-v3",)))
    assert world.layout.task_names == ("reach-v3", "drawer-open-v3")
    told = []
    for state in range(16):
        world.reset(state)
        told.append(decode_text(torch.from_numpy(world.observe()["language"])[None])[0])
    assert set(told[0::2]) == set(INSTRUCTIONS["reach-v3"])
    assert set(told[1::2]) == set(INSTRUCTIONS["drawer-open-v3"])
    world.reset(2 * 5 + 1)
    alone.reset(5)
    assert fingerprint(world)[:2] == fingerprint(alone)[:2]
    assert decode_text(torch.from_numpy(alone.observe()["language"])[None]) == ["open the drawer"]


def test_an_expert_succeeds_and_success_ends_the_episode_or_not(recipe):
    for ends in (True, False):
        world = MetaWorldSimulator(replace(recipe, terminate_on_success=ends, max_episode_steps=90))
        world.reset(1)
        steps = [world.step(world.expert_action()) for _ in range(90)]
        successes = [bool(step["success"][0]) for step in steps]
        assert any(successes) and not successes[0]
        assert [bool(step["terminated"][0]) for step in steps] == [ends and one for one in successes]
        assert [bool(step["truncated"][0]) for step in steps] == [False] * 89 + [True]


def test_rewards_are_success_meta_worlds_own_or_what_was_gained(recipe):
    rewards = {}
    for reward in ("sparse", "dense", "gain"):
        world = MetaWorldSimulator(replace(recipe, reward=reward))
        world.reset(1)
        steps = [world.step(world.expert_action()) for _ in range(60)]
        rewards[reward] = np.array([step["reward"][0] for step in steps])
        successes = np.array([step["success"][0] for step in steps])
    world.reset(1)
    theirs = world._env.step(world.expert_action())[1]
    assert np.array_equal(rewards["sparse"], successes) and successes[-1] and not successes[0]
    assert rewards["dense"][0] == np.float32(theirs / 10) and rewards["dense"].max() <= 1
    assert np.allclose(rewards["gain"][1:], successes[1:] + np.diff(rewards["dense"]), atol=1e-6)
    assert 0 < rewards["dense"][0] - rewards["gain"][0] < 1  # the reward of the state that the episode starts from


def test_proprio_is_the_hand_and_its_opening_or_the_whole_state(recipe):
    whole, hand = (MetaWorldSimulator(replace(recipe, full_state=full)) for full in (True, False))
    for world in (whole, hand):
        world.reset(2)
        act(world, 10)
    seen = whole.observe()["proprio"]
    assert seen.shape == (39,) and np.array_equal(seen[:4], hand.observe()["proprio"])
    assert np.allclose(seen[:3], whole._env.data.body("hand").xpos, atol=1e-6)
    assert np.allclose(seen[36:], whole._env._target_pos, atol=1e-6) and np.abs(seen[36:]).sum() > 0


def test_cameras_and_the_look_are_chosen(recipe):
    make = lambda **changes: MetaWorldSimulator(replace(recipe, modalities=("rgb",), **changes))  # noqa: E731
    several = make(cameras=("close", "corner2"))
    close, corner, default_look = make(), make(cameras=("corner2",)), make(fast_render=False, image_size=32)
    for world in (several, close, corner, default_look):
        world.reset(0)
    seen = several.observe()
    assert set(seen) == {"rgb_close", "rgb_corner2"} == set(several.layout.observation)
    assert np.array_equal(seen["rgb_close"], close.observe()["rgb"])
    assert np.array_equal(seen["rgb_corner2"], corner.observe()["rgb"])
    assert not np.array_equal(seen["rgb_close"], seen["rgb_corner2"])
    assert default_look.observe()["rgb"].shape == (32, 32, 3)
    assert not np.array_equal(default_look.frame(), close.frame())  # shadows


@pytest.mark.parametrize("fast", [True, False])
def test_far_links_of_the_arm_are_left_out_of_fast_pictures_and_of_no_film(recipe, fast):
    task = "handle-press-side-v3"  # seen from the front, with the arm's base behind
    world = MetaWorldSimulator(replace(recipe, tasks=(task,), modalities=("rgb",), fast_render=fast))
    world.reset(0)
    seen, film = world.observe()["rgb"], world.frame()
    renderer, data, camera = scene_of(task, fast, 256).renderer, world._env.data, close_camera(task)
    whole, part = (renderer.draw(data, camera, 48, with_far) for with_far in (True, False))
    assert not np.array_equal(whole, part) and np.array_equal(seen, part if fast else whole)
    assert np.array_equal(film, renderer.draw(data, camera, 256)) and film.shape == (256, 256, 3)


@pytest.mark.slow
def test_a_worker_process_changes_nothing_and_worlds_go_on_in_it():
    options = {"task": ["push-v3", "door-open-v3"], "image_size": 32, "chunk": 3, "max_episode_steps": 24}
    here, there = (make_metaworld_env(4, "cpu", 1, workers=workers, **options) for workers in (0, 1))
    with_ids = TensorDict({"initial_state": torch.arange(4)[:, None]}, [4])
    begun = here.reset(with_ids)
    assert here.resumes_exactly and (begun == there.reset(with_ids)).all()
    play(here, 5)
    there.load_state_dict(here.state_dict())
    assert (play(here, 10, seed=2) == play(there, 10, seed=2)).all()
    here.close()
    there.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tsak": "reach-v3"}, r"trainer.env_config: metaworld has no option 'tsak'; did you mean 'task'\?"),
        ({"task": "reach"}, r"trainer.env_config.task: .* did you mean 'reach-v3'\?"),
        ({"cameras": "corner9"}, r"trainer.env_config.cameras: there is no 'corner9'.*topview, corner, corner2"),
        ({"cameras": ["close", "close"]}, r"trainer.env_config.cameras: expected some of .*, each once"),
        ({"modalities": ["rgb", "touch"]}, r"trainer.env_config.modalities: there is no 'touch'"),
        ({"modalities": "rgb"}, r"trainer.env_config.modalities: expected some of rgb, proprio, language"),
        ({"modalities": []}, r"trainer.env_config.modalities: expected some of"),
        ({"reward": "shaped"}, r"trainer.env_config.reward: expected one of sparse, dense, gain"),
        ({"phrasings": 2}, r"trainer.env_config.phrasings: expected one of first, all"),
        ({"fast_render": 1}, r"trainer.env_config.fast_render: expected true or false, got 1"),
        ({"image_size": 8}, r"trainer.env_config.image_size: expected pixels, from 16 to 1024, got 8"),
        ({"max_episode_steps": 0}, r"trainer.env_config.max_episode_steps: expected an integer of at least 1"),
        ({"max_episode_steps": None}, r"trainer.env_config.max_episode_steps: expected an integer of at least 1"),
        ({"instruction_length": 5}, r"trainer.env_config.instruction_length: the instruction 'reach the red ball'"),
        ({"chunk": 0}, r"trainer.env_config.chunk"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options, says):
    with pytest.raises(UserError, match=f"^{says}"):
        make_metaworld_env(1, "cpu", 0, **{"modalities": list(BLIND), **options})


def test_a_package_that_is_missing_or_another_mujoco_is_one_line(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "metaworld", None)
        with pytest.raises(UserError, match=r"^trainer\.env: .*not installed; pip install -e \.\[metaworld\]$"):
            make_metaworld_env(1, "cpu", 0)
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.0" if name == "mujoco" else installed(name))
    with pytest.raises(UserError, match=r"^trainer\.env: metaworld \S+ needs mujoco \S+, and 4\.0\.0 is installed"):
        make_metaworld_env(1, "cpu", 0)


def test_without_opengl_there_are_no_videos_and_pictures_are_refused(monkeypatch, caplog):
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    with pytest.raises(UserError, match=r"^trainer\.env_config\.modalities: MuJoCo cannot draw"):
        make_metaworld_env(1, "cpu", 0)
    env = make_metaworld_env(1, "cpu", 0, modalities=list(BLIND))
    assert not env.films and "without videos" in caplog.text
    assert env.reset()["observation", "proprio"].shape == (1, 4)
    env.close()
