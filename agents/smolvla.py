"""SmolVLA (Shukor et al. 2025, arXiv:2506.01844): a small vision-language model, an expert that denoises its actions.

    rgb, rgb_<camera> ── vision_tower ─ patches ── connector ─ picture_tokens ─┐
    language ── tokens ────────────────────────────────────────────────────────┴─ language_model ─┬─ prefix_kv
                                                                                                  └─ prefix_mean
    proprio ── state_proj ── language_model, after prefix_kv ─┬─ state_kv
                                                              └─ prefix_hidden (with prefix_mean) ── value_head
    noise, time ── action_expert, over prefix_kv and state_kv ── velocity

The weights are those of LeRobot's SmolVLA under other names (`HUB_NAMES`), and so are the actions. Pictures and words
see each other; the state, one token behind them, sees all of them and is seen by the actions alone. What the language
model keeps of pictures and words does therefore not depend on the state: with it frozen, that is kept once per
transition even while `state_proj` trains, and the state's token alone runs again; with `state_proj` frozen as well, its
keys and values are kept, too. With the vision tower alone frozen, its patches are kept; with the connector, what the
language model reads of them, a small part of that.

How actions are drawn: `agents/flow.py`. The language model's head is of no use here, and not loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

from agents import smolvla_folder
from agents.checkpoint_folder import BYTES
from agents.flow import Velocity
from agents.flow_vla import PREFIX_HIDDEN, READS, STEPS, FlowVLA, Noise
from agents.gradient_checkpointing import checkpoint_layers
from agents.normalisation import Kind
from agents.prompts import behind_pictures, mean_of_seen, prompt_tokens
from agents.sentence_encoder import read_tokenizer
from agents.smolvla_sizes import read_sizes, read_vlm, vlm_folder
from agents.smolvlm_expert import ActionExpert, LanguagePass, language_layers
from research.schema import LANGUAGE, OBSERVATION, PROPRIO

PATCHES, PICTURE_TOKENS = "patches", "picture_tokens"
PREFIX_KV, PREFIX_SEEN, PREFIX_MEAN, STATE_KV = "prefix_kv", "prefix_seen", "prefix_mean", "state_kv"


class SmolVLA(FlowVLA):
    """See the module's docstring.

    Args:
        action_dim: A, numbers of an action that the environment takes; the model's further ones are not executed.
        modalities: which observations to read, further cameras (`rgb_wrist`, ...) among them, in the order that the
            policy has them.
        proprio_dim: P of `proprio` `[B, P]`, padded with zeros to the model's.
        pretrained: a local folder as LeRobot or `export` writes it; None: fresh weights.
        config: sizes by LeRobot's names, over those of `pretrained`; see `agents.smolvla_sizes.SmolVLASizes`.
        vlm: of the vision-language model, a local folder with `config.json` and `tokenizer.json`, or arguments of a
            `transformers.SmolVLMConfig`; None: what `pretrained` has or names.
        tokenizer: a local folder with `tokenizer.json`; None: that of `vlm`, or bytes where `vlm` is sizes.
        executed: control steps that are executed, of the `chunk_size` that the model denoises.
        steps: K, denoising steps; None: as many as `pretrained` says, 4 for fresh weights.
        noise: a of `FlowSDE`, or two bounds of deviations, as [0.08, 0.16], for `FlowNoise`.
        statistics: file with the statistics of the data, see `agents.normalisation.read_statistics`; None: those of
            `pretrained`; without any, actions and states are used as they are.
        dataset: whose statistics, where the file has several.
        normalisation: "mean_std", "quantiles" or "min_max".
        gradient_checkpointing: compute the layers' activations again in the backward pass instead of keeping them.

    Raises:
        UserError: what `pretrained`, `vlm`, `tokenizer` or `statistics` name is absent or does not fit.
    """

    context_keys = (PREFIX_KV, PREFIX_SEEN, STATE_KV, PREFIX_HIDDEN)
    heads = ("state_proj", "action_expert", "value_head")
    # Attention and feed-forward layers of the language model. LeRobot's default adapts the expert, which trains in full
    # here, as in pi0. Without adapters before them, the pictures' tokens are computed once per transition.
    lora_targets = ("language_model.layers",)

    def __init__(
        self,
        action_dim: int,
        modalities: Sequence[str] = READS,
        proprio_dim: int = 0,
        pretrained: str | None = None,
        config: dict | None = None,
        vlm: str | dict | None = None,
        tokenizer: str | None = None,
        executed: int = 1,
        steps: int | None = None,
        noise: Noise = 0.5,
        statistics: str | None = None,
        dataset: str | None = None,
        normalisation: Kind = "mean_std",
        gradient_checkpointing: bool = False,
    ):
        sizes, written = read_sizes(pretrained, config)
        if statistics is None and pretrained is not None:
            statistics = smolvla_folder.statistics_in(pretrained, written, normalisation)
        steps = steps or written.get("num_steps", STEPS)
        folder_of_vlm = vlm_folder(pretrained, vlm, written)
        vlm_config = read_vlm(folder_of_vlm, vlm)
        text = vlm_config.text_config
        super().__init__(
            modalities, sizes.chunk_size, sizes.max_action_dim, sizes.max_state_dim, 2 * text.hidden_size, action_dim,
            proprio_dim, executed, steps, noise, statistics, dataset, normalisation,
        )  # fmt: skip
        self.sizes, self.written, self.pretrained = sizes, written, pretrained
        self.vlm_folder, self.vlm_config = folder_of_vlm, vlm_config
        self.vision_tower = SmolVLMVisionTransformer(self.vlm_config.vision_config)
        self.connector = SmolVLMConnector(self.vlm_config)
        self.language_model = language_layers(text, sizes.num_vlm_layers)
        self.state_proj = nn.Linear(self.state_room, text.hidden_size)
        self.action_expert = ActionExpert(
            self.language_model.config, sizes.expert_width_multiplier, sizes.self_attention, self.room,
            (sizes.min_period, sizes.max_period), gradient_checkpointing,
        )  # fmt: skip
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            checkpoint_layers(self.vision_tower.encoder.layers)
        as_bytes = self.vlm_folder is None or all(getattr(self.vlm_config, k, None) == v for k, v in BYTES.items())
        folder = tokenizer or (None if as_bytes else self.vlm_folder)
        self.words = read_tokenizer(Path(folder), text.vocab_size, "SmolVLA: tokenizer") if folder else None
        self.tokenizer_folder = folder
        if pretrained is not None:
            smolvla_folder.load(self, Path(pretrained))

    # ---------------------------------------------------------------------------------------------------- the contract

    def stages(self) -> list[TensorDictModule]:
        """What the tower sees, in tokens; what the language model makes of them and the words; and of the state."""
        pictures = [(OBSERVATION, image) for image in self.images]
        language = [(OBSERVATION, LANGUAGE)] if self.reads_language else []
        proprio = [(OBSERVATION, PROPRIO)] if self.reads_proprio else []
        prefix = [PREFIX_KV, PREFIX_SEEN, PREFIX_MEAN]
        return [
            TensorDictModule(Patches(self), in_keys=pictures, out_keys=[PATCHES]),
            TensorDictModule(PictureTokens(self), in_keys=[PATCHES], out_keys=[PICTURE_TOKENS]),
            TensorDictModule(Prefix(self), in_keys=[PICTURE_TOKENS, *language], out_keys=prefix),
            TensorDictModule(StateToken(self), in_keys=[*prefix, *proprio], out_keys=[STATE_KV, PREFIX_HIDDEN]),
        ]

    def velocity(self, step: TensorDictBase) -> Velocity:
        kv = torch.cat([step.get(PREFIX_KV), step.get(STATE_KV)], dim=-2)
        seen = F.pad(step.get(PREFIX_SEEN), (0, 1), value=True)
        return lambda x, time: self.action_expert(x, time, kv, seen)

    def export(self, folder: Path) -> None:
        """Write a folder that LeRobot's loader reads, and `pretrained`; see `agents/smolvla_folder.py`."""
        smolvla_folder.export(self, Path(folder))


