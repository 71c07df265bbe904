"""From a configuration to what a script works with: device, environment, model, policy, algorithm, rollouts.

Every script builds its parts here, and no script imports another. Whatever can be refused is refused here, with one
clear line, before a run folder is made or anything heavy starts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from building import make_model, make_policy
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from agents.cost import flops_per_transition, reuse_report
from agents.critic import detach_value_head
from agents.policy import VLAPolicy
from envs import make_env
from research.config import ExperimentConfig, TrainerConfig
from research.schema import OBSERVATION, UserError, check_observation, describe_error
from research.training.advantages import GAEAdvantages
from research.training.algorithm import Algorithm, Collection
from research.training.asynchronous import AsynchronousRollouts
from research.training.audit import FreezeAudit
from research.training.freezing import named_parameters_within, parameter_groups, part_names
from research.training.loss import make_loss
from research.training.ppo import PPO, PolicyUpdate
from research.training.rollout import Rollouts
from research.training.threads import choose_threads
from research.training.utilisation import Utilisation, matmul_flops_per_second
from research.training.vtrace import VTraceAdvantages


@dataclass
class Assembly:
    """What a run trains and evaluates with.

    Attributes:
        device: where the model and the environments are.
        observations: zeros as the environment offers observations, `[N]`.
        policy: the modules around the model.
        audit: of the frozen weights, as they were at the start.
        algorithm: what learns.
        rollouts: where it gets its data.
        eval_env: the environments of evaluations.
    """

    device: torch.device
    observations: TensorDictBase
    policy: VLAPolicy
    audit: FreezeAudit
    algorithm: Algorithm
    rollouts: Collection
    eval_env: EnvBase


def assemble(config: ExperimentConfig) -> Assembly:
    """Build all parts of a training run, seeded, on its device.

    Raises:
        UserError: something in the configuration does not fit the environment, the model or the machine.
    """
    trainer = config.trainer
    device = choose_device(trainer.device)
    trainer.threads, why = choose_threads(trainer.threads)  # recorded: a resumed run takes the same
    torch.set_num_threads(trainer.threads)
    print(f"threads: {trainer.threads} ({why})", flush=True)
    seed_everything(trainer.seed)
    env = make_env(trainer.env, trainer.num_envs, trainer.env_config, device, trainer.seed)
    observations = env.observation_spec[OBSERVATION].zero()
    check_observation(observations, f"env {trainer.env!r}")
    few, action_shape = observations[: min(2, trainer.num_envs)], env.action_spec.shape[1:]
    if config.policy.action_dim not in (None, action_shape[-1]):
        raise UserError(
            f"policy.action_dim is {config.policy.action_dim}, but {trainer.env} takes {action_shape[-1]} numbers"
        )
    choices = getattr(env, "action_choices", None)
    built = make_model(config, few, action_shape, device, choices=choices)
    policy = make_policy(config, built.model, few, action_shape, choices)
    algorithm = make_ppo(config, policy, built.value_head, few)
    run = partial(policy.values, TensorDict({OBSERVATION: observations}, observations.batch_size))
    audit = FreezeAudit(built.model, built.frozen, policy.reused_modules, built.heads, exercise=run)
    rollouts = make_rollouts(config, env, policy, device)
    num_eval_envs = min(trainer.num_eval_envs, trainer.num_eval_episodes)
    eval_env = make_env(trainer.env, num_eval_envs, trainer.env_config, device, trainer.seed)
    return Assembly(device, observations, policy, audit, algorithm, rollouts, eval_env)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise UserError(f"trainer.device is {name!r}, but torch finds no GPU here; use 'auto' or 'cpu'")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # what is not here, or "meta", which holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        why = describe_error(error)
        raise UserError(f"trainer.device: {name!r} cannot compute here; use auto, cpu or cuda ({why})") from None
    return device


def seed_everything(seed: int) -> None:
    """Seed the generators that a user's model or environment may draw from: Python's, NumPy's, torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_ppo(
    config: ExperimentConfig, policy: VLAPolicy, value_head: Sequence[str], observations: TensorDictBase
) -> PPO:
    """PPO around a policy; the critic's gradient reaches what `policy.critic_gradient` says."""
    cfg, model, to_head = config.algorithm.cfg, policy.model, config.policy.critic_gradient == "head"
    if cfg.ent_coef and not getattr(policy.contract, "entropy_trains", True):
        raise UserError(
            f"algorithm.cfg.ent_coef is {cfg.ent_coef:g}, but the entropy of {type(model).__name__} does not depend on "
            "its weights: a bonus for it trains nothing; set it to 0"
        )
    optimizer = torch.optim.Adam(
        parameter_groups(model, cfg.learning_rate, config.policy.learning_rates), eps=1e-5, fused=True
    )
    value_parameters = [p for p in named_parameters_within(model, value_head).values() if p.requires_grad]
    if not value_parameters and (to_head or cfg.value_warmup_iterations):
        wanted = config.policy.value_head
        named = f"no trainable part {wanted!r}" if wanted else "no value head of its own"
        raise UserError(
            f"policy.value_head: {type(model).__name__} has {named} (its parts: {', '.join(part_names(model))}); "
            "name the part that only get_value uses, or set policy.critic_gradient to 'trunk' and no value warm-up"
        )
    apart = to_head and not detach_value_head(model, value_parameters, observations)
    step = PolicyUpdate(make_loss(policy.actor, policy.critic, cfg), optimizer, cfg, value_parameters, apart)
    if config.trainer.buffer_type == "standard":
        advantages = GAEAdvantages(policy, cfg.gamma, cfg.gae_lambda, cfg.micro_batch_size or cfg.batch_size)
    else:
        advantages = VTraceAdvantages(policy, cfg.gamma, cfg.gae_lambda, cfg.micro_batch_size)
    return PPO(advantages, step, cfg)


