"""The contract of a VLA model: what a model developer writes, and what the rest of the project asks of it.

**Three methods are enough.** An `nn.Module` over a TensorDict of observations (`research/schema.py` has the table):

    forward(observations) -> action                              [B, A], or a chunk [B, H, A]; as the env understands it
    get_value(observations) -> value                             [B, 1]
    evaluate_actions(observations, actions) -> (log_prob, entropy)   [B], [B]

`forward` samples; a `forward(observations, deterministic=False)` is asked for its mode in evaluation.

**Two refinements** bring a collected step or a minibatch down to one pass through the model. Fused methods:

    act(observations, deterministic=False) -> (action, log_prob, value)
    evaluate(observations, actions) -> (log_prob, entropy, value)

or the trunk as named stages, from which frozen ones run once per transition instead of once per epoch (`StagedVLA`).

**Below all of them is one contract**, `DecidingVLA`: stages for what depends on the observation alone, and three
functions of a step, `decide`, `score` and `state_value`. A model whose distribution runs a network on what was sampled
(tokens one after the other, a denoising chain) implements it directly; for every other model it is derived, here,
without work for its author. `agents/policy.py` knows nothing else.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

from tensordict import NonTensorData, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.distributions import Distribution

from agents.action_heads import entropy_of, mode_of
from agents.ratio_level import LEVELS, RatioLevel, log_prob_at
from agents.residual import pretrained_stage, residual_distribution, residual_of
from agents.stages import run_stage
from research.errors import UserError
from research.schema import ACTION, HIDDEN, LANGUAGE, LOG_PROB, OBSERVATION, VALUE, base_modality, decode_text

FUSED_METHODS = ("act", "evaluate")
STAGED_METHODS = ("stages", "action_distribution", "value")
DECIDING_METHODS = ("stages", "decide", "score", "state_value")


class Contract(Protocol):
    """What a policy asks of a model; see `DecidingVLA`."""

    interface: str
    decision_keys: tuple
    context_keys: tuple
    ratio_levels: tuple[RatioLevel, ...]
    ratio_level: RatioLevel
    score_is_exact: bool

    def stages(self) -> list[TensorDictModuleBase]: ...

    def decide(self, step: TensorDictBase, deterministic: bool) -> TensorDictBase: ...

    def score(self, step: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]: ...

    def state_value(self, step: TensorDictBase) -> Tensor: ...


def run_stages(contract: Contract, observations: TensorDictBase) -> TensorDictBase:
    """A step `[B]` with the observations and all that the stages of a contract make of them."""
    step = TensorDict({OBSERVATION: observations}, batch_size=observations.batch_size)
    for stage in contract.stages():
        step = run_stage(stage, step)
    return step


class DecidingVLA(nn.Module):
    """A VLA given by its stages and by what it does with their outputs.

    A subclass names its parts as attributes (`vision_encoder`, `action_head`, ...): these are the names that freezing,
    learning rates and metrics use.

    Attributes:
        decision_keys: what `decide` drew and `score` needs; kept in the rollout as it is.
        context_keys: stage outputs and observations that `decide`, `score` and `state_value` read.
        heads: the parts that the freeze scope "backbone" leaves trainable, as dotted names; None for `action_head` and
            whatever the value alone depends on.
        lora_targets: the layers that get adapters by default, as names, paths and globs; None for all that can carry
            one. `policy.lora.targets` wins.
        entropy_trains: whether the entropy that `score` returns depends on the weights; where it does not, an entropy
            bonus is refused.
        ratio_levels: of which parts of a decision it can say the log-probability, see `agents.ratio_level`.
        ratio_level: of which it does; set by the policy.
        score_is_exact: whether `score` returns what `decide` returned, to rounding, before any weight moves. Where it
            does not (tokens decoded one by one and scored at once, in bfloat16), stored decisions are scored anew
            before an update.
        interface: what this form of the contract is called in messages.
    """

    interface = "deciding"
    decision_keys: tuple = (ACTION,)
    context_keys: tuple = ()
    heads: tuple[str, ...] | None = None
    lora_targets: tuple[str, ...] | None = None
    entropy_trains: bool = True
    ratio_levels: tuple[RatioLevel, ...] = ("chunk",)
    ratio_level: RatioLevel = "chunk"
    score_is_exact: bool = True

    def stages(self) -> list[TensorDictModuleBase]:
        """What depends on the observation alone, in order: modules that read `("observation", key)` or each other."""
        return []

    @abstractmethod
    def decide(self, step: TensorDictBase, deterministic: bool) -> TensorDictBase:
        """Act on what the stages made of an observation `[B]`.

        Writes `action` `[B, A]` or `[B, H, A]`, `action_log_prob` `[B]` (of L parts `[B, L]`, where `ratio_level` says
        so), `state_value` `[B, 1]` and `decision_keys` into `step`, and returns it. Draws from torch's global
        generator, unless `deterministic`, which asks for the likeliest action or what comes nearest to it.
        """

    @abstractmethod
    def score(self, step: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability as `decide` writes it and entropy `[B]` of the stored decision, and state value `[B, 1]`.

        All with gradients.
        """

    @abstractmethod
    def state_value(self, step: TensorDictBase) -> Tensor:
        """The state value `[B, 1]` alone, with nothing decided."""

    def run_stages(self, observations: TensorDictBase) -> TensorDictBase:
        """A step `[B]` with the observations and all that the stages make of them."""
        return run_stages(self, observations)

    def forward(self, observations: TensorDictBase, deterministic: bool = False) -> Tensor:
        return self.decide(self.run_stages(observations), deterministic).get(ACTION)

    def get_value(self, observations: TensorDictBase) -> Tensor:
        return self.state_value(self.run_stages(observations))

    def evaluate_actions(self, observations: TensorDictBase, actions: Tensor) -> tuple[Tensor, Tensor]:
        if tuple(self.decision_keys) != (ACTION,):
            raise UserError(
                f"{type(self).__name__}.evaluate_actions: an action alone does not say what was decided; score a step "
                f"that holds {', '.join(map(str, self.decision_keys))}"
            )
        log_prob, entropy, _ = self.score(self.run_stages(observations).set(ACTION, actions))
        return log_prob, entropy


