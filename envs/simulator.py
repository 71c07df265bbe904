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


class Simulator(Protocol):
    """One world in NumPy, made in the process that steps it.

    A constructor that refuses its options raises `research.schema.UserError`, in one line. Whatever is raised later
    reaches the run as `research.schema.SimulatorFailed` and ends it, with a place to resume from.
    """

    layout: Layout

    def reset(self, state: int) -> dict[str, np.ndarray]:
        """Start an episode from the initial state of an id.

        Args:
            state: at least 0. The same id is the same state: in every row, process, run and on every machine, whatever
                was done before. Paired evaluation and groups of equal episodes rest on this.
        Returns:
            the observation: exactly the keys, shapes and dtypes of `layout.observation`, no batch dimension. The
            arrays may be written to by the next call; whoever keeps them copies them.
        """

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        """Take one control step, in an episode that has not ended.

        Action chunks come later: for an action `[H, A]` a simulator will take up to H control steps, fewer where the
        episode ends, and return the sum of their rewards, `env_steps` int64 `[1]` (how many it took) and the last
        observation, the only one that is drawn.

        Args:
            action: float32 `[A]`; the simulator clips it, if its actions are bounded, and rounds it to the nearest
                choice, where they are choices.
        Returns:
            the observation, as `reset`, and `reward` float32 `[1]`, `terminated` bool `[1]` (the task ended the
            episode), `truncated` bool `[1]` (a time limit did; the state has a future) and, where
            `layout.has_success`, `success` bool `[1]`.
        """

    def frame(self) -> np.ndarray:
        """The world as a person would want to see it now, for videos: uint8 `[H, W, 3]`; asked if `layout.films`."""

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
    | reward                      | float32 `[N, 1]` | of the step                                                 |
    | terminated, truncated, done | bool `[N, 1]`    | the two ends of an episode, kept apart, and either of them  |

    `action` is float32 `[N, A]`: in [-1, 1] if `action_spec` is bounded, or, where `action_choices` is not None, whole
    numbers from 0, component i one of `action_choices[i]`.

    `reset` takes a TensorDict that may hold `initial_state`, int64 `[N, 1]`: row n then starts from the state of that
    id, which is the same state in every row, run and machine; without it, states are drawn from a stream that depends
    on the environment's `seed`. A `_reset` mask, bool `[N, 1]`, names the rows that start; the others go on untouched.
    A row whose episode has ended is reset before it is stepped again: no environment does so by itself.

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
