"""Action heads against torch's own distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal

from agents import action_heads
from agents.action_heads import (
    ActionTokens,
    CategoricalHead,
    GaussianHead,
    TokenHead,
    entropy_of,
    make_action_head,
    mode_of,
)
from research.errors import UserError


def test_gaussian_is_one_event_of_a_dimensions():
    head = GaussianHead(8, 3)
    hidden, action = torch.randn(5, 8), torch.randn(5, 3)
    d = head(hidden)
    reference = Independent(Normal(head.mean(hidden), head.std()), 1)
    torch.testing.assert_close(d.log_prob(action), reference.log_prob(action))
    torch.testing.assert_close(d.entropy(), reference.entropy())
    assert d.log_prob(action).shape == (5,)


def test_std_starts_where_asked_and_stays_in_bounds():
    head = GaussianHead(4, 2, init_std=0.2, min_std=0.1, max_std=0.5)
    torch.testing.assert_close(head.std(), torch.full((2,), 0.2))
    with torch.no_grad():
        head.raw_std.copy_(torch.tensor([-1e4, 1e4]))
    torch.testing.assert_close(head.std(), torch.tensor([0.1, 0.5]))
    head.set_std(0.3)
    torch.testing.assert_close(head.std(), torch.full((2,), 0.3))
    with pytest.raises(ValueError, match="min_std < init_std"):
        GaussianHead(4, 2, init_std=2.0)


def test_std_is_learnable():
    head = GaussianHead(4, 2)
    head(torch.randn(3, 4)).log_prob(torch.zeros(3, 2)).sum().backward()
    assert (head.raw_std.grad != 0).all()


def test_tokens_are_recovered_from_values_exactly():
    for bins in (2, 11, 256):
        logits = torch.randn(64, 3, bins)
        d = ActionTokens(logits)
        action = d.sample()
        assert action.min() >= -1 and action.max() <= 1
        token = ((action + 1) / 2 * (bins - 1)).round().long()
        reference = Categorical(logits=logits)
        assert torch.equal(d.log_prob(action), reference.log_prob(token).sum(-1))
        torch.testing.assert_close(d.entropy(), reference.entropy().sum(-1))
        assert torch.equal(d.deterministic_sample, d._value(logits.argmax(-1).float()))


def test_every_token_is_scored_as_itself():
    """Rounding must not move a value to its neighbour, at any number of bins."""
    for bins in (3, 7, 100, 1000):
        d = ActionTokens(torch.zeros(bins, 1, bins))
        values = d._value(torch.arange(bins).float())[:, None]
        back = ((values - d.low) * ((bins - 1) / (d.high - d.low))).round().long()[:, 0]
        assert torch.equal(back, torch.arange(bins))


def test_temperature_flattens():
    torch.manual_seed(0)
    cold, hot = TokenHead(4, 2, temperature=0.5), TokenHead(4, 2, temperature=2.0)
    hot.load_state_dict(cold.state_dict())
    hidden = torch.randn(6, 4)
    assert (hot(hidden).entropy() > cold(hidden).entropy()).all()


def test_choices_are_independent_categoricals_of_their_own_sizes():
    head = CategoricalHead(8, 3, choices=[2, 5, 1])
    hidden = torch.randn(4000, 8)
    d = head(hidden)
    action = d.sample()
    assert action.dtype == torch.float32 and torch.equal(action, action.round())
    assert action.amin(0).tolist() == [0, 0, 0] and action.amax(0).tolist() == [1, 4, 0]
    logits = head.logits(hidden).view(4000, 3, 5)
    reference = [Categorical(logits=logits[:, i, :n]) for i, n in enumerate([2, 5, 1])]
    expected = sum(r.log_prob(action[:, i]) for i, r in enumerate(reference))
    torch.testing.assert_close(d.log_prob(action), expected)
    torch.testing.assert_close(d.entropy(), sum(r.entropy() for r in reference))
    assert torch.equal(d.mode, torch.stack([r.probs.argmax(-1).float() for r in reference], -1))


def test_choices_have_finite_gradients():
    head = CategoricalHead(8, 2, choices=[2, 7])
    d = head(torch.randn(5, 8))
    (d.log_prob(d.sample()).sum() + d.entropy().sum()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    assert head.logits[-1].bias.grad[2:7].abs().max() == 0  # of choices that the first dimension does not have


def test_the_head_that_fits_the_environment():
    assert isinstance(make_action_head(None, 8, 2), GaussianHead)
    assert isinstance(make_action_head(None, 8, 2, [3, 4]), CategoricalHead)
    for kind, choices, message in (
        ("categorical", None, "needs action_choices"),
        (None, [3], "needs 2 numbers"),
        ("beta", None, "'gaussian' or 'tokens' or 'categorical', got 'beta'"),
    ):
        with pytest.raises(UserError, match=message):
            make_action_head(kind, 8, 2, choices)


class Unknown(Normal):
    """A Gaussian that does not tell its entropy."""

    def entropy(self):
        raise NotImplementedError


class Undifferentiable(Unknown):
    has_rsample = False


@pytest.mark.parametrize("kind", [Unknown, Undifferentiable])
def test_an_entropy_without_a_formula_is_estimated_with_its_gradient_and_said(kind, caplog):
    """Of a Gaussian: H = log(std) + const, so that dH / d log(std) is 1 and dH / d mean is 0."""
    action_heads._say_estimated.cache_clear()
    torch.manual_seed(0)
    mean, log_std = torch.tensor(0.3, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    entropy = entropy_of(kind(mean.expand(400_000), log_std.exp().expand(400_000))).mean()
    entropy.backward()
    assert entropy.item() == pytest.approx(Normal(0.3, math.exp(-1.0)).entropy().item(), abs=0.01)
    assert log_std.grad.item() == pytest.approx(1.0, abs=0.03) and mean.grad.item() == pytest.approx(0.0, abs=0.03)
    (said,) = caplog.messages
    assert said == f"the entropy of {kind.__name__} has no formula: it is estimated from one sample of each row"


HEADS = {
    "gaussian": lambda **chunk: GaussianHead(8, 3, **chunk),
    "tokens": lambda **chunk: TokenHead(8, 3, bins=5, **chunk),
    "categorical": lambda **chunk: CategoricalHead(8, 3, [2, 4, 3], **chunk),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("batch", [(5,), (5, 2)])
def test_a_distribution_is_over_what_is_executed_of_a_plan(kind, batch):
    hidden = torch.randn(*batch, 8)
    for executed in (1, 2, 4):
        torch.manual_seed(0)
        head = HEADS[kind](horizon=4, executed=executed)
        plan, d = head.plan(hidden), head(hidden)
        assert plan.shape == (*batch, 4, 3) and d.batch_shape == batch
        assert d.event_shape == ((3,) if executed == 1 else (executed, 3))
        begins = plan[..., 0, :] if executed == 1 else plan[..., :executed, :]
        assert torch.equal(mode_of(d), begins)
        assert d.log_prob(d.sample()).shape == batch and d.entropy().shape == batch
    whole = HEADS[kind](horizon=4)
    torch.manual_seed(0)
    assert whole.executed == 4 and HEADS[kind]().executed == 1
    loss = whole.imitation_loss(hidden, whole.plan(hidden).detach())
    assert loss.shape == (*batch, 4, 3)
    other = whole.imitation_loss(hidden, whole.plan(hidden).detach() + 1)
    assert (loss <= other).all() and loss.sum() < other.sum()
    if kind != "gaussian":  # a cross-entropy: minus the log-probability of the whole plan
        torch.testing.assert_close(loss.sum((-1, -2)), -whole(hidden).log_prob(whole.plan(hidden)))


@pytest.mark.parametrize("executed", [0, 5])
def test_no_more_is_executed_than_planned(executed):
    with pytest.raises(UserError, match=f"1 to horizon = 4 steps of its plan, got {executed}"):
        GaussianHead(8, 3, horizon=4, executed=executed)
