"""Text as tensors, boundary checks, and the direction of imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from worlds import ROOT

from research.schema import NonFiniteError, UserError, check_finite, check_observation, decode_text, encode_text


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


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("research", ("agents", "envs", "ppo_vla")),
        ("agents", ("envs", "research", "ppo_vla")),
        ("envs", ("agents", "research", "ppo_vla")),
    ],
)
def test_imports_point_one_way(package, forbidden):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imports_of(path):
            allowed = package != "research" and (name == "research.schema" or name.startswith("research.schema."))
            if not allowed:
                assert name.split(".")[0] not in forbidden, f"{path.name} imports {name}"


def test_no_grab_bag_files():
    names = {p.stem for p in ROOT.rglob("*.py") if ".venv" not in p.parts} | {p.name for p in ROOT.iterdir()}
    assert not names & {"utils", "helpers", "common", "misc", "core"}
