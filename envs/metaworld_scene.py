"""Episodes of a Meta-World task: an environment that is a function of a seed, on a model that worlds share.

Meta-World's own classes, rather than its Gymnasium environment, whose seeds do not repeat. Three things of theirs would
make an episode depend on earlier ones, or be wrong, and are met here:

- Objects stay where the last reset left them while the hand moves to its start. So an episode is a new object, and as
  in Meta-World's benchmark (where each of its tasks is a vector) the world is reset twice with one vector: the second
  time, everything is where the first has put it.
- The bounds of the observation are cached when the goal is still hidden, and would clip it to zero.
- Marks of the goal are put in place before positions are computed, which undoes it in some tasks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np

from envs.mujoco_rendering import Renderer

if TYPE_CHECKING:
    from metaworld.sawyer_xyz_env import SawyerXYZEnv

_FAR_LINKS = ("l0", "l1", "head", "base", "pedestal")  # of the arm: half of all triangles, and hardly ever in sight


class Scene:
    """A task's compiled model, its expert and its renderer, for all worlds of a process.

    The tasks change two arrays of a model, where bodies and sites are (`placement`); every world has its own and puts
    them in place before it computes.

    Args:
        task: its name.
        fast_render: as of `Renderer`.
        largest: pixels of the largest picture that will be asked for.
    """

    def __init__(self, task: str, fast_render: bool, largest: int):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        self.task, self._fast_render, self._largest = task, fast_render, largest
        self._expert = ENV_POLICY_MAP[task]()
        self._make = _on_one_model(ALL_V3_ENVIRONMENTS[task])
        self._model = self._make().model

    def start(self, seed: int) -> SawyerXYZEnv:
        """A new episode.

        Args:
            seed: at least 0; the same seed is the same episode.
        Returns:
            an environment that has not been stepped, with all positions computed; its frame before the first is the
            first.
        """
        import mujoco

        env = self._make()
        env._set_task_called, env._partially_observable = True, False
        del env.sawyer_observation_space  # cached with a hidden goal
        env.seed(seed)
        env._freeze_rand_vec, env.seeded_rand_vec = False, True
        env.reset_model()
        env._freeze_rand_vec = True  # the vector that this reset took, after those that it refused
        mujoco.mj_resetData(env.model, env.data)
        env.reset_model()
        mujoco.mj_forward(env.model, env.data)
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        return env

    def expert_action(self, observation: np.ndarray) -> np.ndarray:
        """What Meta-World's scripted expert does where it observes `[39]`: float32 `[4]` in [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that actions beyond 1 are clipped
            return np.clip(self._expert.get_action(observation), -1, 1).astype(np.float32)

    def placement(self) -> list[np.ndarray]:
        """Where bodies `[bodies, 3]` and sites `[sites, 3]` are in the model now, in metres."""
        return [self._model.body_pos.copy(), self._model.site_pos.copy()]

    def place(self, placement: Sequence[np.ndarray]) -> None:
        """Put bodies and sites where `placement` found them."""
        self._model.body_pos[:], self._model.site_pos[:] = placement

    def place_goal_marks(self, env: SawyerXYZEnv) -> None:
        """Put the marks of the goal where the goal is."""
        marks = env._target_site_config
        if self.task == "pick-out-of-hole-v3":  # Meta-World names the object's place here
            marks = [("goal", env._target_pos)]
        for name, position in marks:
            env._set_pos_site(name, position)

    @cached_property
    def renderer(self) -> Renderer:
        """Draws this model, for whichever world asks."""
        return Renderer(self._model, self._largest, self._fast_render, _FAR_LINKS)


@cache
def scene_of(task: str, fast_render: bool, largest: int) -> Scene:
    """This process's `Scene` of a task, made when it is first asked for."""
    return Scene(task, fast_render, largest)


def _on_one_model(task_class: type[SawyerXYZEnv]) -> type[SawyerXYZEnv]:
    """A task's class whose objects share one compiled model: 1 to 2 ms to make one instead of 200, and 20 MB less."""
    import mujoco

    class OnOneModel(task_class):
        _compiled = None

        def _initialize_simulation(self):
            if OnOneModel._compiled is None:
                OnOneModel._compiled, data = super()._initialize_simulation()
                return OnOneModel._compiled, data
            return OnOneModel._compiled, mujoco.MjData(OnOneModel._compiled)

    return OnOneModel
