"""Every family of models keeps one contract, on tiny random weights: `FAMILIES` is the list."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from worlds import ROOT, freeze_with_residual, gae, total_loss

from agents.dual_encoder_vla import DualEncoderVLA
from agents.families import recognise, told_apart
from agents.loading import load_vla_model
from agents.openvla import OpenVLA
from agents.pi0 import Pi0VLA
from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from agents.smolvla import SmolVLA
from envs.tabletop import TabletopEnv
from research.config import PPOConfig
from research.errors import UserError
from research.training.algorithm import Progress
from research.training.audit import FreezeAudit
from research.training.freezing import freeze, named_parameters_within, parameter_groups
from research.training.lora import is_adapter, merge_lora
from research.training.loss import make_loss
from research.training.ppo import PPO, PolicyUpdate
from research.training.rollout import Rollouts

MODALITIES = ["rgb", "proprio", "language"]
CHUNK = 2


def arguments(name: str) -> dict:
    config = json.loads((ROOT / "experiments" / "configs" / f"{name}_tiny.json").read_text())
    return config["policy"]["vla_config"]["model_config"]


def pi0(modalities=MODALITIES, **options) -> Pi0VLA:
    return Pi0VLA(3, modalities, proprio_dim=3, executed=CHUNK, **{**arguments("pi0"), **options})


def pi0_noise(modalities=MODALITIES, **options) -> Pi0VLA:
    return pi0(modalities, **{"noise": [0.08, 0.16], **options})


def smolvla(modalities=MODALITIES, **options) -> SmolVLA:
    return SmolVLA(3, modalities, proprio_dim=3, executed=CHUNK, **{**arguments("smolvla"), **options})


def openvla(modalities=("rgb", "language"), **options) -> OpenVLA:
    return OpenVLA(3, modalities, executed=CHUNK, **{**arguments("openvla"), **options})


def openvla_oft(modalities=("rgb", "language"), **options) -> OpenVLA:
    options = {**arguments("openvla_oft"), "horizon": 2 * CHUNK, **options}
    return OpenVLA(3, modalities, executed=CHUNK, **options)


def dual_encoder(modalities=MODALITIES) -> DualEncoderVLA:
    language = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return DualEncoderVLA(
        3, modalities, 3, vision_weights=None, language_encoder=language, hidden_size=32, horizon=CHUNK
    )


def small(modalities=MODALITIES) -> SmallVLA:
    return SmallVLA(3, modalities, token_size=8, hidden_size=32, horizon=CHUNK)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "pi0": pi0,
    "pi0_noise": pi0_noise,
    "smolvla": smolvla,
    "openvla": openvla,
    "openvla_oft": openvla_oft,
    "dual_encoder": dual_encoder,
    "small": small,
}
OWN_FOLDER = ("pi0", "pi0_noise", "smolvla", "openvla", "openvla_oft")  # those with a checkpoint's layout of their own
# The parts of a family: what sees, what leads to the language model, what reads, what else is before the heads.
PARTS = {
    "pi0": ("vision_tower", "projector", "language_model", ()),
    "pi0_noise": ("vision_tower", "projector", "language_model", ()),
    "smolvla": ("vision_tower", "connector", "language_model", ()),
    "openvla": ("vision_backbone", "projector", "language_model", ()),
    "openvla_oft": ("vision_backbone", "projector", "language_model", ()),
    "dual_encoder": ("vision_encoder", None, "language_encoder", ("fusion",)),
    "small": ("vision_encoder", None, "language_encoder", ("fusion",)),
}
HEADS = {
    "pi0": {"action_expert", "value_head"},
    "pi0_noise": {"action_expert", "value_head", "noise_head"},
    "smolvla": {"state_proj", "action_expert", "value_head"},
    "openvla": {"language_model", "value_head"},  # of the first its head
    "openvla_oft": {"language_model", "value_head"},
    "dual_encoder": {"action_head", "value_head"},
    "small": {"action_head", "value_head"},
}
# Where `lora_targets` puts adapters.
ADAPTED = {family: {"language_model"} for family in ("pi0", "pi0_noise", "smolvla")}
SCOPES = ["none", "vision", "language", "backbone", "lora", ("vision", "lora")]


def trained_parts(family: str, scope: str | tuple[str, ...]) -> set[str]:
    """Which parts a scope trains, by its definition."""
    vision, before, language, others = PARTS[family]
    backbone = {part for part in (vision, before, language, *others) if part}
    scopes = [scope] if isinstance(scope, str) else scope
    if "lora" in scopes:
        backbone &= ADAPTED.get(family, backbone)
    elif "backbone" in scopes:
        backbone = set()
    frozen = {"vision": vision, "language": language}
    left = backbone - {frozen[preset] for preset in scopes if preset in frozen}
    heads = HEADS[family] - ({language} if "language" in scopes else set())
    return left | heads


@cache
def fresh(family: str) -> nn.Module:
    """Never changed: copied."""
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def make(family: str, scope: str | tuple[str, ...] = "none", **options) -> VLAPolicy:
    model = copy.deepcopy(fresh(family))
    heads = getattr(model, "heads", None) or ("action_head", "value_head")
    freeze(model, scope, heads=heads)
    return VLAPolicy(model, **options)


def adapted(family: str) -> VLAPolicy:
    """With adapters as they are after some training."""
    policy = make(family, "lora")
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if is_adapter(name):
                parameter.add_(0.02 * torch.randn_like(parameter))
    return policy


def world(num_envs: int = 4) -> TabletopEnv:
    return TabletopEnv(num_envs, "reach", modalities=MODALITIES, image_size=32, chunk=CHUNK)


@cache
def looks(cameras: tuple[str, ...] = ("rgb",)) -> TensorDict:
    """Observations `[4]`, from as many cameras; never changed."""
    seen = world().reset()["observation"]
    return seen.update({camera: seen["rgb"].flip(turn).contiguous() for turn, camera in enumerate(cameras[1:], 1)})


@torch.no_grad()
def mode_and_value(model: nn.Module, seen: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(6)  # for what a flow denoises
    step = model.decide(model.run_stages(seen), deterministic=True)
    return step["action"], step["state_value"]


def scored(model: nn.Module, seen: TensorDict) -> tuple[TensorDict, tuple[torch.Tensor, ...]]:
    """A decision, and its score."""
    torch.manual_seed(5)
    with torch.no_grad():
        step = model.decide(model.run_stages(seen), deterministic=False)
    return step, model.score(model.run_stages(seen).update(step.select(*model.decision_keys)))


def rollout_of(policy: VLAPolicy) -> TensorDict:
    torch.manual_seed(1)
    return Rollouts(world(), policy, 32).next()


@cache
def collected(family: str, scope: str | tuple[str, ...]) -> TensorDict:
    """What a fresh policy collects; never changed: copied."""
    return rollout_of(make(family, scope))


def batch_of(policy: VLAPolicy, rollout: TensorDict) -> TensorDict:
    return gae(policy)(rollout.clone())[0]


def update_of(policy: VLAPolicy, **cfg) -> PPO:
    settings = PPOConfig(**{"learning_rate": 1e-3, "n_epochs": 1, "batch_size": 16, "ent_coef": 0.0, **cfg})
    optimizer = torch.optim.Adam(parameter_groups(policy.model, settings.learning_rate, {}), eps=1e-5)
    head = [p for p in named_parameters_within(policy.model, ["value_head"]).values() if p.requires_grad]
    step = PolicyUpdate(make_loss(policy.actor, policy.critic, settings), optimizer, settings, head, True)
    return PPO(gae(policy, settings), step, settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["none", "vision", "backbone"])
def test_what_is_scored_is_what_acted(family, scope):
    policy = make(family, scope)
    batch = batch_of(policy, collected(family, scope))
    assert batch["action"].shape == (32, CHUNK, 3) and batch["action_log_prob"].shape == (32,)
    losses = total_loss(policy, batch, ent_coef=0.0)
    assert losses["max_ratio"].item() == pytest.approx(1.0, abs=1e-5) and losses["clip_fraction"] == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_a_scope_trains_what_it_says_and_leaves_the_rest_bit_identical(family, scope):
    policy = make(family, scope)
    model = policy.model
    parts = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert parts == trained_parts(family, scope)
    audit = FreezeAudit(model, [n for n, p in model.named_parameters() if not p.requires_grad], policy.reused_modules)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ppo = update_of(policy)
    batch, _ = ppo.prepare(collected(family, scope).clone())
    ppo.update(batch, Progress(iterations=1))
    audit.check("after an update")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (parameter.requires_grad and not unread(family, name)), name


def unread(family: str, name: str) -> bool:
    """Weights that no action depends on."""
    if family.startswith("openvla"):  # the towers' features are those of the last block but one
        tower = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
        return name.startswith(tuple(f"{t}{part}" for t in tower for part in ("blocks.2.", "norm.", "attn_pool.")))
    if family not in ADAPTED:
        return False
    # Experts read keys and values, and not the prefix's last states; of the value, the gradient ends at its head.
    last = "language_model.layers.1."
    of_keys = tuple(f"{last}{part}" for part in ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj"))
    others = ("language_model.norm", "action_expert.transformer.embed_tokens", "vision_tower.head")
    return name.startswith((last, *others)) and not name.startswith(of_keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_residual_is_added_where_actions_are_drawn_at_once_from_features(family):
    model = copy.deepcopy(fresh(family))
    if family not in ("dual_encoder", "small"):
        with pytest.raises(UserError, match=rf"^policy\.freeze: .* and {type(model).__name__} has none"):
            freeze_with_residual(model, looks())
        return
    freeze_with_residual(model, looks())
    policy = VLAPolicy(model)
    assert policy.frozen_stages[-1] == "pretrained_mean+pretrained_std"
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "residual", "value_head",
    }  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ppo, rollout = update_of(policy), rollout_of(policy)
    for _ in range(2):  # at first the layers before the last, which is zero, have no gradient
        ppo.update(ppo.prepare(rollout.clone())[0], Progress(iterations=1))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["vision", "backbone"])
def test_reuse_changes_no_number(family, scope):
    kept, anew = make(family, scope), make(family, scope, feature_reuse="off")
    assert kept.frozen_stages and not anew.frozen_stages
    batches = [batch_of(kept, collected(family, scope)), batch_of(anew, rollout_of(anew))]
    # An instruction that is encoded by itself, once, differs in the last bits from one in a batch.
    close = 1e-5 if "language_encoder" in kept.frozen_stages else 0
    for key in ("action", "action_log_prob", "state_value"):
        torch.testing.assert_close(batches[0][key], batches[1][key], rtol=0, atol=close)
    for policy, batch in zip((kept, anew), batches, strict=True):
        losses = total_loss(policy, batch, ent_coef=0.0)
        (losses["loss_objective"] + losses["loss_critic"]).backward()
    pairs = zip(kept.model.named_parameters(), anew.model.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=max(close, 1e-6), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_add_up_to_the_minibatch(family):
    gradients = []
    for micro in (None, 5):
        policy = make(family, "vision")
        ppo = update_of(policy, micro_batch_size=micro, normalize_advantage=False)
        batch, _ = ppo.prepare(collected(family, "vision").clone())
        ppo.policy_update._accumulate(batch[:16], value_only=False)
        gradients.append([p.grad for p in policy.model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_does_the_same_and_its_mode_repeats(family):
    policy, other = make(family), make(family)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.1)
    other.model.load_state_dict(policy.model.state_dict())
    step = world().reset()
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        actions = []
        for one in (policy, policy, other):
            torch.manual_seed(6)  # for what a flow denoises
            actions.append(one.act(step.copy())["action"])
    assert torch.equal(actions[0], actions[1]) and torch.equal(actions[0], actions[2])
    assert torch.equal(policy.values(step), other.values(step))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_act_and_score_as_before(family):
    model = adapted(family).model
    assert any(is_adapter(name) for name in model.state_dict())
    step, before = scored(model, looks())
    without, after = (
        one.score(one.run_stages(looks()).update(step.select(*model.decision_keys)))
        for one in (fresh(family), merge_lora(model))
    )
    assert (before[0] - without[0]).abs().max() > 1e-3
    assert model.state_dict().keys() == fresh(family).state_dict().keys()
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", OWN_FOLDER)
def test_exported_after_training_and_loaded_it_acts_and_values_the_same(family, tmp_path):
    model = merge_lora(adapted(family).model)
    with torch.no_grad():
        for parameter in model.value_head.parameters():
            parameter.add_(0.1)
    model.export(tmp_path / "out")
    sizes = ("config", "vlm") if family == "smolvla" else ("config",)
    action = {"q01": [-1.0] * 3, "q99": [1.0] * 3}  # as they are: OpenVLA does not go without
    (tmp_path / "stats.json").write_text(json.dumps({"action": action}))
    options = {"statistics": str(tmp_path / "stats.json")} if family.startswith("openvla") else {}
    loaded = FAMILIES[family](pretrained=str(tmp_path / "out"), **dict.fromkeys(sizes), **options).eval()
    for one, other in zip(mode_and_value(model, looks()), mode_and_value(loaded, looks()), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(mode_and_value(fresh(family), looks())[1], mode_and_value(loaded, looks())[1])


@pytest.mark.parametrize("family", ["pi0", "smolvla", "openvla"])
def test_a_familys_folder_is_not_taken_for_weights_alone(family, tmp_path):
    """Its statistics would be left out: with `strict: false` OpenVLA loaded, and acted in other units."""
    model = fresh(family)
    model.export(tmp_path / "out")
    where, what = f"{type(model).__module__}.{type(model).__name__}", {"action_dim": 3, **arguments(family)}
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        for strict in (True, False):
            with pytest.raises(UserError, match=r"out is a folder .* set policy.vla_config.model_config.pretrained to"):
                load_vla_model(path, where, what, strict=strict)


@pytest.mark.parametrize("family", OWN_FOLDER)
def test_gradients_are_the_same_where_activations_are_computed_again(family):
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, count = FAMILIES[family](gradient_checkpointing=checkpointing).eval(), []
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        step, _ = scored(model, looks())
        count.clear()
        torch.manual_seed(6)
        again = model.run_stages(looks()).update(step.select(*model.decision_keys))
        plan = torch.zeros(4, model.horizon, 3)
        (model.score(again)[0] + model.imitation_loss(again, plan)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        calls.append(len(count))
    assert calls[1] > 1.7 * calls[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_camera_is_looked_at(family):
    cameras = ("rgb", "rgb_left", "rgb_right")
    torch.manual_seed(0)
    model = FAMILIES[family]([*cameras, *fresh(family).observation_keys[1:]]).eval()
    seen = looks(cameras)
    step, score = scored(model, seen)
    torch.testing.assert_close(score[0], step["action_log_prob"], rtol=1e-5, atol=1e-5)
    for camera in cameras:
        other = seen.clone().set(camera, 255 - seen[camera])
        changed = model.score(model.run_stages(other).update(step.select(*model.decision_keys)))
        assert (changed[0] != score[0]).all(), camera


@pytest.mark.parametrize(
    ("family", "absent"), [(f, m) for f in FAMILIES for m in ("proprio", "language") if m in fresh(f).observation_keys]
)
def test_it_acts_without_a_modality(family, absent):
    torch.manual_seed(0)
    model = FAMILIES[family]([key for key in fresh(family).observation_keys if key != absent]).eval()
    seen = looks().exclude(absent)
    step, score = scored(model, seen)
    assert step["action"].shape == (4, CHUNK, 3)
    torch.testing.assert_close(score[0], step["action_log_prob"], rtol=1e-5, atol=1e-5)
    keys = {key for stage in model.stages() for key in stage.in_keys} | set(model.context_keys)
    assert ("observation", absent) not in keys and absent not in VLAPolicy(model).kept_keys


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["model.dit.layers.0.mlp.up_proj.weight", "action_out_proj.bias"], "pi0"),
        (["model.paligemma_with_expert.gemma_expert.lm_head.weight"], "pi0"),  # LeRobot's names
        (["model.vlm_with_expert.lm_expert.norm.weight", "model.action_out_proj.bias"], "SmolVLA"),
        (["vision_backbone.featurizer.norm.weight", "projector.fc1.weight"], "OpenVLA"),
        (["module.vision_backbone.fused_featurizer.norm.weight"], "OpenVLA"),
        (["vision_backbone.featurizer.norm.weight", "action_head.model.fc1.weight"], "OpenVLA-OFT"),
        (["action_head.weight", "value_head.weight", "language_model.norm.weight"], None),
        ([], None),
    ],
)
def test_a_family_is_recognised_by_the_names_of_its_weights(names, family):
    assert recognise(names) == family == recognise(reversed(names))
    assert told_apart(names, "pi0") == ("" if family in (None, "pi0") else f"; these are weights of {family}")
