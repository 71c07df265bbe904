"""The documentation's example is complete and runs as printed."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import bc_vla
import evaluate_vla
import ppo_vla
import pytest
import torch
from configuration import DEFAULT_CONFIG, asks, read_experiment
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from transformers import PreTrainedTokenizerFast
from worlds import ROOT

from agents.loading import import_model_class
from agents.reuse import split_constant
from research import commands
from research.config import ExperimentConfig
from research.errors import UserError
from research.options import parse_config
from research.runs.checkpoint import load_checkpoint
from research.schema import encode_text


def blocks(path: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [block for kind, block in fenced if kind == language]


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


PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "RESULTS.md",
    *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
RUN = re.compile(r"runs/<[^/>]+>(?:-<id>)?|runs/[a-z_]+-\d{8}_\w+|<(?:a )?run[^>]*>")
OWN: dict[str, str] = {}


class Accepted(Exception):
    """The options of a script were read, and nothing ran."""


def shown_commands(page: Path) -> list[str]:
    """Calls of the project's scripts: whole lines of blocks, continued ones joined, and those within sentences."""
    if not page.exists():
        return []
    text = page.read_text()
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    sentences = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " "))
    named = re.compile(r"(?:\$ )?(?:python|torchrun)\b.*?(?:experiments|sweeps)/\w+(?:/\w+)*\.py|(?:\$ )?vla-\w+ ")
    return [line.removeprefix("$ ") for line in (*lines, *sentences) if named.match(line)]


@pytest.fixture
def read_options(tmp_path, monkeypatch):
    """A function that has a script read its options, as the script itself would, and not run."""
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("my.json", "my_robot.json", "my_sweep.yaml"):  # the reader's own
        monkeypatch.setitem(OWN, name, str(run / "config.json"))
    (run / "config.json").write_text(DEFAULT_CONFIG.read_text().replace("checkpoints/", f"{DEFAULT_CONFIG.parent}/"))
    started = []
    monkeypatch.setattr(commands, "_run", started.append)
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)

    def read(command: str) -> None:
        command = command.replace("checkpoint-<run id>", "checkpoint-id").replace("=S", "=1")
        command = RUN.sub(str(run), command).replace("<this repository>/", "")
        words = [OWN.get(word, word) for word in shlex.split(command, comments=True)]
        at = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("vla-"))
        if words[at].startswith("vla-"):  # as pip's command does
            started.clear()
            getattr(commands, words[at].removeprefix("vla-"))()
            words[at] = f"experiments/{started[0]}"
        script = Path(words[at]).name
        argv = [word for word in words[at + 1 :] if word not in ("--dry_run", "--trust")]
        if asks(argv):
            return
        if script in ("ppo_vla.py", "grpo_vla.py"):
            config = read_experiment(ExperimentConfig, argv, "")
            if config.policy.vla_config.model_class.startswith("agents."):
                assert import_model_class(config.policy.vla_config.model_class)
        elif script in ("bc_vla.py", "evaluate_vla.py"):
            parse_config({"bc": bc_vla.BCConfig, "evaluate": evaluate_vla.EvaluationConfig}[script.split("_")[0]], argv)
        elif "ArgumentParser" in Path(words[at]).read_text():
            monkeypatch.setattr(sys, "argv", [script, *argv])
            with pytest.raises((Accepted, SystemExit)) as ended:
                runpy.run_path(words[at], run_name="__main__")
            assert ended.type is Accepted, f"exit code {ended.value}"
        else:
            assert all(f'"{word}"' in Path(words[at]).read_text() for word in argv), f"{script} does not know {argv}"

    return read


@pytest.mark.parametrize("page", [page for page in PAGES if shown_commands(page)], ids=lambda page: page.stem)
def test_commands_shown_are_accepted(page, read_options):
    for command in shown_commands(page):
        try:
            read_options(command)
        except (UserError, AssertionError) as error:
            pytest.fail(f"{page.name}: {command}: {error}")


def test_a_command_that_a_script_does_not_know_is_found(read_options):
    for command in ("python experiments/ppo_vla.py --trainer.iteration=3", "vla-compare runs --whatever"):
        with pytest.raises((UserError, AssertionError)):
            read_options(command)
    assert {page.name: len(shown_commands(page)) for page in PAGES}["README.md"] >= 17


RUNNERS = re.compile(
    r"(?:make|python -c|python (?:<this repository>/)?experiments/\S+|torchrun|pip install|uv|vla-\w+|wandb|ray|trackio"
    r"|docker|apptainer|sbatch|kubectl|pytest)(?: |$)"
)


def told_commands(page: Path) -> set[str]:
    """Whatever a page tells to run: in lines of blocks, and within sentences."""
    text = re.sub(r"^ +(?=```)", "", page.read_text(), flags=re.MULTILINE)  # blocks within lists are indented
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in fenced if not kind for line in block.replace("\\\n", " ").splitlines()]
    sentences = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    words = [" ".join(re.split(r"\s#\s", line)[0].split()).removeprefix("$ ") for line in (*lines, *sentences)]
    return {line for line in words if " " in line and RUNNERS.match(line)}


def test_the_list_of_commands_has_all_that_the_pages_tell_and_no_others():
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "deploy/README.md")]
    pages += [page for page in (ROOT / "docs").glob("*.md") if page.name != "commands.md"]
    told = set().union(*map(told_commands, pages))
    listed = told_commands(ROOT / "docs" / "commands.md")
    assert told - listed == set() and listed - told == set() and len(told) > 70


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_and_headings_that_the_documents_name_exist():
    names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md", "experiments/RESULTS.md")
    headings = 0
    for path in [*(ROOT / name for name in names), *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"`((?:research|agents|envs|experiments|tests|docs|sweeps)/[\w./]*)`", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name} names {name}"
        for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"
                assert not heading or heading in anchors(path.parent / target if target else path), (path.name, heading)
                headings += bool(heading)
    assert headings > 30
