"""Which configuration a script starts from: the named one, that of the run that is resumed, or the main job's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from resuming import newest_run, refuse_foreign_code, run_of_checkpoint

from research.config import ExperimentConfig
from research.options import parse_config

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "pick_place.json"
GRPO_CONFIG = DEFAULT_CONFIG.with_name("pick_place_grpo.json")
C = TypeVar("C", bound=ExperimentConfig)


def read_experiment(config_class: type[C], argv: Sequence[str], description: str, default: Path = DEFAULT_CONFIG) -> C:
    """The configuration of a run: of the file that is named, of the run that is resumed, or the script's default.

    Flags win over all of them. `trainer.resume: auto` becomes the newest run of that name that has a checkpoint, or
    nothing where there is none. `--trust` lets the configuration of a run folder from elsewhere name code.
    """
    argv, trusted = split_flag(argv, "--trust")
    resume = argv_value(argv, "trainer.resume")
    if resume and resume != "auto" and not names_config(argv):
        folder = run_of_checkpoint(resume)
        config = parse_config(config_class, [f"--config={folder.config}", *argv], description)
        refuse_foreign_code(folder, config, trusted)
        return config
    config = parse_config(config_class, with_default_config(argv, default), description)
    if config.trainer.resume != "auto":
        return config
    newest = newest_run(config.trainer)
    if newest is not None and not names_config(argv):
        argv = [f"--config={newest.config}", *argv]
        config = parse_config(config_class, argv, description)
        refuse_foreign_code(newest, config, trusted)
    config.trainer.resume = None if newest is None else str(newest)
    return config


def split_flag(argv: Sequence[str], flag: str) -> tuple[list[str], bool]:
    """Arguments without a flag that stands alone, which no file can set, and whether it was among them."""
    return [word for word in argv if word != flag], flag in argv


def with_default_config(argv: Sequence[str], default: Path = DEFAULT_CONFIG) -> list[str]:
    """Arguments that start from a script's configuration unless they name one of their own."""
    return [*argv] if names_config(argv) else [f"--config={default}", *argv]


def names_config(argv: Sequence[str]) -> bool:
    """Whether some arguments name a configuration file."""
    return any(word == "--config" or word.startswith("--config=") for word in argv)


def argv_value(argv: Sequence[str], option: str) -> str | None:
    """The last value that some arguments give an option, as text."""
    value = None
    for i, word in enumerate(argv):
        flag, equals, text = word.partition("=")
        if flag == f"--{option}":
            value = text if equals else next(iter(argv[i + 1 : i + 2]), None)
    return value
