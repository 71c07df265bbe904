"""EfficientNet-Lite: a convolutional image encoder that is fast on CPUs, and its ImageNet weights.

The architecture: EfficientNet (Tan & Le 2019, https://arxiv.org/abs/1905.11946), in the Lite variants of its authors
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite): no squeeze-and-excitation, ReLU6 for
swish, and a stem, a first and a last group of blocks that are the same in every variant.

A batch norm with fixed statistics is a linear map of each channel, so it is folded into the convolution before it when
weights are read. Layers are convolutions with a bias, and there are no statistics that training could move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.packaged_weights import fill_part, located
from agents.weights import read_weights
from research.errors import UserError, did_you_mean


class Group(NamedTuple):
    """Blocks in a row, the first of which has the stride and changes the number of channels."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


# Table 1 of the paper; of the multipliers (width, depth), the table of the Lite variants.
GROUPS = (
    Group(1, 3, 1, 1, 16),
    Group(2, 3, 2, 6, 24),
    Group(2, 5, 2, 6, 40),
    Group(3, 3, 2, 6, 80),
    Group(3, 5, 1, 6, 112),
    Group(4, 5, 2, 6, 192),
    Group(1, 3, 1, 6, 320),
)
VARIANTS = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
    "efficientnet_lite3": (1.2, 1.4),
    "efficientnet_lite4": (1.4, 1.8),
}
STEM_CHANNELS, STEM_KERNEL, STEM_STRIDE = 32, 3, 2
STRIDES = (2, 4, 8, 16, 32)
PIXEL_MEAN, PIXEL_STD = 127.0, 128.0  # what the weights were trained on; not ImageNet's own mean and deviation
BATCH_NORM_EPSILON = 1e-3
OPTION = "policy.vla_config.model_config.vision_weights"


