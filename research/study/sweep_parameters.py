"""The parameters of W&B sweep files: listed values and distributions, drawn by Optuna, with W&B's meaning.

| distribution                                     | keys                          | drawn                             |
|--------------------------------------------------|-------------------------------|-----------------------------------|
| `constant`, `categorical`                        | `value`; `values`             | as listed, each as often          |
| `categorical_w_probabilities`                    | `values`, `probabilities`     | as listed, each so often          |
| `uniform`, `int_uniform`                         | `min`, `max`                  | evenly                            |
| `log_uniform_values`, `inv_log_uniform_values`   | `min`, `max`                  | evenly on a log scale, either one |
| `normal`, `log_normal`                           | `mu` = 0, `sigma` = 1         | normal; e to the power of it      |
| `q_` before `uniform`, `log_uniform_values`,     | the same, and `q` = 1         | rounded to a multiple of q        |
| `normal`, `log_normal`                           |                               |                                   |

Whether and how a distribution has to be named is W&B's, too: `values` with `probabilities`, whole `min` and `max`, and
other `min` and `max` name theirs. Not supported: `log_uniform`, `inv_log_uniform`, `q_log_uniform` (of exponents),
`beta`, `q_beta`, and nested `parameters`, which reach no option.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate
from statistics import NormalDist
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from research.errors import UserError
from research.plain_yaml import shown

# distribution -> (drawn on a log scale, rounded to a multiple of q, integers only)
RANGES = {
    "uniform": (False, False, False),
    "int_uniform": (False, False, True),
    "q_uniform": (False, True, False),
    "log_uniform_values": (True, False, False),
    "inv_log_uniform_values": (True, False, False),  # log(1 / x) is uniform where log(x) is
    "q_log_uniform_values": (True, True, False),
}
# distribution -> (e to the power of what is drawn, rounded to a multiple of q)
NORMALS = {
    "normal": (False, False),
    "log_normal": (True, False),
    "q_normal": (False, True),
    "q_log_normal": (True, True),
}
LISTED = ("constant", "categorical", "categorical_w_probabilities")
TAIL = 1e-9  # of a normal distribution, either side, is never drawn: it ends at 6 sigma
SHOWN = (0.05, 0.95)  # quantiles that stand for the ends of a normal distribution, which has none
_KEYS = ("value", "values", "probabilities", "min", "max", "mu", "sigma", "q", "distribution")


@dataclass(frozen=True)
class Parameter:
    """One swept option: listed `choices`, a range from `low` to `high`, or a normal distribution where `sigma` > 0.

    `log`: the range is even on a log scale; what is drawn from the normal distribution is a logarithm.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    q: float | None = None
    integer: bool = False
    probabilities: tuple[float, ...] = ()
    mu: float = 0.0
    sigma: float = 0.0

    def distribution(self) -> BaseDistribution:
        """The Optuna distribution to draw from; `value` turns what was drawn into the option's value."""
        if self.probabilities:  # a quantile: Optuna draws choices alike
            return FloatDistribution(0.0, 1.0)
        if self.choices:  # by position: Optuna stores no lists, and takes True for 1
            return CategoricalDistribution(tuple(range(len(self.choices))))
        if self.sigma:  # a quantile: Optuna has no normal distribution
            return FloatDistribution(TAIL, 1 - TAIL)
        if self.integer:
            return IntDistribution(int(self.low), int(self.high))
        return FloatDistribution(self.low, self.high, log=self.log)

    def value(self, drawn: Any) -> Any:
        """The option's value for a number drawn from `distribution`."""
        if self.probabilities:
            above = (i for i, total in enumerate(accumulate(self.probabilities)) if total > drawn)
            return self.choices[next(above, self._last_likely())]
        if self.choices:
            return self.choices[drawn]
        if self.sigma:
            drawn = NormalDist(self.mu, self.sigma).inv_cdf(drawn)
            drawn = math.exp(drawn) if self.log else drawn
        if self.q is None:
            return drawn
        rounded = round(drawn / self.q) * self.q
        return int(rounded) if isinstance(self.q, int) else rounded

    def corners(self) -> tuple[Any, ...]:
        """Every listed value, or the ends of the range."""
        if self.choices:
            return self.choices
        return tuple(map(self.value, SHOWN if self.sigma else (self.low, self.high)))

    def grid(self) -> Sequence[Any]:
        """All values in a grid, where it can be in one."""
        return self.choices or range(int(self.low), int(self.high) + 1)

    def _last_likely(self) -> int:
        """The last choice that is ever drawn: rounded, probabilities may sum to a little less than 1."""
        return max(i for i, probability in enumerate(self.probabilities) if probability > 0)


