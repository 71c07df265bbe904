"""Stepping an environment, whole or in parts by turns: while simulators step one part, the policy acts on another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from research.schema import ACTION


class Turns:
    """An environment that is sent actions, and then asked for what they led to, part by part.

    An environment has parts where its simulators run in other processes (`envs.vector.VectorEnv`); any other has one,
    all of its rows, and is stepped when it is asked. Actions of several parts may be on their way at the same time.

    Attributes:
        parts: the rows of each part, slices that follow one another.

    Args:
        env: batch `[N]`.
    """

    def __init__(self, env: EnvBase):
        self.env = env
        self.parts: list[slice] = env.parts if hasattr(env, "send") else [slice(0, env.batch_size[0])]
        self._acted: list[TensorDictBase | None] = [None] * len(self.parts)

    def play(
        self, start: TensorDictBase, act: Callable[[slice, TensorDictBase], TensorDictBase], decisions: int
    ) -> Iterator[tuple[int, slice, TensorDictBase]]:
        """Let a policy take so many decisions in every row.

        Args:
            start: where the rows are, `[N]`.
            act: given a part, and where its rows are, `[n]`: the same with their action.
            decisions: T.
        Returns:
            which decision, of which part, and the step `[n]`, with what it led to under "next". When all have been
            taken, `now` is where the rows go on from, `[N]`.
        """
        now = {part.start: start[part] if len(self.parts) > 1 else start for part in self.parts}
        for index, part in enumerate(self.parts):
            self._send(index, act(part, now[part.start]))
        for t in range(decisions):
            for index, part in enumerate(self.parts):
                step, now[part.start] = self._receive(index)
                yield t, part, step
                if t + 1 < decisions:
                    self._send(index, act(part, now[part.start]))
        self.now = torch.cat(list(now.values())) if len(self.parts) > 1 else now[0]

    def _send(self, part: int, acted: TensorDictBase) -> None:
        self._acted[part] = acted
        if len(self.parts) > 1:
            self.env.send(part, acted.get(ACTION))

    def _receive(self, part: int) -> tuple[TensorDictBase, TensorDictBase]:
        if len(self.parts) == 1:
            return self.env.step_and_maybe_reset(self._acted[part])
        after, following = self.env.receive(part)
        return self._acted[part].set("next", after), following
