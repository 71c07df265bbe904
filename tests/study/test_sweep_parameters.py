"""Parameters of sweeps are drawn as W&B draws them; its own engine (the package sweeps 0.3.0) is the oracle."""

from __future__ import annotations

import optuna
import pytest

from research.errors import UserError
from research.study.sweep_parameters import Parameter, read_parameter

QUANTILES = (0.1, 0.25, 0.75, 0.9)
# What `HyperParameter(name, spec).ppf(u)` of that engine gave at these quantiles.
DRAWN = [
    ({"distribution": "normal", "mu": 2.0, "sigma": 0.5}, [1.359224217, 1.662755125, 2.337244875, 2.640775783]),
    ({"distribution": "normal"}, [-1.281551566, -0.6744897502, 0.6744897502, 1.281551566]),
    (
        {"distribution": "log_normal", "mu": -7.0, "sigma": 1.5},
        [0.0001333774675, 0.0003315491064, 0.002508010738, 0.006234401769],
    ),
    ({"distribution": "q_normal", "mu": 10, "sigma": 4, "q": 3}, [6, 6, 12, 15]),
    ({"distribution": "q_log_normal", "mu": 3.0, "sigma": 1.0, "q": 0.5}, [5.5, 10.0, 39.5, 72.5]),
    ({"distribution": "uniform", "min": -1.0, "max": 3.0}, [-0.6, 0.0, 2.0, 2.6]),
    ({"distribution": "q_uniform", "min": 0, "max": 100, "q": 5}, [10, 25, 75, 90]),
    ({"distribution": "log_uniform_values", "min": 1e-5, "max": 0.1}, [2.511886432e-05, 1e-4, 1e-2, 0.03981071706]),
    ({"distribution": "q_log_uniform_values", "min": 1, "max": 1000, "q": 2}, [2, 6, 178, 502]),
    ({"distribution": "inv_log_uniform_values", "min": 1e-5, "max": 0.1}, [2.511886432e-05, 1e-4, 1e-2, 0.03981071706]),
    ({"distribution": "int_uniform", "min": 1, "max": 8}, [1, 2, 6, 8]),
    ({"values": ["a", "b", "c"], "probabilities": [0.2, 0.0, 0.8]}, ["a", "c", "c", "c"]),
    ({"values": ["a", "b"], "probabilities": [0.75, 0.25]}, ["a", "a", "b", "b"]),
]
DRAWS = 2000
TOLERANCE = 0.035  # more than 3 standard errors of a fraction of that many draws


@pytest.mark.parametrize(("spec", "at_quantiles"), DRAWN, ids=[str(spec) for spec, _ in DRAWN])
def test_what_optuna_draws_has_the_quantiles_of_wandb(spec, at_quantiles):
    parameter = read_parameter("a", spec, "random")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    drawn = [parameter.value(study.ask({"a": parameter.distribution()}).params["a"]) for _ in range(DRAWS)]
    for quantile, value in zip(QUANTILES, at_quantiles, strict=True):
        below, up_to = (sum(x < value for x in drawn) / DRAWS, sum(x <= value for x in drawn) / DRAWS)
        assert below - TOLERANCE <= quantile <= up_to + TOLERANCE
    for value, probability in zip(spec.get("values", ()), spec.get("probabilities", ()), strict=True):
        assert drawn.count(value) / DRAWS == pytest.approx(probability, abs=TOLERANCE if probability else 0)


@pytest.mark.parametrize(("spec", "at_quantiles"), DRAWN[:5], ids=[str(spec) for spec, _ in DRAWN[:5]])
def test_a_normal_distribution_is_drawn_by_its_quantiles(spec, at_quantiles):
    parameter = read_parameter("a", spec, "bayes")
    assert [parameter.value(u) for u in QUANTILES] == pytest.approx(at_quantiles, rel=1e-9)
    ends = parameter.distribution()
    low, high = parameter.value(ends.low), parameter.value(ends.high)  # a sampler may propose either end
    assert low < at_quantiles[0] and high > at_quantiles[-1]


