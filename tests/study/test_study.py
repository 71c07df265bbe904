"""The study's committed table recomputes its committed report, and RESULTS.md says what the report says."""

from __future__ import annotations

import csv
import json
from collections import Counter

import compare_runs
import numpy as np
import pytest
import sweep_local
from worlds import ROOT
from written_numbers import interval, rate_rows, share

from research.study.comparison import compare
from research.study.report import markdown_table
from research.study.run_table import read_table
from research.study.statistics import difference_interval
from research.study.sweep_file import load_sweep
from research.study.tables import arm_table, pair_table, split_pair_table, split_table

pytestmark = pytest.mark.numbers

STUDY = ROOT / "experiments" / "results" / "freeze_learning_rate"
LOOK_BACK = ROOT / "experiments" / "results" / "language_rate"
CHOOSING = [1, 2]


@pytest.fixture(scope="module")
def comparison():
    return compare(read_table(STUDY / "runs.csv"), choosing_seeds=CHOOSING)


@pytest.mark.parametrize(("folder", "choosing"), [(STUDY, CHOOSING), (LOOK_BACK, [])])
def test_the_table_recomputes_the_report(tmp_path, folder, choosing):
    seeds = ["--choosing_seeds", *map(str, choosing)] if choosing else []
    assert compare_runs.main([f"--table={folder / 'runs.csv'}", *seeds, f"--output={tmp_path}"]) == 0
    again, committed = ((each / "report.md").read_text().split("Made by")[0] for each in (tmp_path, folder))
    assert again == committed
    assert (tmp_path / "runs.csv").read_text() == (folder / "runs.csv").read_text()


def test_the_look_back_changes_the_language_rate_and_nothing_else(comparison):
    runs = {(run.scope, run.seed): run for result in comparison.arms for run in result.runs}
    for run in read_table(LOOK_BACK / "runs.csv"):
        if run.scope == "language":
            assert (run.learning_rate, run.seed in (3, 4, 5, 6, 7)) == (4e-4, True)
        else:
            assert run.episodes == runs[run.scope, run.seed].episodes


def test_the_grid_was_run_as_planned_and_every_run_counts(comparison):
    assert all(run.complete and len(run.episodes[-1]) == 256 for run in comparison.runs)
    rates = Counter((run.scope, run.learning_rate) for run in comparison.runs if run.seed in CHOOSING)
    assert set(rates.values()) == {2} and len(rates) == 25
    assert Counter(scope for scope, _ in rates) == dict.fromkeys(["none", "vision", "language", "backbone", "lora"], 5)
    for result in comparison.arms:
        assert [run.seed for run in result.runs] == [3, 4, 5, 6, 7]
        assert set(result.splits) == {"train", "vision", "semantics", "execution"}


def test_the_second_sweep_confirms_what_the_first_chose(comparison):
    chosen = {result.arm: result.learning_rate for result in comparison.arms}
    points = load_sweep(ROOT / "sweeps" / "freeze_learning_rate_confirm.yaml").grid()
    configs = [sweep_local.config_of([f"--{name}={value}" for name, value in point.items()]) for point in points]
    assert {config.policy.freeze: config.algorithm.cfg.learning_rate for config in configs} == chosen


def test_no_order_at_equal_wall_time_is_claimed_of_schedules_that_were_cut(comparison):
    """All runs annealed, over 33 to 223 s: README and RESULTS may give the column, but no order from it."""
    assert comparison.interrupted and all(run.anneal_lr for run in comparison.runs)
    for name in ("README.md", "experiments/RESULTS.md"):
        text = " ".join((ROOT / name).read_text().split())
        assert "other way round" not in text and "order is reversed" not in text
    assert "the study says nothing of an order" in text
    assert "| success at equal wall time, schedules interrupted |" in text


