"""ManiSkill's manipulation tasks (Tao et al., 2024, arXiv:2410.00425) with pictures, depth, language and exact ids.

Action `[A]`, as the control mode has it: "pd_ee_delta_pose" is the hand's displacement and rotation in its own frame
and the fingers, `[7]`. Components with bounds are rescaled from [-1, 1].

Observation: `rgb` uint8 `[S, S, 3]` and `depth` float32 `[S, S]` in metres, at most 32.767 and 0 where nothing is seen,
of several cameras under `rgb_<camera>` and `depth_<camera>`; `proprio` float32 `[P]`, what ManiSkill gives beside
pictures: the joints' positions and velocities (radians, metres), the tool's pose and, in tasks whose pictures do not
show it, where the goal is (or, with `full_state`, also the objects); `language` int64 `[L]`, the instruction's bytes.

The id of an initial state is the seed of ManiSkill's reset. On the CPU, the same id and actions are the same episode
bit for bit, whatever was done before; a world is saved as its id and its actions, and loaded by playing them again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torchrl.envs import EnvBase

from envs.groups import STEP_S
from envs.gym_options import check_options
from envs.gym_state import from_bytes, to_bytes
from envs.maniskill_tasks import INSTRUCTIONS
from envs.maniskill_worlds import Recipe, Worlds, to_numpy
from envs.simulator_options import check_flag, check_image_size, check_one_of, check_some_of
from envs.vector import VectorEnv
from research.errors import UserError, did_you_mean
from research.schema import LANGUAGE, MODALITIES, PROPRIO, RGB

REWARDS = ("sparse", "dense", "normalized_dense")
INSTALL = "pip install -e .[maniskill]"


def make_maniskill_env(
    num_envs: int,
    device: torch.device | str,
    seed: int,
    /,
    *,
    task: str = "PickCube-v1",
    modalities: Sequence[str] = (RGB, PROPRIO, LANGUAGE),
    cameras: str | Sequence[str] | None = None,
    image_size: int = 96,
    full_state: bool = False,
    instruction: str | None = None,
    instruction_length: int = 64,
    control_mode: str | None = None,
    reward: str = "sparse",
    max_episode_steps: int | None = None,
    terminate_on_success: bool = True,
    gpu: bool = False,
    chunk: int = 1,
    workers: int = 0,
    worker_timeout: float = STEP_S,
    **unknown: Any,
) -> EnvBase:
    """Make `num_envs` worlds of a task, stepped together.

    Args:
        num_envs: N.
        device: where observations and rewards are put.
        seed: which stream of initial states training episodes are drawn from.
        task: an id of ManiSkill's, of one robot.
        modalities: of `rgb`, `depth`, `proprio` and `language`.
        cameras: of those that the task has; by default all of them.
        image_size: S, pixels.
        full_state: `proprio` is all that ManiSkill's state observation has.
        instruction: what `language` says, for tasks that have no instruction here, or another.
        instruction_length: L, bytes reserved for the instruction.
        control_mode: one of the robot's; by default "pd_ee_delta_pose" where it has that, else ManiSkill's default.
        reward: "sparse": 1 in a step at whose end the task is done, -1 where it has failed; "dense", or
            "normalized_dense", which is at most 1 a step: ManiSkill's own, where the task has them.
        max_episode_steps: control steps after which an episode is truncated; by default the task's.
        terminate_on_success: whether success ends the episode. Failure does.
        gpu: all worlds in one scene on a GPU, physics and pictures; see envs/maniskill_gpu.py.
        chunk: H, actions per decision.
        workers: processes among which the worlds are divided (at most N); 0 steps them in this process. Without a GPU,
            the first picture of each takes Mesa about 12 s of computing.
        worker_timeout: seconds within which a worker has to answer; one that does not is killed, and the run stops.
    Raises:
        UserError: an option does not fit, or ManiSkill, Vulkan or the task's files are not there.
    """
    options = {option: value for option, value in locals().items() if option in make_maniskill_env.__kwdefaults__}
    check_options("maniskill", {**options, "num_envs": num_envs, "seed": seed}, unknown)
    _check_options(options)
    if importlib.util.find_spec("mani_skill") is None:
        raise UserError(f"trainer.env: maniskill needs a package that is not installed; {INSTALL}")
    recipe = Recipe(
        task=task,
        modalities=tuple(modalities),
        cameras=(cameras,) if isinstance(cameras, str) else cameras and tuple(cameras),
        image_size=image_size,
        full_state=full_state,
        instruction=instruction or INSTRUCTIONS.get(task, ""),
        instruction_length=instruction_length,
        control_mode=control_mode,
        reward=reward,
        max_episode_steps=_find_limit(task, reward, max_episode_steps),
        terminate_on_success=terminate_on_success,
        gpu=gpu,
    )
    if LANGUAGE in modalities and not recipe.instruction:
        raise UserError(
            f"trainer.env_config.instruction: there is none for {task} here; give one, or leave language out of "
            "trainer.env_config.modalities"
        )
    if gpu:
        from envs.maniskill_gpu import ManiSkillGPUEnv

        env = ManiSkillGPUEnv(recipe, num_envs, seed, device, chunk)
    else:
        make = partial(ManiSkillSimulator, recipe)
        env = VectorEnv(make, num_envs, workers, seed, device, "maniskill", chunk=chunk, worker_timeout=worker_timeout)
    env.max_steps = recipe.max_episode_steps
    return env


class ManiSkillSimulator:
    """One world on the CPU as an `envs.simulator.Simulator`.

    Raises:
        UserError: from the constructor, see `Worlds`.
    """

    def __init__(self, recipe: Recipe):
        self._worlds = Worlds(recipe)
        self.layout = self._worlds.layout
        self._id: int | None = None
        self._actions: list[np.ndarray] = []

    def reset(self, state: int) -> None:
        self._id, self._actions = state, []
        self._worlds.start(0, state)

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        self._actions.append(np.array(action))
        return to_numpy(self._worlds.step(torch.from_numpy(self._actions[-1])[None]))

    def observe(self) -> dict[str, np.ndarray]:
        return to_numpy(self._worlds.observe())

    def frame(self) -> np.ndarray:
        return self._worlds.frames()[0].cpu().numpy()

    def save(self) -> bytes | None:
        """The id and the actions: what ManiSkill's own states leave out shows in the sixth digit of the next ones."""
        return to_bytes({"id": self._id, "actions": self._actions})

    def load(self, state: bytes) -> None:
        saved = from_bytes(state)
        self._id, self._actions = saved["id"], []
        if self._id is not None:
            self.reset(self._id)
            for action in saved["actions"]:
                self.step(action)

    def close(self) -> None:
        self._worlds.close()


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse what `check_options` does not know: the options that only this environment has."""
    check_some_of("modalities", options["modalities"], MODALITIES)
    check_one_of("reward", options["reward"], REWARDS)
    check_image_size(options["image_size"])
    for option in ("full_state", "terminate_on_success", "gpu"):
        check_flag(option, options[option])
    for option in ("task", "control_mode"):
        if options[option] is not None and not isinstance(options[option], str):
            raise UserError(f"trainer.env_config.{option}: expected a name, got {options[option]!r}")
    cameras = options["cameras"]
    if cameras is not None and not isinstance(cameras, str | list | tuple):
        raise UserError(f"trainer.env_config.cameras: expected names of cameras, got {cameras!r}")
    if options["gpu"] and options["workers"]:
        raise UserError(
            "trainer.env_config.workers: with gpu all worlds are in one scene of this process; leave it out"
        )
    if options["gpu"] and "_target_" in (options["control_mode"] or ""):
        raise UserError(
            "trainer.env_config.control_mode: where a row starts, ManiSkill sets the targets of all rows on a GPU; "
            "choose one without 'target'"
        )


def _find_limit(task: str, reward: str, limit: int | None) -> int:
    """After how many steps a task's episodes are truncated; refuses a task or a reward that there is not."""
    import mani_skill.envs  # noqa: F401  # registers the tasks
    from mani_skill.utils.registration import REGISTERED_ENVS

    if task not in REGISTERED_ENVS:
        hint = did_you_mean(str(task), REGISTERED_ENVS)
        raise UserError(
            f"trainer.env_config.task: ManiSkill has no {task!r}{hint}; it has {', '.join(INSTRUCTIONS)}, ..."
        )
    rewards = [known for known in REWARDS if known in REGISTERED_ENVS[task].cls.SUPPORTED_REWARD_MODES]
    if reward not in rewards:
        raise UserError(f"trainer.env_config.reward: {task} has no {reward!r}; it has {', '.join(rewards) or 'none'}")
    limit = limit or REGISTERED_ENVS[task].max_episode_steps
    if limit is None:
        raise UserError(f"trainer.env_config.max_episode_steps: {task} has none of its own; give one")
    return limit
