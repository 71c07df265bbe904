"""envs/maniskill_gpu.py and envs/maniskill_worlds.py on a stand-in for ManiSkill's batched environment.

The stand-in draws what all rows start from as ManiSkill does: from torch's generator, which the first seed decides.
"""

from __future__ import annotations

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from envs import maniskill_worlds
from envs.maniskill_gpu import ManiSkillGPUEnv
from envs.maniskill_worlds import Recipe
from envs.simulator import Environment
from research.errors import UserError
from research.schema import check_observation

N, LIMIT = 4, 6


class StandIn:
    """N points that actions move; beyond 1 along x it is success, beyond 1 along y failure."""

    device = torch.device("cpu")

    def __init__(self, num_envs: int, alike: bool = True):
        self.num_envs = num_envs
        self.single_action_space = gymnasium.spaces.Box(-2, 2, (2,), np.float32)
        self.points, self.closed = torch.zeros(num_envs, 2), False
        self.sizes = torch.zeros(num_envs) if alike else torch.arange(num_envs).float()
        mark = SimpleNamespace(hide_visual=lambda: setattr(self, "marked", False))
        self._hidden_objects, self.marked = [mark], True
        camera = SimpleNamespace(get_obs=self._picture)
        self.scene = SimpleNamespace(
            sensors={"front": camera}, human_render_cameras={"film": camera}, update_render=lambda **options: None
        )

    def _picture(self, rgb, depth, position, segmentation):
        assert not position and not segmentation and not self.marked
        shade = (100 * self.points[:, :1]).clamp(0, 255).to(torch.uint8)
        out = {"rgb": shade.view(-1, 1, 1, 1).expand(-1, 8, 8, 3)} if rgb else {}
        millimetres = torch.tensor([1500, -7], dtype=torch.int16).view(1, 1, 2, 1).expand(self.num_envs, 8, 2, 1)
        return out | ({"depth": millimetres} if depth else {})

    def capture_sensor_data(self):
        pass

    def reset(self, seed, options):
        rows = options["env_idx"]
        assert len(seed) == self.num_envs and not options["reconfigure"]
        generator = torch.Generator().manual_seed(seed[0])
        self.points[rows] = torch.rand(len(rows), 2, generator=generator) / 2
        return self.get_obs(), {}

    def step(self, action):
        assert action.abs().max() <= 2
        self.points += action / 4
        ends = self.evaluate()
        return self.get_obs(), ends["success"].float() - ends["fail"].float(), None, None, ends

    def evaluate(self):
        return {"success": self.points[:, 0] > 1, "fail": self.points[:, 1] > 1}

    def get_obs(self):
        return {"agent": {"qpos": self.points.clone()}, "extra": {"lucky": self.points[:, 0] > 0.25}}

    def get_state(self):
        return torch.cat([self.points, self.sizes[:, None]], dim=1)

    def render_rgb_array(self):
        self.marked = True
        return (100 * self.points[:, :1]).clamp(0, 255).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3)

    def close(self):
        self.closed = True


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(maniskill_worlds, "_check_vulkan", lambda device: None)
    made = []

    def build(num_envs=N, chunk=1, alike=True, ends=True):
        monkeypatch.setattr(maniskill_worlds, "_make", lambda recipe, count: StandIn(count, alike))
        recipe = Recipe(
            task="Points-v1", modalities=("rgb", "depth", "proprio", "language"), cameras=None, image_size=8,
            full_state=False, instruction="go", instruction_length=4, control_mode=None, reward="sparse",
            max_episode_steps=LIMIT, terminate_on_success=ends, gpu=True,
        )  # fmt: skip
        made.append(ManiSkillGPUEnv(recipe, num_envs, 1, "cpu", chunk))
        return made[-1]

    yield build
    for env in made:
        env.close()
        assert env._worlds.env.closed


def start(env, ids):
    return env.reset(TensorDict({"initial_state": torch.tensor(ids)[:, None]}, env.batch_size))


def act(env, action):
    return env.step(TensorDict({"action": torch.as_tensor(action, dtype=torch.float32)}, env.batch_size))["next"]


def test_an_id_is_one_state_in_every_row_with_whatever_others(make):
    env = make()
    together = start(env, [3, 5, 3, 9])
    check_observation(together["observation"], "maniskill")
    assert isinstance(env, Environment)
    seen = together["observation", "proprio"]
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert torch.equal(start(make(num_envs=1), [3])["observation", "proprio"][0], seen[0])


