"""VLAPolicy: any model with the three methods, as the TorchRL modules that collect and train it.

Whatever the model offers, the update sees the same two modules, a `ProbabilisticActor` and a `ValueOperator`, and the
collector one module that acts:

| interface | the model has                          | trunk passes per collected step | per minibatch |
|-----------|----------------------------------------|---------------------------------|---------------|
| staged    | `stages`, `action_distribution`, `value` | 1                             | 1, frozen stages 0 |
| fused     | `act`, `evaluate`                      | 1                               | 1             |
| methods   | the three methods                      | 3                               | 2             |
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.utils.flop_counter import FlopCounterMode
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import ProbabilisticActor, ValueOperator

from agents.vla import FUSED_METHODS, STAGED_METHODS, run_stage
from research.schema import ACTION, HIDDEN, LANGUAGE, LOG_PROB, OBSERVATION, VALUE, UserError, decode_text, with_text_as

log = logging.getLogger(__name__)

INTERFACES = {"staged": STAGED_METHODS, "fused": FUSED_METHODS, "methods": ()}
EVALUATED_LOG_PROB, EVALUATED_ENTROPY, EVALUATED_VALUE = "evaluated_log_prob", "evaluated_entropy", "evaluated_value"


class VLAPolicy:
    """The modules around one model; they share its parameters.

    Build it after freezing: which stages are frozen decides what the rollout keeps.

    Attributes:
        interface: "staged", "fused" or "methods".
        act: for the collector; reads `observation`, writes `action`, `action_log_prob`, `state_value` and, for a staged
            model, the outputs of its frozen stages.
        actor: `ProbabilisticActor` for `ClipPPOLoss`.
        critic: `ValueOperator` for `ClipPPOLoss`; reads what the actor's pass left behind.
        kept_keys: what the update reads of a transition, besides actions and advantages.
        frozen_stages: names of the stages that run at collection only.
        blocked_stages: frozen stages that run in the update all the same, and stages that are functions: (name, why).
        shared_stages: names of the stages that train, and run once per distinct instruction of a batch.

    Args:
        model: the VLA.
        feature_reuse: "auto" keeps frozen stages' outputs in the rollout, and runs what reads the instruction alone
            once per distinct one; "off" computes everything anew for every row of every minibatch.
        interface: one of the table's, or "auto" for the first that the model has.
        autocast: "off", or "bf16" to run the trunk and the heads' layers in bfloat16 where autocast does;
            log-probabilities, values and losses stay in float32.
        compile: `torch.compile` the stages, or the methods of a model without stages; on a GPU they then run as CUDA
            graphs.
    Raises:
        UserError: the model lacks the methods of the interface asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        feature_reuse: str = "auto",
        interface: str = "auto",
        autocast: str = "off",
        compile: bool = False,
    ):
        self.model = model
        self.interface = _choose_interface(model, interface)
        self.frozen_stages: list[str] = []
        self.blocked_stages: list[tuple[str, str]] = []
        self.shared_stages: list[str] = []
        self._precision = Precision(model, autocast)
        self._graphs = compile and self._precision.device_type == "cuda"
        if self.interface == "staged":
            self._wire_stages(feature_reuse, compile)
        else:
            self._wire_methods(compile)

    def _wire_stages(self, feature_reuse: str, compile: bool) -> None:
        stages = list(self.model.stages())
        if not stages or HIDDEN not in stages[-1].out_keys:
            raise UserError(f"{_name(self.model)}.stages() should end in a stage that writes 'hidden'")
        prefix, rest = split_frozen_prefix(stages) if feature_reuse == "auto" else ([], stages)
        self.frozen_stages = [stage_name(self.model, stage) for stage in prefix]
        if feature_reuse == "auto":
            self.blocked_stages = [(stage_name(self.model, s), why) for s, why in blocked_stages(stages)]
            shared = [s for s in rest if _reads_instruction(s) and not _is_random(s) and not _mixes_rows(s)]
            self.shared_stages = [stage_name(self.model, stage) for stage in shared]
            rest = [DistinctInstructions(s) if s in shared else s for s in rest]
        if compile:  # now that it is known which stages are methods and functions
            for stage in stages:
                _compile(stage, self._graphs and not _reads_instruction(stage))  # of instructions the number varies
        prefix = [OncePerInstruction(s) if _reads_instruction(s) else s for s in prefix]
        self.prefix = StageSequence(self.model, prefix, self._precision, self._graphs)
        rest = StageSequence(self.model, rest, self._precision, self._graphs)
        self.actor = _StagedActor(
            rest,
            in_keys={"hidden": HIDDEN},
            out_keys=[ACTION],
            distribution_class=_ActionDistribution(self.model, self._precision),
            return_log_prob=True,
        )
        self.critic = _Critic(_ValueHead(self.model, self._precision), in_keys=[HIDDEN], out_keys=[VALUE])
        self.act = StagedAct(self.prefix, self.actor, self.critic)
        written = {key for stage in prefix for key in stage.out_keys}
        self.kept_keys = [key for key in rest.in_keys if key in written or key[0] == OBSERVATION]

    def _wire_methods(self, compile: bool) -> None:
        act, evaluate = _act_and_evaluate(self.model)
        if self._graphs:
            act, evaluate = _as_graphs(act), _as_graphs(evaluate)
        elif compile:
            act, evaluate = torch.compile(act), torch.compile(evaluate)
        self.prefix = None
        self.actor = ProbabilisticActor(
            MethodEvaluation(self.model, evaluate, self._precision),
            in_keys={"log_prob": EVALUATED_LOG_PROB, "entropy": EVALUATED_ENTROPY},
            out_keys=[ACTION],
            distribution_class=EvaluatedActions,
            return_log_prob=True,
        )
        self.critic = _Critic(nn.Identity(), in_keys=[EVALUATED_VALUE], out_keys=[VALUE])
        self.act = MethodActor(self.model, act, self._precision)
        self.kept_keys = [OBSERVATION]

    @torch.no_grad()
    def values(self, steps: TensorDictBase) -> Tensor:
        """State values `[B, 1]` of the observations in `steps` `[B]`; the frozen and the trainable trunk both run."""
        if self._graphs:  # a graph for every B that comes along would cost more than it saves
            with torch.compiler.set_stance("force_eager"):
                return self._values(steps)
        return self._values(steps)

    @torch.no_grad()
    def look_ahead(self, steps: TensorDictBase) -> tuple[Tensor, TensorDictBase | None]:
        """State values `[B, 1]` of observations that will be acted upon next, and their frozen features for then.

        Returns:
            the values; what the frozen stages wrote, for `StagedAct.go_on`, or None if there are no such stages.
        """
        if not self.frozen_stages:
            return self._values(steps), None
        step = self.prefix(TensorDict({OBSERVATION: steps.get(OBSERVATION)}, batch_size=steps.batch_size))
        features = step.select(*self.prefix.out_keys)
        return self.critic(self.actor.module[0](step)).get(VALUE), features

    def _values(self, steps: TensorDictBase) -> Tensor:
        if self.interface != "staged":
            with self._precision():
                return self.model.get_value(_for_model(self.model, steps.get(OBSERVATION))).float()
        steps = TensorDict({OBSERVATION: steps.get(OBSERVATION)}, batch_size=steps.batch_size)
        return self.critic(self.actor.module[0](self.prefix(steps))).get(VALUE)

    def flops(self, observation: TensorDictBase, rows: int = 8) -> tuple[float, float]:
        """FLOPs per transition of a collected step, and of a pass of the update, forward and backward.

        Args:
            observation: one of the environment's, `[1]`.
            rows: that run at once, so many that they fit in memory. They count as one instruction where a stage runs
                once per distinct instruction.
        """
        rows = torch.cat([observation] * rows)
        step = TensorDict({OBSERVATION: rows}, batch_size=rows.batch_size)
        with torch.compiler.set_stance("force_eager"):  # compiled code cannot be counted
            with torch.no_grad(), torch.random.fork_rng():
                self.act(step.copy())  # frozen instruction features are known from here on
                with FlopCounter() as collected:
                    step = self.act(step)
            step = step.select(*self.kept_keys, ACTION).detach()
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            with FlopCounter() as trained:
                score = (
                    self.actor.get_dist(step).log_prob(step.get(ACTION)).mean() + self.critic(step).get(VALUE).mean()
                )
                torch.autograd.grad(score, parameters, allow_unused=True)
        return tuple(c.get_total_flops() / len(rows) for c in (collected, trained))

    @torch.no_grad()
    def reuse_report(self, observations: TensorDictBase) -> ReuseReport:
        """What keeping frozen stages' outputs saves, measured on a few observations `[B]`."""
        b = observations.batch_size[0]
        before = sum(v.numel() * v.element_size() for v in observations.values()) // b
        if self.interface != "staged":
            return ReuseReport([], [], [], before, before, None, None)
        step = TensorDict({OBSERVATION: observations}, batch_size=[b])
        # In eval of the counter the language table would hide what a stage costs: run the stages themselves.
        with FlopCounter() as frozen:
            for stage in self.prefix.stages:
                step = run_stage(getattr(stage, "stage", stage), step)
        with FlopCounter() as trained:
            self.critic(self.actor.module[0](step))
        step = with_text_as(torch.uint8, step)  # as a rollout keeps it
        kept = [step.get(key) for key in self.kept_keys]
        after = sum(v.numel() * v.element_size() for v in kept) // b
        frozen_flops, flops = (c.get_total_flops() // b for c in (frozen, trained))
        stages = self.frozen_stages, self.blocked_stages, self.shared_stages
        return ReuseReport(*stages, before, after, frozen_flops, flops)


class FlopCounter(FlopCounterMode):
    """Counts FLOPs in total, not by module: finding out the module fails on the parameters of TorchRL's losses."""

    def __init__(self):
        super().__init__(display=False)
        self.mod_tracker = _OneModule()


class _OneModule(nullcontext):
    """In the place of torch's `ModuleTracker`."""

    parents = frozenset({"Global"})


@dataclass
class ReuseReport:
    """What feature reuse keeps and saves, per transition.

    Attributes:
        frozen_stages, blocked_stages, shared_stages: see `VLAPolicy`.
        bytes_before, bytes_after: of the observations, and of what the rollout keeps in their place.
        frozen_flops, trained_flops: of a forward pass through the frozen and the trainable part of the trunk (multiply
            and add count as two); None for a model without stages.
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
                f"transition instead of {self.bytes_before:,}"
            )
        lines += [f"feature reuse: not of {name}: {why}" for name, why in self.blocked_stages]
        lines += [f"feature reuse: {n} trains, and runs once per distinct instruction" for n in self.shared_stages]
        return lines


def _choose_interface(model: nn.Module, interface: str) -> str:
    if interface == "auto":
        return next(name for name, methods in INTERFACES.items() if all(hasattr(model, m) for m in methods))
    missing = [m for m in INTERFACES[interface] if not hasattr(model, m)]
    if missing:
        raise UserError(f"{_name(model)} has no {', '.join(missing)}, which the {interface!r} interface needs")
    return interface


# -------------------------------------------------------------------------------------------------- staged models


def split_frozen_prefix(
    stages: Sequence[TensorDictModuleBase],
) -> tuple[list[TensorDictModuleBase], list[TensorDictModuleBase]]:
    """Split stages into those whose outputs depend on frozen parameters only, and the rest.

    A stage is in the first list if none of its own parameters is trainable, it is not random, and everything it reads
    is an observation or comes from such a stage. (A frozen stage behind a trainable one is not: its inputs change with
    every update. Behind a random one its inputs change with every look.)
    """
    constant, frozen, rest = set(), [], []
    for stage in stages:
        if _reads_constants(stage, constant) and not _trains(stage) and not _is_random(stage):
            constant.update(stage.out_keys)
            frozen.append(stage)
        else:
            rest.append(stage)
    return frozen, rest


def blocked_stages(stages: Sequence[TensorDictModuleBase]) -> list[tuple[TensorDictModuleBase, str]]:
    """Stages that would be reused but for something that a user may not expect, and what it is."""
    frozen, rest = split_frozen_prefix(stages)
    constant = {key for stage in frozen for key in stage.out_keys}
    blocked = []
    for stage in rest:
        if _is_opaque(stage):
            blocked.append((stage, "it is a function, which may use any weights; make it an nn.Module"))
        if _trains(stage) or not any(True for _ in stage.parameters()):
            continue
        changing = [k for k in stage.in_keys if not _reads_constants_key(k, constant)]
        behind = ", ".join(k if isinstance(k, str) else ".".join(k) for k in changing)
        blocked.append((stage, f"it reads {behind}, which changes" if behind else "it is random, as dropout is"))
    return blocked


def _trains(stage: TensorDictModuleBase) -> bool:
    return _is_opaque(stage) or any(p.requires_grad for p in _parameters(stage))


def _parameters(stage: TensorDictModuleBase) -> Iterator[nn.Parameter]:
    """A stage's parameters; those of the whole model where the stage is one of the model's methods."""
    owner = getattr(getattr(stage, "module", None), "__self__", None)
    return owner.parameters() if isinstance(owner, nn.Module) else stage.parameters()


def _is_opaque(stage: TensorDictModuleBase) -> bool:
    """A plain function may use any weights."""
    module = getattr(stage, "module", stage)
    return not isinstance(module, nn.Module) and not isinstance(getattr(module, "__self__", None), nn.Module)


def _is_random(stage: TensorDictModuleBase) -> bool:
    """A module says so itself (`stochastic = True`, as an augmentation does), or is a dropout that is on."""
    dropout = nn.modules.dropout._DropoutNd
    return any(
        getattr(m, "stochastic", False) or (isinstance(m, dropout) and m.training and m.p > 0) for m in stage.modules()
    )


def _mixes_rows(stage: TensorDictModuleBase) -> bool:
    """A batch norm that is on: what it makes of a row depends on the other rows."""
    return any(isinstance(m, nn.modules.batchnorm._NormBase) and m.training for m in stage.modules())


def _reads_instruction(stage: TensorDictModuleBase) -> bool:
    """Whether the instruction is all that a stage reads."""
    return stage.in_keys == [(OBSERVATION, LANGUAGE)]


def _reads_constants(stage: TensorDictModuleBase, constant: set) -> bool:
    return all(_reads_constants_key(key, constant) for key in stage.in_keys)


def _reads_constants_key(key, constant: set) -> bool:
    return key in constant or key[0] == OBSERVATION


# What mode="reduce-overhead" means, for fixed sizes, and rounding to bfloat16 wherever eager code does: compiled for
# collection and for training, the same layers are fused differently, and the ratio would not start at 1.
GRAPHS = {"options": {"triton.cudagraphs": True, "emulate_precision_casts": True}, "dynamic": False}


def _compile(stage: TensorDictModuleBase, graphs: bool) -> None:
    """`torch.compile` what a stage runs: a module in place, a method or function by its compiled form."""
    module, options = getattr(stage, "module", stage), GRAPHS if graphs else {}
    if isinstance(module, nn.Module):
        module.compile(**options)
    else:
        stage.module = torch.compile(module, **options)


def _as_graphs(method: Callable) -> Callable:
    """A model's method as CUDA graphs: what it returns is copied, as the next run writes to the same memory."""
    compiled = torch.compile(method, **GRAPHS)

    def run(*arguments, **options) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(output.clone() for output in compiled(*arguments, **options))

    return run


def stage_name(model: nn.Module, stage: TensorDictModuleBase) -> str:
    """The name of the model's part that a stage runs, or else the keys it writes."""
    inner = getattr(stage, "module", stage)
    names = [name for name, module in model.named_modules() if module is inner and name]
    return names[0] if names else "+".join(map(str, stage.out_keys))


class StageSequence(TensorDictModuleBase):
    """Some of a model's stages in a row, possibly none; holds the whole model, so that its heads come along.

    Where they run as CUDA graphs, what they wrote is copied, as the next run writes to the same memory.
    """

    def __init__(
        self, model: nn.Module, stages: Sequence[TensorDictModuleBase], precision: Precision, graphs: bool = False
    ):
        super().__init__()
        self.model, self.stages, self._precision, self._graphs = model, list(stages), precision, graphs
        written, self.in_keys = set(), []
        for stage in self.stages:
            self.in_keys += [key for key in stage.in_keys if key not in written and key not in self.in_keys]
            written.update(stage.out_keys)
        self.in_keys = self.in_keys or [HIDDEN]
        self.out_keys = [key for stage in self.stages for key in stage.out_keys] or [HIDDEN]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        step = with_text_as(torch.int64, tensordict)
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with self._precision():
            for stage in self.stages:
                step = run_stage(stage, step)
        if self._graphs:
            step.update({key: step.get(key).clone() for stage in self.stages for key in stage.out_keys})
        if step is tensordict:
            return step
        return tensordict.update({key: step.get(key) for key in self.out_keys})


class Precision:
    """Autocast around the model's own computations: `with precision():`.

    Args:
        model: where its parameters lie decides the device type.
        autocast: "off" or "bf16".
    """

    def __init__(self, model: nn.Module, autocast: str):
        self.device_type = next(model.parameters()).device.type
        self.dtype = {"off": None, "bf16": torch.bfloat16}[autocast]
        capability = torch.backends.cpu.get_cpu_capability()
        if self.dtype is not None and self.device_type == "cpu" and not capability.startswith("AVX512"):
            # Measured with AVX2: matrix products 70 times slower than in float32.
            log.warning("trainer.autocast: this CPU (%s) has no bfloat16 instructions, bf16 will be slower", capability)

    def __call__(self) -> AbstractContextManager:
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)


