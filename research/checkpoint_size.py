"""Whether a file of `torch.save` stays bounded while it is read: checked on its bytes, before torch sees them.

Reading as weights only runs no code from the file, but it does what the file says: expands zip entries a thousandfold,
or hashes a dictionary's key that is a tuple of a tuple, each holding the other twice (2^n steps for n opcodes).
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import BinaryIO

from research.errors import UserError

ZIP_START = b"PK\3\4"  # by which torch knows its zip format
MAX_EXPANSION = 20  # weights that deflate by more are not weights; DEFLATE's own limit is 1,032
FREE_BYTES = 64 * 2**20  # small files may expand to this in any case
MAX_PICKLE_BYTES = 64 * 2**20  # of a checkpoint's structure, without the numbers; 10,000 tensors take 1.1 MB
MAX_STEPS = 10_000_000  # objects passed on while unpickling, shared ones counted at each use; 10,000 tensors pass 0.2 M
LEGACY_PICKLES = 5  # the format before zip: magic number, version, system, content, storage keys

_ATOMS = {
    *("NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "GLOBAL"),
    *("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"),
}
_GETS, _PUTS = ("BINGET", "LONG_BINGET"), ("BINPUT", "LONG_BINPUT")
# What an opcode takes off the stack: all above a mark, or so many objects. What it makes of them is one object (a
# tuple, a storage), another one in place of the function or class below, or more of the one below.
_OF_MARK = {"TUPLE", "APPENDS", "SETITEMS"}
_TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "BINPERSID": 1, "REDUCE": 1, "NEWOBJ": 1}
_TAKEN |= {"BUILD": 1, "APPEND": 1, "SETITEM": 2}
_MAKES_ONE = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPERSID"}
_MAKES_ANOTHER = {"REDUCE", "NEWOBJ"}


def is_zip(path: Path) -> bool:
    """Whether torch takes a file for its zip format."""
    with path.open("rb") as file:
        return file.read(4) == ZIP_START


def refuse_unbounded(path: Path) -> None:
    """Refuse a file of `torch.save` whose reading would need memory or time out of proportion to its size.

    Raises:
        UserError: entries that expand too far, too large a structure, or one that shares itself too often.
        Exception: nearly any, from a damaged file.
    """
    if not is_zip(path):
        with path.open("rb") as file:
            for _ in range(LEGACY_PICKLES):
                if not file.peek(1):
                    return
                _walk(file, path)
        return
    with zipfile.ZipFile(path) as archive:
        entries, size = archive.infolist(), path.stat().st_size
        expanded = sum(entry.file_size for entry in entries)
        if expanded > max(FREE_BYTES, MAX_EXPANSION * size):
            raise UserError(
                f"{path} has {size:,} bytes that expand to {expanded:,}: no weights compress so well; save it anew"
            )
        for entry in entries:
            # In any case of letters, as torch finds it.
            if entry.filename.lower().rpartition("/")[2] == "data.pkl":
                if entry.file_size > MAX_PICKLE_BYTES:
                    raise _too_large(path)
                _walk(io.BytesIO(archive.read(entry)), path)


def _too_large(path: Path) -> UserError:
    return UserError(
        f"{path} holds more than {MAX_PICKLE_BYTES:,} bytes besides its tensors, or a structure that expands without "
        "end; save the state dict alone"
    )


def _walk(file: BinaryIO, path: Path) -> None:
    """Follow one pickle's opcodes with sizes in place of objects: 1 and all that it holds, shared or not.

    That is what a tuple's hash visits, or a set that is made of a list, each time. Opcodes that torch does not know end
    the walk, as torch stops there too.
    """
    stack: list[list[int]] = []  # of one number each, as a list grows while others hold it
    below: list[list[list[int]]] = []
    memo: dict[int, list[int]] = {}
    start, steps = file.tell(), 0
    for opcode, argument, position in pickletools.genops(file):
        name = opcode.name
        if name in _PUTS:
            memo[argument] = stack[-1]
        elif name in _ATOMS:
            if argument == "builtins bytearray":  # of a number, it takes that many bytes
                raise UserError(f"{path} holds a bytearray, which no state dict does; save the state dict alone")
            stack.append([1])
        elif name in _GETS:
            stack.append(memo[argument])
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name != "PROTO":
            if name in _OF_MARK:
                taken, stack = stack, below.pop()
            elif name in _TAKEN:
                taken = [stack.pop() for _ in range(_TAKEN[name])]
            else:  # STOP, or one that torch does not know
                return
            size = sum(item[0] for item in taken)
            steps += size
            if name in _MAKES_ONE:
                stack.append([1 + size])
            elif name in _MAKES_ANOTHER:
                stack[-1] = [1 + size]
            else:
                stack[-1][0] += size
        if steps > MAX_STEPS or position - start > MAX_PICKLE_BYTES:
            raise _too_large(path)
