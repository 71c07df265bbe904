"""What evaluations of afterwards were of: those that are not of the runs' ends, or not of one kind, are refused."""

import numpy as np
import pytest
from study_worlds import STATES, make_run, write_choosing, write_evaluated, write_splits

from research.errors import UserError
from research.study.comparison import compare
from research.study.run_sources import read_folders
from research.study.run_table import read_table, write_table
from research.study.tables import describe

HALF = np.arange(STATES) % 2 == 0


def evaluated(tmp_path, **facts):
    """Two runs and their evaluations in `choosing/`, of which the second's are others in `facts`."""
    folders = [make_run(tmp_path / f"run{seed}", seed=seed) for seed in (1, 2)]
    for folder, of_run in zip(folders, ({}, facts), strict=True):
        write_choosing(folder, HALF, first=200)
        write_evaluated(folder, "choosing", **of_run)
    return folders


def refused(tmp_path, name="choosing", **options) -> str:
    runs = read_folders([str(tmp_path)], name)
    with pytest.raises(UserError) as error:
        compare(runs, **options)
    write_table(tmp_path / "runs.csv", runs)
    with pytest.raises(UserError) as again:
        compare(read_table(tmp_path / "runs.csv"), **options)
    assert str(again.value) == str(error.value) and "\n" not in str(error.value)
    return str(error.value)


UNLIKE = {
    "trainer.env_config.task": ({"env_config": {"task": "reach"}}, '"pick_place" in run1; "reach" in run2'),
    "trainer.eval_mode": ({"eval_mode": "sample"}, '"mode" in run1; "sample" in run2'),
    "trainer.env": ({"env": "gym:my_env:Reach"}, '"tabletop" in run1; "gym:my_env:Reach" in run2'),
    "trainer.max_eval_steps": ({"max_eval_steps": None}, "64 in run1; null in run2"),
}


@pytest.mark.parametrize(("option", "facts", "values"), [(key, *rest) for key, rest in UNLIKE.items()], ids=UNLIKE)
def test_evaluations_of_different_things_are_refused(tmp_path, option, facts, values):
    evaluated(tmp_path, **facts)
    assert refused(tmp_path) == f"these runs cannot be compared, {option} in choosing/ differs: {values}"


def test_an_evaluation_of_an_earlier_checkpoint_is_refused(tmp_path):
    """The run was resumed after it: what is in its folder is not what it came to."""
    _, second = evaluated(tmp_path, env_steps=1000)
    message = "run2: choosing/ is an evaluation of its checkpoint at 1,000 env steps, and the run ended at 2,000; do it"
    assert refused(tmp_path).startswith(message)
    make_run(tmp_path / "run3", rate=1e-3)  # of two rates one is chosen, by choosing/ where it is there
    write_choosing(tmp_path / "run3", HALF, first=200)
    assert refused(tmp_path, None).startswith(message)
    assert compare(read_folders([str(tmp_path)]), "training").arms
    assert compare(read_folders([f"{tmp_path}/run[12]"])).arms  # nothing to choose
    write_evaluated(second, "choosing")
    assert compare(read_folders([str(tmp_path)], "choosing")).arms[0].mean.value == 0.5


def test_one_checkpoint_in_the_folders_of_two_runs_is_refused(tmp_path):
    """As a loop leaves it that has the wrong variable; what runs do not say of theirs is not held against them."""
    evaluated(tmp_path, weights_sha256="run1")
    message = "choosing/ of run1 and of run2 are evaluations of one and the same checkpoint; do them again, each of its"
    assert refused(tmp_path).startswith(message)
    for folder in tmp_path.iterdir():
        if folder.is_dir():
            write_evaluated(folder, "choosing", weights_sha256=None)
    assert compare(read_folders([str(tmp_path)], "choosing")).arms