def make_rollouts(config: ExperimentConfig, env: EnvBase, policy: VLAPolicy, device: torch.device) -> Collection:
    """Collection by turns with the update, or from other processes while it runs; `env` is closed in that case."""
    trainer = config.trainer
    if trainer.buffer_type == "standard":
        return Rollouts(env, policy, trainer.buffer_size)
    env.close()
    print(f"starting {trainer.num_collectors} processes that collect", flush=True)
    return AsynchronousRollouts(
        partial(make_worker_env, trainer, device), trainer.num_envs, policy, trainer.num_collectors,
        trainer.buffer_size, trainer.max_staleness, trainer.seed, trainer.worker_timeout,
    )  # fmt: skip


def make_worker_env(trainer: TrainerConfig, device: torch.device, worker: int) -> EnvBase:
    """One worker's share of the environments (buffer_type vla); its seed comes from the collector."""
    return make_env(trainer.env, trainer.num_envs // trainer.num_collectors, trainer.env_config, device, worker)


def measure_utilisation(config: ExperimentConfig, parts: Assembly) -> Utilisation:
    """What the model's arithmetic costs, and how fast this device could do it."""
    cfg, dtype = config.algorithm.cfg, torch.float32 if config.trainer.autocast == "off" else torch.bfloat16
    peak = matmul_flops_per_second(dtype, parts.device)
    rows = min(8, cfg.micro_batch_size or cfg.batch_size)
    return Utilisation(*flops_per_transition(parts.policy, parts.observations[:1], rows), peak)


def describe(parts: Assembly, folder: object) -> str:
    """What a run begins with, for the person who started it: the model, what trains in it, what is reused, where."""
    model = parts.policy.model
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    lines = [
        f"{type(model).__name__} ({parts.policy.interface} interface): {trained:,} of "
        f"{sum(p.numel() for p in parameters):,} parameters train, on {parts.device}",
        *reuse_report(parts.policy, parts.observations[:1]).lines(),
        f"run folder: {folder}",
    ]
    return "\n".join(lines)
