"""`--dry_run` of the training scripts: what a run would need, without running it.

    python experiments/ppo_vla.py --config experiments/configs/openvla.json --dry_run
    python experiments/grpo_vla.py --dry_run
    python experiments/bc_vla.py --dry_run

Nothing is trained, and no folder made. The environment is, with two rows; the model is made of shapes without values,
so that OpenVLA-7B takes half a minute, and no memory to speak of. Not counted: the environment, libraries, and what
kernels allocate for themselves. Where all fits, a decision and a minibatch are timed with the real model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import packages  # noqa: F401

import torch
from accounting import Needs, model_of_shapes, needs_of_run, offered_by
from accounting_imitation import clone_steps, needs_of_imitation, sample_of
from assembling import Assembly, assemble, choose_device
from tensordict import TensorDictBase
from torch import nn

from agents.memory_guard import free_bytes, in_gib
from agents.policy import VLAPolicy
from agents.shapes_only import rows_like
from research.config import ExperimentConfig
from research.errors import UserError
from research.imitation.config import CloningConfig
from research.schema import ACTION, LOG_PROB, VALUE
from research.training.grpo import REFERENCE

T = TypeVar("T")


def dry_run(config: ExperimentConfig) -> int:
    """`--dry_run` of `ppo_vla.py` and `grpo_vla.py`."""
    trainer, cfg = config.trainer, config.algorithm.cfg
    device = choose_device(trainer.device)
    needs = needs_of_run(config, offered_by(trainer.env, trainer.env_config, device, trainer.seed), device)
    print("\n".join(describe(needs)))
    if trainer.buffer_type != "standard":
        print("time: not estimated, as other processes collect while the update runs; their memory is not counted")
    elif (parts := _if_it_fits(needs, lambda: assemble(config))) is not None:
        decision, minibatch = time_of_decision(parts), time_of_minibatch(config, parts)
        decisions = -(-needs.transitions // trainer.num_envs)
        minibatches = cfg.n_epochs * -(-needs.transitions // cfg.batch_size)
        print(
            f"time of an iteration: {decisions * decision + minibatches * minibatch:.3g} s, from one step of "
            f"{trainer.num_envs} environments ({decision:.3g} s, {decisions} of them) and one minibatch "
            f"({minibatch:.3g} s, {minibatches} of them); without evaluations and checkpoints"
        )
        parts.rollouts.shutdown()
    return 0


def dry_run_imitation(
    build: Callable[..., nn.Module],
    cloning: CloningConfig,
    scope: str | Sequence[str],
    samples: int,
    observations: TensorDictBase,
    action_shape: Sequence[int],
    device: str,
) -> int:
    """`--dry_run` of `bc_vla.py`.

    Args:
        build: makes the model, frozen as it will be, with what `load` returns in place of `load_vla_model`.
        device: its name.
        cloning, scope, samples, observations, action_shape: see `needs_of_imitation`.
    """
    where = torch.device(device)
    model = build(load=model_of_shapes)
    needs = needs_of_imitation(model, scope, cloning, samples, observations, action_shape, where)
    print("\n".join(describe(needs)))
    if (model := _if_it_fits(needs, build)) is None:
        return 0
    policy = VLAPolicy(model)
    data = rows_like(sample_of(policy, observations, action_shape, where), cloning.batch_size, where)
    step = _seconds(lambda: clone_steps(policy.model, policy, data, cloning, count=1), where)
    steps = cloning.steps or cloning.epochs * (samples // cloning.batch_size)
    in_all = f", {steps:,} of them: {steps * step:.3g} s" if steps else ""
    print(f"time of a gradient step, from one: {step:.3g} s{in_all}")
    return 0


def describe(needs: Needs) -> list[str]:
    """For a person, on one screen."""
    total, trained = (sum(getattr(part, what) for part in needs.parts) for what in ("parameters", "trained"))
    lines = [
        f"{needs.model} on {needs.device}, frozen: {needs.scope}",
        "",
        f"{'part':<24}{'parameters':>16}{'that train':>16}{'share':>8}",
    ]
    for name, parameters, training in [*needs.parts, ("in all", total, trained)]:
        lines.append(f"{name:<24}{parameters:>16,}{training:>16,}{training / max(1, parameters):>8.1%}")
    lines += ["", f"{'kept per transition':<48}{'bytes':>16}"]
    lines += [f"{kind:<48}{size:>16,}" for kind, size in needs.kept.items()]
    lines.append(f"{'in all':<48}{sum(needs.kept.values()):>16,}")
    if needs.frozen_stages:
        lines.append(f"(features of {', '.join(needs.frozen_stages)})")
    counts = {
        "rollout": f"{needs.transitions:,} transitions" + (" at most" if needs.at_most else ""),
        "data": f"{needs.transitions:,} samples" if needs.transitions else "as many samples as the expert gives",
        "minibatch": f"{needs.minibatch:,} at once",
        "activations": f"of {needs.micro:,} at once",
    }
    lines += ["", f"{'memory':<48}{'where':>8}{'GiB':>12}"]
    for kind, size in needs.memory.items():
        named = f"{kind} ({counts[kind]})" if kind in counts else kind
        lines.append(f"{named:<48}{needs.device.type:>8}{size / 2**30:>12.3f}")
    for name, size in (("most at once in an update", needs.updating), ("most at once in collecting", needs.collecting)):
        if size:
            lines.append(f"{name:<48}{needs.device.type:>8}{size / 2**30:>12.3f}")
    if (free := free_bytes(needs.device)) is not None:
        lines.append(f"{'free now':<48}{needs.device.type:>8}{free / 2**30:>12.3f}")
    return lines


def _if_it_fits(needs: Needs, build: Callable[[], T]) -> T | None:
    """What `build` makes; None where there is no room for the run, or a file is absent: says that and why."""
    free = free_bytes(needs.device)
    try:
        if free is not None and needs.total > free:
            raise UserError(f"the run needs {in_gib(needs.total)} on {needs.device}, where {in_gib(free)} are free")
        return build()
    except UserError as error:
        print(f"time: not estimated: {error}")
        return None


# --------------------------------------------------------------------------------------------------------------- time


def time_of_decision(parts: Assembly) -> float:
    """Seconds in which all environments take a step: the policy's decision, and the simulators'."""
    env, policy = parts.rollouts.env, parts.policy
    with torch.no_grad():
        start = env.reset()
        return _seconds(lambda: env.step(policy.act(start.copy())), parts.device)


def time_of_minibatch(config: ExperimentConfig, parts: Assembly) -> float:
    """Seconds of a gradient step."""
    cfg, update, policy = config.algorithm.cfg, parts.algorithm.policy_update, parts.policy
    micro = min(cfg.micro_batch_size or cfg.batch_size, cfg.batch_size)
    with torch.no_grad():
        step = policy.act(parts.rollouts.env.reset()).select(*policy.kept_keys, ACTION, LOG_PROB, VALUE)
    rows = torch.arange(micro, device=parts.device) % len(step)
    few = step.apply(lambda tensor: tensor.index_select(0, rows), batch_size=[micro])
    few.set("advantage", torch.randn(micro, 1, device=parts.device)).set("value_target", few[VALUE].clone())
    few.set(REFERENCE, few[LOG_PROB].clone())
    passes = _seconds(lambda: update._accumulate(few, value_only=False), parts.device)

    def take() -> None:
        update.clip()
        update.optimizer.step()

    return cfg.batch_size / micro * passes + _seconds(take, parts.device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of the second time, as the first does more."""
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - start
    return taken
