"""Run folders: how they are made and found, what their files are called, and files that a crash leaves whole."""

import json
import math
import os
import shutil
import time

import pytest

from research.errors import UserError
from research.runs import folder as folder_module
from research.runs.folder import (
    RunFolder,
    append_rows,
    as_json,
    read_json,
    read_rows,
    replace_file,
    replace_rows,
    replacing,
    write_json,
)
from research.training.evaluation import Episode, Evaluation


@pytest.fixture(autouse=True)
def _not_in_a_sweep(monkeypatch):
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)


# ---- making and finding


def test_run_folders_are_unique_sorted_by_time_and_complete(tmp_path, monkeypatch):
    clock = iter(["20250101_120000", "20250101_120000", "20250101_120001"])
    monkeypatch.setattr(time, "strftime", lambda _: next(clock))
    folders = [RunFolder.create(tmp_path / "runs", "my-exp") for _ in range(3)]
    assert len(set(folders)) == 3
    assert sorted(folders)[-1] == folders[-1]
    for folder in folders:
        assert folder.path.name.startswith("my-exp-2025")
        assert folder.checkpoints.is_dir() and folder.videos.is_dir()


def test_run_folder_that_cannot_be_made_names_the_path(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match=r"cannot make the run folder .*file"):
            RunFolder.create(run_dir, "exp")
    for name in ("", "a/b"):
        with pytest.raises(UserError, match="exp_name"):
            RunFolder.create(tmp_path, name)


