"""The contract below all models: what is decided, scored and valued, whatever a model draws."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    TanhTransform,
    TransformedDistribution,
)
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.data import Categorical as CategoricalSpec
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from worlds import WRAP, gradients_of, rollout_batch, small_model, total_loss, value_head

from agents.action_heads import GaussianHead, TokenHead, entropy_of, mode_of
from agents.checking import check_policy
from agents.policy import VLAPolicy
from agents.small_vla import VisionEncoder
from agents.vla import DecidingVLA, StagedVLA, contract_of
from envs.tabletop import TabletopEnv
from research.config import PPOConfig
from research.errors import UserError
from research.training.advantages import GAEAdvantages
from research.training.algorithm import Progress
from research.training.freezing import freeze, parameter_groups
from research.training.loss import make_loss
from research.training.ppo import PPO, PolicyUpdate
from research.training.rollout import Rollouts

TOKENS = ("decision", "tokens")


class Autoregressive(DecidingVLA):
    """Three action tokens one after the other, each drawn given those before it, as a language model would."""

    decision_keys, context_keys = ("action", TOKENS), ("patches", ("observation", "proprio"))
    bins = 7

    def __init__(self):
        super().__init__()
        self.vision_encoder = VisionEncoder(3, 8)
        self.language_model = nn.GRU(16, 16, batch_first=True)
        self.embed, self.proprio = nn.Embedding(self.bins, 16), nn.Linear(3, 16)
        self.patches = nn.Linear(8, 16)
        self.action_head, self.value_head = nn.Linear(16, self.bins), nn.Linear(16, 1)

    def stages(self):
        return [TensorDictModule(self.vision_encoder, in_keys=[("observation", "rgb")], out_keys=["patches"])]

    def prompt(self, step):
        seen = self.patches(step["patches"]).mean(1, keepdim=True)
        return torch.cat([seen, self.proprio(step["observation", "proprio"])[:, None]], 1)

    def decide(self, step, deterministic):
        out, state = self.language_model(self.prompt(step))
        tokens, log_prob, value = [], 0.0, self.value_head(out[:, -1])
        for _ in range(3):
            distribution = Categorical(logits=self.action_head(out[:, -1]))
            token = distribution.logits.argmax(-1) if deterministic else distribution.sample()
            tokens.append(token)
            log_prob = log_prob + distribution.log_prob(token)
            out, state = self.language_model(self.embed(token)[:, None], state)
        tokens = torch.stack(tokens, 1)
        action = tokens.float() / (self.bins - 1) * 2 - 1
        return step.update({"action": action, TOKENS: tokens, "action_log_prob": log_prob, "state_value": value})

    def score(self, step):
        tokens = step[TOKENS]
        prompt = self.prompt(step)
        out, _ = self.language_model(torch.cat([prompt, self.embed(tokens[:, :-1])], 1))  # one pass over all of them
        distribution = Categorical(logits=self.action_head(out[:, 1:]))
        return distribution.log_prob(tokens).sum(1), distribution.entropy().sum(1), self.value_head(out[:, 1])

    def state_value(self, step):
        return self.value_head(self.language_model(self.prompt(step))[0][:, -1])


def tokens_model(scope="none") -> Autoregressive:
    torch.manual_seed(0)
    model = Autoregressive().eval()
    freeze(model, scope)
    return model


class InOtherPrecision(Autoregressive):
    """Its actions are float64, its values bfloat16."""

    def decide(self, step, deterministic):
        step = super().decide(step, deterministic)
        return step.update({"action": step["action"].double(), "state_value": step["state_value"].bfloat16()})

    def score(self, step):
        *scores, value = super().score(step)
        return *scores, value.bfloat16()

    def state_value(self, step):
        return super().state_value(step).bfloat16()


def tabletop_step(n: int = 4) -> TensorDict:
    return TabletopEnv(n, modalities=["rgb", "proprio", "language"]).reset()


def test_what_is_decided_in_another_precision_acts_and_learns():
    torch.manual_seed(0)
    policy = VLAPolicy(InOtherPrecision().eval())
    check_policy(policy, tabletop_step()["observation"], (3,))
    batch = rollout_batch(policy)
    assert {batch[key].dtype for key in ("action", "state_value", "advantage", "value_target")} == {torch.float32}
    losses = total_loss(policy, batch)
    assert losses["max_ratio"].item() == pytest.approx(1, abs=1e-5) and losses["loss_critic"].isfinite()


@pytest.mark.parametrize("scope", ["none", "vision"])
def test_what_was_decided_is_scored_with_a_ratio_of_one(scope):
    policy = VLAPolicy(tokens_model(scope))
    assert policy.interface == "deciding"
    batch = rollout_batch(policy)
    assert batch[TOKENS].dtype == torch.int64 and batch[TOKENS].shape == (32, 3)
    assert (("observation", "rgb") in batch.keys(True)) == (scope == "none")  # patches are kept in its place
    assert ("patches" in batch.keys()) == (scope == "vision")
    losses = total_loss(policy, batch)
    assert losses["max_ratio"].item() == pytest.approx(1, abs=1e-5) and losses["clip_fraction"] == 0


@pytest.mark.parametrize(("num_envs", "steps"), [(32, 1), (4, 8)])
def test_reuse_changes_neither_actions_nor_gradients(num_envs, steps):
    model = tokens_model("vision")
    gradients, actions = [], []
    for reuse in ("auto", "off"):
        policy = VLAPolicy(model, feature_reuse=reuse)
        batch = rollout_batch(policy, num_envs, steps)
        actions.append(batch["action"])
        gradients.append(gradients_of(policy, batch))
    assert torch.equal(*actions)
    for kept, anew in zip(*gradients, strict=True):
        if steps == 1:  # as many rows at once in collecting as in the update
            assert torch.equal(kept, anew)
        else:  # a stage that runs for more rows at once rounds otherwise, on some machines
            torch.testing.assert_close(kept, anew, rtol=1e-5, atol=1e-8)


def test_tokens_that_were_good_become_likelier():
    policy = VLAPolicy(tokens_model())
    cfg = PPOConfig(batch_size=32, n_epochs=8)
    optimizer = torch.optim.Adam(parameter_groups(policy.model, 1e-2, {}))
    update = PolicyUpdate(make_loss(policy.actor, policy.critic, cfg), optimizer, cfg, value_head(policy.model), True)
    batch = rollout_batch(policy)
    batch["advantage"] = batch["action"][:, :1].clone()  # the first number should grow
    first = lambda: policy.model(tabletop_step(32)["observation"])[:, 0].mean().item()  # noqa: E731
    before = first()
    for _ in range(3):
        update(batch)
    assert first() > before + 0.2


def test_an_action_alone_is_not_scored_where_more_was_decided():
    model, step = tokens_model(), tabletop_step()
    assert model(step["observation"]).shape == (4, 3) and model.get_value(step["observation"]).shape == (4, 1)
    with pytest.raises(UserError, match="does not say what was decided"):
        model.evaluate_actions(step["observation"], torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("method", "result", "message"),
    [
        ("decide", lambda step, d: step, r"decide \(action\): expected a float tensor \[4, 3\], got NoneType"),
        ("score", lambda step: (torch.zeros(4), torch.zeros(4)), r"score should return|expected a float tensor"),
        ("score", lambda step: (torch.zeros(4, 3), torch.zeros(4), torch.zeros(4, 1)), r"score \(log_prob\)"),
        ("score", lambda step: (torch.zeros(4), torch.zeros(4), torch.zeros(4, 1)), "no trainable parameter"),
        ("state_value", lambda step: torch.zeros(4), r"state_value: expected a float tensor \[4, 1\]"),
    ],
)
def test_a_broken_contract_says_expected_and_got(method, result, message):
    model = tokens_model()
    check_policy(VLAPolicy(model), tabletop_step()["observation"], (3,))
    setattr(model, method, result)
    with pytest.raises((UserError, ValueError), match=message) as caught:
        check_policy(VLAPolicy(model), tabletop_step()["observation"], (3,))
    assert "\n" not in str(caught.value)


def test_a_stage_that_is_missing_is_named():
    class Lost(Autoregressive):
        context_keys = ("patches", "hidden")

    with pytest.raises(UserError, match="a stage that writes 'hidden'"):
        VLAPolicy(Lost())


@pytest.mark.parametrize("interface", WRAP)
def test_a_copied_policy_acts_with_its_own_weights(interface):
    """As a worker's does: none may hold on to the model that was copied."""
    policy = VLAPolicy(WRAP[interface](small_model()))
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in copied.act.parameters():
            parameter.zero_()
    step = tabletop_step()
    with torch.no_grad():
        assert (copied.act(step.copy())["state_value"] == 0).all()
        assert (copied.values(step) == 0).all()
        assert (policy.act(step.copy())["state_value"] != 0).all()


