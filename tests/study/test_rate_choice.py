"""What chooses a scope's learning rate, what it refuses to be chosen by, and which rates it cannot tell apart."""

import itertools
import math

import numpy as np
import pytest
from study_worlds import STATES, make_run, write_choosing
from worlds import ROOT

from research.errors import UserError
from research.study.comparison import compare
from research.study.rate_choice import choose_rate
from research.study.run_sources import read_folders
from research.study.run_table import read_table, write_table
from research.study.statistics import standard_error_of_difference
from research.study.tables import cell_table, runner_up_notes


def share(rate, states=STATES):
    return np.arange(states) < rate * states


def test_a_rate_can_be_chosen_by_success_on_other_states_than_are_reported(tmp_path):
    for seed in (1, 2, 3):
        good = make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, final=share(0.5), sampled=0.1)
        write_choosing(good, share(0.9, 20))
        bad = make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed, final=share(0.9), sampled=0.9)
        write_choosing(bad, share(0.3, 20))
    comparison = compare(read_folders([str(tmp_path)]), "other_states")
    assert comparison.arms[0].learning_rate == 1e-4 and comparison.arms[0].mean.value == 0.5
    assert comparison.chosen_by == pytest.approx({("none", 1e-4): 0.9, ("none", 3e-4): 0.3})
    assert "deterministic success of the last checkpoint on initial states that are not reported" in comparison.notes[0]
    write_table(tmp_path / "runs.csv", comparison.runs)
    assert compare(read_table(tmp_path / "runs.csv"), "other_states").chosen_by == comparison.chosen_by


def test_other_states_choose_by_themselves_where_all_runs_that_choose_have_them(tmp_path):
    for seed in (1, 2):
        good = make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, final=share(0.5), sampled=0.1)
        write_choosing(good, share(0.9, 20))
        bad = make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed, final=share(0.9), sampled=0.9)
        if seed == 1:
            write_choosing(bad, share(0.3, 20))
    runs = read_folders([str(tmp_path)])
    by_default = compare(runs, choosing_seeds=[1])
    assert by_default.arms[0].learning_rate == 1e-4 and "initial states that are not reported" in by_default.notes[0]
    assert compare(runs, "training", [1]).arms[0].learning_rate == 3e-4
    assert compare(runs).arms[0].learning_rate == 3e-4  # seed 2 of one rate has no other states


def test_choosing_on_other_states_needs_them_and_they_must_be_others(tmp_path):
    a, b = (make_run(tmp_path / f"a{seed}", seed=seed) for seed in (1, 2))
    write_choosing(a, share(0.5, 20))

    def refused(**options):
        with pytest.raises(UserError) as error:
            compare(read_folders([str(tmp_path)]), "other_states", **options)
        return str(error.value)

    assert "a2 was not evaluated on other states; evaluate_vla.py --checkpoint=<run> --first_state=40" in refused()
    assert compare(
        read_folders([str(tmp_path)]), "other_states", choosing_seeds=[1]
    )  # asked of those that choose alone
    write_choosing(b, share(0.5, 20), first=30)
    assert "a2 would choose on the states 30-49, of which 30-39 are reported" in refused()
    (b / "choosing" / "episodes.jsonl").unlink()
    (b / "choosing").rmdir()
    write_choosing(b, share(0.5, 20), first=50)
    assert "a1 and a2 were evaluated on different other states, 40-59 and 50-69" in refused()


def test_all_rates_of_an_arm_are_chosen_from_on_the_same_other_states(tmp_path):
    for seed, (rate, first) in itertools.product((1, 2), ((1e-4, 40), (3e-4, 50))):
        write_choosing(make_run(tmp_path / f"{rate}-{seed}", rate=rate, seed=seed), share(0.5, 20), first=first)
        write_choosing(make_run(tmp_path / f"v{rate}-{seed}", "vision", rate=rate, seed=seed), share(0.5, 20), first=60)
    with pytest.raises(UserError, match="0.0001-1 and 0.0003-1 were evaluated on different other states, 40-59 and 50"):
        compare(read_folders([str(tmp_path)]))
    with pytest.raises(UserError, match="need the same initial states, got 20, 10"):
        standard_error_of_difference(np.ones((2, 20)), np.ones((2, 10)))


