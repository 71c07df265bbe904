"""The folder of a pi0, as transformers has it: its weights into a model, and a model into such a folder.

    config.json, model.safetensors    of transformers' PI0ForConditionalGeneration
    tokenizer.json, ...               of the language model; a model of bytes has none, and config.json says so
    stats.json                        means and deviations of actions and states, as a LeRobot data set has them
    value_head.safetensors            of reinforcement learning, as noise_head.safetensors where noise is learned

transformers reads config.json and model.safetensors, and the tokenizer's files.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PI0Config, PI0ForConditionalGeneration

from agents.checkpoint_folder import BYTES, copy_small_files, start_export, write_json, write_own_heads
from agents.families import told_apart
from agents.weights import some
from research.errors import UserError, describe_error, did_you_mean

if TYPE_CHECKING:
    from agents.pi0 import Pi0VLA

STATISTICS = "stats.json"


def pi0_config(pretrained: str | None, arguments: dict | None) -> PI0Config:
    """The configuration of a pretrained folder, or of fresh weights, with some of its arguments changed."""
    if pretrained is None and not arguments:
        raise UserError(
            "Pi0VLA: set pretrained to a folder, or config to the sizes of fresh weights; see pi0_tiny.json"
        )
    known = {field.name for field in fields(PI0Config)}
    for name in arguments or {}:
        if name not in known:
            raise UserError(f"Pi0VLA: config: {name!r} is no argument of PI0Config{did_you_mean(name, known)}")
    if pretrained is not None and not (Path(pretrained) / "config.json").is_file():
        raise UserError(
            f"Pi0VLA: there is no {Path(pretrained) / 'config.json'}; pretrained is a folder with that file"
        )
    try:
        if pretrained is None:
            return PI0Config(**arguments)
        return PI0Config.from_pretrained(pretrained, local_files_only=True, **(arguments or {}))
    except Exception as error:  # whatever the library's own checks raise
        raise UserError(
            f"Pi0VLA: no configuration of pi0 in {pretrained or arguments}: {describe_error(error)}"
        ) from error


def load_hub(folder: str, config: PI0Config) -> PI0ForConditionalGeneration:
    """The model of a pretrained folder, in float32.

    Raises:
        UserError: there are no weights, one is absent or has another shape, or they are of another family; names them.
    """
    if torch.get_default_device().type == "meta":  # only its sizes are wanted, and the library refuses to load there
        return PI0ForConditionalGeneration(config)
    try:
        hub, told = PI0ForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # whatever the library's own checks raise
        raise UserError(f"Pi0VLA: no weights of pi0 in {folder}: {describe_error(error)}") from error
    if different := [f"{name} {list(found)} for {list(own)}" for name, found, own in sorted(told["mismatched_keys"])]:
        raise UserError(f"Pi0VLA: {folder} does not fit its configuration: {some(different)}")
    if missing := sorted(told["missing_keys"]):
        others = f"; what there is besides: {some(sorted(told['unexpected_keys']))}" if told["unexpected_keys"] else ""
        others += told_apart(told["unexpected_keys"], "pi0")
        raise UserError(f"Pi0VLA: {folder} lacks {some(missing)}{others}")
    return hub


def statistics_in(pretrained: str | None) -> str | None:
    """The file of statistics that `export` writes, where a pretrained folder has it."""
    path = None if pretrained is None else Path(pretrained) / STATISTICS
    return str(path) if path is not None and path.is_file() else None


def reads_bytes(config: PI0Config) -> bool:
    """Whether a folder's model reads the bytes of an instruction, and has no tokenizer."""
    return all(getattr(config, name, None) == value for name, value in BYTES.items())


def as_hub(model: Pi0VLA) -> PI0ForConditionalGeneration:
    """transformers' model around the parts of ours: the same weights, in the same memory."""
    with torch.device("meta"):  # every part that is made here is replaced
        hub = PI0ForConditionalGeneration(copy.deepcopy(model.config))
    hub.model.vlm.vision_tower, hub.model.vlm.multi_modal_projector = model.vision_tower, model.projector
    hub.model.vlm.language_model, hub.model.dit = model.language_model, model.action_expert.transformer
    hub.embed_action_time, hub.action_out_proj = model.action_expert.embedding, model.action_expert.velocity
    return hub.eval()


def export(model: Pi0VLA, folder: Path) -> None:
    """Write a model as a folder of transformers'.

    Statistics of any kind are written as means and standard deviations of the same map.

    Raises:
        UserError: it has adapters that are not merged, or the folder is not empty.
    """
    start_export(model, folder)
    for source in dict.fromkeys([model.pretrained, model.tokenizer_folder]):
        copy_small_files(source, folder)
    hub = as_hub(model)
    hub.config.num_inference_steps = len(model.flow.steps)
    for name, value in BYTES.items() if model.words is None else ():
        setattr(hub.config, name, value)
    hub.save_pretrained(folder)
    write_own_heads(model, folder)
    if model.statistics is not None:
        maps = {"action": model.actions, "observation.state": model.states}
        found = {n: {"mean": m.middle.tolist(), "std": m.scale.tolist()} for n, m in maps.items() if m.size}
        write_json(found, folder / STATISTICS)
