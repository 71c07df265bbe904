"""Comparing runs: what is read, refused and left out; the rate's choice; and numbers that a CSV recomputes."""

import base64
import csv
import itertools
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import compare_runs
import numpy as np
import pytest
import wandb
from scipy import stats

from research.runs.video import write_video
from research.schema import UserError
from research.study import run_table
from research.study.comparison import compare, curve
from research.study.run_table import read_folders, read_table, read_wandb, write_table
from research.study.statistics import difference_interval, iqm_interval, mean_interval, seeds_needed

STATES = 40


def config_of(scope="none", rate=1e-4, seed=1, **changes):
    config = {
        "trainer": {"env": "tabletop", "env_config": {"task": "pick_place"}, "seed": seed, "num_eval_episodes": STATES},
        "policy": {"freeze": scope, "vla_config": {"model_path": None, "model_config": {}}},
        "algorithm": {"cfg": {"learning_rate": rate, "n_epochs": 4}},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for name in parents:
            node = node[name]
        node[last] = value
    return config


def make_run(
    folder, scope="none", rate=1e-4, seed=1, final=0.8, sampled=None, steps=(0, 1000, 2000), pace=0.1, returns=None,
    **changes,
):  # fmt: skip
    """A run folder as ppo_vla.py leaves it: success rises evenly from 0.5 to `final`, `pace` seconds per env step.

    `final` is a rate, whose episodes are then drawn, or the outcomes of the final episodes themselves. With `returns`,
    those of the final episodes, the environment is one without success, and returns rise from 0.03.
    """
    if returns is not None:
        changes = {"trainer__env": "gym:InvertedPendulum-v5", "trainer__env_config": {}, **changes}
    config = config_of(scope, rate, seed, **changes)
    if isinstance(final, float):
        rng = np.random.default_rng([seed, int(rate * 1e7), len(str(scope))])
        final = rng.random(config["trainer"]["num_eval_episodes"]) < final
    final = np.asarray(final, dtype=bool)
    has_success = returns is None
    returns = np.asarray(-7.0 * final if has_success else returns, dtype=float)  # logged next to success, too
    trained = {"rollout/return": returns.mean() if sampled is None else sampled, "rollout/episodes": 10.0}
    if has_success:
        trained["rollout/success_rate"] = final.mean() if sampled is None else sampled
    rows, episodes = [], []
    for i, step in enumerate(steps):
        done = i / (len(steps) - 1)
        row = {"global_step": step, "time/elapsed_s": pace * step, "eval/return": 0.03 + done * (returns.mean() - 0.03)}
        if has_success:
            row["eval/success_rate"] = float(0.5 + done * (final.mean() - 0.5))
        rows += [row, {"global_step": step + 1, "time/elapsed_s": pace * step, **trained}]
        last = step == steps[-1]
        episodes += [
            {
                "global_step": step, "seed": seed, "initial_state": state, "instruction": "",
                "success": bool(last and final[state]) if has_success else None,
                "episode_return": last * returns[state],
            }
            for state in range(config["trainer"]["num_eval_episodes"])
        ]  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "videos").mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in episodes))
    (folder / "summary.json").write_text(json.dumps({"global_step": steps[-1], "exit_code": 0}))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two scopes, two rates each, three seeds: vision is best at 3e-4, none at 1e-4 and clearly worse."""
    folder = tmp_path_factory.mktemp("study") / "runs"
    rates = {("vision", 3e-4): 0.95, ("vision", 1e-4): 0.7, ("none", 1e-4): 0.6, ("none", 1e-5): 0.5}
    for ((scope, rate), success), seed in itertools.product(rates.items(), (1, 2, 3)):
        make_run(folder / f"{scope}-{rate:g}-{seed}", scope, rate, seed, success)
    write_video(np.zeros((4, 16, 16, 3), dtype=np.uint8), folder / "vision-0.0003-1/videos/eval_000000000.mp4", 10)
    for seed in (1, 2, 3):
        path = folder / f"vision-0.0003-{seed}/videos/eval_000002000.mp4"
        write_video(np.full((4, 16, 16, 3), 40 * seed, dtype=np.uint8), path, 10)
    return folder


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    """What the script writes for `study`."""
    output = tmp_path_factory.mktemp("report")
    crashed = make_run(study.parent / "more/crashed", "none", 1e-4, 4, 1.0)
    (crashed / "summary.json").unlink()
    assert compare_runs.main([str(study), str(study.parent / "mo*/crash*"), f"--output={output}"]) == 0
    return output


def final_rates(folder, pattern):
    paths = sorted(folder.glob(f"{pattern}/metrics.jsonl"))
    return [json.loads(path.read_text().splitlines()[-2])["eval/success_rate"] for path in paths]


# ---- the report


def test_the_report_has_the_numbers_of_the_run_folders(study, report):
    text = (report / "report.md").read_text()
    episodes = [[float(c) for c in run.final_episodes] for run in read_folders([f"{study}/vision-0.0003-*"])]
    np.testing.assert_allclose(np.mean(episodes, axis=1), final_rates(study, "vision-0.0003-*"))
    estimate = mean_interval(episodes)
    interval = f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
    assert f"| vision | 0.0003 | 3 | 0.500 | {interval} |" in text
    assert f"1. vision: {interval}, rank 1 of 2\n2. none: " in text
    assert re.search(r"\| vision \| none \| \+0\.\d+ \[\+.* \| separable \|", text)
    for name in ("success.png", "curves.png", "heatmap.png"):
        assert (report / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text


def test_a_crashed_run_is_kept_marked_and_excluded(report):
    text = (report / "report.md").read_text()
    assert "`crashed` is excluded from all means: no summary.json: killed, or still running." in text
    assert "13 runs, 12 of them complete" in text
    assert "| none | 0.0001 | 3 |" in text
    with (report / "runs.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file) if row["status"] != "complete"] == ["crashed"]


def test_the_table_alone_recomputes_every_number(report, tmp_path):
    assert compare_runs.main([f"--table={report}/runs.csv", f"--output={tmp_path}"]) == 0
    assert (tmp_path / "runs.csv").read_bytes() == (report / "runs.csv").read_bytes()
    again, first = ((folder / "report.md").read_text().split("Made by")[0] for folder in (tmp_path, report))
    assert again == first


def test_the_page_is_one_file_with_the_best_runs_last_video(study, report):
    page = (report / "report.html").read_text()
    best = max(read_folders([f"{study}/vision-0.0003-*"]), key=lambda run: run.eval_scores[-1])
    embedded = re.findall(r'<video[^>]*src="data:video/mp4;base64,([^"]*)"', page)
    assert [base64.b64decode(data) for data in embedded] == [
        (best.folder / "videos" / "eval_000002000.mp4").read_bytes()
    ]
    assert not re.search(r"<(script|img|link|iframe)[^>]+(src|href)=", page)
    assert page.count("plotly.js v") == 1  # the library's banner
    assert page.count('class="plotly-graph-div"') == 3
    assert "<td>not separable</td>" in page or "<td>separable</td>" in page


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; .ci/run installs it")
def test_the_page_draws_itself_in_a_browser(report, tmp_path):
    """Opened from the file, without a network: all figures are drawn, all curves named, and no script complains."""
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--window-size=1300,4000",
        "--virtual-time-budget=20000", "--dump-dom",
    ]  # fmt: skip
    page = f"file://{report / 'report.html'}"
    result = subprocess.run([BROWSER, *flags, page], capture_output=True, text=True, timeout=120)
    drawn = result.stdout
    assert result.returncode == 0, result.stderr[-500:]
    assert not re.findall(r".*CONSOLE.*(?:Uncaught|Error).*", result.stderr)
    figures = drawn.split('class="plotly-graph-div')[1:]
    assert len(figures) == 3 and all('class="main-svg"' in figure for figure in figures)
    success, curves, heatmap = figures
    assert success.count('class="trace scatter') == 4  # two scopes, their means and their seeds
    names = {"vision at 0.0003 (3 seeds)", "none at 0.0001 (3 seeds)"}
    assert set(re.findall(r'class="legendtext"[^>]*>([^<]+)<', curves)) == names
    assert "<image" in heatmap and heatmap.count('class="heatmap-label"') == 4
    assert drawn.count("<video") == 1  # only vision's best run has one


def test_text_from_runs_is_escaped_in_the_page():
    table = compare_runs.html_table((["a"], [["<script>"]]))
    assert "<td>&lt;script&gt;</td>" in table
    assert compare_runs.code("`x<y` & z") == "<code>x&lt;y</code> &amp; z"


# ---- by return

EASY = np.where(np.arange(STATES) % 2 == 0, 5.0, -5.0)  # what a state adds to every run's return; variance 25 * 40 / 39


@pytest.fixture(scope="module")
def return_study(tmp_path_factory):
    """Seeds 10 apart, states 10 apart, and nothing else: the variances are known. vision is best at 3e-4."""
    folder = tmp_path_factory.mktemp("return_study") / "runs"
    means = {("vision", 3e-4): 987.6, ("vision", 1e-4): 700.0, ("none", 1e-4): 900.0, ("none", 1e-5): 0.03}
    for ((scope, rate), mean), seed in itertools.product(means.items(), (1, 2, 3)):
        returns = mean + 10 * (seed - 2) + EASY
        make_run(folder / f"{scope}-{rate:g}-{seed}", scope, rate, seed, returns=returns, sampled=mean / 10)
    return folder


def test_runs_without_success_are_compared_by_return(return_study, tmp_path, capsys):
    assert compare_runs.main([str(return_study), f"--output={tmp_path}"]) == 0
    text = (tmp_path / "report.md").read_text()

    # Of the mean: 100 / 3 from the seeds with 2 degrees of freedom, 25 / 39 from the states with 39.
    variance = 100 / 3 + 25 / 39
    freedom = variance**2 / ((100 / 3) ** 2 / 2 + (25 / 39) ** 2 / 39)
    half = stats.t.ppf(0.975, freedom) * variance**0.5
    mean = f"987.6 [{987.6 - half:.1f}, {987.6 + half:.1f}]"
    assert f"1. vision: {mean}, rank 1 of 2\n2. none: 900.0 [" in text
    assert f"| vision | 0.0003 | 3 | 0.0 | {mean} | 987.6 [" in text
    iqm = iqm_interval([[987.6 + seed + EASY for seed in (-10, 0, 10)]], bounded=False)
    assert f"| {compare_runs.interval(iqm, decimals=1)} |" in text
    # At equal time, from the curves: Student's interval of three seeds, 4.3027 * 10 / sqrt(3).
    assert "] | 987.6 [962.8, 1012.4] | 200 | 1 |" in text
    # What states add cancels out: Welch's interval, 2.7764 * sqrt(200 / 3) for 4 degrees of freedom.
    assert "| vision | none | +87.6 [+64.9, +110.3] | < 0.001 | separable | 1.000 [" in text
    assert "| none | 1e-05 | 3 | 0.0 | 0.0 | -10.0 0.0 10.0 |  |" in text
    assert "| vision | 0.0003 | 3 | 98.8 | 987.6 | 977.6 987.6 997.6 | yes |" in text
    assert "Return at 2,000 env steps" in text and "chosen by return in the last tenth of training" in text
    assert "![Each scope at its own best learning rate](return.png)" in text
    assert (tmp_path / "return.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"success|logit|\d%", text.split("Made by")[0], re.IGNORECASE)

    page = (tmp_path / "report.html").read_text()
    assert "return: mean, 95 % interval, single seeds" in page and "987.6 *" in page
    assert ".0%" not in page.split("plotly.js v")[1].split("</script>", 1)[1]  # after the library
    assert capsys.readouterr().out.startswith(f"vision: {mean}")

    assert compare_runs.main([f"--table={tmp_path}/runs.csv", f"--output={tmp_path}/again"]) == 0
    assert (tmp_path / "again/report.md").read_text().split("Made by")[0] == text.split("Made by")[0]
    assert (tmp_path / "again/runs.csv").read_bytes() == (tmp_path / "runs.csv").read_bytes()


@pytest.mark.parametrize(("scale", "mean"), [(1e-4, "0.09876 [0.0"), (1.0, "987.6 [9"), (1e3, "987600 [9")])
def test_returns_are_shown_with_four_digits_whatever_their_unit(tmp_path, scale, mean):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"{seed}", seed=seed, returns=scale * (987.6 + seed - 2 + EASY))
    (line,) = compare_runs.ranking(compare(read_folders([str(tmp_path)])))
    assert line.startswith(f"none: {mean}")


def test_curves_of_returns_have_students_interval(return_study):
    runs = read_folders([f"{return_study}/vision-0.0003-*"])
    steps, estimate = curve(runs, "steps")
    np.testing.assert_array_equal(steps, [0, 1000, 2000])
    np.testing.assert_allclose(estimate.value, [0.03, (0.03 + 987.6) / 2, 987.6])
    np.testing.assert_allclose(estimate.high[1:] - estimate.value[1:], [24.8414 / 2, 24.8414], rtol=1e-5)


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
    assert comparison.runs[0].final_episodes == "" and not comparison.paired
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
    assert all("1000 (no interval), rank 1 to 2 of 2" in line for line in compare_runs.ranking(comparison))
    _, ((*_, verdict, _, _),) = compare_runs.pair_table(comparison)
    assert verdict == "equal scores: cannot say"


# ---- what is compared


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


def test_choosing_seeds_are_left_out_of_the_report(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", rate=1e-4, seed=seed, sampled=0.9 if seed == 1 else 0.1)
        make_run(tmp_path / f"b{seed}", rate=3e-4, seed=seed, sampled=0.5)
    comparison = compare(read_folders([str(tmp_path)]), choosing_seeds=[1])
    assert comparison.scopes[0].learning_rate == 1e-4
    assert [run.seed for run in comparison.scopes[0].runs] == [2, 3]
    with pytest.raises(UserError, match="no run with one of the seeds \\[9\\]"):
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
    assert not comparison.paired
    assert any("ended at 1,000 env steps, others at up to 2,000" in note for note in comparison.notes)
    with pytest.raises(UserError, match="choose on training success"):
        compare(comparison.runs, choose_on="states")


def write_splits(run, **outcomes):
    """What `evaluate_vla.py --split=all --output=<run>/splits` leaves behind."""
    (run / "splits").mkdir()
    rows = [
        {"split": split, "initial_state": i, "success": bool(mark)}
        for split, marks in outcomes.items()
        for i, mark in enumerate(marks)
    ]
    (run / "splits" / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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
    header, rows = compare_runs.split_table(comparison)
    assert header == ["scope", "train", "semantics"] and [row[0] for row in rows] == ["vision"]
    assert rows[0][2] == compare_runs.interval(expected)
    write_table(tmp_path / "runs.csv", comparison.runs)  # keeps the order of the splits, too
    assert compare_runs.split_table(compare(read_table(tmp_path / "runs.csv"), choosing_seeds=[1])) == (header, rows)
    assert compare_runs.split_table(compare(read_folders([f"{tmp_path}/none*"]))) is None


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
    lines = compare_runs.ranking(comparison)
    assert lines[0].startswith("language: ") and lines[0].endswith("rank 1 of 3")
    assert all("rank 2 to 3 of 3; not separable from" in line for line in lines[1:])


def test_one_seed_only_has_no_interval_and_says_so(tmp_path):
    make_run(tmp_path / "a", "none", final=0.5)
    make_run(tmp_path / "b", "vision", final=0.9)
    comparison = compare(read_folders([str(tmp_path)]))
    assert any("One seed only, so no interval and no ranking: vision, none" in note for note in comparison.notes)
    assert all("(no interval), rank 1 to 2 of 2; not separable" in line for line in compare_runs.ranking(comparison))
    _, ((*_, verdict, _, more),) = compare_runs.pair_table(comparison)
    assert (verdict, more) == ("one seed: cannot say", "-")


# ---- reading


def test_a_resumed_run_counts_its_last_final_evaluation_once(tmp_path):
    folder = make_run(tmp_path / "a", final=np.zeros(STATES))
    with (folder / "episodes.jsonl").open("a") as file:
        file.write('{"global_step": 20')  # torn by a kill
        for i in range(STATES):
            file.write("\n" + json.dumps({"global_step": 2000, "initial_state": i, "success": i == 0}))
        file.write("\n" + json.dumps({"global_step": 1000, "initial_state": 1, "success": True}) + "\n")
    (run,) = read_folders([str(folder)])
    assert run.final_episodes == "1" + "0" * (STATES - 1)
    assert run.states == "0-39"


def test_frozen_by_a_list_or_by_a_switch_of_the_model(tmp_path):
    make_run(tmp_path / "a", ["vision_encoder", "fusion"])
    make_run(tmp_path / "b", policy__vla_config__model_config={"freeze_vision_encoder": True})
    make_run(tmp_path / "c", ["fusion"], policy__vla_config__model_config={"freeze_vision_encoder": True})
    assert [run.scope for run in read_folders([str(tmp_path)])] == ["vision_encoder+fusion", "vision", "fusion+vision"]


def wandb_run(folder, state="finished"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows.append(rows[-2])  # a resumed run logs twice

    def history(keys):
        return [{key: row[key] for key in keys} for row in rows if set(keys) <= set(row)]

    config = dict(run_table._flatten(json.loads((folder / "config.json").read_text())))
    return SimpleNamespace(name=folder.name, state=state, config=config, scan_history=history)


def test_wandb_gives_the_rows_of_the_run_folders(study, monkeypatch):
    class Api:
        def sweep(self, path):
            assert path == "me/vla-rl/abc123"
            return SimpleNamespace(runs=[wandb_run(folder) for folder in sorted(study.iterdir())])

        def runs(self, path):
            return [wandb_run(folder, "crashed") for folder in sorted(study.iterdir())] if path == "me/vla-rl" else []

    monkeypatch.setattr(wandb, "Api", Api)
    runs = read_wandb("me/vla-rl/abc123")
    local = read_folders([str(study)])
    for run in local:
        run.folder, run.final_episodes = None, ""
    assert runs == local
    comparison = compare(runs)
    assert any("single episodes are missing" in note for note in comparison.notes)
    assert {run.status for run in read_wandb("me/vla-rl")} == {"W&B state crashed"}
    with pytest.raises(UserError, match="no runs in me/empty"):
        read_wandb("me/empty")


def test_wandb_gives_the_rows_of_runs_without_success(return_study, monkeypatch):
    runs = [wandb_run(folder) for folder in sorted(return_study.iterdir())]
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda path: runs))
    local = read_folders([str(return_study)])
    for run in local:
        run.folder, run.final_episodes = None, ""
    assert read_wandb("me/vla-rl") == local
    assert compare(local).scopes[0].mean.value == pytest.approx(987.6)


def test_what_wandb_refuses_is_one_line(monkeypatch):
    def fail():
        raise wandb.errors.CommError("no such\n sweep")

    monkeypatch.setattr(wandb, "Api", fail)
    with pytest.raises(UserError, match="cannot read me/vla-rl/abc: no such sweep$"):
        read_wandb("me/vla-rl/abc")


def test_a_table_keeps_all_that_a_run_is(tmp_path):
    make_run(tmp_path / "a", ["fusion"], 1.5e-5, seed=3, algorithm__cfg__n_epochs=8, steps=(0, 1500))
    write_splits(make_run(tmp_path / "b", final=0.3), vision=np.arange(STATES) < 3)
    runs = read_folders([str(tmp_path)])
    assert runs[1].splits == {"vision": "111" + "0" * (STATES - 3)}
    assert runs[0].settings == {"algorithm.cfg.n_epochs": 8}
    write_table(tmp_path / "runs.csv", runs)
    for run in runs:
        run.folder = None
    assert read_table(tmp_path / "runs.csv") == runs


def test_a_table_keeps_returns_digit_by_digit(tmp_path):
    returns = np.float32([987.6, -0.03, 1e-7, 12, -1234567, 0] + [1 / 3] * (STATES - 6)).astype(float)
    make_run(tmp_path / "a", returns=returns)
    runs = read_folders([str(tmp_path)])
    assert runs[0].measure == "return"
    assert runs[0].final_episodes.startswith("987.5999755859375 -0.029999999329447746 ")
    write_table(tmp_path / "runs.csv", runs)
    (again,) = read_table(tmp_path / "runs.csv")
    runs[0].folder = None
    assert again == runs[0]
    assert again.scores(again.final_episodes) == list(returns)
    table = (tmp_path / "runs.csv").read_text()
    (tmp_path / "runs.csv").write_text(table.replace(",return,", ",reward,"))
    with pytest.raises(UserError, match="line 2: measure is 'reward', neither of success, return"):
        read_table(tmp_path / "runs.csv")


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


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("run,status\n")
    unfinished = shutil.copytree(folder, tmp_path / "unfinished")
    (unfinished / "summary.json").write_text('{"exit_code": 143}')
    foreign = shutil.copytree(folder, tmp_path / "foreign")
    (foreign / "config.json").write_text('{"trainer": {"seed": 1}}')
    for arguments, message in {
        (): "exactly one of the three",
        (str(folder), "--table=x.csv"): "exactly one of the three",
        (str(tmp_path / "empty"),): "no runs found in",
        (str(tmp_path / "nothing*"),): "no runs found in",
        (str(tmp_path / "missing"),): "no such folder",
        (f"--table={tmp_path}/missing.csv",): "cannot be read: No such file",
        (f"--table={tmp_path}/bad.csv",): "has no column scope, learning_rate",
        (str(unfinished),): "none of the 1 runs is complete; the first, unfinished: exit code 143",
        (str(foreign),): "foreign is not a run of ppo_vla.py: its config has no policy.freeze",
        (str(folder), f"--output={folder}/config.json"): "cannot write to",
    }.items():
        assert compare_runs.main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
