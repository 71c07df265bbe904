"""One function from an observation to an action, for a robot's own loop: numpy in, numpy out.

    act = serve(model)
    action = act({"rgb": picture, "proprio": joints, "language": "put the cup on the plate"})

It runs the modules that collect rollouts (`agents/policy.py`), and what the environment of training made of an action
before its world got it: a robot gets the action that the world would have got, in its units and within its bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from agents.loading import in_eval_mode
from agents.normalisation import tell_action_map
from agents.policy import VLAPolicy
from research.action_map import ActionMap
from research.errors import UserError, describe_error
from research.schema import ACTION, DEPTH, LANGUAGE, OBSERVATION, PROPRIO, RGB, base_modality, encode_text

PADDING = 16  # bytes behind an instruction whose room is not known

# What a robot gives, of one moment: kind -> (is of this dtype, dimensions, in words).
_KINDS = {
    RGB: (lambda dtype: dtype == np.uint8, 3, "uint8 [H, W, 3], 0 to 255"),
    DEPTH: (lambda dtype: np.issubdtype(dtype, np.floating), 2, "float [H, W], metres"),
    PROPRIO: (lambda dtype: np.issubdtype(dtype, np.floating), 1, "float [P]"),
}


def serve(
    model: nn.Module,
    example: TensorDictBase | None = None,
    autocast: str = "off",
    action_map: ActionMap | None = None,
) -> Callable[..., np.ndarray]:
    """A function that acts on observations, one at a time.

    Args:
        model: the VLA, wherever it lies; put in eval mode.
        example: observations `[B]` as the model was trained on: others than of these shapes are then refused, and an
            instruction has as many bytes as there.
        autocast: as in training, see `VLAPolicy`.
        action_map: the environment's of training. None: actions are the model's own numbers, not clipped; with
            statistics of a robot's data they are in its units, and else those of a model trained on bounded actions
            mean their bounds at -1 and 1.
    Returns:
        `act(observation, deterministic=True)`: the action, `[A]`, or `[H, A]` where H control steps are executed before
        the next look; float32, or with an `action_map` of its shape and dtype. The observation has, for each key that
        the model reads, a picture uint8 `[H, W, 3]`, a depth float `[H, W]`, `proprio` float `[P]`, or, as `language`,
        a string. What is not deterministic draws from torch's global generator; a flow draws what it denoises in either
        case. It raises a `UserError`, of one line that names the key, where a key is missing or too many, or has
        another dtype or shape, or numbers that are not finite. What a model reads that has no `observation_keys` is
        found by leaving out one key of the example after the other; the others may be given.
    """
    tell_action_map(model, action_map)
    policy = VLAPolicy(in_eval_mode(model), autocast=autocast)
    keys = known = getattr(model, "observation_keys", None)
    if keys is None and example is not None:
        keys, known = _keys_read(policy, example, _device_of(model)), sorted(example.keys())

    @torch.no_grad()
    def act(observation: Mapping[str, Any], deterministic: bool = True) -> np.ndarray:
        _check_keys(observation, keys, known)
        seen = {key: _as_tensor(key, value, example) for key, value in observation.items()}
        step = TensorDict({OBSERVATION: {key: value[None] for key, value in seen.items()}}, [1]).to(_device_of(model))
        with set_exploration_type(ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM):
            action = policy.act(step).get(ACTION)[0].float().cpu().numpy()
        return action if action_map is None else action_map(action)

    return act


def _device_of(model: nn.Module) -> torch.device:
    """Where a model lies by now: whoever serves one may move it."""
    return next(model.parameters()).device


@torch.no_grad()
def _keys_read(policy: VLAPolicy, example: TensorDictBase, device: torch.device) -> list[str]:
    """Keys of observations like these without which a model fails, or does something else."""
    with torch.random.fork_rng():
        seen = {key: _anything_like(key, value[:1].cpu()) for key, value in sorted(example.items())}

        def act(without: str | None = None) -> Tensor:
            torch.manual_seed(0)  # a flow draws what it denoises
            given = {key: value for key, value in seen.items() if key != without}
            with set_exploration_type(ExplorationType.DETERMINISTIC):
                return policy.act(TensorDict({OBSERVATION: given}, [1]).to(device)).get(ACTION)

        try:
            whole, keys = act(), []
        except Exception as error:  # whatever a model raises that these observations are not for
            raise UserError(
                f"the model cannot act on observations of {', '.join(seen)}: {describe_error(error)}"
            ) from error
        for key in seen:
            try:
                same = torch.equal(act(without=key), whole)
            except Exception:  # whatever a model raises that lacks what it reads
                same = False
            if not same:
                keys.append(key)
    return keys


def _anything_like(key: str, value: Tensor) -> Tensor:
    """An observation's entry of that shape and dtype, of numbers that a model tells from none."""
    if value.dtype.is_floating_point:
        return torch.rand(value.shape, dtype=value.dtype) + 0.1
    low, high = (97, 123) if key == LANGUAGE else (0, 256)  # letters of an instruction, or pixels
    return torch.randint(low, high, value.shape, dtype=value.dtype)


def _check_keys(observation: Mapping[str, Any], keys: Iterable[str] | None, known: Iterable[str] | None) -> None:
    for key in keys or ():
        if key not in observation:
            raise UserError(f"observation: {key!r} is missing; the model reads {', '.join(keys)}")
    for key in observation:
        if (known is not None and key not in known) or base_modality(key) is None:
            reads = "" if keys is None else f"; it reads {', '.join(keys)}"
            raise UserError(f"observation: {key!r} is nothing that the model reads{reads}")


def _as_tensor(key: str, value: Any, example: TensorDictBase | None) -> Tensor:
    """One entry of an observation, as the schema has it but for the batch."""
    known = None if example is None else example.get(key, None)
    shape = None if known is None else tuple(known.shape[1:])
    if key == LANGUAGE:
        if not isinstance(value, str):
            raise UserError(f"observation: {key!r} should be a string, got {type(value).__name__}")
        # With bytes of padding behind it, as in training: a model may see that a text ends.
        return encode_text(value, len(value.encode()) + PADDING if shape is None else shape[0])
    is_kind, dimensions, words = _KINDS[base_modality(key)]
    if not isinstance(value, np.ndarray):
        raise UserError(f"observation: {key!r} should be a numpy array {words}, got {type(value).__name__}")
    if not is_kind(value.dtype) or value.ndim != dimensions:
        raise UserError(f"observation: {key!r} should be {words}, got {value.dtype} {list(value.shape)}")
    if shape is None and value.ndim == 3 and value.shape[-1] != 3:
        raise UserError(f"observation: {key!r} should be {words}, got {list(value.shape)}")
    if shape is not None and value.shape != shape:
        raise UserError(f"observation: {key!r} was {list(shape)} in training, got {list(value.shape)}")
    if value.dtype != np.uint8 and not np.isfinite(value).all():
        raise UserError(f"observation: {key!r} has numbers that are not finite")
    return torch.from_numpy(np.ascontiguousarray(value if value.dtype == np.uint8 else value.astype(np.float32)))
