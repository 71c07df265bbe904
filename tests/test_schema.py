"""Text as tensors, boundary checks, and what messages are made of."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from research.errors import NonFiniteError, UserError
from research.schema import base_modality, check_finite, check_observation, decode_text, encode_text


def test_text_round_trip():
    texts = ["put the red cube on the blue plate", "", "päckchen → 箱"]
    tokens = encode_text(texts, 48)
    assert tokens.shape == (3, 48) and tokens.dtype == torch.int64
    assert decode_text(tokens) == texts
    assert torch.equal(encode_text(texts[0], 48), tokens[0])


@pytest.mark.parametrize(
    ("text", "message"), [("x" * 9, "9 bytes, more than the 8"), ("ä" * 5, "10 bytes"), ("a\0b", "NUL")]
)
def test_text_that_does_not_fit(text, message):
    with pytest.raises(UserError, match=message):
        encode_text(text, 8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rgb", torch.zeros(2, 8, 8, 3)),
        ("rgb", torch.zeros(2, 8, 8, dtype=torch.uint8)),
        ("depth", torch.zeros(2, 8, 8, dtype=torch.float64)),
        ("proprio", torch.zeros(2, 3, dtype=torch.int64)),
        ("language", torch.zeros(2, 16)),
        ("touch", torch.zeros(2, 3)),
    ],
)
def test_observations_off_the_schema_are_refused(key, value):
    with pytest.raises(UserError, match=key):
        check_observation(TensorDict({key: value}, [2]), "env 'x'")


def test_check_finite_names_the_tensor():
    check_finite([("a", torch.ones(2)), ("b", torch.ones(2, dtype=torch.int64))], "now")
    with pytest.raises(NonFiniteError, match=r"b is inf at index \[1\] now"):
        check_finite([("a", torch.ones(2)), ("b", torch.tensor([0.0, float("inf")]))], "now")
    with pytest.raises(NonFiniteError, match=r"a is -inf at index \[\] now"):
        check_finite([("a", torch.tensor(-float("inf"))), ("b", torch.tensor(float("inf")))], "now")


def test_numbers_whose_sum_overflows_are_finite():
    largest = torch.finfo(torch.float32).max
    check_finite([("a", torch.full((4,), largest)), ("b", torch.tensor(largest))], "now")
    check_finite([("a", torch.full((4,), largest)), ("b", torch.full((4,), -largest))], "now")
    with pytest.raises(NonFiniteError, match=r"b is nan at index \[0\] now"):
        check_finite([("a", torch.full((4,), largest)), ("b", torch.tensor([float("nan")]))], "now")


def test_every_camera_has_the_layout_of_its_kind():
    names = {"rgb": "rgb", "rgb_wrist": "rgb", "depth_front": "depth", "proprio": "proprio", "language": "language"}
    assert {name: base_modality(name) for name in names} == names
    assert not any(map(base_modality, ("rgb_", "proprio_left", "wrist_rgb", "touch")))
    pixels = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    check_observation(TensorDict({"rgb_wrist": pixels, "depth_front": torch.zeros(2, 8, 8)}, [2]), "env 'x'")
    with pytest.raises(UserError, match="rgb_wrist"):
        check_observation(TensorDict({"rgb_wrist": pixels.float()}, [2]), "env 'x'")
