"""experiments/grpo_vla.py: a run from end to end, resumed bit for bit, and refused."""

from __future__ import annotations

import json

import evaluate_vla
import grpo_vla
import ppo_vla
import pytest
import torch
from accounting import needs_of_run, offered_by
from configuration import read_experiment
from worlds import rows_without_times, run_folder, write_config

from research.config import ExperimentConfig
from research.runs.checkpoint import load_checkpoint
from research.runs.folder import RunFolder

pytestmark = pytest.mark.slow


def grpo_config(folder, **changes):
    """Four groups of four, on a task that a fresh policy fails and wins by chance."""
    cfg = {"learning_rate": 1e-3, "groups": 4, "group_size": 4, "batch_size": 64, "n_epochs": 2, "kl_coef": 0.01}
    path = write_config(
        folder, trainer__env_config={"task": "reach", "modalities": ["rgb", "proprio"], "max_steps": 12},
        trainer__iterations=4, trainer__eval_freq=400, **changes,
    )  # fmt: skip
    config = json.loads(path.read_text())
    config["algorithm"] = {"name": "grpo", "cfg": cfg}
    path.write_text(json.dumps(config))
    return path


def test_a_run_is_tracked_evaluated_and_goes_on_bit_for_bit(tmp_path, capsys):
    assert grpo_vla.main(["--config", str(grpo_config(tmp_path))]) == 0
    run = run_folder(tmp_path)
    rows = rows_without_times(run)
    trained = [row for row in rows if "train/approx_kl" in row]
    assert len(trained) == 4
    for row in trained:
        assert row["rollout/episodes"] >= 16 and 1 <= row["train/groups"] <= 4
        assert row["rollout/episodes"] == 4 * (row["rollout/groups_left_out"] + 4) or row["train/groups"] < 4
        assert row["train/kl_reference"] >= 0 and "train/loss_critic" not in row
    assert abs(trained[0]["train/approx_kl"]) < 0.1
    steps = [row["global_step"] for row in trained]
    means = [row["rollout/episode_length"] * row["rollout/episodes"] for row in trained]
    assert steps == pytest.approx([sum(means[: k + 1]) for k in range(4)])
    middle = sorted(RunFolder(run).checkpoints.glob("step_*"))[0]
    assert int(middle.name.removeprefix("step_")) == steps[2]
    assert grpo_vla.main([f"--trainer.resume={middle}"]) == 0, capsys.readouterr().err
    assert rows_without_times(run) == rows
    assert evaluate_vla.main([f"--checkpoint={run}", f"--output={tmp_path / 'out'}"]) == 0


def test_the_reference_of_a_resumed_run_is_its_start_whatever_the_file_holds_now(tmp_path, capsys):
    assert grpo_vla.main(["--config", str(grpo_config(tmp_path, trainer__enable_eval=False))]) == 0
    run = run_folder(tmp_path)
    rows = rows_without_times(run)
    middle, *_, last = sorted(RunFolder(run).checkpoints.glob("step_*"))
    other = tmp_path / "other.pt"
    torch.save({"model_state_dict": load_checkpoint(last)["model_state_dict"]}, other)
    words = [f"--trainer.resume={middle}", f"--policy.vla_config.model_path={other}"]
    assert grpo_vla.main(words) == 0, capsys.readouterr().err
    assert rows_without_times(run) == rows


def test_more_rows_than_a_rollout_of_ppo_divides_are_no_matter(tmp_path):
    assert grpo_vla.main(["--config", str(grpo_config(tmp_path)), "--trainer.num_envs=12", "--dry_run"]) == 0


def test_a_run_is_told_and_not_begun(tmp_path, capsys):
    """At most four groups of four episodes of 12 steps; the KL penalty's reference is a copy of what trains."""
    memory = {}
    path = str(grpo_config(tmp_path))
    for flag in ("--algorithm.cfg.kl_coef=0", "--algorithm.cfg.kl_coef=0.01"):
        assert grpo_vla.main(["--config", path, flag, "--dry_run"]) == 0
        printed = capsys.readouterr().out
        assert "rollout (192 transitions at most)" in printed and "of 64 at once" in printed and "6 of them" in printed
        config = read_experiment(ExperimentConfig, ["--config", path, flag], "")
        offered = offered_by(config.trainer.env, config.trainer.env_config, torch.device("cpu"), 1)
        memory[flag] = needs_of_run(config, offered, torch.device("cpu"))
    without, penalised = memory.values()
    trained = sum(part.trained for part in without.parts)
    assert penalised.memory["weights"] - without.memory["weights"] == 4 * trained > 0
    assert not list(tmp_path.glob("runs/*"))


def test_each_script_refuses_the_others_algorithm(tmp_path, capsys):
    config = grpo_config(tmp_path)
    assert ppo_vla.main(["--config", str(config)]) == 2
    assert "algorithm.name: this script trains by ppo; grpo is grpo_vla.py" in capsys.readouterr().err
    assert grpo_vla.main(["--config", str(write_config(tmp_path))]) == 2
    assert "algorithm.name: this script trains by grpo; ppo is ppo_vla.py" in capsys.readouterr().err
    for flag, said in (
        ("--algorithm.cfg.group_size=1", "algorithm.cfg.group_size: 1 episode has nothing to be compared with"),
        ("--algorithm.cfg.gamma=0.9", "algorithm.cfg.gamma"),
        ("--trainer.buffer_type=vla", "trainer.buffer_type: grpo collects whole episodes"),
    ):
        assert grpo_vla.main(["--config", str(grpo_config(tmp_path)), flag]) == 2
        assert said in capsys.readouterr().err
