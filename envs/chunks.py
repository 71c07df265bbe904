"""Action chunks: one decision, several control steps.

A chunk belongs to the environment: what collects, learns and evaluates sees decisions alone, and a simulator single
control steps alone. `execute` is the loop between them, run where the simulator is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from envs.simulator import Simulator
from research.errors import UserError
from research.schema import ENV_STEPS, SUCCESS, SUCCESS_NOW

MAX_CHUNK = 1000


def check_chunk(chunk: int) -> None:
    """Refuse a number of actions per decision that is none.

    Raises:
        UserError: it is no whole number from 1 to `MAX_CHUNK`.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or not 1 <= chunk <= MAX_CHUNK:
        raise UserError(
            f"trainer.env_config.chunk: actions per decision, a whole number from 1 to {MAX_CHUNK:,}, got {chunk!r}"
        )


def execute(
    simulator: Simulator, actions: np.ndarray, between: Callable[[], None] | None = None
) -> dict[str, np.ndarray]:
    """Take one decision: its actions one after the other, until the episode ends.

    Args:
        simulator: in an episode that has not ended.
        actions: float32 `[A]`, or a chunk `[H, A]`.
        between: called after each control step but the last that is taken.
    Returns:
        as `Simulator.step`, and the observation at the end. Of a chunk: the sum of the rewards, success at any of its
        steps, `env_steps` int64 `[1]`, how many were taken, and `success_now` bool `[1]`, success at the last of them.
    """
    if actions.ndim == 1:
        return {**simulator.step(actions), **simulator.observe()}
    reward, success = np.zeros(1, dtype=np.float32), np.zeros(1, dtype=bool)
    for taken, action in enumerate(actions, 1):
        out = simulator.step(action)
        reward += out["reward"]
        if SUCCESS in out:
            success |= out[SUCCESS]
        if out["terminated"][0] or out["truncated"][0]:
            break
        if between is not None and taken < len(actions):
            between()
    if SUCCESS in out:
        out |= {SUCCESS: success, SUCCESS_NOW: out[SUCCESS]}
    return {**out, "reward": reward, ENV_STEPS: np.array([taken], dtype=np.int64), **simulator.observe()}


class BatchedDecision:
    """What a decision of N rows that step together has come to so far; a row whose episode has ended is out of it.

    Args:
        num_envs: N.
        device: where the rows are.
    """

    def __init__(self, num_envs: int, device: torch.device | str):
        self.live = torch.ones(num_envs, 1, dtype=torch.bool, device=device)
        self.reward = torch.zeros(num_envs, 1, device=device)
        self.env_steps = torch.zeros(num_envs, 1, dtype=torch.int64, device=device)
        self.flags: dict[str, Tensor] = {}

    def add(self, step: Mapping[str, Tensor]) -> Tensor:
        """Count a control step, `reward`, `terminated`, `truncated` and any `success`, `[N, 1]` each, of live rows.

        Returns:
            the rows whose episode it ended, bool `[N, 1]`.
        """
        live, nothing = self.live, torch.zeros_like(self.live)
        self.reward = self.reward + torch.where(live, step["reward"], 0.0)
        self.env_steps = self.env_steps + live
        for flag in ("terminated", "truncated", SUCCESS):
            if flag in step:
                self.flags[flag] = self.flags.get(flag, nothing) | (live & step[flag])
        if SUCCESS in step:
            self.flags[SUCCESS_NOW] = torch.where(live, step[SUCCESS], self.flags.get(SUCCESS_NOW, nothing))
        ended = live & (step["terminated"] | step["truncated"])
        self.live = live & ~ended
        return ended

    def result(self) -> dict[str, Tensor]:
        """As `execute`, without the observation; `[N, 1]` each."""
        return {"reward": self.reward, ENV_STEPS: self.env_steps, **self.flags}


def execute_together(
    actions: Tensor,
    step: Callable[[Tensor], Mapping[str, Tensor]],
    observe: Callable[[], Mapping[str, Tensor]],
    restart: Callable[[np.ndarray], None] = lambda rows: None,
) -> dict[str, Tensor]:
    """`execute` for N rows that can only be stepped together.

    Args:
        actions: float32 `[N, H, A]`.
        step: takes `[N, A]`; returns what `BatchedDecision.add` counts.
        observe: what all rows look like after the last step, each entry `[N, ...]`.
        restart: called with the rows, int64 `[M]`, whose episode has ended, before they are stepped with the others:
            where a step of an ended episode is an error, they begin one that is thrown away, and another as it ends.
    Returns:
        as `execute`, each `[N, ...]`; a row is seen as its episode ended, or as the decision did.
    """
    decision: BatchedDecision | None = None
    seen: dict[str, Tensor] = {}
    for taken, action in enumerate(actions.unbind(1), 1):
        counted = step(action)
        if decision is None:
            decision = BatchedDecision(len(actions), counted["reward"].device)
        live = decision.live[:, 0]
        ended = decision.add(counted)[:, 0]
        if ended.any() or taken == actions.shape[1]:
            for key, now in observe().items():
                which = live.view(-1, *[1] * (now.dim() - 1))
                seen[key] = torch.where(which, now, seen[key]) if key in seen else now
        if not decision.live.any():
            break
        over = (counted["terminated"] | counted["truncated"])[:, 0]
        if over.any() and taken < actions.shape[1]:
            restart(over.nonzero()[:, 0].cpu().numpy())
    return {**decision.result(), **seen}
