"""What a user is told, in one line."""

from __future__ import annotations

import json
import runpy

import pytest

from research.errors import describe_error, did_you_mean, one_line, place_of


def test_errors_and_words_on_one_line():
    assert one_line(ValueError("a\n  b")) == "a b" and describe_error(KeyError("a\nb")).startswith("KeyError: ")
    assert len(describe_error(ValueError("x" * 500))) == 200
    assert did_you_mean("visoin", ["vision", "language"]) == "; did you mean 'vision'?"
    assert did_you_mean("quux", ["vision", "language"]) == ""


def test_the_place_of_an_error_is_in_somebodys_own_code_though_it_was_raised_in_a_library(tmp_path):
    (tmp_path / "my_code.py").write_text("import json\ndef read():\n    return json.loads('{')\n")
    with pytest.raises(json.JSONDecodeError) as caught:
        runpy.run_path(str(tmp_path / "my_code.py"))["read"]()
    caught.value.__traceback__ = caught.tb.tb_next  # without this test's own line, which is nobody's library either
    assert place_of(caught.value) == "my_code.py, line 3"
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    caught.value.__traceback__ = caught.tb.tb_next
    assert place_of(caught.value).startswith("decoder.py, line "), "where nobody's code is on the way"
