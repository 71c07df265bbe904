"""DualEncoderVLA: frozen up to any block, the kept features are what was acted on; every modality may be missing."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from pretrained_worlds import LITE0, TINY_BERT
from safetensors.torch import load_file
from tensordict import TensorDict
from worlds import LOSS_KEYS, WRAP, count_calls, gradients_of, rollout_batch, scores

from agents.checking import check_policy
from agents.constancy import check_constant
from agents.dual_encoder_vla import DualEncoderVLA, Fusion
from agents.loading import load_vla_model
from agents.policy import VLAPolicy
from agents.provided_weights import save_trained
from agents.weights import read_weights
from envs.tabletop import TabletopEnv
from research.errors import UserError
from research.training.freezing import freeze, part_names

TINY = {"vision_weights": None, "language_encoder": TINY_BERT, "proprio_dim": 3, "width": 8, "queries": 2}
SEE, BLOCKS = ("observation", "rgb"), "vision_encoder.blocks."


def tiny(seed: int = 0, **changes) -> DualEncoderVLA:
    torch.manual_seed(seed)
    return DualEncoderVLA(3, **{**TINY, "hidden_size": 24, **changes}).eval()


def observe(n: int = 4, size: int = 32, modalities=("rgb", "proprio", "language")) -> TensorDict:
    return TabletopEnv(n, modalities=list(modalities), image_size=size).reset()["observation"]


def two_cameras() -> TensorDict:
    observations = observe()
    return observations.set("rgb_wrist", observations["rgb"].flip(1).contiguous())


# --- the contract ---


@pytest.mark.parametrize(("head", "options"), [("gaussian", {}), ("tokens", {"bins": 11})])
def test_all_interfaces_give_equal_losses_and_gradients(head, options):
    build = partial(tiny, action_head=head, head=options)
    check_policy(VLAPolicy(build()), observe(), (3,))
    batch = rollout_batch(VLAPolicy(build()))
    batch["action_log_prob"] += 0.1 * torch.randn(len(batch))  # away from ratio 1, where clipping matters
    reference = None
    for wrap in WRAP.values():
        got = gradients_of(VLAPolicy(wrap(build())), batch.clone())
        reference = reference or got
        assert len(reference) == len(got) > 30
        for a, b in zip(reference, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modalities", [["rgb"], ["proprio"], ["language"], ["rgb", "language"], ["proprio", "rgb"]])
def test_any_subset_of_modalities(modalities):
    model, observations = tiny(modalities=modalities), observe(3, modalities=modalities)
    check_policy(VLAPolicy(model), observations, (3,))
    owners = {"rgb": {"vision_encoder"}, "language": {"language_encoder"}, "proprio": set()}
    assert set(part_names(model)) == {"fusion", "action_head", "value_head"}.union(*(owners[m] for m in modalities))
    model.get_value(observations).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("action_head"))


def test_every_observation_matters():
    model, observations = tiny(), observe()
    hidden = model.encode(observations)
    for key in ("rgb", "proprio", "language"):
        changed = observations.copy().set(key, observations[key].roll(1, dims=0))
        assert (model.encode(changed) - hidden).abs().amax(dim=1).min() > 1e-5, key


def test_channels_first_pixels_are_the_same_pixels():
    model, observations = tiny(), observe()
    flipped = observations.copy().set("rgb", observations["rgb"].permute(0, 3, 1, 2).contiguous())
    torch.testing.assert_close(model.encode(observations), model.encode(flipped), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [32, 72, 96, 128])
def test_pictures_of_every_size_are_read(size):
    check_policy(VLAPolicy(tiny()), observe(2, size), (3,))


def test_further_cameras_go_through_the_same_encoder_and_are_told_apart():
    model, observations = tiny(modalities=["rgb", "rgb_wrist", "language"]), two_cameras()
    check_policy(VLAPolicy(model), observations, (3,))
    swapped = observations.copy().set("rgb", observations["rgb_wrist"]).set("rgb_wrist", observations["rgb"])
    with torch.no_grad():
        one, two = (model.run_stages(o)["vision_block_10"] for o in (observations, swapped))
        torch.testing.assert_close(one, two.flip(1), rtol=1e-4, atol=1e-5)
        assert (model.encode(observations) - model.encode(swapped)).abs().amax(dim=1).min() > 1e-5


def test_a_plan_is_longer_than_what_is_executed():
    model, observations = tiny(horizon=6, executed=4), observe()
    check_policy(VLAPolicy(model), observations, (4, 3))
    assert model.action_head.plan(model.encode(observations)).shape == (4, 6, 3)


def test_a_model_goes_to_other_processes_whole():
    model, observations = tiny(), observe()
    assert torch.equal(pickle.loads(pickle.dumps(model)).encode(observations), model.encode(observations))


# --- what is frozen runs once ---

UP_TO = {  # scope -> the frozen block behind which the update begins, the first block that it runs
    "middle of a level": (["vision_encoder.stem", f"{BLOCKS}[0-7].*"], 7, 8),
    "end of a level": (["vision_encoder.stem", f"{BLOCKS}[0-4].*"], 4, 5),
    "first block": (["vision_encoder.stem", f"{BLOCKS}0"], 0, 1),
    "all": ("vision", 10, None),
    "all but the stem": ([f"{BLOCKS}*"], None, 0),
    "blocks in between": (["vision_encoder.stem", f"{BLOCKS}[2-9].*"], None, 0),
}


@pytest.mark.parametrize("scope", UP_TO)
def test_the_vision_encoder_is_reused_up_to_its_first_weight_that_trains(scope):
    patterns, last_kept, first_run = UP_TO[scope]
    model = tiny()
    freeze(model, patterns)
    policies = {reuse: VLAPolicy(model, feature_reuse=reuse) for reuse in ("auto", "off")}
    check_constant(policies["auto"], observe())
    keys = {reuse: policy.kept_keys for reuse, policy in policies.items()}
    assert SEE in keys["off"] and (SEE in keys["auto"]) == (last_kept is None)
    policies["auto"].kept_keys = list(dict.fromkeys([*keys["auto"], *keys["off"]]))
    both = rollout_batch(policies["auto"])
    kept = both.select(*keys["auto"], *LOSS_KEYS)
    maps = [4, 10] if first_run is None else [4, 7] if last_kept == 7 else [last_kept] * (last_kept is not None)
    assert sorted(k for k in keys["auto"] if str(k).startswith("vision")) == sorted(f"vision_block_{i}" for i in maps)
    assert all(kept[f"vision_block_{i}"].dtype == torch.float16 for i in maps)
    with torch.no_grad():
        log_prob, _, _ = model.score(policies["auto"].rest(kept.copy()))
    assert (log_prob - kept["action_log_prob"]).exp().sub(1).abs().max() < 1e-5  # the ratio of the first minibatch

    calls = [count_calls(block) for block in model.vision_encoder.blocks]
    gradients_of(policies["auto"], kept)
    runs = [len(found) for found in calls]
    first = len(runs) if first_run is None else first_run
    assert runs == [0] * first + [1] * (len(runs) - first)
    for i, block in enumerate(model.vision_encoder.blocks):
        for p in block.parameters():
            assert (p.grad is None) == (not p.requires_grad), i
            assert p.grad is None or p.grad.abs().max() > 0, i
    # At equal batch shapes (which decide in what order sums are taken), as if nothing were kept.
    with torch.no_grad():
        both.update(policies["auto"].frozen(both.select("observation")))
    auto, off = (gradients_of(policy, both.select(*keys[reuse], *LOSS_KEYS)) for reuse, policy in policies.items())
    for a, b in zip(auto, off, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_what_trains_is_not_rounded():
    """Gradients of what is kept in half precision would be in half precision too, and vanish where they are small."""
    model = tiny()
    step = model.run_stages(observe())
    assert step["vision_block_4"].dtype == step["vision_block_10"].dtype == torch.float32
    freeze(model, ["vision_encoder.stem", f"{BLOCKS}[0-7].*"])
    step = model.run_stages(observe())
    assert step["vision_block_7"].dtype == torch.float16 and step["vision_block_10"].dtype == torch.float32


def test_rounding_costs_a_thousandth_of_a_channels_deviation():
    model, observations = tiny(), observe()
    exact = model.run_stages(observations)
    freeze(model, "vision")
    rounded = model.run_stages(observations)
    for key in ("vision_block_4", "vision_block_10"):
        difference = (rounded[key] - exact[key]).abs().max()
        assert 0 < difference < 0.005 * exact[key].std(), key


def test_a_frozen_language_encoder_runs_once_per_instruction_ever():
    model = tiny()
    freeze(model, "language")
    policy = VLAPolicy(model)
    calls = count_calls(model.language_encoder)
    batch = rollout_batch(policy, num_envs=4, steps=8)
    assert policy.frozen_stages == ["language_encoder"] and ("observation", "language") not in policy.kept_keys
    at_collection = len(calls)
    assert 0 < at_collection <= len(batch["language_features"].unique(dim=0))
    gradients_of(policy, batch)
    assert len(calls) == at_collection


def test_a_language_encoder_that_trains_runs_on_distinct_instructions():
    model = tiny()
    policy = VLAPolicy(model)
    assert policy.shared_stages == ["language_encoder"]
    batch = rollout_batch(policy, num_envs=2, steps=16)
    rows = []
    model.language_encoder.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    gradients_of(policy, batch)
    assert rows == [len(batch["observation", "language"].unique(dim=0))]
    assert all(p.grad.abs().max() > 0 for n, p in model.language_encoder.named_parameters() if "key.bias" not in n)


def test_both_encoders_frozen_neither_pixels_nor_bytes_are_kept():
    model = tiny()
    freeze(model, ["vision", "language"])
    kept = VLAPolicy(model).kept_keys
    assert set(kept) == {"vision_block_4", "vision_block_10", "language_features", ("observation", "proprio")}
    assert scores(model, observe(), torch.zeros(4, 3))[0].shape == (4,)


# --- the fusion ---


def one_question(levels: int = 1) -> Fusion:
    """Attends to wherever the first feature is large; a level's channel is a place's first number."""
    fusion = Fusion((1,) * levels, 1, 0, 0, width=2, queries=1, hidden_size=4)
    for level in fusion.levels:
        level[1].weight.data.copy_(torch.tensor([[1.0], [0.0]]))
        level[1].bias.data.zero_()
    fusion.places.data.zero_()
    fusion.standing.data.copy_(torch.tensor([[100.0, 0.0]]))
    return fusion


def test_an_answer_says_where_it_attends_to():
    """x right, y up, the picture's edges at -1 and 1; all places alike, its middle."""
    maps = torch.zeros(1, 1, 4, 8, 1)
    maps[0, 0, 0, 7] = 5.0  # the upper right corner of 4 rows and 8 columns
    corner, nowhere = one_question().answers([maps], None)[0, 0], one_question().answers([0 * maps], None)[0, 0]
    torch.testing.assert_close(corner, torch.tensor([5.0, 0.0, 7 / 8, 3 / 4]))
    torch.testing.assert_close(nowhere, torch.zeros(4))


