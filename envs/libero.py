"""LIBERO's suites of tasks with language (Liu et al., 2023, arXiv:2306.03310), through TorchRL's `LiberoEnv`.

Action `[7]` in [-1, 1]: the hand's displacement (3) and rotation (3), and the fingers, which close when it is above 0.

Observation: `rgb` uint8 `[S, S, 3]`, of two cameras `rgb_agentview` and `rgb_wrist`; `proprio` float32 `[9]`, the
hand's position in metres (3) and quaternion (4), and the fingers' positions in metres (2); `language` int64 `[L]`, the
instruction's bytes. Success ends an episode and is the only reward.

LIBERO has 50 fixed initial states per task. Of T tasks, id `i` is of task `i % T`. The ids below 10 T are the states 0
to 9 of every task, and are kept for evaluation; all later ids are among the states 10 to 49.

What LIBERO draws is fetched from a hub when it is first needed. Here that is refused with the command that fetches it.
A world is drawn in every control step, also within a chunk. It cannot be saved: a run that resumes starts its episodes
anew.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.envs import LiberoEnv

from envs.groups import STEP_S
from envs.gym_options import check_options
from envs.gym_spaces import encode_instruction
from envs.mujoco_rendering import choose_gl, take_over_gl
from envs.simulator import Layout
from envs.simulator_options import check_image_size, check_one_of, check_some_of
from envs.vector import VectorEnv
from research.errors import SimulatorFailed, UserError

# Suite -> control steps after which an episode is truncated: beyond the longest demonstrations, and as the evaluations
from research.schema import ACTION, LANGUAGE, PROPRIO, RGB, SUCCESS

# Suite -> control steps after which an episode is truncated: beyond the longest demonstrations, and as the evaluations
# of OpenVLA have it (Kim et al., 2024, arXiv:2406.09246).
SUITES = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
MODALITIES = (RGB, PROPRIO, LANGUAGE)
STATES, HELD_OUT_PER_TASK = 50, 10
INSTALL = "pip install -e .[libero] and pip install --no-deps hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1"
_ASSETS = "scenes", "articulated_objects", "stable_scanned_objects", "turbosquid_objects", "stable_hope_objects"
_PROPRIO_SIZE = 9


class Task(NamedTuple):
    """One task of a suite."""

    index: int
    name: str
    instruction: str


@dataclass(frozen=True)
class Recipe:
    """What a process needs to make worlds; fields as the options of `make_libero_env`."""

    suite: str
    tasks: tuple[Task, ...]
    modalities: tuple[str, ...]
    cameras: tuple[str, ...]
    image_size: int
    instruction_length: int
    max_episode_steps: int
    gl: str

    @property
    def picture_keys(self) -> tuple[str, ...]:
        """The observation key of each camera."""
        return (RGB,) if len(self.cameras) == 1 else tuple(f"{RGB}_{camera}" for camera in self.cameras)


def make_libero_env(
    num_envs: int,
    device: torch.device | str,
    seed: int,
    /,
    *,
    suite: str = "libero_spatial",
    tasks: str | Sequence[int] = "all",
    modalities: Sequence[str] = MODALITIES,
    cameras: str | Sequence[str] = "agentview",
    image_size: int = 128,
    instruction_length: int = 96,
    max_episode_steps: int | None = None,
    chunk: int = 1,
    workers: int = 0,
    worker_timeout: float = STEP_S,
    **unknown: Any,
) -> VectorEnv:
    """Make `num_envs` worlds of the tasks of a suite, stepped together.

    Args:
        num_envs: N; where it is a multiple of the number of tasks, a row keeps its task, and nothing is loaded twice.
        device: where observations and rewards are put; the simulators run on the CPU.
        seed: which stream of initial states training episodes are drawn from.
        suite: one of `SUITES`.
        tasks: indices into the suite's tasks, or "all".
        modalities: of `rgb`, `proprio` and `language`.
        cameras: "agentview", "wrist" or both, which then are `rgb_agentview` and `rgb_wrist`.
        image_size: S, pixels.
        instruction_length: L, bytes reserved for the instruction.
        max_episode_steps: control steps after which an episode is truncated; by default the suite's.
        chunk: H, actions per decision.
        workers: processes among which the worlds are divided (at most N); 0 steps them in this process.
        worker_timeout: seconds within which a worker has to answer; one that does not is killed, and the run stops.
    Raises:
        UserError: an option does not fit, LIBERO or what it draws is not there, or nothing can draw here.
    """
    options = {option: value for option, value in locals().items() if option in make_libero_env.__kwdefaults__}
    check_options("libero", {**options, "num_envs": num_envs, "seed": seed}, unknown)
    check_one_of("suite", suite, tuple(SUITES))
    check_some_of("modalities", modalities, MODALITIES)
    cameras = (cameras,) if isinstance(cameras, str) else tuple(cameras)
    check_some_of("cameras", cameras, tuple(CAMERAS))
    check_image_size(image_size)
    _check_installation()
    recipe = Recipe(
        suite=suite,
        tasks=_choose_tasks(suite, tasks),
        modalities=tuple(modalities),
        cameras=tuple(camera for camera in CAMERAS if camera in cameras),
        image_size=image_size,
        instruction_length=instruction_length,
        max_episode_steps=max_episode_steps or SUITES[suite],
        gl=choose_gl("trainer.env"),
    )
    make, held_out = partial(LiberoSimulator, recipe), HELD_OUT_PER_TASK * len(recipe.tasks)
    env = VectorEnv(make, num_envs, workers, seed, device, "libero", held_out, chunk, worker_timeout)
    env.max_steps = recipe.max_episode_steps
    return env


class LiberoSimulator:
    """One world of LIBERO as an `envs.simulator.Simulator`; an episode of another task loads that task's scene.

    Raises:
        UserError: from the constructor: an instruction has more bytes than are reserved for it.
    """

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        take_over_gl(recipe.gl)
        length = recipe.instruction_length
        self._instructions = [encode_instruction(task.instruction, length) for task in recipe.tasks]
        picture = (recipe.image_size, recipe.image_size, 3), np.dtype(np.uint8)
        observation = dict.fromkeys(recipe.picture_keys, picture)
        observation |= {PROPRIO: ((_PROPRIO_SIZE,), np.dtype(np.float32)), LANGUAGE: ((length,), np.dtype(np.int64))}
        self.layout = Layout(
            observation={key: value for key, value in observation.items() if key.split("_")[0] in recipe.modalities},
            action_dim=7,
            bounded=True,
            has_success=True,
            films=True,
            task_names=tuple(task.name for task in recipe.tasks),
        )
        self._env: LiberoEnv | None = None
        self._task = -1

    def reset(self, state: int) -> None:
        round_, task = divmod(state, len(self._recipe.tasks))
        if task != self._task:
            self.close()
            self._env, self._task = self._load(task), task
        self._env.init_state_id = initial_state(round_)
        with _numpy_draws_undone():
            self._env.set_seed(0, static_seed=True)
            self._now = self._env.reset()

    def _load(self, task: int) -> LiberoEnv:
        recipe = self._recipe
        first, *second = (CAMERAS[camera] for camera in recipe.cameras)
        return LiberoEnv(
            recipe.suite,
            recipe.tasks[task].index,
            camera_height=recipe.image_size,
            camera_width=recipe.image_size,
            camera=first,
            wrist_camera=second[0] if second else None,
            env_kwargs={"camera_names": [first, *second]},
            init_state_mode="fixed",
            max_episode_steps=recipe.max_episode_steps,
        )

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        clipped = torch.from_numpy(np.clip(action, -1, 1))
        self._now = self._env.step(TensorDict({ACTION: clipped}, []))["next"]
        out = {key: self._now[key].numpy() for key in ("reward", "terminated", "truncated", SUCCESS)}
        return {**out, "reward": out["reward"].astype(np.float32)}

    def observe(self) -> dict[str, np.ndarray]:
        seen = self._now["observation"]
        out = {key: self._picture(place) for place, key in enumerate(self._recipe.picture_keys)}
        out |= {PROPRIO: seen["state"].numpy(), LANGUAGE: self._instructions[self._task]}
        return {key: out[key] for key in self.layout.observation}

    def _picture(self, place: int) -> np.ndarray:
        """What the camera of that place in `cameras` sees: TorchRL has channels first."""
        picture = self._now["observation", ("image", "wrist_image")[place]]
        return picture.permute(1, 2, 0).contiguous().numpy()

    def frame(self) -> np.ndarray:
        return self._picture(0)

    def save(self) -> bytes | None:
        return None

    def load(self, state: bytes) -> None:
        raise SimulatorFailed("libero: a world cannot be saved, so there is none to go on from")

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env, self._task = None, -1


@contextmanager
def _numpy_draws_undone() -> Iterator[None]:
    """Leave NumPy's global generator as it was: LIBERO places what no initial state holds by it, fixtures among it."""
    before = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(before)


