"""TensorDict keys, text as tensors, and the errors that cross module boundaries.

The one module of `research` that `agents` and `envs` may import, so that the three packages agree on names
without knowing each other.

Observation, batch `[B]`, under the key `"observation"`; any of them may be missing:

| key                       | dtype   | shape                              | unit                     |
|---------------------------|---------|------------------------------------|--------------------------|
| `rgb`, `rgb_<camera>`     | uint8   | `[B, H, W, 3]` (or `[B, 3, H, W]`) | 0..255                   |
| `depth`, `depth_<camera>` | float32 | `[B, H, W]`                        | metres                   |
| `proprio`                 | float32 | `[B, P]`                           | documented by each env   |
| `language`                | int64   | `[B, L]`                           | UTF-8 bytes, zero-padded |

An action is float32 `[B, A]`, or `[B, H, A]` for a chunk of H control steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from research.errors import NonFiniteError, UserError

OBSERVATION = "observation"
RGB, DEPTH, PROPRIO, LANGUAGE = "rgb", "depth", "proprio", "language"
MODALITIES = (RGB, DEPTH, PROPRIO, LANGUAGE)

ACTION = "action"
LOG_PROB = "action_log_prob"
VALUE = "state_value"
HIDDEN = "hidden"
SUCCESS = "success"
ENV_STEPS = "env_steps"  # int64 [B, 1], where actions are chunks: control steps that a decision took
SUCCESS_NOW = "success_now"  # bool [B, 1], where actions are chunks: success at its last control step; SUCCESS at any
# Asked for in the TensorDict given to `env.reset`, reported by every reset: which initial state an episode starts from.
INITIAL_STATE = "initial_state"

# name -> (dtype, number of dimensions including the batch)
_LAYOUT = {RGB: (torch.uint8, 4), DEPTH: (torch.float32, 3), PROPRIO: (torch.float32, 2), LANGUAGE: (torch.int64, 2)}


class Demonstration(NamedTuple):
    """One episode that an expert played, of T control steps."""

    number: int
    """The id of its initial state, or its place in a data set."""
    task: str
    """The task's name; empty where there are no names."""
    observations: dict[str, np.ndarray]
    """What a policy sees before control step 0, `every`, 2 `every`, ...: each `[ceil(T / every), ...]`."""
    actions: np.ndarray
    """What the expert does, undisturbed, in the state before each control step: float32 `[T, A]`."""
    rewards: np.ndarray
    """Of each control step, float32 `[T]`."""
    success: bool | None
    """Whether there was success at any step; None: nobody says."""
    every: int
    """Control steps between two observations."""


def base_modality(key: str) -> str | None:
    """The modality whose layout an observation key has: `rgb` for `rgb` and `rgb_wrist`; None for an unknown key."""
    if key in MODALITIES:
        return key
    base, _, camera = key.partition("_")
    return base if base in (RGB, DEPTH) and camera else None


def encode_text(text: str | Sequence[str], length: int) -> Tensor:
    """Text to zero-padded UTF-8 bytes.

    Args:
        text: one string, or a sequence of N strings.
        length: L, the number of bytes kept per string.
    Returns:
        int64 `[L]` for one string, `[N, L]` for a sequence.
    Raises:
        UserError: a string has more than `length` bytes, or holds a NUL character (it would read as padding).
    """
    if isinstance(text, str):
        return _encode_one(text, length)
    return torch.stack([_encode_one(t, length) for t in text]) if text else torch.zeros(0, length, dtype=torch.int64)


def _encode_one(text: str, length: int) -> Tensor:
    raw = text.encode("utf-8")
    if len(raw) > length:
        raise UserError(f"the instruction {text!r} has {len(raw)} bytes, more than the {length} reserved for it")
    if 0 in raw:
        raise UserError(f"the instruction {text!r} holds a NUL character")
    tokens = torch.zeros(length, dtype=torch.int64)
    tokens[: len(raw)] = torch.tensor(list(raw), dtype=torch.int64)
    return tokens


def decode_text(tokens: Tensor) -> list[str]:
    """Zero-padded UTF-8 bytes int64 `[N, L]` back to N strings; each distinct row is decoded once, ever."""
    rows = tokens.to(torch.uint8).cpu().numpy()
    return [_decode_one(row.tobytes()) for row in rows]


@lru_cache(maxsize=65536)
def _decode_one(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8")


def with_text_as(dtype: torch.dtype, step: TensorDictBase) -> TensorDictBase:
    """A step, or a batch of them, whose instruction is of that dtype; a copy where it was not.

    A rollout keeps the instruction as uint8, an eighth of the memory; models read int64.
    """
    text = step.get((OBSERVATION, LANGUAGE), None)
    if text is None or text.dtype == dtype:
        return step
    return step.copy().set((OBSERVATION, LANGUAGE), text.to(dtype))


def check_observation(observation: TensorDictBase, source: str) -> None:
    """Refuse an observation that breaks the table at the top of this module.

    Args:
        observation: the TensorDict under `"observation"`, batch `[B]`.
        source: who made it, for the message ("env 'tabletop'").
    Raises:
        UserError: an unknown key, or a known one with another dtype or number of dimensions.
    """
    for key in observation.keys():
        base = base_modality(key)
        if base is None:
            raise UserError(
                f"{source}: observation has the key {key!r}; the schema knows {', '.join(MODALITIES)}, and "
                f"{RGB}_<camera> and {DEPTH}_<camera>"
            )
        dtype, dims = _LAYOUT[base]
        value = observation.get(key)
        if value.dtype != dtype or value.ndim != dims:
            raise UserError(
                f"{source}: observation {key!r} should be {dtype} with {dims} dimensions (batch first), "
                f"got {value.dtype} {tuple(value.shape)}"
            )


def check_finite_observation(observation: TensorDictBase, when: str) -> None:
    """`check_finite` of every entry of an observation `[B]`."""
    check_finite([(f"observation {key!r}", value) for key, value in observation.items()], when)


def check_finite(named: Iterable[tuple[str, Tensor]], when: str) -> None:
    """Raise `NonFiniteError` naming the first floating-point tensor that holds a NaN or an infinity.

    Args:
        named: (name, tensor) pairs; integer tensors pass.
        when: where in the run this is ("at env step 4096"), for the message.
    """
    floating = [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
    # A sum is a finite number only if all its terms are (the reverse is not true: it may overflow). So one number tells
    # of all tensors, and a GPU is waited for once.
    if math.isfinite(sum(tensor.detach().sum() for _, tensor in floating)):
        return
    for name, tensor in floating:
        bad = (~torch.isfinite(tensor)).nonzero()
        if len(bad):
            index = bad[0].tolist()
            raise NonFiniteError(f"{name} is {tensor[tuple(index)].item()} at index {index} {when}")