class StagedVLA(DecidingVLA):
    """A VLA whose trunk ends in a vector `hidden`, from which a distribution over actions and the value follow."""

    interface = "staged"
    context_keys = (HIDDEN,)
    ratio_levels = LEVELS

    @abstractmethod
    def stages(self) -> list[TensorDictModuleBase]:
        """The trunk, in order. The last stage writes `"hidden"`, `[B, D]`."""

    @abstractmethod
    def action_distribution(self, hidden: Tensor) -> Distribution:
        """The policy at `hidden` `[B, D]`: batch shape `[B]`, event shape `[A]` or `[H, A]`."""

    @abstractmethod
    def value(self, hidden: Tensor) -> Tensor:
        """The state value at `hidden` `[B, D]`: `[B, 1]`."""

    def distribution_at(self, step: TensorDictBase) -> Distribution:
        """The policy, with the residual of the freeze scope of that name, at a step whose stages have run."""
        if residual_of(self) is None:
            return self.action_distribution(step.get(HIDDEN))
        return residual_distribution(self, step)

    def decide(self, step: TensorDictBase, deterministic: bool) -> TensorDictBase:
        distribution = self.distribution_at(step)
        if deterministic:
            action = mode_of(distribution)
        else:
            action = distribution.rsample() if distribution.has_rsample else distribution.sample()
        # An action is float32 for every environment, and is scored as it is kept. Whole numbers are exact in it.
        action = action.float()
        step.set(ACTION, action)
        log_prob = log_prob_at(distribution, action, self.ratio_level)
        return step.set(LOG_PROB, log_prob).set(VALUE, self.state_value(step))

    def score(self, step: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        distribution = self.distribution_at(step)
        log_prob = log_prob_at(distribution, step.get(ACTION), self.ratio_level)
        return log_prob, entropy_of(distribution), self.state_value(step)

    def state_value(self, step: TensorDictBase) -> Tensor:
        return self.value(step.get(HIDDEN)).float()

    def encode(self, observations: TensorDictBase) -> Tensor:
        """One pass through the trunk: `hidden`, `[B, D]`."""
        return self.run_stages(observations).get(HIDDEN)


# ------------------------------------------------------------------------------- the contract of every other model


def contract_of(model: nn.Module) -> Contract:
    """The one contract, as this model fulfils it: the model itself, or an adapter around its methods."""
    if residual_of(model) is not None:
        return _WithResidual(model)
    if all(hasattr(model, m) for m in DECIDING_METHODS):
        return model
    if all(hasattr(model, m) for m in STAGED_METHODS):
        return _Staged(model)
    return _Fused(model) if all(hasattr(model, m) for m in FUSED_METHODS) else _ThreeMethods(model)


class _Staged:
    """A model with the methods of a `StagedVLA` that does not derive from it."""

    interface = "staged"
    decision_keys, context_keys = StagedVLA.decision_keys, StagedVLA.context_keys
    ratio_levels, ratio_level, score_is_exact = LEVELS, StagedVLA.ratio_level, StagedVLA.score_is_exact
    decide, score, state_value = StagedVLA.decide, StagedVLA.score, StagedVLA.state_value
    distribution_at = StagedVLA.distribution_at

    def __init__(self, model: nn.Module):
        self.stages, self.action_distribution, self.value = model.stages, model.action_distribution, model.value


class _WithResidual(_Staged):
    """A staged model with a residual policy (`agents/residual.py`): a stage writes what the frozen policy says."""

    def __init__(self, model: nn.Module):
        for method in ("decide", "score", "state_value"):
            if getattr(type(model), method, None) not in (None, getattr(StagedVLA, method)):
                raise UserError(
                    f"policy.freeze: residual adds to action_distribution, past which {type(model).__name__}.{method} "
                    "goes its own way; use backbone or lora"
                )
        self.model, self.residual = model, residual_of(model)
        self.action_distribution, self.value = model.action_distribution, model.value
        self.context_keys = (HIDDEN, *self.residual.keys)

    def stages(self) -> list[TensorDictModuleBase]:
        return [*self.model.stages(), pretrained_stage(self.model)]


class _ThreeMethods:
    """A model of which nothing is known but its three methods: one pass for each of them."""

    interface = "methods"
    decision_keys, context_keys = (ACTION,), (OBSERVATION,)
    ratio_levels, ratio_level, score_is_exact = ("chunk",), "chunk", True

    def __init__(self, model: nn.Module):
        self.model = model
        self.takes_deterministic = "deterministic" in inspect.signature(model.forward).parameters

    def stages(self) -> list[TensorDictModuleBase]:
        return []

    def act(self, observations: TensorDictBase, deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        options = {"deterministic": deterministic} if self.takes_deterministic else {}
        action = self.model(observations, **options).float()  # as the rollout keeps it, and the update scores it
        log_prob, _ = self.model.evaluate_actions(observations, action)
        return action, log_prob, self.model.get_value(observations)

    def evaluate(self, observations: TensorDictBase, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_prob, entropy = self.model.evaluate_actions(observations, actions)
        return log_prob, entropy, self.model.get_value(observations)

    def decide(self, step: TensorDictBase, deterministic: bool) -> TensorDictBase:
        action, log_prob, value = self.act(for_model(self.model, step.get(OBSERVATION)), deterministic=deterministic)
        return step.update({ACTION: action.float(), LOG_PROB: log_prob.float(), VALUE: value.float()})

    def score(self, step: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        return self.evaluate(for_model(self.model, step.get(OBSERVATION)), step.get(ACTION))

    def state_value(self, step: TensorDictBase) -> Tensor:
        return self.model.get_value(for_model(self.model, step.get(OBSERVATION))).float()


class _Fused(_ThreeMethods):
    """A model with `act` and `evaluate`: one pass for a decision, one for its score."""

    interface = "fused"

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.act, self.evaluate = model.act, model.evaluate


def check_modalities(model: nn.Module, modalities: Sequence[str], known: Sequence[str]) -> None:
    """Refuse observations that a built-in model does not know; a further camera has its kind's name and its own.

    Raises:
        UserError: none at all, or an unknown one.
    """
    if not modalities or any(base_modality(modality) not in known for modality in modalities):
        name = type(model).__name__
        raise UserError(f"{name}: modalities are {', '.join(known)}, got {list(modalities)!r}")


def for_model(model: nn.Module, observations: TensorDictBase) -> TensorDictBase:
    """Observations as the model wants them: with the instruction as a list of strings if it declares so.

    Another TensorDict of the same tensors: a method that sets an entry of its own sets it for itself.
    """
    observations = observations.copy()
    if getattr(model, "language_format", "bytes") == "strings" and LANGUAGE in observations.keys():
        text = NonTensorData(decode_text(observations.get(LANGUAGE)), batch_size=observations.batch_size)
        observations.set(LANGUAGE, text)
    return observations
