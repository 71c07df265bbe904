"""One model, three interfaces: the same actions, losses and gradients, and no trunk pass too many."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, ValueOperator
from worlds import (
    INTERFACES,
    LOSS_KEYS,
    WRAP,
    ThreeMethods,
    count_calls,
    gae,
    gradients_of,
    rollout_batch,
    small_model,
    total_loss,
    value_head,
)

import agents.reuse
from agents.checking import check_policy
from agents.cost import flops_per_transition, reuse_report
from agents.policy import VLAPolicy
from agents.reuse import OncePerInstruction, distinct_rows, split_constant
from agents.small_vla import SmallVLA
from envs.tabletop import TabletopEnv
from research.config import PPOConfig
from research.schema import UserError, with_text_as
from research.training.algorithm import Progress
from research.training.freezing import freeze, parameter_groups
from research.training.loss import make_loss
from research.training.ppo import PPO, PolicyUpdate
from research.training.rollout import Rollouts

HEADS = [("gaussian", {}), ("tokens", {"bins": 11})]


@pytest.mark.parametrize(("head", "options"), HEADS)
@pytest.mark.parametrize("critic_gradient", ["head", "trunk"])
def test_all_interfaces_give_equal_losses_and_gradients(head, options, critic_gradient):
    reference = None
    batch = rollout_batch(VLAPolicy(small_model(head, options)))
    batch["action_log_prob"] += 0.1 * torch.randn(len(batch))  # away from ratio 1, where clipping matters
    for name in INTERFACES:
        model = small_model(head, options)
        policy = VLAPolicy(WRAP[name](model))
        assert policy.interface == name
        losses = total_loss(policy, batch.clone())
        optimizer = torch.optim.SGD([{"params": list(model.parameters()), "name": "all"}], lr=0.1)
        loss, apart = make_loss(policy.actor, policy.critic, PPOConfig()), critic_gradient == "head"
        update = PolicyUpdate(loss, optimizer, PPOConfig(), value_head(model), critic_apart=apart)
        update._backward(losses, value_only=False, share=1.0)
        got = [losses[k].detach() for k in ("loss_objective", "loss_critic", "loss_entropy")]
        got += [p.grad for p in model.parameters() if p.grad is not None]
        assert len(got) > 20
        reference = reference or got
        assert len(reference) == len(got)
        for a, b in zip(reference, got, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("exploration", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC, ExplorationType.MODE])
@pytest.mark.parametrize(("head", "options"), HEADS)
def test_acting_is_what_torchrls_modules_do(head, options, exploration):
    """The same bits, and the same random numbers drawn, as from TorchRL's own modules around stages and heads."""
    model = small_model(head, options)
    freeze(model, ["vision_encoder"])
    policy = VLAPolicy(model)
    actor = ProbabilisticActor(
        policy.rest,
        in_keys={"hidden": "hidden"},
        out_keys=["action"],
        distribution_class=model.action_distribution,
        return_log_prob=True,
    )
    critic = ValueOperator(model.value_head, in_keys=["hidden"], out_keys=["state_value"])
    step = TabletopEnv(8, modalities=["rgb", "proprio", "language"]).reset()
    results = []
    for act in (policy.act, TensorDictSequential(policy.frozen, actor, critic)):
        torch.manual_seed(7)
        with torch.no_grad(), set_exploration_type(exploration):
            results.append((act(step.copy()), torch.rand(1)))
    (ours, then), (theirs, then_too) = results
    assert torch.equal(then, then_too) and set(ours.keys(True)) == set(theirs.keys(True))
    assert (ours == theirs).all()
    assert torch.equal(policy.actor.get_dist(ours).log_prob(ours["action"]), ours["action_log_prob"])