def test_evaluations_in_splits_are_of_one_kind_and_of_the_end_too(tmp_path):
    for seed in (1, 2):
        folder = make_run(tmp_path / f"run{seed}", seed=seed)
        write_splits(folder, train=HALF, semantics=HALF)
        write_evaluated(folder, "splits", eval_mode=("mode", "sample")[seed - 1])
    assert "trainer.eval_mode in splits/ differs" in refused(tmp_path, None)
    write_evaluated(folder, "splits", env_steps=0)
    (tmp_path / "run1" / "splits" / "summary.json").unlink()
    assert "run2: splits/ is an evaluation of its checkpoint at 0 env steps" in refused(tmp_path, None)
    for seed in (1, 2):
        write_evaluated(tmp_path / f"run{seed}", "splits", eval_mode="sample")
    assert "Splits were evaluated by sampled actions." in compare(read_folders([str(tmp_path)])).notes


def test_evaluations_differ_in_what_is_compared_and_in_nothing_else(tmp_path):
    for chunk, seed in ((1, 1), (1, 2), (4, 1), (4, 2)):
        config = {"task": "pick_place", "chunk": chunk}
        folder = make_run(tmp_path / f"{chunk}{seed}", seed=seed, trainer__env_config=config)
        write_choosing(folder, HALF, first=200)
        write_evaluated(folder, "choosing", env_config=config)
    comparison = compare(read_folders([str(tmp_path)], "choosing"), by=["trainer.env_config.chunk"])
    assert len(comparison.arms) == 2
    assert describe(comparison)[0].startswith(
        "tabletop, as evaluated in choosing/ (task = pick_place; by the likeliest action; at most 64 control steps an "
        "episode), initial states 200-239. "
    )


def test_the_heading_says_what_was_evaluated_and_with_what_runs_trained(tmp_path):
    for folder in evaluated(tmp_path, eval_mode="sample", env_config={"task": "reach"}):
        write_evaluated(folder, "choosing", eval_mode="sample", env_config={"task": "reach"}, max_eval_steps=None)
    assert describe(compare(read_folders([str(tmp_path)], "choosing")))[0].startswith(
        "tabletop, as evaluated in choosing/ (task = reach; by sampled actions; trained with task = pick_place), "
    )
    own = describe(compare(read_folders([str(tmp_path)])))[0]
    assert own.startswith("tabletop (task = pick_place), initial states 0-39.")


def test_how_other_states_were_evaluated_is_part_of_how_the_rate_was_chosen(tmp_path):
    for rate, seed in ((1e-4, 1), (1e-3, 1)):
        folder = make_run(tmp_path / f"{rate}-{seed}", rate=rate, seed=seed)
        write_choosing(folder, HALF, first=200)
        write_evaluated(folder, "choosing", eval_mode="sample", env_config={"task": "reach"})
    assert (
        "was chosen by success of the last checkpoint on initial states that are not reported (by sampled actions, "
        "with task = reach)." in compare(read_folders([str(tmp_path)])).notes[0]
    )


def test_evaluations_that_say_nothing_of_themselves_are_taken_as_before_and_noted_beside_others(tmp_path):
    first, second = evaluated(tmp_path)
    (second / "choosing" / "summary.json").write_text('{"eval/return": 0.5}')
    comparison = compare(read_folders([str(tmp_path)], "choosing"))
    assert (
        "Of 1 of the 2 runs it is not known what was evaluated in choosing/, and by which checkpoint: an earlier "
        "version did not write it down." in comparison.notes
    )
    (first / "choosing" / "summary.json").unlink()
    comparison = compare(read_folders([str(tmp_path)], "choosing"))
    assert not any("not known" in note for note in comparison.notes)
    assert describe(comparison)[0].startswith(
        "tabletop, as evaluated in choosing/ (trained with task = pick_place; with what it was evaluated is not known)"
    )
    (first / "choosing" / "summary.json").write_text("[")
    assert read_folders([str(first)], "choosing")[0].status.startswith("cannot be read: choosing/summary.json: ")
