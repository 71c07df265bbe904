"""The update: direction of the policy gradient, where the critic's gradient goes, warm-up, early stop."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Independent, Normal
from torch.nn.functional import mse_loss
from worlds import gae, value_head

from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from research.config import PPOConfig
from research.errors import NonFiniteError
from research.training.algorithm import Progress
from research.training.freezing import parameter_groups
from research.training.loss import make_loss
from research.training.minibatches import minibatches
from research.training.ppo import PPO, PolicyUpdate, explained_variance


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


def make_ppo(model: SmallVLA, lr: float = 1e-3, critic_gradient: str = "head", **cfg) -> tuple[PPO, VLAPolicy]:
    """PPO as `algorithms.make_ppo` wires it where the critic's gradient has a backward pass of its own."""
    policy = VLAPolicy(model)
    cfg = PPOConfig(**{"batch_size": 16, **cfg})
    optimizer = torch.optim.Adam(parameter_groups(model, lr, {}))
    loss, apart = make_loss(policy.actor, policy.critic, cfg), critic_gradient == "head"
    update = PolicyUpdate(loss, optimizer, cfg, value_head(model), critic_apart=apart)
    return PPO(gae(policy, cfg), update, cfg), policy


def update(ppo: PPO, batch: TensorDict, iteration: int = 0, iterations: int = 1) -> dict[str, float]:
    return ppo.update(batch, Progress(iterations, iteration))


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
    update(ppo, batch)
    moved = (model(batch["observation"], deterministic=True) - before).mean().item()
    assert sign * moved > 0.02


def test_update_brings_values_to_their_targets():
    model = make_model()
    ppo, policy = make_ppo(model, lr=1e-2, n_epochs=20)
    batch = make_batch(policy)
    batch["value_target"] = torch.full((64, 1), 0.6)
    error = (model.get_value(batch["observation"]) - 0.6).square().mean().item()
    update(ppo, batch)
    assert (model.get_value(batch["observation"]) - 0.6).square().mean().item() < 0.1 * error


def test_value_warm_up_leaves_the_policy_bit_identical():
    model = make_model()
    ppo, policy = make_ppo(model, lr=1e-2, value_warmup_iterations=2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for iteration in (0, 1):
        update(ppo, make_batch(policy), iteration)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.startswith("value_head")), name
    update(ppo, make_batch(policy), iteration=2)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("critic_gradient", ["head", "trunk"])
@pytest.mark.parametrize("value_only", [False, True])
def test_where_the_critics_gradient_goes(critic_gradient, value_only):
    model = make_model()
    ppo, policy = make_ppo(model, critic_gradient=critic_gradient, ent_coef=0.0)
    batch = make_batch(policy)
    batch["advantage"][:] = 0.0  # no policy gradient: what reaches the trunk is the critic's
    losses = ppo.policy_update.loss(batch)
    ppo.policy_update._backward(losses, value_only, share=1.0)
    trunk = sum(p.grad.abs().sum().item() for p in model.fusion.parameters() if p.grad is not None)
    assert sum(p.grad.abs().sum().item() for p in model.value_head.parameters()) > 0
    assert (trunk > 0) == (critic_gradient == "trunk" and not value_only)


def test_advantages_are_normalised_over_the_minibatch():
    model = make_model()
    seen = []
    ppo, policy = make_ppo(model, batch_size=64, n_epochs=1)
    loss = ppo.policy_update.loss
    ppo.policy_update.loss = lambda batch: seen.append(batch["advantage"].clone()) or loss(batch)
    batch = make_batch(policy)
    batch["advantage"] = batch["advantage"] * 7 + 3
    update(ppo, batch)
    assert seen[0].mean().item() == pytest.approx(0, abs=1e-6) and seen[0].std().item() == pytest.approx(1, abs=1e-5)
    ppo, policy = make_ppo(model, batch_size=64, n_epochs=1, normalize_advantage=False)
    ppo.policy_update.loss = lambda batch: seen.append(batch["advantage"].clone()) or loss(batch)
    update(ppo, batch)
    assert torch.equal(seen[1], batch["advantage"])


