"""Configuration of an experiment: dataclasses, one JSON file, and dotted flags that win over the file.

    python experiments/ppo_vla.py --config my.json --algorithm.cfg.learning_rate=1e-05 --policy.freeze=vision

`parse_config` reads any tree of dataclasses whose fields are `bool`, `int`, `float`, `str`, `None`, a `Literal`, a
restricted number of `jsonargparse.typing`, a `list[...]` or union of those, a `dict[str, ...]` of those or of `Any`
(free-form), or another dataclass. The docstring under a field is its help text. A `__post_init__` may refuse a
combination of values: it raises `UserError` with a message that begins with the field's name, and `parse_config` puts
the dotted path in front.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import math
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace, set_loader, set_parsing_settings
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from research.schema import UserError
from research.training.freezing import PRESETS
from research.training.lora import LoRAConfig


@dataclass
class TrainerConfig:
    """The run: environment, seeds, sizes, evaluation, tracking."""

    exp_name: str = "ppo"
    """Name of the experiment; the run folder is <run_dir>/<exp_name>-<id>."""
    env: str = "tabletop"
    """Environment: tabletop, or gym:<id> for a Gymnasium environment."""
    env_config: dict[str, Any] = field(default_factory=dict)
    """Settings of the environment, free-form."""
    seed: NonNegativeInt = 1
    """Seed of everything random."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda, cuda:1, ..."""
    num_envs: PositiveInt = 64
    """Environments that run side by side."""
    iterations: PositiveInt = 250
    """Rollouts, each followed by one PPO update."""
    buffer_size: PositiveInt = 2048
    """Transitions per update over all environments."""
    buffer_type: Literal["standard", "vla"] = "standard"
    """standard: collect, then update; vla: collect in other processes while updating, corrected for stale weights."""
    num_collectors: PositiveInt = 1
    """Processes that collect (buffer_type vla); they share num_envs."""
    max_staleness: NonNegativeInt = 2
    """Updates that a transition's weights may lag behind (buffer_type vla); older ones are thrown away."""
    autocast: Literal["off", "bf16"] = "off"
    """bf16: run the model's layers in bfloat16; log-probabilities, advantages and losses stay in float32."""
    compile: Literal["off", "on"] = "off"
    """on: torch.compile the model's stages, as CUDA graphs on a GPU; slow at first, needs a C++ compiler."""
    enable_eval: bool = True
    """Evaluate on fixed initial states before, during and after training."""
    num_eval_envs: PositiveInt = 64
    """Environments that run side by side in an evaluation."""
    num_eval_episodes: PositiveInt = 256
    """Episodes, each from its own initial state, per evaluation."""
    max_eval_steps: PositiveInt = 1000
    """Steps after which an evaluation episode that does not end by itself is cut off, without success."""
    eval_freq: NonNegativeInt = 20000
    """Environment steps between evaluations; 0 = only before and after training."""
    save_freq: NonNegativeInt = 20000
    """Environment steps between checkpoints; 0 = only at the end."""
    use_wandb: bool = True
    """Log to Weights & Biases; offline where no account is configured."""
    wandb_project_name: str = "vla-rl"
    """W&B project; inside a sweep the sweep's own project is used."""
    wandb_group: str | None = None
    """W&B group; by default made from environment, algorithm and variant."""
    wandb_tags: list[str] = field(default_factory=list)
    """W&B tags, besides the ones every run gets."""
    run_dir: str = "runs"
    """Folder that holds the run folders."""
    resume: str | None = None
    """Run folder or checkpoint to continue."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        if not self.exp_name or Path(self.exp_name).name != self.exp_name:
            raise UserError(f"exp_name: {self.exp_name!r} cannot be part of a folder's name; leave out slashes")
        if self.buffer_size % self.num_envs:
            raise UserError(f"buffer_size: {self.buffer_size} is not a multiple of num_envs = {self.num_envs}")
        if self.num_envs % self.num_collectors:
            raise UserError(f"num_collectors: {self.num_collectors} does not divide num_envs = {self.num_envs}")


@dataclass
class VLAConfig:
    """The model: which class, built how, from which checkpoint."""

    model_path: str | None = None
    """Checkpoint to start from: .pt, .pth, .safetensors, or a folder of shards; none = fresh weights."""
    model_class: str = "agents.small_vla.SmallVLA"
    """Dotted path of the model's class."""
    model_config: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model's class, free-form."""
    strict: bool = True
    """Refuse a checkpoint with missing or unexpected keys."""
    strip_prefix: str | None = None
    """Prefix to remove from the checkpoint's keys."""
    add_prefix: str | None = None
    """Prefix to put before the checkpoint's keys."""
    trust_checkpoint: bool = False
    """Unpickle arbitrary objects from the checkpoint: this can run code, so only for files you trust."""


