"""The learning curve of a run: success with its interval, or the return, against env steps and wall time."""

import json

import imageio.v3 as iio
import numpy as np
import pytest

from research.errors import UserError
from research.runs.curve import plot_learning_curve


def _write_rows(folder, rows):
    text = "".join(json.dumps({"time/elapsed_s": 0.1 * r["global_step"]} | r) + "\n" for r in rows)
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved during the test."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def test_learning_curve_shows_success_with_its_interval_and_wall_time(tmp_path, drawn):
    rows = [{"global_step": 100 * i, "rollout/success_rate": i / 40, "rollout/return": i} for i in range(1, 40)]
    rows[3]["rollout/success_rate"] = None
    rows.append(
        {"global_step": 4000, "eval/success_rate": 0.9, "eval/success_low": 0.8, "eval/success_high": 0.95}
    )  # fmt: skip
    _write_rows(tmp_path, rows)
    path = plot_learning_curve(tmp_path)
    assert path == tmp_path / "learning_curve.png"
    assert iio.imread(path).shape[:2] == (630, 1080)
    axes, time_axis = drawn[0].axes
    assert axes.get_ylabel() == "success rate" and axes.get_xlabel() == "environment steps"
    assert len(axes.lines[0].get_xdata()) == 38  # the rollout without a finished episode is left out
    (bar,) = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(bar, [[4000, 0.8], [4000, 0.95]])
    assert time_axis.get_xlabel() == "wall time (min)"
    minutes = [float(label.get_text()) for label in time_axis.get_xticklabels()]
    assert len(minutes) > 2
    np.testing.assert_allclose(time_axis.get_xticks(), [m * 60 / 0.1 for m in minutes])  # a step took 0.1 s
    assert time_axis.get_xlim() == axes.get_xlim()


def test_learning_curve_falls_back_to_the_return_or_draws_nothing(tmp_path, drawn):
    _write_rows(tmp_path, [{"global_step": i, "rollout/return": 2.0 * i, "eval/return": 3.0} for i in range(5)])
    assert plot_learning_curve(tmp_path, tmp_path / "curve.svg") == tmp_path / "curve.svg"
    assert (tmp_path / "curve.svg").exists()
    assert drawn[0].axes[0].get_ylabel().startswith("return")
    assert list(drawn[0].axes[0].lines[0].get_ydata()) == [0, 2, 4, 6, 8]
    _write_rows(tmp_path, [{"global_step": 0, "train/entropy": 1.0}])
    assert plot_learning_curve(tmp_path) is None


@pytest.mark.parametrize(
    ("seconds", "unit", "ticks_at"), [(170, "s", 1), (190, "min", 60), (7100, "min", 60), (7300, "h", 3600)]
)
def test_wall_time_is_in_seconds_minutes_or_hours(tmp_path, drawn, seconds, unit, ticks_at):
    _write_rows(tmp_path, [{"global_step": i, "rollout/return": 1.0, "time/elapsed_s": i * seconds} for i in (0, 1)])
    plot_learning_curve(tmp_path)
    _, time_axis = drawn[0].axes
    assert time_axis.get_xlabel() == f"wall time ({unit})"
    values = [float(label.get_text()) * ticks_at / seconds for label in time_axis.get_xticklabels()]
    assert len(values) > 2
    np.testing.assert_allclose(time_axis.get_xticks(), values)


def test_a_folder_without_metrics_has_no_curve(tmp_path):
    with pytest.raises(UserError, match="is not a run folder: it has no metrics.jsonl"):
        plot_learning_curve(tmp_path)
