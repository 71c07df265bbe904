"""Users' models with odd habits in whole runs: they train, or a warning or a refusal says what is wrong with them."""

from __future__ import annotations

import logging

import ppo_vla
import pytest
from worlds import all_weights, run_folder, write_config

from research.runs.checkpoint import load_checkpoint
from research.runs.folder import RunFolder

pytestmark = pytest.mark.slow


def run(tmp_path, model: str, *flags: str) -> int:
    config = write_config(
        tmp_path,
        trainer__env="gym:user_package.odd_envs:Truncates",
        trainer__env_config={},
        trainer__buffer_size=256,
        policy__action_dim=None,
        policy__vla_config={"model_class": f"user_package.odd_models.{model}"},
        algorithm__cfg__batch_size=64,
    )
    return ppo_vla.main(["--config", str(config), *flags])


@pytest.mark.parametrize(
    "model", ["Plain", "WithDropout", "BatchNormEncoder", "ReturnsNothingFromTrain", "CountsItsHeads"]
)
@pytest.mark.parametrize("scope", ["none", "vision"])
def test_these_train_and_nothing_is_said_of_them(tmp_path, caplog, model, scope):
    assert run(tmp_path, model, f"--policy.freeze={scope}", "--algorithm.cfg.learning_rate=1e-5") == 0
    assert [m for level, m in ((r.levelno, r.message) for r in caplog.records) if level >= logging.WARNING] == [
        f"user_package.odd_models.{model} starts from fresh weights: no policy.vla_config.model_path is given"
    ]
    folder = run_folder(tmp_path)
    start = load_checkpoint(RunFolder(folder).best_checkpoint)["model_state_dict"]  # the first of equal evaluations
    moved = {
        name.split(".")[0] for name, w in all_weights(folder).items() if name in start and (w != start[name]).any()
    }
    trained = {"trunk", "action_head", "log_std", "value_head"} | ({"vision_encoder"} if scope == "none" else set())
    assert moved == trained  # all of it, at a rate of 1e-5


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("ForcesTrain", "the policy that is scored is not the one that acted"),
        ("ClampsBeforeScoring", "as if forward() clamped what it drew"),
        ("DrawsColdly", "actions are more likely than draws from the distribution that scores them"),
    ],
)
def test_these_are_warned_of_before_the_first_update(tmp_path, caplog, model, said):
    assert run(tmp_path, model) == 0
    assert sum(said in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("BFloat16", "in half precision"),
        ("KeepsTheLastDimension", "(log_prob): expected a float tensor [2], got"),
        ("KeepsFeatures", "KeepsFeatures.get_value depends on what the model did before"),
    ],
)
def test_these_are_refused(tmp_path, capsys, model, said):
    assert run(tmp_path, model) == 2
    assert said in capsys.readouterr().err
