"""What a run that goes on may find in its folder: rows of a lost future, an evaluation that is there, damage."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import evaluate_vla
import ppo_vla
import pytest
import torch
import training_run
from resuming import changes_of_resuming, drop_rows_after, evaluation_at, newest_run
from worlds import rows_without_times, run_folder, write_config

from agents.small_vla import SmallVLA
from research.config import ExperimentConfig, TrainerConfig
from research.errors import SimulatorFailed
from research.options import parse_config, to_dict
from research.runs.checkpoint import load_checkpoint
from research.runs.folder import RunFolder, append_rows, read_rows
from research.training import evaluation
from research.training.algorithm import Progress

pytestmark = pytest.mark.slow


@pytest.fixture
def finished(tmp_path) -> Path:
    assert ppo_vla.main(["--config", str(write_config(tmp_path))]) == 0
    return run_folder(tmp_path)


def contents(run: Path) -> dict:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_finished_run_that_is_resumed_evaluates_nothing_again(finished, capsys):
    rows, episodes = rows_without_times(finished), (finished / "episodes.jsonl").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    assert ppo_vla.main([f"--trainer.resume={finished}"]) == 0
    assert rows_without_times(finished) == rows and (finished / "episodes.jsonl").read_text() == episodes
    again = json.loads((finished / "summary.json").read_text())
    assert {k: again[k] for k in again if k.startswith(("eval/", "before/"))} == {
        k: summary[k] for k in summary if k.startswith(("eval/", "before/"))
    }


def test_a_run_that_goes_on_does_not_say_that_it_starts_from_fresh_weights(tmp_path, caplog):
    fresh = "starts from fresh weights"
    assert ppo_vla.main(["--config", str(write_config(tmp_path)), "--trainer.enable_eval=false"]) == 0
    assert fresh in caplog.text
    caplog.clear()
    assert ppo_vla.main([f"--trainer.resume={run_folder(tmp_path)}", "--trainer.iterations=4"]) == 0
    assert fresh not in caplog.text


@pytest.mark.parametrize("written", [[], ["none"], ["none", "vision"], ["vision", "vision"]])
def test_a_run_whose_scope_was_written_in_another_way_goes_on(written):
    config = parse_config(ExperimentConfig, [f"--policy.freeze={written}"])
    stored = to_dict(config)
    stored["policy"]["freeze"] = written  # as earlier runs have it
    assert changes_of_resuming(stored, config, Progress(5)) == []


def test_the_best_checkpoint_of_a_finished_run_outlives_worse_evaluations(tmp_path, monkeypatch):
    """It is written with the last evaluation, after the checkpoint that the run goes on from."""
    left = succeeding(monkeypatch, 0, 6, 3, 4)
    assert ppo_vla.main(["--config", str(write_config(tmp_path))]) == 0
    run = RunFolder(run_folder(tmp_path))
    (best,) = run.checkpoints_called("best")
    longer = ["--trainer.iterations=5", "--trainer.eval_freq=64"]
    assert best.name == "best_000000192" and ppo_vla.main([f"--trainer.resume={run}", *longer]) == 0
    assert next(left, None) is None and run.checkpoints_called("best") == [best]


def succeeding(monkeypatch, *counts: int):
    """Evaluations of which so many episodes succeed, one after the other; what is left of them."""
    left = iter(counts)

    def evaluate(*arguments):
        result, count = evaluation.evaluate(*arguments), next(left)
        for place, episode in enumerate(result.episodes):
            episode.success = place < count
        return result

    monkeypatch.setattr(training_run, "evaluate", evaluate)
    return left


def evaluated(run: Path) -> dict[int, float]:
    rows = read_rows(RunFolder(run).metrics)
    return {row["global_step"]: row["eval/success_rate"] for row in rows if "eval/success_rate" in row}


def test_an_evaluation_of_another_number_of_episodes_stays_and_counts(tmp_path, monkeypatch):
    left = succeeding(monkeypatch, 0, 6, 3)
    assert ppo_vla.main(["--config", str(write_config(tmp_path))]) == 0
    run = run_folder(tmp_path)
    best = RunFolder(run).checkpoints_called("best")
    more = ["--trainer.iterations=4", "--trainer.num_eval_episodes=6"]
    assert ppo_vla.main([f"--trainer.resume={run}", *more]) == 0 and next(left, None) is None
    assert evaluated(run) == {0: 0.0, 192: 0.75, 256: 0.5} and RunFolder(run).checkpoints_called("best") == best
    steps = [row["global_step"] for row in read_rows(RunFolder(run).episodes)]
    assert [steps.count(step) for step in (0, 192, 256)] == [8, 8, 6]


def test_a_finished_run_that_is_to_be_evaluated_otherwise_is(finished, capsys):
    assert ppo_vla.main([f"--trainer.resume={finished}", "--trainer.max_eval_steps=2"]) == 0
    assert "what it ended with is evaluated anew" in capsys.readouterr().out
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["eval/global_step"] == 192 and summary["eval/episode_length"] <= 2
    lengths = [row["length"] for row in read_rows(RunFolder(finished).episodes) if row["global_step"] == 192]
    assert len(lengths) == 8 and max(lengths) <= 2
    assert sum("eval/return" in row for row in read_rows(RunFolder(finished).metrics) if row["global_step"] == 192) == 1


def test_what_is_refused_after_all_has_taken_nothing_back(finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    before = contents(finished)
    earlier = RunFolder(finished).checkpoint(128)
    assert ppo_vla.main([f"--trainer.resume={earlier}", "--trainer.tensorboard=true"]) == 2
    assert "trainer.tensorboard" in capsys.readouterr().err
    assert contents(finished) == before


def test_a_run_that_went_back_behind_its_best_keeps_the_best_of_what_is_left(tmp_path, monkeypatch):
    left = succeeding(monkeypatch, 0, 3, 2, 6, 1)
    assert ppo_vla.main(["--config", str(write_config(tmp_path, trainer__eval_freq=64))]) == 0
    run = RunFolder(run_folder(tmp_path))
    assert [path.name for path in run.checkpoints_called("best")] == ["best_000000192"]
    assert ppo_vla.main([f"--trainer.resume={run.checkpoint(128)}"]) == 0 and next(left, None) is None
    assert evaluated(run.path) == {0: 0.0, 64: 0.375, 128: 0.25, 192: 0.125}
    (best,) = run.checkpoints_called("best")  # that of env step 64 went long ago
    assert best.name == "best_000000128" and load_checkpoint(best)["progress"]["global_step"] == 128
    assert load_checkpoint(run.path)["progress"]["best"] == 0.25


def test_auto_goes_on_with_a_run_of_this_very_name(tmp_path, capsys):
    for name in ("t", "t-large"):
        assert ppo_vla.main(["--config", str(write_config(tmp_path, trainer__exp_name=name))]) == 0
    assert newest_run(TrainerConfig(exp_name="t", run_dir=str(tmp_path / "runs"))).exp_name == "t"
    assert newest_run(TrainerConfig(exp_name="t-", run_dir=str(tmp_path / "runs"))) is None


def test_what_a_run_gives_up_and_cannot_go_on_with_is_said(finished, capsys):
    earlier = RunFolder(finished).checkpoint(128)
    other = '--policy.learning_rates={"vision_encoder.patches": 1e-3}'
    assert ppo_vla.main([f"--trainer.resume={earlier}", other]) == 2
    refused = capsys.readouterr().err
    assert (
        "policy.learning_rates: the run to resume has rates for " in refused
        and RunFolder(finished).checkpoint(192).exists()
    )
    assert ppo_vla.main([f"--trainer.resume={earlier}"]) == 0
    assert "going on from env step 128; what came after it is gone: step_000000192" in capsys.readouterr().out


def test_a_policy_that_never_moves_is_told(tmp_path, capsys):
    config = write_config(tmp_path, algorithm__cfg__value_warmup_iterations=3, trainer__enable_eval=False)
    assert ppo_vla.main(["--config", str(config)]) == 0
    told = "the policy will not change: value_warmup_iterations = 3 of trainer.iterations = 3"
    assert told in capsys.readouterr().out.splitlines()


def test_rows_of_what_is_done_again_are_dropped_and_torn_ones_too(finished, tmp_path):
    """As a kill leaves them: both files go on after the checkpoint, the last line of each is half."""
    whole = {name: (finished / name).read_text() for name in ("metrics.jsonl", "episodes.jsonl")}
    for step in (192,):  # the last checkpoint; the one before is of step 128
        shutil.rmtree(RunFolder(finished).checkpoint(step))
    for path in (finished / "checkpoints").glob("best_*"):
        shutil.rmtree(path)
    for name in whole:
        with (finished / name).open("a") as file:
            file.write('{"global_step": 19')
    assert ppo_vla.main([f"--trainer.resume={finished}"]) == 0
    for name, text in whole.items():
        now, before = read_rows(finished / name), [json.loads(line) for line in text.splitlines()]
        strip = lambda rows: [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]  # noqa: E731
        assert strip(now) == strip(before), name


def test_an_evaluation_whose_metrics_were_not_written_is_made_again(tmp_path):
    folder = RunFolder.create(tmp_path, "exp")
    rows = [{"global_step": step, "initial_state": i} for step in (0, 64) for i in range(3)]
    append_rows(folder.metrics, [{"global_step": 0, "eval/return": 1.0}, {"global_step": 64, "train/entropy": 1.0}])
    append_rows(folder.episodes, [*rows, *rows[-1:]])
    assert evaluation_at(folder, 64, episodes=3) == []
    drop_rows_after(folder, 64, with_evaluation=True)
    assert read_rows(folder.episodes) == rows[:3] and len(read_rows(folder.metrics)) == 2
    append_rows(folder.episodes, [*rows[3:], *rows[-1:], {"global_step": 128, "initial_state": 0}])
    append_rows(folder.metrics, [{"global_step": 64, "eval/return": 1.0}])
    assert evaluation_at(folder, 64, episodes=4) == []  # one is missing
    assert evaluation_at(folder, 64, episodes=3) == rows[3:]
    drop_rows_after(folder, 64, with_evaluation=False)
    assert read_rows(folder.episodes) == rows and len(read_rows(folder.metrics)) == 3


WRONG = [
    (key, value)
    for key in ("model_state_dict", "optimizer", "progress", "rollouts", "audit", "rng")
    for value in (None, 3, [], {}, {"a": {"b": 1}})
    if (key, value) != ("rollouts", {})  # what collecting processes leave
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_checkpoint_of_something_else_is_refused_in_one_line_and_nothing_is_written(finished, capsys, key, value):
    state = load_checkpoint(finished)
    shutil.rmtree(finished / "checkpoints")
    (finished / "checkpoints").mkdir()
    state[key] = value
    torch.save(state, finished / "checkpoints" / "last.pt")
    before = contents(finished)
    assert ppo_vla.main([f"--trainer.resume={finished}"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and "last.pt" in error
    assert contents(finished) == before


class Mine(SmallVLA):
    """Code that is not the project's."""


