"""The arms of a comparison: which runs are alike in the options that are compared, and which cannot be compared."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from research.errors import UserError
from research.study.run_settings import (
    ALGORITHM,
    ALGORITHM_NAME,
    BECOMES,
    ENV_CONFIG,
    ENVIRONMENT,
    NOT_KEPT,
    RATE,
    SCOPE,
    SEED,
    agree,
    check_option,
    defaults_of,
    differing_settings,
    setting_of,
    value_of,
)
from research.study.run_table import Run, plain

Cell = tuple[str, float]  # arm, learning rate
MODEL_CLASS = "policy.vla_config.model_class"
# Runs are cut to equal env steps or seconds, whatever they were given; a note says whose schedule that cuts.
BUDGET = ("trainer.iterations", "trainer.max_env_steps")
# An option below the first is part of what the second chooses.
_PART_OF = (
    ("policy.lora.", SCOPE), ("policy.residual.", SCOPE), ("algorithm.cfg.", ALGORITHM_NAME),
    ("policy.vla_config.", MODEL_CLASS),
)  # fmt: skip
# What makes an algorithm's recipe, all of which may differ where whole algorithms are compared.
_RECIPE = ("algorithm.", "policy.learning_rates.", "trainer.buffer_size")


def check_by(by: Sequence[str], runs: Sequence[Run]) -> tuple[str, ...]:
    """The options to compare by, once; none = the freeze scope, which may be the same in all runs.

    Raises:
        UserError: an option that there is not, that makes no arms, or that is the same in all runs.
    """
    for option in by:
        found = [value_of(run, option) for run in runs]
        check_option("--by", option, runs)
        if option == SEED:
            raise UserError(f"--by: {SEED} makes no arms: seeds are the repetitions of each")
        if option == ENVIRONMENT:
            raise UserError(f"--by: {ENVIRONMENT} makes no arms: scores of two environments cannot be compared")
        if option in BECOMES:
            raise UserError(f"--by: {option} makes no arms: it becomes {BECOMES[option]}, which may")
        if option in NOT_KEPT and option not in (SCOPE, RATE):
            raise UserError(f"--by: {option} makes no arms: it does not change what is learned")
        if len({json.dumps(each, sort_keys=True) for each in found}) == 1:
            shown = f" ({json.dumps(found[0][1])})" if found[0][0] else ""
            raise UserError(f"--by: {option} is the same in all {len(runs)} complete runs{shown}: nothing to compare")
    return tuple(dict.fromkeys(by)) or (SCOPE,)


def arm_of(run: Run, by: Sequence[str]) -> str:
    """The name of a run's arm: its values of the options, text as it is, and others behind the option's last word.

    What an algorithm does not have is not in its name, where whole algorithms are compared.
    """
    values = [(option, *value_of(run, option)) for option in by]
    if ALGORITHM in by:
        values = [(option, has, value) for option, has, value in values if has or not option.startswith(_RECIPE)]
    return ", ".join(_shown(*each) for each in values)


def _shown(option: str, has: bool, value: Any) -> str:
    word = option.rpartition(".")[2]
    if not has:
        return f"{word} not set"
    return value if isinstance(value, str) else f"{word}={json.dumps(value, sort_keys=True)}"


def make_cells(runs: Sequence[Run], by: Sequence[str]) -> dict[Cell, list[Run]]:
    """The runs of every arm and learning rate, in their order: numbers by size, text by its letters.

    Raises:
        UserError: runs of one cell that are no repetitions, or runs that differ in more than what is compared.
    """
    cells: dict[Cell, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (*(_order(run, option) for option in by), run.learning_rate, run.seed)):
        cells[arm_of(run, by), run.learning_rate].append(run)
    for (arm, rate), members in cells.items():
        where = f"{'scope ' if tuple(by) == (SCOPE,) else 'arm '}{arm}, learning rate {rate:g}"
        _refuse_unlike_seeds(members, where)
    _refuse_confounded(runs, by)
    return dict(cells)


def _order(run: Run, option: str) -> tuple[int, float, str]:
    _, value = value_of(run, option)
    if isinstance(value, int | float):
        return 0, float(value), ""
    return 1, 0.0, value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _refuse_unlike_seeds(cell: Sequence[Run], where: str) -> None:
    """The runs of one arm and rate are taken for repetitions: only their seeds may differ."""
    for one, other in combinations(cell, 2):
        # Before the seeds: who left an option out of --by has no run too many.
        for key in differing_settings([one, other]):
            a, b = setting_of(one, key), setting_of(other, key)
            raise UserError(
                f"{one.run} and {other.run}, both {where}, are no repetitions: {key} is {a!r} and {b!r}; "
                "compare them separately (--where), or by that option, too (--by)"
            )
    for one, other in combinations(cell, 2):
        if one.seed == other.seed:
            raise UserError(f"{one.run} and {other.run} are the same seed {one.seed} of {where}: leave one of them out")


def _refuse_confounded(runs: Sequence[Run], by: Sequence[str]) -> None:
    """Between arms only what is compared may differ: what else differs could be why one is better."""
    differing = differing_settings(runs)
    # What belongs to an option that is missing from --by goes with it, once that is named.
    found = [
        f"{key} ({', '.join(_values(runs, key))})"
        for key in differing
        if key not in (*by, *BUDGET) and not _is_part(key, (*by, *(name for name in differing if name != key)), runs)
    ]
    if found:
        raise UserError(
            f"these runs cannot be compared by {' and '.join(by)} alone, they differ in {'; '.join(found)}: "
            "name in --by what belongs to the comparison, or leave runs out (--where)"
        )


def _values(runs: Sequence[Run], key: str) -> list[str]:
    """The values of a setting, each shortened, at most four of them."""
    texts = dict.fromkeys(json.dumps(setting_of(run, key), sort_keys=True)[:60] for run in runs)
    return [*list(texts)[:4], *(["..."] if len(texts) > 4 else [])]


def _is_part(key: str, by: Sequence[str], runs: Sequence[Run]) -> bool:
    """Whether a setting goes with one that is compared: with the model's class, the algorithm, or a part of either.

    Of a part, where not all runs have the setting. Runs that are alike in what it goes with must agree in it.
    """
    if ALGORITHM in by and key.startswith(_RECIPE):
        owner = ALGORITHM
    else:
        owner = next((owner for prefix, owner in _PART_OF if key.startswith(prefix)), None)
    if owner not in by or (owner not in (MODEL_CLASS, ALGORITHM) and all(key in run.settings for run in runs)):
        return False
    together: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        together[_shown(owner, *value_of(run, owner))].append(run)
    return all(agree(members, key) for members in together.values())


def also_differing(runs: Sequence[Run], by: Sequence[str]) -> list[str]:
    """The settings that differ besides, though runs are compared; not those that some have alone, at their defaults."""
    return [
        key for key in differing_settings(runs) if key not in by and not all(_has_none_of_its_own(r, key) for r in runs)
    ]


def _has_none_of_its_own(run: Run, key: str) -> bool:
    return key not in run.settings or defaults_of(run.common | run.settings).get(key) == run.settings[key]


def refuse_other_questions(runs: Sequence[Run], by: Iterable[str] = ()) -> None:
    """Refuse runs of several environments, measures or sets of evaluation states, and say which run has which."""
    values = [_question(run) for run in runs]
    for key in dict.fromkeys(key for value in values for key in value if key not in by):
        refuse_different(runs, values, key)


def _question(run: Run) -> dict[str, Any]:
    """What compared runs share: the environment, and the initial states they were evaluated from."""
    environment = {ENVIRONMENT: run.environment, "the initial states of the evaluation": run.states}
    settings = {f"{ENV_CONFIG}{key}": value for key, value in run.env_config.items()}
    return environment | settings | {"what evaluations measure": run.measure}


def refuse_different(runs: Sequence[Run], values: Sequence[Mapping[str, Any]], key: str) -> None:
    """Refuse runs that differ in the value of a key, and say which run has which."""
    who: dict[str, list[str]] = defaultdict(list)
    for run, value in zip(runs, values, strict=True):
        who[json.dumps(value.get(key), sort_keys=True)].append(run.run)
    if len(who) > 1:
        found = "; ".join(
            f"{text} in {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
            for text, names in who.items()
        )
        raise UserError(f"these runs cannot be compared, {key} differs: {found}")


def noun_of(by: Sequence[str]) -> str:
    """What an arm of such a comparison is called in its report."""
    return "scope" if tuple(by) == (SCOPE,) else "arm"


def heading_of(by: Sequence[str]) -> str:
    """What stands above the names of arms in a table."""
    return "scope" if tuple(by) == (SCOPE,) else ", ".join(map(plain, by))
