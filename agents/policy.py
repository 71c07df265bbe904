"""VLAPolicy: any model that fulfils the contract of `agents/vla.py`, as the TorchRL modules that collect and train it.

There is one wiring. Frozen stages run once per transition, at collection, and what they write is kept in the rollout;
the other stages run at every look; behind them the model decides, scores or values:

    collecting   Act:    frozen stages -> other stages -> model.decide       action, log-probability, value
    updating     Score:  kept features -> other stages -> model.score        log-probability, entropy, value
                         (frozen ones for whose features there is no room run before the others)
    end states   values: frozen stages -> other stages -> model.state_value

The update sees the same two modules whatever the model is, a `ProbabilisticActor` and a `ValueOperator`.

| the model has                                         | passes per collected step | per minibatch       |
|-------------------------------------------------------|---------------------------|---------------------|
| `stages` and a head (`StagedVLA`), or the whole contract (`DecidingVLA`) | 1      | 1, frozen stages 0  |
| `act`, `evaluate`                                     | 1                         | 1                   |
| the three methods                                     | 3                         | 2                   |
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, exploration_type

from agents.feature_budget import FeatureBudget
from agents.loss_modules import EVALUATED_ENTROPY, EVALUATED_LOG_PROB, EVALUATED_VALUE, ScoringActor, ScoringCritic
from agents.ratio_level import RatioLevel, set_level
from agents.reuse import DistinctInstructions, OncePerInstruction, blocked_stages, split_constant
from agents.stages import Precision, StageSequence, compile_model, is_shared, module_of, reads_instruction, stage_name
from agents.vla import Contract, contract_of
from research.errors import UserError
from research.schema import ACTION, LOG_PROB, OBSERVATION, VALUE, with_text_as


class VLAPolicy:
    """The modules around one model; they share its parameters.

    Build it after freezing: which stages are frozen decides what the rollout keeps.

    Attributes:
        model: the VLA.
        contract: the model, or the adapter that makes its methods the contract.
        frozen, rest: the frozen stages, and the others.
        act: for the collector; reads `observation`, writes `action`, `action_log_prob`, `state_value`, the model's
            `decision_keys`, and the outputs of its frozen stages.
        actor: `ProbabilisticActor` for `ClipPPOLoss`.
        critic: `ValueOperator` for `ClipPPOLoss`; reads what the actor's pass left behind.
        kept_keys: what the update reads of a transition, besides actions and advantages.
        frozen_stages: names of the stages that run at collection only.
        constant_stages: all frozen ones, as they are in the model; reused_modules: what they are, or are methods of.
        blocked_stages: frozen stages that run in the update all the same, and stages that are functions: (name, why).
        shared_stages: names of the stages that train, and run once per distinct instruction of a batch.

    Args:
        model: the VLA.
        feature_reuse: "auto" keeps frozen stages' outputs in the rollout, and runs what reads the instruction alone
            once per distinct one; "off" computes everything anew for every row of every minibatch.
        autocast: "off", or "bf16" to run the model's layers in bfloat16 where autocast does; log-probabilities, values
            and losses stay in float32.
        compile: `torch.compile` the stages, or the methods of a model without stages; on a GPU they then run as CUDA
            graphs.
        ratio_level: which parts of a decision have a log-probability of their own, see `agents.ratio_level`.
        budget: of the bytes of frozen stages' outputs that the rollout keeps; None: all of them.
    Raises:
        UserError: no stage writes what the model says that it reads, or the model offers no such parts.
    """

    def __init__(
        self,
        model: nn.Module,
        feature_reuse: str = "auto",
        autocast: str = "off",
        compile: bool = False,
        ratio_level: RatioLevel = "chunk",
        budget: FeatureBudget | None = None,
    ):
        self.model, self.contract = model, contract_of(model)
        set_level(self.contract, ratio_level, type(model).__name__)
        self.precision = precision = Precision(model, autocast)
        self._graphs = graphs = compile and precision.device_type == "cuda"
        stages = list(self.contract.stages())
        reuse = feature_reuse == "auto"
        constant, others = split_constant(stages) if reuse else ([], stages)
        shared = [s for s in others if reuse and is_shared(s)]
        again = budget.recomputed(constant, others, self.contract.context_keys, precision) if budget else {}
        blocked = [*(blocked_stages(stages) if reuse else []), *((constant[i], why) for i, why in again.items() if why)]
        self.frozen_stages = [stage_name(model, stage) for i, stage in enumerate(constant) if not again.get(i)]
        self.blocked_stages = [(stage_name(model, stage), why) for stage, why in blocked]
        self.shared_stages = [stage_name(model, stage) for stage in shared]
        self.constant_stages, self.reused_modules = constant, [module_of(stage) for stage in constant]
        if compile:  # now that it is known which stages are methods and functions
            compile_model(self.contract, stages, graphs)
        constant = [OncePerInstruction(s) if reads_instruction(s) else s for s in constant]
        others = [DistinctInstructions(s) if s in shared else s for s in others]
        self.frozen = StageSequence(model, constant, precision, graphs)
        self.rest = StageSequence(model, others, precision, graphs)
        redone = [constant[i] for i in again]
        self.update = StageSequence(model, [*redone, *others], precision, graphs) if redone else self.rest
        self.act = Act(self.frozen, self.rest, self.contract, precision)
        self.actor = ScoringActor(Score(self.update, self.contract, precision))
        self.critic = ScoringCritic()
        self.kept_keys = self._kept_keys()

    @property
    def interface(self) -> str:
        """Which form of the contract the model has: "deciding", "staged", "fused" or "methods"."""
        return getattr(self.contract, "interface", "deciding")

    @property
    def score_is_exact(self) -> bool:
        """See `DecidingVLA`; in the precision in which the model is run."""
        with self.precision():
            return getattr(self.contract, "score_is_exact", True)

    def unread(self, keys: Iterable[str]) -> list[str]:
        """Of these observations those that no stage and no head reads; none where the model gets them as a whole."""
        reads = {*self.frozen.in_keys, *self.rest.in_keys, *self.contract.context_keys}
        return [] if OBSERVATION in reads else [key for key in keys if (OBSERVATION, key) not in reads]

    def _kept_keys(self) -> list:
        """Observations and outputs of frozen stages that other stages or the model read; and what was decided."""
        made, inside = set(self.frozen.out_keys), set(self.update.out_keys)
        reads = [*self.update.in_keys, *(key for key in self.contract.context_keys if key not in inside)]
        kept = [key for key in reads if key in made or OBSERVATION in (key, key[0])]
        if lost := [key for key in self.contract.context_keys if key not in inside and key not in kept]:
            raise UserError(f"{type(self.model).__name__}.stages() should end in a stage that writes {lost[0]!r}")
        return list(dict.fromkeys([*kept, *(key for key in self.contract.decision_keys if key != ACTION)]))

    @torch.no_grad()
    def values(self, steps: TensorDictBase) -> Tensor:
        """State values `[B, 1]` of the observations in `steps` `[B]`; nothing is decided."""
        # A CUDA graph for every B that comes along would cost more than it saves.
        with torch.compiler.set_stance("force_eager") if self._graphs else nullcontext():
            return self._value_and_features(steps)[0]

    @torch.no_grad()
    def look_ahead(self, steps: TensorDictBase) -> tuple[Tensor, TensorDictBase | None]:
        """State values `[B, 1]` of observations that will be acted upon next, and their frozen features for then.

        Returns:
            the values; what the frozen stages wrote, for `Act.go_on`, or None if there are no such stages.
        """
        value, features = self._value_and_features(steps)
        return value, features if self.frozen.stages else None

    def _value_and_features(self, steps: TensorDictBase) -> tuple[Tensor, TensorDictBase]:
        step = TensorDict({OBSERVATION: steps.get(OBSERVATION)}, batch_size=steps.batch_size)
        step = self.frozen(with_text_as(torch.int64, step))
        features = step.select(*self.frozen.out_keys)
        step = self.rest(step)
        with self.precision():
            return self.contract.state_value(step).float(), features


class Act(TensorDictModuleBase):
    """Frozen stages, the others, and the model's decision; writes their outputs into what it is given."""

    def __init__(self, frozen: StageSequence, rest: StageSequence, contract: Contract, precision: Precision):
        super().__init__()
        self.frozen, self.rest, self.contract, self.precision = frozen, rest, contract, precision
        self.in_keys = [OBSERVATION]
        self.out_keys = list(dict.fromkeys([*frozen.out_keys, ACTION, *contract.decision_keys, LOG_PROB, VALUE]))

    def forward(self, step: TensorDictBase) -> TensorDictBase:
        return self.go_on(self.frozen(step))

    def go_on(self, step: TensorDictBase) -> TensorDictBase:
        """Act on observations that the frozen stages have seen: their outputs are in `step`."""
        deterministic = exploration_type() in (ExplorationType.DETERMINISTIC, ExplorationType.MODE)
        step = self.rest(step)
        with self.precision():
            step = self.contract.decide(step, deterministic)
        # Whatever the model computes in, environments and the advantages take float32.
        return step.set(ACTION, step.get(ACTION).float()).set(VALUE, step.get(VALUE).float())


class Score(TensorDictModuleBase):
    """What the model says now about the decisions of stored transitions `[B]`: log-probability, entropy, value."""

    def __init__(self, stages: StageSequence, contract: Contract, precision: Precision):
        super().__init__()
        self.stages, self.contract, self.precision = stages, contract, precision
        self.in_keys = [*stages.in_keys, *contract.decision_keys]
        self.out_keys = [EVALUATED_LOG_PROB, EVALUATED_ENTROPY, EVALUATED_VALUE]
        self.run = self.evaluate  # or a module around it, that puts divided weights together

    def forward(self, stored: TensorDictBase) -> TensorDictBase:
        log_prob, entropy, value = self.run(stored)
        stored.set(EVALUATED_LOG_PROB, log_prob.float()).set(EVALUATED_ENTROPY, entropy.float())
        return stored.set(EVALUATED_VALUE, value.float())

    def evaluate(self, stored: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """The three in the model's own precision."""
        step = self.stages(with_text_as(torch.int64, stored))  # a rollout keeps the instruction in bytes
        with self.precision():
            return self.contract.score(step)
