"""OpenVLA (Kim et al. 2024, arXiv:2406.09246): a vision-language model whose next words are an action.

    rgb, rgb_<camera> ── vision_backbone ─ patches [B, N, D'] ── projector ─┐
    language ── tokens ─────────────────────────────────────────────────────┴─ prompt [B, S, D] ── language_model ─┐
                                                        value_head ── at the prompt's last position ───────────────┤
                                        language_model.lm_head ── 256 rows: the bins of each number of an action ──┘

The names of weights are the public checkpoints'. The prompt is: start token, patches, "In: What action should the robot
take to ...?", a new line and "Out:". How numbers become tokens: `agents/action_bins.py`. The policy is the distribution
over the 256 tokens that mean something; public code draws from the whole vocabulary.

Two ways to decode. "autoregressive": one token after the other, each of which sees those before; the score of a stored
decision is one pass over the prompt and its tokens. "parallel" (OpenVLA-OFT, Kim et al. 2025, arXiv:2502.19645): empty
tokens stand where the actions belong, all tokens see each other, prompt included, and one pass gives the distributions
of a whole chunk, whose numbers are independent of each other. Of OpenVLA-OFT that is the variant with tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from agents.action_bins import ActionBins
from agents.checkpoint_folder import BYTES
from agents.gradient_checkpointing import checkpoint_layers
from agents.normalisation import Kind, Normalisation
from agents.openvla_checkpoint import DECODING, action_statistics, load_weights, openvla_config, write_checkpoint
from agents.openvla_prompt import Prompt
from agents.pi0 import attention_bias
from agents.prismatic_vision import PrismaticVision
from agents.ratio_level import LEVELS, at_level
from agents.sentence_encoder import read_tokenizer
from agents.vla import DecidingVLA, check_modalities
from research.action_map import ActionMap
from research.errors import UserError
from research.schema import ACTION, LANGUAGE, LOG_PROB, OBSERVATION, RGB, VALUE, base_modality

READS = (RGB, LANGUAGE)
TOKENS = ("decision", "tokens")
PATCHES, PROMPT, PROMPT_SEEN = "patches", "prompt", "prompt_seen"
STOP = 2  # Llama's token behind a text
# The last number of an action -> the environment's: a x + b.
GRIPPERS = {"as_is": (1.0, 0.0), "zero_one": (2.0, -1.0), "one_zero": (-2.0, 1.0)}


class OpenVLA(DecidingVLA):
    """See the module's docstring.

    Args:
        action_dim: A, numbers of an action.
        modalities: which observations to read, further cameras (`rgb_wrist`, ...) among them.
        pretrained: a local folder in the public layout, see `agents/openvla_checkpoint.py`; None: fresh weights.
        config: sizes, over those of `pretrained`; see `agents.openvla_checkpoint.SIZES`.
        tokenizer: a local folder with `tokenizer.json`; None: that of `pretrained`, or bytes for fresh weights.
        decoding: "autoregressive", or "parallel" as OpenVLA-OFT; None: what `export` wrote, else "autoregressive".
        executed: control steps that are executed, and drawn.
        horizon: H, those that are planned: cloned, and decoded in parallel; None: as many as are executed.
        temperature: what logits are divided by, in drawing and in scoring.
        statistics: file with the statistics of the data, see `agents.normalisation.read_statistics`; None: those of
            `pretrained`; with fresh weights actions are used as they are (and `export` writes statistics that say so).
        dataset: whose statistics, where the file has several.
        normalisation: "quantiles", as OpenVLA; "min_max" or "mean_std".
        gripper: what the last number means to the environment: "as_is"; or the data have 0 to 1 and the environment -1
            to 1, "zero_one" the same way round, "one_zero" the other (LIBERO).
        prompt_tokens: room for the words of the prompt; with bytes it follows from the instruction.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.

    Raises:
        UserError: what `pretrained`, `tokenizer` or `statistics` name is absent or does not fit; an unknown choice.
    """

    decision_keys = (TOKENS,)
    context_keys = (PROMPT, PROMPT_SEEN)
    heads = ("value_head", "language_model.lm_head")
    # All linear layers, as the public fine-tuning script has it ("all-linear"); the towers' convolutions are none.
    lora_targets = ("vision_backbone.*.blocks.*", "vision_backbone.*.attn_pool.*", "projector", "language_model")
    ratio_levels = LEVELS

    def __init__(
        self,
        action_dim: int,
        modalities: Sequence[str] = READS,
        pretrained: str | None = None,
        config: dict | None = None,
        tokenizer: str | None = None,
        decoding: Literal["autoregressive", "parallel"] | None = None,
        executed: int = 1,
        horizon: int | None = None,
        temperature: float = 1.0,
        statistics: str | None = None,
        dataset: str | None = None,
        normalisation: Kind = "quantiles",
        gripper: Literal["as_is", "zero_one", "one_zero"] = "as_is",
        prompt_tokens: int = 48,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        check_modalities(self, modalities, READS)
        self.images = [m for m in modalities if base_modality(m) == RGB]
        if not self.images:
            raise UserError("OpenVLA: modalities name no picture; OpenVLA reads at least one camera")
        self.reads_language, self.observation_keys = LANGUAGE in modalities, tuple(modalities)
        self.config, self.pretrained = openvla_config(pretrained, config), pretrained
        self.decoding = decoding or self.config.content.get(DECODING, "autoregressive")
        self.temperature, self.prompt_tokens = temperature, prompt_tokens
        self.action_dim, self.executed, self.horizon = action_dim, executed, horizon or executed
        self._check_choices(gripper)
        self.bins = ActionBins(self.config.tokens, self.config.bins)
        self.vision_backbone = PrismaticVision(self.config.towers, self.config.image_size)
        width = self.config.text.hidden_size
        self.projector = Projector(self.vision_backbone.width, width)
        self.language_model = LlamaForCausalLM(self.config.text)
        self.value_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, 1))
        if pretrained is not None:
            load_weights(self, Path(pretrained))
        as_bytes = all(self.config.content.get(name) == value for name, value in BYTES.items())
        folder = tokenizer or (None if as_bytes else pretrained)
        self.words = read_tokenizer(Path(folder), self.config.tokens, "OpenVLA: tokenizer") if folder else None
        self.statistics = action_statistics(pretrained, statistics, dataset)
        self.actions = Normalisation.identity(action_dim)
        if self.statistics is not None:
            self.actions = Normalisation.from_statistics(self.statistics[1], normalisation, action_dim)
            if normalisation != "quantiles":  # what reads a folder takes these
                self.statistics = (self.statistics[0], self.actions.as_statistics())
        self.gripper = gripper
        factor, offset = GRIPPERS[gripper]
        self.actions.middle[-1] = self.actions.middle[-1] * factor + offset
        self.actions.scale[-1] *= factor
        if gradient_checkpointing:
            towers = (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer)
            checkpoint_layers(self.language_model.model.layers)
            checkpoint_layers(block for tower in towers for block in tower.blocks)

    def act_through(self, action_map: ActionMap) -> None:
        """See `Normalisation.act_through`; a gripper that was brought to -1 and 1 is in the environment's terms."""
        self.actions.act_through(action_map, without=() if self.gripper == "as_is" else (self.action_dim - 1,))

    def _check_choices(self, gripper: str) -> None:
        for name, got, known in (
            ("decoding", self.decoding, ("autoregressive", "parallel")),
            ("gripper", gripper, tuple(GRIPPERS)),
        ):
            if got not in known:
                raise UserError(f"OpenVLA: {name} is one of {', '.join(known)}, got {got!r}")
        if self.executed > self.horizon:
            raise UserError(f"OpenVLA: executed is {self.executed}, and horizon plans {self.horizon}")
        if not self.temperature > 0:
            raise UserError(
                f"OpenVLA: temperature should be above 0, got {self.temperature}; evaluation takes the mode"
            )

    # ---------------------------------------------------------------------------------------------------- the contract

    def stages(self) -> list[TensorDictModule]:
        """What the towers see; and that, projected, among the words of the prompt."""
        pictures = [(OBSERVATION, image) for image in self.images]
        language = [(OBSERVATION, LANGUAGE)] if self.reads_language else []
        embedding = self.language_model.get_input_embeddings()
        prompt = Prompt(self.projector, embedding, self.words, self.prompt_tokens)
        return [
            TensorDictModule(self.vision_backbone, in_keys=pictures, out_keys=[PATCHES]),
            TensorDictModule(prompt, in_keys=[PATCHES, *language], out_keys=[PROMPT, PROMPT_SEEN]),
        ]

    def decide(self, step: TensorDictBase, deterministic: bool) -> TensorDictBase:
        """Draw the tokens of the control steps that are executed; the mode takes the likeliest, one after the other."""
        count = self.executed * self.action_dim
        if self.decoding == "parallel":
            states = self._states(step)
            log_probs = self._log_probs(states[:, :count])
            ids = self._draw(log_probs, deterministic)
            log_prob = self._chosen(log_probs, ids)
        else:
            cache, seen, drawn, told = DynamicCache(), step.get(PROMPT_SEEN), [], []
            states = last = self._run(step.get(PROMPT), seen, cache)[:, -1:]
            for place in range(count):
                if place:
                    seen = F.pad(seen, (0, 1), value=True)
                    last = self._run(self._embedded(drawn[-1]), seen, cache)
                log_probs = self._log_probs(last)
                drawn.append(self._draw(log_probs, deterministic))
                told.append(self._chosen(log_probs, drawn[-1]))
            ids, log_prob = torch.cat(drawn, dim=1), torch.cat(told, dim=1)
        numbers = self.bins.numbers(ids).unflatten(1, (self.executed, self.action_dim))
        action = self.actions.unnormalise(numbers)
        step.set(ACTION, action[:, 0] if self.executed == 1 else action).set(TOKENS, ids)
        return step.set(LOG_PROB, self._at_level(log_prob)).set(VALUE, self._value(states))

    def score(self, step: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """See `DecidingVLA`; the entropy is that of each token, given the stored ones before it, in sum."""
        ids = step.get(TOKENS)
        states = self._states(step, ids[:, :-1])
        log_probs = self._log_probs(states[:, : ids.shape[1]])
        entropy = -(log_probs.exp() * log_probs).sum(dim=(1, 2))
        return self._at_level(self._chosen(log_probs, ids)), entropy, self._value(states)

    def state_value(self, step: TensorDictBase) -> Tensor:
        return self._value(self._states(step))

    def imitation_loss(self, step: TensorDictBase, plan: Tensor) -> Tensor:
        """Cross-entropy of an expert's tokens, each seen with those before it, in the mean: `[B]`.

        Args:
            step: after the stages.
            plan: `[B, H, A]`, the expert's actions in the environment's units.
        """
        ids = self.bins.ids(self.actions.normalise(plan.float())).flatten(1)
        return -self._chosen(self._log_probs(self._states(step, ids[:, :-1])), ids).mean(dim=1)

    @property
    def score_is_exact(self) -> bool:
        """Whether `score` gives what `decide` gave; one token at a time rounds otherwise than all in one pass.

        In float32 the difference is about 1e-6.
        """
        weight = self.language_model.lm_head.weight
        rounded = weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)
        return self.decoding == "parallel" or not rounded

    def export(self, folder: Path) -> None:
        """Write a checkpoint in the public layout, which `pretrained` reads as well."""
        write_checkpoint(self, Path(folder), self.config, self.statistics, self.words, self.pretrained)

    # ------------------------------------------------------------------------------------------------ the tokens' pass

    def _states(self, step: TensorDictBase, ids: Tensor | None = None) -> Tensor:
        """The last states that predict tokens, in order, `[B, 1 + T, D]`; the first is at the prompt's last position.

        Args:
            step: after the stages.
            ids: int64 `[B, T]`, the first tokens; None: none. Decoded in parallel they do not matter, and there are
                states of all H * A tokens.
        """
        prompt, seen = step.get(PROMPT), step.get(PROMPT_SEEN)
        tail = prompt[:, :0]
        if self.decoding == "parallel":
            stop = self._embedded(torch.full((len(prompt), 1), STOP, device=prompt.device))
            tail = torch.cat([stop.new_zeros(len(prompt), self.horizon * self.action_dim, stop.shape[-1]), stop], dim=1)
        elif ids is not None:
            tail = self._embedded(ids)
        states = self._run(torch.cat([prompt, tail], dim=1), F.pad(seen, (0, tail.shape[1]), value=True))
        states = states[:, prompt.shape[1] - 1 :]
        return states[:, :-2] if self.decoding == "parallel" else states

    def _run(self, tokens: Tensor, seen: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Last states `[B, T, D]` of tokens `[B, T, D]`, the last ones of those that `seen` `[B, S]` tells of.

        The others are in the cache, which the new ones join.
        """
        new, length = tokens.shape[1], seen.shape[1]
        visible = seen[:, None].expand(-1, new, -1)
        if self.decoding == "autoregressive":
            visible = visible & torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()[-new:]
        return self.language_model.model(
            inputs_embeds=tokens,
            attention_mask=attention_bias(visible, tokens.dtype),
            position_ids=seen.cumsum(dim=1)[:, -new:] - 1,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _embedded(self, ids: Tensor) -> Tensor:
        return self.language_model.get_input_embeddings()(ids)

    def _log_probs(self, states: Tensor) -> Tensor:
        """Of the bins' tokens, float32 `[B, T, 256]`, from those rows of the head alone."""
        rows = self.language_model.lm_head.weight[self.bins.first_id : self.bins.tokens]
        return F.log_softmax(F.linear(states, rows).float() / self.temperature, dim=-1)

    def _draw(self, log_probs: Tensor, deterministic: bool) -> Tensor:
        """Ids int64 `[B, T]` of log-probabilities `[B, T, 256]`."""
        if deterministic:
            return log_probs.argmax(dim=-1) + self.bins.first_id
        drawn = torch.multinomial(log_probs.detach().exp().flatten(0, 1), 1)
        return drawn.view(log_probs.shape[:2]) + self.bins.first_id

    def _at_level(self, log_probs: Tensor) -> Tensor:
        return at_level(log_probs.unflatten(1, (self.executed, self.action_dim)), self.ratio_level)

    def _chosen(self, log_probs: Tensor, ids: Tensor) -> Tensor:
        return log_probs.gather(-1, (ids - self.bins.first_id)[..., None])[..., 0]

    def _value(self, states: Tensor) -> Tensor:
        return self.value_head(states[:, 0].float()).float()


class Projector(nn.Module):
    """Patches `[B, N, D']` to the width of the language model's tokens, `[B, N, D]`."""

    def __init__(self, vision: int, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(vision, 4 * vision), nn.Linear(4 * vision, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, patches: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(patches)))))
