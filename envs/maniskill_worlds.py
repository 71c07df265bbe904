"""ManiSkill's worlds in tensors: one on the CPU, or N in one scene on a GPU (Tao et al., 2024, arXiv:2410.00425).

ManiSkill draws what it observes in every step. Here it is made to observe no pictures, and they are drawn by the same
cameras when they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from envs.gym_spaces import encode_instruction, read_actions
from envs.simulator import Layout
from envs.simulator_options import check_some_of
from research.errors import UserError, one_line
from research.schema import DEPTH, LANGUAGE, PROPRIO, RGB, SUCCESS

if TYPE_CHECKING:
    from mani_skill.envs.sapien_env import BaseEnv

VULKAN = (
    "apt-get install libvulkan1 mesa-vulkan-drivers, of Mesa 24.3 or newer (Debian 12: -t bookworm-backports), or the "
    "driver of an NVIDIA GPU"
)
CONTROL = "pd_ee_delta_pose"
_FILM_SIZE = 256
_METRES_PER_DEPTH, _FARTHEST = 1e-3, 32.767


@dataclass(frozen=True)
class Recipe:
    """What a process needs to make worlds; fields as the options of `envs.maniskill.make_maniskill_env`."""

    task: str
    modalities: tuple[str, ...]
    cameras: tuple[str, ...] | None
    image_size: int
    full_state: bool
    instruction: str
    instruction_length: int
    control_mode: str | None
    reward: str
    max_episode_steps: int
    terminate_on_success: bool
    gpu: bool = False


class Worlds:
    """N worlds of one task that are stepped together; tensors `[N, ...]` on `device`.

    Args:
        recipe: which task, and how it is observed.
        num_envs: N; 1 on the CPU.
    Raises:
        UserError: nothing can draw here, which ManiSkill needs even where no pictures are asked for; or the task has
            no such camera, control mode or kind of action, or lacks files.
    """

    def __init__(self, recipe: Recipe, num_envs: int = 1):
        _check_vulkan("cuda" if recipe.gpu else "cpu")
        self.recipe, self.num_envs = recipe, num_envs
        self.env = _make(recipe, num_envs)
        self.device = self.env.device
        self._actions = actions = read_actions(self.env.single_action_space, f"maniskill {recipe.task}")
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._state = self.env.get_obs()
        instruction = torch.from_numpy(encode_instruction(recipe.instruction, recipe.instruction_length))
        self._language = instruction.to(self.device).expand(num_envs, -1)
        self._cameras = self._choose_cameras()
        observation = {key: value.cpu().numpy() for key, value in self.observe().items()}  # compiles what draws, too
        self.layout = Layout(
            observation={key: (value.shape[1:], value.dtype) for key, value in observation.items()},
            action_dim=actions.size,
            bounded=actions.bounded,
            has_success=SUCCESS in self.env.evaluate(),
            films=bool(self.env.scene.human_render_cameras),
            action_choices=actions.choices,
            task_names=(recipe.task,),
            action_map=actions,
        )

    def _choose_cameras(self) -> dict[str, str]:
        """What is behind the modality in the keys of each camera: nothing where there is one, else "_<camera>"."""
        known = tuple(self.env.scene.sensors)
        chosen = self.recipe.cameras or known
        if RGB in self.recipe.modalities or DEPTH in self.recipe.modalities:
            check_some_of("cameras", chosen, known)
        return {camera: "" if len(chosen) == 1 else f"_{camera}" for camera in chosen}

    def start(self, row: int, state: int) -> None:
        """Start a row from an id; the others go on.

        Most tasks draw from torch's generator, which the first seed decides, and in the order of the rows that start:
        a row that starts alone, with its id as everybody's seed, has the state of the id.
        """
        # On the CPU the scene is built anew, in 0.3 s: what was in contact before would show in some tasks' next steps.
        options = {"env_idx": torch.tensor([row], device=self.device), "reconfigure": not self.recipe.gpu}
        self._state, _ = self.env.reset(seed=[state] * self.num_envs, options=options)
        self._steps[row] = 0

    def step(self, action: Tensor) -> dict[str, Tensor]:
        """Take one control step, `[N, A]`; returns as `envs.simulator.Simulator.step`, each `[N, 1]`."""
        self._state, reward, _, _, info = self.env.step(self._actions.as_tensor(action, self.device))
        self._steps += 1
        none = torch.zeros_like(self._steps, dtype=torch.bool)
        success, fail = (info.get(name, none) for name in (SUCCESS, "fail"))
        out = {
            "reward": reward.float(),
            "terminated": fail | success if self.recipe.terminate_on_success else fail,
            "truncated": self._steps >= self.recipe.max_episode_steps,
        }
        out |= {SUCCESS: success} if self.layout.has_success else {}
        return {key: value.view(self.num_envs, 1).clone() for key, value in out.items()}

    def observe(self) -> dict[str, Tensor]:
        """What a policy sees now."""
        modalities, out = self.recipe.modalities, {}
        rgb, depth = RGB in modalities, DEPTH in modalities
        if rgb or depth:
            pictures = self._draw(rgb, depth)
            for camera, suffix in self._cameras.items():
                if rgb:
                    out[RGB + suffix] = pictures[camera]["rgb"][..., :3].contiguous()
                if depth:
                    millimetres = pictures[camera]["depth"][..., 0]  # int16, which runs over beyond 32.767 m
                    out[DEPTH + suffix] = torch.where(millimetres < 0, _FARTHEST, millimetres * _METRES_PER_DEPTH)
        if PROPRIO in modalities:
            out[PROPRIO] = torch.cat(_flat(self._state, self.num_envs), dim=1)
        if LANGUAGE in modalities:
            out[LANGUAGE] = self._language
        return out

    def _draw(self, rgb: bool, depth: bool) -> dict[str, dict[str, Tensor]]:
        """The cameras' pictures without marks of goals, which are there for people, as ManiSkill observes them."""
        for mark in self.env._hidden_objects:
            mark.hide_visual()
        self.env.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        self.env.capture_sensor_data()
        sensors = self.env.scene.sensors
        return {
            camera: sensors[camera].get_obs(rgb=rgb, depth=depth, position=False, segmentation=False)
            for camera in self._cameras
        }

    def frames(self) -> Tensor:
        """Every world as a person would want to see it, uint8 `[N, H, W, 3]`, with marks of goals."""
        return self.env.render_rgb_array()[..., :3]

    def close(self) -> None:
        """Free the scene."""
        self.env.close()


