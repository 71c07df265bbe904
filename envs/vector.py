"""N simulators as one TorchRL environment, stepped in this process or in several.

`VectorEnv` takes any `envs.simulator.Simulator`, made where it is stepped by a function that can be pickled.

Why not TorchRL's `SerialEnv` or `ParallelEnv`: stepping a list of worlds and building one TensorDict for all of them
was measured 2 to 3 times faster, `ParallelEnv` keeps a core busy polling, and what is raised in one of its workers does
not reach the main process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from envs.demonstrating import UNDISTURBED, Disturbance
from envs.groups import STEP_S, Facts, Group, RemoteGroup, close_all
from envs.initial_states import InitialStateEnv
from envs.simulator import HELD_OUT_STATES, Simulator
from research.errors import SimulatorFailed, UserError
from research.schema import ACTION, INITIAL_STATE, Demonstration


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
        workers: processes among which the simulators are divided (at most N); 0 steps them in this process. With
            processes of their own, simulators are stepped in two halves by turns, see `send`.
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
        workers: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        name: str = "the environment",
        held_out: int = HELD_OUT_STATES,
        chunk: int = 1,
        worker_timeout: float = STEP_S,
    ):
        super().__init__(num_envs, seed, device, held_out, chunk)
        self.make_simulator, self.name, self._filmed, self._in_flight = make, name, 0, [False]
        workers = min(workers, num_envs)
        halves = 2 if workers and num_envs >= 2 * workers else 1
        parts = np.array_split(np.arange(num_envs), halves)
        self.parts = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
        self._in_flight, self._arrived = [False] * halves, [None] * halves
        # The rows of each group, some of either half; and where each row is.
        chunks = [np.array_split(part, max(1, workers)) for part in parts]
        self._shares = [np.concatenate([chunk[group] for chunk in chunks]) for group in range(max(1, workers))]
        self._group, self._place = np.empty((2, num_envs), dtype=np.int64)
        for group, share in enumerate(self._shares):
            self._group[share], self._place[share] = group, np.arange(len(share))
        self._groups: list[Group | RemoteGroup] = []
        try:
            for share in self._shares:
                remote = (make, share, name, worker_timeout)
                self._groups.append(RemoteGroup(*remote) if workers else Group(make, num_envs, name))
            facts: list[Facts] = [group.collect() for group in self._groups]
            self.is_closed = False
        except BaseException:  # also Ctrl-C, while scenes load
            self.close()
            raise
        self._make_specs(facts[0].layout)
        self.resumes_exactly = all(fact.saves for fact in facts)

    # ---------------------------------------------------------------- all rows at once

    def _start_episodes(self, rows: np.ndarray, states: np.ndarray) -> dict[str, Tensor]:
        mine = self._divided(rows)
        calls = {group: (self._place[rows[at]].tolist(), states[at].tolist()) for group, at in mine.items()}
        return _joined(self._ask("reset", calls), list(mine.values()))

    def _advance(self, action: Tensor) -> dict[str, Tensor]:
        actions = action.to("cpu", torch.float32).numpy()
        calls = {group: (actions[share],) for group, share in enumerate(self._shares)}
        return _joined(self._ask("step", calls), self._shares)

    def _frames(self, size: int) -> np.ndarray:
        frames = [{"frames": frames} for frames in self._ask("frames", self._all(size))]
        return _joined(frames, self._shares)["frames"].numpy()

    def _divided(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Which of these rows each group has: group -> their positions in `rows`."""
        groups = self._group[rows]
        return {int(group): (groups == group).nonzero()[0] for group in np.unique(groups)}

    # ---------------------------------------------------------------- part by part

    def send(self, part: int, action: Tensor) -> None:
        """Let the rows of a part take a decision, and start those whose episode it ends; `receive` tells the outcome.

        Args:
            part: index into `parts`, which lists the rows of each. Other parts may be on their way.
            action: of these rows, `[n, A]` or `[n, H, A]`.
        """
        rows = np.arange(self.batch_size[0])[self.parts[part]]
        actions, upcoming = action.detach().to("cpu", torch.float32).numpy(), self._upcoming_states(rows)
        divided = self._divided(rows).items()
        calls = {g: (self._place[rows[at]].tolist(), actions[at], upcoming[at].tolist()) for g, at in divided}
        with self._closed_by_failure():
            for group, args in calls.items():
                self._groups[group].submit("turn", *args)
        self._in_flight[part] = True

    def receive(self, part: int) -> tuple[TensorDictBase, TensorDictBase]:
        """Wait for what `send` began.

        Returns:
            what the step led to, as under "next" after `step`; and where the rows go on from, as after a `reset` of
            those whose episode has ended. Batch `[n]` both.
        """
        rows = np.arange(self.batch_size[0])[self.parts[part]]
        mine = self._divided(rows)
        with self._closed_by_failure():
            turns = [self._groups[group].collect() for group in mine]
        self._in_flight[part] = False
        places = list(mine.values())
        after = _joined([step for step, _ in turns], places)
        before = self._now(part)
        after[INITIAL_STATE] = before[INITIAL_STATE].clone()
        after["done"] = after["terminated"] | after["truncated"]
        now = {key: after[key] for key in before}
        ended = after["done"][:, 0].numpy().nonzero()[0]
        if len(ended):
            began = [(at[after["done"][at, 0].numpy()], new) for at, (_, new) in zip(places, turns, strict=True)]
            now = {key: value.clone() for key, value in now.items()}
            now[INITIAL_STATE][ended, 0] = torch.from_numpy(self._draw_training_states(rows[ended]))
            for at, new in began:
                for key, value in new.items():
                    now[key][torch.from_numpy(at)] = torch.from_numpy(value)
        self._arrived[part] = now
        return self._pack(after), self._pack(now | self._nothing_yet(len(rows)))

    def _settle(self) -> None:
        """Bring together what the parts have shown, before all rows are asked for something."""
        for part, away in enumerate(self._in_flight):
            if away:
                self.receive(part)
        if any(arrived is not None for arrived in self._arrived):
            whole = [self._now(part) for part in range(len(self.parts))]
            self._current = {key: torch.cat([one[key] for one in whole]) for key in whole[0]}
            self._arrived = [None] * len(self.parts)

    def _now(self, part: int) -> dict[str, Tensor]:
        """What the rows of a part showed last."""
        return self._arrived[part] or {key: value[self.parts[part]] for key, value in self._current.items()}

    # ---------------------------------------------------------------- video, experts

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
        shots = self._ask("frames_between", self._all())
        return [torch.from_numpy(shots[self._group[row]][self._place[row]]) for row in range(self._filmed)]

    def expert_action(self) -> Tensor:
        """What an expert who sees the whole state would do now, float32 `[N, A]`.

        Raises:
            UserError: there is none.
        """
        self._need_expert()
        actions = [{ACTION: actions} for actions in self._ask("expert_actions", self._all())]
        return _joined(actions, self._shares)[ACTION].to(self.device)

    def demonstrate(
        self,
        states: Sequence[int],
        every: int = 1,
        disturbance: Disturbance = UNDISTURBED,
        seed: int = 0,
        on_end: Callable[[int], None] = lambda count: None,
    ) -> list[Demonstration]:
        """Let the experts play an episode from each initial state; reset afterwards.

        An episode is one call of a worker process, so `worker_timeout` holds for each.

        Args:
            states: ids.
            every, disturbance, seed: see `envs.demonstrating.demonstrate`.
            on_end: called with the number of episodes played, after each.
        Returns:
            in the order of `states`, the same for any number of processes.
        Raises:
            UserError: there is no expert.
        """
        self._need_expert()
        self._settle()
        self._current = None
        played: list[Demonstration] = []
        count = len(self._groups)
        with self._closed_by_failure():
            for upcoming in range(len(states) + count):  # a group's next episode begins where its last has ended
                if upcoming >= count and len(played) < len(states):
                    played.append(self._groups[upcoming % count].collect())
                    on_end(len(played))
                if upcoming < len(states):
                    args = int(states[upcoming]), every, disturbance, seed
                    self._groups[upcoming % count].submit("demonstrate", *args)
        return played

    def _need_expert(self) -> None:
        if not self.has_expert:
            raise UserError(f"{self.name} has no expert")

    def _all(self, *args: Any) -> dict[int, tuple]:
        """The same arguments for every group."""
        return dict.fromkeys(range(len(self._shares)), args)

    def _ask(self, method: str, calls: Mapping[int, tuple]) -> list:
        """Call a method of groups, group -> arguments, at the same time where they are in processes of their own.

        After a failure the environment is closed: the replies of other groups lie unread.
        """
        self._settle()
        with self._closed_by_failure():
            for group, args in calls.items():
                self._groups[group].submit(method, *args)
            return [self._groups[group].collect() for group in calls]

    @contextmanager
    def _closed_by_failure(self) -> Iterator[None]:
        if not self._groups:
            raise SimulatorFailed(f"{self.name}: the environment is closed")
        try:
            yield
        except SimulatorFailed:
            self.close()
            raise

    def state_dict(self, *args, **kwargs) -> dict:
        """The stream's seed and place, and, if `resumes_exactly` and an episode has begun, the simulators' states.

        `resumes_exactly` is False from the time on when a simulator turns out to hold what it cannot save.
        """
        state = super().state_dict()
        if self.resumes_exactly and self._current is not None:
            groups = self._ask("save", self._all())
            saved = [groups[group][place] for group, place in zip(self._group, self._place, strict=True)]
            if any(one is None for one in saved):  # a simulator has got what it cannot save
                self.resumes_exactly = False
                return state
            # As tensors: checkpoints hold tensors and plain values, so that reading one never runs code.
            state["simulators"] = [torch.from_numpy(np.frombuffer(one, np.uint8).copy()) for one in saved]
            state["current"] = {key: value.clone() for key, value in self._current.items()}
        return state

    def load_state_dict(self, state_dict: dict, *args, **kwargs) -> None:
        """Continue where `state_dict` was taken; reset afterwards if it holds no simulators."""
        self._settle()
        super().load_state_dict(state_dict)
        if "simulators" in state_dict:
            saved = [one.cpu().numpy().tobytes() for one in state_dict["simulators"]]
            self._ask("load", {group: ([saved[row] for row in share],) for group, share in enumerate(self._shares)})
            self._current = {key: value.to("cpu", copy=True) for key, value in state_dict["current"].items()}

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the simulators and end their worker processes; closing twice does nothing."""
        groups, self._groups = self._groups, []
        self._in_flight = [False] * len(self._in_flight)
        close_all(groups)
        super().close(raise_if_closed=raise_if_closed)


def _joined(results: Sequence[Mapping[str, np.ndarray]], places: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """The groups' arrays as tensors, each row in its place."""
    if len(results) == 1:
        return {key: torch.from_numpy(array) for key, array in results[0].items()}
    count = sum(map(len, places))
    joined = {key: np.empty((count, *array.shape[1:]), array.dtype) for key, array in results[0].items()}
    for result, place in zip(results, places, strict=True):
        for key, array in result.items():
            joined[key][place] = array
    return {key: torch.from_numpy(array) for key, array in joined.items()}
