"""A model tried out on a few observations, before anything heavy starts; where it is wrong, it is said plainly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from agents.critic import scores
from agents.policy import VLAPolicy
from agents.vla import Contract, DecidingVLA, contract_of, for_model, run_stages
from research.errors import UserError, one_line, place_of
from research.schema import ACTION, LOG_PROB, VALUE


def check_policy(
    policy: VLAPolicy,
    observations: TensorDictBase,
    action_shape: Sequence[int],
    choices: Sequence[int] | None = None,
) -> None:
    """As `check_model`, and refuse a policy with nothing to learn.

    Raises:
        UserError: also where the log-probability depends on no parameter that trains, or is rounded in the precision in
            which the policy runs.
    """
    what, log_prob = check_model(policy.model, observations, action_shape, choices, policy.contract)
    if any(p.requires_grad for p in policy.model.parameters()) and not log_prob.requires_grad:
        raise UserError(f"{what}: log_prob depends on no trainable parameter, so nothing would be learned")
    if policy.precision.dtype is not None:
        with policy.precision():
            log_prob, *_ = _call(what, scores, policy.contract, observations)
    if log_prob.dtype in (torch.bfloat16, torch.float16):
        kind = str(log_prob.dtype).removeprefix("torch.")
        raise UserError(
            f"{what}: log_prob is {kind}, whose numbers near -5 are {4 * torch.finfo(log_prob.dtype).eps:.2g} apart: "
            "small steps are lost; compute the distribution in float32, as in Categorical(logits=logits.float())"
        )


@torch.compiler.set_stance("force_eager")
def check_model(
    model: nn.Module,
    observations: TensorDictBase,
    action_shape: Sequence[int],
    choices: Sequence[int] | None = None,
    contract: Contract | None = None,
) -> tuple[str, Tensor]:
    """Run the model once on a few observations and refuse wrong shapes and dtypes, and what writes into observations.

    Also refused is extra state that a checkpoint would hold, and nobody could read again.

    The methods that a run will call are tried, as they are written, whatever a policy compiles.

    Args:
        model: the VLA.
        observations: what the environment will offer, batch `[B]`, B >= 2 so that a lost batch dimension shows.
        action_shape: of one action of the environment: `[A]`, or `[H, A]` for chunks.
        choices: how many each component of an action has, where the environment takes choices; None: it is continuous.
        contract: the policy's, where there is one; None: the model's own.
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
    _refuse_unreadable(model)
    contract = contract or contract_of(model)
    versions = {key: value._version for key, value in observations.items()}
    if getattr(contract, "interface", "deciding") == "methods":
        tried = _check_methods(model, observations, tuple(action_shape), choices)
    else:
        tried = _check_contract(model, contract, observations, tuple(action_shape), choices)
    if written := [key for key, version in versions.items() if observations.get(key)._version != version]:
        raise UserError(
            f"{_name(model)} writes into {', '.join(written)}, which the rollout keeps and the update scores; let it "
            "work on a copy, as in x = x / 255 instead of x /= 255"
        )
    return tried


def _refuse_unreadable(model: nn.Module) -> None:
    for name, entry in model.state_dict().items():
        if isinstance(entry, Tensor):
            continue
        try:
            torch.save(entry, written := BytesIO())
            written.seek(0)
            torch.load(written, weights_only=True)
        except Exception as error:  # pickle raises nearly any
            raise UserError(
                f"{_name(model)}.state_dict: {name} holds what no checkpoint would give back ({type(entry).__name__}); "
                "let get_extra_state return tensors, numbers and texts alone, in lists and dicts if need be"
            ) from error


