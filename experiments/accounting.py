"""What a run would need, found by shapes alone: its model's parts, what it keeps of a transition, and the memory.

A decision and the passes of one gradient step go through the very modules that a run would train with, and what they
allocate is counted as it comes and goes (`agents/shapes_only.py`, `agents/live_bytes.py`).
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from algorithms import make_algorithm
from building import FILES, feature_budget, freeze_as_configured, model_arguments, transitions_of
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution

from agents.critic import find_value_head
from agents.live_bytes import LiveBytes, bytes_of
from agents.loading import construct_on_meta, in_eval_mode, load_vla_model
from agents.policy import VLAPolicy
from agents.residual import policy_at
from agents.shapes_only import look_nothing_up, rows_like, shapes_only, without_values
from agents.weights import some
from envs import make_env
from research.config import ExperimentConfig
from research.errors import UserError
from research.schema import ACTION, LOG_PROB, OBSERVATION, VALUE, with_text_as
from research.training.freezing import listed_heads, part_names
from research.training.grpo import REFERENCE
from research.training.rollout import KEPT_AFTER

log = logging.getLogger(__name__)

T = TypeVar("T")

VALUE_HEAD = "value_head"
ROWS = 2  # of the environment that is made, and of the observations on which a model is tried
FEATURES, REST = "features of frozen parts", "actions, values and rewards"


class Offered(NamedTuple):
    """What an environment says of itself."""

    observations: TensorDictBase
    """Zeros, `[ROWS]`."""
    action_shape: tuple[int, ...]
    """`[A]` or `[H, A]`."""
    choices: Any
    """How many each component of an action has, or None."""
    ends: int
    """Bytes per transition of rewards and of what else a rollout keeps under "next"."""
    max_steps: int | None = None
    """Control steps at which it ends an episode, where it says so."""


class Part(NamedTuple):
    """A part of a model."""

    name: str
    parameters: int
    trained: int


@dataclass
class Needs:
    """What a run would need; sizes in bytes.

    Attributes:
        model: the name of its class; device: where everything is.
        scope: what is frozen.
        parts: of the model.
        kept: per transition, by what it is: observations, features of frozen parts, decisions, and the rest.
        frozen_stages: whose features are kept.
        transitions: of a rollout, or samples of a data set; minibatch, micro: those of a gradient step, of a pass.
        memory: what is there all the time, or at some time, by its kind; activations are the most that live at once in
            a pass, gradients aside.
        updating, collecting: the most that lives at once in an update, and while collecting; 0 where nobody collects.
        at_most: whether `transitions` are those of the longest episodes that there may be.
    """

    model: str
    device: torch.device
    scope: str
    parts: list[Part]
    kept: dict[str, int]
    frozen_stages: list[str]
    transitions: int
    minibatch: int
    micro: int
    memory: dict[str, int]
    updating: int
    collecting: int = 0
    at_most: bool = False

    @property
    def total(self) -> int:
        """The most that lives at once."""
        return max(self.updating, self.collecting)


def needs_of_run(config: ExperimentConfig, offered: Offered, device: torch.device) -> Needs:
    """What a run of `ppo_vla.py` or `grpo_vla.py` would need.

    Args:
        config: the experiment; its files need not be there.
        offered: of its environment, see `offered_by`.
        device: where it would run.
    Raises:
        UserError: what a run would refuse as well.
    """
    trainer, cfg, vla = config.trainer, config.algorithm.cfg, config.policy.vla_config
    model = model_of_shapes(None, vla.model_class, model_arguments(config, *offered[:3]))
    value_head = value_head_of(model, config.policy.value_head, offered.observations)
    freeze_as_configured(model, config.policy, value_head, lambda: policy_of_shapes(model, offered.observations))
    with shapes_only():
        few = rows_like(offered.observations, ROWS, device)
        without_values(model, device).eval()
        policy = VLAPolicy(
            model, config.policy.feature_reuse, trainer.autocast, ratio_level=config.policy.ratio_level,
            budget=feature_budget(config, few),
        )  # fmt: skip
        algorithm = make_algorithm(config, policy, value_head, few)
        update, reference = algorithm.policy_update, getattr(algorithm, "reference", None)
        look_nothing_up(policy, distinct=2 * trainer.num_envs)  # an episode that ends and another, of each environment
        weights = [*model.parameters(), *model.buffers(), *(reference.start.values() if reference else ())]
        now = TensorDict({OBSERVATION: rows_like(few, trainer.num_envs, device)}, batch_size=[trainer.num_envs])
        with LiveBytes([*weights, *now.values(True, True)]) as acting, torch.no_grad():
            step = policy.act(now.copy())
        ahead = bytes_of(step.get(key) for key in policy.frozen.out_keys)
        step = with_text_as(torch.uint8, step.select(*policy.kept_keys, ACTION, LOG_PROB, VALUE))
        kept = kept_bytes(policy, step)
        # Besides: what is under "next", the value behind an end, which weights acted, advantage, the value's target.
        kept[REST] += offered.ends + 4 + 8 + 4 + 4
        micro = min(cfg.micro_batch_size or cfg.batch_size, cfg.batch_size)
        rows = rows_like(step, micro, device)
        for key in ("advantage", "value_target"):
            rows.set(key, torch.zeros(len(rows), 1, device=device))
        rows.set(REFERENCE, rows[LOG_PROB].clone())
        with LiveBytes([*weights, *rows.values(True, True)]) as passes:
            update._accumulate(rows, value_only=False)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            update.clip()
        update.optimizer.step()
        optimizer = bytes_of(_tensors_in(update.optimizer.state.values()))
        update.optimizer.zero_grad()
    of_transition, transitions = sum(kept.values()), transitions_of(config, offered.max_steps)
    memory = {
        "weights": bytes_of(weights),
        "optimizer": optimizer,
        "rollout": of_transition * transitions + ahead,
        "minibatch": of_transition * cfg.batch_size if cfg.batch_size < transitions else 0,
        "gradients": bytes_of(gradients),
        "activations": passes.peak(without=passes.of(gradients)),
    }
    there = memory["weights"] + memory["optimizer"] + memory["rollout"]
    # Of several passes, the later ones find the gradients of the others there.
    in_passes = passes.peak() if micro == cfg.batch_size else memory["gradients"] + memory["activations"]
    return Needs(
        type(model).__name__, device, config.policy.scope, parts_of(model), kept, policy.frozen_stages,
        transitions, cfg.batch_size, micro, memory,
        updating=there + memory["minibatch"] + in_passes,
        collecting=there + acting.peak(),
        at_most=config.algorithm.name == "grpo",
    )  # fmt: skip


# -------------------------------------------------------------------------------------- what imitation asks about too


def offered_by(env_name: str, env_config: Mapping[str, Any], device: torch.device, seed: int) -> Offered:
    """What an environment says of itself; it is made with two rows, and closed."""
    env = make_env(env_name, ROWS, dict(env_config), device, seed)
    try:
        after = env.fake_tensordict()["next"].select(*KEPT_AFTER, strict=False)
        ends = bytes_of(after.values(True, True)) // ROWS
        choices, longest = getattr(env, "action_choices", None), getattr(env, "max_steps", None)
        return Offered(env.observation_spec[OBSERVATION].zero(), env.action_spec.shape[1:], choices, ends, longest)
    finally:
        env.close()


def model_of_shapes(
    model_path: str | None, model_class: str, model_config: dict[str, Any], device: Any = "cpu", **options: Any
) -> nn.Module:
    """In place of `load_vla_model`: the model without weights, on the device "meta", in eval mode.

    Files that the configuration names need not be there, if it says the sizes. A model whose constructor reads values
    is constructed as it is.
    """
    absent = {
        name: value
        for name, value in model_config.items()
        if name in FILES and isinstance(value, str) and not value.startswith("package:") and not Path(value).exists()
    }
    if absent:
        log.warning("not there: %s; the sizes are those of the configuration", some(sorted(absent.values())))
    arguments = {name: value for name, value in model_config.items() if name not in absent}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="for .*: copying from a non-meta parameter")  # there is nothing
            return in_eval_mode(construct_on_meta(model_class, arguments))
    except UserError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
    return in_eval_mode(load_vla_model(None, model_class, arguments, expect_fresh=True))


def value_head_of(model: nn.Module, named: str | None, observations: TensorDictBase) -> list[str]:
    """The value head that is named, or that the model lists among its heads; else see `find_value_head`.

    That is asked of a copy, as adapters are put into a model without a device.
    """
    if named or VALUE_HEAD in (listed_heads(model) or ()):
        return [named or VALUE_HEAD]
    return _of_a_copy(find_value_head, model, observations)


def policy_of_shapes(model: nn.Module, observations: TensorDictBase) -> tuple[Tensor, Distribution]:
    """As `agents.residual.policy_at`, of a model without values."""
    return _of_a_copy(policy_at, model, observations)


def _of_a_copy(ask: Callable[[nn.Module, TensorDictBase], T], model: nn.Module, observations: TensorDictBase) -> T:
    model, cpu = copy.deepcopy(model), torch.device("cpu")
    with shapes_only():
        return ask(without_values(model, cpu), rows_like(observations, ROWS, cpu))


def parts_of(model: nn.Module) -> list[Part]:
    """The parts of a model, and how many of their parameters train."""
    counted: set[Tensor] = set()
    parts = []
    for name in part_names(model):
        held = getattr(model, name)
        own = [p for p in ([held] if isinstance(held, nn.Parameter) else held.parameters()) if p not in counted]
        counted.update(own)
        parts.append(Part(name, sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)))
    return parts


def kept_bytes(policy: VLAPolicy, steps: TensorDictBase) -> dict[str, int]:
    """Bytes per transition of what is kept of steps `[B]`, by what it is."""
    found = {"observations": 0, FEATURES: 0, "decisions": 0, REST: 0}
    for key in steps.keys(include_nested=True, leaves_only=True):
        if key[0] == OBSERVATION:
            kind = "observations"
        elif key in policy.contract.decision_keys and key != ACTION:
            kind = "decisions"
        else:
            kind = FEATURES if key in policy.frozen.out_keys else REST
        found[kind] += bytes_of([steps.get(key)]) // len(steps)
    return found


def _tensors_in(states: Iterable[Mapping[str, Any]]) -> Iterable[Tensor]:
    return (value for state in states for value in state.values() if isinstance(value, Tensor))