@pytest.mark.parametrize("critic_gradient", ["head", "trunk"])
def test_micro_batches_give_the_minibatchs_gradients_and_metrics(critic_gradient):
    results = []
    for micro in (None, 7, 64):  # 7 leaves a smaller one at the end
        model = make_model()
        ppo, policy = make_ppo(
            model, lr=1e-2, critic_gradient=critic_gradient, batch_size=64, n_epochs=1, micro_batch_size=micro
        )
        batch = make_batch(policy)
        metrics = ppo.policy_update._accumulate(batch, value_only=False)
        results.append(([p.grad.clone() for p in model.parameters()], metrics))
    for gradients, metrics in results[1:]:
        for a, b in zip(gradients, results[0][0], strict=True):
            rounding = 1e-6 * b.abs().max().item()  # the order of a sum in float32
            torch.testing.assert_close(a, b, rtol=0, atol=rounding)
        torch.testing.assert_close(metrics, results[0][1], rtol=1e-5, atol=1e-6)


def test_minibatches_are_the_shuffled_rows_of_every_tensor():
    batch = make_batch(VLAPolicy(make_model()), size=10)
    torch.manual_seed(5)
    rows = torch.randperm(10).tensor_split(3)
    torch.manual_seed(5)
    got = [minibatch for minibatch, _ in minibatches(batch, 4)]
    assert [len(m) for m in got] == [4, 3, 3]  # no step on 2 alone
    for minibatch, which in zip(got, rows, strict=True):
        assert minibatch.batch_size == (len(which),) and set(minibatch.keys(True)) == set(batch.keys(True))
        assert (minibatch == batch[which]).all()
    assert next(minibatches(batch, 10))[0] is batch


def test_metrics_are_means_over_the_gradient_steps():
    model = make_model()
    ppo, policy = make_ppo(model, lr=0.0, normalize_advantage=False, ent_coef=0.0)
    batch = make_batch(policy)
    with torch.no_grad():
        model.action_head.mean[-1].bias += 0.1
    expected = ppo.policy_update.loss(
        batch.clone()
    )  # weights do not move: the mean over minibatches is that over the batch
    metrics = update(ppo, batch)
    for name in ("loss_objective", "loss_critic", "entropy", "clip_fraction"):
        assert metrics[f"train/{name}"] == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-6)
    # Schulman's k3, of a policy that has moved.
    log_ratio = policy.actor.get_dist(batch.clone()).log_prob(None).detach() - batch["action_log_prob"]
    assert metrics["train/approx_kl"] == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), abs=1e-6)
    assert metrics["train/approx_kl"] > 1e-3


def test_target_kl_stops_the_update_before_a_step_from_too_far():
    model = make_model()
    ppo, policy = make_ppo(model, lr=0.02, n_epochs=10, target_kl=0.01)
    batch = make_batch(policy)
    metrics = update(ppo, batch)
    assert 1 <= metrics["train/gradient_steps"] < 40
    assert metrics["train/epochs"] == metrics["train/gradient_steps"] / 4
    far = [p.detach().clone() for p in model.parameters()]
    metrics = update(ppo, batch)  # where the policy has moved too far before the first step, none is taken
    assert metrics["train/gradient_steps"] == 0 and metrics["train/approx_kl"] > 0.01
    assert all(torch.equal(p, before) and p.grad is None for p, before in zip(model.parameters(), far, strict=True))


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
        assert update(ppo, batch, iteration, 4)["train/learning_rate/fusion"] == pytest.approx(rate)


def test_metrics_name_every_part():
    model = make_model()
    ppo, policy = make_ppo(model)
    metrics = update(ppo, make_batch(policy))
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
    with pytest.raises(NonFiniteError, match="loss_critic is nan.* in gradient step 0 of the update"):
        update(ppo, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_names_its_part_and_touches_nothing(bad):
    """The losses are finite: it comes about on the way back, as an overflow in half precision does."""
    model = make_model()
    ppo, policy = make_ppo(model, batch_size=32)
    batch, steps = make_batch(policy), []
    model.fusion.layers[0].weight.register_hook(lambda g: steps.append(1) or (g * bad if len(steps) == 2 else g))
    step = ppo.policy_update.optimizer.step
    before = {}

    def note():
        step()
        before.update({n: p.clone() for n, p in model.named_parameters()})

    ppo.policy_update.optimizer.step = note
    with pytest.raises(NonFiniteError, match="train/grad_norm/fusion is (nan|inf).* in gradient step 1 of the update"):
        update(ppo, batch)
    assert before and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())


