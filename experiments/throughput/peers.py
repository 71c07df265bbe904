"""What `benchmark_throughput.py` compares with: the floor, and PPO as TorchRL's own documentation writes it."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import EnvBase
from torchrl.modules import IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from agents.policy import VLAPolicy
from research.config import PPOConfig
from research.schema import ACTION, HIDDEN, OBSERVATION


class Loop(Protocol):
    """What is timed: collecting a rollout, and the update on it."""

    def collect(self) -> None: ...

    def update(self) -> None: ...

    def bytes_per_transition(self) -> float:
        """Of the last rollout, as it lies in memory."""

    def close(self) -> None:
        """End what runs in the background."""


class Floor:
    """The least that must be computed, in a bare loop: the environment, one trunk pass per step, and the trainable
    part's forward and backward passes. No advantages, no loss, no shuffling, no optimizer, no bookkeeping.

    Args:
        env: batch `[N]`.
        policy: whose stages run, on frozen features where it reuses them.
        steps: T, steps per rollout.
        cfg: epochs and minibatch size are read.
        bf16: run the stages and heads under autocast.
    """

    def __init__(self, env: EnvBase, policy: VLAPolicy, steps: int, cfg: PPOConfig, bf16: bool):
        self.env, self.model, self.steps, self.cfg = env, policy.model, steps, cfg
        self.frozen, self.trained = policy.frozen, policy.rest
        self.kept_keys = policy.kept_keys
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._autocast = torch.autocast(env.device.type, torch.bfloat16, enabled=bf16)
        self._now = env.reset()

    @torch.no_grad()
    def collect(self) -> None:
        kept = []
        with self._autocast:
            for _ in range(self.steps):
                step = self.frozen(TensorDict({OBSERVATION: self._now.get(OBSERVATION)}, self._now.batch_size))
                distribution, _ = self._heads(step)
                action = distribution.sample()
                distribution.log_prob(action)
                kept.append(step.select(*self.kept_keys).set(ACTION, action))
                _, self._now = self.env.step_and_maybe_reset(self._now.set(ACTION, action))
        self.batch = torch.cat(kept)

    def update(self) -> None:
        for _ in range(self.cfg.n_epochs):
            for minibatch in self.batch.split(self.cfg.batch_size):
                with self._autocast:
                    distribution, value = self._heads(minibatch)
                    score = distribution.log_prob(minibatch.get(ACTION)).mean() + value.mean()
                torch.autograd.grad(score, self.parameters, allow_unused=True)

    def _heads(self, step: TensorDictBase):
        step = self.trained(step)
        return self.model.distribution_at(step), self.model.value(step.get(HIDDEN))

    def bytes_per_transition(self) -> float:
        return self.batch.bytes() / self.batch.numel()


class TorchRLRecipe:
    """PPO as TorchRL's tutorial shows it (https://docs.pytorch.org/rl/stable/tutorials/coding_ppo.html).

    Actor and critic are networks of their own, here two copies of the model; the collector keeps next observations;
    GAE calls the value network on both ends of every transition, anew in each epoch; a replay buffer without
    replacement makes the minibatches.

    Args:
        env: batch `[N]`.
        model: the VLA, frozen as wanted.
        steps: T, steps per rollout.
        cfg: PPO's settings.
    """

    def __init__(self, env: EnvBase, model: nn.Module, steps: int, cfg: PPOConfig):
        self.cfg, self.frames, device = cfg, steps * env.batch_size[0], env.device
        keys = [(OBSERVATION, key) for key in env.observation_spec[OBSERVATION].keys()]
        actor = TensorDictModule(ActorNetwork(model, keys), in_keys=keys, out_keys=["loc", "scale"])
        self.actor = ProbabilisticActor(
            actor, in_keys=["loc", "scale"], distribution_class=IndependentNormal, return_log_prob=True
        )
        self.critic = ValueOperator(ValueNetwork(copy.deepcopy(model), keys), in_keys=keys)
        self.collector = Collector(
            env,
            self.actor,
            frames_per_batch=self.frames,
            total_frames=-1,
            split_trajs=False,
            device=device,
            auto_register_policy_transforms=False,
        )
        self.buffer = ReplayBuffer(storage=LazyTensorStorage(self.frames), sampler=SamplerWithoutReplacement())
        self.advantage = GAE(gamma=cfg.gamma, lmbda=cfg.gae_lambda, value_network=self.critic, average_gae=True)
        self.loss = ClipPPOLoss(
            self.actor,
            self.critic,
            clip_epsilon=cfg.clip_coef,
            entropy_bonus=True,
            entropy_coeff=cfg.ent_coef,
            critic_coeff=cfg.vf_coef,
            loss_critic_type="smooth_l1",
        )
        self.trained = [p for p in self.loss.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, cfg.learning_rate)
        self._arriving = iter(self.collector)

    def collect(self) -> None:
        self.rollout = next(self._arriving)

    def update(self) -> None:
        device = self.rollout.device
        for _ in range(self.cfg.n_epochs):
            with torch.no_grad():
                self.advantage(self.rollout)
            self.buffer.extend(self.rollout.reshape(-1).cpu())
            for _ in range(max(1, self.frames // self.cfg.batch_size)):
                minibatch = self.buffer.sample(min(self.cfg.batch_size, self.frames))
                losses = self.loss(minibatch.to(device))
                (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
                nn.utils.clip_grad_norm_(self.trained, self.cfg.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def bytes_per_transition(self) -> float:
        return self.rollout.exclude("advantage", "value_target").bytes() / self.rollout.numel()

    def close(self) -> None:
        """Close the environment."""
        self.collector.shutdown()


class ActorNetwork(nn.Module):
    """Observations `[*B, ...]` -> mean and standard deviation of the action, `[*B, A]` each."""

    def __init__(self, model: nn.Module, keys: list[tuple[str, str]]):
        super().__init__()
        self.model, self.names = model, [name for _, name in keys]

    def forward(self, *observations: Tensor) -> tuple[Tensor, Tensor]:
        hidden, batch = encode(self.model, self.names, observations)
        distribution = self.model.action_distribution(hidden)
        return distribution.mean.unflatten(0, batch), distribution.stddev.unflatten(0, batch)


class ValueNetwork(ActorNetwork):
    """Observations `[*B, ...]` -> state value `[*B, 1]`."""

    def forward(self, *observations: Tensor) -> Tensor:
        hidden, batch = encode(self.model, self.names, observations)
        return self.model.value(hidden).unflatten(0, batch)


def encode(model: nn.Module, names: list[str], observations: tuple[Tensor, ...]) -> tuple[Tensor, torch.Size]:
    """One trunk pass over observations of any batch shape `*B`: `hidden` `[prod(B), D]`, and `*B`."""
    batch = observations[names.index("proprio")].shape[:-1]
    flat = {name: tensor.flatten(0, len(batch) - 1) for name, tensor in zip(names, observations, strict=True)}
    return model.encode(TensorDict(flat, batch_size=[batch.numel()])), batch
