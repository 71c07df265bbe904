"""The study of what pretraining is worth: its rows, its tables, and that nothing is run twice."""

from __future__ import annotations

import json

import numpy as np
import pretraining_study
import pytest
from pretraining_study import ARMS, MODES, Row, main, read_table, run_of, summed_up, tables
from worlds import ROOT

from research.errors import UserError
from research.study.statistics import difference_interval, mean_interval

CLONING = "--episodes=1 --steps=3 --batch_size=8 --num_envs=2 --env_config.max_episode_steps=40 --only_successful=false"
SHORT = "--trainer.num_envs=2 --trainer.buffer_size=8 --trainer.env_config.max_episode_steps=40"


def test_a_run_is_imitated_and_reinforced_once(tmp_path, monkeypatch, capfd):
    table = tmp_path / "runs.csv"
    words = [
        "--arms", "random+frozen", "--seeds", "3", "--episodes", "3", "--ppo_env_steps", "32", f"--cloning={CLONING}",
        f"--ppo={SHORT} --trainer.env_config.workers=0 --algorithm.cfg.batch_size=4 --trainer.num_eval_envs=3",
        f"--table={table}", f"--folder={tmp_path / 'runs'}",
    ]  # fmt: skip
    assert main(words) == 0, capfd.readouterr().err[-2000:]
    rows = read_table(table)
    assert [(row.stage, row.arm, row.seed, row.mode) for row in rows] == [
        (stage, "random+frozen", 3, mode) for stage in ("clone", "ppo") for mode in MODES
    ]
    assert all(len(row.outcomes) == 3 and row.success == round(row.outcomes.count("1") / 3, 4) for row in rows)
    assert [row.env_steps for row in rows[:2]] == [0, 0] and all(row.env_steps >= 32 for row in rows[2:])
    assert all(row.seconds > 0 for row in rows)

    monkeypatch.setattr(pretraining_study, "run", lambda *words: pytest.fail(f"ran again: {words}"))
    assert main(words) == 0 and read_table(table) == rows
    capfd.readouterr()
    assert main([*words, "--seeds", "4", f"--cloning={CLONING} --max_eval_steps=30"]) == 2
    assert f"flags of its clone rows was {json.dumps(CLONING)} and is now" in capfd.readouterr().err


def rows_of(stage: str, mode: str, rates: dict[str, float], rng: np.random.Generator) -> list[Row]:
    rows = []
    for arm, rate in rates.items():
        for seed in range(3):
            outcomes = (rng.random(40) < rate).astype(int)
            rows.append(Row(stage, arm, seed, mode, outcomes.mean(), 1.0, 0, "".join(map(str, outcomes))))
    return rows


def test_tables_give_what_pretraining_adds_with_its_interval(tmp_path):
    rates = dict(zip(ARMS, (0.6, 0.7, 0.2, 0.5), strict=True))
    rows = rows_of("clone", "mode", rates, np.random.default_rng(0))
    of = lambda arm: np.array([list(map(int, r.outcomes)) for r in rows if r.arm == arm], dtype=float)  # noqa: E731
    line = next(line for line in tables(rows).splitlines() if "frozen" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    mean, less = mean_interval(of("imagenet+frozen")), difference_interval(of("imagenet+frozen"), of("random+frozen"))
    assert cells[:4] == ["clone", "mode", "frozen", f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"]
    assert cells[5:] == [f"{less.value:.3f} [{less.low:.3f}, {less.high:.3f}]", "3"]
    one_seed = [row for row in rows if row.seed == 0]
    assert "[" not in tables(one_seed) and "sample" not in tables(one_seed)


def test_a_row_wants_one_episode_of_each_state(tmp_path, capsys):
    episodes = [{"mode": "mode", "initial_state": s, "success": s == 1} for s in (2, 0, 1)]
    assert summed_up("clone", "random+frozen", 0, "mode", 2.4, 0, episodes)[4:] == (0.3333, 2, 0, "010")
    with pytest.raises(UserError, match="not one episode of each initial state"):
        summed_up("clone", "random+frozen", 0, "mode", 2.4, 0, episodes[:2])
    assert main(["--show", f"--table={tmp_path / 'none.csv'}"]) == 2
    assert "no table yet" in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_first_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "a_ppo-1" / "checkpoints").mkdir(parents=True)
    assert run_of(tmp_path, "a_ppo") is None
    (tmp_path / "a_ppo-2" / "checkpoints" / "step_000000032").mkdir(parents=True)
    assert run_of(tmp_path, "a_ppo") == tmp_path / "a_ppo-2" and run_of(tmp_path, "b_ppo") is None


@pytest.mark.numbers
def test_the_results_are_the_table_of_the_committed_rows(capsys):
    folder = ROOT / "experiments" / "results" / "pretraining"
    assert main(["--show", f"--table={folder / 'runs.csv'}"]) == 0
    shown = capsys.readouterr().out.strip()
    assert shown in (ROOT / "experiments" / "RESULTS.md").read_text() and len(shown.splitlines()) >= 6
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["clone"]["flags"] == pretraining_study.CLONING
    assert settings["clone"]["config"] == pretraining_study.configuration("metaworld_bc")
