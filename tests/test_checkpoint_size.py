"""`research.checkpoint_size`: what would expand without end is refused at once, and weights of any size are not."""

from __future__ import annotations

import io
import pickle
import time
import zipfile
from collections import OrderedDict

import pytest
import torch
from loading_worlds import any_weights, assert_loaded, error, load

from research import checkpoint_size
from research.checkpoint_size import refuse_unbounded
from research.errors import UserError

SECONDS = 1.0  # of computing until a refusal, and for the checks of a checkpoint of 10,000 tensors


def doubled(depth: int) -> tuple:
    """A tuple that holds the one before twice: `depth` objects, whose hash takes 2^depth steps."""
    nested: tuple = (1,)
    for _ in range(depth):
        nested = (nested, nested)
    return nested


def pickled(path, content: bytes, kind: str) -> None:
    """A file of torch's formats whose structure is the given pickle."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("w/data.pkl", content)
            archive.writestr("w/byteorder", b"little")
            archive.writestr("w/version", b"3\n")
    else:  # the older one begins with three pickles of its own
        torch.save({}, path, _use_new_zipfile_serialization=False)
        whole = io.BytesIO(path.read_bytes())
        for _ in range(3):
            pickle.load(whole)
        path.write_bytes(whole.getvalue()[: whole.tell()] + content)


GLOBAL_SET, GLOBAL_BYTES = b"cbuiltins\nset\n", b"cbuiltins\nbytearray\n"
UNBOUNDED = {
    # keys that share themselves: written by hand, as no dict can be made of them
    "a key": b"\x80\x02}" + pickle.dumps(doubled(60), 2)[2:-1] + b"K\x01s.",
    "keys": b"\x80\x02}(" + pickle.dumps(doubled(60), 2)[2:-1] + b"K\x01u.",
    "a small key very often": b"\x80\x02}" + pickle.dumps(doubled(14), 2)[2:-1] + b"r\xff\xff\0\0K\x01s"
    + b"j\xff\xff\0\0K\x02s" * 3000 + b".",
    "an item of a set": b"\x80\x02" + GLOBAL_SET + b"]" + pickle.dumps(doubled(60), 2)[2:-1] + b"a\x85R.",
    "a list made a set again and again": b"\x80\x02](" + b"K\x01" * 30_000 + b"eq\x01"
    + (GLOBAL_SET + b"h\x01\x85R") * 3000 + b".",
    "a set made a set again and again": b"\x80\x02" + GLOBAL_SET + b"](" + b"K\x01" * 30_000 + b"e\x85Rq\x01"
    + (GLOBAL_SET + b"h\x01\x85R") * 3000 + b".",
    "a tuple that is built without being a key": pickle.dumps([doubled(60)], 2),
    "so many bytes": b"\x80\x02" + GLOBAL_BYTES + b"\x8a\x05\0\0\0\0\x10\x85R.",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["zip", "older"])
@pytest.mark.parametrize("name", UNBOUNDED)
def test_a_structure_that_expands_without_end_is_refused_at_once(tmp_path, name, kind):
    path = tmp_path / "w.pt"
    pickled(path, UNBOUNDED[name], kind)
    begin = time.process_time()
    message = error(path)
    assert time.process_time() - begin < SECONDS
    assert "expands without end; save the state dict alone" in message or "holds a bytearray" in message


def test_the_structure_is_found_in_any_case_of_letters(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/DATA.pkl", UNBOUNDED["a key"])
    assert "expands without end" in error(tmp_path / "w.pt")


def test_a_zip_behind_a_pickle_hides_nothing(tmp_path):
    """Torch looks at the first bytes, other readers of zip files at the last."""
    path = tmp_path / "w.pt"
    pickled(path, UNBOUNDED["a key"], "older")
    behind = io.BytesIO()
    with zipfile.ZipFile(behind, "w") as archive:
        archive.writestr("harmless", b"")
    path.write_bytes(path.read_bytes() + behind.getvalue())
    assert "expands without end" in error(path)


def test_a_zip_bomb_is_refused_at_once(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(2):
            archive.writestr(f"w/data/{i}", bytes(64 * 2**20))
    assert path.stat().st_size < 3e5
    begin = time.process_time()
    assert "expand to 134,217,728: no weights compress so well" in error(path)
    assert time.process_time() - begin < SECONDS


def test_a_structure_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_size, "MAX_PICKLE_BYTES", 2000)
    for new in (True, False):
        torch.save(
            {"w": torch.ones(2), "log": list(range(10_000))}, tmp_path / "w.pt", _use_new_zipfile_serialization=new
        )
        with pytest.raises(UserError, match="more than 2,000 bytes besides its tensors"):
            refuse_unbounded(tmp_path / "w.pt")


def test_trusted_files_are_not_measured(tmp_path):
    torch.save({"state_dict": any_weights(), "x": doubled(60)}, tmp_path / "w.pt")
    assert "expands without end" in error(tmp_path / "w.pt")
    load(tmp_path / "w.pt", trust_checkpoint=True)


@pytest.mark.parametrize("new", [True, False])
def test_ten_thousand_tensors_with_an_optimizer_are_measured_in_a_second(tmp_path, new):
    tensor = torch.zeros(2)
    weights = OrderedDict((f"layers.{i // 10}.block.{i % 10}.weight", tensor.clone()) for i in range(10_000))
    optimizer = {"state": {i: {"step": i, "exp_avg": tensor} for i in range(10_000)}, "betas": (0.9, 0.999)}
    torch.save({"state_dict": weights, "optimizer": optimizer}, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
    begin = time.process_time()
    refuse_unbounded(tmp_path / "w.pt")
    assert time.process_time() - begin < 2 * SECONDS  # twice the structure of the weights alone


def test_zeros_that_compress_well_are_weights(tmp_path):
    """60 MB that deflate a thousandfold."""
    weights = any_weights()
    content = {**weights, "unused": torch.zeros(15_000_000)}
    torch.save(content, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as source, zipfile.ZipFile(tmp_path / "w.pt", "w", 8) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry.filename))
    assert (tmp_path / "w.pt").stat().st_size < 100_000
    assert_loaded(load(tmp_path / "w.pt", strict=False), weights)
