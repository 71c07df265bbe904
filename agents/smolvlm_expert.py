"""SmolVLA's transformers: a language model's layers, and an expert whose layers read what those keep.

Both are made of Llama's layers, as transformers has them. Every n-th layer of the expert attends to the keys and values
that the language model has in that layer, and to its own; the others attend to the language model's alone, through
projections of their own (arXiv:2506.01844, section 3.2). Rotary positions have the wavelengths of base 10,000, whatever
the language model was trained with: so does LeRobot, and so were the published weights trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from agents.gradient_checkpointing import Recomputed

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
Rotation = tuple[Tensor, Tensor]
Kept = tuple[Tensor, Tensor]


def language_layers(config: LlamaConfig, layers: int) -> LlamaModel:
    """The first layers of a language model, fresh, with the rotation that SmolVLA has; layers <= 0: all."""
    config = copy.deepcopy(config)
    config.rope_parameters = dict(ROPE)
    if layers > 0:
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
    return LlamaModel(config)


def expert_config(language: LlamaConfig, multiplier: float) -> LlamaConfig:
    """The sizes of the expert: the language model's width times `multiplier`, its heads and its layers.

    The feed-forward layers have 8 / 3 of the width, rounded up to a multiple of 256.
    """
    config = copy.deepcopy(language)
    config.hidden_size = int(language.hidden_size * multiplier)
    config.intermediate_size = 256 * math.ceil(int(4 * int(2 * config.hidden_size / 3)) / 256)
    return config


class LanguagePass(nn.Module):
    """The language model's layers over some tokens, after others whose keys and values are known.

    Args:
        model: the layers and what belongs to them.
        recompute: keep the layers' inputs alone for the backward pass.
    """

    def __init__(self, model: LlamaModel, recompute: bool):
        super().__init__()
        self.model, self.run = model, Recomputed(run_layer) if recompute else run_layer

    def forward(
        self, tokens: Tensor, positions: Tensor, visible: Tensor, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Last states `[B, S, D]`, and keys and values of these tokens alone `[B, layers, 2, heads, S, d]`.

        Args:
            tokens: `[B, S, D]`.
            positions: int64 `[B, S]`.
            visible: bool `[B, S, K]`; K counts the tokens before, first, and these.
            before: keys and values of the tokens before.
        """
        rotation = self.model.rotary_emb(tokens, positions)
        kept = []
        for number, layer in enumerate(self.model.layers):
            past = None if before is None else (before[:, number, 0], before[:, number, 1])
            tokens, key, value = self.run(layer, tokens, rotation, visible, past)
            kept.append(torch.stack([key, value], dim=1))
        return self.model.norm(tokens), torch.stack(kept, dim=1)


