"""research/config_file.py: JSON and YAML say the same, and a file changes what it names of its base."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from worlds import ROOT

from research.config import ExperimentConfig, GRPOConfig
from research.config_file import merge, read_chain
from research.errors import UserError
from research.options import parse_config, to_dict

BASE = {
    "trainer": {
        "env": "tabletop", "env_config": {"task": "push", "modalities": ["rgb", "proprio"]}, "seed": 5,
        "wandb_tags": ["a", "b"],
    },
    "policy": {
        "learning_rates": {"value_head": 1e-3},
        "vla_config": {"model_class": "a.B", "model_path": "b.pt", "model_config": {"trunk": {"width": 3, "depth": 2}}},
    },
    "algorithm": {"name": "ppo", "cfg": {"gamma": 0.5, "batch_size": 64}},
}  # fmt: skip


@pytest.fixture
def child(tmp_path):
    """The configuration of a file of these contents, which starts from BASE."""
    (tmp_path / "base.json").write_text(json.dumps(BASE))

    def parse(*flags: str, **content: object) -> ExperimentConfig:
        path = tmp_path / "child.json"
        path.write_text(json.dumps({"base": "base.json", **content}))
        return parse_config(ExperimentConfig, [f"--config={path}", *flags])

    return parse


def refusal(path: object) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(ExperimentConfig, [f"--config={path}"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- YAML


@pytest.mark.parametrize("name", ["pick_place.json", "openvla_oft.json", "metaworld.json"])
def test_a_configuration_is_the_same_in_yaml(tmp_path, name):
    """As PyYAML writes it, and as PyYAML has read JSON as it stands."""
    path = ROOT / "experiments" / "configs" / name
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(json.loads(path.read_text())))
    (tmp_path / "json.yml").write_text(path.read_text())
    expected = parse_config(ExperimentConfig, [f"--config={path}"])
    for same in ("same.yaml", "json.yml"):
        assert parse_config(ExperimentConfig, [f"--config={tmp_path / same}"]) == expected


def test_what_stands_in_yaml_is_what_it_looks_like(tmp_path):
    """By the core schema of YAML 1.2, whose table in section 10.3.2 is copied here; YAML 1.1 has off for false."""
    path = tmp_path / "my.yaml"
    path.write_text(
        "trainer: {autocast: off, exp_name: 1:30}\n"
        "algorithm: {cfg: {learning_rate: 1e-5, gamma: 1, target_kl: ~}}\n"
        "policy: {vla_config: {model_config: {no: no, a: 0x3A, b: -.5, c: 2001-01-01, d: .5e+3, e: True, f: null,\n"
        "  g: 017, h: '1', i: 0, j: -1_000, k: , l: 0o17, m: -12}}}\n"
    )
    config = parse_config(ExperimentConfig, [f"--config={path}"])
    assert (config.trainer.autocast, config.trainer.exp_name) == ("off", "1:30")
    assert (config.algorithm.cfg.learning_rate, config.algorithm.cfg.target_kl) == (1e-5, None)
    got = config.policy.vla_config.model_config
    assert got == {
        "no": "no", "a": 58, "b": -0.5, "c": "2001-01-01", "d": 500.0, "e": True, "f": None, "g": 17, "h": "1",
        "i": 0, "j": "-1_000", "k": None, "l": 15, "m": -12,
    }  # fmt: skip
    assert type(got["i"]) is int and got["e"] is True


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("trainer: {seed: 1, seed: 2}", "line 1: 'seed' is given twice"),
        ("trainer: {seed: '1'}", 'trainer.seed: expected int ≥0, got the string "1"'),
        ("trainer: {sed: 1}", "unknown key trainer.sed; did you mean trainer.seed?"),
        ("trainer: {env_config: {a: {1: 2}}}", "the key 1 is no text; in quotes it is"),
        ("trainer: {env_config: {a: .inf}}", "trainer.env_config.a: expected finite numbers"),
        ("trainer: [1", "not YAML: while parsing"),
        ("a: !!python/object:os.system b", "not YAML: could not determine a constructor"),
        ("", "the file: expected object, got null"),
    ],
)
def test_bad_yaml_is_refused_where_it_stands(tmp_path, text, what):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ") and what in message


# --- a base


def test_a_file_changes_what_it_names_of_its_base(child):
    config = child(
        "--trainer.env_config.num_blocks=2",
        trainer={"env_config": {"task": "reach"}, "wandb_tags": ["c"]},
        policy={"vla_config": {"model_config": {"trunk": {"width": 9}}}},
    )
    assert config.trainer.env_config == {"task": "reach", "modalities": ["rgb", "proprio"], "num_blocks": 2}
    assert config.trainer.wandb_tags == ["c"] and config.trainer.seed == 5
    assert config.policy.vla_config.model_config == {"trunk": {"width": 9, "depth": 2}}
    assert config.policy.vla_config.model_path == "b.pt" and config.algorithm.cfg.gamma == 0.5


def test_an_empty_object_empties(child):
    config = child(trainer={"env_config": {}}, policy={"vla_config": {"model_config": {"trunk": {}}}})
    assert config.trainer.env_config == {} and config.policy.vla_config.model_config == {"trunk": {}}


def test_another_kind_takes_over_nothing_of_the_old_ones(child):
    """The same kind, said again, does; beside a file that is named, flags never take anything away."""
    assert child(trainer={"env": "gym:X", "env_config": {"chunk": 2}}).trainer.env_config == {"chunk": 2}
    assert child(trainer={"env": "gym:X"}).trainer.env_config == {}
    assert child(trainer={"env": "tabletop"}).trainer.env_config == BASE["trainer"]["env_config"]
    assert child("--trainer.env=gym:X").trainer.env_config == BASE["trainer"]["env_config"]
    model = child(policy={"vla_config": {"model_class": "c.D"}}).policy
    assert (model.vla_config.model_path, model.vla_config.model_config) == (None, {})
    assert model.learning_rates == {"value_head": 1e-3}  # not of a class: what a model lacks is refused by name
    cfg = child(algorithm={"name": "grpo"}, trainer={"seed": 1}).algorithm.cfg
    assert cfg == GRPOConfig()
    assert child(algorithm={"name": "grpo", "cfg": {"groups": 3}}).algorithm.cfg == GRPOConfig(groups=3)


def test_flags_that_name_another_kind_keep_nothing_of_a_file_that_was_not_named(tmp_path):
    """Whoever says `--trainer.env=gym:X` and no more has not asked for the main job's task; in any order."""
    (tmp_path / "start.json").write_text(json.dumps(BASE))

    def started(*flags: str) -> ExperimentConfig:
        return parse_config(ExperimentConfig, flags, start=tmp_path / "start.json")

    assert started().trainer.env_config == started("--trainer.env=tabletop").trainer.env_config == {
        "task": "push", "modalities": ["rgb", "proprio"],
    }  # fmt: skip
    assert started("--trainer.env_config.chunk=2", "--trainer.env", "gym:X").trainer.env_config == {"chunk": 2}
    assert started("--trainer.env=gym:X", "--trainer.env=tabletop").trainer.env_config["task"] == "push"
    other = started("--policy.vla_config.model_class=c.D")
    assert (other.policy.vla_config.model_path, other.policy.vla_config.model_config) == (None, {})
    assert other.trainer.env_config["task"] == "push" and other.trainer.seed == 5
    assert started("--algorithm.name=grpo").algorithm.cfg == GRPOConfig()
    with pytest.raises(UserError, match='^the command line: algorithm.name: expected "ppo" or "grpo"'):
        started("--algorithm.name=gro")
    (tmp_path / "named.json").write_text('{"algorithm": {"cfg": {"gamma": 0.25}}}')
    named = started(f"--config={tmp_path / 'named.json'}", "--trainer.env=gym:X")
    assert named.algorithm.cfg.gamma == 0.25 and named.trainer.seed != 5


