"""What evaluations of afterwards were of, as far as `evaluate_vla.py` wrote it down: whether those of some runs agree.

It says so in the `summary.json` beside the episodes, under `evaluated`; evaluations of earlier versions do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from research.errors import UserError
from research.study.arms import refuse_different
from research.study.run_settings import ENV_CONFIG
from research.study.run_table import Run, is_number, plain

ENV_STEPS, WEIGHTS = "env_steps", "weights_sha256"  # of the checkpoint; the rest is how it was evaluated
MODES = {"mode": "by the likeliest action", "sample": "by sampled actions"}


def check_evaluations(runs: Sequence[Run], names: Iterable[str], by: Iterable[str]) -> list[str]:
    """Refuse evaluations that are not of the runs' ends, or not of one kind; what is not known of them, as notes.

    Args:
        runs: complete ones, with all of their env steps.
        names: of the folders that evaluations are taken from.
        by: dotted options that are compared, in which evaluations may differ.
    Raises:
        UserError: such an evaluation.
    """
    notes, by = [], tuple(by)
    for name in names:
        for run in runs:
            _refuse_earlier(run, name)
        known = [run for run in runs if name in run.evaluated]
        _refuse_shared(known, name)
        facts = [{f"trainer.{key} in {name}/": value for key, value in run.evaluated[name].items()} for run in known]
        for key in dict.fromkeys(key for of_run in facts for key in of_run):
            option = key.partition(" ")[0]
            if option not in (*by, f"trainer.{ENV_STEPS}", f"trainer.{WEIGHTS}"):
                refuse_different(known, facts, key)
        if known and len(known) < len(runs):
            notes.append(
                f"Of {len(runs) - len(known)} of the {len(runs)} runs it is not known what was evaluated in "
                f"{plain(name)}/, and by which checkpoint: an earlier version did not write it down."
            )
    return notes


def _refuse_earlier(run: Run, name: str) -> None:
    step, end = run.evaluated.get(name, {}).get(ENV_STEPS), run.eval_steps[-1]
    if is_number(step) and step < end:
        raise UserError(
            f"{run.run}: {name}/ is an evaluation of its checkpoint at {step:,.0f} env steps, and the run ended at "
            f"{end:,.0f}; do it again: evaluate_vla.py --checkpoint=<run> --output=<run>/{name}, with the flags of then"
        )


def _refuse_shared(runs: Sequence[Run], name: str) -> None:
    """Refuse evaluations of one checkpoint in the folders of two runs: a checkpoint's hash is that of its run alone."""
    whose: dict[str, str] = {}
    for run in runs:
        weights = run.evaluated[name].get(WEIGHTS)
        if isinstance(weights, str) and whose.setdefault(weights, run.run) != run.run:
            raise UserError(
                f"{name}/ of {whose[weights]} and of {run.run} are evaluations of one and the same checkpoint; do "
                f"them again, each of its own run: evaluate_vla.py --checkpoint=<run> --output=<run>/{name}, with the "
                "flags of then"
            )


def describe_evaluation(run: Run, without: Iterable[str] = ()) -> str:
    """The environment of a run's scores, with its options, and how actions were taken where that is known.

    Args:
        run: the run.
        without: dotted options that are not to be named.
    """
    without, own = tuple(without), run.env_config
    if not run.evaluation:
        return f"{run.environment} ({_shown(own, without)})"
    where, facts = f"as evaluated in {run.evaluation}/", run.evaluated.get(run.evaluation)
    if facts is None:
        return f"{run.environment} (trained with {_shown(own, without)}; with what it was evaluated is not known)"
    config = env_config_of(facts)
    how = [_shown(config, without), MODES.get(str(facts.get("eval_mode")), "")]
    if facts.get("max_eval_steps"):
        how.append(f"at most {facts['max_eval_steps']} control steps an episode")
    if other := _differing(own, config):
        how.append(f"trained with {_shown(other, without)}")
    return f"{facts.get('env')}, {where} ({'; '.join(filter(None, how))})"


def how_otherwise(run: Run, name: str) -> str:
    """How an evaluation differs from deterministic ones in what its run trained in; empty where nothing is known to."""
    facts = run.evaluated.get(name, {})
    told = [MODES["sample"]] if facts.get("eval_mode") == "sample" else []
    if facts and (other := _differing(env_config_of(facts), run.env_config)):
        told.append(f"with {_shown(other)}")
    return ", ".join(told)


def _differing(config: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The entries of one in which it differs from another; None for those that it lacks."""
    return {key: config.get(key) for key in other | config if config.get(key) != other.get(key)}


def env_config_of(facts: dict[str, Any]) -> dict[str, Any]:
    """The environment's options in what was evaluated, by dotted key."""
    return {key.removeprefix("env_config."): value for key, value in facts.items() if key.startswith("env_config.")}


def _shown(config: dict[str, Any], without: Iterable[str] = ()) -> str:
    named = [f"{key} = {value}" for key, value in sorted(config.items()) if ENV_CONFIG + key not in without]
    return ", ".join(named) or "default settings"
