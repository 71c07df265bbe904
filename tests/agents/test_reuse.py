"""What never changes is computed once: frozen stages, and encoders of instructions."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from worlds import (
    LOSS_KEYS,
    count_calls,
    gradients_of,
    rollout_batch,
    small_model,
)

import agents.reuse
from agents.policy import VLAPolicy
from agents.reuse import OncePerInstruction, distinct_rows, split_constant
from agents.small_vla import SmallVLA
from envs.tabletop import TabletopEnv
from research.schema import with_text_as
from research.training.freezing import freeze
from research.training.rollout import Rollouts


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


def test_other_weights_empty_the_table_of_a_stage_that_is_a_method():
    """Such a stage lists no parameters of its own."""
    table, encoder = language_table()
    table = OncePerInstruction(TensorDictModule(encoder.forward, table.in_keys, table.out_keys))
    tokens = torch.randint(1, 256, (2, 64))
    look_up(table, tokens)
    encoder.load_state_dict(small_model(seed=5).language_encoder.state_dict())
    torch.testing.assert_close(look_up(table, tokens), encoder(tokens))


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
