"""SmallVLA: a language-conditioned policy of 0.15 M parameters that trains in minutes on a laptop.

    rgb, depth ─ vision_encoder ─ keypoints [B, 3K] ─┐
    language ── language_encoder ─ [B, E] ───────────┼─ fusion ─ hidden [B, D] ─┬─ action_head
    proprio ─────────────────────────────────────────┘                          └─ value_head

The vision encoder ends in a spatial soft-argmax ("Deep Spatial Autoencoders", Finn et al. 2016): each of K feature maps
becomes the place it responds to and how strongly. The instruction then selects among these keypoints by attention, so
that "the red cube" comes out as one coordinate pair whatever else lies on the table. What vision hands on is small
(3K numbers), which is what makes frozen features cheap to keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Distribution

from agents.action_heads import GaussianHead, TokenHead
from agents.vla import StagedVLA
from research.schema import DEPTH, HIDDEN, LANGUAGE, MODALITIES, OBSERVATION, PROPRIO, RGB, UserError


class SmallVLA(StagedVLA):
    """See the module's docstring.

    Args:
        action_dim: A.
        modalities: which observations to read; leave out what the environment does not have.
        proprio_dim: P of `proprio` `[B, P]`.
        keypoints: K.
        language_size: E.
        hidden_size: D.
        action_head: "gaussian" or "tokens".
        head: further arguments of the action head, see `agents/action_heads.py`.
    """

    def __init__(
        self,
        action_dim: int,
        modalities: Sequence[str] = (RGB, PROPRIO, LANGUAGE),
        proprio_dim: int = 3,
        keypoints: int = 48,
        language_size: int = 64,
        hidden_size: int = 128,
        action_head: str = "gaussian",
        head: dict | None = None,
    ):
        super().__init__()
        unknown = [m for m in modalities if m not in MODALITIES]
        if unknown or not modalities:
            raise UserError(f"SmallVLA: modalities are {', '.join(MODALITIES)}, got {list(modalities)!r}")
        heads = {"gaussian": GaussianHead, "tokens": TokenHead}
        if action_head not in heads:
            raise UserError(f"SmallVLA: action_head is 'gaussian' or 'tokens', got {action_head!r}")
        self.images = [m for m in (RGB, DEPTH) if m in modalities]
        self.reads_language, self.reads_proprio = LANGUAGE in modalities, PROPRIO in modalities
        self.observation_keys = tuple(modalities)
        if self.images:
            channels = 3 * (RGB in self.images) + (DEPTH in self.images)
            self.vision_encoder = VisionEncoder(channels, keypoints)
        if self.reads_language:
            self.language_encoder = LanguageEncoder(language_size)
        self.fusion = Fusion(
            keypoints if self.images else 0,
            language_size if self.reads_language else 0,
            proprio_dim if self.reads_proprio else 0,
            hidden_size,
        )
        self.action_head = heads[action_head](hidden_size, action_dim, **(head or {}))
        self.value_head = nn.Sequential(nn.Linear(hidden_size, 128), nn.ReLU(), nn.Linear(128, 1))

    def stages(self) -> list[TensorDictModule]:
        stages, features = [], []
        if self.images:
            keys = [(OBSERVATION, image) for image in self.images]
            stages.append(TensorDictModule(self.vision_encoder, in_keys=keys, out_keys=["vision_features"]))
            features.append("vision_features")
        if self.reads_language:
            keys = [(OBSERVATION, LANGUAGE)]
            stages.append(TensorDictModule(self.language_encoder, in_keys=keys, out_keys=["language_features"]))
            features.append("language_features")
        if self.reads_proprio:
            features.append((OBSERVATION, PROPRIO))
        return [*stages, TensorDictModule(self.fusion, in_keys=features, out_keys=[HIDDEN])]

    def action_distribution(self, hidden: Tensor) -> Distribution:
        return self.action_head(hidden)

    def value(self, hidden: Tensor) -> Tensor:
        return self.value_head(hidden).float()


class VisionEncoder(nn.Module):
    """Images to keypoints: rgb uint8 `[B, H, W, 3]` or `[B, 3, H, W]`, depth `[B, H, W]` metres -> `[B, 3K]`."""

    def __init__(self, channels: int, keypoints: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 24, 4, stride=4),  # patches, as a ViT: nothing runs at full resolution
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, keypoints, 1),
        )

    def forward(self, *images: Tensor) -> Tensor:
        maps = self.layers(torch.cat([_plane(image) for image in images], dim=1))  # [B, K, h, w]
        h, w = maps.shape[-2:]
        flat = maps.flatten(2)
        peak = flat.amax(dim=-1, keepdim=True)
        # Soft-argmax as one matrix product: where each map responds, its coordinates weighted by exp(response).
        x = torch.linspace(-1, 1, w, device=maps.device, dtype=maps.dtype).expand(h, w)
        y = torch.linspace(1, -1, h, device=maps.device, dtype=maps.dtype)[:, None].expand(h, w)
        grid = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(h * w, 3)
        sums = torch.exp(flat - peak) @ grid  # [B, K, 3]
        place = sums[..., :2] / sums[..., 2:]
        strength = torch.tanh(peak.squeeze(-1) / 4)
        return torch.cat([place[..., 0], place[..., 1], strength], dim=-1)


def _plane(image: Tensor) -> Tensor:
    """rgb to `[B, 3, H, W]` in [-1, 1], depth to `[B, 1, H, W]`."""
    if image.dtype != torch.uint8:
        return image.unsqueeze(1)
    channels_first = image.permute(0, 3, 1, 2) if image.shape[-1] == 3 else image
    return channels_first.float().sub_(127.5).mul_(1 / 127.5)


class LanguageEncoder(nn.Module):
    """An instruction's bytes int64 `[B, L]` to `[B, E]`: two convolutions see 17 bytes at a time, then a maximum."""

    def __init__(self, size: int):
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.near = nn.Conv1d(16, 32, 5, padding=2)
        self.far = nn.Conv1d(32, size, 5, padding=6, dilation=3)

    def forward(self, tokens: Tensor) -> Tensor:
        written = (tokens != 0)[:, None]  # [B, 1, L]
        x = self.embedding(tokens).transpose(1, 2)
        x = torch.relu(self.near(x)) * written
        x = self.far(x).masked_fill(~written, -1e4)
        return torch.relu(x.amax(dim=-1))


