"""All that decides a Gymnasium environment's future, as bytes, as far as it can be seen from outside.

Gymnasium has no way to save an environment. What is saved here, along the chain of wrappers and of the environment
itself: attributes that are plain (numbers, texts, NumPy arrays; lists, tuples, deques, sets and dicts of those),
NumPy's random generators, the attributes of objects of a user's own classes, which are written back into the object
that is there, and MuJoCo's state where there is `model` and `data`. What lies elsewhere (closures, memory of a C
library) is not seen: whether this is enough is tried, see `envs.gym_trial`. Attributes that may hold state and cannot
be saved are named by `unsaved`, since it may show later than any trial lasts.

The bytes are JSON and arrays in NumPy's format, read without pickle: reading them runs no code.
"""

from __future__ import annotations

import enum
import io
import json
import os
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.wrappers import PassiveEnvChecker

# What was given to constructors, and what lies in a place of this machine, is not part of the state.
_CONSTANT = ("env", "spec", "metadata", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs")
# Packages whose objects are spaces, renderers, pictures, ... : what of their state counts is tried, or known here.
_KNOWN_PACKAGES = sys.stdlib_module_names | {"numpy", "gymnasium", "mujoco", "pygame", "glfw", "OpenGL", "PIL", "cv2"}
_CONTAINERS = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque"}
_DEEPEST = 50  # objects within objects; what lies deeper (a linked list) is not followed
_PLAIN = (type(None), bool, int, float)


class _NotPlain(Exception):
    """A value that cannot be written; `holds_state`: it may be part of what decides the future."""

    def __init__(self, holds_state: bool = False):
        super().__init__()
        self.holds_state = holds_state


class _Partial(dict):
    """A dict as it was saved; `left_out` are the keys of entries that could not be."""

    left_out: tuple = ()


class _Object(NamedTuple):
    """The attributes of an object, to be written into one; None: this is the object of that number once more."""

    number: int
    kind: str
    attributes: _Partial | None


class _Member(NamedTuple):
    """A member of an enumeration."""

    kind: str
    name: str


def read_state(env: gymnasium.Env) -> list[dict[str, Any]]:
    """One entry per wrapper, the environment itself last: its attributes by name, and MuJoCo's state."""
    layers = []
    for layer in _layers(env):
        attributes = {name: value for name, value in vars(layer).items() if name not in _CONSTANT}
        layers.append({"attributes": attributes, "mujoco": _read_mujoco(layer)})
    return layers


def unsaved(env: gymnasium.Env, known: frozenset[str] | None = None) -> list[str]:
    """The attributes that may hold a part of the state which `read_state` does not bring back, "clock (Clock)" each.

    Args:
        env: the environment as it is now.
        known: what `objects_in` says of one that has only been reset, which is what is written into: objects that it
            has not got cannot be made anew. None: do not ask.
    """
    writer = _look_at(env)
    more = [] if known is None else [name for name in (*writer.objects, *writer.left_out) if name not in known]
    found = list(dict.fromkeys([*writer.unsaved, *more]))
    outer = tuple(f"{name.partition(' (')[0]}." for name in found)
    return [name for name in found if not name.startswith(outer)]  # what is within them goes without saying


def objects_in(env: gymnasium.Env) -> frozenset[str]:
    """The objects that a state is written into, and those that stay as they are, "clock (Clock)" each."""
    writer = _look_at(env)
    return frozenset((*writer.objects, *writer.left_out))


def _look_at(env: gymnasium.Env) -> _Writer:
    writer = _Writer()
    own = {id(layer) for layer in _chain(env)}
    for layer in _layers(env):
        known = own if (found := _mujoco_of(layer)) is None else {*own, id(found[2])}
        for name, value in vars(layer).items():
            if name not in _CONSTANT:
                writer.inspect(name, value, known)
    return writer


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
        _write_attributes(vars(layer), saved["attributes"], made)
        _write_mujoco(layer, saved["mujoco"])


def _write_attributes(attributes: dict[str, Any], saved: Mapping[str, Any], made: dict[int, Any]) -> None:
    there = {*saved, *getattr(saved, "left_out", ()), *_CONSTANT}
    for name in [name for name in attributes if name not in there]:
        if _is_plain(attributes[name]):
            del attributes[name]  # made after the state was saved
    for name, value in saved.items():
        attributes[name] = _restored(value, attributes.get(name), made)


def _layers(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    """The wrappers from outside in, and the environment; the checker is there in the first environment only."""
    return (layer for layer in _chain(env) if not isinstance(layer, PassiveEnvChecker))


def _chain(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    while True:
        yield env
        if not isinstance(env, gymnasium.Wrapper):
            return
        env = env.env


# ------------------------------------------------------------------- values


class _Writer:
    """Values as JSON, with arrays beside it; an array, a generator or an object that has two names is written once.

    Attributes:
        arrays: those of the values.
        objects: the objects of own classes that were written, under their names.
        unsaved: what was left out and may hold state.
        left_out: what else was, of Python's own types.
    """

    def __init__(self):
        self.arrays: list[np.ndarray] = []
        self.objects: list[str] = []
        self.unsaved: list[str] = []
        self.left_out: list[str] = []
        self._seen: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no id is given twice
        self._path: list[str] = []
        self._depth = 0
        self._known: set[int] = set()

    def inspect(self, name: str, value: Any, known: set[int]) -> None:
        """Write an attribute for the sake of what was left out; `known` are ids of objects that are seen elsewhere."""
        self._known = known
        self._pair(name, value, lenient=True)

    def write(self, value: Any, lenient: bool = False) -> Any:
        if type(value) in _PLAIN:
            return value
        if type(value) is str:
            if os.path.isabs(value):
                raise _NotPlain
            return value
        if type(value) is dict:
            return self._write_dict(value, lenient)
        if type(value) in _CONTAINERS:
            if isinstance(value, set | frozenset) and not all(map(_is_plain, value)):
                raise _NotPlain(any(map(_is_own, value)))  # which of those that are there is which, nobody knows
            content = [self._within(str(place), one, lenient) for place, one in enumerate(value)]
            return {_CONTAINERS[type(value)]: [value.maxlen, content] if type(value) is deque else content}
        if isinstance(value, enum.Enum) and _is_own(value):
            self.objects.append(self._named(value))
            return {"member": [type(value).__qualname__, value.name]}
        if id(value) not in self._seen:
            if _is_walked(value):
                return self._write_attributes(value)
            self._seen[id(value)] = self._write_object(value)
            self._kept.append(value)
        return self._seen[id(value)]

    def _write_dict(self, value: dict, lenient: bool) -> dict:
        pairs, left_out = [], []
        for key, one in value.items():
            pair = self._pair(key, one, lenient)
            (left_out if pair is None else pairs).append(pair or key)
        if not left_out:
            return {"dict": pairs}
        return {"partial": [pairs, [self.write(key) for key in left_out if _is_plain(key)]]}

    def _pair(self, key: Any, value: Any, lenient: bool) -> list | None:
        seen, objects = len(self._seen), len(self.objects)
        try:
            if not _is_plain(key):
                raise _NotPlain(_is_own(key))
            return [self.write(key), self._within(str(key), value, lenient)]
        except _NotPlain as problem:
            if not lenient:
                raise
            if problem.holds_state or len(self.objects) > objects:  # these would have been a part of it
                self.unsaved.append(self._named(value, str(key)))
            elif _package(value) in sys.stdlib_module_names and not isinstance(value, type | ModuleType | str):
                self.left_out.append(self._named(value, str(key)))
            del self.objects[objects:]
            while len(self._seen) > seen:  # what is not written cannot be referred to
                self._seen.popitem()
            return None

    def _within(self, step: str, value: Any, lenient: bool) -> Any:
        self._path.append(step)
        try:
            return self.write(value, lenient)
        finally:
            self._path.pop()

    def _named(self, value: Any, *more: str) -> str:
        return f"{'.'.join([*self._path, *more])} ({type(value).__qualname__})"

    def _write_attributes(self, value: Any) -> Any:
        if self._depth == _DEEPEST:
            raise _NotPlain(holds_state=True)
        self.objects.append(self._named(value))
        kind, number = type(value).__qualname__, len(self._seen)
        self._seen[id(value)] = {"object": [number, kind, None]}
        self._kept.append(value)
        self._depth += 1
        try:
            return {"object": [number, kind, self._write_dict(vars(value), lenient=True)]}
        finally:
            self._depth -= 1

    def _write_object(self, value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSU" and not _is_foreign(value):
            self.arrays.append(np.asarray(value))
            return {"array" if isinstance(value, np.ndarray) else "scalar": len(self.arrays) - 1}
        if isinstance(value, np.random.Generator):
            kind, state = type(value.bit_generator).__name__, value.bit_generator.state
        elif isinstance(value, np.random.RandomState):
            kind, state = "RandomState", value.get_state(legacy=False)
        else:
            raise _NotPlain(_may_hold_state(value) and id(value) not in self._known)
        return {"generator": kind, "state": self.write(state), "number": len(self._seen)}


def _is_plain(value: Any) -> bool:
    writer = _Writer()
    try:
        writer.write(value)
    except _NotPlain:
        return False
    return not writer.objects


def _is_own(value: Any) -> bool:
    """Whether a value is an object of a class of the user's, or of a package that is not known here."""
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return False  # a class or a function
    return _package(value) not in _KNOWN_PACKAGES


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _may_hold_state(value: Any) -> bool:
    """Whether an object that cannot be written may decide what comes next, as other environments and worlds do."""
    kinds = gymnasium.Env | dict | list | set | deque | bytearray | random.Random
    return _is_own(value) or type(value).__name__ == "MjData" or isinstance(value, kinds)


class _Simple:
    """What an object is as large as whose attributes are all that it has."""


def _is_walked(value: Any) -> bool:
    """Whether an object of an own class is all in its attributes: nothing of it lies in slots or in a C library."""
    if not _is_own(value) or isinstance(value, gymnasium.Env) or not hasattr(value, "__dict__"):
        return False
    kind = type(value)
    return kind.__basicsize__ == _Simple.__basicsize__ and kind.__itemsize__ == 0


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
    if kind in ("dict", "partial"):
        pairs, left_out = content if kind == "partial" else (content, ())
        found = _Partial((_read(key, arrays, seen), _read(value, arrays, seen)) for key, value in pairs)
        found.left_out = tuple(_read(key, arrays, seen) for key in left_out)
        return found
    if kind == "object":
        number, name, attributes = content
        return _Object(number, name, attributes and _read(attributes, arrays, seen))
    if kind == "member":
        return _Member(*content)
    if kind == "scalar":
        return arrays[content][()]
    if kind == "array":
        return seen.setdefault(content, arrays[content])
    if kind == "deque":
        most, values = content
        return deque((_read(one, arrays, seen) for one in values), most)
    return _MAKE[kind](_read(one, arrays, seen) for one in content)


_MAKE = {name: make for make, name in _CONTAINERS.items()}


def _restored(value: Any, existing: Any, made: dict[int, Any]) -> Any:
    """A value with generators and objects in place of their states, the environment's own where it has them already.

    Raises:
        ValueError: an object is missing; its class is not known here, so that none can be made.
    """
    if isinstance(value, _Draws):
        return value.generator(existing, made)
    if isinstance(value, _Object):
        return _restored_object(value, existing, made)
    if isinstance(value, _Member):
        if not isinstance(existing, enum.Enum) or type(existing).__qualname__ != value.kind:
            raise ValueError(f"there is no {value.kind} where one was saved")
        return type(existing)[value.name]
    if isinstance(value, dict):
        there = existing if isinstance(existing, dict) else {}
        restored = {key: _restored(one, there.get(key), made) for key, one in value.items()}
        stays = getattr(value, "left_out", None)  # None: of before these were kept
        kept = {key: one for key, one in there.items() if stays and (key in stays or not _is_plain(key))}
        return restored | kept
    if type(value) in _CONTAINERS:
        there = list(existing) if type(existing) is type(value) else []
        there += [None] * (len(value) - len(there))
        restored = (_restored(one, other, made) for one, other in zip(value, there, strict=False))
        return deque(restored, value.maxlen) if isinstance(value, deque) else type(value)(restored)
    return value


def _restored_object(saved: _Object, existing: Any, made: dict[int, Any]) -> Any:
    if saved.number in made:
        return made[saved.number]
    if type(existing).__qualname__ != saved.kind or not _is_walked(existing):
        raise ValueError(f"there is no {saved.kind} where one was saved")
    if any(existing is other for other in made.values()):  # two objects then, one under two names now
        existing = object.__new__(type(existing))
    made[saved.number] = existing
    if saved.attributes is not None:
        _write_attributes(vars(existing), saved.attributes, made)
    return existing


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
