"""The main job end to end: learning, reproducibility, resuming, interruption, and what users get wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import assembling
import evaluate_vla
import ppo_vla
import pytest
import torch
import training_run
from torch import nn
from torch.distributions import Independent, Normal
from worlds import ROOT, rows_without_times, run_folder, write_config

from agents.small_vla import SmallVLA
from research import progress_bar
from research.runs.checkpoint import load_checkpoint
from research.runs.folder import RunFolder
from research.runs.tracking import read_metrics
from research.training.evaluation import Evaluation

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "experiments" / "ppo_vla.py"


def test_ppo_solves_reach_from_scratch(tmp_path):
    config = write_config(
        tmp_path,
        trainer__env_config={
            "task": "reach", "reward": "milestones", "num_blocks": 1, "image_size": 32,
            "modalities": ["depth", "proprio"],
        },
        trainer__num_envs=64, trainer__buffer_size=1024, trainer__iterations=80, trainer__num_eval_envs=64,
        trainer__num_eval_episodes=64, trainer__save_freq=0,
        policy__vla_config={"model_class": "worlds.DepthReacher"},
        policy__critic_gradient="trunk",
        algorithm__cfg={"learning_rate": 1e-3, "batch_size": 256, "n_epochs": 6, "gamma": 0.95, "ent_coef": 0.0},
    )  # fmt: skip
    assert ppo_vla.main(["--config", str(config)]) == 0
    summary = json.loads((run_folder(tmp_path) / "summary.json").read_text())
    assert summary["before/success_rate"] <= 0.3
    assert summary["eval/success_rate"] >= 0.9


def test_utilisation_is_the_models_arithmetic_over_what_the_machine_could_do(tmp_path, monkeypatch):
    monkeypatch.setattr(assembling, "matmul_flops_per_second", lambda dtype, device: 1e9)
    monkeypatch.setattr(assembling, "flops_per_transition", lambda policy, observation, rows: (1e3, 5e3))
    config = write_config(tmp_path, algorithm__cfg__value_warmup_iterations=1, algorithm__cfg__n_epochs=2)
    assert ppo_vla.main(["--config", str(config)]) == 0
    first, *rest = [row for row in read_metrics(run_folder(tmp_path)) if "train/epochs" in row]
    assert "time/mfu" not in first and rest
    for row in rest:
        assert row["train/epochs"] == 2
        assert row["time/mfu"] == pytest.approx(row["time/env_steps_per_second"] * (1e3 + 2 * 5e3) / 1e9)


@pytest.mark.parametrize("freeze", ["none", "vision"])
def test_same_seed_gives_bit_equal_metrics(tmp_path, freeze):
    rows = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, policy__freeze=freeze)
        assert ppo_vla.main(["--config", str(config)]) == 0
        rows.append(rows_without_times(run_folder(tmp_path / name)))
    assert rows[0] == rows[1] and len(rows[0]) == 5
    (tmp_path / "c").mkdir()
    assert ppo_vla.main(["--config", str(write_config(tmp_path / "c", policy__freeze=freeze, trainer__seed=2))]) == 0
    assert rows_without_times(run_folder(tmp_path / "c")) != rows[0]


def test_resume_is_bit_exact(tmp_path):
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    assert ppo_vla.main(["--config", str(write_config(tmp_path / "whole", trainer__iterations=4))]) == 0
    whole = run_folder(tmp_path / "whole")
    assert ppo_vla.main(["--config", str(write_config(tmp_path / "halves", trainer__iterations=2))]) == 0
    halves = run_folder(tmp_path / "halves")
    torch.manual_seed(12345)  # whatever happened in between
    argv = ["--config", str(halves / "config.json"), f"--trainer.resume={halves}", "--trainer.iterations=4"]
    assert ppo_vla.main(argv) == 0

    def training(run: Path) -> list[dict]:
        return [row for row in rows_without_times(run) if "train/approx_kl" in row]

    assert training(whole) == training(halves) and len(training(whole)) == 4
    a, b = (load_checkpoint(r) for r in (whole, halves))
    for key, weight in a["model_state_dict"].items():
        assert torch.equal(weight, b["model_state_dict"][key]), key


def test_evaluation_twice_gives_equal_episodes(tmp_path):
    episodes = []
    for name in ("a", "b"):
        argv = [
            f"--output={tmp_path / name}",
            "--trainer.num_eval_episodes=24",
            "--trainer.num_eval_envs=16",
            "--film=2",
        ]
        assert evaluate_vla.main([*argv, "--trainer.progress_bar=False"]) == 0
        episodes.append((tmp_path / name / "episodes.jsonl").read_text())
    assert episodes[0] == episodes[1]
    rows = [json.loads(line) for line in episodes[0].splitlines()]
    assert [row["initial_state"] for row in rows] == list(range(24))
    assert all("plate" in row["instruction"] for row in rows)
    assert (tmp_path / "a" / "evaluation.mp4").stat().st_size > 1000


def test_shipped_checkpoint_solves_about_half(tmp_path):
    argv = [f"--output={tmp_path}", "--film=0", "--trainer.progress_bar=False"]
    assert evaluate_vla.main(argv) == 0
    assert 0.40 <= json.loads((tmp_path / "summary.json").read_text())["eval/success_rate"] <= 0.65
    shipped = (ROOT / "experiments" / "checkpoints").glob("tabletop_*")
    assert 0 < sum(p.stat().st_size for p in shipped) < 2 * 2**20


def test_a_gymnasium_environment_of_the_users_trains_through_json(tmp_path):
    config = write_config(
        tmp_path,
        trainer__env="gym:user_package.reach_env:ReachEnv",
        trainer__env_config={"keys": {"proprio": "state"}, "instruction": "reach the target", "max_episode_steps": 6},
        policy__action_dim=2,
        policy__vla_config={
            "model_class": "agents.small_vla.SmallVLA",
            "model_config": {"action_dim": 2, "modalities": ["proprio", "language"], "proprio_dim": 6},
        },
    )
    assert ppo_vla.main(["--config", str(config)]) == 0
    rows = read_metrics(run_folder(tmp_path))
    assert any("rollout/success_rate" in row for row in rows) and "eval/success_rate" in rows[-1]


BAD = [
    (["--trainer.iteratons=3"], "trainer.iterations"),
    (["--trainer.iterations=-1"], "trainer.iterations"),
    (["--trainer.num_envs=0"], "trainer.num_envs"),
    (["--algorithm.cfg.learning_rate=fast"], "algorithm.cfg.learning_rate"),
    (["--algorithm.cfg.batch_size=128"], "batch_size"),
    (["--trainer.env=warehouse"], "unknown environment 'warehouse'"),
    (["--policy.vla_config.model_class=agents.small_vla.SmolVLA"], "SmallVLA"),
    (["--policy.vla_config.model_class=torch.nn.Identity"], "get_value, evaluate_actions"),
    (["--policy.vla_config.model_path=nowhere.pt"], "nowhere.pt"),
    (["--policy.action_dim=7"], "policy.action_dim is 7, but the environment takes actions of 3 numbers; leave it out"),
    (
        ["--policy.vla_config.model_config.action_dim=7"],
        "policy.vla_config.model_config.action_dim is 7, but the environment takes actions of 3 numbers; leave it out",
    ),
    (
        ["--policy.vla_config.model_config.proprio_dim=9"],
        "policy.vla_config.model_config.proprio_dim is 9, but the environment offers proprio of 3 numbers",
    ),
    (["--trainer.num_eval_episodes=10001"], "tabletop holds out 10,000 and trains on the others; at most 10000 here"),
    (["--trainer.device=tpu9"], "trainer.device"),
    (["--trainer.device=meta"], "trainer.device: 'meta' cannot compute here"),
    (["--policy.freeze=[visoin_encoder]"], "vision_encoder"),
    (["--policy.learning_rates.fusoin=1e-3"], "fusion"),
    (["--policy.value_head=critic"], "value_head"),
    (
        ["--policy.freeze=[value_head]"],
        "policy.freeze: ['value_head'] freezes value_head of SmallVLA",
    ),
    (["--trainer.env_config.task=fly"], "fly"),
    (["--trainer.resume=nowhere"], "nowhere"),
    (["--policy.vla_config.model_config.modalities=[depth]"], "reads depth"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[flags[0] for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, flags, message):
    assert ppo_vla.main(["--config", str(write_config(tmp_path)), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert message in error
    assert not (tmp_path / "runs").exists()  # nothing was started


def test_cuda_asked_for_and_absent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ppo_vla.main(["--config", str(write_config(tmp_path)), "--trainer.device=cuda"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_run_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = ["--config", str(write_config(tmp_path)), f"--trainer.run_dir={tmp_path / 'file' / 'runs'}"]
    assert ppo_vla.main(argv) == 2
    assert "cannot make the run folder" in capsys.readouterr().err


def test_errors_reach_the_shell_as_one_line():
    done = subprocess.run([sys.executable, str(SCRIPT), "--trainer.sed=3"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "trainer.seed" in done.stderr


def test_nan_during_the_run_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):

    calls = []

    def value(self, hidden):
        calls.append(1)
        return self.value_head(hidden) * (float("nan") if len(calls) > 120 else 1.0)

    monkeypatch.setattr(SmallVLA, "value", value)
    assert ppo_vla.main(["--config", str(write_config(tmp_path)), "--trainer.iterations=50"]) == 1
    error = capsys.readouterr().err
    assert "state_value is nan" in error or "loss_critic is nan" in error
    assert "at env step" in error and "checkpoints/step_" in error
    saved = load_checkpoint(run_folder(tmp_path))
    assert all(torch.isfinite(w).all() for w in saved["model_state_dict"].values())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_a_checkpoint_and_a_summary(tmp_path, number, code):
    config = write_config(tmp_path, trainer__iterations=100000, trainer__save_freq=0)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--config", str(config)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        runs = list((tmp_path / "runs").glob("*/metrics.jsonl"))
        if runs and "train/approx_kl" in runs[0].read_text():
            break
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    run = run_folder(tmp_path)
    saved = load_checkpoint(run)
    last = read_metrics(run)[-1]["global_step"]
    assert saved["progress"]["global_step"] == last > 0
    assert str(run) in out and json.loads((run / "summary.json").read_text())["exit_code"] == code


def test_a_frozen_weight_that_changes_stops_the_run(tmp_path, capsys):
    keys = ["rgb", "proprio", "language"]
    config = write_config(
        tmp_path,
        trainer__env_config={"task": "reach", "modalities": keys},
        policy__freeze="language",
        policy__vla_config={
            "model_class": "worlds.Leaking",
            "model_config": {"action_dim": 3, "modalities": keys, "hidden_size": 16},
        },
    )
    assert ppo_vla.main(["--config", str(config)]) == 1
    assert "language_encoder.near.bias" in capsys.readouterr().err
    summary = json.loads((run_folder(tmp_path) / "summary.json").read_text())
    assert summary["audit/frozen_ok"] is False and summary["exit_code"] == 1


@pytest.mark.parametrize("scope", ["none", "vision", "backbone", "lora", "residual"])
def test_the_audit_is_in_the_summary_and_drift_in_the_metrics(tmp_path, scope):
    config = write_config(tmp_path, policy__freeze=scope, trainer__iterations=2)
    assert ppo_vla.main(["--config", str(config)]) == 0
    run = run_folder(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["audit/frozen_ok"] is True
    assert summary["machine"] and summary["wandb_url"] is None  # for compare_runs.py; W&B is off
    assert (summary["audit/frozen_tensors"] > 0) == (scope != "none")
    drift = {k: v for k, v in read_metrics(run)[-1].items() if k.startswith("audit/drift/")}
    assert (drift["audit/drift/vision_encoder"] > 0) == (scope in ("none", "lora"))
    assert (drift["audit/drift/fusion"] > 0) == (scope not in ("backbone", "residual"))
    assert (drift["audit/drift/action_head"] > 0) == (scope != "residual")
    assert (drift.get("audit/drift/residual", 0) > 0) == (scope == "residual")
    argv = [f"--checkpoint={run}", f"--output={tmp_path / 'evaluation'}", "--trainer.num_eval_episodes=4"]
    assert evaluate_vla.main(argv) == 0
    argv = ["--config", str(run / "config.json"), f"--trainer.resume={run}", "--trainer.iterations=3"]
    assert ppo_vla.main(argv) == 0
    assert json.loads((run / "summary.json").read_text())["audit/hash"] == summary["audit/hash"]


def test_a_gpt_style_model_trains_with_its_language_model_frozen(tmp_path, capsys):
    """Gradients flow through the frozen language model to the projector, so it runs in the update; the encoder not."""
    keys = ["rgb", "proprio", "language"]
    config = write_config(
        tmp_path,
        trainer__env_config={"task": "reach", "modalities": keys, "image_size": 32},
        trainer__iterations=2,
        policy__freeze=["vision", "language", "readout", "proprio_projector"],
        policy__vla_config={
            "model_class": "agents.gpt_vla.GPTVLAModel",
            "model_config": {
                "action_dim": 3, "action_head_hidden_size": 16, "gradient_checkpointing": True,
                "vision_encoder": {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8},
                "language_model": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 256, "n_positions": 160},
            },
        },
    )  # fmt: skip
    assert ppo_vla.main(["--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "feature reuse: vision_encoder runs once" in out
    assert "feature reuse: not of hidden: it reads vision_tokens, which changes" in out
    row = [row for row in read_metrics(run_folder(tmp_path)) if "train/approx_kl" in row][-1]
    assert row["train/grad_norm/projector"] > 0 and "train/grad_norm/language_model" not in row


@pytest.fixture
def started(tmp_path) -> Path:
    """A run of three iterations."""
    assert ppo_vla.main(["--config", str(write_config(tmp_path, algorithm__cfg__anneal_lr=True))]) == 0
    return run_folder(tmp_path)


def test_a_run_is_resumed_from_its_own_configuration(started, capsys):
    """Nothing but the folder is named; flags win and are told; a changed learning rate takes effect."""
    flags = ["--trainer.iterations=6", "--algorithm.cfg.learning_rate=2e-4", "--trainer.progress_bar=false"]
    capsys.readouterr()
    assert ppo_vla.main([f"--trainer.resume={started}", *flags]) == 0
    out = capsys.readouterr().out
    assert "resumed with trainer.iterations = 6 (was 3)" in out
    assert "resumed with algorithm.cfg.learning_rate = 0.0002 (was 0.001)" in out
    assert "learning rates now fall to 0 at iteration 6" in out and "trainer.env" not in out
    rows = [row for row in read_metrics(started) if "train/approx_kl" in row]
    assert [row["global_step"] for row in rows] == [64 * i for i in range(1, 7)]
    rates = [row["train/learning_rate/fusion"] for row in rows]
    assert rates[:3] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert rates[3:] == pytest.approx([2e-4 * (1 - i / 6) for i in (3, 4, 5)])  # as if asked for from the start
    assert json.loads((started / "config.json").read_text())["trainer"]["iterations"] == 6


def test_the_newest_run_of_a_name_is_resumed_automatically(tmp_path, capsys):
    config = str(write_config(tmp_path, trainer__iterations=2))
    assert ppo_vla.main(["--config", config, "--trainer.resume=auto"]) == 0  # there is none: it begins
    first = run_folder(tmp_path)
    assert ppo_vla.main(["--config", config, "--trainer.resume=auto", "--trainer.iterations=3"]) == 0
    assert run_folder(tmp_path) == first
    assert [r["global_step"] for r in read_metrics(first) if "train/approx_kl" in r] == [64, 128, 192]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--trainer.seed=2", "trainer.seed: the run to resume has 1, not 2"),
        ("--trainer.env_config.task=push", "trainer.env_config: the run to resume has"),
        ("--trainer.buffer_size=128", "trainer.buffer_size: the run to resume has 64, not 128"),
        ("--policy.freeze=vision", "policy.freeze: the run to resume has 'none', not 'vision'"),
        ("--policy.vla_config.model_config.hidden_size=32", "policy.vla_config.model_config: the run to resume has"),
        ("--trainer.iterations=1", "trainer.iterations: is 1, but the run to resume has done 3 already"),
    ],
)
def test_what_a_run_keeps_for_life_is_refused_by_name_and_nothing_is_written(started, capsys, flag, message):
    before = {path: path.read_bytes() for path in started.rglob("*") if path.is_file()}
    assert ppo_vla.main([f"--trainer.resume={started}", flag]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert {path: path.read_bytes() for path in started.rglob("*") if path.is_file()} == before


def test_a_checkpoint_outside_of_a_run_is_not_resumed(started, tmp_path, capsys):
    """What lies two folders above it is none of a run's business."""
    other = tmp_path / "elsewhere" / "copies"
    other.mkdir(parents=True)
    (tmp_path / "elsewhere" / "config.json").write_text("mine")
    last = RunFolder(started).last_checkpoint
    shutil.copytree(last, other / "copy")
    (other / "link").symlink_to(last)
    shutil.copy(last / "state.pt", other / "last.pt")
    for name in ("copy", "link", "last.pt"):
        assert ppo_vla.main([f"--trainer.resume={other / name}"]) == 2
        assert "neither a run folder nor a checkpoint in one" in capsys.readouterr().err
    assert (tmp_path / "elsewhere" / "config.json").read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["config.json", "copies"]


