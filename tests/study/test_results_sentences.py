"""What RESULTS.md says in sentences, beside its tables, is what the committed rows say."""

from __future__ import annotations

import csv
import json

import numpy as np
import pretraining_study
import pytest
from worlds import ROOT
from written_numbers import section

from research.study.comparison import compare
from research.study.run_table import read_table
from research.study.statistics import difference_interval
from research.training.evaluation import wilson_interval

pytestmark = pytest.mark.numbers

RESULTS = ROOT / "experiments" / "results"
CHECKPOINTS = ROOT / "experiments" / "checkpoints"


def with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


@pytest.fixture(scope="module")
def study():
    return compare(read_table(RESULTS / "freeze_learning_rate" / "runs.csv"), choosing_seeds=(1, 2))


def pair_of(comparison, first: str, second: str):
    return next(pair for pair in comparison.pairs if (pair.first, pair.second) == (first, second))


def test_of_the_study(study):
    text = section("What to freeze, at which learning rate")
    best = pair_of(study, "none", "lora")
    assert f"not separable from each other ({best.difference.value:.3f} apart)" in text
    assert (
        f"would need {best.states:,.0f} initial states, in place of 256, to be told apart by five seeds at a "
        f"difference of {best.difference.value:.3f}." in text
    )
    seconds = {arm.arm: np.mean([run.eval_seconds[-1] for run in arm.runs]) for arm in study.arms}
    full, vision, heads = seconds["none"], seconds["vision"], seconds["backbone"]
    assert (
        f"a run {full / heads:.1f} times shorter than training everything ({heads:.0f} s against {full:.0f} s)" in text
    )
    assert f"freezing the vision encoder {full / vision:.0f} times." in text
    assert f"after {study.seconds:.0f} s the heads alone have finished" in text
    runners_up = {arm.arm: sorted(other.learning_rate for other in arm.runners_up) for arm in study.arms}
    assert runners_up.pop("lora") == []
    sentence = (
        "1e-4 and 2.5e-5 for `none`, 4e-4 and 2.5e-5 for `language`, 1e-4 for `vision`, 4e-4 and 6.4e-3 for `backbone`"
    )
    assert f"by training success, {sentence}" in text
    for words in sentence.split(", "):
        rates, scope = words.split(" for ")
        assert sorted(map(float, rates.split(" and "))) == runners_up.pop(scope.strip("`"))
    assert not runners_up
    costs, above = costs_of_other_rates(study)
    assert f"a quarter of the chosen rate costs {min(costs):.2f} to {max(costs):.2f};" in text
    assert f"at four times of it success is {min(above):.2f} to {max(above):.2f}, but for `language`" in text
    ends = [run.eval_scores[-1] for run in read_table(RESULTS / "main_job" / "runs.csv")]
    assert f"freezes both encoders and ends at {min(ends):.2f} to {max(ends):.2f}." in text


def costs_of_other_rates(study) -> tuple[list[float], list[float]]:
    """What a quarter of each chosen rate costs, and success at four times of it but for `language`, choosing seeds."""
    means = {
        (scope, round(float(np.log(rate) / np.log(4)), 3)): np.mean(
            [r.eval_scores[-1] for r in runs if r.seed in (1, 2)]
        )
        for (scope, rate), runs in study.cells.items()
    }
    chosen = {arm.arm: round(float(np.log(arm.learning_rate) / np.log(4)), 3) for arm in study.arms}
    costs = [means[scope, at] - means[scope, round(at - 1, 3)] for scope, at in chosen.items()]
    return costs, [means[scope, round(at + 1, 3)] for scope, at in chosen.items() if scope != "language"]


def test_of_the_other_rate_of_language(study):
    text = section("The other rate of `language`")
    on = {rate: study.chosen_by["language", rate] for rate in (4e-4, 1e-4)}
    assert f"the rate that lost the choice by {on[4e-4]:.3f} against {on[1e-4]:.3f}?" in text
    again = compare(read_table(RESULTS / "language_rate" / "runs.csv"))
    there, here = (pair_of(each, "vision", "backbone").p_value for each in (study, again))
    assert f"has p = {there:.3f} in the study and {here:.3f} here" in text


def test_of_the_algorithms():
    by = ("algorithm", "algorithm.cfg.advantage")
    runs = read_table(RESULTS / "algorithms" / "runs.csv")
    comparison = compare(runs, choosing_seeds=(1, 2, 3), by=by)
    text = section("PPO, GRPO and RLOO, each at its own rate")
    fresh = {
        cell: np.mean([run.eval_scores[-1] for run in members if run.seed > 10])
        for cell, members in comparison.cells.items()
        if any(run.seed > 10 for run in members)
    }
    ppo = [mean for (arm, _), mean in fresh.items() if "ppo" in arm]
    others = [mean for (arm, _), mean in fresh.items() if "ppo" not in arm]
    assert len(ppo) == 2 and len(others) == 6
    least = np.floor(100 * (min(ppo) - max(others))) / 100
    assert f"Whichever of the carried rates is taken, PPO is ahead by {least:.2f} or more" in text
    carried = {arm.arm: sorted(other.learning_rate for other in arm.runners_up) for arm in comparison.arms}
    assert sorted(carried.values()) == [[3e-4, 1.2e-3], [3e-4, 1.2e-3], [6e-4]]
    assert "and carried along: 6e-4 for PPO, 3e-4 and 1.2e-3 for GRPO and RLOO." in text


