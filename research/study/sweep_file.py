"""W&B sweep files, read without W&B: what a sweep varies, checked before its first run.

A sweep file works as it is with `wandb sweep`; this module is what `experiments/sweep_local.py` reads it with.

| key               | meaning                                                                                |
|-------------------|----------------------------------------------------------------------------------------|
| `program`         | the script each run calls                                                              |
| `method`          | `grid`, `random` or `bayes`                                                            |
| `metric`          | `name`, `goal` (`minimize`, W&B's default, or `maximize`), `target` (stop once reached) |
| `parameters`      | dotted option name -> `value`, `values`, or `min` / `max` and a `distribution`         |
| `early_terminate` | `type: hyperband` with `min_iter`, or `max_iter` and `s`; `eta`                        |
| `run_cap`         | most runs of a random or Bayesian sweep                                                |
| `command`         | words, and the macros `${env}`, `${interpreter}`, `${program}`, `${args}`              |
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from research.plain_yaml import read_yaml, shown
from research.schema import UserError

METHODS = ("grid", "random", "bayes")
COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
# distribution -> (drawn on a log scale, rounded to a multiple of q, integers only)
DISTRIBUTIONS = {
    "uniform": (False, False, False),
    "int_uniform": (False, False, True),
    "q_uniform": (False, True, False),
    "log_uniform_values": (True, False, False),
    "q_log_uniform_values": (True, True, False),
}
LARGEST_GRID = 10_000  # points; each is tried on the script's own parser before the first run
_KEYS = {
    "a sweep": (
        "program", "method", "metric", "parameters", "early_terminate", "run_cap", "command", "name", "description",
        "project", "entity",
    ),
    "metric": ("name", "goal", "target"),
    "early_terminate": ("type", "min_iter", "max_iter", "s", "eta"),
    "a parameter": ("value", "values", "min", "max", "q", "distribution"),
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One swept option: listed `choices`, or a range from `low` to `high`."""

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    q: float | None = None
    integer: bool = False

    def distribution(self) -> BaseDistribution:
        """The Optuna distribution to draw from; `value` turns what was drawn into the option's value."""
        if self.choices:  # by position: Optuna stores no lists, and takes True for 1
            return CategoricalDistribution(tuple(range(len(self.choices))))
        if self.integer:
            return IntDistribution(int(self.low), int(self.high))
        return FloatDistribution(self.low, self.high, log=self.log)

    def value(self, drawn: Any) -> Any:
        """The option's value for a number drawn from `distribution`."""
        if self.choices:
            return self.choices[drawn]
        if self.q is None:
            return drawn
        rounded = round(drawn / self.q) * self.q
        return int(rounded) if isinstance(self.q, int) else rounded


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked. `parameters` are in the file's order; fixed ones have one choice."""

    path: Path
    name: str
    program: str
    method: str
    metric: str
    maximize: bool
    parameters: tuple[Parameter, ...]
    target: float | None = None
    min_iter: int | None = None
    eta: int = 3
    run_cap: int | None = None
    command: tuple[str, ...] = COMMAND
    project: str | None = None

    @property
    def varied(self) -> list[str]:
        """Names of the parameters that have more than one value."""
        return [p.name for p in self.parameters if len(p.choices) != 1]

    def grid(self) -> list[dict[str, Any]]:
        """All points of a grid sweep as `{option: value}`; the file's last parameter varies fastest."""
        values = [p.choices or range(int(p.low), int(p.high) + 1) for p in self.parameters]
        return [
            dict(zip([p.name for p in self.parameters], point, strict=True)) for point in itertools.product(*values)
        ]

    def corners(self) -> list[dict[str, Any]]:
        """A few points that show every listed value and both ends of every range."""
        values = [p.choices or (p.value(p.low), p.value(p.high)) for p in self.parameters]
        return [
            {p.name: v[min(i, len(v) - 1)] for p, v in zip(self.parameters, values, strict=True)}
            for i in range(max(map(len, values)))
        ]

    def flags(self, point: dict[str, Any]) -> list[str]:
        """What the script is given at one point: the command's own flags, and the parameters as `${args}`."""
        words = self.words(point)
        return words[words.index(self.program) + 1 :]

    def words(self, point: dict[str, Any], extra: Sequence[str] = ()) -> list[str]:
        """The command line of one run, as `wandb agent` makes it, and `extra` at its end."""
        macros = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": [sys.executable],
            "${program}": [self.program],
            "${args}": arguments(point),
        }
        return [*(word for part in self.command for word in macros.get(part, [part])), *extra]


def arguments(point: dict[str, Any]) -> list[str]:
    """Flags in the form that `wandb agent` passes: `--a.b=True`, `--lr=1e-05`, `--none=None`, `--list=['x', 1]`."""
    return [f"--{name}={value}" for name, value in point.items()]


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


def _sweep(path: Path, content: Any) -> Sweep:
    content = _mapping(content, "the file", "a sweep")
    for key in ("program", "method", "metric", "parameters"):
        if key not in content:
            raise UserError(f"{key} is missing")
    method = content["method"]
    if method not in METHODS:
        raise UserError(f"method: {shown(method)} is none of {', '.join(METHODS)}")
    if not isinstance(content["program"], str):
        raise UserError(f"program: expected the path of a script, got {shown(content['program'])}")
    metric = _mapping(content["metric"], "metric", "metric")
    goal = metric.get("goal", "minimize")
    if not isinstance(metric.get("name"), str) or goal not in ("minimize", "maximize"):
        raise UserError(f"metric: needs a name, and a goal that is minimize or maximize; got {shown(metric)}")
    target = metric.get("target")
    if not isinstance(content["parameters"], dict) or not content["parameters"]:
        raise UserError("parameters: expected option names with their values")
    parameters = tuple(_parameter(str(key), spec, method) for key, spec in content["parameters"].items())
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
        metric=metric["name"],
        maximize=goal == "maximize",
        target=None if target is None else float(_number(target, "metric.target")),
        parameters=parameters,
        **_hyperband(content.get("early_terminate")),
        run_cap=None if run_cap is None else _whole(run_cap, "run_cap", 1),
        command=_command(content.get("command", list(COMMAND))),
        project=content.get("project"),
    )


