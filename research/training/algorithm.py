"""The seam between a training script and what it trains with: collection, algorithm, and how far a run has come.

rollout = rollouts.next()                       # [N, T]: collects, and nothing else
batch, metrics = algorithm.prepare(rollout)     # flat: advantages (GAE, V-trace, groups of episodes)
metrics |= algorithm.update(batch, progress)    # gradient steps; schedules and warm-up are the algorithm's own
rollouts.publish()                              # whoever collects may take the new weights
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from research.schema import ENV_STEPS


@dataclass
class Progress:
    """How far a run has come; saved and restored as one thing.

    Attributes:
        iterations: of the whole run, unless `max_env_steps` is given.
        iteration: rollouts taken and learned from.
        env_steps: control steps taken, over all environments: `global_step`.
        before: metrics of the evaluation before training, if there was one.
        best: the best evaluation's score so far.
        last_steps: env steps of the last iteration.
        max_env_steps: the run ends with the iteration that reaches them.
    """

    iterations: int
    iteration: int = 0
    env_steps: int = 0
    before: dict[str, float] | None = None
    best: float = -math.inf
    last_steps: int = 0
    max_env_steps: int | None = None

    @property
    def fraction(self) -> float:
        """How much of the run is done, from 0; 1 and more when it is over."""
        if self.max_env_steps is not None:
            return self.env_steps / self.max_env_steps
        return self.iteration / self.iterations

    @property
    def finished(self) -> bool:
        return self.fraction >= 1

    def advance(self, env_steps: int) -> None:
        """Note an iteration that took so many env steps."""
        self.iteration, self.env_steps, self.last_steps = self.iteration + 1, self.env_steps + env_steps, env_steps

    def crossed(self, every: int) -> bool:
        """Whether the last iteration stepped over a multiple of `every` env steps; 0 is never."""
        return every > 0 and (self.env_steps - self.last_steps) // every != self.env_steps // every

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration, "global_step": self.env_steps, "before": self.before, "best": self.best,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration, self.env_steps = state["iteration"], state["global_step"]
        self.before, self.best = state["before"], state["best"]


def env_steps_in(rollout: TensorDictBase) -> int:
    """Control steps that the decisions of a rollout took: as many, where actions are not chunks."""
    taken = rollout["next"].get(ENV_STEPS, None)
    return rollout.numel() if taken is None else int(taken.sum())


def another_seed(seed: int, env_steps: int) -> int:
    """The seed of what cannot go on where it was after so many env steps: with the old one it would begin again."""
    return int(np.random.SeedSequence((seed, env_steps)).generate_state(1)[0])


class Acting(Protocol):
    """The module that acts; `agents.policy.Act` is one."""

    in_keys: list
    out_keys: list

    def __call__(self, step: TensorDictBase) -> TensorDictBase:
        """Write action, log-probability and value beside the observations of a step `[N]`."""

    def go_on(self, step: TensorDictBase) -> TensorDictBase:
        """The same, where `step` also holds what `Policy.look_ahead` made of its observations."""


class Policy(Protocol):
    """What collection and the update need of a policy; `agents.policy.VLAPolicy` is one."""

    act: Acting
    actor: TensorDictModuleBase
    critic: TensorDictModuleBase
    kept_keys: list
    interface: str
    score_is_exact: bool

    def values(self, steps: TensorDictBase) -> Tensor:
        """State values `[B, 1]` of the observations in `steps` `[B]`."""

    def look_ahead(self, steps: TensorDictBase) -> tuple[Tensor, TensorDictBase | None]:
        """As `values`, for observations that will be acted upon next, and what `act.go_on` can go on from then."""


class Collection(Protocol):
    """Where rollouts come from: `rollout.Rollouts` or `asynchronous.AsynchronousRollouts`.

    Attributes:
        env_steps: control steps that the last one took, those that were thrown away or left out among them.
    """

    env_steps: int

    def next(self) -> TensorDictBase:
        """A rollout `[N, T]`."""

    def metrics(self) -> dict[str, float]:
        """Of what was collected since this was last asked: `rollout/*`."""

    def publish(self) -> None:
        """Say that the weights have changed."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any] | None, env_steps: int) -> bool:
        """Go on from there, after so many env steps; False where episodes have to start anew, as without a state.

        Without a state they start from other initial states than at the start of the run.
        """

    def shutdown(self) -> None:
        """Close environments and end processes."""


class Algorithm(Protocol):
    """What learns from rollouts: `ppo.PPO`."""

    def prepare(self, rollout: TensorDictBase) -> tuple[TensorDictBase, dict[str, float]]:
        """The flat batch that the update reads, `[B]`, and metrics of how it was made."""

    def update(self, batch: TensorDictBase, progress: Progress) -> dict[str, float]:
        """Gradient steps on a batch; returns `train/*` metrics, means over the steps."""

    def whole(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Entries of the model's `state_dict`, put together where processes divide them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
