"""Imitation: what it writes can be loaded, evaluated and fine-tuned, and it stops when it succeeds often enough."""

from __future__ import annotations

import json

import bc_vla
import pytest
import torch

from agents.loading import load_vla_model
from research.schema import UserError

pytestmark = pytest.mark.slow

TINY = [
    "--pointing_steps=3", "--samples=300", "--batch_size=32", "--num_envs=8", "--eval_episodes=4",
    '--env_config={"task": "reach", "image_size": 16, "max_steps": 8, "modalities": ["rgb", "proprio", "language"]}',
]  # fmt: skip


def imitate(folder, *flags: str) -> dict:
    assert bc_vla.main([*TINY, f"--output={folder / 'bc.pt'}", *flags]) == 0
    return json.loads((folder / "bc.json").read_text())


def test_the_checkpoint_loads_and_says_how_it_was_made(tmp_path):
    facts = imitate(tmp_path, "--epochs=1", "--seed=3")
    assert facts["config"]["seed"] == 3 and facts["config"]["output"] == "bc.pt"
    assert 0 <= facts["eval/success_low"] <= facts["eval/success_rate"] <= facts["eval/success_high"] <= 1
    model = load_vla_model(str(tmp_path / "bc.pt"), "agents.small_vla.SmallVLA", {"action_dim": 3}, "cpu")
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]
    assert (model.fusion.proprio_std != 1).all()  # taken from the data


def test_imitation_brings_actions_and_values_closer_to_the_experts(tmp_path):
    errors = []
    for epochs in (1, 12):
        imitate(tmp_path, f"--epochs={epochs}", "--stop_at=1")
        model = load_vla_model(str(tmp_path / "bc.pt"), "agents.small_vla.SmallVLA", {"action_dim": 3}, "cpu")
        config = bc_vla.parse_config(bc_vla.BCConfig, TINY)
        torch.manual_seed(0)
        data = bc_vla.collect_demonstrations(config)
        with torch.no_grad():
            action = (model(data["observation"], deterministic=True) - data["action"]).square().mean().item()
            value = (model.get_value(data["observation"]) - data["return"]).square().mean().item()
        errors.append((action, value))
    assert errors[1][0] < 0.8 * errors[0][0] and errors[1][1] < errors[0][1]


def test_imitation_stops_at_the_success_asked_for(tmp_path, monkeypatch):
    watched = []
    evaluate = bc_vla.evaluate
    monkeypatch.setattr(bc_vla, "WATCH_EVERY", 2)
    monkeypatch.setattr(bc_vla, "WATCHED_STATES", range(5000, 5004))
    monkeypatch.setattr(bc_vla, "evaluate", lambda *a, **k: watched.append(a[2]) or evaluate(*a, **k))
    imitate(tmp_path, "--epochs=3", "--stop_at=0")  # any success is enough
    assert watched == [range(5000, 5004), range(4)]
    watched.clear()
    imitate(tmp_path, "--epochs=1", "--stop_at=0.99")
    assert len(watched) > 2


def test_returns_are_discounted_to_the_episodes_end():
    rewards = torch.tensor([1.0, 0.0, 2.0, 4.0]).view(4, 1, 1)
    dones = torch.tensor([False, False, True, False]).view(4, 1, 1)
    assert bc_vla.discounted_returns(rewards, dones, 0.5).flatten().tolist() == [1.5, 1.0, 2.0, 4.0]


def test_an_environment_without_an_expert_is_refused(tmp_path):
    with pytest.raises(UserError, match="no scripted expert"):
        bc_vla.main([*TINY[:-1], "--env=gym:Pendulum-v1", f"--output={tmp_path / 'bc.pt'}", "--env_config={}"])
