"""Comparing a part of the runs: by the values of options, with one line where that cannot be."""

from __future__ import annotations

import compare_runs
import numpy as np
import pytest
from study_worlds import STATES, make_run

from research.errors import UserError
from research.study.comparison import compare
from research.study.run_filter import select
from research.study.run_sources import read_folders
from research.study.run_table import read_table, write_table


@pytest.fixture
def folder(tmp_path):
    """Two starts by two scopes by two seeds: from the second start, freezing is better."""
    for start, solved in (("a", {"none": 30, "vision+language": 10}), ("b", {"none": 20, "vision+language": 35})):
        for scope, seed in ((scope, seed) for scope in solved for seed in (1, 2)):
            options = {"policy__vla_config__model_path": f"/some/where/{start}.pt", "trainer__num_envs": 32}
            make_run(
                tmp_path / f"{start}-{scope}-{seed}",
                scope,
                seed=seed,
                final=np.arange(STATES) < solved[scope],
                **options,
            )
    return tmp_path


def names(runs):
    return {run.run for run in runs}


def test_one_start_after_the_other_is_compared_where_all_lie_in_one_folder(folder):
    runs = read_folders([str(folder)])
    with pytest.raises(UserError, match=r"policy.vla_config.model_path is .* compare them separately \(--where\)"):
        compare(runs)
    for start, best in (("a", "none"), ("b", "vision+language")):
        condition = f"policy.vla_config.model_path={start}.pt"
        comparison = compare(runs, where=[condition])
        assert comparison.arms[0].arm == best and len(comparison.runs) == 4
        assert comparison.notes[0] == f"Only runs with {condition.replace('=', ' = ')} are compared, 4 of 8."
        assert all(run.common["policy.vla_config.model_path"] == f"{start}.pt" for run in comparison.runs)
    assert names(runs) == names(read_folders([str(folder)])) and all(
        "policy.vla_config.model_path" in run.settings for run in runs
    )


def test_the_table_of_a_part_is_compared_without_asking_again(folder, tmp_path, capsys):
    command = [str(folder), "--where", "policy.vla_config.model_path=b.pt", f"--output={tmp_path / 'one'}"]
    assert compare_runs.main(command) == 0
    first = capsys.readouterr().out.splitlines()
    assert "Only runs with policy.vla_config.model_path = b.pt are compared" in (tmp_path / "one/report.md").read_text()
    again = [f"--table={tmp_path / 'one/runs.csv'}", f"--output={tmp_path / 'two'}"]
    assert compare_runs.main(again) == 0
    assert capsys.readouterr().out.splitlines()[:2] == first[:2]
    assert len(read_table(tmp_path / "two/runs.csv")) == 4


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("policy.vla_config.model_path=/elsewhere/a.pt", "a-"),  # known by its name where that tells all apart
        ("policy.freeze=language+vision", "vision"),
        ('policy.freeze=["vision", "language"]', "vision"),
        ("trainer.seed=2", "-2"),
        ("algorithm.cfg.learning_rate=1e-4", ""),
        ("algorithm.cfg.learning_rate=0.0001", ""),
        ("trainer.num_envs=32", ""),
        ("algorithm.cfg.anneal_lr=false", ""),  # kept nowhere, as all runs share it
    ],
)
def test_values_are_those_of_a_command_line(folder, where, kept):
    runs = read_folders([str(folder)])
    found, (note,) = select(runs, [where])
    assert names(found) == {name for name in names(runs) if kept in name} and f"{len(found)} of 8." in note


def test_any_of_an_options_values_will_do_and_all_options_count(folder):
    where = [
        "policy.freeze=none",
        "trainer.seed=2",
        "policy.freeze=vision+language",
        "policy.vla_config.model_path=a.pt",
    ]
    found, (note,) = select(read_folders([str(folder)]), where)
    assert names(found) == {"a-none-2", "a-vision+language-2"}
    assert "policy.freeze = none or vision+language and trainer.seed = 2 and" in note


def test_a_start_in_two_folders_is_known_by_its_folder_too(folder):
    make_run(folder / "more", "none", seed=9, policy__vla_config__model_path="/some/other/a.pt", trainer__num_envs=32)
    runs = read_folders([str(folder)])
    assert names(select(runs, ["policy.vla_config.model_path=experiments/other/a.pt"])[0]) == {"more"}
    assert len(select(runs, ["policy.vla_config.model_path=where/a.pt"])[0]) == 4
    with pytest.raises(UserError, match="a.pt; they have where/a.pt, b.pt, other/a.pt"):
        select(runs, ["policy.vla_config.model_path=a.pt"])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["vision"], "'vision' is no option=value, such as policy.freeze=vision"),
        (["algorithm.cfg.anneal_lr=0"], "none of the 8 runs has algorithm.cfg.anneal_lr=0; they have false"),
        (["policy.freze=vision"], "there is no option 'policy.freze'; did you mean .*policy.freeze"),
        (["policy.freeze=visoin"], r"none of the 8 runs has policy.freeze=visoin; they have none, vision\+language"),
        (["trainer.num_envs=64"], "none of the 8 runs has trainer.num_envs=64; they have 32"),
        (["trainer.seed=1", "policy.freeze=lora"], "none of the 8 runs has policy.freeze=lora"),
    ],
)
def test_a_condition_that_cannot_be_is_one_line(folder, where, message):
    with pytest.raises(UserError, match=f"^--where: {message}"):
        select(read_folders([str(folder)]), where)


def test_conditions_that_no_run_meets_together(folder):
    make_run(folder / "more", "lora", seed=1, trainer__num_envs=64)
    with pytest.raises(UserError, match=r"none of the 9 runs has all of policy.freeze=lora trainer.num_envs=32"):
        select(read_folders([str(folder)]), ["policy.freeze=lora", "trainer.num_envs=32"])


def test_a_table_knows_what_its_runs_had(folder):
    runs = read_folders([str(folder)])
    write_table(folder / "runs.csv", runs)
    where = ["policy.vla_config.model_path=a.pt", "trainer.num_envs=32"]
    assert names(select(read_table(folder / "runs.csv"), where)[0]) == names(select(runs, where)[0])


def test_runs_that_cannot_be_read_have_no_values(folder):
    make_run(folder / "broken", "none", seed=9)
    (folder / "broken" / "config.json").write_text("{")
    runs = read_folders([str(folder)])
    assert "broken" in names(runs)
    assert "broken" not in names(select(runs, ["policy.freeze=none"])[0])
    with pytest.raises(UserError, match="they have none, vision\\+language$"):
        select(runs, ["policy.freeze=lora"])
