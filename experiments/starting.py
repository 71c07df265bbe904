"""What ppo_vla.py and grpo_vla.py do around their loops: read the configuration, say what is wrong, open the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from assembling import Assembly, assemble
from configuration import DEFAULT_CONFIG, SCRIPTS, read_experiment, split_flag
from dry_run import dry_run
from opening import open_run
from resuming import load_resumed
from training_run import TrainingRun

from research.config import ExperimentConfig
from research.errors import UserError
from research.training.parallel import join, let_rank_0_speak

Learn = Callable[[Assembly, TrainingRun], None]


def run_script(
    algorithm: str, learn: Learn, description: str, argv: Sequence[str] | None, default: Path = DEFAULT_CONFIG
) -> int:
    """Train as the command line says, or with `--dry_run` say what that would need; returns the exit code.

    Args:
        algorithm: what `algorithm.name` has to be.
        learn: the script's loop.
        description: of the script, for `--help`.
        argv: its arguments; None: those of this process.
        default: the configuration where none is named.
    """
    argv, dry = split_flag(sys.argv[1:] if argv is None else argv, "--dry_run")
    try:
        config = read_experiment(ExperimentConfig, argv, description, default)
        if (named := config.algorithm.name) != algorithm:
            raise UserError(f"algorithm.name: this script trains by {algorithm}; {named} is {SCRIPTS[named]}")
        return dry_run(config) if dry else train(config, learn)
    except UserError as error:
        let_rank_0_speak()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before the run began", file=sys.stderr)
        return 130


def train(config: ExperimentConfig, learn: Learn) -> int:
    """One run, from its parts to its last evaluation."""
    world = join(config.trainer.device)
    resumed = load_resumed(config)
    parts = assemble(config, world)  # whatever can be refused is refused here
    with open_run(config, parts, resumed) as run:
        learn(parts, run)
    return run.code  # the table of exit codes: TrainingRun
