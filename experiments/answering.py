"""Answers `--help` and its like of a script, which imports it first, before what takes seconds to import."""

from __future__ import annotations

import sys
from pathlib import Path

import packages  # noqa: F401

from configuration import EvaluationConfig, argv_value, asks, default_of, read_experiment

from research.config import ExperimentConfig
from research.errors import UserError
from research.imitation.config import BCConfig
from research.options import parse_config

HERE = Path(__file__).resolve().parent
ANSWERED = {
    HERE / "ppo_vla.py": ExperimentConfig,
    HERE / "grpo_vla.py": ExperimentConfig,
    HERE / "evaluate_vla.py": EvaluationConfig,
    HERE / "bc_vla.py": BCConfig,
}

main = sys.modules["__main__"]
script = Path(getattr(main, "__file__", None) or ".").resolve()
# The configuration of a checkpoint's run is the script's to find.
if script in ANSWERED and asks(sys.argv[1:]) and argv_value(sys.argv[1:], "checkpoint") is None:
    words = [word for word in sys.argv[1:] if word not in ("--dry_run", "--trust")]
    try:
        if (kind := ANSWERED[script]) is BCConfig:
            parse_config(kind, words, main.__doc__ or "")
        else:
            read_experiment(kind, words, main.__doc__ or "", default_of(script))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
