"""agents/residual.py: it starts as the pretrained policy, adds to its parameters, and runs alone in the update."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal
from worlds import ThreeMethods, count_calls, freeze_with_residual, gradients_of, rollout_batch

from agents.policy import VLAPolicy
from agents.residual import add_residual, policy_at
from agents.small_vla import SmallVLA
from agents.vla import contract_of
from envs.tabletop import TabletopEnv
from research.errors import UserError

SEEN = ["rgb", "proprio"]
HEADS = {
    "gaussian": {},
    "tokens": {"head": {"bins": 5, "temperature": 1.6}},
    "categorical": {"action_choices": [2, 3, 4]},
    "gaussian_chunk": {"horizon": 3, "executed": 2},
    "tokens_chunk": {"horizon": 3, "executed": 2, "head": {"bins": 5}},
}


def model_with(head: str) -> SmallVLA:
    torch.manual_seed(0)
    kind = head.removesuffix("_chunk")
    # Without language: encoded once per instruction, it differs in the last bits from that of a batch.
    return SmallVLA(3, SEEN, token_size=8, hidden_size=32, action_head=kind, **HEADS[head]).eval()


def looks() -> TensorDict:
    return TabletopEnv(4, image_size=16, modalities=SEEN).reset()["observation"]


def residual_model(head: str = "gaussian", trained: bool = True) -> SmallVLA:
    """With its residual as it is after some training, or as it starts."""
    model = model_with(head)
    freeze_with_residual(model, looks())
    if trained:
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.residual.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def acted(policy: VLAPolicy) -> TensorDict:
    torch.manual_seed(5)
    with torch.no_grad():
        return policy.act(TensorDict({"observation": looks()}, [4]))


KEYS = ("action", "action_log_prob", "state_value")


@pytest.mark.parametrize("head", HEADS)
def test_it_starts_as_the_pretrained_policy_bit_for_bit(head):
    plain, model = model_with(head), residual_model(head, trained=False)
    before, after = acted(VLAPolicy(plain)), acted(VLAPolicy(model))
    assert all(torch.equal(before[key], after[key]) for key in KEYS)
    step = before.select(*KEYS, "observation").detach()
    scores = [m.score(m.run_stages(step["observation"]).set("action", step["action"])) for m in (plain, model)]
    assert all(torch.equal(one, other) for one, other in zip(*scores, strict=True))
    assert not torch.equal(acted(VLAPolicy(residual_model(head)))["action"], after["action"])


def network(model: SmallVLA, hidden: torch.Tensor) -> torch.Tensor:
    first, _, last = model.residual.network
    inner = (hidden @ first.weight.T + first.bias).clamp(min=0)
    return inner @ last.weight.T + last.bias


@torch.no_grad()
def test_it_moves_the_mean_and_scales_the_deviation():
    model = residual_model()
    step = acted(VLAPolicy(model))
    hidden = model_with("gaussian").encode(looks())
    pretrained = model_with("gaussian").action_head(hidden)
    std = pretrained.base_dist.scale * torch.tensor(5.0) ** model.residual.raw_scale.tanh()
    there = Normal(pretrained.mean + network(model, hidden), std)
    log_prob = there.log_prob(step["action"]).sum(dim=-1)
    torch.testing.assert_close(step["action_log_prob"], log_prob)
    _, entropy, _ = model.score(model.run_stages(looks()).set("action", step["action"]))
    torch.testing.assert_close(entropy, (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("head", ["tokens", "categorical"])
def test_it_adds_to_the_logits(head):
    model, plain = residual_model(head), model_with(head)
    step = acted(VLAPolicy(model))
    hidden = plain.encode(looks())
    logits = plain.action_head.planned_logits(hidden)[:, 0]  # [B, A, K]
    logits = logits / 1.6 if head == "tokens" else logits
    log_probs = (logits + network(model, hidden).view_as(logits)).log_softmax(dim=-1)
    ids = ((step["action"] + 1) * 2 if head == "tokens" else step["action"]).round().long()  # 5 bins over [-1, 1]
    expected = log_probs.gather(-1, ids[..., None])[..., 0].sum(dim=-1)
    torch.testing.assert_close(step["action_log_prob"], expected)
    seen = looks()
    if head == "categorical":  # what is no choice is never drawn
        many = torch.stack([model(seen) for _ in range(50)])
        assert (many.amax(dim=(0, 1)) <= torch.tensor([1.0, 2.0, 3.0])).all()


@torch.no_grad()
def test_the_deviation_cannot_collapse_nor_explode():
    model = residual_model(trained=False)
    stds = []
    for raw in (-1e9, 0.0, 1e9):
        model.residual.raw_scale.fill_(raw)
        stds.append(model.distribution_at(model.run_stages(looks())).base_dist.scale)
    torch.testing.assert_close(stds[0] * 5, stds[1])
    torch.testing.assert_close(stds[1] * 5, stds[2])


def test_nothing_of_the_pretrained_model_runs_in_the_update_nor_changes_in_it():
    model = residual_model()
    policy = VLAPolicy(model)
    batch = rollout_batch(policy)
    assert set(policy.kept_keys) == {"hidden", "pretrained_mean", "pretrained_std"}
    assert policy.frozen_stages[-1] == "pretrained_mean+pretrained_std" and not policy.blocked_stages
    parts = {name: count_calls(part) for name, part in model.named_modules() if name}
    gradients_of(policy, batch)
    ran = {name.partition(".")[0] for name, calls in parts.items() if calls}
    assert ran == {"residual", "value_head"}
    with_gradient = {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == ran
    assert all((p.grad != 0).any() for p in model.residual.parameters())


@pytest.mark.parametrize("head", ["gaussian", "tokens"])
def test_kept_or_computed_anew_the_numbers_are_the_same(head):
    model = residual_model(head)
    batches, found = [], []
    for reuse in ("auto", "off"):
        policy = VLAPolicy(model, feature_reuse=reuse)
        batches.append(rollout_batch(policy))
        found.append(gradients_of(policy, batches[-1]))
    assert "pretrained_mean" not in batches[1].keys() and "pretrained_logits" not in batches[1].keys()
    for key in KEYS:
        torch.testing.assert_close(batches[0][key], batches[1][key], rtol=1e-5, atol=1e-6)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("level", ["action", "token"])
def test_parts_of_a_decision_have_their_own_log_probability(level):
    chunk, parts = acted(VLAPolicy(residual_model("tokens_chunk"))), None
    parts = acted(VLAPolicy(residual_model("tokens_chunk"), ratio_level=level))["action_log_prob"]
    assert parts.shape == (4, {"action": 2, "token": 6}[level])
    torch.testing.assert_close(parts.sum(dim=1), chunk["action_log_prob"])


def test_the_models_own_methods_have_the_residual():
    model = residual_model()
    policy, seen = VLAPolicy(model), looks()
    step = acted(policy)
    torch.manual_seed(5)
    assert torch.equal(model(seen), step["action"])
    log_prob, _ = model.evaluate_actions(seen, step["action"])
    torch.testing.assert_close(log_prob, step["action_log_prob"])
    assert torch.equal(model.get_value(seen), step["state_value"])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))], ids=["copy", "pickle"]
)
def test_a_copy_in_another_process_acts_with_its_own_weights(copied):
    policy = VLAPolicy(residual_model())
    other = copied(policy.act)
    before = acted(policy)["action"]
    with torch.no_grad():
        policy.model.residual.network[2].bias += 1.0
        policy.model.action_head.mean[2].bias += 1.0
    torch.manual_seed(5)
    assert torch.equal(other(TensorDict({"observation": looks()}, [4]))["action"], before)
    assert (acted(policy)["action"] - before).min() > 1.9


class Torchs(SmallVLA):
    """With a distribution of torch's own."""

    def action_distribution(self, hidden):
        return Independent(Normal(self.action_head.mean(hidden), 0.2), 1)


