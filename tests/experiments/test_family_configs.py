"""The tiny configuration of every family of models trains, goes on from its checkpoint, and is evaluated."""

from __future__ import annotations

import json

import bc_vla
import evaluate_vla
import ppo_vla
import pytest
import torch
from assembling import start_of
from worlds import ROOT, run_folder

from envs import make_env
from research.config import ExperimentConfig, PolicyConfig, TrainerConfig, VLAConfig
from research.imitation.config import BCConfig
from research.options import flatten_dict
from research.runs.tracking import read_metrics

SIZES = {"image_size", "chunk", "num_envs", "buffer_size", "iterations", "num_eval_envs", "num_eval_episodes"}
SIZES_OF_PI0 = json.loads((ROOT / "experiments" / "configs" / "pi0_tiny.json").read_text())
SIZES_OF_PI0 = SIZES_OF_PI0["policy"]["vla_config"]["model_config"]["config"]
PATHS = {"pretrained", "statistics", "tokenizer"}
TINY = sorted((ROOT / "experiments" / "configs").glob("*_tiny.json"))
REACH = sorted((ROOT / "experiments" / "configs").glob("*_reach.json"))


def start(path, tmp_path, *flags: str) -> int:
    quiet = ["--trainer.use_wandb=false", "--trainer.progress_bar=false", f"--trainer.run_dir={tmp_path / 'runs'}"]
    return ppo_vla.main(["--config", str(path), *quiet, *flags])


def test_there_are_some():
    assert [path.stem for path in TINY] == ["openvla_oft_tiny", "openvla_tiny", "pi0_tiny", "smolvla_tiny"]


@pytest.mark.parametrize("path", TINY, ids=[path.stem for path in TINY])
def test_the_full_size_differs_in_sizes_and_paths_alone(path):
    full = path.with_name(path.name.replace("_tiny", ""))
    small, large = (flatten_dict(json.loads(p.read_text())) for p in (path, full))
    differing = {key for key in {*small, *large} if small.get(key) != large.get(key)}
    assert {"trainer.exp_name", "trainer.env_config.image_size"} <= differing
    for key in differing - {"trainer.exp_name", "algorithm.cfg.batch_size", "algorithm.cfg.micro_batch_size"}:
        of_model = key.startswith("policy.vla_config.model_config.") and key.split(".")[3] in ("config", "vlm")
        assert key.rpartition(".")[2] in SIZES | PATHS or of_model, key
        assert not (of_model and {type(small.get(key)), type(large.get(key))} & {str, bool}), key


@pytest.mark.slow
@pytest.mark.parametrize("path", TINY, ids=[path.stem for path in TINY])
def test_it_trains_goes_on_and_is_evaluated(path, tmp_path):
    assert start(path, tmp_path) == 0
    run = run_folder(tmp_path)
    rows = [row for row in read_metrics(run) if "train/epochs" in row]
    assert len(rows) == 2 and rows[1]["train/approx_kl"] > 0 and rows[1]["train/grad_norm"] > 0
    assert ppo_vla.main([f"--trainer.resume={run}", "--trainer.iterations=3", "--trainer.progress_bar=false"]) == 0
    assert len([row for row in read_metrics(run) if "train/epochs" in row]) == 3
    flags = ["--film=0", "--trainer.num_eval_episodes=8", f"--output={tmp_path / 'evaluation'}"]
    assert evaluate_vla.main([f"--checkpoint={run}", *flags]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", REACH, ids=[path.stem for path in REACH])
def test_a_clone_that_ships_starts_as_its_facts_say(path, tmp_path, monkeypatch):
    """From any folder: its files lie beside the scripts. The first 32 of the 256 episodes, to an episode or two."""
    monkeypatch.chdir(tmp_path)
    flags = ["--film=0", "--trainer.num_eval_envs=32", "--trainer.num_eval_episodes=32", "--trainer.progress_bar=false"]
    assert evaluate_vla.main([f"--config={path}", *flags, f"--output={tmp_path / 'out'}"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    facts = json.loads((ROOT / "experiments" / "checkpoints" / path.name).read_text())
    assert 0.3 <= facts["eval/success_rate"] <= 0.6 and facts["config"]["eval_episodes"] == 256
    assert abs(summary["eval/success_rate"] - facts["eval/success_rate"]) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--algorithm.cfg.ent_coef=0.01", "ent_coef is 0.01, but the entropy of Pi0VLA does not depend on its weights"),
        ("--policy.action_chunk.horizon=8", "takes no horizon and plans 4 control steps"),
    ],
)
def test_pi0_refuses_what_it_cannot_do(flag, message, tmp_path, capsys):
    assert start(ROOT / "experiments" / "configs" / "pi0_tiny.json", tmp_path, flag) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("make", ["run", "imitation"])
def test_statistics_of_a_robot_are_not_scaled_again_by_its_environment(tmp_path, make):
    """InvertedPendulum takes forces of [-3, 3] newtons, which are -1 and 1 for a policy; the data have newtons."""
    (tmp_path / "stats.json").write_text(json.dumps({"action": {"mean": [0.0], "std": [1.5]}}))
    env, options = "gym:InvertedPendulum-v5", {"render": [32, 32], "instruction": "balance"}
    arguments = {"modalities": ["rgb", "language"], "config": SIZES_OF_PI0, "statistics": str(tmp_path)}
    if make == "run":
        vla = VLAConfig(model_class="agents.pi0.Pi0VLA", model_config=arguments)
        trainer = TrainerConfig(env=env, env_config=options, num_envs=2, buffer_size=512, enable_eval=False)
        model = start_of(ExperimentConfig(trainer, PolicyConfig(vla_config=vla)), torch.device("cpu")).built.model
    else:
        config = BCConfig(env=env, env_config=options, model_class="agents.pi0.Pi0VLA", model_config=arguments)
        world = make_env(env, 2, options, "cpu")
        seen = world.observation_spec["observation"].zero()
        model = bc_vla.build_model(config, seen, 1, action_map=world.action_map)
    assert model.actions.unnormalise(torch.ones(1)).tolist() == pytest.approx([0.5])  # which the world gets as 1.5 N
    assert model.actions.normalise(torch.tensor([0.5])).tolist() == pytest.approx([1.0])