class OncePerInstruction(TensorDictModuleBase):
    """A frozen stage that reads the instruction alone, run once for each distinct one and looked up from then on.

    Each instruction is encoded by itself, so that its features do not depend on what else was in the batch. Loading
    other weights empties the table. Looking up is done on the device, which is waited for once.

    Args:
        stage: the frozen stage; writes tensors `[B, ...]`.
        capacity: distinct instructions kept; a full table starts anew. A batch with more of them, or with two whose
            hashes are equal, goes through the stage as it is.
    """

    def __init__(self, stage: TensorDictModuleBase, capacity: int = 8192):
        super().__init__()
        self.stage, self.capacity = stage, capacity
        self.in_keys, self.out_keys = stage.in_keys, stage.out_keys
        self._weights_version = None
        self._forget()

    def _forget(self) -> None:
        self._texts: Tensor | None = None  # [K, L], in the order in which they came
        self._features: list[Tensor] = []  # [capacity, ...], the first K of them filled, in the same order
        self._hashes: Tensor | None = None  # [K], sorted
        self._entries: Tensor | None = None  # [K], which text each of them is of

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        tokens = tensordict.get(self.in_keys[0])
        version = sum(p._version for p in self.stage.parameters())
        if version != self._weights_version:
            self._forget()
            self._weights_version = version
        entries = self._find(tokens)
        if entries is None:
            self._learn(tokens)
            entries = self._find(tokens)
        if entries is None:
            return run_stage(self.stage, tensordict)
        features = [table.index_select(0, entries) for table in self._features]
        return tensordict.update(dict(zip(self.out_keys, features, strict=True)))

    def _find(self, tokens: Tensor) -> Tensor | None:
        """The entry of each row, `[B]`; None unless the table has them all."""
        if self._texts is None:
            return None
        place = torch.searchsorted(self._hashes, text_hashes(tokens)).clamp_(max=len(self._hashes) - 1)
        entries = self._entries[place]
        return entries if torch.equal(self._texts[entries], tokens) else None

    def _learn(self, tokens: Tensor) -> None:
        """Add the rows that the table lacks, if it can hold them."""
        texts = tokens[distinct_rows(tokens)[0]]
        if self._texts is not None:
            new = texts[~torch.isin(text_hashes(texts), self._hashes)]
            if len(self._texts) + len(new) > self.capacity or self._texts.shape[1] != tokens.shape[1]:
                self._forget()
        new = texts if self._texts is None else new
        if len(new) > self.capacity:
            return
        known = 0 if self._texts is None else len(self._texts)
        for i, text in enumerate(new, known):
            alone = run_stage(self.stage, TensorDict({self.in_keys[0]: text[None]}, batch_size=[1]))
            encoded = [alone.get(key) for key in self.out_keys]
            if not self._features:
                self._features = [e.new_empty(self.capacity, *e.shape[1:]) for e in encoded]
            for table, e in zip(self._features, encoded, strict=True):
                table[i] = e[0]
        self._texts = new if self._texts is None else torch.cat([self._texts, new])
        self._hashes, self._entries = text_hashes(self._texts).sort()