def test_a_base_that_names_no_kind_means_the_default(tmp_path):
    (tmp_path / "base.json").write_text('{"trainer": {"env_config": {"task": "push"}}}')
    for env, expected in (("tabletop", {"task": "push"}), ("metaworld", {})):
        (tmp_path / "a.json").write_text(json.dumps({"base": "base.json", "trainer": {"env": env}}))
        assert parse_config(ExperimentConfig, [f"--config={tmp_path / 'a.json'}"]).trainer.env_config == expected


def test_a_base_has_a_base_and_is_found_beside_its_file_then_among_the_projects(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "middle.yml").write_text("base: pick_place.json\ntrainer: {seed: 7, exp_name: middle}\n")
    (tmp_path / "top.json").write_text('{"base": "deep/middle.yml", "trainer": {"exp_name": "top"}}')
    monkeypatch.chdir(tmp_path / "deep")
    config = parse_config(ExperimentConfig, ["--config=../top.json"])
    assert (config.trainer.exp_name, config.trainer.seed, config.trainer.num_envs) == ("top", 7, 128)
    (tmp_path / "deep" / "pick_place.json").write_text('{"trainer": {"num_envs": 4}}')
    config = parse_config(ExperimentConfig, ["--config=../top.json"])
    assert (config.trainer.num_envs, config.trainer.seed) == (4, 7)
    monkeypatch.chdir(tmp_path)
    assert parse_config(ExperimentConfig, ["--config=pick_place.json"]).trainer.num_envs == 128


