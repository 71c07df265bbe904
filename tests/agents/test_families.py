"""Every family of models keeps one contract, on tiny random weights: `FAMILIES` is the list."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from worlds import ROOT, gae, small_model, total_loss

from agents.dual_encoder_vla import DualEncoderVLA
from agents.families import recognise, told_apart
from agents.openvla import OpenVLA
from agents.pi0 import Pi0VLA
from agents.policy import VLAPolicy
from agents.smolvla import SmolVLA
from envs.tabletop import TabletopEnv
from research.config import PPOConfig
from research.training.algorithm import Progress
from research.training.audit import FreezeAudit
from research.training.freezing import freeze, named_parameters_within, parameter_groups
from research.training.loss import make_loss
from research.training.ppo import PPO, PolicyUpdate
from research.training.rollout import Rollouts

MODALITIES = ["rgb", "proprio", "language"]
CHUNK = 2


def pi0(**options) -> Pi0VLA:
    config = json.loads((ROOT / "experiments" / "configs" / "pi0_tiny.json").read_text())
    arguments = config["policy"]["vla_config"]["model_config"]
    return Pi0VLA(3, MODALITIES, proprio_dim=3, executed=CHUNK, **{**arguments, **options})


def smolvla(**options) -> SmolVLA:
    config = json.loads((ROOT / "experiments" / "configs" / "smolvla_tiny.json").read_text())
    arguments = config["policy"]["vla_config"]["model_config"]
    return SmolVLA(3, MODALITIES, proprio_dim=3, executed=CHUNK, **{**arguments, **options})


def openvla(name: str, **options) -> OpenVLA:
    config = json.loads((ROOT / "experiments" / "configs" / f"{name}_tiny.json").read_text())
    arguments = config["policy"]["vla_config"]["model_config"]
    return OpenVLA(3, ["rgb", "language"], executed=CHUNK, **{**arguments, **options})


def dual_encoder() -> DualEncoderVLA:
    language = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return DualEncoderVLA(
        3, MODALITIES, 3, vision_weights=None, language_encoder=language, hidden_size=32, horizon=CHUNK
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "pi0": pi0,
    "smolvla": smolvla,
    "openvla": lambda: openvla("openvla"),
    "openvla_oft": lambda: openvla("openvla_oft", horizon=2 * CHUNK),
    "dual_encoder": dual_encoder,
    "small": lambda: small_model(options={"horizon": CHUNK}),
}
# Which of a family's parts train in each scope.
TRAINS = {
    ("pi0", "backbone"): {"action_expert", "value_head"},
    ("pi0", "vision"): {"projector", "language_model", "action_expert", "value_head"},
    ("smolvla", "backbone"): {"state_proj", "action_expert", "value_head"},
    ("smolvla", "vision"): {"connector", "language_model", "state_proj", "action_expert", "value_head"},
    ("openvla", "backbone"): {"language_model", "value_head"},  # of the first its head
    ("openvla", "vision"): {"projector", "language_model", "value_head"},
    ("openvla_oft", "backbone"): {"language_model", "value_head"},
    ("openvla_oft", "vision"): {"projector", "language_model", "value_head"},
    ("dual_encoder", "backbone"): {"action_head", "value_head"},
    ("dual_encoder", "vision"): {"language_encoder", "fusion", "action_head", "value_head"},
    ("small", "backbone"): {"action_head", "value_head"},
    ("small", "vision"): {"language_encoder", "fusion", "action_head", "value_head"},
}


def make(family: str, scope: str = "none", **options) -> VLAPolicy:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    heads = getattr(model, "heads", None) or ("action_head", "value_head")
    freeze(model, scope, heads=heads)
    return VLAPolicy(model, **options)


def world(num_envs: int = 4) -> TabletopEnv:
    return TabletopEnv(num_envs, "reach", modalities=MODALITIES, image_size=32, chunk=CHUNK)


def rollout_of(policy: VLAPolicy) -> TensorDict:
    torch.manual_seed(1)
    return Rollouts(world(), policy, 32).next()


def batch_of(policy: VLAPolicy) -> TensorDict:
    return gae(policy)(rollout_of(policy))[0]


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
    batch = batch_of(policy)
    assert batch["action"].shape == (32, CHUNK, 3) and batch["action_log_prob"].shape == (32,)
    losses = total_loss(policy, batch, ent_coef=0.0)
    assert losses["max_ratio"].item() == pytest.approx(1.0, abs=1e-5) and losses["clip_fraction"] == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["vision", "backbone"])
def test_a_scope_trains_what_it_says_and_leaves_the_rest_bit_identical(family, scope):
    policy = make(family, scope)
    model = policy.model
    parts = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert parts == TRAINS[family, scope]
    audit = FreezeAudit(model, [n for n, p in model.named_parameters() if not p.requires_grad], policy.reused_modules)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ppo = update_of(policy)
    batch, _ = ppo.prepare(rollout_of(policy))
    ppo.update(batch, Progress(iterations=1))
    audit.check("after an update")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (parameter.requires_grad and not unread(family, name)), name


def unread(family: str, name: str) -> bool:
    """Weights that no action depends on: flow experts read keys and values, and not the prefix's last states."""
    last = "language_model.layers.1."
    of_keys = tuple(f"{last}{part}" for part in ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj"))
    others = ("language_model.norm", "action_expert.transformer.embed_tokens", "vision_tower.head")
    return family in ("pi0", "smolvla") and name.startswith((last, *others)) and not name.startswith(of_keys)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["vision", "backbone"])
def test_reuse_changes_no_number(family, scope):
    kept, anew = make(family, scope), make(family, scope, feature_reuse="off")
    assert kept.frozen_stages and not anew.frozen_stages
    batches = [batch_of(policy) for policy in (kept, anew)]
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
        batch, _ = ppo.prepare(rollout_of(policy))
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
        actions = [one.act(step.copy())["action"] for one in (policy, policy, other)]
    assert torch.equal(actions[0], actions[1]) and torch.equal(actions[0], actions[2])
    assert torch.equal(policy.values(step), other.values(step))


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
