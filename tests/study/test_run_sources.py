"""Runs read from their folders and from W&B: what is read of each, and what is left out, with the reason."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from standin_wandb_server import ENTITY
from study_worlds import (
    STATES,
    config_of,
    make_run,
    put_on_wandb,
    write_choosing,
    write_return_study,
    write_study,
    written,
)

from research.errors import UserError
from research.options import flatten_dict
from research.study.comparison import compare
from research.study.run_sources import read_folders, read_wandb
from research.study.run_table import read_table, write_table
from research.study.tables import describe


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study") / "runs")


@pytest.fixture(scope="module")
def return_study(tmp_path_factory):
    return write_return_study(tmp_path_factory.mktemp("return_study") / "runs")


# ---- from folders


def test_a_resumed_run_counts_its_last_final_evaluation_once(tmp_path):
    folder = make_run(tmp_path / "a", final=np.zeros(STATES))
    with (folder / "episodes.jsonl").open("a") as file:
        file.write('{"global_step": 20')  # torn by a kill
        for i in range(STATES):
            file.write("\n" + json.dumps({"global_step": 2000, "initial_state": i, "success": i == 0}))
        file.write("\n" + json.dumps({"global_step": 1000, "initial_state": 1, "success": True}) + "\n")
    (run,) = read_folders([str(folder)])
    assert run.episodes[-1] == "1" + "0" * (STATES - 1)
    assert run.states == "0-39"


def test_frozen_by_a_list_or_by_a_switch_of_the_model(tmp_path):
    make_run(tmp_path / "a", ["vision_encoder", "fusion"])
    make_run(tmp_path / "b", policy__vla_config__model_config={"freeze_vision_encoder": True})
    make_run(tmp_path / "c", ["fusion"], policy__vla_config__model_config={"freeze_vision_encoder": True})
    assert [run.scope for run in read_folders([str(tmp_path)])] == ["vision_encoder+fusion", "vision", "fusion+vision"]


def test_folders_are_found_below_and_by_globs_once_each_in_order(tmp_path):
    for name in ("deep/er/b", "a", "c"):
        make_run(tmp_path / name)
    (make_run(tmp_path / "no_metrics") / "metrics.jsonl").unlink()
    found = read_folders([str(tmp_path), f"{tmp_path}/?", str(tmp_path / "a")])
    assert [run.run for run in found] == ["a", "c", "b"]
    assert [run.folder.path for run in found] == [tmp_path / "a", tmp_path / "c", tmp_path / "deep/er/b"]


@pytest.mark.parametrize(
    ("summary", "status"),
    [
        ('{"exit_code": 0}', "complete"),
        ("{}", "complete"),
        ('{"exit_code": 143}', "exit code 143"),
        (None, "no summary.json: killed, or still running"),
    ],
)
def test_the_status_is_how_the_run_ended(tmp_path, summary, status):
    folder = make_run(tmp_path / "a")
    (folder / "summary.json").unlink()
    if summary:
        (folder / "summary.json").write_text(summary)
    (run,) = read_folders([str(folder)])
    assert run.status == status and run.complete == (status == "complete")
    assert (run.episodes[-1] == "") == (status != "complete")


def test_the_episodes_of_every_evaluation_are_read_and_of_a_repeated_one_the_last(tmp_path):
    folder = make_run(tmp_path / "a", final=np.ones(STATES))
    with (folder / "episodes.jsonl").open("a") as file:  # a resumed run evaluated once more
        for i in range(STATES):
            file.write(json.dumps({"global_step": 1000, "initial_state": i, "success": i < 3}) + "\n")
        file.write(json.dumps({"global_step": 1500, "initial_state": 0, "success": True}) + "\n")  # not in the metrics
    (run,) = read_folders([str(folder)])
    assert run.episodes == ["10" * (STATES // 2), "111" + "0" * (STATES - 3), "1" * STATES]


def test_an_evaluation_that_lacks_an_episode_is_not_known_and_the_others_are(tmp_path):
    folder = make_run(tmp_path / "a")
    lines = (folder / "episodes.jsonl").read_text().splitlines()
    (folder / "episodes.jsonl").write_text("\n".join(lines[1:]) + "\n")
    (run,) = read_folders([str(folder)])
    assert [bool(text) for text in run.episodes] == [False, True, True]


def test_the_evaluation_on_other_states_is_read_in_the_split_of_the_run(tmp_path):
    marks = np.arange(10) < 4
    folder = make_run(tmp_path / "a")
    write_choosing(folder, marks, first=200)
    with (folder / "choosing" / "episodes.jsonl").open("a") as file:
        file.write(json.dumps({"split": "vision", "initial_state": 300, "success": True}) + "\n")
    (run,) = read_folders([str(folder)])
    assert (run.choosing_states, run.choosing_episodes) == ("200-209", "1111000000")


def test_another_evaluation_stands_for_the_runs_own(tmp_path):
    folders = [make_run(tmp_path / name) for name in "abc"]
    write_choosing(folders[0], np.arange(10) < 4, first=200)
    write_choosing(folders[1], np.arange(10) < 4, first=200)
    with (folders[1] / "choosing" / "episodes.jsonl").open("a") as file:
        file.write(json.dumps({"split": "vision", "initial_state": 203, "success": True}) + "\n")
    own, (first, twice, without) = read_folders([str(folders[0])])[0], read_folders([str(tmp_path)], "choosing")
    assert (first.states, first.episodes, first.eval_scores) == ("200-209", ["1111000000"], [0.4])
    assert (first.eval_steps, first.eval_seconds) == (own.eval_steps[-1:], own.eval_seconds[-1:])
    assert first.environment != own.environment  # the two are not to be compared
    assert twice.status == (
        "cannot be read: choosing/episodes.jsonl: initial state 203 twice; compare splits from <run>/splits"
    )
    assert without.status == "cannot be read: choosing/episodes.jsonl: not there"


def test_origin_is_what_folder_summary_and_newest_checkpoint_say_of_it(tmp_path):
    folder = make_run(tmp_path / "ppo-20261128_163401_joki")
    summary = {"exit_code": 0, "machine": "x86_64,\nAVX2", "wandb_url": "https://wandb.ai/me/p/runs/1"}
    (folder / "summary.json").write_text(json.dumps(summary))
    for step, code in ((1000, "old"), (2000, "abc-dirty")):
        checkpoint = folder / "checkpoints" / f"step_{step:09d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text(json.dumps({"code": code}))
    (run,) = read_folders([str(folder)])
    assert (run.started, run.code, run.machine) == ("2026-11-28 16:34", "abc-dirty", "x86_64, AVX2")
    assert run.url == "https://wandb.ai/me/p/runs/1"
    write_table(tmp_path / "runs.csv", [run])
    (again,) = read_table(tmp_path / "runs.csv")
    assert (again.started, again.code, again.machine, again.url) == (run.started, run.code, run.machine, run.url)
    (checkpoint / "manifest.json").write_text("{")
    (folder / "summary.json").write_text(json.dumps({"exit_code": 0, "machine": 7}))
    (run,) = read_folders([str(folder)])
    assert run.complete and (run.code, run.machine, run.url) == ("", "", "")


def test_origin_of_a_run_on_wandb(study, monkeypatch):
    run = wandb_run(min(study.iterdir()))
    run.url, run.commit, run.created_at = "https://wandb.ai/a/b/runs/c", "0123456789abcdef", "2026-11-28T16:34:01Z"
    run.summary = {"machine": "NVIDIA H200"}
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda path: [run]))
    (found,) = read_wandb("me/vla-rl")
    assert (found.url, found.code, found.started) == ("https://wandb.ai/a/b/runs/c", "012345678", "2026-11-28 16:34")
    assert found.machine == "NVIDIA H200"


# ---- one bad folder


def spoil(folder, file, content):
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


BAD = {
    "no JSON": ("config.json", b"{", "cannot be read: config.json: "),
    "no object": ("config.json", [], "cannot be read: config.json: expected a JSON object"),
    "not UTF-8": ("config.json", b'{"a": "\xff"}', "cannot be read: config.json: "),
    "too deep": ("config.json", b"[" * 100_000, "cannot be read: config.json: "),
    "half a character": ("config.json", b'{"a": "\\ud800"}', "cannot be read: config.json: "),
    "not of this project": ("config.json", {"a": 1}, "not a run of ppo_vla.py: its config has no policy.freeze"),
    "a rate that is text": (
        "config.json", config_of(rate="fast"), "algorithm.cfg.learning_rate is 'fast', not a number"
    ),
    "a rate too large": ("config.json", config_of(rate=10**400), "algorithm.cfg.learning_rate is '1000"),
    "a seed that is true": ("config.json", config_of(seed=True), "trainer.seed is 'True', not a whole number"),
    "a scope that is a number": ("config.json", config_of(scope=[1]), "policy.freeze is '[1]', not a scope or a list"),
    "no episodes": ("config.json", config_of(trainer__num_eval_episodes=0), "num_eval_episodes is '0'"),
    "a summary that is a list": ("summary.json", [0], "summary.json: expected a JSON object"),
    "metrics that are numbers": ("metrics.jsonl", b"1\n2\n", "metrics.jsonl: a line is no JSON object"),
    "metrics of a huge number": ("metrics.jsonl", b"9" * 5000 + b"\n", "metrics.jsonl: "),
    "no metrics": ("metrics.jsonl", b"", "no evaluations in its metrics"),
    "success beyond 1": (
        "metrics.jsonl", {"global_step": 1, "time/elapsed_s": 1.0, "eval/success_rate": 3.0},
        "a success of 3.0 is not within 0 and 1",
    ),
    "no seconds": ("metrics.jsonl", {"global_step": 1, "eval/success_rate": 0.5}, "an evaluation has no seconds"),
    "episodes that are numbers": ("episodes.jsonl", b"1\n", "episodes.jsonl: a line is no JSON object"),
    "an episode of no state": ("episodes.jsonl", {"global_step": 2000}, "initial_state is 'None', no id"),
    "success that is text": (
        "episodes.jsonl", {"global_step": 2000, "initial_state": 0, "success": "yes"}, "success is 'yes'"
    ),
    "a split that is odd": ("splits/episodes.jsonl", {"split": "a", "initial_state": -1}, "initial_state is '-1'"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "content", "why"), BAD.values(), ids=BAD)
def test_one_bad_folder_is_marked_and_the_others_are_compared(tmp_path, file, content, why):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"run{seed}", seed=seed)
    spoil(make_run(tmp_path / "bad", seed=4), file, content)
    bad, *others = read_folders([str(tmp_path)])
    assert why in bad.status and "\n" not in bad.status and len(bad.status) < 250
    assert all(run.complete for run in others)
    comparison = compare([bad, *others])
    assert [run.run for run in comparison.arms[0].runs] == ["run1", "run2", "run3"]
    assert any(note.startswith(f"`bad` is excluded from all means: {bad.status[:40]}") for note in comparison.notes)
    assert describe(comparison)[0].startswith("tabletop (task = pick_place), initial states 0-39. 4 runs, 3 of them")
    write_table(tmp_path / "runs.csv", [bad, *others])
    assert [run.status for run in read_table(tmp_path / "runs.csv")] == [bad.status] + ["complete"] * 3


def test_a_billion_evaluation_episodes_are_no_reason_to_wait(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config_of(trainer__num_eval_episodes=10**9)))
    (run,) = read_folders([str(tmp_path)])
    assert run.states == "0-999999999" and run.complete and run.episodes == [""] * 3


# ---- from W&B


def wandb_run(folder, state="finished"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows += rows[-2:]  # a run that goes on from the checkpoint before logs twice
    return wandb_run_of(folder, rows, state)


def wandb_run_of(folder, rows, state="finished"):
    rows = [{"_step": number, **row} for number, row in enumerate(rows)]

    def history(keys):
        return [{key: row[key] for key in keys} for row in rows if set(keys) <= set(row)]

    config = flatten_dict(json.loads((folder / "config.json").read_text()))
    return SimpleNamespace(
        name=folder.name, id="abc", state=state, config=config, scan_history=history, files=lambda names: []
    )


def test_a_run_that_wandb_stopped_early_is_none_of_those_compared(study, monkeypatch):
    """It is finished, for a sweep goes on; and its last evaluation would be where all runs are compared."""
    runs = [wandb_run(folder) for folder in sorted(study.iterdir())]
    runs[0].summary = {"stopped_by": "signal", "exit_code": 130}
    runs[1].summary = {"stopped_by": None, "exit_code": 0}
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda path: runs))
    first, *others = read_wandb("me/vla-rl")
    assert first.status == "stopped by signal" and all(run.complete for run in others)


def test_what_a_run_gave_up_when_it_went_back_is_none_of_its_rows_on_wandb(study, monkeypatch):
    """It evaluates at 0, 50,000 and 100,000, goes back to 50,000 and comes to 75,000; and one that goes on beyond."""

    def evaluated(step, success):
        return {"global_step": step, "time/elapsed_s": step / 1e4, "eval/success_rate": success}

    def rolled(step, success):
        return {"global_step": step, "rollout/success_rate": success, "rollout/episodes": 10}

    folder = min(study.iterdir())
    before = [
        evaluated(0, 0.5),
        rolled(50_000, 0.6),
        evaluated(50_000, 0.6),
        rolled(100_000, 0.1),
        evaluated(100_000, 0.2),
    ]
    shorter = [*before, rolled(75_000, 0.9), evaluated(75_000, 0.9)]
    longer = [*before, rolled(75_000, 0.9), rolled(120_000, 0.8), evaluated(120_000, 0.7)]
    for rows, steps, scores, training in (
        (shorter, [0, 50_000, 75_000], [0.5, 0.6, 0.9], 0.9), (longer, [0, 50_000, 120_000], [0.5, 0.6, 0.7], 0.8),
    ):  # fmt: skip
        monkeypatch.setattr(wandb, "Api", lambda r=rows: SimpleNamespace(runs=lambda path: [wandb_run_of(folder, r)]))
        (run,) = read_wandb("me/vla-rl")
        assert (run.eval_steps, run.eval_scores, run.training_score) == (steps, scores, training)


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
        run.folder, run.episodes = None, [""] * len(run.eval_scores)
    assert written(*runs) == written(*local)
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
        run.folder, run.episodes = None, [""] * len(run.eval_scores)
    assert written(*read_wandb("me/vla-rl")) == written(*local)
    assert compare(local).arms[0].mean.value == pytest.approx(987.6)


def test_runs_on_wandb_are_paired_by_initial_state_as_their_folders_are(study, wandb_server):
    """By the real client: the table of runs is the same, by whichever way it was read."""
    folders = put_on_wandb(wandb_server, study, "study")
    runs, local = read_wandb(f"{ENTITY}/study"), read_folders([str(study)])
    assert [run.run for run in runs] == [f"exp-id{place}" for place in range(len(folders))]  # what folders are called
    assert [run.episodes for run in runs] == [run.episodes for run in local] and runs[0].episodes[-1]
    assert [run.states for run in runs] == [run.states for run in local]
    assert not any("single episodes are missing" in note for note in compare(runs).notes)
    assert [(arm.mean.value, arm.mean.low) for arm in compare(runs).arms] == [
        (arm.mean.value, arm.mean.low) for arm in compare(local).arms
    ]


def test_a_foreign_run_in_a_project_on_wandb_is_marked_and_left_out(study, monkeypatch):
    runs = [wandb_run(folder) for folder in sorted(study.iterdir())]
    runs[0].config = {"lr": 1}
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda path: runs))
    found = read_wandb("me/vla-rl")
    assert found[0].status == "cannot be read: not a run of ppo_vla.py: its config has no policy.freeze"
    assert sum(run.complete for run in compare(found).runs) == len(runs) - 1


def test_what_wandb_refuses_is_one_line(monkeypatch):
    def fail():
        raise wandb.errors.CommError("no such\n sweep")

    monkeypatch.setattr(wandb, "Api", fail)
    with pytest.raises(UserError, match="cannot read me/vla-rl/abc: no such sweep$"):
        read_wandb("me/vla-rl/abc")