def test_the_instruction_decides_where_to_look():
    model, observations = tiny(), observe()
    step = model.run_stages(observations)
    maps = [step[key][:1].expand(4, -1, -1, -1, -1) for key in ("vision_block_4", "vision_block_10")]
    language = torch.randn(4, 8)
    with torch.no_grad():
        answers = model.fusion.answers(maps, language)[..., -2:]
    assert torch.pdist(answers.flatten(1)).min() > 1e-4


def test_a_coarser_cell_stands_for_the_finer_ones_that_it_covers():
    fine, coarse = torch.zeros(1, 1, 4, 4, 1), torch.arange(1.0, 5.0).view(1, 1, 2, 2, 1)
    tokens, _ = one_question(2)._tokens([fine, coarse])
    expected = torch.tensor([[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])
    torch.testing.assert_close(tokens[0, :, 0].view(4, 4), expected)


def test_standardisation_is_fitted_to_data_whatever_its_batches():
    model, observations = tiny(modalities=["rgb", "rgb_wrist", "proprio", "language"]), two_cameras()
    observations["proprio"][:, 1] = 0.5  # a number that never varies
    model.fit_normalisation(observations, batch=3)
    step = model.run_stages(observations)
    for level, key in zip(model.fusion.levels, ("vision_block_4", "vision_block_10"), strict=True):
        rows = level[0](step[key]).detach().flatten(0, -2)
        torch.testing.assert_close(rows.mean(dim=0), torch.zeros(rows.shape[1]), rtol=0, atol=1e-3)
        torch.testing.assert_close(rows.std(dim=0, correction=0), torch.ones(rows.shape[1]), rtol=1e-3, atol=0)
    fitted = model.fusion.proprio
    torch.testing.assert_close(fitted.mean, observations["proprio"].mean(dim=0))
    assert fitted.std[1] == pytest.approx(1e-3)
    torch.testing.assert_close(fitted.std[0], observations["proprio"][:, 0].std(correction=0))


# --- the real weights ---


@pytest.fixture(scope="module")
def pretrained() -> DualEncoderVLA:
    torch.manual_seed(0)
    return DualEncoderVLA(3, proprio_dim=3).eval()


def test_both_encoders_are_pretrained_and_say_so(pretrained):
    assert set(pretrained.provided_weights) == {"vision_encoder", "language_encoder"}
    (weights,) = read_weights(LITE0)
    scale = weights["_bn0.weight"] / (weights["_bn0.running_var"] + 1e-3).sqrt()
    expected = weights["_conv_stem.weight"] * scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(pretrained.vision_encoder.stem.weight.data, expected)
    assert tiny().provided_weights == {}


def test_a_file_of_what_was_trained_is_small_and_comes_back_whole(pretrained, tmp_path):
    path, config = tmp_path / "w.safetensors", {"action_dim": 3, "proprio_dim": 3}
    assert save_trained(pretrained, path) == pretrained.provided_weights
    assert path.stat().st_size < 3e6
    assert {name.split(".")[0] for name in load_file(path)} == {"fusion", "action_head", "value_head"}
    torch.manual_seed(1)
    loaded = load_vla_model(path, "agents.dual_encoder_vla.DualEncoderVLA", config).eval()
    observations = observe(2, 64)
    assert torch.equal(loaded.encode(observations), pretrained.encode(observations))


def test_a_file_on_top_of_other_vision_weights_is_refused(pretrained, tmp_path):
    path = tmp_path / "w.safetensors"
    save_trained(pretrained, path)
    (weights,) = read_weights(LITE0)
    weights["_bn0.weight"] *= 1.001
    torch.save(weights, tmp_path / "other.pth")
    for other, said in ((str(tmp_path / "other.pth"), "is given others"), (None, "is given none")):
        config = {"action_dim": 3, "proprio_dim": 3, "vision_weights": other}
        with pytest.raises(UserError, match=f"trained on top of the vision_encoder with SHA-256 .*{said}"):
            load_vla_model(path, "agents.dual_encoder_vla.DualEncoderVLA", config)


# --- bad input ---


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"modalities": []}, "modalities are rgb, proprio, language, got"),
        ({"modalities": ["rgb", "depth"]}, "modalities are rgb, proprio, language, got"),
        ({"vision_encoder": "resnet50"}, "vision_encoder: 'resnet50' is not known; there are efficientnet_lite0"),
        ({"vision_weights": "package:no_such_weights"}, "vision_weights: the package 'no_such_weights' is not"),
        ({"executed": 2}, "executes 1 to horizon = 1 steps"),
    ],
)
def test_wrong_settings_are_refused(config, expected):
    with pytest.raises(UserError, match=expected):
        tiny(**config)


def test_proprioception_of_another_size_names_the_option():
    with pytest.raises(UserError, match=r"proprio has 3 numbers, but proprio_dim is 5; set policy.*proprio_dim: 3"):
        check_policy(VLAPolicy(tiny(proprio_dim=5)), observe(), (3,))
