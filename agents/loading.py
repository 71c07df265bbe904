"""From a dotted class path and a checkpoint file to an `nn.Module` with the three methods of a VLA model.

A checkpoint is data from somewhere else: it is read as tensors only, and a file that would run code is refused
unless the user trusts it. Everything that can be wrong with the class, its configuration or its file ends in one
`UserError` that names it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import logging
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from research.schema import UserError, describe_error

log = logging.getLogger(__name__)

REQUIRED_METHODS = ("forward", "get_value", "evaluate_actions")  # which a `DecidingVLA` derives
# Where a `torch.save`d dict may keep its state dict, in the order tried; none of them: the dict is the state dict.
STATE_DICT_KEYS = ("model_state_dict", "state_dict", "model")
WEIGHTS_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
# What a directory is searched for first, in this order.
DIRECTORY_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load_vla_model(
    model_path: str | Path | None,
    model_class: str,
    model_config: dict[str, Any],
    device: str | torch.device = "cpu",
    *,
    strict: bool = True,
    strip_prefix: str | None = None,
    add_prefix: str | None = None,
    trust_checkpoint: bool = False,
    expect_fresh: bool = False,
) -> nn.Module:
    """Construct `model_class(**model_config)` and copy a checkpoint into it.

    Checkpoint formats: a `.safetensors` file; a `.pt`, `.pth`, `.ckpt` or `.bin` file of `torch.save` holding a state
    dict, bare or under "model_state_dict", "state_dict" or "model"; an index of shards (`*.index.json`); a directory
    with one of these. Files are memory-mapped and copied one after the other.

    Args:
        model_path: the file or directory; None keeps the fresh weights of the constructor.
        model_class: "package.module.ClassName" or "package.module:ClassName".
        model_config: keyword arguments of the constructor.
        device: where the returned model lies.
        strict: names and shapes must agree exactly. False: copy what agrees, log the rest.
        strip_prefix: dotted prefix taken off the names that have it ("module."; the last dot may be left out).
        add_prefix: dotted prefix put before every name, after stripping.
        trust_checkpoint: unpickle anything in the file, WHICH RUNS CODE FROM IT; a whole pickled `nn.Module` is then
            accepted too. Without it, tensors and plain values only.
        expect_fresh: do not warn of fresh weights; they are meant, or will be replaced.
    Returns:
        The model on `device`, its weights in the dtypes it was constructed with. Its training mode is left as the
        constructor left it (`nn.Module`'s own default is train): call `.eval()` where it matters.
    Raises:
        UserError: the class or its configuration is wrong; the file is missing, empty, damaged or would run code; the
            weights do not fit (`strict`), or not one of them does. One line that says which and what to do.
    """
    cls = import_model_class(model_class)
    if model_path is None:
        if not expect_fresh:
            log.warning("%s starts from fresh weights: no policy.vla_config.model_path is given", model_class)
        return _construct(cls, model_config).to(device)
    path = Path(model_path).expanduser()
    # The files before the model: a wrong path should not cost the construction of a large one.
    shards = [_read(file, names, trust_checkpoint) for file, names in _weights_files(path)]
    shards = _renamed(shards, path, strip_prefix, add_prefix)
    model = _construct(cls, model_config)
    _refuse_other_numbers(model, shards, path)
    fitting = _check_fit(model, shards, path, strict, suggest_prefix=not (strip_prefix or add_prefix))
    while shards:
        # Popped, so that the memory map of a shard is gone before the next one is read.
        shard = shards.pop(0)
        model.load_state_dict({name: value for name, value in shard.items() if name in fitting}, strict=False)
    return model.to(device)


def import_model_class(model_class: str) -> type[nn.Module]:
    """The class at a dotted path, checked to be an `nn.Module` with `forward`, `get_value` and `evaluate_actions`.

    The current working directory joins the end of `sys.path` for good (a model may import more of its package
    later), so that a `my_model.py` lying there is found and never shadows an installed package.

    Args:
        model_class: "package.module.ClassName" or "package.module:ClassName".
    Raises:
        UserError: the path is malformed, its module or class does not exist, the import fails, or the class is not
            a VLA model.
    """
    module_name, _, class_name = model_class.replace(":", ".").rpartition(".")
    if not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        raise UserError(f'model_class {model_class!r} should look like "package.module.ClassName"')
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{module_name}.".startswith(f"{absent}."):
            where = f"neither installed nor in the current directory {Path.cwd()}"
            raise UserError(f"model_class {model_class!r}: there is no module {absent!r}, {where}") from error
        why = f"imports {absent!r}, which cannot be found" if absent else f"fails with {describe_error(error)}"
        raise UserError(f"model_class {model_class!r}: the module {module_name!r} exists, but {why}") from error
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        is_what = "does not exist in its module" if cls is None else f"is {cls!r}, not a torch.nn.Module class"
        raise UserError(f"model_class {model_class!r} {is_what}; {_did_you_mean(class_name, module)}")
    # nn.Module has a `forward` of its own, which only raises.
    lacking = [name for name in REQUIRED_METHODS if getattr(cls, name, None) in (None, nn.Module.forward)]
    if lacking:
        needs = ", ".join(REQUIRED_METHODS)
        raise UserError(f"model_class {model_class!r} lacks {', '.join(lacking)}; a VLA model defines {needs}")
    return cls


def _did_you_mean(class_name: str, module: ModuleType) -> str:
    models = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)]
    near = difflib.get_close_matches(class_name, models)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"the torch.nn.Module classes there: {_some(models, limit=10) or 'none'}"


def _construct(cls: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    parameters = inspect.signature(cls).parameters.values()
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    accepted = [p.name for p in by_name]
    unknown = [] if any(p.kind is p.VAR_KEYWORD for p in parameters) else [k for k in config if k not in accepted]
    absent = [p.name for p in by_name if p.default is p.empty and p.name not in config]
    if unknown or absent:
        wrong = [f"does not know {', '.join(unknown)}"] * bool(unknown) + [f"needs {', '.join(absent)}"] * bool(absent)
        accepts = ", ".join(accepted) or "nothing"
        raise UserError(f"model_config: {cls.__name__} {' and '.join(wrong)}; it accepts {accepts}")
    try:
        return cls(**config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model_config: {cls.__name__} cannot be constructed: {describe_error(error)}") from error


def _weights_files(path: Path) -> list[tuple[Path, list[str] | None]]:
    """The files to read, each with the names to take from it (None: all)."""
    if path.is_dir():
        path = _file_in(path)
    if path.suffix == ".json" and path.is_file():
        return _read_index(path)
    return [(path, None)]


def _file_in(directory: Path) -> Path:
    for name in DIRECTORY_FILES:
        if (directory / name).is_file():
            return directory / name
    files = sorted(file for file in directory.iterdir() if file.suffix in WEIGHTS_SUFFIXES)
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{directory} holds several weights files ({_some([f.name for f in files])}); name one of them")
    raise UserError(
        f"{directory} holds no weights file ({', '.join(DIRECTORY_FILES)}, *{', *'.join(WEIGHTS_SUFFIXES)})"
    )


def _read_index(path: Path) -> list[tuple[Path, list[str] | None]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {describe_error(error)}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f'{path} is not an index of shards: it has no "weight_map" from weight names to file names')
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(path.parent / file, []).append(name)
    absent = [file.name for file in shards if not file.is_file()]
    if absent:
        raise UserError(f"{path} lists {len(shards)} shards, of which {len(absent)} do not exist: {_some(absent)}")
    return list(shards.items())


def _read(path: Path, names: list[str] | None, trust_checkpoint: bool) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist (current directory: {Path.cwd()})")
    if path.suffix not in WEIGHTS_SUFFIXES:
        raise UserError(f"{path}: the format {path.suffix!r} is unknown; known are {', '.join(WEIGHTS_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    try:
        with path.open("rb") as file:
            if file.read(19) == b"version https://git":
                raise UserError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
        weights = load_file(path) if path.suffix == ".safetensors" else _read_torch(path, trust_checkpoint)
    except UserError:
        raise
    except Exception as error:
        # A damaged pickle stops with nearly any exception: KeyError, EOFError, RuntimeError, ...
        raise UserError(
            f"{path} cannot be read; is it truncated, or another format? {describe_error(error)}"
        ) from error
    absent = [name for name in names or [] if name not in weights]
    if absent:
        raise UserError(f"{path} lacks {len(absent)} of the weights that its index puts there: {_some(absent)}")
    return weights if names is None else {name: weights[name] for name in names}


def _read_torch(path: Path, trust_checkpoint: bool) -> dict[str, Any]:
    if trust_checkpoint:
        log.warning("%s may run code while it is read: policy.vla_config.trust_checkpoint is set", path)
    mmap = _is_stored_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust_checkpoint, mmap=mmap)
    except pickle.UnpicklingError as error:
        if trust_checkpoint:
            raise
        asked = re.search(r"GLOBAL (\S+)", str(error))
        names_it = f" ({asked[1]})" if asked else ""
        raise UserError(
            f"{path} was not read: it holds more than tensors and plain values{names_it}, or is damaged; only if you "
            "trust its source, set policy.vla_config.trust_checkpoint: true, which RUNS CODE FROM THE FILE"
        ) from error
    return _state_dict_in(content, path)


def _is_stored_zip(path: Path) -> bool:
    """Whether a file can be mapped into memory: older formats cannot, and compressed entries would read as noise."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _refuse_other_numbers(model: nn.Module, shards: list[dict[str, Any]], path: Path) -> None:
    """Refuse what copying would turn into other weights without a word, strict or not, and weights that are no numbers.

    Integers and 8-bit floats stand for weights only with scales that are elsewhere; a complex number would lose a half;
    sparse and meta tensors hold no dense values.
    """
    targets = model.state_dict(keep_vars=True)
    for name, value in ((n, v) for shard in shards for n, v in shard.items()):
        target = targets.get(name)
        if not isinstance(value, Tensor) or not isinstance(target, Tensor) or is_lazy(target):
            continue
        if value.is_meta or value.layout is not torch.strided or value.is_quantized:
            kind = "a meta tensor" if value.is_meta else "quantised" if value.is_quantized else str(value.layout)
            raise UserError(f"{path}: {name} is {kind}, which holds no values to copy; save a dense state dict")
        if target.is_floating_point() and (not value.is_floating_point() or value.element_size() == 1):
            raise UserError(
                f"{path}: {name} is {value.dtype}, where {type(model).__name__} has {target.dtype}: quantised or of "
                "another model; dequantise it before, or leave it out of the file"
            )
        if target.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(
                f"{path}: {name} holds a NaN or an infinity: that checkpoint was saved after something broke"
            )


def _state_dict_in(content: Any, path: Path) -> dict[str, Any]:
    found = content
    if isinstance(content, Mapping):
        found = next((v for k in STATE_DICT_KEYS if isinstance(v := content.get(k), (Mapping, nn.Module))), content)
    if isinstance(found, nn.Module):  # pickled whole, under trust_checkpoint
        found = found.state_dict()
    if not (isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values())):
        held = f"the keys {_some(map(str, found))}" if isinstance(found, Mapping) and found else type(found).__name__
        keys = ", ".join(STATE_DICT_KEYS)
        raise UserError(f"{path} has no weights under {keys} or at its top level: found {held}")
    return {str(name): value for name, value in found.items()}


