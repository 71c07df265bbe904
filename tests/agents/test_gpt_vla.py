"""GPTVLAModel on tiny configurations: the contract, what is reused for every freeze scope, weights and tokenizers."""

from __future__ import annotations

import copy
import json
import logging
import sys
import types
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from tensordict import TensorDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    ResNetConfig,
    ResNetForImageClassification,
)
from worlds import WRAP, scores

from agents.checking import check_policy
from agents.gpt_vla import GPTVLAModel
from agents.policy import VLAPolicy
from envs.tabletop import TabletopEnv
from research.config import PPOConfig, split_switches
from research.errors import UserError
from research.schema import decode_text, encode_text
from research.training.freezing import freeze, part_names
from research.training.loss import make_loss

VISION = {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
LANGUAGE = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 256}
TINY = {"vision_encoder": VISION, "language_model": LANGUAGE, "vision_tokens": 4, "action_head_hidden_size": 24}
HEADS = [("gaussian", {}), ("tokens", {"bins": 11})]
RGB, PROPRIO, WORDS = (("observation", key) for key in ("rgb", "proprio", "language"))


def tiny(seed: int = 0, **changes) -> GPTVLAModel:
    torch.manual_seed(seed)
    return GPTVLAModel(3, **{**TINY, **changes}).eval()


def observe(n: int = 4, **options) -> TensorDict:
    options = {"modalities": ["rgb", "proprio", "language"], "image_size": 32, **options}
    return TabletopEnv(n, **options).reset()["observation"]


def acted(policy: VLAPolicy, observations: TensorDict) -> TensorDict:
    """What the update reads of steps taken at `observations`, with made-up advantages."""
    n = len(observations)
    with torch.no_grad():
        steps = policy.act(TensorDict({"observation": observations}, [n]))
    generator = torch.Generator().manual_seed(2)
    for key in ("advantage", "value_target"):
        steps[key] = torch.randn(n, 1, generator=generator)
    return steps.select(*policy.kept_keys, "action", "action_log_prob", "state_value", "advantage", "value_target")


def losses_and_gradients(policy: VLAPolicy, model: nn.Module, batch: TensorDict) -> list[torch.Tensor]:
    losses = make_loss(policy.actor, policy.critic, PPOConfig(ent_coef=0.01))(batch.clone())
    model.zero_grad()
    names = ("loss_objective", "loss_critic", "loss_entropy")
    sum(losses[name] for name in names).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [losses["max_ratio"].detach(), *(losses[name].detach() for name in names), *gradients]


# ----------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize(("head", "options"), HEADS)
def test_all_interfaces_give_equal_losses_and_gradients(head, options):
    build = partial(tiny, action_head=head, head=options)
    policy = VLAPolicy(build())
    check_policy(policy, observe(), (3,))
    batch = acted(policy, observe())
    assert losses_and_gradients(policy, policy.model, batch)[0].item() == pytest.approx(1.0, abs=1e-5)  # the ratio
    batch["action_log_prob"] += 0.1 * torch.randn(4)  # away from ratio 1, where clipping matters
    reference = None
    for name, wrap in WRAP.items():
        policy = VLAPolicy(wrap(build()))
        assert policy.interface == name
        got = losses_and_gradients(policy, policy.model, batch)
        reference = reference or got
        assert len(reference) == len(got) > 30
        for a, b in zip(reference, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("modalities", [["rgb"], ["proprio"], ["language"], ["rgb", "language"], ["proprio", "rgb"]])
def test_any_subset_of_modalities(modalities):
    model, observations = tiny(modalities=modalities), observe(3, modalities=modalities)
    check_policy(VLAPolicy(model), observations, (3,))
    owners = {"rgb": {"vision_encoder", "projector"}, "proprio": {"proprio_projector"}, "language": set()}
    parts = {"language_model", "readout", "action_head", "value_head"}.union(*(owners[m] for m in modalities))
    assert set(part_names(model)) == parts
    model(observations)
    model.get_value(observations).sum().backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if _reached(p)} == parts - {"action_head"}


