"""The prompt of OpenVLA: its words, where its parts lie, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from agents.openvla_prompt import Prompt, prompt_ids
from research.errors import UserError
from research.schema import encode_text


def texts(*some: str) -> torch.Tensor:
    return torch.stack([encode_text(text, 40) for text in some]).long()


def tokenizer(**further: int) -> Tokenizer:
    known = {"<unk>": 0, "<s>": 1, "take": 2, "push": 3, "Out": 4, ":": 5, **further}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def test_the_question_is_openvlas_and_nothing_is_cut_off():
    ids, is_token = prompt_ids(None, texts("Push the red Cube", "x" * 40), 2, 0)
    asked = [bytes(row[kept].tolist()) for row, kept in zip(ids, is_token, strict=True)]
    assert asked[0] == b"\x01In: What action should the robot take to push the red cube?\nOut: "
    assert asked[1] == b"\x01In: What action should the robot take to " + b"x" * 40 + b"?\nOut: "
    assert prompt_ids(None, None, 3, 0)[1].all()


def test_a_tokenizers_words_end_in_the_token_before_the_first_action():
    plain = tokenizer().encode("In: What action should the robot take to push?\nOut:").ids
    for words, end in ((tokenizer(**{"▁": 6}), [6]), (tokenizer(), [])):
        ids, is_token = prompt_ids(words, texts("push"), 1, 24)
        assert ids.shape == (1, 24) and ids[0, is_token[0]].tolist() == [1, *plain, *end]


def test_the_start_token_of_a_tokenizer_is_not_doubled():
    from tokenizers import processors

    words = tokenizer()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ids, is_token = prompt_ids(words, texts("push"), 1, 24)
    assert ids[0, is_token[0]].tolist().count(1) == 1


def test_pictures_lie_behind_the_start_token_and_padding_before_the_words():
    torch.manual_seed(0)
    embedding, projector = nn.Embedding(8, 4), nn.Linear(3, 4)
    words, patches = tokenizer(), torch.randn(2, 5, 3)
    prompt, seen = Prompt(projector, embedding, words, 24)(patches, texts("push", "push push push"))
    ids, is_token = prompt_ids(words, texts("push", "push push push"), 2, 24)
    assert prompt.shape == (2, 29, 4) and seen.sum(dim=1).tolist() == (is_token.sum(dim=1) + 5).tolist()
    assert seen[:, :6].all() and seen[:, -1].all() and not seen[0, 6] and seen.sum(dim=1).diff() == 2
    assert torch.equal(prompt[:, 0], embedding.weight[[1, 1]]) and torch.equal(prompt[:, 1:6], projector(patches))
    assert torch.equal(prompt[:, 6:], embedding(ids[:, 1:]))


def test_a_prompt_without_room_is_refused():
    with pytest.raises(UserError, match=r"the prompt of 'push push push'... has 16 tokens; prompt_tokens is 15"):
        prompt_ids(tokenizer(), texts("push push push"), 1, 15)
    assert prompt_ids(tokenizer(), texts("push push push"), 1, 16)[1].all()