def after_clipping(ppo: PPO, batch: TensorDict) -> dict[str, torch.Tensor]:
    """The gradients with which the optimizer steps, by name of the part and the tensor."""
    update = ppo.policy_update
    update._accumulate(batch, value_only=False)
    update.clip()
    return {
        f"{g['name']}.{i}": p.grad.clone() for g in update.optimizer.param_groups for i, p in enumerate(g["params"])
    }


def norm(gradients: dict[str, torch.Tensor], *parts: str) -> float:
    return torch.cat([g.flatten() for n, g in gradients.items() if n.split(".")[0] in parts]).norm().item()


@pytest.mark.parametrize("largest", [0.01, 1e6])
def test_gradients_are_clipped_and_the_value_heads_apart(largest):
    """A return a thousand times as large moves the value head no further, and takes nothing from the policy's step."""
    steps = {}
    for scale in (1.0, 1000.0):
        model = make_model()
        ppo, policy = make_ppo(model, batch_size=64, max_grad_norm=largest)
        batch = make_batch(policy)
        batch["value_target"] *= scale
        steps[scale] = after_clipping(ppo, batch)
    for gradients in steps.values():
        policy_norm, head_norm = norm(gradients, "fusion", "action_head"), norm(gradients, "value_head")
        assert (policy_norm == pytest.approx(largest, rel=1e-3)) == (head_norm == pytest.approx(largest, rel=1e-3))
        assert (policy_norm == pytest.approx(largest, rel=1e-3)) == (largest == 0.01)
    for name, gradient in steps[1.0].items():
        if not name.startswith("value_head"):
            assert torch.equal(gradient, steps[1000.0][name]), name


def test_gradient_norms_are_those_before_clipping_and_means_over_the_minibatches():
    parts = ("fusion", "action_head", "value_head")
    model = make_model()
    ppo, policy = make_ppo(model, lr=0.0, n_epochs=1, max_grad_norm=1e-3)
    batch = make_batch(policy)
    torch.manual_seed(3)
    metrics = update(ppo, batch)
    torch.manual_seed(3)
    expected = []
    for minibatch, _ in minibatches(batch, 16, normalise=True):
        model.zero_grad()
        ppo.policy_update._accumulate(minibatch, value_only=False)
        gradients = {f"{n.split('.')[0]}.{n}": p.grad.clone() for n, p in model.named_parameters()}
        expected.append([norm(gradients, part) for part in parts] + [norm(gradients, *parts)])
    assert len(expected) == 4
    means = torch.tensor(expected).mean(0).tolist()
    for name, value in zip([*(f"train/grad_norm/{part}" for part in parts), "train/grad_norm"], means, strict=True):
        assert metrics[name] == pytest.approx(value, rel=1e-4) and value > 1e-3


def test_explained_variance_is_one_minus_the_share_that_is_left():
    target = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
    assert explained_variance(target, target) == 1.0
    assert explained_variance(target + 5, target) == pytest.approx(1.0)  # a constant error leaves no variance
    assert explained_variance(torch.full_like(target, 3.0), target) == pytest.approx(0.0)
    assert explained_variance(-target, target) == pytest.approx(
        -3.0
    )  # twice the target is left: four times its variance
    assert explained_variance(target, torch.ones_like(target)) == 0.0
    model = make_model()
    ppo, policy = make_ppo(model)
    batch = make_batch(policy)
    batch["value_target"] = batch["state_value"] * 2
    assert update(ppo, batch)["train/explained_variance"] == pytest.approx(0.75)


def test_without_a_critic_only_the_policy_learns():
    model = make_model()
    policy, cfg = VLAPolicy(model), PPOConfig(batch_size=16)
    batch = make_batch(policy)
    optimizer = torch.optim.Adam(parameter_groups(model, 1e-2, {}))
    before = {n: p.clone() for n, p in model.named_parameters()}
    metrics = PolicyUpdate(make_loss(policy.actor, None, cfg), optimizer, cfg)(batch)
    assert "train/loss_critic" not in metrics and metrics["train/loss_objective"] != 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("value_head"), name
