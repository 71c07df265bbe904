"""OpenVLA and OpenVLA-OFT with tokens: the logits of transformers' Llama, cached and in one pass, and units."""

from __future__ import annotations

import json

import pytest
import torch
from tensordict import TensorDict
from worlds import ROOT

from agents.openvla import STOP, OpenVLA
from agents.openvla_prompt import prompt_ids
from research.errors import UserError
from research.schema import encode_text

TINY = json.loads((ROOT / "experiments" / "configs" / "openvla_tiny.json").read_text())
TINY = TINY["policy"]["vla_config"]["model_config"]["config"]
TOKENS, PATCHES = 576 - 64, 16
BOTH = pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])


def make(**options) -> OpenVLA:
    torch.manual_seed(0)
    model = OpenVLA(3, **{"modalities": ("rgb", "language"), "config": TINY, "executed": 2, **options}).eval()
    with torch.no_grad():
        model.language_model.lm_head.weight.mul_(10)  # fresh weights would make all tokens alike
    return model


def looks(cameras=("rgb",)) -> TensorDict:
    torch.manual_seed(2)
    pictures = {camera: torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8) for camera in cameras}
    texts = torch.stack([encode_text(text, 32) for text in ("go", "push it there", "")]).long()
    return TensorDict({**pictures, "language": texts}, batch_size=[3])


def logits_of_llama(model: OpenVLA, seen: TensorDict, row: int, tokens: torch.Tensor) -> torch.Tensor:
    """The bins' logits `[T, 256]` of one row without padding, from transformers' own model: one pass, no cache."""
    llama, cameras = model.language_model, [key for key in seen.keys() if key != "language"]
    ids, is_token = prompt_ids(None, seen["language"], 3, 0)
    words = llama.get_input_embeddings()(ids[row, is_token[row]])
    patches = model.projector(torch.cat([model.vision_backbone(seen[key][row : row + 1])[0] for key in cameras]))
    prompt = torch.cat([words[:1], patches, words[1:]])
    if model.decoding == "parallel":  # as the public code: empty tokens, the stop token, and no mask at all
        tail = torch.cat([torch.zeros(model.horizon * 3, 64), llama.get_input_embeddings().weight[STOP : STOP + 1]])
        mask = torch.zeros(1, 1, len(prompt) + len(tail), len(prompt) + len(tail))
    else:
        tail, mask = llama.get_input_embeddings()(tokens[:-1]), None
    logits = llama(inputs_embeds=torch.cat([prompt, tail])[None], attention_mask=mask).logits[0]
    return logits[len(prompt) - 1 :][: len(tokens), TOKENS - 256 : TOKENS]


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("cameras", [("rgb",), ("rgb", "rgb_wrist")])
def test_it_draws_and_scores_by_the_logits_of_transformers_llama(decoding, cameras):
    model = make(decoding=decoding, horizon=4, temperature=1.5, modalities=(*cameras, "language"))
    seen = looks(cameras)
    step = model.decide(model.run_stages(seen), deterministic=False)
    mode = model.decide(model.run_stages(seen), deterministic=True)
    told = token_log_probs(model, step)
    log_prob, entropy, value = model.score(step)
    assert step["decision", "tokens"].shape == (3, 6) and step["action"].shape == (3, 2, 3)
    for row in range(3):
        ids = step["decision", "tokens"][row]
        expected = (logits_of_llama(model, seen, row, ids) / 1.5).log_softmax(-1)
        chosen = expected[range(6), ids - TOKENS + 256]
        torch.testing.assert_close(told[row], chosen, rtol=0, atol=1e-4)
        torch.testing.assert_close(step["action_log_prob"][row], chosen.sum(), rtol=0, atol=1e-4)
        torch.testing.assert_close(log_prob[row], chosen.sum(), rtol=0, atol=1e-4)
        torch.testing.assert_close(entropy[row], -(expected.exp() * expected).sum(), rtol=0, atol=1e-4)
        best = mode["decision", "tokens"][row]
        assert torch.equal(logits_of_llama(model, seen, row, best).argmax(-1) + TOKENS - 256, best)
    torch.testing.assert_close(step["state_value"], value, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.get_value(seen), value, rtol=0, atol=1e-5)
    assert told.std() > 0.1 and len(step["decision", "tokens"].unique()) > 5


@torch.no_grad()
def test_what_is_drawn_has_the_probabilities_that_are_told():
    model = make()
    log_probs = model._log_probs(model._states(model.run_stages(looks())))[0, 0]
    torch.manual_seed(3)
    ids = model._draw(log_probs.expand(10000, 2, 256), deterministic=False)
    counted = torch.bincount((ids - TOKENS + 256).flatten(), minlength=256) / 20000
    assert (counted - log_probs.exp()).abs().sum() < 0.15 and log_probs.exp().max() > 0.02