class EfficientNetLite(nn.Module):
    """Images to feature maps: of each stride, the output of the last block that has it.

    Blocks behind the last map, and the classifier, are not made. Fresh weights are He's (2015, arXiv:1502.01852), drawn
    from torch's global generator.

    Args:
        variant: one of `VARIANTS`.
        strides: of the maps, ascending; some of 2, 4, 8, 16, 32.

    Attributes:
        ends: of each map, how many blocks it is behind.
        channels: of each map.
    """

    def __init__(self, variant: str, strides: Sequence[int] = (8, 16)):
        super().__init__()
        if variant not in VARIANTS:
            raise UserError(
                f"policy.vla_config.model_config.vision_encoder: {variant!r} is not known"
                f"{did_you_mean(variant, VARIANTS)}; there are {', '.join(VARIANTS)}"
            )
        if not strides or any(s not in STRIDES for s in strides) or list(strides) != sorted(set(strides)):
            raise UserError(
                "policy.vla_config.model_config.vision_strides should be some of "
                f"{', '.join(map(str, STRIDES))}, ascending, got {list(strides)}"
            )
        self.variant = variant
        plan = list(_plan(*VARIANTS[variant]))
        last = {stride: count for count, (stride, _) in enumerate(plan, 1)}  # stride -> blocks up to its last one
        self.ends = tuple(last[stride] for stride in strides)
        plan = plan[: self.ends[-1]]
        self.channels = tuple(plan[end - 1][1]["outputs"] for end in self.ends)
        self.stem = convolution(3, STEM_CHANNELS, STEM_KERNEL, STEM_STRIDE)
        self.blocks = nn.ModuleList(Block(**arguments) for _, arguments in plan)
        # Measured on one CPU core, forward, 64 and 96 pixels: 1.6 to 2.1 times as fast as with channels first.
        self.to(memory_format=torch.channels_last)

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Pictures of N cameras, uint8 `[B, H, W, 3]` or `[B, 3, H, W]` -> maps `[B, N, H / stride, W / stride, C]`."""
        return BlockRange(self, 0, len(self.blocks), self.ends)(*images)

    def leading_frozen(self) -> int:
        """How many blocks lie before the first weight that trains."""
        count = 0
        if not _trains(self.stem):
            while count < len(self.blocks) and not _trains(self.blocks[count]):
                count += 1
        return count

    def load_weights(self, spec: str) -> None:
        """Fill the encoder from a file whose names are those of the public PyTorch ports (`_conv_stem.weight`, ...).

        Args:
            spec: "package:<installed package>", a local file, or a folder that holds one.
        Raises:
            UserError: it does not exist, or does not fit.
        """
        path = located(spec, OPTION)
        state = {name: value for shard in read_weights(path) for name, value in shard.items()}
        other = f"; set {OPTION} to weights of {self.variant}, or vision_encoder to the variant of these"
        fill_part(self, _folded(self, state, path), path, OPTION, other)


class Block(nn.Module):
    """An inverted residual (Sandler et al. 2018, https://arxiv.org/abs/1801.04381): `[B, C, h, w]` to `[B, D, ...]`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.expand = convolution(inputs, width) if expansion > 1 else None
        self.depthwise = convolution(width, width, kernel, stride, groups=width)
        self.project = convolution(width, outputs, activated=False)
        self.window = kernel, stride
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else relu6(self.expand(x))
        y = self.project(relu6(self.depthwise(padded(y, *self.window))))
        return x + y if self.residual else y


class BlockRange(nn.Module):
    """Some of an encoder's blocks in a row, as a stage of their own; those that begin it start from pictures.

    Args:
        encoder: whose blocks they are; they are shared.
        start, stop: the blocks from `start` up to, and without, `stop`.
        outputs: behind how many blocks of the encoder an output is taken.
        half: round outputs to half precision, for whoever keeps them.
    """

    def __init__(self, encoder: EfficientNetLite, start: int, stop: int, outputs: Sequence[int], half: bool = False):
        super().__init__()
        self.stem = encoder.stem if start == 0 else None
        self.blocks = nn.ModuleList(encoder.blocks[start:stop])
        self.start, self.outputs, self.half_precision = start, tuple(outputs), half

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Pictures, or the map `[B, N, h, w, C]` that block `start` reads -> maps `[B, N, h, w, C]`."""
        x, lead = self._begin(images)
        found = []
        for count, block in enumerate(self.blocks, self.start + 1):
            x = block(x)
            if count in self.outputs:
                channels_last = x.permute(0, 2, 3, 1).unflatten(0, lead)
                found.append(channels_last.half() if self.half_precision else channels_last)
        return tuple(found)

    def _begin(self, images: Sequence[Tensor]) -> tuple[Tensor, tuple[int, int]]:
        """What the first block reads, `[B * N, C, h, w]`, and `(B, N)`."""
        if self.stem is None:
            return images[0].flatten(0, 1).permute(0, 3, 1, 2).float(), tuple(images[0].shape[:2])
        pictures = [rgb.permute(0, 3, 1, 2) if rgb.shape[-1] == 3 else rgb for rgb in images]  # [B, 3, H, W]
        if len(sizes := {tuple(picture.shape[-2:]) for picture in pictures}) > 1:
            raise UserError(f"one encoder reads pictures of one size, the cameras' are {sorted(sizes)} (height, width)")
        # One picture after the other in a row of the batch: their features lie side by side.
        x = pictures[0] if len(pictures) == 1 else torch.stack(pictures, 1).flatten(0, 1)
        x = ((x.float() - PIXEL_MEAN) / PIXEL_STD).contiguous(memory_format=torch.channels_last)
        return relu6(self.stem(padded(x, STEM_KERNEL, STEM_STRIDE))), (len(pictures[0]), len(pictures))


def _plan(width: float, depth: float) -> Iterable[tuple[int, dict[str, int]]]:
    """Of each block, the stride of its output against the picture, and the arguments of `Block`."""
    inputs, stride = STEM_CHANNELS, STEM_STRIDE
    for i, group in enumerate(GROUPS):
        outputs = _rounded(group.channels * width)
        scaled = 0 < i < len(GROUPS) - 1
        stride *= group.stride
        for k in range(math.ceil(group.repeats * depth) if scaled else group.repeats):
            own = {"kernel": group.kernel, "stride": group.stride if k == 0 else 1, "expansion": group.expansion}
            yield stride, {"inputs": inputs, "outputs": outputs, **own}
            inputs = outputs


def _rounded(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of 8, and never less than 0.9 of what it stands for."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest if nearest >= 0.9 * channels else nearest + divisor


def convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, activated: bool = True
) -> nn.Conv2d:
    """A convolution with fresh weights, for a ReLU behind it or (`activated=False`) for none.

    At stride 1 it pads by itself, at stride 2 the picture is to be `padded` before.
    """
    padding = kernel // 2 if stride == 1 else 0
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if activated else "linear")
    nn.init.zeros_(layer.bias)
    return layer


def relu6(x: Tensor) -> Tensor:
    """In place, unless there is a backward pass: it needs what is overwritten, of which autograd would make a copy."""
    return F.relu6(x, inplace=not x.requires_grad)


def padded(x: Tensor, kernel: int, stride: int) -> Tensor:
    """`x` with zeros around it so that a convolution gives ceil(size / stride) places, as TensorFlow's "same" does.

    The weights come from there: at stride 2 and an even size, the right and the lower edge get one row more than the
    left and the upper one, where PyTorch's own padding is the same on both sides.
    """
    if stride == 1:
        return x
    down, right = (max(0, (math.ceil(n / stride) - 1) * stride + kernel - n) for n in x.shape[-2:])
    return F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _folded(encoder: EfficientNetLite, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The encoder's weights, batch norms folded in, from those of a public port."""
    pairs = [("stem", "_conv_stem", "_bn0")]
    for i, block in enumerate(encoder.blocks):
        layers = [("depthwise", "_depthwise_conv", "_bn1"), ("project", "_project_conv", "_bn2")]
        layers = [("expand", "_expand_conv", "_bn0")] * (block.expand is not None) + layers
        pairs += [(f"blocks.{i}.{own}", f"_blocks.{i}.{theirs}", f"_blocks.{i}.{norm}") for own, theirs, norm in layers]
    folded = {}
    for own, theirs, norm in pairs:
        names = [f"{theirs}.weight", *(f"{norm}.{n}" for n in ("weight", "bias", "running_mean", "running_var"))]
        if absent := [n for n in names if not (isinstance(v := state.get(n), Tensor) and v.is_floating_point())]:
            raise UserError(f"{OPTION}: {path} holds no EfficientNet-Lite: it lacks {absent[0]} (of floats)")
        # In double precision, root and quotient rounded correctly, so that every machine gets the same bits.
        weight, scale, shift, mean, variance = (state[name].double() for name in names)
        scale = scale / (variance + BATCH_NORM_EPSILON).sqrt()
        folded[f"{own}.weight"] = (weight * scale.view(-1, 1, 1, 1)).float()
        folded[f"{own}.bias"] = (shift - mean * scale).float()
    return folded