def test_what_a_run_keeps_is_the_merged_configuration(child, tmp_path):
    config = child(trainer={"env": "gym:X"})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    (tmp_path / "base.json").unlink()
    assert parse_config(ExperimentConfig, [f"--config={tmp_path / 'config.json'}"]) == config


def test_a_files_rates_per_scope_win_over_its_bases_rate(tmp_path):
    (tmp_path / "base.json").write_text('{"algorithm": {"cfg": {"learning_rate": 1e-5}}}')
    rates = {"freeze": "vision", "learning_rate_by_scope": {"vision": 4e-4}}
    (tmp_path / "a.json").write_text(json.dumps({"base": "base.json", "policy": rates}))
    assert parse_config(ExperimentConfig, [f"--config={tmp_path / 'a.json'}"]).algorithm.cfg.learning_rate == 4e-4
    (tmp_path / "b.json").write_text('{"base": "a.json", "algorithm": {"cfg": {"learning_rate": 1e-5}}}')
    assert "algorithm.cfg.learning_rate: is 1e-05" in refusal(tmp_path / "b.json")


def test_bases_that_cannot_be_are_refused(tmp_path):
    def write(name: str, content: object) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    a = write("a.json", {"base": "b.json"})
    write("b.json", {"base": "../" + tmp_path.name + "/a.json"})
    assert re.search(r"b\.json: base: leads back to .*a\.json, which starts from this file", refusal(a))
    assert "own.json: base: leads back to" in refusal(write("own.json", {"base": "own.json"}))
    missing = refusal(write("c.json", {"base": "nowhere.json"}))
    assert "c.json: base: there is no nowhere.json, neither beside this file nor in experiments/configs" in missing
    assert 'base: expected the name of a configuration file, got ["a"]' in refusal(write("d.json", {"base": ["a"]}))
    write("e.json", {"trainer": {"sed": 1}})
    assert re.match(r".*e\.json: unknown key trainer\.sed", refusal(write("f.json", {"base": "e.json"})))
    write("g.json", {"algorithm": {"cfg": {"gamma": 0.5}}})
    path = write("h.json", {"base": "g.json"})
    with pytest.raises(UserError, match=r"unknown key algorithm\.cfg\.gamma"):
        parse_config(ExperimentConfig, [f"--config={path}", "--algorithm.name=grpo"])


def test_merging_by_hand():
    kinds = {"a.kind": ("a.options", "b")}
    base = {"a.options.x": 1, "a.other": {"l": [1], "d": {"p": 1}}, "b": 2, "bb": 3}
    assert merge(base, {"a.kind": "new", "bb": 4}, kinds, {"a.kind": "old"}) == {
        "a.other": {"l": [1], "d": {"p": 1}}, "bb": 4, "a.kind": "new",
    }  # fmt: skip
    assert merge(base, {"a.kind": "old", "a.other": {"l": [2], "d": {"q": 1}}}, kinds, {"a.kind": "old"}) == {
        "a.options.x": 1, "a.other": {"l": [2], "d": {"p": 1, "q": 1}}, "b": 2, "bb": 3, "a.kind": "old",
    }  # fmt: skip


