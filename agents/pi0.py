"""pi0 (Black et al. 2024, arXiv:2410.24164): a vision-language model, and an expert that denoises a chunk of actions.

    rgb, rgb_<camera> ── vision_tower ─ patches [B, N, D'] ── projector ─┐
    language ── tokens ──────────────────────────────────────────────────┴─ language_model ─┬─ prefix_kv ─────┐
                                                                                            └─ prefix_hidden ─┼─┐
    proprio, noise, time ── action_expert ────────────────────────────────────────── velocity ────────────────┘ │
                                                                                     value_head ────────────────┘

The modules are those of transformers' PI0, and so is the folder of a checkpoint (`agents/pi0_folder.py`). All tokens of
the prefix see each other; the state sees the prefix; the noised actions see both and each other. The keys and values of
the prefix are computed once per observation: with the vision-language model frozen, once per transition.

How actions are drawn, and what their log-probability is: `agents/flow.py`. Actions and states are in numbers of unit
size, by the statistics of the data that the checkpoint was trained on (`statistics`); the world gets the data's units.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from transformers import GemmaModel, PI0ForConditionalGeneration
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer

from agents import pi0_folder
from agents.checkpoint_folder import fill_own_heads
from agents.flow import Velocity
from agents.flow_vla import PREFIX_HIDDEN, READS, STEPS, FlowVLA, Noise
from agents.gradient_checkpointing import Recomputed, checkpoint_layers
from agents.normalisation import Kind
from agents.prompts import behind_pictures, mean_of_seen, prompt_tokens
from agents.sentence_encoder import read_tokenizer
from research.schema import LANGUAGE, OBSERVATION, PROPRIO

PATCHES, PREFIX_KV, PREFIX_SEEN = "patches", "prefix_kv", "prefix_seen"
LONGEST_PROMPT, START = 48, "<bos>"  # tokens, as pi0 was trained; of a tokenizer
Kept = tuple[Tensor, Tensor]  # keys and values, each `[B, heads, S, d]`


class Pi0VLA(FlowVLA):
    """See the module's docstring.

    Args:
        action_dim: A, numbers of an action that the environment takes; the model's further ones are not executed.
        modalities: which observations to read, further cameras (`rgb_wrist`, ...) among them.
        proprio_dim: P of `proprio` `[B, P]`, padded with zeros to the model's.
        pretrained: a local folder as transformers or `export` writes it; None: fresh weights.
        config: arguments of a `transformers.PI0Config`, over those of `pretrained`.
        tokenizer: a local folder with `tokenizer.json`; None: that of `pretrained`, or bytes for fresh weights.
        executed: control steps that are executed, of the `chunk_size` that the model denoises.
        steps: K, denoising steps; None: as many as `pretrained` says, 4 for fresh weights.
        noise: a of `FlowSDE`, or two bounds of deviations, as [0.08, 0.16], for `FlowNoise`.
        statistics: file with the statistics of the data, see `agents.normalisation.read_statistics`; None: those that
            `export` wrote; without any, actions and states are used as they are.
        dataset: whose statistics, where the file has several.
        normalisation: "mean_std", "quantiles" or "min_max".
        gradient_checkpointing: compute the layers' activations again in the backward pass instead of keeping them.

    Raises:
        UserError: what `pretrained`, `tokenizer` or `statistics` name is absent or does not fit.
    """

    # Attention and feed-forward layers of the language model, as openpi's gemma_2b_lora, beside an expert that trains
    # in full, as in RLinf. Without adapters in the vision tower, what it sees is computed once per transition.
    lora_targets = ("language_model.layers",)

    def __init__(
        self,
        action_dim: int,
        modalities: Sequence[str] = READS,
        proprio_dim: int = 0,
        pretrained: str | None = None,
        config: dict | None = None,
        tokenizer: str | None = None,
        executed: int = 1,
        steps: int | None = None,
        noise: Noise = 0.5,
        statistics: str | None = None,
        dataset: str | None = None,
        normalisation: Kind = "mean_std",
        gradient_checkpointing: bool = False,
    ):
        config = pi0_folder.pi0_config(pretrained, config)
        statistics = statistics or pi0_folder.statistics_in(pretrained)
        steps = steps or (STEPS if pretrained is None else config.num_inference_steps)
        super().__init__(
            modalities, config.chunk_size, config.max_action_dim, config.max_state_dim,
            config.vlm_config.text_config.hidden_size, action_dim, proprio_dim, executed, steps, noise, statistics,
            dataset, normalisation,
        )  # fmt: skip
        self.config, self.pretrained, self.statistics = config, pretrained, statistics
        hub = PI0ForConditionalGeneration(config) if pretrained is None else pi0_folder.load_hub(pretrained, config)
        self.vision_tower, self.projector = hub.model.vlm.vision_tower, hub.model.vlm.multi_modal_projector
        self.language_model = hub.model.vlm.language_model
        self.action_expert = ActionExpert(hub, gradient_checkpointing)
        if pretrained is not None:
            fill_own_heads(self, Path(pretrained), "Pi0VLA: pretrained")
        self.tokenizer_folder = tokenizer or (None if pi0_folder.reads_bytes(config) else pretrained)
        self.words = None
        if self.tokenizer_folder:
            self.words = read_tokenizer(
                Path(self.tokenizer_folder), config.vlm_config.text_config.vocab_size, "Pi0VLA: tokenizer"
            )
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            checkpoint_layers(self.vision_tower.encoder.layers)

    # ---------------------------------------------------------------------------------------------------- the contract

    @property
    def context_keys(self) -> tuple:
        return (PREFIX_KV, PREFIX_SEEN, PREFIX_HIDDEN, *([(OBSERVATION, PROPRIO)] if self.reads_proprio else []))

    def stages(self) -> list[TensorDictModule]:
        """What the vision tower sees; and what the language model makes of that and of the instruction."""
        pictures = [(OBSERVATION, image) for image in self.images]
        language = [(OBSERVATION, LANGUAGE)] if self.reads_language else []
        return [
            TensorDictModule(Patches(self), in_keys=pictures, out_keys=[PATCHES]),
            TensorDictModule(
                Prefix(self), in_keys=[PATCHES, *language], out_keys=[PREFIX_KV, PREFIX_SEEN, PREFIX_HIDDEN]
            ),
        ]

    def velocity(self, step: TensorDictBase) -> Velocity:
        kv, seen = step.get(PREFIX_KV), step.get(PREFIX_SEEN)
        if self.reads_proprio:
            state = self.padded_state(step.get((OBSERVATION, PROPRIO)))
        else:
            state = kv.new_zeros(len(kv), self.state_room, dtype=torch.float32)
        return lambda x, time: self.action_expert(state, x, time, kv, seen)

    def export(self, folder: Path) -> None:
        """Write a folder that transformers reads, and `pretrained`; see `agents/pi0_folder.py`."""
        pi0_folder.export(self, Path(folder))


class Patches(nn.Module):
    """Pictures uint8 `[B, H, W, 3]`, one per camera -> what the vision tower makes of them, `[B, N, D']`, in a row."""

    def __init__(self, model: Pi0VLA):
        super().__init__()
        self.vision_tower = model.vision_tower
        self.size = model.config.vlm_config.vision_config.image_size

    def forward(self, *pictures: Tensor) -> Tensor:
        return torch.cat([self._patches(picture) for picture in pictures], dim=1)

    def _patches(self, picture: Tensor) -> Tensor:
        pixels = picture.movedim(-1, 1).float() / 127.5 - 1
        return self.vision_tower(fitted(pixels, self.size)).last_hidden_state


def fitted(pixels: Tensor, size: int) -> Tensor:
    """Pictures `[B, 3, H, W]` of -1 to 1 in a square of `size`, whole, at their own ratio and between black bars.

    As openpi's `resize_with_pad` (src/openpi/shared/image_tools.py), by which pi0 was trained: bilinear, antialiased,
    in the middle. transformers' PI0ImageProcessor resizes bicubically, and has grey to the right and below.
    """
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    inner = [max(1, side * size // max(height, width)) for side in (height, width)]
    pixels = F.interpolate(pixels, inner, mode="bilinear", antialias=True)
    (top, bottom), (left, right) = ((free // 2, free - free // 2) for free in (size - inner[0], size - inner[1]))
    return F.pad(pixels, (left, right, top, bottom), value=-1.0)


class Prefix(nn.Module):
    """Patches `[B, N, D']` and the instruction -> what the language model's layers keep of them.

    Returns:
        keys and values `[B, layers, 2, heads, S, d]`; which of the S tokens are no padding, bool `[B, S]`; and the mean
        of the last states of those, `[B, D]`.
    """

    def __init__(self, model: Pi0VLA):
        super().__init__()
        self.projector, self.language_model, self.words = model.projector, model.language_model, model.words
        self.recompute = model.gradient_checkpointing

    def forward(self, patches: Tensor, language: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        ids, is_token = prompt_tokens(self.words, language, len(patches), patches.device, LONGEST_PROMPT, START)
        words = self.language_model.get_input_embeddings()(ids)
        tokens, seen = behind_pictures(self.projector(patches), words, is_token)
        states, kept = run_gemma(
            self.language_model, tokens, seen[:, None].expand(-1, seen.shape[1], -1), seen.cumsum(dim=1) - 1,
            recompute=self.recompute,
        )  # fmt: skip
        kv = torch.stack([torch.stack(layer, dim=1) for layer in kept], dim=1)
        return kv, seen, mean_of_seen(states, seen)


class ActionExpert(nn.Module):
    """The velocity of noised actions: a transformer whose layers also attend to the prefix's keys and values."""

    def __init__(self, hub: PI0ForConditionalGeneration, recompute: bool = False):
        super().__init__()
        self.recompute = recompute
        self.transformer, self.embedding, self.velocity = hub.model.dit, hub.embed_action_time, hub.action_out_proj

    def forward(self, state: Tensor, x: Tensor, time: Tensor, kv: Tensor, seen: Tensor) -> Tensor:
        """Velocity `[B, H, A]`.

        Args:
            state: `[B, P]`.
            x: `[B, H, A]` at `time` `[B]`.
            kv, seen: what `Prefix` returns.
        """
        tokens = self.embedding(state, x.to(state.dtype), time.float())  # [B, 1 + H, D]
        b, length = tokens.shape[:2]
        among = torch.ones(length, length, dtype=torch.bool, device=x.device)
        among[0, 1:] = False  # the state does not see the actions
        visible = torch.cat([seen[:, None].expand(-1, length, -1), among.expand(b, -1, -1)], dim=2)
        positions = seen.sum(dim=1, keepdim=True) + torch.arange(length, device=x.device)
        before = [(layer[:, 0], layer[:, 1]) for layer in kv.unbind(dim=1)]
        states, _ = run_gemma(self.transformer, tokens, visible, positions, before, self.recompute)
        return self.velocity(states[:, 1:]).float()


