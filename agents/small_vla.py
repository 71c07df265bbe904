"""SmallVLA: a language-conditioned policy of 0.15 M parameters that trains in minutes on a laptop.

    rgb, depth ─ vision_encoder ─ tokens [B, T, F] ──┐
    language ── language_encoder ─ [B, E] ───────────┼─ fusion ─ hidden [B, D] ─┬─ action_head
    proprio ─────────────────────────────────────────┘                          └─ value_head

The instruction attends to the visual tokens, each of which knows its place, so that "the red cube" comes out as one
coordinate pair whatever else lies on the table. (Keypoints chosen before the instruction is known, as in a spatial
soft-argmax, did not learn this: see experiments/LOG.md.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Distribution

from agents.action_heads import make_action_head
from agents.vla import StagedVLA, check_modalities
from research.schema import DEPTH, HIDDEN, LANGUAGE, MODALITIES, OBSERVATION, PROPRIO, RGB, base_modality


class SmallVLA(StagedVLA):
    """See the module's docstring.

    Args:
        action_dim: A.
        modalities: which observations to read, further cameras (`rgb_wrist`, ...) of one size among them; leave out
            what the environment does not have.
        proprio_dim: P of `proprio` `[B, P]`.
        token_size: F, numbers per visual token.
        language_size: E.
        hidden_size: D.
        action_head: "gaussian", "tokens" or, for discrete actions, "categorical"; None takes what fits the environment.
        head: further arguments of the action head, see `agents/action_heads.py`.
        random_shift: pixels by which the update shifts every colour image at random, each by itself, see `RandomShift`;
            0 = not at all.
        action_choices: how many choices each component of a discrete action has.
        horizon, executed: control steps that are planned, and those of them that are executed before the next look.
    """

    def __init__(
        self,
        action_dim: int,
        modalities: Sequence[str] = (RGB, PROPRIO, LANGUAGE),
        proprio_dim: int = 3,
        token_size: int = 24,
        language_size: int = 64,
        hidden_size: int = 128,
        action_head: str | None = None,
        head: dict | None = None,
        random_shift: int = 0,
        action_choices: Sequence[int] | None = None,
        horizon: int = 1,
        executed: int | None = None,
    ):
        super().__init__()
        check_modalities(self, modalities, MODALITIES)
        bases = {m: base_modality(m) for m in modalities}
        self.images = [m for image in (RGB, DEPTH) for m in modalities if bases[m] == image]
        self.reads_language, self.reads_proprio = LANGUAGE in modalities, PROPRIO in modalities
        self.observation_keys = tuple(modalities)
        if self.images:
            channels = sum(3 if bases[image] == RGB else 1 for image in self.images)
            self.vision_encoder = VisionEncoder(channels, token_size)
        in_colour = any(bases[image] == RGB for image in self.images)
        self.random_shift = RandomShift(random_shift) if random_shift and in_colour else None
        if self.reads_language:
            self.language_encoder = LanguageEncoder(language_size)
        self.fusion = Fusion(
            token_size if self.images else 0,
            language_size if self.reads_language else 0,
            proprio_dim if self.reads_proprio else 0,
            hidden_size,
        )
        options = {"horizon": horizon, "executed": executed, **(head or {})}
        self.action_head = make_action_head(action_head, hidden_size, action_dim, action_choices, **options)
        self.value_head = nn.Sequential(nn.Linear(hidden_size, 128), nn.ReLU(), nn.Linear(128, 1))

    def stages(self) -> list[TensorDictModule]:
        stages, features = [], []
        if self.images:
            keys = [(OBSERVATION, image) for image in self.images]
            if self.random_shift is not None:
                for place, image in enumerate(self.images):
                    if base_modality(image) == RGB:
                        shifted = f"shifted_{image}"
                        stages.append(TensorDictModule(self.random_shift, in_keys=[keys[place]], out_keys=[shifted]))
                        keys[place] = shifted
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

    def point(self, features: TensorDictBase, count: int) -> Tensor:
        """Where the first `count` questions point, `[B, count, 2]`: x right and y up, the picture's edges at -1 and 1.

        Args:
            features: a TensorDict that the stages have been through.
            count: at most the number of slots.
        """
        language = features["language_features"] if self.reads_language else None
        return self.fusion.answers(features["vision_features"], language)[:, :count, :2]


class RandomShift(nn.Module):
    """Shifts every image by up to `pixels` each way, where gradients are computed (Yarats et al. 2021, DrQ,
    https://arxiv.org/abs/2004.13649).

    The policy acts on unshifted images, so PPO's ratio starts near 1 and not at it.
    """

    stochastic = True  # what reads this cannot be computed once and kept

    def __init__(self, pixels: int):
        super().__init__()
        self.pixels = pixels

    def forward(self, image: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return image
        first = image.shape[-1] != 3
        channels_first = image if first else image.permute(0, 3, 1, 2)
        b, _, h, w = channels_first.shape
        padded = nn.functional.pad(channels_first.float(), [self.pixels] * 4, mode="replicate").to(image.dtype)
        down, right = torch.randint(0, 2 * self.pixels + 1, (2, b, 1), device=image.device)
        rows = (down + torch.arange(h, device=image.device))[:, None, :, None]  # [B, 1, H, 1]
        columns = (right + torch.arange(w, device=image.device))[:, None, None, :]
        which = torch.arange(b, device=image.device)[:, None, None, None]
        channel = torch.arange(3, device=image.device)[None, :, None, None]
        shifted = padded[which, channel, rows, columns]
        return shifted if first else shifted.permute(0, 2, 3, 1)


class VisionEncoder(nn.Module):
    """Images to tokens, one per 8 x 8 pixels: rgb uint8 `[B, H, W, 3]` or `[B, 3, H, W]`, depth `[B, H, W]` metres ->
    `[B, T, F]`. A token starts with the place it speaks of: its cell's centre plus a learned offset, `x, y` in [-1, 1].
    """

    def __init__(self, channels: int, token_size: int):
        super().__init__()
        self.patches = nn.Conv2d(channels, 24, 4, stride=4)  # as a ViT's: nothing runs at full resolution
        self.cells = nn.Conv2d(24, 48, 4, stride=2, padding=1)
        self.tokens = nn.Conv2d(48, token_size, 1)

    def forward(self, *images: Tensor) -> Tensor:
        planes = torch.cat([_plane(image) for image in images], dim=1) if len(images) > 1 else _plane(images[0])
        maps = self.tokens(torch.relu(self.cells(torch.relu(self.patches(planes)))))  # [B, F, h, w]
        h, w = maps.shape[-2:]
        x, y = _centres(w, maps).repeat(h), -_centres(h, maps).repeat_interleave(w)
        tokens = maps.flatten(2).transpose(1, 2)  # [B, T, F]
        place = torch.stack([x, y], dim=-1) + tokens[..., :2] / w
        return torch.cat([place, tokens[..., 2:]], dim=-1)


def _centres(count: int, like: Tensor) -> Tensor:
    """Centres of `count` cells that divide [-1, 1]."""
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) * (2 / count) - 1


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
    """Tokens `[B, T, F]`, language `[B, E]`, proprioception `[B, P]` -> `hidden` `[B, D]`; any may be absent (size 0).

    The instruction asks `slots` questions of the tokens by attention; the answers are places, compared with the
    gripper's own by the layers that follow.
    """

    def __init__(self, token_size: int, language_size: int, proprio_dim: int, hidden_size: int, slots: int = 4):
        super().__init__()
        self.token_size, self.language_size, self.proprio_dim, self.slots = (
            token_size,
            language_size,
            proprio_dim,
            slots,
        )
        if token_size:
            self.question = nn.Linear(language_size, slots * token_size) if language_size else None
            self.standing = nn.Parameter(0.1 * torch.randn(slots, token_size))
        if proprio_dim:
            self.register_buffer("proprio_mean", torch.zeros(proprio_dim))
            self.register_buffer("proprio_std", torch.ones(proprio_dim))
        inputs = slots * token_size + language_size + proprio_dim
        self.layers = nn.Sequential(
            nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, hidden_size), nn.LayerNorm(hidden_size), nn.ReLU()
        )

    def answers(self, tokens: Tensor, language: Tensor | None) -> Tensor:
        """What each question attends to: `[B, slots, F]`, the first two numbers a place."""
        question = self.standing.expand(tokens.shape[0], -1, -1)  # [B, slots, F]
        if language is not None:
            question = question + self.question(language).unflatten(-1, (self.slots, self.token_size))
        weight = torch.softmax(question @ tokens.transpose(1, 2) / self.token_size**0.5, dim=-1)
        return weight @ tokens

    def forward(self, *features: Tensor) -> Tensor:
        remaining, inputs = list(features), []
        tokens = remaining.pop(0) if self.token_size else None
        language = remaining.pop(0) if self.language_size else None
        if tokens is not None:
            inputs.append(self.answers(tokens, language).flatten(1))
        if language is not None:
            inputs.append(language)
        if self.proprio_dim:
            inputs.append((remaining.pop(0) - self.proprio_mean) / self.proprio_std)
        return self.layers(torch.cat(inputs, dim=-1))
