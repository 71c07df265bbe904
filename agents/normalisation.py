"""Normalisation of actions and states: by statistics of the data that a VLA was pretrained on, or of what it has seen.

A pretrained VLA speaks of actions in numbers of about unit size; what a robot wants are metres and radians. The policy
keeps what it drew, and its log-probability, in its own numbers: only what goes to the environment is brought back.

Statistics come as files: OpenVLA's `dataset_statistics.json`, of each data set that it was trained on, the
`meta/stats.json` of a LeRobot data set, or what a LeRobot policy keeps beside its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchrl.modules import RunningValueNorm

from research.action_map import ActionMap
from research.errors import UserError, did_you_mean, one_line

Kind = Literal["quantiles", "min_max", "mean_std"]
# What each kind reads: two numbers that are brought to -1 and 1; or a mean, and a deviation that is brought to 1.
FIELDS: dict[str, tuple[str, str]] = {
    "quantiles": ("q01", "q99"),
    "min_max": ("min", "max"),
    "mean_std": ("mean", "std"),
}
OTHER_NAMES = {"proprio": "observation.state"}  # OpenVLA's name of a quantity -> LeRobot's
POLICY_FILE = "policy_preprocessor_step_*_normalizer_processor.safetensors"  # of a LeRobot policy
SMALLEST = 1e-8  # a number that does not vary in the data is normalised to its middle
LARGEST = 10.0  # what is normalised by running statistics lies within, as in Stable-Baselines3's VecNormalize


class Normalisation(nn.Module):
    """An affine map of each number, with its inverse: normalised = (x - middle) / scale.

    The buffers are no part of a state dict: they belong to the data, not to what is trained. A run knows them by their
    hash (`research.training.audit`), and refuses others.

    Args:
        middle, scale: `[A]`.
        mask: bool `[A]`; a number whose mask is False is passed on as it is (a gripper that is 0 or 1 already).
    Attributes:
        of_data: whether there are statistics; where there are none, the data are in the policy's units.
    """

    of_data = True

    def __init__(self, middle: Tensor, scale: Tensor, mask: Tensor | None = None):
        super().__init__()
        kept = torch.ones_like(middle, dtype=torch.bool) if mask is None else mask
        self.register_buffer("middle", torch.where(kept, middle, 0.0), persistent=False)
        self.register_buffer("scale", torch.where(kept, scale, 1.0), persistent=False)
        # What an environment makes of an action before its world gets it: nothing.
        self.register_buffer("world_scale", torch.ones_like(self.scale), persistent=False)
        self.register_buffer("world_offset", torch.zeros_like(self.middle), persistent=False)

    def act_through(self, action_map: ActionMap, without: Sequence[int] = ()) -> None:
        """Take what the world gets for the data's units, and not what an environment is given, which scales it.

        Statistics of a robot's own actions, in metres, are so those of an environment that takes numbers from -1 to 1
        and makes metres of them. Without statistics nothing is changed.

        Args:
            action_map: of the environment, A numbers.
            without: places of numbers that are in the environment's terms already.
        """
        if not self.of_data:
            return
        scale, offset = (torch.as_tensor(n, dtype=torch.float32) for n in (action_map.scale, action_map.offset))
        fixed = scale == 0  # such a number reaches the world as its offset, whatever it is
        fixed[list(without)] = True
        self.world_scale.copy_(torch.where(fixed, 1.0, scale))
        self.world_offset.copy_(torch.where(fixed, 0.0, offset))

    @property
    def size(self) -> int:
        """A."""
        return len(self.middle)

    def normalise(self, x: Tensor) -> Tensor:
        """`[..., A]` as the environment takes it -> in the policy's units."""
        x = self.world_offset + x * self.world_scale
        safe = torch.where(self.scale.abs() > SMALLEST, self.scale, 1.0)
        return torch.where(self.scale.abs() > SMALLEST, (x - self.middle) / safe, 0.0)

    def unnormalise(self, y: Tensor) -> Tensor:
        """`[..., A]` in the policy's units -> as the environment takes it; what lies beyond [-1, 1] stays."""
        return (self.middle + y * self.scale - self.world_offset) / self.world_scale

    def as_statistics(self) -> dict[str, list[float]]:
        """Statistics of the data by which any kind of normalisation is this one."""
        low, high = ((self.middle + sign * self.scale).tolist() for sign in (-1, 1))
        mean, std = self.middle.tolist(), self.scale.tolist()
        return {"q01": low, "q99": high, "min": low, "max": high, "mean": mean, "std": std}

    @classmethod
    def identity(cls, size: int) -> Normalisation:
        """Changes nothing; for data that are normalised already."""
        nothing = cls(torch.zeros(size), torch.ones(size))
        nothing.of_data = False
        return nothing

    @classmethod
    def from_file(
        cls, path: str | Path | None, quantity: str, dataset: str | None, kind: Kind, size: int
    ) -> Normalisation:
        """Of one quantity in a file, see `read_statistics` and `from_statistics`; without file or numbers: identity."""
        if path is None or not size:
            return cls.identity(size)
        return cls.from_statistics(read_statistics(path, quantity, dataset), kind, size)

    @classmethod
    def from_statistics(cls, statistics: Mapping[str, Any], kind: Kind, size: int | None = None) -> Normalisation:
        """By the statistics of one quantity.

        Args:
            statistics: lists of A numbers by name: q01 and q99, min and max, or mean and std; and perhaps mask.
            kind: which of them to read. "quantiles" brings the 1st and the 99th percentile to -1 and 1 (OpenVLA),
                "min_max" the least and the largest number; "mean_std" the mean to 0 and a standard deviation to 1.
            size: A, where it is known from elsewhere.
        Raises:
            UserError: an unknown kind, statistics that are missing, of another size, no numbers, or in the wrong order.
        """
        if kind not in FIELDS:
            raise UserError(f"normalisation is one of {', '.join(FIELDS)}, got {kind!r}")
        first, second = (_numbers(statistics, name) for name in FIELDS[kind])
        mask = _numbers(statistics, "mask").bool() if statistics.get("mask") is not None else None
        for name, found in zip((*FIELDS[kind], "mask"), (first, second, mask), strict=True):
            if found is not None and len(found) != (expected := len(first) if size is None else size):
                raise UserError(f"statistics: {name} has {len(found)} numbers, and {expected} are expected")
        if kind == "mean_std":
            middle, scale = first, second
        else:
            middle, scale = (first + second) / 2, (second - first) / 2
        if (scale < 0).any():
            raise UserError(
                f"statistics: {FIELDS[kind][1]} has a number below {FIELDS[kind][0] if kind != 'mean_std' else 0}"
            )
        return cls(middle, scale, mask)


