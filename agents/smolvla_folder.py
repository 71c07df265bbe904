"""The folder of a SmolVLA policy, as LeRobot 0.4.4 has it: its weights into a model, and a model into such a folder.

    config.json                                                     sizes, features, what the language model is called
    model.safetensors                                               weights
    policy_preprocessor.json, policy_postprocessor.json             what LeRobot does before and after the model
    policy_preprocessor_step_5_normalizer_processor.safetensors     statistics of states and actions, as for the other
    vlm/                                                            the vision-language model's configuration, tokenizer
    value_head.safetensors                                          of reinforcement learning, as noise_head.safetensors

LeRobot reads all of it but the last two. The vision-language model's sizes and tokenizer it looks up by
`vlm_model_name`; that stays what it was, and is the subfolder `vlm` where the weights started fresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from agents.checkpoint_folder import (
    BYTES,
    copy_small_files,
    fill_own_heads,
    start_export,
    write_json,
    write_own_heads,
    write_tensors,
)
from agents.families import told_apart
from agents.normalisation import POLICY_FILE, Kind, Normalisation
from agents.packaged_weights import fill_part
from agents.smolvla_sizes import OPTION, VLM_FOLDER
from agents.weights import read_weights, some
from research.errors import UserError

if TYPE_CHECKING:
    from agents.smolvla import SmolVLA

# Our names -> LeRobot's.
HUB_NAMES = {
    "vision_tower.": "model.vlm_with_expert.vlm.model.vision_model.",
    "connector.": "model.vlm_with_expert.vlm.model.connector.",
    "language_model.": "model.vlm_with_expert.vlm.model.text_model.",
    "state_proj.": "model.state_proj.",
    "action_expert.transformer.": "model.vlm_with_expert.lm_expert.",
    "action_expert.": "model.",
}
PARTS = ("vision_tower", "connector", "language_model", "state_proj", "action_expert")
LM_HEAD = "model.vlm_with_expert.vlm.lm_head.weight"  # no action depends on it
# Statistics as policies of LeRobot before 0.4 had them, among the weights.
OLD_STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
# LeRobot's names of the kinds of normalisation.
KINDS: dict[str, Kind] = {"MEAN_STD": "mean_std", "MIN_MAX": "min_max", "QUANTILES": "quantiles"}


def hub_name(name: str) -> str:
    """What LeRobot calls one of this model's weights."""
    prefix = next(prefix for prefix in HUB_NAMES if name.startswith(prefix))
    return HUB_NAMES[prefix] + name.removeprefix(prefix)


def statistics_in(folder: str, written: Mapping[str, Any], kind: Kind) -> str | None:
    """The policy's folder, where it has statistics that `read_statistics` finds.

    Raises:
        UserError: the policy was trained with another kind of normalisation.
    """
    if not any(Path(folder).glob(POLICY_FILE)):
        return None
    for feature in ("STATE", "ACTION"):
        mode = written.get("normalization_mapping", {}).get(feature, "MEAN_STD")
        if KINDS.get(mode) != kind:
            remedy = f"set it to {KINDS[mode]}" if mode in KINDS else "set statistics to a file of your data"
            raise UserError(f"{OPTION}.normalisation: {folder} has {mode} for {feature}, not {kind}; {remedy}")
    return folder


def load(model: SmolVLA, folder: Path) -> None:
    """Fill the model's parts with the weights of a folder, and its value head where the folder has one.

    Raises:
        UserError: there are no weights, some are absent, of another shape or of another family, or have no place here.
    """
    option = f"{OPTION}.pretrained"
    weights = {name: value for shard in read_weights(folder) for name, value in shard.items()}
    if any(name.startswith(OLD_STATISTICS) for name in weights) and not any(folder.glob(POLICY_FILE)):
        raise UserError(
            f"{option}: {folder} has its statistics among the weights, as LeRobot before 0.4 wrote them; bring it to "
            "the new layout with LeRobot's migrate_policy_normalization"
        )
    weights = {name: value for name, value in weights.items() if not name.startswith((*OLD_STATISTICS, LM_HEAD))}
    told = told_apart(weights, "SmolVLA")
    for part in PARTS:
        own = getattr(model, part).state_dict()
        found = {name: weights.pop(hub_name(f"{part}.{name}"), None) for name in own}
        fill_part(getattr(model, part), found, folder, option, told)
    if weights:
        raise UserError(f"{option}: {folder} has weights that have no place here: {some(sorted(weights))}")
    fill_own_heads(model, folder, option)


