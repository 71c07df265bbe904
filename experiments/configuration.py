"""Which configuration a script starts from: the named one, that of the run that is resumed, or the main job's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from research.config import ExperimentConfig
from research.option_parser import split_questions
from research.options import names_config, parse_config

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "pick_place.json"
GRPO_CONFIG = DEFAULT_CONFIG.with_name("pick_place_grpo.json")
SCRIPTS = {"ppo": "ppo_vla.py", "grpo": "grpo_vla.py"}  # algorithm -> what trains by it
HELP_ENV = "help.env"
C = TypeVar("C", bound=ExperimentConfig)


@dataclass
class EvaluationConfig(ExperimentConfig):
    """An evaluation: the configuration of a training run, and where to read and write."""

    checkpoint: str | None = None
    """Run folder, training checkpoint or weights; null = policy.vla_config.model_path of the configuration."""
    output: str = "evaluation"
    """Folder for episodes.jsonl, summary.json and evaluation.mp4 (with all splits, evaluation_<split>.mp4)."""
    split: str | None = None
    """train, vision, semantics or execution (what changes: envs/tabletop.py), or all; null = trainer.env_config's."""
    first_state: int = 0
    """Id of the first initial state; below 10000 no training run has seen it (LIBERO: below 10 times its tasks)."""
    film: int = 16
    """Episodes in the video; 0 = none."""


def read_experiment(config_class: type[C], argv: Sequence[str], description: str, default: Path = DEFAULT_CONFIG) -> C:
    """The configuration of a run: of the file that is named, of the run that is resumed, or the script's default.

    Flags win over all of them. `trainer.resume: auto` becomes the newest run of that name that has a checkpoint, or
    nothing where there is none; `--print_config` prints what was before that. `--help.env=<environment>` prints what
    `trainer.env_config` may hold, and exits. `--trust` lets the configuration of a run folder from elsewhere name code.
    """
    argv, trusted = split_flag(argv, "--trust")
    if name := argv_value(argv, HELP_ENV):
        from env_options import show_options  # the environment's own code: seconds

        show_options(name)
    resume = argv_value(argv, "trainer.resume")
    if resume and resume != "auto" and not names_config(argv):
        from resuming import refuse_foreign_code, run_of_checkpoint  # torch: the help need not wait for it

        folder = run_of_checkpoint(resume)
        config = parse_config(config_class, [f"--config={folder.config}", *argv], description)
        refuse_foreign_code(folder, config, trusted)
        return config
    config = parse_config(config_class, argv, description, default)
    return go_on_with_newest(config, argv, description, trusted) if config.trainer.resume == "auto" else config


def go_on_with_newest(config: C, argv: Sequence[str], description: str, trusted: bool) -> C:
    """The configuration where `trainer.resume` is auto: that of the newest run of the name, unless one is named."""
    from resuming import newest_run, refuse_foreign_code

    newest = newest_run(config.trainer)
    if newest is not None and not names_config(argv):
        config = parse_config(type(config), [f"--config={newest.config}", *argv], description)
        refuse_foreign_code(newest, config, trusted)
    config.trainer.resume = None if newest is None else str(newest)
    return config


def asks(argv: Sequence[str]) -> bool:
    """Whether some arguments ask for help or the like, which prints and exits, and for no run."""
    return split_questions(argv)[1] is not None or argv_value(argv, HELP_ENV) is not None


def split_flag(argv: Sequence[str], flag: str) -> tuple[list[str], bool]:
    """Arguments without a flag that stands alone, which no file can set, and whether it was among them."""
    return [word for word in argv if word != flag], flag in argv


def default_of(script: str | Path) -> Path:
    """The configuration that a training script starts from where none is named."""
    return GRPO_CONFIG if Path(script).name == "grpo_vla.py" else DEFAULT_CONFIG


def argv_value(argv: Sequence[str], option: str) -> str | None:
    """The last value that some arguments give an option, as text."""
    value = None
    for i, word in enumerate(argv):
        flag, equals, text = word.partition("=")
        if flag == f"--{option}":
            value = text if equals else next(iter(argv[i + 1 : i + 2]), None)
    return value
