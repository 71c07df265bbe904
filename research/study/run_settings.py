"""The settings of a run that a comparison knows: what is kept of its configuration, and what all runs share of it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from research.config import FREEZE_SWITCHES, AlgorithmConfig, ExperimentConfig
from research.errors import UserError, did_you_mean
from research.options import flatten
from research.study.run_table import Run

SCOPE, RATE, SEED, ENVIRONMENT = "policy.freeze", "algorithm.cfg.learning_rate", "trainer.seed", "trainer.env"
ENV_CONFIG = "trainer.env_config."
OF_A_RUN = ("step_", "best_")  # names of the checkpoints in a run's folder
# The first stands for the second with all that makes its recipe.
ALGORITHM, ALGORITHM_NAME = "algorithm", "algorithm.name"
# Each algorithm's name -> dotted option -> its default.
DEFAULTS = {
    cfg.name: flatten(ExperimentConfig(algorithm=AlgorithmConfig(cfg.name, cfg())))
    for cfg in get_args(get_type_hints(AlgorithmConfig)["cfg"])
}
START = "policy.vla_config.model_path"
# What becomes another option, whose value is kept.
BECOMES = {
    **{f"policy.vla_config.model_config.{name}": SCOPE for name in FREEZE_SWITCHES},
    **dict.fromkeys(("policy.learning_rate_by_scope", "policy.learning_rate_factor"), RATE),
    "trainer.iterations_by_scope": "trainer.iterations",
}
_OWN_COLUMN = (ENV_CONFIG, "trainer.wandb_", "policy.learning_rate_by_scope.", "trainer.iterations_by_scope.")
# What does not change what is learned, or has a column of its own.
NOT_KEPT = (
    "trainer.exp_name", ENVIRONMENT, "trainer.env_config", SEED, "trainer.run_dir", "trainer.use_wandb",
    "trainer.resume", "trainer.progress_bar", "trainer.save_freq", "trainer.eval_freq", "trainer.num_eval_envs",
    "trainer.num_eval_episodes", "trainer.threads", "trainer.keep_checkpoints", "trainer.worker_timeout",
    "trainer.ray_address", "trainer.tensorboard", SCOPE, RATE,
    # They follow from the environment, whether they are said or not.
    "policy.action_dim", "policy.vla_config.model_config.action_dim", "policy.vla_config.model_config.proprio_dim",
)  # fmt: skip


def is_option(name: str) -> bool:
    """Whether a run can have such an option, an entry of a free-form one included."""
    return any(
        name == option or (default == {} and name.startswith(f"{option}."))
        for defaults in DEFAULTS.values()
        for option, default in defaults.items()
    )


def defaults_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the options that a configuration's algorithm has."""
    name = config.get("algorithm.name", "ppo")
    return DEFAULTS.get(name, {}) if isinstance(name, str) else {}


def settings_of(config: Mapping[str, Any], scope: str) -> dict[str, Any]:
    """What is kept of a configuration with dotted keys; an option that it lacks is of a later version, at its default.

    Options of adapters and of the residual policy are left out where there is none.
    """
    parts = scope.split("+")
    idle = tuple(f"policy.{name}." for name in ("lora", "residual") if name not in parts)
    return {
        key: _start(value) if key == START and isinstance(value, str) else value
        for key, value in (defaults_of(config) | dict(config)).items()
        if not (key in NOT_KEPT or key in BECOMES or key.startswith((*_OWN_COLUMN, *idle, "_")) or value == {})
    }


def _start(path: str) -> str:
    """A start checkpoint's file and folder, and that of the run it is of: what lies above differs between machines."""
    parts = Path(path).parts
    return "/".join(parts[-3:] if parts[-2:-1] == ("checkpoints",) and parts[-1].startswith(OF_A_RUN) else parts[-2:])


def keep_what_tells(runs: list[Run]) -> list[Run]:
    """Leave the settings in which the runs differ to `settings`, and those that all share to `common`.

    `common` has no option that is at its default. A start checkpoint is known by its name alone where that tells all
    apart, and lists of frozen parts that differ in their order are one scope.
    """
    known = [run for run in runs if run.environment]
    starts = {run.settings[START] for run in known if isinstance(run.settings.get(START), str)}
    names, scopes = Counter(map(_name, starts)), {}
    for run in known:
        start = run.settings.get(START)
        if isinstance(start, str) and names[_name(start)] == 1:
            run.settings[START] = _name(start)
        run.scope = scopes.setdefault(frozenset(run.scope.split("+")), run.scope)
    texts: dict[str, set[str]] = defaultdict(set)
    for key in {key for run in known for key in run.settings}:
        texts[key] = {json.dumps(run.settings.get(key), sort_keys=True) for run in known}
        if not all(key in run.settings for run in known):
            texts[key].add("")
    for run in known:
        defaults = defaults_of(run.settings)
        kept = sorted(run.settings.items())
        run.settings = {key: value for key, value in kept if len(texts[key]) > 1}
        run.common = {k: v for k, v in kept if len(texts[k]) == 1 and (k not in defaults or defaults[k] != v)}
    return runs


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def value_of(run: Run, option: str) -> tuple[bool, Any]:
    """Whether a run has an option, and its value; of options that all runs share only `common` ones are known."""
    option = ALGORITHM_NAME if option == ALGORITHM else option
    own = {SCOPE: run.scope, RATE: run.learning_rate, SEED: run.seed, ENVIRONMENT: run.environment}
    for values in (own, {f"{ENV_CONFIG}{key}": value for key, value in run.env_config.items()}, run.settings):
        if option in values:
            return True, values[option]
    return option in run.common, run.common.get(option)


def check_option(flag: str, option: str, runs: Sequence[Run]) -> None:
    """Refuse, naming the flag, an option that no algorithm has and no run was given."""
    if option != ALGORITHM and not is_option(option) and not any(value_of(run, option)[0] for run in runs):
        known = sorted({key for defaults in DEFAULTS.values() for key in defaults})
        raise UserError(f"{flag}: there is no option {option!r}{did_you_mean(option, known)}")


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """The options in which some runs differ, of those in their `settings` and the freeze scope."""
    return sorted({key for run in runs for key in (SCOPE, *run.settings) if not agree(runs, key)})


def setting_of(run: Run, key: str) -> Any:
    """A run's value of a setting, or its freeze scope, which has a column of its own; None where it has none."""
    return run.scope if key == SCOPE else run.settings.get(key)


def agree(runs: Sequence[Run], key: str) -> bool:
    """Whether runs have one value of a setting; none is one."""
    return len({json.dumps(setting_of(run, key), sort_keys=True) for run in runs}) == 1
