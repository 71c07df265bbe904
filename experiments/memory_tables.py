"""What `--dry_run` tells of memory, as the tables of docs/models.md.

python experiments/memory_tables.py            # the families at full size, by what is frozen
python experiments/memory_tables.py --check    # the bytes of an update of small models, told and measured
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import packages  # noqa: F401

import torch
from accounting import needs_of_run, offered_by
from assembling import assemble
from configuration import DEFAULT_CONFIG
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from agents.live_bytes import bytes_of
from research.config import ExperimentConfig
from research.errors import UserError
from research.options import parse_config
from research.training.algorithm import Progress

CONFIGS = DEFAULT_CONFIG.parent
CPU = torch.device("cpu")
SCOPES = ("none", "vision", "backbone", "lora")
COLUMNS = (
    "family", "freeze", "train, M", "kept per transition, bytes", "weights, GiB", "gradients", "Adam", "activations",
    "in all",
)  # fmt: skip

SIZES = [
    "--trainer.num_envs=16", "--trainer.buffer_size=512", "--algorithm.cfg.batch_size=64",
    "--algorithm.cfg.micro_batch_size=8",
]  # fmt: skip
MODEL_CLASS = "--policy.vla_config.model_class"
OWN = ["--policy.vla_config.model_path=null", "--policy.learning_rates={}"]
FULL_SIZE = {  # the families at full size, as files and flags
    "SmallVLA": ["--config=pick_place.json"],
    "DualEncoderVLA": ["--config=pick_place.json", *OWN, f"{MODEL_CLASS}=agents.dual_encoder_vla.DualEncoderVLA"],
    "ResNet-50 and GPT-2": ["--config=pick_place.json", *OWN, f"{MODEL_CLASS}=agents.gpt_vla.GPTVLAModel"],
    "SmolVLA": ["--config=smolvla.json"],
    "pi0": ["--config=pi0.json"],
    "OpenVLA": ["--config=openvla.json"],
    "OpenVLA-OFT": ["--config=openvla_oft.json"],
}


def configured(flags: Sequence[str], scope: str) -> ExperimentConfig:
    """A configuration of this repository's folder with some flags, frozen otherwise."""
    name, *others = flags
    path = CONFIGS / name.removeprefix("--config=")
    return parse_config(ExperimentConfig, [f"--config={path}", *others, f"--policy.freeze={scope}"])


def row_of(family: str, scope: str) -> str:
    """A family's row of the table of memory."""
    config = configured([*FULL_SIZE[family], *SIZES], scope)
    needs = needs_of_run(config, offered_by(config.trainer.env, config.trainer.env_config, CPU, 1), CPU)
    memory = [needs.memory[kind] / 2**30 for kind in ("weights", "gradients", "optimizer", "activations")]
    sizes = [*memory, needs.total / 2**30]
    trained, kept = sum(part.trained for part in needs.parts), sum(needs.kept.values())
    shown = [f"{size:.1f}" if size >= 10 else f"{size:.3f}" for size in sizes]
    return f"| {family} | {scope} | {trained / 1e6:,.2f} | {kept:,} | {' | '.join(shown)} |"


# --------------------------------------------------------------------------------------------------- told and measured

SMALL = ["--trainer.num_envs=32", "--trainer.buffer_size=1024", "--algorithm.cfg.batch_size=256"]
CHECKED = {  # what `--check` runs: configuration and flags
    f"{name}, {scope}": [f"--config={CONFIGS / name}.json", f"--policy.freeze={scope}", *flags]
    for name, flags in (
        ("pick_place", SMALL),
        ("pi0_tiny", []),
        ("smolvla_tiny", []),
        ("openvla_tiny", ["--algorithm.cfg.micro_batch_size=32"]),
        ("openvla_oft_tiny", []),
    )
    for scope in SCOPES
}


def told_and_measured(config: ExperimentConfig) -> tuple[int, int, int, int]:
    """Bytes of an update: in all, as told and measured; and those of them that come and go in it, told and measured.

    Measured is the second update, whose optimizer has its state: the allocations that torch's profiler sees, and the
    tensors that were there before.
    """
    needs = needs_of_run(config, offered_by(config.trainer.env, config.trainer.env_config, CPU, 1), CPU)
    config.trainer.device = "cpu"
    parts = assemble(config)
    update, progress = parts.algorithm, Progress(1000)
    progress.iteration = config.algorithm.cfg.value_warmup_iterations  # from which on everything trains
    update.update(update.prepare(parts.rollouts.next())[0], progress)
    batch, _ = update.prepare(parts.rollouts.next())
    there = [*_weights(parts.policy.model), *_states(update.policy_update.optimizer)]
    ahead = parts.rollouts.collector._ahead
    for kept in [batch] if ahead is None else [batch, ahead]:
        there += kept.values(include_nested=True, leaves_only=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        update.update(batch, progress)
    allocated = peak_of(profiled)
    parts.rollouts.shutdown()
    kinds = ("weights", "optimizer", "rollout")
    return needs.updating, bytes_of(there) + allocated, needs.updating - sum(map(needs.memory.get, kinds)), allocated


def peak_of(profiled: profile) -> int:
    """The most bytes that were allocated at once, of what was allocated while profiling."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _states(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))


def main(argv: list[str] | None = None) -> int:
    """Print one of the tables."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--check"]:
        print("| configuration, freeze | told, MiB | measured | ratio | passes: told | measured | ratio |")
        print("|---|---|---|---|---|---|---|")
        for name, flags in CHECKED.items():
            told, measured, passes, allocated = told_and_measured(parse_config(ExperimentConfig, flags))
            shown = [*_compared(told, measured), *_compared(passes, allocated)]
            print(f"| {name} | {' | '.join(shown)} |", flush=True)
        return 0
    if argv:
        raise UserError(f"unexpected argument {argv[0]!r}; there is --check alone")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for family in FULL_SIZE:
        for scope in SCOPES:
            print(row_of(family, scope), flush=True)
    return 0


def _compared(told: int, measured: int) -> tuple[str, str, str]:
    return f"{told / 2**20:.2f}", f"{measured / 2**20:.2f}", f"{told / measured:.3f}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
