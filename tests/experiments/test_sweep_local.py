"""Sweeps without a server: every point once, interruptions, early stopping, and runs that fail."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sweep_local
import yaml
from study_worlds import write_sweep
from sweep_worlds import SCRIPT, children, in_background, wait_for
from worlds import ROOT, write_config

from research import progress_bar
from research.runs.folder import RunFolder
from research.runs.tracking import read_metrics
from research.study.sweep_file import load_sweep
from research.study.sweep_progress import SweepProgress

pytestmark = pytest.mark.slow

# An iteration is one env step, as in the script's metrics.
ONE_STEP_EACH = {name: {"value": 1} for name in ("trainer.num_envs", "trainer.buffer_size", "algorithm.cfg.batch_size")}


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_quick_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_local, "POLL_S", 0.02)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "script.py").write_text(SCRIPT)


def starts() -> dict[str, list[dict]]:
    """What every run folder's processes noted at their start."""
    found = sorted(Path("runs", "s").glob("*/starts.jsonl"))
    return {path.parent.name: [json.loads(line) for line in path.read_text().splitlines()] for path in found}


def points() -> list[tuple[str, str]]:
    """(seed, rate) of every start, over all run folders."""
    found = []
    for start in itertools.chain(*starts().values()):
        flags = dict(word[2:].split("=", 1) for word in start["words"])
        found.append((flags["trainer.seed"], flags["algorithm.cfg.learning_rate"]))
    return sorted(found)


def study(storage="sqlite:///runs/s/sweep.db"):
    import optuna

    return optuna.load_study(study_name="s", storage=storage)


def states() -> list[str]:
    return [trial.state.name for trial in study().trials]


def rows() -> int:
    return sum(len(path.read_text().splitlines()) for path in Path("runs").glob("s/*/metrics.jsonl"))


# ---- what is run


def test_a_grid_is_its_product_each_point_once_with_the_agents_arguments(capsys):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    fixed = {"trainer.use_wandb": {"value": False}, "policy.freeze": {"value": ["fusion"]}}
    path = write_sweep(parameters=fixed)
    assert sweep_local.main([path]) == 0
    assert points() == [("1", "0.5"), ("1", "1.0"), ("2", "0.5"), ("2", "1.0")]
    point = {
        "trainer.seed": 1,
        "algorithm.cfg.learning_rate": 0.5,
        "trainer.use_wandb": False,
        "policy.freeze": ["fusion"],
    }
    asked = create_sweep_command_args({"args": {k: {"value": v} for k, v in point.items()}})["args"]
    first = next(iter(starts().values()))[0]["words"]
    assert first[: len(asked)] == asked
    assert first[len(asked) :] == [f"--trainer.run_dir={Path('runs/s')}", "--trainer.wandb_tags+=sweep:s"]
    out = capsys.readouterr().out
    assert out.count("done") == 9 and "4 done, of 4" in out  # a line as each ends, the table, its last line
    assert "python experiments/compare_runs.py runs/s" in out
    assert [trial.value for trial in study().trials] == pytest.approx([0.02, 0.03, 0.02, 0.03])

    assert sweep_local.main([path]) == 0
    assert len(points()) == 4  # nothing twice
    assert sweep_local.main([write_sweep(rates=(0.5, 1.0, 2.0), parameters=fixed)]) == 0
    assert points()[2] == ("1", "2.0") and len(points()) == 6  # and what is new in the file


@pytest.mark.parametrize(
    ("method", "varied", "said"),
    [
        (
            "grid",
            ["trainer.seed", "policy.freeze", "policy.learning_rate_factor"],
            "experiments/compare_runs.py runs/s",
        ),
        ("grid", ["trainer.seed", "algorithm.cfg.gamma"], "compare_runs.py runs/s --by algorithm.cfg.gamma"),
        ("grid", ["policy.freeze", "algorithm.cfg.gamma"], "runs/s --by policy.freeze algorithm.cfg.gamma"),
        ("bayes", ["policy.freeze", "algorithm.cfg.learning_rate"], "are proposals of one seed each"),
    ],
)
def test_it_ends_with_the_command_that_compares_what_it_varied(method, varied, said):
    sweep = SimpleNamespace(sweep=SimpleNamespace(method=method, varied=varied), folder="runs/s")
    told = SweepProgress.next_step(sweep)
    assert told.endswith(said) if method == "grid" else said in told