@dataclass
class PolicyConfig:
    """The policy: the model, what trains in it and how fast."""

    name: Literal["vla"] = "vla"
    """Kind of policy."""
    action_dim: PositiveInt = 3
    """Numbers per action; must equal the environment's."""
    freeze: str | list[str] = "none"
    """none, vision, language, backbone (all but the heads), lora (backbone, with low-rank adapters in it), or a list of
    these, part names, module paths and globs."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    learning_rates: dict[str, PositiveFloat] = field(default_factory=dict)
    """Learning rate per named part or module path; the others use algorithm.cfg.learning_rate."""
    learning_rate_by_scope: dict[str, PositiveFloat] = field(default_factory=dict)
    """Sweeps: reference learning rate per freeze scope. The scope's, times learning_rate_factor, is what
    algorithm.cfg.learning_rate becomes."""
    learning_rate_factor: PositiveFloat = 1.0
    """Sweeps: what multiplies the scope's reference learning rate."""
    critic_gradient: Literal["head", "trunk"] = "head"
    """How far the value loss reaches: only into the value head, or through the trunk too."""
    value_head: str = "value_head"
    """Name of the model's value-head part."""
    feature_reuse: Literal["auto", "off"] = "auto"
    """auto: keep the frozen parts' outputs in the rollout and never run those parts in the update."""
    vla_config: VLAConfig = field(default_factory=VLAConfig)

    def __post_init__(self) -> None:
        if isinstance(self.freeze, str) and self.freeze not in PRESETS:
            raise UserError(
                f"freeze: {self.freeze!r} is none of the presets {', '.join(PRESETS)}; "
                f"name parts of the model in a list, as in [{self.freeze}]"
            )


@dataclass
class PPOConfig:
    """The PPO update."""

    learning_rate: PositiveFloat = 1e-5
    """Learning rate of every part that policy.learning_rates does not name."""
    anneal_lr: bool = False
    """Let all learning rates fall linearly, to 0 at the last iteration."""
    lr_warmup_iterations: NonNegativeInt = 0
    """First iterations, over which all learning rates rise linearly."""
    n_epochs: PositiveInt = 4
    """Passes over each rollout."""
    batch_size: PositiveInt = 512
    """Transitions per minibatch."""
    micro_batch_size: PositiveInt | None = None
    """Transitions per forward and backward pass; gradients accumulate over a minibatch. none = all at once."""
    gamma: ClosedUnitInterval = 0.99
    """Discount per decision."""
    gae_lambda: ClosedUnitInterval = 0.95
    """Lambda of generalized advantage estimation."""
    clip_coef: PositiveFloat = 0.2
    """How far the probability ratio may leave 1."""
    ent_coef: NonNegativeFloat = 0.001
    """Weight of the entropy bonus."""
    vf_coef: NonNegativeFloat = 0.5
    """Weight of the value loss."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest norm of the gradient; a larger one is scaled down."""
    normalize_advantage: bool = True
    """Give the advantages mean 0 and standard deviation 1."""
    target_kl: PositiveFloat | None = None
    """Stop an update once the policy moved further than this (approximate KL); none = never."""
    value_warmup_iterations: NonNegativeInt = 0
    """First iterations that train only the value head; the policy stays bit-identical."""


@dataclass
class AlgorithmConfig:
    """The learning algorithm."""

    name: Literal["ppo"] = "ppo"
    """Kind of algorithm."""
    cfg: PPOConfig = field(default_factory=PPOConfig)


