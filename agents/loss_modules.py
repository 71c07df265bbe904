"""What `ClipPPOLoss` is handed: a `ProbabilisticActor` and a `ValueOperator` around scores that are there already."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torchrl.modules import ProbabilisticActor, ValueOperator

from agents.stages import Direct
from research.schema import ACTION, VALUE

EVALUATED_LOG_PROB, EVALUATED_ENTROPY, EVALUATED_VALUE = "evaluated_log_prob", "evaluated_entropy", "evaluated_value"


class ScoringActor(ProbabilisticActor):
    """An actor whose distribution knows the stored decisions alone, see `EvaluatedActions`.

    Attributes:
        evaluated: the last distribution, for terms that are added to the loss.

    Args:
        score: writes the three evaluated keys of a step, `[B]`.
    """

    def __init__(self, score: TensorDictModuleBase):
        super().__init__(
            score,
            in_keys={"log_prob": EVALUATED_LOG_PROB, "entropy": EVALUATED_ENTROPY},
            out_keys=[ACTION],
            distribution_class=EvaluatedActions,
            return_log_prob=True,
        )

    @property
    def score(self) -> TensorDictModuleBase:
        return self.module[0]

    def get_dist(self, tensordict: TensorDictBase) -> EvaluatedActions:
        # TorchRL's own looks for its last module among all modules of the model, at every call; see `Direct`.
        scored = self.score(tensordict)
        self.evaluated = EvaluatedActions(scored.get(EVALUATED_LOG_PROB), scored.get(EVALUATED_ENTROPY))
        return self.evaluated


class ScoringCritic(Direct, ValueOperator):
    """Hands on the value that the actor's pass has left behind."""

    def __init__(self):
        super().__init__(nn.Identity(), in_keys=[EVALUATED_VALUE], out_keys=[VALUE])


class EvaluatedActions(Distribution):
    """What a model says about the decisions that it was given: log-probability, `[B]` or `[B, L]`, and entropy `[B]`.

    It scores those decisions and no others, and cannot sample.
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real

    def __init__(self, log_prob: Tensor, entropy: Tensor):
        self._log_prob, self._entropy = log_prob, entropy
        super().__init__(entropy.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_prob

    def entropy(self) -> Tensor:
        return self._entropy
