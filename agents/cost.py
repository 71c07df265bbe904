"""What a policy costs: FLOPs per transition, and what keeping frozen features saves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase

from agents.flop_counter import FlopCounter
from agents.policy import VLAPolicy
from agents.reuse import OncePerInstruction
from agents.stages import run_stage
from research.schema import ACTION, OBSERVATION, VALUE, with_text_as


@torch.random.fork_rng()
def flops_per_transition(policy: VLAPolicy, observation: TensorDictBase, rows: int = 8) -> tuple[float, float]:
    """FLOPs per transition of a collected step, and of a pass of the update, forward and backward.

    No generator of torch is moved, which a resumed run has just put where it was.

    Args:
        policy: the policy whose passes are counted.
        observation: one of the environment's, `[1]`.
        rows: how many transitions run at once while counting. They count as one instruction where a stage runs once per
            distinct instruction.
    """
    observations = torch.cat([observation] * rows)
    step = TensorDict({OBSERVATION: observations}, batch_size=observations.batch_size)
    with torch.compiler.set_stance("force_eager"):  # compiled code cannot be counted
        with torch.no_grad():
            policy.act(step.copy())  # frozen instruction features are known from here on
            with FlopCounter() as collected:
                step = policy.act(step)
        step = step.select(*policy.kept_keys, ACTION).detach()
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        with FlopCounter() as trained:
            score = policy.actor.get_dist(step).log_prob(None).mean() + policy.critic(step).get(VALUE).mean()
            torch.autograd.grad(score, parameters, allow_unused=True)
    return tuple(counter.get_total_flops() / rows for counter in (collected, trained))


@dataclass
class ReuseReport:
    """What feature reuse keeps and saves, per transition.

    Attributes:
        frozen_stages, blocked_stages, shared_stages: see `VLAPolicy`.
        bytes_before, bytes_after: of the observations, and of what the rollout keeps of a state.
        frozen_flops, trained_flops: of a forward pass through the stages that the update never runs, and of what it
            runs to score a decision (multiply and add count as two); None for a model without stages.
    """

    frozen_stages: list[str]
    blocked_stages: list[tuple[str, str]]
    shared_stages: list[str]
    bytes_before: int
    bytes_after: int
    frozen_flops: int | None
    trained_flops: int | None

    def lines(self) -> list[str]:
        """For a person."""
        lines = []
        if self.frozen_stages:
            share = self.frozen_flops / max(1, self.frozen_flops + self.trained_flops)
            lines.append(
                f"feature reuse: {', '.join(self.frozen_stages)} {'run' if len(self.frozen_stages) > 1 else 'runs'} "
                "once per transition and never in the update, "
                f"which saves {share:.0%} of its forward pass; the rollout keeps {self.bytes_after:,} bytes per "
                f"transition {self._compared()}"
            )
        lines += [f"feature reuse: not of {name}: {why}" for name, why in self.blocked_stages]
        lines += [f"feature reuse: {n} trains, and runs once per distinct instruction" for n in self.shared_stages]
        return lines

    def _compared(self) -> str:
        if self.bytes_after <= self.bytes_before:
            return f"instead of {self.bytes_before:,}"
        return f"where observations have {self.bytes_before:,}: more memory, for less work"


@torch.random.fork_rng()
@torch.no_grad()
def reuse_report(policy: VLAPolicy, observations: TensorDictBase) -> ReuseReport:
    """What keeping frozen stages' outputs saves, measured on a few observations `[B]`; moves no generator of torch."""
    b = observations.batch_size[0]
    before = sum(v.numel() * v.element_size() for v in observations.values()) // b
    if not (policy.frozen.stages or policy.rest.stages):
        return ReuseReport([], [], [], before, before, None, None)
    step = TensorDict({OBSERVATION: observations}, batch_size=[b])
    with torch.compiler.set_stance("force_eager"), policy.precision():
        frozen_flops = 0
        for stage in policy.frozen.stages:
            with FlopCounter() as frozen:  # a table of instructions would hide what its stage costs
                step = run_stage(getattr(stage, "stage", stage), step)
            runs_again = stage in policy.update.stages and not isinstance(stage, OncePerInstruction)
            frozen_flops += 0 if runs_again else frozen.get_total_flops()
        decided = policy.contract.decide(policy.update(step.copy()), False).select(*policy.contract.decision_keys)
        with FlopCounter() as trained:
            policy.contract.score(policy.update(step.copy()).update(decided))
    step = with_text_as(torch.uint8, step)  # as a rollout keeps it
    kept = [step.get(key) for key in policy.kept_keys if key not in policy.contract.decision_keys]
    after = sum(v.numel() * v.element_size() for v in kept) // b
    stages = policy.frozen_stages, policy.blocked_stages, policy.shared_stages
    return ReuseReport(*stages, before, after, frozen_flops // b, trained.get_total_flops() // b)
