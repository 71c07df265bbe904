"""Small models whose weights tests save and load, and the ways to do so."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from agents.loading import load_vla_model
from research.errors import UserError


class VLA(nn.Module):
    """Eight weights, a buffer among them; `width` is the only thing to configure."""

    def __init__(self, width: int = 4, *, dtype=torch.float32):
        super().__init__()
        if width == 0:
            raise UserError("width must be positive")
        self.encoder = nn.Sequential(nn.Linear(3, width, dtype=dtype), nn.BatchNorm1d(width, dtype=dtype))
        self.head = nn.Linear(width, 2, bias=False, dtype=dtype)

    def forward(self, observations):
        return self.head(self.encoder(observations["proprio"]))

    def get_value(self, observations):
        return self.forward(observations)[:, :1]

    def evaluate_actions(self, observations, actions):
        mean = self.forward(observations)
        return -(actions - mean).square().sum(-1), mean.new_zeros(len(mean))


class TiedVLA(VLA):
    """A second name for the head's weight, as language models have it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(4, 2, bias=False)
        self.embedding.weight = self.head.weight


class LazyVLA(VLA):
    """A layer whose shape only the checkpoint knows."""

    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(2, bias=False)


class MetaVLA(VLA):
    """Its head is left where nothing can be loaded."""

    def __init__(self):
        super().__init__()
        self.head.to("meta")


class WrappedVLA(VLA):
    """What its constructor compiled and wrapped has other names."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.DataParallel(self.encoder)
        self.head = torch.compile(self.head)


class ViewVLA(VLA):
    """Two parameters in one memory."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(self.head.weight.data)


class MaskVLA(VLA):
    """A buffer that holds infinities on purpose, one of whole numbers, and a head in half precision."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
        self.head.half()


class AnyConfigVLA(VLA):
    def __init__(self, **config):
        super().__init__(config["breadth"])


class EvalVLA(VLA):
    def __init__(self):
        super().__init__()
        self.eval()


class OnlyActs(nn.Module):
    def forward(self, observations):
        return observations["proprio"]


class NoForward(nn.Module):
    def get_value(self, observations):
        return observations["proprio"][:, :1]


class Plain:
    pass


class RunsCode:
    """A pickle of it creates the folder `path` when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


HERE = __name__
CLASS = f"{HERE}.VLA"


def any_weights(model_class=VLA):
    """The weights of a model that no constructor gives, BatchNorm statistics and step counter included."""
    state = model_class().state_dict()
    for value in state.values():
        value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.tensor(7))
    return state


def load(path, model_class=CLASS, config=None, **options):
    return load_vla_model(path, model_class, config or {}, **options)


def assert_loaded(model, weights):
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(state[name], value), name


def error(*args, **options) -> str:
    """The message of the UserError that loading ends in, which is one line."""
    with pytest.raises(UserError) as caught:
        load(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_shards(folder, weights, suffix="safetensors"):
    """Three shards and their index; returns the index."""
    folder.mkdir(exist_ok=True)
    weight_map = {name: f"model-{i % 3}.{suffix}" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        shard = {name: weights[name] for name in weight_map if weight_map[name] == file}
        save_file(shard, folder / file) if suffix == "safetensors" else torch.save(shard, folder / file)
    index = folder / ("model.safetensors.index.json" if suffix == "safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index
