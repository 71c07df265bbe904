"""Answers `--help` and its like of a training script, which imports it first, before what takes seconds to import."""

from __future__ import annotations

import sys
from pathlib import Path

import packages  # noqa: F401

from configuration import DEFAULT_CONFIG, GRPO_CONFIG, asks, read_experiment

from research.config import ExperimentConfig
from research.errors import UserError

HERE = Path(__file__).resolve().parent
ANSWERED = {HERE / "ppo_vla.py": DEFAULT_CONFIG, HERE / "grpo_vla.py": GRPO_CONFIG}

main = sys.modules["__main__"]
script = Path(getattr(main, "__file__", None) or ".").resolve()
if script in ANSWERED and asks(sys.argv[1:]):
    words = [word for word in sys.argv[1:] if word != "--dry_run"]
    try:
        read_experiment(ExperimentConfig, words, main.__doc__ or "", ANSWERED[script])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
