"""pi0 (Black et al. 2024, arXiv:2410.24164): a vision-language model, and an expert that denoises a chunk of actions.

    rgb, rgb_<camera> ── vision_tower ─ patches [B, N, D'] ── projector ─┐
    language ── tokens ──────────────────────────────────────────────────┴─ language_model ─┬─ prefix_kv ─────┐
                                                                                            └─ prefix_hidden ─┼─┐
    proprio, noise, time ── action_expert ────────────────────────────────────────── velocity ────────────────┘ │
                                                                                     value_head ────────────────┘

The modules are those of transformers' PI0, and so are the names of a checkpoint's weights (`HUB_NAMES`). All tokens of
the prefix see each other; the state sees the prefix; the noised actions see both and each other. The keys and values of
the prefix are computed once per observation: with the vision-language model frozen, once per transition.

How actions are drawn, and what their log-probability is: `agents/flow.py`. Actions and states are in the units of the
data that the checkpoint was trained on (`statistics`); what goes to the environment is brought back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from transformers import DynamicCache, PI0Config, PI0ForConditionalGeneration

from agents.families import told_apart
from agents.flow import Velocity
from agents.flow_vla import PREFIX_HIDDEN, READS, FlowVLA
from agents.normalisation import Kind
from agents.prompts import behind_pictures, mean_of_seen, prompt_tokens
from agents.sentence_encoder import read_tokenizer
from agents.weights import some
from research.schema import LANGUAGE, OBSERVATION, PROPRIO, UserError, describe_error, did_you_mean

PATCHES, PREFIX_KV, PREFIX_SEEN = "patches", "prefix_kv", "prefix_seen"
LONGEST_PROMPT, START = 48, "<bos>"  # tokens, as pi0 was trained; of a tokenizer
# Our names -> those of transformers' PI0ForConditionalGeneration.
HUB_NAMES = {
    "vision_tower.": "model.vlm.vision_tower.",
    "projector.": "model.vlm.multi_modal_projector.",
    "language_model.": "model.vlm.language_model.",
    "action_expert.transformer.": "model.dit.",
    "action_expert.embedding.": "embed_action_time.",
    "action_expert.velocity.": "action_out_proj.",
}


class Pi0VLA(FlowVLA):
    """See the module's docstring.

    Args:
        action_dim: A, numbers of an action that the environment takes; the model's further ones are not executed.
        modalities: which observations to read, further cameras (`rgb_wrist`, ...) among them.
        proprio_dim: P of `proprio` `[B, P]`, padded with zeros to the model's.
        pretrained: a local folder as transformers writes it: `config.json` and weights; None: fresh weights.
        config: arguments of a `transformers.PI0Config`, over those of `pretrained`.
        tokenizer: a local folder with `tokenizer.json`; None: that of `pretrained`, or bytes for fresh weights.
        executed: control steps that are executed, of the `chunk_size` that the model denoises.
        steps: K, denoising steps.
        noise: a of `FlowSDE`.
        statistics: file with the statistics of the data, see `agents.normalisation.read_statistics`; None: actions and
            states are used as they are.
        dataset: whose statistics, where the file has several.
        normalisation: "mean_std", "quantiles" or "min_max".

    Raises:
        UserError: what `pretrained`, `tokenizer` or `statistics` name is absent or does not fit.
    """

    heads = ("action_expert", "value_head")

    def __init__(
        self,
        action_dim: int,
        modalities: Sequence[str] = READS,
        proprio_dim: int = 0,
        pretrained: str | None = None,
        config: dict | None = None,
        tokenizer: str | None = None,
        executed: int = 1,
        steps: int = 4,
        noise: float = 0.5,
        statistics: str | None = None,
        dataset: str | None = None,
        normalisation: Kind = "mean_std",
    ):
        config = pi0_config(pretrained, config)
        super().__init__(
            modalities, config.chunk_size, config.max_action_dim, config.max_state_dim, action_dim, proprio_dim,
            executed, steps, noise, statistics, dataset, normalisation,
        )  # fmt: skip
        self.config = config
        hub = PI0ForConditionalGeneration(self.config) if pretrained is None else load_hub(pretrained, self.config)
        self.vision_tower, self.projector = hub.model.vlm.vision_tower, hub.model.vlm.multi_modal_projector
        self.language_model = hub.model.vlm.language_model
        self.action_expert = ActionExpert(hub)
        width = self.config.vlm_config.text_config.hidden_size
        self.value_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, 1))
        folder, vocabulary = tokenizer or pretrained, self.config.vlm_config.text_config.vocab_size
        self.words = read_tokenizer(Path(folder), vocabulary, "Pi0VLA: tokenizer") if folder else None

    # ---------------------------------------------------------------------------------------------------- the contract

    @property
    def context_keys(self) -> tuple:
        return (PREFIX_KV, PREFIX_SEEN, PREFIX_HIDDEN, *([(OBSERVATION, PROPRIO)] if self.reads_proprio else []))

    def stages(self) -> list[TensorDictModule]:
        """What the vision tower sees; and what the language model makes of that and of the instruction."""
        pictures = [(OBSERVATION, image) for image in self.images]
        language = [(OBSERVATION, LANGUAGE)] if self.reads_language else []
        return [
            TensorDictModule(Patches(self), in_keys=pictures, out_keys=[PATCHES]),
            TensorDictModule(
                Prefix(self), in_keys=[PATCHES, *language], out_keys=[PREFIX_KV, PREFIX_SEEN, PREFIX_HIDDEN]
            ),
        ]

    def velocity(self, step: TensorDictBase) -> Velocity:
        kv, seen = step.get(PREFIX_KV), step.get(PREFIX_SEEN)
        if self.reads_proprio:
            state = self.padded_state(step.get((OBSERVATION, PROPRIO)))
        else:
            state = kv.new_zeros(len(kv), self.state_room, dtype=torch.float32)
        return lambda x, time: self.action_expert(state, x, time, kv, seen)


def hub_name(name: str) -> str:
    """What transformers calls one of this model's weights."""
    prefix = next(prefix for prefix in HUB_NAMES if name.startswith(prefix))
    return HUB_NAMES[prefix] + name.removeprefix(prefix)


