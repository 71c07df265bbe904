"""What GPTVLAModel is made of: a vision encoder, a tokenizer, a language model, with weights from local files.

No hub is asked for anything: names stand for sizes, and weights are files or directories.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModel,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from agents.fitting import refuse_other_kinds
from agents.gradient_checkpointing import checkpoint_layers
from agents.weights import read_weights
from research.errors import UserError, describe_error, did_you_mean
from research.schema import decode_text

RESNETS = {
    "resnet18": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    "resnet34": {"layer_type": "basic", "depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 256, 512]},
    "resnet50": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
    "resnet101": {"layer_type": "bottleneck", "depths": [3, 4, 23, 3], "hidden_sizes": [256, 512, 1024, 2048]},
}
LANGUAGE_MODELS = {
    "distilgpt2": {"n_embd": 768, "n_layer": 6, "n_head": 12},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NO_TOKEN = -1


def causal_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options):
    """transformers' `sdpa`, always causal and without a mask.

    Told so, PyTorch takes its flash kernel, which it does not for a mask that amounts to the same. And a language model
    whose attention needs no mask does not look at the data to find out which one it needs, which would stop a GPU at
    every pass.
    """
    return sdpa_attention_forward(module, query, key, value, None, **{**options, "is_causal": True})


AttentionInterface.register("causal_sdpa", causal_attention)


# ------------------------------------------------------------------------------------------------------- the parts


class VisionEncoder(nn.Module):
    """Images to tokens: rgb uint8 `[B, H, W, 3]` or `[B, 3, H, W]` -> `[B, T, C]`, row by row of the feature map; of
    several cameras one after the other, `[B, cameras * T, C]`.

    Args:
        spec: see `vision_encoder` of `GPTVLAModel`.
        weights: local file or directory, or None.
        tokens: T, a square number; None for one token per cell of the feature map.
    """

    def __init__(self, spec: str | dict, weights: str | None, tokens: int | None):
        super().__init__()
        self.side = None if tokens is None else math.isqrt(max(0, tokens))
        if tokens is not None and (tokens < 1 or self.side**2 != tokens):
            raise UserError(f"GPTVLAModel: vision_tokens should be a square number (1, 4, 9, 16, ...), got {tokens}")
        if isinstance(spec, str) and spec.startswith("timm:"):
            self.network = _timm_model(spec, weights)
            self.channels = self.network.feature_info[-1]["num_chs"]
            mean, std = self.network.pretrained_cfg["mean"], self.network.pretrained_cfg["std"]
        else:
            self.network = _resnet(spec, weights)
            self.channels = self.network.config.hidden_sizes[-1]
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        mean, std = 255 * torch.tensor(mean).view(3, 1, 1), 255 * torch.tensor(std).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, *rgb: Tensor) -> Tensor:
        return torch.cat([self._tokens(image) for image in rgb], dim=1) if len(rgb) > 1 else self._tokens(rgb[0])

    def _tokens(self, rgb: Tensor) -> Tensor:
        pixels = rgb.permute(0, 3, 1, 2) if rgb.shape[-1] == 3 else rgb  # [B, 3, H, W]
        pixels = (pixels - self.mean) / self.std
        if isinstance(self.network, ResNetModel):
            maps = self.network(pixels).last_hidden_state  # [B, C, h, w]
        else:
            maps = self.network.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)[-1]
        if self.side is not None:
            maps = F.adaptive_avg_pool2d(maps, self.side)
        return maps.flatten(2).transpose(1, 2)

    def checkpoint_gradients(self) -> None:
        """Keep the inputs of the network's blocks only until the backward pass."""
        if isinstance(self.network, ResNetModel):
            checkpoint_layers(_resnet_blocks(self.network))
        else:
            self.network.set_grad_checkpointing()


