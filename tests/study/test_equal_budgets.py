"""Where runs are compared: at equal env steps or wall time, cut where they must be, and paired by initial state."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats
from study_worlds import STATES, make_run, write_choosing, write_return_study, written

from research.errors import UserError
from research.study.comparison import compare
from research.study.equal_budgets import curve
from research.study.run_sources import read_folders
from research.study.run_table import read_table, write_table
from research.study.statistics import mean_interval
from research.study.tables import arm_table, describe


@pytest.fixture(scope="module")
def return_study(tmp_path_factory):
    return write_return_study(tmp_path_factory.mktemp("return_study") / "runs")


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
    for result in comparison.arms:
        assert result.scores.shape == (2, STATES) and np.isin(result.scores, (0, 1)).all()
    write_table(tmp_path / "runs.csv", runs)
    assert compare(read_table(tmp_path / "runs.csv")).paired
    for run in runs:
        run.iteration_steps = 40.0  # two of them went on for longer than an iteration
    assert not compare(runs).paired


def test_success_is_compared_at_equal_steps_and_at_equal_wall_time(tmp_path):
    half = np.arange(STATES) % 2 == 0
    for seed in (1, 2):
        make_run(tmp_path / f"fast{seed}", "vision", seed=seed, final=half, steps=(0, 1000), pace=0.1)
        # From 0.5 to 1 in 2000 steps: 0.75 at 1000 steps, and 0.55 at 100 s = 200 of its steps.
        make_run(tmp_path / f"slow{seed}", "none", seed=seed, final=np.ones(STATES), steps=(0, 2000), pace=0.5)
    comparison = compare(read_folders([str(tmp_path)]))
    assert (comparison.env_steps, comparison.seconds) == (1000, 100)
    none, vision = comparison.arms
    assert (none.mean.value, vision.mean.value) == pytest.approx((0.75, 0.5))
    assert (none.at_other_axis.value, vision.at_other_axis.value) == pytest.approx((0.55, 0.5))
    assert comparison.paired and none.scores[0].tolist() == [1.0, 0.5] * (STATES // 2)  # state by state
    assert any(
        "ended at 1,000 env steps, others at up to 2,000: all are compared at 1,000." in note
        for note in comparison.notes
    )


@pytest.mark.parametrize(("seconds", "at_seconds"), [(100.0, 0.9), (109.0, 0.9), (111.0, 0.5 + 0.4 * 100 / 111)])
def test_runs_that_took_about_as_long_count_as_they_ended(tmp_path, seconds, at_seconds):
    """Evaluated before and after training alone: what is in between would be half of the start."""
    final = np.arange(STATES) < 0.9 * STATES
    for seed in (1, 2, 3):
        alike = {"seed": seed, "final": final, "steps": (0, 2000), "algorithm__cfg__anneal_lr": False}
        make_run(tmp_path / f"a{seed}", "vision", pace=100 / 2000, **alike)
        make_run(tmp_path / f"b{seed}", "none", pace=seconds / 2000, **alike)
    for equal in ("seconds", "steps"):
        comparison = compare(read_folders([str(tmp_path)]), equal=equal)
        none = next(result for result in comparison.arms if result.arm == "none")
        found = none.mean if equal == "seconds" else none.at_other_axis
        assert found.value == pytest.approx(at_seconds)
        said = any("(100 s) 3 runs that took up to 109 s count as they ended" in note for note in comparison.notes)
        assert said == (seconds == 109.0)
    at_ends = compare(read_folders([str(tmp_path)]), equal="ends")
    assert not any("count as they ended" in note for note in at_ends.notes)
    assert "wall time" not in describe(at_ends)[0]  # neither is shown there
    places, mean = curve(none.runs, "seconds")
    assert places[-1] == seconds and mean.value[0] == pytest.approx(0.5)  # as evaluated, whoever it is compared with


def test_runs_that_were_never_evaluated_at_one_place_have_no_curve(tmp_path):
    runs = [make_run(tmp_path / f"a{seed}", seed=seed, steps=(0, 2000 + seed)) for seed in (1, 2)]
    read = read_folders([str(run) for run in runs])
    for run in read:
        run.eval_steps, run.eval_seconds, run.eval_scores = (
            run.eval_steps[1:],
            run.eval_seconds[1:],
            run.eval_scores[1:],
        )
        run.episodes = run.episodes[1:]
    places, mean = curve(read, "steps")
    assert places.shape == mean.value.shape == mean.low.shape == (0,)


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
    vision = next(result for result in comparison.arms if result.arm == "vision")
    assert comparison.paired
    assert any(
        "Intervals at equal wall time, and the bands of curves, are for the states" in n for n in comparison.notes
    )
    expected = mean_interval([[run.mean_at("seconds", comparison.seconds)] for run in vision.runs])
    assert written(vision.at_other_axis) == written(expected)
    _, band = curve(vision.runs, "steps")
    assert band.high[-1] == mean_interval([[run.eval_scores[-1]] for run in vision.runs]).high


def test_curves_and_equal_time_have_the_interval_of_the_mean_seeds_and_states_crossed(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", "vision", seed=seed, final=0.6 + 0.1 * seed, pace=0.5)
        make_run(tmp_path / f"b{seed}", "none", seed=seed, final=0.6 + 0.1 * seed)
    comparison = compare(read_folders([str(tmp_path)]))
    vision = next(result for result in comparison.arms if result.arm == "vision")
    # 200 s, what the fast runs took, are 400 env steps of the slow ones: two fifths of the way to their second.
    episodes = np.array([[run.scores(text) for text in run.episodes] for run in vision.runs])
    expected = mean_interval(0.6 * episodes[:, 0] + 0.4 * episodes[:, 1])
    found = vision.at_other_axis
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
    assert (comparison.interrupted == {"seconds"}, len(notes)) == (interrupted, interrupted)
    assert [("as far as is known" in note, "runs took 200 to 1,000 s" in note) for note in notes] in (
        [], [(anneal is None, True)],
    )  # fmt: skip
    assert (arm_table(comparison)[0][6] == "success at equal wall time, schedules interrupted") == interrupted


def test_curves_of_returns_have_students_interval(return_study):
    runs = read_folders([f"{return_study}/vision-0.0003-*"])
    steps, estimate = curve(runs, "steps")
    np.testing.assert_array_equal(steps, [0, 1000, 2000])
    np.testing.assert_allclose(estimate.value, [0.03, (0.03 + 987.6) / 2, 987.6])
    # 100 / 3 from the seeds with 2 degrees of freedom, 25 / 39 from the states with 39; half way, a fourth of it.
    variance = 100 / 3 + 25 / 39
    half = stats.t.ppf(0.975, variance**2 / ((100 / 3) ** 2 / 2 + (25 / 39) ** 2 / 39)) * variance**0.5
    np.testing.assert_allclose(estimate.high[1:] - estimate.value[1:], [half / 2, half], rtol=1e-5)


def test_a_final_episode_without_return_leaves_the_comparison_unpaired(tmp_path):
    folder = make_run(tmp_path / "a", returns=np.full(STATES, 7.0))
    lines = (folder / "episodes.jsonl").read_text().replace('"episode_return": 7.0', '"episode_return": null', 1)
    (folder / "episodes.jsonl").write_text(lines)
    comparison = compare(read_folders([str(tmp_path)]))
    assert comparison.runs[0].episodes[-1] == "" and not comparison.paired
    assert comparison.arms[0].mean.value == 7


def test_runs_whose_initial_states_have_no_ids_are_not_paired(tmp_path):
    for scope, seed in itertools.product(("none", "vision"), (1, 2, 3)):
        make_run(tmp_path / f"{scope}-{seed}", scope, seed=seed, trainer__env_config={"ids_reproducible": False})
    comparison = compare(read_folders([str(tmp_path)]))
    assert not comparison.paired
    assert any("ids of initial states are not reproducible" in note for note in comparison.notes)


def timed(tmp_path, **changes):
    """Two arms that end at 100 s, one after 1000 steps and one after 400: better at its end, and worse before."""
    for seed in (1, 2, 3):
        ends = {"vision": (1000, 0.1, 0.6), "none": (400, 0.25, 0.9)}
        for scope, (steps, pace, final) in ends.items():
            marks = np.arange(STATES) < final * STATES
            folder = tmp_path / f"{scope}{seed}"
            make_run(folder, scope, seed=seed, final=marks, steps=(0, steps), pace=pace, **changes)
    return read_folders([str(tmp_path)])


def test_arms_that_were_given_one_time_are_ranked_where_their_schedules_end(tmp_path):
    runs = timed(tmp_path, algorithm__cfg__anneal_lr=True)
    comparison = compare(runs, equal="seconds")
    assert (comparison.env_steps, comparison.seconds, comparison.place) == (400, 100, 100)
    assert comparison.interrupted == {"steps"}
    none, vision = comparison.arms
    assert (none.arm, none.mean.value, vision.mean.value) == ("none", 0.9, 0.6)
    expected = 0.5 + 0.4 * (0.6 - 0.5)  # at 400 of its 1000 steps
    assert (none.at_other_axis.value, vision.at_other_axis.value) == pytest.approx((0.9, expected))
    (pair,) = comparison.pairs
    assert pair.difference.value == pytest.approx(0.3)
    assert arm_table(comparison)[0][6] == "success at equal env steps, schedules interrupted"
    assert describe(comparison)[0].endswith("Runs are compared at equal wall time.")
    note = next(note for note in comparison.notes if note.startswith("At equal env steps schedules are interrupted"))
    assert "runs had 400 to 1,000 env steps" in note and "give each scope the iterations that fit the time" in note


def test_arms_are_compared_at_the_ends_of_what_each_was_given(tmp_path):
    """Whatever env steps and seconds that was, which here are equal in neither."""
    for seed in (1, 2, 3):
        for scope, steps, pace, final in (("vision", 1000, 0.5, 0.7), ("none", 400, 0.2, 0.8)):
            marks = np.arange(STATES) < final * STATES
            changes = {"algorithm__cfg__anneal_lr": True}
            make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, final=marks, steps=(0, steps), pace=pace, **changes)
    runs = read_folders([str(tmp_path)])
    with pytest.raises(UserError, match="if they were given those, say --equal=ends$"):
        compare(runs, equal="seconds")
    comparison = compare(runs, equal="ends")
    none, vision = comparison.arms
    assert (none.arm, none.mean.value, vision.mean.value) == ("none", 0.8, 0.7) and comparison.paired
    assert vision.at_other_axis.value == pytest.approx(0.5 + 0.4 * (0.7 - 0.5))  # at 400 of its 1000 steps
    assert comparison.pairs[0].difference.value == pytest.approx(0.1)
    header, rows = arm_table(comparison)
    assert [row[header.index("env steps")] for row in rows] == ["400", "1,000"]
    assert describe(comparison)[0].endswith("Each run is compared at its own end, whatever it was given.")
    assert any(note.endswith("others at up to 1,000: each is compared at its own end.") for note in comparison.notes)
    ends = np.array([run.scores(run.episodes[-1]) for run in vision.runs])
    assert (vision.scores == ends).all()


def test_an_arm_has_one_budget_where_its_runs_are_compared_at_their_ends(tmp_path):
    for seed, steps in ((1, 400), (2, 420), (3, 1000)):
        make_run(tmp_path / f"a{seed}", "vision", seed=seed, steps=(0, steps))
    with pytest.raises(UserError, match="a1 and .*a3, of one arm and learning rate, end at 400 and 1,000 env steps; "):
        compare(read_folders([str(tmp_path)]), equal="ends")
    (tmp_path / "a3").rename(tmp_path.parent / "away")
    assert compare(read_folders([str(tmp_path)]), equal="ends").arms[0].mean.value > 0


def test_iterations_may_differ_between_arms_and_an_order_of_cut_schedules_is_doubted(tmp_path):
    for seed in (1, 2, 3):
        for scope, steps in (("vision", 1000), ("none", 400)):
            changes = {"trainer__iterations": steps // 100, "algorithm__cfg__anneal_lr": True}
            make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, steps=(0, steps), **changes)
    comparison = compare(read_folders([str(tmp_path)]))
    assert comparison.interrupted == {"steps", "seconds"}
    assert "Besides scope, rate and seed, the runs differ in `trainer.iterations`." in comparison.notes
    assert any(note.endswith("the order may be that of the schedules.") for note in comparison.notes)


def test_an_order_at_equal_wall_time_is_refused_where_schedules_would_be_cut(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", "vision", seed=seed, pace=0.1, algorithm__cfg__anneal_lr=True)
        make_run(tmp_path / f"b{seed}", "none", seed=seed, pace=0.5, algorithm__cfg__anneal_lr=True)
    with pytest.raises(UserError) as error:
        compare(read_folders([str(tmp_path)]), equal="seconds")
    message = str(error.value)
    assert message.startswith("--equal=seconds would cut schedules: ") and "runs took 200 to 1,000 s" in message


def test_runs_that_were_evaluated_at_unlike_ends_alone_are_compared_there_or_not_at_all(tmp_path):
    """By `--evaluation`, say: there is no score of the longer run where the shorter one ended."""
    for seed in (1, 2, 3):
        for scope, steps, pace in (("vision", 2000, 0.1), ("none", 500, 0.4)):
            folder = make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, steps=(0, steps), pace=pace)
            write_choosing(folder, np.arange(STATES) < 10 * seed, first=200)
    runs = read_folders([str(tmp_path)], "choosing")
    with pytest.raises(UserError) as error:
        compare(runs)
    assert str(error.value) == (
        "vision1 was evaluated at 2,000 env steps alone, and none1 ended at 500: nothing is known of the former there; "
        "name runs of one budget, or, if each was given what it should have, say --equal=ends"
    )
    assert compare(runs, equal="seconds").arms[0].mean.value == 0.5  # all took 200 s
    comparison = compare(runs, equal="ends")
    assert [arm.mean.value for arm in comparison.arms] == [0.5, 0.5]
    header, rows = arm_table(comparison)
    at_equal_steps = header.index("success at equal env steps, schedules interrupted")
    assert {row[0]: (row[3], row[at_equal_steps][:5]) for row in rows} == {"vision": ("-", "-"), "none": ("-", "0.500")}
    for run in runs:  # within an iteration of the shortest all count as if they had ended there
        run.iteration_steps = 1600.0
    assert compare(runs).arms[0].mean.value == 0.5


def test_before_is_of_runs_that_were_evaluated_before(tmp_path):
    for seed in (1, 2):
        write_choosing(make_run(tmp_path / f"{seed}", seed=seed), np.ones(STATES), first=200)
    assert arm_table(compare(read_folders([str(tmp_path)], "choosing")))[1][0][3] == "-"
    assert arm_table(compare(read_folders([str(tmp_path)])))[1][0][3] == "0.500"
