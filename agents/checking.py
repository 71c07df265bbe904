"""A model tried out on a few observations, before anything heavy starts; where it is wrong, it is said plainly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from agents.policy import VLAPolicy
from agents.vla import DecidingVLA, for_model
from research.errors import UserError, one_line
from research.schema import ACTION, LOG_PROB, VALUE


def check_policy(
    policy: VLAPolicy,
    observations: TensorDictBase,
    action_shape: Sequence[int],
    choices: Sequence[int] | None = None,
) -> None:
    """As `check_model`, and refuse a policy with nothing to learn.

    Raises:
        UserError: also where the log-probability depends on no parameter that trains.
    """
    what, log_prob = check_model(policy.model, observations, action_shape, choices)
    if any(p.requires_grad for p in policy.model.parameters()) and not log_prob.requires_grad:
        raise UserError(f"{what}: log_prob depends on no trainable parameter, so nothing would be learned")


@torch.compiler.set_stance("force_eager")
def check_model(
    model: nn.Module,
    observations: TensorDictBase,
    action_shape: Sequence[int],
    choices: Sequence[int] | None = None,
) -> tuple[str, Tensor]:
    """Run the model once on a few observations and refuse wrong shapes and dtypes.

    The model's methods run as they are written, whatever a policy compiles.

    Args:
        model: the VLA.
        observations: what the environment will offer, batch `[B]`, B >= 2 so that a lost batch dimension shows.
        action_shape: of one action of the environment: `[A]`, or `[H, A]` for chunks.
        choices: how many each component of an action has, where the environment takes choices; None: it is continuous.
    Returns:
        the name of the method that scores, and the log-probability that it gave.
    Raises:
        UserError: says the method, what was expected and what was got.
    """
    wanted = getattr(model, "observation_keys", ())
    missing = [key for key in wanted if key not in observations.keys()]
    if missing:
        raise UserError(
            f"{_name(model)} reads {', '.join(missing)}, but the environment offers "
            f"{', '.join(sorted(observations.keys()))}; tell the model in policy.vla_config.model_config which "
            "modalities there are"
        )
    check = _check_deciding if isinstance(model, DecidingVLA) else _check_methods
    return check(model, observations, tuple(action_shape), choices)


def _check_methods(
    model: nn.Module, observations: TensorDictBase, action_shape: tuple, choices: Sequence[int] | None
) -> tuple[str, Tensor]:
    name, b = _name(model), observations.batch_size[0]
    observations = for_model(model, observations)
    with torch.no_grad():
        action = _call(f"{name}.forward", model, observations)
        if choices is not None and isinstance(action, Tensor):
            action = action.float()  # as a rollout keeps it
        _expect_action(f"{name}.forward (the action)", action, (b, *action_shape))
        _expect_choices(f"{name}.forward", action, choices)
        _expect(f"{name}.get_value", _call(f"{name}.get_value", model.get_value, observations), (b, 1))
    scores = _call(f"{name}.evaluate_actions", model.evaluate_actions, observations, action)
    if not isinstance(scores, tuple) or len(scores) != 2:
        raise UserError(f"{name}.evaluate_actions should return (log_prob, entropy), got {type(scores).__name__}")
    for what, score in zip(("log_prob", "entropy"), scores, strict=True):
        _expect(f"{name}.evaluate_actions ({what})", score, (b,))
    return f"{name}.evaluate_actions", scores[0]


def _check_deciding(
    model: DecidingVLA, observations: TensorDictBase, action_shape: tuple, choices: Sequence[int] | None
) -> tuple[str, Tensor]:
    name, b, chunk = _name(model), observations.batch_size[0], (1, *action_shape)[-2:]
    with torch.no_grad():
        step = _call(f"{name}.stages", model.run_stages, observations)
        step = _call(f"{name}.decide", model.decide, step, False)
        _expect_action(f"{name}.decide ({ACTION})", step.get(ACTION, None), (b, *action_shape))
        parts = {"chunk": (), "action": (chunk[0],), "token": (chunk[0] * chunk[1],)}[model.ratio_level]
        for key, shape in ((LOG_PROB, (b, *parts)), (VALUE, (b, 1))):
            _expect(f"{name}.decide ({key})", step.get(key, None), shape)
        _expect_choices(f"{name}.decide", step.get(ACTION), choices)
        for key in model.decision_keys:
            if step.get(key, None) is None:
                raise UserError(f"{name}.decide should write {key!r}, which decision_keys names")
        _expect(f"{name}.state_value", _call(f"{name}.state_value", model.state_value, step), (b, 1))
    seen = _call(f"{name}.stages", model.run_stages, observations).update(step.select(*model.decision_keys))
    scores = _call(f"{name}.score", model.score, seen)
    if not isinstance(scores, tuple) or len(scores) != 3:
        raise UserError(f"{name}.score should return (log_prob, entropy, value), got {type(scores).__name__}")
    for what, score, shape in zip(("log_prob", "entropy", "value"), scores, ((b, *parts), (b,), (b, 1)), strict=True):
        _expect(f"{name}.score ({what})", score, shape)
    return f"{name}.score", scores[0]


def _call(what: str, method: Callable, *arguments) -> Any:
    try:
        return method(*arguments)
    except UserError:
        raise
    except Exception as error:  # the user's own code: anything can come out of it
        raise UserError(
            f"{what} failed on the environment's observations: {type(error).__name__}: {one_line(error)}"
        ) from error


def _expect(what: str, value: Any, shape: tuple[int, ...]) -> None:
    expected = f"a float tensor {list(shape)}"
    if not isinstance(value, Tensor):
        raise UserError(f"{what}: expected {expected}, got {type(value).__name__}")
    if tuple(value.shape) != shape or not value.is_floating_point():
        raise UserError(f"{what}: expected {expected}, got {value.dtype} {list(value.shape)}")


def _expect_action(what: str, action: Any, shape: tuple[int, ...]) -> None:
    """As `_expect`; where actions are chunks, or the model's are and should not be, that is said as well."""
    chunks = len(shape) == 3 or (isinstance(action, Tensor) and action.ndim == 3)
    try:
        _expect(what, action, shape)
    except UserError as error:
        executed = shape[1] if len(shape) == 3 else 1
        hint = f": trainer.env_config.chunk is {executed}, and the model's actions [B, H, A] should have as many"
        raise UserError(f"{error}{hint if chunks else ''}") from None


def _expect_choices(what: str, action: Tensor, choices: Sequence[int] | None) -> None:
    if choices is None:
        return
    last = torch.tensor(choices, device=action.device) - 1
    wrong = (action != action.round()) | (action < 0) | (action > last)
    if wrong.any():
        raise UserError(
            f"{what}: the environment takes choices, whole numbers from 0 to {last.tolist()}, got "
            f"{action[wrong][0].item():.4g}; give the model's constructor the argument action_choices "
            "(how many there are) and let it draw from agents.action_heads.CategoricalHead"
        )


def _name(model: nn.Module) -> str:
    return type(model).__name__
