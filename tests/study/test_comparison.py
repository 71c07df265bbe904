"""What is compared, at which rate, by which measure; which runs are refused or left out; and what seeds can tell."""

import itertools
import shutil

import numpy as np
import pytest
from study_worlds import STATES, make_run, write_return_study, write_splits

from research.errors import UserError
from research.study.comparison import compare
from research.study.run_sources import read_folders
from research.study.sample_size import seeds_needed, states_needed
from research.study.statistics import difference_interval
from research.study.tables import arm_table, pair_table, ranking


def test_the_best_rate_is_chosen_on_training_success_not_on_what_is_reported(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, final=0.9, sampled=0.6)
        make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed, final=0.5, sampled=0.7)
    comparison = compare(read_folders([str(tmp_path)]))
    assert comparison.arms[0].learning_rate == 3e-4
    assert any("highest one tried" in note for note in comparison.notes)
    assert "success in the last tenth of training" in comparison.notes[0]


def test_choosing_on_states_reports_on_the_other_states(tmp_path):
    even = np.arange(STATES) % 2 == 0
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, final=even)  # succeeds on the choosing states only
        make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed, final=~even)
    (result,) = compare(read_folders([str(tmp_path)]), choose_on="states").arms
    assert result.learning_rate == 1e-4
    assert result.mean.value == 0
    assert result.scores.shape == (2, STATES // 2)


def test_choosing_on_states_reports_on_the_other_states_in_every_column(tmp_path):
    """All states that choose succeed, before and after, and none of the others does."""
    even = np.arange(STATES) % 2 == 0
    for scope, seed in itertools.product(("none", "vision"), (1, 2, 3)):
        pace = 0.1 if scope == "none" else 0.15
        folder = make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, final=even, pace=pace)
        write_splits(folder, train=even, vision=even)
    comparison = compare(read_folders([str(tmp_path)]), "states")
    for result in comparison.arms:
        assert result.mean.value == result.at_other_axis.value == result.before == 0
        assert {split: mean.value for split, mean in result.splits.items()} == {"train": 0, "vision": 0}
        assert compare(comparison.runs, "training").arms[0].before == 0.5
    assert "(curves and the map of all rates are from all)" in comparison.notes[0]


def test_choosing_on_states_takes_every_other_round_of_the_tasks(tmp_path):
    """With as many states of each task on both sides: every other state would be the same tasks each time."""
    task = np.arange(STATES) % 4
    for seed in (1, 2):
        for name, rate, solved in (("a", 1e-4, task % 2 == 0), ("b", 3e-4, task % 2 == 1), ("c", 1e-3, task > 0)):
            make_run(tmp_path / f"{name}{seed}", rate=rate, seed=seed, final=solved)
    runs = read_folders([str(tmp_path)])
    for run in runs:
        run.tasks = "reach push pull close"
    comparison = compare(runs, choose_on="states")
    assert comparison.chosen_by == {("none", 1e-4): 0.5, ("none", 3e-4): 0.5, ("none", 1e-3): 0.75}
    (result,) = comparison.arms
    assert result.mean.value == 0.75 and {task: e.value for task, e in result.tasks.items()} == {
        "reach": 0, "push": 1, "pull": 1, "close": 1,
    }  # fmt: skip
    for run in runs:
        run.tasks = " ".join(f"task_{number}" for number in range(STATES))
    with pytest.raises(UserError, match="only where some are left to report"):
        compare(runs, choose_on="states")


def test_choosing_seeds_are_left_out_of_the_report(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, sampled=0.9 if seed == 1 else 0.1)
        make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed, sampled=0.5)
    comparison = compare(read_folders([str(tmp_path)]), choosing_seeds=[1])
    assert comparison.arms[0].learning_rate == 1e-4
    assert [run.seed for run in comparison.arms[0].runs] == [2, 3]
    with pytest.raises(UserError) as error:
        compare(read_folders([str(tmp_path)]), choosing_seeds=[9, 1])
    assert str(error.value) == "--choosing_seeds: no complete run has the seed 9; there are 1, 2, 3"
    make_run(tmp_path / "c", "vision", seed=9)
    with pytest.raises(UserError, match="none has no run with one of the seeds that should choose its rate: \\[9\\]"):
        compare(read_folders([str(tmp_path)]), choosing_seeds=[9])
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(UserError, match="no seeds besides those that chose"):
        compare(read_folders([str(tmp_path)]), choosing_seeds=[1, 2, 3])


