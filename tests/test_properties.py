"""Whatever is given as a flag, a configuration or a weights file: it is taken, or refused in one line, in seconds."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from loading_worlds import any_weights, load
from safetensors.torch import save

from research.config import ExperimentConfig
from research.errors import UserError
from research.options import flatten, parse_config, to_dict

SECONDS = 5.0  # of computing: what else runs on the machine does not count


def taken_or_refused(call: Callable[[], object]) -> object:
    """What a call returns, or the `UserError` that it ends in, which is one line; nothing else, and in time."""
    begin = time.process_time()
    try:
        result: object = call()
    except UserError as error:
        assert str(error) and len(str(error).splitlines()) == 1
        result = error
    assert time.process_time() - begin < SECONDS
    return result


# ---- configurations

KEYS = sorted(flatten(ExperimentConfig()))
# Any character, lone surrogates and controls among them, and what parsers take for something.
TEXT = st.text(st.characters(codec=None, categories=None), max_size=40)
PIECES = [*"[]{}\"':,-+~()=.1a#_ \\\0\n\ud800é", "0x", "1e", "9" * 30, "None", "true", "nan", "inf", "!!", "&a", "*a"]
PIECES += ["b''", "1j", "...", "lambda:0"]
SOUP = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
REPEATED = st.builds(lambda piece, times: piece * times, st.sampled_from(PIECES), st.integers(1, 9900))
NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(0, 2**300)).map(str)
VALUES = st.one_of(TEXT, SOUP, REPEATED, NUMBERS, NUMBERS.map(lambda n: f"[{n}]"))
NAMES = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(KEYS).map(lambda key: f"{key}+"),
    st.builds(lambda key, rest: f"{key}.{rest}", st.sampled_from(KEYS), SOUP),
    TEXT,
    st.just("config"),
)
FLAGS = st.one_of(st.builds(lambda name, value: [f"--{name}={value}"], NAMES, VALUES), st.lists(VALUES, max_size=3))


@example(["--trainer.env_config.x=" + "-" * 9000 + "1"])
@example(["--trainer.seed=" + "9" * 4301])
@example(["--trainer.env_config=" + '{"a":' * 600 + "1" + "}" * 600])
@given(st.lists(FLAGS, max_size=4).map(lambda flags: [word for flag in flags for word in flag]))
def test_flags(argv):
    argv = [word for word in argv if word not in ("-h", "--help")]
    config = taken_or_refused(lambda: parse_config(ExperimentConfig, argv, "test"))
    if not isinstance(config, UserError):
        text = json.dumps(to_dict(config), allow_nan=False)
        text.encode()  # the configuration that a run writes
        assert json.loads(text) == to_dict(config)


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-(2**300), 2**300), st.floats(), TEXT, SOUP)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | SOUP, inner, max_size=4)
)
DEEP = st.builds(lambda opening, times: opening * times, st.sampled_from(["[", '{"a":', "[[1],"]), st.integers(1, 3000))


@cache
def nodes() -> list[list[str]]:
    """The path to every option and group of a configuration."""

    def walk(node: object, path: list[str]) -> list[list[str]]:
        inner = [p for key, value in node.items() for p in walk(value, [*path, key])] if isinstance(node, dict) else []
        return [path, *inner]

    return walk(to_dict(ExperimentConfig()), [])


@given(st.data())
def test_json_configurations(tmp_path, data):
    content = to_dict(ExperimentConfig())
    for _ in range(data.draw(st.integers(1, 3))):
        tree, path, node = data.draw(TREES), data.draw(st.sampled_from(nodes())), content
        if not path:
            content = tree
            break
        for key in path[:-1]:
            node = node[key] if isinstance(node, dict) and isinstance(node.get(key), dict) else {}
        node[data.draw(st.sampled_from([path[-1], path[-1] + "x"]))] = tree
    text = json.dumps(content)
    if data.draw(st.booleans()):  # and a piece of text at any place
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(SOUP | DEEP) + text[at:]
    path = tmp_path / "my.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    taken_or_refused(lambda: parse_config(ExperimentConfig, [f"--config={path}"], "test"))


# ---- weights


@cache
def originals() -> dict[str, bytes]:
    """One state dict in every format, by the suffix of its file."""
    torch.manual_seed(0)
    weights, files = any_weights(), {}
    for name, new in (("w.pt", True), ("older.pt", False)):
        buffer = io.BytesIO()
        torch.save({"model_state_dict": weights, "step": 3}, buffer, _use_new_zipfile_serialization=new)
        files[name] = buffer.getvalue()
    with zipfile.ZipFile(io.BytesIO(files["w.pt"])) as source:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
            for entry in source.infolist():
                target.writestr(entry.filename, source.read(entry.filename))
        files["deflated.pt"] = buffer.getvalue()
    files["w.safetensors"] = save(weights)
    files["w.index.json"] = json.dumps({"weight_map": dict.fromkeys(weights, "w.safetensors")}).encode()
    return files


@cache
def structures() -> dict[str, tuple[int, int]]:
    """Where in each file the bytes are that say what the numbers mean: there most mutations go."""
    files = originals()
    start = files["w.pt"].index(b"\x80\x02")
    return {
        name: (start, start + 1500) if name == "w.pt" else (0, min(len(file), 1500)) for name, file in files.items()
    }


@st.composite
def mutated(draw) -> tuple[str, bytes]:
    """A weights file with bytes changed, taken out, put in, or cut off."""
    name = draw(st.sampled_from(sorted(originals())))
    content = bytearray(originals()[name])
    low, high = draw(st.sampled_from([(0, len(content)), structures()[name]]))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(low, max(low, min(high, len(content)) - 1)))
        kind = draw(st.sampled_from(["flip", "set", "insert", "delete", "copy", "cut"]))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            content[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "delete":
            del content[at : at + draw(st.integers(1, 50))]
        elif kind == "copy":
            content[at:at] = content[low : low + draw(st.integers(1, 200))]
        elif kind == "cut" and draw(st.integers(0, 9)) == 0:
            del content[at:]
    return name, bytes(content)


def check_file(folder: Path, name: str, content: bytes, strict: bool) -> None:
    (folder / "w.safetensors").write_bytes(originals()["w.safetensors"])
    (folder / name).write_bytes(content)
    model = taken_or_refused(lambda: load(folder / name, strict=strict))
    if not isinstance(model, UserError):
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@given(mutated(), st.booleans())
def test_damaged_weights(tmp_path, file, strict):
    check_file(tmp_path, *file, strict)


OPCODES = [bytes([code]) for code in b"\x80(.0cRb\x81})]elut\x85\x86\x87NKMJUXqrhjQas\x88\x89G\x8a"]
NAMES_OF_CODE = [
    "torch\nFloatStorage",
    "torch\nSize",
    "torch\nTensor",
    "torch\nFloatTensor",
    "builtins\nset",
    "os\nsystem",
]
NAMES_OF_CODE += ["collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_parameter"]
NAMES_OF_CODE += ["builtins\nbytearray", "os\nsystem"]
WORDS = [b"h\x01", b"q\x01", b"K\x05", b"X\x07\0\0\0storage", b"X\x01\0\0\x000", b"\x85R", b"\x86", b"(", b"t"]
PROGRAMS = st.lists(
    st.one_of(
        st.sampled_from(OPCODES),
        st.sampled_from(NAMES_OF_CODE).map(lambda name: f"c{name}\n".encode()),
        st.sampled_from(
            [b"h\x01", b"q\x01", b"K\x05", b"X\x07\0\0\0storage", b"X\x01\0\0\x000", b"\x85R", b"\x86", b"(", b"t"]
        ),
        st.binary(max_size=3),
    ),
    max_size=60,
).map(lambda parts: b"\x80\x02" + b"".join(parts) + b".")


@given(PROGRAMS, st.sampled_from(["zip", "older", "plain"]))
def test_any_pickle(tmp_path, program, kind):
    whole = originals()["older.pt"]
    content = program if kind == "plain" else whole[: whole.index(b"}q\x00(X\x10\0\0\0model_state_dict") - 2] + program
    if kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(originals()["w.pt"])) as source, zipfile.ZipFile(buffer, "w") as target:
            for entry in source.infolist():
                structure = entry.filename.endswith("data.pkl")
                target.writestr(entry.filename, program if structure else source.read(entry.filename))
        content = buffer.getvalue()
    check_file(tmp_path, "w.pt", content, strict=False)


@given(st.sampled_from(["w.pt", "w.safetensors", "w.index.json", "w.bin"]), st.binary(max_size=2000))
def test_any_bytes(tmp_path, name, content):
    check_file(tmp_path, name, content, strict=False)


@pytest.mark.parametrize("name", sorted(originals()))
def test_what_is_mutated_loads_as_it_is(tmp_path, name):
    """Or the tests above would see refusals only."""
    (tmp_path / "w.safetensors").write_bytes(originals()["w.safetensors"])
    (tmp_path / name).write_bytes(originals()[name])
    load(tmp_path / name)
