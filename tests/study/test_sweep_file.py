"""Sweep files: the shipped ones, what is drawn from them and passed on, and wrong ones refused in one line."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import sweep_local
from study_worlds import write_sweep
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from worlds import ROOT

from research.errors import UserError
from research.study.sweep_file import FORMS, arguments, check_options, load_sweep

RATE = "algorithm.cfg.learning_rate"
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_are_accepted_and_have_the_size_they_say(path):
    sweep = load_sweep(path)
    check_options(sweep, partial(sweep_local.config_of, program=sweep.program))
    evaluates = "trainer.enable_eval" not in {parameter.name for parameter in sweep.parameters}
    assert (ROOT / sweep.program).is_file() and sweep.maximize
    assert sweep.metric == ("eval/success_rate" if evaluates else "rollout/success_rate")
    runs = {"freeze": 15, "learning_rate": 15, "bayes": 40}
    runs |= {"freeze_learning_rate": 50, "freeze_learning_rate_confirm": 25, "language_rate": 5}
    runs |= {"algorithms_ppo_rates": 12, "algorithms_group_rates": 18, "algorithms_ppo": 10, "algorithms_group": 30}
    runs |= {"algorithms_equal_time": 10}
    runs |= {"starts_rates": 72, "starts_scopes": 120, "starts_scopes_runners_up": 25}
    runs |= {"starts_long": 40, "starts_equal_time": 40}
    runs |= {"metaworld_ppo_rates": 6, "metaworld_group_rates": 12}
    runs |= {"metaworld_ppo_rates_ends": 2, "metaworld_group_rates_ends": 4}
    runs |= {"metaworld_ppo": 5, "metaworld_grpo": 5, "metaworld_rloo": 5, "metaworld_ppo_equal_time": 5}
    runs |= {"pretrained_scopes_rates": 42, "pretrained_scopes_rates_ends": 6, "pretrained_scopes": 35}
    assert (sweep.run_cap or len(sweep.grid())) == runs[path.stem]
    assert sweep.name == path.stem and sweep.project == "vla-rl"
    starts = [point.get("policy.vla_config.model_path") for point in sweep.grid()] if sweep.method == "grid" else []
    assert all(start is None or (ROOT / start).is_file() for start in starts)


def test_options_are_those_of_the_sweeps_own_script():
    sweep = load_sweep(ROOT / "sweeps" / "algorithms_group_rates.yaml")
    config = sweep_local.config_of(sweep.flags(sweep.grid()[0]), sweep.program)
    assert config.algorithm.name == "grpo" and config.algorithm.cfg.groups == 64
    with pytest.raises(UserError, match="algorithm.cfg"):
        check_options(sweep, sweep_local.config_of)


def test_each_scope_has_its_own_range_and_the_ranges_share_their_rates():
    rates = {}
    for point in load_sweep(ROOT / "sweeps" / "freeze_learning_rate.yaml").grid():
        config = sweep_local.config_of(arguments(point))
        rates.setdefault(config.policy.freeze, set()).add(config.algorithm.cfg.learning_rate)
    assert set(rates) == {"none", "vision", "language", "backbone", "lora"}
    assert all(len(r) == 5 for r in rates.values())
    assert max(rates["none"]) < max(rates["vision"]) < max(rates["backbone"])
    assert 1e-4 in set.intersection(*rates.values())  # bit-equal, so a heat map has common columns
    assert len(set.union(*rates.values())) == 7


def test_a_grid_is_in_the_order_of_the_file_and_corners_show_every_value():
    sweep = load_sweep(write_sweep(parameters={"policy.freeze": {"value": "none"}}))
    assert sweep.varied == ["trainer.seed", RATE]
    points = [(1, 0.5), (1, 1.0), (2, 0.5), (2, 1.0)]
    assert sweep.grid() == [{"trainer.seed": seed, RATE: rate, "policy.freeze": "none"} for seed, rate in points]
    ranges = {"trainer.seed": {"values": [1, 2, 3]}, RATE: {"min": 0.25, "max": 4.0}}
    corners = load_sweep(write_sweep(method="random", parameters=ranges)).corners()
    assert [(corner["trainer.seed"], corner[RATE]) for corner in corners] == [(1, 0.25), (2, 4.0), (3, 4.0)]


def test_a_run_is_called_with_the_commands_own_flags_and_the_point():
    point = {"policy.freeze": ["fusion", "x"], RATE: 1e-5, "trainer.resume": None}
    given = [f"--{RATE}=1e-05", "--trainer.resume=None"]
    command = ["${env}", "${interpreter}", "${program}", "--config=a.json", "${args}"]
    sweep = load_sweep(write_sweep(command=command))
    flags = ["--config=a.json", "--policy.freeze=['fusion', 'x']", *given]
    assert sweep.flags(point) == flags
    assert sweep.words(point, ["--more"]) == ["/usr/bin/env", sys.executable, "script.py", *flags, "--more"]
    assert load_sweep(write_sweep()).flags(point) == flags[1:] == arguments(point)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"min_iter": 4}, (4, 3)),
        ({"min_iter": 4, "eta": 2}, (4, 2)),
        ({"max_iter": 27, "s": 2}, (3, 3)),
        ({"max_iter": 3, "s": 4, "eta": 2}, (1, 2)),
        ({"max_iter": 27, "s": 10**18}, (1, 3)),  # 3 to that power would never end
    ],
)
def test_hyperband_begins_at_min_iter_or_at_its_lowest_bracket(spec, expected):
    sweep = load_sweep(write_sweep(early_terminate={"type": "hyperband", **spec}))
    assert (sweep.min_iter, sweep.eta) == expected


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_passed_in_the_forms_of_wandb(form):
    """Its own client says what each is."""
    point = {"a.b": 1e-5, "on": True, "off": False, "none": None, "list": ["x", 1], "text": "two words"}
    asked = create_sweep_command_args({"args": {name: {"value": value} for name, value in point.items()}})
    assert arguments(point, form) == asked[form[2:-1]]
    sweep = load_sweep(write_sweep(command=["${interpreter}", "${program}", form]))
    assert sweep.words({RATE: 0.5}, ["--more"])[2:] == [*arguments({RATE: 0.5}, form), "--more"]
    check_options(sweep, sweep_local.config_of)  # the options and values; the script itself knows its form


def test_environment_variables_stand_in_a_command_as_with_wandb(monkeypatch):
    monkeypatch.setenv("DATA", "/data sets")
    monkeypatch.delenv("NOWHERE", raising=False)
    command = ["${interpreter}", "${program}", "--data=${envvar:DATA}/${envvar:DATA}", "${envvar:NOWHERE}", "${args}"]
    words = load_sweep(write_sweep(command=command)).words({})
    assert words[2:] == create_sweep_command(command)[2:-1] == ["--data=/data sets//data sets", "NOWHERE"]


def test_a_sweep_that_only_tries_points_needs_no_metric():
    for method in ("grid", "random"):
        ranges = {RATE: {"min": 0.25, "max": 4.0}} if method == "random" else {}
        sweep = load_sweep(write_sweep(method=method, metric=None, parameters=ranges))
        assert sweep.metric is None and sweep.target is None


BAD = [
    ({"metod": "grid"}, "unknown key 'metod'; did you mean method?"),
    ({"method": "annealing"}, "'annealing' is none of grid, random, bayes"),
    ({"parameters": {RATE: {"value": "1e-5"}}}, "1e-5 is text to YAML, not a number; write 1.0e-5"),
    ({"parameters": {RATE: {"values": [1.0, "1.5e5"]}}}, "1.5e5 is text to YAML, not a number; write 1.5e+5"),
    ({"parameters": {RATE: {"min": "1e-5", "max": 1.0}}, "method": "random"}, "write 1.0e-5"),
    ({"parameters": {RATE: {"min": 0.1, "max": 1.0}}}, "a grid needs values, not a range"),
    ({"parameters": {RATE: {"values": []}}}, "expected a list that is not empty"),
    ({"parameters": {RATE: {}}}, "needs values, value, or min and max"),
    ({"parameters": {RATE: None}}, "expected keys and values"),
    ({"parameters": {RATE: {"values": [1.0, 1.0]}}}, "listed twice"),
    ({"parameters": {RATE: {"values": [1.0], "min": 1}}}, "values leaves no room for min"),
    ({"parameters": {RATE: {"vales": [1.0]}}}, "did you mean values?"),
    ({"parameters": {"policy.freez": {"value": "none"}}}, "did you mean --policy.freeze?"),
    ({"parameters": {"policy.freeze": {"values": ["none", "visoin"]}}}, "'visoin' is none of the presets"),
    ({"parameters": {"trainer.seed": {"values": [1, -1]}}}, "trainer.seed"),
    ({"parameters": {"policy": {"parameters": {"freeze": {"value": "none"}}}}}, "write dotted names"),
    ({"parameters": {RATE: {"distribution": "normal", "mu": 1}}}, "not a range (distribution normal"),
    ({"parameters": {RATE: {"distribution": "normal", "mean": 1}}, "method": "random"}, "unknown key 'mean'"),
    ({"parameters": {RATE: {"min": 1.0}}, "method": "random"}, "max is missing"),
    ({"parameters": {RATE: {"min": 2.0, "max": 1.0}}, "method": "random"}, "needs min < max"),
    ({"parameters": {RATE: {"min": 0.0, "max": 1.0, "distribution": "log_uniform_values"}}, "method": "random"},
     "greater than 0"),
    ({"method": "random"}, "give it a run_cap, or --trials=N"),
    ({"early_terminate": {"type": "envelope"}}, "use hyperband"),
    ({"early_terminate": {"type": "hyperband"}}, "needs min_iter, or max_iter and s"),
    ({"metric": None, "method": "bayes"}, "metric is missing: method: bayes decides by it"),
    ({"metric": None, "early_terminate": {"type": "hyperband", "min_iter": 1}}, "early_terminate decides by it"),
    ({"metric": {"name": "x", "goal": "max"}}, "minimize or maximize"),
    ({"command": ["python", "${program}"]}, "${args}, or another form of it, at its end"),
    ({"command": ["${program}", "${args_json_file}"]}, "${args_json_file} is not supported; use ${env}"),
    ({"command": []}, "needs ${program}"),
    ({"program": "nowhere.py"}, "program: nowhere.py does not exist (current directory: /"),
    ({"parameters": {RATE: {"min": 1, "max": 2, "distribution": ["x"]}}, "method": "random"}, "['x'] is not supported"),
    ({"parameters": {RATE: {"min": -9.0e307, "max": 9.0e307}}, "method": "random"}, "the range is too wide"),
    ({"parameters": {RATE: {"min": 0.0, "max": 1.0, "q": 1.0e-300, "distribution": "q_uniform"}}, "method": "random"},
     "the range is too wide for steps of 1e-300"),
    ({"parameters": {"trainer.seed": {"min": 1, "max": 10**9}}}, "a grid of 2,000,000,000 points, more than 10,000"),
    ({"parameters": {"trainer.seed": {"min": -(2**63) + 1, "max": 2**63 - 1}}}, "a grid of 36,893,488,147,419,"),
    ({"parameters": {RATE: {"values": [[1.0] * 99] * 2}}}, "1.0, 1... is listed twice"),
    ({"name": ".."}, "name: '..' becomes a folder's name"),
    ({"name": ["x"]}, "name: ['x'] becomes a folder's name"),
    ({"name": "x" * 201}, "becomes a folder's name"),
    ({"project": ["x"]}, "project: expected text, got ['x']"),
    ({"run_cap": 0}, "run_cap: expected a whole number of at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_sweep_files_are_one_line_and_start_nothing(capsys, changes, message):
    assert sweep_local.main([write_sweep(**changes)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: s.yaml: ") and "\n" not in error
    assert message in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not YAML"), ("", "expected keys and values"), (None, "cannot be read")]
)
def test_files_that_are_no_sweep(text, message):
    if text is not None:
        Path("s.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_sweep("s.yaml")