def test_best_is_the_best_of_all_evaluations(tmp_path, monkeypatch):
    """The first and the last among them; without any in between there is still a best."""
    scores, evaluate = iter([0.3, 0.1, 0.2, 0.9]), training_run.evaluate

    def scored(*arguments, **options):
        result = evaluate(*arguments, **options)
        result.given = next(scores)
        return result

    monkeypatch.setattr(training_run, "evaluate", scored)
    monkeypatch.setattr(Evaluation, "score", property(lambda self: self.given))
    config = write_config(tmp_path, trainer__eval_freq=64, trainer__iterations=3)
    saved = []
    save = training_run.TrainingRun.save

    def note(self, best=False):
        save(self, best)
        if best:
            saved.append(self.progress.env_steps)

    monkeypatch.setattr(training_run.TrainingRun, "save", note)
    assert ppo_vla.main(["--config", str(config)]) == 0
    assert saved == [0, 192]  # 0.3 before training, then 0.9 at the end
    best = load_checkpoint(RunFolder(run_folder(tmp_path)).best_checkpoint)
    assert best["progress"]["global_step"] == 192 and best["progress"]["best"] == 0.9


def test_a_run_folder_of_an_earlier_layout_resumes(tmp_path):
    """Its checkpoint held progress and episodes' statistics at the top."""
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    assert ppo_vla.main(["--config", str(write_config(tmp_path / "whole", trainer__iterations=4))]) == 0
    assert ppo_vla.main(["--config", str(write_config(tmp_path / "halves", trainer__iterations=2))]) == 0
    run = run_folder(tmp_path / "halves")
    state = load_checkpoint(run)
    state |= {"statistics": state["rollouts"].pop("episodes"), **state.pop("progress")}
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    torch.save(state, run / "checkpoints" / "last.pt")
    config = json.loads((run / "config.json").read_text())
    config["policy"]["value_head"] = "value_head"  # was the default
    (run / "config.json").write_text(json.dumps(config))
    argv = ["--config", str(run / "config.json"), f"--trainer.resume={run}", "--trainer.iterations=4"]
    assert ppo_vla.main(argv) == 0
    both = (run_folder(tmp_path / "whole"), run)
    rows = [[row for row in rows_without_times(r) if "train/approx_kl" in row] for r in both]
    assert rows[0] == rows[1] and len(rows[0]) == 4


