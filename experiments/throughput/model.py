"""What a run would take on machines that are not here: memory, network, env steps/s and cost, by arithmetic.

    python experiments/throughput/model.py            # the tables of docs/scaling.md

An iteration is four things: simulators step, the policy acts, it is updated, and ranks exchange gradients or weights.
What can run beside each other is stated, and the longest of it binds. Where a number comes from is written beside it:
measured here or on the GPU of RESULTS.md, computed by `--dry_run`, or a data sheet. `check` predicts two processes from
measurements of one; tests/experiments/test_benchmark_throughput.py holds it to 20 %.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from throughput.processes import ENVS, STEP_S, STEPS

GIB = 2**30
MEASURED = Path(__file__).resolve().parents[1] / "results" / "throughput" / "processes.csv"


@dataclass(frozen=True)
class Policy:
    """A VLA as a load on machines.

    Attributes:
        weights, trained: numbers in all, and those that train.
        act_flops: of a decision, whatever is decoded one token after the other aside.
        update_flops: of one transition in one epoch, forward and backward.
        tokens: that are decoded one after the other; each reads all weights once for all environments.
        kept: bytes of a transition in the rollout.
        activations: bytes of one transition in an update.
    """

    name: str
    weights: float
    trained: float
    act_flops: float
    update_flops: float
    tokens: int
    kept: float
    activations: float

    @property
    def bytes_acting(self) -> float:
        """Of the weights: bfloat16 what is frozen, float32 what trains."""
        return 2 * (self.weights - self.trained) + 4 * self.trained

    def bytes_training(self, ranks: int, sharded: bool) -> float:
        """On each rank: weights, and gradients and Adam's two moments in float32; divided, if so chosen."""
        return (self.bytes_acting + 12 * self.trained) / (ranks if sharded else 1)


@dataclass(frozen=True)
class Machine:
    """A machine with GPUs.

    Attributes:
        gpus, flops: of them, and FLOP/s that one reaches on large layers in bfloat16.
        memory, memory_bandwidth: bytes of a GPU, and bytes/s between it and them.
        within, between: bytes/s of a GPU to others of its machine, and of a machine to other machines.
        price: dollars for an hour of one GPU with its share of everything.
    """

    gpus: int = 8
    flops: float = 391e12  # measured: ResNet-50 and GPT-2 medium, one H200, compiled (LOG.md, 26 November 2026)
    memory: float = 139 * GIB  # measured
    memory_bandwidth: float = 4.8e12  # data sheet, H200
    within: float = 450e9  # data sheet, NVLink 4, one direction
    between: float = 50e9  # data sheet, 400 Gb/s
    price: float = 3.5  # of rented ones, autumn 2026, rounded; not measured


@dataclass(frozen=True)
class Job:
    """What a run does.

    Attributes:
        envs, decisions, chunk: N, T and H, over all machines.
        epochs, minibatch, micro_batch: of the update; a minibatch is of all ranks together, a micro-batch of one.
        step_s, cores: core seconds of an environment's step, and cores that step them, over all machines.
    """

    envs: int
    decisions: int
    chunk: int
    epochs: int
    minibatch: int
    micro_batch: int
    step_s: float
    cores: int


class Iteration(NamedTuple):
    """Seconds of the parts of an iteration, and what they come to."""

    simulate: float
    act: float
    update: float
    exchange: float
    seconds: float
    binds: str


