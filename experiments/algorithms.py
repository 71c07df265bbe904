"""From a configuration and a policy to the algorithm that trains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase

from agents.critic import detach_value_head, scores
from agents.normalisation import find_running_normalisation
from agents.policy import VLAPolicy
from research.config import ExperimentConfig
from research.errors import UserError
from research.schema import OBSERVATION, PROPRIO
from research.training.advantages import GAEAdvantages
from research.training.algorithm import Algorithm
from research.training.freezing import named_parameters_within, parameter_groups, part_names
from research.training.grpo import GRPO, GRPOUpdate, StartingPolicy
from research.training.loss import make_loss
from research.training.parallel import ALONE, World
from research.training.ppo import PPO, PolicyUpdate
from research.training.running_statistics import ProprioStatistics, RewardScaling
from research.training.sharding import Sharding
from research.training.vtrace import VTraceAdvantages


def make_algorithm(
    config: ExperimentConfig,
    policy: VLAPolicy,
    value_head: Sequence[str],
    observations: TensorDictBase,
    world: World = ALONE,
) -> Algorithm:
    """What `algorithm.name` says, around a policy.

    Args:
        config: the experiment.
        policy: the modules around the model.
        value_head: names of the modules and parameters that only the value depends on.
        observations: a few, as the environment offers them, `[B]`.
        world: the processes that train together.
    Raises:
        UserError: something of the configuration does not fit the model.
    """
    make = {"ppo": make_ppo, "grpo": make_grpo}[config.algorithm.name]
    return make(config, policy, value_head, observations, world)


def make_ppo(
    config: ExperimentConfig,
    policy: VLAPolicy,
    value_head: Sequence[str],
    observations: TensorDictBase,
    world: World = ALONE,
) -> PPO:
    """PPO around a policy; the critic's gradient reaches what `policy.critic_gradient` says."""
    cfg, model, to_head = config.algorithm.cfg, policy.model, config.policy.critic_gradient == "head"
    optimizer = make_optimizer(config, policy)
    value_parameters = [p for p in named_parameters_within(model, value_head).values() if p.requires_grad]
    if not value_parameters and (to_head or cfg.value_warmup_iterations):
        if named_parameters_within(model, value_head):
            raise UserError(
                f"policy.freeze: {config.policy.freeze!r} freezes {', '.join(value_head)} of {type(model).__name__}, "
                "which only the value depends on; leave it out, or set policy.critic_gradient to 'trunk' and no value "
                "warm-up"
            )
        wanted = config.policy.value_head
        named = f"no trainable part {wanted!r}" if wanted else "no value head of its own"
        raise UserError(
            f"policy.value_head: {type(model).__name__} has {named} (its parts: {', '.join(part_names(model))}); "
            "name the part that only get_value uses, or set policy.critic_gradient to 'trunk' and no value warm-up"
        )
    apart = to_head and not detach_value_head(model, value_parameters, observations)
    shard = make_sharding(config, policy, optimizer, observations, apart, world)
    loss = make_loss(policy.actor, policy.critic, cfg)
    step = PolicyUpdate(loss, optimizer, cfg, value_parameters, apart, world, shard)
    rows = cfg.micro_batch_size or cfg.batch_size
    if config.trainer.buffer_type == "standard":
        advantages = GAEAdvantages(policy, cfg.gamma, cfg.gae_lambda, rows)
    else:
        advantages = VTraceAdvantages(policy, cfg.gamma, cfg.gae_lambda, rows, world)
    scaling, proprio = make_reward_scaling(config, world), make_proprio_statistics(config, policy, world)
    return PPO(advantages, step, cfg, scaling, proprio)


def make_reward_scaling(config: ExperimentConfig, world: World = ALONE) -> RewardScaling | None:
    """The statistics of `algorithm.cfg.normalize_reward`, or None without it."""
    cfg, trainer = config.algorithm.cfg, config.trainer
    if not cfg.normalize_reward:
        return None
    return RewardScaling(cfg.gamma, trainer.num_envs, trainer.num_envs // trainer.num_collectors, world)


def make_proprio_statistics(
    config: ExperimentConfig, policy: VLAPolicy, world: World = ALONE
) -> ProprioStatistics | None:
    """What follows observations with `algorithm.cfg.normalize_proprio`, or None without it.

    Raises:
        UserError: the model has no such module, or reads `proprio` in frozen parts alone.
    """
    if not config.algorithm.cfg.normalize_proprio:
        return None
    normaliser = find_running_normalisation(policy.model)
    if not {OBSERVATION, (OBSERVATION, PROPRIO)} & set(policy.kept_keys):
        raise UserError(
            "algorithm.cfg.normalize_proprio: the update does not read proprio, which frozen parts of "
            f"{type(policy.model).__name__} alone do; leave the option out, or do not freeze them (policy.freeze)"
        )
    return ProprioStatistics(normaliser, world)


def make_grpo(
    config: ExperimentConfig,
    policy: VLAPolicy,
    value_head: Sequence[str],
    observations: TensorDictBase,
    world: World = ALONE,
) -> GRPO:
    """A group-relative algorithm around a policy; its value head, which nothing asks, does not train."""
    cfg = config.algorithm.cfg
    if config.trainer.buffer_type != "standard":
        raise UserError(
            "trainer.buffer_type: grpo collects whole episodes by turns with the update; set it to standard"
        )
    for parameter in named_parameters_within(policy.model, value_head).values():
        parameter.requires_grad_(False)
    optimizer = make_optimizer(config, policy)
    shard = make_sharding(config, policy, optimizer, observations, False, world)
    step = GRPOUpdate(make_loss(policy.actor, None, cfg), optimizer, cfg, world=world, shard=shard)
    return GRPO(policy, step, cfg, StartingPolicy(policy) if cfg.kl_coef else None)


def make_optimizer(config: ExperimentConfig, policy: VLAPolicy) -> torch.optim.Optimizer:
    """Adam over what trains, each part at its own rate."""
    cfg, model = config.algorithm.cfg, policy.model
    if cfg.ent_coef and not getattr(policy.contract, "entropy_trains", True):
        raise UserError(
            f"algorithm.cfg.ent_coef is {cfg.ent_coef:g}, but the entropy of {type(model).__name__} does not depend on "
            "its weights: a bonus for it trains nothing; set it to 0"
        )
    groups = parameter_groups(model, cfg.learning_rate, config.policy.learning_rates)
    return torch.optim.Adam(groups, eps=1e-5, fused=True)


def make_sharding(
    config: ExperimentConfig,
    policy: VLAPolicy,
    optimizer: torch.optim.Optimizer,
    observations: TensorDictBase,
    critic_apart: bool,
    world: World,
) -> Callable[[], Sharding] | None:
    """What divides the weights among processes at the first update (`trainer.sharding: full`), or None.

    Raises:
        UserError: something of the configuration does not go with it.
    """
    trainer = config.trainer
    if trainer.sharding == "none":
        return None
    problems = {
        "needs several processes: start the script by torchrun --nproc-per-node N": world.size == 1,
        "needs a value head that is one module and runs once a pass (policy.value_head)": critic_apart,
        "goes with trainer.buffer_type=standard only": trainer.buffer_type != "standard",
        "goes with trainer.compile=off only": trainer.compile != "off",
    }
    for problem, applies in problems.items():
        if applies:
            raise UserError(f"trainer.sharding: full {problem}")
    score = policy.actor.score

    def shard() -> Sharding:
        sharding = Sharding(policy.model, score.evaluate, lambda: scores(policy.contract, observations), optimizer)
        score.run = sharding.root
        return sharding

    return shard
