"""Filming what a run changed."""

from __future__ import annotations

import json
import re

import assembling
import before_after
import numpy as np
import ppo_vla
import pytest
import torch
from PIL import Image
from worlds import run_folder, write_config

from agents.small_vla import SmallVLA
from research.errors import SimulatorFailed
from research.runs.checkpoint import load_checkpoint
from research.runs.folder import RunFolder

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
    ("name", "output", "flags", "message"),
    [
        ("", "film.webm", [], "--output: .*gif or .mp4"),
        ("nothing", "film.gif", [], "neither a run folder nor a checkpoint"),
        (
            "",
            "film.gif",
            ["--states", "1", "-5"],
            "--states: -5 is no initial state; they are numbered from 0 to",
        ),
        ("", "film.gif", ["--states", str(2**32)], "--states: 4294967296 is no initial state"),
        ("", "film.gif", ["--fps=nan"], "--fps: is nan, should be above 0"),
    ],
)
def test_what_cannot_be_filmed_is_one_line(run, name, output, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(before_after, "evaluate", None)  # it is said before anything is played
    assert before_after.main([str(run / name) if name else str(run), f"--output={tmp_path / output}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize("scope", ["none", "vision", "lora"])
@pytest.mark.parametrize("from_file", [False, True])
def test_before_is_the_policy_that_the_run_started_from(scope, from_file, tmp_path, monkeypatch):
    """A rate at which nothing moves: the checkpoint of the best evaluation is that of the start."""
    path = {}
    if from_file:
        torch.manual_seed(7)
        model = SmallVLA(action_dim=3, modalities=["rgb", "proprio"], proprio_dim=3, hidden_size=16)
        torch.save({"model_state_dict": model.state_dict()}, tmp_path / "start.pt")
        path = {"model_path": str(tmp_path / "start.pt")}
    vla = {"model_class": "agents.small_vla.SmallVLA", **path}
    vla["model_config"] = {"modalities": ["rgb", "proprio"], "hidden_size": 16}
    config = write_config(
        tmp_path, trainer__iterations=1, trainer__seed=3, trainer__use_wandb=False,
        policy={"freeze": scope, "vla_config": vla}, algorithm__cfg={"learning_rate": 1e-12, "batch_size": 32},
    )  # fmt: skip
    assert ppo_vla.main(["--config", str(config)]) == 0
    run = run_folder(tmp_path)
    state = load_checkpoint(RunFolder(run).best_checkpoint)
    assert state["progress"]["global_step"] == 0
    begun, make_policy = [], before_after.make_policy

    def watch(config, model, *args):
        begun.append({n: p.detach().clone() for n, p in model.state_dict().items()})
        return make_policy(config, model, *args)

    monkeypatch.setattr(before_after, "make_policy", watch)
    before, after = before_after.film(str(run), range(8), trusted=False)
    assert state["model_state_dict"] and all(
        torch.equal(begun[0][name], value) for name, value in state["model_state_dict"].items()
    )
    rows = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    assert [(e.length, e.episode_return) for e in before.episodes] == [
        (row["length"], row["episode_return"]) for row in rows if row["global_step"] == 0
    ]
    assert [e.length for e in before.episodes] == [e.length for e in after.episodes]


def test_a_start_that_cannot_be_made_again_is_refused(tmp_path, monkeypatch, capsys):
    vla = {"model_class": "agents.small_vla.SmallVLA"}
    config = write_config(
        tmp_path, trainer__iterations=1, trainer__use_wandb=False, policy={"freeze": "vision", "vla_config": vla}
    )
    assert ppo_vla.main(["--config", str(config)]) == 0
    monkeypatch.setattr(assembling, "seed_everything", lambda seed: torch.manual_seed(seed + 1))
    monkeypatch.setattr(before_after, "evaluate", None)
    assert before_after.main([str(run_folder(tmp_path)), f"--output={tmp_path / 'film.gif'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the policy that the run started from cannot be made here" in error


def test_what_breaks_while_it_is_filmed_is_one_line(run, tmp_path, monkeypatch, capsys):
    def broken(*args, **options):
        raise SimulatorFailed("gym:Mine: step() raised RuntimeError: boom")

    monkeypatch.setattr(before_after, "evaluate", broken)
    assert before_after.main([str(run), f"--output={tmp_path / 'film.gif'}"]) == 1
    assert capsys.readouterr().err == "error: gym:Mine: step() raised RuntimeError: boom\n"


def test_an_environment_without_pictures_is_refused_before_anything_is_played(tmp_path, monkeypatch, capsys):
    model = {"model_class": "agents.small_vla.SmallVLA", "model_config": {"modalities": ["proprio"], "hidden_size": 16}}
    config = write_config(
        tmp_path, trainer__env="gym:user_package.odd_envs:Truncates", trainer__env_config={}, trainer__iterations=1,
        trainer__use_wandb=False, policy={"vla_config": model},
    )  # fmt: skip
    assert ppo_vla.main(["--config", str(config)]) == 0
    monkeypatch.setattr(before_after, "evaluate", None)
    assert before_after.main([str(run_folder(tmp_path)), "--trust", f"--output={tmp_path / 'film.gif'}"]) == 2
    assert "has nothing to film" in capsys.readouterr().err


def test_states_that_training_draws_are_told(run, tmp_path, capsys):
    output = f"--output={tmp_path / 'film.gif'}"
    assert before_after.main([str(run), output, "--every=100", "--states", "20000"]) == 0
    assert "note: training draws initial states from 10000 on; 20000 may be one of them" in capsys.readouterr().out