def _check_methods(
    model: nn.Module, observations: TensorDictBase, action_shape: tuple, choices: Sequence[int] | None
) -> tuple[str, Tensor]:
    name, b, given = _name(model), observations.batch_size[0], observations
    with torch.no_grad():
        action = _call(f"{name}.forward", model, for_model(model, given))
        if choices is not None and isinstance(action, Tensor):
            action = action.float()  # as a rollout keeps it
        _expect_action(f"{name}.forward (the action)", action, (b, *action_shape))
        _expect_choices(f"{name}.forward", action, choices)
        _expect(f"{name}.get_value", _call(f"{name}.get_value", model.get_value, for_model(model, given)), (b, 1))
    scores = _call(f"{name}.evaluate_actions", model.evaluate_actions, for_model(model, given), action)
    if not isinstance(scores, tuple) or len(scores) != 2:
        raise UserError(f"{name}.evaluate_actions should return (log_prob, entropy), got {type(scores).__name__}")
    for what, score in zip(("log_prob", "entropy"), scores, strict=True):
        _expect(f"{name}.evaluate_actions ({what})", score, (b,))
    return f"{name}.evaluate_actions", scores[0]


def _check_contract(
    model: nn.Module,
    contract: Contract,
    observations: TensorDictBase,
    action_shape: tuple,
    choices: Sequence[int] | None,
) -> tuple[str, Tensor]:
    """As `check_model`, of all that does more than the three methods; messages name the methods of the user's."""
    name, b, chunk = _name(model), observations.batch_size[0], (1, *action_shape)[-2:]
    fused = getattr(contract, "interface", "deciding") == "fused"
    if not fused and getattr(model, "language_format", "bytes") != "bytes":
        raise UserError(
            f"{name}.language_format: stages read the instruction as bytes, int64 [B, L]; "
            "research.schema.decode_text makes strings of them"
        )
    if fused:
        decide, score, state_value = "act", "evaluate", "get_value"
    elif isinstance(model, DecidingVLA):
        decide, score, state_value = "decide", "score", "state_value"
    else:
        decide, score, state_value = "action_distribution", "action_distribution", "value"

    with torch.no_grad():
        step = _call(f"{name}.stages", run_stages, contract, observations)
        step = _call(f"{name}.{decide}", contract.decide, step, False)
        _expect_action(f"{name}.{decide} ({ACTION})", step.get(ACTION, None), (b, *action_shape))
        parts = {"chunk": (), "action": (chunk[0],), "token": (chunk[0] * chunk[1],)}[contract.ratio_level]
        for key, shape in ((LOG_PROB, (b, *parts)), (VALUE, (b, 1))):
            _expect(f"{name}.{decide} ({key})", step.get(key, None), shape)
        _expect_choices(f"{name}.{decide}", step.get(ACTION), choices)
        for key in contract.decision_keys:
            if step.get(key, None) is None:
                raise UserError(f"{name}.{decide} should write {key!r}, which decision_keys names")
        _expect(f"{name}.{state_value}", _call(f"{name}.{state_value}", contract.state_value, step), (b, 1))
    seen = _call(f"{name}.stages", run_stages, contract, observations).update(step.select(*contract.decision_keys))
    scores = _call(f"{name}.{score}", contract.score, seen)
    if not isinstance(scores, tuple) or len(scores) != 3:
        raise UserError(f"{name}.{score} should return (log_prob, entropy, value), got {type(scores).__name__}")
    for what, one, shape in zip(("log_prob", "entropy", "value"), scores, ((b, *parts), (b,), (b, 1)), strict=True):
        _expect(f"{name}.{score} ({what})", one, shape)
    return f"{name}.{score}", scores[0]


def _call(what: str, method: Callable, *arguments) -> Any:
    try:
        return method(*arguments)
    except UserError:
        raise
    except Exception as error:  # the user's own code: anything can come out of it
        raise UserError(
            f"{what} failed on the environment's observations: {type(error).__name__}: {one_line(error)} "
            f"({place_of(error)}); it was given {_layout(arguments)}"
        ) from error


def _layout(arguments: tuple) -> str:
    """The tensors that a method was called with, each with its dtype and shape."""
    given = next(one for one in arguments if isinstance(one, TensorDictBase | Mapping))
    flat = given.flatten_keys(".") if isinstance(given, TensorDictBase) else given
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    return ", ".join(f"{key} {str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for key, one in tensors.items())


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
