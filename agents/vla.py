"""The contract of a VLA model: three methods, and two refinements that make it fast.

A model is an `nn.Module` with

    forward(observations) -> action                              [B, A], in [-1, 1] as the env understands it
    get_value(observations) -> value                             [B, 1]
    evaluate_actions(observations, actions) -> (log_prob, entropy)   [B], [B]

over a TensorDict of observations (`research/schema.py` has the table). That is enough to train, sweep, checkpoint and
evaluate it. `forward` samples; a `forward(observations, deterministic=False)` is asked for its mode in evaluation.

Two optional refinements, either of which brings a collected step or a minibatch down to one pass through the trunk:

    act(observations, deterministic=False) -> (action, log_prob, value)
    evaluate(observations, actions) -> (log_prob, entropy, value)

or the trunk as named stages, from which frozen ones can be run once per transition instead of once per epoch:

    stages() -> list of TensorDict modules, reading ("observation", key) or earlier outputs, ending in "hidden"
    action_distribution(hidden) -> torch Distribution over [B, A]
    value(hidden) -> [B, 1]

`StagedVLA` derives everything above from the stages.
"""

from __future__ import annotations

from abc import abstractmethod

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torch.distributions import Distribution

from research.schema import HIDDEN, OBSERVATION

REQUIRED_METHODS = ("forward", "get_value", "evaluate_actions")
FUSED_METHODS = ("act", "evaluate")
STAGED_METHODS = ("stages", "action_distribution", "value")


class StagedVLA(nn.Module):
    """A VLA given by its stages; the three methods and the fused forms follow from them.

    A subclass names its parts as attributes (`vision_encoder`, `action_head`, ...): these are the names that freezing,
    learning rates and metrics use.
    """

    @abstractmethod
    def stages(self) -> list[TensorDictModuleBase]:
        """The trunk, in order. The last stage writes `"hidden"`, `[B, D]`."""

    @abstractmethod
    def action_distribution(self, hidden: Tensor) -> Distribution:
        """The policy at `hidden` `[B, D]`: batch shape `[B]`, event shape `[A]`."""

    @abstractmethod
    def value(self, hidden: Tensor) -> Tensor:
        """The state value at `hidden` `[B, D]`: `[B, 1]`."""

    def encode(self, observations: TensorDictBase) -> Tensor:
        """One pass through the trunk: `hidden`, `[B, D]`."""
        step = TensorDict({OBSERVATION: observations}, batch_size=observations.batch_size)
        for stage in self.stages():
            step = run_stage(stage, step)
        return step.get(HIDDEN)

    def forward(self, observations: TensorDictBase, deterministic: bool = False) -> Tensor:
        distribution = self.action_distribution(self.encode(observations))
        return distribution.deterministic_sample if deterministic else distribution.sample()

    def get_value(self, observations: TensorDictBase) -> Tensor:
        return self.value(self.encode(observations))

    def evaluate_actions(self, observations: TensorDictBase, actions: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, entropy, _ = self.evaluate(observations, actions)
        return log_prob, entropy

    def act(self, observations: TensorDictBase, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """One trunk pass: action `[B, A]`, its log-probability `[B]`, state value `[B, 1]`."""
        hidden = self.encode(observations)
        distribution = self.action_distribution(hidden)
        action = distribution.deterministic_sample if deterministic else distribution.sample()
        return action, distribution.log_prob(action), self.value(hidden)

    def evaluate(self, observations: TensorDictBase, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One trunk pass: log-probability `[B]` and entropy `[B]` of `actions` `[B, A]`, state value `[B, 1]`."""
        hidden = self.encode(observations)
        distribution = self.action_distribution(hidden)
        return distribution.log_prob(actions), distribution.entropy(), self.value(hidden)


def run_stage(stage: TensorDictModuleBase, tensordict: TensorDictBase) -> TensorDictBase:
    """`stage(tensordict)`; for a plain `TensorDictModule` without what its call costs in Python, 0.1 to 0.2 ms."""
    if type(stage) is not TensorDictModule:
        return stage(tensordict)
    outputs = stage.module(*[tensordict.get(key) for key in stage.in_keys])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for key, output in zip(stage.out_keys, outputs, strict=True):
        tensordict.set(key, output)
    return tensordict
