"""The tables of a comparison and its sentences: what stands in them, with how many digits, and what is left out."""

import itertools
import json

import numpy as np
import pytest
from study_worlds import EASY, STATES, make_run, write_splits

from research.study.comparison import compare
from research.study.run_sources import read_folders
from research.study.run_table import read_table, write_table
from research.study.statistics import difference_interval, mean_interval
from research.study.tables import (
    cell_table,
    describe,
    interval,
    origins,
    ranking,
    runs_table,
    settings_table,
    split_pair_table,
    split_table,
    task_table,
)


@pytest.mark.parametrize(("scale", "mean"), [(1e-4, "0.09876 [0.0"), (1.0, "987.6 [9"), (1e3, "987600 [9")])
def test_returns_are_shown_with_four_digits_whatever_their_unit(tmp_path, scale, mean):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"{seed}", seed=seed, returns=scale * (987.6 + seed - 2 + EASY))
    (line,) = ranking(compare(read_folders([str(tmp_path)])))
    assert line.startswith(f"none: {mean}")


def test_every_rate_is_listed_with_its_seeds_and_the_chosen_one_marked(tmp_path):
    for rate, seed in ((1e-4, 1), (1e-4, 2), (3e-4, 1)):
        make_run(tmp_path / f"{rate}-{seed}", rate=rate, seed=seed, returns=100 * seed + EASY, sampled=1e5 * rate)
    header, rows = cell_table(compare(read_folders([str(tmp_path)])))
    assert header[-4:] == ["return", "of each seed", "chosen", "reported"]
    assert rows == [
        ["none", "0.0001", "2", "10.0", "150.0", "100.0 200.0", "runner-up", "150.0 [-484.6, 784.6] (2 seeds)"],
        ["none", "0.0003", "1", "30.0", "100.0", "100.0", "yes", "100.0 (no interval)"],
    ]


def test_success_is_reported_by_task(tmp_path):
    """The task of a state is its remainder: every third one is of the task that `vision` fails."""
    states = np.arange(STATES)
    for seed in (1, 2, 3):
        for scope, final in (("none", np.ones(STATES)), ("vision", states % 3 != 1)):
            folder = make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, final=final)
            rows = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
            for row in rows:
                row["task"] = ("reach", "push", "open")[row["initial_state"] % 3]
            (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = read_folders([str(tmp_path)])
    assert {run.tasks for run in runs} == {"reach push open"}
    write_table(tmp_path / "runs.csv", runs)
    for found in (runs, read_table(tmp_path / "runs.csv")):
        comparison = compare(found)
        means = {result.arm: {task: e.value for task, e in result.tasks.items()} for result in comparison.arms}
        assert means == {
            "none": dict.fromkeys(("reach", "push", "open"), 1.0),
            "vision": {"reach": 1, "push": 0, "open": 1},
        }
        header, rows = task_table(comparison)
        assert header == ["scope", "reach", "push", "open"] and [row[0] for row in rows] == ["none", "vision"]
    (tmp_path / "alone").mkdir()
    make_run(tmp_path / "alone" / "a", seed=1)
    assert task_table(compare(read_folders([str(tmp_path / "alone")]))) is None


def test_splits_are_compared_where_all_reported_runs_were_evaluated_in_them(tmp_path):
    half, most = np.arange(STATES) % 2 == 0, np.arange(STATES) % 5 > 0
    for seed in (1, 2, 3):
        run = make_run(tmp_path / f"vision{seed}", "vision", seed=seed)
        if seed > 1:  # seed 1 chooses and is not reported
            write_splits(run, train=most, semantics=half if seed == 2 else ~half, execution=most[:7])
        make_run(tmp_path / f"none{seed}", "none", seed=seed)
    comparison = compare(read_folders([str(tmp_path)]), choosing_seeds=[1])
    results = {result.arm: result for result in comparison.arms}
    assert results["none"].splits == {}
    assert set(results["vision"].splits) == {"train", "semantics"}  # other states are another question
    expected = mean_interval([half, ~half])
    found = results["vision"].splits["semantics"]
    assert (found.value, found.low, found.high) == pytest.approx((0.5, expected.low, expected.high))
    header, rows = split_table(comparison)
    assert header == ["scope", "train", "semantics"] and [row[0] for row in rows] == ["vision"]
    assert rows[0][2] == interval(expected)
    write_table(tmp_path / "runs.csv", comparison.runs)  # keeps the order of the splits, too
    assert split_table(compare(read_table(tmp_path / "runs.csv"), choosing_seeds=[1])) == (header, rows)
    assert split_table(compare(read_folders([f"{tmp_path}/none*"]))) is None


def test_an_arm_that_is_missing_from_the_tables_of_splits_is_named_with_its_run(tmp_path):
    for scope, seed in itertools.product(("none", "vision"), (1, 2, 3)):
        folder = make_run(tmp_path / f"{scope}{seed}", scope, seed=seed)
        if (scope, seed) != ("none", 2):
            write_splits(folder, semantics=np.ones(STATES))
    comparison = compare(read_folders([str(tmp_path)]))
    told = "Not in the tables of splits, for runs that were not evaluated there from the same states: none in semantics"
    assert any(note.startswith(f"{told} (`none2`).") for note in comparison.notes)
    write_splits(tmp_path / "none2", semantics=np.ones(STATES))
    assert not any("tables of splits" in note for note in compare(read_folders([str(tmp_path)])).notes)


def test_arms_are_told_apart_in_each_split_by_differences_paired_by_state(tmp_path):
    rng = np.random.default_rng(0)
    easy = rng.random(STATES) < 0.5  # what a state adds to all runs cancels out
    chance = {"none": 0.9, "vision": 0.45, "lora": 0.4}
    marks = {(s, seed): easy | (rng.random(STATES) < p) for s, p in chance.items() for seed in (1, 2, 3)}
    for (scope, seed), of_run in marks.items():
        run = make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, final=0.5)
        write_splits(run, train=of_run, semantics=of_run if scope != "lora" else of_run[:7])
    comparison = compare(read_folders([str(tmp_path)]))
    arrays = {scope: np.array([marks[scope, seed] for seed in (1, 2, 3)], dtype=float) for scope in chance}
    raw = {pair: difference_interval(*(arrays[s] for s in pair)) for pair in itertools.permutations(chance, 2)}
    found = {(pair.split, pair.first, pair.second): pair for pair in comparison.split_pairs}
    of_train = [raw[first, second].p_value for split, first, second in found if split == "train"]
    assert len(of_train) == 3 and len(found) == 4  # lora has other states in the second split
    for (split, *names), pair in found.items():
        expected = raw[tuple(names)]
        assert (pair.difference.value, pair.difference.low) == pytest.approx((expected.value, expected.low))
        if split == "semantics":  # one pair: nothing to correct
            assert pair.p_value == pytest.approx(expected.p_value)
        elif expected.p_value == min(of_train):
            assert pair.p_value == pytest.approx(3 * expected.p_value)
    header, rows = split_pair_table(comparison)
    assert header == ["first", "second", "train", "semantics"] and len(rows) == 3
    assert all((row[3] == "") == ("lora" in row) and ", p " in row[2] for row in rows)
    write_table(tmp_path / "runs.csv", comparison.runs)
    assert split_pair_table(compare(read_table(tmp_path / "runs.csv"))) == (header, rows)
    assert split_pair_table(compare(read_folders([f"{tmp_path}/none*"]))) is None
    few = split_pair_table(compare(read_folders([f"{tmp_path}/*[12]"])))[1]
    assert not any(", p " in cell for row in few for cell in row)  # two seeds are no verdict


