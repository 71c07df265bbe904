"""What an environment of this project is: the written contracts of one simulated world, and of a batch of them.

A `Simulator` is ONE world in NumPy, which knows no torch and no worker process; `envs.vector.VectorEnv` makes N of them
one TorchRL environment. What runs many worlds at once by itself (`envs.tabletop`, `envs.gym_vector`) is a TorchRL
environment directly. Both keep to `Environment`, which is all that training, evaluation and imitation rely on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import torch
    from tensordict import TensorDictBase

    from research.action_map import ActionMap

# Ids of initial states below this are never drawn in training: they are kept for evaluation, and for demonstrations.
HELD_OUT_STATES = 10_000


class Layout(NamedTuple):
    """What a simulator observes and takes; the same before its first reset as ever after."""

    observation: dict[str, tuple[tuple[int, ...], np.dtype]]
    """Observation key -> shape without a batch, and dtype: as in research.schema (`rgb` is ((H, W, 3), uint8))."""
    action_dim: int
    """A, the number of action components."""
    bounded: bool
    """Whether every action component lies in [-1, 1]; else the simulator's own, unbounded scale."""
    has_success: bool
    """Whether each step reports `success`."""
    films: bool
    """Whether `frame` can be asked for pictures."""
    action_choices: tuple[int, ...] | None = None
    """Where actions are choices: component i is one of this many, a whole number from 0; None: it is continuous."""
    task_names: tuple[str, ...] = ()
    """Where there are several tasks, or one with a name: the task of an id is `task_names[id % len(task_names)]`."""
    has_expert: bool = False
    """Whether `expert_action` can be asked for what an expert would do."""
    action_map: ActionMap | None = None
    """What the simulator makes of an action; None: it takes it as it is, and clips it if actions are bounded."""


class Simulator(Protocol):
    """One world in NumPy, made in the process that steps it.

    A constructor that refuses its options raises `research.errors.UserError`, in one line. Whatever is raised later
    reaches the run as `research.errors.SimulatorFailed` and ends it, with a place to resume from.
    """

    layout: Layout

    def reset(self, state: int) -> None:
        """Start an episode from the initial state of an id.

        Args:
            state: at least 0. The same id is the same state: in every row, process, run and on every machine, whatever
                was done before. Paired evaluation and groups of equal episodes rest on this.
        """

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        """Take one control step, in an episode that has not ended. Nothing is drawn.

        Args:
            action: float32 `[A]`; the simulator clips it, if its actions are bounded, and rounds it to the nearest
                choice, where they are choices.
        Returns:
            `reward` float32 `[1]`, `terminated` bool `[1]` (the task ended the episode), `truncated` bool `[1]` (a time
            limit did; the state has a future) and, where `layout.has_success`, `success` bool `[1]`.
        """

    def observe(self) -> dict[str, np.ndarray]:
        """What a policy sees now; asked once per decision, however many control steps that took.

        Returns:
            exactly the keys, shapes and dtypes of `layout.observation`, no batch dimension. The arrays may be written
            to by the next call of any method; whoever keeps them copies them.
        """

    def frame(self) -> np.ndarray:
        """The world as a person would want to see it now, for videos: uint8 `[H, W, 3]`; asked if `layout.films`."""

    def expert_action(self) -> np.ndarray:
        """What an expert who sees the whole state would do now, float32 `[A]`; asked if `layout.has_expert`."""

    def save(self) -> bytes | None:
        """All that decides this world's future (physics, clock, generators, what success depends on), or None: cannot.

        Also asked before the first reset, to learn whether the world can be saved.
        """

    def load(self, state: bytes) -> None:
        """Continue exactly where `save` was called, in this process or in another."""

    def close(self) -> None:
        """Free what the world holds."""


@runtime_checkable
class Environment(Protocol):
    """What this project needs of a TorchRL environment (a `torchrl.envs.EnvBase`) beyond what TorchRL needs.

    Batch `[N]`, `batch_locked`. Keys of a TensorDict that `reset` or `step` gives:

    | key                         | dtype and shape  | meaning                                                     |
    |-----------------------------|------------------|-------------------------------------------------------------|
    | ("observation", key)        | research.schema  | what a policy sees, each entry with batch `[N]`             |
    | initial_state               | int64 `[N, 1]`   | the id of the state from which the row's episode started    |
    | success                     | bool `[N, 1]`    | optional, then in `observation_spec`: the task is done      |
    | reward                      | float32 `[N, 1]` | of the decision                                             |
    | terminated, truncated, done | bool `[N, 1]`    | the two ends of an episode, kept apart, and either of them  |
    | env_steps                   | int64 `[N, 1]`   | where `chunk` > 1: control steps that the decision took     |
    | success_now                 | bool `[N, 1]`    | where `chunk` > 1: the task is done at the decision's end   |

    A step is one decision of the policy. With `chunk` H > 1 it executes up to H actions, float32 `[N, H, A]`, one after
    the other without a look in between, and fewer in a row whose episode ends: `env_steps` says how many. Its reward is
    the sum of theirs, undiscounted, so that a discount per decision, g, is one of g^(1/H) per control step; `success`
    is success at any of them. The two ends are where they happened, and the observation is the one seen then.

    Without chunks `action` is float32 `[N, A]`. Its numbers are in [-1, 1] if `action_spec` is bounded, or, where
    `action_choices` is not None, whole numbers from 0, component i one of `action_choices[i]`.

    `reset` takes a TensorDict that may hold `initial_state`, int64 `[N, 1]`: row n then starts from the state of that
    id, which is the same state in every row, run and machine; without it, states are drawn from a stream that depends
    on the environment's `seed`. A `_reset` mask, bool `[N, 1]`, names the rows that start; the others go on untouched.
    A row whose episode has ended is reset before it is stepped again: no environment does so by itself.

    Optional, for videos: `film_between(rows, size)` keeps what the first rows look like after each control step but the
    last of every decision from now on, and `frames_between()` gives those of the last decision: for each of these rows
    uint8 `[K, size, size, 3]`, K from 0 to H - 1. Optional: `task_names`, see `Layout`.

    Optional, and needed for imitation alone: `max_steps` (int, at which episodes are truncated), `expert_action()`
    (float32 `[N, A]`, what an expert who sees the state would do now) and `named_places()` (float32 `[N, places, 2]`,
    where the things are that the instruction names, the picture's edges at -1 and 1).
    """

    batch_size: torch.Size
    held_out: int
    """Ids below it are never drawn in training."""
    distinct_states: bool
    """Whether different ids are different states (absent: they are); if not, an evaluation is of one state."""
    action_choices: tuple[int, ...] | None
    """How many choices each component of an action has (absent or None: actions are continuous)."""
    action_map: ActionMap | None
    """What it makes of an action's numbers before the world gets them (absent or None: nothing)."""
    chunk: int
    """H, actions per decision."""
    has_expert: bool
    """Whether there is an expert to imitate, see `expert_action` (absent: there is none)."""
    resumes_exactly: bool
    """Whether `load_state_dict` brings back the very step; else reset after it, and episodes start anew."""

    def reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """See above."""

    def state_dict(self) -> dict:
        """The place in the stream of training states and, if `resumes_exactly`, the worlds: tensors, plain values."""

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on where `state_dict` was taken."""

    def render_frames(self, size: int = 256) -> torch.Tensor | None:
        """For videos: what every row looks like now, uint8 `[N, size, size, 3]`; None if there is nothing to see."""