def _renamed(
    shards: list[dict[str, Any]], path: Path, strip_prefix: str | None, add_prefix: str | None
) -> list[dict[str, Any]]:
    strip, add = (f"{prefix.removesuffix('.')}." if prefix else "" for prefix in (strip_prefix, add_prefix))
    names = [name for shard in shards for name in shard]
    if strip and not any(name.startswith(strip) for name in names):
        raise UserError(f"no weight in {path} has the strip_prefix {strip!r}; there are {_some(names)}")
    if len({name.removeprefix(strip) for name in names}) < len(names):
        raise UserError(f"{path} holds weights both with and without the strip_prefix {strip!r} under the same name")
    return [{add + name.removeprefix(strip): value for name, value in shard.items()} for shard in shards]


class _Comparison(NamedTuple):
    fitting: set[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]  # with both shapes, for the message

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "shape mismatch": self.mismatched}
        return "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names)


def _compare(model: nn.Module, weights: Mapping[str, Any]) -> _Comparison:
    targets = model.state_dict(keep_vars=True)
    fitting, mismatched = set(), []
    for name, value in weights.items():
        target = targets.get(name)
        if is_lazy(target) or (name in targets and _dimensions(target) == _dimensions(value)):
            fitting.add(name)
        elif name in targets:
            mismatched.append(f"{name}: expected {_dimensions(target)}, got {_dimensions(value)}")
    # Tied parameters are one object under several names, of which a file may hold only one.
    filled = {id(targets[name]) for name in fitting}
    missing = [name for name, target in targets.items() if name not in weights and id(target) not in filled]
    unexpected = [name for name in weights if name not in targets]
    return _Comparison(fitting, missing, unexpected, mismatched)