def test_a_trial_is_an_ordinary_run(tmp_path):
    config = write_config(tmp_path, trainer__iterations=2, trainer__run_dir=str(tmp_path / "runs"))
    sweep = {
        "program": str(ROOT / "experiments" / "ppo_vla.py"), "method": "grid", "name": "s",
        "command": ["${env}", "${interpreter}", "${program}", f"--config={config}", "${args}"],
        "metric": {"name": "eval/success_rate", "goal": "maximize"},
        "parameters": {"trainer.seed": {"value": 3}, "trainer.exp_name": {"value": "tiny"}},
    }  # fmt: skip
    Path("s.yaml").write_text(yaml.safe_dump(sweep))
    assert sweep_local.main(["s.yaml"]) == 0, Path("runs/s/logs").iterdir().__next__().read_text()
    (run,) = Path("runs/s").glob("tiny-*")
    (trial,) = study().trials
    saved = json.loads((run / "config.json").read_text())["trainer"]
    assert (saved["seed"], saved["wandb_tags"]) == (3, ["sweep:s"])
    assert trial.value == read_metrics(run)[-1]["eval/success_rate"] and trial.state.name == "COMPLETE"


def test_workers_run_at_once_and_share_the_cores(monkeypatch):
    monkeypatch.setenv("MEET", "2")  # each waits for the other, however long a process takes to start
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert sweep_local.main([write_sweep(), "--workers=2"]) == 0
    found = starts()
    assert {run[0]["threads"] for run in found.values()} == {"3"}
    begun = sorted(run[0]["time"] for run in found.values())
    ended = sorted(json.loads(path.read_text())["ended"] for path in Path("runs/s").glob("*/summary.json"))
    assert begun[1] < ended[0] and begun[3] < ended[2]  # two at a time
    assert begun[2] > ended[0]  # and no more


def test_another_terminal_sees_how_far_the_runs_are(capsys):
    budget = {"trainer.iterations": {"value": 20}, **ONE_STEP_EACH}
    path = write_sweep(rates=[1.0], parameters=budget)
    assert sweep_local.main([path, "--status"]) == 2
    assert "the sweep has no trials in runs/s; start it first" in capsys.readouterr().err and not Path("runs").exists()
    process = in_background(path, "--trials=2", pace=0.5)
    wait_for(lambda: rows() >= 3, alive=(process,))
    assert sweep_local.main([path, "--status"]) == 0
    told = capsys.readouterr().out
    assert "1 running, of 2, 1 waiting" in told and "%, " in told and " of 20 env steps" in told
    assert "time left: about" in told and process.poll() is None
    process.terminate()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 143 and "interrupted" in out, err
    assert sweep_local.main([path, "--status"]) == 0
    assert "nothing runs" in capsys.readouterr().out