def test_what_results_say_of_rates_that_were_not_chosen(comparison):
    runners_up = {result.arm: {o.learning_rate for o in result.runners_up} for result in comparison.arms}
    assert runners_up == {
        "none": {1e-4, 2.5e-5}, "language": {4e-4, 2.5e-5}, "vision": {1e-4}, "backbone": {4e-4, 6.4e-3}, "lora": set(),
    }  # fmt: skip
    means = {
        cell: np.mean([run.eval_scores[-1] for run in runs if run.seed in CHOOSING])
        for cell, runs in comparison.cells.items()
    }
    chosen = {result.arm: result.learning_rate for result in comparison.arms}
    at = {
        factor: {
            s: means[next(c for c in means if c[0] == s and np.isclose(c[1], factor * rate))]
            for s, rate in chosen.items()
        }
        for factor in (0.25, 1, 4)
    }
    costs = [at[1][scope] - at[0.25][scope] for scope in chosen]
    assert (f"{min(costs):.2f}", f"{max(costs):.2f}") == ("0.02", "0.06")
    above = [value for scope, value in at[4].items() if scope != "language"]
    assert (f"{min(above):.2f}", f"{max(above):.2f}") == ("0.00", "0.38") and at[4]["language"] > at[1]["language"]
    assert means["language", 1.6e-3] == 0


def test_every_scope_gains_in_every_split(comparison):
    before = json.loads((STUDY / "before.json").read_text())["splits"]
    for result in comparison.arms:
        assert all(mean.value > before[split]["eval/success_rate"] for split, mean in result.splits.items())
    for split in before:
        means = [result.splits[split] for result in comparison.arms]
        assert (max(mean.low for mean in means) <= min(mean.high for mean in means)) == (split != "train")


def test_the_splits_of_the_main_job_are_those_that_are_committed():
    results = (ROOT / "experiments" / "RESULTS.md").read_text()
    before, after = (
        json.loads(path.read_text())["splits"]
        for path in (STUDY / "before.json", STUDY.parent / "main_job/splits.json")
    )
    for split in before:
        cells = [
            f"{m['eval/success_rate']:.3f} [{m['eval/success_low']:.3f}, {m['eval/success_high']:.3f}]"
            for m in (before[split], after[split])
        ]
        assert f"| {split} | {' | '.join(cells)} |" in results


def test_results_say_what_the_report_says(comparison):
    results = (ROOT / "experiments" / "RESULTS.md").read_text()
    for table in (arm_table, pair_table, split_table, split_pair_table):
        for line in markdown_table(table(comparison)):
            assert line in results, f"{table.__name__}: {line}"
    table = arm_table(compare(read_table(LOOK_BACK / "runs.csv")))
    assert [line in results for line in markdown_table(table) if "language" in line] == [True]
    pairs = markdown_table(pair_table(compare(read_table(LOOK_BACK / "runs.csv"))))
    assert [line in results for line in pairs if "language" in line] == [True] * 4


def test_the_table_of_grpo_is_that_of_the_committed_runs():
    """Seed, before, at 0.2, 0.4, 0.6, 0.8 million env steps, at the end, seconds, and at the end by samples."""
    text = (ROOT / "experiments" / "RESULTS.md").read_text().split("## The main job by GRPO")[1].split("\n## ")[0]
    grpo = {run.seed: run for run in read_table(STUDY.parent / "grpo" / "runs.csv")}
    with (STUDY.parent / "grpo" / "sampled.csv").open(newline="") as file:
        sampled = {row["seed"]: (int(row["successes"]), int(row["episodes"])) for row in csv.DictReader(file)}
    for seed, run in grpo.items():
        scores = [f"{score:.3f}" for score in run.eval_scores[:-1]]
        end = share(int(sum(run.episodes_at("steps", run.eval_steps[-1]))), 256).replace(" ", "** ", 1)
        seconds = f"{run.eval_seconds[-1]:.0f}"
        cells = [str(seed), *scores, f"**{end}", seconds, share(*sampled[str(seed)])]
        assert f"| {' | '.join(cells)} |" in text
        assert run.eval_seconds[-1] < 600
    overall = compare([*grpo.values()]).arms[0].mean
    assert f"{overall.value:.3f} [{overall.low:.3f}, {overall.high:.3f}] for a\nnew seed and new states" in text
    mean = np.mean([k / n for seed, (k, n) in sampled.items() if seed != "start"])
    assert f"by samples from {share(*sampled['start'])} to {mean:.3f} in the mean" in text
    ppo = {run.seed: run for run in read_table(STUDY.parent / "main_job" / "runs.csv")}
    ends = [[runs[s].episodes_at("steps", runs[s].eval_steps[-1]) for s in sorted(runs)] for runs in (ppo, grpo)]
    less = difference_interval(*map(np.array, ends), bounded=True)
    assert f"{less.value:.3f} [{less.low:.3f},\n{less.high:.3f}] better" in text