def test_a_masked_reset_leaves_the_other_rows(make):
    env = make()
    env.reset()
    step = act(env, torch.full((N, 2), 0.1)).exclude("reward")
    mask, ids = torch.tensor([[True], [False], [False], [True]]), torch.full((N, 1), 7)
    after = env.reset(step.clone().update({"_reset": mask, "initial_state": ids}))
    seen, before = after["observation", "proprio"], step["observation", "proprio"]
    assert torch.equal(seen[1:3], before[1:3]) and torch.equal(seen[0], seen[3]) and not torch.equal(seen[0], before[0])
    for _ in range(LIMIT - 1):
        ends = act(env, torch.zeros(N, 2))["truncated"].ravel()
    assert ends.tolist() == [False, True, True, False]


def test_actions_are_rescaled_and_clipped_and_ends_are_told_apart(make):
    env = make()
    start(env, [3] * N)
    points = env._worlds.env.points.clone()
    step = act(env, [[1, 0], [9, 0], [0, 1], [0, 0]])
    moved = env._worlds.env.points - points
    assert torch.allclose(moved, torch.tensor([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0]]))
    for _ in range(3):
        step = act(env, [[1, 0], [0, 0], [0, 1], [0, 0]])
    assert step["success"].ravel().tolist() == [True, False, False, False]
    assert step["terminated"].ravel().tolist() == [True, False, True, False]
    assert step["reward"].ravel().tolist() == [1, 0, -1, 0] and not step["truncated"].any()
    lasting = make(ends=False)
    start(lasting, [3] * N)
    for _ in range(4):
        step = act(lasting, [[1, 0], [0, 0], [0, 1], [0, 0]])
    assert step["success"].ravel().tolist() == [True, False, False, False]
    assert step["terminated"].ravel().tolist() == [False, False, True, False]


def test_a_chunk_is_its_steps_and_ends_with_the_episode_in_each_row(make):
    chunked, single = make(chunk=4), make()
    start(chunked, [3] * N)
    start(single, [3] * N)
    actions = torch.zeros(N, 4, 2)
    actions[0, :, 0], actions[1, 0, 0], actions[2, :, 1] = 1, 0.5, 1
    step = act(chunked, actions)
    each = [act(single, actions[:, place]) for place in range(4)]
    lasts = [next((k for k, one in enumerate(each) if one["done"][row]), 3) for row in range(N)]
    assert lasts[0] < 3 and lasts[1] == 3
    assert step["env_steps"].ravel().tolist() == [last + 1 for last in lasts]
    for row, last in enumerate(lasts):
        for key in ("proprio", "rgb", "depth"):
            assert torch.equal(step["observation", key][row], each[last]["observation", key][row])
        assert step["reward"][row] == sum(one["reward"][row] for one in each[: last + 1])
        for key in ("terminated", "truncated", "success"):
            assert step[key][row] == each[last][key][row]
    assert act(chunked, torch.zeros(N, 4, 2))["env_steps"][1] == 2  # of the six that the limit leaves


def test_a_served_policy_acts_in_the_units_that_the_world_is_given(make):
    """The world's bounds are -2 and 2: half of that is 1, for a robot, and for data that were recorded on it."""
    env = make()
    start(env, [3] * N)
    points = env._worlds.env.points.clone()
    act(env, [[0.5, -0.25]] * N)
    given = 4 * (env._worlds.env.points - points)[0]  # a point moves by a quarter of what it is given
    served = env.action_map(np.array([0.5, -0.25], np.float32))
    assert torch.allclose(given, torch.tensor([1.0, -0.5])) and served.tolist() == [1.0, -0.5]
    assert env.action_map.inverse(np.array([1.0, -2.0])).tolist() == [0.5, -1.0]


def test_depth_is_in_metres_and_ends_where_its_numbers_do(make):
    depth = make().reset()["observation", "depth"]
    assert depth.shape == (N, 8, 2) and torch.allclose(depth[0, 0], torch.tensor([1.5, 32.767]))


def test_films_show_marks_and_pictures_do_not(make):
    env = make()
    start(env, [0, 1, 2, 3])
    frames = env.render_frames(16)
    assert frames.shape == (N, 16, 16, 3)
    assert env._worlds.env.marked
    assert torch.equal(act(env, torch.zeros(N, 2))["observation", "rgb"][:, 0, 0], frames[:, 0, 0])


def test_rows_with_objects_of_their_own_are_refused(make):
    with pytest.raises(UserError, match=r"^trainer\.env_config\.gpu: Points-v1 has other objects in every row"):
        make(alike=False)
    make(num_envs=1, alike=False)


def test_without_a_gpu_it_is_one_line(make, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^trainer\.env_config\.gpu: no GPU that CUDA can use is here"):
        make()