def test_whether_single_episodes_choose_is_the_same_for_all_rates(tmp_path):
    """Of a rate whose episodes are not known, the states' part of a difference is not taken out of one side alone."""
    for seed, (rate, rose) in itertools.product((1, 2), ((1e-4, 0.9), (3e-4, 0.8))):
        make_run(tmp_path / f"{rate}-{seed}", rate=rate, seed=seed, final=share(rose - 0.1 * seed))
    (tmp_path / "0.0003-1" / "episodes.jsonl").unlink()
    comparison = compare(read_folders([str(tmp_path)]), "evaluation")
    (other,) = comparison.arms[0].runners_up
    means = [np.array([[run.eval_scores[-1]] for run in runs]) for runs in comparison.cells.values()]
    assert other.error == pytest.approx(standard_error_of_difference(*means))


def test_rates_within_two_standard_errors_are_runners_up_and_others_are_not():
    # Means 0.8 and variance 0.01 / 3 for the best: two standard errors of a difference are 2 * sqrt(0.02 / 3) = 0.163.
    best, near, far = ([[m - 0.1], [m], [m + 0.1]] for m in (0.8, 0.64, 0.63))
    notes = []
    choice = choose_rate("none", {1.0: np.array(near), 2.0: np.array(best), 3.0: np.array(far)}, True, notes)
    assert (choice.learning_rate, choice.seeds, choice.rates) == (2.0, 3, 3) and notes == []
    assert choice.runners_up == {1.0: pytest.approx((0.16, np.sqrt(0.02 / 3)))}


def test_rates_with_too_few_seeds_are_named_and_open(tmp_path):
    """One that did better, one that cannot be told from what was taken, and one that is clearly worse."""
    rates = {1e-4: (0.80, range(1, 8)), 4e-4: (0.95, (1, 2)), 2e-4: (0.815, (1, 2)), 8e-4: (0.1, (1, 2))}
    for rate, (sampled, seeds) in rates.items():
        for seed in seeds:
            make_run(tmp_path / f"{rate}-{seed}", rate=rate, seed=seed, final=share(0.5), sampled=sampled + 0.01 * seed)
    comparison = compare(read_folders([str(tmp_path)]))
    (result,) = comparison.arms
    assert result.learning_rate == 1e-4
    assert (
        "For none, 0.0001 (7 seeds that choose) was not chosen among rates with less than half as many: 0.0002 (2), "
        "0.0004 (2), 0.0008 (2). 0.0004 did better than what was taken. Give all rates as many seeds, or name seeds "
        "that all have (--choosing_seeds)."
    ) in comparison.notes
    assert [(other.learning_rate, other.behind < 0) for other in result.runners_up] == [(2e-4, False), (4e-4, True)]
    (note,) = runner_up_notes(comparison)
    assert "0.0004 is 0.125 ahead (standard error" in note
    assert not any("was not chosen among" in note for note in compare(comparison.runs, choosing_seeds=[1]).notes)


def test_one_seed_tells_no_rate_from_another():
    choice = choose_rate("none", {1.0: np.array([[0.1]]), 2.0: np.array([[0.9]]), 3.0: None}, True, [])
    assert choice.learning_rate == 2.0 and np.isnan(choice.runners_up[1.0][1]) and list(choice.runners_up) == [1.0]


