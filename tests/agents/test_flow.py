"""Flow policies: samplers against equations written out, log-probabilities against Gaussians by hand, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from agents.flow import FlowNoise, FlowSDE, Steps, follow
from research.errors import UserError

B, H, A = 6, 3, 2
WEIGHT = torch.tensor([[0.3, -0.8], [0.5, 0.1]], dtype=torch.float64)


def velocity(x, t):
    """Something smooth that depends on both, and lets control steps act on each other."""
    return torch.tanh(x @ WEIGHT.to(x.dtype)) + 0.2 * x.mean(dim=1, keepdim=True) - 0.4 * t[:, None, None]


def raw_std(x, t):
    return x - t[:, None, None]


def noise(rows=B, seed=0):
    return torch.randn(rows, H, A, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_equation_is_eulers_method_from_noise_to_action():
    x = noise()
    for t in (1.0, 0.75, 0.5, 0.25):
        x = x - 0.25 * velocity(x, torch.full((B,), t, dtype=torch.float64))
    assert torch.equal(follow(velocity, noise(), Steps(4)), x)


def test_noise_that_vanishes_leaves_the_equation():
    draw = FlowSDE(4, noise=1e-9).sample(velocity, noise())
    assert torch.allclose(draw.action, follow(velocity, noise(), Steps(4)), atol=1e-7)
    chain = FlowNoise(4, low=1e-9, high=2e-9).sample(velocity, raw_std, noise())
    assert torch.allclose(chain.action, follow(velocity, noise(), Steps(4)), atol=1e-7)


def by_hand(x, k, a, steps):
    """Mean and deviation of one stochastic step, as they are written in Flow-GRPO, number by number."""
    t, d = 1 - k / steps, 1 / steps
    v = velocity(x[None], torch.tensor([t], dtype=torch.float64))[0]
    sigma = a * math.sqrt(t / (1 - t if k else 1 / steps))
    drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)
    return x - d * drift, sigma * math.sqrt(d)


@pytest.mark.parametrize("counted", [(None, None), (2, None), (2, 1)])
def test_the_stochastic_step_has_the_density_that_is_written_in_the_paper(counted):
    flow = FlowSDE(4, noise=0.7, counted=counted)
    draw = flow.sample(velocity, noise(64), torch.Generator().manual_seed(3))
    assert set(draw.index.tolist()) == {0, 1, 2, 3}
    scored = flow.log_prob(velocity, draw.pair, draw.index)
    assert torch.equal(scored, draw.log_prob)  # so the first ratio is 1
    for row in range(64):
        mean, std = by_hand(draw.pair[row, 0], int(draw.index[row]), 0.7, 4)
        expected = Normal(mean, std).log_prob(draw.pair[row, 1])[: counted[0], : counted[1]].sum()
        assert draw.log_prob[row].item() == pytest.approx(expected.item(), abs=1e-9)


def test_before_and_after_the_stochastic_step_a_sample_follows_the_equation():
    draw = FlowSDE(4).sample(velocity, noise(32), torch.Generator().manual_seed(1))
    for row, k in enumerate(draw.index.tolist()):
        x = noise(32)[row : row + 1]
        for i in range(4):
            if i == k:
                assert torch.allclose(draw.pair[row, 0], x[0], atol=1e-12)
                x = draw.pair[row, 1][None]
            else:
                x = x - velocity(x, torch.tensor([1 - i / 4], dtype=torch.float64)) / 4
        assert torch.allclose(draw.action[row], x[0], atol=1e-12)


def test_a_stochastic_step_keeps_the_distribution_of_actions():
    """Actions N(1.5, 0.4^2), whose velocity is known: x is jointly Gaussian with action and noise."""

    def exact(x, t):
        t = t[:, None, None]
        variance = (1 - t) ** 2 * 0.4**2 + t**2
        from_mean = (x - (1 - t) * 1.5) / variance
        return t * from_mean - (1.5 + (1 - t) * 0.4**2 * from_mean)

    start = torch.randn(40_000, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = follow(exact, start, Steps(64))
    assert plain.mean().item() == pytest.approx(1.5, abs=0.01) and plain.std().item() == pytest.approx(0.4, abs=0.01)
    action = FlowSDE(64, noise=1.0).sample(exact, start, torch.Generator().manual_seed(1)).action
    assert action.mean().item() == pytest.approx(plain.mean().item(), abs=0.002)
    # With noise added and nothing taken away it is 0.02 wider.
    assert action.std().item() == pytest.approx(plain.std().item(), abs=0.006)


@pytest.mark.parametrize("counted", [(None, None), (1, None), (2, 1)])
def test_a_chain_has_the_sum_of_its_steps_log_probabilities(counted):
    flow = FlowNoise(3, low=0.1, high=0.4, counted=counted)
    chain = flow.sample(velocity, raw_std, noise(), torch.Generator().manual_seed(2))
    expected, entropy = torch.zeros(B, dtype=torch.float64), torch.zeros(B, dtype=torch.float64)
    for k in range(3):
        x, t = chain.states[:, k], torch.full((B,), 1 - k / 3, dtype=torch.float64)
        std = 0.1 * 4.0 ** torch.sigmoid(raw_std(x, t))
        assert (std > 0.1).all() and (std < 0.4).all()
        step = Normal(x - velocity(x, t) / 3, std)
        each = step.log_prob(chain.states[:, k + 1])
        expected += each[:, : counted[0], : counted[1]].sum(dim=(1, 2))
        entropy += step.entropy()[:, : counted[0], : counted[1]].sum(dim=(1, 2))
    assert torch.allclose(chain.log_prob, expected, atol=1e-9)
    score = flow.score(velocity, raw_std, chain.states)
    assert torch.equal(score.log_prob, chain.log_prob) and torch.allclose(score.entropy, entropy, atol=1e-9)
    assert torch.equal(chain.action, chain.states[:, -1]) and torch.equal(chain.states[:, 0], noise())


@pytest.mark.parametrize("kind", ["sde", "noise"])
def test_the_policy_gradient_moves_actions_towards_the_target(kind):
    """REINFORCE on the distance to 0.8, from a velocity that leaves actions where the noise was."""
    shift, spread = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    model = lambda x, t: shift.expand_as(x)  # noqa: E731
    widths = lambda x, t: spread.expand_as(x)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([shift, spread], lr=0.05)
    for _ in range(60):
        start = 0.1 * torch.randn(512, 1, 1, generator=generator)
        if kind == "sde":
            flow = FlowSDE(4)
            draw = flow.sample(model, start, generator)
            log_prob = flow.log_prob(model, draw.pair, draw.index)
        else:
            flow = FlowNoise(4)
            draw = flow.sample(model, widths, start, generator)
            log_prob = flow.score(model, widths, draw.states).log_prob
        reward = -(draw.action - 0.8).abs().flatten()
        loss = -((reward - reward.mean()) / reward.std() * log_prob).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    reached = draw.action.mean().item()
    assert 0.6 < reached < 1.0 and shift.item() < -0.3


def test_what_has_no_density_is_refused():
    with pytest.raises(UserError, match="noise above 0"):
        FlowSDE(4, noise=0.0)
    with pytest.raises(UserError, match="0 < low < high"):
        FlowNoise(4, low=0.2, high=0.1)
    with pytest.raises(UserError, match="at least 1 denoising step"):
        FlowSDE(0)
