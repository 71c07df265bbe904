"""The words of a prompt as token ids, and among the tokens of pictures."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

from research.errors import UserError
from research.schema import decode_text


def prompt_tokens(
    words: Tokenizer | None,
    language: Tensor | None,
    rows: int,
    device: torch.device,
    longest: int,
    start: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids int64 `[B, L]` of a start token, the instruction and a line's end, and bool `[B, L]`: no padding.

    Args:
        words: the tokenizer; None: bytes, for fresh weights.
        language: int64 `[B, bytes]`, zero-padded UTF-8; None: no instruction.
        rows, device: B, and where the ids are wanted.
        longest: L of a tokenizer's ids; of bytes it is what the longest instruction has.
        start: the start token as the tokenizer writes it, 1 for bytes; None, or one that it does not know: none.
    Raises:
        UserError: an instruction has more tokens than `longest`; nothing is cut off.
    """
    texts = [""] * rows if language is None else decode_text(language)
    # An instruction that ends its line itself has one end, as LeRobot and transformers write it.
    lines = {text: text if text.endswith("\n") else f"{text}\n" for text in set(texts)}
    if words is None:
        first = [] if start is None else [1]
        longest = len(first) + 1 + (0 if language is None else language.shape[1])
        known = {text: [*first, *line.encode()] for text, line in lines.items()}
    else:
        found = None if start is None else words.token_to_id(start)
        first = [] if found is None else [found]
        known = {text: words.encode(line).ids for text, line in lines.items()}
        # Some tokenizers put the start token there themselves.
        known = {text: ids if ids[:1] == first else [*first, *ids] for text, ids in known.items()}
    ids = torch.zeros(rows, longest, dtype=torch.int64)
    is_token = torch.zeros(rows, longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        found = known[text]
        if len(found) > longest:
            raise UserError(f"the instruction {text[:80]!r}... has {len(found)} tokens, more than {longest}")
        ids[row, : len(found)], is_token[row, : len(found)] = torch.tensor(found), True
    return ids.to(device), is_token.to(device)


def behind_pictures(pictures: Tensor, words: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
    """Words `[B, L, D]` behind the tokens of pictures `[B, N, D]`, and which of all are no padding, bool `[B, N + L]`.

    Args:
        pictures, words: taken to the words' dtype.
        is_token: of `prompt_tokens`.
    """
    tokens = torch.cat([pictures.to(words.dtype), words], dim=1)
    return tokens, torch.cat([is_token.new_ones(pictures.shape[:2]), is_token], dim=1)


def mean_of_seen(states: Tensor, seen: Tensor) -> Tensor:
    """The mean of the states `[B, S, D]` that are no padding, by bool `[B, S]`: `[B, D]`."""
    weight = seen[..., None].to(states.dtype)
    return (states * weight).sum(dim=1) / weight.sum(dim=1)
