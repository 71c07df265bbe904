"""W&B sweep files, read without W&B: what a sweep varies, checked before its first run.

A sweep file works as it is with `wandb sweep`; this module is what `experiments/sweep_local.py` reads it with.

| key               | meaning                                                                                |
|-------------------|----------------------------------------------------------------------------------------|
| `program`         | the script each run calls                                                              |
| `method`          | `grid`, `random` or `bayes`                                                            |
| `metric`          | `name`, `goal` (`minimize`, W&B's default, or `maximize`), `target` (stop once reached); |
|                   | `grid` and `random` need none, without `early_terminate`                               |
| `parameters`      | dotted option name -> `value`, `values`, or a distribution: `sweep_parameters.py`      |
| `early_terminate` | `type: hyperband` with `min_iter`, or `max_iter` and `s`; `eta`                        |
| `run_cap`         | most runs                                                                              |
| `command`         | words, and the macros `${env}`, `${interpreter}`, `${program}`, `${args}` or another   |
|                   | form of it (`${args_no_equals}`, `${args_no_hyphens}`, `${args_no_boolean_flags}`,     |
|                   | `${args_json}`), and `${envvar:NAME}`, also inside of a word                           |

Not supported, and refused by name: `${args_json_file}`, Hydra's macros, `method: custom`, `scheduler`, `metrics`,
`impute` and `strict`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.errors import UserError, did_you_mean
from research.plain_yaml import read_yaml, shown
from research.study.sweep_parameters import Parameter, mapping, number, read_parameter

METHODS = ("grid", "random", "bayes")
COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
FORMS = ("${args}", "${args_no_equals}", "${args_no_hyphens}", "${args_no_boolean_flags}", "${args_json}")
READ_HERE = FORMS[:2]  # by the scripts of this project
MACROS = (*COMMAND[:3], *FORMS)
_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
LARGEST_GRID = 10_000  # points; each is tried on the script's own parser before the first run
_KEYS = {
    "a sweep": (
        "program", "method", "metric", "parameters", "early_terminate", "run_cap", "command", "name", "description",
        "project", "entity",
    ),
    "metric": ("name", "goal", "target"),
    "early_terminate": ("type", "min_iter", "max_iter", "s", "eta"),
}  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked. `parameters` are in the file's order; fixed ones have one choice."""

    path: Path
    name: str
    program: str
    method: str
    metric: str | None
    maximize: bool
    parameters: tuple[Parameter, ...]
    target: float | None = None
    min_iter: int | None = None
    eta: int = 3
    run_cap: int | None = None
    command: tuple[str, ...] = COMMAND
    project: str | None = None

    @property
    def decides(self) -> bool:
        """Whether the metric decides what comes next; a plain grid tries all its points, and only shows it."""
        return self.method != "grid" or self.min_iter is not None or self.target is not None

    @property
    def varied(self) -> list[str]:
        """Names of the parameters that have more than one value."""
        return [p.name for p in self.parameters if len(p.choices) != 1]

    def grid(self) -> list[dict[str, Any]]:
        """All points of a grid sweep as `{option: value}`; the file's last parameter varies fastest."""
        values = [p.grid() for p in self.parameters]
        return [
            dict(zip([p.name for p in self.parameters], point, strict=True)) for point in itertools.product(*values)
        ]

    def corners(self) -> list[dict[str, Any]]:
        """A few points that show every listed value and both ends of every range."""
        values = [p.corners() for p in self.parameters]
        return [
            {p.name: v[min(i, len(v) - 1)] for p, v in zip(self.parameters, values, strict=True)}
            for i in range(max(map(len, values)))
        ]

    def flags(self, point: dict[str, Any]) -> list[str]:
        """What the script is given at one point: the command's own flags, and the parameters as `${args}` has them."""
        words = self._words(point, FORMS[0])
        return words[words.index(self.program) + 1 :]

    def words(self, point: dict[str, Any], extra: Sequence[str] = ()) -> list[str]:
        """The command line of one run, as `wandb agent` makes it, and `extra` at its end."""
        return [*self._words(point), *extra]

    def _words(self, point: dict[str, Any], form: str | None = None) -> list[str]:
        """The command line, with the parameters in the form that the command names, or in `form`."""
        macros = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": [sys.executable],
            "${program}": [self.program],
            **{name: arguments(point, form or name) for name in FORMS},
        }
        found = []
        for word in self.command:
            word = _VARIABLE.sub(lambda match: os.environ.get(match[1], match[1]), word)
            found += macros.get(word, [word])
        return found


