"""Work that need not be done twice: which stages' outputs never change, and encoders that run once per instruction.

`split_constant` divides a model's stages into those whose outputs depend on observations and frozen weights alone, and
the rest. What the first write is kept in the rollout and never computed again in the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from agents.stages import is_opaque, is_random, module_of, run_stage, trains
from research.schema import OBSERVATION


def split_constant(
    stages: Sequence[TensorDictModuleBase],
) -> tuple[list[TensorDictModuleBase], list[TensorDictModuleBase]]:
    """Split stages into those whose outputs depend on frozen parameters only, and the rest.

    A stage is in the first list if none of its own parameters is trainable, it is not random, and everything it reads
    is an observation or comes from such a stage. (A frozen stage behind a trainable one is not: its inputs change with
    every update. Behind a random one its inputs change with every look.)
    """
    constant, frozen, rest = set(), [], []
    for stage in stages:
        if _reads_constants_alone(stage, constant) and not trains(stage) and not is_random(stage):
            constant.update(stage.out_keys)
            frozen.append(stage)
        else:
            rest.append(stage)
    return frozen, rest


def blocked_stages(stages: Sequence[TensorDictModuleBase]) -> list[tuple[TensorDictModuleBase, str]]:
    """Stages that would be reused but for something that a user may not expect, and what it is."""
    frozen, rest = split_constant(stages)
    constant = {key for stage in frozen for key in stage.out_keys}
    blocked = []
    for stage in rest:
        if is_opaque(stage):
            blocked.append((stage, "it is a function, which may use any weights; make it an nn.Module"))
        if trains(stage) or not any(True for _ in stage.parameters()):
            continue
        changing = [k for k in stage.in_keys if not _is_constant(k, constant)]
        behind = ", ".join(k if isinstance(k, str) else ".".join(k) for k in changing)
        blocked.append((stage, f"it reads {behind}, which changes" if behind else "it is random, as dropout is"))
    return blocked


def _reads_constants_alone(stage: TensorDictModuleBase, constant: set) -> bool:
    return all(_is_constant(key, constant) for key in stage.in_keys)


def _is_constant(key, constant: set) -> bool:
    return key in constant or key[0] == OBSERVATION


class OncePerInstruction(TensorDictModuleBase):
    """A frozen stage that reads the instruction alone, run once for each distinct one and looked up from then on.

    Each instruction is encoded by itself, so that its features do not depend on what else was in the batch. Loading
    other weights empties the table. Looking up is done on the device, which is waited for once.

    Args:
        stage: the frozen stage; writes tensors `[B, ...]`.
        capacity: distinct instructions kept; a full table starts anew. A batch with more of them, or with two whose
            hashes are equal, goes through the stage as it is.
    """

    def __init__(self, stage: TensorDictModuleBase, capacity: int = 8192):
        super().__init__()
        self.stage, self.capacity = stage, capacity
        self.in_keys, self.out_keys = stage.in_keys, stage.out_keys
        self._weights_version = None
        self._forget()

    def _forget(self) -> None:
        self._texts: Tensor | None = None  # [K, L], in the order in which they came
        self._features: list[Tensor] = []  # [capacity, ...], the first K of them filled, in the same order
        self._hashes: Tensor | None = None  # [K], sorted
        self._entries: Tensor | None = None  # [K], which text each of them is of

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        tokens = tensordict.get(self.in_keys[0])
        version = sum(p._version for p in module_of(self.stage).parameters())
        if version != self._weights_version:
            self._forget()
            self._weights_version = version
        entries = self._find(tokens)
        if entries is None:
            self._learn(tokens)
            entries = self._find(tokens)
        if entries is None:
            return run_stage(self.stage, tensordict)
        features = [table.index_select(0, entries) for table in self._features]
        return tensordict.update(dict(zip(self.out_keys, features, strict=True)))

    def _find(self, tokens: Tensor) -> Tensor | None:
        """The entry of each row, `[B]`; None unless the table has them all."""
        if self._texts is None:
            return None
        place = torch.searchsorted(self._hashes, text_hashes(tokens)).clamp_(max=len(self._hashes) - 1)
        entries = self._entries[place]
        return entries if torch.equal(self._texts[entries], tokens) else None

    def _learn(self, tokens: Tensor) -> None:
        """Add the rows that the table lacks, if it can hold them."""
        texts = tokens[distinct_rows(tokens)[0]]
        if self._texts is not None:
            new = texts[~torch.isin(text_hashes(texts), self._hashes)]
            if len(self._texts) + len(new) > self.capacity or self._texts.shape[1] != tokens.shape[1]:
                self._forget()
        new = texts if self._texts is None else new
        if len(new) > self.capacity:
            return
        known = 0 if self._texts is None else len(self._texts)
        for i, text in enumerate(new, known):
            alone = run_stage(self.stage, TensorDict({self.in_keys[0]: text[None]}, batch_size=[1]))
            encoded = [alone.get(key) for key in self.out_keys]
            if not self._features:
                self._features = [e.new_empty(self.capacity, *e.shape[1:]) for e in encoded]
            for table, e in zip(self._features, encoded, strict=True):
                table[i] = e[0]
        self._texts = new if self._texts is None else torch.cat([self._texts, new])
        self._hashes, self._entries = text_hashes(self._texts).sort()


class DistinctInstructions(TensorDictModuleBase):
    """A trainable stage that reads the instruction alone, run once for each distinct one of a batch.

    A minibatch of thousands of transitions comes from some hundred episodes, and an episode has one instruction. Each
    row gets the features of its instruction, and the gradients of rows that share one add up there: what every row
    computed for itself would give, but for the order of the sum.

    Args:
        stage: writes tensors `[B, ...]`, each row from that row's instruction alone.
    """

    def __init__(self, stage: TensorDictModuleBase):
        super().__init__()
        self.stage, self.in_keys, self.out_keys = stage, stage.in_keys, stage.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        tokens = tensordict.get(self.in_keys[0])  # [B, L]
        rows, which = distinct_rows(tokens)
        if 2 * len(rows) > len(tokens):  # then looking up costs more than it saves
            return run_stage(self.stage, tensordict)
        few = run_stage(self.stage, TensorDict({self.in_keys[0]: tokens[rows]}, batch_size=[len(rows)]))
        return tensordict.update({key: few.get(key).index_select(0, which) for key in self.out_keys})


def text_hashes(tokens: Tensor) -> Tensor:
    """A 64-bit hash of every row of int64 `[B, L]`: `[B]`."""
    return (tokens * _hash_weights(tokens.shape[1], tokens.device)).sum(dim=1)  # integers wrap around


@lru_cache
def _hash_weights(length: int, device: torch.device) -> Tensor:
    """Odd numbers `[L]`, the same ones in every process."""
    weights = torch.randint(-(2**63), 2**63 - 1, (length,), generator=torch.Generator().manual_seed(0))
    return (weights | 1).to(device)


def distinct_rows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of int64 `[B, L]`: one row number per distinct row, `[U]`, and for each row which of those it equals, `[B]`.

    By a 64-bit hash, since sorting whole rows takes longer than many encoders; should two texts ever collide, all rows
    count as distinct.
    """
    b = len(tokens)
    everything = torch.arange(b, device=tokens.device)
    _, which = torch.unique(text_hashes(tokens), return_inverse=True)
    count = int(which.max()) + 1 if b else 0
    rows = torch.full((count,), b, device=tokens.device).scatter_reduce_(0, which, everything, "amin")
    return (rows, which) if torch.equal(tokens[rows[which]], tokens) else (everything, everything)
