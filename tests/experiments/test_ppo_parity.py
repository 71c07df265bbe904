"""The comparison with Stable-Baselines3: its rows, its verdicts, and that both sides are asked the same."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import gymnasium
import numpy as np
import ppo_parity
import pytest
from ppo_parity import OURS, THEIRS, Row, Task, append, evaluate, main, read_table, table_of
from worlds import ROOT

from research.errors import UserError
from research.study.statistics import difference_interval, mean_interval

SMALL = Task(32, 2, normalize=True, changed={"n_steps": 8, "batch_size": 8, "n_epochs": 2})


def words(folder, *more: str) -> list[str]:
    paths = [f"--table={folder / 'runs.csv'}", f"--folder={folder / 'runs'}"]
    return ["--envs", "InvertedPendulum-v5", "--seeds", "3", "--episodes", "2", *paths, *more]


@pytest.mark.slow
def test_a_run_of_ours_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ppo_parity.TASKS, "InvertedPendulum-v5", SMALL)
    assert main(words(tmp_path, "--algorithms", OURS)) == 0, capsys.readouterr().err
    (row,) = read_table(tmp_path / "runs.csv")
    assert row[:4] == (OURS, "InvertedPendulum-v5", 3, 32) and row.seconds > 0
    assert row.mean_return == pytest.approx(np.mean(row.scores), abs=1e-3) and len(row.scores) == 2

    monkeypatch.setattr(ppo_parity, "train_ours", lambda *_: pytest.fail("trained again"))
    assert main(words(tmp_path, "--algorithms", OURS)) == 0 and read_table(tmp_path / "runs.csv") == [row]
    capsys.readouterr()
    assert main(words(tmp_path, "--env_steps", "64")) == 2
    assert "have 32 env steps and 2 episodes, not 64 and 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_theirs_is_evaluated_with_its_own_statistics(tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3", reason="the extra bench is not installed")
    trained = ppo_parity.train_theirs("InvertedPendulum-v5", SMALL, 3)
    (one,) = evaluate(trained.act, "InvertedPendulum-v5", 1)
    (two,) = evaluate(trained.act, "InvertedPendulum-v5", 1)
    assert one == two > 0 and trained.seconds > 0  # statistics stand still in an evaluation


def test_without_stable_baselines3_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    assert main(words(tmp_path, "--algorithms", THEIRS)) == 2
    assert capsys.readouterr().err == (
        "error: --algorithms: stable-baselines3 is not installed; pip install -e .[bench]\n"
    )


def test_actions_are_from_minus_one_to_one_and_episodes_from_fixed_states():
    """Pendulum's torque is within 2: an action of 5 is its largest."""
    expected = []
    for state in range(2):
        env, total, ended = gymnasium.make("Pendulum-v1"), 0.0, False
        env.reset(seed=state)
        while not ended:
            _, reward, terminated, truncated, _ = env.step(np.array([2.0], dtype=np.float32))
            total, ended = total + reward, terminated or truncated
        expected.append(total)
    assert evaluate(lambda _: np.array([5.0], dtype=np.float32), "Pendulum-v1", 2) == pytest.approx(expected)


def rows_of(env: str, ours: float, theirs: float, seeds: int = 5) -> list[Row]:
    rng, rows = np.random.default_rng(0), []
    for name, mean in ((OURS, ours), (THEIRS, theirs)):
        for seed in range(seeds):
            scores = " ".join(f"{x:.3f}" for x in mean + rng.normal(0, 10, 20))
            rows.append(Row(name, env, seed, 1000, mean, 1.5, scores))
    return rows


def test_the_verdict_is_the_interval_of_the_difference(tmp_path):
    rows = [*rows_of("better", 300, 200), *rows_of("same", 201, 200), *rows_of("worse", 100, 200)]
    rows += [*rows_of("few", 300, 200, seeds=1), *rows_of("two", 300, 200, seeds=2)]
    rows += [row._replace(env="equal", returns="7.000 7.000") for row in rows_of("equal", 7, 7)]
    for row in rows:
        append(tmp_path / "runs.csv", row)
    assert read_table(tmp_path / "runs.csv") == rows
    better, same, worse, few, two, equal = (line.strip("| ").split(" | ") for line in table_of(rows).splitlines()[2:])
    assert [line[6] for line in (better, same, worse, few, two, equal)] == [
        "ours", "not separable", "Stable-Baselines3", "too few seeds", "too few seeds", "equal",
    ]  # fmt: skip
    ours, theirs = (
        np.array([r.scores for r in rows_of("better", 300, 200) if r.algorithm == n]) for n in (OURS, THEIRS)
    )
    mean, less = mean_interval(ours, bounded=False), difference_interval(ours, theirs, bounded=False)
    assert better[:4] == ["better", "1,000", "5, 5", f"{mean.value:.0f} [{mean.low:.0f}, {mean.high:.0f}]"]
    assert better[5] == f"{less.value:.0f} [{less.low:.0f}, {less.high:.0f}]"


def test_what_is_no_table_of_its_own_is_refused(tmp_path, capsys):
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is no table of this script"):
        read_table(tmp_path / "runs.csv")
    assert main(["--show", f"--table={tmp_path / 'none.csv'}"]) == 2
    assert "there is no" in capsys.readouterr().err


def test_budgets_are_whole_numbers_of_rollouts_and_minibatches():
    for task in ppo_parity.TASKS.values():
        rollout = task.num_envs * task.settings["n_steps"]
        assert task.env_steps % rollout == 0 and rollout % task.settings["batch_size"] == 0


@pytest.mark.numbers
def test_results_say_what_the_committed_rows_say():
    """Line by line of `--show`; and no task of which the interval of the difference says that ours is worse."""
    rows = read_table(ROOT / "experiments" / "results" / "parity" / "runs.csv")
    results = (ROOT / "experiments" / "RESULTS.md").read_text()
    lines = table_of(rows).splitlines()
    assert len(lines) == 2 + len({row.env for row in rows})
    for line in lines:
        assert line in results
    assert not any("| Stable-Baselines3 |" in line for line in lines[2:])


def test_no_run_goes_on_from_one_of_another_length(tmp_path, monkeypatch):
    """Runs go on by their names, whatever table their rows go to."""
    monkeypatch.setattr(ppo_parity.subprocess, "run", lambda words, **_: SimpleNamespace(returncode=1))
    named = set()
    for env_steps in (1024, 2048):
        with pytest.raises(UserError, match="ended with exit code 1") as error:
            ppo_parity.train_ours("Pendulum-v1", Task(env_steps), 3, tmp_path)
        named |= {word for word in str(error.value).split() if word.startswith("--trainer.exp_name=")}
    assert len(named) == 2