def read_parameter(name: str, spec: Any, method: str) -> Parameter:
    """What a sweep file says of one parameter, checked.

    Args:
        name: of the option.
        spec: the mapping that stands under it.
        method: the sweep's; a grid takes no distribution but `int_uniform` and, as its steps, `q_uniform`.
    Raises:
        UserError: W&B has no such parameter, or it is not supported here.
    """
    where = f"parameters.{name}"
    if isinstance(spec, dict) and "parameters" in spec:
        raise UserError(f"{where}: nested parameters reach no option; write dotted names, as in {name}.<option>")
    spec = mapping(spec, where, "a parameter", _KEYS)
    if "value" in spec or "values" in spec:
        return _listed(name, spec, where, method)
    given = spec.get("distribution")
    if isinstance(given, str) and given in NORMALS:
        return _normal(name, spec, where, method)
    return _range(name, spec, where, method)


def _listed(name: str, spec: dict[str, Any], where: str, method: str) -> Parameter:
    key = "value" if "value" in spec else "values"
    keys = {"value": ("value",), "values": ("values", "probabilities")}[key]
    kind = "constant" if key == "value" else LISTED[1 + ("probabilities" in spec)]
    given = spec.get("distribution")
    others = [k for k in spec if k not in (*keys, "distribution")] + ([given] if given not in (None, kind) else [])
    if others:
        raise UserError(f"{where}: {key} leaves no room for {', '.join(map(str, others))}")
    values = [spec[key]] if key == "value" else spec[key]
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: values: expected a list that is not empty, got {shown(values)}")
    for value in values:
        no_number_as_text(value, where)
    if twice := _repeated(values):
        raise UserError(f"{where}: values: {shown(twice[0])} is listed twice")
    if "probabilities" not in spec:
        return Parameter(name, tuple(values))
    if method == "grid":
        raise UserError(f"{where}: a grid runs every value once, so probabilities mean nothing in it; leave them out")
    given = spec["probabilities"]
    if not isinstance(given, list) or len(given) != len(values):
        raise UserError(
            f"{where}.probabilities: expected {len(values)} numbers, one for each value, got {shown(given)}"
        )
    weights = tuple(number(item, f"{where}.probabilities") for item in given)
    if min(weights) < 0 or not math.isclose(sum(weights), 1.0, rel_tol=1e-5, abs_tol=1e-8):  # W&B's tolerance
        raise UserError(f"{where}.probabilities: expected numbers from 0 to 1 that sum to 1, got {shown(given)}")
    return Parameter(name, tuple(values), probabilities=weights)


def _normal(name: str, spec: dict[str, Any], where: str, method: str) -> Parameter:
    given = spec["distribution"]
    log, rounded = NORMALS[given]
    if method == "grid":
        raise UserError(f"{where}: a grid needs values, not a range (distribution {given})")
    known = ("mu", "sigma", *(("q",) if rounded else ()), "distribution")
    if others := [key for key in spec if key not in known]:
        raise UserError(f"{where}: {given} has {', '.join(known[:-1])}, not {others[0]}")
    mu, sigma = (number(spec.get(key, default), f"{where}.{key}") for key, default in (("mu", 0.0), ("sigma", 1.0)))
    if sigma <= 0:
        raise UserError(f"{where}.sigma: must be greater than 0, got {sigma}")
    q = _step(spec, where) if rounded else None
    furthest = abs(mu) + 6 * sigma
    if furthest > (700 if log else 1e300) or (q and (math.exp(furthest) if log else furthest) / q > 1e15):
        raise UserError(f"{where}: the range is too wide" + (f" for steps of {q}" if q else ""))
    return Parameter(name, log=log, q=q, mu=mu, sigma=sigma)


