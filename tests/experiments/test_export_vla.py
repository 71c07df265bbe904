"""What a run learned: in a file that the model's own class loads, in its family's folder, and served."""

from __future__ import annotations

import json
from pathlib import Path

import export_vla
import numpy as np
import ppo_vla
import pytest
import torch
from trained_policy import load_policy, load_trained_model
from user_package.reach_env import ReachEnv
from worlds import ROOT, all_weights, run_folder, write_config

from agents.hub import SharedPolicy
from agents.loading import load_vla_model
from agents.openvla import OpenVLA
from agents.policy import VLAPolicy
from agents.residual import add_residual, policy_at
from agents.serving import serve
from envs.tabletop import TabletopEnv
from research.training.rollout import Rollouts

pytestmark = pytest.mark.slow

MODEL = {"action_dim": 3, "modalities": ["rgb", "proprio"], "hidden_size": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with low-rank adapters."""
    folder = tmp_path_factory.mktemp("export")
    config = write_config(folder, policy__freeze="lora", trainer__iterations=2, algorithm__cfg__learning_rate=0.01)
    assert ppo_vla.main(["--config", str(config)]) == 0
    return run_folder(folder)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_exported_weights_are_the_trained_policy_under_the_classs_own_names(run, tmp_path, capsys, suffix):
    output = tmp_path / "new" / f"weights{suffix}"
    assert export_vla.main([f"--checkpoint={run}", f"--output={output}"]) == 0
    assert str(output) in capsys.readouterr().out
    model = load_vla_model(output, "agents.small_vla.SmallVLA", MODEL).eval()  # strict: all names fit
    observations = TabletopEnv(8, "reach", modalities=["rgb", "proprio"]).reset()["observation"]
    trained = all_weights(run)
    layer = "fusion.layers.0"
    base, a, b = (
        trained[f"{layer}.{n}"] for n in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    )
    assert b.abs().max() > 0
    torch.testing.assert_close(model.get_submodule(layer).weight, base + 16 / 8 * b @ a)
    assert model(observations, deterministic=True).shape == (8, 3)


def test_a_folder_of_the_hub_acts_as_the_run_does(run, tmp_path):
    assert export_vla.main([f"--checkpoint={run}", f"--output={tmp_path / 'shared'}"]) == 0
    act, shared = load_policy(str(run), device="cpu"), SharedPolicy.from_pretrained(tmp_path / "shared")
    shared.save_pretrained(tmp_path / "again")
    again = SharedPolicy.from_pretrained(tmp_path / "again")
    observations = TabletopEnv(4, "reach", modalities=["rgb", "proprio"]).reset()["observation"]
    for row in range(4):
        seen = {key: observations[key][row].numpy() for key in ("rgb", "proprio")}
        assert np.abs(act(seen) - shared.act(seen)).max() < 1e-6  # the adapters are merged: another order of sums
        assert np.array_equal(shared.act(seen), again.act(seen))


def test_a_residual_is_exported_by_its_name_and_served_from_its_run(tmp_path):
    config = write_config(
        tmp_path, policy__freeze="residual", trainer__iterations=2, algorithm__cfg__learning_rate=0.01
    )
    assert ppo_vla.main(["--config", str(config)]) == 0
    run, output = run_folder(tmp_path), tmp_path / "weights.pt"
    assert export_vla.main([f"--checkpoint={run}", f"--output={output}"]) == 0
    weights = torch.load(output, weights_only=True)["model_state_dict"]
    observations = TabletopEnv(8, "reach", modalities=["rgb", "proprio"]).reset()["observation"]
    model = load_vla_model(None, "agents.small_vla.SmallVLA", MODEL, expect_fresh=True).eval()
    add_residual(model, *policy_at(model, observations), units=512)
    model.load_state_dict(weights)
    assert model.residual.network[2].weight.abs().max() > 0
    action, act = model(observations, deterministic=True), load_policy(str(run), device="cpu")
    seen = {key: observations[key][0].numpy() for key in ("rgb", "proprio")}
    np.testing.assert_allclose(act(seen), action[0].clamp(-1, 1).detach().numpy(), atol=1e-6)


@pytest.fixture(scope="module")
def openvla_run(tmp_path_factory) -> tuple[Path, Path]:
    """A run with low-rank adapters that started from a folder; and that folder."""
    folder = tmp_path_factory.mktemp("openvla")
    tiny = json.loads((ROOT / "experiments" / "configs" / "openvla_tiny.json").read_text())
    numbers = {"action": {"q01": [-1.0, -1.0, -2.0], "q99": [1.0, 1.0, 2.0]}}
    (folder / "stats.json").write_text(json.dumps(numbers))
    vla = tiny["policy"]["vla_config"]
    torch.manual_seed(0)
    OpenVLA(3, **vla["model_config"], statistics=str(folder / "stats.json")).export(folder / "pretrained")
    vla["model_config"] = {"pretrained": str(folder / "pretrained")}
    tiny["trainer"] |= {"num_envs": 4, "buffer_size": 16, "iterations": 1, "enable_eval": False, "use_wandb": False}
    tiny["trainer"] |= {"run_dir": str(folder / "runs"), "progress_bar": False}
    tiny["algorithm"]["cfg"] |= {"batch_size": 8, "learning_rate": 0.01}
    (folder / "config.json").write_text(json.dumps(tiny))
    assert ppo_vla.main(["--config", str(folder / "config.json")]) == 0
    return run_folder(folder), folder / "pretrained"


def test_a_familys_folder_holds_what_was_trained_and_not_what_it_started_from(openvla_run, tmp_path):
    run, start = openvla_run
    assert export_vla.main([f"--checkpoint={run}", f"--output={tmp_path / 'new' / 'openvla'}"]) == 0
    exported, before = (
        OpenVLA(3, ("rgb", "language"), pretrained=str(f)).eval() for f in (tmp_path / "new" / "openvla", start)
    )
    trained = load_trained_model(str(run)).model
    moved = {
        name.partition(".")[0] for name, w in before.state_dict().items() if (exported.state_dict()[name] != w).any()
    }
    assert moved == {"projector", "language_model", "value_head"}  # the adapters', and the heads
    assert exported.statistics == before.statistics
    observations = TabletopEnv(4, "reach", modalities=["rgb", "language"], image_size=32).reset()["observation"]
    assert torch.equal(exported(observations, deterministic=True), trained(observations, deterministic=True))
    torch.testing.assert_close(exported.get_value(observations), trained.get_value(observations), rtol=0, atol=1e-5)


def test_a_run_is_served_with_the_actions_of_its_rollouts(run):
    act, (model, config, *_) = load_policy(str(run), device="cpu"), load_trained_model(str(run))
    rollouts = Rollouts(TabletopEnv(1, **config.trainer.env_config), VLAPolicy(model), 4)
    torch.manual_seed(3)
    batch = rollouts.next()
    rows = batch.reshape(-1)
    torch.manual_seed(3)
    for row in range(len(rows)):
        observation = {key: rows["observation", key][row].numpy() for key in ("rgb", "proprio")}
        clipped = rows["action"][row].clamp(-1, 1).numpy()  # as the table does
        np.testing.assert_array_equal(act(observation, deterministic=False), clipped)
    assert np.array_equal(act(observation), act(observation))


def test_a_run_is_served_in_the_units_of_its_robot_with_all_cameras_that_it_trained_with(tmp_path):
    """Nothing is said of modalities: the model reads every camera. Actions are chunks, and nothing can be filmed."""
    keys = {"rgb": "images.front", "rgb_back": "images.front", "proprio": "state"}
    config = write_config(
        tmp_path,
        trainer__env="gym:user_package.reach_env:ReachEnv",
        trainer__env_config={"keys": keys, "chunk": 2, "max_episode_steps": 6},
        trainer__iterations=1,
        policy__action_dim=None,
        policy__vla_config={"model_class": "agents.small_vla.SmallVLA", "model_config": {"hidden_size": 16}},
    )
    assert ppo_vla.main(["--config", str(config)]) == 0
    run = run_folder(tmp_path)
    trained = load_trained_model(str(run))
    assert set(trained.model.observation_keys) == set(keys)
    assert export_vla.main([f"--checkpoint={run}", f"--output={tmp_path / 'shared'}"]) == 0
    space = ReachEnv().action_space
    middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
    observation = {key: np.zeros(spec.shape[1:], spec.numpy().dtype) for key, spec in trained.observations.items()}
    acts = load_policy(str(run), device="cpu"), SharedPolicy.from_pretrained(tmp_path / "shared").act
    own = serve(trained.model, trained.observations)
    for seed in range(20):
        actions = []
        for act in (own, *acts):
            torch.manual_seed(seed)
            actions.append(act(observation, deterministic=False))
        expected = np.clip(middle + half * actions[0], space.low, space.high)
        assert expected.shape == (2, 2)
        for action in actions[1:]:
            np.testing.assert_allclose(action, expected, atol=1e-6)
            assert action.dtype == np.float32 and space.contains(action[0])


@pytest.mark.parametrize(
    ("checkpoint", "output", "message"),
    [
        ("nowhere", "x.pt", "neither a run folder"),
        (None, "x.bin", "use .pt or .safetensors, or none for a folder"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(run, tmp_path, capsys, checkpoint, output, message):
    assert export_vla.main([f"--checkpoint={checkpoint or run}", f"--output={tmp_path / output}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("family", [True, False])
def test_an_export_into_a_run_folder_is_refused(openvla_run, run, family, monkeypatch, capsys):
    run = openvla_run[0] if family else run
    before = sorted((path, path.stat().st_mtime_ns) for path in Path(run).rglob("*"))
    monkeypatch.chdir(run)
    monkeypatch.setattr("trained_policy.load_trained_model", None)  # it is said before anything is read
    for output in (str(run), "."):
        assert export_vla.main([f"--checkpoint={run}", f"--output={output}"]) == 2
        assert "--output: " in (error := capsys.readouterr().err) and error.count("\n") == 1
        assert "is not empty; name a folder that is not there yet" in error
    assert sorted((path, path.stat().st_mtime_ns) for path in Path(run).rglob("*")) == before


def test_an_export_to_nowhere_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export_vla.main([f"--checkpoint={run}", "--output="]) == 2
    assert "--output: is empty; name a file" in capsys.readouterr().err and not list(tmp_path.iterdir())