def test_the_rates_of_the_algorithms_are_those_of_the_committed_runs():
    text = (ROOT / "experiments" / "RESULTS.md").read_text().split("## PPO, GRPO and RLOO")[1].split("\n## ")[0]
    runs = [run for run in read_table(STUDY.parent / "algorithms" / "runs.csv") if run.seed in (1, 2, 3)]
    comparison = compare(runs, by=["algorithm", "algorithm.cfg.advantage"])
    names = {"ppo": "PPO", "grpo, grpo": "GRPO", "grpo, rloo": "RLOO"}
    carried = {"ppo": {6e-4}, "grpo, grpo": {3e-4, 1.2e-3}, "grpo, rloo": {3e-4, 1.2e-3}}
    for arm in comparison.arms:
        rates = {rate: by for (name, rate), by in comparison.chosen_by.items() if name == arm.arm}
        cells = [f"{rates[rate]:.3f}" if rate in rates else "" for rate in (1.5e-4, 3e-4, 6e-4, 1.2e-3)]
        shown = [f"**{cell}**" if cell == f"{rates[arm.learning_rate]:.3f}" else cell for cell in cells]
        assert f"| {names[arm.arm]} | {' | '.join(shown)} |" in text
        assert {other.learning_rate for other in arm.runners_up} == carried[arm.arm]
        assert all(len(runs) == 3 for (name, _), runs in comparison.cells.items() if name == arm.arm)
    ends = [run.eval_scores[-1] for run in comparison.cells["ppo", 1.2e-3]]
    assert sorted(end > 0 for end in ends) == [False, False, True]


def test_the_comparison_of_the_algorithms_is_that_of_the_committed_runs():
    text = (ROOT / "experiments" / "RESULTS.md").read_text().split("## PPO, GRPO and RLOO")[1].split("\n## ")[0]
    runs = read_table(STUDY.parent / "algorithms" / "runs.csv")
    comparison = compare(runs, by=["algorithm", "algorithm.cfg.advantage"], choosing_seeds=(1, 2, 3))
    names = {"ppo": "PPO", "grpo, grpo": "GRPO", "grpo, rloo": "RLOO"}
    (before,) = {round(run.eval_scores[0], 3) for run in runs}
    assert [arm.arm for arm in comparison.arms] == list(names)
    best = {}
    for arm in comparison.arms:
        others = [interval(other.mean) for other in sorted(arm.runners_up, key=lambda other: other.learning_rate)]
        mean = interval(arm.mean).replace(" [", "** [")
        assert f"| {names[arm.arm]} | {before} | **{mean} | {', '.join(others)} |" in text
        assert [run.seed for run in arm.runs] == [11, 12, 13, 14, 15]
        best[arm.arm] = [other.mean.value for other in (arm, *arm.runners_up)]
    assert min(best["ppo"]) - max(best["grpo, grpo"] + best["grpo, rloo"]) > 0.09
    _, table = pair_table(comparison)
    for first, second, difference, p, verdict, _, seeds in table:
        more = f"; {seeds} more seeds each might tell" if verdict == "not separable" else ""
        assert f"| {names[first]} - {names[second]} | {difference} | {p} | {verdict}{more} |" in text
    at_a_fifth = {arm.arm: np.mean([run.eval_scores[1] for run in arm.runs]) for arm in comparison.arms}
    assert f"PPO is at {at_a_fifth['ppo']:.2f} after the first fifth" in text
    assert f"where GRPO is at {at_a_fifth['grpo, grpo']:.2f}" in text
    seconds = [f"{np.mean([run.eval_seconds[-1] for run in arm.runs]):.0f}" for arm in comparison.arms]
    assert f"({seconds[0]}, {seconds[1]} and {seconds[2]} s in the mean)" in text


