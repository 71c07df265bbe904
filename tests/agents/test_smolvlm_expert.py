"""SmolVLA's layers: tokens one after the other as all at once, what an action sees, and how time is told."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

from agents.smolvlm_expert import ROPE, ActionExpert, LanguagePass, expert_config, language_layers, time_waves

CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
)  # fmt: skip


@pytest.fixture
def language() -> LlamaModel:
    torch.manual_seed(0)
    model = language_layers(CONFIG, 2)
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return model


@torch.no_grad()
def test_the_layers_are_llamas_with_wavelengths_of_base_10000(language):
    assert len(language.layers) == 2 and CONFIG.rope_parameters["rope_theta"] == 100_000.0
    reference = LlamaModel(language.config)
    assert reference.config.rope_parameters == ROPE
    reference.load_state_dict(language.state_dict())
    tokens, positions = torch.randn(2, 5, 32), torch.arange(5).expand(2, -1)
    cache = DynamicCache()
    causal = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, -1, -1)
    expected = reference(inputs_embeds=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
    states, kv = LanguagePass(language, False)(tokens, positions, causal)
    torch.testing.assert_close(states, expected.last_hidden_state, rtol=0, atol=1e-5)
    for number, layer in enumerate(cache.layers):
        torch.testing.assert_close(kv[:, number, 0], layer.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(kv[:, number, 1], layer.values, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_token_behind_others_gives_what_it_gives_with_them(language):
    run = LanguagePass(language, False)
    tokens, positions = torch.randn(2, 5, 32), torch.arange(5).expand(2, -1)
    visible = torch.ones(2, 5, 5, dtype=torch.bool)
    visible[:, :4, 4] = False  # the others do not see the last
    states, kv = run(tokens, positions, visible)
    _, before = run(tokens[:, :4], positions[:, :4], visible[:, :4, :4])
    last, own = run(tokens[:, 4:], positions[:, 4:], visible[:, 4:], before)
    torch.testing.assert_close(last, states[:, 4:], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([before, own], dim=-2), kv, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("among", [True, False])
def test_an_action_sees_earlier_actions_alone_and_without_keys_of_their_own_none(language, among):
    expert = ActionExpert(language.config, 0.75, lambda _: among, 4, (4e-3, 4.0), False)
    kv, seen = torch.randn(1, 2, 2, 2, 6, 8), torch.ones(1, 6, dtype=torch.bool)
    x, time = torch.randn(1, 5, 4), torch.tensor([0.5])
    before = expert(x, time, kv, seen)
    x[:, 2] += 1
    moved = (expert(x, time, kv, seen) - before).abs().amax(dim=-1)[0] > 1e-7
    assert moved.tolist() == [False, False, True, among, among]
    kv[..., 5, :], seen[:, 5] = 9, False
    unseen = expert(x, time, kv, seen)
    kv[..., 5, :] = -9
    assert torch.equal(unseen, expert(x, time, kv, seen))


def test_the_expert_is_as_wide_as_the_paper_has_it():
    published = LlamaConfig(hidden_size=960, intermediate_size=2560, num_attention_heads=15, head_dim=64)
    config = expert_config(published, 0.75)
    assert (config.hidden_size, config.intermediate_size) == (720, 2048)
    assert (published.hidden_size, config.head_dim) == (960, 64)


def test_waves_of_time_go_from_the_shortest_to_the_longest_period():
    time = torch.tensor([0.3, 0.7])
    waves = time_waves(time, 6, 0.004, 4.0)
    for row, at in enumerate(time.double().tolist()):
        angles = [2 * math.pi * at / period for period in (0.004, math.sqrt(0.004 * 4.0), 4.0)]
        expected = [*map(math.sin, angles), *map(math.cos, angles)]
        torch.testing.assert_close(waves[row], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