def arguments(point: dict[str, Any], form: str = FORMS[0]) -> list[str]:
    """The parameters as `wandb agent` passes them: `--a.b=True`, `--lr=1e-05`, `--none=None`, `--list=['x', 1]`.

    Args:
        point: option -> value.
        form: the macro that stands for them.
    """
    items = point.items()
    match form:
        case "${args_json}":
            return [json.dumps(point)]
        case "${args_no_equals}":
            return [word for name, value in items for word in (f"--{name}", str(value))]
        case "${args_no_hyphens}":
            return [f"{name}={value}" for name, value in items]
        case "${args_no_boolean_flags}":  # a switch that is off is left out, and one that is on has no value
            return [
                f"--{name}" if value is True else f"--{name}={value}" for name, value in items if value is not False
            ]
    return [f"--{name}={value}" for name, value in items]


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: the file cannot be read, or holds something that W&B or this project cannot run.
    """
    path = Path(path)
    try:
        return _sweep(path, read_yaml(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_options(sweep: Sweep, parse: Callable[[list[str]], Any]) -> None:
    """Let the script's own parser read what the sweep would pass, before any run is started.

    Args:
        sweep: the sweep; every point of a grid is tried, and the corners of other search spaces.
        parse: reads a list of flags; a `UserError` of it says which option or value is wrong.
    Raises:
        UserError: an option that the script does not know, a value of the wrong type or out of range (a freeze scope
            that is no preset, say), or values that exclude each other.
    """
    for point in sweep.grid() if sweep.method == "grid" else sweep.corners():
        try:
            parse(sweep.flags(point))
        except UserError as error:
            raise UserError(f"{sweep.path}: {error}") from None


def check_metric(sweep: Sweep, known: Sequence[str]) -> None:
    """Refuse a metric that no run of a script logs, before any run is started.

    Args:
        sweep: the sweep; it may have none.
        known: names that a run of its script may log, in which `<task>` and the like stand for any text.
    Raises:
        UserError: so it is.
    """
    patterns = [re.sub("<.*?>", ".+", re.escape(name)) for name in known]
    if sweep.metric is not None and known and not any(re.fullmatch(one, sweep.metric) for one in patterns):
        hint = did_you_mean(sweep.metric, known)
        raise UserError(f"{sweep.path}: metric: no run of {sweep.program} logs {sweep.metric!r}{hint}")


def check_form(sweep: Sweep) -> None:
    """Refuse a form of the parameters that scripts of this project do not read, before any run is started.

    `${args_no_boolean_flags}` is the worst of them: it leaves out what is false, and the script's default, true, holds.

    Raises:
        UserError: so it is.
    """
    if (form := sweep.command[-1]) not in READ_HERE:
        raise UserError(f"{sweep.path}: command: {sweep.program} does not read {form}; use {' or '.join(READ_HERE)}")


def _sweep(path: Path, content: Any) -> Sweep:
    content = _mapping(content, "the file", "a sweep")
    for key in ("program", "method", "parameters"):
        if key not in content:
            raise UserError(f"{key} is missing")
    method = content["method"]
    if method not in METHODS:
        raise UserError(f"method: {shown(method)} is none of {', '.join(METHODS)}")
    if not isinstance(content["program"], str):
        raise UserError(f"program: expected the path of a script, got {shown(content['program'])}")
    if not isinstance(content["parameters"], dict) or not content["parameters"]:
        raise UserError("parameters: expected option names with their values")
    parameters = tuple(read_parameter(str(key), spec, method) for key, spec in content["parameters"].items())
    run_cap = content.get("run_cap")
    name = content.get("name", path.stem)
    name = str(name) if type(name) in (int, float) else name
    if not isinstance(name, str) or Path(name).name != name or name == ".." or len(name.encode()) > 200:
        raise UserError(f"name: {shown(name)} becomes a folder's name, so one word without slashes")
    if not isinstance(content.get("project"), str | None):
        raise UserError(f"project: expected text, got {shown(content['project'])}")
    if method == "grid":
        _check_grid(parameters)
    return Sweep(
        path=path,
        name=name,
        program=content["program"],
        method=method,
        **_metric(content, method),
        parameters=parameters,
        **_hyperband(content.get("early_terminate")),
        run_cap=None if run_cap is None else _whole(run_cap, "run_cap", 1),
        command=_command(content.get("command", list(COMMAND))),
        project=content.get("project"),
    )


def _metric(content: dict[str, Any], method: str) -> dict[str, Any]:
    """What a sweep wants of its runs; nothing where it only tries points."""
    if "metric" not in content:
        if asks := "method: bayes" if method == "bayes" else "early_terminate" * ("early_terminate" in content):
            raise UserError(f"metric is missing: {asks} decides by it")
        return {"metric": None, "maximize": False}
    metric = _mapping(content["metric"], "metric", "metric")
    goal, target = metric.get("goal", "minimize"), metric.get("target")
    if not isinstance(metric.get("name"), str) or goal not in ("minimize", "maximize"):
        raise UserError(f"metric: needs a name, and a goal that is minimize or maximize; got {shown(metric)}")
    target = None if target is None else float(number(target, "metric.target"))
    return {"metric": metric["name"], "maximize": goal == "maximize", "target": target}


def _check_grid(parameters: Sequence[Parameter]) -> None:
    points = math.prod(len(p.choices) or int(p.high) - int(p.low) + 1 for p in parameters)  # len() has 63 bits
    if points > LARGEST_GRID:
        raise UserError(
            f"parameters: a grid of {points:,} points, more than {LARGEST_GRID:,}; list fewer values, or use the "
            "method random with a run_cap"
        )


def _hyperband(spec: Any) -> dict[str, int]:
    """`min_iter` and `eta`: of runs that logged more than min_iter, min_iter * eta, ... values the best 1 / eta go on.

    More than: the first evaluation, before training, tells no runs apart.
    """
    if spec is None:
        return {}
    spec = _mapping(spec, "early_terminate", "early_terminate")
    if spec.get("type") != "hyperband":
        raise UserError(f"early_terminate: type {shown(spec.get('type'))} is not supported; use hyperband")
    eta = _whole(spec.get("eta", 3), "early_terminate.eta", 2)
    if "min_iter" in spec:
        return {"min_iter": _whole(spec["min_iter"], "early_terminate.min_iter", 1), "eta": eta}
    if "max_iter" not in spec or "s" not in spec:
        raise UserError("early_terminate: hyperband needs min_iter, or max_iter and s")
    most, brackets = (_whole(spec[key], f"early_terminate.{key}", 1) for key in ("max_iter", "s"))
    if brackets >= 64:  # more than any number of evaluations can be halved
        return {"min_iter": 1, "eta": eta}
    return {"min_iter": max(most // eta**brackets, 1), "eta": eta}


def _command(words: Any) -> tuple[str, ...]:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"command: expected a list of words, got {shown(words)}")
    for word in words:
        if word.startswith("${") and word not in MACROS and not _VARIABLE.match(word):
            raise UserError(f"command: {word} is not supported; use {', '.join(MACROS)} or ${{envvar:NAME}}")
    if not words or words[-1] not in FORMS or "${program}" not in words:
        raise UserError("command: needs ${program}, and ${args}, or another form of it, at its end")
    return tuple(words)


def _mapping(value: Any, where: str, kind: str) -> dict[str, Any]:
    return mapping(value, where, kind, _KEYS[kind])


def _whole(value: Any, where: str, least: int) -> int:
    if type(value) is not int or value < least:
        raise UserError(f"{where}: expected a whole number of at least {least}, got {shown(value)}")
    return value