class Critic(nn.Module):
    """Three methods and nothing else; no part has a name that anything here knows."""

    def __init__(self):
        super().__init__()
        self.eyes = nn.Sequential(nn.Flatten(), nn.Linear(64 * 64 * 3, 8), nn.Tanh())
        self.hand, self.critic = nn.Linear(8, 3), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def see(self, observations):
        return self.eyes(observations["rgb"].float() / 255)

    def policy(self, observations):
        return Independent(Normal(self.hand(self.see(observations)), torch.ones(3)), 1)

    def forward(self, observations):
        return self.policy(observations).sample()

    def get_value(self, observations):
        return self.critic(self.see(observations))

    def evaluate_actions(self, observations, actions):
        policy = self.policy(observations)
        return policy.log_prob(actions), policy.entropy()


def test_three_methods_are_enough_whatever_the_parts_are_called(tmp_path):
    """With the critic's gradient in its head, and the value head trained alone at first."""
    config = write_config(
        tmp_path,
        policy__vla_config={"model_class": "test_ppo_vla.Critic"},
        algorithm__cfg__value_warmup_iterations=1,
        trainer__iterations=1,
    )
    assert ppo_vla.main(["--config", str(config)]) == 0
    run = run_folder(tmp_path)
    torch.manual_seed(1)
    trained = load_checkpoint(run)["model_state_dict"]
    start = load_checkpoint(RunFolder(run).best_checkpoint)["model_state_dict"]
    moved = {name.split(".")[0] for name in trained if not torch.equal(trained[name], start[name])}
    assert moved == {"critic"}
    argv = ["--config", str(run / "config.json"), f"--trainer.resume={run}", "--trainer.iterations=2"]
    assert ppo_vla.main(argv) == 0
    later = load_checkpoint(run)["model_state_dict"]
    assert {n.split(".")[0] for n in later if not torch.equal(later[n], trained[n])} == {"eyes", "hand", "critic"}


