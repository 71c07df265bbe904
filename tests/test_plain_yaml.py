"""YAML of plain values: what PyYAML reads and nobody can use is refused in one line, where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from research.errors import UserError
from research.plain_yaml import read_yaml

BAD = [
    ("a: {b: 2001-99-99}", "month must be in 1..12"),
    ("a: {b: 2001-09-09}", "a.b: datetime.date(2001, 9, 9) is a date, not text or a number; in quotes it is text"),
    ("a: !!int x", "does not parse: invalid literal"),
    ("a: !!bool x", "does not parse: 'x'"),
    ("a: !!timestamp x", "does not parse"),
    ("a: !!set {x}", "is a set"),
    ("a: !!binary aaaa", "is a bytes"),
    ("a: !!omap [b: 1]", "is a tuple"),
    ("a: !!python/object:os.system b", "could not determine a constructor"),
    ("[" * 500, "nested too deeply"),
    ("[" * 30 + "]" * 30, "more than 20 levels"),
    ("&a [*a]", "more than 20 levels"),
    ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
     "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
     "e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e, *e, *e, *e, *e]", "100,000 values"),
    ("a: {b: [0x" + "f" * 9000 + "]}", "a.b.0: a whole number of more than 64 bits"),
    ("a: " + "9" * 400, "a: a whole number of more than 64 bits"),
    ("a: " + "9" * 5000, "does not parse: Exceeds the limit"),
    ("a: .nan", "a: .nan is no number"),
    ('a: "\\ud800"', "holds a character that no command line can"),
    ('a: "\\0"', "holds a character that no command line can"),
    ("a: {b: 1,\n  b: 2}", "line 2: 'b' is given twice"),
    ("{[a]: b}", "unhashable key"),
    ("a: \x07", "not YAML"),
    ("a: [", "not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD, ids=range(len(BAD)))
def test_what_is_not_plain_is_one_line(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("content", "message"), [(b"a: \xff", "cannot be read: 'utf-8'"), (None, "cannot be read: No such file")]
)
def test_what_is_no_text_is_one_line(tmp_path, content, message):
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_yaml(path)


def test_plain_values_are_read_and_a_merged_key_may_be_given_again(tmp_path):
    path = Path(tmp_path / "a.yaml")
    path.write_text("a: &a {b: 1, c: [x, 1.5, true, null]}\nd: {<<: *a, b: 2}\ne: '2001-09-09'\n")
    fields = {"b": 1, "c": ["x", 1.5, True, None]}
    assert read_yaml(path) == {"a": fields, "d": fields | {"b": 2}, "e": "2001-09-09"}