def initial_state(number: int) -> int:
    """Which of a task's fixed initial states its `number`-th id starts from: training has none of evaluation."""
    if number < HELD_OUT_PER_TASK:
        return number
    return HELD_OUT_PER_TASK + (number - HELD_OUT_PER_TASK) % (STATES - HELD_OUT_PER_TASK)


def _choose_tasks(suite: str, tasks: Any) -> tuple[Task, ...]:
    known = _tasks_of(suite)
    if tasks == "all":
        return known
    fits = isinstance(tasks, list | tuple) and tasks and len(set(map(str, tasks))) == len(tasks)
    if not fits or not all(type(task) is int and 0 <= task < len(known) for task in tasks):
        raise UserError(
            f'trainer.env_config.tasks: expected "all", or some of the indices 0 to {len(known) - 1} of {suite}, each '
            f"once, got {tasks!r}"
        )
    return tuple(known[task] for task in tasks)


def _tasks_of(suite: str) -> tuple[Task, ...]:
    """The suite's tasks, in the order that LIBERO evaluates them in."""
    _ = LiberoEnv.available_envs  # writes LIBERO's file of paths, without which importing it asks questions
    from libero.libero import benchmark

    tasks = benchmark.get_benchmark_dict()[suite]().tasks
    return tuple(Task(index, task.name, task.language) for index, task in enumerate(tasks))


def _check_installation() -> None:
    """Refuse to go on where LIBERO is not installed, or would fetch its scenes and objects from a hub."""
    missing = [name for name in ("libero", "robosuite", "bddl") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"trainer.env: libero needs {', '.join(missing)}, not installed here; {INSTALL}")
    package = Path(next(iter(importlib.util.find_spec("libero").submodule_search_locations))) / "libero" / "assets"
    fetched = Path.home() / ".cache" / "libero" / "assets"
    if not package.is_dir() and not all((fetched / part).is_dir() for part in _ASSETS):
        raise UserError(
            f"trainer.env: libero lacks its scenes and objects; fetch them where there is a network: hf download "
            f"lerobot/libero-assets --repo-type dataset --local-dir {fetched}"
        )
