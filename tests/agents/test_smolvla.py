"""SmolVLA: the actions of LeRobot's own implementation, what is kept of it when, and gradients."""

from __future__ import annotations

import json

import pytest
import torch
from record_smolvla import CAMERAS, POLICY, RECORDED, STATISTICS, STEPS, TEXTS
from safetensors.torch import load_file
from tensordict import TensorDict
from worlds import ROOT

from agents.flow import follow
from agents.policy import VLAPolicy
from agents.smolvla import SmolVLA, resize_with_pad
from research.errors import UserError
from research.schema import encode_text
from research.training.freezing import freeze

FULL = json.loads((ROOT / "experiments" / "configs" / "smolvla.json").read_text())
FULL = FULL["policy"]["vla_config"]["model_config"]
TINY = json.loads((ROOT / "experiments" / "configs" / "smolvla_tiny.json").read_text())
TINY = TINY["policy"]["vla_config"]["model_config"]
CONFIG = TINY["config"]


def make(modalities=("rgb", "proprio", "language"), **options) -> SmolVLA:
    """Fresh tiny weights."""
    torch.manual_seed(0)
    return SmolVLA(3, modalities, **{"proprio_dim": 3, "executed": 2, **TINY, **options}).eval()


def recorded_policy(cameras=("rgb",), **options) -> SmolVLA:
    """LeRobot's weights."""
    arguments = {"proprio_dim": 3, "executed": 2, "steps": STEPS, "pretrained": str(POLICY), **options}
    return SmolVLA(3, (*cameras, "proprio", "language"), **arguments).eval()


def observations(recorded: dict, cameras=("rgb",), room: int = 32) -> TensorDict:
    texts = torch.stack([encode_text(text, room) for text in TEXTS]).long()
    return TensorDict({c: recorded[c] for c in cameras} | {"proprio": recorded["proprio"], "language": texts}, [3])


@torch.no_grad()
def sampled(model: SmolVLA, seen: TensorDict, noise: torch.Tensor) -> torch.Tensor:
    """Actions in the data's units, after all denoising steps of the equation from a noise."""
    x = follow(model.velocity(model.run_stages(seen)), noise, model.flow.steps)
    return model.actions.unnormalise(x[..., : model.action_dim])


@pytest.mark.parametrize("cameras", CAMERAS)
def test_it_samples_what_lerobot_samples(cameras):
    recorded, model = load_file(RECORDED), recorded_policy(CAMERAS[cameras])
    actions = sampled(model, observations(recorded, CAMERAS[cameras]), recorded["noise"])
    apart = (actions - recorded[f"actions.{cameras}"]) / torch.tensor(STATISTICS["action"]["std"])
    assert apart.abs().max() < 3e-6 and recorded[f"actions.{cameras}"].std() > 0.5


@pytest.mark.parametrize("cameras", CAMERAS)
def test_it_imitates_by_the_loss_of_lerobot(cameras, monkeypatch):
    recorded, model = load_file(RECORDED), recorded_policy(CAMERAS[cameras])
    step = model.run_stages(observations(recorded, CAMERAS[cameras]))
    monkeypatch.setattr(torch, "randn_like", lambda _: recorded["noise"])
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda *_: (recorded["time"] - 0.001) / 0.999)
    loss = model.imitation_loss(step, recorded["plan"])
    torch.testing.assert_close(loss, recorded[f"loss.{cameras}"], rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    assert model.action_expert.action_in_proj.weight.grad.abs().sum() > 0


def test_padding_of_the_instruction_moves_nothing():
    recorded, model = load_file(RECORDED), recorded_policy()
    short, long = (sampled(model, observations(recorded, room=room), recorded["noise"]) for room in (24, 60))
    torch.testing.assert_close(short, long, rtol=0, atol=1e-5)


def test_pictures_keep_their_shape_and_are_black_to_the_left_and_above():
    picture = torch.ones(1, 3, 10, 40)
    fitted = resize_with_pad(picture, 20, 20)
    assert fitted.shape == (1, 3, 20, 20) and (fitted[..., 15:, :] == 1).all() and (fitted[..., :15, :] == 0).all()
    assert (resize_with_pad(picture.mT, 20, 20)[..., :15] == 0).all()


@torch.no_grad()
def test_without_proprioception_the_state_is_zero():
    without, with_it = make(("rgb", "language"), proprio_dim=0), make()
    seen = observations(load_file(RECORDED))
    seen["proprio"] = torch.zeros(3, 3)
    noise = torch.randn(3, 4, 8)
    torch.testing.assert_close(sampled(without, seen, noise), sampled(with_it, seen, noise), rtol=0, atol=1e-6)
    moved = seen.clone()
    moved["proprio"] += 1
    assert (sampled(with_it, moved, noise) - sampled(with_it, seen, noise)).abs().max() > 1e-4
    assert (with_it.get_value(moved) - with_it.get_value(seen)).abs().min() > 1e-6


@pytest.mark.parametrize(
    ("scope", "kept"),
    [
        (["vision_tower"], ["patches"]),
        (["vision_tower", "connector"], ["picture_tokens"]),
        ("backbone", ["prefix_kv", "prefix_seen", "prefix_mean"]),
        (["backbone", "state_proj"], ["prefix_kv", "prefix_seen", "state_kv", "prefix_hidden"]),
    ],
)
def test_what_is_kept_is_the_last_that_no_trainable_weight_has_moved(scope, kept):
    model = make()
    freeze(model, scope, heads=model.heads)
    found = {key for key in VLAPolicy(model).kept_keys if isinstance(key, str)}
    assert found == set(kept)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_part_and_what_is_scored_is_what_acted(checkpointing):
    model, seen = make(executed=1, gradient_checkpointing=checkpointing), observations(load_file(RECORDED))
    with torch.no_grad():
        step = model.decide(model.run_stages(seen), deterministic=False)
    assert step["action"].shape == (3, 3) and step["decision", "pair"].shape == (3, 2, 4, 8)
    log_prob, entropy, value = model.score(model.run_stages(seen).update(step.select("decision")))
    assert torch.equal(log_prob, step["action_log_prob"]) and (entropy == 0).all()
    (log_prob.sum() + value.sum()).backward()
    for part in ("vision_tower", "connector", "language_model", "state_proj", "action_expert", "value_head"):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in getattr(model, part).parameters()), part


