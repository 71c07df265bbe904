"""pi0: the actions of transformers' own sampler, what is kept of it when, gradients, units of the data, refusals."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from transformers import PI0ForConditionalGeneration
from worlds import ROOT

from agents.flow import follow
from agents.pi0 import LONGEST_PROMPT, START, Pi0VLA, fitted
from agents.pi0_folder import as_hub
from agents.policy import VLAPolicy
from agents.prompts import prompt_tokens
from research.errors import UserError
from research.schema import encode_text
from research.training.freezing import freeze

TINY = json.loads((ROOT / "experiments" / "configs" / "pi0_tiny.json").read_text())
TINY = TINY["policy"]["vla_config"]["model_config"]["config"]
TOKENS_PER_PICTURE = (32 // 8) ** 2


def make(modalities=("rgb", "proprio", "language"), **options) -> Pi0VLA:
    torch.manual_seed(0)
    return Pi0VLA(3, modalities, **{"proprio_dim": 3, "config": TINY, "executed": 2, **options}).eval()


def looks(cameras=("rgb",), size: int = 32) -> TensorDict:
    torch.manual_seed(2)
    pictures = {camera: torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8) for camera in cameras}
    texts = torch.stack([encode_text(text, 32) for text in ("go", "push it there", "")]).long()
    return TensorDict({**pictures, "proprio": torch.randn(3, 3), "language": texts}, batch_size=[3])


@torch.no_grad()
@pytest.mark.parametrize("cameras", [("rgb",), ("rgb", "rgb_wrist")])
def test_without_noise_it_samples_what_transformers_samples(cameras):
    model, seen = make((*cameras, "proprio", "language")), looks(cameras)
    noise = torch.randn(3, 4, 8)
    ours, theirs = sampled(model, seen, noise), sampled_by_hub(as_hub(model), seen, noise, cameras)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert theirs.std() > 0.1


def sampled(model: Pi0VLA, seen: TensorDict, noise: torch.Tensor) -> torch.Tensor:
    """What is left of a noise, `[B, H, D]`, after all denoising steps of the equation."""
    return follow(model.velocity(model.run_stages(seen)), noise, model.flow.steps)


def sampled_by_hub(hub: PI0ForConditionalGeneration, seen: TensorDict, noise: torch.Tensor, cameras=("rgb",)):
    """The same, by transformers' own sampler, of instructions in bytes."""
    ids, is_token = prompt_tokens(None, seen["language"], 3, noise.device, LONGEST_PROMPT, START)
    assert is_token.sum(dim=1).tolist() == [4, 15, 2]  # a start, the bytes, a line's end
    pictures = len(cameras) * TOKENS_PER_PICTURE
    return hub.sample_actions(
        state=F.pad(seen["proprio"], (0, 5)),
        input_ids=torch.cat([torch.full((3, pictures), TINY["vlm_config"]["image_token_id"]), ids], dim=1),
        attention_mask=torch.cat([torch.ones(3, pictures, dtype=torch.int64), is_token.long()], dim=1),
        pixel_values=torch.stack([seen[c] for c in cameras], 1).movedim(-1, 2).float() / 127.5 - 1,
        pixel_attention_mask=torch.ones(3, len(cameras), dtype=torch.bool),
        noise=noise,
        num_steps=4,
    )


def test_gradients_reach_every_part_and_the_log_probability_counts_what_is_executed():
    model = make(executed=1)
    step = model.run_stages(looks())
    with torch.no_grad():
        step = model.decide(step.detach(), deterministic=False)
    assert step["action"].shape == (3, 3) and step["decision", "pair"].shape == (3, 2, 4, 8)
    log_prob, entropy, value = model.score(model.run_stages(looks()).update(step.select("decision")))
    assert torch.equal(log_prob, step["action_log_prob"]) and (entropy == 0).all()
    (log_prob.sum() + value.sum()).backward()
    for part in ("vision_tower", "projector", "language_model", "action_expert", "value_head"):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in getattr(model, part).parameters()), part
    changed = step.clone()
    changed["decision", "pair"][:, 1, 1:] += 1  # planned, not executed
    changed["decision", "pair"][:, 1, :, 3:] += 1  # beyond the numbers of an action
    with torch.no_grad():
        assert torch.equal(model.score(changed)[0], step["action_log_prob"])
        changed["decision", "pair"][:, 1, 0, 2] += 1
        assert (model.score(changed)[0] != step["action_log_prob"]).all()