class Patches(nn.Module):
    """Pictures uint8 `[B, H, W, 3]`, one per camera -> what the vision tower makes of them, `[B, cameras, N, D']`."""

    def __init__(self, model: SmolVLA):
        super().__init__()
        self.vision_tower, self.size = model.vision_tower, model.sizes.resize_imgs_with_padding

    def forward(self, *pictures: Tensor) -> Tensor:
        return torch.stack([self._patches(picture) for picture in pictures], dim=1)

    def _patches(self, picture: Tensor) -> Tensor:
        pixels = picture.movedim(-1, 1).float() / 255
        if self.size is not None:
            pixels = resize_with_pad(pixels, *self.size)
        return self.vision_tower(pixel_values=pixels * 2 - 1).last_hidden_state


class PictureTokens(nn.Module):
    """Patches `[B, cameras, N, D']` -> tokens of the language model `[B, cameras n, D]`."""

    def __init__(self, model: SmolVLA):
        super().__init__()
        self.connector = model.connector

    def forward(self, patches: Tensor) -> Tensor:
        return self.connector(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]).flatten(1, 2)


class Prefix(nn.Module):
    """Picture tokens `[B, n, D]` and the instruction -> what the language model's layers keep of them.

    Returns:
        keys and values `[B, layers, 2, heads, S, d]`; which of the S tokens are no padding, bool `[B, S]`; and the mean
        of the last states of those, `[B, D]`.
    """

    def __init__(self, model: SmolVLA):
        super().__init__()
        self.run = LanguagePass(model.language_model, model.gradient_checkpointing)
        self.words, self.longest = model.words, model.sizes.tokenizer_max_length

    def forward(self, picture_tokens: Tensor, language: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        rows, device = len(picture_tokens), picture_tokens.device
        ids, is_token = prompt_tokens(self.words, language, rows, device, self.longest)
        words = self.run.model.embed_tokens(ids)
        tokens, seen = behind_pictures(picture_tokens, words, is_token)
        states, kv = self.run(
            tokens * tokens.shape[-1] ** 0.5,
            positions=seen.cumsum(dim=1) - 1,
            visible=seen[:, None].expand(-1, seen.shape[1], -1),
        )
        return kv, seen, mean_of_seen(states, seen)


class StateToken(nn.Module):
    """The state `[B, P]` as a token behind the prefix; without proprioception, a state of zeros.

    Returns:
        its keys and values `[B, layers, 2, heads, 1, d]`; the prefix's mean beside its last state, `[B, 2 D]`.
    """

    def __init__(self, model: SmolVLA):
        super().__init__()
        self.run = LanguagePass(model.language_model, model.gradient_checkpointing)
        self.state_proj, self.room, self.padded = model.state_proj, model.state_room, model.padded_state

    def forward(self, kv: Tensor, seen: Tensor, mean: Tensor, proprio: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = mean.new_zeros(len(mean), self.room, dtype=torch.float32) if proprio is None else self.padded(proprio)
        states, state_kv = self.run(
            self.state_proj(state)[:, None],
            positions=seen.sum(dim=1, keepdim=True),
            visible=F.pad(seen, (0, 1), value=True)[:, None],
            before=kv,
        )
        return state_kv, torch.cat([mean, states[:, 0]], dim=-1)


def resize_with_pad(pixels: Tensor, width: int, height: int) -> Tensor:
    """Pictures `[B, 3, h, w]` in the largest size of their shape that fits, black to the left and above of it."""
    ratio = max(pixels.shape[-1] / width, pixels.shape[-2] / height)
    size = (int(pixels.shape[-2] / ratio), int(pixels.shape[-1] / ratio))
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
    return F.pad(pixels, (width - size[1], 0, height - size[0], 0))