@pytest.mark.parametrize("cameras", [["rgb_front"], ["rgb", "rgb_wrist"]])
def test_every_camera_is_read_by_one_encoder(cameras):
    model, observations = tiny(modalities=[*cameras, "proprio"]), observe(3, modalities=["rgb", "proprio"])
    seen = observations.select("proprio")
    for turn, camera in enumerate(cameras):
        seen[camera] = observations["rgb"].flip(turn + 1)
    check_policy(VLAPolicy(model), seen, (3,))
    hidden = model.encode(seen)
    for camera in cameras:
        changed = seen.copy().set(camera, seen[camera].roll(1, dims=0))
        assert (model.encode(changed) - hidden).abs().amax(dim=1).min() > 1e-4, camera
    assert set(part_names(model)) >= {"vision_encoder", "projector"}
    tokens = model.vision_encoder(*(seen[camera] for camera in cameras))
    assert tokens.shape[:2] == (3, 4 * len(cameras))


def test_every_observation_matters():
    model, observations = tiny(), observe()
    hidden = model.encode(observations)
    for key in ("rgb", "proprio", "language"):
        changed = observations.copy().set(key, observations[key].roll(1, dims=0))
        assert (model.encode(changed) - hidden).abs().amax(dim=1).min() > 1e-4, key


def test_channels_first_pixels_are_the_same_pixels():
    model, observations = tiny(), observe()
    assert observations["rgb"].shape == (4, 32, 32, 3)
    flipped = observations.copy().set("rgb", observations["rgb"].permute(0, 3, 1, 2).contiguous())
    torch.testing.assert_close(model.encode(observations), model.encode(flipped), rtol=1e-5, atol=1e-6)


def test_pixels_are_normalised_as_imagenet_is():
    model = tiny()
    seen = []
    model.vision_encoder.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.vision_encoder(torch.tensor([255, 0, 128], dtype=torch.uint8).expand(1, 8, 8, 3))
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(seen[0][0, :, 3, 4], torch.tensor(expected))


def test_vision_tokens_pool_the_feature_map():
    observations = observe()
    cells, pooled, one = (tiny(vision_tokens=n).vision_encoder(observations["rgb"]) for n in (None, 4, 1))
    assert cells.shape == (4, 16, 16) and pooled.shape == (4, 4, 16) and one.shape == (4, 1, 16)
    torch.testing.assert_close(pooled[:, 0], cells.view(4, 4, 4, 16)[:, :2, :2].mean(dim=(1, 2)))
    torch.testing.assert_close(one[:, 0], cells.mean(dim=1))


def test_padding_changes_nothing():
    """Neither the padding's length nor the other instructions of the batch."""
    model, observations = tiny(), observe(instruction_length=64)
    hidden = model.encode(observations)
    longest = int((observations["language"] != 0).sum(dim=1).max())
    for length in (longest, 90):
        texts = encode_text(decode_text(observations["language"]), length)
        torch.testing.assert_close(model.encode(observations.copy().set("language", texts)), hidden, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode(observations[1:2]), hidden[1:2], rtol=0, atol=1e-5)


def test_dropout_is_off_in_train_mode_too():
    model, observations = tiny(), observe()
    hidden = model.encode(observations)
    model.language_model.train()
    assert torch.equal(model.encode(observations), hidden)


