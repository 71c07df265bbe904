"""The pictures of OpenVLA: two vision transformers whose patches are joined (Karamcheti et al. 2024, arXiv:2402.07865).

DINOv2 ViT-L/14 with registers (https://arxiv.org/abs/2309.16588) sees where things are, SigLIP So400m/14
(https://arxiv.org/abs/2303.15343) what they are. A patch has the numbers of both, from the second-to-last block.

Names and shapes of the weights are those of the public checkpoints, which are timm's but for the scale of a block's
branches (`ls1.scale_factor`, where timm says `ls1.gamma`). What OpenVLA does not run, a tower's last block, its norm
and the pooling of SigLIP, is kept, so that a checkpoint can be written whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research.errors import UserError, did_you_mean

EPS = 1e-6  # of every layer norm


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of one vision transformer, and the colours it was trained with.

    Args:
        embed_dim, depth, num_heads, mlp_ratio: of its blocks.
        patch_size: pixels along the side of a patch.
        registers: further tokens besides the patches; with any of them there is a class token, too.
        scaled: the two branches of a block are scaled by learned numbers.
        pooled: it has weights that pool its patches.
        mean, std: of red, green and blue in [0, 1].
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    patch_size: int = 14
    registers: int = 0
    scaled: bool = False
    pooled: bool = False
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


# By the names that timm has for them, which is how a checkpoint's config.json calls them.
DINOV2, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
TOWERS = {
    DINOV2: TowerConfig(1024, 24, 16, registers=4, scaled=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    SIGLIP: TowerConfig(1152, 27, 16, mlp_ratio=3.7362, pooled=True),
}


def tower_config(name: str, changes: dict[str, Any]) -> TowerConfig:
    """A known tower, with some of its sizes changed.

    Raises:
        UserError: a tower or a size that is not known, or heads that do not divide the width.
    """
    if name not in TOWERS:
        raise UserError(f"OpenVLA: timm_model_ids: {name!r} is not known; there are {', '.join(TOWERS)}")
    known = [field.name for field in fields(TowerConfig)]
    for key in changes:
        if key not in known:
            raise UserError(f"OpenVLA: towers: {key!r} is no size of a tower{did_you_mean(key, known)}")
    config = replace(TOWERS[name], **changes)
    if config.depth < 2 or config.embed_dim % config.num_heads:
        raise UserError(
            f"OpenVLA: towers: {name} has depth {config.depth}, embed_dim {config.embed_dim} and num_heads "
            f"{config.num_heads}; at least 2 blocks, and heads that divide the width"
        )
    return config


class PrismaticVision(nn.Module):
    """Pictures uint8 `[B, H, W, 3]`, one per camera -> patches `[B, cameras * N, D]`, in a row.

    Args:
        towers: of DINOv2 and of SigLIP.
        image_size: pixels along the sides that the towers see; pictures are brought to it.

    Raises:
        UserError: the towers would see no whole patches, or not as many.
    """

    def __init__(self, towers: Sequence[TowerConfig], image_size: int):
        super().__init__()
        sizes = [tower.patch_size for tower in towers]
        if any(image_size % size for size in sizes) or len({image_size // size for size in sizes}) > 1:
            raise UserError(
                f"OpenVLA: image_sizes: {image_size} pixels are no whole patches of {' and '.join(map(str, sizes))}, "
                "as many in both towers"
            )
        self.image_size = image_size
        self.featurizer, self.fused_featurizer = (VisionTransformer(tower, image_size) for tower in towers)

    @property
    def width(self) -> int:
        """D."""
        return self.featurizer.config.embed_dim + self.fused_featurizer.config.embed_dim

    def forward(self, *pictures: Tensor) -> Tensor:
        return torch.cat([self._patches(picture) for picture in pictures], dim=1)

    def _patches(self, picture: Tensor) -> Tensor:
        pixels, side = picture.movedim(-1, 1).float(), self.image_size
        if pixels.shape[-2:] != (side, side):  # as OpenVLA: without regard to the ratio of the sides, back to 0..255
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).round().clamp(0, 255)
        return torch.cat([tower(pixels / 255) for tower in (self.featurizer, self.fused_featurizer)], dim=2)


class VisionTransformer(nn.Module):
    """Pictures float `[B, 3, H, W]` of 0..1 -> the patches `[B, N, D]` behind the second-to-last block."""

    def __init__(self, config: TowerConfig, image_size: int):
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.pos_embed = nn.Parameter(_start(1, (image_size // config.patch_size) ** 2, width))
        if config.registers:
            self.cls_token = nn.Parameter(_start(1, 1, width))
            self.reg_token = nn.Parameter(_start(1, config.registers, width))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(width, eps=EPS)
        if config.pooled:
            self.attn_pool = LatentPool(config)
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = ((pixels - self.mean) / self.std).to(self.pos_embed.dtype)
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        if self.config.registers:  # these have no position
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        return x[:, -self.pos_embed.shape[1] :]


class Block(nn.Module):
    """Attention and a perceptron, each behind its norm and added to what went in."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        width = config.embed_dim
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn, self.mlp = Attention(width, config.num_heads), Perceptron(width, int(width * config.mlp_ratio))
        self.ls1, self.ls2 = (Scale(width) if config.scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Each token attends to all: `[B, N, D]` -> `[B, N, D]`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Scale(nn.Module):
    """A learned factor for each of a token's numbers (Touvron et al. 2021, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class LatentPool(nn.Module):
    """The weights of SigLIP's pooling, which OpenVLA does not run."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        width = config.embed_dim
        self.latent = nn.Parameter(_start(1, 1, width))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width, eps=EPS), Perceptron(width, int(width * config.mlp_ratio))


def _start(*shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), std=0.02)