class Hand(Critic):
    """Says which of its parts are heads."""

    heads = ("hand", "critic")


def test_the_heads_that_a_model_declares_are_what_backbone_leaves(tmp_path, capsys):
    config = write_config(
        tmp_path, policy__vla_config={"model_class": "test_ppo_vla.Critic"}, policy__freeze="backbone"
    )
    assert ppo_vla.main(["--config", str(config)]) == 2  # its critic is a head, and is found; its hand is not
    assert "log_prob depends on no trainable parameter" in capsys.readouterr().err
    assert ppo_vla.main(["--config", str(config), "--policy.vla_config.model_class=test_ppo_vla.Hand"]) == 0
    summary = json.loads((run_folder(tmp_path) / "summary.json").read_text())
    assert summary["audit/frozen_tensors"] == 2  # the eyes


def test_what_follows_from_the_environment_need_not_be_said(tmp_path, monkeypatch):
    """Neither of the policy nor of the model; and an environment lies in the working directory, as a model may."""
    (tmp_path / "my_env.py").write_text((ROOT / "tests" / "user_package" / "reach_env.py").read_text())
    monkeypatch.chdir(tmp_path)
    config = write_config(
        tmp_path,
        trainer__env="gym:my_env:ReachEnv",
        trainer__env_config={"keys": {"proprio": "state"}, "max_episode_steps": 6},
        policy__action_dim=None,
        policy__vla_config={
            "model_class": "agents.small_vla.SmallVLA",
            "model_config": {"hidden_size": 16},
        },
    )
    assert ppo_vla.main(["--config", str(config)]) == 0
    trained = load_checkpoint(run_folder(tmp_path))["model_state_dict"]
    assert trained["fusion.layers.0.weight"].shape == (256, 6) and trained["action_head.raw_std"].shape == (2,)