def test_numbers_stay_in_float32_under_autocast():
    model, observations = tiny(), observe()
    exact = scores(model, observations, torch.zeros(4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        features = model.vision_encoder(observations["rgb"])
        rounded = scores(model, observations, torch.zeros(4, 3))
    assert features.dtype == torch.bfloat16
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


# ----------------------------------------------------------------------------------------------- freezing and reuse


def _reached(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool((parameter.grad != 0).any())


PARTS = {"readout", "language_model", "vision_encoder", "projector", "proprio_projector", "action_head", "value_head"}
SEES = ["vision_encoder", "projector"]
SCOPES = [  # scope, stages that are reused, what the update reads
    ("none", [], {RGB, PROPRIO, WORDS}),
    ("vision", ["vision_encoder"], {"vision_features", PROPRIO, WORDS}),
    ("language", [], {RGB, PROPRIO, WORDS}),
    (["vision", "language"], ["vision_encoder"], {"vision_features", PROPRIO, WORDS}),
    (["projector"], [], {RGB, PROPRIO, WORDS}),
    (["vision", "language", "projector"], SEES, {"vision_tokens", PROPRIO, WORDS}),
    (["vision", "language", "projector", "proprio_projector"], SEES, {"vision_tokens", PROPRIO, WORDS}),
    (["vision", "language", "projector", "readout"], SEES, {"vision_tokens", PROPRIO, WORDS}),
    ("backbone", [*SEES, "hidden"], {"hidden"}),
]


@pytest.mark.parametrize(("scope", "reused", "kept"), SCOPES)
def test_reuse_stops_at_the_first_trainable_part_and_equals_recomputing(scope, reused, kept):
    """A frozen language model behind a trainable projector, readout or proprioception passes gradients on, and is
    never reused."""
    model = tiny()
    frozen = {name.split(".")[0] for name in freeze(model, scope)}
    auto, off = (VLAPolicy(model, feature_reuse=reuse) for reuse in ("auto", "off"))
    assert auto.frozen_stages == reused and set(auto.kept_keys) == kept
    assert off.frozen_stages == [] and set(off.kept_keys) == {RGB, PROPRIO, WORDS}
    observations = observe(8)
    steps = acted(auto, observations)
    scored = steps.select("action", "action_log_prob", "state_value", "advantage", "value_target")
    recomputed = losses_and_gradients(off, model, scored.copy().set("observation", observations))
    assert {n.split(".")[0] for n, p in model.named_parameters() if _reached(p)} == PARTS - frozen
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for a, b in zip(losses_and_gradients(auto, model, steps), recomputed, strict=True):
        assert torch.equal(a, b)  # bit for bit, at equal batch shapes
    halves = torch.cat([acted(auto, part) for part in observations.split(4)]).select(*auto.kept_keys)
    for a, b in zip(losses_and_gradients(auto, model, scored.update(halves)), recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_switches_of_the_configuration_freeze_their_parts():
    switches = {"freeze_vision_encoder": True, "freeze_language_model": True}
    scope, config = split_switches("none", {**TINY, **switches})
    model = GPTVLAModel(3, **config)
    freeze(model, scope)
    trains = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trains == PARTS - {"vision_encoder", "language_model"}
    scope, config = split_switches("none", {**TINY, **dict.fromkeys(switches, False)})
    freeze(model := GPTVLAModel(3, **config), scope)
    assert all(p.requires_grad for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------- memory


def saved_bytes(model: GPTVLAModel, observations: TensorDict) -> int:
    """Bytes that autograd keeps for the backward pass, weights apart."""
    weights = {p.data_ptr() for p in model.parameters()}
    sizes = []

    def pack(tensor):
        sizes.append(0 if tensor.data_ptr() in weights else tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores(model, observations, torch.zeros(len(observations), 3))
    return sum(sizes)


def test_gradient_checkpointing_saves_memory_and_nothing_else():
    observations = observe()
    plain, saving = tiny(), tiny(gradient_checkpointing=True)
    assert plain.state_dict().keys() == saving.state_dict().keys()
    for part in ("language_model", "vision_encoder"):
        runs = {name: count_calls(model, part) for name, model in (("plain", plain), ("saving", saving))}
        with torch.no_grad():
            saving.get_value(observations)
        assert len(runs["saving"]) == 1  # without gradients nothing is computed twice
        runs["saving"].clear()
        for model in (plain, saving):
            model.zero_grad()
            log_prob, entropy, value = scores(model, observations, torch.full((4, 3), 0.3))
            (log_prob.sum() + entropy.sum() + value.sum()).backward()
        assert len(runs["plain"]) == 1 and len(runs["saving"]) == 2
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    assert saved_bytes(saving, observations) < 0.3 * saved_bytes(plain, observations)


def count_calls(model: GPTVLAModel, part: str) -> list:
    """Appended to by every pass through the inside of the part's first block."""
    inside = {
        "language_model": lambda: model.language_model.h[0].mlp,
        "vision_encoder": lambda: model.vision_encoder.network.encoder.stages[0].layers[0].layer,
    }[part]()
    calls = []
    inside.register_forward_pre_hook(lambda *_: calls.append(1))  # recomputing stops before the block ends
    return calls


def test_a_copy_with_gradient_checkpointing_has_weights_of_its_own():
    model, observations = tiny(gradient_checkpointing=True), observe()
    hidden = model.encode(observations)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.language_model.h.parameters():
            p.zero_()
    assert torch.equal(model.encode(observations), hidden)
    assert not torch.allclose(twin.encode(observations), hidden)


# ---------------------------------------------------------------------------------------------------------- weights


def test_vision_weights_from_a_directory_or_a_file(tmp_path):
    torch.manual_seed(7)
    source = ResNetForImageClassification(ResNetConfig(**VISION))  # with a prefix and a classifier, as published ones
    source.resnet.embedder.embedder.normalization.running_mean.fill_(0.3)
    source.save_pretrained(tmp_path)
    torch.save(source.resnet.state_dict(), tmp_path / "bare.pt")
    for weights in (tmp_path, tmp_path / "model.safetensors", tmp_path / "bare.pt"):
        loaded = tiny(vision_weights=str(weights)).vision_encoder.network.state_dict()
        assert loaded.keys() == source.resnet.state_dict().keys()
        assert all(torch.equal(loaded[name], value) for name, value in source.resnet.state_dict().items())


def test_language_weights_from_a_directory_or_a_file(tmp_path):
    torch.manual_seed(7)
    source = GPT2LMHeadModel(GPT2Config(**LANGUAGE))
    source.half().save_pretrained(tmp_path)
    save_file(source.transformer.state_dict(), tmp_path / "bare.safetensors")
    torch.save(source.transformer.state_dict(), tmp_path / "bare.bin")
    ways = [{"language_model": str(tmp_path)}]
    ways += [{"language_weights": str(w)} for w in (tmp_path, tmp_path / "bare.safetensors", tmp_path / "bare.bin")]
    for way in ways:
        model = tiny(**way).language_model
        assert model.dtype == torch.float32 and model.config.attn_pdrop == 0
        expected = source.transformer.state_dict()
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name].float()) for name, value in model.state_dict().items())


def test_another_causal_language_model_from_a_directory(tmp_path):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=256,
        attention_dropout=0.1,
    )
    torch.manual_seed(7)
    LlamaModel(config).save_pretrained(tmp_path)
    model, observations = tiny(language_model=str(tmp_path), gradient_checkpointing=True), observe()
    check_policy(VLAPolicy(model), observations, (3,))
    assert model.language_model.config.attention_dropout == 0
    hidden = model.encode(observations)
    padded = observations.copy().set("language", nn.functional.pad(observations["language"], (0, 9)))
    torch.testing.assert_close(model.encode(padded), hidden, rtol=0, atol=1e-5)
    (tmp_path / "model.safetensors").unlink()
    assert tiny(language_model=str(tmp_path)).language_model.config.model_type == "llama"  # its config alone


def test_fresh_weights_are_said_once(tmp_path, caplog):
    GPT2LMHeadModel(GPT2Config(**LANGUAGE)).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="agents.gpt_vla"):
        tiny()
        assert len(caplog.messages) == 1
        assert "vision_encoder starts from fresh" in caplog.text and "language_model starts from fresh" in caplog.text
        caplog.clear()
        tiny(language_model=str(tmp_path), modalities=["proprio"])
        assert caplog.messages == []
        tiny(language_model=str(tmp_path))
        assert "vision_encoder starts from fresh" in caplog.text and "but reads bytes" in caplog.text


def test_the_configuration_as_users_write_it_has_the_published_sizes():
    config = {
        "action_dim": 7,
        "vision_encoder": "resnet50",
        "language_model": "gpt2-medium",
        "action_head_hidden_size": 512,
    }
    with torch.device("meta"):
        model = GPTVLAModel(**config)
        others = GPTVLAModel(7, vision_encoder="resnet18", language_model="distilgpt2")
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["language_model"] == 354_823_168
    assert count["vision_encoder"] == 23_508_032
    assert count["projector"] == (2048 + 1) * 1024
    assert all(p.is_meta for p in model.parameters())
    assert model.action_head.mean[0].out_features == model.value_head[0].out_features == 512
    assert sum(p.numel() for p in others.vision_encoder.parameters()) == 11_176_512
    assert sum(p.numel() for p in others.language_model.parameters()) == 81_912_576


# -------------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    """A byte-level BPE tokenizer trained on the task's own instructions, in a directory."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = decode_text(observe(64)["language"])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    words.enable_padding(length=50)  # what a file says of padding is not ours
    words.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_instructions_are_tokenized_once_each_and_only_in_collection(tokenizer):
    model = tiny(tokenizer=str(tokenizer), language_model={**LANGUAGE, "vocab_size": 400}, language_tokens=20)
    observations = observe(16)
    ids = model.tokenizer(observations["language"])
    assert ids.shape == (16, 20) and ids.dtype == torch.int64
    texts = decode_text(observations["language"])
    words = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    assert [words.decode(row[row >= 0].tolist()) for row in ids] == texts
    assert (ids >= 0).sum() < 0.5 * (observations["language"] != 0).sum()  # words, not bytes
    assert len(model.tokenizer._known) == len(set(texts))

    auto, off = VLAPolicy(model), VLAPolicy(model, feature_reuse="off")
    check_policy(auto, observations, (3,))
    assert auto.frozen_stages == ["tokenizer"] and set(auto.kept_keys) == {RGB, PROPRIO, "language_ids"}
    steps = acted(auto, observations)
    scored = steps.select("action", "action_log_prob", "state_value", "advantage", "value_target")
    recomputed = losses_and_gradients(off, model, scored.set("observation", observations))
    for a, b in zip(losses_and_gradients(auto, model, steps), recomputed, strict=True):
        assert torch.equal(a, b)

    hidden = model.encode(observations)
    model.tokenizer.length, model.tokenizer._known = 30, {}
    torch.testing.assert_close(model.encode(observations), hidden, rtol=0, atol=1e-5)  # padding changes nothing
    model.tokenizer.length, model.tokenizer._known = 2, {}
    with pytest.raises(UserError, match="more than the 2 of policy.vla_config.model_config.language_tokens"):
        model.encode(observations)


def test_known_instructions_are_bounded(tokenizer, monkeypatch):
    model = tiny(tokenizer=str(tokenizer), language_model={**LANGUAGE, "vocab_size": 400})
    monkeypatch.setattr(type(model.tokenizer), "CAPACITY", 3)
    texts = [f"go to place {i}" for i in range(8)]
    ids = model.tokenizer(encode_text(texts, 64))
    assert [model.tokenizer.words.decode(row[row >= 0].tolist()) for row in ids] == texts
    assert len(model.tokenizer._known) <= 3


# ----------------------------------------------------------------------------------------------------- user's errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": ["rgb", "depth"]}, r"modalities are rgb, proprio, language, got \['rgb', 'depth'\]"),
        ({"modalities": []}, "modalities are rgb, proprio, language"),
        ({"action_head": "diffusion"}, "'gaussian' or 'tokens' or 'categorical', got 'diffusion'"),
        ({"vision_encoder": "resnet51"}, "'resnet51' is not known; did you mean 'resnet50'.*timm:<name>"),
        ({"vision_encoder": {"depth": [1]}}, "vision_encoder: 'depth' is not known; did you mean 'depths'"),
        ({"vision_encoder": {"depths": "many"}}, "vision_encoder: ResNetConfig refuses"),
        ({"language_model": "gpt2-midium"}, "did you mean 'gpt2-medium'.*local directory"),
        ({"language_model": {"n_layers": 2}}, "language_model: 'n_layers' is not known; did you mean 'n_layer'"),
        ({"language_model": {**LANGUAGE, "vocab_size": 100}}, "bytes need a vocab_size of 256 or more"),
        ({"vision_tokens": 5}, "vision_tokens should be a square number"),
        ({"vision_weights": "nowhere.pt"}, "vision_weights: nowhere.pt does not exist"),
        ({"language_weights": "nowhere"}, "language_weights: nowhere does not exist"),
        ({"tokenizer": "nowhere"}, "tokenizer: nowhere does not exist"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)


def refusal(**changes) -> str:
    with pytest.raises(UserError) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.to(torch.int8), "is torch.int8, where"),
        (lambda w: w.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, where"),
        (lambda w: w * float("nan"), "holds a NaN or an infinity"),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_other_numbers_are_refused_by_name(tmp_path, change, message, folder):
    language = GPT2LMHeadModel(GPT2Config(**LANGUAGE)).state_dict()  # with a prefix, as published ones
    del language["lm_head.weight"]  # tied
    language["transformer.h.0.mlp.c_fc.weight"] = change(language["transformer.h.0.mlp.c_fc.weight"])
    vision = ResNetForImageClassification(ResNetConfig(**VISION)).resnet.state_dict()
    vision["embedder.embedder.convolution.weight"] = change(vision["embedder.embedder.convolution.weight"])
    for option, state, name in (
        ("language_weights", language, "h.0.mlp.c_fc.weight"),
        ("vision_weights", vision, "embedder.embedder.convolution.weight"),
    ):
        (tmp_path / option).mkdir()
        file = tmp_path / option / "model.safetensors"
        save_file(state, file)
        assert f"{name} {message}" in refusal(**{option: str(file.parent if folder else file)})


def test_weights_that_do_not_fit_are_refused(tmp_path):
    weights = GPT2LMHeadModel(GPT2Config(**LANGUAGE)).transformer.state_dict()
    file = tmp_path / "some.safetensors"
    save_file({name: value for name, value in weights.items() if not name.startswith("h.1")}, file)
    assert "lacks 12 of the weights of GPT2Model: h.1." in refusal(language_weights=str(file))
    save_file({**weights, "ln_f.weight": torch.ones(5)}, file)
    assert "ln_f.weight should be [16], got [5]" in refusal(language_weights=str(file))
    file.write_bytes(b"not a checkpoint")
    assert "some.safetensors cannot be loaded" in refusal(language_weights=str(file))
    assert "cannot be loaded" in refusal(vision_weights=str(tmp_path))  # a directory with no weights for it
    torch.save({"weights": refusal}, tmp_path / "code.pt")
    assert "code.pt cannot be loaded" in refusal(vision_weights=str(tmp_path / "code.pt"))
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(language_model=str(tmp_path))


def test_tokenizers_that_cannot_be_used_are_refused(tokenizer, tmp_path):
    assert "tokenizer.json has ids up to 336, but language_model knows 256 tokens" in refusal(tokenizer=str(tokenizer))
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    assert "has no vocabulary" in refusal(tokenizer=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": "?"}))
    assert "tokenizer.json cannot be read" in refusal(tokenizer=str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    assert "tokenizer.json does not exist" in refusal(tokenizer=str(tmp_path))


def test_observations_that_do_not_fit_are_named():
    model, observations = tiny(), observe(2)
    with pytest.raises(UserError, match="reads rgb, but the environment offers"):
        check_policy(VLAPolicy(model), observations.exclude("rgb"), (3,))
    with pytest.raises(UserError, match="proprio has 8 numbers, but proprio_dim is 3; set .*proprio_dim: 8"):
        model.encode(observations.copy().set("proprio", torch.zeros(2, 8)))
    with pytest.raises(UserError, match="a sequence of 206 tokens is longer than the 128 positions"):
        model.encode(observations.copy().set("language", torch.ones(2, 200, dtype=torch.int64)))


# ------------------------------------------------------------------------------------------------------------- timm


def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "needs timm, which cannot be imported" in refusal(vision_encoder="timm:resnet50")


class TimmLike(nn.Module):
    """What is used of a timm model: its feature maps, their channels, and how it wants its pixels."""

    feature_info = [{"num_chs": 8}, {"num_chs": 12}]
    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 8, stride=8)

    def forward_intermediates(self, x, indices, norm, intermediates_only):
        assert indices == 1 and norm and intermediates_only
        assert x.min() >= -1 and x.max() <= 1
        return [self.stem(x)]


def test_timm_models_serve_as_vision_encoder(monkeypatch, tmp_path):
    timm = types.SimpleNamespace(
        is_model=lambda name: name == "small",
        list_models=lambda: ["small"],
        create_model=lambda name, pretrained, num_classes: TimmLike(),
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert "did you mean 'timm:small'?" in refusal(vision_encoder="timm:smal")
    weights = TimmLike().state_dict()
    torch.save({**weights, "fc.weight": torch.ones(2, 2)}, tmp_path / "small.pth")
    model = tiny(vision_encoder="timm:small", vision_weights=str(tmp_path / "small.pth"))
    assert torch.equal(model.vision_encoder.network.stem.weight, weights["stem.weight"])
    check_policy(VLAPolicy(model), observe(), (3,))
    torch.save({"stem.bias": weights["stem.bias"]}, tmp_path / "small.pth")
    assert "lacks 1 of the weights of small: stem.weight" in refusal(
        vision_encoder="timm:small", vision_weights=str(tmp_path / "small.pth")
    )