def test_states_that_both_rates_share_are_paired_in_the_choice():
    rng = np.random.default_rng(0)
    easy = rng.random(400) < 0.5
    first, second = (np.stack([easy | (rng.random(400) < p) for _ in range(3)]).astype(float) for p in (0.2, 0.1))
    paired = choose_rate("none", {1.0: first, 2.0: second}, True, []).runners_up
    apart = choose_rate("none", {1.0: first, 2.0: second[:, rng.permutation(400)]}, True, []).runners_up
    assert paired == {} and list(apart) == [2.0]


def test_a_runner_up_is_reported_from_its_own_fresh_seeds(tmp_path):
    for seed in (1, 2, 3, 4, 5):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, final=share(0.8), sampled=0.70 + 0.01 * seed)
        make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed, final=share(0.5), sampled=0.71 + 0.01 * seed)
        make_run(tmp_path / f"c{seed}", rate=9e-4, seed=seed, final=share(0.1), sampled=0.1 + 0.01 * seed)
        if seed < 3:
            make_run(tmp_path / f"d{seed}", rate=2e-4, seed=seed, final=share(0.7), sampled=0.70 + 0.01 * seed)
    comparison = compare(read_folders([str(tmp_path)]), choosing_seeds=[1, 2, 3])
    (result,) = comparison.arms
    assert (result.learning_rate, result.mean.value) == (3e-4, 0.5)
    found = {other.learning_rate: (other.mean.value, other.seeds, other.fresh) for other in result.runners_up}
    assert found == {1e-4: (0.8, 2, True), 2e-4: (0.7, 2, False)}
    (note,) = runner_up_notes(comparison)
    assert note.startswith("The choice of a rate for none is open. It took 0.0003, with 0.500 [")
    assert "0.0001 is 0.010 behind (standard error 0.008) and its success 0.800 [" in note
    assert "] (2 seeds); 0.0002 is" in note and note.endswith("] (2 choosing seeds).")
    _, rows = cell_table(comparison)
    assert [(row[1], row[6]) for row in rows] == [
        ("0.0001", "runner-up"), ("0.0002", "runner-up"), ("0.0003", "yes"), ("0.0009", ""),
    ]  # fmt: skip
    assert rows[0][7].startswith("0.800 [") and rows[3][7] == ""


@pytest.mark.parametrize(("seeds", "noted"), [((1, 2), True), ((1, 2, 3), False)])
def test_fewer_than_three_choosing_seeds_are_noted(tmp_path, seeds, noted):
    for seed in (1, 2, 3, 4):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed)
        make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed)
        make_run(tmp_path / f"c{seed}", "vision", rate=3e-4, seed=seed)  # one rate: nothing to choose
    notes = compare(read_folders([str(tmp_path)]), choosing_seeds=seeds).notes
    text = "Learning rates chosen on fewer than 3 seeds, which are too few: none (2)."
    assert (text in notes) == noted


def test_an_only_rate_needs_no_training_score_and_one_of_several_does(tmp_path):
    """A short run ends before its first episode does."""
    for seed in (1, 2):
        make_run(tmp_path / f"{seed}", seed=seed, sampled=math.nan)
    comparison = compare(read_folders([str(tmp_path)]))
    assert [arm.learning_rate for arm in comparison.arms] == [1e-4]
    assert not any("chosen" in note for note in comparison.notes)
    make_run(tmp_path / "other", rate=1e-3)
    with pytest.raises(
        UserError,
        match="no training success to choose the learning rate on; say --choose_on=states, or --cho",
    ):
        compare(read_folders([str(tmp_path)]))


def evaluated_twice(tmp_path):
    """Success by training is best at 3e-4, in `choosing/` at 1e-4, and in `kept/` at 3e-4 again."""
    for seed in (1, 2, 3):
        for rate, chosen, kept, sampled in ((1e-4, 0.9, 0.2, 0.1), (3e-4, 0.3, 0.7, 0.9)):
            folder = make_run(tmp_path / f"{rate}-{seed}", rate=rate, seed=seed, final=share(0.5), sampled=sampled)
            write_choosing(folder, share(kept, 20), first=500)
            (folder / "choosing").rename(folder / "kept")
            write_choosing(folder, share(chosen, 20))


