"""GPTVLAModel: a ResNet (or any timm model) in front of a causal language model, GPT-style.

    rgb ── vision_encoder ─ [B, T, C] ── projector ─ [B, T, D] ──┐
    proprio ── proprio_projector ─ [B, 1, D] ────────────────────┼─ language_model ─ hidden [B, D] ─┬─ action_head
    language ── its embeddings, and `readout` ─ [B, L + 1, D] ───┘                                  └─ value_head

One sequence per observation: vision tokens, a proprioception token, the instruction, and a learned readout token whose
last state is `hidden`. The readout stands right behind the last word and the padding behind the readout, so that causal
attention alone keeps padding out of `hidden`, and positions count real tokens only.

Weights come from local files; no hub is asked for anything.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Distribution
from transformers.modeling_layers import GradientCheckpointingLayer

from agents.action_heads import make_action_head
from agents.gpt_trunks import (
    NO_TOKEN,
    InstructionTokenizer,
    VisionEncoder,
    build_language_model,
    weights_beside,
)
from agents.gradient_checkpointing import checkpoint_layers
from agents.vla import StagedVLA, check_modalities
from research.errors import UserError
from research.schema import HIDDEN, LANGUAGE, OBSERVATION, PROPRIO, RGB, base_modality

log = logging.getLogger(__name__)

READS = (RGB, PROPRIO, LANGUAGE)


class GPTVLAModel(StagedVLA):
    """See the module's docstring.

    Batch-norm and dropout are the caller's: `.eval()` the model, as the experiments do. Dropout is 0 in any case.

    Args:
        action_dim: A.
        modalities: which of rgb, proprio and language to read; leave out what the environment does not have.
        proprio_dim: P of `proprio` `[B, P]`.
        vision_encoder: "resnet18", "resnet34", "resnet50", "resnet101", "timm:<name>" (needs the extra `timm`), or the
            arguments of a `transformers.ResNetConfig`.
        vision_weights: a local file or directory; without it the encoder starts from fresh weights.
        vision_tokens: pool the feature map to this many tokens, a square number; None keeps its T = h * w cells.
        language_model: "distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", the arguments of a `transformers.GPT2Config`,
            or a local directory with the `config.json` of any causal language model, and with its weights if there are.
        language_weights: a local file or directory; without it, and without weights in the `language_model` directory,
            the language model starts from fresh weights.
        tokenizer: a local directory with a `tokenizer.json`; without it, the instruction's bytes are the token ids.
        language_tokens: with a tokenizer, the most tokens an instruction may have; shorter ones are padded to it.
        action_head: "gaussian", "tokens" or, for discrete actions, "categorical"; None takes what fits the environment.
        action_head_hidden_size: units of the hidden layer of the action head and of the value head.
        head: further arguments of the action head, see `agents/action_heads.py`.
        gradient_checkpointing: keep the inputs of the encoder's and the language model's blocks only, and compute the
            rest again in the backward pass: less memory, about a third more time.
        action_choices: how many choices each component of a discrete action has.
        horizon, executed: control steps that are planned, and those of them that are executed before the next look.
    Raises:
        UserError: an unknown name or argument, or weights or a tokenizer that are absent, damaged or do not fit.
    """

    def __init__(
        self,
        action_dim: int,
        modalities: Sequence[str] = READS,
        proprio_dim: int = 3,
        vision_encoder: str | dict = "resnet50",
        vision_weights: str | None = None,
        vision_tokens: int | None = None,
        language_model: str | dict = "gpt2",
        language_weights: str | None = None,
        tokenizer: str | None = None,
        language_tokens: int = 32,
        action_head: str | None = None,
        action_head_hidden_size: int = 512,
        head: dict | None = None,
        gradient_checkpointing: bool = False,
        action_choices: Sequence[int] | None = None,
        horizon: int = 1,
        executed: int | None = None,
    ):
        super().__init__()
        check_modalities(self, modalities, READS)
        self.images = [m for m in modalities if base_modality(m) == RGB]
        self.reads_rgb = bool(self.images)
        self.reads_proprio, self.reads_language = PROPRIO in modalities, LANGUAGE in modalities
        self.observation_keys = tuple(modalities)
        self.proprio_dim = proprio_dim

        language_weights = language_weights or weights_beside(language_model)
        self.language_model = build_language_model(language_model, language_weights)
        size, vocabulary = self.language_model.config.hidden_size, self.language_model.config.vocab_size
        if self.reads_rgb:
            self.vision_encoder = VisionEncoder(vision_encoder, vision_weights, vision_tokens)
            self.projector = nn.Linear(self.vision_encoder.channels, size)
        if self.reads_proprio:
            self.proprio_projector = nn.Linear(proprio_dim, size)
        if tokenizer is not None:
            self.tokenizer = InstructionTokenizer(tokenizer, language_tokens, vocabulary)
        elif self.reads_language and vocabulary < 256:
            raise UserError(f"GPTVLAModel: bytes need a vocab_size of 256 or more, language_model has {vocabulary}")
        self.readout = nn.Parameter(0.02 * torch.randn(size))  # as GPT-2's own embeddings start
        options = {"width": action_head_hidden_size, "horizon": horizon, "executed": executed, **(head or {})}
        self.action_head = make_action_head(action_head, size, action_dim, action_choices, **options)
        self.value_head = nn.Sequential(
            nn.Linear(size, action_head_hidden_size), nn.ReLU(), nn.Linear(action_head_hidden_size, 1)
        )

        if gradient_checkpointing:
            checkpoint_layers(m for m in self.language_model.modules() if isinstance(m, GradientCheckpointingLayer))
            if self.reads_rgb:
                self.vision_encoder.checkpoint_gradients()
        self._report_weights(vision_weights, language_weights, tokenizer)

    def _report_weights(self, vision_weights: str | None, language_weights: str | None, tokenizer: str | None) -> None:
        notes = []
        if self.reads_rgb and vision_weights is None:
            notes.append("vision_encoder starts from fresh weights (vision_weights takes local ones)")
        if language_weights is None:
            notes.append("language_model starts from fresh weights (language_weights takes local ones)")
        elif self.reads_language and tokenizer is None:
            notes.append("language_model has weights of its own but reads bytes (tokenizer takes a local one)")
        if notes:
            log.warning("GPTVLAModel: %s; a checkpoint at policy.vla_config.model_path replaces all", "; ".join(notes))

    def stages(self) -> list[TensorDictModule]:
        """`vision_encoder`, `projector`, the tokenizer if there is one, and everything behind them as one stage.

        The embeddings are no stage of their own: frozen, their output would be kept in the rollout, `[L, D]` floats in
        the place of `[L]` bytes. The tokenizer is one: it has nothing to train, so it runs at collection only.
        """
        stages, sequence = [], []
        if self.reads_rgb:
            pixels = [(OBSERVATION, image) for image in self.images]
            stages.append(TensorDictModule(self.vision_encoder, in_keys=pixels, out_keys=["vision_features"]))
            stages.append(TensorDictModule(self.projector, in_keys=["vision_features"], out_keys=["vision_tokens"]))
            sequence.append("vision_tokens")
        if self.reads_proprio:
            sequence.append((OBSERVATION, PROPRIO))
        if self.reads_language:
            text = (OBSERVATION, LANGUAGE)
            if hasattr(self, "tokenizer"):
                stages.append(TensorDictModule(self.tokenizer, in_keys=[text], out_keys=["language_ids"]))
                text = "language_ids"
            sequence.append(text)
        return [*stages, TensorDictModule(TokenSequence(self), in_keys=sequence, out_keys=[HIDDEN])]

    def action_distribution(self, hidden: Tensor) -> Distribution:
        return self.action_head(hidden)

    def value(self, hidden: Tensor) -> Tensor:
        return self.value_head(hidden).float()


class TokenSequence(nn.Module):
    """Vision tokens `[B, T, D]`, proprio `[B, P]`, token ids or bytes `[B, L]`, those that there are -> `[B, D]`.

    Shares the parts of `model`, and holds all whose training changes `hidden` from here on: the language model, the
    readout token and the projector of proprioception.
    """

    def __init__(self, model: GPTVLAModel):
        super().__init__()
        self.language_model, self.readout = model.language_model, model.readout
        self.proprio_projector = model.proprio_projector if model.reads_proprio else None
        self.reads_rgb, self.reads_language, self.proprio_dim = (
            model.reads_rgb,
            model.reads_language,
            model.proprio_dim,
        )
        self.padding = NO_TOKEN if hasattr(model, "tokenizer") else 0

    def forward(self, *inputs: Tensor) -> Tensor:
        remaining, tokens = list(inputs), []
        if self.reads_rgb:
            tokens.append(remaining.pop(0))  # [B, T, D]
        if self.proprio_projector is not None:
            tokens.append(self._proprio_token(remaining.pop(0)))  # [B, 1, D]
        before = sum(t.shape[1] for t in tokens)
        if self.reads_language:
            words, length = self._words_and_readout(remaining.pop(0))  # [B, L + 1, D], [B]
            place = before + length
        else:
            words = self.readout.expand(inputs[0].shape[0], 1, -1)
            place = torch.full((len(words),), before, device=words.device)
        sequence = torch.cat([*tokens, words], dim=1)  # [B, S, D]
        self._check_length(sequence.shape[1])
        states = self.language_model(inputs_embeds=sequence, use_cache=False).last_hidden_state
        return states[torch.arange(len(states), device=place.device), place]

    def _proprio_token(self, proprio: Tensor) -> Tensor:
        if proprio.shape[-1] != self.proprio_dim:
            raise UserError(
                f"GPTVLAModel: proprio has {proprio.shape[-1]} numbers, but proprio_dim is {self.proprio_dim}; "
                f"set policy.vla_config.model_config.proprio_dim: {proprio.shape[-1]}"
            )
        return self.proprio_projector(proprio).unsqueeze(1)

    def _words_and_readout(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, L + 1, D]` with the readout token behind the last word, and the number of words `[B]`."""
        length = (ids != self.padding).sum(dim=1)
        words = self.language_model.get_input_embeddings()(F.pad(ids, (0, 1)).clamp(min=0))
        behind = torch.arange(words.shape[1], device=ids.device) == length[:, None]  # [B, L + 1]
        return torch.where(behind[..., None], self.readout, words), length

    def _check_length(self, length: int) -> None:
        limit = getattr(self.language_model.config, "max_position_embeddings", math.inf)
        if length > limit:
            raise UserError(
                f"GPTVLAModel: a sequence of {length} tokens is longer than the {limit} positions of language_model; "
                "shorten it with policy.vla_config.model_config.vision_tokens or a tokenizer"
            )
