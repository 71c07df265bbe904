"""Action distributions that models bring along: each has a mode that does not change, and an entropy, or is refused."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Beta, Categorical, Independent, MixtureSameFamily, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import TanhNormal

from agents.checking import check_policy
from agents.policy import VLAPolicy
from agents.vla import StagedVLA
from research.errors import UserError

COMPONENTS = 5


class Odd(StagedVLA):
    """Staged; `kind` chooses the action distribution over A = 2 numbers."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.vision_encoder = nn.Sequential(nn.Linear(3, 16), nn.Tanh())
        self.action_head = nn.Linear(16, {"gmm": 4 * COMPONENTS + COMPONENTS, "beta": 4, "token": 12}.get(kind, 2))
        self.log_std = nn.Parameter(torch.full((2,), -1.0))
        self.value_head = nn.Linear(16, 1)

    def stages(self):
        return [TensorDictModule(self.vision_encoder, in_keys=[("observation", "proprio")], out_keys=["hidden"])]

    def action_distribution(self, hidden):
        x, std = self.action_head(hidden), self.log_std.exp()
        if self.kind == "normal":
            return Independent(Normal(x, std), 1)
        if self.kind == "normal without an event":
            return Normal(x, std)
        if self.kind == "tanh":
            return TransformedDistribution(Independent(Normal(x, std), 1), [TanhTransform(cache_size=1)])
        if self.kind == "torchrl_tanh":
            return TanhNormal(x, std.expand_as(x))
        if self.kind == "beta":
            a, b = nn.functional.softplus(x).add(1).chunk(2, -1)
            return Independent(Beta(a, b), 1)
        if self.kind == "token":
            return Independent(Categorical(logits=x.unflatten(-1, (2, 6))), 1)
        logits, rest = x[:, :COMPONENTS], x[:, COMPONENTS:].unflatten(-1, (COMPONENTS, 4))
        mean, raw = rest.chunk(2, -1)
        return MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mean, raw.sigmoid() + 0.05), 1))

    def value(self, hidden):
        return self.value_head(hidden)

    def expected_mode(self, x):
        """By hand, from the output of the action head."""
        if self.kind == "beta":  # (a - 1) / (a + b - 2)
            a, b = nn.functional.softplus(x).chunk(2, -1)
            return a / (a + b)
        if self.kind == "gmm":
            weights, means = x[:, :COMPONENTS].softmax(-1), x[:, COMPONENTS:].unflatten(-1, (COMPONENTS, 4))[..., :2]
            return (weights[..., None] * means).sum(1)
        if self.kind == "token":
            return x.unflatten(-1, (2, 6)).argmax(-1).float()
        return x.tanh() if "tanh" in self.kind else x


def step(rows: int = 4) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"observation": {"proprio": torch.randn(rows, 3)}}, [rows])


@pytest.mark.parametrize("kind", ["normal", "tanh", "torchrl_tanh", "beta", "gmm", "token"])
def test_it_acts_by_one_mode_and_learns_with_an_entropy(kind):
    torch.manual_seed(0)
    model = Odd(kind).eval()
    policy = VLAPolicy(model)
    check_policy(policy, step()["observation"], (2,), (6, 6) if kind == "token" else None)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        actions = [policy.act(step())["action"] for _ in range(3)]
        head = model.action_head(model.vision_encoder(step()["observation", "proprio"]))
    torch.testing.assert_close(actions[0], model.expected_mode(head))
    assert all(torch.equal(action, actions[0]) for action in actions)
    acted = policy.act(step())
    scored = model.score(model.run_stages(step()["observation"]).set("action", acted["action"].detach()))
    torch.testing.assert_close(scored[0], acted["action_log_prob"], rtol=1e-4, atol=1e-4)  # the ratio is 1
    assert scored[1].shape == (4,) and scored[1].isfinite().all()
    (scored[0].sum() + scored[1].sum()).backward()
    assert model.action_head.weight.grad.isfinite().all() and model.action_head.weight.grad.abs().max() > 0


class InBetween(Odd):
    """Its distribution is in the dtype of its numbers: bfloat16 under autocast, or float64."""

    dtype = torch.bfloat16

    def action_distribution(self, hidden):
        x = self.action_head(hidden).to(self.dtype)
        return Independent(Normal(x, self.log_std.exp().to(self.dtype)), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_action_is_float32_and_scored_as_it_is_kept_whatever_its_distribution_has(dtype):
    torch.manual_seed(0)
    model = InBetween("normal").eval()
    model.dtype = dtype
    policy = VLAPolicy(model, autocast="bf16" if dtype == torch.bfloat16 else "off")
    check_policy(policy, step()["observation"], (2,))
    acted = policy.act(step(64))
    assert acted["action"].dtype == torch.float32
    assert acted["action_log_prob"].dtype in (torch.float32, torch.float64)
    scored, *_ = policy.actor.score.evaluate(acted.select("observation", "action"))
    assert torch.equal(scored, acted["action_log_prob"])


def test_log_probabilities_that_autocast_rounds_are_refused():
    observations = step()["observation"]
    with pytest.raises(UserError, match=r"Odd.score: log_prob is bfloat16, .* near -5 are 0.031 apart.*logits.float"):
        check_policy(VLAPolicy(Odd("token").eval(), autocast="bf16"), observations, (2,), (6, 6))
    with pytest.raises(UserError, match=r"Odd.score failed .*not implemented for 'BFloat16'"):
        check_policy(VLAPolicy(Odd("beta").eval(), autocast="bf16"), observations, (2,))


def test_one_without_an_event_dimension_is_refused():
    with pytest.raises(UserError, match=r"log_prob.*\[4\].*\[4, 2\]"):
        check_policy(VLAPolicy(Odd("normal without an event")), step()["observation"], (2,))