@pytest.mark.parametrize("name", ["openvla_reach", "openvla_oft_reach", "pi0_reach"])
def test_the_table_of_the_families_is_that_of_the_committed_runs(name):
    """Seed, before, at 0.2, 0.4 and 0.6 million env steps, at the end, env steps, seconds; and the mean."""
    text = (ROOT / "experiments" / "RESULTS.md").read_text().split("## Policies of known families")[1]
    text, runs = text.split("\n## ")[0], read_table(STUDY.parent / name / "runs.csv")
    label = {"openvla_reach": "OpenVLA", "openvla_oft_reach": "OFT", "pi0_reach": "pi0"}[name]
    (before,) = {round(run.eval_scores[0] * 256) for run in runs}
    for run in runs:
        scores = [f"{run.eval_scores[i]:.3f}" for i in (0, 2, 4, 6)]
        assert [round(run.eval_steps[i], -5) for i in (0, 2, 4, 6)] == [0, 200_000, 400_000, 600_000]
        end = share(int(sum(run.episodes_at("steps", run.eval_steps[-1]))), 256).replace(" [", "** [")
        cells = [str(run.seed), *scores, f"**{end}", f"{run.eval_steps[-1]:,.0f}", f"{run.eval_seconds[-1]:.0f}"]
        (line,) = (line for line in text.splitlines() if line.endswith(f" | {' | '.join(cells)} |"))
        assert line.startswith(f"| {label}, ")
    mean = compare(runs).arms[0].mean
    assert f"- {mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}] for {label} from {share(before, 256)}" in text
    assert len(runs) == 5 and mean.value >= 0.9 and before / 256 <= 0.6


def test_the_main_jobs_table_is_that_of_the_committed_runs():
    """Seed, before, at 0.2, 0.4 and 0.8 million env steps, at the end, seconds."""
    text = (ROOT / "experiments" / "RESULTS.md").read_text().split("## The main job")[1].split("## ")[0]
    for run in read_table(STUDY.parent / "main_job" / "runs.csv"):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {run.seed} | 0."))
        shown = [float(cell.strip(" *").split()[0].strip("*")) for cell in line.strip("|").split("|")]
        scores = [run.eval_scores[i] for i in (0, 1, 2, 4, -1)]
        assert shown[1:6] == [pytest.approx(score, abs=5e-4) for score in scores], line
        assert run.eval_steps[-1] == 983_040 and shown[6] == pytest.approx(run.eval_seconds[-1], abs=1)
    overall = compare(read_table(STUDY.parent / "main_job" / "runs.csv")).arms[0].mean
    assert f"{overall.value:.3f} [{overall.low:.3f}, {overall.high:.3f}] for a new seed and new states" in text


def test_the_algorithms_at_equal_wall_time_are_those_of_the_committed_runs():
    """Each at the end of its own schedule; PPO's runs are those of the comparison at equal env steps, again."""
    text = (ROOT / "experiments" / "RESULTS.md").read_text().split("## PPO, GRPO and RLOO")[1].split("\n## ")[0]
    page = (ROOT / "docs" / "what_to_freeze.md").read_text()
    runs = read_table(STUDY.parent / "algorithms" / "equal_time.csv")
    comparison = compare(runs, by=["algorithm", "algorithm.cfg.advantage"], equal="ends")
    ppo, *others = comparison.arms
    assert not comparison.pairs[-1].separable and "the two again not separable" in text
    before = {run.run: run.episodes for run in read_table(STUDY.parent / "algorithms" / "runs.csv")}
    assert all(run.episodes == before[run.run] and run.learning_rate == 3e-4 for run in ppo.runs)
    for arm, pair in zip(others, comparison.pairs[:2], strict=True):
        assert [run.seed for run in arm.runs] == [11, 12, 13, 14, 15] == sorted(run.seed for run in ppo.runs)
        assert all(1_105_000 <= run.eval_steps[-1] < 1_130_000 for run in arm.runs)
        assert (pair.first, pair.second) == ("ppo", arm.arm) and pair.separable
        better = interval(pair.difference)
        told = f"{arm.arm.removeprefix('grpo, ').upper()} {interval(arm.mean)}, PPO {better} better"
        assert told in " ".join(text.split()) and interval(arm.mean) in page and better in page


