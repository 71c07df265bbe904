"""The model of an experiment, built, filled and frozen, and the policy around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution

from agents.adapters import load_adapters
from agents.checking import check_model, check_policy
from agents.constancy import check_constant
from agents.critic import find_value_head
from agents.feature_budget import FeatureBudget
from agents.loading import import_model_class, in_eval_mode, load_vla_model
from agents.normalisation import tell_action_map
from agents.policy import VLAPolicy
from agents.residual import RESIDUAL, add_residual, policy_at
from research.action_map import ActionMap
from research.config import FREEZE_SWITCHES, ExperimentConfig, GRPOConfig, PolicyConfig, VLAConfig
from research.errors import UserError, one_line
from research.runs.checkpoint import frozen_weights, holds_all_weights, load_checkpoint
from research.runs.folder import RunFolder
from research.runs.wandb_checkpoints import SCHEME
from research.runs.wandb_models import fetch
from research.schema import PROPRIO, RGB, base_modality
from research.training.audit import load_trained_state
from research.training.freezing import freeze, heads_of, part_of

HERE = Path(__file__).resolve().parent
# Arguments of a model's constructor that name files.
FILES = ("pretrained", "statistics", "tokenizer", "vision_weights", "language_weights")


class BuiltModel(NamedTuple):
    """A model as a run needs it."""

    model: nn.Module
    value_head: list[str]
    """Names of the modules and parameters that only the value depends on."""
    heads: list[str]
    """Parts that the scope leaves, of those that leave some: "backbone", "lora", "residual"."""
    frozen: list[str]
    """Names of the parameters that the scope froze."""


def make_model(
    config: ExperimentConfig, observations: TensorDictBase, action_shape: Sequence[int], device: torch.device,
    expect_fresh: bool = False, choices: Sequence[int] | None = None, action_map: ActionMap | None = None,
) -> BuiltModel:  # fmt: skip
    """The configured model, its checkpoint loaded, frozen as configured and in eval mode.

    Eval mode throughout (no dropout, fixed batch statistics): the policy that is trained is the one that acted.

    Args:
        config: the experiment.
        observations: a few, as the environment offers them, `[B]`: on them the model is tried and its value head found.
        action_shape: of one action of the environment, `[A]` or `[H, A]`.
        device: where the model lies.
        expect_fresh: do not warn of fresh weights; others replace them.
        choices: how many each component of an action has, where the environment takes choices.
        action_map: of the environment; a model with statistics of a robot's own actions is told (`act_through`).
    """
    policy, vla = config.policy, config.policy.vla_config
    vla.model_path = where_it_is(vla.model_path)
    model = load_model(vla, model_arguments(config, observations, action_shape, choices), device, expect_fresh)
    tell_action_map(model, action_map)
    wanted, planned = policy.action_chunk.horizon, getattr(model, "horizon", None)
    if wanted is not None and "horizon" not in constructor_arguments(vla.model_class) and wanted != planned:
        plans = f" and plans {planned} control steps" if planned else ""
        raise UserError(f"policy.action_chunk.horizon is {wanted}, but {vla.model_class} takes no horizon{plans}")
    with torch.random.fork_rng():
        check_model(in_eval_mode(model), observations, action_shape, choices)
    value_head = [policy.value_head] if policy.value_head else find_value_head(model, observations)
    heads, frozen = freeze_as_configured(model, policy, value_head, lambda: policy_at(model, observations))
    if vla.adapter_path:
        load_adapters(model, vla.adapter_path, policy.lora.rank, policy.lora.alpha, vla.trust_checkpoint)
    refuse_half_precision(model)
    return BuiltModel(in_eval_mode(model), value_head, heads, frozen)


def load_model(vla: VLAConfig, arguments: dict[str, Any], device: torch.device, expect_fresh: bool) -> nn.Module:
    """The configured class with its weights; where W&B has them, `vla.model_path` becomes the version that was taken.

    A checkpoint that a run left on W&B lacks what the run kept frozen; that comes from where the run took it.
    """
    path, state = vla.model_path, None
    if path and path.startswith(SCHEME):
        vla.model_path, path = fetch(path)
        state = load_checkpoint(path) if RunFolder(path).is_run else None
    if state:
        of_run = state["config"]["policy"]["vla_config"]
        base = {name: of_run[name] for name in ("model_path", "strict", "strip_prefix", "add_prefix")}
        base["model_path"] = None if holds_all_weights(state) else where_it_is(base["model_path"])
        model = load_model(replace(vla, **base), arguments, device, expect_fresh=True)
        load_trained(model, state)
        return model
    return load_vla_model(
        path,
        vla.model_class,
        arguments,
        device,
        strict=vla.strict,
        strip_prefix=vla.strip_prefix,
        add_prefix=vla.add_prefix,
        trust_checkpoint=vla.trust_checkpoint,
        expect_fresh=expect_fresh,
    )


def freeze_as_configured(
    model: nn.Module,
    policy: PolicyConfig,
    value_head: Sequence[str],
    try_out: Callable[[], tuple[Tensor, Distribution]],
) -> tuple[list[str], list[str]]:
    """Freeze a model whose pretrained weights are loaded; adds what the scope adds.

    Args:
        model: changed in place.
        policy: what is frozen.
        value_head: names of the modules and parameters that only the value depends on.
        try_out: `agents.residual.policy_at` of the model; called where a residual is added.
    Returns:
        the parts that the scope leaves; names of the frozen parameters.
    """
    if policy.freeze == "residual":
        add_residual(model, *try_out(), policy.residual.units)
        return [RESIDUAL, *value_head], freeze(model, policy.freeze, heads=value_head)
    heads = heads_of(model, value_head)
    return heads, freeze(model, policy.freeze, heads=heads, lora=policy.lora)


def constructor_arguments(model_class: str) -> Mapping[str, inspect.Parameter]:
    """The arguments of a model's constructor, by name."""
    return inspect.signature(import_model_class(model_class).__init__).parameters