class Fusion(nn.Module):
    """Keypoints `[B, 3K]`, language `[B, E]`, proprioception `[B, P]` -> `hidden` `[B, D]`; any may be absent (size 0).

    The instruction asks `slots` questions of the keypoints; the answers are places, compared with the gripper's own by
    the layers that follow.
    """

    def __init__(self, keypoints: int, language_size: int, proprio_dim: int, hidden_size: int, slots: int = 8):
        super().__init__()
        self.keypoints, self.language_size, self.proprio_dim, self.slots = keypoints, language_size, proprio_dim, slots
        inputs = language_size + proprio_dim
        if keypoints:
            inputs += 3 * slots + 3 * keypoints
            self.question = nn.Linear(language_size, slots * keypoints) if language_size else None
            self.standing = nn.Parameter(torch.zeros(slots, keypoints))
        if proprio_dim:
            self.register_buffer("proprio_mean", torch.zeros(proprio_dim))
            self.register_buffer("proprio_std", torch.ones(proprio_dim))
        self.layers = nn.Sequential(
            nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, hidden_size), nn.LayerNorm(hidden_size), nn.ReLU()
        )

    def forward(self, *features: Tensor) -> Tensor:
        remaining, inputs, answers = list(features), [], None
        points = remaining.pop(0) if self.keypoints else None
        language = remaining.pop(0) if self.language_size else None
        if points is not None:
            scores = self.standing  # [slots, K]
            if language is not None:
                scores = scores + self.question(language).unflatten(-1, (self.slots, self.keypoints))
            weight = torch.softmax(scores, dim=-1)
            if weight.ndim == 2:
                weight = weight.expand(points.shape[0], -1, -1)
            answers = weight @ points.unflatten(-1, (3, self.keypoints)).transpose(1, 2)  # [B, slots, 3]
            inputs += [points, answers.flatten(1)]
        if language is not None:
            inputs.append(language)
        if self.proprio_dim:
            inputs.append((remaining.pop(0) - self.proprio_mean) / self.proprio_std)
        return self.layers(torch.cat(inputs, dim=-1))
