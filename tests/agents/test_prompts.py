"""Instructions as token ids: a start, the words, one end of the line; padding told apart, and nothing cut off."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from agents.prompts import prompt_tokens
from research.errors import UserError
from research.schema import encode_text

CPU = torch.device("cpu")
TEXTS = ("go", "go there\n", "")


def language(*texts: str) -> torch.Tensor:
    return torch.stack([encode_text(text, 24) for text in texts]).long()


def rows(ids: torch.Tensor, is_token: torch.Tensor) -> list[list[int]]:
    assert (ids[~is_token] == 0).all()
    return [ids[row, is_token[row]].tolist() for row in range(len(ids))]


@pytest.mark.parametrize(("start", "first"), [(None, []), ("<bos>", [1])])
def test_bytes_stand_for_themselves(start, first):
    found = rows(*prompt_tokens(None, language(*TEXTS), 3, CPU, 4, start))
    assert found == [[*first, *b"go\n"], [*first, *b"go there\n"], [*first, *b"\n"]]
    assert rows(*prompt_tokens(None, None, 2, CPU, 4, start)) == [[*first, 10]] * 2


def test_words_are_the_tokenizers():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "go": 2, "there": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert rows(*prompt_tokens(words, language(*TEXTS), 3, CPU, 4, "<bos>")) == [[1, 2], [1, 2, 3], [1]]
    assert rows(*prompt_tokens(words, language(*TEXTS), 3, CPU, 4, "<s>")) == [[2], [2, 3], []]
    ids, _ = prompt_tokens(words, language(*TEXTS), 3, CPU, 4)
    assert ids.shape == (3, 4)
    with pytest.raises(UserError, match=r"the instruction 'go there.* has 2 tokens, more than 1"):
        prompt_tokens(words, language("go", "go there"), 2, CPU, 1)


def test_a_tokenizer_that_writes_the_start_itself_writes_it_once():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "go": 2, "there": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    assert rows(*prompt_tokens(words, language(*TEXTS), 3, CPU, 4, "<bos>")) == [[1, 2], [1, 2, 3], [1]]