def _flat(state: Mapping[str, Any], count: int) -> list[Tensor]:
    """The numbers of a nested observation in the order of its entries, float32 `[N, *]` each."""
    parts = []
    for value in state.values():
        if isinstance(value, Mapping):
            parts += _flat(value, count)
        else:
            parts.append(value.float().reshape(count, -1))
    return parts


@lru_cache
def _check_vulkan(device: str) -> Any:
    """What draws on a device; kept, because what it has compiled would go with the last one that uses it."""
    import sapien

    try:
        return sapien.render.RenderSystem(sapien.Device(device))
    except RuntimeError as error:
        raise UserError(
            f"trainer.env: maniskill needs Vulkan, even without pictures ({one_line(error)}); {VULKAN}"
        ) from error


def _make(recipe: Recipe, num_envs: int) -> BaseEnv:
    """ManiSkill's environment, which is asked for no pictures of its own."""
    from mani_skill.utils import download_asset, registration

    if os.environ.get("MS_SKIP_ASSET_DOWNLOAD_PROMPT") != "1":
        download_asset.prompt_yes_no = _refuse_download  # it would wait for an answer, also where nobody can give one
    options = {
        "num_envs": num_envs,
        "obs_mode": "state_dict" if recipe.full_state else "none",
        "reward_mode": recipe.reward,
        "sensor_configs": {"width": recipe.image_size, "height": recipe.image_size},
        "human_render_camera_configs": {"width": _FILM_SIZE, "height": _FILM_SIZE},
        "sim_backend": "physx_cuda" if recipe.gpu else "physx_cpu",
        "render_backend": "gpu" if recipe.gpu else "cpu",
    }
    try:
        env = registration.make(recipe.task, control_mode=recipe.control_mode or CONTROL, **options)
    except AssertionError as error:
        if "not in supported modes" not in str(error):
            raise
        if recipe.control_mode is not None:
            raise UserError(f"trainer.env_config.control_mode: {one_line(error)}") from error
        env = registration.make(recipe.task, **options)
    # What a step observes: the robot and the task in numbers. `obs_mode` decides whether objects are among them.
    env.get_obs = lambda info=None, unflattened=False: env._get_obs_state_dict(info or env.get_info())
    return env


def _refuse_download(question: str) -> bool:
    lacks = one_line(Exception(question.partition("Would you like")[0])).rstrip(".")
    raise UserError(
        f"trainer.env_config.task: {lacks}; python -m mani_skill.utils.download_asset and the task's or the robot's "
        "name fetches them"
    )


def to_numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The only row's arrays, on the CPU."""
    return {key: value[0].cpu().numpy() for key, value in tensors.items()}
