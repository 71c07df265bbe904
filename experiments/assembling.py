"""From a configuration to what a script works with: device, environment, model, policy, algorithm, rollouts.

The scripts that train by reinforcement learning build their parts here; those that evaluate or imitate take what they
need from building.py. Whatever can be refused is refused here, with one clear line, before a run folder is made or
anything heavy starts.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from algorithms import make_algorithm
from building import BuiltModel, make_model, make_policy
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from agents.cost import flops_per_transition, reuse_report
from agents.policy import VLAPolicy
from envs import make_env
from research.config import ExperimentConfig, TrainerConfig
from research.errors import UserError, describe_error
from research.schema import OBSERVATION, check_observation
from research.training.algorithm import Algorithm, Collection
from research.training.asynchronous import AsynchronousRollouts, ProcessWorkers, Workers
from research.training.audit import FreezeAudit
from research.training.evaluation import shares_of_tasks
from research.training.group_episodes import GroupEpisodes
from research.training.host_memory import keep_freed_memory
from research.training.parallel import ALONE, World
from research.training.rollout import Rollouts
from research.training.threads import choose_threads
from research.training.utilisation import Utilisation, matmul_flops_per_second


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
        world: the processes of the run; all else is this one's.
    """

    device: torch.device
    observations: TensorDictBase
    policy: VLAPolicy
    audit: FreezeAudit
    algorithm: Algorithm
    rollouts: Collection
    eval_env: EnvBase
    world: World