def _check_fit(
    model: nn.Module, shards: list[dict[str, Any]], path: Path, strict: bool, suggest_prefix: bool
) -> set[str]:
    """The names to copy; raises or logs as `strict` asks."""
    weights = {name: value for shard in shards for name, value in shard.items()}
    comparison = _compare(model, weights)
    cls, fitting = type(model).__name__, comparison.fitting
    problems = comparison.missing or comparison.unexpected or comparison.mismatched
    if not fitting or (strict and problems):
        remedies = [_prefix_that_fits(model, weights, comparison)] if suggest_prefix else []
        if fitting:
            remedies.append("policy.vla_config.strict: false to load only what fits")
        remedy = " or ".join(filter(None, remedies))
        raise UserError(f"{path} does not fit {cls}: {comparison}" + f"; set {remedy}" * bool(remedy))
    if problems:
        log.warning("%s: loaded %d of the weights of %s, not all: %s", path, len(fitting), cls, comparison)
    else:
        log.info("%s: loaded all %d weights of %s", path, len(fitting), cls)
    return fitting


def _prefix_that_fits(model: nn.Module, weights: dict[str, Any], comparison: _Comparison) -> str | None:
    """The setting, if there is one, with which every weight of the file has its place in `model`."""
    first = next(iter(weights), "")
    # What all unexpected names begin with, up to a dot; what stands before the file's first name in the model.
    common = os.path.commonprefix(comparison.unexpected)  # noqa: RUF071 -- of names, not of files
    strip = [common[: dot.end()] for dot in re.finditer(r"\.", common)]
    add = [name.removesuffix(first) for name in comparison.missing if name.endswith(f".{first}")]
    candidates = [("strip_prefix", p, {name.removeprefix(p): v for name, v in weights.items()}) for p in strip]
    candidates += [("add_prefix", p, {p + name: v for name, v in weights.items()}) for p in add]
    for option, prefix, renamed in candidates:
        if len(_compare(model, renamed).fitting) == len(weights):
            return f'policy.vla_config.{option}: "{prefix}"'
    return None


def _dimensions(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + ", …" * (len(names) > limit)
