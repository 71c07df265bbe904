"""N simulators as one TorchRL environment, stepped in this process or in several.

`VectorEnv` takes any `envs.simulator.Simulator`, made where it is stepped by a function that can be pickled.

Why not TorchRL's `SerialEnv` or `ParallelEnv`: stepping a list of worlds and building one TensorDict for all of them
was measured 2 to 3 times faster, `ParallelEnv` keeps a core busy polling, and what is raised in one of its workers does
not reach the main process.
"""

from __future__ import annotations

import multiprocessing
import signal
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from envs.pictures import letterbox
from envs.simulator import HELD_OUT_STATES, Layout, Simulator
from research.schema import ACTION, INITIAL_STATE, LANGUAGE, OBSERVATION, RGB, SUCCESS, UserError, base_modality

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
    """

    batch_locked = True
    resumes_exactly = False
    distinct_states = True

    def __init__(self, num_envs: int, seed: int, device: torch.device | str, held_out: int = HELD_OUT_STATES):
        super().__init__(device=device, batch_size=[num_envs])
        self.held_out = held_out
        self._current: dict[str, Tensor] | None = None  # the last observation, and "initial_state"
        self._set_seed(seed)

    @abstractmethod
    def _start_episodes(self, rows: np.ndarray, states: np.ndarray) -> dict[str, Tensor]:
        """Start rows int64 `[M]` from ids int64 `[M]`; returns their observations, each entry with batch `[M]`."""

    @abstractmethod
    def _advance(self, action: Tensor) -> dict[str, Tensor]:
        """One control step `[N, A]`; returns observation, `reward`, `terminated`, `truncated` and any `success`."""

    @abstractmethod
    def _frames(self, size: int) -> np.ndarray:
        """Every row as a video shows it, uint8 `[N, size, size, 3]`; asked if `films`."""

    def _make_specs(self, layout: Layout) -> None:
        self._layout, self.films, self.has_success = layout, layout.films, layout.has_success
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
        self.observation_spec = Composite(root, shape=(n,), device=device)
        shape = (n, layout.action_dim)
        self.action_spec = (
            Bounded(-1.0, 1.0, shape, dtype=torch.float32, device=device)
            if layout.bounded
            else Unbounded(shape, dtype=torch.float32, device=device)
        )
        self.reward_spec = Unbounded((n, 1), dtype=torch.float32, device=device)
        self.full_done_spec = Composite(done=flag(), terminated=flag(), truncated=flag(), shape=(n,), device=device)

    def _set_seed(self, seed: int | None) -> None:
        self._seed = int(seed or 0)
        self._episodes = np.zeros(self.batch_size[0], dtype=np.int64)

    def _draw_training_states(self, rows: np.ndarray) -> np.ndarray:
        """The next initial-state id of each row: a hash of seed, row and episode, past the held-out ids."""
        ids = [np.random.SeedSequence((self._seed, row, self._episodes[row])).generate_state(1)[0] for row in rows]
        self._episodes[rows] += 1
        return self.held_out + np.array(ids, dtype=np.int64) % (2**31 - self.held_out)

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
        none = torch.zeros((n, 1), dtype=torch.bool)
        flags = (SUCCESS, "done", "terminated", "truncated")[0 if self.has_success else 1 :]
        return self._pack(self._current | {key: none.clone() for key in flags})

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


# ------------------------------------------------------------------- several simulators, in one process or in many


class _Facts(NamedTuple):
    """What the simulators of a group say of themselves once they have been made."""

    layout: Layout
    saves: bool


class _Group:
    """Simulators that share a process: `submit` a method call, then `collect` its result; the first one is `facts`."""

    def __init__(self, make: Callable[[], Simulator], count: int):
        self.simulators = [make() for _ in range(count)]
        self._result: Any = _Facts(self.simulators[0].layout, all(one.save() is not None for one in self.simulators))

    def submit(self, method: str, *args: Any) -> None:
        self._result = getattr(self, method)(*args)

    def collect(self) -> Any:
        return self._result

    def reset(self, rows: Sequence[int], states: Sequence[int]) -> dict[str, np.ndarray]:
        return _stack([self.simulators[row].reset(state) for row, state in zip(rows, states, strict=True)])

    def step(self, actions: np.ndarray) -> dict[str, np.ndarray]:
        return _stack([one.step(action) for one, action in zip(self.simulators, actions, strict=True)])

    def frames(self, size: int) -> np.ndarray:
        return np.stack([letterbox(one.frame(), size) for one in self.simulators])

    def save(self) -> list[bytes | None]:
        return [one.save() for one in self.simulators]

    def load(self, states: Sequence[bytes]) -> None:
        for one, state in zip(self.simulators, states, strict=True):
            one.load(state)

    def close(self) -> None:
        for one in self.simulators:
            one.close()


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class _RemoteGroup:
    """A `_Group` in a process of its own."""

    def __init__(self, make: Callable[[], Simulator], count: int, name: str):
        # Not "fork", which would copy threads, locks and GPU contexts. The fork server imports this module and the
        # simulator's, which takes seconds, once for all workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, _module_of(make)])
        self._name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, cloudpickle.dumps(make), count), daemon=True)
        self._process.start()
        theirs.close()

    def submit(self, method: str, *args: Any) -> None:
        try:
            self._pipe.send((method, args))
        except OSError as error:
            raise self._dead() from error

    def collect(self) -> Any:
        try:
            result = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._dead() from error
        if isinstance(result, UserError):
            raise result
        return result

    def close(self) -> None:
        # The worker leaves its loop when the pipe closes; a simulator that hangs is not waited for.
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _dead(self) -> UserError:
        self._process.join(timeout=5)
        return UserError(
            f"{self._name}: a worker process ended (exit code {self._process.exitcode}); what it printed is above. "
            "Negative codes are signals: -9 is often a lack of memory, -11 a crash inside the simulator"
        )


def _module_of(make: Callable[[], Simulator]) -> str:
    """Where a simulator's class or function is defined; the fork server does not import the main script."""
    while isinstance(make, partial):
        make = make.func
    module = getattr(make, "__module__", "__main__")
    return __name__ if module == "__main__" else module


