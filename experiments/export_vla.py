"""Export the weights that a training run ended with, for whoever loads the model without this project.

    python experiments/export_vla.py --checkpoint=runs/<run folder> --output=my_vla.safetensors

Low-rank adapters are folded into their layers, so that names and shapes are those of the model's class. The file (.pt,
or .safetensors) is what policy.vla_config.model_path takes, and `load_state_dict` of the class.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import packages  # noqa: F401

import torch
from building import load_trained, make_model
from resuming import load_run
from safetensors.torch import save_file

from envs import make_env
from research.config import ExperimentConfig
from research.options import parse_config
from research.runs.folder import RunFolder, replacing
from research.schema import OBSERVATION, UserError
from research.training.lora import merge_lora


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder, or a checkpoint in it")
    parser.add_argument("--output", required=True, type=Path, help="file to write: .pt or .safetensors")
    parser.add_argument("--trust", action="store_true", help="run code that a run folder from elsewhere names")
    options = parser.parse_args(argv)
    try:
        print(f"{export(options.checkpoint, options.output, options.trust)} weights in {options.output}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(checkpoint: str, output: Path, trusted: bool = False) -> int:
    """Write the merged weights; returns how many tensors they are."""
    if output.suffix not in (".pt", ".safetensors"):
        raise UserError(f"--output: {output} ends in {output.suffix!r}; use .pt or .safetensors")
    folder = RunFolder.containing(checkpoint)
    if not folder.is_run:
        raise UserError(f"--checkpoint: {checkpoint} is neither a run folder nor a checkpoint in one")
    config = parse_config(ExperimentConfig, [f"--config={folder.config}"])
    trained = load_run(checkpoint, config, trusted)
    env = make_env(config.trainer.env, 2, config.trainer.env_config, "cpu")
    observations, action_shape = env.observation_spec[OBSERVATION].zero(), env.action_spec.shape[1:]
    choices = getattr(env, "action_choices", None)
    model = make_model(config, observations, action_shape, torch.device("cpu"), True, choices).model
    env.close()
    load_trained(model, trained)
    weights = {name: weight.contiguous() for name, weight in merge_lora(model).state_dict().items()}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".pt":
            with replacing(output, "wb") as file:
                torch.save({"model_state_dict": weights}, file)
        else:
            save_file(untied(weights), output)
    except OSError as error:
        raise UserError(f"--output: cannot write {output}: {error.strerror}") from error
    return len(weights)


def untied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the first of their names each: safetensors refuses memory that two names share."""
    seen: set[int] = set()
    return {n: w for n, w in weights.items() if not (w.data_ptr() in seen or seen.add(w.data_ptr()))}


if __name__ == "__main__":
    sys.exit(main())