def test_settings_that_all_runs_share_are_listed_where_they_are_no_defaults(tmp_path):
    shared = {"algorithm__cfg__ent_coef": 0.0, "trainer__num_envs": 128, "policy__vla_config__model_config": {"w": 3}}
    for seed, scope in enumerate(("none", "vision")):
        make_run(tmp_path / scope, scope, seed=seed, **shared)
    comparison = compare(read_folders([str(tmp_path)]))
    header, rows = settings_table(comparison)
    assert header == ["option", "value", "default"]
    assert rows == [
        ["algorithm.cfg.ent_coef", "0.0", "0.001"],
        ["policy.vla_config.model_config.w", "3", ""],
        ["trainer.num_envs", "128", "64"],
    ]
    write_table(tmp_path / "runs.csv", comparison.runs)
    assert settings_table(compare(read_table(tmp_path / "runs.csv"))) == (header, rows)
    (tmp_path / "alone").mkdir()
    make_run(tmp_path / "alone" / "a")
    assert settings_table(compare(read_folders([str(tmp_path / "alone")]))) is None


def test_every_run_is_a_row_also_one_that_did_not_complete(tmp_path):
    make_run(tmp_path / "a", "vision", 3e-4, seed=2, final=np.arange(STATES) < 10)
    (make_run(tmp_path / "b") / "summary.json").unlink()
    (make_run(tmp_path / "c") / "config.json").write_text("{")
    header, rows = runs_table(compare(read_folders([str(tmp_path)])))
    assert header == ["run", "scope", "learning rate", "seed", "success", "env steps", "s", "status"]
    assert rows[0] == ["a", "vision", "0.0003", "2", "0.250", "2,000", "200", "complete"]
    assert rows[1][:-1] == ["b", "none", "0.0001", "1", "", "", ""] and rows[1][-1].startswith("no summary.json")
    assert rows[2][:-1] == ["c", "", "", "", "", "", ""] and rows[2][-1].startswith("cannot be read")


def test_when_where_and_by_which_code_runs_were_made_is_said_as_far_as_it_is_known(tmp_path):
    for i, name in enumerate(("p-20261128_163401_joki", "p-20261129_010000_abcd", "sweep_003")):
        folder = make_run(tmp_path / name, seed=i)
        if i < 2:
            (folder / "summary.json").write_text('{"exit_code": 0, "machine": "x86_64, 2 cores"}')
            (folder / "checkpoints" / "step_000002000").mkdir(parents=True)
            manifest = {"code": ("abc1234", "abc1234-dirty")[i]}
            (folder / "checkpoints/step_000002000/manifest.json").write_text(json.dumps(manifest))
    comparison = compare(read_folders([str(tmp_path)]))
    assert origins(comparison) == [
        "Runs started 2026-11-28 16:34 to 2026-11-29 01:00. Code: abc1234 (1 run), abc1234-dirty (1 run), not known "
        "(1 run). Machine: x86_64, 2 cores (2 runs), not known (1 run)."
    ]
    header, rows = runs_table(comparison)
    assert header[-4:] == ["started", "code", "machine", "status"]
    assert rows[0][-4:] == ["2026-11-28 16:34", "abc1234", "x86_64, 2 cores", "complete"]
    write_table(tmp_path / "runs.csv", comparison.runs)
    assert origins(compare(read_table(tmp_path / "runs.csv"))) == origins(comparison)


def test_an_environment_is_described_without_the_options_that_are_compared(tmp_path):
    for chunk in (1, 4):
        make_run(tmp_path / f"{chunk}", trainer__env_config={"task": "reach", "chunk": chunk})
    comparison = compare(read_folders([str(tmp_path)]), by=["trainer.env_config.chunk"])
    assert describe(comparison)[0].startswith("tabletop (task = reach), initial states 0-39. 2 runs")
