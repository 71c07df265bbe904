"""N simulators as one TorchRL environment, stepped in this process or in several.

`VectorEnv` takes any `envs.simulator.Simulator`, made where it is stepped by a function that can be pickled.

Why not TorchRL's `SerialEnv` or `ParallelEnv`: stepping a list of worlds and building one TensorDict for all of them
was measured 2 to 3 times faster, `ParallelEnv` keeps a core busy polling, and what is raised in one of its workers does
not reach the main process.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from envs.chunks import check_chunk
from envs.groups import STEP_S, Facts, Group, RemoteGroup, close_all
from envs.pictures import letterbox
from envs.simulator import HELD_OUT_STATES, Layout, Simulator
from research.schema import (
    ACTION,
    ENV_STEPS,
    INITIAL_STATE,
    LANGUAGE,
    OBSERVATION,
    RGB,
    SUCCESS,
    SUCCESS_NOW,
    SimulatorFailed,
    UserError,
    base_modality,
)

# ------------------------------------------------------------------- episodes that start from ids, whatever runs them


class InitialStateEnv(EnvBase):
    """N rows whose episodes start from ids of initial states: what environments over simulators have in common.

    The id that a row of training is given is a hash of the seed, of the row and of how many episodes that row has
    seen, so that neither the number of rows nor that of processes changes a row's ids. A subclass says how rows start
    and how all of them step, in tensors on any device.

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

    def _draw_training_states(self, rows: np.ndarray) -> np.ndarray:
        """The next initial-state id of each row: a hash of seed, row and episode, past the held-out ids.

        Of several tasks, each row takes the next that neither it nor the other rows have had as often.
        """
        episodes = self._episodes[rows]
        pairs = zip(rows.tolist(), episodes.tolist(), strict=True)
        ids = [np.random.SeedSequence((self._seed, *pair)).generate_state(1)[0] for pair in pairs]
        self._episodes[rows] += 1
        ids = self.held_out + np.array(ids, dtype=np.int64) % (2**31 - self.held_out)
        if (tasks := len(self.task_names)) > 1:
            ids = ids - ids % tasks + (rows + self.batch_size[0] * episodes) % tasks
            ids += tasks * (ids < self.held_out)
        return ids

    def _reset(self, tensordict: TensorDictBase | None = None, **_) -> TensorDictBase:
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
        none = {key: torch.zeros((n, 1), dtype=torch.bool) for key in self._flags}
        if self.chunk > 1:
            none[ENV_STEPS] = torch.zeros((n, 1), dtype=torch.int64)
        return self._pack(self._current | none)

    @property
    def _flags(self) -> list[str]:
        """The booleans that every reset reports, all false."""
        success = [SUCCESS, SUCCESS_NOW][: 1 if self.chunk == 1 else 2] if self.has_success else []
        return [*success, "done", "terminated", "truncated"]

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        made = self._advance(tensordict.get(ACTION).detach())
        made[INITIAL_STATE] = self._current[INITIAL_STATE].clone()
        self._current = {key: made[key] for key in self._current}
        made["done"] = made["terminated"] | made["truncated"]
        return self._pack(made)

    def _pack(self, tensors: Mapping[str, Tensor]) -> TensorDictBase:
        seen = self._layout.observation
        root = {key: value for key, value in tensors.items() if key not in seen}
        root[OBSERVATION] = TensorDict({key: value for key, value in tensors.items() if key in seen}, self.batch_size)
        return TensorDict(root, self.batch_size).to(self.device)

    def render_frames(self, size: int = 256) -> Tensor | None:
        """What every row looks like now, for videos.

        Returns:
            uint8 `[N, size, size, 3]` on the CPU: the simulators' own pictures where they film, else the `rgb`
            observation (of the first camera, where no key is just `rgb`), in a black square if it is not one; None if
            there is neither.
        """
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
        self._seed, self._episodes = state_dict["seed"], state_dict["episodes"].cpu().numpy().copy()


def _action_spec(layout: Layout, n: int, chunk: int, device: torch.device) -> Bounded | Unbounded:
    shape = (n, layout.action_dim) if chunk == 1 else (n, chunk, layout.action_dim)
    if layout.action_choices is not None:
        last = torch.tensor(layout.action_choices, dtype=torch.float32, device=device) - 1
        return Bounded(torch.zeros(shape, device=device), last.expand(shape), shape, dtype=torch.float32, device=device)
    if layout.bounded:
        return Bounded(-1.0, 1.0, shape, dtype=torch.float32, device=device)
    return Unbounded(shape, dtype=torch.float32, device=device)


# ------------------------------------------------------------------- the TorchRL environment