class DistinctInstructions(TensorDictModuleBase):
    """A trainable stage that reads the instruction alone, run once for each distinct one of a batch.

    A minibatch of thousands of transitions comes from some hundred episodes, and an episode has one instruction. Each
    row gets the features of its instruction, and the gradients of rows that share one add up there: what every row
    computed for itself would give, but for the order of the sum.

    Args:
        stage: writes tensors `[B, ...]`, each row from that row's instruction alone.
    """

    def __init__(self, stage: TensorDictModuleBase):
        super().__init__()
        self.stage, self.in_keys, self.out_keys = stage, stage.in_keys, stage.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        tokens = tensordict.get(self.in_keys[0])  # [B, L]
        rows, which = distinct_rows(tokens)
        if 2 * len(rows) > len(tokens):  # then looking up costs more than it saves
            return run_stage(self.stage, tensordict)
        few = run_stage(self.stage, TensorDict({self.in_keys[0]: tokens[rows]}, batch_size=[len(rows)]))
        return tensordict.update({key: few.get(key).index_select(0, which) for key in self.out_keys})


def text_hashes(tokens: Tensor) -> Tensor:
    """A 64-bit hash of every row of int64 `[B, L]`: `[B]`."""
    return (tokens * _hash_weights(tokens.shape[1], tokens.device)).sum(dim=1)  # integers wrap around