def test_a_rate_with_few_seeds_does_not_win_by_luck(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, sampled=0.6)
    make_run(tmp_path / "b1", rate=3e-4, seed=1, sampled=0.7)
    assert compare(read_folders([str(tmp_path)])).arms[0].learning_rate == 1e-4


def test_two_seeds_have_an_interval_but_no_verdict(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"none{seed}", "none", seed=seed, final=0.2)
        make_run(tmp_path / f"vision{seed}", "vision", seed=seed, final=0.8)
        if seed < 3:
            make_run(tmp_path / f"lora{seed}", "lora", seed=seed, final=np.ones(STATES))
    comparison = compare(read_folders([str(tmp_path)]))
    assert comparison.arms[0].arm == "lora" and comparison.arms[0].mean.has_interval
    assert comparison.arms[0].rank == (1, 3)
    assert any("Two seeds only, so intervals are too short, and no verdict: lora." in n for n in comparison.notes)
    tested = next(pair for pair in comparison.pairs if "lora" not in (pair.first, pair.second))
    assert tested.p_value == pytest.approx(tested.difference.p_value) and tested.separable  # corrected for one pair
    _, rows = pair_table(comparison)
    assert [row[4] for row in rows if "lora" in row] == ["two seeds: cannot say"] * 2
    assert [line.partition("of 3")[2] for line in ranking(comparison)] == [
        "; not tested, two seeds, against vision, none", *["; not tested, two seeds, against lora"] * 2,
    ]  # fmt: skip
    assert ["2, too few" in row for row in arm_table(comparison)[1]] == [True, False, False]


def test_a_pair_needs_what_its_own_level_in_holms_procedure_asks(tmp_path):
    rng = np.random.default_rng(0)
    chance = {"none": 0.5, "vision": 0.62, "language": 0.97}
    for scope, seed in itertools.product(chance, (1, 2, 3, 4)):
        make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, final=rng.random(STATES) < chance[scope])
    comparison = compare(read_folders([str(tmp_path)]))
    arrays = {result.arm: result.scores for result in comparison.arms}
    last = max(comparison.pairs, key=lambda pair: pair.difference.p_value)
    assert not last.separable
    assert last.more_seeds == seeds_needed(arrays[last.first], arrays[last.second], 0.05) - 4  # not 0.05 / 3
    assert last.more_seeds != seeds_needed(arrays[last.first], arrays[last.second], 0.05 / 3) - 4


def test_where_states_bind_more_states_are_asked_for(tmp_path):
    marks = np.arange(STATES) % 4
    for seed in (1, 2, 3):  # seeds agree, so that no number of them would do
        make_run(tmp_path / f"a{seed}", "vision", seed=seed, final=marks < 2)
        make_run(tmp_path / f"b{seed}", "none", seed=seed, final=(marks % 2 == 0) & (np.arange(STATES) > 3))
    comparison = compare(read_folders([str(tmp_path)]))
    (pair,) = comparison.pairs
    arrays = [result.scores for result in comparison.arms]
    assert pair.more_seeds == np.inf and pair.states == states_needed(*arrays) > STATES
    assert np.isfinite(pair.states) and pair_table(comparison)[1][0][-1] == f"more states: {pair.states:,.0f}"


def test_pairs_are_paired_by_initial_state_and_corrected_for_their_number(tmp_path):
    rng = np.random.default_rng(0)
    easy = rng.random(STATES) < 0.5  # states that every run solves
    chance = {"none": 0.5, "vision": 0.55, "language": 0.95}
    for scope, seed in itertools.product(chance, (1, 2, 3)):
        make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, final=easy | (rng.random(STATES) < chance[scope]))
    comparison = compare(read_folders([str(tmp_path)]))
    arrays = {result.arm: result.scores for result in comparison.arms}
    for pair in comparison.pairs:
        expected = difference_interval(arrays[pair.first], arrays[pair.second])
        assert (pair.difference.low, pair.difference.high) == pytest.approx((expected.low, expected.high))
        assert pair.p_value >= pair.difference.p_value
    smallest = min(comparison.pairs, key=lambda pair: pair.difference.p_value)
    assert smallest.p_value == pytest.approx(3 * smallest.difference.p_value)

    last = next(pair for pair in comparison.pairs if {pair.first, pair.second} == {"none", "vision"})
    assert not last.separable
    assert last.more_seeds > 0
    lines = ranking(comparison)
    assert lines[0].startswith("language: ") and lines[0].endswith("rank 1 of 3")
    assert all("rank 2 to 3 of 3; not separable from" in line for line in lines[1:])


