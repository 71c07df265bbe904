"""All that decides a Gymnasium environment's future, as bytes, as far as it can be seen from outside.

Gymnasium has no way to save an environment. What is saved here, along the chain of wrappers and of the environment
itself: attributes that are plain (numbers, texts, NumPy arrays; lists, tuples and dicts of those), NumPy's random
generators, and MuJoCo's state where there is `model` and `data`. What lies elsewhere (other objects, closures, memory
of a C library) is not seen: whether this is enough is tried, see `envs.gym_trial`.

The bytes are JSON and arrays in NumPy's format, read without pickle: reading them runs no code.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import PassiveEnvChecker

# What was given to constructors, and what lies in a place of this machine, is not part of the state.
_CONSTANT = ("env", "spec", "metadata", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs")
_PLAIN = (type(None), bool, int, float)


class _NotPlain(Exception):
    """A value that cannot be written."""


def read_state(env: gymnasium.Env) -> list[dict[str, Any]]:
    """One entry per wrapper, the environment itself last: its attributes by name, and MuJoCo's state."""
    layers = []
    for layer in _layers(env):
        attributes = {name: value for name, value in vars(layer).items() if name not in _CONSTANT}
        layers.append({"attributes": attributes, "mujoco": _read_mujoco(layer)})
    return layers


def to_bytes(state: Any) -> bytes:
    """A tree of dicts, lists and plain values; attributes that are none of these are left out."""
    writer = _Writer()
    tree = writer.write(state, lenient=True)
    file = io.BytesIO()
    text = np.frombuffer(json.dumps(tree).encode(), np.uint8)
    np.savez(file, text, *writer.arrays)
    return file.getvalue()


def from_bytes(data: bytes) -> Any:
    """What `to_bytes` was given; random generators come as `_Draws`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        text, *arrays = (file[name] for name in file.files)
    return _read(json.loads(text.tobytes().decode()), arrays, {})


def write_state(env: gymnasium.Env, layers: list[dict[str, Any]]) -> None:
    """Put an environment where `read_state` found it, or another instance of it.

    Raises:
        ValueError: this is another environment than the one that was saved.
    """
    mine = list(_layers(env))
    if len(mine) != len(layers):
        raise ValueError(f"it has {len(mine)} wrappers, and had {len(layers)} when it was saved")
    made: dict[int, Any] = {}
    for layer, saved in zip(mine, layers, strict=True):
        attributes = vars(layer)
        for name in [name for name in attributes if name not in saved["attributes"] and name not in _CONSTANT]:
            if _is_plain(attributes[name]):
                del attributes[name]  # made after the state was saved
        for name, value in saved["attributes"].items():
            attributes[name] = _with_generators(value, attributes.get(name), made)
        _write_mujoco(layer, saved["mujoco"])


def _layers(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    """The wrappers from outside in, and the environment; the checker is there in the first environment only."""
    while True:
        if not isinstance(env, PassiveEnvChecker):
            yield env
        if not isinstance(env, gymnasium.Wrapper):
            return
        env = env.env


# ------------------------------------------------------------------- values


class _Writer:
    """Values as JSON, with arrays beside it; an array or a generator that has two names is written once."""

    def __init__(self):
        self.arrays: list[np.ndarray] = []
        self._seen: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no id is given twice

    def write(self, value: Any, lenient: bool = False) -> Any:
        if type(value) in _PLAIN:
            return value
        if type(value) is str:
            if os.path.isabs(value):
                raise _NotPlain
            return value
        if type(value) is dict:
            return {"dict": [pair for key, one in value.items() if (pair := self._pair(key, one, lenient))]}
        if type(value) in (list, tuple):
            return {type(value).__name__: [self.write(one, lenient) for one in value]}
        if id(value) not in self._seen:
            self._seen[id(value)] = self._write_object(value)
            self._kept.append(value)
        return self._seen[id(value)]

    def _pair(self, key: Any, value: Any, lenient: bool) -> list | None:
        try:
            return [self.write(key), self.write(value, lenient)]
        except _NotPlain:
            if lenient:
                return None
            raise

    def _write_object(self, value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSU" and not _is_foreign(value):
            self.arrays.append(np.asarray(value))
            return {"array" if isinstance(value, np.ndarray) else "scalar": len(self.arrays) - 1}
        if isinstance(value, np.random.Generator):
            kind, state = type(value.bit_generator).__name__, value.bit_generator.state
        elif isinstance(value, np.random.RandomState):
            kind, state = "RandomState", value.get_state(legacy=False)
        else:
            raise _NotPlain
        return {"generator": kind, "state": self.write(state), "number": len(self._seen)}


def _is_plain(value: Any) -> bool:
    try:
        _Writer().write(value)
    except _NotPlain:
        return False
    return True


def _is_foreign(array: np.ndarray | np.generic) -> bool:
    """Whether an array is a window into a C library's memory, as those of MjData are: it is not the attribute's own."""
    base = array.base
    while isinstance(base, np.ndarray):
        base = base.base
    return type(base).__name__ == "PyCapsule"


def _read(node: Any, arrays: list[np.ndarray], seen: dict[int, np.ndarray]) -> Any:
    if not isinstance(node, dict):
        return node
    if "generator" in node:
        return _Draws(node["generator"], _read(node["state"], arrays, seen), node["number"])
    ((kind, content),) = node.items()
    if kind == "dict":
        return {_read(key, arrays, seen): _read(value, arrays, seen) for key, value in content}
    if kind == "scalar":
        return arrays[content][()]
    if kind == "array":
        return seen.setdefault(content, arrays[content])
    values = [_read(one, arrays, seen) for one in content]
    return tuple(values) if kind == "tuple" else values


def _with_generators(value: Any, existing: Any, made: dict[int, Any]) -> Any:
    """A value with generators in place of their states, the environment's own where it has one already."""
    if isinstance(value, _Draws):
        return value.generator(existing, made)
    if isinstance(value, dict):
        return {key: _with_generators(one, None, made) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_generators(one, None, made) for one in value)
    return value


