"""research/option_parser.py: what is printed instead of a run, and what text on the command line stands for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import ClassVar

import jsonschema
import pytest

from research.config import ExperimentConfig, TrainerConfig
from research.errors import UserError
from research.option_parser import read_literal, split_questions
from research.options import parse_config, to_dict


@dataclass
class Sizes:
    """How much."""

    sections: ClassVar[dict] = {"width": "space", "steps": "time"}

    width: int = 3
    """Metres."""
    depth: int = 4
    """Metres, too."""
    steps: int = 5
    """Seconds."""


@dataclass
class Whole:
    """All there is."""

    name: str
    """Its name."""
    sizes: Sizes = field(default_factory=Sizes)


def printed(capsys: pytest.CaptureFixture[str], config_class: type, *argv: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_config(
            config_class, list(argv), "Trains.\n\n    python a.py            # one\n    python a.py --b=2      # two\n"
        )
    assert caught.value.code == code
    return capsys.readouterr().out


def test_the_help_has_the_defaults_of_its_command_line(capsys, tmp_path):
    (tmp_path / "a.json").write_text('{"sizes": {"width": 33}}')
    text = printed(capsys, Whole, f"--config={tmp_path / 'a.json'}", "--help", "--sizes.steps=55")
    found = [
        line.split("default: ")[1].rstrip(")") for line in text.splitlines() if "default: " in line and "int" in line
    ]
    assert found == ["33", "4", "55"]
    assert "default: 3)" in printed(capsys, Whole, "-h")


def test_the_help_helps_who_made_a_mistake(capsys):
    assert "--sizes.width" in printed(capsys, Whole, "--help", "--sizes.widht=3")


def test_examples_keep_their_lines_and_options_stand_in_their_sections(capsys):
    lines = printed(capsys, Whole, "--help").splitlines()
    assert "    python a.py            # one" in lines and "    python a.py --b=2      # two" in lines
    places = [lines.index(line) for line in ("sizes: space:", "sizes: time:")]
    options = [i for i, line in enumerate(lines) if line.startswith("  --sizes.")]
    assert places[0] < options[0] < options[1] < places[1] < options[2]


def test_every_option_of_a_run_is_in_a_section(capsys):
    titles = list(TrainerConfig.sections.values())
    assert titles == ["run", "environment", "collection", "device", "evaluation", "tracking"]
    text = printed(capsys, ExperimentConfig, "--help")
    assert all(f"\ntrainer: {title}:\n" in text for title in titles) and "\ntrainer:\n" not in text
    tracking = text.split("trainer: tracking:")[1].split("\npolicy:")[0]
    names = re.findall(r"^  --trainer\.(\w+)", tracking, flags=re.MULTILINE)
    assert len(names) > 5 and set(names) - {"use_wandb", "tensorboard"} == {n for n in names if n.startswith("wandb_")}


def test_the_printed_configuration_is_read_as_the_same(capsys, tmp_path):
    flags = ["--trainer.seed=4", "--policy.freeze=vision", "--policy.learning_rate_by_scope.vision=4e-4"]
    flags += ["--trainer.env_config.task=push", "--policy.vla_config.model_config.a.b=[1, x]"]
    text = printed(capsys, ExperimentConfig, *flags, "--print_config")
    (tmp_path / "a.json").write_text(text)
    config = parse_config(ExperimentConfig, flags)
    assert json.loads(text) == to_dict(config)
    assert parse_config(ExperimentConfig, [f"--config={tmp_path / 'a.json'}"]) == config
    with pytest.raises(UserError, match="trainer.seed"):
        parse_config(ExperimentConfig, ["--print_config", "--trainer.seed=x"])


def test_an_editor_can_check_a_configuration(capsys):
    """By the JSON schema that jsonargparse makes, as the library jsonschema reads it."""
    schema = json.loads(printed(capsys, ExperimentConfig, "--print_completion=jsonschema"))
    check = jsonschema.Draft202012Validator(schema).is_valid
    assert check({"trainer": {"seed": 3, "buffer_type": "vla"}})
    assert not check({"trainer": {"seed": -1}}) and not check({"trainer": {"buffer_type": "other"}})
    assert not check({"trainer": {"sed": 1}})


def test_an_editor_accepts_what_a_file_may_hold_besides_options_and_nothing_that_is_a_question(capsys, tmp_path):
    schema = json.loads(printed(capsys, ExperimentConfig, "--print_completion=jsonschema"))
    check = jsonschema.Draft202012Validator(schema).is_valid
    (tmp_path / "base.json").write_text('{"trainer": {"seed": 3}}')
    (tmp_path / "a.json").write_text(text := '{"$schema": "vla.schema.json", "base": "base.json"}')
    assert check(json.loads(text))
    assert parse_config(ExperimentConfig, [f"--config={tmp_path / 'a.json'}"]).trainer.seed == 3
    for name in ("config", "help", "print_config", "print_completion"):
        (tmp_path / "b.json").write_text(text := json.dumps({name: True}))
        assert not check(json.loads(text))
        with pytest.raises(UserError, match=f"unknown key {name}"):
            parse_config(ExperimentConfig, [f"--config={tmp_path / 'b.json'}"])


def test_a_completion_that_there_is_none_of_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="^--print_completion: .*; there are jsonschema and") as caught:
        parse_config(ExperimentConfig, ["--print_completion=fish"])
    assert "\n" not in str(caught.value)


def test_questions_are_told_from_options():
    assert split_questions(["--a=1", "--print_config", "-h"]) == (["--a=1"], "--help")
    assert split_questions(["--print_completion=x", "--b", "2"]) == (["--b", "2"], "--print_completion=x")
    assert split_questions(["--print_config=1", "--helper"]) == (["--print_config=1", "--helper"], None)


def test_text_stands_for_what_it_looks_like():
    assert [read_literal(text) for text in ("1e-3", "None", "[a, 1]", "a=b", "(1, 2)")] == [
        1e-3,
        None,
        ["a", 1],
        "a=b",
        [1, 2],
    ]