def _serve(pipe: Any, pickled_make: bytes, count: int) -> None:
    """The worker process: answer calls until the main process closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too; the main process decides
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            group = _Group(cloudpickle.loads(pickled_make), count)
        except UserError as error:
            pipe.send(error)
            return
        pipe.send(group.collect())
        while True:
            method, args = pipe.recv()
            try:
                group.submit(method, *args)
                pipe.send(group.collect())
            except UserError as error:
                pipe.send(error)
    group.close()


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
    Raises:
        UserError: a simulator raised it, or a worker process ended.
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
    ):
        super().__init__(num_envs, seed, device, held_out)
        workers = min(workers, num_envs)
        self._shares = np.array_split(np.arange(num_envs), workers)  # the rows of each group
        self._groups: list[_Group | _RemoteGroup] = []
        start = _Group if workers == 1 else partial(_RemoteGroup, name=name)
        try:
            for share in self._shares:
                self._groups.append(start(make, len(share)))
            facts: list[_Facts] = self._collect(range(workers))
            self.is_closed = False
        except UserError:
            self.close()
            raise
        self._make_specs(facts[0].layout)
        self.resumes_exactly = all(fact.saves for fact in facts)

    def _start_episodes(self, rows: np.ndarray, states: np.ndarray) -> dict[str, Tensor]:
        busy = []
        for group, share in enumerate(self._shares):
            mine = (rows >= share[0]) & (rows <= share[-1])
            if mine.any():
                self._groups[group].submit("reset", (rows[mine] - share[0]).tolist(), states[mine].tolist())
                busy.append(group)
        return _join(self._collect(busy))

    def _advance(self, action: Tensor) -> dict[str, Tensor]:
        actions = action.to("cpu", torch.float32).numpy()
        return _join(self._ask("step", [(actions[share],) for share in self._shares]))

    def _frames(self, size: int) -> np.ndarray:
        return np.concatenate(self._ask("frames", [(size,)] * len(self._groups)))

    def _ask(self, method: str, arguments: Sequence[tuple]) -> list:
        """Call a method of every group, at the same time where they are in processes of their own."""
        for group, args in zip(self._groups, arguments, strict=True):
            group.submit(method, *args)
        return self._collect(range(len(self._groups)))

    def _collect(self, groups: Sequence[int]) -> list:
        """The groups' results. Every reply is read, so that an error leaves none behind."""
        results, errors = [], []
        for group in groups:
            try:
                results.append(self._groups[group].collect())
            except UserError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results

    def state_dict(self, *args, **kwargs) -> dict:
        """The stream's seed and place, and, if `resumes_exactly` and an episode has begun, the simulators' states."""
        state = super().state_dict()
        if self.resumes_exactly and self._current is not None:
            saved = [one for group in self._ask("save", [()] * len(self._groups)) for one in group]
            # As tensors: checkpoints hold tensors and plain values, so that reading one never runs code.
            state["simulators"] = [torch.from_numpy(np.frombuffer(one, np.uint8).copy()) for one in saved]
            state["current"] = {key: value.clone() for key, value in self._current.items()}
        return state

    def load_state_dict(self, state_dict: dict, *args, **kwargs) -> None:
        """Continue where `state_dict` was taken; reset afterwards if it holds no simulators."""
        super().load_state_dict(state_dict)
        if "simulators" in state_dict:
            saved = [one.cpu().numpy().tobytes() for one in state_dict["simulators"]]
            self._ask("load", [([saved[row] for row in share],) for share in self._shares])
            self._current = {key: value.to("cpu", copy=True) for key, value in state_dict["current"].items()}

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the simulators and end their worker processes; closing twice does nothing."""
        groups, self._groups = self._groups, []
        for group in groups:
            group.close()
        super().close(raise_if_closed=raise_if_closed)


def _join(results: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """The groups' arrays one after the other along the batch, as tensors."""
    if len(results) == 1:
        return {key: torch.from_numpy(array) for key, array in results[0].items()}
    return {key: torch.from_numpy(np.concatenate([result[key] for result in results])) for key in results[0]}
