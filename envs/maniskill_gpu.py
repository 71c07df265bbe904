"""ManiSkill's worlds on a GPU: all rows in one scene, physics and pictures, as a TorchRL environment.

It keeps to ManiSkill 3.0.1's source and is tested on a stand-in for it; it HAS NOT RUN ON A GPU yet.

Rows start one after the other, each in a reset of its own, because ManiSkill draws the states of all rows that start
together from one generator: only so has a row the state of its id. States of an id differ from those on the CPU, whose
generator is another, and physics on a GPU repeats up to rounding. Tasks that choose an object while the scene is built
have another one in every row; they are refused. At its first use ManiSkill fetches PhysX's library for GPUs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from envs.chunks import execute_together
from envs.failures import blame, mid_run
from envs.initial_states import InitialStateEnv
from envs.maniskill_worlds import Recipe, Worlds
from envs.pictures import letterbox
from research.errors import UserError

_SAME = 1e-3  # metres, radians: how far apart the same state may be in two rows, whose origins are metres apart


class ManiSkillGPUEnv(InitialStateEnv):
    """N rows of one ManiSkill scene, a TorchRL environment of batch `[N]`.

    `state_dict` holds the place in the stream of training states, and no physics: after `load_state_dict`, reset.

    Args:
        recipe: which task, and how it is observed.
        num_envs: N.
        seed: which stream of initial states training episodes are drawn from.
        device: where observations are put.
        chunk: H, actions per decision.
    Raises:
        UserError: from the constructor: there is no GPU, or the task does not fit.
        SimulatorFailed: later: ManiSkill raised something.
    """

    def __init__(self, recipe: Recipe, num_envs: int, seed: int, device: torch.device | str, chunk: int = 1):
        super().__init__(num_envs, seed, device, chunk=chunk)
        self.name = "maniskill"
        if not torch.cuda.is_available():
            raise UserError("trainer.env_config.gpu: no GPU that CUDA can use is here; leave it out to use the CPU")
        with blame("maniskill: making it", UserError):
            self._worlds = Worlds(recipe, num_envs)
            self.is_closed = False
            self._check_rows()
        self._make_specs(self._worlds.layout)

    def _check_rows(self) -> None:
        """Refuse a task whose rows are not alike: the same id would be another state in each."""
        last = self.batch_size[0] - 1
        for row in {0, last}:
            self._worlds.start(row, 0)
        state = self._worlds.env.get_state()
        if (state[0] - state[last]).abs().max() > _SAME:
            self.close()
            raise UserError(
                f"trainer.env_config.gpu: {self._worlds.recipe.task} has other objects in every row, so that ids are "
                "no states; leave gpu out"
            )

    @mid_run()
    def _start_episodes(self, rows: np.ndarray, states: np.ndarray) -> dict[str, Tensor]:
        with blame(f"{self.name}: reset"):
            for row, state in zip(rows.tolist(), states.tolist(), strict=True):
                self._worlds.start(row, state)
            started = torch.from_numpy(rows).to(self._worlds.device)
            return {key: value[started] for key, value in self._worlds.observe().items()}

    @mid_run()
    def _advance(self, action: Tensor) -> dict[str, Tensor]:
        with blame(f"{self.name}: step"):
            if self.chunk == 1:
                return {**self._worlds.step(action), **self._worlds.observe()}
            # A row whose episode has ended goes on unseen until it is reset.
            return execute_together(action, self._worlds.step, self._worlds.observe)

    def _frames(self, size: int) -> np.ndarray:
        with blame(f"{self.name}: drawing"):
            return np.stack([letterbox(frame, size) for frame in self._worlds.frames().cpu().numpy()])

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Free the scene; closing twice does nothing."""
        if not self.is_closed:
            self._worlds.close()
        super().close(raise_if_closed=raise_if_closed)
