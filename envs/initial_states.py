"""Episodes that start from ids of initial states: what environments over simulators have in common.

`InitialStateEnv` is the TorchRL side of it, whatever runs the simulators: specs, the stream of training states, resets
of some rows, and where all that is when a run is saved.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from envs.chunks import check_chunk
from envs.pictures import letterbox
from envs.simulator import HELD_OUT_STATES, Layout
from research.action_map import ActionMap
from research.errors import UserError
from research.schema import (
    ACTION,
    ENV_STEPS,
    INITIAL_STATE,
    LANGUAGE,
    OBSERVATION,
    RGB,
    SUCCESS,
    SUCCESS_NOW,
    base_modality,
)


class InitialStateEnv(EnvBase):
    """N rows whose episodes start from ids of initial states: what environments over simulators have in common.

    The id that a row of training is given is a hash of the seed, of the row and of how many episodes that row has
    seen, so that the number of processes does not change a row's ids, nor does that of rows where there is one task.
    A subclass says how rows start and how all of them step, in tensors on any device.

    Args:
        num_envs: N.
        seed: which stream of initial states training episodes are drawn from.
        device: where observations are put.
        held_out: ids below it are never drawn.
        chunk: H, actions per decision.
    """

    batch_locked = True
    resumes_exactly = False
    distinct_states = True
    action_choices: tuple[int, ...] | None = None
    task_names: tuple[str, ...] = ()
    has_expert = False

    def __init__(
        self,
        num_envs: int,
        seed: int,
        device: torch.device | str,
        held_out: int = HELD_OUT_STATES,
        chunk: int = 1,
    ):
        check_chunk(chunk)
        super().__init__(device=device, batch_size=[num_envs])
        self.held_out, self.chunk = held_out, chunk
        self._current: dict[str, Tensor] | None = None  # the last observation, and "initial_state"
        self._first_row, self._all_rows = 0, num_envs
        self._set_seed(seed)

    @abstractmethod
    def _start_episodes(self, rows: np.ndarray, states: np.ndarray) -> dict[str, Tensor]:
        """Start rows int64 `[M]` from ids int64 `[M]`; returns their observations, each entry with batch `[M]`."""

    @abstractmethod
    def _advance(self, action: Tensor) -> dict[str, Tensor]:
        """One decision `[N, A]` or `[N, H, A]`; returns what `envs.simulator.Environment` says of a step."""

    @abstractmethod
    def _frames(self, size: int) -> np.ndarray:
        """Every row as a video shows it, uint8 `[N, size, size, 3]`; asked if `films`."""

    def _make_specs(self, layout: Layout) -> None:
        self._layout, self.films, self.has_success = layout, layout.films, layout.has_success
        self.action_choices, self.task_names = layout.action_choices, layout.task_names
        self.has_expert = layout.has_expert
        self.action_map = layout.action_map or (ActionMap.clipping(layout.action_dim) if layout.bounded else None)
        n, device = self.batch_size[0], self.device
        flag = lambda: Categorical(2, (n, 1), dtype=torch.bool, device=device)  # noqa: E731
        observation = Composite(shape=(n,), device=device)
        for key, (shape, dtype) in layout.observation.items():
            shape, dtype = (n, *shape), torch.from_numpy(np.empty(0, dtype)).dtype
            if base_modality(key) in (RGB, LANGUAGE):
                observation[key] = Bounded(0, 255, shape, dtype=dtype, device=device)
            else:
                observation[key] = Unbounded(shape, dtype=dtype, device=device)
        root = {
            OBSERVATION: observation,
            INITIAL_STATE: Bounded(0, 2**32 - 1, (n, 1), dtype=torch.int64, device=device),
        }
        if layout.has_success:
            root[SUCCESS] = flag()
        if self.chunk > 1:
            root[ENV_STEPS] = Bounded(0, self.chunk, (n, 1), dtype=torch.int64, device=device)
            root |= {SUCCESS_NOW: flag()} if layout.has_success else {}
        self.observation_spec = Composite(root, shape=(n,), device=device)
        self.action_spec = _action_spec(layout, n, self.chunk, device)
        self.reward_spec = Unbounded((n, 1), dtype=torch.float32, device=device)
        self.full_done_spec = Composite(done=flag(), terminated=flag(), truncated=flag(), shape=(n,), device=device)

    def _set_seed(self, seed: int | None) -> None:
        self._seed = int(seed or 0)
        self._episodes = np.zeros(self.batch_size[0], dtype=np.int64)
        self._next_ids = np.full(self.batch_size[0], -1, dtype=np.int64)  # once they have been asked for

    def take_share(self, share: int, of: int) -> None:
        """Be the `share`-th of `of` times as many rows, and draw what those would; before the first reset."""
        self._first_row, self._all_rows = share * self.batch_size[0], of * self.batch_size[0]

    def _upcoming_states(self, rows: np.ndarray) -> np.ndarray:
        """The initial-state id of each row's next episode: a hash of seed, row and episode, past the held-out ids.

        Of several tasks each has as many rows as the others, and a row that had all its own goes on with the rest.
        """
        unknown = rows[self._next_ids[rows] < 0]
        episodes, places = self._episodes[unknown], unknown + self._first_row
        pairs = zip(places.tolist(), episodes.tolist(), strict=True)
        ids = [np.random.SeedSequence((self._seed, *pair)).generate_state(1)[0] for pair in pairs]
        ids = self.held_out + np.array(ids, dtype=np.int64) % (2**31 - self.held_out)
        if (tasks := len(self.task_names)) > 1:
            ids = ids - ids % tasks + (places + self._all_rows * episodes) % tasks
            ids += tasks * (ids < self.held_out)
        self._next_ids[unknown] = ids
        return self._next_ids[rows]

    def _draw_training_states(self, rows: np.ndarray) -> np.ndarray:
        """As `_upcoming_states`, and these episodes begin now."""
        ids = self._upcoming_states(rows)
        self._episodes[rows] += 1
        self._next_ids[rows] = -1
        return ids

    def draw_states(self, count: int) -> Tensor:
        """The ids of `count` next episodes of training, int64 `[count]`, row after row; they are then used up."""
        rows = np.arange(self.batch_size[0])
        rounds = [self._draw_training_states(rows[: count - first]) for first in range(0, count, len(rows))]
        return torch.from_numpy(np.concatenate(rounds))

    def _settle(self) -> None:
        """Bring `_current` up to date; where rows are stepped apart, it may not be."""

    def _reset(self, tensordict: TensorDictBase | None = None, **_) -> TensorDictBase:
        self._settle()
        n = self.batch_size[0]
        mask = None if tensordict is None else tensordict.get("_reset", None)
        rows = np.arange(n)
        if mask is not None and self._current is not None:
            rows = mask.view(n).nonzero()[:, 0].cpu().numpy()
        ids = None if tensordict is None else tensordict.get(INITIAL_STATE, None)
        states = self._draw_training_states(rows) if ids is None else ids.view(n).cpu().numpy()[rows]
        if (states < 0).any():
            raise UserError(f"initial_state: ids are seeds of at least 0, got {states.min()}")
        made = {}
        if len(rows):
            made = {INITIAL_STATE: torch.from_numpy(states)[:, None], **self._start_episodes(rows, states)}
        if len(rows) == n:
            self._current = made
        else:
            self._current = {key: value.clone() for key, value in self._current.items()}
            for key, value in made.items():
                self._current[key][torch.from_numpy(rows)] = value
        return self._pack(self._current | self._nothing_yet(n))

    def _nothing_yet(self, n: int) -> dict[str, Tensor]:
        """What is reported, besides the observation, of n rows that have not been stepped."""
        success = [SUCCESS, SUCCESS_NOW][: 1 if self.chunk == 1 else 2] if self.has_success else []
        flags = [*success, "done", "terminated", "truncated"]
        none = {flag: torch.zeros((n, 1), dtype=torch.bool) for flag in flags}
        return none | ({ENV_STEPS: torch.zeros((n, 1), dtype=torch.int64)} if self.chunk > 1 else {})

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._settle()
        made = self._advance(tensordict.get(ACTION).detach())
        made[INITIAL_STATE] = self._current[INITIAL_STATE].clone()
        self._current = {key: made[key] for key in self._current}
        made["done"] = made["terminated"] | made["truncated"]
        return self._pack(made)

    def _pack(self, tensors: Mapping[str, Tensor]) -> TensorDictBase:
        """A TensorDict of rows, on this environment's device: observations under their key, and all else."""
        seen, batch = self._layout.observation, tensors[INITIAL_STATE].shape[:1]
        root = {key: value for key, value in tensors.items() if key not in seen}
        root[OBSERVATION] = TensorDict({key: value for key, value in tensors.items() if key in seen}, batch)
        return TensorDict(root, batch).to(self.device)

    def render_frames(self, size: int = 256) -> Tensor | None:
        """What every row looks like now, for videos.

        Returns:
            uint8 `[N, size, size, 3]` on the CPU: the simulators' own pictures where they film, else the `rgb`
            observation (of the first camera, where no key is just `rgb`), in a black square if it is not one; None if
            there is neither.
        """
        self._settle()
        if self.films:
            return torch.from_numpy(self._frames(size))
        cameras = sorted((key for key in self._current or () if base_modality(key) == RGB), key=lambda key: key != RGB)
        if not cameras:
            return None
        pictures = self._current[cameras[0]].cpu().numpy()
        return torch.from_numpy(np.stack([letterbox(picture, size) for picture in pictures]))

    def state_dict(self, *args, **kwargs) -> dict:
        """The seed and how many episodes each row has started."""
        return {"seed": self._seed, "episodes": torch.from_numpy(self._episodes.copy())}

    def load_state_dict(self, state_dict: dict, *args, **kwargs) -> None:
        """Continue the stream of training states where it was; reset afterwards."""
        self._set_seed(state_dict["seed"])
        self._episodes = state_dict["episodes"].cpu().numpy().copy()


def _action_spec(layout: Layout, n: int, chunk: int, device: torch.device) -> Bounded | Unbounded:
    shape = (n, layout.action_dim) if chunk == 1 else (n, chunk, layout.action_dim)
    if layout.action_choices is not None:
        last = torch.tensor(layout.action_choices, dtype=torch.float32, device=device) - 1
        return Bounded(torch.zeros(shape, device=device), last.expand(shape), shape, dtype=torch.float32, device=device)
    if layout.bounded:
        return Bounded(-1.0, 1.0, shape, dtype=torch.float32, device=device)
    return Unbounded(shape, dtype=torch.float32, device=device)
