"""Checkpoints of OpenVLA: a folder with `config.json`, weights, the statistics of its data and a tokenizer.

What is read is what is written: the names of the public checkpoints, so that the public code reads an exported folder,
too. The head of the state value, which is this project's, lies in a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig

from agents.checkpoint_folder import (
    BYTES,
    copy_small_files,
    fill_own_heads,
    start_export,
    write_json,
    write_own_heads,
)
from agents.families import recognise
from agents.normalisation import Normalisation, read_statistics
from agents.packaged_weights import fill_part
from agents.prismatic_vision import DINOV2, SIGLIP, TowerConfig, tower_config
from agents.weights import DIRECTORY_FILES, read_json, read_weights, some
from research.errors import UserError, describe_error, did_you_mean

PARTS = ("vision_backbone", "projector", "language_model")  # as a checkpoint names its weights
STATISTICS = "dataset_statistics.json"
DECODING = "action_decoding"  # in config.json, of what `export` wrote
# Arguments that name a size of the model, with the sizes of OpenVLA-7B.
SIZES: dict[str, Any] = {
    "text_config": {"vocab_size": 32064},
    "timm_model_ids": [DINOV2, SIGLIP],
    "towers": [{}, {}],  # changes to these; no public checkpoint has any
    "image_sizes": [224, 224],
    "n_action_bins": 256,
    "pad_to_multiple_of": 64,
}
OTHER_FILES = ("action_head--*", "noisy_action_projector--*", "proprio_projector--*")  # beside OpenVLA-OFT's weights
NO_DISTRIBUTION = (
    "has parts of OpenVLA-OFT that are not run here: its action head regresses or denoises numbers and has no "
    "distribution to train, and proprioception is not read; take a checkpoint trained with tokens"
)


@dataclass(frozen=True)
class OpenVLAConfig:
    """What the constructor needs of a `config.json`.

    Attributes:
        text: of the language model.
        towers: of DINOv2 and of SigLIP.
        image_size: pixels along the sides of what they see.
        bins: tokens that are bins of actions.
        tokens: of the vocabulary, without the rows that fill it up.
        content: the whole file, with the changes.
    """

    text: LlamaConfig
    towers: tuple[TowerConfig, TowerConfig]
    image_size: int
    bins: int
    tokens: int
    content: dict[str, Any]


def openvla_config(pretrained: str | None, changes: Mapping[str, Any] | None) -> OpenVLAConfig:
    """The configuration of a pretrained folder, or of fresh weights, with some of `SIZES` changed.

    Raises:
        UserError: neither is given, there is no such file, an unknown argument, or sizes that cannot be.
    """
    if pretrained is None and changes is None:
        raise UserError(
            "OpenVLA: set pretrained to a folder, or config to the sizes of fresh weights; see openvla_tiny.json"
        )
    for name in changes or {}:
        if name not in SIZES:
            raise UserError(f"OpenVLA: config: {name!r} is not known{did_you_mean(name, SIZES)}")
    found = {} if pretrained is None else _config_in(Path(pretrained))
    content = {**SIZES, **found, **(changes or {})}
    content["text_config"] = {
        **found.get("text_config", SIZES["text_config"]),
        **(changes or {}).get("text_config", {}),
    }
    llama = {k: v for k, v in content["text_config"].items() if k not in ("model_type", "dtype", "torch_dtype")}
    try:
        text = LlamaConfig(**llama)
        towers = [tower_config(*one) for one in zip(content["timm_model_ids"], content["towers"], strict=True)]
        dinov2, siglip = towers
        (image_size,) = set(content["image_sizes"])
        tokens = text.vocab_size - content["pad_to_multiple_of"]
    except UserError:
        raise
    except Exception as error:  # whatever the library's own checks raise
        raise UserError(f"OpenVLA: config: no sizes of OpenVLA: {describe_error(error)}") from error
    if tokens < 256 + content["n_action_bins"]:
        raise UserError(
            f"OpenVLA: config: text_config.vocab_size is {text.vocab_size}, too few for 256 bytes or words, "
            f"{content['n_action_bins']} bins and pad_to_multiple_of = {content['pad_to_multiple_of']} rows"
        )
    return OpenVLAConfig(text, (dinov2, siglip), image_size, content["n_action_bins"], tokens, content)


def _config_in(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"OpenVLA: there is no {path}; pretrained is a folder with that file")
    found = read_json(path)
    text = found.get("text_config") if isinstance(found, dict) else None
    if not isinstance(text, dict) or text.get("model_type", "llama") != "llama" or "timm_model_ids" not in found:
        raise UserError(
            f"OpenVLA: {path} is not OpenVLA's: expected a text_config of Llama, and timm_model_ids of two towers"
        )
    return found


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill the parts of a model from a folder, and its value head where the folder has one.

    Raises:
        UserError: there are no weights, one is absent or has another shape, or they are of another family.
    """
    if others := sorted(file.name for pattern in OTHER_FILES for file in folder.glob(pattern)):
        raise UserError(f"OpenVLA: {folder} {NO_DISTRIBUTION} ({some(others)})")
    if not any((folder / name).is_file() for name in DIRECTORY_FILES):
        raise UserError(f"OpenVLA: {folder} holds no weights ({', '.join(DIRECTORY_FILES)})")
    weights = {name: value for shard in read_weights(folder) for name, value in shard.items()}
    family = recognise(weights)
    if family == "OpenVLA-OFT":
        raise UserError(f"OpenVLA: {folder} {NO_DISTRIBUTION}")
    if family not in (None, "OpenVLA"):
        raise UserError(f"OpenVLA: {folder} holds weights of {family}; set policy.vla_config.model_class to its class")
    for part in PARTS:
        own = {n.removeprefix(f"{part}."): value for n, value in weights.items() if n.startswith(f"{part}.")}
        fill_part(getattr(model, part), own, folder, f"OpenVLA: pretrained: {part}")
    fill_own_heads(model, folder, "OpenVLA: pretrained")


