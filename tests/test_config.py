"""research/config.py and options.py: what JSON and the flags of `wandb agent` become, and how bad input is refused."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from jsonargparse.typing import PositiveInt

from research.config import AlgorithmConfig, ExperimentConfig, PolicyConfig, PPOConfig, TrainerConfig, VLAConfig
from research.errors import UserError
from research.imitation.config import BCConfig
from research.options import flatten, parse_config, to_dict

MODEL_CONFIG = "--policy.vla_config.model_config"


def parse(*argv: str) -> ExperimentConfig:
    return parse_config(ExperimentConfig, list(argv), "test")


def write(folder: Path, content: object) -> str:
    path = folder / "my.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def refusal(*argv: str, config_class: type = ExperimentConfig) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(config_class, list(argv), "test")
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# --- what is accepted


def test_no_arguments_give_the_defaults() -> None:
    assert parse() == ExperimentConfig()


def test_layout_of_the_contract(tmp_path: Path) -> None:
    trainer = {"exp_name": "x", "env": "tabletop", "env_config": {"task": "reach"}, "seed": 3, "device": "cpu"}
    trainer |= {"num_envs": 8, "iterations": 5, "buffer_size": 256, "buffer_type": "standard", "enable_eval": False}
    trainer |= {"num_eval_envs": 4, "num_eval_episodes": 12, "eval_freq": 0, "save_freq": 0, "use_wandb": False}
    trainer |= {"wandb_project_name": "p"}
    vla = {"model_path": "a.pt", "model_class": "package.ClassName", "model_config": {"freeze_vision_encoder": True}}
    policy = {"name": "vla", "action_dim": 7, "freeze": "vision", "learning_rates": {"value_head": 1e-3}}
    ppo = {"learning_rate": 3e-5, "n_epochs": 2, "batch_size": 64, "gamma": 1.0, "gae_lambda": 0.9, "clip_coef": 0.1}
    ppo |= {"ent_coef": 0.0, "vf_coef": 1.0, "max_grad_norm": 0.5}
    layout = {
        "trainer": trainer,
        "policy": policy | {"vla_config": vla},
        "algorithm": {"name": "ppo", "cfg": ppo},
    }
    expected = ExperimentConfig(
        TrainerConfig(**trainer),
        PolicyConfig(**policy, vla_config=VLAConfig(**vla)),
        AlgorithmConfig(cfg=PPOConfig(**ppo)),
    )
    assert parse("--config", write(tmp_path, layout)) == expected


def test_flags_of_wandb_agent() -> None:
    config = parse(
        f"{MODEL_CONFIG}.freeze_vision_encoder=True",
        "--algorithm.cfg.learning_rate=1e-05",
        "--algorithm.cfg.normalize_advantage=False",
        "--algorithm.cfg.target_kl=None",
        "--trainer.resume=None",
        "--trainer.num_envs=32",
        "--policy.freeze=['vision_encoder', 'fusion']",
    )
    assert config == ExperimentConfig(
        TrainerConfig(num_envs=32),
        PolicyConfig(
            freeze=["vision_encoder", "fusion"], vla_config=VLAConfig(model_config={"freeze_vision_encoder": True})
        ),
        AlgorithmConfig(cfg=PPOConfig(learning_rate=1e-5, normalize_advantage=False)),
    )
    assert config.policy.freeze == ["vision_encoder", "fusion", "vision"]  # what the switch of the model means
    assert config.policy.vla_config.model_config == {}
    assert config.trainer.resume is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("vision", "vision"),
        ("[vision_encoder, fusion]", ["vision_encoder", "fusion"]),
        ("['vision_encoder', 'fusion']", ["vision_encoder", "fusion"]),
        ('["vision_encoder"]', ["vision_encoder"]),
        ("[*.norm, encoder.layers.1*]", ["*.norm", "encoder.layers.1*"]),
        ("[]", "none"),  # one name for one scope, by which runs are compared
        ("[none]", "none"),
        ("[none, vision, fusion, vision]", ["vision", "fusion"]),
    ],
)
def test_freeze_is_a_preset_or_a_list(text: str, value: object) -> None:
    assert parse(f"--policy.freeze={text}").policy.freeze == value


def test_what_is_appended_to_no_freezing_is_frozen_alone() -> None:
    assert parse("--policy.freeze+=vision", "--policy.freeze+=fusion").policy.scope == "vision+fusion"


def test_value_as_a_word_of_its_own_and_the_last_flag_wins() -> None:
    assert parse("--trainer.seed", "5").trainer.seed == 5
    assert parse("--trainer.seed=5", "--trainer.seed=6").trainer.seed == 6


def test_plus_appends_to_the_list_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"trainer": {"wandb_tags": ["a"]}})
    assert parse("--trainer.wandb_tags+=b", "--config", path).trainer.wandb_tags == ["a", "b"]


def test_text_that_looks_like_something_else_stays_text_where_text_is_wanted() -> None:
    trainer = parse("--trainer.exp_name=1e-3", "--trainer.wandb_group=123", "--trainer.run_dir=[x").trainer
    assert (trainer.exp_name, trainer.wandb_group, trainer.run_dir) == ("1e-3", "123", "[x")
    assert parse("--trainer.wandb_group=null").trainer.wandb_group is None


@pytest.mark.parametrize("flag_first", [True, False])
def test_flags_win_over_the_file(tmp_path: Path, flag_first: bool) -> None:
    path = write(tmp_path, {"trainer": {"seed": 2, "num_envs": 8}, "policy": {"freeze": ["a", "b"]}})
    flags = ["--trainer.seed=3", "--policy.freeze=[c]"]
    config = parse(*flags, "--config", path) if flag_first else parse("--config", path, *flags)
    assert (config.trainer.seed, config.trainer.num_envs, config.policy.freeze) == (3, 8, ["c"])


def test_int_in_the_file_is_a_float_where_one_is_wanted(tmp_path: Path) -> None:
    value = parse("--config", write(tmp_path, {"algorithm": {"cfg": {"gamma": 1}}})).algorithm.cfg.gamma
    assert value == 1.0 and type(value) is float


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("True", True), ("false", False), ("None", None), ("null", None), ("3", 3), ("1e-3", 1e-3), ("-0.5", -0.5)],
        *[("[1, 2]", [1, 2]), ("{'a': 1}", {"a": 1}), ('{"a": true}', {"a": True}), ("(1, 2)", [1, 2])],
        *[("resnet50", "resnet50"), ("nan", "nan"), ("", ""), ("a=b", "a=b"), ("[a, 1e-3]", ["a", 1e-3])],
        *[("NaN", "NaN"), ("1e400", "1e400")],  # not JSON: they would not survive config.json
    ],
)
def test_free_form_flags_are_typed(text: str, value: object) -> None:
    got = parse(f"{MODEL_CONFIG}.x={text}").policy.vla_config.model_config["x"]
    assert got == value and type(got) is type(value)


def test_free_form_flags_join_the_dict_of_the_file(tmp_path: Path) -> None:
    model_config = {"lr": "1e-5", "class_path": "json.JSONDecoder", "trunk": {"width": 64, "norm": {"eps": 1e-5}}}
    path = write(tmp_path, {"policy": {"vla_config": {"model_config": model_config}}})
    flags = [f"{MODEL_CONFIG}.trunk.norm.affine=False", f"{MODEL_CONFIG}.trunk.depth=2", f"{MODEL_CONFIG}.head.bins=9"]
    assert parse("--config", path, *flags).policy.vla_config.model_config == {
        "lr": "1e-5",
        "class_path": "json.JSONDecoder",
        "trunk": {"width": 64, "norm": {"eps": 1e-5, "affine": False}, "depth": 2},
        "head": {"bins": 9},
    }
    assert parse("--config", path, f"{MODEL_CONFIG}={{}}", f"{MODEL_CONFIG}.a=1").policy.vla_config.model_config == {
        "a": 1
    }


def test_learning_rates_per_part(tmp_path: Path) -> None:
    path = write(tmp_path, {"policy": {"learning_rates": {"value_head": 1e-3}}})
    rates = parse("--config", path, "--policy.learning_rates.vision_encoder.layer1=1").policy.learning_rates
    assert rates == {"value_head": 1e-3, "vision_encoder.layer1": 1.0}
    assert type(rates["vision_encoder.layer1"]) is float


# --- saving and logging


def changed_everywhere() -> ExperimentConfig:
    return parse(
        "--trainer.wandb_tags=[a, b]",
        "--trainer.env_config.task=push",
        "--trainer.resume=runs/x",
        "--policy.freeze=[fusion, 'vision.*']",
        "--policy.learning_rates.value_head=1e-3",
        f"{MODEL_CONFIG}.trunk.width=64",
        f"{MODEL_CONFIG}.dropout=None",
        "--algorithm.cfg.target_kl=0.02",
    )


def test_saved_config_loads_equal(tmp_path: Path) -> None:
    config = changed_everywhere()
    path = write(tmp_path, json.dumps(to_dict(config), allow_nan=False))
    assert parse("--config", path) == config


def test_flattened_config_uses_the_names_of_the_flags() -> None:
    config = changed_everywhere()
    flat = flatten(config)
    assert flat["policy.vla_config.model_config.trunk.width"] == 64
    assert flat["policy.learning_rates.value_head"] == 1e-3
    assert flat["trainer.wandb_tags"] == ["a", "b"]
    assert set(flatten(ExperimentConfig())) >= {"policy.vla_config.model_config", "algorithm.cfg.gamma", "policy.name"}
    # What W&B holds, handed back the way its agent does, is the same experiment.
    assert parse(*(f"--{key}={value}" for key, value in flat.items())) == config


# --- what is refused

BAD_FLAGS = [
    # misspelt, misplaced, malformed
    (["--trainer.num_env=3"], "trainer.num_env;", "did you mean --trainer.num_envs?"),
    (["--polcy.freeze=vision"], "polcy.freeze", "did you mean --policy.freeze?"),
    (["--learning_rate=1e-4"], "--learning_rate;", "did you mean --algorithm.cfg.learning_rate?"),
    (["--policy.vla_config.model_confg.width=3"], "model_confg.width", "--policy.vla_config.model_config?"),
    (["--trainer.s=3"], "unknown option --trainer.s", ""),  # no abbreviations
    (["--policy=x.json"], "unknown option --policy", ""),
    (["--nonsense=1"], "unknown option --nonsense", ""),
    ([f"{MODEL_CONFIG}.=1"], "unknown option", "model_config."),
    (["run"], "'run'", "--key=value"),
    (["-x"], "'-x'", "--key=value"),
    (["--trainer.seed"], "--trainer.seed needs a value", ""),
    (["--trainer.seed", "--trainer.use_wandb=False"], "--trainer.seed needs a value", ""),
    (["--trainer.seed+=1"], "--trainer.seed+", "appended"),
    (["--trainer.exp_name+=x"], "--trainer.exp_name+", "appended"),
    # wrong types
    (["--trainer.num_envs=many"], "trainer.num_envs: expected int >0", 'got the string "many"'),
    (["--trainer.num_envs=8.0"], "trainer.num_envs: expected int >0", "got 8.0"),
    (["--trainer.num_envs=True"], "trainer.num_envs: expected int >0", "got true"),
    (["--trainer.use_wandb=1"], "trainer.use_wandb: expected true or false", "got 1"),
    (["--trainer.wandb_tags=a"], "trainer.wandb_tags: expected list of strings", 'got the string "a"'),
    (["--trainer.wandb_tags=[1]"], "trainer.wandb_tags: expected list of strings", "got [1]"),
    (["--algorithm.cfg.target_kl=x"], "algorithm.cfg.target_kl: expected float >0 or null", 'got the string "x"'),
    (["--policy.name=mlp"], "policy.name", '"vla"'),
    (["--policy.critic_gradient=all"], "policy.critic_gradient", '"head" or "trunk"'),
    (["--policy.learning_rates.head=x"], "policy.learning_rates.head: expected float >0", 'got the string "x"'),
    ([f"{MODEL_CONFIG}=3"], "policy.vla_config.model_config: expected object", "got 3"),
    ([f"{MODEL_CONFIG}.a=3", f"{MODEL_CONFIG}.a.b=3"], "model_config.a.b", "'a' holds 3"),
    # out of range
    *[
        ([f"--trainer.{name}={value}"], f"trainer.{name}: expected int >0", f"got {value}")
        for name in ("num_envs", "iterations", "buffer_size", "num_eval_envs", "num_eval_episodes")
        for value in (0, -1)
    ],
    *[([f"--algorithm.cfg.{n}=0"], f"algorithm.cfg.{n}: expected int >0", "got 0") for n in ("n_epochs", "batch_size")],
    (["--policy.action_dim=0"], "policy.action_dim: expected int >0", "got 0"),
    (["--trainer.eval_freq=-1"], "trainer.eval_freq: expected int ≥0", "got -1"),
    (["--algorithm.cfg.gamma=1.01"], "algorithm.cfg.gamma", "≥0 and ≤1, got 1.01"),
    (["--algorithm.cfg.gae_lambda=-0.1"], "algorithm.cfg.gae_lambda", "≥0 and ≤1, got -0.1"),
    (["--algorithm.cfg.clip_coef=0"], "algorithm.cfg.clip_coef: expected float >0", "got 0"),
    (["--algorithm.cfg.learning_rate=-1e-05"], "algorithm.cfg.learning_rate: expected float >0", "got -1e-05"),
    (["--algorithm.cfg.learning_rate=inf"], "algorithm.cfg.learning_rate: expected float >0", "Infinity"),
    (["--policy.learning_rates.head=0"], "policy.learning_rates.head: expected float >0", "got 0"),
    # impossible or not there yet
    (["--trainer.num_envs=48"], "trainer.buffer_size: 2048 is not a multiple of num_envs = 48", ""),
    (["--algorithm.cfg.batch_size=4096"], "algorithm.cfg.batch_size: 4096", "trainer.buffer_size = 2048"),
    (["--trainer.num_collectors=3"], "trainer.num_collectors", "does not divide num_envs = 64"),
    (["--trainer.num_collectors=2"], "trainer.num_collectors", "2 processes collect with buffer_type = vla; with"),
    (["--trainer.collector=ray"], "trainer.collector: ray", "buffer_type = standard, which is local"),
    (["--trainer.collector=local", "--trainer.buffer_type=vla"], "trainer.collector: local", "processes or ray"),
    (["--trainer.ray_address=auto"], "trainer.ray_address", "collector = ray"),
    (["--algorithm.cfg.clip_coef=1.5"], "algorithm.cfg.clip_coef: 1.5 would let the ratio fall below 0", "at most 1"),
    (["--algorithm.name=grpo", "--algorithm.cfg.clip_low=1"], "algorithm.cfg.clip_low: 1 would let", "below 1"),
    (["--algorithm.cfg.dual_clip=1"], "algorithm.cfg.dual_clip: 1 would bound", "above 1"),
    *[
        ([f"--algorithm.cfg.{n}=1", "--algorithm.cfg.vf_coef=0"], f"algorithm.cfg.{n}: is of the value loss", "vf_coef")
        for n in ("clip_value", "huber_delta")
    ],
    (
        ["--algorithm.cfg.normalize_proprio=true", "--algorithm.cfg.value_warmup_iterations=2"],
        "algorithm.cfg.normalize_proprio: changes what the policy does",
        "value_warmup_iterations = 2",
    ),
    (["--trainer.exp_name=a/b"], "trainer.exp_name: 'a/b'", ""),
    (["--trainer.exp_name="], "trainer.exp_name: ''", ""),
    (["--policy.freeze=vison"], "policy.freeze: 'vison'", "none, vision, language, backbone"),
    (["--policy.vla_config.adapter_path=x"], "policy.vla_config.adapter_path", "freeze=lora, not 'none'"),
    (["--policy.freeze=[vision,residual]"], "policy.freeze", "give it alone, not ['vision', 'residual']"),
    (["--policy.vla_config.adapter_path=x", "--policy.freeze=[vision]"], "vla_config.adapter_path", "not ['vision']"),
]

DIGITS, DEEP = "9" * 4301, '{"a":' * 600 + "1" + "}" * 600
BEYOND = [
    # numbers
    ([f"--trainer.seed={DIGITS}"], "trainer.seed: expected int"),
    ([f"--algorithm.cfg.gamma={DIGITS}"], "algorithm.cfg.gamma: expected float"),
    (["--trainer.seed=0x" + "f" * 5000], "trainer.seed: expected int"),
    ([f"--trainer.seed={2**64}"], f"trainer.seed: {2**64} is too large a number"),
    ([f"--trainer.seed={2**32}"], "trainer.seed: 4294967296 is too large; at most 4,294,967,295"),
    ([f"--trainer.num_envs={10**12}"], "trainer.num_envs: 1000000000000 is too large; at most 1,048,576"),
    ([f"--trainer.buffer_size={2**40}"], "trainer.buffer_size: 1099511627776 is too large"),
    ([f"--trainer.iterations={10**12}"], "trainer.iterations: 1000000000000 is too large"),
    ([f"--trainer.num_eval_episodes={10**9}"], "trainer.num_eval_episodes: 1000000000 is too large"),
    ([f"--trainer.max_eval_steps={10**9}"], "trainer.max_eval_steps: 1000000000 is too large"),
    (["--trainer.worker_timeout=1e7"], "trainer.worker_timeout: 10000000.0 is too large"),
    (["--trainer.threads=100000"], "trainer.threads: 100000 is too large"),
    ([f"--policy.lora.rank={10**12}"], "policy.lora.rank: 1000000000000 is too large"),
    ([f"--policy.action_dim={10**12}"], "policy.action_dim: 1000000000000 is too large"),
    ([f"--algorithm.cfg.n_epochs={10**12}"], "algorithm.cfg.n_epochs: 1000000000000 is too large"),
    (["--algorithm.cfg.clip_coef=1e39"], "algorithm.cfg.clip_coef: 1e+39 is too large a number"),
    (["--policy.learning_rates.x=1e300"], "policy.learning_rates.x: 1e+300 is too large a number"),
    ([f"--trainer.env_config.x=[[{2**63}]]"], "trainer.env_config.x: 9223372036854775808 is too large a number"),
    # nesting
    ([f"--trainer.env_config={DEEP}"], "trainer.env_config: is nested more than 32 levels deep"),
    ([f"--trainer.env_config.x={'[' * 600}{']' * 600}"], "trainer.env_config: is nested more than 32 levels deep"),
    ([f"--trainer.env_config.{'.'.join('a' * 600)}=1"], "trainer.env_config: is nested more than 32 levels deep"),
    # minus signs
    (["-" * 3000], "unknown option ---"),
    (["--trainer.seed=" + "-" * 3000 + "1"], 'trainer.seed: expected int ≥0, got the string "---'),
    (["--policy.freeze=" + "-" * 3000], "policy.freeze: '---"),
    # text
    (
        ["--trainer.exp_name=caf\udce9"],
        'trainer.exp_name: the string "caf\\udce9" has a NUL, or characters that are no',
    ),
    (["--trainer.exp_name=a\0"], 'trainer.exp_name: the string "a\\u0000" has a NUL'),
    (["--trainer.exp_name=a\nb"], "exp_name: 'a\\nb' cannot be part of a folder's name: too long, or unprintable"),
    (["--trainer.exp_name=" + "é" * 101], "cannot be part of a folder's name: too long"),
    (["--trainer.exp_name=" + "a" * 10_001], "trainer.exp_name: has a text of 10,001 characters, more than 10,000"),
    (["--trainer.wandb_tags=[a, 'b\udcff']"], "trainer.wandb_tags: the string"),
    (["--trainer.env_config.\udcff=1"], "trainer.env_config: the string"),
    (["--trai\nner=1"], "unknown option --trai\\nner"),
    (["--trai\0ner\u2028=1"], "unknown option --trai\\x00ner\\u2028"),
    (["--trainer.resume=" + "a" * 300], "trainer.resume: is too long for a path"),
    (["--trainer.run_dir=" + "a/" * 3000], "trainer.run_dir: is too long for a path"),
    (["--trainer.run_dir=a\nb"], "trainer.run_dir: 'a\\nb' has characters that no path here has"),
    (["--policy.vla_config.model_path=" + "a" * 300], "policy.vla_config.model_path: is too long for a path"),
    (["--policy.vla_config.model_class=" + "a." * 300 + "B"], "policy.vla_config.model_class: is too long for a path"),
    (["--config=a\0b"], "config file a\\x00b cannot be read: embedded null byte"),
    (["--config=" + "a" * 300], "cannot be read: File name too long"),
]


@pytest.mark.parametrize(("argv", "what"), BEYOND, ids=[row[0][0][:40] for row in BEYOND])
def test_what_no_run_could_use_is_refused(argv: list[str], what: str) -> None:
    message = refusal(*argv)
    assert what in message
    assert message.isprintable() and len(message) <= 2000


def test_generous_bounds_are_not_in_the_way() -> None:
    for flag in (f"seed={2**32 - 1}", "num_envs=1048576", "num_eval_episodes=1000000", "worker_timeout=1e6"):
        parse("--trainer.buffer_size=1048576", f"--trainer.{flag}")
    parse("--algorithm.cfg.max_grad_norm=1e12", "--trainer.env_config.bound=3.4028234663852886e38")
    parse(f"--trainer.env_config.x={'[' * 30}{']' * 30}", "--trainer.exp_name=" + "é" * 100, "--trainer.run_dir=a/…")


@pytest.mark.parametrize(("argv", "where", "what"), BAD_FLAGS, ids=[" ".join(row[0]) for row in BAD_FLAGS])
def test_bad_flags(argv: list[str], where: str, what: str) -> None:
    message = refusal(*argv)
    assert where in message and what in message


BAD_FILES = [
    ({"trainer": {"num_env": 8}}, "unknown key trainer.num_env; did you mean trainer.num_envs?"),
    ({"trainr": {"num_envs": 8}}, "unknown key trainr; did you mean trainer?"),
    (
        {"policy": {"vla_config": {"model_confg": {}}}},
        "unknown key policy.vla_config.model_confg; did you mean policy.",
    ),
    ({"algorithm": {"gamma": 0.9}}, "unknown key algorithm.gamma; did you mean algorithm.cfg.gamma?"),
    ({"trainer.seed": 1}, "'trainer.seed' has a dot"),
    (
        {"algorithm": {"cfg": {"learning_rate": "1e-5"}}},
        'algorithm.cfg.learning_rate: expected float >0, got the string "1e-5"',
    ),
    ({"algorithm": {"cfg": {"n_epochs": "4"}}}, 'algorithm.cfg.n_epochs: expected int >0, got the string "4"'),
    ({"algorithm": {"cfg": {"n_epochs": 4.0}}}, "algorithm.cfg.n_epochs: expected int >0, got 4.0"),
    ({"algorithm": {"cfg": {"n_epochs": True}}}, "algorithm.cfg.n_epochs: expected int >0, got true"),
    (
        {"algorithm": {"cfg": {"target_kl": "None"}}},
        'algorithm.cfg.target_kl: expected float >0 or null, got the string "None"',
    ),
    ({"algorithm": {"cfg": {"gamma": 2}}}, "algorithm.cfg.gamma: expected float ≥0 and ≤1, got 2"),
    ({"trainer": {"use_wandb": "no"}}, 'trainer.use_wandb: expected true or false, got the string "no"'),
    ({"trainer": {"use_wandb": 0}}, "trainer.use_wandb: expected true or false, got 0"),
    ({"trainer": {"exp_name": None}}, "trainer.exp_name: expected string, got null"),
    ({"algorithm": {"cfg": {"gamma": 10**400}}}, "algorithm.cfg.gamma: expected float ≥0 and ≤1, got 1000"),
    ({"policy": {"freeze": ["a", 1]}}, 'policy.freeze: expected string or list of strings, got ["a", 1]'),
    ({"policy": {"learning_rates": {"a": "1"}}}, 'policy.learning_rates.a: expected float >0, got the string "1"'),
    ({"algorithm": {"cfg": [1]}}, "algorithm.cfg: expected object, got [1]"),
    ({"algorithm": None}, "algorithm: expected object, got null"),
    ([], "expected object, got []"),
    ('{"trainer": {"env_config": {"x": {"y": NaN}}}}', "trainer.env_config.x: expected finite numbers, got {"),
    ('{"algorithm": {"cfg": {"vf_coef": Infinity}}}', "algorithm.cfg.vf_coef: expected float ≥0, got Infinity"),
    ('{"trainer": {"seed": 1, "seed": 2}}', "'seed' is given twice"),
    ('{"trainer":\n {"seed": 1,}}', f"line 2, column {12 if sys.version_info >= (3, 13) else 13}: not JSON"),
    ("", "line 1, column 1: not JSON"),
    ("[" * 100_000, "cannot be read"),
    (f'{{"trainer": {{"seed": {"9" * 4301}}}}}', "cannot be read: Exceeds the limit (4300 digits)"),
    ({"trainer": {"seed": 2**70}}, "trainer.seed: 1180591620717411303424 is too large a number"),
    ('{"trainer": {"env_config": ' + '{"a":' * 100 + "1" + "}" * 102, "env_config: is nested more than 32 levels"),
    ('{"trainer": {"exp_name": "\\ud800"}}', 'trainer.exp_name: the string "\\ud800" has a NUL, or characters'),
    ({"trainer": {"env_config": {"a\0": 1}}}, "trainer.env_config: the string"),
    ({"a\nb": 1}, "unknown key a\\nb"),
]


@pytest.mark.parametrize(("content", "what"), BAD_FILES, ids=[str(row[0])[:60] for row in BAD_FILES])
def test_bad_files(tmp_path: Path, content: object, what: str) -> None:
    path = write(tmp_path, content)
    message = refusal("--config", path)
    assert path in message and what in message


def test_a_group_is_not_taken_for_an_option_that_is_spelt_alike(tmp_path: Path) -> None:
    """`trainer` for `wander`, where the configuration of reinforcement learning is given to imitation."""
    message = refusal("--config", write(tmp_path, {"trainer": {"seed": 1}}), config_class=BCConfig)
    assert message.endswith("unknown key trainer")
    assert refusal("--config", write(tmp_path, {"wandr": 1}), config_class=BCConfig).endswith("did you mean wander?")


def test_no_file_is_named() -> None:
    assert refusal("--config=") == "config: expected the name of a configuration file, got nothing"


def test_a_file_of_many_keys_is_read_in_seconds(tmp_path: Path) -> None:
    path = write(tmp_path, {"trainer": {"env_config": {str(i): i for i in range(50_000)}}})
    begin = time.process_time()
    assert len(parse("--config", path).trainer.env_config) == 50_000
    assert time.process_time() - begin < 5


def test_bad_value_in_the_file_is_refused_even_where_a_flag_wins(tmp_path: Path) -> None:
    path = write(tmp_path, {"trainer": {"seed": "1"}})
    assert "trainer.seed" in refusal("--config", path, "--trainer.seed=1")


def test_unreadable_files(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.json")
    assert missing in refusal("--config", missing)
    assert str(tmp_path) in refusal("--config", str(tmp_path))
    (tmp_path / "latin.json").write_bytes(b'{"trainer": {"exp_name": "caf\xe9"}}')
    assert "latin.json" in refusal(f"--config={tmp_path / 'latin.json'}")
    assert "--config needs a value" in refusal("--config")


def test_combinations_are_judged_after_the_flags(tmp_path: Path) -> None:
    path = write(tmp_path, {"trainer": {"buffer_size": 256}, "algorithm": {"cfg": {"batch_size": 512}}})
    assert "algorithm.cfg.batch_size: 512" in refusal("--config", path)
    assert parse("--config", path, "--algorithm.cfg.batch_size=128").algorithm.cfg.batch_size == 128


# --- configurations of other scripts


@dataclass
class CloneConfig:
    """Imitation."""

    checkpoint: str
    """Where to write the checkpoint."""
    samples: PositiveInt = 1000
    """Number of samples."""
    offset: int = 0
    """Where to start, may be negative."""
    scale: float = 1.0
    """Scale of the noise."""
    trainer: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(exp_name="clone", env_config={"task": "reach"})
    )
    run: ExperimentConfig = field(default_factory=ExperimentConfig)


def test_another_config_class_nests_these(tmp_path: Path) -> None:
    path = write(tmp_path, {"samples": 5, "offset": -2, "scale": 0.5, "run": {"policy": {"action_dim": 4}}})
    config = parse_config(
        CloneConfig, ["--config", path, "--checkpoint=a.pt", "--trainer.env_config.image_size=32"], ""
    )
    assert config == CloneConfig(
        "a.pt",
        5,
        -2,
        0.5,
        TrainerConfig(exp_name="clone", env_config={"task": "reach", "image_size": 32}),
        ExperimentConfig(policy=PolicyConfig(action_dim=4)),
    )
    assert CloneConfig("b.pt").trainer.env_config == {"task": "reach"}


def test_another_config_class_gets_the_same_refusals(tmp_path: Path) -> None:
    for name in ("offset", "scale"):
        path = write(tmp_path, {"checkpoint": "a", name: True})
        assert f"{name}: expected " in refusal("--config", path, config_class=CloneConfig)
    assert "checkpoint: a value is required" in refusal(config_class=CloneConfig)
    assert "--samples" in refusal("--checkpoint=a", "--sample=3", config_class=CloneConfig)
    assert "samples: expected int >0" in refusal("--checkpoint=a", "--samples=0", config_class=CloneConfig)
    message = refusal("--checkpoint=a", "--run.trainer.num_envs=48", config_class=CloneConfig)
    assert message.startswith("run.trainer.buffer_size: ")
    message = refusal("--checkpoint=a", "--run.algorithm.cfg.batch_size=4096", config_class=CloneConfig)
    assert message.startswith("run.algorithm.cfg.batch_size: ")


@pytest.mark.parametrize("config_class", [ExperimentConfig, CloneConfig])
def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, config_class: type) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as caught:
        parse_config(config_class, ["--trainer.seed=1", "--help"], "Trains something.")
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "Trains something." in text and "--config FILE" in text
    assert "Environments that run side by side. (type: PositiveInt, default: 64)" in text
    assert f"default: {'clone' if config_class is CloneConfig else 'ppo'})" in text
    for key in flatten(ExperimentConfig() if config_class is ExperimentConfig else CloneConfig("")):
        assert re.search(f"--{re.escape(key)},? ", text) or key.startswith("trainer.env_config."), key
    undocumented = [line for line in lines if line.partition("(type:")[0].endswith("  ")]
    assert not undocumented


def test_what_the_help_says_of_no_value_is_what_a_flag_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """It said "none = fresh weights", and that flag looked for a file of this name."""
    with pytest.raises(SystemExit):
        parse_config(ExperimentConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "null = fresh weights" in text and "none =" not in text
    for option in ("policy.vla_config.model_path", "trainer.max_env_steps", "trainer.wandb_entity"):
        config = flatten(parse(f"--{option}=1", f"--{option}=null"))
        assert config[option] is None


def test_a_sweeps_rate_is_the_scopes_reference_times_the_factor(tmp_path: Path) -> None:
    flags = [
        "--policy.freeze=vision", "--policy.learning_rate_by_scope.vision=4e-4",
        "--policy.learning_rate_by_scope.none=1e-4", "--policy.learning_rate_factor=0.25",
    ]  # fmt: skip
    config = parse_config(ExperimentConfig, flags)
    assert config.algorithm.cfg.learning_rate == pytest.approx(1e-4)
    assert flatten(config)["algorithm.cfg.learning_rate"] == config.algorithm.cfg.learning_rate
    again = parse_config(ExperimentConfig, ["--config", write(tmp_path, to_dict(config))])
    assert again == config  # as a resumed run reads it
    assert "no rate for the scope 'backbone', only vision, none" in refusal(*flags, "--policy.freeze=backbone")
    assert "learning_rate_by_scope, which is not set" in refusal("--policy.learning_rate_factor=2")


BY_SCOPE = ["--policy.freeze=vision", "--policy.learning_rate_by_scope.vision=4e-4"]


def test_a_rate_is_given_once(tmp_path: Path) -> None:
    """Beside reference rates per scope another rate is refused, unless a flag's references go before a file's rate."""
    rate = {"algorithm": {"cfg": {"learning_rate": 1e-5}}}
    assert "give one of the two" in refusal(*BY_SCOPE, "--algorithm.cfg.learning_rate=1e-5")
    assert parse(*BY_SCOPE, "--algorithm.cfg.learning_rate=4e-4").algorithm.cfg.learning_rate == 4e-4
    assert parse("--config", write(tmp_path, rate), *BY_SCOPE).algorithm.cfg.learning_rate == 4e-4
    references = {"policy": {"freeze": "vision", "learning_rate_by_scope": {"vision": 4e-4}}}
    assert "algorithm.cfg.learning_rate: is 1e-05" in refusal("--config", write(tmp_path, references | rate))
    path = write(tmp_path, references)
    assert "learning_rate_factor it is 0.0004" in refusal("--config", path, "--algorithm.cfg.learning_rate=1e-5")
    unset = ["--policy.learning_rate_by_scope={}", "--algorithm.cfg.learning_rate=1e-5"]
    assert parse("--config", path, *unset).algorithm.cfg.learning_rate == 1e-5


def test_switches_of_the_model_become_the_scope(tmp_path: Path) -> None:
    """So that config.json and a table of runs hold scopes alone."""
    config = parse(f"{MODEL_CONFIG}.freeze_vision_encoder=True", f"{MODEL_CONFIG}.width=3")
    assert config.policy.freeze == "vision" and config.policy.vla_config.model_config == {"width": 3}
    assert parse("--config", write(tmp_path, to_dict(config))) == config
    assert parse(f"{MODEL_CONFIG}.freeze_vision_encoder=False").policy.freeze == "none"


LENGTHS = ["--policy.freeze=vision", "--trainer.iterations_by_scope.vision=80", "--trainer.iterations_by_scope.none=32"]


def test_a_sweep_gives_each_scope_the_iterations_that_fit_its_time(tmp_path: Path) -> None:
    config = parse(*LENGTHS)
    assert config.trainer.iterations == 80 and parse(*LENGTHS, "--policy.freeze=none").trainer.iterations == 32
    assert parse("--config", write(tmp_path, to_dict(config))) == config
    assert "no number for the scope 'lora', only vision, none" in refusal(*LENGTHS, "--policy.freeze=lora")
    message = refusal(*LENGTHS, "--trainer.iterations=5")
    assert message.startswith(
        "trainer.iterations: is 5, but by trainer.iterations_by_scope it is 80; give one of the two"
    )
    assert "trainer.max_env_steps ends runs, too" in refusal(*LENGTHS, "--trainer.max_env_steps=5")


# --- a group whose options depend on a name


@dataclass
class FirstConfig:
    """One algorithm."""

    name: ClassVar[str] = "first"

    rate: float = 0.1
    """How fast."""


@dataclass
class SecondConfig:
    """Another."""

    name: ClassVar[str] = "second"

    groups: PositiveInt = 8
    """How many."""


@dataclass
class EitherConfig:
    """Either of the two."""

    name: Literal["first", "second"] = "first"
    """Which."""
    cfg: FirstConfig | SecondConfig = field(default_factory=FirstConfig)


@dataclass
class OuterConfig:
    """What holds it."""

    algorithm: EitherConfig = field(default_factory=EitherConfig)


def test_a_name_chooses_what_its_group_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parse_either = lambda *argv: parse_config(OuterConfig, list(argv), "test").algorithm.cfg  # noqa: E731
    assert parse_either("--algorithm.cfg.rate=0.2") == FirstConfig(0.2)
    assert parse_either("--algorithm.name=second", "--algorithm.cfg.groups=3") == SecondConfig(3)
    assert parse_either("--algorithm.cfg.groups", "4", "--algorithm.name", "second") == SecondConfig(4)
    path = write(tmp_path, {"algorithm": {"name": "second", "cfg": {"groups": 5}}})
    assert parse_either("--config", path) == SecondConfig(5)
    assert parse_either(f"--config={path}", "--algorithm.cfg.groups=6") == SecondConfig(6)
    config = parse_config(OuterConfig, ["--config", path], "test")
    assert parse_either("--config", write(tmp_path, to_dict(config))) == SecondConfig(5)
    assert "algorithm.cfg.groups" in refusal("--algorithm.cfg.groups=3", config_class=OuterConfig)
    assert "algorithm.cfg.rate" in refusal(
        "--algorithm.name=second", "--algorithm.cfg.rate=1", config_class=OuterConfig
    )
    assert '"first" or "second"' in refusal("--algorithm.name=third", config_class=OuterConfig)
    with pytest.raises(SystemExit):
        parse_config(OuterConfig, ["--algorithm.name=second", "--help"], "test")
    text = capsys.readouterr().out
    assert "--algorithm.cfg.groups" in text and "--algorithm.cfg.rate" not in text


def test_another_kind_has_none_of_the_defaults_of_the_default_one(tmp_path: Path) -> None:
    def settings(*flags: str, file: dict | None = None) -> tuple[str, dict]:
        if file is not None:
            (tmp_path / "bc.json").write_text(json.dumps(file))
            flags = (f"--config={tmp_path / 'bc.json'}", *flags)
        config = parse_config(BCConfig, list(flags))
        return config.env, config.env_config

    own = BCConfig().env_config
    assert own["task"] == "pick_place"
    for flags in ([], ["--env=tabletop"], ["--env", "tabletop"]):
        assert settings(*flags) == ("tabletop", own)
    assert settings(file={"steps": 3}) == ("tabletop", own)
    assert settings("--env_config.image_size=32") == ("tabletop", {**own, "image_size": 32})
    assert settings("--env=metaworld") == settings(file={"env": "metaworld"}) == ("metaworld", {})
    assert settings("--env", "metaworld", "--env_config.image_size=32") == ("metaworld", {"image_size": 32})
    file = {"env": "metaworld", "env_config": {"task": "push-v3"}}
    assert settings(file=file) == ("metaworld", {"task": "push-v3"})
    # A named file keeps all, as in the training scripts; what the file itself gives is no default.
    assert settings("--env=maniskill", file=file) == ("maniskill", {"task": "push-v3"})
    assert settings("--env=tabletop", file={"env": "metaworld"}) == ("tabletop", own)
