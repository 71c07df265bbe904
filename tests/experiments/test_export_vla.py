"""What a run learned, in a file that the model's own class loads."""

from __future__ import annotations

import export_vla
import ppo_vla
import pytest
import torch
from worlds import all_weights, run_folder, write_config

from agents.loading import load_vla_model
from envs.tabletop import TabletopEnv

pytestmark = pytest.mark.slow

MODEL = {"action_dim": 3, "modalities": ["rgb", "proprio"], "hidden_size": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with low-rank adapters."""
    folder = tmp_path_factory.mktemp("export")
    config = write_config(folder, policy__freeze="lora", trainer__iterations=2, algorithm__cfg__learning_rate=0.01)
    assert ppo_vla.main(["--config", str(config)]) == 0
    return run_folder(folder)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_exported_weights_are_the_trained_policy_under_the_classs_own_names(run, tmp_path, capsys, suffix):
    output = tmp_path / "new" / f"weights{suffix}"
    assert export_vla.main([f"--checkpoint={run}", f"--output={output}"]) == 0
    assert str(output) in capsys.readouterr().out
    model = load_vla_model(output, "agents.small_vla.SmallVLA", MODEL).eval()  # strict: all names fit
    observations = TabletopEnv(8, "reach", modalities=["rgb", "proprio"]).reset()["observation"]
    trained = all_weights(run)
    layer = "fusion.layers.0"
    base, a, b = (
        trained[f"{layer}.{n}"] for n in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    )
    assert b.abs().max() > 0
    torch.testing.assert_close(model.get_submodule(layer).weight, base + 16 / 8 * b @ a)
    assert model(observations, deterministic=True).shape == (8, 3)


@pytest.mark.parametrize(
    ("checkpoint", "output", "message"),
    [("nowhere", "x.pt", "neither a run folder"), (None, "x.bin", "use .pt or .safetensors")],
)
def test_what_cannot_be_exported_is_said_in_one_line(run, tmp_path, capsys, checkpoint, output, message):
    assert export_vla.main([f"--checkpoint={checkpoint or run}", f"--output={tmp_path / output}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