def assemble(config: ExperimentConfig, world: World = ALONE) -> Assembly:
    """Build all parts of a training run, seeded, on its device.

    Raises:
        UserError: something in the configuration does not fit the environment, the model or the machine.
    """
    trainer = config.trainer
    device = choose_device(world.device or trainer.device)
    trainer.threads, why = choose_threads(trainer.threads)  # recorded: a resumed run takes the same
    torch.set_num_threads(trainer.threads)
    keep_freed_memory()
    print(f"threads: {trainer.threads} ({why})", flush=True)
    warmup = config.algorithm.cfg.value_warmup_iterations
    if trainer.max_env_steps is None and warmup >= trainer.iterations:
        iterations = f"trainer.iterations = {trainer.iterations}"
        print(f"the policy will not change: value_warmup_iterations = {warmup} of {iterations}")
    config = share_of(config, world)
    trainer = config.trainer
    env, built, few, action_shape, choices = start_of(config, device, world)
    observations = env.observation_spec[OBSERVATION].zero()
    world.start_alike(built.model)
    policy = make_policy(config, built.model, few, action_shape, choices)
    algorithm = make_algorithm(config, policy, built.value_head, few, world)
    run = partial(policy.values, TensorDict({OBSERVATION: observations}, observations.batch_size))
    audit = FreezeAudit(built.model, built.frozen, policy.reused_modules, built.heads, exercise=run)
    rollouts = make_rollouts(config, env, policy, device, world)
    num_eval_envs = max(1, min(trainer.num_eval_envs, trainer.num_eval_episodes // world.size))
    eval_env = make_env(trainer.env, num_eval_envs, trainer.env_config, device, trainer.seed)
    states = range(trainer.num_eval_episodes)
    unequal = shares_of_tasks(getattr(eval_env, "task_names", ()), states, "trainer.num_eval_episodes")
    if trainer.enable_eval and unequal and world.leads:
        print(unequal)
    if world.size > 1:
        seed_everything(world.own_seed(trainer.seed))  # from here on ranks draw apart
    return Assembly(device, observations, policy, audit, algorithm, rollouts, eval_env, world)


class Start(NamedTuple):
    """The environments that a run trains in, and the model that it starts from."""

    env: EnvBase
    built: BuiltModel
    few: TensorDictBase
    """Zeros as the environment offers observations, `[2]`, or `[1]` where it has one row."""
    action_shape: Sequence[int]
    choices: Sequence[int] | None
    """How many each component of an action has, where the environment takes choices."""


def start_of(config: ExperimentConfig, device: torch.device, world: World = ALONE) -> Start:
    """Where a run starts: the same configuration gives the same weights each time, fresh ones drawn from its seed.

    Raises:
        UserError: the configuration does not fit the environment or the model.
    """
    trainer, share = config.trainer, (world.rank, world.size)
    seed_everything(trainer.seed)  # every rank alike, so that models are
    env = make_env(trainer.env, trainer.num_envs, trainer.env_config, device, trainer.seed, share)
    if trainer.enable_eval and trainer.num_eval_episodes > env.held_out:
        raise UserError(
            f"trainer.num_eval_episodes: {trainer.num_eval_episodes} begin in as many initial states, but "
            f"{trainer.env} holds out {env.held_out:,} and trains on the others; at most {env.held_out} here"
        )
    observations = env.observation_spec[OBSERVATION].zero()
    check_observation(observations, f"env {trainer.env!r}")
    few, action_shape = observations[: min(2, trainer.num_envs)], env.action_spec.shape[1:]
    choices, action_map = getattr(env, "action_choices", None), getattr(env, "action_map", None)
    goes_on = trainer.resume is not None  # then the checkpoint's weights replace those it starts from
    built = make_model(config, few, action_shape, device, goes_on, choices, action_map)
    return Start(env, built, few, action_shape, choices)


def share_of(config: ExperimentConfig, world: World) -> ExperimentConfig:
    """What one process of a run has to do: its part of the environments, of a rollout and of a minibatch.

    Raises:
        UserError: these cannot be divided among the processes.
    """
    if world.size == 1:
        return config
    config = copy.deepcopy(config)
    divided = {"trainer": ["num_envs", "buffer_size"], "algorithm.cfg": ["batch_size"]}
    if config.algorithm.name == "grpo":
        divided = {"trainer": ["num_envs"], "algorithm.cfg": ["batch_size", "groups"]}
    for section, names in divided.items():
        part = config.trainer if section == "trainer" else config.algorithm.cfg
        for name in names:
            setattr(part, name, world.divide(getattr(part, name), f"{section}.{name}"))
    if config.trainer.enable_eval and config.trainer.num_eval_episodes < world.size:
        world.divide(config.trainer.num_eval_episodes, "trainer.num_eval_episodes")
    config.trainer.num_eval_envs = math.ceil(config.trainer.num_eval_envs / world.size)
    if config.trainer.num_envs % config.trainer.num_collectors:
        raise UserError(
            f"trainer.num_envs: {config.trainer.num_envs * world.size} cannot be shared among {world.size} processes "
            f"with trainer.num_collectors = {config.trainer.num_collectors} each"
        )
    return config


def choose_device(name: str, option: str = "trainer.device") -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. Errors name the option."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{option} is {name!r}, but torch finds no GPU here; use 'auto' or 'cpu'")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # what is not here, or "meta", which holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        why = describe_error(error)
        raise UserError(f"{option}: {name!r} cannot compute here; use auto, cpu or cuda ({why})") from None
    return device


def seed_everything(seed: int) -> None:
    """Seed the generators that a user's model or environment may draw from: Python's, NumPy's, torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_rollouts(
    config: ExperimentConfig, env: EnvBase, policy: VLAPolicy, device: torch.device, world: World = ALONE
) -> Collection:
    """Collection by turns with the update, or from other processes while it runs; `env` is closed in that case."""
    trainer, cfg = config.trainer, config.algorithm.cfg
    if config.algorithm.name == "grpo":
        return GroupEpisodes(
            env, policy, cfg.groups, cfg.group_size, cfg.most_draws, cfg.max_steps, world, trainer.seed
        )
    if trainer.buffer_type == "standard":
        return Rollouts(env, policy, trainer.buffer_size, world, trainer.seed)
    task_names = getattr(env, "task_names", ())
    env.close()
    ray = trainer.collector == "ray"
    print(f"starting {trainer.num_collectors} {'workers of Ray' if ray else 'processes'} that collect", flush=True)
    return AsynchronousRollouts(
        partial(make_worker_env, trainer, device, world.rank, world.size), trainer.num_envs, policy,
        trainer.num_collectors, trainer.buffer_size, trainer.max_staleness, trainer.seed, trainer.worker_timeout,
        _ray_workers(trainer.ray_address) if ray else ProcessWorkers, world, task_names,
    )  # fmt: skip


def _ray_workers(address: str | None) -> Callable[..., Workers]:
    try:
        from research.training.ray_workers import RayWorkers  # an optional dependency
    except ImportError as error:
        raise UserError(f"trainer.collector: ray needs Ray ({describe_error(error)}); pip install -e .[ray]") from error
    return partial(RayWorkers, address=address)


def make_worker_env(trainer: TrainerConfig, device: torch.device, rank: int, size: int, worker: int) -> EnvBase:
    """One worker's share of the environments (buffer_type vla); its seed comes from the collector.

    Args:
        trainer: of the `rank`-th of `size` processes, each of which has as many workers.
        worker: its number in that process.
    """
    count = trainer.num_collectors
    share = (worker + rank * count, size * count)
    return make_env(trainer.env, trainer.num_envs // count, trainer.env_config, device, worker, share)


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
    unread = parts.policy.unread(sorted(parts.observations.keys()))
    lines = [
        f"{type(model).__name__} ({parts.policy.interface} interface): {trained:,} of "
        f"{sum(p.numel() for p in parameters):,} parameters train, on {parts.device}",
        *reuse_report(parts.policy, parts.observations[:1]).lines(),
        *([f"offered and read by nothing: {', '.join(unread)}"] if unread else []),
        f"run folder: {folder}",
    ]
    return "\n".join(lines)