def run_gemma(
    model: GemmaModel,
    tokens: Tensor,
    visible: Tensor,
    positions: Tensor,
    before: Sequence[Kept] | None = None,
    recompute: bool = False,
) -> tuple[Tensor, list[Kept]]:
    """Last states `[B, Q, D]` of tokens `[B, Q, D]`, and the keys and values of every layer.

    Args:
        model: its layers are run; each with a cache of its own, so that one can be run again by itself.
        tokens: of the width of the model.
        visible: bool `[B, Q, K]`; K counts the tokens before, first, and these.
        positions: int64 `[B, Q]`.
        before: of every layer, the keys and values of the tokens before.
        recompute: keep the layers' inputs alone for the backward pass.
    """
    run = Recomputed(run_layer) if recompute else run_layer
    bias, rotation = attention_bias(visible, tokens.dtype), model.rotary_emb(tokens, position_ids=positions)
    kept = []
    for number, layer in enumerate(model.layers):
        tokens, *own = run(layer, tokens, bias, rotation, None if before is None else before[number])
        kept.append(tuple(own))
    return model.norm(tokens), kept


def run_layer(
    layer: GemmaDecoderLayer, tokens: Tensor, bias: Tensor, rotation: Kept, before: Kept | None
) -> tuple[Tensor, Tensor, Tensor]:
    """States of one layer, and its keys and values, those before among them."""
    cache = LayerCache(before)
    tokens = layer(tokens, attention_mask=bias, position_embeddings=rotation, past_key_values=cache)
    return tokens, *cache.kept


class LayerCache:
    """What a layer of transformers asks of a cache."""

    def __init__(self, kept: Kept | None):
        self.kept = kept

    def update(self, keys: Tensor, values: Tensor, layer: int) -> Kept:
        """Keys and values with those before."""
        new = keys, values
        self.kept = (
            new if self.kept is None else tuple(torch.cat(pair, dim=-2) for pair in zip(self.kept, new, strict=True))
        )
        return self.kept


def attention_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores, `[B, 1, Q, K]`: 0 where bool `[B, Q, K]` is set, else the least number."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