def test_a_model_with_the_methods_of_a_staged_one_is_staged():
    class Duck(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.value_head = model, model.value_head
            self.stages, self.action_distribution, self.value = model.stages, model.action_distribution, model.value

    model = small_model()
    freeze(model, ["vision_encoder"])
    ours, ducks = VLAPolicy(model), VLAPolicy(Duck(model))
    assert ducks.interface == "staged" and not isinstance(ducks.model, StagedVLA)
    assert ducks.kept_keys == ours.kept_keys and contract_of(model) is model
    batches = [rollout_batch(policy) for policy in (ours, ducks)]
    assert (batches[0] == batches[1]).all()


# --------------------------------------------------------------------------------------------------- distributions


def mixture() -> MixtureSameFamily:
    parts = Independent(Normal(torch.tensor([[[0.0], [4.0]]]), 1.0), 1)
    return MixtureSameFamily(Categorical(torch.tensor([[0.25, 0.75]])), parts)


def test_a_mode_in_closed_form():
    normal = Independent(Normal(torch.tensor([[0.5, -2.0]]), 1.0), 1)
    assert torch.equal(mode_of(normal), normal.mean)
    squashed = Independent(TransformedDistribution(Normal(torch.tensor([[0.5, -2.0]]), 1.0), TanhTransform()), 1)
    assert torch.equal(mode_of(squashed), torch.tensor([[0.5, -2.0]]).tanh())
    assert mode_of(mixture()).item() == 3.0


def test_entropy_is_estimated_where_there_is_no_formula():
    normal = Normal(torch.zeros(20000), 2.0)
    assert torch.equal(entropy_of(normal), normal.entropy())
    without_formula = TransformedDistribution(normal, [])
    estimated = entropy_of(without_formula)
    assert estimated.shape == (20000,) and estimated.std() > 0.1
    assert estimated.mean().item() == pytest.approx(normal.entropy()[0].item(), abs=0.03)


@pytest.mark.parametrize("head", [GaussianHead, TokenHead])
def test_a_head_over_chunks_has_one_log_probability_per_chunk(head):
    torch.manual_seed(0)
    chunks = head(8, 3, horizon=4)
    distribution = chunks(torch.randn(5, 8))
    action = distribution.sample()
    assert action.shape == (5, 4, 3) and mode_of(distribution).shape == (5, 4, 3)
    assert distribution.log_prob(action).shape == distribution.entropy().shape == (5,)
    by_hand = sum(p for p in distribution.base_dist.log_prob(action).flatten(1).T) if head is GaussianHead else None
    if by_hand is not None:
        torch.testing.assert_close(distribution.log_prob(action), by_hand)


# ----------------------------------------------------------------------------------------------------------- chunks


class ChunkWorld(EnvBase):
    """Rewards chunks [H, A] = [4, 2] whose numbers are near 0.5; every episode takes three decisions."""

    resumes_exactly = False

    def __init__(self, n: int = 16):
        super().__init__(batch_size=[n])
        flag = lambda: CategoricalSpec(2, (n, 1), dtype=torch.bool)  # noqa: E731
        self.observation_spec = Composite(observation=Composite(proprio=Unbounded((n, 3)), shape=(n,)), shape=(n,))
        self.action_spec = Bounded(-1.0, 1.0, (n, 4, 2))
        self.reward_spec = Unbounded((n, 1))
        self.full_done_spec = Composite(done=flag(), terminated=flag(), truncated=flag(), shape=(n,))
        self.t = torch.zeros(n, 1, dtype=torch.int64)

    def _now(self, **more) -> TensorDict:
        observation = {"proprio": torch.cat([self.t.float(), torch.ones(len(self.t), 2)], 1)}
        return TensorDict({"observation": observation, **more}, self.batch_size)

    def _reset(self, tensordict=None, **_):
        mask = None if tensordict is None else tensordict.get("_reset", None)
        self.t = torch.where(torch.ones_like(self.t, dtype=torch.bool) if mask is None else mask, 0, self.t)
        none = torch.zeros_like(self.t, dtype=torch.bool)
        return self._now(done=none, terminated=none.clone(), truncated=none.clone())

    def _step(self, tensordict):
        self.t = self.t + 1
        reward = -(tensordict["action"] - 0.5).square().mean((1, 2))[:, None]
        done = self.t >= 3
        return self._now(reward=reward, done=done, terminated=done.clone(), truncated=torch.zeros_like(done))

    def _set_seed(self, seed):
        pass


class ChunkModel(StagedVLA):
    def __init__(self):
        super().__init__()
        self.fusion = nn.Sequential(nn.Linear(3, 16), nn.Tanh())
        self.action_head, self.value_head = GaussianHead(16, 2, width=16, horizon=4), nn.Linear(16, 1)

    def stages(self):
        return [TensorDictModule(self.fusion, in_keys=[("observation", "proprio")], out_keys=["hidden"])]

    def action_distribution(self, hidden):
        return self.action_head(hidden)

    def value(self, hidden):
        return self.value_head(hidden)


def test_chunks_of_actions_are_collected_and_learned():
    torch.manual_seed(0)
    env, model = ChunkWorld(), ChunkModel().eval()
    policy = VLAPolicy(model)
    check_policy(policy, env.observation_spec["observation"].zero()[:2], env.action_spec.shape[1:])
    with pytest.raises(UserError, match=r"expected a float tensor \[2, 4, 5\], got .* \[2, 4, 2\]"):
        check_policy(policy, env.observation_spec["observation"].zero()[:2], (4, 5))
    cfg = PPOConfig(batch_size=96, n_epochs=8)
    optimizer = torch.optim.Adam(parameter_groups(model, 1e-2, {}))
    update = PolicyUpdate(make_loss(policy.actor, policy.critic, cfg), optimizer, cfg, value_head(model), True)
    ppo, rollouts = PPO(GAEAdvantages(policy, 0.9, 0.9), update, cfg), Rollouts(env, policy, 16 * 12)
    returns = []
    for iteration in range(30):
        rollout = rollouts.next()
        assert rollout["action"].shape == (16, 12, 4, 2) and rollout["action_log_prob"].shape == (16, 12)
        batch, _ = ppo.prepare(rollout)
        ppo.update(batch, Progress(30, iteration))
        returns.append(rollouts.metrics()["rollout/return"])
    assert returns[-1] > returns[0] + 0.5
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        assert (policy.act(env.reset())["action"] - 0.5).abs().mean() < 0.2
