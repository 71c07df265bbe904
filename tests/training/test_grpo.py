"""research/training/grpo.py: advantages by hand and by TorchRL, the direction of a step, the pull to the start."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.modules import IndependentNormal
from torchrl.objectives.llm.grpo import MCAdvantage
from worlds import freeze_with_residual, reach_env, reach_policy

from agents.policy import VLAPolicy
from research.config import GRPOConfig, LoRAConfig
from research.training.algorithm import Progress
from research.training.freezing import freeze, parameter_groups
from research.training.group_episodes import EPISODE, RETURN, GroupEpisodes, by_group
from research.training.grpo import GRPO, GRPOUpdate, StartingPolicy, divergence, group_advantages
from research.training.loss import make_loss

RETURNS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 6.0], [1.0, 1.0, 1.0, 1.0]])


def test_advantages_by_hand():
    rloo = [[1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3], [0.0, -8 / 3, -4 / 3, 4.0], [0.0] * 4]
    assert torch.allclose(group_advantages(RETURNS, "rloo"), torch.tensor(rloo), atol=1e-6)
    centred = [[0.5, -0.5, -0.5, 0.5], [0.0, -2.0, -1.0, 3.0], [0.0] * 4]
    assert torch.allclose(group_advantages(RETURNS, "dr_grpo"), torch.tensor(centred))
    spread = torch.tensor([[3**-0.5], [(14 / 3) ** 0.5], [1.0]])
    assert torch.allclose(group_advantages(RETURNS, "grpo"), torch.tensor(centred) / spread)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dr_grpo"])
def test_a_group_without_spread_has_no_advantages_whatever_rounding_makes_of_its_mean(kind):
    alike = torch.tensor([-200.3, -13.7, 0.1, 1e-3])[:, None].repeat(1, 8)
    assert (alike != alike.mean(dim=1, keepdim=True)).any()
    assert (group_advantages(alike, kind) == 0).all()


def test_advantages_are_torchrls():
    advantage = MCAdvantage(grpo_size=4, prompt_key="group", trajectory_return="sum")
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(100), sampler=SamplerWithoutReplacement(), transform=advantage, batch_size=8
    )
    for member in range(4):
        for group in range(2):
            reward, done = torch.zeros(3, 1), torch.tensor([[False], [False], [True]])
            reward[-1] = RETURNS[group, member]
            after = {"reward": reward, "done": done}
            episode = {"group": torch.full((3,), group), "member": torch.full((3,), member), "next": after}
            buffer.extend(TensorDict(episode, [3]))
    ours = group_advantages(RETURNS[:2], "grpo")
    theirs = buffer[:]
    assert len(theirs) == 24
    found = torch.stack([row["advantage"].flatten()[0] for row in theirs])
    assert torch.allclose(found, ours[theirs["group"], theirs["member"]], atol=1e-3)


def make_grpo(scope: str = "none", **cfg) -> tuple[GRPO, TensorDict]:
    """GRPO on a policy that reaches, and a rollout whose episodes' returns are made up."""
    policy = reach_policy("none")
    if scope == "residual":
        freeze_with_residual(policy.model, reach_env().reset()["observation"])
        policy = VLAPolicy(policy.model)
    else:
        freeze(policy.model, scope, heads=("action_head", "value_head"), lora=LoRAConfig())
    cfg = GRPOConfig(**{"group_size": 4, "groups": 2, "batch_size": 4096, "n_epochs": 1, "ent_coef": 0.0, **cfg})
    for parameter in policy.model.value_head.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(parameter_groups(policy.model, cfg.learning_rate, {}), eps=1e-5)
    step = GRPOUpdate(make_loss(policy.actor, None, cfg), optimizer, cfg)
    grpo = GRPO(policy, step, cfg, StartingPolicy(policy) if cfg.kl_coef else None)
    rollout = GroupEpisodes(reach_env(num_envs=4), policy, 2, 4, most_draws=2, max_steps=5).next()
    rollout[EPISODE] %= 8
    rollout[RETURN] = (rollout[EPISODE] % 4 < 2).float()
    return grpo, rollout


def log_probs(grpo: GRPO, batch: TensorDict) -> torch.Tensor:
    with torch.no_grad():
        return grpo.policy.actor.get_dist(batch.copy()).log_prob(batch["action"])


