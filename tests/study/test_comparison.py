"""What is compared, at which rate, by which measure; which runs are refused or left out; and what seeds can tell."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats
from study_worlds import STATES, make_run, write_return_study, write_splits

from research.schema import UserError
from research.study.comparison import compare, curve
from research.study.report import interval, pair_table, ranking, scope_table, split_table, task_table
from research.study.run_sources import read_folders
from research.study.run_table import read_table, write_table
from research.study.sample_size import seeds_needed, states_needed
from research.study.statistics import difference_interval, mean_interval


def test_the_best_rate_is_chosen_on_training_success_not_on_what_is_reported(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, final=0.9, sampled=0.6)
        make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed, final=0.5, sampled=0.7)
    comparison = compare(read_folders([str(tmp_path)]))
    assert comparison.scopes[0].learning_rate == 3e-4
    assert any("highest one tried" in note for note in comparison.notes)
    assert "success in the last tenth of training" in comparison.notes[0]


def test_choosing_on_states_reports_on_the_other_states(tmp_path):
    even = np.arange(STATES) % 2 == 0
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, final=even)  # succeeds on the choosing states only
        make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed, final=~even)
    (result,) = compare(read_folders([str(tmp_path)]), choose_on="states").scopes
    assert result.learning_rate == 1e-4
    assert result.mean.value == 0
    assert result.scores.shape == (2, STATES // 2)


def test_runs_that_end_within_an_iteration_of_their_budget_are_paired(tmp_path):
    """Chunks end where episodes do, so that no two runs take the same number of control steps.

    Of earlier evaluations nothing is known here, so that nothing could be interpolated: the pairing would be lost.
    """
    ends = {("none", 1): 2000, ("none", 2): 2030, ("vision", 1): 2090, ("vision", 2): 2049}
    for (scope, seed), end in ends.items():
        folder = make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, final=0.7, steps=(0, 1000, end))
        rows = [{"global_step": end - 95, "rollout/decisions": 25.0}, {"global_step": end, "rollout/decisions": 25.0}]
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps({**row, "time/elapsed_s": 200.0}) + "\n" for row in rows)
    runs = read_folders([str(tmp_path)])
    assert {run.iteration_steps for run in runs} == {end - 95 for end in ends.values()}
    for run in runs:
        run.iteration_steps, run.episodes[:-1] = 95.0, ["", ""]
    comparison = compare(runs)
    assert comparison.paired and comparison.env_steps == 2000
    for result in comparison.scopes:
        assert result.scores.shape == (2, STATES) and np.isin(result.scores, (0, 1)).all()
    write_table(tmp_path / "runs.csv", runs)
    assert compare(read_table(tmp_path / "runs.csv")).paired
    for run in runs:
        run.iteration_steps = 40.0  # two of them went on for longer than an iteration
    assert not compare(runs).paired


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
        means = {result.scope: {task: e.value for task, e in result.tasks.items()} for result in comparison.scopes}
        assert means == {
            "none": dict.fromkeys(("reach", "push", "open"), 1.0),
            "vision": {"reach": 1, "push": 0, "open": 1},
        }
        header, rows = task_table(comparison)
        assert header == ["scope", "reach", "push", "open"] and [row[0] for row in rows] == ["none", "vision"]
    (tmp_path / "alone").mkdir()
    make_run(tmp_path / "alone" / "a", seed=1)
    assert task_table(compare(read_folders([str(tmp_path / "alone")]))) is None


def test_choosing_seeds_are_left_out_of_the_report(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, sampled=0.9 if seed == 1 else 0.1)
        make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed, sampled=0.5)
    comparison = compare(read_folders([str(tmp_path)]), choosing_seeds=[1])
    assert comparison.scopes[0].learning_rate == 1e-4
    assert [run.seed for run in comparison.scopes[0].runs] == [2, 3]
    with pytest.raises(UserError, match="no run with one of the seeds that should choose its rate: \\[9\\]"):
        compare(read_folders([str(tmp_path)]), choosing_seeds=[9])
    with pytest.raises(UserError, match="no seeds besides those that chose"):
        compare(read_folders([str(tmp_path)]), choosing_seeds=[1, 2, 3])


def test_a_rate_with_few_seeds_does_not_win_by_luck(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, sampled=0.6)
    make_run(tmp_path / "b1", rate=3e-4, seed=1, sampled=0.7)
    assert compare(read_folders([str(tmp_path)])).scopes[0].learning_rate == 1e-4


def test_success_is_compared_at_equal_steps_and_at_equal_wall_time(tmp_path):
    half = np.arange(STATES) % 2 == 0
    for seed in (1, 2):
        make_run(tmp_path / f"fast{seed}", "vision", seed=seed, final=half, steps=(0, 1000), pace=0.1)
        # From 0.5 to 1 in 2000 steps: 0.75 at 1000 steps, and 0.55 at 100 s = 200 of its steps.
        make_run(tmp_path / f"slow{seed}", "none", seed=seed, final=np.ones(STATES), steps=(0, 2000), pace=0.5)
    comparison = compare(read_folders([str(tmp_path)]))
    assert (comparison.env_steps, comparison.seconds) == (1000, 100)
    none, vision = comparison.scopes
    assert (none.mean.value, vision.mean.value) == pytest.approx((0.75, 0.5))
    assert (none.at_equal_time.value, vision.at_equal_time.value) == pytest.approx((0.55, 0.5))
    assert comparison.paired and none.scores[0].tolist() == [1.0, 0.5] * (STATES // 2)  # state by state
    assert any(
        "ended at 1,000 env steps, others at up to 2,000: all are compared at 1,000." in note
        for note in comparison.notes
    )


def test_without_single_episodes_nothing_is_paired_and_intervals_are_over_the_seeds_alone(tmp_path):
    for scope, seed in itertools.product(("vision", "none"), (1, 2, 3)):
        folder = make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, final=0.6 + 0.1 * seed)
    (folder / "episodes.jsonl").unlink()
    comparison = compare(read_folders([str(tmp_path)]))
    assert not comparison.paired
    assert any(
        "for the states evaluated and not for new ones: single episodes are missing" in n for n in comparison.notes
    )
    with pytest.raises(UserError, match="choose on training success"):
        compare(comparison.runs, choose_on="states")


def test_an_earlier_evaluation_without_episodes_makes_bands_and_equal_time_of_the_seeds_alone(tmp_path):
    for seed in (1, 2, 3):
        folder = make_run(tmp_path / f"a{seed}", "vision", seed=seed, final=0.6 + 0.1 * seed, pace=0.5)
        make_run(tmp_path / f"b{seed}", "none", seed=seed, final=0.6 + 0.1 * seed)
    rows = [row for row in (folder / "episodes.jsonl").read_text().splitlines() if '"global_step": 0,' not in row]
    (folder / "episodes.jsonl").write_text("\n".join(rows) + "\n")
    comparison = compare(read_folders([str(tmp_path)]))
    vision = next(result for result in comparison.scopes if result.scope == "vision")
    assert comparison.paired
    assert any(
        "Intervals at equal wall time, and the bands of curves, are for the states" in n for n in comparison.notes
    )
    expected = mean_interval([[run.mean_at("seconds", comparison.seconds)] for run in vision.runs])
    assert vision.at_equal_time == expected
    _, band = curve(vision.runs, "steps")
    assert band.high[-1] == mean_interval([[run.eval_scores[-1]] for run in vision.runs]).high


def test_curves_and_equal_time_have_the_interval_of_the_mean_seeds_and_states_crossed(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", "vision", seed=seed, final=0.6 + 0.1 * seed, pace=0.5)
        make_run(tmp_path / f"b{seed}", "none", seed=seed, final=0.6 + 0.1 * seed)
    comparison = compare(read_folders([str(tmp_path)]))
    vision = next(result for result in comparison.scopes if result.scope == "vision")
    # 200 s, what the fast runs took, are 400 env steps of the slow ones: two fifths of the way to their second.
    episodes = np.array([[run.scores(text) for text in run.episodes] for run in vision.runs])
    expected = mean_interval(0.6 * episodes[:, 0] + 0.4 * episodes[:, 1])
    found = vision.at_equal_time
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))
    steps, band = curve(vision.runs, "steps")
    for i in range(len(steps)):
        at = mean_interval(episodes[:, i])
        assert (band.value[i], band.low[i], band.high[i]) == pytest.approx((at.value, at.low, at.high))
    assert not any("for the states evaluated" in note for note in comparison.notes)


@pytest.mark.parametrize(
    ("anneal", "pace", "interrupted"), [(True, 0.5, True), (None, 0.5, True), (False, 0.5, False), (True, 0.1, False)]
)
def test_equal_wall_time_cuts_schedules_and_the_report_says_so(tmp_path, anneal, pace, interrupted):
    changes = {} if anneal is None else {"algorithm__cfg__anneal_lr": anneal}
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", "vision", seed=seed, pace=0.1, **changes)
        make_run(tmp_path / f"b{seed}", "none", seed=seed, pace=pace, **changes)
    comparison = compare(read_folders([str(tmp_path)]))
    notes = [note for note in comparison.notes if note.startswith("At equal wall time schedules are interrupted")]
    assert (comparison.interrupted, len(notes)) == (interrupted, interrupted)
    assert [("as far as is known" in note, "runs took 200 to 1,000 s" in note) for note in notes] in (
        [], [(anneal is None, True)],
    )  # fmt: skip
    assert (scope_table(comparison)[0][6] == "success at equal wall time, schedules interrupted") == interrupted


def test_two_seeds_have_an_interval_but_no_verdict(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"none{seed}", "none", seed=seed, final=0.2)
        make_run(tmp_path / f"vision{seed}", "vision", seed=seed, final=0.8)
        if seed < 3:
            make_run(tmp_path / f"lora{seed}", "lora", seed=seed, final=np.ones(STATES))
    comparison = compare(read_folders([str(tmp_path)]))
    assert comparison.scopes[0].scope == "lora" and comparison.scopes[0].mean.has_interval
    assert comparison.scopes[0].rank == (1, 3)
    assert any("Two seeds only, so intervals are too short, and no verdict: lora." in n for n in comparison.notes)
    tested = next(pair for pair in comparison.pairs if "lora" not in (pair.first, pair.second))
    assert tested.p_value == pytest.approx(tested.difference.p_value) and tested.separable  # corrected for one pair
    _, rows = pair_table(comparison)
    assert [row[4] for row in rows if "lora" in row] == ["two seeds: cannot say"] * 2
    assert ["2, too few" in row for row in scope_table(comparison)[1]] == [True, False, False]


def test_a_pair_needs_what_its_own_level_in_holms_procedure_asks(tmp_path):
    rng = np.random.default_rng(0)
    chance = {"none": 0.5, "vision": 0.62, "language": 0.97}
    for scope, seed in itertools.product(chance, (1, 2, 3, 4)):
        make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, final=rng.random(STATES) < chance[scope])
    comparison = compare(read_folders([str(tmp_path)]))
    arrays = {result.scope: result.scores for result in comparison.scopes}
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
    arrays = [result.scores for result in comparison.scopes]
    assert pair.more_seeds == np.inf and pair.states == states_needed(*arrays) > STATES
    assert np.isfinite(pair.states) and pair_table(comparison)[1][0][-1] == f"more states: {pair.states:,.0f}"


def test_splits_are_compared_where_all_reported_runs_were_evaluated_in_them(tmp_path):
    half, most = np.arange(STATES) % 2 == 0, np.arange(STATES) % 5 > 0
    for seed in (1, 2, 3):
        run = make_run(tmp_path / f"vision{seed}", "vision", seed=seed)
        if seed > 1:  # seed 1 chooses and is not reported
            write_splits(run, train=most, semantics=half if seed == 2 else ~half, execution=most[:7])
        make_run(tmp_path / f"none{seed}", "none", seed=seed)
    comparison = compare(read_folders([str(tmp_path)]), choosing_seeds=[1])
    results = {result.scope: result for result in comparison.scopes}
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


def test_runs_of_two_sweeps_are_repetitions_however_their_rate_came_about(tmp_path):
    reference = {"vision": 1e-4, "none": 5e-5}
    by_factor = {"policy__learning_rate_by_scope": reference, "policy__learning_rate_factor": 4.0}
    make_run(tmp_path / "a", "vision", 4e-4, seed=1, **by_factor)
    make_run(tmp_path / "b", "vision", 4e-4, seed=2, policy__learning_rate_by_scope={"vision": 4e-4})
    (result,) = compare(read_folders([str(tmp_path)])).scopes
    assert [run.seed for run in result.runs] == [1, 2]


def test_pairs_are_paired_by_initial_state_and_corrected_for_their_number(tmp_path):
    rng = np.random.default_rng(0)
    easy = rng.random(STATES) < 0.5  # states that every run solves
    chance = {"none": 0.5, "vision": 0.55, "language": 0.95}
    for scope, seed in itertools.product(chance, (1, 2, 3)):
        make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, final=easy | (rng.random(STATES) < chance[scope]))
    comparison = compare(read_folders([str(tmp_path)]))
    arrays = {result.scope: result.scores for result in comparison.scopes}
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
    assert all("(no interval), rank 1 to 2 of 2; not separable" in line for line in ranking(comparison))
    _, ((*_, verdict, _, more),) = pair_table(comparison)
    assert (verdict, more) == ("one seed: cannot say", "-")


# ---- by return


@pytest.fixture(scope="module")
def return_study(tmp_path_factory):
    return write_return_study(tmp_path_factory.mktemp("return_study") / "runs")


def test_curves_of_returns_have_students_interval(return_study):
    runs = read_folders([f"{return_study}/vision-0.0003-*"])
    steps, estimate = curve(runs, "steps")
    np.testing.assert_array_equal(steps, [0, 1000, 2000])
    np.testing.assert_allclose(estimate.value, [0.03, (0.03 + 987.6) / 2, 987.6])
    # 100 / 3 from the seeds with 2 degrees of freedom, 25 / 39 from the states with 39; half way, a fourth of it.
    variance = 100 / 3 + 25 / 39
    half = stats.t.ppf(0.975, variance**2 / ((100 / 3) ** 2 / 2 + (25 / 39) ** 2 / 39)) * variance**0.5
    np.testing.assert_allclose(estimate.high[1:] - estimate.value[1:], [half / 2, half], rtol=1e-5)


def test_seeds_of_equal_mean_return_are_not_taken_for_certain(tmp_path):
    returns = np.arange(STATES) ** 2.0
    for scope, seed in itertools.product(("none", "vision"), (1, 2, 3)):  # every seed has the same mean
        shifted = np.roll(returns, 7 * seed + 3 * (scope == "none")) + 50 * (scope == "vision")
        make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, returns=shifted)
    vision, none = (comparison := compare(read_folders([str(tmp_path)]))).scopes
    (pair,) = comparison.pairs
    assert pair.difference.value == 50 and not pair.separable
    assert pair.more_seeds == seeds_needed(vision.scores, none.scores, bounded=False) - 3


def test_a_final_episode_without_return_leaves_the_comparison_unpaired(tmp_path):
    folder = make_run(tmp_path / "a", returns=np.full(STATES, 7.0))
    lines = (folder / "episodes.jsonl").read_text().replace('"episode_return": 7.0', '"episode_return": null', 1)
    (folder / "episodes.jsonl").write_text(lines)
    comparison = compare(read_folders([str(tmp_path)]))
    assert comparison.runs[0].episodes[-1] == "" and not comparison.paired
    assert comparison.scopes[0].mean.value == 7


def test_choosing_on_states_takes_every_other_return(tmp_path):
    even = np.arange(STATES) % 2 == 0
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, returns=np.where(even, 250.0, -12.5))
        make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed, returns=np.where(even, 3.0, 700.0))
    comparison = compare(read_folders([str(tmp_path)]), choose_on="states")
    assert comparison.chosen_by == {("none", 1e-4): 250, ("none", 3e-4): 3}
    assert comparison.scopes[0].mean.value == -12.5


def test_equal_returns_everywhere_tell_nothing_about_new_seeds(tmp_path):
    for scope, seed in itertools.product(("none", "vision"), (1, 2, 3)):
        make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, returns=np.full(STATES, 1000.0))
    comparison = compare(read_folders([str(tmp_path)]))
    assert all("1000 (no interval), rank 1 to 2 of 2" in line for line in ranking(comparison))
    _, ((*_, verdict, _, _),) = pair_table(comparison)
    assert verdict == "equal scores: cannot say"


# ---- refusals


def refused(tmp_path, *changes, **common):
    for i, change in enumerate(changes):
        make_run(tmp_path / f"run{i}", **{"seed": i, **common, **change})
    with pytest.raises(UserError) as error:
        compare(read_folders([str(tmp_path)]))
    return str(error.value)


def test_runs_of_different_environments_are_refused(tmp_path):
    message = refused(tmp_path, {}, {}, {"trainer__env": "gym:Reacher-v5"})
    assert message == (
        'these runs cannot be compared, trainer.env differs: "tabletop" in run0 and 1 more; "gym:Reacher-v5" in run2'
    )


def test_a_crashed_run_of_another_environment_is_left_out_and_does_not_end_the_comparison(tmp_path):
    make_run(tmp_path / "a")
    (make_run(tmp_path / "b", trainer__env="gym:Reacher-v5") / "summary.json").unlink()
    assert [run.run for run in compare(read_folders([str(tmp_path)])).scopes[0].runs] == ["a"]


def test_runs_with_success_and_runs_with_return_only_are_refused(tmp_path):
    changes = {"trainer__env": "gym:my_env:Reach", "returns": np.ones(STATES)}
    message = refused(tmp_path, {"trainer__env": "gym:my_env:Reach", "trainer__env_config": {}}, changes, changes)
    assert message.endswith('what evaluations measure differs: "success" in run0; "return" in run1 and 1 more')


def test_a_run_that_died_before_its_first_evaluation_is_no_run_of_another_measure(tmp_path):
    make_run(tmp_path / "a")
    died = make_run(tmp_path / "b", seed=2)
    (died / "metrics.jsonl").write_text("")
    comparison = compare(read_folders([str(tmp_path)]))
    assert comparison.measure == "success"
    assert "`b` is excluded from all means: no evaluations in its metrics." in comparison.notes


def test_runs_of_different_env_configs_are_refused(tmp_path):
    message = refused(tmp_path, {}, {"trainer__env_config": {"task": "pick_place", "reward": "sparse"}})
    assert message.endswith('trainer.env_config.reward differs: null in run0; "sparse" in run1')


def test_runs_with_different_evaluation_states_are_refused(tmp_path):
    message = refused(tmp_path, {}, {"trainer__num_eval_episodes": 20})
    assert message.endswith('the initial states of the evaluation differs: "0-39" in run0; "0-19" in run1')


def test_seeds_that_are_no_repetitions_are_refused(tmp_path):
    assert "run0 and run1 are the same seed 7 of scope none, learning rate 0.0001" in refused(
        tmp_path / "twice", {"seed": 7}, {"seed": 7}
    )
    assert (
        "run0 and run1, both scope none, learning rate 0.0001, are no repetitions: algorithm.cfg.n_epochs is 4 and 8"
        in (refused(tmp_path / "unlike", {}, {"algorithm__cfg__n_epochs": 8}))
    )


def test_scopes_may_differ_in_settings_and_the_report_says_in_which(tmp_path):
    make_run(tmp_path / "a", "none")
    make_run(tmp_path / "b", "vision", algorithm__cfg__n_epochs=8)
    notes = compare(read_folders([str(tmp_path)])).notes
    assert "Besides scope, rate and seed, the runs differ in `algorithm.cfg.n_epochs`." in notes


def test_runs_whose_initial_states_have_no_ids_are_not_paired(tmp_path):
    for scope, seed in itertools.product(("none", "vision"), (1, 2, 3)):
        make_run(tmp_path / f"{scope}-{seed}", scope, seed=seed, trainer__env_config={"ids_reproducible": False})
    comparison = compare(read_folders([str(tmp_path)]))
    assert not comparison.paired
    assert any("ids of initial states are not reproducible" in note for note in comparison.notes)