@lru_cache
def _hash_weights(length: int, device: torch.device) -> Tensor:
    """Odd numbers `[L]`, the same ones in every process."""
    weights = torch.randint(-(2**63), 2**63 - 1, (length,), generator=torch.Generator().manual_seed(0))
    return (weights | 1).to(device)


def distinct_rows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of int64 `[B, L]`: one row number per distinct row, `[U]`, and for each row which of those it equals, `[B]`.

    By a 64-bit hash, since sorting whole rows takes longer than many encoders; should two texts ever collide, all rows
    count as distinct.
    """
    b = len(tokens)
    everything = torch.arange(b, device=tokens.device)
    _, which = torch.unique(text_hashes(tokens), return_inverse=True)
    count = int(which.max()) + 1 if b else 0
    rows = torch.full((count,), b, device=tokens.device).scatter_reduce_(0, which, everything, "amin")
    return (rows, which) if torch.equal(tokens[rows[which]], tokens) else (everything, everything)


class StagedAct(TensorDictModuleBase):
    """Frozen stages, actor and critic in a row; writes their outputs into what it is given.

    Where actions are drawn at random, as in every collected step, the actor's distribution is sampled here: that saves
    what TorchRL's modules cost in Python. How to act otherwise is left to the actor.
    """

    def __init__(self, prefix: StageSequence, actor: ProbabilisticActor, critic: ValueOperator):
        super().__init__()
        self.prefix, self.actor, self.critic = prefix, actor, critic
        sequence = TensorDictSequential(prefix, actor, critic)
        self.in_keys, self.out_keys = sequence.in_keys, sequence.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self.go_on(self.prefix(tensordict))

    def go_on(self, step: TensorDictBase) -> TensorDictBase:
        """Act on observations that the frozen stages have seen: their outputs are in `step`."""
        if exploration_type() is not ExplorationType.RANDOM:
            return self.critic(self.actor(step))
        distribution = self.actor.get_dist(step)
        action = distribution.rsample() if distribution.has_rsample else distribution.sample()
        return self.critic(step.set(ACTION, action).set(LOG_PROB, distribution.log_prob(action)))


class _StagedActor(ProbabilisticActor):
    """A `ProbabilisticActor` that goes from its stages to their distribution without a detour through key lookups."""

    def get_dist(self, tensordict: TensorDictBase) -> Distribution:
        stages, head = self.module
        return head.distribution_class(stages(tensordict).get(HIDDEN))


class _Critic(ValueOperator):
    """A `ValueOperator` without what a TensorDict module's call costs in Python, 0.2 ms."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set(self.out_keys[0], self.module(tensordict.get(self.in_keys[0])))