def test_wandb_run_id_names_the_folder_and_only_a_sweep_gets_it_back(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    folder = RunFolder.create(tmp_path, "exp")
    assert folder.path.name == "exp-abc123"
    with pytest.raises(UserError, match="exp-abc123 is there already"):
        RunFolder.create(tmp_path, "exp")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert RunFolder.create(tmp_path, "exp") == folder


def test_the_id_is_what_follows_the_last_dash(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20250101_120000")
    folder = RunFolder.create(tmp_path, "my-exp")
    assert folder.id == folder.path.name.removeprefix("my-exp-") and folder.id.startswith("20250101_120000_")
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert RunFolder.create(tmp_path, "my-exp").id == "abc123"


def test_an_id_that_was_given_may_have_dashes(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "job-12-3")
    folder = RunFolder.create(tmp_path, "my-exp")
    assert folder.exp_name is None
    write_json(folder.config, {"trainer": {"exp_name": "my-exp"}})
    assert (folder.exp_name, folder.id) == ("my-exp", "job-12-3")
    folder.config.write_text('{"trainer": []}')
    assert folder.exp_name is None


def test_every_file_has_its_place():
    folder = RunFolder("runs/exp-1")
    assert {
        name: str(getattr(folder, name).relative_to("runs/exp-1"))
        for name in ("config", "metrics", "episodes", "summary", "checkpoints", "signature", "videos", "strip",
                     "learning_curve", "splits", "wandb")
    } == {
        "config": "config.json", "metrics": "metrics.jsonl", "episodes": "episodes.jsonl", "summary": "summary.json",
        "checkpoints": "checkpoints", "signature": "signature", "videos": "videos", "strip": "videos/strip.png",
        "learning_curve": "learning_curve.png", "splits": "splits/episodes.jsonl", "wandb": "wandb",
    }  # fmt: skip
    assert str(folder.checkpoint(64)) == "runs/exp-1/checkpoints/step_000000064"
    assert str(folder.checkpoint(64, best=True)) == "runs/exp-1/checkpoints/best_000000064"
    assert str(folder.video(4096)) == "runs/exp-1/videos/eval_000004096.mp4"


def test_a_run_folder_goes_where_a_path_goes(tmp_path):
    folder = RunFolder(str(tmp_path))
    assert folder == RunFolder(tmp_path) == RunFolder(RunFolder(tmp_path)) and folder.path == tmp_path
    assert os.fspath(folder) == str(folder) == f"{folder}" == str(tmp_path)
    (tmp_path / "a").mkdir()
    shutil.rmtree(RunFolder(tmp_path / "a"))
    assert os.listdir(folder) == []
    assert sorted([RunFolder("b"), RunFolder("a")]) == [RunFolder("a"), RunFolder("b")]


def test_a_checkpoint_leads_to_its_run_folder(tmp_path):
    folder = RunFolder.create(tmp_path, "exp")
    folder.checkpoint(64).mkdir()
    (folder.checkpoint(64) / "manifest.json").touch()
    earlier = folder.checkpoints / "last.pt"
    for path in (folder, folder.path, str(folder), folder.checkpoint(64), str(folder.checkpoint(64)), earlier):
        assert RunFolder.containing(path) == folder


def test_a_run_has_a_configuration_and_checkpoints(tmp_path):
    folder = RunFolder.create(tmp_path, "exp")
    assert not folder.is_run
    write_json(folder.config, {})
    assert folder.is_run
    folder.checkpoints.rmdir()
    assert not folder.is_run


def test_a_run_has_finished_if_its_exit_code_says_so(tmp_path):
    folder = RunFolder(tmp_path)
    assert not folder.finished
    for summary, finished in (({"exit_code": 0}, True), ({"exit_code": 130}, False), ({"global_step": 8}, False)):
        write_json(folder.summary, summary)
        assert folder.finished == finished


def test_runs_are_found_anywhere_below_but_not_inside_of_one(tmp_path):
    for name in ("a", "deep/b", "a/evaluations/c", "no_config", "no_metrics"):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir(parents=True)
        for path in (folder.config, folder.metrics):
            path.write_text("")
    RunFolder(tmp_path / "no_config").config.unlink()
    RunFolder(tmp_path / "no_metrics").metrics.unlink()

    def names(path):
        return sorted(str(run.path.relative_to(tmp_path)) for run in RunFolder.all_below(path))

    assert names(tmp_path) == ["a", "a/evaluations/c", "deep/b"]
    assert names(tmp_path / "a") == ["a"] and names(tmp_path / "no_metrics") == []


# ---- whole files


def test_a_file_is_the_old_one_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "summary.json"
    replace_file(path, "old ü")
    with replacing(path) as file:
        file.write("new ")
        file.flush()
        assert path.read_text(encoding="utf-8") == "old ü"
        file.write("ö")
    assert path.read_text(encoding="utf-8") == "new ö"
    assert os.listdir(tmp_path) == ["summary.json"]
    with replacing(path, "wb") as file:
        file.write(b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    """Without that, a power failure after the renaming may leave an empty file."""
    seen = []

    def fsync(descriptor):
        seen.append((os.fstat(descriptor).st_size, (tmp_path / "a").exists()))

    monkeypatch.setattr(folder_module.os, "fsync", fsync)
    replace_file(tmp_path / "a", "12345")
    file, folder = seen
    assert file == (5, False) and folder[1]  # the folder after it: a name is on the disk once its folder is


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    replace_file(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write("half of the ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert (tmp_path / "last.pt.partial").read_text() == "half of the ne"
    replace_file(path, "new")  # the next attempt begins anew
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["last.pt"]


def test_json_has_null_where_there_is_no_number(tmp_path):
    value = {"a": math.nan, "b": [1.5, -math.inf], "c": {"d": (math.inf, True, None, "x")}}
    clean = {"a": None, "b": [1.5, None], "c": {"d": [None, True, None, "x"]}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == clean
    assert (tmp_path / "a.json").read_text() == json.dumps(clean, indent=2) + "\n"
    assert as_json(value) == json.dumps(clean)


@pytest.mark.parametrize("content", [None, "{", "\xff"])
def test_json_that_cannot_be_read_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json cannot be read: ") as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


# ---- rows


def test_rows_are_appended_and_read_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": 1}, {"a": math.nan}])
    append_rows(path, [{"a": 3}])
    assert path.read_text() == '{"a": 1}\n{"a": null}\n{"a": 3}\n'
    assert read_rows(path) == [{"a": 1}, {"a": None}, {"a": 3}]
    replace_rows(path, read_rows(path)[1:])
    assert path.read_text() == '{"a": null}\n{"a": 3}\n'


def test_episodes_become_rows_in_their_order_with_tags_in_front(tmp_path):
    episodes = [Episode(7, "put it", True, 0.5, 12), Episode(9, None, None, -1.0, 3)]
    append_rows(tmp_path / "episodes.jsonl", Evaluation(episodes, []).rows(global_step=64, seed=1))
    first, second = (tmp_path / "episodes.jsonl").read_text().splitlines()
    assert first == (
        '{"global_step": 64, "seed": 1, "initial_state": 7, "instruction": "put it", "success": true, '
        '"episode_return": 0.5, "length": 12, "success_at_end": null, "cut_off": false, "task": null}'
    )
    assert json.loads(second)["success"] is None


def test_a_torn_row_is_left_out_at_the_end_and_elsewhere_where_that_is_expected(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert read_rows(path) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a": 2\n{"a": 3}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: not JSON"):
        read_rows(path)
    assert read_rows(path, torn_anywhere=True) == [{"a": 1}, {"a": 3}]
