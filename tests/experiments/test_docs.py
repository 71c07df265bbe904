"""The documentation's example is complete and runs as printed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import bc_vla
import evaluate_vla
import ppo_vla
import pytest
import torch
from configuration import read_experiment, split_flag
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from transformers import PreTrainedTokenizerFast
from worlds import ROOT

from agents.loading import import_model_class
from agents.reuse import split_constant
from research.config import ExperimentConfig
from research.options import parse_config
from research.runs.checkpoint import load_checkpoint
from research.schema import encode_text


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_integration_example_trains_as_printed(tmp_path, monkeypatch, capsys):
    """A model that is not in the repository, with its own checkpoint, rgb and language only, through JSON alone."""
    guide = ROOT / "docs" / "vla_integration.md"
    (tmp_path / "my_vla.py").write_text(blocks(guide, "python")[0])
    (config,) = (block for block in blocks(guide, "json") if "my_vla.MyVLA" in block)
    (tmp_path / "my.json").write_text(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_vla

    exec(blocks(guide, "python")[1])  # writes my_vla.pt, as the guide says
    model = my_vla.MyVLA(width=64)
    model.load_state_dict(torch.load("my_vla.pt", weights_only=True))
    assert ppo_vla.main(["--config", "my.json", "--trainer.progress_bar=False"]) == 0, capsys.readouterr().err
    run = next((tmp_path / "runs").iterdir())
    trained = load_checkpoint(run)["model_state_dict"]
    assert any(not torch.equal(trained[name], weight) for name, weight in model.state_dict().items())
    for name in ("config.json", "metrics.jsonl", "summary.json", "episodes.jsonl", "learning_curve.png"):
        assert (run / name).stat().st_size > 0, name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "train/approx_kl" in row)
    assert abs(first["train/approx_kl"]) < 0.1
    assert evaluate_vla.main([f"--checkpoint={run}", "--output=out", "--trainer.progress_bar=False"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads(Path("out/summary.json").read_text())["eval/return"] == summary["eval/return"]


def test_the_tokenizer_of_the_guide_is_a_stage_that_runs_at_collection_alone():
    (example,) = (b for b in blocks(ROOT / "docs" / "vla_integration.md", "python") if "class Tokenize" in b)
    names = {}
    exec(example, names)
    words = PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "experiments" / "checkpoints" / "tabletop_words" / "tokenizer.json"), pad_token="</s>"
    )
    tokenize = TensorDictModule(names["Tokenize"](words, 9), in_keys=[("observation", "language")], out_keys=["ids"])
    reads_ids = TensorDictModule(nn.Embedding(len(words), 4), in_keys=["ids"], out_keys=["hidden"])
    assert split_constant([tokenize, reads_ids]) == ([tokenize], [reads_ids])
    texts = ["put the red cube on the blue plate", "move"]
    written = tokenize(TensorDict({"observation": {"language": encode_text(texts, 64)}}, batch_size=[2]))["ids"]
    ids = words(texts[0]).input_ids
    assert written.shape == (2, 9) and written[0].tolist() == ids + [words.pad_token_id] * (9 - len(ids))


@pytest.mark.parametrize("page", ["README.md", "docs/vla_integration.md"])
def test_configurations_shown_are_accepted(page, tmp_path):
    shown = blocks(ROOT / page, "json")
    assert shown
    for block in shown:
        (tmp_path / "shown.json").write_text(block)
        parse_config(ExperimentConfig, ["--config", str(tmp_path / "shown.json")])


def test_commands_of_the_page_of_models_are_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [line for block in blocks(ROOT / "docs" / "models.md", "") for line in block.splitlines() if line]
    assert len(commands) >= 12
    for command in commands:
        script, *argv = shlex.split(command, comments=True)[1:]
        assert (ROOT / script).is_file(), command
        argv, _ = split_flag(argv, "--dry_run")
        if script.endswith("bc_vla.py"):
            parse_config(bc_vla.BCConfig, argv)
        else:
            config = read_experiment(ExperimentConfig, argv, "")
            assert import_model_class(config.policy.vla_config.model_class)


def test_files_that_the_documents_name_exist():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"`((?:research|agents|envs|experiments|tests|docs|sweeps)/[\w./]*)`", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name} names {name}"
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name} links to {target}"