class InstructionTokenizer(nn.Module):
    """Instructions int64 `[B, L]` (UTF-8 bytes) -> token ids `[B, length]`, -1 behind the last; each encoded once.

    Args:
        directory: holds a `tokenizer.json`.
        length: most tokens of an instruction.
        vocabulary: token ids that the language model knows.
    """

    CAPACITY = 65536  # distinct instructions kept

    def __init__(self, directory: str, length: int, vocabulary: int):
        super().__init__()
        path = _existing(directory, "tokenizer") / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"GPTVLAModel: tokenizer: {path} does not exist; write it with "
                "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            self.words = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"GPTVLAModel: tokenizer: {path} cannot be read: {describe_error(error)}") from error
        largest = max(self.words.get_vocab().values(), default=0)
        if largest == 0:
            raise UserError(f"GPTVLAModel: tokenizer: {path} has no vocabulary")
        if largest >= vocabulary:
            raise UserError(
                f"GPTVLAModel: tokenizer: {path} has ids up to {largest}, but language_model knows {vocabulary} tokens"
            )
        self.words.no_padding()
        self.words.no_truncation()
        self.length, self._known = length, {}

    @torch.compiler.disable  # text, not tensors
    def forward(self, language: Tensor) -> Tensor:
        rows = []
        for text in decode_text(language):
            if text not in self._known:
                if len(self._known) >= self.CAPACITY:
                    self._known.clear()
                self._known[text] = self._encode(text)
            rows.append(self._known[text])
        return torch.stack(rows).to(language.device)

    def _encode(self, text: str) -> Tensor:
        ids = self.words.encode(text, add_special_tokens=False).ids
        if len(ids) > self.length:
            raise UserError(
                f"GPTVLAModel: the instruction {text!r} has {len(ids)} tokens, more than the {self.length} of "
                "policy.vla_config.model_config.language_tokens"
            )
        return torch.tensor(ids + [NO_TOKEN] * (self.length - len(ids)))


# --------------------------------------------------------------------------------------- building and loading them


def _resnet(spec: str | dict, weights: str | None) -> ResNetModel:
    if isinstance(spec, str) and spec not in RESNETS:
        raise UserError(_unknown("vision_encoder", spec, RESNETS, "timm:<name> or a dict of ResNetConfig arguments"))
    config = _config(ResNetConfig, RESNETS[spec] if isinstance(spec, str) else spec, "vision_encoder")
    if weights is not None:
        return _load(ResNetModel, config, weights, "vision_weights")
    resnet = ResNetModel(config)
    # In eval mode a fresh batch-norm normalises nothing, and every block adds to what all images have in common: fresh
    # features of resnet101 measure 342 (root mean square), 8 % of it different from image to image. Blocks that start
    # as the identity, as is usual (and timm's default), leave 0.06 and 39 %.
    for block in _resnet_blocks(resnet):
        nn.init.zeros_(block.layer[-1].normalization.weight)
    return resnet


def _resnet_blocks(resnet: ResNetModel) -> list[nn.Module]:
    return [block for stage in resnet.encoder.stages for block in stage.layers]


def _timm_model(spec: str, weights: str | None) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise UserError(
            f"GPTVLAModel: vision_encoder {spec!r} needs timm, which cannot be imported ({describe_error(error)}); "
            "pip install -e .[timm], with a torchvision of the same build (CPU or CUDA) as torch"
        ) from error
    name = spec.removeprefix("timm:")
    if not timm.is_model(name):
        raise UserError(_unknown("vision_encoder", spec, [f"timm:{known}" for known in timm.list_models()], limit=0))
    model = timm.create_model(name, pretrained=False, num_classes=0)
    if weights is not None:
        path = _existing(weights, "vision_weights")
        try:
            state = _read(path)
            missing = model.load_state_dict(state, strict=False).missing_keys
        except Exception as error:  # a damaged file stops with nearly any exception
            raise UserError(f"GPTVLAModel: vision_weights: {path} cannot be loaded: {describe_error(error)}") from error
        _refuse_missing(missing, path, name, "vision_weights")
        _refuse_other_numbers(model, state, path)
    return model


