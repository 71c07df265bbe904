"""Filming what a run changed."""

from __future__ import annotations

import json
import re

import before_after
import numpy as np
import ppo_vla
import pytest
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    flags = [
        "--trainer.iterations=2", "--trainer.num_eval_episodes=6", "--trainer.num_eval_envs=6",
        "--trainer.use_wandb=false", "--trainer.progress_bar=false", "--algorithm.cfg.learning_rate=3e-3",
        "--algorithm.cfg.value_warmup_iterations=0", "--algorithm.cfg.n_epochs=2", f"--trainer.run_dir={runs}",
    ]  # fmt: skip
    assert ppo_vla.main(flags) == 0
    (folder,) = runs.iterdir()
    return folder


def test_the_film_shows_the_start_of_a_run_above_its_end(run, tmp_path, capsys):
    rows = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    first, last = min(row["global_step"] for row in rows), max(row["global_step"] for row in rows)
    wanted = {
        when: [next(r for r in rows if (r["global_step"], r["initial_state"]) == (step, state)) for state in (4, 1)]
        for when, step in (("before", first), ("after", last))
    }
    before, after = before_after.film(str(run), [4, 1], trusted=False)
    for result, when in ((before, "before"), (after, "after")):
        for episode, row in zip(result.episodes, wanted[when], strict=True):
            assert {name: row[name] for name in ("initial_state", "success", "length", "instruction")} == {
                name: getattr(episode, name) for name in ("initial_state", "success", "length", "instruction")
            }
    assert [e.length for e in before.episodes] != [e.length for e in after.episodes], "training changed nothing here"
    grid = before_after.side_by_side(before, after)
    assert len(grid) == max(e.length for e in before.episodes + after.episodes) + 1  # and what the last step led to
    half = grid.shape[1] // 2 + 1
    assert (grid[0, 3:200, 3:200] == grid[0, half + 3 : half + 200, 3:200]).all(), "both begin in the same state"

    out = tmp_path / "film.gif"
    assert before_after.main([str(run), "--states", "4", "1", "--every=3", f"--output={out}"]) == 0
    with Image.open(out) as film:
        assert film.size == (grid.shape[2], grid.shape[1])
        assert 1 < film.n_frames <= len(range(0, len(grid) - 1, 3)) + 1  # equal frames in a row are one
        film.seek(film.n_frames - 1)
        assert np.abs(np.asarray(film.convert("RGB")).astype(int) - grid[-1]).mean() < 8, "it ends where they end"
    said = capsys.readouterr().out
    assert before.summary() in said and after.summary() in said


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [("", "film.webm", "--output: .*gif or .mp4"), ("nothing", "film.gif", "neither a run folder nor a checkpoint")],
)
def test_what_cannot_be_filmed_is_one_line(run, name, output, message, tmp_path, capsys):
    assert before_after.main([str(run / name) if name else str(run), f"--output={tmp_path / output}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