class ActionExpert(nn.Module):
    """The velocity of noised actions, from what the language model's layers keep of the observation.

    Args:
        language: the configuration of the language model's layers.
        multiplier: width of the expert over that of the language model.
        self_attention: layer -> whether it also attends to the actions.
        room: D, numbers of an action.
        periods: the shortest and the longest of the waves that tell the time.
        recompute: keep the layers' inputs alone for the backward pass.
    """

    def __init__(
        self,
        language: LlamaConfig,
        multiplier: float,
        self_attention: Callable[[int], bool],
        room: int,
        periods: tuple[float, float],
        recompute: bool,
    ):
        super().__init__()
        config = expert_config(language, multiplier)
        self.periods, self.width = periods, config.hidden_size
        self.run, self.run_cross = (Recomputed(f) if recompute else f for f in (run_layer, run_cross_layer))
        self.transformer = LlamaModel(config)
        self.transformer.embed_tokens = None
        self.alone = [not self_attention(number) for number in range(config.num_hidden_layers)]
        kept = language.num_key_value_heads * language.head_dim
        for layer, alone in zip(self.transformer.layers, self.alone, strict=True):
            if alone:
                layer.self_attn.k_proj = nn.Linear(kept, kept, bias=config.attention_bias)
                layer.self_attn.v_proj = nn.Linear(kept, kept, bias=config.attention_bias)
        self.action_in_proj = nn.Linear(room, self.width)
        self.action_out_proj = nn.Linear(self.width, room)
        self.action_time_mlp_in = nn.Linear(2 * self.width, self.width)
        self.action_time_mlp_out = nn.Linear(self.width, self.width)

    def forward(self, x: Tensor, time: Tensor, kv: Tensor, seen: Tensor) -> Tensor:
        """Velocity `[B, H, D]`.

        Args:
            x: `[B, H, D]` at `time` `[B]`.
            kv: keys and values of the prefix, `[B, layers, 2, heads, S, d]`.
            seen: bool `[B, S]`, which of the prefix's tokens are no padding.
        """
        tokens = self.action_in_proj(x)
        waves = time_waves(time, self.width, *self.periods).to(tokens.dtype)[:, None].expand_as(tokens)
        tokens = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([tokens, waves], dim=2))))
        rows, length = tokens.shape[:2]
        order = torch.arange(length, device=x.device).expand(rows, -1)
        past = seen[:, None].expand(-1, length, -1)
        earlier = torch.ones(length, length, dtype=torch.bool, device=x.device).tril().expand(rows, -1, -1)
        # Alone with the prefix, the actions count from 0; with their own keys, from where the prefix ends.
        alone = self.transformer.rotary_emb(tokens, order), past
        positions = seen.sum(dim=1, keepdim=True) + order
        among = self.transformer.rotary_emb(tokens, positions), torch.cat([past, earlier], dim=2)
        for number, layer in enumerate(self.transformer.layers):
            keys, values = kv[:, number, 0], kv[:, number, 1]
            if self.alone[number]:
                tokens = self.run_cross(layer, tokens, *alone, (keys, values))
            else:
                tokens, _, _ = self.run(layer, tokens, *among, (keys, values))
        return self.action_out_proj(self.transformer.norm(tokens).float()).float()


def run_layer(
    layer: LlamaDecoderLayer, tokens: Tensor, rotation: Rotation, visible: Tensor, past: Kept | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer that attends to its own tokens `[B, S, D]` after what is past; states, and its own keys and values."""
    attention, normal = layer.self_attn, layer.input_layernorm(tokens)
    query, key, value = (
        heads(projection(normal), attention.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotation)
    keys, values = (key, value) if past is None else (torch.cat([past[0], key], 2), torch.cat([past[1], value], 2))
    return finish(layer, tokens, query, keys, values, visible), key, value


def run_cross_layer(
    layer: LlamaDecoderLayer, tokens: Tensor, rotation: Rotation, visible: Tensor, past: Kept
) -> Tensor:
    """A layer that attends to keys and values of another model alone, through its own projections of them."""
    attention = layer.self_attn
    query = heads(attention.q_proj(layer.input_layernorm(tokens)), attention.head_dim)
    query, _ = apply_rotary_pos_emb(query, query, *rotation)
    keys, values = (
        heads(projection(kept.transpose(1, 2).flatten(2)), attention.head_dim)
        for projection, kept in zip((attention.k_proj, attention.v_proj), past, strict=True)
    )
    return finish(layer, tokens, query, keys, values, visible)


def heads(x: Tensor, size: int) -> Tensor:
    """`[B, S, heads * d]` as `[B, heads, S, d]`."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def finish(
    layer: LlamaDecoderLayer, tokens: Tensor, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor
) -> Tensor:
    """A layer's attention, to what bool `[B, S, K]` says is visible, and what follows it; `[B, S, D]`."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    attended = F.scaled_dot_product_attention(
        query, keys.to(query.dtype), values.to(query.dtype), attn_mask=visible[:, None]
    )
    tokens = tokens + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return tokens + layer.mlp(layer.post_attention_layernorm(tokens))


def time_waves(time: Tensor, width: int, shortest: float, longest: float) -> Tensor:
    """Sines and cosines of times `[B]`, `[B, width]`, with periods from the shortest to the longest, in float64."""
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=time.device)
    angles = 2 * math.pi * time[:, None].double() / (shortest * (longest / shortest) ** fraction)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
