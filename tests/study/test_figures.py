"""Figures of a comparison: image and page show the numbers that it holds, in one colour per scope."""

import numpy as np
import pytest
from study_worlds import make_run, write_return_study, write_study

from research.study import figures
from research.study.comparison import compare
from research.study.equal_budgets import curve
from research.study.run_sources import read_folders


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return compare(read_folders([str(write_study(tmp_path_factory.mktemp("study") / "runs"))]))


@pytest.fixture(scope="module")
def returns(tmp_path_factory):
    return compare(read_folders([str(write_return_study(tmp_path_factory.mktemp("returns") / "runs"))]))


def colours(comparison):
    return dict(zip(sorted(result.arm for result in comparison.arms), figures.COLORS, strict=False))


def test_scores_are_drawn_with_interval_and_seeds_best_at_the_top(comparison):
    (axes,) = figures.draw_scores(comparison).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["none at 0.0001 (3 seeds)", "vision at 0.0003 (3 seeds)"]
    for y, result in enumerate(reversed(comparison.arms)):
        interval, mean, seeds = axes.lines[3 * y : 3 * y + 3]
        assert list(interval.get_xdata()) == [result.mean.low, result.mean.high]
        assert (mean.get_xdata()[0], mean.get_ydata()[0]) == (result.mean.value, y)
        np.testing.assert_array_equal(seeds.get_xdata(), result.scores.mean(1))
        assert {line.get_color() for line in (interval, mean, seeds)} == {colours(comparison)[result.arm]}


def test_the_page_of_scores_has_the_same_numbers(comparison):
    traces = figures.scores_page(comparison).data
    for i, result in enumerate(reversed(comparison.arms)):
        seeds, mean = traces[2 * i : 2 * i + 2]
        np.testing.assert_array_equal(seeds.x, result.scores.mean(1))
        assert list(seeds.hovertext) == [run.run for run in result.runs]
        assert mean.x[0] == result.mean.value
        assert mean.x[0] + mean.error_x.array[0] == pytest.approx(result.mean.high)
        assert mean.x[0] - mean.error_x.arrayminus[0] == pytest.approx(result.mean.low)
        assert seeds.marker.color == mean.marker.color == colours(comparison)[result.arm]


def test_curves_are_drawn_against_steps_and_time_with_the_common_budget(comparison):
    steps, seconds = figures.draw_curves(comparison).axes
    for axes, axis, budget in ((steps, "steps", comparison.env_steps), (seconds, "seconds", comparison.seconds)):
        *lines, dotted = axes.lines
        assert list(dotted.get_xdata()) == [budget, budget]
        for line, band, result in zip(lines, axes.collections, comparison.arms, strict=True):
            x, estimate = curve(result.runs, axis)
            np.testing.assert_array_equal(line.get_xdata(), x)
            np.testing.assert_array_equal(line.get_ydata(), estimate.value)
            low, high = (np.where(np.isnan(end), estimate.value, end) for end in (estimate.low, estimate.high))
            corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
            assert {*zip(x, low, strict=True), *zip(x, high, strict=True)} <= corners
            assert line.get_color() == colours(comparison)[result.arm]
    assert steps.get_ylabel() == "evaluation success\n95 % interval"
    assert steps.get_xlabel().startswith("environment steps") and seconds.get_xlabel().startswith("wall time")


def test_axes_say_where_schedules_are_cut_and_where_bands_are_of_seeds_alone(tmp_path):
    for seed in (1, 2, 3):
        for scope, pace in (("none", 0.5), ("vision", 0.1)):
            folder = make_run(tmp_path / f"{scope}{seed}", scope, seed=seed, pace=pace, algorithm__cfg__anneal_lr=True)
    (folder / "episodes.jsonl").unlink()
    steps, seconds = figures.draw_curves(compare(read_folders([str(tmp_path)]))).axes
    assert steps.get_ylabel() == "evaluation success\n95 % interval over seeds alone"
    assert "interrupted" not in steps.get_xlabel()
    assert seconds.get_xlabel() == "wall time (s), schedules interrupted; dotted: what all runs reached"


