"""What a user is told, in one line."""

from __future__ import annotations

from research.errors import describe_error, did_you_mean, one_line


def test_errors_and_words_on_one_line():
    assert one_line(ValueError("a\n  b")) == "a b" and describe_error(KeyError("a\nb")).startswith("KeyError: ")
    assert len(describe_error(ValueError("x" * 500))) == 200
    assert did_you_mean("visoin", ["vision", "language"]) == "; did you mean 'vision'?"
    assert did_you_mean("quux", ["vision", "language"]) == ""