def test_the_rates_of_the_algorithms_on_metaworld_are_those_of_the_committed_runs_and_of_the_next_step():
    text = (ROOT / "experiments" / "RESULTS.md").read_text().split("### On push-v3 of Meta-World: rates")[1]
    text = text.split("\n## ")[0]
    folder = STUDY.parent / "metaworld_algorithms_rates"
    comparison = compare(read_table(folder / "runs.csv"), by=["algorithm", "algorithm.cfg.advantage"])
    means = {cell: np.mean([run.eval_scores[-1] for run in runs]) for cell, runs in comparison.cells.items()}
    assert all([run.seed for run in runs] == [1, 2] for runs in comparison.cells.values())
    columns = sorted({rate for _, rate in means})
    assert f"| | {' | '.join(f'{rate:g}' for rate in columns)} |" in text
    sweeps = {"ppo": "metaworld_ppo", "grpo, grpo": "metaworld_grpo", "grpo, rloo": "metaworld_rloo"}
    for arm in comparison.arms:
        rates = sorted(rate for name, rate in means if name == arm.arm)
        assert rates[0] < arm.learning_rate < rates[-1]
        shown = {rate: f"{means[arm.arm, rate]:.3f}" for rate in rates}
        shown[arm.learning_rate] = f"**{shown[arm.learning_rate]}**"
        name = arm.arm.rpartition(" ")[2].upper()
        assert f"| {name} | {' | '.join(shown.get(rate, '') for rate in columns)} |" in text
        near = ", ".join(f"{runner_up.learning_rate:g}" for runner_up in arm.runners_up)
        assert f"{near} for {name}" in " ".join(text.split())
        sweep = load_sweep(ROOT / "sweeps" / f"{sweeps[arm.arm]}.yaml")
        configs = [sweep_local.config_of(sweep.flags(point), sweep.program) for point in sweep.grid()]
        assert {config.algorithm.cfg.learning_rate for config in configs} == {arm.learning_rate}
        assert [config.trainer.seed for config in configs] == [11, 12, 13, 14, 15]
    seconds = [run.eval_seconds[-1] for run in comparison.runs]
    assert f"{min(seconds):.0f} to {max(seconds):.0f} s a run" in text
    start = json.loads((folder / "start.json").read_text())
    assert f"the start solves {start['eval/success_rate']:.2f} of them" in text


def test_the_comparison_of_the_algorithms_on_metaworld_is_that_of_the_committed_runs():
    text = (ROOT / "experiments" / "RESULTS.md").read_text().split("### On push-v3 of Meta-World: the comparison")[1]
    text, page = text.split("\n## ")[0], (ROOT / "docs" / "what_to_freeze.md").read_text()
    runs = read_table(STUDY.parent / "metaworld_algorithms" / "runs.csv")
    comparison = compare(runs, by=["algorithm", "algorithm.cfg.advantage"])
    names = {"ppo": "PPO", "grpo, grpo": "GRPO", "grpo, rloo": "RLOO"}
    assert sorted(arm.arm for arm in comparison.arms) == sorted(names)
    (before,) = {round(run.eval_scores[0], 3) for run in runs}
    for arm in comparison.arms:
        assert [run.seed for run in arm.runs] == [11, 12, 13, 14, 15]
        assert all(60_000 <= run.eval_steps[-1] < 66_000 for run in arm.runs) and arm.scores.shape == (5, 150)
        seeds = ", ".join(f"{run.eval_scores[-1]:.3f}" for run in arm.runs)
        mean, name = interval(arm.mean), names[arm.arm]
        bold = mean.replace(" [", "** [")
        assert f"| {name} | {arm.learning_rate:g} | {before} | **{bold} | {seeds} |" in text
        assert mean in page
        start = np.array([run.episodes_at("steps", 0) for run in arm.runs], dtype=float)
        gain = difference_interval(arm.scores, start)
        assert f"{name} gains {interval(gain)}".replace("-0.000", "0.000") in " ".join(text.split()) and gain.low < 0
    _, table = pair_table(comparison)
    for first, second, difference, p, verdict, _, seeds in table:
        more = seeds if seeds.startswith("more") else f"{seeds} more seeds each"
        assert verdict == "not separable"
        assert f"| {names[first]} - {names[second]} | {difference} | {p} | {verdict}; {more} might tell |" in text
    seconds = sorted(run.eval_seconds[-1] for run in runs)
    assert f"({seconds[0]:,.0f} to {seconds[-1]:,.0f} s, evaluations included)" in text
    rates = read_table(STUDY.parent / "metaworld_algorithms_rates" / "runs.csv")  # the quickest ran alone
    quiet = {"ppo": 2, "grpo": 4}
    for algorithm, few in quiet.items():
        took = [run.eval_seconds[-1] for run in rates if run.settings["algorithm.name"] == algorithm]
        quiet[algorithm] = np.mean(sorted(took)[:few])
    assert f"in quiet PPO takes {quiet['ppo']:.0f} s, and GRPO and RLOO {quiet['grpo']:.0f} s" in " ".join(text.split())


