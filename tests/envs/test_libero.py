"""envs/libero.py on a stand-in for TorchRL's LiberoEnv; LIBERO's own tasks and states where it is installed.

Its meshes lie on a hub, so that no test here draws a scene of LIBERO's.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, NonTensor, Unbounded
from torchrl.envs import EnvBase

from envs import libero, make_env
from envs.libero import SUITES, Task, initial_state, make_libero_env
from research.errors import UserError
from research.schema import decode_text

TASKS = tuple(Task(index, f"task_{index}", f"do what is number {index}") for index in range(3))
needs_libero = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="hf-libero is not installed")


class StandIn(EnvBase):
    """What `torchrl.envs.LiberoEnv` is to its users: keys, shapes, dtypes, and success once the fingers close.

    Its pictures are the initial state, and above the middle brighter than below it; the state's last number is drawn
    from NumPy's global generator at a reset, as LIBERO places fixtures.
    """

    made = 0

    def __init__(
        self, task_suite, task_id, *, camera_height, camera_width, camera, wrist_camera, env_kwargs, init_state_mode,
        max_episode_steps,
    ):  # fmt: skip
        super().__init__(batch_size=[])
        assert task_suite in SUITES and init_state_mode == "fixed"
        assert env_kwargs == {"camera_names": [name for name in (camera, wrist_camera) if name]}
        StandIn.made += 1
        self.task_id, self.cameras, self.limit, self.init_state_id = (
            task_id,
            (camera, wrist_camera),
            max_episode_steps,
            -1,
        )
        self.picture = (3, camera_height, camera_width)
        observation = {name: Unbounded(self.picture, dtype=torch.uint8) for name in self._pictures()}
        observation["state"] = Unbounded((9,), dtype=torch.float32)
        flag = lambda: Categorical(2, dtype=torch.bool, shape=(1,))  # noqa: E731
        self.observation_spec = Composite(
            observation=Composite(observation),
            language_instruction=NonTensor(shape=(), example_data=""),
            success=flag(),
        )
        self.action_spec = Bounded(-1, 1, (7,), dtype=torch.float32)
        self.reward_spec = Bounded(0, 1, (1,))
        self.done_spec = Composite(done=flag(), terminated=flag(), truncated=flag())

    def _pictures(self):
        return [name for name, camera in zip(("image", "wrist_image"), self.cameras, strict=True) if camera]

    def _set_seed(self, seed):
        np.random.seed(seed)

    def _seen(self, success):
        observation = {"state": self.state.clone()}
        for name in self._pictures():
            observation[name] = torch.full(self.picture, self.init_state_id, dtype=torch.uint8)
            observation[name][:, : self.picture[1] // 2] += 100 * (1 + (name == "wrist_image"))
        return {"observation": observation, "language_instruction": "", "success": torch.tensor([success])}

    def _reset(self, tensordict=None, **kwargs):
        self.steps = 0
        self.state = torch.tensor([self.task_id, self.init_state_id, *[0.0] * 6, np.random.rand()])
        flags = dict.fromkeys(("done", "terminated", "truncated"), torch.zeros(1, dtype=torch.bool))
        return TensorDict({**self._seen(False), **flags}, [])

    def _step(self, tensordict):
        action = tensordict["action"]
        assert action.abs().max() <= 1
        self.steps += 1
        self.state[2] += action[0]
        success = bool(action[6] > 0)
        ends = {"terminated": torch.tensor([success]), "truncated": torch.tensor([self.steps >= self.limit])}
        return TensorDict(
            {**self._seen(success), "reward": torch.tensor([float(success)]), **ends, "done": sum(ends.values()) > 0},
            [],
        )


@pytest.fixture
def make(monkeypatch):
    """`make_libero_env` on stand-ins of three tasks, closed at the end of the test."""
    envs = []
    monkeypatch.setattr(libero, "LiberoEnv", StandIn)
    monkeypatch.setattr(libero, "_tasks_of", lambda suite: TASKS)
    monkeypatch.setattr(libero, "_check_installation", lambda: None)
    monkeypatch.setattr(libero, "choose_gl", lambda option: "")

    def build(num_envs=3, **options):
        envs.append(make_env("libero", num_envs, {"image_size": 16, **options}))
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def start(env, ids):
    return env.reset(TensorDict({"initial_state": torch.tensor(ids)[:, None]}, env.batch_size))


def act(env, **components):
    action = torch.zeros(*env.batch_size, 7)
    action[:, 6] = -1
    for index, value in components.items():
        action[:, int(index[1:])] = value
    return env.step(TensorDict({"action": action}, env.batch_size))["next"]


def test_an_id_is_a_task_and_a_fixed_state(make):
    env = make()
    step = start(env, [0, 3 * 7 + 1, 3 * 9 + 2])
    assert step["observation", "proprio"][:, :2].tolist() == [[0, 0], [1, 7], [2, 9]]
    assert decode_text(step["observation", "language"]) == [task.instruction for task in TASKS]
    assert env.task_names == ("task_0", "task_1", "task_2") and env.held_out == 30
    assert make(tasks=[2]).held_out == 10
    assert start(env, [5, 5, 5])["observation", "proprio"][:, :2].tolist() == [[2, 1]] * 3


def test_training_never_starts_from_a_state_that_is_for_evaluation(make):
    assert sorted(initial_state(number) for number in range(50)) == list(range(50))
    env = make()
    for _ in range(30):
        assert (env.reset()["observation", "proprio"][:, 1] >= 10).all()
    assert {initial_state(number) for number in range(10, 1000)} == set(range(10, 50))


def test_what_libero_draws_is_of_the_id_alone_and_leaves_numpys_generator(make):
    env = make(num_envs=2)
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    first = start(env, [4, 4])["observation", "proprio"].clone()
    assert torch.equal(first[0], first[1]) and np.array_equal(before, np.random.get_state()[1])
    start(env, [8, 7])
    np.random.seed(8)
    assert torch.equal(start(env, [4, 4])["observation", "proprio"], first)


def test_a_scene_is_loaded_where_the_task_changes(make):
    env = make(num_envs=1, tasks=[0, 2])
    StandIn.made = 0
    for state in (0, 2, 4, 1, 3, 0):
        start(env, [state])
    assert StandIn.made == 3


def test_cameras_have_keys_and_pictures_their_channels_last(make):
    env = make()
    rgb = start(env, [3 * 5, 0, 0])["observation", "rgb"]
    assert rgb.shape == (3, 16, 16, 3) and rgb[0, 0].unique().tolist() == [105] and rgb[0, -1].unique().tolist() == [5]
    assert torch.equal(env.render_frames(16)[0], rgb[0])
    both = start(make(cameras=["wrist", "agentview"]), [0, 0, 0])["observation"]
    assert both["rgb_agentview"][0, 0, 0].tolist() == [100] * 3 and both["rgb_wrist"][0, 0, 0].tolist() == [200] * 3
    assert set(start(make(cameras="wrist", modalities=["rgb"]), [0, 0, 0])["observation"].keys()) == {"rgb"}


def test_success_ends_an_episode_and_so_does_the_suites_limit(make):
    env = make(max_episode_steps=2)
    start(env, [0, 1, 2])
    step = act(env, a0=5.0)  # clipped
    assert step["observation", "proprio"][:, 2].tolist() == [1.0] * 3 and not step["done"].any()
    step = act(env, a6=torch.tensor([1.0, -1.0, -1.0]))
    assert step["success"].ravel().tolist() == step["terminated"].ravel().tolist() == [True, False, False]
    assert step["reward"].ravel().tolist() == [1.0, 0.0, 0.0] and step["truncated"].all()
    assert make().max_steps == 220 and make(suite="libero_10").max_steps == 520
    assert not env.resumes_exactly


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"suit": "libero_goal"}, r"trainer.env_config: libero has no option 'suit'; did you mean 'suite'\?"),
        ({"suite": "libero_gaol"}, "trainer.env_config.suite: expected one of libero_spatial"),
        ({"tasks": [3]}, 'trainer.env_config.tasks: expected "all", or some of the indices 0 to 2 of libero_spatial'),
        ({"tasks": []}, "trainer.env_config.tasks: expected"),
        ({"tasks": [1, 1]}, "trainer.env_config.tasks: expected"),
        ({"tasks": [True]}, "trainer.env_config.tasks: expected"),
        ({"cameras": "front"}, "trainer.env_config.cameras: there is no 'front'; there are agentview, wrist"),
        ({"modalities": ["depth"]}, "trainer.env_config.modalities: there is no 'depth'"),
        ({"image_size": 4}, "trainer.env_config.image_size: expected pixels"),
        ({"instruction_length": 5}, "trainer.env_config.instruction_length: the instruction 'do what is number 0'"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(make, options, says):
    with pytest.raises(UserError, match=f"^{says}"):
        make(**options)


def test_what_is_not_there_is_one_line_with_the_command_before_anything_is_fetched(monkeypatch, tmp_path):
    for module in ("libero", "robosuite", "bddl"):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"^trainer\.env: libero needs libero, robosuite, bddl, .*pip install .*$"):
            make_libero_env(1, "cpu", 0)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = f"hf download lerobot/libero-assets --repo-type dataset --local-dir {tmp_path}/.cache/libero/assets"
    with pytest.raises(UserError, match=rf"^trainer\.env: libero lacks .*{re.escape(command)}$"):
        make_libero_env(1, "cpu", 0)


@needs_libero
@pytest.mark.parametrize("suite", SUITES)
def test_liberos_own_tasks_have_instructions_that_fit_and_fifty_states(suite, monkeypatch, tmp_path):
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    tasks = libero._tasks_of(suite)
    assert len(tasks) == (90 if suite == "libero_90" else 10) and max(len(task.instruction) for task in tasks) <= 96
    from libero.libero import benchmark

    own = benchmark.get_benchmark_dict()[suite]()
    assert len(libero.LiberoEnv._load_init_states(own, own.get_task(tasks[-1].index))) == libero.STATES