def test_a_running_sweep_shows_the_steps_inside_its_runs(monkeypatch, capsys):
    """A line where it writes to no terminal, here after no time instead of a minute."""
    monkeypatch.setattr(progress_bar, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(sweep_local, "SHOW_S", 0.0)
    monkeypatch.setenv("PACE", "0.4")
    budget = {"trainer.iterations": {"value": 5}, "trainer.seed": {"value": 1}, **ONE_STEP_EACH}
    assert sweep_local.main([write_sweep(rates=[1.0, 2.0], metric=None, parameters=budget)]) == 0
    out, err = capsys.readouterr()
    shown = re.findall(r"([\d.]+) of 2 trials in [\d:]+, [\d:]+ left, trial (\d): (20|40|60|80)%", err)
    # Which of its steps are seen depends on the machine; trials that are done and the steps of one that runs add up.
    assert {trial for done, trial, percent in shown if float(done) == int(trial) + int(percent) / 100} == {"0", "1"}
    assert "2 done, of 2" in out


def test_two_processes_share_a_sweep():
    path = write_sweep(rates=[0.25, 0.5, 1.0])
    both = [in_background(path, pace=0.1) for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    assert len(points()) == len(set(points())) == 6
    assert states() == ["COMPLETE"] * 6


def test_bayes_draws_within_its_ranges_until_its_cap():
    ranges = {
        "algorithm.cfg.learning_rate": {"distribution": "log_uniform_values", "min": 0.01, "max": 100.0},
        "trainer.seed": {"min": 1, "max": 50},
        "policy.freeze": {"values": ["none", ["fusion", "vision_encoder"]]},
    }
    path = write_sweep(method="bayes", run_cap=12, parameters=ranges)
    assert sweep_local.main([path, "--workers=4"]) == 0
    found = [trial.user_attrs["point"] for trial in study().trials]
    assert len(found) == 12
    assert all(0.01 <= p["algorithm.cfg.learning_rate"] <= 100 and 1 <= p["trainer.seed"] <= 50 for p in found)
    assert {str(p["policy.freeze"]) for p in found} == {"none", "['fusion', 'vision_encoder']"}
    assert len({p["algorithm.cfg.learning_rate"] for p in found}) == 12
    assert len(starts()) == 12


def test_the_target_ends_a_sweep():
    path = write_sweep(metric={"name": "eval/success_rate", "goal": "maximize", "target": 0.03}, rates=[1.0, 2.0, 3.0])
    assert sweep_local.main([path]) == 0
    assert len(points()) == 1


# ---- stopping early


def test_hyperband_stops_what_is_worse_and_keeps_its_checkpoint(monkeypatch, capsys):
    monkeypatch.setenv("PACE", "0.15")
    path = write_sweep(
        rates=[1.0, 9.0, 30.0],
        early_terminate={"type": "hyperband", "min_iter": 2, "eta": 3},
        parameters={"trainer.seed": {"value": 1}, "trainer.iterations": {"value": 40}},
    )
    monkeypatch.setattr(sweep_local, "POLL_S", 0.02)
    assert sweep_local.main([path, "--workers=1"]) == 0
    assert states() == ["COMPLETE", "PRUNED", "PRUNED"]
    best, *worse = (Path("runs/s", name) for name in starts())
    assert len(read_metrics(best)) == 40
    for run in worse:
        assert 3 <= len(read_metrics(run)) < 20  # min_iter counts from the value before training
        assert json.loads((run / "summary.json").read_text())["exit_code"] == 143
        assert RunFolder(run).last_checkpoint
    assert "2 stopped early" in capsys.readouterr().out
    assert sweep_local.main([path]) == 0 and len(points()) == 3  # they stay stopped


def test_a_run_whose_simulator_broke_goes_on_from_its_checkpoint(capsys):
    """It breaks at the second of four iterations, once: the time after, it is past that place."""
    path = write_sweep(rates=[17.0], parameters={"trainer.seed": {"value": 1}, "trainer.iterations": {"value": 4}})
    assert sweep_local.main([path]) == 0
    assert [start["from"] for start in next(iter(starts().values()))] == [0, 2] and states() == ["COMPLETE"]


# ---- interruptions


def test_after_a_kill_the_runs_go_on_from_their_checkpoints():
    path = write_sweep(parameters={"trainer.iterations": {"value": 8}})
    process = in_background(path, "--workers=2")
    wait_for(lambda: rows() >= 6)
    killed = [process.pid, *children(process.pid)]
    assert len(killed) == 3
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert states() == ["RUNNING", "RUNNING"]  # nobody could write down more
    assert sweep_local.main([path, "--workers=2"]) == 0
    assert states() == ["COMPLETE"] * 4
    found = starts()
    assert len(found) == 4 and [len(run) for run in found.values()] == [2, 2, 1, 1]
    resumed = [run for run in found.values() if len(run) == 2]
    for first, second in resumed:
        assert first["from"] == 0 < second["from"] and second["words"][-1].startswith("--trainer.resume=")
    for name in found:
        assert [row["global_step"] for row in read_metrics(Path("runs/s", name))] == list(range(1, 9))


def test_a_run_that_outlives_its_sweep_is_not_started_twice():
    path = write_sweep(rates=[1.0], parameters={"trainer.seed": {"value": 1}, "trainer.iterations": {"value": 20}})
    process = in_background(path)
    wait_for(lambda: rows() >= 2)
    process.kill()
    process.wait()
    assert sweep_local.main([path]) == 0  # nothing to do while it runs
    assert states() == ["RUNNING"]
    wait_for(lambda: list(Path("runs/s").glob("*/summary.json")))
    time.sleep(0.5)
    assert sweep_local.main([path]) == 0
    assert states() == ["COMPLETE"] and len(points()) == 1


def test_a_run_killed_before_its_first_checkpoint_begins_anew():
    path = write_sweep(rates=[1.0], parameters={"trainer.seed": {"value": 1}})
    process = in_background(path, pace=3)
    wait_for(lambda: starts())
    for pid in [process.pid, *children(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert sweep_local.main([path]) == 0
    ((name, (start,)),) = starts().items()
    assert start["from"] == 0 and len(read_metrics(Path("runs/s", name))) == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_cleanly_and_the_next_start_goes_on(number, code):
    path = write_sweep(parameters={"trainer.iterations": {"value": 8}})
    process = in_background(path, "--workers=2")
    wait_for(lambda: rows() >= 4)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches all that the terminal started
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    assert "2 interrupted" in out and "goes on from here" in out
    summaries = [json.loads(path.read_text()) for path in Path("runs/s").glob("*/summary.json")]
    assert [summary["exit_code"] for summary in summaries] == [143, 143]  # each wrote its checkpoint
    assert sweep_local.main([path, "--workers=2"]) == 0
    assert states() == ["COMPLETE"] * 4 and len(points()) == 6


# ---- runs that fail


def test_a_crash_is_kept_and_not_repeated_and_a_refusal_is_tried_again(capsys):
    Path("refuse").write_text("")
    path = write_sweep(rates=[13.0, 1.0, 7.0, 2.0], parameters={"trainer.seed": {"value": 1}})
    assert sweep_local.main([path]) == 1
    assert states() == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    out, err = capsys.readouterr()
    assert "exit code 1: loss is nan" in out and "exit code 2: error: rate 7 is refused" in out
    assert err.endswith("error: 2 of its trials failed; what they printed is in runs/s/logs\n")
    Path("refuse").unlink()
    assert sweep_local.main([path]) == 1
    assert states() == ["FAIL", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert [rate for _, rate in points()].count("13.0") == 1
    assert "error: 1 of its trials failed" in capsys.readouterr().err  # the one that was tried again is over


def test_a_sweep_without_a_run_that_ended_has_nothing_to_compare(capsys):
    assert sweep_local.main([write_sweep(rates=[13.0], parameters={"trainer.seed": {"value": 1}})]) == 1
    out, err = capsys.readouterr()
    assert "compare with" not in out and "error: 1 of its trials failed" in err


def test_a_grid_is_gone_on_with_under_another_metric(capsys):
    """It only shows it: a run that logged no such number is as good as ever."""
    assert sweep_local.main([write_sweep(metric={"name": "eval/sucess_rate", "goal": "maximize"})]) == 0
    assert states() == ["COMPLETE"] * 4 and capsys.readouterr().out.count("it logged no eval/sucess_rate") >= 4
    for metric, best in (({"name": "eval/success_rate", "goal": "maximize"}, "0.03"), ({"name": "global_step"}, "3")):
        assert sweep_local.main([write_sweep(metric=metric)]) == 0
        assert sweep_local.main([write_sweep(metric=metric), "--status"]) == 0
        out = capsys.readouterr().out
        assert "it logged no" not in out and f"best so far: {best}, trial" in out
    assert len(points()) == 4


def test_a_metric_that_no_run_logs_is_refused_where_that_is_known(capsys):
    """Of scripts of one's own nobody knows what they log."""
    for name, hint in (
        ("eval/sucess_rate", "; did you mean 'eval/success_rate'"),
        ("best/success_rate", "; did you mean '.*success_rate'"),
    ):
        path = write_sweep(program="experiments/ppo_vla.py", metric={"name": name, "goal": "maximize"})
        assert sweep_local.main([path]) == 2
        assert re.search(f"error: s.yaml: metric: no run of .*ppo_vla.py logs '{name}'{hint}", capsys.readouterr().err)
    assert not Path("runs").exists()


@pytest.mark.parametrize("form", ["${args_no_boolean_flags}", "${args_no_hyphens}", "${args_json}"])
def test_a_form_that_this_projects_scripts_do_not_read_is_refused_before_the_first_run(form, capsys):
    """Of a switch that is false the first one passes nothing, and the run would have it on."""
    command = ["${interpreter}", "${program}", form]
    switch = {"trainer.enable_eval": {"value": False}}
    path = write_sweep(program="experiments/ppo_vla.py", command=command, parameters=switch, metric=None)
    assert sweep_local.main([path]) == 2
    told = capsys.readouterr().err
    assert "s.yaml: command: " in told and f"does not read {form}; use ${{args}} or ${{args_no_equals}}" in told
    assert not Path("runs").exists()


def test_three_failures_in_a_row_end_the_sweep(capsys):
    path = write_sweep(rates=[13.0, 1.0], parameters={"trainer.seed": {"values": [1]}, "algorithm.cfg.gamma": {
        "values": [0.1, 0.2, 0.3, 0.4]}, "algorithm.cfg.learning_rate": {"values": [13.0]}})  # fmt: skip
    assert sweep_local.main([path]) == 1
    assert states() == ["FAIL"] * 3
    error = capsys.readouterr().err
    assert "3 runs in a row failed" in error and "loss is nan" in error and ".log" in error


def test_another_sweep_of_the_same_name_is_refused(capsys):
    assert sweep_local.main([write_sweep()]) == 0
    assert sweep_local.main([write_sweep(method="random", run_cap=2)]) == 2
    assert "has trials of another sweep" in capsys.readouterr().err
    assert len(points()) == 4


def test_a_storage_that_cannot_be_opened(capsys):
    assert sweep_local.main([write_sweep(), "--storage=nosuch://x"]) == 2
    error = capsys.readouterr().err
    assert "the storage nosuch://x cannot be opened" in error and error.count("\n") == 1


def test_away_from_a_checkout_the_scripts_of_a_sweep_are_this_projects():
    """One of the same name in the working directory goes first, and a path of the user's own is left alone."""
    own = str(ROOT / "experiments" / "ppo_vla.py")
    assert sweep_local.found("experiments/ppo_vla.py") == sweep_local.found("ppo_vla.py") == own
    assert sweep_local.found("scripts/ppo_vla.py") == "scripts/ppo_vla.py"
    assert sweep_local.found("experiments/mine.py") == "experiments/mine.py"
    Path("sweep.yaml").write_text(
        "{name: away, program: experiments/ppo_vla.py, method: grid, parameters: {trainer.seed: {values: [1]}}}"
    )
    sweep = sweep_local.LocalSweep(load_sweep("sweep.yaml"), 1, None, None).sweep
    assert own in sweep.words(sweep.corners()[0])
    Path("ppo_vla.py").write_text("")
    assert sweep_local.found("ppo_vla.py") == "ppo_vla.py"


def test_a_sweep_of_another_script_of_this_project_is_refused_by_name(capsys):
    program = str(ROOT / "experiments" / "bc_vla.py")
    assert sweep_local.main([write_sweep(program=program, parameters={"learning_rate": {"values": [0.1]}})]) == 2
    told = capsys.readouterr().err
    assert f"program: {program} has other options than those of ppo_vla.py and grpo_vla.py" in told
    assert "did you mean" not in told