@dataclass
class ExperimentConfig:
    """A reinforcement-learning run."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)

    def __post_init__(self) -> None:
        policy, batch_size, buffer_size = self.policy, self.algorithm.cfg.batch_size, self.trainer.buffer_size
        if policy.learning_rate_by_scope:
            if policy.freeze not in list(policy.learning_rate_by_scope):
                known = ", ".join(policy.learning_rate_by_scope)
                raise UserError(
                    f"policy.learning_rate_by_scope: has no rate for the scope {policy.freeze!r}, only {known}"
                )
            reference = policy.learning_rate_by_scope[policy.freeze]
            self.algorithm.cfg.learning_rate = reference * policy.learning_rate_factor
        elif policy.learning_rate_factor != 1:
            raise UserError("policy.learning_rate_factor: multiplies policy.learning_rate_by_scope, which is not set")
        if batch_size > buffer_size:
            raise UserError(
                f"algorithm.cfg.batch_size: {batch_size} is larger than trainer.buffer_size = {buffer_size}"
            )


C = TypeVar("C")


def parse_config(config_class: type[C], argv: Sequence[str] | None = None, description: str = "") -> C:
    """Build a configuration: the defaults, then the JSON file named by `--config`, then the flags.

    Args:
        config_class: the dataclass to fill; it may nest others.
        argv: command-line arguments without the program's name; None takes those of this process.
        description: what the script does, for `--help` (which prints and exits with code 0).
    Raises:
        UserError: unknown key, wrong type, value out of range, impossible combination, or unreadable file.
    """
    options = list(_options(config_class))
    hints = {key: hint for key, hint, _ in options}
    values = {key: default for key, _, default in options}
    parser = _parser(config_class, description)
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        parser.parse_args(["--help"])
    flags = list(_split(argv, hints))
    for key, path in flags:
        if key == "config":
            values.update(_read_json(path, hints))
    for key, text in flags:
        if key != "config":
            _apply_flag(parser, key, text, values, hints)
    for key, value in values.items():
        if value is MISSING:
            raise UserError(f"{key}: a value is required, as in --{key}=...")
    return _build(config_class, values)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts; saved as JSON and given to `--config`, it makes an equal configuration."""
    return asdict(config)