def tell_action_map(model: nn.Module, action_map: ActionMap | None) -> None:
    """Let a model with statistics of a robot's own actions write what an environment makes those of, see `act_through`.

    Args:
        model: any; one without the method `act_through` speaks in the environment's terms.
        action_map: of the environment; None: it takes what it is given.
    """
    if action_map is not None and hasattr(model, "act_through"):
        model.act_through(action_map)


class RunningNormalisation(RunningValueNorm):
    """Each number of an input to mean 0 and deviation 1, by the statistics of all inputs that `update` was shown.

    A model that holds one passes `proprio` through it, and `algorithm.cfg.normalize_proprio` shows it those of every
    batch, between two rollouts; without that it stands still. Its buffers are saved with the model's weights. Until it
    has been shown something it changes nothing.

    Args:
        size: P of inputs `[..., P]`.
    """

    follows = True  # what reads this changes between updates, without a gradient: it cannot be computed once and kept

    def __init__(self, size: int):
        super().__init__(shape=size, epsilon=1e-8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.count > 0, self.normalize(x).clamp(-LARGEST, LARGEST), x)


def find_running_normalisation(model: nn.Module) -> RunningNormalisation:
    """The one that a model holds.

    Raises:
        UserError: it holds none, or several.
    """
    found = [module for module in model.modules() if isinstance(module, RunningNormalisation)]
    if len(found) != 1:
        number = f"{len(found)} RunningNormalisations" if found else "no RunningNormalisation"
        raise UserError(
            f"algorithm.cfg.normalize_proprio: {type(model).__name__} has {number} (agents.normalisation), and needs "
            "one that proprio passes through, as agents.state_mlp.StateMLP has; or leave the option out"
        )
    return found[0]


