"""From a configuration to what a script works with: device, environment, model, policy, algorithm, rollouts.

Every script builds its parts here, and no script imports another. Whatever can be refused is refused here, with one
clear line, before a run folder is made or anything heavy starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.envs import EnvBase

from agents.checking import check_model, check_policy
from agents.cost import flops_per_transition, reuse_report
from agents.critic import detach_value_head, find_value_head
from agents.loading import import_model_class, load_vla_model
from agents.policy import VLAPolicy
from envs import make_env
from research.config import FREEZE_SWITCHES, ExperimentConfig, TrainerConfig
from research.schema import OBSERVATION, PROPRIO, UserError, check_observation
from research.training.advantages import GAEAdvantages
from research.training.algorithm import Algorithm, Collection
from research.training.asynchronous import AsynchronousRollouts
from research.training.audit import FreezeAudit
from research.training.freezing import HEADS, freeze, named_parameters_within, parameter_groups, part_names, part_of
from research.training.loss import make_loss
from research.training.ppo import PPO, PolicyUpdate
from research.training.rollout import Rollouts
from research.training.threads import choose_threads
from research.training.utilisation import Utilisation, matmul_flops_per_second
from research.training.vtrace import VTraceAdvantages

HERE = Path(__file__).resolve().parent


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
    torch.manual_seed(trainer.seed)
    env = make_env(trainer.env, trainer.num_envs, trainer.env_config, device, trainer.seed)
    observations = env.observation_spec[OBSERVATION].zero()
    check_observation(observations, f"env {trainer.env!r}")
    few, action_shape = observations[: min(2, trainer.num_envs)], env.action_spec.shape[1:]
    if config.policy.action_dim not in (None, action_shape[-1]):
        raise UserError(
            f"policy.action_dim is {config.policy.action_dim}, but {trainer.env} takes {action_shape[-1]} numbers"
        )
    model, value_head = make_model(config, few, action_shape, device)
    audit = FreezeAudit(model)
    policy = make_policy(config, model, few, action_shape)
    algorithm = make_ppo(config, policy, value_head, few)
    rollouts = make_rollouts(config, env, policy, device)
    num_eval_envs = min(trainer.num_eval_envs, trainer.num_eval_episodes)
    eval_env = make_env(trainer.env, num_eval_envs, trainer.env_config, device, trainer.seed)
    return Assembly(device, observations, policy, audit, algorithm, rollouts, eval_env)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"trainer.device: unknown device {name!r}; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device is 'cuda', but torch finds no GPU here; use 'auto' or 'cpu'")
    return device


def make_model(
    config: ExperimentConfig,
    observations: TensorDictBase,
    action_shape: Sequence[int],
    device: torch.device,
    expect_fresh: bool = False,
) -> tuple[nn.Module, list[str]]:
    """The configured model, its checkpoint loaded, frozen as configured and in eval mode; and names of its value head.

    Eval mode throughout (no dropout, fixed batch statistics): the policy that is trained is the one that acted.

    Args:
        config: the experiment.
        observations: a few, as the environment offers them, `[B]`: on them the model is tried and its value head found.
        action_shape: of one action of the environment, `[A]` or `[H, A]`.
        device: where the model lies.
        expect_fresh: do not warn of fresh weights; others replace them.
    """
    policy, vla = config.policy, config.policy.vla_config
    if vla.model_path and not Path(vla.model_path).exists() and (HERE / vla.model_path).exists():
        vla.model_path = str(HERE / vla.model_path)
    # A model whose constructor names such a switch is told.
    named = inspect.signature(import_model_class(vla.model_class).__init__).parameters
    scopes = [policy.freeze] if isinstance(policy.freeze, str) else policy.freeze
    told = {switch: True for switch, preset in FREEZE_SWITCHES.items() if switch in named and preset in scopes}
    # What follows from the environment need not be said; said otherwise, the model is tried and refused.
    follows = {"action_dim": action_shape[-1]}
    if PROPRIO in observations.keys():
        follows["proprio_dim"] = observations[PROPRIO].shape[-1]
    told |= {name: value for name, value in follows.items() if name in named and name not in vla.model_config}
    model = load_vla_model(
        vla.model_path,
        vla.model_class,
        vla.model_config | told,
        device,
        strict=vla.strict,
        strip_prefix=vla.strip_prefix,
        add_prefix=vla.add_prefix,
        trust_checkpoint=vla.trust_checkpoint,
        expect_fresh=expect_fresh,
    )
    with torch.random.fork_rng():
        check_model(model.eval(), observations, action_shape)
    value_head = [policy.value_head] if policy.value_head else find_value_head(model, observations)
    heads = getattr(model, "heads", None) or list(dict.fromkeys([*HEADS, *value_head]))
    freeze(model, policy.freeze, heads=heads, lora=policy.lora)
    refuse_half_precision(model)
    return model.eval(), value_head


def refuse_half_precision(model: nn.Module) -> None:
    """Refuse to train weights in bfloat16 or float16: steps smaller than their rounding are lost without a word."""
    half = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if half:
        parts = ", ".join(dict.fromkeys(map(part_of, half)))
        raise UserError(
            f"policy.vla_config: {type(model).__name__} trains {parts} in half precision, where small steps are lost; "
            "construct what trains in float32 and set trainer.autocast=bf16, or freeze it"
        )


def load_trained(model: nn.Module, weights: dict, source: str) -> None:
    """Give a model, frozen as in that run, the weights that it ended with; `source` is named where they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source} does not fit the model that its config.json (and your flags) describe: {reason}"
        ) from None


def make_policy(
    config: ExperimentConfig, model: nn.Module, observations: TensorDictBase, action_shape: Sequence[int]
) -> VLAPolicy:
    """The modules around a model that is frozen as it will be, tried out on a few observations `[B]`."""
    trainer = config.trainer
    policy = VLAPolicy(model, config.policy.feature_reuse, autocast=trainer.autocast, compile=trainer.compile == "on")
    check_policy(policy, observations, action_shape)
    return policy


def make_ppo(
    config: ExperimentConfig, policy: VLAPolicy, value_head: Sequence[str], observations: TensorDictBase
) -> PPO:
    """PPO around a policy; the critic's gradient reaches what `policy.critic_gradient` says."""
    cfg, model, to_head = config.algorithm.cfg, policy.model, config.policy.critic_gradient == "head"
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
        advantages = GAEAdvantages(policy, cfg.gamma, cfg.gae_lambda)
    else:
        advantages = VTraceAdvantages(policy, cfg.gamma, cfg.gae_lambda, cfg.micro_batch_size)
    return PPO(advantages, step, cfg)


def make_rollouts(config: ExperimentConfig, env: EnvBase, policy: VLAPolicy, device: torch.device) -> Collection:
    """Collection by turns with the update, or from other processes while it runs; `env` is closed in that case."""
    trainer = config.trainer
    if trainer.buffer_type == "standard":
        return Rollouts(env, policy, trainer.buffer_size)
    env.close()
    return AsynchronousRollouts(
        partial(make_worker_env, trainer, device), trainer.num_envs, policy, trainer.num_collectors,
        trainer.buffer_size, trainer.max_staleness, trainer.seed,
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