class _Draws:
    """The state of a random generator, to be given to one."""

    def __init__(self, kind: str, state: dict[str, Any], number: int):
        self.kind, self.state, self.number = kind, state, number

    def generator(self, existing: Any, made: dict[int, Any]) -> Any:
        """The environment's own generator in this state, or a new one; the same for every name that it has."""
        if self.number in made:
            return made[self.number]
        if self.kind == "RandomState":
            made[self.number] = existing if isinstance(existing, np.random.RandomState) else np.random.RandomState()
            made[self.number].set_state(self.state)
            return made[self.number]
        if isinstance(existing, np.random.Generator) and type(existing.bit_generator).__name__ == self.kind:
            made[self.number] = existing
        else:
            made[self.number] = np.random.Generator(_BIT_GENERATORS[self.kind]())
        made[self.number].bit_generator.state = self.state
        return made[self.number]


_BIT_GENERATORS = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}

# ------------------------------------------------------------------- MuJoCo


def _read_mujoco(layer: gymnasium.Env) -> dict[str, np.ndarray] | None:
    """MuJoCo's integration state, and what it has computed from the state before: rewards are made from both."""
    found = _mujoco_of(layer)
    if found is None:
        return None
    mujoco, model, data = found
    what = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, what))
    mujoco.mj_getState(model, data, state, what)
    derived = [getattr(data, name).ravel() for name in _derived(data)]
    return {"state": state, "derived": np.concatenate(derived)}


def _write_mujoco(layer: gymnasium.Env, saved: dict[str, np.ndarray] | None) -> None:
    found = _mujoco_of(layer)
    if found is None or saved is None:
        return
    mujoco, model, data = found
    mujoco.mj_setState(model, data, saved["state"], mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_forward(model, data)  # contacts
    first = 0
    for name in _derived(data):
        array = getattr(data, name)
        array[...] = saved["derived"][first : first + array.size].reshape(array.shape)
        first += array.size


def is_mujoco(env: gymnasium.Env) -> bool:
    """Whether an environment's physics is MuJoCo's, in its own `model` and `data`."""
    return any(_mujoco_of(layer) for layer in _layers(env))


def _mujoco_of(layer: gymnasium.Env) -> tuple[Any, Any, Any] | None:
    model, data = vars(layer).get("model"), vars(layer).get("data")
    if type(model).__name__ != "MjModel" or type(data).__name__ != "MjData":
        return None
    import mujoco

    return mujoco, model, data


def _derived(data: Any) -> list[str]:
    """Numbers of fixed size in MjData; what constraints need has another size at every step, and is computed anew."""
    names = [name for name in dir(data) if not name.startswith(("_", "efc_", "iefc_", "efm_"))]
    return [name for name in names if getattr(getattr(data, name), "dtype", None) == np.float64]