class Half(SmallVLA):
    """Its action head is as a large checkpoint is loaded: in bfloat16."""

    def __init__(self, **config):
        super().__init__(**config)
        self.action_head.mean.to(torch.bfloat16)

    def action_distribution(self, hidden):
        return super().action_distribution(hidden.to(torch.bfloat16))


def test_weights_in_half_precision_are_not_trained(tmp_path, capsys):
    config = write_config(tmp_path, policy__vla_config__model_class="test_ppo_vla.Half")
    assert ppo_vla.main(["--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert "trains action_head in half precision" in error and "trainer.autocast=bf16" in error
    flags = ["--policy.freeze=[action_head.mean]", "--trainer.iterations=1"]
    assert ppo_vla.main(["--config", str(config), *flags]) == 0


def test_the_progress_bar_shows_evaluations_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress_bar, "LINE_EVERY_S", 0.0)
    config = write_config(tmp_path, trainer__progress_bar=True)
    assert ppo_vla.main(["--config", str(config), "--trainer.use_wandb=False"]) == 0
    lines = re.findall(r"^(\w+) (\d+) %, (\S+) of (\S+) (\w+) in", capsys.readouterr().err, flags=re.MULTILINE)
    assert ("evaluating", "100", "8", "8", "episode") in lines and ("training", "100", "192", "192", "step") in lines
    assert lines[0][0] == "evaluating"  # before training


def test_an_update_that_moves_the_policy_far_is_told_once(tmp_path, caplog):
    config = write_config(tmp_path, trainer__use_wandb=False, trainer__enable_eval=False)
    assert ppo_vla.main(["--config", str(config), "--algorithm.cfg.learning_rate=0.1"]) == 0
    rows = [row["train/approx_kl"] for row in read_metrics(run_folder(tmp_path)) if "train/approx_kl" in row]
    assert sum(kl > 1 for kl in rows) > 1
    assert [r.message.count("moved the policy by a KL of") for r in caplog.records].count(1) == 1


@pytest.mark.parametrize(("limit", "said"), [(6, 1), (1000, 0)])
def test_episodes_that_never_end_are_told_once(tmp_path, caplog, limit, said):
    """24 control steps of each environment, which cuts no episode off."""
    config = write_config(tmp_path, trainer__use_wandb=False, trainer__enable_eval=False)
    flags = ["--trainer.env_config.max_steps=100000", f"--trainer.max_eval_steps={limit}"]
    assert ppo_vla.main(["--config", str(config), *flags]) == 0
    assert not any("rollout/episodes" in row for row in read_metrics(run_folder(tmp_path)))
    assert [r.message.count("no episode has ended in the last ") for r in caplog.records].count(1) == said