def test_the_algorithms_on_metaworld_at_equal_wall_time_are_those_of_the_committed_runs():
    text = (ROOT / "experiments" / "RESULTS.md").read_text().split("### On push-v3 of Meta-World: the comparison")[1]
    runs = read_table(STUDY.parent / "metaworld_algorithms" / "equal_time.csv")
    comparison = compare(runs, by=["algorithm", "algorithm.cfg.advantage"], equal="ends")
    text, page = " ".join(text.split("\n## ")[0].split()), (ROOT / "docs" / "what_to_freeze.md").read_text()
    ppo, *others = comparison.arms
    differences = [interval(pair.difference) for pair in comparison.pairs if pair.first == "ppo"]
    assert [arm.arm for arm in (ppo, *others)] == ["ppo", "grpo, grpo", "grpo, rloo"] and ppo.separable_from == []
    assert f"PPO has {interval(ppo.mean)}: {differences[0]} above GRPO and {differences[1]} above RLOO" in text
    assert [run.seed for run in ppo.runs] == [11, 12, 13, 14, 15] and interval(ppo.mean) in page
    start = np.array([run.episodes_at("steps", 0) for run in ppo.runs], dtype=float)
    gain = difference_interval(ppo.scores, start)
    assert f"It gains {interval(gain)} on its start" in text and gain.low > 0
    step_2 = read_table(STUDY.parent / "metaworld_algorithms" / "runs.csv")
    before = {run.run: run.episodes for run in step_2}
    assert all(run.episodes == before[run.run] for run in runs if run not in ppo.runs)
    at_first = [run.eval_steps[-1] for run in step_2 if run.learning_rate == ppo.learning_rate]
    times = np.mean([run.eval_steps[-1] for run in ppo.runs]) / np.mean(at_first)
    assert f"Given {times:.1f} times the control steps" in text


def test_the_rates_of_pretrained_scopes_are_those_of_the_committed_runs_and_of_the_next_step():
    """Each scope's best mean is chosen, none at an end of its row, and the sweep of the answers takes those rates."""
    text = (ROOT / "experiments" / "RESULTS.md").read_text().split("never seen the task: rates")[1].split("\n### ")[0]
    comparison = compare(read_table(STUDY.parent / "pretrained_scopes_rates" / "runs.csv"))
    chosen = {result.arm: result.learning_rate for result in comparison.arms}
    names = {scope: f"`{scope}`" for scope in chosen}
    names["vision_encoder+language_encoder"] = "both encoders"
    names["vision_encoder.stem+vision_encoder.blocks.[0-7]+language_encoder"] = (
        "stem, 8 of 11 blocks and language frozen"
    )
    assert all(row in text for row in rate_rows(comparison, names, [1, 2]))
    assert all(arm.runners_up for arm in comparison.arms)
    means = {cell: np.mean([run.eval_scores[-1] for run in runs]) for cell, runs in comparison.cells.items()}
    assert text.count("\n| ") == len(chosen) + 1
    costs = [means[scope, rate] - means[scope, 4 * rate] for scope, rate in chosen.items()]
    assert f"costs up to {max(costs):.1f}" in text
    page = (ROOT / "docs" / "what_to_freeze.md").read_text()
    for told in (text, page):
        assert f"a factor of {max(chosen.values()) / min(chosen.values()):g} apart" in told
    assert f"costs a scope up to {max(costs):.1f}" in page
    sweep = load_sweep(ROOT / "sweeps" / "pretrained_scopes.yaml")
    taken = Counter()
    for point in sweep.grid():
        config = sweep_local.config_of(sweep.flags(point))
        scope = config.policy.freeze
        taken[scope if isinstance(scope, str) else "+".join(scope), config.algorithm.cfg.learning_rate] += 1
    assert taken == dict.fromkeys(chosen.items(), 5)