def test_checkpointed_activations_change_no_gradient_and_are_computed_again():
    seen, gradients, calls = observations(load_file(RECORDED)), [], []
    for checkpointing in (False, True):
        model = make(gradient_checkpointing=checkpointing)
        count = []
        stacks = (model.vision_tower.encoder, model.language_model, model.action_expert.transformer)
        for stack in stacks:
            stack.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(3)
        model.imitation_loss(model.run_stages(seen), torch.ones(3, 4, 3)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        calls.append(len(count))
    assert gradients[0].keys() == gradients[1].keys() and calls == [4, 8]  # tower, prefix, state, actions
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-6, msg=name)


def test_adapters_train_in_every_layer_of_the_language_model():
    model = make()
    freeze(model, "lora", heads=model.heads)
    adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    parts = [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]
    assert adapted == {f"language_model.layers.{layer}.{part}" for layer in (0, 1) for part in parts}
    seen = observations(load_file(RECORDED))
    with torch.no_grad():
        step = model.decide(model.run_stages(seen), deterministic=False)
    log_prob, _, _ = model.score(model.run_stages(seen).update(step.select("decision")))
    assert torch.equal(log_prob, step["action_log_prob"])
    log_prob.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora_" in n and "layers.0." in n)


def test_the_full_size_is_that_of_the_published_weights():
    options = {**FULL, "pretrained": None, "config": {"num_vlm_layers": 16}, "statistics": None, "tokenizer": None}
    with torch.device("meta"):
        model = SmolVLA(7, ("rgb", "proprio", "language"), 8, **options)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    # By hand: 15 heads and 5 of keys of 64 each; layers of 960 and, in the expert, of 720 and 2,048.
    layer = 960 * (960 + 2 * 320) + 960 * 960 + 3 * 960 * 2560 + 2 * 960
    assert sizes["language_model"] == 49280 * 960 + 16 * layer + 960
    own = 2 * 720 * 960 + 3 * 720 * 2048 + 2 * 720
    expert = 16 * own + 8 * (2 * 720 * 320) + 8 * (2 * 320 * 320) + 720
    projections = (32 * 720 + 720) + (720 * 32 + 32) + (1440 * 720 + 720) + (720 * 720 + 720)
    assert sizes["action_expert"] == expert + projections
    with_the_head = sum(sizes.values()) - sizes["value_head"] + 49280 * 960
    assert with_the_head == 450_046_176
    assert (model.horizon, model.room, model.language_model.config.num_hidden_layers) == (50, 32, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": ("proprio", "language")}, "SmolVLA: modalities name no picture"),
        ({"modalities": ("rgb", "depth")}, "modalities are rgb, proprio, language"),
        ({"executed": 5}, "executed is 5, and the model has room for 4"),
        ({"proprio_dim": 9}, "proprio_dim is 9, and the model has room for 8"),
    ],
)
def test_what_has_no_room_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)
