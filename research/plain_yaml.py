"""YAML files of plain values: text, numbers, switches, null, lists and mappings, and nothing that surprises later.

What PyYAML reads and a command line or a database cannot hold is refused here, with the place where it stands: dates,
bytes, sets, NaN, whole numbers beyond 64 bits, half characters, lists in themselves, and keys that are given twice, of
which PyYAML takes the last without a word.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from research.errors import UserError, one_line

DEEPEST, MOST = 20, 100_000  # levels, values
_DEEPEST_READ = 100  # levels, whatever Python's own limit is in this process: some packages raise it
_LARGEST = 2**63 - 1


def read_yaml(path: Path, core: bool = False) -> Any:
    """Read a file of plain values.

    Args:
        path: of the file.
        core: what stands there is what it looks like, by the core schema of YAML 1.2 (section 10.3): `off` and `no` are
            text, 1e-5 is a number. Otherwise it is read as W&B reads it, by YAML 1.1.
    Raises:
        UserError: it cannot be read, is not YAML, or holds something else; the message does not name the file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        content = yaml.load(text, _CoreLoader if core else _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {one_line(error)[:200]}") from None
    # PyYAML's own: a date or a number that there is none of, a tag such as !!bool on something else.
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"not YAML: a date, number or tag that does not parse: {one_line(error)[:120]}") from None
    _check_plain(content)
    return content


def shown(value: Any) -> str:
    """A value for a message, of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth >= _DEEPEST_READ:
            raise UserError("nested too deeply")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise UserError(f"line {key.start_mark.line + 1}: {shown(key.value)} is given twice")
                seen.add(key.value)
        return node


class _CoreLoader(_Loader):
    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _CoreLoader.construct_yaml_int)
# kind -> (what it looks like, how it may begin)
_CORE = {
    "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", [*"-+0123456789"]),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", [*"-+.0123456789"]),
    "merge": (r"<<", ["<"]),
}
for _kind, (_form, _begins) in _CORE.items():
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_form})$"), _begins)


def _check_plain(content: Any) -> None:
    left, count = [(content, ())], 0
    while left:
        value, path = left.pop()
        where = f"{'.'.join(path)[:80]}: " if path else ""
        count += 1
        if len(path) > DEEPEST or count > MOST:
            raise UserError(f"more than {DEEPEST} levels or {MOST:,} values; perhaps an alias (*) stands in itself")
        if isinstance(value, dict):
            left += [(key, path) for key in value]
            left += [(item, (*path, str(key))) for key, item in value.items()]
        elif isinstance(value, list):
            left += [(item, (*path, str(i))) for i, item in enumerate(value)]
        elif isinstance(value, str):
            if any("\ud800" <= character <= "\udfff" or character == "\0" for character in value):
                raise UserError(f"{where}{shown(value)} holds a character that no command line can")
        elif not isinstance(value, bool | int | float | None):
            kind = type(value).__name__
            raise UserError(f"{where}{shown(value)} is a {kind}, not text or a number; in quotes it is text")
        elif isinstance(value, int) and abs(value) > _LARGEST:
            raise UserError(f"{where}a whole number of more than 64 bits")
        elif isinstance(value, float) and math.isnan(value):
            raise UserError(f"{where}.nan is no number")
