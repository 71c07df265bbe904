"""Small worlds that tests share: models and their wrappers, configurations of short runs, and what runs leave."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from agents.action_heads import GaussianHead
from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from agents.vla import StagedVLA
from envs.tabletop import TabletopEnv
from research.config import PPOConfig
from research.runs.tracking import read_metrics
from research.training.ppo import make_gae, make_loss
from research.training.rollout import Rollouts

ROOT = Path(__file__).parent.parent
TIMES = ("time/",)


def write_config(folder: Path, **changes) -> Path:
    """A small run: reach from proprioception and a tiny network."""
    config = {
        "trainer": {
            "exp_name": "t", "env": "tabletop", "env_config": {"task": "reach", "modalities": ["rgb", "proprio"]},
            "num_envs": 8, "buffer_size": 64, "iterations": 3, "num_eval_envs": 8, "num_eval_episodes": 8,
            "eval_freq": 0, "save_freq": 64, "run_dir": str(folder / "runs"), "progress_bar": False,
        },
        "policy": {
            "action_dim": 3,
            "vla_config": {
                "model_class": "agents.small_vla.SmallVLA",
                "model_config": {"action_dim": 3, "modalities": ["rgb", "proprio"], "hidden_size": 16},
            },
        },
        "algorithm": {"name": "ppo", "cfg": {"learning_rate": 1e-3, "batch_size": 32, "n_epochs": 2}},
    }  # fmt: skip
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def run_folder(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def rows_without_times(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in read_metrics(run)]


class DepthReacher(StagedVLA):
    """Sees where the block is by its height alone (no weights), so that what is learned from scratch is the policy."""

    def __init__(self):
        super().__init__()
        self.fusion = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.action_head = GaussianHead(64, 3, width=64)
        self.value_head = nn.Linear(64, 1)

    def stages(self):
        keys = [("observation", "depth"), ("observation", "proprio")]
        return [TensorDictModule(self.look, in_keys=keys, out_keys=["hidden"])]

    def look(self, depth, proprio):
        block = ((depth - 0.75).abs() < 0.005).float()  # [B, S, S]
        line = torch.linspace(-0.25, 0.25, depth.shape[-1])
        area = block.sum((1, 2)).clamp(min=1)
        place = torch.stack([(block.sum(1) @ line) / area, -(block.sum(2) @ line) / area], dim=-1)
        return self.fusion(torch.cat([(place - proprio[:, :2]) * 10, proprio * 4], dim=-1))

    def action_distribution(self, hidden):
        return self.action_head(hidden)

    def value(self, hidden):
        return self.value_head(hidden)


class Leaking(SmallVLA):
    """A frozen part that changes all the same: its forward pass writes to one of its weights."""

    def action_distribution(self, hidden):
        with torch.no_grad():
            self.language_encoder.near.bias[3] += 1e-7
        return super().action_distribution(hidden)


LOSS_KEYS = ("action", "action_log_prob", "state_value", "advantage", "value_target")


def small_model(head: str = "gaussian", options: dict | None = None, seed: int = 0) -> SmallVLA:
    torch.manual_seed(seed)
    return SmallVLA(3, token_size=8, hidden_size=32, action_head=head, head=options or {}).eval()


class Fused(nn.Module):
    """The same weights, offered through `act` and `evaluate` and the three methods, without stages."""

    def __init__(self, model: SmallVLA):
        super().__init__()
        self.model = model
        self.value_head = model.value_head
        self.forward, self.get_value = model.forward, model.get_value
        self.evaluate_actions, self.act, self.evaluate = model.evaluate_actions, model.act, model.evaluate


class ThreeMethods(nn.Module):
    """The same weights behind the three methods alone."""

    def __init__(self, model: SmallVLA):
        super().__init__()
        self.model = model
        self.value_head = model.value_head

    def forward(self, observations):
        return self.model(observations)

    def get_value(self, observations):
        return self.model.get_value(observations)

    def evaluate_actions(self, observations, actions):
        return self.model.evaluate_actions(observations, actions)


WRAP = {"staged": lambda m: m, "fused": Fused, "methods": ThreeMethods}


def rollout_batch(policy: VLAPolicy, num_envs: int = 4, steps: int = 8) -> TensorDict:
    torch.manual_seed(1)
    env = TabletopEnv(num_envs, max_steps=5, modalities=["rgb", "proprio", "language"])
    rollouts = Rollouts(env, policy, num_envs * steps, make_gae(PPOConfig()))
    return rollouts.prepare(rollouts.next())[0]


def total_loss(policy: VLAPolicy, batch: TensorDict, **cfg) -> TensorDict:
    return make_loss(policy.actor, policy.critic, PPOConfig(**cfg))(batch)


def count_calls(module: nn.Module) -> list:
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def gradients_of(policy: VLAPolicy, batch: TensorDict) -> list[torch.Tensor]:
    policy.model.zero_grad()
    losses = total_loss(policy, batch)
    (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
    return [losses["loss_objective"].detach(), *(p.grad.clone() for p in policy.model.parameters() if p.requires_grad)]
