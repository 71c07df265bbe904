"""Low-rank adapters in the layers of any model (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685), by peft.

A layer with weight W computes with W + alpha / rank * B A from then on: W is frozen, A and B train, and B starts at
zero, so that the policy starts unchanged. Which layers get an adapter is decided in `research/training/freezing.py`.

The layers are replaced inside the model, which keeps its class and methods. Their weights are called
`<layer>.base_layer.weight` afterwards: load pretrained weights before, and training checkpoints of an adapted model
after. `merge_lora` goes back to the original names.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from research.errors import UserError


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can carry an adapter, by dotted name: linear (GPT-2's too), 1d and 2d convolutional, embeddings.

    Left out, because an adapter there would be bypassed or would change another layer: what lies within
    `nn.MultiheadAttention` (it reads its layers' weights itself), and layers and weights that the model uses under two
    names (tied embeddings). Also convolutions with groups, dilation or padding other than zeros: peft's adapters cannot
    be merged into the first, and ignore the other two.
    """
    from transformers.pytorch_utils import Conv1D  # slow to import, and needed here only

    convolutions = (nn.Conv1d, nn.Conv2d)
    kinds = (nn.Linear, nn.Embedding, Conv1D, *convolutions)
    uses = Counter(id(x) for m in model.modules() for x in (*m._modules.values(), *m._parameters.values()))
    attention = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        and not name.startswith(attention)
        and uses[id(module)] == uses[id(module.weight)] == 1
        and not (isinstance(module, convolutions) and _is_special(module))
    }


def _is_special(convolution: nn.Conv1d | nn.Conv2d) -> bool:
    return convolution.groups > 1 or set(convolution.dilation) != {1} or convolution.padding_mode != "zeros"


def add_adapters(model: nn.Module, layers: Sequence[str], rank: int, alpha: float) -> None:
    """Put a trainable adapter into each of the named layers; every other parameter stays trainable or frozen as it is.

    Args:
        model: changed in place.
        layers: names out of `adaptable_layers`.
        rank, alpha: see `research.config.LoRAConfig`.
    Raises:
        UserError: the extra lora is not installed.
    """
    try:
        import peft
        from peft.tuners.tuners_utils import cast_adapter_dtype
    except ImportError as error:
        raise UserError(f"low-rank adapters need peft ({error}); run: pip install -e .[lora]") from None

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # peft matches a text as a regular expression against the whole name, but a list against the ends of names.
    names = "|".join(re.escape(name) for name in layers)
    # Held by another module: a model whose `config` is one of transformers' would be taken for one of its models.
    holder = nn.ModuleDict({"model": model})
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=rf"model\.({names})")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft finds it out per layer, and says so each time
        peft.inject_adapter_in_model(config, holder)
    cast_adapter_dtype(model, "default")  # float32: a bfloat16 weight would swallow small updates
    for parameter in trainable:  # peft freezes all but the adapters
        parameter.requires_grad_(True)
    for module in model.modules():
        # Without gradients, torch's encoder computes from its layers' own weights, past the adapters, unless:
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter's dotted name is that of an adapter's A or B."""
    return any(part.startswith("lora_") for part in parameter_name.split("."))


@torch.no_grad()
def adapter_changes(model: nn.Module, start: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name of the layer, what its adapter adds to its weight, of the weight's shape) for every adapter.

    Args:
        start: A and B of each by name, as they were; then it is what they add more than those did.
    """
    for name, layer in _adapted(model):
        change = layer.get_delta_weight("default")
        factors = {n: p for n, p in layer.named_parameters(prefix=name) if n in (start or {})}
        if factors and all(start[n].any() for n in factors):  # a factor of zeros, as in a fresh one, adds nothing
            now = {n: p.clone() for n, p in factors.items()}
            _set(factors, start)
            change = change - layer.get_delta_weight("default")
            _set(factors, now)
        yield name, change


def _set(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold every adapter into its layer, in place: the same policy under the original class's own weight names.

    The merged weights stay frozen. To export while training goes on, merge a `copy.deepcopy`.
    """
    for name, layer in list(_adapted(model)):
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    return model


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "get_delta_weight"))