@BOTH
def test_gradients_reach_every_part_and_checkpointing_changes_none(decoding):
    gradients = []
    for recompute in (False, True):
        model = make(decoding=decoding, horizon=3, gradient_checkpointing=recompute)
        with torch.no_grad():
            step = model.decide(model.run_stages(looks()), deterministic=False)
        log_prob, entropy, value = model.score(model.run_stages(looks()).update(step.select("decision")))
        (log_prob.sum() + entropy.sum() + value.sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for part in ("vision_backbone", "projector", "language_model", "value_head"):
        assert any(n.startswith(part) and g.abs().sum() > 0 for n, g in gradients[0].items()), part
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 60
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("decoding", "updates"), [("autoregressive", 15), ("parallel", 60)])
def test_cloning_raises_the_probability_of_the_experts_tokens(decoding, updates):
    model = make(decoding=decoding, horizon=2)
    step = model.run_stages(looks())
    plan = torch.rand(3, 2, 3) * 2 - 1
    loss = model.imitation_loss(step, plan)
    ids = model.bins.ids(plan).flatten(1)
    told = token_log_probs(model, step.copy().set(("decision", "tokens"), ids))
    torch.testing.assert_close(loss, -told.mean(dim=1), rtol=0, atol=1e-6)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(updates):
        optimizer.zero_grad()
        model.imitation_loss(model.run_stages(looks()), plan).mean().backward()
        optimizer.step()
    with torch.no_grad():
        action = model.decide(model.run_stages(looks()), deterministic=True)["action"]
    assert (action - plan).abs().max() < 1 / 127  # a bin is 2 / 255 wide


@torch.no_grad()
@pytest.mark.parametrize(("gripper", "expected"), [("as_is", 0.2), ("zero_one", -0.6), ("one_zero", 0.6)])
def test_actions_are_in_the_units_of_the_data_and_the_gripper_in_the_environments(tmp_path, gripper, expected):
    action = {"q01": [-1.0, 0.0, 0.0], "q99": [1.0, 4.0, 1.0], "mask": [True, True, False]}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"bridge": {"action": action, "num_trajectories": 3}}))
    model = make(statistics=str(tmp_path), dataset="bridge", gripper=gripper)
    assert model.statistics == ("bridge", action)
    normalised = torch.tensor([[[0.5, 0.5, 0.2]]])
    in_units = model.actions.unnormalise(normalised)
    torch.testing.assert_close(in_units, torch.tensor([[[0.5, 3.0, expected]]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.actions.normalise(in_units), normalised, rtol=0, atol=1e-6)
    step = model.decide(model.run_stages(looks()), deterministic=False)
    numbers = model.bins.numbers(step["decision", "tokens"]).view(3, 2, 3)
    torch.testing.assert_close(step["action"], model.actions.unnormalise(numbers), rtol=0, atol=0)


def token_log_probs(model: OpenVLA, step: TensorDict) -> torch.Tensor:
    """Of each stored token, `[B, executed * A]`."""
    level, model.ratio_level = model.ratio_level, "token"
    try:
        return model.score(step)[0]
    finally:
        model.ratio_level = level


def test_at_full_size_it_has_the_parameters_of_openvla_7b():
    with torch.device("meta"):
        model = OpenVLA(7, config={"text_config": {"vocab_size": 32064}})
    own = {name: p for name, p in model.named_parameters() if not name.startswith("value_head")}
    assert sum(p.numel() for p in own.values()) == 7_541_237_184
    assert own["language_model.lm_head.weight"].shape == (32064, 4096) and model.bins.first_id == 31744


def test_the_score_is_exact_where_one_pass_rounds_as_the_cache_does():
    assert make().score_is_exact and not make().bfloat16().score_is_exact
    assert make(decoding="parallel").bfloat16().score_is_exact
    with torch.autocast("cpu", torch.bfloat16):
        assert not make().score_is_exact and make(decoding="parallel").score_is_exact


@torch.no_grad()
@BOTH
@pytest.mark.parametrize(("level", "shape"), [("chunk", (3,)), ("action", (3, 2)), ("token", (3, 6))])
def test_each_part_of_a_decision_can_have_its_own_probability(decoding, level, shape):
    model = make(decoding=decoding)
    model.ratio_level = level
    step = model.decide(model.run_stages(looks()), deterministic=False)
    log_prob, entropy, _ = model.score(step)
    assert log_prob.shape == step["action_log_prob"].shape == shape and entropy.shape == (3,)
    torch.testing.assert_close(log_prob, step["action_log_prob"], rtol=0, atol=1e-4)
    told = token_log_probs(model, step).view(3, -1, 6 // max(1, log_prob[0].numel())).sum(-1)
    torch.testing.assert_close(log_prob.view(3, -1), told, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": ("language",)}, "at least one camera"),
        ({"modalities": ("rgb", "proprio")}, "modalities are rgb, language"),
        ({"decoding": "diffusion"}, "decoding is one of autoregressive, parallel, got 'diffusion'"),
        ({"gripper": "open"}, "gripper is one of as_is, zero_one, one_zero, got 'open'"),
        ({"horizon": 1}, "executed is 2, and horizon plans 1"),
        ({"temperature": 0.0}, "temperature should be above 0"),
        ({"config": None}, "set pretrained to a folder, or config to the sizes"),
        ({"tokenizer": "/nowhere"}, "OpenVLA: tokenizer: there is no /nowhere/tokenizer.json"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message) as caught:
        make(**options)
    assert "\n" not in str(caught.value)
