"""Sentences to vectors, by a transformer encoder and its own tokenizer.

The mean of the last states of a sentence's tokens, scaled to length 1: what such encoders are trained to compare by
their cosine (Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084).
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedConfig, PreTrainedModel

from agents.packaged_weights import fill_part, located, unpacked
from agents.weights import read_weights
from research.errors import UserError, describe_error, did_you_mean
from research.schema import decode_text

OPTION = "policy.vla_config.model_config.language_encoder"
# all-MiniLM-L6 (Wang et al. 2020, https://arxiv.org/abs/2002.10957), reading bytes.
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
BYTES = {"vocab_size": 256, "pad_token_id": 0, "max_position_embeddings": 512}


class SentenceEncoder(nn.Module):
    """Instructions int64 `[B, L]` (zero-padded UTF-8 bytes) -> vectors `[B, size]` of length 1.

    Dropout is 0. The pooling layer that some encoders have on their first token is not used, and left out.

    Args:
        spec: "package:<installed package>" or a local folder with `config.json`, `tokenizer.json` and weights; or the
            arguments of a `transformers.BertConfig`, or None for MiniLM's sizes: fresh weights, whose tokens are bytes.

    Attributes:
        size: numbers per sentence.
    Raises:
        UserError: absent, damaged, or not an encoder of text.
    """

    def __init__(self, spec: str | dict | None):
        super().__init__()
        self.words: Tokenizer | None = None
        if isinstance(spec, str):
            folder = _folder(spec)
            self.network = _pretrained(folder)
            self.words = read_tokenizer(folder, self.network.config.vocab_size, OPTION)
        else:
            config = _bert_config({**MINILM, **BYTES, **(spec or {})})
            self.network = BertModel(_without_dropout(config), add_pooling_layer=False)
        self.size = self.network.config.hidden_size

    def forward(self, language: Tensor) -> Tensor:
        tokens, is_token = self._tokens(language)
        states = self.network(input_ids=tokens, attention_mask=is_token).last_hidden_state  # [B, T, size]
        weight = is_token[..., None].to(states.dtype)
        return F.normalize((states * weight).sum(dim=1) / weight.sum(dim=1), dim=-1)

    @torch.compiler.disable  # text, not tensors
    def _tokens(self, language: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids `[B, T]`, T that of the longest instruction, and where they are no padding."""
        rows = [self._ids(text) for text in decode_text(language)]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        is_token = torch.zeros_like(tokens)
        for i, ids in enumerate(rows):
            tokens[i, : len(ids)], is_token[i, : len(ids)] = torch.tensor(ids), 1
        return tokens.to(language.device), is_token.to(language.device)

    def _ids(self, text: str) -> list[int]:
        """Token ids of one instruction, at least one; without a tokenizer 0, and the text's bytes."""
        ids = [0, *text.encode()] if self.words is None else self.words.encode(text).ids
        limit = self.network.config.max_position_embeddings
        if len(ids) > limit:
            raise UserError(
                f"the instruction {text[:80]!r}... has {len(ids)} tokens, more than the {limit} of {OPTION}"
            )
        return ids or [0]  # of an empty text, some tokenizers make nothing


def _folder(spec: str) -> Path:
    path = located(spec, OPTION)
    folder = unpacked(path) if path.suffix == ".zip" else path
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(f"{OPTION}: {folder} has no {name}; write one with save_pretrained of transformers")
    return folder


def _pretrained(folder: Path) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        network = AutoModel.from_config(_without_dropout(config), dtype=torch.float32)
    except Exception as error:  # whatever the library's own checks raise
        raise UserError(f"{OPTION}: {folder} holds no encoder of text: {describe_error(error)}") from error
    if hasattr(network, "pooler"):
        network.pooler = None
    prefix = f"{network.base_model_prefix}."  # where the encoder was saved inside a model with a head
    state = {n.removeprefix(prefix): v for shard in read_weights(folder) for n, v in shard.items()}
    fill_part(network, state, folder, OPTION)
    return network


def read_tokenizer(folder: Path, vocabulary: int, option: str) -> Tokenizer:
    """The tokenizer of a folder, without padding and truncation.

    Args:
        folder: has `tokenizer.json`.
        vocabulary: how many tokens the model knows.
        option: the setting that names the folder, for messages.
    Raises:
        UserError: the file is absent or damaged, or has tokens that the model does not know.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{option}: there is no {path}; name a folder that has the model's tokenizer.json")
    try:
        words = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{option}: {path} cannot be read: {describe_error(error)}") from error
    largest = max(words.get_vocab().values(), default=0)
    if not 0 < largest < vocabulary:
        raise UserError(f"{option}: {path} has ids up to {largest}, its encoder knows {vocabulary} tokens")
    words.no_padding()
    words.no_truncation()
    return words


def _bert_config(arguments: dict) -> BertConfig:
    known = {field.name for field in fields(BertConfig)}
    for name in arguments:
        if name not in known:
            raise UserError(f"{OPTION}: {name!r} is no argument of BertConfig{did_you_mean(name, known)}")
    try:
        return BertConfig(**arguments)
    except Exception as error:  # whatever the library's own checks raise
        raise UserError(f"{OPTION}: BertConfig refuses {arguments}: {describe_error(error)}") from error


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    for name in list(vars(config)):
        if "dropout" in name:
            setattr(config, name, 0.0)
    return config