def action_statistics(
    pretrained: str | None, statistics: str | None, dataset: str | None
) -> tuple[str, dict[str, Any]] | None:
    """The name of a data set, and its statistics of actions; None for fresh weights without any.

    Raises:
        UserError: a pretrained folder has none, and no others are named.
    """
    if statistics is None and pretrained is None:
        return None
    if statistics is None:
        places = [Path(pretrained) / STATISTICS, Path(pretrained) / "config.json"]
        has = [path.is_file() and _has_statistics(path) for path in places]
        if not any(has):
            raise UserError(
                f"OpenVLA: {pretrained} has no {STATISTICS}, and no norm_stats in its config.json: set statistics to "
                "the file of the data that it was trained on"
            )
        statistics = str(places[has.index(True)])
    found = read_statistics(statistics, "action", dataset)
    return dataset or _only_name_in(Path(statistics)), found


def _has_statistics(path: Path) -> bool:
    return path.name == STATISTICS or bool(read_json(path).get("norm_stats"))


def _only_name_in(path: Path) -> str:
    """Of the one data set in a file of OpenVLA's; other files have no name for theirs."""
    path = path / STATISTICS if path.is_dir() else path
    content = read_json(path) if path.is_file() and path.suffix == ".json" else {}
    content = content.get("norm_stats", content)
    names = list(content)
    return names[0] if len(names) == 1 and "action" in content[names[0]] else "actions"


def write_checkpoint(
    model: nn.Module,
    folder: Path,
    config: OpenVLAConfig,
    statistics: tuple[str, dict[str, Any]] | None,
    words: Tokenizer | None,
    source: str | None,
) -> None:
    """Write what `openvla_config`, `action_statistics` and `load_weights` read, and the public code.

    Args:
        model: whose weights they are.
        folder: made where it is absent.
        config, words: of the model.
        statistics: of its actions; None writes those that change nothing, as who reads the folder asks for some.
        source: the folder it came from, of which the small files are copied (the tokenizer's, the public code's).
    Raises:
        UserError: the model has adapters that are not merged, or the folder is not empty.
    """
    start_export(model, folder)
    copy_small_files(source, folder)
    weights = {name: value for name, value in model.state_dict().items() if name.startswith(PARTS)}
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    write_own_heads(model, folder)
    content = {"model_type": "openvla", "architectures": ["OpenVLAForActionPrediction"], **config.content}
    content |= {"use_fused_vision_backbone": True, "torch_dtype": str(next(iter(weights.values())).dtype)[6:]}
    content["text_config"] = {"model_type": "llama", **content["text_config"]}
    name, action = statistics or ("actions", Normalisation.identity(model.action_dim).as_statistics())
    content["norm_stats"] = {**(content.get("norm_stats") or {}), name: {"action": action}}
    write_json({name: {"action": action}}, folder / STATISTICS)
    write_json(content | (BYTES if words is None else {}) | {DECODING: model.decoding}, folder / "config.json")
    if words is not None:
        words.save(str(folder / "tokenizer.json"))