def read_statistics(path: str | Path, quantity: str = "action", dataset: str | None = None) -> dict[str, Any]:
    """The statistics of one quantity in a file of OpenVLA's or of LeRobot's.

    Args:
        path: the file, or a folder that has it: `dataset_statistics.json`, `stats.json`, `meta/stats.json` or a LeRobot
            policy's `policy_preprocessor_step_<n>_normalizer_processor.safetensors`.
        quantity: "action", "proprio" (in files of LeRobot's also found as "observation.state"), ...
        dataset: whose statistics, in a file that has those of several data sets; None: of the only one.
    Returns:
        what `Normalisation.from_statistics` reads.
    Raises:
        UserError: no such file, no JSON object, or nothing of that name in it; says what there is.
    """
    path = _file(Path(path))
    found = _of_policy(path) if path.suffix == ".safetensors" else _of_json(path)
    found = {name: one for name, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}
    if not found:
        raise UserError(f"{path}: expected an object of statistics, by data set or by quantity")
    if not isinstance(dataset, str | None):
        raise UserError(f"dataset: expected the name of a data set in {path}, got {dataset!r}")
    if not any(map(_is_statistics, found.values())):
        found = _of_dataset(path, found, dataset)
    elif dataset is not None:
        raise UserError(f"{path}: has the statistics of one data set without a name; leave out {dataset!r}")
    found = {name: one for name, one in found.items() if isinstance(one, dict)}  # and no counts or texts
    if quantity not in found and OTHER_NAMES.get(quantity) in found:
        quantity = OTHER_NAMES[quantity]
    if quantity not in found:
        hint = did_you_mean(quantity, found) or f"; there are {', '.join(found) or 'none'}"
        raise UserError(f"{path}: no statistics of {quantity!r}{hint}")
    return found[quantity]


def _of_json(path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {one_line(error)}") from error
    return found.get("norm_stats", found) if isinstance(found, dict) else found  # a config.json of OpenVLA's


def _of_policy(path: Path) -> dict[str, dict[str, list[float]]]:
    """Statistics by quantity, of tensors called `<quantity>.<statistic>`."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {one_line(error)}") from error
    found: dict[str, dict[str, list[float]]] = {}
    for name, value in tensors.items():
        quantity, _, statistic = name.rpartition(".")
        found.setdefault(quantity, {})[statistic] = value.tolist()
    return found


def _is_statistics(one: Mapping[str, Any]) -> bool:
    """Whether an entry is of a quantity, and not of a data set: some of the fields that are read are lists."""
    known = {name for pair in FIELDS.values() for name in pair}
    return any(name in known and not isinstance(value, dict) for name, value in one.items())


def _of_dataset(path: Path, found: Mapping[str, Any], dataset: str | None) -> Mapping[str, Any]:
    if dataset is None and len(found) > 1:
        raise UserError(f"{path}: has the statistics of {len(found)} data sets; name one of {', '.join(found)}")
    dataset = next(iter(found)) if dataset is None else dataset
    if dataset not in found:
        hint = did_you_mean(dataset, found) or f"; there are {', '.join(found)}"
        raise UserError(f"{path}: no data set {dataset!r}{hint}")
    return found[dataset]


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    names = ("dataset_statistics.json", "stats.json", "meta/stats.json")
    for name in names:
        if (path / name).is_file():
            return path / name
    for file in sorted(path.glob(POLICY_FILE)):
        return file
    raise UserError(
        f"statistics: there is no file {path}" + (f", nor {', '.join(names)} in it" if path.is_dir() else "")
    )


def _numbers(statistics: Mapping[str, Any], name: str) -> Tensor:
    if name not in statistics:
        raise UserError(f"statistics: no {name}; there are {', '.join(map(str, statistics)) or 'none'}")
    try:
        numbers = torch.tensor(statistics[name], dtype=torch.float32, device="cpu")  # they are looked at
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"statistics: {name} is not a list of numbers") from error
    if numbers.ndim != 1 or not len(numbers) or not numbers.isfinite().all():
        raise UserError(f"statistics: {name} should be a list of finite numbers, got {statistics[name]!r}"[:300])
    return numbers