def test_a_distribution_of_torchs_own_will_do_and_a_model_that_does_not_derive_from_ours():
    class Duck(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner, self.value_head = model, model.value_head

        def stages(self):
            return self.inner.stages()

        def action_distribution(self, hidden):
            return self.inner.action_distribution(hidden)

        def value(self, hidden):
            return self.value_head(hidden)

    torch.manual_seed(0)
    plain = Torchs(3, SEEN, token_size=8, hidden_size=32).eval()
    before = acted(VLAPolicy(plain))
    model = Duck(copy.deepcopy(plain))
    freeze_with_residual(model, looks())
    assert {n.partition(".")[0] for n, p in model.named_parameters() if not p.requires_grad} == {"inner"}
    policy = VLAPolicy(model)
    assert all(torch.equal(before[key], acted(policy)[key]) for key in KEYS)
    assert "pretrained_mean" in policy.kept_keys


class Correlated(SmallVLA):
    def action_distribution(self, hidden):
        return MultivariateNormal(self.action_head.mean(hidden), torch.eye(3))


class Residuals(SmallVLA):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.residual = nn.Linear(2, 2)


class OwnWay(SmallVLA):
    def decide(self, step, deterministic):
        return super().decide(step, deterministic)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ThreeMethods(model_with("gaussian")), "a StagedVLA has at `hidden`, and ThreeMethods has none"),
        (lambda: Correlated(3, SEEN), "the distribution of Correlated is MultivariateNormal; use backbone or lora"),
        (lambda: Residuals(3, SEEN), "adds a part of that name, and Residuals has one"),
        (lambda: OwnWay(3, SEEN), "past which OwnWay.decide goes its own way"),
    ],
)
def test_a_model_that_it_cannot_be_added_to_is_refused(make, message):
    model = make().eval()
    with pytest.raises(UserError, match=rf"^policy\.freeze: residual .*{message}"):
        add_residual(model, *policy_at(model, looks()), 16)
        contract_of(model)


def test_units_are_those_of_its_hidden_layer():
    model = model_with("gaussian")
    add_residual(model, *policy_at(model, looks()), 7)
    assert {name: tuple(p.shape) for name, p in model.residual.named_parameters()} == {
        "raw_scale": (3,), "network.0.weight": (7, 32), "network.0.bias": (7,), "network.2.weight": (3, 7),
        "network.2.bias": (3,),
    }  # fmt: skip