def test_a_chain_is_read_once_each_base_first(tmp_path):
    for name, content in (("a", {"base": "b.json", "x": 1}), ("b", {"base": "c.json"}), ("c", {"y": 2})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    chain = read_chain(str(tmp_path / "a.json"))
    assert [(os.path.basename(file.path), file.content) for file in chain] == [
        ("c.json", {"y": 2}), ("b.json", {}), ("a.json", {"x": 1}),
    ]  # fmt: skip


# --- two ways to say one thing


@pytest.mark.parametrize(
    ("files", "flags", "expected"),
    [
        ([{"max_env_steps": 5}], [], (250, 5)),
        ([{"iterations": 3}], [], (3, None)),
        ([{"max_env_steps": 5}], ["iterations=3"], (3, None)),
        ([{"iterations": 3}], ["max_env_steps=5"], (250, 5)),
        ([{"max_env_steps": 5}], ["max_env_steps=null"], (250, None)),
        ([{"iterations": 3, "max_env_steps": None}], [], (3, None)),
        ([{"max_env_steps": 5}], ["iterations=3", "max_env_steps=null"], (3, None)),
        ([{"max_env_steps": 5}, {"iterations": 3}], [], (3, None)),
        ([{"iterations": 3}, {"max_env_steps": 5}], [], (250, 5)),
        ([{"iterations": 3}, {"max_env_steps": 5}, {"iterations": 4}], [], (4, None)),
        ([{"iterations": 3}, {"max_env_steps": 5}, {"seed": 4}], [], (250, 5)),
        ([{"max_env_steps": 5}, {"iterations": 3}], ["max_env_steps=6"], (250, 6)),
        ([{"max_env_steps": 5}, {"max_env_steps": None}], [], (250, None)),
        ([{"iterations": 3}, {"seed": 4}], ["seed=5"], (3, None)),
    ],
)
def test_the_stronger_source_says_how_long_a_run_is(tmp_path, files, flags, expected):
    """Files each start from the one before; iterations, max_env_steps."""
    for i, trainer in enumerate(files):
        base = {"base": f"{i - 1}.json"} if i else {}
        (tmp_path / f"{i}.json").write_text(json.dumps({**base, "trainer": trainer}))
    argv = [f"--config={tmp_path / f'{len(files) - 1}.json'}", *(f"--trainer.{flag}" for flag in flags)]
    trainer = parse_config(ExperimentConfig, argv).trainer
    assert (trainer.iterations, trainer.max_env_steps) == expected
    # Of the file from which a script starts where none is named, too.
    trainer = parse_config(ExperimentConfig, argv[1:], start=argv[0].partition("=")[2]).trainer
    assert (trainer.iterations, trainer.max_env_steps) == expected


def test_both_in_one_place_are_refused(tmp_path):
    both = "trainer.iterations and trainer.max_env_steps are two ways to say one thing; give one of them"
    (tmp_path / "both.json").write_text(json.dumps({"trainer": {"iterations": 3, "max_env_steps": 5}}))
    assert refusal(tmp_path / "both.json") == f"{tmp_path / 'both.json'}: {both}"
    (tmp_path / "child.json").write_text(json.dumps({"base": "both.json", "trainer": {"iterations": 4}}))
    assert refusal(tmp_path / "child.json") == f"{tmp_path / 'both.json'}: {both}"
    with pytest.raises(UserError, match=f"^{both}$"):
        parse_config(ExperimentConfig, ["--trainer.max_env_steps=5", "--trainer.iterations", "3"])


@pytest.mark.parametrize("flags", [["--trainer.max_env_steps=5"], ["--trainer.iterations=3"], []])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_what_a_run_wrote_reads_back(tmp_path, flags, algorithm):
    config = parse_config(ExperimentConfig, [*flags, f"--algorithm.name={algorithm}"])
    written = to_dict(config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(written))
    assert parse_config(ExperimentConfig, [f"--config={path}"]) == config
    written["trainer"] |= {"iterations": 2, "max_env_steps": 4096}  # of an earlier version, which ignored the former
    del written["trainer"]["sharding"]
    path.write_text(json.dumps(written))
    trainer = parse_config(ExperimentConfig, [f"--config={path}"]).trainer
    assert (trainer.max_env_steps, trainer.env_steps_planned) == (4096, 4096)
    trainer = parse_config(ExperimentConfig, [f"--config={path}", "--trainer.iterations=7"]).trainer
    assert (trainer.iterations, trainer.max_env_steps) == (7, None)