class Patches(nn.Module):
    """Pictures uint8 `[B, H, W, 3]`, one per camera -> what the vision tower makes of them, `[B, N, D']`, in a row."""

    def __init__(self, model: Pi0VLA):
        super().__init__()
        self.vision_tower = model.vision_tower
        self.size = model.config.vlm_config.vision_config.image_size

    def forward(self, *pictures: Tensor) -> Tensor:
        return torch.cat([self._patches(picture) for picture in pictures], dim=1)

    def _patches(self, picture: Tensor) -> Tensor:
        pixels = picture.movedim(-1, 1).float() / 127.5 - 1
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        return self.vision_tower(pixels).last_hidden_state


class Prefix(nn.Module):
    """Patches `[B, N, D']` and the instruction -> what the language model's layers keep of them.

    Returns:
        keys and values `[B, layers, 2, heads, S, d]`; which of the S tokens are no padding, bool `[B, S]`; and the mean
        of the last states of those, `[B, D]`.
    """

    def __init__(self, model: Pi0VLA):
        super().__init__()
        self.projector, self.language_model, self.words = model.projector, model.language_model, model.words

    def forward(self, patches: Tensor, language: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        ids, is_token = prompt_tokens(self.words, language, len(patches), patches.device, LONGEST_PROMPT, START)
        words = self.language_model.get_input_embeddings()(ids)
        tokens, seen = behind_pictures(self.projector(patches), words, is_token)
        output = self.language_model(
            inputs_embeds=tokens,
            attention_mask=attention_bias(seen[:, None].expand(-1, seen.shape[1], -1), tokens.dtype),
            position_ids=seen.cumsum(dim=1) - 1,
            past_key_values=DynamicCache(),
            use_cache=True,
        )
        kv = torch.stack([torch.stack([layer.keys, layer.values], dim=1) for layer in output.past_key_values.layers], 1)
        return kv, seen, mean_of_seen(output.last_hidden_state, seen)


class ActionExpert(nn.Module):
    """The velocity of noised actions: a transformer whose layers also attend to the prefix's keys and values."""

    def __init__(self, hub: PI0ForConditionalGeneration):
        super().__init__()
        self.transformer, self.embedding, self.velocity = hub.model.dit, hub.embed_action_time, hub.action_out_proj

    def forward(self, state: Tensor, x: Tensor, time: Tensor, kv: Tensor, seen: Tensor) -> Tensor:
        """Velocity `[B, H, A]`.

        Args:
            state: `[B, P]`.
            x: `[B, H, A]` at `time` `[B]`.
            kv, seen: what `Prefix` returns.
        """
        tokens = self.embedding(state, x.to(state.dtype), time.float())  # [B, 1 + H, D]
        b, length = tokens.shape[:2]
        among = torch.ones(length, length, dtype=torch.bool, device=x.device)
        among[0, 1:] = False  # the state does not see the actions
        visible = torch.cat([seen[:, None].expand(-1, length, -1), among.expand(b, -1, -1)], dim=2)
        positions = seen.sum(dim=1, keepdim=True) + torch.arange(length, device=x.device)
        output = self.transformer(
            inputs_embeds=tokens,
            attention_mask=attention_bias(visible, tokens.dtype),
            position_ids=positions,
            past_key_values=DynamicCache([(layer[:, 0], layer[:, 1]) for layer in kv.unbind(dim=1)]),
            use_cache=True,
        )
        return self.velocity(output.last_hidden_state[:, 1:]).float()


def attention_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores, `[B, 1, Q, K]`: 0 where bool `[B, Q, K]` is set, else the least number."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


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