def _check_grid(parameters: Sequence[Parameter]) -> None:
    points = math.prod(len(p.choices) or int(p.high) - int(p.low) + 1 for p in parameters)
    if points > LARGEST_GRID:
        raise UserError(
            f"parameters: a grid of {points:,} points, more than {LARGEST_GRID:,}; list fewer values, or use the "
            "method random with a run_cap"
        )


def _parameter(name: str, spec: Any, method: str) -> Parameter:
    where = f"parameters.{name}"
    if isinstance(spec, dict) and "parameters" in spec:
        raise UserError(f"{where}: nested parameters reach no option; write dotted names, as in {name}.<option>")
    spec = _mapping(spec, where, "a parameter")
    given = spec.get("distribution")
    listed = {"value": "constant", "values": "categorical"}
    for key, kind in listed.items():
        if key not in spec:
            continue
        if others := [k for k in spec if k not in (key, "distribution")] + (
            [given] if given not in (None, kind) else []
        ):
            raise UserError(f"{where}: {key} leaves no room for {', '.join(map(str, others))}")
        values = [spec[key]] if key == "value" else spec[key]
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: values: expected a list that is not empty, got {shown(values)}")
        for value in values:
            _no_number_as_text(value, where)
        if twice := _repeated(values):
            raise UserError(f"{where}: values: {shown(twice[0])} is listed twice")
        return Parameter(name, tuple(values))

    missing = [key for key in ("min", "max") if key not in spec]
    if given in (None, *DISTRIBUTIONS) and missing:
        raise UserError(
            f"{where}: needs values, value, or min and max" + (f"; {missing[0]} is missing" if spec else "")
        )
    if given is None:
        given = "int_uniform" if all(type(spec[key]) is int for key in ("min", "max")) else "uniform"
    if not isinstance(given, str) or given not in DISTRIBUTIONS:
        raise UserError(f"{where}: distribution {shown(given)} is not supported; use one of {', '.join(DISTRIBUTIONS)}")
    if method == "grid" and given != "int_uniform":
        raise UserError(f"{where}: a grid needs values, not a range (distribution {given})")
    log, rounded, integer = DISTRIBUTIONS[given]
    low, high = (_number(spec[key], f"{where}.{key}") for key in ("min", "max"))
    if not low < high or (log and low <= 0) or (integer and not all(type(v) is int for v in (low, high))):
        kind = "whole numbers" if integer else "numbers greater than 0" if log else "numbers"
        raise UserError(f"{where}: {given} needs min < max, both {kind}; got {low} and {high}")
    if "q" in spec and not rounded:
        raise UserError(f"{where}: q belongs to q_uniform and q_log_uniform_values, not to {given}")
    q = _number(spec.get("q", 1), f"{where}.q") if rounded else None
    if q is not None and q <= 0:
        raise UserError(f"{where}: q must be greater than 0, got {q}")
    if not math.isfinite(high - low) or (q is not None and max(abs(low), abs(high)) / q > 1e15):
        raise UserError(f"{where}: the range is too wide" + ("" if q is None else f" for steps of {q}"))
    return Parameter(name, low=low, high=high, log=log, q=q, integer=integer)


def _repeated(values: list[Any]) -> list[Any]:
    """Those values, with their types, that stand in the list before."""
    seen, repeated = set(), []
    for value in values:
        key = repr(value)  # 1, 1.0 and True differ in it, as they do on a command line
        if key in seen:
            repeated.append(value)
        seen.add(key)
    return repeated


def _hyperband(spec: Any) -> dict[str, int]:
    """`min_iter` and `eta`: after min_iter, min_iter * eta, ... evaluations only the best 1 / eta of the runs go on."""
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
        if word.startswith("${") and word not in COMMAND:
            raise UserError(f"command: {word} is not supported; use {', '.join(COMMAND)}")
    if words[-1:] != ["${args}"] or "${program}" not in words:
        raise UserError("command: needs ${program}, and ${args} at its end")
    return tuple(words)


def _mapping(value: Any, where: str, kind: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected keys and values, got {shown(value)}")
    for key in value:
        if key not in _KEYS[kind]:
            close = get_close_matches(str(key), _KEYS[kind], 1)
            hint = f"did you mean {close[0]}?" if close else f"{kind} has {', '.join(_KEYS[kind])}"
            raise UserError(f"{where}: unknown key {shown(key)}; {hint}")
    return value


def _number(value: Any, where: str) -> float:
    _no_number_as_text(value, where)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{where}: expected a number, got {shown(value)}")
    return value


def _whole(value: Any, where: str, least: int) -> int:
    if type(value) is not int or value < least:
        raise UserError(f"{where}: expected a whole number of at least {least}, got {shown(value)}")
    return value


def _no_number_as_text(value: Any, where: str) -> None:
    """Refuse text that was meant as a number: to YAML, 1e-5 and 1.0e5 are text."""
    for item in value if isinstance(value, list) else [value]:
        match = re.fullmatch(r"([-+]?\d+)(\.\d*)?[eE]([-+]?)(\d+)", item) if isinstance(item, str) else None
        if match:
            whole, fraction, sign, power = match.groups()
            number = f"{whole}{fraction or '.0'}e{sign or '+'}{power}"
            raise UserError(f"{where}: {item} is text to YAML, not a number; write {number}")