def flatten(config: Any) -> dict[str, Any]:
    """The configuration as `{dotted key: value}`, with the keys that flags and sweeps use, also inside of dicts."""

    def visit(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield from visit(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(visit(to_dict(config), ""))


def _options(config_class: type, default: Any = MISSING, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, type, default) of every option; the default is MISSING where a value is required."""
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        key, hint = prefix + item.name, hints[item.name]
        if default is not MISSING:  # an outer class may give a nested one other defaults
            value = getattr(default, item.name)
        else:
            value = item.default if item.default_factory is MISSING else item.default_factory()
        if is_dataclass(hint):
            yield from _options(hint, value, key + ".")
        else:
            yield key, hint, value


def _build(config_class: type[C], values: dict[str, Any], prefix: str = "") -> C:
    """The dataclass from `{dotted key: value}`."""
    arguments = {}
    for name, hint in get_type_hints(config_class).items():
        key = prefix + name
        arguments[name] = _build(hint, values, key + ".") if is_dataclass(hint) else values[key]
    try:
        return config_class(**arguments)
    except UserError as error:  # from a __post_init__, which knows its own field names only
        raise UserError(f"{prefix}{error}") from None


@cache  # building it takes 0.2 s
def _parser(config_class: type, description: str) -> ArgumentParser:
    """What reads single flags and prints the help. Files are read by `_read_json`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("flag", _read_literal)
    usage = "%(prog)s [--config FILE] [--key=value ...]"
    parser = ArgumentParser(usage=usage, description=description, exit_on_error=False, parser_mode="flag")
    parser.add_argument("--config", metavar="FILE", help="JSON file to start from; flags win over it")

    def add_group(group_class: type, key: str) -> None:
        nested = {name: hint for name, hint in get_type_hints(group_class).items() if is_dataclass(hint)}
        group = parser.add_argument_group(key, inspect.getdoc(group_class)) if key else parser
        group.add_class_arguments(group_class, key or None, as_group=False, skip=set(nested))
        for name, hint in nested.items():
            add_group(hint, f"{key}.{name}" if key else name)

    add_group(config_class, "")
    parser.set_defaults({key: default for key, _, default in _options(config_class) if default is not MISSING})
    return parser


def _split(argv: list[str], hints: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, text) of each flag, written `--key=text` or `--key text`; `key+` appends to a list."""
    words = iter(argv)
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; options are written --key=value")
        key, equals, text = word[2:].partition("=")
        known = key == "config" or key.removesuffix("+") in hints or _dict_option(key, hints)
        if not known or not all(key.split(".")):
            raise UserError(f"unknown option --{key}{_suggestion(key, list(hints), '--')}")
        if not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise UserError(f"--{key} needs a value, as in --{key}=...")
        yield key, text


def _dict_option(key: str, hints: dict[str, Any]) -> str | None:
    """The dict-valued option that `key` is, or names an entry of."""
    return next((o for o, hint in hints.items() if get_origin(hint) is dict and f"{key}.".startswith(f"{o}.")), None)


def _apply_flag(parser: ArgumentParser, key: str, text: str, values: dict[str, Any], hints: dict[str, Any]) -> None:
    """Set in `values` the option, or the entry of a dict-valued option, that one flag names."""
    option = _dict_option(key, hints)
    if option is None:
        option = key.removesuffix("+")
        current = Namespace()
        current[option] = values[option]
        try:
            value = parser.parse_args([f"--{key}={text}"], namespace=current, defaults=False)[option]
        except ArgumentError:
            if key != option:
                raise UserError(f"--{key}: {_shown(text)} cannot be appended to {option}") from None
            value = _read_literal(text)  # which _checked refuses with a shorter message
    elif key == option:
        value = _read_literal(text)
    else:
        # Not left to jsonargparse, which keeps free-form entries as text and drops the siblings of nested ones.
        value = copy.deepcopy(values[option])
        entry = key.removeprefix(option + ".")
        *parents, last = entry.split(".") if get_args(hints[option])[1] is Any else [entry]
        node = value
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UserError(f"--{key}: {name!r} holds {_shown(node)}, which has no entries to set")
        node[last] = _read_literal(text)
    values[option] = _checked(value, hints[option], option)


def _read_literal(text: str) -> Any:
    """The value that text on the command line stands for: a JSON or Python literal, a list without quotes, or text."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, TypeError):
            return json.loads(json.dumps(read(text), allow_nan=False))
    if text.startswith("[") and text.endswith("]") and not set("[]{}") & set(text[1:-1]):
        return [_read_literal(item.strip()) for item in text[1:-1].split(",")]
    return text


def _read_json(path: str, hints: dict[str, Any]) -> dict[str, Any]:
    """The checked values of a config file as `{dotted key: value}`.

    Not left to jsonargparse, which takes "1e-5" for a number, "no" for false, and lets some unknown keys pass.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: the key {twice[0]!r} is given twice in one object")
        return dict(pairs)

    groups = {option[:i] for option in hints for i, letter in enumerate(option) if letter == "."}

    def visit(node: Any, key: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict):
            raise UserError(f"{path}: {key or 'the file'}: expected object, got {_shown(node)}")
        for name, value in node.items():
            inner = f"{key}.{name}" if key else name
            if "." in name:
                raise UserError(f"{path}: the key {name!r} has a dot; in a file, groups are nested objects")
            if inner in hints:
                yield inner, _checked(value, hints[inner], inner, f"{path}: ")
            elif inner in groups:
                yield from visit(value, inner)
            else:
                raise UserError(f"{path}: unknown key {inner}{_suggestion(inner, [*hints, *groups])}")

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"config file {path} cannot be read: {getattr(error, 'strerror', error)}") from None
    return dict(visit(content, ""))


def _suggestion(key: str, known: list[str], dashes: str = "") -> str:
    """End of the message about a misspelt or misplaced key: what it probably was, or nothing."""
    names = [option.rpartition(".")[2] for option in known]
    alike = get_close_matches(key.rpartition(".")[2], names, 1)
    close = get_close_matches(key, [o for o, name in zip(known, names, strict=True) if name in alike] or known, 1, 0.5)
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def _checked(value: Any, hint: Any, key: str, source: str = "") -> Any:
    """`value` as the type `hint`, or a `UserError` that names the key."""
    if get_origin(hint) is dict and isinstance(value, dict):
        return {name: _checked(item, get_args(hint)[1], f"{key}.{name}", source) for name, item in value.items()}
    try:
        return _typed(value, hint)
    except (ValueError, OverflowError):
        raise UserError(f"{source}{key}: expected {_described(hint)}, got {_shown(value)}") from None


def _typed(value: Any, hint: Any) -> Any:
    """`value` if it is of the type `hint`, else ValueError. Text is no number; only int becomes float."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        json.dumps(value, allow_nan=False)  # raises ValueError: NaN would not survive config.json and W&B
        return value
    if hint in (bool, str, NoneType) and type(value) is hint:
        return value
    if origin is Literal and value in arguments:
        return value
    if origin in (Union, UnionType):
        for option in arguments:
            with suppress(ValueError):
                return _typed(value, option)
    if origin is list and isinstance(value, list):
        return [_typed(item, arguments[0]) for item in value]
    if isinstance(hint, type) and isinstance(value, int | float) and not isinstance(value, bool):
        # A restricted number is a class whose constructor raises ValueError out of its range.
        if issubclass(hint, int) and hint is not bool and isinstance(value, int):
            return int(hint(value))
        if issubclass(hint, float) and math.isfinite(value):
            return float(hint(value))
    raise ValueError(value)


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return " or ".join(map(json.dumps, arguments))
    if origin is list:
        return f"list of {_described(arguments[0])}s"
    if hint.__module__ == "jsonargparse.typing":
        return hint.__doc__.replace(" restricted to be", "")  # "int restricted to be >0"
    names = {Any: "finite numbers", dict: "object", NoneType: "null", bool: "true or false", str: "string"}
    return names.get(origin or hint) or hint.__name__


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 80 else text[:77] + "..."
    return f"the string {text}" if isinstance(value, str) else text
