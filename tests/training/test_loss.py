"""The loss is TorchRL's, on the modules themselves, with this project's settings; and its bounds are as published."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.nn.functional import huber_loss, mse_loss
from torchrl.objectives import ClipPPOLoss
from worlds import rollout_batch, small_model, total_loss

from agents.loss_modules import EVALUATED_ENTROPY, EVALUATED_LOG_PROB, EVALUATED_VALUE, ScoringActor, ScoringCritic
from agents.policy import VLAPolicy
from research.config import PPOConfig
from research.training.loss import make_loss


def test_it_is_on_the_modules_and_weighted_as_configured():
    policy = VLAPolicy(small_model())
    loss = make_loss(policy.actor, policy.critic, PPOConfig(clip_coef=0.3, ent_coef=0.02, vf_coef=0.7))
    assert loss.actor_network is policy.actor and loss.critic_network is policy.critic
    assert abs(float(loss.clip_epsilon) - 0.3) < 1e-6
    assert abs(float(loss.critic_coeff) - 0.7) < 1e-6 and abs(float(loss.entropy_coeff) - 0.02) < 1e-6
    assert make_loss(policy.actor, None, PPOConfig()).critic_network is None
    assert type(loss) is ClipPPOLoss and type(make_loss(policy.actor, None, PPOConfig(clip_value=1))) is ClipPPOLoss


class Told(TensorDictModuleBase):
    """A score that is what the batch says."""

    in_keys = ("log_prob", "value")
    out_keys = (EVALUATED_LOG_PROB, EVALUATED_ENTROPY, EVALUATED_VALUE)

    def forward(self, batch: TensorDict) -> TensorDict:
        told = {EVALUATED_LOG_PROB: batch["log_prob"], EVALUATED_ENTROPY: torch.ones(len(batch))}
        return batch.update(told | {EVALUATED_VALUE: batch["value"]})


def losses_of(ratio: Tensor, advantage: Tensor, value: Tensor, old: Tensor, target: Tensor, **cfg) -> TensorDict:
    batch = {"log_prob": ratio.log(), "action_log_prob": torch.zeros_like(ratio), "advantage": advantage[:, None]}
    batch |= {"action": torch.zeros(len(advantage), 1), "value": value[:, None], "state_value": old[:, None]}
    batch = TensorDict(batch | {"value_target": target[:, None]}, [len(advantage)])
    return make_loss(ScoringActor(Told()), ScoringCritic(), PPOConfig(vf_coef=0.7, **cfg))(batch)


NONE = torch.zeros(1)


def of_action(ratio: float, advantage: float, **cfg) -> tuple[float, float]:
    """The objective's loss of one action, and its slope in the ratio."""
    r = torch.tensor([ratio], requires_grad=True)
    loss = losses_of(r, torch.tensor([advantage]), NONE, NONE, NONE, **cfg)["loss_objective"]
    return loss.item(), torch.autograd.grad(loss, r)[0].item()


def test_dual_clip_bounds_the_loss_of_a_bad_action():
    """c |A| wherever the ratio is beyond c, and without a slope; PPO's own has r |A|, and the slope |A|."""
    assert of_action(100.0, -0.5) == pytest.approx((50.0, 0.5))
    assert of_action(100.0, -0.5, dual_clip=3) == pytest.approx((1.5, 0.0))
    assert of_action(2.9, -0.5, dual_clip=3) == pytest.approx((1.45, 0.5))
    for ratio in (0.1, 0.9, 1.1, 100.0):  # a good action is PPO's
        assert of_action(ratio, 0.5, dual_clip=3) == pytest.approx(of_action(ratio, 0.5))


def test_dual_clip_is_of_each_row_and_of_each_part_of_a_decision():
    ratio = torch.tensor([100.0, 0.5, 2.0])
    loss = losses_of(ratio, torch.tensor([-1.0, 1.0, -0.5]), *[torch.zeros(3)] * 3, dual_clip=3)["loss_objective"]
    assert loss.item() == pytest.approx((3 - 0.5 + 1) / 3)
    ratio = torch.tensor([[1.0, 100.0], [100.0, 0.5]])
    loss = losses_of(ratio, torch.tensor([-1.0, 1.0]), *[torch.zeros(2)] * 3, dual_clip=3)["loss_objective"]
    assert loss.item() == pytest.approx((1 + 3 - 1.2 - 0.5) / 4)


def test_the_huber_loss_is_torchs_and_its_slope_is_bounded():
    old, target = torch.zeros(4), torch.zeros(4)
    value = torch.tensor([0.5, -2.0, 30.0, -1e4], requires_grad=True)
    for delta in (0.5, 1.0, 10.0):
        loss = losses_of(torch.ones(4), torch.ones(4), value, old, target, huber_delta=delta)["loss_critic"]
        torch.testing.assert_close(loss, 0.7 * huber_loss(value, target, delta=delta))
        (slope,) = torch.autograd.grad(loss, value)
        assert slope.abs().max().item() == pytest.approx(0.7 * delta / 4)
    loss = losses_of(torch.ones(4), torch.ones(4), value, old, target)["loss_critic"]
    torch.testing.assert_close(loss, 0.7 * mse_loss(value, target))


@pytest.mark.parametrize("delta", [None, 0.3])
def test_value_clipping_takes_the_larger_of_both_losses(delta):
    """As in PPO2: of the value, and of the value kept near the one that was stored."""
    value, old = torch.tensor([1.0, 1.0, 0.1, -2.0]), torch.tensor([0.0, 0.0, 0.0, 0.0])
    target = torch.tensor([2.0, 0.5, 1.0, 5.0])
    clipped = old + (value - old).clamp(-0.2, 0.2)

    def one(x: Tensor) -> Tensor:
        return (x - target).square() if delta is None else huber_loss(x, target, reduction="none", delta=delta)

    expected = 0.7 * torch.maximum(one(value), one(clipped)).mean()
    loss = losses_of(torch.ones(4), torch.ones(4), value, old, target, clip_value=0.2, huber_delta=delta)
    torch.testing.assert_close(loss["loss_critic"], expected)
    assert (one(clipped) > one(value)).any() and (one(clipped) < one(value)).any()


def test_bounds_that_nothing_reaches_leave_every_term_as_it_is():
    policy = VLAPolicy(small_model())
    batch = rollout_batch(policy)
    plain, bounded = total_loss(policy, batch), total_loss(policy, batch, dual_clip=1e6, clip_value=1e6)
    assert plain.keys() <= bounded.keys()
    for name, term in plain.items():
        torch.testing.assert_close(bounded[name], term)