def export(model: SmolVLA, folder: Path) -> None:
    """Write a model as a policy of LeRobot's.

    The language model's head, which LeRobot has and no action depends on, is that of `pretrained`; of fresh weights the
    embeddings. Statistics of any kind are written as means and standard deviations of the same map.

    Raises:
        UserError: it has adapters that are not merged, or the folder is not empty.
    """
    start_export(model, folder)
    weights = {
        hub_name(name): weight
        for name, weight in model.state_dict().items()
        if name.startswith(tuple(f"{part}." for part in PARTS))
    }
    weights[LM_HEAD] = _language_head(model)
    write_tensors(weights, folder / "model.safetensors")
    write_own_heads(model, folder)
    _write_vlm(model, folder / VLM_FOLDER)
    config = _config(model, folder)
    write_json(config, folder / "config.json")
    _write_processors(model, config, folder)


def _language_head(model: SmolVLA) -> Tensor:
    if model.pretrained is not None:
        for file in sorted(Path(model.pretrained).glob("*.safetensors")):
            with safe_open(file, "pt") as content:
                if LM_HEAD in content.keys():
                    return content.get_tensor(LM_HEAD)
    return model.language_model.embed_tokens.weight.detach().cpu().clone()


def _write_vlm(model: SmolVLA, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for source in filter(None, dict.fromkeys([model.vlm_folder, model.tokenizer_folder])):
        copy_small_files(source, folder)
    config = {name: value for name, value in model.vlm_config.to_dict().items() if name not in BYTES}
    write_json(config | (BYTES if model.words is None else {}), folder / "config.json")


def _config(model: SmolVLA, folder: Path) -> dict[str, Any]:
    """LeRobot's config.json: what was read, and what this model is."""
    written, sizes = model.written, asdict(model.sizes)
    cameras = [(n, f) for n, f in written.get("input_features", {}).items() if f.get("type") == "VISUAL"]
    cameras = dict(cameras[: len(model.images)])
    if len(cameras) < len(model.images):
        width, height = model.sizes.resize_imgs_with_padding or (model.vlm_config.vision_config.image_size,) * 2
        cameras = {f"observation.images.{n}": {"type": "VISUAL", "shape": [3, height, width]} for n in model.images}
    name = written.get("vlm_model_name", "")
    if len(Path(name).parts) != 2 or Path(name).is_dir():  # no <owner>/<name> on the hub
        name = str((folder / VLM_FOLDER).resolve())
    return {
        "type": "smolvla",
        "load_vlm_weights": False,
        **written,
        **sizes,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        "vlm_model_name": name,
        "n_action_steps": model.executed,
        "num_steps": len(model.flow.steps),
        "input_features": {"observation.state": {"type": "STATE", "shape": [max(model.states.size, 1)]}, **cameras},
        "output_features": {"action": {"type": "ACTION", "shape": [model.action_dim]}},
    }


def _write_processors(model: SmolVLA, config: dict[str, Any], folder: Path) -> None:
    features, device = {**config["input_features"], **config["output_features"]}, {"device": "cpu", "float_dtype": None}
    tokens = {
        "max_length": config["tokenizer_max_length"],
        "task_key": "task",
        "padding_side": "right",
        "padding": "longest",
        "truncation": True,
        "tokenizer_name": config["vlm_model_name"],
    }
    statistics = _statistics("observation.state", model.states) | _statistics("action", model.actions)
    normal = {"eps": 1e-8, "norm_map": config["normalization_mapping"]}
    steps = {
        "policy_preprocessor": [
            ("rename_observations_processor", {"rename_map": {}}),
            ("to_batch_processor", {}),
            ("smolvla_new_line_processor", {}),
            ("tokenizer_processor", tokens),
            ("device_processor", device),
            ("normalizer_processor", {**normal, "features": features}),
        ],
        "policy_postprocessor": [
            ("unnormalizer_processor", {**normal, "features": config["output_features"]}),
            ("device_processor", device),
        ],
    }
    for name, chain in steps.items():
        written = []
        for number, (kind, options) in enumerate(chain):
            step = {"registry_name": kind, "config": options}
            if kind.endswith("normalizer_processor"):
                step["state_file"] = f"{name}_step_{number}_{kind}.safetensors"
                write_tensors(statistics, folder / step["state_file"])
            written.append(step)
        write_json({"name": name, "steps": written}, folder / f"{name}.json")


def _statistics(quantity: str, normalisation: Normalisation) -> dict[str, Tensor]:
    """Means and standard deviations that make the same map; a state that is not read is one zero."""
    middle, scale = normalisation.middle.cpu(), normalisation.scale.cpu()
    if not normalisation.size:
        middle, scale = torch.zeros(1), torch.ones(1)
    return {f"{quantity}.mean": middle, f"{quantity}.std": scale}
