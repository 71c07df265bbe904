"""Action heads against torch's own distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal

from agents.action_heads import ActionTokens, GaussianHead, TokenHead


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