def test_values_are_rounded_and_listed_as_wandb_does():
    assert Parameter("a", low=0.1, high=10.0, log=True).distribution().log
    assert Parameter("a", low=0, high=100, q=5).value(12.6) == 15
    assert Parameter("a", low=0.0, high=1.0, q=0.25).value(0.6) == 0.5
    listed = Parameter("a", choices=("none", ["x"], True))
    assert [listed.value(drawn) for drawn in listed.distribution().choices] == ["none", ["x"], True]
    whole = Parameter("a", low=1, high=9, integer=True).distribution()
    assert (whole.low, whole.high) == (1, 9)
    rounded = Parameter("a", choices=("x", "y", "z"), probabilities=(0.3, 0.699999, 0.0))
    assert rounded.value(1.0) == "y"  # the sum falls short of 1, and z is never drawn


def test_a_grid_takes_the_steps_of_a_range_without_its_end():
    """As numpy's arange, which W&B asks."""
    steps = read_parameter("a", {"distribution": "q_uniform", "min": 1, "max": 10, "q": 3}, "grid")
    assert list(steps.grid()) == [1, 4, 7]
    steps = read_parameter("a", {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25}, "grid")
    assert list(steps.grid()) == [0.0, 0.25, 0.5, 0.75]
    assert list(read_parameter("a", {"min": 1, "max": 3}, "grid").grid()) == [1, 2, 3]


def test_corners_show_what_a_script_is_likely_to_be_given():
    assert Parameter("a", ("x", "y"), probabilities=(0.5, 0.5)).corners() == ("x", "y")
    low, high = read_parameter("a", {"distribution": "normal", "mu": 1.0, "sigma": 0.1}, "random").corners()
    assert (low, high) == pytest.approx((1 - 0.1644854, 1 + 0.1644854), abs=1e-6)


@pytest.mark.parametrize(
    ("spec", "method", "message"),
    [
        ({"values": [1, 2], "probabilities": [0.5, 0.5]}, "grid", "probabilities mean nothing in it"),
        ({"values": [1, 2], "probabilities": [1.0]}, "random", "expected 2 numbers, one for each value"),
        ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "random", "from 0 to 1 that sum to 1"),
        ({"values": [1, 2], "probabilities": [1.5, -0.5]}, "random", "from 0 to 1 that sum to 1"),
        ({"values": [1, 2], "probabilities": [0.5, "5e-1"]}, "random", "write 5.0e-1"),
        ({"value": 1, "probabilities": [1.0]}, "random", "value leaves no room for probabilities"),
        ({"distribution": "normal", "min": 1}, "random", "normal has mu, sigma, not min"),
        ({"distribution": "normal", "q": 1}, "random", "normal has mu, sigma, not q"),
        ({"distribution": "normal", "sigma": 0}, "random", "sigma: must be greater than 0"),
        ({"distribution": "log_normal", "mu": 1000}, "random", "the range is too wide"),
        ({"distribution": "q_normal", "q": 0}, "random", "q must be greater than 0"),
        ({"distribution": "uniform", "min": 0.0, "max": 1.0, "mu": 1}, "random", "uniform has min and max, not mu"),
        ({"distribution": "beta"}, "random", "distribution 'beta' is not supported; use one of uniform,"),
        (
            {"distribution": "log_uniform", "min": -5, "max": 0},
            "random",
            "exponents of e; use log_uniform_values",
        ),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 1e-7}, "grid", "a grid of 10,000,000 points"),
    ],
)
def test_what_wandb_would_not_draw_is_refused_in_one_line(spec, method, message):
    with pytest.raises(UserError, match=message) as refused:
        read_parameter("a", spec, method)
    assert str(refused.value).startswith("parameters.a") and "\n" not in str(refused.value)
