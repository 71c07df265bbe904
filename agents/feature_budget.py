"""Which frozen stages' outputs a rollout keeps where there is no room for all: those that save the most per byte.

Keeping a stage's outputs spares the update its FLOPs, and those of the stages before it that nothing else reads.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase

from agents.flop_counter import FlopCounter
from agents.stages import Precision, reads_instruction, run_stage
from research.schema import OBSERVATION


@dataclass
class FeatureBudget:
    """Room for the kept outputs of frozen stages.

    Attributes:
        bytes_per_transition: how much of it there is.
        observations: a few, `[B]`, on which the stages are measured.
    """

    bytes_per_transition: float
    observations: TensorDictBase

    def recomputed(
        self,
        constant: Sequence[TensorDictModuleBase],
        others: Sequence[TensorDictModuleBase],
        context_keys: Sequence[Hashable],
        precision: Precision,
    ) -> dict[int, str]:
        """The stages that run in the update though they are frozen, in order, by their numbers; and why.

        One that reads the instruction alone is among them without a reason: what it does there is look it up.

        Args:
            constant: the stages whose outputs never change, in order.
            others: the other stages, which may read what those write, as the model does what `context_keys` name.
            context_keys: see `agents.vla.DecidingVLA`.
            precision: in which the stages run.
        """
        read = {*(key for stage in others for key in stage.in_keys), *context_keys}
        costs = measure(constant, self.observations, precision)
        kept = best_kept(costs, read, self.bytes_per_transition)
        return {
            i: f"its {costs[i].bytes:,.0f} bytes per transition have no room in policy.feature_memory"
            if costs[i].flops
            else ""
            for i in needed(costs, kept, read)
        }


@dataclass(frozen=True)
class StageCost:
    """What a stage reads and writes, and per transition the bytes of that and the FLOPs of a pass."""

    reads: tuple[Hashable, ...]
    writes: tuple[Hashable, ...]
    bytes: float
    flops: float


@torch.no_grad()
def measure(
    stages: Sequence[TensorDictModuleBase], observations: TensorDictBase, precision: Precision
) -> list[StageCost]:
    """The cost of each stage. One that reads the instruction alone costs nothing: it is looked up in the update too."""
    b = observations.batch_size[0]
    step, costs = TensorDict({OBSERVATION: observations}, batch_size=[b]), []
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(), precision():
        for stage in stages:
            with FlopCounter() as counter:
                step = run_stage(stage, step)
            written = sum(step.get(key).numel() * step.get(key).element_size() for key in stage.out_keys)
            flops = 0 if reads_instruction(stage) else counter.get_total_flops()
            costs.append(StageCost(tuple(stage.in_keys), tuple(stage.out_keys), written / b, flops / b))
    return costs


def needed(costs: Sequence[StageCost], kept: set[int], read: set[Hashable]) -> list[int]:
    """Numbers of the stages that have to run where the outputs of the `kept` ones are there, for the keys to `read`."""
    wanted, running = set(read), []
    for i in reversed(range(len(costs))):
        if i not in kept and wanted & {*costs[i].writes}:
            running.insert(0, i)
            wanted |= {*costs[i].reads}
    return running


def best_kept(costs: Sequence[StageCost], read: set[Hashable], room: float) -> set[int]:
    """Numbers of the stages to keep: one after the other, the one that saves the most FLOPs per byte that it adds.

    A stage that makes another's outputs superfluous adds its bytes less the other's.
    """
    kept: set[int] = set()
    now = _totals(costs, kept, read)
    while True:
        best, best_rate = None, 0.0
        for i in {*range(len(costs))} - kept:
            flops, size = _totals(costs, kept | {i}, read)
            if size > room or flops >= now[0]:
                continue
            added = size - now[1]
            rate = (now[0] - flops) / added if added > 0 else math.inf
            if rate > best_rate:
                best, best_rate = i, rate
        if best is None:
            return {i for i in kept if _totals(costs, kept - {i}, read) != now}  # without those that became superfluous
        kept.add(best)
        now = _totals(costs, kept, read)


def _totals(costs: Sequence[StageCost], kept: set[int], read: set[Hashable]) -> tuple[float, float]:
    """FLOPs of what has to run in the update, and bytes of the kept outputs that are read there."""
    running = needed(costs, kept, read)
    wanted = read.union(*(costs[i].reads for i in running)) if running else read
    stored = [costs[i].bytes for i in kept if wanted & {*costs[i].writes}]
    return sum(costs[i].flops for i in running), sum(stored)