def model_arguments(
    config: ExperimentConfig,
    observations: TensorDictBase,
    action_shape: Sequence[int],
    choices: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What the configured model's constructor is called with; the arguments are those of `make_model`."""
    policy, vla = config.policy, config.policy.vla_config
    # A model whose constructor names such a switch is told.
    named = constructor_arguments(vla.model_class)
    scopes = [policy.freeze] if isinstance(policy.freeze, str) else policy.freeze
    told = {switch: True for switch, preset in FREEZE_SWITCHES.items() if switch in named and preset in scopes}
    # What follows from the environment need not be said; lists of what is used of it may be shorter than it offers.
    follows = what_follows(observations, action_shape, choices, named, policy.action_chunk.horizon)
    refuse_otherwise("policy", {"action_dim": policy.action_dim}, observations, action_shape)
    refuse_otherwise("policy.vla_config.model_config", vla.model_config, observations, action_shape)
    return follows | with_files(vla.model_config) | told


def refuse_otherwise(
    where: str, said: Mapping[str, Any], observations: TensorDictBase, action_shape: Sequence[int]
) -> None:
    """Refuse sizes that are said, and are not the environment's.

    Args:
        where: the dotted name of the options.
        said: option -> value; none is not said.
        observations, action_shape: as for `make_model`.
    """
    sizes = {"action_dim": (action_shape[-1], "takes actions")}
    if PROPRIO in observations.keys():
        sizes["proprio_dim"] = (observations[PROPRIO].shape[-1], "offers proprio")
    for name, (size, what) in sizes.items():
        if said.get(name) not in (None, size):
            raise UserError(
                f"{where}.{name} is {said[name]}, but the environment {what} of {size} numbers; leave it out"
            )


def with_files(model_config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model whose files are found, see `where_it_is`."""
    return model_config | {name: where_it_is(model_config[name]) for name in FILES if name in model_config}


def where_it_is(path: Any) -> Any:
    """A path as it is; one that does not exist, but does beside the scripts, is that one."""
    if isinstance(path, str) and path and not Path(path).exists() and (HERE / path).exists():
        return str(HERE / path)
    return path


def what_follows(
    observations: TensorDictBase,
    action_shape: Sequence[int],
    choices: Sequence[int] | None,
    named: Mapping[str, inspect.Parameter],
    horizon: int | None = None,
) -> dict[str, Any]:
    """What an environment says of a model's constructor arguments, for those that have these names.

    `modalities` are all that are offered of the kinds of its own default, and `cameras` the keys of all pictures.
    `executed` and `horizon`, the control steps that a decision has and those that are planned, are said where there are
    several.
    """
    follows: dict[str, Any] = {"action_dim": action_shape[-1]}
    executed = 1 if len(action_shape) == 1 else action_shape[0]
    if max(executed, horizon or 1) > 1:
        follows |= {"executed": executed, "horizon": max(executed, horizon or 1)}
    if choices is not None:
        follows["action_choices"] = list(choices)
    if PROPRIO in observations.keys():
        follows["proprio_dim"] = observations[PROPRIO].shape[-1]
    if cameras := sorted(key for key in observations.keys() if base_modality(key) == RGB):
        follows["cameras"] = cameras
    default = named["modalities"].default if "modalities" in named else None
    if isinstance(default, list | tuple):
        offered = [key for kind in default for key in sorted(observations.keys()) if base_modality(key) == kind]
        follows |= {"modalities": offered} if offered else {}
    return {name: value for name, value in follows.items() if name in named}


def refuse_half_precision(model: nn.Module) -> None:
    """Refuse to train weights in bfloat16 or float16: steps smaller than their rounding are lost without a word."""
    half = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if half:
        parts = ", ".join(dict.fromkeys(map(part_of, half)))
        raise UserError(
            f"policy.vla_config: {type(model).__name__} trains {parts} in half precision, where small steps are lost; "
            "construct what trains in float32 and set trainer.autocast=bf16, or freeze it"
        )


def load_trained(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a model, built and frozen as in a run, the weights of one of its checkpoints.

    Frozen weights, which a checkpoint does not hold, are compared with the hashes that it holds.

    Raises:
        UserError: the weights do not fit, or the frozen ones, or the statistics of the data, are others.
    """
    weights = {**(frozen_weights(state) or {}), **state["model_state_dict"]}
    try:
        wrong = load_trained_state(model, weights, state.get("audit", {}))
    except RuntimeError as error:
        wrong = [one_line(error)[:200]]
    if wrong:
        raise UserError(
            f"{state['source']} does not fit the model that its config.json (and your flags) describe; "
            f"{len(wrong)} missing, or too many: {', '.join(wrong[:3])}"
        )


def keeps_frozen_weights(config: ExperimentConfig) -> bool:
    """Whether a run has to keep its frozen weights itself: not all of them come from a file."""
    return config.policy.vla_config.model_path is None or not config.policy.vla_config.strict


def make_policy(
    config: ExperimentConfig,
    model: nn.Module,
    observations: TensorDictBase,
    action_shape: Sequence[int],
    choices: Sequence[int] | None = None,
) -> VLAPolicy:
    """The modules around a model that is frozen as it will be, tried out on a few observations `[B]`."""
    trainer = config.trainer
    policy = VLAPolicy(
        model, config.policy.feature_reuse, trainer.autocast, trainer.compile == "on", config.policy.ratio_level,
        budget=feature_budget(config, observations),
    )  # fmt: skip
    check_policy(policy, observations, action_shape, choices)
    check_constant(policy, observations)
    return policy


def feature_budget(config: ExperimentConfig, observations: TensorDictBase) -> FeatureBudget | None:
    """The room for kept features that `policy.feature_memory` leaves each transition; None: no limit."""
    room = config.policy.feature_memory
    return None if room is None else FeatureBudget(room * 2**30 / transitions_of(config), observations)


def transitions_of(config: ExperimentConfig, longest: int | None = None) -> int:
    """Transitions from which one update learns: those of a rollout, or at most those of all episodes of all groups.

    Args:
        config: the experiment.
        longest: control steps after which the environment ends an episode by itself; None: nobody knows.
    """
    cfg, trainer = config.algorithm.cfg, config.trainer
    if not isinstance(cfg, GRPOConfig):
        return trainer.buffer_size
    steps = min(cfg.max_steps, longest or cfg.max_steps)
    return cfg.groups * cfg.group_size * -(-steps // trainer.chunk)