@pytest.mark.parametrize(("head", "options"), HEADS)
@pytest.mark.parametrize("interface", INTERFACES)
def test_ratio_is_one_at_the_first_minibatch(head, options, interface):
    policy = VLAPolicy(WRAP[interface](small_model(head, options)))
    batch = rollout_batch(policy)
    losses = total_loss(policy, batch[torch.randperm(len(batch))[:16]])
    assert losses["kl_approx"].abs().item() < 1e-6
    assert losses["clip_fraction"].item() == 0
    assert losses["max_ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert losses["mean_ratio"].item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("scope", ["none", ["vision_encoder"]])
def test_bf16_keeps_the_ratio_at_one_and_the_mathematics_in_float32(interface, scope):
    model = small_model()
    freeze(model, scope)
    policy = VLAPolicy(WRAP[interface](model), autocast="bf16")
    batch = rollout_batch(policy)
    assert all(batch[key].dtype == torch.float32 for key in LOSS_KEYS)
    if interface == "staged" and scope != "none":
        assert batch["vision_features"].dtype == torch.bfloat16  # as recomputing would make them, in half the bytes
    losses = total_loss(policy, batch[:16])
    assert all(losses[key].dtype == torch.float32 for key in ("loss_objective", "loss_critic", "loss_entropy"))
    assert losses["max_ratio"].item() == pytest.approx(1.0, abs=1e-3)
    assert losses["mean_ratio"].item() == pytest.approx(1.0, abs=1e-3)
    exact = VLAPolicy(WRAP[interface](small_model()), autocast="off")
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        step = TabletopEnv(8, modalities=["rgb", "proprio", "language"]).reset()
        values = policy.act(step.copy())["state_value"], exact.act(step.copy())["state_value"]
    assert not torch.equal(*values)  # it did run in another precision
    torch.testing.assert_close(*values, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("AVX512", False)])