def build_language_model(spec: str | dict, weights: str | None) -> PreTrainedModel:
    """The causal language model of a name, sizes or a directory; see `GPTVLAModel`.

    Args:
        spec: its `language_model`.
        weights: local file or directory, or None for fresh weights.
    Raises:
        UserError: an unknown name or argument; a directory or weights that are absent, damaged or do not fit.
    """
    if isinstance(spec, dict) or spec in LANGUAGE_MODELS:
        arguments = spec if isinstance(spec, dict) else LANGUAGE_MODELS[spec]
        # GPT-2's own ids of the beginning and the end lie outside a smaller vocabulary, and nothing is generated here.
        config = _config(GPT2Config, {"bos_token_id": None, "eos_token_id": None, **arguments}, "language_model")
    elif (path := Path(spec).expanduser() / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever the library's own checks raise
            raise UserError(f"GPTVLAModel: language_model: {path} cannot be read: {describe_error(error)}") from error
    else:
        others = "a local directory with a config.json or a dict of GPT2Config arguments"
        raise UserError(_unknown("language_model", spec, LANGUAGE_MODELS, others))
    for name in list(vars(config)):
        if name.endswith(("pdrop", "dropout")):
            setattr(config, name, 0.0)
    options = {"attn_implementation": "causal_sdpa", "dtype": torch.float32}
    if weights is None:
        return AutoModel.from_config(config, **options)
    return _load(MODEL_MAPPING[type(config)], config, weights, "language_weights", **options)


def weights_beside(language_model: str | dict) -> str | None:
    """The directory given as the language model, if it holds weights too."""
    if isinstance(language_model, dict) or language_model in LANGUAGE_MODELS:
        return None
    directory = Path(language_model).expanduser()
    holds = directory.is_dir() and any(file.suffix in (".safetensors", ".bin") for file in directory.iterdir())
    return language_model if holds else None


def _config(cls: type[PreTrainedConfig], arguments: dict, setting: str) -> PreTrainedConfig:
    """`cls(**arguments)`, which by itself would take any name."""
    known = {*(field.name for field in fields(cls)), *cls.attribute_map}
    for name in arguments:
        if name not in known:
            raise UserError(_unknown(setting, name, known, limit=0))
    try:
        return cls(**arguments)
    except Exception as error:  # whatever the library's own checks raise
        raise UserError(
            f"GPTVLAModel: {setting}: {cls.__name__} refuses {arguments}: {describe_error(error)}"
        ) from error


def _load(
    cls: type[PreTrainedModel], config: PreTrainedConfig, weights: str, setting: str, **options
) -> PreTrainedModel:
    """A model with the weights of a local file or directory, in which all of its weights must be."""
    path = _existing(weights, setting)
    try:
        state = _read(path)
        model, report = cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # a damaged file stops with nearly any exception
        raise UserError(f"GPTVLAModel: {setting}: {path} cannot be loaded: {describe_error(error)}") from error
    for name, got, expected in sorted(report["mismatched_keys"]):
        raise UserError(
            f"GPTVLAModel: {setting}: {path} does not fit {cls.__name__}: {name} should be {list(expected)}, "
            f"got {list(got)}"
        )
    _refuse_missing(sorted(report["missing_keys"]), path, cls.__name__, setting)
    _refuse_other_numbers(model, state, path)
    return model


def _refuse_missing(missing: Sequence[str], path: Path, name: str, setting: str) -> None:
    if missing:
        some = ", ".join(missing[:3]) + ", …" * (len(missing) > 3)
        raise UserError(f"GPTVLAModel: {setting}: {path} lacks {len(missing)} of the weights of {name}: {some}")


def _read(path: Path) -> dict[str, Tensor]:
    return {name: value for shard in read_weights(path) for name, value in shard.items()}


def _refuse_other_numbers(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Refuse what was cast to the model's floats without a word, and what is no number."""
    prefix = getattr(model, "base_model_prefix", "")
    own = {name: state[n] for name in model.state_dict() for n in (name, f"{prefix}.{name}") if n in state}
    refuse_other_kinds(model, own, path)
    for name, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} holds a NaN or an infinity: it was saved after something broke")


def _existing(path: str, setting: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"GPTVLAModel: {setting}: {path} does not exist (current directory: {Path.cwd()})")
    return found


def _unknown(setting: str, name: str, known: Iterable[str], others: str = "", limit: int | None = None) -> str:
    """The message for a name that is not known: the nearest one, and the first `limit` of those there are."""
    known = list(known)
    choices = ", ".join([*known[:limit], *[others] * bool(others)])
    return (
        f"GPTVLAModel: {setting}: {name!r} is not known{did_you_mean(name, known)}"
        + f"; there are {choices}" * bool(choices)
    )
