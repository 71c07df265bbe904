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
from agents.residual import add_residual, policy_at
from agents.small_vla import SmallVLA
from agents.vla import StagedVLA
from envs.tabletop import TabletopEnv
from research.config import PPOConfig
from research.runs.checkpoint import frozen_weights, load_checkpoint
from research.runs.tracking import read_metrics
from research.training.advantages import GAEAdvantages
from research.training.freezing import freeze, named_parameters_within
from research.training.loss import make_loss
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


def all_weights(run: Path) -> dict:
    """Every weight of a run that started from no file, from its newest checkpoint."""
    state = load_checkpoint(run)
    return {**(frozen_weights(state) or {}), **state["model_state_dict"]}


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


class Fused(ThreeMethods):
    """The same weights, offered through `act` and `evaluate` and the three methods, without stages."""

    def forward(self, observations, deterministic=False):
        return self.model(observations, deterministic)

    def act(self, observations, deterministic=False):
        hidden = self.model.encode(observations)
        distribution = self.model.action_distribution(hidden)
        action = distribution.deterministic_sample if deterministic else distribution.sample()
        return action, distribution.log_prob(action), self.model.value(hidden)

    def evaluate(self, observations, actions):
        hidden = self.model.encode(observations)
        distribution = self.model.action_distribution(hidden)
        return distribution.log_prob(actions), distribution.entropy(), self.model.value(hidden)


WRAP = {"staged": lambda m: m, "fused": Fused, "methods": ThreeMethods}
INTERFACES = tuple(WRAP)


def scores(model: StagedVLA, observations: TensorDict, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Log-probability, entropy and value, in one pass."""
    return model.score(model.run_stages(observations).set("action", actions))


def gae(policy: VLAPolicy, cfg: PPOConfig | None = None) -> GAEAdvantages:
    cfg = cfg or PPOConfig()
    return GAEAdvantages(policy, cfg.gamma, cfg.gae_lambda)


def value_head(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in named_parameters_within(model, ["value_head"]).values() if p.requires_grad]


def rollout_batch(policy: VLAPolicy, num_envs: int = 4, steps: int = 8) -> TensorDict:
    torch.manual_seed(1)
    env = TabletopEnv(num_envs, max_steps=5, modalities=["rgb", "proprio", "language"])
    rollouts = Rollouts(env, policy, num_envs * steps)
    return gae(policy)(rollouts.next())[0]


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


def freeze_with_residual(model: nn.Module, observations: TensorDict, units: int = 16) -> list[str]:
    """As a run with `policy.freeze: residual`; names of what is frozen."""
    torch.manual_seed(2)
    add_residual(model, *policy_at(model, observations), units)
    return freeze(model, "residual", heads=["value_head"])


def reach_policy(scope: str = "none") -> VLAPolicy:
    torch.manual_seed(0)
    model = SmallVLA(3, modalities=["rgb", "proprio"], token_size=8, hidden_size=16).eval()
    freeze(model, scope)
    return VLAPolicy(model)


def reach_env(worker: int = 0, num_envs: int = 4) -> TabletopEnv:
    return TabletopEnv(num_envs, "reach", image_size=16, max_steps=6, modalities=["rgb", "proprio"], seed=worker)
