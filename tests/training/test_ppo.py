"""The update: direction of the policy gradient, where the critic's gradient goes, warm-up, early stop."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Independent, Normal
from torch.nn.functional import mse_loss

from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from research.config import PPOConfig
from research.schema import NonFiniteError, UserError
from research.training.freezing import parameter_groups
from research.training.ppo import PPO, _minibatches, make_loss, value_head_parameters


def make_model() -> SmallVLA:
    torch.manual_seed(0)
    return SmallVLA(2, modalities=["proprio"], proprio_dim=3, hidden_size=16).eval()


def make_batch(policy: VLAPolicy, size: int = 64) -> TensorDict:
    torch.manual_seed(1)
    batch = TensorDict({"observation": {"proprio": torch.randn(size, 3)}}, batch_size=[size])
    with torch.no_grad():
        policy.act(batch)
        batch["action"] += 0.2 * torch.randn(size, 2)
        batch["action_log_prob"] = policy.model.evaluate_actions(batch["observation"], batch["action"])[0]
    batch = batch.select("observation", "action", "action_log_prob", "state_value")
    batch["advantage"], batch["value_target"] = torch.randn(size, 1), torch.randn(size, 1)
    return batch


def make_ppo(model: SmallVLA, lr: float = 1e-3, head_only: bool = True, **cfg) -> tuple[PPO, VLAPolicy]:
    policy = VLAPolicy(model)
    cfg = PPOConfig(**{"batch_size": 16, **cfg})
    optimizer = torch.optim.Adam(parameter_groups(model, lr, {}))
    values = value_head_parameters(model, "value_head") if head_only else None
    return PPO(model, make_loss(policy.actor, policy.critic, cfg), optimizer, cfg, values), policy


def test_loss_is_ppo_as_written():
    """Schulman et al. 2017, equations 7 and 9, by hand, at a policy that has moved."""
    model = make_model()
    cfg = PPOConfig(clip_coef=0.1, vf_coef=0.7, ent_coef=0.02)
    policy = VLAPolicy(model)
    batch = make_batch(policy)
    with torch.no_grad():
        for p in model.action_head.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batch["advantage"] = (batch["advantage"] - batch["advantage"].mean()) / batch["advantage"].std()
    losses = make_loss(policy.actor, policy.critic, cfg)(batch.clone())
    hidden = model.encode(batch["observation"])
    d = Independent(Normal(model.action_head.mean(hidden), model.action_head.std()), 1)
    ratio = (d.log_prob(batch["action"]) - batch["action_log_prob"]).exp()
    a = batch["advantage"][:, 0]
    assert ((ratio - 1).abs() > 0.1).any() and ((ratio - 1).abs() < 0.1).any()
    objective = -torch.min(ratio * a, ratio.clamp(0.9, 1.1) * a).mean()
    torch.testing.assert_close(losses["loss_objective"], objective, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss_critic"], 0.7 * mse_loss(model.value(hidden), batch["value_target"]))
    torch.testing.assert_close(losses["loss_entropy"], -0.02 * d.entropy().mean())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_update_makes_good_actions_likelier(sign):
    """Actions above the mean are good (or, with the sign turned, bad): the mean must move there (or away)."""
    model = make_model()
    ppo, policy = make_ppo(model, lr=3e-3, n_epochs=4)
    batch = make_batch(policy)
    before = model(batch["observation"], deterministic=True).detach()
    batch["advantage"] = sign * (batch["action"] - before).sum(-1, keepdim=True)
    ppo.update(batch)
    moved = (model(batch["observation"], deterministic=True) - before).mean().item()
    assert sign * moved > 0.02


def test_update_brings_values_to_their_targets():
    model = make_model()
    ppo, policy = make_ppo(model, lr=1e-2, n_epochs=20)
    batch = make_batch(policy)
    batch["value_target"] = torch.full((64, 1), 0.6)
    error = (model.get_value(batch["observation"]) - 0.6).square().mean().item()
    ppo.update(batch)
    assert (model.get_value(batch["observation"]) - 0.6).square().mean().item() < 0.1 * error


def test_value_warm_up_leaves_the_policy_bit_identical():
    model = make_model()
    ppo, policy = make_ppo(model, lr=1e-2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    ppo.update(make_batch(policy), value_only=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.startswith("value_head")), name


@pytest.mark.parametrize("head_only", [True, False])
def test_where_the_critics_gradient_goes(head_only):
    model = make_model()
    ppo, policy = make_ppo(model, head_only=head_only, ent_coef=0.0)
    batch = make_batch(policy)
    batch["advantage"][:] = 0.0  # no policy gradient: what reaches the trunk is the critic's
    losses = make_loss(policy.actor, policy.critic, PPOConfig(ent_coef=0.0))(batch)
    ppo._backward(losses, value_only=False, share=1.0)
    trunk = sum(p.grad.abs().sum().item() for p in model.fusion.parameters() if p.grad is not None)
    assert sum(p.grad.abs().sum().item() for p in model.value_head.parameters()) > 0
    assert (trunk == 0) == head_only


def test_after_a_warm_up_the_critics_gradient_reaches_the_trunk_where_asked():
    model = make_model()
    ppo, policy = make_ppo(model)
    ppo.critic_to_head = False
    batch = make_batch(policy)
    batch["advantage"][:] = 0.0
    loss = make_loss(policy.actor, policy.critic, PPOConfig(ent_coef=0.0))
    for value_only in (True, False):
        model.zero_grad()
        ppo._backward(loss(batch.clone()), value_only, share=1.0)
        trunk = sum(p.grad.abs().sum().item() for p in model.fusion.parameters() if p.grad is not None)
        assert (trunk == 0) == value_only


def test_advantages_are_normalised_over_the_minibatch():
    model = make_model()
    seen = []
    ppo, policy = make_ppo(model, batch_size=64, n_epochs=1)
    loss = ppo.loss
    ppo.loss = lambda batch: seen.append(batch["advantage"].clone()) or loss(batch)
    batch = make_batch(policy)
    batch["advantage"] = batch["advantage"] * 7 + 3
    ppo.update(batch)
    assert seen[0].mean().item() == pytest.approx(0, abs=1e-6) and seen[0].std().item() == pytest.approx(1, abs=1e-5)
    ppo, policy = make_ppo(model, batch_size=64, n_epochs=1, normalize_advantage=False)
    ppo.loss = lambda batch: seen.append(batch["advantage"].clone()) or loss(batch)
    ppo.update(batch)
    assert torch.equal(seen[1], batch["advantage"])


@pytest.mark.parametrize("head_only", [True, False])
def test_micro_batches_give_the_minibatchs_gradients_and_metrics(head_only):
    results = []
    for micro in (None, 7, 64):  # 7 leaves a smaller one at the end
        model = make_model()
        ppo, policy = make_ppo(model, lr=1e-2, head_only=head_only, batch_size=64, n_epochs=1, micro_batch_size=micro)
        batch = make_batch(policy)
        metrics = ppo._accumulate(batch, value_only=False, when="")
        results.append(([p.grad.clone() for p in model.parameters()], metrics))
    for gradients, metrics in results[1:]:
        for a, b in zip(gradients, results[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(metrics, results[0][1], rtol=1e-5, atol=1e-6)


def test_minibatches_are_the_shuffled_rows_of_every_tensor():
    batch = make_batch(VLAPolicy(make_model()), size=10)
    torch.manual_seed(5)
    rows = torch.randperm(10).split(4)
    torch.manual_seed(5)
    minibatches = list(_minibatches(batch, 4))
    assert [len(m) for m in minibatches] == [4, 4, 2]
    for minibatch, which in zip(minibatches, rows, strict=True):
        assert minibatch.batch_size == (len(which),) and set(minibatch.keys(True)) == set(batch.keys(True))
        assert (minibatch == batch[which]).all()
    assert next(_minibatches(batch, 10)) is batch


def test_metrics_are_means_over_the_gradient_steps():
    model = make_model()
    ppo, policy = make_ppo(model, lr=0.0, normalize_advantage=False, ent_coef=0.0)
    batch = make_batch(policy)
    expected = ppo.loss(batch.clone())  # weights do not move: the mean over minibatches is that over the batch
    metrics = ppo.update(batch)
    for name in ("loss_objective", "loss_critic", "entropy", "clip_fraction"):
        assert metrics[f"train/{name}"] == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-6)
    assert metrics["train/approx_kl"] == pytest.approx(expected["kl_approx"].item(), abs=1e-6)


def test_target_kl_stops_the_update():
    model = make_model()
    ppo, policy = make_ppo(model, lr=0.05, n_epochs=10, target_kl=0.01)
    metrics = ppo.update(make_batch(policy))
    assert 1 < metrics["train/gradient_steps"] < 40
    assert metrics["train/epochs"] == metrics["train/gradient_steps"] / 4


@pytest.mark.parametrize(
    ("cfg", "rates"),
    [
        ({}, [1e-3, 1e-3, 1e-3, 1e-3]),
        ({"anneal_lr": True}, [1e-3, 7.5e-4, 5e-4, 2.5e-4]),
        ({"lr_warmup_iterations": 2}, [5e-4, 1e-3, 1e-3, 1e-3]),
        ({"lr_warmup_iterations": 4, "anneal_lr": True}, [2.5e-4, 3.75e-4, 3.75e-4, 2.5e-4]),
        ({"lr_warmup_iterations": 2, "value_warmup_iterations": 1}, [1e-3, 5e-4, 1e-3, 1e-3]),
    ],
)
def test_learning_rates_rise_and_fall_linearly(cfg, rates):
    model = make_model()
    ppo, policy = make_ppo(model, lr=1e-3, **cfg)
    batch = make_batch(policy)
    for iteration, rate in enumerate(rates):
        ppo.set_progress(iteration, 4)
        assert ppo.update(batch)["train/learning_rate/fusion"] == pytest.approx(rate)


def test_metrics_name_every_part():
    model = make_model()
    ppo, policy = make_ppo(model)
    metrics = ppo.update(make_batch(policy))
    for part in ("fusion", "action_head", "value_head"):
        assert metrics[f"train/grad_norm/{part}"] > 0
        assert metrics[f"train/learning_rate/{part}"] == 1e-3
    for name in ("loss_objective", "loss_critic", "entropy", "approx_kl", "clip_fraction", "explained_variance"):
        assert f"train/{name}" in metrics
    assert all(isinstance(v, float) for v in metrics.values())


def test_nan_loss_stops_before_the_weights_are_touched():
    model = make_model()
    ppo, policy = make_ppo(model)
    batch = make_batch(policy)
    batch["value_target"][:] = float("nan")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NonFiniteError, match="loss_critic is nan"):
        ppo.update(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_without_that_value_head_is_told_what_to_do():
    with pytest.raises(UserError, match="no trainable part 'critic'.*value_head.*critic_gradient"):
        value_head_parameters(make_model(), "critic")