class _ActionDistribution:
    """`distribution_class` of the staged actor: the model's own `action_distribution`."""

    def __init__(self, model: nn.Module, precision: Precision):
        self.model, self._precision = model, precision

    def __call__(self, hidden: Tensor) -> Distribution:
        with self._precision():
            return self.model.action_distribution(hidden)


class _ValueHead(nn.Module):
    def __init__(self, model: nn.Module, precision: Precision):
        super().__init__()
        self.model, self._precision = model, precision

    def forward(self, hidden: Tensor) -> Tensor:
        with self._precision():
            return self.model.value(hidden).float()


# ----------------------------------------------------------------------------- models with methods, fused or not


def _act_and_evaluate(model: nn.Module) -> tuple[Callable, Callable]:
    """A model's fused methods, or the same two functions made from its three methods."""
    if all(hasattr(model, m) for m in FUSED_METHODS):
        return model.act, model.evaluate
    takes_deterministic = "deterministic" in inspect.signature(model.forward).parameters

    def act(observations: TensorDictBase, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        action = model(observations, deterministic=deterministic) if takes_deterministic else model(observations)
        log_prob, _ = model.evaluate_actions(observations, action)
        return action, log_prob, model.get_value(observations)

    def evaluate(observations: TensorDictBase, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_prob, entropy = model.evaluate_actions(observations, actions)
        return log_prob, entropy, model.get_value(observations)

    return act, evaluate


def _for_model(model: nn.Module, observations: TensorDictBase) -> TensorDictBase:
    """Observations as the model wants them: with the instruction as a list of strings if it declares so."""
    if getattr(model, "language_format", "bytes") == "strings" and LANGUAGE in observations.keys():
        text = NonTensorData(decode_text(observations.get(LANGUAGE)), batch_size=observations.batch_size)
        observations = observations.copy().set(LANGUAGE, text)
    return observations


class MethodActor(TensorDictModuleBase):
    """Acts through `act(observations, deterministic)`; writes action, log-probability and value."""

    in_keys = [OBSERVATION]  # noqa: RUF012
    out_keys = [ACTION, LOG_PROB, VALUE]  # noqa: RUF012

    def __init__(self, model: nn.Module, act: Callable, precision: Precision):
        super().__init__()
        self.model, self._act, self._precision = model, act, precision

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        deterministic = exploration_type() in (ExplorationType.DETERMINISTIC, ExplorationType.MODE)
        observations = _for_model(self.model, tensordict.get(OBSERVATION))
        with self._precision():
            action, log_prob, value = self._act(observations, deterministic=deterministic)
        return tensordict.update({ACTION: action.float(), LOG_PROB: log_prob.float(), VALUE: value.float()})


class MethodEvaluation(TensorDictModuleBase):
    """Scores stored actions through `evaluate(observations, actions)`."""

    in_keys = [OBSERVATION, ACTION]  # noqa: RUF012
    out_keys = [EVALUATED_LOG_PROB, EVALUATED_ENTROPY, EVALUATED_VALUE]  # noqa: RUF012

    def __init__(self, model: nn.Module, evaluate: Callable, precision: Precision):
        super().__init__()
        self.model, self._evaluate, self._precision = model, evaluate, precision

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        observations = _for_model(self.model, with_text_as(torch.int64, tensordict).get(OBSERVATION))
        with self._precision():
            scores = self._evaluate(observations, tensordict.get(ACTION))
        return tensordict.update({key: score.float() for key, score in zip(self.out_keys, scores, strict=True)})


class EvaluatedActions(Distribution):
    """What a black-box model says about the actions it was given: a log-probability and an entropy, both `[B]`.

    Scores those actions and no others; it cannot sample.
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real

    def __init__(self, log_prob: Tensor, entropy: Tensor):
        self._log_prob, self._entropy = log_prob, entropy
        super().__init__(log_prob.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_prob

    def entropy(self) -> Tensor:
        return self._entropy


# ------------------------------------------------------------------------------------------------------- checking


@torch.compiler.set_stance("force_eager")
def check_policy(policy: VLAPolicy, observations: TensorDictBase, action_dim: int) -> None:
    """Run the model once on a few observations and refuse wrong shapes and dtypes, before anything heavy starts.

    The model's methods run as they are written, whatever the policy compiles.

    Args:
        policy: the policy under test.
        observations: what the environment will offer, batch `[B]`, B >= 2 so that a lost batch dimension shows.
        action_dim: A of the environment.
    Raises:
        UserError: says the method, what was expected and what was got.
    """
    model, b = policy.model, observations.batch_size[0]
    name = _name(model)
    wanted = getattr(model, "observation_keys", ())
    missing = [key for key in wanted if key not in observations.keys()]
    if missing:
        raise UserError(
            f"{name} reads {', '.join(missing)}, but the environment offers {', '.join(sorted(observations.keys()))}; "
            "tell the model in policy.vla_config.model_config which modalities there are"
        )
    observations = _for_model(model, observations)
    with torch.no_grad():
        action = _call(f"{name}.forward", model, observations)
        _expect(f"{name}.forward (the action)", action, (b, action_dim))
        _expect(f"{name}.get_value", _call(f"{name}.get_value", model.get_value, observations), (b, 1))
    scores = _call(f"{name}.evaluate_actions", model.evaluate_actions, observations, action)
    if not isinstance(scores, tuple) or len(scores) != 2:
        raise UserError(f"{name}.evaluate_actions should return (log_prob, entropy), got {type(scores).__name__}")
    for what, score in zip(("log_prob", "entropy"), scores, strict=True):
        _expect(f"{name}.evaluate_actions ({what})", score, (b,))
    if any(p.requires_grad for p in model.parameters()) and not scores[0].requires_grad:
        raise UserError(
            f"{name}.evaluate_actions: log_prob depends on no trainable parameter, so nothing would be learned"
        )


def _call(what: str, method: Callable, *arguments):
    try:
        return method(*arguments)
    except UserError:
        raise
    except Exception as error:  # the user's own code: anything can come out of it
        detail = " ".join(str(error).split())
        raise UserError(f"{what} failed on the environment's observations: {type(error).__name__}: {detail}") from error


def _expect(what: str, value, shape: tuple[int, ...]) -> None:
    expected = f"a float tensor {list(shape)}"
    if not isinstance(value, Tensor):
        raise UserError(f"{what}: expected {expected}, got {type(value).__name__}")
    if tuple(value.shape) != shape or not value.is_floating_point():
        raise UserError(f"{what}: expected {expected}, got {value.dtype} {list(value.shape)}")


def _name(model: nn.Module) -> str:
    return type(model).__name__
