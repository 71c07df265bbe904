"""SmolVLA's configuration: LeRobot's `config.json` and that of the vision-language model which it names."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import SmolVLMConfig

from agents.weights import read_json
from research.errors import UserError, describe_error, did_you_mean

OPTION = "policy.vla_config.model_config"
VLM_FOLDER = "vlm"  # where an exported policy has the vision-language model's config.json and tokenizer


@dataclass(frozen=True)
class SmolVLASizes:
    """What of LeRobot's SmolVLAConfig the computation depends on, with its names and defaults (LeRobot 0.4.4)."""

    chunk_size: int = 50
    max_state_dim: int = 32
    max_action_dim: int = 32
    resize_imgs_with_padding: tuple[int, int] | None = (512, 512)
    """Width and height that the vision tower gets; None: as the pictures are."""
    tokenizer_max_length: int = 48
    attention_mode: str = "cross_attn"
    num_vlm_layers: int = 16
    """How many of the language model's layers are used, from the first on; 0 or less: all."""
    self_attn_every_n_layers: int = 2
    """Every how many layers the expert attends to its own keys, too; 0 or less: never, in the mode "cross_attn"."""
    expert_width_multiplier: float = 0.75
    min_period: float = 4e-3
    max_period: float = 4.0

    def self_attention(self, layer: int) -> bool:
        """Whether a layer of the expert also attends to the actions."""
        if "cross" not in self.attention_mode:
            return True
        return self.self_attn_every_n_layers > 0 and layer % self.self_attn_every_n_layers == 0


# Options of LeRobot's that mean another computation, each with the values that mean none.
OTHER_COMPUTATIONS = {"add_image_special_tokens": (False,), "adapt_to_pi_aloha": (False,), "rtc_config": (None,)}


def read_sizes(pretrained: str | None, arguments: dict | None) -> tuple[SmolVLASizes, dict[str, Any]]:
    """The sizes of a policy's folder, or of fresh weights, with some of them changed; and all that config.json says.

    Raises:
        UserError: no such file, one of another kind of policy, or of one that computes something else.
    """
    if pretrained is None and not arguments:
        raise UserError(
            f"{OPTION}: set pretrained to a folder, or config to the sizes of fresh weights; see smolvla_tiny.json"
        )
    written = {} if pretrained is None else _read_policy(Path(pretrained))
    known = {field.name for field in fields(SmolVLASizes)}
    for name in arguments or {}:
        if name not in known:
            raise UserError(f"{OPTION}.config: {name!r} is no size of SmolVLA{did_you_mean(name, known)}")
    found = {**{name: value for name, value in written.items() if name in known}, **(arguments or {})}
    if isinstance(found.get("resize_imgs_with_padding"), list):
        found["resize_imgs_with_padding"] = tuple(found["resize_imgs_with_padding"])
    sizes = replace(SmolVLASizes(), **found)
    _check(sizes)
    return sizes, written


def _read_policy(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{OPTION}.pretrained: there is no {path}; name a folder that LeRobot or export wrote")
    written = read_json(path)
    written = written if isinstance(written, dict) else {}
    kind = written.get("type", written.get("model_type", "smolvla" if "chunk_size" in written else "something else"))
    if kind != "smolvla":
        raise UserError(f"{OPTION}.pretrained: {path} is of {kind}, not of LeRobot's smolvla")
    for name, usual in OTHER_COMPUTATIONS.items():
        if written.get(name, usual[0]) not in usual:
            raise UserError(f"{OPTION}.pretrained: {path}: {name} is {written[name]!r}, which is not computed here")
    experts, layers = written.get("num_expert_layers", -1), written.get("num_vlm_layers", 16)
    if experts > 0 and experts != layers:
        raise UserError(
            f"{OPTION}.pretrained: {path}: num_expert_layers is {experts}; an expert with fewer layers than the "
            f"{layers} of its language model is not computed here"
        )
    return written


def _check(sizes: SmolVLASizes) -> None:
    least = {"chunk_size": 1, "max_state_dim": 1, "max_action_dim": 1, "tokenizer_max_length": 1}
    for name in (*least, "num_vlm_layers", "self_attn_every_n_layers"):
        value = getattr(sizes, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least.get(name, value):
            wanted = "a whole number" + (f", at least {least[name]}" if name in least else "")
            raise UserError(f"{OPTION}.config: {name} should be {wanted}, got {value!r}")
    for name in ("expert_width_multiplier", "min_period", "max_period"):
        value = getattr(sizes, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{OPTION}.config: {name} should be a number above 0, got {value!r}")
    if sizes.attention_mode not in ("cross_attn", "self_attn"):
        raise UserError(f"{OPTION}.config: attention_mode is cross_attn or self_attn, got {sizes.attention_mode!r}")
    size = sizes.resize_imgs_with_padding
    if size is not None and not (
        isinstance(size, tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    ):
        raise UserError(f"{OPTION}.config: resize_imgs_with_padding should be [width, height] or null, got {size!r}")


def vlm_folder(pretrained: str | None, vlm: str | dict | None, written: dict[str, Any]) -> Path | None:
    """The local folder with the vision-language model's config.json; None: `vlm` itself has its sizes.

    Raises:
        UserError: there is none.
    """
    if isinstance(vlm, dict):
        return None
    own = Path(pretrained) / VLM_FOLDER if pretrained is not None else None
    named = written.get("vlm_model_name")
    found = [vlm] if vlm else [own, named]
    for folder in found:
        if folder is not None and (Path(folder) / "config.json").is_file():
            return Path(folder)
    if vlm:
        raise UserError(f"{OPTION}.vlm: there is no {Path(vlm) / 'config.json'}")
    what = f"{pretrained} names the vision-language model {named!r}" if named else "fresh weights have no sizes"
    raise UserError(
        f"{OPTION}.vlm: {what}; set it to a local folder with that model's config.json and tokenizer.json"
        + ("" if named else ", or to its sizes")
    )


def read_vlm(folder: Path | None, vlm: str | dict | None) -> SmolVLMConfig:
    """The vision-language model's configuration, of `vlm_folder` or, without one, of the sizes in `vlm`.

    Raises:
        UserError: the library refuses it, or the language model has no Llama layers.
    """
    shown = folder or vlm
    if folder is None:
        known = {field.name for field in fields(SmolVLMConfig)}
        for name in vlm:
            if name not in known:
                raise UserError(f"{OPTION}.vlm: {name!r} is no argument of SmolVLMConfig{did_you_mean(name, known)}")
    try:
        config = SmolVLMConfig.from_pretrained(folder, local_files_only=True) if folder else SmolVLMConfig(**vlm)
    except Exception as error:  # whatever the library's own checks raise
        raise UserError(f"{OPTION}.vlm: no configuration of SmolVLM in {shown}: {describe_error(error)}") from error
    kind = config.text_config.model_type
    if kind != "llama":
        raise UserError(f"{OPTION}.vlm: {shown}: the language model is of the kind {kind!r}, where SmolVLA's is llama")
    return config
