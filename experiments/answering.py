"""Answers `--help` and its like of a script, which imports it first, before what takes seconds to import."""

from __future__ import annotations

import sys
from pathlib import Path

import packages  # noqa: F401

from configuration import (
    DEFAULT_CONFIG,
    GRPO_CONFIG,
    EvaluationConfig,
    argv_value,
    asks,
    read_experiment,
)

from research.config import ExperimentConfig
from research.errors import UserError
from research.imitation.config import BCConfig
from research.options import parse_config

HERE = Path(__file__).resolve().parent
ANSWERED = {
    HERE / "ppo_vla.py": lambda words, about: read_experiment(ExperimentConfig, words, about, DEFAULT_CONFIG),
    HERE / "grpo_vla.py": lambda words, about: read_experiment(ExperimentConfig, words, about, GRPO_CONFIG),
    HERE / "evaluate_vla.py": lambda words, about: read_experiment(EvaluationConfig, words, about),
    HERE / "bc_vla.py": lambda words, about: parse_config(BCConfig, words, about),
}

main = sys.modules["__main__"]
script = Path(getattr(main, "__file__", None) or ".").resolve()
# The configuration of a checkpoint's run is the script's to find.
if script in ANSWERED and asks(sys.argv[1:]) and argv_value(sys.argv[1:], "checkpoint") is None:
    words = [word for word in sys.argv[1:] if word not in ("--dry_run", "--trust")]
    try:
        ANSWERED[script](words, main.__doc__ or "")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