def test_bf16_on_a_cpu_without_it_is_warned_of(monkeypatch, caplog, capability, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    VLAPolicy(small_model(), autocast="bf16")
    assert ("bf16 will be slower" in caplog.text) == warned
    caplog.clear()
    VLAPolicy(small_model())
    assert caplog.text == ""


@pytest.mark.parametrize("interface", ["staged", "methods"])
def test_compiled_policies_give_equal_losses_and_gradients(interface):
    gradients = []
    batch = rollout_batch(VLAPolicy(small_model()))
    for compile in (False, True):
        policy = VLAPolicy(WRAP[interface](small_model()), compile=compile)
        gradients.append(gradients_of(policy, batch.clone()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_checking_a_policy_compiles_nothing():
    torch._dynamo.reset()
    policy = VLAPolicy(small_model(), compile=True)
    compiled = torch._dynamo.utils.counters["stats"]
    before = compiled["unique_graphs"]
    check_policy(policy, observations(), (3,))
    assert compiled["unique_graphs"] == before
    with torch.no_grad():
        policy.act(TensorDict({"observation": observations()}, [2]))
    assert compiled["unique_graphs"] > before


@pytest.mark.parametrize(
    ("interface", "per_step", "per_minibatch"), [("staged", 1, 1), ("fused", 1, 1), ("methods", 3, 2)]
)
def test_trunk_passes_are_counted(interface, per_step, per_minibatch):
    model = small_model()
    calls = count_calls(model.fusion)
    policy = VLAPolicy(WRAP[interface](model))
    env = TabletopEnv(4, max_steps=50, modalities=["rgb", "proprio", "language"])
    rollouts = Rollouts(env, policy, 4 * 8)
    rollouts.next()
    calls.clear()
    rollout = rollouts.next()
    assert len(calls) == 8 * per_step + 1  # and the last column's next states, once
    calls.clear()
    cfg = PPOConfig(n_epochs=2, batch_size=16)
    optimizer = torch.optim.Adam(parameter_groups(model, 1e-3, {}))
    update = PolicyUpdate(make_loss(policy.actor, policy.critic, cfg), optimizer, cfg, value_head(model), True)
    ppo = PPO(gae(policy), update, cfg)
    batch, _ = ppo.prepare(rollout)
    assert len(calls) == 0
    calls.clear()
    ppo.update(batch, Progress(iterations=1))
    assert len(calls) == 2 * 2 * per_minibatch


@pytest.mark.parametrize("scope", ["vision", "backbone"])
def test_the_next_rollout_takes_over_the_frozen_features_of_where_the_last_one_ended(scope):
    collected = []
    for look_ahead in (True, False):
        model = small_model()
        freeze(model, scope)
        policy = VLAPolicy(model)
        if not look_ahead:
            policy.look_ahead = lambda steps, policy=policy: (VLAPolicy.look_ahead(policy, steps)[0], None)
        calls = count_calls(model.vision_encoder)
        torch.manual_seed(1)
        env = TabletopEnv(4, max_steps=13, modalities=["rgb", "proprio", "language"])
        rollouts = Rollouts(env, policy, 4 * 8)
        for _ in range(2):
            calls.clear()
            collected.append(rollouts.next())
        truncated = bool(collected[-1]["next", "truncated"].any())
        assert truncated and len(calls) == 8 + 1 + (not look_ahead)
    for ours, anew in zip(collected[:2], collected[2:], strict=True):
        assert (ours == anew).all()


SCOPES = [["vision_encoder"], ["language_encoder"], ["vision_encoder", "language_encoder"], "backbone", "none"]


@pytest.mark.parametrize("scope", SCOPES)
def test_frozen_stages_run_once_and_give_the_same_gradients(scope):
    """Features kept in the rollout change nothing but the work (and the batch shape they were computed at)."""
    torch.manual_seed(1)
    model = small_model()
    freeze(model, scope)
    policies = {reuse: VLAPolicy(model, feature_reuse=reuse) for reuse in ("auto", "off")}
    keys = {reuse: policy.kept_keys for reuse, policy in policies.items()}
    policies["auto"].kept_keys = [*keys["auto"], *(k for k in keys["off"] if k not in keys["auto"])]
    both = rollout_batch(policies["auto"])
    gradients, recomputed = {}, {}
    for reuse, policy in policies.items():
        batch = both.select(*keys[reuse], *LOSS_KEYS)
        calls = count_calls(model.vision_encoder)
        gradients[reuse] = gradients_of(policy, batch)
        reused = reuse == "auto" and scope not in (["language_encoder"], "none")
        assert len(calls) == (0 if reused else 1)
        assert (("observation", "rgb") in batch.keys(True)) != reused  # pixels are dropped where nothing reads them
    for a, b in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # At equal batch shapes, bit for bit. (The language table encodes every instruction by itself, and a shared stage
    # every distinct one, so run the stages behind them.)
    rest = policies["auto"].rest
    rest.stages = [getattr(stage, "stage", stage) for stage in rest.stages]
    step = with_text_as(torch.int64, both.select("observation"))
    with torch.no_grad():
        for stage in policies["auto"].frozen.stages:
            step = getattr(stage, "stage", stage)(step)
    recomputed = gradients_of(policies["auto"], both.update(step).select(*keys["auto"], *LOSS_KEYS))
    assert all(torch.equal(a, b) for a, b in zip(recomputed, gradients["off"], strict=True))


def test_reuse_report_counts_bytes_and_work():
    model = small_model()
    freeze(model, ["vision_encoder", "language_encoder"])
    step = TabletopEnv(2, modalities=["rgb", "proprio", "language"]).reset()["observation"]
    report = reuse_report(VLAPolicy(model), step)
    assert report.frozen_stages == ["vision_encoder", "language_encoder"] and report.blocked_stages == []
    assert report.bytes_before == 64 * 64 * 3 + 3 * 4 + 64 * 8
    assert report.bytes_after == 64 * 8 * 4 + 64 * 4 + 3 * 4  # tokens, language features, proprioception
    assert report.frozen_flops > 10 * report.trained_flops > 0
    (line,) = report.lines()
    assert "vision_encoder, language_encoder" in line and f"{report.bytes_after:,}" in line
    freeze(model := small_model(), ["vision_encoder"])
    assert reuse_report(VLAPolicy(model), step).bytes_after == 64 * 8 * 4 + 64 + 3 * 4  # tokens, text, proprioception
    shared = "feature reuse: language_encoder trains, and runs once per distinct instruction"
    assert reuse_report(VLAPolicy(small_model()), step).lines() == [shared]
    assert reuse_report(VLAPolicy(small_model(), feature_reuse="off"), step).lines() == []


@pytest.mark.parametrize("interface", INTERFACES)
def test_flops_are_counted_forward_and_backward(interface):
    model = small_model()
    freeze(model, "backbone")
    step = TabletopEnv(1, modalities=["rgb", "proprio", "language"]).reset()["observation"]
    state = torch.get_rng_state()
    collected, trained = flops_per_transition(VLAPolicy(WRAP[interface](model)), step)
    assert torch.equal(torch.get_rng_state(), state)  # a run repeats, whether or not anyone counts
    # Of 32 hidden numbers: two heads of 128 units, for 3 numbers and for 1; behind the first layer nothing learns.
    forward, inner = 32 * 128 + 128 * 3 + 32 * 128 + 128, 128 * 3 + 128
    heads = 2 * (forward + forward + inner)
    if interface == "staged":
        assert trained == heads
        assert collected > 3e6  # the vision encoder alone
    else:
        passes = {"fused": 1, "methods": 2}[interface]
        assert trained > 3e6 * passes + heads
    everything = flops_per_transition(VLAPolicy(WRAP[interface](small_model())), step)
    assert everything[1] > 2 * trained


def test_dropout_that_is_on_prevents_reuse_and_says_so():
    model = small_model()
    model.vision_encoder.tokens = nn.Sequential(model.vision_encoder.tokens, nn.Dropout(0.1))
    freeze(model, ["vision_encoder"])  # puts it in eval mode
    assert VLAPolicy(model).frozen_stages == ["vision_encoder"]
    model.vision_encoder.train()
    policy = VLAPolicy(model)
    assert policy.frozen_stages == [] and policy.blocked_stages == [("vision_encoder", "it is random, as dropout is")]


def test_augmentation_prevents_reuse_of_what_sees_it_and_says_so():
    torch.manual_seed(0)
    model = SmallVLA(3, token_size=8, hidden_size=32, random_shift=4).eval()
    freeze(model, ["vision_encoder", "language_encoder"])
    policy = VLAPolicy(model)
    assert policy.frozen_stages == ["language_encoder"]
    assert policy.blocked_stages == [("vision_encoder", "it reads shifted_rgb, which changes")]
    assert ("observation", "rgb") in policy.kept_keys


class MethodStage(SmallVLA):
    """Its trunk is a method, or a function, that uses weights of which the stage does not know."""

    function = False

    def stages(self):
        look = (lambda rgb, text, p: self.look(rgb, text, p)) if self.function else self.look
        keys = [("observation", key) for key in ("rgb", "language", "proprio")]
        return [TensorDictModule(look, in_keys=keys, out_keys=["hidden"])]

    def look(self, rgb, language, proprio):
        return self.fusion(self.vision_encoder(rgb), self.language_encoder(language), proprio)


@pytest.mark.parametrize("function", [False, True])
def test_a_stage_that_is_a_method_or_function_can_be_compiled(function):
    gradients = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = MethodStage(3, token_size=8, hidden_size=32).eval()
        model.function = function
        policy = VLAPolicy(model, compile=compile)
        gradients.append(gradients_of(policy, rollout_batch(policy)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [False, True])
def test_a_stage_that_is_a_method_or_function_trains(function):
    """It holds no parameters of its own; taking it for frozen would silently train nothing but the heads."""
    torch.manual_seed(0)
    model = MethodStage(3, token_size=8, hidden_size=32).eval()
    model.function = function
    policy = VLAPolicy(model)
    assert policy.frozen_stages == []
    assert len(policy.blocked_stages) == function
    gradients_of(policy, rollout_batch(policy))
    assert all(p.grad is not None for p in model.fusion.parameters())


def test_a_frozen_stage_behind_a_trainable_one_is_not_reused():
    model = small_model()
    freeze(model, ["fusion"])
    frozen, rest = split_constant(model.stages())
    assert frozen == [] and len(rest) == 3


def test_language_is_encoded_once_per_instruction():
    model = small_model()
    freeze(model, ["language_encoder"])
    stage = OncePerInstruction(model.stages()[1], capacity=100)
    calls = count_calls(model.language_encoder)
    step = TabletopEnv(64).reset()
    distinct = len({tuple(row) for row in step["observation", "language"].tolist()})
    with torch.no_grad():
        features = stage(step.copy())["language_features"]
        assert len(calls) == distinct
        torch.testing.assert_close(features, model.language_encoder(step["observation", "language"]))
        calls.clear()
        assert torch.equal(stage(step.flip(0))["language_features"], features.flip(0))  # independent of the batch
        assert len(calls) == 0
        model.load_state_dict(small_model(seed=5).state_dict())  # other weights: what was kept is no longer true
        torch.testing.assert_close(
            stage(step.copy())["language_features"], model.language_encoder(step["observation", "language"])
        )
        for seed in range(5):
            step = TabletopEnv(64, seed=seed).reset()
            torch.testing.assert_close(
                stage(step.copy())["language_features"], model.language_encoder(step["observation", "language"])
            )
            assert len(stage._texts) <= 100


def language_table(**options) -> tuple[OncePerInstruction, nn.Module]:
    model = small_model()
    freeze(model, ["language_encoder"])
    return OncePerInstruction(model.stages()[1], **options), model.language_encoder


@torch.no_grad()
def look_up(table: OncePerInstruction, tokens: torch.Tensor) -> torch.Tensor:
    return table(TensorDict({"observation": {"language": tokens}}, [len(tokens)]))["language_features"]


def test_a_batch_with_more_instructions_than_are_kept_is_encoded_all_the_same():
    table, encoder = language_table(capacity=5)
    tokens = torch.randint(1, 256, (12, 64))
    for rows in (tokens[:5], tokens, tokens[4:8], tokens[:0]):
        torch.testing.assert_close(look_up(table, rows), encoder(rows))
    assert look_up(table, tokens[:, :20]).shape == (12, 64)  # instructions of another length


def test_instructions_whose_hashes_are_equal_get_each_its_own_features(monkeypatch):
    hash_by_sum(monkeypatch)
    table, encoder = language_table()
    tokens = torch.randint(1, 256, (4, 64))
    tokens[1] = tokens[0].flip(0)
    for rows in (tokens[:1], tokens[1:], tokens, tokens[[1, 0]]):
        torch.testing.assert_close(look_up(table, rows), encoder(rows))
    assert not torch.equal(*look_up(table, tokens[:2]))


def test_a_trainable_language_encoder_runs_once_per_distinct_instruction():
    """Equal gradients from a fraction of the rows."""
    policies = {reuse: VLAPolicy(small_model(), feature_reuse=reuse) for reuse in ("auto", "off")}
    batch = rollout_batch(policies["off"], num_envs=4, steps=16)
    texts = {tuple(row) for row in batch["observation", "language"].tolist()}
    assert 4 < len(texts) < len(batch) / 2
    rows, gradients = {"auto": [], "off": []}, {}
    for reuse, policy in policies.items():
        policy.model.language_encoder.register_forward_hook(lambda _, x, __, seen=rows[reuse]: seen.append(len(x[0])))
        gradients[reuse] = gradients_of(policy, batch.clone())
    assert rows == {"auto": [len(texts)], "off": [len(batch)]}
    for a, b in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert policies["auto"].shared_stages == ["language_encoder"] and policies["off"].shared_stages == []
    rows["auto"].clear()
    policies["auto"].values(batch[:1])  # a lone row is not worth a look
    assert rows["auto"] == [1]


@pytest.mark.parametrize("interface", INTERFACES)
def test_rollouts_keep_the_instruction_as_bytes_and_models_read_int64(interface):
    policy = VLAPolicy(WRAP[interface](small_model()))
    seen = []
    small = getattr(policy.model, "model", policy.model)
    small.language_encoder.register_forward_hook(lambda _, x, __: seen.append(x[0].dtype))
    batch = rollout_batch(policy)
    assert batch["observation", "language"].dtype == torch.uint8
    wide = with_text_as(torch.int64, batch)
    assert wide["observation", "language"].dtype == torch.int64 and wide["action"] is batch["action"]
    narrow, same = gradients_of(policy, batch.copy()), gradients_of(policy, wide)
    assert set(seen) == {torch.int64}
    assert all(torch.equal(a, b) for a, b in zip(narrow, same, strict=True))


@pytest.mark.parametrize("reason", ["dropout", "batch norm"])
def test_rows_are_computed_apart_where_sharing_would_change_them(reason):
    model = small_model()
    inner = model.language_encoder.far
    if reason == "dropout":
        model.language_encoder.far = nn.Sequential(inner, nn.Dropout(0.1))
    else:
        model.language_encoder.far = nn.Sequential(inner, nn.BatchNorm1d(64))
    model.eval()
    assert VLAPolicy(model).shared_stages == ["language_encoder"]  # as long as the model is in eval mode
    model.train()
    assert VLAPolicy(model).shared_stages == []


def hash_by_sum(monkeypatch) -> None:
    """Texts of the same letters have the same hash from here on."""
    monkeypatch.setattr(agents.reuse, "_hash_weights", lambda length, _: torch.ones(length, dtype=torch.int64))


def test_distinct_rows_are_found_and_colliding_hashes_do_no_harm(monkeypatch):
    texts = torch.randint(0, 256, (20, 64))
    tokens = texts[torch.randint(0, 20, (500,))]
    rows, which = distinct_rows(tokens)
    assert len(rows) == len({tuple(row) for row in tokens.tolist()}) and torch.equal(tokens[rows][which], tokens)
    hash_by_sum(monkeypatch)
    tokens[:2, :2] = torch.tensor([[0, 1], [1, 0]])
    tokens[:2, 2:] = 7
    rows, which = distinct_rows(tokens)
    assert torch.equal(rows, torch.arange(500)) and torch.equal(which, rows)


def test_evaluation_takes_the_mode_and_rollouts_sample():
    policy = VLAPolicy(small_model())
    step = TabletopEnv(4, modalities=["rgb", "proprio", "language"]).reset()
    for wrap in WRAP.values():
        if wrap is ThreeMethods:
            continue  # its forward has no deterministic form
        act = VLAPolicy(wrap(small_model())).act
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            assert torch.equal(act(step.copy())["action"], act(step.copy())["action"])
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            assert not torch.equal(act(step.copy())["action"], act(step.copy())["action"])
    assert policy.interface == "staged"


class Strings(ThreeMethods):
    """Wants the instruction as text."""

    language_format = "strings"

    def forward(self, observations):
        self.seen = observations["language"]
        return torch.zeros(observations.batch_size[0], 3)

    def get_value(self, observations):
        assert isinstance(observations["language"], list)
        return self.model.value_head(torch.zeros(observations.batch_size[0], 32))

    def evaluate_actions(self, observations, actions):
        assert observations["language"] == self.expected or self.expected is None
        return self.model.value_head.parameters().__next__().sum() + actions.sum(-1), actions.sum(-1)

    expected = None


def test_strings_are_handed_to_a_model_that_asks():
    model = Strings(small_model())
    env = TabletopEnv(4)
    step = env.reset()
    with torch.no_grad():
        VLAPolicy(model).act(step)
    assert isinstance(model.seen, list) and len(model.seen) == 4
    assert all(isinstance(text, str) and "plate" in text for text in model.seen)
    assert step["observation", "language"].dtype == torch.int64  # the rollout keeps tensors


def observations() -> TensorDict:
    return TabletopEnv(2).reset()["observation"]


@pytest.mark.parametrize(
    ("method", "result", "message"),
    [
        ("forward", lambda o: torch.zeros(2, 4), r"forward \(the action\): expected a float tensor \[2, 3\].*\[2, 4\]"),
        ("forward", lambda o: torch.zeros(2, 3, dtype=torch.int64), r"expected a float tensor.*int64"),
        ("forward", lambda o: None, "got NoneType"),
        ("get_value", lambda o: torch.zeros(2), r"get_value: expected a float tensor \[2, 1\].*\[2\]"),
        ("evaluate_actions", lambda o, a: (torch.zeros(2, 3), torch.zeros(2)), r"\(log_prob\).*\[2\].*\[2, 3\]"),
        ("evaluate_actions", lambda o, a: (torch.zeros(2), torch.zeros(1)), r"\(entropy\)"),
        ("evaluate_actions", lambda o, a: torch.zeros(2), r"should return \(log_prob, entropy\)"),
        ("evaluate_actions", lambda o, a: (torch.zeros(2), torch.zeros(2)), "no trainable parameter"),
        ("forward", lambda o: o["touch"], "forward failed on the environment's observations"),
    ],
)
def test_wrong_shapes_and_dtypes_say_expected_and_got(method, result, message):
    model = ThreeMethods(small_model())
    check_policy(VLAPolicy(model), observations(), (3,))
    setattr(model, method, result)
    with pytest.raises(UserError, match=message) as caught:
        check_policy(VLAPolicy(model), observations(), (3,))
    assert "\n" not in str(caught.value)


def test_a_modality_the_environment_lacks_is_named():
    with pytest.raises(UserError, match="reads depth, but the environment offers"):
        step = TabletopEnv(2, modalities=["rgb", "proprio"]).reset()
        check_policy(VLAPolicy(SmallVLA(3, modalities=["rgb", "depth"])), step["observation"], (3,))


@pytest.mark.parametrize(
    "modalities", [["rgb"], ["proprio"], ["depth", "language"], ["language"], ["rgb", "depth", "proprio", "language"]]
)
def test_any_subset_of_modalities(modalities):
    env = TabletopEnv(3, modalities=modalities)
    model = SmallVLA(3, modalities=modalities)
    policy = VLAPolicy(model)
    check_policy(policy, env.reset()["observation"], (3,))
    names = {name for name, _ in model.named_children()}
    assert ("vision_encoder" in names) == bool({"rgb", "depth"} & set(modalities))
    assert ("language_encoder" in names) == ("language" in modalities)


def test_channels_first_pixels_are_the_same_pixels():
    model, step = small_model(), TabletopEnv(2).reset()["observation"]
    flipped = step.copy().set("rgb", step["rgb"].permute(0, 3, 1, 2))
    torch.testing.assert_close(model.encode(step), model.encode(flipped))