def test_other_states_choose_whatever_evaluation_is_reported(tmp_path):
    evaluated_twice(tmp_path)
    comparison = compare(read_folders([str(tmp_path)], "kept"))
    assert (comparison.arms[0].learning_rate, comparison.arms[0].mean.value) == (1e-4, 0.2)
    assert "deterministic success of the last checkpoint on initial states" in comparison.notes[0]
    assert comparison.chosen_by == compare(read_folders([str(tmp_path)]), "other_states").chosen_by
    for folder in tmp_path.iterdir():  # runs that evaluated nothing themselves have them too
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        (folder / "metrics.jsonl").write_text("".join(row + "\n" for row in rows if "eval/return" not in row))
        (folder / "episodes.jsonl").unlink()
    assert compare(read_folders([str(tmp_path)], "kept")).chosen_by == comparison.chosen_by


def test_the_evaluation_to_choose_by_chooses_where_it_is_reported_and_its_numbers_are_doubted(tmp_path):
    evaluated_twice(tmp_path)
    comparison = compare(read_folders([str(tmp_path)], "choosing"))
    assert (comparison.arms[0].learning_rate, comparison.arms[0].mean.value) == (1e-4, 0.9)
    assert comparison.chosen_by == pytest.approx({("none", 1e-4): 0.9, ("none", 3e-4): 0.3})
    assert "the same seeds and episodes chose it, so that its numbers are too high" in comparison.notes[0]
    write_table(tmp_path / "runs.csv", comparison.runs)
    assert compare(read_table(tmp_path / "runs.csv")).chosen_by == comparison.chosen_by
    fresh = compare(comparison.runs, choosing_seeds=[1, 2])
    assert fresh.notes[0].endswith("on seeds 1, 2; the numbers are from the other seeds.")
    assert compare(comparison.runs, "training").arms[0].learning_rate == 3e-4
    assert compare(read_folders([str(tmp_path)], "kept"), "evaluation").arms[0].learning_rate == 3e-4  # if one asks


def test_rates_that_were_given_unlike_budgets_are_not_chosen_by_their_ends(tmp_path):
    """The longer one is the better at its end, and the worse where all are compared."""
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, final=share(0.9), steps=(0, 2000, 8000))
        make_run(tmp_path / f"b{seed}", rate=4e-4, seed=seed, final=share(0.8), steps=(0, 2000))
    with pytest.raises(UserError) as error:
        compare(read_folders([str(tmp_path)]))
    assert str(error.value) == (
        "the learning rate of none would be chosen by what runs came to at unlike ends, b1 (0.0004) at 2,000 and a3 "
        "(0.0001) at 8,000 env steps: name runs of one budget, or what they were given in --by; --choose_on=states "
        "chooses where all are compared"
    )
    assert compare(read_folders([str(tmp_path)]), "states").arms[0].learning_rate in (1e-4, 4e-4)
    with pytest.raises(UserError, match="at unlike ends"):
        compare(read_folders([str(tmp_path)]), "states", equal="ends")
    assert len(compare(read_folders([str(tmp_path)]), by=["algorithm.cfg.learning_rate"]).arms) == 2


def test_the_committed_rates_of_pretrained_scopes_are_the_best_by_the_evaluation_that_their_plan_names():
    comparison = compare(read_table(ROOT / "experiments" / "results" / "pretrained_scopes_rates" / "runs.csv"))
    ends: dict[tuple[str, float], list[float]] = {}
    for run in comparison.runs:
        ends.setdefault((run.scope, run.learning_rate), []).append(run.eval_scores[-1])
    means = {cell: np.mean(scores) for cell, scores in ends.items()}
    for arm in comparison.arms:
        assert means[arm.arm, arm.learning_rate] == max(mean for (scope, _), mean in means.items() if scope == arm.arm)