def test_the_ratio_is_one_at_first_and_a_step_makes_what_won_likelier():
    grpo, rollout = make_grpo(learning_rate=3e-5)
    batch, metrics = grpo.prepare(rollout)
    assert metrics == {"train/groups": by_group(rollout, 4).shape[0]}
    assert torch.allclose(log_probs(grpo, batch), batch["action_log_prob"], atol=1e-5)
    value_head = copy.deepcopy(grpo.policy.model.value_head.state_dict())
    metrics = grpo.update(batch, Progress(1))
    assert abs(metrics["train/approx_kl"]) < 1e-6 and metrics["train/clip_fraction"] == 0
    assert metrics["train/loss_objective"] == pytest.approx(-batch["advantage"].mean().item(), abs=1e-5)
    change = log_probs(grpo, batch) - batch["action_log_prob"]
    won = batch["advantage"][:, 0] > 0
    assert change[won].mean() > 0 > change[~won].mean()
    assert all(torch.equal(w, value_head[n]) for n, w in grpo.policy.model.value_head.state_dict().items())


def test_clipping_is_low_and_high_apart():
    grpo, _ = make_grpo(clip_low=0.1, clip_high=0.3)
    loss = grpo.policy_update.loss
    assert [round(float(x), 6) for x in (loss.clip_epsilon_low, loss.clip_epsilon_high)] == [0.1, 0.3]


@pytest.mark.parametrize("scope", ["none", "lora", "residual"])
def test_the_reference_is_the_policy_of_the_start_heads_included(scope):
    grpo, rollout = make_grpo(scope, kl_coef=0.1, learning_rate=1e-3, n_epochs=3)
    batch, _ = grpo.prepare(rollout)
    at_start = log_probs(grpo, batch)
    assert torch.equal(batch["reference_log_prob"], at_start)
    if scope == "residual":  # at zero it is the pretrained policy
        kept = IndependentNormal(batch["pretrained_mean"], batch["pretrained_std"], event_dim=1)
        assert torch.equal(at_start, kept.log_prob(batch["action"]))
        pretrained = grpo.policy.contract.action_distribution(batch["hidden"])  # more rows at once round otherwise
        torch.testing.assert_close(at_start, pretrained.log_prob(batch["action"]), rtol=1e-5, atol=1e-5)
    first = grpo.update(batch, Progress(2))
    moved = copy.deepcopy(grpo.policy.model.state_dict())
    again, _ = grpo.prepare(rollout)
    assert torch.equal(again["reference_log_prob"], at_start)
    assert not torch.allclose(log_probs(grpo, batch), at_start, atol=1e-3)
    assert all(torch.equal(w, moved[n]) for n, w in grpo.policy.model.state_dict().items())
    assert first["train/kl_reference"] > 0 and grpo.update(again, Progress(2, 1))["train/kl_reference"] > 0


def test_the_divergence_is_k3_and_its_weight_pulls_back():
    log_prob = torch.tensor([0.1, -2.0], requires_grad=True)
    reference = torch.tensor([0.1, -1.0])
    found = divergence(log_prob, reference)
    assert found.item() == pytest.approx((torch.tensor(1.0).exp() - 1 - 1).item() / 2)
    found.backward()
    assert log_prob.grad[0] == 0 and log_prob.grad[1] < 0  # a step down the gradient makes it likelier, as it was
    parts = divergence(torch.tensor([[0.1, -2.0]]), torch.tensor([[0.1, -1.0]]))
    assert parts.item() == pytest.approx(2 * found.item())
    grpo, rollout = make_grpo(kl_coef=1.0, learning_rate=3e-4)
    batch, _ = grpo.prepare(rollout)
    with torch.no_grad():
        for weight in grpo.policy.model.action_head.parameters():
            weight += 0.05 * torch.randn_like(weight)
    batch["advantage"] = torch.zeros_like(batch["advantage"])
    far = [grpo.update(batch.copy(), Progress(30))["train/kl_reference"] for _ in range(30)]
    assert far[0] > 0.01 and far[-1] < 0.2 * far[0]


def test_the_reference_of_a_resumed_run_is_that_of_its_start():
    grpo, rollout = make_grpo(kl_coef=0.1)
    batch, _ = grpo.prepare(rollout)
    start = {name: p.detach().clone() for name, p in grpo.policy.model.named_parameters() if p.requires_grad}
    other, _ = make_grpo(kl_coef=0.1)
    with torch.no_grad():
        for weight in other.policy.model.parameters():
            weight += 0.1
    other.reference = StartingPolicy(other.policy)
    assert not torch.allclose(other.prepare(rollout)[0]["reference_log_prob"], batch["reference_log_prob"], atol=1e-3)
    other.policy.model.load_state_dict(grpo.policy.model.state_dict())
    other.reference.begin_from(start)
    assert torch.equal(other.prepare(rollout)[0]["reference_log_prob"], batch["reference_log_prob"])