def test_the_page_of_curves_names_each_scope_once(comparison):
    traces = figures.curves_page(comparison).data
    assert [trace.name for trace in traces if trace.showlegend] == [
        "vision at 0.0003 (3 seeds)",
        "none at 0.0001 (3 seeds)",
    ]
    band, line = traces[:2]
    x, estimate = curve(comparison.arms[0].runs, "steps")
    np.testing.assert_array_equal(line.x, x)
    np.testing.assert_array_equal(line.y, estimate.value)
    assert estimate.low[0] < estimate.value[0] < estimate.high[0]  # seeds are alike before training, states are not
    np.testing.assert_array_equal(band.y, [*estimate.low, *estimate.high[::-1]])


def test_the_heat_map_marks_the_chosen_rate_and_leaves_untried_cells_empty(comparison):
    axes, _ = figures.draw_heatmap(comparison).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1e-05", "0.0001", "0.0003"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["vision", "none"]
    texts = np.array([text.get_text() for text in axes.texts]).reshape(2, 3)
    assert texts[0, 0] == texts[1, 2] == ""
    assert [["*" in text for text in row] for row in texts] == [[False, False, True], [False, True, False]]
    means = {cell: np.mean([run.eval_scores[-1] for run in runs]) for cell, runs in comparison.cells.items()}
    assert texts[0, 2] == f"{means['vision', 3e-4]:.1%} *\nn = 3"
    values = axes.images[0].get_array()
    assert values.mask.tolist() == [[True, False, False], [False, False, True]]
    assert values[1, 0] == pytest.approx(means["none", 1e-5])
    (page,) = figures.heatmap_page(comparison).data
    np.testing.assert_array_equal(page.z, values.filled(np.nan))
    assert page.text[0][2] == texts[0, 2].replace("\n", "<br>")


@pytest.mark.parametrize(("which", "label"), [("comparison", "80%"), ("returns", "0.8")])
def test_success_is_shown_in_percent_and_returns_are_not(request, which, label):
    comparison = request.getfixturevalue(which)
    axes = figures.draw_scores(comparison).axes[0]
    axes.set_xlim(0, 1)
    assert axes.xaxis.get_major_formatter().format_ticks([0.0, 0.8])[1] == label
    assert axes.get_xlabel().startswith({"comparison": "success", "returns": "return"}[which])
    page = figures.scores_page(comparison)
    assert page.layout.xaxis.tickformat == {"comparison": ".0%", "returns": None}[which]


def test_axes_of_success_end_at_0_and_100_percent_and_those_of_returns_where_returns_do(comparison, returns):
    for drawn in (comparison, returns):
        curves, heatmap = figures.draw_curves(drawn), figures.draw_heatmap(drawn)
        ends = [figures.draw_scores(drawn).axes[0].get_xlim(), *(axes.get_ylim() for axes in curves.axes)]
        ends.append(heatmap.axes[0].images[0].get_clim())
        pages = [figures.scores_page(drawn).layout.xaxis.range, figures.curves_page(drawn).layout.yaxis.range]
        if drawn is comparison:
            assert set(ends) == {(0, 1)} and set(pages) == {(0, 1)}
        else:
            assert not {(0, 1)} & set(ends) and set(pages) == {None}
            assert ends[0][1] > 987.6


@pytest.mark.filterwarnings("error")
def test_long_names_of_arms_are_broken_into_lines(tmp_path):
    name = {"policy__vla_config__model_class": "agents.of_a_package.SomeVisionLanguageActionModel"}
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "vision", **name)
    comparison = compare(read_folders([str(tmp_path)]), by=["policy.vla_config.model_class", "policy.freeze"])
    for draw in (figures.draw_scores, figures.draw_heatmap):
        figure = draw(comparison)
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert 2 * 40 >= max(map(len, labels)) > 40
        assert max(len(line) for label in labels for line in label.splitlines()) <= 50
        figure.draw_without_rendering()  # warns where labels leave no room


def test_one_seed_is_drawn_as_a_point_without_an_interval(tmp_path):
    make_run(tmp_path / "a")
    comparison = compare(read_folders([str(tmp_path)]))
    axes = figures.draw_scores(comparison).axes[0]
    value = comparison.arms[0].mean.value
    assert list(axes.lines[0].get_xdata()) == [value, value]
    assert axes.get_yticklabels()[0].get_text() == "none at 0.0001 (1 seed)"
    mean = figures.scores_page(comparison).data[1]
    assert (mean.error_x.array[0], mean.error_x.arrayminus[0]) == (0, 0)