class VectorEnv(InitialStateEnv):
    """N simulators as one TorchRL environment of batch `[N]`, which keeps to `envs.simulator.Environment`.

    Reset with `TensorDict({"initial_state": ids}, [N])`, ids int64 `[N, 1]`, starts row n from the state of `ids[n]`;
    with a `_reset` mask, in the rows that it names. The number of worker processes does not change the data.

    `state_dict` holds the place in the stream of training states. Where the simulators can be saved it also holds all
    of them and what they showed last, and `load_state_dict` brings back the very step (`resumes_exactly`); where they
    cannot, reset after it.

    Args:
        make: makes one simulator; pickled, and called in the process that steps it.
        num_envs: N.
        workers: processes among which the simulators are divided (at most N); 1 steps them in this process.
        seed: which stream of initial states training episodes are drawn from.
        device: where observations are put; simulators run on the CPU.
        name: how messages call this environment.
        held_out: ids below it are never drawn in training.
        chunk: H, actions per decision; the observation is drawn once, after the last of them.
        worker_timeout: seconds within which a worker process has to answer a reset or a step.
    Raises:
        UserError: a simulator cannot be made.
        SimulatorFailed: later: a simulator raised something, or its worker process died, was stopped or hangs.
    """

    def __init__(
        self,
        make: Callable[[], Simulator],
        num_envs: int,
        workers: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        name: str = "the environment",
        held_out: int = HELD_OUT_STATES,
        chunk: int = 1,
        worker_timeout: float = STEP_S,
    ):
        super().__init__(num_envs, seed, device, held_out, chunk)
        self.name, self._filmed = name, 0
        workers = min(workers, num_envs)
        self._shares = np.array_split(np.arange(num_envs), workers)  # the rows of each group
        self._groups: list[Group | RemoteGroup] = []
        try:
            for share in self._shares:
                self._groups.append(
                    Group(make, num_envs, name) if workers == 1 else RemoteGroup(make, share, name, worker_timeout)
                )
            facts: list[Facts] = [group.collect() for group in self._groups]
            self.is_closed = False
        except BaseException:  # also Ctrl-C, while scenes load
            self.close()
            raise
        self._make_specs(facts[0].layout)
        self.resumes_exactly = all(fact.saves for fact in facts)

    def _start_episodes(self, rows: np.ndarray, states: np.ndarray) -> dict[str, Tensor]:
        calls = {}
        for group, share in enumerate(self._shares):
            mine = (rows >= share[0]) & (rows <= share[-1])
            if mine.any():
                calls[group] = (rows[mine] - share[0]).tolist(), states[mine].tolist()
        return _join(self._ask("reset", calls))

    def _advance(self, action: Tensor) -> dict[str, Tensor]:
        actions = action.to("cpu", torch.float32).numpy()
        return _join(self._ask("step", {group: (actions[share],) for group, share in enumerate(self._shares)}))

    def _frames(self, size: int) -> np.ndarray:
        return np.concatenate(self._ask("frames", self._all(size)))

    def film_between(self, rows: int, size: int = 256) -> None:
        """Keep what the first rows look like between the control steps of a decision; see `frames_between`."""
        if self.films:
            mine = {group: (int((share < rows).sum()), size) for group, share in enumerate(self._shares)}
            self._ask("film_between", mine)
            self._filmed = rows

    def frames_between(self) -> list[Tensor]:
        """Of the first rows' last decision: what they looked like after each control step but the last.

        Returns:
            uint8 `[K, size, size, 3]` on the CPU for each row that `film_between` named; empty where nothing is filmed.
        """
        if not self._filmed:
            return []
        return [torch.from_numpy(shot) for group in self._ask("frames_between", self._all()) for shot in group]

    def expert_action(self) -> Tensor:
        """What an expert who sees the whole state would do now, float32 `[N, A]`.

        Raises:
            UserError: there is none.
        """
        if not self.has_expert:
            raise UserError(f"{self.name} has no expert")
        return torch.from_numpy(np.concatenate(self._ask("expert_actions", self._all()))).to(self.device)

    def _all(self, *args: Any) -> dict[int, tuple]:
        """The same arguments for every group."""
        return dict.fromkeys(range(len(self._shares)), args)

    def _ask(self, method: str, calls: Mapping[int, tuple]) -> list:
        """Call a method of groups, group -> arguments, at the same time where they are in processes of their own.

        After a failure the environment is closed: the replies of other groups lie unread.
        """
        if not self._groups:
            raise SimulatorFailed(f"{self.name}: the environment is closed")
        try:
            for group, args in calls.items():
                self._groups[group].submit(method, *args)
            return [self._groups[group].collect() for group in calls]
        except SimulatorFailed:
            self.close()
            raise

    def state_dict(self, *args, **kwargs) -> dict:
        """The stream's seed and place, and, if `resumes_exactly` and an episode has begun, the simulators' states."""
        state = super().state_dict()
        if self.resumes_exactly and self._current is not None:
            saved = [one for group in self._ask("save", self._all()) for one in group]
            # As tensors: checkpoints hold tensors and plain values, so that reading one never runs code.
            state["simulators"] = [torch.from_numpy(np.frombuffer(one, np.uint8).copy()) for one in saved]
            state["current"] = {key: value.clone() for key, value in self._current.items()}
        return state

    def load_state_dict(self, state_dict: dict, *args, **kwargs) -> None:
        """Continue where `state_dict` was taken; reset afterwards if it holds no simulators."""
        super().load_state_dict(state_dict)
        if "simulators" in state_dict:
            saved = [one.cpu().numpy().tobytes() for one in state_dict["simulators"]]
            self._ask("load", {group: ([saved[row] for row in share],) for group, share in enumerate(self._shares)})
            self._current = {key: value.to("cpu", copy=True) for key, value in state_dict["current"].items()}

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the simulators and end their worker processes; closing twice does nothing."""
        groups, self._groups = self._groups, []
        close_all(groups)
        super().close(raise_if_closed=raise_if_closed)


def _join(results: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """The groups' arrays one after the other along the batch, as tensors."""
    if len(results) == 1:
        return {key: torch.from_numpy(array) for key, array in results[0].items()}
    return {key: torch.from_numpy(np.concatenate([result[key] for result in results])) for key in results[0]}