def iteration(
    policy: Policy, job: Job, machine: Machine, ranks: int, rollout_gpus: int = 0, sharded: bool = False
) -> Iteration:
    """One iteration on `ranks` GPUs that learn.

    Args:
        policy, job, machine: as above.
        ranks: GPUs that update; without rollout GPUs they act as well, before it.
        rollout_gpus: GPUs elsewhere that act while the others update, with weights that are one update old.
        sharded: weights are divided among the ranks while they update.
    """
    actors, transitions = rollout_gpus or ranks, job.envs * job.decisions
    simulate = transitions * job.chunk * job.step_s / job.cores
    reading = job.decisions * (1 + policy.tokens) * policy.bytes_acting / machine.memory_bandwidth
    act = reading + transitions * policy.act_flops / (actors * machine.flops)
    update = job.epochs * transitions * policy.update_flops / (ranks * machine.flops)
    steps = job.epochs * transitions / job.minibatch
    # Gradients, by a ring; where weights are divided, these are put together for each pass over a micro-batch instead.
    moved = 2 * 4 * policy.trained
    if sharded:
        passes = 2 * job.minibatch / ranks / job.micro_batch
        moved = 4 * policy.trained + passes * policy.bytes_acting
    link = machine.within if ranks <= machine.gpus else machine.between
    exchange = steps * (ranks - 1) / ranks * moved / link
    collect = simulate + act  # by turns: a policy sees what a simulator has done
    if not rollout_gpus:
        parts = {"simulators": simulate, "acting": act, "the update": update, "exchange": exchange}
        return Iteration(simulate, act, update, exchange, sum(parts.values()), max(parts, key=parts.get))
    # Elsewhere: transitions come in over the learners' links, trainable weights go out along a tree of machines.
    links = max(1, ranks // machine.gpus) * machine.between
    network = transitions * policy.kept / links + 2 * 4 * policy.trained / machine.between
    parts = {"collecting": collect, "the update": update + exchange, "the network": network}
    return Iteration(simulate, act, update, exchange + network, max(parts.values()), max(parts, key=parts.get))


# OpenVLA-7B decodes 7 tokens behind 290 of prompt. Weights and bytes: `ppo_vla.py --config configs/openvla.json
# --dry_run`, on the meta device; FLOPs: 2 per weight and token, of the towers' 257 tokens and the language model's 290,
# twice more for the gradients of what trains, once more where gradients only pass through.
_TOWERS, _LANGUAGE = 2 * 0.73e9 * 257, 2 * 6.74e9 * 290
SEVEN_B = {
    "full": Policy(
        "everything trains", 7.54e9, 7.54e9, _TOWERS + _LANGUAGE, 3 * (_TOWERS + _LANGUAGE), 7, 0.15e6, 5.0e9
    ),
    "lora": Policy("lora", 7.56e9, 0.153e9, _TOWERS + _LANGUAGE, 2 * _LANGUAGE, 7, 2.2e6, 3.7e9),
    "frozen": Policy("heads alone", 7.54e9, 0.132e9, _TOWERS + _LANGUAGE, 1 * _LANGUAGE, 7, 6.0e6, 0.07e9),
}
# A robot simulator with a camera: 5 ms of a core for a control step (measured: 1 to 7 ms, RESULTS.md, Simulators).
JOB = Job(envs=1024, decisions=80, chunk=1, epochs=1, minibatch=10240, micro_batch=8, step_s=0.005, cores=128)
PLACES = {
    "8 GPUs, 128 cores": (JOB, 8, 0),
    "64 GPUs, 1,024 cores": (replace(JOB, envs=8192, cores=1024), 64, 0),
    "64 GPUs that learn, 1,000 machines of one GPU and 16 cores that collect": (
        replace(JOB, envs=64000, cores=16000), 64, 1000,
    ),
}  # fmt: skip


def table() -> list[dict[str, str]]:
    """What the three ways of training OpenVLA-7B take in the three places."""
    rows, machine = [], Machine()
    for place, (job, ranks, elsewhere) in PLACES.items():
        for policy in SEVEN_B.values():
            sharded = policy.bytes_training(1, False) + job.micro_batch * policy.activations > 0.8 * machine.memory
            one = iteration(policy, job, machine, ranks, elsewhere, sharded)
            steps = job.envs * job.decisions * job.chunk / one.seconds
            held = policy.bytes_training(ranks, sharded) + (policy.bytes_acting if sharded else 0)
            cost = (ranks + elsewhere) * machine.price / 3600 * 1e6 / steps
            rows.append({
                "where": place, "what trains": policy.name,
                "weights and optimizer, GiB a GPU": f"{held / GIB:,.0f}" + (" (sharded)" if sharded else ""),
                "simulate, s": f"{one.simulate:,.1f}", "act, s": f"{one.act:,.1f}", "update, s": f"{one.update:,.1f}",
                "exchange, s": f"{one.exchange:,.1f}", "binds": one.binds, "env steps/s": f"{steps:,.0f}",
                "$ a million env steps": f"{cost:,.0f}",
            })  # fmt: skip
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(rows: list[dict[str, str | float]]) -> list[dict[str, str]]:
    return [{name: v if isinstance(v, str) else f"{v:,.0f}" for name, v in row.items()} for row in rows]


def check(measured: Path = MEASURED) -> list[dict[str, str | float]]:
    """Env steps/s of two processes, predicted from runs of one, beside what was measured.

    Ranks of torchrun each do what a run of half the size does beside another such run. Two processes that collect do so
    at twice the speed, less what that run loses to the other one: the cores share caches and memory. Two that simulate
    share two cores with the policy, which acts on some rows while others step: its share is what a run without
    processes takes longer than its simulators.
    """
    with measured.open() as file:
        runs = {
            (row["kind"], row["run"]): {k: float(v) for k, v in list(row.items())[2:]} for row in csv.DictReader(file)
        }
    rows: list[dict[str, str | float]] = []
    half, shared = runs["torchrun", "half"], runs["torchrun", "beside"]
    lost = shared["env_steps_per_second"] / half["env_steps_per_second"]
    for kind in dict.fromkeys(
        kind for kind, _ in runs if kind != "threads"
    ):  # nothing to predict: two ways of one thing
        one, two = runs[kind, "one"], runs[kind, "two"]
        collect, update = one["collect_s"], one["update_s"]
        acting = runs["gym_workers", "zero"]["collect_s"] - ENVS * STEPS * STEP_S
        predicted = {
            "gym_workers": ENVS * STEPS / ((ENVS * STEPS * STEP_S + acting) / 2 + update),
            "torchrun": 2 * shared["env_steps_per_second"],
            "sharded": one["env_steps_per_second"],  # the same work, and weights that are small
        }.get(kind, one["env_steps_per_second"] * (collect + update) / (collect / (2 * lost) + update))
        got = two["env_steps_per_second"]
        rows.append({"kind": kind, "one": one["env_steps_per_second"], "predicted": predicted, "measured": got})
    return rows


def main() -> int:
    print(markdown(table()), end="\n\n")
    print(markdown(shown(check())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