def test_code_that_a_folder_from_elsewhere_names_is_not_run_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    config = write_config(tmp_path, policy__vla_config__model_class="test_resuming.Mine")
    assert ppo_vla.main(["--config", str(config), "--trainer.iterations=1"]) == 0
    run = run_folder(tmp_path)
    output = f"--output={tmp_path / 'out'}"
    assert evaluate_vla.main([f"--checkpoint={run}", output, "--film=0"]) == 0  # written here
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody else's home"))
    for script, words in ((ppo_vla, [f"--trainer.resume={run}"]), (evaluate_vla, [f"--checkpoint={run}", output])):
        capsys.readouterr()
        assert script.main(words) == 2
        error = capsys.readouterr().err
        assert "model_class = test_resuming.Mine" in error and "--trust" in error and error.count("\n") == 1
    assert evaluate_vla.main([f"--checkpoint={run}", output, "--film=0", "--trust"]) == 0
    assert "--trust" not in (run / "config.json").read_text()


def test_a_simulator_that_breaks_ends_the_run_with_a_summary_and_a_place_to_go_on(tmp_path, monkeypatch, capsys):
    from envs.tabletop import TabletopEnv

    step, calls = TabletopEnv._step, []

    def breaks(self, tensordict):
        calls.append(1)
        if len(calls) == 190 + 20:
            raise SimulatorFailed("tabletop: physics exploded")
        return step(self, tensordict)

    monkeypatch.setattr(TabletopEnv, "_step", breaks)
    # Iterations of 20 ms: by the clock, the copy would be from seconds ago.
    monkeypatch.setattr(training_run.TrainingRun, "hold", training_run.TrainingRun._take)
    argv = ["--config", str(write_config(tmp_path, trainer__save_freq=0, trainer__iterations=40))]
    assert ppo_vla.main(argv) == 1
    error = capsys.readouterr().err
    assert "physics exploded; stopped at env step" in error and "checkpoints/step_" in error
    run = run_folder(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["exit_code"] == 1 and summary["stopped_by"] == "simulator"
    # The iteration under way is lost, and nothing else: there was no checkpoint but what the run held.
    assert load_checkpoint(run)["progress"]["global_step"] == summary["global_step"] > 0
    assert ppo_vla.main([f"--trainer.resume={run}"]) == 0
    assert json.loads((run / "summary.json").read_text())["stopped_by"] is None
    training = [row["global_step"] for row in rows_without_times(run) if "train/approx_kl" in row]
    assert training == list(range(64, 40 * 64 + 1, 64))


def test_what_nobody_expected_leaves_a_summary_too(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_vla.TrainingRun, "check_ratio", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ppo_vla.main(["--config", str(write_config(tmp_path))])
    assert json.loads((run_folder(tmp_path) / "summary.json").read_text())["stopped_by"] == "error"