def _range(name: str, spec: dict[str, Any], where: str, method: str) -> Parameter:
    given = spec.get("distribution")
    missing = [key for key in ("min", "max") if key not in spec]
    if given in (None, *RANGES) and missing:
        raise UserError(
            f"{where}: needs values, value, or min and max" + (f"; {missing[0]} is missing" if spec else "")
        )
    if given is None:
        given = "int_uniform" if all(type(spec[key]) is int for key in ("min", "max")) else "uniform"
    if not isinstance(given, str) or given not in RANGES:
        known = ", ".join((*RANGES, *NORMALS, *LISTED))
        if f"{given}_values" in RANGES:
            raise UserError(
                f"{where}: {given} has min and max as exponents of e; use {given}_values, which has the values"
            )
        raise UserError(f"{where}: distribution {shown(given)} is not supported; use one of {known}")
    if others := [key for key in spec if key not in ("min", "max", "q", "distribution")]:
        raise UserError(f"{where}: {given} has min and max, not {others[0]}")
    log, rounded, integer = RANGES[given]
    if method == "grid" and given not in ("int_uniform", "q_uniform"):
        raise UserError(f"{where}: a grid needs values, not a range (distribution {given})")
    low, high = (number(spec[key], f"{where}.{key}") for key in ("min", "max"))
    if not low < high or (log and low <= 0) or (integer and not all(type(v) is int for v in (low, high))):
        kind = "whole numbers" if integer else "numbers greater than 0" if log else "numbers"
        raise UserError(f"{where}: {given} needs min < max, both {kind}; got {low} and {high}")
    if "q" in spec and not rounded:
        raise UserError(f"{where}: q belongs to distributions that begin with q_, not to {given}")
    q = _step(spec, where) if rounded else None
    if not math.isfinite(high - low) or (q is not None and max(abs(low), abs(high)) / q > 1e15):
        raise UserError(f"{where}: the range is too wide" + ("" if q is None else f" for steps of {q}"))
    if method == "grid" and q is not None:
        return Parameter(name, _steps(low, high, q, where))
    return Parameter(name, low=low, high=high, log=log, q=q, integer=integer)


def _steps(low: float, high: float, q: float, where: str) -> tuple[float, ...]:
    """`low`, `low + q`, ... below `high`, without it, as W&B's grid has them."""
    count = math.ceil((high - low) / q)
    if count > 10_000:
        raise UserError(f"{where}: a grid of {count:,} points; take a larger q, or the method random with a run_cap")
    return tuple(low + i * q for i in range(count))


def _step(spec: dict[str, Any], where: str) -> float:
    q = number(spec.get("q", 1), f"{where}.q")
    if q <= 0:
        raise UserError(f"{where}: q must be greater than 0, got {q}")
    return q


def _repeated(values: list[Any]) -> list[Any]:
    """Those values, with their types, that stand in the list before."""
    seen, repeated = set(), []
    for value in values:
        key = repr(value)  # 1, 1.0 and True differ in it, as they do on a command line
        if key in seen:
            repeated.append(value)
        seen.add(key)
    return repeated


# ---- what a sweep file is checked with


def mapping(value: Any, where: str, kind: str, keys: Sequence[str]) -> dict[str, Any]:
    """A mapping that has no other `keys`; `kind` says what has them."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected keys and values, got {shown(value)}")
    for key in value:
        if key not in keys:
            close = get_close_matches(str(key), keys, 1)
            hint = f"did you mean {close[0]}?" if close else f"{kind} has {', '.join(keys)}"
            raise UserError(f"{where}: unknown key {shown(key)}; {hint}")
    return value


def number(value: Any, where: str) -> float:
    """A number that is finite, as it is written."""
    no_number_as_text(value, where)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{where}: expected a number, got {shown(value)}")
    return value


def no_number_as_text(value: Any, where: str) -> None:
    """Refuse text that was meant as a number: to YAML, 1e-5 and 1.0e5 are text."""
    for item in value if isinstance(value, list) else [value]:
        match = re.fullmatch(r"([-+]?\d+)(\.\d*)?[eE]([-+]?)(\d+)", item) if isinstance(item, str) else None
        if match:
            whole, fraction, sign, power = match.groups()
            text = f"{whole}{fraction or '.0'}e{sign or '+'}{power}"
            raise UserError(f"{where}: {item} is text to YAML, not a number; write {text}")
