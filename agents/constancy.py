"""What feature reuse takes for constant, tried; that what trains is registered; and that methods remember nothing.

Which stages are frozen is told from the modules that they hold. What a stage reaches in another way (a list of modules,
a closure, a hook) is not seen there, but its graph shows it, and running it twice shows what it keeps between runs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from agents.critic import parameters_behind, scores
from agents.policy import VLAPolicy
from agents.stages import run_stage, stage_name
from research.errors import UserError
from research.schema import OBSERVATION

METHODS = {"methods": "evaluate_actions", "fused": "evaluate"}  # interface without stages -> its method that scores
TOLERANCE = 1e-5  # relative, of outputs of the same inputs: a GPU may add up in another order


@torch.compiler.set_stance("force_eager")
def check_constant(policy: VLAPolicy, observations: TensorDictBase) -> None:
    """Refuse a model whose frozen stages are not constant, whose methods remember, or that trains the unregistered.

    Args:
        policy: around the model, frozen as it will be.
        observations: a few, as the environment offers them, `[B]`.
    Raises:
        UserError: names the stage, the method or the tensors, and what to do.
    """
    model = policy.model
    with torch.random.fork_rng():
        _refuse_unregistered(model, parameters_behind(*scores(policy.contract, observations)))
        if policy.interface in METHODS:
            with torch.no_grad(), policy.precision():
                _refuse_memory(policy, observations)
        if not policy.constant_stages:
            return
        with torch.enable_grad(), policy.precision():
            first = _outputs(policy, observations)
            for stage, outputs in zip(policy.constant_stages, first, strict=True):
                if behind := parameters_behind(*outputs):
                    raise UserError(
                        f"policy.feature_reuse: the frozen stage {stage_name(model, stage)} depends on "
                        f"{_names(model, behind)}, which train: it reaches them past registration (a list, a closure, "
                        "a hook); make them parts of the stage's module, or set policy.feature_reuse to off"
                    )
        with torch.no_grad(), policy.precision():
            _outputs(policy, _others(observations))
            again = _outputs(policy, observations)
    for stage, one, two in zip(policy.constant_stages, first, again, strict=True):
        if not all(map(_equal, one, two)):
            raise UserError(
                f"policy.feature_reuse: the frozen stage {stage_name(model, stage)} gives another output for the same "
                "input the second time: it is random, or keeps something between runs; set policy.feature_reuse to "
                "off, or stochastic = True on its module"
            )


def _refuse_memory(policy: VLAPolicy, observations: TensorDictBase) -> None:
    """Refuse `get_value` and what scores where they read what an earlier call left behind, such as its features.

    Values of the states that rollouts end in are asked for alone, and minibatches have other rows than what was acted
    on: such a model would give those of other observations.
    """
    contract, name, rows = policy.contract, type(policy.model).__name__, observations.batch_size
    step = contract.decide(TensorDict({OBSERVATION: observations.copy()}, rows), False)
    others = TensorDict({OBSERVATION: _others(observations)}, rows)
    asked = {
        "get_value": lambda: contract.state_value(step),
        METHODS[policy.interface]: lambda: contract.score(step)[0],
    }
    for method, ask in asked.items():
        first, again = ask(), ask()
        for before in (others, others[:1]):
            contract.decide(before.copy(), False)
            try:
                later = ask()
            except Exception:  # whatever a model raises that computes with other rows than it was given
                later = None
            if later is None or later.shape != first.shape or (_close(first, again) and not _close(first, later)):
                raise UserError(
                    f"{name}.{method} depends on what the model did before: for the same observations it gives "
                    "something else once the model has acted on others; let it compute all that it needs, features "
                    "among it, from its arguments, as it is called by itself, too"
                )


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two answers are the same but for rounding, in half precision too."""
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)


def _equal(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def _outputs(policy: VLAPolicy, observations: TensorDictBase) -> list[list[Tensor]]:
    """What each constant stage writes, of floating-point numbers."""
    step = TensorDict({OBSERVATION: observations.copy()}, batch_size=observations.batch_size)
    found = []
    for stage in policy.constant_stages:
        step = run_stage(stage, step)
        outputs = [step.get(key) for key in stage.out_keys]
        found.append([output for output in outputs if output.is_floating_point()])
    return found


def _others(observations: TensorDictBase) -> TensorDictBase:
    """Other observations of the same kind: pictures and numbers differ; texts, and whatever else counts, stay."""
    return observations.apply(_other, batch_size=observations.batch_size)


def _other(value: Tensor) -> Tensor:
    if value.dtype == torch.uint8:
        return value + 100
    return value + 1 if value.is_floating_point() else value  # an index may be the last that there is


def _refuse_unregistered(model: nn.Module, trained: Iterable[Tensor]) -> None:
    known = set(model.parameters())
    if hidden := [tensor for tensor in trained if tensor not in known]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in hidden[:3])
        raise UserError(
            f"{type(model).__name__} uses {len(hidden)} tensors that require gradients and are no parameters of it "
            f"(shapes {shapes}), so that nothing trains or saves them: register them, as in nn.ModuleList for a list "
            "of modules and nn.Parameter for a tensor"
        )


def _names(model: nn.Module, tensors: Iterable[Tensor]) -> str:
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = sorted(names.get(tensor, f"an unregistered tensor {list(tensor.shape)}") for tensor in tensors)
    return ", ".join(found[:3]) + f" and {len(found) - 3} more" * (len(found) > 3)
