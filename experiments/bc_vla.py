"""Imitation: pretrain a VLA on the scripted expert, and regress its value head on the returns that were seen.

First the model learns to point at what an instruction names, on many scenes without actions, as the vision-language
models inside of large VLAs have; then it imitates the expert, and stops half-way: reinforcement learning is to do the
rest. (Success jumps from a tenth to nine tenths within a few hundred steps, so it is watched, on states of its own.)

    python experiments/bc_vla.py                                  # as the checkpoint of the repository was made
    python experiments/bc_vla.py --stop_at=1 --output=my.pt       # imitates to the end: a better one

The expert acts with noise, so that the data shows how to recover; what is imitated is what it would have done without.
Writes the weights, and beside them, as JSON, the configuration, the seed and the success that was measured.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import packages  # noqa: F401

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from tensordict import TensorDict
from torch import Tensor, nn
from tqdm import tqdm

from agents.checking import check_policy
from agents.loading import load_vla_model
from agents.policy import VLAPolicy
from envs import make_env
from research.options import parse_config, to_dict
from research.runs.folder import replacing
from research.schema import ACTION, HIDDEN, OBSERVATION, NonFiniteError, SimulatorFailed, UserError
from research.training.evaluation import evaluate

WATCHED_STATES = range(5000, 5128)  # neither drawn in training (from 10000 on) nor evaluated by default (0 to 255)
WATCH_EVERY = 25  # gradient steps


@dataclass
class BCConfig:
    """Imitation of the scripted expert."""

    env: str = "tabletop"
    """Environment; it needs an expert_action method."""
    env_config: dict[str, Any] = field(
        default_factory=lambda: {"task": "pick_place", "modalities": ["rgb", "proprio", "language"]}
    )
    """Settings of the environment, free-form."""
    model_class: str = "agents.small_vla.SmallVLA"
    """Dotted path of the model's class."""
    model_config: dict[str, Any] = field(default_factory=lambda: {"action_dim": 3})
    """Keyword arguments of the model's class, free-form."""
    seed: NonNegativeInt = 0
    """Seed of the data, the weights and the order of the minibatches."""
    samples: PositiveInt = 24000
    """Transitions to imitate."""
    noise: NonNegativeFloat = 0.3
    """Standard deviation of the noise on the expert's motion while it collects."""
    gripper_noise: ClosedUnitInterval = 0.02
    """Probability that the expert's gripper does the opposite of what it should."""
    gamma: ClosedUnitInterval = 0.97
    """Discount of the returns that the value head learns."""
    epochs: PositiveInt = 8
    """Passes over the data, at most."""
    stop_at: ClosedUnitInterval = 0.55
    """Success at which imitation stops, over 128 states that neither training nor evaluation uses; 1 = never."""
    batch_size: PositiveInt = 128
    """Transitions per gradient step."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate of pointing and imitation."""
    value_weight: NonNegativeFloat = 0.5
    """Weight of the value regression beside the imitation loss."""
    pointing_steps: NonNegativeInt = 5000
    """Gradient steps on pointing at what the instruction names, on fresh scenes; 0 for a model that cannot point."""
    num_envs: PositiveInt = 128
    """Environments that run side by side."""
    eval_episodes: PositiveInt = 256
    """Held-out initial states for the final evaluation."""
    device: str = "cpu"
    """Where to train."""
    output: str = "runs/imitation/tabletop_pick_place.pt"
    """Checkpoint to write; a .json of the same name goes beside it. The shipped one is in experiments/checkpoints/."""


