"""Export the weights that a training run ended with, for whoever loads the model without this project.

    python experiments/export_vla.py --checkpoint=runs/<run folder> --output=my_vla.safetensors     # a file
    python experiments/export_vla.py --checkpoint=runs/<run folder> --output=my_vla                 # a folder

Low-rank adapters are folded into their layers, so that names and shapes are those of the model's class. The file (.pt,
or .safetensors) is what policy.vla_config.model_path takes, and `load_state_dict` of the class; that of a run with
policy.freeze=residual has the network that was added, too, for `add_residual` of agents/residual.py. The folder is what
the model's family has: transformers' of pi0, LeRobot's of SmolVLA, the public layout of OpenVLA; its library reads it,
and here the option `pretrained` of the model. Of other models it is one of the Hugging Face hub, which `SharedPolicy`
of agents/hub.py reads (`from_pretrained`) and uploads (`push_to_hub`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import packages  # noqa: F401

from research.commands import as_called, called
from research.errors import UserError
from research.runs.folder import replacing

if TYPE_CHECKING:
    from torch import nn

FILES = (".pt", ".safetensors")
EPILOG = """to act with a run, in a robot's own loop (experiments/ on PYTHONPATH):

    from trained_policy import load_policy

    act = load_policy("runs/<run folder>")
    action = act({"rgb": picture, "proprio": joints, "language": "put the cup on the plate"})  # numpy in, numpy out

and with an exported folder, without a run: `act = serve(Pi0VLA(7, ..., pretrained="my_vla"))` of agents/serving.py
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=called(),
        description=as_called(__doc__),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="run folder, or a checkpoint in it")
    parser.add_argument("--output", required=True, help="file (.pt, .safetensors), or folder (no ending)")
    parser.add_argument("--trust", action="store_true", help="run code that a run folder from elsewhere names")
    options = parser.parse_args(argv)
    try:
        if not options.output:
            raise UserError("--output: is empty; name a file (.pt, .safetensors), or a folder that is not there yet")
        print(f"{export(options.checkpoint, Path(options.output), options.trust)} weights in {options.output}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(checkpoint: str, output: Path, trusted: bool = False) -> int:
    """Write the merged weights, to a file or a folder by `output`'s ending; returns how many tensors the model has."""
    # Seconds, for which --help does not wait.
    from safetensors import SafetensorError
    from trained_policy import load_trained_model

    from agents.checkpoint_folder import refuse_taken
    from agents.hub import SharedPolicy
    from research.training.lora import merge_lora

    if output.suffix not in ("", *FILES) and not output.is_dir():
        raise UserError(f"--output: {output} ends in {output.suffix!r}; use .pt or .safetensors, or none for a folder")
    as_file = output.suffix in FILES and not output.is_dir()
    if not as_file:
        refuse_taken(output, "--output")
    trained = load_trained_model(checkpoint, trusted)
    model = merge_lora(trained.model)
    try:
        if as_file:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_file(model, output)
        elif hasattr(model, "export"):
            model.export(output)
        else:
            vla, autocast = trained.config.policy.vla_config, trained.config.trainer.autocast
            shared = SharedPolicy.of(
                model, vla.model_class, trained.arguments, trained.observations, autocast, trained.action_map
            )
            shared.save_pretrained(output)
    except OSError as error:
        raise UserError(f"--output: cannot write {output}: {error.strerror}") from error
    except SafetensorError as error:  # the library's own, where a disk is full
        raise UserError(f"--output: cannot write {output}: {error}") from error
    return len(model.state_dict())


def write_file(model: nn.Module, path: Path) -> None:
    """Write a model's state dict."""
    import torch
    from safetensors.torch import save_file

    from agents.weights import untied

    weights = model.state_dict()
    if path.suffix == ".pt":
        weights = {name: weight.contiguous() for name, weight in weights.items()}
        with replacing(path, "wb") as file:
            torch.save({"model_state_dict": weights}, file)
    else:
        save_file(untied(weights), path)


if __name__ == "__main__":
    sys.exit(main())