def test_checkpointed_activations_change_no_gradient_and_are_computed_again():
    gradients, calls = [], []
    for checkpointing in (False, True):
        model, count = make(gradient_checkpointing=checkpointing), []
        for stack in (model.vision_tower.encoder, model.language_model, model.action_expert.transformer):
            stack.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(3)
        step = model.run_stages(looks())
        (model.imitation_loss(step, torch.ones(3, 4, 3)) + model.state_value(step)[:, 0]).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        calls.append(len(count))
    assert gradients[0].keys() == gradients[1].keys() and calls == [3, 6]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-6, msg=name)


def test_adapters_go_into_every_layer_of_the_language_model_and_leave_the_patches_reusable():
    model = make()
    freeze(model, "lora", heads=model.heads)
    adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    parts = [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]
    assert adapted == {f"language_model.layers.{layer}.{part}" for layer in (0, 1) for part in parts}
    assert [key for key in VLAPolicy(model).kept_keys if isinstance(key, str)] == ["patches"]


@torch.no_grad()
def test_actions_and_states_are_in_the_units_of_the_data(tmp_path):
    statistics = {
        "action": {"mean": [1.0, 0.0, -1.0], "std": [0.5, 2.0, 1.0]},
        "proprio": {"mean": [0.1, 0.2, 0.3], "std": [2.0, 2.0, 2.0]},
    }
    (tmp_path / "stats.json").write_text(json.dumps(statistics))
    plain, scaled = make(), make(statistics=str(tmp_path))
    seen, theirs = looks(), looks()
    theirs["proprio"] = seen["proprio"] * 2 + torch.tensor([0.1, 0.2, 0.3])
    draws = []
    for model, look in ((plain, seen), (scaled, theirs)):
        torch.manual_seed(5)
        draws.append(model.decide(model.run_stages(look), deterministic=False))
    torch.testing.assert_close(draws[0]["decision", "pair"], draws[1]["decision", "pair"], rtol=0, atol=1e-6)
    expected = draws[0]["action"] * torch.tensor([0.5, 2.0, 1.0]) + torch.tensor([1.0, 0.0, -1.0])
    torch.testing.assert_close(draws[1]["action"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": ("proprio", "language")}, "at least one camera"),
        ({"modalities": ("rgb", "depth")}, "modalities are rgb, proprio, language"),
        ({"executed": 5}, "executed is 5, and the model has room for 4"),
        ({"proprio_dim": 9}, "proprio_dim is 9, and the model has room for 8"),
        (
            {"config": {**TINY, "chunk_sizes": 4}},
            "'chunk_sizes' is no argument of PI0Config; did you mean 'chunk_size'",
        ),
        ({"config": {**TINY, "chunk_size": "many"}}, "no configuration of pi0"),
        ({"config": None}, "set pretrained to a folder, or config to the sizes of fresh weights"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (21, 32), (5, 300)])
def test_a_picture_that_is_no_square_keeps_its_ratio_between_black_bars(height, width):
    """A white one; its rows and columns, from which on, by hand."""
    rows, columns = {
        (48, 64): ((4, 24), (0, 32)), (64, 48): ((0, 32), (4, 24)), (21, 32): ((5, 21), (0, 32)),
        (5, 300): ((15, 1), (0, 32)),
    }[height, width]  # fmt: skip
    expected = torch.full((1, 3, 32, 32), -1.0)
    expected[:, :, rows[0] : rows[0] + rows[1], columns[0] : columns[0] + columns[1]] = 1.0
    torch.testing.assert_close(fitted(torch.ones(1, 3, height, width), 32), expected)


def test_a_square_in_a_picture_stays_one():
    """80 of 480 rows and of 640 columns: 4 of 24 and of 32."""
    picture = torch.full((1, 3, 480, 640), -1.0)
    picture[..., 200:280, 300:380] = 1.0
    lit = fitted(picture, 32)[0, 0] > 0
    assert (lit.any(1).sum(), lit.any(0).sum()) == (4, 4)


def test_square_pictures_are_scaled_as_ever():
    picture = torch.rand(2, 3, 21, 21) * 2 - 1
    expected = F.interpolate(picture, (32, 32), mode="bilinear", antialias=True)
    assert torch.equal(fitted(picture, 32), expected)
    assert all(fitted(torch.zeros(1, 3, side, side), 224).abs().max() == 0 for side in range(1, 600, 7))