def collect_demonstrations(config: BCConfig) -> TensorDict:
    """Noisy rollouts of the expert: `[samples]` with `observation`, `action` (its noiseless one) and `return`."""
    env = make_env(config.env, config.num_envs, config.env_config, config.device, seed=config.seed)
    if not hasattr(env, "expert_action"):
        raise UserError(f"env: {config.env} has no scripted expert to imitate")
    tail = getattr(env, "max_steps", 0)  # so that the last samples' episodes end and their returns are complete
    steps = -(-config.samples // config.num_envs)
    observations, actions, rewards, dones = [], [], [], []
    step = env.reset()
    for _ in tqdm(range(steps + tail), desc="demonstrations", disable=None):
        expert = env.expert_action()
        noisy = expert + config.noise * torch.randn_like(expert)
        slip = torch.rand_like(expert[:, -1]) < config.gripper_noise
        noisy[:, -1] = torch.where(slip, -expert[:, -1], expert[:, -1])
        observations.append(step[OBSERVATION])
        actions.append(expert)
        done_step, step = env.step_and_maybe_reset(step.set(ACTION, noisy))
        rewards.append(done_step["next", "reward"])
        dones.append(done_step["next", "done"])
    returns = discounted_returns(torch.stack(rewards), torch.stack(dones), config.gamma)
    data = TensorDict(
        {
            OBSERVATION: torch.cat(observations[:steps]),
            ACTION: torch.cat(actions[:steps]),
            "return": returns[:steps].flatten(0, 1),
        },
        batch_size=[steps * config.num_envs],
    )
    return data[: config.samples]


def discounted_returns(rewards: Tensor, dones: Tensor, gamma: float) -> Tensor:
    """Discounted sums of rewards to the end of the episode; rewards and dones `[T, N, 1]` -> `[T, N, 1]`."""
    returns, running = torch.empty_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        running = rewards[t] + gamma * running * ~dones[t]
        returns[t] = running
    return returns


def learn_to_point(model: nn.Module, config: BCConfig) -> None:
    """Regress the places that the model points at on those of the block and the plate that the instruction names."""
    env = make_env(config.env, config.batch_size, config.env_config, config.device, seed=config.seed + 1)
    if not hasattr(model, "point") or not hasattr(env, "named_places"):
        raise UserError("pointing_steps: the model has no point(), or the environment no named_places(); set it to 0")
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    bar = tqdm(range(config.pointing_steps), desc="pointing", disable=None)
    for step in bar:
        features = env.reset()
        for stage in model.stages():
            features = stage(features)
        places = env.named_places()
        loss = (model.point(features, places.shape[1]) - places).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def imitate(model: nn.Module, policy: VLAPolicy, data: TensorDict, config: BCConfig) -> None:
    """Regress the policy's deterministic action on the expert's, and the value on the return, until it succeeds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    env = make_env(config.env, len(WATCHED_STATES), config.env_config, config.device)
    steps = config.epochs * max(1, len(data) // config.batch_size)
    bar = tqdm(range(1, steps + 1), desc="imitation", disable=None)
    rows = iter(())
    for step in bar:
        chosen = next(rows, None)
        if chosen is None or len(chosen) < config.batch_size:
            rows = iter(torch.randperm(len(data)).split(config.batch_size))
            chosen = next(rows)
        batch = data[chosen]
        hidden = policy.rest(batch)[HIDDEN]
        action_loss = (model.action_distribution(hidden).mean - batch[ACTION]).square().mean()
        value_loss = (model.value(hidden) - batch["return"]).square().mean()
        optimizer.zero_grad()
        (action_loss + config.value_weight * value_loss).backward()
        optimizer.step()
        if config.stop_at < 1 and step % WATCH_EVERY == 0:
            success = evaluate(env, policy.act, WATCHED_STATES).metrics().get("eval/success_rate", 0.0)
            bar.set_postfix(action_loss=f"{action_loss.item():.4f}", success=f"{success:.2f}")
            if success >= config.stop_at:
                break
    env.close()


def main(argv: list[str] | None = None) -> int:
    config = parse_config(BCConfig, argv, __doc__)
    start = time.monotonic()
    torch.manual_seed(config.seed)
    model = load_vla_model(None, config.model_class, config.model_config, config.device, expect_fresh=True)
    data = collect_demonstrations(config)
    policy = VLAPolicy(model)
    if policy.interface != "staged":
        raise UserError(
            f"model_class: imitation needs stages and action_distribution, which {config.model_class} lacks"
        )
    check_policy(policy, data[OBSERVATION][:2], data[ACTION].shape[1:])
    normalise_proprio(model, data)
    if config.pointing_steps:
        learn_to_point(model, config)
    imitate(model, policy, data, config)
    env = make_env(config.env, min(64, config.eval_episodes), config.env_config, config.device)
    result = evaluate(env, policy.act, range(config.eval_episodes))
    output = Path(config.output)
    settings = to_dict(config) | {"output": output.name}  # not where on this machine
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output, "wb") as file:
        torch.save({"model_state_dict": model.state_dict(), "config": settings}, file)
    facts = {"config": settings, "parameters": sum(p.numel() for p in model.parameters()), **result.metrics()}
    output.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{result.summary()}; {time.monotonic() - start:.0f} s; weights in {output}")
    return 0


@torch.no_grad()
def normalise_proprio(model: nn.Module, data: TensorDict) -> None:
    """Give a model that normalises its proprioception the data's mean and standard deviation."""
    fusion = getattr(model, "fusion", None)
    if fusion is not None and hasattr(fusion, "proprio_mean"):
        fusion.proprio_mean.copy_(data[OBSERVATION, "proprio"].mean(dim=0))
        fusion.proprio_std.copy_(data[OBSERVATION, "proprio"].std(dim=0).clamp(min=1e-3))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, NonFiniteError, SimulatorFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
