"""Which configuration a script starts from: the named one, that of the run that is resumed, or the main job's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from research.config import ExperimentConfig, TrainerConfig, split_switches
from research.options import flatten_dict, parse_config, to_dict
from research.runs.folder import RunFolder
from research.schema import UserError

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "pick_place.json"
FIXED = (  # what a run keeps for life
    "trainer.env", "trainer.env_config", "trainer.num_envs", "trainer.buffer_size", "trainer.buffer_type",
    "trainer.seed", "policy.freeze", "policy.lora", "policy.vla_config.model_class",
    "policy.vla_config.model_config", "algorithm.name",
)  # fmt: skip
UNTOLD = (
    "trainer.resume",
    "trainer.run_dir",
    "trainer.progress_bar",
    "trainer.threads",
    "policy.vla_config.model_path",
)

C = TypeVar("C", bound=ExperimentConfig)


def read_experiment(config_class: type[C], argv: Sequence[str], description: str) -> C:
    """The configuration of a run: of the file that is named, of the run that is resumed, or of the main job.

    Flags win over all of them. `trainer.resume: auto` becomes the newest run of that name that has a checkpoint, or
    nothing where there is none.
    """
    resume = argv_value(argv, "trainer.resume")
    if resume and resume != "auto" and not names_config(argv):
        return parse_config(config_class, [f"--config={run_of_checkpoint(resume).config}", *argv], description)
    config = parse_config(config_class, with_default_config(argv), description)
    if config.trainer.resume != "auto":
        return config
    newest = newest_run(config.trainer)
    if newest is not None and not names_config(argv):
        argv = [f"--config={newest.config}", *argv]
        config = parse_config(config_class, argv, description)
    config.trainer.resume = None if newest is None else str(newest)
    return config


def with_default_config(argv: Sequence[str]) -> list[str]:
    """Arguments that start from the main job's configuration unless they name one of their own."""
    return [*argv] if names_config(argv) else [f"--config={DEFAULT_CONFIG}", *argv]


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


def newest_run(trainer: TrainerConfig) -> RunFolder | None:
    """The run folder of this experiment's name whose checkpoint is the newest, if there is one."""
    folders = [RunFolder(path) for path in Path(trainer.run_dir).glob(f"{trainer.exp_name}-*")]
    started = [folder for folder in folders if folder.is_run and folder.last_checkpoint.exists()]
    return max(started, key=lambda folder: folder.last_checkpoint.stat().st_mtime, default=None)


def run_of_checkpoint(path: str | Path) -> RunFolder:
    """The run folder that is resumed, and written to: itself, or that of a checkpoint in its `checkpoints/`.

    Raises:
        UserError: there is no such thing, or the checkpoint lies elsewhere, so that nobody knows its run.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"trainer.resume: there is no {path}; give a run folder, or a checkpoint in one")
    folder = RunFolder.containing(path)
    if not folder.is_run or (path.is_file() and path.parent != folder.checkpoints):
        raise UserError(
            f"trainer.resume: {path} is neither a run folder nor a checkpoint in one (config.json, checkpoints/); to "
            "start a new run from its weights, give it as policy.vla_config.model_path"
        )
    return folder


def changes_of_resuming(stored: Mapping[str, Any], config: ExperimentConfig, iteration: int) -> list[str]:
    """What a resumed run does otherwise than it was started with, a line each.

    Args:
        stored: the configuration in the checkpoint, nested.
        config: the one that the run goes on with.
        iteration: how far it has come.
    Raises:
        UserError: something that a run cannot change, or fewer iterations than it has done.
    """
    now, policy = to_dict(config), stored["policy"]
    # Earlier runs kept switches of the model beside the scope.
    freeze, model_config = split_switches(policy["freeze"], policy["vla_config"]["model_config"])
    vla = {**policy["vla_config"], "model_config": model_config}
    stored = {**stored, "policy": {**policy, "freeze": freeze, "vla_config": vla}}
    for key in FIXED:
        was, is_now = _entry(stored, key), _entry(now, key)
        if was is not None and was != is_now:
            raise UserError(
                f"{key}: the run to resume has {was!r}, not {is_now!r}; a run keeps it for life, so leave it out, or "
                "start a new run"
            )
    if config.trainer.iterations < iteration:
        raise UserError(
            f"trainer.iterations: is {config.trainer.iterations}, but the run to resume has done {iteration} already"
        )
    before, after = flatten_dict(stored), flatten_dict(now)
    told = [k for k in before if k in after and before[k] != after[k] and not k.startswith(UNTOLD)]
    lines = [f"resumed with {key} = {after[key]!r} (was {before[key]!r})" for key in told]
    if "trainer.iterations" in told and config.algorithm.cfg.anneal_lr:
        lines.append(
            f"learning rates now fall to 0 at iteration {config.trainer.iterations}, from what they would be at "
            f"iteration {iteration} of so long a run"
        )
    return lines


def _entry(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of nested dicts; None where there is none."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values