def test_one_seed_only_has_no_interval_and_says_so(tmp_path):
    make_run(tmp_path / "a", "none", final=0.5)
    make_run(tmp_path / "b", "vision", final=0.9)
    comparison = compare(read_folders([str(tmp_path)]))
    assert any("One seed only, so no interval and no ranking: vision, none" in note for note in comparison.notes)
    assert [line.partition("(no interval), ")[2] for line in ranking(comparison)] == [
        f"rank 1 to 2 of 2; not tested, one seed, against {other}" for other in ("none", "vision")
    ]
    _, ((*_, verdict, _, more),) = pair_table(comparison)
    assert (verdict, more) == ("one seed: cannot say", "-")


# ---- by return


@pytest.fixture(scope="module")
def return_study(tmp_path_factory):
    return write_return_study(tmp_path_factory.mktemp("return_study") / "runs")


def test_seeds_of_equal_mean_return_are_not_taken_for_certain(tmp_path):
    returns = np.arange(STATES) ** 2.0
    for scope, seed in itertools.product(("none", "vision"), (1, 2, 3)):  # every seed has the same mean
        shifted = np.roll(returns, 7 * seed + 3 * (scope == "none")) + 50 * (scope == "vision")
        make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, returns=shifted)
    vision, none = (comparison := compare(read_folders([str(tmp_path)]))).arms
    (pair,) = comparison.pairs
    assert pair.difference.value == 50 and not pair.separable
    assert pair.more_seeds == seeds_needed(vision.scores, none.scores, bounded=False) - 3


def test_choosing_on_states_takes_every_other_return(tmp_path):
    even = np.arange(STATES) % 2 == 0
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, returns=np.where(even, 250.0, -12.5))
        make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed, returns=np.where(even, 3.0, 700.0))
    comparison = compare(read_folders([str(tmp_path)]), choose_on="states")
    assert comparison.chosen_by == {("none", 1e-4): 250, ("none", 3e-4): 3}
    assert comparison.arms[0].mean.value == -12.5


def test_equal_returns_everywhere_tell_nothing_about_new_seeds(tmp_path):
    for scope, seed in itertools.product(("none", "vision"), (1, 2, 3)):
        make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, returns=np.full(STATES, 1000.0))
    comparison = compare(read_folders([str(tmp_path)]))
    assert all("1000 (no interval), rank 1 to 2 of 2" in line for line in ranking(comparison))
    _, ((*_, verdict, _, _),) = pair_table(comparison)
    assert verdict == "equal scores: cannot say"


# ---- refusals


def test_a_crashed_run_of_another_environment_is_left_out_and_does_not_end_the_comparison(tmp_path):
    make_run(tmp_path / "a")
    (make_run(tmp_path / "b", trainer__env="gym:Reacher-v5") / "summary.json").unlink()
    assert [run.run for run in compare(read_folders([str(tmp_path)])).arms[0].runs] == ["a"]


def test_a_run_that_died_before_its_first_evaluation_is_no_run_of_another_measure(tmp_path):
    make_run(tmp_path / "a")
    died = make_run(tmp_path / "b", seed=2)
    (died / "metrics.jsonl").write_text("")
    comparison = compare(read_folders([str(tmp_path)]))
    assert comparison.measure == "success"
    assert "`b` is excluded from all means: no evaluations in its metrics." in comparison.notes


def test_runs_that_end_as_they_began_are_noted(tmp_path):
    """Value warm-up was longer than the run, say; the lower of equal rates is no sign of a better one below."""
    before = np.arange(STATES) % 2 == 0
    for rate, seed in itertools.product((1e-4, 4e-4), (1, 2, 3)):
        make_run(tmp_path / f"{rate}-{seed}", rate=rate, seed=seed, final=before)
    notes = compare(read_folders([str(tmp_path)])).notes
    assert any(note.startswith("No run's last evaluation differs from its first") for note in notes)
    assert not any("one tried" in note for note in notes)
    make_run(tmp_path / "moved", rate=4e-4, seed=4)
    notes = compare(read_folders([str(tmp_path)])).notes
    assert not any(note.startswith("No run's last evaluation") for note in notes)
    assert any("one tried" in note for note in notes)  # now they differ
