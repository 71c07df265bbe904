"""From a dotted class path and a checkpoint file to an `nn.Module` with the three methods of a VLA model.

Everything that can be wrong with the class, its configuration or its file ends in one `UserError` that names it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from agents.fitting import fill, renamed
from agents.memory_guard import refuse_too_large
from agents.provided_weights import add_left_out
from agents.weights import DIRECTORY_FILES, read_weights, some
from research.errors import UserError, describe_error, place_of
from research.own_packages import hidden_module

log = logging.getLogger(__name__)

REQUIRED_METHODS = ("forward", "get_value", "evaluate_actions")  # which a `DecidingVLA` derives


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

    Files (the formats: `agents.weights.read_weights`) are memory-mapped and copied one after the other; which name goes
    where, and what is refused: `agents.fitting.fill`. A file may leave out parts that the constructor fills from
    elsewhere, where it holds their hashes: `agents/provided_weights.py`.

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
        model = _construct(cls, model_config)
        if not expect_fresh and model_config.get("pretrained") is None:  # the model reads its own
            provided = ", ".join(getattr(model, "provided_weights", ()))
            but = f", but for its {provided}" if provided else ""
            log.warning("%s starts from fresh weights%s: no policy.vla_config.model_path is given", model_class, but)
        return model.to(device)
    path = Path(model_path).expanduser()
    _refuse_family_folder(cls, path)
    # The files before the model: a wrong path should not cost the construction of a large one.
    shards = renamed(read_weights(path, trust_checkpoint), path, strip_prefix, add_prefix)
    model = _construct(cls, model_config)
    add_left_out(model, shards, path, strict)
    fill(model, shards, path, strict, suggest_prefix=not (strip_prefix or add_prefix))
    return model.to(device)


def in_eval_mode(model: nn.Module) -> nn.Module:
    """The model, put in eval mode; not what its `eval` returns, as a `train` of a user's own may return nothing."""
    model.eval()
    return model


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
    if hidden := hidden_module(module_name):
        raise UserError(f"model_class {model_class!r}: {hidden}")
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


def _refuse_family_folder(cls: type[nn.Module], path: Path) -> None:
    """Refuse a family's folder as weights alone: without its statistics, actions would be in other units."""
    folder = path.parent if path.name in DIRECTORY_FILES else path
    reads_folders = hasattr(cls, "export") and "pretrained" in inspect.signature(cls).parameters
    if reads_folders and (folder / "config.json").is_file():
        raise UserError(
            f"policy.vla_config.model_path: {folder} is a folder with a configuration, of which only the weights would "
            f"be read; set policy.vla_config.model_config.pretrained to it, by which {cls.__name__} takes its sizes, "
            "statistics and tokenizer, too, and leave model_path out"
        )


def _did_you_mean(class_name: str, module: ModuleType) -> str:
    models = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)]
    near = difflib.get_close_matches(class_name, models)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"the torch.nn.Module classes there: {some(models, limit=10) or 'none'}"


def construct_on_meta(model_class: str, model_config: dict[str, Any]) -> nn.Module:
    """`model_class(**model_config)` on torch's device "meta": what parts there are and of which sizes, without memory.

    Raises:
        UserError: as `load_vla_model`; or the constructor reads values, which there are none of: its cause is then a
            `RuntimeError`.
    """
    with torch.device("meta"):
        return _instance(import_model_class(model_class), model_config)


def _construct(cls: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    with refuse_too_large(cls.__name__, lambda: construct_on_meta(f"{cls.__module__}.{cls.__qualname__}", config)):
        model = _instance(cls, config)
    if meta := [name for name, value in model.state_dict(keep_vars=True).items() if getattr(value, "is_meta", False)]:
        raise UserError(
            f"model_config: the constructor of {cls.__name__} leaves {some(meta)} on the device 'meta', where nothing "
            "can be loaded; construct it on the CPU"
        )
    return model


def _instance(cls: type[nn.Module], config: dict[str, Any]) -> nn.Module:
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
        raise UserError(
            f"model_config: {cls.__name__} cannot be constructed: {describe_error(error)} ({place_of(error)})"
        ) from error
