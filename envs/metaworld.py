"""Meta-World's 50 manipulation tasks (Yu et al., 2019, arXiv:1910.10897), with language, pictures and exact ids.

Action `[4]` in [-1, 1]: the hand's displacement along x, y and z, 1 being 1 cm a control step of 12.5 ms, and the
fingers, which close when it is above 0.

Observation: `rgb` uint8 `[S, S, 3]`; `proprio` float32 `[4]`, the hand's x, y and z in metres and the gripper's opening
as a fraction of 0.1 m (or, with `full_state`, the 39 numbers that Meta-World's experts see: hand and objects now, the
same one step before, and the goal); `language` int64 `[L]`, the instruction's bytes (`envs.metaworld_tasks`).

Of T tasks, the initial state of id `i` is of task `i % T` and starts from goal seed `i // T`. How an episode starts, so
that nothing is left of earlier ones, is in `envs.metaworld_scene`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from envs.groups import STEP_S
from envs.gym_options import check_options
from envs.gym_spaces import encode_instruction
from envs.gym_state import from_bytes, read_state, to_bytes, write_state
from envs.metaworld_scene import scene_of
from envs.metaworld_tasks import CAMERAS, CLOSE, INSTRUCTIONS, choose_tasks, close_camera
from envs.mujoco_rendering import choose_gl, take_over_gl
from envs.simulator import Layout
from envs.simulator_options import check_flag, check_image_size, check_one_of, check_some_of
from envs.vector import VectorEnv
from research.errors import UserError
from research.schema import LANGUAGE, PROPRIO, RGB, SUCCESS

log = logging.getLogger(__name__)

REWARDS = ("sparse", "dense", "gain")
PHRASINGS = ("first", "all")
MODALITIES = (RGB, PROPRIO, LANGUAGE)
INSTALL = "pip install -e .[metaworld]"
_FILM_SIZE = 256
_STATE_SIZE, _GRIPPER_SIZE = 39, 4


@dataclass(frozen=True)
class Recipe:
    """What a process needs to make worlds; fields as the options of `make_metaworld_env`."""

    tasks: tuple[str, ...]
    modalities: tuple[str, ...]
    cameras: tuple[str, ...]
    image_size: int
    fast_render: bool
    full_state: bool
    instruction_length: int
    phrasings: str
    reward: str
    max_episode_steps: int
    terminate_on_success: bool
    gl: str | None
    """The value of MUJOCO_GL; None: nothing can draw here, and no pictures are asked for."""

    @property
    def picture_keys(self) -> dict[str, str]:
        """Observation key -> camera."""
        if RGB not in self.modalities:
            return {}
        return {RGB if len(self.cameras) == 1 else f"{RGB}_{camera}": camera for camera in self.cameras}


def make_metaworld_env(
    num_envs: int,
    device: torch.device | str,
    seed: int,
    /,
    *,
    task: str | Sequence[str] = "reach-v3",
    modalities: Sequence[str] = MODALITIES,
    cameras: str | Sequence[str] = CLOSE,
    image_size: int = 96,
    fast_render: bool = True,
    full_state: bool = False,
    instruction_length: int = 64,
    phrasings: str = "first",
    reward: str = "sparse",
    max_episode_steps: int = 200,
    terminate_on_success: bool = True,
    chunk: int = 1,
    workers: int = 0,
    worker_timeout: float = STEP_S,
    **unknown: Any,
) -> VectorEnv:
    """Make `num_envs` worlds of one task or several, stepped together.

    Args:
        num_envs: N.
        device: where observations and rewards are put; the simulators run on the CPU.
        seed: which stream of initial states training episodes are drawn from.
        task: "reach-v3", a list of such names, "MT10" or "MT50".
        modalities: of `rgb`, `proprio` and `language`.
        cameras: "close", this project's, or one of Meta-World's; with several their pictures are `rgb_<camera>`.
        image_size: S, pixels.
        fast_render: no shadows, reflections, smoothed edges or far links of the arm. Without a GPU a picture then takes
            a twentieth of the time. The pictures differ, so a model must be trained and tested with the same value.
        full_state: `proprio` is Meta-World's observation `[39]`, the goal included.
        instruction_length: L, bytes reserved for the instruction.
        phrasings: "first": one instruction per task; "all": one of several, which the id decides.
        reward: "sparse": 1 for a step at whose end the task is done; "dense": Meta-World's own, divided by 10: at most
            1 a step; "gain": the sparse reward and the change of the dense one in that step.
        max_episode_steps: control steps after which an episode is truncated.
        terminate_on_success: whether success ends the episode.
        chunk: H, actions per decision.
        workers: processes among which the worlds are divided (at most N); 0 steps them in this process. Each has its
            own models: about 60 MB per task with pictures, loaded when the task is first met.
        worker_timeout: seconds within which a worker has to answer; one that does not is killed, and the run stops.
    Raises:
        UserError: an option does not fit, Meta-World is not installed, or nothing can draw here.
    """
    options = {option: value for option, value in locals().items() if option in make_metaworld_env.__kwdefaults__}
    check_options("metaworld", {**options, "num_envs": num_envs, "seed": seed}, unknown)
    _check_options(options)
    tasks = choose_tasks(task)
    _check_installation()
    recipe = Recipe(
        tasks=tasks,
        modalities=tuple(modalities),
        cameras=(cameras,) if isinstance(cameras, str) else tuple(cameras),
        image_size=image_size,
        fast_render=fast_render,
        full_state=full_state,
        instruction_length=instruction_length,
        phrasings=phrasings,
        reward=reward,
        max_episode_steps=max_episode_steps,
        terminate_on_success=terminate_on_success,
        gl=_choose_gl(needed=RGB in modalities),
    )
    make = partial(MetaWorldSimulator, recipe)
    env = VectorEnv(make, num_envs, workers, seed, device, "metaworld", chunk=chunk, worker_timeout=worker_timeout)
    env.max_steps = max_episode_steps
    return env


class MetaWorldSimulator:
    """One world of Meta-World as an `envs.simulator.Simulator`; each episode may be of another task.

    Raises:
        UserError: from the constructor: an instruction has more bytes than are reserved for it.
    """

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        take_over_gl(recipe.gl)
        count = len(INSTRUCTIONS[recipe.tasks[0]]) if recipe.phrasings == "all" else 1
        self._instructions = {
            task: [encode_instruction(text, recipe.instruction_length) for text in INSTRUCTIONS[task][:count]]
            for task in recipe.tasks
        }
        size = recipe.image_size
        observation = {key: ((size, size, 3), np.dtype(np.uint8)) for key in recipe.picture_keys}
        if PROPRIO in recipe.modalities:
            observation[PROPRIO] = (_STATE_SIZE if recipe.full_state else _GRIPPER_SIZE,), np.dtype(np.float32)
        if LANGUAGE in recipe.modalities:
            observation[LANGUAGE] = (recipe.instruction_length,), np.dtype(np.int64)
        self.layout = Layout(
            observation=observation,
            action_dim=4,
            bounded=True,
            has_success=True,
            films=recipe.gl is not None,
            task_names=recipe.tasks,
            has_expert=True,
        )
        self._id: int | None = None

    def reset(self, state: int) -> None:
        seed, index = divmod(state, len(self._recipe.tasks))
        task = self._recipe.tasks[index]
        phrasings = self._instructions[task]
        self._id, self._language = state, phrasings[seed % len(phrasings)]
        self._scene = scene_of(task, self._recipe.fast_render, max(self._recipe.image_size, _FILM_SIZE))
        self._env = self._scene.start(seed)
        self._env.max_path_length = self._recipe.max_episode_steps
        self._placement = self._scene.placement()
        self._observation = self._env._get_obs()
        self._quality = 0.0  # Meta-World's reward of the state, in tenths, where the gain in it is asked for
        if self._recipe.reward == "gain":
            self._quality = self._env.evaluate_state(self._observation, np.zeros(4, np.float32))[0] / 10

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        self._scene.place(self._placement)
        self._observation, quality, _, truncated, info = self._env.step(np.clip(action, -1, 1))
        success = bool(info["success"])
        return {
            "reward": np.array([self._reward(success, quality / 10)], np.float32),
            "terminated": np.array([success and self._recipe.terminate_on_success]),
            "truncated": np.array([truncated]),
            SUCCESS: np.array([success]),
        }

    def _reward(self, success: bool, quality: float) -> float:
        if self._recipe.reward == "sparse":
            return float(success)
        if self._recipe.reward == "dense":
            return quality
        before, self._quality = self._quality, quality
        return success + quality - before

    def observe(self) -> dict[str, np.ndarray]:
        recipe = self._recipe
        out = {
            key: self._draw(camera, recipe.image_size, with_far=not recipe.fast_render)
            for key, camera in recipe.picture_keys.items()
        }
        if PROPRIO in recipe.modalities:
            out[PROPRIO] = self._observation[: None if recipe.full_state else _GRIPPER_SIZE].astype(np.float32)
        if LANGUAGE in recipe.modalities:
            out[LANGUAGE] = self._language
        return out

    def frame(self) -> np.ndarray:
        return self._draw(CLOSE, _FILM_SIZE, with_far=True)

    def _draw(self, camera: str, size: int, with_far: bool) -> np.ndarray:
        self._scene.place_goal_marks(self._env)
        view = close_camera(self._scene.task) if camera == CLOSE else camera
        return self._scene.renderer.draw(self._env.data, view, size, with_far)

    def expert_action(self) -> np.ndarray:
        return self._scene.expert_action(self._observation)

    def save(self) -> bytes | None:
        if self._id is None:
            return to_bytes({"id": None})
        return to_bytes(
            {
                "id": self._id,
                "world": read_state(self._env),
                "observation": self._observation,
                "quality": self._quality,
            }
        )

    def load(self, state: bytes) -> None:
        saved = from_bytes(state)
        if saved["id"] is None:
            self._id = None
            return
        self.reset(saved["id"])  # places bodies; and some attributes are windows into MuJoCo's memory
        write_state(self._env, saved["world"])
        self._observation, self._quality = saved["observation"], saved["quality"]

    def close(self) -> None:
        """Nothing: the models are the process's."""


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse what `check_options` does not know: the options that only this environment has."""
    cameras = options["cameras"]
    check_some_of("modalities", options["modalities"], MODALITIES)
    check_some_of("cameras", [cameras] if isinstance(cameras, str) else cameras, CAMERAS)
    check_one_of("reward", options["reward"], REWARDS)
    check_one_of("phrasings", options["phrasings"], PHRASINGS)
    for option in ("fast_render", "full_state", "terminate_on_success"):
        check_flag(option, options[option])
    if options["max_episode_steps"] is None:
        raise UserError("trainer.env_config.max_episode_steps: expected an integer of at least 1, got None")
    check_image_size(options["image_size"])


def _check_installation() -> None:
    if importlib.util.find_spec("metaworld") is None:
        raise UserError(f"trainer.env: metaworld needs a package that is not installed; {INSTALL}")
    # A later MuJoCo compiles Meta-World's models otherwise, or not at all, and the same id would be another state.
    pinned = [need for need in importlib.metadata.requires("metaworld") or () if need.startswith("mujoco==")]
    wanted, found = "".join(pinned).removeprefix("mujoco=="), importlib.metadata.version("mujoco")
    if wanted and found != wanted:
        version = importlib.metadata.version("metaworld")
        raise UserError(f"trainer.env: metaworld {version} needs mujoco {wanted}, and {found} is installed; {INSTALL}")


def _choose_gl(needed: bool) -> str | None:
    """What draws pictures; without them in the observation, None where nothing does: then there are no videos."""
    try:
        return choose_gl("trainer.env_config.modalities")
    except UserError as error:
        if needed:
            raise
        log.warning("%s. Without pictures in the observation, the run goes on without videos", error)
        return None
