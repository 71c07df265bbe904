"""The prompt of OpenVLA: pictures, and a question that names the instruction."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from research.errors import UserError
from research.schema import decode_text

FRAME = "In: What action should the robot take to {}?\nOut:"
START = 1  # Llama's token before a text
SPACE = "▁"  # Llama's token between "Out:" and the first action, in the data of OpenVLA


class Prompt(nn.Module):
    """Patches `[B, N, D']` and the instruction -> embedded tokens `[B, S, D]`, and which are no padding, bool `[B, S]`.

    The padding lies between the patches and the words, so that every prompt ends at the last position.

    Args:
        projector, embedding: of patches and of ids, to the width of the language model.
        words, most: see `prompt_ids`.
    """

    def __init__(self, projector: nn.Module, embedding: nn.Module, words: Tokenizer | None, most: int):
        super().__init__()
        self.projector, self.embedding, self.words, self.most = projector, embedding, words, most

    def forward(self, patches: Tensor, language: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ids, is_token = prompt_ids(self.words, language, len(patches), self.most)
        ids, is_token = ids.to(patches.device), is_token.to(patches.device)
        words = self.embedding(ids)
        pictures = self.projector(patches).to(words.dtype)
        seen = [is_token[:, :1], is_token.new_ones(pictures.shape[:2]), is_token[:, 1:]]
        return torch.cat([words[:, :1], pictures, words[:, 1:]], dim=1), torch.cat(seen, dim=1)


@torch.compiler.disable  # text, not tensors
def prompt_ids(words: Tokenizer | None, language: Tensor | None, rows: int, most: int) -> tuple[Tensor, Tensor]:
    """Ids int64 `[B, L]`, the start token, padding, the words; and bool `[B, L]`: no padding.

    Args:
        words: the tokenizer; None: a text's ids are its bytes, and there is room for all of them.
        language: int64 `[B, bytes]`, zero-padded UTF-8; None: no instruction.
        rows: B.
        most: L with a tokenizer.
    Raises:
        UserError: a prompt has more than `most` tokens; nothing is cut off.
    """
    texts = [""] * rows if language is None else decode_text(language)
    if words is None:
        known = {text: [*FRAME.format(text.lower()).encode(), ord(" ")] for text in set(texts)}
        most = len(FRAME) + (0 if language is None else language.shape[1])
    else:
        space = words.token_to_id(SPACE)
        known = {text: words.encode(FRAME.format(text.lower()), add_special_tokens=False).ids for text in set(texts)}
        known = {text: ids if space is None or ids[-1:] == [space] else [*ids, space] for text, ids in known.items()}
    ids, is_token = torch.zeros(rows, most, dtype=torch.int64), torch.zeros(rows, most, dtype=torch.bool)
    ids[:, 0], is_token[:, 0] = START, True
    for row, text in enumerate(texts):
        found = known[text]
        if len(found) >= most:
            raise UserError(
                f"OpenVLA: the prompt of {text[:80]!r}... has {len(found) + 1} tokens; prompt_tokens is {most}"
            )
        ids[row, most - len(found) :], is_token[row, most - len(found) :] = torch.tensor(found), True
    return ids, is_token