def test_of_the_checkpoint_that_ships():
    text = section("The shipped checkpoint")
    facts = json.loads((CHECKPOINTS / "tabletop_pick_place.json").read_text())
    success, low, high = (facts[f"eval/success_{name}"] for name in ("rate", "low", "high"))
    shown = f"**{success:.3f}** [{low:.3f}, {high:.3f}]"
    assert f"| `checkpoints/tabletop_pick_place.pt` | {facts['parameters']:,} | {shown} |" in text
    config = facts["config"]
    assert (
        f"learned to point for {config['pointing_steps']:,} steps, then imitated {config['samples']:,} transitions"
        in text
    )
    assert f"until it solved {config['stop_at']:.2f} of 128 states" in text
    starts = {run.eval_scores[0] for run in read_table(RESULTS / "main_job" / "runs.csv")}
    assert starts == {success}


def test_of_the_clone_of_metaworlds_experts():
    text = section("The clone")
    facts = json.loads((CHECKPOINTS / "metaworld_reach_push_coffee.json").read_text())
    tasks = ("reach-v3", "push-v3", "coffee-pull-v3")
    for name, mode in (("the likeliest action", "eval"), ("samples, as in training", "eval_sample")):
        cells = [f"{facts[f'{mode}/success_rate/{task}']:.2f}" for task in tasks]
        whole = with_interval(*(facts[f"{mode}/success_{each}"] for each in ("rate", "low", "high")))
        assert f"| {name} | {' | '.join(cells)} | {whole} |" in text
    first, second, third = (facts["demonstrations"][task]["successful"] for task in tasks)
    assert {facts["demonstrations"][task]["episodes"] for task in tasks} == {160}
    assert f"({first}, {second} and {third} of them succeeded and were imitated: {facts['samples']:,} looks)" in text
    sizes = f"{facts['trained_parameters'] / 1e6:.2f} M of {facts['parameters'] / 1e6:.1f} M parameters train"
    assert sizes in text and f"{facts['config']['steps']:,} gradient steps" in text
    assert with_interval(121 / 150, *wilson_interval(121, 150)) in text  # evaluated once; no rows are kept


def test_of_ppo_from_it():
    with (RESULTS / "metaworld" / "runs.csv").open() as file:
        rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
    text = section("PPO from it")
    (start,) = {row["success"] for row in rows if row["env_steps"] == 0}
    late = [row["success"] for row in rows if 590_000 < row["env_steps"] < 610_000]
    assert len(late) == 4
    assert f"From {start:.3f} to a mean of {np.mean(late):.3f} at 600,000 control steps" in text
    after = min(row["success"] for row in rows if row["env_steps"] > 400_000)
    assert after > 0.8 and "every seed is above 0.80 from 400,000 on" in text


def test_of_imagenets_weights():
    with (RESULTS / "pretraining" / "runs.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["mode"] == "mode"]
    of = {arm: np.mean([float(r["success"]) for r in rows if r["arm"] == arm]) for arm in {r["arm"] for r in rows}}
    text = section("What ImageNet's weights are worth")
    trained, fresh = of["imagenet+trained"], of["random+trained"]
    assert (
        f"ImageNet's weights are worth {trained - fresh:.2f}: {trained:.2f} of the tasks are solved instead of "
        f"{fresh:.2f}." in text
    )
    assert f"as they are, {of['imagenet+frozen'] - of['random+frozen']:.2f}, three seeds are too few" in text
    table = pretraining_study.read_table(RESULTS / "pretraining" / "runs.csv")
    gains = {
        start: difference_interval(
            *(pretraining_study.scores(table, "clone", f"{start}+{vision}", "mode") for vision in ("trained", "frozen"))
        )
        for start in ("imagenet", "random")
    }
    said = {start: with_interval(gain.value, gain.low, gain.high) for start, gain in gains.items()}
    assert f"pretrained weights gain {said['imagenet']}, and fresh ones nothing that three seeds show" in text
    assert f"show: {said['random']}." in text and gains["random"].low < 0 < gains["imagenet"].low
    seconds = {end: sorted(int(r["seconds"]) for r in rows if r["arm"].endswith(end)) for end in ("frozen", "trained")}
    low, *_, high = seconds["frozen"]
    assert f"{low} to {high} s for a frozen encoder" in text
    *usual, disturbed = seconds["trained"]
    assert f"{round(usual[0], -1)} to {max(usual)} s for one that trains ({disturbed:,} s beside other work)" in text
